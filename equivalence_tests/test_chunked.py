"""The chunked reference against the definition, and the properties of any prefill."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from ascend_twin.equivalence_tests.cases import DTYPES, GATES, PrefillCase, truth_of
from ascend_twin.equivalence_tests.compare import Comparison, compare_o, compare_state
from ascend_twin.equivalence_tests.properties import (
    CUTS,
    ORDERS,
    REGROUPED,
    WIDE_CASES,
    assert_agree,
    check_causal,
    check_dense,
    check_one_by_one,
    check_order,
    check_padding,
    check_split,
    check_then_decode,
    check_without_empty,
    prefill_by,
)
from ascend_twin.equivalence_tests.strategies import SEEDS, prefill_cases
from ascend_twin.equivalence_tests.tolerances import limit
from ascend_twin.reference.gdn import chunk_gated_delta_rule, recurrent_gated_delta_rule

CHUNK_SIZES = st.sampled_from([1, 16, 32, 64, 100])

# The floors of 16-bit dtypes were measured on such cases. Elsewhere nothing bounds what rounded operands
# err relative to the result: a row of o may cancel, and identical keys differ by rounding alone.
MEASURED_CASES = st.builds(
    PrefillCase,
    seq_lens=st.lists(st.integers(16, 3 * 64 + 2), max_size=3).map(tuple),
    seed=SEEDS,
    HV=st.sampled_from([1, 2]),
    K=st.just(64),
    V=st.just(64),
    dtype=st.sampled_from(tuple(DTYPES)),
    gates=st.sampled_from(tuple(GATES)),
    betas=st.sampled_from(["random", "one"]),
    initial_state=st.booleans(),
    use_qk_l2norm_in_kernel=st.booleans(),
)


def comparisons(case: PrefillCase, compute_dtype: torch.dtype, chunk_size: int) -> list[Comparison]:
    """Compare with the definition on the same rounded inputs, within the floors of `compute_dtype`."""
    inputs = case.inputs()
    run = prefill_by(chunk_gated_delta_rule, case, compute_dtype=compute_dtype, chunk_size=chunk_size)
    o, final_state = run(inputs)
    truth_o, truth_state = truth_of(case, inputs)
    state_dtype = torch.float64 if compute_dtype == torch.float64 else torch.float32
    floor = limit(compute_dtype)
    return [
        compare_o(o, truth_o, dtype=compute_dtype, bounds=case.bounds, limit=floor),
        compare_state(final_state, truth_state, dtype=state_dtype, limit=floor),
    ]


@pytest.mark.parametrize("compute_dtype", [torch.float64, torch.float32])
@given(prefill_cases(), CHUNK_SIZES)
def test_chunked_equals_the_definition(compute_dtype: torch.dtype, case: PrefillCase, chunk_size: int):
    for comparison in comparisons(case, compute_dtype, chunk_size):
        assert comparison.passed, str(comparison)


@pytest.mark.parametrize("compute_dtype", [torch.float16, torch.bfloat16])
@given(MEASURED_CASES, CHUNK_SIZES)
def test_chunked_equals_the_definition_when_operands_are_rounded(
    compute_dtype: torch.dtype, case: PrefillCase, chunk_size: int
):
    for comparison in comparisons(case, compute_dtype, chunk_size):
        assert comparison.passed, str(comparison)


@pytest.mark.parametrize("compute_dtype", [torch.float16, torch.bfloat16])
@given(prefill_cases(), CHUNK_SIZES)
def test_chunked_is_finite_when_operands_are_rounded(
    compute_dtype: torch.dtype, case: PrefillCase, chunk_size: int
):
    for comparison in comparisons(case, compute_dtype, chunk_size):
        assert not comparison.problem, str(comparison)


@pytest.mark.parametrize("compute_dtype", DTYPES.values())
@given(st.integers(1, 130), SEEDS)
@example(75, 0)
def test_chunked_is_finite_when_g_is_very_negative(compute_dtype: torch.dtype, T: int, seed: int):
    # fla#792, fla#794: B 2, T 75, H 4, D 64 in float16; a tail read as g = 0 gave exp(0 - g) = inf.
    case = PrefillCase((T, T), seed, H=4, HV=4, K=64, V=64, dtype="float16", gates="steep")
    for comparison in comparisons(case, compute_dtype, chunk_size=64):
        assert not comparison.problem, str(comparison)


@pytest.mark.parametrize(
    "decay",
    [
        pytest.param([0.0, 0.0], id="everything is forgotten at once"),
        pytest.param([1e-12, 1e-12], id="1e-12 a token: exp of a whole chunk under- and overflows"),
        pytest.param([1e-12, 1.0], id="a head that forgets beside one that does not"),
        pytest.param([0.5, 0.0], id="a head that halves beside one that forgets"),
    ],
)
def test_chunked_equals_the_definition_when_decays_are_extreme(decay: list[float]):
    # fla#463: exp(-cumsum g) overflows; only differences within a chunk may be exponentiated.
    case = PrefillCase((200, 0, 65), H=1, HV=2, dtype="float64")
    inputs = case.inputs()
    inputs = inputs._replace(g=torch.tensor(decay, dtype=torch.float64).log().expand_as(inputs.g))
    expected = prefill_by(recurrent_gated_delta_rule, case)(inputs)
    assert_agree(prefill_by(chunk_gated_delta_rule, case)(inputs), expected, case.bounds, REGROUPED)


@given(WIDE_CASES, CUTS, CHUNK_SIZES)
def test_chunked_carries_its_state_over_any_split(case: PrefillCase, cuts: list[int], chunk_size: int):
    check_split(prefill_by(chunk_gated_delta_rule, case, chunk_size=chunk_size), case, cuts, REGROUPED)


@given(WIDE_CASES, st.integers(1, 4))
def test_chunked_then_decode_equals_one_recurrence(case: PrefillCase, num_decodes: int):
    # sgl-kernel-npu#640, in the state that prefill hands over.
    check_then_decode(prefill_by(chunk_gated_delta_rule, case), case, num_decodes, REGROUPED)


@given(WIDE_CASES)
def test_chunked_computes_a_packed_batch_as_its_sequences_one_by_one(case: PrefillCase):
    check_one_by_one(prefill_by(chunk_gated_delta_rule, case), case, REGROUPED)


@given(WIDE_CASES, ORDERS)
def test_chunked_does_not_depend_on_the_order_of_sequences(case: PrefillCase, order: list[int]):
    check_order(prefill_by(chunk_gated_delta_rule, case), case, order, REGROUPED)


@given(WIDE_CASES)
def test_chunked_ignores_empty_sequences_and_returns_their_state(case: PrefillCase):
    check_without_empty(prefill_by(chunk_gated_delta_rule, case), case, REGROUPED)


@given(WIDE_CASES, CHUNK_SIZES)
def test_chunked_ignores_padding(case: PrefillCase, chunk_size: int):
    check_padding(prefill_by(chunk_gated_delta_rule, case, chunk_size=chunk_size), case, REGROUPED)


@given(WIDE_CASES, SEEDS, CUTS, CHUNK_SIZES)
def test_chunked_is_causal(case: PrefillCase, other_seed: int, cuts: list[int], chunk_size: int):
    check_causal(prefill_by(chunk_gated_delta_rule, case, chunk_size=chunk_size), case, other_seed, cuts)


@given(WIDE_CASES, st.integers(1, 3), st.integers(0, 70))
def test_chunked_takes_dense_rows_as_packed_sequences(case: PrefillCase, B: int, T: int):
    check_dense(prefill_by(chunk_gated_delta_rule, case), replace(case, seq_lens=(T,) * B), REGROUPED)


@pytest.mark.parametrize("seq_lens", [(), (0,), (0, 0, 0)])
@pytest.mark.parametrize("padding", [0, 5])
def test_chunked_returns_zeros_and_the_initial_state_when_there_is_no_token(
    seq_lens: tuple[int, ...], padding: int
):
    case = PrefillCase(seq_lens, HV=2, K=8, V=24, padding=padding)
    inputs = case.inputs()
    o, final_state = prefill_by(chunk_gated_delta_rule, case)(inputs)
    assert inputs.initial_state is not None
    assert torch.equal(o, torch.zeros(1, padding, 2, 24, dtype=torch.float64))
    assert torch.equal(final_state, inputs.initial_state.double())


@pytest.mark.parametrize("options", [{"scale": 3.0}, {"eps": 0.5}])
def test_chunked_takes_options_as_the_definition_does(options: dict[str, Any]):
    case = PrefillCase((70, 3), dtype="float64", use_qk_l2norm_in_kernel=True)
    inputs = case.inputs()
    actual = prefill_by(chunk_gated_delta_rule, case, **options)(inputs)
    expected = prefill_by(recurrent_gated_delta_rule, case, **options)(inputs)
    assert_agree(actual, expected, case.bounds, REGROUPED)


def test_chunked_returns_no_state_unless_asked():
    assert chunk_gated_delta_rule(*PrefillCase((3,)).inputs()[:5])[1] is None
