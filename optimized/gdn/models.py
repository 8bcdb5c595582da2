"""The models whose gated delta rule layers we must serve: their heads, and where that is written.

One row is one public model. Finetunes, quantized versions and FP8 versions keep the heads of their base.
"""

from dataclasses import dataclass
from typing import NamedTuple

from ...reference.errors import invalid_argument

TENSOR_PARALLEL_SIZES = (1, 2, 4, 8)
"""Tensor-parallel sizes (ranks) that we compile for."""

_NEXT = (
    "config.json of Qwen/Qwen3-Next-80B-A3B-Thinking, as kept in github.com/ai-dynamo/aiconfigurator "
    "src/aiconfigurator/model_configs at 1b7cfb10"
)
_DENSE = (
    "huggingface.co/Qwen, as listed in github.com/ai-dynamo/aiconfigurator "
    "collector/cases/models/Qwen3_5ForConditionalGeneration_cases.yaml at 980f57bf"
)
_MOE = (
    "huggingface.co/Qwen, as listed in github.com/ai-dynamo/aiconfigurator "
    "collector/cases/models/Qwen3_5MoeForConditionalGeneration_cases.yaml at 0397baec"
)
_LARGEST = (
    "config.json of Qwen/Qwen3.5-397B-A17B, as kept in github.com/ai-dynamo/aiconfigurator "
    "src/aiconfigurator/model_configs at 87fe4b0c"
)


class Shape(NamedTuple):
    """What one rank computes: query/key heads, value heads, their dims."""

    H: int
    HV: int
    K: int
    V: int


@dataclass(frozen=True)
class Model:
    """The gated delta rule layers of one model.

    Attributes:
        name: the public name, without its owner.
        H: `linear_num_key_heads`.
        HV: `linear_num_value_heads`.
        K: `linear_key_head_dim`.
        V: `linear_value_head_dim`.
        source: where these numbers were read.
    """

    name: str
    H: int
    HV: int
    K: int
    V: int
    source: str

    def shape(self, tp: int) -> Shape:
        """What one of `tp` tensor-parallel ranks computes: vLLM gives each an equal part of the heads.

        Raises:
            InvalidArgumentError: where `tp` does not divide both numbers of heads; vLLM refuses it too.
        """
        if tp < 1 or self.H % tp or self.HV % tp:
            invalid_argument(
                "tensor-parallel size", tp, f"a divisor of the {self.H} and {self.HV} heads of {self.name}"
            )
        return Shape(self.H // tp, self.HV // tp, self.K, self.V)


MODELS = {
    model.name: model
    for model in (
        Model("Qwen3-Next-80B-A3B", H=16, HV=32, K=128, V=128, source=_NEXT),
        Model("Qwen3.5-0.8B", H=16, HV=16, K=128, V=128, source=_DENSE),
        Model("Qwen3.5-2B", H=16, HV=16, K=128, V=128, source=_DENSE),
        Model("Qwen3.5-4B", H=16, HV=32, K=128, V=128, source=_DENSE),
        Model("Qwen3.5-9B", H=16, HV=32, K=128, V=128, source=_DENSE),
        Model("Qwen3.5-27B", H=16, HV=48, K=128, V=128, source=_DENSE),
        Model("Qwen3.5-35B-A3B", H=16, HV=32, K=128, V=128, source=_MOE),
        Model("Qwen3.5-122B-A10B", H=16, HV=64, K=128, V=128, source=_MOE),
        Model("Qwen3.5-397B-A17B", H=16, HV=64, K=128, V=128, source=_LARGEST),
    )
}
