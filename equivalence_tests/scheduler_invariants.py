"""What must hold of a scheduler after every step, whatever came before; needs no second scheduler.

Each invariant is a function of the scheduler (and of the step) that yields what is wrong. Where vLLM v0.17.0
itself breaks one, the exemption is named here, with upstream's issue, and a fixture shows the case.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain

from ..reference.errors import AscendTwinError
from ..scheduler.kv_blocks import FullAttentionGroup
from ..scheduler.lifecycle import PauseState
from ..scheduler.output import SchedulerOutput
from ..scheduler.request import Request, RequestStatus
from ..scheduler.upstream import UpstreamScheduler


class InvariantError(AscendTwinError, AssertionError):
    """A scheduler broke `invariant`; the message names it, and the request or block."""

    def __init__(self, invariant: str, problem: str) -> None:
        super().__init__(f"{invariant}: {problem}")
        self.invariant = invariant


@dataclass(frozen=True)
class Before:
    """What a scheduler was before a step, as far as invariants ask for it.

    Attributes:
        running: ids of running requests, in order.
        holders: ids of requests that hold a block.
        num_output_placeholders: by request id.
    """

    running: tuple[str, ...]
    holders: frozenset[str]
    num_output_placeholders: dict[str, int]

    @classmethod
    def of(cls, scheduler: UpstreamScheduler) -> "Before":
        """The state now."""
        tables = [group.req_to_blocks for group in scheduler.kv_cache_manager.groups]
        return cls(
            tuple(request.request_id for request in scheduler.running),
            frozenset(request_id for table in tables for request_id, blocks in table.items() if blocks),
            {request_id: r.num_output_placeholders for request_id, r in scheduler.requests.items()},
        )


Invariant = Callable[[UpstreamScheduler, SchedulerOutput, Before], Iterator[str]]


def blocks_are_conserved(
    scheduler: UpstreamScheduler, output: SchedulerOutput, before: Before
) -> Iterator[str]:
    """A block is free, or in as many tables as it is counted in; no block is lost."""
    pool = scheduler.kv_cache_manager.block_pool
    tables = chain.from_iterable(group.req_to_blocks.values() for group in scheduler.kv_cache_manager.groups)
    held = Counter(block.block_id for block in chain.from_iterable(tables))
    free = pool.free_block_ids()
    if len(set(free)) != len(free):
        yield "a block is free twice"
    for block in pool.blocks[1:]:
        if block.ref_cnt != held[block.block_id]:
            yield f"block {block.block_id}: {block.ref_cnt} references, held {held[block.block_id]} times"
        if (block.ref_cnt == 0) != (block.block_id in free):
            yield f"block {block.block_id}: {block.ref_cnt} references, free: {block.block_id in free}"


def only_equal_content_is_shared(
    scheduler: UpstreamScheduler, output: SchedulerOutput, before: Before
) -> Iterator[str]:
    """Two requests hold one block only at the same place, behind the same tokens."""
    for group in scheduler.kv_cache_manager.groups:
        owners: dict[int, tuple[int, bytes | None]] = {}
        for request_id, table in group.req_to_blocks.items():
            hashes = scheduler.requests[request_id].block_hashes
            for i, block in enumerate(table):
                if block.block_id == 0:
                    continue
                place = i, hashes[i] if i < len(hashes) else None
                if block.block_id in owners and (owners[block.block_id] != place or place[1] is None):
                    yield f"block {block.block_id} is shared by requests of different content at place {i}"
                owners[block.block_id] = place


def tables_hold_all_tokens(
    scheduler: UpstreamScheduler, output: SchedulerOutput, before: Before
) -> Iterator[str]:
    """Whoever is scheduled has a slot for each of its tokens, and, once it runs, for a drafter's too."""
    config = scheduler.config
    for request_id in output.num_scheduled_tokens:
        num_tokens = scheduler.requests[request_id].num_computed_tokens
        for group in scheduler.kv_cache_manager.groups:
            num_slots = len(group.req_to_blocks.get(request_id, ())) * group.block_size
            if type(group) is FullAttentionGroup and request_id in before.running:
                num_tokens = min(num_tokens + config.num_lookahead_tokens, config.max_model_len)
            if num_slots < num_tokens:
                yield f"{request_id} has {num_slots} slots for {num_tokens} tokens"


def a_block_has_one_writer(
    scheduler: UpstreamScheduler, output: SchedulerOutput, before: Before
) -> Iterator[str]:
    """No two requests of a step write into one block of full attention."""
    for group in scheduler.kv_cache_manager.groups:
        if type(group) is not FullAttentionGroup:
            continue
        writers: dict[int, str] = {}
        for request_id, num_tokens in output.num_scheduled_tokens.items():
            end = scheduler.requests[request_id].num_computed_tokens
            places = range((end - num_tokens) // group.block_size, -(-end // group.block_size))
            for block in group.req_to_blocks[request_id][places.start : places.stop]:
                if writers.setdefault(block.block_id, request_id) != request_id:
                    yield f"{writers[block.block_id]} and {request_id} write into block {block.block_id}"


def limits_are_kept(scheduler: UpstreamScheduler, output: SchedulerOutput, before: Before) -> Iterator[str]:
    """Budgets and caps of a step; nothing behind the end of the model."""
    config = scheduler.config
    num_tokens = sum(output.num_scheduled_tokens.values())
    if num_tokens != output.total_num_scheduled_tokens or num_tokens > config.max_num_batched_tokens:
        yield f"{num_tokens} tokens, budget {config.max_num_batched_tokens}"
    if len(scheduler.running) > scheduler.max_num_running_reqs:
        yield f"{len(scheduler.running)} requests run, max_num_seqs {config.max_num_seqs}"
    requests = [scheduler.requests[request_id] for request_id in output.num_scheduled_tokens]
    loras = {r.lora_request.lora_int_id for r in requests if r.lora_request}
    if config.max_loras is not None and len(loras) > config.max_loras:
        yield f"{len(loras)} adapters, max_loras {config.max_loras}"
    num_embeds = sum(
        scheduler.requests[request_id].mm_features[i].mm_position.get_num_embeds()
        for request_id, indices in output.scheduled_encoder_inputs.items()
        for i in indices
    )
    if num_embeds > config.max_num_encoder_input_tokens:
        yield f"{num_embeds} embeddings, budget {config.max_num_encoder_input_tokens}"
    for request in requests:
        if output.num_scheduled_tokens[request.request_id] <= 0:
            yield f"{request.request_id} is scheduled without a token"
        if request.num_computed_tokens > config.max_model_len:
            yield f"{request.request_id} computes token {request.num_computed_tokens}, behind max_model_len"


def prefills_are_cut_as_allowed(
    scheduler: UpstreamScheduler, output: SchedulerOutput, before: Before
) -> Iterator[str]:
    """Nobody gets more than long_prefill_token_threshold; prompts and images are whole where they must be."""
    config = scheduler.config
    for request_id, num_tokens in output.num_scheduled_tokens.items():
        request = scheduler.requests[request_id]
        if 0 < config.long_prefill_token_threshold < num_tokens:
            yield f"{request_id} gets {num_tokens} tokens"
        may_be_cut = config.enable_chunked_prefill or config.long_prefill_token_threshold
        may_be_cut = may_be_cut or request.mm_features
        if not may_be_cut and request_id not in before.running and request.is_prefill_chunk:
            yield f"{request_id} is admitted with a part of its prompt"
        end = request.num_computed_tokens
        for i in output.scheduled_encoder_inputs.get(request_id, ()):
            position = request.mm_features[i].mm_position
            is_split = end - num_tokens < position.offset < end < position.offset + position.length
            if config.disable_chunked_mm_input and is_split:
                yield f"{request_id} ends inside of image {i}, which this step computes"


def nobody_steps_past_its_end(
    scheduler: UpstreamScheduler, output: SchedulerOutput, before: Before
) -> Iterator[str]:
    """Without drafts, whoever samples has a token left to sample; v0.17.0 counts one in flight, not two."""
    if scheduler.config.num_spec_tokens:
        return
    for request_id in output.num_scheduled_tokens:
        request = scheduler.requests[request_id]
        num_in_flight = before.num_output_placeholders[request_id]
        num_sampled = request.num_tokens + num_in_flight - request.num_prompt_tokens
        samples = not request.is_prefill_chunk and not request.resumable and num_in_flight <= 1
        if samples and num_sampled >= request.max_tokens:
            yield f"{request_id} samples token {num_sampled + 1} of {request.max_tokens}"


def requests_are_partitioned(
    scheduler: UpstreamScheduler, output: SchedulerOutput, before: Before
) -> Iterator[str]:
    """Every unfinished request is in one queue, once; a finished one is in none."""
    places = Counter(r.request_id for r in chain(scheduler.waiting, scheduler.running))
    for request in scheduler.requests.values():
        expected = 0 if request.is_finished else 1
        if places[request.request_id] != expected:
            num_places = places[request.request_id]
            yield f"{request.request_id} ({request.status.name}) is {num_places} times in the queues"
    for request_id in places:
        if request_id not in scheduler.requests:
            yield f"{request_id} is in a queue, and unknown"
    for request in scheduler.running:
        if request.status != RequestStatus.RUNNING:
            yield f"{request.request_id} runs as {request.status.name}"


def counts_are_possible(
    scheduler: UpstreamScheduler, output: SchedulerOutput, before: Before
) -> Iterator[str]:
    """Computed tokens exist, or are scheduled; placeholders are not negative."""
    for request in chain(scheduler.waiting, scheduler.running):
        if request.num_output_placeholders < 0:
            yield f"{request.request_id} has {request.num_output_placeholders} placeholders"
        known = request.num_tokens_with_spec + request.num_output_placeholders
        known += len(output.scheduled_spec_decode_tokens.get(request.request_id, ()))
        if request.num_computed_tokens > known:
            yield f"{request.request_id} has computed {request.num_computed_tokens} of {known} tokens"
        if (
            request.status == RequestStatus.PREEMPTED
            and request.num_computed_tokens
            and not scheduler.connector
        ):
            yield f"{request.request_id} is preempted with {request.num_computed_tokens} computed tokens"


def the_right_requests_give_way(
    scheduler: UpstreamScheduler, output: SchedulerOutput, before: Before
) -> Iterator[str]:
    """Who is preempted had blocks, was admitted last, or is the least urgent, and is out of the step.

    Nobody is admitted in a step in which somebody gave way.
    """
    preempted = output.preempted_req_ids
    admitted = {
        data.req_id for data in output.scheduled_new_reqs
    } | output.scheduled_cached_reqs.resumed_req_ids
    if preempted and admitted:
        yield f"{sorted(admitted)} were admitted in a step that preempted {sorted(preempted)}"
    for request_id in sorted(preempted):
        victim = scheduler.requests[request_id]
        if request_id in output.num_scheduled_tokens:
            yield f"{request_id} was preempted and scheduled in one step"
        if request_id not in before.holders:
            yield f"{request_id} was preempted and held no block"
        for request in scheduler.running:
            if scheduler.config.policy == "priority":
                ok = (request.priority, request.arrival_time) <= (victim.priority, victim.arrival_time)
            else:
                ok = before.running.index(request.request_id) < before.running.index(request_id)
            if not ok:
                yield f"{request_id} gave way to {request.request_id}"


def the_most_urgent_waits_first(
    scheduler: UpstreamScheduler, output: SchedulerOutput, before: Before
) -> Iterator[str]:
    """PRIORITY: the smallest number first, then the earlier; sessions that wait change their time."""
    waiting = list(scheduler.waiting)
    if scheduler.config.policy == "priority" and not any(request.resumable for request in waiting):
        ranks = [(r.priority, r.arrival_time) for r in waiting]
        if ranks != sorted(ranks):
            yield f"the order is {[r.request_id for r in waiting]}"


def sessions_without_input_are_counted(
    scheduler: UpstreamScheduler, output: SchedulerOutput, before: Before
) -> Iterator[str]:
    """`num_waiting_for_streaming_input` is what it says."""
    num_waiting = sum(r.status == RequestStatus.WAITING_FOR_STREAMING_REQ for r in scheduler.waiting)
    if num_waiting != scheduler.num_waiting_for_streaming_input:
        yield f"{num_waiting} wait for input, {scheduler.num_waiting_for_streaming_input} are counted"


def pausing_is_obeyed(scheduler: UpstreamScheduler, output: SchedulerOutput, before: Before) -> Iterator[str]:
    """Paused, nobody new; paused altogether, nothing."""
    if scheduler.pause_state != PauseState.UNPAUSED and output.scheduled_new_reqs:
        yield "a request was admitted while paused"
    if scheduler.pause_state == PauseState.PAUSED_ALL and output.num_scheduled_tokens:
        yield "something was scheduled while paused altogether"


def encoder_cache_is_conserved(
    scheduler: UpstreamScheduler, output: SchedulerOutput, before: Before
) -> Iterator[str]:
    """Slots are free, freeable or in use; what is freeable nobody refers to."""
    cache = scheduler.encoder_cache_manager
    if not 0 <= cache.num_free_slots <= cache.num_freeable_slots <= cache.cache_size:
        yield f"free {cache.num_free_slots}, freeable {cache.num_freeable_slots}, of {cache.cache_size}"
    if cache.num_freeable_slots - cache.num_free_slots != sum(cache.freeable.values()):
        yield f"free {cache.num_free_slots}, freeable {cache.num_freeable_slots}, listed {cache.freeable}"
    for identifier, request_ids in cache.cached.items():
        if request_ids & output.preempted_req_ids:
            yield f"{identifier}: kept by a request that was preempted"
        if any(i not in scheduler.requests or scheduler.requests[i].is_finished for i in request_ids):
            yield f"{identifier}: kept by a request that has finished"
        if bool(request_ids) == (identifier in cache.freeable):
            yield f"{identifier}: used by {sorted(request_ids)}, freeable: {identifier in cache.freeable}"


INVARIANTS: tuple[Invariant, ...] = (
    blocks_are_conserved,
    only_equal_content_is_shared,
    tables_hold_all_tokens,
    a_block_has_one_writer,
    limits_are_kept,
    prefills_are_cut_as_allowed,
    nobody_steps_past_its_end,
    requests_are_partitioned,
    counts_are_possible,
    the_right_requests_give_way,
    the_most_urgent_waits_first,
    sessions_without_input_are_counted,
    pausing_is_obeyed,
    encoder_cache_is_conserved,
)


def check_invariants(scheduler: UpstreamScheduler, output: SchedulerOutput, before: Before) -> None:
    """Check everything right after `output` was scheduled, from the state `before`.

    Raises:
        InvariantError: names the first invariant that does not hold.
    """
    for invariant in INVARIANTS:
        for problem in invariant(scheduler, output, before):
            raise InvariantError(invariant.__name__, problem)


def check_drained(scheduler: UpstreamScheduler) -> None:
    """Check that nothing is left once all requests have finished, but blocks that a connector keeps.

    Raises:
        InvariantError: names what is left.
    """
    holders = {
        request_id for group in scheduler.kv_cache_manager.groups for request_id in group.req_to_blocks
    }
    left = {
        "blocks": sorted(holders - set(scheduler.requests)),
        "queues": [r.request_id for r in chain(scheduler.waiting, scheduler.running)],
        "images": [name for name, ids in scheduler.encoder_cache_manager.cached.items() if ids],
        "sessions": scheduler.num_waiting_for_streaming_input,
    }
    for name, rest in left.items():
        if rest:
            raise InvariantError("nothing_is_left", f"{name}: {rest}")


def could_run(scheduler: UpstreamScheduler) -> list[Request]:
    """Requests that wait for nothing from outside: with room, a step must do something for one of them."""
    waiting_outside = (
        RequestStatus.WAITING_FOR_FSM,
        RequestStatus.WAITING_FOR_REMOTE_KVS,
        RequestStatus.WAITING_FOR_STREAMING_REQ,
    )
    if scheduler.pause_state != PauseState.UNPAUSED:
        return []
    return [r for r in scheduler.requests.values() if not r.is_finished and r.status not in waiting_outside]
