# pyright: reportMissingImports=false
"""Recordings of a served model: vLLM's own kernel and ours, right ones and wrong, and builds of metadata.

The engine is started as a user would record: by environment variables alone.
"""

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from ascend_twin.equivalence_tests import (
    installed_vllm,
    vllm_batches,
    vllm_model_device_path,
    vllm_recordings,
)
from ascend_twin.equivalence_tests.compare import compare_o, compare_state
from ascend_twin.equivalence_tests.online_check import differences
from ascend_twin.equivalence_tests.recorded_call import RecordedCall
from ascend_twin.equivalence_tests.tiny_qwen3_next import NUM_GDN_LAYERS
from ascend_twin.equivalence_tests.vllm_model_engine import cores, gdn_layers
from ascend_twin.fixtures import record
from ascend_twin.fixtures.store import Fixture, read_fixture
from ascend_twin.optimized.gdn import ChunkMetadataBuilder, open_device
from ascend_twin.optimized.vllm import record_gdn
from ascend_twin.optimized.vllm.gdn_core import PrefillCore
from ascend_twin.reference.errors import InvalidArgumentError

STEPS = "0-2"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("recordings")


@pytest.fixture(scope="module")
def llm(folder: Path) -> Iterator[Any]:
    """An engine that records its first steps, each call beside the reference."""
    with pytest.MonkeyPatch.context() as environ:
        environ.setenv("ASCEND_TWIN_RECORD", str(folder))
        environ.setenv("ASCEND_TWIN_RECORD_STEPS", STEPS)
        environ.setenv("ASCEND_TWIN_CHECK", "1/1")
        record._recorder_of.cache_clear()
        with vllm_recordings.engine() as llm:
            yield llm
        record._recorder_of.cache_clear()


@pytest.fixture(scope="module")
def by_vllm(llm: Any, folder: Path) -> list[Fixture]:
    """What the environment asked for, of a run of vLLM's own kernel, in the order of the files' names."""
    with cores(llm, lambda: None):
        vllm_recordings.ask(llm)
    recorder = record.process_recorder()
    assert recorder is not None
    recorder.flush()
    assert (recorder.counts["mismatched"], recorder.counts["dropped"]) == (0, 0)
    assert recorder.counts["checked"] >= recorder.counts["recorded"] == len(list(folder.iterdir()))
    return [read_fixture(path) for path in sorted(folder.iterdir())]


def _of(recordings: list[Fixture], kind: str, step: int) -> list[Fixture]:
    return [f for f in recordings if (f.kind, f.origin["step"]) == (kind, step)]


@pytest.mark.vllm032
def test_vllms_own_kernel_is_recorded_and_right(by_vllm: list[Fixture]) -> None:
    first, second = (_of(by_vllm, "gdn", step) for step in (0, vllm_recordings.RECORDED_STEP))
    layers = [f"model.layers.{i}.linear_attn" for i in (0, 1, 3)]
    for calls in (first, second):
        assert [call.origin["layer"] for call in calls] == layers
    for before, call in zip(first, second, strict=True):
        lens = call.tensors["cu_seqlens"].diff().tolist()
        assert lens == [66, *vllm_recordings.PROMPT_LENGTHS[1:]]
        # The prompt goes on with the state that it had after the first step; the others begin with none.
        states = call.tensors["initial_state"]
        assert torch.equal(states[:1], before.tensors["seen.final_state"])
        assert states.flatten(1).any(dim=1).tolist() == [True, False, False]
        assert call.config["implementation"] == "vllm chunk_gated_delta_rule_cpu"
        assert call.tensors["metadata.chunk_indices_chunk64"].tolist() == [[0, 0], [0, 1], [1, 0], [2, 0]]
        assert differences(call) == ""
        assert RecordedCall.of(call).seen.keys() == {"o", "final_state"}


@pytest.mark.vllm032
def test_builds_of_metadata_are_recorded(by_vllm: list[Fixture]) -> None:
    builds = _of(by_vllm, "metadata", vllm_recordings.RECORDED_STEP)
    assert len(builds) == NUM_GDN_LAYERS
    for build in builds:
        assert build.tensors["cu_seqlens"].diff().tolist() == [66, *vllm_recordings.PROMPT_LENGTHS[1:]]
        assert (build.config["num_decodes"], build.config["num_value_heads"]) == (0, 4)
        assert differences(build) == ""


def _wrong_places(recording: Fixture) -> tuple[set[tuple[int, int]], set[tuple[int, int]]]:
    """Sequences and heads at which o, and the final state, are over their limits: found without the check."""
    call = RecordedCall.of(recording)
    places: tuple[set[tuple[int, int]], set[tuple[int, int]]] = set(), set()
    limit_o, limit_state = call.limits()
    for n in range(len(call.seq_lens)):
        start, end = call.bounds[n : n + 2]
        for head in range(call.case.HV):
            o, truth = (x[:, start:end, head : head + 1] for x in (call.seen["o"], call.truth[0]))
            bounds = [0, end - start]
            if not compare_o(o, truth, dtype=call.dtype, bounds=bounds, limit=limit_o).passed:
                places[0].add((n, head))
            state, truth = (x[n : n + 1, head : head + 1] for x in (call.seen["final_state"], call.truth[1]))
            if not compare_state(
                state, truth, dtype=torch.float32, operands=call.dtype, limit=limit_state
            ).passed:
                places[1].add((n, head))
    return places


def _all(*sequences: int) -> set[tuple[int, int]]:
    return {(n, head) for n in sequences for head in range(4)}


@pytest.mark.vllm032
@pytest.mark.parametrize(
    ("variant", "o", "final_state", "said"),
    [
        ("right", set(), set(), ""),
        ("transposed", _all(0), _all(0, 1, 2), "o: "),
        ("dropped", _all(0), {(0, 0), (0, 1)}, "o: "),  # the other heads forget within the step
        ("gate", {(n, 1) for n in range(3)}, {(n, 1) for n in range(3)}, "o: "),
        ("compact", _all(3), _all(3), "metadata: chunk_indices_chunk64 is "),
    ],
)
def test_wrong_core_is_recorded_with_what_is_wrong(
    llm: Any,
    tmp_path: Path,
    variant: str,
    o: set[tuple[int, int]],
    final_state: set[tuple[int, int]],
    said: str,
) -> None:
    recorder = vllm_recordings.record(llm, variant, tmp_path)
    assert recorder.counts == {"recorded": 1}
    (path,) = tmp_path.iterdir()
    recording = read_fixture(path)
    assert recording.origin["layer"] == "model.layers.0.linear_attn"
    assert recording.tensors["initial_state"].flatten(1).any(dim=1).sum() == 1
    assert {name for name in recording.tensors if name.startswith("stage.")} >= {"stage.chunk_delta_h.h"}
    assert differences(recording).startswith(said)
    assert bool(differences(recording)) == (variant != "right")
    assert _wrong_places(recording) == (o, final_state)


@pytest.mark.vllm032
def test_mismatch_alone_is_recorded_when_that_is_asked_for(
    llm: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    options = {"when": "mismatch", "check_every": 1, "steps": (0, None)}
    with caplog.at_level(logging.WARNING, record.__name__):
        right = vllm_recordings.record(llm, "right", tmp_path, **options)
        assert (right.counts, list(tmp_path.iterdir())) == ({"checked": 2}, [])
        wrong = vllm_recordings.record(llm, "gate", tmp_path, **options)
    assert wrong.counts == {"checked": 2, "mismatched": 2, "recorded": 2}
    assert [line for line in caplog.messages if "head 1" in line] == caplog.messages
    assert len(caplog.messages) == 1  # said once a layer
    assert {read_fixture(path).origin["reason"] for path in tmp_path.iterdir()} == {"check failed"}


@pytest.mark.vllm032
def test_recording_changes_no_answer(llm: Any, tmp_path: Path) -> None:
    recorder = record.Recorder(record.RecordSettings(tmp_path))
    with cores(llm, lambda: None) as layers:
        with mock.patch.object(layers[0].call_recorder, "source", recorder.source("gdn", "layer")):
            recorded = vllm_recordings.ask(llm)
        with mock.patch.multiple(layers[0], call_recorder=None):
            plain = vllm_recordings.ask(llm)
    recorder.flush()
    assert recorder.counts["recorded"] == 2
    for ours, theirs in zip(recorded, plain, strict=True):
        assert ours.prompt_logprobs == theirs.prompt_logprobs
        assert ours.outputs[0].token_ids == theirs.outputs[0].token_ids


@pytest.mark.vllm032
@pytest.mark.parametrize("core", ["reference", "eager"])
def test_path_for_gpus_is_recorded_in_our_layout_of_states(llm: Any, tmp_path: Path, core: str) -> None:
    recorder = record.Recorder(record.RecordSettings(tmp_path, steps=(1, 1)))
    with contextlib.ExitStack() as stack:
        stack.enter_context(vllm_model_device_path.device_path(llm, lambda: PrefillCore(core)))
        for layer in gdn_layers(llm):
            source = recorder.source("gdn", layer.prefix)
            stack.enter_context(mock.patch.object(layer.call_recorder, "source", source))
        vllm_recordings.ask(llm)
    recorder.flush()
    recordings = [read_fixture(path) for path in sorted(tmp_path.iterdir())]
    assert len(recordings) == NUM_GDN_LAYERS
    for call in recordings:
        assert call.tensors["initial_state"].flatten(1).any(dim=1).tolist() == [True, False, False]
        assert (call.config["use_qk_l2norm_in_kernel"], call.config["implementation"]) == (False, core)
        assert differences(call) == ""


@pytest.mark.vllm032
def test_without_the_environment_nothing_is_put_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(record_gdn, "process_recorder", lambda: None)
    assert record_gdn.call_recorder("layer") is None
    builder = ChunkMetadataBuilder(open_device("cpu"), 8, 8, 1)
    assert record_gdn.record_builds(builder, ["layer"], 1) is builder


@pytest.mark.vllm032
def test_recorder_is_announced_where_vllm_shows_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = record.Recorder(record.RecordSettings(tmp_path, every=3))
    monkeypatch.setattr(record_gdn, "process_recorder", lambda: recorder)
    said: list[str] = []
    logger = logging.getLogger(f"vllm.{record_gdn.__name__}")
    monkeypatch.setattr(logger, "info", lambda message, *values: said.append(message % values))
    for layer in ("one", "two"):
        assert record_gdn.call_recorder(layer) is not None
    (line,) = said
    assert str(tmp_path) in line
    assert "every: 3" in line


@pytest.mark.vllm032
def test_wrong_environment_stops_who_makes_a_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ASCEND_TWIN_RECORD", "somewhere")
    monkeypatch.setenv("ASCEND_TWIN_RECORD_EVERY", "often")
    monkeypatch.setattr(record_gdn, "process_recorder", lambda: record._recorder_of.__wrapped__(0))
    with pytest.raises(InvalidArgumentError, match="ASCEND_TWIN_RECORD_EVERY is 'often'"):
        record_gdn.call_recorder("layer")


@pytest.mark.vllm
def test_builds_are_recorded_in_both_versions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    installed_vllm.prepare_import()
    from vllm.v1.attention.backends import gdn_attn

    from ascend_twin.optimized.vllm import gdn_metadata

    recorder = record.Recorder(record.RecordSettings(tmp_path))
    monkeypatch.setattr(record_gdn, "process_recorder", lambda: recorder)
    plain, version = gdn_attn.GDNAttentionMetadataBuilder, installed_vllm.version() or ""
    ours = gdn_metadata.prebuilding(plain, gdn_attn.GDNAttentionMetadata)(plain)
    builder = vllm_batches.make_builder(ours, vllm_batches.vllm_config())
    lens = (70, 3, 64)
    step = vllm_batches.Step(tuple(vllm_batches.Row(n) for n in lens), False)
    vllm_batches.build(builder, step, version)
    recorder.flush()
    (path,) = tmp_path.iterdir()
    build = read_fixture(path)
    assert build.origin["step"] == 0
    assert build.tensors["cu_seqlens"].diff().tolist() == list(lens)
    assert differences(build) == ""
