"""Bugs put into policies, gate and lockstep on purpose: each is found by the tests that are named beside it.

A copy of the suites runs on a copy of the code with the bug in it; the same tests pass on a copy without.
"""

import random
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest

from ascend_twin.equivalence_tests.source_mutants import mutated
from ascend_twin.reference.errors import AscendTwinError

MODULES = {
    name: f"ascend_twin.{package}.{name}"
    for package, names in {
        "scheduler": ("admission", "gathered_admission", "balance", "collectives", "lockstep"),
        "equivalence_tests": ("balance_engines", "lockstep_engines", "test_admission", "test_balance"),
    }.items()
    for name in names
}
"""What there are copies of, each after those that it imports."""

FINISH_CHECK_INTERVAL = 4

# What may be raised by a test that finds a bug; all else would be a bug of the mutant.
FOUND = (AssertionError, AscendTwinError, pytest.fail.Exception)

Suite = Callable[[SimpleNamespace], None]


def suite(module: str, *names: str, **given: Any) -> Suite:
    """Tests of a module, called with `given`."""

    def run(copies: SimpleNamespace) -> None:
        for name in names:
            getattr(getattr(copies, module), name)(**given)

    return run


# The suites


def policy_tables(copies: SimpleNamespace) -> None:
    """`test_policy_of_counts_is_its_table` and the others of test_admission.py that state a table."""
    tests, admission = copies.test_admission, copies.admission
    for cap in tests.CAPS:
        tests.test_open_gate_is_always_open(cap)
        tests.test_policy_of_counts_is_its_table(admission.AnyRankAtCap, tests.AT_CAP, cap)
        tests.test_policy_of_counts_is_its_table(admission.AnyRankNearCap, tests.NEAR_CAP, cap)
    for interval in tests.CADENCE:
        tests.test_cadence_is_every_nth_step(interval)


def patient(copies: SimpleNamespace) -> None:
    """`test_patient_waits_until_it_costs_too_much`."""
    test = copies.test_admission.test_patient_waits_until_it_costs_too_much
    for full, free, open_ in test.pytestmark[0].args[1]:
        test(full, free, open_)


def quorum(copies: SimpleNamespace) -> None:
    """`test_patient_is_content_when_three_quarters_of_the_ranks_can_admit`."""
    test = copies.test_admission.test_patient_is_content_when_three_quarters_of_the_ranks_can_admit
    for num_ranks, least in test.pytestmark[0].args[1]:
        test(num_ranks, least)


saturation = suite("test_admission", "test_cadence_is_suspended_while_some_rank_is_saturated")
decoding = suite("test_admission", "test_cadence_is_suspended_while_nobody_decodes_anywhere")
near_cap_of_one = suite(
    "test_admission", "test_any_rank_near_cap_refuses_a_cap_at_which_nobody_could_be_admitted"
)
text_form = suite(
    "test_admission",
    "test_make_policy_says_what_is_allowed",
    spec="cadence:interval=2,interval=3",
    said="each once",
)
at_cap_beside_frozen = suite(
    "test_balance",
    "test_frozen_step_equals_upstream_with_an_empty_waiting_queue",
    policy="any_rank_at_cap",
    scheduling=(),
)
async_beside_frozen = suite(
    "test_balance",
    "test_frozen_step_equals_upstream_with_an_empty_waiting_queue",
    policy="any_rank_at_cap",
    scheduling=("async",),
)
cadence_beside_frozen = suite(
    "test_balance",
    "test_frozen_step_equals_upstream_with_an_empty_waiting_queue",
    policy="cadence:interval=4",
    scheduling=(),
)
counts = suite(
    "test_balance",
    "test_counts_of_a_new_rank_are_zero",
    "test_counts_of_running_and_waiting_requests",
    "test_counts_are_of_the_end_of_the_step",
    "test_counts_of_a_prompt_that_is_computed_in_parts",
    "test_counts_of_a_paused_rank_hold_up_nobody",
    "test_sessions_without_input_do_not_wait_for_admission",
    "test_saturated_is_about_the_last_step_with_an_open_gate",
)
first_step = suite("test_balance", "test_scheduler_takes_a_policy_that_is_a_function")
observed_once = suite("test_balance", "test_a_gather_cannot_be_observed_without_or_before_counts")
nothing_repeated = suite(
    "test_balance", "test_balance_scheduler_overrides_nothing_but_its_beginning_and_the_step"
)


def bad_gather(bad: str) -> Suite:
    """`test_a_bad_gather_is_refused_and_changes_nothing`, for one of them."""
    return suite("test_balance", "test_a_bad_gather_is_refused_and_changes_nothing", bad=bad)


def another_cap(copies: SimpleNamespace) -> None:
    """`test_scheduler_refuses_a_policy_of_another_cap`."""
    for kind in copies.test_balance.KINDS.values():
        copies.test_balance.test_scheduler_refuses_a_policy_of_another_cap(kind)


def alike(copies: SimpleNamespace) -> None:
    """`test_all_ranks_decide_alike_from_the_same_gather`."""
    test = copies.test_balance.test_all_ranks_decide_alike_from_the_same_gather.hypothesis.inner_test
    for policy in copies.admission.POLICIES:
        for seed in range(5):
            test(policy=policy, kind=copies.balance.BalanceScheduler, seed=seed, dp_size=1 + seed)


def waiting(copies: SimpleNamespace) -> None:
    """`test_nobody_waits_longer_than_the_bound`."""
    test = copies.test_balance.test_nobody_waits_longer_than_the_bound.hypothesis.inner_test
    for policy in copies.admission.POLICIES:
        test(policy=policy, seed=0, dp_size=2)


def lockstep(copies: SimpleNamespace) -> None:
    """Ranks of a group enter the same collectives, one gather a step, of the counts of its end."""
    for seed in range(6):
        for policy in ("any_rank_at_cap", "cadence:interval=3"):
            drive_in_lockstep(copies, policy, dp_size=2 + seed % 3, seed=seed)


def drive_in_lockstep(copies: SimpleNamespace, policy: str, *, dp_size: int, seed: int) -> None:
    """Random arrivals, aborts and pauses, until nothing is left."""
    rng = random.Random(seed)
    config = copies.test_balance.CONFIG
    engines = [
        copies.lockstep_engines.TinyEngine(
            copies.balance.BalanceScheduler(
                config,
                policy=copies.admission.make_policy(policy, config.max_num_seqs),
                dp_rank=rank,
                dp_size=dp_size,
            )
        )
        for rank in range(dp_size)
    ]
    group = copies.lockstep.Lockstep(engines, finish_check_interval=FINISH_CHECK_INTERVAL, log_size=None)
    sent: list[str] = []
    while group.num_steps < 150 or any(engine.scheduler.requests for engine in engines):
        assert group.num_steps < 400, "requests are never served"
        rank = rng.randrange(dp_size)
        if group.num_steps < 150 and rng.random() < 0.3:
            for _ in range(rng.choice((1, 1, 5))):
                sent.append(f"r{len(sent)}")
                group.add_request(rank, (sent[-1], rng.randint(1, 12)))
        elif sent and rng.random() < 0.05:
            group.abort(rank, [rng.choice(sent)])
        elif rng.random() < 0.1:
            state = rng.randrange(3) if group.num_steps < 150 else 0
            group.set_pause_state(rank, copies.lockstep.PauseState(state))
        elif group.num_steps >= 150:
            for other in range(dp_size):
                group.set_pause_state(other, copies.lockstep.PauseState.UNPAUSED)
        if group.step():
            check_step(copies, group, policy)
        else:
            sent.append(f"r{len(sent)}")
            group.add_request(rank, (sent[-1], 1))
            group.step()
    while group.step():
        check_step(copies, group, policy)
    assert {len(log) for log in group.transport.logs} == {len(group.transport.logs[0])}


def check_step(copies: SimpleNamespace, group: Any, policy: str) -> None:
    """What was entered in the last step, by each rank in the same order, and what was made of it."""
    schedulers = [rank.engine.scheduler for rank in group.ranks]
    steps = [[c for c in log if c.step == group.num_steps - 1] for log in group.transport.logs]
    names = [[c.name for c in step] for step in steps]
    assert names[0] in (["forward", "gather"], ["forward", "has_unfinished", "gather"])
    assert all(other == names[0] for other in names)
    rows = [copies.admission.RankCounts(*step[-1].row) for step in steps]
    for scheduler, row in zip(schedulers, rows, strict=True):
        paused = scheduler.pause_state == copies.lockstep.PauseState.PAUSED_ALL
        assert row.running == (0 if paused else len(scheduler.running))
        assert scheduler.num_gathers == group.num_steps
    answer = copies.admission.make_policy(policy, copies.test_balance.CONFIG.max_num_seqs)(rows)
    assert [scheduler.is_open for scheduler in schedulers] == [answer] * len(schedulers)


class Mutant(NamedTuple):
    """A bug.

    Attributes:
        name: what is wrong.
        module: of scheduler/, where it is.
        old, new: what takes the place of what in its source, where `old` is found exactly once.
        suites: that find it, each of them.
    """

    name: str
    module: str
    old: str
    new: str
    suites: tuple[Suite, ...]


GATHER = """        rows = yield self._collective(GATHER, *self.engine.scheduler.counts())
        self.engine.scheduler.observe([RankCounts(*row) for row in rows])
"""
REDUCE = "        self.is_in_wave = yield from self._reduce(has_unfinished)\n"


def indented(text: str) -> str:
    return "".join(f"    {line}" for line in text.splitlines(keepends=True))


# fmt: off
MUTANTS = (
    # Policies.
    Mutant(
        "at_cap_is_at_least", "admission",
        "for counts in gathered) != self.max_num_running_reqs",
        "for counts in gathered) < self.max_num_running_reqs",
        (policy_tables,),
    ),
    Mutant(
        "at_cap_is_near_cap", "admission",
        "for counts in gathered) != self.max_num_running_reqs",
        "for counts in gathered) < self.max_num_running_reqs - 1",
        (policy_tables,),
    ),
    Mutant(
        "at_cap_of_the_emptiest", "admission",
        "return max(counts.running for counts in gathered) !=",
        "return min(counts.running for counts in gathered) !=",
        (policy_tables,),
    ),
    Mutant(
        "near_cap_is_at_cap", "admission",
        "< self.max_num_running_reqs - 1", "< self.max_num_running_reqs", (policy_tables,),
    ),
    Mutant(
        "near_cap_of_the_emptiest", "admission",
        "return max(counts.running for counts in gathered) <",
        "return min(counts.running for counts in gathered) <",
        (policy_tables,),
    ),
    Mutant(
        "near_cap_takes_a_cap_of_one", "admission",
        "if self.max_num_running_reqs == 1:", "if False:", (near_cap_of_one,),
    ),
    Mutant(
        "cadence_counts_from_one", "admission",
        "gathered[0].step % self.interval == 0", "gathered[0].step % self.interval == 1", (policy_tables,),
    ),
    Mutant(
        "cadence_opens_when_somebody_decodes_nothing", "admission",
        "or all(counts.running == counts.prefilling",
        "or any(counts.running == counts.prefilling",
        (policy_tables, decoding),
    ),
    Mutant(
        "cadence_wants_all_ranks_saturated", "admission",
        "or any(counts.saturated", "or all(counts.saturated", (saturation,),
    ),
    Mutant(
        "cadence_without_its_guard", "admission",
        "            or any(counts.saturated for counts in gathered)\n", "", (saturation,),
    ),
    Mutant(
        "patient_also_without_a_full_rank", "admission",
        "        if max(counts.running for counts in gathered) < cap:\n            return True\n", "",
        (patient,),
    ),
    Mutant(
        "patient_while_somebody_prefills", "admission",
        "        if any(counts.prefilling for counts in gathered):\n            return True\n", "",
        (patient,),
    ),
    Mutant(
        "patient_for_those_without_a_slot", "admission",
        "(min(c.waiting, cap - c.running), c.waited)", "(c.waiting, c.waited)", (patient,),
    ),
    Mutant(
        "patient_does_not_mind_the_excess", "admission",
        "* len(gathered) + excess**2", "* len(gathered)", (patient,),
    ),
    Mutant(
        "patience_of_one_rank_for_all", "admission",
        "self.patience * len(gathered)", "self.patience", (patient,),
    ),
    Mutant("patient_with_fewer_ranks", "admission", "QUORUM = 0.75", "QUORUM = 0.6", (quorum,)),
    Mutant("patient_with_a_long_queue", "admission", "MOST_EXCESS = 2", "MOST_EXCESS = 3", (quorum,)),
    Mutant(
        "patient_for_ever", "admission",
        "requests and waited >= self.most_steps for", "False for", (patient,),
    ),
    Mutant(
        "unknown_parameters_are_taken", "admission",
        "if key not in known or key in parameters:", "if False:", (text_form,),
    ),
    # What a rank contributes.
    Mutant(
        "counts_from_the_step_before_last", "gathered_admission",
        "        return self._sent\n",
        "        self._kept, self._sent = self._sent, getattr(self, '_kept', self._sent)\n"
        "        self._sent = self._sent._replace(step=self.num_gathers)\n"
        "        return self._sent\n",
        (counts, at_cap_beside_frozen, lockstep),
    ),
    Mutant(
        "steps_are_not_counted", "gathered_admission",
        "step=self.num_gathers,", "step=0,", (counts, alike),
    ),
    Mutant(
        "paused_rank_counts", "gathered_admission",
        "running = () if is_paused else self.running", "running = self.running",
        (counts, at_cap_beside_frozen),
    ),
    Mutant(
        "rank_paused_for_new_requests_does_not_count", "gathered_admission",
        "self.pause_state == PauseState.PAUSED_ALL", "self.pause_state != PauseState.UNPAUSED",
        (counts, at_cap_beside_frozen),
    ),
    Mutant(
        "paused_rank_waits", "gathered_admission",
        "        if self.pause_state != PauseState.UNPAUSED:\n            return 0\n", "",
        (counts, at_cap_beside_frozen),
    ),
    Mutant(
        "sessions_without_input_wait", "gathered_admission",
        "return len(self.waiting) - self.num_waiting_for_streaming_input", "return len(self.waiting)",
        (counts, at_cap_beside_frozen),
    ),
    Mutant(
        "nobody_prefills", "gathered_admission",
        "prefilling=sum(request.is_prefill_chunk for request in running)", "prefilling=0",
        (counts, at_cap_beside_frozen, cadence_beside_frozen),
    ),
    Mutant(
        "waited_never_starts_anew", "gathered_admission",
        "self._waited = self._waited + 1 if is_waiting and not is_admitting else 0",
        "self._waited = self._waited + 1",
        (counts, at_cap_beside_frozen),
    ),
    Mutant(
        "waited_though_somebody_was_admitted", "gathered_admission",
        "if is_waiting and not is_admitting else 0", "if is_waiting else 0",
        (counts, at_cap_beside_frozen),
    ),
    Mutant(
        "resumed_are_not_admitted", "gathered_admission",
        "output.scheduled_new_reqs or output.scheduled_cached_reqs.resumed_req_ids",
        "output.scheduled_new_reqs",
        (at_cap_beside_frozen,),
    ),
    Mutant(
        "waited_is_told_without_anybody_waiting", "gathered_admission",
        "waited=self._waited if waiting else 0,", "waited=self._waited,", (at_cap_beside_frozen,),
    ),
    Mutant(
        "never_saturated", "gathered_admission",
        "self._is_saturated = is_waiting", "self._is_saturated = False",
        (counts, at_cap_beside_frozen, cadence_beside_frozen),
    ),
    Mutant(
        "saturated_by_a_frozen_step", "gathered_admission",
        "        if self.is_open:\n            self._is_saturated",
        "        if True:\n            self._is_saturated",
        (counts, at_cap_beside_frozen, cadence_beside_frozen),
    ),
    Mutant(
        "open_steps_count_as_frozen", "gathered_admission",
        "        elif is_waiting:\n            self.num_frozen_steps",
        "        if is_waiting:\n            self.num_frozen_steps",
        (counts,),
    ),
    # What it makes of a gather.
    Mutant(
        "gate_knows_no_policy", "gathered_admission",
        "self.is_open = self.admission_policy(gathered)", "self.is_open = True",
        (at_cap_beside_frozen, cadence_beside_frozen, alike, lockstep),
    ),
    Mutant(
        "gate_is_not_asked", "balance",
        "admission_gate=lambda: self.is_open", "admission_gate=lambda: True",
        (at_cap_beside_frozen, counts, first_step),
    ),
    Mutant(
        "gate_is_open_in_the_first_step", "gathered_admission",
        "self.is_open = policy((RankCounts(),) * dp_size)", "self.is_open = True", (first_step,),
    ),
    Mutant(
        "gate_never_opens_again", "gathered_admission",
        "self.admission_policy(gathered)", "self.is_open and self.admission_policy(gathered)",
        (at_cap_beside_frozen, waiting, lockstep),
    ),
    Mutant(
        "gate_by_the_gather_before", "gathered_admission",
        "self.admission_policy(gathered)",
        "self.admission_policy(getattr(self, '_before', gathered))\n        self._before = gathered",
        (at_cap_beside_frozen, alike, lockstep),
    ),
    Mutant(
        "gate_by_its_own_counts", "gathered_admission",
        "self.admission_policy(gathered)", "self.admission_policy([gathered[self.dp_rank]])",
        (at_cap_beside_frozen, alike, lockstep),
    ),
    Mutant(
        "gate_leaves_out_the_last_rank", "gathered_admission",
        "self.admission_policy(gathered)", "self.admission_policy(gathered[:-1] or gathered)",
        (at_cap_beside_frozen, alike, lockstep),
    ),
    Mutant(
        "one_rank_reads_its_own_count_twice", "gathered_admission",
        "self.admission_policy(gathered)",
        "self.admission_policy([gathered[self.dp_rank], *gathered[1:]])",
        (at_cap_beside_frozen, alike, lockstep),
    ),
    Mutant(
        "frozen_step_stops_those_who_run", "balance",
        "        output = super().schedule()\n",
        "        running, self.running = self.running, self.running if self.is_open else []\n"
        "        output = super().schedule()\n"
        "        self.running = self.running if self.is_open else running\n",
        (at_cap_beside_frozen, async_beside_frozen, lockstep),
    ),
    Mutant(
        "frozen_step_forgets_who_waits", "balance",
        "        output = super().schedule()\n",
        "        self.waiting = self.waiting if self.is_open else type(self.waiting)()\n"
        "        output = super().schedule()\n",
        (at_cap_beside_frozen, async_beside_frozen),
    ),
    Mutant(
        "async_is_sync", "balance",
        "class AsyncBalanceScheduler(BalanceScheduler, AsyncUpstreamScheduler)",
        "class AsyncBalanceScheduler(BalanceScheduler)",
        (nothing_repeated,),
    ),
    # What it refuses.
    Mutant(
        "policy_of_another_cap", "gathered_admission", "if made_for != cap:", "if False:", (another_cap,)
    ),
    Mutant(
        "any_number_of_rows", "gathered_admission",
        "if len(gathered) != self.dp_size:", "if False:",
        (bad_gather("one row too few"), bad_gather("one row too many")),
    ),
    Mutant(
        "own_row_is_not_looked_at", "gathered_admission",
        "if gathered[self.dp_rank] != self._sent:", "if False:",
        (bad_gather("own row changed"), bad_gather("own row in another place")),
    ),
    Mutant(
        "stale_rows_are_taken", "gathered_admission",
        "if counts.step != self.num_gathers:", "if counts.step > self.num_gathers:",
        (bad_gather("stale"),),
    ),
    Mutant(
        "another_cap_is_taken", "gathered_admission",
        "if counts.running > self.admission_cap:", "if False:", (bad_gather("over the cap"),),
    ),
    Mutant(
        "observed_twice", "gathered_admission",
        "        self.num_gathers += 1\n        self._sent = None\n", "        self.num_gathers += 1\n",
        (observed_once,),
    ),
    Mutant(
        "checked_when_it_is_too_late", "gathered_admission",
        "        self._check(gathered)\n        self.is_open = self.admission_policy(gathered)\n",
        "        self.is_open = self.admission_policy(gathered)\n        self._check(gathered)\n",
        (bad_gather("over the cap"),),
    ),
    # Where the gather stands.
    Mutant(
        "gather_left_out_by_a_drained_rank", "lockstep",
        GATHER, f"        if has_unfinished:\n{indented(GATHER)}", (lockstep,),
    ),
    Mutant(
        "gather_left_out_after_a_dummy", "lockstep",
        GATHER, f"        if executed:\n{indented(GATHER)}", (lockstep,),
    ),
    Mutant(
        "gather_left_out_as_the_wave_ends", "lockstep",
        GATHER, f"        if self.is_in_wave:\n{indented(GATHER)}", (lockstep,),
    ),
    Mutant("gather_before_the_reduction", "lockstep", REDUCE + GATHER, GATHER + REDUCE, (lockstep,)),
    Mutant(
        "gather_inside_schedule", "lockstep",
        "        executed = self.engine.has_work() and self.engine.step()\n",
        f"        if self.engine.has_work():\n{indented(GATHER)}"
        "        executed = self.engine.has_work() and self.engine.step()\n",
        (lockstep,),
    ),
    Mutant(
        "gather_of_the_beginning_of_the_step", "lockstep",
        "        executed = self.engine.has_work() and self.engine.step()\n",
        "        counts = self.engine.scheduler.counts()\n"
        "        self.engine.scheduler.counts = lambda: counts\n"
        "        executed = self.engine.has_work() and self.engine.step()\n",
        (lockstep,),
    ),
    Mutant(
        "rank_reads_its_own_row_for_all", "lockstep",
        "self.engine.scheduler.observe([RankCounts(*row) for row in rows])",
        "self.engine.scheduler.observe([RankCounts(*rows[self.engine.scheduler.dp_rank]) for row in rows])",
        (lockstep,),
    ),
    Mutant(
        "drained_rank_goes_idle", "lockstep",
        "if not (executed or has_unfinished or self.is_in_wave):", "if not (executed or has_unfinished):",
        (lockstep,),
    ),
    Mutant(
        "reduction_in_every_turn_of_its_own", "lockstep",
        "        if self._step_in_wave % self.finish_check_interval:\n            return True\n",
        "        if not has_unfinished:\n            return True\n",
        (lockstep,),
    ),
)
# fmt: on

UNMUTATED = Mutant("unmutated", "", "", "", tuple(dict.fromkeys(s for m in MUTANTS for s in m.suites)))


def run_suite(mutant: Mutant, run: Suite) -> None:
    run(SimpleNamespace(**mutated(mutant, MODULES)))


def test_mutants_have_different_names() -> None:
    assert len({mutant.name for mutant in MUTANTS}) == len(MUTANTS)


def test_suites_pass_the_unmutated() -> None:
    copies = SimpleNamespace(**mutated(UNMUTATED, MODULES))
    for run in UNMUTATED.suites:
        run(copies)


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_each_suite_finds(mutant: Mutant) -> None:
    for run in mutant.suites:
        with pytest.raises(FOUND):
            run_suite(mutant, run)
