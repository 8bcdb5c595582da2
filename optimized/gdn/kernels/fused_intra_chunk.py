"""The first launch of the fused path: what the tokens of a chunk are to each other."""

import torch
import triton
import triton.language as tl

from .block_sizes import CHUNK_SIZE, padded
from .decay import pairwise_decay, split_log_decay
from .l2norm import inverse_length
from .launch import launch


@triton.jit(do_not_specialize=["T", "first_program"])
def fused_intra_chunk_kernel(
    q, k, g, beta, A, Aqk, factors, cu_seqlens, chunk_indices, eps, T,
    stride_q_t, stride_q_h, stride_k_t, stride_k_h, stride_g_t, stride_g_h, stride_beta_t, stride_beta_h,
    first_program,
    H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr,
    NORMALISE: tl.constexpr,
):  # fmt: skip
    """One program: one chunk of one value head. A, Aqk `[T, HV, BT]` and factors `[6, HV, T]` contiguous.

    With G_i the decay from the chunk's start to token i, D_ij that from token j to token i, and x_i, y_i what
    normalises k_i and q_i (1 without NORMALISE):

        A_ij    = beta_i D_ij k_i^T k_j for i > j
        Aqk_ij  = D_ij (y_i q_i)^T k_j for i >= j
        factors = beta_i, beta_i G_i, y_i G_i, D_last,i, G_i and x_i

    k is normalised and rounded as `fused_inter_chunk` does it from x: where keys are alike, A and the state
    must agree on what a key is. q is not, y scales what it gives.

    A vector loaded or stored with a stride lies on an NPU with gaps, and so does every matrix over which it
    is spread as a row. So g and beta enter as columns (suffix _i), what is needed as a row (suffix _j) is
    summed from them, and rows are stored.
    """
    i = tl.program_id(0) + first_program
    i_c, i_hv = i // HV, (i % HV).to(tl.int64)
    i_h = i_hv // (HV // H)
    i_n, i_t = tl.load(chunk_indices + 2 * i_c), tl.load(chunk_indices + 2 * i_c + 1)
    o_t0 = tl.load(cu_seqlens + i_n).to(tl.int64) + i_t * BT
    o_i, o_k = tl.arange(0, BT), tl.arange(0, BK)
    m_i = o_i < tl.load(cu_seqlens + i_n + 1) - o_t0
    m_k = m_i[:, None] & (o_k < K)[None, :]
    m_equal, m_until = o_i[:, None] == o_i[None, :], o_i[None, :] >= o_i[:, None]

    p_q = q + o_t0 * stride_q_t + i_h * stride_q_h + o_i[:, None] * stride_q_t + o_k[None, :]
    p_k = k + o_t0 * stride_k_t + i_h * stride_k_h + o_i[:, None] * stride_k_t + o_k[None, :]
    b_q, b_k = tl.load(p_q, mask=m_k, other=0.0), tl.load(p_k, mask=m_k, other=0.0)
    b_x_i, b_y_i = tl.full((BT,), 1.0, dtype=tl.float32), tl.full((BT,), 1.0, dtype=tl.float32)
    if NORMALISE:
        b_x_i = tl.where(m_i, inverse_length(b_k.to(tl.float32), eps), 0.0)
        b_k = (b_k.to(tl.float32) * b_x_i[:, None]).to(b_k.dtype)
        b_y_i = tl.where(m_i, inverse_length(b_q.to(tl.float32), eps), 0.0)
    b_kk = tl.dot(b_k, tl.trans(b_k), input_precision="ieee")
    b_qk = tl.dot(b_q, tl.trans(b_k), input_precision="ieee")

    # Sums of g up to and including each token, as rows and as columns. Tail rows have g = 0.
    p_g = g + o_t0 * stride_g_t + i_hv * stride_g_h + o_i * stride_g_t
    b_g = tl.load(p_g, mask=m_i, other=0.0).to(tl.float32)
    b_coarse, b_rest = split_log_decay(b_g)  # pyright: ignore[reportGeneralTypeIssues]
    b_coarse_j = tl.sum(tl.where(m_until, b_coarse[:, None], 0.0), 0)
    b_rest_j = tl.sum(tl.where(m_until, b_rest[:, None], 0.0), 0)
    b_coarse_i = tl.sum(tl.where(m_equal, b_coarse_j[None, :], 0.0), 1)
    b_rest_i = tl.sum(tl.where(m_equal, b_rest_j[None, :], 0.0), 1)
    m_last = o_i == BT - 1
    b_to_end = tl.sum(tl.where(m_last, b_coarse_j, 0.0), 0) - b_coarse_j
    b_to_end += tl.sum(tl.where(m_last, b_rest_j, 0.0), 0) - b_rest_j
    b_G = tl.exp(b_coarse_j + b_rest_j)

    p_beta = beta + o_t0 * stride_beta_t + i_hv * stride_beta_h + o_i * stride_beta_t
    b_beta_i = tl.load(p_beta, mask=m_i, other=0.0).to(tl.float32)
    b_beta_j = tl.sum(tl.where(m_equal, b_beta_i[:, None], 0.0), 0)
    b_x_j = tl.sum(tl.where(m_equal, b_x_i[:, None], 0.0), 0)
    b_y_j = tl.sum(tl.where(m_equal, b_y_i[:, None], 0.0), 0)
    p_factor = factors + i_hv * T + o_t0 + o_i
    o_factor = T.to(tl.int64) * HV
    tl.store(p_factor, b_beta_j, mask=m_i)
    tl.store(p_factor + o_factor, b_beta_j * b_G, mask=m_i)
    tl.store(p_factor + 2 * o_factor, b_y_j * b_G, mask=m_i)
    tl.store(p_factor + 3 * o_factor, tl.exp(b_to_end), mask=m_i)
    tl.store(p_factor + 4 * o_factor, b_G, mask=m_i)
    tl.store(p_factor + 5 * o_factor, b_x_j, mask=m_i)

    b_D = pairwise_decay(b_coarse_i, b_rest_i, b_coarse_j, b_rest_j, o_i[:, None] >= o_i[None, :])
    o_ij = o_t0 * (HV * BT) + i_hv * BT + o_i[:, None] * (HV * BT) + o_i[None, :]
    b_Aqk = b_qk * b_D * b_y_i[:, None]
    tl.store(Aqk + o_ij, b_Aqk.to(Aqk.dtype.element_ty), mask=m_i[:, None])
    b_A = tl.where(o_i[:, None] > o_i[None, :], b_kk * b_D * b_beta_i[:, None], 0.0)
    tl.store(A + o_ij, b_A, mask=m_i[:, None])


def fused_intra_chunk(
    q: torch.Tensor,
    k: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    *,
    use_qk_l2norm_in_kernel: bool,
    eps: float,
    cu_seqlens: torch.Tensor,
    chunk_indices: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Everything about a chunk that does not depend on the state it starts from.

    Args:
        q, k: queries and keys `[T, H, K]`, the last dimension contiguous.
        g, beta: `[T, HV]`.
        use_qk_l2norm_in_kernel: normalise q and k over K first.
        eps: added to the sum of squares by that normalisation.
        cu_seqlens: `[N + 1]` int32.
        chunk_indices: `[NT, 2]` int32.

    Returns:
        A `[T, HV, BT]` float32, Aqk `[T, HV, BT]` in the dtype of k and factors `[6, HV, T]` float32, as the
        kernel defines them; what belongs to no sequence is not written.
    """
    (T, H, K), HV = k.shape, g.shape[1]
    A = torch.empty((T, HV, CHUNK_SIZE), dtype=torch.float32, device=k.device)
    Aqk = torch.empty((T, HV, CHUNK_SIZE), dtype=k.dtype, device=k.device)
    factors = torch.empty((6, HV, T), dtype=torch.float32, device=k.device)
    launch(
        fused_intra_chunk_kernel,
        len(chunk_indices) * HV,
        {
            "q": q, "k": k, "g": g, "beta": beta, "A": A, "Aqk": Aqk, "factors": factors,
            "cu_seqlens": cu_seqlens, "chunk_indices": chunk_indices, "eps": eps, "T": T,
            "stride_q_t": q.stride(0), "stride_q_h": q.stride(1),
            "stride_k_t": k.stride(0), "stride_k_h": k.stride(1),
            "stride_g_t": g.stride(0), "stride_g_h": g.stride(1),
            "stride_beta_t": beta.stride(0), "stride_beta_h": beta.stride(1),
        },
        {
            "H": H, "HV": HV, "K": K, "BT": CHUNK_SIZE, "BK": padded(K),
            "NORMALISE": use_qk_l2norm_in_kernel,
        },
    )  # fmt: skip
    return A, Aqk, factors
