# pyright: reportMissingImports=false
"""Recordings of GDN layers in a running vLLM: calls of their prefill kernel, whoever's it is, and builds of
their chunk metadata.

Nothing of it runs unless the environment asks for recordings or checks: `fixtures/record.py` says how.
"""

import inspect
import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch

from ...fixtures.record import Recorder, Source, metadata_tensors, process_recorder
from ...fixtures.store import Fixture
from ..gdn.metadata import ChunkMetadata, ChunkMetadataBuilder
from ..gdn.recording import record_call
from .gdn_core import METADATA_FIELD, StateLayout, convert_states, gather_states, metadata_fit

_logger = logging.getLogger(f"vllm.{__name__}")

_DEVICE_EPS = 1e-6
"""Of vLLM's kernels for GPUs, which have no such argument."""


def open_recorder() -> Recorder | None:
    """The recorder of this process, with the reference to check by; None when nothing is asked for.

    Raises:
        InvalidArgumentError: for variables of the environment that are wrong.
    """
    recorder = process_recorder()
    if recorder is not None:
        recorder.check = _differences
        recorder.announce(_logger)
    return recorder


def _differences(fixture: Fixture) -> str:
    from ...equivalence_tests.online_check import differences  # what judges is loaded by who is to be judged

    return differences(fixture)


def call_recorder(layer: str) -> "CallRecorder | None":
    """What records the calls of the prefill kernel of a layer, or None; called when vLLM makes the layer."""
    recorder = open_recorder()
    return None if recorder is None else CallRecorder(recorder.source("gdn", layer, rank_name()))


def record_builds(
    builder: ChunkMetadataBuilder, layers: Sequence[str], num_value_heads: int
) -> "ChunkMetadataBuilder | RecordedBuilder":
    """A builder whose builds are recorded where that is asked for; else the builder itself.

    Args:
        builder: builds the metadata.
        layers: that these are for; the first names the recordings.
        num_value_heads: that it was made for.
    """
    recorder = open_recorder()
    if recorder is None:
        return builder
    return RecordedBuilder(builder, recorder.source("metadata", layers[0], rank_name()), num_value_heads)


def rank_name() -> str:
    """The rank of this process among those of vLLM, as "rank0"; with data parallelism "dp1.rank3"."""
    from vllm.config import get_current_vllm_config_or_none

    is_apart = torch.distributed.is_available() and torch.distributed.is_initialized()
    rank = f"rank{torch.distributed.get_rank() if is_apart else 0}"
    config = get_current_vllm_config_or_none()
    if config is None or config.parallel_config.data_parallel_size == 1:
        return rank
    return f"dp{config.parallel_config.data_parallel_rank}.{rank}"


class CallRecorder:
    """Records the calls of one layer's prefill kernel.

    What is recorded is what vLLM hands over and what it gets: states are read from where vLLM keeps them, in
    the layout that it gives them, and not from what a core of ours makes of that.

    Args:
        source: counts, and decides.
    """

    def __init__(self, source: Source) -> None:
        self.source = source

    def run_on_pool(
        self, run: Callable[[], Any], given: dict[str, Any], implementation: str, of_layer: Any
    ) -> Any:
        """Run the kernel that vLLM has for CPUs, or what stands for it; its states are in the pool.

        Args:
            run: runs it.
            given: its arguments by name.
            implementation: what computes.
            of_layer: vLLM's metadata of the step, for this layer.

        Returns:
            What it returns.
        """
        pool, slots = given["initial_state"], given["initial_state_indices"]
        q, v, cu_seqlens = given["query"], given["value"], given["cu_seqlens"]

        def states() -> torch.Tensor:
            return gather_states(pool, slots, StateLayout.KEY_FIRST)

        return record_call(
            self.source,
            run,
            lambda: {
                **{"q": q, "k": given["key"], "v": v, "g": given["g"], "beta": given["beta"]},
                **{"initial_state": states(), "cu_seqlens": cu_seqlens},
                **tables(of_layer, q, cu_seqlens, v.shape[2]),
            },
            lambda result: {"seen.o": result[0], "seen.final_state": states()},
            _config(given["use_qk_l2norm_in_kernel"], given["eps"], implementation),
        )

    def watch(self, kernel: Any, step_metadata: Callable[[], Any]) -> None:
        """Record every call of the module that vLLM's layer keeps as its kernel for GPUs.

        Args:
            kernel: that module, vLLM's or ours.
            step_metadata: vLLM's metadata of the step for this layer; None while it warms up.
        """
        run, names = kernel.forward, inspect.signature(getattr(kernel, "forward_native", kernel.forward))

        def forward(*args: Any, **kwargs: Any) -> Any:
            of_layer = step_metadata()
            if of_layer is None:
                return run(*args, **kwargs)
            given = names.bind(*args, **kwargs).arguments
            q, v, cu_seqlens = given["q"], given["v"], given["cu_seqlens"]
            return record_call(
                self.source,
                lambda: run(*args, **kwargs),
                lambda: {
                    **{name: given[name] for name in ("q", "k", "v", "g", "beta", "cu_seqlens")},
                    "initial_state": _key_first(given["initial_state"]),
                    **tables(of_layer, q, cu_seqlens, v.shape[2]),
                },
                lambda result: {"seen.o": result[0], "seen.final_state": _key_first(result[1])},
                _config(given.get("use_qk_l2norm_in_kernel", True), _DEVICE_EPS, _name(kernel)),
            )

        kernel.forward = forward


class RecordedBuilder:
    """A builder of chunk metadata whose builds are recorded.

    Args:
        builder: builds them.
        source: counts, and decides.
        num_value_heads: that the builder was made for.
    """

    def __init__(self, builder: ChunkMetadataBuilder, source: Source, num_value_heads: int) -> None:
        self.builder = builder
        self.source = source
        self.num_value_heads = num_value_heads
        self.ring = builder.ring
        self.block_sizes = builder.block_sizes

    def build(
        self,
        query_start_loc_cpu: torch.Tensor,
        *,
        spec_sequence_masks_cpu: torch.Tensor | None = None,
        num_decodes: int = 0,
    ) -> ChunkMetadata:
        """As `ChunkMetadataBuilder.build`."""
        recording = self.source.start()
        metadata = self.builder.build(
            query_start_loc_cpu, spec_sequence_masks_cpu=spec_sequence_masks_cpu, num_decodes=num_decodes
        )
        if recording is not None:
            with recording:
                recording.add(
                    lambda: {
                        "cu_seqlens": query_start_loc_cpu,
                        "spec_sequence_masks": spec_sequence_masks_cpu,
                        **metadata_tensors(metadata),
                    }
                )
                recording.finish(
                    {
                        "num_decodes": num_decodes,
                        "num_value_heads": self.num_value_heads,
                        "block_sizes": list(self.block_sizes),
                    }
                )
        return metadata


def tables(of_layer: Any, q: torch.Tensor, cu_seqlens: torch.Tensor, HV: int) -> dict[str, torch.Tensor]:
    """The chunk metadata that a call was given, by their names in a fixture: ours, or those vLLM has made.

    Args:
        of_layer: vLLM's metadata of the step.
        q: `[1, T, H, K]`.
        cu_seqlens: `[N + 1]`.
        HV: value heads.
    """
    prebuilt = getattr(of_layer, METADATA_FIELD, None)
    if metadata_fit(prebuilt, q, cu_seqlens, HV):
        return metadata_tensors(prebuilt)
    own = {
        "metadata.chunk_indices_chunk64": getattr(of_layer, "chunk_indices", None),
        "metadata.chunk_offsets_chunk64": getattr(of_layer, "chunk_offsets", None),
    }
    return {name: table for name, table in own.items() if prebuilt is None and table is not None}


def _name(kernel: Any) -> str:
    """What computes in the module that vLLM's layer keeps as its kernel for GPUs."""
    core = getattr(kernel, "core", None)
    return f"vllm {getattr(kernel, 'gdn_prefill_backend', 'kernel')}" if core is None else core.name


def _key_first(states: torch.Tensor | None) -> torch.Tensor | None:
    return None if states is None else convert_states(states, StateLayout.VALUE_FIRST).float()


def _config(use_qk_l2norm_in_kernel: bool, eps: float, implementation: str) -> dict[str, Any]:
    return {
        "scale": None,
        "eps": eps,
        "use_qk_l2norm_in_kernel": use_qk_l2norm_in_kernel,
        "output_final_state": True,
        "implementation": implementation,
    }
