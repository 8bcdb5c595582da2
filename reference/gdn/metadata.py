"""Chunk metadata of packed sequences, written as loops that can be checked by eye.

A sequence of L tokens has ceil(L / chunk_size) chunks; an empty one has none, and shifts nobody: numbers of
sequences are the positions in `cu_seqlens`, never ranks among the non-empty ones.
"""

import itertools
from collections.abc import Sequence

import torch

from .inputs import check_chunk_size, check_cu_seqlens


def _chunk_counts(cu_seqlens: torch.Tensor | Sequence[int], chunk_size: int) -> list[int]:
    check_chunk_size(chunk_size)
    bounds = check_cu_seqlens(cu_seqlens)
    return [-((start - end) // chunk_size) for start, end in itertools.pairwise(bounds)]


def chunk_indices(cu_seqlens: torch.Tensor | Sequence[int], chunk_size: int) -> torch.Tensor:
    """The chunks of all sequences, in order.

    Args:
        cu_seqlens: `[N + 1]` ints, bounds (tokens) of the sequences; starts at 0, may repeat.
        chunk_size: tokens a chunk, >= 1.

    Returns:
        `[NT, 2]` int32 = (sequence, chunk in sequence).

    Raises:
        InvalidArgumentError: for cu_seqlens or chunk_size out of their domain.
    """
    pairs = []
    for sequence, count in enumerate(_chunk_counts(cu_seqlens, chunk_size)):
        for chunk in range(count):
            pairs.append((sequence, chunk))
    return torch.tensor(pairs, dtype=torch.int32).reshape(-1, 2)


def chunk_offsets(cu_seqlens: torch.Tensor | Sequence[int], chunk_size: int) -> torch.Tensor:
    """Where the chunks of each sequence start in `chunk_indices`.

    Args, Raises: as `chunk_indices`.

    Returns:
        `[N + 1]` int32; the last value is NT.
    """
    offsets = [0]
    for count in _chunk_counts(cu_seqlens, chunk_size):
        offsets.append(offsets[-1] + count)
    return torch.tensor(offsets, dtype=torch.int32)


def update_chunk_offsets(cu_seqlens: torch.Tensor | Sequence[int], chunk_size: int) -> torch.Tensor:
    """Where the states of each sequence start, when one more than its chunks is kept: the incoming one first.

    Args, Raises: as `chunk_indices`.

    Returns:
        `[N + 1]` int32; every sequence adds its number of chunks plus one, an empty sequence one.

    Source: vllm-ascend 0.18.0, vllm_ascend/ops/triton/fla/utils.py (context parallelism reads them).
    """
    offsets = [0]
    for count in _chunk_counts(cu_seqlens, chunk_size):
        offsets.append(offsets[-1] + count + 1)
    return torch.tensor(offsets, dtype=torch.int32)


def final_chunk_indices(cu_seqlens: torch.Tensor | Sequence[int], chunk_size: int) -> torch.Tensor:
    """Where the last state of each sequence is, in the numbering of `update_chunk_offsets`.

    Args, Raises: as `chunk_indices`.

    Returns:
        `[N]` int32.

    Source: vllm-ascend 0.18.0, vllm_ascend/ops/triton/fla/utils.py.
    """
    return update_chunk_offsets(cu_seqlens, chunk_size)[1:] - 1
