"""chunk_scaled_dot_kkt: A_ij = beta_i exp(g summed over (j, i]) k_i^T k_j for i > j, else 0."""

import torch
import triton
import triton.language as tl

from .block_sizes import CHUNK_SIZE, padded
from .decay import pairwise_decay
from .launch import launch


@triton.jit(do_not_specialize=["T", "first_program"])
def chunk_scaled_dot_kkt_kernel(
    k, g_cumsum, beta, A, cu_seqlens, chunk_indices, T, stride_k_t, stride_k_h, stride_beta_t, stride_beta_h,
    first_program,
    H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """One program: one chunk of one value head. A `[T, HV, BT]` contiguous."""
    i = tl.program_id(0) + first_program
    i_c, i_hv = i // HV, (i % HV).to(tl.int64)
    i_h = i_hv // (HV // H)
    i_n, i_t = tl.load(chunk_indices + 2 * i_c), tl.load(chunk_indices + 2 * i_c + 1)
    o_t0 = tl.load(cu_seqlens + i_n).to(tl.int64) + i_t.to(tl.int64) * BT
    o_i, o_k = tl.arange(0, BT), tl.arange(0, BK)
    m_i = o_i < tl.load(cu_seqlens + i_n + 1) - o_t0

    p_k = k + o_t0 * stride_k_t + i_h * stride_k_h + o_i[:, None] * stride_k_t + o_k[None, :]
    p_sum = g_cumsum + o_t0 * HV + i_hv + o_i * HV
    p_beta = beta + o_t0 * stride_beta_t + i_hv * stride_beta_h + o_i * stride_beta_t
    b_k = tl.load(p_k, mask=m_i[:, None] & (o_k < K)[None, :], other=0.0)
    b_coarse = tl.load(p_sum, mask=m_i, other=0.0)
    b_rest = tl.load(p_sum + T.to(tl.int64) * HV, mask=m_i, other=0.0)
    b_beta = tl.load(p_beta, mask=m_i, other=0.0).to(tl.float32)

    b_kk = tl.dot(b_k, tl.trans(b_k), input_precision="ieee")
    b_A = b_kk * b_beta[:, None]
    m_A = (o_i[:, None] > o_i[None, :]) & m_i[:, None]
    b_A *= pairwise_decay(b_coarse, b_rest, b_coarse, b_rest, m_A)
    p_A = A + o_t0 * (HV * BT) + i_hv * BT + o_i[:, None] * (HV * BT) + o_i[None, :]
    tl.store(p_A, b_A, mask=m_i[:, None])


def chunk_scaled_dot_kkt(
    k: torch.Tensor,
    g_cumsum: torch.Tensor,
    beta: torch.Tensor,
    *,
    cu_seqlens: torch.Tensor,
    chunk_indices: torch.Tensor,
) -> torch.Tensor:
    """How much the update of token j changes what token i reads, within a chunk.

    Args:
        k: keys `[T, H, K]`, the last dimension contiguous.
        g_cumsum: `[2, T, HV]` of `chunk_local_cumsum`.
        beta: `[T, HV]`.
        cu_seqlens: `[N + 1]` int32.
        chunk_indices: `[NT, 2]` int32.

    Returns:
        A `[T, HV, BT]` float32: row i of a chunk is that of its token i; rows of no sequence are not written.
    """
    (T, H, K), HV = k.shape, beta.shape[1]
    A = torch.empty((T, HV, CHUNK_SIZE), dtype=torch.float32, device=k.device)
    launch(
        chunk_scaled_dot_kkt_kernel,
        len(chunk_indices) * HV,
        {
            "k": k, "g_cumsum": g_cumsum, "beta": beta, "A": A, "cu_seqlens": cu_seqlens,
            "chunk_indices": chunk_indices, "T": T, "stride_k_t": k.stride(0), "stride_k_h": k.stride(1),
            "stride_beta_t": beta.stride(0), "stride_beta_h": beta.stride(1),
        },
        {
            "H": H, "HV": HV, "K": K, "BT": CHUNK_SIZE, "BK": padded(K),
        },
    )  # fmt: skip
    return A
