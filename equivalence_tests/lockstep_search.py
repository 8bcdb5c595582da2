"""Every order in which anything can happen to a small data-parallel group, until nothing can happen any more.

The client acts a few times: it adds, aborts, pauses, lets go on. Everything else is mail and turns, which may
interleave in any way. The states that can be reached are finitely many; each is visited once, breadth first,
so that the history of what goes wrong is a shortest one.

A rank reads its mail only as its turn begins, and the client only as it acts, so mail is read and used in one
event. That leaves out no behaviour, only most of the orders that make no difference.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from graphlib import CycleError, TopologicalSorter
from itertools import chain
from typing import Any, NamedTuple

from ..reference.errors import AscendTwinError
from ..scheduler.admission import AnyRankAtCap
from ..scheduler.balance import BalanceScheduler
from ..scheduler.config import SchedulerConfig
from ..scheduler.lifecycle import PauseState
from ..scheduler.lockstep import CLIENT, COORDINATOR, Lockstep, Message
from .lockstep_engines import TinyEngine
from .lockstep_runs import ProtocolError, settle

PAUSES = {
    "unpause": PauseState.UNPAUSED,
    "pause new": PauseState.PAUSED_NEW,
    "pause": PauseState.PAUSED_ALL,
}
ACTS = ("add", "abort", *PAUSES)
"""What the client can do to a rank; an abort is of the last request that the rank was sent."""

MAX_TOKENS = 2, 1
"""What the first, the second request asks for, and so on in turns."""

MOST_STEPS = 60
"""More than such a group needs to come to rest."""


class Event(NamedTuple):
    """Something that happens.

    Attributes:
        what: one of ACTS; "read": the coordinator reads a message; "turn": a rank runs until it waits for the
            others, or its turn is over.
        where: the rank; with "read", whom the message is from.
        mail: what is read just before: by the client, or by the rank, from whom, in this order.
    """

    what: str
    where: Any
    mail: tuple[int | str, ...] = ()

    @property
    def party(self) -> int | str:
        """Who does it."""
        if self.what == "turn":
            return self.where
        return COORDINATOR if self.what == "read" else CLIENT

    def __str__(self) -> str:
        if self.what == "read":
            return f"coordinator reads from {_name(self.where)}"
        reads = f" reads from {', '.join(map(_name, self.mail))}, then" if self.mail else ""
        if self.what == "turn":
            return f"rank {self.where}{reads} takes its turn"
        return f"client{reads} sends to rank {self.where}: {self.what}"


def _name(who: int | str) -> str:
    return f"rank {who}" if isinstance(who, int) else who


@dataclass(frozen=True)
class World:
    """A group, and what its client may do.

    Attributes:
        num_acts: of the client, at most.
        acts: which, of ACTS.
        dp_size: ranks.
        cap: requests that may run on one rank; the policy is any_rank_at_cap.
        interval: turns of a wave from one reduction to the next.
        group_type: `Lockstep`, or what is to be found wrong.
    """

    num_acts: int
    acts: tuple[str, ...] = ACTS
    dp_size: int = 2
    cap: int = 1
    interval: int = 2
    group_type: Callable[..., Lockstep] = Lockstep

    @cached_property
    def config(self) -> SchedulerConfig:
        """Of each rank; no request has to wait for room in the cache."""
        return SchedulerConfig(
            num_blocks=8,
            block_size=4,
            max_num_seqs=self.cap,
            max_num_batched_tokens=8,
            max_model_len=8,
            enable_prefix_caching=False,
            log_stats=False,
        )


@dataclass
class Search:
    """What there was, and the first thing found wrong.

    Attributes:
        num_states, num_transitions: visited.
        depth: events of the longest of the shortest histories to each state.
        num_rests: states in which nothing can happen any more unless the client acts.
        problem: what is wrong, or "".
        history: how to get there, a shortest one.
    """

    num_states: int = 0
    num_transitions: int = 0
    depth: int = 0
    num_rests: int = 0
    problem: str = ""
    history: tuple[Event, ...] = ()


class SmallGroup:
    """A group of tiny engines to which one event after the other happens."""

    def __init__(self, world: World, history: Sequence[Event] = ()) -> None:
        self.world = world
        policy = AnyRankAtCap(world.cap)
        self.engines = [
            TinyEngine(BalanceScheduler(world.config, policy=policy, dp_rank=rank, dp_size=world.dp_size))
            for rank in range(world.dp_size)
        ]
        self.group = world.group_type(self.engines, finish_check_interval=world.interval, log_size=1)
        self.num_acts = 0
        self.sent: list[list[str]] = [[] for _ in self.engines]
        self.aborted: set[str] = set()
        self.pauses = ["unpause"] * world.dp_size
        for event in history:
            self.apply(event)

    def acts(self) -> Iterator[Event]:
        """What the client can do, having read any number of its messages."""
        if self.num_acts == self.world.num_acts:
            return
        for num_read in range(len(self.group.mail[COORDINATOR, CLIENT]) + 1):
            for rank in range(self.world.dp_size):
                for act in self.world.acts:
                    if self._can(act, rank):
                        yield Event(act, rank, (COORDINATOR,) * num_read)

    def _can(self, act: str, rank: int) -> bool:
        if act == "abort":
            return bool(self.sent[rank]) and self.sent[rank][-1] not in self.aborted
        return act != self.pauses[rank]

    def moves(self) -> Iterator[Event]:
        """What can happen by itself."""
        mail = self.group.mail
        for source in (CLIENT, *range(self.world.dp_size)):
            if mail[source, COORDINATOR]:
                yield Event("read", source)
        for i, rank in enumerate(self.group.ranks):
            if i not in self.group.transport.waiting:
                is_awake = rank.is_in_wave or rank.engine.has_work()
                for sources in _interleavings(len(mail[CLIENT, i]), len(mail[COORDINATOR, i])):
                    if sources or is_awake:
                        yield Event("turn", i, sources)

    def apply(self, event: Event) -> None:
        """Let it happen.

        Raises:
            LockstepError: when ranks enter different collectives.
        """
        what, where, mail = event
        if what == "read":
            self.group.deliver(where, COORDINATOR)
            return
        for source in mail:
            self.group.deliver(source, where if what == "turn" else CLIENT)
        if what == "turn":
            self.group.advance(where)
        else:
            self._act(what, where)

    def _act(self, what: str, rank: int) -> None:
        request_id = f"r{self.num_acts}"
        self.num_acts += 1
        if what == "add":
            self.sent[rank].append(request_id)
            self.group.add_request(rank, (request_id, MAX_TOKENS[self.num_acts % len(MAX_TOKENS)]))
        elif what == "abort":
            self.aborted.add(self.sent[rank][-1])
            self.group.abort(rank, self.sent[rank][-1:])
        else:
            self.pauses[rank] = what
            self.group.set_pause_state(rank, PAUSES[what])

    def check_rest(self) -> None:
        """Nothing can happen any more: nobody waits for ever, and all are served whom no pause holds up.

        Raises:
            LockstepError, ProtocolError: when that is not so, or is not after all pauses have ended.
        """
        self.group.deliver_all()  # to the client, which is in no hurry
        self.group.refuse_stall()
        self._check_served(rank for rank, pause in enumerate(self.pauses) if pause == "unpause")
        for rank in range(self.world.dp_size):
            self.group.set_pause_state(rank, PauseState.UNPAUSED)
        settle(self.group, MOST_STEPS)
        self._check_served(range(self.world.dp_size))

    def _check_served(self, ranks: Any) -> None:
        for rank in ranks:
            if unserved := set(self.sent[rank]) - self.aborted - set(self.engines[rank].finished):
                raise ProtocolError(f"all are idle, and rank {rank} has not served {sorted(unserved)}")

    def _requests(self) -> list[str]:
        """All that are on their way or in a scheduler, the oldest first."""
        messages = [_content(m)[1] for to, mail in self.group.mail.items() if to[1] != CLIENT for m in mail]
        sent = {values["request"][0] for values in messages if "request" in values}
        return sorted(sent.union(*(engine.scheduler.requests for engine in self.engines)))

    def key(self) -> str:
        """The same for two groups exactly when no future tells them apart.

        Waves are counted from the oldest that anybody knows, requests from the oldest that is alive; what the
        client knows matters for as long as it may act.

        Raises:
            ProtocolError: when a request that was not served is neither on its way nor in a scheduler.
        """
        alive = self._requests()
        served = self.aborted.union(*(engine.finished for engine in self.engines))
        if lost := set(chain.from_iterable(self.sent)) - served - set(alive):
            raise ProtocolError(f"nobody has {sorted(lost)} any more")
        group, can_act = self.group, self.num_acts < self.world.num_acts
        mail = {
            between: [_content(message) for message in messages]
            for between, messages in group.mail.items()
            if messages and (can_act or between[1] != CLIENT)
        }
        waves = [group.coordinator.current_wave, *(rank.current_wave for rank in group.ranks)]
        waves += [group._client_wave] * can_act
        waves += [v["wave"] for messages in mail.values() for _, v in messages if "wave" in v]
        names = _Names(min(waves), {r: i for i, r in enumerate(alive)})
        client = None
        if can_act:
            last = [(names.requests.get(s[-1]), s[-1] in self.aborted) if s else None for s in self.sent]
            client = (self.num_acts, group._client_wave - names.wave, group._client_knows_wave, last)
        return repr(
            (
                client,
                self.pauses,
                sorted((str(k), [names.of_message(m) for m in messages]) for k, messages in mail.items()),
                (group.coordinator.current_wave - names.wave, group.coordinator.is_in_wave),
                [self._rank_key(rank, names) for rank in range(self.world.dp_size)],
            )
        )

    def _rank_key(self, i: int, names: "_Names") -> Any:
        rank, scheduler = self.group.ranks[i], self.engines[i].scheduler
        entered = self.group.transport.waiting.get(i)
        queues = scheduler.running, scheduler.waiting
        return (
            rank.current_wave - names.wave,
            rank.is_in_wave,
            rank._step_in_wave % rank.finish_check_interval,
            rank.num_steps - self.group.ranks[0].num_steps,
            entered and (entered.name, entered.row[0]),
            scheduler.is_open,
            scheduler.has_finished_requests(),
            [
                [
                    (names.requests[r.request_id], r.num_computed_tokens, r.max_tokens - r.num_output_tokens)
                    for r in queue
                ]
                for queue in queues
            ],
        )


class _Names(NamedTuple):
    """What waves are counted from, and the number of each request that is alive."""

    wave: int
    requests: dict[str, int]

    def of_message(self, message: tuple[str, dict[str, Any]]) -> tuple[str, dict[str, Any]]:
        what, values = message
        return what, {name: self._of_value(name, value) for name, value in values.items()}

    def _of_value(self, name: str, value: Any) -> Any:
        if name == "wave":
            return value - self.wave
        if name == "request":
            return self.requests[value[0]], value[1]
        return [self.requests.get(request_id) for request_id in value] if name == "ids" else value


def _content(message: Message) -> tuple[str, dict[str, Any]]:
    """What a message does, and the plain values that it carries."""
    cells = zip(message.__code__.co_freevars, message.__closure__ or (), strict=True)
    values = {name: cell.cell_contents for name, cell in cells}
    return message.__qualname__, {n: x for n, x in values.items() if isinstance(x, int | str | tuple)}


def _interleavings(num_client: int, num_coordinator: int) -> Iterator[tuple[str, ...]]:
    """All orders in which some of the mail of a rank can be read."""
    yield ()
    if num_client:
        yield from ((CLIENT, *rest) for rest in _interleavings(num_client - 1, num_coordinator))
    if num_coordinator:
        yield from ((COORDINATOR, *rest) for rest in _interleavings(num_client, num_coordinator - 1))


@dataclass
class _State:
    """A state that was reached.

    Attributes:
        number: in order of appearance.
        history: a shortest one.
        before: the state before the last event of `history`.
        acts, moves: what can happen.
        after: the number of the state that each of them leads to, once that is known.
    """

    number: int
    history: tuple[Event, ...]
    before: "_State | None"
    acts: tuple[Event, ...]
    moves: tuple[Event, ...]
    after: dict[Event, int] = field(default_factory=dict)


def search(world: World) -> Search:
    """Visit all states that can be reached, or stop at the first thing that is wrong."""
    return _Searching(world).run()


class _Searching:
    """A search under way."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.found = Search()
        self.states: list[_State] = []
        self.numbers: dict[str, int] = {}

    def run(self) -> Search:
        found = self.found
        try:
            self._reach((), None, SmallGroup(self.world))
            for state in self.states:  # which grows
                self._expand(state)
        except AscendTwinError as error:
            found.problem = f"{type(error).__name__}: {error}"
            return found
        found.history = ()
        found.num_states, found.depth = len(self.states), len(self.states[-1].history)
        found.num_transitions = sum(len(state.after) for state in self.states)
        found.problem = self._livelock()
        return found

    def _expand(self, state: _State) -> None:
        """Let each thing happen that can."""
        self.found.history = state.history
        if not state.moves:
            self.found.num_rests += 1
            SmallGroup(self.world, state.history).check_rest()
        for event in (*state.acts, *state.moves):
            number = self._known(state, event)
            if number is None:
                self.found.history = (*state.history, event)
                group = SmallGroup(self.world, state.history)
                group.apply(event)
                number = self._reach(self.found.history, state, group)
            state.after[event] = number

    def _known(self, state: _State, event: Event) -> int | None:
        """Where an event leads that could have happened before the last one: to where the two lead then.

        What two parties do (ranks, coordinator, client) comes to the same in either order: they share nothing
        but mail, which one takes from the front and the other adds to at the end. Only the rank that enters a
        collective as the last does more, and then no other can have a turn.
        """
        if state.before is None or event.party == state.history[-1].party:
            return None
        sibling = state.before.after.get(event)
        return None if sibling is None else self.states[sibling].after.get(state.history[-1])

    def _reach(self, history: tuple[Event, ...], before: _State | None, group: SmallGroup) -> int:
        """The number of the state that a group is in."""
        key = group.key()
        if key not in self.numbers:
            number = self.numbers[key] = len(self.states)
            self.states.append(_State(number, history, before, tuple(group.acts()), tuple(group.moves())))
        return self.numbers[key]

    def _livelock(self) -> str:
        """Whether anything can go on for ever: the client acts a few times only, so nothing should."""
        try:
            TopologicalSorter({state.number: state.after.values() for state in self.states}).prepare()
        except CycleError as error:
            return f"{len(error.args[1]) - 1} states lead into one another for ever"
        return ""
