"""Benchmarks of the device `linalg`: native code against Triton's interpreter, and against eager torch.

One process runs both: its kernels are interpreted, and native code takes their launches in its turn.
"""

import tempfile
from pathlib import Path
from typing import Any

import torch

from ..equivalence_tests import interpreter
from ..optimized.gdn import open_device
from ..optimized.gdn.ascend_native import NativeKernels, check_native_installed
from ..optimized.gdn.device import Device
from .contest import Contest, Pair
from .prefill_batch import HV, H, check_agree, prefill_batch

INTERPRETED = ((256, 1, 2), (128, H, HV))
"""Tokens, H and HV of batches for the interpreter: of `verify`, and with Qwen3-Next's heads."""
NUM_SEQUENCES = 3
"""Of such a batch."""
WHOLE_TOKENS = 2048
"""Of a batch of one sequence that is compared with eager torch."""


def open_linalg() -> Device:
    """The device `linalg`, in a process whose kernels are interpreted.

    Raises:
        UnavailableError: where a tool is not installed, or Triton was imported before.
    """
    check_native_installed()
    interpreter.enable()  # before `open_device` imports Triton
    return open_device("linalg")


class _Turns:
    """Calls of the op on one batch, by what runs its kernels."""

    def __init__(self, implementation: str, num_sequences: int, num_tokens: int, *heads: int) -> None:
        from ..optimized.gdn.native_launches import NativeLauncher

        self._implementation, self._launcher = implementation, NativeLauncher()
        self.batch = prefill_batch(open_device("cpu"), num_sequences, num_tokens, *heads)

    def native(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self._launched_by(self._launcher)

    def interpreted(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self._launched_by(_interpret)

    def eager(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self.batch.prebuilt("eager")

    def forget(self) -> None:
        """Make the next native call compile: nothing is loaded, and its cache is empty."""
        from ..optimized.gdn.native_launches import NativeLauncher

        self._cache = tempfile.TemporaryDirectory(prefix="ascend-twin-")  # the one before it goes
        self._launcher = NativeLauncher(NativeKernels(Path(self._cache.name)))

    def _launched_by(self, take: Any) -> tuple[torch.Tensor, torch.Tensor]:
        from ..optimized.gdn.kernels.launch import launches_taken_by

        with launches_taken_by(take):
            return self.batch.prebuilt(self._implementation)


def _interpret(launch: Any) -> None:
    launch.kernel[(launch.num_programs,)](**launch.arguments, **launch.constants)


def _interpreter_contest(
    implementation: str, num_tokens: int, num_heads: int, num_value_heads: int, *, is_first: bool
) -> Contest:
    """A whole call of the op; with `is_first` one that compiles every kernel, by a compiler that runs."""

    def start() -> Pair:
        turns = _Turns(implementation, NUM_SEQUENCES, num_tokens, num_heads, num_value_heads)
        with torch.inference_mode():
            check_agree(turns.native(), turns.interpreted(), turns.batch.bounds)
        if is_first:
            turns.forget()
        return Pair(
            f"native {implementation}",
            turns.native,
            f"interpreted {implementation}",
            turns.interpreted,
            our_settle=turns.forget if is_first else None,
        )

    call = "first call" if is_first else "cached"
    of = f"{num_tokens} tokens, H {num_heads}, HV {num_value_heads}"
    return Contest(f"native {implementation}, {call}, {of}, against the interpreter", start)


def _eager_contest(implementation: str) -> Contest:
    def start() -> Pair:
        turns = _Turns(implementation, 1, WHOLE_TOKENS, H, HV)
        with torch.inference_mode():
            check_agree(turns.native(), turns.eager(), turns.batch.bounds)
        return Pair(f"native {implementation}", turns.native, "eager", turns.eager)

    of = f"{WHOLE_TOKENS} tokens, H {H}, HV {HV}"
    return Contest(f"native {implementation}, cached, {of}, against eager", start)


NATIVE_CONTESTS = (
    *(
        _interpreter_contest(implementation, *shape, is_first=is_first)
        for shape in INTERPRETED
        for implementation in ("staged", "fused")
        for is_first in (True, False)
    ),
    *(_eager_contest(implementation) for implementation in ("staged", "fused")),
)
