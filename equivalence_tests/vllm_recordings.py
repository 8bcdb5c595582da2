# pyright: reportMissingImports=false
"""Recordings of a tiny Qwen3-Next served by vLLM, right ones and such of deliberately wrong cores.

Run as a module with a folder, it writes those that are in `fixtures/cases/vllm`.
"""

import contextlib
import dataclasses
import importlib
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from ..fixtures.record import Recorder, RecordSettings
from ..fixtures.store import About, read_fixture, write_fixture
from ..optimized.gdn.metadata import ChunkMetadata, ChunkMetadataBuilder
from ..optimized.vllm.gdn_core import NULL_SLOT, PrefillCore
from ..optimized.vllm.record_gdn import CallRecorder
from . import installed_vllm, interpreter, tiny_qwen3_next, vllm_model_engine, vllm_model_variants
from .kernel_stages import poisoned_memory
from .online_check import differences

PROMPT_LENGTHS = (vllm_model_engine.STEP_TOKENS + 66, 20, 10)
"""The first prompt ends in the second step, after a chunk and a part of one; the others come with it."""

WRONG_HEAD = 1
RECORDED_STEP = 1
FEW_HEADS = {"linear_num_key_heads": 1, "linear_num_value_heads": 2}
SMALL = {**FEW_HEADS, "linear_key_head_dim": 16, "linear_value_head_dim": 16}
"""Sizes of a model whose recordings are small. vLLM's own kernel does not take them."""

VARIANTS = {
    "vllm": "vLLM's own kernel for CPUs",
    "right": "Nothing is wrong.",
    "transposed": "The layer takes the states in vLLM's pool for [HV, V, K], reading and writing, where the "
    "pool holds [HV, K, V]. With K = V no shape tells. What is seen is wrong from the first chunk of the "
    "sequence that resumes, and every final state is the transpose of the right one.",
    "dropped": "The layer hands zeros to the core as initial states. A prompt that fits into one step is "
    "right; one that goes on in a second step has forgotten the first.",
    "gate": f"Value head {WRONG_HEAD} decays by the gate of head {WRONG_HEAD - 1}, as with a wrong stride. "
    "All other heads are right.",
    "compact": "Chunk tables number only the sequences that have tokens, and the kernels look their bounds "
    "up among all. The sequence behind an empty one is computed with the bounds of the empty one, so that "
    "nothing of it is written. vLLM 0.32.0 makes no batch with an empty sequence in the middle: the run puts "
    "one in, as padding.",
}
"""By name, what is wrong."""


class WrongGateCore(PrefillCore):
    """The staged core, in which one head decays by its neighbour's gate."""

    def __call__(self, q: Any, k: Any, v: Any, g: torch.Tensor, *rest: Any, **given: Any) -> Any:
        g = g.clone()
        g[..., WRONG_HEAD] = g[..., WRONG_HEAD - 1]
        return super().__call__(q, k, v, g, *rest, **given)


class PoisonedCore(PrefillCore):
    """The staged core, with NaN where a kernel does not write."""

    def __call__(self, *args: Any, **given: Any) -> Any:
        with poisoned_memory():
            return super().__call__(*args, **given)


CORES = {"gate": WrongGateCore, "compact": PoisonedCore}


def ask(llm: Any, lengths: Sequence[int] = PROMPT_LENGTHS) -> list[Any]:
    """vLLM's outputs for prompts of these lengths, prefilled all at once."""
    from vllm import SamplingParams

    tokens = torch.Generator().manual_seed(2)
    most = tiny_qwen3_next.CONFIG["vocab_size"] - 2
    prompts = [torch.randint(1, most, (n,), generator=tokens).tolist() for n in lengths]
    params = SamplingParams(
        max_tokens=1, temperature=0.0, prompt_logprobs=0, detokenize=False, ignore_eos=True
    )
    return llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], params, use_tqdm=False)


def record(
    llm: Any, variant: str, folder: Path, lengths: Sequence[int] = PROMPT_LENGTHS, **settings: Any
) -> Recorder:
    """Record a call of the first GDN layer in the step in which a prompt resumes and others begin.

    Args:
        llm: an engine whose layers are ours.
        variant: a key of `VARIANTS`.
        folder: where the recording lands.
        lengths: of the prompts, in tokens.
        settings: of `RecordSettings`, beside those here or in their place.

    Returns:
        The recorder; everything is written.
    """
    steps = (RECORDED_STEP, RECORDED_STEP)
    recorder = Recorder(RecordSettings(**{"folder": folder, "steps": steps, **settings}))
    recorder.check = differences
    first = vllm_model_engine.gdn_layers(llm)[0]
    with contextlib.ExitStack() as stack:
        if variant == "vllm":
            stack.enter_context(vllm_model_engine.cores(llm, lambda: None))
        else:
            stack.enter_context(vllm_model_engine.cores(llm, lambda: PrefillCore("reference")))
            first.prefill_core = CORES.get(variant, PrefillCore)("staged")
        if variant == "transposed":
            stack.enter_context(vllm_model_variants.wrong_states("state layout transposed"))
        elif variant == "dropped":
            stack.enter_context(vllm_model_variants.wrong_states("initial state dropped"))
        elif variant == "compact":
            stack.enter_context(_compact_ranks())
        source = recorder.source("gdn", first.prefix)
        stack.enter_context(mock.patch.object(first, "call_recorder", CallRecorder(source)))
        ask(llm, lengths)
    recorder.flush()
    return recorder


@contextlib.contextmanager
def _compact_ranks() -> Iterator[None]:
    """Put an empty sequence before the last of a batch, and number in chunk tables only the others.

    Batches of one sequence stay as they are.
    """
    ops, build = importlib.import_module("vllm._custom_ops"), ChunkMetadataBuilder.build
    op = ops.chunk_gated_delta_rule_cpu

    def with_empty(bounds: torch.Tensor) -> torch.Tensor:
        return bounds if len(bounds) == 2 else torch.cat([bounds[:-1], bounds[-2:]])

    def padded(**given: Any) -> Any:
        slots = given["initial_state_indices"]
        if len(slots) > 1:
            slots = torch.cat([slots[:-1], slots.new_full((1,), NULL_SLOT), slots[-1:]])
        bounds = with_empty(given["cu_seqlens"])
        return op(**{**given, "initial_state_indices": slots, "cu_seqlens": bounds})

    def compact(
        builder: ChunkMetadataBuilder, query_start_loc_cpu: torch.Tensor, **options: Any
    ) -> ChunkMetadata:
        metadata = build(builder, with_empty(query_start_loc_cpu), **options)
        for table in (
            metadata.chunk_indices_chunk64,
            metadata.chunk_indices_large_block,
            metadata.block_indices_cumsum,
        ):
            ranks = (metadata.cu_seqlens.diff() > 0).cumsum(0, dtype=torch.int32) - 1
            table[:, 0] = ranks[table[:, 0].long()]
        return metadata

    with (
        mock.patch.object(ops, op.__name__, padded),
        mock.patch.object(ChunkMetadataBuilder, "build", compact),
    ):
        yield


@contextlib.contextmanager
def engine(**sizes: int) -> Iterator[Any]:
    """An engine in this process whose GDN layers are ours.

    Args:
        sizes: of the model, in the place of those of `tiny_qwen3_next.CONFIG`.
    """
    installed_vllm.prepare_import()
    for module in ("gdn_layer", "gdn_metadata"):
        importlib.import_module(f"..optimized.vllm.{module}", __package__).install()
    with tempfile.TemporaryDirectory() as folder, mock.patch.dict(tiny_qwen3_next.CONFIG, sizes):
        llm = vllm_model_engine.serve(Path(folder), **vllm_model_engine.gdn_option("eager"))
        try:
            yield llm
        finally:
            vllm_model_engine.stop(llm)


def write_cases(llm: Any, variants: Sequence[str], folder: Path, **options: Any) -> None:
    """Record variants, and write each to `folder/VARIANT.safetensors`; options of `record`."""
    folder.mkdir(parents=True, exist_ok=True)
    for variant in variants:
        with tempfile.TemporaryDirectory() as raw:
            record(llm, variant, Path(raw), **options)
            (path,) = Path(raw).glob("*.safetensors")
            title = f"vLLM 0.32.0, a GDN layer of a tiny Qwen3-Next: {variant}"
            case = dataclasses.replace(read_fixture(path), about=About(title, VARIANTS[variant]))
            write_fixture(folder / f"{variant}.safetensors", case)


def main(folder: Path) -> None:
    """Write the cases that are in the repository."""
    interpreter.enable()
    with engine(**SMALL) as llm:
        write_cases(llm, [variant for variant in VARIANTS if variant != "vllm"], folder)
    with engine(**FEW_HEADS) as llm:
        write_cases(llm, ["vllm"], folder, lengths=PROMPT_LENGTHS[:1])


if __name__ == "__main__":
    main(Path(sys.argv[1]))
