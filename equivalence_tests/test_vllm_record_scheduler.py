# pyright: reportMissingImports=false
"""Real engines of vLLM, recorded as the plugin does: the traces replay, and what is wrong in them is named.

Needs vLLM 0.17.0 or 0.32.0 (`tox run -e vllm017`, `tox run -e vllm032`). Else test_record_traces.py runs.
"""

import copy
import random
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ascend_twin.equivalence_tests import installed_vllm, vllm_balance, vllm_traces
from ascend_twin.equivalence_tests.replay_traces import replay_trace
from ascend_twin.equivalence_tests.scheduler_engines import OurEngine
from ascend_twin.equivalence_tests.scheduler_runs import EVENTS_PER_RUN, Run, choose_event
from ascend_twin.equivalence_tests.scheduler_strategies import RandomChooser, choose_setup
from ascend_twin.equivalence_tests.traced_collectives import merge_ranks
from ascend_twin.equivalence_tests.traced_runs import record_scenario
from ascend_twin.equivalence_tests.vllm_traces import POLICY, Life, record_engines
from ascend_twin.fixtures.record import Recorder, RecordSettings
from ascend_twin.fixtures.store import Fixture, read_fixture
from ascend_twin.reference.errors import LockstepError

pytestmark = pytest.mark.vllm

LIVES = {
    "sync": Life("", redact=True),
    "async": Life("", is_async=True),
    "balance": Life("", policy=POLICY, redact=True),
    "async balance": Life("", policy=POLICY, is_async=True),
}
NUM_RUNS = 4


def implementations() -> tuple[str, ...]:
    """Who does what the installed vLLM does."""
    return ("vllm", "plain") if installed_vllm.version() == "0.17.0" else ("vllm",)


@pytest.mark.parametrize("life", LIVES.values(), ids=LIVES)
def test_recorded_engines_replay(tmp_path: Path, life: Life) -> None:
    schedulers, collectives = record_engines(tmp_path, life)
    assert len(schedulers) == 2
    assert [fixture.origin["rank"] for fixture in schedulers] == ["dp0.rank0", "dp1.rank1"]
    for fixture in schedulers:
        assert fixture.config["version"] == installed_vllm.version()
        assert fixture.config["asynchronous"] == life.is_async
        assert (fixture.config["balance"] is not None) == (life.policy is not None)
        for implementation in implementations():
            replay = replay_trace(fixture, implementation=implementation)
            assert replay.passed, replay.diagnosis
            assert replay.details["calls"]["schedule"] > 10
            assert ("observe" in replay.details["calls"]) == (life.policy is not None)
    replay = replay_trace(collectives)
    assert replay.passed, replay.diagnosis
    lengths = set(replay.details["collectives"].values())
    assert len(lengths) == 1
    assert min(lengths) > 60


@pytest.mark.parametrize("is_async", [False, True], ids=["sync", "async"])
def test_wrong_decision_in_a_recording_is_named(tmp_path: Path, is_async: bool) -> None:
    schedulers, _ = record_engines(tmp_path, Life("", is_async=is_async))
    fixture = max(schedulers, key=lambda x: len(x.records))
    records = copy.deepcopy(list(fixture.records))
    index, record = next(
        (i, r) for i, r in enumerate(records) if len(r.get("output", {}).get("num_scheduled_tokens", ())) > 1
    )
    scheduled = record["output"]["num_scheduled_tokens"]
    name, right = next(iter(scheduled.items()))
    scheduled[name] = right + 1
    for implementation in implementations():
        replay = replay_trace(replace(fixture, records=tuple(records)), implementation=implementation)
        difference = replay.details["difference"]
        assert replay.blame == "scheduler"
        assert (difference["index"], difference["step"]) == (index, record["step"])
        assert difference["path"] == f"output.num_scheduled_tokens.{name}"
        assert (difference["expected"], difference["got"]) == (right + 1, right)
        assert f"is {right + 1} in the trace and {right} with" in replay.diagnosis


@pytest.mark.parametrize("redact", [False, True], ids=["whole", "redacted"])
def test_random_lives_of_real_scheduler_replay(redact: bool) -> None:
    from ascend_twin.optimized.vllm.record_scheduler import trace_config

    real = vllm_balance.real_engine()
    num_records = 0
    for seed in range(NUM_RUNS):
        chooser = RandomChooser(random.Random(f"real {seed} {redact}"))
        run = Run(choose_setup(chooser), (OurEngine,))
        run.driver.oracle = None  # known mistakes are part of the trace
        run.finish(partial(_let_happen, chooser, run))
        if redact and "sessions" in run.setup.features:
            continue
        fixture = record_scenario(run.scenario, engine=real, redact=redact, config=trace_config)
        num_records += len(fixture.records)
        for implementation in implementations():
            replay = replay_trace(fixture, implementation=implementation)
            assert replay.passed, f"seed {seed}: {replay.diagnosis}"
    assert num_records > 300


def _let_happen(chooser: RandomChooser, run: Run) -> None:
    for _ in range(EVENTS_PER_RUN):
        choose_event(chooser, run)


@pytest.mark.parametrize("num_gathers", [0, 2])
def test_gather_that_one_rank_makes_otherwise_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_gathers: int
) -> None:
    """The engines come to a stop; what each had recorded by then says where."""
    from ascend_twin.optimized.vllm import engine_hook

    installed_vllm.prepare_import()
    original = engine_hook.gather

    def gather(engine: Any) -> None:
        is_wrong = engine.dp_rank == 1 and engine.step_counter == 5
        for _ in range(num_gathers if is_wrong else 1):
            original(engine)

    monkeypatch.setattr(engine_hook, "gather", gather)
    with pytest.raises(LockstepError):
        record_engines(tmp_path, Life("", policy=POLICY))
    found = [read_fixture(path) for path in sorted((tmp_path / "recorded").glob("*collectives*"))]
    replay = replay_trace(merge_ranks(found))
    assert replay.blame == "collective"
    assert replay.first is not None
    assert replay.first.place["step"] in (4, 5)
    assert "gather" in replay.diagnosis


@pytest.mark.parametrize(
    ("sizes", "rank"), [((1, 0, 4), "rank0"), ((2, 0, 1), "dp0.rank0"), ((2, 1, 4), "dp1.rank4")]
)
def test_trace_has_the_rank_of_the_first_worker(sizes: tuple[int, int, int], rank: str) -> None:
    from ascend_twin.optimized.vllm.record_scheduler import engine_rank

    names = ("data_parallel_size", "data_parallel_rank", "world_size")
    assert engine_rank(SimpleNamespace(**dict(zip(names, sizes, strict=True)))) == rank


def test_nothing_is_wrapped_unless_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    from ascend_twin.optimized.vllm import record_scheduler

    wrapped: list[Any] = []
    monkeypatch.setattr(record_scheduler, "_wrap", lambda kind, name, **when: wrapped.append(name))
    monkeypatch.setattr(record_scheduler, "_record_reduction", lambda kind, name: wrapped.append(name))
    monkeypatch.delenv("ASCEND_TWIN_RECORD", raising=False)
    record_scheduler.install()
    assert wrapped == []
    monkeypatch.setenv("ASCEND_TWIN_RECORD", "somewhere")
    record_scheduler.install()
    assert len(wrapped) == 3


@pytest.mark.parametrize(
    ("settings", "check"),
    [
        ({"kinds": ("dp",)}, lambda found: {fixture.kind for fixture in found} == {"dp"}),
        ({"steps": (0, 9)}, lambda found: max(r.get("step", 0) for x in found for r in x.records) == 9),
        ({"redact": True}, lambda found: not any(r.get("id") for x in found for r in x.records)),
    ],
    ids=["kinds", "steps", "redact"],
)
def test_settings_limit_what_is_recorded(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    settings: dict[str, Any],
    check: Callable[[list[Fixture]], bool],
) -> None:
    made = partial(RecordSettings, **{"kinds": ("scheduler", "dp"), "redact": False, **settings})
    monkeypatch.setattr(vllm_traces, "Recorder", lambda given: Recorder(made(folder=given.folder)))
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(vllm_traces, "merge_ranks", lambda fixtures: fixtures)
        record_engines(tmp_path, Life(""))
    found = [read_fixture(path) for path in sorted((tmp_path / "recorded").iterdir())]
    assert found
    assert check(found)
