"""`ascend-twin compile`: does every kernel fit on chip, for every model, without an NPU?

The file written by `--json` holds one object:

    version     1, raised when a field changes its meaning
    passed      bool
    options     {"models", "tp", "targets", "implementations"}: what was compiled
    models      [{"name", "H", "HV", "K", "V", "source"}]
    limits      by target, bytes of each on-chip memory, as the compiler states them
    kernels     [{"kernel", "implementations", "variants", "compiled", "failed", "worst", "warnings"}], the
                rows of the table; worst is by memory {"bytes", "limit", "target", "where"}
    compiled    [{"kernel", "signature", "constants", "divisible", "options", "used_by": [{"implementation",
                "model", "tp"}], "target", "fits", "planned", "message", "warnings", "seconds"}], one of each
                variant on each target
    versions    of what the result depends on
    seconds     float
"""

import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import typer
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..equivalence_tests.run_on_device import versions
from ..optimized.gdn import IMPLEMENTATIONS
from ..optimized.gdn.ascend_compile import SPACES, Compiled, CompilerPool
from ..optimized.gdn.ascend_front_end import REQUIRED, TARGETS, Variant, check_installed
from ..optimized.gdn.models import MODELS, TENSOR_PARALLEL_SIZES, Shape
from ..reference.errors import invalid_argument
from ..reference.gdn.inputs import check_choice
from .compile_report import compile_junit, compile_report, memory_plot
from .output_files import check_apart, write_atomically
from .progress import progress
from .result_files import result_files, write_result


@dataclass(frozen=True)
class Options:
    """What the user asked for.

    Attributes:
        models: keys of `MODELS`; all, if empty.
        tp: tensor-parallel sizes; `TENSOR_PARALLEL_SIZES`, if empty.
        targets: keys of `TARGETS`; all, if empty.
        implementations: keys of `IMPLEMENTATIONS`; all that launch Triton kernels, if empty.
        json, plot, html, junit: files to write, or None.
    """

    models: Sequence[str] = ()
    tp: Sequence[int] = ()
    targets: Sequence[str] = ()
    implementations: Sequence[str] = ()
    json: Path | None = None
    plot: Path | None = None
    html: Path | None = None
    junit: Path | None = None


@dataclass(frozen=True)
class Use:
    """Who launches a variant."""

    implementation: str
    model: str
    tp: int

    def __str__(self) -> str:
        return f"{self.model} TP {self.tp}"


@dataclass(frozen=True)
class Job:
    """A variant to compile, and who launches it."""

    variant: Variant
    used_by: tuple[Use, ...]


@dataclass(frozen=True)
class Outcome:
    """A variant that was compiled for one target."""

    job: Job
    compiled: Compiled


@dataclass(frozen=True)
class Worst:
    """The largest part of a memory that a kernel was planned, or needs."""

    bytes: int
    limit: int
    target: str
    where: str

    @property
    def usage(self) -> float:
        """Bytes as a part of the limit; 1 is the most that fits."""
        return self.bytes / self.limit


@dataclass
class Row:
    """One kernel.

    Attributes:
        variants: differently compiled forms of it.
        compiled, failed: variants times targets, and those of them that do not fit.
        worst: by memory (a value of `SPACES`).
        warnings: what the compiler said, each with the targets on which it did.
    """

    kernel: str
    implementations: list[str] = field(default_factory=list)
    variants: int = 0
    compiled: int = 0
    failed: int = 0
    worst: dict[str, Worst] = field(default_factory=dict)
    warnings: dict[str, list[str]] = field(default_factory=dict)

    def add(self, outcome: Outcome) -> None:
        """Enter a variant on a target."""
        compiled = outcome.compiled
        self.compiled += 1
        self.failed += not compiled.fits
        users = {use.implementation for use in outcome.job.used_by}
        self.implementations = sorted(users.union(self.implementations))
        for space, limit in compiled.limits.items():
            new = Worst(compiled.planned.get(space, 0), limit, compiled.target, str(outcome.job.used_by[0]))
            if new.bytes and (space not in self.worst or new.usage > self.worst[space].usage):
                self.worst[space] = new
        for warning in compiled.warnings:
            targets = self.warnings.setdefault(warning, [])
            if compiled.target not in targets:
                targets.append(compiled.target)


def run_compile(options: Options) -> int:
    """Compile; print the result on stdout and progress on stderr.

    Returns:
        The exit status: 0 when everything fits, else 1.

    Raises:
        InvalidArgumentError: for wrong input, before anything is compiled.
        UnavailableError: where the compilers are not installed.
        typer.Exit: with status 130 when it is interrupted; one line on stderr says how far it came.
    """
    start = time.perf_counter()
    options = _check(options)
    with CompilerPool() as pool:
        jobs = plan(pool, options)
        outcomes = _compile(pool, jobs, options.targets)
    rows, seconds = tabulate(outcomes), time.perf_counter() - start
    _print(rows, outcomes, options, seconds)
    _write(options, _as_json(rows, outcomes, options, seconds))
    return 1 if any(row.failed for row in rows) else 0


def _write(options: Options, result: dict[str, Any]) -> None:
    """The files that were asked for."""
    if options.plot:
        write_atomically("--plot", options.plot, memory_plot(result).savefig)
    write_result(options, result, compile_report, compile_junit)


def _check(options: Options) -> Options:
    """The options with defaults filled in, checked."""
    for option, names, known in (
        ("--model", options.models, MODELS),
        ("--target", options.targets, TARGETS),
        ("--implementation", options.implementations, IMPLEMENTATIONS),
    ):
        for name in names:
            check_choice(option, name, tuple(known))
    check_apart({**result_files(options), "--plot": (options.plot, (".png", ".svg", ".pdf"))}, {})
    models = tuple(dict.fromkeys(options.models)) or tuple(MODELS)
    sizes = tuple(dict.fromkeys(options.tp)) or TENSOR_PARALLEL_SIZES
    for name in models:
        for tp in sizes:
            MODELS[name].shape(tp)
    check_installed()
    return replace(
        options,
        models=models,
        tp=sizes,
        targets=tuple(dict.fromkeys(options.targets)) or tuple(TARGETS),
        implementations=tuple(dict.fromkeys(options.implementations)),
    )


def plan(pool: CompilerPool, options: Options) -> list[Job]:
    """Every variant that the implementations launch for the models, once.

    Raises:
        InvalidArgumentError: for an implementation, named by the user, that launches no Triton kernel.
    """
    ranks: dict[Shape, list[tuple[str, int]]] = {}
    for model in options.models:
        for tp in options.tp:
            ranks.setdefault(MODELS[model].shape(tp), []).append((model, tp))
    variants: dict[str, Variant] = {}
    uses: dict[str, list[Use]] = {}
    for implementation in options.implementations or IMPLEMENTATIONS:
        recorded = pool.record(implementation, list(ranks))
        if options.implementations and not any(recorded.values()):
            invalid_argument("--implementation", implementation, "one that launches Triton kernels")
        for shape, users in ranks.items():
            for variant in recorded[shape]:
                variants[variant.key] = variant
                new = [Use(implementation, model, tp) for model, tp in users]
                uses.setdefault(variant.key, []).extend(new)
    return [Job(variant, tuple(uses[key])) for key, variant in variants.items()]


def _compile(pool: CompilerPool, jobs: Sequence[Job], targets: Sequence[str]) -> list[Outcome]:
    """Outcomes in the order of `jobs` and `targets`."""
    found: dict[str, list[Compiled]] = {}
    with progress("variants", len(jobs)) as advance:
        for variant, results in pool.compile((job.variant for job in jobs), targets):
            found[variant.key] = results
            advance(1, variant.name)
    return [Outcome(job, compiled) for job in jobs for compiled in found[job.variant.key]]


def tabulate(outcomes: Iterable[Outcome]) -> list[Row]:
    """One row a kernel, in the order of their launches."""
    rows: dict[str, Row] = {}
    variants: dict[str, set[str]] = {}
    for outcome in outcomes:
        variant = outcome.job.variant
        rows.setdefault(variant.kernel, Row(variant.name)).add(outcome)
        variants.setdefault(variant.kernel, set()).add(variant.key)
    for kernel, row in rows.items():
        row.variants = len(variants[kernel])
    return list(rows.values())


# Output


def _spaces(rows: Iterable[Row]) -> list[str]:
    """The memories that any kernel uses, the best known first."""
    used = {space for row in rows for space in row.worst}
    return [space for space in SPACES.values() if space in used]


def _print(rows: Sequence[Row], outcomes: Sequence[Outcome], options: Options, seconds: float) -> None:
    spaces = _spaces(rows)
    table = Table(box=box.SIMPLE_HEAD)
    for column in ("kernel", "launched by", "compiled", *(f"{s}, KiB" for s in spaces), "warnings", "fits"):
        table.add_column(column, no_wrap=column == "kernel")
    for row in rows:
        failed = Text(f"no: {row.failed} of {row.compiled}", style="bold red")
        compiled = f"{row.variants} x {row.compiled // row.variants}"
        cells = [_cell(row.worst.get(space)) for space in spaces]
        fits = failed if row.failed else Text("yes")
        users = ", ".join(row.implementations)
        table.add_row(row.kernel, users, compiled, *cells, str(len(row.warnings)), fits)
    console = Console(width=None if sys.stdout.isatty() else 160)
    console.print(table)
    typer.echo("compiled: variants x targets. KiB: planned, of those there are, where that is worst.")
    for row in rows:
        for warning, targets in row.warnings.items():
            typer.echo(f"warning: {row.kernel} ({', '.join(targets)}): {warning}")
    failures: dict[tuple[str, str], list[Outcome]] = {}
    for outcome in outcomes:
        if not outcome.compiled.fits:
            key = (outcome.job.variant.name, outcome.compiled.message)
            failures.setdefault(key, []).append(outcome)
    for (kernel, message), failed in failures.items():
        targets = dict.fromkeys(outcome.compiled.target for outcome in failed)
        typer.echo(f"\n{kernel} does not fit on {', '.join(targets)}\n  {_constants(failed[0].job.variant)}")
        users = dict.fromkeys(str(use) for outcome in failed for use in outcome.job.used_by)
        typer.echo(f"  as launched for {_some(list(users))}\n")
        typer.echo("\n".join(f"  {line}" for line in message.splitlines()))
    variants, kernels = sum(row.variants for row in rows), len(rows)
    typer.echo(
        f"\n{'DOES NOT FIT' if failures else 'Fits'}: {kernels} kernels, {variants} variants of them, "
        f"{len(options.targets)} targets, {len(options.models)} models at TP "
        f"{', '.join(map(str, options.tp))}, in {seconds:.0f} s."
    )


def _cell(worst: Worst | None) -> str:
    if worst is None:
        return "-"
    return f"{worst.bytes / 1024:.4g} of {worst.limit // 1024} ({worst.target})"


def _constants(variant: Variant) -> str:
    return ", ".join(f"{name}={value}" for name, value in variant.constants)


def _some(names: Sequence[str], most: int = 4) -> str:
    """The names, the first few if they are many."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def _as_json(
    rows: Sequence[Row], outcomes: Sequence[Outcome], options: Options, seconds: float
) -> dict[str, Any]:
    limits: dict[str, dict[str, int]] = {target: {} for target in options.targets}
    for outcome in outcomes:
        limits[outcome.compiled.target].update(outcome.compiled.limits)
    return {
        "version": 1,
        "passed": not any(row.failed for row in rows),
        "options": {
            "models": list(options.models),
            "tp": list(options.tp),
            "targets": list(options.targets),
            "implementations": sorted({name for row in rows for name in row.implementations}),
        },
        "models": [asdict(MODELS[name]) for name in options.models],
        "limits": limits,
        "kernels": [asdict(row) for row in rows],
        "compiled": [_outcome_as_json(outcome) for outcome in outcomes],
        "versions": {**versions(), **{name: metadata.version(name) for name in REQUIRED}},
        "seconds": seconds,
    }


def _outcome_as_json(outcome: Outcome) -> dict[str, Any]:
    variant, compiled = outcome.job.variant, asdict(outcome.compiled)
    del compiled["limits"]
    return {
        "kernel": variant.name,
        "signature": dict(variant.signature),
        "constants": {name: _plain(value) for name, value in variant.constants},
        "divisible": list(variant.divisible),
        "options": {name: _plain(value) for name, value in variant.options},
        "used_by": [asdict(use) for use in outcome.job.used_by],
        **compiled,
    }


def _plain(value: Any) -> Any:
    """The value where JSON has its like, else as text (a dtype)."""
    return value if value is None or isinstance(value, (bool, int, float, str)) else str(value)
