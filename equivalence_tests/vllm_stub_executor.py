# pyright: reportMissingImports=false
"""An executor for vLLM that has no worker and no weights, but a paged cache that can be read wrongly.

`--distributed-executor-backend ascend_twin.equivalence_tests.vllm_stub_executor.StubExecutor` serves any
model whose config.json vLLM accepts. Tokens are those of paged_model.py: what a request says depends on every
slot that is read through its block table, so wrong blocks, chunks or resumptions change it, and
`expected_output` there knows what is right.

Async scheduling needs a platform that allows it (vllm_stub_platform.py). vLLM 0.17.0 also refuses it together
with an executor class: there, put "mp" in the config and hand the class to the engine.
"""

import json
import os
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch
from vllm.v1.engine.core import EngineCore
from vllm.v1.executor.abstract import Executor
from vllm.v1.kv_cache_interface import FullAttentionSpec
from vllm.v1.outputs import EMPTY_MODEL_RUNNER_OUTPUT, ModelRunnerOutput

from ..scheduler.config import SchedulerConfig
from .paged_model import PagedModel, StandInError, Step
from .vllm_stub import REPORTS_VARIABLE

LAYER = "model.layers.0.self_attn.attn"


class StepFuture(Future[Any]):
    """A result that is not there before somebody waits for it, as that of a device."""

    def __init__(self, compute: Callable[[], Any]) -> None:
        super().__init__()
        self._compute = compute

    def result(self, timeout: float | None = None) -> Any:
        """Compute it, the first time."""
        if not self.done():
            self.set_result(self._compute())
        return super().result(timeout)


class StubExecutor(Executor):
    """See the module.

    Attributes:
        model: what stands for the model, once the cache is there.
        num_batches, num_dummies: forward passes so far, with requests and without.
        num_ahead: steps that were executed before the tokens of the last one were asked for.
        num_resumed, num_prefix_hits: requests so far that went on after a preemption, and that began with
            tokens found in the cache.
        admitted: ids of those that began or went on in what is to be executed.
        on_schedule: called once the scheduler has made its step, before anything is executed.
        on_forward: called in each forward pass, as a collective of a mixture of experts is.
    """

    supports_pp = False

    @classmethod
    def supports_async_scheduling(cls) -> bool:
        """It does."""
        return True

    @property
    def max_concurrent_batches(self) -> int:
        """Of vLLM 0.17.0; later versions ask the config."""
        return 2 if self.scheduler_config.async_scheduling else 1

    def _init_executor(self) -> None:
        self.model: PagedModel | None = None
        self.num_batches = self.num_dummies = self.num_resumed = self.num_prefix_hits = 0
        self.num_ahead = self._num_in_flight = 0
        self.admitted: list[str] = []
        self.on_schedule: Callable[[], None] = lambda: None
        self.on_forward: Callable[[], None] = lambda: None
        self._step: Step | None = None
        setattr(EngineCore, REPORT, report)  # clients call utilities of the engine by name

    # What the engine asks at the start.

    def get_kv_cache_specs(self) -> list[dict[str, Any]]:
        """One layer of full attention."""
        spec = FullAttentionSpec(
            block_size=self.cache_config.block_size, num_kv_heads=1, head_size=1, dtype=torch.float32
        )
        return [{LAYER: spec}]

    def determine_available_memory(self) -> list[int]:
        """Enough for any number of blocks."""
        return [1 << 30]

    def initialize_from_config(self, kv_cache_configs: list[Any]) -> None:
        """Make the cache."""
        config = SchedulerConfig(
            num_blocks=kv_cache_configs[0].num_blocks,
            block_size=self.cache_config.block_size,
            max_num_seqs=self.scheduler_config.max_num_seqs,
            max_num_batched_tokens=self.scheduler_config.max_num_batched_tokens,
            max_model_len=self.model_config.max_model_len,
        )
        self.model = PagedModel(config, asynchronous=bool(self.scheduler_config.async_scheduling))

    def get_supported_kv_cache_layouts(self) -> list[list[str]]:
        """vLLM's own preference."""
        return [["NHD", "HND"]]

    def collective_rpc(
        self,
        method: str | Callable[..., Any],
        timeout: float | None = None,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
        non_block: bool = False,
    ) -> Any:
        """There is no worker: nobody answers, but to the question what can be asked."""
        result = [("generate",)] if method == "get_supported_tasks" else []
        if not non_block:
            return result
        future: Future[Any] = Future()
        future.set_result(result)
        return future

    # The steps.

    def execute_model(self, scheduler_output: Any, non_block: bool = False) -> Any:
        """Make the forward pass; None, the tokens come with `sample_tokens`, unless there are none."""
        assert self.model is not None
        self._note(scheduler_output)
        self.on_schedule()
        step = self.model.execute(scheduler_output)
        output = None
        if scheduler_output.total_num_scheduled_tokens:
            self.num_batches += 1
            self._save()
            self.on_forward()
            self._step = step
        else:
            output = EMPTY_MODEL_RUNNER_OUTPUT
        if not non_block:
            return output
        future: Future[Any] = Future()
        future.set_result(output)
        return future

    def sample_tokens(self, grammar_output: Any, non_block: bool = False) -> Any:
        """The tokens of the newest forward pass."""
        assert self.model is not None
        model, step = self.model, self._step
        if step is None:
            raise StandInError("asked for the tokens of a forward pass that was not made")
        self._step = None
        model.sample(step, grammar_output)

        self._num_in_flight += 1

        def output() -> ModelRunnerOutput:
            self._num_in_flight -= 1
            ours = model.result(step)
            return ModelRunnerOutput(
                req_ids=ours.req_ids,
                req_id_to_index=ours.req_id_to_index,
                sampled_token_ids=ours.sampled_token_ids,
            )

        return StepFuture(output) if non_block else output()

    def execute_dummy_batch(self) -> None:
        """A forward pass without requests."""
        self.num_dummies += 1
        self.admitted = []
        self._save()
        self.on_forward()

    def _save(self) -> None:
        """Say how many steps were made, where that is wanted: nobody is told of the end in time."""
        if folder := os.environ.get(REPORTS_VARIABLE):
            steps = {"batches": self.num_batches, "dummies": self.num_dummies}
            name = f"rank{self.parallel_config.data_parallel_rank}.json"
            written = Path(folder) / f"{name}.new"
            written.write_text(json.dumps(steps))
            written.replace(Path(folder) / name)  # whoever reads it meanwhile reads all of it

    def _note(self, scheduler_output: Any) -> None:
        new = scheduler_output.scheduled_new_reqs
        resumed = scheduler_output.scheduled_cached_reqs.resumed_req_ids
        self.num_ahead += self._num_in_flight > 0
        self.admitted = [*(data.req_id for data in new), *resumed]
        self.num_resumed += len(resumed)
        self.num_prefix_hits += sum(data.num_computed_tokens > 0 for data in new)

    def check_health(self) -> None:
        """Nothing can be ill."""

    def shutdown(self) -> None:
        """Nothing to do."""


REPORT = "stand_in_report"


def report(engine: EngineCore) -> dict[str, Any]:
    """What a rank has done so far; a utility of each engine with the executor above."""
    scheduler, executor = engine.scheduler, engine.model_executor
    return {
        "batches": executor.num_batches,
        "dummies": executor.num_dummies,
        "gathers": getattr(scheduler, "num_gathers", None),
        "frozen": getattr(scheduler, "num_frozen_steps", None),
        "scheduler": type(scheduler).__name__,
        "unfinished": scheduler.has_unfinished_requests(),
        "running": getattr(engine, "engines_running", False),
        "wave": getattr(engine, "current_wave", None),
    }
