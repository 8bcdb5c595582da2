"""Native code is made once, names what has none, rounds as hardware does, and no wrong compiler goes unseen.

Most need the tools of the extra `linalg` (`tox run -e ascend`) and are skipped elsewhere.
"""

import importlib
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

from ascend_twin.equivalence_tests import native_kernels
from ascend_twin.equivalence_tests.cases import PrefillCase
from ascend_twin.equivalence_tests.devices import interprets
from ascend_twin.equivalence_tests.kernel_stages import check_stage
from ascend_twin.equivalence_tests.native_agreement import Agreement
from ascend_twin.optimized.gdn import ascend_native
from ascend_twin.optimized.gdn.ascend_front_end import Variant
from ascend_twin.optimized.gdn.ascend_native import LoweringError, NativeKernels, check_native_installed
from ascend_twin.optimized.gdn.device import CpuDevice, Device
from ascend_twin.optimized.gdn.kernels.launch import Launch, launches_taken_by
from ascend_twin.optimized.gdn.native_launches import NativeLauncher, StrayAccessError
from ascend_twin.reference.errors import AscendTwinError, UnavailableError


def _why_no_tools() -> str:
    try:
        check_native_installed()
    except UnavailableError as error:
        return str(error)
    return ""


needs_tools = pytest.mark.skipif(bool(_why_no_tools()), reason=_why_no_tools())


@pytest.fixture(scope="module")
def launcher(tmp_path_factory: pytest.TempPathFactory) -> NativeLauncher:
    """A launcher with a cache that is empty at first."""
    return NativeLauncher(NativeKernels(tmp_path_factory.mktemp("cache")))


def call(launcher: Callable[[Launch], None], kernel: Any, *tensors: Any, programs: int = 1, **constants: Any):
    """Launch a kernel whose first parameters are `tensors`."""
    names = [name for name in kernel.arg_names if name not in constants]
    launcher(Launch(kernel, programs, dict(zip(names, tensors, strict=True)), constants))


def shift(kernels: NativeKernels) -> None:
    """Run the smallest kernel."""
    x, y = torch.arange(16.0), torch.zeros(16)
    call(NativeLauncher(kernels), native_kernels.shift_kernel, x, y, BT=16)
    assert torch.equal(y, x + 3)


def files(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir())


# The cache

SOURCE = """
import triton
import triton.language as tl
import constants
import constants.inner
from constants import OFFSET as DEFAULT

FACTOR = tl.constexpr(2)

@triton.jit
def helper(x, z: tl.constexpr = DEFAULT):
    return x * FACTOR + constants.inner.OFFSET

@triton.jit
def kernel(x, y, BT: tl.constexpr):
    o = tl.arange(0, BT)
    tl.store(y + o, helper(tl.load(x + o)) + constants.OFFSET)
"""
VARIANT = Variant("made:kernel", (("x", "*fp32"), ("y", "*fp32")), (("BT", 16),), (0, 1))


@pytest.fixture
def name_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """What the library of a kernel of some source is called; nothing is compiled."""

    def build(folder: Path, variant: Variant, linalg: str, *, sanitize: bool) -> Path:
        (folder / "kernel.so").write_bytes(b"code")
        return folder / "kernel.so"

    monkeypatch.setattr(ascend_native, "check_native_installed", lambda: None)
    monkeypatch.setattr(ascend_native, "_linalg", lambda kernel, variant: "linalg")
    monkeypatch.setattr(ascend_native, "_build", build)
    monkeypatch.setattr(ascend_native, "_tools", lambda: ("mlir 1", "cc 1"))
    monkeypatch.setattr(ascend_native, "_recipe", lambda: "recipe")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)  # which is taken for new within a second
    count = 0

    def name_of(source: str = SOURCE, variant: Variant = VARIANT, offset: int = 1, inner: int = 1) -> str:
        nonlocal count
        count += 1
        (tmp_path / "constants").mkdir(exist_ok=True)
        (tmp_path / "constants/__init__.py").write_text(f"OFFSET = {offset}\n")
        (tmp_path / "constants/inner.py").write_text(f"OFFSET = {inner}\n")
        (tmp_path / f"made{count}.py").write_text(source)
        module = importlib.import_module(f"made{count}")
        for name in ("constants", "constants.inner", module.__name__):
            sys.modules.pop(name, None)
        return NativeKernels(tmp_path / "cache").library(module.kernel, variant).name

    return name_of


def test_library_is_called_by_all_that_it_depends_on(
    name_of: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    name = name_of()
    assert name == name_of()
    assert name == name_of(SOURCE + "\n\n@triton.jit\ndef unused(x):\n    return x\n")
    others = {
        "kernel": name_of(SOURCE.replace("+ constants", "- constants")),
        "helper": name_of(SOURCE.replace("x * F", "x + F")),
        "constant": name_of(SOURCE.replace("constexpr(2)", "constexpr(3)")),
        "module": name_of(offset=2),
        "module in a module": name_of(inner=2),
        "default value": name_of(SOURCE.replace("= DEFAULT):", "= 3):")),
        "signature": name_of(variant=replace(VARIANT, signature=(("x", "*bf16"), ("y", "*fp32")))),
        "constants": name_of(variant=replace(VARIANT, constants=(("BT", 32),))),
        "one": name_of(variant=replace(VARIANT, constants=(("BT", 1),))),
        "true": name_of(variant=replace(VARIANT, constants=(("BT", True),))),
        "divisible": name_of(variant=replace(VARIANT, divisible=())),
    }
    monkeypatch.setattr(ascend_native, "_tools", lambda: ("mlir 2", "cc 1"))
    others["tools"] = name_of()
    monkeypatch.setattr(ascend_native, "_tools", lambda: ("mlir 1", "cc 1"))
    monkeypatch.setattr(ascend_native, "_recipe", lambda: "another")
    others["recipe"] = name_of()
    same = [what for what, other in others.items() if other == name]
    assert not same
    assert len(set(others.values())) == len(others)


NAMES = """
import enum
import types
import numpy as np
import triton
import triton.language as tl

exp = tl.exp

@triton.jit
def one(x):
    return x + 1.0

@triton.jit
def two(x):
    return x + 2.0

used = one

def number():
    return 3.0

class Class:
    SCALE = 4.0

class Mode(enum.IntEnum):
    SLOW = 5

class Object:
    def __init__(self, size):
        self.size = size

BOTH = tl.constexpr((one, 1))
LOCAL = tl.constexpr(Class)
TABLE = np.arange(2000.0)
made = types.SimpleNamespace(it=Object(6))
sizes = {"first": [7]}

@triton.jit
def kernel(x, y):
    n: tl.constexpr = 100000
    v = used(exp(tl.load(x))) + one(number()) + two(LOCAL.SCALE) + Mode.SLOW.value + made.it.size + n * n
    tl.store(y, BOTH[0](v) + getattr(Class, "MORE") + TABLE[1000] + sizes["first"][0])
"""


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("exp = tl.exp", "exp = tl.exp2"), ("used = one", "used = two"), ("return 3.0", "return 3.5"),
        ("SCALE = 4.0", "SCALE = 4.5"), ("SLOW = 5", "SLOW = 6"), ("Object(6)", "Object(7)"),
        ("(one, 1)", "(two, 1)"), ("constexpr(Class)", "constexpr(Object)"), ("2000.0)", "2000.0) // 2"),
        ("[7]", "[8]"), ("SCALE = 4.0", "SCALE = 4.0; MORE = 1"), ("n: tl.constexpr = 1", "n = 1"),
    ],
)  # fmt: skip
def test_library_is_called_by_what_each_name_of_a_kernel_means(
    old: str, new: str, name_of: Callable[..., str]
) -> None:
    assert NAMES.count(old) == 1
    assert name_of(NAMES) == name_of(NAMES)
    assert name_of(NAMES) != name_of(NAMES.replace(old, new))


@pytest.mark.parametrize("as_package", [False, True])
def test_library_is_called_by_a_kernel_in_a_module_named_as_one_of_python(
    as_package: bool, tmp_path: Path, name_of: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which is no module of Python then: `this.py`, or `this/kernels.py`."""
    folder, module = (tmp_path / "this", "this.kernels") if as_package else (tmp_path, "this")
    folder.mkdir(exist_ok=True)
    (folder / "__init__.py").touch()
    names = set()
    for factor in (2, 3):
        text = SOURCE.replace("x * FACTOR", f"x * {factor}")
        (folder / f"{module.rpartition('.')[2]}.py").write_text(text)
        for name in ("this", "this.kernels"):
            monkeypatch.delitem(sys.modules, name, raising=False)
        importlib.invalidate_caches()
        names.add(name_of(f"from {module} import kernel\n"))
    assert len(names) == 2


FACTORY = """
import triton
import triton.language as tl

def make(n):
    @triton.jit
    def kernel(y, BT: tl.constexpr):
        o = tl.arange(0, BT)
        tl.store(y + o, n + 0.0 * o)
    return kernel
"""


def test_library_is_called_by_what_a_kernel_closes_over(name_of: Callable[..., str]) -> None:
    names = {name_of(f"{FACTORY}\n\nkernel = make({n})\n") for n in (1, 2, 1)}
    assert len(names) == 2


VALUE = """
import triton
import triton.language as tl

VALUE = tl.constexpr({})

@triton.jit
def kernel(y, BT: tl.constexpr):
    o = tl.arange(0, BT)
    tl.store(y + o, VALUE + 0.0 * o)
"""


@needs_tools
def test_kernel_that_differs_from_what_its_name_imports_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else one kernel's code is kept, and shared with other processes, as another's."""
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    file = tmp_path / "changing_kernel.py"
    file.write_text(VALUE.format(1))
    module: Any = importlib.import_module("changing_kernel")
    launcher = NativeLauncher(NativeKernels(tmp_path / "cache"))

    def value_of(kernel: Any) -> float:
        y = torch.zeros(16)
        launcher(Launch(kernel, 1, {"y": y}, {"BT": 16}))
        return float(y[3])

    assert value_of(module.kernel) == 1
    module.VALUE = type(module.VALUE)(2)  # in this process alone
    with pytest.raises(LoweringError, match="kernel: who imports changing_kernel:kernel anew gets another"):
        value_of(module.kernel)
    file.write_text(VALUE.format(3))
    os.utime(file, (1, 1))
    module = importlib.reload(module)
    assert value_of(module.kernel) == 3
    old = module.kernel
    file.write_text(VALUE.format(4))
    os.utime(file, (2, 2))
    module = importlib.reload(module)
    assert value_of(module.kernel) == 4
    assert value_of(old) == 4  # the globals of a module that was loaded again are the new ones


def test_recipe_is_how_linalg_is_made_lowered_and_launched() -> None:
    recipe = ascend_native._recipe()
    for part in ("def linalg_of", "_TO_LLVM = ", "sigsetjmp", "transform.structured.interchange"):
        assert part in recipe


@needs_tools
def test_tools_are_those_that_make_code() -> None:
    tools = "\n".join(ascend_native._tools())
    for name in (*ascend_native.REQUIRED, "cc", platform.machine()):
        assert name in tools


IN_A_PROCESS = """
import sys, json, torch
from pathlib import Path
from ascend_twin.equivalence_tests import native_kernels
from ascend_twin.equivalence_tests.test_ascend_native import shift
from ascend_twin.optimized.gdn.ascend_native import NativeKernels
kernels = NativeKernels(Path(sys.argv[1]))
shift(kernels)
print(json.dumps([kernels.num_compiled, type(native_kernels.shift_kernel).__name__]))
"""


@needs_tools
def test_cache_serves_another_process_which_need_not_interpret(tmp_path: Path) -> None:
    kernels = NativeKernels(tmp_path)
    shift(kernels)
    shift(kernels)
    assert kernels.num_compiled == 1
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", IN_A_PROCESS, str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert json.loads(done.stdout or "[]") == [0, "JITFunction"], done.stderr


def in_forks(functions: list[Callable[[], None]]) -> list[int]:
    """Run each in a process of its own, all at once; their statuses."""
    children = []
    for function in functions:
        child = os.fork()
        if not child:
            status = 1
            try:
                function()
                status = 0
            finally:
                os._exit(status)
        children.append(child)
    return [os.waitpid(child, 0)[1] for child in children]


def shift_variant() -> Variant:
    name = f"{native_kernels.__name__}:shift_kernel"
    return Variant(name, (("x", "*fp32"), ("y", "*fp32")), (("BT", 16),), (0, 1))


@pytest.fixture
def lowered(monkeypatch: pytest.MonkeyPatch) -> None:
    """The linalg IR of shift_kernel, which forks would else start processes for."""
    linalg = ascend_native._linalg(native_kernels.shift_kernel, shift_variant())
    monkeypatch.setattr(ascend_native, "_linalg", lambda kernel, variant: linalg)


@needs_tools
def test_compilers_that_are_wrong_otherwise_have_libraries_of_their_own(tmp_path: Path) -> None:
    """The process keeps what it loaded under a path."""
    for offset in (1, 7, 3):
        kernels = NativeKernels(tmp_path, edit=lambda _, linalg, n=offset: linalg.replace("3.0", f"{n}.0"))
        x, y = torch.zeros(16), torch.zeros(16)
        call(NativeLauncher(kernels), native_kernels.shift_kernel, x, y, BT=16)
        assert y.unique().tolist() == [offset]
        shutil.rmtree(tmp_path)


@needs_tools
def test_fork_lowers_in_a_process_of_its_own(tmp_path: Path) -> None:
    shift(NativeKernels(tmp_path / "before"))
    processes = ascend_native._front_end.cache_info().currsize

    def lower() -> None:
        shift(NativeKernels(tmp_path / "fork"))
        assert ascend_native._front_end.cache_info().currsize == processes + 1

    assert in_forks([lower]) == [0]
    shift(NativeKernels(tmp_path / "after"))


@needs_tools
def test_processes_that_compile_the_same_at_once_leave_one_whole_library(
    lowered: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (wait, go), (count, built) = os.pipe(), os.pipe()
    build = ascend_native._build

    def build_together(*args: Any, **options: Any) -> Path:
        library = build(*args, **options)
        os.write(built, b".")
        os.read(wait, 1)  # until all have built
        return library

    monkeypatch.setattr(ascend_native, "_build", build_together)

    def compile_it() -> None:
        kernels = NativeKernels(tmp_path)
        shift(kernels)
        assert kernels.num_compiled == 1

    def let_them_go() -> None:
        for _ in range(3):
            os.read(count, 1)
        os.write(go, b"...")

    assert in_forks([compile_it, compile_it, compile_it, let_them_go]) == [0] * 4
    (library,) = files(tmp_path)
    assert library.startswith("shift_kernel-")
    kernels = NativeKernels(tmp_path)
    shift(kernels)
    assert kernels.num_compiled == 0


@needs_tools
def test_killed_compilation_leaves_nothing_that_is_taken_for_a_library(
    lowered: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(ascend_native, "_sealed", lambda content, name: os.kill(os.getpid(), signal.SIGKILL))
        assert in_forks([lambda: shift(NativeKernels(tmp_path))]) == [signal.SIGKILL]
    (left,) = files(tmp_path)
    assert left.startswith(".keeping-")
    kernels = NativeKernels(tmp_path)
    shift(kernels)
    assert kernels.num_compiled == 1


@needs_tools
@pytest.mark.parametrize(
    "damage",
    [lambda code: b"", lambda code: code[: len(code) // 2], lambda code: code.replace(b"launch", b"lunch?")],
    ids=["empty", "half", "changed"],
)
def test_broken_library_is_made_anew(damage: Callable[[bytes], bytes], lowered: None, tmp_path: Path) -> None:
    def build_and_damage() -> None:  # in a process of its own: this one then loads the other file
        shift(NativeKernels(tmp_path))
        (library,) = tmp_path.iterdir()
        code = library.read_bytes()
        library.write_bytes(damage(code))
        assert library.read_bytes() != code

    assert in_forks([build_and_damage]) == [0]
    kernels = NativeKernels(tmp_path)
    shift(kernels)
    assert kernels.num_compiled == 1


@needs_tools
def test_library_under_the_name_of_another_is_made_anew(lowered: None, tmp_path: Path) -> None:
    def build() -> None:
        shift(NativeKernels(tmp_path))
        (library,) = tmp_path.iterdir()
        library.rename(library.with_name("another-0.so"))
        library.write_bytes(library.with_name("another-0.so").read_bytes()[:-32] + bytes(32))

    assert in_forks([build]) == [0]
    kernels = NativeKernels(tmp_path)
    shift(kernels)
    assert kernels.num_compiled == 1
    assert ascend_native._is_whole(tmp_path / "another-0.so") is False


@needs_tools
@pytest.mark.parametrize("folder", ["file", "file/below", "/proc/ascend-twin"])
def test_cache_that_cannot_be_written_is_an_error(folder: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UnavailableError, match=rf"shift_kernel: .* kept in .*{folder}: .*ASCEND_TWIN_CACHE"):
        shift(NativeKernels(tmp_path / folder))


@needs_tools
def test_cache_may_be_a_relative_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    shift(NativeKernels(Path()))
    assert len(files(tmp_path)) == 1


def test_default_cache_is_where_the_user_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ASCEND_TWIN_CACHE", "/a")
    monkeypatch.setenv("XDG_CACHE_HOME", "/b")
    assert ascend_native.default_cache() == Path("/a")
    monkeypatch.setenv("ASCEND_TWIN_CACHE", "")
    assert ascend_native.default_cache() == Path("/b/ascend-twin")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/c")
    assert ascend_native.default_cache() == Path("/c/.cache/ascend-twin")


@needs_tools
def test_process_that_lowers_is_replaced_after_it_ended(tmp_path: Path) -> None:
    ascend_native._linalg(native_kernels.shift_kernel, shift_variant())
    process = ascend_native._front_end(os.getpid())._process
    process.kill()
    process.wait()
    with pytest.raises(UnavailableError, match=r"a compiling process ended with status -9"):
        ascend_native._linalg(native_kernels.shift_kernel, shift_variant())
    assert "@shift_kernel" in ascend_native._linalg(native_kernels.shift_kernel, shift_variant())


# What has no native code

REFUSED = {
    "scan_kernel": "calls triton_cumsum_0, which only CANN's runtime library has",
    "refused_kernel": "the Ascend front end refuses it: .*incompatible dimensions",
    "atomic_kernel": "atomic fadd would not be atomic",
    "histogram_kernel": r"hfusion\.histogram: op was not bufferized",
    "barrier_kernel": r"gpu\.barrier: ops with unknown memory side effects are not supported",
}


@needs_tools
@pytest.mark.parametrize("name", REFUSED)
def test_lowering_error_names_kernel_operation_and_line(name: str, launcher: NativeLauncher) -> None:
    source = Path(native_kernels.__file__).read_text().splitlines()
    begins = next(i for i, line in enumerate(source) if line.startswith(f"def {name}("))
    if name == "scan_kernel":  # its function stands before it
        begins -= 6
    line = next(i for i, line in enumerate(source, 1) if i > begins and "# here" in line)
    before = launcher.kernels.num_compiled
    with pytest.raises(LoweringError, match=rf"(?s)^{name}\b.*{REFUSED[name]}") as caught:
        call(launcher, getattr(native_kernels, name), torch.ones(16), torch.zeros(16), BT=16)
    assert isinstance(caught.value, AscendTwinError)
    places = re.findall(r"([^\s,]+\.(?:py|mlir)):(\d+)", str(caught.value))
    assert places == [(native_kernels.__file__, str(line))]
    assert launcher.kernels.num_compiled == before


@needs_tools
def test_kernel_that_nobody_can_import_is_an_error(launcher: NativeLauncher) -> None:
    with pytest.raises(AscendTwinError, match="No module named 'nowhere'"):
        launcher.kernels.library(native_kernels.shift_kernel, Variant("nowhere:kernel", (), ()))


# Numbers


def bits(x: torch.Tensor) -> np.ndarray:
    return x.view({2: torch.int16, 4: torch.int32}[x.itemsize]).numpy()


def assert_same_bits(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Every NaN is one."""
    assert actual.dtype == expected.dtype
    assert torch.equal(actual.isnan(), expected.isnan())
    differs = (bits(actual) != bits(expected)) & ~actual.isnan().numpy()
    assert not differs.any(), (actual[differs][:5], expected[differs][:5])


def hard_floats(count: int) -> torch.Tensor:
    """Float32 numbers: what is special, ties of both 16-bit types, then random bits."""
    special = [
        0x7FFFFFFF, 0xFFFFFFFF, 0x7F800001, 0x7FC00000, 0x7F800000, 0xFF800000, 0, 0x80000000, 1, 0x80000001,
        0x007FFFFF, 0x00800000, 0x7F7FFFFF, 0xFF7FFFFF, 0x7F7F7FFF, 0x7F7F8000,  # the last that is finite
        0x3F808000, 0x3F818000, 0x3F807FFF, 0x3F808001, 0xBF808000, 0xBF818000,  # ties of bfloat16
        0x00008000, 0x00018000, 0x00007FFF, 0x00008001,  # of subnormal ones
        0x3F801000, 0x3F803000, 0x3F800FFF, 0x3F801001, 0xBF801000, 0xBF803000,  # ties of float16
        0x477FE000, 0x477FEFFF, 0x477FF000, 0x33000000, 0x33000001, 0x33C00000, 0x387FC000, 0x387FE000,
    ]  # fmt: skip
    rng = np.random.default_rng(0)
    found = rng.integers(0, 2**32, count, dtype=np.uint32)
    found[: len(special)] = special
    halves = slice(len(special), count // 2)  # whose exponent float16 has, half of them ties
    found[halves] = found[halves] & 0x8FFFFFFF | 0x30000000
    found[len(special) : count // 4] &= 0xFFFFF000
    return torch.from_numpy(found.view(np.float32))


def rounded(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """x rounded to nearest, ties to even, by arithmetic on its bits or by numpy; not by torch."""
    if dtype == torch.float32:
        return x
    if dtype == torch.float16:
        with np.errstate(over="ignore"):
            return torch.from_numpy(x.numpy().astype(np.float16))
    n = x.numpy().view(np.uint32).astype(np.uint64)
    n = ((n + 0x7FFF + ((n >> 16) & 1)) >> 16).astype(np.uint16).view(np.int16)
    return torch.where(x.isnan(), torch.nan, torch.from_numpy(n).view(torch.bfloat16))


@needs_tools
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_native_code_rounds_to_nearest_even(dtype: torch.dtype, launcher: NativeLauncher) -> None:
    x = hard_floats(2**14)
    y = torch.zeros(len(x), dtype=dtype)
    call(launcher, native_kernels.round_kernel, x, y, BT=len(x))
    assert_same_bits(y, rounded(x, dtype))
    back = torch.zeros(len(x))
    call(launcher, native_kernels.round_kernel, y, back, BT=len(x))
    assert_same_bits(back, y.float())


@needs_tools
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("flushes", [False, True])
def test_native_code_rounds_each_operation_and_flushes_nothing(
    dtype: torch.dtype, flushes: bool, launcher: NativeLauncher
) -> None:
    """Also where the process that calls it flushes."""
    n = 2**12
    x, y = (hard_floats(2 * n)[torch.randperm(2 * n, generator=torch.manual_seed(i))][:n] for i in (0, 1))
    tiny = torch.finfo(dtype).tiny
    x[:64], y[:64] = torch.linspace(-3, 3, 64) * tiny, torch.linspace(0.3, 1.2, 64)
    x, y, z, scale = rounded(x, dtype), rounded(y, dtype), torch.zeros(6, n, dtype=dtype), 0.1
    torch.set_flush_denormal(flushes)
    try:
        call(launcher, native_kernels.arithmetic_kernel, x, y, z, scale, BT=n)
    finally:
        torch.set_flush_denormal(False)
    a, b, s = x.float().numpy(), y.float().numpy(), np.float32(scale)

    def each(result: np.ndarray) -> torch.Tensor:
        return rounded(torch.from_numpy(result), dtype)

    with np.errstate(all="ignore"):
        product = each(a * b)
        both = each(product.float().numpy() + b)
        expected = [each(a + b), each(a - b), product, each(a / b), both, each(s * a)]
        contracted = (a.astype(np.float64) * b + b).astype(np.float32)
    for found, wanted in zip(z, expected, strict=True):
        assert_same_bits(found, wanted)
    assert (each(contracted) != expected[4]).sum() > n // 100  # it shows
    subnormal = (expected[2] != 0) & (expected[2].abs() < tiny)
    assert subnormal.sum() >= 8


def in_order(a: torch.Tensor, b: torch.Tensor, start: torch.Tensor) -> torch.Tensor:
    """start + a b, term by term in float32."""
    total = start.clone()
    for a_k, b_k in zip(a.T.float(), b.T.float(), strict=True):
        total += a_k[:, None] * b_k  # two operations, each rounded
    return total


@needs_tools
@pytest.mark.parametrize("adds", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_native_products_are_exact_and_added_in_order_in_float32(
    dtype: torch.dtype, adds: bool, launcher: NativeLauncher
) -> None:
    M, N, K = 16, 32, 64
    rng = torch.manual_seed(0)
    a, b = (torch.randn(rows, K, generator=rng).to(dtype) for rows in (M, N))
    c = torch.randn(M, N, generator=rng)
    expected = in_order(a, b, c if adds else torch.zeros(M, N))
    backwards = in_order(a.flip(1), b.flip(1), c if adds else torch.zeros(M, N))
    call(launcher, native_kernels.dot_kernel, a, b, c, M=M, N=N, K=K, ADDS=adds)
    assert_same_bits(c, expected)
    assert (backwards != expected).sum() > M * N // 4  # order shows
    if dtype != torch.float32:
        x, y = a.double(), b.double()
        assert ((x[:, None] * y[None]).float().double() == x[:, None] * y[None]).all()


@needs_tools
def test_native_reductions_are_in_order(launcher: NativeLauncher) -> None:
    M, N = 16, 64
    x = torch.randn(M, N, generator=torch.manual_seed(0))
    x[3, 5], x[4, 9], x[4, 11] = torch.inf, -torch.inf, x[4].max()
    y = torch.zeros(4 * M + 2 * N)
    call(launcher, native_kernels.reduce_kernel, x, y, M=M, N=N)
    by_rows, by_columns = np.zeros(M, np.float32), np.zeros(N, np.float32)
    for column in x.T.numpy():
        by_rows += column
    for row in x.numpy():
        by_columns += row
    expected = [by_rows, x.max(1).values, x.min(1).values, x.numpy().argmax(1), by_columns, x.max(0).values]
    assert_same_bits(y, torch.cat([torch.as_tensor(part).float() for part in expected]))
    assert (x.flip(1).cumsum(1)[:, -1] != y[:M]).any()


@needs_tools
def test_native_functions_are_those_of_the_names(launcher: NativeLauncher) -> None:
    n = 256
    x = torch.rand(n, generator=torch.manual_seed(0)) * 4 + 2**-10
    x[:4] = torch.tensor([1.0, 2.0, 1e-30, 80.0])
    y = torch.zeros(len(native_kernels.MATH), n)
    call(launcher, native_kernels.math_kernel, x, y, BT=n)
    z = x.double()
    expected = {
        "exp": z.exp(), "exp2": z.exp2(), "log": z.log(), "log2": z.log2(), "sqrt": z.sqrt(),
        "rsqrt": z.rsqrt(), "sigmoid": z.sigmoid(), "abs_less_1": (z - 1).abs(), "floor_minus": (-z).floor(),
        "ceil_minus": (-z).ceil(), "where_above_1": torch.where(z > 1, z, -z), "at_least_1": z.clamp(min=1),
        "at_most_1": z.clamp(max=1), "sin": z.sin(), "cos": z.cos(), "erf": z.erf(), "tanh": z.tanh(),
        "softmax": z.softmax(0),
    }  # fmt: skip
    assert set(expected) == set(native_kernels.MATH)
    for name, found in zip(native_kernels.MATH, y, strict=True):
        error = (found.double() - expected[name]).abs()
        allowed = 4 * 2.0**-24 * torch.maximum(expected[name].abs(), (1e-3 * z).clamp(min=1e-38))
        assert (error <= allowed).all(), (name, x[error > allowed], found[error > allowed])


@needs_tools
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_native_integers_divide_towards_zero(dtype: torch.dtype, launcher: NativeLauncher) -> None:
    x = torch.arange(-32, 32, dtype=dtype) * 37
    y = torch.zeros(8, 64, dtype=dtype)
    call(launcher, native_kernels.integer_kernel, x, y, 7, BT=64)
    quotient = x.div(7, rounding_mode="trunc")
    ceiling = (x + 6).div(7, rounding_mode="trunc")
    expected = [quotient, x - 7 * quotient, ceiling, x & 7, x | 7, x ^ 7, x << 2, x >> 2]
    assert torch.equal(y, torch.stack(expected))


# Wrong compilers


CASE = PrefillCase((70, 0, 130), H=1, HV=2, K=24, V=40, dtype="bfloat16", padding=5)
NORMALISED = PrefillCase((70, 130), K=24, dtype="bfloat16", padding=5, use_qk_l2norm_in_kernel=True)
SQUARE = PrefillCase((70, 130), K=64, V=64, dtype="bfloat16")


class Miscompiled(NamedTuple):
    """A place of a kernel's linalg IR that a wrong compiler changes; the first that `pattern` finds.

    `found_by` is what then differs: a result of the stage, or "" where memory outside a tensor is touched.
    """

    title: str
    stage: str
    pattern: str
    replacement: str
    found_by: str
    case: PrefillCase = CASE

    def __str__(self) -> str:
        return f"{self.stage}-{self.title.replace(' ', '_')}"

    def edit(self, kernel: str, linalg: str) -> str:
        changed, count = re.subn(self.pattern, self.replacement, linalg, count=1)
        assert count == 1, f"out of date: the linalg IR of {kernel} has no {self.pattern}"
        assert changed != linalg
        return changed


WIDER = (
    r"(%\w+) = (arith\.index_cast %\w+ : i(?:32|64) to index.*)\n(.*arith\.maxsi \1, %c0)",
    r"%narrow = \2\n%one = arith.constant 1 : index\n\1 = arith.addi %narrow, %one : index\n\3",
)
TRANSPOSED = (r"permutation = \[1, 0\]", "permutation = [0, 1]")
CUT_OFF = r"""%bits = arith.bitcast \2 : tensor<\3xf32> to tensor<\3xi32>
%high = arith.constant dense<-65536> : tensor<\3xi32>
%kept = arith.andi %bits, %high : tensor<\3xi32>
%cut = arith.bitcast %kept : tensor<\3xi32> to tensor<\3xf32>
\1 = arith.truncf %cut : tensor<\3xf32> to tensor<\3xbf16>"""
NEGATED = (r"(%\w+) = math\.exp (%\w+) : (\S+)", r"%minus = arith.negf \2 : \3\n\1 = math.exp %minus : \3")
PADDING = (r"arith\.constant 0\.000000e\+00 : bf16", "arith.constant 1.000000e+00 : bf16")
ROUNDED = r"(%\w+) = arith\.truncf (%\w+) : tensor<(\S+)xf32> to tensor<\S+xbf16>"

MISCOMPILED = [
    Miscompiled("mask wider by one", "l2norm", *WIDER, "", NORMALISED),
    Miscompiled("mask wider by one", "chunk_delta_h", *WIDER, "final_state"),
    Miscompiled("mask wider by one", "chunk_fwd_o", *WIDER, "o"),
    Miscompiled("mask wider by one", "fused_inter_chunk", *WIDER, "o"),
    Miscompiled("transpose dropped", "chunk_delta_h", *TRANSPOSED, "final_state", SQUARE),
    Miscompiled("transpose dropped", "chunk_fwd_o", *TRANSPOSED, "o", SQUARE),
    Miscompiled("transpose dropped", "fused_inter_chunk", *TRANSPOSED, "final_state", SQUARE),
    Miscompiled("padding of ones", "l2norm", *PADDING, "y", NORMALISED),
    Miscompiled("padding of ones", "fused_inter_chunk", *PADDING, "o"),
    Miscompiled(
        "sum too short", "l2norm",
        r"(%\w+) = linalg\.reduce ins\((%\w+) : tensor<64x32xf32>\)",
        r"%most = tensor.extract_slice \2[0, 0] [64, 23] [1, 1] : tensor<64x32xf32> to tensor<64x23xf32>\n"
        r"\1 = linalg.reduce ins(%most : tensor<64x23xf32>)", "y", NORMALISED,
    ),
    Miscompiled("other comparison", "chunk_fwd_o", r"arith\.cmpi sge", "arith.cmpi sgt", "o"),
    Miscompiled("exp of minus x", "chunk_fwd_o", *NEGATED, "o"),
    Miscompiled("exp of minus x", "chunk_delta_h", *NEGATED, "final_state"),
    Miscompiled(
        "accumulator not cleared", "chunk_local_cumsum",
        r"(?s)((%\w+) = linalg\.matmul(?:(?!linalg\.matmul).)*linalg\.matmul.*?outs\()%\w+", r"\1\2", "rest",
    ),
    Miscompiled(
        "accumulator dropped", "chunk_fwd_o",
        r"(?s)(linalg\.matmul[^\n]*outs\((%\w+) (?:.*linalg\.matmul[^\n]*outs\())%\w+", r"\1\2", "o",
    ),
    Miscompiled("another stride", "chunk_fwd_o", r"arith\.constant 80 : i64", "arith.constant 40 : i64", "o"),
    Miscompiled("loop left early", "fused_inter_chunk", r"(scf\.for .* to )%\w+", r"\1%c1_i32", "o"),
    Miscompiled("another head", "chunk_fwd_o", r"arith\.divsi", "arith.remsi", "o"),
]  # fmt: skip


def failures(stage: str, case: PrefillCase, kernels: NativeKernels) -> list[str]:
    """What `check_stage` finds wrong with native code."""
    try:
        with launches_taken_by(NativeLauncher(kernels)):
            return [str(x) for x in check_stage(stage, case, CpuDevice()) if not x.passed]
    except StrayAccessError as error:
        return [f"{stage}.: {error}"]


@needs_tools
@pytest.mark.parametrize("miscompiled", MISCOMPILED, ids=str)
def test_check_stage_catches_a_miscompiled_kernel(
    miscompiled: Miscompiled, launcher: NativeLauncher, tmp_path: Path
) -> None:
    assert not failures(miscompiled.stage, miscompiled.case, launcher.kernels)
    wrong = failures(miscompiled.stage, miscompiled.case, NativeKernels(tmp_path, edit=miscompiled.edit))
    assert any(line.startswith(f"{miscompiled.stage}.{miscompiled.found_by}: ") for line in wrong), wrong


TRUNCATED = [
    Miscompiled("rounding towards zero", stage, ROUNDED, CUT_OFF, found_by, case)
    for stage, found_by, case in (
        ("l2norm", "y", NORMALISED),
        ("chunk_delta_h", "h", CASE),
        ("chunk_fwd_o", "o", CASE),
        ("fused_inter_chunk", "o", CASE),
    )
]


@needs_tools
@pytest.mark.parametrize("miscompiled", TRUNCATED, ids=str)
def test_interpreter_catches_a_rounding_that_is_within_the_limits(
    miscompiled: Miscompiled, device: Device, triton_runs: None, launcher: NativeLauncher, tmp_path: Path
) -> None:
    """An error twice as large is less than the limits leave for other orders of sums: bits tell."""
    if not interprets(device):
        pytest.skip("native code is compared with the interpreter: --device cpu")

    def disagreements(kernels: NativeKernels) -> set[str]:
        agreement = Agreement(NativeLauncher(kernels))
        with launches_taken_by(agreement):
            check_stage(miscompiled.stage, miscompiled.case, CpuDevice())
        assert agreement.num_launches
        return {found.parameter for found in agreement.disagreements}

    assert not disagreements(launcher.kernels)
    wrong = NativeKernels(tmp_path, edit=miscompiled.edit)
    assert miscompiled.found_by in disagreements(wrong)
    assert not failures(miscompiled.stage, miscompiled.case, wrong)
