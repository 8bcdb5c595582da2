"""Anything may happen to a data-parallel group, in any order: the rule-based state machine of lockstep."""

from collections.abc import Callable
from typing import ClassVar

import pytest
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from ascend_twin.equivalence_tests.lockstep_mutants import ExcludingLockstep, misplaced
from ascend_twin.equivalence_tests.lockstep_runs import (
    GroupRun,
    ProtocolError,
    check_logs,
    choose_group_setup,
    settle,
)
from ascend_twin.equivalence_tests.scheduler_strategies import DrawChooser, choose_request
from ascend_twin.reference.errors import LockstepError
from ascend_twin.scheduler.admission import POLICIES
from ascend_twin.scheduler.lifecycle import PauseState
from ascend_twin.scheduler.lockstep import Lockstep

RANKS = st.integers(0, 7)
INTERVALS = 2, 1, 3, 32


class LockstepMachine(RuleBasedStateMachine):
    """Mail arrives and ranks take their turns one by one; in the end everything arrives, and all are served.

    Checked all along: outputs against the oracle, the invariants of each scheduler, that what the ranks enter
    is one sequence, in the right order, and that ranks that know the same gather decide alike.
    """

    group_type: ClassVar[Callable[..., Lockstep]] = Lockstep

    @initialize(
        data=st.data(),
        policy=st.sampled_from(tuple(POLICIES)),
        dp_size=st.integers(1, 8),
        interval=st.sampled_from(INTERVALS),
    )
    def begin(self, data: st.DataObject, policy: str, dp_size: int, interval: int) -> None:
        self.setup = choose_group_setup(DrawChooser(data.draw))
        self.dp_size = dp_size
        self.interval = interval
        self.run = GroupRun(
            self.setup, policy, dp_size, finish_check_interval=interval, group_type=type(self).group_type
        )
        self.group = self.run.group

    @rule(data=st.data(), rank=RANKS)
    def a_request_is_sent(self, data: st.DataObject, rank: int) -> None:
        request_id = f"r{len(self.run.rank_of)}"
        request = choose_request(DrawChooser(data.draw), self.setup.config, (), request_id)
        self.run.add(rank % self.dp_size, request)

    @precondition(lambda self: self.run.rank_of)
    @rule(index=st.integers(0, 11))
    def a_client_gives_up(self, index: int) -> None:
        ids = list(self.run.rank_of)
        self.run.abort(ids[index % len(ids)])

    @rule(rank=RANKS, state=st.sampled_from(tuple(PauseState)))
    def a_rank_is_paused_or_goes_on(self, rank: int, state: PauseState) -> None:
        self.group.set_pause_state(rank % self.dp_size, state)

    @precondition(lambda self: self.group.undelivered())
    @rule(index=st.integers(0, 15))
    def a_message_arrives(self, index: int) -> None:
        between = sorted(self.group.undelivered(), key=str)
        self.group.deliver(*between[index % len(between)])

    @rule(rank=RANKS)
    def a_rank_takes_its_turn(self, rank: int) -> None:
        self.group.advance(rank % self.dp_size)

    @rule(count=st.integers(1, 4))
    def all_ranks_step(self, count: int) -> None:
        for _ in range(count):
            self.group.step()

    @rule()
    def everything_arrives_and_all_ranks_go_idle(self) -> None:
        settle(self.group)

    @invariant()
    def collectives_are_one_sequence(self) -> None:
        check_logs(self.group.transport.logs, self.interval)

    @invariant()
    def who_knows_the_same_gather_decides_alike(self) -> None:
        schedulers = [engine.scheduler for engine in self.run.engines]
        gates = {(scheduler.num_gathers, scheduler.is_open) for scheduler in schedulers}
        assert len(gates) == len({num_gathers for num_gathers, _ in gates})

    def teardown(self) -> None:
        if hasattr(self, "run"):
            self.run.drain()
            self.run.check()


TestLockstep = LockstepMachine.TestCase
TestLockstep.settings = settings(max_examples=2 * settings().max_examples, stateful_step_count=40)


class Excluding(LockstepMachine):
    """Ranks that are started as v0.17.0 starts them."""

    group_type = ExcludingLockstep


class InSchedule(LockstepMachine):
    """Ranks that gather inside schedule()."""

    group_type = staticmethod(misplaced("in schedule()"))


class BeforeTheReduction(LockstepMachine):
    """Ranks that gather before the reduction: no deadlock here, but another order."""

    group_type = staticmethod(misplaced("before the reduction"))


@pytest.mark.parametrize(
    ("machine", "error"),
    [(Excluding, LockstepError), (InSchedule, LockstepError), (BeforeTheReduction, ProtocolError)],
)
def test_machine_finds_what_is_wrong(machine: type[LockstepMachine], error: type[Exception]) -> None:
    few = settings(
        max_examples=200,
        stateful_step_count=30,
        derandomize=True,
        database=None,
        phases=[Phase.generate],
        report_multiple_bugs=False,
    )
    with pytest.raises(error):
        run_state_machine_as_test(machine, settings=few)
