"""Cross-compile the launches of an implementation for Ascend NPUs, with no NPU at hand.

What is compiled is what is launched: the launches of the op are recorded (`kernels/launch.py`), and a
`Variant` holds what Triton compiles a launch for. triton-ascend's front end lowers it to linalg, and
bishengir-compile, which ascendnpu-ir brings along, takes that through memory planning and synchronisation and
stops where CANN would make the binary. It leaves `module.hivm.opt.mlir` exactly when everything fits on chip,
and that file names every buffer.

The kernels of a process are either interpreted or compiled (TRITON_INTERPRET is read when they are defined),
so all of this runs in processes of its own: `CompilerPool`.

Source: steps and options of triton-ascend 3.2.0 (triton/backends/ascend/compiler.py); ascendnpu-ir 1.2.0.
"""

import importlib
import math
import os
import pickle
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from queue import SimpleQueue
from types import SimpleNamespace
from typing import IO, Any

import torch

from ...reference.errors import AscendTwinError, UnavailableError
from .models import Shape

MISSING = "install them in an environment of their own: pip install 'ascend-twin[ascend]'"
REQUIRED = ("triton-ascend", "ascendnpu-ir", "pybind11")
COMPILE_SECONDS = 60.0
"""A compile that takes longer fails; some never end (bishengir-compile-a5, tiles too large for it)."""

# Sequences of the recorded steps. They differ in all that a launch may be specialised for: one sequence and
# several, one token, numbers that 16 divides and numbers that it does not, an empty sequence.
STEPS = ((1,), (128, 64), (200, 0, 65))

SPACES = {"ub": "UB", "cbuf": "L1", "ca": "L0A", "cb": "L0B", "cc": "L0C"}
"""On-chip memories: name in the planned IR, name of the manuals."""

_BITS = {"i1": 1, "i8": 8, "i16": 16, "i32": 32, "i64": 64, "f16": 16, "bf16": 16, "f32": 32, "f64": 64}
_TYPES = {
    torch.bool: "i1", torch.uint8: "u8", torch.int8: "i8", torch.int16: "i16", torch.int32: "i32",
    torch.int64: "i64", torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32",
    torch.float64: "fp64",
}  # fmt: skip


@dataclass(frozen=True)
class Target:
    """A kind of NPU.

    Attributes:
        arch: what the compilers call it.
        compiler: the program of ascendnpu-ir that knows it.
        flags: options that triton-ascend passes for it, beside those of a launch.
        options: how a launch's options differ there from triton-ascend's defaults.
    """

    arch: str
    compiler: str = "bishengir-compile"
    flags: tuple[str, ...] = (
        "--enable-hfusion-compile=true", "--enable-hivm-compile=true", "--enable-triton-kernel-compile=true"
    )  # fmt: skip
    options: tuple[tuple[str, Any], ...] = ()


# The options that triton-ascend has for the 950 (is_compile_on_910_95).
_950 = Target(
    "Ascend950PR_9599",
    "bishengir-compile-a5",
    ("--enable-hfusion-compile=true", "--enable-triton-kernel-compile=true"),
    (
        ("compile_on_910_95", True), ("multibuffer", False), ("enable_auto_bind_sub_block", False),
        ("enable_select_analysis", True),
    ),
)  # fmt: skip

TARGETS = {
    "910B1": Target("Ascend910B1"),
    "910B4": Target("Ascend910B4"),
    "910_9392": Target("Ascend910_9392"),
    "950": _950,
}
"""By our name. The memories of 910B1 to B4 and 910_9362 to 9392 are the same, and those of all 950."""


@dataclass(frozen=True)
class Variant:
    """What Triton compiles a launch for: launches that share it share a binary.

    Attributes:
        kernel: where the kernel is, `module:name`.
        signature: type of each parameter that is known when it runs.
        constants: value of each parameter that is known when it is compiled.
        divisible: numbers of the parameters that 16 divides.
        options: keywords of the launch that are no parameters.
    """

    kernel: str
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, Any], ...]
    divisible: tuple[int, ...] = ()
    options: tuple[tuple[str, Any], ...] = ()

    @property
    def name(self) -> str:
        """The kernel's own name."""
        return self.kernel.rpartition(":")[2]

    @property
    def key(self) -> str:
        """Differs where variants differ, True and 1 included."""
        return repr(self)


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


# What a launch is compiled for


def variant_of(launch: Any) -> Variant:
    """What Triton's JIT would compile a recorded launch for.

    Args:
        launch: a `kernels.launch.Launch`.
    """
    kernel, values = launch.kernel, {**launch.arguments, **launch.constants}
    names = {p.name for p in kernel.params}
    bound = kernel.signature.bind(**{n: value for n, value in values.items() if n in names})
    bound.apply_defaults()
    signature, constants, divisible = [], [], []
    for p in kernel.params:
        value = bound.arguments[p.name]
        specialises = not p.do_not_specialize
        if p.is_constexpr:
            constants.append((p.name, value))
            continue
        signature.append((p.name, _type_of(value)))
        if value is None or (specialises and type(value) is int and value == 1):
            constants.append((p.name, value))
        elif specialises and not p.do_not_specialize_on_alignment and _divides_16(value):
            divisible.append(p.num)
    return Variant(
        f"{kernel.__module__}:{kernel.__name__}",
        tuple(signature),
        tuple(constants),
        tuple(divisible),
        tuple((n, value) for n, value in values.items() if n not in names),
    )


def _type_of(value: Any) -> str:
    """The type of a parameter, as Triton writes it in a signature."""
    if isinstance(value, torch.Tensor):
        return "*" + _TYPES[value.dtype]
    if value is None:
        return "*i8"
    if isinstance(value, bool):
        return "i1"
    if isinstance(value, float):
        return "fp32"
    if -(2**31) <= value < 2**31:
        return "i32"
    return "i64" if value < 2**63 else "u64"


def _divides_16(value: Any) -> bool:
    if isinstance(value, torch.Tensor):
        return value.data_ptr() % 16 == 0
    return isinstance(value, int) and value % 16 == 0


def record_variants(implementation: str, shape: Shape) -> list[Variant]:
    """What the op launches for `shape`, in the order of its launches; [] where it uses no Triton.

    bfloat16 as served, with and without what a caller may leave out (initial state, l2norm in the kernel).
    """
    from . import ChunkMetadataBuilder, chunk_gated_delta_rule, open_device
    from .kernels.launch import recorded_launches

    variants: dict[str, Variant] = {}
    for seq_lens in STEPS:
        T, N = sum(seq_lens), len(seq_lens)
        cu_seqlens = torch.tensor([0, *torch.tensor(seq_lens).cumsum(0).tolist()], dtype=torch.int32)
        q, k = (torch.zeros(1, T, shape.H, shape.K, dtype=torch.bfloat16) for _ in range(2))
        v = torch.zeros(1, T, shape.HV, shape.V, dtype=torch.bfloat16)
        g, beta = torch.zeros(1, T, shape.HV), torch.zeros(1, T, shape.HV, dtype=torch.bfloat16)
        initial_state = torch.zeros(N, shape.HV, shape.K, shape.V)
        for is_full in (True, False):
            builder = ChunkMetadataBuilder(open_device("cpu"), T, N, shape.HV)
            with recorded_launches() as launches:
                chunk_gated_delta_rule(
                    q, k, v, g, beta,
                    initial_state=initial_state if is_full else None,
                    output_final_state=is_full,
                    use_qk_l2norm_in_kernel=is_full,
                    prebuilt_meta=builder.build(cu_seqlens),
                    implementation=implementation,
                )  # fmt: skip
            variants.update((v.key, v) for v in map(variant_of, launches))
            if not launches:
                return []
    return list(variants.values())


# Compiling; only in a process whose Triton is triton-ascend and compiles


def compile_variant(variant: Variant, targets: Sequence[str]) -> list[Compiled]:
    """Compile a variant for each of `targets` (keys of `TARGETS`)."""
    lowered: dict[object, tuple[str, Any, str]] = {}
    results = []
    for name in targets:
        start, target = time.perf_counter(), TARGETS[name]
        if target.options not in lowered:
            lowered[target.options] = _lower(variant, target)
        linalg, options, said = lowered[target.options]
        results.append(_plan(name, linalg, options, said, start))
    return results


def _lower(variant: Variant, target: Target) -> tuple[str, Any, str]:
    """Linalg IR of a variant, options of its launch, what was said; "" and the reason where it has none."""
    front_end: Any = importlib.import_module("triton.backends.ascend.compiler")
    ir = importlib.import_module("triton._C.libtriton").ir
    npu = importlib.import_module("triton.backends.compiler").GPUTarget("npu", target.arch, 0)
    backend = front_end.AscendBackend(npu)
    options = backend.parse_options({**dict(target.options), **dict(variant.options)})
    facts = {"target": npu, "hash": "", **vars(options)}
    if unknown := [name for name, _ in variant.options if name not in facts]:
        return (
            "",
            options,
            f"{unknown[0]} is neither a parameter of the kernel nor an option of triton-ascend",
        )
    with _listening(front_end) as said:
        try:
            context = ir.context()
            ir.load_dialects(context)
            backend.load_dialects(context)
            mlir = _source(variant, front_end).make_ir(
                options, backend.get_codegen_implementation(), backend.get_module_map(), context
            )
            mlir = front_end.make_ttir(mlir, facts, options)
            linalg = front_end.ttir_to_linalg(mlir, facts, options, named_ops=True)
        except subprocess.CalledProcessError as error:
            return "", options, _errors(error.stderr.decode(errors="replace"))
        except Exception as error:  # whatever a kernel that Triton refuses meets
            return "", options, f"{type(error).__name__}: {error}"
    return front_end._parse_linalg_metadata(linalg, facts)[0], options, "".join(said)


def _source(variant: Variant, front_end: Any) -> Any:
    """The variant as triton-ascend takes it."""
    module, _, name = variant.kernel.partition(":")
    kernel, constants = getattr(importlib.import_module(module), name), dict(variant.constants)
    ones = [p.num for p in kernel.params if not p.is_constexpr and constants.get(p.name) == 1]
    hints = {**dict.fromkeys(variant.divisible, 16), **dict.fromkeys(ones, 1)}
    attributes = front_end.AscendAttrsDescriptor.from_hints(hints)
    source = importlib.import_module("triton.compiler.compiler").ASTSource
    return source(kernel, dict(variant.signature), constants, attributes)


@contextmanager
def _listening(front_end: Any) -> Iterator[list[str]]:
    """What triton-ascend's lowering tool says, which its front end drops."""
    said: list[str] = []

    def run(*args: Any, **kwargs: Any) -> Any:
        done = subprocess.run(*args, **kwargs)
        said.append(done.stderr.decode(errors="replace"))
        return done

    front_end.subprocess = SimpleNamespace(run=run)
    try:
        yield said
    finally:
        front_end.subprocess = subprocess


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
        return Compiled(name, False, needed, limits, _errors(output), warnings, seconds)
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
        str(_compilers_folder() / target.compiler),
        f"{folder}/kernel.mlir",
        f"--target={target.arch}",
        *(f"--{flag}={value}" for flag, value in given if value is not None),
        *target.flags,
        f"--save-temps={folder}",
        "-o",
        f"{folder}/kernel",
    ]


def _compilers_folder() -> Path:
    file = importlib.import_module("ascendnpuir").__file__
    assert file is not None
    return Path(file).parent / "bin"


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


def _errors(output: str) -> str:
    """What matters of the compiler's output where it failed: its errors, else its last lines."""
    errors = [line.partition("error: ")[2].strip() for line in output.splitlines() if "error: " in line]
    kept = [error for error in dict.fromkeys(errors) if not re.match(r"Failed to run \w+ pipelines?$", error)]
    return "\n".join(kept or output.strip().splitlines()[-20:])


def _warnings(output: str) -> tuple[str, ...]:
    """Its warnings and notes, each once; not those of every run (no debug info, no hivmc: there we stop)."""
    found = re.findall(r"(?:\bwarning: |\[WARNING\] *|\[NOTE\] *)(.*)", output)
    lines = (line.strip() for line in found if "hivmc" not in line and "have no location" not in line)
    return tuple(dict.fromkeys(lines))


# Processes that compile


def check_installed() -> None:
    """Raise UnavailableError, saying what to install, where the compilers are not installed."""
    missing = []
    for name in REQUIRED:
        try:
            metadata.version(name)
        except metadata.PackageNotFoundError:
            missing.append(name)
    if missing:
        raise UnavailableError(f"compiling for Ascend needs {' and '.join(missing)}: {MISSING}")
    with suppress(metadata.PackageNotFoundError):
        version = metadata.version("triton")
        raise UnavailableError(
            f"triton {version} is installed over triton-ascend, whose package has the same name: {MISSING}"
        )


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
        self._idle: SimpleQueue[_Worker] = SimpleQueue()
        self._resources = ExitStack()

    def __enter__(self) -> "CompilerPool":
        for _ in range(self._size):
            self._idle.put(self._resources.enter_context(_Worker()))
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


class _Worker:
    """One process that answers calls of functions of this module. A context: it ends with it."""

    def __enter__(self) -> "_Worker":
        environment = {n: value for n, value in os.environ.items() if n != "TRITON_INTERPRET"}
        self._stderr: IO[bytes] = tempfile.TemporaryFile()
        self._process = subprocess.Popen(
            [sys.executable, "-c", f"from {__name__} import _serve; _serve()"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            env={"OMP_NUM_THREADS": "1", **environment},
        )
        return self

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        self._process.communicate()
        self._stderr.close()

    def call(self, function: Callable[..., Any], *args: Any) -> Any:
        """What `function(*args)` returns or raises over there.

        Raises:
            UnavailableError: where the process ends instead of answering.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            pickle.dump((function.__name__, args), self._process.stdin)
            self._process.stdin.flush()
            succeeded, answer = pickle.load(self._process.stdout)
        except (EOFError, BrokenPipeError) as error:
            status = self._process.wait()
            self._stderr.seek(0)
            last = "".join(self._stderr.read().decode(errors="replace").splitlines()[-1:])
            raise UnavailableError(f"a compiling process ended with status {status}: {last}") from error
        if not succeeded:
            raise answer
        return answer


def _serve() -> None:
    """Answer calls from stdin on stdout, until stdin ends."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what others print must not get among the answers
    functions = {f.__name__: f for f in (record_variants, compile_variant)}
    while True:
        try:
            name, args = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        try:
            answer = (True, functions[name](*args))
        except AscendTwinError as error:
            answer = (False, error)
        except Exception as error:
            answer = (False, AscendTwinError(f"{type(error).__name__}: {error}"))
        pickle.dump(answer, answers)
        answers.flush()
