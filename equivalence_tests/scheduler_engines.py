"""What the driver drives: a scheduler, ours or vLLM's, behind one set of names."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ..scheduler.config import SchedulerConfig
from ..scheduler.lifecycle import PauseState
from ..scheduler.output import DraftTokenIds, ModelRunnerOutput
from ..scheduler.request import (
    LoRARequest,
    MultiModalFeatureSpec,
    PlaceholderRange,
    Request,
    RequestStatus,
    SamplingParams,
    StructuredOutputRequest,
)
from ..scheduler.upstream import AsyncUpstreamScheduler, UpstreamScheduler
from ..scheduler.workload import EOS_TOKEN_ID, ImageSpec, RequestSpec, prompt_token_ids
from .paged_model import KEEP_BLOCKS, PagedModel
from .scheduler_comparison import plain, plain_fields


@dataclass
class RequestInput:
    """A request, or a further input of a session, as it is handed to a scheduler."""

    prompt_token_ids: list[int]
    max_tokens: int
    min_tokens: int
    eos_token_id: int | None
    images: tuple[ImageSpec, ...]
    arrival_time: float
    resumable: bool
    skip_reading_prefix_cache: bool = False
    kv_transfer_params: dict[str, Any] | None = None

    @classmethod
    def of(cls, spec: RequestSpec, number: int, arrival_time: float, *, keep_blocks: bool) -> "RequestInput":
        """Input `number` of a spec: 0 is the request, then come the chunks of a session, then its end."""
        chunks = spec.chunks or ()
        if number > len(chunks):
            return cls([EOS_TOKEN_ID], 1, 0, None, (), arrival_time, resumable=False)
        part = chunks[number - 1] if number else spec
        return cls(
            prompt_token_ids=prompt_token_ids(part),
            max_tokens=part.max_tokens,
            min_tokens=min(spec.min_tokens, part.max_tokens),
            eos_token_id=EOS_TOKEN_ID if spec.eos else None,
            images=part.images,
            arrival_time=arrival_time,
            resumable=spec.chunks is not None,
            # The other way round in further inputs, which a scheduler must not heed.
            skip_reading_prefix_cache=spec.skip_reading_prefix_cache != (number > 0),
            kv_transfer_params={KEEP_BLOCKS: True} if keep_blocks else None,
        )


class Engine:
    """A scheduler, behind names that ours and vLLM's share; subclasses make its native objects.

    Args of a subclass:
        config: of the scheduler.
        asynchronous: AsyncScheduler instead of Scheduler.
        clock: gives the time, s.
        connector, structured_output_manager: as the scheduler takes them, or None.

    Attributes:
        model: the stand-in for a model that can execute what the scheduler puts out.
    """

    name = ""
    model: type[PagedModel] = PagedModel

    def __init__(self, scheduler: Any, statuses: Any, pause_states: Any) -> None:
        self.scheduler = scheduler
        self.statuses = statuses
        self.pause_states = pause_states
        self._hash_names: dict[bytes, int] = {}

    def make_request(self, spec: RequestSpec, given: RequestInput) -> Any:
        raise NotImplementedError

    def native_output(self, output: ModelRunnerOutput) -> Any:
        return output

    def native_drafts(self, drafts: DraftTokenIds) -> Any:
        return drafts

    def prefix_cache_content(self) -> list[tuple[tuple[int, int], list[int]]]:
        """Keys of the prefix cache, as names, and the blocks of each, the one that is found first."""
        raise NotImplementedError

    def free_block_ids(self) -> list[int]:
        """The next one to be handed out first."""
        raise NotImplementedError

    def block_keys(self) -> list[Any]:
        """Of each block, the key by which its content can be found, or None."""
        raise NotImplementedError

    def key_name(self, key: Any) -> tuple[int, int]:
        raise NotImplementedError

    def groups(self) -> list[Any]:
        """Who keeps the block tables of each KV cache group."""
        raise NotImplementedError

    def state(self) -> dict[str, Any]:
        """What the two keep in places of their own: loads from a remote cache, clients' finished requests."""
        raise NotImplementedError

    def hash_name(self, block_hash: bytes) -> int:
        """A number in place of a hash, in order of appearance: what two hash functions have in common."""
        return self._hash_names.setdefault(block_hash, len(self._hash_names))

    def add(self, spec: RequestSpec, given: RequestInput) -> None:
        self.scheduler.add_request(self.make_request(spec, given))

    def abort(self, request_ids: list[str] | None) -> Any:
        return self.scheduler.finish_requests(request_ids, self.statuses.FINISHED_ABORTED)

    def set_pause_state(self, state: int) -> None:
        self.scheduler.set_pause_state(self.pause_states(state))

    def update_from_output(self, out: Any, output: ModelRunnerOutput) -> Any:
        return self.scheduler.update_from_output(out, self.native_output(output))

    def update_drafts(self, drafts: DraftTokenIds) -> None:
        self.scheduler.update_draft_token_ids(self.native_drafts(drafts))

    def update_drafts_in_output(self, drafts: DraftTokenIds, out: Any) -> None:
        self.scheduler.update_draft_token_ids_in_output(self.native_drafts(drafts), out)

    def request_fields(self, request: Any) -> dict[str, Any]:
        data = plain_fields("Request", None, request)
        data["block_hashes"] = [self.hash_name(block_hash) for block_hash in request.block_hashes]
        return data

    def snapshot(self) -> dict[str, Any]:
        """The whole state, as plain data; valid until the engine is used again."""
        s = self.scheduler
        manager, encoder = s.kv_cache_manager, s.encoder_cache_manager
        return {
            "requests": {request_id: self.request_fields(r) for request_id, r in s.requests.items()},
            "request_order": list(s.requests),
            "waiting": [r.request_id for r in s.waiting],
            "running": [r.request_id for r in s.running],
            "finished_req_ids": sorted(s.finished_req_ids),
            "prev_step_scheduled_req_ids": sorted(s.prev_step_scheduled_req_ids),
            "num_waiting_for_streaming_input": s.num_waiting_for_streaming_input,
            "num_unfinished_requests": s.get_num_unfinished_requests(),
            "has_requests": s.has_requests(),
            "has_finished_requests": s.has_finished_requests(),
            "request_counts": list(s.get_request_counts()),
            "encoder_cache": {
                "cached": plain(encoder.cached),
                "freeable": plain(encoder.freeable),
                "freed": plain(encoder.freed),
                "num_free_slots": encoder.num_free_slots,
                "num_freeable_slots": encoder.num_freeable_slots,
            },
            "free_block_ids": self.free_block_ids(),
            "ref_counts": [
                block.ref_cnt for block in manager.block_pool.blocks[1:]
            ],  # nobody counts the null block
            "block_keys": [None if key is None else self.key_name(key) for key in self.block_keys()],
            "prefix_cache": sorted(self.prefix_cache_content()),
            "block_tables": [
                {k: [block.block_id for block in table] for k, table in group.req_to_blocks.items() if table}
                for group in self.groups()
            ],
            "num_cached_blocks": [dict(group.num_cached_block) for group in self.groups()],
            "prefix_cache_stats": plain(manager.prefix_cache_stats) if manager.log_stats else None,
            **self.state(),
        }


class OurEngine(Engine):
    """`UpstreamScheduler` or `AsyncUpstreamScheduler`; arguments as of `Engine`."""

    name = "ours"
    schedulers: tuple[type[UpstreamScheduler], type[UpstreamScheduler]] = (
        UpstreamScheduler,
        AsyncUpstreamScheduler,
    )

    def __init__(
        self,
        config: SchedulerConfig,
        *,
        asynchronous: bool,
        clock: Callable[[], float],
        connector: Any = None,
        structured_output_manager: Any = None,
    ) -> None:
        scheduler = self.schedulers[asynchronous](
            config, connector=connector, structured_output_manager=structured_output_manager, clock=clock
        )
        super().__init__(scheduler, RequestStatus, PauseState)

    def make_request(self, spec: RequestSpec, given: RequestInput) -> Request:
        return Request(
            spec.request_id,
            given.prompt_token_ids,
            SamplingParams(
                max_tokens=given.max_tokens,
                min_tokens=given.min_tokens,
                eos_token_id=given.eos_token_id,
                stop_token_ids=spec.stop_token_ids,
                skip_reading_prefix_cache=given.skip_reading_prefix_cache,
            ),
            arrival_time=given.arrival_time,
            priority=spec.priority,
            client_index=spec.client_index,
            mm_features=[
                MultiModalFeatureSpec(i.identifier, PlaceholderRange(i.offset, i.length, i.is_embed))
                for i in given.images
            ],
            lora_request=LoRARequest(f"lora{spec.lora}", spec.lora) if spec.lora else None,
            cache_salt=spec.cache_salt,
            structured_output_request=StructuredOutputRequest() if spec.structured else None,
            resumable=given.resumable,
            kv_transfer_params=given.kv_transfer_params,
        )

    def prefix_cache_content(self) -> list[tuple[tuple[int, int], list[int]]]:
        cache = self.scheduler.kv_cache_manager.block_pool.cached_blocks
        return [(self.key_name(key), list(blocks)) for key, blocks in cache.items()]

    def free_block_ids(self) -> list[int]:
        return self.scheduler.kv_cache_manager.block_pool.free_block_ids()

    def block_keys(self) -> list[Any]:
        return [block.key for block in self.scheduler.kv_cache_manager.block_pool.blocks]

    def key_name(self, key: Any) -> tuple[int, int]:
        return self.hash_name(key[0]), key[1]

    def groups(self) -> list[Any]:
        return list(self.scheduler.kv_cache_manager.groups)

    def state(self) -> dict[str, Any]:
        s, remote = self.scheduler, self.scheduler.remote_kv
        return {
            "pause_state": int(s.pause_state),
            "finished_req_ids_by_client": plain(s.finished_req_ids_by_client),
            "finished_recving_req_ids": sorted(remote.finished_recving_req_ids) if remote else [],
            "failed_recving_req_ids": sorted(remote.failed_recving_req_ids) if remote else [],
            "connector_prefix_cache_stats": plain(remote.stats) if remote and s.config.log_stats else None,
        }
