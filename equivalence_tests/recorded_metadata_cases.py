"""Builds of chunk metadata that show known bugs: the right tables by their definition, and the wrong ones."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import accumulate
from typing import Any

import numpy as np
import torch

from ..fixtures.store import Fixture
from ..optimized.gdn.kernels.block_sizes import CHUNK_SIZE, SOLVE_TRIL_BLOCK_SIZE, cumsum_block_size
from ..optimized.gdn.metadata import ChunkMetadataBuilder
from ..optimized.gdn.staging import Lease, StagingRing
from ..reference.gdn import metadata as definition
from .devices import SimulatedDevice
from .known_bugs import RecordedCase, Wrong
from .recorded_gdn_cases import compact_pairs

HV = 32
Tables = dict[str, torch.Tensor]


def tables(lens: Sequence[int], num_value_heads: int = HV) -> Tables:
    """What a build must give for sequences of these lengths, by the plain definition."""
    bounds = bounds_of(lens)
    return {
        "cu_seqlens": torch.tensor(bounds, dtype=torch.int32),
        "chunk_offsets_chunk64": definition.chunk_offsets(bounds, CHUNK_SIZE),
        "update_chunk_offsets_chunk64": definition.update_chunk_offsets(bounds, CHUNK_SIZE),
        "final_chunk_indices_chunk64": definition.final_chunk_indices(bounds, CHUNK_SIZE),
        **_indices(lambda size: definition.chunk_indices(bounds, size), num_value_heads),
    }


def bounds_of(lens: Sequence[int]) -> list[int]:
    """N + 1 bounds (tokens)."""
    return [0, *accumulate(lens)]


def _indices(blocks: Callable[[int], torch.Tensor], num_value_heads: int) -> Tables:
    sizes = {
        "chunk_indices_chunk64": CHUNK_SIZE,
        "chunk_indices_large_block": SOLVE_TRIL_BLOCK_SIZE,
        "block_indices_cumsum": cumsum_block_size(num_value_heads),
    }
    return {name: blocks(size) for name, size in sizes.items()}


def build(
    lens: Sequence[int],
    found: Tables,
    *,
    given: Sequence[int] | None = None,
    drafts: Sequence[bool] | None = None,
    num_value_heads: int = HV,
    num_decodes: int = 0,
) -> Fixture:
    """A build, and what it gave.

    Args:
        lens: of the sequences before padding, those with drafts too.
        found: tables.
        given: bounds as the builder got them, where padding follows those of `lens`.
        drafts: which sequences verify drafts, where any does.
        num_value_heads, num_decodes: see `ChunkMetadataBuilder`.
    """
    bounds = bounds_of(lens)
    config: dict[str, Any] = {
        "num_decodes": num_decodes,
        "num_value_heads": num_value_heads,
        "block_sizes": [CHUNK_SIZE, SOLVE_TRIL_BLOCK_SIZE, cumsum_block_size(num_value_heads)],
    }
    tensors = {"cu_seqlens": torch.tensor(given or bounds, dtype=torch.int32)}
    if given is not None:
        config["num_actual_seqs"] = len(lens)
    if drafts is not None:
        tensors["spec_sequence_masks"] = torch.tensor(drafts)
    return Fixture("metadata", config, tensors | {f"metadata.{name}": x for name, x in found.items()})


def compact_tables(lens: Sequence[int]) -> Tables:
    """Tables that number the sequences that have tokens, where kernels index all bounds."""

    def blocks(size: int) -> torch.Tensor:
        return torch.tensor(compact_pairs(lens, size), dtype=torch.int32).reshape(-1, 2)

    return tables(lens) | _indices(blocks, HV)


# What a device holds after builds whose copies are late


class TwoSlotsWithoutEvents(StagingRing):
    """asc#12079: two buffers in turn, copied on the consumer's stream, and nothing waits."""

    def _next_slot(self) -> Any:
        return self._free[0]

    def _copy(self, slot: Any, size: int) -> torch.Tensor:
        buffer = slot.device[:size]
        self._device.copy_async(buffer, slot.host[:size], self._device.current_stream())
        return buffer

    def stage(self, size: int, fill: Callable[[np.ndarray], None]) -> Lease:
        lease = super().stage(size, fill)
        slot, lease._slot = lease._slot, None  # not lent: the next one but one takes it
        assert slot is not None
        self._free.append(slot)
        return lease


class CopiesATemporary(StagingRing):
    """Copies out of pinned memory that nobody keeps."""

    def _copy(self, slot: Any, size: int) -> torch.Tensor:
        temporary = self._device.host_empty(size, torch.int32).copy_(slot.host[:size])
        buffer = slot.device[:size]
        self._device.copy_async(buffer, temporary, self._copy_stream)
        slot.copy_done.record(self._copy_stream)
        return buffer


STEPS = ((70, 0, 3), (64, 65, 1), (1, 1, 128), (7, 0, 190))
"""Lengths of one build after the other, two of them a step: of a model, and of its drafter."""


def tables_on_the_device(ring: type[StagingRing], number: int) -> Tables:
    """What the consumer of a build of `STEPS` reads, where the device is as late as it may be."""
    device = SimulatedDevice()
    builder = ChunkMetadataBuilder(device, max(map(sum, STEPS)), 3, HV)
    builder.ring = ring(device, builder.ring.capacity, 2)
    read = []
    for lens in STEPS:
        metadata = builder.build(torch.tensor(bounds_of(lens)))
        read.append({name: getattr(metadata, name).clone() for name in tables(lens)})
        metadata.release()
    device.synchronize()
    return {name: x.contents for name, x in read[number].items()}


# The cases


def _right(name: str, title: str, *args: Any, **options: Any) -> RecordedCase:
    return RecordedCase(f"metadata/{name}.safetensors", title, lambda: build(*args, **options))


def _wrong(
    name: str, title: str, lens: Sequence[int], found: Callable[[], Tables], **options: Any
) -> RecordedCase:
    path, wrong = f"metadata/{name}_wrong.safetensors", Wrong("metadata", "metadata")
    return RecordedCase(path, title, lambda: build(lens, found(), **options), wrong)


def _cases() -> Iterator[RecordedCase]:
    name = "fla-909_compact_ranks"
    for where, lens in {
        "": (64, 0, 128, 64),
        "_after_one": (128, 0, 128),
        "_first_two": (0, 0, 64),
        "_last_but_one": (100, 1, 0, 65),
    }.items():
        yield _right(name + where, f"Empty sequences: lengths {lens}", lens, tables(lens))
    lens = (64, 0, 128, 64)
    title = f"Lengths {lens}: tables that number non-empty sequences"
    yield _wrong(name, title, lens, partial(compact_tables, lens))

    name, title = "asc-6822_padding_of_a_graph", "Three requests in a graph of eight"
    lens, padding = (1, 1, 70), (72, 72, 72, 72, 72)
    options = {"given": (*bounds_of(lens), *padding), "num_decodes": 2}
    yield _right(name, title, lens, tables(lens), **options)
    found = partial(tables, (*lens, *(0,) * len(padding)))
    yield _wrong(name, f"{title}: its padding are sequences", lens, found, **options)

    name, title = "asc-7506_sentinels_behind_the_batch", "Sentinels 0 and -1 behind two requests"
    lens = (3, 65)
    yield _right(name, title, lens, tables(lens), given=(*bounds_of(lens), 0, -1))

    name, title = "asc-10619_more_sequences_than_the_graph", "100 sequences, where eight are a graph"
    lens = (1,) * 99 + (66,)
    yield _right(name, title, lens, tables(lens), num_decodes=99)

    name, title = "vllm-34871_one_token_beside_drafts", "The last token of a prompt beside two drafts"
    yield _right(name, title, (1, 3, 3), tables((1,)), drafts=(False, True, True))
    title = "Two decodes among two drafts"
    drafts = (True, False, True, False)
    yield _right(f"{name}_between", title, (3, 1, 3, 1), tables((1, 1)), drafts=drafts, num_decodes=2)

    name = "asc-11072_step_without_requests"
    yield _right(name, "No request at all", (), tables(()))
    yield _right(f"{name}_but_drafts", "Drafts alone", (3, 3), tables(()), drafts=(True, True))

    name, title = "asc-11161_bounds_padded_to_tokens", "Two requests of four tokens each, in eight bounds"
    lens, given = (4, 4), (0, 4, *(8,) * 7)
    yield _right(name, title, lens, tables(lens), given=given)
    found = partial(tables, (*lens, *(0,) * 6))
    yield _wrong(name, f"{title}: a sequence for each token", lens, found, given=given)

    name = "tile_constants_of_another_size"
    for heads in (1, 24, 48, 128):
        size = cumsum_block_size(heads)
        lens = (size + 1, 0, SOLVE_TRIL_BLOCK_SIZE + 1, 1)
        title = f"{heads} value heads, whose sums take blocks of {size} tokens"
        yield _right(f"{name}_{heads}", title, lens, tables(lens, heads), num_value_heads=heads)
    lens = (300, 0, 1217, 1)
    title = "48 value heads, with the blocks of 24"
    yield _wrong(f"{name}_48", title, lens, partial(tables, lens, 24), num_value_heads=48)

    name, title = "asc-12079_tables_of_the_next_step", "The first of two builds of a step"
    lens = STEPS[0]
    yield _right(name, title, lens, tables(lens))
    found = partial(tables_on_the_device, TwoSlotsWithoutEvents, 0)
    yield _wrong(name, f"{title}: its tables are those of the next step", lens, found)

    name, title = "vllm-45074_source_freed_before_the_copy", "A build whose copy is late"
    yield _right(name, title, lens, tables(lens))
    found = partial(tables_on_the_device, CopiesATemporary, 0)
    yield _wrong(name, f"{title}: what it copied was freed", lens, found)


CASES = tuple(_cases())
