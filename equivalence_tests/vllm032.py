"""The real scheduler of vLLM 0.32.0 as an engine of the differential suite; see real_scheduler.py."""

import functools
import math
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

from ..scheduler.config import SchedulerConfig
from .paged_model import PagedModel, StandInStructuredOutputManager
from .real_scheduler import VLLM, RealEngine, import_vllm
from .scheduler_comparison import plain

VERSION = "0.32.0"


@functools.cache
def load_vllm() -> VLLM:
    """vLLM 0.32.0, as `import_vllm`, with connectors that are handed over."""
    vllm = import_vllm(VERSION)
    # A connector is made by name; here it is given.
    vars(vllm.scheduler)["KVConnectorFactory"] = SimpleNamespace(
        create_connector=lambda config, **_: config.kv_transfer_config.connector
    )
    return vllm


class Connector:
    """The connector of a lane, which v0.17.0 knows, with what 0.32.0 asks a connector for besides.

    Every answer is that of vllm/distributed/kv_transfer/kv_connector/v1/base.py (0.32.0).
    """

    supports_divergent_local_hybrid_hits = False
    requires_kv_delivery = False

    def __init__(self, connector: Any) -> None:
        self._connector = connector

    def __getattr__(self, name: str) -> Any:
        return getattr(self._connector, name)

    def bind_kv_cache_manager(self, kv_cache_manager: Any) -> None:
        """Nothing is kept."""

    def on_new_request(self, request: Any) -> None:
        """The stand-in has heard of it before."""

    def has_pending_block_frees(self) -> bool:
        return False

    def has_pending_push_work(self) -> bool:
        return False

    def get_loaded_kv_cache_group_ids(self, request: Any) -> tuple[int, ...]:
        return (0,)

    def get_external_cache_hit_sources(self, request: Any, num_external_tokens: int) -> dict[str, int]:
        return {"stand-in": num_external_tokens} if num_external_tokens else {}


class Grammars(StandInStructuredOutputManager):
    """What the scheduler of 0.32.0 asks about grammars. Source: vllm/v1/structured_output/__init__.py."""

    def accept_tokens(self, request: Any, new_token_ids: list[int]) -> bool:
        """Advance the request's grammar, if it has one, by tokens that were sampled."""
        if not request.use_structured_output or not new_token_ids:
            return True
        return request.structured_output_request.grammar.accept_tokens(request.request_id, new_token_ids)

    def validate_tokens(self, request: Any, spec_tokens: list[int]) -> list[int]:
        """The longest prefix that the request's grammar allows; all of it without one."""
        if not request.use_structured_output:
            return spec_tokens
        drafted = spec_tokens[: spec_tokens.index(-1)] if -1 in spec_tokens else spec_tokens
        return request.structured_output_request.grammar.validate_tokens(drafted)


class PaddedModel(PagedModel):
    """A model that is also asked for drafts that nobody made.

    0.32.0 fills up the first step of a request whose prompt is all but computed with drafts of -1. Here such
    a draft is a token like any other; as with any other, it is rejected unless the model says the same.
    """

    def _part(self, running: Any, num_tokens: int, drafts: Sequence[int]) -> Any:
        if self.asynchronous:
            running.drafts += [0] * (len(drafts) - len(running.drafts))
        else:
            drafts = [max(0, draft) for draft in drafts]
        return super()._part(running, num_tokens, drafts)


class VLLMEngine(RealEngine):
    """`Scheduler` or `AsyncScheduler` of vLLM 0.32.0; arguments as of `Engine`.

    Raises:
        UnavailableError: where vLLM 0.32.0 is not to be had.
    """

    name = "vllm"
    model = PaddedModel

    def __init__(self, config: SchedulerConfig, *, connector: Any = None, **options: Any) -> None:
        options["structured_output_manager"] = Grammars()
        super().__init__(config, connector=connector and Connector(connector), **options)

    def load(self) -> VLLM:
        return load_vllm()

    def scheduler_block_size(self, config: SchedulerConfig) -> int:
        """A multiple of the block size of each group; without prefix caching a mamba block is a request long.

        Source: vllm/v1/core/kv_cache_utils.py, resolve_kv_cache_block_sizes.
        """
        sizes = {"full_attention": config.block_size, "mamba": config.mamba_block_size}
        return math.lcm(config.block_size, *(sizes[kind] for kind in config.kv_groups))

    def request_class(self) -> Any:
        return _request_class()

    def state(self) -> dict[str, Any]:
        s = self.scheduler
        return {
            **super().state(),
            "kv_holding_waiting": [r.request_id for r in s.kv_holding_waiting],
            "deferred_waiting": sorted(r.request_id for r in s.deferred_waiting),
            "inflight_prefills": sorted(r.request_id for r in s._inflight_prefills),
            "reset_preempted_req_ids": sorted(s.reset_preempted_req_ids),
            "deferred_frees": [[fence, [b.block_id for b in blocks]] for fence, blocks in s.deferred_frees],
            "kv_fetch_counts": plain(s._kv_fetch_counts),
        }

    def vllm_config(self, config: SchedulerConfig, asynchronous: bool) -> SimpleNamespace:
        made = super().vllm_config(config, asynchronous)
        num_drafts, method = config.num_spec_tokens, config.spec_method
        is_eagle, is_draft_model = method == "eagle", method == "draft_model"
        vars(made.scheduler_config).update(
            max_num_active_seqs=None,
            long_prefill_token_threshold_adaptive=False,
            scheduler_reserve_full_isl=True,
            watermark=0.0,
            prefill_schedule_interval=1,
        )
        made.cache_config.enable_mamba_shared_prefix_checkpoint = False
        vars(made.model_config).update(
            is_diffusion=False,
            runner_type="generate",
            uses_mrope=False,
            supports_multimodal_inputs=False,
            return_sampling_mask=False,
        )
        vars(made.observability_config).update(
            enable_logging_iteration_details=False,
            per_request_spec_decode_metrics="detailed" if num_drafts else "none",
        )
        if made.speculative_config is not None:
            vars(made.speculative_config).update(
                num_speculative_tokens_per_batch_size=None,
                max_num_new_slots_for_drafting=int(is_draft_model),
                use_eagle_block_drop=lambda: is_eagle,
            )
        if self.connector is not None:
            made.kv_transfer_config = SimpleNamespace(
                connector=self.connector,
                kv_load_failure_policy=config.kv_load_failure_policy,
                kv_role="kv_both",
                is_kv_consumer=True,
                is_kv_producer=True,
            )
        vars(made).update(
            ec_manager_config=SimpleNamespace(get_encoder_cache_manager_obj=lambda: None),
            aux_output_config=SimpleNamespace(enabled=False),
            is_mm_encoder_only=False,
            max_concurrent_batches=2 if asynchronous else 1,
            max_in_flight_tokens=(1 + asynchronous) * config.max_num_batched_tokens,
            num_speculative_tokens=num_drafts,
            num_lookahead_tokens=num_drafts if is_eagle or is_draft_model else 0,
            num_prefill_lookahead_tokens=int(num_drafts > 0 and is_eagle),
            use_v2_model_runner=False,  # the stand-in for the model is told what the older runner is
        )
        return made


@functools.cache
def _request_class() -> Any:
    """vLLM's Request, with a name that 0.17.0 had for what is in its statistics now."""

    class Request(load_vllm().request.Request):
        @property
        def num_external_computed_tokens(self) -> int:
            return self.prefill_stats.num_external_cached_tokens if self.prefill_stats else 0

    return Request
