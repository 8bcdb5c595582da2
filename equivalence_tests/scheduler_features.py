"""How often each feature of a scheduler was at work: what a run has exercised, and what it has not."""

from collections import Counter
from typing import Any

from ..scheduler.config import SchedulerConfig
from ..scheduler.lifecycle import PauseState
from ..scheduler.output import FinishReason, ModelRunnerOutput
from ..scheduler.request import RequestStatus
from .scheduler_engines import Engine


class Features(Counter[str]):
    """How often each feature of the scheduler was at work, as seen from outside."""

    def __init__(self, config: SchedulerConfig) -> None:
        super().__init__()
        self.config = config
        self._scheduled: set[str] = set()
        self._kept: set[str] = set()
        self._num_drafts: dict[str, int] = {}
        self._statuses: dict[str, int] = {}
        self._keys: set[Any] = set()

    def before_schedule(self, engine: Engine) -> None:
        requests = engine.scheduler.requests
        self._num_drafts = {request_id: len(r.spec_token_ids) for request_id, r in requests.items()}
        self._statuses = {request_id: r.status for request_id, r in requests.items()}
        self._keys = self._cached_keys(engine)

    def after_schedule(self, engine: Engine, out: Any) -> None:
        s = engine.scheduler
        self["eviction"] += len(self._keys - self._cached_keys(engine))
        self["preemption"] += len(out.preempted_req_ids)
        self["priority_preemption"] += len(out.preempted_req_ids) if self.config.policy == "priority" else 0
        self["resumption"] += len(out.scheduled_cached_reqs.resumed_req_ids)
        self["encoder_input"] += sum(map(len, out.scheduled_encoder_inputs.values()))
        self["encoder_eviction"] += len(out.free_encoder_mm_hashes)
        self["common_prefix"] += any(out.num_common_prefix_blocks)
        self["paused_new"] += s.pause_state == PauseState.PAUSED_NEW
        self["paused_all"] += s.pause_state == PauseState.PAUSED_ALL
        for request_id, num_tokens in out.num_scheduled_tokens.items():
            self._after_scheduling(engine, s.requests[request_id], num_tokens, out)
        for new in out.scheduled_new_reqs:
            request = s.requests[new.req_id]
            self._after_admission(request, new.num_computed_tokens)
            self["session_resumed"] += new.req_id in self._scheduled
            self["grammar_promoted"] += request.use_structured_output and new.req_id not in self._scheduled
            self._scheduled.add(new.req_id)
        cached = out.scheduled_cached_reqs
        for request_id, num_computed in zip(cached.req_ids, cached.num_computed_tokens, strict=True):
            if request_id in cached.resumed_req_ids:
                self._after_admission(s.requests[request_id], num_computed)
        for request in s.waiting:
            self["grammar_wait"] += request.status == RequestStatus.WAITING_FOR_FSM
            if request.status == RequestStatus.WAITING_FOR_REMOTE_KVS:
                self["remote_async_load"] += self._statuses[request.request_id] != request.status
        self["lora_skip"] += self._skips_adapter(s, out)

    def _cached_keys(self, engine: Engine) -> set[Any]:
        """What can be found; in a large pool that would take longer than the step, and nothing is counted."""
        return set(engine.block_keys()) if self.config.num_blocks <= 4096 else set()

    def _after_scheduling(self, engine: Engine, request: Any, num_tokens: int, out: Any) -> None:
        """A request that is in the step."""
        config, end = self.config, request.num_computed_tokens
        self["async_placeholder"] += request.num_output_placeholders > 0
        if request.is_prefill_chunk:
            self["chunked_prefill"] += 1
            self["long_prefill_threshold"] += num_tokens == config.long_prefill_token_threshold
            budget_left = out.total_num_scheduled_tokens < config.max_num_batched_tokens
            if budget_left and num_tokens != config.long_prefill_token_threshold:
                self["mamba_split"] += config.need_mamba_block_aligned_split and end % config.block_size == 0
                starts = [feature.mm_position.offset for feature in request.mm_features]
                self["encoder_budget_stop"] += end + config.use_eagle in starts
        if config.num_lookahead_tokens:
            table = engine.groups()[0].req_to_blocks.get(request.request_id, ())
            self["lookahead"] += len(table) > -(-end // config.block_size)
        drafts = out.scheduled_spec_decode_tokens.get(request.request_id, ())
        self["draft_trimmed"] += 0 < len(drafts) < self._num_drafts[request.request_id]

    def _after_admission(self, request: Any, num_computed_tokens: int) -> None:
        """A request that left the waiting queue, and starts behind `num_computed_tokens`."""
        was_loading = self._statuses[request.request_id] == RequestStatus.WAITING_FOR_REMOTE_KVS
        num_external = request.num_external_computed_tokens
        self["remote_sync_load"] += num_external > 0 and not was_loading
        num_local = 0 if was_loading else num_computed_tokens - num_external
        self["prefix_hit"] += num_local > 0
        most = (request.num_tokens - request.num_output_placeholders - 1) // self.config.block_size
        self["full_prefix_hit"] += 0 < num_local == most * self.config.block_size
        self["skip_reading_prefix_cache"] += request.skip_reading_prefix_cache

    def _skips_adapter(self, s: Any, out: Any) -> bool:
        """Whether a request waits for nothing but another adapter to leave."""
        if self.config.max_loras is None or out.preempted_req_ids or s.pause_state != PauseState.UNPAUSED:
            return False
        room = len(s.running) < self.config.max_num_seqs
        room &= out.total_num_scheduled_tokens < self.config.max_num_batched_tokens
        loras = {r.lora_request.lora_int_id for r in s.running if r.lora_request}
        return (
            room
            and len(loras) == self.config.max_loras
            and any(
                r.lora_request and r.lora_request.lora_int_id not in loras
                for r in s.waiting
                if r.status in (RequestStatus.WAITING, RequestStatus.PREEMPTED)
            )
        )

    def before_update(self, engine: Engine, out: Any, output: ModelRunnerOutput) -> dict[str, Any]:
        """Count what the model did; returns the requests of the step, which may be gone after the update."""
        tokens = dict(zip(output.req_ids, output.sampled_token_ids, strict=True))
        for request_id, drafts in out.scheduled_spec_decode_tokens.items():
            if tokens.get(request_id):
                num_accepted = len(tokens[request_id]) - 1
                self["draft_accepted"] += num_accepted
                self["draft_rejected"] += len(drafts) - num_accepted
        if output.kv_connector_output:
            self["remote_failed_load"] += bool(output.kv_connector_output.invalid_block_ids)
        requests = engine.scheduler.requests
        for request_id in out.num_scheduled_tokens:
            request = requests.get(request_id)
            self["late_output_of_finished"] += request is None or request.is_finished is True
            if request is not None and tokens.get(request_id):
                self["late_output_of_preempted"] += request.status == RequestStatus.PREEMPTED
        return dict(requests)

    def after_update(self, engine: Engine, requests: dict[str, Any], outputs: dict[int, Any]) -> None:
        for output in (output for of_client in outputs.values() for output in of_client.outputs):
            if output.finish_reason is None:
                continue
            reason = FinishReason(output.finish_reason)
            request = requests[output.request_id]
            if reason == FinishReason.STOP:
                self["stop_eos" if output.stop_reason is None else "stop_token"] += 1
            elif reason == FinishReason.LENGTH:
                too_long = request.num_tokens >= self.config.max_model_len
                self["stop_max_model_len" if too_long else "stop_max_tokens"] += 1
            else:
                self[f"finish_{reason.name.lower()}"] += 1
        self.count_kept_blocks(engine)

    def after_drafts(self, engine: Engine, lengths: dict[str, int]) -> None:
        """Drafts were given to the scheduler, `lengths` of them by request."""
        for request_id, length in lengths.items():
            request = engine.scheduler.requests.get(request_id)
            if request is not None and request.use_structured_output and not request.is_prefill_chunk:
                self["invalid_draft"] += len(request.spec_token_ids) < length

    def count_kept_blocks(self, engine: Engine) -> None:
        kept = {k for k, r in engine.scheduler.requests.items() if r.status > RequestStatus.PREEMPTED}
        self["remote_delayed_free"] += len(kept - self._kept)
        self._kept = kept
