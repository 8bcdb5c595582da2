"""Fits of the step cost model: to measured steps, or to a published benchmark row through simulations.

For a given slowest rank the model is linear in its parameters, and that rank changes only where the
parameters move far. Both fits use this; the optimizers are scipy's, on relative errors, with no parameter
below 0. docs/cost.md tells what to measure.
"""

import warnings
from array import array
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace

import numpy as np
from scipy.linalg import pinv
from scipy.optimize import OptimizeWarning, curve_fit, least_squares, minimize, nnls

from ..reference.errors import invalid_argument
from .checks import check_positive
from .cost import CostModel, RankWork, StepCost
from .cost_parameters import (
    NAMES,
    FreeParameters,
    StepsWork,
    check_free,
    cost_model,
    describe_source,
    root_mean_square,
)
from .latencies import tpot_ms, ttft_ms
from .measured_steps import MeasuredStep, check_same_ranks
from .simulation import Simulation, SimulationResult, SimulationSetup
from .traces import TraceRequest

# Singular values below this part of the largest count as none: work is exact, a row has three or four digits.
_STEPS_DEPENDENT, _ROW_DEPENDENT = 1e-9, 1e-4
_MOST_TURNS = 50  # of the search for a start, each with the slowest ranks of the one before
_STEP_PART = 0.8  # of the published TPOT, where `step_ms` starts
_STEP_SIDE, _OTHER_SIDE = 0.2, 0.7  # of the first simplex, in logarithms: `step_ms` is known best
_OPEN_LOOP_SEARCH = 26  # simulations
_OPEN_LOOP_STEP = 0.05  # relative, for derivatives: large, for the row changes by jumps
_ROW_ERROR = 0.01  # relative error of a published number, for the uncertainty of what was fitted to it


# To measured steps


@dataclass(frozen=True)
class StepFit:
    """A model fitted to measured steps.

    Attributes:
        cost: the model; parameters that were not free are 0.
        free: the parameters that were fitted.
        standard_errors: of each free parameter, in its unit; inf if there are no more steps than those.
        measured_ms, predicted_ms: of each step, `[steps]` float64.
    """

    cost: CostModel
    free: tuple[str, ...]
    standard_errors: dict[str, float]
    measured_ms: np.ndarray
    predicted_ms: np.ndarray

    @property
    def relative_errors(self) -> np.ndarray:
        """(predicted - measured) / measured of each step, `[steps]`."""
        return self.predicted_ms / self.measured_ms - 1

    @property
    def rms_error(self) -> float:
        """Root of the mean square of the relative errors."""
        return root_mean_square(self.relative_errors)

    @property
    def worst(self) -> int:
        """The step with the largest relative error, from 0."""
        return int(np.abs(self.relative_errors).argmax())


def fit_steps(steps: Sequence[MeasuredStep], free: Sequence[str] = NAMES, source: str = "") -> StepFit:
    """Fit the model to measured steps: the least squares of the relative errors.

    Args:
        steps: as measured, all of the same number of ranks.
        free: the parameters that are fitted; the others are 0.
        source: of the steps, for `CostModel.source`.

    Returns:
        The model, and how well it fits.

    Raises:
        InvalidArgumentError: for no steps, steps of different numbers of ranks, an unknown parameter, or
            parameters that these steps cannot tell apart (the message names them).
    """
    places = check_free(free)
    if not steps:
        invalid_argument("steps", "empty", "at least one step")
    for step in steps:
        check_same_ranks(step, steps[0])
    measured = np.array([step.step_ms for step in steps])
    work = StepsWork(np.array([step.ranks for step in steps]))
    start = _start(work, measured, places)
    lengths = np.linalg.norm(_relative(work.features(start), measured, places), axis=0)
    fitted = FreeParameters(places, 1 / np.where(lengths > 0, lengths, 1), np.zeros(len(NAMES)))
    values, variances = _polish(work, measured, fitted, start)
    jacobian = _relative(work.features(values), measured, places)
    fitted.check_told_apart(jacobian, f"the {len(steps)} steps", _STEPS_DEPENDENT)
    return StepFit(
        cost=cost_model(values, describe_source(fitted, f"{len(steps)} steps", source)),
        free=tuple(fitted.names),
        standard_errors=dict(zip(fitted.names, np.sqrt(variances).tolist(), strict=True)),
        measured_ms=measured,
        predicted_ms=work.step_ms(values),
    )


def _relative(features: np.ndarray, measured: np.ndarray, places: Sequence[int]) -> np.ndarray:
    return features[:, places] / measured[:, None]


def _start(work: StepsWork, measured: np.ndarray, places: Sequence[int]) -> np.ndarray:
    """Linear least squares, over and over, until the slowest ranks stay; the best of several beginnings."""
    best, least = np.zeros(len(NAMES)), np.inf
    for values in work.guesses():
        for _ in range(_MOST_TURNS):
            columns = _relative(work.features(values), measured, places)
            lengths = np.linalg.norm(columns, axis=0)
            lengths[lengths == 0] = 1
            solution = np.zeros(len(NAMES))
            solution[places] = nnls(columns / lengths, np.ones(len(measured)))[0] / lengths
            if np.array_equal(solution, values):
                break
            values = solution
            error = root_mean_square(work.step_ms(values) / measured - 1)
            if error < least:
                best, least = values, error
    return best


def _polish(
    work: StepsWork, measured: np.ndarray, free: FreeParameters, start: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The minimum near `start`, with the slowest ranks free to change; values of all parameters, `[7]`.

    Beside them the variances of the free ones, `[free]`.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", OptimizeWarning)  # variances are inf: what is returned says so
        found, covariance = curve_fit(
            lambda _, *x: work.step_ms(free.values(np.array(x))),
            np.arange(len(measured)),
            measured,
            p0=start[free.places] / free.units,
            sigma=measured,
            bounds=(0, np.inf),
            jac=lambda _, *x: work.features(free.values(np.array(x)))[:, free.places] * free.units,
        )
    return free.values(found), np.diag(covariance) * free.units**2


# To a benchmark row


@dataclass(frozen=True)
class BenchmarkRow:
    """What a serving benchmark reports of a run.

    Attributes:
        ttft_ms: time to first token, mean over requests, ms, > 0.
        tpot_ms: time per output token after the first, mean over requests of at least two, ms, > 0.
        throughput: output tokens a second, over the whole run, > 0.

    Raises:
        InvalidArgumentError: for a number that is not as above.
    """

    ttft_ms: float
    tpot_ms: float
    throughput: float

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            check_positive(name, value)

    @property
    def numbers(self) -> np.ndarray:
        """All of them, in their order, `[3]` float64."""
        return np.array([self.ttft_ms, self.tpot_ms, self.throughput])


@dataclass(frozen=True)
class RowFit:
    """A model whose simulation comes nearest to a benchmark row.

    Attributes:
        cost: the model; parameters that were not free are those of the setup.
        free: the parameters that were fitted.
        standard_errors: of each free parameter, in its unit, if each number of the row is off by 1 %.
        published, simulated: the row, and what a simulation with `cost` makes of it.
        num_simulations: that were run.
    """

    cost: CostModel
    free: tuple[str, ...]
    standard_errors: dict[str, float]
    published: BenchmarkRow
    simulated: BenchmarkRow
    num_simulations: int

    @property
    def relative_errors(self) -> dict[str, float]:
        """(simulated - published) / published, of each number of the row."""
        errors = _row_errors(self.simulated, self.published)
        return dict(zip(asdict(self.published), errors.tolist(), strict=True))

    @property
    def rms_error(self) -> float:
        """Root of the mean square of the relative errors."""
        return root_mean_square(_row_errors(self.simulated, self.published))


def fit_row(
    setup: SimulationSetup,
    requests: Sequence[TraceRequest],
    row: BenchmarkRow,
    free: Sequence[str] = ("step_ms", "prefill_us_per_token"),
    *,
    source: str = "",
    advance: Callable[[int], object] = lambda num_finished: None,
) -> RowFit:
    """Fit parameters so that the simulation of a workload reproduces a benchmark row.

    In closed loop, and where all requests come at time 0, no cost changes the order of events: one simulation
    tells what each step computes and which steps each request waits for, the fit goes over that, and a second
    simulation confirms it. Else each evaluation is a simulation, 32 in all at most; the order then changes by
    jumps, and what is found may be some percent off the nearest row.

    Args:
        setup: what is simulated; its cost gives the parameters that are not free.
        requests: the workload; at least one must have two output tokens.
        row: what is to be reproduced, by the least squares of the relative errors.
        free: the parameters that are fitted, three at most, as there are three numbers.
        source: of the row, for `CostModel.source`.
        advance: told how many more requests have finished, in each simulation.

    Raises:
        InvalidArgumentError: for a workload that cannot be simulated, an unknown parameter, more than three,
            or parameters that the row cannot tell apart (the message names them).
    """
    places = check_free(free)
    if len(places) > 3:
        invalid_argument("free", ", ".join(free), "three at most, for a row has three numbers")
    if max((request.num_output_tokens for request in requests), default=0) < 2:
        invalid_argument("requests", f"{len(requests)} of them", "at least one with two output tokens")
    simulator = _Simulator(setup, requests, advance)
    held = np.array([getattr(setup.cost, name) for name in NAMES], float)
    first = held.copy()
    first[places] = 0
    first[0] = first[0] or row.tpot_ms  # the order of events is told by times: no step may take none
    order = simulator.order(first)
    fitted = FreeParameters(places, _units(order, row, first, places), held)
    has_one_order = setup.concurrency is not None or not any(request.arrival_ms for request in requests)
    found, jacobian = (_fit_one_order if has_one_order else _fit_jumps)(simulator, order, row, fitted)
    fitted.check_told_apart(jacobian, "the three numbers of the row", _ROW_DEPENDENT)
    values = fitted.values(found)
    standard_errors = np.linalg.norm(pinv(jacobian), axis=1) * fitted.units * _ROW_ERROR
    return RowFit(
        cost=cost_model(values, describe_source(fitted, "a benchmark row", source)),
        free=tuple(fitted.names),
        standard_errors=dict(zip(fitted.names, standard_errors.tolist(), strict=True)),
        published=row,
        simulated=simulator.row(values),
        num_simulations=simulator.count,
    )


def _units(order: "StepOrder", row: BenchmarkRow, first: np.ndarray, places: Sequence[int]) -> np.ndarray:
    """Where the free parameters start: of a mean step of the published TPOT `step_ms` is the most.

    The others share alike in the rest.
    """
    parts = np.where(np.array(places) == 0, _STEP_PART, (1 - _STEP_PART) / len(places))
    means = order.work.features(first)[:, places].mean(0)
    return row.tpot_ms * parts / np.where(means > 0, means, 1)


def _fit_one_order(
    simulator: "_Simulator", order: "StepOrder", row: BenchmarkRow, free: FreeParameters
) -> tuple[np.ndarray, np.ndarray]:
    """The free parameters whose row is nearest, in their units, and the jacobian of its relative errors."""
    published = row.numbers
    found = least_squares(
        lambda x: order.row(free.values(x)) / published - 1,
        np.ones(len(free.places)),
        jac=lambda x: order.jacobian(free.values(x), free.places) * free.units / published[:, None],  # pyright: ignore[reportArgumentType]
        bounds=(0, np.inf),
    )
    return found.x, found.jac


def _fit_jumps(
    simulator: "_Simulator", order: "StepOrder", row: BenchmarkRow, free: FreeParameters
) -> tuple[np.ndarray, np.ndarray]:
    """The same, where the order of events changes with the cost: no derivative leads the search."""

    def errors(x: np.ndarray) -> np.ndarray:
        return _row_errors(simulator.row(free.values(x)), row)

    start = np.zeros(len(free.places))
    sides = np.where(np.array(free.places) == 0, _STEP_SIDE, _OTHER_SIDE)
    simplex = np.vstack([start, np.diag(sides)])
    options = {"maxfev": _OPEN_LOOP_SEARCH, "initial_simplex": simplex}
    logs = minimize(
        lambda x: root_mean_square(errors(np.exp(x))), start, method="Nelder-Mead", options=options
    ).x
    found = np.exp(logs)
    return found, least_squares(errors, found, diff_step=_OPEN_LOOP_STEP, max_nfev=1).jac


def simulated_row(result: SimulationResult) -> BenchmarkRow:
    """What a serving benchmark would report of a simulation."""
    return BenchmarkRow(
        ttft_ms=float(ttft_ms(result).mean()),
        tpot_ms=float(tpot_ms(result).mean()),
        throughput=float(result.output_tokens.sum() / result.duration_ms * 1e3),
    )


def _row_errors(row: BenchmarkRow, published: BenchmarkRow) -> np.ndarray:
    return row.numbers / published.numbers - 1


@dataclass(frozen=True)
class _RecordingCost(CostModel):
    """A cost model that keeps what it is asked: the fields of `RankWork`, rank by rank, step by step."""

    asked: array = field(default_factory=lambda: array("q"))

    def step(self, work: Sequence[RankWork]) -> StepCost:
        for counts in work:
            self.asked.extend(counts)
        return super().step(work)


class StepOrder:
    """What each step of a simulation computes, and from which to which each request waits: without any time.

    Args:
        result: of the simulation.
        work: of its steps.
    """

    def __init__(self, result: SimulationResult, work: StepsWork) -> None:
        self.work = work
        starts = result.step_start_ms
        self._sent = np.searchsorted(starts, result.sent_ms)
        self._first = np.searchsorted(starts, result.first_token_ms)
        self._finished = np.searchsorted(starts, result.finished_ms)
        self._output_tokens = result.output_tokens

    def row(self, values: np.ndarray) -> np.ndarray:
        """The three numbers of the benchmark row, if each step takes what `values` say, `[3]`."""
        return self._row(values, [])[:, 0]

    def jacobian(self, values: np.ndarray, places: Sequence[int]) -> np.ndarray:
        """Their derivatives in the parameters at `places`, `[3, places]`."""
        return self._row(values, places)[:, 1:]

    def _row(self, values: np.ndarray, places: Sequence[int]) -> np.ndarray:
        # Column 0 of all that follows is a time, the others are its derivatives.
        features = self.work.features(values)
        steps = np.column_stack([features @ values, features[:, places]])
        times = np.zeros((len(steps) + 1, steps.shape[1]))  # of the start of each step, and of the end of all
        np.cumsum(steps, 0, out=times[1:])
        several = self._output_tokens > 1
        spans = (times[self._finished] - times[self._first])[several]
        ttft = np.mean(times[self._first] - times[self._sent], 0)
        tpot = np.mean(spans / (self._output_tokens[several] - 1)[:, None], 0)
        duration = times[-1]
        throughput = -self._output_tokens.sum() * 1e3 / duration[0] ** 2 * duration
        throughput[0] *= -1
        return np.stack([ttft, tpot, throughput])


def record_order(
    setup: SimulationSetup,
    requests: Sequence[TraceRequest],
    advance: Callable[[int], object] = lambda num_finished: None,
) -> StepOrder:
    """Simulate once, and keep the order of events: in closed loop that of any other cost, too.

    Args:
        setup: what is simulated; its cost only tells steps apart, and must not be 0.
        requests: the workload.
        advance: told how many more requests have finished.
    """
    values = np.array([getattr(setup.cost, name) for name in NAMES], float)
    return _Simulator(setup, requests, advance).order(values)


class _Simulator:
    """Simulations of one workload that differ in their cost, and how many there were."""

    def __init__(
        self,
        setup: SimulationSetup,
        requests: Sequence[TraceRequest],
        advance: Callable[[int], object],
    ) -> None:
        self._setup = setup
        self._requests = requests
        self._advance = advance
        self.count = 0

    def row(self, values: np.ndarray) -> BenchmarkRow:
        return simulated_row(self._run(cost_model(values, "")))

    def order(self, values: np.ndarray) -> StepOrder:
        cost = _RecordingCost(**asdict(cost_model(values, "")))
        result = self._run(cost)
        counts = np.array(cost.asked).reshape(-1, self._setup.dp_size, len(RankWork._fields))
        return StepOrder(result, StepsWork(counts))

    def _run(self, cost: CostModel) -> SimulationResult:
        self.count += 1
        return Simulation(replace(self._setup, cost=cost), self._requests).run(self._advance)
