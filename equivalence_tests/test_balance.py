"""`BalanceScheduler` beside vLLM's scheduler, and what it contributes to a gather and takes from one."""

import ast
import inspect
import random
import re
import textwrap
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ascend_twin.equivalence_tests.balance_engines import (
    BOUNDS,
    Bound,
    FreezingScheduler,
    Gathers,
    GathersFor,
    Group,
    balance_runs,
    freezing_engine,
    gathering_engine,
    gathers_of,
)
from ascend_twin.equivalence_tests.scheduler_engines import Engine, OurEngine
from ascend_twin.equivalence_tests.scheduler_machine import SchedulerMachine
from ascend_twin.equivalence_tests.scheduler_runs import FEATURES_AT_WORK
from ascend_twin.reference.errors import InvalidArgumentError, SchedulerStateError
from ascend_twin.scheduler import PauseState, Request, RequestStatus, SamplingParams, SchedulerConfig
from ascend_twin.scheduler.admission import POLICIES, AnyRankAtCap, OpenGate, RankCounts, make_policy
from ascend_twin.scheduler.balance import AsyncBalanceScheduler, BalanceScheduler
from ascend_twin.scheduler.output import ModelRunnerOutput, SchedulerOutput
from ascend_twin.scheduler.upstream import AsyncUpstreamScheduler, UpstreamScheduler

DOCS = Path(__file__).parents[1] / "docs/balance.md"

NUM_STEPS = {"dev": 1_000, "ci": 1_000, "nightly": 100_000}
"""Of random runs of one test, by Hypothesis profile."""

CONFIG = SchedulerConfig(
    num_blocks=200, block_size=4, max_num_seqs=3, max_num_batched_tokens=64, max_model_len=32
)
KINDS = {"sync": BalanceScheduler, "async": AsyncBalanceScheduler}


def with_a_cap_of_two(config: SchedulerConfig) -> SchedulerConfig:
    """At a cap of 1 not every policy ever admits anybody."""
    return replace(config, max_num_seqs=max(2, config.max_num_seqs))


def with_a_cap_out_of_reach(config: SchedulerConfig) -> SchedulerConfig:
    return replace(config, max_num_seqs=100)


class Findings:
    """What random runs came to.

    Attributes:
        num_steps, num_frozen_steps: in all of them.
        features: how often each was at work.
    """

    def __init__(self, seed: object, policy: str, *, at_least: int = 0, **options: Any) -> None:
        at_least = max(at_least, NUM_STEPS[settings.get_current_profile_name()])
        self.num_steps = self.num_frozen_steps = self.num_excused = self.num_runs = 0
        self.features: Counter[str] = Counter()
        for run in balance_runs(seed, policy, **options):
            assert not run.failure, f"{run.failure}\n{run.scenario}"
            self.num_runs += 1
            self.num_excused += bool(run.excused)
            self.num_steps += run.driver.num_steps
            self.features += run.driver.features
            self.num_frozen_steps += run.driver.first.scheduler.num_frozen_steps
            if self.num_steps >= at_least:
                break
        assert self.num_excused < self.num_runs * 2 / 3  # as many as without a gate, under async scheduling


# Beside vLLM's scheduler, in random runs with every feature


def beside_upstream(policy: str, gathers_for: GathersFor) -> Sequence[Callable[..., Engine]]:
    return gathering_engine(policy, gathers_for, shows_gate=False), OurEngine


@pytest.mark.parametrize("scheduling", [(), ("async",)], ids=["any", "async"])
@pytest.mark.parametrize(
    ("policy", "most", "change"),
    [
        # Whatever the others do.
        ("open_gate", None, lambda config: config),
        ("cadence:interval=1", None, lambda config: config),
        # A rank that is full itself admits nobody anyway.
        ("any_rank_at_cap", lambda cap: cap - 1, lambda config: config),
        ("any_rank_at_cap", lambda cap: cap - 1, with_a_cap_out_of_reach),
        ("any_rank_near_cap", lambda cap: cap - 2, with_a_cap_out_of_reach),
    ],
    ids=["open_gate", "cadence", "at_cap", "at_cap, out of reach", "near_cap, out of reach"],
)
def test_scheduler_equals_upstream_while_no_other_rank_shuts_the_gate(
    policy: str, most: Any, change: Any, scheduling: tuple[str, ...]
) -> None:
    findings = Findings(11, policy, most=most, change=change, engines=beside_upstream, always=scheduling)
    assert findings.features["preemption"] > 0


@pytest.mark.parametrize("scheduling", [(), ("async",)], ids=["any", "async"])
@pytest.mark.parametrize("policy", [*POLICIES, "cadence:interval=4"])
def test_frozen_step_equals_upstream_with_an_empty_waiting_queue(
    policy: str, scheduling: tuple[str, ...]
) -> None:
    """And what is contributed to every gather, and decided by it, is what can be seen from outside."""
    findings = Findings(12, policy, change=with_a_cap_of_two, always=scheduling)
    assert findings.features["preemption"] > 0
    if policy != "open_gate":
        assert findings.num_frozen_steps > findings.num_steps / 50


def test_frozen_steps_come_with_every_feature() -> None:
    findings = Findings(13, "any_rank_at_cap", at_least=6_000)
    assert findings.num_frozen_steps > findings.num_steps / 10
    assert [name for name in FEATURES_AT_WORK if not findings.features[name]] == []


def test_those_who_give_way_in_a_frozen_step_wait_in_front() -> None:
    """The order of who waits is what `FreezingScheduler` restores by hand: here it is by name."""
    config = replace(CONFIG, num_blocks=9, max_num_batched_tokens=16)
    scheduler = FreezingScheduler(config, policy="any_rank_at_cap", gathers=Gathers(0, 3))
    full = [RankCounts(running=3)] * 3
    for request_id in "abcd":
        scheduler.add_request(Request(request_id, [7] * 5, SamplingParams(max_tokens=20)))
    output = scheduler.schedule()
    while not output.preempted_req_ids:
        req_ids = list(output.num_scheduled_tokens)
        scheduler.update_from_output(output, ModelRunnerOutput(req_ids, [[1] for _ in req_ids]))
        scheduler.gathers.rows = lambda own: full
        output = scheduler.schedule()
    assert not scheduler.is_open
    assert [request.request_id for request in scheduler.running] == ["a", "b"]
    assert [request.request_id for request in scheduler.waiting] == ["c", "d"]


class BesideFreezing(SchedulerMachine):
    """A gate that other ranks shut now and then, and vLLM's scheduler with an empty queue."""

    engines = (
        gathering_engine("any_rank_at_cap", partial(Gathers, 14)),
        freezing_engine("any_rank_at_cap", partial(Gathers, 14)),
    )

    def teardown(self) -> None:
        if hasattr(self, "run"):
            for gathers in gathers_of(self.run):
                gathers.end()
        super().teardown()


TestBesideFreezing = BesideFreezing.TestCase
TestBesideFreezing.settings = settings(stateful_step_count=40)


# Not a line of vLLM's scheduler


def test_balance_scheduler_overrides_nothing_but_its_beginning_and_the_step() -> None:
    inherited = {name for kind in UpstreamScheduler.__mro__[:-1] for name in vars(kind)}
    functions = {name for name, x in vars(BalanceScheduler).items() if callable(x)}
    assert functions & inherited == {"__init__", "schedule"}
    assert [name for name, x in vars(AsyncBalanceScheduler).items() if callable(x)] == []
    order = list(AsyncBalanceScheduler.__mro__)
    assert AsyncUpstreamScheduler in order
    assert order.index(BalanceScheduler) < order.index(AsyncUpstreamScheduler)


def test_schedule_asks_upstream_once_and_touches_no_request() -> None:
    tree = ast.parse(textwrap.dedent(inspect.getsource(BalanceScheduler.schedule)))
    calls = [ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Call)]
    assert calls.count("super().schedule()") == 1
    own = {ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    state = {"waiting", "running", "requests", "kv_cache_manager", "encoder_cache_manager"}
    assert {name for name in own if name.split(".")[1] in state and name.startswith("self.")} == set()
    assert not any(isinstance(node, ast.For | ast.While) for node in ast.walk(tree))


# What it is made of


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_scheduler_hands_on_what_upstream_is_made_of(kind: type[BalanceScheduler]) -> None:
    given: dict[str, Any] = {name: object() for name in ("connector", "structured_output_manager", "clock")}
    scheduler = kind(CONFIG, policy=OpenGate(3), dp_rank=1, dp_size=3, **given)
    assert {name: getattr(scheduler, name) for name in given} == given
    assert scheduler.config is CONFIG
    assert (scheduler.dp_rank, scheduler.dp_size) == (1, 3)
    assert (scheduler.admission_policy, scheduler.admission_cap) == (OpenGate(3), 3)
    alone = kind(CONFIG, policy=OpenGate(3))
    assert (alone.dp_rank, alone.dp_size) == (0, 1)
    assert alone.clock is time.monotonic


def test_scheduler_begins_before_the_first_gather() -> None:
    scheduler = started(0)
    assert scheduler.is_open
    assert (scheduler.num_gathers, scheduler.num_frozen_steps) == (0, 0)


def test_scheduler_refuses_a_policy_that_is_none() -> None:
    said = "policy is any_rank_at_cap; allowed: a function of the gathered counts, see make_policy()"
    with pytest.raises(InvalidArgumentError, match=f"^{re.escape(said)}$"):
        BalanceScheduler(CONFIG, policy="any_rank_at_cap")  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_scheduler_refuses_a_policy_of_another_cap(kind: type[BalanceScheduler]) -> None:
    with pytest.raises(
        InvalidArgumentError, match=r"^policy\.max_num_running_reqs is 4; allowed: max_num_seqs = 3$"
    ):
        kind(CONFIG, policy=AnyRankAtCap(4))


@pytest.mark.parametrize(
    ("place", "said"),
    [
        ({"dp_size": 0}, "^dp_size is 0; allowed: an int >= 1$"),
        ({"dp_size": 2.0}, "^dp_size is 2.0; allowed: an int >= 1$"),
        ({"dp_rank": -1}, "^dp_rank is -1; allowed: an int from 0 to 0$"),
        ({"dp_rank": 2, "dp_size": 2}, "^dp_rank is 2; allowed: an int from 0 to 1$"),
    ],
)
def test_scheduler_refuses_a_rank_out_of_range(place: dict[str, Any], said: str) -> None:
    with pytest.raises(InvalidArgumentError, match=said):
        BalanceScheduler(CONFIG, policy=OpenGate(3), **place)


def test_scheduler_takes_a_policy_that_is_a_function() -> None:
    scheduler = BalanceScheduler(CONFIG, policy=lambda gathered: gathered[0].step > 0, dp_size=2)
    assert not scheduler.is_open
    scheduler.add_request(Request("a", [1], SamplingParams(max_tokens=2)))
    assert scheduler.schedule().total_num_scheduled_tokens == 0
    scheduler.observe([scheduler.counts(), RankCounts()])
    assert not scheduler.is_open
    scheduler.observe([scheduler.counts(), RankCounts(step=1)])
    assert scheduler.is_open
    assert scheduler.schedule().total_num_scheduled_tokens == 1


# All ranks decide alike, and nobody waits for ever


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("policy", [*POLICIES, "cadence:interval=5"])
@given(seed=st.integers(0, 10**6), dp_size=st.integers(1, 8))
@settings(max_examples=15)
def test_all_ranks_decide_alike_from_the_same_gather(
    policy: str, kind: type[BalanceScheduler], seed: int, dp_size: int
) -> None:
    rng = random.Random(seed)
    group = Group([policy] * dp_size, CONFIG, kind)
    decide = make_policy(policy, CONFIG.max_num_seqs)
    for step in range(25):
        for _ in range(rng.choice((0, 0, 1, 4))):
            group.add_request(rng.randrange(dp_size), rng.randint(1, 12), rng.randint(1, 12))
        if rng.random() < 0.2:
            group.schedulers[rng.randrange(dp_size)].set_pause_state(rng.choice(list(PauseState)))
        group.step()
        answer = decide(group.gathered)
        assert [scheduler.is_open for scheduler in group.schedulers] == [answer] * dp_size
        assert [scheduler.num_gathers for scheduler in group.schedulers] == [step + 1] * dp_size


def waits_and_spells(policy: str, dp_size: int, seed: int) -> tuple[int, int]:
    """The longest wait of a rank until it admitted somebody, and the longest spell of the shut gate."""
    rng = random.Random(seed)
    config = replace(CONFIG, max_num_seqs=2)  # blocks and tokens for all
    group = Group([policy] * dp_size, config)
    longest_wait = longest_spell = spell = 0
    waited = [0] * dp_size
    for step in range(250):
        if step < 200:
            for rank in range(dp_size):
                for _ in range(rng.choice((0, 0, 0, 1, 2))):
                    num_prompt_tokens = rng.randint(1, 12)
                    max_tokens = rng.choice((1, 2, 5, config.max_model_len - num_prompt_tokens))
                    group.add_request(rank, num_prompt_tokens, max_tokens)
        group.step()
        spell = 0 if group.schedulers[0].is_open else spell + 1
        longest_spell = max(longest_spell, spell)
        for rank, scheduler in enumerate(group.schedulers):
            output = group.outputs[rank]
            has_admitted = output is not None and bool(output.scheduled_new_reqs)
            waited[rank] = 0 if has_admitted or not scheduler.waiting else waited[rank] + 1
            longest_wait = max(longest_wait, waited[rank])
    return longest_wait, longest_spell


@pytest.mark.parametrize("policy", [*POLICIES, "cadence:interval=5"])
@given(seed=st.integers(0, 10**6), dp_size=st.integers(1, 4))
@settings(max_examples=10)
def test_nobody_waits_longer_than_the_bound(policy: str, seed: int, dp_size: int) -> None:
    bound = bound_of(policy)
    wait, spell = waits_and_spells(policy, dp_size, seed)
    assert spell <= bound.shut
    assert wait <= bound.wait


def bound_of(policy: str) -> Bound:
    made = make_policy(policy, CONFIG.max_num_seqs)
    return BOUNDS[policy.partition(":")[0]](made, CONFIG.max_model_len)


@pytest.mark.parametrize(
    ("policy", "num_prompt_tokens"),
    [("any_rank_at_cap", 1), ("any_rank_at_cap", 9), ("cadence:interval=6", 9)],
)
def test_bound_of_a_shut_gate_is_reached(policy: str, num_prompt_tokens: int) -> None:
    """One token a step, of a request as long as they come; the other rank waits for it all that time."""
    config = replace(CONFIG, max_num_seqs=1, max_num_batched_tokens=1)
    group = Group([policy] * 2, config)
    group.add_request(0, num_prompt_tokens, config.max_model_len - num_prompt_tokens)
    group.step()
    late = group.add_request(1, 1, 1)
    spell = longest = 0
    for _ in range(2 * config.max_model_len):
        spell = 0 if group.schedulers[0].is_open else spell + 1
        longest = max(longest, spell)
        group.step()
    assert late.is_finished
    assert longest == bound_of(policy).shut


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_bound_grows_with_the_steps_in_flight(depth: int) -> None:
    config = replace(CONFIG, max_num_seqs=1, max_num_batched_tokens=1)
    scheduler = KINDS["async" if depth > 1 else "sync"](config, policy=AnyRankAtCap(1), dp_size=2)
    scheduler.add_request(Request("a", [7] * 9, SamplingParams(max_tokens=config.max_model_len - 9)))
    in_flight: deque[tuple[SchedulerOutput, list[list[int]]]] = deque()
    num_shut = 0
    while scheduler.requests:
        output = scheduler.schedule()
        req_ids = list(output.num_scheduled_tokens)
        tokens = [[] if scheduler.requests[i].is_prefill_chunk else [1] for i in req_ids]
        in_flight.append((output, tokens))
        if len(in_flight) == depth or not req_ids:
            output, tokens = in_flight.popleft()
            req_ids = list(output.num_scheduled_tokens)
            scheduler.update_from_output(output, ModelRunnerOutput(req_ids, tokens))
        own = scheduler.counts()
        scheduler.observe([own, RankCounts(step=own.step)])
        num_shut += not scheduler.is_open
    assert num_shut == bound_of("any_rank_at_cap").shut + depth - 1


# Counts


def started(num_requests: int, config: SchedulerConfig = CONFIG, **options: Any) -> BalanceScheduler:
    """A scheduler of two ranks with requests of 5 tokens, before its first step."""
    scheduler = BalanceScheduler(config, policy=AnyRankAtCap(config.max_num_seqs), dp_size=2, **options)
    for i in range(num_requests):
        scheduler.add_request(Request(f"r{i}", [i] * 5, SamplingParams(max_tokens=9)))
    return scheduler


def step(scheduler: BalanceScheduler, *others: RankCounts) -> RankCounts:
    """Schedules, gathers with `others` (or nobody), and returns what was contributed."""
    output = scheduler.schedule()
    req_ids = list(output.num_scheduled_tokens)
    tokens = [[] if scheduler.requests[i].is_prefill_chunk else [1] for i in req_ids]
    scheduler.update_from_output(output, ModelRunnerOutput(req_ids, tokens))
    own = scheduler.counts()
    scheduler.observe([own, *(other._replace(step=own.step) for other in others or (RankCounts(),))])
    return own


def test_counts_of_a_new_rank_are_zero() -> None:
    assert started(0).counts() == RankCounts()
    assert all(type(count) is int for count in started(0).counts())


def test_counts_of_running_and_waiting_requests() -> None:
    scheduler = started(5)
    assert scheduler.counts() == RankCounts(waiting=5)
    counts = step(scheduler)
    assert counts == RankCounts(running=3, waiting=2, saturated=1)
    assert not scheduler.is_open
    counts = step(scheduler)
    assert counts == RankCounts(step=1, running=3, waiting=2, waited=1, saturated=1)
    assert step(scheduler).waited == 2
    scheduler.finish_requests(["r0", "r1"], RequestStatus.FINISHED_ABORTED)
    assert step(scheduler) == RankCounts(step=3, running=1, waiting=2, waited=3, saturated=1)
    # The gate is open again: both are admitted.
    assert step(scheduler) == RankCounts(step=4, running=3)
    assert (scheduler.num_gathers, scheduler.num_frozen_steps) == (5, 3)


def test_counts_are_of_the_end_of_the_step() -> None:
    """Not of its beginning: those who have ended in it leave room."""
    scheduler = started(0)
    scheduler.add_request(Request("a", [7] * 5, SamplingParams(max_tokens=1)))
    assert step(scheduler) == RankCounts()


def test_counts_of_a_prompt_that_is_computed_in_parts() -> None:
    scheduler = started(2, replace(CONFIG, max_num_batched_tokens=4))
    assert step(scheduler) == RankCounts(running=1, waiting=1, prefilling=1, saturated=1)
    assert step(scheduler) == RankCounts(step=1, running=2, prefilling=1)
    assert step(scheduler) == RankCounts(step=2, running=2)


def test_counts_of_a_paused_rank_hold_up_nobody() -> None:
    scheduler = started(5)
    step(scheduler)
    scheduler.set_pause_state(PauseState.PAUSED_NEW)
    assert step(scheduler) == RankCounts(step=1, running=3)
    scheduler.set_pause_state(PauseState.PAUSED_ALL)
    assert step(scheduler) == RankCounts(step=2)
    assert scheduler.is_open
    scheduler.set_pause_state(PauseState.UNPAUSED)
    # The last step with an open gate was the first one.
    assert scheduler.counts() == RankCounts(step=3, running=3, waiting=2, saturated=1)


def test_counts_of_a_rank_that_is_paused_after_its_step_wait_for_nobody() -> None:
    scheduler = started(5)
    step(scheduler)
    assert step(scheduler).waited == 1
    scheduler.set_pause_state(PauseState.PAUSED_NEW)
    assert scheduler.counts() == RankCounts(step=2, running=3)


def test_sessions_without_input_do_not_wait_for_admission() -> None:
    scheduler = started(0)
    scheduler.add_request(Request("s", [7] * 5, SamplingParams(max_tokens=1), resumable=True))
    assert step(scheduler) == RankCounts()
    assert len(scheduler.waiting) == 1
    scheduler.add_request(Request("s", [7] * 5, SamplingParams(max_tokens=2), resumable=True))
    assert scheduler.counts() == RankCounts(step=1, waiting=1)


def test_saturated_is_about_the_last_step_with_an_open_gate() -> None:
    scheduler = started(1)
    assert step(scheduler, RankCounts(running=3)).saturated == 0
    for _ in range(2):
        scheduler.add_request(Request(f"late{_}", [7], SamplingParams(max_tokens=9)))
        counts = step(scheduler, RankCounts(running=3))
        assert (counts.saturated, counts.waiting, counts.waited) == (0, _ + 1, _ + 1)
    assert scheduler.num_frozen_steps == 2


# Gathers that are none


BAD_GATHERS = {
    "one row too few": (lambda own: [own], "1 contributions of 2 ranks"),
    "one row too many": (lambda own: [own, own, own], "3 contributions of 2 ranks"),
    "none": (lambda own: [], "0 contributions of 2 ranks"),
    "own row changed": (lambda own: [own._replace(waiting=9), own], "sent RankCounts.*received RankCounts"),
    "own row in another place": (
        lambda own: [RankCounts(step=own.step), own],
        "sent RankCounts.*received RankCounts",
    ),
    "stale": (lambda own: [own, RankCounts(step=own.step - 1)], "rank 1 is at gather 1$"),
    "ahead": (lambda own: [own, RankCounts(step=own.step + 1)], "rank 1 is at gather 3$"),
    "below 0": (
        lambda own: [own, RankCounts(step=own.step, waiting=-1)],
        r"rank 1 contributes RankCounts\(step=2, .*waiting=-1, .*\), below 0$",
    ),
    "over the cap": (
        lambda own: [own, RankCounts(step=own.step, running=4)],
        "rank 1 runs 4 requests, and max_num_running_reqs is 3 here: it must be the same on all ranks",
    ),
}


def state_of(scheduler: BalanceScheduler) -> dict[str, Any]:
    return {name: x for name, x in vars(scheduler).items() if isinstance(x, bool | int | tuple | type(None))}


@pytest.mark.parametrize("bad", BAD_GATHERS)
def test_a_bad_gather_is_refused_and_changes_nothing(bad: str) -> None:
    make, said = BAD_GATHERS[bad]
    scheduler = started(5)
    step(scheduler)
    step(scheduler)
    own = scheduler.counts()
    before = state_of(scheduler)
    with pytest.raises(SchedulerStateError, match=f"^rank 0, gather 2: .*{said}"):
        scheduler.observe(make(own))
    assert state_of(scheduler) == before
    scheduler.observe([own, RankCounts(step=2)])
    assert scheduler.num_gathers == 3


def test_a_gather_cannot_be_observed_without_or_before_counts() -> None:
    scheduler = started(2)
    gathered = [RankCounts(waiting=2), RankCounts()]
    with pytest.raises(SchedulerStateError, match=r"^rank 0, gather 0: counts\(\) was not called"):
        scheduler.observe(gathered)
    assert scheduler.counts() == gathered[0]
    scheduler.observe(gathered)
    with pytest.raises(SchedulerStateError, match=r"^rank 0, gather 1: counts\(\) was not called"):
        scheduler.observe(gathered)
    assert scheduler.num_gathers == 1


def test_a_bad_gather_is_refused_by_the_rank_that_sees_it() -> None:
    scheduler = BalanceScheduler(CONFIG, policy=AnyRankAtCap(3), dp_rank=2, dp_size=3)
    own = scheduler.counts()
    with pytest.raises(SchedulerStateError, match=r"^rank 2, gather 0: rank 1 runs 7 requests"):
        scheduler.observe([own, RankCounts(running=7), own])


def test_counts_can_be_asked_for_again() -> None:
    scheduler = started(2)
    first = scheduler.counts()
    scheduler.add_request(Request("late", [7], SamplingParams(max_tokens=1)))
    second = scheduler.counts()
    assert (first.waiting, second.waiting) == (2, 3)
    with pytest.raises(SchedulerStateError, match="sent"):
        scheduler.observe([first, RankCounts()])
    scheduler.observe([second, RankCounts()])


# The docs


@pytest.mark.skipif(not DOCS.exists(), reason="the docs are in the repository alone")
def test_examples_of_the_docs_run(capsys: pytest.CaptureFixture[str]) -> None:
    blocks = DOCS.read_text(encoding="utf-8").split("```python\n")[1:]
    assert blocks
    said = []
    for block in blocks:
        code, _, rest = block.partition("```\n")
        exec(compile(code, str(DOCS), "exec"), {"__name__": "docs"})
        said.append(capsys.readouterr().out)
        if rest.lstrip().startswith("```text\n"):
            assert said[-1] == rest.lstrip().removeprefix("```text\n").partition("```")[0]
