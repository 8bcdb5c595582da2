# pyright: reportMissingImports=false
"""vLLM's platform for CPUs, which here does not switch async scheduling off."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any
from unittest import mock

from vllm.platforms.cpu import CpuPlatform


def _keeping_async(check: Callable[[Any, Any], None]) -> Callable[[Any, Any], None]:
    def check_and_update_config(cls: Any, vllm_config: Any) -> None:
        was_async = vllm_config.scheduler_config.async_scheduling
        check(cls, vllm_config)
        vllm_config.scheduler_config.async_scheduling = was_async

    return check_and_update_config


_check = classmethod(_keeping_async(vars(CpuPlatform)["check_and_update_config"].__func__))


class AsyncCpuPlatform(CpuPlatform):
    """As upstream, but for that flag; async scheduling needs nothing of a device."""

    check_and_update_config = _check


def async_scheduling_allowed() -> AbstractContextManager[Any]:
    """The same for the platform that this process has already, inside the context."""
    return mock.patch.object(CpuPlatform, "check_and_update_config", _check)
