"""Balance scheduling: vLLM's scheduler, which admits waiting requests only while a policy lets it.

After each step all ranks gather their counts, in one collective; the policy makes of them the one answer that
holds for the next step. Requests that run are never touched.
"""

import time
from collections.abc import Callable, Sequence

from ..reference.errors import SchedulerStateError, invalid_argument
from .admission import AdmissionPolicy, RankCounts
from .checks import check_int
from .config import SchedulerConfig
from .connector import KVConnector
from .lifecycle import PauseState
from .output import SchedulerOutput
from .upstream import AsyncUpstreamScheduler, StructuredOutputManager, UpstreamScheduler


class BalanceScheduler(UpstreamScheduler):
    """`UpstreamScheduler` behind an admission policy.

    Who drives it calls, once a step and after it, `counts()`, carries the result to all ranks, and calls
    `observe()` with what came back. Before the first gather the gate is as if all ranks were empty.

    Args:
        config: limits and features; the same on all ranks.
        policy: of scheduler/admission.py, made for `config.max_num_seqs`.
        dp_rank, dp_size: which of how many ranks this is.
        connector, structured_output_manager, clock: see `UpstreamScheduler`.

    Attributes:
        is_open: whether the next step may admit waiting requests.
        num_gathers: so far.
        num_frozen_steps: steps so far in which somebody waited, and the gate was shut.

    Raises:
        InvalidArgumentError: for a policy that is none or was made for another cap, or a rank out of range.
    """

    def __init__(
        self,
        config: SchedulerConfig,
        *,
        policy: AdmissionPolicy,
        dp_rank: int = 0,
        dp_size: int = 1,
        connector: KVConnector | None = None,
        structured_output_manager: StructuredOutputManager | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        super().__init__(
            config,
            connector=connector,
            structured_output_manager=structured_output_manager,
            admission_gate=lambda: self.is_open,
            clock=clock,
        )
        if not callable(policy):
            invalid_argument("policy", policy, "a function of the gathered counts, see make_policy()")
        cap = getattr(policy, "max_num_running_reqs", config.max_num_seqs)
        if cap != config.max_num_seqs:
            invalid_argument("policy.max_num_running_reqs", cap, f"max_num_seqs = {config.max_num_seqs}")
        check_int("dp_size", dp_size, 1)
        check_int("dp_rank", dp_rank, 0, dp_size - 1)
        self.policy = policy
        self.dp_rank = dp_rank
        self.dp_size = dp_size
        self.is_open = policy((RankCounts(),) * dp_size)
        self.num_gathers = 0
        self.num_frozen_steps = 0
        self._waited = 0
        self._is_saturated = False
        self._sent: RankCounts | None = None

    def schedule(self) -> SchedulerOutput:
        """A step of vLLM's; beside it, this rank notes how it went for those who wait."""
        output = super().schedule()
        is_waiting = self._num_waiting() > 0
        is_admitting = output.scheduled_new_reqs or output.scheduled_cached_reqs.resumed_req_ids
        self._waited = self._waited + 1 if is_waiting and not is_admitting else 0
        if self.is_open:
            self._is_saturated = is_waiting
        elif is_waiting:
            self.num_frozen_steps += 1
        return output

    def counts(self) -> RankCounts:
        """What this rank contributes to the gather after a step."""
        waiting = self._num_waiting()
        is_paused = self.pause_state == PauseState.PAUSED_ALL
        running = () if is_paused else self.running
        self._sent = RankCounts(
            step=self.num_gathers,
            running=len(running),
            waiting=waiting,
            prefilling=sum(request.is_prefill_chunk for request in running),
            waited=self._waited if waiting else 0,
            saturated=int(self._is_saturated and waiting > 0),
        )
        return self._sent

    def observe(self, gathered: Sequence[RankCounts]) -> None:
        """Take what all ranks contributed, in their order, and decide about the next step.

        Raises:
            SchedulerStateError: unless it holds one contribution of each rank, all of the same step, with
                this rank's own, as sent, in its place, and nobody over the cap. Nothing has changed then.
        """
        self._check(gathered)
        self.is_open = self.policy(gathered)
        self.num_gathers += 1
        self._sent = None

    def _check(self, gathered: Sequence[RankCounts]) -> None:
        place = f"rank {self.dp_rank}, gather {self.num_gathers}"
        if self._sent is None:
            raise SchedulerStateError(f"{place}: counts() was not called before observe()")
        if len(gathered) != self.dp_size:
            raise SchedulerStateError(f"{place}: {len(gathered)} contributions of {self.dp_size} ranks")
        if gathered[self.dp_rank] != self._sent:
            raise SchedulerStateError(f"{place}: sent {self._sent}, received {gathered[self.dp_rank]}")
        for rank, counts in enumerate(gathered):
            if counts.step != self.num_gathers:
                raise SchedulerStateError(f"{place}: rank {rank} is at gather {counts.step}")
            if min(counts) < 0:
                raise SchedulerStateError(f"{place}: rank {rank} contributes {counts}, below 0")
            if counts.running > self.max_num_running_reqs:
                raise SchedulerStateError(
                    f"{place}: rank {rank} runs {counts.running} requests, and max_num_running_reqs is "
                    f"{self.max_num_running_reqs} here: it must be the same on all ranks"
                )

    def _num_waiting(self) -> int:
        """Requests that an open gate could admit, as far as a count can tell."""
        if self.pause_state != PauseState.UNPAUSED:
            return 0
        return len(self.waiting) - self.num_waiting_for_streaming_input


class AsyncBalanceScheduler(BalanceScheduler, AsyncUpstreamScheduler):
    """`AsyncUpstreamScheduler` behind an admission policy; see `BalanceScheduler`."""
