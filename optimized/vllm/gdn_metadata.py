# pyright: reportMissingImports=false
"""Prebuilt chunk metadata in the metadata builder of vLLM's gated delta net layers.

`GDNAttentionBackend` names the class of builder that vLLM makes. In its place stands a subclass made here,
which adds chunk metadata to what the builder makes anyway. The method `build` itself is not replaced, because
vllm-ascend 0.18.0 replaces it later, in each worker, and would overwrite the result.
"""

import dataclasses
import functools
import inspect
import logging
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from ...reference.errors import InvalidArgumentError, UnavailableError
from ..gdn.device import open_device
from ..gdn.kernels.block_sizes import CHUNK_SIZE
from ..gdn.metadata import ChunkMetadata, ChunkMetadataBuilder
from .record_gdn import RecordedBuilder, record_builds
from .settings import read_settings

RING_DEPTH = 6
"""How many chunk metadata of one builder may be referenced at once: two a step (a drafter builds, too) of two
steps in flight with async scheduling and of a third that is prepared before the oldest is dropped. One more
is a `StagingError`."""

_BUILD = ("self", "common_prefix_len", "common_attn_metadata", "num_accepted_tokens")
_BUILD += ("num_decode_draft_tokens_cpu", "fast_build")
_BUILD_CHUNKS = ("self", "prefill_query_start_loc", "prefill_query_start_loc_cpu", "device")
_MARK = "prebuilds_for_ascend_twin"
_SERVED_BACKENDS = ("triton", "flashinfer")  # others take chunk metadata in forms of their own

_logger = logging.getLogger(f"vllm.{__name__}")


def install() -> None:
    """Have vLLM make builders of gated delta net metadata that add chunk metadata. Twice does nothing.

    Raises:
        UnavailableError: when the installed vLLM's builder is neither that of 0.17.0, which knows no chunks,
            nor that of 0.32.0, which has a method for them.

    Source: vllm/v1/attention/backends/gdn_attn.py, 0.17.0 and 0.32.0.
    """
    from vllm.v1.attention.backends import gdn_attn

    backend: Any = getattr(gdn_attn, "GDNAttentionBackend", None)
    builder = getattr(gdn_attn, "GDNAttentionMetadataBuilder", None)
    metadata = getattr(gdn_attn, "GDNAttentionMetadata", None)
    if not hasattr(backend, "get_builder_cls") or builder is None or not dataclasses.is_dataclass(metadata):
        raise UnavailableError("vLLM's gdn_attn lacks GDNAttentionBackend, its builder or its metadata")
    if hasattr(backend.get_builder_cls, _MARK):
        return
    if backend.get_builder_cls() is not builder:
        raise UnavailableError("GDNAttentionBackend names another builder than GDNAttentionMetadataBuilder")
    subclassing = prebuilding(builder, metadata)

    @functools.cache
    def get_builder_cls() -> Any:
        return subclassing(builder)

    setattr(get_builder_cls, _MARK, True)
    backend.get_builder_cls = staticmethod(get_builder_cls)


def prebuilding(builder: Any, metadata: Any) -> Callable[[Any], Any]:
    """What makes a subclass of vLLM's builder, with these metadata, that prebuilds chunk metadata.

    It is not to be called before a model is loaded: it may import what asks for the device.

    Raises:
        UnavailableError: as `install`.
    """
    if _parameters(builder, "build") == _BUILD:
        has_chunks = {"chunk_indices", "chunk_offsets"} & {f.name for f in dataclasses.fields(metadata)}
        if not has_chunks and not hasattr(builder, "_build_chunk_metadata"):
            return _adding_chunks
        if len(has_chunks) == 2 and _parameters(builder, "_build_chunk_metadata") == _BUILD_CHUNKS:
            return _serving_chunks
    raise UnavailableError(
        "vLLM's GDNAttentionMetadataBuilder is neither that of 0.17.0 (no chunk metadata) nor that of 0.32.0 "
        "(_build_chunk_metadata)"
    )


def _parameters(owner: Any, method: str) -> tuple[str, ...]:
    function = getattr(owner, method, None)
    return () if function is None else tuple(inspect.signature(function).parameters)


def _chunk_size() -> int | None:
    """That of vLLM's kernels, None if it cannot be found. Imports what asks for the device."""
    try:
        from vllm.third_party.flash_linear_attention.ops.utils import FLA_CHUNK_SIZE
    except ImportError:
        return None
    return FLA_CHUNK_SIZE


def _adding_chunks(plain: Any) -> Any:
    """A subclass of the builder of 0.17.0: `build` returns metadata with `non_spec_chunked_prefill_meta`.

    That attribute is read by vllm-ascend 0.18.0 (patch/worker/patch_qwen3_next.py), which has its wrapper
    chunk_gated_delta_rule take it as `prebuilt_meta`. It is None in a step without prefill.
    """

    class ChunkAddingBuilder(plain):
        prebuilds_for_ascend_twin = True

        def __init__(self, kv_cache_spec: Any, layer_names: Any, vllm_config: Any, device: Any) -> None:
            super().__init__(kv_cache_spec, layer_names, vllm_config, device)
            self.chunk_metadata_builder = _open_builder(vllm_config, device, layer_names)

        def build(
            self,
            common_prefix_len: int,
            common_attn_metadata: Any,
            num_accepted_tokens: torch.Tensor | None = None,
            num_decode_draft_tokens_cpu: torch.Tensor | None = None,
            fast_build: bool = False,
        ) -> Any:
            prebuild = self.chunk_metadata_builder
            # Looked up in every step: what somebody else does to vLLM's method, and when, keeps its effect.
            build = plain.build if prebuild is None else _unpatched(plain.build)
            metadata = build(
                self,
                common_prefix_len,
                common_attn_metadata,
                num_accepted_tokens,
                num_decode_draft_tokens_cpu,
                fast_build,
            )
            if prebuild is None:
                return metadata
            metadata.non_spec_chunked_prefill_meta = None
            if metadata.num_prefills > 0:
                is_spec = None
                if metadata.num_spec_decodes > 0 and num_decode_draft_tokens_cpu is not None:
                    is_spec = num_decode_draft_tokens_cpu >= 0
                metadata.non_spec_chunked_prefill_meta = prebuild.build(
                    _bounds(common_attn_metadata.query_start_loc_cpu, common_attn_metadata.num_actual_tokens),
                    spec_sequence_masks_cpu=is_spec,
                    num_decodes=metadata.num_decodes,
                )
            return metadata

    return ChunkAddingBuilder


def _serving_chunks(plain: Any) -> Any:
    """A subclass of the builder of 0.32.0: its chunk fields are views of prebuilt chunk metadata.

    These describe the sequences that prefill, and are `non_spec_chunked_prefill_meta` of what `build`
    returns, or None in a step without prefill. That reference also keeps the memory of the views from being
    used again. With kernels of another chunk size it is, with a warning, the builder itself.
    """
    if _chunk_size() != CHUNK_SIZE:
        _logger.warning(
            "GDN metadata are off: vLLM's FLA_CHUNK_SIZE is %s, that of ours %d.", _chunk_size(), CHUNK_SIZE
        )
        return plain

    class ChunkServingBuilder(plain):
        prebuilds_for_ascend_twin = True

        def __init__(self, kv_cache_spec: Any, layer_names: Any, vllm_config: Any, device: Any) -> None:
            # vLLM's __init__ asks whether the type of self is exactly its own; if not, it refuses a backend
            # and does not share metadata among cache groups. What is added here is no reason for either.
            own_class, self.__class__ = type(self), plain
            try:
                plain.__init__(self, kv_cache_spec, layer_names, vllm_config, device)
            finally:
                self.__class__ = own_class
            self.chunk_metadata_builder = None
            if self.gdn_prefill_backend in _SERVED_BACKENDS:
                self.chunk_metadata_builder = _open_builder(
                    vllm_config, device, layer_names, int64_offsets=True
                )
            self._prebuilt: ChunkMetadata | None = None

        def build(self, *args: Any, **kwargs: Any) -> Any:
            self._prebuilt = None
            metadata = super().build(*args, **kwargs)
            if self.chunk_metadata_builder is not None:
                metadata.non_spec_chunked_prefill_meta, self._prebuilt = self._prebuilt, None
            return metadata

        def _build_chunk_metadata(
            self,
            prefill_query_start_loc: torch.Tensor,
            prefill_query_start_loc_cpu: torch.Tensor,
            device: torch.device,
        ) -> tuple[torch.Tensor, torch.Tensor | None]:
            if self.chunk_metadata_builder is None:
                return super()._build_chunk_metadata(
                    prefill_query_start_loc, prefill_query_start_loc_cpu, device
                )
            self._prebuilt = prebuilt = self.chunk_metadata_builder.build(prefill_query_start_loc_cpu)
            return prebuilt.chunk_indices_chunk64, prebuilt.chunk_offsets_int64

        def update_block_table(self, metadata: Any, *args: Any, **kwargs: Any) -> Any:
            """vLLM's, which copies declared fields alone: the chunk metadata go along."""
            updated = super().update_block_table(metadata, *args, **kwargs)
            if hasattr(metadata, "non_spec_chunked_prefill_meta"):
                updated.non_spec_chunked_prefill_meta = metadata.non_spec_chunked_prefill_meta
            return updated

    return ChunkServingBuilder


def _unpatched(build: Any) -> Any:
    """`build` without vllm-ascend's patch, which would make the chunk metadata once more.

    Source: vllm_ascend/patch/worker/patch_gdn_attn.py, 0.18.0, keeps what it replaces.
    """
    return getattr(build, "__globals__", {}).get("_ORIGINAL_BUILD", build)


def _open_builder(
    vllm_config: Any, device: torch.device, layer_names: Sequence[str], *, int64_offsets: bool = False
) -> ChunkMetadataBuilder | RecordedBuilder | None:
    """A builder for the steps of this rank.

    None, so that vLLM's builder is left as it is, when the settings say so, and with a warning for a model or
    device that it cannot be made for.
    """
    if not read_settings(vllm_config.additional_config).gdn_metadata:
        return None
    scheduler = vllm_config.scheduler_config
    num_value_heads = getattr(vllm_config.model_config.hf_text_config, "linear_num_value_heads", None)
    if num_value_heads is None:
        _logger.warning("GDN metadata are not prebuilt: the model does not tell linear_num_value_heads.")
        return None
    try:
        opened = open_device(str(device))
    except (InvalidArgumentError, UnavailableError) as error:
        _logger.warning("GDN metadata are not prebuilt: %s.", error)
        return None
    # vllm-ascend adds one row to some batches, and in a captured batch rows are added up to its size.
    captured = vllm_config.compilation_config.max_cudagraph_capture_size or 0
    num_value_heads //= vllm_config.parallel_config.tensor_parallel_size
    builder = ChunkMetadataBuilder(
        opened,
        scheduler.max_num_batched_tokens,
        max(scheduler.max_num_seqs + 1, captured),
        num_value_heads,
        RING_DEPTH,
        int64_offsets=int64_offsets,
    )
    return record_builds(builder, layer_names, num_value_heads)


def _bounds(query_start_loc: torch.Tensor, num_tokens: int) -> torch.Tensor:
    """The bounds, with rows empty that end past the tokens of the step or before they start.

    In 0.17.0, rows that pad a dummy batch hold what an earlier step left there. The op sees the first
    `num_tokens` tokens alone, so that no sequence ends past them.

    Source: vllm/v1/worker/gpu_model_runner.py, _dummy_run; 0.32.0 writes all bounds.
    """
    bounds = query_start_loc.numpy()
    return torch.from_numpy(np.maximum.accumulate(np.where(bounds > num_tokens, 0, bounds)))
