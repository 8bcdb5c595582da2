"""solve_tril: Ai = (I + A)^-1 of the strictly lower triangular A of each chunk."""

import torch
import triton
import triton.language as tl

from .block_sizes import CHUNK_SIZE, SOLVE_TRIL_BLOCK_SIZE, TRIANGLE_SIZE
from .launch import launch


@triton.jit
def inverse_of_unit_lower(b_A, BT: tl.constexpr, BS: tl.constexpr, DOT_PRECISION: tl.constexpr):
    """(I + A)^-1 `[BT, BT]` float32 for a strictly lower triangular b_A `[BT, BT]` float32.

    1. Forward substitution in the BS x BS blocks on the diagonal, row r of all of them at once.
    2. Blocks are joined in pairs, then pairs of pairs: with T the inverse of two neighbours and L what is
       below them, the inverse of both is T - T L T. No power of A is formed: they would grow without bound.
    """
    NB: tl.constexpr = BT // BS
    o_b, o_s, o_i = tl.arange(0, NB), tl.arange(0, BS), tl.arange(0, BT)
    # 1. The diagonal blocks, [NB, BS, BS].
    m_diagonal = (o_b[:, None] == o_b[None, :])[:, None, :, None]
    b_blocks = tl.sum(tl.where(m_diagonal, tl.reshape(b_A, (NB, BS, NB, BS)), 0.0), 2)
    b_eye = tl.where(o_s[:, None] == o_s[None, :], 1.0, 0.0)
    b_T = tl.broadcast_to(b_eye[None, :, :], (NB, BS, BS))
    for r in range(1, BS):
        m_row = (o_s == r)[None, :, None]
        b_row = tl.sum(tl.where(m_row, b_blocks, 0.0), 1)
        b_row = tl.sum(b_row[:, :, None] * b_T, 1)
        b_T = tl.where(m_row, b_T - b_row[:, None, :], b_T)
    b_Ai = tl.reshape(tl.where(m_diagonal, b_T[:, :, None, :], 0.0), (BT, BT))
    # 2.
    size = BS
    for _ in tl.static_range(2):
        m_pair = (o_i[:, None] // (2 * size) == o_i[None, :] // (2 * size)) & (
            o_i[:, None] // size > o_i[None, :] // size
        )
        b_below = tl.where(m_pair, b_A, 0.0)
        b_below = tl.dot(b_Ai, b_below, input_precision=DOT_PRECISION)
        b_Ai -= tl.dot(b_below, b_Ai, input_precision=DOT_PRECISION)
        size *= 2
    return b_Ai


def inverse_precision(dtype: torch.dtype, device: torch.device) -> str:
    """How float32 products of the inverse are computed: on tensor cores where 16-bit results hide it."""
    return "tf32x3" if device.type == "cuda" and dtype != torch.float32 else "ieee"


@triton.jit(do_not_specialize=["T", "first_program"])
def solve_tril_kernel(
    A, Ai, cu_seqlens, block_indices, T, first_program,
    HV: tl.constexpr, BT: tl.constexpr, BS: tl.constexpr, BLOCK: tl.constexpr, PARTS: tl.constexpr,
    DOT_PRECISION: tl.constexpr,
):  # fmt: skip
    """One program: the chunks of a block of BLOCK tokens, one value head.

    A `[T, HV, BT]` and Ai `[PARTS, T, HV, BT]` contiguous.
    """
    i = tl.program_id(0) + first_program
    i_b, i_hv = i // HV, (i % HV).to(tl.int64)
    i_n, i_block = tl.load(block_indices + 2 * i_b), tl.load(block_indices + 2 * i_b + 1)
    bos, eos = tl.load(cu_seqlens + i_n).to(tl.int64), tl.load(cu_seqlens + i_n + 1).to(tl.int64)
    o_i = tl.arange(0, BT)
    start = bos + i_block.to(tl.int64) * BLOCK
    num_chunks = tl.minimum(tl.cdiv(eos - start, BT), BLOCK // BT).to(tl.int32)
    for i_c in range(num_chunks):
        o_t0 = start + i_c * BT
        m_A = (o_i < eos - o_t0)[:, None]
        o_A = o_t0 * (HV * BT) + i_hv * BT
        o_ij = o_i[:, None] * (HV * BT) + o_i[None, :]
        b_A = tl.load(A + o_A + o_ij, mask=m_A, other=0.0)
        b_Ai = inverse_of_unit_lower(b_A, BT, BS, DOT_PRECISION)
        b_rounded = b_Ai.to(Ai.dtype.element_ty)
        tl.store(Ai + o_A + o_ij, b_rounded, mask=m_A)
        if PARTS == 2:
            b_rest = (b_Ai - b_rounded.to(tl.float32)).to(Ai.dtype.element_ty)
            tl.store(Ai + T.to(tl.int64) * (HV * BT) + o_A + o_ij, b_rest, mask=m_A)


def solve_tril(
    A: torch.Tensor,
    *,
    cu_seqlens: torch.Tensor,
    block_indices: torch.Tensor,
    dtype: torch.dtype,
    num_parts: int = 1,
) -> torch.Tensor:
    """Ai = (I + A)^-1, by forward substitution in blocks of 16 rows, joined to 64.

    Args:
        A: `[T, HV, BT]` float32 contiguous, strictly lower triangular chunk by chunk.
        cu_seqlens: `[N + 1]` int32.
        block_indices: `[.., 2]` int32, (sequence, block of `SOLVE_TRIL_BLOCK_SIZE` tokens).
        dtype: of the result.
        num_parts: 1, or 2 for Ai as a sum of what it is rounded to and of the rounded rest. Default: 1.

    Returns:
        Ai `[num_parts, T, HV, BT]`; rows of no sequence are not written.
    """
    T, HV = A.shape[:2]
    Ai = torch.empty((num_parts, *A.shape), dtype=dtype, device=A.device)
    launch(
        solve_tril_kernel,
        len(block_indices) * HV,
        {"A": A, "Ai": Ai, "cu_seqlens": cu_seqlens, "block_indices": block_indices, "T": T},
        {
            "HV": HV, "BT": CHUNK_SIZE, "BS": TRIANGLE_SIZE, "BLOCK": SOLVE_TRIL_BLOCK_SIZE,
            "PARTS": num_parts, "DOT_PRECISION": inverse_precision(dtype, A.device),
        },
    )  # fmt: skip
    return Ai
