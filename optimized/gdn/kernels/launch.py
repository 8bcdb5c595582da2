"""The one way from a launcher to Triton; launches can be taken here, to be recorded or run otherwise."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
import triton

from ....reference.errors import UnavailableError

MAX_PROGRAMS = 65_535
"""Programs of one launch that an Ascend NPU takes."""

_taken: ContextVar[Callable[["Launch"], None] | None] = ContextVar("who takes launches", default=None)
_on_cpu: Callable[["Launch"], None] | None = None
_interprets_faithfully = False


@dataclass(frozen=True)
class Launch:
    """One call of a kernel.

    Attributes:
        kernel: the function that `triton.jit` made.
        num_programs: programs of the launch, in one dimension.
        arguments: what is known when it runs (tensors, numbers), by parameter name.
        constants: what is known when it is compiled, by parameter name.
        cuda_options: Triton's num_warps and num_stages for a GPU; what is absent is left to Triton.
    """

    kernel: Any
    num_programs: int
    arguments: dict[str, Any]
    constants: dict[str, Any]
    cuda_options: dict[str, int] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return self.kernel.__name__


def launch(
    kernel: Any,
    num_programs: int,
    arguments: dict[str, Any],
    constants: dict[str, Any],
    *,
    cuda_options: dict[str, int] | None = None,
) -> None:
    """Launch `kernel`, in as many launches as `MAX_PROGRAMS` asks for; none for no program.

    The kernel takes the number of its first program as `first_program`; the rest is as in `Launch`.

    Raises:
        UnavailableError: where its tensors are on a device that this process does not launch on.
    """
    for first_program in range(0, num_programs, MAX_PROGRAMS):
        programs = min(MAX_PROGRAMS, num_programs - first_program)
        these = {**arguments, "first_program": first_program}
        (_taken.get() or _run)(Launch(kernel, programs, these, constants, cuda_options or {}))


@contextmanager
def launches_taken_by(take: Callable[[Launch], None]) -> Iterator[None]:
    """A context in which `take` gets each launch, in order, and Triton none."""
    token = _taken.set(take)
    try:
        yield
    finally:
        _taken.reset(token)


@contextmanager
def recorded_launches() -> Iterator[list[Launch]]:
    """A context in which launches are recorded, in order, and nothing runs: outputs stay uninitialised."""
    launches: list[Launch] = []
    with launches_taken_by(launches.append):
        yield launches


def run_on_cpu_by(run: Callable[[Launch], None]) -> None:
    """Let `run` do the launches of this process whose tensors are on the CPU, in place of Triton."""
    global _on_cpu
    _on_cpu = run


def trust_interpreter() -> None:
    """Say that Triton's interpreter computes bfloat16 as hardware does: as published, it does not."""
    global _interprets_faithfully
    _interprets_faithfully = True


def _run(launch: Launch) -> None:
    tensors = [x for x in launch.arguments.values() if isinstance(x, torch.Tensor)]
    if _on_cpu is not None and tensors[0].device.type == "cpu":
        _on_cpu(launch)
        return
    _check_can_run(launch.kernel, tensors)
    options = launch.cuda_options if any(x.is_cuda for x in tensors) else {}
    launch.kernel[(launch.num_programs,)](**launch.arguments, **launch.constants, **options)


def _check_can_run(kernel: Any, tensors: list[torch.Tensor]) -> None:
    """Raise where the launch would fail with a riddle, or interpret what should run on a device."""
    is_interpreted = not isinstance(kernel, triton.runtime.JITFunction)
    on_cpu = tensors[0].device.type == "cpu"
    if on_cpu and not is_interpreted:
        raise UnavailableError(
            "Triton kernels run on a CPU only in its interpreter: call "
            "ascend_twin.equivalence_tests.interpreter.enable() before the first call"
        )
    if is_interpreted and not on_cpu:
        raise UnavailableError(
            f"TRITON_INTERPRET was set when the kernels were loaded: they run on the CPU, not on "
            f"{tensors[0].device}"
        )
    if is_interpreted and not _interprets_faithfully and any(x.dtype == torch.bfloat16 for x in tensors):
        raise UnavailableError(
            "Triton's interpreter multiplies bfloat16 as integers: call "
            "ascend_twin.equivalence_tests.interpreter.enable() before the first call"
        )
