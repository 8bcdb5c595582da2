"""A gather in the wrong place is found: by the ranks that then wait for one another, or by its order."""

import random
from collections.abc import Callable
from pathlib import Path

import pytest

from ascend_twin.equivalence_tests.lockstep_mutants import PLACES, misplaced
from ascend_twin.equivalence_tests.lockstep_picture import SCENES, draw, draw_again, run_scene
from ascend_twin.equivalence_tests.lockstep_runs import (
    GroupRun,
    ProtocolError,
    choose_group_setup,
    settle,
)
from ascend_twin.equivalence_tests.lockstep_search import World, search
from ascend_twin.equivalence_tests.scheduler_strategies import RandomChooser, choose_request
from ascend_twin.reference.errors import LockstepError
from ascend_twin.scheduler.lockstep import Lockstep

DOCS = Path(__file__).parents[1] / "docs/lockstep.md"
with_docs = pytest.mark.skipif(not DOCS.exists(), reason="the docs are in the repository alone")

ORDERS = "before the reduction", "while the wave goes on", "twice"
"""Places in which all ranks gather alike: nobody waits, but it is another order than the one there is."""


def run_at_random(seed: int, group_type: Callable[..., Lockstep]) -> GroupRun:
    """Requests for three ranks, until all are idle."""
    chooser = RandomChooser(random.Random(seed))
    setup = choose_group_setup(chooser)
    run = GroupRun(setup, "any_rank_at_cap", 3, finish_check_interval=2, group_type=group_type)
    for i in range(6):
        run.add(chooser.integer(0, 2), choose_request(chooser, setup.config, (), f"r{i}"))
        run.group.step()
    settle(run.group)
    return run


def run_some_at_random(group_type: Callable[..., Lockstep]) -> None:
    """One after the other."""
    for seed in range(20):
        run_at_random(seed, group_type)


def test_misplaced_rank_is_a_rank_when_nothing_is_misplaced() -> None:
    for seed in range(5):
        run, other = run_at_random(seed, Lockstep), run_at_random(seed, misplaced("right"))
        assert run.group.transport.logs == other.group.transport.logs
        assert run.said() == other.said()
        other.check()


@pytest.mark.parametrize("place", [place for place in PLACES if place not in ("right", *ORDERS)])
def test_gather_is_found_where_it_deadlocks(place: str) -> None:
    """At random with real schedulers; and by the exhaustive search, which needs but one or two requests."""
    rank = r"rank \d (in|waits in) (forward|gather|has_unfinished) at step \d+"
    with pytest.raises(LockstepError, match=rank):
        run_some_at_random(misplaced(place))
    found = search(World(2, ("add",), group_type=misplaced(place)))
    assert found.problem.startswith("LockstepError: ")
    assert len(found.history) <= 9


@pytest.mark.parametrize("place", ORDERS)
def test_gather_is_found_where_its_order_alone_is_wrong(place: str) -> None:
    run = run_at_random(0, misplaced(place))
    with pytest.raises(ProtocolError, match=r"collectives from place|rank 0: \d+ gathers in \d+ steps"):
        run.check()


@pytest.mark.parametrize(
    ("place", "tokens", "problem"),
    [
        (
            "in schedule()",
            (3, 1),
            "ranks entered different collectives: rank 0 in gather at step 2, rank 1 in forward at step 2",
        ),
        (
            "in the engine's step",
            (3, 1),
            "ranks entered different collectives: rank 0 in forward at step 1, rank 1 in gather at step 1",
        ),
        ("before the idle check", (2, 1), "rank 0 waits in gather at step 2, but idle for ever: rank 1"),
        ("before the idle check", (3, 1), ""),
    ],
)
def test_gather_deadlocks_as_in_vllm_ascend_11310(place: str, tokens: tuple[int, int], problem: str) -> None:
    """The last one only when a request ends in the very turn of the reduction: in some runs, that is.

    A rank that is drained knows of it one turn later, for it has to tell its model who has finished; hence
    step 2 of the first.
    """
    group = run_scene(place, tokens)
    if not problem:
        assert not group.step()
        return
    with pytest.raises(LockstepError) as raised:
        group.step()
    assert str(raised.value) == problem


def test_draw_shows_who_waits_in_what() -> None:
    group = run_scene("in the engine's step", (2, 1))
    picture = draw(group.transport.logs, group.transport.waiting)
    assert picture.splitlines()[-4:] == [
        "    Note over r0: waits in forward at step 1",
        "    Note over r1: waits in gather at step 1",
        "    r0--xr1: for ever",
        "    r1--xr0: for ever",
    ]
    group = run_scene("right", (2, 1))
    assert "waits" not in draw(group.transport.logs, group.transport.waiting)


@with_docs
def test_docs_show_what_a_run_draws() -> None:
    text = DOCS.read_text(encoding="utf-8")
    assert draw_again(text) == text
    assert text.count("<!-- picture: ") == text.count("```mermaid") == len(SCENES)
    for place in SCENES:
        assert f"<!-- picture: {place} -->" in text
