"""Two real engines of vLLM in lockstep: balance scheduling changes when requests speak, and never what."""

import contextlib
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ascend_twin.equivalence_tests import installed_vllm, vllm_stub
from ascend_twin.equivalence_tests.paged_model import OracleMismatchError
from ascend_twin.reference.errors import LockstepError, UnavailableError

pytestmark = pytest.mark.vllm

POLICIES = (None, "any_rank_at_cap", "patient:patience=2", "cadence:interval=3")
FEATURES = (
    "waves",
    "num_dummies",
    "num_resumed",
    "num_prefix_hits",
    "aborts",
    "pauses, keep",
    "pauses, wait",
)
RunAll = Callable[..., list[Any]]
PLANS = [(seed, 1 + seed % 2, 12) for seed in range(12)]  # for what is wrong in most runs


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """Carries out a plan, with the plugin's hook in place."""
    installed_vllm.prepare_import()
    vllm_stub.register_model()
    from ascend_twin.equivalence_tests.vllm_engine_runs import EngineRun, choose_plan
    from ascend_twin.optimized.vllm import engine_hook

    engine_hook.install()
    model = vllm_stub.write_model(tmp_path_factory.mktemp("model"))
    pauses_alone = installed_vllm.version() == "0.17.0"  # newer ones pause all ranks, or none

    def carry_out(
        seed: int,
        num_waves: int,
        num_requests: int,
        policy: str | None = "any_rank_at_cap",
        is_async: bool = False,
    ) -> Any:
        plan = choose_plan(seed, num_waves, num_requests, pauses_alone=pauses_alone)
        return EngineRun(model, plan, policy, is_async)

    return carry_out


@pytest.fixture
def run_all(run: Callable[..., Any]) -> RunAll:
    """Carries out some plans, with what the test has broken."""

    def carry_out(is_async: bool = False) -> list[Any]:
        return [run(*plan, is_async=is_async) for plan in PLANS]

    return carry_out


@pytest.mark.parametrize("is_async", [False, True], ids=["sync", "async"])
@pytest.mark.parametrize("policy", POLICIES)
def test_engines_say_what_they_must_whatever_the_policy(
    run: Callable[..., Any], policy: str | None, is_async: bool
) -> None:
    features: Counter[str] = Counter()

    @given(st.integers(0, 2**32 - 1), st.integers(1, 3), st.integers(1, 12))
    def check(seed: int, num_waves: int, num_requests: int) -> None:
        features.update(run(seed, num_waves, num_requests, policy, is_async).features)

    check()
    due = FEATURES + ("frozen steps", "shut gates") * bool(policy) + ("num_ahead",) * is_async
    assert not [name for name in due if not features[name]], features


def test_engines_do_well_in_the_plans_that_show_what_is_wrong(run_all: RunAll) -> None:
    runs = run_all()
    assert all(run.features["steps"] for run in runs)
    assert sum(run.features["frozen steps"] for run in runs) > 20


def _break_gather(monkeypatch: pytest.MonkeyPatch, how_often: Callable[[Any], int]) -> None:
    """Have the hook gather as often as this says of an engine."""
    from ascend_twin.optimized.vllm import engine_hook

    original = engine_hook.gather

    def gather(engine: Any) -> None:
        for _ in range(how_often(engine)):
            original(engine)

    monkeypatch.setattr(engine_hook, "gather", gather)


def test_engines_that_do_not_all_gather_are_seen(run_all: RunAll, monkeypatch: pytest.MonkeyPatch) -> None:
    _break_gather(monkeypatch, lambda engine: engine.dp_rank == 0)
    with pytest.raises(LockstepError, match=r"rank 1 ended: SchedulerStateError|different collectives"):
        run_all()


def test_an_engine_that_gathers_twice_is_seen(run_all: RunAll, monkeypatch: pytest.MonkeyPatch) -> None:
    _break_gather(monkeypatch, lambda engine: 1 + engine.dp_rank)
    with pytest.raises(LockstepError, match=r"rank 1 in all_gather|rank \d ended: SchedulerStateError"):
        run_all()


def test_engines_that_all_gather_twice_are_seen(run_all: RunAll, monkeypatch: pytest.MonkeyPatch) -> None:
    _break_gather(monkeypatch, lambda engine: 2)
    with pytest.raises(AssertionError):
        run_all()


def test_engines_that_gather_only_while_they_have_requests_are_seen(
    run_all: RunAll, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The gather of vllm-ascend #11310: left out by a drained rank."""
    _break_gather(monkeypatch, lambda engine: engine.scheduler.has_unfinished_requests())
    with pytest.raises(LockstepError, match="different collectives"):
        run_all()


def test_a_scheduler_refuses_to_step_on_without_a_gather(
    run_all: RunAll, monkeypatch: pytest.MonkeyPatch
) -> None:
    _break_gather(monkeypatch, lambda engine: 0)
    with pytest.raises(LockstepError, match="nothing was gathered after its last step"):
        run_all()


def test_a_scheduler_refuses_to_start_without_the_hook(
    run_all: RunAll, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm.v1.engine.core import DPEngineCoreProc  # pyright: ignore[reportMissingImports]

    hooked = DPEngineCoreProc._has_global_unfinished_reqs
    monkeypatch.setattr(DPEngineCoreProc, "_has_global_unfinished_reqs", hooked.__wrapped__)
    with pytest.raises(UnavailableError, match="needs the plugin"):
        run_all()


def test_engines_that_gather_before_the_reduction_are_seen(
    run_all: RunAll, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm.v1.engine.core import DPEngineCoreProc  # pyright: ignore[reportMissingImports]

    from ascend_twin.optimized.vllm import engine_hook

    hooked = DPEngineCoreProc._has_global_unfinished_reqs

    def gather_first(engine: Any, *args: Any) -> Any:
        engine_hook.gather(engine)
        return hooked.__wrapped__(engine, *args)

    vars(gather_first).update(vars(hooked))
    monkeypatch.setattr(DPEngineCoreProc, "_has_global_unfinished_reqs", gather_first)
    with pytest.raises(AssertionError, match="reduction"):
        run_all()


def test_a_scheduler_that_ignores_its_policy_is_seen(
    run_all: RunAll, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ascend_twin.optimized.vllm import BalanceScheduler

    observe = BalanceScheduler.observe

    def forget(scheduler: Any, rows: Any) -> None:
        observe(scheduler, rows)
        scheduler.is_open = True

    monkeypatch.setattr(BalanceScheduler, "observe", forget)
    with pytest.raises((AssertionError, LockstepError), match=r"does not do what the policy says|admitted"):
        run_all()


@pytest.mark.parametrize("is_async", [False, True], ids=["sync", "async"])
def test_a_gate_that_does_not_shut_is_seen(
    run_all: RunAll, monkeypatch: pytest.MonkeyPatch, is_async: bool
) -> None:
    from ascend_twin.optimized.vllm import BalanceScheduler

    monkeypatch.setattr(BalanceScheduler, "_shut", contextlib.nullcontext, raising=False)
    monkeypatch.setattr(BalanceScheduler, "__setattr__", _without("_shut"), raising=False)
    with pytest.raises(LockstepError, match="admitted"):
        run_all(is_async)


def _without(kept: str) -> Callable[[Any, str, Any], None]:
    """Attributes may be set, but for this one."""

    def set_attribute(scheduler: Any, name: str, value: Any) -> None:
        if name != kept:
            object.__setattr__(scheduler, name, value)

    return set_attribute


def _break_blocks(monkeypatch: pytest.MonkeyPatch, change: Callable[[Any], None]) -> None:
    """Have the executor see something else in each step than the scheduler has said."""
    from ascend_twin.equivalence_tests.vllm_stub_executor import StubExecutor

    execute_model = StubExecutor.execute_model

    def execute(executor: Any, scheduler_output: Any, non_block: bool = False) -> Any:
        change(scheduler_output)
        return execute_model(executor, scheduler_output, non_block)

    monkeypatch.setattr(StubExecutor, "execute_model", execute)


def _first_block_of_all(output: Any) -> None:
    for data in output.scheduled_new_reqs:
        data.block_ids = ([1, *data.block_ids[0][1:]],)


def _new_block_wrong(output: Any) -> None:
    cached = output.scheduled_cached_reqs
    cached.new_block_ids = [ids and ([2] * len(ids[0]),) for ids in cached.new_block_ids]


def _hit_too_long(output: Any) -> None:
    for data in output.scheduled_new_reqs:
        if 0 < data.num_computed_tokens < len(data.prompt_token_ids) - 1:
            data.num_computed_tokens += 1


@pytest.mark.parametrize("change", [_first_block_of_all, _new_block_wrong, _hit_too_long])
def test_an_executor_that_reads_wrong_blocks_is_seen(
    run_all: RunAll, monkeypatch: pytest.MonkeyPatch, change: Callable[[Any], None]
) -> None:
    _break_blocks(monkeypatch, change)
    with pytest.raises((OracleMismatchError, LockstepError)):
        run_all()
