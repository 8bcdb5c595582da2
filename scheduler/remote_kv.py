"""Scheduling around a remote KV cache: loads under way, loads that failed, blocks that are still being sent.

Source: the connector methods of vllm/v1/core/sched/scheduler.py, v0.17.0.
"""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from ..reference.errors import SchedulerStateError
from .connector import KVConnector
from .output import KVConnectorOutput
from .request import Request, RequestStatus
from .stats import PrefixCacheStats

if TYPE_CHECKING:
    from .lifecycle import RequestLifecycle


class BlockIds:
    """What a connector is shown of a block table."""

    def __init__(self, block_ids: tuple[list[int], ...], unhashed: list[int]) -> None:
        self._block_ids = block_ids
        self._unhashed = unhashed

    def get_block_ids(self) -> tuple[list[int], ...]:
        """All blocks of the request, a list a KV cache group."""
        return self._block_ids

    def get_unhashed_block_ids(self) -> list[int]:
        """Those that cannot be found by hash: the ones to be written."""
        return self._unhashed


class RemoteKV:
    """The part of a scheduler that talks to a connector."""

    def __init__(self, connector: KVConnector, scheduler: "RequestLifecycle") -> None:
        self.connector = connector
        self.scheduler = scheduler
        self.recompute_failures = scheduler.config.kv_load_failure_policy == "recompute"
        self.finished_recving_req_ids: set[str] = set()
        self.failed_recving_req_ids: set[str] = set()
        self.stats = PrefixCacheStats()

    def allocated(self, request: Request, num_local_tokens: int, num_external_tokens: int) -> None:
        """A waiting request was given blocks."""
        table = self.scheduler.kv_cache_manager.groups[0].req_to_blocks[request.request_id]
        blocks = BlockIds(
            self.scheduler.kv_cache_manager.get_block_ids(request.request_id),
            [block.block_id for block in table if block.key is None],
        )
        self.connector.update_state_after_alloc(request, blocks, num_external_tokens)
        if request.num_computed_tokens == 0 and self.scheduler.config.log_stats:
            num_queried = request.num_tokens - num_local_tokens
            preempted = request.num_preemptions > 0
            if num_queried:
                self.stats.record(num_queried, num_external_tokens, preempted=preempted)

    def take_finished(self, request: Request) -> bool:
        """Whether the load of a waiting request has ended; it then continues behind what was loaded."""
        request_id = request.request_id
        if request_id not in self.finished_recving_req_ids:
            return False
        manager = self.scheduler.kv_cache_manager
        if request_id in self.failed_recving_req_ids:
            # num_computed_tokens was cut to what arrived when the failure was reported.
            if request.num_computed_tokens:
                manager.cache_blocks(request, request.num_computed_tokens)
            else:
                manager.free(request)
            self.failed_recving_req_ids.remove(request_id)
        else:
            num_slots = len(manager.get_block_ids(request_id)[0]) * manager.block_size
            # At least one token is left to compute, for its logits are needed.
            num_computed_tokens = min(num_slots, request.num_tokens - 1)
            manager.cache_blocks(request, num_computed_tokens)
            request.num_computed_tokens = num_computed_tokens
        self.finished_recving_req_ids.remove(request_id)
        return True

    def abandon(self, request: Request) -> bool:
        """A request ends; returns whether a load into its blocks is still under way."""
        if request.status != RequestStatus.WAITING_FOR_REMOTE_KVS:
            return False
        is_loading = request.request_id not in self.finished_recving_req_ids
        self.finished_recving_req_ids.discard(request.request_id)
        self.failed_recving_req_ids.discard(request.request_id)
        return is_loading

    def finished(self, request: Request) -> tuple[bool, dict[str, Any] | None]:
        """A request finished: whether its blocks are still needed, and what its client is told."""
        manager = self.scheduler.kv_cache_manager
        return self.connector.request_finished(request, manager.get_block_ids(request.request_id)[0])

    def update_from_output(self, output: KVConnectorOutput) -> None:
        """Transfers that ended in this step.

        Raises:
            SchedulerStateError: for a request that is not known, or has no transfer.
        """
        self.connector.update_connector_output(output)
        for request_id in output.finished_recving or ():
            request = self._known(request_id)
            if request.status == RequestStatus.WAITING_FOR_REMOTE_KVS:
                self.finished_recving_req_ids.add(request_id)
            elif request.is_finished:
                self.scheduler.free_blocks(request)
            else:
                raise SchedulerStateError(f"{request_id} has received, but is {request.status.name}")
        for request_id in output.finished_sending or ():
            request = self._known(request_id)
            if not request.is_finished:
                raise SchedulerStateError(f"{request_id} has been sent, but is {request.status.name}")
            self.scheduler.free_blocks(request)

    def handle_invalid_blocks(self, invalid_block_ids: set[int]) -> set[str]:
        """Blocks that should have been loaded and were not: what depends on them is computed again, or fails.

        Returns:
            The requests whose output in this step is void.
        """
        waiting = (r for r in self.scheduler.waiting if r.status == RequestStatus.WAITING_FOR_REMOTE_KVS)
        failed_async, _ = self._cut_back(waiting, invalid_block_ids)
        failed_sync, wrong_block_ids = self._cut_back(self.scheduler.running, invalid_block_ids)
        if not failed_async and not failed_sync:
            return set()
        if not self.recompute_failures:
            self.scheduler.kv_cache_manager.evict_blocks(wrong_block_ids)
            return failed_async | failed_sync
        self.failed_recving_req_ids |= failed_async
        return failed_sync

    def reset(self) -> bool:
        """Empty the remote cache; whether that succeeded."""
        if self.connector.reset_cache() is False:
            return False
        self.stats.reset = True
        return True

    def take_stats(self) -> PrefixCacheStats:
        """Statistics since the last call."""
        stats, self.stats = self.stats, PrefixCacheStats()
        return stats

    def _cut_back(
        self, requests: Iterable[Request], invalid_block_ids: set[int]
    ) -> tuple[set[str], set[int]]:
        """Set num_computed_tokens of requests to what comes before their first invalid block.

        Of several running requests that share one, the first computes it again, the others count it computed.

        Returns:
            The requests concerned, and their blocks from the first invalid one on.
        """
        concerned: set[str] = set()
        wrong_block_ids: set[int] = set()
        taken_on: set[int] = set()
        for request in requests:
            table = self.scheduler.kv_cache_manager.get_block_ids(request.request_id)[0]
            num_computed = self._num_possibly_loaded(request, len(table))
            num_blocks = -(-num_computed // self.scheduler.config.block_size)
            invalid = [i for i in range(min(num_blocks, len(table))) if table[i] in invalid_block_ids]
            if not invalid:
                continue
            concerned.add(request.request_id)
            own = [i for i in invalid if table[i] not in taken_on]
            taken_on.update(table[i] for i in own)
            if own:
                request.num_computed_tokens = own[0] * self.scheduler.config.block_size
                request.num_external_computed_tokens -= num_computed - request.num_computed_tokens
                wrong_block_ids.update(table[own[0] :])
            else:
                request.num_computed_tokens = request.num_cached_tokens
        return concerned, wrong_block_ids

    def _num_possibly_loaded(self, request: Request, num_blocks: int) -> int:
        """Leading tokens of a request that may have come from the remote cache."""
        if request.status != RequestStatus.WAITING_FOR_REMOTE_KVS:
            return request.num_cached_tokens
        if request.request_id in self.failed_recving_req_ids:
            return request.num_computed_tokens
        return num_blocks * self.scheduler.config.block_size

    def _known(self, request_id: str) -> Request:
        request = self.scheduler.requests.get(request_id)
        if request is None:
            raise SchedulerStateError(f"{request_id} has ended a transfer, but is not known")
        return request
