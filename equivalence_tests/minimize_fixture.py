"""A recorded case made smaller, as long as replaying it finds the same."""

import dataclasses
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from ..fixtures.store import Fixture
from ..optimized.gdn.kernels.block_sizes import CHUNK_SIZE
from ..reference.errors import invalid_argument
from .cases import expected_metadata
from .devices import open_test_device
from .explanations import Doctor
from .recorded_call import RecordedCall
from .replay import Replay, is_recorded
from .replay_gdn import call_block_sizes, compact_metadata, default_implementation_on, judge, judge_again

SECONDS = 60.0
_FEWEST_COLUMNS = 8
_PLAIN = 10.0  # limits: an error that is as large stays as large, so that it can still be seen
_MOST_ROWS = 2**13  # tokens times heads: what all mistakes are tried on again and again

Finding = tuple[str, str]


def minimize_fixture(
    fixture: Fixture,
    *,
    path: str = "",
    device: str = "cpu",
    implementation: str | None = None,
    seconds: float = SECONDS,
) -> Fixture:
    """A smaller fixture of which `replay_fixture`, with the same arguments, finds the same first.

    A call of the op loses sequences, heads, tokens and columns of V. Of a recording these are cut out: no
    sequence and no head depends on another, and no token on one behind it. The state behind a sequence that
    was cut was never seen; it is left out, or, where nothing else is wrong, made as the explanation says. A
    start of a sequence that is right is put into its initial state.

    Args:
        fixture: of kind gdn, or scheduler.
        path: of its file; its name is kept in the origin of what is made.
        device, implementation: as of `replay.replay_fixture`.
        seconds: how long to look for a smaller one. Default: 60.

    Raises:
        InvalidArgumentError: for a fixture that nothing is wrong with, or of a kind that cannot be smaller.
    """
    if fixture.kind == "scheduler":
        from .replay_traces import minimize_trace

        return minimize_trace(fixture, path=path, implementation=implementation, seconds=seconds)
    if fixture.kind != "gdn":
        invalid_argument("kind", fixture.kind, "gdn or scheduler: no other can be made smaller")
    call = RecordedCall.of(fixture)
    if implementation is None and is_recorded(fixture):
        search = _Search(call, judge, seconds, is_seen=True)
    else:
        where = open_test_device(device)
        name = implementation or default_implementation_on(where)
        search = _Search(call, lambda call, **_: judge_again(call, where, name), seconds, is_seen=False)
    smallest = search.run()
    origin: dict[str, object] = {"minimized_from": Path(path).name, "tokens_before": call.bounds[-1]}
    if search.made:
        origin["made"] = search.made
    return smallest.to_fixture(**origin)


class _Search:
    """Greedy: the first smaller call of which the same is found takes the place of the call.

    Args:
        call: to be made smaller.
        replay: what finds; takes `mistakes` as `judge` does.
        seconds: how long to search.
        is_seen: whether what was seen is kept; else it is made again by `replay`.

    Raises:
        InvalidArgumentError: when nothing is found of the call.
    """

    def __init__(
        self, call: RecordedCall, replay: Callable[..., Replay], seconds: float, *, is_seen: bool
    ) -> None:
        self.call, self.replay, self.is_seen = call, replay, is_seen
        self.deadline = time.monotonic() + seconds
        first = replay(call)
        if first.passed:
            invalid_argument("file to minimize", first.subject, "one with something wrong: this one agrees")
        self.sought = _what_was_found(first)
        self.usage = min(_usage(first) / 2, _PLAIN)
        explanation = first.details.get("explanation")
        self.mistake: str | None = explanation["name"] if explanation else None
        self._last_state: torch.Tensor | None = None
        self._made_state = self._made_metadata = False

    @property
    def made(self) -> list[str]:
        """What in the call was neither recorded nor cut out of what was."""
        made = [f"final_state, as it is if: {self.mistake}"] if self._made_state else []
        return made + (["metadata, as the same builder makes them"] if self._made_metadata else [])

    def run(self) -> RecordedCall:
        """The smallest call that was found."""
        call = self.call
        while time.monotonic() < self.deadline:
            smaller = next((x for x in map(self._same, self._smaller(call)) if x is not None), None)
            if smaller is None:
                break
            call = smaller
            self._made_state |= "final_state" in call.seen and call.seen["final_state"] is self._last_state
            self._made_metadata |= bool(call.metadata)
        return call

    def _same(self, candidate: RecordedCall) -> RecordedCall | None:
        """The candidate, or one with a final state made for it, if the same is found; else None."""
        if time.monotonic() >= self.deadline:
            return None
        if self._finds_it(candidate):
            return candidate
        lost = self.is_seen and "final_state" in self.call.seen and "final_state" not in candidate.seen
        if lost and self.mistake is not None:
            for results in Doctor(candidate, candidate.limits()).made(self.mistake):
                dtype = self.call.seen["final_state"].dtype
                final_state = results.final_state.to(dtype)
                with_state = dataclasses.replace(
                    candidate, seen={**candidate.seen, "final_state": final_state}
                )
                if self._finds_it(with_state):
                    self._last_state = final_state
                    return with_state
        return None

    def _finds_it(self, call: RecordedCall) -> bool:
        """Whether the same is found: first by the one mistake, then, of what is small, by all."""
        if not call.bounds[-1] and self.call.bounds[-1]:
            return False  # it would be right, and tell nobody anything
        for mistakes in ((self.mistake,), None) if self.mistake else (None,):
            if mistakes is None and self.mistake and call.bounds[-1] * call.case.HV > _MOST_ROWS:
                break
            replay = self.replay(call, mistakes=mistakes)
            if replay.passed or _what_was_found(replay) != self.sought or _usage(replay) < self.usage:
                return False
        return True

    def _smaller(self, call: RecordedCall) -> Iterator[RecordedCall]:
        """Calls one step smaller, the boldest first."""
        if not self.is_seen and call.seen:
            call = call.with_seen(None, None)
        lens, N, H, V = call.seq_lens, len(call.seq_lens), call.case.H, call.case.V
        for kept in _fewer(N):
            yield self._with_metadata(call, call.take(kept))
        for kept in _fewer(H):
            yield self._with_metadata(call, call.take(key_heads=kept))
        for n, length in enumerate(lens):
            for start in {length // 2 // CHUNK_SIZE * CHUNK_SIZE, CHUNK_SIZE}:
                if 0 < start < length:
                    yield self._with_metadata(call, call.after([start if i == n else 0 for i in range(N)]))
        for n, length in enumerate(lens):
            for shorter in _shorter(length):
                cut = call.take(lengths=[*lens[:n], shorter, *lens[n + 1 :]])
                yield self._with_metadata(call, cut)
        if V > _FEWEST_COLUMNS:
            yield self._with_metadata(call, call.take(V=max(_FEWEST_COLUMNS, V // 2)))

    def _with_metadata(self, call: RecordedCall, smaller: RecordedCall) -> RecordedCall:
        """With the tables that the smaller call would have been given: right where they were, or compact."""
        found = {}
        for name, x in call.metadata.items():
            for tables in (expected_metadata, compact_metadata):
                was = tables(call.bounds, call_block_sizes(call)).get(name)
                if was is not None and torch.equal(torch.as_tensor(was).long(), x.long()):
                    now = tables(smaller.bounds, call_block_sizes(smaller)).get(name)
                    if now is not None:
                        found[name] = torch.as_tensor(now).to(x.dtype)
                    break
        return dataclasses.replace(smaller, metadata=found)


def _what_was_found(replay: Replay) -> Finding:
    """What must stay the same: the first stage that is wrong, and the mistake that explains it."""
    explanation = replay.details.get("explanation")
    first = replay.first
    assert first is not None
    return first.stage, explanation["name"] if explanation else first.name


def _usage(replay: Replay) -> float:
    """The largest error as a part of its limit; infinity where it is no number, or nothing is measured."""
    usages = [
        error / limit if math.isfinite(error) else math.inf
        for finding in replay.findings
        if not finding.passed and finding.errors is not None and finding.limit is not None
        for error, limit in zip(finding.errors, finding.limit, strict=True)
    ]
    return max(usages, default=math.inf)


def _fewer(count: int) -> Iterator[list[int]]:
    """Halves of the numbers below count, then all but one; none is empty."""
    if count > 2:
        yield list(range(count // 2))
        yield list(range(count // 2, count))
    if count > 1:
        for left_out in range(count):
            yield [n for n in range(count) if n != left_out]


def _shorter(length: int) -> list[int]:
    """Lengths to cut a sequence to: with the same tail and fewer chunks, without it, then by tokens."""
    tail = length % CHUNK_SIZE
    half = length // 2 // CHUNK_SIZE * CHUNK_SIZE
    lengths = [tail, half + tail, length - CHUNK_SIZE, length - tail]
    lengths += [length - (length >> i) for i in range(1, length.bit_length())]
    return list(dict.fromkeys(x for x in lengths if 0 < x < length))
