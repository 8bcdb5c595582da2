"""`ascend-twin replay`: recorded cases compared with the truth, and run again.

The JSON file holds

    version     1
    passed      bool: nothing differs, and every file could be read
    options     what was asked for
    files       by file {"path", "kind", "title", "notes", "upstream", "origin", "replays", "skipped",
                "seconds"}; skipped says why it was not replayed, "" if it was. A replay is {"subject",
                "passed", "blame", "diagnosis", "findings", "details"}; a finding {"stage", "name", "passed",
                "message", "place", "errors", "limit"}, errors and limit {"ratio", "worst_row"} or null, and
                an error null where it is no finite number
    broken      of a folder's files those that cannot be read or replayed anywhere, {"path", "reason"}
    versions    of what the result depends on
    seconds     float
"""

import itertools
import json
import math
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import typer
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..equivalence_tests.devices import open_test_device
from ..equivalence_tests.minimize_fixture import SECONDS, minimize_fixture
from ..equivalence_tests.replay import RECORDED, Finding, Replay, is_recorded, replay_fixture
from ..equivalence_tests.replay_gdn import REFERENCE
from ..equivalence_tests.replay_plots import plot_heat
from ..equivalence_tests.replay_traces import IMPLEMENTATIONS as SCHEDULERS
from ..equivalence_tests.run_on_device import versions
from ..equivalence_tests.tolerances import Errors
from ..equivalence_tests.traced_collectives import merge_ranks
from ..fixtures.store import SUFFIXES, Fixture, read_fixture, write_fixture
from ..optimized.gdn import IMPLEMENTATIONS
from ..optimized.gdn.ascend_native import LoweringError
from ..reference.errors import AscendTwinError, FixtureError, UnavailableError, invalid_argument
from ..reference.gdn.inputs import check_choice
from . import junit, report
from .compiling import says_when_compiling
from .output_files import check_apart, one_line, printable, write_atomically, write_json
from .progress import progress
from .result_files import result_files

READ = (*sorted(set(SUFFIXES.values())), ".json")
"""Of the files in a folder, those with these suffixes are read."""

_OF_A_SCENARIO = {"scenario", "config", "events"}
_MOST_IN_DETAIL = 3  # files of which every comparison is shown
_CALLS = (REFERENCE, *IMPLEMENTATIONS)


@dataclass(frozen=True)
class Options:
    """What the user asked for.

    Attributes:
        files: files and folders.
        device: where calls are run again.
        implementation: what is run again, of `_CALLS` or `SCHEDULERS`; None: the default of the device.
        max_bytes: size of a file, at most.
        minimize, heatmap, html, junit, json: files to write, or None.
    """

    files: tuple[Path, ...]
    device: str
    implementation: str | None
    max_bytes: int
    minimize: Path | None = None
    heatmap: Path | None = None
    html: Path | None = None
    junit: Path | None = None
    json: Path | None = None


@dataclass(frozen=True)
class Result:
    """What came out of one file.

    Attributes:
        path: of it.
        fixture: what it holds.
        replays: of what was recorded, and of what was run again.
        seconds: that they took.
        skipped: why there are none, "" if there are.
    """

    path: Path
    fixture: Fixture
    replays: tuple[Replay, ...]
    seconds: float
    skipped: str = ""

    @property
    def passed(self) -> bool:
        return all(replay.passed for replay in self.replays)

    @property
    def wrong(self) -> Replay | None:
        """The first replay that differs."""
        return next((replay for replay in self.replays if not replay.passed), None)


class Broken(NamedTuple):
    """A file of a folder that cannot be read, or replayed anywhere, and why: a line that names it."""

    path: Path
    reason: str


@says_when_compiling()
def run_replay(options: Options) -> int:
    """Replay; print the result on stdout and progress on stderr.

    Returns:
        The exit status: 0 when nothing differs, 1 when something does; 2 when a file of a folder is broken.

    Raises:
        FixtureError, InvalidArgumentError: for wrong input; for a broken file if it was given by its name.
        UnavailableError: when nothing of it can be replayed here.
        LoweringError: for a kernel that there is no native code of.
    """
    start = time.perf_counter()
    files = _check(options)
    fixtures, broken = _read(options, files)
    _check_kinds(options, fixtures)
    results = []
    with progress("files", len(fixtures)) as advance:
        for path, fixture in fixtures:
            try:
                is_only_one = len(fixtures) == 1 and not broken
                results.append(_replay(path, fixture, options, is_only_one=is_only_one))
            except FixtureError as error:
                _note(broken, options, path, error)
            advance(1)
    if results and not broken and all(result.skipped for result in results):
        raise UnavailableError(results[0].skipped)
    in_detail = len(results) + len(broken) <= _MOST_IN_DETAIL
    for result in results:
        _print(result, in_detail=in_detail)
    for _, reason in broken:
        typer.echo(f"{'BROKEN':8} {one_line(reason, 1000)}")
    if len(results) + len(broken) > 1:
        typer.echo(_summary(results, broken))
    seconds = time.perf_counter() - start
    _write(options, results, seconds, broken)
    if broken:
        typer.echo(f"error: broken files: {len(broken)} of {len(results) + len(broken)}", err=True)
        return 2
    return 0 if all(result.passed for result in results) else 1


def _check(options: Options) -> list[Path]:
    """The files that are asked for, everything checked that needs no reading."""
    if options.implementation is not None:
        check_choice("--implementation", options.implementation, (*_CALLS, *SCHEDULERS))
    with suppress(UnavailableError):  # which not every file needs
        open_test_device(options.device)
    files: list[Path] = []
    for path in options.files:
        if path.is_dir():
            found = sorted(x for x in path.rglob("*") if x.suffix in READ and not x.name.startswith("."))
            found = [x for x in found if not x.is_dir()]
            if not found:
                invalid_argument("FILE", path, f"a folder with files that end in {', '.join(READ)}")
            files += found
        else:
            files.append(path)
    files = list(dict.fromkeys(files))
    check_apart(
        {
            "--minimize": (options.minimize, tuple(sorted(set(SUFFIXES.values())))),
            "--heatmap": (options.heatmap, (".png", ".svg", ".pdf")),
            **result_files(options),
        },
        {str(path): path for path in files},
    )
    return files


def _read(options: Options, files: Sequence[Path]) -> tuple[list[tuple[Path, Fixture]], list[Broken]]:
    """What the files hold, and those that are broken.

    Collectives of ranks of one run come together, as of the first of their files. JSON of something else is
    passed over in a folder.
    """
    fixtures: list[tuple[Path, Fixture]] = []
    broken: list[Broken] = []
    runs: dict[str, list[Fixture]] = {}
    for path in files:
        try:
            fixture = read_fixture(path, max_bytes=options.max_bytes)
        except FixtureError as error:
            _note(broken, options, path, error)
            continue
        scenario = fixture.config.get("scenario") if path.suffix == ".json" else None
        if path not in options.files and scenario is not None and not _OF_A_SCENARIO & set(scenario):
            continue
        run = fixture.config.get("run") if fixture.kind == "dp" else None
        if run is None:
            fixtures.append((path, fixture))
        elif (key := json.dumps(run, sort_keys=True)) in runs:
            runs[key].append(fixture)
        else:
            runs[key] = [fixture]
            fixtures.append((path, fixture))
    whole = []
    for path, fixture in fixtures:
        ranks = next((ranks for ranks in runs.values() if ranks[0] is fixture), None)
        try:
            whole.append((path, fixture if ranks is None else merge_ranks(ranks)))
        except AscendTwinError as error:
            _note(broken, options, path, _naming(path, error))
    if not whole and not broken:
        allowed = f"a folder with recorded cases, files that end in {', '.join(READ)}"
        invalid_argument("FILE", ", ".join(map(str, options.files)), allowed)
    return whole, broken


def _note(broken: list[Broken], options: Options, path: Path, error: FixtureError) -> None:
    """Add a file of a folder to those that are broken; raise the error if the file was given by its name."""
    if path in options.files:
        raise error
    broken.append(Broken(path, str(error)))


def _naming(path: Path, error: AscendTwinError) -> FixtureError:
    """The error with the name of the file, if it does not say it."""
    return FixtureError(str(error) if str(path) in str(error) else f"{path}: {error}")


def _check_kinds(options: Options, fixtures: Sequence[tuple[Path, Fixture]]) -> None:
    """Raise for options that have no effect on any of the files."""
    kinds = {fixture.kind for _, fixture in fixtures}
    if not kinds:
        return
    if options.implementation in _CALLS and not kinds & {"gdn", "metadata"}:
        invalid_argument("--implementation", options.implementation, f"{' or '.join(SCHEDULERS)} for a trace")
    if options.implementation in SCHEDULERS and "scheduler" not in kinds:
        invalid_argument("--implementation", options.implementation, f"{', '.join(_CALLS)} for a call")
    if options.minimize is not None:
        if len(fixtures) != 1:
            invalid_argument("--minimize", options.minimize, f"one FILE with it; these are {len(fixtures)}")
        (path, fixture) = fixtures[0]
        if fixture.kind not in ("gdn", "scheduler"):
            invalid_argument(
                "--minimize", options.minimize, f"a call or a scheduler; {path} is {fixture.kind}"
            )
        if options.minimize.suffix != SUFFIXES[fixture.kind]:
            invalid_argument("--minimize", options.minimize, f"a file that ends in {SUFFIXES[fixture.kind]}")
    if options.heatmap is not None and (len(fixtures) != 1 or kinds != {"gdn"}):
        invalid_argument("--heatmap", options.heatmap, "one FILE with it, a call of the op")


def _replay(path: Path, fixture: Fixture, options: Options, *, is_only_one: bool) -> Result:
    start = time.perf_counter()
    chosen, is_call = options.implementation, fixture.has_tensors
    implementation = chosen if chosen in (_CALLS if is_call else SCHEDULERS) else None
    wanted: list[str | None] = [None]
    if fixture.kind == "gdn" and is_recorded(fixture):
        wanted = [None, implementation or ("eager" if options.device in ("cpu", "sim") else "fused")]
    elif fixture.kind == "metadata" and is_recorded(fixture):
        wanted = [None, implementation or "eager"]
    elif implementation is not None and fixture.kind != "dp":
        wanted = [implementation]
    try:
        replays = tuple(
            replay_fixture(fixture, path=str(path), device=options.device, implementation=one)
            for one in wanted
        )
    except UnavailableError as error:
        if is_only_one:
            raise
        return Result(path, fixture, (), time.perf_counter() - start, skipped=str(error))
    except LoweringError:  # it is no fault of the file
        raise
    except AscendTwinError as error:
        raise _naming(path, error) from error
    return Result(path, fixture, replays, time.perf_counter() - start)


def _print(result: Result, *, in_detail: bool) -> None:
    if not in_detail:
        typer.echo(printable(f"{_word(result):8} {result.path}{_what_is_wrong(result)}"))
        return
    typer.echo(f"{printable(str(result.path))}: {_headline(result.fixture)}")
    if result.skipped:
        typer.echo(printable(f"skipped: {result.skipped}\n"))
    for replay in result.replays:
        Console(width=None if sys.stdout.isatty() else 140).print(_table(replay))
        if not replay.passed:
            typer.echo(printable(f"{replay.subject}: {replay.diagnosis}\nTo blame: {replay.blame}.\n"))


def _word(result: Result) -> str:
    return "skipped" if result.skipped else "agrees" if result.passed else "DIFFERS"


def _what_is_wrong(result: Result) -> str:
    if result.skipped:
        return f": {result.skipped}"
    return "" if result.wrong is None else f": {result.wrong.subject}: {result.wrong.diagnosis}"


def _headline(fixture: Fixture) -> str:
    """What a file is, and where it comes from, in a line; the file may say anything."""
    origin = fixture.origin
    names = {"gdn": "a call of the op", "metadata": "a build of chunk metadata"}
    names |= {"scheduler": "a scheduler's life", "dp": "collectives of data-parallel ranks"}
    parts = [fixture.about.title or names[fixture.kind]]
    if fixture.config.get("implementation"):
        parts.append(f"recorded of {fixture.config['implementation']}")
    parts += [f"{name} {origin[name]}" for name in ("layer", "rank", "step", "device") if name in origin]
    if origin.get("minimized_from"):
        parts.append(f"made smaller from {origin['minimized_from']}")
    return ", ".join(map(one_line, parts))


def _table(replay: Replay) -> Table:
    """A line for each comparison; what is exact and agrees, of a stage, in one."""
    table = Table(box=box.SIMPLE, title=replay.subject, title_justify="left")
    for heading in ("stage", "tensor", "ratio / limit", "worst row / limit", "where", "result"):
        table.add_column(heading)
    agree = Text("agrees", "green")
    for (stage, is_one), group in itertools.groupby(
        replay.findings, lambda f: (f.stage, f.passed and f.errors is None)
    ):
        findings = list(group)
        if is_one and len(findings) > 1:
            names = f"{findings[0].name} and {len(findings) - 1} more"
            table.add_row(stage, Text(one_line(names)), *_errors(findings[0]), "", agree)
            continue
        for finding in findings:
            result = agree if finding.passed else Text("DIFFERS", "bold red")
            table.add_row(stage, Text(one_line(finding.name)), *_errors(finding), _place(finding), result)
    return table


def _errors(finding: Finding) -> tuple[str, str]:
    if finding.errors is None or finding.limit is None:
        return ("exact", "") if finding.stage not in ("o", "final_state") else ("", "")
    cells = [
        f"{error:.1e} / {limit:.1e}" if math.isfinite(error) else "not finite"
        for error, limit in zip(finding.errors, finding.limit, strict=True)
    ]
    return cells[0], cells[1]


def _place(finding: Finding) -> str:
    return ", ".join(f"{name.replace('_', ' ')} {number}" for name, number in finding.place.items())


def _summary(results: Sequence[Result], broken: Sequence[Broken]) -> str:
    words = {"agrees": "agree", "DIFFERS": "differ", "skipped": "were skipped", "broken": "are broken"}
    counts = {word: sum(_word(result) == word for result in results) for word in words}
    counts["broken"] = len(broken)
    said = ", ".join(f"{count} {words[word]}" for word, count in counts.items() if count)
    return f"{len(results) + len(broken)} files: {said}."


def _write(options: Options, results: Sequence[Result], seconds: float, broken: Sequence[Broken]) -> None:
    """The files that were asked for; none where there is no picture to draw."""
    if options.heatmap is not None:
        replay = results[0].wrong or next(iter(results[0].replays), None) if results else None
        if replay is None or replay.heat is None or not replay.heat.chunks:
            invalid_argument("--heatmap", options.heatmap, "a call with an output that can be compared")
        figure = plot_heat(replay)
        write_atomically("--heatmap", options.heatmap, lambda path: figure.savefig(path, dpi=150))
    if options.json is not None:
        write_json("--json", options.json, as_json(options, results, seconds, broken))
    if options.html is not None:
        report.write_html(options.html, as_report(options, results, broken))
    if options.junit is not None:
        junit.write_junit(options.junit, as_junit(options, results, broken))
    if options.minimize is not None and results:
        _minimize(options.minimize, options, results[0])


def _minimize(path: Path, options: Options, result: Result) -> None:
    wrong = result.wrong
    if wrong is None:
        invalid_argument("--minimize", path, f"a file in which something differs; {result.path} agrees")
    typer.echo(f"looking for a smaller case, at most {SECONDS:.0f} s", err=True)
    implementation = None if wrong.subject == RECORDED else wrong.subject.partition(" ")[0]
    if not result.fixture.has_tensors:
        implementation = options.implementation
    smaller = minimize_fixture(
        result.fixture, path=str(result.path), device=options.device, implementation=implementation
    )
    write_atomically("--minimize", path, lambda temporary: write_fixture(temporary, smaller))
    typer.echo(f"{path}: {_size(smaller)}, of {_size(result.fixture)}, with the same finding")


def _size(fixture: Fixture) -> str:
    """How large a case is, in words."""
    if fixture.kind != "gdn":
        return f"{len(fixture.records)} records"
    B, T, H, K = fixture.tensors["q"].shape
    HV, V = fixture.tensors["v"].shape[2:]
    return f"{B * T:,} tokens (H {H}, HV {HV}, K {K}, V {V})"


def as_json(
    options: Options, results: Sequence[Result], seconds: float, broken: Sequence[Broken] = ()
) -> dict[str, Any]:
    """The object that `--json` writes."""
    return {
        "version": 1,
        "passed": all(result.passed for result in results) and not broken,
        "options": {
            "files": [str(path) for path in options.files],
            "device": options.device,
            "implementation": options.implementation,
        },
        "files": [
            {
                "path": str(result.path),
                "kind": result.fixture.kind,
                "title": result.fixture.about.title,
                "notes": result.fixture.about.notes,
                "upstream": list(result.fixture.about.upstream),
                "origin": dict(result.fixture.origin),
                "replays": [_replay_as_json(replay) for replay in result.replays],
                "skipped": result.skipped,
                "seconds": result.seconds,
            }
            for result in results
        ],
        "broken": [{"path": str(path), "reason": reason} for path, reason in broken],
        "versions": versions(),
        "seconds": seconds,
    }


def _replay_as_json(replay: Replay) -> dict[str, Any]:
    return {
        "subject": replay.subject,
        "passed": replay.passed,
        "blame": replay.blame,
        "diagnosis": replay.diagnosis,
        "findings": [
            {
                "stage": finding.stage,
                "name": finding.name,
                "passed": finding.passed,
                "message": finding.message,
                "place": dict(finding.place),
                "errors": _errors_as_json(finding.errors),
                "limit": _errors_as_json(finding.limit),
            }
            for finding in replay.findings
        ],
        "details": dict(replay.details),
    }


def _errors_as_json(errors: Errors | None) -> dict[str, float | None] | None:
    if errors is None:
        return None
    return {name: x if math.isfinite(x) else None for name, x in errors._asdict().items()}


def as_report(options: Options, results: Sequence[Result], broken: Sequence[Broken] = ()) -> report.Report:
    """The report of a result."""
    names = [path.name for path in options.files]
    shown = [result for result in results if not result.passed] or list(results[:_MOST_IN_DETAIL])
    sections = [report.Section(str(result.path), _parts(result)) for result in shown]
    if len(results) + len(broken) > 1:
        sections.insert(0, report.Section("Files", [_files(results, broken)]))
    passed = all(result.passed for result in results) and not broken
    wrong = next((result.wrong for result in results if result.wrong is not None), None)
    if len(results) > 1 or broken:
        verdict = _summary(results, broken)
    else:
        verdict = "All is as it must be." if wrong is None else f"{wrong.subject}: {wrong.diagnosis}"
    subjects = dict.fromkeys(replay.subject for result in results for replay in result.replays)
    return report.Report(
        title=f"replay: {', '.join(names[:_MOST_IN_DETAIL])}{' ...' if len(names) > _MOST_IN_DETAIL else ''}",
        status="passed" if passed else "failed",
        verdict=verdict,
        command=report.command_line(
            "replay",
            {"--device": options.device, "--implementation": options.implementation},
            *map(str, options.files),
        ),
        facts={"files": str(len(results) + len(broken)), "compared": ", ".join(subjects)},
        sections=sections,
        versions=versions(),
    )


def _files(results: Sequence[Result], broken: Sequence[Broken]) -> report.Table:
    rows = [
        report.Row((str(r.path), r.fixture.kind, _what_is_wrong(r).removeprefix(": ")), _status(r), _word(r))
        for r in results
    ]
    rows += [report.Row((str(path), "", reason), "failed", "BROKEN") for path, reason in broken]
    return report.Table(("file", "kind", "what is wrong"), rows)


def _status(result: Result) -> report.Status:
    return "skipped" if result.skipped else "passed" if result.passed else "failed"


def _parts(result: Result) -> list[report.Part]:
    fixture = result.fixture
    parts: list[report.Part] = [_headline(fixture)]
    if fixture.about.notes:
        parts.append(fixture.about.notes)
    if result.skipped:
        parts.append(result.skipped)
    for replay in result.replays:
        columns = ("stage", "tensor", "ratio / limit", "worst row / limit", "where", "what")
        rows = [
            report.Row(
                (f.stage, f.name, *_errors(f), _place(f), f.message),
                "passed" if f.passed else "failed",
                "agrees" if f.passed else "differs",
            )
            for f in replay.findings
        ]
        if not replay.passed:
            parts.append(f"{replay.subject}: {replay.diagnosis} To blame: {replay.blame}.")
        if replay.heat is not None and replay.heat.chunks:
            alt = f"Errors of {replay.heat.name} by chunk and head, {replay.subject}"
            caption = "Error over limit: blue is within it. The frame is around the first chunk beyond."
            parts.append(report.drawn(plot_heat(replay), alt, caption))
        title = f"{replay.subject}: every comparison"
        table = report.Table(columns, rows, columns[2:4])
        parts.append(report.Fold(title, [table], "passed" if replay.passed else "failed", not replay.passed))
        if replay.details:
            text = json.dumps(dict(replay.details), indent=2, default=str)
            parts.append(report.Fold(f"{replay.subject}: details", [report.Code(text)]))
    if fixture.kind == "dp":
        parts.append(_timeline(fixture))
    if fixture.origin:
        text = json.dumps(dict(fixture.origin), indent=2)
        parts.append(report.Fold("Where it was recorded", [report.Code(text)]))
    return parts


def _timeline(fixture: Fixture) -> report.Figure:
    from ..equivalence_tests.traced_collectives_plot import plot_collectives

    return report.drawn(plot_collectives(fixture), "Collectives of each rank over time")


def as_junit(
    options: Options, results: Sequence[Result], broken: Sequence[Broken] = ()
) -> list[junit.JUnitSuite]:
    """A suite for each kind of a result, with a case for each file and what was compared."""
    suites = []
    for kind in dict.fromkeys(result.fixture.kind for result in results):
        cases = []
        for result in results:
            if result.fixture.kind != kind:
                continue
            seconds = result.seconds / max(1, len(result.replays))
            cases += [
                junit.JUnitCase(f"{result.path}, {replay.subject}", seconds, replay.diagnosis)
                for replay in result.replays
            ]
            if result.skipped:
                cases.append(junit.JUnitCase(str(result.path), skipped=result.skipped))
        suites.append(junit.JUnitSuite(f"replay.{kind}", cases, {"device": options.device, **versions()}))
    if broken:
        cases = [junit.JUnitCase(str(path), error=reason) for path, reason in broken]
        suites.append(junit.JUnitSuite("replay.broken", cases, versions()))
    return suites
