"""A data-parallel group of real processes, one a rank, with coordinator and client in the process that asks.

The very `Rank` and `Coordinator` of scheduler/lockstep.py; mail goes through pipes, collectives through
`ProcessGroupTransport`. An idle rank sleeps until there is mail for it.
"""

import os
import signal
import sys
import time
import traceback
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
import torch.distributed as dist

from ..scheduler.collectives import FORWARD, GATHER, Collective, Turn
from ..scheduler.lockstep import Coordinator, Engine, Rank
from ..scheduler.process_group import ProcessGroupTransport, report_end
from .lockstep_runs import LockstepEngine
from .paged_model import OutputOracle
from .scheduler_strategies import Setup

HOST = "127.0.0.1"
GRACE_S = 8.0  # beyond the timeout of the group, until a process that does not end is killed
LATE_S = 1.5
RUN_LIMIT_S = 120.0  # of a whole run
STOP = "stop"

Mail = tuple[str, tuple[Any, ...]]
"""A method of `Rank`, and its arguments."""


@dataclass(frozen=True)
class Order:
    """Something that the client does.

    Attributes:
        rank: to which.
        action: "add_request", "abort" or "set_pause_state", of `Rank`.
        argument: of that method; the wave is added.
        step: steps of the group since its last wave's orders began; when all ranks are idle before, then.
    """

    rank: int
    action: str
    argument: Any
    step: int = 0


@dataclass(frozen=True)
class Fault:
    """What goes wrong on one rank, at one place.

    Attributes:
        kind: "kill", "raise", "exit", "stall", before the collective is entered; "late", it is entered
            `LATE_S` later; "kill inside", after the rank said that it is there; "swap", a gather is entered
            instead; "skip", the next step's is. Whatever the place: "deaf", the rank never hears that a wave
            starts; "absent", it never joins.
        before, step: name and step of the collective.
    """

    kind: str
    before: str = FORWARD
    step: int = 0


@dataclass(frozen=True)
class GroupPlan:
    """A group, and what happens to it.

    Attributes:
        setup, policy: of each rank; see `LockstepEngine`.
        dp_size: number of ranks.
        waves: orders of the client; the next ones follow when all ranks are idle.
        timeout_s: see `ProcessGroupTransport`.
        faults: by rank.
        is_supervised: whether the launcher tells the others that a process is gone.
    """

    setup: Setup
    policy: str
    dp_size: int
    waves: Sequence[Sequence[Order]]
    timeout_s: float = 30.0
    faults: Mapping[int, Fault] = field(default_factory=dict)
    is_supervised: bool = True


@dataclass(frozen=True)
class RankReport:
    """What a rank says of itself in the end.

    Attributes:
        said: output tokens of its requests, by id.
        log: all collectives that it entered.
        num_all_gathers: of torch.distributed, in all.
        num_steps, num_dummy_steps: see `Rank`.
        num_waves: that are over.
    """

    said: dict[str, list[int]]
    log: tuple[Collective, ...]
    num_all_gathers: int
    num_steps: int
    num_dummy_steps: int
    num_waves: int


@dataclass
class Outcome:
    """How a process ended.

    Attributes:
        report: None unless its rank was told to stop, and did.
        error: "" or its type and message.
        trace: of the error.
        pid: of the process.
        exit_code: of the process; minus the number of the signal that killed it.
        is_stuck: whether the launcher had to kill it.
    """

    report: RankReport | None = None
    error: str = ""
    trace: str = ""
    pid: int = 0
    exit_code: int | None = None
    is_stuck: bool = False


def host_store() -> Any:
    """A store on a free port, for as long as somebody refers to it."""
    return dist.TCPStore(HOST, 0, is_master=True, wait_for_workers=False)  # pyright: ignore[reportPrivateImportUsage]


def join_store(port: int) -> Any:
    """A connection to it."""
    return dist.TCPStore(HOST, port, is_master=False, wait_for_workers=False)  # pyright: ignore[reportPrivateImportUsage]


# In the process of a rank


class FaultyRank(Rank):
    """A rank with a fault."""

    def __init__(self, engine: Engine, post: Callable[[str, int], None], fault: Fault) -> None:
        if fault.kind == "absent":
            sys.exit(3)
        super().__init__(engine, post)
        self.fault = fault

    def turn(self) -> Turn:
        turn, rows = super().turn(), None
        while True:
            try:
                collective = turn.send(rows)  # type: ignore[arg-type]
            except StopIteration as end:
                return end.value
            if (collective.name, collective.step) == (self.fault.before, self.fault.step):
                collective = self._fail(collective)
            rows = yield collective

    def start_wave(self, wave: int) -> None:
        if self.fault.kind != "deaf":
            super().start_wave(wave)

    def _fail(self, collective: Collective) -> Collective:
        kind = self.fault.kind
        if kind == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        elif kind == "raise":
            raise ValueError("a fault of the engine")
        elif kind == "exit":
            sys.exit(3)
        elif kind == "stall":
            time.sleep(RUN_LIMIT_S)
        elif kind == "late":
            time.sleep(LATE_S)
        elif kind == "kill inside":
            dist.all_gather = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
        elif kind == "swap":
            return Collective(GATHER, collective.step, tuple(self.engine.scheduler.counts()))
        elif kind == "skip":
            return collective._replace(step=collective.step + 1)
        return collective


def _main(plan: GroupPlan, index: int, port: int, connection: Connection) -> None:
    """The process of a rank, from its start to its end."""
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    try:
        connection.send(("report", _serve(plan, index, port, connection)))
    except BaseException as error:
        connection.send(("error", f"{type(error).__name__}: {error}", traceback.format_exc()))
        sys.exit(1)


def _serve(plan: GroupPlan, index: int, port: int, connection: Connection) -> RankReport:
    """Turn after turn, until told to stop."""
    oracle = OutputOracle(plan.setup.config)
    engine = LockstepEngine(plan.setup, plan.policy, index, plan.dp_size, oracle)
    rank = _make_rank(engine, plan.faults.get(index), connection)
    all_gathers = _note_all_gathers()
    with ProcessGroupTransport(
        join_store(port), index, plan.dp_size, timeout_s=plan.timeout_s, log_size=None
    ) as transport:
        num_read, is_active = 0, False
        while (mail := _read_mail(connection, is_blocking=not is_active)) is not None:
            rank.inbox.extend(partial(getattr(rank, name), *arguments) for name, arguments in mail)
            is_active = transport.carry(rank.turn())
            num_read += len(mail)
            connection.send(("state", num_read, rank.num_steps, is_active))
        return RankReport(
            said={name: said[0] for name, said in oracle.said.items()},
            log=tuple(transport.log),
            num_all_gathers=len(all_gathers),
            num_steps=rank.num_steps,
            num_dummy_steps=rank.num_dummy_steps,
            num_waves=rank.current_wave,
        )


def _note_all_gathers() -> list[None]:
    """Grows by one with every all_gather of torch.distributed in this process."""
    made: list[None] = []
    all_gather = dist.all_gather

    def noting(*arguments: Any) -> Any:
        made.append(None)
        return all_gather(*arguments)

    dist.all_gather = noting
    return made


def _make_rank(engine: Engine, fault: Fault | None, connection: Connection) -> Rank:
    def post(what: str, wave: int) -> None:
        connection.send(("post", what, wave))

    return FaultyRank(engine, post, fault) if fault else Rank(engine, post)


def _read_mail(connection: Connection, *, is_blocking: bool) -> list[Mail] | None:
    """All mail that is there, and at least one if `is_blocking`; None when it is time to stop."""
    mail: list[Mail] = []
    while connection.poll(None if is_blocking and not mail else 0):
        message = connection.recv()
        if message == STOP:
            return None
        mail.append(message)
    return mail


# In the process of the launcher


@dataclass
class _Process:
    """A rank's process as the launcher knows it.

    `num_sent` and `num_read` are mail to it; `is_active` is its last turn, which was after that mail.
    """

    process: Any
    connection: Connection
    outcome: Outcome = field(default_factory=Outcome)
    num_sent: int = 0
    num_read: int = 0
    num_steps: int = 0
    is_active: bool = False
    has_ended: bool = False

    @property
    def is_idle(self) -> bool:
        return not self.is_active and self.num_read == self.num_sent


class _Launcher:
    """Client and coordinator, and who starts and ends the processes."""

    def __init__(self, plan: GroupPlan) -> None:
        self.plan = plan
        self.store = host_store()
        self.coordinator = Coordinator(self._tell_ranks, self._tell_client)
        self.waves = deque(plan.waves)
        self.orders: deque[Order] = deque()  # of the wave that is played
        self.first_step = 0  # of that wave
        self.client_wave = 0
        self.client_knows_wave = False
        self.has_failed = False
        self.give_up_at = time.monotonic() + RUN_LIMIT_S
        self.processes: list[_Process] = []

    def run(self) -> list[Outcome]:
        """Play all waves, or as far as it goes, and end all processes."""
        try:
            for index in range(self.plan.dp_size):
                self.processes.append(self._start(index))
            while not self._is_over():
                self._send_due_orders()
                self._read_mail()
            self._end_all()
        finally:
            for rank in self.processes:
                rank.process.kill()
                rank.process.join()
                rank.process.close()
                rank.connection.close()
        return [rank.outcome for rank in self.processes]

    def _start(self, index: int) -> _Process:
        context = get_context("forkserver")
        context.set_forkserver_preload([__name__])  # torch is imported once, not in each process
        ours, theirs = context.Pipe()
        process = context.Process(target=_main, args=(self.plan, index, self.store.port, theirs), daemon=True)
        process.start()
        theirs.close()  # so that the end of the process is the end of the pipe
        return _Process(process, ours, Outcome(pid=process.pid or 0))

    def _living(self) -> list[_Process]:
        return [rank for rank in self.processes if not rank.has_ended]

    def _is_over(self) -> bool:
        """Whether everything is done, or nothing more will come of it."""
        if time.monotonic() > self.give_up_at:
            return True
        has_orders = bool(self.orders or self.waves) and not self.has_failed
        return not has_orders and all(rank.is_idle for rank in self._living())

    def _end_all(self) -> None:
        """Idle ranks are told to stop; the others had their time."""
        for rank in self._living():
            if rank.is_idle:
                _send(rank, STOP)
            else:
                self._kill(rank)
        self.give_up_at = time.monotonic() + GRACE_S
        while self._living() and time.monotonic() < self.give_up_at:
            self._read_mail()

    # The client

    def _send_due_orders(self) -> None:
        if self.has_failed:
            return
        all_idle = all(rank.is_idle for rank in self.processes)
        num_steps = max(rank.num_steps for rank in self.processes)
        if all_idle and not self.orders and self.waves:
            self.orders = deque(sorted(self.waves.popleft(), key=lambda order: order.step))
            self.first_step = num_steps
        due = num_steps - self.first_step
        if all_idle and self.orders:
            due = max(due, self.orders[0].step)
        while self.orders and self.orders[0].step <= due:
            self._send_order(self.orders.popleft())

    def _send_order(self, order: Order) -> None:
        """As the client of scheduler/lockstep.py: with a request, the coordinator may have to be woken."""
        is_request = order.action == "add_request"
        self._tell(order.rank, order.action, order.argument, *([self.client_wave] if is_request else []))
        if is_request and not self.client_knows_wave:
            self.client_knows_wave = True
            self.coordinator.first_request(self.client_wave)

    def _tell_client(self, wave: int, is_in_wave: bool) -> None:
        self.client_wave, self.client_knows_wave = wave, is_in_wave

    def _tell_ranks(self, wave: int) -> None:
        for rank in range(self.plan.dp_size):
            self._tell(rank, "start_wave", wave)

    def _tell(self, rank: int, name: str, *arguments: Any) -> None:
        _send(self.processes[rank], (name, arguments))
        self.processes[rank].num_sent += 1

    # What comes from the ranks

    def _read_mail(self) -> None:
        """Whatever arrives next; after a second of silence nothing."""
        by_connection = {rank.connection: i for i, rank in enumerate(self.processes) if not rank.has_ended}
        for connection in wait(list(by_connection), timeout=1.0):
            index = by_connection[connection]  # type: ignore[index]
            try:
                name, *arguments = connection.recv()  # type: ignore[union-attr]
            except (EOFError, ConnectionResetError):
                self._take_end(index)
                continue
            getattr(self, f"_take_{name}")(index, *arguments)

    def _take_post(self, index: int, what: str, wave: int) -> None:
        getattr(self.coordinator, what)(wave)

    def _take_state(self, index: int, num_read: int, num_steps: int, is_active: bool) -> None:
        rank = self.processes[index]
        rank.num_read, rank.num_steps, rank.is_active = num_read, num_steps, is_active

    def _take_report(self, index: int, report: RankReport) -> None:
        self.processes[index].outcome.report = report

    def _take_error(self, index: int, error: str, trace: str) -> None:
        outcome = self.processes[index].outcome
        outcome.error, outcome.trace = error, trace

    def _take_end(self, index: int) -> None:
        """A process is gone: tell those who wait for it, and give them their time to say so."""
        rank = self.processes[index]
        rank.process.join(GRACE_S)
        if rank.process.is_alive():
            self._kill(rank)
        rank.has_ended = True
        rank.outcome.exit_code = rank.process.exitcode
        if not rank.outcome.report and not self.has_failed:
            self.has_failed = True
            self.give_up_at = min(self.give_up_at, time.monotonic() + self.plan.timeout_s + GRACE_S)
        if self.plan.is_supervised:
            report_end(self.store, index, f"exit code {rank.process.exitcode}")

    def _kill(self, rank: _Process) -> None:
        rank.outcome.is_stuck = True
        rank.process.kill()
        rank.process.join()


def _send(rank: _Process, message: Any) -> None:
    """Into a pipe; that its other end is gone is seen where it is read."""
    with suppress(OSError):
        rank.connection.send(message)


def run_processes(plan: GroupPlan) -> list[Outcome]:
    """Run a group; whatever happens to it, no process is left.

    Returns:
        how each rank ended, in their order.
    """
    return _Launcher(plan).run()
