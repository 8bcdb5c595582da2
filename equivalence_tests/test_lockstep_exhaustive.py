"""Every interleaving of what can happen to two ranks, for a few acts of the client: nobody waits for ever."""

import os
import re
from pathlib import Path

import pytest

from ascend_twin.equivalence_tests import lockstep_search
from ascend_twin.equivalence_tests.lockstep_mutants import ExcludingLockstep
from ascend_twin.equivalence_tests.lockstep_runs import ProtocolError
from ascend_twin.equivalence_tests.lockstep_search import (
    ACTS,
    Event,
    Search,
    SmallGroup,
    World,
    search,
)
from ascend_twin.reference.errors import LockstepError
from ascend_twin.scheduler.lockstep import CLIENT, COORDINATOR, Lockstep, Rank

PROFILE = os.environ.get("HYPOTHESIS_PROFILE") or ("ci" if os.environ.get("CI") else "dev")
DOCS = Path(__file__).parents[1] / "docs/lockstep.md"
with_docs = pytest.mark.skipif(not DOCS.exists(), reason="the docs are in the repository alone")

PAUSING = "add", "pause", "unpause"
WORLDS = {
    "dev": (World(2), World(2, cap=2, interval=1), World(1, dp_size=3)),
    "ci": (World(3), World(2, dp_size=3, interval=1)),
    "nightly": (World(3, interval=1), World(3, cap=2)),
}
"""What each profile searches, beside what the profiles before it do."""

ROW = re.compile(
    r"^\| (\d) \| (\d) \| ([a-z, ]+) \| (\d) \| (\d) \| ([\d,]+) \| ([\d,]+) \| (\d+) \|", re.MULTILINE
)


def worlds() -> list[World]:
    """Of this profile."""
    profiles = tuple(WORLDS)[: tuple(WORLDS).index(PROFILE) + 1]
    return [world for profile in profiles for world in WORLDS[profile]]


def short_name(world: World) -> str:
    """For the name of a test."""
    return f"{world.dp_size} ranks, {world.num_acts} acts, cap {world.cap}, interval {world.interval}"


def documented() -> dict[World, tuple[int, int, int]]:
    """From the table of the docs: states, transitions and depth of each world."""
    found = {}
    for dp_size, num_acts, acts, cap, interval, *numbers in ROW.findall(DOCS.read_text(encoding="utf-8")):
        chosen = ACTS if acts == "all" else tuple(acts.split(", "))
        world = World(int(num_acts), chosen, int(dp_size), int(cap), int(interval))
        found[world] = tuple(int(number.replace(",", "")) for number in numbers)
    return found


@pytest.mark.parametrize("world", worlds(), ids=short_name)
def test_lockstep_serves_all_and_comes_to_rest_whatever_the_order(world: World) -> None:
    found = search(world)
    print(f"{found.num_states} states, {found.num_transitions} transitions, depth {found.depth}")
    assert not found.problem, story(found)
    assert found.num_rests > 1
    if DOCS.exists():
        assert documented()[world] == (found.num_states, found.num_transitions, found.depth)


@with_docs
def test_docs_list_what_each_profile_searches() -> None:
    assert sorted(map(str, documented())) == sorted(str(world) for some in WORLDS.values() for world in some)


def story(found: Search) -> str:
    """What happened, and what is wrong."""
    return "\n".join([*map(str, found.history), found.problem])


# That it finds what is wrong


@pytest.mark.parametrize("act", ["abort", "pause", "pause new"])
def test_search_finds_the_deadlock_of_v0_17_0(act: str) -> None:
    """Who has the request is not told that the wave starts (vllm #39366)."""
    found = search(World(2, ("add", act), group_type=ExcludingLockstep))
    assert list(map(str, found.history)) == [
        "client sends to rank 0: add",
        f"client sends to rank 0: {act}",
        "coordinator reads from client",
        "rank 0 reads from client, client, then takes its turn",
        "rank 1 reads from coordinator, then takes its turn",
    ]
    assert found.problem == "LockstepError: rank 1 waits in forward at step 0, but idle for ever: rank 0"
    assert not search(World(2, ("add", act))).problem


@with_docs
def test_docs_tell_the_shortest_history_of_that_deadlock() -> None:
    assert story(search(World(2, group_type=ExcludingLockstep))) in DOCS.read_text(encoding="utf-8")


class DeafToStaleRequests(Rank):
    """Does not say that it has a request for a wave that is over."""

    def add_request(self, request: object, wave: int) -> None:
        self.engine.add_request(request)
        self.current_wave = max(wave, self.current_wave)


class DeafToTheEndOfPauses(Rank):
    """Does not say that it goes on with requests that nobody else knows of."""

    def set_pause_state(self, state: object) -> None:
        self.engine.scheduler.set_pause_state(state)  # type: ignore[arg-type]


class JoinsAnyWave(Rank):
    """Takes news of a wave that is over for news."""

    def start_wave(self, wave: int) -> None:
        self.current_wave = max(wave, self.current_wave)
        self.is_in_wave = True


def with_ranks(kind: type[Rank]) -> type[Lockstep]:
    """`Lockstep` of other ranks."""

    class Other(Lockstep):
        def __init__(self, *args: object, **options: object) -> None:
            super().__init__(*args, **options)  # type: ignore[arg-type]
            self.ranks[:] = [kind(r.engine, r.post, r.finish_check_interval) for r in self.ranks]

    return Other


@pytest.mark.parametrize(
    ("wrong", "world"),
    [
        (with_ranks(DeafToStaleRequests), World(2, ("add",), interval=1)),
        (with_ranks(DeafToTheEndOfPauses), World(3, PAUSING, interval=1)),
        (with_ranks(JoinsAnyWave), World(1, ("add",), interval=1)),
    ],
    ids=["stale requests", "end of a pause", "start of a wave that is over"],
)
def test_search_finds_a_protocol_that_leaves_ranks_alone(wrong: type[Lockstep], world: World) -> None:
    found = search(World(world.num_acts, world.acts, interval=world.interval, group_type=wrong))
    print(story(found))
    assert found.problem == "LockstepError: rank 0 waits in forward at step 1, but idle for ever: rank 1"


# The search itself


def test_search_takes_no_wrong_short_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    """It finds the same when each event is tried in each state."""
    world = World(2, PAUSING, interval=1)
    found = search(world)
    monkeypatch.setattr(lockstep_search._Searching, "_known", lambda self, state, event: None)
    assert search(world) == found


def test_small_group_counts_waves_and_requests_from_the_oldest_that_is_alive() -> None:
    """After a wave the group is in the state in which it was before, but for what the client may still do."""
    world = World(1, ("add",), interval=1)
    wave = (
        Event("add", 1),
        Event("read", CLIENT),
        Event("turn", 0, (COORDINATOR,)),
        Event("turn", 1, (CLIENT, COORDINATOR)),
        Event("read", 0),
        Event("turn", 1),  # idle, but for telling its model what has finished
    )
    group = SmallGroup(world, wave)
    assert group.engines[1].finished == ["r0"]
    assert [rank.current_wave for rank in group.group.ranks] == [1, 1]
    fresh = SmallGroup(world)
    fresh.num_acts = 1
    assert group.key() == fresh.key()
    assert not list(group.moves())
    group.check_rest()


def test_small_group_says_when_a_request_is_lost_or_not_served() -> None:
    group = SmallGroup(World(1, ("add",)), (Event("add", 0),))
    group.key()
    group.group.mail[CLIENT, 0].clear()
    with pytest.raises(ProtocolError, match=r"nobody has \['r0'\] any more"):
        group.key()
    with pytest.raises(ProtocolError, match=r"rank 0 has not served \['r0'\]"):
        group.check_rest()


def test_small_group_at_rest_refuses_a_rank_that_waits() -> None:
    group = SmallGroup(
        World(1, ("add",), group_type=ExcludingLockstep), (Event("add", 0), Event("read", CLIENT))
    )
    group.apply(Event("turn", 1, (COORDINATOR,)))
    group.group.mail[CLIENT, 0].clear()
    with pytest.raises(LockstepError, match="rank 1 waits in forward at step 0, but idle for ever: rank 0"):
        group.check_rest()
