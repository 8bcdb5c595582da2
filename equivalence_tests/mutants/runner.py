"""Puts bugs back, one after the other, and has suites look for them."""

import json
import os
import queue
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from statistics import median
from types import TracebackType
from typing import Literal

from ...reference.errors import UnavailableError
from .bug import Bug

Result = Literal["caught", "missed", "timed out", "broken", "unavailable", "not run"]
"""What became of a suite: it failed; it passed; it took too long; the change is no program, or ended the
process; it cannot run here; an earlier one took too long or was broken. Only the first catches a bug."""

TIMEOUT = 120.0  # s for all suites of a bug; a few are usual


@dataclass(frozen=True)
class Verdict:
    """What a suite said of a bug.

    Attributes:
        suite: its name.
        result: what became of it.
        cases: how many it tried, the one that failed included.
        seconds: of the processor that it took; on the clock, if it timed out.
        message: how it failed, or why it did not run; "" if it passed.
    """

    suite: str
    result: Result
    cases: int
    seconds: float
    message: str


@dataclass(frozen=True)
class Outcome:
    """A bug, or None for the code as it is, and what each suite said."""

    bug: Bug | None
    verdicts: tuple[Verdict, ...]

    @property
    def caught(self) -> bool:
        """Whether any suite found it."""
        return any(verdict.result == "caught" for verdict in self.verdicts)

    @property
    def seconds(self) -> float:
        """All suites together."""
        return sum(verdict.seconds for verdict in self.verdicts)


@dataclass(frozen=True)
class Exhibition:
    """What suites said of bugs, and of the code as it is.

    Attributes:
        unmutated: all suites on the code as it is.
        outcomes: a bug each.
    """

    unmutated: Outcome
    outcomes: tuple[Outcome, ...]

    @property
    def unfit(self) -> tuple[Verdict, ...]:
        """Suites that do not pass the code as it is: what they say of a bug proves nothing."""
        fit = ("missed", "unavailable")
        return tuple(verdict for verdict in self.unmutated.verdicts if verdict.result not in fit)

    @property
    def survivors(self) -> tuple[Outcome, ...]:
        """Bugs that no suite found."""
        return tuple(outcome for outcome in self.outcomes if not outcome.caught)

    @property
    def passed(self) -> bool:
        """Whether all bugs were caught, by suites that pass the code as it is."""
        return not self.unfit and not self.survivors

    @property
    def median_seconds(self) -> float:
        """Of a bug."""
        return median(outcome.seconds for outcome in self.outcomes) if self.outcomes else 0.0


class MutantServer:
    """A warm process (see `server.py`), to be used in a `with` statement."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", f"{__package__}.server"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "PYTHONHASHSEED": "0"},
            start_new_session=True,  # a group of its own: what it has forked ends with it
        )

    def __enter__(self) -> "MutantServer":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.killpg(self._process.pid, signal.SIGKILL)
        self._process.communicate()

    def run(self, bug: Bug | None, suites: Sequence[str], timeout: float = TIMEOUT) -> Outcome:
        """Put a bug back, and run suites on it, in a process of its own.

        Args:
            bug: the bug; None is the code as it is.
            suites: names of `suites.SUITES`.
            timeout: s, for all of them.

        Raises:
            UnavailableError: when the server has ended, for want of memory say.
        """
        change = None if bug is None else (bug.module, bug.old, bug.new)
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None
        assert stdout is not None
        try:
            json.dump({"change": change, "suites": suites, "timeout": timeout}, stdin)
            print(file=stdin, flush=True)
            answer = stdout.readline()
        except (OSError, ValueError):
            answer = ""
        if not answer:
            raise UnavailableError("the process that runs mutants has ended, for want of memory perhaps")
        return Outcome(bug, tuple(Verdict(**verdict) for verdict in json.loads(answer)["verdicts"]))


def exhibit(
    bugs: Sequence[Bug],
    *,
    suites: Iterable[str] | None = None,
    jobs: int = 1,
    timeout: float = TIMEOUT,
    advance: Callable[[int], object] = lambda count: None,
) -> Exhibition:
    """Run the suites of each bug on it, and all of them on the code as it is.

    Args:
        bugs: which.
        suites: only these of each. Default: all of its own.
        jobs: processes at a time, >= 1.
        timeout: s, of a bug.
        advance: is told how many more are done, of `len(bugs) + 1`.

    Raises:
        UnavailableError: when a process that runs them has ended.
    """
    only = None if suites is None else frozenset(suites)

    def of(bug: Bug) -> tuple[str, ...]:
        return tuple(name for name in bug.suites if only is None or name in only)

    everywhere = tuple(dict.fromkeys(name for bug in bugs for name in of(bug)))
    work: list[tuple[Bug | None, tuple[str, ...]]] = [(None, everywhere), *((bug, of(bug)) for bug in bugs)]
    servers: queue.SimpleQueue[MutantServer] = queue.SimpleQueue()
    started = [MutantServer() for _ in range(min(jobs, len(work)))]
    for server in started:
        servers.put(server)

    def run(item: tuple[Bug | None, tuple[str, ...]]) -> Outcome:
        server = servers.get()
        try:
            return server.run(*item, timeout=timeout if item[0] else timeout + TIMEOUT)
        finally:
            servers.put(server)
            advance(1)

    executor = ThreadPoolExecutor(len(started))
    try:
        unmutated, *outcomes = executor.map(run, work)
    finally:
        for server in started:
            server.__exit__(None, None, None)
        executor.shutdown(cancel_futures=True)
    return Exhibition(unmutated, tuple(outcomes))
