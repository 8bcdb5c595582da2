"""Request mixes as plain data: what each request asks for, its tokens, and the mix of a recorded trace."""

import hashlib
import reprlib
from collections.abc import Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

from ..reference.errors import invalid_argument
from .checks import check_bool, check_int, check_text, check_tuple, read_object
from .traces import BLOCK_TOKENS, MOST_TOKENS, TraceRequest

VOCABULARY_SIZE = 64  # tokens are 0 to 63, in prompts and outputs; it must divide 256 (see segment_tokens)
EOS_TOKEN_ID = 0
IMAGE_TOKEN_ID = VOCABULARY_SIZE  # at the placeholders of images, and nowhere else


@dataclass(frozen=True)
class ImageSpec:
    """An image (or other encoder input) of a prompt; equal identifiers are the same image.

    Attributes:
        identifier: any text but "".
        offset: of its first placeholder, in tokens of the prompt (of the chunk, in a SessionChunk).
        length: placeholders, tokens, >= 1.
        is_embed: says of each placeholder whether it takes an embedding of the encoder, at least one does;
            None is all of them.
    """

    identifier: str
    offset: int
    length: int
    is_embed: tuple[bool, ...] | None = None

    def __post_init__(self) -> None:
        check_text("identifier", self.identifier)
        check_int("offset", self.offset, 0, MOST_TOKENS)
        check_int("length", self.length, 1, MOST_TOKENS)
        if self.is_embed is not None:
            check_tuple("is_embed", self.is_embed, bool)
            if len(self.is_embed) != self.length or not any(self.is_embed):
                invalid_argument(
                    "is_embed", self.is_embed, f"{self.length} bools, one at least True, or None"
                )


@dataclass(frozen=True)
class RemoteHit:
    """What a remote KV cache holds of a request.

    Attributes:
        num_tokens: of its prompt, from the first, >= 1.
        asynchronous: loaded while the request waits, instead of during the step that goes on from there.
        polls: how often the scheduler is first told "not known yet".
    """

    num_tokens: int
    asynchronous: bool = False
    polls: int = 0

    def __post_init__(self) -> None:
        check_int("num_tokens", self.num_tokens, 1, MOST_TOKENS)
        check_bool("asynchronous", self.asynchronous)
        check_int("polls", self.polls, 0)


@dataclass(frozen=True)
class SessionChunk:
    """A further input of a session: `segments`, `max_tokens` and `images` as in RequestSpec."""

    segments: tuple[tuple[int, int], ...]
    max_tokens: int
    images: tuple[ImageSpec, ...] = ()

    def __post_init__(self) -> None:
        _check_input(self.segments, self.max_tokens, self.images)


@dataclass(frozen=True)
class RequestSpec:
    """One request of a mix.

    Attributes:
        request_id: any text but "".
        arrival_ms: from the start of the mix, ms, >= 0.
        segments: (seed, length) of the pieces whose concatenation is the prompt; `segment_tokens` says which
            tokens these are. Prompts whose first segments have equal seeds share a prefix.
        max_tokens: output tokens, at most, >= 1.
        min_tokens: output tokens before a token may end the request, 0 to max_tokens; this and the next two
            hold for every input of a session.
        eos: whether EOS_TOKEN_ID ends it.
        stop_token_ids: further tokens that end it.
        priority: the smaller, the earlier (policy "priority").
        client_index: who gets its outputs, >= 0.
        draft_acceptance: chance that a draft token is right, 0 to 1.
        images: in order of their offsets, not overlapping.
        lora: id of its adapter, >= 1; None is no adapter.
        cache_salt: blocks are shared only between equal salts; None is no salt.
        skip_reading_prefix_cache: never start from cached blocks.
        chunks: further inputs of a session; () is a session of one input, None no session.
        structured: whether its output obeys a grammar.
        remote: what a remote KV cache holds of it; None is nothing.

    Raises:
        InvalidArgumentError: for the first field that is not as above.
    """

    request_id: str
    arrival_ms: int
    segments: tuple[tuple[int, int], ...]
    max_tokens: int
    min_tokens: int = 0
    eos: bool = False
    stop_token_ids: tuple[int, ...] = ()
    priority: int = 0
    client_index: int = 0
    draft_acceptance: float = 0.0
    images: tuple[ImageSpec, ...] = ()
    lora: int | None = None
    cache_salt: str | None = None
    skip_reading_prefix_cache: bool = False
    chunks: tuple[SessionChunk, ...] | None = None
    structured: bool = False
    remote: RemoteHit | None = None

    def __post_init__(self) -> None:
        check_text("request_id", self.request_id)
        check_int("arrival_ms", self.arrival_ms, 0)
        _check_input(self.segments, self.max_tokens, self.images)
        check_int("min_tokens", self.min_tokens, 0, self.max_tokens)
        check_tuple("stop_token_ids", self.stop_token_ids, int)
        for i, token in enumerate(self.stop_token_ids):
            check_int(f"stop_token_ids[{i}]", token, 0, VOCABULARY_SIZE - 1)
        check_int("priority", self.priority)
        check_int("client_index", self.client_index, 0)
        if type(self.draft_acceptance) not in (int, float) or not 0 <= self.draft_acceptance <= 1:
            invalid_argument("draft_acceptance", reprlib.repr(self.draft_acceptance), "a number from 0 to 1")
        if self.lora is not None:
            check_int("lora", self.lora, 1)
        if self.cache_salt is not None:
            check_text("cache_salt", self.cache_salt)
        if self.chunks is not None:
            check_tuple("chunks", self.chunks, SessionChunk)
        for name in ("eos", "skip_reading_prefix_cache", "structured"):
            check_bool(name, getattr(self, name))
        if self.remote is not None:
            _check_remote(self.remote, _num_tokens(self.segments))

    @property
    def num_prompt_tokens(self) -> int:
        return _num_tokens(self.segments)

    def to_json(self) -> dict[str, Any]:
        """As a JSON object, without the fields that have their default value."""
        return _to_json(self)

    @classmethod
    def from_json(cls, data: object) -> "RequestSpec":
        """The inverse of `to_json`.

        Raises:
            InvalidArgumentError: the message starts with the path of the field that does not fit.
        """
        return read_object(cls, data, "", _read_field)


@dataclass(frozen=True)
class RequestMix:
    """Requests that go to one scheduler; no two of one id."""

    requests: tuple[RequestSpec, ...]

    def __post_init__(self) -> None:
        check_tuple("requests", self.requests, RequestSpec)
        seen: set[str] = set()
        for i, request in enumerate(self.requests):
            if request.request_id in seen:
                invalid_argument(f"requests[{i}].request_id", repr(request.request_id), "an id of its own")
            seen.add(request.request_id)

    def to_json(self) -> dict[str, Any]:
        """As a JSON object, without the fields that have their default value."""
        return _to_json(self)

    @classmethod
    def from_json(cls, data: object) -> "RequestMix":
        """The inverse of `to_json`.

        Raises:
            InvalidArgumentError: the message starts with the path of the field that does not fit.
        """
        return read_object(cls, data, "", _read_field)


def segment_tokens(seed: int, length: int) -> list[int]:
    """The first `length` tokens of segment `seed`: token j depends on (seed, j) alone, and is 0 to 63."""
    return [byte % VOCABULARY_SIZE for byte in hashlib.shake_128(str(seed).encode()).digest(length)]


def prompt_token_ids(spec: RequestSpec | SessionChunk) -> list[int]:
    """The tokens of a request's prompt, or of a further input of its session: 0 to 63, and IMAGE_TOKEN_ID."""
    token_ids = [token for seed, length in spec.segments for token in segment_tokens(seed, length)]
    for image in spec.images:
        token_ids[image.offset : image.offset + image.length] = [IMAGE_TOKEN_ID] * image.length
    return token_ids


def mix_from_trace(requests: Sequence[TraceRequest]) -> RequestMix:
    """Requests of a trace as a mix: each hash id becomes a segment of 512 tokens (the last may be shorter).

    Requests whose first n hash ids are equal have equal first n * 512 tokens. Their ids are "0", "1", ... A
    request without output tokens gets one: a scheduler cannot do with less.

    Raises:
        InvalidArgumentError: for a request that has not one hash id for each 512 tokens of its prompt.
    """
    return RequestMix(tuple(_spec(i, request) for i, request in enumerate(requests)))


def _spec(index: int, request: TraceRequest) -> RequestSpec:
    num_full, rest = divmod(request.num_prompt_tokens, BLOCK_TOKENS)
    lengths = [BLOCK_TOKENS] * num_full + [rest] * (rest > 0)
    if len(request.hash_ids) != len(lengths):
        invalid_argument(
            f"requests[{index}].hash_ids",
            reprlib.repr(request.hash_ids),
            f"{len(lengths)} ids, one for each {BLOCK_TOKENS} of {request.num_prompt_tokens} tokens",
        )
    return RequestSpec(
        request_id=str(index),
        arrival_ms=request.arrival_ms,
        segments=tuple(zip(request.hash_ids, lengths, strict=True)),
        max_tokens=max(1, request.num_output_tokens),
    )


def _num_tokens(segments: tuple[tuple[int, int], ...]) -> int:
    return sum(length for _, length in segments)


def _check_input(
    segments: tuple[tuple[int, int], ...], max_tokens: int, images: tuple[ImageSpec, ...]
) -> None:
    check_tuple("segments", segments, tuple)
    if not segments:
        invalid_argument("segments", segments, "at least one")
    for i, segment in enumerate(segments):
        if len(segment) != 2:
            invalid_argument(f"segments[{i}]", reprlib.repr(segment), "(seed, length)")
        check_int(f"segments[{i}][0]", segment[0], 0)
        check_int(f"segments[{i}][1]", segment[1], 1, MOST_TOKENS)
    check_int("max_tokens", max_tokens, 1, MOST_TOKENS)
    check_tuple("images", images, ImageSpec)
    end, num_tokens = 0, _num_tokens(segments)
    for i, image in enumerate(images):
        check_int(f"images[{i}].offset", image.offset, end, num_tokens - image.length)
        end = image.offset + image.length


def _check_remote(remote: RemoteHit, num_tokens: int) -> None:
    if not isinstance(remote, RemoteHit):
        invalid_argument("remote", reprlib.repr(remote), "a RemoteHit, or None")
    # A step that loads must have a token left to compute.
    check_int("remote.num_tokens", remote.num_tokens, 1, num_tokens - (not remote.asynchronous))


_NESTED = {"requests": RequestSpec, "images": ImageSpec, "chunks": SessionChunk, "remote": RemoteHit}


def _to_json(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_to_json(x) for x in value]
    if not is_dataclass(value):
        return value
    named = ((f, getattr(value, f.name)) for f in fields(value))
    return {f.name: _to_json(x) for f, x in named if x != f.default}


def _read_field(name: str, value: object, place: str) -> object:
    if isinstance(value, list):
        return tuple(_read_field(name, x, f"{place}[{i}]") for i, x in enumerate(value))
    if isinstance(value, dict) and name in _NESTED:
        return read_object(_NESTED[name], value, place, _read_field)
    return value
