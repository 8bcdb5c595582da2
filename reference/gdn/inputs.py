"""The arguments of a gated delta rule call: what is accepted, and the sizes read from them."""

import math
import numbers
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..errors import invalid_argument

FLOAT_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
STATE_DTYPES = (torch.float32, torch.float64)


@dataclass(frozen=True)
class GdnSizes:
    """Sizes of a gated delta rule call, in the letters of the field.

    B: rows, T: tokens a row, N: sequences, H: query/key heads, HV: value heads, K and V: head dims.
    """

    B: int
    T: int
    N: int
    H: int
    HV: int
    K: int
    V: int


def check_tensor(name: str, x: object, ndim: int, dtypes: Sequence[torch.dtype]) -> torch.Tensor:
    """Return `x` if it is a tensor of `ndim` dimensions and one of `dtypes`, else raise."""
    if not isinstance(x, torch.Tensor):
        invalid_argument(name, f"a {type(x).__name__}", "a torch.Tensor")
    if x.ndim != ndim:
        invalid_argument(f"{name}.shape", tuple(x.shape), f"{ndim} dimensions")
    if x.dtype not in dtypes:
        invalid_argument(f"{name}.dtype", x.dtype, ", ".join(str(d) for d in dtypes))
    return x


def check_shape(name: str, x: torch.Tensor, shape: Sequence[int], letters: str) -> None:
    """Raise unless `x` has exactly `shape`; `letters` is how the field writes it, e.g. `[B, T, HV]`."""
    if tuple(x.shape) != tuple(shape):
        invalid_argument(f"{name}.shape", tuple(x.shape), f"{letters} = {tuple(shape)}")


def check_device(name: str, x: torch.Tensor, device: torch.device) -> None:
    """Raise unless `x` is on `device`."""
    if x.device != device:
        invalid_argument(f"{name}.device", x.device, f"{device}, as the other tensors")


def check_layout(**layouts: tuple[torch.Tensor, str]) -> dict[str, int]:
    """Check tensors that belong together: `check_layout(k=(k, "NT HV BT K"), g=(g, "NT HV BT"))`.

    Each is a floating tensor with the letters of its layout as dimensions, the same letter is the same size
    everywhere, and all are of the dtype and on the device of the first.

    Returns:
        The size of each letter.

    Raises:
        InvalidArgumentError: naming the first tensor that does not fit.
    """
    sizes: dict[str, int] = {}
    first = None
    for name, (x, letters) in layouts.items():
        dims = letters.split()
        check_tensor(name, x, len(dims), FLOAT_DTYPES if first is None else (first.dtype,))
        first = x if first is None else first
        for letter, size in zip(dims, x.shape, strict=True):
            if sizes.setdefault(letter, size) != size:
                layout = ", ".join(dims)
                invalid_argument(
                    f"{name}.shape", tuple(x.shape), f"[{layout}] with {letter} = {sizes[letter]}"
                )
        check_device(name, x, first.device)
    return sizes


def check_gdn_shapes(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    *,
    scale: float | None,
    initial_state: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
) -> GdnSizes:
    """Check everything about a call that can be known without reading a tensor's values.

    Args:
        q, k: queries and keys `[B, T, H, K]`, one floating dtype for q, k and v.
        v: values `[B, T, HV, V]`, HV a multiple of H.
        g: log decay `[B, T, HV]`, any floating dtype.
        beta: step size `[B, T, HV]`, any floating dtype.
        scale: finite factor of the output, or None for `K ** -0.5`.
        initial_state: `[N, HV, K, V]` float32 or float64, or None for zeros.
        cu_seqlens: `[N + 1]` int32 or int64, or None for B sequences of T tokens. Needs B = 1.

    Returns:
        The sizes of the call.

    Raises:
        InvalidArgumentError: naming the first argument that does not fit, its value and what is allowed.
    """
    check_tensor("q", q, 4, FLOAT_DTYPES)
    B, T, H, K = q.shape
    check_tensor("k", k, 4, (q.dtype,))
    check_shape("k", k, (B, T, H, K), "[B, T, H, K] of q")
    check_tensor("v", v, 4, (q.dtype,))
    HV, V = v.shape[2:]
    check_shape("v", v, (B, T, HV, V), "[B, T, HV, V]")
    for name, size in (("B", B), ("H", H), ("HV", HV), ("K", K), ("V", V)):
        if size < 1:
            invalid_argument(
                f"{name} (from q.shape {tuple(q.shape)}, v.shape {tuple(v.shape)})", size, ">= 1"
            )
    if HV % H != 0:
        invalid_argument("HV (v.shape[2])", HV, f"a multiple of H = {H} (q.shape[2])")
    for name, x in (("g", g), ("beta", beta)):
        check_tensor(name, x, 3, FLOAT_DTYPES)
        check_shape(name, x, (B, T, HV), "[B, T, HV]")
    N = B
    if cu_seqlens is not None:
        check_tensor("cu_seqlens", cu_seqlens, 1, (torch.int32, torch.int64))
        if B != 1:
            invalid_argument(
                "B (q.shape[0])", B, "1 when cu_seqlens is given: pack the sequences into one row"
            )
        if cu_seqlens.numel() < 1:
            invalid_argument("cu_seqlens.shape", tuple(cu_seqlens.shape), "[N + 1], at least one element")
        N = cu_seqlens.numel() - 1
    if initial_state is not None:
        check_tensor("initial_state", initial_state, 4, STATE_DTYPES)
        check_shape("initial_state", initial_state, (N, HV, K, V), "[N, HV, K, V]")
        check_device("initial_state", initial_state, q.device)
    for name, x in (("k", k), ("v", v), ("g", g), ("beta", beta)):
        check_device(name, x, q.device)
    if scale is not None and not _is_finite(scale):
        invalid_argument("scale", scale, "a finite number, or None for K ** -0.5")
    return GdnSizes(B=B, T=T, N=N, H=H, HV=HV, K=K, V=V)


def check_cu_seqlens(cu_seqlens: torch.Tensor | Sequence[int], num_tokens: int | None = None) -> list[int]:
    """Read cumulative sequence lengths and check them.

    Args:
        cu_seqlens: `[N + 1]` int32 or int64 tensor (any device), or a sequence of ints; starts at 0, never
            decreases (equal neighbours are an empty sequence), ends within `num_tokens`.
        num_tokens: tokens in the packed row, or None when unknown.

    Returns:
        The values as Python ints.

    Raises:
        InvalidArgumentError: naming the position of the first wrong value.
    """
    if isinstance(cu_seqlens, torch.Tensor):
        check_tensor("cu_seqlens", cu_seqlens, 1, (torch.int32, torch.int64))
    values = cu_seqlens.tolist() if isinstance(cu_seqlens, torch.Tensor) else [int(x) for x in cu_seqlens]
    if not values:
        invalid_argument("cu_seqlens", "empty", "[N + 1] values, the first 0")
    if values[0] != 0:
        invalid_argument("cu_seqlens[0]", values[0], "0")
    for i in range(1, len(values)):
        if values[i] < values[i - 1]:
            invalid_argument(f"cu_seqlens[{i}]", values[i], f">= cu_seqlens[{i - 1}] = {values[i - 1]}")
    if num_tokens is not None and values[-1] > num_tokens:
        invalid_argument("cu_seqlens[-1]", values[-1], f"<= T = {num_tokens}")
    return values


def check_gates(g: torch.Tensor, beta: torch.Tensor, num_tokens: int) -> None:
    """Raise unless g <= 0 and 0 <= beta <= 1 on the first `num_tokens` tokens (the rest is padding).

    A linear decay in (0, 1] passed as g is caught here; NaN is let through, for it shows in the output.
    """
    g, beta = g[:, :num_tokens], beta[:, :num_tokens]
    if (g > 0).any():
        invalid_argument("g (maximum)", g.max().item(), "<= 0: g is the logarithm of the decay")
    if (beta < 0).any() or (beta > 1).any():
        invalid_argument("beta (minimum, maximum)", (beta.min().item(), beta.max().item()), "within [0, 1]")


def _is_finite(x: object) -> bool:
    """Whether x is a finite number; a bool or a tensor is none."""
    return isinstance(x, numbers.Real) and not isinstance(x, bool) and math.isfinite(x)


def scale_or_default(scale: float | None, K: int) -> float:
    """`scale`, or K ** -0.5 where it is None, as a float."""
    return K**-0.5 if scale is None else float(scale)


def check_choice(name: str, value: object, allowed: Sequence[object]) -> None:
    """Raise unless `value` is one of `allowed`."""
    if value not in allowed:
        invalid_argument(name, value, ", ".join(str(a) for a in allowed))


def check_chunk_size(chunk_size: int) -> None:
    """Raise unless `chunk_size` is an int >= 1."""
    if isinstance(chunk_size, bool) or not isinstance(chunk_size, int) or chunk_size < 1:
        invalid_argument("chunk_size", chunk_size, "an int >= 1")


def check_eps(eps: float) -> None:
    """Raise unless `eps` is finite and >= 0."""
    if not _is_finite(eps) or eps < 0:
        invalid_argument("eps", eps, "a finite number >= 0")


def sequence_bounds(cu_seqlens: torch.Tensor | None, sizes: GdnSizes) -> list[int]:
    """Cumulative lengths over the flattened `B * T` tokens: `cu_seqlens`, or one sequence a row of B."""
    if cu_seqlens is None:
        return [b * sizes.T for b in range(sizes.B + 1)]
    return check_cu_seqlens(cu_seqlens, sizes.T)
