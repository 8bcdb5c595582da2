"""Prefill batches that `ascend-twin bench` times the op on."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from ..equivalence_tests.cases import EquivalenceError
from ..equivalence_tests.compare import compare_o, compare_state
from ..equivalence_tests.tolerances import Errors, limit
from ..optimized.gdn import ChunkMetadata, ChunkMetadataBuilder, chunk_gated_delta_rule
from ..optimized.gdn.device import Device

SEED = 0

# Qwen3-Next: query/key heads, value heads, head dim.
H, HV, D = 16, 32, 128


def random_seq_lens(num_seqs: int, num_tokens: int) -> list[int]:
    """Random lengths >= 1 that add up to `num_tokens`."""
    rng = np.random.default_rng(SEED)
    cuts = np.sort(rng.choice(np.arange(1, num_tokens), num_seqs - 1, replace=False))
    return np.diff([0, *cuts.tolist(), num_tokens]).tolist()


def query_start_loc_of(seq_lens: Sequence[int]) -> torch.Tensor:
    return torch.tensor([0, *np.cumsum(seq_lens).tolist()], dtype=torch.int32)


def random_tensors(
    num_tokens: int,
    num_heads: int,
    num_value_heads: int,
    dtype: torch.dtype,
    device: torch.device | None = None,
) -> list[torch.Tensor]:
    """q, k, v of `dtype`, g and beta float32, drawn on the device."""
    device = device or torch.device("cpu")
    like: dict[str, Any] = {"generator": torch.Generator(device).manual_seed(SEED), "device": device}
    q, k = (torch.randn(1, num_tokens, num_heads, D, **like).to(dtype) for _ in range(2))
    v = torch.randn(1, num_tokens, num_value_heads, D, **like).to(dtype)
    g, beta = (torch.rand(1, num_tokens, num_value_heads, **like) for _ in range(2))
    return [q, k, v, -g, beta]


class PrefillBatch(NamedTuple):
    """A prefill batch on a device: tensors, metadata built before, and the bounds of its sequences there."""

    inputs: list[torch.Tensor]
    initial_state: torch.Tensor
    metadata: ChunkMetadata
    cu_seqlens: torch.Tensor
    bounds: list[int]

    def run(self, function: Callable[..., Any], **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """o and final_state."""
        return function(
            *self.inputs,
            initial_state=self.initial_state,
            output_final_state=True,
            use_qk_l2norm_in_kernel=True,
            **options,
        )

    def prebuilt(self, implementation: str) -> tuple[torch.Tensor, torch.Tensor]:
        return self.run(chunk_gated_delta_rule, prebuilt_meta=self.metadata, implementation=implementation)

    def on_the_spot(self, implementation: str) -> tuple[torch.Tensor, torch.Tensor]:
        return self.run(chunk_gated_delta_rule, cu_seqlens=self.cu_seqlens, implementation=implementation)


def prefill_batch(
    device: Device, num_seqs: int, num_tokens: int, num_heads: int, num_value_heads: int
) -> PrefillBatch:
    """Sequences of random lengths, that many tokens in all, with initial states."""
    where = device.torch_device
    q, k, v, g, beta = random_tensors(num_tokens, num_heads, num_value_heads, torch.bfloat16, where)
    rng = torch.Generator(where).manual_seed(SEED + 1)
    loc = query_start_loc_of(random_seq_lens(num_seqs, num_tokens))
    return PrefillBatch(
        [q, k, v, g, beta.to(q.dtype)],
        torch.randn(num_seqs, num_value_heads, D, D, generator=rng, device=where),
        ChunkMetadataBuilder(device, num_tokens, num_seqs, num_value_heads).build(loc),
        loc.to(where, torch.int64),
        loc.tolist(),
    )


def check_agree(
    ours: tuple[torch.Tensor, torch.Tensor], peers: tuple[torch.Tensor, torch.Tensor], bounds: list[int]
) -> None:
    """Raise unless both computed the same: what is timed must be the same work.

    Each may be off the truth by the limit of bfloat16, so one may be off the other by twice that.
    """
    bfloat16 = torch.bfloat16
    twice = Errors(*(2 * x for x in limit(bfloat16)))
    for comparison in (
        compare_o(ours[0], peers[0], dtype=bfloat16, bounds=bounds, limit=twice),
        compare_state(ours[1], peers[1], dtype=torch.float32, operands=bfloat16, limit=twice),
    ):
        if not comparison.passed:
            raise EquivalenceError(f"contenders do not compute the same: {comparison}")
