"""Replaying traces: an equal scheduler passes, of another one the first difference is named."""

import copy
import functools
import json
import random
from collections.abc import Callable, Mapping
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ascend_twin.equivalence_tests import installed_vllm
from ascend_twin.equivalence_tests.lockstep_picture import SCENES, run_scene
from ascend_twin.equivalence_tests.lockstep_runs import GroupRun, choose_group_setup
from ascend_twin.equivalence_tests.replay import RECORDED, Replay
from ascend_twin.equivalence_tests.replay_traces import minimize_trace, replay_trace
from ascend_twin.equivalence_tests.scheduler_engines import OurEngine
from ascend_twin.equivalence_tests.scheduler_runs import EVENTS_PER_RUN, Run, choose_event
from ascend_twin.equivalence_tests.scheduler_scenarios import Abort, Add, Scenario, Step
from ascend_twin.equivalence_tests.scheduler_strategies import RandomChooser, choose_request, choose_setup
from ascend_twin.equivalence_tests.traced_collectives import merge_ranks
from ascend_twin.equivalence_tests.traced_collectives_plot import plot_collectives
from ascend_twin.equivalence_tests.traced_runs import policy_text, record_collectives, record_scenario
from ascend_twin.equivalence_tests.traced_scheduler import TraceConfig
from ascend_twin.fixtures.store import Fixture, read_fixture, write_fixture
from ascend_twin.reference.errors import FixtureError, InvalidArgumentError, UnavailableError
from ascend_twin.scheduler import SchedulerConfig, UpstreamScheduler
from ascend_twin.scheduler.admission import POLICIES, make_policy
from ascend_twin.scheduler.workload import RequestSpec

CASES = Path(str(resources.files("ascend_twin.fixtures") / "cases"))
RECORDED_BY_VLLM = sorted((CASES / "vllm").glob("*.jsonl"))
SCENARIOS = sorted((CASES / "scheduler").glob("*.json"))
CONFIG = SchedulerConfig(
    num_blocks=12, block_size=4, max_num_seqs=3, max_num_batched_tokens=16, max_model_len=36
)
REQUESTS = tuple(RequestSpec(f"c{i}", 0, ((i % 2, 9), (10 + i, 3)), max_tokens=12) for i in range(4))
SCENARIO = Scenario(CONFIG, (*map(Add, REQUESTS), Step(5), Abort((3,)), Step(60)))
NUM_RUNS = 8
FEATURES_IN_TURN = ((), ("drafts", "grammars"), ("remote",), ("async", "drafts", "grammars"))


@pytest.fixture(scope="module")
def trace() -> Fixture:
    """Of requests that share blocks, give way and end."""
    fixture = record_scenario(SCENARIO)
    assert any("preempted_req_ids" in r.get("output", {}) for r in fixture.records)
    assert any(r.get("stats", {}).get("hits") for r in fixture.records)
    return fixture


def changed(fixture: Fixture, index: int, change: Callable[[Any], object]) -> Fixture:
    """A trace, one of whose records is another one."""
    records = copy.deepcopy(list(fixture.records))
    change(records[index])
    return replace(fixture, records=tuple(records))


def first_of(fixture: Fixture, call: str, has: Callable[[Mapping[str, Any]], object] = bool) -> int:
    """The place of the first record of a call that has something."""
    return next(i for i, r in enumerate(fixture.records) if r.get("call") == call and has(r))


# Schedulers


@pytest.mark.parametrize("redact", [False, True], ids=["whole", "redacted"])
def test_traces_of_random_runs_replay(redact: bool) -> None:
    for seed in range(NUM_RUNS):
        chooser = RandomChooser(random.Random(seed))
        always = FEATURES_IN_TURN[seed % len(FEATURES_IN_TURN)]
        run = Run(choose_setup(chooser, always), (OurEngine,))
        run.driver.oracle = None  # known mistakes are part of the trace
        run.finish(functools.partial(_let_happen, chooser, run))
        if redact and "sessions" in run.setup.features:
            continue
        fixture = record_scenario(run.scenario, redact=redact)
        replay = replay_trace(fixture)
        assert replay.passed, f"seed {seed}: {replay.diagnosis}"
        assert len(fixture.records) == sum(replay.details["calls"].values())


def _let_happen(chooser: RandomChooser, run: Run) -> None:
    for _ in range(EVENTS_PER_RUN):
        choose_event(chooser, run)


@pytest.mark.parametrize("path", RECORDED_BY_VLLM, ids=lambda path: path.stem)
def test_recording_of_real_vllm_replays(path: Path) -> None:
    try:
        replay = replay_trace(read_fixture(path), path=path.name)
    except UnavailableError as error:
        pytest.skip(str(error))
    assert replay.passed, replay.diagnosis
    assert replay.subject in ("plain", f"vllm {installed_vllm.version()}", RECORDED)
    assert replay.findings


def test_recordings_of_both_versions_are_there() -> None:
    names = {path.stem for path in RECORDED_BY_VLLM}
    kinds = ("async", "balance", "balance_dp", "redacted")
    assert names == {f"{version}_{kind}" for version in installed_vllm.VERSIONS for kind in kinds}
    assert all(path.stat().st_size < 100_000 for path in RECORDED_BY_VLLM)


# (call, which record, the change, path, recorded, got): what is wrong in the recorded one is named
CORRUPTIONS: tuple[tuple[str, Callable[[Any], object], Callable[[Any], object], str], ...] = (
    (
        "schedule",
        lambda r: "r2" in r["output"].get("num_scheduled_tokens", {}),
        lambda r: r["output"]["num_scheduled_tokens"].update(r2=7),
        "output.num_scheduled_tokens.r2",
    ),
    (
        "schedule",
        lambda r: len(r["output"].get("num_scheduled_tokens", {})) > 1,
        lambda r: r["output"].update(
            num_scheduled_tokens=dict(reversed(r["output"]["num_scheduled_tokens"].items()))
        ),
        "output.num_scheduled_tokens (order)",
    ),
    (
        "schedule",
        lambda r: r["output"].get("preempted_req_ids"),
        lambda r: r["output"].pop("preempted_req_ids"),
        "output.preempted_req_ids",
    ),
    (
        "schedule",
        lambda r: any(r["output"].get("scheduled_cached_reqs", {}).get("new_block_ids", ())),
        lambda r: r["output"]["scheduled_cached_reqs"]["new_block_ids"].reverse(),
        "output.scheduled_cached_reqs.new_block_ids[0]",
    ),
    (
        "schedule",
        lambda r: r["step"] == 3,
        lambda r: r["state"].update(free_blocks=99),
        "state.free_blocks",
    ),
    (
        "update_from_output",
        lambda r: any(x and "finish_reason" in x for x in r["told"].values()),
        lambda r: next(x for x in r["told"].values() if "finish_reason" in x).update(finish_reason="stop"),
        "finish_reason",
    ),
    (
        "update_from_output",
        lambda r: r.get("stats", {}).get("hits"),
        lambda r: r["stats"].update(hits=1),
        "stats.hits",
    ),
)


@pytest.mark.parametrize("corruption", CORRUPTIONS, ids=lambda corruption: corruption[3])
def test_corrupted_decision_is_named(trace: Fixture, corruption: Any) -> None:
    call, has, change, path = corruption
    index = first_of(trace, call, has)
    replay = replay_trace(changed(trace, index, change), path="trace.jsonl")
    found = replay.first
    assert found is not None
    difference = replay.details["difference"]
    assert path in difference["path"]
    assert (difference["index"], difference["call"]) == (index, call)
    assert found.place == {"line": index + 2, "step": trace.records[index]["step"]}
    assert found.stage == ("schedule" if call == "schedule" else "output")
    assert difference["expected"] != difference["got"]
    assert replay.blame == "scheduler"
    for value in (difference["expected"], difference["got"]):
        assert (repr(value) if value is not None else "nothing")[:20] in found.message


def test_state_before_the_difference_is_shown(trace: Fixture) -> None:
    index = first_of(trace, "schedule", lambda r: r["output"].get("preempted_req_ids"))
    corrupted = changed(trace, index, lambda r: r["output"].pop("preempted_req_ids"))
    replay = replay_trace(corrupted)
    before = replay.details["difference"]["before"]
    previous = next(r["state"] for r in reversed(trace.records[:index]) if "state" in r)
    assert len(before["running"]) == previous["running"]
    assert len(before["waiting"]) == previous["waiting"]
    assert before["free_blocks"] == previous["free_blocks"]
    (victim,) = trace.records[index]["output"]["preempted_req_ids"]
    (shown,) = (x for x in before["running"] if x["request"] == victim)
    assert f"{victim} ({shown['num_computed_tokens']} of {shown['num_tokens']} tokens)" in replay.diagnosis
    assert "They make other requests give way." in replay.diagnosis


def test_scheduler_that_decides_otherwise_is_found(trace: Fixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(UpstreamScheduler, "_choose_victim", lambda self: self.running.pop(0))
    replay = replay_trace(trace)
    assert not replay.passed
    index = first_of(trace, "schedule", lambda r: r["output"].get("preempted_req_ids"))
    assert replay.details["difference"]["index"] == index


def test_scheduler_that_raises_is_a_difference(trace: Fixture, monkeypatch: pytest.MonkeyPatch) -> None:
    def reset(self: Any) -> Any:
        raise RuntimeError("no victim")

    monkeypatch.setattr(UpstreamScheduler, "_choose_victim", reset)
    difference = replay_trace(trace).details["difference"]
    assert (difference["path"], difference["expected"]) == ("error", None)
    assert difference["got"] == "RuntimeError: no victim"


def test_recorded_error_that_does_not_come_is_a_difference(trace: Fixture) -> None:
    index = first_of(trace, "schedule")
    replay = replay_trace(changed(trace, index, lambda r: r.update(error="AssertionError: recorded")))
    assert replay.details["difference"]["expected"] == "AssertionError: recorded"
    assert replay.details["difference"]["got"] is None


def test_trace_that_was_cut_off_replays_up_to_there(trace: Fixture) -> None:
    end = {"call": "end", "time": 1.0, "reason": "the folder is full"}
    replay = replay_trace(replace(trace, records=(*trace.records[:20], end)))
    assert replay.passed
    assert sum(replay.details["calls"].values()) == 20
    assert replay.details["end"] == "the folder is full"


# What cannot be replayed

MALFORMED: tuple[tuple[Callable[[Any], object], str], ...] = (
    (lambda r: r[0].pop("prompt_token_ids"), "trace.jsonl:2: add_request: KeyError: 'prompt_token_ids'"),
    (lambda r: r[0].update(prompt_token_ids=3), "trace.jsonl:2: add_request: TypeError"),
    (lambda r: r[0].update(max_tokens="many"), "trace.jsonl:2: add_request: max_tokens is 'many'"),
    (lambda r: r[0].update(special=["pooling"]), "asks for pooling, which no trace can replay"),
    (lambda r: r[0].update(call="explode"), "call is 'explode'; allowed here: add_request"),
    (lambda r: r[0].update(call=["schedule"]), "trace.jsonl:2: call is"),
    (lambda r: r[0].update(call="observe"), "trace.jsonl:2: call is 'observe'"),
    (lambda r: r[5].update(step=77), "trace.jsonl:7: update_from_output: KeyError: 77"),
    (lambda r: r[5].update(sampled={"r9": [1]}), "trace.jsonl:7: update_from_output: KeyError: 'r9'"),
    (lambda r: r[5].update(time="late"), "trace.jsonl:7: update_from_output: ValueError"),
)


@pytest.mark.parametrize(("change", "message"), MALFORMED, ids=lambda x: x if isinstance(x, str) else "")
def test_malformed_record_is_refused_with_its_line(
    trace: Fixture, change: Callable[[Any], object], message: str
) -> None:
    records = copy.deepcopy(list(trace.records))
    change(records)
    with pytest.raises(FixtureError) as caught:
        replay_trace(replace(trace, records=tuple(records)), path="trace.jsonl")
    assert message in str(caught.value)


_SHORT_STEPS = {
    "num_blocks": 64,
    "block_size": 128,
    "max_num_batched_tokens": 96,
    "max_model_len": 256,
    "kv_groups": ["mamba", "full_attention"],
    "mamba_cache_mode": "align",
}


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("scheduler", None, "scheduler is None; allowed: a JSON object"),
        ("scheduler", {"num_blocks": 10**9}, "scheduler.num_blocks is 1000000000; allowed: an int from 0 to"),
        ("scheduler", {"num_blocks": 12, "kv_groups": ["SlidingWindowSpec"]}, "scheduler.kv_groups is"),
        ("scheduler", _SHORT_STEPS, "scheduler.max_num_batched_tokens is 96; allowed: >= 128 = block_size"),
        ("asynchronous", 1, "asynchronous is 1; allowed: True or False"),
        ("implementation", "sglang", "implementation is 'sglang'; allowed: plain, or vllm with its version"),
        ("options", {"x": []}, "options is {'x': []}"),
        ("balance", {"policy": "whim", "dp_rank": 0, "dp_size": 2}, "policy is 'whim'"),
        ("balance", {"policy": "open_gate", "dp_rank": 2, "dp_size": 2}, "balance.dp_rank is 2"),
    ],
)
def test_config_that_fits_no_scheduler_is_refused(
    trace: Fixture, field: str, value: Any, message: str
) -> None:
    with pytest.raises(FixtureError) as caught:
        replay_trace(replace(trace, config={**trace.config, field: value}), path="trace.jsonl")
    assert str(caught.value).startswith("trace.jsonl: config: ")
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("config", "implementation", "message"),
    [
        ({"version": "0.32.0"}, "plain", r"tox environment vllm032"),
        ({"version": "0.32.0"}, "plain", r"the plain scheduler does what vLLM 0\.17\.0 does"),
        (
            {"version": "0.25.1"},
            None,
            r"recorded with vLLM 0\.25\.1, and traces of 0\.17\.0 and 0\.32\.0 can",
        ),
        (
            {"options": {"parallel_config.pipeline_parallel_size": 2}},
            None,
            r"pipeline_parallel_size above 1",
        ),
    ],
)
def test_trace_of_another_scheduler_is_refused_with_what_would_do(
    trace: Fixture, config: Mapping[str, Any], implementation: str | None, message: str
) -> None:
    other = replace(trace, config={**trace.config, "implementation": "vllm", **config})
    with pytest.raises(UnavailableError, match=message):
        replay_trace(other, implementation=implementation)


def test_config_of_a_later_vllm_may_have_steps_shorter_than_a_block(trace: Fixture) -> None:
    given = {**trace.config, "scheduler": _SHORT_STEPS, "implementation": "vllm", "version": "0.32.0"}
    assert TraceConfig.read(given, "trace.jsonl").scenario.config.max_num_batched_tokens == 96


def test_unknown_implementation_is_refused(trace: Fixture) -> None:
    with pytest.raises(InvalidArgumentError, match="implementation is eager; allowed: plain or vllm"):
        replay_trace(trace, implementation="eager")


@settings(max_examples=60)
@given(st.data())
def test_fuzzed_trace_is_replayed_or_refused(data: st.DataObject) -> None:
    fixture = _recorded_once()
    records = copy.deepcopy(list(fixture.records[:14]))
    config = copy.deepcopy(dict(fixture.config))
    for _ in range(data.draw(st.integers(1, 3))):
        _spoil(data, config if data.draw(st.booleans()) else records)
    try:
        replay = replay_trace(replace(fixture, config=config, records=_only_objects(records)))
    except (FixtureError, UnavailableError):
        return
    assert isinstance(replay, Replay)
    assert replay.passed == (not replay.diagnosis)


@functools.cache
def _recorded_once() -> Fixture:
    return record_scenario(SCENARIO)


JUNK = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 2**70),
    st.floats(allow_nan=False, allow_infinity=False),
    st.text("r01:é", max_size=3),
    st.just([]),
    st.just({}),
    st.just([[1], "r0"]),
    st.just({"r0": [1]}),
)


def _spoil(data: st.DataObject, value: Any) -> None:
    """Change one thing, somewhere in JSON values."""
    while True:
        keys = list(value) if isinstance(value, dict) else list(range(len(value)))
        if not keys:
            return
        key = data.draw(st.sampled_from(keys))
        if isinstance(value[key], dict | list) and value[key] and data.draw(st.integers(0, 4)):
            value = value[key]
        else:
            break
    if isinstance(value, dict) and data.draw(st.booleans()):
        del value[key]
    else:
        value[key] = copy.deepcopy(data.draw(JUNK))


def _only_objects(records: list[Any]) -> tuple[Any, ...]:
    """What `read_fixture` lets pass."""
    return tuple(record for record in records if isinstance(record, dict))


# Scenarios of version 0


@pytest.mark.parametrize("path", SCENARIOS[::8], ids=lambda path: path.stem)
def test_scenario_of_version_0_replays(path: Path) -> None:
    replay = replay_trace(read_fixture(path), path=str(path))
    assert replay.passed
    assert replay.first is None
    assert "steps" in replay.findings[0].message


def test_scenario_that_fails_is_blamed_on_the_scheduler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(UpstreamScheduler, "get_num_unfinished_requests", lambda self: 0)
    replay = replay_trace(Fixture("scheduler", {"scenario": SCENARIO.to_json()}))
    assert not replay.passed
    assert replay.blame == "scheduler"
    assert replay.diagnosis


def test_scenario_that_is_none_is_refused() -> None:
    with pytest.raises(FixtureError, match=r"case.json: .*config is missing"):
        replay_trace(Fixture("scheduler", {"scenario": {"events": []}}), path="case.json")
    for name, value in (("num_blocks", 10**9), ("block_size", 10**9)):
        too_large = {"config": {"num_blocks": 600, name: value}, "events": [{"event": "Step"}]}
        with pytest.raises(FixtureError, match=rf"case\.json: scheduler\.{name} is 1000000000"):
            replay_trace(Fixture("scheduler", {"scenario": too_large}), path="case.json")


# Smaller ones


def test_minimized_trace_ends_with_the_difference(trace: Fixture, tmp_path: Path) -> None:
    index = first_of(trace, "schedule", lambda r: r["step"] == 3)
    corrupted = changed(trace, index, lambda r: r["state"].update(free_blocks=99))
    smaller = minimize_trace(corrupted)
    assert len(smaller.records) == index + 1
    write_fixture(tmp_path / "smaller.jsonl", smaller)
    one, other = (replay_trace(x) for x in (corrupted, read_fixture(tmp_path / "smaller.jsonl")))
    assert one.details["difference"] == other.details["difference"]


def test_trace_that_passes_is_not_minimized(trace: Fixture) -> None:
    with pytest.raises(InvalidArgumentError, match="whose replay does not pass"):
        minimize_trace(trace)


def test_minimized_scenario_loses_what_it_can_do_without(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(UpstreamScheduler, "get_num_unfinished_requests", lambda self: 0)
    smaller = minimize_trace(Fixture("scheduler", {"scenario": SCENARIO.to_json()}), seconds=2)
    assert len(smaller.config["scenario"]["events"]) < len(SCENARIO.events)
    assert not replay_trace(smaller).passed


# Collectives


@pytest.fixture(scope="module")
def group() -> Fixture:
    """Of three ranks with balance scheduling, whose gates were shut at times."""
    chooser = RandomChooser(random.Random(1))
    setup = choose_group_setup(chooser)
    run = GroupRun(setup, "any_rank_at_cap", 3, finish_check_interval=4)
    for i in range(24):
        run.add(i % 2, choose_request(chooser, setup.config, setup.features, f"r{i}"))
        run.group.step()
    run.drain()
    return record_collectives(
        run.group.transport.logs,
        policy="any_rank_at_cap",
        max_num_seqs=setup.config.max_num_seqs,
        finish_check_interval=4,
    )


def recorded_by_vllm() -> Fixture:
    """With what came back, as a running engine records it."""
    return read_fixture(CASES / "vllm" / "0.17.0_balance_dp.jsonl")


def test_collectives_of_ranks_in_lockstep_are_right(group: Fixture) -> None:
    replay = replay_trace(group)
    assert replay.passed
    assert replay.details["ranks"] == [0, 1, 2]
    assert "of 3 ranks are right" in replay.findings[0].message


@pytest.mark.parametrize("place", [place for place in SCENES if place != "right"])
def test_gather_in_a_wrong_place_is_named(place: str) -> None:
    logs = run_scene(place, SCENES[place]).transport.logs
    fixture = record_collectives(logs, policy="any_rank_at_cap", max_num_seqs=2, finish_check_interval=2)
    replay = replay_trace(fixture)
    assert replay.blame == "collective"
    assert replay.first is not None
    assert replay.first.name == "order"
    assert "gather" in replay.diagnosis


def _of(fixture: Fixture, event: str, name: str, number: int = 5, rank: int = 1) -> int:
    found = [
        i
        for i, r in enumerate(fixture.records)
        if (r["event"], r["collective"], r["rank"]) == (event, name, rank)
    ]
    return found[number]


def _flip(record: dict[str, Any]) -> None:
    """The gate is the other way."""
    record["is_open"] = not record["is_open"]


WRONG_COLLECTIVES: tuple[tuple[str, str, Callable[[Any], object], str, str], ...] = (
    (
        "entered",
        "gather",
        lambda r: r["value"].__setitem__(1, 99),
        "value",
        "runs 99 requests, and at most 4",
    ),
    ("entered", "gather", lambda r: r["value"].__setitem__(0, 2), "value", "is at gather 2, and this is"),
    ("entered", "gather", lambda r: r["value"].pop(), "value", "6 counts >= 0 it must be"),
    ("left", "gather", lambda r: r["result"][0].__setitem__(2, 55), "result", "of rank 0, which contrib"),
    ("left", "gather", _flip, "decision", "its gate, and AnyRankAtCap"),
    ("left", "gather", lambda r: r["result"].pop(), "result", "2 rows of 6 counts it must be"),
    ("entered", "forward", lambda r: r.update(collective="gather"), "order", "and rank 0 in forward of step"),
)


@pytest.mark.parametrize(("event", "name", "change", "mistake", "message"), WRONG_COLLECTIVES)
def test_first_wrong_collective_is_named(
    event: str, name: str, change: Callable[[Any], object], mistake: str, message: str
) -> None:
    fixture = recorded_by_vllm()
    index = _of(fixture, event, name)
    replay = replay_trace(changed(fixture, index, change))
    found = replay.first
    assert found is not None
    assert (found.name, found.stage) == (mistake, "collective")
    assert message in found.message
    assert found.place["step"] == fixture.records[index]["step"]
    assert replay.diagnosis.startswith(f"Collective {found.place['collective']} is the first that is wrong")


def test_wrong_answer_of_a_reduction_is_named() -> None:
    fixture = recorded_by_vllm()
    index = _of(fixture, "left", "has_unfinished", number=0)
    replay = replay_trace(changed(fixture, index, lambda r: r.update(result=not r["result"])))
    assert replay.first is not None
    assert replay.first.name == "result"
    assert "is told" in replay.first.message


def test_rank_that_never_comes_is_named(group: Fixture) -> None:
    records = list(group.records)
    cut = _of(group, "entered", "gather", number=3, rank=2)
    rest = [r for i, r in enumerate(records) if r["rank"] != 2 or i < cut]
    replay = replay_trace(replace(group, records=tuple(rest)))
    assert replay.first is not None
    assert replay.first.name == "missing"
    assert "waits in gather of step 3 for rank 2 (last in has_unfinished of step 3" in replay.first.message


def test_one_rank_alone_is_checked_by_what_it_received() -> None:
    fixture = recorded_by_vllm()
    alone = replace(fixture, records=tuple(r for r in fixture.records if r["rank"] == 0))
    replay = replay_trace(alone)
    assert replay.passed
    assert "1 of 2 are not in the file" in replay.findings[0].message
    index = _of(alone, "left", "gather", rank=0)
    wrong = changed(alone, index, _flip)
    assert not replay_trace(wrong).passed


def test_files_of_ranks_merge_in_order_of_time() -> None:
    fixture = recorded_by_vllm()
    parts = []
    for rank, started in ((0, 500.0), (1, 200.0)):
        own = tuple(r for r in fixture.records if r["rank"] == rank)
        parts.append(replace(fixture, config={**fixture.config, "started_ms": started}, records=own))
    merged = merge_ranks(parts)
    assert merged.config["started_ms"] == 200.0
    times = [r["time_ms"] for r in merged.records]
    assert times == sorted(times)
    assert min(r["time_ms"] for r in merged.records if r["rank"] == 0) >= 300.0
    assert replay_trace(merged).passed
    with pytest.raises(InvalidArgumentError, match="rank is \\['0'\\]"):
        merge_ranks([parts[0], parts[0]])


def test_minimized_collectives_end_with_the_wrong_one() -> None:
    fixture = recorded_by_vllm()
    index = _of(fixture, "left", "gather")
    wrong = changed(fixture, index, _flip)
    smaller = minimize_trace(wrong)
    assert len(smaller.records) < len(wrong.records) / 2
    assert replay_trace(smaller).details["mistake"] == replay_trace(wrong).details["mistake"]


@settings(max_examples=60)
@given(st.data())
def test_fuzzed_collectives_are_replayed_or_refused(data: st.DataObject) -> None:
    fixture = recorded_by_vllm()
    records, config = copy.deepcopy(list(fixture.records[:24])), copy.deepcopy(dict(fixture.config))
    for _ in range(data.draw(st.integers(1, 3))):
        _spoil(data, config if data.draw(st.integers(0, 3)) == 0 else records)
    spoilt = replace(fixture, config=config, records=_only_objects(records))
    try:
        replay = replay_trace(spoilt)
    except FixtureError:
        return
    assert replay.passed == (not replay.diagnosis)


def test_collectives_have_no_implementation(group: Fixture) -> None:
    with pytest.raises(InvalidArgumentError, match="implementation is plain; allowed: none"):
        replay_trace(group, implementation="plain")


@pytest.mark.parametrize("is_wrong", [False, True])
def test_timeline_shows_ranks_and_the_first_mistake(is_wrong: bool, tmp_path: Path) -> None:
    fixture = recorded_by_vllm()
    if is_wrong:
        index = _of(fixture, "left", "gather")
        fixture = changed(fixture, index, _flip)
    figure = plot_collectives(fixture)
    (ax,) = figure.axes
    assert [label.get_text() for label in ax.get_yticklabels()] == ["rank 0", "rank 1"]
    assert ("its gate" in ax.get_title()) == is_wrong
    for suffix in ("png", "svg"):
        figure.savefig(tmp_path / f"timeline.{suffix}")
        assert (tmp_path / f"timeline.{suffix}").stat().st_size > 5_000


def test_timeline_of_nothing_is_drawn() -> None:
    assert plot_collectives(Fixture("dp", {"dp_size": 2})).axes


@pytest.mark.parametrize(
    "text", ["open_gate", "any_rank_at_cap", "cadence:interval=3", "patient:patience=2,most_steps=9"]
)
def test_text_of_a_policy_makes_it_again(text: str) -> None:
    policy = make_policy(text, 4)
    assert make_policy(policy_text(policy), 4) == policy
    assert set(POLICIES) >= {text.split(":")[0]}


def test_replay_is_json(trace: Fixture) -> None:
    index = first_of(trace, "schedule")
    details = replay_trace(changed(trace, index, lambda r: r.update(state=None))).details
    assert json.loads(json.dumps(details)) == json.loads(json.dumps(dict(details)))
