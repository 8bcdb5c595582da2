"""Engines of a data-parallel group for tests: one that checks everything, and one that is small and fast."""

from collections.abc import Iterable

from ..scheduler.balance import BalanceScheduler
from ..scheduler.output import ModelRunnerOutput
from ..scheduler.request import Request, RequestStatus, SamplingParams

TOKEN = 7


class TinyEngine:
    """A scheduler, and a model that says the same token for ever.

    Attributes:
        finished: ids of requests that were served to their last token, in order.
    """

    def __init__(self, scheduler: BalanceScheduler) -> None:
        self.scheduler = scheduler
        self.finished: list[str] = []

    def add_request(self, request: tuple[str, int]) -> None:
        """A request of one prompt token: its id, and how many tokens it asks for."""
        request_id, max_tokens = request
        self.scheduler.add_request(Request(request_id, [1], SamplingParams(max_tokens=max_tokens)))

    def abort(self, request_ids: Iterable[str]) -> None:
        self.scheduler.finish_requests(request_ids, RequestStatus.FINISHED_ABORTED)

    def has_work(self) -> bool:
        return self.scheduler.has_requests()

    def step(self) -> bool:
        output = self.scheduler.schedule()
        ids = list(output.num_scheduled_tokens)
        outputs = self.scheduler.update_from_output(output, ModelRunnerOutput(ids, [[TOKEN]] * len(ids)))
        self.finished += [
            told.request_id
            for of_client in outputs.values()
            for told in of_client.outputs
            if told.finish_reason is not None
        ]
        return output.total_num_scheduled_tokens > 0
