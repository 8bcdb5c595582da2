"""The v1 scheduler of vLLM v0.17.0, in plain Python: who computes how many tokens in the next step.

A request has tokens (prompt, output, drafts) and a number of computed tokens; scheduling is letting the
second catch up with the first, within the limits of a step. `schedule()` makes two passes: the running
requests, then the waiting ones. When a running request finds no free block, others give up theirs and start
again later.

The behaviour is vLLM's down to its mistakes, which docs/scheduler.md lists; nothing is repaired here.

Source: vllm/v1/core/sched/{scheduler,async_scheduler}.py, v0.17.0.
"""

import enum
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from ..reference.errors import SchedulerStateError, invalid_argument
from .config import SchedulerConfig
from .connector import KVConnector
from .kv_blocks import Block
from .lifecycle import PauseState, RequestLifecycle
from .output import (
    CachedRequestData,
    DraftTokenIds,
    EngineCoreEventType,
    EngineCoreOutput,
    EngineCoreOutputs,
    GrammarOutput,
    ModelRunnerOutput,
    NewRequestData,
    SchedulerOutput,
)
from .request import FINISH_REASONS, Request, RequestStatus, check_stop
from .request_queue import create_request_queue
from .stats import SpecDecodingStats


class StructuredOutputManager(Protocol):
    """Makes the grammar bitmask of a step."""

    def grammar_bitmask(
        self,
        requests: Mapping[str, Request],
        structured_output_request_ids: list[str],
        scheduled_spec_decode_tokens: Mapping[str, list[int]],
    ) -> Any:
        """Rows in the order of the ids; a request has one for each of its drafts, and one more."""
        ...


def open_gate() -> bool:
    """The admission gate of vLLM: there is none."""
    return True


class _Verdict(enum.Enum):
    """What became of the first waiting request."""

    ADMITTED = enum.auto()
    SKIPPED = enum.auto()  # not now; look at the next one
    NO_ROOM = enum.auto()  # nor is there for those behind it


@dataclass
class _Step:
    """A step while it is being put together."""

    token_budget: int
    encoder_compute_budget: int
    timestamp: float
    new: list[Request] = field(default_factory=list)
    resumed: list[Request] = field(default_factory=list)
    running: list[Request] = field(default_factory=list)
    preempted: list[Request] = field(default_factory=list)
    block_ids: dict[str, tuple[list[int], ...]] = field(default_factory=dict)
    num_scheduled_tokens: dict[str, int] = field(default_factory=dict)
    spec_decode_tokens: dict[str, list[int]] = field(default_factory=dict)
    encoder_inputs: dict[str, list[int]] = field(default_factory=dict)
    loras: set[int] = field(default_factory=set)


@dataclass
class _ComputedTokens:
    """Where a waiting request would start: tokens that it need not compute."""

    blocks: tuple[list[Block], ...]
    num_local: int
    num_external: int
    load_async: bool
    total: int


class UpstreamScheduler(RequestLifecycle):
    """vLLM's `Scheduler`.

    Args:
        config: limits and features.
        connector, clock: see `RequestLifecycle`, which also adds and ends requests.
        structured_output_manager: makes grammar bitmasks; needed once a structured request is scheduled.
        admission_gate: whether waiting requests may be admitted at all; asked once in each step that is not
            paused and in which nobody gave way. Default: always.

    Source: vllm/v1/core/sched/scheduler.py, v0.17.0.
    """

    def __init__(
        self,
        config: SchedulerConfig,
        *,
        connector: KVConnector | None = None,
        structured_output_manager: StructuredOutputManager | None = None,
        admission_gate: Callable[[], bool] = open_gate,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if not callable(admission_gate):
            invalid_argument("admission_gate", admission_gate, "a function that returns a bool")
        super().__init__(config, connector=connector, clock=clock)
        self.structured_output_manager = structured_output_manager
        self.admission_gate = admission_gate

    def schedule(self) -> SchedulerOutput:
        """Put the next step together: running requests first, then waiting ones if nobody had to give way."""
        paused = self.pause_state == PauseState.PAUSED_ALL
        step = _Step(
            token_budget=0 if paused else self.config.max_num_batched_tokens,
            encoder_compute_budget=self.config.max_num_encoder_input_tokens,
            timestamp=self.clock(),
        )
        self.kv_cache_manager.new_step_starts()
        self._schedule_running(step)
        if not step.preempted and self.pause_state == PauseState.UNPAUSED and self.admission_gate():
            self._schedule_waiting(step)
        output = self._make_output(step)
        if self.connector:
            output.kv_connector_metadata = self.connector.build_connector_meta(output)
        self._update_after_schedule(output)
        return output

    def _schedule_running(self, step: _Step) -> None:
        """First pass: give every running request its next tokens, in order, preempting from the end."""
        index = 0
        while index < len(self.running) and step.token_budget > 0:
            request = self.running[index]
            if self._is_certain_to_end(request):
                index += 1
                continue
            num_new_tokens = self._cap_long_prefill(
                request.num_tokens_with_spec + request.num_output_placeholders - request.num_computed_tokens
            )
            # With drafts the last token could lie behind the end of the model.
            num_new_tokens = min(
                num_new_tokens, step.token_budget, self.max_model_len - 1 - request.num_computed_tokens
            )
            num_new_tokens, encoder_inputs = self._plan_encoder_inputs(
                request, request.num_computed_tokens, num_new_tokens, step
            )
            if self.config.need_mamba_block_aligned_split:
                num_new_tokens = self._split_at_mamba_block(
                    request, request.num_computed_tokens, num_new_tokens
                )
            if num_new_tokens == 0:  # those behind it may still be served
                index += 1
                continue

            new_block_ids, num_given_way = self._allocate_or_preempt(request, num_new_tokens, step)
            index -= num_given_way
            if new_block_ids is None:
                break
            index += 1
            step.running.append(request)
            step.block_ids[request.request_id] = new_block_ids
            self._enter(request, num_new_tokens, encoder_inputs, step)
            self._take_drafts(request, num_new_tokens, step)
        if self.config.max_loras:
            loras = (request.lora_request for request in step.running)
            step.loras = {lora.lora_int_id for lora in loras if lora}
            _require(len(step.loras) <= self.config.max_loras, "more adapters run than max_loras")

    def _schedule_waiting(self, step: _Step) -> None:
        """Second pass: admit waiting requests in order, until one finds no room."""
        skipped = create_request_queue(self.config.policy)
        while self.waiting and step.token_budget > 0 and len(self.running) != self.max_num_running_reqs:
            request = self.waiting.peek_request()
            verdict = self._try_to_admit(request, step)
            if verdict is _Verdict.NO_ROOM:
                break
            self.waiting.pop_request()
            if verdict is _Verdict.SKIPPED:
                skipped.prepend_request(request)
        self.waiting.prepend_requests(skipped)

    def _try_to_admit(self, request: Request, step: _Step) -> _Verdict:
        """Admit the first waiting request, if it is ready and there is room for it."""
        if not self._becomes_ready(request) or self._exceeds_max_loras(request, step):
            return _Verdict.SKIPPED
        computed = self._find_computed_tokens(request)
        if computed is None:
            return _Verdict.SKIPPED
        num_new_tokens, encoder_inputs = 0, None
        if computed.load_async:
            _require(computed.num_external > 0, f"{request.request_id} is to load nothing")
        else:
            num_new_tokens = self._cap_long_prefill(request.num_tokens - computed.total)
            if not self.config.enable_chunked_prefill and num_new_tokens > step.token_budget:
                return _Verdict.NO_ROOM
            num_new_tokens = min(num_new_tokens, step.token_budget)
            _require(num_new_tokens > 0, f"{request.request_id} waits with nothing to compute")
            num_new_tokens, encoder_inputs = self._plan_encoder_inputs(
                request, computed.total, num_new_tokens, step
            )
            if self.config.need_mamba_block_aligned_split and num_new_tokens:
                num_new_tokens = self._split_at_mamba_block(request, computed.total, num_new_tokens)
            if num_new_tokens == 0:
                return _Verdict.NO_ROOM
        new_block_ids = self.kv_cache_manager.allocate_slots(
            request,
            num_new_tokens,
            num_new_computed_tokens=computed.num_local,
            new_computed_blocks=computed.blocks,
            # A request that has computed nothing gets no slots for drafts: a connector counts its blocks.
            num_lookahead_tokens=self.config.num_lookahead_tokens if request.num_computed_tokens else 0,
            num_external_computed_tokens=computed.num_external,
            delay_cache_blocks=computed.load_async,
        )
        if new_block_ids is None:
            self.encoder_cache_manager.free(request)
            return _Verdict.NO_ROOM
        if self.remote_kv:
            self.remote_kv.allocated(request, computed.num_local, computed.num_external)
        if computed.load_async:
            request.status = RequestStatus.WAITING_FOR_REMOTE_KVS
            return _Verdict.SKIPPED
        self._admit(request, computed.total, num_new_tokens, encoder_inputs, step)
        return _Verdict.ADMITTED

    def _admit(
        self,
        request: Request,
        num_computed_tokens: int,
        num_new_tokens: int,
        encoder_inputs: list[int] | None,
        step: _Step,
    ) -> None:
        """A waiting request runs from now on."""
        self.running.append(request)
        if self.config.log_stats:
            request.record_event(EngineCoreEventType.SCHEDULED, step.timestamp)
        (step.resumed if request.status == RequestStatus.PREEMPTED else step.new).append(request)
        if self.config.max_loras and request.lora_request:
            step.loras.add(request.lora_request.lora_int_id)
        step.block_ids[request.request_id] = self.kv_cache_manager.get_block_ids(request.request_id)
        request.status = RequestStatus.RUNNING
        request.num_computed_tokens = num_computed_tokens
        if request.num_cached_tokens < 0:
            request.num_cached_tokens = num_computed_tokens
        self._enter(request, num_new_tokens, encoder_inputs, step)

    def _enter(
        self, request: Request, num_new_tokens: int, encoder_inputs: list[int] | None, step: _Step
    ) -> None:
        """Enter a request's tokens and images into the step."""
        step.num_scheduled_tokens[request.request_id] = num_new_tokens
        step.token_budget -= num_new_tokens
        if encoder_inputs:
            step.encoder_inputs[request.request_id] = encoder_inputs
            for i in encoder_inputs:
                self.encoder_cache_manager.allocate(request, i)
            step.encoder_compute_budget -= _num_embeds(request, encoder_inputs)

    def _is_certain_to_end(self, request: Request) -> bool:
        """Async: whether the steps in flight give its last token, even if all their drafts are rejected."""
        num_in_flight = request.num_output_placeholders
        num_certain = request.num_computed_tokens - num_in_flight + 2
        return num_in_flight > 0 and num_certain >= request.num_prompt_tokens + request.max_tokens

    def _cap_long_prefill(self, num_new_tokens: int) -> int:
        threshold = self.config.long_prefill_token_threshold
        return threshold if 0 < threshold < num_new_tokens else num_new_tokens

    def _plan_encoder_inputs(
        self, request: Request, num_computed_tokens: int, num_new_tokens: int, step: _Step
    ) -> tuple[int, list[int] | None]:
        """How far a request gets with the images it can have, and those to compute."""
        if not request.mm_features:
            return num_new_tokens, None
        plan = self.encoder_cache_manager.plan_inputs(
            request, num_computed_tokens, num_new_tokens, step.encoder_compute_budget
        )
        return plan.num_new_tokens, plan.indices

    def _split_at_mamba_block(self, request: Request, num_computed_tokens: int, num_new_tokens: int) -> int:
        """Let a prefill end at a block boundary, so that the state there can be cached."""
        if num_computed_tokens >= max(request.num_prompt_tokens, request.num_tokens - 1):
            return num_new_tokens  # it decodes
        block_size = self.config.block_size
        last_boundary = request.num_tokens // block_size * block_size
        if self.config.use_eagle:  # which drops the last block of a hit
            last_boundary = max(last_boundary - block_size, 0)
        end = num_computed_tokens + num_new_tokens
        if end < last_boundary:
            return num_new_tokens // block_size * block_size
        if num_computed_tokens < last_boundary < end:
            return last_boundary - num_computed_tokens
        return num_new_tokens

    def _becomes_ready(self, request: Request) -> bool:
        """Whether what a waiting request waits for has come."""
        if request.status == RequestStatus.WAITING_FOR_REMOTE_KVS:
            if self.remote_kv is None or not self.remote_kv.take_finished(request):
                return False
            request.status = RequestStatus.PREEMPTED if request.num_preemptions else RequestStatus.WAITING
        elif request.status == RequestStatus.WAITING_FOR_FSM:
            if request.structured_output_request is None or request.structured_output_request.grammar is None:
                return False
            request.status = RequestStatus.WAITING
        return request.status != RequestStatus.WAITING_FOR_STREAMING_REQ

    def _exceeds_max_loras(self, request: Request, step: _Step) -> bool:
        return (
            request.lora_request is not None
            and len(step.loras) == self.config.max_loras
            and request.lora_request.lora_int_id not in step.loras
        )

    def _find_computed_tokens(self, request: Request) -> _ComputedTokens | None:
        """Tokens found in the prefix cache and, behind them, in the remote one; None: not known yet."""
        manager = self.kv_cache_manager
        if request.num_computed_tokens:  # loaded from outside, or a session that goes on
            return _ComputedTokens(manager.no_blocks, 0, 0, False, request.num_computed_tokens)
        blocks, num_local = manager.get_computed_blocks(request)
        num_external, load_async = 0, False
        if self.connector:
            found, load_async = self.connector.get_num_new_matched_tokens(request, num_local)
            if found is None:
                return None
            request.num_external_computed_tokens = num_external = found
        return _ComputedTokens(blocks, num_local, num_external, load_async, num_local + num_external)

    def _allocate_or_preempt(
        self, request: Request, num_new_tokens: int, step: _Step
    ) -> tuple[tuple[list[int], ...] | None, int]:
        """Give a running request its slots, at the cost of others if need be.

        Returns:
            Ids of the new blocks, None when it had to give way itself; and how many requests that were in the
            step already gave way.
        """
        num_given_way = 0
        while True:
            new_block_ids = self.kv_cache_manager.allocate_slots(
                request, num_new_tokens, num_lookahead_tokens=self.config.num_lookahead_tokens
            )
            if new_block_ids is not None:
                return new_block_ids, num_given_way
            victim = self._choose_victim()
            if victim in step.running:
                self._take_out(victim, step)
                num_given_way += 1
            self._preempt_request(victim, step.timestamp)
            step.preempted.append(victim)
            if victim is request:
                return None, num_given_way

    def _choose_victim(self) -> Request:
        """Take the request that has to give way out of the running ones: the last, or of lowest priority."""
        if self.config.policy == "fcfs":
            return self.running.pop()
        victim = max(self.running, key=lambda r: (r.priority, r.arrival_time))
        self.running.remove(victim)
        return victim

    def _take_out(self, request: Request, step: _Step) -> None:
        """Take a request out of the step that it was entered in."""
        request_id = request.request_id
        step.running.remove(request)
        step.token_budget += step.num_scheduled_tokens.pop(request_id)
        del step.block_ids[request_id]
        step.spec_decode_tokens.pop(request_id, None)
        step.encoder_compute_budget += _num_embeds(request, step.encoder_inputs.pop(request_id, ()))

    def _take_drafts(self, request: Request, num_new_tokens: int, step: _Step) -> None:
        """Enter as many drafts as there are slots behind the request's own tokens; the rest is dropped."""
        drafts = request.spec_token_ids
        if not drafts:
            return
        first_draft = request.num_tokens + request.num_output_placeholders
        num_drafts = request.num_computed_tokens + num_new_tokens - first_draft
        if num_drafts > 0:
            step.spec_decode_tokens[request.request_id] = drafts[:num_drafts]
        request.spec_token_ids = []

    def _make_output(self, step: _Step) -> SchedulerOutput:
        total = sum(step.num_scheduled_tokens.values())
        _require(total <= self.config.max_num_batched_tokens, f"{total} tokens are over the budget")
        _require(
            len(self.running) <= self.max_num_running_reqs, "more requests run than max_num_running_reqs"
        )
        num_common_prefix_blocks = [0] * len(self.config.kv_groups)
        if self.running:
            first = self.running[0].request_id
            num_common_prefix_blocks = self.kv_cache_manager.get_num_common_prefix_blocks(first)
        output = SchedulerOutput(
            scheduled_new_reqs=[
                NewRequestData(
                    req_id=request.request_id,
                    prompt_token_ids=request.prompt_token_ids,
                    mm_features=request.mm_features,
                    sampling_params=request.sampling_params,
                    block_ids=step.block_ids[request.request_id],
                    num_computed_tokens=request.num_computed_tokens,
                    lora_request=request.lora_request,
                )
                for request in step.new
            ],
            scheduled_cached_reqs=self._make_cached_request_data(step),
            num_scheduled_tokens=step.num_scheduled_tokens,
            total_num_scheduled_tokens=total,
            scheduled_spec_decode_tokens=step.spec_decode_tokens,
            scheduled_encoder_inputs=step.encoder_inputs,
            num_common_prefix_blocks=num_common_prefix_blocks,
            finished_req_ids=self.finished_req_ids,
            free_encoder_mm_hashes=self.encoder_cache_manager.get_freed_mm_hashes(),
            preempted_req_ids={request.request_id for request in step.preempted},
        )
        self.prev_step_scheduled_req_ids = set(step.num_scheduled_tokens)
        return output

    def _make_cached_request_data(self, step: _Step) -> CachedRequestData:
        """What is new of the requests that the model runner knows."""
        data = CachedRequestData(resumed_req_ids={request.request_id for request in step.resumed})
        for request in (*step.running, *step.resumed):
            request_id = request.request_id
            data.req_ids.append(request_id)
            if request_id not in self.prev_step_scheduled_req_ids:
                data.all_token_ids[request_id] = request.all_token_ids.copy()
            block_ids = step.block_ids[request_id]
            data.new_block_ids.append(block_ids if any(block_ids) else None)
            data.num_computed_tokens.append(request.num_computed_tokens)
            data.num_output_tokens.append(request.num_output_tokens + request.num_output_placeholders)
        return data

    def _update_after_schedule(self, output: SchedulerOutput) -> None:
        """Count the tokens as computed at once: the next step can be scheduled before this one ran."""
        for request_id, num_tokens in output.num_scheduled_tokens.items():
            request = self.requests[request_id]
            request.num_computed_tokens += num_tokens
            request.is_prefill_chunk = (
                request.num_computed_tokens < request.num_tokens + request.num_output_placeholders
            )
            if request.use_structured_output and not request.is_prefill_chunk:
                output.has_structured_output_requests = True
            if request.mm_features:
                self.encoder_cache_manager.free_used_inputs(request)
        self.finished_req_ids = set()  # the old set belongs to the output

    def get_grammar_bitmask(self, scheduler_output: SchedulerOutput) -> GrammarOutput | None:
        """What the grammars allow in this step; None when nobody samples under one."""
        if not scheduler_output.has_structured_output_requests:
            return None
        request_ids = [
            request_id
            for request_id in scheduler_output.num_scheduled_tokens
            if (request := self.requests.get(request_id))
            and request.use_structured_output
            and not request.is_prefill_chunk
        ]
        if not request_ids:
            return None
        if self.structured_output_manager is None:
            raise SchedulerStateError(
                "a structured request was scheduled without a structured_output_manager"
            )
        bitmask = self.structured_output_manager.grammar_bitmask(
            self.requests, request_ids, scheduler_output.scheduled_spec_decode_tokens
        )
        return GrammarOutput(request_ids, bitmask)

    def update_from_output(
        self, scheduler_output: SchedulerOutput, model_runner_output: ModelRunnerOutput
    ) -> dict[int, EngineCoreOutputs]:
        """Enter sampled tokens, end requests, and tell their clients.

        Args:
            scheduler_output: of the step that ran.
            model_runner_output: what it gave. A request that was aborted meanwhile is ignored.

        Returns:
            What each client is told, by client index; statistics go to one of them.

        Raises:
            InvalidArgumentError: without a row for each request of the step.
        """
        index = model_runner_output.req_id_to_index
        for request_id in scheduler_output.num_scheduled_tokens:
            if request_id in self.requests and request_id not in index:
                invalid_argument(
                    "model_runner_output.req_ids", model_runner_output.req_ids, f"with {request_id}"
                )
        connector_output = model_runner_output.kv_connector_output
        failed_req_ids: set[str] = set()
        if self.remote_kv and connector_output and connector_output.invalid_block_ids:
            failed_req_ids = self.remote_kv.handle_invalid_blocks(connector_output.invalid_block_ids)
        outputs: defaultdict[int, list[EngineCoreOutput]] = defaultdict(list)
        spec_stats = SpecDecodingStats(self.config.num_spec_tokens)
        stopped_running: set[Request] = set()
        stopped_waiting: set[Request] = set()
        for request_id, num_tokens in scheduler_output.num_scheduled_tokens.items():
            _require(num_tokens > 0, f"{request_id} was scheduled for {num_tokens} tokens")
            request = self.requests.get(request_id)
            if request_id in failed_req_ids or request is None or request.is_finished:
                continue
            sampled = model_runner_output.sampled_token_ids
            token_ids = sampled[index[request_id]] if sampled else []
            self._count_drafts(request, token_ids, scheduler_output, spec_stats)
            was_running = request.status == RequestStatus.RUNNING
            output, stopped = self._enter_tokens(request, token_ids)
            if stopped:
                (stopped_running if was_running else stopped_waiting).add(request)
            if output:
                outputs[request.client_index].append(output)
        self._remove_from_queues(stopped_running, stopped_waiting)

        if failed_req_ids and self.config.kv_load_failure_policy == "fail":
            failed = [self.requests[request_id] for request_id in failed_req_ids]
            self.finish_requests(failed_req_ids, RequestStatus.FINISHED_ERROR)
            for request in failed:
                outputs[request.client_index].append(
                    EngineCoreOutput(
                        request_id=request.request_id,
                        new_token_ids=[],
                        finish_reason=FINISH_REASONS[request.status],
                        events=request.take_events(),
                        num_cached_tokens=request.num_cached_tokens,
                    )
                )
        if self.remote_kv and connector_output:
            self.remote_kv.update_from_output(connector_output)
        return self._outputs_by_client(outputs, spec_stats if spec_stats.num_drafts else None)

    def _count_drafts(
        self, request: Request, token_ids: list[int], output: SchedulerOutput, stats: SpecDecodingStats
    ) -> None:
        """Take back what was counted as computed for drafts that were rejected."""
        drafts = output.scheduled_spec_decode_tokens.get(request.request_id)
        if not drafts or not token_ids:
            return
        num_accepted = len(token_ids) - 1  # the last is no draft, but what follows them
        num_rejected = len(drafts) - num_accepted
        if request.num_computed_tokens > 0:
            request.num_computed_tokens -= num_rejected
        if request.num_output_placeholders > 0:
            request.num_output_placeholders -= num_rejected
        if self.config.log_stats:
            num_invalid = (output.num_invalid_spec_tokens or {}).get(request.request_id, 0)
            stats.observe_draft(len(drafts) - num_invalid, num_accepted)

    def _enter_tokens(self, request: Request, token_ids: list[int]) -> tuple[EngineCoreOutput | None, bool]:
        """Append sampled tokens; returns what the client is told, if anything, and whether it stopped."""
        token_ids, stopped = self._append_tokens(request, token_ids) if token_ids else ([], False)
        finish_reason, kv_transfer_params = None, None
        if stopped:
            finish_reason = FINISH_REASONS[request.status]  # a session may go on, under another status
            if not self._goes_on(request):
                kv_transfer_params = self._free_request(request)
        if token_ids and request.structured_output_request and request.structured_output_request.grammar:
            request.structured_output_request.grammar.accept_tokens(request.request_id, token_ids)
        if not (token_ids or kv_transfer_params or stopped):
            return None, stopped
        output = EngineCoreOutput(
            request_id=request.request_id,
            new_token_ids=token_ids,
            finish_reason=finish_reason,
            stop_reason=request.stop_reason,
            events=request.take_events(),
            kv_transfer_params=kv_transfer_params,
            num_cached_tokens=request.num_cached_tokens,
            num_external_computed_tokens=request.num_external_computed_tokens,
        )
        return output, stopped

    def _append_tokens(self, request: Request, token_ids: list[int]) -> tuple[list[int], bool]:
        """Append tokens up to the one that ends the request; returns those, and whether it ended."""
        for count, token_id in enumerate(token_ids, 1):
            request.append_output_token(token_id)
            self._update_block_hashes(request)
            if check_stop(request, self.max_model_len):
                return token_ids[:count], True
        return token_ids, False

    def _outputs_by_client(
        self, outputs: Mapping[int, list[EngineCoreOutput]], spec_stats: SpecDecodingStats | None
    ) -> dict[int, EngineCoreOutputs]:
        """What each client is told, with ids of finished requests where asked for, and statistics for one."""
        by_client = {client: EngineCoreOutputs(outs) for client, outs in outputs.items()}
        if self.config.include_finished_set:
            for client, finished in self.finished_req_ids_by_client.items():
                by_client.setdefault(client, EngineCoreOutputs()).finished_requests = finished
            self.finished_req_ids_by_client.clear()
        stats = self.make_stats(spec_stats)
        if stats:
            if not by_client:
                by_client[0] = EngineCoreOutputs()
            next(iter(by_client.values())).scheduler_stats = stats
        return by_client

    def update_draft_token_ids(self, draft_token_ids: DraftTokenIds) -> None:
        """Drafts for the next step, as far as grammars allow them."""
        for request_id, drafts in zip(draft_token_ids.req_ids, draft_token_ids.draft_token_ids, strict=True):
            request = self.requests.get(request_id)
            if request is None or request.is_finished:
                continue
            request.spec_token_ids = [] if request.is_prefill_chunk else _allowed(request, drafts)

    def update_draft_token_ids_in_output(
        self, draft_token_ids: DraftTokenIds, scheduler_output: SchedulerOutput
    ) -> None:
        """Put drafts in the place of the -1s of a scheduled step; -1 stays for those refused."""
        scheduled = scheduler_output.scheduled_spec_decode_tokens
        num_invalid: dict[str, int] = {}
        for request_id, drafts in zip(draft_token_ids.req_ids, draft_token_ids.draft_token_ids, strict=True):
            request = self.requests.get(request_id)
            if request is None or request.is_finished or not scheduled.get(request_id):
                continue
            count = len(scheduled[request_id])
            allowed = _allowed(request, drafts[:count])
            if len(allowed) < count:
                num_invalid[request_id] = count - len(allowed)
            scheduled[request_id] = [*allowed, *[-1] * (count - len(allowed))]
        scheduler_output.num_invalid_spec_tokens = num_invalid


class AsyncUpstreamScheduler(UpstreamScheduler):
    """vLLM's `AsyncScheduler`: the next step is scheduled while tokens of the last are still to come.

    Every such token is counted as a placeholder; every draft is -1 until the model runner puts in its own.

    Source: vllm/v1/core/sched/async_scheduler.py, v0.17.0.
    """

    def _update_after_schedule(self, output: SchedulerOutput) -> None:
        super()._update_after_schedule(output)
        for request_id in output.num_scheduled_tokens:
            request = self.requests[request_id]
            if request.is_prefill_chunk:
                continue
            if request.use_structured_output and request.num_output_placeholders > 0:
                output.pending_structured_output_tokens = True
            num_drafts = len(output.scheduled_spec_decode_tokens.get(request_id, ()))
            request.num_output_placeholders += 1 + num_drafts
            request.spec_token_ids = [-1] * self.config.num_spec_tokens

    def _append_tokens(self, request: Request, token_ids: list[int]) -> tuple[list[int], bool]:
        if request.discard_latest_async_tokens:
            request.discard_latest_async_tokens = False
            return [], False
        was_running = request.status == RequestStatus.RUNNING
        token_ids, stopped = super()._append_tokens(request, token_ids)
        request.num_output_placeholders -= len(token_ids)
        _require(
            request.num_output_placeholders >= 0, f"{request.request_id}: more tokens than were scheduled"
        )
        if was_running:  # not preempted meanwhile
            num_certain = request.num_computed_tokens - request.num_output_placeholders
            self.kv_cache_manager.cache_blocks(request, num_certain)
        return token_ids, stopped


def _allowed(request: Request, drafts: list[int]) -> list[int]:
    """The leading drafts that the request's grammar allows; all without one."""
    structured = request.structured_output_request
    return structured.grammar.validate_tokens(drafts) if structured and structured.grammar else drafts


def _num_embeds(request: Request, indices: Iterable[int]) -> int:
    return sum(request.mm_features[i].mm_position.get_num_embeds() for i in indices)


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise SchedulerStateError(message)
