"""Folding what ranks contribute equals one pass over all tokens."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from ascend_twin.equivalence_tests.cases import Inputs, PrefillCase
from ascend_twin.equivalence_tests.compare import compare_o, compare_state
from ascend_twin.equivalence_tests.properties import REGROUPED, WIDE_CASES, prefill_by, rows, take
from ascend_twin.equivalence_tests.strategies import SEEDS
from ascend_twin.reference.gdn import (
    Contribution,
    chunk_gated_delta_rule,
    combine,
    fold_ranks,
    rank_contribution,
    recurrent_gated_delta_rule,
)


def contribution_of(case: PrefillCase, inputs: Inputs) -> Contribution:
    return rank_contribution(
        *inputs[1:5],
        cu_seqlens=inputs.cu_seqlens,
        use_qk_l2norm_in_kernel=case.use_qk_l2norm_in_kernel,
    )


def contributions(seed: int, num_ranks: int) -> list[Contribution]:
    """Of ranks that hold a few tokens of the same two sequences each."""
    cases = [PrefillCase((3, 5), seed + r, HV=2, K=8, V=24, dtype="float64") for r in range(num_ranks)]
    return [contribution_of(case, case.inputs()) for case in cases]


def identity(like: Contribution) -> Contribution:
    return Contribution(torch.eye(like.Phi.shape[-1]).double().expand_as(like.Phi), torch.zeros_like(like.p))


def assert_close(actual: Contribution, expected: Contribution) -> None:
    for name in Contribution._fields:
        a, e = getattr(actual, name), getattr(expected, name)
        torch.testing.assert_close(a, e, rtol=0, atol=1e-12)


@given(WIDE_CASES, st.integers(1, 5), st.data())
def test_fold_ranks_equals_one_pass(case: PrefillCase, num_ranks: int, data: st.DataObject):
    # asc#11508: the hand-off counted Phi S0 twice, which a state of zeros hides.
    inputs = case.inputs()
    prefill = prefill_by(recurrent_gated_delta_rule, case)
    o, final_state = prefill(inputs)
    initial_state = torch.zeros_like(final_state) if inputs.initial_state is None else inputs.initial_state
    cuts = [
        [0, *sorted(data.draw(st.integers(0, length)) for _ in range(num_ranks - 1)), length]
        for length in case.seq_lens
    ]
    parts = [[(n, ends[r], ends[r + 1]) for n, ends in enumerate(cuts)] for r in range(num_ranks)]
    states = fold_ranks([contribution_of(case, take(inputs, p)) for p in parts], initial_state)

    assert len(states) == num_ranks + 1
    comparison = compare_state(states[-1], final_state, dtype=torch.float64, limit=REGROUPED)
    assert comparison.passed, str(comparison)
    folded_o = torch.zeros_like(o)
    for state, part in zip(states, parts, strict=False):
        tokens = rows(inputs.cu_seqlens, part)
        folded_o[:, tokens] = prefill(take(inputs, part)._replace(initial_state=state))[0]
    comparison = compare_o(folded_o, o, dtype=torch.float64, bounds=case.bounds, limit=REGROUPED)
    assert comparison.passed, str(comparison)


@given(SEEDS)
def test_rank_contribution_maps_any_state_to_the_state_after_its_tokens(seed: int):
    case = PrefillCase((3, 70), seed, HV=2, K=8, V=24, dtype="float64")
    inputs = case.inputs()
    Phi, p = contribution_of(case, inputs)
    drawn = inputs.initial_state
    assert drawn is not None
    for state in (torch.zeros_like(drawn), drawn, 1e3 * drawn):
        _, expected = prefill_by(chunk_gated_delta_rule, case)(inputs._replace(initial_state=state))
        comparison = compare_state(Phi @ state + p, expected, dtype=torch.float64, limit=REGROUPED)
        assert comparison.passed, str(comparison)


@given(SEEDS)
def test_combine_is_associative(seed: int):
    a, b, c = contributions(seed, 3)
    assert_close(combine(combine(a, b), c), combine(a, combine(b, c)))


@given(SEEDS)
def test_combine_is_in_the_order_of_tokens(seed: int):
    first, then = contributions(seed, 2)
    S = PrefillCase((3, 5), seed, HV=2, K=8, V=24, dtype="float64").inputs().initial_state
    assert S is not None
    Phi, p = combine(first, then)
    torch.testing.assert_close(Phi @ S + p, then.Phi @ (first.Phi @ S + first.p) + then.p, rtol=0, atol=1e-12)
    assert not torch.allclose(Phi, combine(then, first).Phi)


@given(SEEDS)
def test_combine_with_the_identity_changes_nothing(seed: int):
    (a,) = contributions(seed, 1)
    assert_close(combine(a, identity(a)), a)
    assert_close(combine(identity(a), a), a)


def test_rank_contribution_is_the_identity_when_a_rank_has_no_token():
    case = PrefillCase((0, 0), HV=2, K=8, V=24, dtype="float64")
    of_none = contribution_of(case, case.inputs())
    for actual, expected in zip(of_none, identity(of_none), strict=True):
        assert torch.equal(actual, expected)


def test_fold_ranks_returns_the_state_before_each_rank():
    a, b = contributions(0, 2)
    S = torch.ones(2, 2, 8, 24)
    before, between, after = fold_ranks([a, b], S)
    assert torch.equal(before, S.double())
    torch.testing.assert_close(between, a.Phi @ before + a.p)
    torch.testing.assert_close(after, b.Phi @ between + b.p)
