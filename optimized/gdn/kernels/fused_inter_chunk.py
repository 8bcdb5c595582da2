"""The last launch of the fused path: the state of a sequence from chunk to chunk, and the output."""

import torch
import triton
import triton.language as tl

from .block_sizes import CHUNK_SIZE, padded, state_loop_cuda_options, value_block_size
from .launch import launch


@triton.jit(do_not_specialize=["T", "first_program"])
def fused_inter_chunk_kernel(
    q, k, v, Ai, Aqk, factors, o, initial_state, final_state, cu_seqlens, scale, T,
    stride_q_t, stride_q_h, stride_k_t, stride_k_h, stride_v_t, stride_v_h,
    stride_s_n, stride_s_h, stride_s_k, first_program,
    H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr,
    BV: tl.constexpr, PARTS: tl.constexpr, NORMALISE: tl.constexpr, HAS_INITIAL_STATE: tl.constexpr,
):  # fmt: skip
    """One program: BV columns of the state of one value head of one sequence, chunk after chunk.

    With S the state a chunk starts from, k normalised, and what `fused_intra_chunk` stored, Ai being
    (I + A)^-1 and the factors beta, a, b, d, G and x, which normalises k:

        v_new = Ai (beta v - a k^T S)
        o     = scale (b q^T S + Aqk v_new)
        S    <- G_last S + sum over i of d_i k_i v_new_i^T

    S never leaves the chip. o `[T, HV, V]`, final_state `[N, HV, K, V]`, factors `[6, HV, T]` contiguous.
    """
    NV: tl.constexpr = (V + BV - 1) // BV
    i = tl.program_id(0) + first_program
    i_v, i_hv, i_n = i % NV, (i // NV % HV).to(tl.int64), (i // (NV * HV)).to(tl.int64)
    i_h = i_hv // (HV // H)
    bos, eos = tl.load(cu_seqlens + i_n).to(tl.int64), tl.load(cu_seqlens + i_n + 1).to(tl.int64)
    o_i, o_k, o_v = tl.arange(0, BT), tl.arange(0, BK), i_v * BV + tl.arange(0, BV)
    m_s = (o_k < K)[:, None] & (o_v < V)[None, :]
    o_factor = T.to(tl.int64) * HV

    b_S = tl.zeros((BK, BV), dtype=tl.float32)
    if HAS_INITIAL_STATE:
        p_initial = initial_state + i_n * stride_s_n + i_hv * stride_s_h
        p_initial += o_k[:, None] * stride_s_k + o_v[None, :]
        b_S = tl.load(p_initial, mask=m_s, other=0.0).to(tl.float32)
    for i_t in range(tl.cdiv(eos - bos, BT).to(tl.int32)):
        o_t0 = bos + i_t * BT
        m_i = o_i < eos - o_t0
        m_k, m_v = m_i[:, None] & (o_k < K)[None, :], m_i[:, None] & (o_v < V)[None, :]
        p_q = q + o_t0 * stride_q_t + i_h * stride_q_h + o_i[:, None] * stride_q_t + o_k[None, :]
        p_k = k + o_t0 * stride_k_t + i_h * stride_k_h + o_i[:, None] * stride_k_t + o_k[None, :]
        p_v = v + o_t0 * stride_v_t + i_hv * stride_v_h + o_i[:, None] * stride_v_t + o_v[None, :]
        p_factor = factors + i_hv * T + o_t0 + o_i
        o_ij = o_t0 * (HV * BT) + i_hv * BT + o_i[:, None] * (HV * BT) + o_i[None, :]
        p_G_last = factors + (4 * HV + i_hv) * T + tl.minimum(o_t0 + BT, eos) - 1
        p_o = o + o_t0 * (HV * V) + i_hv * V + o_i[:, None] * (HV * V) + o_v[None, :]

        b_k = tl.load(p_k, mask=m_k, other=0.0)
        if NORMALISE:
            b_x = tl.load(p_factor + 5 * o_factor, mask=m_i, other=0.0)
            b_k = (b_k.to(tl.float32) * b_x[:, None]).to(b_k.dtype)
        b_state = b_S.to(b_k.dtype)
        b_v = tl.load(p_v, mask=m_v, other=0.0).to(tl.float32)
        b_v *= tl.load(p_factor, mask=m_i, other=0.0)[:, None]
        b_of_k = tl.load(p_factor + o_factor, mask=m_i, other=0.0)
        b_v -= tl.dot(b_k, b_state, input_precision="ieee") * b_of_k[:, None]
        b_Ai = tl.load(Ai + o_ij, mask=m_i[:, None], other=0.0)
        b_r = b_v.to(b_k.dtype)
        b_v = tl.dot(b_Ai, b_r, input_precision="ieee")
        if PARTS == 2:
            b_Ai = tl.load(Ai + T.to(tl.int64) * (HV * BT) + o_ij, mask=m_i[:, None], other=0.0)
            b_v += tl.dot(b_Ai, b_r, input_precision="ieee")

        b_q = tl.load(p_q, mask=m_k, other=0.0)
        b_of_q = tl.load(p_factor + 2 * o_factor, mask=m_i, other=0.0)
        b_o = tl.dot(b_q, b_state, input_precision="ieee") * b_of_q[:, None]
        b_Aqk = tl.load(Aqk + o_ij, mask=m_i[:, None], other=0.0)
        b_o += tl.dot(b_Aqk, b_v.to(b_k.dtype), input_precision="ieee")
        tl.store(p_o, (b_o * scale).to(o.dtype.element_ty), mask=m_v)

        b_v *= tl.load(p_factor + 3 * o_factor, mask=m_i, other=0.0)[:, None]
        b_update = tl.dot(tl.trans(b_k), b_v.to(b_k.dtype), input_precision="ieee")
        b_S = b_S * tl.load(p_G_last) + b_update
    p_final = final_state + (i_n * HV + i_hv) * (K * V) + o_k[:, None] * V + o_v[None, :]
    tl.store(p_final, b_S, mask=m_s)


def fused_inter_chunk(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    Ai: torch.Tensor,
    Aqk: torch.Tensor,
    factors: torch.Tensor,
    *,
    scale: float,
    initial_state: torch.Tensor | None,
    use_qk_l2norm_in_kernel: bool,
    cu_seqlens: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Carry the state through the chunks of each sequence and read it; no w, u, v_new or h is stored.

    Args:
        q, k: queries and keys `[T, H, K]`, v: values `[T, HV, V]`, the last dimensions contiguous.
        Ai: `[1 or 2, T, HV, BT]` of `solve_tril`, of A of `fused_intra_chunk`.
        Aqk, factors: of `fused_intra_chunk`.
        scale: factor of the output.
        initial_state: `[N, HV, K, V]`, the last dimension contiguous, or None for zeros.
        use_qk_l2norm_in_kernel: normalise q and k over K, as `fused_intra_chunk` did.
        cu_seqlens: `[N + 1]` int32.

    Returns:
        o `[T, HV, V]` in the dtype of q, rows of no sequence not written, and final_state `[N, HV, K, V]`
        float32.
    """
    (T, H, K), (HV, V), N = q.shape, v.shape[1:], len(cu_seqlens) - 1
    o = torch.empty((T, HV, V), dtype=q.dtype, device=q.device)
    final_state = torch.empty((N, HV, K, V), dtype=torch.float32, device=q.device)
    start = final_state if initial_state is None else initial_state
    BV = value_block_size(K, V)
    launch(
        fused_inter_chunk_kernel,
        N * HV * -(-V // BV),
        {
            "q": q, "k": k, "v": v, "Ai": Ai, "Aqk": Aqk, "factors": factors, "o": o,
            "initial_state": start, "final_state": final_state, "cu_seqlens": cu_seqlens,
            "scale": scale, "T": T,
            "stride_q_t": q.stride(0), "stride_q_h": q.stride(1),
            "stride_k_t": k.stride(0), "stride_k_h": k.stride(1),
            "stride_v_t": v.stride(0), "stride_v_h": v.stride(1),
            "stride_s_n": start.stride(0), "stride_s_h": start.stride(1), "stride_s_k": start.stride(2),
        },
        {
            "H": H, "HV": HV, "K": K, "V": V, "BT": CHUNK_SIZE, "BK": padded(K), "BV": BV,
            "PARTS": len(Ai),
            "NORMALISE": use_qk_l2norm_in_kernel, "HAS_INITIAL_STATE": initial_state is not None,
        },
        cuda_options=state_loop_cuda_options(k.dtype, K),
    )  # fmt: skip
    return o, final_state
