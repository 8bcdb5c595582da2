"""Properties of every gated delta rule prefill, each as a check on one batch.

A check computes the same tokens in two ways by one `Prefill` and raises `AssertionError`, with the place,
where the results differ by more than `limit`. `PROMISES` says how closely each implementation of the op
agrees with itself.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from hypothesis import strategies as st

from ..optimized.gdn.kernels.block_sizes import CHUNK_SIZE
from ..reference.gdn import recurrent_gated_delta_rule, recurrent_gated_delta_rule_decode
from .cases import Inputs, PrefillCase, compare_prefill, run_case
from .compare import compare_o, compare_state
from .strategies import prefill_cases
from .tolerances import Errors, limit

Prefill = Callable[[Inputs], tuple[torch.Tensor, torch.Tensor]]
Part = tuple[int, int, int]  # a sequence, its first token that is taken, and the first that is not

MAX_NUM_SEQS = 5
MAX_LENGTH = 194
CPU = torch.device("cpu")
EXACT = Errors(0.0, 0.0)
REGROUPED = limit(torch.float64)  # sums of the same numbers in another order

WIDE_CASES = prefill_cases(dtypes=("float64",), max_num_seqs=MAX_NUM_SEQS, max_length=MAX_LENGTH)
CUTS = st.lists(st.integers(0, MAX_LENGTH), min_size=MAX_NUM_SEQS, max_size=MAX_NUM_SEQS)
CUTS_BETWEEN_CHUNKS = CUTS.map(lambda cuts: [cut // CHUNK_SIZE * CHUNK_SIZE for cut in cuts])
ORDERS = st.permutations(range(MAX_NUM_SEQS))


class Promise(NamedTuple):
    """How closely the results of an implementation agree when it computes the same tokens in two ways.

    Attributes:
        dtypes: of the batches on which that is checked, keys of `DTYPES`.
        same_chunks: limit where every chunk holds the same tokens, in whatever batch and place.
        other_chunks: limit where chunks hold other tokens. None: rounded results then differ as much as two
            right ones may, so that each is held to the limits of its dtype against the definition.
    """

    dtypes: tuple[str, ...]
    same_chunks: Errors
    other_chunks: Errors | None


SAME_SUMS = Promise(("float64",), same_chunks=REGROUPED, other_chunks=REGROUPED)
SAME_BITS = Promise(("float32", "float16", "bfloat16"), same_chunks=EXACT, other_chunks=None)

PROMISES = {"eager": SAME_SUMS, "staged": SAME_BITS, "fused": SAME_BITS}
"""The promise of each implementation of the op, by name."""


def prefill_by(
    function: Callable[..., Any], case: PrefillCase, *, device: torch.device = CPU, **options: Any
) -> Prefill:
    """`function` with the options of a case and `options`, run on `device`, its results on the CPU."""

    def prefill(inputs: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
        o, final_state = run_case(function, case, inputs.to(device), **options)
        return o.cpu(), final_state.cpu()

    return prefill


def whole(case: PrefillCase) -> list[Part]:
    """Every sequence of a case, whole."""
    return [(n, 0, length) for n, length in enumerate(case.seq_lens)]


def rows(cu_seqlens: torch.Tensor, parts: Sequence[Part]) -> torch.Tensor:
    """The tokens of the parts, as rows of the batch they are taken from."""
    firsts = cu_seqlens.tolist()
    return torch.tensor(
        [firsts[n] + t for n, start, end in parts for t in range(start, end)], dtype=torch.int64
    )


def take(inputs: Inputs, parts: Sequence[Part]) -> Inputs:
    """A batch with one sequence for each part, without padding; each starts from its sequence's state."""
    tokens = rows(inputs.cu_seqlens, parts)
    state = inputs.initial_state
    return Inputs(
        *(x[:, tokens] for x in inputs[:5]),  # pyright: ignore[reportArgumentType, reportOptionalSubscript]
        initial_state=None if state is None else state[[n for n, _, _ in parts]],
        cu_seqlens=torch.tensor(_bounds(parts), dtype=inputs.cu_seqlens.dtype),
    )


def assert_agree(
    actual: tuple[torch.Tensor, torch.Tensor],
    expected: tuple[torch.Tensor, torch.Tensor],
    bounds: list[int],
    limit: Errors,
) -> None:
    """Raise unless two results agree in dtype, shape and value, o and final_state."""
    for comparison in (
        compare_o(actual[0], expected[0], dtype=expected[0].dtype, bounds=bounds, limit=limit),
        compare_state(actual[1], expected[1], dtype=expected[1].dtype, limit=limit),
    ):
        assert comparison.passed, str(comparison)


def assert_right(actual: tuple[torch.Tensor, torch.Tensor], case: PrefillCase, inputs: Inputs) -> None:
    """Raise unless a result is that of the definition, within the limits of the dtype of the case."""
    for comparison in compare_prefill(case, inputs, *actual):
        assert comparison.passed, str(comparison)


def check_order(prefill: Prefill, case: PrefillCase, order: Sequence[int], limit: Errors) -> None:
    """The order of the sequences in the batch is irrelevant."""
    inputs = case.inputs()
    parts = [whole(case)[n] for n in order if n < len(case.seq_lens)]
    _assert_parts_agree(prefill(take(inputs, parts)), prefill(inputs), inputs, parts, limit)


def check_one_by_one(prefill: Prefill, case: PrefillCase, limit: Errors) -> None:
    """A batch computes what each of its sequences alone does."""
    inputs = case.inputs()
    together = prefill(inputs)
    for part in whole(case):
        _assert_parts_agree(prefill(take(inputs, [part])), together, inputs, [part], limit)


def check_without_empty(prefill: Prefill, case: PrefillCase, limit: Errors) -> None:
    """Empty sequences can be left out; they end with the state they started with, bit for bit."""
    inputs = case.inputs()
    o, final_state = prefill(inputs)
    parts = [part for part in whole(case) if part[2] > 0]
    _assert_parts_agree(prefill(take(inputs, parts)), (o, final_state), inputs, parts, limit)
    empty = [n for n, length in enumerate(case.seq_lens) if length == 0]
    initial = torch.zeros_like(final_state) if inputs.initial_state is None else inputs.initial_state
    assert torch.equal(final_state[empty], initial[empty])


def check_padding(prefill: Prefill, case: PrefillCase, limit: Errors) -> None:
    """NaN behind the last sequence changes nothing, and the output there is 0."""
    inputs = case.inputs()
    o, final_state = prefill(inputs)
    assert not o[:, case.bounds[-1] :].count_nonzero()
    _assert_parts_agree(prefill(take(inputs, whole(case))), (o, final_state), inputs, whole(case), limit)


def check_split(prefill: Prefill, case: PrefillCase, cuts: Sequence[int], limit: Errors | None) -> None:
    """Each sequence can be cut anywhere when its state is carried over.

    Without a limit the pieces are compared with the definition, within the limits of the dtype.
    """
    inputs = case.inputs()
    cuts = [min(cut, length) for cut, length in zip(cuts, case.seq_lens, strict=False)]
    heads = [(n, 0, cut) for n, cut in enumerate(cuts)]
    tails = [(n, cut, length) for n, (cut, length) in enumerate(zip(cuts, case.seq_lens, strict=True))]
    first_o, state = prefill(take(inputs, heads))
    then_o, final_state = prefill(take(inputs, tails)._replace(initial_state=state))
    unpadded = take(inputs, whole(case))
    pieces = first_o.new_empty(unpadded.v.shape)
    pieces[:, rows(inputs.cu_seqlens, heads)] = first_o
    pieces[:, rows(inputs.cu_seqlens, tails)] = then_o
    if limit is None:
        assert_right((pieces, final_state), case, unpadded)
    else:
        assert_agree((pieces, final_state), prefill(unpadded), case.bounds, limit)


def check_then_decode(prefill: Prefill, case: PrefillCase, num_decodes: int, limit: Errors | None) -> None:
    """A prefill of a case and decode steps from its state are one recurrence over all of them.

    Without a limit, within the limits of the dtype.
    """
    longer = replace(case, seq_lens=tuple(length + num_decodes for length in case.seq_lens))
    inputs = longer.inputs()
    prompt_o, state = prefill(take(inputs, whole(case)))
    o = prompt_o.new_zeros(inputs.v.shape)
    o[:, rows(inputs.cu_seqlens, whole(case))] = prompt_o
    pool, slots = state.flip(0), torch.arange(len(state)).flip(0)
    for step in range(num_decodes):
        tokens = [(n, length + step, length + step + 1) for n, length in enumerate(case.seq_lens)]
        q, k, v, g, beta = (x[0] for x in take(inputs, tokens)[:5] if x is not None)
        step_o = recurrent_gated_delta_rule_decode(
            *(q, k, v, g, beta),
            state_pool=pool,
            state_indices=slots,
            use_qk_l2norm_in_kernel=case.use_qk_l2norm_in_kernel,
        )
        o[0, rows(inputs.cu_seqlens, tokens)] = step_o.to(o.dtype)
    if limit is None:
        assert_right((o, pool[slots]), longer, inputs)
    else:
        expected = prefill_by(recurrent_gated_delta_rule, case)(inputs)
        assert_agree((o, pool[slots]), expected, longer.bounds, limit)


def check_causal(prefill: Prefill, case: PrefillCase, other_seed: int, cuts: Sequence[int]) -> None:
    """Other values in the later tokens of each sequence change nothing before them, bit for bit."""
    inputs, others = case.inputs(), replace(case, seed=other_seed).inputs()
    earlier = [(n, 0, min(cuts[n], length)) for n, length in enumerate(case.seq_lens)]
    kept = rows(inputs.cu_seqlens, earlier)
    for other, x in zip(others[:5], inputs[:5], strict=True):
        assert other is not None
        assert x is not None
        other[:, kept] = x[:, kept]
    changed = others._replace(initial_state=inputs.initial_state)
    assert torch.equal(prefill(changed)[0][:, kept], prefill(inputs)[0][:, kept])


def check_dense(prefill: Prefill, case: PrefillCase, limit: Errors) -> None:
    """Rows of a batch without cu_seqlens are packed sequences of one length; `case` has such sequences."""
    inputs = take(case.inputs(), whole(case))
    o, final_state = prefill(inputs)
    shape = (len(case.seq_lens), case.seq_lens[0])
    tensors = {name: getattr(inputs, name)[0].unflatten(0, shape) for name in ("q", "k", "v", "g", "beta")}
    dense_o, dense_state = prefill(inputs._replace(**tensors, cu_seqlens=None))
    assert dense_o.shape[:2] == shape
    assert_agree((dense_o.flatten(0, 1)[None], dense_state), (o, final_state), case.bounds, limit)


def _bounds(parts: Sequence[Part]) -> list[int]:
    return [0, *accumulate(end - start for _, start, end in parts)]


def _assert_parts_agree(
    of_parts: tuple[torch.Tensor, torch.Tensor],
    of_batch: tuple[torch.Tensor, torch.Tensor],
    inputs: Inputs,
    parts: Sequence[Part],
    limit: Errors,
) -> None:
    """Whole sequences computed apart agree with the batch that they were taken from."""
    o, final_state = of_batch
    expected = o[:, rows(inputs.cu_seqlens, parts)], final_state[[n for n, _, _ in parts]]
    assert_agree(of_parts, expected, _bounds(parts), limit)
