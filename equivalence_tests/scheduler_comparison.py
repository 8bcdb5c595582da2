"""What a scheduler does and knows as plain data, and the first place where two of them differ."""

import enum
import functools
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

from ..reference.errors import AscendTwinError


class SchedulerDifference(AscendTwinError, AssertionError):
    """Two schedulers did different things; the message names the event, the path and both values."""


SCALARS = frozenset({int, str, float, bool, bytes, type(None)})

# Fields of vLLM's classes that ours leave out, with the value that they must have for that to be right: they
# carry what no request of a scenario asks for (embeddings as prompts, pooling, log-probabilities, tracing) or
# belong to parts that are switched off (other connectors, data parallel waves, metrics of the workers).
LEFT_OUT: dict[str, dict[str, Any]] = {
    "NewRequestData": {"pooling_params": None, "prompt_embeds": None, "prefill_token_ids": None},
    "CachedRequestData": {"new_token_ids": []},  # pipeline parallelism alone
    "SchedulerOutput": {"ec_connector_metadata": None},
    "EngineCoreOutput": {
        "new_logprobs": None,
        "new_prompt_logprobs_tensors": None,
        "pooling_output": None,
        "trace_headers": None,
        "routed_experts": None,
        "num_nans_in_logits": 0,
    },
    "EngineCoreOutputs": {
        "engine_index": 0,
        "utility_output": None,
        "wave_complete": None,
        "start_wave": None,
    },
    "SchedulerStats": {
        "step_counter": 0,
        "current_wave": 0,
        "kv_cache_eviction_events": [],
        "kv_connector_stats": None,
        "waiting_lora_adapters": {},
        "running_lora_adapters": {},
        "cudagraph_stats": None,
        "perf_stats": None,
        "ascend_twin_balance": None,  # added by the plugin, once it has been registered in this process
    },
    "Request": {
        "pooling_params": None,
        "prompt_embeds": None,
        "_prompt_embeds_per_block_hashes": {},
        "trace_headers": None,
        "num_nans_in_logits": 0,
    },
}
# Fields whose value says nothing of its own: the time when an output was made, the hash function, what other
# fields hold too, and the max_tokens of a session's further input, which upstream never reads.
NOT_COMPARED: dict[str, frozenset[str]] = {
    "EngineCoreOutputs": frozenset({"timestamp"}),
    "Request": frozenset({"_output_token_ids", "_all_token_ids", "_block_hasher"}),
    "StreamingUpdate": frozenset({"max_tokens"}),
}
# Classes of which ours has only what a scheduler reads: name to what is compared.
SUMMARIES: dict[str, Callable[[Any], Any]] = {
    "SamplingParams": lambda x: {
        "max_tokens": x.max_tokens,
        "min_tokens": x.min_tokens,
        "eos_token_id": x.eos_token_id,
        "stop_token_ids": list(x.stop_token_ids),
        "skip_reading_prefix_cache": x.skip_reading_prefix_cache,
    },
    "LoRARequest": lambda x: [x.lora_name, x.lora_int_id],
    "MultiModalFeatureSpec": lambda x: [x.identifier, plain(x.mm_position)],
    "PlaceholderRange": lambda x: [
        x.offset,
        x.length,
        None if x.is_embed is None else [bool(b) for b in x.is_embed],
    ],
    "StructuredOutputRequest": lambda x: None if x.grammar is None else plain(vars(x.grammar)),
}


def plain(value: Any) -> Any:
    """`value`, of our classes or vLLM's, as dicts, lists and scalars that compare equal when it is the same.

    Sets are sorted; a dict becomes a list of pairs, for its order counts. Lists of ints are not copied.

    Raises:
        SchedulerDifference: for a field of vLLM that ours leaves out, and that is not empty.
    """
    return _converter(type(value))(value)


@functools.cache
def _converter(kind: type) -> Callable[[Any], Any]:
    if kind in SCALARS:
        return _same
    if kind.__name__ in SUMMARIES:
        return SUMMARIES[kind.__name__]
    if issubclass(kind, enum.Enum):
        return int
    if issubclass(kind, set | frozenset):
        return sorted
    if issubclass(kind, dict):
        return _plain_pairs
    if kind.__name__ == "ConstantList":  # vLLM's read-only view of a list
        return lambda view: plain(view._x)
    if issubclass(kind, list | tuple | deque):
        return _plain_list
    names = (
        tuple(f.name for f in fields(kind))
        if is_dataclass(kind)
        else getattr(kind, "__struct_fields__", None)
    )
    return functools.partial(plain_fields, kind.__name__, names)


def _same(value: Any) -> Any:
    return value


def _plain_list(value: Sequence[Any]) -> list[Any]:
    if type(value) is list and value and type(value[0]) is int:
        return value  # token and block ids: long, and nothing to convert
    return [plain(x) for x in value]


def _plain_pairs(value: dict[Any, Any]) -> list[Any]:
    return [[key, plain(x)] for key, x in value.items()]


def plain_fields(class_name: str, names: Sequence[str] | None, value: Any) -> dict[str, Any]:
    """The fields of an object, `names` of them or all, without those that only vLLM has."""
    left_out = LEFT_OUT.get(class_name, {})
    not_compared = NOT_COMPARED.get(class_name, frozenset())
    data = {}
    for name in vars(value) if names is None else names:
        x = getattr(value, name)
        if name in left_out:
            if x != left_out[name]:
                raise SchedulerDifference(f"{class_name}.{name} is {x!r}, and ours has no such field")
        elif name not in not_compared:
            data[name] = plain(x)
    return data


def first_difference(ours: Any, theirs: Any, path: str = "") -> str | None:
    """`PATH: A, and B` for the first place where two plain values differ, or None."""
    if ours == theirs:
        return None
    if isinstance(ours, dict) and isinstance(theirs, dict):
        for name in {**ours, **theirs}:
            if name not in ours or name not in theirs:
                return f"{path}.{name}: {'only' if name in ours else 'not'} in the first"
            if found := first_difference(ours[name], theirs[name], f"{path}.{name}"):
                return found
    if isinstance(ours, list) and isinstance(theirs, list) and len(ours) == len(theirs):
        for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
            if found := first_difference(a, b, f"{path}[{i}]"):
                return found
    return f"{path}: {ours!r}, and {theirs!r}"
