"""Where vLLM v0.17.0 breaks an invariant itself: what causes it, what it breaks, and upstream's issue.

The reference does what v0.17.0 does, mistakes included. So that its invariants can be checked all the same, a
`WatchedScheduler` notes when the cause of a known defect has occurred; from then on, and only then, the
invariants that it breaks are excused. `fixtures/cases/scheduler/NAME.json` shows each defect at work.
"""

from collections import Counter
from dataclasses import dataclass
from typing import Any

from ..scheduler.kv_blocks import update_block_hashes
from ..scheduler.output import GrammarOutput, ModelRunnerOutput, SchedulerOutput
from ..scheduler.request import Request, RequestStatus, StreamingUpdate
from ..scheduler.upstream import AsyncUpstreamScheduler, UpstreamScheduler
from .scheduler_invariants import could_run

ORACLE, PROGRESS, CRASH, STAND_IN = "oracle", "progress", "crash", "stand-in"
"""What may fail beside the functions of scheduler_invariants.py: outputs; being served; vLLM's assertions, at
which both schedulers stop; and what the stand-in for the model is asked to do."""


@dataclass(frozen=True)
class Defect:
    """A mistake of v0.17.0.

    Attributes:
        name: as in `WatchedScheduler.defects`.
        issue: issues and pull requests of vllm-project/vllm that are about it, or about its kin.
        summary: cause and effect.
        breaks: what may fail once the cause has occurred; wrong blocks may also be sent (STAND_IN).
    """

    name: str
    issue: str
    summary: str
    breaks: tuple[str, ...]


DEFECTS = (
    Defect(
        "stale_block_hash",
        "#49377, #49448, #49449, #51694",
        "A session's new input replaces its last sampled token, but a block hash that covers that token "
        "stays; and blocks hashed later miss all images but the last. Others then hit blocks of other "
        "content.",
        (ORACLE, STAND_IN, "only_equal_content_is_shared"),
    ),
    Defect(
        "drafts_counted_behind_stop",
        "#44521, #44526",
        "A session stops inside accepted drafts: those behind the stop count as computed, and as many "
        "tokens of the next input are never computed.",
        (ORACLE, CRASH, STAND_IN, "counts_are_possible", "tables_hold_all_tokens"),
    ),
    Defect(
        "session_stops_with_output_in_flight",
        "#52693, #52765",
        "A session stops while a further token of it is in flight: the token comes after the end, or in the"
        " next turn; if it stops the session again, the session is in no queue any more.",
        (
            ORACLE,
            PROGRESS,
            CRASH,
            STAND_IN,
            "requests_are_partitioned",
            "sessions_without_input_are_counted",
            "counts_are_possible",
            "tables_hold_all_tokens",
        ),
    ),
    Defect(
        "session_keeps_draft_placeholders",
        "#42655, #42760, #43683",
        "Async: a session's new input does not clear the placeholders of drafts of the turn before; they "
        "are scheduled with it, and nobody drafted anything.",
        (),  # the stand-in for the model always has drafts
    ),
    Defect(
        "reset_discards_the_wrong_token",
        "#42043, #42117, #46066",
        "Async: reset_prefix_cache(reset_running_requests=True) discards the next token of every running "
        "request, whether none, one or several are in flight.",
        (ORACLE, PROGRESS, CRASH, STAND_IN, "nobody_steps_past_its_end", "counts_are_possible"),
    ),
    Defect(
        "resumed_with_outputs_in_flight",
        "#48245, #47900, #41190",
        "Async, three batches in flight: a preempted request is resumed before its outputs have arrived, "
        "and computes them again.",
        (ORACLE, PROGRESS, CRASH, STAND_IN, "counts_are_possible", "prefills_are_cut_as_allowed"),
    ),
    Defect(
        "grammar_lags_behind",
        "#45014, #45015",
        "Async, three batches in flight: the bitmask of a step is made when one of the two outputs before "
        "it has arrived, and allows what the token before the last would have allowed.",
        (ORACLE,),
    ),
    Defect(
        "grammar_does_not_see_drafts",
        "near #54437",
        "Async: the bitmask is made with the drafts still -1, as no output is in flight, or the request was "
        "not in the step before; what follows an accepted draft is then not restricted.",
        (ORACLE,),
    ),
    Defect(
        "failed_load_keeps_placeholders",
        "#45138, #45146, #49252",
        "Async: a load fails in a step that counted a token as scheduled; the request computes one too "
        "many, and may never end; what was in flight is not void.",
        (
            ORACLE,
            PROGRESS,
            CRASH,
            STAND_IN,
            "nobody_steps_past_its_end",
            "counts_are_possible",
            "tables_hold_all_tokens",
        ),
    ),
    Defect(
        "failed_blocks_stay_cached",
        "near #45497, #37827",
        "Blocks whose load failed can still be found by hash while nobody has computed them again, or "
        "nobody will: the request may be gone.",
        (ORACLE, STAND_IN),
    ),
    Defect(
        "failed_load_goes_unnoticed",
        "none found",
        "A failed load is searched for in the tables of running requests, in the tokens of their first "
        "prefix hit: not found behind those after a resumption, nor if the request was preempted before the"
        " report.",
        (ORACLE, STAND_IN),
    ),
    Defect(
        "finished_while_loading",
        "near #46240, #53631",
        "Async, three batches in flight: a preempted request loads again when the output in flight ends it. "
        "Its blocks are given away while they are loaded into, and the end of the load is an error.",
        (ORACLE, CRASH, STAND_IN),
    ),
    Defect(
        "victim_was_scheduled_in_this_step",
        "#57580",
        "PRIORITY: who is preempted after being scheduled in the same step leaves blocks in the prefix "
        "cache, and images in the encoder cache, that are never computed.",
        (ORACLE, CRASH, STAND_IN),
    ),
    Defect(
        "equals_take_turns",
        "near #51574",
        "PRIORITY: of requests of equal priority and arrival time the one that runs longest gives way, so "
        "that two of them can preempt each other for ever.",
        (PROGRESS,),
    ),
    Defect(
        "waiting_requests_hold_blocks",
        "#57104, #45387, #45388, #49439",
        "Waiting requests hold blocks (loaded ones, or those of a session) and never give way: running ones"
        " preempt each other for what is left, or nobody can run.",
        (PROGRESS,),
    ),
    Defect(
        "adapters_of_skipped_requests_are_not_counted",
        "none found",
        "A running request that gets no token in a step does not count against max_loras; another adapter "
        "is admitted, and the assertion fails when both run.",
        (CRASH, "limits_are_kept"),
    ),
    Defect(
        "mamba_state_of_another_position_is_cached",
        "#43559, #45477, #51113",
        "Mamba, align, with an eagle head: the end of a prompt is prefilled in chunks of any length. The "
        "state at which one stopped inside a block is cached as that of the block's end.",
        (ORACLE,),
    ),
    Defect(
        "fewer_mamba_drafts_than_before",
        "#39271, #39562, #43382",
        "Mamba, align: a step with fewer drafts than the step before needs fewer blocks than are held.",
        (CRASH,),
    ),
    Defect(
        "reset_while_others_hold_blocks",
        "none found",
        "reset_prefix_cache(reset_running_requests=True) preempts everybody, and then fails because waiting"
        " requests hold blocks.",
        (CRASH,),
    ),
)

CRASHES = {
    "more adapters run than max_loras": "adapters_of_skipped_requests_are_not_counted",
    "mamba blocks held": "fewer_mamba_drafts_than_before",
}
"""Part of an error's message: the defect that it is, by itself."""


class _Watch(UpstreamScheduler):
    """Notes causes of known defects in `defects`, and leaves everything as it is."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.defects: Counter[str] = Counter()
        self._in_flight: list[SchedulerOutput] = []

    def schedule(self) -> SchedulerOutput:
        output = super().schedule()
        self._in_flight.append(output)
        return output

    def update_from_output(
        self, scheduler_output: SchedulerOutput, model_runner_output: ModelRunnerOutput
    ) -> Any:
        self._in_flight = [output for output in self._in_flight if output is not scheduler_output]
        connector_output = model_runner_output.kv_connector_output
        invalid_block_ids = connector_output.invalid_block_ids if connector_output else set()
        wrong_block_ids = self._watch_failed_load(invalid_block_ids)
        if invalid_block_ids and any(
            request_id in self.requests and self.requests[request_id].status == RequestStatus.PREEMPTED
            for request_id in scheduler_output.num_scheduled_tokens
        ):
            self.defects["failed_load_goes_unnoticed"] += 1
        outputs = super().update_from_output(scheduler_output, model_runner_output)
        if any(self.kv_cache_manager.block_pool.blocks[i].key for i in wrong_block_ids):
            self.defects["failed_blocks_stay_cached"] += 1
        return outputs

    def reset_prefix_cache(self, reset_running_requests: bool = False, reset_connector: bool = False) -> bool:
        if reset_running_requests and self.running and isinstance(self, AsyncUpstreamScheduler):
            self.defects["reset_discards_the_wrong_token"] += 1
        running = {request.request_id for request in self.running}
        if reset_running_requests and any(
            set(g.req_to_blocks) - running for g in self.kv_cache_manager.groups
        ):
            self.defects["reset_while_others_hold_blocks"] += 1
        return super().reset_prefix_cache(reset_running_requests, reset_connector)

    def _is_in_flight(self, request_id: str, but: SchedulerOutput | None = None) -> bool:
        """Whether a step that was scheduled and has not come back, other than `but`, holds the request."""
        return any(request_id in out.num_scheduled_tokens for out in self._in_flight if out is not but)

    def _watch_failed_load(self, invalid_block_ids: set[int]) -> set[int]:
        """Returns the invalid blocks, and those that were computed from them."""
        wrong_block_ids = set(invalid_block_ids)
        for request in self.running if invalid_block_ids else ():
            table = self.kv_cache_manager.get_block_ids(request.request_id)[0]
            if invalid_block_ids.isdisjoint(table):
                continue
            wrong_block_ids.update(table[min(map(table.index, invalid_block_ids.intersection(table))) :])
            if isinstance(self, AsyncUpstreamScheduler):
                self.defects["failed_load_keeps_placeholders"] += 1
            if request.num_preemptions:
                self.defects["failed_load_goes_unnoticed"] += 1
        return wrong_block_ids

    def _admit(
        self,
        request: Request,
        num_computed_tokens: int,
        num_new_tokens: int,
        encoder_inputs: list[int] | None,
        step: Any,
    ) -> None:
        if request.num_output_placeholders:
            self.defects["resumed_with_outputs_in_flight"] += 1
        super()._admit(request, num_computed_tokens, num_new_tokens, encoder_inputs, step)

    def _enter(
        self, request: Request, num_new_tokens: int, encoder_inputs: list[int] | None, step: Any
    ) -> None:
        start, size = request.num_computed_tokens, self.config.block_size
        is_prefill = start < max(request.num_prompt_tokens, request.num_tokens - 1)
        passes_block_end = start % size and start // size < (start + num_new_tokens) // size
        if self.config.need_mamba_block_aligned_split and is_prefill and passes_block_end:
            self.defects["mamba_state_of_another_position_is_cached"] += 1
        super()._enter(request, num_new_tokens, encoder_inputs, step)

    def get_grammar_bitmask(self, scheduler_output: SchedulerOutput) -> GrammarOutput | None:
        grammar_output = super().get_grammar_bitmask(scheduler_output)
        for request_id in grammar_output.structured_output_request_ids if grammar_output else ():
            is_deferred = scheduler_output.pending_structured_output_tokens
            if is_deferred and self._is_in_flight(request_id, but=scheduler_output):
                self.defects["grammar_lags_behind"] += 1
            unknown = -1 in scheduler_output.scheduled_spec_decode_tokens.get(request_id, ())
            if unknown and request_id not in (scheduler_output.num_invalid_spec_tokens or {}):
                self.defects["grammar_does_not_see_drafts"] += 1
        return grammar_output

    def _choose_victim(self) -> Request:
        victim = super()._choose_victim()
        rank = victim.priority, victim.arrival_time
        if self.config.policy == "priority" and any(
            (r.priority, r.arrival_time) == rank for r in self.running
        ):
            self.defects["equals_take_turns"] += 1
        return victim

    def _take_out(self, request: Request, step: Any) -> None:
        self.defects["victim_was_scheduled_in_this_step"] += 1
        super()._take_out(request, step)

    def _goes_on(self, request: Request) -> bool:
        if request.resumable and (self._is_in_flight(request.request_id) or request in self.waiting):
            self.defects["session_stops_with_output_in_flight"] += 1
        return super()._goes_on(request)

    def _append_tokens(self, request: Request, token_ids: list[int]) -> tuple[list[int], bool]:
        is_loading = request.status == RequestStatus.WAITING_FOR_REMOTE_KVS
        kept, stopped = super()._append_tokens(request, token_ids)
        if stopped and is_loading:
            self.defects["finished_while_loading"] += 1
        if stopped and request.resumable and len(kept) < len(token_ids):
            self.defects["drafts_counted_behind_stop"] += 1
        return kept, stopped

    def _update_request_as_session(self, session: Request, update: StreamingUpdate) -> None:
        if session.spec_token_ids and isinstance(self, AsyncUpstreamScheduler):
            self.defects["session_keeps_draft_placeholders"] += 1
        super()._update_request_as_session(session, update)

    def _update_block_hashes(self, request: Request) -> None:
        super()._update_block_hashes(request)
        may_be_wrong = self.config.enable_prefix_caching and (request.resumable or request.mm_features)
        if may_be_wrong and not self._hashes_are_right(request):
            self.defects["stale_block_hash"] += 1

    def _hashes_are_right(self, request: Request) -> bool:
        hashes = request.block_hashes
        request.block_hashes = []
        update_block_hashes(request, self.config.block_size)
        fresh, request.block_hashes = request.block_hashes, hashes
        return fresh == hashes


class WatchedScheduler(_Watch):
    """`UpstreamScheduler` that notes causes of known defects in `defects`."""


class WatchedAsyncScheduler(_Watch, AsyncUpstreamScheduler):
    """`AsyncUpstreamScheduler` that notes causes of known defects in `defects`."""


def holders(scheduler: UpstreamScheduler) -> list[Request]:
    """Waiting requests that hold blocks."""
    tables = [group.req_to_blocks for group in scheduler.kv_cache_manager.groups]
    return [r for r in scheduler.waiting if any(table.get(r.request_id) for table in tables)]


def excuse(scheduler: Any, broken: str, message: str) -> str | None:
    """The known defect that explains why `broken` does not hold, or None.

    Args:
        scheduler: a watched one.
        broken: the name of an invariant, or one of ORACLE, PROGRESS, CRASH, STAND_IN.
        message: of the error.
    """
    if broken == CRASH:
        for part, name in CRASHES.items():
            if part in message:
                return name
    if broken == PROGRESS and holders(scheduler) and could_run(scheduler):
        return "waiting_requests_hold_blocks"
    for defect in DEFECTS:
        if scheduler.defects[defect.name] and broken in defect.breaks:
            return defect.name
    return None
