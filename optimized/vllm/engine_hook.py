# pyright: reportMissingImports=false
"""Where vLLM's data-parallel engine gathers: right after it has asked whether anybody has work left.

That method is called once in every step of every rank that is not idle, drained ranks included, so that all
ranks enter the same collectives in the same order (docs/lockstep.md).
"""

import functools
import json
import logging
import time
from datetime import timedelta
from typing import Any

import torch
import torch.distributed

from ...reference.errors import LockstepError, UnavailableError
from ...scheduler.admission import RankCounts
from ...scheduler.gathered_admission import GatheredAdmission

_logger = logging.getLogger(f"vllm.{__name__}")
_METHOD = "_has_global_unfinished_reqs"
_MARK = "gathers_for_ascend_twin"
_QUIET_WAIT = timedelta(seconds=10)
_LONGEST_WAIT = timedelta(minutes=10)  # the first step of a rank may compile its kernels


def install() -> None:
    """Wrap the method in place: a replaced class would come too late for those who have it already.

    Raises:
        UnavailableError: when the installed vLLM has no such method, or its ranks no store in common.

    Source: vllm/v1/engine/core.py, DPEngineCoreProc, 0.17.0 and 0.32.0.
    """
    kind = _engine_class()
    original = getattr(kind, _METHOD, None)
    if original is None:
        raise UnavailableError(f"vLLM has no DPEngineCoreProc.{_METHOD}")
    begin = getattr(kind, "_init_data_parallel", None)
    if begin is None or "dp_store" not in begin.__code__.co_names:
        raise UnavailableError("vLLM's DPEngineCoreProc has no dp_store")
    if is_installed():
        return

    @functools.wraps(original)
    def has_global_unfinished_reqs(engine: Any, *args: Any, **kwargs: Any) -> Any:
        has_unfinished = original(engine, *args, **kwargs)
        gather(engine)
        return has_unfinished

    setattr(has_global_unfinished_reqs, _MARK, True)
    setattr(kind, _METHOD, has_global_unfinished_reqs)


def is_installed() -> bool:
    """Whether the engine of this process gathers."""
    return hasattr(getattr(_engine_class(), _METHOD, None), _MARK)


def gather(engine: Any) -> None:
    """Carry the counts of this rank to all others, and theirs to its scheduler; nothing without balance.

    Raises:
        LockstepError: before the first gather, when the ranks are not all balanced by the same policy.
    """
    scheduler: Any = engine.scheduler
    is_balanced = isinstance(engine.scheduler, GatheredAdmission)
    if not getattr(engine, _MARK, False):
        _agree(engine, str(scheduler.admission_policy) if is_balanced else "off")
        setattr(engine, _MARK, True)
    if not is_balanced:
        return
    start = time.monotonic()
    own = torch.tensor(scheduler.counts(), dtype=torch.int64)
    rows = [torch.empty_like(own) for _ in range(scheduler.dp_size)]
    torch.distributed.all_gather(rows, own, group=engine.dp_group)
    scheduler.gather_seconds += time.monotonic() - start
    scheduler.observe([RankCounts(*row.tolist()) for row in rows])


def _agree(engine: Any, balance: str) -> None:
    """Say in the store of the ranks what this one does; whoever is balanced waits for all to say the same."""
    store, rank = engine.dp_store, engine.dp_rank
    store.set(f"ascend_twin/balance/{rank}", json.dumps(balance))
    if balance == "off":
        return
    for other in range(engine.scheduler.dp_size):
        said = json.loads(_wait_for(store, f"ascend_twin/balance/{other}", other))
        if said != balance:
            raise LockstepError(
                f"balance scheduling is {balance} on rank {rank}, and {said} on rank {other}: it must be the "
                "same on all ranks"
            )


def _wait_for(store: Any, key: str, rank: int) -> bytes:
    """What a rank has said; a warning after a while, and an error in the end."""
    question = f"how rank {rank} is balanced: is the plugin ascend_twin installed and loaded there?"
    try:
        store.wait([key], _QUIET_WAIT)
    except torch.distributed.DistStoreError:
        _logger.warning("Waiting for %s to be told %s", _LONGEST_WAIT, question)
        try:
            store.wait([key], _LONGEST_WAIT)
        except torch.distributed.DistStoreError as error:
            raise LockstepError(f"nobody has said within {_LONGEST_WAIT} {question}") from error
    return store.get(key)


def _engine_class() -> Any:
    from vllm.v1.engine import core

    return getattr(core, "DPEngineCoreProc", None)
