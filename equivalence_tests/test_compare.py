"""Comparing can fail: each kind of wrong result is caught, and its place is named."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from ascend_twin.equivalence_tests.cases import DTYPES, PrefillCase, minimize
from ascend_twin.equivalence_tests.compare import Comparison, compare_o, compare_state
from ascend_twin.equivalence_tests.strategies import prefill_cases
from ascend_twin.equivalence_tests.tolerances import FLOORS, REFERENCE_FACTOR, Errors, limit

BOUNDS = [0, 3, 3, 8]
HV, K, V = 2, 4, 3


def truth_o(num_tokens: int = 8, num_heads: int = HV) -> torch.Tensor:
    shape = (1, num_tokens, num_heads, V)
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def truth_state() -> torch.Tensor:
    return torch.randn((3, HV, K, V), generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def compared(actual: torch.Tensor, truth: torch.Tensor, dtype: torch.dtype = torch.float32) -> Comparison:
    return compare_o(actual, truth, dtype=dtype, bounds=BOUNDS, limit=limit(dtype))


@pytest.mark.parametrize("dtype", FLOORS)
def test_compare_passes_the_rounded_truth(dtype: torch.dtype):
    assert compared(truth_o().to(dtype), truth_o(), dtype).passed
    assert compare_state(truth_state().to(dtype), truth_state(), dtype=dtype, limit=limit(dtype)).passed


def test_compare_o_catches_one_row_of_zeros_among_65536():
    # Over all rows the error is 1/256 of the result: within the ratio that bfloat16 may have.
    truth = truth_o(2048, 32)
    actual = truth.bfloat16()
    actual[0, 1500, 17] = 0
    found = compare_o(actual, truth, dtype=torch.bfloat16, bounds=[0, 2048], limit=limit(torch.bfloat16))
    assert found.errors.ratio < found.limit.ratio
    assert not found.passed
    assert found.place == "sequence 0, token 1500, head 17"


@pytest.mark.parametrize("dtype", FLOORS)
def test_compare_catches_zeros_when_the_truth_is_tiny(dtype: torch.dtype):
    # An absolute tolerance would swallow them. 1e-6 is below the normal numbers of float16.
    tiny = 1e-6 if dtype == torch.float16 else 1e-30
    assert not compared(torch.zeros(1, 8, HV, V, dtype=dtype), tiny * truth_o(), dtype).passed
    assert compared((tiny * truth_o()).to(dtype), tiny * truth_o(), dtype).passed


def test_compare_catches_a_tiny_sequence_beside_a_large_one():
    truth = truth_o()
    truth[:, 3:] *= 1e-12
    actual = truth.float()
    actual[:, 3:] = 0
    found = compared(actual, truth)
    assert not found.passed
    assert found.sequence == 2


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        (math.nan, "NaN in 1 of 48 values, first at [0, 5, 1, 2]"),
        (math.inf, "Inf in 1 of 48 values, first at"),
    ],
)
def test_compare_o_catches_what_is_not_finite(value: float, problem: str):
    actual = truth_o().float()
    actual[0, 5, 1, 2] = value
    found = compared(actual, truth_o())
    assert not found.passed
    assert problem in str(found)


@pytest.mark.parametrize(
    ("actual", "problem"),
    [
        (truth_o(), "dtype is torch.float64, expected torch.float32"),
        (truth_o().half(), "dtype is torch.float16, expected torch.float32"),
        (truth_o().float()[0], "shape is (8, 2, 3), expected (1, 8, 2, 3)"),
        (truth_o().float()[:, :7], "shape is (1, 7, 2, 3), expected (1, 8, 2, 3)"),
        (truth_o().float().to("meta"), "device is meta, expected cpu"),
    ],
)
def test_compare_o_catches_another_kind_of_tensor(actual: torch.Tensor, problem: str):
    found = compared(actual, truth_o())
    assert not found.passed
    assert str(found) == f"o: {problem}"


def test_compare_o_catches_what_is_written_behind_the_last_sequence():
    actual, truth = truth_o(10).float(), truth_o(10)
    assert "rows behind token 8 belong to no sequence and are not 0" in str(compared(actual, truth))
    actual[:, 8:] = 0
    assert compared(actual, truth).passed


def test_compare_state_catches_a_missing_state():
    found = compare_state(None, truth_state(), dtype=torch.float32, limit=limit(torch.float32))
    assert not found.passed
    assert str(found) == "final_state: is None"


@pytest.mark.parametrize(
    ("token", "place"),
    [
        (0, "sequence 0, token 0"),
        (2, "sequence 0, token 2"),
        (3, "sequence 2, token 0"),
        (7, "sequence 2, token 4"),
    ],
)
@pytest.mark.parametrize("head", range(HV))
def test_compare_o_names_the_place(token: int, place: str, head: int):
    actual = truth_o().float()
    actual[0, token, head] += 1
    found = compared(actual, truth_o())
    assert not found.passed
    assert str(found).endswith(f"at {place}, head {head}")


@pytest.mark.parametrize("sequence", range(3))
@pytest.mark.parametrize("row", range(K))
@pytest.mark.parametrize("head", range(HV))
def test_compare_state_names_the_place(sequence: int, row: int, head: int):
    actual = truth_state().float()
    actual[sequence, head, row] += 1
    found = compare_state(actual, truth_state(), dtype=torch.float32, limit=limit(torch.float32))
    assert not found.passed
    assert str(found).endswith(f"at sequence {sequence}, key row {row}, head {head}")


@pytest.mark.parametrize("scale", [1e-300, 1e-160, 1.0, 1e160, 1e300])
def test_compare_measures_errors_of_any_magnitude(scale: float):
    truth = truth_o()
    found = compared((1 + 1e-6) * scale * truth, scale * truth, torch.float64)
    assert found.errors.ratio == pytest.approx(1e-6, rel=1e-6)
    assert not found.passed


def test_compare_passes_sequences_without_tokens():
    o = torch.zeros(1, 0, HV, V)
    found = compare_o(o, o.double(), dtype=torch.float32, bounds=[0, 0, 0], limit=limit(torch.float32))
    assert found.passed
    assert found.place == "nowhere"


@pytest.mark.parametrize("dtype", FLOORS)
def test_limit_is_the_floor_or_twice_the_error_of_the_reference(dtype: torch.dtype):
    floor = FLOORS[dtype]
    assert limit(dtype) == limit(dtype, Errors(0.0, 0.0)) == floor
    assert limit(dtype, Errors(0.0, 1.0)) == Errors(floor.ratio, REFERENCE_FACTOR)
    assert limit(dtype, Errors(1.0, 0.0)) == Errors(REFERENCE_FACTOR, floor.worst_row)


def test_limit_is_the_floor_when_the_reference_could_not_be_compared():
    assert limit(torch.float16, Errors(math.nan, math.nan)) == FLOORS[torch.float16]


@given(prefill_cases())
@example(PrefillCase((0, 130, 7, 200), 5, H=2, HV=4, K=32, V=24, gates="steep", betas="mixed", padding=64))
def test_minimize_finds_the_smallest_case_of_a_planted_bug(case: PrefillCase):
    def fails(case: PrefillCase) -> bool:
        return any(length > 64 for length in case.seq_lens) and case.HV > case.H

    case = replace(case, seq_lens=(*case.seq_lens, 65), H=2, HV=4)
    smallest = minimize(case, fails)
    plain = PrefillCase((65,), case.seed, dtype=case.dtype, gates="none", betas="one", initial_state=False)
    assert smallest == replace(plain, HV=smallest.HV, keys=smallest.keys)
    assert fails(smallest)


@given(st.sampled_from(tuple(DTYPES)))
def test_minimize_returns_a_case_that_cannot_be_smaller(dtype: str):
    case = PrefillCase((0,), K=16, V=16, dtype=dtype, gates="none", betas="one", initial_state=False)
    assert minimize(case, lambda _: True) == case
