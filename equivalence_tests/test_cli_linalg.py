"""Commands with `--device linalg`: what they run, what they say, and what becomes of a kernel that is wrong.

Skipped where the tools of the extra `linalg` are not installed (`tox run -e ascend` has them).
"""

import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from ascend_twin.cli import verify
from ascend_twin.cli.main import app
from ascend_twin.equivalence_tests.cases import PrefillCase, recorded_case
from ascend_twin.equivalence_tests.failures import save_fixture
from ascend_twin.equivalence_tests.run_on_device import why_unusable
from ascend_twin.fixtures.store import read_fixture
from ascend_twin.optimized.gdn import ascend_native
from ascend_twin.optimized.gdn.ascend_native import LoweringError, NativeKernels

WHY_NOT = why_unusable("linalg") or ""
PAGE = Path(__file__).parents[1] / "docs/linalg.md"

SMALL = ("--device=linalg", "--head-dim-k=16", "--head-dim-v=16", "--cases=1", "--max-num-batched-tokens=96")
CORNERS = ({"seq_lens": (0, 65, 1)}, {"seq_lens": (70, 64), "gates": "mixed"})
Edit = Callable[[str, str], str]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The native code of all tests; empty at first."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def _small_and_alone(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    """Two corners of one shape; launches of other tests of this process go where they went."""
    if WHY_NOT:
        pytest.skip(f"{WHY_NOT}; what needs no native code ran")
    request.getfixturevalue("triton_runs")
    from ascend_twin.optimized.gdn.kernels import launch

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ASCEND_TWIN_CACHE", str(cache))
    monkeypatch.setattr(launch, "_on_cpu", launch._on_cpu)
    monkeypatch.setattr(verify, "CORNERS", CORNERS)
    monkeypatch.setattr(verify, "ODD_DIMS", ())


@pytest.fixture
def compiler_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Edit], None]:
    """Puts a wrong compiler in place."""
    from ascend_twin.optimized.gdn import native_launches

    def install(edit: Edit) -> None:
        monkeypatch.setattr(
            native_launches, "NativeKernels", lambda: NativeKernels(tmp_path / "wrong", edit=edit)
        )

    return install


def run(*arguments: str | Path) -> Any:
    """Exit code, stdout and stderr of a command."""
    result = CliRunner().invoke(app, [*map(str, arguments)])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


@pytest.mark.parametrize(("implementation", "dtype"), [("staged", "float16"), ("fused", "bfloat16")])
def test_verify_on_linalg_agrees_and_says_once_that_kernels_are_compiled(
    implementation: str, dtype: str
) -> None:
    arguments = ("verify", *SMALL, "--implementation", implementation, "--dtype", dtype)
    first, second = run(*arguments), run(*arguments)
    assert (first.exit_code, second.exit_code) == (0, 0)
    assert first.stdout.startswith(f"{implementation} on linalg against the reference, {dtype}, H 1, HV 2, ")
    assert first.stderr.count("compiling kernels for this machine") == 1
    assert os.environ["ASCEND_TWIN_CACHE"] in first.stderr
    assert second.stderr == ""


def _adds_for_subtracts(name: str, linalg: str) -> str:
    return linalg.replace("arith.subf", "arith.addf") if name == "fused_inter_chunk_kernel" else linalg


def test_verify_on_linalg_prints_a_reproduction_of_what_the_compiler_made(
    cache: Path, compiler_with: Callable[[Edit], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It fails with that compiler, and agrees with the right one; replay says which stage it is."""
    compiler_with(_adds_for_subtracts)
    monkeypatch.setattr(verify, "MINIMIZE_SECONDS", 2.0)
    result = run("verify", *SMALL, "--json=result.json")
    assert result.exit_code == 1
    saved = json.loads(Path("result.json").read_text())["failure"]
    assert f"ascend-twin replay {saved['fixture']} --device=linalg --implementation=fused\n" in result.stdout
    with pytest.raises(AssertionError, match="o: ratio"):
        exec(saved["code"], {})

    again = ("replay", saved["fixture"], "--device=linalg", "--json=replay.json")
    assert run(*again, "--html=replay.html").exit_code == 1
    (file,) = json.loads(Path("replay.json").read_text())["files"]
    _, native = file["replays"]
    first = next(finding for finding in native["findings"] if not finding["passed"])
    assert (native["subject"], first["stage"]) == ("fused on linalg", "fused_inter_chunk")
    assert "fused on linalg" in Path("replay.html").read_text()

    monkeypatch.undo()
    environment = {**os.environ, "ASCEND_TWIN_CACHE": str(cache)}
    subprocess.run([sys.executable, "-c", saved["code"]], env=environment, check=True)


def _fixture(dtype: str = "bfloat16") -> Path:
    """The call of a small case; nothing was seen of it."""
    case = PrefillCase((3, 70), H=1, HV=2, K=16, V=16, dtype=dtype, use_qk_l2norm_in_kernel=True)
    return save_fixture("call", recorded_case(case, "fused"), Path("calls"))


def test_replay_on_linalg_runs_the_kernels_of_fused_and_nothing_without_kernels() -> None:
    file = _fixture()
    result = run("replay", file, "--device=linalg")
    assert result.exit_code == 0
    assert "fused on linalg" in result.stdout
    for name in ("eager", "reference"):
        result = run("replay", file, "--device=linalg", f"--implementation={name}")
        assert result.exit_code == 2
        assert result.stderr == (
            f"error: {name} has no kernels that the Ascend compiler could lower for device linalg; "
            "staged and fused have\n"
        )


def test_stray_access_is_a_difference_of_its_batch_that_replay_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    from ascend_twin.optimized.gdn.native_launches import NativeLauncher, StrayAccessError

    native = NativeLauncher.__call__

    def strays(self: NativeLauncher, launch: Any) -> None:
        if launch.name == "fused_inter_chunk_kernel":
            raise StrayAccessError(f"{launch.name}: writes element 5 of o, which has 0 to 4")
        native(self, launch)

    monkeypatch.setattr(NativeLauncher, "__call__", strays)
    monkeypatch.setattr("ascend_twin.cli.replay.SECONDS", 2.0)
    result = run("verify", *SMALL, "--json=result.json")
    assert result.exit_code == 1
    assert "raised StrayAccessError: fused_inter_chunk_kernel: writes element 5 of o" in result.stdout
    result = json.loads(Path("result.json").read_text())
    assert "open_device('linalg')" in result["failure"]["code"]

    file = result["failure"]["fixture"]
    assert not any(name.startswith("seen.") for name in read_fixture(Path(file)).tensors)
    result = run("replay", file, "--device=linalg", "--minimize=small.safetensors")
    assert result.exit_code == 1
    said = "fused on linalg: fused_inter_chunk is the first that is wrong: fused_inter_chunk_kernel: writes"
    assert said in result.stdout
    assert "To blame: memory." in result.stdout
    assert "small.safetensors: " in result.stdout


def _loads_k_without_a_mask(linalg: str) -> tuple[str, int]:
    """Its first load of a chunk takes all 64 rows."""
    view = r"(memref\.subview %reinterpret_cast\w*\[0, 0\]) \[%\w+, 16\]"
    copy = r"(memref\.subview %alloc\w*\[0, 0\]) \[%\w+, 16\]"
    return re.subn(rf"{view}(.*\n.*){copy}", r"\1 [%c64, 16]\2\3 [%c64, 16]", linalg, count=1)


def _divides_zero_by_zero(linalg: str) -> tuple[str, int]:
    """Instead of scaling o."""
    product = r"(%\d+) = arith\.mulf (%\d+), %\w+ (:.*)\n(.*tensor\.extract_slice \1\[)"
    zeros = r"%zero = arith.subf \2, \2 \3\n\1 = arith.divf %zero, %zero \3\n\4"
    return re.subn(product, zeros, linalg)


@pytest.mark.parametrize(
    ("edit", "dtype", "blame"),
    [
        (_loads_k_without_a_mask, "bfloat16", "memory"),
        (_loads_k_without_a_mask, "float32", "memory"),
        (_divides_zero_by_zero, "float32", "arithmetic"),
    ],
)
def test_replay_blames_memory_for_nan_that_no_arithmetic_made(
    edit: Callable[[str], tuple[str, int]],
    dtype: str,
    blame: str,
    compiler_with: Callable[[Edit], None],
) -> None:
    if blame == "arithmetic" and platform.machine() != "x86_64":
        pytest.skip("NaN of this machine's arithmetic has no sign to know it by")

    def wrong(name: str, linalg: str) -> str:
        if name != "fused_inter_chunk_kernel":
            return linalg
        linalg, count = edit(linalg)
        assert count == 1, "out of date: the kernel has no such place"
        return linalg

    compiler_with(wrong)
    result = run("replay", _fixture(dtype), "--device=linalg", "--json=replay.json")
    assert result.exit_code == 1
    replay = json.loads(Path("replay.json").read_text())["files"][0]["replays"][-1]
    assert replay["diagnosis"].startswith(
        "fused_inter_chunk is the first that is wrong: fused_inter_chunk.o: "
    )
    assert ("read outside of a tensor" in replay["diagnosis"]) == (blame == "memory")
    assert ("no known mistake gives this" in replay["diagnosis"]) == (blame != "memory")
    assert replay["blame"] == blame


def test_kernel_that_does_not_lower_is_an_error_and_no_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor is it a broken file."""

    def refuses(*_: object) -> str:
        raise LoweringError("solve_tril_kernel, solve_tril.py:7: bishengir-opt: no such operation")

    file = _fixture()
    monkeypatch.setattr(ascend_native, "_linalg", refuses)
    monkeypatch.setenv("ASCEND_TWIN_CACHE", "nothing")
    for command in (("verify", *SMALL), ("replay", file.parent, file, "--device=linalg")):
        result = run(*command)
        assert result.exit_code == 2
        assert result.stderr.endswith(
            "error: solve_tril_kernel, solve_tril.py:7: bishengir-opt: no such operation\n"
        )
    assert not Path("failures").exists()


def test_verify_on_linalg_says_that_its_native_code_cannot_be_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("ASCEND_TWIN_CACHE", str(tmp_path / "file"))
    result = run("verify", *SMALL)
    assert result.exit_code == 2
    assert "ASCEND_TWIN_CACHE names another folder" in result.stderr.splitlines()[-1]


@pytest.mark.skipif(not PAGE.exists(), reason="the docs are in the repository alone")
def test_code_of_the_page_prints_what_it_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It shows a module of kernels, what launches one of them, and what that prints."""
    blocks = re.findall(r"```(python|text)\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert [kind for kind, _ in blocks] == ["python", "python", "text"]
    kernels, code, said = (text for _, text in blocks)
    (tmp_path / "my_kernels.py").write_text(kernels, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "my_kernels", raising=False)
    exec(compile(code, str(PAGE), "exec"), {"__name__": "a page"})
    assert capsys.readouterr().out == said
