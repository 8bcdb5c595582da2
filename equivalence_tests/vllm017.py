"""The real scheduler of vLLM 0.17.0 as an engine of the differential suite; see real_scheduler.py."""

import functools
from types import SimpleNamespace
from typing import Any

from ..scheduler.config import SchedulerConfig
from .real_scheduler import VLLM, RealEngine, import_vllm

VERSION = "0.17.0"


@functools.cache
def load_vllm() -> VLLM:
    """vLLM 0.17.0, as `import_vllm`."""
    return import_vllm(VERSION)


class VLLMEngine(RealEngine):
    """`Scheduler` or `AsyncScheduler` of vLLM 0.17.0; arguments as of `Engine`.

    Raises:
        UnavailableError: where vLLM 0.17.0 is not to be had.
    """

    name = "vllm"

    def __init__(self, config: SchedulerConfig, *, connector: Any = None, **options: Any) -> None:
        super().__init__(config, connector=connector, **options)
        if connector is not None:
            # What the constructor would take from a connector made by name.
            self.scheduler.connector = connector
            self.scheduler.recompute_kv_load_failures = config.kv_load_failure_policy == "recompute"
            if config.log_stats:
                self.scheduler.connector_prefix_cache_stats = self.vllm.stats.PrefixCacheStats()

    def load(self) -> VLLM:
        return load_vllm()

    def vllm_config(self, config: SchedulerConfig, asynchronous: bool) -> SimpleNamespace:
        return SimpleNamespace(
            scheduler_config=SimpleNamespace(
                max_num_seqs=config.max_num_seqs,
                max_num_batched_tokens=config.max_num_batched_tokens,
                max_num_scheduled_tokens=None,
                policy=config.policy,
                enable_chunked_prefill=config.enable_chunked_prefill,
                long_prefill_token_threshold=config.long_prefill_token_threshold,
                disable_chunked_mm_input=config.disable_chunked_mm_input,
                async_scheduling=asynchronous,
            ),
            cache_config=SimpleNamespace(
                num_gpu_blocks=config.num_blocks,
                block_size=config.block_size,
                enable_prefix_caching=config.enable_prefix_caching,
                mamba_cache_mode=config.mamba_cache_mode,
            ),
            model_config=SimpleNamespace(
                max_model_len=config.max_model_len,
                is_encoder_decoder=False,
                enable_return_routed_experts=False,
            ),
            parallel_config=SimpleNamespace(
                data_parallel_index=0,
                decode_context_parallel_size=1,
                prefill_context_parallel_size=1,
                pipeline_parallel_size=1,
            ),
            observability_config=SimpleNamespace(kv_cache_metrics=False, enable_mfu_metrics=False),
            lora_config=None if config.max_loras is None else SimpleNamespace(max_loras=config.max_loras),
            speculative_config=SimpleNamespace(
                num_speculative_tokens=config.num_spec_tokens,
                use_eagle=lambda: config.spec_method == "eagle",
                uses_draft_model=lambda: config.spec_method == "draft_model",
            )
            if config.num_spec_tokens
            else None,
            kv_events_config=None,
            kv_transfer_config=None,
            ec_transfer_config=None,
        )
