"""Prebuilt chunk metadata equals the definition exactly, and every consumer reads each token exactly once."""

import itertools
from collections.abc import Iterable
from dataclasses import FrozenInstanceError
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from ascend_twin.equivalence_tests.cases import PrefillCase, metadata_differences
from ascend_twin.equivalence_tests.devices import SimulatedDevice
from ascend_twin.equivalence_tests.strategies import cumulative_lengths
from ascend_twin.optimized.gdn import ChunkMetadata, ChunkMetadataBuilder, chunk_gated_delta_rule
from ascend_twin.optimized.gdn import metadata as metadata_module
from ascend_twin.optimized.gdn.device import CpuDevice, Device
from ascend_twin.optimized.gdn.kernels import block_sizes
from ascend_twin.reference.errors import CapacityError, InvalidArgumentError, StagingError
from ascend_twin.reference.gdn.metadata import (
    chunk_indices,
    chunk_offsets,
    final_chunk_indices,
    update_chunk_offsets,
)

TABLES = ("chunk_indices_chunk64", "chunk_indices_large_block", "block_indices_cumsum")
VIEWS = (
    "cu_seqlens",
    "chunk_offsets_chunk64",
    "update_chunk_offsets_chunk64",
    "final_chunk_indices_chunk64",
    *TABLES,
)
HOST_TUPLES = ("cu_seqlens_host", "cu_seqlens_kern", "chunk_indices_chunk64_host")
INT_DTYPES = st.sampled_from((torch.int32, torch.int64))
HEAD_COUNTS_AND_BOUNDS = st.integers(1, 128).flatmap(
    lambda HV: st.tuples(st.just(HV), cumulative_lengths(num_value_heads=HV))
)
COMPACT_RANKS = [([128, 0, 128], 128), ([64, 0, 128, 64], 128), ([0, 0, 64], 64), ([100, 1, 0, 65], 65)]


def _examples(factor: int) -> settings:
    """Settings that draw `factor` times as many examples as the profile says."""
    return settings(max_examples=factor * settings().max_examples)


def _bounds(lens: Iterable[int]) -> list[int]:
    return [0, *accumulate(lens)]


def _lens(bounds: list[int]) -> list[int]:
    return [end - start for start, end in pairwise(bounds)]


def _builder(device: Device, bounds: list[int], *, HV: int = 32, depth: int = 2) -> ChunkMetadataBuilder:
    """A builder just large enough for a batch."""
    return ChunkMetadataBuilder(device, max(1, bounds[-1]), max(1, len(bounds) - 1), HV, depth)


def _build(
    device: Device, bounds: list[int], *, HV: int = 32, dtype: torch.dtype = torch.int32, **kwargs: Any
) -> ChunkMetadata:
    metadata = _builder(device, bounds, HV=HV).build(torch.tensor(bounds, dtype=dtype), **kwargs)
    _land(device)
    return metadata


def _land(device: Device) -> None:
    if isinstance(device, SimulatedDevice):
        device.synchronize()


def _values(metadata: ChunkMetadata) -> dict[str, Any]:
    """All that metadata say, as Python values."""
    values: dict[str, Any] = {name: getattr(metadata, name).tolist() for name in VIEWS}
    values["keep_meta"] = None if metadata.keep_meta is None else metadata.keep_meta.tolist()
    values |= {name: getattr(metadata, name) for name in (*HOST_TUPLES, "num_decodes")}
    return values | {"seq_lens_host": metadata.seq_lens_host.tolist()}


def _times_addressed(bounds: list[int], pairs: Iterable[Any], block_size: int) -> np.ndarray:
    """How often the programs of a kernel, one a (sequence, block) pair, address each token."""
    times = np.zeros(bounds[-1], dtype=int)
    for sequence, block in pairs:
        start = bounds[sequence] + block * block_size
        times[start : min(start + block_size, bounds[sequence + 1])] += 1
    return times


def _check_coverage(bounds: list[int], pairs: list[Any], block_size: int) -> None:
    """Assert that each token is addressed exactly once, and that no program is idle."""
    for sequence, block in pairs:
        assert 0 <= sequence < len(bounds) - 1
        assert 0 <= block * block_size < bounds[sequence + 1] - bounds[sequence]
    times = _times_addressed(bounds, pairs, block_size)
    assert (times == 1).all(), f"tokens {np.flatnonzero(times != 1)} are addressed {times[times != 1]} times"


def _check_all_tables(metadata: ChunkMetadata, bounds: list[int], sizes: tuple[int, int, int]) -> None:
    for table, block_size in zip(TABLES, sizes, strict=True):
        _check_coverage(bounds, getattr(metadata, table).tolist(), block_size)
    kern = metadata.cu_seqlens_host if metadata.cu_seqlens_kern is None else metadata.cu_seqlens_kern
    flat = metadata.chunk_indices_chunk64_host
    _check_coverage(list(kern), list(zip(flat[::2], flat[1::2], strict=True)), block_sizes.CHUNK_SIZE)


# The definition


def test_reference_loops_equal_hand_written_values() -> None:
    bounds = [0, 3, 3, 10, 18, 18]  # lengths 3, 0, 7, 8, 0 in chunks of 4
    indices = [[0, 0], [2, 0], [2, 1], [3, 0], [3, 1]]
    for actual, expected in (
        (chunk_indices(bounds, 4), indices),
        (chunk_offsets(bounds, 4), [0, 1, 1, 3, 5, 5]),
        (update_chunk_offsets(bounds, 4), [0, 2, 3, 6, 9, 10]),
        (final_chunk_indices(bounds, 4), [1, 2, 5, 8, 9]),
    ):
        assert actual.dtype == torch.int32
        assert actual.tolist() == expected


@pytest.mark.parametrize("bounds", [[0], [0, 0], [0, 0, 0]])
def test_reference_loops_give_no_chunk_when_there_is_no_token(bounds: list[int]) -> None:
    N = len(bounds) - 1
    assert chunk_indices(bounds, 64).shape == (0, 2)
    assert chunk_offsets(bounds, 64).tolist() == [0] * (N + 1)
    assert update_chunk_offsets(bounds, 64).tolist() == list(range(N + 1))
    assert final_chunk_indices(bounds, 64).tolist() == list(range(N))


@given(cumulative_lengths(max_num_seqs=6), st.integers(1, 200))
def test_reference_loops_cover_every_token(bounds: list[int], chunk_size: int) -> None:
    _check_coverage(bounds, chunk_indices(torch.tensor(bounds), chunk_size).tolist(), chunk_size)


@_examples(5)
@given(HEAD_COUNTS_AND_BOUNDS, INT_DTYPES)
def test_build_equals_the_definition(
    device: Device, batch: tuple[int, list[int]], dtype: torch.dtype
) -> None:
    HV, bounds = batch
    builder = _builder(device, bounds, HV=HV)
    metadata = builder.build(torch.tensor(bounds, dtype=dtype))
    _land(device)
    assert not metadata_differences(metadata, bounds, builder.block_sizes)
    assert metadata.seq_lens_host.tolist() == _lens(bounds)
    assert metadata.cu_seqlens_host == tuple(bounds)
    for name in VIEWS:
        assert getattr(metadata, name).device == device.torch_device


@given(cumulative_lengths())
@example([0, 0, 1, 66])
def test_keep_meta_marks_the_sequences_that_have_tokens(device: Device, bounds: list[int]) -> None:
    metadata, lens = _build(device, bounds), _lens(bounds)
    if all(lens):
        assert metadata.keep_meta is None
        assert metadata.cu_seqlens_kern is None
    else:
        assert metadata.keep_meta is not None
        assert metadata.keep_meta.dtype == torch.bool
        assert metadata.keep_meta.tolist() == [n > 0 for n in lens]
        assert metadata.cu_seqlens_kern == tuple(_bounds(n for n in lens if n))


@given(cumulative_lengths())
@example([0])
@example([0, 0, 1, 66])
def test_int64_offsets_are_the_chunk_offsets_in_the_same_copy(device: Device, bounds: list[int]) -> None:
    builder = ChunkMetadataBuilder(
        device, max(1, bounds[-1]), max(1, len(bounds) - 1), 32, int64_offsets=True
    )
    metadata = builder.build(torch.tensor(bounds))
    _land(device)
    assert not metadata_differences(metadata, bounds, builder.block_sizes)
    assert metadata.chunk_offsets_int64 is not None
    assert metadata.chunk_offsets_int64.dtype == torch.int64
    assert metadata.chunk_offsets_int64.tolist() == metadata.chunk_offsets_chunk64.tolist()
    assert builder.ring.copies == 1
    assert _build(device, bounds).chunk_offsets_int64 is None


# What the consumers address


@_examples(5)
@given(HEAD_COUNTS_AND_BOUNDS)
def test_tables_address_every_token_exactly_once(device: Device, batch: tuple[int, list[int]]) -> None:
    HV, bounds = batch
    sizes = (64, 1216, block_sizes.cumsum_block_size(HV))
    _check_all_tables(_build(device, bounds, HV=HV), bounds, sizes)


@pytest.mark.parametrize("HV", range(1, 129))
def test_block_sizes_are_those_of_the_kernels(device: Device, HV: int) -> None:
    sizes = (64, 1216, block_sizes.cumsum_block_size(HV))
    bounds = _bounds((sizes[2] + 1, 0, 1217, 1, sizes[2]))
    assert _builder(device, bounds, HV=HV).block_sizes == sizes
    _check_all_tables(_build(device, bounds, HV=HV), bounds, sizes)


@pytest.mark.parametrize(
    ("HV", "block_size"),
    [(1, 4096), (2, 2048), (3, 2048), (16, 256), (24, 256), (32, 128), (48, 128), (64, 64), (128, 64)],
)
def test_cumsum_block_size_equals_hand_written_values(HV: int, block_size: int) -> None:
    assert block_sizes.cumsum_block_size(HV) == block_size


@pytest.mark.parametrize(("lens", "lost"), COMPACT_RANKS, ids=str)
def test_coverage_fails_when_chunk_indices_number_non_empty_sequences_fla_909(
    device: Device, lens: list[int], lost: int
) -> None:
    bounds = _bounds(lens)
    non_empty = [n for n in lens if n]
    compact = [(rank, block) for rank, n in enumerate(non_empty) for block in range(-(-n // 64))]
    assert (_times_addressed(bounds, compact, 64) == 0).sum() == lost
    with pytest.raises(AssertionError):
        _check_coverage(bounds, compact, 64)
    _check_all_tables(_build(device, bounds), bounds, (64, 1216, 128))


@pytest.mark.parametrize("lens", [lens for lens, _ in COMPACT_RANKS], ids=str)
def test_coverage_fails_when_the_last_chunk_is_dropped(lens: list[int]) -> None:
    with pytest.raises(AssertionError, match="are addressed"):
        _check_coverage(_bounds(lens), chunk_indices(_bounds(lens), 64).tolist()[:-1], 64)


# Which sequences enter


class Batch(NamedTuple):
    """A step of decodes, prefills and empty sequences (spec False) and of draft verifications (spec True)."""

    rows: list[tuple[int, bool]]
    padding: list[int]
    dtype: torch.dtype
    mask_has_padding: bool

    @property
    def entering(self) -> list[int]:
        return [n for n, spec in self.rows if not spec]

    def build(self, device: Device, *, padded: bool = True) -> ChunkMetadata:
        bounds = _bounds(n for n, _ in self.rows)
        masks = [spec for _, spec in self.rows]
        padding = self.padding if padded else []
        builder = ChunkMetadataBuilder(device, max(1, sum(self.entering)), max(1, len(self.entering)), 32)
        metadata = builder.build(
            torch.tensor(bounds + padding, dtype=self.dtype),
            spec_sequence_masks_cpu=torch.tensor(
                masks + [True] * len(padding) * self.mask_has_padding, dtype=torch.bool
            ),
            num_decodes=sum(1 for _ in itertools.takewhile(lambda n: n == 1, self.entering)),
            num_actual_seqs=len(self.rows),
        )
        _land(device)
        return metadata


def batches() -> st.SearchStrategy[Batch]:
    """Mixes of decodes, draft verifications, prefills and empty sequences; padding rows hold anything."""
    decodes, empty = st.just((1, False)), st.just((0, False))
    drafts = st.tuples(st.integers(1, 5), st.just(True))
    prefills = st.tuples(st.sampled_from((1, 63, 64, 65, 128, 1217)), st.just(False))
    rows = st.lists(decodes | drafts | prefills | empty, max_size=12)
    return st.builds(Batch, rows, st.lists(st.integers(-1, 9), max_size=4), INT_DTYPES, st.booleans())


@_examples(3)
@given(batches())
def test_build_leaves_out_spec_sequences_and_padding(device: Device, batch: Batch) -> None:
    metadata, bounds = batch.build(device), _bounds(batch.entering)
    assert not metadata_differences(metadata, bounds, (64, 1216, 128))
    assert metadata.num_decodes == len(list(itertools.takewhile(lambda n: n == 1, batch.entering)))
    _check_all_tables(metadata, bounds, (64, 1216, 128))


@given(batches())
def test_padding_rows_change_nothing(device: Device, batch: Batch) -> None:
    assert _values(batch.build(device)) == _values(batch.build(device, padded=False))


@pytest.mark.parametrize(
    "rows",
    [
        pytest.param([(1, False), (3, True), (3, True)], id="vllm#34871"),
        pytest.param([(3, True), (1, False), (3, True), (1, False)], id="vllm#34871, between"),
        pytest.param([(3, True), (3, True)], id="only spec"),
        pytest.param([], id="nothing"),
    ],
)
@pytest.mark.parametrize("padding", [[], [7, 7], [0, -1]], ids=["exact", "asc#6822", "asc#7506"])
def test_build_leaves_out_spec_sequences_and_padding_when_a_chunk_has_one_token(
    device: Device, rows: list[tuple[int, bool]], padding: list[int]
) -> None:
    batch = Batch(rows, padding, torch.int32, mask_has_padding=True)
    assert not metadata_differences(batch.build(device), _bounds(batch.entering), (64, 1216, 128))


@_examples(2)
@given(st.data())
def test_permuting_sequences_permutes_results(device: Device, data: st.DataObject) -> None:
    lens = _lens(data.draw(cumulative_lengths(max_num_seqs=8)))
    order = data.draw(st.permutations(range(len(lens))))
    original = _build(device, _bounds(lens))
    permuted = _build(device, _bounds(lens[n] for n in order))
    assert permuted.seq_lens_host.tolist() == original.seq_lens_host[order].tolist()
    for table in TABLES:
        blocks: list[list[int]] = [[] for _ in lens]
        for sequence, block in getattr(original, table).tolist():
            blocks[sequence].append(block)
        expected = [[place, block] for place, n in enumerate(order) for block in blocks[n]]
        assert getattr(permuted, table).tolist() == expected


@_examples(2)
@given(cumulative_lengths())
def test_deleting_empty_sequences_changes_only_numbering(device: Device, bounds: list[int]) -> None:
    lens = _lens(bounds)
    left = [n for n, length in enumerate(lens) if length]
    metadata, dense = _build(device, bounds), _build(device, _bounds(lens[n] for n in left))
    for table in TABLES:
        renumbered = [[left[n], block] for n, block in getattr(dense, table).tolist()]
        assert getattr(metadata, table).tolist() == renumbered
    for name in ("cu_seqlens", "chunk_offsets_chunk64"):
        ends = getattr(metadata, name)[1:].tolist()
        assert [ends[n] for n in left] == getattr(dense, name)[1:].tolist()
    assert metadata.chunk_indices_chunk64_host == dense.chunk_indices_chunk64_host
    assert (metadata.cu_seqlens_kern or metadata.cu_seqlens_host) == dense.cu_seqlens_host


def test_build_reads_strided_input(device: Device) -> None:
    strided = torch.tensor([0, -7, 3, -7, 70])[::2]
    metadata = _builder(device, [0, 3, 70]).build(strided)
    _land(device)
    assert not metadata_differences(metadata, [0, 3, 70], (64, 1216, 128))


# Capacity


def _worst_batch(max_num_batched_tokens: int, max_num_seqs: int) -> list[int]:
    """The batch with the most blocks of any size: one token a sequence, all others in the last."""
    N = min(max_num_batched_tokens, max_num_seqs)
    return [1] * (N - 1) + [max_num_batched_tokens - N + 1] + [0] * (max_num_seqs - N)


@_examples(2)
@given(st.integers(1, 6), st.integers(1, 3000), st.integers(1, 128))
def test_capacity_holds_the_worst_batch(
    device: Device, max_num_seqs: int, max_num_batched_tokens: int, HV: int
) -> None:
    builder = ChunkMetadataBuilder(device, max_num_batched_tokens, max_num_seqs, HV)
    bounds = _bounds(_worst_batch(max_num_batched_tokens, max_num_seqs))
    metadata = builder.build(torch.tensor(bounds))
    _land(device)
    assert not metadata_differences(metadata, bounds, builder.block_sizes)


def test_capacity_holds_every_batch_when_blocks_are_small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metadata_module, "CHUNK_SIZE", 2)
    monkeypatch.setattr(metadata_module, "SOLVE_TRIL_BLOCK_SIZE", 3)
    monkeypatch.setattr(metadata_module, "cumsum_block_size", lambda num_value_heads: 4)
    full = 0
    for max_num_batched_tokens, max_num_seqs in itertools.product(range(1, 7), range(1, 5)):
        device = SimulatedDevice()
        builder = ChunkMetadataBuilder(device, max_num_batched_tokens, max_num_seqs, 1)
        for lens in itertools.product(range(max_num_batched_tokens + 1), repeat=max_num_seqs):
            if sum(lens) <= max_num_batched_tokens:
                metadata = builder.build(torch.tensor(_bounds(lens)))
                device.synchronize()
                assert not metadata_differences(metadata, _bounds(lens), (2, 3, 4))
        full += max(device.copied_bytes) == 4 * builder.ring.capacity
    assert full, "the bound is never reached: it is not tested"


@pytest.mark.parametrize("max_num_seqs", [3, 7, 11])
@pytest.mark.parametrize("int64_offsets", [False, True])
def test_capacity_is_no_more_than_the_largest_batch_takes(max_num_seqs: int, int64_offsets: bool) -> None:
    """Of one token: a block of each size, and a mask; with as many bounds as need no padding."""
    device = SimulatedDevice()
    builder = ChunkMetadataBuilder(device, 1, max_num_seqs, 32, int64_offsets=int64_offsets)
    builder.build(torch.tensor([0] + [1] * max_num_seqs))
    assert device.copied_bytes == [4 * builder.ring.capacity]


@pytest.mark.parametrize(
    ("lens", "message"),
    [
        ([1, 1, 1], "number of sequences is 3; allowed: max_num_seqs = 2"),
        ([1, 1, 0], "number of sequences is 3; allowed: max_num_seqs = 2"),
        ([4, 7], "number of tokens is 11; allowed: max_num_batched_tokens = 10"),
        ([2**53 + 1], f"number of tokens is {2**53 + 1}; allowed: max_num_batched_tokens = 10"),
    ],
)
def test_build_writes_nothing_when_a_batch_is_too_large(
    device: Device, lens: list[int], message: str
) -> None:
    builder = ChunkMetadataBuilder(device, 10, 2, 32, depth=2)
    first = builder.build(torch.tensor([0, 3, 10]))
    _land(device)
    before = _values(first)
    with pytest.raises(CapacityError, match=message):
        builder.build(torch.tensor(_bounds(lens)))
    _land(device)
    assert _values(first) == before
    assert (builder.ring.copies, builder.ring.waits) == (1, 0)
    second = builder.build(torch.tensor([0, 10]))  # the second slot is still free
    _land(device)
    assert not metadata_differences(second, [0, 10], builder.block_sizes)
    assert _values(first) == before


def test_capacity_counts_only_sequences_that_enter(device: Device) -> None:
    builder = ChunkMetadataBuilder(device, 10, 2, 32)
    masks = torch.tensor([True, False, True, False])
    query_start_loc = torch.tensor([0, 50, 53, 99, 106, 200, 300])
    metadata = builder.build(query_start_loc, spec_sequence_masks_cpu=masks, num_actual_seqs=4)
    assert metadata.cu_seqlens_host == (0, 3, 10)


def test_build_raises_when_all_metadata_are_held(device: Device) -> None:
    builder = ChunkMetadataBuilder(device, 10, 2, 32)
    held = [builder.build(torch.tensor([0, n])) for n in (3, 4)]
    with pytest.raises(StagingError, match=r"all 2 slots are held: release\(\)"):
        builder.build(torch.tensor([0, 5]))
    held[0].release()
    third = builder.build(torch.tensor([0, 5]))
    _land(device)
    assert third.cu_seqlens.tolist() == [0, 5]
    assert held[1].cu_seqlens.tolist() == [0, 4]


# Arguments


MASK = "a CPU bool tensor of 3 or 2 values, one a sequence"
QUERY = "a CPU tensor [num_seqs + 1] of int32 or int64"
BAD_ARGUMENTS: list[tuple[dict[str, Any], str, str, str]] = [
    ({"query_start_loc_cpu": [0, 2, 5]}, "query_start_loc_cpu", "[0, 2, 5]", QUERY),
    ({"query_start_loc_cpu": None}, "query_start_loc_cpu", "None", QUERY),
    ({"query_start_loc_cpu": np.array([0, 2])}, "query_start_loc_cpu", "array([0, 2])", QUERY),
    ({"query_start_loc_cpu": torch.tensor([0.0, 2.0])}, "query_start_loc_cpu", "tensor([0., 2.])", QUERY),
    ({"query_start_loc_cpu": torch.tensor([0, 2]).short()}, "query_start_loc_cpu", "torch.int16", QUERY),
    ({"query_start_loc_cpu": torch.tensor([[0, 2]])}, "query_start_loc_cpu", "tensor([[0, 2]])", QUERY),
    ({"query_start_loc_cpu": torch.tensor(0)}, "query_start_loc_cpu", "tensor(0)", QUERY),
    ({"query_start_loc_cpu": torch.empty(0).int()}, "query_start_loc_cpu", "tensor([]", QUERY),
    ({"query_start_loc_cpu": torch.zeros(3, device="meta").int()}, "query_start_loc_cpu", "meta", QUERY),
    ({"query_start_loc_cpu": torch.tensor([1, 2])}, "query_start_loc_cpu[0]", "1", "0"),
    ({"query_start_loc_cpu": torch.tensor([-1, 2])}, "query_start_loc_cpu[0]", "-1", "0"),
    ({"query_start_loc_cpu": torch.tensor([0, 3, 1, 9])}, "query_start_loc_cpu[2]", "1", ">= 3"),
    ({"query_start_loc_cpu": torch.tensor([0, 3, -1])}, "query_start_loc_cpu[2]", "-1", ">= 3"),
    (
        {"query_start_loc_cpu": torch.tensor([0, 2**63 - 1, -(2**63)])},
        "query_start_loc_cpu[2]",
        str(-(2**63)),
        f">= {2**63 - 1}",
    ),
    ({"num_actual_seqs": 4}, "num_actual_seqs", "4", "0 to 3"),
    ({"num_actual_seqs": -1}, "num_actual_seqs", "-1", "0 to 3"),
    ({"num_decodes": -1}, "num_decodes", "-1", "0 to 3"),
    ({"num_decodes": 4}, "num_decodes", "4", "0 to 3"),
    (
        {"num_decodes": 3, "spec_sequence_masks_cpu": torch.tensor([False, True, False])},
        "num_decodes",
        "3",
        "0 to 2",
    ),
    ({"spec_sequence_masks_cpu": [False] * 3}, "spec_sequence_masks_cpu", "[False, False, False]", MASK),
    ({"spec_sequence_masks_cpu": torch.zeros(3)}, "spec_sequence_masks_cpu", "tensor([0., 0., 0.])", MASK),
    ({"spec_sequence_masks_cpu": torch.zeros(4).bool()}, "spec_sequence_masks_cpu", "tensor([False", MASK),
    ({"spec_sequence_masks_cpu": torch.zeros(1).bool()}, "spec_sequence_masks_cpu", "tensor([False", MASK),
    (
        {"spec_sequence_masks_cpu": torch.zeros(1, 3).bool()},
        "spec_sequence_masks_cpu",
        "tensor([[False",
        MASK,
    ),
    (
        {"spec_sequence_masks_cpu": torch.zeros(3, device="meta").bool()},
        "spec_sequence_masks_cpu",
        "meta",
        MASK,
    ),
]


@pytest.mark.parametrize(("arguments", "name", "value", "allowed"), BAD_ARGUMENTS)
def test_build_names_the_argument_when_it_does_not_fit(
    device: Device, arguments: dict[str, Any], name: str, value: str, allowed: str
) -> None:
    builder = ChunkMetadataBuilder(device, 10, 3, 32)
    arguments = {"query_start_loc_cpu": torch.tensor([0, 2, 2, 5]), **arguments}
    if "spec_sequence_masks_cpu" in arguments and "num_decodes" not in arguments:
        arguments["num_actual_seqs"] = 2
    with pytest.raises(InvalidArgumentError) as error:
        builder.build(**arguments)
    found, _, rest = str(error.value).partition(" is ")
    assert found == name
    assert value in rest.partition("; allowed: ")[0]
    assert rest.partition("; allowed: ")[2].startswith(allowed)
    assert builder.ring.copies == 0


@pytest.mark.parametrize("value", [0, -1])
@pytest.mark.parametrize("name", ["max_num_batched_tokens", "max_num_seqs", "num_value_heads", "depth"])
def test_builder_names_the_argument_when_it_is_below_one(device: Device, name: str, value: int) -> None:
    arguments: dict[str, Any] = {
        "max_num_batched_tokens": 8,
        "max_num_seqs": 2,
        "num_value_heads": 4,
        "depth": 2,
    }
    with pytest.raises(InvalidArgumentError, match=f"^{name} is {value}; allowed: >= 1$"):
        ChunkMetadataBuilder(device, **{**arguments, name: value})


@pytest.mark.parametrize("name", ["cpu", "cuda:1"])
@pytest.mark.parametrize("kind", [str, torch.device])
def test_builder_says_how_to_open_a_device_that_is_only_named(kind: type, name: str) -> None:
    with pytest.raises(InvalidArgumentError) as error:
        ChunkMetadataBuilder(kind(name), 8, 2, 4)
    assert str(error.value) == (f"device is {kind(name)!r}; allowed: a Device, such as open_device({name!r})")


# The packed buffer


@given(cumulative_lengths())
def test_views_are_aligned_and_do_not_overlap(bounds: list[int]) -> None:
    metadata = _build(CpuDevice(), bounds)
    base, end = metadata._lease.buffer.data_ptr(), 0
    for name in (*VIEWS, "keep_meta"):
        view = getattr(metadata, name)
        if view is None or not view.numel():
            continue
        assert view.is_contiguous()
        offset = view.data_ptr() - base
        assert offset % 16 == 0
        assert offset >= end
        end = offset + view.nbytes
    assert end <= metadata._lease.buffer.nbytes
    if metadata.keep_meta is None and bounds[-1]:
        assert metadata._lease.buffer.nbytes < end + 16  # nothing is copied for a mask that is not there


def test_padding_between_views_is_never_read() -> None:
    case = PrefillCase((65, 0, 64, 1, 200), HV=2)
    inputs = case.inputs()
    metadata = _build(CpuDevice(), case.bounds, HV=case.HV)

    def run() -> tuple[torch.Tensor, torch.Tensor | None]:
        state = inputs.initial_state
        return chunk_gated_delta_rule(
            *inputs[:5], initial_state=state, output_final_state=True, prebuilt_meta=metadata
        )

    expected = run()
    buffer = metadata._lease.buffer.view(torch.uint8)
    padding = torch.ones_like(buffer, dtype=torch.bool)
    for name in (*VIEWS, "keep_meta"):
        view = getattr(metadata, name)
        offset = view.data_ptr() - buffer.data_ptr()
        padding[offset : offset + view.nbytes] = False
    assert padding.any()
    buffer[padding] = 0xA5
    assert not metadata_differences(metadata, case.bounds, metadata.block_sizes)
    for actual, wanted in zip(run(), expected, strict=True):
        assert torch.equal(actual, wanted)  # pyright: ignore[reportArgumentType]


def test_build_queues_one_copy_a_step() -> None:
    device = SimulatedDevice()
    builder = ChunkMetadataBuilder(device, 4096, 8, 32)
    for step in range(1, 6):
        builder.build(torch.tensor([0, 100 * step, 100 * step, 700 * step])).release()
        assert len(device.copied_bytes) == builder.ring.copies == step


def test_metadata_is_frozen(device: Device) -> None:
    metadata = _build(device, [0, 3])
    for name in (*VIEWS, "num_decodes", "cu_seqlens_host"):
        with pytest.raises(FrozenInstanceError):
            setattr(metadata, name, None)


def test_host_tuples_are_made_on_first_use(device: Device) -> None:
    metadata = _build(device, [0, 3, 3, 70])
    assert not set(HOST_TUPLES) & set(vars(metadata))
    assert metadata.cu_seqlens_host == (0, 3, 3, 70)
    assert metadata.cu_seqlens_kern == (0, 3, 70)
    assert metadata.chunk_indices_chunk64_host == (0, 0, 1, 0, 1, 1)
    assert set(HOST_TUPLES) <= set(vars(metadata))


def test_metadata_do_not_follow_the_input_when_it_is_rewritten(device: Device) -> None:
    query_start_loc = torch.tensor([0, 3, 3, 70])
    metadata = _builder(device, [0, 3, 3, 70]).build(query_start_loc)
    query_start_loc.fill_(-1)  # the caller's own buffer, used again for the next step
    _land(device)
    assert not metadata_differences(metadata, [0, 3, 3, 70], (64, 1216, 128))
    assert metadata.cu_seqlens_host == (0, 3, 3, 70)
    assert metadata.chunk_indices_chunk64_host == (0, 0, 1, 0, 1, 1)
