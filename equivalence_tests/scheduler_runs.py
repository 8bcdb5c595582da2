"""Scenarios made at random, run to their end, and what came of them.

A run is a scheduler, events at random, and then a drain: whatever a request waits for comes, until none is
left. Its outputs must be those of the oracle, its invariants must hold after every step, and, beside a second
engine, nothing may differ. A run that fails is written down as the scenario that reproduces it.
"""

import random
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

from ..reference.errors import AscendTwinError
from ..scheduler.config import SchedulerConfig
from ..scheduler.workload import RequestMix
from .known_defects import (
    CRASH,
    ORACLE,
    PROGRESS,
    STAND_IN,
    WatchedAsyncScheduler,
    WatchedScheduler,
    excuse,
    holders,
)
from .paged_model import OracleMismatchError, OutputOracle, StandInError
from .scheduler_comparison import SchedulerDifference
from .scheduler_driver import Driver
from .scheduler_engines import Engine, OurEngine
from .scheduler_invariants import (
    Before,
    InvariantError,
    check_drained,
    check_invariants,
    could_run,
)
from .scheduler_scenarios import (
    Abort,
    Add,
    Event,
    GrammarReady,
    Pause,
    RemoteDone,
    ResetEncoderCache,
    ResetPrefixCache,
    Scenario,
    SendingDone,
    SessionInput,
    Step,
)
from .scheduler_strategies import Chooser, RandomChooser, Setup, choose_request, choose_setup

# Steps of a whole run of the suites, by Hypothesis profile: ours alone, and beside vLLM.
NUM_STEPS = {"dev": 5_000, "ci": 20_000, "nightly": 1_000_000}
NUM_DIFFERENTIAL_STEPS = {"dev": 2_500, "ci": 10_000, "nightly": 100_000}

# What must have been at work in a whole run; `Features` says how each is seen.
FEATURES_AT_WORK = (
    *("chunked_prefill", "long_prefill_threshold", "mamba_split", "lookahead", "common_prefix"),
    *("prefix_hit", "full_prefix_hit", "eviction", "skip_reading_prefix_cache"),
    *("reset_prefix_cache", "reset_running", "reset_connector"),
    *("preemption", "priority_preemption", "resumption", "late_output_of_preempted"),
    *("draft_accepted", "draft_rejected", "draft_trimmed", "invalid_draft", "async_placeholder"),
    *("encoder_input", "encoder_eviction", "encoder_budget_stop", "reset_encoder_cache"),
    *("lora_skip", "paused_new", "paused_all", "grammar_wait", "grammar_promoted"),
    *("session_resumed", "session_ended", "late_output_of_finished"),
    *("remote_sync_load", "remote_async_load", "remote_failed_load", "remote_delayed_free", "finish_error"),
    *("stop_eos", "stop_token", "stop_max_tokens", "stop_max_model_len"),
    *("abort_waiting", "abort_running", "abort_preempted", "abort_waiting_for_fsm"),
    *("abort_waiting_for_remote_kvs", "abort_waiting_for_streaming_req"),
)

EVENTS_PER_RUN = 60
MAX_DRAIN_STEPS = 500
MAX_IDLE_STEPS = 6  # more than async_depth, and than the polls of a remote hit


class StallError(AscendTwinError, AssertionError):
    """Requests that wait for nothing from outside were not served, step after step."""


class CheckedEngine(OurEngine):
    """Ours, watched for known defects, with its invariants checked after every step."""

    schedulers = (WatchedScheduler, WatchedAsyncScheduler)

    def __init__(self, config: SchedulerConfig, **options: Any) -> None:
        super().__init__(config, **options)
        schedule = self.scheduler.schedule

        def checked() -> Any:
            before = Before.of(self.scheduler)
            output = schedule()
            try:
                check_invariants(self.scheduler, output, before)
            except InvariantError as error:
                if not excuse(self.scheduler, error.invariant, str(error)):
                    raise
            return output

        self.scheduler.schedule = checked


class Run:
    """One scheduler (or two side by side) and everything that happened to it.

    Args:
        setup: configuration and features.
        engines: of which the first is ours.

    Attributes:
        events: that were applied, so that `scenario` reproduces the run.
        failure: why it failed, or "".
        excused: the known defect of v0.17.0 that ended it, or "".
    """

    def __init__(self, setup: Setup, engines: Sequence[Callable[..., Engine]] = (CheckedEngine,)) -> None:
        self.setup = setup
        self.events: list[Event] = []
        self.driver = Driver(
            setup.config,
            async_scheduling=setup.async_scheduling,
            async_depth=setup.async_depth,
            connector=setup.connector,
            engines=engines,
            oracle=OutputOracle(setup.config),
        )
        self.failure = ""
        self.excused = ""
        self._num_requests = 0

    @classmethod
    def of(cls, scenario: Scenario, engines: Sequence[Callable[..., Engine]] = (CheckedEngine,)) -> "Run":
        """A run for a scenario's schedulers, in which nothing has happened yet."""
        features = ("async",) * scenario.async_scheduling + ("remote",) * scenario.connector
        return cls(Setup(scenario.config, features, scenario.async_depth), engines)

    @property
    def scenario(self) -> Scenario:
        """What happened so far."""
        setup = self.setup
        return Scenario(
            setup.config, tuple(self.events), setup.async_scheduling, setup.async_depth, setup.connector
        )

    def apply(self, event: Event) -> None:
        """Let something happen."""
        self.events.append(event)
        self.driver.apply(event)

    def apply_all(self, events: Iterable[Event]) -> None:
        """Let one thing happen after the other."""
        for event in events:
            self.apply(event)

    def add(self, chooser: Chooser) -> None:
        """A request arrives."""
        request = choose_request(chooser, self.setup.config, self.setup.features, f"r{self._num_requests}")
        self._num_requests += 1
        self.apply(Add(request, keep_blocks=self.setup.connector and chooser.chance(30)))

    def drain(self) -> None:
        """Let everything come that anybody waits for, until no request is left.

        Raises:
            StallError: when somebody waits for nothing, and is not served.
            InvariantError: when something is left after them.
        """
        scheduler = self.driver.first.scheduler
        self.apply(Pause(0))
        num_idle = 0
        for _ in range(MAX_DRAIN_STEPS):
            is_served = all(r.is_finished for r in scheduler.requests.values())
            is_told = not scheduler.has_finished_requests() and not self.driver.lanes[0].queue
            if self.driver.crash:
                return
            if is_served and is_told:
                check_drained(scheduler)
                if known := sorted(self.driver.lanes[0].model.requests):
                    raise InvariantError("nothing_is_left", f"the model runner knows {known}")
                return
            for event in (GrammarReady(0), RemoteDone(0), SendingDone(0), SessionInput(0)):
                self.apply(event)
            before = _progress(scheduler)
            self.apply(Step())
            num_idle = 0 if _progress(scheduler) != before else num_idle + 1
            if num_idle > MAX_IDLE_STEPS:
                waiting = ", ".join(f"{r.request_id} ({r.status.name})" for r in could_run(scheduler))
                raise StallError(f"nothing happens any more; not served: {waiting or 'nobody'}")
        raise StallError(f"requests are left after {MAX_DRAIN_STEPS} steps")

    def finish(self, let_happen: Callable[[], object]) -> None:
        """Let things happen, drain, and settle what it means."""
        try:
            let_happen()
            self.drain()
        except AscendTwinError as error:
            self.conclude(error)
        else:
            self.conclude()

    def conclude(self, error: AscendTwinError | None = None) -> None:
        """Settle whether the run failed, by `error` or a crash of all engines, and if that is excused."""
        message = str(error or self.driver.crash or "")
        if not message:
            return
        cause = error.__cause__ if isinstance(error, SchedulerDifference) and error.__cause__ else error
        broken = {
            OracleMismatchError: ORACLE,
            StallError: PROGRESS,
            StandInError: STAND_IN,
            type(None): CRASH,
        }
        name = cause.invariant if isinstance(cause, InvariantError) else broken.get(type(cause), "")
        if isinstance(self.driver.first, CheckedEngine):
            self.excused = excuse(self.driver.first.scheduler, name, message) or ""
        if not self.excused:
            self.failure = f"{type(error).__name__}: {message}" if error else f"crash: {message}"


def _progress(scheduler: Any) -> list[Any]:
    """What changes in a step in which anything happens."""
    return [
        (r.request_id, r.status, r.num_computed_tokens, r.num_tokens, r.num_preemptions)
        for r in scheduler.requests.values()
    ]


def choose_event(chooser: Chooser, run: Run) -> None:
    """Let something happen, at random: mostly steps and arrivals."""
    dice = chooser.integer(0, 99)
    if dice < 50:
        run.apply(Step(chooser.integer(1, 4), eager=chooser.chance(20)))
    elif dice < 72:
        run.add(chooser)
    elif dice < 77:
        targets = None if chooser.chance(5) else (chooser.integer(0, 5),)
        run.apply(Abort(targets, late=chooser.chance(30)))
    elif dice < 81:
        run.apply(Pause(chooser.choice((0, 0, 1, 2))))
    elif dice < 84:
        # With blocks held by waiting requests v0.17.0 only crashes (known_defects.py): seldom enough.
        running = chooser.chance(50) and (not holders(run.driver.first.scheduler) or chooser.chance(10))
        run.apply(ResetPrefixCache(running=running, connector=chooser.chance(30)))
    elif dice < 85:
        run.apply(ResetEncoderCache())
    elif dice < 89:
        run.apply(GrammarReady(chooser.integer(0, 3)))
    elif dice < 93:
        run.apply(SessionInput(chooser.integer(0, 3)))
    elif dice < 98:
        failed_block = chooser.integer(0, 3) if chooser.chance(40) else None
        run.apply(RemoteDone(chooser.integer(0, 3), failed_block))
    else:
        run.apply(SendingDone(chooser.integer(0, 3)))


@dataclass
class Summary:
    """What many runs came to.

    Attributes:
        features: how often each was at work.
        excused: runs that ended by a known defect of v0.17.0, by its name.
        failure, scenario: the first that failed, and what reproduces it.
    """

    runs: int = 0
    requests: int = 0
    steps: int = 0
    features: Counter[str] = field(default_factory=Counter)
    excused: Counter[str] = field(default_factory=Counter)
    failure: str = ""
    scenario: Scenario | None = None


def random_runs(
    seed: int, engines: Sequence[Callable[..., Engine]] = (CheckedEngine,), *, always: Sequence[str] = ()
) -> Iterator[Run]:
    """Runs without end.

    Args:
        seed: run i depends on (seed, i) alone.
        engines: see `Run`.
        always: features that every setup has.
    """
    i = 0
    while True:
        chooser = RandomChooser(random.Random(f"{seed}-{i}"))
        i += 1
        run = Run(choose_setup(chooser, always), engines)
        run.finish(partial(_choose_events, chooser, run))
        yield run


def _choose_events(chooser: Chooser, run: Run) -> None:
    for _ in range(EVENTS_PER_RUN):
        choose_event(chooser, run)


def run_at_random(
    seed: int,
    num_steps: int,
    engines: Sequence[Callable[..., Engine]] = (CheckedEngine,),
    *,
    advance: Callable[[int], object] = lambda num_steps: None,
) -> Summary:
    """Runs until there were `num_steps` steps, or one failed; `advance` is told the steps of each."""
    summary = Summary()
    for run in random_runs(seed, engines):
        summary.runs += 1
        summary.requests += sum(isinstance(event, Add) for event in run.events)
        summary.steps += run.driver.num_steps
        summary.features += run.driver.features
        advance(run.driver.num_steps)
        summary.excused[run.excused] += bool(run.excused)
        if run.failure:
            summary.failure, summary.scenario = run.failure, run.scenario
            break
        if summary.steps >= num_steps:
            break
    return summary


def run_mix(
    mix: RequestMix,
    config: SchedulerConfig,
    engines: Sequence[Callable[..., Engine]] = (OurEngine,),
    *,
    async_scheduling: bool = False,
    step_ms: float = 50.0,
    snapshot_every: int = 1_000,
    advance: Callable[[int], object] = lambda num_finished: None,
) -> Driver:
    """Drive requests by their arrival times, to the last token.

    Args:
        mix: in any order; no sessions, grammars or remote hits.
        config: of the schedulers.
        engines: one or two classes.
        async_scheduling: `AsyncScheduler`.
        step_ms: what a step takes on the clock of the arrivals, ms.
        snapshot_every: steps from one comparison of the whole state to the next; outputs always are.
        advance: is told how many more requests have finished.

    Raises:
        SchedulerDifference: when two engines differ.
        OracleMismatchError: when a request says something else than it must.
    """
    driver = Driver(
        config,
        async_scheduling=async_scheduling,
        engines=engines,
        oracle=OutputOracle(config),
        snapshot_every=snapshot_every,
    )
    scheduler = driver.first.scheduler
    arrivals = deque(sorted(mix.requests, key=lambda request: request.arrival_ms))
    now, num_unfinished = 0.0, 0
    while arrivals or scheduler.has_requests():
        if not scheduler.has_requests():
            now = max(now, arrivals[0].arrival_ms)
        while arrivals and arrivals[0].arrival_ms <= now:
            driver.apply(Add(arrivals.popleft()))
            num_unfinished += 1
        driver.apply(Step())
        now += step_ms
        advance(num_unfinished - len(scheduler.requests))
        num_unfinished = len(scheduler.requests)
    return driver


def run_scenario(scenario: Scenario, engines: Sequence[Callable[..., Engine]] = (CheckedEngine,)) -> Run:
    """A run of given events, and the drain after them."""
    run = Run.of(scenario, engines)
    run.finish(lambda: run.apply_all(scenario.events))
    return run


def minimize_scenario(
    scenario: Scenario, engines: Sequence[Callable[..., Engine]], seconds: float
) -> tuple[Scenario, str]:
    """Leave out events for as long as the run fails in the same way, for at most `seconds`.

    Returns:
        The smallest scenario found and how it fails; "" when the scenario does not fail a second time.
    """
    deadline = time.monotonic() + seconds
    single_steps = [[replace(e, count=1)] * e.count if isinstance(e, Step) else [e] for e in scenario.events]
    smallest, failure = _cut_off(replace(scenario, events=tuple(chain.from_iterable(single_steps))), engines)
    if not failure:
        smallest, failure = _cut_off(scenario, engines)
    kind = _kind(failure)
    size = len(smallest.events) // 2
    while size and kind:
        place = 0
        while place < len(smallest.events) and time.monotonic() < deadline:
            events = (*smallest.events[:place], *smallest.events[place + size :])
            shorter, message = _cut_off(replace(scenario, events=events), engines)
            if _kind(message) == kind:
                smallest, failure = shorter, message
            else:
                place += size
        size //= 2
    return smallest, failure


def _cut_off(scenario: Scenario, engines: Sequence[Callable[..., Engine]]) -> tuple[Scenario, str]:
    """The scenario up to the event at which it fails (all of it, if only its drain does), and how."""
    run = run_scenario(scenario, engines)
    return replace(scenario, events=tuple(run.events[: len(scenario.events)])), run.failure


def _kind(failure: str) -> str:
    """The class of the error, and which invariant it is about."""
    parts = failure.split(": ")
    return ": ".join(parts[:2] if parts[0] == InvariantError.__name__ else parts[:1])


def save_failure(name: str, scenario: Scenario, directory: Path) -> Path:
    """Write a failing scenario to `directory`; the same name again replaces it, so that the last is kept."""
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / f"{name}.json"
    scenario.save(path)
    return path
