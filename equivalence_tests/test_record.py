"""Recording: what is written, what is not, and that nobody waits for it."""

import dataclasses
import json
import logging
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ascend_twin.equivalence_tests.cases import PrefillCase, run_case
from ascend_twin.equivalence_tests.devices import SimulatedDevice, SimulatedStream
from ascend_twin.equivalence_tests.online_check import differences
from ascend_twin.fixtures import record
from ascend_twin.fixtures.record import (
    BackgroundWriter,
    Recorder,
    RecordingFolder,
    RecordSettings,
    ignored_variables,
    read_record_settings,
    redact,
)
from ascend_twin.fixtures.store import TEMPORARY_SUFFIX, Fixture, read_fixture
from ascend_twin.optimized.gdn import ChunkMetadataBuilder, open_device
from ascend_twin.optimized.gdn.device import Device
from ascend_twin.optimized.gdn.recording import record_call, recorded
from ascend_twin.reference.errors import InvalidArgumentError, StagingError
from ascend_twin.reference.gdn import recurrent_gated_delta_rule

NUM_KILLS = 1000
CASE = PrefillCase((70, 0, 33), H=1, HV=2, dtype="bfloat16", use_qk_l2norm_in_kernel=True)


def _recorder(folder: Path, **settings: Any) -> Recorder:
    return Recorder(RecordSettings(folder, **settings))


def _call(q: torch.Tensor, o: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
    """The tensors of some call; q tells which."""
    gate = torch.zeros(q.shape[:3])
    return {"q": q, "k": q, "v": q, "g": gate, "beta": gate, "seen.o": q if o is None else o}


def _record(
    recorder: Recorder,
    layer: str = "layer",
    num_steps: int = 1,
    tensors: dict[str, torch.Tensor] | None = None,
) -> None:
    source = recorder.source("gdn", layer)
    for step in range(num_steps):
        call = {**_call(torch.full((1, 2, 1, 4), float(step))), **(tensors or {})}
        record_call(source, lambda: None, lambda call=call: call, lambda result: {}, {})
    assert recorder.flush(60)


def _steps(folder: Path) -> list[tuple[str, int]]:
    """Layer and step of every recording, in the order of their files' names."""
    found = [read_fixture(path).origin for path in sorted(folder.iterdir())]
    return [(origin["layer"], origin["step"]) for origin in found]


# What is asked for


def test_settings_are_none_when_nothing_is_asked_for() -> None:
    assert read_record_settings({"ASCEND_TWIN_RECORD_EVERY": "5", "ASCEND_TWIN_RECORD": ""}) is None


def test_settings_are_read_from_the_environment() -> None:
    environ = {
        "ASCEND_TWIN_RECORD": "/recordings",
        "ASCEND_TWIN_RECORD_KINDS": "gdn,metadata",
        "ASCEND_TWIN_RECORD_LAYERS": "model.layers.[01].*",
        "ASCEND_TWIN_RECORD_STEPS": "10-20",
        "ASCEND_TWIN_RECORD_FIRST": "3",
        "ASCEND_TWIN_RECORD_WHEN": "mismatch",
        "ASCEND_TWIN_RECORD_EVERY": "100",
        "ASCEND_TWIN_RECORD_MAX_BYTES": "2G",
        "ASCEND_TWIN_RECORD_REDACT": "1",
        "ASCEND_TWIN_CHECK": "1/50",
    }
    assert read_record_settings(environ) == RecordSettings(
        Path("/recordings"),
        kinds=("gdn", "metadata"),
        layers="model.layers.[01].*",
        steps=(10, 20),
        first=3,
        when="mismatch",
        every=100,
        max_bytes=2 * 2**30,
        redact=True,
        check_every=50,
    )
    assert read_record_settings({"ASCEND_TWIN_CHECK": "1/7"}) == RecordSettings(None, check_every=7)


@pytest.mark.parametrize(
    ("environ", "kinds"),
    [
        ({}, ("gdn", "metadata", "scheduler", "dp")),
        ({"ASCEND_TWIN_RECORD_WHEN": "always"}, ("gdn", "metadata", "scheduler", "dp")),
        ({"ASCEND_TWIN_RECORD_WHEN": "nonfinite"}, ("gdn", "metadata")),
        ({"ASCEND_TWIN_RECORD_WHEN": "nonfinite", "ASCEND_TWIN_RECORD_KINDS": "dp"}, ("dp",)),
    ],
)
def test_settings_that_pick_calls_ask_for_no_traces(environ: dict[str, str], kinds: tuple[str, ...]) -> None:
    settings = read_record_settings({"ASCEND_TWIN_RECORD": "x", **environ})
    assert settings is not None
    assert settings.kinds == kinds


@pytest.mark.parametrize(
    ("text", "steps"), [("7", (7, 7)), ("7-", (7, None)), ("-7", (0, 7)), ("0-0", (0, 0))]
)
def test_settings_steps(text: str, steps: tuple[int, int | None]) -> None:
    settings = read_record_settings({"ASCEND_TWIN_RECORD": "x", "ASCEND_TWIN_RECORD_STEPS": text})
    assert settings is not None
    assert settings.steps == steps


@pytest.mark.parametrize(
    ("variable", "value", "allowed"),
    [
        ("ASCEND_TWIN_RECORD_KINDS", "gdn,gnd", "some of gdn, metadata, scheduler, dp"),
        ("ASCEND_TWIN_RECORD_LAYERS", "", "a glob"),
        ("ASCEND_TWIN_RECORD_STEPS", "9-3", "FIRST-LAST"),
        ("ASCEND_TWIN_RECORD_STEPS", "-", "FIRST-LAST"),
        ("ASCEND_TWIN_RECORD_FIRST", "0", "a number >= 1"),
        ("ASCEND_TWIN_RECORD_WHEN", "nan", "one of always, nonfinite, mismatch"),
        ("ASCEND_TWIN_RECORD_WHEN", "mismatch", "with ASCEND_TWIN_CHECK=1/N"),
        ("ASCEND_TWIN_RECORD_EVERY", "1/100", "a number >= 1"),
        ("ASCEND_TWIN_RECORD_MAX_BYTES", "2GB", "K, M, G or T"),
        ("ASCEND_TWIN_RECORD_REDACT", "2", "one of 1, true"),
        ("ASCEND_TWIN_CHECK", "100", "1/N, N >= 1"),
    ],
)
def test_settings_that_are_wrong_name_variable_value_and_what_is_allowed(
    variable: str, value: str, allowed: str
) -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        read_record_settings({"ASCEND_TWIN_RECORD": "x", variable: value})
    message = str(caught.value)
    assert variable in message
    assert repr(value) in message
    assert allowed in message


@pytest.mark.parametrize("asked", [{"ASCEND_TWIN_RECORD": "x"}, {"ASCEND_TWIN_CHECK": "1/7"}])
@pytest.mark.parametrize(
    "variable", ["ASCEND_TWIN_RECORDS", "ASCEND_TWIN_CHEK", "ASCEND_TWIN_CHECKS", "ASCEND_TWIN_RECORD_every"]
)
def test_variables_that_nobody_knows_are_refused_where_others_ask_and_else_named(
    variable: str, asked: dict[str, str]
) -> None:
    with pytest.raises(InvalidArgumentError, match=rf"{variable};.*ASCEND_TWIN_CHECK"):
        read_record_settings({**asked, variable: "1"})
    assert read_record_settings({variable: "1"}) is None
    assert ignored_variables({variable: "1", "HOME": "/"}).startswith(f"{variable}: not known (known are ")


@pytest.mark.parametrize("asked", [{}, {"ASCEND_TWIN_CHECK": "1/7"}, {"ASCEND_TWIN_RECORD": ""}])
def test_filters_without_a_folder_are_named(asked: dict[str, str]) -> None:
    ignored = ignored_variables({**asked, "ASCEND_TWIN_RECORD_WHEN": "nonfinite"})
    assert ignored == "ASCEND_TWIN_RECORD_WHEN: nothing is recorded, for ASCEND_TWIN_RECORD is not set"


@pytest.mark.parametrize(
    "environ",
    [
        {},
        {"ASCEND_TWIN_FAILURES": "x", "ASCEND_TWIN_CHECK": "1/7"},
        {"ASCEND_TWIN_RECORD": "x", "ASCEND_TWIN_RECORD_WHEN": "nonfinite"},
    ],
)
def test_variables_that_are_right_are_not_named(environ: dict[str, str]) -> None:
    assert ignored_variables(environ) == ""
    read_record_settings(environ)


def test_settings_refuse_an_unknown_variable() -> None:
    with pytest.raises(InvalidArgumentError, match=r"ASCEND_TWIN_RECORD_LAYER;.*ASCEND_TWIN_RECORD_LAYERS"):
        read_record_settings({"ASCEND_TWIN_RECORD": "x", "ASCEND_TWIN_RECORD_LAYER": "y"})


def test_recorder_refuses_a_folder_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InvalidArgumentError, match=r"ASCEND_TWIN_RECORD is .*file.*a folder to write into"):
        _recorder(tmp_path / "file")


def test_recorder_makes_a_folder_that_nobody_else_reads(tmp_path: Path) -> None:
    _record(_recorder(tmp_path / "some" / "where"))
    assert (tmp_path / "some" / "where").stat().st_mode & 0o077 == 0
    assert _steps(tmp_path / "some" / "where") == [("layer", 0)]


def test_process_recorder_is_one_and_none_when_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record._recorder_of.cache_clear()
    assert record.process_recorder() is None
    record._recorder_of.cache_clear()
    monkeypatch.setenv("ASCEND_TWIN_RECORD", str(tmp_path))
    recorder = record.process_recorder()
    assert recorder is not None
    assert record.process_recorder() is recorder
    record._recorder_of.cache_clear()


# What is recorded


def test_recorder_writes_the_call_as_it_was(tmp_path: Path) -> None:
    """Tensors that the call itself overwrites, and a state before and after."""
    recorder = _recorder(tmp_path)
    pool, o = torch.ones(1, 1, 4, 4), torch.zeros(1, 2, 1, 4)

    def run() -> torch.Tensor:
        pool.fill_(2)
        return o.fill_(3)

    record_call(
        recorder.source("gdn", "layer"),
        run,
        lambda: {**_call(torch.ones(1, 2, 1, 4), o), "initial_state": pool},
        lambda result: {"seen.o": result, "seen.final_state": pool},
        {"eps": 1e-6},
    )
    o.fill_(4)
    pool.fill_(4)
    recorder.flush()
    (path,) = tmp_path.iterdir()
    fixture = read_fixture(path)
    assert (fixture.kind, fixture.config) == ("gdn", {"eps": 1e-6})
    values = {name: set(x.flatten().tolist()) for name, x in fixture.tensors.items()}
    assert (values["initial_state"], values["seen.final_state"], values["seen.o"]) == ({1.0}, {2.0}, {3.0})
    origin = fixture.origin
    assert (origin["layer"], origin["step"], origin["rank"], origin["device"]) == ("layer", 0, "rank0", "cpu")
    assert (origin["reason"], origin["versions"]["torch"]) == ("sampled", torch.__version__)
    assert recorder.counts == {"recorded": 1}


@pytest.mark.parametrize(
    ("settings", "wanted"),
    [
        ({}, [("a.0", 0), ("a.1", 0), ("a.0", 1), ("a.1", 1), ("a.0", 2), ("a.1", 2)]),
        ({"layers": "*.1"}, [("a.1", 0), ("a.1", 1), ("a.1", 2)]),
        ({"layers": "A.*"}, []),
        ({"steps": (1, 1)}, [("a.0", 1), ("a.1", 1)]),
        ({"steps": (2, None)}, [("a.0", 2), ("a.1", 2)]),
        ({"first": 4}, [("a.0", 0), ("a.1", 0), ("a.0", 1), ("a.0", 2)]),
        ({"every": 2}, [("a.0", 0), ("a.1", 1), ("a.0", 2)]),
        ({"every": 2, "steps": (1, 2), "layers": "a.0"}, [("a.0", 2)]),
        ({"kinds": ("metadata",)}, []),
    ],
)
def test_recorder_filters(tmp_path: Path, settings: dict[str, Any], wanted: list[tuple[str, int]]) -> None:
    recorder = _recorder(tmp_path, **settings)
    for layer in ("a.0", "a.1"):
        _record(recorder, layer, num_steps=3)
    assert _steps(tmp_path) == wanted


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_recorder_when_nonfinite_takes_only_such_results(tmp_path: Path, bad: float) -> None:
    recorder = _recorder(tmp_path, when="nonfinite")
    good = torch.zeros(1, 2, 1, 4)
    wrong = good.clone()
    wrong[0, 1, 0, 2] = bad
    _record(recorder, "good")
    _record(recorder, "input alone", tensors={"q": wrong})
    _record(recorder, "o", tensors={"seen.o": wrong})
    _record(recorder, "padding", tensors={"seen.o": wrong, "cu_seqlens": torch.tensor([0, 1])})
    _record(recorder, "state", tensors={"seen.final_state": torch.full((1, 1, 4, 4), bad)})
    assert _steps(tmp_path) == [("o", 0), ("state", 0)]
    reasons = {read_fixture(path).origin["reason"] for path in tmp_path.iterdir()}
    assert reasons == {"nonfinite"}
    assert recorder.source("metadata", "builds").start() is None  # which have no such values


def test_recorder_when_mismatch_takes_what_the_check_finds(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    recorder = _recorder(tmp_path, when="mismatch", check_every=2)
    recorder.check = lambda fixture: "o: wrong at token 1" if fixture.tensors["q"].max() >= 2 else ""
    with caplog.at_level(logging.WARNING):
        _record(recorder, num_steps=7)
    assert _steps(tmp_path) == [("layer", 2), ("layer", 4), ("layer", 6)]
    assert recorder.counts == {"checked": 4, "mismatched": 3, "recorded": 3}
    said = [line.message for line in caplog.records]
    assert said == ["layer differs from the reference at step 2: o: wrong at token 1"]  # once
    second = recorder.source("gdn", "second")
    assert [second.start() is not None for _ in range(4)] == [False, True, False, True]
    origin = read_fixture(next(tmp_path.iterdir())).origin
    assert (origin["reason"], origin["check"]) == ("check failed", "o: wrong at token 1")


def test_recorder_that_only_checks_writes_nothing() -> None:
    recorder = Recorder(RecordSettings(None, check_every=3))
    recorder.check = lambda fixture: ""
    _record(recorder, num_steps=7)
    assert recorder.counts == {"checked": 3}


def test_recordings_have_names_of_their_own_that_sort(tmp_path: Path) -> None:
    recorders = [_recorder(tmp_path) for _ in range(3)]
    names = [
        recorder.path(kind, layer, rank, step).name
        for recorder in recorders
        for rank in ("rank0", "dp1.rank0")
        for step in (9, 10)
        for kind in ("gdn", "metadata")
        for layer in ("model.layers.0", "model/layers:1" + "x" * 300)
    ]
    assert len(set(names)) == len(names)
    one = [recorders[0].path("gdn", "a", "rank0", step).name for step in (2, 9, 10, 100, 12345)]
    assert sorted(one) == one
    assert all(re.fullmatch(r"[\w.-]{1,200}\.safetensors", name) for name in names)


# What it may not do


def test_recorder_does_not_wait_when_the_queue_is_full_and_counts(tmp_path: Path) -> None:
    go_on = threading.Event()
    recorder = Recorder(RecordSettings(tmp_path), writer=BackgroundWriter(max_bytes=500))
    assert recorder.writer.offer(0, lambda: go_on.wait(60))  # the disk hangs
    source = recorder.source("gdn", "layer")
    for _ in range(20):  # 160 bytes each
        recording = source.start()
        assert recording is not None
        with recording:
            recording.add(lambda: _call(torch.zeros(1, 2, 1, 4)))
            recording.finish({})
    assert (recorder.counts["dropped"], recorder.writer.num_refused) == (17, 17)
    go_on.set()
    recorder.flush()
    assert _steps(tmp_path) == [("layer", 0), ("layer", 1), ("layer", 2)]
    _record(recorder)
    assert recorder.counts["recorded"] == 4  # there is room again


def test_recorder_keeps_the_folder_within_its_bytes(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Of two recorders that write at once, as two ranks do."""
    (tmp_path / "from before").write_bytes(bytes(2000))
    recorders = [_recorder(tmp_path, max_bytes=20_000) for _ in range(2)]
    threads = [threading.Thread(target=_record, args=(recorder, "layer", 20)) for recorder in recorders]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    sizes = [path.stat().st_size for path in tmp_path.iterdir()]
    assert 20_000 - 2 * max(sizes[1:]) < sum(sizes) <= 20_000
    assert sum(recorder.counts["recorded"] for recorder in recorders) == len(sizes) - 1
    stops = [line for line in caplog.messages if "ASCEND_TWIN_RECORD_MAX_BYTES" in line]
    assert len(stops) == 2  # each says it once
    assert recorders[0].source("gdn", "layer").start() is None  # and copies nothing any more


def test_folder_lets_one_write_at_a_time(tmp_path: Path) -> None:
    """Also of several processes: each has an object of its own for the same folder."""
    inside, most = [0], [0]

    def write() -> None:
        inside[0] += 1
        most[0] = max(most[0], inside[0])
        time.sleep(0.002)
        inside[0] -= 1

    def write_often() -> None:
        folder = RecordingFolder(tmp_path)
        for _ in range(5):
            assert folder.write(0, write)

    threads = [threading.Thread(target=write_often) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (inside, most) == ([0], [1])


def test_recording_of_a_call_that_fails_gives_its_memory_back(tmp_path: Path) -> None:
    recorder = _recorder(tmp_path)

    def fail() -> None:
        raise ValueError("the kernel")

    with pytest.raises(ValueError, match="the kernel"):
        record_call(
            recorder.source("gdn", "layer"),
            fail,
            lambda: _call(torch.zeros(1, 2, 1, 4)),
            lambda result: {},
            {},
        )
    recorder.flush()
    assert (recorder.counts, recorder.writer._held) == ({"dropped": 1}, 0)
    assert not list(tmp_path.iterdir())


def test_recording_that_cannot_be_copied_does_not_stop_the_call(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    recorder = _recorder(tmp_path)

    def no_memory() -> dict[str, torch.Tensor]:
        raise torch.OutOfMemoryError("none left")

    result = record_call(recorder.source("gdn", "layer"), lambda: 5, no_memory, lambda result: {}, {})
    assert (result, recorder.counts["dropped"]) == (5, 1)
    assert "A recording was dropped." in caplog.text


def test_recorder_goes_on_after_a_disk_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    recorder = _recorder(tmp_path)

    def full(path: Path, fixture: Fixture) -> None:
        raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(record, "write_fixture", full)
        _record(recorder)
    assert "no space left" in caplog.text
    _record(recorder)
    assert (recorder.counts["recorded"], recorder.writer._held) == (1, 0)


def test_leftover_of_a_killed_process_goes_when_the_next_one_starts(tmp_path: Path) -> None:
    leftover = tmp_path / f".x.safetensors.123{TEMPORARY_SUFFIX}"
    others = [tmp_path / "notes.partial", tmp_path / ".gitignore"]
    for path in (leftover, *others):
        path.write_text("")
    RecordingFolder(tmp_path)
    assert sorted(tmp_path.iterdir()) == sorted(others)


def test_thousand_kills_leave_only_whole_recordings(tmp_path: Path) -> None:
    found = subprocess.run(
        [
            sys.executable,
            "-m",
            "ascend_twin.equivalence_tests.killed_recorder",
            tmp_path,
            str(NUM_KILLS),
            "1",
        ],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert found.returncode == 0, found.stderr
    kills = json.loads(found.stdout.splitlines()[-1])
    assert kills["num_killed"] == NUM_KILLS
    assert kills["num_whole"] > NUM_KILLS
    assert kills["num_partial"] > NUM_KILLS // 50  # that many, and more, died in the middle of a file
    assert kills["left"] == []


def test_recordings_are_written_when_the_process_ends(tmp_path: Path) -> None:
    program = f"""
import torch
from pathlib import Path
from ascend_twin.fixtures.record import Recorder, RecordSettings
source = Recorder(RecordSettings(Path({str(tmp_path)!r}))).source("gdn", "layer")
x, gate = torch.zeros(1, 2, 1, 4), torch.zeros(1, 2, 1)
for _ in range(50):
    with source.start() as recording:
        recording.add(lambda: {{"q": x, "k": x, "v": x, "g": gate, "beta": gate}})
        recording.finish({{}})
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)
    assert len(_steps(tmp_path)) == 50


def test_recorder_says_once_that_it_is_on_and_what_came_of_it_in_the_end(tmp_path: Path) -> None:
    program = f"""
import logging, torch
from pathlib import Path
from ascend_twin.fixtures.record import Recorder, RecordSettings
logging.basicConfig(level=logging.INFO, format="%(name)s %(message)s")
recorder = Recorder(RecordSettings(Path({str(tmp_path)!r}), every=2, check_every=5))
recorder.check = lambda fixture: "other" if fixture.origin["step"] == 5 else ""
recorder.announce(logging.getLogger("vllm.some"))
recorder.announce(logging.getLogger("vllm.some"))
source = recorder.source("gdn", "layer")
x, gate = torch.zeros(1, 2, 1, 4), torch.zeros(1, 2, 1)
for _ in range(10):
    recording = source.start()
    if recording is not None:
        with recording:
            recording.add(lambda: {{"q": x, "k": x, "v": x, "g": gate, "beta": gate}})
            recording.finish({{}})
"""
    run = subprocess.run(
        [sys.executable, "-c", program], check=True, timeout=120, capture_output=True, text=True
    )
    said = [line.split(" ", 1) for line in run.stderr.splitlines()]
    assert [line for name, line in said if name == "vllm.some"] == [
        f"Recording gdn, metadata, scheduler, dp into {tmp_path} (when: always; every: 2). "
        "Checking 1 call in 5 of each layer against the reference.",
        f"Recordings of this process, in {tmp_path}: recorded 5, checked 2, mismatched 1, dropped 0.",
    ]


# Off the hot path


class SimulatedCopies:
    """Copies of a simulated device, as late as it likes."""

    def __init__(self, device: SimulatedDevice) -> None:
        self.device = device
        self.is_capturing = False

    def can_copy(self) -> bool:
        return not self.is_capturing

    def to_host(self, x: Any) -> torch.Tensor:
        landing = self.device.host_empty(x.numel(), x.dtype)
        self.device.copy_back_async(landing, x, self.device.current_stream())
        return landing.view(x.shape)

    def landed(self) -> Any:
        event = self.device.new_event()
        event.record(self.device.current_stream())
        return event


def test_recording_copies_behind_what_is_queued_and_the_host_does_not_wait(tmp_path: Path) -> None:
    """The device has done nothing when the call is over; then it is let run."""
    device = SimulatedDevice()
    copies = SimulatedCopies(device)
    recorder = Recorder(RecordSettings(tmp_path), copies_from=lambda _: copies)
    held = threading.Event()
    recorder.writer.offer(0, lambda: held.wait(60))
    tensors = {name: device.to_device(x) for name, x in _call(torch.zeros(1, 2, 1, 4)).items()}
    with device.forbid_host_sync():
        tensors["q"] += 1  # queued: what is recorded is the value behind it
        tensors["v"].fill_(float("inf"))
        record_call(
            recorder.source("gdn", "layer"),
            lambda: tensors["q"].add_(1),
            lambda: {name: x for name, x in tensors.items() if name != "seen.o"},
            lambda result: {"seen.o": result},
            {},
        )
        tensors["q"].fill_(9)  # in place, behind the copies
        assert any(stream.queue for stream in device._streams)
    held.set()
    recorder.flush()
    (path,) = tmp_path.iterdir()
    values = {name: set(x.flatten().tolist()) for name, x in read_fixture(path).tensors.items()}
    assert (values["q"], values["seen.o"], values["v"]) == ({1.0}, {2.0}, {float("inf")})


def test_recording_is_dropped_while_a_graph_is_captured(tmp_path: Path) -> None:
    device = SimulatedDevice()
    copies = SimulatedCopies(device)
    copies.is_capturing = True
    recorder = Recorder(RecordSettings(tmp_path), copies_from=lambda _: copies)
    x = device.to_device(torch.zeros(1, 2, 1, 4))
    record_call(recorder.source("gdn", "layer"), lambda: None, lambda: {"q": x}, lambda result: {}, {})
    assert recorder.counts["dropped"] == 1
    assert not any(stream.queue for stream in device._streams)


def test_simulated_device_refuses_a_copy_into_pageable_memory() -> None:
    device = SimulatedDevice()
    on_device, pinned = device.to_device(torch.zeros(4)), device.host_empty(4, torch.float32)
    with pytest.raises(StagingError, match="must be pinned"):
        device.copy_back_async(torch.zeros(4), on_device, SimulatedStream())
    with pytest.raises(StagingError, match=r"source .* is a Tensor on the host"):
        device.copy_back_async(pinned, torch.zeros(4), SimulatedStream())


# The op


def _recorded_case(
    folder: Path, device: Device, *, implementation: str, case: PrefillCase = CASE, **settings: Any
) -> Fixture:
    recorder = _recorder(folder, **settings)
    builder = ChunkMetadataBuilder(device, 256, 8, case.HV)
    inputs = case.inputs()
    metadata = builder.build(inputs.cu_seqlens)
    run_case(
        recorded(recorder, "model.layers.0"),
        case,
        inputs.to(device.torch_device),
        prebuilt_meta=metadata,
        implementation=implementation,
    )
    recorder.flush()
    (path,) = folder.iterdir()
    return read_fixture(path)


def test_recorded_op_is_right(tmp_path: Path, device: Device, implementation: str) -> None:
    fixture = _recorded_case(tmp_path, device, implementation=implementation)
    inputs = CASE.inputs()
    for name in ("q", "k", "v", "g", "beta", "initial_state", "cu_seqlens"):
        assert torch.equal(fixture.tensors[name], getattr(inputs, name)), name
    o, state = run_case(recurrent_gated_delta_rule, CASE, inputs)
    assert (fixture.tensors["seen.o"] - o).abs().max() < 0.05
    assert (fixture.tensors["seen.final_state"] - state).abs().max() < 0.05
    assert fixture.config == {
        "scale": None,
        "eps": 1e-6,
        "use_qk_l2norm_in_kernel": True,
        "output_final_state": True,
        "implementation": implementation,
    }
    assert fixture.tensors["metadata.chunk_indices_chunk64"].tolist() == [[0, 0], [0, 1], [2, 0]]
    assert fixture.tensors["metadata.cu_seqlens_kern"].tolist() == [0, 70, 103]
    stages = sorted(name for name in fixture.tensors if name.startswith("stage."))
    assert (len(stages) == 10) == (implementation == "staged")
    assert not stages or fixture.tensors["stage.chunk_scaled_dot_kkt.A"].shape == (103, 2, 64)
    assert differences(fixture) == ""


def test_recorded_op_without_metadata_packs_rows(tmp_path: Path) -> None:
    recorder = _recorder(tmp_path)
    inputs = PrefillCase((12,)).inputs()
    rows = [x.view(2, 6, *x.shape[2:]) for x in inputs[:5]]
    recorded(recorder)(*rows, implementation="eager")
    recorder.flush()
    (path,) = tmp_path.iterdir()
    fixture = read_fixture(path)
    assert set(fixture.tensors) == {"q", "k", "v", "g", "beta", "seen.o"}
    assert differences(fixture) == ""


# The check


@pytest.fixture(scope="module")
def right(tmp_path_factory: pytest.TempPathFactory) -> Fixture:
    return _recorded_case(tmp_path_factory.mktemp("right"), open_device("cpu"), implementation="eager")


def _changed(fixture: Fixture, name: str, change: Callable[[torch.Tensor], object]) -> Fixture:
    x = fixture.tensors[name].clone()
    change(x)
    return dataclasses.replace(fixture, tensors={**fixture.tensors, name: x})


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        ("seen.o", lambda x: x[0, 75, 1].mul_(1.5), "o: .* at sequence 2, token 5, head 1"),
        ("seen.o", lambda x: x[0, 75, 1].fill_(float("nan")), "o: NaN in 16 of"),
        (
            "seen.final_state",
            lambda x: x[2, 0, 3].add_(1),
            "final_state: .* at sequence 2, key row 3, head 0",
        ),
        ("seen.final_state", lambda x: x.copy_(x.mT.clone()), "final_state: .* at sequence"),
        ("metadata.chunk_indices_chunk64", lambda x: x[2, 0].sub_(1), r"chunk_indices_chunk64 is .*\[1, 0\]"),
        ("v", lambda x: x[0, 3, 0, 0].fill_(float("inf")), "NaN or Inf came in with v"),
        ("g", lambda x: x[0, 3, 0].fill_(1.0), "the reference refuses the call: g"),
    ],
)
def test_check_says_what_differs_and_where(
    right: Fixture, name: str, change: Callable[[torch.Tensor], object], said: str
) -> None:
    assert differences(right) == ""
    assert re.search(said, differences(_changed(right, name, change)))


def test_check_takes_padding_and_a_log_decay_of_minus_infinity() -> None:
    """What stands behind the last sequence is NaN; -inf forgets everything, and is no mistake."""
    case = dataclasses.replace(CASE, gates="forget", padding=5)
    inputs = case.inputs()
    o, state = run_case(recurrent_gated_delta_rule, case, inputs)
    tensors = {name: x for name, x in inputs._asdict().items() if x is not None}
    tensors.update({"seen.o": o.to(torch.bfloat16), "seen.final_state": state.float()})
    config = {"scale": None, "eps": 1e-6, "use_qk_l2norm_in_kernel": True}
    assert inputs.g.isneginf().any()
    assert differences(Fixture("gdn", config, tensors)) == ""


@pytest.mark.parametrize("is_spec", [None, [False, True, False, False]])
def test_check_of_a_build(is_spec: list[bool] | None) -> None:
    bounds, mask = torch.tensor([0, 70, 80, 80, 100]), None if is_spec is None else torch.tensor(is_spec)
    metadata = ChunkMetadataBuilder(open_device("cpu"), 256, 8, 2).build(bounds, spec_sequence_masks_cpu=mask)
    tensors = {"cu_seqlens": bounds, **record.metadata_tensors(metadata)}
    if mask is not None:
        tensors["spec_sequence_masks"] = mask
    fixture = Fixture("metadata", {"block_sizes": list(metadata.block_sizes)}, tensors)
    assert differences(fixture) == ""
    wrong = _changed(fixture, "metadata.final_chunk_indices_chunk64", lambda x: x[-1].add_(1))
    assert differences(wrong).startswith("metadata: final_chunk_indices_chunk64 is")


# What is left out


def test_redacted_call_keeps_shape_bounds_and_metadata_alone(tmp_path: Path) -> None:
    fixture = _recorded_case(tmp_path, open_device("cpu"), implementation="eager", redact=True)
    inputs = CASE.inputs()
    assert fixture.origin["redacted"] is True
    assert not [name for name in fixture.tensors if name.startswith(("seen.", "stage."))]
    assert fixture.tensors["cu_seqlens"].tolist() == CASE.bounds
    assert "metadata.chunk_indices_chunk64" in fixture.tensors
    for name in ("q", "k", "v", "g", "beta", "initial_state"):
        ours, theirs = fixture.tensors[name], getattr(inputs, name)
        assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype)
        assert torch.corrcoef(torch.stack([ours.flatten(), theirs.flatten()]).double())[0, 1].abs() < 0.3
        assert not (ours == theirs).float().mean() > 0.05
        assert 0.5 < ours.double().square().mean().sqrt() / theirs.double().square().mean().sqrt() < 2
    assert (fixture.tensors["g"] <= 0).all()
    assert ((fixture.tensors["beta"] >= 0) & (fixture.tensors["beta"] <= 1)).all()


def test_redacted_call_keeps_where_it_is_not_finite(right: Fixture) -> None:
    wrong = _changed(right, "k", lambda x: x[0, 3, 0, :2].copy_(torch.tensor([float("nan"), float("-inf")])))
    k = redact(wrong).tensors["k"]
    assert k[0, 3, 0, 0].isnan()
    assert k[0, 3, 0, 1].isneginf()
    assert k.isfinite().sum() == k.numel() - 2
