"""The step cost model: what it says of a step, against sums done by hand, and how it is stored."""

import json
import re
from dataclasses import fields
from pathlib import Path
from random import Random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ascend_twin.reference.errors import InvalidArgumentError
from ascend_twin.scheduler.cost import PARAMETERS, CostModel, RankWork, load_cost

MODEL = CostModel(
    step_ms=10.0,
    prefill_step_ms=5.0,
    prefill_us_per_token=100.0,
    prefill_ns_per_pair=50.0,
    expert_us_per_token=200.0,
    decode_us_per_request=300.0,
    decode_ns_per_context_token=40.0,
    source="a test",
)
PREFILL = RankWork(prefill_tokens=100, prefill_pairs=5_050)  # 10 ms + 0.2525 ms
DECODE = RankWork(decode_requests=20, context_tokens=30_000)  # 6 ms + 1.2 ms
MUCH_DECODE = RankWork(decode_requests=60, context_tokens=60_000)  # 18 ms + 2.4 ms
BOTH = RankWork(100, 5_050, 20, 30_000)
IDLE = RankWork()

counts = st.integers(0, 10**6)
works = st.builds(RankWork, counts, counts, counts, counts)
groups = st.lists(works, min_size=1, max_size=8)
models = st.lists(st.integers(0, 1000), min_size=len(PARAMETERS), max_size=len(PARAMETERS)).map(
    lambda values: CostModel.from_json(dict(zip(PARAMETERS, values, strict=True)))
)


def test_step_waits_for_the_rank_that_prefills() -> None:
    cost = MODEL.step([PREFILL, DECODE])
    assert cost.fixed == 10
    assert cost.prefill_step == 5
    assert cost.experts == pytest.approx(200e-3 * (100 + 20) / 2)
    assert cost.slowest_prefill == pytest.approx(10.2525)
    assert cost.slowest_decode == 0
    assert cost.ranks == pytest.approx((10.2525, 7.2))
    assert cost.total == pytest.approx(10 + 5 + 12 + 10.2525)


def test_step_waits_for_the_rank_that_decodes_when_that_is_slower() -> None:
    cost = MODEL.step([PREFILL, MUCH_DECODE, IDLE])
    assert (cost.slowest_prefill, cost.slowest_decode) == (0, pytest.approx(20.4))
    assert cost.ranks == pytest.approx((10.2525, 20.4, 0))
    assert cost.total == pytest.approx(10 + 5 + 200e-3 * 160 / 3 + 20.4)


def test_step_adds_up_what_one_rank_does() -> None:
    cost = MODEL.step([BOTH, PREFILL])
    assert (cost.slowest_prefill, cost.slowest_decode) == (pytest.approx(10.2525), pytest.approx(7.2))


def test_step_has_no_prefill_part_when_all_decode() -> None:
    assert MODEL.step([DECODE, DECODE]).prefill_step == 0
    assert MODEL.step([DECODE, PREFILL]).prefill_step == 5


def test_step_of_idle_ranks_takes_what_any_step_takes() -> None:
    assert MODEL.step([IDLE] * 4) == (10, 10, 0, 0, 0, 0, (0, 0, 0, 0))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("step_ms", 1),
        ("prefill_step_ms", 1),
        ("prefill_us_per_token", 0.1),  # 100 tokens of the one rank
        ("prefill_ns_per_pair", 0.00505),
        ("expert_us_per_token", 0.07),  # (100 + 20 + 20 + 0) / 2 tokens
        ("decode_us_per_request", 0.02),
        ("decode_ns_per_context_token", 0.03),
    ],
)
def test_each_parameter_alone_has_its_effect_in_its_unit(name: str, expected: float) -> None:
    for value in (1.0, 3.0):
        only = CostModel.from_json({"step_ms": 0.0, name: value})
        assert only.step([BOTH, DECODE]).total == pytest.approx(value * expected)


@given(models, groups, st.data())
def test_step_takes_no_less_when_there_is_more_of_anything(
    model: CostModel, group: list[RankWork], data: st.DataObject
) -> None:
    rank = data.draw(st.integers(0, len(group) - 1))
    more = RankWork(*(a + b for a, b in zip(group[rank], data.draw(works), strict=True)))
    total = model.step(group).total
    assert model.step([*group[:rank], more, *group[rank + 1 :]]).total >= total * (1 - 1e-12)
    name = data.draw(st.sampled_from(sorted(PARAMETERS)))
    dearer = CostModel.from_json({**model.to_json(), name: getattr(model, name) + 1.0})
    assert dearer.step(group).total >= total * (1 - 1e-12)


@given(models, groups, st.randoms(use_true_random=False))
def test_permuting_ranks_permutes_their_times_and_nothing_else(
    model: CostModel, group: list[RankWork], random: Random
) -> None:
    order = list(range(len(group)))
    random.shuffle(order)
    cost, permuted = model.step(group), model.step([group[i] for i in order])
    assert permuted.ranks == tuple(cost.ranks[i] for i in order)
    assert permuted.total == pytest.approx(cost.total, rel=1e-12)


@given(models, groups)
def test_the_slowest_rank_never_waits_and_the_parts_are_the_total(
    model: CostModel, group: list[RankWork]
) -> None:
    cost = model.step(group)
    assert max(cost.ranks) == cost.slowest_prefill + cost.slowest_decode
    assert cost.total == pytest.approx(sum(cost[1:6]), rel=1e-12)


def test_step_is_refused_without_ranks() -> None:
    with pytest.raises(InvalidArgumentError, match="work is empty; allowed: one RankWork for each rank"):
        MODEL.step([])


@pytest.mark.parametrize("name", PARAMETERS)
@pytest.mark.parametrize("value", [-1, -1e-9, float("nan"), float("inf"), True, "1", None])
def test_a_bad_number_is_refused(name: str, value: object) -> None:
    values: dict[str, Any] = {"step_ms": 1.0, name: value}
    with pytest.raises(InvalidArgumentError) as caught:
        CostModel(**values)
    assert (
        str(caught.value)
        == f"{name} is {value!r}; allowed: a finite number >= 0, at most 1,000,000,000,000,000"
    )


def test_the_source_must_be_text() -> None:
    with pytest.raises(InvalidArgumentError, match="source is 3; allowed: a str"):
        CostModel.from_json({"step_ms": 1.0, "source": 3})


def test_parameters_are_the_fields_and_their_names_end_as_their_units() -> None:
    assert [*PARAMETERS, "source"] == [field.name for field in fields(CostModel)]
    for name, parameter in PARAMETERS.items():
        assert f"_{parameter.unit}" in name.partition("_per_")[0]


def test_json_gives_the_model_back(tmp_path: Path) -> None:
    path = tmp_path / "cost.json"
    path.write_text(json.dumps(MODEL.to_json()))
    assert load_cost(path) == MODEL
    assert CostModel.from_json({"step_ms": 3}) == CostModel(3)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "the file is not JSON: .*"),
        ("[" * 100_000, "the file is not JSON: .*"),
        ("[1]", r"the whole is \[1\]; allowed: a JSON object"),
        ("{}", "step_ms is missing"),
        ('{"step_ms": 1, "steps": 2}', "steps is unknown; allowed: step_ms, prefill_step_ms, .*, source"),
        (
            '{"step_ms": 1e300}',
            "step_ms is 1e.300; allowed: a finite number >= 0, at most 1,000,000,000,000,000",
        ),
        ('{"step_ms": NaN}', "step_ms is nan; allowed: a finite number >= 0, at most 1,000,000,000,000,000"),
        (
            '{"step_ms": "60"}',
            "step_ms is '60'; allowed: a finite number >= 0, at most 1,000,000,000,000,000",
        ),
        ('{"step_ms": 1, "expert_us_per_token": null}', "expert_us_per_token is None; allowed: a .*"),
    ],
)
def test_load_cost_names_the_file_and_what_does_not_fit(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "cost.json"
    path.write_text(text)
    with pytest.raises(InvalidArgumentError) as caught:
        load_cost(path)
    assert re.fullmatch(f"{re.escape(str(path))}: {said}", str(caught.value))


def test_load_cost_says_why_the_file_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgumentError, match=r"absent\.json: No such file or directory"):
        load_cost(tmp_path / "absent.json")
    binary = tmp_path / "binary.json"
    binary.write_bytes(b"\xff\xfe")
    with pytest.raises(InvalidArgumentError, match=r"binary\.json: the file is not JSON: .*decode"):
        load_cost(binary)
