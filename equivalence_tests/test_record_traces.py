"""Recorders of schedulers and collectives: what they write and leave out, and that nobody notices them."""

import json
import os
import random
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ascend_twin.equivalence_tests.replay_traces import replay_trace
from ascend_twin.equivalence_tests.scheduler_driver import Driver, drive
from ascend_twin.equivalence_tests.scheduler_engines import Engine, OurEngine
from ascend_twin.equivalence_tests.scheduler_scenarios import Abort, Add, Scenario, Step
from ascend_twin.equivalence_tests.traced_runs import Recording, plain_config, record_scenario
from ascend_twin.fixtures.record import Recorder, RecordSettings
from ascend_twin.fixtures.record_traces import CALLS, CollectiveRecorder, SchedulerRecorder, TraceFile
from ascend_twin.fixtures.redaction import ANY, EOS, Redaction, stop_token
from ascend_twin.fixtures.store import Fixture, read_fixture, write_fixture
from ascend_twin.reference.errors import SchedulerStateError
from ascend_twin.scheduler import SchedulerConfig, UpstreamScheduler
from ascend_twin.scheduler.output import ModelRunnerOutput
from ascend_twin.scheduler.request import Request, SamplingParams
from ascend_twin.scheduler.workload import EOS_TOKEN_ID, ImageSpec, RequestSpec, prompt_token_ids

CONFIG = SchedulerConfig(
    num_blocks=12, block_size=4, max_num_seqs=4, max_num_batched_tokens=16, max_model_len=32
)
REQUESTS = tuple(RequestSpec(f"client-{i}", 0, ((i % 2, 9), (10 + i, 3)), max_tokens=9) for i in range(4))
SCENARIO = Scenario(CONFIG, (*map(Add, REQUESTS), Step(6), Abort((1,)), Step(40)))
NUM_KILLS = 12


def new_request(request_id: str, token_ids: Sequence[int], **params: Any) -> Request:
    return Request(request_id, token_ids, SamplingParams(**{"max_tokens": 4, **params}))


# What is written


def test_recorder_writes_what_a_file_gives_back(tmp_path: Path) -> None:
    fixture = record_scenario(SCENARIO)
    write_fixture(tmp_path / "trace.jsonl", fixture)
    assert read_fixture(tmp_path / "trace.jsonl") == fixture
    calls = [record["call"] for record in fixture.records]
    assert calls.count("add_request") == 4
    assert calls.count("finish_requests") == 1
    assert calls.count("schedule") == calls.count("update_from_output") > 10


@pytest.mark.parametrize("redact", [False, True])
def test_recorder_is_not_noticed_by_scheduler(redact: bool) -> None:
    made: list[Engine] = []

    def recorded(*args: Any, **options: Any) -> Engine:
        made.append(OurEngine(*args, **options))
        Recording(made[0].scheduler, redact=redact)
        return made[0]

    driver: Driver = drive(SCENARIO, (recorded, OurEngine))  # compares every output and the whole state
    assert driver.num_steps > 10
    assert made


def test_recorder_gives_methods_back_when_nobody_wants_more() -> None:
    scheduler, records = UpstreamScheduler(CONFIG), []

    def write(given: Sequence[Any]) -> bool:
        records.extend(given)
        return len(records) < 2

    recorder = SchedulerRecorder(scheduler, write)
    for name in "abc":
        scheduler.add_request(new_request(name, [1, 2, 3]))
    assert [record["id"] for record in records] == ["a", "b"]
    assert recorder.is_over
    assert not set(CALLS) & vars(scheduler).keys()


def test_recorder_says_why_it_ends_and_scheduler_goes_on() -> None:
    scheduler, records = UpstreamScheduler(CONFIG), []
    SchedulerRecorder(scheduler, lambda given: records.extend(given) or True)
    request = new_request("a", [1, 2, 3])
    del vars(request)["client_index"]
    scheduler.add_request(request)
    assert records[-1]["call"] == "end"
    assert "add_request cannot be recorded: AttributeError" in records[-1]["reason"]
    assert "a" in scheduler.requests
    assert scheduler.schedule().num_scheduled_tokens == {"a": 3}
    assert len(records) == 1


@pytest.mark.parametrize("redact", [False, True])
def test_recorder_keeps_what_went_into_a_call_that_raised(redact: bool) -> None:
    scheduler = UpstreamScheduler(CONFIG)
    recording = Recording(scheduler, redact=redact)
    with pytest.raises(SchedulerStateError):
        scheduler.reset_prefix_cache(*_with_held_blocks(scheduler))
    last = recording.records[-1]
    assert last["error"].startswith("SchedulerStateError: blocks are held")
    assert last["reset_running_requests"] is True
    assert replay_trace(recording.fixture()).passed


def _with_held_blocks(scheduler: UpstreamScheduler) -> tuple[bool]:
    """A scheduler whose reset must raise: a session holds blocks while it waits for input."""
    session = Request("s", [1, 2, 3, 4, 5], SamplingParams(max_tokens=1), resumable=True)
    scheduler.add_request(session)
    output = scheduler.schedule()
    scheduler.update_from_output(output, ModelRunnerOutput(["s"], [[7]]))
    return (True,)


def test_recorder_notes_calls_from_outside_alone() -> None:
    scheduler = UpstreamScheduler(CONFIG)
    recording = Recording(scheduler)
    _with_held_blocks(scheduler)
    scheduler.add_request(
        Request("s", [1], SamplingParams(max_tokens=1))
    )  # ends it: it calls finish_requests()
    assert "s" in scheduler.finished_req_ids
    assert "finish_requests" not in [record["call"] for record in recording.records]
    assert replay_trace(recording.fixture()).passed


def test_recorder_names_requests_by_when_they_came() -> None:
    names = [r["request"] for r in record_scenario(SCENARIO).records if r["call"] == "add_request"]
    assert names == ["r0", "r1", "r2", "r3"]


# Redaction


@given(
    st.lists(st.lists(st.integers(0, 1), max_size=13), min_size=2, max_size=5),
    st.integers(1, 4),
    st.integers(0, 4),
)
def test_redaction_keeps_lengths_and_which_blocks_are_alike(
    sequences: list[list[int]], block_size: int, num_said: int
) -> None:
    redaction = Redaction(block_size, key=b"k")
    renamed = []
    for i, sequence in enumerate(sequences):
        cut = max(0, len(sequence) - num_said)  # the rest is said by the request itself
        prompt = redaction.prompt(f"r{i}", sequence[:cut], ())
        renamed.append(prompt + redaction.output(f"r{i}", sequence[cut:], ended=False))
    assert [len(x) for x in renamed] == [len(x) for x in sequences]
    for one, one_renamed in zip(sequences, renamed, strict=True):
        for other, other_renamed in zip(sequences, renamed, strict=True):
            for end in range(block_size, min(len(one), len(other)) + 1, block_size):
                alike = one[:end] == other[:end]
                assert (one_renamed[end - 1] == other_renamed[end - 1]) == alike
                assert (one_renamed[:end] == other_renamed[:end]) == alike
    assert {x for sequence in renamed for i, x in enumerate(sequence) if (i + 1) % block_size} <= {ANY}


def test_redaction_names_depend_on_a_key_that_nobody_has() -> None:
    names = {Redaction(4).prompt("r", [1, 2, 3, 4], ())[-1] for _ in range(4)}
    assert len(names) == 4
    assert all(name % 2 == 1 and name > EOS for name in names)


def test_redaction_keeps_what_ends_a_request() -> None:
    redaction = Redaction(2)
    redaction.prompt("r", [5, 6, 7], [8, 9])
    assert redaction.output("r", [9], ended=False)[0] not in (ANY, EOS, stop_token(1))
    assert redaction.output("r", [4, 9], ended=True) == [ANY, stop_token(1)]
    redaction.prompt("q", [5, 6, 7], [8, 9])
    assert redaction.output("q", [3], ended=True) == [EOS]


def test_redaction_gives_further_input_of_a_session_names_of_its_own() -> None:
    redaction = Redaction(2)
    redaction.prompt("s", [5, 6], ())
    first, second = redaction.prompt("s", [5, 6], ()), redaction.prompt("s", [5, 6], ())
    assert len({*first, *second}) == 4
    assert ANY not in {*first, *second}


def test_redacted_trace_holds_no_token_and_no_text() -> None:
    image = ImageSpec("picture-of-a-cat", 0, 4)
    spec = RequestSpec(
        "client-of-someone",
        0,
        ((3, 11),),
        max_tokens=20,
        stop_token_ids=(41, 43, 47),
        eos=True,
        images=(image,),
        cache_salt="salt-of-a-tenant",
    )
    config = SchedulerConfig(
        num_blocks=12, block_size=4, max_model_len=40, max_num_encoder_input_tokens=8, encoder_cache_size=8
    )
    scenario = Scenario(config, (Add(spec), Step(30)))
    plain, redacted = record_scenario(scenario), record_scenario(scenario, redact=True)
    text = json.dumps(redacted.records)
    assert not [word for word in ("cat", "someone", "tenant") if word in text]
    (added,) = (r for r in redacted.records if r["call"] == "add_request")
    (known,) = (r for r in plain.records if r["call"] == "add_request")
    assert known["prompt_token_ids"] == prompt_token_ids(spec)
    assert [x for i, x in enumerate(added["prompt_token_ids"]) if i % 4 != 3] == [ANY] * 9
    assert (added["eos_token_id"], added["stop_token_ids"]) == (EOS, [stop_token(i) for i in range(3)])
    said = [x for r in redacted.records for x in r.get("sampled", {}).get("r0", ())]
    assert len(said) == len([x for r in plain.records for x in r.get("sampled", {}).get("r0", ())])
    assert {x for x in said if x < 100} <= {ANY, EOS, *added["stop_token_ids"]}
    assert known["eos_token_id"] == EOS_TOKEN_ID
    assert replay_trace(redacted).passed


# Files


def _trace_file(folder: Path, name: str = "scheduler", **settings: Any) -> tuple[Recorder, TraceFile]:
    recorder = Recorder(RecordSettings(folder=folder, **settings))
    config = plain_config(UpstreamScheduler(CONFIG))
    return recorder, TraceFile(recorder, name, "rank0", lambda: Fixture("scheduler", config))


def test_trace_file_holds_all_records_in_order(tmp_path: Path) -> None:
    recorder, file = _trace_file(tmp_path)
    records = [{"call": "x", "number": i} for i in range(200)]
    assert all(file.write([record]) for record in records)
    recorder.flush()
    (path,) = tmp_path.iterdir()
    assert list(read_fixture(path).records) == records
    assert path.name.endswith("-rank0-00000000-scheduler.jsonl")
    assert recorder.counts["recorded"] == 1


def test_trace_file_ends_where_the_folder_is_full(tmp_path: Path) -> None:
    recorder, file = _trace_file(tmp_path, max_bytes=6_000)
    number = 0
    while file.write([{"call": "x", "number": number, "text": "y" * 100}]):
        recorder.flush()
        number += 1
        assert number < 1_000
    (path,) = tmp_path.iterdir()
    records = read_fixture(path).records
    assert path.stat().st_size <= 6_000
    assert recorder.counts["dropped"] == 1
    assert 10 < len(records) < 60
    assert [record["number"] for record in records] == list(range(len(records)))


@pytest.mark.parametrize(("first", "expected"), [(None, 3), (2, 2)])
def test_trace_file_is_one_a_life_as_many_as_are_asked_for(
    tmp_path: Path, first: int | None, expected: int
) -> None:
    recorder = Recorder(RecordSettings(folder=tmp_path, first=first))
    for life in range(3):
        file = TraceFile(
            recorder, "scheduler", "rank0", lambda life=life: Fixture("scheduler", {"life": life})
        )
        file.write([{"call": "x"}])
        recorder.flush()
    found = [read_fixture(path).config["life"] for path in sorted(tmp_path.iterdir())]
    assert found == list(range(expected))


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_trace_file_of_a_process_that_is_killed_holds_whole_lines(tmp_path: Path) -> None:
    rng = random.Random(0)
    lengths = set()
    for kill in range(NUM_KILLS):
        folder = tmp_path / str(kill)
        child = os.fork()
        if child == 0:
            _record_for_ever(folder)
        time.sleep(rng.uniform(0.005, 0.12))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        for path in folder.glob("*.jsonl"):
            records = read_fixture(path).records
            lengths.add(len(records))
            assert replay_trace(Fixture("scheduler", read_fixture(path).config, records=records)).passed
    assert len(lengths) > NUM_KILLS // 4


def _record_for_ever(folder: Path) -> None:
    """What a process does until it is killed."""
    try:
        recorder = Recorder(RecordSettings(folder=folder))
        scheduler = UpstreamScheduler(CONFIG)
        file = TraceFile(
            recorder, "scheduler", "rank0", lambda: Fixture("scheduler", plain_config(scheduler))
        )
        SchedulerRecorder(scheduler, file.write)
        for i in range(10**9):
            scheduler.add_request(new_request(f"r{i}", [i % 5] * 6))
            while scheduler.has_requests():
                output = scheduler.schedule()
                ids = list(output.num_scheduled_tokens)
                scheduler.update_from_output(output, ModelRunnerOutput(ids, [[7]] * len(ids)))
            time.sleep(0.0005)
    finally:
        os._exit(1)


# Collectives


def test_collective_is_written_before_the_rank_waits_in_it() -> None:
    records: list[Any] = []
    now = iter([2.5, 2.75])
    recorder = CollectiveRecorder(
        1, lambda given: records.extend(given) or True, clock=lambda: next(now), started=2.0
    )
    recorder.enter("gather", 3, (1, 2))
    assert records == [
        {
            "rank": 1,
            "collective": "gather",
            "event": "entered",
            "step": 3,
            "value": [1, 2],
            "time_ms": 500.0,
        }
    ]
    recorder.leave("gather", 3, [[1, 2]], is_open=True)
    assert records[1]["time_ms"] == 750.0
    assert (records[1]["event"], records[1]["result"], records[1]["is_open"]) == ("left", [[1, 2]], True)


def test_collectives_end_when_nobody_wants_more() -> None:
    records: list[Any] = []
    recorder = CollectiveRecorder(0, lambda given: bool(records.extend(given)))
    recorder.enter("forward", 0, [0])
    recorder.enter("forward", 1, [0])
    assert len(records) == 1
