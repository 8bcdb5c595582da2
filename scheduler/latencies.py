"""What a simulation comes to: throughput, latencies, and who waited for whom."""

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from ..reference.errors import invalid_argument
from .simulation import SimulationResult

PERCENTILES = (50, 90, 99)


@dataclass(frozen=True)
class Latency:
    """Mean and percentiles of times, ms; percentiles are `numpy.percentile`'s, linear between two times."""

    mean_ms: float
    p50_ms: float
    p90_ms: float
    p99_ms: float

    @classmethod
    def of(cls, times_ms: np.ndarray) -> "Latency":
        """Of at least one time."""
        return cls(float(times_ms.mean()), *(float(x) for x in np.percentile(times_ms, PERCENTILES)))


@dataclass(frozen=True)
class Metrics:
    """A simulation in numbers.

    Attributes:
        num_requests: all of them finished.
        num_prompt_tokens, num_output_tokens: of all requests.
        duration_s: from the start of the workload to the end of the last step.
        output_tokens_per_s, requests_per_s: over that duration.
        ttft: from sending a request to its first token, over requests.
        tpot: (last token - first token) / (output tokens - 1), over requests of at least two tokens.
        itl: from one token of a request to the next, over all tokens but first ones.
        e2e: from sending a request to its last token, over requests.
        queue: from sending a request to the start of the step that first admits it, over requests.
        num_steps: of the group, those in which all ranks step together.
        num_prefill_steps: those in which any rank prefills.
        num_frozen_steps: those in which the gate was shut while somebody waited.
        num_preemptions: of all requests.
        num_cached_tokens: prompt tokens found in the prefix cache.
        idle_share: for each rank, the share of the duration that it waits for a slower one.
        no_work_share: the share of the duration in which no rank has anything to do.
    """

    num_requests: int
    num_prompt_tokens: int
    num_output_tokens: int
    duration_s: float
    output_tokens_per_s: float
    requests_per_s: float
    ttft: Latency
    tpot: Latency | None
    itl: Latency | None
    e2e: Latency
    queue: Latency
    num_steps: int
    num_prefill_steps: int
    num_frozen_steps: int
    num_preemptions: int
    num_cached_tokens: int
    idle_share: tuple[float, ...]
    no_work_share: float

    def to_json(self) -> dict[str, Any]:
        """As a JSON object, with all its fields."""
        return {**asdict(self), "idle_share": list(self.idle_share)}


def measure(result: SimulationResult) -> Metrics:
    """What a simulation comes to.

    Raises:
        InvalidArgumentError: for a simulation in which no time passed, by a cost model of zeros.
    """
    if result.duration_ms <= 0:
        invalid_argument("cost", result.setup.cost, "a cost model by which steps take time")
    duration_s = result.duration_ms / 1e3
    tpot, itl = tpot_ms(result), result.itl_ms
    num_output_tokens = int(result.output_tokens.sum())
    return Metrics(
        num_requests=len(result.sent_ms),
        num_prompt_tokens=int(result.prompt_tokens.sum()),
        num_output_tokens=num_output_tokens,
        duration_s=duration_s,
        output_tokens_per_s=num_output_tokens / duration_s,
        requests_per_s=len(result.sent_ms) / duration_s,
        ttft=Latency.of(ttft_ms(result)),
        tpot=Latency.of(tpot) if len(tpot) else None,
        itl=Latency.of(itl) if len(itl) else None,
        e2e=Latency.of(result.finished_ms - result.sent_ms),
        queue=Latency.of(result.admitted_ms - result.sent_ms),
        num_steps=len(result.step_ms),
        num_prefill_steps=int((result.prefill_tokens > 0).any(1).sum()),
        num_frozen_steps=int(is_frozen(result).sum()),
        num_preemptions=int(result.num_preemptions.sum()),
        num_cached_tokens=int(result.cached_tokens.sum()),
        idle_share=tuple(float(x) for x in wait_ms(result).sum(0) / result.duration_ms),
        no_work_share=max(0.0, float(1 - result.step_ms.sum() / result.duration_ms)),
    )


def ttft_ms(result: SimulationResult) -> np.ndarray:
    """Time to first token of each request, `[requests]`, ms."""
    return result.first_token_ms - result.sent_ms


def tpot_ms(result: SimulationResult) -> np.ndarray:
    """Time per output token of each request that has at least two, `[those requests]`, ms."""
    several = result.output_tokens > 1
    spent = result.finished_ms[several] - result.first_token_ms[several]
    return spent / (result.output_tokens[several] - 1)


def wait_ms(result: SimulationResult) -> np.ndarray:
    """What each rank waits for the slowest in each step, `[steps, ranks]`, ms."""
    return result.rank_ms.max(1, keepdims=True) - result.rank_ms


def is_frozen(result: SimulationResult) -> np.ndarray:
    """Whether the gate was shut while somebody waited, `[steps]` bool."""
    return ~result.step_is_open & (result.waiting > 0).any(1)
