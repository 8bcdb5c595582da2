"""vLLM's real data-parallel engine, two processes, coordinator and gloo, with balance scheduling on."""

from pathlib import Path
from typing import Any

import pytest

from ascend_twin.equivalence_tests import vllm_data_parallel
from ascend_twin.equivalence_tests.paged_model import expected_output

pytestmark = pytest.mark.vllm

Reports = list[dict[str, Any]]


@pytest.mark.parametrize("is_async", [False, True], ids=["sync", "async"])
def test_data_parallel_engine_balances_through_three_waves_and_a_death(
    tmp_path: Path, is_async: bool
) -> None:
    """One test, for an engine costs most of a minute: the ranks must not be started for each part of it."""
    run = vllm_data_parallel.run(tmp_path, is_async=is_async)
    _check_outputs(run["said"])
    for reports in run["reports"]:
        _check_gathers(reports, "AsyncBalanceScheduler" if is_async else "BalanceScheduler")
    _check_frozen_and_drained(*run["reports"])
    _check_death(run)


def _check_outputs(said: dict[str, list[int]]) -> None:
    specs = [spec for wave in vllm_data_parallel.waves() for _, spec in wave]
    assert said == {spec.request_id: expected_output(spec, vllm_data_parallel.CONFIG)[0] for spec in specs}


def _check_gathers(reports: Reports, scheduler: str) -> None:
    """After a wave: both ranks made the same steps, and gathered once in each."""
    steps = [report["batches"] + report["dummies"] for report in reports]
    assert [report["scheduler"] for report in reports] == [scheduler] * 2
    assert [report["gathers"] for report in reports] == steps
    assert steps[0] == steps[1] > 0
    assert reports[0]["wave"] == reports[1]["wave"]


def _check_frozen_and_drained(skewed: Reports, drained: Reports, both: Reports) -> None:
    """Where a rank was full and others waited, it admitted none; where it had nothing, it ran dummies."""
    assert skewed[0]["frozen"] > 0
    assert drained[0]["batches"] == skewed[0]["batches"]
    assert drained[0]["dummies"] > skewed[0]["dummies"]
    assert drained[1]["frozen"] > skewed[1]["frozen"]
    assert all(both[i]["frozen"] > drained[i]["frozen"] for i in range(2))
    assert skewed[0]["wave"] < drained[0]["wave"] < both[0]["wave"]


def _check_death(run: dict[str, Any]) -> None:
    """Clients of both ranks were told, soon, and no process is left."""
    assert all(told.startswith("EngineDeadError") for told in run["death"])
    assert run["death_s"] < 20
    assert not run["leftover"]
