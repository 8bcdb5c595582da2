"""The parameters of the cost model as arrays: what each makes of many steps, and which of them are fitted."""

import reprlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy.linalg import null_space

from ..reference.errors import invalid_argument
from .cost import PARAMETERS, CostModel

NAMES = tuple(PARAMETERS)
"""The order in which arrays have the parameters."""

_SHARED = [NAMES.index(name) for name in ("step_ms", "prefill_step_ms", "expert_us_per_token")]
_OWN = [
    NAMES.index(name)
    for name in (
        "prefill_us_per_token",
        "prefill_ns_per_pair",
        "decode_us_per_request",
        "decode_ns_per_context_token",
    )
]
_US, _NS = 1e-3, 1e-6  # ms
_MIXED = 1e-3  # part of a parameter in a direction that nothing determines


class StepsWork:
    """What many steps compute, as what each parameter makes of it.

    Args:
        counts: the fields of `RankWork`, `[steps, ranks, 4]`.
    """

    def __init__(self, counts: np.ndarray) -> None:
        tokens, pairs, requests, context = np.moveaxis(counts.astype(np.float64), 2, 0)
        self._of_ranks = np.stack([tokens * _US, pairs * _NS, requests * _US, context * _NS], axis=2)
        ones = np.ones(len(counts))
        self._shared = np.stack([ones, tokens.any(1), (tokens + requests).mean(1) * _US], axis=1)

    def features(self, values: np.ndarray) -> np.ndarray:
        """ms of each step for one unit of each parameter, `[steps, 7]`; the slowest rank is that of `values`.

        Times `values`, those of all parameters, it is what each step takes.
        """
        slowest = (self._of_ranks @ values[_OWN]).argmax(1)
        features = np.empty((len(slowest), len(NAMES)))
        features[:, _SHARED] = self._shared
        features[:, _OWN] = self._of_ranks[np.arange(len(slowest)), slowest]
        return features

    def step_ms(self, values: np.ndarray) -> np.ndarray:
        """What each step takes, `[steps]`, ms, for the values of all parameters."""
        return self.features(values) @ values

    def guesses(self) -> list[np.ndarray]:
        """Values that make the slowest rank that with the most of one kind of work, or of all kinds."""
        means = self._of_ranks.mean((0, 1))
        weights = np.divide(1, means, out=np.zeros_like(means), where=means > 0)
        guesses = []
        for kinds in (weights, *np.diag(weights)):
            guess = np.zeros(len(NAMES))
            guess[_OWN] = kinds
            guesses.append(guess)
        return guesses


class FreeParameters(NamedTuple):
    """Free parameters in units of their own, and what the others are held at.

    Attributes:
        places: of the free ones in the order of the model.
        units: of each of them, `[free]`.
        held: values of all parameters, `[7]`; those of the free ones do not matter.
    """

    places: list[int]
    units: np.ndarray
    held: np.ndarray

    @property
    def names(self) -> list[str]:
        return [NAMES[place] for place in self.places]

    def values(self, free: np.ndarray) -> np.ndarray:
        """Of all parameters, `[7]`."""
        values = self.held.copy()
        values[self.places] = free * self.units
        return values

    def check_told_apart(self, jacobian: np.ndarray, what: str, dependent: float) -> None:
        """Refuse parameters that `what` do not determine: a change of some makes up for one of others.

        Args:
            jacobian: of what is fitted, in the free parameters, `[any, free]`.
            what: is fitted, in words.
            dependent: singular values below this part of the largest count as none.
        """
        names = self.names
        lengths = np.linalg.norm(jacobian, axis=0)
        silent = [name for name, length in zip(names, lengths, strict=True) if not length > 0]
        if silent:
            allowed = f"without {', '.join(silent)}, of which {what} say nothing"
            invalid_argument("free", ", ".join(names), allowed)
        directions = null_space(jacobian / lengths, rcond=dependent)
        parts = np.abs(directions).max(1, initial=0)
        mixed = [name for name, part in zip(names, parts, strict=True) if part > _MIXED]
        if mixed:
            count = len(names) - directions.shape[1]
            allowed = f"{count} of them: {what} cannot tell apart {', '.join(mixed)}"
            invalid_argument("free", ", ".join(names), allowed)


def check_free(free: Sequence[str]) -> list[int]:
    """The places of the parameters, in the order of the model.

    Raises:
        InvalidArgumentError: for no parameter, an unknown one, or one that is named twice.
    """
    if isinstance(free, str) or not free or len(set(free)) != len(free) or not set(free) <= set(NAMES):
        invalid_argument("free", reprlib.repr(free), f"at least one of {', '.join(NAMES)}, each once")
    return sorted(NAMES.index(name) for name in free)


def cost_model(values: np.ndarray, source: str) -> CostModel:
    """The model with these values of all parameters, `[7]`."""
    return CostModel(**{name: float(x) for name, x in zip(NAMES, values, strict=True)}, source=source)


def describe_source(free: FreeParameters, what: str, source: str) -> str:
    """For `CostModel.source`: what was fitted to what, and where that comes from, "" if nobody said."""
    names = "all parameters" if len(free.places) == len(NAMES) else ", ".join(free.names)
    return f"fitted {names} to {what}" + f" of {source}" * bool(source)


def root_mean_square(errors: np.ndarray) -> float:
    return float(np.sqrt(np.mean(errors**2)))
