"""How many tokens one program of each kernel takes: the only place where these numbers are written.

The metadata of a step lists (sequence, block) pairs for each of them. They equal those of vllm-ascend 0.18.0
(vllm_ascend/ops/triton/fla: chunk.py, solve_tril.py, cumsum.py), whose kernels may be given our metadata;
only where its cumsum block would be smaller than a chunk (HV > 64) ours stays one chunk.
"""

CHUNK_SIZE = 64
SOLVE_TRIL_BLOCK_SIZE = 1216
_CUMSUM_WORKING_SET = 2**18


def cumsum_block_size(num_value_heads: int) -> int:
    """Tokens that one program of chunk_local_cumsum takes: a power of two, at least one chunk.

    Args:
        num_value_heads: HV on this rank, >= 1.
    """
    chunks = max(1, _CUMSUM_WORKING_SET // (num_value_heads * CHUNK_SIZE))
    return max(CHUNK_SIZE, 1 << (chunks - 1).bit_length())
