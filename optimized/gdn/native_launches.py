"""Launches run as native code (`ascend_native`) on the memory of the CPU, between redzones.

Native code gets real pointers. Each tensor of a launch is copied between redzones, which together with the
gaps of a strided tensor are filled with one pattern: a NaN, or an integer that indexes nothing. What is read
there spoils the result, what is written there is found, and what lies beyond all memory is caught.
"""

import ctypes
import struct
import threading
from pathlib import Path
from typing import Any

import torch

from ...reference.errors import AscendTwinError
from .ascend_front_end import variant_of
from .ascend_native import NativeKernels
from .kernels.launch import Launch

_NANS = {2: 0x7FA5, 4: 0x7FA5A5A5, 8: 0x7FF5A5A5A5A5A5A5}
_NO_INDICES = {1: -0x5B, 2: -0x5A5B, 4: -0x7F5A5A5B, 8: -0x7F5A5A5A5A5A5A5B}
"""By bytes of an element. Negative: as the end of a sequence it lets nothing run on; and so far off that as
an index it leads to no memory."""
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_SMALLEST_ZONE, _LARGEST_ZONE = 2**12, 2**19
_ROWS_IN_ZONE = 80  # a chunk, and more


class StrayAccessError(AscendTwinError, IndexError):
    """Native code touched memory outside its tensors; the message names kernel, parameter and place."""


class _Buffer(ctypes.Structure):
    _fields_ = (
        ("allocated", ctypes.c_void_p),
        ("aligned", ctypes.c_void_p),
        ("offset", ctypes.c_int64),
        ("size", ctypes.c_int64),
        ("stride", ctypes.c_int64),
    )


class _Guarded:
    """A copy of a tensor between redzones."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self._bits = bits = _as_integers(tensor)
        self._pattern = (_NANS if tensor.is_floating_point() else _NO_INDICES)[tensor.itemsize]
        rows = max(bits.stride(), default=1)
        self._zone = min(max(_SMALLEST_ZONE, _ROWS_IN_ZONE * rows), _LARGEST_ZONE)
        last = sum((n - 1) * stride for n, stride in zip(bits.shape, bits.stride(), strict=True))
        self.size = last + 1 if bits.numel() else 0
        self._memory = torch.full((self.size + 2 * self._zone,), self._pattern, dtype=bits.dtype)
        self._inside = self._memory.as_strided(bits.shape, bits.stride(), self._zone)
        self._inside.copy_(bits)

    @property
    def start(self) -> int:
        """Address of its first element."""
        return self._inside.data_ptr()

    @property
    def itemsize(self) -> int:
        """Bytes of an element."""
        return self._bits.itemsize

    def finish(self) -> int | None:
        """Copy back what was written; returns the first element that was written outside, if any."""
        self._bits.copy_(self._inside)
        self._inside.fill_(self._pattern)
        if bool((self._memory == self._pattern).all()):
            return None
        return int((self._memory != self._pattern).nonzero()[0]) - self._zone


def _as_integers(tensor: torch.Tensor) -> torch.Tensor:
    """The bits of a tensor; what repeats along a dimension, once."""
    bits = tensor.detach().view(_INTEGERS[tensor.itemsize])
    for dim, stride in enumerate(bits.stride()):
        bits = bits.narrow(dim, 0, 1) if stride == 0 and bits.shape[dim] > 1 else bits
    return bits


class NativeLauncher:
    """Runs launches natively; to be given to `launches_taken_by` or `run_on_cpu_by`.

    The programs of a launch are shared among as many threads as torch uses (`torch.set_num_threads`).

    Args:
        kernels: where their code comes from; default: the cache of the user.

    Raises:
        UnavailableError: where a tool is not installed.
    """

    def __init__(self, kernels: NativeKernels | None = None) -> None:
        self.kernels = NativeKernels() if kernels is None else kernels
        self._loaded: dict[str, Any] = {}
        self._lock = threading.Lock()

    def __call__(self, launch: Launch) -> None:
        """Run a launch.

        Raises:
            LoweringError: where the kernel does not lower.
            StrayAccessError: where it touches memory outside its tensors; they then hold what it has written.
        """
        variant = variant_of(launch)
        with self._lock:
            run = self._loaded.get(variant.key)
            if run is None:
                run = self._loaded[variant.key] = _load(self.kernels.library(launch.kernel, variant))
            constants = dict(variant.constants)
            values = {n: launch.arguments[n] for n, _ in variant.signature if n not in constants}
            _run(launch, run, values)


def _load(library: Path) -> Any:
    run = ctypes.CDLL(str(library)).launch
    run.restype = ctypes.c_int32
    return run


def _run(launch: Launch, run: Any, values: dict[str, Any]) -> None:
    copies: dict[Any, _Guarded] = {}
    of_parameter: dict[str, _Guarded] = {}
    numbers: list[int] = []
    for name, value in values.items():
        if isinstance(value, torch.Tensor):
            place = (value.data_ptr(), value.dtype, value.shape, value.stride())
            copies[place] = of_parameter[name] = copies.get(place) or _Guarded(value)
        else:
            numbers.append(_bits_of(value))
    buffers = [_Buffer(g.start, g.start, 0, g.size, 1) for g in of_parameter.values()]
    address = ctypes.c_void_p()
    program = run(
        (_Buffer * len(buffers))(*buffers),
        (ctypes.c_int64 * len(numbers))(*numbers),
        launch.num_programs,
        torch.get_num_threads(),
        ctypes.byref(address),
    )
    written = {id(copy): copy.finish() for copy in copies.values()}
    if program >= 0:
        place = _nearest(address.value or 0, of_parameter)
        raise StrayAccessError(
            f"{launch.name}, program {program}: touches memory that is not mapped, {place}"
        )
    for name, copy in of_parameter.items():
        if (element := written[id(copy)]) is not None:
            raise StrayAccessError(
                f"{launch.name}: writes element {element} of {name}, which has 0 to {copy.size - 1}"
                f"{' with gaps' if 0 <= element < copy.size else ''}"
            )


def _bits_of(value: float) -> int:
    """A number as native_launcher.c takes it."""
    return struct.unpack("<i", struct.pack("<f", value))[0] if isinstance(value, float) else int(value)


def _nearest(address: int, copies: dict[str, _Guarded]) -> str:
    """Where an address is, seen from the tensor that it is nearest to."""
    name = min(copies, key=lambda n: abs(address - copies[n].start))
    return f"element {(address - copies[name].start) // copies[name].itemsize} as seen from {name}"
