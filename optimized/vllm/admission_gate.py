# pyright: reportMissingImports=false
"""How admission is shut for one step in the installed vLLM, from outside `schedule()`."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from ...reference.errors import UnavailableError

Shut = Callable[[Any], AbstractContextManager[None]]
"""Given a scheduler: nobody is admitted by a `schedule()` inside the context; afterwards all is as before."""


@contextmanager
def _shut_by_active_requests(scheduler: Any) -> Iterator[None]:
    """The waiting loop ends when as many requests are active as may be: none may."""
    cap, scheduler.max_num_active_reqs = scheduler.max_num_active_reqs, 0
    try:
        yield
    finally:
        scheduler.max_num_active_reqs = cap


@contextmanager
def _shut_by_running_requests(scheduler: Any) -> Iterator[None]:
    """The waiting loop ends when exactly as many requests run as may: no more may than do.

    A preemption makes room again, but then the loop is not entered at all. After the loop, vLLM asserts that
    no more run than may.
    """
    cap, scheduler.max_num_running_reqs = scheduler.max_num_running_reqs, len(scheduler.running)
    try:
        yield
    finally:
        scheduler.max_num_running_reqs = cap


_GATES: dict[str, Shut] = {
    "max_num_active_reqs": _shut_by_active_requests,
    "max_num_running_reqs": _shut_by_running_requests,
}
"""By the attribute that the waiting loop reads, the newer first: where it is, the older one is, too."""


def find_gate(schedule: Any) -> tuple[str, Shut]:
    """The gate of a `schedule()`: the attribute that holds the cap of its waiting loop, and how it is shut.

    Raises:
        UnavailableError: when it reads none of the attributes that are known.

    Source: vllm/v1/core/sched/scheduler.py; 0.17.0 compares the running requests with max_num_running_reqs,
        0.32.0 the active ones with max_num_active_reqs.
    """
    names = schedule.__code__.co_names
    for attribute, shut in _GATES.items():
        if attribute in names:
            return attribute, shut
    raise UnavailableError(f"vLLM's Scheduler.schedule() reads none of {', '.join(_GATES)}")


def install() -> None:
    """Look whether the installed vLLM's scheduler has a gate; nothing is patched.

    Raises:
        UnavailableError: when it has none that is known.
    """
    from vllm.v1.core.sched.scheduler import Scheduler

    find_gate(Scheduler.schedule)
