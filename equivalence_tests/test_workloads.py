"""Named workloads: what their docstrings say of lengths and arrivals, and what is refused."""

import math
import statistics
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest

from ascend_twin.reference.errors import InvalidArgumentError
from ascend_twin.scheduler.traces import TraceRequest, generate_requests
from ascend_twin.scheduler.workload import mix_from_trace
from ascend_twin.scheduler.workloads import (
    MOST_OUTPUT_TOKENS,
    MOST_PROMPT_TOKENS,
    WORKLOADS,
    burst_requests,
    fixed_requests,
    lognormal_requests,
    long_prompt_requests,
    make_requests,
)

COUNT = 20_000
NOT_BY_CHANCE = 4.5
"""Standard errors that a mean may be off: with fixed seeds a test passes always or never."""


def _lengths(requests: list[TraceRequest]) -> tuple[list[int], list[int]]:
    return [r.num_prompt_tokens for r in requests], [r.num_output_tokens for r in requests]


def _assert_lognormal(lengths: list[int], median: float, sigma: float) -> None:
    logs = [math.log(length) for length in lengths]
    error = sigma / math.sqrt(len(logs))
    assert abs(statistics.fmean(logs) - math.log(median)) < NOT_BY_CHANCE * error
    assert abs(statistics.stdev(logs) - sigma) < NOT_BY_CHANCE * error
    skew = statistics.fmean(((x - math.log(median)) / sigma) ** 3 for x in logs)
    assert abs(skew) < NOT_BY_CHANCE * math.sqrt(15 / len(logs))


def _assert_poisson(times_ms: list[int], mean_gap_ms: float) -> None:
    """Gaps are exponential: by their mean, and by how many are longer than it."""
    assert times_ms == sorted(times_ms)
    gaps = [b - a for a, b in zip([0, *times_ms], times_ms, strict=False)]
    assert abs(statistics.fmean(gaps) / mean_gap_ms - 1) < NOT_BY_CHANCE / math.sqrt(len(gaps))
    is_long = statistics.fmean(gap > mean_gap_ms for gap in gaps)
    assert abs(is_long - math.exp(-1)) < NOT_BY_CHANCE * 0.5 / math.sqrt(len(gaps))


@pytest.mark.parametrize("name", WORKLOADS)
def test_workload_is_a_function_of_its_seed_and_can_be_simulated(name: str) -> None:
    requests = make_requests(name, seed=3)
    assert requests == make_requests(name, seed=3)
    assert requests != make_requests(name, seed=4)
    assert len(requests) == WORKLOADS[name].count
    assert make_requests(name, seed=3, count=7) == requests[:7]
    mix_from_trace(requests)
    assert WORKLOADS[name].summary


@pytest.mark.parametrize("name", WORKLOADS)
def test_no_two_prompts_of_a_workload_share_a_prefix(name: str) -> None:
    ids = [i for request in make_requests(name, count=300) for i in request.hash_ids]
    assert len(set(ids)) == len(ids)


@pytest.mark.parametrize("name", WORKLOADS)
def test_defaults_of_a_workload_can_be_given_by_name(name: str) -> None:
    given = ",".join(f"{key}={value}" for key, value in WORKLOADS[name].parameters.items())
    assert make_requests(f"{name}:{given}" if given else name, 5, 20) == make_requests(name, 5, 20)


def test_fixed_has_one_length_and_poisson_arrivals() -> None:
    requests = make_requests("fixed:prompt=700,output=30,rate=5", count=COUNT)
    assert {(r.num_prompt_tokens, r.num_output_tokens, len(r.hash_ids)) for r in requests} == {(700, 30, 2)}
    _assert_poisson([r.arrival_ms for r in requests], 200)
    assert WORKLOADS["fixed"].parameters == {"prompt": 2_000, "output": 500, "rate": 2.0}


def test_lognormal_has_medians_and_spreads_as_told() -> None:
    spec = "lognormal:prompt=1500,prompt_sigma=0.4,output=600,output_sigma=0.9,rate=10"
    requests = make_requests(spec, count=COUNT)
    prompts, outputs = _lengths(requests)
    _assert_lognormal(prompts, 1_500, 0.4)
    _assert_lognormal(outputs, 600, 0.9)
    _assert_poisson([r.arrival_ms for r in requests], 100)
    correlation = statistics.correlation(list(map(math.log, prompts)), list(map(math.log, outputs)))
    assert abs(correlation) < NOT_BY_CHANCE / math.sqrt(COUNT)


def test_lognormal_defaults_are_those_of_its_docstring() -> None:
    prompts, outputs = _lengths(make_requests("lognormal", count=COUNT))
    _assert_lognormal(prompts, 1_000, 1.0)
    _assert_lognormal(outputs, 250, 0.7)


def test_lognormal_cuts_what_is_too_long_or_empty() -> None:
    requests = lognormal_requests(0, 2_000, prompt=30_000, prompt_sigma=3, output=2, output_sigma=3)
    prompts, outputs = _lengths(requests)
    assert max(prompts) == MOST_PROMPT_TOKENS
    assert min(outputs) == 1
    assert max(outputs) <= MOST_OUTPUT_TOKENS


def test_lognormal_without_spread_is_fixed() -> None:
    requests = lognormal_requests(0, 50, prompt=9, prompt_sigma=0, output=4, output_sigma=0)
    assert {(r.num_prompt_tokens, r.num_output_tokens) for r in requests} == {(9, 4)}


def test_bursts_come_together_and_as_a_poisson_process() -> None:
    requests = make_requests("bursts:size=5,gap_s=2", count=COUNT)
    arrivals = [r.arrival_ms for r in requests]
    first = arrivals[::5]
    assert arrivals == [ms for ms in first for _ in range(5)]
    _assert_poisson(first, 2_000)
    prompts, outputs = _lengths(requests)
    _assert_lognormal(prompts, 1_000, 1.0)
    _assert_lognormal(outputs, 250, 0.7)


def test_bursts_default_to_32_requests_every_10_s_and_the_last_may_be_short() -> None:
    counts = list(Counter(r.arrival_ms for r in burst_requests(0, 32 * 2_000 + 3)).values())
    assert counts[-1] == 3
    assert Counter(counts[:-1]).most_common(1)[0][0] == 32
    assert burst_requests(0, 32 * 2_000)[-1].arrival_ms / 2_000 == pytest.approx(10_000, rel=0.1)


def test_long_prompts_are_rare_among_chats() -> None:
    requests = make_requests("long_prompt:long=9999,every=20,prompt=50,rate=8", count=COUNT)
    prompts, outputs = _lengths(requests)
    num_long = prompts.count(9_999)
    assert abs(num_long - COUNT / 20) < NOT_BY_CHANCE * math.sqrt(COUNT / 20)
    _assert_lognormal([length for length in prompts if length != 9_999], 50, 1.0)
    _assert_lognormal(outputs, 250, 0.7)
    _assert_poisson([r.arrival_ms for r in requests], 125)
    every = long_prompt_requests(0, 10, every=1)
    assert {r.num_prompt_tokens for r in every} == {32_000}


def test_published_has_the_published_prompts_and_outputs_that_vary_a_little() -> None:
    requests = make_requests("published:spread=0.05", count=COUNT)
    prompts, outputs = _lengths(requests)
    assert set(prompts) == {3_500}
    assert {r.arrival_ms for r in requests} == {0}
    assert abs(statistics.fmean(outputs) - 1_500) < NOT_BY_CHANCE * 75 / math.sqrt(COUNT)
    assert abs(statistics.stdev(outputs) - 75) < NOT_BY_CHANCE * 75 / math.sqrt(2 * COUNT)
    assert {r.num_output_tokens for r in make_requests("published:spread=0", count=9)} == {1_500}
    assert WORKLOADS["published"].count == 512


def test_conversation_is_the_generator_of_traces() -> None:
    assert make_requests("conversation", 9, 40) == generate_requests(9, 40)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("mixed", "workload is 'mixed'; allowed: one of fixed, lognormal, "),
        ("", "workload is ''; allowed: one of fixed"),
        ("fixed:size=3", "workload is 'fixed:size=3'; allowed: fixed with prompt, output, rate, each once"),
        ("fixed:", "workload is 'fixed:'; allowed: fixed with prompt, output, rate, each once"),
        ("fixed:prompt=1,prompt=2", "workload is 'fixed:prompt=1,prompt=2'; allowed: fixed with prompt"),
        ("fixed:prompt=2.5", "workload is 'fixed:prompt=2.5'; allowed: an int for prompt"),
        ("fixed:rate", "workload is 'fixed:rate'; allowed: a number for rate"),
        ("conversation:rate=1", "workload is 'conversation:rate=1'; allowed: conversation alone"),
        ("fixed:prompt=0", "prompt is 0; allowed: an int from 1 to 131072"),
        ("fixed:output=40000", "output is 40000; allowed: an int from 1 to 32768"),
        ("fixed:rate=0", "rate is 0.0; allowed: a number from 0.001 to 10000"),
        ("fixed:rate=nan", "rate is nan; allowed: a number from"),
        ("lognormal:prompt_sigma=-1", "prompt_sigma is -1.0; allowed: a number from 0 to 3"),
        ("lognormal:output_sigma=inf", "output_sigma is inf; allowed: a number from 0 to 3"),
        ("bursts:size=0", "size is 0; allowed: an int >= 1"),
        ("bursts:gap_s=1e9", "gap_s is 1000000000.0; allowed: a number from 0.001 to 10000"),
        ("long_prompt:every=0", "every is 0; allowed: an int >= 1"),
        ("long_prompt:long=200000", "long is 200000; allowed: an int from 1 to 131072"),
    ],
)
def test_a_wrong_workload_is_refused_by_name(spec: str, message: str) -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        make_requests(spec)
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize(("given", "message"), [({"seed": -1}, "seed is -1"), ({"count": 0}, "count is 0")])
def test_a_wrong_seed_or_count_is_refused_by_name(given: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidArgumentError, match=message):
        make_requests("fixed", **given)


@pytest.mark.parametrize(
    "generate", [fixed_requests, lognormal_requests, burst_requests, long_prompt_requests]
)
def test_a_generator_makes_none_and_refuses_fewer(generate: Callable[..., list[TraceRequest]]) -> None:
    assert generate(0, 0) == []
    with pytest.raises(InvalidArgumentError, match="count is -1"):
        generate(0, -1)
