"""Bugs put into the optimized path on purpose: the check of a case must find each, and say where it is."""

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import Phase, find, settings

from ascend_twin.equivalence_tests.cases import (
    Outcome,
    PrefillCase,
    check_prefill,
    metadata_differences,
    minimize,
)
from ascend_twin.equivalence_tests.strategies import prefill_cases
from ascend_twin.optimized.gdn import IMPLEMENTATIONS, ChunkMetadata, ChunkMetadataBuilder
from ascend_twin.optimized.gdn.device import Device, open_device
from ascend_twin.optimized.gdn.kernels.block_sizes import CHUNK_SIZE

# Several sequences, an empty one among them, tails, several chunks, grouped heads, padding; K == V.
CASE = PrefillCase((70, 0, 130), H=2, HV=4, K=16, V=16, gates="none", padding=5)

Result = tuple[torch.Tensor, torch.Tensor]
Run = Callable[..., Result]


def unmutated(run: Run, *tensors: torch.Tensor, **options: Any) -> Result:
    return run(*tensors, **options)


def g_and_beta_swapped(run: Run, *tensors: torch.Tensor, **options: Any) -> Result:
    q, k, v, g, beta = tensors
    return run(q, k, v, beta, g, **options)


def state_written_transposed(run: Run, *tensors: torch.Tensor, **options: Any) -> Result:
    o, final_state = run(*tensors, **options)
    return o, final_state.mT.reshape(final_state.shape)


def state_read_transposed(run: Run, *tensors: torch.Tensor, initial_state: Any, **options: Any) -> Result:
    if initial_state is not None:
        initial_state = initial_state.mT.reshape(initial_state.shape)
    return run(*tensors, initial_state=initial_state, **options)


def initial_state_ignored(run: Run, *tensors: torch.Tensor, initial_state: Any, **options: Any) -> Result:
    return run(*tensors, initial_state=None, **options)


def one_row_of_o_zeroed(run: Run, *tensors: torch.Tensor, metadata: ChunkMetadata, **options: Any) -> Result:
    """The last token of the last sequence, in the last head."""
    o, final_state = run(*tensors, metadata=metadata, **options)
    o[:, metadata.cu_seqlens_host[-1] - 1 :, -1] = 0
    return o, final_state


def first_decay_of_each_chunk_missing(
    run: Run, *tensors: torch.Tensor, metadata: ChunkMetadata, **options: Any
) -> Result:
    """An exclusive cumulative sum: the state that enters a chunk decays by one token too few."""
    sequence, chunk = metadata.chunk_indices_chunk64.long().unbind(1)
    q, k, v, g, beta = (x.clone() for x in tensors)
    g[:, metadata.cu_seqlens[sequence] + chunk * CHUNK_SIZE] = 0
    return run(q, k, v, g, beta, metadata=metadata, **options)


def heads_tiled(run: Run, *tensors: torch.Tensor, **options: Any) -> Result:
    """Value head hv reads key head hv % H."""
    q, k, v, g, beta = tensors
    q, k = (x.repeat(1, 1, v.shape[2] // x.shape[2], 1) for x in (q, k))
    return run(q, k, v, g, beta, **options)


def tails_not_masked(run: Run, *tensors: torch.Tensor, metadata: ChunkMetadata, **options: Any) -> Result:
    """The last chunk of each sequence goes on into the tokens of the next ones: the state takes them in."""
    o, _ = run(*tensors, metadata=metadata, **options)
    bounds, device = metadata.cu_seqlens_host, tensors[0].device
    lens = [-(-length // CHUNK_SIZE) * CHUNK_SIZE for length in metadata.seq_lens_host.tolist()]
    rows = [min(start + t, bounds[-1] - 1) for start, n in zip(bounds, lens, strict=False) for t in range(n)]
    longer = torch.tensor([0, *lens]).cumsum(0)
    builder = ChunkMetadataBuilder(open_device(str(device)), max(1, sum(lens)), len(lens) or 1, 1)
    extended = (x[:, torch.tensor(rows, dtype=torch.int64, device=device)] for x in tensors)
    return o, run(*extended, metadata=builder.build(longer), **options)[1]


def padding_written(run: Run, *tensors: torch.Tensor, metadata: ChunkMetadata, **options: Any) -> Result:
    o, final_state = run(*tensors, metadata=metadata, **options)
    o[:, metadata.cu_seqlens_host[-1] :] = 1
    return o, final_state


def padding_read(run: Run, *tensors: torch.Tensor, metadata: ChunkMetadata, **options: Any) -> Result:
    """Tokens that are masked by a factor of zero, and not by leaving them out: 0 * NaN is NaN."""
    o, final_state = run(*tensors, metadata=metadata, **options)
    behind = tensors[2][:, metadata.cu_seqlens_host[-1] :]
    return o, final_state + 0 * behind.sum().to(final_state.dtype)


def scale_missing(run: Run, *tensors: torch.Tensor, scale: float, **options: Any) -> Result:
    return run(*tensors, scale=1.0, **options)


def state_kept_in_bfloat16(run: Run, *tensors: torch.Tensor, **options: Any) -> Result:
    o, final_state = run(*tensors, **options)
    return o, final_state.bfloat16().to(final_state.dtype)


# A mutant, a case that shows it, and what the outcome must name.
MUTANTS = [
    (g_and_beta_swapped, replace(CASE, gates="typical"), "o: "),
    (state_written_transposed, CASE, "final_state: "),
    (state_written_transposed, replace(CASE, V=24), "final_state: "),
    (state_written_transposed, replace(CASE, initial_state=False), "final_state: "),
    (state_read_transposed, CASE, "o: "),
    (state_read_transposed, CASE, "final_state: "),
    (initial_state_ignored, CASE, "o: "),
    (initial_state_ignored, replace(CASE, seq_lens=(70, 0)), "at sequence 1, key row"),
    (one_row_of_o_zeroed, CASE, "at sequence 2, token 129, head 3"),
    (one_row_of_o_zeroed, replace(CASE, dtype="bfloat16"), "at sequence 2, token 129, head 3"),
    (first_decay_of_each_chunk_missing, replace(CASE, gates="typical"), "o: "),
    (heads_tiled, CASE, "o: "),
    (tails_not_masked, CASE, "final_state: "),
    (padding_written, CASE, "o: rows behind token 200 belong to no sequence"),
    (padding_read, CASE, "final_state: NaN"),
    (scale_missing, CASE, "o: "),
    (state_kept_in_bfloat16, CASE, "final_state: "),
    (state_kept_in_bfloat16, replace(CASE, dtype="bfloat16"), "final_state: "),
]

Check = Callable[[Callable[..., Result], PrefillCase], Outcome]


@pytest.fixture
def check(device: Device, monkeypatch: pytest.MonkeyPatch) -> Check:
    """Checks a mutant, registered beside the implementation that it changes, on a case."""
    builder_for = functools.cache(lambda HV: ChunkMetadataBuilder(device, 1024, 8, num_value_heads=HV))

    def check(mutant: Callable[..., Result], case: PrefillCase) -> Outcome:
        changed = replace(
            IMPLEMENTATIONS["eager"], run=functools.partial(mutant, IMPLEMENTATIONS["eager"].run)
        )
        monkeypatch.setitem(IMPLEMENTATIONS, "mutant", changed)
        return check_prefill(
            case, implementation="mutant", builder=builder_for(case.HV), device=device.torch_device
        )

    return check


def ids(value: object) -> str | None:
    return getattr(value, "__name__", None)


@pytest.mark.parametrize("case", dict.fromkeys(case for _, case, _ in MUTANTS), ids=str)
def test_check_prefill_passes_the_unmutated_op(check: Check, case: PrefillCase):
    outcome = check(unmutated, case)
    assert outcome.passed, str(outcome)


@pytest.mark.parametrize(("mutant", "case", "named"), MUTANTS, ids=ids)
def test_check_prefill_catches(check: Check, mutant: Callable[..., Result], case: PrefillCase, named: str):
    outcome = check(mutant, case)
    assert not outcome.passed
    failed = [str(c) for c in outcome.comparisons if not c.passed]
    assert any(named in line for line in failed), failed


@pytest.mark.parametrize("mutant", dict.fromkeys(mutant for mutant, _, _ in MUTANTS), ids=ids)
def test_prefill_cases_reach(check: Check, mutant: Callable[..., Result]):
    """The generator draws a case that shows the mutant, without being told which."""
    generate = settings(phases=[Phase.generate], max_examples=200, derandomize=True, database=None)
    find(prefill_cases(), lambda case: not check(mutant, case).passed, settings=generate)


def test_minimize_shrinks_a_mutant_to_one_token(check: Check):
    smallest = minimize(CASE, lambda case: not check(one_row_of_o_zeroed, case).passed)
    assert smallest.seq_lens == (1,)
    assert not check(one_row_of_o_zeroed, smallest).passed


class MutatedBuilder(ChunkMetadataBuilder):
    """A builder that gets one table wrong."""

    mutate: Callable[[torch.Tensor, list[int]], torch.Tensor]

    def build(self, query_start_loc_cpu: torch.Tensor, **options: Any) -> ChunkMetadata:
        metadata = super().build(query_start_loc_cpu, **options)
        table = self.mutate(metadata.chunk_indices_chunk64, metadata.seq_lens_host.tolist())
        return replace(metadata, chunk_indices_chunk64=table)


def compact_ranks(table: torch.Tensor, lens: list[int]) -> torch.Tensor:
    """Number the sequences that have tokens, as upstream's helper did, where kernels index cu_seqlens."""
    ranks = torch.tensor([sum(length > 0 for length in lens[:n]) for n in range(len(lens))])
    return torch.stack([ranks.to(table)[table[:, 0].long()], table[:, 1]], dim=1)


def last_chunk_dropped(table: torch.Tensor, lens: list[int]) -> torch.Tensor:
    return table[:-1]


def chunks_reversed(table: torch.Tensor, lens: list[int]) -> torch.Tensor:
    return table.flip(0)


def wide_integers(table: torch.Tensor, lens: list[int]) -> torch.Tensor:
    return table.long()


def differences(device: Device, mutate: Callable[..., torch.Tensor], bounds: list[int]) -> list[str]:
    builder = MutatedBuilder(device, max_num_batched_tokens=1024, max_num_seqs=8, num_value_heads=1)
    builder.mutate = mutate
    return metadata_differences(builder.build(torch.tensor(bounds)), bounds, builder.block_sizes)


@pytest.mark.parametrize(
    "mutate", [compact_ranks, last_chunk_dropped, chunks_reversed, wide_integers], ids=ids
)
def test_metadata_differences_name_the_table(device: Device, mutate: Callable[..., torch.Tensor]):
    (difference,) = differences(device, mutate, [0, 100, 101, 101, 166])
    assert difference.startswith("chunk_indices_chunk64 is torch.int")
    assert difference.endswith("expected torch.int32 [[0, 0], [0, 1], [1, 0], [3, 0], [3, 1]]")


@pytest.mark.parametrize(
    "bounds", [[0, 128, 128, 256], [0, 64, 64, 192, 256], [0, 0, 0, 64], [0, 100, 101, 101, 166]]
)
def test_metadata_differences_find_compact_ranks(device: Device, bounds: list[int]):
    assert differences(device, compact_ranks, bounds)


@pytest.mark.parametrize("bounds", [[0], [0, 128, 256], [0, 128, 192, 192]])
def test_metadata_differences_find_no_compact_ranks_without_an_empty_sequence_before_others(
    device: Device, bounds: list[int]
):
    """Why tests with empty sequences at the end alone never found them."""
    assert not differences(device, compact_ranks, bounds)
