"""Triton's interpreters, the Ascend compiler's front end and the definition, on small kernels.

What is known to differ is stated as it is today (`compiler_differences.DIFFERENCES`): a test that fails
because somebody is right now asks for it to be taken out. The front end is judged by native code of its
linalg IR where triton-ascend and the rest of extra `linalg` are installed, and is skipped elsewhere.
"""

import inspect
import re
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import settings

from ascend_twin.equivalence_tests.compiler_differences import (
    ASCEND_INTERPRETER,
    CONSTRUCTS,
    DIFFERENCES,
    FRONT_END,
    TRITON_INTERPRETER,
    UNTOUCHED,
    Case,
    Difference,
    disagreement,
    interpret,
    run,
    without_locations,
)
from ascend_twin.optimized.gdn import IMPLEMENTATIONS
from ascend_twin.optimized.gdn.ascend_front_end import (
    CompilerProcess,
    Variant,
    linalg_of,
    record_variants,
    variant_of,
)
from ascend_twin.optimized.gdn.ascend_native import check_native_installed
from ascend_twin.optimized.gdn.kernels.launch import Launch
from ascend_twin.optimized.gdn.models import Shape
from ascend_twin.optimized.gdn.native_launches import NativeLauncher, StrayAccessError
from ascend_twin.reference.errors import UnavailableError

DRAWS = min(settings.default.max_examples if settings.default else 25, 200)
DOCS = Path(__file__).parents[1] / "docs/compiler_differences.md"
MENDED = "is right now: take the difference out of compiler_differences.py, its fixture and the docs"
# A load and a store of a whole block, whatever its mask; one lane; an output that is read.
WHOLE_LOAD = r"memref\.copy %reinterpret_cast"
WHOLE_STORE = r"in writable %reinterpret_cast"
BY_AN_EQUALITY = r"memref\.subview .*\[1\] \[1\]"
READ_AND_WRITTEN = r"tt\.tensor_kind = 2"


def _why_no_native() -> str:
    try:
        check_native_installed()
    except UnavailableError as error:
        return str(error)
    return ""


def _interpreter() -> str:
    """The interpreter of this process, as DIFFERENCES names it; "" for one of which nothing is stated."""
    for package, name in (("triton-ascend", ASCEND_INTERPRETER), ("triton", TRITON_INTERPRETER)):
        try:
            return name if name.endswith(f" {metadata.version(package)}") else ""
        except metadata.PackageNotFoundError:
            continue
    return ""


needs_native = pytest.mark.skipif(bool(_why_no_native()), reason=_why_no_native())
each_construct = pytest.mark.parametrize("case", CONSTRUCTS, ids=lambda case: case.name)
each_difference = pytest.mark.parametrize("case", DIFFERENCES, ids=lambda case: case.name)


@pytest.fixture(scope="module")
def native() -> NativeLauncher:
    return NativeLauncher()


@pytest.fixture(scope="module")
def linalg() -> Iterator[Callable[[Variant], str]]:
    """Linalg IR of a variant, without locations."""
    with CompilerProcess() as process:
        yield lambda variant: without_locations(process.call(linalg_of, variant)[0])


def first_disagreement(case: Case, take: Callable[[Launch], None], draws: int) -> str:
    """What is wrong with the first draw of which anything is; "" where nothing is."""
    for seed in range(draws):
        arguments = case.arguments(np.random.default_rng(seed))
        try:
            said = disagreement(case, arguments, run(case, arguments, take))
        except StrayAccessError as error:
            said = str(error)
        if said:
            return f"draw {seed}: {said}"
    return ""


@each_construct
@pytest.mark.usefixtures("triton_runs")
def test_interpreter_computes_constructs_as_defined(case: Case) -> None:
    assert not first_disagreement(case, interpret, DRAWS)


@each_construct
@needs_native
def test_front_end_keeps_constructs_as_defined(case: Case, native: NativeLauncher) -> None:
    assert not first_disagreement(case, native, DRAWS)


@each_difference
@pytest.mark.usefixtures("triton_runs")
def test_interpreter_is_wrong_where_it_is_said_to_be(case: Difference) -> None:
    if not (interpreter := _interpreter()):
        pytest.skip("of the interpreter of this version of Triton nothing is stated")
    for seed in range(3):
        arguments = case.arguments(np.random.default_rng(seed))
        said = disagreement(case, arguments, run(case, arguments, interpret))
        if interpreter in case.wrong:
            assert said, f"the {interpreter} {MENDED}"
        else:
            assert not said


@each_difference
@needs_native
def test_front_end_is_wrong_where_it_is_said_to_be(case: Difference, native: NativeLauncher) -> None:
    for seed in range(3):
        arguments = case.arguments(np.random.default_rng(seed))
        if case.strays:
            with pytest.raises(StrayAccessError, match="not mapped"):
                run(case, arguments, native)
            continue
        said = disagreement(case, arguments, run(case, arguments, native))
        if FRONT_END in case.wrong:
            assert said, f"the front end {MENDED}"
        else:
            assert not said


@pytest.mark.parametrize("case", [x for x in DIFFERENCES if x.linalg], ids=lambda case: case.name)
@needs_native
def test_linalg_is_that_of_the_fixture(case: Difference, linalg: Callable[[Variant], str]) -> None:
    variant = variant_of(case.launch(case.arguments(np.random.default_rng(0))))
    assert linalg(variant) == case.linalg, f"another linalg IR than in {case.name}.mlir; if it {MENDED}"


@pytest.mark.parametrize("implementation", [n for n, x in IMPLEMENTATIONS.items() if x.uses_triton])
@needs_native
def test_our_kernels_meet_none_of_the_differences(
    implementation: str, linalg: Callable[[Variant], str]
) -> None:
    variants = record_variants(implementation, Shape(16, 32, 128, 128))
    assert variants
    for variant in variants:
        text = linalg(variant)
        assert "memref.subview" in text
        for pattern in (WHOLE_LOAD, WHOLE_STORE, BY_AN_EQUALITY, READ_AND_WRITTEN):
            assert not re.search(pattern, text), f"{variant.name}: {pattern}"


@pytest.mark.parametrize(
    ("name", "pattern"),
    [
        ("load_behind_mask_kernel", WHOLE_LOAD),
        ("store_behind_mask_kernel", WHOLE_STORE),
        ("store_of_one_lane_kernel", BY_AN_EQUALITY),
    ],
)
def test_what_our_kernels_must_not_have_is_in_the_fixture(name: str, pattern: str) -> None:
    (case,) = (x for x in DIFFERENCES if x.name == name)
    assert re.search(pattern, case.linalg)


@each_difference
def test_difference_has_a_fixture_if_the_front_end_is_asked(case: Difference) -> None:
    only_interpreters = bool(case.wrong) and FRONT_END not in case.wrong
    assert bool(case.linalg) != only_interpreters
    assert not case.linalg or f"func.func @{case.name}(" in case.linalg


def test_disagreement_names_the_element() -> None:
    case, y = DIFFERENCES[1], torch.zeros(16, 16)
    arguments = case.arguments(np.random.default_rng(0))
    assert disagreement(case, arguments, y) == ""
    y[3, 5] = UNTOUCHED
    assert disagreement(case, arguments, y) == f"{case.name}: y[3, 5] is -7.0, expected 0.0"
    y[3, 5] = torch.nan
    assert "y[3, 5] is nan" in disagreement(case, arguments, y)


@pytest.mark.skipif(not DOCS.exists(), reason="the docs are in the repository alone")
@each_difference
def test_docs_report_the_difference(case: Difference) -> None:
    text = DOCS.read_text(encoding="utf-8")
    report = text.partition(f"\n### {case.title[0].upper()}{case.title[1:]}\n")[2].partition("\n### ")[0]
    wrong = ", ".join(case.wrong) or "nobody"
    assert f"Wrong: {wrong}. Upstream: {case.issue}." in report
    assert inspect.getsource(case.kernel.fn).partition("\n")[2].strip() in report
    excerpts = re.findall(r"```mlir\n(.*?)```", report, flags=re.DOTALL)
    assert bool(excerpts) == bool(case.linalg)
    for line in "".join(excerpts).splitlines():
        assert line.strip() in {x.strip() for x in case.linalg.splitlines()}
