"""Lives of schedulers, and collectives of data-parallel ranks, that show known bugs."""

from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

from ..fixtures.record_traces import CollectiveRecorder, Record, SchedulerRecorder
from ..fixtures.store import Fixture
from ..reference.errors import AscendTwinError, LockstepError
from ..scheduler.admission import RankCounts, make_policy
from ..scheduler.balance import BalanceScheduler
from ..scheduler.collectives import GATHER, HAS_UNFINISHED, Collective, Row
from ..scheduler.config import SchedulerConfig
from ..scheduler.lifecycle import PauseState
from ..scheduler.lockstep import Lockstep, Rank
from ..scheduler.workload import ImageSpec, RemoteHit, RequestSpec
from .known_bugs import RecordedCase, Wrong
from .lockstep_engines import TinyEngine
from .lockstep_mutants import ExcludingLockstep, misplaced
from .mutants import museum
from .scheduler_engines import OurEngine, RequestInput
from .scheduler_runs import Run
from .scheduler_scenarios import Add, Event, GrammarReady, RemoteDone, Scenario, Step
from .source_mutants import mutated
from .traced_runs import dp_config, plain_config


@dataclass(frozen=True)
class Life:
    """What happens to a scheduler, ours as it is, and ours with a bug.

    Attributes:
        name: of its files, without folder and suffix.
        title: one line.
        bug: of the museum, by name.
        wrong: what a replay of what it did with the bug must find.
        scenario: what happens; afterwards everything comes that anybody waits for.
    """

    name: str
    title: str
    bug: str
    wrong: Wrong
    scenario: Scenario

    @property
    def cases(self) -> tuple[RecordedCase, RecordedCase]:
        """The two files."""
        path, title = f"traces/{self.name}", f"{self.title}: as it went wrong"
        return (
            RecordedCase(f"{path}.jsonl", self.title, lambda: self._record(OurEngine)),
            RecordedCase(
                f"{path}_wrong.jsonl", title, lambda: self._record(_engine_with(self.bug)), self.wrong
            ),
        )

    def _record(self, engine: type[OurEngine]) -> Fixture:
        run = Run.of(self.scenario, (engine,))
        scheduler = run.driver.first.scheduler
        config = plain_config(scheduler) | {"asynchronous": self.scenario.async_scheduling}
        added = [event.request.request_id for event in self.scenario.events if isinstance(event, Add)]
        records: list[Record] = []
        SchedulerRecorder(
            scheduler, _into(records), clock=lambda: 0.0, names=dict(zip(added, added, strict=True))
        )
        with suppress(AscendTwinError):  # what stalls or raises is recorded up to there
            run.apply_all(self.scenario.events)
            run.drain()
        return Fixture("scheduler", config, records=tuple(records))


SCHEDULER = {
    name: f"{(__package__ or '').rpartition('.')[0]}.scheduler.{name}"
    for name in (
        *("stats", "request", "request_queue", "kv_blocks", "encoder_cache", "remote_kv"),
        *("lifecycle", "upstream"),
    )
}
"""Modules of which a scheduler with a bug is made, each after those that it imports."""


def scheduler_with(bug: str) -> dict[str, Any]:
    """Copies of the modules of a scheduler, with a bug of the museum in them."""
    (found,) = (x for x in museum.BUGS if x.name == bug)
    return mutated(replace(found, module=found.module.rpartition(".")[2]), SCHEDULER)


def _engine_with(bug: str) -> type[OurEngine]:
    copies = scheduler_with(bug)

    class EngineWithBug(OurEngine):
        schedulers = copies["upstream"].UpstreamScheduler, copies["upstream"].AsyncUpstreamScheduler

        def make_request(self, spec: RequestSpec, given: RequestInput) -> Any:
            request = super().make_request(spec, given)
            request.__class__ = copies["request"].Request
            return request

    return EngineWithBug


SMALL = SchedulerConfig(
    num_blocks=9, block_size=4, max_num_seqs=4, max_num_batched_tokens=32, max_model_len=32
)
ASYNC = {"async_scheduling": True}


def _scenario(config: SchedulerConfig, *events: Event, **options: Any) -> Scenario:
    return Scenario(config, events, **options)


def _add(name: str, num_tokens: int, max_tokens: int, *, like: str = "", **options: Any) -> Add:
    """A request; its prompt begins as that of the one that it is `like`, and else as that of nobody."""
    return Add(RequestSpec(name, 0, ((ord(like or name), num_tokens),), max_tokens, **options))


LIVES = (
    Life(
        "asc-8279_finished_load_is_not_seen",
        "a loads the first 8 tokens of its prompt from elsewhere while b runs",
        "finished_load_is_not_seen",
        Wrong("schedule", "scheduler", {"step": 3}),
        _scenario(
            SMALL,
            _add("b", 6, 6),
            _add("a", 10, 3, remote=RemoteHit(8, asynchronous=True)),
            Step(2),
            RemoteDone(0),
            Step(3),
            connector=True,
        ),
    ),
    Life(
        "asc-10559_ready_grammar_is_not_seen",
        "The grammar of a is compiled while b runs",
        "skipped_requests_are_forgotten",
        Wrong("schedule", "scheduler", {"step": 0}),
        _scenario(
            SMALL, _add("b", 6, 6), _add("a", 5, 3, structured=True), Step(2), GrammarReady(0), Step(3)
        ),
    ),
    Life(
        "asc-15802_prefills_without_room",
        "a and b fit side by side, and their outputs do not",
        "nobody_gives_way",
        Wrong("schedule", "scheduler", {"step": 2}),
        _scenario(replace(SMALL, num_blocks=6, max_model_len=20), _add("a", 7, 9), _add("b", 7, 9), Step(4)),
    ),
    Life(
        "asc-11334_resumed_past_its_prompt",
        "b gives way after it has said something, and is computed again in pieces of 4 tokens",
        "resumed_behind_its_prompt_is_a_decode",
        Wrong("schedule", "scheduler", {"step": 11}),
        _scenario(
            replace(
                SMALL,
                num_blocks=7,
                max_model_len=24,
                long_prefill_token_threshold=4,
                enable_prefix_caching=False,
            ),
            _add("a", 7, 9),
            _add("b", 7, 9),
            Step(4),
            **ASYNC,
        ),
    ),
    Life(
        "asc-10580_piece_as_short_as_drafts",
        "A prompt of 9 tokens in pieces of 2, as many as a decode with its draft has",
        "few_tokens_are_a_decode",
        Wrong("schedule", "scheduler", {"step": 1}),
        _scenario(
            replace(SMALL, num_spec_tokens=1, spec_method="draft_model", long_prefill_token_threshold=2),
            _add("a", 9, 5, draft_acceptance=0.5),
            **ASYNC,
        ),
    ),
    Life(
        "asc-9749_drafts_near_the_end_of_the_model",
        "A prompt of 18 tokens and two drafts, where the model ends at 20",
        "drafts_behind_the_end_of_the_model",
        Wrong("schedule", "scheduler", {"step": 1}),
        _scenario(
            replace(SMALL, max_model_len=20, num_spec_tokens=2, spec_method="draft_model"),
            _add("a", 18, 2, draft_acceptance=1.0),
        ),
    ),
    Life(
        "asc-10746_nothing_for_the_first",
        "a waits for room for its image, and b behind it could go on",
        "step_ends_at_a_request_without_tokens",
        Wrong("schedule", "scheduler", {"step": 2}),
        _scenario(
            replace(
                SMALL,
                num_blocks=13,
                long_prefill_token_threshold=2,
                max_num_encoder_input_tokens=6,
                encoder_cache_size=6,
            ),
            _add("c", 9, 2, images=(ImageSpec("X", 1, 6),)),
            _add("a", 9, 2, images=(ImageSpec("Y", 4, 4),)),
            _add("b", 5, 6),
        ),
    ),
    Life(
        "vllm-29387_hit_on_a_state_of_the_same_step",
        "a and b have one prefix, and would be admitted in one step",
        "hit_on_a_state_of_this_step",
        Wrong("schedule", "scheduler", {"step": 0}),
        _scenario(
            replace(SMALL, num_blocks=17, kv_groups=("full_attention", "mamba"), mamba_cache_mode="align"),
            _add("a", 9, 3),
            _add("b", 11, 3, like="a"),
        ),
    ),
    Life(
        "asc-16315_preemption_thrash",
        "c gives way for b, and a part of it would fit again in the same step",
        "preempted_are_admitted_at_once",
        Wrong("schedule", "scheduler"),
        _scenario(
            replace(
                SMALL,
                num_blocks=8,
                max_model_len=24,
                max_num_batched_tokens=6,
                enable_prefix_caching=False,
            ),
            _add("a", 7, 6),
            _add("b", 7, 6),
            _add("c", 7, 6),
            Step(4),
        ),
    ),
    Life(
        "vllm-34616_full_prefix_hit",
        "b has the prompt of a, of exactly two blocks",
        "full_hit_leaves_nothing",
        Wrong("schedule", "scheduler"),
        _scenario(SMALL, _add("a", 8, 2), Step(2), _add("b", 8, 3, like="a")),
    ),
)


def _into(records: list[Record]) -> Callable[[Iterable[Record]], bool]:
    def write(new: Iterable[Record]) -> bool:
        records.extend(new)
        return True

    return write


# Data-parallel ranks


@dataclass(frozen=True)
class Ranks:
    """What two ranks do together, as it must be and as it was with a bug.

    Attributes:
        name: of its files, without folder and suffix.
        title: one line.
        wrong_group: makes the group with the bug.
        tokens: that the one request of each rank asks for.
        decides_by: the policy of the ranks with the bug, where that is what is wrong.
        then_paused: whether rank 0 gets a request more when all are idle, and is paused before it reads it.
    """

    name: str
    title: str
    wrong_group: Callable[..., Lockstep]
    tokens: tuple[int, int] = (3, 1)
    decides_by: str = "any_rank_at_cap"
    then_paused: bool = False

    @property
    def cases(self) -> tuple[RecordedCase, RecordedCase]:
        """The two files."""
        path, title = f"traces/{self.name}", f"{self.title}: as it went wrong"
        return (
            RecordedCase(f"{path}.jsonl", self.title, lambda: self._record(Lockstep, POLICY)),
            RecordedCase(
                f"{path}_wrong.jsonl",
                title,
                lambda: self._record(self.wrong_group, self.decides_by),
                Wrong("collective", "collective"),
            ),
        )

    def _record(self, group_type: Callable[..., Lockstep], policy: str) -> Fixture:
        engines = [
            TinyEngine(BalanceScheduler(TINY, policy=make_policy(policy, CAP), dp_rank=rank, dp_size=2))
            for rank in range(2)
        ]
        group = group_type(engines, finish_check_interval=INTERVAL, log_size=None)
        records = _record_collectives(group)
        for rank, count in enumerate(self.tokens):
            group.add_request(rank, (f"r{rank}", count))
        with suppress(LockstepError):
            _run(group)
            if self.then_paused:
                group.add_request(0, ("late", 1))
                group.set_pause_state(0, PauseState.PAUSED_ALL)
                _run(group)
        config = dp_config(2, POLICY, CAP, INTERVAL)
        return Fixture("dp", config, records=tuple(records))


POLICY, CAP, INTERVAL = "any_rank_at_cap", 2, 2
TINY = SchedulerConfig(num_blocks=16, block_size=4, max_num_seqs=CAP, max_model_len=16)


def _run(group: Lockstep) -> None:
    while group.step():
        pass


def _record_collectives(group: Lockstep) -> list[Record]:
    """The records of all ranks, from now on; a record is one ms after the one before it."""
    records: list[Record] = []
    recorders = [
        CollectiveRecorder(rank, _into(records), clock=lambda: len(records) / 1e3) for rank in range(2)
    ]
    transport = group.transport
    enter, take_complete = transport.enter, transport.take_complete

    def entered(rank: int, collective: Collective) -> None:
        recorders[rank].enter(*collective)
        enter(rank, collective)

    def taken() -> tuple[Row, ...] | None:
        waiting = dict(transport.waiting)
        rows = take_complete()
        if rows is None:
            return None
        goes_on = any(row[0] for row in rows)
        for rank, collective in waiting.items():
            if collective.name == HAS_UNFINISHED:
                recorders[rank].leave(HAS_UNFINISHED, collective.step, goes_on)
        return rows

    transport.enter, transport.take_complete = entered, taken
    for rank in group.ranks:
        _record_gathers(rank, recorders[rank.engine.scheduler.dp_rank])
    return records


def _record_gathers(rank: Rank, recorder: CollectiveRecorder) -> None:
    scheduler = rank.engine.scheduler
    observe = scheduler.observe

    def observed(gathered: Sequence[RankCounts]) -> None:
        observe(gathered)
        rows = [list(counts) for counts in gathered]
        recorder.leave(GATHER, rank.num_steps, rows, is_open=scheduler.is_open)

    scheduler.observe = observed


def _checks_at_another_step(*args: Any, **options: Any) -> Lockstep:
    """A group in which rank 1 counts another number of steps from one reduction to the next."""
    group = Lockstep(*args, **options)
    group.ranks[1].finish_check_interval += 1
    return group


RANKS = (
    Ranks(
        "asc-11310_gather_in_schedule",
        "Rank 1 is drained while rank 0 works",
        misplaced("in schedule()"),
    ),
    Ranks(
        "asc-11310_gather_before_the_reduction",
        "The last request ends in the turn of the reduction",
        misplaced("before the idle check"),
        tokens=(2, 1),
    ),
    Ranks(
        "asc-7611_gate_one_below_the_cap",
        "Each rank runs one request, and may run two",
        Lockstep,
        decides_by="any_rank_near_cap",
    ),
    Ranks(
        "vllm-43547_step_without_tokens",
        "Rank 1 has no token to compute while rank 0 has",
        misplaced("after own batches"),
    ),
    Ranks(
        "vllm-45223_end_of_wave_counted_apart",
        "A wave of a few reductions",
        _checks_at_another_step,
        tokens=(5, 1),
    ),
    Ranks(
        "vllm-39366_wave_starts_without_a_rank",
        "A request wakes both ranks, and the one that has it is paused before it reads it",
        ExcludingLockstep,
        then_paused=True,
    ),
)

CASES = (
    *(case for life in LIVES for case in life.cases),
    *(case for ranks in RANKS for case in ranks.cases),
)
