"""The plugin for vLLM: the only room that imports vLLM, and not before it must.

`BalanceScheduler` and `AsyncBalanceScheduler` are here by the names that `--scheduler-cls` takes.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .balance import AsyncBalanceScheduler, BalanceScheduler

__all__ = ["AsyncBalanceScheduler", "BalanceScheduler"]


def __getattr__(name: str) -> type:
    """The schedulers, made when they are first asked for: that imports vLLM's."""
    if name in __all__:
        from . import balance

        return getattr(balance, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
