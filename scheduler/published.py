"""A published comparison of balance scheduling, predicted from its baseline row alone.

vllm-ascend #5212 reports DeepSeek-V3.1 under 512 requests of 3,500 prompt and 1,500 output tokens, 128 at a
time, without and with balance scheduling. How many ranks there were is not said, nor how lengths varied:
lengths that do not vary at all leave nothing to balance.

1. Simulate the baseline for each spread of output lengths: in closed loop the order of events does not depend
   on what a step takes.
2. For each spread find the step cost, two parameters, that comes nearest to the baseline row; keep the best
   spread.
3. Simulate balance scheduling with that spread and that cost: the prediction. The row that it is to meet is
   not used.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy.optimize import least_squares

from ..reference.errors import invalid_argument
from .checks import check_int
from .config import SchedulerConfig
from .cost import CostModel
from .cost_fit import BenchmarkRow, StepOrder, record_order
from .cost_parameters import NAMES, cost_model
from .simulation import SimulationSetup
from .workloads import published_requests

BASELINE = BenchmarkRow(ttft_ms=6600, tpot_ms=86.85, throughput=1297.3)
BALANCE = BenchmarkRow(ttft_ms=7012, tpot_ms=70.63, throughput=1530.7)

NUM_REQUESTS = 512
CONCURRENCY = 128
SPREADS = (0.0, 0.04, 0.08, 0.12, 0.16, 0.2)
_BLOCK_SIZE = 128
_MAX_MODEL_LEN = 8192


@dataclass(frozen=True)
class Prediction:
    """What the baseline row says about the other.

    Attributes:
        dp_size: ranks; each runs at most 128 / dp_size requests.
        expert_share: of what a prompt token costs, the part that experts on all ranks do, 0 to 1.
        spread: of output lengths, standard deviation over mean, as fitted.
        cost: as fitted.
        baseline: simulated, mean over seeds.
        balance: predicted, mean over seeds.
        ratios: balance over baseline, of each number of the row, of each seed, `[seeds, 3]`.
    """

    dp_size: int
    expert_share: float
    spread: float
    cost: CostModel
    baseline: BenchmarkRow
    balance: BenchmarkRow
    ratios: np.ndarray


def published_ratios() -> np.ndarray:
    """Balance over baseline as published: TTFT, TPOT, throughput, `[3]`. Durations are as 1 / throughput."""
    return BALANCE.numbers / BASELINE.numbers


def predict(
    dp_size: int,
    expert_shares: Sequence[float],
    *,
    seeds: Sequence[int] = (0, 1, 2),
    spreads: Sequence[float] = SPREADS,
    policy: str = "any_rank_at_cap",
    routing: str = "round_robin",
    max_num_batched_tokens: int = 8192,
    advance: Callable[[int], object] = lambda num_finished: None,
) -> list[Prediction]:
    """Predict the balance row, for each share of the experts.

    Args:
        dp_size: ranks, a divisor of 128.
        expert_shares: each 0 to 1; not published either.
        seeds: of the output lengths; the row is a mean over them.
        spreads: of output lengths, those that are tried.
        policy: of the row that is predicted, see `admission.make_policy`.
        routing: see `SimulationSetup`.
        max_num_batched_tokens: of a step; not published.
        advance: is told how many more requests have finished, in each simulation.

    Raises:
        InvalidArgumentError: for a value that is not as above.
    """
    setup = check(dp_size, expert_shares, policy, routing, max_num_batched_tokens)
    for name, given in (("expert_shares", expert_shares), ("seeds", seeds), ("spreads", spreads)):
        if not given:
            invalid_argument(name, given, "at least one")

    def orders(policy: str, spread: float) -> list[StepOrder]:
        setup_of_policy = replace(setup, policy=policy)
        workloads = [published_requests(seed, NUM_REQUESTS, spread=spread) for seed in seeds]
        return [record_order(setup_of_policy, requests, advance) for requests in workloads]

    baselines = {spread: orders("open_gate", spread) for spread in spreads}
    balances: dict[float, list[StepOrder]] = {}
    predictions = []
    for share in expert_shares:
        fits = {spread: _fit(baselines[spread], share) for spread in spreads}
        spread = min(fits, key=lambda s: fits[s][1])
        values = fits[spread][0]
        if spread not in balances:
            balances[spread] = orders(policy, spread)
        baseline, balance = (
            np.array([order.row(values) for order in of[spread]]) for of in (baselines, balances)
        )
        predictions.append(
            Prediction(
                dp_size,
                share,
                spread,
                cost_model(values, f"fitted to the baseline row of vllm-ascend #5212 at DP {dp_size}"),
                BenchmarkRow(*baseline.mean(0).tolist()),
                BenchmarkRow(*balance.mean(0).tolist()),
                balance / baseline,
            )
        )
    return predictions


def check(
    dp_size: int, expert_shares: Sequence[float], policy: str, routing: str, max_num_batched_tokens: int
) -> SimulationSetup:
    """What `predict` simulates, or the InvalidArgumentError that it would raise."""
    check_int("dp_size", dp_size, 1)
    if CONCURRENCY % dp_size:
        invalid_argument("dp_size", dp_size, f"a divisor of {CONCURRENCY}")
    for share in expert_shares:
        if type(share) not in (int, float) or not 0 <= share <= 1:
            invalid_argument("expert_share", repr(share), "0 to 1")
    config = _config(dp_size, max_num_batched_tokens)
    return SimulationSetup(dp_size, policy, CostModel(step_ms=1.0), config, routing, CONCURRENCY)


def num_simulated(num_seeds: int, num_spreads: int = len(SPREADS)) -> int:
    """Requests that `predict` simulates for one share: those of each spread, and the predicted ones."""
    return (num_spreads + 1) * num_seeds * NUM_REQUESTS


def _config(dp_size: int, max_num_batched_tokens: int) -> SchedulerConfig:
    """Slots for the whole concurrency, and a cache that holds all of them to their end."""
    max_num_seqs = CONCURRENCY // dp_size
    return SchedulerConfig(
        num_blocks=max_num_seqs * _MAX_MODEL_LEN // _BLOCK_SIZE + 1,
        block_size=_BLOCK_SIZE,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
        max_model_len=_MAX_MODEL_LEN,
        enable_prefix_caching=False,
        log_stats=False,
    )


def _fit(orders: Sequence[StepOrder], expert_share: float) -> tuple[np.ndarray, float]:
    """Values of all parameters that come nearest to the baseline row, and how near."""
    published = BASELINE.numbers

    def values(x: np.ndarray) -> np.ndarray:
        step_ms, token_us = x
        parts = {
            "step_ms": step_ms,
            "prefill_us_per_token": token_us * (1 - expert_share),
            "expert_us_per_token": token_us * expert_share,
        }
        return np.array([parts.get(name, 0.0) for name in NAMES])

    def errors(x: np.ndarray) -> np.ndarray:
        return np.mean([order.row(values(x)) for order in orders], 0) / published - 1

    found = least_squares(errors, [0.6 * BASELINE.tpot_ms, 200.0], x_scale="jac", bounds=(0, np.inf))
    return values(found.x), float(found.cost)
