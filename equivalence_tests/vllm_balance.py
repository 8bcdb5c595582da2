"""The plugin's `BalanceScheduler` and the installed vLLM's own scheduler, driven side by side.

What a shut gate must do is stated by vLLM's own source: `schedule()` with a `break` at the head of the loop
over waiting requests, made from what is installed. What a rank must contribute to a gather is stated from
outside, by an `Outsider`. With vllm-ascend 0.18.0, its copy of vLLM 0.17.0's `schedule()` is a third witness.
"""

import functools
import importlib.util
import inspect
import random
import re
import textwrap
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch

from ..reference.errors import AscendTwinError, UnavailableError
from ..scheduler.admission import RankCounts, make_policy
from ..scheduler.config import SchedulerConfig
from ..scheduler.lifecycle import PauseState
from ..scheduler.request import RequestStatus
from . import installed_vllm, vllm017, vllm032
from .balance_engines import ADMISSIBLE, Gathers, Outsider
from .real_scheduler import VLLM, RealEngine
from .scheduler_comparison import first_difference
from .scheduler_runs import EVENTS_PER_RUN, MAX_DRAIN_STEPS, MAX_IDLE_STEPS, Run, choose_event
from .scheduler_scenarios import (
    Event,
    GrammarReady,
    Pause,
    RemoteDone,
    ResetPrefixCache,
    SendingDone,
    SessionInput,
    Step,
)
from .scheduler_strategies import FEATURES, RandomChooser, Setup, choose_setup

ENGINES: dict[str, type[RealEngine]] = {"0.17.0": vllm017.VLLMEngine, "0.32.0": vllm032.VLLMEngine}

ANCHORS = {"0.17.0": "self.max_num_running_reqs", "0.32.0": "self.max_num_active_reqs"}
"""By version: what the loop over waiting requests compares, first of all, to end when no more may run."""

OURS, UPSTREAM = "BalanceScheduler", "vLLM"


class AnchorError(AscendTwinError, AssertionError):
    """vLLM's source is not what it was: it is not clear where admission begins."""


@functools.cache
def real_engine() -> type[RealEngine]:
    """The engine for the installed vLLM.

    Raises:
        UnavailableError: where there is none, or one of another version.
    """
    if reason := installed_vllm.why_unavailable(*ENGINES):
        raise UnavailableError(reason)
    return ENGINES[str(installed_vllm.version())]


@functools.cache
def load_vllm() -> VLLM:
    """The installed vLLM; errors as of `real_engine`."""
    return vllm017.load_vllm() if real_engine() is vllm017.VLLMEngine else vllm032.load_vllm()


@contextmanager
def hook_in_place() -> Iterator[None]:
    """The plugin's engine hook installed, which a balance scheduler of one of several ranks asks for."""
    load_vllm()
    kind = importlib.import_module("vllm.v1.engine.core").DPEngineCoreProc
    original = kind._has_global_unfinished_reqs
    importlib.import_module("ascend_twin.optimized.vllm.engine_hook").install()
    try:
        yield
    finally:
        kind._has_global_unfinished_reqs = original


# vLLM's own source with a break


def with_a_break(source: str, version: str) -> str:
    """The source of `Scheduler.schedule`, whose loop over waiting requests ends at once when `_frozen`.

    Args:
        source: of the method, as inspect gives it.
        version: of vLLM, one of ANCHORS.

    Raises:
        AnchorError: unless the condition that ends the loop is there exactly once.
    """
    anchor = ANCHORS[version]
    condition = re.compile(rf"^( +)if [^\n]*{re.escape(anchor)}:\n +break\n", re.MULTILINE)
    found = list(condition.finditer(source))
    if len(found) != 1:
        raise AnchorError(
            f"vLLM {version}: `if ... {anchor}: break` is in its schedule() {len(found)} times, not once"
        )
    start, indent = found[0].start(), found[0].group(1)
    return f"{source[:start]}{indent}if self._frozen:\n{indent}    break\n{source[start:]}"


@functools.cache
def breaking_schedulers() -> tuple[type, type]:
    """`Scheduler` and `AsyncScheduler` of the installed vLLM, with a break where `_frozen` is true.

    Raises:
        AnchorError: when the source has changed.
    """
    vllm, version = load_vllm(), str(installed_vllm.version())
    if "schedule" in vars(vllm.AsyncScheduler):
        raise AnchorError(f"vLLM {version}: AsyncScheduler has a schedule() of its own")
    source = with_a_break(textwrap.dedent(inspect.getsource(vllm.Scheduler.schedule)), version)
    scope: dict[str, Any] = {}
    exec(compile(source, "schedule() with a break", "exec"), vars(vllm.scheduler), scope)
    body = {"_frozen": False, "schedule": scope["schedule"]}
    return type("Breaking", (vllm.Scheduler,), body), type("AsyncBreaking", (vllm.AsyncScheduler,), body)


# The copy of vllm-ascend

_COPY = "patch/platform/patch_balance_schedule.py"


@functools.cache
def ascend_copy() -> ModuleType:
    """vllm-ascend's module with a `BalanceScheduler`, loaded so that nobody else comes to see it.

    Loading it puts its own classes into vLLM; what was there is put back.

    Raises:
        UnavailableError: without vllm-ascend.

    Source: vllm_ascend/patch/platform/patch_balance_schedule.py, 0.18.0; its package does not load here.
    """
    package = importlib.util.find_spec("vllm_ascend")
    if package is None or package.submodule_search_locations is None:
        raise UnavailableError("vllm-ascend is not installed; run `tox run -e vllm017`")
    vllm, core = load_vllm(), importlib.import_module("vllm.v1.engine.core")
    patched = [(vllm.scheduler, "Scheduler"), (core.EngineCoreProc, "run_engine_core")]
    kept = [(place, name, vars(place)[name]) for place, name in patched]
    path = Path(package.submodule_search_locations[0]) / _COPY
    spec = importlib.util.spec_from_file_location("vllm_ascend_copy", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    finally:
        for place, name, value in kept:
            setattr(place, name, value)
    vars(module)["time"] = vllm.clock
    return module


# Lanes


class RealOutsider(Outsider):
    """What a rank contributes, from what can be seen of vLLM's scheduler.

    A pause for new requests does not hold back those who hold blocks where vLLM has a queue for these.

    A session of 0.17.0 that stops with output in flight (`session_stops_with_output_in_flight` of
    known_defects.py) may be in no queue any more, and then nobody can admit it; or vLLM counts it as waiting
    for input when it is not, and then whatever vLLM derives from that is off by as many, and so are we.

    Attributes:
        num_miscounted: gathers with such a number.
    """

    num_miscounted = 0

    def counts(self) -> RankCounts:
        self.num_miscounted += self._miscount() != 0
        return super().counts()

    def _waiting(self) -> set[str]:
        s = self.scheduler
        queues = [getattr(s, "kv_holding_waiting", ())] * (s.pause_state != PauseState.PAUSED_ALL)
        queues += [s.waiting] * (s.pause_state == PauseState.UNPAUSED)
        ids = sorted(self._ids(*ADMISSIBLE) & {request.request_id for queue in queues for request in queue})
        miscount = self._miscount() if s.pause_state == PauseState.UNPAUSED else 0
        return {*ids[max(0, miscount) :], *map(str, range(-miscount))}

    def _miscount(self) -> int:
        s = self.scheduler
        queued = {r.request_id for queue in (s.waiting, getattr(s, "kv_holding_waiting", ())) for r in queue}
        sessions = self._ids(RequestStatus.WAITING_FOR_STREAMING_REQ) & queued
        return s.num_waiting_for_streaming_input - len(sessions)


GathersFor = Callable[[int], Gathers]
"""Gathers for a cap; the same each time."""


class Lane:
    """An engine whose scheduler is called as the data-parallel engine calls it; mixed into a `RealEngine`.

    Attributes:
        is_open: whether the last step could admit.
        is_frozen: whether it could not, and somebody waited.
        is_throttled: whether vLLM's own balancing (0.32.0) was asked to hold back prefills.
        own: what this rank contributed to the last gather.
        has_stepped: whether there was a step.
        listener: is called before every step.
    """

    policy = "open_gate"
    seed = ""
    if TYPE_CHECKING:  # of the engine that this is mixed into, and of the function `lane`
        name: str
        scheduler: Any
        vllm: VLLM
        groups: Callable[[], list[Any]]
        gathers_for: GathersFor

    def __init__(self, config: SchedulerConfig, **options: Any) -> None:
        self.gathers = self.gathers_for(config.max_num_seqs)
        super().__init__(config, **options)  # type: ignore[call-arg]
        self.is_open = True
        self.is_frozen = self.is_throttled = False
        self.own: RankCounts | None = None
        self.listener: Callable[[], object] = lambda: None
        self.has_stepped = False
        self._rng = random.Random(f"{self.seed}, throttled")
        self._throttles = self._rng.random() < 0.5
        self._schedule = self.scheduler.schedule
        self._takes_throttle = (
            "throttle_prefills" in inspect.signature(self.vllm.Scheduler.schedule).parameters
        )
        self.scheduler.schedule = self.step
        # Where our own scheduler has it, for those who ask which waiting requests hold blocks.
        self.scheduler.kv_cache_manager.groups = self.groups()

    def step(self) -> Any:
        """One `schedule()`, with a gather before it (not before the first)."""
        self.listener()
        self.gather() if self.has_stepped else self.begin()
        self.has_stepped = True
        is_waiting = bool(self.scheduler.waiting or getattr(self.scheduler, "kv_holding_waiting", ()))
        self.is_frozen = is_waiting and not self.is_open
        self.is_throttled = self._throttles and self._rng.random() < 0.5
        return self._schedule(*[self.is_throttled] * self._takes_throttle)

    def begin(self) -> None:
        """Before the first gather."""

    def gather(self) -> None:
        """Contribute, and see what the others did."""

    def update_from_output(self, out: Any, output: Any) -> Any:
        outputs = super().update_from_output(out, output)  # type: ignore[misc]
        for of_client in outputs.values():  # which our scheduler adds, and vLLM's does not have
            if of_client.scheduler_stats is not None:
                vars(of_client.scheduler_stats).pop("ascend_twin_balance", None)
        return outputs

    def state(self) -> dict[str, Any]:
        fields = {name: x for name, x in vars(self.scheduler).items() if name in self.vllm.field_names}
        plain_fields = {name: x for name, x in fields.items() if isinstance(x, int | float | str | None)}
        return {**super().state(), "fields": plain_fields}  # type: ignore[misc]


class GatedState:
    """Shows what was contributed, what was decided by it, and how often; mixed into a `Lane`."""

    if TYPE_CHECKING:
        scheduler: Any
        own: RankCounts | None
        is_open: bool

    def state(self) -> dict[str, Any]:
        source = getattr(self, "outsider", self.scheduler)
        counters = {name: getattr(source, name) for name in ("num_gathers", "num_frozen_steps")}
        return {**super().state(), "own": self.own, "is_open": self.is_open, **counters}  # type: ignore[misc]


class UpstreamLane(Lane):
    """vLLM's scheduler, which nobody gates."""

    name = UPSTREAM


class BalanceLane(Lane):
    """The plugin's scheduler."""

    name = OURS
    module: Any = None

    def vllm_config(self, config: SchedulerConfig, asynchronous: bool) -> SimpleNamespace:
        made = super().vllm_config(config, asynchronous)  # type: ignore[misc]
        made.parallel_config.data_parallel_size = self.gathers.dp_size
        made.parallel_config.data_parallel_rank = self.gathers.dp_rank
        made.additional_config = {"ascend_twin": {"balance": {"policy": self.policy}}}
        return made

    def make_scheduler(self, asynchronous: bool, **arguments: Any) -> Any:
        module = self.module or importlib.import_module("ascend_twin.optimized.vllm.balance")
        return module.BalanceScheduler(**arguments)

    def begin(self) -> None:
        self.is_open = self.scheduler.is_open

    def gather(self) -> None:
        own: RankCounts = self.scheduler.counts()
        self.own = own
        self.scheduler.observe(self.gathers.rows(own))
        self.is_open = self.scheduler.is_open


class WitnessLane(Lane):
    """A scheduler of others, told whether to freeze by a gather with the `RealOutsider`'s counts."""

    name = UPSTREAM

    def __init__(self, config: SchedulerConfig, **options: Any) -> None:
        super().__init__(config, **options)
        self.decide = make_policy(self.policy, config.max_num_seqs)
        self.outsider = RealOutsider(self.scheduler)

    def make_scheduler(self, asynchronous: bool, **arguments: Any) -> Any:
        return breaking_schedulers()[asynchronous](**arguments)

    def step(self) -> Any:
        self.outsider.before_step()
        output = super().step()
        self.outsider.after_step(output, self.is_open)
        return output

    def begin(self) -> None:
        self.tell([RankCounts()] * self.gathers.dp_size)

    def gather(self) -> None:
        own = self.outsider.counts()
        self.own = own
        self.tell(self.gathers.rows(own))

    def tell(self, rows: Sequence[RankCounts]) -> None:
        self.is_open = self.decide(rows)
        self.scheduler._frozen = not self.is_open


class AscendLane(WitnessLane):
    """vllm-ascend's copy, with its own threshold; `decide` only says what is shown as `is_open`."""

    name = "vllm-ascend"

    def vllm_config(self, config: SchedulerConfig, asynchronous: bool) -> SimpleNamespace:
        made = super().vllm_config(config, asynchronous)  # type: ignore[misc]
        made.parallel_config.data_parallel_size = self.gathers.dp_size
        return made

    def make_scheduler(self, asynchronous: bool, **arguments: Any) -> Any:
        return ascend_copy().BalanceScheduler(**arguments)

    def tell(self, rows: Sequence[RankCounts]) -> None:
        self.is_open = self.decide(rows)
        self.scheduler.balance_queue = [torch.tensor([row.running], dtype=torch.int) for row in rows]


def lane(kind: type[Lane], policy: str, gathers_for: GathersFor, seed: str, **options: Any) -> Any:
    """An engine class of the installed vLLM."""
    attributes = {"policy": policy, "gathers_for": staticmethod(gathers_for), "seed": seed, **options}
    shown = () if kind is UpstreamLane or options.get("hides_gate") else (GatedState,)
    return type(kind.__name__, (*shown, kind, real_engine()), attributes)


def beside_upstream(policy: str, gathers_for: GathersFor, seed: str, **options: Any) -> list[Any]:
    """Ours, and vLLM's, which has no gate."""
    return [
        lane(BalanceLane, policy, gathers_for, seed, hides_gate=True, **options),
        lane(UpstreamLane, policy, gathers_for, seed),
    ]


def beside_a_break(policy: str, gathers_for: GathersFor, seed: str, **options: Any) -> list[Any]:
    """Ours, and vLLM's source with a break."""
    kinds = (BalanceLane, options), (WitnessLane, {})
    return [lane(kind, policy, gathers_for, seed, **given) for kind, given in kinds]


def beside_ascend(policy: str, gathers_for: GathersFor, seed: str, **options: Any) -> list[Any]:
    """Ours, and vllm-ascend's copy."""
    kinds = (BalanceLane, options), (AscendLane, {})
    return [lane(kind, policy, gathers_for, seed, **given) for kind, given in kinds]


# Runs

FEATURES_OF_ADMISSION = (
    *("prefix_hit", "full_prefix_hit", "skip_reading_prefix_cache", "resumption", "grammar_promoted"),
    *("session_resumed", "remote_sync_load", "remote_load_started"),
)
"""What happens to a request when it leaves the waiting queue: never in a frozen step."""


class GatedRun(Run):
    """Two lanes, the first of them ours, and what was at work in which steps.

    Attributes:
        open, frozen, after_frozen: features, and how often each was at work in steps that could admit, in
            those that could not while somebody waited, and in open ones right after a frozen one.
        num_frozen, num_throttled_frozen: frozen steps; those in which prefills should be held back besides.
        has_crashed: whether both raised the same.
        is_drained: whether nobody was left.
    """

    def __init__(self, setup: Setup, engines: Sequence[Any]) -> None:
        super().__init__(setup, engines)
        self.driver.oracle = None  # vLLM's own mistakes are not ours to judge here
        self.open: Counter[str] = Counter()
        self.frozen: Counter[str] = Counter()
        self.after_frozen: Counter[str] = Counter()
        self.num_frozen = self.num_throttled_frozen = 0
        self.has_crashed = self.is_drained = False
        self._counted: Counter[str] = Counter()
        self._loading: set[str] = set()
        self._was_frozen = False
        self._lane: Any = self.driver.lanes[0].engine
        self._lane.listener = self._note_step

    def apply(self, event: Event) -> None:
        """Let something happen, but a reset of which it is known that it fails (in both)."""
        if isinstance(event, ResetPrefixCache) and event.running and self._somebody_waits_with_blocks():
            event = replace(event, running=False)
        super().apply(event)

    def _somebody_waits_with_blocks(self) -> bool:
        scheduler = self._lane.scheduler
        running = {request.request_id for request in scheduler.running}
        return any(
            table for g in self._lane.groups() for k, table in g.req_to_blocks.items() if k not in running
        )

    def drain(self) -> None:
        """Let come whatever somebody waits for, until nobody is left or nothing happens any more."""
        lanes: list[Any] = [driven.engine for driven in self.driver.lanes]
        for each in lanes:
            each.gathers.end()
        scheduler, num_idle = self._lane.scheduler, 0
        self.apply(Pause(0))
        for _ in range(MAX_DRAIN_STEPS):
            if self.driver.crash or num_idle > MAX_IDLE_STEPS:
                break
            if not scheduler.requests and not scheduler.has_requests() and not self.driver.lanes[0].queue:
                self.is_drained = True
                break
            for event in (GrammarReady(0), RemoteDone(0), SendingDone(0), SessionInput(0)):
                self.apply(event)
            before = self._progress()
            self.apply(Step())
            num_idle = 0 if self._progress() != before else num_idle + 1
        self._note_step()

    def _progress(self) -> list[Any]:
        requests = self._lane.scheduler.requests.values()
        return [(r.request_id, int(r.status), r.num_computed_tokens, r.num_tokens) for r in requests]

    def conclude(self, error: AscendTwinError | None = None) -> None:
        """A difference is a failure; so is a crash of both, unless they say and leave the same."""
        if error is not None:
            self.failure = f"{type(error).__name__}: {error}"
        elif self.driver.crash:
            self.has_crashed = True
            first, second = (driven.engine for driven in self.driver.lanes)
            ours, _, theirs = self.driver.crash.partition(f"{first.name}: ")[2].partition(
                f"; {second.name}: "
            )
            if ours != theirs:
                self.failure = f"each raises something else: {self.driver.crash}"
            elif found := first_difference(first.snapshot(), second.snapshot()):
                self.failure = f"after {self.driver.crash}: {found}"

    def _note_step(self) -> None:
        """Count what was at work since the last call: in the last step, and until this one."""
        features = self.driver.features
        since = Counter({name: n - self._counted[name] for name, n in features.items()})
        self._counted = Counter(features)
        if connector := self.driver.lanes[0].connector:
            since["remote_load_started"] = len(connector.loading - self._loading)
            self._loading = set(connector.loading)
        step = self._lane
        if step.is_frozen:
            self.frozen += since
            self.num_frozen += 1
            self.num_throttled_frozen += step.is_throttled
        elif step.is_open and step.has_stepped:
            self.open += since
            if self._was_frozen:
                self.after_frozen += since
        self._was_frozen = step.is_frozen


def gated_runs(
    seed: object,
    policy: str,
    beside: Callable[..., list[Any]],
    *,
    most: Callable[[int], int] | None = None,
    always: Sequence[str] = (),
    among: Sequence[str] = FEATURES,
    change: Callable[[SchedulerConfig], SchedulerConfig] = lambda config: config,
    **options: Any,
) -> Iterator[GatedRun]:
    """Random runs without end, of the plugin's scheduler beside what it must equal.

    Args:
        seed: run i depends on (seed, i) alone.
        policy: text form.
        beside: makes the two engines; one of the functions `beside_...`.
        most: what `Gathers.most` is for a cap; None is the cap.
        always, among: features that every setup has, and those that it may have.
        change: of each configuration.
        options: attributes of our lane.
    """
    i = 0
    while True:
        run_seed = f"{seed}-{i}"
        chooser = RandomChooser(random.Random(run_seed))
        setup = choose_setup(chooser, always, among)
        setup = replace(setup, config=change(setup.config))
        gathers_for = partial(_gathers_for, run_seed, most)
        run = GatedRun(setup, beside(policy, gathers_for, run_seed, **options))
        run.finish(partial(_let_happen, chooser, run))
        i += 1
        yield run


def _gathers_for(seed: str, most: Callable[[int], int] | None, cap: int) -> Gathers:
    return Gathers(seed, cap, None if most is None else most(cap))


def _let_happen(chooser: RandomChooser, run: GatedRun) -> None:
    for _ in range(EVENTS_PER_RUN):
        choose_event(chooser, run)


class Findings:
    """What random runs came to, until there were `num_steps` steps or one failed.

    Attributes:
        failure: how, or "".
        open, frozen, after_frozen, num_frozen, num_throttled_frozen: sums; see `GatedRun`.
        modes: frozen steps by what the setup had on ("async", "priority", ...; else "sync", "fcfs").
        num_runs, num_crashed, num_drained, num_gathers: of all runs.
        num_miscounted: gathers in which vLLM itself miscounts who waits; see `RealOutsider`.
    """

    def __init__(self, num_steps: int, *given: Any, **options: Any) -> None:
        self.num_steps = self.num_runs = self.num_crashed = self.num_drained = self.num_gathers = 0
        self.num_frozen = self.num_throttled_frozen = self.num_miscounted = 0
        self.open: Counter[str] = Counter()
        self.frozen: Counter[str] = Counter()
        self.after_frozen: Counter[str] = Counter()
        self.modes: Counter[str] = Counter()
        self.failure = ""
        for run in gated_runs(*given, **options):
            self._add(run)
            if run.failure or self.num_steps >= num_steps:
                break

    def _add(self, run: GatedRun) -> None:
        self.num_runs += 1
        self.num_steps += run.driver.num_steps
        self.num_crashed += run.has_crashed
        self.num_drained += run.is_drained
        self.num_frozen += run.num_frozen
        self.num_throttled_frozen += run.num_throttled_frozen
        self.num_gathers += run.driver.first.scheduler.num_gathers
        outsider = getattr(run.driver.lanes[1].engine, "outsider", None)
        self.num_miscounted += outsider.num_miscounted if outsider else 0
        self.open += run.open
        self.frozen += run.frozen
        self.after_frozen += run.after_frozen
        features = run.setup.features
        modes = {"async" if "async" in features else "sync", "priority" if "priority" in features else "fcfs"}
        for mode in modes | set(features):
            self.modes[mode] += run.num_frozen
        if run.failure:
            self.failure = f"{run.failure}\n{run.scenario}"
