"""Launches run as native code (`ascend_native`) on the memory of the CPU, between redzones.

Native code gets real pointers. Each tensor of a launch is copied between redzones, which together with the
gaps of a strided tensor are filled with a pattern: a NaN, or an integer that indexes nothing. What is read
there spoils the result, what is written there is found. Behind them no memory is mapped, for as far as an
index of 32 bits leads: to touch that is caught. In a process that was started with the address sanitizer
what is read in redzones and gaps is found, too, whatever becomes of it.
"""

import ctypes
import mmap
import numbers
import os
import signal
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ...reference.errors import AscendTwinError, UnavailableError, invalid_argument
from .address_sanitizer import Report, loaded_sanitizer
from .ascend_front_end import arguments_of, variant_of
from .ascend_native import NativeKernels, line_of, one_at_a_time
from .kernel_identity import kernel_identity
from .kernels.launch import Launch

# By bytes of an element, for the first tensor of a launch; the next ones count up, so that what is copied
# from one to another shows. Integers are negative: as the end of a sequence they let nothing run on; and so
# far off that as an index they lead to no memory.
_NANS = {2: 0x7F81, 4: 0x7FA5A5A5, 8: 0x7FF5A5A5A5A5A5A5}
_NO_INDICES = {1: -0x5B, 2: -0x5A5B, 4: -0x7F5A5A5B, 8: -0x7F5A5A5A5A5A5A5B}
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_SMALLEST_ZONE, _LARGEST_ZONE = 2**12, 2**14  # elements
_ROWS_IN_ZONE = 80  # a chunk, and more
_libc = ctypes.CDLL(None, use_errno=True)
_NOWHERE = 2**34  # bytes of addresses on either side that lead nowhere: what 32 bits can count of 4 bytes


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


class _Fault(ctypes.Structure):
    _fields_ = (("address", ctypes.c_void_p), ("program", ctypes.c_int32), ("signal", ctypes.c_int32))


class _Guarded:
    """A copy of tensor `number` of a launch between redzones."""

    def __init__(self, tensor: torch.Tensor, number: int) -> None:
        self._bits = bits = _as_integers(tensor)
        self._pattern = (_NANS if tensor.is_floating_point() else _NO_INDICES)[tensor.itemsize] + number
        row = -(-max(bits.stride(), default=1) // 16) * 16  # what 16 divided as an address it still does
        self._zone = min(max(_SMALLEST_ZONE, _ROWS_IN_ZONE * row), _LARGEST_ZONE)
        last = sum((n - 1) * stride for n, stride in zip(bits.shape, bits.stride(), strict=True))
        self.size = last + 1 if bits.numel() else 0
        self._area, self._memory = _reserved(self.size + 2 * self._zone, bits.dtype)
        self._inside = self._memory.as_strided(bits.shape, bits.stride(), self._zone)
        zones = self._memory[: self._zone], self._memory[self._zone + self.size :]
        self._outside = zones if bits.numel() == self.size else (self._memory,)
        for part in self._outside:
            part.fill_(self._pattern)
        self._inside.copy_(bits)

    @property
    def start(self) -> int:
        """Address of its first element."""
        return self._address(self._zone)

    @property
    def itemsize(self) -> int:
        """Bytes of an element."""
        return self._bits.itemsize

    def is_written(self) -> bool:
        """Whether it now differs from the tensor."""
        return not torch.equal(self._bits, self._inside)

    def keep(self) -> None:
        """Copy back what was written."""
        self._bits.copy_(self._inside)

    def written_outside(self) -> int | None:
        """The first element that was written outside the tensor, if any; the copy is lost."""
        if len(self._outside) == 1:
            self._inside.fill_(self._pattern)
        for part in self._outside:
            written = part != self._pattern
            if bool(written.any()):
                return int(written.nonzero()[0] + part.storage_offset()) - self._zone
        return None

    def shares_memory_with(self, other: "_Guarded") -> bool:
        """Whether the tensors of both have a byte in common."""
        starts = [x._bits.data_ptr() for x in (self, other)]
        ends = [start + x.size * x.itemsize for start, x in zip(starts, (self, other), strict=True)]
        if max(starts) >= min(ends):
            return False
        mine, others = (x._bytes(min(starts), max(ends)) for x in (self, other))
        return bool((mine & others).any())

    def _bytes(self, first: int, end: int) -> torch.Tensor:
        """Which bytes of memory from `first` to `end` are of the tensor."""
        marks = torch.zeros(end - first, dtype=torch.bool, device="cpu")
        strides = [stride * self.itemsize for stride in self._bits.stride()]
        for byte in range(self.itemsize):
            start = self._bits.data_ptr() - first + byte
            marks.as_strided(self._bits.shape, strides, start).fill_(True)
        return marks

    def element_at(self, address: int) -> int | None:
        """The element there, in the tensor or around it; None where that is other memory."""
        if self._address(0) <= address < self._address(len(self._memory)):
            return (address - self.start) // self.itemsize
        return None

    def extent(self, element: int) -> str:
        """Which elements it has, beside one that it has not."""
        return f"which has 0 to {self.size - 1}{' with gaps' if 0 <= element < self.size else ''}"

    def stretches_outside(self) -> list[tuple[int, int]]:
        """Address and size in bytes of all memory around and between the elements."""
        inside = torch.zeros(self._memory.shape, dtype=torch.bool, device="cpu")
        inside.as_strided(self._bits.shape, self._bits.stride(), self._zone).fill_(True)
        edges = ((inside[1:] != inside[:-1]).nonzero().flatten() + 1).tolist()
        stretches = zip([0, *edges[1::2]], [*edges[::2], len(inside)], strict=True)
        return [(self._address(first), (end - first) * self.itemsize) for first, end in stretches]

    def release(self) -> None:
        """Give memory and addresses back, which an error that is kept would keep, too."""
        del self._memory, self._inside, self._outside
        self._area.close()

    def _address(self, element: int) -> int:
        return self._memory.data_ptr() + element * self.itemsize


def _reserved(size: int, dtype: torch.dtype) -> tuple[mmap.mmap, torch.Tensor]:
    """Memory `[size]` amid addresses that lead nowhere, and what holds it as long as it lives."""
    num_bytes = -(-size * dtype.itemsize // mmap.PAGESIZE) * mmap.PAGESIZE
    try:
        area = mmap.mmap(-1, num_bytes + 2 * _NOWHERE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, prot=0)
        start = np.frombuffer(area, np.uint8).ctypes.data + _NOWHERE
        readable = mmap.PROT_READ | mmap.PROT_WRITE
        if _libc.mprotect(ctypes.c_void_p(start), ctypes.c_size_t(num_bytes), readable):
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    except OSError as error:
        raise UnavailableError(
            f"no memory of {num_bytes} bytes amid {2 * _NOWHERE >> 30} GiB of addresses can be had: {error} "
            f"(ulimit -v?)"
        ) from error
    return area, torch.frombuffer((ctypes.c_char * num_bytes).from_address(start), dtype=dtype, count=size)


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
        self._loaded: dict[tuple[str, str], Any] = {}

    def __call__(self, launch: Launch) -> None:
        """Run a launch.

        Raises:
            LoweringError: where the kernel does not lower.
            StrayAccessError: where it touches memory outside its tensors; they then hold what it has written.
            AscendTwinError: where it divides an integer by zero, which an x86-64 CPU does not.
            InvalidArgumentError: where an argument is none that a kernel takes on the CPU, or it writes to a
                tensor that has a part of another one.
            UnavailableError: where memory cannot be had.
        """
        _check(launch)
        variant = variant_of(launch)
        with one_at_a_time:  # its handlers of signals are those of the process
            key = kernel_identity(launch.kernel), variant.key
            run = self._loaded.get(key)
            if run is None:
                run = self._loaded[key] = _load(self.kernels.library(launch.kernel, variant))
            constants, given = dict(variant.constants), arguments_of(launch)
            values = {n: given[n] for n, _ in variant.signature if n not in constants}
            _run(launch, run, values)


def _check(launch: Launch) -> None:
    num_programs = launch.num_programs
    if not isinstance(num_programs, numbers.Integral) or not 0 <= num_programs <= 2**30:
        invalid_argument("num_programs", num_programs, "0 to 2**30")
    for name, value in launch.arguments.items():
        if not isinstance(value, torch.Tensor):
            continue
        if (value.device.type, value.layout) != ("cpu", torch.strided):
            invalid_argument(name, f"a tensor on {value.device}, {value.layout}", "on the CPU, torch.strided")
        if value.is_neg():
            invalid_argument(name, "a tensor whose negation is pending", "tensor.resolve_neg()")


def _load(library: Path) -> Any:
    run = ctypes.CDLL(str(library)).launch
    run.restype = None
    return run


def _run(launch: Launch, run: Any, values: dict[str, Any]) -> None:
    copies: dict[Any, _Guarded] = {}
    of_parameter: dict[str, _Guarded] = {}
    try:
        for name, value in values.items():
            if isinstance(value, torch.Tensor):
                place = (value.data_ptr(), value.dtype, value.shape, value.stride())
                copies[place] = of_parameter[name] = copies.get(place) or _Guarded(value, len(copies))
        scalars = [_bits_of(v) for v in values.values() if not isinstance(v, torch.Tensor)]
        _run_on(of_parameter, scalars, launch, run)
    finally:
        for copy in copies.values():
            copy.release()


def _run_on(copies: dict[str, _Guarded], scalars: Sequence[int], launch: Launch, run: Any) -> None:
    """Run a launch on copies of its tensors, by parameter, and copy back what it wrote."""
    buffers = [_Buffer(g.start, g.start, 0, g.size, 1) for g in copies.values()]
    fault = _Fault()
    with _watched(dict.fromkeys(copies.values())) as reports:  # each once, whatever arguments it is
        run(
            (_Buffer * len(buffers))(*buffers),
            (ctypes.c_int64 * len(scalars))(*scalars),
            int(launch.num_programs),
            torch.get_num_threads(),
            ctypes.byref(fault),
        )
    _keep(launch, copies)
    if reports:
        place, what = _line(reports[0], launch.name), _found(reports[0], copies)
        raise StrayAccessError(f"{launch.name}{place}: {what}")
    if fault.signal:
        who = f"{launch.name}, program {fault.program}"
        if fault.signal == signal.SIGFPE:
            raise AscendTwinError(f"{who}: divides an integer by zero")
        place = _nearest(fault.address, copies) if fault.address else "where none can be"
        raise StrayAccessError(f"{who}: touches memory that is not mapped, {place}")
    for name, copy in copies.items():
        if (element := copy.written_outside()) is not None:
            raise StrayAccessError(
                f"{launch.name}: writes element {element} of {name}, {copy.extent(element)}"
            )


def _watched(copies: Iterable[_Guarded]) -> AbstractContextManager[Sequence[Report]]:
    """A context in which the address sanitizer, if there is one, watches what is around the tensors."""
    if sanitizer := loaded_sanitizer():
        return sanitizer.forbidding(stretch for copy in copies for stretch in copy.stretches_outside())
    return nullcontext(())


def _keep(launch: Launch, copies: dict[str, _Guarded]) -> None:
    """Copy back what was written: all of it or, where that is not what would have happened, nothing."""
    written = {name: copy for name, copy in copies.items() if copy.is_written()}
    for name, copy in written.items():
        for other, its in copies.items():
            if its is not copy and copy.shares_memory_with(its):
                invalid_argument(
                    f"{launch.name}: {other}",
                    f"in memory of {name}, which it writes",
                    f"the tensor that {name} is, or none of its elements",
                )
    for copy in written.values():
        copy.keep()


def _bits_of(value: float) -> int:
    """A number as native_launcher.c takes it."""
    if isinstance(value, numbers.Integral):
        return int(value)
    return ctypes.c_int32.from_buffer(ctypes.c_float(float(value))).value


def _nearest(address: int, copies: dict[str, _Guarded]) -> str:
    """Where an address is, seen from the tensor that it is nearest to."""

    def distance(name: str) -> int:
        start, size = copies[name].start, copies[name].size * copies[name].itemsize
        return max(start - address, address - (start + size))

    name = min(copies, key=distance)
    return f"element {(address - copies[name].start) // copies[name].itemsize} as seen from {name}"


def _line(report: Report, kernel: str) -> str:
    """The line of the kernel that a report is about, behind a comma, if that can be known."""
    lines = (line_of(*frame) for frame in report.frames if Path(frame[0]).name.startswith(f"{kernel}-"))
    return next((f", {line}" for line in lines if line), "")


def _found(report: Report, copies: dict[str, _Guarded]) -> str:
    """What a report is about, in the words of the kernel's parameters."""
    for name, copy in copies.items():
        if (element := copy.element_at(report.address)) is not None:
            return f"{report.verb} element {element} of {name}, {copy.extent(element)}"
    region = f", {report.region}" if report.region else ""
    return f"{report.verb} {report.size} bytes at no parameter: {report.kind}{region}"
