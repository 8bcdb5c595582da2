"""The one way from a launcher to Triton; launches can be recorded here instead of run."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
import triton

from ....reference.errors import UnavailableError

MAX_PROGRAMS = 65_535
"""Programs of one launch that an Ascend NPU takes."""

_recorded: ContextVar[list["Launch"] | None] = ContextVar("recorded launches", default=None)
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
    recorded, cuda_options = _recorded.get(), cuda_options or {}
    for first_program in range(0, num_programs, MAX_PROGRAMS):
        programs = min(MAX_PROGRAMS, num_programs - first_program)
        these = {**arguments, "first_program": first_program}
        if recorded is not None:
            recorded.append(Launch(kernel, programs, these, constants, cuda_options))
        else:
            _check_can_run(kernel, arguments)
            on_cuda = any(isinstance(x, torch.Tensor) and x.is_cuda for x in arguments.values())
            kernel[(programs,)](**these, **constants, **(cuda_options if on_cuda else {}))


@contextmanager
def recorded_launches() -> Iterator[list[Launch]]:
    """A context in which launches are recorded, in order, and nothing runs: outputs stay uninitialised."""
    launches: list[Launch] = []
    token = _recorded.set(launches)
    try:
        yield launches
    finally:
        _recorded.reset(token)


def trust_interpreter() -> None:
    """Say that Triton's interpreter computes bfloat16 as hardware does: as published, it does not."""
    global _interprets_faithfully
    _interprets_faithfully = True


def _check_can_run(kernel: Any, arguments: dict[str, Any]) -> None:
    """Raise where the launch would fail with a riddle, or interpret what should run on a device."""
    is_interpreted = not isinstance(kernel, triton.runtime.JITFunction)
    tensors = [x for x in arguments.values() if isinstance(x, torch.Tensor)]
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
