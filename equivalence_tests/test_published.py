"""The published comparison: what is fitted to a row that we made is what it was made with."""

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from ascend_twin.cli import published as command
from ascend_twin.cli.main import app
from ascend_twin.reference.errors import InvalidArgumentError
from ascend_twin.scheduler import published
from ascend_twin.scheduler.cost import CostModel
from ascend_twin.scheduler.cost_fit import BenchmarkRow, simulated_row
from ascend_twin.scheduler.published import Prediction, check, predict, published_ratios
from ascend_twin.scheduler.simulation import Simulation
from ascend_twin.scheduler.workloads import published_requests

TRUE_COST = CostModel(step_ms=50.0, prefill_us_per_token=150.0, expert_us_per_token=50.0)
TRUE_SPREAD = 0.12
NUM_REQUESTS = 144


def _simulate(policy: str) -> BenchmarkRow:
    setup = replace(check(4, (0.25,), policy, "round_robin", 8192), cost=TRUE_COST)
    requests = published_requests(0, NUM_REQUESTS, spread=TRUE_SPREAD)
    return simulated_row(Simulation(setup, requests).run())


def test_predict_recovers_what_a_row_was_made_with(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(published, "NUM_REQUESTS", NUM_REQUESTS)
    monkeypatch.setattr(published, "BASELINE", _simulate("open_gate"))
    counts: list[int] = []
    (prediction,) = predict(4, (0.25,), seeds=(0,), spreads=(0.0, TRUE_SPREAD), advance=counts.append)
    assert prediction.spread == TRUE_SPREAD
    assert prediction.cost.step_ms == pytest.approx(TRUE_COST.step_ms, rel=1e-4)
    assert prediction.cost.prefill_us_per_token == pytest.approx(TRUE_COST.prefill_us_per_token, rel=1e-3)
    assert prediction.cost.expert_us_per_token == pytest.approx(TRUE_COST.expert_us_per_token, rel=1e-3)
    balance = _simulate("any_rank_at_cap")
    assert prediction.balance.ttft_ms == pytest.approx(balance.ttft_ms, rel=1e-3)
    assert prediction.balance.tpot_ms == pytest.approx(balance.tpot_ms, rel=1e-3)
    assert prediction.balance.throughput == pytest.approx(balance.throughput, rel=1e-3)
    assert prediction.ratios.shape == (1, 3)
    assert prediction.ratios[0, 2] == pytest.approx(balance.throughput / prediction.baseline.throughput)
    assert sum(counts) == 3 * NUM_REQUESTS


@pytest.mark.parametrize(
    ("dp_size", "share", "policy", "message"),
    [
        (3, 0.0, "open_gate", "dp_size is 3; allowed: a divisor of 128"),
        (0, 0.0, "open_gate", "dp_size is 0; allowed: an int >= 1"),
        (4, 1.5, "open_gate", "expert_share is 1.5; allowed: 0 to 1"),
        (4, 0.0, "never", "policy is 'never'; allowed: one of open_gate"),
        (128, 0.0, "any_rank_near_cap", "max_num_running_reqs is 1; allowed: >= 2"),
    ],
)
def test_predict_refuses(dp_size: int, share: float, policy: str, message: str) -> None:
    with pytest.raises(InvalidArgumentError, match=message):
        predict(dp_size, (share,), policy=policy)


def _prediction(throughput: float, tpot: float) -> Prediction:
    goal = published_ratios()
    ratios = goal * np.array([[1.2, tpot, throughput]])
    row = BenchmarkRow(1.0, 2.0, 3.0)
    return Prediction(4, 0.25, 0.12, TRUE_COST, row, row, ratios)


def test_command_marks_what_is_near(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    made = [
        _prediction(1.049, 0.951),
        _prediction(1.051, 1.0),
        _prediction(1.0, 0.949),
        _prediction(0.951, 1),
    ]
    monkeypatch.setattr(command, "predict", lambda *args, **options: made)
    file = tmp_path / "published.json"
    result = CliRunner().invoke(app, ["published", "--dp", "4", "--seeds", "1", "--json", str(file)])
    assert result.exit_code == 0, result.output
    rows = [line for line in result.output.splitlines() if line.startswith("│") and " 25% " in line]
    assert ["*" in row for row in rows] == [True, False, False, False]
    assert re.findall(r"[+-][0-9.]+%", rows[0]) == ["+20.0%", "-4.9%", "+4.9%", "-4.7%"]
    data = json.loads(file.read_text(encoding="utf-8"))
    assert data["published"]["baseline"] == {"ttft_ms": 6600, "tpot_ms": 86.85, "throughput": 1297.3}
    assert [p["off"]["throughput"] for p in data["predictions"]] == pytest.approx([0.049, 0.051, 0, -0.049])
    assert data["predictions"][0]["cost"]["expert_us_per_token"] == 50


def test_command_refuses_before_it_simulates(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(command, "predict", lambda *args, **options: pytest.fail("it simulates"))
    for arguments, message in (
        (("--dp", "4", "--dp", "12"), "dp_size is 12; allowed: a divisor of 128"),
        (("--policy", "never"), "policy is 'never'"),
        (("--routing", "random"), "routing is 'random'"),
        (("--json", str(tmp_path)), "--json is"),
    ):
        result = CliRunner().invoke(app, ["published", *arguments])
        assert result.exit_code == 2
        assert message in result.output
