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
        made = super().vllm_config(config, asynchronous)
        made.model_config.enable_return_routed_experts = False
        if made.speculative_config is not None:
            made.speculative_config.uses_draft_model = lambda: config.spec_method == "draft_model"
        return made
