"""The files that commands write of their result, where they are asked for: JSON, a report, JUnit XML."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from . import junit, report
from .output_files import write_json


class ResultOptions(Protocol):
    """The options of a command that says what it found in each of these forms."""

    @property
    def json(self) -> Path | None: ...
    @property
    def html(self) -> Path | None: ...
    @property
    def junit(self) -> Path | None: ...


def result_files(options: ResultOptions) -> dict[str, tuple[Path | None, tuple[str, ...]]]:
    """By option, the file that is asked for and what its name may end in, as `check_apart` takes it."""
    return {
        "--json": (options.json, ()),
        "--html": (options.html, report.SUFFIXES),
        "--junit": (options.junit, junit.SUFFIXES),
    }


def write_result(
    options: ResultOptions,
    result: Mapping[str, Any],
    as_report: Callable[[Any], report.Report],
    as_junit: Callable[[Any], Sequence[junit.JUnitSuite]],
) -> None:
    """Write the files that are asked for.

    Args:
        options: which.
        result: the object of `--json`.
        as_report, as_junit: what the other two make of it.

    Raises:
        InvalidArgumentError: naming the option, when a file cannot be written.
    """
    if options.json:
        write_json("--json", options.json, result)
    if options.html:
        report.write_html(options.html, as_report(result))
    if options.junit:
        junit.write_junit(options.junit, as_junit(result))
