"""What the stages of the staged implementation return, kept for whoever asks: recordings do."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch

_kept: ContextVar[dict[str, torch.Tensor] | None] = ContextVar("kept stage results", default=None)


@contextmanager
def kept_stage_results() -> Iterator[dict[str, torch.Tensor]]:
    """A context in which a call of implementation staged leaves what its stages returned.

    Yields:
        By "stage.result", packed tokens `[T, heads, D]`; h is `[NT, HV, K, V]`. Empty until a call returns,
        and for other implementations.
    """
    kept: dict[str, torch.Tensor] = {}
    token = _kept.set(kept)
    try:
        yield kept
    finally:
        _kept.reset(token)


def keep(results: dict[str, torch.Tensor]) -> None:
    """Hand results to who has asked for them, if anybody has."""
    kept = _kept.get()
    if kept is not None:
        kept.update(results)
