"""The runs of `ascend-twin simulate`: one for each DP size, policy and seed."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from ..scheduler.latencies import Metrics, measure
from ..scheduler.simulation import Simulation, SimulationResult, SimulationSetup
from ..scheduler.traces import TraceRequest


class Run(NamedTuple):
    """What a job came to."""

    metrics: Metrics
    result: SimulationResult | None


@dataclass(frozen=True)
class Job:
    """A run to make; with `keeps_result` all of it is wanted, and not its numbers alone."""

    setup: SimulationSetup
    requests: Sequence[TraceRequest]
    keeps_result: bool

    def run(self, advance: Callable[[int], object]) -> Run:
        result = Simulation(self.setup, self.requests).run(advance)
        return Run(measure(result), result if self.keeps_result else None)


@dataclass(frozen=True)
class Row:
    """The runs of one DP size and policy, one for each seed.

    Attributes:
        dp_size: ranks.
        policy: its text form.
        metrics: of each seed.
        ratios: of each seed, output throughput over that of the first policy of this DP size.
        result: of the first seed, where it was wanted.
    """

    dp_size: int
    policy: str
    metrics: tuple[Metrics, ...]
    ratios: tuple[float, ...]
    result: SimulationResult | None
