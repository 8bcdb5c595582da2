"""Ranks in lockstep, in one process: outputs, collectives, dummies, waves, pauses, the bound on waiting."""

import os
import random
import re
from collections import Counter
from collections.abc import Iterator
from itertools import chain
from typing import Any

import pytest

from ascend_twin.equivalence_tests.balance_engines import BOUNDS
from ascend_twin.equivalence_tests.lockstep_engines import TinyEngine
from ascend_twin.equivalence_tests.lockstep_runs import (
    GroupRun,
    LockstepEngine,
    ProtocolError,
    check_logs,
    choose_group_setup,
    settle,
)
from ascend_twin.equivalence_tests.scheduler_strategies import RandomChooser, Setup, choose_request
from ascend_twin.reference.errors import InvalidArgumentError, LockstepError
from ascend_twin.scheduler.admission import POLICIES, RankCounts, make_policy
from ascend_twin.scheduler.balance import BalanceScheduler
from ascend_twin.scheduler.collectives import FORWARD, GATHER, HAS_UNFINISHED, Collective
from ascend_twin.scheduler.config import SchedulerConfig
from ascend_twin.scheduler.lifecycle import PauseState
from ascend_twin.scheduler.lockstep import Coordinator, Lockstep, Rank
from ascend_twin.scheduler.workload import RequestSpec

NUM_MIXES = {"dev": 1, "ci": 5, "nightly": 200}
PROFILE = os.environ.get("HYPOTHESIS_PROFILE") or ("ci" if os.environ.get("CI") else "dev")
SIZES = tuple(range(1, 9))
NUM_REQUESTS, LAST_ARRIVAL = 12, 24
INTERVALS = 1, 2, 5, 32


# Outputs


def run_mix(
    setup: Setup,
    requests: list[RequestSpec],
    policy: str,
    dp_size: int,
    chooser: RandomChooser,
) -> GroupRun:
    """All requests, each sent to some rank at some step; some ranks are paused for a while."""
    run = GroupRun(setup, policy, dp_size, finish_check_interval=chooser.choice(INTERVALS))
    arrivals = [chooser.integer(0, LAST_ARRIVAL) for _ in requests]
    for step in range(LAST_ARRIVAL + 1):
        for arrival, request in zip(arrivals, requests, strict=True):
            if arrival == step:
                run.add(chooser.integer(0, dp_size - 1), request)
        if chooser.chance(10):
            state = PauseState(chooser.integer(0, 2))
            run.group.set_pause_state(chooser.integer(0, dp_size - 1), state)
        run.group.step()
        assert len({engine.scheduler.is_open for engine in run.engines}) == 1, "ranks decide differently"
    run.drain()
    run.check()
    return run


@pytest.mark.parametrize("mode", ["sync", "async"])
def test_outputs_are_the_same_for_every_policy_size_and_routing(mode: str) -> None:
    """Each request says what the oracle expects of it alone, so all runs of a mix say the same."""
    features: Counter[str] = Counter()
    for seed in range(NUM_MIXES[PROFILE]):
        chooser = RandomChooser(random.Random(f"{mode}-{seed}"))
        setup = choose_group_setup(chooser, mode)
        requests = [choose_request(chooser, setup.config, (), f"r{i}") for i in range(NUM_REQUESTS)]
        said: dict[str, list[int]] = {}
        for policy in POLICIES:
            for dp_size in SIZES:
                run = run_mix(setup, requests, policy, dp_size, chooser)
                features.update(chain.from_iterable(e.driver.features.elements() for e in run.engines))
                said = said or run.said()
                assert run.said() == said
        assert len({len(output) for output in said.values()}) > 1, "all outputs are alike"
    if NUM_MIXES[PROFILE] > 1:
        assert {"preemption", "prefix_hit", "draft_accepted", "paused_new", "paused_all"} <= set(+features)


def test_outputs_are_a_prefix_of_the_expected_ones_when_clients_give_up() -> None:
    for seed in range(NUM_MIXES[PROFILE]):
        chooser = RandomChooser(random.Random(f"abort-{seed}"))
        setup = choose_group_setup(chooser)
        dp_size = chooser.integer(2, 4)
        run = GroupRun(setup, chooser.choice(tuple(POLICIES)), dp_size, finish_check_interval=3)
        for i in range(NUM_REQUESTS):
            request = choose_request(chooser, setup.config, (), f"r{i}")
            run.add(chooser.integer(0, dp_size - 1), request)
            if chooser.chance(40):
                run.abort(f"r{chooser.integer(0, i)}")
            for _ in range(chooser.integer(0, 3)):
                run.group.step()
        run.drain()
        run.check()
        for request_id, said in run.said().items():
            expected = run.oracle.expected[request_id][0]
            assert said == expected[: len(said)]
            assert request_id in run.aborted or said == expected


# Collectives, dummies and waves, with tiny engines


def tiny_group(
    dp_size: int, *, policy: str = "open_gate", cap: int = 4, interval: int = 4, max_model_len: int = 64
) -> tuple[Lockstep, list[TinyEngine]]:
    """A group in which nothing but the cap and the gate limits anybody."""
    config = SchedulerConfig(
        num_blocks=256, block_size=4, max_num_seqs=cap, max_num_batched_tokens=64, max_model_len=max_model_len
    )
    made = make_policy(policy, cap)
    engines = [
        TinyEngine(BalanceScheduler(config, policy=made, dp_rank=rank, dp_size=dp_size))
        for rank in range(dp_size)
    ]
    return Lockstep(engines, finish_check_interval=interval, log_size=None), engines


def names(group: Lockstep, rank: int = 0) -> list[str]:
    """Names of the collectives that a rank entered."""
    return [collective.name for collective in group.transport.logs[rank]]


def test_lockstep_enters_forward_then_reduction_then_gather() -> None:
    group, _ = tiny_group(3, interval=2)
    group.add_request(1, ("a", 3))
    assert settle(group) == 4  # three tokens, and a dummy until the reduction is due
    for rank in range(3):
        assert names(group, rank) == [FORWARD, GATHER, FORWARD, HAS_UNFINISHED, GATHER] * 2
    check_logs(group.transport.logs, 2)


@pytest.mark.parametrize("interval", INTERVALS)
def test_lockstep_reduces_at_multiples_of_the_interval_only(interval: int) -> None:
    group, _ = tiny_group(2, interval=interval)
    group.add_request(0, ("a", 10))
    num_steps = settle(group)
    assert num_steps == -(-10 // interval) * interval
    steps = [c.step for c in group.transport.logs[1] if c.name == HAS_UNFINISHED]
    assert steps == list(range(interval - 1, num_steps, interval))
    assert names(group).count(GATHER) == names(group).count(FORWARD) == num_steps


def test_lockstep_reduces_in_every_32nd_turn_and_keeps_1000_collectives_unless_told_otherwise() -> None:
    _, engines = tiny_group(2)
    group = Lockstep(engines)
    group.add_request(0, ("a", 3))
    assert settle(group) == 32
    assert [log.maxlen for log in group.transport.logs] == [1000, 1000]
    assert [log.maxlen for log in Lockstep(engines, log_size=5).transport.logs] == [5, 5]


def test_lockstep_costs_nothing_when_all_are_idle() -> None:
    group, engines = tiny_group(4)
    for _ in range(3):
        assert not group.step()
    group.add_request(2, ("a", 2))
    settle(group)
    logs = [list(log) for log in group.transport.logs]
    group.abort(2, ["a"])  # mail alone is no reason for a step
    for _ in range(3):
        assert not group.step()
    assert [list(log) for log in group.transport.logs] == logs
    assert engines[2].finished == ["a"]


def test_group_begins_at_rest() -> None:
    group, _ = tiny_group(2)
    assert group.num_steps == 0
    assert group.undelivered() == []
    for rank in group.ranks:
        assert (rank.current_wave, rank.num_steps, rank.num_dummy_steps) == (0, 0, 0)
        assert rank.is_in_wave is False
    assert group.coordinator.current_wave == 0
    assert group.coordinator.is_in_wave is False


def test_mail_is_under_way_between_those_who_send_and_read_it() -> None:
    group, engines = tiny_group(3, interval=1)
    group.add_request(1, ("a", 1))
    group.add_request(1, ("b", 1))
    assert group.undelivered() == [("client", 1), ("client", "coordinator")]
    assert [len(group.mail[between]) for between in group.undelivered()] == [2, 1]  # one wakes all
    group.abort(0, ["c"])
    group.set_pause_state(2, PauseState.PAUSED_NEW)
    assert group.undelivered() == [("client", 1), ("client", "coordinator"), ("client", 0), ("client", 2)]
    group.deliver("client", 1)
    assert [len(rank.inbox) for rank in group.ranks] == [0, 1, 0]
    assert not engines[1].scheduler.waiting  # it is read in the next turn
    group.deliver("client", "coordinator")
    of_coordinator: list[Any] = [("coordinator", rank) for rank in (0, 1, 2, "client")]
    assert group.undelivered() == [("client", 1), ("client", 0), ("client", 2), *of_coordinator]
    group.deliver_all()
    assert [len(rank.inbox) for rank in group.ranks] == [2, 3, 2]
    group.add_request(0, ("d", 1))
    assert group.undelivered() == [("client", 0)]  # the client knows that the wave runs
    group.step()
    assert [engine.finished for engine in engines] == [["d"], ["a", "b"], []]
    assert group.undelivered() == [(0, "coordinator")]  # the wave is over
    group.deliver_all()
    group.add_request(1, ("e", 1))
    assert group.undelivered() == [("client", 1), ("client", "coordinator")]


def test_client_that_gives_up_is_served_no_further() -> None:
    group, engines = tiny_group(2, interval=1)
    group.add_request(0, ("a", 50))
    group.add_request(0, ("b", 3))
    group.step()
    group.abort(0, ["a"])
    assert settle(group) == 2
    assert [engine.finished for engine in engines] == [["b"], []]
    assert not engines[0].scheduler.requests


def test_coordinator_tells_ranks_what_starts_and_the_client_that_and_what_is_over() -> None:
    told: list[Any] = []
    coordinator = Coordinator(told.append, lambda *wave: told.append(wave))
    for act, wave, expected in (
        (coordinator.first_request, 0, [0, (0, True)]),
        (coordinator.first_request, 0, []),
        (coordinator.start_wave, 0, []),
        (coordinator.wave_is_over, 0, [(1, False)]),
        (coordinator.wave_is_over, 0, []),
        (coordinator.start_wave, 0, []),
        (coordinator.first_request, 0, [1, (1, True)]),  # by a client that does not know yet
        (coordinator.start_wave, 3, [3, (3, True)]),
        (coordinator.wave_is_over, 5, [(6, False)]),
        (coordinator.start_wave, 6, [6, (6, True)]),
        (coordinator.wave_is_over, 6, [(7, False)]),
        (coordinator.first_request, 9, [9, (9, True)]),
    ):
        told.clear()
        act(wave)
        assert told == expected, (act.__name__, wave)
        if told:
            assert coordinator.current_wave == told[-1][0]
            assert coordinator.is_in_wave is told[-1][1]


def test_rank_tells_the_coordinator_of_a_wave_that_nobody_else_knows_of() -> None:
    _, (engine, _) = tiny_group(2)
    posted: list[tuple[str, int]] = []
    rank = Rank(engine, lambda *message: posted.append(message))
    rank.add_request(("a", 1), 0)
    assert (posted, rank.current_wave) == ([], 0)  # of the wave that comes: the client wakes the others
    rank.add_request(("b", 1), 4)
    assert (posted, rank.current_wave) == ([], 4)
    rank.add_request(("c", 1), 3)
    assert posted == [("start_wave", 4)]
    rank.start_wave(3)
    assert (rank.current_wave, rank.is_in_wave) == (4, False)
    rank.start_wave(4)
    assert (rank.current_wave, rank.is_in_wave) == (4, True)
    rank.add_request(("d", 1), 3)
    rank.set_pause_state(PauseState.PAUSED_NEW)
    rank.set_pause_state(PauseState.UNPAUSED)
    assert posted == [("start_wave", 4)]  # in the wave it needs no other
    rank.start_wave(6)
    assert (rank.current_wave, rank.is_in_wave) == (6, True)
    assert [request.request_id for request in engine.scheduler.waiting] == ["a", "b", "c", "d"]


def test_turn_enters_collectives_and_says_whether_it_was_active() -> None:
    _, (engine,) = tiny_group(1)
    rank = Rank(engine, lambda what, wave: None)

    def turn() -> tuple[list[str], bool]:
        running, entered, rows = rank.turn(), [], None
        try:
            while True:
                collective = running.send(rows)  # type: ignore[arg-type]
                entered.append(str(collective))
                rows = (collective.row,)
        except StopIteration as end:
            return entered, end.value

    assert turn() == ([], False)
    rank.add_request(("a", 2), 0)
    assert turn() == (["forward at step 0", "gather at step 0"], True)
    assert turn() == (["forward at step 1", "gather at step 1"], True)
    assert engine.finished == ["a"]


def test_rank_runs_dummy_batches_while_another_works() -> None:
    group, _ = tiny_group(3, interval=4)
    group.add_request(0, ("short", 2))
    group.add_request(2, ("long", 7))
    settle(group)
    assert group.num_steps == 8
    assert [rank.num_steps for rank in group.ranks] == [8, 8, 8]
    assert [rank.num_dummy_steps for rank in group.ranks] == [6, 8, 1]
    forwards = [[c.row[0] for c in log if c.name == FORWARD] for log in group.transport.logs]
    assert forwards == [[0] * 2 + [1] * 6, [1] * 8, [0] * 7 + [1]]


def test_lockstep_runs_wave_after_wave_with_late_arrivals() -> None:
    group, engines = tiny_group(3, interval=4)
    for wave in range(3):
        assert {rank.current_wave for rank in group.ranks} == {wave}
        group.add_request(wave, (f"first{wave}", 3))
        for _ in range(2):
            assert group.step()
        group.add_request((wave + 1) % 3, (f"late{wave}", 5))  # the wave would be over before it is served
        assert settle(group) + 2 == 8
        assert not any(rank.is_in_wave for rank in group.ranks)
    assert {rank.current_wave for rank in group.ranks} == {3}
    assert sorted(chain_finished(engines)) == sorted(
        f"{kind}{i}" for i in range(3) for kind in ("first", "late")
    )
    check_logs(group.transport.logs, 4)


def chain_finished(engines: list[TinyEngine]) -> Iterator[str]:
    """Requests that were served, on any rank."""
    return (request_id for engine in engines for request_id in engine.finished)


def test_lockstep_starts_the_next_wave_for_a_request_of_the_last() -> None:
    """The client learns only later that the wave is over; the rank that has the request says so."""
    group, engines = tiny_group(2, interval=1)
    group.add_request(0, ("a", 1))
    group.step()
    assert [rank.is_in_wave for rank in group.ranks] == [False, False]
    assert ("coordinator", "client") in group.undelivered() or (0, "coordinator") in group.undelivered()
    group.add_request(1, ("b", 1))
    settle(group)
    assert engines[1].finished == ["b"]
    assert {rank.current_wave for rank in group.ranks} == {2}


# Pauses


@pytest.mark.parametrize("state", [PauseState.PAUSED_NEW, PauseState.PAUSED_ALL])
@pytest.mark.parametrize("paused", [(0,), (1,), (0, 1, 2)])
@pytest.mark.parametrize("when", ["before", "after", "while"])
def test_paused_rank_holds_up_nobody_and_is_served_when_it_goes_on(
    state: PauseState, paused: tuple[int, ...], when: str
) -> None:
    """`when`: requests come before the pause, after it, or are half served as it begins."""
    group, engines = tiny_group(3, policy="any_rank_at_cap", cap=1, interval=3)
    others = [rank for rank in range(3) if rank not in paused]

    def add() -> None:
        for rank in range(3):
            group.add_request(rank, (f"a{rank}", 4))
            group.add_request(rank, (f"b{rank}", 2))

    def pause(to: PauseState) -> None:
        for rank in paused:
            group.set_pause_state(rank, to)

    if when != "after":
        add()
    if when == "while":
        for _ in range(2):
            group.step()
    pause(state)
    if when == "after":
        add()
    settle(group)
    for rank in others:
        assert engines[rank].finished == [f"a{rank}", f"b{rank}"]
    for rank in paused:
        runs_on = when == "while" and state == PauseState.PAUSED_NEW
        assert engines[rank].finished == ([f"a{rank}"] if runs_on else [])
    pause(PauseState.UNPAUSED)
    settle(group)
    for rank, engine in enumerate(engines):
        assert engine.finished == [f"a{rank}", f"b{rank}"]
    check_logs(group.transport.logs, 3)


def test_rank_paused_altogether_contributes_no_running_request() -> None:
    group, engines = tiny_group(2, policy="any_rank_at_cap", cap=1, interval=1)
    group.add_request(0, ("a", 9))
    group.step()
    group.add_request(1, ("b", 2))
    group.step()
    group.set_pause_state(0, PauseState.PAUSED_ALL)
    for _ in range(3):
        group.step()
    counts = gathered(group, 0)
    assert [c.running for c in counts[:5]] == [1, 1, 0, 0, 0]
    assert [c.waiting for c in gathered(group, 1)[:5]] == [0, 1, 1, 0, 0]
    settle(group)
    assert [engine.finished for engine in engines] == [[], ["b"]]
    assert len(engines[0].scheduler.running) == 1


def gathered(group: Lockstep, rank: int) -> list[RankCounts]:
    """What a rank contributed to each gather."""
    return [RankCounts(*c.row) for c in group.transport.logs[rank] if c.name == GATHER]


def test_all_ranks_go_idle_when_all_are_paused_with_requests() -> None:
    group, engines = tiny_group(2, interval=2)
    for rank in range(2):
        group.add_request(rank, (f"a{rank}", 9))
    group.step()
    for rank in range(2):
        group.set_pause_state(rank, PauseState.PAUSED_ALL)
    assert settle(group) <= 2
    assert not group.step()
    group.set_pause_state(1, PauseState.UNPAUSED)
    settle(group)
    assert [engine.finished for engine in engines] == [[], ["a1"]]


# The bound on waiting


@pytest.mark.parametrize("spec", [*POLICIES, "cadence:interval=5", "patient:patience=1,most_steps=3"])
def test_nobody_starves_longer_than_the_bound(spec: str) -> None:
    """From the gathers of a run: how long the gate stays shut, and how long a rank waits for an admission."""
    rng = random.Random(spec)
    longest_shut = longest_wait = 0
    for _ in range(20):
        dp_size, cap, most_tokens = rng.randint(1, 8), rng.randint(2, 4), rng.randint(2, 12)
        group, engines = tiny_group(dp_size, policy=spec, cap=cap, interval=rng.choice(INTERVALS))
        bound = BOUNDS[spec.partition(":")[0]](engines[0].scheduler.admission_policy, 1 + most_tokens)
        num_shut = num_sent = 0
        for _ in range(60):
            for _ in range(rng.choice((0, 0, 1, 3))):
                rank = min(rng.randint(0, dp_size - 1), rng.randint(0, dp_size - 1))
                group.add_request(rank, (f"r{num_sent}", rng.randint(1, most_tokens)))
                num_sent += 1
            group.step()
            num_shut = 0 if engines[0].scheduler.is_open else num_shut + 1
            longest_shut = max(longest_shut, num_shut)
            assert num_shut <= bound.shut
        settle(group)
        assert len(list(chain_finished(engines))) == num_sent
        waits = [c.waited for rank in range(dp_size) for c in gathered(group, rank)]
        longest_wait = max(longest_wait, *waits)
        assert max(waits) <= bound.wait
    assert longest_wait > 0
    assert longest_shut > 0 or spec == "open_gate"


# Errors


class FailingEngine(LockstepEngine):
    """Raises in its third step."""

    num_left = 3

    def step(self) -> bool:
        self.num_left -= 1
        if not self.num_left:
            raise RuntimeError("the model is out of memory")
        return super().step()


def test_lockstep_names_the_rank_whose_engine_raises() -> None:
    config = SchedulerConfig(num_blocks=64, block_size=4, max_num_seqs=2, max_model_len=32)
    kinds = LockstepEngine, FailingEngine, LockstepEngine
    engines = [kind(Setup(config), "open_gate", rank, 3) for rank, kind in enumerate(kinds)]
    group = Lockstep(engines)
    for rank in range(3):
        group.add_request(rank, RequestSpec(f"r{rank}", 0, ((rank, 5),), 8))
    group.step()
    group.step()
    with pytest.raises(
        LockstepError, match=r"^rank 1 failed at step 2: RuntimeError: the model is"
    ) as raised:
        group.step()
    assert isinstance(raised.value.__cause__, RuntimeError)
    for rank in range(3):  # nothing goes on as if nothing had been
        with pytest.raises(LockstepError, match=r"^rank 1 failed at step 2: RuntimeError: the model is"):
            group.advance(rank)


@pytest.mark.parametrize(
    ("places", "said"),
    [
        (((1, 2), (0, 2)), "engines[0] is rank 1 of 2; allowed: rank 0 of 2"),
        (((0, 3), (1, 3)), "engines[0] is rank 0 of 3; allowed: rank 0 of 2"),
        (((0, 2), (0, 2)), "engines[1] is rank 0 of 2; allowed: rank 1 of 2"),
        (((0, 2),), "engines[0] is rank 0 of 2; allowed: rank 0 of 1"),
    ],
)
def test_lockstep_refuses_engines_of_other_places(places: tuple[tuple[int, int], ...], said: str) -> None:
    config = SchedulerConfig(num_blocks=8, block_size=4, max_num_seqs=1, max_model_len=8)
    policy = make_policy("open_gate", 1)
    engines = [
        TinyEngine(BalanceScheduler(config, policy=policy, dp_rank=rank, dp_size=size))
        for rank, size in places
    ]
    with pytest.raises(InvalidArgumentError, match=f"^{re.escape(said)}$"):
        Lockstep(engines)


@pytest.mark.parametrize(
    ("cap", "policy", "said"),
    [
        (3, "any_rank_at_cap", "AnyRankAtCap.* and max_num_seqs 3; allowed: AnyRankAtCap.* and 2, as rank 0"),
        (2, "open_gate", "OpenGate.* and max_num_seqs 2; allowed: AnyRankAtCap.* and 2, as rank 0"),
    ],
)
def test_lockstep_refuses_ranks_that_would_decide_differently(cap: int, policy: str, said: str) -> None:
    engines = []
    for rank, (max_num_seqs, spec) in enumerate(((2, "any_rank_at_cap"), (cap, policy))):
        config = SchedulerConfig(num_blocks=8, block_size=4, max_num_seqs=max_num_seqs, max_model_len=8)
        made = make_policy(spec, max_num_seqs)
        engines.append(TinyEngine(BalanceScheduler(config, policy=made, dp_rank=rank, dp_size=2)))
    with pytest.raises(InvalidArgumentError, match=rf"^engines\[1\] is one with {said}"):
        Lockstep(engines)


def test_lockstep_refuses_no_engine_and_a_rank_that_is_none() -> None:
    with pytest.raises(InvalidArgumentError, match=r"^engines is \[\]; allowed: at least one$"):
        Lockstep([])
    group, _ = tiny_group(2)
    for rank in (-1, 2):
        with pytest.raises(InvalidArgumentError, match=f"^rank is {rank}; allowed: an int from 0 to 1$"):
            group.add_request(rank, ("a", 2))


@pytest.mark.parametrize("interval", [0, -1, 1.5, True])
def test_lockstep_refuses_an_interval_that_is_none(interval: object) -> None:
    config = SchedulerConfig(num_blocks=8, block_size=4, max_num_seqs=1, max_model_len=8)
    engine = TinyEngine(BalanceScheduler(config, policy=make_policy("open_gate", 1)))
    said = f"finish_check_interval is {interval}; allowed: an int >= 1"
    with pytest.raises(InvalidArgumentError, match=f"^{re.escape(said)}$"):
        Lockstep([engine], finish_check_interval=interval)  # type: ignore[arg-type]


def test_lockstep_says_who_waits_for_whom_though_the_one_that_waits_has_unread_mail() -> None:
    group, _ = tiny_group(2)
    group.add_request(0, ("a", 2))
    group.mail["client", "coordinator"].clear()  # nobody ever tells the coordinator
    group.deliver_all()
    group.advance(0)
    group.abort(0, ["a"])
    with pytest.raises(LockstepError, match=r"^rank 0 waits in forward at step 0, .*idle for ever: rank 1$"):
        group.step()


def test_lockstep_sees_no_stall_while_mail_may_wake_who_is_idle() -> None:
    group, _ = tiny_group(2)
    group.add_request(0, ("a", 2))
    group.deliver("client", 0)
    group.advance(0)
    group.refuse_stall()  # mail is under way
    group.deliver_all()
    assert group.undelivered() == []
    group.refuse_stall()  # it is in the inbox of rank 1
    group.ranks[1].inbox.clear()
    with pytest.raises(LockstepError, match=r"^rank 0 waits in forward at step 0, .*idle for ever: rank 1$"):
        group.refuse_stall()


# What check_logs refuses, so that it is known to look


def log_of(*entries: tuple[str, int, int]) -> list[Collective]:
    """(name, step, first number of the row)."""
    return [Collective(name, step, (number,)) for name, step, number in entries]


RIGHT = (
    (FORWARD, 0, 0),
    (GATHER, 0, 0),
    (FORWARD, 1, 0),
    (HAS_UNFINISHED, 1, 0),
    (GATHER, 1, 0),
    (FORWARD, 2, 0),
    (GATHER, 2, 0),
)


@pytest.mark.parametrize(
    "wrong",
    [
        pytest.param((RIGHT[1], RIGHT[0], *RIGHT[2:]), id="gather before forward"),
        pytest.param((*RIGHT[:3], RIGHT[4], RIGHT[3], *RIGHT[5:]), id="gather before the reduction"),
        pytest.param((*RIGHT[:3], RIGHT[4], *RIGHT[5:]), id="no reduction"),
        pytest.param((*RIGHT[:4], *RIGHT[5:]), id="no gather"),
        pytest.param((*RIGHT[:2], RIGHT[1], *RIGHT[2:]), id="two gathers"),
        pytest.param((RIGHT[0], RIGHT[3], *RIGHT[1:]), id="reduction too early"),
        pytest.param((*RIGHT[:6], (HAS_UNFINISHED, 2, 0), RIGHT[6]), id="the count of a wave is not reset"),
    ],
)
def test_check_logs_refuses_another_order(wrong: tuple[tuple[str, int, int], ...]) -> None:
    check_logs([log_of(*RIGHT), log_of(*RIGHT[:-1])], 2)
    with pytest.raises(ProtocolError, match="collectives from place"):
        check_logs([log_of(*wrong)] * 2, 2)
    with pytest.raises(ProtocolError, match=r"collective \d of rank \d"):
        check_logs([log_of(*RIGHT), log_of(*wrong)], 2)
