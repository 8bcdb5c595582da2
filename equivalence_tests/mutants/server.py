"""A warm process that runs suites on bugs, each bug in a process forked from it.

Importing torch takes seconds, and a bug must not be in the same process as another. So this process imports
what belongs to others, and nothing of ours that could be changed; a fork then takes the bug in as it imports
the rest. Requests come as JSON on stdin, one a line, and answers go to stdout in the same way:

    request   {"change": null or [module, old, new], "suites": [name, ...], "timeout": seconds}
    answer    {"verdicts": [{"suite", "result", "cases", "seconds", "message"}, ...]}, a verdict a suite

`python -m ascend_twin.equivalence_tests.mutants.server` is started by `runner.py`.
"""

import json
import os
import select
import signal
import sys
import time
import traceback
from collections.abc import Iterator
from typing import Any, TextIO

from ...reference.errors import InvalidArgumentError, UnavailableError
from . import patch

# What a fork would import itself, of others. Triton is not: it must be told first that it interprets.
PRELOADED = ("numpy", "torch", "hypothesis.stateful", "pytest")


def main() -> None:
    """Serve until stdin ends."""
    for name in PRELOADED:
        __import__(name)
    requests, answers = sys.stdin, os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a suite prints is no answer
    for line in requests:
        json.dump({"verdicts": _in_a_fork(json.loads(line))}, answers)
        answers.write("\n")
        answers.flush()


def _in_a_fork(request: dict[str, Any]) -> list[dict[str, Any]]:
    """What a fork says of each suite, in order; what it did not come to is said here."""
    read, write = os.pipe()
    start = time.perf_counter()
    child = os.fork()
    if child == 0:
        os.close(read)
        _run(request, os.fdopen(write, "w"))
    os.close(write)
    text, in_time = _read(read, start + request["timeout"])
    if not in_time:
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    verdicts = [json.loads(line) for line in text.splitlines()]
    if len(verdicts) < len(request["suites"]):
        result, message = "timed out", f"after {request['timeout']:g} s"
        if in_time:
            result, message = "broken", f"the process ended with {os.waitstatus_to_exitcode(status)}"
        seconds = time.perf_counter() - start - sum(verdict["seconds"] for verdict in verdicts)
        ended = request["suites"][len(verdicts)]
        verdicts.append(_verdict(ended, result, 0, seconds, message))
        left = request["suites"][len(verdicts) :]
        verdicts += [_verdict(name, "not run", 0, 0.0, f"{ended}: {result}") for name in left]
    return verdicts


def _read(pipe: int, deadline: float) -> tuple[str, bool]:
    """All whole lines that come before the deadline, and whether the other end was closed by then."""
    received, is_closed = b"", False
    while not is_closed and (seconds := deadline - time.perf_counter()) > 0:
        if select.select([pipe], [], [], seconds)[0]:
            part = os.read(pipe, 65536)
            received, is_closed = received + part, not part
    os.close(pipe)
    return received[: received.rfind(b"\n") + 1].decode(), is_closed


def _verdict(suite: str, result: str, cases: int, seconds: float, message: str) -> dict[str, Any]:
    return {"suite": suite, "result": result, "cases": cases, "seconds": seconds, "message": message}


# In a fork


def _run(request: dict[str, Any], answers: TextIO) -> None:
    """Take the bug in, run the suites, and end this process."""
    status = 1
    try:
        for verdict in _verdicts(request):
            print(json.dumps(verdict), file=answers, flush=True)
        status = 0
    finally:
        os._exit(status)


def _verdicts(request: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """What each suite says, as it comes."""
    if request["change"]:
        try:
            patch.install(patch.Change(*request["change"]))
        except InvalidArgumentError as error:
            yield from [_verdict(name, "broken", 0, 0.0, str(error)) for name in request["suites"]]
            return
    yield from map(_judge, request["suites"])


def _judge(name: str) -> dict[str, Any]:
    """Run a suite up to the first case that fails."""
    import pytest

    begun: list[str] = []
    result, message = "missed", ""
    start = time.process_time()
    try:
        from .suites import SUITES, few_examples

        if name not in SUITES:
            return _verdict(name, "broken", 0, 0.0, "no suite has this name")
        few_examples()
        SUITES[name].run(begun.append)
    except UnavailableError as error:
        result, message = "unavailable", str(error)
    except (NameError, ImportError, SyntaxError) as error:  # a mistake of whoever wrote the change
        result, message = "broken", f"{type(error).__name__}: {error}"
    except (Exception, pytest.fail.Exception) as error:
        what = " ".join(str(error).split()) or str(traceback.extract_tb(error.__traceback__)[-1].line)
        result, message = "caught", f"{begun[-1] if begun else 'begin'}: {type(error).__name__}: {what}"
    return _verdict(name, result, len(begun), time.process_time() - start, message[:500])


if __name__ == "__main__":
    main()
