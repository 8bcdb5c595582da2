"""What data-parallel ranks do together, and how it is noticed that they do not.

A rank is written as a generator: it yields the collective that it enters, and is sent what all ranks
contributed to it, in their order. A transport carries that: `LocalTransport` within one process, where a
mismatch or a stall is found at once and without a clock; `process_group.py` between processes.
"""

from collections import deque
from collections.abc import Generator, Iterable, Mapping
from typing import NamedTuple

from ..reference.errors import LockstepError

FORWARD = "forward"
HAS_UNFINISHED = "has_unfinished"
GATHER = "gather"

Row = tuple[int, ...]


class Collective(NamedTuple):
    """A collective as one rank enters it.

    Attributes:
        name: FORWARD (the model's own: experts are spread over all ranks; 1 for a dummy batch, 0 for a real
            one), HAS_UNFINISHED (whether this rank has unfinished requests, 0 or 1) or GATHER (`RankCounts`).
        step: active steps of this rank before this one.
        row: what it contributes, ints.
    """

    name: str
    step: int
    row: Row

    def __str__(self) -> str:
        return f"{self.name} at step {self.step}"


Turn = Generator[Collective, tuple[Row, ...], bool]
"""A turn of a rank's loop: yields collectives, returns whether it was an active step."""


def refuse_mismatch(entered: Mapping[int, Collective]) -> None:
    """Raise LockstepError unless all ranks entered the same collective of the same step."""
    if len({(collective.name, collective.step) for collective in entered.values()}) > 1:
        places = ", ".join(f"rank {rank} in {entered[rank]}" for rank in sorted(entered))
        raise LockstepError(f"ranks entered different collectives: {places}")


class LocalTransport:
    """Ranks of one process: each is run until it has to wait for the others.

    Args:
        dp_size: number of ranks.
        log_size: collectives kept for each rank, the newest; None keeps all.

    Attributes:
        logs: for each rank, the collectives that it entered.
        waiting: the collective that a rank has entered and that is not complete, by rank.
    """

    def __init__(self, dp_size: int, log_size: int | None = 1000) -> None:
        self.dp_size = dp_size
        self.logs: list[deque[Collective]] = [deque(maxlen=log_size) for _ in range(dp_size)]
        self.waiting: dict[int, Collective] = {}

    def enter(self, rank: int, collective: Collective) -> None:
        """A rank waits in a collective from now on."""
        self.logs[rank].append(collective)
        self.waiting[rank] = collective

    def take_complete(self) -> tuple[Row, ...] | None:
        """What all ranks contributed, once all have entered the same collective; None before.

        Raises:
            LockstepError: when all are in some collective, but not in the same.
        """
        if len(self.waiting) < self.dp_size:
            return None
        refuse_mismatch(self.waiting)
        rows = tuple(self.waiting[rank].row for rank in range(self.dp_size))
        self.waiting.clear()
        return rows

    def refuse_stall(self, idle: Iterable[int]) -> None:
        """Raise LockstepError if ranks wait in a collective for ranks that will never come."""
        idle = sorted(idle)
        if self.waiting and idle:
            places = ", ".join(f"rank {rank} waits in {self.waiting[rank]}" for rank in sorted(self.waiting))
            raise LockstepError(f"{places}, but idle for ever: rank {', rank '.join(map(str, idle))}")
