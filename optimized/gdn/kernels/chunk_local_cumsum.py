"""chunk_local_cumsum: log decay from the start of its chunk up to and including each token, in two parts."""

import torch
import triton
import triton.language as tl

from .block_sizes import CHUNK_SIZE, cumsum_block_size, padded
from .decay import split_log_decay
from .launch import launch


@triton.jit(do_not_specialize=["T", "first_program"])
def chunk_local_cumsum_kernel(
    g, g_cumsum, cu_seqlens, block_indices, T, stride_t, stride_h, first_program,
    HV: tl.constexpr, BT: tl.constexpr, BLOCK: tl.constexpr, BHV: tl.constexpr,
):  # fmt: skip
    """One program: the chunks of one block of BLOCK tokens, all heads. g_cumsum `[2, T, HV]` contiguous."""
    i = tl.program_id(0) + first_program
    i_n, i_b = tl.load(block_indices + 2 * i), tl.load(block_indices + 2 * i + 1)
    bos, eos = tl.load(cu_seqlens + i_n).to(tl.int64), tl.load(cu_seqlens + i_n + 1).to(tl.int64)
    o_i, o_h = tl.arange(0, BT), tl.arange(0, BHV)
    # A product with a triangle of ones: a scan is a library call on an NPU, this is not.
    b_ones = tl.where(o_i[:, None] >= o_i[None, :], 1.0, 0.0)
    for i_c in range(BLOCK // BT):
        o_t0 = bos + i_b.to(tl.int64) * BLOCK + i_c * BT
        m_g = (o_i < eos - o_t0)[:, None] & (o_h < HV)[None, :]
        p_g = g + o_t0 * stride_t + o_i[:, None] * stride_t + o_h[None, :] * stride_h
        b_g = tl.load(p_g, mask=m_g, other=0.0).to(tl.float32)
        b_coarse, b_rest = split_log_decay(b_g)  # pyright: ignore[reportGeneralTypeIssues]
        p_sum = g_cumsum + o_t0 * HV + o_i[:, None] * HV + o_h[None, :]
        tl.store(p_sum, tl.dot(b_ones, b_coarse, input_precision="ieee"), mask=m_g)
        p_sum += T.to(tl.int64) * HV
        tl.store(p_sum, tl.dot(b_ones, b_rest, input_precision="ieee"), mask=m_g)


def chunk_local_cumsum(
    g: torch.Tensor, *, cu_seqlens: torch.Tensor, block_indices: torch.Tensor
) -> torch.Tensor:
    """Sum the log decays within each chunk, coarse parts and rests apart (see `decay`).

    Args:
        g: log decay `[T, HV]`, floating.
        cu_seqlens: `[N + 1]` int32.
        block_indices: `[.., 2]` int32, (sequence, block of `cumsum_block_size(HV)` tokens).

    Returns:
        `[2, T, HV]` float32: sums of the coarse parts, and of the rests.
    """
    T, HV = g.shape
    g_cumsum = torch.empty((2, T, HV), dtype=torch.float32, device=g.device)
    launch(
        chunk_local_cumsum_kernel,
        len(block_indices),
        {
            "g": g, "g_cumsum": g_cumsum, "cu_seqlens": cu_seqlens, "block_indices": block_indices, "T": T,
            "stride_t": g.stride(0), "stride_h": g.stride(1),
        },
        {"HV": HV, "BT": CHUNK_SIZE, "BLOCK": cumsum_block_size(HV), "BHV": padded(HV)},
    )  # fmt: skip
    return g_cumsum
