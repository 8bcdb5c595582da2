"""What `ascend-twin verify --html` and `--junit` write, from the object of `--json`."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..equivalence_tests.tolerances import Errors
from ..optimized.gdn import IMPLEMENTATIONS
from .junit import JUnitCase, JUnitSuite
from .report import Code, Figure, Fold, Report, Row, Section, Table, command_line, drawn

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Plot

MOST_LENGTHS = 8
"""Of the sequences of a batch, so many lengths are shown."""

OPTIONS = {
    "trace": "--trace",
    "cases": "--cases",
    "seed": "--seed",
    "max_num_batched_tokens": "--max-num-batched-tokens",
    "max_num_seqs": "--max-num-seqs",
    "implementation": "--implementation",
    "device": "--device",
    "dtype": "--dtype",
    "H": "--num-heads",
    "HV": "--num-value-heads",
    "K": "--head-dim-k",
    "V": "--head-dim-v",
}
"""All that a result depends on, by its name in `options`."""


def verify_report(result: Mapping[str, Any]) -> Report:
    """The report of a result, the object that `--json` writes."""
    options, source = result["options"], result["source"]
    is_interpreted = options["device"] == "cpu" and IMPLEMENTATIONS[options["implementation"]].uses_triton
    device = options["device"] + (" (interpreted)" if is_interpreted else "")
    covered = ", ".join(f"{count:,} {what}" for what, count in result["covered"].items())
    failed = sum(not batch["passed"] for batch in result["batches"])
    verdict = f"{failed} of {len(result['batches'])} batches differ. Checked" if failed else "All agree"
    sections = [
        Section("Against the definition", [_suites(result["suites"])]),
        Section("How near to the limits", [_figure(result["batches"])]),
        Section("Batches", [Fold("Each batch", [_batches(result["batches"])], is_open=bool(failed))]),
    ]
    if result["failure"]:
        sections.insert(0, _failure(result["failure"]))
    return Report(
        title=f"verify: {options['implementation']} on {device}, {options['dtype']}",
        status="passed" if result["passed"] else "failed",
        verdict=f"{verdict}: {covered}.",
        command=command_line("verify", {option: options[name] for name, option in OPTIONS.items()}),
        facts={
            "implementation": options["implementation"],
            "device": device,
            "dtype": options["dtype"],
            "heads and dims": ", ".join(f"{name} {options[name]}" for name in ("H", "HV", "K", "V")),
            "seed": str(options["seed"]),
            "workload": source["workload"],
            "prefill steps": f"{source['checked']} of {source['prefill_steps']:,}, and {source['corners']} "
            "corner batches",
        },
        sections=sections,
        versions=result["versions"],
    )


def verify_junit(result: Mapping[str, Any]) -> list[JUnitSuite]:
    """A case for each batch of a result, the object that `--json` writes."""
    options = result["options"]
    name = f"verify.gdn.{options['implementation']}.{options['device']}.{options['dtype']}"
    cases = [
        JUnitCase(f"batch {i}, {_kind(batch)}", batch["seconds"], failure=batch["message"])
        for i, batch in enumerate(result["batches"])
    ]
    return [JUnitSuite(name, cases, {"seed": str(options["seed"]), **result["versions"]})]


def _failure(failure: Mapping[str, Any]) -> Section:
    parts = [Code(failure["message"])]
    if failure["code"]:
        parts.append(Code(failure["code"], "This reproduces it:"))
    return Section("The smallest batch that differs", parts)


def _suites(suites: Sequence[Mapping[str, Any]]) -> Table:
    columns = ("suite", "batches", "ratio / limit", "worst row / limit", "where, or what differs")
    rows = []
    for suite in suites:
        errors = [_error(suite[metric]) for metric in Errors._fields]
        if suite["name"] == "metadata":
            errors[0] = "exact"
        nearest = [suite[metric]["where"] for metric in Errors._fields if suite[metric]]
        place = suite["problem"] or " / ".join(dict.fromkeys(nearest))
        status, word = ("failed", f"{suite['failed']} differ") if suite["failed"] else ("passed", "agree")
        rows.append(Row((suite["name"], str(suite["batches"]), *errors, place), status, word))
    caption = "Of each suite, the errors nearest to their limits."
    return Table(columns, rows, columns[1:4], caption)


def _error(worst: Mapping[str, Any] | None) -> str:
    if worst is None:
        return ""
    error = "not finite" if worst["error"] is None else f"{worst['error']:.1e}"
    return f"{error} / {worst['limit']:.1e}"


def _batches(batches: Sequence[Mapping[str, Any]]) -> Table:
    columns = ("batch", "of", "tokens", "sequences", "their lengths", "what differs")
    rows = []
    for i, batch in enumerate(batches):
        lens = batch["seq_lens"]
        more = f", and {len(lens) - MOST_LENGTHS} more" if len(lens) > MOST_LENGTHS else ""
        cells = (
            str(i),
            _kind(batch),
            f"{sum(lens):,}",
            str(len(lens)),
            ", ".join(map(str, lens[:MOST_LENGTHS])) + more,
            batch["message"],
        )
        rows.append(Row(cells, *(("passed", "agrees") if batch["passed"] else ("failed", "differs"))))
    return Table(columns, rows, ("batch", "tokens", "sequences"))


def _kind(batch: Mapping[str, Any]) -> str:
    return "corner" if batch["corner"] else "workload"


def _figure(batches: Sequence[Mapping[str, Any]]) -> Figure:
    return drawn(
        _usage_plot(batches),
        alt="Error of each batch as a part of its limit",
        caption="The larger of the two errors of each batch over its limit, the red line. No point: no "
        "error at all, or a difference in kind (shape, NaN, metadata).",
    )


def _usage_plot(batches: Sequence[Mapping[str, Any]]) -> "Plot":
    from matplotlib.figure import Figure as Plot
    from matplotlib.ticker import MaxNLocator

    plot = Plot(figsize=(9, 3), layout="constrained")
    axes = plot.subplots()
    for name, marker in (("reference", "s"), ("o", "o"), ("final_state", "^")):
        points = [(i, b["usage"][name]) for i, b in enumerate(batches) if b["usage"].get(name)]
        x, y = zip(*points, strict=True) if points else ((), ())
        axes.plot(x, y, marker, label=name, markersize=4, alpha=0.7)
    axes.axhline(1, color="#b5202c", linewidth=1)
    axes.set(xlabel="batch", ylabel="error / limit", yscale="log")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    plot.legend(loc="outside upper right", ncols=3, fontsize="small")
    return plot
