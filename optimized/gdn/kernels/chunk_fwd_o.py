"""chunk_fwd_o: o_i = scale (exp(cumsum g)_i q_i^T h + sum_{j <= i} exp(g over (j, i]) q_i^T k_j v_new_j)."""

import torch
import triton
import triton.language as tl

from .block_sizes import CHUNK_SIZE, padded, value_block_size
from .decay import pairwise_decay
from .launch import launch


@triton.jit(do_not_specialize=["T", "first_program"])
def chunk_fwd_o_kernel(
    q, k, v_new, h, g_cumsum, o, cu_seqlens, chunk_indices, scale, T,
    stride_q_t, stride_q_h, stride_k_t, stride_k_h, first_program,
    H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr,
    BV: tl.constexpr,
):  # fmt: skip
    """One program: BV columns of one chunk of one value head. o `[T, HV, V]` contiguous."""
    NV: tl.constexpr = (V + BV - 1) // BV
    i = tl.program_id(0) + first_program
    i_v, i_hv, i_c = i % NV, (i // NV % HV).to(tl.int64), (i // (NV * HV)).to(tl.int64)
    i_h = i_hv // (HV // H)
    i_n, i_t = tl.load(chunk_indices + 2 * i_c), tl.load(chunk_indices + 2 * i_c + 1)
    o_t0 = tl.load(cu_seqlens + i_n).to(tl.int64) + i_t.to(tl.int64) * BT
    o_i, o_k, o_v = tl.arange(0, BT), tl.arange(0, BK), i_v * BV + tl.arange(0, BV)
    m_i = o_i < tl.load(cu_seqlens + i_n + 1) - o_t0
    m_k, m_v = m_i[:, None] & (o_k < K)[None, :], m_i[:, None] & (o_v < V)[None, :]

    p_q = q + o_t0 * stride_q_t + i_h * stride_q_h + o_i[:, None] * stride_q_t + o_k[None, :]
    p_k = k + o_t0 * stride_k_t + i_h * stride_k_h + o_i[:, None] * stride_k_t + o_k[None, :]
    p_h = h + (i_c * HV + i_hv) * (K * V) + o_k[:, None] * V + o_v[None, :]
    o_o = o_t0 * (HV * V) + i_hv * V + o_i[:, None] * (HV * V) + o_v[None, :]
    p_sum = g_cumsum + o_t0 * HV + i_hv + o_i * HV
    b_q, b_k = tl.load(p_q, mask=m_k, other=0.0), tl.load(p_k, mask=m_k, other=0.0)
    b_h = tl.load(p_h, mask=(o_k < K)[:, None] & (o_v < V)[None, :], other=0.0)
    b_v = tl.load(v_new + o_o, mask=m_v, other=0.0)
    b_coarse = tl.load(p_sum, mask=m_i, other=0.0)
    b_rest = tl.load(p_sum + T.to(tl.int64) * HV, mask=m_i, other=0.0)

    b_o = tl.dot(b_q, b_h, input_precision="ieee") * tl.exp(b_coarse + b_rest)[:, None]
    b_attention = tl.dot(b_q, tl.trans(b_k), input_precision="ieee")
    m_pair = (o_i[:, None] >= o_i[None, :]) & m_i[:, None]
    b_attention *= pairwise_decay(b_coarse, b_rest, b_coarse, b_rest, m_pair)
    b_o += tl.dot(b_attention.to(b_v.dtype), b_v, input_precision="ieee")
    tl.store(o + o_o, (b_o * scale).to(o.dtype.element_ty), mask=m_v)


def chunk_fwd_o(
    q: torch.Tensor,
    k: torch.Tensor,
    v_new: torch.Tensor,
    h: torch.Tensor,
    g_cumsum: torch.Tensor,
    *,
    scale: float,
    cu_seqlens: torch.Tensor,
    chunk_indices: torch.Tensor,
) -> torch.Tensor:
    """What every token reads: from the state its chunk started from, and from its own chunk.

    Args:
        q, k: queries and keys `[T, H, K]`, the last dimension contiguous.
        v_new, h: `[T, HV, V]` and `[NT, HV, K, V]` of `chunk_delta_h`.
        g_cumsum: `[2, T, HV]` of `chunk_local_cumsum`.
        scale: factor of the output.
        cu_seqlens: `[N + 1]` int32.
        chunk_indices: `[NT, 2]` int32.

    Returns:
        o `[T, HV, V]` in the dtype of q; rows of no sequence are not written.
    """
    (T, H, K), (HV, V) = q.shape, v_new.shape[1:]
    o = torch.empty((T, HV, V), dtype=q.dtype, device=q.device)
    BV = value_block_size(K, V)
    launch(
        chunk_fwd_o_kernel,
        len(chunk_indices) * HV * -(-V // BV),
        {
            "q": q, "k": k, "v_new": v_new, "h": h, "g_cumsum": g_cumsum, "o": o, "cu_seqlens": cu_seqlens,
            "chunk_indices": chunk_indices, "scale": scale, "T": T, "stride_q_t": q.stride(0),
            "stride_q_h": q.stride(1), "stride_k_t": k.stride(0), "stride_k_h": k.stride(1),
        },
        {
            "H": H, "HV": HV, "K": K, "V": V, "BT": CHUNK_SIZE, "BK": padded(K), "BV": BV,
        },
    )  # fmt: skip
    return o
