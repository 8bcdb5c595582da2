"""`ascend-twin fit`: the parameters of the step cost model, from measured steps or from a benchmark row.

The file written by `--output` holds the fields of `CostModel` (scheduler/cost.py), for
`ascend-twin simulate --cost`. The file written by `--json` holds one object:

    version     1, raised when a field changes its meaning
    cost        the fields of `CostModel`
    parameters  [{"name", "value", "unit", "meaning", "standard_error": null if it was not fitted,
                or if nothing tells it}]
    rms_error   root of the mean square of the relative errors
    steps       null with --row, or {"measured_ms": [...], "predicted_ms": [...]}
    row         null without --row, or {"published", "simulated", "relative_errors": each {"ttft_ms",
                "tpot_ms", "throughput"}, "simulations"}
"""

import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.table import Table

from ..reference.errors import invalid_argument
from ..scheduler.cost import PARAMETERS, CostModel
from ..scheduler.cost_fit import BenchmarkRow, RowFit, StepFit, fit_row, fit_steps
from ..scheduler.measured_steps import MeasuredStep, read_measured_steps
from ..scheduler.simulation import SimulationSetup
from . import simulate
from .output_files import check_apart, write_atomically, write_json
from .progress import progress

ROW_FREE = ("step_ms", "prefill_us_per_token")
"""What is fitted to a row by default: two of its three numbers nearly imply the third."""
FAR = 0.05
"""A row that is missed by more than this, relatively, is warned of."""
PLOT_SUFFIXES = (".png", ".svg", ".pdf")


@dataclass(frozen=True)
class Options:
    """What the user asked for.

    Attributes:
        source: file of measured steps; with `row`, the trace or the named workload of `workload`.
        free: the parameters that are fitted; () is the default.
        row: text form of a benchmark row, or None for measured steps.
        workload: what the row is simulated with, one DP size and one policy; None without `row`.
        output, json, plot: files to write, or None.
    """

    source: str
    free: tuple[str, ...]
    row: str | None
    workload: simulate.Options | None
    output: Path | None
    json: Path | None
    plot: Path | None


def run_fit(options: Options) -> None:
    """Fit; print the parameters on stdout, write the files that were asked for.

    Raises:
        InvalidArgumentError, TraceError: for wrong input, or parameters that it does not determine.
        typer.Exit: with status 130 when it is interrupted.
    """
    _check_outputs(options)
    if options.row is None or options.workload is None:
        steps = read_measured_steps(options.source)
        fit = fit_steps(steps, options.free or tuple(PARAMETERS), options.source)
        _print_parameters(fit)
        _print_steps(fit)
        _write(options, fit)
        if options.plot:
            write_atomically("--plot", options.plot, lambda file: _plot(fit, steps, file))
    else:
        fit = _fit_row(options.workload, parse_row(options.row), options.free or ROW_FREE)
        _print_parameters(fit)
        _print_row(fit)
        _write(options, fit)


def parse_row(text: str) -> BenchmarkRow:
    """A benchmark row from its text form, `ttft=MS,tpot=MS,throughput=TOKENS_A_SECOND`.

    Raises:
        InvalidArgumentError: for a number that is missing, unknown, there twice, or not above 0.
    """
    parts = [part.partition("=") for part in text.split(",")]
    allowed = "ttft=MS,tpot=MS,throughput=TOKENS_A_SECOND, finite numbers above 0"
    if sorted(name for name, _, _ in parts) != ["throughput", "tpot", "ttft"]:
        invalid_argument("--row", text, allowed)
    try:
        values = {name: float(value) for name, _, value in parts}
        return BenchmarkRow(values["ttft"], values["tpot"], values["throughput"])
    except ValueError:
        invalid_argument("--row", text, allowed)


def _check_outputs(options: Options) -> None:
    outputs = {
        "--output": (options.output, ()),
        "--json": (options.json, ()),
        "--plot": (options.plot, PLOT_SUFFIXES),
    }
    workload = options.workload
    is_file = workload is None or workload.is_trace
    source = options.source if is_file else None
    check_apart(outputs, {"the input": source, "--cost": workload.cost if workload else None})


def _fit_row(workload: simulate.Options, row: BenchmarkRow, free: tuple[str, ...]) -> RowFit:
    plan = simulate.prepare(workload)
    setup = SimulationSetup(
        dp_size=workload.dp[0],
        policy=workload.policy[0],
        cost=plan.cost if workload.cost else CostModel(step_ms=0.0),
        config=plan.config,
        routing=workload.routing,
        concurrency=workload.concurrency,
        seed=workload.seed,
    )
    source = f"{workload.source}, DP {workload.dp[0]}, {workload.policy[0]}"
    with progress("simulated requests", None) as advance:
        return fit_row(setup, plan.workloads[0], row, free, source=source, advance=advance)


# What is printed


def _console() -> Console:
    return Console(width=None if sys.stdout.isatty() else 140)


def _print_parameters(fit: StepFit | RowFit) -> None:
    table = Table("parameter", "value", "unit", "±", "what it is")
    for name, parameter in PARAMETERS.items():
        error = fit.standard_errors.get(name)
        uncertainty = "not fitted" if error is None else f"{error:.2g}" if math.isfinite(error) else "unknown"
        value = f"{getattr(fit.cost, name):.4g}"
        table.add_row(name, value, parameter.unit, uncertainty, parameter.meaning)
    table.columns[1].justify = table.columns[3].justify = "right"
    _console().print(table)


def _print_steps(fit: StepFit) -> None:
    worst = fit.worst
    typer.echo(
        "±: the standard error of the fit.\n"
        f"{len(fit.measured_ms):,} steps are met within {fit.rms_error:.2%} (root mean square). The worst is "
        f"step {worst + 1:,} of the file: measured {fit.measured_ms[worst]:.4g} ms, predicted "
        f"{fit.predicted_ms[worst]:.4g} ms, {fit.relative_errors[worst]:+.2%}."
    )


def _print_row(fit: RowFit) -> None:
    typer.echo("±: what the value moves when each number of the row is off by 1 %.")
    table = Table("", "published", "simulated", "off by")
    published, simulated = asdict(fit.published), asdict(fit.simulated)
    labels = {"ttft_ms": "TTFT, mean, ms", "tpot_ms": "TPOT, mean, ms", "throughput": "output tokens/s"}
    for name, label in labels.items():
        off = f"{fit.relative_errors[name]:+.2%}"
        table.add_row(label, f"{published[name]:.5g}", f"{simulated[name]:.5g}", off)
    for column in table.columns[1:]:
        column.justify = "right"
    _console().print(table)
    typer.echo(f"{fit.num_simulations} simulations.")
    if fit.rms_error > FAR:
        typer.echo(
            f"warning: the row is missed by {fit.rms_error:.0%} (root mean square); it may be out of reach",
            err=True,
        )


# What is written


def _write(options: Options, fit: StepFit | RowFit) -> None:
    for option, path, data in (
        ("--output", options.output, fit.cost.to_json()),
        ("--json", options.json, as_json(fit)),
    ):
        if path:
            write_json(option, path, data)


def as_json(fit: StepFit | RowFit) -> dict[str, Any]:
    """The object of `--json`."""
    errors = {name: x for name, x in fit.standard_errors.items() if math.isfinite(x)}
    steps = row = None
    if isinstance(fit, StepFit):
        steps = {"measured_ms": fit.measured_ms.tolist(), "predicted_ms": fit.predicted_ms.tolist()}
    else:
        row = {
            "published": asdict(fit.published),
            "simulated": asdict(fit.simulated),
            "relative_errors": fit.relative_errors,
            "simulations": fit.num_simulations,
        }
    return {
        "version": 1,
        "cost": fit.cost.to_json(),
        "parameters": [
            {
                "name": name,
                "value": getattr(fit.cost, name),
                **parameter._asdict(),
                "standard_error": errors.get(name),
            }
            for name, parameter in PARAMETERS.items()
        ],
        "rms_error": fit.rms_error,
        "steps": steps,
        "row": row,
    }


def _plot(fit: StepFit, steps: Sequence[MeasuredStep], path: Path) -> None:
    """Predicted against measured, one point a step."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 7), layout="constrained")
    axes = figure.subplots()
    prefills = [any(work.prefill_tokens for work in step.ranks) for step in steps]
    for is_prefill, label, color in (
        (False, "decode alone", "#4c78a8"),
        (True, "some rank prefills", "#e45756"),
    ):
        kept = [x is is_prefill for x in prefills]
        axes.scatter(fit.measured_ms[kept], fit.predicted_ms[kept], s=12, color=color, alpha=0.6, label=label)
    most = 1.05 * max(fit.measured_ms.max(), fit.predicted_ms.max())
    axes.plot([0, most], [0, most], color="#222222", linewidth=1, label="as measured")
    axes.set(xlim=(0, most), ylim=(0, most), aspect="equal", xlabel="measured, ms a step")
    axes.set(ylabel="predicted, ms a step", title=f"{len(steps):,} steps, within {fit.rms_error:.2%} (rms)")
    axes.legend()
    figure.savefig(path)
