"""What `ascend-twin compile --html`, `--junit` and `--plot` write, from the object of `--json`."""

from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from ..optimized.gdn.ascend_compile import SPACES
from .junit import JUnitCase, JUnitSuite
from .report import Code, Fold, Report, Row, Section, Table, command_line, drawn

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_COLORS = ("#4c78a8", "#f2a900", "#54a24b", "#9d6bb3")


def compile_report(result: Mapping[str, Any]) -> Report:
    """The report of a result, the object that `--json` writes."""
    options, kernels = result["options"], result["kernels"]
    failed = [kernel["kernel"] for kernel in kernels if kernel["failed"]]
    sections = [
        Section("Kernels", [_table(result)]),
        Section(
            "Memory",
            [
                drawn(
                    memory_plot(result),
                    alt="Memory of each kernel on each target, of the limit",
                    caption="What each kernel was given where that is worst. The line is the limit.",
                )
            ],
        ),
        Section("What was compiled", [_models(result), _limits(result)]),
    ]
    if warnings := list(_warnings(result)):
        sections.append(Section("Warnings of the compiler", warnings))
    if failures := list(_failures(result)):
        sections.insert(0, Section("What does not fit", failures))
    return Report(
        title="compile: does every kernel fit on chip?",
        status="failed" if failed else "passed",
        verdict=f"Do not fit: {', '.join(failed)}." if failed else f"All {len(kernels)} kernels fit.",
        command=command_line(
            "compile",
            {
                "--model": options["models"],
                "--tp": options["tp"],
                "--target": options["targets"],
                "--implementation": options["implementations"],
            },
        ),
        facts={
            "kernels": f"{len(kernels)}, {sum(kernel['variants'] for kernel in kernels)} variants of them",
            "targets": ", ".join(options["targets"]),
            "models": str(len(options["models"])),
            "tensor parallel": ", ".join(map(str, options["tp"])),
            "implementations": ", ".join(options["implementations"]),
        },
        sections=sections,
        versions=result["versions"],
    )


def compile_junit(result: Mapping[str, Any]) -> list[JUnitSuite]:
    """A suite for each target and a case for each kernel, of the object that `--json` writes."""
    compiled: dict[tuple[str, str], list[Any]] = defaultdict(list)
    for outcome in result["compiled"]:
        compiled[outcome["target"], outcome["kernel"]].append(outcome)
    return [
        JUnitSuite(
            f"compile.{target}",
            [
                JUnitCase(
                    kernel["kernel"],
                    sum(outcome["seconds"] for outcome in outcomes),
                    failure="\n\n".join(
                        f"does not fit, {_constants(outcome)}, as launched for {_users(outcome)}\n"
                        f"{outcome['message']}"
                        for outcome in outcomes
                        if not outcome["fits"]
                    ),
                )
                for kernel in result["kernels"]
                if (outcomes := compiled[target, kernel["kernel"]])
            ],
            result["versions"],
        )
        for target in result["options"]["targets"]
    ]


def memory_plot(result: Mapping[str, Any]) -> "Figure":
    """Bars of the most that each kernel takes of each memory on each target."""
    from matplotlib.figure import Figure

    targets, limits = result["options"]["targets"], result["limits"]
    kernels = result["kernels"][::-1]
    worst = _worst(result)
    spaces = _spaces(result)
    height = 0.8 / len(targets)
    figure = Figure(figsize=(14, 2.5 + 0.22 * len(kernels) * len(targets)), layout="constrained")
    axes = figure.subplots(1, max(1, len(spaces)), sharey=True, squeeze=False)[0]
    for axis, space in zip(axes, spaces, strict=False):
        of_target = {target: limits[target].get(space, 0) for target in targets}
        for i, target in enumerate(targets):
            planned = {
                place: worst[kernel["kernel"], target, space]
                for place, kernel in enumerate(kernels)
                if (kernel["kernel"], target, space) in worst
            }
            bars = axis.barh(
                [place + 0.4 - (i + 0.5) * height for place in planned],
                [100 * size / of_target[target] for size in planned.values()],
                height,
                label=target,
                color=_COLORS[i % len(_COLORS)],
            )
            axis.bar_label(bars, [f"{size / 1024:.4g}" for size in planned.values()], padding=2, fontsize=7)
        axis.axvline(100, color="#222222", linewidth=1)
        sizes = ", ".join(f"{size // 1024} ({target})" for target, size in of_target.items())
        axis.set_title(f"{space}, KiB: {sizes}", fontsize=8)
        axis.set_xlabel("% of the limit (labels: KiB)")
        axis.set_xlim(0, max(115, min(250, 1.1 * axis.get_xlim()[1])))
    names = [f"{kernel['kernel']}{', DOES NOT FIT' if kernel['failed'] else ''}" for kernel in kernels]
    axes[0].set_yticks(range(len(kernels)), names)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(targets))
    return figure


def _worst(result: Mapping[str, Any]) -> dict[tuple[str, str, str], int]:
    """The most bytes planned for a kernel, on a target, in a memory."""
    worst: dict[tuple[str, str, str], int] = {}
    for outcome in result["compiled"]:
        for space, size in outcome["planned"].items():
            key = outcome["kernel"], outcome["target"], space
            if size and space in result["limits"][outcome["target"]]:
                worst[key] = max(size, worst.get(key, 0))
    return worst


def _spaces(result: Mapping[str, Any]) -> list[str]:
    """The memories that any kernel uses, the best known first."""
    used = {space for kernel in result["kernels"] for space in kernel["worst"]}
    return [space for space in SPACES.values() if space in used]


def _table(result: Mapping[str, Any]) -> Table:
    spaces = _spaces(result)
    rows = []
    for kernel in result["kernels"]:
        cells = (
            kernel["kernel"],
            ", ".join(kernel["implementations"]),
            f"{kernel['variants']} x {kernel['compiled'] // kernel['variants']}",
            *(_cell(kernel["worst"].get(space)) for space in spaces),
            str(len(kernel["warnings"])),
        )
        failed = ("failed", f"{kernel['failed']} of {kernel['compiled']} do not fit")
        rows.append(Row(cells, *(failed if kernel["failed"] else ("passed", "fits"))))
    columns = ("kernel", "launched by", "compiled", *(f"{space}, KiB" for space in spaces), "warnings")
    caption = "Compiled: variants x targets. KiB: planned, of those there are, where that is worst."
    return Table(columns, rows, columns[2:], caption)


def _cell(worst: Mapping[str, Any] | None) -> str:
    if worst is None:
        return "-"
    return f"{worst['bytes'] / 1024:.4g} of {worst['limit'] // 1024} ({worst['target']})"


def _models(result: Mapping[str, Any]) -> Table:
    columns = ("model", "H", "HV", "K", "V", "source")
    rows = [Row(tuple(str(model[key]) for key in ("name", *columns[1:]))) for model in result["models"]]
    return Table(columns, rows, columns[1:5], "Heads and dims of the models, before tensor parallelism.")


def _limits(result: Mapping[str, Any]) -> Table:
    spaces = [space for space in SPACES.values() if any(space in x for x in result["limits"].values())]
    rows = [
        Row((target, *(f"{limits[space] / 1024:.4g}" if space in limits else "-" for space in spaces)))
        for target, limits in result["limits"].items()
    ]
    return Table(("target", *spaces), rows, spaces, "On-chip memory, KiB, as the compiler states it.")


def _warnings(result: Mapping[str, Any]) -> Iterator[Fold]:
    for kernel in result["kernels"]:
        if kernel["warnings"]:
            said = [f"{', '.join(targets)}: {text}" for text, targets in kernel["warnings"].items()]
            yield Fold(kernel["kernel"], said, "warning")


def _failures(result: Mapping[str, Any]) -> Iterator[Fold]:
    """Of each kernel and message, the first that failed."""
    failures: dict[tuple[str, str], list[Mapping[str, Any]]] = defaultdict(list)
    for outcome in result["compiled"]:
        if not outcome["fits"]:
            failures[outcome["kernel"], outcome["message"]].append(outcome)
    for (kernel, message), outcomes in failures.items():
        targets = ", ".join(dict.fromkeys(outcome["target"] for outcome in outcomes))
        launched = f"{_constants(outcomes[0])}, as launched for {_users(outcomes[0])}"
        yield Fold(f"{kernel} on {targets}", [Code(message, launched)], "failed", is_open=True)


def _constants(outcome: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={value}" for name, value in outcome["constants"].items())


def _users(outcome: Mapping[str, Any]) -> str:
    return ", ".join(dict.fromkeys(f"{use['model']} TP {use['tp']}" for use in outcome["used_by"]))
