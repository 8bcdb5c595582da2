"""Bugs put into the plugin's scheduler on purpose: each is found by the suite that is named beside it.

A suite is a test of test_vllm_balance.py, shortened, on a copy of the plugin with the bug in it; on a copy
without a bug all of them find nothing.
"""

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest

from ascend_twin.equivalence_tests import vllm_balance
from ascend_twin.equivalence_tests.installed_vllm import VERSIONS
from ascend_twin.equivalence_tests.scheduler_comparison import first_difference
from ascend_twin.equivalence_tests.source_mutants import mutated
from ascend_twin.equivalence_tests.test_vllm_balance import state_after_a_step_that_fails, with_a_cap_of_two
from ascend_twin.equivalence_tests.vllm_balance import Findings, beside_a_break, beside_upstream

pytestmark = pytest.mark.vllm

MODULES = {
    "admission": "ascend_twin.scheduler.admission",
    "gathered_admission": "ascend_twin.scheduler.gathered_admission",
    "admission_gate": "ascend_twin.optimized.vllm.admission_gate",
    "balance": "ascend_twin.optimized.vllm.balance",
}
"""What there are copies of, each after those that it imports."""

NUM_STEPS = 3_000  # of a suite at most; it ends with the first difference

Suite = Callable[[Any], str]
"""Given a copy of the plugin's module `balance`: what is found, or ""."""


@pytest.fixture(scope="module", autouse=True)
def hook() -> Iterator[None]:
    """The engine hook in place."""
    with vllm_balance.hook_in_place():
        yield


# The suites


def open_gate(balance: Any) -> str:
    """`test_open_gate_equals_upstream`."""
    return Findings(NUM_STEPS, 31, "open_gate", beside_upstream, module=balance).failure


def open_gate_async(balance: Any) -> str:
    """The same, async."""
    return Findings(NUM_STEPS, 31, "open_gate", beside_upstream, always=("async",), module=balance).failure


def shut_gate(balance: Any) -> str:
    """`test_shut_gate_equals_upstreams_source_with_a_break`, when a rank is at the cap."""
    return Findings(NUM_STEPS, 32, "any_rank_at_cap", beside_a_break, module=balance).failure


def shut_gate_near_cap(balance: Any) -> str:
    """The same, when a rank is near the cap."""
    policy, change = "any_rank_near_cap", with_a_cap_of_two
    return Findings(NUM_STEPS, 32, policy, beside_a_break, change=change, module=balance).failure


def failing_step(balance: Any) -> str:
    """`test_gate_is_as_before_after_a_step_that_fails`."""
    return first_difference(*state_after_a_step_that_fails(balance)) or ""


SUITES = (open_gate, open_gate_async, shut_gate, shut_gate_near_cap, failing_step)


class Mutant(NamedTuple):
    """A bug, the suite that finds it, part of what that says, and the version of vLLM for which it is one."""

    name: str
    module: str
    old: str
    new: str
    suite: Suite
    says: str
    version: str | None = None


def of_each_gate(name: str, old: str, new: str, suite: Suite, says: str) -> tuple[Mutant, Mutant]:
    """A bug in the way in which each version is shut; ATTRIBUTE stands for what is set."""
    attributes = {"0.17.0": "max_num_running_reqs", "0.32.0": "max_num_active_reqs"}
    first, second = (
        Mutant(
            f"{name} ({version})",
            "admission_gate",
            old.replace("ATTRIBUTE", attribute),
            new.replace("ATTRIBUTE", attribute),
            suite,
            says.replace("ATTRIBUTE", attribute),
            version,
        )
        for version, attribute in attributes.items()
    )
    return first, second


RESTORED = "    try:\n        yield\n    finally:\n        scheduler.ATTRIBUTE = cap\n"
PASSED_ON = "super().schedule(*args, **kwargs)"

MUTANTS = (
    Mutant(
        "the attribute of the other version",
        "admission_gate",
        '    "max_num_active_reqs": _shut_by_active_requests,\n'
        '    "max_num_running_reqs": _shut_by_running_requests,\n',
        '    "max_num_active_reqs": _shut_by_running_requests,\n'
        '    "max_num_running_reqs": _shut_by_active_requests,\n',
        shut_gate,
        "schedule(): only one raises",
    ),
    Mutant(
        "threshold off by one",
        "admission",
        "for counts in gathered) != self.max_num_running_reqs\n",
        "for counts in gathered) != self.max_num_running_reqs - 1\n",
        shut_gate,
        ".is_open",
    ),
    Mutant(
        "threshold near the cap off by one",
        "admission",
        "for counts in gathered) < self.max_num_running_reqs - 1\n",
        "for counts in gathered) < self.max_num_running_reqs\n",
        shut_gate_near_cap,
        ".is_open",
    ),
    Mutant(
        "cap off by one",
        "balance",
        "cap = getattr(self, cap_name)",
        "cap = getattr(self, cap_name) + 1",
        shut_gate,
        ".is_open",
    ),
    *of_each_gate(
        "gate not restored",
        RESTORED,
        "    yield\n",
        shut_gate,
        ".fields.ATTRIBUTE",
    ),
    *of_each_gate(
        "gate restored to a wrong value",
        RESTORED,
        RESTORED.replace("= cap", "= cap + 1"),
        shut_gate,
        ".fields.ATTRIBUTE",
    ),
    *of_each_gate(
        "gate not restored after an error",
        RESTORED,
        "    yield\n    scheduler.ATTRIBUTE = cap\n",
        failing_step,
        "ATTRIBUTE",
    ),
    Mutant(
        "one is admitted (0.17.0)",
        "admission_gate",
        "scheduler.max_num_running_reqs, len(scheduler.running)",
        "scheduler.max_num_running_reqs, len(scheduler.running) + 1",
        shut_gate,
        "schedule() of",
        "0.17.0",
    ),
    Mutant(
        "one is admitted (0.32.0)",
        "admission_gate",
        "scheduler.max_num_active_reqs, 0",
        "scheduler.max_num_active_reqs, 1",
        shut_gate,
        "schedule() of",
        "0.32.0",
    ),
    Mutant(
        "arguments not passed on, gate open",
        "balance",
        f"        if self.is_open:\n            output = {PASSED_ON}",
        "        if self.is_open:\n            output = super().schedule()",
        open_gate,
        "BalanceScheduler and vLLM",
        "0.32.0",
    ),
    Mutant(
        "arguments not passed on, gate shut",
        "balance",
        f"with self._shut(self):\n                output = {PASSED_ON}",
        "with self._shut(self):\n                output = super().schedule()",
        shut_gate,
        "BalanceScheduler and vLLM",
        "0.32.0",
    ),
    Mutant(
        "async class not chosen",
        "balance",
        "object.__new__(AsyncBalanceScheduler if is_async else cls)",
        "object.__new__(cls)",
        open_gate_async,
        "BalanceScheduler and vLLM",
    ),
    Mutant(
        "gate never shut",
        "balance",
        "        if self.is_open:\n            output",
        "        if True:\n            output",
        shut_gate,
        "schedule() of",
    ),
    Mutant(
        "those who hold blocks are not counted",
        "balance",
        'holding = getattr(self, "kv_holding_waiting", ())',
        "holding = ()",
        shut_gate,
        ".own",
        "0.32.0",
    ),
    Mutant(
        "sessions without input are counted",
        "balance",
        "len(holding) - self.num_waiting_for_streaming_input)",
        "len(holding))",
        shut_gate,
        ".own",
    ),
    Mutant(
        "waiting requests of a paused rank are counted",
        "balance",
        "if self.pause_state == PauseState.UNPAUSED:",
        "if True:",
        shut_gate,
        ".own",
    ),
)


def copies_with(mutant: Any) -> Any:
    return mutated(mutant, MODULES)["balance"]


def marks(mutant: Mutant) -> list[pytest.MarkDecorator]:
    """Skip it with a vLLM for which it is no bug."""
    return [getattr(pytest.mark, VERSIONS[mutant.version])] if mutant.version else []


@pytest.mark.parametrize(
    "mutant", [pytest.param(mutant, id=mutant.name, marks=marks(mutant)) for mutant in MUTANTS]
)
def test_bug_is_found(mutant: Mutant) -> None:
    assert mutant.says in mutant.suite(copies_with(mutant))


@pytest.mark.parametrize("suite", SUITES, ids=lambda suite: suite.__name__)
def test_nothing_is_found_in_a_copy_without_a_bug(suite: Suite) -> None:
    assert suite(copies_with(SimpleNamespace(name="none", module="", old="", new=""))) == ""
