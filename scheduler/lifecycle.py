"""Requests come, pause, give way and go: everything around the steps of a scheduler.

Source: vllm/v1/core/sched/{scheduler,interface}.py, v0.17.0.
"""

import enum
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

from ..reference.errors import SchedulerStateError, invalid_argument
from .checks import check_text, check_type
from .config import SchedulerConfig
from .connector import KVConnector
from .encoder_cache import EncoderCacheManager
from .kv_blocks import KVCacheManager, update_block_hashes
from .output import EngineCoreEventType
from .remote_kv import RemoteKV
from .request import Request, RequestStatus, StreamingUpdate
from .request_queue import create_request_queue
from .stats import SchedulerStats, SpecDecodingStats


class PauseState(enum.IntEnum):
    """What is scheduled: everything, only requests that run already, or nothing."""

    UNPAUSED = 0
    PAUSED_NEW = 1
    PAUSED_ALL = 2


FINISHED = tuple(status for status in RequestStatus if status > RequestStatus.PREEMPTED)


class RequestLifecycle:
    """The queues of a scheduler and what its requests hold.

    Args:
        config: limits and features.
        connector: a remote KV cache, or None; needs exactly one KV cache group, of full attention.
        clock: s, monotonic; for the timestamps of events.

    Attributes:
        requests: all that are not finished, or whose blocks a connector still needs, by id.
        waiting, running: the queues; every unfinished request is in one of them.
        finished_req_ids: finished since the last step.

    Raises:
        InvalidArgumentError: for a connector beside several KV cache groups.
    """

    def __init__(
        self,
        config: SchedulerConfig,
        *,
        connector: KVConnector | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        check_type("config", config, SchedulerConfig)
        if connector is not None and config.kv_groups != ("full_attention",):
            invalid_argument("config.kv_groups", config.kv_groups, "one of full attention, with a connector")
        self.config = config
        self.connector = connector
        self.clock = clock
        self.max_num_running_reqs = config.max_num_seqs
        self.max_model_len = config.max_model_len
        self.pause_state = PauseState.UNPAUSED

        self.requests: dict[str, Request] = {}
        self.waiting = create_request_queue(config.policy)
        self.running: list[Request] = []
        self.finished_req_ids: set[str] = set()
        self.finished_req_ids_by_client: defaultdict[int, set[str]] = defaultdict(set)
        self.prev_step_scheduled_req_ids: set[str] = set()
        self.num_waiting_for_streaming_input = 0

        self.kv_cache_manager = KVCacheManager(config)
        self.encoder_cache_manager = EncoderCacheManager(config)
        self.remote_kv = RemoteKV(connector, self) if connector else None

    def add_request(self, request: Request) -> None:
        """A new request; or, under the id of a session, its next input, or its end if not resumable.

        Raises:
            InvalidArgumentError: for an empty prompt, one without room for output, or an id that is taken.
        """
        check_type("request", request, Request)
        session = self.requests.get(request.request_id)
        if session is not None and session.streaming_queue is None:
            allowed = "the id of no unfinished request, or of a session"
            invalid_argument("request_id", request.request_id, allowed)
        is_end = session is not None and not request.resumable
        if not is_end and not 1 <= request.num_prompt_tokens < self.max_model_len:
            allowed = f"1 to max_model_len - 1 = {self.max_model_len - 1}"
            invalid_argument("len(prompt_token_ids)", request.num_prompt_tokens, allowed)
        if session is not None:
            self._continue_session(session, request)
            return
        self._update_block_hashes(request)
        self.waiting.add_request(request)
        self.requests[request.request_id] = request
        if self.config.log_stats:
            request.record_event(EngineCoreEventType.QUEUED, self.clock())

    def _continue_session(self, session: Request, request: Request) -> None:
        update = None
        if request.resumable:
            update = StreamingUpdate(
                tuple(request.prompt_token_ids),
                tuple(request.mm_features),
                request.sampling_params,
                request.arrival_time,
            )
        if session.streaming_queue is not None and session.status != RequestStatus.WAITING_FOR_STREAMING_REQ:
            session.streaming_queue.append(update)
        elif update:
            self._update_request_as_session(session, update)
        else:
            self.finish_requests(session.request_id, RequestStatus.FINISHED_ABORTED)

    def _goes_on(self, request: Request) -> bool:
        """Whether a stopped request is a session that is not over, and waits for its turn or for input."""
        if not request.resumable:
            return False
        if request.streaming_queue:
            update = request.streaming_queue.popleft()
            if update is None:
                return False
            self._update_request_as_session(request, update)
        else:
            request.status = RequestStatus.WAITING_FOR_STREAMING_REQ
            self.num_waiting_for_streaming_input += 1
        self.waiting.add_request(request)
        return True

    def _update_request_as_session(self, session: Request, update: StreamingUpdate) -> None:
        """Make a prompt of what was computed and the new input; the last sampled token is dropped."""
        num_computed_tokens = session.num_computed_tokens
        session.prompt_token_ids += session.all_token_ids[session.num_prompt_tokens : num_computed_tokens]
        del session.all_token_ids[num_computed_tokens:]
        session.output_token_ids.clear()
        base = session.num_tokens
        for feature in update.mm_features:
            position = replace(feature.mm_position, offset=feature.mm_position.offset + base)
            session.mm_features.append(replace(feature, mm_position=position))
        session.all_token_ids += update.prompt_token_ids
        session.prompt_token_ids += update.prompt_token_ids
        self._update_block_hashes(session)
        session.num_prompt_tokens = len(session.prompt_token_ids)
        session.arrival_time = update.arrival_time
        session.sampling_params = update.sampling_params
        if session.status == RequestStatus.WAITING_FOR_STREAMING_REQ:
            self.num_waiting_for_streaming_input -= 1
        session.status = RequestStatus.WAITING
        if self.config.log_stats:
            session.record_event(EngineCoreEventType.QUEUED, self.clock())

    def finish_requests(
        self, request_ids: str | Iterable[str] | None, finished_status: RequestStatus
    ) -> list[tuple[str, int]]:
        """End requests from outside, whatever their state.

        Args:
            request_ids: one, several, or None for all; unknown ones are ignored.
            finished_status: one of the finished ones.

        Returns:
            (id, client index) of those that ended.

        Raises:
            InvalidArgumentError: for a status that is not a finished one, or ids that are no texts.
        """
        if finished_status not in FINISHED:
            invalid_argument("finished_status", finished_status, "a FINISHED_ status")
        finished_status = RequestStatus(finished_status)
        if isinstance(request_ids, str):
            request_ids = (request_ids,)
        elif request_ids is not None and not isinstance(request_ids, Iterable):
            invalid_argument("request_ids", request_ids, "an id, several, or None")
        request_ids = self.requests if request_ids is None else set(request_ids)
        for request_id in request_ids:
            check_text("request_ids", request_id)
        found = (self.requests.get(request_id) for request_id in request_ids)
        requests = [request for request in found if request and not request.is_finished]
        running = {request for request in requests if request.status == RequestStatus.RUNNING}
        waiting = {request for request in requests if request.status != RequestStatus.RUNNING}
        for request in waiting:
            self.num_waiting_for_streaming_input -= request.status == RequestStatus.WAITING_FOR_STREAMING_REQ
        self._remove_from_queues(running, waiting)
        for request in requests:
            # Blocks that are being loaded into cannot be given to anybody yet.
            is_loading = self.remote_kv is not None and self.remote_kv.abandon(request)
            request.status = finished_status
            self._free_request(request, delay_free_blocks=is_loading)
        return [(request.request_id, request.client_index) for request in requests]

    def _update_block_hashes(self, request: Request) -> None:
        """Hash what has become full, where anybody looks for it: the prefix cache, or the remote one."""
        if self.config.enable_prefix_caching or self.connector:
            update_block_hashes(request, self.config.block_size)

    def _remove_from_queues(self, running: set[Request], waiting: set[Request]) -> None:
        if running:
            self.running = [request for request in self.running if request not in running]
        if waiting:
            self.waiting.remove_requests(waiting)

    def _free_request(self, request: Request, delay_free_blocks: bool = False) -> dict[str, Any] | None:
        """Give up what a finished request holds; returns what the connector has to tell its client."""
        is_sending, kv_transfer_params = False, None
        if self.remote_kv:
            is_sending, kv_transfer_params = self.remote_kv.finished(request)
        self.encoder_cache_manager.free(request)
        self.finished_req_ids.add(request.request_id)
        if self.config.include_finished_set:
            self.finished_req_ids_by_client[request.client_index].add(request.request_id)
        if not (delay_free_blocks or is_sending):
            self.free_blocks(request)
        return kv_transfer_params

    def free_blocks(self, request: Request) -> None:
        """Give up the blocks of a finished request, and forget it."""
        self.kv_cache_manager.free(request)
        del self.requests[request.request_id]

    def _preempt_request(self, request: Request, timestamp: float) -> None:
        """Back to the waiting ones, with nothing computed; the request is out of `running` already."""
        if request.status != RequestStatus.RUNNING:
            raise SchedulerStateError(f"{request.request_id} does not run")
        self.kv_cache_manager.free(request)
        self.encoder_cache_manager.free(request)
        request.status = RequestStatus.PREEMPTED
        request.num_computed_tokens = 0
        request.spec_token_ids = []
        request.num_preemptions += 1
        if self.config.log_stats:
            request.record_event(EngineCoreEventType.PREEMPTED, timestamp)
        self.waiting.prepend_request(request)

    def set_pause_state(self, pause_state: PauseState) -> None:
        if pause_state not in list(PauseState):
            invalid_argument("pause_state", pause_state, "0, 1 or 2")
        self.pause_state = PauseState(pause_state)

    def get_num_unfinished_requests(self) -> int:
        """Requests that a step could do something for."""
        if self.pause_state == PauseState.PAUSED_ALL:
            return 0
        if self.pause_state == PauseState.PAUSED_NEW:
            return len(self.running)
        return len(self.waiting) - self.num_waiting_for_streaming_input + len(self.running)

    def has_unfinished_requests(self) -> bool:
        return self.get_num_unfinished_requests() > 0

    def has_finished_requests(self) -> bool:
        """Whether the model runner does not know yet of some request that it finished."""
        return len(self.finished_req_ids) > 0

    def has_requests(self) -> bool:
        """Whether there is any reason for a step."""
        return self.has_unfinished_requests() or self.has_finished_requests()

    def get_request_counts(self) -> tuple[int, int]:
        """(running, waiting)."""
        return len(self.running), len(self.waiting)

    def reset_prefix_cache(self, reset_running_requests: bool = False, reset_connector: bool = False) -> bool:
        """Forget all cached content.

        Args:
            reset_running_requests: preempt all running requests first; without, nothing is done while
                anybody holds blocks.
            reset_connector: empty the remote cache too.

        Returns:
            Whether it was done.

        Raises:
            SchedulerStateError: when blocks are held even so (by requests that load, or by sessions).
        """
        if reset_running_requests:
            timestamp = self.clock()
            running, self.running = self.running, []
            for request in reversed(running):  # so that the first waits first
                self._preempt_request(request, timestamp)
                # The token in flight, if any, will be sampled again.
                request.num_output_placeholders = 0
                request.discard_latest_async_tokens = True
            self.prev_step_scheduled_req_ids = set()
        done = self.kv_cache_manager.reset_prefix_cache()
        if reset_running_requests and not done:
            raise SchedulerStateError(
                "blocks are held although no request runs: the prefix cache was not reset"
            )
        if reset_connector:
            done = self.remote_kv is not None and self.remote_kv.reset() and done
        return done

    def reset_encoder_cache(self) -> None:
        """Forget all encoder outputs."""
        self.encoder_cache_manager.reset()

    def make_stats(self, spec_decoding_stats: SpecDecodingStats | None = None) -> SchedulerStats | None:
        """State now, and what was counted since the last call; None without log_stats."""
        if not self.config.log_stats:
            return None
        return SchedulerStats(
            num_running_reqs=len(self.running),
            num_waiting_reqs=len(self.waiting),
            kv_cache_usage=self.kv_cache_manager.block_pool.usage,
            encoder_cache_usage=self.encoder_cache_manager.usage,
            prefix_cache_stats=self.kv_cache_manager.take_prefix_cache_stats(),
            connector_prefix_cache_stats=self.remote_kv.take_stats() if self.remote_kv else None,
            spec_decoding_stats=spec_decoding_stats,
        )
