"""Comparing a result with the truth: shape, dtype, device, then NaN and Inf, then error, with its place."""

import itertools
from dataclasses import dataclass

import torch

from .tolerances import Errors, smallest_scale


@dataclass(frozen=True)
class Comparison:
    """What came out of comparing one tensor with the truth.

    Attributes:
        name: of the tensor, `o` or `final_state`.
        errors: measured; NaN where the tensors could not be compared at all.
        limit: what they may be.
        sequence, row, head: where the worst row is: for o, row is the token in its sequence; for a state,
            the key row. None when there is nothing to point at.
        problem: why the tensors differ in kind (shape, dtype, device, NaN, Inf, padding), or "".
    """

    name: str
    errors: Errors
    limit: Errors
    sequence: int | None = None
    row: int | None = None
    head: int | None = None
    problem: str = ""

    @property
    def passed(self) -> bool:
        """Whether the tensors agree."""
        within = self.errors.ratio <= self.limit.ratio and self.errors.worst_row <= self.limit.worst_row
        return not self.problem and within

    @property
    def place(self) -> str:
        """Where the worst row is, in words."""
        if self.sequence is None:
            return "nowhere"
        row = "token" if self.name == "o" else "key row"
        return f"sequence {self.sequence}, {row} {self.row}, head {self.head}"

    def __str__(self) -> str:
        if self.problem:
            return f"{self.name}: {self.problem}"
        return (
            f"{self.name}: ratio {self.errors.ratio:.2e} (limit {self.limit.ratio:.2e}), worst row "
            f"{self.errors.worst_row:.2e} (limit {self.limit.worst_row:.2e}) at {self.place}"
        )


def compare_o(
    actual: torch.Tensor, truth: torch.Tensor, *, dtype: torch.dtype, bounds: list[int], limit: Errors
) -> Comparison:
    """Compare an output with the truth.

    Args:
        actual: `[1, T, HV, V]`, expected to be of `dtype`.
        truth: `[1, T, HV, V]` float64.
        dtype: of the output.
        bounds: N + 1 ints, bounds (tokens) of the sequences; rows behind the last must be exactly 0.
        limit: see `tolerances.limit`.
    """
    problem = _difference_in_kind(actual, truth, dtype)
    if not problem and actual[:, bounds[-1] :].count_nonzero():
        problem = f"rows behind token {bounds[-1]} belong to no sequence and are not 0"
    if problem:
        return Comparison("o", Errors(float("nan"), float("nan")), limit, problem=problem)
    parts = [slice(start, end) for start, end in itertools.pairwise(bounds)]
    actual, truth = actual[0].double().cpu(), truth[0].double().cpu()
    return _compare_parts("o", [actual[p] for p in parts], [truth[p] for p in parts], dtype, limit)


def compare_state(
    actual: torch.Tensor | None,
    truth: torch.Tensor,
    *,
    dtype: torch.dtype,
    limit: Errors,
    operands: torch.dtype | None = None,
) -> Comparison:
    """Compare final states with the truth.

    Args:
        actual: `[N, HV, K, V]`, expected to be of `dtype`; None is a difference.
        truth: `[N, HV, K, V]` float64.
        dtype: of the state.
        limit: see `tolerances.limit`.
        operands: dtype of q, k and v: where a truth is smaller than they can express, errors are measured
            absolutely. Default: dtype.
    """
    problem = "is None" if actual is None else _difference_in_kind(actual, truth, dtype)
    if actual is None or problem:
        return Comparison("final_state", Errors(float("nan"), float("nan")), limit, problem=problem)
    by_row = (0, 2, 1, 3)  # [N, K, HV, V]: rows before heads, as in o
    actual, truth = (x.double().cpu().permute(by_row) for x in (actual, truth))
    return _compare_parts("final_state", list(actual), list(truth), operands or dtype, limit)


def _difference_in_kind(actual: torch.Tensor, truth: torch.Tensor, dtype: torch.dtype) -> str:
    for what, found, wanted in (
        ("shape", tuple(actual.shape), tuple(truth.shape)),
        ("dtype", actual.dtype, dtype),
        ("device", actual.device, truth.device),
    ):
        if found != wanted:
            return f"{what} is {found}, expected {wanted}"
    for what, found in (("NaN", actual.isnan()), ("Inf", actual.isinf())):
        if found.any():
            first = found.nonzero()[0].tolist()
            return f"{what} in {int(found.sum())} of {found.numel()} values, first at {first}"
    return ""


def _compare_parts(
    name: str, actual: list[torch.Tensor], truth: list[torch.Tensor], dtype: torch.dtype, limit: Errors
) -> Comparison:
    """Compare sequence by sequence: each part is `[rows, heads, D]` float64."""
    ratio, worst_row = 0.0, 0.0
    sequence = row = head = None
    for n, (a, t) in enumerate(zip(actual, truth, strict=True)):
        if not t.numel():
            continue
        scale = max(_rms(t).item(), smallest_scale(dtype))
        rows = _rms(a - t, dim=-1) / scale
        ratio = max(ratio, _rms(rows).item())
        if sequence is None or rows.max().item() > worst_row:
            worst_row = rows.max().item()
            sequence, (row, head) = n, divmod(int(rows.argmax()), rows.shape[1])
    return Comparison(name, Errors(ratio, worst_row), limit, sequence, row, head)


def _rms(x: torch.Tensor, dim: int | None = None) -> torch.Tensor:
    """Root of the mean square; scaled first, so that squares neither overflow nor vanish."""
    largest = x.abs().amax().clamp(min=torch.finfo(x.dtype).tiny)
    return (x / largest).square().mean(dim=dim).sqrt() * largest
