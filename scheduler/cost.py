"""What a lockstep step takes: a model with few parameters, each with its unit.

    rank(r) = prefill_us_per_token * P_r + prefill_ns_per_pair * Q_r
            + decode_us_per_request * D_r + decode_ns_per_context_token * C_r
    step    = step_ms + (prefill_step_ms if any P_r) + expert_us_per_token * mean over ranks of (P_r + D_r)
            + max over ranks of rank(r)

with, for rank r in that step: P_r prompt tokens computed; Q_r pairs of such a token and a token that it
attends to; D_r requests that decode; C_r tokens that those attend to.

All ranks wait for the slowest (the maximum); what experts do is shared by all (the mean).
"""

import json
import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from ..reference.errors import InvalidArgumentError, invalid_argument
from .checks import MOST_NUMBER, check_type, read_object


class Parameter(NamedTuple):
    """What a parameter of the model is, in a few words, and its unit."""

    unit: str
    meaning: str


PARAMETERS: Mapping[str, Parameter] = {
    "step_ms": Parameter("ms", "any step"),
    "prefill_step_ms": Parameter("ms", "more, in a step in which any rank prefills"),
    "prefill_us_per_token": Parameter("us", "a prompt token, on its rank"),
    "prefill_ns_per_pair": Parameter("ns", "attention of a prompt token to one token, on its rank"),
    "expert_us_per_token": Parameter("us", "experts, for one token a rank, shared by all"),
    "decode_us_per_request": Parameter("us", "a request that decodes, on its rank"),
    "decode_ns_per_context_token": Parameter("ns", "attention of such a request to one token, on its rank"),
}
"""The parameters of `CostModel`, in the order of its fields."""


class RankWork(NamedTuple):
    """What one rank computes in one step.

    Attributes:
        prefill_tokens: prompt tokens, P.
        prefill_pairs: pairs of such a token and a token that it attends to, itself included, Q.
        decode_requests: requests that decode, D.
        context_tokens: tokens that these attend to, themselves included, C.
    """

    prefill_tokens: int = 0
    prefill_pairs: int = 0
    decode_requests: int = 0
    context_tokens: int = 0


class StepCost(NamedTuple):
    """What a step takes, and why, ms; `total` is the sum of the five parts after it.

    Attributes:
        total: of the step.
        fixed: `step_ms`.
        prefill_step: `prefill_step_ms`, where anybody prefills.
        experts: shared by all ranks.
        slowest_prefill, slowest_decode: the two parts of the slowest rank.
        ranks: what each rank takes for itself: the slowest never waits, another one waits for the difference.
    """

    total: float
    fixed: float
    prefill_step: float
    experts: float
    slowest_prefill: float
    slowest_decode: float
    ranks: tuple[float, ...]


@dataclass(frozen=True)
class CostModel:
    """Parameters of the model above, all >= 0.

    Attributes:
        step_ms: any step, ms: weights are read, kernels launched, experts exchanged.
        prefill_step_ms: ms more in a step in which any rank prefills, for all of them: the graph of a pure
            decode cannot be replayed.
        prefill_us_per_token: a prompt token, on its rank, us.
        prefill_ns_per_pair: attention of a prompt token to one token, ns.
        expert_us_per_token: experts, for one token a rank, us.
        decode_us_per_request: a request that decodes, us.
        decode_ns_per_context_token: its attention to one token, ns.
        source: where the numbers come from.

    Raises:
        InvalidArgumentError: for a number that is negative or not finite.
    """

    step_ms: float
    prefill_step_ms: float = 0.0
    prefill_us_per_token: float = 0.0
    prefill_ns_per_pair: float = 0.0
    expert_us_per_token: float = 0.0
    decode_us_per_request: float = 0.0
    decode_ns_per_context_token: float = 0.0
    source: str = ""

    def __post_init__(self) -> None:
        for name in PARAMETERS:
            value = getattr(self, name)
            if type(value) not in (int, float) or not 0 <= value <= MOST_NUMBER:
                invalid_argument(name, reprlib.repr(value), f"a finite number >= 0, at most {MOST_NUMBER:,}")
        check_type("source", self.source, str)

    def to_json(self) -> dict[str, Any]:
        """As a JSON object, with all its fields."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: object) -> "CostModel":
        """The inverse of `to_json`; fields that have a default value may be missing.

        Raises:
            InvalidArgumentError: the message starts with the name of the field that does not fit.
        """
        return read_object(cls, data, "", lambda name, value, place: value)

    def step(self, work: Sequence[RankWork]) -> StepCost:
        """What a step takes in which each rank does its part of `work`.

        Raises:
            InvalidArgumentError: for no rank at all.
        """
        if not work:
            invalid_argument("work", "empty", "one RankWork for each rank")
        prefill = [
            self.prefill_us_per_token * 1e-3 * w.prefill_tokens
            + self.prefill_ns_per_pair * 1e-6 * w.prefill_pairs
            for w in work
        ]
        decode = [
            self.decode_us_per_request * 1e-3 * w.decode_requests
            + self.decode_ns_per_context_token * 1e-6 * w.context_tokens
            for w in work
        ]
        ranks = tuple(p + d for p, d in zip(prefill, decode, strict=True))
        slowest = max(range(len(ranks)), key=ranks.__getitem__)
        prefill_step = self.prefill_step_ms if any(w.prefill_tokens for w in work) else 0.0
        num_tokens = sum(w.prefill_tokens + w.decode_requests for w in work)
        experts = self.expert_us_per_token * 1e-3 * num_tokens / len(work)
        return StepCost(
            self.step_ms + prefill_step + experts + ranks[slowest],
            self.step_ms,
            prefill_step,
            experts,
            prefill[slowest],
            decode[slowest],
            ranks,
        )


def load_cost(path: str | Path) -> CostModel:
    """Read a cost model from a JSON file: the object of `CostModel.to_json`.

    Raises:
        InvalidArgumentError: `FILE: reason` when the file cannot be read, is not JSON, or is no cost model.
    """
    try:
        return CostModel.from_json(json.loads(Path(path).read_text(encoding="utf-8")))
    except OSError as error:
        raise InvalidArgumentError(f"{path}: {error.strerror or error}") from None
    except InvalidArgumentError as error:
        raise InvalidArgumentError(f"{path}: {error}") from None
    except (ValueError, RecursionError) as error:
        raise InvalidArgumentError(f"{path}: the file is not JSON: {error}") from None
