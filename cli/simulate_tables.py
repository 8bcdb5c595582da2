"""The tables of `ascend-twin simulate`, as text: for the terminal and for the report."""

import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, fields

from ..scheduler.latencies import Latency, Metrics
from .simulate_runs import Row

IDLE = "waits for a slower rank, % of the run: rank 0, 1, ..."
LEFT = ("policy", IDLE)
"""Columns of text; the others are numbers."""
SECONDS, MILLISECONDS = ("s", 1e-3, 2), ("ms", 1.0, 1)
LATENCIES = {
    "ttft": ("TTFT", SECONDS),
    "tpot": ("TPOT", MILLISECONDS),
    "itl": ("ITL", MILLISECONDS),
    "e2e": ("end to end", SECONDS),
}
"""Name, unit and digits of each latency, as they are shown."""


def tables(rows: Sequence[Row]) -> list[list[tuple[str, ...]]]:
    """Each a header, and cells for each row; of several seeds the mean, some ± the standard deviation."""
    return [
        _throughputs(rows),
        _latencies(rows, "ttft", "tpot"),
        _latencies(rows, "itl", "e2e"),
        [("DP", "policy", IDLE), *((str(row.dp_size), row.policy, _idle(row)) for row in rows)],
    ]


def mean_ratio(row: Row) -> str:
    """Output throughput over that of the first policy."""
    return _with_spread(row.ratios, 3)


def _throughputs(rows: Sequence[Row]) -> list[tuple[str, ...]]:
    header = (
        "DP",
        "policy",
        "output\ntok/s",
        "ratio",
        "run\ns",
        "steps",
        "with\nprefill",
        "frozen",
        "preemp-\ntions",
        "cached\n%",
    )
    return [header, *(_throughput_cells(row) for row in rows)]


def _throughput_cells(row: Row) -> tuple[str, ...]:
    def mean(value: Callable[[Metrics], float]) -> str:
        return f"{statistics.fmean(map(value, row.metrics)):,.0f}"

    return (
        str(row.dp_size),
        row.policy,
        _with_spread([m.output_tokens_per_s for m in row.metrics], 0),
        mean_ratio(row),
        mean(lambda m: m.duration_s),
        mean(lambda m: m.num_steps),
        mean(lambda m: m.num_prefill_steps),
        mean(lambda m: m.num_frozen_steps),
        mean(lambda m: m.num_preemptions),
        mean(lambda m: 100 * m.num_cached_tokens / m.num_prompt_tokens),
    )


def _idle(row: Row) -> str:
    """Of each rank."""
    of_ranks = zip(*(metrics.idle_share for metrics in row.metrics), strict=True)
    return " ".join(f"{100 * statistics.fmean(of_rank):4.1f}" for of_rank in of_ranks)


def _latencies(rows: Sequence[Row], *names: str) -> list[tuple[str, ...]]:
    header = ["DP", "policy"]
    for name in names:
        title, (unit, _, _) = LATENCIES[name]
        header += [f"{title}, {unit}\nmean", "\nP50", "\nP90", "\nP99"]
    return [tuple(header), *((str(row.dp_size), row.policy, *_latency_cells(row, names)) for row in rows)]


def _latency_cells(row: Row, names: Sequence[str]) -> Iterator[str]:
    for name in names:
        _, (_, scale, digits) = LATENCIES[name]
        of_seeds: list[Latency | None] = [getattr(metrics, name) for metrics in row.metrics]
        known = [asdict(latency) for latency in of_seeds if latency]
        for i, field in enumerate(fields(Latency)):
            values = [scale * latency[field.name] for latency in known]
            if not values:
                yield "-"
            else:
                yield _with_spread(values, digits) if i == 0 else f"{statistics.fmean(values):,.{digits}f}"


def _with_spread(values: Sequence[float], digits: int) -> str:
    text = f"{statistics.fmean(values):,.{digits}f}"
    return f"{text} ±{statistics.stdev(values):,.{digits}f}" if len(values) > 1 else text
