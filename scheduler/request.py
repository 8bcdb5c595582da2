"""A request as a scheduler sees it: its tokens, how far it has come, and its place among the others."""

import enum
import math
import reprlib
from array import array
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from ..reference.errors import invalid_argument
from .checks import check_bool, check_int, check_text, check_tuple, check_type
from .output import EngineCoreEvent, EngineCoreEventType, FinishReason


class RequestStatus(enum.IntEnum):
    """Where a request is in its life. Source: vllm/v1/request.py, v0.17.0 (names and order)."""

    WAITING = 1
    WAITING_FOR_FSM = 2
    WAITING_FOR_REMOTE_KVS = 3
    WAITING_FOR_STREAMING_REQ = 4
    RUNNING = 5
    PREEMPTED = 6
    FINISHED_STOPPED = 7
    FINISHED_LENGTH_CAPPED = 8
    FINISHED_ABORTED = 9
    FINISHED_IGNORED = 10
    FINISHED_ERROR = 11
    FINISHED_REPETITION = 12


FINISH_REASONS = {
    RequestStatus.WAITING_FOR_STREAMING_REQ: FinishReason.STOP,
    RequestStatus.FINISHED_STOPPED: FinishReason.STOP,
    RequestStatus.FINISHED_LENGTH_CAPPED: FinishReason.LENGTH,
    RequestStatus.FINISHED_ABORTED: FinishReason.ABORT,
    RequestStatus.FINISHED_IGNORED: FinishReason.LENGTH,
    RequestStatus.FINISHED_ERROR: FinishReason.ERROR,
    RequestStatus.FINISHED_REPETITION: FinishReason.REPETITION,
}


@dataclass(frozen=True)
class SamplingParams:
    """What of a request's sampling parameters the scheduler reads.

    Attributes:
        max_tokens: output tokens, at most, >= 1.
        min_tokens: output tokens before anything but the scheduler itself may end the request.
        eos_token_id: ends the request; None is never.
        stop_token_ids: end the request too, and are its stop_reason.
        skip_reading_prefix_cache: never start from cached blocks.

    Raises:
        InvalidArgumentError: for a field that is not as above, or min_tokens above max_tokens.
    """

    max_tokens: int
    min_tokens: int = 0
    eos_token_id: int | None = None
    stop_token_ids: tuple[int, ...] = ()
    skip_reading_prefix_cache: bool = False

    def __post_init__(self) -> None:
        check_int("max_tokens", self.max_tokens, 1)
        check_int("min_tokens", self.min_tokens, 0, self.max_tokens)
        if self.eos_token_id is not None:
            check_int("eos_token_id", self.eos_token_id, 0)
        check_tuple("stop_token_ids", self.stop_token_ids, int)
        check_bool("skip_reading_prefix_cache", self.skip_reading_prefix_cache)


@dataclass(frozen=True)
class LoRARequest:
    """An adapter: equal names (not "") share cached blocks, ids (>= 1) count against max_loras."""

    lora_name: str
    lora_int_id: int

    def __post_init__(self) -> None:
        check_text("lora_name", self.lora_name)
        check_int("lora_int_id", self.lora_int_id, 1)


@dataclass(frozen=True)
class PlaceholderRange:
    """The prompt tokens that stand for an image: `length` >= 1 of them from `offset` >= 0.

    `is_embed` says of each whether it takes an embedding of the encoder; None is all of them.
    """

    offset: int
    length: int
    is_embed: tuple[bool, ...] | None = None

    def __post_init__(self) -> None:
        check_int("offset", self.offset, 0)
        check_int("length", self.length, 1)
        if self.is_embed is not None and (
            not isinstance(self.is_embed, tuple) or len(self.is_embed) != self.length
        ):
            invalid_argument("is_embed", reprlib.repr(self.is_embed), f"a tuple of {self.length}, or None")

    def get_num_embeds(self) -> int:
        return self.length if self.is_embed is None else sum(self.is_embed)

    def get_num_embeds_in_range(self, start: int, end: int) -> int:
        """Embeddings among the placeholders start (inclusive) to end (exclusive), counted from `offset`.

        An empty range at the very front counts all of a masked image, as in vLLM, which reads the entry
        before the end of a cumulative sum.
        """
        return end - start if self.is_embed is None else sum(self.is_embed[start : end or self.length])


@dataclass(frozen=True)
class MultiModalFeatureSpec:
    """One image (or other encoder input): equal identifiers share encoder outputs and cached blocks."""

    identifier: str
    mm_position: PlaceholderRange

    def __post_init__(self) -> None:
        check_text("identifier", self.identifier)
        check_type("mm_position", self.mm_position, PlaceholderRange)


class Grammar(Protocol):
    """A compiled grammar of one request."""

    def accept_tokens(self, request_id: str, token_ids: list[int]) -> bool:
        """Advance by tokens that were sampled; False when they break the grammar."""
        ...

    def validate_tokens(self, token_ids: list[int]) -> list[int]:
        """The longest prefix that the grammar allows; does not advance."""
        ...


@dataclass
class StructuredOutputRequest:
    """The structured output of a request; `grammar` is None until it has been compiled."""

    grammar: Grammar | None = None


@dataclass(frozen=True)
class StreamingUpdate:
    """The next input chunk of a session."""

    prompt_token_ids: tuple[int, ...]
    mm_features: tuple[MultiModalFeatureSpec, ...]
    sampling_params: SamplingParams
    arrival_time: float


class Request:
    """One request, from its arrival to its last token.

    Args:
        request_id: unique among the unfinished.
        prompt_token_ids: at least one.
        sampling_params: when it ends.
        arrival_time: s, of any clock; orders requests of one priority.
        priority: the smaller, the earlier (policy "priority").
        client_index: who gets its outputs.
        mm_features: images, in order of their offsets.
        lora_request: its adapter, or None.
        cache_salt: blocks are shared only between equal salts; None is no salt.
        structured_output_request: given, the request waits until its grammar is there.
        resumable: a session; further requests of the same id add input, one that is not resumable ends it.
        kv_transfer_params: passed on to the connector.

    Raises:
        InvalidArgumentError: for an argument that is not as above, or images outside of the prompt.

    Source: vllm/v1/request.py, v0.17.0.
    """

    def __init__(
        self,
        request_id: str,
        prompt_token_ids: Sequence[int],
        sampling_params: SamplingParams,
        *,
        arrival_time: float = 0.0,
        priority: int = 0,
        client_index: int = 0,
        mm_features: Sequence[MultiModalFeatureSpec] = (),
        lora_request: LoRARequest | None = None,
        cache_salt: str | None = None,
        structured_output_request: StructuredOutputRequest | None = None,
        resumable: bool = False,
        kv_transfer_params: dict[str, Any] | None = None,
    ) -> None:
        check_text("request_id", request_id)
        check_type("sampling_params", sampling_params, SamplingParams)
        check_int("priority", priority)
        check_int("client_index", client_index, 0)
        if type(arrival_time) not in (int, float) or not math.isfinite(arrival_time):
            invalid_argument("arrival_time", reprlib.repr(arrival_time), "a finite number, s")
        check_bool("resumable", resumable)
        for name, value, kind in (
            ("lora_request", lora_request, LoRARequest),
            ("cache_salt", cache_salt, str),
            ("structured_output_request", structured_output_request, StructuredOutputRequest),
        ):
            if value is not None:
                check_type(name, value, kind)
        self.request_id = request_id
        self.prompt_token_ids = _token_ids(prompt_token_ids)
        _check_images(mm_features, len(self.prompt_token_ids))
        self.sampling_params = sampling_params
        # A session keeps these two of its first input.
        self.max_tokens = sampling_params.max_tokens
        self.skip_reading_prefix_cache = sampling_params.skip_reading_prefix_cache
        self.arrival_time = arrival_time
        self.priority = priority
        self.client_index = client_index
        self.mm_features = list(mm_features)
        self.lora_request = lora_request
        self.cache_salt = cache_salt
        self.structured_output_request = structured_output_request
        self.resumable = resumable
        self.kv_transfer_params = kv_transfer_params

        self.status = RequestStatus.WAITING
        if structured_output_request is not None:
            self.status = RequestStatus.WAITING_FOR_FSM
        self.stop_reason: int | None = None
        self.events: list[EngineCoreEvent] = []

        self.num_prompt_tokens = len(self.prompt_token_ids)
        self.all_token_ids = list(self.prompt_token_ids)
        self.output_token_ids: list[int] = []
        self.spec_token_ids: list[int] = []
        self.block_hashes: list[bytes] = []

        self.num_computed_tokens = 0
        self.num_cached_tokens = -1  # those of its first prefix hit; -1 before it was scheduled
        self.num_external_computed_tokens = 0
        self.num_preemptions = 0
        self.is_prefill_chunk = False
        self.num_output_placeholders = 0  # async scheduling: tokens that are scheduled but not sampled yet
        self.discard_latest_async_tokens = False
        self.streaming_queue: deque[StreamingUpdate | None] | None = deque() if resumable else None

    @property
    def num_tokens(self) -> int:
        return len(self.all_token_ids)

    @property
    def num_tokens_with_spec(self) -> int:
        return len(self.all_token_ids) + len(self.spec_token_ids)

    @property
    def num_output_tokens(self) -> int:
        return len(self.output_token_ids)

    @property
    def use_structured_output(self) -> bool:
        return self.structured_output_request is not None

    @property
    def is_finished(self) -> bool:
        return self.status > RequestStatus.PREEMPTED

    def __lt__(self, other: "Request") -> bool:
        """Whether it comes before another one under policy "priority"."""
        return (self.priority, self.arrival_time, self.request_id) < (
            other.priority,
            other.arrival_time,
            other.request_id,
        )

    def append_output_token(self, token_id: int) -> None:
        self.output_token_ids.append(token_id)
        self.all_token_ids.append(token_id)

    def record_event(self, event_type: EngineCoreEventType, timestamp: float) -> None:
        self.events.append(EngineCoreEvent(event_type, timestamp))

    def take_events(self) -> list[EngineCoreEvent] | None:
        """Events since the last call, or None."""
        events, self.events = self.events, []
        return events or None


def _token_ids(token_ids: Sequence[int]) -> list[int]:
    try:
        return array("q", token_ids).tolist()
    except (TypeError, ValueError, OverflowError):
        invalid_argument("prompt_token_ids", reprlib.repr(token_ids), "ints of 64 bits")


def _check_images(mm_features: Sequence[MultiModalFeatureSpec], num_tokens: int) -> None:
    end = 0
    for i, feature in enumerate(mm_features):
        check_type(f"mm_features[{i}]", feature, MultiModalFeatureSpec)
        position = feature.mm_position
        check_int(f"mm_features[{i}].mm_position.offset", position.offset, end, num_tokens - position.length)
        end = position.offset + position.length


def check_stop(request: Request, max_model_len: int) -> bool:
    """Whether the newest output token ends the request; sets its status and stop_reason.

    Source: vllm/v1/core/sched/utils.py, v0.17.0.
    """
    params = request.sampling_params
    if request.num_output_tokens < params.min_tokens:
        return False
    token_id = request.output_token_ids[-1]
    if token_id == params.eos_token_id:
        request.status = RequestStatus.FINISHED_STOPPED
    elif token_id in params.stop_token_ids:
        request.status = RequestStatus.FINISHED_STOPPED
        request.stop_reason = token_id
    elif request.num_tokens >= max_model_len or request.num_output_tokens >= request.max_tokens:
        request.status = RequestStatus.FINISHED_LENGTH_CAPPED
    else:
        return False
    return True
