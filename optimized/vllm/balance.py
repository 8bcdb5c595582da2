# pyright: reportMissingImports=false
"""Balance scheduling in vLLM: its own scheduler, admitting waiting requests only while a policy lets it."""

import time
from typing import Any

from vllm.logger import init_logger
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.request import RequestStatus

from ...reference.errors import SchedulerStateError
from ...scheduler.admission import make_policy
from ...scheduler.gathered_admission import GatheredAdmission, PauseState
from . import balance_metrics
from .admission_gate import find_gate
from .refusals import refuse_what_cannot_be_served
from .settings import read_settings

_logger = init_logger(f"vllm.{__name__}")


class BalanceScheduler(GatheredAdmission, Scheduler):
    """The installed vLLM's `Scheduler` behind an admission policy.

    After each step of the data-parallel engine, the plugin's engine hook gathers the counts of all ranks.
    Where async scheduling is on, an `AsyncBalanceScheduler` is made.

    Args:
        vllm_config: vLLM's; `additional_config` names the policy (see `read_settings`).
        args, kwargs: whatever else the installed scheduler takes.

    Raises:
        InvalidArgumentError, UnavailableError: as `refuse_what_cannot_be_served`.
    """

    def __new__(cls, vllm_config: Any, *args: Any, **kwargs: Any) -> "BalanceScheduler":
        is_async = cls is BalanceScheduler and vllm_config.scheduler_config.async_scheduling
        return object.__new__(AsyncBalanceScheduler if is_async else cls)

    def __init__(self, vllm_config: Any, *args: Any, **kwargs: Any) -> None:
        refuse_what_cannot_be_served(vllm_config)
        settings, parallel = read_settings(vllm_config.additional_config), vllm_config.parallel_config
        super().__init__(vllm_config, *args, **kwargs)  # type: ignore[call-arg]
        cap_name, self._shut = find_gate(Scheduler.schedule)
        cap = getattr(self, cap_name)
        policy = make_policy(settings.policy, cap)
        self._start_gathering(policy, cap, parallel.data_parallel_rank, parallel.data_parallel_size)
        self.gather_seconds = 0.0
        self.frozen_request_seconds = 0.0
        self._frozen_at: tuple[float, int] | None = None
        self._is_gather_due = False
        if self.dp_size == 1:
            _logger.warning("Balance scheduling has nothing to balance: data_parallel_size is 1.")
        else:
            _logger.info("Balance scheduling is on, policy %s, at most %d requests a rank.", policy, cap)

    def schedule(self, *args: Any, **kwargs: Any) -> Any:
        """A step of vLLM's; waiting requests are admitted while the gate is open.

        Raises:
            SchedulerStateError: when the engine has gone on after a step without a gather.
        """
        if self._is_gather_due:
            raise SchedulerStateError(
                f"rank {self.dp_rank} steps again, and nothing was gathered after its last step: this engine "
                "does not call _has_global_unfinished_reqs, where balance scheduling gathers"
            )
        self._add_frozen_time()
        if self.is_open:
            output = super().schedule(*args, **kwargs)
        else:
            with self._shut(self):
                output = super().schedule(*args, **kwargs)
        self._note_step(output)
        if not self.is_open:
            self._frozen_at = (time.monotonic(), self._num_waiting())
        self._is_gather_due = self.dp_size > 1 and output.total_num_scheduled_tokens > 0
        return output

    def observe(self, gathered: Any) -> None:
        super().observe(gathered)
        self._is_gather_due = False

    def make_stats(self, *args: Any, **kwargs: Any) -> Any:
        """vLLM's statistics of a step, with those of balance scheduling."""
        stats = super().make_stats(*args, **kwargs)
        if stats is not None:
            self._add_frozen_time()
            balance_metrics.attach(stats, self)
        return stats

    def _num_waiting(self) -> int:
        """Whoever an open gate could admit.

        Newer vLLM keep those that hold blocks already in a queue of their own, and admit these even on a rank
        that is paused for new requests.
        """
        holding = getattr(self, "kv_holding_waiting", ())
        if self.pause_state == PauseState.UNPAUSED:
            return max(0, len(self.waiting) + len(holding) - self.num_waiting_for_streaming_input)
        if self.pause_state == PauseState.PAUSED_NEW:
            return sum(request.status != RequestStatus.WAITING_FOR_STREAMING_REQ for request in holding)
        return 0

    def _add_frozen_time(self) -> None:
        """Add the time since the last step, or the last call of this, for each who waited behind the gate."""
        if self._frozen_at is not None:
            since, waiting = self._frozen_at
            now = time.monotonic()
            self.frozen_request_seconds += waiting * (now - since)
            self._frozen_at = (now, waiting) if not self.is_open else None


class AsyncBalanceScheduler(BalanceScheduler, AsyncScheduler):
    """The installed vLLM's `AsyncScheduler` behind an admission policy; see `BalanceScheduler`."""
