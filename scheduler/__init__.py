"""Scheduling: vLLM's scheduler in plain Python, and the requests that it is driven with."""

from .config import SchedulerConfig
from .lifecycle import PauseState
from .request import LoRARequest, Request, RequestStatus, SamplingParams
from .upstream import AsyncUpstreamScheduler, UpstreamScheduler

__all__ = [
    "AsyncUpstreamScheduler",
    "LoRARequest",
    "PauseState",
    "Request",
    "RequestStatus",
    "SamplingParams",
    "SchedulerConfig",
    "UpstreamScheduler",
]
