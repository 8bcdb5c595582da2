"""Where requests come from: a recorded trace, or a seeded generator with lengths of the same kind."""

import json
import math
import random
import reprlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from ..reference.errors import TraceError, invalid_argument
from .checks import MOST

BLOCK_TOKENS = 512
MOST_TOKENS = 2**31 - 1  # cu_seqlens are int32

# The generator's numbers are our own model of a conversation service under steady load, not anybody's data.
MEDIAN_PROMPT_TOKENS = 6_900
MEAN_PROMPT_TOKENS = 12_000
MOST_PROMPT_TOKENS = 126_000
MEAN_OUTPUT_TOKENS = 340
MOST_OUTPUT_TOKENS = 2_000
REQUESTS_AN_HOUR = 12_031


@dataclass(frozen=True)
class TraceRequest:
    """One request of a workload.

    Attributes:
        arrival_ms: from the start of the workload, ms, >= 0.
        num_prompt_tokens: tokens, >= 1.
        num_output_tokens: generated tokens, >= 0.
        hash_ids: one id for each block of 512 prompt tokens; equal ids mean equal prefixes.
    """

    arrival_ms: int
    num_prompt_tokens: int
    num_output_tokens: int
    hash_ids: tuple[int, ...]


def read_trace(path: str | Path) -> list[TraceRequest]:
    """Read a request trace in JSON Lines, the format of the Mooncake traces.

    One object a line: `timestamp` (ms, >= 0), `input_length` (tokens, >= 1), `output_length` (tokens, >= 0)
    and `hash_ids` (a list of ints >= 0). Further fields and blank lines are ignored.

    Args:
        path: of the file.

    Returns:
        The requests, in the order of the file; at least one.

    Raises:
        TraceError: `FILE:LINE: reason` for the first line that does not fit (line 1 for an empty file), or
            `FILE: reason` for a file that cannot be opened.

    Source: https://github.com/kvcache-ai/Mooncake, FAST25-release/traces.
    """
    requests = [_request(fields, place) for place, fields in read_objects(path)]
    if not requests:
        raise TraceError(f"{path}:1: the file is empty; allowed: at least one request")
    return requests


def read_objects(path: str | Path) -> Iterator[tuple[str, dict[str, object]]]:
    """The objects of a file in JSON Lines, each with its place, `FILE:LINE`; blank lines are passed over.

    Raises:
        TraceError: `FILE:LINE: reason` for a line that is no JSON object, or `FILE: reason` for a file that
            cannot be opened.
    """
    try:
        with open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield f"{path}:{number}", _object(line, f"{path}:{number}")
    except OSError as error:
        raise TraceError(f"{path}: {error.strerror or error}") from error


def generate_requests(seed: int, count: int) -> list[TraceRequest]:
    """Requests like those of a conversation service, when there is no trace to read.

    Independent draws: prompts are log-normal (median 6,900 tokens, mean 12,000, cut at 1 and 126,000),
    outputs exponential (mean 340 tokens, cut at 1 and 2,000), arrivals a Poisson process of 12,031 an hour.
    No two prompts share a prefix.

    Args:
        seed: of all draws; the same seed gives the same requests everywhere.
        count: how many, >= 0.

    Returns:
        The requests, in order of arrival.

    Raises:
        InvalidArgumentError: for a negative count.
    """
    if count < 0:
        invalid_argument("count", count, ">= 0")
    rng = random.Random(seed)
    mu = math.log(MEDIAN_PROMPT_TOKENS)
    sigma = math.sqrt(2 * math.log(MEAN_PROMPT_TOKENS / MEDIAN_PROMPT_TOKENS))
    arrival_ms, next_id = 0.0, 0
    requests = []
    for _ in range(count):
        arrival_ms += rng.expovariate(REQUESTS_AN_HOUR / 3_600_000)
        prompt = min(max(1, round(rng.lognormvariate(mu, sigma))), MOST_PROMPT_TOKENS)
        output = min(max(1, round(rng.expovariate(1 / MEAN_OUTPUT_TOKENS))), MOST_OUTPUT_TOKENS)
        ids = range(next_id, next_id + -(-prompt // BLOCK_TOKENS))
        next_id = ids.stop
        requests.append(TraceRequest(int(arrival_ms), prompt, output, tuple(ids)))
    return requests


def _object(line: bytes, place: str) -> dict[str, object]:
    try:
        fields = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise TraceError(f"{place}: not UTF-8 (byte {error.start + 1} of the line)") from error
    except (ValueError, RecursionError) as error:
        cut_off = "" if line.endswith(b"\n") else ", and the line has no end: is the file cut off?"
        reason = f"{error.msg}, column {error.colno}" if isinstance(error, json.JSONDecodeError) else error
        raise TraceError(f"{place}: not JSON ({reason}){cut_off}") from error
    if not isinstance(fields, dict):
        _refuse(place, "the line", fields, "a JSON object")
    return fields


def _request(fields: dict[str, object], place: str) -> TraceRequest:
    return TraceRequest(
        arrival_ms=_integer("timestamp", fields, place, 0, MOST),
        num_prompt_tokens=_integer("input_length", fields, place, 1, MOST_TOKENS),
        num_output_tokens=_integer("output_length", fields, place, 0, MOST_TOKENS),
        hash_ids=_hash_ids(fields, place),
    )


def _integer(name: str, fields: dict[str, object], place: str, least: int, most: int) -> int:
    value = _field(name, fields, place)
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        _refuse(place, name, value, f"an int from {least} to {most}")
    return value


def _hash_ids(fields: dict[str, object], place: str) -> tuple[int, ...]:
    value = _field("hash_ids", fields, place)
    if not isinstance(value, list):
        _refuse(place, "hash_ids", value, "a list of ints")
    for i, x in enumerate(value):
        if isinstance(x, bool) or not isinstance(x, int) or not 0 <= x <= MOST:
            _refuse(place, f"hash_ids[{i}]", x, f"an int from 0 to {MOST}")
    return tuple(value)


def _field(name: str, fields: dict[str, object], place: str) -> object:
    if name not in fields:
        raise TraceError(f"{place}: {name} is missing")
    return fields[name]


def _refuse(place: str, name: str, value: object, allowed: str) -> NoReturn:
    raise TraceError(f"{place}: {name} is {reprlib.repr(value)}; allowed: {allowed}")
