"""`vllm serve` with the plugin: streamed completions, its metrics, and what it refuses."""

import json
import re
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from ascend_twin.equivalence_tests.paged_model import expected_output
from ascend_twin.equivalence_tests.vllm_server import CONFIG, Server, ServerError
from ascend_twin.scheduler.workload import RequestSpec

pytestmark = pytest.mark.vllm

VARIABLE = "VLLM_ASCEND_BALANCE_SCHEDULING"
SCHEDULER = "ascend_twin.optimized.vllm.BalanceScheduler"
METRICS = ("gathers", "frozen_steps", "gather_seconds", "frozen_request_seconds")


def _completions(server: Server, num_ranks: int) -> None:
    """Nine streamed completions at once, most on rank 0: each is the oracle's, in pieces."""
    specs = [RequestSpec(f"r{i}", 0, ((i % 2, 20 + i), (i, 5)), max_tokens=16 + i) for i in range(9)]
    ranks = [int(i % 4 == 0) % num_ranks for i in range(9)]
    with ThreadPoolExecutor(len(specs)) as pool:
        said = list(pool.map(lambda spec, rank: list(server.complete(spec, rank)), specs, ranks))
    for spec, pieces in zip(specs, said, strict=True):
        tokens = [int(digits) for digits in re.findall(r"\d+", "".join(pieces))]
        assert tokens == expected_output(spec, CONFIG)[0]
    assert max(map(len, said)) > 1  # vLLM joins what a slow client has not read yet


def _metrics(server: Server) -> dict[tuple[str, int], float]:
    """Ours, by name and engine."""
    pattern = r'^ascend_twin:balance_(\w+)_total\{engine="(\d)",model_name="stub"\} (\S+)$'
    found = re.findall(pattern, server.get("/metrics"), re.MULTILINE)
    return {(name, int(engine)): float(value) for name, engine, value in found}


def _balanced_metrics(server: Server, folder: Path) -> dict[tuple[str, int], float]:
    """Ours, once they say what the ranks have done."""
    deadline = time.monotonic() + 20
    while True:
        metrics = _metrics(server)
        done = [json.loads((folder / f"rank{i}.json").read_text()) for i in range(2)]
        # The last statistics of a rank are those of its last batch, and made before the gather after it.
        least = [rank["batches"] - 1 for rank in done]
        most = [rank["batches"] + rank["dummies"] for rank in done]
        gathers = [metrics.get(("gathers", i), -1.0) for i in range(2)]
        # Until the wave is over, one rank may be a dummy batch ahead.
        is_over = most[0] == most[1] and all(gathers[i] >= least[i] for i in range(2))
        if is_over or time.monotonic() > deadline:
            break
        time.sleep(0.2)
    assert metrics.keys() == {(name, i) for name in METRICS for i in range(2)}
    assert all(least[i] <= gathers[i] <= most[i] for i in range(2)), (least, gathers, most)
    assert most[0] == most[1]
    return metrics


def _check_balanced(server: Server, folder: Path) -> None:
    _completions(server, 2)
    metrics = _balanced_metrics(server, folder)
    assert 0 < metrics["frozen_steps", 0] < metrics["gathers", 0]
    assert metrics["frozen_request_seconds", 0] > 0
    assert all(metrics["gather_seconds", i] > 0 for i in range(2))


def test_serve_balances_when_the_variable_is_1(tmp_path: Path) -> None:
    """With as many API servers as ranks, as vLLM starts them."""
    with Server(tmp_path, environment={VARIABLE: "1"}) as server:
        _check_balanced(server, tmp_path)
    assert not server.leftover


@pytest.mark.vllm032  # each takes most of a minute; the way of the choice is the same in 0.17.0
def test_serve_balances_with_our_scheduler_class(tmp_path: Path) -> None:
    with Server(tmp_path, "--scheduler-cls", SCHEDULER, "--api-server-count", "1") as server:
        _check_balanced(server, tmp_path)
    assert not server.leftover


@pytest.mark.vllm032
def test_serve_does_not_balance_when_the_variable_is_0(tmp_path: Path) -> None:
    with Server(tmp_path, "--data-parallel-size", "1", environment={VARIABLE: "0"}) as server:
        _completions(server, 1)
        assert "vllm:generation_tokens_total" in server.get("/metrics")
        assert not _metrics(server)
        assert "Balance scheduling" not in server.log
    assert not server.leftover


def test_serve_refuses_to_start_without_the_engine_hook(tmp_path: Path) -> None:
    """The scheduler is there, but VLLM_PLUGINS keeps the plugin out."""
    with pytest.raises(ServerError) as error:
        Server(tmp_path, "--scheduler-cls", SCHEDULER, "--api-server-count", "1", plugins=())
    assert "balance scheduling with data_parallel_size = 2 needs the plugin" in str(error.value)
