"""Anything may happen to a scheduler, in any order: the rule-based state machine of the scheduler suites."""

from collections.abc import Callable, Sequence
from typing import ClassVar

from hypothesis import note
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule

from ..reference.errors import AscendTwinError
from .failures import failures_folder
from .scheduler_engines import Engine
from .scheduler_runs import CheckedEngine, Run, save_failure
from .scheduler_scenarios import (
    Abort,
    Event,
    GrammarReady,
    Pause,
    RemoteDone,
    ResetEncoderCache,
    ResetPrefixCache,
    SendingDone,
    SessionInput,
    Step,
)
from .scheduler_strategies import DrawChooser, Setup, scheduler_setups

INDICES = st.integers(0, 3)


class SchedulerMachine(RuleBasedStateMachine):
    """Requests come, steps are made, and everything else happens in between; at the end all are served.

    Checked all along: invariants, outputs against the oracle, and, with two engines, that nothing differs.
    What fails is saved as a scenario in `failures_folder()`, the smallest that was found. `ascend-twin replay
    FILE` runs it again.

    Attributes:
        engines: see `Run`.
    """

    engines: ClassVar[Sequence[Callable[..., Engine]]] = (CheckedEngine,)

    @initialize(setup=scheduler_setups())
    def begin(self, setup: Setup) -> None:
        self.run = Run(setup, type(self).engines)

    @rule(data=st.data())
    def a_request_arrives(self, data: st.DataObject) -> None:
        self._let(lambda: self.run.add(DrawChooser(data.draw)))

    @rule(count=st.integers(1, 4), eager=st.booleans())
    def steps_are_made(self, count: int, eager: bool) -> None:
        self._apply(Step(count, eager))

    @rule(requests=st.none() | st.tuples(INDICES), late=st.booleans())
    def clients_give_up(self, requests: tuple[int, ...] | None, late: bool) -> None:
        self._apply(Abort(requests, late))

    @rule(state=st.integers(0, 2))
    def the_engine_is_paused(self, state: int) -> None:
        self._apply(Pause(state))

    @rule(running=st.booleans(), connector=st.booleans())
    def the_prefix_cache_is_reset(self, running: bool, connector: bool) -> None:
        self._apply(ResetPrefixCache(running, connector))

    @rule()
    def the_encoder_cache_is_reset(self) -> None:
        self._apply(ResetEncoderCache())

    @rule(index=INDICES)
    def a_grammar_is_compiled(self, index: int) -> None:
        self._apply(GrammarReady(index))

    @rule(index=INDICES)
    def a_session_goes_on(self, index: int) -> None:
        self._apply(SessionInput(index))

    @rule(index=INDICES, failed_block=st.none() | INDICES)
    def a_load_ends(self, index: int, failed_block: int | None) -> None:
        self._apply(RemoteDone(index, failed_block))

    @rule(index=INDICES)
    def blocks_were_sent(self, index: int) -> None:
        self._apply(SendingDone(index))

    def teardown(self) -> None:
        if hasattr(self, "run") and not self.run.failure:
            self._let(self.run.drain)
            self._conclude()

    def _apply(self, event: Event) -> None:
        self._let(lambda: self.run.apply(event))

    def _let(self, happen: Callable[[], None]) -> None:
        """Unless a known defect has ended the run."""
        if self.run.excused:
            return
        try:
            happen()
        except AscendTwinError as error:
            self._conclude(error)

    def _conclude(self, error: AscendTwinError | None = None) -> None:
        self.run.conclude(error)
        if self.run.failure:
            directory = failures_folder()
            note(f"saved as {save_failure(type(self).__name__, self.run.scenario, directory)}")
            raise error or AssertionError(self.run.failure)
