"""Recordings of calls of the op: of ours as it is, and of whatever else computes the same."""

import functools
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch

from ...fixtures.record import Recorder, Source, metadata_tensors
from .chunked import chunk_gated_delta_rule, default_implementation
from .stage_results import kept_stage_results

Result = TypeVar("Result")
Tensors = Mapping[str, torch.Tensor | None]


def recorded(recorder: Recorder, layer: str = "chunk_gated_delta_rule") -> Callable[..., Any]:
    """The op, with its calls recorded: `recorded(Recorder(RecordSettings(folder)), "layer 0")(q, k, ...)`.

    Args:
        recorder: decides, and writes. `recorder.flush()` waits until all is written.
        layer: name of the recordings. Default: that of the op.

    Returns:
        A function with arguments and results of `chunk_gated_delta_rule`.
    """
    source = recorder.source("gdn", layer)

    @functools.wraps(chunk_gated_delta_rule)
    def op(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, g: torch.Tensor, beta: torch.Tensor, **options: Any
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        metadata = options.get("prebuilt_meta")
        cu_seqlens = options.get("cu_seqlens")
        if cu_seqlens is None and metadata is not None:
            cu_seqlens = metadata.cu_seqlens
        return record_call(
            source,
            lambda: chunk_gated_delta_rule(q, k, v, g, beta, **options),
            lambda: {
                **{"q": q, "k": k, "v": v, "g": g, "beta": beta, "cu_seqlens": cu_seqlens},
                "initial_state": options.get("initial_state"),
                **metadata_tensors(metadata),
            },
            lambda result: {"seen.o": result[0], "seen.final_state": result[1]},
            {
                "scale": options.get("scale"),
                "eps": options.get("eps", 1e-6),
                "use_qk_l2norm_in_kernel": options.get("use_qk_l2norm_in_kernel", False),
                "output_final_state": options.get("output_final_state", False),
                "implementation": options.get("implementation") or default_implementation(q.device),
            },
        )

    return op


def record_call(
    source: Source,
    run: Callable[[], Result],
    inputs: Callable[[], Tensors],
    results: Callable[[Result], Tensors],
    config: Mapping[str, Any],
) -> Result:
    """Run something that computes the op, and record that where it is wanted.

    Args:
        source: counts the call, and decides.
        run: runs it.
        inputs: what it is given, by names of a fixture; called before.
        results: the same of what it returned; called behind it.
        config: of the fixture.

    Returns:
        What `run` returns.
    """
    recording = source.start()
    if recording is None:
        return run()
    with recording, kept_stage_results() as stages:
        recording.add(inputs)
        result = run()
        recording.add(lambda: {**results(result), **{f"stage.{name}": x for name, x in stages.items()}})
        recording.finish(config)
    return result
