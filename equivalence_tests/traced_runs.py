"""Runs of schedulers and ranks in this process, recorded: what a trace of vLLM's would be, of ours.

fixture = record_scenario(Scenario.load(path))            # one scheduler, with its stand-in for a model
fixture = record_collectives(group.transport.logs)        # ranks of a Lockstep, to where they came
"""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from typing import Any

from ..fixtures.record_traces import CollectiveRecorder, SchedulerRecorder
from ..fixtures.redaction import Redaction
from ..fixtures.store import About, Fixture
from ..scheduler.admission import POLICIES
from ..scheduler.collectives import Collective
from ..scheduler.gathered_admission import GatheredAdmission
from ..scheduler.upstream import AsyncUpstreamScheduler
from .paged_model import StandInError
from .scheduler_driver import Driver
from .scheduler_engines import Engine, OurEngine
from .scheduler_scenarios import Scenario

Record = dict[str, Any]
_NOTHING = About()


class Recording:
    """A scheduler that is recorded into memory.

    Args:
        scheduler: without requests yet.
        redact: whether without tokens and texts.
        clock: s.
        config: makes the config of the trace of the scheduler, and of whether it is redacted.

    Attributes:
        records: so far, as they would be read from a file.
    """

    def __init__(
        self,
        scheduler: Any,
        *,
        redact: bool = False,
        clock: Callable[[], float] = lambda: 0.0,
        config: Callable[[Any, bool], dict[str, Any]] | None = None,
    ) -> None:
        self.config = (config or plain_config)(scheduler, redact)
        self.records: list[Record] = []
        redaction = Redaction(self.config["scheduler"]["block_size"], key=b"made") if redact else None
        self._recorder = SchedulerRecorder(scheduler, self._take, redaction=redaction, clock=clock)

    def _take(self, records: Sequence[Mapping[str, Any]]) -> bool:
        self.records.extend(json.loads(json.dumps(record)) for record in records)
        return True

    def fixture(self, about: About = _NOTHING) -> Fixture:
        """What was recorded so far."""
        return Fixture("scheduler", self.config, records=tuple(self.records), about=about)


def plain_config(scheduler: Any, redacted: bool = False) -> dict[str, Any]:
    """The config of a trace of a scheduler of scheduler/."""
    return {
        "implementation": "plain",
        "asynchronous": isinstance(scheduler, AsyncUpstreamScheduler),
        "connector": scheduler.connector is not None,
        "balance": _balance(scheduler),
        "redacted": redacted,
        "scheduler": json.loads(json.dumps(asdict(scheduler.config))),
    }


def _balance(scheduler: Any) -> dict[str, Any] | None:
    """The policy and the place of a scheduler with balance scheduling."""
    if not isinstance(scheduler, GatheredAdmission):
        return None
    policy = policy_text(scheduler.admission_policy)
    return {"policy": policy, "dp_rank": scheduler.dp_rank, "dp_size": scheduler.dp_size}


def policy_text(policy: Any) -> str:
    """The text form of one of `POLICIES`, as `make_policy` takes it."""
    (name,) = (name for name, kind in POLICIES.items() if type(policy) is kind)
    parameters = {key: x for key, x in asdict(policy).items() if key != "max_num_running_reqs"}
    return ":".join(filter(None, (name, ",".join(f"{key}={x}" for key, x in parameters.items()))))


def record_scenario(
    scenario: Scenario,
    *,
    engine: Callable[..., Engine] = OurEngine,
    redact: bool = False,
    config: Callable[[Any, bool], dict[str, Any]] | None = None,
    about: About = _NOTHING,
) -> Fixture:
    """Run a scenario, and record the scheduler.

    Args:
        scenario: what happens.
        engine: makes the scheduler.
        redact: whether without tokens and texts.
        config: as of `Recording`; default: `plain_config`, of a scheduler of scheduler/.
        about: for people.
    """
    made: list[Recording] = []

    def recorded(*args: Any, clock: Callable[[], float], **options: Any) -> Engine:
        one = engine(*args, clock=clock, **options)
        made.append(Recording(one.scheduler, redact=redact, clock=clock, config=config))
        return one

    driver = Driver(
        scenario.config,
        async_scheduling=scenario.async_scheduling,
        async_depth=scenario.async_depth,
        connector=scenario.connector,
        engines=(recorded,),
    )
    with suppress(StandInError):  # a mistake of v0.17.0 asked for what no model can do: the trace ends there
        driver.run(scenario)
    return made[0].fixture(about)


def record_collectives(
    logs: Sequence[Iterable[Collective]],
    *,
    policy: str = "",
    max_num_seqs: int = 0,
    finish_check_interval: int = 0,
    about: About = _NOTHING,
) -> Fixture:
    """The collectives that ranks have entered, as a fixture; a collective is 1 ms, in the order of the logs.

    Args:
        logs: of each rank, as `LocalTransport.logs`, whole.
        policy: of balance scheduling, in text form; "" without.
        max_num_seqs: the cap that it was made for.
        finish_check_interval: steps of a wave from one reduction to the next; 0 is not known.
        about: for people.
    """
    records: list[Record] = []

    def take(given: Sequence[Record]) -> bool:
        records.extend(given)
        return True

    for rank, log in enumerate(logs):
        now = iter(range(2**62))
        recorder = CollectiveRecorder(rank, take, clock=lambda now=now: next(now) / 1e3)
        for collective in log:
            recorder.enter(collective.name, collective.step, collective.row)
    records.sort(key=lambda record: (record["time_ms"], record["rank"]))
    config = dp_config(len(logs), policy, max_num_seqs, finish_check_interval)
    return Fixture("dp", config, records=tuple(records), about=about)


def dp_config(dp_size: int, policy: str, max_num_seqs: int, finish_check_interval: int = 0) -> dict[str, Any]:
    """The config of a trace of collectives; see `record_collectives`."""
    balance = {"policy": policy, "max_num_seqs": max_num_seqs} if policy else None
    return {"dp_size": dp_size, "balance": balance, "finish_check_interval": finish_check_interval}
