"""The plots of `ascend-twin simulate --html`."""

from collections.abc import Callable, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

from ..scheduler.latencies import tpot_ms, ttft_ms, wait_ms
from ..scheduler.simulation import SimulationResult
from .simulate_runs import Row

NUM_BINS, NUM_STACKED_BINS = 200, 120
"""Points of a curve over time, and of stacked ones: each is a mean over its part of the run."""
NUM_QUANTILES = 400
"""Points of a distribution."""
MOST_CURVES = 16
"""Ranks that are drawn one by one; of more, only the range and the median."""
WIDTH = 10.0
CAUSES = (
    "fixed",
    "any rank prefills",
    "experts",
    "prefill of the slowest, others work too",
    "prefill of the slowest, others wait",
    "decode of the slowest",
)
COLORS = ("#9aa5b1", "#c9a227", "#6a994e", "#e07a5f", "#b5202c", "#3d6fb6")


def running_plot(rows: Sequence[Row]) -> Figure:
    """Running and waiting requests of each rank over time, a line of two panels for each row."""
    figure, axes = _panels(len(rows), 2, "time, s", of_time=True)
    for row, (left, right) in zip(rows, axes, strict=True):
        result = _result(row)
        for ax, what, counts in ((left, "running", result.running), (right, "waiting", result.waiting)):
            ax.set_title(f"{row.policy}: {what}")
            ax.set_ylabel("requests")
            _draw_ranks(ax, result, counts)
    _share_limits(axes)
    if rows[0].dp_size <= MOST_CURVES:
        axes[0][1].legend(fontsize="x-small", ncols=2)
    return figure


def cost_plot(rows: Sequence[Row]) -> Figure:
    """Where the time goes: a bar of the whole run for each row, and below it their course, a panel each."""
    figure, axes = _panels(1 + len(rows), 1, "time, s", of_time=True)
    top, *below = axes[:, 0]
    places = range(len(rows))
    start = np.zeros(len(rows))
    totals = np.stack([causes_ms(_result(row)).sum(0) / 1e3 for row in rows])
    for cause, color, seconds in zip(CAUSES, COLORS, totals.T, strict=True):
        top.barh(places, seconds, left=start, color=color, label=cause)
        start += seconds
    top.set(title="the whole run, s", yticks=places, yticklabels=[row.policy for row in rows])
    top.invert_yaxis()
    for row, ax in zip(rows, below, strict=True):
        result = _result(row)
        edges, shares = binned(result, causes_ms(result), NUM_STACKED_BINS)
        ax.stackplot(edges[:-1], *shares.T, colors=COLORS, step="post")
        ax.set(title=f"{row.policy}: share of time", ylim=(0, 1))
    _share_limits(axes[1:])
    figure.legend(*top.get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize="small")
    return figure


def latency_plot(rows: Sequence[Row]) -> Figure:
    """Distributions of TTFT, TPOT and ITL, a curve for each row."""
    figure, axes = _panels(1, 3, "ms")
    latencies: dict[str, Callable[[SimulationResult], np.ndarray]] = {
        "TTFT": ttft_ms,
        "TPOT": tpot_ms,
        "ITL": lambda result: result.itl_ms,
    }
    shares = np.linspace(0, 1, NUM_QUANTILES)
    for ax, (title, times_ms) in zip(axes[0], latencies.items(), strict=True):
        ax.set(title=title, ylim=(0, 1))
        for row in rows:
            times = times_ms(_result(row))
            if len(times):
                ax.plot(np.quantile(times, shares), shares, label=row.policy)
        _make_logarithmic(ax)
    axes[0][0].set_ylabel("share of requests, of tokens for ITL")
    axes[0][0].legend(fontsize="x-small")
    return figure


def trade_off_plot(rows: Sequence[Row]) -> Figure:
    """TTFT against output throughput: a point for each seed, colours are policies and markers DP sizes."""
    figure, axes = _panels(1, 2, "output tokens/s")
    policies, sizes = (
        list(dict.fromkeys(x)) for x in zip(*((r.policy, r.dp_size) for r in rows), strict=True)
    )
    for ax, (title, key) in zip(axes[0], (("mean", "mean_ms"), ("P90", "p90_ms")), strict=True):
        for row in rows:
            ax.scatter(
                [metrics.output_tokens_per_s for metrics in row.metrics],
                [getattr(metrics.ttft, key) / 1e3 for metrics in row.metrics],
                color=f"C{policies.index(row.policy) % 10}",
                marker="osD^vP*X"[sizes.index(row.dp_size) % 8],
                label=f"{row.policy}, DP {row.dp_size}",
                alpha=0.8,
            )
        ax.set(title=f"TTFT, {title}", ylabel="s")
        ax.set_ylim(0, 1.1 * ax.get_ylim()[1])
    axes[0][0].legend(fontsize="x-small")
    return figure


def causes_ms(result: SimulationResult) -> np.ndarray:
    """What each step is spent on, `[steps, CAUSES]`, ms.

    Of the prefill of the slowest rank, the part that others wait for is what a rank waits on average, as far
    as that prefill is long.
    """
    fixed, prefill_step, experts, prefill, decode = result.step_parts_ms.T
    waited = np.minimum(wait_ms(result), prefill[:, None]).mean(1)
    return np.stack([fixed, prefill_step, experts, prefill - waited, waited, decode], axis=1)


def binned(result: SimulationResult, totals: np.ndarray, num_bins: int) -> tuple[np.ndarray, np.ndarray]:
    """Means over time of what adds up, evenly, during each step, and does not where no rank has work.

    Args:
        totals: what a step adds, `[steps, columns]`: of a number of requests, that number times ms.
        num_bins: of equal length, over the run.

    Returns:
        Edges of the bins, `[num_bins + 1]`, s; and the means, `[num_bins, columns]`.
    """
    edges = np.linspace(0, result.duration_ms, num_bins + 1)
    ends = result.step_start_ms + result.step_ms
    times = np.stack([result.step_start_ms, ends], axis=1).ravel()
    after = np.cumsum(totals, axis=0)
    at_times = np.stack([after - totals, after], axis=1).reshape(len(times), -1)
    at_edges = np.stack([np.interp(edges, times, column) for column in at_times.T], axis=1)
    return edges / 1e3, np.diff(at_edges, axis=0) / np.diff(edges)[:, None]


def _draw_ranks(ax: Axes, result: SimulationResult, counts: np.ndarray) -> None:
    edges, means = binned(result, counts * result.step_ms[:, None], NUM_BINS)
    if means.shape[1] > MOST_CURVES:
        ax.fill_between(edges[:-1], means.min(1), means.max(1), alpha=0.3, step="post")
        ax.step(edges[:-1], np.median(means, axis=1), where="post")
        return
    colors = matplotlib.colormaps["turbo"](np.linspace(0.08, 0.92, means.shape[1]))
    for rank, color in enumerate(colors):
        ax.step(edges[:-1], means[:, rank], where="post", color=color, lw=0.9, label=f"rank {rank}")


def _make_logarithmic(ax: Axes) -> None:
    """With as many labels as there is room for."""
    ax.set_xscale("log")
    least, most = ax.get_xlim()
    ax.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if most < 100 * least else (1,)))
    ax.xaxis.set_major_formatter(StrMethodFormatter("{x:,g}"))
    ax.xaxis.set_minor_formatter(NullFormatter())


def _panels(rows: int, columns: int, xlabel: str, *, of_time: bool = False) -> tuple[Figure, Any]:
    height = 0.8 + (2.1 if of_time else 3.2) * rows
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    for ax in axes[-1] if of_time else axes.flat:
        ax.set_xlabel(xlabel)
    for ax in axes.flat:
        ax.grid(alpha=0.3)
        ax.title.set_fontsize("medium")
    return figure, axes


def _share_limits(axes: Any) -> None:
    """Panels of one column are to be compared: all have the limits of the widest."""
    for column in axes.T:
        most_x, most_y = (max(limit(ax)[1] for ax in column) for limit in (Axes.get_xlim, Axes.get_ylim))
        for ax in column:
            ax.set(xlim=(0, most_x), ylim=(0, most_y))


def _result(row: Row) -> SimulationResult:
    assert row.result is not None
    return row.result
