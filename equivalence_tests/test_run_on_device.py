"""`python -m ascend_twin.equivalence_tests.run_on_device`: what it prints, runs and exits with."""

from pathlib import Path
from typing import Any

import pytest

from ascend_twin.equivalence_tests import run_on_device
from ascend_twin.equivalence_tests.run_on_device import DISTRIBUTIONS, main


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The arguments that pytest got; it runs nothing, and ends with 3."""
    calls: list[list[str]] = []

    def run(arguments: list[str]) -> int:
        calls.append(arguments)
        return 3

    monkeypatch.setattr(pytest, "main", run)
    return calls


@pytest.mark.parametrize("device", ["npu", "cuda", "linalg"])
def test_suites_run_on_the_device_with_the_options_of_pytest(
    device: str, runs: list[list[str]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(run_on_device, "why_unusable", lambda device: None)
    assert main([device, "-k", "kernels", "--require"]) == 3
    assert runs == [[str(Path(run_on_device.__file__).parent), "--device", device, "-k", "kernels"]]
    named = [line.partition(":")[0] for line in capsys.readouterr().out.splitlines()]
    assert named == ["python", "machine", *DISTRIBUTIONS, "CANN"]


@pytest.mark.parametrize(("options", "status"), [([], 0), (["--require"], 1)])
def test_device_that_cannot_be_used_runs_nothing_and_says_why(
    options: list[str],
    status: int,
    runs: list[list[str]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(run_on_device, "why_unusable", lambda device: "it is made of wood")
    assert main(["linalg", *options]) == status
    assert runs == []
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith(
        "linalg: not run: it is made of wood; not run: the suites of ascend_twin.equivalence"
    )


@pytest.mark.parametrize("device", ["tpu", "cpu"])
def test_device_that_there_is_not_is_named_with_those_there_are(
    device: str, runs: list[list[str]], capsys: pytest.CaptureFixture[Any]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        main([device])
    assert "invalid choice" in capsys.readouterr().err
    assert runs == []
