"""`ascend-twin bench`: what it measures, what it says of missing peers, and its files."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from ascend_twin.cli import bench
from ascend_twin.cli.main import app
from ascend_twin.reference.errors import UnavailableError


def test_turn_is_the_median_call(monkeypatch: pytest.MonkeyPatch) -> None:
    # Calls of 1, 5 and 1 seconds: a turn goes on until it is full.
    clock = iter([0.0, 1.0, 1.0, 6.0, 6.0, 7.0])
    monkeypatch.setattr("time.perf_counter", lambda: next(clock))
    monkeypatch.setattr(bench, "TURN_SECONDS", 6.5)
    assert bench._turn(lambda: None) == 1.0


def test_result_is_the_ratio_of_the_peer_to_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    turns = iter([1.0, 2.0, 1.0, 4.0, 1.0, 8.0])
    monkeypatch.setattr(bench, "_turn", lambda call: next(turns))
    pair = bench.Pair("ours", lambda: None, "peer", lambda: None)
    result = bench._measure(bench.Contest("x", lambda: pair), 3, lambda: None, require=True)
    assert (result.ours, result.ours_ms, result.peer, result.peer_ms) == ("ours", 1e3, "peer", 4e3)
    assert result.ratio == (3.0, 4.0, 6.0)


def test_missing_peer_is_skipped_with_the_reason_unless_it_is_required() -> None:
    def start() -> bench.Pair:
        raise UnavailableError("not here")

    contest = bench.Contest("x", start)
    assert bench._measure(contest, 1, lambda: None, require=False).skipped == "not here"
    with pytest.raises(UnavailableError, match="not here"):
        bench._measure(contest, 1, lambda: None, require=True)


def test_bench_writes_what_it_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "TURN_SECONDS", 0.0)
    files = tmp_path / "result.json", tmp_path / "result.png"
    arguments = ["bench", "--only", "1 x", "--rounds", "3", "--json", str(files[0]), "--plot", str(files[1])]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    report = json.loads(files[0].read_text())
    measured = report["results"][0]
    assert report["rounds"] == 3
    assert measured["peer"] == "reference loops"
    assert measured["ratio"][1] > 1
    assert files[1].read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--only", "nothing"], "--only is nothing"),
        (["--json", "/no/such/folder/x"], "--json is /no/such/folder/x"),
        (["--json", "/"], "--json is /"),
        (["--plot", "x.foo"], "--plot is x.foo"),
    ],
)
def test_bench_refuses_before_it_measures(
    arguments: list[str], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench, "_measure", lambda *_: pytest.fail("measured"))
    result = CliRunner().invoke(app, ["bench", *arguments])
    assert result.exit_code == 2
    assert said in result.output
