"""`ascend-twin mutants`: real bugs put back into our own code, and the suites that must find them.

The file written by `--json` holds one object:

    version         1, raised when a field changes its meaning
    passed          bool: all were caught, by suites that pass the code as it is
    options         {"names", "area", "suite", "timeout"}: what was asked for, lists
    unmutated       [verdict]: each suite on the code as it is, "missed" where it passes
    bugs            [{"name", "upstream": [where it was reported], "area", "what", "module", "old", "new",
                    "caught", "seconds", "verdicts": [verdict]}]
    absent          [{"upstream", "what", "why"}]: bugs that could not be put back
    suites          {name: what it checks}
    median_seconds  of a bug
    seconds         float, of all, on the clock; those of verdicts and bugs are of the processor
    versions        of what the result depends on

A verdict is {"suite", "result", "cases": tried until then, "seconds", "message"}; its result is "caught",
"missed", "timed out", "broken", "unavailable" or "not run" (equivalence_tests/mutants/runner.py).
"""

import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import typer
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..equivalence_tests.mutants import ABSENT, AREAS, BUGS, Bug, Exhibition, Outcome, Verdict, exhibit
from ..reference.errors import UnavailableError, invalid_argument
from .mutants_report import mutants_junit, mutants_report
from .output_files import check_apart
from .progress import progress
from .result_files import result_files, write_result

SUITES = tuple(dict.fromkeys(suite for bug in BUGS for suite in bug.suites))


@dataclass(frozen=True)
class Options:
    """What the user asked for.

    Attributes:
        names: of bugs; none is all.
        area: of `AREAS`, whose bugs are meant; none is all.
        suite: the only ones that are run; none is all that a bug names.
        jobs: processes at a time.
        timeout: s, of a bug.
        json, html, junit: files to write, or None.
    """

    names: tuple[str, ...]
    area: tuple[str, ...]
    suite: tuple[str, ...]
    jobs: int
    timeout: float
    json: Path | None
    html: Path | None
    junit: Path | None


def list_mutants(options: Options) -> None:
    """Print the bugs that are meant, and those that could not be put back."""
    table = Table("bug", "upstream", "area", "what goes wrong, and when", box=box.SIMPLE)
    bugs = _chosen(options)
    for bug in bugs:
        table.add_row(*map(Text, (bug.name, ", ".join(bug.upstream), bug.area, bug.what)))
    console = _console()
    console.print(table)
    typer.echo(f"{len(bugs)} bugs.")
    for absent in ABSENT:
        typer.echo(f"Not here: {', '.join(absent.upstream)} ({absent.what}) {absent.why}")


def run_mutants(options: Options) -> int:
    """Put bugs back; print who found them on stdout and progress on stderr.

    Returns:
        The exit status: 0 when all were caught by suites that pass the code as it is, else 1.

    Raises:
        InvalidArgumentError: for wrong input, before anything is run.
        UnavailableError: when a process that runs bugs has ended, for want of memory say.
    """
    bugs = _chosen(options)
    check_apart(result_files(options), {})
    start = time.perf_counter()
    with progress("runs", len(bugs) + 1, ", one of which is of the code as it is") as advance:
        try:
            found = exhibit(
                bugs,
                suites=options.suite or None,
                jobs=options.jobs,
                timeout=options.timeout,
                advance=advance,
            )
        except UnavailableError as error:
            raise UnavailableError(f"{error}; try --jobs 1") from error
    seconds = time.perf_counter() - start
    console = _console()
    for table in _tables(found):
        console.print(table)
    for line in (
        *_conclusion(found),
        f"{seconds:.1f} s; of the processor {found.median_seconds:.1f} s a bug (median).",
    ):
        typer.echo(line)
    write_result(options, as_json(options, found, seconds), mutants_report, mutants_junit)
    return 0 if found.passed else 1


def as_json(options: Options, found: Exhibition, seconds: float) -> dict[str, Any]:
    """The object of `--json`."""
    from ..equivalence_tests.mutants.suites import SUITES as CHECKS
    from ..equivalence_tests.run_on_device import versions

    return {
        "version": 1,
        "passed": found.passed,
        "options": {
            "names": options.names,
            "area": options.area,
            "suite": options.suite,
            "timeout": options.timeout,
        },
        "unmutated": [asdict(verdict) for verdict in found.unmutated.verdicts],
        "bugs": [
            {
                **{k: v for k, v in asdict(outcome.bug).items() if k != "suites"},
                "caught": outcome.caught,
                "seconds": outcome.seconds,
                "verdicts": [asdict(verdict) for verdict in outcome.verdicts],
            }
            for outcome in found.outcomes
            if outcome.bug is not None
        ],
        "absent": [asdict(absent) for absent in ABSENT],
        "suites": {verdict.suite: CHECKS[verdict.suite].what for verdict in found.unmutated.verdicts},
        "median_seconds": found.median_seconds,
        "seconds": seconds,
        "versions": versions(),
    }


def _chosen(options: Options) -> list[Bug]:
    """The bugs that are meant, in the order of the museum."""
    known = {bug.name for bug in BUGS}
    for name in options.names:
        if name not in known:
            invalid_argument("NAME", name, "a bug that --list names")
    for option, values, allowed in (("--area", options.area, AREAS), ("--suite", options.suite, SUITES)):
        for value in values:
            if value not in allowed:
                invalid_argument(option, value, f"one of {', '.join(allowed)}")
    chosen = [
        bug
        for bug in BUGS
        if (not options.names or bug.name in options.names)
        and (not options.area or bug.area in options.area)
        and (not options.suite or not set(options.suite).isdisjoint(bug.suites))
    ]
    if not chosen:
        given = ", ".join((*options.names, *options.area, *options.suite))
        invalid_argument("NAME, --area and --suite together", given, "some bug; these leave none")
    return chosen


def _console() -> Console:
    return Console(width=None if sys.stdout.isatty() else 160)


def _tables(found: Exhibition) -> list[Table]:
    """A table an area, of its bugs against the suites that are run on any of them."""
    tables = []
    for area in AREAS:
        outcomes = [outcome for outcome in found.outcomes if outcome.bug and outcome.bug.area == area]
        if outcomes:
            tables.append(_table(area, outcomes))
    return tables


def _table(area: str, outcomes: Sequence[Outcome]) -> Table:
    suites = tuple(dict.fromkeys(verdict.suite for outcome in outcomes for verdict in outcome.verdicts))
    table = Table(title=f"{area}: the case at which a suite found it", title_justify="left", box=box.SIMPLE)
    table.add_column("bug", no_wrap=True)
    for suite in suites:
        table.add_column(suite, justify="right", min_width=max(map(len, suite.split())))
    table.add_column("s", justify="right")
    table.add_column("result")
    for outcome in outcomes:
        verdicts = {verdict.suite: verdict for verdict in outcome.verdicts}
        result = Text("caught", "green") if outcome.caught else Text("NOT CAUGHT", "bold red")
        table.add_row(
            Text(outcome.bug.name if outcome.bug else ""),
            *(_cell(verdicts.get(suite)) for suite in suites),
            f"{outcome.seconds:.1f}",
            result,
        )
    return table


def _cell(verdict: Verdict | None) -> Text:
    if verdict is None:
        return Text("")
    if verdict.result == "caught":
        return Text(str(verdict.cases), "green")
    return Text("-" if verdict.result == "missed" else verdict.result, "dim")


def _conclusion(found: Exhibition) -> list[str]:
    lines = [
        f"The code as it is does not pass {verdict.suite} ({verdict.result}): {verdict.message}"
        for verdict in found.unfit
    ]
    for outcome in found.survivors:
        tried = ", ".join(
            f"{verdict.suite} {verdict.result}" + (f" ({verdict.message})" if verdict.message else "")
            for verdict in outcome.verdicts
        )
        lines.append(f"NOT CAUGHT: {outcome.bug.name if outcome.bug else ''}: {tried}")
    num_caught = len(found.outcomes) - len(found.survivors)
    passes = f", and {len(found.unfit)} suites do not pass the code as it is" if found.unfit else ""
    return [*lines, f"{num_caught} of {len(found.outcomes)} bugs caught{passes}."]
