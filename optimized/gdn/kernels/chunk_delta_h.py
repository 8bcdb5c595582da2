"""chunk_delta_h: v_new = u - w S, S <- exp(sum of g) S + sum_i exp(g over (i, BT]) k_i v_new_i^T."""

import torch
import triton
import triton.language as tl

from .block_sizes import CHUNK_SIZE, padded, state_loop_cuda_options, value_block_size
from .launch import launch


@triton.jit(do_not_specialize=["T", "first_program"])
def chunk_delta_h_kernel(
    k, w, u, g_cumsum, h, v_new, initial_state, final_state, cu_seqlens, chunk_offsets, T,
    stride_k_t, stride_k_h, stride_s_n, stride_s_h, stride_s_k, first_program,
    H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr,
    BV: tl.constexpr, HAS_INITIAL_STATE: tl.constexpr,
):  # fmt: skip
    """One program: BV columns of the state of one value head of one sequence, chunk after chunk.

    h `[NT, HV, K, V]`, v_new `[T, HV, V]`, final_state `[N, HV, K, V]` contiguous.
    """
    NV: tl.constexpr = (V + BV - 1) // BV
    i = tl.program_id(0) + first_program
    i_v, i_hv, i_n = i % NV, (i // NV % HV).to(tl.int64), (i // (NV * HV)).to(tl.int64)
    i_h = i_hv // (HV // H)
    bos, eos = tl.load(cu_seqlens + i_n).to(tl.int64), tl.load(cu_seqlens + i_n + 1).to(tl.int64)
    i_c0 = tl.load(chunk_offsets + i_n).to(tl.int64)
    o_i, o_k, o_v = tl.arange(0, BT), tl.arange(0, BK), i_v * BV + tl.arange(0, BV)
    m_s = (o_k < K)[:, None] & (o_v < V)[None, :]
    o_s = o_k[:, None] * V + o_v[None, :]

    b_S = tl.zeros((BK, BV), dtype=tl.float32)
    if HAS_INITIAL_STATE:
        p_initial = initial_state + i_n * stride_s_n + i_hv * stride_s_h
        p_initial += o_k[:, None] * stride_s_k + o_v[None, :]
        b_S = tl.load(p_initial, mask=m_s, other=0.0).to(tl.float32)
    for i_t in range(tl.cdiv(eos - bos, BT).to(tl.int32)):
        o_t0 = bos + i_t * BT
        m_i = o_i < eos - o_t0
        m_k, m_v = m_i[:, None] & (o_k < K)[None, :], m_i[:, None] & (o_v < V)[None, :]
        b_state = b_S.to(k.dtype.element_ty)
        tl.store(h + ((i_c0 + i_t) * HV + i_hv) * (K * V) + o_s, b_state, mask=m_s)

        p_w = w + o_t0 * (HV * K) + i_hv * K + o_i[:, None] * (HV * K) + o_k[None, :]
        o_u = o_t0 * (HV * V) + i_hv * V + o_i[:, None] * (HV * V) + o_v[None, :]
        b_w = tl.load(p_w, mask=m_k, other=0.0)
        b_v = tl.load(u + o_u, mask=m_v, other=0.0).to(tl.float32)
        b_v -= tl.dot(b_w, b_state, input_precision="ieee")
        tl.store(v_new + o_u, b_v.to(v_new.dtype.element_ty), mask=m_v)

        p_sum = g_cumsum + o_t0 * HV + i_hv + o_i * HV
        p_last = g_cumsum + (tl.minimum(o_t0 + BT, eos) - 1) * HV + i_hv
        o_rest = T.to(tl.int64) * HV
        b_coarse_last, b_rest_last = tl.load(p_last), tl.load(p_last + o_rest)
        b_to_end = (b_coarse_last - tl.load(p_sum, mask=m_i, other=0.0)) + (
            b_rest_last - tl.load(p_sum + o_rest, mask=m_i, other=0.0)
        )
        b_v = tl.where(m_i, tl.exp(tl.where(m_i, b_to_end, 0.0)), 0.0)[:, None] * b_v
        p_k = k + o_t0 * stride_k_t + i_h * stride_k_h + o_i[:, None] * stride_k_t + o_k[None, :]
        b_k = tl.load(p_k, mask=m_k, other=0.0)
        b_update = tl.dot(tl.trans(b_k), b_v.to(b_k.dtype), input_precision="ieee")
        b_S = b_S * tl.exp(b_coarse_last + b_rest_last) + b_update
    tl.store(final_state + (i_n * HV + i_hv) * (K * V) + o_s, b_S, mask=m_s)


def chunk_delta_h(
    k: torch.Tensor,
    w: torch.Tensor,
    u: torch.Tensor,
    g_cumsum: torch.Tensor,
    *,
    initial_state: torch.Tensor | None,
    cu_seqlens: torch.Tensor,
    chunk_offsets: torch.Tensor,
    num_chunks: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Carry the state through the chunks of each sequence: the only stage that is sequential.

    Args:
        k: keys `[T, H, K]`, the last dimension contiguous.
        w, u: `[T, HV, K]` and `[T, HV, V]` of `recompute_w_u`.
        g_cumsum: `[2, T, HV]` of `chunk_local_cumsum`.
        initial_state: `[N, HV, K, V]`, the last dimension contiguous, or None for zeros.
        cu_seqlens: `[N + 1]` int32.
        chunk_offsets: `[N + 1]` int32.
        num_chunks: NT.

    Returns:
        h `[NT, HV, K, V]`, the state each chunk starts from, and v_new `[T, HV, V]`, both in the dtype of k;
        final_state `[N, HV, K, V]` float32.
    """
    (T, H, K), (HV, V), N = k.shape, u.shape[1:], len(cu_seqlens) - 1
    h = torch.empty((num_chunks, HV, K, V), dtype=k.dtype, device=k.device)
    v_new = torch.empty((T, HV, V), dtype=k.dtype, device=k.device)
    final_state = torch.empty((N, HV, K, V), dtype=torch.float32, device=k.device)
    start = final_state if initial_state is None else initial_state
    BV = value_block_size(K, V)
    launch(
        chunk_delta_h_kernel,
        N * HV * -(-V // BV),
        {
            "k": k, "w": w, "u": u, "g_cumsum": g_cumsum, "h": h, "v_new": v_new, "initial_state": start,
            "final_state": final_state, "cu_seqlens": cu_seqlens, "chunk_offsets": chunk_offsets, "T": T,
            "stride_k_t": k.stride(0), "stride_k_h": k.stride(1), "stride_s_n": start.stride(0),
            "stride_s_h": start.stride(1), "stride_s_k": start.stride(2),
        },
        {
            "H": H, "HV": HV, "K": K, "V": V, "BT": CHUNK_SIZE, "BK": padded(K), "BV": BV,
            "HAS_INITIAL_STATE": initial_state is not None,
        },
        cuda_options=state_loop_cuda_options(k.dtype, K),
    )  # fmt: skip
    return h, v_new, final_state
