"""Long jobs of a command, several processes at a time."""

import multiprocessing
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import Any, Protocol, TypeVar

from ..reference.errors import UnavailableError

POLL_SECONDS = 0.1

T_co = TypeVar("T_co", covariant=True)


class Job(Protocol[T_co]):
    """What is to be done; it and its result are sent between processes."""

    def run(self, advance: Callable[[int], object]) -> T_co:
        """Do it; `advance` is told how much more was done, and may raise to end it."""
        ...


def run_jobs(jobs: Sequence[Job[T_co]], num_processes: int, advance: Callable[[int], object]) -> list[T_co]:
    """Do all jobs; `advance` is told how much more was done.

    The result does not depend on the number of processes.

    Raises:
        UnavailableError: when a process ended before its job did, for want of memory say.
    """
    if num_processes == 1 or len(jobs) == 1:
        return [job.run(advance) for job in jobs]
    context = multiprocessing.get_context("spawn")
    done, is_stopped = context.Value("q", 0), context.Event()
    executor = ProcessPoolExecutor(
        min(num_processes, len(jobs)), context, _initialize_process, (done, is_stopped)
    )
    # Processes inherit that they ignore interrupts: this one says when to stop. It hears of one only while
    # it polls: a second one, while the pool is shut down, would leave it waiting for ever.
    with _interrupts(signal.SIG_IGN) as heard, executor:
        futures = [executor.submit(_run_in_process, job) for job in jobs]
        try:
            with _interrupts(_stop_once if heard is signal.default_int_handler else heard):
                for count in _polled(futures, done):
                    advance(count)
            return [future.result() for future in futures]
        except BrokenProcessPool:
            raise UnavailableError(
                "--jobs: a process ended before its run did, for want of memory perhaps; try --jobs 1"
            ) from None
        finally:
            is_stopped.set()
            for future in futures:
                future.cancel()


def _stop_once(number: int, frame: object) -> None:
    """The handler of the first interrupt: there is no second one."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    raise KeyboardInterrupt


@contextmanager
def _interrupts(handler: Any) -> Iterator[Any]:
    """What becomes of SIGINT meanwhile; gives what became of it before. Only the main thread may say."""
    if threading.current_thread() is not threading.main_thread():
        yield None
        return
    before = signal.signal(signal.SIGINT, handler)
    try:
        yield before
    finally:
        signal.signal(signal.SIGINT, before)


def _polled(futures: Sequence[Future], done: Any) -> Iterator[int]:
    """How much more was done, again and again, until all jobs have ended; raises what one does."""
    seen, pending = 0, set(futures)
    while pending:
        ended, pending = wait(pending, POLL_SECONDS)
        now = done.value
        yield now - seen
        seen = now
        for future in ended:
            future.result()


# In a process of the pool

_shared: Any = None


def _initialize_process(done: Any, is_stopped: Any) -> None:
    global _shared
    _shared = done, is_stopped
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent says when to stop


def _run_in_process(job: Job[Any]) -> Any:
    done, is_stopped = _shared

    def advance(count: int) -> None:
        if is_stopped.is_set():
            raise InterruptedError
        if count:
            with done.get_lock():
                done.value += count

    return job.run(advance)
