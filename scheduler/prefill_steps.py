"""The prefill batches of a workload, quickly: their shapes alone, without blocks, for a trace in a second."""

import math
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from ..reference.errors import invalid_argument
from .traces import TraceRequest


@dataclass(frozen=True)
class PrefillStep:
    """One batch that holds at least one chunk of a prompt.

    Attributes:
        start_ms: when it starts, on the clock of `prefill_steps`.
        seq_lens: tokens of each of the N sequences: decodes (1 token) first, then chunks of prompts.
        num_decodes: how many decode.
        has_initial_state: N bools, whether a sequence goes on from a state: it decodes, or an earlier step
            began its prompt.
    """

    start_ms: float
    seq_lens: tuple[int, ...]
    num_decodes: int
    has_initial_state: tuple[bool, ...]


@dataclass
class _Running:
    """A request that was admitted: what it has left to do, in tokens."""

    num_prompt_left: int
    num_output_left: int
    begun: bool = False


def prefill_steps(
    requests: Iterable[TraceRequest], max_num_batched_tokens: int, max_num_seqs: int, *, step_ms: float = 25.0
) -> Iterator[PrefillStep]:
    """The steps with prefill work that a chunked-prefill scheduler would form, first come first served.

    A step has a budget of tokens. Each decode takes one, then prompts that were begun go on, then waiting
    requests are admitted in order of arrival, until the budget or the places are used up. The step that
    ends a prompt also makes the first output token.

    The clock is plain: every step lasts `step_ms`, so queues form under load, and an idle engine jumps to the
    next arrival. The batches have realistic shapes, but this is no scheduler: it knows no KV blocks, hence no
    preemption, and no prefix caching, priorities or speculative tokens.

    Args:
        requests: the workload, in any order.
        max_num_batched_tokens: budget of a step, tokens, >= max_num_seqs.
        max_num_seqs: sequences that run at once, >= 1.
        step_ms: how long a step lasts, ms, > 0. Default: 25.

    Returns:
        The steps in order of time, made as they are asked for; steps that only decode are left out.

    Raises:
        InvalidArgumentError: at once, for a number that does not fit.
    """
    if max_num_seqs < 1:
        invalid_argument("max_num_seqs", max_num_seqs, ">= 1")
    if max_num_batched_tokens < max_num_seqs:
        invalid_argument(
            "max_num_batched_tokens", max_num_batched_tokens, f">= max_num_seqs = {max_num_seqs}"
        )
    if not (step_ms > 0 and math.isfinite(step_ms)):
        invalid_argument("step_ms", step_ms, "a finite number > 0")
    return _steps(
        deque(sorted(requests, key=lambda r: r.arrival_ms)), max_num_batched_tokens, max_num_seqs, step_ms
    )


def _steps(
    waiting: deque[TraceRequest], max_num_batched_tokens: int, max_num_seqs: int, step_ms: float
) -> Iterator[PrefillStep]:
    running: list[_Running] = []
    now = 0.0
    while waiting or running:
        if not running:
            now = max(now, waiting[0].arrival_ms)
        decodes = [r for r in running if not r.num_prompt_left]
        chunks = _schedule_prompts(running, waiting, now, max_num_batched_tokens - len(decodes), max_num_seqs)
        num_steps = 1
        if chunks:
            yield PrefillStep(
                now,
                (1,) * len(decodes) + tuple(tokens for _, tokens in chunks),
                len(decodes),
                (True,) * len(decodes) + tuple(r.begun for r, _ in chunks),
            )
        else:  # nothing changes until a decode ends or a request finds a place: all these steps in one go
            num_steps = min(r.num_output_left for r in decodes)
            if waiting and len(running) < max_num_seqs:
                num_steps = min(num_steps, math.ceil((waiting[0].arrival_ms - now) / step_ms))
        for r in decodes:
            r.num_output_left -= num_steps
        for r, tokens in chunks:
            r.begun = True
            r.num_prompt_left -= tokens
            if not r.num_prompt_left:
                r.num_output_left -= 1
        running = [r for r in running if r.num_prompt_left or r.num_output_left > 0]
        now += num_steps * step_ms


def _schedule_prompts(
    running: list[_Running], waiting: deque[TraceRequest], now: float, token_budget: int, max_num_seqs: int
) -> list[tuple[_Running, int]]:
    """Whose prompts this step works on, and on how many tokens of each; admits requests to `running`."""
    chunks = []
    begun = deque(r for r in running if r.num_prompt_left)
    while token_budget:
        if begun:
            r = begun.popleft()
        elif waiting and waiting[0].arrival_ms <= now and len(running) < max_num_seqs:
            request = waiting.popleft()
            r = _Running(request.num_prompt_tokens, request.num_output_tokens)
            running.append(r)
        else:
            break
        tokens = min(r.num_prompt_left, token_budget)
        token_budget -= tokens
        chunks.append((r, tokens))
    return chunks
