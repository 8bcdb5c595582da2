"""Policies: their truth tables, here as literals and in the docs, and what all of them must be."""

import copy
import itertools
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ascend_twin.equivalence_tests.balance_engines import BOUNDS
from ascend_twin.reference.errors import InvalidArgumentError
from ascend_twin.scheduler.admission import (
    POLICIES,
    AdmissionPolicy,
    AnyRankAtCap,
    AnyRankNearCap,
    Cadence,
    OpenGate,
    Patient,
    RankCounts,
    make_policy,
)

DOCS = Path(__file__).parents[1] / "docs/balance.md"
CAPS = range(1, 5)
DOCS_CAP = 4

# What a gate is for each number of requests on the fullest rank, 0 first: o is open, x is shut.
# Upstream compares with ==, so a rank over the cap, which no scheduler lets happen, does not count.
AT_CAP = {1: "oxo", 2: "ooxo", 3: "oooxo", 4: "ooooxo"}
NEAR_CAP = {2: "oxxx", 3: "ooxxx", 4: "oooxxx"}
# Steps since the first gather: with nobody saturated, and somebody decoding.
CADENCE = {1: "oooooooo", 2: "oxoxoxox", 3: "oxxoxxox", 4: "oxxxoxxx", 100: "oxxxxxxx"}


def rows(*running: int, **fields: int) -> list[RankCounts]:
    return [RankCounts(running=n, **fields) for n in running]


def runnings(cap: int) -> Iterator[tuple[int, ...]]:
    """Every possible gather of 1 to 3 ranks, as numbers of running requests, and one over the cap."""
    for dp_size in (1, 2, 3):
        yield from itertools.product(range(cap + 2), repeat=dp_size)


def smallest(name: str, cap: int) -> AdmissionPolicy | None:
    """The policy with its own parameters as they are, or None where it refuses the cap."""
    try:
        return make_policy(name, cap)
    except InvalidArgumentError:
        return None


def policies(caps: Sequence[int] = CAPS) -> list[AdmissionPolicy]:
    """Every policy that there is, for every cap that it takes."""
    made = [smallest(name, cap) for name in POLICIES for cap in caps]
    return [policy for policy in made if policy is not None]


def test_counts_of_an_empty_rank_are_zero() -> None:
    assert RankCounts() == (0, 0, 0, 0, 0, 0)


@pytest.mark.parametrize("cap", CAPS)
def test_open_gate_is_always_open(cap: int) -> None:
    policy = OpenGate(cap)
    assert all(policy(rows(*running)) is True for running in runnings(cap))


@pytest.mark.parametrize("cap", CAPS)
@pytest.mark.parametrize(
    ("kind", "table"), [(AnyRankAtCap, AT_CAP), (AnyRankNearCap, NEAR_CAP)], ids=["at_cap", "near_cap"]
)
def test_policy_of_counts_is_its_table(kind: type, table: dict[int, str], cap: int) -> None:
    if cap not in table:
        return
    policy = kind(cap)
    for running in runnings(cap):
        fullest = sorted(running)[-1]
        assert policy(rows(*running)) is {"o": True, "x": False}[table[cap][fullest]], running


def test_any_rank_at_cap_is_shut_by_a_rank_at_the_cap_and_by_no_other() -> None:
    policy = AnyRankAtCap(3)
    assert policy(rows(2, 2))
    assert not policy(rows(3, 0))
    assert not policy(rows(0, 3))
    assert not policy(rows(3, 3))
    assert policy(rows(4, 0))
    assert policy(rows(3, 4))  # the fullest is the one that is compared


def test_any_rank_near_cap_leaves_one_place_free() -> None:
    policy = AnyRankNearCap(3)
    assert policy(rows(1, 1))
    assert not policy(rows(2, 0))
    assert not policy(rows(0, 3))


def test_any_rank_near_cap_refuses_a_cap_at_which_nobody_could_be_admitted() -> None:
    allowed = ">= 2 with the policy any_rank_near_cap, which would never admit anybody"
    with pytest.raises(InvalidArgumentError, match=rf"^max_num_running_reqs is 1; allowed: {allowed}$"):
        AnyRankNearCap(1)
    with pytest.raises(InvalidArgumentError, match="never admit anybody"):
        make_policy("any_rank_near_cap", 1)


@pytest.mark.parametrize("interval", CADENCE)
def test_cadence_is_every_nth_step(interval: int) -> None:
    policy = Cadence(4, interval)
    answers = [policy(rows(4, 1, 0, step=step)) for step in range(8)]
    assert answers == [{"o": True, "x": False}[c] for c in CADENCE[interval]]


def test_cadence_is_suspended_while_some_rank_is_saturated() -> None:
    policy = Cadence(4, 3)
    for saturated in itertools.product((0, 1), repeat=3):
        gathered = [RankCounts(step=1, running=2, saturated=x) for x in saturated]
        assert policy(gathered) is (1 in saturated)


def test_cadence_is_suspended_while_nobody_decodes_anywhere() -> None:
    policy = Cadence(4, 3)
    for prefilling in itertools.product(range(3), repeat=2):
        gathered = [RankCounts(step=1, running=2, prefilling=n) for n in prefilling]
        assert policy(gathered) is (prefilling == (2, 2))
    assert policy(rows(0, 0, step=1))
    assert not policy(rows(0, 1, step=1))


def test_cadence_reads_the_step_from_the_gather() -> None:
    policy = Cadence(4, 2)
    assert [policy(rows(1, step=step)) for step in (1, 2, 1, 0, 1)] == [False, True, False, True, False]


@pytest.mark.parametrize(
    ("full", "free", "open_"),
    [
        # (waiting), (running, waiting, waited): one slot, and one who waits for it.
        (0, (3, 1, 3), False),
        (0, (3, 1, 4), True),
        # Two slots: they cost twice as much.
        (0, (2, 2, 1), False),
        (0, (2, 2, 2), True),
        (0, (2, 1, 3), False),  # and one who waits takes but one
        # Two more wait without a slot, on the free rank, on the full one, or one on each.
        (0, (3, 3, 7), False),
        (0, (3, 3, 8), True),
        (2, (3, 1, 7), False),
        (2, (3, 1, 8), True),
        (1, (3, 2, 8), True),
        (1, (3, 2, 7), False),
        # Of three more each costs more than of two.
        (3, (3, 1, 12), False),
        (3, (3, 1, 13), True),
        # Nobody could be admitted.
        (9, (4, 9, 99), False),
        (9, (0, 0, 0), False),
        # Long enough, whatever it costs.
        (90, (3, 1, 99), False),
        (90, (3, 1, 100), True),
        (90, (4, 1, 100), False),
    ],
)
def test_patient_waits_until_it_costs_too_much(full: int, free: tuple[int, int, int], open_: bool) -> None:
    policy = Patient(4, patience=2, most_steps=100)
    running, waiting, waited = free
    ranks = [
        RankCounts(running=4, waiting=full, waited=500 if full else 0),
        RankCounts(running=running, waiting=waiting, waited=waited),
    ]
    assert policy(ranks) is open_
    assert policy(ranks[::-1]) is open_
    assert policy([ranks[1]]) is (running < 4)  # no rank is at the cap
    assert policy([*ranks, RankCounts(running=1, prefilling=1)])


@pytest.mark.parametrize(("num_ranks", "least"), [(4, 3), (6, 5), (8, 6), (16, 12)])
def test_patient_is_content_when_three_quarters_of_the_ranks_can_admit(num_ranks: int, least: int) -> None:
    policy = Patient(4, patience=100)
    full, able, free = RankCounts(running=4), RankCounts(running=3, waiting=1), RankCounts(running=3)
    for count in range(num_ranks):
        others = [full] * (num_ranks - count - 1) if count % 2 else [free] * (num_ranks - count - 1)
        assert policy([full, *[able] * count, *others]) is (count >= least)
    for excess in range(2 * num_ranks - 3, 2 * num_ranks + 3):
        blocked = RankCounts(running=4, waiting=excess)
        assert policy([blocked, *[able] * (num_ranks - 1)]) is (excess <= 2 * num_ranks)


# What every policy must be


@st.composite
def gathers(draw: st.DrawFn, cap: int, least_ranks: int = 1) -> list[RankCounts]:
    """Counts that ranks could contribute."""
    step = draw(st.integers(0, 9))
    gathered = []
    for _ in range(draw(st.integers(least_ranks, 4))):
        running, waiting = draw(st.integers(0, cap)), draw(st.integers(0, 3))
        gathered.append(
            RankCounts(
                step=step,
                running=running,
                waiting=waiting,
                prefilling=draw(st.integers(0, running)),
                waited=draw(st.integers(0, 5)) if waiting else 0,
                saturated=draw(st.integers(0, 1)) if waiting else 0,
            )
        )
    return gathered


each_policy = pytest.mark.parametrize("policy", policies(), ids=repr)


@each_policy
@given(data=st.data())
def test_policy_has_no_memory(policy: Any, data: st.DataObject) -> None:
    asked = data.draw(st.lists(gathers(policy.max_num_running_reqs), min_size=1, max_size=4))
    fresh = [copy.copy(policy)(gathered) for gathered in asked]
    assert [policy(gathered) for gathered in asked] == fresh
    assert [policy(gathered) for gathered in reversed(asked)] == fresh[::-1]
    assert all(type(answer) is bool for answer in fresh)


@each_policy
@given(data=st.data())
def test_policy_does_not_mind_the_order_of_ranks_nor_the_kind_of_sequence(
    policy: Any, data: st.DataObject
) -> None:
    gathered = data.draw(gathers(policy.max_num_running_reqs))
    answer = policy(gathered)
    assert policy(data.draw(st.permutations(gathered))) is answer
    assert policy(tuple(gathered)) is answer
    before = list(gathered)
    policy(gathered)
    assert gathered == before


@each_policy
def test_policy_is_open_when_all_ranks_are_empty(policy: Any) -> None:
    """At the start, and whenever nobody runs: or else nobody ever would."""
    for dp_size, step, waited in itertools.product((1, 2, 3), range(12), (0, 5)):
        empty = [RankCounts(step=step)] * (dp_size - 1)
        assert policy([*empty, RankCounts(step=step)])
        assert policy([*empty, RankCounts(step=step, waiting=1, waited=waited)])


@each_policy
def test_policy_is_a_value(policy: Any) -> None:
    twin = type(policy)(**vars(policy))
    assert twin == policy
    assert hash(twin) == hash(policy)
    assert twin != type(policy)(**{**vars(policy), "max_num_running_reqs": 99})
    with pytest.raises(AttributeError, match="max_num_running_reqs"):
        policy.max_num_running_reqs = 2


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("cap", [0, -1, 1.0, True, None, "2"])
def test_policy_refuses_a_cap_that_is_none(name: str, cap: Any) -> None:
    with pytest.raises(InvalidArgumentError, match=r"^max_num_running_reqs is .*allowed: an int >= 1"):
        POLICIES[name](max_num_running_reqs=cap)


@pytest.mark.parametrize("interval", [0, -1, 2.0, True, None])
def test_cadence_refuses_an_interval_that_is_none(interval: Any) -> None:
    with pytest.raises(InvalidArgumentError, match=r"^interval is .*allowed: an int >= 1"):
        Cadence(4, interval)


@pytest.mark.parametrize("name", ["patience", "most_steps"])
@pytest.mark.parametrize("value", [0, 1.5, False])
def test_patient_refuses_what_is_no_number_of_steps(name: str, value: Any) -> None:
    with pytest.raises(InvalidArgumentError, match=rf"^{name} is {value}; allowed: an int >= 1"):
        Patient(4, **{name: value})


def test_every_policy_has_a_bound() -> None:
    assert set(BOUNDS) == set(POLICIES)


# Their text form


@pytest.mark.parametrize(
    ("spec", "policy"),
    [
        ("open_gate", OpenGate(4)),
        ("any_rank_at_cap", AnyRankAtCap(4)),
        ("any_rank_at_cap:", AnyRankAtCap(4)),
        ("any_rank_near_cap", AnyRankNearCap(4)),
        ("cadence", Cadence(4, 2)),
        ("cadence:interval=7", Cadence(4, 7)),
        ("patient", Patient(4, 16, 2048)),
    ],
)
def test_make_policy_reads_a_text_form(spec: str, policy: AdmissionPolicy) -> None:
    assert make_policy(spec, 4) == policy


@pytest.mark.parametrize("name", POLICIES)
def test_make_policy_knows_every_name(name: str) -> None:
    assert type(make_policy(name, 4)) is POLICIES[name]


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        (None, "policy is None; allowed: a str"),
        ("", f"policy is ''; allowed: one of {', '.join(POLICIES)}"),
        ("balance", f"policy is 'balance'; allowed: one of {', '.join(POLICIES)}"),
        ("Cadence", f"policy is 'Cadence'; allowed: one of {', '.join(POLICIES)}"),
        ("open_gate:interval=2", "policy is 'open_gate:interval=2'; allowed: open_gate alone"),
        ("any_rank_at_cap:x", "policy is 'any_rank_at_cap:x'; allowed: any_rank_at_cap alone"),
        ("cadence:steps=2", "policy is 'cadence:steps=2'; allowed: cadence with interval, each once"),
        ("cadence:max_num_running_reqs=2", "allowed: cadence with interval, each once"),
        ("cadence:interval=2,interval=3", "allowed: cadence with interval, each once"),
        ("patient:steps=2", "allowed: patient with patience, most_steps, each once"),
        ("cadence:interval", "policy is 'cadence:interval'; allowed: an int for interval"),
        ("cadence:interval=2.5", "policy is 'cadence:interval=2.5'; allowed: an int for interval"),
        ("cadence:interval=0", "interval is 0; allowed: an int >= 1"),
    ],
)
def test_make_policy_says_what_is_allowed(spec: Any, said: str) -> None:
    with pytest.raises(InvalidArgumentError, match=re.escape(said)):
        make_policy(spec, 4)


def test_make_policy_refuses_a_cap_as_the_policy_does() -> None:
    with pytest.raises(InvalidArgumentError, match="max_num_running_reqs is 0"):
        make_policy("any_rank_at_cap", 0)


# The tables of the docs


class Table:
    """A truth table of the docs: the policy in the heading above it, and its rows."""

    def __init__(self, spec: str, header: Sequence[str], cells: Sequence[Sequence[str]]) -> None:
        self.spec = spec
        self.header = header
        self.cells = cells

    def cases(self) -> Iterator[tuple[list[RankCounts], str]]:
        """Every gather that a row speaks of, and what its last column says."""
        for row in self.cells:
            columns = [_numbers(cell) for cell in row[:-1]]
            dp_size = max(map(len, columns))
            for values in itertools.product(*(itertools.product(*column) for column in columns)):
                spread = [value if len(value) > 1 else value * dp_size for value in values]
                fields = dict(zip(self.header, spread, strict=False))
                yield (
                    [RankCounts(**{k: v[rank] for k, v in fields.items()}) for rank in range(dp_size)],
                    row[-1],
                )


def _numbers(cell: str) -> list[range]:
    """ "0-3, 4": of each rank, the numbers that are meant."""
    ends = [[int(x) for x in part.split("-")] for part in cell.split(",")]
    return [range(end[0], end[-1] + 1) for end in ends]


def docs_tables() -> list[Table]:
    """The table below each heading that is a policy."""
    found = []
    for section in re.split(r"^##+ ", DOCS.read_text(encoding="utf-8"), flags=re.MULTILINE):
        heading, *lines = section.splitlines()
        lines = [line.strip("| ").split(" | ") for line in lines if line.startswith("|")]
        if heading.startswith("`") and lines:
            header = [name.strip("`") for name in lines[0]]
            found.append(Table(heading.strip("`"), header[:-1], lines[2:]))
    return found


with_docs = pytest.mark.skipif(not DOCS.exists(), reason="the docs are in the repository alone")


@with_docs
def test_docs_have_a_truth_table_of_every_policy() -> None:
    assert [table.spec.partition(":")[0] for table in docs_tables()] == list(POLICIES)


@with_docs
def test_docs_say_of_every_gather_what_the_policy_does() -> None:
    for table in docs_tables():
        policy = make_policy(table.spec, DOCS_CAP)
        said = set()
        for gathered, gate in table.cases():
            assert gate == ("open" if policy(gathered) else "shut"), (table.spec, gathered)
            said.add(gate)
        assert said == ({"open"} if table.spec == "open_gate" else {"open", "shut"})


@with_docs
def test_docs_leave_out_no_number_of_running_requests() -> None:
    whole = set(itertools.product(range(DOCS_CAP + 1), repeat=2))
    for table in docs_tables():
        said = {tuple(counts.running for counts in gathered) for gathered, _ in table.cases()}
        if table.header == ["running"]:
            assert said == whole, table.spec
