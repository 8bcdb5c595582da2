"""Cross-compile the launches of an implementation for Ascend NPUs, with no NPU at hand.

What is compiled is what is launched: the launches of the op are recorded (`kernels/launch.py`), and lowered
to linalg (`ascend_front_end`). bishengir-compile, which ascendnpu-ir brings along, takes that through memory
planning and synchronisation and stops where CANN would make the binary. It leaves `module.hivm.opt.mlir`
exactly when everything fits on chip, and that file names every buffer.

Source: options of triton-ascend 3.2.0 (triton/backends/ascend/compiler.py); ascendnpu-ir 1.2.0.
"""

import math
import os
import re
import subprocess
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from ...reference.errors import AscendTwinError
from .ascend_front_end import (
    TARGETS,
    CompilerProcess,
    Target,
    Variant,
    check_installed,
    compilers_folder,
    errors_in,
    lower,
    record_variants,
)
from .models import Shape

MISSING = "install them in an environment of their own: pip install 'ascend-twin[ascend]'"
REQUIRED = ("triton-ascend", "ascendnpu-ir", "pybind11")
COMPILE_SECONDS = 60.0
"""A compile that takes longer fails; some never end (bishengir-compile-a5, tiles too large for it)."""

SPACES = {"ub": "UB", "cbuf": "L1", "ca": "L0A", "cb": "L0B", "cc": "L0C"}
"""On-chip memories: name in the planned IR, name of the manuals."""

_BITS = {"i1": 1, "i8": 8, "i16": 16, "i32": 32, "i64": 64, "f16": 16, "bf16": 16, "f32": 32, "f64": 64}


@dataclass(frozen=True)
class Compiled:
    """What became of a variant on a target.

    Attributes:
        target: a key of `TARGETS`.
        fits: whether the compiler placed everything on chip.
        planned: bytes by space; where it does not fit, what the compiler says it needs.
        limits: bytes that the target has of each, as far as the compiler named them.
        message: what the compiler said where it does not fit, else "".
        warnings: what else it said, settings that it gave up to make it fit included.
        seconds: of compiling.
    """

    target: str
    fits: bool
    planned: Mapping[str, int]
    limits: Mapping[str, int]
    message: str
    warnings: tuple[str, ...]
    seconds: float


# Compiling; only in a process whose Triton is triton-ascend and compiles


def compile_variant(variant: Variant, targets: Sequence[str]) -> list[Compiled]:
    """Compile a variant for each of `targets` (keys of `TARGETS`)."""
    lowered: dict[object, tuple[str, Any, str]] = {}
    results = []
    for name in targets:
        start, target = time.perf_counter(), TARGETS[name]
        if target.options not in lowered:
            lowered[target.options] = lower(variant, target)
        linalg, options, said = lowered[target.options]
        results.append(_plan(name, linalg, options, said, start))
    return results


def _plan(name: str, linalg: str, options: Any, said: str, start: float) -> Compiled:
    """Take linalg IR through memory planning."""
    if not linalg:
        return Compiled(name, False, {}, {}, said, (), time.perf_counter() - start)
    with tempfile.TemporaryDirectory(prefix="ascend-twin-") as folder:
        (Path(folder) / "kernel.mlir").write_text(linalg, encoding="utf-8")
        try:
            line = command(TARGETS[name], options, folder)
            done = subprocess.run(line, capture_output=True, cwd=folder, timeout=COMPILE_SECONDS)
            output = (done.stdout + done.stderr).decode(errors="replace")
            output = output if output.strip() else f"error: the compiler ended with status {done.returncode}"
        except subprocess.TimeoutExpired:
            output = f"error: the compiler was stopped after {COMPILE_SECONDS:.0f} s"
        file = Path(folder) / "module.hivm.opt.mlir"
        planned_ir = file.read_text(encoding="utf-8") if file.exists() else ""
    seconds, warnings = time.perf_counter() - start, _warnings(said + output)
    if not planned_ir:
        needed, limits = overflows(output)
        return Compiled(name, False, needed, limits, errors_in(output), warnings, seconds)
    planned, limits = planned_bytes(planned_ir), memory_limits(planned_ir)
    beyond = [space for space in planned if planned[space] > limits.get(space, 0)]
    message = "; ".join(
        f"{s}: {planned[s]} bytes planned, {limits.get(s, 'unknown')} available" for s in beyond
    )
    return Compiled(name, not beyond, planned, limits, message, warnings, seconds)


def command(target: Target, options: Any, folder: str) -> list[str]:
    """The compiler's command line for `folder`/kernel.mlir: the options of a launch, and its results kept.

    Args:
        target: what to compile for.
        options: triton-ascend's options of the launch (NPUOptions).
        folder: where the input is and the results go.
    """
    given = [
        (flag, getattr(options, name))
        for flag, name in (
            ("enable-auto-multi-buffer", "multibuffer"),
            ("enable-auto-bind-sub-block", "enable_auto_bind_sub_block"),
            ("enable-hivm-auto-cv-balance", "enable_hivm_auto_cv_balance"),
            ("enable-hivm-graph-sync-solver", "sync_solver"),
            ("enable-hivm-unit-flag-sync", "unit_flag"),
            ("enable-hivm-inject-barrier-all-sync", "inject_barrier_all"),
            ("enable-hivm-inject-block-all-sync", "inject_block_all"),
            (
                "limit-auto-multi-buffer-only-for-local-buffer",
                "limit_auto_multi_buffer_only_for_local_buffer",
            ),
            ("set-workspace-multibuffer", "set_workspace_multibuffer"),
            ("tile-mix-vector-loop", "tile_mix_vector_loop"),
            ("tile-mix-cube-loop", "tile_mix_cube_loop"),
            ("limit-auto-multi-buffer-of-local-buffer", "limit_auto_multi_buffer_of_local_buffer"),
            ("disable-auto-inject-block-sync", "disable_auto_inject_block_sync"),
        )
    ]
    return [
        str(compilers_folder() / target.compiler),
        f"{folder}/kernel.mlir",
        f"--target={target.arch}",
        *(f"--{flag}={value}" for flag, value in given if value is not None),
        *target.flags,
        f"--save-temps={folder}",
        "-o",
        f"{folder}/kernel",
    ]


# What the compiler says


def planned_bytes(planned_ir: str) -> dict[str, int]:
    """Bytes that planned IR uses of each space: the largest end of a buffer.

    Args:
        planned_ir: text of `module.hivm.opt.mlir`.

    Returns:
        Bytes by space, named as in `SPACES` ("UB", ...).

    Raises:
        AscendTwinError: for a buffer whose place cannot be read, rather than leave it out.
    """
    spaces: dict[str, int] = {}
    constants: dict[str, int] = {}
    for line in planned_ir.splitlines():
        # Names are reused from function to function; a definition stands before its uses.
        if found := re.search(r"(%\w+) = (?:arith\.constant |llvm\.mlir\.constant\()(-?\d+) : i64", line):
            constants[found[1]] = int(found[2])
        if "hivm.hir.pointer_cast" not in line:
            continue
        found = re.search(
            r"pointer_cast\((.*?)\).*? : memref<((?:\d+x)*)([a-z]\w*),.*#hivm\.address_space<(\w+)>", line
        )
        if found is None or found[3] not in _BITS:
            raise AscendTwinError(f"planned IR holds a buffer that we cannot read: {line.strip()}")
        space = SPACES.get(found[4], found[4])
        size = -(-math.prod(int(dim) for dim in found[2].split("x") if dim) * _BITS[found[3]] // 8)
        for offset in found[1].split(","):  # several where the buffer is doubled
            if offset.strip() not in constants:
                raise AscendTwinError(f"planned IR holds a buffer of unknown offset: {line.strip()}")
            spaces[space] = max(spaces.get(space, 0), constants[offset.strip()] + size)
    return spaces


def memory_limits(planned_ir: str) -> dict[str, int]:
    """Bytes that the target has of each space (`SPACES`), from the target's description in planned IR."""
    sizes = dict(re.findall(r'#dlti\.dl_entry<"(\w+)_SIZE", (\d+) :', planned_ir))
    return {name: int(sizes[name]) // 8 for name in SPACES.values() if name in sizes}


def overflows(output: str) -> tuple[dict[str, int], dict[str, int]]:
    """Bytes needed, and bytes there are, of each space (`SPACES`) that the compiler says overflows."""
    needed: dict[str, int] = {}
    limits: dict[str, int] = {}
    pattern = r"(\w+) overflow, requires (\d+) bits while (\d+) bits available"
    for found in re.finditer(pattern, output):
        space, bits, available = SPACES.get(found[1], found[1]), int(found[2]), int(found[3])
        needed[space] = max(needed.get(space, 0), bits // 8)
        limits[space] = available // 8
    return needed, limits


def _warnings(output: str) -> tuple[str, ...]:
    """Its warnings and notes, each once; not those of every run (no debug info, no hivmc: there we stop)."""
    found = re.findall(r"(?:\bwarning: |\[WARNING\] *|\[NOTE\] *)(.*)", output)
    lines = (line.strip() for line in found if "hivmc" not in line and "have no location" not in line)
    return tuple(dict.fromkeys(lines))


class CompilerPool:
    """Processes that record and compile, without TRITON_INTERPRET. A context: they end with it.

    Args:
        size: processes. Default: one a core that this process may use.

    Raises:
        UnavailableError: where the compilers are not installed.
    """

    def __init__(self, size: int | None = None) -> None:
        check_installed()
        self._size = size or len(os.sched_getaffinity(0))
        self._idle: SimpleQueue[CompilerProcess] = SimpleQueue()
        self._resources = ExitStack()

    def __enter__(self) -> "CompilerPool":
        for _ in range(self._size):
            self._idle.put(self._resources.enter_context(CompilerProcess()))
        return self

    def __exit__(self, *_: object) -> None:
        self._resources.close()

    def record(self, implementation: str, shapes: Sequence[Shape]) -> dict[Shape, list[Variant]]:
        """`record_variants` of an implementation, for each of `shapes`."""
        return dict(self._map({shape: (record_variants, implementation, shape) for shape in shapes}))

    def compile(
        self, variants: Iterable[Variant], targets: Sequence[str]
    ) -> Iterator[tuple[Variant, list[Compiled]]]:
        """`compile_variant` of each of `variants`, each once, in the order in which they are done."""
        distinct = {variant.key: variant for variant in variants}
        jobs = {key: (compile_variant, variant, targets) for key, variant in distinct.items()}
        return ((distinct[key], results) for key, results in self._map(jobs))

    def _map(self, jobs: Mapping[Any, tuple[Any, ...]]) -> Iterator[tuple[Any, Any]]:
        """Call functions of this module with their arguments in the processes; yield key and result."""

        def call(job: tuple[Any, ...]) -> Any:
            worker = self._idle.get()
            try:
                return worker.call(*job)
            finally:
                self._idle.put(worker)

        with ThreadPoolExecutor(self._size) as threads:
            futures = {threads.submit(call, job): key for key, job in jobs.items()}
            try:
                for future in as_completed(futures):
                    yield futures[future], future.result()
            finally:
                threads.shutdown(wait=True, cancel_futures=True)
