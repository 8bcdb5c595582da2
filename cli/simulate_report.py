"""The report of `ascend-twin simulate --html`."""

from collections.abc import Mapping, Sequence
from typing import Any

from ..equivalence_tests.run_on_device import versions
from ..scheduler.cost import PARAMETERS
from . import report
from .simulate_plots import cost_plot, latency_plot, running_plot, trade_off_plot
from .simulate_runs import Row
from .simulate_tables import LEFT, mean_ratio, tables

TRADE_OFF = "TTFT against output throughput: right is more, low is sooner. A point for each seed."
LATENCY = "How many of the requests, or of the tokens, took at most so long."
COST = (
    "Where the time goes, above in the whole run, below in its course. Red is prefill of the slowest rank "
    "that the others wait for, on average over the ranks; white is time in which no rank has work."
)
RUNNING = "Requests of each rank. Where curves lie apart, ranks are loaded unevenly."


def simulate_report(headline: str, data: Mapping[str, Any], rows: Sequence[Row]) -> report.Report:
    """The report of a simulation.

    Args:
        headline: what is simulated, in some lines.
        data: the object of `--json`.
        rows: each with the result of its first seed.
    """
    sections = [
        report.Section("Throughput and latency", [headline, *(_table(*table) for table in tables(rows))]),
        report.Section(
            "TTFT against throughput",
            [report.drawn(trade_off_plot(rows), "TTFT against throughput", TRADE_OFF)],
        ),
    ]
    for dp_size in dict.fromkeys(row.dp_size for row in rows):
        own = [row for row in rows if row.dp_size == dp_size]
        plots = [
            report.drawn(latency_plot(own), f"Distributions of latencies, DP {dp_size}", LATENCY),
            report.drawn(cost_plot(own), f"Where the time goes, DP {dp_size}", COST),
            report.drawn(
                running_plot(own), f"Running and waiting requests of each rank, DP {dp_size}", RUNNING
            ),
        ]
        sections.append(report.Section(f"DP {dp_size}, first seed", plots))
    return report.Report(
        title="Data-parallel ranks by admission policy",
        status="done",
        verdict=_verdict(rows),
        command=data["command"],
        facts=_facts(data),
        sections=[*sections, _setup(data)],
        versions=versions(),
    )


def _verdict(rows: Sequence[Row]) -> str:
    """How each policy compares with the first one."""
    first = rows[0].policy
    others = [row for row in rows if row.policy != first]
    if not others:
        return f"{first}: there is no other policy to compare it with."
    ratios = "; ".join(f"{row.policy} at DP {row.dp_size}: {mean_ratio(row)}" for row in others)
    return f"Output throughput over that of {first}: {ratios}."


def _facts(data: Mapping[str, Any]) -> dict[str, str]:
    workload = data["workload"]
    runs = data["rows"][0]["runs"]
    return {
        "workload": workload["source"],
        "requests": f"{workload['requests']:,}",
        "tokens": f"{workload['prompt_tokens']:,} of prompts, {workload['output_tokens']:,} of outputs",
        "seeds": ", ".join(str(run["seed"]) for run in runs),
    }


def _setup(data: Mapping[str, Any]) -> report.Section:
    cost = [
        report.Row((name, f"{data['cost'][name]:g}", parameter.meaning))
        for name, parameter in PARAMETERS.items()
    ]
    config = [report.Row((name, str(value))) for name, value in data["config"].items()]
    return report.Section(
        "Setup",
        [
            report.Table(("parameter", "value", "meaning"), cost, ["value"], "The cost model."),
            report.Table(("setting", "value"), config, caption="The scheduler of each rank."),
        ],
    )


def _table(header: Sequence[str], *lines: Sequence[str]) -> report.Table:
    return report.Table(
        header, [report.Row(cells) for cells in lines], [name for name in header if name not in LEFT]
    )
