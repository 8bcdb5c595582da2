"""The definition: against numbers by hand, against loops over scalars, and its properties, bit for bit."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ascend_twin.equivalence_tests.cases import DTYPES, Inputs, PrefillCase
from ascend_twin.equivalence_tests.properties import (
    CUTS,
    EXACT,
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
    check_without_empty,
    prefill_by,
)
from ascend_twin.equivalence_tests.strategies import SEEDS, prefill_cases
from ascend_twin.reference.errors import InvalidArgumentError
from ascend_twin.reference.gdn import recurrent_gated_delta_rule


def by_scalars(case: PrefillCase, inputs: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
    """The formula of the definition in numpy, one number at a time over sequences, heads and tokens."""
    q, k, v, g, beta = (x.double().numpy()[0] for x in inputs[:5] if x is not None)
    states = np.zeros((len(case.seq_lens), case.HV, case.K, case.V))
    if inputs.initial_state is not None:
        states[:] = inputs.initial_state.numpy()
    o = np.zeros_like(v)
    for n, (start, length) in enumerate(zip(case.bounds, case.seq_lens, strict=False)):
        for hv in range(case.HV):
            h = hv // (case.HV // case.H)
            S = states[n, hv]
            for t in range(start, start + length):
                q_t, k_t = q[t, h], k[t, h]
                if case.use_qk_l2norm_in_kernel:
                    q_t, k_t = (x / np.sqrt(x @ x + 1e-6) for x in (q_t, k_t))
                S = np.exp(g[t, hv]) * S
                S = S + np.outer(k_t, beta[t, hv] * (v[t, hv] - k_t @ S))
                o[t, hv] = case.K**-0.5 * (q_t @ S)
            states[n, hv] = S
    return torch.from_numpy(o)[None], torch.from_numpy(states)


def test_recurrent_equals_a_calculation_by_hand():
    # Token 1: S = [2, 0] after the decay by half; k reads 2, writes 0.5 (6 - 2): S = [4, 0]; o = 4.
    # Token 2: no decay; k reads 0, writes 3: S = [4, 3]; o = 4 + 2 * 3.
    o, final_state = recurrent_gated_delta_rule(
        torch.tensor([[1.0, 1.0], [1.0, 2.0]]).view(1, 2, 1, 2),
        torch.tensor([[1.0, 0.0], [0.0, 1.0]]).view(1, 2, 1, 2),
        torch.tensor([6.0, 3.0]).view(1, 2, 1, 1),
        torch.tensor([0.5, 1.0], dtype=torch.float64).log().view(1, 2, 1),
        torch.tensor([0.5, 1.0]).view(1, 2, 1),
        scale=1.0,
        initial_state=torch.tensor([4.0, 0.0]).view(1, 1, 2, 1),
        output_final_state=True,
    )
    assert o.flatten().tolist() == [4.0, 10.0]
    assert final_state is not None
    assert final_state.flatten().tolist() == [4.0, 3.0]


@given(prefill_cases(max_length=66))
def test_recurrent_equals_loops_over_scalars(case: PrefillCase):
    inputs = case.inputs()
    actual = prefill_by(recurrent_gated_delta_rule, case)(inputs)
    assert_agree(actual, by_scalars(case, inputs), case.bounds, REGROUPED)


@given(SEEDS)
def test_recurrent_is_the_ungated_delta_rule_when_g_is_zero_and_beta_one(seed: int):
    # flashinfer#2490. Each token takes off what its key reads and writes its value there; nothing decays.
    inputs = PrefillCase((9,), seed, K=8, V=24, dtype="float64", gates="none", betas="one").inputs()
    _, final_state = recurrent_gated_delta_rule(
        *inputs[:5], initial_state=inputs.initial_state, output_final_state=True
    )
    assert inputs.initial_state is not None
    S = inputs.initial_state[0, 0]
    for k, v in zip(inputs.k[0, :, 0], inputs.v[0, :, 0], strict=True):
        S = S - torch.outer(k, k @ S) + torch.outer(k, v)
    torch.testing.assert_close(final_state, S[None, None])


def test_recurrent_refuses_a_linear_decay():
    # flashinfer#2490: a decay of 0.9 passed as g would multiply the state by exp(0.9).
    inputs = PrefillCase((3,)).inputs()
    with pytest.raises(InvalidArgumentError, match="g is the logarithm of the decay"):
        recurrent_gated_delta_rule(*inputs._replace(g=inputs.g.exp())[:5])


@given(WIDE_CASES, CUTS)
def test_recurrent_is_bit_exact_when_split_anywhere(case: PrefillCase, cuts: list[int]):
    check_split(prefill_by(recurrent_gated_delta_rule, case), case, cuts, EXACT)


@given(WIDE_CASES)
def test_recurrent_is_bit_exact_when_sequences_come_one_by_one(case: PrefillCase):
    check_one_by_one(prefill_by(recurrent_gated_delta_rule, case), case, EXACT)


@given(WIDE_CASES, ORDERS)
def test_recurrent_is_bit_exact_in_any_order(case: PrefillCase, order: list[int]):
    check_order(prefill_by(recurrent_gated_delta_rule, case), case, order, EXACT)


@given(WIDE_CASES)
def test_recurrent_ignores_empty_sequences_and_returns_their_state(case: PrefillCase):
    check_without_empty(prefill_by(recurrent_gated_delta_rule, case), case, EXACT)


@given(WIDE_CASES)
def test_recurrent_ignores_padding(case: PrefillCase):
    check_padding(prefill_by(recurrent_gated_delta_rule, case), case, EXACT)


@given(WIDE_CASES, SEEDS, CUTS)
def test_recurrent_is_causal(case: PrefillCase, other_seed: int, cuts: list[int]):
    check_causal(prefill_by(recurrent_gated_delta_rule, case), case, other_seed, cuts)


@given(WIDE_CASES, st.integers(1, 3), st.integers(0, 70))
def test_recurrent_takes_dense_rows_as_packed_sequences(case: PrefillCase, B: int, T: int):
    check_dense(prefill_by(recurrent_gated_delta_rule, case), replace(case, seq_lens=(T,) * B), EXACT)


@pytest.mark.parametrize("seq_lens", [(), (0,), (0, 0, 0)])
def test_recurrent_returns_empty_tensors_when_there_is_no_token(seq_lens: tuple[int, ...]):
    inputs = PrefillCase(seq_lens, HV=2, K=8, V=24).inputs()
    o, final_state = prefill_by(recurrent_gated_delta_rule, PrefillCase(seq_lens))(inputs)
    assert inputs.initial_state is not None
    assert o.shape == (1, 0, 2, 24)
    assert torch.equal(final_state, inputs.initial_state.double())


def test_recurrent_returns_no_state_unless_asked():
    assert recurrent_gated_delta_rule(*PrefillCase((3,)).inputs()[:5])[1] is None


def test_recurrent_scales_the_output_only():
    case = PrefillCase((5, 2))
    o, final_state = prefill_by(recurrent_gated_delta_rule, case)(case.inputs())
    doubled_o, same_state = prefill_by(recurrent_gated_delta_rule, case, scale=2 * 16**-0.5)(case.inputs())
    assert_agree((doubled_o, same_state), (2 * o, final_state), case.bounds, EXACT)


@pytest.mark.parametrize("eps", [0.0, 1e-6, 0.5])
def test_recurrent_l2norm_has_eps_inside_the_root(eps: float):
    case = PrefillCase((5, 2), dtype="float64", use_qk_l2norm_in_kernel=True)
    inputs = case.inputs()
    q, k = (x / (x.square().sum(-1, keepdim=True) + eps).sqrt() for x in (inputs.q, inputs.k))
    expected = prefill_by(recurrent_gated_delta_rule, replace(case, use_qk_l2norm_in_kernel=False))(
        inputs._replace(q=q, k=k)
    )
    actual = prefill_by(recurrent_gated_delta_rule, case, eps=eps)(inputs)
    assert_agree(actual, expected, case.bounds, REGROUPED)


@pytest.mark.parametrize("dtype", DTYPES)
def test_recurrent_does_not_round_the_truth(dtype: str):
    inputs = PrefillCase((5, 2), dtype=dtype).inputs()
    for result in prefill_by(recurrent_gated_delta_rule, PrefillCase((5, 2)))(inputs):
        assert result.dtype == torch.float64
        assert (result != result.float()).any()


def test_recurrent_takes_a_scale_of_zero():
    inputs = PrefillCase((5,)).inputs()
    o, _ = recurrent_gated_delta_rule(*inputs[:5], scale=0.0)
    assert not o.count_nonzero()
