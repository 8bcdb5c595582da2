"""What a rank contributes to a gather, and what it makes of what came back: part of a balance scheduler."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ..reference.errors import SchedulerStateError, invalid_argument
from .admission import AdmissionPolicy, RankCounts
from .checks import check_int
from .lifecycle import PauseState


class GatheredAdmission:
    """Made part of a scheduler, it keeps the gate: counts, decision, and how steps went for those who wait.

    The scheduler calls `_start_gathering()` once it is made and `_note_step()` after each step, and looks at
    `is_open` before one. Read are attributes that vLLM's scheduler has under the same names.

    Attributes:
        is_open: whether the next step may admit waiting requests.
        num_gathers: so far.
        num_frozen_steps: steps so far in which somebody waited, and the gate was shut.
        admission_policy, admission_cap, dp_rank, dp_size: as given. (`policy` is vLLM's order of the queue.)
    """

    if TYPE_CHECKING:
        running: Any
        waiting: Any
        pause_state: Any
        num_waiting_for_streaming_input: int

    def _start_gathering(self, policy: AdmissionPolicy, cap: int, dp_rank: int, dp_size: int) -> None:
        """Begin, with `cap`, the requests that may run on one rank.

        Raises:
            InvalidArgumentError: for a policy that is none or of another cap, or a rank out of range.
        """
        if not callable(policy):
            invalid_argument("policy", policy, "a function of the gathered counts, see make_policy()")
        made_for = getattr(policy, "max_num_running_reqs", cap)
        if made_for != cap:
            invalid_argument("policy.max_num_running_reqs", made_for, f"max_num_seqs = {cap}")
        check_int("dp_size", dp_size, 1)
        check_int("dp_rank", dp_rank, 0, dp_size - 1)
        self.admission_policy = policy
        self.admission_cap = cap
        self.dp_rank = dp_rank
        self.dp_size = dp_size
        self.is_open = policy((RankCounts(),) * dp_size)
        self.num_gathers = 0
        self.num_frozen_steps = 0
        self._waited = 0
        self._is_saturated = False
        self._sent: RankCounts | None = None

    def _note_step(self, output: Any) -> None:
        """Note how a step, the output of `schedule()`, went for those who wait."""
        is_waiting = self._num_waiting() > 0
        is_admitting = output.scheduled_new_reqs or output.scheduled_cached_reqs.resumed_req_ids
        self._waited = self._waited + 1 if is_waiting and not is_admitting else 0
        if self.is_open:
            self._is_saturated = is_waiting
        elif is_waiting:
            self.num_frozen_steps += 1

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
        self.is_open = self.admission_policy(gathered)
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
            if counts.running > self.admission_cap:
                raise SchedulerStateError(
                    f"{place}: rank {rank} runs {counts.running} requests, and max_num_running_reqs is "
                    f"{self.admission_cap} here: it must be the same on all ranks"
                )

    def _num_waiting(self) -> int:
        """Requests that an open gate could admit, as far as a count can tell."""
        if self.pause_state != PauseState.UNPAUSED:
            return 0
        return len(self.waiting) - self.num_waiting_for_streaming_input
