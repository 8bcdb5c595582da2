"""Mutation testing: of every small change of a module's source, whether a test fails because of it.

    python -m ascend_twin.equivalence_tests.mutation_testing [--known FILE] [MODULE ...]

The changes are those of mutmut, one a mutant. Each mutant faces its tests in a process of its own, forked
from one that has the slow imports behind it; there the changed source is imported in place of the file, which
stays as it is. So constants, properties and what runs at import are changed, too, which mutmut itself leaves
out.

A mutant that survives is a question: either a property is missing, or the change changes nothing, and
surviving_mutants.py says why. The exit status is 1 when one is left without an answer, when an answer has no
survivor any more, or when the score of a module (mutants killed, of all) is under LEAST_SCORE.
"""

import argparse
import ast
import difflib
import gc
import hashlib
import importlib
import importlib.util
import itertools
import json
import os
import resource
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
from hypothesis import Phase, settings

from ..reference.errors import AscendTwinError
from .mutants.patch import put_in_place
from .surviving_mutants import EXPLAINED

LEAST_SCORE = 0.95
MOST_MEMORY = 4 * 2**30  # bytes of data: a changed loop may ask for all there is
NEVER_MUTATED_CALLS = "isinstance", "len"  # as in mutmut: nothing but a TypeError would come of it
SLOW_IMPORTS = "torch", "numpy", "hypothesis.stateful"  # none of which imports a module of ours

ROOT = Path(__file__).parents[1]
GATHER_TESTS = "not equals_upstream and not every_feature and not TestBesideFreezing"


@dataclass(frozen=True)
class Suite:
    """The tests that the mutants of a module must face.

    Attributes:
        files: test files, those first that find most in a second.
        select: which tests of them, as pytest's `-k`. Default: all.
    """

    files: tuple[str, ...]
    select: str = ""

    @property
    def pytest_arguments(self) -> list[str]:
        """What to tell pytest."""
        return [*(str(ROOT / "equivalence_tests" / file) for file in self.files), "-k", self.select]


SUITES: Mapping[str, Suite] = {
    "optimized/gdn/metadata.py": Suite(("test_metadata.py",)),
    "optimized/gdn/staging.py": Suite(("test_staging.py",), "not catches_mutant"),
    "scheduler/admission.py": Suite(("test_admission.py",)),
    "scheduler/balance.py": Suite(("test_balance.py",), GATHER_TESTS),
    "scheduler/gathered_admission.py": Suite(("test_balance.py",), GATHER_TESTS),
    "scheduler/lockstep.py": Suite(("test_lockstep.py", "test_lockstep_machine.py")),
}
"""By module. Tests that put bugs of their own into it say nothing about it, and are left out."""


class MutationTestingError(AscendTwinError, RuntimeError):
    """The tests fail, or do not run, without any change: they say nothing about one."""


@dataclass(frozen=True)
class Mutant:
    """A module with one change.

    Attributes:
        line: where the change begins.
        was, now: the lines that differ, joined and without their indentation.
        source: all of it.
    """

    line: int
    was: str
    now: str
    source: str


@dataclass(frozen=True)
class Verdict:
    """What tests say of a module.

    Attributes:
        by: the first test that failed; "timeout" or "signal N" if the process was ended; "" if all passed.
        passed: the tests that passed, and the seconds that each took.
        seconds: of processor time, all in all.
        output: what pytest printed.
    """

    by: str
    passed: dict[str, float]
    seconds: float
    output: str


# Mutants


def mutants_of(source: str) -> list[Mutant]:
    """Every mutant of a module that is another program, by line. Needs mutmut."""
    cst: Any = importlib.import_module("libcst")
    operators: Any = importlib.import_module("mutmut.mutation.mutators").mutation_operators
    module, program = cst.parse_module(source), ast.dump(ast.parse(source))
    mutants = {}
    for node in _mutable_nodes(cst, module):
        kinds = (operator for kind, operator in operators if isinstance(node, kind))
        for changed in itertools.chain.from_iterable(operator(node) for operator in kinds):
            mutant = _mutant(source, module.deep_replace(node, changed).code)
            if ast.dump(ast.parse(mutant.source)) != program:
                mutants[mutant.source] = mutant
    return sorted(mutants.values(), key=lambda mutant: mutant.line)


def _mutable_nodes(cst: Any, node: Any) -> Iterator[Any]:
    """A syntax tree but annotations, which nothing reads, and what mutmut leaves alone, too."""
    is_spared = isinstance(node, cst.Call) and getattr(node.func, "value", "") in NEVER_MUTATED_CALLS
    if not is_spared and not isinstance(node, cst.Annotation | cst.Decorator):
        yield node
        for child in node.children:
            yield from _mutable_nodes(cst, child)


def _mutant(source: str, mutated: str) -> Mutant:
    old, new = source.splitlines(), mutated.splitlines()
    changes = [op for op in difflib.SequenceMatcher(None, old, new, False).get_opcodes() if op[0] != "equal"]
    (_, start, _, new_start, _), (_, _, end, _, new_end) = changes[0], changes[-1]
    was, now = (" ".join(map(str.strip, lines)) for lines in (old[start:end], new[new_start:new_end]))
    return Mutant(start + 1, was, now, mutated)


# A mutant and its tests


class _Listener:
    """A pytest plugin: the same examples for every mutant, the fastest tests first, and what came of them."""

    def __init__(self, seconds_of: Mapping[str, float]) -> None:
        self.seconds_of = seconds_of
        self.first_failure = ""
        self.passed: dict[str, float] = {}

    def pytest_configure(self) -> None:
        profile, phases = settings.get_current_profile_name(), (Phase.explicit, Phase.generate)
        settings.register_profile(profile, settings(), derandomize=True, database=None, phases=phases)
        settings.load_profile(profile)

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        items.sort(key=lambda item: self.seconds_of.get(item.nodeid, 0.0))

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        self._note_failure(report)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self._note_failure(report)
        if report.when == "call" and report.passed:
            self.passed[report.nodeid] = report.duration

    def _note_failure(self, report: pytest.CollectReport | pytest.TestReport) -> None:
        if report.failed and not self.first_failure:
            self.first_failure = report.nodeid


def judge(
    module: str,
    path: Path,
    source: str,
    pytest_arguments: Sequence[str],
    *,
    seconds_of: Mapping[str, float] = MappingProxyType({}),
    most_seconds: int = 600,
) -> Verdict:
    """Run tests in a process of its own, where a module has another source than that in its file.

    Args:
        module: its full name; not imported in this process.
        path: its file.
        source: what it is there.
        pytest_arguments: which tests.
        seconds_of: what tests took before; the fastest run first. Default: they run in their own order.
        most_seconds: of processor time, or ten times as many of any; then the process is ended.
    """
    with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryFile("w+") as answer:
        pid = os.fork()
        if not pid:
            try:
                os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
                os.dup2(output.fileno(), 1)
                os.dup2(output.fileno(), 2)
                sys.stdout = sys.stderr = os.fdopen(1, "w", buffering=1, closefd=False)
                _limit(most_seconds)
                put_in_place(module, str(path), source)
                listener = _Listener(seconds_of)
                status = pytest.main(["-x", "-p", "no:cacheprovider", *pytest_arguments], plugins=[listener])
                by = listener.first_failure or ("" if status == 0 else f"pytest: {status!r}")
                json.dump((by, listener.passed), answer)
                answer.flush()
            finally:
                os._exit(0)
        _, status, usage = os.wait4(pid, 0)
        output.seek(0)
        answer.seek(0)
        by, passed = json.loads(answer.read() or '["no answer", {}]')
        if os.WIFSIGNALED(status):
            number = os.WTERMSIG(status)
            by = "timeout" if number in (signal.SIGXCPU, signal.SIGALRM) else f"signal {number}"
        return Verdict(by, passed, usage.ru_utime + usage.ru_stime, output.read())


def _limit(most_seconds: int) -> None:
    resource.setrlimit(resource.RLIMIT_CPU, (most_seconds, most_seconds + 10))
    resource.setrlimit(resource.RLIMIT_DATA, (MOST_MEMORY, MOST_MEMORY))
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.alarm(10 * most_seconds)


def survivors(
    module: str,
    path: Path,
    mutants: Sequence[Mutant],
    pytest_arguments: Sequence[str],
    known: dict[str, str] | None = None,
) -> Iterator[Mutant]:
    """Those of the mutants of a module that no test finds, each as soon as that is known.

    Args:
        module: its full name; not imported in this process.
        path: its file.
        mutants: of it.
        pytest_arguments: which tests.
        known: what killed a mutant in an earlier run, by `_key`; these are not tested again, and it grows.

    Raises:
        MutationTestingError: when a test fails, or none passes, without any change.
    """
    known = {} if known is None else known
    unchanged = judge(module, path, path.read_text(encoding="utf-8"), pytest_arguments)
    if unchanged.by or not unchanged.passed:
        raise MutationTestingError(
            f"{path}: without any change, the first failure is {unchanged.by or 'that no test ran'}\n"
            f"{unchanged.output}"
        )
    limits = {"seconds_of": unchanged.passed, "most_seconds": 5 + round(3 * unchanged.seconds)}
    for mutant in mutants:
        key = _key(mutant)
        if key not in known:
            verdict = judge(module, path, mutant.source, pytest_arguments, **limits)
            if verdict.by:
                known[key] = verdict.by
            else:
                yield mutant


def _key(mutant: Mutant) -> str:
    return hashlib.sha256(mutant.source.encode()).hexdigest()[:16]


# All of it


def main(argv: Sequence[str] | None = None) -> int:
    """Test the mutants of modules, say which survive, and return the exit status."""
    parser = argparse.ArgumentParser(prog=f"python -m {__spec__.name}", allow_abbrev=False)
    parser.add_argument("modules", nargs="*", metavar="MODULE", help=f"default: {' '.join(SUITES)}")
    parser.add_argument(
        "--known", type=Path, metavar="FILE", help="mutants killed in earlier runs: left out now; added to"
    )
    options = parser.parse_args(argv)
    for module in options.modules:
        if module not in SUITES:
            parser.error(f"MODULE is {module}; allowed: {' '.join(SUITES)}")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    for name in SLOW_IMPORTS:
        importlib.import_module(name)
    gc.freeze()  # pytest collects garbage ten times; what is imported here is none
    known = json.loads(options.known.read_text()) if options.known and options.known.exists() else {}
    is_good = True
    for module in options.modules or SUITES:
        try:
            is_good &= _test_module(module, known)
        finally:
            if options.known:
                options.known.write_text(json.dumps(known, indent=0))
    return int(not is_good)


def _test_module(module: str, known: dict[str, str]) -> bool:
    """Whether nothing is left to do for a module; prints what is."""
    path = ROOT / module
    start = time.monotonic()
    mutants = mutants_of(path.read_text(encoding="utf-8"))
    name = "ascend_twin." + module.removesuffix(".py").replace("/", ".")
    explained = {(each.was, each.now) for each in EXPLAINED.get(module, ())}
    needless, num_explained, num_survived = set(explained), 0, 0
    for mutant in survivors(name, path, mutants, SUITES[module].pytest_arguments, known):
        change = mutant.was, mutant.now
        needless.discard(change)
        if change in explained:
            num_explained += 1
        else:
            num_survived += 1
            print(f"{module}:{mutant.line} survived\n  - {mutant.was}\n  + {mutant.now}", flush=True)
    for was, now in sorted(needless):
        print(f"{module}: explained, but no survivor\n  - {was}\n  + {now}")
    num_killed = len(mutants) - num_explained - num_survived
    score = num_killed / len(mutants)
    print(
        f"{module}: {len(mutants)} mutants, {num_killed} killed, {num_explained} explained, "
        f"{num_survived} survived, score {score:.1%}, {time.monotonic() - start:.0f} s",
        flush=True,
    )
    return score >= LEAST_SCORE and not num_survived and not needless


if __name__ == "__main__":
    sys.exit(main())
