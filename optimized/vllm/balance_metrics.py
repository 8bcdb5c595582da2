# pyright: reportMissingImports=false
"""Figures of balance scheduling on vLLM's Prometheus endpoint.

The scheduler is in another process than the endpoint. vLLM carries its `SchedulerStats` over; these gain a
field. The endpoint's logger takes it from there.
"""

import dataclasses
import functools
import inspect
from typing import Any

from ...reference.errors import UnavailableError

_FIELD = "ascend_twin_balance"
_MARK = "exports_for_ascend_twin"

COUNTERS = {
    "num_gathers": ("ascend_twin:balance_gathers", "Gathers of the counts of all data-parallel ranks."),
    "num_frozen_steps": (
        "ascend_twin:balance_frozen_steps",
        "Steps in which requests waited and balance scheduling admitted none.",
    ),
    "gather_seconds": (
        "ascend_twin:balance_gather_seconds",
        "Time in gathers, waiting for the other ranks included, s.",
    ),
    "frozen_request_seconds": (
        "ascend_twin:balance_frozen_request_seconds",
        "Time that requests waited while balance scheduling admitted none, summed over requests, s.",
    ),
}
"""By the attribute of the scheduler: name of the metric (Prometheus appends `_total`), and what it is."""


def install() -> None:
    """Add the field to `SchedulerStats`, and have `PrometheusStatLogger` export it.

    vLLM's own entry point for stat loggers is not used: one that is installed switches statistics on for
    everybody.

    Raises:
        UnavailableError: when the installed vLLM has no such classes.

    Source: vllm/v1/metrics/stats.py and loggers.py, 0.17.0 and 0.32.0.
    """
    from vllm.v1.metrics import loggers, stats

    kind: Any = getattr(stats, "SchedulerStats", None)
    logger: Any = getattr(loggers, "PrometheusStatLogger", None)
    record = getattr(logger, "record", None)
    if not dataclasses.is_dataclass(kind) or record is None:
        raise UnavailableError("vLLM has no SchedulerStats, or no PrometheusStatLogger.record()")
    if "scheduler_stats" not in inspect.signature(record).parameters:
        raise UnavailableError("vLLM's PrometheusStatLogger.record() takes no scheduler_stats")
    _add_field(kind)
    if not hasattr(logger.record, _MARK):
        logger.record = _exporting(logger.record)


def attach(stats: Any, scheduler: Any) -> None:
    """Put into vLLM's statistics of a step what the counters of a balance scheduler rose by since the last.

    Differences, because there may be several front-ends: each step's statistics go to one of them, and what
    all have counted is summed.
    """
    now = {name: float(getattr(scheduler, name)) for name in COUNTERS}
    before = vars(scheduler).setdefault(_MARK, dict.fromkeys(COUNTERS, 0.0))
    setattr(stats, _FIELD, {name: value - before[name] for name, value in now.items()})
    before.update(now)


def _add_field(kind: Any) -> None:
    """Make the field one that is carried over: vLLM encodes and decodes what the dataclass declares."""
    if _FIELD in kind.__dataclass_fields__:
        return
    carried = dict[str, float] | None
    like = dataclasses.make_dataclass("_", [(_FIELD, carried, dataclasses.field(default=None))])
    kind.__annotations__[_FIELD] = carried
    setattr(kind, _FIELD, None)
    kind.__dataclass_fields__[_FIELD] = like.__dataclass_fields__[_FIELD]


def _exporting(record: Any) -> Any:
    signature = inspect.signature(record)

    @functools.wraps(record)
    def exporting(logger: Any, *args: Any, **kwargs: Any) -> None:
        record(logger, *args, **kwargs)
        given = signature.bind(logger, *args, **kwargs)
        given.apply_defaults()
        differences = getattr(given.arguments["scheduler_stats"], _FIELD, None)
        if differences is not None:
            _export(logger, differences, given.arguments.get("engine_idx", 0))

    setattr(exporting, _MARK, True)
    return exporting


def _export(logger: Any, differences: dict[str, float], engine: int) -> None:
    model_name = str(logger.vllm_config.model_config.served_model_name)
    for name, difference in differences.items():
        _counter(name).labels(model_name, str(engine)).inc(difference)


@functools.cache
def _counter(name: str) -> Any:
    import prometheus_client

    metric, documentation = COUNTERS[name]
    return prometheus_client.Counter(metric, documentation, labelnames=["model_name", "engine"])
