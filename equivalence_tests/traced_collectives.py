"""Recorded collectives of data-parallel ranks, and the first of them that is not what it must be.

What must be is stated by scheduler/lockstep.py: in each step a rank enters the forward pass, now and then the
reduction over who has unfinished requests, and, with balance scheduling, the gather of counts, of which a
pure function makes one decision for all ranks.
"""

import reprlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..fixtures.record_traces import ENTERED, LEFT
from ..fixtures.store import Fixture
from ..reference.errors import AscendTwinError, FixtureError, invalid_argument
from ..scheduler.admission import AdmissionPolicy, RankCounts, make_policy
from ..scheduler.checks import MOST, check_bool, check_int
from ..scheduler.collectives import FORWARD, GATHER, HAS_UNFINISHED

NAMES = (FORWARD, HAS_UNFINISHED, GATHER)
MISTAKES = ("order", "value", "result", "decision", "missing")
"""Names of what can be wrong; of several in one place the first is the cause."""

_MOST_RANKS = 2**16


@dataclass(frozen=True)
class Entry:
    """A collective as one rank entered it.

    Attributes:
        rank, step, name: who, when in its own count, and which.
        value: what it contributed.
        time_ms: when it entered.
        result: what came back; None where that was not recorded, or has not come.
        left_ms: when; None likewise.
        is_open: whether the rank may admit requests in its next step, as it said itself; None if it did not.
    """

    rank: int
    step: int
    name: str
    value: tuple[int, ...]
    time_ms: float
    result: Any = None
    left_ms: float | None = None
    is_open: bool | None = None

    def __str__(self) -> str:
        return f"{self.name} of step {self.step}"


@dataclass(frozen=True)
class Mistake:
    """The first collective that is not what it must be.

    Attributes:
        place: in the order of the collectives of a rank.
        rank: whose, one of them.
        name: of what is wrong, one of `MISTAKES`.
        message: one line: what must be, what is, where.
    """

    place: int
    rank: int
    name: str
    message: str


@dataclass(frozen=True)
class Group:
    """Ranks, and the collectives that each has entered.

    Attributes:
        size: ranks of the group.
        policy: of balance scheduling; None without.
        cap: requests that may run on a rank, with a policy.
        interval: steps of a wave from one reduction to the next; 0 is not known.
        reduces_first: whether the first step of a wave has one too.
        lanes: by rank, those that are there.
    """

    size: int
    policy: AdmissionPolicy | None
    cap: int
    interval: int
    reduces_first: bool
    lanes: Mapping[int, Sequence[Entry]]


def read_group(fixture: Fixture, path: str = "") -> Group:
    """The ranks of a fixture of kind dp.

    Raises:
        FixtureError: for a config or a record that does not fit.
    """
    config = fixture.config
    try:
        size, interval = config.get("dp_size"), config.get("finish_check_interval", 0)
        check_int("dp_size", size, 1, _MOST_RANKS)
        check_int("finish_check_interval", interval, 0)
        reduces_first = config.get("reduces_first_step", False)
        check_bool("reduces_first_step", reduces_first)
        policy, cap = _read_policy(config.get("balance"))
    except AscendTwinError as error:
        raise FixtureError(f"{path}: config: {error}") from error
    lanes: dict[int, list[Entry]] = {}
    for number, record in enumerate(fixture.records, 2):
        _read_record(record, lanes, int(size), f"{path}:{number}")  # type: ignore[arg-type]
    return Group(int(size), policy, cap, interval, reduces_first, lanes)  # type: ignore[arg-type]


def _read_policy(given: object) -> tuple[AdmissionPolicy | None, int]:
    if given is None:
        return None, 0
    if not isinstance(given, Mapping) or not isinstance(given.get("policy"), str):
        invalid_argument("balance", reprlib.repr(given), "an object with policy and max_num_seqs")
    cap = given.get("max_num_seqs")
    check_int("balance.max_num_seqs", cap, 1)
    return make_policy(given["policy"], int(cap)), int(cap)  # type: ignore[arg-type]


def _read_record(record: Mapping[str, Any], lanes: dict[int, list[Entry]], size: int, place: str) -> None:
    if record.get("call") == "end":
        return
    try:
        rank, step, name = record.get("rank"), record.get("step"), record.get("collective")
        check_int("rank", rank, 0, size - 1)
        check_int("step", step, 0)
        if name not in NAMES:
            invalid_argument("collective", reprlib.repr(name), f"one of {', '.join(NAMES)}")
        time_ms = record.get("time_ms")
        if type(time_ms) not in (int, float) or not abs(time_ms) <= MOST:  # type: ignore[operator,arg-type]
            invalid_argument("time_ms", reprlib.repr(time_ms), "a number, ms")
        lane = lanes.setdefault(rank, [])  # type: ignore[arg-type]
        if record.get("event", ENTERED) == ENTERED:
            value = _ints("value", record.get("value"))
            lane.append(Entry(rank, step, name, value, float(time_ms)))  # type: ignore[arg-type]
            return
        is_open = record.get("is_open")
        if is_open is not None:
            check_bool("is_open", is_open)
        if not lane or (lane[-1].name, lane[-1].step) != (name, step):
            invalid_argument("event", LEFT, f"{ENTERED}, of {name} at step {step}, before it")
        result = _read_result(name, record.get("result"))
        lane[-1] = replace(lane[-1], result=result, left_ms=float(time_ms), is_open=is_open)  # type: ignore[arg-type]
    except AscendTwinError as error:
        raise FixtureError(f"{place}: {error}") from error


def _read_result(name: object, given: object) -> Any:
    """What came back: of a gather a row of each rank, of a reduction whether the wave goes on."""
    if name != GATHER:
        check_bool("result", given)
        return given
    if not isinstance(given, list | tuple):
        invalid_argument("result", reprlib.repr(given), "a list with a row of each rank")
    return [list(_ints(f"result[{i}]", row)) for i, row in enumerate(given)]


def _ints(name: str, given: object) -> tuple[int, ...]:
    if not isinstance(given, list | tuple) or not all(type(x) is int and abs(x) <= MOST for x in given):
        invalid_argument(name, reprlib.repr(given), "a list of ints")
    return tuple(given)


def merge_ranks(fixtures: Sequence[Fixture]) -> Fixture:
    """One fixture of the files of several ranks, in order of time.

    Args:
        fixtures: of kind dp, each with other ranks of the same group.

    Raises:
        InvalidArgumentError: for another kind, groups of several sizes, or a rank that is in two of them.
    """
    if not fixtures:
        invalid_argument("fixtures", fixtures, "at least one")
    first = fixtures[0]
    seen: set[object] = set()
    for fixture in fixtures:
        ranks = {record.get("rank") for record in fixture.records}
        if fixture.kind != "dp" or fixture.config.get("dp_size") != first.config.get("dp_size"):
            invalid_argument("fixtures", fixture.kind, "of kind dp, and of groups of the same size")
        if seen & ranks:
            invalid_argument("rank", sorted(map(str, seen & ranks)), "one that is in no other file")
        seen |= ranks
    earliest = min(_started_ms(fixture) for fixture in fixtures)
    records = [
        {**record, "time_ms": round(record.get("time_ms", 0) + _started_ms(fixture) - earliest, 3)}
        for fixture in fixtures
        for record in fixture.records
    ]
    records.sort(key=lambda record: record["time_ms"])
    config = {**first.config, "started_ms": earliest}
    return replace(first, config=config, records=tuple(records))


def _started_ms(fixture: Fixture) -> float:
    started = fixture.config.get("started_ms", 0)
    return started if isinstance(started, int | float) else 0


def find_mistake(group: Group) -> Mistake | None:
    """The first collective, in the order of a rank's, that is not what it must be."""
    found = [mistake for find in (_misplaced, _wrong_values, _missing) for mistake in find(group)]
    return min(found, key=lambda mistake: (mistake.place, MISTAKES.index(mistake.name)), default=None)


def _misplaced(group: Group) -> Iterator[Mistake]:
    """Ranks in different collectives, and steps whose collectives are not those that a step has."""
    entered = {rank: [(e.step, e.name) for e in lane] for rank, lane in group.lanes.items()}
    if not entered:
        return
    reference = max(entered, key=lambda rank: len(entered[rank]))
    for rank, places in entered.items():
        for place, (one, other) in enumerate(zip(places, entered[reference], strict=False)):
            if one != other:
                here, there = (group.lanes[r][place] for r in (rank, reference))
                message = f"rank {rank} is in {here}, and rank {reference} in {there}"
                yield Mistake(place, rank, "order", message)
                break
    for rank, lane in group.lanes.items():
        if mistake := _out_of_order(group, rank, lane):
            yield mistake


def _out_of_order(group: Group, rank: int, lane: Sequence[Entry]) -> Mistake | None:
    """The first collective of a rank that is not the next one of its step."""
    place, step_in_wave = 0, 0
    step = lane[0].step if lane else 0
    while place < len(lane):
        step_in_wave += 1
        here = lane[place : place + len(NAMES)]
        has_reduction = len(here) > 1 and here[1].name == HAS_UNFINISHED and here[1].step == step
        if group.interval:
            is_first = step_in_wave == 1 and group.reduces_first
            has_reduction = is_first or step_in_wave % group.interval == 0
        due = [FORWARD, *[HAS_UNFINISHED] * has_reduction, *[GATHER] * (group.policy is not None)]
        for name in due:
            if place == len(lane):
                return None
            entry = lane[place]
            if (entry.name, entry.step) != (name, step):
                must = f"{name} of step {step} must come"
                return Mistake(place, rank, "order", f"rank {rank} is in {entry}, where {must}")
            if name == HAS_UNFINISHED and not _goes_on(group, place):
                step_in_wave = 0
            place += 1
        step += 1
    return None


def _goes_on(group: Group, place: int) -> bool:
    """Whether the wave goes on after this reduction: what came back says so, or what was contributed."""
    entries = [lane[place] for lane in group.lanes.values() if len(lane) > place]
    return any(entry.value[:1] == (1,) if entry.result is None else entry.result for entry in entries)


def _wrong_values(group: Group) -> Iterator[Mistake]:
    """What came back is not what the ranks contributed, or they made something else of it than the policy."""
    num_gathers = 0
    for place in range(min(map(len, group.lanes.values()), default=0)):
        entries = {rank: lane[place] for rank, lane in group.lanes.items()}
        names = {entry.name for entry in entries.values()}
        if len(names) > 1:
            return  # which is a mistake of its own, and what comes after it cannot be compared
        for rank, entry in entries.items():
            if problem := _problem(group, entry, entries, num_gathers):
                yield Mistake(place, rank, *problem)
        num_gathers += names == {GATHER}


def _problem(
    group: Group, entry: Entry, entries: Mapping[int, Entry], num_gathers: int
) -> tuple[str, str] | None:
    """Name and message of what is wrong with a collective of a rank."""
    where = f"rank {entry.rank}, {entry}"
    if entry.name == GATHER:
        width = len(RankCounts._fields)
        if len(entry.value) != width or min(entry.value) < 0:
            return "value", f"{where}: contributes {entry.value}, and {width} counts >= 0 it must be"
        counts = RankCounts(*entry.value)
        if counts.step != num_gathers:
            return "value", f"{where}: is at gather {counts.step}, and this is gather {num_gathers}"
        if counts.running > group.cap:
            return "value", f"{where}: runs {counts.running} requests, and at most {group.cap} may"
    if entry.result is None:
        return None
    given = {rank: other.value for rank, other in entries.items()}
    if entry.name == HAS_UNFINISHED:
        return _problem_of_reduction(where, entry, given, is_whole=len(given) == group.size)
    return _problem_of_gather(where, group, entry, given)


def _problem_of_reduction(
    where: str, entry: Entry, given: Mapping[int, tuple[int, ...]], *, is_whole: bool
) -> tuple[str, str] | None:
    """Unfinished requests anywhere, or pauses that not all ranks ask for yet, keep a wave alive."""
    pauses = sum(row[1] for row in given.values() if len(row) > 1)
    due = any(row[0] for row in given.values() if row) or pauses % max(1, len(given)) != 0
    if (is_whole or due) and bool(entry.result) != due:
        return "result", f"{where}: is told {bool(entry.result)}, and {due} follows from {given}"
    return None


def _problem_of_gather(
    where: str, group: Group, entry: Entry, given: Mapping[int, tuple[int, ...]]
) -> tuple[str, str] | None:
    rows = entry.result
    width = len(RankCounts._fields)
    if len(rows) != group.size or any(len(row) != width for row in rows):
        must = f"{group.size} rows of {width} counts it must be"
        return "result", f"{where}: receives {reprlib.repr(rows)}, and {must}"
    for rank, value in given.items():
        if tuple(rows[rank]) != value:
            return "result", f"{where}: receives {rows[rank]} of rank {rank}, which contributes {list(value)}"
    if entry.is_open is None or group.policy is None:
        return None
    due = group.policy([RankCounts(*row) for row in rows])
    if entry.is_open != due:
        words = {True: "opens", False: "shuts"}
        decided = f"{words[entry.is_open]} its gate, and {group.policy} {words[due]} it"
        return "decision", f"{where}: {decided} for {_running(rows)}"
    return None


def _running(rows: Sequence[Sequence[int]]) -> str:
    counts = [RankCounts(*row) for row in rows]
    return ", ".join(f"rank {i} {c.running} running and {c.waiting} waiting" for i, c in enumerate(counts))


def _missing(group: Group) -> Iterator[Mistake]:
    """A rank that waits in the end for one that has not come."""
    if not group.lanes:
        return
    ends = {rank: len(lane) for rank, lane in group.lanes.items()}
    last, first = max(ends.values()), min(ends.values())
    if last == first:
        return
    ahead = min(rank for rank in ends if ends[rank] == last)
    behind = [rank for rank in ends if ends[rank] == first]
    entry = group.lanes[ahead][first]
    seen = ", ".join(
        f"rank {rank} ({f'last in {group.lanes[rank][-1]}' if group.lanes[rank] else 'never seen'})"
        for rank in behind
    )
    yield Mistake(
        first, ahead, "missing", f"rank {ahead} waits in {entry} for {seen}, to the end of the recording"
    )
