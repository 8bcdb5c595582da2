"""The plain scheduler alone: invariants hold after every step, and outputs are those of the oracle."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import Phase, settings
from hypothesis.stateful import run_state_machine_as_test

from ascend_twin.equivalence_tests.paged_model import OutputOracle
from ascend_twin.equivalence_tests.scheduler_driver import drive
from ascend_twin.equivalence_tests.scheduler_invariants import (
    INVARIANTS,
    Before,
    Invariant,
    InvariantError,
    check_invariants,
)
from ascend_twin.equivalence_tests.scheduler_machine import SchedulerMachine
from ascend_twin.equivalence_tests.scheduler_runs import (
    FEATURES_AT_WORK,
    NUM_STEPS,
    CheckedEngine,
    Run,
    StallError,
    run_at_random,
    run_mix,
)
from ascend_twin.equivalence_tests.scheduler_scenarios import Add, ResetPrefixCache, Scenario, Step
from ascend_twin.equivalence_tests.scheduler_strategies import Setup
from ascend_twin.reference.errors import AscendTwinError
from ascend_twin.scheduler import (
    PauseState,
    Request,
    RequestStatus,
    SamplingParams,
    SchedulerConfig,
    UpstreamScheduler,
)
from ascend_twin.scheduler.kv_blocks import Block
from ascend_twin.scheduler.output import SchedulerOutput
from ascend_twin.scheduler.workload import RequestMix, RequestSpec

TestAnythingMayHappen = SchedulerMachine.TestCase
TestAnythingMayHappen.settings = settings(stateful_step_count=50)

CONFIG = SchedulerConfig(
    num_blocks=9, block_size=4, max_num_seqs=4, max_num_batched_tokens=16, max_model_len=32
)


def spec(request_id: str, num_tokens: int, max_tokens: int, **fields: object) -> RequestSpec:
    return RequestSpec(request_id, 0, ((0, num_tokens),), max_tokens, **fields)  # type: ignore[arg-type]


def test_random_runs_hold_the_invariants_with_every_feature_at_work() -> None:
    summary = run_at_random(seed=0, num_steps=NUM_STEPS[settings.get_current_profile_name()])
    assert not summary.failure, f"{summary.failure}\n{summary.scenario}"
    assert [name for name in FEATURES_AT_WORK if not summary.features[name]] == []
    # Known defects end some runs; most must go on to the last token.
    assert sum(summary.excused.values()) < summary.runs / 4


def test_a_preemption_anywhere_changes_no_output() -> None:
    """The oracle compares every token; here is the preemption that it does so for."""
    num_resumptions = 0
    for num_steps in range(1, 12):
        run = Run(Setup(CONFIG))
        run.apply(Add(spec("a", 9, 8)))
        run.apply(Add(spec("b", 6, 8)))
        run.apply(Step(num_steps))
        run.apply(ResetPrefixCache(running=True))
        run.drain()
        run.conclude()
        assert (run.failure, run.excused) == ("", "")
        num_resumptions += run.driver.features["resumption"]
    assert num_resumptions > 8


Damage = Callable[[UpstreamScheduler, SchedulerOutput], object]
DAMAGE: dict[str, Damage] = {
    "blocks_are_conserved": lambda s, out: setattr(s.kv_cache_manager.block_pool.blocks[1], "ref_cnt", 3),
    "only_equal_content_is_shared": lambda s, out: _tables(s)["b"].append(_tables(s)["a"][0]),
    "tables_hold_all_tokens": lambda s, out: _tables(s)["a"].pop(),
    "a_block_has_one_writer": lambda s, out: _tables(s).update(b=_tables(s)["a"]),
    "limits_are_kept": lambda s, out: setattr(out, "total_num_scheduled_tokens", 17),
    "prefills_are_cut_as_allowed": lambda s, out: out.num_scheduled_tokens.update(a=10),
    "nobody_steps_past_its_end": lambda s, out: setattr(s.running[0], "max_tokens", 0),
    "requests_are_partitioned": lambda s, out: s.waiting.add_request(s.running[0]),
    "counts_are_possible": lambda s, out: setattr(s.running[0], "num_computed_tokens", 10),
    "the_right_requests_give_way": lambda s, out: out.preempted_req_ids.add("a"),
    "the_most_urgent_waits_first": lambda s, out: [
        setattr(r, "priority", -i) for i, r in enumerate(s.waiting)
    ],
    "sessions_without_input_are_counted": lambda s, out: setattr(s, "num_waiting_for_streaming_input", 1),
    "pausing_is_obeyed": lambda s, out: s.set_pause_state(PauseState.PAUSED_ALL),
    "encoder_cache_is_conserved": lambda s, out: s.encoder_cache_manager.freeable.update(image=1),
}


def _tables(scheduler: UpstreamScheduler) -> dict[str, list[Block]]:
    return scheduler.kv_cache_manager.groups[0].req_to_blocks


@pytest.mark.parametrize("invariant", INVARIANTS, ids=lambda invariant: invariant.__name__)
def test_an_invariant_fails_when_the_state_is_damaged(invariant: Invariant) -> None:
    config = replace(CONFIG, policy="priority", max_num_seqs=2, long_prefill_token_threshold=8)
    scheduler = UpstreamScheduler(config)
    for request_id in ("a", "b", "c", "d"):
        scheduler.add_request(Request(request_id, [1] * 5, SamplingParams(max_tokens=3)))
    before = Before.of(scheduler)
    output = scheduler.schedule()
    assert not list(invariant(scheduler, output, before))
    DAMAGE[invariant.__name__](scheduler, output)
    assert list(invariant(scheduler, output, before))


@pytest.mark.parametrize(
    ("policy", "victim"), [("fcfs", "a"), ("priority", "b")], ids=["not the last", "not the least urgent"]
)
def test_a_preemption_of_the_wrong_request_is_found(policy: str, victim: str) -> None:
    scheduler = UpstreamScheduler(replace(CONFIG, policy=policy))
    for priority, request_id in ((2, "a"), (1, "b")):
        request = Request(request_id, [1] * 5, SamplingParams(max_tokens=3), priority=priority)
        scheduler.add_request(request)
    scheduler.schedule()
    before = Before.of(scheduler)
    output = scheduler.schedule()
    scheduler.running = [request for request in scheduler.running if request.request_id != victim]
    request = scheduler.requests[victim]
    scheduler.kv_cache_manager.free(request)
    scheduler.waiting.add_request(request)
    request.status, request.num_computed_tokens = RequestStatus.PREEMPTED, 0
    output.preempted_req_ids.add(victim)
    with pytest.raises(InvariantError, match=f"{victim} gave way to {'ab'.replace(victim, '')}"):
        check_invariants(scheduler, output, before)


def test_a_request_that_is_not_served_is_a_stall(monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(Setup(CONFIG))
    run.apply(Add(spec("a", 9, 8)))
    monkeypatch.setattr(run.driver.first.scheduler, "admission_gate", lambda: False)
    with pytest.raises(StallError, match=r"a \(WAITING\)"):
        run.drain()


def test_a_mix_is_driven_by_its_arrivals_to_the_last_token() -> None:
    mix = RequestMix(tuple(replace(spec(f"r{i}", 8 + i, 5), arrival_ms=100 * i) for i in range(10)))
    driver = run_mix(mix, CONFIG, step_ms=10)
    assert driver.features["stop_max_tokens"] == 10
    assert driver.features["prefix_hit"] == 9  # of what came before, for all share a prefix
    assert driver.num_steps < 100  # an idle scheduler makes no steps


def test_a_failure_is_saved_as_a_scenario_that_reproduces_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ASCEND_TWIN_FAILURES", str(tmp_path))
    monkeypatch.setattr(
        UpstreamScheduler, "_cap_long_prefill", lambda self, num_new_tokens: num_new_tokens + 1
    )

    quick = settings(
        max_examples=10,
        stateful_step_count=8,
        database=None,
        report_multiple_bugs=False,
        phases=(Phase.generate, Phase.shrink),
    )
    with pytest.raises((AscendTwinError, AssertionError)):
        run_state_machine_as_test(SchedulerMachine, settings=quick)
    (path,) = tmp_path.iterdir()
    scenario = Scenario.load(path)
    assert len(scenario.events) <= 12  # a few requests, and the drain
    with pytest.raises(AscendTwinError):
        drive(scenario, (CheckedEngine,), oracle=OutputOracle(scenario.config))
