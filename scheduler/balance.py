"""Balance scheduling: vLLM's scheduler, which admits waiting requests only while a policy lets it.

After each step all ranks gather their counts, in one collective; the policy makes of them the one answer that
holds for the next step. Requests that run are never touched.
"""

import time
from collections.abc import Callable

from .admission import AdmissionPolicy
from .config import SchedulerConfig
from .connector import KVConnector
from .gathered_admission import GatheredAdmission
from .output import SchedulerOutput
from .upstream import AsyncUpstreamScheduler, StructuredOutputManager, UpstreamScheduler


class BalanceScheduler(GatheredAdmission, UpstreamScheduler):
    """`UpstreamScheduler` behind an admission policy.

    Who drives it calls, once a step and after it, `counts()`, carries the result to all ranks, and calls
    `observe()` with what came back. Before the first gather the gate is as if all ranks were empty.

    Args:
        config: limits and features; the same on all ranks.
        policy: of scheduler/admission.py, made for `config.max_num_seqs`.
        dp_rank, dp_size: which of how many ranks this is.
        connector, structured_output_manager, clock: see `UpstreamScheduler`.

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
        self._start_gathering(policy, config.max_num_seqs, dp_rank, dp_size)

    def schedule(self) -> SchedulerOutput:
        """A step of vLLM's; beside it, this rank notes how it went for those who wait."""
        output = super().schedule()
        self._note_step(output)
        return output


class AsyncBalanceScheduler(BalanceScheduler, AsyncUpstreamScheduler):
    """`AsyncUpstreamScheduler` behind an admission policy; see `BalanceScheduler`."""
