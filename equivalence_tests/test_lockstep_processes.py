"""Data-parallel ranks in real processes, over gloo: they do what a group in process does, and never hang."""

import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
import torch.distributed as dist

from ascend_twin.equivalence_tests.lockstep_processes import (
    Fault,
    GroupPlan,
    Order,
    Outcome,
    RankReport,
    host_store,
    join_store,
    run_processes,
)
from ascend_twin.equivalence_tests.lockstep_runs import GroupRun, check_logs, settle
from ascend_twin.equivalence_tests.paged_model import expected_output
from ascend_twin.equivalence_tests.scheduler_strategies import Setup
from ascend_twin.reference.errors import InvalidArgumentError, LockstepError, UnavailableError
from ascend_twin.scheduler.admission import RankCounts
from ascend_twin.scheduler.collectives import FORWARD, GATHER, HAS_UNFINISHED, Collective
from ascend_twin.scheduler.config import SchedulerConfig
from ascend_twin.scheduler.lifecycle import PauseState
from ascend_twin.scheduler.lockstep import FINISH_CHECK_INTERVAL
from ascend_twin.scheduler.process_group import ProcessGroupTransport
from ascend_twin.scheduler.workload import RequestSpec

HAS_GLOO = dist.is_available() and dist.is_gloo_available()
needs_gloo = pytest.mark.skipif(not HAS_GLOO, reason="this torch was built without gloo")
CONFIG = SchedulerConfig(
    num_blocks=24, block_size=4, max_num_seqs=2, max_num_batched_tokens=16, max_model_len=64
)
POLICY = "any_rank_at_cap"
ADD, PAUSE = "add_request", "set_pause_state"
ABORTED = "r30"
SHORT_S = 4.0  # the timeout of a group that runs into it


def _request(number: int, max_tokens: int = 0) -> RequestSpec:
    """A prompt of 3 to 12 tokens that shares its beginning with others."""
    prompt = (number % 4, 3 + number * 5 % 10)
    return RequestSpec(f"r{number}", 0, (prompt,), max_tokens=max_tokens or 2 + number % 5)


def _plan(dp_size: int, is_async: bool) -> GroupPlan:
    """Three waves: most requests on rank 0; on rank 1 alone, all others drained; with pauses and an abort."""
    skewed = [Order(0, ADD, _request(i), step=i // 2) for i in range(7)]
    skewed += [Order(rank, ADD, _request(10 + rank), step=9) for rank in range(1, dp_size)]
    alone = [Order(1, ADD, _request(20)), Order(1, ADD, _request(21))]
    paused = [
        Order(0, PAUSE, PauseState.PAUSED_ALL),
        Order(1, PAUSE, PauseState.PAUSED_NEW),
        *[Order(i % dp_size, ADD, _request(30 + i)) for i in range(2 * dp_size)],
        Order(0, "abort", (ABORTED,), step=4),
        Order(1, PAUSE, PauseState.UNPAUSED, step=6),
        Order(0, PAUSE, PauseState.UNPAUSED, step=8),
    ]
    setup = Setup(CONFIG, ("async",) if is_async else ())
    return GroupPlan(setup, POLICY, dp_size, (skewed, alone, paused))


def _requests(plan: GroupPlan) -> Iterator[tuple[int, RequestSpec]]:
    """Each request of a plan, with its rank."""
    for wave in plan.waves:
        yield from ((order.rank, order.argument) for order in wave if order.action == ADD)


def _said_in_process(plan: GroupPlan) -> dict[str, list[int]]:
    """What a group in this process says to the same orders, those of a wave all at once."""
    run = GroupRun(plan.setup, plan.policy, plan.dp_size)
    for wave in plan.waves:
        for order in sorted(wave, key=lambda order: order.step):
            getattr(run.group, order.action)(order.rank, order.argument)
        settle(run.group)
    return run.said()


class Run(NamedTuple):
    """A plan that went well, and what its ranks say."""

    plan: GroupPlan
    outcomes: list[Outcome]
    reports: list[RankReport]


@pytest.fixture(scope="module", params=[(2, False), (2, True), (4, False), (4, True)], ids=str)
def run(request: pytest.FixtureRequest) -> Run:
    """Three waves of 2 and of 4 ranks, with the sync and with the async scheduler."""
    if not HAS_GLOO:
        pytest.skip("this torch was built without gloo")
    plan = _plan(*request.param)
    outcomes = run_processes(plan)
    assert [outcome.error for outcome in outcomes] == [""] * plan.dp_size
    return Run(plan, outcomes, [outcome.report for outcome in outcomes if outcome.report])


def test_run_processes_ends_well_on_every_rank(run):
    assert len(run.reports) == run.plan.dp_size
    _check_no_process_is_left(run.outcomes)
    assert [outcome.exit_code for outcome in run.outcomes] == [0] * run.plan.dp_size


def test_run_processes_says_what_the_group_in_process_says(run):
    said = {name: tokens for report in run.reports for name, tokens in report.said.items()}
    in_process = _said_in_process(run.plan)
    requests = [request for _, request in _requests(run.plan)]
    assert said.keys() == in_process.keys() == {request.request_id for request in requests}
    for request in requests:
        if request.request_id != ABORTED:
            expected = expected_output(request, CONFIG)[0]
            assert said[request.request_id] == in_process[request.request_id] == expected


def test_run_processes_serves_each_request_on_its_rank(run):
    for rank, report in enumerate(run.reports):
        assert report.said.keys() == {
            request.request_id for sent_to, request in _requests(run.plan) if sent_to == rank
        }


def test_run_processes_enters_the_same_collectives_on_all_ranks(run):
    check_logs([report.log for report in run.reports], FINISH_CHECK_INTERVAL)
    assert {len(report.log) for report in run.reports} == {len(run.reports[0].log)}
    for report in run.reports:
        assert sum(name == GATHER for name, _, _ in report.log) == report.num_steps > 0


def test_run_processes_makes_one_all_gather_a_collective(run):
    for report in run.reports:
        assert report.num_all_gathers == len(report.log) > 0


def test_run_processes_steps_in_waves_with_drained_ranks(run):
    assert len({report.num_waves for report in run.reports}) == 1
    assert run.reports[0].num_waves >= len(run.plan.waves)
    for rank, report in enumerate(run.reports):
        assert rank == 1 or report.num_dummy_steps >= FINISH_CHECK_INTERVAL


def _check_no_process_is_left(outcomes: list[Outcome]) -> None:
    for outcome in outcomes:
        assert outcome.pid
        with pytest.raises(ProcessLookupError):
            os.kill(outcome.pid, 0)


# When something goes wrong on rank 1


def _run_with_fault(
    dp_size: int, fault: Fault, *, late: dict[int, Fault] | None = None, **options
) -> list[Outcome]:
    """One long request on each rank; every process ends, and only a stuck one is ended by the launcher."""
    wave = [Order(rank, ADD, _request(rank, max_tokens=20)) for rank in range(dp_size)]
    if fault.kind == "deaf":
        del wave[1]
    faults = {1: fault, **(late or {})}
    outcomes = run_processes(GroupPlan(Setup(CONFIG), POLICY, dp_size, (wave,), faults=faults, **options))
    _check_no_process_is_left(outcomes)
    assert [outcome.is_stuck for outcome in outcomes] == [
        rank == 1 and fault.kind == "stall" for rank in range(dp_size)
    ]
    return outcomes


def _check_others_name_rank_1(outcomes: list[Outcome], where: str, seen: str) -> None:
    for rank, outcome in enumerate(outcomes):
        if rank != 1:
            assert outcome.error == f"LockstepError: rank {rank} waits in {where} for rank 1 ({seen})"
            assert outcome.exit_code == 1


@needs_gloo
@pytest.mark.parametrize("dp_size", [2, 4])
def test_process_group_names_the_rank_that_is_killed_in_the_middle_of_a_step(dp_size):
    outcomes = _run_with_fault(dp_size, Fault("kill", FORWARD, 7))
    assert outcomes[1].exit_code == -9
    _check_others_name_rank_1(
        outcomes, "forward at step 7", "last seen in gather at step 6, ended: exit code -9"
    )


@needs_gloo
@pytest.mark.parametrize(
    ("kind", "name", "step", "last", "reason"),
    [
        ("kill", GATHER, 7, "forward at step 7", "exit code -9"),
        ("kill", HAS_UNFINISHED, 31, "forward at step 31", "exit code -9"),
        ("kill inside", FORWARD, 7, "forward at step 7", "exit code -9"),
        ("raise", FORWARD, 7, "gather at step 6", "ValueError: a fault of the engine"),
        ("exit", GATHER, 7, "forward at step 7", "SystemExit: 3"),
    ],
)
def test_process_group_names_the_rank_that_ends(kind, name, step, last, reason):
    outcomes = _run_with_fault(3, Fault(kind, name, step))
    _check_others_name_rank_1(outcomes, f"{name} at step {step}", f"last seen in {last}, ended: {reason}")


@needs_gloo
@pytest.mark.parametrize(
    ("kind", "last"), [("kill", "gather at step 6"), ("kill inside", "forward at step 7")]
)
def test_process_group_names_the_rank_that_is_killed_when_nobody_reports_it(kind, last):
    late = {3: Fault("late", FORWARD, 7)}  # nor is a rank blamed that is slow, but in time
    outcomes = _run_with_fault(4, Fault(kind, FORWARD, 7), late=late, timeout_s=SHORT_S, is_supervised=False)
    _check_others_name_rank_1(outcomes, "forward at step 7", f"last seen in {last}")


@needs_gloo
def test_process_group_gives_the_first_reason_to_a_rank_that_comes_late():
    outcomes = _run_with_fault(3, Fault("raise", FORWARD, 7), late={2: Fault("late", FORWARD, 7)})
    reason = "ValueError: a fault of the engine"  # and not that its process ended then
    _check_others_name_rank_1(
        outcomes, "forward at step 7", f"last seen in gather at step 6, ended: {reason}"
    )


@needs_gloo
def test_process_group_names_the_rank_that_stalls():
    outcomes = _run_with_fault(3, Fault("stall", GATHER, 7), timeout_s=SHORT_S)
    _check_others_name_rank_1(outcomes, "gather at step 7", "last seen in forward at step 7")


@needs_gloo
def test_process_group_names_the_rank_that_idles_while_others_step():
    outcomes = _run_with_fault(3, Fault("deaf"), timeout_s=SHORT_S)
    _check_others_name_rank_1(outcomes, "forward at step 0", "last seen in joining, idle since")


@needs_gloo
def test_process_group_names_the_rank_that_never_joins():
    outcomes = _run_with_fault(3, Fault("absent"), timeout_s=SHORT_S)
    _check_others_name_rank_1(outcomes, "joining", "never seen, ended: exit code 1")


@needs_gloo
@pytest.mark.parametrize(
    ("fault", "entered"),
    [
        (Fault("swap", FORWARD, 7), "gather at step 7"),
        (Fault("swap", HAS_UNFINISHED, 31), "gather at step 31"),
        (Fault("skip", FORWARD, 7), "forward at step 8"),
    ],
    ids=["gather_inside_schedule", "gather_before_the_reduction", "a_step_ahead"],
)
def test_process_group_names_all_places_when_ranks_enter_different_collectives(fault, entered):
    outcomes = _run_with_fault(3, fault)
    due = f"{fault.before} at step {fault.step}"
    places = f"rank 0 in {due}, rank 1 in {entered}, rank 2 in {due}"
    for outcome in outcomes:
        assert outcome.error.startswith("LockstepError: ")
        assert f"ranks entered different collectives: {places}" in outcome.error


# One rank, in this process


@pytest.fixture
def store() -> Any:
    """A store that this process hosts."""
    if not HAS_GLOO:
        pytest.skip("this torch was built without gloo")
    return host_store()


def test_process_group_returns_the_row_of_each_collective(store):
    counts = tuple(range(len(RankCounts._fields)))
    entered = [
        Collective(FORWARD, 0, (1,)),
        Collective(GATHER, 0, counts),
        Collective(HAS_UNFINISHED, 1, (0,)),
    ]
    with ProcessGroupTransport(store, 0, 1, log_size=2) as transport:
        assert [transport.exchange(collective) for collective in entered] == [((1,),), (counts,), ((0,),)]
    assert list(transport.log) == entered[1:]
    assert transport.num_entered == 3
    assert not dist.is_initialized()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"size": 0}, "size is 0; allowed: an int >= 1"),
        ({"rank": 2}, "rank is 2; allowed: an int from 0 to 1"),
        ({"timeout_s": 0}, "timeout_s is 0; allowed: a finite number > 0, at most 1,000,000,000,000,000"),
        ({"backend": "nccl"}, "backend is 'nccl'; allowed: one of gloo, hccl"),
        ({"device": "npu:0"}, "device is npu:0; allowed: cpu with backend gloo"),
        ({"backend": "hccl"}, "device is cpu; allowed: npu with backend hccl"),
    ],
)
def test_process_group_refuses_bad_arguments(store, changed, message):
    with pytest.raises(InvalidArgumentError, match=message):
        ProcessGroupTransport(store, **{"rank": 0, "size": 2, **changed})


def test_process_group_refuses_a_backend_that_torch_lacks(store, monkeypatch):
    monkeypatch.setattr(dist, "is_backend_available", lambda backend: False)
    with pytest.raises(UnavailableError, match="backend hccl is not in this torch"):
        ProcessGroupTransport(store, 0, 1, backend="hccl", device="npu:0")


def test_process_group_refuses_a_process_that_has_a_default_group(store):
    with (
        ProcessGroupTransport(store, 0, 1),
        pytest.raises(UnavailableError, match="has a default process group"),
    ):
        ProcessGroupTransport(store, 0, 1)


def test_process_group_refuses_a_store_that_it_left_before(store):
    ProcessGroupTransport(store, 0, 1).close()
    with pytest.raises(
        InvalidArgumentError, match=r"store is .*; allowed: one of this group alone; a rank 0 left"
    ):
        ProcessGroupTransport(store, 0, 1)


@pytest.mark.parametrize(
    ("collective", "message"),
    [
        (Collective("broadcast", 0, ()), "collective.name is 'broadcast'; allowed: one of forward,"),
        (Collective(GATHER, 0, (0,) * 99), "collective.row is .*; allowed: at most"),
    ],
)
def test_process_group_refuses_a_collective_that_it_cannot_carry(store, collective, message):
    with ProcessGroupTransport(store, 0, 1) as transport:
        with pytest.raises(InvalidArgumentError, match=message):
            transport.exchange(collective)
        assert transport.num_entered == 0


@needs_gloo
def test_process_group_ends_with_the_error_when_the_store_is_gone():
    host = host_store()
    client = join_store(host.port)
    with ProcessGroupTransport(client, 0, 1, timeout_s=SHORT_S) as transport:
        del host
        with pytest.raises(LockstepError, match=r"rank 0 cannot complete gather at step .*the store is gone"):
            _gather(transport, times=100)


def _gather(transport: ProcessGroupTransport, times: int) -> None:
    """Over and over: what is sent first to somebody who is gone is lost without an error."""
    for step in range(times):
        transport.exchange(Collective(GATHER, step, ()))


def test_scheduler_package_does_not_import_torch():
    code = "import sys, ascend_twin.scheduler.lockstep; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0
