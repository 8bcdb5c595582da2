"""The plain scheduler beside the real one of vLLM 0.17.0: nothing may differ, in any step, of anything.

Needs vLLM 0.17.0 (`tox run -e vllm017`). Skipped elsewhere; there test_scheduler_invariants.py still runs.
"""

from pathlib import Path

import pytest
from hypothesis import settings

from ascend_twin.equivalence_tests.paged_model import PagedModel
from ascend_twin.equivalence_tests.scheduler_comparison import SchedulerDifference
from ascend_twin.equivalence_tests.scheduler_engines import OurEngine
from ascend_twin.equivalence_tests.scheduler_machine import SchedulerMachine
from ascend_twin.equivalence_tests.scheduler_runs import (
    FEATURES_AT_WORK,
    NUM_DIFFERENTIAL_STEPS,
    CheckedEngine,
    run_at_random,
    run_mix,
)
from ascend_twin.equivalence_tests.vllm017 import VLLMEngine
from ascend_twin.scheduler import SchedulerConfig, UpstreamScheduler
from ascend_twin.scheduler.traces import read_trace
from ascend_twin.scheduler.workload import mix_from_trace

pytestmark = pytest.mark.vllm017

REAL_TRACE = Path(__file__).parents[1].parent / "shared" / "traces" / "mooncake_conversation.jsonl"


class BesideVLLM(SchedulerMachine):
    """Ours, checked, and vLLM's."""

    engines = (CheckedEngine, VLLMEngine)


TestBesideVLLM = BesideVLLM.TestCase
TestBesideVLLM.settings = settings(stateful_step_count=50)


def test_random_runs_show_no_difference_with_every_feature_at_work() -> None:
    num_steps = NUM_DIFFERENTIAL_STEPS[settings.get_current_profile_name()]
    summary = run_at_random(seed=1, num_steps=num_steps, engines=(CheckedEngine, VLLMEngine))
    assert not summary.failure, f"{summary.failure}\n{summary.scenario}"
    assert summary.steps >= num_steps
    assert [name for name in FEATURES_AT_WORK if not summary.features[name]] == []


@pytest.mark.parametrize("async_scheduling", [False, True], ids=["sync", "async"])
def test_a_recorded_trace_is_scheduled_alike_to_the_last_token(async_scheduling: bool) -> None:
    if not REAL_TRACE.exists():
        pytest.skip("the trace is not part of a checkout; random runs were compared")
    requests = read_trace(REAL_TRACE)[: 200 if async_scheduling else 2000]
    config = SchedulerConfig(num_blocks=12_000, block_size=128, max_model_len=2**17 + 2**12)
    driver = run_mix(
        mix_from_trace(requests), config, (OurEngine, VLLMEngine), async_scheduling=async_scheduling
    )
    assert driver.features["stop_max_tokens"] == len(requests)
    assert driver.features["prefix_hit"] > len(requests) / 2


def test_a_difference_is_found_and_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(UpstreamScheduler, "_choose_victim", lambda self: self.running.pop(0))
    summary = run_at_random(seed=1, num_steps=2_000, engines=(OurEngine, VLLMEngine))
    assert summary.failure.startswith(SchedulerDifference.__name__)
    assert "schedule()" in summary.failure
    assert PagedModel.__name__ not in summary.failure
