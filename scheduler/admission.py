"""When waiting requests may be admitted: policies, pure functions of what all data-parallel ranks gathered.

Every rank decides from the same gather, so that all decide alike. A policy knows nothing else: no clock, no
queue, no memory of its own. docs/balance.md has a truth table of each.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from ..reference.errors import invalid_argument
from .checks import check_int, check_type


class RankCounts(NamedTuple):
    """What one rank contributes to a gather: ints, so that one collective carries all of it.

    Attributes:
        step: gathers before this one; the same on all ranks.
        running: requests that run; 0 while the rank is paused altogether, for then it holds up nobody.
        waiting: requests that wait for admission; 0 while the rank admits nobody because it is paused.
        prefilling: those of `running` whose prompt is not computed to its end.
        waited: steps in a row in which somebody waited here, and nobody was admitted.
        saturated: 1 when the last step with an open gate left somebody waiting here, else 0.
    """

    step: int = 0
    running: int = 0
    waiting: int = 0
    prefilling: int = 0
    waited: int = 0
    saturated: int = 0


AdmissionPolicy = Callable[[Sequence[RankCounts]], bool]
"""Counts of all ranks, in their order, to whether the next step may admit waiting requests."""


@dataclass(frozen=True)
class _Capped:
    """What every policy is told: the cap of a rank."""

    max_num_running_reqs: int

    def __post_init__(self) -> None:
        check_int("max_num_running_reqs", self.max_num_running_reqs, 1)


@dataclass(frozen=True)
class OpenGate(_Capped):
    """Always: vLLM without balance scheduling.

    Args:
        max_num_running_reqs: the cap, requests that may run on one rank, >= 1.
    """

    def __call__(self, gathered: Sequence[RankCounts]) -> bool:
        return True


@dataclass(frozen=True)
class AnyRankAtCap(_Capped):
    """Not while the fullest rank is at the cap.

    Args:
        max_num_running_reqs: the cap, requests that may run on one rank, >= 1.

    Source: vllm_ascend/patch/platform/patch_balance_schedule.py, as of vllm-ascend #5212, and again since
    #8675.
    """

    def __call__(self, gathered: Sequence[RankCounts]) -> bool:
        return max(counts.running for counts in gathered) != self.max_num_running_reqs


@dataclass(frozen=True)
class AnyRankNearCap(_Capped):
    """Not while the fullest rank is at the cap, or one request below it.

    Args:
        max_num_running_reqs: the cap, requests that may run on one rank, >= 2: with a cap of 1 an empty rank
            is one request below it, and nobody would ever be admitted.

    Source: vllm_ascend/patch/platform/patch_balance_schedule.py, from vllm-ascend #7611 to #8675.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_num_running_reqs == 1:
            invalid_argument(
                "max_num_running_reqs",
                1,
                ">= 2 with the policy any_rank_near_cap, which would never admit anybody",
            )

    def __call__(self, gathered: Sequence[RankCounts]) -> bool:
        return max(counts.running for counts in gathered) < self.max_num_running_reqs - 1


@dataclass(frozen=True)
class Cadence(_Capped):
    """Every `interval`-th step; in the others only when some rank is saturated, or nobody decodes.

    Upstream asks both on each rank alone, and also holds back prompts that are half computed; here all ranks
    answer alike, and whoever was admitted goes on.

    Args:
        max_num_running_reqs: the cap, requests that may run on one rank, >= 1.
        interval: steps, >= 1; 1 is always.

    Source: vllm #44558 (prefill_schedule_interval, and prefill_capacity_bound as its saturation guard).
    """

    interval: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        check_int("interval", self.interval, 1)

    def __call__(self, gathered: Sequence[RankCounts]) -> bool:
        return (
            gathered[0].step % self.interval == 0
            or any(counts.saturated for counts in gathered)
            or all(counts.running == counts.prefilling for counts in gathered)
        )


QUORUM = 0.75  # of the ranks
MOST_EXCESS = 2  # requests a rank


@dataclass(frozen=True)
class Patient(_Capped):
    """Not while the fullest rank is at the cap, for as long as waiting costs less than it spares.

    A prefill on one rank holds up all; admissions are therefore best made on many ranks in one step. Waiting
    for that leaves slots empty. The gate is open when any of these holds:

    1. no rank is at the cap, so that there is no need to wait for anybody;
    2. somebody prefills already, so that more prompts cost little;
    3. on three quarters of the ranks somebody waits for whom there is a slot, and no more than two requests a
       rank wait without one (`excess` in all);
    4. the slot-steps lost by waiting (over ranks: `waited` times the waiting requests for which there are
       slots) have reached `patience` for each rank, and `excess ** 2` more: an open gate does not admit
       those without a slot, and each step without a prefill brings them nearer to one;
    5. somebody for whom there is a slot has waited for `most_steps`.

    Args:
        max_num_running_reqs: the cap, requests that may run on one rank, >= 1.
        patience: slot-steps a rank, >= 1; less is nearer to `open_gate`, more to `any_rank_at_cap`.
        most_steps: steps, >= 1.

    Source: our own; docs/published.md has what it was measured by, and where it loses.
    """

    patience: int = 16
    most_steps: int = 2048

    def __post_init__(self) -> None:
        super().__post_init__()
        check_int("patience", self.patience, 1)
        check_int("most_steps", self.most_steps, 1)

    def __call__(self, gathered: Sequence[RankCounts]) -> bool:
        cap = self.max_num_running_reqs
        if max(counts.running for counts in gathered) < cap:
            return True
        if any(counts.prefilling for counts in gathered):
            return True
        # (requests, steps that they have waited) where there are slots for them; a rank at the cap has none.
        admissible = [(min(c.waiting, cap - c.running), c.waited) for c in gathered]
        if any(requests and waited >= self.most_steps for requests, waited in admissible):
            return True
        num_able = sum(requests > 0 for requests, _ in admissible)
        excess = sum(c.waiting for c in gathered) - sum(requests for requests, _ in admissible)
        if num_able >= QUORUM * len(gathered) and excess <= MOST_EXCESS * len(gathered):
            return True
        lost = sum(requests * waited for requests, waited in admissible)
        return lost >= self.patience * len(gathered) + excess**2


POLICIES: Mapping[str, Callable[..., AdmissionPolicy]] = {
    "open_gate": OpenGate,
    "any_rank_at_cap": AnyRankAtCap,
    "any_rank_near_cap": AnyRankNearCap,
    "cadence": Cadence,
    "patient": Patient,
}
"""Every policy by its name; each takes `max_num_running_reqs`, and its own parameters by keyword."""


def make_policy(spec: str, max_num_running_reqs: int) -> AdmissionPolicy:
    """A policy from its text form.

    Args:
        spec: `NAME` or `NAME:PARAMETER=INT,...`, as "cadence:interval=4".
        max_num_running_reqs: the cap, requests that may run on one rank, >= 1.

    Raises:
        InvalidArgumentError: for an unknown name or parameter, a value that is no int, or one that the policy
            refuses.
    """
    check_type("policy", spec, str)
    name, _, given = spec.partition(":")
    if name not in POLICIES:
        invalid_argument("policy", repr(spec), f"one of {', '.join(POLICIES)}")
    known = [p for p in inspect.signature(POLICIES[name]).parameters if p != "max_num_running_reqs"]
    parameters: dict[str, Any] = {}
    for part in filter(None, given.split(",")):
        key, _, value = part.partition("=")
        if key not in known or key in parameters:
            allowed = f"{name} with {', '.join(known)}, each once" if known else f"{name} alone"
            invalid_argument("policy", repr(spec), allowed)
        try:
            parameters[key] = int(value)
        except ValueError:
            invalid_argument("policy", repr(spec), f"an int for {key}")
    return POLICIES[name](max_num_running_reqs=max_num_running_reqs, **parameters)
