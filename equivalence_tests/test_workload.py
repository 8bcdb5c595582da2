"""Request mixes: the tokens of prompts, traces as mixes, JSON, and what is refused."""

import json
import re
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ascend_twin.reference.errors import InvalidArgumentError
from ascend_twin.scheduler.traces import BLOCK_TOKENS, TraceRequest, generate_requests, read_trace
from ascend_twin.scheduler.workload import (
    IMAGE_TOKEN_ID,
    VOCABULARY_SIZE,
    ImageSpec,
    RemoteHit,
    RequestMix,
    RequestSpec,
    SessionChunk,
    mix_from_trace,
    prompt_token_ids,
    segment_tokens,
)

REAL_TRACE = Path(__file__).parents[1].parent / "shared" / "traces" / "mooncake_conversation.jsonl"
PLAIN = RequestSpec("r0", 0, ((1, 20),), 4)
FULL = RequestSpec(
    request_id="r1",
    arrival_ms=3,
    segments=((0, 16), (7, 5)),
    max_tokens=9,
    min_tokens=2,
    eos=True,
    stop_token_ids=(3, 63),
    priority=-1,
    client_index=1,
    draft_acceptance=0.8,
    images=(ImageSpec("image0", 2, 4), ImageSpec("image1", 6, 3, (False, True, False))),
    lora=2,
    cache_salt="salt",
    skip_reading_prefix_cache=True,
    chunks=(SessionChunk(((1, 3),), 2), SessionChunk(((2, 8),), 1, (ImageSpec("image0", 0, 4),))),
    structured=True,
    remote=RemoteHit(16, asynchronous=True, polls=2),
)


@given(seed=st.integers(0, 2**63 - 1), length=st.integers(1, 600), longer=st.integers(0, 600))
def test_segment_tokens_of_a_longer_segment_begin_with_those_of_a_shorter(
    seed: int, length: int, longer: int
) -> None:
    tokens = segment_tokens(seed, length)
    assert len(tokens) == length
    assert set(tokens) <= set(range(VOCABULARY_SIZE))
    assert segment_tokens(seed, length + longer)[:length] == tokens


def test_segment_tokens_never_change() -> None:
    assert segment_tokens(0, 8) == [34, 14, 57, 15, 57, 8, 13, 28]
    assert segment_tokens(2**40, 4) == [10, 20, 58, 34]


def test_segment_tokens_use_the_whole_vocabulary_and_tell_seeds_apart() -> None:
    assert set(segment_tokens(3, 2000)) == set(range(VOCABULARY_SIZE))
    assert len({tuple(segment_tokens(seed, 8)) for seed in range(2000)}) == 2000


def test_prompt_token_ids_joins_the_segments_of_requests_and_chunks() -> None:
    tokens = segment_tokens(0, 16) + segment_tokens(7, 5)
    assert prompt_token_ids(replace(FULL, images=())) == tokens
    assert FULL.num_prompt_tokens == len(tokens)
    assert prompt_token_ids(SessionChunk(((0, 16), (7, 5)), 1)) == tokens


def test_prompt_token_ids_has_a_token_of_its_own_at_the_placeholders_of_images() -> None:
    text = prompt_token_ids(replace(FULL, images=()))
    assert IMAGE_TOKEN_ID not in text
    assert prompt_token_ids(FULL) == text[:2] + [IMAGE_TOKEN_ID] * 7 + text[9:]


def _num_shared(one: RequestSpec, other: RequestSpec) -> int:
    pairs = zip(prompt_token_ids(one), prompt_token_ids(other), strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(map(_length, (one, other))))


def _length(spec: RequestSpec) -> int:
    return spec.num_prompt_tokens


def test_mix_from_trace_shares_a_prefix_exactly_where_hash_ids_are_equal() -> None:
    trace = [
        TraceRequest(0, 3 * BLOCK_TOKENS, 5, (4, 5, 6)),
        TraceRequest(8, 2 * BLOCK_TOKENS + 9, 0, (4, 5, 7)),
        TraceRequest(8, 2 * BLOCK_TOKENS, 1, (4, 5)),
        TraceRequest(9, 3 * BLOCK_TOKENS, 1, (8, 5, 6)),
    ]
    a, b, c, d = mix_from_trace(trace).requests
    assert [(r.request_id, r.arrival_ms, _length(r), r.max_tokens) for r in (a, b, c, d)] == [
        ("0", 0, 1536, 5),
        ("1", 8, 1033, 1),
        ("2", 8, 1024, 1),
        ("3", 9, 1536, 1),
    ]
    # Two different segments may begin with a few equal tokens, by chance.
    assert 2 * BLOCK_TOKENS <= _num_shared(a, b) < 2 * BLOCK_TOKENS + 4
    assert _num_shared(a, c) == 2 * BLOCK_TOKENS
    assert _num_shared(a, d) < 4
    assert prompt_token_ids(a)[BLOCK_TOKENS:] == prompt_token_ids(d)[BLOCK_TOKENS:]


def test_mix_from_trace_refuses_a_request_without_an_id_for_every_block() -> None:
    trace = [TraceRequest(0, 512, 1, (3,)), TraceRequest(0, 513, 1, (3,))]
    expected = "requests[1].hash_ids is (3,); allowed: 2 ids, one for each 512 of 513 tokens"
    with pytest.raises(InvalidArgumentError, match=f"^{re.escape(expected)}$"):
        mix_from_trace(trace)


def test_mix_from_trace_takes_an_hour_of_requests_in_less_than_two_seconds() -> None:
    trace = generate_requests(seed=1, count=12_031)
    start = time.perf_counter()
    mix = mix_from_trace(trace)
    assert time.perf_counter() - start < 2
    assert [r.num_prompt_tokens for r in mix.requests] == [r.num_prompt_tokens for r in trace]


@pytest.mark.skipif(not REAL_TRACE.exists(), reason=f"no trace at {REAL_TRACE}: it is not part of a checkout")
def test_mix_from_trace_takes_the_real_trace_with_its_shared_prefixes() -> None:
    mix = mix_from_trace(read_trace(REAL_TRACE))
    assert len(mix.requests) == 12_031
    first_segments = [r.segments[0] for r in mix.requests]
    assert len(set(first_segments)) < len(first_segments) / 2


@pytest.mark.parametrize("spec", [PLAIN, FULL, replace(PLAIN, chunks=())])
def test_request_spec_survives_json(spec: RequestSpec) -> None:
    assert RequestSpec.from_json(json.loads(json.dumps(spec.to_json()))) == spec


def test_request_mix_survives_json_and_leaves_out_defaults() -> None:
    mix = RequestMix((PLAIN, FULL))
    data = json.loads(json.dumps(mix.to_json()))
    assert RequestMix.from_json(data) == mix
    assert data["requests"][0] == {
        "request_id": "r0",
        "arrival_ms": 0,
        "segments": [[1, 20]],
        "max_tokens": 4,
    }
    assert set(data["requests"][1]) == set(RequestSpec.__dataclass_fields__)


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"request_id": ""}, "request_id is ''; allowed: a text that is not \"\""),
        ({"request_id": 3}, 'request_id is 3; allowed: a text that is not ""'),
        ({"arrival_ms": -1}, "arrival_ms is -1; allowed: an int >= 0"),
        ({"segments": ()}, "segments is (); allowed: at least one"),
        ({"segments": [(1, 2)]}, "segments is [(1, 2)]; allowed: a tuple, each of it a tuple"),
        ({"segments": ((1, 2, 3),)}, "segments[0] is (1, 2, 3); allowed: (seed, length)"),
        ({"segments": ((1, 2), (-1, 3))}, "segments[1][0] is -1; allowed: an int >= 0"),
        ({"segments": ((1, 0),)}, "segments[0][1] is 0; allowed: an int from 1 to 2147483647"),
        ({"max_tokens": 0}, "max_tokens is 0; allowed: an int from 1 to 2147483647"),
        ({"max_tokens": True}, "max_tokens is True; allowed: an int from 1 to 2147483647"),
        ({"min_tokens": 5}, "min_tokens is 5; allowed: an int from 0 to 4"),
        ({"eos": 1}, "eos is 1; allowed: True or False"),
        ({"stop_token_ids": (3, 64)}, "stop_token_ids[1] is 64; allowed: an int from 0 to 63"),
        ({"stop_token_ids": 3}, "stop_token_ids is 3; allowed: a tuple, each of it a int"),
        ({"priority": 1.5}, "priority is 1.5; allowed: an int"),
        ({"client_index": -1}, "client_index is -1; allowed: an int >= 0"),
        ({"draft_acceptance": 1.01}, "draft_acceptance is 1.01; allowed: a number from 0 to 1"),
        ({"draft_acceptance": float("nan")}, "draft_acceptance is nan; allowed: a number from 0 to 1"),
        ({"images": (ImageSpec("a", 17, 4),)}, "images[0].offset is 17; allowed: an int from 0 to 16"),
        (
            {"images": (ImageSpec("a", 0, 4), ImageSpec("b", 3, 4))},
            "images[1].offset is 3; allowed: an int from 4 to 16",
        ),
        ({"images": ("a",)}, "images is ('a',); allowed: a tuple, each of it a ImageSpec"),
        ({"lora": 0}, "lora is 0; allowed: an int >= 1"),
        ({"cache_salt": ""}, "cache_salt is ''; allowed: a text that is not \"\""),
        ({"skip_reading_prefix_cache": None}, "skip_reading_prefix_cache is None; allowed: True or False"),
        ({"chunks": (3,)}, "chunks is (3,); allowed: a tuple, each of it a SessionChunk"),
        ({"structured": "no"}, "structured is 'no'; allowed: True or False"),
        ({"remote": 16}, "remote is 16; allowed: a RemoteHit, or None"),
        ({"remote": RemoteHit(21, True)}, "remote.num_tokens is 21; allowed: an int from 1 to 20"),
        ({"remote": RemoteHit(20)}, "remote.num_tokens is 20; allowed: an int from 1 to 19"),
    ],
)
def test_request_spec_names_the_field_that_does_not_fit(changed: dict, reason: str) -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        replace(PLAIN, **changed)
    assert re.fullmatch(re.escape(reason).replace(r"\.\*", ".*"), str(caught.value))


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: ImageSpec("", 0, 1), "identifier is ''"),
        (lambda: ImageSpec("a", -1, 1), "offset is -1"),
        (lambda: ImageSpec("a", 0, 0), "length is 0"),
        (lambda: ImageSpec("a", 0, 2, (True,)), r"is_embed is \(True,\); allowed: 2 bools"),
        (lambda: ImageSpec("a", 0, 2, (False, False)), "is_embed is .*; allowed: 2 bools, one at least True"),
        (lambda: ImageSpec("a", 0, 1, (1,)), r"is_embed is \(1,\)"),  # pyright: ignore[reportArgumentType]
        (lambda: RemoteHit(0), "num_tokens is 0"),
        (lambda: RemoteHit(1, polls=-1), "polls is -1"),
        (lambda: RemoteHit(1, asynchronous=1), "asynchronous is 1"),  # pyright: ignore[reportArgumentType]
        (lambda: SessionChunk((), 1), r"segments is \(\)"),
        (lambda: SessionChunk(((0, 1),), 0), "max_tokens is 0"),
        (lambda: SessionChunk(((0, 1),), 1, (ImageSpec("a", 0, 2),)), r"images\[0\].offset is 0"),
        (lambda: RequestMix((PLAIN, FULL, PLAIN)), r"requests\[2\].request_id is 'r0'"),
        (lambda: RequestMix([PLAIN]), "requests is "),  # pyright: ignore[reportArgumentType]
    ],
)
def test_the_parts_of_a_mix_name_the_field_that_does_not_fit(make: Callable[[], object], reason: str) -> None:
    with pytest.raises(InvalidArgumentError, match=f"^{reason}"):
        make()


GOOD = {"request_id": "r0", "arrival_ms": 0, "segments": [[1, 20]], "max_tokens": 4}


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        ([], "the whole is []; allowed: a JSON object"),
        ({}, "requests is missing"),
        ({"requests": [], "x": 1}, "x is unknown; allowed: requests"),
        ({"requests": 3}, "requests is 3; allowed: a tuple, each of it a RequestSpec"),
        ({"requests": [GOOD, 3]}, ".*; allowed: a tuple, each of it a RequestSpec"),
        (
            {"requests": [GOOD, {**GOOD, "request_id": "b", "segment": []}]},
            "requests[1].segment is unknown; .*",
        ),
        ({"requests": [{"request_id": "b"}]}, "requests[0].arrival_ms is missing"),
        ({"requests": [{**GOOD, "max_tokens": None}]}, "requests[0].max_tokens is None; allowed: an int .*"),
        ({"requests": [{**GOOD, "segments": [[1, "2"]]}]}, "requests[0].segments[0][1] is '2'; allowed: .*"),
        ({"requests": [{**GOOD, "remote": {}}]}, "requests[0].remote.num_tokens is missing"),
        (
            {"requests": [{**GOOD, "images": [{"identifier": "a", "offset": 0, "length": -1}]}]},
            "requests[0].images[0].length is -1; allowed: an int .*",
        ),
        (
            {"requests": [{**GOOD, "chunks": [{"segments": [[0, 1]], "max_tokens": 0}]}]},
            "requests[0].chunks[0].max_tokens is 0; allowed: an int .*",
        ),
        ({"requests": [GOOD, GOOD]}, "requests[1].request_id is 'r0'; allowed: an id of its own"),
    ],
)
def test_from_json_names_the_path_of_the_field_that_does_not_fit(data: object, reason: str) -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        RequestMix.from_json(data)
    assert re.fullmatch(re.escape(reason).replace(r"\.\*", ".*"), str(caught.value))
