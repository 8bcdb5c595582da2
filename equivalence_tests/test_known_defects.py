"""Mistakes of vLLM v0.17.0, each by a case: ours and vLLM make it, and it breaks what it is said to break.

A case is a file of fixtures/cases/scheduler/. Its scenario is run, and then drained (`Run.drain`): whatever
anybody waits for comes, until nothing happens any more.
"""

import json
from collections import Counter
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import pytest

from ascend_twin.equivalence_tests import known_defects, scheduler_runs
from ascend_twin.equivalence_tests.known_defects import CRASH, CRASHES, DEFECTS, ORACLE, PROGRESS, STAND_IN
from ascend_twin.equivalence_tests.paged_model import StandInError
from ascend_twin.equivalence_tests.scheduler_engines import Engine, OurEngine
from ascend_twin.equivalence_tests.scheduler_invariants import INVARIANTS
from ascend_twin.equivalence_tests.scheduler_runs import CheckedEngine, Run, StallError, run_scenario
from ascend_twin.equivalence_tests.scheduler_scenarios import Scenario
from ascend_twin.equivalence_tests.vllm017 import VLLMEngine
from ascend_twin.scheduler.output import FinishReason
from ascend_twin.scheduler.request import RequestStatus

CASES = {
    file.name.removesuffix(".json"): json.loads(file.read_text(encoding="utf-8"))
    for file in sorted((resources.files("ascend_twin.fixtures") / "cases/scheduler").iterdir(), key=str)
}
MOST_STEPS = 16  # of an outcome; empty ones in the end are left out
DOCS = Path(__file__).parents[1] / "docs/scheduler.md"
# Those that are told by what they do to the scheduler, or by an error's message, have no cause that is noted.
CAUSES_NOTED = {defect.name for defect in DEFECTS} - {*CRASHES.values(), "waiting_requests_hold_blocks"}
COUNTED = (
    "num_tokens",
    "num_computed_tokens",
    "num_output_tokens",
    "num_output_placeholders",
    "num_external_computed_tokens",
    "num_cached_tokens",
)


class RecordedEngine(OurEngine):
    """Ours; keeps what it schedules and what clients are told."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.steps: list[dict[str, int]] = []
        self.num_drafts: list[int] = []
        self.images: list[dict[str, list[str]]] = []
        self.outputs: dict[str, list[dict[str, Any]]] = {}
        self.prefix_cache: Counter[str] = Counter()
        schedule = self.scheduler.schedule

        def recorded() -> Any:
            output = schedule()
            self.steps.append(dict(output.num_scheduled_tokens))
            self.num_drafts.append(sum(map(len, output.scheduled_spec_decode_tokens.values())))
            computed = [
                self.scheduler.requests[request_id].mm_features[i].identifier
                for request_id, indices in output.scheduled_encoder_inputs.items()
                for i in indices
            ]
            self.images.append({"computed": computed, "freed": list(output.free_encoder_mm_hashes)})
            return output

        self.scheduler.schedule = recorded

    def update_from_output(self, out: Any, output: Any) -> Any:
        told = super().update_from_output(out, output)
        for of_client in told.values():
            for one in of_client.outputs:
                self._record(one)
            stats = of_client.scheduler_stats
            if stats and stats.prefix_cache_stats:
                self.prefix_cache["requests"] += stats.prefix_cache_stats.requests
                self.prefix_cache["queries"] += stats.prefix_cache_stats.queries
        return told

    def _record(self, output: Any) -> None:
        turns = self.outputs.setdefault(output.request_id, [])
        if not turns or "finish_reason" in turns[-1]:
            turns.append({"token_ids": []})
        turns[-1]["token_ids"] += output.new_token_ids
        if output.finish_reason is not None:
            turns[-1]["finish_reason"] = FinishReason(output.finish_reason).name.lower()
            turns[-1]["stop_reason"] = output.stop_reason

    def counters(self) -> dict[str, Any]:
        """Everything of which a case may state a number."""
        s = self.scheduler
        found = {
            "num_unfinished_requests": s.get_num_unfinished_requests(),
            "num_waiting_for_streaming_input": s.num_waiting_for_streaming_input,
            "num_free_blocks": len(self.free_block_ids()),
            "num_drafts": list(self.num_drafts),
            "images": list(self.images),
            "encoder_cache": {k: sorted(v) for k, v in s.encoder_cache_manager.cached.items()},
            **{f"prefix_cache.{name}": count for name, count in self.prefix_cache.items()},
        }
        for request in s.requests.values():
            found[f"{request.request_id}.status"] = RequestStatus(request.status).name
            for name in COUNTED:
                found[f"{request.request_id}.{name}"] = getattr(request, name)
        return found


def observe(case: dict[str, Any], engines: Sequence[type[Engine]] = (RecordedEngine,)) -> dict[str, Any]:
    """What happens in a case, whether or not it is right, in the form of its "outcome", with all counters."""
    scenario = Scenario.from_json(case["scenario"])
    run = Run.of(scenario, engines)
    run.driver.oracle = None
    engine = run.driver.first
    assert isinstance(engine, RecordedEngine)
    crash, counters = None, None
    try:
        run.apply_all(scenario.events)
        counters = engine.counters()
        run.drain()
    except StallError:
        pass
    except StandInError as error:
        crash = f"StandInError: {error}"
    if run.driver.crash:
        crash = run.driver.crash.split("ours: ", 1)[1].split("; vllm: ")[0]
    outcome = {
        "steps": engine.steps[:MOST_STEPS],
        "outputs": engine.outputs,
        "counters": counters or engine.counters(),
    }
    if crash:
        return {**outcome, "crash": crash}
    left = [r.request_id for r in engine.scheduler.requests.values() if not r.is_finished]
    return {**outcome, "stuck": sorted(left)}


def verdict(case: dict[str, Any], *, excuses: bool) -> dict[str, Any]:
    """What a case breaks ("broken", or None), and the defects that were given as an excuse."""
    given: list[str] = []
    broken: list[str] = []

    def judge(scheduler: Any, name: str, message: str) -> str | None:
        broken.append(name)
        defect = known_defects.excuse(scheduler, name, message) if excuses else None
        given.extend([defect] if defect else [])
        return defect

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scheduler_runs, "excuse", judge)
        run = run_scenario(Scenario.from_json(case["scenario"]), (CheckedEngine,))
    return {
        "broken": broken[0] if broken else None,
        "excuses": given,
        "failure": run.failure,
        "noted": sorted(+run.driver.first.scheduler.defects),
    }


def recorded_part(case: dict[str, Any], found: dict[str, Any]) -> dict[str, Any]:
    """An observed outcome with those counters alone that the case states."""
    counters = {name: found["counters"].get(name) for name in case["outcome"]["counters"]}
    return {**found, "counters": counters}


def row(case: dict[str, Any]) -> str:
    """The row of a case in the table of docs/scheduler.md."""
    defect = f"`{case['defect']}`" if case["defect"] else "-"
    breaks = f"`{case['breaks']}`" if case["breaks"] else "-"
    return f"| {defect} | {case['what']} | {case['issue']} | {breaks} | `{case['name']}` |"


each_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())


@each_case
def test_case_has_the_recorded_outcome(case: dict[str, Any]) -> None:
    assert recorded_part(case, observe(case)) == case["outcome"]


@each_case
def test_case_breaks_what_it_says_and_nothing_excuses_it_but_its_defect(case: dict[str, Any]) -> None:
    strict, excused = verdict(case, excuses=False), verdict(case, excuses=True)
    assert strict["broken"] == case["breaks"]
    assert set(excused["excuses"]) == ({case["defect"]} if case["defect"] and case["breaks"] else set())
    assert bool(excused["failure"]) == (case["breaks"] is not None and case["defect"] is None)
    if case["defect"] in CAUSES_NOTED:
        assert case["defect"] in strict["noted"]


@each_case
@pytest.mark.vllm017
def test_vllm_does_the_same(case: dict[str, Any]) -> None:
    found = observe(case, (RecordedEngine, VLLMEngine))
    assert recorded_part(case, found) == case["outcome"]


def test_every_defect_has_a_case() -> None:
    assert {case["defect"] for case in CASES.values()} - {None} == {defect.name for defect in DEFECTS}


@each_case
def test_case_is_well_formed(case: dict[str, Any]) -> None:
    breakable = {None, ORACLE, PROGRESS, CRASH, STAND_IN, *(invariant.__name__ for invariant in INVARIANTS)}
    assert list(case) == ["name", "issue", "what", "defect", "breaks", "scenario", "outcome"]
    assert CASES[case["name"]] is case
    assert case["breaks"] in breakable
    assert case["issue"] == "none found" or "#" in case["issue"]
    assert case["what"].endswith(".")
    scenario = Scenario.from_json(case["scenario"])
    assert json.loads(json.dumps(scenario.to_json())) == case["scenario"]


@pytest.mark.skipif(not DOCS.exists(), reason="the docs are in the repository alone")
@each_case
def test_docs_list_the_case(case: dict[str, Any]) -> None:
    assert row(case) in DOCS.read_text(encoding="utf-8").splitlines()
