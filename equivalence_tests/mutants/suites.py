"""The suites that are run on a bug: the tests and properties of this package, over a few small cases each.

A suite is a function that is given `begin`, calls it before each case, and raises what a test raises. Most
are tests of this package as they are, with few examples of Hypothesis. All must pass on the code as it is,
which is checked in every run of the museum.
"""

import importlib
import inspect
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from types import SimpleNamespace
from typing import Any

from hypothesis import HealthCheck, Phase, Verbosity, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import run_state_machine_as_test

TESTS = (__package__ or "").rpartition(".")[0]
NUM_EXAMPLES = 8  # of each test that draws its cases; some draw a multiple

Begin = Callable[[str], None]
"""Called before each case, with the name of its test."""


@dataclass(frozen=True)
class Suite:
    """A suite.

    Attributes:
        what: it checks, in one line.
        run: runs it; raises at the first case that fails.
    """

    what: str
    run: Callable[[Begin], None]


def few_examples() -> None:
    """Have Hypothesis draw few examples, the same in each run. To be called before tests are imported."""
    settings.register_profile(
        "dev",  # tests look up by name how much else they do
        max_examples=NUM_EXAMPLES,
        stateful_step_count=20,
        derandomize=True,
        database=None,
        deadline=None,
        phases=[Phase.explicit, Phase.generate],
        report_multiple_bugs=False,
        print_blob=False,
        verbosity=Verbosity.quiet,
        suppress_health_check=list(HealthCheck),
    )
    settings.load_profile("dev")


# Tests as suites


def tests_of(module: str, *names: str, **only: Sequence[Any]) -> Callable[[Begin], None]:
    """Tests of a module as a suite, with all that they are parametrized with, or with some of it alone.

    Args:
        module: below `equivalence_tests`.
        names: of its tests.
        only: by argument, the values that are tried; a test without the argument is not concerned.
    """

    def run(begin: Begin) -> None:
        tests = _module(module)
        for name in names:
            test = getattr(tests, name)
            for arguments in _parametrizations(test):
                if all(arguments.get(k, v[0]) in v for k, v in only.items()):
                    _call(test, arguments, partial(begin, name))

    return run


def _module(name: str) -> Any:
    """A module of tests."""
    return importlib.import_module(f"{TESTS}.{name}")


def _parametrizations(test: Any) -> Iterator[dict[str, Any]]:
    """The arguments of each call that pytest would make."""
    marks = [mark for mark in getattr(test, "pytestmark", ()) if mark.name == "parametrize"]
    tables = []
    for mark in marks:
        names, values = mark.args[:2]
        names = [n.strip() for n in names.split(",")] if isinstance(names, str) else list(names)
        rows = [_values(row, len(names)) for row in values]
        tables.append([dict(zip(names, row, strict=True)) for row in rows])
    for rows in itertools.product(*tables):
        yield {name: value for row in rows for name, value in row.items()}


def _values(row: Any, count: int) -> Sequence[Any]:
    """The values of one row of a table of pytest."""
    if type(row).__name__ == "ParameterSet":  # made by pytest.param
        return row.values
    return row if count > 1 else (row,)


def _call(test: Any, arguments: Mapping[str, Any], begin: Callable[[], None]) -> None:
    """Call a test; each example that Hypothesis draws for it is a case."""
    from ..devices import open_test_device

    wanted = inspect.signature(test).parameters
    if "device" in wanted:
        arguments = {**arguments, "device": open_test_device("cpu")}
    if not hasattr(test, "hypothesis"):
        begin()
        test(**arguments)
        return
    inner = test.hypothesis.inner_test

    def counted(*args: Any, **kwargs: Any) -> None:
        begin()
        inner(*args, **kwargs)

    test.hypothesis.inner_test = counted
    try:
        test(**arguments)
    finally:
        test.hypothesis.inner_test = inner


def one_after_another(*runs: Callable[[Begin], None]) -> Callable[[Begin], None]:
    """Several as one suite."""

    def run(begin: Begin) -> None:
        for part in runs:
            part(begin)

    return run


def _examples(strategy: st.SearchStrategy[Any], count: int) -> list[Any]:
    """So many examples of a strategy."""
    drawn: list[Any] = []

    @settings(max_examples=count)
    @given(strategy)
    def draw(example: Any) -> None:
        drawn.append(example)

    draw()
    return drawn


# Suites of their own


def _prefill(begin: Begin) -> None:
    """The eager path on corners and on drawn batches, with NaN in all memory that is not written."""
    from ...optimized.gdn import ChunkMetadataBuilder, chunk_gated_delta_rule
    from ..cases import PrefillCase, compare_prefill, run_case
    from ..devices import open_test_device
    from ..kernel_stages import poisoned_memory
    from ..strategies import prefill_cases

    corner = PrefillCase((70, 0, 130), H=2, HV=4, K=16, V=16, padding=5)
    cases = [
        corner,
        replace(corner, gates="steep", V=24, use_qk_l2norm_in_kernel=True),
        replace(corner, initial_state=False, keys="identical", betas="one"),
        replace(corner, dtype="bfloat16", gates="none"),
        *_examples(prefill_cases(max_num_seqs=4, max_length=130), 12),
    ]
    device = open_test_device("cpu")
    for case in cases:
        begin("prefill")
        inputs = case.inputs()
        builder = ChunkMetadataBuilder(device, 1024, 8, case.HV)
        with poisoned_memory():
            o, state = run_case(
                chunk_gated_delta_rule, case, case.inputs(), prebuilt_meta=builder.build(inputs.cu_seqlens)
            )
        for comparison in compare_prefill(case, inputs, o, state, rounds_operands=False):
            assert comparison.passed, str(comparison)


def _prefill_properties(begin: Begin) -> None:
    """The eager path beside itself: order, one by one, empty sequences, padding, splits, causality."""
    from ...optimized.gdn import chunk_gated_delta_rule
    from .. import properties

    limit = properties.REGROUPED
    cases = _examples(st.tuples(properties.WIDE_CASES, properties.CUTS, properties.ORDERS), NUM_EXAMPLES)
    for case, cuts, order in cases:
        prefill = properties.prefill_by(chunk_gated_delta_rule, case)
        for name, check in (
            ("order", partial(properties.check_order, order=order, limit=limit)),
            ("one by one", partial(properties.check_one_by_one, limit=limit)),
            ("without empty", partial(properties.check_without_empty, limit=limit)),
            ("padding", partial(properties.check_padding, limit=limit)),
            ("split", partial(properties.check_split, cuts=cuts, limit=limit)),
            ("causal", partial(properties.check_causal, other_seed=1, cuts=cuts)),
        ):
            begin(name)
            check(prefill, case)


def _decode_after_prefill(begin: Begin) -> None:
    """A prefill by the eager path and decode steps after it are one recurrence, for K != V and for K == V."""
    from ...optimized.gdn import chunk_gated_delta_rule
    from .. import properties

    for case in _examples(properties.WIDE_CASES, NUM_EXAMPLES):
        for K, V in ((8, 24), (16, 16)):
            begin("decode after prefill")
            sized = replace(case, K=K, V=V, initial_state=True)
            prefill = properties.prefill_by(chunk_gated_delta_rule, sized)
            properties.check_then_decode(prefill, sized, 2, properties.REGROUPED)


def _stages(begin: Begin) -> None:
    """Each Triton kernel in the interpreter, alone, on exact inputs: what is masked reads as NaN."""
    from ..cases import PrefillCase
    from ..devices import open_test_device
    from ..kernel_stages import STAGES, check_stage

    _interpret()
    small = PrefillCase((65, 0, 3), H=2, HV=4, K=16, V=24, padding=5, use_qk_l2norm_in_kernel=True)
    device = open_test_device("cpu")
    for case in (small, replace(small, gates="forget"), replace(small, gates="steep", V=16)):
        for stage in STAGES:
            begin(stage)
            for comparison in check_stage(stage, case, device):
                assert comparison.passed, str(comparison)


def _decays(begin: Begin) -> None:
    """Each decay that a kernel computes, where gates cancel, are steep or are -inf."""
    from ..devices import open_test_device
    from ..kernel_stages import PROBES, check_decays

    _interpret()
    device = open_test_device("cpu")
    for seed in range(2):
        for stage in PROBES:
            begin(stage)
            check_decays(stage, seed, device)


def _addresses(begin: Begin) -> None:
    _interpret()
    test = "test_kernel_addresses_the_states_of_many_sequences"
    tests_of("test_addresses", test, layout=("heads first",))(begin)


def _interpret() -> None:
    """Have Triton kernels run in the interpreter; they must not have been imported yet."""
    from .. import interpreter

    interpreter.enable()


def _staging_machine(begin: Begin) -> None:
    """Anything that a host can do with a ring, in any order, while the device goes on as it likes."""

    class Machine(_module("test_staging").StagingMachine):
        def __init__(self) -> None:
            begin("StagingMachine")
            super().__init__()

    run_state_machine_as_test(Machine, settings=settings(max_examples=100))


FEATURES = (
    *((), ("async",), ("drafts",), ("async", "drafts"), ("images",), ("images", "drafts"), ("remote",)),
    *(("async", "remote"), ("sessions",), ("grammars",), ("mamba",), ("mamba", "drafts"), ("priority",)),
    *(("priority", "drafts"), ("adapters",), ("whole_prefills",), ("long_prefill_threshold",)),
)
"""What each of the random runs of a scheduler has, in turns; beside up to five more features."""

SEEDS = (16, 7, 1)


def _scheduler_runs(engines: Callable[[], Sequence[Any]], begin: Begin) -> None:
    """A random run for each of SEEDS and FEATURES."""
    from ..scheduler_runs import random_runs

    for seed, features in itertools.product(SEEDS, FEATURES):
        begin(f"random run {seed} with {' '.join(features) or 'anything'}")
        run = next(random_runs(seed, engines(), always=features))
        assert not run.failure, run.failure


def _checked() -> Sequence[Any]:
    from ..scheduler_runs import CheckedEngine

    return (CheckedEngine,)


def _beside_a_copy() -> Sequence[Any]:
    """A copy of the scheduler made from the source on disk, which has no bug, and the scheduler as it is."""
    from ..scheduler_engines import OurEngine
    from ..scheduler_runs import CheckedEngine

    tests = _module("test_scheduler_mutants")
    return tests.engine_of(tests.UNMUTATED, CheckedEngine), OurEngine


def _balance_beside_upstream(begin: Begin) -> None:
    """Ranks behind a gate beside vLLM's scheduler with an empty queue where the gate is shut."""
    from ..balance_engines import balance_runs

    test_balance = _module("test_balance")
    options: dict[str, Any]
    for policy, options in (
        ("any_rank_at_cap", {}),
        ("any_rank_at_cap", {"always": ("async",)}),
        ("cadence:interval=4", {}),
        ("open_gate", {"engines": test_balance.beside_upstream}),
    ):
        runs = balance_runs(12, policy, change=test_balance.with_a_cap_of_two, **options)
        for run in itertools.islice(runs, 6):
            begin(policy)
            assert not run.failure, run.failure


def _lockstep_at_random(begin: Begin) -> None:
    """Groups of ranks under random arrivals, aborts and pauses, with tiny engines and with checked ones."""
    from ...scheduler import admission, balance, lockstep
    from .. import lockstep_engines

    drive_in_lockstep = _module("test_balance_mutants").drive_in_lockstep
    run_at_random = _module("test_lockstep_misplaced").run_at_random
    modules = SimpleNamespace(
        admission=admission,
        balance=balance,
        lockstep=lockstep,
        lockstep_engines=lockstep_engines,
        test_balance=_module("test_balance"),
    )
    for seed in range(4):
        for policy in ("any_rank_at_cap", "cadence:interval=3"):
            begin(f"tiny engines, {policy}")
            drive_in_lockstep(modules, policy, dp_size=2 + seed % 3, seed=seed)
        begin("checked engines")
        run = run_at_random(seed, lockstep.Lockstep)
        run.drain()
        run.check()


def _lockstep_exploration(begin: Begin) -> None:
    """Every interleaving of mail and turns, for a few acts of the client."""
    from ..lockstep_search import World, search

    for world in (
        World(1, ("add",), interval=1),
        World(2, ("add",), interval=1),
        World(2, ("add", "abort", "pause")),
    ):
        begin(f"{world.num_acts} acts of {', '.join(world.acts)}, interval {world.interval}")
        found = search(world)
        assert not found.problem, found.problem


SUITES = {
    "metadata coverage": Suite(
        "all tables of a batch address each token exactly once, for any number of heads",
        tests_of(
            "test_metadata",
            "test_tables_address_every_token_exactly_once",
            "test_block_sizes_are_those_of_the_kernels",
        ),
    ),
    "metadata definition": Suite(
        "prebuilt metadata equal the plain loops in value, order and dtype, for any mix of requests",
        tests_of(
            "test_metadata",
            "test_build_equals_the_definition",
            "test_keep_meta_marks_the_sequences_that_have_tokens",
            "test_int64_offsets_are_the_chunk_offsets_in_the_same_copy",
            "test_build_leaves_out_spec_sequences_and_padding",
            "test_build_leaves_out_spec_sequences_and_padding_when_a_chunk_has_one_token",
        ),
    ),
    "metadata invariances": Suite(
        "padding changes nothing, permuting permutes, empty sequences only count",
        tests_of(
            "test_metadata",
            "test_padding_rows_change_nothing",
            "test_permuting_sequences_permutes_results",
            "test_deleting_empty_sequences_changes_only_numbering",
        ),
    ),
    "capacity": Suite(
        "every legal batch fits, and no other is begun",
        tests_of(
            "test_metadata",
            "test_capacity_holds_the_worst_batch",
            "test_build_writes_nothing_when_a_batch_is_too_large",
            "test_capacity_counts_only_sequences_that_enter",
        ),
    ),
    "prefill against the recurrence": Suite(
        "the eager path equals the definition, in unwritten memory of NaN", _prefill
    ),
    "prefill properties": Suite(
        "the eager path agrees with itself: order, splits, padding, empty sequences, causality",
        _prefill_properties,
    ),
    "decode after prefill": Suite(
        "a prefill and decode steps after it are one recurrence", _decode_after_prefill
    ),
    "decode": Suite(
        "a decode step continues the recurrence, and writes the states that it owns",
        tests_of(
            "test_decode",
            "test_decode_continues_a_prefill_as_one_recurrence",
            "test_decode_writes_owned_slots_only",
            "test_decode_leaves_the_pool_untouched_when_no_row_is_real",
            "test_decode_refuses_bad_slots_before_anything_is_written",
            "test_decode_computes_in_the_dtype_of_the_pool",
            "test_decode_refuses_a_pool_of_another_dtype",
        ),
    ),
    "context parallel fold": Suite(
        "folding what ranks contribute equals one pass, whatever the split and the first state",
        tests_of(
            "test_context_parallel",
            "test_fold_ranks_equals_one_pass",
            "test_rank_contribution_maps_any_state_to_the_state_after_its_tokens",
            "test_rank_contribution_is_the_identity_when_a_rank_has_no_token",
            "test_combine_is_associative",
        ),
    ),
    "gating": Suite(
        "gates are finite, in their domain, and what the formula gives in float64",
        tests_of(
            "test_gating",
            "test_gating_equals_the_formula_in_float64",
            "test_gating_softplus_neither_overflows_nor_drops_its_tail",
            "test_gating_softplus_keeps_small_values_of_a_negative_argument",
            "test_gating_is_finite_at_the_ends_of_a_dtype",
        ),
    ),
    "stages": Suite("each kernel, alone, in the interpreter: values, tails, addresses", _stages),
    "decays": Suite("each decay of a kernel is that between its two tokens", _decays),
    "addresses": Suite("kernels address what they should behind 2**31 elements", _addresses),
    "staging ring": Suite(
        "what a consumer reads is what was staged for it, on a device that is as late as can be",
        one_after_another(
            tests_of(
                "test_staging",
                "test_ring_delivers_what_was_staged_under_adversarial_schedules",
                "test_ring_delivers_what_was_staged_when_a_step_builds_twice",
                "test_metadata_read_at_a_step_is_that_of_the_step",
                "test_slot_waits_for_its_own_consumer_when_released_under_another_stream",
            ),
            _staging_machine,
        ),
    ),
    "host sync": Suite(
        "the op reads nothing back from the device, and is right when all its work is late",
        tests_of(
            "test_host_sync",
            "test_op_reads_nothing_back_and_equals_the_cpu_when_all_work_is_late",
            "test_op_does_not_read_cu_seqlens_when_metadata_are_given",
        ),
    ),
    "settings": Suite(
        "what users ask for is what they get, and what is unclear is refused",
        tests_of(
            "test_vllm_settings",
            "test_nobody_asked_for_anything",
            "test_variable_is_off",
            "test_variable_is_on",
            "test_variable_is_refused_unless_it_is_clear",
            "test_additional_config_goes_before_the_variable",
        ),
    ),
    "scheduler invariants": Suite(
        "random runs: invariants after every step, every token as the oracle says, everybody is served",
        partial(_scheduler_runs, _checked),
    ),
    "scheduler beside a copy": Suite(
        "random runs: every output and the whole state equal those of the scheduler without the bug",
        partial(_scheduler_runs, _beside_a_copy),
    ),
    "scheduler scenarios": Suite(
        "recorded cases, each of a mistake of vLLM 0.17.0, come out as recorded",
        tests_of("test_known_defects", "test_case_has_the_recorded_outcome"),
    ),
    "balance gate truth table": Suite(
        "each policy is its table, for every gather of few ranks",
        tests_of(
            "test_admission",
            "test_open_gate_is_always_open",
            "test_policy_of_counts_is_its_table",
            "test_any_rank_at_cap_is_shut_by_a_rank_at_the_cap_and_by_no_other",
            "test_any_rank_near_cap_leaves_one_place_free",
            "test_cadence_is_every_nth_step",
        ),
    ),
    "balance beside upstream": Suite(
        "behind an open gate vLLM's schedule, behind a shut one that of an empty queue",
        _balance_beside_upstream,
    ),
    "balance counts": Suite(
        "what a rank contributes to a gather, and that all ranks decide alike from it",
        tests_of(
            "test_balance",
            "test_balance_scheduler_overrides_nothing_but_its_beginning_and_the_step",
            "test_schedule_asks_upstream_once_and_touches_no_request",
            "test_counts_of_running_and_waiting_requests",
            "test_counts_of_a_paused_rank_hold_up_nobody",
            "test_all_ranks_decide_alike_from_the_same_gather",
            policy=("any_rank_at_cap", "cadence:interval=5"),
        ),
    ),
    "lockstep at random": Suite(
        "ranks enter the same collectives in the one right order, and all requests are served",
        _lockstep_at_random,
    ),
    "lockstep exploration": Suite(
        "in every interleaving of mail and turns nobody waits for ever", _lockstep_exploration
    ),
    "lockstep waves": Suite(
        "waves start, go on and end on all ranks together, with late arrivals, pauses and dummies",
        tests_of(
            "test_lockstep",
            "test_lockstep_enters_forward_then_reduction_then_gather",
            "test_lockstep_reduces_at_multiples_of_the_interval_only",
            "test_rank_runs_dummy_batches_while_another_works",
            "test_lockstep_runs_wave_after_wave_with_late_arrivals",
            "test_lockstep_starts_the_next_wave_for_a_request_of_the_last",
            "test_paused_rank_holds_up_nobody_and_is_served_when_it_goes_on",
        ),
    ),
    "lockstep refusals": Suite(
        "ranks that would decide differently are refused at the start",
        tests_of(
            "test_lockstep",
            "test_lockstep_refuses_engines_of_other_places",
            "test_lockstep_refuses_ranks_that_would_decide_differently",
        ),
    ),
}
