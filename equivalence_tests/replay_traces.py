"""Replaying traces: a scheduler is driven again by its records; the collectives of ranks are checked."""

import reprlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

from ..fixtures.record_traces import ENTERED
from ..fixtures.store import Fixture
from ..reference.errors import FixtureError, InvalidArgumentError, UnavailableError, invalid_argument
from . import installed_vllm
from .replay import RECORDED, Finding, Replay
from .scheduler_engines import Engine
from .scheduler_runs import CheckedEngine, minimize_scenario, run_scenario
from .scheduler_scenarios import Scenario
from .traced_collectives import find_mistake, read_group
from .traced_scheduler import (
    IMPLEMENTATIONS,
    PLAIN,
    PLAIN_VERSION,
    VLLM,
    Difference,
    TraceConfig,
    TracedScheduler,
    refuse_too_large,
)

DECISIONS = ("schedule", "get_grammar_bitmask", "counts", "observe")
"""Calls whose results are decisions; of the others they are outputs."""

_MEANINGS = {
    "error": "One of them raises, and the other does not.",
    "output.num_scheduled_tokens": "They choose other requests for this step, or compute more or less.",
    "output.scheduled_new_reqs": "They admit other requests, or find other blocks for them.",
    "output.scheduled_cached_reqs": "They give other blocks to requests that run, or count them otherwise.",
    "output.scheduled_spec_decode_tokens": "They schedule other drafts.",
    "output.scheduled_encoder_inputs": "They compute other images.",
    "output.preempted_req_ids": "They make other requests give way.",
    "output.finished_req_ids": "They tell the model runner of other requests that they finished.",
    "output.num_common_prefix_blocks": "They see other blocks as common to all requests.",
    "state": "They agree in what they put out, and not in what is left: queues or blocks.",
    "told": "They tell clients something else.",
    "stats": "They count something else.",
    "counts": "They count their requests otherwise, for the gather.",
    "is_open": "They decide otherwise about the gate, from the same counts.",
    "answers": "They ask the connector something else.",
}


def replay_trace(
    fixture: Fixture, *, path: str = "", device: str = "cpu", implementation: str | None = None
) -> Replay:
    """Drive a scheduler by a trace, or check the collectives of ranks.

    Args:
        fixture: of kind scheduler (a trace, or a scenario of version 0) or dp.
        path: of its file, for messages.
        device: not used: no trace needs one.
        implementation: "plain", our scheduler, which does what vLLM 0.17.0 does; "vllm", the installed one,
            which must be of the version that was recorded; a scenario runs beside it. None: "plain" where it
            does what was recorded, else "vllm". Collectives have none.

    Returns:
        What was found; of a scheduler's trace the calls that agree, and the first that does not.

    Raises:
        FixtureError: for a trace that cannot be replayed.
        InvalidArgumentError: for another implementation.
        UnavailableError: when nothing here does what was recorded; the message says what would.
    """
    if fixture.kind == "dp":
        if implementation is not None:
            invalid_argument("implementation", implementation, "none, for collectives of ranks")
        return _replay_collectives(fixture, path)
    if implementation is not None and implementation not in IMPLEMENTATIONS:
        invalid_argument("implementation", implementation, f"{' or '.join(IMPLEMENTATIONS)}, for a scheduler")
    if "scenario" in fixture.config:
        return _replay_scenario(fixture, path, implementation or PLAIN)
    config = TraceConfig.read(fixture.config, path)
    chosen = implementation or (PLAIN if config.semantics == PLAIN_VERSION else VLLM)
    traced = TracedScheduler(fixture, path, chosen)
    difference = traced.run()
    findings = [
        Finding(_stage(call), call, True, f"{count:,} calls of {call}() give what was recorded")
        for call, count in traced.compared.items()
        if call != "add_request"
    ]
    subject = PLAIN if chosen == PLAIN else f"vllm {installed_vllm.version()}"
    details = {
        "recorded": f"vllm {config.version}" if config.version else PLAIN,
        "calls": dict(traced.compared),
        "is_redacted": config.is_redacted,
    }
    if fixture.records and fixture.records[-1].get("call") == "end":
        details["end"] = str(fixture.records[-1].get("reason", ""))
    if difference is None:
        return Replay(path, fixture.kind, subject, tuple(findings), details=details)
    findings.append(_finding(difference))
    details |= {"difference": asdict(difference), "record": dict(fixture.records[difference.index])}
    diagnosis = _diagnosis(difference, subject)
    return Replay(path, fixture.kind, subject, tuple(findings), "scheduler", diagnosis, details=details)


def _stage(call: str) -> str:
    return "schedule" if call in DECISIONS else "output"


def _finding(difference: Difference) -> Finding:
    call, step = difference.call, difference.step
    where = f"step {step}, " if step is not None else ""
    values = f"{_short(difference.expected)} in the trace, {_short(difference.got)} here"
    message = f"{where}{call}(): {difference.path or 'the call'}: {values}"
    place = {"line": difference.index + 2} | ({} if step is None else {"step": step})
    return Finding(_stage(call), difference.path or call, False, message, place)


def _short(value: Any) -> str:
    return "nothing" if value is None else reprlib.repr(value)


def _diagnosis(difference: Difference, subject: str) -> str:
    """What differs, what that means, and how things stood, in plain words."""
    where = f"in step {difference.step}, " if difference.step is not None else ""
    meaning = next((text for name, text in _MEANINGS.items() if difference.path.startswith(name)), "")
    return " ".join(
        filter(
            None,
            (
                f"The first difference is {where}in {difference.call}() (line {difference.index + 2}):",
                f"{difference.path or 'the call'} is {_short(difference.expected)} in the trace and",
                f"{_short(difference.got)} with {subject}.",
                meaning,
                _words_of_state(difference.before),
            ),
        )
    )


def _words_of_state(state: Mapping[str, Any]) -> str:
    if not state:
        return ""

    def words_of(requests: Sequence[Mapping[str, Any]]) -> str:
        named = [f"{x['request']} ({x['num_computed_tokens']} of {x['num_tokens']} tokens)" for x in requests]
        return ", ".join([*named[:8], *[f"{len(named) - 8} more"] * (len(named) > 8)]) or "nobody"

    gate = {True: "; the gate was open", False: "; the gate was shut"}.get(state.get("is_open"), "")  # type: ignore[arg-type]
    return (
        f"Before it {words_of(state['running'])} ran, {words_of(state['waiting'])} waited, and "
        f"{state['free_blocks']} of {state['num_blocks'] - 1} blocks were free{gate}."
    )


def _replay_scenario(fixture: Fixture, path: str, implementation: str) -> Replay:
    """Run a scenario of version 0 to the end of all its requests; v0.17.0's known mistakes are no failure."""
    engines, scenario = _engines_and_scenario(fixture, path, implementation)
    run = run_scenario(scenario, engines)
    num_steps = run.driver.num_steps
    subject = PLAIN if implementation == PLAIN else f"{PLAIN} beside vllm {PLAIN_VERSION}"
    details = {"recorded": "scenario", "steps": num_steps, "excused": run.excused}
    known = f"; shows the known mistake {run.excused} of v0.17.0" if run.excused else ""
    message = run.failure or f"{num_steps:,} steps{known}"
    finding = Finding("schedule", "scenario", not run.failure, message, {"step": num_steps})
    blame = "scheduler" if run.failure else ""
    return Replay(path, fixture.kind, subject, (finding,), blame, run.failure, details=details)


def _engines_and_scenario(
    fixture: Fixture, path: str, implementation: str
) -> tuple[list[Callable[..., Engine]], Scenario]:
    engines: list[Callable[..., Engine]] = [CheckedEngine]
    if implementation == VLLM:
        if reason := installed_vllm.why_unavailable(PLAIN_VERSION):
            raise UnavailableError(reason)
        from .vllm017 import VLLMEngine

        engines.append(VLLMEngine)
    data = fixture.config["scenario"]
    try:
        scenario = Scenario.from_json(data.get("scenario", data) if isinstance(data, Mapping) else data)
        refuse_too_large(scenario.config)
    except InvalidArgumentError as error:
        raise FixtureError(f"{path}: {error}") from error
    return engines, scenario


def _replay_collectives(fixture: Fixture, path: str) -> Replay:
    group = read_group(fixture, path)
    mistake = find_mistake(group)
    ranks = sorted(group.lanes)
    details = {
        "dp_size": group.size,
        "ranks": ranks,
        "policy": str(group.policy) if group.policy else None,
        "collectives": {str(rank): len(group.lanes[rank]) for rank in ranks},
    }
    places = min(map(len, group.lanes.values()), default=0)
    agreed = places if mistake is None else mistake.place
    missing = group.size - len(ranks)
    of_whom = f"{len(ranks)} ranks" + (f" ({missing} of {group.size} are not in the file)" if missing else "")
    findings = [Finding("collective", "agreement", True, f"{agreed:,} collectives of {of_whom} are right")]
    if mistake is None:
        return Replay(path, fixture.kind, RECORDED, tuple(findings), details=details)
    entry = group.lanes[mistake.rank][mistake.place]
    place = {"rank": mistake.rank, "step": entry.step, "collective": mistake.place}
    findings.append(Finding("collective", mistake.name, False, mistake.message, place))
    details["mistake"] = asdict(mistake)
    diagnosis = f"Collective {mistake.place} is the first that is wrong: {mistake.message}."
    return Replay(path, fixture.kind, RECORDED, tuple(findings), "collective", diagnosis, details=details)


def minimize_trace(
    fixture: Fixture, *, path: str = "", implementation: str | None = None, seconds: float = 60.0
) -> Fixture:
    """A smaller trace that goes wrong in the same way.

    A recorded trace ends with what is wrong: without one of its requests the others would have been scheduled
    otherwise, and nobody can say how. A scenario loses what it can do without.

    Args:
        fixture: whose replay does not pass.
        path: of its file, for messages.
        implementation: see `replay_trace`.
        seconds: for a scenario, at most, about.

    Raises:
        InvalidArgumentError: for a fixture whose replay passes.
        FixtureError, UnavailableError: as `replay_trace`.
    """
    replay = replay_trace(fixture, path=path, implementation=implementation)
    if replay.passed:
        invalid_argument("fixture", path or fixture.kind, "one whose replay does not pass")
    if fixture.kind == "dp":
        return replace(fixture, records=tuple(_up_to(fixture, replay.details["mistake"]["place"])))
    if "scenario" not in fixture.config:
        end = replay.details["difference"]["index"] + 1
        return replace(fixture, records=fixture.records[:end])
    engines, scenario = _engines_and_scenario(fixture, path, implementation or PLAIN)
    smallest, _ = minimize_scenario(scenario, engines, seconds)
    return replace(fixture, config={"scenario": smallest.to_json()})


def _up_to(fixture: Fixture, place: int) -> Iterator[Mapping[str, Any]]:
    """The records of collectives up to this place in the order of each rank."""
    num_entered: Counter[Any] = Counter()
    for record in fixture.records:
        num_entered[record.get("rank")] += record.get("event", ENTERED) == ENTERED
        if num_entered[record.get("rank")] <= place + 1:
            yield record
