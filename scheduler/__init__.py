"""Scheduling: vLLM's scheduler in plain Python, balance scheduling on it, and requests to drive them with."""

from .admission import make_policy
from .balance import AsyncBalanceScheduler, BalanceScheduler
from .config import SchedulerConfig
from .lifecycle import PauseState
from .request import LoRARequest, Request, RequestStatus, SamplingParams
from .upstream import AsyncUpstreamScheduler, UpstreamScheduler

__all__ = [
    "AsyncBalanceScheduler",
    "AsyncUpstreamScheduler",
    "BalanceScheduler",
    "LoRARequest",
    "PauseState",
    "Request",
    "RequestStatus",
    "SamplingParams",
    "SchedulerConfig",
    "UpstreamScheduler",
    "make_policy",
]
