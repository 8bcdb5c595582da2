"""What fails in a suite is left as a file that `replay` takes."""

from pathlib import Path
from typing import Any

import pytest
import torch

from ascend_twin.equivalence_tests import failures
from ascend_twin.equivalence_tests.cases import Outcome, PrefillCase, check_prefill
from ascend_twin.equivalence_tests.replay import replay_fixture
from ascend_twin.fixtures.store import read_fixture
from ascend_twin.optimized.gdn import IMPLEMENTATIONS, ChunkMetadataBuilder, Implementation, open_device

CASE = PrefillCase((3, 0, 70), H=1, HV=2, dtype="bfloat16", padding=2)
EAGER = IMPLEMENTATIONS["eager"]


def _outcome(monkeypatch: pytest.MonkeyPatch, run: Any = EAGER.run) -> Outcome:
    broken = Implementation("broken", "", run, rounds_operands=False)
    monkeypatch.setitem(IMPLEMENTATIONS, "broken", broken)
    builder = ChunkMetadataBuilder(open_device("cpu"), CASE.bounds[-1], len(CASE.seq_lens), CASE.HV)
    return check_prefill(CASE, implementation="broken", builder=builder, device=torch.device("cpu"))


def _doubles_a_head(*tensors: torch.Tensor, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
    o, final_state = EAGER.run(*tensors, **options)
    o[:, :, 1] *= 2
    return o, final_state


def test_assert_agrees_leaves_a_file_that_tells_what_went_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ASCEND_TWIN_FAILURES", str(tmp_path / "made"))
    path = tmp_path / "made" / "test_assert_agrees_leaves_a_file_that_tells_what_went_wrong.safetensors"
    with pytest.raises(AssertionError, match=rf"o: ratio .*\n(.*\n)*saved; .*: ascend-twin replay {path}"):
        failures.assert_agrees(_outcome(monkeypatch, _doubles_a_head))
    replay = replay_fixture(read_fixture(path), path=str(path))
    assert replay.first is not None
    assert (replay.first.stage, replay.first.place["head"]) == ("o", 1)
    assert replay.blame == "arithmetic"


def test_assert_agrees_saves_nothing_when_nothing_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ASCEND_TWIN_FAILURES", str(tmp_path))
    outcome = _outcome(monkeypatch)
    assert outcome.fixture is None
    failures.assert_agrees(outcome)
    assert not list(tmp_path.iterdir())


def test_failures_are_saved_in_one_folder_unless_told_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ASCEND_TWIN_FAILURES", raising=False)
    assert failures.failures_folder() == Path("failures")
