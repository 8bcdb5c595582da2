# pyright: reportMissingImports=false
"""Runs of real engines in one process: what happens, chosen from a seed, and what must hold meanwhile."""

import random
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from ..scheduler.admission import RankCounts, make_policy
from ..scheduler.config import SchedulerConfig
from ..scheduler.workload import RequestSpec
from .balance_engines import BOUNDS
from .paged_model import OutputOracle
from .vllm_engines import EngineGroup, Rank, engine_config

SCHEDULER = "ascend_twin.optimized.vllm.BalanceScheduler"
NUM_RANKS = 2
MAX_MODEL_LEN = 64
_LETTERS = {"forward": "f", "all_reduce": "r", "all_gather": "g"}


@dataclass(frozen=True)
class Plan:
    """What happens to a group of two ranks.

    Attributes:
        config: limits of each rank.
        waves: of each the events; the next wave begins when all ranks are idle.
    """

    config: SchedulerConfig
    waves: tuple[tuple["Event", ...], ...]

    @property
    def specs(self) -> list[RequestSpec]:
        """All requests."""
        return [event.spec for wave in self.waves for event in wave if event.spec is not None]


@dataclass(frozen=True)
class Event:
    """Something that a client does.

    Attributes:
        step: when, in forward passes since the wave began; sooner if all ranks are idle before.
        kind: "add", "abort", "pause" or "resume".
        ranks: of which.
        spec: the request to add.
        name: of the request to abort, or the mode of the pause.
    """

    step: int
    kind: str
    ranks: tuple[int, ...]
    spec: RequestSpec | None = None
    name: str = ""


def choose_plan(seed: int, num_waves: int, num_requests: int, *, pauses_alone: bool) -> Plan:
    """A plan from small numbers.

    Args:
        seed: of everything else.
        num_waves: >= 1.
        num_requests: of each wave, about.
        pauses_alone: whether one rank may be paused without the others, as in vLLM 0.17.0.
    """
    rng = random.Random(seed)
    block_size = 4
    num_needed = MAX_MODEL_LEN // block_size + 1
    config = SchedulerConfig(
        num_blocks=num_needed + rng.choice((0, 2, 30)),
        block_size=block_size,
        max_num_seqs=rng.randint(2, 4),
        max_num_batched_tokens=rng.choice((8, 16, 48)),
        max_model_len=MAX_MODEL_LEN,
        policy=rng.choice(("fcfs", "fcfs", "priority")),
        enable_prefix_caching=rng.random() < 0.7,
    )
    waves = [_choose_wave(rng, number, num_requests, pauses_alone) for number in range(num_waves)]
    return Plan(config, tuple(waves))


def _choose_wave(rng: random.Random, number: int, num_requests: int, pauses_alone: bool) -> tuple[Event, ...]:
    share = rng.choice((0.0, 0.1, 0.5))  # of the requests that do not go to the busy rank
    busy = rng.randrange(NUM_RANKS)
    spread = rng.choice((0, 0, 5, 40))
    events = []
    for i in range(rng.randint(1, num_requests)):
        rank = busy if rng.random() >= share else 1 - busy
        spec = RequestSpec(
            f"w{number}-{i}",
            0,
            ((rng.randrange(3), rng.randint(1, 24)), (rng.randrange(1000), rng.randint(1, 8))),
            max_tokens=rng.randint(1, 24),
            stop_token_ids=(rng.randrange(64),) if rng.random() < 0.3 else (),
            priority=rng.randint(0, 2),
        )
        step = rng.randint(0, spread)
        events.append(Event(step, "add", (rank,), spec))
        if rng.random() < 0.15:
            events.append(Event(step + rng.randint(0, 9), "abort", (rank,), name=spec.request_id))
    if rng.random() < 0.3:
        alone = pauses_alone and rng.random() < 0.5
        ranks = (rng.randrange(NUM_RANKS),) if alone else tuple(range(NUM_RANKS))
        events.append(Event(rng.randint(0, 12), "pause", ranks, name=rng.choice(("keep", "wait"))))
    return tuple(sorted(events, key=lambda event: event.step))


class EngineRun:
    """A plan carried out by real engines, watched from outside.

    Args:
        model: a folder of `vllm_stub.write_model`.
        plan: what happens.
        policy: admission policy in text form; None is vLLM's own scheduler.
        is_async: whether with async scheduling.

    Attributes:
        features: how often things happened that a run is made for.
        group: the engines; closed once the run is over.
    """

    def __init__(self, model: Path, plan: Plan, policy: str | None, is_async: bool) -> None:
        config = plan.config
        balance: dict[str, Any] = {}
        if policy is not None:
            settings = {"ascend_twin": {"balance": {"policy": policy}}}
            balance = {"scheduler_cls": SCHEDULER, "additional_config": settings}
        vllm_config = engine_config(
            model,
            is_async=is_async,
            data_parallel_size=NUM_RANKS,
            max_model_len=config.max_model_len,
            max_num_seqs=config.max_num_seqs,
            max_num_batched_tokens=config.max_num_batched_tokens,
            block_size=config.block_size,
            num_gpu_blocks_override=config.num_blocks,
            enable_prefix_caching=config.enable_prefix_caching,
            scheduling_policy=config.policy,
            **balance,
        )
        self.plan, self.policy = plan, policy
        self.oracle = OutputOracle(config)
        self.features: Counter[str] = Counter()
        self._aborted: set[str] = set()
        self._paused: tuple[int, ...] = ()
        self._num_resumptions = 0
        self._gate = _Gate(policy, plan, is_async)
        with EngineGroup(vllm_config, lambda rank, outputs: self.oracle.observe(outputs)) as self.group:
            self.group.on_gather = lambda rows: self._gate.check_gather(rows, self.group)
            for rank in self.group.ranks:
                rank.engine.model_executor.on_schedule = partial(self._gate.check_step, rank)
            for wave in plan.waves:
                self._run_wave(wave)
            self._check_end()

    def _run_wave(self, events: Sequence[Event]) -> None:
        start, group = self.group.num_steps, self.group
        for event in events:
            while group.num_steps - start < event.step and group.advance():
                pass
            self._act(event)
        group.run()
        if self._paused:
            self._act(Event(0, "resume", self._paused))
            group.run()

    def _act(self, event: Event) -> None:
        group = self.group
        for rank in event.ranks:
            if event.kind == "add" and event.spec is not None:
                self.oracle.add_request(event.spec)
                group.add_request(rank, event.spec)
            elif event.kind == "abort":
                self.features["aborts"] += event.name in group.schedulers[rank].requests
                self._aborted.add(event.name)
                group.abort(rank, [event.name])
            elif event.kind == "pause":
                self._paused = event.ranks
                group.call(rank, "pause_scheduler", event.name, False)
                self.features[f"pauses, {event.name}"] += 1
            else:
                group.call(rank, "resume_scheduler")
        if event.kind == "resume":
            self._paused = ()
            self._num_resumptions += 1

    def _check_end(self) -> None:
        """Everybody was served, ranks made the same steps, and gathered once in each."""
        for spec in self.plan.specs:
            said, expected = self.oracle.said[spec.request_id], self.oracle.expected[spec.request_id]
            is_served = len(said) == len(expected) + 1
            assert is_served or spec.request_id in self._aborted, f"{spec.request_id} said {said}"
        failures = [(rank, answer.failure_message) for rank, answer in self.group.answers]
        assert not any(message for _, message in failures), failures
        letters = "".join(_LETTERS[name] for name in self.group.collectives)
        others = re.sub("fr?g" if self.policy else "fr?", "", letters)
        # A reduction of its own is that of a resumption.
        is_due = others == "r" * len(others) and len(others) <= self._num_resumptions
        assert is_due, f"a reduction or a gather out of place: {letters}"
        executors = [rank.engine.model_executor for rank in self.group.ranks]
        num_steps = self.group.num_steps
        assert [e.num_batches + e.num_dummies for e in executors] == [num_steps] * NUM_RANKS
        features = self.features
        features["waves"] += len(self.plan.waves)
        features["steps"] += num_steps
        for name in ("num_dummies", "num_resumed", "num_prefix_hits", "num_ahead"):
            features[name] += sum(getattr(executor, name) for executor in executors)
        if self.policy:
            schedulers = self.group.schedulers
            assert [s.num_gathers for s in schedulers] == [num_steps] * NUM_RANKS
            assert [s.num_frozen_steps for s in schedulers] == self._gate.num_frozen_steps
            features["frozen steps"] += sum(self._gate.num_frozen_steps)
            features["shut gates"] += self._gate.num_shut


class _Gate:
    """What the gathers of a run say, against what can be seen of the engines while all are in a gather."""

    def __init__(self, policy: str | None, plan: Plan, is_async: bool) -> None:
        self._policy = policy and make_policy(policy, plan.config.max_num_seqs)
        self.num_frozen_steps = [0] * NUM_RANKS
        self.num_shut = 0
        self._num_in_a_row = 0
        self._is_open = True
        self._cap = plan.config.max_num_seqs
        self._most = MAX_MODEL_LEN
        if policy is not None:
            length = max(sum(n for _, n in spec.segments) + spec.max_tokens for spec in plan.specs)
            # Steps in flight come on top of the bound of docs/balance.md.
            self._most = BOUNDS[policy.split(":")[0]](self._policy, length).shut + 2 * is_async

    def check_step(self, rank: Rank) -> None:
        """After a step of the scheduler: nobody was admitted through a shut gate."""
        engine = rank.engine
        admitted = engine.model_executor.admitted
        assert self._is_open or not admitted, f"rank {rank.index} admitted {admitted}"
        self.num_frozen_steps[rank.index] += not self._is_open and _num_waiting(engine.scheduler) > 0

    def check_gather(self, rows: Sequence[Any], group: EngineGroup) -> None:
        """At a gather: all ranks have made their step, and none has heard of the others."""
        assert callable(self._policy), "a gather, and nobody asked for balance scheduling"
        gathered = [RankCounts(*row.tolist()) for row in rows]
        for rank, (counts, scheduler) in enumerate(zip(gathered, group.schedulers, strict=True)):
            assert scheduler.is_open == self._is_open, f"rank {rank} does not do what the policy says"
            is_paused = scheduler.pause_state.name == "PAUSED_ALL"
            expected = (
                scheduler.num_gathers,
                0 if is_paused else len(scheduler.running),
                _num_waiting(scheduler),
            )
            assert (counts.step, counts.running, counts.waiting) == expected
            assert len(scheduler.running) <= self._cap
        self._is_open = self._policy(gathered)
        self._num_in_a_row = 0 if self._is_open else self._num_in_a_row + 1
        self.num_shut += not self._is_open
        assert self._num_in_a_row <= self._most, f"shut for {self._num_in_a_row} steps"


def _num_waiting(scheduler: Any) -> int:
    return len(scheduler.waiting) if scheduler.pause_state.name == "UNPAUSED" else 0
