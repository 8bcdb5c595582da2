"""Waiting requests in the order of the policy.

The priority queue is a heap over live requests, with vLLM's very operations: a session that gets new input
changes its arrival time inside the heap, and what order follows from that depends on them.

Source: vllm/v1/core/sched/request_queue.py, v0.17.0.
"""

import heapq
from collections import deque
from collections.abc import Collection, Iterable, Iterator

from .request import Request


class FCFSRequestQueue(deque[Request]):
    """First come, first served; what is put back goes to the front."""

    add_request = deque.append
    pop_request = deque.popleft
    prepend_request = deque.appendleft

    def peek_request(self) -> Request:
        return self[0]

    def prepend_requests(self, requests: Iterable[Request]) -> None:
        """Put requests back one after the other: the last of them is then the first."""
        self.extendleft(requests)

    def remove_requests(self, requests: Collection[Request]) -> None:
        kept = [request for request in self if request not in requests]
        self.clear()
        self.extend(kept)


class PriorityRequestQueue:
    """The smallest (priority, arrival time, id) first; there is no front to put anything back to."""

    def __init__(self) -> None:
        self._heap: list[Request] = []

    def add_request(self, request: Request) -> None:
        heapq.heappush(self._heap, request)

    prepend_request = add_request

    def pop_request(self) -> Request:
        return heapq.heappop(self._heap)

    def peek_request(self) -> Request:
        return self._heap[0]

    def prepend_requests(self, requests: Iterable[Request]) -> None:
        for request in requests:
            self.add_request(request)

    def remove_requests(self, requests: Collection[Request]) -> None:
        self._heap = [request for request in self._heap if request not in requests]
        heapq.heapify(self._heap)

    def __len__(self) -> int:
        return len(self._heap)

    def __iter__(self) -> Iterator[Request]:
        heap = self._heap.copy()
        while heap:
            yield heapq.heappop(heap)


RequestQueue = FCFSRequestQueue | PriorityRequestQueue


def create_request_queue(policy: str) -> RequestQueue:
    """An empty queue for a policy of `SchedulerConfig`."""
    return PriorityRequestQueue() if policy == "priority" else FCFSRequestQueue()
