"""Results as JUnit XML, which CI systems show."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from .output_files import printable, write_atomically

if TYPE_CHECKING:
    from junitparser import TestCase, TestSuite

SUFFIXES = (".xml",)
"""What the name of a JUnit file may end in."""


@dataclass(frozen=True)
class JUnitCase:
    """One thing that was checked.

    Attributes:
        name: of it; with that of its suite, the same in each run, so that a CI system sees its history.
        seconds: that it took, 0 where that is not known.
        failure: what is wrong, "" if nothing is; its first line is what a CI system shows in a list.
        skipped: why it was not checked, "" if it was.
        output: what else there is to say.
        error: why it could not be checked although it should have been, "" if it was.
    """

    name: str
    seconds: float = 0.0
    failure: str = ""
    skipped: str = ""
    output: str = ""
    error: str = ""


@dataclass(frozen=True)
class JUnitSuite:
    """Cases that belong together.

    Attributes:
        name: of the suite, with dots between group and suite ("verify.gdn"); no two of a file are alike.
        cases: what was checked.
        properties: what the results depend on, by name: seed, versions.
    """

    name: str
    cases: Sequence[JUnitCase]
    properties: Mapping[str, str] = field(default_factory=dict)


def write_junit(path: Path, suites: Sequence[JUnitSuite], option: str = "--junit") -> None:
    """Write suites to a file, in one step.

    Args:
        path: the file; check it before any work with `check_writable` or `check_apart`, and `SUFFIXES`.
        suites: what is written.
        option: that names the file.

    Raises:
        InvalidArgumentError: naming the option, when the file cannot be written.
    """
    from junitparser import JUnitXml

    file = JUnitXml("ascend-twin")
    for suite in suites:
        file.add_testsuite(_suite(suite))
    file.update_statistics()
    write_atomically(option, path, lambda temporary: file.write(str(temporary), pretty=True))


def _suite(suite: JUnitSuite) -> "TestSuite":
    from junitparser import TestSuite

    element = TestSuite(printable(suite.name))
    for name, value in suite.properties.items():
        element.add_property(printable(name), printable(value))
    element.add_testcases([_case(suite.name, case) for case in suite.cases])
    return element


def _case(suite: str, case: JUnitCase) -> "TestCase":
    from junitparser import Error, Failure, Skipped, TestCase

    element = TestCase(printable(case.name), printable(suite), round(case.seconds, 3))
    if case.failure:
        failure = Failure(printable(case.failure.splitlines()[0]), "failure")
        failure.text = printable(case.failure)
        element.result = failure
    elif case.error:
        element.result = Error(printable(case.error), "error")
    elif case.skipped:
        element.result = Skipped(printable(case.skipped))
    if case.output:
        element.system_out = printable(case.output)
    return element
