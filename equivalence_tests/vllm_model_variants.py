"""Prefill cores that are right but round as a matrix unit does, and such as are wrong in one way."""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch

from ..optimized.vllm import gdn_core, gdn_layer
from ..optimized.vllm.gdn_core import PrefillCore, StateLayout
from ..reference.gdn import chunk_gated_delta_rule

Result = tuple[torch.Tensor, torch.Tensor]
Change = Callable[..., Result]


class RoundingCore(PrefillCore):
    """The reference with the operands of every product rounded to bfloat16: what any kernel may do."""

    def __init__(self) -> None:
        super().__init__("reference")

    def __call__(self, *args: Any, **kwargs: Any) -> Result:
        op = functools.partial(chunk_gated_delta_rule, compute_dtype=torch.bfloat16)
        with mock.patch.object(gdn_core, "reference_chunk_gated_delta_rule", op):
            return super().__call__(*args, **kwargs)


class ChangedCore(PrefillCore):
    """The reference, with one thing wrong."""

    def __init__(self, change: Change) -> None:
        super().__init__("reference")
        self.change = change

    def __call__(self, *args: Any, **kwargs: Any) -> Result:
        return self.change(super().__call__, *args, **kwargs)


def _scale_left_out(run: Change, q: torch.Tensor, *rest: Any, **given: Any) -> Result:
    o, states = run(q, *rest, **given)
    return o * q.shape[-1] ** 0.5, states


def _no_l2norm(run: Change, *args: Any, **given: Any) -> Result:
    return run(*args, **{**given, "use_qk_l2norm_in_kernel": False})


def _no_decay(run: Change, q: Any, k: Any, v: Any, g: torch.Tensor, beta: Any, **given: Any) -> Result:
    return run(q, k, v, torch.zeros_like(g), beta, **given)


def _no_step_size(run: Change, q: Any, k: Any, v: Any, g: Any, beta: torch.Tensor, **given: Any) -> Result:
    return run(q, k, v, g, torch.ones_like(beta), **given)


def _wrong_key_head(run: Change, q: torch.Tensor, k: torch.Tensor, *rest: Any, **given: Any) -> Result:
    return run(q.flip(2), k.flip(2), *rest, **given)


def _sequences_run_together(run: Change, *args: Any, **given: Any) -> Result:
    """Each but the first goes on from the state of the one before it."""
    _, states = run(*args, **given)
    carried = given["initial_state"].clone()
    carried[1:] = states[:-1]
    return run(*args, **{**given, "initial_state": carried})


def _states_of_one_chunk_only(run: Change, *args: Any, **given: Any) -> Result:
    """The state that is handed on lacks what came before the step."""
    o, _ = run(*args, **given)
    _, states = run(*args, **{**given, "initial_state": torch.zeros_like(given["initial_state"])})
    return o, states


WRONG_CORES: dict[str, Change] = {
    "scale left out": _scale_left_out,
    "no l2norm": _no_l2norm,
    "no decay": _no_decay,
    "no step size": _no_step_size,
    "wrong key head": _wrong_key_head,
    "sequences run together": _sequences_run_together,
    "state of this step only": _states_of_one_chunk_only,
}


def _transposed(original: Any) -> Any:
    """Take the pool for `[HV, V, K]`, as it is declared."""
    return lambda *args: original(*args[:-1], StateLayout.VALUE_FIRST)


def _dropped(original: Any) -> Any:
    return lambda *args: torch.zeros_like(original(*args))


def _not_written(original: Any) -> Any:
    return lambda *args: None


def _to_the_neighbour(original: Any) -> Any:
    return lambda pool, slots, *rest: original(pool, slots.roll(1), *rest)


WRONG_STATES: dict[str, dict[str, Callable[[Any], Any]]] = {
    "state layout transposed": {"gather_states": _transposed, "scatter_states": _transposed},
    "state transposed on its way in": {"gather_states": _transposed},
    "state transposed on its way out": {"scatter_states": _transposed},
    "initial state dropped": {"gather_states": _dropped},
    "initial state of another sequence": {"gather_states": _to_the_neighbour},
    "final state not written": {"scatter_states": _not_written},
    "final state to another slot": {"scatter_states": _to_the_neighbour},
}
"""By name, what is done to which function of `gdn_layer`."""


@contextmanager
def wrong_states(name: str) -> Iterator[None]:
    """Break how the layer moves states to and from the pool."""
    changes = WRONG_STATES[name]
    broken = {function: change(getattr(gdn_layer, function)) for function, change in changes.items()}
    with mock.patch.multiple(gdn_layer, **broken):
        yield
