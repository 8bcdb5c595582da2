"""One decode step over a pool of states: it continues the recurrence, and writes what it owns."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ascend_twin.equivalence_tests.cases import DTYPES, Inputs, PrefillCase
from ascend_twin.equivalence_tests.properties import (
    EXACT,
    WIDE_CASES,
    assert_agree,
    check_then_decode,
    prefill_by,
    take,
)
from ascend_twin.equivalence_tests.strategies import SEEDS
from ascend_twin.equivalence_tests.tolerances import limit
from ascend_twin.reference.errors import InvalidArgumentError
from ascend_twin.reference.gdn import recurrent_gated_delta_rule, recurrent_gated_delta_rule_decode

CANARY = -12345.0
NUM_SLOTS = 7


def one_token_each(num_seqs: int, seed: int = 0, dtype: str = "float64") -> tuple[PrefillCase, Inputs]:
    """A batch of one token a sequence, K != V, from a state that is not zero."""
    case = PrefillCase((1,) * num_seqs, seed, H=2, HV=4, K=8, V=24, dtype=dtype)
    return case, case.inputs()


def canary_pool(inputs: Inputs, slots: list[int], dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """A pool of canaries, the states of the batch in `slots`."""
    assert inputs.initial_state is not None
    pool = torch.full((NUM_SLOTS, *inputs.initial_state.shape[1:]), CANARY, dtype=dtype)
    pool[slots] = inputs.initial_state.to(dtype)
    return pool


def decode(inputs: Inputs, pool: torch.Tensor, slots: list[int], **options: Any) -> torch.Tensor:
    q, k, v, g, beta = (x[0] for x in inputs[:5] if x is not None)
    indices = torch.tensor(slots, dtype=torch.int32)
    return recurrent_gated_delta_rule_decode(
        q, k, v, g, beta, state_pool=pool, state_indices=indices, **options
    )


@given(WIDE_CASES, st.integers(1, 4))
def test_decode_continues_a_prefill_as_one_recurrence(case: PrefillCase, num_decodes: int):
    # sgl-kernel-npu#640: a transposed state is hidden by K == V and by a state of zeros.
    case = replace(case, K=8, V=24, initial_state=True)
    check_then_decode(prefill_by(recurrent_gated_delta_rule, case), case, num_decodes, EXACT)


@pytest.mark.parametrize(("null_slot", "sentinel"), [(None, -1), (0, -1), (0, 0)])
@given(st.permutations(range(1, NUM_SLOTS)), st.lists(st.booleans(), max_size=5), SEEDS)
def test_decode_writes_owned_slots_only(
    null_slot: int | None, sentinel: int, free: list[int], is_real: list[bool], seed: int
):
    # asc#7506, vllm#39064: a sentinel taken for a slot writes at the end of the pool, or into slot 0.
    case, inputs = one_token_each(len(is_real), seed)
    slots = [slot if real else sentinel for slot, real in zip(free, is_real, strict=False)]
    real_rows = [n for n, real in enumerate(is_real) if real]
    owned = [slots[n] for n in real_rows]
    real = take(inputs, [(n, 0, 1) for n in real_rows])
    pool = canary_pool(real, owned)
    o = decode(inputs, pool, slots, null_slot=null_slot)

    expected = prefill_by(recurrent_gated_delta_rule, case)(real)
    assert_agree((o[real_rows][None], pool[owned]), expected, list(range(len(real_rows) + 1)), EXACT)
    padding = [n for n, real in enumerate(is_real) if not real]
    others = [slot for slot in range(NUM_SLOTS) if slot not in owned]
    assert not o[padding].count_nonzero()
    assert (pool[others] == CANARY).all()


@pytest.mark.parametrize("slots", [[], [-1, -1, -1], [0, -1, 0]])
def test_decode_leaves_the_pool_untouched_when_no_row_is_real(slots: list[int]):
    # asc#10901: an empty index list was read as "all slots, in batch order".
    _, inputs = one_token_each(len(slots))
    pool = canary_pool(inputs._replace(initial_state=torch.zeros(0, 4, 8, 24)), [])
    o = decode(inputs, pool, slots, null_slot=0)
    assert o.shape == (len(slots), 4, 24)
    assert not o.count_nonzero()
    assert (pool == CANARY).all()


@pytest.mark.parametrize(
    ("slots", "message"),
    [
        ([2, 3, 7], r"state_indices\[2\] is 7; allowed: -1 \(padding\) or a slot in \[0, 7\)"),
        ([2, 3, -2], r"state_indices\[2\] is -2; allowed: -1"),
        ([2, 3, 2], r"state_indices\[2\] is 2; allowed: a slot that no other row"),
        ([2, 3], r"state_indices.shape is \(2,\); allowed: \[N\] = \(3,\)"),
    ],
)
def test_decode_refuses_bad_slots_before_anything_is_written(slots: list[int], message: str):
    _, inputs = one_token_each(3)
    pool = canary_pool(inputs, [2, 3, 4])
    before = pool.clone()
    with pytest.raises(InvalidArgumentError, match=message):
        decode(inputs, pool, slots)
    assert torch.equal(pool, before)


@pytest.mark.parametrize("state_dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("dtype", DTYPES)
def test_decode_computes_in_the_dtype_of_the_pool(dtype: str, state_dtype: torch.dtype):
    # sglang#40419: a pool of another dtype than the kernel's was read with the wrong stride.
    case, inputs = one_token_each(3, dtype=dtype)
    pool = canary_pool(inputs, [5, 1, 3], state_dtype)
    o = decode(inputs, pool, [5, 1, 3])
    assert o.dtype == pool.dtype == state_dtype
    o_64, state_64 = prefill_by(recurrent_gated_delta_rule, case)(inputs)
    expected = o_64.to(state_dtype), state_64.to(state_dtype)
    assert_agree((o[None], pool[[5, 1, 3]]), expected, case.bounds, limit(state_dtype))


@pytest.mark.parametrize("state_dtype", [torch.float16, torch.bfloat16, torch.int32])
def test_decode_refuses_a_pool_of_another_dtype(state_dtype: torch.dtype):
    _, inputs = one_token_each(1)
    with pytest.raises(InvalidArgumentError, match=f"state_pool.dtype is {state_dtype}; allowed: "):
        decode(inputs, canary_pool(inputs, [0], state_dtype), [0])


def test_decode_writes_through_a_strided_pool():
    case, inputs = one_token_each(3)
    base = torch.full((4, NUM_SLOTS, 2, 24, 8), CANARY, dtype=torch.float64)  # [HV, slots, 2, V, K]
    pool = base[:, :, 1].permute(1, 0, 3, 2)
    pool[[5, 1, 3]] = canary_pool(inputs, [5, 1, 3])[[5, 1, 3]]
    o = decode(inputs, pool, [5, 1, 3])
    expected = prefill_by(recurrent_gated_delta_rule, case)(inputs)
    assert_agree((o[None], pool[[5, 1, 3]]), expected, case.bounds, EXACT)
    assert (base[:, :, 0] == CANARY).all()


def test_decode_scales_the_output_only():
    _, inputs = one_token_each(2)
    pools = [canary_pool(inputs, [0, 1]) for _ in range(2)]
    plain, doubled = (decode(inputs, p, [0, 1], scale=s) for p, s in zip(pools, (1.0, 2.0), strict=True))
    assert torch.equal(doubled, 2 * plain)
    assert torch.equal(*pools)
