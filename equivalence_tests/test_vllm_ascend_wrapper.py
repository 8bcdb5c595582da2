# pyright: reportMissingImports=false
"""vllm-ascend's own wrapper and kernels, fed with the chunk metadata that the plugin puts into vLLM.

The files of vllm-ascend 0.18.0 (ops/triton/fla) are loaded unchanged and run in Triton's interpreter. Around
them stands in what needs an NPU: vLLM's forward context and parallel groups, two operations of triton-ascend
on slices, and block pointers, which newer Triton no longer has. triton-ascend takes blocks of any size, so
that the interpreter must, too.
"""

import contextlib
import dataclasses
import importlib
import importlib.util
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch

from ascend_twin.equivalence_tests import installed_vllm, vllm_batches
from ascend_twin.equivalence_tests.cases import PrefillCase, compare_prefill, run_case
from ascend_twin.equivalence_tests.compare import Comparison
from ascend_twin.equivalence_tests.interpreter import AddressError
from ascend_twin.equivalence_tests.vllm_batches import Row, Step
from ascend_twin.optimized.gdn import ChunkMetadata
from ascend_twin.optimized.vllm import gdn_metadata

pytestmark = [pytest.mark.vllm017, pytest.mark.usefixtures("triton_runs")]

FLA = "vllm_ascend.ops.triton.fla"
PACKAGES = (
    "vllm",
    "vllm.model_executor",
    "vllm.model_executor.layers",
    "vllm.model_executor.layers.fla",
    "vllm.model_executor.layers.fla.ops",
    "vllm_ascend",
    "vllm_ascend.ops",
    "vllm_ascend.ops.triton",
)
STAGES = ("chunk_delta_h", "chunk_scaled_dot_kkt", "cumsum", "solve_tril", "wy_fast")
MIXED = PrefillCase(
    (1, 70, 0, 130, 0), H=1, HV=2, K=128, V=128, dtype="float16", use_qk_l2norm_in_kernel=True
)
LONG = PrefillCase((1, 1290), H=1, HV=1, K=128, V=128, dtype="float16")
TABLES = {
    "chunk_local_cumsum": {"block_indices": "block_indices_cumsum"},
    "chunk_scaled_dot_kkt_fwd": {"chunk_indices": "chunk_indices_chunk64"},
    "solve_tril": {
        "chunk_indices_large_block": "chunk_indices_large_block",
        "chunk_indices_bt": "chunk_indices_chunk64",
    },
    "recompute_w_u_fwd": {"chunk_indices": "chunk_indices_chunk64"},
    "chunk_gated_delta_rule_fwd_h": {
        "chunk_indices": "chunk_indices_chunk64",
        "chunk_offsets": "chunk_offsets_chunk64",
    },
}
"""Of each stage that reads tables: which field of the metadata each of its options is."""

CASES = {"mixed, with empty sequences": MIXED, "longer than a block of solve_tril": LONG}


class _BlockPointer:
    """A block pointer, as pointers to all elements and whether each is inside, along each dimension."""

    def __init__(self, base: Any, shape: Any, strides: Any, offsets: Any, block_shape: Any) -> None:
        import triton.language as tl

        self.dtype, self.pointers, self.inside = base.dtype, base, []
        for dim, size in enumerate(block_shape):
            index = tl.arange(0, getattr(size, "value", size))
            for other in range(len(block_shape)):
                if other != dim:
                    index = tl.expand_dims(index, other)
            index = index + offsets[dim]
            self.pointers = self.pointers + index * strides[dim]
            self.inside.append((index >= 0) & (index < shape[dim]))

    def mask(self, boundary_check: Sequence[int]) -> Any:
        import triton.language as tl

        mask = self.inside[boundary_check[0]]
        for dim in boundary_check[1:]:
            mask = mask & self.inside[dim]
        return tl.broadcast_to(mask, self.pointers.shape)


class _Language:
    """`triton.language` with block pointers."""

    def __getattr__(self, name: str) -> Any:
        import triton.language as tl

        return getattr(tl, name)

    def make_block_ptr(
        self, base: Any, shape: Any, strides: Any, offsets: Any, block_shape: Any, order: Any
    ) -> _BlockPointer:
        return _BlockPointer(base, shape, strides, offsets, block_shape)

    def load(self, pointer: Any, mask: Any = None, other: Any = None, boundary_check: Any = ()) -> Any:
        import triton.language as tl

        if isinstance(pointer, _BlockPointer):
            return tl.load(pointer.pointers, mask=pointer.mask(boundary_check), other=0.0)
        return tl.load(pointer, mask=mask, other=other)

    def store(self, pointer: Any, value: Any, mask: Any = None, boundary_check: Any = ()) -> Any:
        import triton.language as tl

        if isinstance(pointer, _BlockPointer):
            return tl.store(pointer.pointers, value, mask=pointer.mask(boundary_check))
        return tl.store(pointer, value, mask=mask)


def _slices(offsets: Any, sizes: Any) -> tuple[slice, ...]:
    starts = [int(getattr(x, "value", x)) for x in offsets]
    return tuple(
        slice(start, start + int(getattr(n, "value", n))) for start, n in zip(starts, sizes, strict=True)
    )


def _like(block: Any, data: np.ndarray) -> Any:
    import triton.language as tl
    from triton.runtime.interpreter import TensorHandle

    return tl.core.tensor(
        TensorHandle(data, block.handle.dtype), tl.block_type(block.dtype, list(data.shape))
    )


def _extract_slice(ful: Any, offsets: Any, sizes: Any, strides: Any) -> Any:
    return _like(ful, ful.handle.data[_slices(offsets, sizes)].copy())


def _insert_slice(ful: Any, sub: Any, offsets: Any, sizes: Any, strides: Any) -> Any:
    data = ful.handle.data.copy()
    data[_slices(offsets, sizes)] = sub.handle.data
    return _like(ful, data)


def _arange_of_any_length(semantic: Any, start: int, end: int, **ret_ty: Any) -> Any:
    import triton.language as tl
    from triton.runtime.interpreter import TensorHandle

    values = np.arange(start, end, dtype=np.int32)
    return semantic.tensor(TensorHandle(values, tl.int32), tl.block_type(tl.int32, [len(values)]))


def _module(name: str, **contents: Any) -> ModuleType:
    """A module of this name, which is also a package."""
    sys.modules[name] = made = ModuleType(name)
    vars(made).update({"__path__": [], **contents})
    return made


@contextlib.contextmanager
def _other_modules(*packages: str) -> Iterator[None]:
    """A context without the modules of these packages, which come back in place of those imported in it."""

    def take_out() -> dict[str, ModuleType]:
        return {name: sys.modules.pop(name) for name in [*sys.modules] if name.split(".")[0] in packages}

    before = take_out()
    try:
        yield
    finally:
        take_out()
        sys.modules.update(before)


@contextlib.contextmanager
def _ascend_wrapper(folder: Path) -> Iterator[ModuleType]:
    """vllm-ascend's module of the wrapper, loaded anew on a CPU; afterwards all modules are as before."""
    import triton
    from triton.language import core, semantic

    with (
        _other_modules("vllm", "vllm_ascend", "einops"),
        mock.patch.object(torch, "npu", SimpleNamespace(device=contextlib.nullcontext), create=True),
        mock.patch.object(core, "validate_block_shape", math.prod),
        mock.patch.object(semantic.TritonSemantic, "arange", _arange_of_any_length),
    ):
        for name in PACKAGES:
            _module(name)
        _module("einops", rearrange=None)
        _module("vllm.distributed", get_pcp_group=lambda: SimpleNamespace(world_size=1))
        _module("vllm.forward_context", get_forward_context=lambda: SimpleNamespace(attn_metadata=None))
        _module("vllm.triton_utils", triton=triton, tl=_Language(), HAS_TRITON=True)
        _module("vllm.model_executor.layers.fla.ops.utils", SUPPRESS_LEVEL=0)
        _module(
            "vllm_ascend.ops.triton.triton_utils",
            extract_slice=_extract_slice,
            insert_slice=_insert_slice,
            get_vectorcore_num=lambda: 2,
        )
        _module(FLA, __path__=[str(folder)])
        chunk = importlib.import_module(f"{FLA}.chunk")
        for name, module in sys.modules.items():
            if name.startswith(f"{FLA}."):
                vars(module)["triton_language"] = triton.language  # the interpreter looks for it there
        yield chunk


@contextlib.contextmanager
def _poisoned() -> Iterator[None]:
    """A context in which whatever nobody wrote is NaN."""

    def poisoned(make: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def made(*args: Any, **kwargs: Any) -> torch.Tensor:
            x = make(*args, **kwargs)
            return x.fill_(float("nan")) if x.is_floating_point() else x

        return made

    with (
        mock.patch.object(torch, "empty", poisoned(torch.empty)),
        mock.patch.object(torch, "empty_like", poisoned(torch.empty_like)),
        mock.patch.object(torch.Tensor, "new_empty", poisoned(torch.Tensor.new_empty)),
    ):
        yield


@pytest.fixture
def fla_folder() -> Path:
    found = importlib.util.find_spec("vllm_ascend")
    if found is None or not found.submodule_search_locations:
        pytest.skip("vllm-ascend is not installed")
    return Path(found.submodule_search_locations[0], "ops", "triton", "fla")


@pytest.fixture
def metadata_of(monkeypatch: pytest.MonkeyPatch) -> Callable[[PrefillCase], ChunkMetadata]:
    """What makes the metadata of a step with these sequences: vLLM's builder with the plugin installed."""
    installed_vllm.prepare_import()
    from vllm.v1.attention.backends import gdn_attn

    backend = gdn_attn.GDNAttentionBackend
    monkeypatch.setattr(backend, "get_builder_cls", backend.__dict__["get_builder_cls"])
    gdn_metadata.install()

    def build(case: PrefillCase) -> ChunkMetadata:
        config = vllm_batches.vllm_config(num_value_heads=case.HV)
        builder = vllm_batches.make_builder(backend.get_builder_cls(), config)
        step = Step(tuple(Row(n, num_computed=7, is_prefilling=n > 1) for n in case.seq_lens))
        prebuilt = vllm_batches.build(builder, step, "0.17.0").non_spec_chunked_prefill_meta
        assert isinstance(prebuilt, ChunkMetadata)
        return prebuilt

    return build


def _run(chunk: ModuleType, case: PrefillCase, metadata: ChunkMetadata | None) -> list[Comparison]:
    """The wrapper's results against the recurrence."""
    inputs = case.inputs()
    with _poisoned():
        o, state = run_case(chunk.chunk_gated_delta_rule, case, inputs, prebuilt_meta=metadata)
    return compare_prefill(case, inputs, o, state)


def _helpers(chunk: ModuleType) -> Iterator[ModuleType]:
    """The modules of the stages, which make tables of their own where they are given none."""
    return (sys.modules[f"{FLA}.{stage}"] for stage in STAGES)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_wrapper_with_our_metadata_equals_the_recurrence(
    case: PrefillCase, fla_folder: Path, metadata_of: Callable[[PrefillCase], ChunkMetadata]
) -> None:
    metadata = metadata_of(case)
    with _ascend_wrapper(fla_folder) as chunk, pytest.MonkeyPatch.context() as patch:
        for module in _helpers(chunk):
            patch.setattr(module, "prepare_chunk_indices", lambda *args, **kwargs: pytest.fail("not ours"))
        for comparison in _run(chunk, case, metadata):
            assert comparison.passed, comparison


def test_each_stage_gets_its_table(
    fla_folder: Path, metadata_of: Callable[[PrefillCase], ChunkMetadata]
) -> None:
    metadata = metadata_of(MIXED)
    given: dict[str, dict[str, Any]] = {}

    def recorded(name: str, stage: Callable[..., Any]) -> Callable[..., Any]:
        def record(*args: Any, **options: Any) -> Any:
            given[name] = options
            return stage(*args, **options)

        return record

    with _ascend_wrapper(fla_folder) as chunk, pytest.MonkeyPatch.context() as patch:
        for name in TABLES:
            patch.setattr(chunk, name, recorded(name, getattr(chunk, name)))
        _run(chunk, MIXED, metadata)
    for name, tables in TABLES.items():
        for option, table in tables.items():
            assert given[name][option] is getattr(metadata, table), (name, option)


@pytest.mark.parametrize(
    ("case", "table"),
    [
        (MIXED, "chunk_indices_chunk64"),
        (MIXED, "chunk_offsets_chunk64"),
        (MIXED, "block_indices_cumsum"),
        (LONG, "chunk_indices_large_block"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_a_wrong_table_is_seen(
    case: PrefillCase,
    table: str,
    fla_folder: Path,
    metadata_of: Callable[[PrefillCase], ChunkMetadata],
) -> None:
    """Each table is read: without its last row, or with offsets that are one off, results are others."""
    metadata = metadata_of(case)
    right = getattr(metadata, table)
    wrong = right + 1 if right.ndim == 1 else right[:-1]
    with _ascend_wrapper(fla_folder) as chunk:
        try:
            comparisons = _run(chunk, case, dataclasses.replace(metadata, **{table: wrong}))
        except AddressError:
            return
    assert not all(comparison.passed for comparison in comparisons)


def test_tables_of_the_wrapper_itself_are_wrong_where_a_sequence_is_empty(fla_folder: Path) -> None:
    """Why they are prebuilt: it numbers the sequences that are not empty, and indexes all with that."""
    with _ascend_wrapper(fla_folder) as chunk:
        try:
            comparisons = _run(chunk, MIXED, None)
        except AddressError:
            return
    assert not all(comparison.passed for comparison in comparisons)
