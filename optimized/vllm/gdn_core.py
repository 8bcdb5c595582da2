"""The prefill core of a gated delta rule layer, between vLLM's states and our op. No vLLM needed."""

import enum
import logging
from typing import Any

import torch

from ...reference.errors import invalid_argument
from ...reference.gdn import chunk_gated_delta_rule as reference_chunk_gated_delta_rule
from ..gdn.chunked import chunk_gated_delta_rule
from ..gdn.kernels.block_sizes import CHUNK_SIZE, SOLVE_TRIL_BLOCK_SIZE, cumsum_block_size
from ..gdn.metadata import ChunkMetadata
from .settings import GDN_CORES

NULL_SLOT = 0
"""The slot that vLLM gives to no request: a padding row names it, or, in older versions, -1."""

METADATA_FIELD = "non_spec_chunked_prefill_meta"
"""Of vLLM's metadata of a step: where those that our builder made are hung."""

_logger = logging.getLogger(f"vllm.{__name__}")


class StateLayout(enum.Enum):
    """What the two last dimensions of a state are; with K = V no shape tells.

    vLLM declares its pool `[slots, HV, V, K]`, and so its kernels for GPUs use it. Those for CPUs read and
    write the same memory as `[slots, HV, K, V]`.
    """

    KEY_FIRST = "[HV, K, V]"
    VALUE_FIRST = "[HV, V, K]"


def convert_states(states: torch.Tensor, layout: StateLayout) -> torch.Tensor:
    """States of vLLM's layout in ours, `[N, HV, K, V]`; or the other way: it is its own inverse. A view."""
    return states if layout is StateLayout.KEY_FIRST else states.transpose(-1, -2)


def gather_states(pool: torch.Tensor, slots: torch.Tensor, layout: StateLayout) -> torch.Tensor:
    """The states of some sequences, copied out of the pool.

    Args:
        pool: `[num_slots, HV, ...]` floating, in `layout`; its slots may lie apart.
        slots: `[N]` int32 or int64, the slot of each sequence; `NULL_SLOT` or less is a padding row.
        layout: of the pool.

    Returns:
        `[N, HV, K, V]` float32, zeros for padding rows.
    """
    owned = _owned(slots, pool)
    states = pool[slots.clamp(min=NULL_SLOT).long()]
    return convert_states(states.where(owned, 0), layout).float()


def scatter_states(
    pool: torch.Tensor, slots: torch.Tensor, states: torch.Tensor, layout: StateLayout
) -> None:
    """Write the states of some sequences to their slots of the pool, and no other slot.

    Args:
        pool: as in `gather_states`.
        slots: as in `gather_states`; no two sequences share a slot, padding rows may.
        states: `[N, HV, K, V]` floating; those of padding rows are not used.
        layout: of the pool.
    """
    index = slots.clamp(min=NULL_SLOT).long()
    # Padding rows write what is there already: to choose rows by a mask would wait for the device.
    converted = convert_states(states, layout).to(pool.dtype)
    pool[index] = converted.where(_owned(slots, pool), pool[index])


def _owned(slots: torch.Tensor, pool: torch.Tensor) -> torch.Tensor:
    """Which rows are no padding, to be broadcast over states."""
    return (slots > NULL_SLOT).view(-1, *[1] * (pool.ndim - 1))


class PrefillCore:
    """Computes gated delta rule prefill in place of vLLM's own kernel.

    Args:
        name: one of `GDN_CORES`: "reference", or an implementation of the optimized op.

    Attributes:
        num_calls: how often it ran.
        num_prebuilt: how often prebuilt metadata served.
        num_unfit: how often metadata were there, but not those of the batch: they were built on the spot.

    Raises:
        InvalidArgumentError: for an unknown name.
    """

    def __init__(self, name: str) -> None:
        if name not in GDN_CORES:
            invalid_argument("name of a GDN core", repr(name), f"one of {', '.join(GDN_CORES)}")
        self.name = name
        self.num_calls = 0
        self.num_prebuilt = 0
        self.num_unfit = 0

    def __call__(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        g: torch.Tensor,
        beta: torch.Tensor,
        *,
        initial_state: torch.Tensor,
        cu_seqlens: torch.Tensor,
        use_qk_l2norm_in_kernel: bool,
        eps: float,
        metadata: Any = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Run the op on the prefill part of a step.

        Args:
            q, k, v, g, beta: as in `optimized.gdn.chunk_gated_delta_rule`, B = 1.
            initial_state: `[N, HV, K, V]` float32.
            cu_seqlens: `[N + 1]` int32 or int64, bounds (tokens) of the sequences.
            use_qk_l2norm_in_kernel: normalise q and k over K first.
            eps: added to the sum of squares by that normalisation.
            metadata: `ChunkMetadata` of these sequences. If it is anything else the op builds its own.

        Returns:
            o `[1, T, HV, V]` in the dtype of q, and final_state `[N, HV, K, V]`.
        """
        self.num_calls += 1
        given: dict[str, Any] = {
            "initial_state": initial_state,
            "output_final_state": True,
            "cu_seqlens": cu_seqlens,
            "use_qk_l2norm_in_kernel": use_qk_l2norm_in_kernel,
            "eps": eps,
        }
        if self.name == "reference":
            o, final_state = reference_chunk_gated_delta_rule(q, k, v, g, beta, **given)
        else:
            prebuilt = metadata if self._check_fit(metadata, q, cu_seqlens, v.shape[2]) else None
            o, final_state = chunk_gated_delta_rule(
                q, k, v, g, beta, **given, prebuilt_meta=prebuilt, implementation=self.name
            )
        assert final_state is not None
        return o.to(q.dtype), final_state

    def _check_fit(self, metadata: Any, q: torch.Tensor, cu_seqlens: torch.Tensor, HV: int) -> bool:
        """Whether prebuilt metadata can be used for this batch; counted, and said when it cannot."""
        if metadata is None:
            return False
        fits = metadata_fit(metadata, q, cu_seqlens, HV)
        if fits:
            self.num_prebuilt += 1
        else:
            if not self.num_unfit:
                _logger.warning(
                    "Prebuilt chunk metadata are not those of the prefill part of this step: they are built "
                    "on the spot. (Said once a layer.)"
                )
            self.num_unfit += 1
        return fits


def metadata_fit(metadata: Any, q: torch.Tensor, cu_seqlens: torch.Tensor, HV: int) -> bool:
    """Whether metadata describe these sequences, as far as the host can tell without waiting for the device.

    Args:
        metadata: whatever vLLM's metadata of the step carry.
        q: `[1, T, H, K]`.
        cu_seqlens: `[N + 1]`; its values are compared where they are on the host.
        HV: value heads.
    """
    if not isinstance(metadata, ChunkMetadata) or metadata.released:
        return False
    bounds = metadata.cu_seqlens_host
    if cu_seqlens.device.type == "cpu":
        same_sequences = bounds == tuple(cu_seqlens.tolist())
    else:
        same_sequences = len(bounds) == len(cu_seqlens) and bounds[-1] <= q.shape[1]
    return (
        same_sequences
        and metadata.cu_seqlens.device == q.device
        and metadata.block_sizes == (CHUNK_SIZE, SOLVE_TRIL_BLOCK_SIZE, cumsum_block_size(HV))
    )
