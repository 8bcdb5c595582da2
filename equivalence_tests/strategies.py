"""Hypothesis strategies: batches that force the corners where chunked code goes wrong.

Structure and a seed are drawn; tensor values follow from the seed.
"""

from itertools import accumulate

from hypothesis import strategies as st

from ..optimized.gdn.kernels.block_sizes import CHUNK_SIZE, SOLVE_TRIL_BLOCK_SIZE, cumsum_block_size
from .cases import BETAS, DTYPES, GATES, KEYS, PrefillCase

SEEDS = st.integers(0, 2**16)
HEADS = ((1, 1), (1, 2), (2, 2), (2, 4), (1, 3), (3, 6))
HEAD_DIMS = ((16, 16), (16, 32), (32, 16), (8, 24))
Shapes = tuple[tuple[int, int, int, int], ...]
COMPILED_SHAPES: Shapes = ((2, 4, 16, 32), (2, 6, 24, 8), (1, 1, 32, 16))
"""H, HV, K and V of cases for native code: to compile for another takes longer than many cases."""


def _around(*block_sizes: int) -> list[int]:
    return sorted({0, 1, *(b + d for b in block_sizes for d in (-1, 0, 1))})


def sequence_lengths(
    max_num_seqs: int = 5, max_length: int = 3 * CHUNK_SIZE + 2
) -> st.SearchStrategy[tuple[int, ...]]:
    """Tokens of each sequence: empty ones anywhere, lengths around multiples of the chunk, any other."""
    corners = [n for n in _around(16, CHUNK_SIZE, 2 * CHUNK_SIZE, 3 * CHUNK_SIZE) if n <= max_length]
    lengths = st.sampled_from(corners) | st.integers(0, max_length)
    return st.lists(lengths, max_size=max_num_seqs).map(tuple)


def cumulative_lengths(max_num_seqs: int = 24, num_value_heads: int = 32) -> st.SearchStrategy[list[int]]:
    """cu_seqlens for metadata: lengths around every block size, empty sequences anywhere."""
    corners = _around(CHUNK_SIZE, 2 * CHUNK_SIZE, cumsum_block_size(num_value_heads), SOLVE_TRIL_BLOCK_SIZE)
    lengths = st.sampled_from(corners) | st.integers(0, 2 * SOLVE_TRIL_BLOCK_SIZE)
    return st.lists(lengths, max_size=max_num_seqs).map(lambda lens: [0, *accumulate(lens)])


@st.composite
def prefill_cases(
    draw: st.DrawFn,
    *,
    dtypes: tuple[str, ...] = tuple(DTYPES),
    max_num_seqs: int = 5,
    max_length: int = 3 * CHUNK_SIZE + 2,
    heads: tuple[tuple[int, int], ...] = HEADS,
    shapes: Shapes | None = None,
) -> PrefillCase:
    """Prefill batches of a few short sequences, with every kind of gate, step size, key and state.

    Args:
        dtypes: keys of `cases.DTYPES`.
        max_num_seqs: N, at most.
        max_length: tokens of a sequence, at most.
        heads: H and HV to draw from.
        shapes: H, HV, K and V to draw from. Default: any of `heads` with any of `HEAD_DIMS`.
    """
    if shapes is None:
        H, HV, K, V = *draw(st.sampled_from(heads)), *draw(st.sampled_from(HEAD_DIMS))
    else:
        H, HV, K, V = draw(st.sampled_from(shapes))
    return PrefillCase(
        seq_lens=draw(sequence_lengths(max_num_seqs, max_length)),
        seed=draw(SEEDS),
        H=H,
        HV=HV,
        K=K,
        V=V,
        dtype=draw(st.sampled_from(dtypes)),
        gates=draw(st.sampled_from(tuple(GATES))),
        betas=draw(st.sampled_from(tuple(BETAS))),
        keys=draw(st.sampled_from(KEYS)),
        initial_state=draw(st.booleans()),
        padding=draw(st.sampled_from((0, 1, CHUNK_SIZE))),
        use_qk_l2norm_in_kernel=draw(st.booleans()),
    )
