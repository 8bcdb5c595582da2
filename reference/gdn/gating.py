"""The gates of a gated delta rule layer."""

import torch

from ..errors import invalid_argument
from .inputs import FLOAT_DTYPES, check_device, check_shape, check_tensor


def fused_gdn_gating(
    A_log: torch.Tensor, a: torch.Tensor, b: torch.Tensor, dt_bias: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log decay and step size from the projections of a layer.

    g = -exp(A_log) softplus(a + dt_bias),    beta = sigmoid(b)

    Both are computed in float32 (float64 for float64 input). softplus(x) = max(x, 0) + log1p(exp(-|x|))
    overflows for no x; a sum or product beyond the largest finite number is that number: g is finite for any
    finite input.

    Args:
        A_log: `[HV]`, floating, logarithm of the decay rate.
        a: `[..., HV]`, floating, one value a token and head.
        b: `[..., HV]`, shape and dtype of a.
        dt_bias: `[HV]`, floating.

    Returns:
        g `[..., HV]`, <= 0, float32 (float64 if any input is), and beta `[..., HV]` in [0, 1], dtype of b.

    Raises:
        InvalidArgumentError: for a shape, dtype or device that does not fit.

    Source: vLLM 0.17.0, vllm/model_executor/models/qwen3_next.py, fused_gdn_gating.
    """
    for name, x in (("A_log", A_log), ("dt_bias", dt_bias)):
        check_tensor(name, x, 1, FLOAT_DTYPES)
    if not isinstance(a, torch.Tensor) or a.ndim < 1 or a.dtype not in FLOAT_DTYPES:
        invalid_argument("a", getattr(a, "shape", type(a).__name__), "a floating tensor [..., HV]")
    check_tensor("b", b, a.ndim, (a.dtype,))
    check_shape("b", b, a.shape, "shape of a")
    check_shape("A_log", A_log, a.shape[-1:], "[HV]")
    check_shape("dt_bias", dt_bias, a.shape[-1:], "[HV]")
    for name, x in (("b", b), ("A_log", A_log), ("dt_bias", dt_bias)):
        check_device(name, x, a.device)

    is_double = torch.float64 in (A_log.dtype, a.dtype, dt_bias.dtype)
    dtype = torch.float64 if is_double else torch.float32
    largest = torch.finfo(dtype).max
    x = (a.to(dtype) + dt_bias.to(dtype)).clamp(-largest, largest)
    softplus = x.clamp(min=0) + torch.log1p(torch.exp(-x.abs()))
    rate = A_log.to(dtype).exp().clamp(max=largest)
    g = -(rate * softplus).clamp(max=largest)
    return g, torch.sigmoid(b)
