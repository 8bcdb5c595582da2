# pyright: reportMissingImports=false
"""Records vLLM's schedulers, and the collectives of its data-parallel engines, where the environment asks.

Nothing is wrapped unless `ASCEND_TWIN_RECORD` is set when the plugin is loaded. A scheduler is then recorded
from its first call to its last, or to the step or the size that the settings end with; an engine from its
first step. Each has a file of its own. fixtures/record_traces.py says how; here is what is vLLM's.
"""

import datetime
import functools
import logging
import os
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from ...fixtures.record import RECORD_VARIABLE, Recorder, process_recorder, versions
from ...fixtures.record_traces import CollectiveRecorder, Record, SchedulerRecorder, TraceFile, Write
from ...fixtures.redaction import Redaction
from ...fixtures.store import Fixture
from ...reference.errors import UnavailableError
from ...scheduler.collectives import FORWARD, GATHER, HAS_UNFINISHED
from ...scheduler.gathered_admission import GatheredAdmission
from . import plugin
from .settings import read_settings

OPTIONS = (
    "scheduler_config.max_num_active_seqs",
    "scheduler_config.long_prefill_token_threshold_adaptive",
    "scheduler_config.scheduler_reserve_full_isl",
    "scheduler_config.watermark",
    "scheduler_config.prefill_schedule_interval",
    "cache_config.enable_mamba_shared_prefix_checkpoint",
    "parallel_config.pipeline_parallel_size",
    "parallel_config.decode_context_parallel_size",
    "parallel_config.prefill_context_parallel_size",
    "max_concurrent_batches",
    "max_in_flight_tokens",
    "num_lookahead_tokens",
    "num_prefill_lookahead_tokens",
    "use_v2_model_runner",
)
"""Of vLLM's configuration, where a version has it: what its scheduler reads beside a `SchedulerConfig`."""

REDUCTIONS = ("sync_dp_state", "has_unfinished_dp")
"""Of ParallelConfig: the reduction over who has unfinished requests, the newer name first."""

_logger = logging.getLogger(f"vllm.{__name__}")

_INTERVAL = 32  # of the version that has it as a number in its source
_GROUPS = {"FullAttentionSpec": "full_attention", "MambaSpec": "mamba"}
_LOOP = "run_busy_loop"
_MARK = "recorded_by_ascend_twin"
_stepping = threading.local()


def install() -> None:
    """Wrap where a scheduler is made and an engine starts, if the environment asks for recordings.

    Raises:
        UnavailableError: when the installed vLLM has no such class or method; nothing has changed then.

    Source: vllm/v1/core/sched/scheduler.py and vllm/v1/engine/core.py, 0.17.0 and 0.32.0.
    """
    if not os.environ.get(RECORD_VARIABLE):
        return
    from vllm.config import ParallelConfig
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.engine import core

    engine = getattr(core, "DPEngineCoreProc", None)
    reduction = next((name for name in REDUCTIONS if hasattr(ParallelConfig, name)), None)
    if not hasattr(engine, _LOOP) or reduction is None:
        raise UnavailableError(f"vLLM has no DPEngineCoreProc.{_LOOP}, or none of {', '.join(REDUCTIONS)}")
    _wrap(Scheduler, "__init__", after=record_scheduler)
    _wrap(engine, _LOOP, before=record_engine)  # whose constructor loads this plugin, and runs already
    _record_reduction(ParallelConfig, reduction)


def _wrap(kind: Any, name: str, *, before: Any = None, after: Any = None) -> None:
    """Call something with an object before or after this method of it. Twice is once."""
    original = getattr(kind, name)
    if hasattr(original, _MARK):
        return

    @functools.wraps(original)
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        if before is not None:
            before(self)
        result = original(self, *args, **kwargs)
        if after is not None:
            after(self)
        return result

    setattr(method, _MARK, True)
    setattr(kind, name, method)


def record_scheduler(scheduler: Any) -> None:
    """Record a scheduler of vLLM from now on, as the settings of this process say.

    Raises:
        InvalidArgumentError: for settings that are not allowed, which end the engine that is being made.
    """
    recorder = _open_recorder("scheduler")
    if recorder is None:
        return
    config = scheduler.vllm_config
    is_redacted = recorder.settings.redact
    redaction = Redaction(config.cache_config.block_size) if is_redacted else None

    def fixture() -> Fixture:
        return Fixture("scheduler", trace_config(scheduler, is_redacted), origin=_origin(scheduler, rank))

    rank = engine_rank(config.parallel_config)
    file = TraceFile(recorder, "scheduler", rank, fixture)
    SchedulerRecorder(scheduler, _up_to(recorder, file.write), redaction=redaction)


def _open_recorder(kind: str) -> Recorder | None:
    """The recorder of this process, if it wants a trace of this kind."""
    recorder = process_recorder()
    if recorder is None:
        return None
    recorder.announce(_logger)
    return recorder if recorder.wants(kind) else None


def engine_rank(parallel_config: Any) -> str:
    """The first rank of an engine, as `record_gdn.rank_name` has it: vLLM counts ranks across all engines."""
    if parallel_config.data_parallel_size == 1:
        return "rank0"
    engine = parallel_config.data_parallel_rank
    return f"dp{engine}.rank{engine * parallel_config.world_size}"


def _up_to(recorder: Recorder, write: Write) -> Write:
    """Takes records up to the last step that is asked for."""
    last = recorder.settings.steps[1]

    def write_up_to(records: Sequence[Record]) -> bool:
        is_over = last is not None and any(record.get("step", -1) > last for record in records)
        return not is_over and write(records)

    return write_up_to


def _origin(scheduler: Any, rank: str) -> dict[str, Any]:
    kind = type(scheduler)
    return {
        "implementation": f"{kind.__module__}.{kind.__qualname__}",
        "rank": rank,
        "time": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="milliseconds"),
        "versions": versions(),
    }


def trace_config(scheduler: Any, redacted: bool) -> dict[str, Any]:
    """What is needed to make a scheduler that decides as this one of vLLM does."""
    config = scheduler.vllm_config
    limits, cache = config.scheduler_config, config.cache_config
    groups = [group.kv_cache_spec for group in scheduler.kv_cache_config.kv_cache_groups]
    kinds = [_GROUPS.get(type(spec).__name__, type(spec).__name__) for spec in groups]
    states = [spec for spec, kind in zip(groups, kinds, strict=True) if kind == "mamba"]
    caches_states = bool(states) and cache.enable_prefix_caching
    return {
        "implementation": "vllm",
        "version": next(iter(plugin.vllm_distributions().values()), "").split("+")[0],
        "asynchronous": bool(limits.async_scheduling),
        "connector": scheduler.connector is not None,
        "balance": _balance(scheduler, config),
        "redacted": redacted,
        "options": {name: x for name in OPTIONS if (x := _option(config, name)) is not None},
        "scheduler": {
            "num_blocks": scheduler.kv_cache_config.num_blocks,
            "block_size": cache.block_size,
            "max_num_seqs": limits.max_num_seqs,
            "max_num_batched_tokens": scheduler.max_num_scheduled_tokens,
            "max_model_len": scheduler.max_model_len,
            "policy": str(scheduler.policy.value),
            "enable_chunked_prefill": limits.enable_chunked_prefill,
            "long_prefill_token_threshold": limits.long_prefill_token_threshold,
            "enable_prefix_caching": bool(cache.enable_prefix_caching),
            "num_spec_tokens": scheduler.num_spec_tokens,
            "spec_method": _spec_method(scheduler),
            "max_loras": config.lora_config.max_loras if config.lora_config else None,
            "max_num_encoder_input_tokens": scheduler.max_num_encoder_input_tokens,
            "encoder_cache_size": scheduler.encoder_cache_manager.cache_size,
            "disable_chunked_mm_input": limits.disable_chunked_mm_input,
            "kv_groups": kinds,
            "mamba_cache_mode": cache.mamba_cache_mode if caches_states else "none",
            "num_speculative_blocks": max((spec.num_speculative_blocks for spec in states), default=0),
            "kv_load_failure_policy": "recompute" if scheduler.recompute_kv_load_failures else "fail",
            "log_stats": bool(scheduler.log_stats),
            "include_finished_set": scheduler.finished_req_ids_dict is not None,
        },
    }


def _balance(scheduler: Any, config: Any) -> dict[str, Any] | None:
    """The policy and the place of a scheduler with balance scheduling."""
    if not isinstance(scheduler, GatheredAdmission):
        return None
    policy = read_settings(config.additional_config).policy
    return {"policy": policy, "dp_rank": scheduler.dp_rank, "dp_size": scheduler.dp_size}


def _option(config: Any, name: str) -> Any:
    """A value by its dotted name; None where this version has none, and for what is no JSON."""
    value = functools.reduce(lambda place, part: getattr(place, part, None), name.split("."), config)
    return value if isinstance(value, bool | int | float | str) else None


def _spec_method(scheduler: Any) -> str:
    """Who drafts, in the words of `SchedulerConfig`: a scheduler sees slots that it must keep, or none."""
    if scheduler.use_eagle:
        return "eagle"
    return "draft_model" if scheduler.num_lookahead_tokens else "ngram"


def record_engine(engine: Any) -> None:
    """Record the collectives of a rank from now on; errors as of `record_scheduler`."""
    recorder = _open_recorder("dp")
    if recorder is None:
        return
    rank = engine_rank(engine.vllm_config.parallel_config)
    started = time.time()
    config = collectives_config(engine) | {"started_ms": round(1e3 * started, 3)}
    origin = _origin(engine.scheduler, rank)
    file = TraceFile(recorder, "collectives", rank, lambda: Fixture("dp", config, origin=origin))
    _Steps(engine, CollectiveRecorder(engine.dp_rank, _up_to(recorder, file.write), started=started))


def collectives_config(engine: Any) -> dict[str, Any]:
    """What the collectives of a rank depend on."""
    scheduler, balance = engine.scheduler, None
    if isinstance(scheduler, GatheredAdmission):
        policy = read_settings(engine.vllm_config.additional_config).policy
        balance = {"policy": policy, "max_num_seqs": scheduler.admission_cap}
    return {
        "dp_size": engine.vllm_config.parallel_config.data_parallel_size,
        "balance": balance,
        "finish_check_interval": getattr(engine, "dp_sync_interval", _INTERVAL),
        "reduces_first_step": hasattr(engine, "dp_sync_interval"),
        "run": _run_of(engine),
    }


def _run_of(engine: Any) -> str:
    """A name that all ranks of this engine have: what the first of them has put into the store."""
    name = str(engine.vllm_config.instance_id)
    exchange = getattr(engine.dp_store, "compare_set", None)
    return name if exchange is None else exchange("ascend_twin/run", "", name).decode()


class _Steps:
    """Stands around the methods in which an engine enters collectives, on this engine alone."""

    def __init__(self, engine: Any, recorder: CollectiveRecorder) -> None:
        self.recorder = recorder
        self.num_steps = 0
        self._scheduler = engine.scheduler
        self._wrap(engine, "_has_global_unfinished_reqs", self._reduce)
        self._wrap(engine, "execute_dummy_batch", self._run_dummy)
        self._wrap(engine.model_executor, "execute_model", self._run_batch)
        if isinstance(engine.scheduler, GatheredAdmission):
            self._wrap(engine.scheduler, "counts", self._count)
            self._wrap(engine.scheduler, "observe", self._observe)

    def _wrap(self, owner: Any, name: str, around: Callable[..., Any]) -> None:
        method = getattr(owner, name)
        setattr(owner, name, functools.wraps(method)(functools.partial(around, method)))

    def _reduce(self, method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        _stepping.steps = self
        try:
            return method(*args, **kwargs)
        finally:
            _stepping.steps = None
            self.num_steps += 1

    def _run_dummy(self, method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self.recorder.enter(FORWARD, self.num_steps, [1])
        return method(*args, **kwargs)

    def _run_batch(self, method: Callable[..., Any], scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
        if scheduler_output.total_num_scheduled_tokens:
            self.recorder.enter(FORWARD, self.num_steps, [0])
        return method(scheduler_output, *args, **kwargs)

    def _count(self, method: Callable[..., Any]) -> Any:
        counts = method()
        self.recorder.enter(GATHER, self.num_steps, counts)
        return counts

    def _observe(self, method: Callable[..., Any], gathered: Any) -> None:
        rows = [[int(x) for x in row] for row in gathered]
        method(gathered)
        self.recorder.leave(GATHER, self.num_steps, rows, is_open=self._scheduler.is_open)


def _record_reduction(kind: Any, name: str) -> None:
    """Stand around the reduction, which is nobody's method: the engine of this thread records it."""
    original = getattr(kind, name)
    if hasattr(original, _MARK):
        return

    @functools.wraps(original)
    def reduce(group: Any, *args: Any, **kwargs: Any) -> Any:
        steps: _Steps | None = getattr(_stepping, "steps", None)
        if steps is None:
            return original(group, *args, **kwargs)
        steps.recorder.enter(HAS_UNFINISHED, steps.num_steps, [*args, *kwargs.values()])
        result = original(group, *args, **kwargs)
        goes_on = result[0] if isinstance(result, tuple) else result
        steps.recorder.leave(HAS_UNFINISHED, steps.num_steps, bool(goes_on))
        return result

    setattr(reduce, _MARK, True)
    setattr(kind, name, staticmethod(reduce))
