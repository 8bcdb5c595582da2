"""recompute_w_u: the chunk as one update, w = Ai diag(beta exp(cumsum g)) k and u = Ai diag(beta) v."""

import torch
import triton
import triton.language as tl

from .block_sizes import CHUNK_SIZE, padded
from .launch import launch


@triton.jit(do_not_specialize=["T", "first_program"])
def recompute_w_u_kernel(
    k, v, g_cumsum, beta, Ai, w, u, cu_seqlens, chunk_indices, T,
    stride_k_t, stride_k_h, stride_v_t, stride_v_h, stride_beta_t, stride_beta_h, first_program,
    H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr,
    BV: tl.constexpr,
):  # fmt: skip
    """One program: one chunk of one value head. w `[T, HV, K]` and u `[T, HV, V]` contiguous."""
    i = tl.program_id(0) + first_program
    i_c, i_hv = i // HV, (i % HV).to(tl.int64)
    i_h = i_hv // (HV // H)
    i_n, i_t = tl.load(chunk_indices + 2 * i_c), tl.load(chunk_indices + 2 * i_c + 1)
    o_t0 = tl.load(cu_seqlens + i_n).to(tl.int64) + i_t.to(tl.int64) * BT
    o_i, o_k, o_v = tl.arange(0, BT), tl.arange(0, BK), tl.arange(0, BV)
    m_i = o_i < tl.load(cu_seqlens + i_n + 1) - o_t0
    m_k, m_v = m_i[:, None] & (o_k < K)[None, :], m_i[:, None] & (o_v < V)[None, :]

    p_sum = g_cumsum + o_t0 * HV + i_hv + o_i * HV
    b_g = tl.load(p_sum, mask=m_i, other=0.0) + tl.load(p_sum + T.to(tl.int64) * HV, mask=m_i, other=0.0)
    p_beta = beta + o_t0 * stride_beta_t + i_hv * stride_beta_h + o_i * stride_beta_t
    b_beta = tl.load(p_beta, mask=m_i, other=0.0).to(tl.float32)
    p_Ai = Ai + o_t0 * (HV * BT) + i_hv * BT + o_i[:, None] * (HV * BT) + o_i[None, :]
    b_Ai = tl.load(p_Ai, mask=m_i[:, None], other=0.0)

    p_v = v + o_t0 * stride_v_t + i_hv * stride_v_h + o_i[:, None] * stride_v_t + o_v[None, :]
    b_v = tl.load(p_v, mask=m_v, other=0.0).to(tl.float32) * b_beta[:, None]
    b_u = tl.dot(b_Ai, b_v.to(b_Ai.dtype), input_precision="ieee")
    p_u = u + o_t0 * (HV * V) + i_hv * V + o_i[:, None] * (HV * V) + o_v[None, :]
    tl.store(p_u, b_u.to(u.dtype.element_ty), mask=m_v)

    p_k = k + o_t0 * stride_k_t + i_h * stride_k_h + o_i[:, None] * stride_k_t + o_k[None, :]
    b_k = tl.load(p_k, mask=m_k, other=0.0).to(tl.float32) * (b_beta * tl.exp(b_g))[:, None]
    b_w = tl.dot(b_Ai, b_k.to(b_Ai.dtype), input_precision="ieee")
    p_w = w + o_t0 * (HV * K) + i_hv * K + o_i[:, None] * (HV * K) + o_k[None, :]
    tl.store(p_w, b_w.to(w.dtype.element_ty), mask=m_k)


def recompute_w_u(
    k: torch.Tensor,
    v: torch.Tensor,
    g_cumsum: torch.Tensor,
    beta: torch.Tensor,
    Ai: torch.Tensor,
    *,
    cu_seqlens: torch.Tensor,
    chunk_indices: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """What each token writes, before the incoming state is known.

    Args:
        k: keys `[T, H, K]`, v: values `[T, HV, V]`, the last dimensions contiguous.
        g_cumsum: `[2, T, HV]` of `chunk_local_cumsum`.
        beta: `[T, HV]`.
        Ai: `[T, HV, BT]` of `solve_tril`, in the dtype of k.
        cu_seqlens: `[N + 1]` int32.
        chunk_indices: `[NT, 2]` int32.

    Returns:
        w `[T, HV, K]` and u `[T, HV, V]` in the dtype of k; rows of no sequence are not written.
    """
    (T, H, K), (HV, V) = k.shape, v.shape[1:]
    w = torch.empty((T, HV, K), dtype=k.dtype, device=k.device)
    u = torch.empty((T, HV, V), dtype=k.dtype, device=k.device)
    launch(
        recompute_w_u_kernel,
        len(chunk_indices) * HV,
        {
            "k": k, "v": v, "g_cumsum": g_cumsum, "beta": beta, "Ai": Ai, "w": w, "u": u,
            "cu_seqlens": cu_seqlens, "chunk_indices": chunk_indices, "T": T,
            "stride_k_t": k.stride(0), "stride_k_h": k.stride(1),
            "stride_v_t": v.stride(0), "stride_v_h": v.stride(1),
            "stride_beta_t": beta.stride(0), "stride_beta_h": beta.stride(1),
        },
        {
            "H": H, "HV": HV, "K": K, "V": V, "BT": CHUNK_SIZE, "BK": padded(K), "BV": padded(V),
        },
    )  # fmt: skip
    return w, u
