"""Engines with an admission gate, beside what they must equal; and ranks that gather in one process.

What a shut gate must do is stated without one: a frozen step is a step of vLLM's scheduler with an empty
waiting queue. What a rank must contribute to a gather is stated from outside: from the statuses of its
requests, and from what changed in a step.
"""

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

from ..scheduler.admission import RankCounts, make_policy
from ..scheduler.balance import AsyncBalanceScheduler, BalanceScheduler
from ..scheduler.config import SchedulerConfig
from ..scheduler.lifecycle import PauseState
from ..scheduler.output import ModelRunnerOutput, SchedulerOutput
from ..scheduler.request import Request, RequestStatus, SamplingParams
from ..scheduler.request_queue import FCFSRequestQueue
from ..scheduler.upstream import AsyncUpstreamScheduler, UpstreamScheduler
from .known_defects import WatchedAsyncScheduler, WatchedScheduler
from .scheduler_engines import Engine, OurEngine
from .scheduler_runs import EVENTS_PER_RUN, CheckedEngine, Run, choose_event
from .scheduler_strategies import RandomChooser, choose_setup

ADMISSIBLE = (
    RequestStatus.WAITING,
    RequestStatus.WAITING_FOR_FSM,
    RequestStatus.WAITING_FOR_REMOTE_KVS,
    RequestStatus.PREEMPTED,
)
"""Whoever waits, but for sessions without input."""


class Gathers:
    """What the other ranks contribute, made up: the same for all that are made from the same arguments.

    Args:
        seed: of everything.
        cap: requests that may run on a rank.
        most: requests that run on another rank, at most; None is the cap. Spells with a rank at `most` and
            spells without one take turns.
    """

    dp_size, dp_rank = 3, 1

    def __init__(self, seed: object, cap: int, most: int | None = None) -> None:
        self._rng = random.Random(f"{seed}")
        self._most = cap if most is None else most
        self._is_full = False
        self._has_ended = False

    def end(self) -> None:
        """From now on the other ranks are empty."""
        self._has_ended = True

    def rows(self, own: RankCounts) -> list[RankCounts]:
        """The next gather, with this rank's own counts in their place."""
        if self._rng.random() < 0.3:
            self._is_full = not self._is_full
        rows = [self._row(own.step) for _ in range(self.dp_size)]
        if self._is_full and not self._has_ended:
            full = self._rng.choice((0, 2))
            rows[full] = rows[full]._replace(running=self._most)
        rows[self.dp_rank] = own
        return rows

    def _row(self, step: int) -> RankCounts:
        rng = self._rng
        running = rng.randint(0, max(0, self._most - 1))
        waiting = rng.choice((0, 0, 3))
        row = RankCounts(
            step=step,
            running=running,
            waiting=waiting,
            prefilling=rng.choice((0, 0, 1)) * rng.randint(0, running),
            waited=rng.randint(0, 3) if waiting else 0,
            saturated=int(waiting > 0 and rng.random() < 0.2),
        )
        return RankCounts(step=step) if self._has_ended else row


class _Gathering(BalanceScheduler):
    """Gathers, with ranks that are made up, before every step but the first."""

    def __init__(self, config: SchedulerConfig, *, policy: str, gathers: Gathers, **options: Any) -> None:
        super().__init__(
            config,
            policy=make_policy(policy, config.max_num_seqs),
            dp_rank=gathers.dp_rank,
            dp_size=gathers.dp_size,
            **options,
        )
        self.gathers = gathers
        self.own: RankCounts | None = None
        self._has_stepped = False

    def schedule(self) -> SchedulerOutput:
        if self._has_stepped:
            self.own = self.counts()
            self.observe(self.gathers.rows(self.own))
        self._has_stepped = True
        return super().schedule()


class GatheringScheduler(_Gathering, WatchedScheduler):
    """`BalanceScheduler` that gathers by itself."""


class AsyncGatheringScheduler(_Gathering, AsyncBalanceScheduler, WatchedAsyncScheduler):
    """`AsyncBalanceScheduler` that gathers by itself."""


class Outsider:
    """What a rank contributes, from what can be seen of its scheduler.

    Args:
        scheduler: any of ours, whatever decides about its gate.

    Attributes:
        num_frozen_steps: steps in which somebody waited before a shut gate.
    """

    def __init__(self, scheduler: UpstreamScheduler) -> None:
        self.scheduler = scheduler
        self.num_gathers = 0
        self.num_frozen_steps = 0
        self._prefilling: set[str] = set()
        self._waited = 0
        self._is_saturated = False
        self._running_before: set[str] = set()
        self._num_known_before: dict[str, int] = {}

    def before_step(self) -> None:
        requests = self.scheduler.requests
        self._running_before = self._ids(RequestStatus.RUNNING)
        self._num_known_before = {k: r.num_tokens + r.num_output_placeholders for k, r in requests.items()}

    def after_step(self, output: SchedulerOutput, is_open: bool) -> None:
        for request_id in output.num_scheduled_tokens:
            num_computed = self.scheduler.requests[request_id].num_computed_tokens
            is_complete = num_computed >= self._num_known_before[request_id]
            (self._prefilling.discard if is_complete else self._prefilling.add)(request_id)
        is_waiting = bool(self._waiting())
        if self._ids(RequestStatus.RUNNING) - self._running_before or not is_waiting:
            self._waited = 0
        else:
            self._waited += 1
        if is_open:
            self._is_saturated = is_waiting
        self.num_frozen_steps += is_waiting and not is_open

    def counts(self) -> RankCounts:
        """The contribution to the next gather."""
        is_paused = self.scheduler.pause_state == PauseState.PAUSED_ALL
        running = set() if is_paused else self._ids(RequestStatus.RUNNING)
        waiting = self._waiting()
        fields = {
            "step": self.num_gathers,
            "running": len(running),
            "waiting": len(waiting),
            "prefilling": len(running & self._prefilling),
            "waited": self._waited if waiting else 0,
            "saturated": 1 if waiting and self._is_saturated else 0,
        }
        self.num_gathers += 1
        return RankCounts(**fields)

    def _waiting(self) -> set[str]:
        if self.scheduler.pause_state != PauseState.UNPAUSED:
            return set()
        return self._ids(*ADMISSIBLE)

    def _ids(self, *statuses: RequestStatus) -> set[str]:
        return {k for k, r in self.scheduler.requests.items() if r.status in statuses}


class _Freezing(UpstreamScheduler):
    """vLLM's scheduler, whose waiting queue is empty in the steps in which a gate would be shut.

    The gate is that of a gather in which this rank's row is the `Outsider`'s.
    """

    def __init__(self, config: SchedulerConfig, *, policy: str, gathers: Gathers, **options: Any) -> None:
        super().__init__(config, **options)
        self.policy = make_policy(policy, config.max_num_seqs)
        self.gathers = gathers
        self.outsider = Outsider(self)
        self.own: RankCounts | None = None
        self.is_open = True
        self._has_stepped = False

    def schedule(self) -> SchedulerOutput:
        rows = [RankCounts()] * self.gathers.dp_size  # before the first gather
        if self._has_stepped:
            self.own = self.outsider.counts()
            rows = self.gathers.rows(self.own)
        self._has_stepped = True
        self.is_open = self.policy(rows)
        self.outsider.before_step()
        output = super().schedule() if self.is_open else self._schedule_without_waiting()
        self.outsider.after_step(output, self.is_open)
        return output

    def _schedule_without_waiting(self) -> SchedulerOutput:
        waiting, self.waiting = self.waiting, FCFSRequestQueue()
        output = super().schedule()
        preempted, self.waiting = self.waiting, waiting
        for request in reversed(list(preempted)):  # in the order in which they gave way
            waiting.prepend_request(request)
        return output


class FreezingScheduler(_Freezing):
    """`UpstreamScheduler` with a waiting queue that is empty now and then."""


class AsyncFreezingScheduler(_Freezing, AsyncUpstreamScheduler):
    """`AsyncUpstreamScheduler` with a waiting queue that is empty now and then."""


GathersFor = Callable[[int], Gathers]
"""Gathers for a cap; the same each time."""


def gathering_engine(policy: str, gathers_for: GathersFor, *, shows_gate: bool = True) -> type[CheckedEngine]:
    """Ours behind a gate, with its invariants checked after every step."""
    kinds = GatheringScheduler, AsyncGatheringScheduler
    return _gated(CheckedEngine, kinds, policy, gathers_for, shows_gate)


def freezing_engine(policy: str, gathers_for: GathersFor) -> type[OurEngine]:
    """vLLM's, with an empty waiting queue where the gate is shut."""
    kinds = FreezingScheduler, AsyncFreezingScheduler
    return _gated(OurEngine, kinds, policy, gathers_for, shows_gate=True)


def _gated(base: Any, kinds: tuple[Any, Any], policy: str, gathers_for: GathersFor, shows_gate: bool) -> Any:
    """`base` with schedulers that gather; what they contributed and decided is part of the state."""

    class GatedEngine(base):
        name = kinds[0].__name__
        schedulers = tuple(partial(_make, kind, policy, gathers_for) for kind in kinds)

        def state(self) -> dict[str, Any]:
            gate = {"own": self.scheduler.own, "is_open": self.scheduler.is_open} if shows_gate else {}
            return {**super().state(), **gate}

    return GatedEngine


def _make(
    kind: Callable[..., UpstreamScheduler],
    policy: str,
    gathers_for: GathersFor,
    config: SchedulerConfig,
    **options: Any,
) -> UpstreamScheduler:
    return kind(config, policy=policy, gathers=gathers_for(config.max_num_seqs), **options)


def gathers_of(run: Run) -> list[Gathers]:
    """Those of the engines of a run that gather."""
    schedulers = (lane.engine.scheduler for lane in run.driver.lanes)
    return [scheduler.gathers for scheduler in schedulers if hasattr(scheduler, "gathers")]


def balance_runs(
    seed: object,
    policy: str,
    *,
    most: Callable[[int], int] | None = None,
    engines: Callable[[str, GathersFor], Sequence[Callable[..., Engine]]] | None = None,
    always: Sequence[str] = (),
    change: Callable[[SchedulerConfig], SchedulerConfig] = lambda config: config,
) -> Iterator[Run]:
    """Random runs without end, of a gate beside what it must equal.

    Args:
        seed: run i depends on (seed, i) alone.
        policy: text form.
        most: what `Gathers.most` is for a cap; None is the cap.
        engines: the two; by default ours, and vLLM's with an empty queue where the gate is shut.
        always: features that every setup has.
        change: of each configuration.
    """
    make_engines = engines or (lambda *given: (gathering_engine(*given), freezing_engine(*given)))
    i = 0
    while True:
        chooser = RandomChooser(random.Random(f"{seed}-{i}"))
        setup = choose_setup(chooser, always)
        setup = replace(setup, config=change(setup.config))
        gathers_for = partial(_gathers_for, f"{seed}-{i}", most)
        run = Run(setup, make_engines(policy, gathers_for))
        run.finish(partial(_let_happen, chooser, run))
        i += 1
        yield run


def _gathers_for(seed: str, most: Callable[[int], int] | None, cap: int) -> Gathers:
    return Gathers(seed, cap, None if most is None else most(cap))


def _let_happen(chooser: RandomChooser, run: Run) -> None:
    for _ in range(EVENTS_PER_RUN):
        choose_event(chooser, run)
    for gathers in gathers_of(run):
        gathers.end()


class Bound(NamedTuple):
    """How long a policy lets wait, in steps, where a request of `length` tokens is the longest possible.

    docs/balance.md says why, and where none of it holds.

    Attributes:
        shut: in a row with the gate shut, at most.
        wait: until a rank with waiting requests admits one, at most.
    """

    shut: int
    wait: int


BOUNDS: Mapping[str, Callable[[Any, int], Bound]] = {
    "open_gate": lambda policy, length: Bound(0, length - 1),
    "any_rank_at_cap": lambda policy, length: Bound(length - 2, length - 1),
    "any_rank_near_cap": lambda policy, length: Bound(2 * (length - 2), 2 * (length - 2) + 1),
    "cadence": lambda policy, length: Bound(policy.interval - 1, length - 1 + policy.interval - 1),
    "patient": lambda policy, length: Bound(
        length - 2, min(2 * (length - 2) + 1, max(length - 1, policy.most_steps + 1))
    ),
}
"""Policy by name, and the length of the longest request in tokens, prompt and output, to its bound."""


class Group:
    """Ranks in one process that step, and then gather: all that a gate sees of data parallelism.

    Every request samples the same token for ever.

    Args:
        policies: text forms, one a rank.
        config: of each rank.

    Attributes:
        schedulers: one a rank.
        gathered: the last gather.
        outputs: what each rank scheduled in the last step, None for a dummy.
    """

    def __init__(
        self,
        policies: Sequence[str],
        config: SchedulerConfig,
        kind: type[BalanceScheduler] = BalanceScheduler,
    ) -> None:
        self.schedulers = [
            kind(
                config,
                policy=make_policy(policy, config.max_num_seqs),
                dp_rank=rank,
                dp_size=len(policies),
            )
            for rank, policy in enumerate(policies)
        ]
        self.gathered: list[RankCounts] = []
        self.outputs: list[SchedulerOutput | None] = []
        self._num_requests = 0

    def add_request(self, rank: int, num_prompt_tokens: int, max_tokens: int) -> Request:
        """A request for one rank."""
        request = Request(
            f"r{self._num_requests}", [7] * num_prompt_tokens, SamplingParams(max_tokens=max_tokens)
        )
        self._num_requests += 1
        self.schedulers[rank].add_request(request)
        return request

    def step(self) -> None:
        """All ranks make a step, those without requests a dummy; then they gather, and decide."""
        self.outputs = [self._step(scheduler) for scheduler in self.schedulers]
        self.gathered = [scheduler.counts() for scheduler in self.schedulers]
        for scheduler in self.schedulers:
            scheduler.observe(self.gathered)

    @staticmethod
    def _step(scheduler: BalanceScheduler) -> SchedulerOutput | None:
        if not scheduler.has_requests():
            return None
        output = scheduler.schedule()
        req_ids = list(output.num_scheduled_tokens)
        tokens = [[] if scheduler.requests[i].is_prefill_chunk else [1] for i in req_ids]
        scheduler.update_from_output(output, ModelRunnerOutput(req_ids, tokens))
        return output
