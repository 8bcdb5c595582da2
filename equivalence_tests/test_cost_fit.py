"""Fits of the step cost model: known parameters come back, from steps and from the row of a simulation."""

import json
import re
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ascend_twin.reference.errors import InvalidArgumentError, TraceError
from ascend_twin.scheduler.config import SchedulerConfig
from ascend_twin.scheduler.cost import PARAMETERS, CostModel, RankWork
from ascend_twin.scheduler.cost_fit import BenchmarkRow, RowFit, fit_row, fit_steps, simulated_row
from ascend_twin.scheduler.measured_steps import MeasuredStep, read_measured_steps
from ascend_twin.scheduler.simulation import Simulation, SimulationSetup
from ascend_twin.scheduler.traces import BLOCK_TOKENS, TraceRequest

TYPICAL = CostModel(
    step_ms=40.0,
    prefill_step_ms=10.0,
    prefill_us_per_token=30.0,
    prefill_ns_per_pair=2.0,
    expert_us_per_token=100.0,
    decode_us_per_request=100.0,
    decode_ns_per_context_token=20.0,
)
STEP = {"prefill_tokens": 3, "prefill_pairs": 6, "decode_requests": 2, "context_tokens": 50}
GOOD = {"step_ms": 7.5, "ranks": [STEP, dict.fromkeys(STEP, 0)]}


def _rank(rng: Random, prefills: bool) -> RankWork:
    tokens = rng.randrange(1, 4_000) if prefills and rng.random() < 0.6 else 0
    requests = rng.randrange(64)
    context = requests * rng.randrange(1, 8_000)
    return RankWork(tokens, tokens * rng.randrange(1, 8_000), requests, context)


def _steps(model: CostModel, seed: int, count: int, ranks: int = 4, noise: float = 0.0) -> list[MeasuredStep]:
    rng = Random(seed)
    steps = []
    for _ in range(count):
        prefills = rng.random() < 0.5
        work = tuple(_rank(rng, prefills) for _ in range(ranks))
        steps.append(MeasuredStep(model.step(work).total * (1 + rng.gauss(0, noise)), work))
    return steps


def _drawn(seed: int) -> CostModel:
    """A model around the typical one; any of its parameters but `step_ms` may be 0."""
    rng = Random(seed)
    values = {
        name: getattr(TYPICAL, name) * rng.uniform(0.2, 3) * (rng.random() < 0.85) for name in PARAMETERS
    }
    return CostModel(**{**values, "step_ms": 40.0 * rng.uniform(0.2, 3)})


def _values(model: CostModel) -> np.ndarray:
    return np.array([getattr(model, name) for name in PARAMETERS])


# Measured steps


def test_read_measured_steps_returns_every_step_in_order(tmp_path: Path) -> None:
    path = tmp_path / "steps.jsonl"
    idle = {"step_ms": 5, "ranks": [dict.fromkeys(STEP, 0)] * 2, "step": 8}
    path.write_text(json.dumps(GOOD) + "\n\n" + json.dumps(idle))
    assert read_measured_steps(path) == [
        MeasuredStep(7.5, (RankWork(3, 6, 2, 50), RankWork())),
        MeasuredStep(5, (RankWork(), RankWork())),
    ]


def _line(**changed: object) -> str:
    return json.dumps({**GOOD, **changed})


def _rank_line(**changed: object) -> str:
    return _line(ranks=[GOOD["ranks"][1], {**STEP, **changed}])


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{", "not JSON (.*)"),
        ("3", "the line is 3; allowed: a JSON object"),
        (json.dumps({"ranks": GOOD["ranks"]}), "step_ms is missing"),
        (json.dumps({"step_ms": 3}), "ranks is missing"),
        (_line(step_ms=0), "step_ms is 0; allowed: a finite number > 0, at most 1,000,000,000,000,000"),
        (_line(step_ms=-2.5), "step_ms is -2.5; allowed: a finite number > 0, at most 1,000,000,000,000,000"),
        (
            _line(step_ms=float("nan")),
            "step_ms is nan; allowed: a finite number > 0, at most 1,000,000,000,000,000",
        ),
        (
            _line(step_ms=float("inf")),
            "step_ms is inf; allowed: a finite number > 0, at most 1,000,000,000,000,000",
        ),
        (_line(step_ms="7"), "step_ms is '7'; allowed: a finite number > 0, at most 1,000,000,000,000,000"),
        (_line(step_ms=True), "step_ms is True; allowed: a finite number > 0, at most 1,000,000,000,000,000"),
        (_line(ranks=STEP), "ranks is {.*}; allowed: a list of objects"),
        (_line(ranks=[]), "ranks is empty; allowed: one object for each rank"),
        (_line(ranks=[STEP, 5]), "ranks[1] is 5; allowed: a JSON object"),
        (_line(ranks=[STEP]), "the number of ranks is 1; allowed: 2, as in the first step"),
        (_line(ranks=[STEP, {}]), "ranks[1].prefill_tokens is missing"),
        (_rank_line(prefill_tokens=-1), "ranks[1].prefill_tokens is -1; allowed: an int >= 0"),
        (_rank_line(prefill_pairs=1.5), "ranks[1].prefill_pairs is 1.5; allowed: an int >= 0"),
        (_rank_line(context_tokens=None), "ranks[1].context_tokens is None; allowed: an int >= 0"),
        (
            _rank_line(prefill_pairs=2),
            "ranks[1].prefill_pairs is 2; allowed: >= prefill_tokens = 3, for each attends to itself too",
        ),
        (_rank_line(prefill_tokens=0), "ranks[1].prefill_pairs is 6; allowed: 0, for prefill_tokens is 0"),
        (
            _rank_line(decode_requests=51),
            "ranks[1].context_tokens is 50; allowed: >= decode_requests = 51, for each attends to itself too",
        ),
        (
            _rank_line(decode_requests=0),
            "ranks[1].context_tokens is 50; allowed: 0, for decode_requests is 0",
        ),
    ],
)
def test_read_measured_steps_names_line_and_reason_when_a_line_does_not_fit(
    tmp_path: Path, line: str, reason: str
) -> None:
    path = tmp_path / "steps.jsonl"
    path.write_text(json.dumps(GOOD) + "\n" + line + "\n")
    with pytest.raises(TraceError) as caught:
        read_measured_steps(path)
    assert re.fullmatch(re.escape(f"{path}:2: {reason}").replace(r"\.\*", ".*"), str(caught.value))


def test_read_measured_steps_says_so_when_there_is_no_step_or_no_file(tmp_path: Path) -> None:
    path = tmp_path / "steps.jsonl"
    path.write_text("\n")
    with pytest.raises(TraceError, match=r"steps\.jsonl:1: the file is empty; allowed: at least one step"):
        read_measured_steps(path)
    with pytest.raises(TraceError, match=r"absent\.jsonl: No such file or directory"):
        read_measured_steps(tmp_path / "absent.jsonl")


# Fits to steps


@given(st.integers(0, 2**32 - 1), st.integers(2, 6))
def test_fit_steps_recovers_any_model_from_steps_without_noise(seed: int, ranks: int) -> None:
    model = _drawn(seed)
    steps = _steps(model, seed + 1, 150, ranks)
    fit = fit_steps(steps)
    assert _values(fit.cost) == pytest.approx(_values(model), rel=1e-6, abs=1e-4)
    assert fit.rms_error < 1e-7
    assert fit.predicted_ms == pytest.approx([fit.cost.step(step.ranks).total for step in steps], rel=1e-12)


@pytest.mark.parametrize("seed", [0, 32, 47, 88, 100, 108])
def test_fit_steps_recovers_a_model_from_few_steps(seed: int) -> None:
    """With 20 steps the search ends beside the model from most guesses of the slowest ranks, not from all."""
    model = _drawn(seed)
    fit = fit_steps(_steps(model, seed + 1, 20, ranks=6))
    assert _values(fit.cost) == pytest.approx(_values(model), rel=1e-6, abs=1e-4)


def test_the_steps_of_these_fits_have_slowest_ranks_that_switch_with_the_parameters() -> None:
    """What makes the fits above hard: neither one rank nor one kind of work says who is the slowest."""
    steps = _steps(TYPICAL, 1, 150)
    slowest = [int(np.argmax(TYPICAL.step(step.ranks).ranks)) for step in steps]
    assert min(np.bincount(slowest, minlength=4)) > 10
    for kind in RankWork._fields:
        most = [int(np.argmax([getattr(work, kind) for work in step.ranks])) for step in steps]
        assert np.mean(np.array(most) == slowest) < 0.9


@given(st.integers(0, 2**32 - 1))
def test_fit_steps_is_within_five_standard_errors_of_the_model_when_steps_have_noise(seed: int) -> None:
    model = _drawn(seed)
    fit = fit_steps(_steps(model, seed + 1, 200, noise=0.01))
    assert 0.007 < fit.rms_error < 0.013
    assert min(_values(fit.cost)) >= 0
    for name, error in fit.standard_errors.items():
        assert abs(getattr(fit.cost, name) - getattr(model, name)) < 5 * error, name


def test_standard_errors_are_as_large_as_the_errors() -> None:
    deviations = []
    for seed in range(40):
        fit = fit_steps(_steps(TYPICAL, seed, 100, noise=0.01))
        errors = np.array([fit.standard_errors[name] for name in PARAMETERS])
        deviations.append((_values(fit.cost) - _values(TYPICAL)) / errors)
    assert np.sqrt(np.mean(np.square(deviations), axis=0)) == pytest.approx(1, abs=0.35)


def test_fit_steps_fits_what_is_free_and_leaves_the_rest_at_zero() -> None:
    model = CostModel(step_ms=30.0, decode_us_per_request=50.0)
    fit = fit_steps(_steps(model, 3, 40), ("decode_us_per_request", "step_ms"), source="a log")
    assert fit.free == ("step_ms", "decode_us_per_request")
    assert set(fit.standard_errors) == set(fit.free)
    assert fit.cost.source == "fitted step_ms, decode_us_per_request to 40 steps of a log"
    assert _values(fit.cost) == pytest.approx(_values(model))
    assert fit.cost.prefill_us_per_token == 0


def test_fit_steps_names_the_worst_step() -> None:
    steps = _steps(TYPICAL, 4, 100)
    steps[17] = replace(steps[17], step_ms=steps[17].step_ms / 1.5)
    fit = fit_steps(steps)
    assert fit.worst == 17
    assert fit.relative_errors[17] == pytest.approx(0.5, abs=0.1)


def test_standard_errors_are_infinite_when_there_are_no_more_steps_than_parameters() -> None:
    steps = [MeasuredStep(10.0 + count, (RankWork(0, 0, count, 10 * count),)) for count in (1, 5)]
    fit = fit_steps(steps, ("step_ms", "decode_us_per_request"))
    assert fit.cost.decode_us_per_request == pytest.approx(1_000)
    assert set(fit.standard_errors.values()) == {np.inf}


def _refused(steps: list[MeasuredStep], free: Any = tuple(PARAMETERS)) -> str:
    with pytest.raises(InvalidArgumentError) as caught:
        fit_steps(steps, free)
    return str(caught.value)


def test_fit_steps_names_what_steps_of_one_rank_cannot_tell_apart() -> None:
    """Experts and the rank's own work are the same there: tokens of prompts, and requests that decode."""
    said = _refused(_steps(TYPICAL, 5, 60, ranks=1))
    assert said == (
        f"free is {', '.join(PARAMETERS)}; allowed: 6 of them: the 60 steps cannot tell apart "
        "prefill_us_per_token, expert_us_per_token, decode_us_per_request"
    )
    without = [name for name in PARAMETERS if name != "expert_us_per_token"]
    assert (
        fit_steps(_steps(replace(TYPICAL, expert_us_per_token=0.0), 5, 60, ranks=1), without).rms_error < 1e-7
    )


def test_fit_steps_names_what_steps_without_prefill_say_nothing_of() -> None:
    decoding = [
        MeasuredStep(
            step.step_ms, tuple(work._replace(prefill_tokens=0, prefill_pairs=0) for work in step.ranks)
        )
        for step in _steps(TYPICAL, 6, 60)
    ]
    assert _refused(decoding).endswith(
        "allowed: without prefill_step_ms, prefill_us_per_token, prefill_ns_per_pair, "
        "of which the 60 steps say nothing"
    )


def test_fit_steps_names_what_steps_in_proportion_cannot_tell_apart() -> None:
    steps = [MeasuredStep(20.0 + n, (RankWork(0, 0, n, 100 * n), RankWork())) for n in range(1, 20)]
    said = _refused(steps, ("step_ms", "decode_us_per_request", "decode_ns_per_context_token"))
    assert said.endswith("cannot tell apart decode_us_per_request, decode_ns_per_context_token")


def test_fit_steps_refuses_fewer_steps_than_parameters() -> None:
    assert "the 3 steps cannot tell apart" in _refused(_steps(TYPICAL, 7, 3))


@pytest.mark.parametrize("free", [(), ("step",), ("step_ms", "step_ms"), "step_ms"])
def test_fit_steps_refuses_parameters_that_there_are_not(free: Any) -> None:
    said = _refused(_steps(TYPICAL, 8, 20), free)
    assert said.endswith(f"allowed: at least one of {', '.join(PARAMETERS)}, each once")


def test_fit_steps_refuses_no_steps_and_steps_of_different_groups() -> None:
    assert _refused([]) == "steps is empty; allowed: at least one step"
    steps = _steps(TYPICAL, 9, 3) + _steps(TYPICAL, 9, 3, ranks=2)
    assert _refused(steps) == "the number of ranks is 2; allowed: 4, as in the first step"


# Fits to a row

CONFIG = SchedulerConfig(
    num_blocks=400,
    block_size=16,
    max_num_seqs=4,
    max_num_batched_tokens=512,
    max_model_len=1024,
    enable_prefix_caching=False,
    log_stats=False,
)
TRUTH = CostModel(step_ms=20.0, prefill_us_per_token=80.0, decode_us_per_request=300.0)


def _requests(seed: int, count: int = 60, gap_ms: float = 0.0) -> list[TraceRequest]:
    rng = Random(seed)
    requests, arrival_ms = [], 0.0
    for i in range(count):
        prompt = rng.randrange(50, 900)
        ids = tuple(1000 * i + j for j in range(-(-prompt // BLOCK_TOKENS)))
        requests.append(TraceRequest(int(arrival_ms), prompt, rng.randrange(2, 40), ids))
        arrival_ms += rng.expovariate(1) * gap_ms
    return requests


def _setup(**changed: Any) -> SimulationSetup:
    setup = SimulationSetup(
        dp_size=4, policy="open_gate", cost=TRUTH, config=CONFIG, routing="least_loaded", concurrency=12
    )
    return replace(setup, **changed)


def _fit_own_row(setup: SimulationSetup, requests: list[TraceRequest], **options: Any) -> RowFit:
    """A fit to the row of the simulation with `setup`, that knows nothing of what is free."""
    row = simulated_row(Simulation(setup, requests).run())
    unknown = {name: 0.0 for name in options.get("free", ("step_ms", "prefill_us_per_token"))}
    return fit_row(replace(setup, cost=replace(setup.cost, **unknown)), requests, row, **options)


def test_simulated_row_is_what_a_benchmark_reports() -> None:
    setup = _setup(dp_size=1, concurrency=1, cost=CostModel(10.0, prefill_us_per_token=100.0))
    row = simulated_row(
        Simulation(setup, [TraceRequest(0, 100, 5, (0,)), TraceRequest(0, 300, 1, (1,))]).run()
    )
    # The first: 10 + 10 ms, then 4 steps of 10 ms. The second: 10 + 30 ms, and it has no TPOT.
    assert (row.ttft_ms, row.tpot_ms) == (pytest.approx(30), pytest.approx(10))
    assert row.throughput == pytest.approx(6 / 0.1)


@settings(max_examples=8)
@given(
    st.integers(0, 2**32 - 1),
    st.integers(1, 5),
    st.sampled_from(["open_gate", "any_rank_at_cap", "cadence:interval=3"]),
    st.sampled_from(["round_robin", "least_loaded", "skewed"]),
)
def test_fit_row_recovers_two_parameters_in_closed_loop(
    seed: int, dp: int, policy: str, routing: str
) -> None:
    rng = Random(seed)
    cost = replace(TRUTH, step_ms=rng.uniform(1, 100), prefill_us_per_token=rng.uniform(1, 300))
    fit = _fit_own_row(
        _setup(dp_size=dp, policy=policy, routing=routing, concurrency=3 * dp, cost=cost),
        _requests(seed, 12 * dp),
    )
    assert fit.rms_error < 1e-6
    assert fit.num_simulations == 2
    assert _values(fit.cost) == pytest.approx(_values(cost), rel=1e-4)


def test_fit_row_recovers_three_parameters_and_keeps_the_others() -> None:
    cost = replace(TRUTH, decode_ns_per_context_token=500.0)
    free = ("step_ms", "prefill_us_per_token", "decode_us_per_request")
    fit = _fit_own_row(_setup(cost=cost), _requests(1), free=free, source="a test")
    assert fit.free == free
    assert fit.rms_error < 1e-5
    assert fit.cost.decode_ns_per_context_token == 500
    assert _values(fit.cost) == pytest.approx(_values(cost), rel=0.02)
    assert fit.cost.source == f"fitted {', '.join(free)} to a benchmark row of a test"


def test_fit_row_keeps_a_step_that_takes_nothing_of_its_own() -> None:
    cost = CostModel(0.0, prefill_us_per_token=50.0, decode_us_per_request=2_000.0)
    fit = _fit_own_row(
        _setup(cost=cost), _requests(2), free=("prefill_us_per_token", "decode_us_per_request")
    )
    assert _values(fit.cost) == pytest.approx(_values(cost), rel=1e-4)


def test_fit_row_recovers_them_when_all_requests_come_at_once() -> None:
    fit = _fit_own_row(_setup(concurrency=None), _requests(3))
    assert fit.num_simulations == 2
    assert _values(fit.cost) == pytest.approx(_values(TRUTH), rel=1e-4)


def test_fit_row_comes_near_them_in_open_loop() -> None:
    fit = _fit_own_row(_setup(concurrency=None), _requests(4, gap_ms=300.0))
    assert fit.rms_error < 0.02
    assert 20 < fit.num_simulations <= 32
    assert fit.cost.step_ms == pytest.approx(20, rel=0.05)
    assert fit.cost.prefill_us_per_token == pytest.approx(80, rel=0.15)


def test_fit_row_says_how_far_it_is_off_when_no_parameters_have_that_row() -> None:
    row = simulated_row(Simulation(_setup(), _requests(5)).run())
    fit = fit_row(_setup(), _requests(5), replace(row, throughput=1.2 * row.throughput))
    assert fit.published.throughput == 1.2 * row.throughput
    assert fit.simulated == simulated_row(Simulation(_setup(cost=fit.cost), _requests(5)).run())
    assert fit.relative_errors["throughput"] == pytest.approx(
        fit.simulated.throughput / (1.2 * row.throughput) - 1
    )
    assert -0.15 < fit.relative_errors["throughput"] < -0.02 < 0.02 < fit.rms_error < 0.15


def test_standard_errors_of_a_row_are_what_an_error_of_one_percent_does() -> None:
    row = simulated_row(Simulation(_setup(), _requests(6)).run())
    moved = []
    for name in ("ttft_ms", "tpot_ms", "throughput"):
        fit = fit_row(_setup(), _requests(6), replace(row, **{name: 1.01 * getattr(row, name)}))
        moved.append([fit.cost.step_ms - 20, fit.cost.prefill_us_per_token - 80])
    expected = fit_row(_setup(), _requests(6), row).standard_errors
    assert np.linalg.norm(moved, axis=0) == pytest.approx(list(expected.values()), rel=0.1)


def test_fit_row_tells_how_many_requests_have_finished() -> None:
    counts: list[int] = []
    fit = _fit_own_row(_setup(), _requests(7), advance=counts.append)
    assert sum(counts) == 60 * fit.num_simulations


def test_fit_row_names_what_the_row_cannot_tell_apart() -> None:
    """One prompt after the other, all of one length: a step that prefills always has 100 tokens."""
    requests = [TraceRequest(0, 100, 5, (i,)) for i in range(4)]
    with pytest.raises(InvalidArgumentError) as caught:
        _fit_own_row(
            _setup(dp_size=1, concurrency=1), requests, free=("prefill_step_ms", "prefill_us_per_token")
        )
    assert str(caught.value) == (
        "free is prefill_step_ms, prefill_us_per_token; allowed: 1 of them: the three numbers of the row "
        "cannot tell apart prefill_step_ms, prefill_us_per_token"
    )


def test_fit_row_refuses_what_it_cannot_do() -> None:
    row = BenchmarkRow(100.0, 10.0, 100.0)
    with pytest.raises(InvalidArgumentError, match=r"free is .*; allowed: three at most"):
        fit_row(_setup(), _requests(8), row, tuple(PARAMETERS)[:4])
    with pytest.raises(
        InvalidArgumentError, match=r"free is \('step',\); allowed: at least one of step_ms, "
    ):
        fit_row(_setup(), _requests(8), row, ("step",))
    for requests in ([], [TraceRequest(0, 100, 1, (0,))]):
        with pytest.raises(
            InvalidArgumentError, match=r"requests is . of them; allowed: at least one with two"
        ):
            fit_row(_setup(), requests, row)


@pytest.mark.parametrize("name", ["ttft_ms", "tpot_ms", "throughput"])
@pytest.mark.parametrize("value", [0, -1.0, float("nan"), float("inf"), "1", True])
def test_a_row_has_positive_numbers(name: str, value: Any) -> None:
    numbers: dict[str, Any] = {"ttft_ms": 1.0, "tpot_ms": 1.0, "throughput": 1.0, name: value}
    with pytest.raises(
        InvalidArgumentError,
        match=rf"{name} is .*; allowed: a finite number > 0, at most 1,000,000,000,000,000",
    ):
        BenchmarkRow(**numbers)
