"""Named workloads: seeded generators of requests, each from a few numbers that its text form may change.

fixed                             all prompts and outputs of one length
lognormal:rate=8,output=400       other numbers than its own
"""

import inspect
import math
import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice, repeat
from types import MappingProxyType
from typing import Any

from ..reference.errors import invalid_argument
from .checks import check_int
from .traces import BLOCK_TOKENS, TraceRequest, generate_requests

MOST_PROMPT_TOKENS = 131_072
MOST_OUTPUT_TOKENS = 32_768
SIGMAS = (0.0, 3.0)
RATES = (0.001, 10_000.0)
GAPS_S = (0.001, 10_000.0)
PROMPT_SIGMA, OUTPUT_SIGMA = 1.0, 0.7
"""Of log-normal lengths: standard deviations of their logarithm. Means are 1.65 and 1.28 medians."""


@dataclass(frozen=True)
class Workload:
    """A named way to draw requests.

    Attributes:
        summary: what it is, in a line.
        generate: draws them, from `seed` and `count`, and parameters of its own: keyword-only ints and floats
            with a default. Fewer requests are the first of more.
        count: of requests, where nobody says how many.
    """

    summary: str
    generate: Callable[..., list[TraceRequest]]
    count: int = 512

    @property
    def parameters(self) -> Mapping[str, int | float]:
        """Its own parameters, and their defaults."""
        own = inspect.signature(self.generate).parameters.items()
        return {name: p.default for name, p in own if p.kind is p.KEYWORD_ONLY}


def fixed_requests(
    seed: int, count: int, *, prompt: int = 2_000, output: int = 500, rate: float = 2.0
) -> list[TraceRequest]:
    """Requests that are all of one length.

    Args:
        seed: of the arrivals.
        count: of requests, >= 0.
        prompt: tokens of each prompt, 1 to 131,072.
        output: tokens of each output, 1 to 32,768.
        rate: arrivals are a Poisson process of so many requests a second, 0.001 to 10,000.

    Raises:
        InvalidArgumentError: for a value that is not as above.
    """
    _check_lengths(prompt, output)
    rng = random.Random(seed)
    arrivals = _poisson_ms(rng, _number("rate", rate, *RATES))
    return _requests(count, zip(arrivals, repeat(prompt), repeat(output), strict=True))


def lognormal_requests(
    seed: int,
    count: int,
    *,
    prompt: int = 1_000,
    prompt_sigma: float = PROMPT_SIGMA,
    output: int = 250,
    output_sigma: float = OUTPUT_SIGMA,
    rate: float = 4.0,
) -> list[TraceRequest]:
    """Requests whose prompts and outputs are log-normal, all drawn independently.

    Args:
        seed: of all draws.
        count: of requests, >= 0.
        prompt: median, tokens, 1 to 131,072, where longer ones are cut.
        prompt_sigma: standard deviation of the logarithm of prompts, 0 to 3; the mean is the median times
            exp(sigma ** 2 / 2).
        output: median, tokens, 1 to 32,768, where longer ones are cut.
        output_sigma: the same of outputs.
        rate: arrivals are a Poisson process of so many requests a second, 0.001 to 10,000.

    Raises:
        InvalidArgumentError: for a value that is not as above.
    """
    _check_lengths(prompt, output)
    rng = random.Random(seed)
    arrivals = _poisson_ms(rng, _number("rate", rate, *RATES))
    prompts = _lengths(rng, prompt, _number("prompt_sigma", prompt_sigma, *SIGMAS), MOST_PROMPT_TOKENS)
    outputs = _lengths(rng, output, _number("output_sigma", output_sigma, *SIGMAS), MOST_OUTPUT_TOKENS)
    return _requests(count, zip(arrivals, prompts, outputs, strict=True))


def burst_requests(
    seed: int, count: int, *, prompt: int = 1_000, output: int = 250, size: int = 32, gap_s: float = 10.0
) -> list[TraceRequest]:
    """Requests that come in bursts; between them nobody comes.

    Bursts are a Poisson process, and all requests of a burst come in the same ms. Lengths are those of
    `lognormal_requests`, sigma 1.0 of prompts and 0.7 of outputs.

    Args:
        seed: of all draws.
        count: of requests, >= 0; the last burst may be cut short.
        prompt, output: medians, tokens, as in `lognormal_requests`.
        size: requests of a burst, >= 1.
        gap_s: mean time from one burst to the next, s, 0.001 to 10,000.

    Raises:
        InvalidArgumentError: for a value that is not as above.
    """
    _check_lengths(prompt, output)
    check_int("size", size, 1)
    rng = random.Random(seed)
    bursts = _poisson_ms(rng, 1 / _number("gap_s", gap_s, *GAPS_S))
    arrivals = (burst_ms for burst_ms in bursts for _ in range(size))
    prompts = _lengths(rng, prompt, PROMPT_SIGMA, MOST_PROMPT_TOKENS)
    outputs = _lengths(rng, output, OUTPUT_SIGMA, MOST_OUTPUT_TOKENS)
    return _requests(count, zip(arrivals, prompts, outputs, strict=True))


def long_prompt_requests(
    seed: int,
    count: int,
    *,
    prompt: int = 500,
    output: int = 250,
    long: int = 32_000,
    every: int = 50,
    rate: float = 4.0,
) -> list[TraceRequest]:
    """Short chats, and now and then a long prompt among them.

    Each request is long with a chance of 1 / every. Else its prompt is log-normal, with sigma 1.0; all
    outputs are, with sigma 0.7.

    Args:
        seed: of all draws.
        count: of requests, >= 0.
        prompt, output: medians of a chat, tokens, as in `lognormal_requests`.
        long: tokens of a long prompt, 1 to 131,072.
        every: requests for each long one, on average, >= 1.
        rate: arrivals are a Poisson process of so many requests a second, 0.001 to 10,000.

    Raises:
        InvalidArgumentError: for a value that is not as above.
    """
    _check_lengths(prompt, output)
    check_int("long", long, 1, MOST_PROMPT_TOKENS)
    check_int("every", every, 1)
    rng = random.Random(seed)
    arrivals = _poisson_ms(rng, _number("rate", rate, *RATES))
    chats = _lengths(rng, prompt, PROMPT_SIGMA, MOST_PROMPT_TOKENS)
    prompts = (chat if rng.randrange(every) else long for chat in chats)
    outputs = _lengths(rng, output, OUTPUT_SIGMA, MOST_OUTPUT_TOKENS)
    return _requests(count, zip(arrivals, prompts, outputs, strict=True))


def published_requests(seed: int, count: int, *, spread: float = 0.12) -> list[TraceRequest]:
    """The requests of a published comparison: 3,500 prompt and, on average, 1,500 output tokens, all at once.

    Meant for closed loop, 128 at a time. How far lengths varied is not published; here outputs are normal.

    Args:
        seed: of the output lengths.
        count: of requests, >= 0; 512 are published.
        spread: standard deviation of outputs over their mean, 0 to 0.3.

    Raises:
        InvalidArgumentError: for a value that is not as above.

    Source: vllm-ascend #5212 (DeepSeek-V3.1).
    """
    rng = random.Random(seed)
    sigma = 1_500 * _number("spread", spread, 0.0, 0.3)
    outputs = (max(1, round(rng.gauss(1_500, sigma))) for _ in repeat(None))
    return _requests(count, zip(repeat(0), repeat(3_500), outputs, strict=True))


WORKLOADS: Mapping[str, Workload] = MappingProxyType(
    {
        "fixed": Workload("all prompts and outputs of one length", fixed_requests),
        "lognormal": Workload("log-normal prompts and outputs", lognormal_requests),
        "bursts": Workload("requests that come in bursts, log-normal lengths", burst_requests),
        "long_prompt": Workload("a long prompt now and then among short chats", long_prompt_requests),
        "published": Workload("a published comparison, for --concurrency 128", published_requests),
        "conversation": Workload("lengths and arrivals of a conversation service", generate_requests),
    }
)
"""Every workload by its name. In none of them two prompts share a prefix."""


def make_requests(spec: str, seed: int = 0, count: int | None = None) -> list[TraceRequest]:
    """The requests of a named workload.

    Args:
        spec: `NAME` or `NAME:PARAMETER=NUMBER,...`, as "lognormal:rate=8,output=400".
        seed: of all that is random, >= 0.
        count: of requests, >= 1; None is the workload's own.

    Raises:
        InvalidArgumentError: for an unknown name or parameter, or a value that is refused.
    """
    name, _, given = spec.partition(":")
    if name not in WORKLOADS:
        invalid_argument("workload", repr(spec), f"one of {', '.join(WORKLOADS)}")
    workload = WORKLOADS[name]
    check_int("seed", seed, 0)
    if count is not None:
        check_int("count", count, 1)
    parameters = _parameters(spec, workload.parameters, given)
    return workload.generate(seed, workload.count if count is None else count, **parameters)


def _parameters(spec: str, known: Mapping[str, Any], given: str) -> dict[str, int | float]:
    name = spec.partition(":")[0]
    parameters: dict[str, int | float] = {}
    for part in given.split(",") if ":" in spec else ():
        key, _, value = part.partition("=")
        if key not in known or key in parameters:
            allowed = f"{name} with {', '.join(known)}, each once" if known else f"{name} alone"
            invalid_argument("workload", repr(spec), allowed)
        kind = type(known[key])
        try:
            parameters[key] = kind(value)
        except ValueError:
            invalid_argument("workload", repr(spec), f"{'an int' if kind is int else 'a number'} for {key}")
    return parameters


def _requests(count: int, drawn: Iterable[tuple[int, int, int]]) -> list[TraceRequest]:
    """The first `count` of (arrival ms, prompt tokens, output tokens), with blocks that nobody shares."""
    check_int("count", count, 0)
    requests, next_id = [], 0
    for arrival_ms, prompt, output in islice(drawn, count):
        ids = range(next_id, next_id + -(-prompt // BLOCK_TOKENS))
        next_id = ids.stop
        requests.append(TraceRequest(arrival_ms, prompt, output, tuple(ids)))
    return requests


def _poisson_ms(rng: random.Random, rate: float) -> Iterator[int]:
    """Times of a Poisson process of `rate` events a second, rounded down, ms."""
    now = 0.0
    while True:
        now += rng.expovariate(rate) * 1e3
        yield int(now)


def _lengths(rng: random.Random, median: int, sigma: float, most: int) -> Iterator[int]:
    while True:
        yield min(max(1, round(median * math.exp(sigma * rng.gauss(0.0, 1.0)))), most)


def _check_lengths(prompt: int, output: int) -> None:
    check_int("prompt", prompt, 1, MOST_PROMPT_TOKENS)
    check_int("output", output, 1, MOST_OUTPUT_TOKENS)


def _number(name: str, value: float, least: float, most: float) -> float:
    if type(value) not in (int, float) or not least <= value <= most:
        invalid_argument(name, repr(value), f"a number from {least:g} to {most:g}")
    return value
