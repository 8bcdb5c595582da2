"""Chunk metadata of a prefill step, prebuilt on the host and sent to the device in one copy."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from ...reference.errors import CapacityError, InvalidArgumentError, invalid_argument
from .device import Device
from .kernels.block_sizes import CHUNK_SIZE, SOLVE_TRIL_BLOCK_SIZE, cumsum_block_size
from .staging import Lease, StagingRing

_ALIGNMENT = 4  # int32 values: every view starts at a multiple of 16 bytes, so kernels compile once


@dataclass(frozen=True, eq=False)
class ChunkMetadata:
    """The chunk metadata of one step: named views into one int32 buffer on the device.

    N sequences (spec sequences and padding left out), numbered as in `cu_seqlens`, empty ones included; NT
    chunks of 64 tokens. Valid for work launched while this object is referenced and not released.

    Attributes:
        cu_seqlens: `[N + 1]` int32, bounds (tokens) of the sequences.
        chunk_offsets_chunk64: `[N + 1]` int32, first chunk of each sequence.
        update_chunk_offsets_chunk64: `[N + 1]` int32, the same with one more state a sequence.
        final_chunk_indices_chunk64: `[N]` int32, last state of each sequence in that numbering.
        chunk_indices_chunk64: `[NT, 2]` int32 = (sequence, chunk in sequence).
        chunk_indices_large_block: `[.., 2]` int32, the same for blocks of solve_tril.
        block_indices_cumsum: `[.., 2]` int32, the same for blocks of chunk_local_cumsum.
        keep_meta: `[N]` bool on the device, False for empty sequences; None when there are none.
        chunk_offsets_int64: `chunk_offsets_chunk64` as int64, for consumers that want it so; None unless the
            builder was asked for it.
        num_decodes: leading sequences that decode one token.
        seq_lens_host: `[N]` int64 numpy array on the host, tokens of each sequence.
        block_sizes: tokens a block of chunk_indices_chunk64, chunk_indices_large_block and
            block_indices_cumsum.

    Source: field names as read by vllm-ascend's wrappers, version 0.18.0 (ops/triton/fla/chunk.py) and later
        (ops/gdn_attn_builder.py), so that this object can be their `prebuilt_meta`.
    """

    cu_seqlens: torch.Tensor
    chunk_offsets_chunk64: torch.Tensor
    update_chunk_offsets_chunk64: torch.Tensor
    final_chunk_indices_chunk64: torch.Tensor
    chunk_indices_chunk64: torch.Tensor
    chunk_indices_large_block: torch.Tensor
    block_indices_cumsum: torch.Tensor
    keep_meta: torch.Tensor | None
    chunk_offsets_int64: torch.Tensor | None
    num_decodes: int
    seq_lens_host: np.ndarray
    block_sizes: tuple[int, int, int]
    _lease: Lease

    @property
    def released(self) -> bool:
        """Whether `release` was called: the views may hold another step's metadata."""
        return self._lease.released

    def release(self) -> None:
        """Say that all work that reads this metadata has been launched: its buffer may be used again."""
        self._lease.release()

    @cached_property
    def cu_seqlens_host(self) -> tuple[int, ...]:
        """The values of `cu_seqlens`."""
        return (0, *self.seq_lens_host.cumsum().tolist())

    @cached_property
    def cu_seqlens_kern(self) -> tuple[int, ...] | None:
        """`cu_seqlens` without the empty sequences, for kernels that take none; None when there are none."""
        if self.keep_meta is None:
            return None
        return (0, *self.seq_lens_host[self.seq_lens_host > 0].cumsum().tolist())

    @cached_property
    def chunk_indices_chunk64_host(self) -> tuple[int, ...]:
        """Flat (sequence, chunk) pairs, numbered by `cu_seqlens_kern` (`cu_seqlens_host` where it is None).

        Those wrappers hand the pair (these indices, these bounds) to one operator, so both leave the empty
        sequences out; the tables on the device keep them.
        """
        counts = -(-self.seq_lens_host[self.seq_lens_host > 0] // CHUNK_SIZE)
        return tuple(
            index for n, count in enumerate(counts.tolist()) for c in range(count) for index in (n, c)
        )


class ChunkMetadataBuilder:
    """Builds the chunk metadata of each step into a ring of pinned buffers, with one asynchronous copy.

    Args:
        device: where the kernels run.
        max_num_batched_tokens: tokens a step may hold, >= 1.
        max_num_seqs: sequences a step may hold, >= 1.
        num_value_heads: HV on this rank, >= 1; the block size of the cumsum depends on it.
        depth: how many `ChunkMetadata` may be referenced, or their copies in flight, at once. Default: 2.
        int64_offsets: whether the chunk offsets are wanted as int64, too. Default: they are not.

    Attributes:
        ring: the staging ring; `ring.copies` and `ring.waits` count.
        block_sizes: as in `ChunkMetadata`.

    Raises:
        InvalidArgumentError: for a number below 1.
    """

    def __init__(
        self,
        device: Device,
        max_num_batched_tokens: int,
        max_num_seqs: int,
        num_value_heads: int,
        depth: int = 2,
        *,
        int64_offsets: bool = False,
    ) -> None:
        if isinstance(device, (str, torch.device)):
            invalid_argument("device", repr(device), f"a Device, such as open_device({str(device)!r})")
        for name, value in (
            ("max_num_batched_tokens", max_num_batched_tokens),
            ("max_num_seqs", max_num_seqs),
            ("num_value_heads", num_value_heads),
        ):
            if value < 1:
                invalid_argument(name, value, ">= 1")
        self.max_num_batched_tokens = max_num_batched_tokens
        self.max_num_seqs = max_num_seqs
        self.block_sizes = (CHUNK_SIZE, SOLVE_TRIL_BLOCK_SIZE, cumsum_block_size(num_value_heads))
        self._block_sizes = np.array((1, *self.block_sizes))[:, None]
        self._block_sizes_less_one = self._block_sizes - 1
        most_pairs = sum(_most_blocks(max_num_batched_tokens, max_num_seqs, b) + 1 for b in self.block_sizes)
        self._counting = np.arange(max_num_seqs + 1, dtype=np.int32)
        self._sequences = np.tile(np.arange(max_num_seqs + 1), (3, 1))
        self._rows = np.arange(most_pairs) << 32
        self.int64_offsets = int64_offsets
        capacity = 5 * _aligned(max_num_seqs + 1) + 2 * most_pairs
        if int64_offsets:
            capacity += _aligned(2 * (max_num_seqs + 1))
        self.ring = StagingRing(device, capacity, depth)

    def build(
        self,
        query_start_loc_cpu: torch.Tensor,
        *,
        spec_sequence_masks_cpu: torch.Tensor | None = None,
        num_decodes: int = 0,
        num_actual_seqs: int | None = None,
    ) -> ChunkMetadata:
        """Build the metadata of a step and queue its copy to the device.

        Args:
            query_start_loc_cpu: `[num_seqs + 1]` int32 or int64 on the CPU, bounds (tokens) of the scheduled
                part of each sequence; starts at 0, may repeat.
            spec_sequence_masks_cpu: `[num_seqs]` bool on the CPU (or its first num_actual_seqs values), True
                for sequences that verify draft tokens: they take another path and do not enter; the tokens
                of the others are then counted as if packed. Default: none.
            num_decodes: how many of the sequences that enter decode one token; they come first. Default: 0.
            num_actual_seqs: sequences before the padding rows of a captured graph. Default: all.

        Returns:
            The metadata; views that the current stream may read at once.

        Raises:
            InvalidArgumentError: for an argument that does not fit; nothing has been written.
            CapacityError: for more sequences or tokens than the builder was made for; nothing written.
            StagingError: when `depth` earlier metadata are still referenced.
        """
        lens = _sequence_lengths(query_start_loc_cpu, spec_sequence_masks_cpu, num_actual_seqs)
        N = len(lens)
        if self.max_num_seqs < N:
            raise CapacityError(f"number of sequences is {N}; allowed: max_num_seqs = {self.max_num_seqs}")
        if not 0 <= num_decodes <= N:
            invalid_argument("num_decodes", num_decodes, f"0 to {N}, the number of sequences that enter")

        # Tokens, then blocks of each size, of each sequence; a token is a block of size 1.
        counts = np.zeros((4, N + 1), dtype=np.int64)
        counts[:, :N] = (lens + self._block_sizes_less_one) // self._block_sizes
        ends = np.add.accumulate(counts, axis=1)
        num_tokens, *totals = ends[:, N].tolist()
        if num_tokens > self.max_num_batched_tokens:
            raise CapacityError(
                f"number of tokens is {num_tokens}; allowed: "
                f"max_num_batched_tokens = {self.max_num_batched_tokens}"
            )
        # One more column pads each table to an even number of pairs, so that the next one is aligned.
        odd = [total & 1 for total in totals]
        counts[1, N], counts[2, N], counts[3, N] = odd
        num_pairs = sum(totals) + sum(odd)
        vector = _aligned(N + 1)
        tables = 4 * vector
        keep = tables + 2 * num_pairs
        has_empty = np.count_nonzero(lens) < N
        wide = keep + vector if has_empty else keep
        size = wide + 2 * (N + 1) if self.int64_offsets else wide

        def fill(out: np.ndarray) -> None:
            vectors = out[:tables].reshape(4, vector)
            vectors[:, 0] = 0
            vectors[:2, 1 : N + 1] = ends[:2, :N]
            vectors[2, : N + 1] = vectors[1, : N + 1] + self._counting[: N + 1]
            vectors[3, :N] = vectors[1, 1 : N + 1] + self._counting[:N]
            # A pair of int32 is one int64 (of a little-endian host, as all we run on are): the sequence, and
            # 2**32 times the row of the table less the first row of the sequence.
            repeats = counts[1:].ravel()
            first_rows = np.add.accumulate(repeats) - repeats
            base = self._sequences[:, : N + 1].ravel() - (first_rows << 32)
            out[tables:keep].view(np.int64)[:] = base.repeat(repeats) + self._rows[:num_pairs]
            if has_empty:
                out[keep:wide].view(np.bool_)[:N] = lens > 0
            if self.int64_offsets:
                out[wide:].view(np.int64)[:] = vectors[1, : N + 1]

        lease = self.ring.stage(size, fill)
        buffer = lease.buffer
        cu_seqlens, offsets, update_offsets = buffer.as_strided((3, N + 1), (vector, 1)).unbind()
        second, third = tables + 2 * (totals[0] + odd[0]), keep - 2 * (totals[2] + odd[2])
        return ChunkMetadata(
            cu_seqlens=cu_seqlens,
            chunk_offsets_chunk64=offsets,
            update_chunk_offsets_chunk64=update_offsets,
            final_chunk_indices_chunk64=buffer.as_strided((N,), (1,), 3 * vector),
            chunk_indices_chunk64=buffer.as_strided((totals[0], 2), (2, 1), tables),
            chunk_indices_large_block=buffer.as_strided((totals[1], 2), (2, 1), second),
            block_indices_cumsum=buffer.as_strided((totals[2], 2), (2, 1), third),
            keep_meta=buffer[keep:wide].view(torch.bool)[:N] if has_empty else None,
            chunk_offsets_int64=buffer[wide:].view(torch.int64) if self.int64_offsets else None,
            num_decodes=num_decodes,
            seq_lens_host=lens,
            block_sizes=self.block_sizes,
            _lease=lease,
        )


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT


def _most_blocks(max_num_tokens: int, max_num_seqs: int, block_size: int) -> int:
    """The most blocks that a batch can have: every sequence but one ends with a block of one token."""
    sequences = min(max_num_seqs, max_num_tokens)
    return sequences + (max_num_tokens - sequences) // block_size


def _sequence_lengths(
    query_start_loc: torch.Tensor, spec_masks: torch.Tensor | None, num_actual_seqs: int | None
) -> np.ndarray:
    """Tokens of each sequence that enters `[N]` int64, all arguments checked."""
    if (
        not isinstance(query_start_loc, torch.Tensor)
        or not query_start_loc.is_cpu
        or query_start_loc.dtype not in (torch.int32, torch.int64)
        or query_start_loc.ndim != 1
        or query_start_loc.numel() < 1
    ):
        raise InvalidArgumentError(
            f"query_start_loc_cpu is {query_start_loc!r}; "
            "allowed: a CPU tensor [num_seqs + 1] of int32 or int64"
        )
    bounds = query_start_loc.numpy()
    num_seqs = len(bounds) - 1
    if num_actual_seqs is None:
        num_actual_seqs = num_seqs
    elif not 0 <= num_actual_seqs <= num_seqs:
        invalid_argument("num_actual_seqs", num_actual_seqs, f"0 to {num_seqs}, len(query_start_loc_cpu) - 1")
    bounds = bounds[: num_actual_seqs + 1]
    if bounds[0] != 0:
        invalid_argument("query_start_loc_cpu[0]", bounds[0], "0")
    falls = bounds[1:] < bounds[:-1]  # not lens < 0: a difference of int64 can overflow
    if np.count_nonzero(falls):
        i = int(falls.argmax()) + 1
        invalid_argument(f"query_start_loc_cpu[{i}]", bounds[i], f">= {bounds[i - 1]}, the value before it")
    bounds = bounds.astype(np.int64)
    lens = bounds[1:] - bounds[:-1]
    if spec_masks is None:
        return lens
    if (
        not isinstance(spec_masks, torch.Tensor)
        or spec_masks.device.type != "cpu"
        or spec_masks.dtype != torch.bool
        or tuple(spec_masks.shape) not in ((num_seqs,), (num_actual_seqs,))
    ):
        allowed = f"a CPU bool tensor of {num_seqs} or {num_actual_seqs} values, one a sequence"
        raise InvalidArgumentError(f"spec_sequence_masks_cpu is {spec_masks!r}; allowed: {allowed}")
    return lens[~spec_masks.numpy()[:num_actual_seqs]]
