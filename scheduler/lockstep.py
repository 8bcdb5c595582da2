"""Data-parallel ranks that step together, in waves, as the engines of vLLM do around a mixture of experts.

A rank with nothing to do runs dummy batches for as long as another has unfinished requests: the experts
are spread over all ranks, and a model that is not run on one of them stands still on all. When nobody has
any, the wave is over and all ranks go idle; a request for one of them starts the next wave on all.

In each turn of its loop that is not idle a rank enters, in this order and nothing else:

1. the model's own collectives (`FORWARD`), with a real batch or a dummy;
2. in every 32nd turn of a wave, the reduction over who has unfinished requests (`HAS_UNFINISHED`);
3. the gather of counts (`GATHER`), by which `BalanceScheduler` decides about the next step.

Source: vllm/v1/engine/{core,coordinator,core_client}.py, v0.17.0; the place of the gather: vllm-ascend
#11310. Unlike v0.17.0, the start of a wave is told to the rank, too, that has the request: it may be paused,
and would leave the others to step alone (vllm #39366).
"""

from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

from ..reference.errors import LockstepError, invalid_argument
from .admission import RankCounts
from .balance import BalanceScheduler
from .checks import check_int
from .collectives import FORWARD, GATHER, HAS_UNFINISHED, Collective, LocalTransport, Turn
from .lifecycle import PauseState

FINISH_CHECK_INTERVAL = 32
"""Turns of a wave from one look at whether it is over to the next; as vLLM's."""

COORDINATOR, CLIENT = "coordinator", "client"

Message = Callable[[], None]
"""What happens when it is read."""


class Engine(Protocol):
    """A scheduler and the model that it schedules for."""

    @property
    def scheduler(self) -> BalanceScheduler: ...

    def add_request(self, request: Any) -> None:
        """Take a request, in whatever form this engine does."""
        ...

    def abort(self, request_ids: Iterable[str]) -> None:
        """Drop requests; unknown ids are ignored."""
        ...

    def has_work(self) -> bool:
        """Whether there is any reason to call `step`."""
        ...

    def step(self) -> bool:
        """Schedule, run the model, take its output; returns whether the model ran on any token."""
        ...


class Rank:
    """One engine of a data-parallel group, and its loop.

    Args:
        engine: its scheduler says which rank of how many it is.
        post: sends a message to the coordinator: the name of its method, and the wave.
        finish_check_interval: turns of a wave from one reduction to the next, >= 1; the same on all ranks.

    Attributes:
        inbox: messages that the next turn reads, in order.
        current_wave: the one that is running, or that comes next.
        is_in_wave: whether this rank steps even without work of its own.
        num_steps: active turns so far.
        num_dummy_steps: those without a batch of its own.
    """

    def __init__(
        self,
        engine: Engine,
        post: Callable[[str, int], None],
        finish_check_interval: int = FINISH_CHECK_INTERVAL,
    ) -> None:
        check_int("finish_check_interval", finish_check_interval, 1)
        self.engine = engine
        self.post = post
        self.finish_check_interval = finish_check_interval
        self.inbox: deque[Message] = deque()
        self.current_wave = 0
        self.is_in_wave = False
        self.num_steps = 0
        self.num_dummy_steps = 0
        self._step_in_wave = 0

    def turn(self) -> Turn:
        """One turn of the loop; returns whether it was active. An idle one enters no collective."""
        while self.inbox:
            self.inbox.popleft()()
        executed = self.engine.has_work() and self.engine.step()
        has_unfinished = self.engine.scheduler.has_unfinished_requests()
        if not (executed or has_unfinished or self.is_in_wave):
            return False
        yield self._collective(FORWARD, int(not executed))
        self.is_in_wave = yield from self._reduce(has_unfinished)
        rows = yield self._collective(GATHER, *self.engine.scheduler.counts())
        self.engine.scheduler.observe([RankCounts(*row) for row in rows])
        self._end_step(executed)
        return True

    def _reduce(self, has_unfinished: bool) -> Turn:
        """Whether the wave goes on."""
        self._step_in_wave += 1
        if self._step_in_wave % self.finish_check_interval:
            return True
        rows = yield self._collective(HAS_UNFINISHED, int(has_unfinished))
        return any(row[0] for row in rows)

    def _end_step(self, executed: bool) -> None:
        """Count it, and leave the wave if that is over."""
        self.num_steps += 1
        self.num_dummy_steps += not executed
        if not self.is_in_wave:
            if self.engine.scheduler.dp_rank == 0:
                self.post("wave_is_over", self.current_wave)
            self.current_wave += 1
            self._step_in_wave = 0

    def _collective(self, name: str, *row: int) -> Collective:
        return Collective(name, self.num_steps, row)

    def add_request(self, request: Any, wave: int) -> None:
        """A client's request, sent when it took `wave` for the current one."""
        self.engine.add_request(request)
        if wave > self.current_wave:
            self.current_wave = wave
        elif wave < self.current_wave and not self.is_in_wave:
            self.post("start_wave", self.current_wave)  # the client does not know that its wave is over

    def abort(self, request_ids: Iterable[str]) -> None:
        """A client gives up."""
        self.engine.abort(request_ids)

    def set_pause_state(self, state: PauseState) -> None:
        """Pause, or go on: which may be a reason for a wave."""
        scheduler = self.engine.scheduler
        scheduler.set_pause_state(state)
        if not self.is_in_wave and scheduler.has_unfinished_requests():
            self.post("start_wave", self.current_wave)

    def start_wave(self, wave: int) -> None:
        """Some rank has work: step with it. News of a wave that is over already is ignored."""
        if wave >= self.current_wave:
            self.current_wave = wave
            self.is_in_wave = True


class Coordinator:
    """Tells all ranks when a wave starts, and the client when it is over.

    Args:
        tell_ranks: sends all ranks the wave that starts.
        tell_client: sends the client the current wave, and whether it is running.
    """

    def __init__(self, tell_ranks: Callable[[int], None], tell_client: Callable[[int, bool], None]) -> None:
        self.tell_ranks = tell_ranks
        self.tell_client = tell_client
        self.current_wave = 0
        self.is_in_wave = False

    def first_request(self, wave: int) -> None:
        """A client sends a request, and takes all ranks for idle."""
        if not self.is_in_wave:
            self._start(max(wave, self.current_wave))

    def start_wave(self, wave: int) -> None:
        """A rank has work that nobody else knows of."""
        if wave > self.current_wave or (wave == self.current_wave and not self.is_in_wave):
            self._start(wave)

    def wave_is_over(self, wave: int) -> None:
        """Rank 0 says so for all."""
        if wave >= self.current_wave:
            self.current_wave = wave + 1
            self.is_in_wave = False
            self.tell_client(self.current_wave, False)

    def _start(self, wave: int) -> None:
        self.current_wave = wave
        self.is_in_wave = True
        self.tell_ranks(wave)
        self.tell_client(wave, True)


class Lockstep:
    """A data-parallel group in one process: ranks, coordinator, one client, and the mail between them.

    Mail arrives in the order in which it was sent only between the same two; `deliver` and `advance` let a
    caller choose any interleaving, `step` makes all mail arrive and all ranks take one turn.

    Args:
        engines: one a rank, in order; their schedulers say so.
        finish_check_interval: see `Rank`.
        log_size: see `LocalTransport`.

    Attributes:
        ranks, coordinator, transport: what it is made of.
        mail: undelivered messages, oldest first, by (from, to).
        num_steps: steps that all ranks have made together.

    Raises:
        InvalidArgumentError: for no engine, or one whose scheduler is of another rank or size, or has another
            policy or cap than that of rank 0.
        LockstepError: from `step` and `advance`, when ranks enter different collectives, or one waits for
            ranks that are idle and that nothing will wake; after a rank has failed, always that failure.
    """

    def __init__(
        self,
        engines: Sequence[Engine],
        *,
        finish_check_interval: int = FINISH_CHECK_INTERVAL,
        log_size: int | None = 1000,
    ) -> None:
        if not engines:
            invalid_argument("engines", engines, "at least one")
        first = engines[0].scheduler
        for i, engine in enumerate(engines):
            cap, policy = engine.scheduler.admission_cap, engine.scheduler.admission_policy
            if cap != first.admission_cap or policy != first.admission_policy:
                invalid_argument(
                    f"engines[{i}]",
                    f"one with {policy} and max_num_seqs {cap}",
                    f"{first.admission_policy} and {first.admission_cap}, as rank 0: all must decide alike",
                )
            place = (engine.scheduler.dp_rank, engine.scheduler.dp_size)
            if place != (i, len(engines)):
                invalid_argument(
                    f"engines[{i}]", "rank {} of {}".format(*place), f"rank {i} of {len(engines)}"
                )
        self.mail: defaultdict[tuple[int | str, int | str], deque[Message]] = defaultdict(deque)
        self.ranks = [
            Rank(engine, self._mail_of_rank(i), finish_check_interval) for i, engine in enumerate(engines)
        ]
        self.coordinator = Coordinator(self._tell_ranks, self._tell_client)
        self.transport = LocalTransport(len(engines), log_size)
        self.num_steps = 0
        self._failure: LockstepError | None = None
        self._turns: dict[int, Turn] = {}
        self._client_wave = 0
        self._client_knows_wave = False

    # The client

    def add_request(self, rank: int, request: Any) -> None:
        """The client sends a request to a rank, and wakes the others if it takes them for idle."""
        check_int("rank", rank, 0, len(self.ranks) - 1)
        target, wave = self.ranks[rank], self._client_wave
        self._post(CLIENT, rank, lambda: target.add_request(request, wave))
        if not self._client_knows_wave:
            self._client_knows_wave = True
            self._post(CLIENT, COORDINATOR, lambda: self.coordinator.first_request(wave))

    def abort(self, rank: int, request_ids: Iterable[str]) -> None:
        """The client gives up requests of a rank."""
        target, ids = self.ranks[rank], tuple(request_ids)
        self._post(CLIENT, rank, lambda: target.abort(ids))

    def set_pause_state(self, rank: int, state: PauseState) -> None:
        """The client pauses a rank, or lets it go on."""
        target = self.ranks[rank]
        self._post(CLIENT, rank, lambda: target.set_pause_state(state))

    # Mail

    def _post(self, source: int | str, target: int | str, message: Message) -> None:
        self.mail[source, target].append(message)

    def _mail_of_rank(self, rank: int) -> Callable[[str, int], None]:
        return lambda what, wave: self._post(rank, COORDINATOR, lambda: getattr(self.coordinator, what)(wave))

    def _tell_ranks(self, wave: int) -> None:
        for i, rank in enumerate(self.ranks):
            self._post(COORDINATOR, i, lambda rank=rank: rank.start_wave(wave))

    def _tell_client(self, wave: int, is_in_wave: bool) -> None:
        def tell() -> None:
            self._client_wave = wave
            self._client_knows_wave = is_in_wave

        self._post(COORDINATOR, CLIENT, tell)

    def undelivered(self) -> list[tuple[int | str, int | str]]:
        """Between whom mail is under way."""
        return [between for between, messages in self.mail.items() if messages]

    def deliver(self, source: int | str, target: int | str) -> None:
        """The oldest message between two arrives; a rank reads it in its next turn."""
        message = self.mail[source, target].popleft()
        if isinstance(target, int):
            self.ranks[target].inbox.append(message)
        else:
            message()

    def deliver_all(self) -> None:
        """Everything arrives, and what is sent because of it."""
        while between := self.undelivered():
            for source, target in between:
                self.deliver(source, target)

    # Steps

    def advance(self, rank: int) -> None:
        """Let a rank run until it waits for the others, or its turn is over."""
        if self._failure:
            raise self._failure
        if rank not in self.transport.waiting:
            self._resume(rank, None)
        while rows := self.transport.take_complete():
            for i in range(len(self.ranks)):
                self._resume(i, rows)
            self.num_steps += not self.transport.waiting

    def _resume(self, rank: int, rows: Any) -> None:
        turn = self._turns.setdefault(rank, self.ranks[rank].turn())
        try:
            self.transport.enter(rank, turn.send(rows))
        except StopIteration:
            del self._turns[rank]
        except Exception as error:
            place = f"rank {rank} failed at step {self.ranks[rank].num_steps}"
            self._failure = LockstepError(f"{place}: {type(error).__name__}: {error}")
            raise self._failure from error

    def step(self) -> bool:
        """All mail arrives, and all ranks make one step together; False when all are idle."""
        num_steps = self.num_steps
        while self.num_steps == num_steps:
            self.deliver_all()
            for rank in range(len(self.ranks)):
                if self.num_steps == num_steps:
                    self.advance(rank)
            if self.num_steps == num_steps and not self.undelivered():
                self.refuse_stall()
                return False
        return True

    def refuse_stall(self) -> None:
        """Raise LockstepError if ranks wait for one that is idle and that no mail will wake."""
        idle = set(range(len(self.ranks))) - set(self.transport.waiting)
        if not self.undelivered() and not any(self.ranks[rank].inbox for rank in idle):
            self.transport.refuse_stall(idle)
