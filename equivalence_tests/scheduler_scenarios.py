"""What happens to a scheduler, as data: a configuration and events, which can be saved and replayed."""

import json
import reprlib
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any

from ..reference.errors import InvalidArgumentError, invalid_argument
from ..scheduler.checks import check_bool, check_int, check_type, read_object
from ..scheduler.config import SchedulerConfig
from ..scheduler.workload import RequestSpec


@dataclass(frozen=True)
class Add:
    """A request arrives; `keep_blocks`: its connector keeps its blocks when it has finished."""

    request: RequestSpec
    keep_blocks: bool = False

    def __post_init__(self) -> None:
        check_type("request", self.request, RequestSpec)
        check_bool("keep_blocks", self.keep_blocks)


@dataclass(frozen=True)
class Step:
    """`count` steps of the engine; `eager`: the model has always finished when the engine asks (async)."""

    count: int = 1
    eager: bool = False

    def __post_init__(self) -> None:
        check_int("count", self.count, 1)
        check_bool("eager", self.eager)


@dataclass(frozen=True)
class Abort:
    """A client gives up the requests `targets`, or all; `late`: while the model executes the next step."""

    targets: tuple[int, ...] | None
    late: bool = False

    def __post_init__(self) -> None:
        if self.targets is not None:
            if not isinstance(self.targets, tuple):
                invalid_argument("targets", reprlib.repr(self.targets), "a tuple of ints, or None")
            for i, target in enumerate(self.targets):
                check_int(f"targets[{i}]", target, 0)
        check_bool("late", self.late)


@dataclass(frozen=True)
class Pause:
    """Into pause state 0 (not paused), 1 (nothing new) or 2 (nothing at all)."""

    state: int

    def __post_init__(self) -> None:
        check_int("state", self.state, 0, 2)


@dataclass(frozen=True)
class ResetPrefixCache:
    """Forget cached blocks; `running`: preempt all first; `connector`: the remote ones too."""

    running: bool = False
    connector: bool = False

    def __post_init__(self) -> None:
        check_bool("running", self.running)
        check_bool("connector", self.connector)


@dataclass(frozen=True)
class ResetEncoderCache:
    """Forget encoder outputs."""


@dataclass(frozen=True)
class GrammarReady:
    """The grammar of one of the requests that wait for one has been compiled."""

    index: int

    def __post_init__(self) -> None:
        check_int("index", self.index, 0)


@dataclass(frozen=True)
class SessionInput:
    """The next input of a session, or its end after the last."""

    index: int

    def __post_init__(self) -> None:
        check_int("index", self.index, 0)


@dataclass(frozen=True)
class RemoteDone:
    """A load under way ends, well or with `failed_block` not loaded.

    Without one under way, `failed_block` is not loaded by the next load that is part of a step.
    """

    index: int
    failed_block: int | None = None

    def __post_init__(self) -> None:
        check_int("index", self.index, 0)
        if self.failed_block is not None:
            check_int("failed_block", self.failed_block, 0)


@dataclass(frozen=True)
class SendingDone:
    """Kept blocks of a finished request are no longer needed."""

    index: int

    def __post_init__(self) -> None:
        check_int("index", self.index, 0)


Event = (
    Add
    | Step
    | Abort
    | Pause
    | ResetPrefixCache
    | ResetEncoderCache
    | GrammarReady
    | SessionInput
    | RemoteDone
    | SendingDone
)
EVENTS: dict[str, type[Event]] = {kind.__name__: kind for kind in Event.__args__}


@dataclass(frozen=True)
class Scenario:
    """What happens to a scheduler. Every sequence of events is valid.

    An index counts among the requests that the event can apply to, modulo their number; an event that applies
    to nothing does nothing.

    Attributes:
        config: of the scheduler.
        async_scheduling: `AsyncScheduler`, with a queue of batches.
        async_depth: batches in the queue, at most, >= 2.
        connector: whether there is a remote KV cache; for one group of full attention alone.
        events: in order.

    Raises:
        InvalidArgumentError: for the first field that is not as above; from events, too.
    """

    config: SchedulerConfig
    events: tuple[Event, ...]
    async_scheduling: bool = False
    async_depth: int = 2
    connector: bool = False

    def __post_init__(self) -> None:
        check_type("config", self.config, SchedulerConfig)
        if not isinstance(self.events, tuple) or not all(isinstance(event, Event) for event in self.events):
            invalid_argument("events", reprlib.repr(self.events), "a tuple, each of it an event")
        check_int("async_depth", self.async_depth, 2)
        check_bool("async_scheduling", self.async_scheduling)
        check_bool("connector", self.connector)
        if self.connector and self.config.kv_groups != ("full_attention",):
            invalid_argument("connector", True, f"False with kv_groups {self.config.kv_groups}")

    def to_json(self) -> dict[str, Any]:
        """As a JSON object; fields that have their default value are left out."""
        return {
            "config": _without_defaults(self.config),
            "async_scheduling": self.async_scheduling,
            "async_depth": self.async_depth,
            "connector": self.connector,
            "events": [{"event": type(e).__name__, **_without_defaults(e)} for e in self.events],
        }

    @classmethod
    def from_json(cls, data: object) -> "Scenario":
        """The inverse of `to_json`.

        Raises:
            InvalidArgumentError: the message starts with the path of the field that does not fit.
        """
        try:
            return read_object(cls, data, "", _read_field)
        except RecursionError:
            raise InvalidArgumentError("the scenario is nested too deeply") from None

    def save(self, path: str | Path) -> None:
        """Write it as a JSON file, one event a line."""
        data = self.to_json()
        events = ",\n".join(f"  {json.dumps(event)}" for event in data.pop("events"))
        head = json.dumps(data, indent=1).removesuffix("\n}")
        Path(path).write_text(f'{head},\n "events": [\n{events}\n ]\n}}\n', encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> "Scenario":
        """Read a file of `save`, or the scenario of a case of fixtures/cases/scheduler.

        Raises:
            OSError: when the file cannot be read.
            InvalidArgumentError: when it is not JSON, or as in `from_json`.
        """
        try:
            data = json.loads(Path(path).read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            raise InvalidArgumentError(f"the file is not JSON: {error}") from None
        return cls.from_json(data["scenario"] if isinstance(data, dict) and "scenario" in data else data)


def _without_defaults(value: Any) -> dict[str, Any]:
    named = {f.name: (getattr(value, f.name), f.default) for f in fields(value)}
    return {
        name: x.to_json() if isinstance(x, RequestSpec) else x
        for name, (x, default) in named.items()
        if default is MISSING or x != default
    }


def _read_field(name: str, value: object, place: str) -> object:
    if name == "config":
        return read_object(SchedulerConfig, value, place, _read_field)
    if name == "request" and isinstance(value, dict):
        try:
            return RequestSpec.from_json(value)
        except InvalidArgumentError as error:
            raise InvalidArgumentError(f"{place}.{error}") from None
    if isinstance(value, list):
        return tuple(_event(x, f"{place}[{i}]") if name == "events" else x for i, x in enumerate(value))
    return value


def _event(data: object, place: str) -> Event:
    name = data.get("event") if isinstance(data, dict) else None
    if not isinstance(data, dict) or not isinstance(name, str) or name not in EVENTS:
        invalid_argument(place, reprlib.repr(data), f"an object whose event is one of {', '.join(EVENTS)}")
    values = {key: x for key, x in data.items() if key != "event"}
    return read_object(EVENTS[name], values, place, _read_field)
