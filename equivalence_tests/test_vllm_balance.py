# pyright: reportMissingImports=false
"""The plugin's `BalanceScheduler` beside the installed vLLM's `Scheduler` and `AsyncScheduler`, step by step.

Every field of every output and the whole state are compared after every step of random mixes: with vLLM
itself while the gate is open, with vLLM's own source with a break where it is shut, and, on 0.17.0, with the
copy in vllm-ascend 0.18.0. What is contributed to a gather is compared with what can be seen from outside.
"""

import ast
import importlib
import importlib.util
import inspect
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import settings

from ascend_twin.equivalence_tests import installed_vllm, vllm_balance
from ascend_twin.equivalence_tests.balance_engines import Gathers
from ascend_twin.equivalence_tests.scheduler_runs import FEATURES_AT_WORK
from ascend_twin.equivalence_tests.scheduler_strategies import FEATURES
from ascend_twin.equivalence_tests.vllm_balance import (
    ANCHORS,
    FEATURES_OF_ADMISSION,
    AnchorError,
    Findings,
    beside_a_break,
    beside_ascend,
    beside_upstream,
    with_a_break,
)
from ascend_twin.scheduler import SchedulerConfig
from ascend_twin.scheduler.admission import POLICIES, RankCounts

pytestmark = pytest.mark.vllm

NUM_STEPS = {"dev": 1_500, "ci": 1_500, "nightly": 50_000}
"""Of random runs of one test, by Hypothesis profile."""

NUM_STEPS_WITH_ALL = {"dev": 20_000, "ci": 20_000, "nightly": 200_000}
"""Of the random runs in which every feature must have been at work, by Hypothesis profile."""

UNSEEN = {"0.17.0": (), "0.32.0": ("common_prefix", "remote_async_load")}
"""By version: features that vLLM has no more, or that are seen by other means (`remote_load_started`)."""


AT_ADMISSION = {*FEATURES_OF_ADMISSION, "remote_async_load", "encoder_budget_stop"}
"""What is looked for right after a frozen step; the last, most often in the first step of a prompt."""


@pytest.fixture(scope="module", autouse=True)
def hook() -> Iterator[None]:
    """The engine hook in place."""
    with vllm_balance.hook_in_place():
        yield


def with_a_cap_of_two(config: SchedulerConfig) -> SchedulerConfig:
    """At a cap of 1 not every policy ever admits anybody."""
    return replace(config, max_num_seqs=max(2, config.max_num_seqs))


def with_a_cap_out_of_reach(config: SchedulerConfig) -> SchedulerConfig:
    return replace(config, max_num_seqs=100)


def steps(of: dict[str, int]) -> int:
    return of[settings.get_current_profile_name()]


def checked(findings: Findings) -> Findings:
    """Findings without a difference, most of whose runs came to their end, with a gather before each step."""
    assert not findings.failure, findings.failure
    assert findings.num_crashed < 0.2 * findings.num_runs
    assert findings.num_drained > 0.5 * findings.num_runs  # 0.17.0 alone, async, loses sessions as often
    assert findings.num_gathers > 0.9 * (findings.num_steps - findings.num_runs)
    if installed_vllm.version() == "0.32.0":
        assert findings.num_miscounted == 0
    assert findings.num_miscounted < 0.2 * findings.num_gathers
    return findings


@pytest.mark.parametrize("scheduling", [(), ("async",)], ids=["any", "async"])
@pytest.mark.parametrize(
    ("policy", "most", "change"),
    [
        ("open_gate", None, lambda config: config),
        ("cadence:interval=1", None, lambda config: config),
        # A rank that is full itself admits nobody anyway.
        ("any_rank_at_cap", lambda cap: cap - 1, lambda config: config),
        ("any_rank_at_cap", lambda cap: cap - 1, with_a_cap_out_of_reach),
        ("any_rank_near_cap", lambda cap: cap - 2, with_a_cap_out_of_reach),
        ("patient", lambda cap: cap - 1, with_a_cap_out_of_reach),
    ],
    ids=["open_gate", "cadence", "at_cap", "at_cap, out of reach", "near_cap, out of reach", "patient"],
)
def test_open_gate_equals_upstream(
    policy: str, most: Any, change: Callable[[SchedulerConfig], SchedulerConfig], scheduling: tuple[str, ...]
) -> None:
    findings = Findings(
        steps(NUM_STEPS), 21, policy, beside_upstream, most=most, change=change, always=scheduling
    )
    checked(findings)
    assert findings.open["prefix_hit"] > 0


@pytest.mark.parametrize("scheduling", [(), ("async",)], ids=["any", "async"])
@pytest.mark.parametrize("policy", [*POLICIES, "cadence:interval=4"])
def test_shut_gate_equals_upstreams_source_with_a_break(policy: str, scheduling: tuple[str, ...]) -> None:
    """And what is contributed to every gather, and decided by it, is what can be seen from outside."""
    findings = Findings(
        steps(NUM_STEPS), 22, policy, beside_a_break, change=with_a_cap_of_two, always=scheduling
    )
    checked(findings)
    if policy != "open_gate":
        assert findings.num_frozen > findings.num_steps / 50
    assert [name for name in FEATURES_OF_ADMISSION if findings.frozen[name]] == []


def test_every_feature_is_at_work_in_open_steps_and_beside_frozen_ones() -> None:
    """What happens at admission comes in open steps right after a frozen one, all else in frozen ones."""
    findings = checked(Findings(steps(NUM_STEPS_WITH_ALL), 23, "any_rank_at_cap", beside_a_break))
    assert findings.num_steps >= 5_000
    assert findings.num_frozen > findings.num_steps / 10
    unseen = UNSEEN[str(installed_vllm.version())]
    names = {*FEATURES_AT_WORK, *FEATURES_OF_ADMISSION} - set(unseen)
    beside = {name: findings.after_frozen if name in AT_ADMISSION else findings.frozen for name in names}
    assert sorted(name for name in names if not findings.open[name]) == []
    assert sorted(name for name, where in beside.items() if not where[name]) == []
    assert [name for name in FEATURES_OF_ADMISSION if findings.frozen[name]] == []
    assert [mode for mode in ("sync", "fcfs", *FEATURES) if not findings.modes[mode]] == []


@pytest.mark.vllm032
def test_frozen_steps_come_with_prefills_held_back_by_vllm_itself() -> None:
    """A frozen step leaves `prefill_capacity_bound` as vLLM's own source with a break does."""
    findings = checked(Findings(steps(NUM_STEPS), 24, "any_rank_at_cap", beside_a_break))
    assert findings.num_throttled_frozen > findings.num_frozen / 10
    assert findings.num_frozen - findings.num_throttled_frozen > findings.num_frozen / 10


def state_after_a_step_that_fails(balance: Any = None) -> tuple[dict[str, Any], dict[str, Any]]:
    """All plain attributes of a scheduler, before and after a frozen step in which vLLM raises.

    Args:
        balance: the module whose `BalanceScheduler` it is; None is the plugin's own.
    """
    kind = vllm_balance.lane(
        vllm_balance.BalanceLane, "any_rank_at_cap", lambda cap: Gathers(0, cap), "", module=balance
    )
    config = SchedulerConfig(
        num_blocks=20, block_size=4, max_num_seqs=3, max_num_batched_tokens=64, max_model_len=32
    )
    engine = kind(config, asynchronous=False, clock=float)
    full = [RankCounts(running=3)] * 3
    engine.gathers.rows = lambda own: [own if rank == 1 else row for rank, row in enumerate(full)]
    engine.gather()
    assert not engine.is_open

    def fail() -> None:
        raise RuntimeError("a step that fails")

    engine.scheduler.kv_cache_manager.new_step_starts = fail
    before = engine.state()["fields"]
    with pytest.raises(RuntimeError, match="a step that fails"):
        type(engine.scheduler).schedule(engine.scheduler)
    after = engine.state()["fields"]
    for fields in (before, after):
        fields.pop("current_step", None)  # 0.32.0 counts it first of all
    return before, after


def test_gate_is_as_before_after_a_step_that_fails() -> None:
    before, after = state_after_a_step_that_fails()
    assert before == after
    assert before["max_num_running_reqs"] == 3


# The third witness


@pytest.fixture
def ascend() -> Any:
    """The module of vllm-ascend."""
    if importlib.util.find_spec("vllm_ascend") is None:
        pytest.skip("vllm-ascend is not installed; vLLM's own source with a break was compared")
    return vllm_balance.ascend_copy()


@pytest.mark.vllm017
@pytest.mark.usefixtures("ascend")
def test_gate_equals_vllm_ascends_copy_with_its_own_threshold() -> None:
    """Given the same numbers of running requests. It has no async scheduler, and no other policy."""
    among = [feature for feature in FEATURES if feature != "async"]
    findings = Findings(3 * steps(NUM_STEPS), 25, "any_rank_at_cap", beside_ascend, among=among)
    checked(findings)
    assert findings.num_frozen > findings.num_steps / 10
    for name in ("preemption", "draft_accepted", "grammar_wait", "remote_delayed_free", "paused_new"):
        assert findings.frozen[name] > 0
    assert findings.after_frozen["remote_load_started"] > 0


@pytest.mark.vllm017
def test_vllm_ascends_copy_differs_from_upstream_in_the_gate_and_one_equal_branch(ascend: Any) -> None:
    """Which is why all of it can be compared: who loads from a remote cache is asked for in other words.

    Upstream asks `_update_waiting_for_remote_kv` whether the load has ended; the copy looks into
    `finished_recving_kv_req_ids` itself, and then calls that, which looks a second time.
    """
    upstream = _waiting_loop(vllm_balance.load_vllm().Scheduler.schedule)
    copied = _waiting_loop(ascend.BalanceScheduler.schedule)
    added = [statement for statement in copied if statement not in upstream]
    gone = [statement for statement in upstream if statement not in copied]
    assert [line.split("\n")[0] for line in added] == [
        "balance_flag = max((t.item() for t in self.balance_queue)) == self.max_num_running_reqs",
        "if balance_flag:",
        "if request.status == RequestStatus.WAITING_FOR_REMOTE_KVS:",
    ]
    assert [line.split("\n")[0] for line in gone] == [
        "if request.status == RequestStatus.WAITING_FOR_REMOTE_KVS:"
    ]


def _waiting_loop(schedule: Any) -> list[str]:
    """The statements of the loop over waiting requests, and those around it."""
    function = ast.parse(textwrap.dedent(inspect.getsource(schedule))).body[0]
    assert isinstance(function, ast.FunctionDef)
    (loop,) = (
        node
        for node in ast.walk(function)
        if isinstance(node, ast.While) and "self.waiting" in ast.unparse(node.test)
    )
    statements: list[ast.stmt] = loop.body
    nothing: list[ast.stmt] = [ast.Pass()]
    loop.body = nothing
    return [*map(ast.unparse, statements), ast.unparse(function)]


@pytest.mark.vllm017
def test_loading_vllm_ascends_copy_leaves_vllm_as_it_was(ascend: Any) -> None:
    core = importlib.import_module("vllm.v1.engine.core")
    scheduler = importlib.import_module("vllm.v1.core.sched.scheduler")
    assert scheduler.Scheduler is not ascend.BalanceScheduler
    assert scheduler.Scheduler.__module__ == scheduler.__name__
    assert core.EngineCoreProc.run_engine_core is not ascend.run_engine_core


# The witness itself


def test_break_is_all_that_is_added_to_upstreams_source() -> None:
    version = str(installed_vllm.version())
    source = textwrap.dedent(inspect.getsource(vllm_balance.load_vllm().Scheduler.schedule))
    lines = with_a_break(source, version).splitlines()
    place = [line.strip() for line in lines].index("if self._frozen:")
    assert lines[place + 1].strip() == "break"
    assert ANCHORS[version] in lines[place + 2]
    assert [*lines[:place], *lines[place + 2 :]] == source.splitlines()


@pytest.mark.parametrize("version", ANCHORS)
@pytest.mark.parametrize("times", [0, 2])
def test_a_source_whose_anchor_has_moved_is_refused(version: str, times: int) -> None:
    condition = f"        if len(self.running) == {ANCHORS[version]}:\n            break\n"
    source = f"def schedule(self):\n    while self.waiting:\n{condition * times}        pass\n"
    with pytest.raises(AnchorError, match=rf"vLLM {version}: .*{ANCHORS[version]}.* {times} times"):
        with_a_break(source, version)
