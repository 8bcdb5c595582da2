"""The address-sanitized build: it finds what redzones cannot see, and says where.

Some of these need the sanitizer in their own process, where
`python -m ascend_twin.equivalence_tests.sanitized` runs them; one of the others runs that.
"""

import inspect
import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from ascend_twin.equivalence_tests import sanitized
from ascend_twin.optimized.gdn.address_sanitizer import Report, loaded_sanitizer, report_of
from ascend_twin.optimized.gdn.kernels.launch import Launch
from ascend_twin.optimized.gdn.native_launches import NativeLauncher, StrayAccessError
from ascend_twin.reference.errors import UnavailableError

BT = 64

inside = pytest.mark.skipif(
    loaded_sanitizer() is None, reason="not started by python -m ascend_twin.equivalence_tests.sanitized"
)
outside = pytest.mark.skipif(loaded_sanitizer() is not None, reason="this process is sanitized")


@pytest.fixture(scope="module")
def native() -> NativeLauncher:
    try:
        return NativeLauncher()
    except UnavailableError as error:
        pytest.skip(str(error))


def launch(name: str, **arguments: Any) -> Launch:
    """A launch of one program of a kernel of native_kernels, whose constants are upper case."""
    from ascend_twin.equivalence_tests import native_kernels

    constants = {n: value for n, value in arguments.items() if n.isupper()}
    tensors_and_numbers = {n: value for n, value in arguments.items() if not n.isupper()}
    return Launch(getattr(native_kernels, name), 1, tensors_and_numbers, constants)


def copy(x: torch.Tensor, y: torch.Tensor, n: int, m: int) -> Launch:
    """A launch of copy_kernel: n elements are read, m are written."""
    return launch("copy_kernel", x=x, y=y, n=n, m=m, stride_x=x.stride(0), stride_y=1, BT=BT)


def here(name: str) -> str:
    """File and line of the access that the source of a kernel marks."""
    function = launch(name).kernel.fn
    lines, first = inspect.getsourcelines(function)
    marked = next(i for i, line in enumerate(lines) if "# here" in line)
    return f"{inspect.getsourcefile(function)}:{first + marked}"


# In a sanitized process


@inside
@pytest.mark.parametrize(("dtype", "n"), [(torch.float32, 60), (torch.bfloat16, 61)])
def test_stray_read_is_found_when_its_value_is_masked_away(
    native: NativeLauncher, dtype: torch.dtype, n: int, capfd: pytest.CaptureFixture[str]
) -> None:
    strays = launch("select_kernel", x=torch.ones(n, dtype=dtype), y=torch.zeros(BT, dtype=dtype), n=n, BT=BT)
    told = f"select_kernel, {here('select_kernel')}: reads element {n} of x, which has 0 to {n - 1}"
    for _ in range(2):  # what was found once is found again
        with pytest.raises(StrayAccessError, match=f"^{re.escape(told)}$"):
            native(strays)
        assert capfd.readouterr().err.count("ERROR: AddressSanitizer") == 1  # not one for each element


@inside
def test_stray_read_of_a_gap_is_found(native: NativeLauncher) -> None:
    copies = copy(torch.ones(32 * BT)[::32], torch.zeros(BT), BT, BT)
    native(copies)
    copies.arguments["stride_x"] = 16
    with pytest.raises(StrayAccessError, match=r"reads element 16 of x, which has 0 to 2016 with gaps$"):
        native(copies)


@inside
def test_stray_write_is_found_with_its_line(native: NativeLauncher) -> None:
    told = r"^copy_kernel, .*/native_kernels\.py:\d+: writes element 60 of y, which has 0 to 59$"
    with pytest.raises(StrayAccessError, match=told):
        native(copy(torch.ones(BT), torch.zeros(60), BT, BT))


@inside
@pytest.mark.parametrize(("name", "verb"), [("load_slot_kernel", "writes"), ("store_slot_kernel", "reads")])
def test_stray_access_to_a_buffer_of_the_kernel_is_found(
    native: NativeLauncher, name: str, verb: str
) -> None:
    strays = launch(name, x=torch.ones(90), y=torch.zeros(90), n=BT, BT=BT)
    told = f"{name}, {here(name)}: {verb} 4 bytes at no parameter: heap-buffer-overflow, 0 bytes"
    with pytest.raises(StrayAccessError, match=f"^{re.escape(told)} .* 256-byte region$"):
        native(strays)


@inside
def test_access_beyond_all_memory_leaves_the_process_alive(native: NativeLauncher) -> None:
    picks = launch("pick_kernel", x=torch.ones(4), indices=torch.tensor([2**44]), y=torch.zeros(1))
    with pytest.raises(StrayAccessError, match=r"^pick_kernel, program 0: touches memory that is not mapped"):
        native(picks)


@inside
@pytest.mark.parametrize(("dtype", "n"), [(torch.float32, 64), (torch.bfloat16, 61)])
def test_right_kernel_passes(native: NativeLauncher, dtype: torch.dtype, n: int) -> None:
    x, y = torch.arange(n).to(dtype), torch.zeros(n, dtype=dtype)
    native(copy(x, y, n, n))
    assert torch.equal(x, y)


# From outside


@outside
def test_redzones_do_not_see_a_stray_read_that_is_masked_away(native: NativeLauncher) -> None:
    y = torch.zeros(BT)
    native(launch("select_kernel", x=torch.ones(60), y=y, n=60, BT=BT))
    assert y.sum() == 60


@outside
def test_sanitized_run_passes(capfd: pytest.CaptureFixture[str]) -> None:
    try:
        sanitized.environment()
    except UnavailableError as error:
        pytest.skip(str(error))
    chosen = "test_sanitized or (corners and l2norm and 70-0-130-bfloat16-forget)"
    status = sanitized.main(["--require", "-p", "no:cacheprovider", "-k", chosen])
    said = capfd.readouterr().out
    assert status == 0, said
    assert re.search(r" 12 passed, 4 skipped", said), said


@pytest.fixture
def fake_cc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A C compiler whose libasan.so is what this file says."""
    monkeypatch.setattr(sanitized, "check_native_installed", lambda: None)
    (tmp_path / "cc").write_text(f"#!/bin/sh\ncat {tmp_path}/answer\n", encoding="utf-8")
    (tmp_path / "cc").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    return tmp_path / "answer"


@outside
@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ("libasan.so", "cc has no libasan.so, the address sanitizer of GCC: install GCC with it"),
        ("/dev/null", "/dev/null cannot be preloaded, or lacks __asan_version_mismatch_check_v8"),
    ],
)
def test_runner_says_in_one_line_why_it_did_not_run(
    answer: str, reason: str, fake_cc: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    fake_cc.write_text(answer, encoding="utf-8")
    assert sanitized.main([]) == 0
    assert sanitized.main(["--require"]) == 1
    lines = capfd.readouterr().out.splitlines()
    assert len(lines) == 2
    assert all(line.startswith(f"sanitized: not run: {reason}") for line in lines)
    assert all("not run: test_kernels.py test_op.py" in line for line in lines)


def test_runner_names_what_is_not_installed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def check() -> None:
        raise UnavailableError("there is no such thing")

    monkeypatch.setattr(sanitized, "check_native_installed", check)
    assert sanitized.main(["--require"]) == 1
    assert capsys.readouterr().out.startswith("sanitized: not run: there is no such thing; not run: test_")


REPORT = """\
=================================================================
==7==ERROR: AddressSanitizer: heap-buffer-overflow on address 0x6120001fc340 at pc 0x7f98 bp 0x7ffd sp 0x7ffd
WRITE of size 4 at 0x6120001fc340 thread T1
    #0 0x7f98bd67d762  (/cache/a kernel-6b3c.so+0x1762)
    #1 0x7f98bd67d6c1 in launch (/cache/a kernel-6b3c.so+0x16c1) (BuildId: 1234)
    #2 0x7f98bd67d6c1 in _call callproc.c:923

0x6120001fc340 is located 0 bytes after 256-byte region [0x6120001fc240,0x6120001fc340)
allocated by thread T0 here:
    #0 0x7f98e96b7e68  (/usr/lib/libasan.so.8+0xb7e68)
"""


def test_report_has_what_the_runtime_says() -> None:
    assert report_of(REPORT) == Report(
        kind="heap-buffer-overflow",
        verb="writes",
        size=4,
        address=0x6120001FC340,
        frames=(("/cache/a kernel-6b3c.so", 0x1762), ("/cache/a kernel-6b3c.so", 0x16C1)),
        region="0 bytes after 256-byte region",
    )
    assert report_of("==7==ERROR: AddressSanitizer: SEGV on unknown address 0x000000000000") is None
