"""Bugs put into our scheduler on purpose: the comparison with a second scheduler must find each.

The comparison is the very one that `tox run -e vllm017` makes with vLLM, over the same random runs; here the
scheduler as it is stands in for vLLM's. What changes more than an order or a number that nobody acts upon is
found without a second scheduler, too: by the invariants, the oracle, and the stand-in for the model.
"""

from collections.abc import Callable
from itertools import islice
from typing import Any, NamedTuple

import pytest

from ascend_twin.equivalence_tests.scheduler_engines import Engine, OurEngine, RequestInput
from ascend_twin.equivalence_tests.scheduler_runs import CheckedEngine, Run, random_runs, run_scenario
from ascend_twin.equivalence_tests.source_mutants import mutated
from ascend_twin.scheduler.workload import RequestSpec

SEED = 1
MOST_RUNS = 100  # to find a mutant; most need three
NUM_RUNS_UNMUTATED = 25

PACKAGE = "ascend_twin"
MODULES = {
    name: f"{PACKAGE}.{package}.{name}"
    for package, names in {
        "scheduler": (
            *("stats", "request", "request_queue", "kv_blocks", "encoder_cache", "remote_kv"),
            *("lifecycle", "upstream"),
        ),
        "equivalence_tests": ("known_defects",),
    }.items()
    for name in names
}
"""What a mutated scheduler has copies of, each after those that it imports."""


class Mutant(NamedTuple):
    """A bug.

    Attributes:
        name: what is wrong.
        module: of scheduler/, where it is.
        old, new: what takes the place of what in its source, where `old` is found exactly once.
        features: that a setup needs for it to show, separated by spaces; see `random_runs`.
        alone: whether it is found without a second scheduler.
    """

    name: str
    module: str
    old: str
    new: str
    features: str = ""
    alone: bool = False


# fmt: off
MUTANTS = (
    # The seven that no suite may miss.
    Mutant(
        "fcfs_victim_from_the_front", "upstream",
        "return self.running.pop()", "return self.running.pop(0)", alone=True,
    ),
    Mutant(
        "budget_one_token_more", "upstream",
        "0 if paused else self.config.max_num_batched_tokens",
        "0 if paused else self.config.max_num_batched_tokens + 1",
        alone=True,
    ),
    Mutant(
        "free_list_popped_from_the_tail", "kv_blocks",
        "self._free.popitem(last=False)", "self._free.popitem(last=True)",
    ),
    Mutant("hash_ignores_parent", "kv_blocks", "sha256(parent + array", "sha256(array", alone=True),
    Mutant(
        "computed_tokens_kept_when_preempted", "lifecycle",
        "        request.num_computed_tokens = 0\n", "", alone=True,
    ),
    Mutant(
        "placeholders_not_lowered", "upstream",
        "request.num_output_placeholders -= len(token_ids)",
        "request.num_output_placeholders -= 0",
        "async", alone=True,
    ),
    Mutant(
        "ready_grammar_not_promoted", "upstream",
        "request.structured_output_request is None or request.structured_output_request.grammar is None",
        "True",
        "grammars", alone=True,
    ),
    # Steps, token budget, chunked prefill.
    Mutant(
        "budget_one_token_less", "upstream",
        "0 if paused else self.config.max_num_batched_tokens",
        "0 if paused else self.config.max_num_batched_tokens - 1",
        alone=True,
    ),
    Mutant(
        "admits_after_preempting", "upstream",
        "if not step.preempted and self.pause_state", "if self.pause_state", alone=True,
    ),
    Mutant(
        "index_kept_when_victim_was_in_step", "upstream",
        "            index -= num_given_way\n", "", "priority long_prefill_threshold",
    ),
    Mutant(
        "cuts_prompts_that_must_be_whole", "upstream",
        "if not self.config.enable_chunked_prefill and num_new_tokens > step.token_budget:",
        "if False:",
        "whole_prefills", alone=True,
    ),
    Mutant(
        "threshold_for_running_only", "upstream",
        "self._cap_long_prefill(request.num_tokens - computed.total)",
        "request.num_tokens - computed.total",
        "long_prefill_threshold", alone=True,
    ),
    Mutant(
        "stops_at_a_request_without_tokens", "upstream",
        "            if num_new_tokens == 0:  # those behind it may still be served\n"
        "                index += 1\n"
        "                continue",
        "            if num_new_tokens == 0:\n                break",
        "images",
    ),
    Mutant(
        "too_many_running", "upstream",
        "and len(self.running) != self.max_num_running_reqs",
        "and len(self.running) <= self.max_num_running_reqs",
        alone=True,
    ),
    Mutant(
        "goes_behind_the_end_of_the_model", "upstream",
        "self.max_model_len - 1 - request.num_computed_tokens",
        "self.max_model_len + 9 - request.num_computed_tokens",
        "drafts", alone=True,
    ),
    # Queues.
    Mutant(
        "priority_after_arrival", "request",
        "return (self.priority, self.arrival_time, self.request_id) < (\n"
        "            other.priority,\n"
        "            other.arrival_time,",
        "return (self.arrival_time, self.priority, self.request_id) < (\n"
        "            other.arrival_time,\n"
        "            other.priority,",
        "priority", alone=True,
    ),
    Mutant(
        "priority_victim_is_the_most_urgent", "upstream",
        "victim = max(self.running,", "victim = min(self.running,", "priority", alone=True,
    ),
    Mutant(
        "preempted_to_the_back", "lifecycle",
        "self.waiting.prepend_request(request)", "self.waiting.add_request(request)",
    ),
    Mutant(
        "skipped_in_reverse", "request_queue",
        "self.extendleft(requests)", "self.extendleft(list(requests)[::-1])", "grammars",
    ),
    # Preemption and resumption.
    Mutant(
        "resumed_counts_as_new", "upstream",
        "(step.resumed if request.status == RequestStatus.PREEMPTED else step.new)", "step.new", alone=True,
    ),
    Mutant(
        "whoever_was_preempted_counts_as_resumed", "upstream",
        "(step.resumed if request.status == RequestStatus.PREEMPTED else step.new)",
        "(step.resumed if request.num_preemptions else step.new)",
        "sessions", alone=True,
    ),
    Mutant(
        "tokens_of_resumed_not_sent", "upstream",
        "if request_id not in self.prev_step_scheduled_req_ids:", "if False:", alone=True,
    ),
    Mutant(
        "drafts_kept_when_preempted", "lifecycle",
        "        request.spec_token_ids = []\n        request.num_preemptions",
        "        request.num_preemptions",
        "drafts",
    ),
    Mutant(
        "blocks_kept_when_preempted", "lifecycle",
        "        self.kv_cache_manager.free(request)\n"
        "        self.encoder_cache_manager.free(request)\n"
        "        request.status",
        "        self.encoder_cache_manager.free(request)\n        request.status",
        alone=True,
    ),
    # Slots and lookahead.
    Mutant(
        "no_lookahead", "upstream",
        "request, num_new_tokens, num_lookahead_tokens=self.config.num_lookahead_tokens\n",
        "request, num_new_tokens\n",
        "drafts",
    ),
    Mutant(
        "lookahead_at_first_admission", "upstream",
        "self.config.num_lookahead_tokens if request.num_computed_tokens else 0",
        "self.config.num_lookahead_tokens",
        "drafts", alone=True,
    ),
    Mutant(
        "lookahead_behind_the_end_of_the_model", "kv_blocks",
        "num_slots = min(num_main + num_lookahead_tokens, self.max_model_len)",
        "num_slots = num_main + num_lookahead_tokens",
        "drafts",
    ),
    Mutant(
        "slots_one_short", "kv_blocks",
        "        count = -(-num_tokens // self.block_size) - len(table)\n",
        "        count = num_tokens // self.block_size - len(table)\n",
        alone=True,
    ),
    # The pool.
    Mutant(
        "touched_block_stays_free", "kv_blocks",
        "            if block.ref_cnt == 0:\n                del self._free[block.block_id]\n",
        "",
        alone=True,
    ),
    Mutant(
        "shared_block_freed", "kv_blocks",
        "            if block.ref_cnt == 0:\n                self._free[block.block_id] = block",
        "            self._free[block.block_id] = block",
        alone=True,
    ),
    Mutant(
        "freed_from_the_front", "kv_blocks",
        "self.pool.free_blocks(reversed(self.req_to_blocks.pop(request_id, [])))",
        "self.pool.free_blocks(self.req_to_blocks.pop(request_id, []))",
    ),
    Mutant(
        "content_not_forgotten", "kv_blocks",
        "            self._forget(block)\n            block.ref_cnt = 1",
        "            block.ref_cnt = 1",
        alone=True,
    ),
    Mutant(
        "newest_of_equal_blocks_found", "kv_blocks",
        "next(iter(blocks.values()))", "list(blocks.values())[-1]",
    ),
    Mutant(
        "evictable_hits_not_counted", "kv_blocks",
        "return sum(block.ref_cnt == 0 and block is not self.pool.null_block for block in blocks)",
        "return 0",
        alone=True,
    ),
    # Hashes.
    Mutant(
        "hash_ignores_adapter", "kv_blocks",
        "(*lora, *identifiers, *salt)", "(*identifiers, *salt)", "adapters", alone=True,
    ),
    Mutant(
        "hash_ignores_images", "kv_blocks",
        "(*lora, *identifiers, *salt)", "(*lora, *salt)", "images", alone=True,
    ),
    Mutant("hash_ignores_salt", "kv_blocks", "(*lora, *identifiers, *salt)", "(*lora, *identifiers)"),
    # Prefix hits.
    Mutant(
        "full_hit_leaves_nothing", "kv_blocks",
        "num_blocks = (request.num_tokens - 1) // self.block_size",
        "num_blocks = request.num_tokens // self.block_size",
        alone=True,
    ),
    Mutant(
        "eagle_keeps_last_block", "kv_blocks",
        "if self.use_eagle and num_blocks:", "if False:", "drafts",
    ),
    Mutant(
        "unread_requests_read", "kv_blocks",
        "if not self.enable_caching or request.skip_reading_prefix_cache:",
        "if not self.enable_caching:",
    ),
    Mutant(
        "drafts_are_cached", "kv_blocks",
        "min(num_main, request.num_tokens)", "num_main", "drafts", alone=True,
    ),
    Mutant(
        "caches_behind_what_is_computed", "kv_blocks",
        "self.cache_blocks(request, min(num_main, request.num_tokens))",
        "self.cache_blocks(request, request.num_tokens)",
        alone=True,
    ),
    Mutant(
        "hits_of_preempted_not_apart", "kv_blocks",
        "preempted = request.num_preemptions > 0", "preempted = False",
    ),
    # Common prefix.
    Mutant(
        "common_prefix_of_any_two", "kv_blocks",
        "block.ref_cnt != len(self.req_to_blocks)", "block.ref_cnt < 2", alone=True,
    ),
    # Mamba groups.
    Mutant(
        "mamba_moved_block_held_twice", "kv_blocks",
        "                table.append(table[i])\n                table[i] = self.pool.null_block\n",
        "                table.append(table[i])\n",
        "mamba drafts", alone=True,
    ),
    Mutant(
        "mamba_draft_blocks_not_moved", "kv_blocks",
        "        if old:  # blocks of draft states move to the new end",
        "        if False:",
        "mamba drafts", alone=True,
    ),
    Mutant(
        "mamba_state_freed_before_drafts_are_certain", "kv_blocks",
        "num_computed_tokens = max(0, num_computed_tokens - self.num_speculative_blocks)",
        "num_computed_tokens = max(0, num_computed_tokens)",
        "mamba drafts",
    ),
    Mutant(
        "mamba_hits_state_of_this_step", "kv_blocks",
        "if computed_blocks and computed_blocks[-1].key in self.cached_this_step:",
        "if False:",
        "mamba", alone=True,
    ),
    Mutant(
        "mamba_steps_run_into_each_other", "kv_blocks",
        "        self.cached_this_step.clear()", "        pass", "mamba", alone=True,
    ),
    Mutant(
        "mamba_old_state_kept", "kv_blocks",
        "if last is not None and last < -(-num_computed_tokens // self.block_size) - 1:",
        "if False:",
        "mamba drafts",
    ),
    Mutant(
        "mamba_splits_nothing", "upstream",
        "return num_new_tokens // block_size * block_size", "return num_new_tokens", "mamba",
    ),
    Mutant(
        "mamba_split_ignores_eagle", "upstream",
        "last_boundary = max(last_boundary - block_size, 0)", "pass", "mamba drafts",
    ),
    Mutant(
        "mamba_last_boundary_skipped", "upstream",
        "return last_boundary - num_computed_tokens", "return num_new_tokens", "mamba",
    ),
    Mutant(
        "mamba_first_state_found", "kv_blocks",
        "for last in reversed(range(len(block_hashes))):", "for last in range(len(block_hashes)):", "mamba",
    ),
    Mutant(
        "mamba_full_attention_hit_not_cut", "kv_blocks",
        "                del blocks[i][num_blocks:]", "                pass", "mamba",
    ),
    # Drafts.
    Mutant("drafts_not_trimmed", "upstream", "drafts[:num_drafts]", "drafts", "drafts", alone=True),
    Mutant(
        "rejected_drafts_stay_computed", "upstream",
        "            request.num_computed_tokens -= num_rejected", "            pass", "drafts", alone=True,
    ),
    Mutant(
        "rejected_placeholders_stay", "upstream",
        "            request.num_output_placeholders -= num_rejected",
        "            pass",
        "drafts async", alone=True,
    ),
    Mutant(
        "refused_drafts_scheduled", "upstream",
        "return structured.grammar.validate_tokens(drafts) if structured and structured.grammar else"
        " drafts",
        "return drafts",
        "drafts grammars", alone=True,
    ),
    Mutant(
        "refused_drafts_in_statistics", "upstream",
        "stats.observe_draft(len(drafts) - num_invalid, num_accepted)",
        "stats.observe_draft(len(drafts), num_accepted)",
        "drafts grammars async",
    ),
    Mutant(
        "drafts_stay_after_they_were_scheduled", "upstream",
        "            step.spec_decode_tokens[request.request_id] = drafts[:num_drafts]\n"
        "        request.spec_token_ids = []\n",
        "            step.spec_decode_tokens[request.request_id] = drafts[:num_drafts]\n",
        "drafts",
    ),
    # Async scheduling.
    Mutant(
        "guard_one_token_late", "upstream",
        "request.num_computed_tokens - num_in_flight + 2",
        "request.num_computed_tokens - num_in_flight + 1",
        "async", alone=True,
    ),
    Mutant(
        "placeholders_of_drafts_not_counted", "upstream",
        "request.num_output_placeholders += 1 + num_drafts",
        "request.num_output_placeholders += 1",
        "async drafts", alone=True,
    ),
    Mutant(
        "prefill_gets_a_placeholder", "upstream",
        "            request = self.requests[request_id]\n"
        "            if request.is_prefill_chunk:\n"
        "                continue\n",
        "            request = self.requests[request_id]\n",
        "async", alone=True,
    ),
    Mutant(
        "caches_tokens_in_flight", "upstream",
        "num_certain = request.num_computed_tokens - request.num_output_placeholders",
        "num_certain = request.num_computed_tokens",
        "async", alone=True,
    ),
    Mutant(
        "token_in_flight_kept_after_reset", "lifecycle",
        "request.discard_latest_async_tokens = True",
        "request.discard_latest_async_tokens = False",
        "async",
    ),
    # Images.
    Mutant(
        "encoder_budget_per_request", "upstream",
        "            step.encoder_compute_budget -= _num_embeds(request, encoder_inputs)\n",
        "",
        "images", alone=True,
    ),
    Mutant(
        "encoder_budget_per_image", "encoder_cache",
        "            plan.compute_budget -= num_embeds\n", "", "images", alone=True,
    ),
    Mutant(
        "newest_image_dropped", "encoder_cache",
        "self.freeable.popitem(last=False)", "self.freeable.popitem(last=True)", "images",
    ),
    Mutant(
        "used_images_kept", "upstream",
        "            if request.mm_features:\n"
        "                self.encoder_cache_manager.free_used_inputs(request)\n",
        "",
        "images", alone=True,
    ),
    Mutant(
        "image_freed_at_its_first_token", "encoder_cache",
        "if position.offset + position.length <= request.num_computed_tokens:",
        "if position.offset <= request.num_computed_tokens:",
        "images",
    ),
    Mutant(
        "eagle_sees_no_token_ahead", "encoder_cache",
        "1 if config.use_eagle else 0", "0", "images drafts long_prefill_threshold",
    ),
    Mutant(
        "images_split_against_the_rule", "encoder_cache",
        "if not self._may_split_images and ends_inside:", "if False:", "images", alone=True,
    ),
    Mutant(
        "image_in_use_stays_freeable", "encoder_cache",
        "self.num_freeable_slots -= self.freeable.pop(identifier)", "pass", "images", alone=True,
    ),
    Mutant(
        "image_room_ignores_what_is_planned", "encoder_cache",
        "        num_embeds += num_planned_embeds\n", "", "images", alone=True,
    ),
    Mutant(
        "images_of_refused_request_kept", "upstream",
        "            self.encoder_cache_manager.free(request)\n            return _Verdict.NO_ROOM",
        "            return _Verdict.NO_ROOM",
        "images",
    ),
    Mutant(
        "image_computed_again", "encoder_cache",
        "if self._refer(request, i):", "if False:", "images", alone=True,
    ),
    Mutant(
        "dropped_images_not_told", "encoder_cache",
        "            self.freed.append(identifier)\n", "", "images", alone=True,
    ),
    Mutant(
        "images_of_finished_kept", "lifecycle",
        "        self.encoder_cache_manager.free(request)\n        self.finished_req_ids",
        "        self.finished_req_ids",
        "images", alone=True,
    ),
    Mutant(
        "images_of_preempted_kept", "lifecycle",
        "        self.encoder_cache_manager.free(request)\n        request.status",
        "        request.status",
        "images drafts", alone=True,
    ),
    # Adapters.
    Mutant(
        "one_adapter_too_many", "upstream",
        "len(step.loras) == self.config.max_loras",
        "len(step.loras) > (self.config.max_loras or 0)",
        "adapters", alone=True,
    ),
    Mutant(
        "adapters_of_running_not_counted", "upstream",
        "            step.loras = {lora.lora_int_id for lora in loras if lora}\n",
        "",
        "adapters", alone=True,
    ),
    Mutant(
        "same_adapter_waits", "upstream",
        "            and request.lora_request.lora_int_id not in step.loras\n", "", "adapters",
    ),
    # Pause states.
    Mutant(
        "paused_new_admits", "upstream",
        "self.pause_state == PauseState.UNPAUSED and",
        "self.pause_state != PauseState.PAUSED_ALL and",
        alone=True,
    ),
    Mutant(
        "paused_all_runs", "upstream",
        "0 if paused else self.config", "self.config", "drafts", alone=True,
    ),
    Mutant(
        "paused_all_counts_requests", "lifecycle",
        "            return 0\n        if self.pause_state == PauseState.PAUSED_NEW",
        "            return len(self.running)\n        if self.pause_state == PauseState.PAUSED_NEW",
    ),
    # Sessions.
    Mutant(
        "session_keeps_last_token", "lifecycle",
        "        del session.all_token_ids[num_computed_tokens:]\n", "", "sessions", alone=True,
    ),
    Mutant(
        "session_queue_last_first", "lifecycle",
        "request.streaming_queue.popleft()", "request.streaming_queue.pop()", "sessions", alone=True,
    ),
    Mutant(
        "session_image_offsets_not_moved", "lifecycle",
        "offset=feature.mm_position.offset + base",
        "offset=feature.mm_position.offset",
        "sessions images", alone=True,
    ),
    Mutant(
        "session_end_waits_for_input", "lifecycle",
        "            if update is None:\n                return False\n            self._update",
        "            if update is None:\n                return True\n            self._update",
        "sessions", alone=True,
    ),
    Mutant(
        "session_input_still_counted_as_awaited", "lifecycle",
        "            self.num_waiting_for_streaming_input -= 1\n",
        "            pass\n",
        "sessions", alone=True,
    ),
    Mutant(
        "session_wait_not_counted", "lifecycle",
        "            self.num_waiting_for_streaming_input += 1\n", "", "sessions", alone=True,
    ),
    Mutant(
        "session_keeps_arrival_time", "lifecycle",
        "        session.arrival_time = update.arrival_time\n", "", "sessions priority",
    ),
    Mutant(
        "session_without_input_is_scheduled", "upstream",
        "return request.status != RequestStatus.WAITING_FOR_STREAMING_REQ",
        "return True",
        "sessions", alone=True,
    ),
    Mutant(
        "session_outputs_counted_on", "lifecycle",
        "        session.output_token_ids.clear()\n", "", "sessions", alone=True,
    ),
    # Grammars.
    Mutant(
        "bitmask_for_prefills", "upstream",
        "            and request.use_structured_output\n            and not request.is_prefill_chunk\n",
        "            and request.use_structured_output\n",
        "grammars async",
    ),
    Mutant(
        "bitmask_missing", "upstream",
        "                output.has_structured_output_requests = True\n",
        "                pass\n",
        "grammars", alone=True,
    ),
    Mutant(
        "grammar_not_advanced", "upstream",
        "            request.structured_output_request.grammar.accept_tokens(request.request_id,"
        " token_ids)\n",
        "            pass\n",
        "grammars", alone=True,
    ),
    Mutant(
        "drafts_for_a_prefill", "upstream",
        "[] if request.is_prefill_chunk else _allowed(request, drafts)",
        "_allowed(request, drafts)",
        "drafts",
    ),
    Mutant(
        "grammar_advanced_too_soon", "upstream",
        "                output.pending_structured_output_tokens = True\n",
        "                pass\n",
        "grammars async", alone=True,
    ),
    # Remote KV.
    Mutant(
        "remote_load_seen_again", "remote_kv",
        "        self.finished_recving_req_ids.remove(request_id)\n", "", "remote", alone=True,
    ),
    Mutant(
        "remote_load_not_waited_for", "remote_kv",
        "        if request_id not in self.finished_recving_req_ids:\n            return False\n",
        "",
        "remote",
    ),
    Mutant(
        "remote_failure_forgotten", "remote_kv",
        "        self.failed_recving_req_ids |= failed_async\n", "", "remote", alone=True,
    ),
    Mutant(
        "remote_invalid_block_counts_as_computed", "remote_kv",
        "request.num_computed_tokens = own[0] * ",
        "request.num_computed_tokens = (own[0] + 1) * ",
        "remote", alone=True,
    ),
    Mutant(
        "remote_output_on_invalid_blocks_kept", "upstream",
        "if request_id in failed_req_ids or request is None or request.is_finished:",
        "if request is None or request.is_finished:",
        "remote", alone=True,
    ),
    Mutant(
        "remote_wrong_blocks_stay_cached", "remote_kv",
        "            self.scheduler.kv_cache_manager.evict_blocks(wrong_block_ids)\n", "", "remote",
    ),
    Mutant(
        "remote_sent_blocks_freed", "lifecycle",
        "if not (delay_free_blocks or is_sending):", "if not delay_free_blocks:", "remote", alone=True,
    ),
    Mutant(
        "remote_loading_blocks_freed", "lifecycle",
        "if not (delay_free_blocks or is_sending):", "if not is_sending:", "remote", alone=True,
    ),
    Mutant(
        "remote_full_load_leaves_nothing", "remote_kv",
        "min(num_slots, request.num_tokens - 1)",
        "min(num_slots, request.num_tokens)",
        "remote", alone=True,
    ),
    Mutant(
        "remote_blocks_found_while_loading", "upstream",
        "delay_cache_blocks=computed.load_async", "delay_cache_blocks=False", "remote", alone=True,
    ),
    Mutant(
        "remote_answer_not_awaited", "upstream",
        "            if found is None:\n                return None\n",
        "            found = found or 0\n",
        "remote",
    ),
    Mutant(
        "remote_resumed_is_new", "upstream",
        "RequestStatus.PREEMPTED if request.num_preemptions else RequestStatus.WAITING",
        "RequestStatus.WAITING",
        "remote", alone=True,
    ),
    Mutant(
        "remote_tokens_not_told", "upstream",
        "request.num_external_computed_tokens = num_external = found", "num_external = found", "remote",
    ),
    Mutant(
        "remote_statistics_missing", "remote_kv",
        "                self.stats.record(num_queried, num_external_tokens, preempted=preempted)\n",
        "                pass\n",
        "remote",
    ),
    # Ends.
    Mutant(
        "length_before_eos", "request",
        "    if token_id == params.eos_token_id:\n",
        "    if request.num_output_tokens >= request.max_tokens:\n"
        "        request.status = RequestStatus.FINISHED_LENGTH_CAPPED\n"
        "    elif token_id == params.eos_token_id:\n",
        alone=True,
    ),
    Mutant("stop_reason_missing", "request", "        request.stop_reason = token_id\n", "", alone=True),
    Mutant("eos_ignored", "request", "if token_id == params.eos_token_id:", "if False:", alone=True),
    Mutant(
        "one_token_over_max_tokens", "request",
        "request.num_output_tokens >= request.max_tokens:",
        "request.num_output_tokens > request.max_tokens:",
        alone=True,
    ),
    Mutant(
        "one_token_over_max_model_len", "request",
        "request.num_tokens >= max_model_len", "request.num_tokens > max_model_len", alone=True,
    ),
    Mutant(
        "min_tokens_ignored", "request",
        "    if request.num_output_tokens < params.min_tokens:\n        return False\n", "", alone=True,
    ),
    Mutant(
        "tokens_behind_the_stop_told", "upstream",
        "return token_ids[:count], True", "return token_ids, True", "drafts", alone=True,
    ),
    # Aborts.
    Mutant(
        "aborted_stays_in_queue", "lifecycle",
        "self._remove_from_queues(running, waiting)\n        for",
        "self._remove_from_queues(running, set())\n        for",
        alone=True,
    ),
    Mutant(
        "aborted_stays_running", "lifecycle",
        "self._remove_from_queues(running, waiting)\n        for",
        "self._remove_from_queues(set(), waiting)\n        for",
        alone=True,
    ),
    Mutant(
        "aborted_session_still_awaited", "lifecycle",
        "            self.num_waiting_for_streaming_input -= request.status =="
        " RequestStatus.WAITING_FOR_STREAMING_REQ\n",
        "            pass\n",
        "sessions", alone=True,
    ),
    Mutant(
        "aborted_load_not_awaited", "lifecycle",
        "self.remote_kv is not None and self.remote_kv.abandon(request)", "False", "remote", alone=True,
    ),
    Mutant(
        "preempted_that_stops_stays", "upstream",
        "(stopped_running if was_running else stopped_waiting).add(request)",
        "stopped_running.add(request)",
        "async", alone=True,
    ),
    # Resets.
    Mutant(
        "reset_while_blocks_are_held", "kv_blocks",
        "        if len(self._free) != len(self.blocks) - 1:\n            return False\n", "",
    ),
    Mutant(
        "reset_keeps_keys", "kv_blocks",
        "        for block in self.blocks:\n            block.key = None\n", "",
    ),
    Mutant("reset_keeps_content", "kv_blocks", "        self.cached_blocks.clear()\n", "", alone=True),
    Mutant(
        "reset_keeps_previous_step", "lifecycle",
        "            self.prev_step_scheduled_req_ids = set()\n        done", "        done", alone=True,
    ),
    # Finished requests.
    Mutant(
        "finished_ids_sent_again", "upstream",
        "        self.finished_req_ids = set()  # the old set belongs to the output\n", "", alone=True,
    ),
    Mutant(
        "finished_ids_not_sent", "lifecycle",
        "        self.finished_req_ids.add(request.request_id)\n", "", alone=True,
    ),
    Mutant(
        "finished_clients_told_again", "upstream",
        "            self.finished_req_ids_by_client.clear()\n", "",
    ),
    # Outputs.
    Mutant(
        "cached_tokens_of_the_last_hit", "upstream",
        "        if request.num_cached_tokens < 0:\n            request", "        request",
    ),
    Mutant(
        "outputs_to_client_zero", "upstream",
        "            if output:\n                outputs[request.client_index]",
        "            if output:\n                outputs[0]",
        alone=True,
    ),
    # Statistics.
    Mutant(
        "stats_count_the_null_block", "kv_blocks",
        "usable = len(self.blocks) - 1", "usable = len(self.blocks)",
    ),
    Mutant(
        "stats_never_start_anew", "kv_blocks",
        "        stats, self.prefix_cache_stats = self.prefix_cache_stats, PrefixCacheStats()\n"
        "        return stats\n",
        "        return self.prefix_cache_stats\n",
    ),
    Mutant(
        "encoder_usage_of_freeable", "encoder_cache",
        "return (self.cache_size - self.num_free_slots)",
        "return (self.cache_size - self.num_freeable_slots)",
        "images",
    ),
)
# fmt: on

UNMUTATED = Mutant("unmutated", "", "", "")


def engine_of(mutant: Mutant, base: type[OurEngine]) -> type[OurEngine]:
    """`base` with a mutated scheduler, whose causes of known defects are watched."""
    copies = mutated(mutant, MODULES)

    class MutatedEngine(base):
        name = mutant.name
        schedulers = (copies["known_defects"].WatchedScheduler, copies["known_defects"].WatchedAsyncScheduler)

        def make_request(self, spec: RequestSpec, given: RequestInput) -> Any:
            request = super().make_request(spec, given)
            request.__class__ = copies["request"].Request
            return request

    return MutatedEngine


Engines = Callable[[Mutant], tuple[type[Engine], ...]]


def beside_ours(mutant: Mutant) -> tuple[type[Engine], ...]:
    """The mutant, and the scheduler as it is."""
    return engine_of(mutant, OurEngine), OurEngine


def alone(mutant: Mutant) -> tuple[type[Engine], ...]:
    """The mutant, with its invariants checked."""
    return (engine_of(mutant, CheckedEngine),)


def find(mutant: Mutant, engines: Engines, failure: str = "") -> Run | None:
    """The first run that fails, with a `failure` that begins like this."""
    runs = random_runs(SEED, engines(mutant), always=mutant.features.split())
    failed = (run for run in islice(runs, MOST_RUNS) if run.failure)
    return next((run for run in failed if run.failure.startswith(failure)), None)


def ids(value: object) -> str | None:
    return value.name if isinstance(value, Mutant) else getattr(value, "__name__", None)


def test_mutants_have_different_names():
    assert len({mutant.name for mutant in MUTANTS}) == len(MUTANTS)


def test_random_runs_pass_the_unmutated_scheduler():
    engines = engine_of(UNMUTATED, CheckedEngine), OurEngine
    for run in islice(random_runs(SEED, engines), NUM_RUNS_UNMUTATED):
        assert not run.failure


@pytest.mark.parametrize("mutant", MUTANTS, ids=ids)
def test_comparison_finds(mutant: Mutant):
    run = find(mutant, beside_ours, "SchedulerDifference: ")
    assert run is not None, "survives"
    again = run_scenario(run.scenario, (engine_of(UNMUTATED, CheckedEngine), OurEngine))
    assert not again.failure


@pytest.mark.parametrize("mutant", [mutant for mutant in MUTANTS if mutant.alone], ids=ids)
def test_invariants_and_oracle_find(mutant: Mutant):
    run = find(mutant, alone)
    assert run is not None, "survives"
    again = run_scenario(run.scenario, alone(UNMUTATED))
    assert not again.failure
