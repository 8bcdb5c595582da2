"""The real scheduler of an installed vLLM as an engine of the differential suites: what all versions share.

Nothing of vLLM is loaded until an engine is made. The scheduler is real to the last line; only what it is
built from is not: a namespace with the attributes that it reads stands for the configuration, so that no
model, no device and no worker is needed and an engine costs a millisecond. vllm017.py and vllm032.py say what
a version reads.
"""

import functools
import importlib
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any

import torch

from ..reference.errors import UnavailableError
from ..scheduler.config import SchedulerConfig
from ..scheduler.output import DraftTokenIds, ModelRunnerOutput
from ..scheduler.workload import ImageSpec, RequestSpec
from .installed_vllm import prepare_import, why_unavailable
from .scheduler_comparison import plain
from .scheduler_engines import Engine, RequestInput


class Clock:
    """What vLLM takes for the module `time`."""

    def __init__(self) -> None:
        self.read: Callable[[], float] = float

    def monotonic(self) -> float:
        return self.read()

    def time(self) -> float:
        return self.read()


class VLLM:
    """The parts of vLLM that an engine is built from, imported once."""

    def __init__(self) -> None:
        self.scheduler = importlib.import_module("vllm.v1.core.sched.scheduler")
        self.Scheduler = _module("vllm.v1.core.sched.scheduler").Scheduler
        self.AsyncScheduler = _module("vllm.v1.core.sched.async_scheduler").AsyncScheduler
        self.interface = _module("vllm.v1.kv_cache_interface")
        self.request = _module("vllm.v1.request")
        self.outputs = _module("vllm.v1.outputs")
        self.stats = _module("vllm.v1.metrics.stats")
        self.inputs = _module("vllm.multimodal.inputs")
        self.sampling = _module("vllm.sampling_params")
        self.LoRARequest = _module("vllm.lora.request").LoRARequest
        self.PauseState = _module("vllm.v1.core.sched.interface").PauseState
        self.EncoderCacheManager = _module("vllm.v1.core.encoder_cache_manager").EncoderCacheManager
        self.kv_cache_utils = _module("vllm.v1.core.kv_cache_utils")
        self.hash = _module("vllm.utils.hashing").get_hash_fn_by_name("sha256")
        self.kv_cache_utils.init_none_hash(self.hash)
        self.clock = Clock()
        for module in (self.scheduler, _module("vllm.v1.engine")):
            vars(module)["time"] = self.clock

    @functools.cached_property
    def field_names(self) -> frozenset[str]:
        """Attributes that the constructors of vLLM's schedulers set."""
        kinds = self.Scheduler, self.AsyncScheduler
        return frozenset(name for kind in kinds for name in kind.__init__.__code__.co_names)


_module: Callable[[str], Any] = importlib.import_module


def import_vllm(version: str) -> VLLM:
    """Import vLLM, without its plugins and its log.

    Raises:
        UnavailableError: where there is no vLLM, another version, or one that cannot be imported.
    """
    if reason := why_unavailable(version):
        raise UnavailableError(reason)
    prepare_import()
    try:
        return VLLM()
    except ImportError as error:
        raise UnavailableError(f"vllm {version} cannot be imported ({error})") from error


class RealEngine(Engine):
    """`Scheduler` or `AsyncScheduler` of a vLLM; arguments as of `Engine`.

    The clock is vLLM's own as long as no other engine is made: two of them at once must have one clock.
    """

    def __init__(
        self,
        config: SchedulerConfig,
        *,
        asynchronous: bool,
        clock: Callable[[], float],
        connector: Any = None,
        structured_output_manager: Any = None,
    ) -> None:
        self.vllm = vllm = self.load()
        vllm.clock.read = clock
        self.connector = connector
        scheduler = self.make_scheduler(
            asynchronous,
            vllm_config=self.vllm_config(config, asynchronous),
            kv_cache_config=kv_cache_config(config, vllm.interface),
            structured_output_manager=structured_output_manager,
            block_size=self.scheduler_block_size(config),
            mm_registry=SimpleNamespace(supports_multimodal_inputs=lambda model_config: False),
            include_finished_set=config.include_finished_set,
            log_stats=config.log_stats,
        )
        # What the constructor would take from a model.
        scheduler.max_num_encoder_input_tokens = config.max_num_encoder_input_tokens
        scheduler.encoder_cache_manager = vllm.EncoderCacheManager(cache_size=config.encoder_cache_size)
        self._block_hasher = None
        if config.enable_prefix_caching or connector is not None:
            self._block_hasher = vllm.kv_cache_utils.get_request_block_hasher(config.block_size, vllm.hash)
        super().__init__(scheduler, vllm.request.RequestStatus, vllm.PauseState)

    def load(self) -> VLLM:
        """The vLLM that this engine is for."""
        raise NotImplementedError

    def vllm_config(self, config: SchedulerConfig, asynchronous: bool) -> SimpleNamespace:
        """What schedulers of all versions, and what they make, read of a VllmConfig; each adds its own."""
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
            )
            if config.num_spec_tokens
            else None,
            kv_events_config=None,
            kv_transfer_config=None,
            ec_transfer_config=None,
        )

    def scheduler_block_size(self, config: SchedulerConfig) -> int:
        """`block_size` as the scheduler takes it."""
        return config.block_size

    def make_scheduler(self, asynchronous: bool, **arguments: Any) -> Any:
        """The scheduler, of vLLM's own classes."""
        return (self.vllm.AsyncScheduler if asynchronous else self.vllm.Scheduler)(**arguments)

    def make_request(self, spec: RequestSpec, given: RequestInput) -> Any:
        vllm = self.vllm
        structured = vllm.sampling.StructuredOutputsParams(json_object=True) if spec.structured else None
        extra = {"kv_transfer_params": given.kv_transfer_params} if given.kv_transfer_params else None
        sampling_params = vllm.sampling.SamplingParams(
            max_tokens=given.max_tokens,
            min_tokens=given.min_tokens,
            _eos_token_id=given.eos_token_id,
            stop_token_ids=list(spec.stop_token_ids),
            skip_reading_prefix_cache=given.skip_reading_prefix_cache,
            structured_outputs=structured,
            extra_args=extra,
        )
        return self.request_class()(
            request_id=spec.request_id,
            prompt_token_ids=given.prompt_token_ids,
            sampling_params=sampling_params,
            pooling_params=None,
            client_index=spec.client_index,
            arrival_time=given.arrival_time,
            mm_features=[self._feature(image) for image in given.images],
            lora_request=vllm.LoRARequest(f"lora{spec.lora}", spec.lora, "-") if spec.lora else None,
            cache_salt=spec.cache_salt,
            priority=spec.priority,
            block_hasher=self._block_hasher,
            resumable=given.resumable,
        )

    def request_class(self) -> Any:
        return self.vllm.request.Request

    def _feature(self, image: ImageSpec) -> Any:
        is_embed = None if image.is_embed is None else torch.tensor(image.is_embed)
        position = self.vllm.inputs.PlaceholderRange(image.offset, image.length, is_embed)
        return self.vllm.inputs.MultiModalFeatureSpec(None, "image", image.identifier, position)

    def native_output(self, output: ModelRunnerOutput) -> Any:
        outputs = self.vllm.outputs
        connected = output.kv_connector_output
        return outputs.ModelRunnerOutput(
            req_ids=output.req_ids,
            req_id_to_index=output.req_id_to_index,
            sampled_token_ids=output.sampled_token_ids,
            kv_connector_output=connected
            and outputs.KVConnectorOutput(
                finished_sending=connected.finished_sending,
                finished_recving=connected.finished_recving,
                invalid_block_ids=connected.invalid_block_ids,
            ),
        )

    def native_drafts(self, drafts: DraftTokenIds) -> Any:
        return self.vllm.outputs.DraftTokenIds(drafts.req_ids, drafts.draft_token_ids)

    def prefix_cache_content(self) -> list[tuple[tuple[int, int], list[int]]]:
        cache = self.scheduler.kv_cache_manager.block_pool.cached_block_hash_to_block._cache
        return [
            (self.key_name(key), list(blocks) if isinstance(blocks, dict) else [blocks.block_id])
            for key, blocks in cache.items()
        ]

    def free_block_ids(self) -> list[int]:
        queue = self.scheduler.kv_cache_manager.block_pool.free_block_queue
        block, ids = queue.fake_free_list_head.next_free_block, []
        while block.next_free_block is not None:
            ids.append(block.block_id)
            block = block.next_free_block
        return ids

    def block_keys(self) -> list[bytes | None]:
        return [block.block_hash for block in self.scheduler.kv_cache_manager.block_pool.blocks]

    def key_name(self, key: Any) -> tuple[int, int]:
        return self.hash_name(key[:-4]), int.from_bytes(key[-4:], "big")

    def groups(self) -> list[Any]:
        return list(self.scheduler.kv_cache_manager.coordinator.single_type_managers)

    def state(self) -> dict[str, Any]:
        s = self.scheduler
        return {
            "pause_state": int(s.pause_state),
            "finished_req_ids_by_client": plain(s.finished_req_ids_dict or {}),
            "finished_recving_req_ids": sorted(s.finished_recving_kv_req_ids),
            "failed_recving_req_ids": sorted(s.failed_recving_kv_req_ids),
            "connector_prefix_cache_stats": plain(s.connector_prefix_cache_stats),
        }


def kv_cache_config(config: SchedulerConfig, interface: ModuleType) -> Any:
    """vLLM's KVCacheConfig for a configuration."""
    specs = {
        "full_attention": interface.FullAttentionSpec(
            block_size=config.block_size, num_kv_heads=1, head_size=1, dtype=torch.float32
        ),
        "mamba": interface.MambaSpec(
            block_size=config.mamba_block_size,
            shapes=((1,),),
            dtypes=(torch.float32,),
            mamba_cache_mode=config.mamba_cache_mode,
            num_speculative_blocks=config.num_speculative_blocks,
        ),
    }
    groups = [interface.KVCacheGroupSpec([str(i)], specs[kind]) for i, kind in enumerate(config.kv_groups)]
    return interface.KVCacheConfig(num_blocks=config.num_blocks, kv_cache_tensors=[], kv_cache_groups=groups)
