"""Groups that do together what deadlocks: a gather in the wrong place, and v0.17.0's way to start a wave."""

from collections.abc import Callable, Sequence
from typing import Any

from ..scheduler.admission import RankCounts
from ..scheduler.collectives import FORWARD, GATHER, Row
from ..scheduler.lockstep import CLIENT, COORDINATOR, Engine, Lockstep, Rank

PLACES = {
    "right": "after the reduction, by every rank",
    "in schedule()": "before the step, by ranks that schedule anything",
    "in the engine's step": "in every turn, so before a dummy, but behind a batch",
    "before the idle check": "behind the batch or dummy, by ranks that will find that they are idle, too",
    "before the reduction": "by every rank, but before it",
    "after own batches": "left out by ranks that ran a dummy",
    "with unfinished requests": "left out by ranks that are drained",
    "while the wave goes on": "left out by all as the wave ends",
    "twice": "by every rank",
    "twice on rank 0": "by rank 0 alone",
}
"""Where a gather may stand, and who makes it there.

The second was the first deadlock of vllm-ascend #11310, the next two the second one, without and with the
model's own collectives running behind the host's back."""


class MisplacedRank(Rank):
    """A rank whose gather stands in `place`, of PLACES; all else is as it should be.

    A real batch runs inside the engine's step, so it is entered before what follows that.
    """

    place = "right"

    def turn(self) -> Any:
        while self.inbox:
            self.inbox.popleft()()
        has_work = self.engine.has_work()
        yield from self._gather_in("in schedule()", has_work)
        executed = has_work and self.engine.step()
        if executed:
            yield self._collective(FORWARD, 0)
        yield from self._gather_in("in the engine's step", has_work or self.is_in_wave)
        has_unfinished = self.engine.scheduler.has_unfinished_requests()
        if not executed and (has_unfinished or self.is_in_wave):
            yield self._collective(FORWARD, 1)
        yield from self._gather_in("before the idle check", has_work or self.is_in_wave)
        if not (executed or has_unfinished or self.is_in_wave):
            return False
        yield from self._gather_in("before the reduction")
        self.is_in_wave = yield from self._reduce(has_unfinished)
        yield from self._gather_in("right")
        yield from self._gather_in("after own batches", executed)
        yield from self._gather_in("with unfinished requests", has_unfinished)
        yield from self._gather_in("while the wave goes on", self.is_in_wave)
        for _ in range(2):
            yield from self._gather_in("twice")
        for _ in range(2 - (self.engine.scheduler.dp_rank > 0)):
            yield from self._gather_in("twice on rank 0")
        self._end_step(executed)
        return True

    def _gather_in(self, place: str, comes_by: bool = True) -> Any:
        if place == self.place and comes_by:
            rows: tuple[Row, ...] = yield self._collective(GATHER, *self.engine.scheduler.counts())
            self.engine.scheduler.observe([RankCounts(*row) for row in rows])


def misplaced(place: str) -> Callable[..., Lockstep]:
    """Makes groups as `Lockstep` does, of ranks whose gather stands in `place`."""
    kind = type("MisplacedRank", (MisplacedRank,), {"place": place})

    def make(engines: Sequence[Engine], **options: Any) -> Lockstep:
        group = Lockstep(engines, **options)
        group.ranks[:] = [kind(rank.engine, rank.post, rank.finish_check_interval) for rank in group.ranks]
        return group

    return make


class ExcludingLockstep(Lockstep):
    """The start of a wave is not told to the rank that has the request for it, as in vLLM v0.17.0.

    Source: exclude_eng_index of vllm/v1/engine/{core,coordinator}.py, v0.17.0.
    """

    _excluded: int | None = None

    def add_request(self, rank: int, request: Any) -> None:
        target, wave = self.ranks[rank], self._client_wave
        self._post(CLIENT, rank, lambda: target.add_request(request, wave))
        if not self._client_knows_wave:
            self._client_knows_wave = True
            self._post(CLIENT, COORDINATOR, lambda: self._first_request(rank, wave))

    def _first_request(self, rank: int, wave: int) -> None:
        is_stale = wave < self.coordinator.current_wave
        self._excluded = None if is_stale else rank
        self.coordinator.first_request(wave)

    def _mail_of_rank(self, rank: int) -> Callable[[str, int], None]:
        return lambda what, wave: self._post(rank, COORDINATOR, lambda: self._from_rank(rank, what, wave))

    def _from_rank(self, rank: int, what: str, wave: int) -> None:
        self._excluded = rank
        getattr(self.coordinator, what)(wave)

    def _tell_ranks(self, wave: int) -> None:
        for i, rank in enumerate(self.ranks):
            if i != self._excluded:
                self._post(COORDINATOR, i, lambda rank=rank: rank.start_wave(wave))
