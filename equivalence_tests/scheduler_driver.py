"""Drives one or two schedulers through a scenario, event by event, and compares everything that can be seen.

A scenario is plain data: a configuration and events, which run on our scheduler, on vLLM's, or on both. Each
engine has a model stand-in and a connector of its own, so that nothing but the scheduler decides what
happens. After every event each field of every output and the whole state are compared, exactly, and the first
difference is an error that names its path and both values.
"""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from ..reference.errors import SchedulerStateError, invalid_argument
from ..scheduler.config import SchedulerConfig
from ..scheduler.request import RequestStatus
from ..scheduler.workload import RequestSpec
from .paged_model import (
    OutputOracle,
    PagedModel,
    StandInConnector,
    StandInGrammar,
    StandInStructuredOutputManager,
)
from .scheduler_comparison import SchedulerDifference, first_difference, plain
from .scheduler_engines import Engine, OurEngine, RequestInput
from .scheduler_features import Features
from .scheduler_scenarios import (
    Abort,
    Add,
    Event,
    GrammarReady,
    Pause,
    RemoteDone,
    ResetEncoderCache,
    ResetPrefixCache,
    Scenario,
    SendingDone,
    SessionInput,
    Step,
)


class _Connector(StandInConnector):
    """Counts how often it could not say yet what the remote cache holds."""

    num_unanswered = 0

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int | None, bool]:
        answer = super().get_num_new_matched_tokens(request, num_computed_tokens)
        self.num_unanswered += answer[0] is None
        return answer


@dataclass
class Lane:
    """An engine and what belongs to it alone."""

    engine: Engine
    model: PagedModel
    connector: _Connector | None
    queue: deque[tuple[Any, Any]]  # async scheduling: (scheduler output, step of the model), the newest first


class _CrashError(Exception):
    """All engines raised at the same place."""


class Driver:
    """Applies events to one engine, or to two of which nobody may see a difference.

    Args:
        config: of the schedulers.
        async_scheduling, async_depth, connector: as in `Scenario`.
        engines: one or two classes: `OurEngine`, `vllm017.VLLMEngine`.
        oracle: is told every request and every output of the first engine, and may raise; None is nobody.
        snapshot_every: steps and other events from one comparison of the whole state to the next.

    Attributes:
        features: how often each feature was at work, and `upstream_crash`.
        crash: when all engines raised, what they said; nothing happens after that.
        num_steps: of the engine, so far.

    Raises:
        SchedulerDifference: from `apply`, when the engines differ.
    """

    def __init__(
        self,
        config: SchedulerConfig,
        *,
        async_scheduling: bool = False,
        async_depth: int = 2,
        connector: bool = False,
        engines: Sequence[Callable[..., Engine]] = (OurEngine,),
        oracle: OutputOracle | None = None,
        snapshot_every: int = 1,
    ) -> None:
        if async_depth < 2:
            invalid_argument("async_depth", async_depth, ">= 2")
        self.config = config
        self.async_scheduling = async_scheduling
        self.async_depth = async_depth
        self.oracle = oracle
        self.snapshot_every = snapshot_every
        self.features = Features(config)
        self.crash: str | None = None
        self.num_steps = 0
        self.now = 0.0
        self.lanes = [self._lane(engine, connector) for engine in engines]
        self._specs: dict[str, RequestSpec] = {}
        self._num_inputs: dict[str, int] = {}
        self._late_aborts: list[str] = []
        self._num_snapshots = 0

    def _lane(self, engine: Callable[..., Engine], has_connector: bool) -> Lane:
        connector = _Connector(self.config) if has_connector else None
        made = engine(
            self.config,
            asynchronous=self.async_scheduling,
            clock=lambda: self.now,
            connector=connector,
            structured_output_manager=StandInStructuredOutputManager(),
        )
        return Lane(made, made.model(self.config, asynchronous=self.async_scheduling), connector, deque())

    @property
    def first(self) -> Engine:
        """The engine by which features are counted and indices resolved."""
        return self.lanes[0].engine

    def run(self, scenario: Scenario) -> None:
        """Apply all events of a scenario that was made for this configuration."""
        for event in scenario.events:
            self.apply(event)

    def apply(self, event: Event) -> None:
        """Apply one event, and compare the whole state."""
        if self.crash is not None:
            return
        self.now += 1.0
        try:
            getattr(self, f"_on_{type(event).__name__}")(event)
            self.features.count_kept_blocks(self.first)
            if not isinstance(event, Step):
                self._compare_snapshots(event)  # a Step does so after each of its steps
        except _CrashError:
            self.features["upstream_crash"] += 1

    # Events

    def _on_Add(self, event: Add) -> None:
        spec = event.request
        if spec.request_id in self._specs or spec.num_prompt_tokens >= self.config.max_model_len:
            return  # the frontend refuses both
        self._specs[spec.request_id] = spec
        self._num_inputs[spec.request_id] = 0
        if self.oracle:
            self.oracle.add_request(spec)
        for lane in self.lanes:
            lane.model.add_request(spec)
            if lane.connector:
                lane.connector.add_request(spec)
        self._give_input(spec, keep_blocks=event.keep_blocks)

    def _give_input(self, spec: RequestSpec, *, keep_blocks: bool = False) -> None:
        number = self._num_inputs[spec.request_id]
        self._num_inputs[spec.request_id] += 1
        time = spec.arrival_ms / 1e3 if number == 0 else self.now
        self._each(
            "add_request()",
            lambda lane: lane.engine.add(spec, RequestInput.of(spec, number, time, keep_blocks=keep_blocks)),
        )

    def _on_SessionInput(self, event: SessionInput) -> None:
        open_sessions = [
            spec
            for request_id, spec in self._specs.items()
            if spec.chunks is not None
            and self._num_inputs[request_id] <= len(spec.chunks) + 1
            and self._is_alive(request_id)
        ]
        if open_sessions:
            spec = open_sessions[event.index % len(open_sessions)]
            if not self._fits_another_input(spec):
                self._num_inputs[spec.request_id] = len(spec.chunks or ()) + 1
            self.features["session_ended"] += self._num_inputs[spec.request_id] > len(spec.chunks or ())
            self._give_input(spec)

    def _fits_another_input(self, spec: RequestSpec) -> bool:
        """Whether the next chunk of a session fits into max_model_len, however long its outputs are."""
        parts = (spec, *(spec.chunks or ()))[: self._num_inputs[spec.request_id] + 1]
        lengths = [sum(length for _, length in part.segments) + spec.max_tokens for part in parts]
        return sum(lengths) < self.config.max_model_len

    def _is_alive(self, request_id: str) -> bool:
        request = self.first.scheduler.requests.get(request_id)
        return request is not None and request.status <= RequestStatus.PREEMPTED

    def _on_Abort(self, event: Abort) -> None:
        requests = self.first.scheduler.requests
        ids = list(requests)
        chosen = ids if event.targets is None else [ids[i % len(ids)] for i in event.targets if ids]
        if event.late:
            self._late_aborts.extend(chosen)
            return
        self._abort(chosen, all_of_them=event.targets is None)

    def _abort(self, request_ids: list[str], *, all_of_them: bool = False) -> None:
        requests = self.first.scheduler.requests
        for request_id in dict.fromkeys(request_ids):
            if request_id in requests:
                self.features[f"abort_{RequestStatus(requests[request_id].status).name.lower()}"] += 1
        self._each("finish_requests()", lambda lane: lane.engine.abort(None if all_of_them else request_ids))

    def _on_Pause(self, event: Pause) -> None:
        self._each("set_pause_state()", lambda lane: lane.engine.set_pause_state(event.state))

    def _on_ResetPrefixCache(self, event: ResetPrefixCache) -> None:
        done = self._each(
            "reset_prefix_cache()",
            lambda lane: lane.engine.scheduler.reset_prefix_cache(
                reset_running_requests=event.running, reset_connector=event.connector
            ),
        )
        self.features["reset_prefix_cache"] += bool(done[0])
        self.features["reset_running"] += event.running
        self.features["reset_connector"] += event.connector

    def _on_ResetEncoderCache(self, event: ResetEncoderCache) -> None:
        self._each("reset_encoder_cache()", lambda lane: lane.engine.scheduler.reset_encoder_cache())
        for lane in self.lanes:
            lane.model.reset_encoder_cache()
        self.features["reset_encoder_cache"] += 1

    def _on_GrammarReady(self, event: GrammarReady) -> None:
        waiting = [
            request_id
            for request_id, request in self.first.scheduler.requests.items()
            if request.use_structured_output and request.structured_output_request.grammar is None
        ]
        if waiting:
            for lane in self.lanes:
                request = lane.engine.scheduler.requests[waiting[event.index % len(waiting)]]
                request.structured_output_request.grammar = StandInGrammar()

    def _on_RemoteDone(self, event: RemoteDone) -> None:
        def end_load(lane: Lane) -> None:
            if lane.model.loading:
                request_id = lane.model.loading[event.index % len(lane.model.loading)]
                lane.model.finish_load(request_id, event.failed_block)
            elif event.failed_block is not None:
                lane.model.fail_next_load(event.failed_block)

        self._each("the model", end_load)

    def _on_SendingDone(self, event: SendingDone) -> None:
        def end_sending(lane: Lane) -> None:
            if lane.model.sending:
                lane.model.finish_send(lane.model.sending[event.index % len(lane.model.sending)])

        self._each("the model", end_sending)

    # Steps, as vllm/v1/engine/core.py (v0.17.0) makes them

    def _on_Step(self, event: Step) -> None:
        for _ in range(event.count):
            queued = len(self.lanes[0].queue)
            if not self.first.scheduler.has_requests() and not queued:
                return
            self.now += 1.0
            self.num_steps += 1
            if self.async_scheduling:
                self._step_with_batch_queue(eager=event.eager)
            else:
                self._step()
            self._compare_snapshots(event)

    def _step(self) -> None:
        outs, steps = self._schedule()
        self._sample(outs, steps)
        self._update(outs, steps)
        if self.config.num_spec_tokens and outs[0].total_num_scheduled_tokens:
            drafts = self._take_drafts()
            if drafts[0] is not None:
                lengths = dict(zip(drafts[0].req_ids, map(len, drafts[0].draft_token_ids), strict=True))
                self._each_with(
                    "update_draft_token_ids()", drafts, lambda lane, x: lane.engine.update_drafts(x)
                )
                self.features.after_drafts(self.first, lengths)

    def _step_with_batch_queue(self, *, eager: bool) -> None:
        """One call of `EngineCore.step_with_batch_queue`; the model is never found ready, unless `eager`."""
        deferred: tuple[list[Any], list[Any]] | None = None
        if self.first.scheduler.has_requests():
            outs, steps = self._schedule()
            executed = outs[0].total_num_scheduled_tokens > 0
            if executed and outs[0].pending_structured_output_tokens:
                deferred = outs, steps
            else:
                self._sample(outs, steps)
                self._push(outs, steps)
                if executed and len(self.lanes[0].queue) < self.async_depth and not eager:
                    return
        if not self.lanes[0].queue:  # v0.17.0 takes from an empty queue here
            self.crash = f"{self._place('the batch queue')}: sampling is deferred, and nothing is in flight"
            raise _CrashError
        popped = [lane.queue.pop() for lane in self.lanes]
        self._update([out for out, _ in popped], [step for _, step in popped])
        if deferred:
            outs, steps = deferred
            if self.config.num_spec_tokens:
                self._each_with(
                    "update_draft_token_ids_in_output()",
                    list(zip(self._take_drafts(), outs, strict=True)),
                    lambda lane, given: lane.engine.update_drafts_in_output(*given),
                )
                self._compare("update_draft_token_ids_in_output()", outs)
                self.features["invalid_draft"] += bool(outs[0].num_invalid_spec_tokens)
            self._sample(outs, steps)
            self._push(outs, steps)

    def _push(self, outs: list[Any], steps: list[Any]) -> None:
        for lane, out, step in zip(self.lanes, outs, steps, strict=True):
            lane.queue.appendleft((out, step))

    def _schedule(self) -> tuple[list[Any], list[Any]]:
        self.features.before_schedule(self.first)
        outs = self._each("schedule()", lambda lane: lane.engine.scheduler.schedule())
        self.features.after_schedule(self.first, outs[0])
        if connector := self.lanes[0].connector:
            self.features["remote_poll"] = connector.num_unanswered
        return outs, self._each_with(
            "the model", outs, lambda lane, out: lane.model.execute(out), compare=False
        )

    def _sample(self, outs: list[Any], steps: list[Any]) -> None:
        if outs[0].total_num_scheduled_tokens == 0:
            return
        grammars = self._each_with(
            "get_grammar_bitmask()",
            outs,
            lambda lane, out: lane.engine.scheduler.get_grammar_bitmask(out),
        )
        self._each_with(
            "the model",
            list(zip(steps, grammars, strict=True)),
            lambda lane, given: lane.model.sample(*given),
        )

    def _take_drafts(self) -> list[Any]:
        return self._each("take_draft_token_ids()", lambda lane: lane.model.take_draft_token_ids())

    def _update(self, outs: list[Any], steps: list[Any]) -> None:
        results = self._each_with("the model", steps, lambda lane, step: lane.model.result(step))
        if self._late_aborts:
            aborted, self._late_aborts = self._late_aborts, []
            self._abort(aborted)
        requests = self.features.before_update(self.first, outs[0], results[0])
        outputs = self._each_with(
            "update_from_output()",
            list(zip(outs, results, strict=True)),
            lambda lane, given: lane.engine.update_from_output(*given),
        )
        self.features.after_update(self.first, requests, outputs[0])
        if self.oracle:
            self.oracle.observe(outputs[0])

    # Comparison

    def _each(self, what: str, do: Callable[[Lane], Any], *, compare: bool = True) -> list[Any]:
        return self._each_with(what, self.lanes, lambda lane, _: do(lane), compare=compare)

    def _each_with(
        self, what: str, given: Sequence[Any], do: Callable[[Lane, Any], Any], *, compare: bool = True
    ) -> list[Any]:
        """What `do` returns for each lane and what is given to it; nobody may see a difference."""
        results, errors = [], []
        for lane, x in zip(self.lanes, given, strict=True):
            try:
                results.append(do(lane, x))
            except SchedulerDifference:
                raise
            except Exception as error:
                errors.append((lane.engine.name, error))
        if errors:
            self._end(what, errors)
        if compare:
            self._compare(what, results)
        return results

    def _end(self, what: str, errors: list[tuple[str, Exception]]) -> NoReturn:
        """Some engine raised: that ends the run, and is right only where all do, and ours on purpose."""
        texts = "; ".join(f"{name}: {type(error).__name__}: {error}" for name, error in errors)
        place, error = self._place(what), errors[0][1]
        kinds = {type(error) for _, error in errors}
        if len(errors) < len(self.lanes):
            raise SchedulerDifference(f"{place}: only one raises, {texts}") from error
        if SchedulerStateError not in kinds and len(self.lanes) == 1:
            raise error
        if SchedulerStateError not in kinds and len(kinds) > 1:
            raise SchedulerDifference(f"{place}: each raises something else, {texts}") from error
        self.crash = f"{place}: {texts}"
        raise _CrashError from error

    def _compare(self, what: str, results: Sequence[Any]) -> None:
        if len(results) == 2:
            self._refuse_difference(what, *map(plain, results))

    def _compare_snapshots(self, event: Event) -> None:
        self._num_snapshots += 1
        if len(self.lanes) == 2 and self._num_snapshots % self.snapshot_every == 0:
            self._refuse_difference(
                f"state after {type(event).__name__}", *(lane.engine.snapshot() for lane in self.lanes)
            )

    def _refuse_difference(self, what: str, first: Any, second: Any) -> None:
        if first != second:
            names = " and ".join(lane.engine.name for lane in self.lanes)
            raise SchedulerDifference(f"{self._place(what)} of {names}: {first_difference(first, second)}")

    def _place(self, what: str) -> str:
        return f"step {self.num_steps}, {what}"


def drive(
    scenario: Scenario,
    engines: Sequence[Callable[..., Engine]] = (OurEngine,),
    *,
    oracle: OutputOracle | None = None,
) -> Driver:
    """Run a scenario from beginning to end; arguments and errors as of `Driver`."""
    driver = Driver(
        scenario.config,
        async_scheduling=scenario.async_scheduling,
        async_depth=scenario.async_depth,
        connector=scenario.connector,
        engines=engines,
        oracle=oracle,
    )
    driver.run(scenario)
    return driver


def replay(path: str | Path, engines: Sequence[Callable[..., Engine]] = (OurEngine,)) -> Driver:
    """Run a saved scenario; arguments and errors as of `Driver`."""
    return drive(Scenario.load(path), engines)
