"""The steps formed from a workload: worked by hand, and against a scheduler that makes one step at a time."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ascend_twin.reference.errors import InvalidArgumentError
from ascend_twin.scheduler.prefill_steps import PrefillStep, prefill_steps
from ascend_twin.scheduler.traces import TraceRequest

STEP_MS = 10.0


def _request(arrival_ms: int, num_prompt_tokens: int, num_output_tokens: int) -> TraceRequest:
    return TraceRequest(arrival_ms, num_prompt_tokens, num_output_tokens, ())


def _one_at_a_time(requests: list[TraceRequest], budget: int, places: int) -> list[PrefillStep]:
    """The same rules, decode-only and idle steps included, as plainly as can be."""
    waiting = sorted(requests, key=lambda r: r.arrival_ms)
    running: list[dict[str, int]] = []
    steps, now = [], 0.0
    while waiting or running:
        if not running:
            now = max(now, float(waiting[0].arrival_ms))
        left, plan = budget, []
        for r in sorted(running, key=lambda r: r["prompt"] > 0):  # decodes first, stable
            tokens = min(left, r["prompt"] or 1)
            plan += [(r, tokens)] if tokens else []
            left -= tokens
        while left and waiting and waiting[0].arrival_ms <= now and len(running) < places:
            new = waiting.pop(0)
            running.append({"prompt": new.num_prompt_tokens, "done": 0, "output": new.num_output_tokens})
            plan.append((running[-1], min(left, new.num_prompt_tokens)))
            left -= plan[-1][1]
        decodes = [r for r, _ in plan if not r["prompt"]]
        if len(plan) > len(decodes):
            states = tuple(r["done"] > 0 for r, _ in plan)
            steps.append(PrefillStep(now, tuple(n for _, n in plan), len(decodes), states))
        for r, tokens in plan:
            r["done"] += tokens
            if r["prompt"]:
                r["prompt"] -= tokens
            if not r["prompt"]:
                r["output"] -= 1
        running = [r for r in running if r["prompt"] or r["output"] > 0]
        now += STEP_MS
    return steps


def test_prefill_steps_are_those_worked_out_by_hand() -> None:
    requests = [_request(5, 3, 2), _request(0, 10, 3), _request(0, 4, 1), _request(1000, 1, 0)]
    assert list(prefill_steps(requests, 8, 2, step_ms=STEP_MS)) == [
        PrefillStep(0, (8,), 0, (False,)),  # the prompt of 10 takes the whole budget
        PrefillStep(10, (2, 4), 0, (True, False)),  # it goes on, the one of 4 joins, both places are taken
        PrefillStep(20, (1, 3), 1, (True, False)),  # 4 has ended, 10 decodes, the one of 3 takes the place
        PrefillStep(1000, (1,), 0, (False,)),  # a step that only decodes is left out, idle time is skipped
    ]


@given(
    requests=st.lists(
        st.builds(_request, st.integers(0, 400), st.integers(1, 30), st.integers(0, 40)), max_size=8
    ),
    max_num_seqs=st.integers(1, 4),
    spare_tokens=st.integers(0, 12),
)
def test_prefill_steps_equal_a_scheduler_that_makes_every_step(
    requests: list[TraceRequest], max_num_seqs: int, spare_tokens: int
) -> None:
    budget = max_num_seqs + spare_tokens
    steps = list(prefill_steps(requests, budget, max_num_seqs, step_ms=STEP_MS))
    assert steps == _one_at_a_time(requests, budget, max_num_seqs)
    for step in steps:
        assert sum(step.seq_lens) <= budget
        assert step.num_decodes < len(step.seq_lens) <= max_num_seqs
        assert len(step.has_initial_state) == len(step.seq_lens)
        assert set(step.seq_lens[: step.num_decodes]) <= {1}
        assert all(step.has_initial_state[: step.num_decodes])
    prompt_tokens = sum(sum(s.seq_lens[s.num_decodes :]) for s in steps)
    assert prompt_tokens == sum(r.num_prompt_tokens for r in requests)
    assert sum(s.has_initial_state.count(False) for s in steps) == len(requests)


def test_prefill_steps_start_later_when_steps_last_longer() -> None:
    requests = [_request(0, 10, 1)]
    assert [s.start_ms for s in prefill_steps(requests, 4, 1, step_ms=7.5)] == [0, 7.5, 15]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_num_seqs": 0}, "max_num_seqs is 0; allowed: >= 1"),
        ({"max_num_batched_tokens": 3}, "max_num_batched_tokens is 3; allowed: >= max_num_seqs = 4"),
        ({"step_ms": 0.0}, "step_ms is 0.0; allowed: a finite number > 0"),
        ({"step_ms": float("nan")}, "step_ms is nan"),
    ],
)
def test_prefill_steps_refuse_at_once_when_a_number_does_not_fit(
    arguments: dict[str, float], message: str
) -> None:
    numbers: dict[str, float] = {"max_num_batched_tokens": 8, "max_num_seqs": 4, **arguments}
    with pytest.raises(InvalidArgumentError, match=message):
        prefill_steps([], **numbers)  # pyright: ignore[reportArgumentType]
