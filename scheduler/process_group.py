"""The collectives of data-parallel ranks over `torch.distributed`, one process a rank.

Each is one all_gather of a row of int64: which collective of which step it is, and what the rank contributes.
So ranks that entered different ones see it there and then, in numbers that all of them have.

A rank that does not come cannot be seen that way. So each says in a store where it is before it enters, which
costs it one message that nobody answers; all waiting has an end; and who waited in vain reads who is missing,
and where it was last.
"""

import json
import time
from collections import deque
from collections.abc import Mapping
from contextlib import suppress
from datetime import timedelta
from traceback import clear_frames
from types import TracebackType
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from ..reference.errors import LockstepError, UnavailableError, invalid_argument
from .admission import RankCounts
from .checks import check_int, check_positive
from .collectives import FORWARD, GATHER, HAS_UNFINISHED, Collective, Row, Turn, refuse_mismatch

BACKENDS = {"gloo": "cpu", "hccl": "npu"}
"""Each backend, and the kind of device that its tensors are on."""

_NAMES = (FORWARD, HAS_UNFINISHED, GATHER)
_HEADER = 3  # index of the name, step, length of the row
_WIDTH = _HEADER + len(RankCounts._fields)  # no collective contributes more
_GRACE_S = 1.0  # for others to say, once this rank has given up, that they are there
_POLL_S = 0.02


def _place_key(rank: int) -> str:
    return f"lockstep/place/{rank}"


def _end_key(rank: int) -> str:
    return f"lockstep/end/{rank}"


def report_end(store: Any, rank: int, reason: str) -> None:
    """Say that a rank is gone, so that nobody waits for it until the timeout; the first to say so is heard.

    For whoever supervises the processes: a rank that is killed cannot say it.
    """
    store.compare_set(_end_key(rank), "", reason)


class _Place(NamedTuple):
    """What the store knows of a rank: collectives entered, where that is, what went wrong there, its end."""

    num_entered: int = -1
    where: str = ""
    trouble: str = ""
    end: str = ""

    @property
    def is_culprit(self) -> bool:
        """Whether it is gone, and not because it waited in vain itself."""
        return bool(self.end) and not self.trouble

    def __str__(self) -> str:
        seen = f"last seen in {self.where}" if self.where else "never seen"
        return seen + (f", ended: {self.end}" if self.end else "")


class ProcessGroupTransport:
    """One rank's way to the others, in its own process: carries its turns, and refuses to wait for ever.

    To be used in a `with` statement: leaving it tells the others that this rank is gone, and why.

    Args:
        store: for this group alone; all ranks share it, each by a connection of its own, none of them
            hosts it: it outlives each (`torch.distributed.TCPStore`). Its timeout becomes `timeout_s`.
        rank, size: which of how many ranks this is.
        timeout_s: how long a rank waits for the others, in one collective and to join; s, > 0. It must be
            longer than the slowest step is longer than the fastest.
        backend: "gloo", or "hccl" (needs torch-npu, and was never run on an NPU by us).
        device: of the tensors that travel: a CPU for gloo, an NPU for hccl.
        log_size: collectives kept, the newest; None keeps all.

    Attributes:
        log: the collectives that this rank entered.
        num_entered: how many they were; each was one all_gather.

    Raises:
        InvalidArgumentError: for arguments that are not as above.
        UnavailableError: when torch has no such backend here, or this process has a default group already.
        LockstepError: when not all ranks join in time; as in `exchange`, nothing can be carried after that.
    """

    def __init__(
        self,
        store: Any,
        rank: int,
        size: int,
        *,
        timeout_s: float = 60.0,
        backend: str = "gloo",
        device: str | torch.device = "cpu",
        log_size: int | None = 1000,
    ) -> None:
        check_int("size", size, 1)
        check_int("rank", rank, 0, size - 1)
        check_positive("timeout_s", timeout_s)
        _check_backend(backend, device)
        if store.check([_end_key(rank)]):
            invalid_argument("store", store, f"one of this group alone; a rank {rank} left it before")
        self.rank = rank
        self.size = size
        self.timeout_s = timeout_s
        self.log: deque[Collective] = deque(maxlen=log_size)
        self.num_entered = 0
        self._is_idle = False
        self._store = store
        self._store.set_timeout(timedelta(seconds=timeout_s))
        self._sent = torch.zeros(_WIDTH, dtype=torch.int64, device=device)
        self._received = [torch.zeros_like(self._sent) for _ in range(size)]
        self._join(backend)

    def __enter__(self) -> "ProcessGroupTransport":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close("left" if kind is None else f"{kind.__name__}: {error}")

    def close(self, reason: str = "left") -> None:
        """Leave the group; whoever waits for this rank is told why it does not come."""
        with suppress(RuntimeError):  # with the store, those are gone who could read it
            report_end(self._store, self.rank, reason)
        _leave_group()

    # Turns and collectives

    def carry(self, turn: Turn) -> bool:
        """Run a turn of a rank's loop to its end; returns whether it was active.

        Raises:
            LockstepError: see `exchange`.
        """
        rows: tuple[Row, ...] | None = None
        while True:
            try:
                collective = turn.send(rows)  # type: ignore[arg-type]
            except StopIteration as end:
                is_active: bool = end.value
                break
            rows = self.exchange(collective)
        if not is_active:
            self._say_idle()
        return is_active

    def exchange(self, collective: Collective) -> tuple[Row, ...]:
        """What all ranks contribute to a collective, in their order.

        Raises:
            InvalidArgumentError: for an unknown name, or a row that is too long.
            LockstepError: when they entered different ones, or some rank does not come; the message says who,
                where it was last, and where this rank waits.
        """
        self._sent.copy_(torch.tensor(_encode(collective)))
        self.log.append(collective)
        self.num_entered += 1
        self._is_idle = False
        where, deadline = str(collective), time.monotonic() + self.timeout_s
        try:
            self._say(where)
            dist.all_gather(self._received, self._sent)
            rows = torch.stack(self._received).tolist()
        except RuntimeError as error:
            raise LockstepError(self._explain(where, deadline, error)) from error
        entered = {rank: _decode(row) for rank, row in enumerate(rows)}
        try:
            refuse_mismatch(entered)
        except LockstepError as error:
            with suppress(RuntimeError):
                self._say(where, str(error))
            raise
        return tuple(entered[rank].row for rank in range(self.size))

    # Who is where

    def _join(self, backend: str) -> None:
        where, deadline = "joining", time.monotonic() + self.timeout_s
        try:
            self._say(where)
            dist.init_process_group(
                backend,
                store=self._store,
                rank=self.rank,
                world_size=self.size,
                timeout=timedelta(seconds=self.timeout_s),
            )
        except RuntimeError as error:
            raise LockstepError(self._explain(where, deadline, error)) from error

    def _say(self, where: str, trouble: str = "") -> None:
        """Tell the others where this rank is, should they ask."""
        self._store.set(_place_key(self.rank), json.dumps([self.num_entered, where, trouble]))

    def _say_idle(self) -> None:
        if not self._is_idle:
            self._is_idle = True
            with suppress(RuntimeError):  # a store that is gone matters when somebody waits
                self._say(f"{self.log[-1]}, idle since" if self.log else "joining, idle since")

    def _explain(self, where: str, deadline: float, error: Exception) -> str:
        """Why a collective was not completed: by whom it was not, as soon as that is known."""
        try:
            self._say(where, str(error))
            # So that those who wait for this rank stop, and say that they are there. Its sockets stay open
            # while a frame of the error refers to the group.
            clear_frames(error.__traceback__)
            _leave_group()
            # A rank that came late is told of the failure now, not when its own time is over.
            deadline = max(deadline, time.monotonic() + _GRACE_S)
            places = self._read_places()
            while not self._is_explained(places) and time.monotonic() < deadline:
                time.sleep(_POLL_S)
                places = self._read_places()
        except RuntimeError:
            return f"rank {self.rank} cannot complete {where}, nor read who did not come: the store is gone"
        if missing := self._missing(places):
            names = ", ".join(f"rank {rank} ({places[rank]})" for rank in missing)
            return f"rank {self.rank} waits in {where} for {names}"
        others = "".join(f"; rank {rank}: {place.trouble}" for rank, place in places.items())
        return f"rank {self.rank} cannot complete {where}: {error}{others}"

    def _read_places(self) -> dict[int, _Place]:
        """All ranks but this one."""
        return {rank: self._read_place(rank) for rank in range(self.size) if rank != self.rank}

    def _read_place(self, rank: int) -> _Place:
        place = _Place()
        if self._store.check([_place_key(rank)]):
            place = _Place(*json.loads(self._store.get(_place_key(rank))))
        if self._store.check([_end_key(rank)]):
            place = place._replace(end=self._store.get(_end_key(rank)).decode())
        return place

    def _is_explained(self, places: Mapping[int, _Place]) -> bool:
        """Whether somebody is known to be gone, or all ask what this rank asks."""
        return any(place.is_culprit for place in places.values()) or all(
            place.trouble for place in places.values()
        )

    def _missing(self, places: Mapping[int, _Place]) -> list[int]:
        """Who kept this rank waiting: who is gone, else who is behind, else who went silent beside it."""
        gone = [rank for rank, place in places.items() if place.is_culprit]
        behind = [rank for rank, place in places.items() if place.num_entered < self.num_entered]
        beside = [rank for rank, place in places.items() if place.num_entered == self.num_entered]
        return gone or behind or [rank for rank in beside if not places[rank].trouble]


def _check_backend(backend: str, device: str | torch.device) -> None:
    if backend not in BACKENDS:
        invalid_argument("backend", repr(backend), f"one of {', '.join(BACKENDS)}")
    if str(device).partition(":")[0] != BACKENDS[backend]:
        invalid_argument("device", device, f"{BACKENDS[backend]} with backend {backend}")
    if not dist.is_available() or not dist.is_backend_available(backend):
        raise UnavailableError(f"backend {backend} is not in this torch ({torch.__version__})")
    if dist.is_initialized():
        raise UnavailableError("this process has a default process group of torch.distributed already")


def _leave_group() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def _encode(collective: Collective) -> list[int]:
    """A row of `_WIDTH` ints, whatever the collective."""
    name, step, row = collective
    if name not in _NAMES:
        invalid_argument("collective.name", repr(name), f"one of {', '.join(_NAMES)}")
    if len(row) > _WIDTH - _HEADER:
        invalid_argument("collective.row", row, f"at most {_WIDTH - _HEADER} ints")
    return [_NAMES.index(name), step, len(row), *row, *[0] * (_WIDTH - _HEADER - len(row))]


def _decode(row: list[int]) -> Collective:
    index, step, length = row[:_HEADER]
    return Collective(_NAMES[index], step, tuple(row[_HEADER : _HEADER + length]))
