"""Decay between the tokens of a chunk, for all kernels: exact where log decays cancel or are infinite.

A kernel cannot subtract plain cumulative sums of g: behind a gate of -1e3 the small gates are rounded away,
and behind -inf the difference is NaN. So every log decay is split in two, and each part is summed on its own:

    coarse  the multiple of 2^-10 next to g towards zero, at least -128 (exp(-128) is 0 in float32): a sum of
            64 of them has 23 bits, which float32 holds exactly, and so is every difference of two sums
    rest    what is left, above -2^-10: a sum of 64 of them is above -2^-4
"""

import triton
import triton.language as tl


@triton.jit
def split_log_decay(b_g):
    """Coarse part and rest of log decays g <= 0; NaN stays NaN."""
    b_g = tl.where(b_g < -128.0, -128.0, b_g)
    b_coarse = tl.ceil(b_g * 1024.0) * 0.0009765625
    return b_coarse, b_g - b_coarse


@triton.jit
def pairwise_decay(b_coarse_i, b_rest_i, b_coarse_j, b_rest_j, m_pair):
    """Decay `[BT, BT]` from token j to token i where m_pair (a subset of i >= j), else 0; masked before exp.

    b_coarse and b_rest `[BT]` are sums up to and including each token, once as columns and once as rows.
    """
    b_log = (b_coarse_i[:, None] - b_coarse_j[None, :]) + (b_rest_i[:, None] - b_rest_j[None, :])
    return tl.where(m_pair, tl.exp(tl.where(m_pair, b_log, 0.0)), 0.0)
