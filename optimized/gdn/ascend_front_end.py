"""From a launch to the linalg IR that triton-ascend's front end makes of it, with no NPU at hand.

A `Variant` holds what Triton compiles a launch for. Its linalg IR is what `ascend_compile` takes through
memory planning and `ascend_native` to native code.

The kernels of a process are either interpreted or compiled (TRITON_INTERPRET is read when they are defined),
so whatever lowers runs in processes of its own: `CompilerProcess`.

Source: steps and options of triton-ascend 3.2.0 (triton/backends/ascend/compiler.py).
"""

import functools
import importlib
import numbers
import os
import pickle
import re
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import IO, Any
from unittest import mock

import numpy as np
import torch

from ...reference.errors import AscendTwinError, InvalidArgumentError, UnavailableError, invalid_argument
from .kernel_identity import kernel_identity
from .models import Shape

MISSING = "install them in an environment of their own: pip install 'ascend-twin[ascend]'"
REQUIRED = ("triton-ascend", "ascendnpu-ir", "pybind11")
SOURCE = Path(__file__).read_text(encoding="utf-8")
"""Of this module, as it was imported."""

# Sequences of the recorded steps. They differ in all that a launch may be specialised for: one sequence and
# several, one token, numbers that 16 divides and numbers that it does not, an empty sequence.
STEPS = ((1,), (128, 64), (200, 0, 65))

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


# What a launch is compiled for


def variant_of(launch: Any) -> Variant:
    """What Triton's JIT would compile a recorded launch for.

    Args:
        launch: a `kernels.launch.Launch`.

    Raises:
        InvalidArgumentError: where Triton has no type for an argument, or as `arguments_of` does.
    """
    kernel, values = _as_compiled(launch.kernel), {**launch.arguments, **launch.constants}
    names, given = {p.name for p in kernel.params}, arguments_of(launch)
    signature, constants, divisible = [], [], []
    for p in kernel.params:
        value = given[p.name]
        specialises = not p.do_not_specialize
        if p.is_constexpr:
            constants.append((p.name, value))
            continue
        signature.append((p.name, _type_of_parameter(p, value)))
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


def arguments_of(launch: Any) -> dict[str, Any]:
    """The value of each parameter of a recorded launch, defaults included.

    Raises:
        InvalidArgumentError: where its kernel is none, or a parameter has no value.
    """
    kernel, values = _as_compiled(launch.kernel), {**launch.arguments, **launch.constants}
    names = {p.name for p in kernel.params}
    try:
        bound = kernel.signature.bind(**{n: value for n, value in values.items() if n in names})
    except TypeError as error:
        raise InvalidArgumentError(f"{kernel.__name__}: {error}") from error
    bound.apply_defaults()
    return bound.arguments


def _as_compiled(kernel: Any) -> Any:
    """A kernel as `triton.jit` makes it where it compiles, also where it interprets."""
    if hasattr(kernel, "params"):
        return kernel
    if not hasattr(kernel, "rewriter"):
        invalid_argument("kernel", type(kernel).__name__, "what triton.jit makes, with no other decorator")
    return _compiled_twin(kernel)


@functools.cache
def _compiled_twin(kernel: Any) -> Any:
    jit_function = importlib.import_module("triton").runtime.JITFunction
    return jit_function(kernel.fn, **kernel.rewriter.kwargs)


def _type_of_parameter(parameter: Any, value: Any) -> str:
    """The type that a parameter is annotated with, where that is one of integers; else that of its value."""
    kind = _type_of(value)
    annotated = re.fullmatch(r"([iu])(\d+)", parameter.annotation_type)
    if annotated is None or value is None or isinstance(value, torch.Tensor):
        return kind
    bits = int(annotated[2])
    least, end = (-(2 ** (bits - 1)), 2 ** (bits - 1)) if annotated[1] == "i" else (0, 2**bits)
    if kind == "fp32" or not least <= value < end:
        invalid_argument(parameter.name, value, f"{least} to {end - 1}: it is annotated as {annotated[0]}")
    return annotated[0]


def _type_of(value: Any) -> str:
    """The type of a value, as Triton writes it in a signature."""
    if isinstance(value, torch.Tensor):
        if value.dtype not in _TYPES:
            invalid_argument("dtype of a kernel's tensor", value.dtype, ", ".join(map(str, _TYPES)))
        return "*" + _TYPES[value.dtype]
    if value is None:
        return "*i8"
    if isinstance(value, (bool, np.bool_)):
        return "i1"
    if isinstance(value, numbers.Integral):
        whole = int(value)
        if not -(2**63) <= whole < 2**64:
            invalid_argument("number of a kernel", whole, "-2**63 to 2**64 - 1")
        if -(2**31) <= whole < 2**31:
            return "i32"
        return "i64" if whole < 2**63 else "u64"
    if isinstance(value, numbers.Real):
        return "fp32"
    invalid_argument("argument of a kernel", type(value).__name__, "tensors, numbers, bool, None")


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


# Lowering; only in a process whose Triton is triton-ascend and compiles


def lower(variant: Variant, target: Target) -> tuple[str, Any, str]:
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
            return "", options, errors_in(error.stderr.decode(errors="replace"))
        except Exception as error:  # whatever a kernel that Triton refuses meets
            return "", options, f"{_place_of(error)}{type(error).__name__}: {error}"
    return front_end._parse_linalg_metadata(linalg, facts)[0], options, "".join(said)


def _place_of(error: BaseException) -> str:
    """File and line of the kernel, or of a function that it calls, at which Triton met an error."""
    while error.__cause__ is not None:
        error = error.__cause__
    for frame, _ in reversed(list(traceback.walk_tb(error.__traceback__))):
        generator: Any = frame.f_locals.get("self")
        if hasattr(generator, "begin_line") and generator.cur_node is not None:
            return f"{generator.file_name}:{generator.begin_line + generator.cur_node.lineno}: "
    return ""


def linalg_of(variant: Variant) -> tuple[str, str, str]:
    """Linalg IR of a variant for a 910B, with each operation's line in the kernel, and what was lowered.

    Returns:
        The IR, or ""; why there is none, or ""; the `identity_of` what has the variant's name here.
    """
    identity = identity_of(_kernel_of(variant))
    with mock.patch.dict(os.environ, {"TRITON_DISABLE_LINE_INFO": "0"}):
        linalg, _, said = lower(variant, TARGETS["910B1"])
    return linalg, "" if linalg else said, identity


def identity_of(kernel: Any) -> str:
    """What `linalg_of` makes its IR of: a kernel, and this module, each as it was imported."""
    return kernel_identity(kernel) + SOURCE


def _kernel_of(variant: Variant) -> Any:
    """The kernel that has the variant's name in this process."""
    module, _, name = variant.kernel.partition(":")
    importlib.invalidate_caches()  # of folders: a module may have come since
    try:
        kernel = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise AscendTwinError(
            f"{name} must be in a module, under its own name, to be compiled: {error}"
        ) from error
    if not hasattr(kernel, "params"):
        raise AscendTwinError(f"{variant.kernel} is {type(kernel).__name__}; allowed: what triton.jit makes")
    return kernel


def _source(variant: Variant, front_end: Any) -> Any:
    """The variant as triton-ascend takes it."""
    kernel, constants = _kernel_of(variant), dict(variant.constants)
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


def compilers_folder() -> Path:
    file = importlib.import_module("ascendnpuir").__file__
    assert file is not None
    return Path(file).parent / "bin"


def errors_in(output: str) -> str:
    """What matters of the compiler's output where it failed: its errors, else its last lines."""
    errors = [line.partition("error: ")[2].strip() for line in output.splitlines() if "error: " in line]
    kept = [error for error in dict.fromkeys(errors) if not re.match(r"Failed to run \w+ pipelines?$", error)]
    return "\n".join(kept or output.strip().splitlines()[-20:])


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


class CompilerProcess:
    """One process that answers calls of functions of this module. A context: it ends with it."""

    def __enter__(self) -> "CompilerProcess":
        environment = {n: value for n, value in os.environ.items() if n != "TRITON_INTERPRET"}
        self._stderr: IO[bytes] = tempfile.TemporaryFile()
        serve = f"from {__name__} import _serve"
        flags = subprocess._args_from_interpreter_flags()  # pyright: ignore[reportAttributeAccessIssue]
        self._process = subprocess.Popen(
            [sys.executable, *flags, "-c", f"import sys; sys.path[:] = {sys.path!r}; {serve}; _serve()"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            env={"OMP_NUM_THREADS": "1", **environment},
            start_new_session=True,  # Ctrl-C is for who calls, and may be handled there
        )
        return self

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        self._process.communicate()
        self._stderr.close()

    def call(self, function: Callable[..., Any], *args: Any) -> Any:
        """What `function(*args)` returns or raises over there.

        Raises:
            InvalidArgumentError: where an argument cannot be sent.
            UnavailableError: where the process ends instead of answering.
        """
        try:
            question = pickle.dumps((function, args))
        except (pickle.PicklingError, TypeError, AttributeError) as error:
            raise InvalidArgumentError(f"what is compiled cannot be sent to the compiler: {error}") from error
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            pickle.dump(sys.path, self._process.stdin)  # first: by it the function is found
            self._process.stdin.write(question)
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
    while True:
        try:
            sys.path[:] = pickle.load(sys.stdin.buffer)
            function, args = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        try:
            answer = (True, function(*args))
        except AscendTwinError as error:
            answer = (False, error)
        except Exception as error:
            answer = (False, AscendTwinError(f"{type(error).__name__}: {error}"))
        pickle.dump(answer, answers)
        answers.flush()
