"""The gates: finite, in their domain, and equal to what PyTorch computes in float64."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ascend_twin.equivalence_tests.cases import DTYPES
from ascend_twin.equivalence_tests.tolerances import FLOORS
from ascend_twin.reference.errors import InvalidArgumentError
from ascend_twin.reference.gdn import fused_gdn_gating

ANY_FLOAT32 = st.floats(width=32, allow_nan=False, allow_infinity=False)
ANY_FLOAT64 = st.floats(allow_nan=False, allow_infinity=False)


def gates(
    A_log: float, a: float, b: float, dt_bias: float, dtype: torch.dtype = torch.float64
) -> tuple[float, float]:
    """The gates of one token and one head."""
    tensors = (torch.tensor([x], dtype=dtype) for x in (A_log, a, b, dt_bias))
    g, beta = fused_gdn_gating(*tensors)
    return g.item(), beta.item()


@pytest.mark.parametrize("dtype", DTYPES)
def test_gating_equals_the_formula_in_float64(dtype: str):
    rng = torch.Generator().manual_seed(0)
    shapes = ((3,), (2, 500, 3), (2, 500, 3), (3,))
    A_log, a, b, dt_bias = ((4 * torch.randn(s, generator=rng)).to(DTYPES[dtype]) for s in shapes)
    g, beta = fused_gdn_gating(A_log, a, b, dt_bias)
    softplus = torch.nn.functional.softplus(a.double() + dt_bias.double(), threshold=1e9)
    wide = torch.float64 if dtype == "float64" else torch.float32
    tolerance = FLOORS[wide].ratio
    torch.testing.assert_close(g.double(), -A_log.double().exp() * softplus, rtol=tolerance, atol=0)
    torch.testing.assert_close(beta, b.double().sigmoid().to(b.dtype), rtol=FLOORS[b.dtype].ratio, atol=0)
    assert g.dtype == wide


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("a", "expected"), [(1e4, -1e4), (-1e4, 0.0), (20.5, -20.5), (0.0, -math.log(2))])
def test_gating_softplus_neither_overflows_nor_drops_its_tail(a: float, expected: float, dtype: torch.dtype):
    # asc#10553, flashinfer#4481. Above 20 softplus(x) is x: the rest is below the last digit of float32.
    g, _ = gates(0.0, a, 0.0, 0.0, dtype)
    assert g == pytest.approx(expected, rel=1e-8 if dtype == torch.float64 else 1e-7)


def test_gating_softplus_keeps_small_values_of_a_negative_argument():
    # log(1 + exp(x)) in place of log1p loses them all.
    assert gates(0.0, -50.0, 0.0, 0.0)[0] == pytest.approx(-math.exp(-50.0), rel=1e-12)


@given(ANY_FLOAT32, ANY_FLOAT32, ANY_FLOAT32, ANY_FLOAT32)
def test_gating_is_finite_and_in_its_domain_when_float32(A_log: float, a: float, b: float, dt_bias: float):
    assert_in_domain(*gates(A_log, a, b, dt_bias, torch.float32))


@given(ANY_FLOAT64, ANY_FLOAT64, ANY_FLOAT64, ANY_FLOAT64)
def test_gating_is_finite_and_in_its_domain_when_float64(A_log: float, a: float, b: float, dt_bias: float):
    assert_in_domain(*gates(A_log, a, b, dt_bias, torch.float64))


@pytest.mark.parametrize("dtype", DTYPES.values())
@pytest.mark.parametrize("A_log", [-1, 0, 1])
@pytest.mark.parametrize("a", [-1, 1])
@pytest.mark.parametrize("dt_bias", [-1, 1])
def test_gating_is_finite_at_the_ends_of_a_dtype(A_log: int, a: int, dt_bias: int, dtype: torch.dtype):
    # a + dt_bias overflows, and exp(A_log) is 0 or infinite.
    largest = torch.finfo(dtype).max
    assert_in_domain(*gates(A_log * largest, a * largest, largest, dt_bias * largest, dtype))


def assert_in_domain(g: float, beta: float) -> None:
    assert math.isfinite(g)
    assert g <= 0
    assert 0 <= beta <= 1


@pytest.mark.parametrize("shape", [(0, 3), (3,), (2, 0, 3), (1, 5, 3)])
def test_gating_keeps_the_shape_of_a(shape: tuple[int, ...]):
    g, beta = fused_gdn_gating(torch.zeros(3), torch.zeros(shape), torch.zeros(shape), torch.zeros(3))
    assert g.shape == beta.shape == shape


@pytest.mark.parametrize("double", ["A_log", "a and b", "dt_bias"])
def test_gating_computes_in_float64_when_any_input_is(double: str):
    tensors = {"A_log": torch.zeros(3), "a and b": torch.zeros(2, 3), "dt_bias": torch.zeros(3)}
    A_log, a, dt_bias = (x.to(torch.float64 if n == double else torch.float16) for n, x in tensors.items())
    g, beta = fused_gdn_gating(A_log, a, a, dt_bias)
    assert g.dtype == torch.float64
    assert beta.dtype == a.dtype


@pytest.mark.parametrize(
    ("name", "wrong", "message"),
    [
        ("A_log", torch.zeros(2), r"A_log.shape is \(2,\); allowed: \[HV\] = \(3,\)"),
        ("A_log", torch.zeros(1, 3), r"A_log.shape is \(1, 3\); allowed: 1 dimensions"),
        ("A_log", torch.zeros(3, dtype=torch.int64), "A_log.dtype is torch.int64; allowed: torch.float64"),
        ("a", torch.tensor(0.0), "a is .*; allowed: a floating tensor"),
        ("a", torch.zeros(2, 3, dtype=torch.int64), "a is .*; allowed: a floating tensor"),
        ("a", [0.0], "a is list; allowed: a floating tensor"),
        ("b", torch.zeros(3, 3), r"b.shape is \(3, 3\); allowed: shape of a = \(2, 3\)"),
        ("b", torch.zeros(2, 3, dtype=torch.float16), "b.dtype is torch.float16; allowed: torch.float32"),
        ("dt_bias", torch.zeros(4), r"dt_bias.shape is \(4,\); allowed: \[HV\] = \(3,\)"),
        ("dt_bias", 0.0, "dt_bias is a float; allowed: a torch.Tensor"),
        ("dt_bias", torch.zeros(3, device="meta"), "dt_bias.device is meta; allowed: cpu"),
    ],
)
def test_gating_refuses_what_does_not_fit(name: str, wrong: object, message: str):
    head, tokens = torch.zeros(3), torch.zeros(2, 3)
    arguments = {"A_log": head, "a": tokens, "b": tokens, "dt_bias": head}
    with pytest.raises(InvalidArgumentError, match=message):
        fused_gdn_gating(**{**arguments, name: wrong})  # pyright: ignore[reportArgumentType]
