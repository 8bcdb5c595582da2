"""How many tokens and columns one program of each kernel takes: the only place where these are written.

The metadata of a step lists (sequence, block) pairs for three of them. Those equal the ones of vllm-ascend
0.18.0 (vllm_ascend/ops/triton/fla: chunk.py, solve_tril.py, cumsum.py), whose kernels may be given our
metadata; only where its cumsum block would be smaller than a chunk (HV > 64) ours stays one chunk.
"""

import torch

CHUNK_SIZE = 64
SOLVE_TRIL_BLOCK_SIZE = 1216
TRIANGLE_SIZE = 16  # rows of the blocks that solve_tril solves row by row
L2NORM_BLOCK_SIZE = 64
SMALLEST_TILE = 16
LARGEST_HEAD_DIM = 256
_CUMSUM_WORKING_SET = 2**18
_STATE_TILE = 2**13


def cumsum_block_size(num_value_heads: int) -> int:
    """Tokens that one program of chunk_local_cumsum takes: a power of two, at least one chunk.

    Args:
        num_value_heads: HV on this rank, >= 1.
    """
    chunks = max(1, _CUMSUM_WORKING_SET // (num_value_heads * CHUNK_SIZE))
    return max(CHUNK_SIZE, 1 << (chunks - 1).bit_length())


def padded(size: int) -> int:
    """The smallest power of two that holds `size` and that a product takes (16)."""
    return max(SMALLEST_TILE, 1 << (size - 1).bit_length())


def state_loop_cuda_options(dtype: torch.dtype, K: int) -> dict[str, int]:
    """How a GPU runs the loops over a state: without spilled registers, with what its shared memory holds."""
    return {"num_warps": 8, "num_stages": 2 if dtype != torch.float32 and padded(K) <= 128 else 1}


def value_block_size(K: int, V: int) -> int:
    """Columns of V whose state one program carries: at most 64, fewer where K is large, to stay on chip.

    Depends on the shapes of the model alone: a sequence gets the same bits whatever else is in the batch.
    """
    return min(padded(V), max(SMALLEST_TILE, _STATE_TILE // padded(K)), 64)
