"""`ascend-twin verify --suite scheduler`: exit statuses, what is said, a saved scenario that reproduces."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from ascend_twin.cli.main import app
from ascend_twin.equivalence_tests.scheduler_runs import FEATURES_AT_WORK
from ascend_twin.equivalence_tests.scheduler_scenarios import Scenario
from ascend_twin.reference.errors import UnavailableError
from ascend_twin.scheduler import UpstreamScheduler, upstream

CASES = Path(__file__).parents[1] / "fixtures/cases/scheduler"
TRACE = "".join(
    f'{{"timestamp": {100 * i}, "input_length": 700, "output_length": 9, "hash_ids": [0, {i + 1}]}}\n'
    for i in range(6)
)


def _verify(*arguments: str) -> tuple[int, str]:
    """Exit status, and stdout and stderr together, on one line."""
    result = CliRunner().invoke(app, ["verify", "--suite", "scheduler", *arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, " ".join(result.output.split())


def test_it_agrees_and_says_what_was_at_work(tmp_path: Path) -> None:
    file = tmp_path / "result.json"
    status, output = _verify("--profile=dev", "--json", str(file))
    assert status == 0
    assert "Agree: " in output
    assert "chunked prefill" in output
    result = json.loads(file.read_text())
    assert result["passed"]
    assert result["covered"]["steps"] >= result["options"]["steps"] == 5_000
    assert result["covered"]["requests"] > 100
    assert set(FEATURES_AT_WORK) - set(result["features"]) == set()


def test_it_drives_a_trace_with_its_shared_prefixes(tmp_path: Path) -> None:
    trace, file = tmp_path / "trace.jsonl", tmp_path / "result.json"
    trace.write_text(TRACE)
    assert _verify("--trace", str(trace), "--requests=5", "--json", str(file))[0] == 0
    result = json.loads(file.read_text())
    assert result["covered"]["requests"] == result["features"]["stop_max_tokens"] == 5
    assert result["features"]["prefix_hit"] == 4


def test_a_failure_is_minimized_and_saved_and_the_file_reproduces_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        UpstreamScheduler, "_cap_long_prefill", lambda self, num_new_tokens: num_new_tokens + 1
    )
    file = tmp_path / "result.json"
    status, output = _verify("--seed=3", "--failures", str(tmp_path / "failures"), "--json", str(file))
    assert status == 1
    path = tmp_path / "failures" / "seed_3.json"
    assert f"--scenario {path}" in output
    assert json.loads(file.read_text())["failure"]["scenario"] == str(path)
    assert len(json.loads(path.read_text())["events"]) <= 4

    status, output = _verify("--scenario", str(path))
    assert status == 1
    assert "InvariantError" in output
    monkeypatch.undo()
    assert _verify("--scenario", str(path))[0] == 0


def _starve(monkeypatch: pytest.MonkeyPatch, request_id: str) -> None:
    admit = UpstreamScheduler._try_to_admit

    def skip(self: UpstreamScheduler, request: Any, *arguments: Any) -> Any:
        if request.request_id == request_id:
            return upstream._Verdict.SKIPPED
        return admit(self, request, *arguments)

    monkeypatch.setattr(UpstreamScheduler, "_try_to_admit", skip)


def test_what_only_the_drain_finds_is_minimized_and_reproduced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _starve(monkeypatch, "r3")
    status, output = _verify("--seed=1", "--failures", str(tmp_path))
    assert status == 1
    assert "StallError: nothing happens any more; not served: r3 (WAITING)" in output
    path = tmp_path / "seed_1.json"
    assert len(Scenario.load(path).events) <= 2

    status, output = _verify("--scenario", str(path))
    assert status == 1
    assert "StallError: nothing happens any more; not served: r3 (WAITING)" in output


def test_a_failure_is_printed_when_it_cannot_be_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def save(*arguments: Any) -> None:
        raise OSError(28, "No space left on device")

    _starve(monkeypatch, "r3")
    monkeypatch.setattr("ascend_twin.cli.verify_scheduler.save_failure", save)
    file = tmp_path / "result.json"
    status, output = _verify("--seed=1", "--failures", str(tmp_path), "--json", str(file))
    assert status == 1
    said = f"This reproduces it; it cannot be written to {tmp_path} (No space left on device): "
    scenario = json.loads(output.partition(said)[2])
    assert len(Scenario.from_json(scenario).events) <= 2
    assert json.loads(file.read_text())["failure"]["scenario"] is None


def test_the_folder_for_failures_is_tried_and_left_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ascend_twin.cli.verify_scheduler.run_at_random", _never)
    (tmp_path / "file").write_text("")
    for name in ("file", "file/below", "file/further/below"):
        status, output = _verify("--failures", str(tmp_path / name))
        assert status == 2
        said = f"error: --failures is {tmp_path / name}; allowed: a folder that can be written ("
        assert output.startswith(said)
    (tmp_path / "there").mkdir()
    for name in ("there", "new/further/below"):
        with pytest.raises(AssertionError, match="it ran"):
            _verify("--failures", str(tmp_path / name))
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["file", "there"]


def _never(*arguments: Any, **options: Any) -> None:
    raise AssertionError("it ran")


@pytest.mark.parametrize("path", sorted(CASES.iterdir()), ids=lambda path: path.stem)
def test_a_case_of_the_fixtures_is_run(path: Path) -> None:
    case = json.loads(path.read_text(encoding="utf-8"))
    has_no_excuse = case["breaks"] is not None and case["defect"] is None
    status, output = _verify("--scenario", str(path))
    assert status == has_no_excuse
    assert ("WRONG: 1 runs" if has_no_excuse else "Agree: 1 runs") in output


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--profile=dev",), "interrupted after 1,234 of 5,000 steps"),
        (("--trace", "trace.jsonl"), "interrupted after 1,234 of 6 requests"),
        (("--scenario", str(min(CASES.iterdir()))), "interrupted after 0 of 1 scenarios"),
    ],
)
def test_an_interrupt_says_how_far_it_came(
    arguments: tuple[str, ...], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: Any, advance: Callable[[int], object] = lambda count: None) -> None:
        advance(1_234)
        raise KeyboardInterrupt

    for name in ("run_at_random", "run_mix", "run_scenario"):
        monkeypatch.setattr(f"ascend_twin.cli.verify_scheduler.{name}", interrupted)
    monkeypatch.chdir(tmp_path)
    Path("trace.jsonl").write_text(TRACE)
    status, output = _verify(*arguments)
    assert status == 130
    assert output.endswith(f"{said}; nothing was wrong so far")


def test_an_interrupt_while_a_failure_is_minimized_keeps_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    _starve(monkeypatch, "r3")
    monkeypatch.setattr("ascend_twin.cli.verify_scheduler.minimize_scenario", interrupted)
    assert _verify("--seed=1", "--failures", str(tmp_path))[0] == 1
    assert len(Scenario.load(tmp_path / "seed_1.json").events) > 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--against", "sglang"), "--against is sglang; allowed: vllm"),
        (("--dtype", "float32"), "--dtype is float32; allowed: not together with --suite scheduler"),
        (("--device", "linalg"), "--device is linalg; allowed: not together with --suite scheduler"),
        (
            ("--scenario", "nowhere.json"),
            "--scenario is nowhere.json; allowed: a file that a failing run saved",
        ),
        (("--trace", "nowhere.jsonl"), "--trace: nowhere.jsonl: No such file"),
        (("--trace", "a", "--scenario", "b"), "--scenario is b; allowed: not together with --trace"),
        (("--trace", "a", "--cases=9"), "--cases is 9; allowed: not together with --trace"),
        (("--trace", "a", "--seed=0"), "--seed is 0; allowed: not together with --trace"),
        (("--trace", "a", "--profile=dev"), "--profile is dev; allowed: not together with --trace"),
        (("--trace", "a", "--failures=f"), "--failures is f; allowed: not together with --trace"),
        (("--scenario", "a", "--cases=9"), "--cases is 9; allowed: not together with --scenario"),
        (("--scenario", "a", "--seed=0"), "--seed is 0; allowed: not together with --scenario"),
        (("--scenario", "a", "--profile=dev"), "--profile is dev; allowed: not together with --scenario"),
        (("--scenario", "a", "--failures=f"), "--failures is f; allowed: not together with --scenario"),
        (("--scenario", "a", "--requests=9"), "--requests is 9; allowed: only together with --trace"),
        (("--requests=9",), "--requests is 9; allowed: only together with --trace"),
        (("--profile", "weekly"), "--profile is weekly; allowed: dev, ci, nightly"),
        (("--json", "/no/such/folder/x.json"), "--json is /no/such/folder/x.json; allowed: a file"),
    ],
)
def test_wrong_input_is_refused_in_one_line(arguments: tuple[str, ...], message: str) -> None:
    status, output = _verify(*arguments)
    assert status == 2
    assert output.startswith(f"error: {message}")


def test_a_broken_scenario_file_is_refused(tmp_path: Path) -> None:
    head = '"config": {"num_blocks": 600}, "events"'
    for text, message in {
        "": "the file is not JSON",
        "[" * 100_000: "the file is not JSON",
        "[]": "the whole is []; allowed: a JSON object",
        f'{{{head}: [{{"event": "Explode"}}]}}': "events[0] is {'event': 'Explode'}; allowed: an object",
        f'{{{head}: [{{"event": "Pause", "state": 3}}]}}': "events[0].state is 3; allowed: an int from",
        f'{{{head}: [], "async_depth": 1}}': "async_depth is 1; allowed: an int >= 2",
    }.items():
        path = tmp_path / "scenario.json"
        path.write_text(text)
        status, output = _verify("--scenario", str(path))
        assert status == 2
        allowed = "a file that a failing run saved, or one of fixtures/cases/scheduler"
        assert output.startswith(f"error: --scenario is {path}; allowed: {allowed} ({message}")


def test_options_of_the_scheduler_are_refused_for_gdn() -> None:
    result = CliRunner().invoke(app, ["verify", "--against", "vllm"])
    assert result.exit_code == 2
    assert "--against is vllm; allowed: only together with --suite scheduler" in result.output


def test_a_peer_that_is_not_installed_is_said_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def load() -> None:
        raise UnavailableError("vllm is not installed; run tox")

    monkeypatch.setattr("ascend_twin.cli.verify_scheduler.load_vllm", load)
    assert _verify("--against", "vllm") == (2, "error: vllm is not installed; run tox")
