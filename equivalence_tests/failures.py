"""What fails is saved as a fixture, so that it can be replayed and sent to others."""

import os
import re
from pathlib import Path

from ..fixtures.store import SUFFIXES, Fixture, write_fixture
from .cases import Outcome


def failures_folder() -> Path:
    """Where the suites save what fails: the variable ASCEND_TWIN_FAILURES, by default "failures"."""
    return Path(os.environ.get("ASCEND_TWIN_FAILURES") or "failures")


def save_fixture(name: str, fixture: Fixture, folder: Path) -> Path:
    """Write a fixture to `folder`; the same name again replaces it, so that the last is kept.

    Raises:
        OSError: when it cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}{SUFFIXES[fixture.kind]}"
    write_fixture(path, fixture)
    return path


def assert_agrees(outcome: Outcome) -> None:
    """Assert that a case passed; one that did not is saved under the name of the test that runs.

    While Hypothesis shrinks, each smaller case takes the place of the one before.
    """
    if outcome.passed:
        return
    message = str(outcome)
    if outcome.fixture is not None:
        test = os.environ.get("PYTEST_CURRENT_TEST", "case").split(" ")[0].rpartition("::")[2]
        path = save_fixture(re.sub(r"[^\w.-]+", "_", test), outcome.fixture, failures_folder())
        message += f"\nsaved; this says what went wrong first: ascend-twin replay {path}"
    raise AssertionError(message)
