"""The runtime of the address sanitizer, in a process that was started with it.

Code that LLVM's address sanitizer has instrumented (`ascend_native`) asks it before each access. What it then
reports is taken from its report of an error, which goes to stderr too.

Source: sanitizer/asan_interface.h of GCC 12 and LLVM 22; their instrumentation is the same (version 8).
"""

import ctypes
import functools
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

VERSION = "__asan_version_mismatch_check_v8"
"""What instrumented code asks its runtime to have."""


@dataclass(frozen=True)
class Report:
    """One access that the sanitizer found wrong.

    Attributes:
        kind: its name for it, such as `use-after-poison`.
        verb: `reads` or `writes`.
        size: bytes of the access.
        address: of its first byte, or of the first wrong one where it is of many (memcpy).
        frames: library and offset in it of the access, and of what called it; what the runtime has looked up
            itself is left out (without its option symbolize=0).
        region: how it lies to the memory next to it, "" where that is not known.
    """

    kind: str
    verb: str
    size: int
    address: int
    frames: tuple[tuple[str, int], ...]
    region: str


def report_of(text: str) -> Report | None:
    """What the text of an error says; None where it is none of an access."""
    kind = re.search(r"ERROR: AddressSanitizer: (\S+)", text)
    access = re.search(r"^(READ|WRITE) of size (\d+) at (0x[0-9a-f]+)", text, re.MULTILINE)
    if kind is None or access is None:
        return None
    stack = text[access.end() :].partition("\n\n")[0]
    frames = re.findall(r"^ *#\d+ 0x[0-9a-f]+ .*?\((.+)\+0x([0-9a-f]+)\)", stack, re.MULTILINE)
    region = re.search(r" is located (.* region)", text)
    return Report(
        kind[1],
        {"READ": "reads", "WRITE": "writes"}[access[1]],
        int(access[2]),
        int(access[3], 16),
        tuple((library, int(offset, 16)) for library, offset in frames),
        region[1] if region else "",
    )


class AddressSanitizer:
    """What a process asks of the runtime that it was started with; see `loaded_sanitizer`."""

    def __init__(self, runtime: Any) -> None:
        self._poison, self._unpoison = (
            getattr(runtime, f"__asan_{verb}_memory_region") for verb in ("poison", "unpoison")
        )
        for function in (self._poison, self._unpoison):
            function.argtypes, function.restype = (ctypes.c_void_p, ctypes.c_size_t), None
        self._forbidden: list[tuple[int, int]] = []
        self._reports: list[Report] = []
        self._heard = ctypes.CFUNCTYPE(None, ctypes.c_char_p)(self._hear)  # must outlive the runtime
        getattr(runtime, "__asan_set_error_report_callback")(self._heard)

    @contextmanager
    def forbidding(self, stretches: Iterable[tuple[int, int]]) -> Iterator[list[Report]]:
        """A context in which each access to some memory is an error. One at a time.

        Args:
            stretches: address and size in bytes. Where one ends amid 8 bytes, those before its end stay
                allowed.

        Returns:
            What is found, as it is found; of accesses to the stretches, the first.
        """
        self._forbidden, self._reports = list(stretches), []
        for address, size in self._forbidden:
            self._poison(address, size)
        try:
            yield self._reports
        finally:
            self._allow()

    def _allow(self) -> None:
        for address, size in self._forbidden:
            self._unpoison(address, size)

    def _hear(self, text: bytes) -> None:
        if report := report_of(text.decode(errors="replace")):
            self._reports.append(report)
            self._allow()  # else a loop would report each of its turns


@functools.cache
def loaded_sanitizer() -> AddressSanitizer | None:
    """The runtime that this process was started with, if it was: with LD_PRELOAD, say."""
    runtime = ctypes.CDLL(None)
    return AddressSanitizer(runtime) if hasattr(runtime, VERSION) else None
