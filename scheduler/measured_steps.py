"""Steps that were measured, to fit a cost model to: what each rank computed, and how long it took."""

import reprlib
from dataclasses import dataclass
from pathlib import Path

from ..reference.errors import InvalidArgumentError, TraceError, invalid_argument
from .checks import check_int, check_positive, check_tuple
from .cost import RankWork
from .traces import read_objects


@dataclass(frozen=True)
class MeasuredStep:
    """A step that was measured.

    Attributes:
        step_ms: how long it took, ms, > 0.
        ranks: what each rank computed; at least one.

    Raises:
        InvalidArgumentError: for numbers that are not as in `RankWork`: each is an int >= 0, a token attends
            to itself at least, and where there is no token there is nothing that it attends to.
    """

    step_ms: float
    ranks: tuple[RankWork, ...]

    def __post_init__(self) -> None:
        check_positive("step_ms", self.step_ms)
        check_tuple("ranks", self.ranks, RankWork)
        if not self.ranks:
            invalid_argument("ranks", "empty", "one object for each rank")
        for rank, work in enumerate(self.ranks):
            for name, value in work._asdict().items():
                check_int(f"ranks[{rank}].{name}", value, 0)
            for tokens, attended in (
                ("prefill_tokens", "prefill_pairs"),
                ("decode_requests", "context_tokens"),
            ):
                _check_attended(
                    f"ranks[{rank}].{attended}", getattr(work, attended), tokens, getattr(work, tokens)
                )


def _check_attended(name: str, value: int, tokens: str, count: int) -> None:
    if value < count:
        invalid_argument(name, value, f">= {tokens} = {count}, for each attends to itself too")
    if value and not count:
        invalid_argument(name, value, f"0, for {tokens} is 0")


def read_measured_steps(path: str | Path) -> list[MeasuredStep]:
    """Read measured steps in JSON Lines.

    One object a line: `step_ms` (ms, > 0) and `ranks`, a list of one object for each rank, with
    `prefill_tokens`, `prefill_pairs`, `decode_requests` and `context_tokens` (ints >= 0, as in `RankWork`).
    Further fields and blank lines are ignored.

    Args:
        path: of the file.

    Returns:
        The steps, in the order of the file; at least one, all of the same number of ranks.

    Raises:
        TraceError: `FILE:LINE: reason` for the first line that does not fit (line 1 for an empty file), or
            `FILE: reason` for a file that cannot be opened.
    """
    steps: list[MeasuredStep] = []
    for place, fields in read_objects(path):
        try:
            steps.append(_measured_step(fields))
            check_same_ranks(steps[-1], steps[0])
        except InvalidArgumentError as error:
            raise TraceError(f"{place}: {error}") from None
    if not steps:
        raise TraceError(f"{path}:1: the file is empty; allowed: at least one step")
    return steps


def _measured_step(fields: dict[str, object]) -> MeasuredStep:
    for name in ("step_ms", "ranks"):
        if name not in fields:
            raise InvalidArgumentError(f"{name} is missing")
    ranks = fields["ranks"]
    if not isinstance(ranks, list):
        invalid_argument("ranks", reprlib.repr(ranks), "a list of objects")
    return MeasuredStep(fields["step_ms"], tuple(_rank_work(x, f"ranks[{i}]") for i, x in enumerate(ranks)))  # pyright: ignore[reportArgumentType]


def _rank_work(fields: object, place: str) -> RankWork:
    if not isinstance(fields, dict):
        invalid_argument(place, reprlib.repr(fields), "a JSON object")
    for name in RankWork._fields:
        if name not in fields:
            raise InvalidArgumentError(f"{place}.{name} is missing")
    return RankWork(**{name: fields[name] for name in RankWork._fields})


def check_same_ranks(step: MeasuredStep, first: MeasuredStep) -> None:
    if len(step.ranks) != len(first.ranks):
        count = len(first.ranks)
        invalid_argument("the number of ranks", len(step.ranks), f"{count}, as in the first step")
