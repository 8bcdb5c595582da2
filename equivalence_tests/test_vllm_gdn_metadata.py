# pyright: reportMissingImports=false
"""Chunk metadata in vLLM's own metadata builder: what the definition says, and nothing else is changed.

Steps are made by `vllm_batches` as vLLM's model runner makes them. vLLM's own fields, and those of
vllm-ascend 0.18.0, are a second witness wherever they are right.
"""

import copy
import dataclasses
import gc
import random
from collections import Counter
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any, NamedTuple

import pytest
import torch

from ascend_twin.cli import bench, peers
from ascend_twin.equivalence_tests import installed_vllm, vllm_batches
from ascend_twin.equivalence_tests.cases import metadata_differences
from ascend_twin.equivalence_tests.devices import SimulatedDevice
from ascend_twin.equivalence_tests.source_mutants import mutated
from ascend_twin.equivalence_tests.vllm_batches import KINDS, Row, Step, draw_step, expected
from ascend_twin.optimized.gdn import ChunkMetadata
from ascend_twin.optimized.vllm import gdn_metadata
from ascend_twin.reference.errors import AscendTwinError, CapacityError, StagingError, UnavailableError

pytestmark = pytest.mark.vllm

NUM_STEPS = 1200
OF_ASCEND = (
    "chunk_indices_chunk64",
    "chunk_offsets_chunk64",
    "update_chunk_offsets_chunk64",
    "final_chunk_indices_chunk64",
    "chunk_indices_large_block",
    "block_indices_cumsum",
)
VIEWS = ("cu_seqlens", *OF_ASCEND)


class Installed(NamedTuple):
    """vLLM's module of gated delta net metadata, its builder, and what stands in its place."""

    version: str
    gdn_attn: Any
    plain: Any
    ours: Any

    def builders(self, **config: Any) -> dict[bool, Any]:
        """Ours, for an engine that does not speculate and for one that does."""
        return {
            spec: vllm_batches.make_builder(
                self.ours, vllm_batches.vllm_config(is_speculative=spec, **config)
            )
            for spec in (False, True)
        }

    def builder(self, **config: Any) -> Any:
        return vllm_batches.make_builder(self.ours, vllm_batches.vllm_config(**config))

    def build(self, builder: Any, step: Step) -> Any:
        return vllm_batches.build(builder, step, self.version)


def _install(monkeypatch: pytest.MonkeyPatch) -> Installed:
    """Put our metadata into vLLM until `monkeypatch` is undone."""
    installed_vllm.prepare_import()
    from vllm.v1.attention.backends import gdn_attn

    backend, plain = gdn_attn.GDNAttentionBackend, gdn_attn.GDNAttentionMetadataBuilder
    monkeypatch.setattr(backend, "get_builder_cls", staticmethod(lambda: plain))
    monkeypatch.setattr(plain, "build", plain.build)  # a test, or a patch in it, may replace it
    gdn_metadata.install()
    return Installed(installed_vllm.version() or "", gdn_attn, plain, backend.get_builder_cls())


@pytest.fixture
def vllm(monkeypatch: pytest.MonkeyPatch) -> Installed:
    """vLLM with our metadata, and afterwards as before."""
    return _install(monkeypatch)


@pytest.fixture
def load_patch(vllm: Installed, monkeypatch: pytest.MonkeyPatch) -> Callable[[], ModuleType]:
    """What executes vllm-ascend's metadata patch, which is undone afterwards."""
    if vllm.version != "0.17.0":
        pytest.skip("vllm-ascend 0.18.0 is for vLLM 0.17.0")
    monkeypatch.setattr(vllm.gdn_attn, "GDNChunkedPrefillMetadata", None, raising=False)

    def load() -> ModuleType:
        try:
            return peers.load_vllm_ascend_patch()
        except UnavailableError as error:
            pytest.skip(str(error))

    return load


def _steps(vllm: Installed, first: int = 0, number: int = NUM_STEPS) -> Iterator[tuple[int, Step]]:
    return ((seed, draw_step(seed, vllm.version)) for seed in range(first, first + number))


def _prebuilt(metadata: Any) -> ChunkMetadata:
    prebuilt = metadata.non_spec_chunked_prefill_meta
    assert type(prebuilt) is ChunkMetadata
    return prebuilt


def _check(prebuilt: ChunkMetadata, bounds: list[int], block_sizes: tuple[int, int, int]) -> None:
    assert not metadata_differences(prebuilt, bounds, block_sizes)


def _are_equal(x: Any, y: Any) -> bool:
    if isinstance(x, torch.Tensor) and isinstance(y, torch.Tensor):
        return x.dtype == y.dtype and x.shape == y.shape and torch.equal(x, y)
    if isinstance(x, dict) and isinstance(y, dict):
        return x.keys() == y.keys() and all(_are_equal(x[k], y[k]) for k in x)
    return type(x) is type(y) and x == y


def _other_fields(metadata: Any) -> dict[str, Any]:
    names = {field.name for field in dataclasses.fields(metadata)} - {"chunk_indices", "chunk_offsets"}
    return {name: getattr(metadata, name) for name in names}


PREFILLS = Step((Row(70, is_prefilling=True), Row(130, 64, is_prefilling=True)))
SMALLER = Step((Row(3, is_prefilling=True),))
DECODES = Step((Row(1, 5), Row(1, 9)))


# Values


@pytest.mark.parametrize(("num_value_heads", "tensor_parallel_size", "cumsum"), [(32, 1, 128), (32, 2, 256)])
def test_chunk_metadata_equal_the_definition(
    vllm: Installed, num_value_heads: int, tensor_parallel_size: int, cumsum: int
) -> None:
    builders = vllm.builders(num_value_heads=num_value_heads, tensor_parallel_size=tensor_parallel_size)
    seen: Counter[str] = Counter()
    for seed, step in _steps(vllm, first=NUM_STEPS * tensor_parallel_size):
        builder, wanted = builders[step.is_speculative], expected(step, vllm.version)
        num_copies = builder.chunk_metadata_builder.ring.copies
        metadata = vllm.build(builder, step)
        num_copies = builder.chunk_metadata_builder.ring.copies - num_copies
        seen.update(step.kinds())
        if wanted is None:
            assert metadata.non_spec_chunked_prefill_meta is None, (seed, step)
            assert num_copies == 0
            continue
        prebuilt = _prebuilt(metadata)
        assert not metadata_differences(prebuilt, wanted.bounds, (64, 1216, cumsum)), (seed, step)
        assert prebuilt.num_decodes == wanted.num_decodes, (seed, step)
        assert num_copies == 1
        if vllm.version != "0.17.0":
            assert metadata.chunk_indices is prebuilt.chunk_indices_chunk64
            offsets = torch.tensor(prebuilt.chunk_offsets_chunk64.tolist(), dtype=torch.int64)
            assert _are_equal(metadata.chunk_offsets, offsets), (seed, step)
    missing = {kind for kind in KINDS if not seen[kind]}
    assert missing == (set() if vllm.version == "0.17.0" else {"stale padding"})


def test_chunk_metadata_describe_the_sequences_that_vllm_hands_to_the_op(vllm: Installed) -> None:
    builders = vllm.builders()
    num_compared = 0
    for seed, step in _steps(vllm):
        metadata = vllm.build(builders[step.is_speculative], step)
        if metadata.non_spec_chunked_prefill_meta is None:
            assert metadata.num_prefills == 0
            continue
        assert metadata.num_prefills > 0
        of_vllm = (
            metadata.non_spec_query_start_loc
            if vllm.version == "0.17.0"
            else metadata.prefill_query_start_loc
        )
        if not step.stale:
            assert _are_equal(_prebuilt(metadata).cu_seqlens, of_vllm), (seed, step)
            num_compared += 1
    assert num_compared > NUM_STEPS / 2


def test_all_other_fields_are_those_of_vllm(vllm: Installed) -> None:
    ours = vllm.builders()
    for seed, step in _steps(vllm, number=NUM_STEPS // 2):
        config = ours[step.is_speculative].vllm_config
        mine = vllm.build(ours[step.is_speculative], step)
        plain = vllm.build(vllm_batches.make_builder(vllm.plain, config), step)
        assert not hasattr(plain, "non_spec_chunked_prefill_meta")
        assert _are_equal(_other_fields(mine), _other_fields(plain)), (seed, step)


@pytest.mark.vllm032
def test_chunk_fields_equal_those_of_vllm_where_no_sequence_inside_is_empty(vllm: Installed) -> None:
    """Where one is, vLLM numbers the others by their rank among those that are not, ours by their place."""
    ours = vllm.builders()
    num_equal = num_renumbered = 0
    for seed, step in _steps(vllm, first=NUM_STEPS):
        mine = vllm.build(ours[step.is_speculative], step)
        if mine.chunk_indices is None:
            continue
        plain = vllm_batches.make_builder(vllm.plain, ours[step.is_speculative].vllm_config)
        theirs = vllm.build(plain, step)
        assert _are_equal(mine.chunk_offsets, theirs.chunk_offsets), (seed, step)
        lens = _prebuilt(mine).seq_lens_host.tolist()
        if 0 in lens[: max(n for n, length in enumerate(lens) if length)]:
            places = [n for n, length in enumerate(lens) if length]
            of_theirs = [[places[rank], chunk] for rank, chunk in theirs.chunk_indices.tolist()]
            assert mine.chunk_indices.tolist() == of_theirs != theirs.chunk_indices.tolist(), (seed, step)
            num_renumbered += 1
        else:
            assert _are_equal(mine.chunk_indices, theirs.chunk_indices), (seed, step)
            num_equal += 1
    assert num_equal > NUM_STEPS / 2
    assert num_renumbered > 10


def test_tables_equal_those_of_vllm_ascend(vllm: Installed, load_patch: Callable[[], ModuleType]) -> None:
    load_patch()
    ours = vllm.builders()
    num_compared = 0
    for seed, step in _steps(vllm, first=2 * NUM_STEPS):
        if step.stale:  # its tables take what is left there for tokens
            continue
        mine = vllm.build(ours[step.is_speculative], step).non_spec_chunked_prefill_meta
        patched = vllm_batches.make_builder(vllm.plain, ours[step.is_speculative].vllm_config)
        theirs = vllm.build(patched, step).non_spec_chunked_prefill_meta
        assert (mine is None) == (theirs is None), (seed, step)
        if mine is not None:
            assert all(_are_equal(getattr(mine, n), getattr(theirs, n)) for n in OF_ASCEND), (seed, step)
            num_compared += 1
    assert num_compared > NUM_STEPS / 2


def test_rows_that_end_past_the_step_or_before_they_start_are_empty() -> None:
    def bounds(*values: int, num_tokens: int) -> list[int]:
        return gdn_metadata._bounds(torch.tensor(values, dtype=torch.int32), num_tokens).tolist()

    assert bounds(0, 3, 3, 8, 8, num_tokens=8) == [0, 3, 3, 8, 8]
    assert bounds(0, 4, 8, 5000, 5000, num_tokens=8) == [0, 4, 8, 8, 8]
    assert bounds(0, 4, 8, 2, -1, num_tokens=16) == [0, 4, 8, 8, 8]


# Several metadata at once


def test_a_drafter_may_build_in_the_same_step(vllm: Installed) -> None:
    builder = vllm.builder()
    first, second = vllm.build(builder, PREFILLS), vllm.build(builder, SMALLER)
    drafted = builder.build_for_drafting(
        vllm_batches.common_attn_metadata(PREFILLS, vllm.version), draft_index=0
    )
    sizes = builder.chunk_metadata_builder.block_sizes
    for metadata, bounds in ((first, [0, 70, 200]), (second, [0, 3]), (drafted, [0, 70, 200])):
        _check(_prebuilt(metadata), bounds, sizes)


def test_two_steps_in_flight_keep_their_metadata(vllm: Installed, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a device that copies and computes as late as it may. A kernel reads what each of two builds made."""
    for seed in range(6):
        rng, device = random.Random(seed), SimulatedDevice()
        monkeypatch.setattr(gdn_metadata, "open_device", lambda name, device=device: device)
        builder = vllm.builder()
        in_flight: list[list[Any]] = []
        read: list[tuple[list[int], dict[str, torch.Tensor]]] = []
        with device.forbid_host_sync():
            for number in range(30):
                step = draw_step(1000 * seed + number, vllm.version)
                wanted = expected(dataclasses.replace(step, is_speculative=False), vllm.version)
                if wanted is None or step.stale:
                    continue
                step = dataclasses.replace(step, is_speculative=False)
                built = [vllm.build(builder, step) for _ in range(2)]
                read += [(wanted.bounds, _read(metadata, vllm.version)) for metadata in built]
                in_flight = [*in_flight[-1:], built]
                del built  # the next build meets what the two steps hold and no more
                device.run([rng.randrange(8) for _ in range(rng.choice((0, 0, 5, 40)))])
        device.synchronize()
        assert len(read) > 20
        for bounds, views in read:
            for name in VIEWS:
                assert views[name].tolist() == _definition(bounds)[name], (seed, name)
            if vllm.version != "0.17.0":
                assert views["chunk_offsets"].dtype == torch.int64
                assert views["chunk_offsets"].tolist() == _definition(bounds)["chunk_offsets_chunk64"]


def _read(metadata: Any, version: str) -> dict[str, torch.Tensor]:
    """Copies of all tables, made on the device."""
    views = {name: getattr(_prebuilt(metadata), name).clone() for name in VIEWS}
    return views if version == "0.17.0" else {**views, "chunk_offsets": metadata.chunk_offsets.clone()}


def _definition(bounds: list[int]) -> dict[str, list[Any]]:
    from ascend_twin.reference.gdn import metadata as reference

    return {
        "cu_seqlens": bounds,
        "chunk_indices_chunk64": reference.chunk_indices(bounds, 64).tolist(),
        "chunk_offsets_chunk64": reference.chunk_offsets(bounds, 64).tolist(),
        "update_chunk_offsets_chunk64": reference.update_chunk_offsets(bounds, 64).tolist(),
        "final_chunk_indices_chunk64": reference.final_chunk_indices(bounds, 64).tolist(),
        "chunk_indices_large_block": reference.chunk_indices(bounds, 1216).tolist(),
        "block_indices_cumsum": reference.chunk_indices(bounds, 128).tolist(),
    }


def test_whoever_holds_more_metadata_than_the_ring_gets_an_error_and_no_overwrite(vllm: Installed) -> None:
    builder = vllm.builder()
    held = [vllm.build(builder, PREFILLS) for _ in range(gdn_metadata.RING_DEPTH)]
    assert len({_prebuilt(m).cu_seqlens.data_ptr() for m in held}) == gdn_metadata.RING_DEPTH
    with pytest.raises(StagingError, match=f"all {gdn_metadata.RING_DEPTH} slots are held"):
        vllm.build(builder, SMALLER)
    while held:
        _check(_prebuilt(held.pop()), [0, 70, 200], builder.chunk_metadata_builder.block_sizes)
    _check(_prebuilt(vllm.build(builder, SMALLER)), [0, 3], builder.chunk_metadata_builder.block_sizes)


def test_metadata_are_given_back_with_the_metadata_of_vllm(vllm: Installed) -> None:
    builder = vllm.builder()
    gc.disable()  # at once, not when a collector comes
    try:
        for _ in range(3 * gdn_metadata.RING_DEPTH):
            metadata = vllm.build(builder, PREFILLS)
            shallow = copy.copy(metadata)
            del metadata
            assert not _prebuilt(shallow).released
    finally:
        gc.enable()


@pytest.mark.vllm032
def test_metadata_live_on_in_another_cache_group(vllm: Installed) -> None:
    builder = vllm.builder()
    metadata = vllm.build(builder, PREFILLS)
    updated = builder.update_block_table(metadata, torch.tensor([[5], [9]], dtype=torch.int32), None)
    prebuilt = metadata.non_spec_chunked_prefill_meta
    assert getattr(updated, "non_spec_chunked_prefill_meta", None) is prebuilt
    assert updated.non_spec_state_indices_tensor.tolist() == [5, 9]
    del metadata, prebuilt
    for _ in range(2 * gdn_metadata.RING_DEPTH):
        vllm.build(builder, SMALLER)
    assert not _prebuilt(updated).released
    assert updated.chunk_indices.tolist() == [[0, 0], [0, 1], [1, 0], [1, 1], [1, 2]]
    decodes = vllm.build(builder, DECODES)
    updated = builder.update_block_table(decodes, torch.tensor([[5], [9]], dtype=torch.int32), None)
    assert updated.non_spec_chunked_prefill_meta is None


def test_capacity_is_that_of_the_engine(vllm: Installed) -> None:
    builder = vllm.builder(max_num_seqs=3, max_num_batched_tokens=128)
    most = Step(
        (Row(126, is_prefilling=True), Row(1, is_prefilling=True), Row(1, is_prefilling=True), Row(0))
    )
    _check(_prebuilt(vllm.build(builder, most)), [0, 126, 127, 128, 128], (64, 1216, 128))
    with pytest.raises(CapacityError, match="max_num_batched_tokens = 128"):
        vllm.build(builder, Step((Row(129, is_prefilling=True),)))
    with pytest.raises(CapacityError, match="max_num_seqs = 4"):
        vllm.build(builder, Step((Row(9, is_prefilling=True), *[Row(0)] * 4)))
    captured = vllm_batches.vllm_config(max_num_seqs=3)
    captured.compilation_config.max_cudagraph_capture_size = 8
    builder = vllm_batches.make_builder(vllm.ours, captured)
    padded = vllm.build(builder, Step((Row(9, is_prefilling=True), *[Row(0)] * 7)))
    _check(_prebuilt(padded), [0, *[9] * 8], (64, 1216, 128))


# Installing it


def test_vllm_makes_our_builder_and_a_second_install_changes_nothing(vllm: Installed) -> None:
    backend = vllm.gdn_attn.GDNAttentionBackend
    assert vllm.ours.__bases__ == (vllm.plain,)
    gdn_metadata.install()
    assert backend.get_builder_cls() is vllm.ours
    assert vllm.gdn_attn.GDNAttentionMetadataBuilder is vllm.plain
    assert type(vllm.builder()) is vllm.ours


def _without_method(vllm: Installed, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(vllm.plain, "_build_chunk_metadata")


def _other_method(vllm: Installed, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm.plain, "_build_chunk_metadata", lambda self, bounds: None, raising=False)


def _other_build(vllm: Installed, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm.plain, "build", lambda self, common_attn_metadata: None)


def _other_fields_of_metadata(vllm: Installed, monkeypatch: pytest.MonkeyPatch) -> None:
    fields = [("chunk_indices", Any)] if vllm.version == "0.17.0" else []
    monkeypatch.setattr(vllm.gdn_attn, "GDNAttentionMetadata", dataclasses.make_dataclass("Other", fields))


def _other_builder(vllm: Installed, monkeypatch: pytest.MonkeyPatch) -> None:
    another = type("Another", (vllm.plain,), {})
    monkeypatch.setattr(vllm.gdn_attn.GDNAttentionBackend, "get_builder_cls", staticmethod(lambda: another))


def _no_backend(vllm: Installed, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(vllm.gdn_attn, "GDNAttentionBackend")


@pytest.mark.parametrize(
    "change",
    [_without_method, _other_method, _other_build, _other_fields_of_metadata, _other_builder, _no_backend],
)
def test_a_builder_of_another_shape_is_refused_and_left_as_it_is(
    vllm: Installed, monkeypatch: pytest.MonkeyPatch, change: Callable[..., None]
) -> None:
    if change is _without_method and vllm.version == "0.17.0":
        pytest.skip("0.17.0 has no such method")
    backend = vllm.gdn_attn.GDNAttentionBackend
    monkeypatch.setattr(backend, "get_builder_cls", staticmethod(lambda: vllm.plain))
    change(vllm, monkeypatch)
    before = backend.get_builder_cls
    with pytest.raises(UnavailableError):
        gdn_metadata.install()
    assert backend.get_builder_cls is before


@pytest.mark.vllm032
def test_chunks_of_another_length_leave_the_builder_as_it_is(
    vllm: Installed, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm.third_party.flash_linear_attention.ops import utils

    monkeypatch.setattr(
        vllm.gdn_attn.GDNAttentionBackend, "get_builder_cls", staticmethod(lambda: vllm.plain)
    )
    monkeypatch.setattr(utils, "FLA_CHUNK_SIZE", 32)
    said: list[str] = []
    monkeypatch.setattr(gdn_metadata._logger, "warning", lambda text, *values: said.append(text % values))
    gdn_metadata.install()
    assert vllm.gdn_attn.GDNAttentionBackend.get_builder_cls() is vllm.plain
    assert len(said) == 1
    assert "FLA_CHUNK_SIZE is 32" in said[0]


# Switched off


def _off_by_setting(config: Any) -> None:
    config.additional_config = {"ascend_twin": {"gdn": {"metadata": False}}}


def _off_by_model(config: Any) -> None:
    del config.model_config.hf_text_config.linear_num_value_heads


@pytest.mark.parametrize("switch_off", [_off_by_setting, _off_by_model])
def test_switched_off_all_is_as_vllm_makes_it(
    vllm: Installed, switch_off: Callable[[Any], None], caplog: pytest.LogCaptureFixture
) -> None:
    config = vllm_batches.vllm_config()
    switch_off(config)
    builder, plain = (vllm_batches.make_builder(c, config) for c in (vllm.ours, vllm.plain))
    assert builder.chunk_metadata_builder is None
    for step in (PREFILLS, DECODES):
        mine, theirs = vllm.build(builder, step), vllm.build(plain, step)
        assert vars(mine).keys() == vars(theirs).keys()
        assert _are_equal(vars(mine), vars(theirs))


def test_a_device_that_staging_does_not_know_is_left_to_vllm_with_a_warning(
    vllm: Installed, monkeypatch: pytest.MonkeyPatch
) -> None:
    warnings: list[str] = []
    monkeypatch.setattr(gdn_metadata._logger, "warning", lambda text, *args: warnings.append(text % args))
    config = vllm_batches.vllm_config()
    assert gdn_metadata._open_builder(config, torch.device("xpu"), ["layer"]) is None
    assert "xpu" in warnings[0]
    del config.model_config.hf_text_config.linear_num_value_heads
    assert gdn_metadata._open_builder(config, torch.device("cpu"), ["layer"]) is None
    assert "linear_num_value_heads" in warnings[1]


@pytest.mark.vllm032
@pytest.mark.parametrize("backend", ["cutedsl", "aiter_flydsl", "flashinfer", "another"])
def test_backends_with_metadata_of_their_own_are_left_to_vllm(
    vllm: Installed, monkeypatch: pytest.MonkeyPatch, backend: str
) -> None:
    from vllm.model_executor.layers.mamba.gdn import qwen_gdn_linear_attn

    asked: list[Any] = []
    check = vllm.plain._check_chunk_metadata_override
    monkeypatch.setattr(
        vllm.plain,
        "_check_chunk_metadata_override",
        staticmethod(lambda *args: (asked.append(args[0]), check(*args))),
    )
    monkeypatch.setattr(
        qwen_gdn_linear_attn, "_resolve_gdn_prefill_backend", lambda config: (backend, backend)
    )
    builder = vllm.builder()
    assert asked == [vllm.plain]  # so that it does not refuse, and shares metadata among cache groups
    assert type(builder) is vllm.ours
    assert (builder.chunk_metadata_builder is not None) == (backend == "flashinfer")


# Beside vllm-ascend


@pytest.mark.parametrize("is_first", [False, True])
def test_our_metadata_arrive_whenever_vllm_ascend_patches(
    vllm: Installed,
    load_patch: Callable[[], ModuleType],
    monkeypatch: pytest.MonkeyPatch,
    is_first: bool,
) -> None:
    backend = vllm.gdn_attn.GDNAttentionBackend
    if is_first:
        monkeypatch.setattr(backend, "get_builder_cls", staticmethod(lambda: vllm.plain))
        patch = load_patch()
        gdn_metadata.install()
    else:
        patch = load_patch()
    config = vllm_batches.vllm_config()
    builder = vllm_batches.make_builder(backend.get_builder_cls(), config)
    monkeypatch.setattr(
        patch, "_build_non_spec_chunked_prefill_meta", lambda *args: pytest.fail("made a second time")
    )
    _check(_prebuilt(vllm.build(builder, PREFILLS)), [0, 70, 200], (64, 1216, 128))
    assert vllm.build(builder, DECODES).non_spec_chunked_prefill_meta is None


def test_switched_off_the_metadata_of_vllm_ascend_arrive(
    vllm: Installed, load_patch: Callable[[], ModuleType]
) -> None:
    patch = load_patch()
    config = vllm_batches.vllm_config()
    _off_by_setting(config)
    metadata = vllm.build(vllm_batches.make_builder(vllm.ours, config), PREFILLS)
    assert type(metadata.non_spec_chunked_prefill_meta) is patch.GDNChunkedPrefillMetadata


def test_what_others_do_to_the_builder_of_vllm_keeps_its_effect(
    vllm: Installed, monkeypatch: pytest.MonkeyPatch
) -> None:
    builder, build = vllm.builder(), vllm.plain.build
    seen = []

    def watched(self: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append(self)
        return build(self, *args, **kwargs)

    monkeypatch.setattr(vllm.plain, "build", watched)
    _check(_prebuilt(vllm.build(builder, PREFILLS)), [0, 70, 200], (64, 1216, 128))
    assert seen == [builder]


@pytest.mark.parametrize("is_vllm_included", [True, False])
def test_contest_in_the_builder_of_vllm_makes_the_same_tables(
    load_patch: Callable[[], ModuleType], monkeypatch: pytest.MonkeyPatch, is_vllm_included: bool
) -> None:
    patch = load_patch()
    monkeypatch.setattr(peers, "_vllm_ascend_metadata_module", lambda: patch)
    made = []
    original = patch._ORIGINAL_BUILD
    vars(patch)["_ORIGINAL_BUILD"] = lambda *args, **kwargs: (made.append(1), original(*args, **kwargs))[1]
    pair = bench._real_builder_contest(3, is_vllm_included=is_vllm_included).start()
    made.clear()
    ours: Any = pair.our_call()
    mine = _prebuilt(ours)
    theirs: Any = pair.peer_call()
    assert len(made) == 2 * is_vllm_included
    assert type(theirs.non_spec_chunked_prefill_meta) is patch.GDNChunkedPrefillMetadata
    bench._check_same_tables(mine, theirs.non_spec_chunked_prefill_meta)


# Bugs put in on purpose


class Mutant(NamedTuple):
    """A bug in the source of a module, and the test that finds it."""

    name: str
    module: str
    old: str
    new: str
    find: Callable[[Installed, pytest.FixtureRequest], None]
    versions: tuple[str, ...] = tuple(installed_vllm.VERSIONS)


def _by_values(vllm: Installed, request: pytest.FixtureRequest) -> None:
    test_chunk_metadata_equal_the_definition(vllm, 32, 1, 128)


def _by_values_of_one_of_two_ranks(vllm: Installed, request: pytest.FixtureRequest) -> None:
    test_chunk_metadata_equal_the_definition(vllm, 32, 2, 256)


def _by_holding(vllm: Installed, request: pytest.FixtureRequest) -> None:
    test_whoever_holds_more_metadata_than_the_ring_gets_an_error_and_no_overwrite(vllm)


def _by_drafting(vllm: Installed, request: pytest.FixtureRequest) -> None:
    test_a_drafter_may_build_in_the_same_step(vllm)


def _by_another_group(vllm: Installed, request: pytest.FixtureRequest) -> None:
    test_metadata_live_on_in_another_cache_group(vllm)


def _by_switching_off(vllm: Installed, request: pytest.FixtureRequest) -> None:
    test_switched_off_all_is_as_vllm_makes_it(vllm, _off_by_setting, request.getfixturevalue("caplog"))


def _by_patching(vllm: Installed, request: pytest.FixtureRequest) -> None:
    load_patch, monkeypatch = (request.getfixturevalue(name) for name in ("load_patch", "monkeypatch"))
    vllm.gdn_attn.GDNAttentionBackend.get_builder_cls = staticmethod(lambda: vllm.ours)
    test_our_metadata_arrive_whenever_vllm_ascend_patches(vllm, load_patch, monkeypatch, False)


COPIES = {
    "metadata": "ascend_twin.optimized.gdn.metadata",
    "gdn_metadata": "ascend_twin.optimized.vllm.gdn_metadata",
}
OLDER, NEWER = ("0.17.0",), ("0.32.0",)
MUTANTS = (
    Mutant(
        "block sizes swapped",
        "metadata",
        "(CHUNK_SIZE, SOLVE_TRIL_BLOCK_SIZE, cumsum_block_size(num_value_heads))",
        "(SOLVE_TRIL_BLOCK_SIZE, CHUNK_SIZE, cumsum_block_size(num_value_heads))",
        _by_values,
    ),
    Mutant(
        "padding dropped",
        "metadata",
        "        N = len(lens)\n",
        '        lens = np.trim_zeros(lens, "b")\n        N = len(lens)\n',
        _by_values,
    ),
    Mutant(
        "metadata released when they are made",
        "metadata",
        "lease = self.ring.stage(size, fill)\n",
        "lease = self.ring.stage(size, fill)\n        lease.release()\n",
        _by_holding,
    ),
    Mutant(
        "decodes counted as prefills",
        "gdn_metadata",
        "num_decodes=metadata.num_decodes,",
        "num_decodes=0,",
        _by_values,
        OLDER,
    ),
    Mutant(
        "mask of verifications inverted",
        "gdn_metadata",
        "is_spec = num_decode_draft_tokens_cpu >= 0",
        "is_spec = num_decode_draft_tokens_cpu < 0",
        _by_values,
        OLDER,
    ),
    Mutant(
        "rows without drafts verify nothing",
        "gdn_metadata",
        "is_spec = num_decode_draft_tokens_cpu >= 0",
        "is_spec = num_decode_draft_tokens_cpu > 0",
        _by_values,
        OLDER,
    ),
    Mutant(
        "what an earlier step left is taken for tokens",
        "gdn_metadata",
        "np.where(bounds > num_tokens, 0, bounds)",
        "bounds",
        _by_values,
        OLDER,
    ),
    Mutant(
        "patch of vllm-ascend run, too",
        "gdn_metadata",
        'return getattr(build, "__globals__", {}).get("_ORIGINAL_BUILD", build)',
        "return build",
        _by_patching,
        OLDER,
    ),
    Mutant(
        "offsets of 32 bits",
        "gdn_metadata",
        "prebuilt.chunk_offsets_int64\n",
        "prebuilt.chunk_offsets_chunk64\n",
        _by_values,
        NEWER,
    ),
    Mutant(
        "metadata released with those of the first cache group",
        "gdn_metadata",
        "updated.non_spec_chunked_prefill_meta = metadata.non_spec_chunked_prefill_meta",
        "pass",
        _by_another_group,
        NEWER,
    ),
    Mutant(
        "value heads of all ranks",
        "gdn_metadata",
        "num_value_heads //= vllm_config.parallel_config.tensor_parallel_size",
        "num_value_heads //= 1",
        _by_values_of_one_of_two_ranks,
    ),
    Mutant("one slot", "gdn_metadata", "RING_DEPTH = 6", "RING_DEPTH = 1", _by_drafting),
    Mutant(
        "setting ignored",
        "gdn_metadata",
        "if not read_settings(vllm_config.additional_config).gdn_metadata:",
        "if False:",
        _by_switching_off,
    ),
)


def _install_copy(monkeypatch: pytest.MonkeyPatch, mutant: Mutant) -> Installed:
    """As `_install`, with copies of our modules, which the tests of this module then see."""
    copies = mutated(mutant, COPIES)
    monkeypatch.setitem(globals(), "gdn_metadata", copies["gdn_metadata"])
    monkeypatch.setitem(globals(), "ChunkMetadata", copies["metadata"].ChunkMetadata)
    return _install(monkeypatch)


@pytest.mark.parametrize("mutant", MUTANTS, ids=[mutant.name for mutant in MUTANTS])
def test_bug_is_found(
    mutant: Mutant, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    if installed_vllm.version() not in mutant.versions:
        pytest.skip(f"of vLLM {', '.join(mutant.versions)} alone")
    with pytest.raises((AssertionError, AscendTwinError, pytest.fail.Exception)):
        mutant.find(_install_copy(monkeypatch, mutant), request)


@pytest.mark.parametrize("mutant", MUTANTS, ids=[mutant.name for mutant in MUTANTS])
def test_a_copy_without_the_bug_passes(
    mutant: Mutant, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    if installed_vllm.version() not in mutant.versions:
        pytest.skip(f"of vLLM {', '.join(mutant.versions)} alone")
    mutant.find(_install_copy(monkeypatch, mutant._replace(new=mutant.old)), request)
