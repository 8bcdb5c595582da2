"""l2norm: y = x * rsqrt(sum(x^2) + eps) over K."""

import torch
import triton
import triton.language as tl

from .block_sizes import L2NORM_BLOCK_SIZE, padded
from .launch import launch


@triton.jit
def inverse_length(b_x, eps):
    """What scales each row of b_x `[rows, BK]` float32 to length one."""
    return 1.0 / tl.sqrt(tl.sum(b_x * b_x, 1) + eps)


@triton.jit(do_not_specialize=["T", "first_program"])
def l2norm_kernel(
    x, y, eps, T, stride_t, stride_h, first_program,
    H: tl.constexpr, K: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """One program: BT tokens of one head. x by strides, y `[T, H, K]` contiguous."""
    i = tl.program_id(0) + first_program
    i_t, i_h = (i // H).to(tl.int64), (i % H).to(tl.int64)
    o_t0 = i_t * BT
    o_i, o_k = tl.arange(0, BT), tl.arange(0, BK)
    m_x = (o_i < T - o_t0)[:, None] & (o_k < K)[None, :]
    p_x = x + o_t0 * stride_t + i_h * stride_h + o_i[:, None] * stride_t + o_k[None, :]
    p_y = y + o_t0 * (H * K) + i_h * K + o_i[:, None] * (H * K) + o_k[None, :]
    b_x = tl.load(p_x, mask=m_x, other=0.0).to(tl.float32)
    tl.store(p_y, (b_x * inverse_length(b_x, eps)[:, None]).to(y.dtype.element_ty), mask=m_x)


def l2norm(x: torch.Tensor, *, eps: float) -> torch.Tensor:
    """Scale every row to length one.

    Args:
        x: `[T, H, K]`, the last dimension contiguous.
        eps: added to the sum of squares.

    Returns:
        `[T, H, K]` contiguous, in the dtype of x.
    """
    T, H, K = x.shape
    y = torch.empty((T, H, K), dtype=x.dtype, device=x.device)
    launch(
        l2norm_kernel,
        -(-T // L2NORM_BLOCK_SIZE) * H,
        {"x": x, "y": y, "eps": eps, "T": T, "stride_t": x.stride(0), "stride_h": x.stride(1)},
        {"H": H, "K": K, "BT": L2NORM_BLOCK_SIZE, "BK": padded(K)},
    )
    return y
