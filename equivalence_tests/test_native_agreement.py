"""Native code and the interpreter, launch by launch on the same bits: not one bit may differ.

What needs native code is skipped where its tools are not installed (`tox run -e ascend` has them).
"""

import importlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import torch
import triton.language as tl
from hypothesis import given, settings

from ascend_twin.equivalence_tests.cases import PrefillCase
from ascend_twin.equivalence_tests.devices import interprets
from ascend_twin.equivalence_tests.kernel_stages import poisoned_memory
from ascend_twin.equivalence_tests.native_agreement import Agreement, as_native
from ascend_twin.equivalence_tests.strategies import Shapes, prefill_cases
from ascend_twin.optimized.gdn import IMPLEMENTATIONS, chunk_gated_delta_rule
from ascend_twin.optimized.gdn.ascend_native import NativeKernels
from ascend_twin.optimized.gdn.device import Device
from ascend_twin.optimized.gdn.kernels.launch import Launch, launches_taken_by
from ascend_twin.optimized.gdn.native_launches import NativeLauncher
from ascend_twin.reference.errors import UnavailableError

# Any to the type checker, to which a kernel takes constants as tl.constexpr only.
triton: Any = importlib.import_module("triton")

DTYPES = ("float32", "float16", "bfloat16")
CASE = PrefillCase((70, 0, 130), H=2, HV=4, K=16, V=32, padding=5, use_qk_l2norm_in_kernel=True)
# Value heads a key head: 1, 2, 3 and 4. Head dims: of no tile, of one, of the largest.
SHAPES = (
    (1, 1, 24, 48),
    (1, 2, 80, 100),
    (2, 6, 100, 24),
    (1, 4, 48, 80),
    (1, 2, 128, 128),
    (1, 1, 256, 256),
)

with_triton = pytest.mark.parametrize(
    "implementation", [name for name, i in IMPLEMENTATIONS.items() if i.uses_triton]
)


@pytest.fixture(scope="module", autouse=True)
def _interpreted(device: Device, triton_runs: None) -> None:
    if not interprets(device):
        pytest.skip("native code is compared with the interpreter: --device cpu")


@pytest.fixture(scope="module")
def native() -> NativeLauncher:
    try:
        return NativeLauncher()
    except UnavailableError as error:
        pytest.skip(f"{error}; what needs no native code ran")


def agreement_on(case: PrefillCase, implementation: str, native: Callable[[Launch], None]) -> Agreement:
    """What came out of comparing every launch of the op."""
    agreement = Agreement(native)
    with launches_taken_by(agreement), poisoned_memory():
        chunk_gated_delta_rule(
            **case.inputs()._asdict(),
            output_final_state=True,
            use_qk_l2norm_in_kernel=case.use_qk_l2norm_in_kernel,
            implementation=implementation,
        )
    return agreement


def assert_agrees(case: PrefillCase, implementation: str, native: Callable[[Launch], None]) -> None:
    agreement = agreement_on(case, implementation, native)
    assert agreement.num_launches or not sum(case.seq_lens)
    assert not agreement.disagreements, "\n".join(map(str, agreement.disagreements))


@pytest.mark.parametrize("dtype", DTYPES)
@with_triton
def test_native_code_leaves_the_bits_of_the_interpreter(
    implementation: str, dtype: str, native: NativeLauncher, compiled_shapes: Shapes | None
):
    @settings(max_examples=max(3, settings().max_examples // 15))
    @given(prefill_cases(dtypes=(dtype,), max_num_seqs=3, max_length=130, shapes=compiled_shapes))
    @hypothesis.example(replace(CASE, dtype=dtype, gates="forget"))
    def check(case: PrefillCase) -> None:
        assert_agrees(case, implementation, native)

    check()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@with_triton
def test_native_code_leaves_the_bits_of_the_interpreter_for_any_shape(
    implementation: str, shape: tuple[int, int, int, int], native: NativeLauncher
):
    H, HV, K, V = shape
    dtype = DTYPES[SHAPES.index(shape) % 3]
    assert_agrees(replace(CASE, seq_lens=(65, 2), H=H, HV=HV, K=K, V=V, dtype=dtype), implementation, native)


def test_agreement_finds_what_no_limit_sees(native: NativeLauncher, tmp_path: Path):
    # Log decays split at another bit: every decay stays exact to float32, and is rounded otherwise.
    def split_elsewhere(kernel: str, linalg: str) -> str:
        return linalg.replace("1.024000e+03", "2.048000e+03").replace("9.765625E-4", "4.8828125E-4")

    wrong = NativeLauncher(NativeKernels(tmp_path, edit=split_elsewhere))
    found = agreement_on(CASE, "fused", lambda x: (wrong if "intra" in x.name else native)(x)).disagreements
    assert {(d.kernel, d.parameter) for d in found} <= {
        ("fused_intra_chunk_kernel", parameter) for parameter in ("A", "Aqk", "factors")
    }
    assert found
    assert all(d.native == pytest.approx(d.interpreted, rel=1e-5) for d in found)


# The comparison itself: what plays native code here is the interpreter

SMALL = PrefillCase((3, 0, 65))


def interpreted(launch: Launch) -> None:
    with as_native():
        launch.kernel[(launch.num_programs,)](**launch.arguments, **launch.constants)


def changing(parameter: str, change: Callable[[torch.Tensor], object]) -> Callable[[Launch], None]:
    """Runs launches, then changes a tensor of those of chunk_fwd_o."""

    def run(launch: Launch) -> None:
        interpreted(launch)
        if launch.name == "chunk_fwd_o_kernel":
            change(launch.arguments[parameter])

    return run


def flip_last_bit(x: torch.Tensor) -> None:
    x.view(torch.int32)[3, 0, 2] ^= 1


def test_agreement_finds_nothing_where_nothing_differs():
    agreement = agreement_on(SMALL, "staged", interpreted)
    assert (agreement.num_launches, agreement.disagreements) == (6, [])


@pytest.mark.parametrize("parameter", ["o", "v_new"])
def test_agreement_names_the_one_bit_that_differs(parameter: str):
    (found,) = agreement_on(SMALL, "staged", changing(parameter, flip_last_bit)).disagreements
    assert (found.kernel, found.parameter, found.place) == ("chunk_fwd_o_kernel", parameter, (3, 0, 2))
    assert (found.num_differing, found.size) == (1, 68 * 16)
    assert found.native == pytest.approx(found.interpreted, rel=1e-6)
    assert f"{parameter}[3, 0, 2]" in str(found)


def test_agreement_tells_a_zero_from_its_negative_and_from_nan():
    for value, count in ((-0.0, 1), (float("nan"), 1), (0.0, 0)):
        found = agreement_on(
            replace(SMALL, betas="zero", initial_state=False),
            "staged",
            changing("v_new", lambda x, value=value: x[0, 0, 0].fill_(value)),
        ).disagreements
        assert [d.num_differing for d in found] == [count] * count


def test_agreement_starts_later_launches_from_what_the_interpreter_wrote():
    results = []
    for native in (interpreted, changing("h", lambda x: x.fill_(7.0))):
        with launches_taken_by(Agreement(native)):
            o, _ = chunk_gated_delta_rule(**SMALL.inputs()._asdict(), implementation="staged")
        results.append(o)
    assert torch.equal(*results)


@triton.jit
def sums_kernel(x, y, start, product, total, power, BT: tl.constexpr):
    """product = start + x y, total = row sums of x, power = exp(x)."""
    o_i = tl.arange(0, BT)
    o_ij = o_i[:, None] * BT + o_i[None, :]
    b_x, b_product = tl.load(x + o_ij), tl.load(start + o_ij)
    b_product += tl.dot(b_x, tl.load(y + o_ij), input_precision="ieee")
    tl.store(product + o_ij, b_product)
    tl.store(total + o_i, tl.sum(b_x, 1))
    tl.store(power + o_ij, tl.exp(b_x))


def test_as_native_adds_in_order_and_starts_a_product_from_what_it_is_added_to():
    x, y, start = torch.randn(3, 64, 64, generator=torch.Generator().manual_seed(0))
    product, total = start.clone(), torch.zeros(64)
    for k in range(64):
        product += x[:, k, None] * y[None, k]
        total += x[:, k]
    results = [torch.empty(64, 64), torch.empty(64), torch.empty(64, 64)]
    with as_native():
        sums_kernel[(1,)](x, y, start, *results, BT=64)
    assert torch.equal(results[0], product)
    assert torch.equal(results[1], total)
    torch.testing.assert_close(results[2], x.exp(), rtol=3e-7, atol=0)
    sums_kernel[(1,)](x, y, start, *results, BT=64)
    assert not torch.equal(results[0], product)
    assert not torch.equal(results[1], total)
