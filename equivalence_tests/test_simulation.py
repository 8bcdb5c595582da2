"""Simulated runs and their numbers: one computed by hand, and what must hold of any."""

import dataclasses
import math
import statistics
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from ascend_twin.reference.errors import InvalidArgumentError
from ascend_twin.scheduler.config import SchedulerConfig
from ascend_twin.scheduler.cost import CostModel
from ascend_twin.scheduler.latencies import is_frozen, measure, tpot_ms, ttft_ms, wait_ms
from ascend_twin.scheduler.simulation import Simulation, SimulationResult, SimulationSetup
from ascend_twin.scheduler.traces import TraceRequest
from ascend_twin.scheduler.workloads import make_requests

POLICIES = ("open_gate", "any_rank_at_cap", "any_rank_near_cap", "cadence:interval=3")
COST = CostModel(
    step_ms=10,
    prefill_step_ms=5,
    prefill_us_per_token=1_000,
    prefill_ns_per_pair=100_000,
    expert_us_per_token=500,
    decode_us_per_request=2_000,
    decode_ns_per_context_token=10_000,
)
"""10 ms a step, 5 more with prefill; 1 ms a prompt token, 0.1 a pair; 0.5 of experts for a token a rank; 2 ms
a request that decodes, 0.01 a token of its context."""


def _requests(*lengths: tuple[int, int, int]) -> list[TraceRequest]:
    """From (arrival ms, prompt tokens, output tokens), each prompt at most 512; nobody shares a prefix."""
    return [TraceRequest(*request, hash_ids=(i,)) for i, request in enumerate(lengths)]


def _run(
    requests: Sequence[TraceRequest],
    *,
    dp_size: int = 2,
    policy: str = "open_gate",
    routing: str = "round_robin",
    concurrency: int | None = None,
    seed: int = 0,
    cost: CostModel = COST,
    **config: Any,
) -> SimulationResult:
    config = {"num_blocks": 2_000, "max_model_len": 1_024, "max_num_seqs": 4, "log_stats": False, **config}
    setup = SimulationSetup(
        dp_size=dp_size,
        policy=policy,
        cost=cost,
        config=SchedulerConfig(**config),
        routing=routing,
        concurrency=concurrency,
        seed=seed,
    )
    return Simulation(setup, requests).run()


def _chats(count: int = 60, seed: int = 0) -> list[TraceRequest]:
    return make_requests("lognormal:prompt=60,prompt_sigma=0.5,output=20,rate=30", seed, count)


def _assert_same(a: SimulationResult, b: SimulationResult) -> None:
    for field in dataclasses.fields(SimulationResult):
        if field.name != "setup":
            np.testing.assert_array_equal(getattr(a, field.name), getattr(b, field.name), err_msg=field.name)


# By hand


def test_simulation_is_what_is_computed_by_hand() -> None:
    """Two ranks, 8 tokens a step: rank 0 gets requests 0 and 2, rank 1 request 1.

    Step 0: rank 0 computes 8 of 12 prompt tokens (36 pairs), rank 1 all 3 (6 pairs).
    Step 1: rank 0 the other 4 (9 + 10 + 11 + 12 pairs) and the 2 of request 2 (3 pairs), which came in
    between; rank 1 decodes behind 3 prompt tokens.
    Steps 2 and 3: rank 0 decodes alone.
    """
    requests = _requests((0, 12, 3), (0, 3, 2), (20, 2, 1))
    result = _run(requests, max_num_batched_tokens=8, enable_prefix_caching=False)
    rank_ms = [[8 + 3.6, 3 + 0.6], [6 + 4.5, 2 + 0.04], [2 + 0.13, 0], [2 + 0.14, 0]]
    step_ms = [10 + 5 + 2.75 + 11.6, 10 + 5 + 1.75 + 10.5, 10 + 0.25 + 2.13, 10 + 0.25 + 2.14]
    ends = [29.35, 56.6, 68.98, 81.37]
    np.testing.assert_allclose(result.rank_ms, rank_ms)
    np.testing.assert_allclose(result.step_ms, step_ms)
    np.testing.assert_allclose(result.step_start_ms, [0, *ends[:-1]])
    parts = [[10, 5, 2.75, 11.6, 0], [10, 5, 1.75, 10.5, 0], [10, 0, 0.25, 0, 2.13], [10, 0, 0.25, 0, 2.14]]
    np.testing.assert_allclose(result.step_parts_ms, parts)
    assert result.prefill_tokens.tolist() == [[8, 3], [6, 0], [0, 0], [0, 0]]
    assert result.decode_requests.tolist() == [[0, 0], [0, 1], [1, 0], [1, 0]]
    assert result.running.tolist() == [[1, 1], [2, 1], [1, 0], [1, 0]]
    assert not result.waiting.any()
    assert result.step_is_open.all()
    assert result.rank.tolist() == [0, 1, 0]
    assert result.sent_ms.tolist() == [0, 0, 20]
    np.testing.assert_allclose(result.admitted_ms, [0, 0, 29.35])
    np.testing.assert_allclose(result.first_token_ms, [56.6, 29.35, 56.6])
    np.testing.assert_allclose(result.finished_ms, [81.37, 56.6, 56.6])
    np.testing.assert_allclose(result.itl_ms, [27.25, 12.38, 12.39])

    metrics = measure(result)
    assert (metrics.num_requests, metrics.num_prompt_tokens, metrics.num_output_tokens) == (3, 17, 6)
    assert (metrics.num_steps, metrics.num_prefill_steps, metrics.num_frozen_steps) == (4, 2, 0)
    assert metrics.duration_s == pytest.approx(0.08137)
    assert metrics.output_tokens_per_s == pytest.approx(6 / 0.08137)
    assert metrics.requests_per_s == pytest.approx(3 / 0.08137)
    assert metrics.ttft.mean_ms == pytest.approx((56.6 + 29.35 + 36.6) / 3)
    assert metrics.ttft.p50_ms == pytest.approx(36.6)
    assert metrics.queue.mean_ms == pytest.approx(9.35 / 3)
    assert metrics.e2e.p50_ms == pytest.approx(56.6)
    assert metrics.tpot is not None
    assert metrics.tpot.mean_ms == pytest.approx(((81.37 - 56.6) / 2 + 27.25) / 2)
    assert metrics.idle_share == pytest.approx((0, (8 + 8.46 + 2.13 + 2.14) / 81.37))
    assert metrics.no_work_share == pytest.approx(0)


def test_a_single_prompt_token_is_prefill() -> None:
    result = _run(_requests((0, 1, 2), (0, 9, 2)), max_num_batched_tokens=8, enable_prefix_caching=False)
    assert result.prefill_tokens.tolist() == [[1, 8], [0, 1], [0, 0]]
    assert result.decode_requests.tolist() == [[0, 0], [1, 0], [0, 1]]


def test_simulation_waits_for_the_gate_as_computed_by_hand() -> None:
    """At most one request a rank: request 1 has an empty rank, but rank 0 is at its cap for three steps."""
    requests = _requests((0, 2, 3), (1, 2, 1))
    result = _run(requests, policy="any_rank_at_cap", max_num_seqs=1, cost=CostModel(step_ms=10))
    assert result.step_is_open.tolist() == [True, False, False, True]
    assert result.waiting.tolist() == [[0, 0], [0, 1], [0, 1], [0, 0]]
    assert is_frozen(result).tolist() == [False, True, True, False]
    assert result.sent_ms.tolist() == [0, 1]
    assert result.admitted_ms.tolist() == [0, 30]
    assert result.finished_ms.tolist() == [30, 40]
    assert measure(result).queue.mean_ms == (0 + 29) / 2
    assert _run(requests, max_num_seqs=1, cost=CostModel(step_ms=10)).finished_ms.tolist() == [30, 20]


def test_a_shut_gate_is_not_frozen_where_nobody_waits() -> None:
    result = _run(_requests((0, 2, 3)), policy="any_rank_at_cap", max_num_seqs=1)
    assert result.step_is_open.tolist() == [True, False, False]
    assert measure(result).num_frozen_steps == 0


def test_time_without_work_passes_at_once() -> None:
    """Both requests take two steps of 10 ms; the wave goes on for 30 more, then all ranks are idle."""
    result = _run(_requests((0, 2, 2), (1_000, 2, 2)), cost=CostModel(step_ms=10))
    assert len(result.step_ms) == 32 + 2
    assert result.step_start_ms[32] == 1_000
    assert result.duration_ms == 1_020
    assert measure(result).no_work_share == pytest.approx((1_000 - 320) / 1_020)
    assert result.decode_requests[2:32].sum() == 0


# What must hold of any


@pytest.mark.parametrize("routing", ["round_robin", "least_loaded", "skewed"])
@pytest.mark.parametrize("policy", POLICIES)
def test_every_request_gets_its_tokens_and_time_adds_up(policy: str, routing: str) -> None:
    requests = _chats()
    result = _run(requests, dp_size=3, policy=policy, routing=routing)
    output = np.array([request.num_output_tokens for request in requests])
    np.testing.assert_array_equal(result.output_tokens, output)
    assert result.prefill_tokens.sum() == sum(request.num_prompt_tokens for request in requests)
    assert result.decode_requests.sum() == (output - 1).sum() == len(result.itl_ms)
    assert (result.sent_ms <= result.admitted_ms).all()
    assert (result.admitted_ms < result.first_token_ms).all()
    np.testing.assert_allclose(
        ttft_ms(result).sum() + result.itl_ms.sum(), (result.finished_ms - result.sent_ms).sum()
    )
    assert result.finished_ms.max() == result.duration_ms
    ends = result.step_start_ms + result.step_ms
    assert (result.step_start_ms[1:] >= ends[:-1] - 1e-9).all()
    assert (result.running <= 4).all()


def test_a_step_takes_its_parts_and_waits_for_the_slowest_rank() -> None:
    result = _run(_chats(), dp_size=3)
    np.testing.assert_array_equal(result.step_ms, result.step_parts_ms.sum(1))
    np.testing.assert_allclose(result.step_parts_ms[:, 3:].sum(1), result.rank_ms.max(1))
    prefills = (result.prefill_tokens > 0).any(1)
    np.testing.assert_array_equal(result.step_parts_ms[:, 1], np.where(prefills, 5.0, 0.0))
    mean_tokens = (result.prefill_tokens + result.decode_requests).mean(1)
    np.testing.assert_allclose(result.step_parts_ms[:, 2], 0.5 * mean_tokens)


def test_a_preempted_request_is_computed_again_and_gets_all_its_tokens() -> None:
    requests = _requests(*((0, 100, 100) for _ in range(8)))
    result = _run(requests, num_blocks=41, max_model_len=400, block_size=10)
    assert result.num_preemptions.sum() > 0
    assert result.prefill_tokens.sum() > 800
    assert len(result.itl_ms) == 8 * 99
    assert measure(result).num_preemptions == result.num_preemptions.sum()
    # Time goes on in between: no token is early, and none is told twice.
    np.testing.assert_allclose(result.itl_ms.sum(), (result.finished_ms - result.first_token_ms).sum())


def test_open_loop_sends_each_request_when_it_arrives() -> None:
    requests = _chats()[::-1]
    result = _run(requests)
    assert result.sent_ms.tolist() == [request.arrival_ms for request in requests]
    by_arrival = np.argsort(result.sent_ms, kind="stable")
    assert result.rank[by_arrival].tolist() == [i % 2 for i in range(len(requests))]


@pytest.mark.parametrize("concurrency", [1, 5, 1_000])
def test_closed_loop_keeps_so_many_under_way_and_never_more(concurrency: int) -> None:
    result = _run(_chats(), concurrency=concurrency)
    moments = np.unique(result.sent_ms)
    under_way = [
        int(((result.sent_ms <= now) & (result.finished_ms > now)).sum())
        for now in moments  # at the end of a step, those that end then are gone
    ]
    assert max(under_way) == min(concurrency, 60)
    assert set(under_way[:-1]) <= {concurrency, 60}
    assert np.isin(moments[1:], result.finished_ms).all()


@pytest.mark.parametrize("routing", ["round_robin", "least_loaded", "skewed"])
def test_the_same_seed_gives_the_same_result(routing: str) -> None:
    results = [_run(_chats(), dp_size=3, routing=routing, seed=7) for _ in range(2)]
    _assert_same(*results)


def test_another_seed_routes_otherwise_when_skewed_and_only_then() -> None:
    ranks = {
        routing: [_run(_chats(), dp_size=3, routing=routing, seed=seed).rank.tolist() for seed in (1, 2)]
        for routing in ("round_robin", "skewed")
    }
    assert ranks["round_robin"][0] == ranks["round_robin"][1]
    assert ranks["skewed"][0] != ranks["skewed"][1]


def test_skewed_routing_gives_half_to_rank_0_and_the_rest_to_the_others_alike() -> None:
    requests = _requests(*((i, 1, 1) for i in range(3_000)))
    counts = np.bincount(_run(requests, dp_size=4, routing="skewed", max_num_seqs=64).rank, minlength=4)
    assert abs(counts[0] - 1_500) < 3 * math.sqrt(3_000 / 4)
    assert (abs(counts[1:] - 500) < 3 * math.sqrt(3_000 * 5 / 36)).all()
    assert not _run(requests[:20], dp_size=1, routing="skewed").rank.any()


def test_least_loaded_counts_a_waiting_request_four_times() -> None:
    """At first all wait, and ranks take turns. Later rank 0 runs three long ones and rank 1 nothing: of two
    that come together the first goes to rank 1, where it waits (4), and the second to rank 0 (3)."""
    first = [(0, 4, 100 if i % 2 == 0 else 1) for i in range(6)]
    result = _run(_requests(*first, (500, 4, 1), (500, 4, 1)), routing="least_loaded", max_num_seqs=8)
    assert result.rank.tolist() == [0, 1, 0, 1, 0, 1, 1, 0]
    assert result.finished_ms[0] > 500 > result.finished_ms[5]


@pytest.mark.parametrize("policy", ["any_rank_at_cap", "any_rank_near_cap", "cadence:interval=1"])
def test_one_rank_below_its_cap_does_the_same_by_every_policy(policy: str) -> None:
    runs = [_run(_chats(), dp_size=1, policy=p, max_num_seqs=64) for p in ("open_gate", policy)]
    assert runs[0].running.max() < 63
    _assert_same(*runs)


def test_policies_change_times_and_not_tokens() -> None:
    runs = [_run(_chats(), policy=policy) for policy in POLICIES]
    for run in runs:
        np.testing.assert_array_equal(run.output_tokens, runs[0].output_tokens)
        assert len(run.itl_ms) == len(runs[0].itl_ms)
    assert len({run.duration_ms for run in runs}) > 1


def test_a_prefix_that_is_cached_is_not_computed_again() -> None:
    requests = [TraceRequest(1_000 * i, 512 + 64, 2, (0, 1 + i)) for i in range(3)]
    result = _run(requests, dp_size=1, block_size=64, num_blocks=64)
    assert result.cached_tokens.tolist() == [0, 512, 512]
    assert result.prefill_tokens.sum() == 576 + 64 + 64
    assert measure(result).num_cached_tokens == 1_024
    cold = _run(requests, dp_size=1, block_size=64, num_blocks=64, enable_prefix_caching=False)
    assert not cold.cached_tokens.any()


# Numbers


def _percentile(values: Sequence[float], percent: int) -> float:
    """Linear between the two nearest ranks."""
    ordered = sorted(values)
    place = (len(ordered) - 1) * percent / 100
    low, part = int(place), place - int(place)
    return ordered[low] + part * (ordered[min(low + 1, len(ordered) - 1)] - ordered[low])


def test_metrics_are_their_plain_formulas() -> None:
    result = _run(
        [*_chats(), *_requests((0, 5, 1), (0, 6, 2))], dp_size=3, policy="any_rank_at_cap", max_num_seqs=3
    )
    metrics = measure(result)
    requests = list(
        zip(
            result.sent_ms.tolist(),
            result.admitted_ms.tolist(),
            result.first_token_ms.tolist(),
            result.finished_ms.tolist(),
            result.output_tokens.tolist(),
            strict=True,
        )
    )
    assert min(tokens for *_, tokens in requests) == 1  # such a request has no TPOT
    expected = {
        "ttft": [first - sent for sent, _, first, _, _ in requests],
        "tpot": [(last - first) / (n - 1) for _, _, first, last, n in requests if n > 1],
        "itl": result.itl_ms.tolist(),
        "e2e": [last - sent for sent, _, _, last, _ in requests],
        "queue": [admitted - sent for sent, admitted, _, _, _ in requests],
    }
    for name, times in expected.items():
        latency = getattr(metrics, name)
        assert latency.mean_ms == pytest.approx(statistics.fmean(times)), name
        for percent in (50, 90, 99):
            assert getattr(latency, f"p{percent}_ms") == pytest.approx(_percentile(times, percent)), name
    waits = [[max(step) - own for own in step] for step in result.rank_ms.tolist()]
    for rank, share in enumerate(metrics.idle_share):
        assert share == pytest.approx(sum(step[rank] for step in waits) / result.duration_ms)
    assert metrics.output_tokens_per_s == pytest.approx(sum(x[-1] for x in requests) / metrics.duration_s)
    shut_and_waited = [
        not is_open and sum(waiting) > 0
        for is_open, waiting in zip(result.step_is_open, result.waiting.tolist(), strict=True)
    ]
    assert metrics.num_frozen_steps == sum(shut_and_waited) > 0
    assert metrics.num_prefill_steps == sum(max(step) > 0 for step in result.prefill_tokens.tolist())


def test_metrics_of_single_tokens_have_no_time_between_tokens() -> None:
    result = _run(_requests((0, 3, 1), (0, 3, 1)))
    assert measure(result).tpot is None
    assert measure(result).itl is None
    assert len(tpot_ms(result)) == 0
    assert measure(result).to_json()["tpot"] is None


def test_somebody_never_waits_in_any_step() -> None:
    waits = wait_ms(_run(_chats(), dp_size=3))
    assert (waits.min(1) == 0).all()
    assert (waits.max(1) > 0).any()


def test_metrics_are_refused_where_no_time_passed() -> None:
    result = _run(_requests((0, 3, 1)), cost=CostModel(step_ms=0))
    with pytest.raises(InvalidArgumentError, match="allowed: a cost model by which steps take time"):
        measure(result)


# Bad input


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"dp_size": 0}, "dp_size is 0; allowed: an int >= 1"),
        ({"policy": "sometimes"}, "policy is 'sometimes'; allowed: one of open_gate"),
        ({"policy": "any_rank_near_cap", "max_num_seqs": 1}, "max_num_running_reqs is 1; allowed: >= 2"),
        ({"routing": "random"}, "routing is 'random'; allowed: one of round_robin, least_loaded, skewed"),
        ({"concurrency": 0}, "concurrency is 0; allowed: an int >= 1"),
        ({"seed": -1}, "seed is -1; allowed: an int >= 0"),
        ({"max_model_len": 14}, "request 1 is 12 prompt and 3 output tokens; allowed: together at most 14"),
        ({"num_blocks": 2, "block_size": 14, "max_model_len": 14}, "request 1 is 12 prompt and 3 output"),
    ],
)
def test_wrong_input_is_refused_by_name(given: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        _run(_requests((0, 3, 2), (0, 12, 3)), **given)
    assert str(caught.value).startswith(message)


def test_no_requests_are_refused() -> None:
    with pytest.raises(InvalidArgumentError, match="requests is empty; allowed: at least one request"):
        _run([])
