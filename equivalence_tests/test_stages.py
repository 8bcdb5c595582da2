"""Each stage alone, against its formula as a loop over the tokens of a chunk."""

import math
from collections.abc import Callable
from itertools import accumulate

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ascend_twin.equivalence_tests.compare import compare_state
from ascend_twin.equivalence_tests.strategies import SEEDS, sequence_lengths
from ascend_twin.equivalence_tests.tolerances import FLOORS, limit
from ascend_twin.reference.errors import InvalidArgumentError
from ascend_twin.reference.gdn import stages
from ascend_twin.reference.gdn.metadata import chunk_indices

HALF_DTYPES = (torch.bfloat16, torch.float16)
BOUNDS = sequence_lengths().map(lambda lens: [0, *accumulate(lens)])
CHUNK_SIZES = st.sampled_from([1, 3, 16, 64, 100])
NT, HV, BT, K, V = 3, 2, 7, 8, 5
SHAPES = {
    "q": (NT, HV, BT, K),
    "k": (NT, HV, BT, K),
    "v": (NT, HV, BT, V),
    "Ai": (NT, HV, BT, BT),
    "A": (NT, HV, BT, BT),
    "w": (NT, HV, BT, K),
    "h": (NT, HV, K, V),
    "state": (2, HV, K, V),
}


def drawn(names: str, seed: int) -> list[torch.Tensor]:
    """Tensors of a few chunks by name, in float64: g in [-4, 0], beta in [0, 1], the others normal."""
    rng = torch.Generator().manual_seed(seed)
    tensors = []
    for name in names.split():
        if name in ("g", "beta"):
            x = torch.rand((NT, HV, BT), generator=rng, dtype=torch.float64)
            tensors.append(-4 * x if name == "g" else x)
        else:
            x = torch.randn(SHAPES[name], generator=rng, dtype=torch.float64)
            tensors.append(x.tril(-1) if name == "A" else x / x.shape[-1] ** 0.5)
    return tensors


def chunks_and_heads() -> list[tuple[int, int]]:
    return [(c, hv) for c in range(NT) for hv in range(HV)]


def decay(g: torch.Tensor, j: int, i: int) -> float:
    """Decay over the tokens (j, i] of one chunk `[BT]`."""
    return math.exp(sum(g[t].item() for t in range(j + 1, i + 1)))


def assert_close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12)


@given(SEEDS)
def test_pairwise_decay_sums_from_after_j_to_i(seed: int):
    (g,) = drawn("g", seed)
    D = stages.pairwise_decay(g)
    for c, hv in chunks_and_heads():
        for i in range(BT):
            for j in range(BT):
                expected = math.exp(sum(g[c, hv, j + 1 : i + 1].tolist())) if i >= j else 0.0
                assert D[c, hv, i, j].item() == pytest.approx(expected, abs=1e-12)


def test_pairwise_decay_is_defined_where_g_is_minus_infinity():
    D = stages.pairwise_decay(torch.tensor([-1.0, -math.inf, -2.0, -3.0], dtype=torch.float64))
    assert D.log().tolist() == [
        [0.0, -math.inf, -math.inf, -math.inf],
        [-math.inf, 0.0, -math.inf, -math.inf],
        [-math.inf, -2.0, 0.0, -math.inf],
        [-math.inf, -5.0, -3.0, 0.0],
    ]


def test_pairwise_decay_keeps_small_decays_behind_a_steep_one():
    # fla#463: as a difference of cumulative sums the last exponent is 0 in float32.
    g = torch.tensor([-1e3] * 64 + [-1e-5])
    D = stages.pairwise_decay(g)
    assert D[-1, -2] == g[-1].exp()
    assert D.isfinite().all()


def packed(bounds: list[int], padding: int, seed: int) -> torch.Tensor:
    return torch.randn(bounds[-1] + padding, 2, 3, generator=torch.Generator().manual_seed(seed))


@given(BOUNDS, CHUNK_SIZES, st.integers(0, 3), SEEDS)
def test_to_chunks_places_every_token_and_zeros_elsewhere(
    bounds: list[int], BT: int, padding: int, seed: int
):
    x = packed(bounds, padding, seed)
    chunks = stages.to_chunks(x, bounds, BT)
    pairs = chunk_indices(bounds, BT).tolist()
    assert chunks.shape == (len(pairs), 2, BT, 3)
    for chunk, (n, i) in zip(chunks, pairs, strict=True):
        tokens = x[bounds[n] + i * BT : min(bounds[n] + (i + 1) * BT, bounds[n + 1])].transpose(0, 1)
        assert torch.equal(chunk[:, : tokens.shape[1]], tokens)
        assert not chunk[:, tokens.shape[1] :].count_nonzero()
    assert torch.equal(stages.to_chunks(x[..., 0], bounds, BT), chunks[..., 0])


@given(BOUNDS, CHUNK_SIZES, st.integers(0, 3), SEEDS)
def test_from_chunks_undoes_to_chunks(bounds: list[int], BT: int, padding: int, seed: int):
    x = packed(bounds, padding, seed)
    back = stages.from_chunks(stages.to_chunks(x, bounds, BT), bounds, len(x))
    x[bounds[-1] :] = 0
    assert torch.equal(back, x)


def test_from_chunks_refuses_another_number_of_chunks():
    with pytest.raises(InvalidArgumentError, match=r"x.shape\[0\] is 3; allowed: 2, the number of chunks"):
        stages.from_chunks(torch.zeros(3, 1, 4, 1), [0, 8], 8)


@given(SEEDS)
def test_l2norm_scales_rows_by_the_root_of_their_squares_and_eps(seed: int):
    (x,) = drawn("k", seed)
    for eps in (1e-6, 0.5):
        out = stages.l2norm(x, eps=eps)
        for c, hv in chunks_and_heads():
            for i in range(BT):
                length = math.sqrt(sum(value**2 for value in x[c, hv, i].tolist()) + eps)
                assert_close(out[c, hv, i], x[c, hv, i] / length)


def test_l2norm_of_zeros_is_zero():
    assert not stages.l2norm(torch.zeros(2, 4)).count_nonzero()


@given(SEEDS)
def test_chunk_local_cumsum_includes_its_token_and_starts_anew_in_each_chunk(seed: int):
    (g,) = drawn("g", seed)
    out = stages.chunk_local_cumsum(g)
    for c, hv in chunks_and_heads():
        for i in range(BT):
            assert out[c, hv, i].item() == pytest.approx(sum(g[c, hv, : i + 1].tolist()), abs=1e-12)


@given(SEEDS)
def test_chunk_scaled_dot_kkt_equals_its_formula(seed: int):
    k, g, beta = drawn("k g beta", seed)
    A = stages.chunk_scaled_dot_kkt(k, g, beta)
    expected = torch.zeros_like(A)
    for c, hv in chunks_and_heads():
        for i in range(BT):
            for j in range(i):
                dot = k[c, hv, i] @ k[c, hv, j]
                expected[c, hv, i, j] = beta[c, hv, i] * decay(g[c, hv], j, i) * dot
    assert_close(A, expected)


@given(st.integers(1, 64), SEEDS)
def test_solve_tril_inverts_what_keys_can_make(length: int, seed: int):
    # fla#537: the inverse of an arbitrary triangular matrix explodes; normalised keys make none such.
    rng = torch.Generator().manual_seed(seed)
    k = stages.l2norm(torch.randn((1, 1, length, 16), generator=rng, dtype=torch.float64))
    beta = torch.rand((1, 1, length), generator=rng, dtype=torch.float64)
    A = stages.chunk_scaled_dot_kkt(k, -beta.flip(-1), beta)
    assert_inverse(A, stages.solve_tril(A))


@pytest.mark.parametrize("length", [1, 2, 16, 63, 64, 100])
def test_solve_tril_inverts_identical_keys(length: int):
    # The hard case: beta 1 and no decay make A all ones; its inverse has 1 and -1 on two diagonals, no more.
    k = torch.ones(1, 1, length, 1, dtype=torch.float64)
    g = torch.zeros(1, 1, length, dtype=torch.float64)
    A = stages.chunk_scaled_dot_kkt(k, g, torch.ones_like(g))
    assert torch.equal(A[0, 0], torch.ones(length, length, dtype=torch.float64).tril(-1))
    Ai = stages.solve_tril(A)
    assert_inverse(A, Ai)
    assert torch.equal(Ai[0, 0], torch.eye(length) - torch.eye(length).roll(1, 0).tril(-1))


def assert_inverse(A: torch.Tensor, Ai: torch.Tensor) -> None:
    eye = torch.eye(A.shape[-1], dtype=A.dtype).expand_as(A)
    assert_close((eye + A) @ Ai, eye)
    assert torch.equal(Ai, Ai.tril())


@given(SEEDS)
def test_recompute_w_u_equals_its_formula(seed: int):
    k, v, g, beta, Ai = drawn("k v g beta Ai", seed)
    w, u = stages.recompute_w_u(k, v, g, beta, Ai)
    expected_w, expected_u = torch.zeros_like(w), torch.zeros_like(u)
    for c, hv in chunks_and_heads():
        for i in range(BT):
            for j in range(BT):
                factor = Ai[c, hv, i, j] * beta[c, hv, j]
                expected_w[c, hv, i] += factor * decay(g[c, hv], -1, j) * k[c, hv, j]
                expected_u[c, hv, i] += factor * v[c, hv, j]
    assert_close(w, expected_w)
    assert_close(u, expected_u)


@given(SEEDS, st.sampled_from([[0, 3, 3], [0, 0, 3], [0, 1, 3], [0, 2, 3]]))
def test_chunk_delta_h_equals_its_formula(seed: int, offsets: list[int]):
    k, w, u, g, S0 = drawn("k w v g state", seed)
    before = S0.clone()
    h, v_new, final_state = stages.chunk_delta_h(k, w, u, g, chunk_offsets=offsets, initial_state=S0)
    for n in range(2):
        for hv in range(HV):
            S = S0[n, hv]
            for c in range(offsets[n], offsets[n + 1]):
                assert_close(h[c, hv], S)
                corrected = u[c, hv] - w[c, hv] @ S
                assert_close(v_new[c, hv], corrected)
                S = decay(g[c, hv], -1, BT - 1) * S
                for i in range(BT):
                    S = S + decay(g[c, hv], i, BT - 1) * torch.outer(k[c, hv, i], corrected[i])
            assert_close(final_state[n, hv], S)
    assert torch.equal(S0, before)


@given(SEEDS)
def test_chunk_fwd_o_equals_its_formula(seed: int):
    q, k, v_new, h, g = drawn("q k v h g", seed)
    o = stages.chunk_fwd_o(q, k, v_new, h, g, scale=0.3)
    for c, hv in chunks_and_heads():
        for i in range(BT):
            expected = decay(g[c, hv], -1, i) * (q[c, hv, i] @ h[c, hv])
            for j in range(i + 1):
                expected += decay(g[c, hv], j, i) * (q[c, hv, i] @ k[c, hv, j]) * v_new[c, hv, j]
            assert_close(o[c, hv, i], 0.3 * expected)


def test_matmul_rounds_both_operands_and_accumulates_in_float32():
    # 1 + 2^-10 is 1 in bfloat16, and 256 + 1 + 1 + 1 is no number of it.
    fine, one = torch.tensor([[1 + 2**-10]]), torch.ones(1, 1)
    assert stages.matmul(fine, one, torch.bfloat16).item() == 1
    assert stages.matmul(one, fine, torch.bfloat16).item() == 1
    assert stages.matmul(fine, one, torch.float16).item() == fine.item()
    sums = torch.tensor([[256.0, 1.0, 1.0, 1.0]])
    assert stages.matmul(sums, torch.ones(4, 1), torch.bfloat16).item() == 259


@pytest.mark.parametrize("dtype", FLOORS)
def test_round_to_keeps_values_of_the_dtype_in_the_accumulation_dtype(dtype: torch.dtype):
    x = torch.tensor([1 / 3], dtype=torch.float64)
    rounded = stages.round_to(x, dtype)
    assert rounded.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert rounded.item() == x.to(dtype).item()


# Every stage with a compute_dtype, as a function of it that returns its results.
STAGES: dict[str, tuple[str, Callable[..., tuple[torch.Tensor, ...]]]] = {
    "chunk_scaled_dot_kkt": ("k g beta", lambda *x, **d: (stages.chunk_scaled_dot_kkt(*x, **d),)),
    "solve_tril": ("A", lambda A, **d: (stages.solve_tril(A / BT, **d),)),
    "recompute_w_u": ("k v g beta Ai", stages.recompute_w_u),
    "chunk_delta_h": (
        "k w v g state",
        lambda k, w, u, g, state, **d: stages.chunk_delta_h(
            k, w, u, g, chunk_offsets=[0, 2, NT], initial_state=state, **d
        ),
    ),
    "chunk_fwd_o": ("q k v h g", lambda *x, **d: (stages.chunk_fwd_o(*x, scale=1.0, **d),)),
}


@pytest.mark.parametrize("compute_dtype", [torch.float32, *HALF_DTYPES])
@pytest.mark.parametrize("stage", STAGES)
def test_stage_errs_by_the_rounding_of_its_compute_dtype(stage: str, compute_dtype: torch.dtype):
    names, run = STAGES[stage]
    inputs = drawn(names, seed=0)
    exact = run(*inputs, compute_dtype=torch.float64)
    rounded = run(*(x.float() for x in inputs), compute_dtype=compute_dtype)
    floor = limit(compute_dtype)
    for r, e in zip(rounded, exact, strict=True):
        comparison = compare_state(r, e, dtype=torch.float32, limit=floor)
        assert comparison.passed, str(comparison)
        assert comparison.errors.ratio > torch.finfo(compute_dtype).eps / 100


@pytest.mark.parametrize("compute_dtype", HALF_DTYPES)
@pytest.mark.parametrize("stage", sorted(STAGES.keys() - {"chunk_scaled_dot_kkt"}))
def test_stage_stores_values_of_its_compute_dtype(stage: str, compute_dtype: torch.dtype):
    names, run = STAGES[stage]
    results = run(*(x.float() for x in drawn(names, seed=0)), compute_dtype=compute_dtype)
    for x in results[:2]:  # the third, the state, stays float32
        assert torch.equal(x, x.to(compute_dtype).float())
    for state in results[2:]:
        assert not torch.equal(state, state.to(compute_dtype).float())
