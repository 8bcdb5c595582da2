"""Drives a scheduler by the records of another one: no model, no clients, no clock.

What went into the recorded calls goes into the same calls again, and the same recorder watches them; so what
comes out is compared as records, ours or vLLM's alike. fixtures/record_traces.py makes the records.
"""

import functools
import importlib
import reprlib
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from types import SimpleNamespace
from typing import Any, NoReturn

from ..fixtures.record_traces import SchedulerRecorder
from ..fixtures.store import Fixture
from ..reference.errors import AscendTwinError, FixtureError, UnavailableError, invalid_argument
from ..scheduler.admission import RankCounts, make_policy
from ..scheduler.balance import AsyncBalanceScheduler, BalanceScheduler
from ..scheduler.checks import check_bool, check_int, read_object
from ..scheduler.config import SchedulerConfig
from ..scheduler.output import DraftTokenIds, KVConnectorOutput, ModelRunnerOutput
from ..scheduler.workload import ImageSpec
from . import installed_vllm
from .scheduler_engines import Engine, OurEngine, RequestInput
from .scheduler_scenarios import Scenario

PLAIN, VLLM = "plain", "vllm"
IMPLEMENTATIONS = (PLAIN, VLLM)
PLAIN_VERSION = "0.17.0"
"""Of vLLM: what the plain scheduler does the same as."""

MOST = {
    "num_blocks": 2**22,
    "block_size": 2**20,
    "max_model_len": 2**24,
    "num_spec_tokens": 2**10,
    "num_speculative_blocks": 2**10,
}
"""Of a configuration that a trace may ask for: memory is taken for each."""

_MOST_RANKS = 2**16
_NOT_COMPARED = ("time", "id")


class _LaterConfig(SchedulerConfig):
    """Of a later vLLM, which cuts a block that no step can hold. Source: vllm/config/vllm.py, v0.32.0."""

    def _check_whole_blocks(self) -> None:
        """Steps may be shorter than a block."""


@dataclass(frozen=True)
class TraceConfig:
    """What a trace says of the scheduler that it is of.

    Attributes:
        scenario: without events: configuration, whether it is asynchronous, whether it has a connector.
        recorded: who was recorded: "plain" or "vllm".
        version: of vLLM, "" for plain.
        balance: policy, rank and number of ranks; None without balance scheduling.
        options: of vLLM's configuration, whatever else its scheduler reads: by name, as "cache_config.name".
        is_redacted: whether tokens are names of blocks.
    """

    scenario: Scenario
    recorded: str
    version: str
    balance: tuple[str, int, int] | None
    options: Mapping[str, Any]
    is_redacted: bool

    @classmethod
    def read(cls, config: Mapping[str, Any], path: str) -> "TraceConfig":
        """Read the config of a fixture.

        Raises:
            FixtureError: for a field that does not fit.
        """
        try:
            given = dict(config)
            named = {key: given.get(key, False) for key in ("asynchronous", "connector", "redacted")}
            for key, value in named.items():
                check_bool(key, value)
            recorded, version = given.get("implementation"), given.get("version", "")
            if recorded not in IMPLEMENTATIONS or not isinstance(version, str):
                invalid_argument("implementation", reprlib.repr(recorded), "plain, or vllm with its version")
            kind = SchedulerConfig if (version or PLAIN_VERSION) == PLAIN_VERSION else _LaterConfig
            scheduler = read_object(kind, given.get("scheduler"), "scheduler", _read_field)
            refuse_too_large(scheduler)
            scenario = Scenario(
                scheduler, (), async_scheduling=named["asynchronous"], connector=named["connector"]
            )
            options = given.get("options", {})
            if not isinstance(options, Mapping) or not all(isinstance(x, _SCALARS) for x in options.values()):
                invalid_argument("options", reprlib.repr(options), "an object with numbers")
            balance = _read_balance(given.get("balance"), scenario.config.max_num_seqs)
            return cls(scenario, recorded, version, balance, options, named["redacted"])
        except AscendTwinError as error:
            raise FixtureError(f"{path}: config: {error}") from error

    @property
    def semantics(self) -> str:
        """The version of vLLM whose scheduler this one is, or does the same as."""
        return self.version or PLAIN_VERSION


def _read_field(name: str, value: object, place: str) -> object:
    return tuple(value) if isinstance(value, list) else value


def refuse_too_large(config: SchedulerConfig) -> None:
    """Raise InvalidArgumentError for a scheduler that would take more memory than `MOST` allows for."""
    for name, most in MOST.items():
        check_int(f"scheduler.{name}", getattr(config, name), 0, most)


_SCALARS = (bool, int, float, str, type(None))


def _read_balance(given: object, cap: int) -> tuple[str, int, int] | None:
    if given is None:
        return None
    if not isinstance(given, Mapping) or not isinstance(given.get("policy"), str):
        invalid_argument("balance", reprlib.repr(given), "an object with policy, dp_rank and dp_size")
    make_policy(given["policy"], cap)
    check_int("balance.dp_size", given.get("dp_size"), 1, _MOST_RANKS)
    check_int("balance.dp_rank", given.get("dp_rank"), 0, given["dp_size"] - 1)
    return given["policy"], given["dp_rank"], given["dp_size"]


@dataclass(frozen=True)
class Difference:
    """The first place where a scheduler does something else than the trace says.

    Attributes:
        index: of the record.
        call: what was called.
        step: of the scheduler, None where the call belongs to none.
        path: of the field in the record.
        expected, got: what the trace says, and what came out; None is nothing.
        before: state before the call.
    """

    index: int
    call: str
    step: int | None
    path: str
    expected: Any
    got: Any
    before: Mapping[str, Any] = field(default_factory=dict)


class TracedScheduler:
    """A scheduler that is driven by a trace.

    Args:
        fixture: of kind scheduler, with records.
        path: of its file, for messages.
        implementation: "plain", or "vllm", the installed one.

    Attributes:
        compared: calls so far, by name, of which all that came out was as recorded.

    Raises:
        FixtureError: for a configuration or, from `run`, a record that cannot be replayed.
        UnavailableError: where the scheduler that was recorded is not to be had.
    """

    def __init__(self, fixture: Fixture, path: str = "", implementation: str = PLAIN) -> None:
        self.fixture, self.path, self.implementation = fixture, path, implementation
        self.config = TraceConfig.read(fixture.config, path)
        self.compared: Counter[str] = Counter()
        self._script = _Script()
        self._now = 0.0
        self._ids: dict[str, str] = {}
        self._emitted: list[Mapping[str, Any]] = []
        self._steps: dict[int, Any] = {}
        connector = _Connector(self._script) if self.config.scenario.connector else None
        refuse_what_cannot_run(self.config, implementation)
        make, context = _engine_of(self.config, implementation)
        try:
            with context:
                self.engine: Engine = make(
                    self.config.scenario.config,
                    asynchronous=self.config.scenario.async_scheduling,
                    clock=lambda: self._now,
                    connector=connector,
                    structured_output_manager=None,
                )
        except AscendTwinError as error:
            if isinstance(error, UnavailableError):
                raise
            raise FixtureError(f"{path}: config: {error}") from error
        self.scheduler = self.engine.scheduler
        self.scheduler.structured_output_manager = _Grammars(self._script)
        self._names: dict[str, str] = {}
        self._recorder = SchedulerRecorder(
            self.scheduler, self._take, clock=lambda: self._now, names=self._names
        )

    def _take(self, records: Sequence[Mapping[str, Any]]) -> bool:
        self._emitted.extend(records)
        return True

    def run(self, end: int | None = None) -> Difference | None:
        """Replay the records up to `end`, or all; the first difference, or None."""
        for index, record in enumerate(self.fixture.records[:end]):
            if record.get("call") == "end":
                break
            if difference := self._replay(index, record):
                before = TracedScheduler(self.fixture, self.path, self.implementation)
                before.run(index)
                return replace(difference, before=before.state())
            self.compared[str(record.get("call"))] += 1
        return None

    def _replay(self, index: int, record: Mapping[str, Any]) -> Difference | None:
        call = self._prepare(index, record)
        self._emitted.clear()
        raised = ""
        try:
            call()
        except Exception as error:  # whatever a scheduler raises is what it does
            raised = f"{type(error).__name__}: {error}"
        name, step = str(record["call"]), record.get("step")
        found = partial(Difference, index, name, step if isinstance(step, int) else None)
        if bool(raised) != ("error" in record):
            return found("error", record.get("error"), raised or None)
        if name == "add_request" or raised:
            return None
        if len(self._emitted) != 1:
            return found("", f"{name}() has an effect", f"{len(self._emitted)} effects")
        return (where := _first_difference(_compared(record), _compared(self._emitted[0]))) and found(*where)

    # What a record asks for. Everything is read before the scheduler is called.

    def _prepare(self, index: int, record: Mapping[str, Any]) -> Callable[[], Any]:
        """The call that a record asks for."""
        name = record.get("call")
        prepare = getattr(self, f"_on_{name}", None) if isinstance(name, str) else None
        if prepare is None or not hasattr(self.scheduler, str(name)):
            known = ", ".join(x.removeprefix("_on_") for x in dir(self) if x.startswith("_on_"))
            self._refuse(index, f"call is {reprlib.repr(name)}; allowed here: {known}")
        try:
            self._now = float(record.get("time", self._now))
            self._script.answers = deque(record.get("answers", ()))
            self._script.allowed = {self._id(x): n for x, n in record.get("allowed", {}).items()}
            return prepare(record)
        except FixtureError:
            raise
        except AscendTwinError as error:
            self._refuse(index, f"{name}: {error}")
        except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
            self._refuse(index, f"{name}: {type(error).__name__}: {error}")

    def _refuse(self, index: int, reason: str) -> NoReturn:
        raise FixtureError(f"{self.path}:{index + 2}: {reason}")

    def _id(self, name: str) -> str:
        return self._ids[name]

    def _step(self, record: Mapping[str, Any]) -> Any:
        return self._steps[record["step"]]

    def _on_add_request(self, record: Mapping[str, Any]) -> Callable[[], Any]:
        if special := record.get("special"):
            raise ValueError(f"{record['request']} asks for {', '.join(special)}, which no trace can replay")
        name = record["request"]
        request_id = self._ids.setdefault(name, record.get("id") or name)
        self._names[request_id] = name
        spec = SimpleNamespace(
            request_id=request_id,
            stop_token_ids=tuple(record.get("stop_token_ids", ())),
            priority=record.get("priority", 0),
            client_index=record.get("client_index", 0),
            lora=record.get("lora"),
            cache_salt=record.get("cache_salt"),
            structured=record.get("structured", False),
        )
        given = RequestInput(
            prompt_token_ids=list(record["prompt_token_ids"]),
            max_tokens=record["max_tokens"],
            min_tokens=record.get("min_tokens", 0),
            eos_token_id=record.get("eos_token_id"),
            images=tuple(
                ImageSpec(identifier, offset, length, None if embed is None else tuple(map(bool, embed)))
                for identifier, offset, length, embed in record.get("images", ())
            ),
            arrival_time=record["arrival_time"],
            resumable=record.get("resumable", False),
            skip_reading_prefix_cache=record.get("skip_reading_prefix_cache", False),
        )
        request = self.engine.make_request(spec, given)  # type: ignore[arg-type]
        return lambda: self.scheduler.add_request(request)

    def _on_schedule(self, record: Mapping[str, Any]) -> Callable[[], Any]:
        for name, is_ready in record.get("grammars", {}).items():
            request_id = self._id(name)
            structured = self.scheduler.requests[request_id].structured_output_request
            structured.grammar = _Grammar(request_id, self._script) if is_ready else ValueError("as recorded")
        arguments = (True,) * bool(record.get("throttle_prefills"))
        step = record.get("step")

        def call() -> None:
            self._steps[step] = self.scheduler.schedule(*arguments)  # type: ignore[index]

        return call

    def _on_get_grammar_bitmask(self, record: Mapping[str, Any]) -> Callable[[], Any]:
        return partial(self.scheduler.get_grammar_bitmask, self._step(record))

    def _on_update_from_output(self, record: Mapping[str, Any]) -> Callable[[], Any]:
        output = self._step(record)
        sampled = {self._id(name): list(ids) for name, ids in record.get("sampled", {}).items()}
        rejected = [name for name, told in record.get("told", {}).items() if _is_error(told)]
        self._script.rejected = {self._id(name) for name in rejected}
        ids = list(dict.fromkeys([*output.num_scheduled_tokens, *sampled]))
        result = self.engine.native_output(
            ModelRunnerOutput(ids, [sampled.get(x, []) for x in ids], self._transfers(record))
        )
        del self._steps[record["step"]]
        return lambda: self.scheduler.update_from_output(output, result)

    def _transfers(self, record: Mapping[str, Any]) -> KVConnectorOutput | None:
        given = record.get("transfers")
        if given is None:
            return None
        if "failed_recving" in given:
            raise ValueError("a load that failed by the name of its request cannot be replayed")
        sent, received = ([self._id(x) for x in given.get(f"finished_{kind}", ())] for kind in _TRANSFERS)
        # In the recorded order: a set of texts has another one in every process.
        return KVConnectorOutput(sent, received, set(given.get("invalid_block_ids", ())))  # type: ignore[arg-type]

    def _drafts(self, record: Mapping[str, Any]) -> Any:
        drafts = {self._id(name): list(ids) for name, ids in record["drafts"].items()}
        return self.engine.native_drafts(DraftTokenIds(list(drafts), list(drafts.values())))

    def _on_update_draft_token_ids(self, record: Mapping[str, Any]) -> Callable[[], Any]:
        return partial(self.scheduler.update_draft_token_ids, self._drafts(record))

    def _on_update_draft_token_ids_in_output(self, record: Mapping[str, Any]) -> Callable[[], Any]:
        drafts, step = self._drafts(record), self._step(record)
        return partial(self.scheduler.update_draft_token_ids_in_output, drafts, step)

    def _on_finish_requests(self, record: Mapping[str, Any]) -> Callable[[], Any]:
        status = self.engine.statuses[record["status"]]
        return partial(self.scheduler.finish_requests, self._id(record["request"]), status)

    def _on_set_pause_state(self, record: Mapping[str, Any]) -> Callable[[], Any]:
        return partial(self.scheduler.set_pause_state, self.engine.pause_states(record["state"]))

    def _on_reset_prefix_cache(self, record: Mapping[str, Any]) -> Callable[[], Any]:
        names = ("reset_running_requests", "reset_connector")
        return partial(self.scheduler.reset_prefix_cache, *(bool(record[name]) for name in names))

    def _on_reset_encoder_cache(self, record: Mapping[str, Any]) -> Callable[[], Any]:
        return self.scheduler.reset_encoder_cache

    def _on_counts(self, record: Mapping[str, Any]) -> Callable[[], Any]:
        return self.scheduler.counts

    def _on_observe(self, record: Mapping[str, Any]) -> Callable[[], Any]:
        return partial(self.scheduler.observe, [RankCounts(*row) for row in record["gathered"]])

    # What it looks like

    def state(self) -> dict[str, Any]:
        """Requests and blocks, as JSON values."""
        s = self.scheduler
        waiting = [*getattr(s, "kv_holding_waiting", ()), *s.waiting]
        tables = [group.req_to_blocks for group in self.engine.groups()]
        pool = s.kv_cache_manager.block_pool

        def of_request(request: Any) -> dict[str, Any]:
            return {
                "request": self._names.get(request.request_id, request.request_id),
                "status": request.status.name,
                "num_computed_tokens": request.num_computed_tokens,
                "num_tokens": request.num_tokens,
                "num_blocks": sum(len(table.get(request.request_id, ())) for table in tables),
            }

        state: dict[str, Any] = {
            "running": [of_request(x) for x in s.running],
            "waiting": [of_request(x) for x in waiting],
            "free_blocks": len(self.engine.free_block_ids()),
            "num_blocks": len(pool.blocks),
            "steps_in_flight": len(self._steps),
        }
        if self.config.balance:
            state["is_open"] = s.is_open
        return state


_TRANSFERS = ("sending", "recving")


def refuse_what_cannot_run(config: TraceConfig, implementation: str) -> None:
    """Raise UnavailableError unless this implementation does the same as the one that was recorded."""
    if implementation not in IMPLEMENTATIONS:
        invalid_argument("implementation", implementation, f"one of {', '.join(IMPLEMENTATIONS)}")
    needed = config.semantics
    if implementation == VLLM:
        if needed not in installed_vllm.VERSIONS:
            raise UnavailableError(
                f"recorded with vLLM {needed}, and traces of {' and '.join(installed_vllm.VERSIONS)} can be "
                "replayed"
            )
        if reason := installed_vllm.why_unavailable(needed):
            raise UnavailableError(f"recorded with vLLM {needed}: {reason}")
    elif needed != PLAIN_VERSION:
        raise UnavailableError(
            f"recorded with vLLM {needed}, and the plain scheduler does what vLLM {PLAIN_VERSION} does: it "
            f"decides otherwise. Replay with --implementation vllm where vLLM {needed} is installed"
            + (f" (tox environment {env})" if (env := installed_vllm.VERSIONS.get(needed)) else "")
        )
    elif several := [name for name in _RANKS_OF_A_MODEL if config.options.get(name, 1) != 1]:
        raise UnavailableError(
            f"recorded with {', '.join(several)} above 1, of which the plain scheduler knows nothing"
        )


_RANKS_OF_A_MODEL = tuple(
    f"parallel_config.{kind}_size"
    for kind in ("pipeline_parallel", "decode_context_parallel", "prefill_context_parallel")
)


def _engine_of(
    config: TraceConfig, implementation: str
) -> tuple[Callable[..., Engine], AbstractContextManager[None]]:
    """What makes the engine, and in which context."""
    if implementation == PLAIN:
        return _plain_engine(config), nullcontext()
    from . import vllm_balance

    context = vllm_balance.hook_in_place() if config.balance else nullcontext()
    return _vllm_engine(config, vllm_balance.real_engine()), context


def _plain_engine(config: TraceConfig) -> type[Engine]:
    if config.balance is None:
        return OurEngine
    policy, dp_rank, dp_size = config.balance
    made = make_policy(policy, config.scenario.config.max_num_seqs)
    kinds = BalanceScheduler, AsyncBalanceScheduler
    schedulers = tuple(partial(kind, policy=made, dp_rank=dp_rank, dp_size=dp_size) for kind in kinds)
    return type("BalanceEngine", (OurEngine,), {"schedulers": schedulers})


def _vllm_engine(config: TraceConfig, real: Any) -> type[Engine]:
    """The installed vLLM's engine, with all that its configuration said."""

    class TracedEngine(real):
        def vllm_config(self, scheduler_config: Any, asynchronous: bool) -> SimpleNamespace:
            made = super().vllm_config(scheduler_config, asynchronous)
            for name, value in config.options.items():
                *parents, last = name.split(".")
                setattr(functools.reduce(getattr, parents, made), last, value)
            if config.balance is not None:
                policy, rank, size = config.balance
                vars(made.parallel_config).update(data_parallel_rank=rank, data_parallel_size=size)
                made.additional_config = {"ascend_twin": {"balance": {"policy": policy}}}
            return made

        def make_scheduler(self, asynchronous: bool, **arguments: Any) -> Any:
            if config.balance is None:
                return super().make_scheduler(asynchronous, **arguments)
            module = importlib.import_module("ascend_twin.optimized.vllm.balance")
            return module.BalanceScheduler(**arguments)

    return TracedEngine


def _is_error(told: object) -> bool:
    return isinstance(told, Mapping) and told.get("finish_reason") == "error"


# What answers in the place of connectors and grammars


@dataclass
class _Script:
    """What was answered in the call that is replayed.

    Attributes:
        answers: of the connector, in order: method, request where there is one, and what it said.
        allowed: drafts that the grammar of a request lets pass.
        rejected: requests whose grammar does not take what was sampled.
    """

    answers: deque[list[Any]] = field(default_factory=deque)
    allowed: Mapping[str, int] = field(default_factory=dict)
    rejected: set[str] = field(default_factory=set)

    def answer(self, method: str) -> list[Any]:
        """The next answer, if this is what was asked; else that there is nothing."""
        if self.answers and self.answers[0][0] == method:
            return self.answers.popleft()
        return [method, "", None, False]


class _Connector:
    """Says what a connector has said. Source: vllm/distributed/kv_transfer/kv_connector/v1/base.py."""

    def __init__(self, script: _Script) -> None:
        self._script = script

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int | None, bool]:
        _, _, num_tokens, is_async = self._script.answer("get_num_new_matched_tokens")
        return num_tokens, is_async

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        """Nothing is loaded."""

    def build_connector_meta(self, scheduler_output: Any) -> None:
        """Nobody reads it."""

    def update_connector_output(self, connector_output: Any) -> None:
        """Nothing was."""

    def request_finished(self, request: Any, block_ids: Sequence[int]) -> tuple[bool, None]:
        return bool(self._script.answer("request_finished")[2]), None

    def reset_cache(self) -> Any:
        return self._script.answer("reset_cache")[1]

    def take_events(self) -> tuple[()]:
        return ()

    def get_kv_connector_stats(self) -> None:
        """None are made."""

    def shutdown(self) -> None:
        """Nothing is open."""


@dataclass
class _Grammar:
    """The grammar of a request."""

    request_id: str
    script: _Script

    def accept_tokens(self, request_id: str, token_ids: Sequence[int]) -> bool:
        return request_id not in self.script.rejected

    def validate_tokens(self, token_ids: list[int]) -> list[int]:
        return token_ids[: self.script.allowed.get(self.request_id, len(token_ids))]


class _Grammars:
    """What the schedulers of all versions ask about grammars."""

    def __init__(self, script: _Script) -> None:
        self._script = script

    def should_advance(self, request: Any) -> bool:
        return bool(request.use_structured_output)

    def grammar_bitmask(self, *args: Any) -> tuple[()]:
        return ()

    def accept_tokens(self, request: Any, token_ids: Sequence[int]) -> bool:
        return request.request_id not in self._script.rejected

    def validate_tokens(self, request: Any, token_ids: list[int]) -> list[int]:
        if not request.use_structured_output:
            return token_ids
        return token_ids[: self._script.allowed.get(request.request_id, len(token_ids))]


# What differs


def _compared(record: Mapping[str, Any]) -> dict[str, Any]:
    return {name: x for name, x in record.items() if name not in _NOT_COMPARED}


def _first_difference(expected: Any, got: Any, path: str = "") -> tuple[str, Any, Any] | None:
    """Path and both values of the first place where two JSON values differ; the order of an object counts."""
    if isinstance(expected, Mapping) and isinstance(got, Mapping):
        for name in {**expected, **got}:
            inner = f"{path}.{name}" if path else str(name)
            if found := _first_difference(expected.get(name), got.get(name), inner):
                return found
        same_order = list(expected) == list(got) or path in _UNORDERED
        return None if same_order else (f"{path} (order)", list(expected), list(got))
    if isinstance(expected, list | tuple) and isinstance(got, list | tuple) and len(expected) == len(got):
        for i, (a, b) in enumerate(zip(expected, got, strict=True)):
            if found := _first_difference(a, b, f"{path}[{i}]"):
                return found
        return None
    return None if expected == got and type(expected) is type(got) else (path, expected, got)


_UNORDERED = ("", "output", "state", "stats", "told", "sampled")
