"""Data-parallel groups whose ranks are checked after every step, and the order of what they enter together.

Each rank has a model stand-in and a driver of its own; one oracle knows what each request must say, whichever
rank it goes to, whatever the policy. Features in which v0.17.0 has defects of its own are left out.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from ..reference.errors import AscendTwinError, SchedulerStateError
from ..scheduler.admission import AdmissionPolicy, make_policy
from ..scheduler.balance import AsyncBalanceScheduler, BalanceScheduler
from ..scheduler.collectives import FORWARD, GATHER, HAS_UNFINISHED, Collective
from ..scheduler.config import SchedulerConfig
from ..scheduler.lifecycle import PauseState
from ..scheduler.lockstep import FINISH_CHECK_INTERVAL, Lockstep
from ..scheduler.workload import RequestSpec
from .known_defects import WatchedAsyncScheduler, WatchedScheduler
from .paged_model import OutputOracle
from .scheduler_driver import Driver
from .scheduler_runs import CheckedEngine
from .scheduler_scenarios import Abort, Add, Step
from .scheduler_strategies import Chooser, Setup, choose_setup

FEATURES = ("async", "long_prefill_threshold", "whole_prefills", "no_prefix_caching", "drafts", "images")
"""Of scheduler_strategies.py, those that can be on; preemption needs no feature, only a full pool."""

MAX_DRAIN_STEPS = 3_000


class ProtocolError(AscendTwinError, AssertionError):
    """Ranks did not do together what they should have; the message says where."""


class _WatchedBalanceScheduler(BalanceScheduler, WatchedScheduler):
    """`BalanceScheduler` that notes causes of known defects."""


class _WatchedAsyncBalanceScheduler(AsyncBalanceScheduler, WatchedAsyncScheduler):
    """`AsyncBalanceScheduler` that notes causes of known defects."""


class _CheckedBalanceEngine(CheckedEngine):
    """A scheduler with a gate, its invariants checked after every step."""

    def __init__(
        self, config: SchedulerConfig, policy: AdmissionPolicy, dp_rank: int, dp_size: int, **options: Any
    ) -> None:
        kinds = _WatchedBalanceScheduler, _WatchedAsyncBalanceScheduler
        place = {"policy": policy, "dp_rank": dp_rank, "dp_size": dp_size}
        self.schedulers = tuple(partial(kind, **place) for kind in kinds)  # type: ignore[assignment]
        super().__init__(config, **options)


class LockstepEngine:
    """One rank's scheduler and model stand-in, as an engine of `Lockstep`.

    Args:
        setup: configuration, and whether scheduling is asynchronous.
        policy: text form.
        dp_rank, dp_size: which of how many ranks this is.
        oracle: of the whole group.

    Attributes:
        driver: makes the steps.
        num_batches: steps so far in which the model ran on any token.
    """

    def __init__(
        self, setup: Setup, policy: str, dp_rank: int, dp_size: int, oracle: OutputOracle | None = None
    ) -> None:
        made = make_policy(policy, setup.config.max_num_seqs)
        self.driver = Driver(
            setup.config,
            async_scheduling=setup.async_scheduling,
            async_depth=setup.async_depth,
            engines=(partial(_CheckedBalanceEngine, policy=made, dp_rank=dp_rank, dp_size=dp_size),),
            oracle=oracle,
        )
        self.num_batches = 0
        self._has_run = False
        schedule = self.scheduler.schedule

        def noted() -> Any:
            output = schedule()
            self._has_run = output.total_num_scheduled_tokens > 0
            return output

        self.scheduler.schedule = noted

    @property
    def scheduler(self) -> BalanceScheduler:
        return self.driver.first.scheduler

    def add_request(self, request: RequestSpec) -> None:
        self.driver.apply(Add(request))

    def abort(self, request_ids: Iterable[str]) -> None:
        known = list(self.scheduler.requests)
        targets = tuple(known.index(request_id) for request_id in request_ids if request_id in known)
        if targets:
            self.driver.apply(Abort(targets))

    def has_work(self) -> bool:
        return self.scheduler.has_requests() or bool(self.driver.lanes[0].queue)

    def step(self) -> bool:
        self._has_run = False
        self.driver.apply(Step())
        if self.driver.crash:
            raise SchedulerStateError(self.driver.crash)
        self.num_batches += self._has_run
        return self._has_run


class GroupRun:
    """A group of checked ranks, and what became of its requests.

    Args:
        setup: of each rank.
        policy: text form.
        dp_size: number of ranks.
        finish_check_interval: see `Rank`.
        group_type: `Lockstep`, or what is to be found wrong.

    Attributes:
        engines, group, oracle: what it is made of.
        rank_of: which rank a request was sent to, by id.
        aborted: ids of requests that the client gave up.
    """

    def __init__(
        self,
        setup: Setup,
        policy: str,
        dp_size: int,
        *,
        finish_check_interval: int = FINISH_CHECK_INTERVAL,
        group_type: Callable[..., Lockstep] = Lockstep,
    ) -> None:
        self.oracle = OutputOracle(setup.config)
        self.engines = [LockstepEngine(setup, policy, rank, dp_size, self.oracle) for rank in range(dp_size)]
        self.group = group_type(self.engines, finish_check_interval=finish_check_interval, log_size=None)
        self.rank_of: dict[str, int] = {}
        self.aborted: set[str] = set()

    def add(self, rank: int, request: RequestSpec) -> None:
        """The client sends a request to a rank."""
        self.rank_of[request.request_id] = rank
        self.group.add_request(rank, request)

    def abort(self, request_id: str) -> None:
        """The client gives a request up."""
        self.aborted.add(request_id)
        self.group.abort(self.rank_of[request_id], [request_id])

    def drain(self) -> None:
        """Let all ranks go on, until all are idle; then everybody must have been served.

        Raises:
            ProtocolError: when somebody was not, or when it takes too long.
        """
        for rank in range(len(self.engines)):
            self.group.set_pause_state(rank, PauseState.UNPAUSED)
        settle(self.group)
        unserved = sorted(self.rank_of.keys() - self.aborted - self.finished())
        if unserved:
            raise ProtocolError(f"all ranks are idle, and these were not served: {', '.join(unserved)}")

    def finished(self) -> set[str]:
        """Ids of requests that have said all they have to say."""
        expected = self.oracle.expected
        return {r for r, said in self.oracle.said.items() if said[: len(expected[r])] == expected[r]}

    def said(self) -> dict[str, list[int]]:
        """Output tokens by request."""
        return {request_id: said[0] for request_id, said in self.oracle.said.items()}

    def check(self) -> None:
        """The collectives so far were the right ones, and dummies where nothing ran.

        Raises:
            ProtocolError: when they were not.
        """
        interval = self.group.ranks[0].finish_check_interval
        check_logs(self.group.transport.logs, interval)
        for i, (rank, engine) in enumerate(zip(self.group.ranks, self.engines, strict=True)):
            if rank.num_steps - rank.num_dummy_steps != engine.num_batches:
                raise ProtocolError(
                    f"rank {i}: {rank.num_dummy_steps} of {rank.num_steps} steps were dummies, but "
                    f"{engine.num_batches} batches were run"
                )
            if engine.scheduler.num_gathers != rank.num_steps:
                raise ProtocolError(
                    f"rank {i}: {engine.scheduler.num_gathers} gathers in {rank.num_steps} steps"
                )


def settle(group: Lockstep, max_steps: int = MAX_DRAIN_STEPS) -> int:
    """Step until all ranks are idle; returns the number of steps.

    Raises:
        LockstepError: from `Lockstep.step`.
        ProtocolError: when it takes more than `max_steps`, or when ranks differ about the wave afterwards.
    """
    num_steps = 0
    while group.step():
        num_steps += 1
        if num_steps > max_steps:
            raise ProtocolError(f"ranks still step after {max_steps} steps")
    waves = [rank.current_wave for rank in group.ranks] + [group.coordinator.current_wave]
    if len(set(waves)) > 1:
        raise ProtocolError(f"waves of the ranks and of the coordinator, all idle: {waves}")
    return num_steps


def check_logs(logs: Sequence[Sequence[Collective]], interval: int) -> None:
    """All ranks entered the same collectives, in the one order that there is; one may be behind.

    Args:
        logs: whole, of each rank.
        interval: turns of a wave from one reduction to the next.

    Raises:
        ProtocolError: for the first collective that is another, or in another place, than it must be.
    """
    entered = [[(c.name, c.step) for c in log] for log in logs]
    longest = max(entered, key=len)
    for rank, log in enumerate(entered):
        for place, (one, other) in enumerate(zip(log, longest, strict=False)):
            if one != other:
                raise ProtocolError(f"collective {place} of rank {rank} is {one}, and {other} elsewhere")
    step_in_wave, place = 0, 0
    for step in range(len(longest)):
        step_in_wave += 1
        names = [FORWARD, *[HAS_UNFINISHED] * (step_in_wave % interval == 0), GATHER]
        due = [(name, step) for name in names]
        found = longest[place : place + len(due)]
        if found != due[: len(found)]:
            raise ProtocolError(f"collectives from place {place} on are {found}, and must be {due}")
        is_over = HAS_UNFINISHED in names and not any(
            log[place + 1].row[0] for log in logs if len(log) > place + 1
        )
        place += len(due)
        if place >= len(longest):
            return
        step_in_wave = 0 if is_over else step_in_wave


def choose_group_setup(chooser: Chooser, mode: str = "any") -> Setup:
    """A setup for any policy: a batch queue two deep, and a cap that any_rank_near_cap can do with.

    Args:
        chooser: of every choice.
        mode: "sync", "async" or "any".
    """
    among = [feature for feature in FEATURES if (feature, mode) != ("async", "sync")]
    setup = choose_setup(chooser, ("async",) if mode == "async" else (), among)
    config = replace(setup.config, max_num_seqs=max(2, setup.config.max_num_seqs))
    return replace(setup, config=config, async_depth=2)
