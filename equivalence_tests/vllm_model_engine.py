# pyright: reportMissingImports=false
"""A tiny Qwen3-Next in vLLM's engine, in this process: what it answers, and how far two answers are apart.

Answers are judged by log probabilities of given tokens. Greedy tokens alone are no criterion: one near-tie
that falls the other way changes all that follows.
"""

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch

from ..optimized.vllm.gdn_core import PrefillCore
from . import tiny_qwen3_next
from .tolerances import REFERENCE_FACTOR

STEP_TOKENS = 96
"""Tokens a step: most prompts are longer, so that their prefill stops in mid chunk and resumes."""

PROMPT_LENGTHS = (5, 64, 65, 130, 200, 1, 97, 33, 150, 128)
NUM_FORCED, NUM_GREEDY = 16, 12

_ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_PLUGINS": "",
}


@dataclass(frozen=True)
class Answers:
    """What an engine answered, prompts in the order of `prompts()`.

    Attributes:
        prefill: log probability of each prompt token but the first, given those before it.
        decode: `[prompts, NUM_FORCED]`, that of a token which the request must repeat, whatever the model
            would say: all engines decode the same tokens.
        greedy: tokens that the model chose, a list for each prompt.
        margins: beside these, by how much the log probability of the best exceeds that of the second.
    """

    prefill: torch.Tensor
    decode: torch.Tensor
    greedy: list[list[int]]
    margins: list[list[float]]


class Distance(NamedTuple):
    """How far answers are from others, or how far they may be.

    Attributes:
        prefill: mean |difference| of log probabilities.
        decode: the same, of decoded tokens.
        margin: the largest margin of the others where a greedy token first differs.
    """

    prefill: float
    decode: float
    margin: float

    def within(self, limit: "Distance") -> bool:
        """Whether none exceeds its limit; NaN does."""
        return all(a <= b for a, b in zip(self, limit, strict=True))


@dataclass(frozen=True)
class Seen:
    """One call of a prefill core.

    Attributes:
        core: its name.
        num_sequences: of the prefill part of the step.
        num_resumed: those that brought a state along.
        is_mixed: whether other requests decoded in the same step.
    """

    core: str
    num_sequences: int
    num_resumed: int
    is_mixed: bool


def serve(folder: Path, **options: Any) -> Any:
    """vLLM's `LLM` over a checkpoint written there.

    Args:
        folder: where the checkpoint is written.
        options: of `LLM`, beside those here or in their place.
    """
    tiny_qwen3_next.write_checkpoint(folder)
    torch.set_num_threads(1)  # threads that wait for a busy core made one answer take half a minute
    keeping = mock.patch.object(torch, "set_num_threads", torch.set_num_threads)  # vLLM replaces it for good
    with mock.patch.dict(os.environ, _ENVIRONMENT), keeping:
        from vllm import LLM

        return LLM(
            **{
                "model": str(folder),
                "skip_tokenizer_init": True,
                "enforce_eager": True,
                "max_model_len": 512,
                "max_num_batched_tokens": STEP_TOKENS,
                "max_num_seqs": 8,
                "enable_prefix_caching": False,
                "disable_log_stats": True,
                **options,
            }
        )


def gdn_option(core: str | None) -> dict[str, Any]:
    """The option of `LLM` that names a prefill core; without one, other settings of the plugin alone."""
    return {"additional_config": {"ascend_twin": {"gdn": {} if core is None else {"core": core}}}}


def gdn_layers(llm: Any) -> list[Any]:
    """The GDN layers of the model that an engine in this process runs."""
    model = llm.llm_engine.model_executor.driver_worker.worker.model_runner.model
    return [layer for layer in model.modules() if hasattr(layer, "rearrange_mixed_qkv")]


def stop(llm: Any) -> None:
    """End an engine, and the process group that vLLM opened for it."""
    from vllm.distributed import cleanup_dist_env_and_memory

    llm.llm_engine.engine_core.shutdown()
    cleanup_dist_env_and_memory()


@contextlib.contextmanager
def cores(llm: Any, make: Callable[[], PrefillCore | None]) -> Iterator[list[Any]]:
    """Give every GDN layer a prefill core of its own, and back its former one. Yields the layers."""
    layers = gdn_layers(llm)
    former = [layer.prefill_core for layer in layers]
    try:
        for layer in layers:
            layer.prefill_core = make()
        yield layers
    finally:
        for layer, core in zip(layers, former, strict=True):
            layer.prefill_core = core


@contextlib.contextmanager
def watched() -> Iterator[list[Seen]]:
    """A list to which every call of a prefill core is added."""
    from vllm.forward_context import get_forward_context

    seen: list[Seen] = []
    call = PrefillCore.__call__

    def noting(core: PrefillCore, *args: Any, **kwargs: Any) -> Any:
        metadata = next(iter(get_forward_context().attn_metadata.values()))
        states = kwargs["initial_state"]
        num_resumed = int(states.flatten(1).any(dim=1).sum())
        num_decodes = getattr(metadata, "num_decodes", 0) or getattr(metadata, "num_decode_tokens", 0)
        seen.append(Seen(core.name, len(states), num_resumed, num_decodes > 0))
        return call(core, *args, **kwargs)

    with mock.patch.object(PrefillCore, "__call__", noting):
        yield seen


def prompts() -> list[list[int]]:
    """Token ids of each prompt; seeded."""
    generator = torch.Generator().manual_seed(1)
    most = tiny_qwen3_next.CONFIG["vocab_size"] - 2
    return [torch.randint(1, most, (n,), generator=generator).tolist() for n in PROMPT_LENGTHS]


def ask(llm: Any, *, reverse: bool = False) -> Answers:
    """Ask all prompts at once, twice: with the tokens to decode given, and greedily.

    Args:
        llm: an engine.
        reverse: ask the last prompt first: the batches are others. Default: False.
    """
    from vllm import SamplingParams

    common = {"temperature": 0.0, "detokenize": False, "ignore_eos": True}
    tokens = prompts()
    order = list(range(len(tokens)))[:: -1 if reverse else 1]
    forced = [
        SamplingParams(
            max_tokens=NUM_FORCED, prompt_logprobs=0, logprobs=0, allowed_token_ids=[3 + i], **common
        )
        for i in order
    ]
    greedy = [SamplingParams(max_tokens=NUM_GREEDY, logprobs=2, **common)] * len(order)
    asked = [{"prompt_token_ids": tokens[i]} for i in order] * 2
    outputs = llm.generate(asked, forced + greedy, use_tqdm=False)
    of_forced = [outputs[order.index(i)] for i in range(len(order))]
    of_greedy = [outputs[len(order) + order.index(i)] for i in range(len(order))]
    return Answers(
        prefill=torch.cat([_given(o.prompt_logprobs[1:], o.prompt_token_ids[1:]) for o in of_forced]),
        decode=torch.stack([_given(o.outputs[0].logprobs, o.outputs[0].token_ids) for o in of_forced]),
        greedy=[list(o.outputs[0].token_ids) for o in of_greedy],
        margins=[[_margin(choices) for choices in o.outputs[0].logprobs] for o in of_greedy],
    )


def ask_long(llm: Any) -> list[Any]:
    """vLLM's outputs, greedy, for prompts of which most fill a block of its cache for states."""
    from vllm import SamplingParams

    block = llm.llm_engine.vllm_config.cache_config.mamba_block_size
    asked = [{"prompt_token_ids": (tokens * 4)[: block + 16]} for tokens in prompts() if len(tokens) > 64]
    params = SamplingParams(max_tokens=NUM_GREEDY, temperature=0.0, detokenize=False, ignore_eos=True)
    return llm.generate(asked, params, use_tqdm=False)


def _given(choices: Sequence[Any], tokens: Sequence[int]) -> torch.Tensor:
    """The log probability of each given token `[len(tokens)]`."""
    return torch.tensor([of[token].logprob for of, token in zip(choices, tokens, strict=True)])


def _margin(choices: Any) -> float:
    best, second = sorted((choice.logprob for choice in choices.values()), reverse=True)[:2]
    return best - second


def distance(answers: Answers, truth: Answers) -> Distance:
    """How far answers are from the truth."""
    margins = [
        margin
        for ours, theirs, at in zip(answers.greedy, truth.greedy, truth.margins, strict=True)
        for margin in _first_difference(ours, theirs, at)
    ]
    return Distance(
        prefill=float((answers.prefill - truth.prefill).abs().mean()),
        decode=float((answers.decode - truth.decode).abs().mean()),
        margin=max(margins, default=0.0),
    )


def _first_difference(ours: list[int], theirs: list[int], margins: list[float]) -> list[float]:
    """The margin where they first differ, if they do: what follows has another context."""
    return [m for a, b, m in zip(ours, theirs, margins, strict=True) if a != b][:1]


def limit(*measured: tuple[Answers, Answers]) -> Distance:
    """How far a right answer may be, from pairs of right ones: `REFERENCE_FACTOR` times as far as these.

    A greedy token may differ where the two best are so close that both moving so far can swap them.

    Args:
        measured: pairs that only rounding tells apart.
    """
    single = [
        float((a - b).abs().max())
        for one, other in measured
        for a, b in ((one.prefill, other.prefill), (one.decode, other.decode))
    ]
    return Distance(
        prefill=REFERENCE_FACTOR * max(distance(*pair).prefill for pair in measured),
        decode=REFERENCE_FACTOR * max(distance(*pair).decode for pair in measured),
        margin=2 * REFERENCE_FACTOR * max(single),
    )
