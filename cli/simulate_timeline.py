"""The timeline of `ascend-twin simulate --timeline`: Chrome's trace format, which ui.perfetto.dev opens.

A process is a run, a thread of it a rank. The slices of a rank follow each other without gap from the start
to the end: `prefill`, `decode`, or `dummy` (a step without a batch of its own), then `wait` for the slowest
rank; and `no work` while no rank has any. One more thread, `gate`, shows when it was shut while somebody
waited. Counters show running and waiting requests of each rank. Times are in us, as the format wants.

Source: "Trace Event Format", the document that defines it; event phases M, X and C.
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..scheduler.latencies import is_frozen
from ..scheduler.simulation import SimulationResult

Event = dict[str, Any]


def write_timeline(path: Path, runs: Sequence[tuple[str, SimulationResult]], max_steps: int) -> None:
    """Write runs, each with its name, to a file: the first `max_steps` steps of each.

    A step takes about 250 bytes a rank.
    """
    with open(path, "w", encoding="utf-8") as file:
        file.write('{"displayTimeUnit": "ms", "traceEvents": [\n')
        separator = ""
        for process, (name, result) in enumerate(runs, 1):
            for event in timeline_events(process, name, result, max_steps):
                file.write(separator + json.dumps(event, separators=(",", ":")))
                separator = ",\n"
        file.write("\n]}\n")


def timeline_events(process: int, name: str, result: SimulationResult, max_steps: int) -> Iterator[Event]:
    """The events of one run, in order of time."""
    num_ranks = result.running.shape[1]
    num_steps = min(max_steps, len(result.step_ms))
    if num_steps < len(result.step_ms):
        name += f" (the first {num_steps:,} of {len(result.step_ms):,} steps)"
    yield _named("process_name", process, 0, name)
    for rank in range(num_ranks):
        yield _named("thread_name", process, rank, f"rank {rank}")
    yield _named("thread_name", process, num_ranks, "gate")
    starts, ends, frozen = result.step_start_ms, _ends_ms(result), is_frozen(result)
    end = 0.0
    for step in range(num_steps):
        start = float(starts[step])
        if start > end:
            yield from (_slice(process, rank, "no work", end, start) for rank in range(num_ranks))
        end = float(ends[step])
        for rank in range(num_ranks):
            yield from _slices_of_rank(process, result, step, rank, start, end)
        if frozen[step]:
            yield _slice(process, num_ranks, "frozen", start, end)
        for counter, counts in (("running", result.running), ("waiting", result.waiting)):
            args = {f"rank {rank}": int(count) for rank, count in enumerate(counts[step])}
            yield {"ph": "C", "pid": process, "name": counter, "ts": _us(start), "args": args}


def _ends_ms(result: SimulationResult) -> np.ndarray:
    """When each step ends, ms: exactly when the next one starts, but where no rank has work between them."""
    ends = result.step_start_ms + result.step_ms
    following = np.append(result.step_start_ms[1:], result.duration_ms)
    return np.where(np.isclose(ends, following, rtol=1e-12, atol=1e-9), following, ends)


def _slices_of_rank(
    process: int, result: SimulationResult, step: int, rank: int, start: float, end: float
) -> Iterable[Event]:
    """What it does, and then its wait for the slowest: common parts of a step count as its own work."""
    prefill, decode = int(result.prefill_tokens[step, rank]), int(result.decode_requests[step, rank])
    kind = "prefill" if prefill else "decode" if decode else "dummy"
    own_ms = result.rank_ms[step]
    args = {
        "step": step,
        "prefill_tokens": prefill,
        "decode_requests": decode,
    }
    waits_from = end - float(own_ms.max() - own_ms[rank])
    yield _slice(process, rank, kind, start, waits_from, args)
    if _us(waits_from) < _us(end):
        yield _slice(process, rank, "wait", waits_from, end)


def _slice(
    process: int, thread: int, name: str, start: float, end: float, args: Event | None = None
) -> Event:
    """From `start` to `end`, both ms; equal times give equal numbers, so that slices fit together."""
    begin = _us(start)
    event = {
        "ph": "X",
        "pid": process,
        "tid": thread,
        "name": name,
        "ts": begin,
        "dur": round(_us(end) - begin, 3),
    }
    return {**event, "args": args} if args else event


def _named(what: str, process: int, thread: int, name: str) -> Event:
    return {"ph": "M", "pid": process, "tid": thread, "ts": 0, "name": what, "args": {"name": name}}


def _us(ms: float) -> float:
    return round(ms * 1e3, 3)
