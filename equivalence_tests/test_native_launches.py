"""Native launches touch their tensors alone, or say where they did not, and run each program once.

Most need the tools of the extra `linalg` (`tox run -e ascend`) and are skipped elsewhere.
"""

import faulthandler
import os
import platform
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from ascend_twin.equivalence_tests import native_kernels
from ascend_twin.equivalence_tests.cases import PrefillCase
from ascend_twin.equivalence_tests.kernel_stages import StageCase, check_stage, run_stage
from ascend_twin.optimized.gdn.ascend_native import NativeKernels, check_native_installed
from ascend_twin.optimized.gdn.device import CpuDevice
from ascend_twin.optimized.gdn.kernels.launch import Launch, launches_taken_by
from ascend_twin.optimized.gdn.native_launches import NativeLauncher, StrayAccessError, _bits_of
from ascend_twin.reference.errors import AscendTwinError, InvalidArgumentError, UnavailableError

N = 20
"""Elements of the tensors here; the block of a program is larger."""


@pytest.fixture(scope="module")
def launcher(tmp_path_factory: pytest.TempPathFactory) -> NativeLauncher:
    """A launcher with a cache that is empty at first; skips where the tools are not installed."""
    try:
        check_native_installed()
    except UnavailableError as error:
        pytest.skip(str(error))
    return NativeLauncher(NativeKernels(tmp_path_factory.mktemp("cache")))


@pytest.fixture(params=[1, 4])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(1)


def call(launcher: Callable[[Launch], None], kernel: Any, *values: Any, programs: int = 1, **constants: Any):
    """Launch a kernel whose first parameters are `values`."""
    names = [name for name in kernel.arg_names if name not in constants]
    launcher(Launch(kernel, programs, dict(zip(names, values, strict=True)), constants))


def copy(
    launcher: NativeLauncher,
    x: torch.Tensor,
    y: torch.Tensor,
    *,
    n: int = N,
    m: int = N,
    stride_x: int | None = None,
    stride_y: int | None = None,
) -> None:
    stride_x = x.stride(0) if stride_x is None else stride_x
    stride_y = y.stride(0) if stride_y is None else stride_y
    call(launcher, native_kernels.copy_kernel, x, y, n, m, stride_x, stride_y, BT=32)


def pick(launcher: NativeLauncher, indices: list[int], programs: int | None = None) -> torch.Tensor:
    y = torch.zeros(len(indices))
    x, i = torch.arange(8.0), torch.tensor(indices)
    call(launcher, native_kernels.pick_kernel, x, i, y, programs=programs or len(indices))
    return y


def counting(dtype: torch.dtype = torch.float32, n: int = N) -> torch.Tensor:
    return torch.arange(1, n + 1).to(dtype)


# Redzones

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.int32, torch.int64, torch.int8]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_launch_touches_what_its_masks_allow(dtype: torch.dtype, launcher: NativeLauncher) -> None:
    x, y = counting(dtype), torch.zeros(N, dtype=dtype)
    copy(launcher, x, y)
    assert torch.equal(y, counting(dtype))
    assert torch.equal(x, counting(dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_store_without_a_mask_is_found(dtype: torch.dtype, launcher: NativeLauncher) -> None:
    x, y = counting(dtype), torch.zeros(N, dtype=dtype)
    with pytest.raises(StrayAccessError, match=r"^copy_kernel: writes element 20 of y, which has 0 to 19$"):
        copy(launcher, x, y, m=32)
    assert torch.equal(y, counting(dtype))  # what it wrote inside


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_copy_of_memory_behind_one_tensor_to_memory_behind_another_is_found(
    dtype: torch.dtype, launcher: NativeLauncher
) -> None:
    with pytest.raises(StrayAccessError, match="writes element 20 of y"):
        copy(launcher, counting(dtype), torch.zeros(N, dtype=dtype), n=32, m=32)


def test_write_before_the_first_element_is_found(launcher: NativeLauncher) -> None:
    with pytest.raises(StrayAccessError, match=r"writes element -19 of y, which has 0 to 19$"):
        copy(launcher, counting(), torch.zeros(N), stride_y=-1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_read_behind_a_tensor_is_not_a_number(dtype: torch.dtype, launcher: NativeLauncher) -> None:
    y = torch.zeros(32, dtype=dtype)
    copy(launcher, counting(dtype), y, n=32, m=32)
    assert torch.equal(y[:N], counting(dtype))
    assert y[N:].isnan().all()


@pytest.mark.parametrize("dtype", [torch.int8, torch.int32, torch.int64], ids=str)
def test_read_behind_a_tensor_of_integers_is_far_below_zero(
    dtype: torch.dtype, launcher: NativeLauncher
) -> None:
    y = torch.zeros(32, dtype=dtype)
    copy(launcher, counting(dtype), y, n=32, m=32)
    assert (y[N:].double() < torch.iinfo(dtype).min / 1.5).all()


def test_loop_to_an_end_that_is_not_there_does_not_run(launcher: NativeLauncher) -> None:
    x, ends, y = counting(), torch.tensor([N, 7], dtype=torch.int32), torch.tensor(5.0)
    call(launcher, native_kernels.sum_up_to_kernel, x, ends, y)
    assert y == N * (N + 1) // 2
    call(launcher, native_kernels.sum_up_to_kernel, x, ends[:0], y)
    assert y == 0


def test_index_that_is_not_there_is_found(launcher: NativeLauncher) -> None:
    assert pick(launcher, [3, 1, 7]).tolist() == [3, 1, 7]
    with pytest.raises(StrayAccessError, match=r"^pick_kernel, program 3: touches memory that is not mapped"):
        pick(launcher, [3, 1, 7], programs=4)


@pytest.mark.parametrize(
    ("index", "place"),
    [
        (2**31, "element 2147483648 as seen from x"),
        (-(2**31), "element -2147483648 as seen from x"),
        (2**60, "where none can be"),
    ],
)
def test_access_of_memory_that_is_not_mapped_is_an_error_and_no_end(
    index: int, place: str, threads: int, launcher: NativeLauncher
) -> None:
    for _ in range(3):
        with pytest.raises(StrayAccessError, match=rf"^pick_kernel, program 2: .* not mapped, {place}$"):
            pick(launcher, [1, 2, index, 3])
        assert pick(launcher, [1, 2, 3]).tolist() == [1, 2, 3]


def test_error_that_is_kept_keeps_no_addresses(launcher: NativeLauncher) -> None:
    def reserved() -> int:
        status = Path("/proc/self/status").read_text(encoding="utf-8")
        return int(status.partition("VmSize:")[2].split()[0]) >> 20  # GiB

    before, errors = reserved(), []
    for _ in range(20):
        with pytest.raises(StrayAccessError) as caught:
            pick(launcher, [2**20])
        errors.append(caught.value)
    assert reserved() - before < 32  # a tensor has as many


def test_no_index_of_32_bits_leads_to_memory_of_others(launcher: NativeLauncher) -> None:
    for power in range(15, 32):
        for index in (2**power, -(2**power)):
            with pytest.raises(StrayAccessError, match=f"not mapped, element {index} as seen from x"):
                pick(launcher, [index])


@pytest.mark.skipif(platform.machine() != "x86_64", reason="other CPUs make 0 of it")
def test_division_by_zero_is_an_error_and_no_end(threads: int, launcher: NativeLauncher) -> None:
    x, y = torch.tensor([1, 0, 3], dtype=torch.int32), torch.zeros(3, dtype=torch.int32)
    with pytest.raises(AscendTwinError, match=r"^divide_kernel, program 1: divides an integer by zero$"):
        call(launcher, native_kernels.divide_kernel, x, y, programs=3)
    x[1] = 2
    call(launcher, native_kernels.divide_kernel, x, y, programs=3)
    assert y.tolist() == [7, 3, 2]


# Tensors as they come


def test_gaps_of_a_tensor_are_read_as_nan_and_may_not_be_written(launcher: NativeLauncher) -> None:
    """Rows of a projection, say: what lies between them is another tensor's."""
    memory = torch.zeros(2, N, 2)
    x, y = memory[0, :, 0], memory[1, :, 0]
    x.copy_(counting())
    copy(launcher, x, y)
    assert torch.equal(y, counting())
    assert not memory[:, :, 1].any()
    copy(launcher, x, y, m=3, stride_x=1)
    assert y[:3].isnan().tolist() == [False, True, False]
    with pytest.raises(StrayAccessError, match=r"writes element 1 of y, which has 0 to 38 with gaps$"):
        copy(launcher, x, y, stride_y=1)
    assert not memory[:, :, 1].any()


def test_tensors_between_each_others_elements_are_apart(launcher: NativeLauncher) -> None:
    memory = torch.zeros(2 * N)
    x, y = memory[::2], memory[1::2]
    x.copy_(counting())
    copy(launcher, x, y)
    assert torch.equal(memory.view(N, 2), counting()[:, None].expand(N, 2))


def test_one_tensor_may_be_two_arguments(launcher: NativeLauncher) -> None:
    x = counting(n=16)
    call(launcher, native_kernels.shift_kernel, x, x, BT=16)
    assert torch.equal(x, counting(n=16) + 3)


def test_part_of_a_tensor_that_is_written_may_be_no_other_argument(launcher: NativeLauncher) -> None:
    """Copies would not see what the other writes."""
    memory = counting(n=2 * N)
    with pytest.raises(
        InvalidArgumentError, match="copy_kernel: x is in memory of y, which it writes; allowed"
    ):
        copy(launcher, memory[:N], memory[5:][:N])
    assert torch.equal(memory, counting(n=2 * N))
    total = torch.zeros(())
    ends = torch.tensor([N], dtype=torch.int32)
    call(launcher, native_kernels.sum_up_to_kernel, memory, ends, total)  # what is read may overlap
    assert total == N * (N + 1) // 2


def test_tensor_may_repeat_its_elements(launcher: NativeLauncher) -> None:
    y = torch.zeros(N)
    copy(launcher, torch.tensor([4.0]).expand(N), y)
    assert torch.equal(y, torch.full((N,), 4.0))


def test_tensor_may_have_no_elements_or_no_dimensions(launcher: NativeLauncher) -> None:
    copy(launcher, torch.zeros(0), torch.zeros(0), n=0, m=0)
    with pytest.raises(StrayAccessError, match="writes element 0 of y, which has 0 to -1"):
        copy(launcher, counting(), torch.zeros(0), m=1)
    y = torch.tensor(0.0)
    call(launcher, native_kernels.sum_up_to_kernel, counting(), torch.tensor([3], dtype=torch.int32), y)
    assert y == 6


def test_inputs_are_not_written_to_even_with_what_they_hold(launcher: NativeLauncher) -> None:
    with torch.inference_mode():
        x = counting()
    y = torch.zeros(N)
    copy(launcher, x, y)  # a write to x would raise
    assert torch.equal(y, counting())


@pytest.mark.parametrize(
    ("number", "bits"),
    [
        (1.5, 0x3FC00000),
        (-0.0, -(2**31)),
        (1e300, 0x7F800000),
        (1e-45, 1),
        (True, 1),
        (-7, -7),
        (2**40, 2**40),
    ],
)
def test_numbers_reach_native_code_as_float32_or_whole(number: float, bits: int) -> None:
    assert _bits_of(number) == bits


@pytest.mark.parametrize(
    ("num_programs", "x", "message"),
    [
        (-1, torch.zeros(N), r"num_programs is -1; allowed: 0 to 2\*\*30"),
        (2**40, torch.zeros(N), "num_programs is 1099511627776; allowed"),
        ((3,), torch.zeros(N), r"num_programs is \(3,\); allowed"),
        (1, torch.zeros(N, device="meta"), r"x is a tensor on meta, torch.strided; allowed: on the CPU"),
        (1, torch.zeros(N).to_sparse(), r"x is a tensor on cpu, torch.sparse_coo; allowed: on the CPU"),
    ],
)
def test_launch_that_cannot_be_is_refused_before_it_is_compiled(
    num_programs: Any,
    x: torch.Tensor,
    message: str,
    launcher: NativeLauncher,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(launcher, "kernels", None)
    arguments = {"x": x, "y": torch.zeros(N), "n": N, "m": N, "stride_x": 1, "stride_y": 1}
    with pytest.raises(InvalidArgumentError, match=message):
        launcher(Launch(native_kernels.copy_kernel, num_programs, arguments, {"BT": 32}))


# Masks of the op's kernels

CASE = PrefillCase((70,), H=1, HV=2, K=16, V=24, dtype="bfloat16")


def without_mask(of: str) -> Callable[[str, str], str]:
    """An edit of chunk_fwd_o that lets it load v_new, or store o, in whole chunks."""

    def edit(kernel: str, linalg: str) -> str:
        loads, store, stores = linalg.partition(" = tensor.extract_slice")
        parts = {"load": loads, "store": store + stores}
        parts[of], count = re.subn(r"\[%\w+, 24\]", "[64, 24]", parts[of])
        assert count == 2, f"out of date: {kernel} has {count} masks of 24 columns"
        parts[of] = parts[of].replace("?x24x", "64x24x")
        return "".join(parts.values())

    return edit


@pytest.mark.parametrize(
    ("of", "found"),
    [
        ("load", r"chunk_fwd_o\.o: NaN in 288 of 3360 values, first at \[0, 64, 0, 0\]"),
        ("store", r"chunk_fwd_o_kernel: writes element 3360 of o, which has 0 to 3359"),
    ],
)
def test_kernel_of_the_op_without_a_mask_is_found(
    of: str, found: str, launcher: NativeLauncher, tmp_path: Path
) -> None:
    def failures(kernels: NativeKernels) -> list[str]:
        try:
            with launches_taken_by(NativeLauncher(kernels)):
                return [str(x) for x in check_stage("chunk_fwd_o", CASE, CpuDevice()) if not x.passed]
        except StrayAccessError as error:
            return [str(error)]

    assert not failures(launcher.kernels)
    (wrong,) = failures(NativeKernels(tmp_path, edit=without_mask(of)))
    assert re.match(found, wrong), wrong


def test_stage_computes_the_same_where_rows_have_gaps(launcher: NativeLauncher) -> None:
    """q, k and v as views of one projection."""

    def of_projection(name: str, x: torch.Tensor) -> torch.Tensor:
        around = torch.full((*x.shape[:-1], 3 * x.shape[-1]), torch.nan, dtype=x.dtype)
        view = around[..., x.shape[-1] : 2 * x.shape[-1]]
        view.copy_(x)
        return view if name in ("q", "k", "initial_state") else x

    case = StageCase(CASE)
    with launches_taken_by(launcher):
        expected = run_stage("chunk_delta_h", case, CpuDevice())
        found = run_stage("chunk_delta_h", case, CpuDevice(), layout=of_projection)
    for name, x in expected.items():
        assert torch.equal(found[name], x), name


# Threads and processes


@pytest.mark.parametrize("programs", [1, 3, 70_000])
def test_each_program_runs_once(programs: int, threads: int, launcher: NativeLauncher) -> None:
    y = torch.zeros(programs, dtype=torch.int32)
    call(launcher, native_kernels.count_kernel, y, programs=programs)
    assert (y == 1).all()


def test_threads_do_not_change_a_bit(launcher: NativeLauncher) -> None:
    case = StageCase(PrefillCase((70, 0, 130, 65), H=1, HV=4, K=16, V=24, dtype="bfloat16"))
    found = []
    for count in (1, 2, 4):
        torch.set_num_threads(count)
        with launches_taken_by(launcher):
            found.append(run_stage("chunk_delta_h", case, CpuDevice()))
    torch.set_num_threads(1)
    for results in found[1:]:
        for name, x in results.items():
            assert torch.equal(x, found[0][name]), name


def in_fork(function: Callable[[], None]) -> int:
    """How a process of its own that runs the function ends, within two minutes."""
    child = os.fork()
    if not child:
        status = 1
        try:
            signal.alarm(120)
            function()
            status = 0
        finally:
            os._exit(status)
    return os.waitpid(child, 0)[1]


def wait(launcher: NativeLauncher, n: int, index: int = 0) -> None:
    y = torch.zeros(())
    call(launcher, native_kernels.wait_kernel, torch.zeros(1), torch.tensor(index), y, n)
    assert y == 2


def test_fork_beside_a_launch_launches(launcher: NativeLauncher) -> None:
    stopped = threading.Event()

    def launch() -> None:
        assert pick(launcher, [1, 2]).tolist() == [1, 2]

    def launch_on() -> None:
        while not stopped.wait(1e-3):
            launch()

    thread = threading.Thread(target=launch_on)
    thread.start()
    try:
        assert [in_fork(launch) for _ in range(5)] == [0] * 5
    finally:
        stopped.set()
        thread.join()


def fault(file: Path, before: Callable[[], None]) -> Callable[[], None]:
    def run() -> None:
        with file.open("w") as log:
            faulthandler.enable(log)
            before()
            os.kill(os.getpid(), signal.SIGSEGV)

    return run


def test_fault_after_a_launch_is_reported_as_before_it(launcher: NativeLauncher, tmp_path: Path) -> None:
    def before() -> None:
        with pytest.raises(StrayAccessError):
            pick(launcher, [2**60])

    pick(launcher, [1])
    assert in_fork(fault(tmp_path / "log", before)) & 0x7F == signal.SIGSEGV
    assert "Fatal Python error: Segmentation fault" in (tmp_path / "log").read_text()


def test_fault_of_another_thread_during_a_launch_is_reported_as_before_it(
    launcher: NativeLauncher, tmp_path: Path
) -> None:
    wait(launcher, 100)
    begun = threading.Event()

    def launch() -> None:
        begun.set()
        wait(launcher, 2**30 + 4)

    def before() -> None:
        threading.Thread(target=launch, daemon=True).start()
        begun.wait()
        time.sleep(0.2)

    assert in_fork(fault(tmp_path / "log", before)) & 0x7F == signal.SIGSEGV
    text = (tmp_path / "log").read_text()
    assert "Fatal Python error: Segmentation fault" in text
    assert "in launch" in text  # which still ran


def test_launches_of_python_threads_do_not_meet(launcher: NativeLauncher, tmp_path: Path) -> None:
    """Handlers of signals are those of the process: no launch takes them from another, or leaves its own."""
    wait(launcher, 100)

    def work(i: int) -> None:
        other = NativeLauncher(launcher.kernels)
        time.sleep(0.005 * i)
        for _ in range(5):
            if i % 2:
                with pytest.raises(StrayAccessError, match="wait_kernel, program 0: touches"):
                    wait(other, 2**20, 2**60)
            wait(other, 2**20)

    def work_together() -> None:
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(work, range(4)))

    assert in_fork(fault(tmp_path / "log", work_together)) & 0x7F == signal.SIGSEGV
    assert "Fatal Python error: Segmentation fault" in (tmp_path / "log").read_text()
