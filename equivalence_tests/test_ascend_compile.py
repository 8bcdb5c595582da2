"""The compile gate: what is compiled is what is launched, what does not fit fails, and what is shown is so.

Most need triton-ascend and ascendnpu-ir (`tox run -e ascend`) and are skipped elsewhere; what reads the
compiler's output, the table of models and the errors are tested everywhere.
"""

import inspect
import json
import re
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from typer.testing import CliRunner

from ascend_twin.cli import compile as cli
from ascend_twin.cli.main import app
from ascend_twin.equivalence_tests.report_pages import Page
from ascend_twin.optimized.gdn import IMPLEMENTATIONS, ascend_compile, ascend_front_end
from ascend_twin.optimized.gdn.ascend_compile import (
    Compiled,
    CompilerPool,
    memory_limits,
    overflows,
    planned_bytes,
)
from ascend_twin.optimized.gdn.ascend_front_end import TARGETS, Variant, arguments_of, variant_of
from ascend_twin.optimized.gdn.models import MODELS, TENSOR_PARALLEL_SIZES, Shape
from ascend_twin.reference.errors import AscendTwinError, InvalidArgumentError, UnavailableError

KIB = 1024


def _why_no_compiler() -> str:
    try:
        ascend_front_end.check_installed()
    except UnavailableError as error:
        return str(error)
    return ""


needs_compiler = pytest.mark.skipif(bool(_why_no_compiler()), reason=_why_no_compiler())


@triton.jit(do_not_specialize=["T"])
def product_kernel(
    a, b, c, T, stride, scale, BT: tl.constexpr, K: tl.constexpr, HAS_B: tl.constexpr
):  # fmt: skip
    """c = scale a b^T, times its row sums, for BT tokens at a time: BT decides whether it fits."""
    o_k, o_c = tl.arange(0, K), tl.arange(0, BT)
    for i_t in range(tl.cdiv(T, BT)):
        o_t = i_t * BT + tl.arange(0, BT)
        m_t = (o_t < T)[:, None]
        b_a = tl.load(a + o_t[:, None] * stride + o_k[None, :], mask=m_t, other=0.0)
        b_b = b_a
        if HAS_B:
            b_b = tl.load(b + o_t[:, None] * stride + o_k[None, :], mask=m_t, other=0.0)
        b_c = tl.dot(b_a, tl.trans(b_b)) * scale
        b_c = b_c * tl.sum(b_c, 1)[:, None]
        tl.store(c + o_t[:, None] * BT + o_c[None, :], b_c, mask=m_t)


@triton.jit
def refused_kernel(a, BT: tl.constexpr):
    """Blocks of two lengths cannot be added."""
    tl.store(a + tl.arange(0, BT) + tl.arange(0, 2 * BT), 0.0)


def product(BT: int, **options: Any) -> Variant:
    """product_kernel as a launch of it would compile it; BT 64 fits, 512 does not."""
    return Variant(
        "ascend_twin.equivalence_tests.test_ascend_compile:product_kernel",
        (("a", "*bf16"), ("b", "*bf16"), ("c", "*fp32"), ("T", "i32"), ("stride", "i32"), ("scale", "fp32")),
        (("BT", BT), ("K", 128), ("HAS_B", True)),
        (0, 1, 2, 4),
        tuple(options.items()),
    )


def compile_all(variants: Sequence[Variant], targets: Sequence[str]) -> dict[tuple[str, str], Compiled]:
    """Results by key of the variant and target."""
    with CompilerPool() as pool:
        found = pool.compile(variants, targets)
        return {(variant.key, result.target): result for variant, results in found for result in results}


def run(*arguments: str) -> tuple[int, str]:
    """Exit status of the command, and stdout and stderr together."""
    result = CliRunner().invoke(app, ["compile", *arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.output


# Reading what the compiler says


SPEC = (
    'module attributes {dlti.target_system_spec = #dlti.target_system_spec<"NPU" : #hacc.target_device_spec<'
    '#dlti.dl_entry<"CUBE_CORE_COUNT", 24 : i32>, #dlti.dl_entry<"UB_SIZE", 1572864 : i32>, '
    '#dlti.dl_entry<"L1_SIZE", 4194304 : i32>, #dlti.dl_entry<"L0C_SIZE", 1048576 : i32>, '
    '#dlti.dl_entry<"UB_ALIGN_SIZE", 256 : i32>>>} {'
)


def buffer(offsets: str, memref: str, space: str) -> str:
    return f"    %9 = hivm.hir.pointer_cast({offsets}) : memref<{memref}, #hivm.address_space<{space}>>"


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        ([buffer("%c64_i64", "8x4x16x16xbf16", "cbuf")], {"L1": 64 + 16384}),
        ([buffer("%c64_i64, %c4096_i64", "100xf32", "ub")], {"UB": 4096 + 400}),  # doubled: both count
        ([buffer("%c4096_i64, %c64_i64", "100xf32", "ub")], {"UB": 4096 + 400}),
        ([buffer("%c64_i64", "3x3xi1", "ub")], {"UB": 64 + 2}),
        ([buffer("%c64_i64", "0xf32", "ub")], {"UB": 64}),
        ([buffer("%c64_i64", "4xf32", "ub"), buffer("%c64_i64", "9xf32", "ub")], {"UB": 64 + 36}),
        ([buffer("%c64_i64", "9xf32", "ub"), buffer("%c64_i64", "4xf32", "cc")], {"UB": 100, "L0C": 80}),
        ([buffer("%c64_i64", "4x4xf32, strided<[8, 1]>", "ub")], {"UB": 64 + 64}),
        (["    %0 = llvm.mlir.constant(32 : i64) : i64", buffer("%0", "8xi8", "ub")], {"UB": 40}),
        # The next function uses a name again, for something else.
        (["    %c64_i64 = arith.constant 128 : i64", buffer("%c64_i64", "8xi8", "ub")], {"UB": 136}),
        ([], {}),
    ],
)
def test_planned_bytes_is_the_largest_end_of_a_buffer(lines: list[str], expected: dict[str, int]) -> None:
    constants = ["    %c64_i64 = arith.constant 64 : i64", "    %c4096_i64 = arith.constant 4096 : i64"]
    assert planned_bytes("\n".join([SPEC, "  func.func @f() {", *constants, *lines, "  }"])) == expected


@pytest.mark.parametrize(
    "line",
    [
        buffer("%unknown", "8xf32", "ub"),
        buffer("%c64_i64", "?xf32", "ub"),
        buffer("%c64_i64", "8xf8E4M3FN", "ub"),
        "    %9 = hivm.hir.pointer_cast(%c64_i64) : memref<8xf32>",
    ],
)
def test_planned_bytes_leaves_out_no_buffer_that_it_cannot_read(line: str) -> None:
    with pytest.raises(AscendTwinError, match="planned IR holds a buffer"):
        planned_bytes(f"    %c64_i64 = arith.constant 64 : i64\n{line}")


def test_memory_limits_are_those_that_the_planned_ir_states() -> None:
    assert memory_limits(SPEC) == {"UB": 192 * KIB, "L1": 512 * KIB, "L0C": 128 * KIB}


OUTPUT = """\
loc("/tmp/x/kernel.mlir":1:1): loc("/tmp/x/kernel.mlir":2:3): [ERROR] Cannot find hivmc under $PATH
[WARNING] Failed to detect hivmc version for backward compatibility
[NOTE] Ub overflow detected; automatically set enable-auto-multi-buffer to false and retrying compilation.
[NOTE] Ub overflow detected; automatically set enable-auto-multi-buffer to false and retrying compilation.
loc("/tmp/x/kernel.mlir":7:3): warning: %3 = arith.addf and its users all have no location!
loc("/tmp/x/kernel.mlir":7:3): warning: mask not understood
loc("/tmp/x/kernel.mlir":1:1): error: Failed to run BiShengHIR pipeline

loc("/tmp/x/kernel.mlir":2:3): error: ub overflow, requires 6299648 bits while 1572864 bits available! (why)
loc("/tmp/x/kernel.mlir":2:3): error: cc overflow, requires 8388608 bits while 1048576 bits available! (why)
[ERROR] Failed to run BiShengIR pipeline
"""


def test_what_the_compiler_says_is_trimmed_to_what_matters() -> None:
    assert ascend_front_end.errors_in(OUTPUT).splitlines() == [
        "ub overflow, requires 6299648 bits while 1572864 bits available! (why)",
        "cc overflow, requires 8388608 bits while 1048576 bits available! (why)",
    ]
    assert ascend_compile._warnings(OUTPUT) == (
        "Ub overflow detected; automatically set enable-auto-multi-buffer to false and retrying compilation.",
        "mask not understood",
    )
    assert overflows(OUTPUT) == (
        {"UB": 6299648 // 8, "L0C": 1024 * KIB},
        {"UB": 192 * KIB, "L0C": 128 * KIB},
    )


def test_an_unforeseen_failure_shows_the_last_lines() -> None:
    assert (
        ascend_front_end.errors_in("one\nPLEASE submit a bug report\n") == "one\nPLEASE submit a bug report"
    )


# What a launch is compiled for


def parameter(num: int, name: str, **attributes: Any) -> SimpleNamespace:
    defaults = {
        "is_constexpr": False, "do_not_specialize": False, "do_not_specialize_on_alignment": False,
        "annotation_type": "",
    }  # fmt: skip
    return SimpleNamespace(num=num, name=name, **{**defaults, **attributes})


def launch(arguments: dict[str, Any], constants: dict[str, Any], **attributes: Any) -> SimpleNamespace:
    """A launch of a made-up kernel whose parameters all have `attributes`."""
    params = [parameter(i, name, **attributes) for i, name in enumerate(arguments)]
    params += [
        parameter(len(params) + i, n, is_constexpr=True) for i, n in enumerate(constants) if n != "num_warps"
    ]
    signature = inspect.Signature(
        [inspect.Parameter(p.name, inspect.Parameter.POSITIONAL_OR_KEYWORD) for p in params]
    )
    kernel = SimpleNamespace(params=params, signature=signature, __module__="m", __name__="f")
    return SimpleNamespace(kernel=kernel, arguments=arguments, constants=constants)


def test_variant_holds_types_constants_and_divisibility() -> None:
    arguments = {
        "x": torch.zeros(8, dtype=torch.bfloat16), "shifted": torch.zeros(8)[1:], "absent": None,
        "sixteen": 16, "one": 1, "seven": 7, "large": 2**31, "small": -(2**31), "flag": True, "scale": 0.5,
    }  # fmt: skip
    variant = variant_of(launch(arguments, {"BT": 64, "IS_FULL": True, "num_warps": 4}))
    assert variant == Variant(
        "m:f",
        (
            ("x", "*bf16"), ("shifted", "*fp32"), ("absent", "*i8"), ("sixteen", "i32"), ("one", "i32"),
            ("seven", "i32"), ("large", "i64"), ("small", "i32"), ("flag", "i1"), ("scale", "fp32"),
        ),
        (("absent", None), ("one", 1), ("BT", 64), ("IS_FULL", True)),
        (0, 3, 6, 7),
        (("num_warps", 4),),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("attribute", "constants", "divisible"),
    [("do_not_specialize", (), ()), ("do_not_specialize_on_alignment", (("one", 1),), ())],
)
def test_variant_is_not_specialised_for_what_the_kernel_excludes(
    attribute: str, constants: tuple[Any, ...], divisible: tuple[int, ...]
) -> None:
    variant = variant_of(launch({"sixteen": 16, "one": 1}, {}, **{attribute: True}))
    assert (variant.constants, variant.divisible) == (constants, divisible)


def test_variants_differ_where_triton_compiles_them_apart() -> None:
    ones = [variant_of(launch({}, {"X": value})) for value in (1, True, 1.0)]
    assert len({variant.key for variant in ones}) == 3


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        (np.float32(0.5), "fp32"), (np.float64(2), "fp32"), (np.int64(7), "i32"), (np.int64(2**40), "i64"),
        (2**63, "u64"), (False, "i1"), (torch.zeros(3, dtype=torch.bool), "*i1"),
    ],
)  # fmt: skip
def test_numbers_of_numpy_have_the_types_of_pythons(value: Any, kind: str) -> None:
    assert variant_of(launch({"x": value}, {})).signature == (("x", kind),)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (
            torch.zeros(3, dtype=torch.complex64),
            "dtype of a kernel's tensor is torch.complex64; allowed: torch",
        ),
        (np.zeros(3), "argument of a kernel is ndarray; allowed: tensors, numbers, bool, None"),
        (2**64, "number of a kernel is 18446744073709551616; allowed: "),
        (-(2**63) - 1, "number of a kernel is -9223372036854775809; allowed: "),
    ],
)
def test_variant_names_an_argument_that_no_kernel_takes(value: Any, message: str) -> None:
    with pytest.raises(InvalidArgumentError, match=re.escape(message)):
        variant_of(launch({"x": value}, {}))


@pytest.mark.parametrize(
    ("annotated", "value", "kind"),
    [("i64", 5, "i64"), ("u8", 255, "u8"), ("i64", True, "i64"), ("i64", None, "*i8"), ("i328)", 5, "i32")],
)
def test_integers_have_the_type_that_a_parameter_is_annotated_with(
    annotated: str, value: Any, kind: str
) -> None:
    assert variant_of(launch({"x": value}, {}, annotation_type=annotated)).signature == (("x", kind),)


@pytest.mark.parametrize(("annotated", "value"), [("i8", 128), ("u8", -1), ("i32", 2**31), ("i64", 0.5)])
def test_number_that_its_annotation_excludes_is_refused(annotated: str, value: Any) -> None:
    with pytest.raises(InvalidArgumentError, match=rf"x is {value}; allowed: .* annotated as {annotated}"):
        variant_of(launch({"x": value}, {}, annotation_type=annotated))


def test_arguments_are_those_of_the_launch_and_then_the_defaults() -> None:
    made_up = launch({"x": None, "n": 3}, {})
    made_up.kernel.signature = inspect.signature(lambda x, n, scale=0.5: None)
    made_up.kernel.params.append(parameter(2, "scale"))
    assert arguments_of(made_up) == {"x": None, "n": 3, "scale": 0.5}
    assert ("scale", "fp32") in variant_of(made_up).signature
    made_up.arguments["scale"] = 2.0
    assert arguments_of(made_up) == {"x": None, "n": 3, "scale": 2.0}
    del made_up.arguments["n"]
    with pytest.raises(InvalidArgumentError, match="f: missing a required argument: 'n'"):
        variant_of(made_up)


def test_what_is_no_kernel_is_refused_by_its_type() -> None:
    with pytest.raises(InvalidArgumentError, match=r"kernel is function; allowed: what triton\.jit makes"):
        variant_of(SimpleNamespace(kernel=parameter, arguments={}, constants={}))


@needs_compiler
def test_variant_is_what_triton_ascend_derives_from_the_launch() -> None:
    from triton.backends.ascend.compiler import (  # pyright: ignore[reportMissingImports]
        AscendAttrsDescriptor,
    )
    from triton.runtime.jit import mangle_type

    kernel = triton.runtime.JITFunction(product_kernel.fn, do_not_specialize=["T"])  # even if interpreting
    x = torch.zeros(8, 16, dtype=torch.bfloat16)
    for b, stride, scale in ((x, 16, 0.5), (x[0, 1:], 1, 2), (None, 2**40, 1)):
        arguments = {"a": x, "b": b, "c": x.float(), "T": 32, "stride": stride, "scale": scale}
        constants = {"BT": 64, "K": 16, "HAS_B": b is not None}
        variant = variant_of(SimpleNamespace(kernel=kernel, arguments=arguments, constants=constants))
        values = {**arguments, **constants}
        theirs = AscendAttrsDescriptor(kernel.params, list(values.values()))
        names = list(arguments)
        types = [mangle_type(value) for value in arguments.values()]
        assert variant.signature == tuple(
            (n, "*i8" if type_ == "none" else type_) for n, type_ in zip(names, types, strict=True)
        )
        given = [i for i in theirs.arg_properties["tt.divisibility"] if i < len(names)]
        assert list(variant.divisible) == [i for i in given if arguments[names[i]] is not None]
        ones = {names[i]: 1 for i in theirs.get_constants() if i < len(names)}
        absent = {n: None for n, value in arguments.items() if value is None}
        assert dict(variant.constants) == {**ones, **absent, **constants}


@needs_compiler
@pytest.mark.parametrize("target", ["910B1", "950"])
def test_command_passes_what_triton_ascend_passes(target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Except for the program, the files, and that intermediate results are kept."""
    from triton.backends.ascend import compiler  # pyright: ignore[reportMissingImports]
    from triton.backends.compiler import GPUTarget

    class Caught(Exception):
        pass

    def catch(line: list[str], **_: Any) -> None:
        raise Caught(line)

    arch = TARGETS[target].arch
    options = compiler.NPUOptions(
        **dict(TARGETS[target].options), unit_flag=True, tile_mix_cube_loop=2, set_workspace_multibuffer=2
    )
    monkeypatch.setenv("PATH", str(ascend_front_end.compilers_folder()), prepend=":")
    monkeypatch.setattr(compiler, "NPUUtils", lambda: SimpleNamespace(get_arch=lambda: arch))
    monkeypatch.setattr(compiler, "subprocess", SimpleNamespace(run=catch))
    way = compiler.linalg_to_bin_enable_npu_compile_A2_A3
    if options.compile_on_910_95:
        way = compiler.linalg_to_bin_enable_npu_compile_910_95
    linalg = 'func.func @f() attributes {mix_mode = "mix", parallel_mode = "simd"}'
    with pytest.raises(Caught) as caught:
        way(linalg, {"target": GPUTarget("npu", arch, 0), **vars(options)}, options)
    theirs = caught.value.args[0]
    ours = ascend_compile.command(TARGETS[target], options, "/tmp/f")
    assert [flag for flag in ours if flag.startswith("--") and "save-temps" not in flag] == [
        flag for flag in theirs if flag.startswith("--")
    ]


# Models


def test_every_model_divides_at_every_size_and_names_its_source() -> None:
    assert len(MODELS) == 9
    for name, model in MODELS.items():
        assert model.name == name
        assert "aiconfigurator" in model.source
        for tp in TENSOR_PARALLEL_SIZES:
            shape = model.shape(tp)
            assert (shape.H * tp, shape.HV * tp, shape.HV % shape.H) == (model.H, model.HV, 0)
    assert MODELS["Qwen3-Next-80B-A3B"].shape(4) == Shape(H=4, HV=8, K=128, V=128)
    assert {m.HV for m in MODELS.values()} == {16, 32, 48, 64}


@pytest.mark.parametrize("tp", [0, 3, 32])
def test_shape_refuses_a_size_that_does_not_divide_the_heads(tp: int) -> None:
    with pytest.raises(InvalidArgumentError, match=rf"tensor-parallel size is {tp}; allowed: .* 16 and 48"):
        MODELS["Qwen3.5-27B"].shape(tp)


# The command


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--model", "Qwen9"), "--model is Qwen9; allowed: Qwen3-Next-80B-A3B, "),
        (("--target", "h100"), "--target is h100; allowed: 910B1, 910B4, 910_9392, 950"),
        (("--implementation", "fast"), "--implementation is fast; allowed: eager"),
        (("--tp", "3"), "tensor-parallel size is 3; allowed: a divisor of the 16 and 32 heads of Qwen3-Next"),
        (("--plot", "memory.txt"), "--plot is memory.txt; allowed: a file that ends in .png, .svg, .pdf"),
        (("--json", "no/such/folder.json"), "--json is no/such/folder.json"),
    ],
)
def test_compile_says_in_one_line_what_is_wrong(arguments: tuple[str, ...], message: str) -> None:
    status, output = run(*arguments)
    assert status == 2
    assert output.startswith(f"error: {message}")
    assert output.count("\n") == 1


def test_compile_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    def version(name: str) -> str:
        if name == "pybind11":
            return "3"
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", version)
    status, output = run()
    assert status == 2
    assert "needs triton-ascend and ascendnpu-ir: " in output
    assert "pip install 'ascend-twin[ascend]'" in output


def test_compile_refuses_two_packages_called_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metadata, "version", lambda name: "1")
    with pytest.raises(UnavailableError, match="triton 1 is installed over triton-ascend"):
        ascend_front_end.check_installed()


def outcome(
    target: str, planned: dict[str, int], warnings: tuple[str, ...] = (), fits: bool = True, BT: int = 64
) -> cli.Outcome:
    job = cli.Job(product(BT), (cli.Use("staged", "Qwen3.5-27B", 2), cli.Use("fused", "Qwen3.5-9B", 1)))
    limits = {"UB": 1000 if target == "950" else 500, "L1": 2000}
    return cli.Outcome(
        job, Compiled(target, fits, planned, limits, "" if fits else "too much", warnings, 0.1)
    )


def test_a_row_holds_the_worst_of_each_memory_against_its_own_limit() -> None:
    (row,) = cli.tabulate([
        outcome("910B1", {"UB": 400}, ("slow",)),
        outcome("950", {"UB": 600, "L1": 7}, ("slow", "slower")),
        outcome("950", {"UB": 1500}, fits=False, BT=512),
    ])  # fmt: skip
    assert (row.kernel, row.implementations) == ("product_kernel", ["fused", "staged"])
    assert (row.variants, row.compiled, row.failed) == (2, 3, 1)
    assert row.worst == {
        "UB": cli.Worst(1500, 1000, "950", "Qwen3.5-27B TP 2"),
        "L1": cli.Worst(7, 2000, "950", "Qwen3.5-27B TP 2"),
    }
    assert row.warnings == {"slow": ["910B1", "950"], "slower": ["950"]}
    (row,) = cli.tabulate([outcome("910B1", {"UB": 400}), outcome("950", {"UB": 600})])
    assert row.worst["UB"].target == "910B1"  # fewer bytes, but more of what there is


@needs_compiler
def test_compiled_kernels_stay_within_the_limits_of_each_target(monkeypatch: pytest.MonkeyPatch) -> None:
    """And the processes that compile do so where this one interprets."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    fitting, oversized = product(64), product(512)
    results = compile_all([fitting, oversized, fitting], tuple(TARGETS))
    assert len(results) == 2 * len(TARGETS)
    for target in TARGETS:
        result = results[fitting.key, target]
        assert (result.fits, result.message) == (True, "")
        assert set(result.planned) == {"UB", "L1", "L0C"}
        # Two operands of 64 x 128 bfloat16 in L1, a product of 64 x 64 float32 in L0C.
        assert result.planned["L1"] >= 2 * 16 * KIB
        assert result.planned["L0C"] >= 16 * KIB
        for space, planned in result.planned.items():
            assert 0 < planned <= result.limits[space]
        result = results[oversized.key, target]
        assert not result.fits
        assert "overflow, requires" in result.message
        assert "pipeline" not in result.message
        assert result.planned
        for space, needed in result.planned.items():
            assert needed > result.limits[space]
    assert results[fitting.key, "910B1"].limits["UB"] == 192 * KIB
    assert results[fitting.key, "950"].limits["UB"] == 248 * KIB


@needs_compiler
def test_a_kernel_that_triton_refuses_does_not_fit() -> None:
    refused = Variant(product(64).kernel.replace("product", "refused"), (("a", "*fp32"),), (("BT", 64),))
    unknown = product(64, num_threads=4)
    results = compile_all([refused, unknown], ["910B1"])
    assert not results[refused.key, "910B1"].fits
    assert "incompatible dimensions" in results[refused.key, "910B1"].message
    assert "tl.arange(0, 2 * BT)" in results[refused.key, "910B1"].message
    assert not results[unknown.key, "910B1"].fits
    assert results[unknown.key, "910B1"].message.startswith("num_threads is neither a parameter")


@needs_compiler
def test_options_of_a_launch_reach_the_compiler() -> None:
    doubled, single = product(128), product(128, multibuffer=False, num_warps=8)
    results = compile_all([doubled, single], ["910B1"])
    planned = [results[variant.key, "910B1"].planned["L1"] for variant in (doubled, single)]
    assert planned[0] > planned[1]


@needs_compiler
def test_a_compiling_process_that_dies_is_reported(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho out of memory >&2\nexit 7\n")
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    with pytest.raises(UnavailableError, match="ended with status 7: out of memory"):
        compile_all([product(64)], ["910B1"])


@needs_compiler
def test_compile_passes_for_every_implementation(tmp_path: Path) -> None:
    """A part of the gate; `tox run -e ascend` runs all of it."""
    json_file, plot = tmp_path / "result.json", tmp_path / "memory.svg"
    arguments = ("--model", "Qwen3.5-27B", "--tp", "4", "--tp", "1", "--target", "910B1", "--target", "950")
    html, junit = tmp_path / "report.html", tmp_path / "junit.xml"
    files = ("--json", str(json_file), "--plot", str(plot), "--html", str(html), "--junit", str(junit))
    status, output = run(*arguments, *files)
    assert status == 0, output
    result = json.loads(json_file.read_text())
    assert result["passed"] is True
    assert result["options"] == {
        "models": ["Qwen3.5-27B"], "tp": [4, 1], "targets": ["910B1", "950"],
        "implementations": sorted(set(IMPLEMENTATIONS) - {"eager"}),
    }  # fmt: skip
    assert {(u["model"], u["tp"]) for c in result["compiled"] for u in c["used_by"]} == {
        ("Qwen3.5-27B", 4),
        ("Qwen3.5-27B", 1),
    }
    assert result["limits"]["950"]["L0C"] == 256 * KIB
    assert f"{len(result['kernels'])} kernels, {len(result['compiled']) // 2} variants of them" in output
    assert plot.read_text().startswith("<?xml")
    assert f"All {len(result['kernels'])} kernels fit" in Page(html.read_text(encoding="utf-8")).text
    assert f'tests="{2 * len(result["kernels"])}" failures="0"' in junit.read_text(encoding="utf-8")
    assert len(list(tmp_path.iterdir())) == 4
    check_table(result, output)


def check_table(result: dict[str, Any], output: str) -> None:
    """The rows that are printed are those of the JSON, and those follow from what was compiled."""
    lines = output.partition("\ncompiled: ")[0].splitlines()
    for row in result["kernels"]:
        (line,) = (line for line in lines if line.strip().startswith(f"{row['kernel']} "))
        compiled = [c for c in result["compiled"] if c["kernel"] == row["kernel"]]
        assert (row["compiled"], row["failed"]) == (len(compiled), sum(not c["fits"] for c in compiled))
        assert line.split()[-1] == ("yes" if not row["failed"] else str(row["compiled"]))
        for space, worst in row["worst"].items():
            usages = [c["planned"].get(space, 0) / result["limits"][c["target"]][space] for c in compiled]
            assert worst["bytes"] / worst["limit"] == max(usages)
            assert f"{worst['bytes'] / KIB:.4g} of {worst['limit'] // KIB}" in line
        for warning, targets in row["warnings"].items():
            assert f"warning: {row['kernel']} ({', '.join(targets)}): {warning}" in output
            assert targets == [
                t for t in TARGETS if any(t == c["target"] and warning in c["warnings"] for c in compiled)
            ]


@needs_compiler
def test_compile_fails_on_an_oversized_tile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    uses = (cli.Use("staged", "Qwen3.5-9B", 2),)
    jobs = [cli.Job(product(BT), uses) for BT in (64, 512)]
    monkeypatch.setattr(cli, "plan", lambda pool, options: jobs)
    status, output = run("--target", "910B4", "--target", "950", "--json", str(tmp_path / "result.json"))
    assert status == 1
    assert "product_kernel does not fit on 910B4" in output
    assert "BT=512, K=128, HAS_B=True\n  as launched for Qwen3.5-9B TP 2" in output
    assert "cc overflow, requires 8388608 bits while 2097152 bits available" in output
    assert "\nDOES NOT FIT: 1 kernels, 2 variants of them, 2 targets" in output
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["passed"] is False
    assert [(c["constants"]["BT"], c["fits"]) for c in result["compiled"]] == [
        (64, True), (64, True), (512, False), (512, False)
    ]  # fmt: skip
    check_table(result, output)


@needs_compiler
def test_plan_covers_every_launch_of_every_rank() -> None:
    options = cli._check(cli.Options())
    with CompilerPool() as pool:
        jobs = cli.plan(pool, options)
        with pytest.raises(InvalidArgumentError, match="--implementation is eager; allowed: one that"):
            cli.plan(pool, cli._check(cli.Options(implementations=["eager"])))
    used = {(use.implementation, use.model, use.tp) for job in jobs for use in job.used_by}
    implementations = {implementation for implementation, _, _ in used}
    assert implementations == set(IMPLEMENTATIONS) - {"eager"}
    assert used == {(i, m, tp) for i in implementations for m in MODELS for tp in TENSOR_PARALLEL_SIZES}
    heads = {job.variant.name: {dict(job.variant.constants).get("HV") for job in jobs} for job in jobs}
    assert any({2, 4, 6, 8, 12, 16, 24, 32, 48, 64} <= values for values in heads.values())
    assert len({job.variant.key for job in jobs}) == len(jobs)
    for implementation in implementations:  # each rank launches all its kernels, also those that others share
        of_it = [(job.variant.name, use) for job in jobs for use in job.used_by]
        kernels = {use: {name for name, other in of_it if other == use} for _, use in of_it}
        ranks = [names for use, names in kernels.items() if use.implementation == implementation]
        assert all(names == ranks[0] for names in ranks)
    assert {dict(job.variant.constants).get("HAS_INITIAL_STATE") for job in jobs} >= {True, False}
