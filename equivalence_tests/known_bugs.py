"""Known bugs of others that this package must catch: what each does, and which cases and tests catch it.

`recorded_cases.py` makes the files of fixtures/cases and docs/bugs.md from this.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from ..fixtures.store import Fixture

READ, TOLD, OURS = "the change was read", "an excerpt of the thread", "our own reading of the source"
"""How a cause is known: by the diff or its message; as its author tells it; by upstream's source alone."""


@dataclass(frozen=True)
class Bug:
    """A bug that somebody had.

    Attributes:
        name: first number and a few words; how the names of its case files begin.
        part: what it is part of, a key of `PARTS`.
        upstream: issues and pull requests, as "asc#11508".
        symptom: what a user saw.
        trigger: what it takes.
        cause: why.
        caught_by: the property that does not hold any more.
        known: how the cause is known: READ, TOLD or OURS.
        tests: "file::test" of the suites that hold that property.
        scenarios: names of cases of fixtures/cases/scheduler that show it.
        no_file: why there is no file, or "".
    """

    name: str
    part: str
    upstream: tuple[str, ...]
    symptom: str
    trigger: str
    cause: str
    caught_by: str
    known: str
    tests: tuple[str, ...]
    scenarios: tuple[str, ...] = ()
    no_file: str = ""

    @property
    def paragraph(self) -> str:
        """All four in one."""
        return (
            f"Symptom: {self.symptom} Trigger: {self.trigger} Cause: {self.cause} Caught by: {self.caught_by}"
        )


@dataclass(frozen=True)
class Wrong:
    """What a replay of a wrong recording must find.

    Attributes:
        stage: the first that is wrong.
        blame: as in `replay.Replay`.
        place: of the worst value, as far as it must be named.
    """

    stage: str
    blame: str
    place: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class RecordedCase:
    """A file of fixtures/cases.

    Attributes:
        path: in that folder; its name begins with the name of its bug.
        title: one line.
        make: makes it, but for what people read.
        wrong: of a recording that went wrong; None for a case that any right implementation passes.
    """

    path: str
    title: str
    make: Callable[[], Fixture]
    wrong: Wrong | None = None


PARTS = {
    "metadata": "Chunk metadata",
    "numerics": "Numerics",
    "copies": "Asynchronous copies",
    "balance": "Balance scheduling",
    "scheduler": "The scheduler, and data-parallel ranks",
}

BUGS = (
    # Chunk metadata
    Bug(
        "fla-909_compact_ranks",
        "metadata",
        ("fla#909", "asc#7756"),
        "Some tokens of a batch come out as whatever was in memory; 65 of them with lengths 100, 1, 0, 65.",
        "A sequence without a token that is not the last one, as context parallelism and padding make it.",
        "Chunk tables number only the sequences that have tokens, and kernels look those numbers up among "
        "the bounds of all sequences. A test that compared prebuilt tables with the helper that made the "
        "same mistake could not see it.",
        "Tables are compared with a plain definition, never with another helper, and every token must be "
        "addressed exactly once by the programs of each kernel.",
        OURS,
        (
            "test_metadata.py::test_coverage_fails_when_chunk_indices_number_non_empty_sequences_fla_909",
            "test_metadata.py::test_tables_address_every_token_exactly_once",
            "test_metadata.py::test_build_equals_the_definition",
        ),
    ),
    Bug(
        "asc-11807_rank_without_tokens",
        "metadata",
        ("asc#11807",),
        "States of other requests change, or the kernel writes out of bounds.",
        "Context parallelism, and a request so short that one rank gets none of its tokens.",
        "Sequences are numbered as in fla#909, in the kernel that carries the state: it writes where an "
        "empty sequence has nothing.",
        "Leaving empty sequences out changes no output, and the final state of one is its initial state.",
        READ,
        (
            "test_chunked.py::test_chunked_ignores_empty_sequences_and_returns_their_state",
            "test_metadata.py::test_deleting_empty_sequences_changes_only_numbering",
        ),
    ),
    Bug(
        "asc-11508_state_counted_twice",
        "metadata",
        ("asc#11508",),
        "Answers get worse from the second chunk of a long prompt on; the first is exact.",
        "Two or more ranks of context parallelism, and a prompt that the scheduler computes in several "
        "chunks.",
        "What a rank hands to the next holds what became of the incoming state, and the next adds that once "
        "more. With a state of zeros nothing is wrong.",
        "Folding any split over any number of ranks, from a state that is not zero, equals one pass.",
        READ,
        (
            "test_context_parallel.py::test_fold_ranks_equals_one_pass",
            "test_context_parallel.py::test_combine_is_associative",
        ),
    ),
    Bug(
        "asc-6822_padding_of_a_graph",
        "metadata",
        ("asc#6822", "asc#8396"),
        "NaN or nonsense once a graph is replayed with fewer requests than it was captured for.",
        "Graph mode: a graph of eight requests, and one request in the batch.",
        "Bounds that are padded to the size of the graph reach the op, which takes the padding for "
        "sequences.",
        "Padding rows change no real row and no real state, bit for bit, and rows of no sequence come out as "
        "0.",
        READ,
        (
            "test_metadata.py::test_padding_rows_change_nothing",
            "test_chunked.py::test_chunked_ignores_padding",
        ),
    ),
    Bug(
        "asc-7506_sentinels_behind_the_batch",
        "metadata",
        ("asc#7506", "vllm#39064"),
        "The state in slot 0, or memory before the pool, is overwritten.",
        "Padding rows whose sentinel is -1 where the code expects 0, or the other way round.",
        "A sentinel is taken for a slot, or for a bound.",
        "In a pool full of canaries only owned slots change, for both sentinels; and rows behind the batch "
        "are not read, whatever they hold.",
        READ,
        (
            "test_decode.py::test_decode_writes_owned_slots_only",
            "test_vllm_gdn_core.py::test_scatter_writes_owned_slots_only",
            "test_metadata.py::test_build_leaves_out_spec_sequences_and_padding_when_a_chunk_has_one_token",
        ),
    ),
    Bug(
        "asc-10901_no_sequence",
        "metadata",
        ("asc#10901",),
        "States of requests that are not in the batch change.",
        "An op that writes states is called with an empty list of indices.",
        "Empty is taken for not given, which stands for the order of the batch.",
        "An op on no sequence leaves every state as it was, and returns zeros.",
        READ,
        (
            "test_decode.py::test_decode_leaves_the_pool_untouched_when_no_row_is_real",
            "test_chunked.py::test_chunked_returns_zeros_and_the_initial_state_when_there_is_no_token",
        ),
    ),
    Bug(
        "asc-10619_more_sequences_than_the_graph",
        "metadata",
        ("asc#10619",),
        "A copy of unequal sizes fails, or cuts off what is behind the capacity.",
        "max_num_seqs is larger than the batch for which graphs are captured.",
        "The buffer on the device was sized by the one, its twin on the host by the other.",
        "Both have one capacity, and the largest legal batch fits a builder that is just large enough for "
        "it.",
        READ,
        (
            "test_metadata.py::test_capacity_holds_the_worst_batch",
            "test_metadata.py::test_capacity_holds_every_batch_when_blocks_are_small",
        ),
    ),
    Bug(
        "vllm-34871_one_token_beside_drafts",
        "metadata",
        ("vllm#34871",),
        "An assertion of the metadata builder ends the engine.",
        "The last chunk of a prompt has one token, and others in the batch verify drafts.",
        "Such a prefill looks like a decode, and the builder finds no prefill where it expects one.",
        "The builder takes every mix of decodes, drafts, prefills and padding, and builds what the "
        "definition says.",
        TOLD,
        (
            "test_metadata.py::test_build_leaves_out_spec_sequences_and_padding_when_a_chunk_has_one_token",
            "test_metadata.py::test_permuting_sequences_permutes_results",
        ),
    ),
    Bug(
        "asc-10580_piece_as_short_as_drafts",
        "metadata",
        ("asc#10580",),
        "A prompt is answered as if its middle were missing.",
        "A step computes no more tokens of a prompt than a decode with drafts has, in the middle of the "
        "prompt.",
        "Whether a request decodes is told by the number of its tokens alone.",
        "Whoever has computed less than its prompt is in prefill, whatever the length of its piece: output "
        "and drafts are those of the oracle.",
        READ,
        (
            "test_paged_model.py::test_output_is_the_oracles_however_the_prompt_is_cut",
            "test_scheduler_invariants.py::test_random_runs_hold_the_invariants_with_every_feature_at_work",
        ),
    ),
    Bug(
        "asc-11072_step_without_requests",
        "metadata",
        ("asc#11072",),
        "A replayed graph reads nothing, or the addresses of the capture.",
        "A graph is captured in a step without a decode, and replayed in one with decodes.",
        "What a step does not need is None in its metadata, and None is what the graph keeps.",
        "A step with nothing has the same tables as any other, with no rows; none is None.",
        READ,
        (
            "test_metadata.py::test_reference_loops_give_no_chunk_when_there_is_no_token",
            "test_metadata.py::test_views_are_aligned_and_do_not_overlap",
        ),
    ),
    Bug(
        "asc-11161_bounds_padded_to_tokens",
        "metadata",
        ("asc#11161",),
        "More sequences are computed than there are requests.",
        "A full graph of decodes with speculative decoding.",
        "Bounds are padded to the number of tokens, and not to the number of requests.",
        "There is one bound more than there are sequences, always.",
        READ,
        (
            "test_metadata.py::test_padding_rows_change_nothing",
            "test_vllm_gdn_metadata.py::test_rows_that_end_past_the_step_or_before_they_start_are_empty",
        ),
    ),
    Bug(
        "tile_constants_of_another_size",
        "metadata",
        (),
        "Tokens are left out, or computed twice, for some numbers of heads and no others.",
        "A number of value heads on a rank for which builder and kernel were never tried together.",
        "The block size of a kernel is written down twice, and one of the two has changed.",
        "The block sizes of the builder are those of the kernels, for every number of heads from 1 to 128.",
        OURS,
        (
            "test_metadata.py::test_block_sizes_are_those_of_the_kernels",
            "test_kernel_mutants.py::test_check_stage_catches_tables_of_another_block_size",
        ),
    ),
    # Numerics
    Bug(
        "fla-792_steep_decays_before_a_tail",
        "numerics",
        ("fla#792", "fla#794"),
        "NaN in the state after a prompt whose length is no multiple of 64.",
        "Very negative g, such as two rows of 75 tokens in float16.",
        "g behind the last token loads as 0; exp(0 - g) is infinite there, and a mask multiplies that by 0.",
        "Outputs and states are finite for g down to -1e3 and every length, and do not depend on what is "
        "behind the last token.",
        READ,
        (
            "test_op.py::test_op_equals_the_definition_when_g_is_very_negative",
            "test_chunked.py::test_chunked_is_finite_when_g_is_very_negative",
        ),
    ),
    Bug(
        "fla-463_decay_in_two_factors",
        "numerics",
        ("fla#463",),
        "Inf or NaN in the output, only for some heads.",
        "A few tokens that forget nearly all (1e-12) among others that keep all.",
        "exp(a - b) is computed as exp(a) times exp(-b), and the second factor overflows.",
        "Only differences that are masked first are exponentiated; decays of 1e-12, 0 and 1 in one batch "
        "equal the definition.",
        TOLD,
        (
            "test_chunked.py::test_chunked_equals_the_definition_when_decays_are_extreme",
            "test_kernels.py::test_decay_is_exact_where_log_decays_cancel",
        ),
    ),
    Bug(
        "flashinfer-2490_decay_is_linear",
        "numerics",
        ("flashinfer#2490",),
        "Plausible output that is wrong from the second token on.",
        "A caller gives the decay, where the op takes its logarithm, or the other way round.",
        "Nothing says which of the two it is, and both are small numbers.",
        "With g = 0 the op is the delta rule without a gate; positive g is refused where values are read.",
        TOLD,
        (
            "test_recurrent.py::test_recurrent_is_the_ungated_delta_rule_when_g_is_zero_and_beta_one",
            "test_recurrent.py::test_recurrent_refuses_a_linear_decay",
        ),
    ),
    Bug(
        "asc-10276_padding_of_nan",
        "numerics",
        ("asc#10276", "fla#1070"),
        "NaN now and then, and not with the same batch again.",
        "A length that is no multiple of a block, and memory that was used before.",
        "What is loaded out of bounds is not the 0 that was asked for, or a workspace is read where nobody "
        "wrote.",
        "Outputs, padding and workspaces full of NaN change nothing.",
        READ,
        (
            "test_op.py::test_op_reads_no_memory_that_it_has_not_written",
            "test_interpreter.py::test_masked_load_is_nan_where_hardware_is_undefined",
        ),
    ),
    Bug(
        "fla-1113_operand_clobbered",
        "numerics",
        ("fla#1113",),
        "One kernel of the chain is wrong on one kind of NPU, and nothing fails.",
        "A compiler that gives two live operands of a product the same memory on chip.",
        "A bug of the compiler: the source is right.",
        "Each stage is compared with its own reference, and the first that differs is named.",
        READ,
        (
            "test_kernel_mutants.py::test_check_stage_catches",
            "test_kernels.py::test_stage_equals_its_reference",
        ),
    ),
    Bug(
        "sgl-kernel-npu-640_state_transposed",
        "numerics",
        ("sgl-kernel-npu#640",),
        "The first answer is right, what follows a cached prefix is not.",
        "A prefill whose state a decode reads.",
        "The state is stored as [V, K] and read as [K, V]; K equals V in the models that were tried.",
        "K differs from V, states are not zero, and a prefill with decodes behind it equals one recurrence.",
        TOLD,
        (
            "test_decode.py::test_decode_continues_a_prefill_as_one_recurrence",
            "test_chunked.py::test_chunked_then_decode_equals_one_recurrence",
        ),
    ),
    Bug(
        "sglang-40419",
        "numerics",
        ("sglang#40419", "sglang#40362"),
        "Wrong output, or a little less exact output, with some configurations of dtypes.",
        "A pool of states, or beta, of another dtype than the kernel was written for.",
        "The kernel steps through memory by the size of another dtype, or narrows what it reads.",
        "Each combination of dtypes is computed as exactly as it allows, or refused.",
        TOLD,
        (
            "test_op.py::test_op_takes_gates_and_states_of_any_dtype",
            "test_decode.py::test_decode_computes_in_the_dtype_of_the_pool",
            "test_decode.py::test_decode_refuses_a_pool_of_another_dtype",
        ),
    ),
    Bug(
        "fla-537_identical_keys",
        "numerics",
        ("fla#537",),
        "The inverse of a triangle explodes in a test.",
        "solve_tril on a random matrix of 64 x 64, which no keys make; among those that keys make, equal "
        "keys with beta 1 are the hardest.",
        "The test leaves the domain; an inverse by a series of powers leaves what is exact even within it.",
        "Matrices are made from normalised keys and beta in [0, 1], and (I + A) times the result is compared "
        "with I.",
        TOLD,
        (
            "test_kernels.py::test_solve_tril_inverts",
            "test_stages.py::test_solve_tril_inverts_identical_keys",
        ),
    ),
    Bug(
        "asc-10553_softplus_of_large_numbers",
        "numerics",
        ("asc#10553", "flashinfer#4481"),
        "NaN in the gates of a few heads.",
        "A softplus whose argument is above 20 or so.",
        "log(1 + exp(x)) overflows, where it should be x.",
        "Gates are finite for arguments of +-1e4, never positive, and softplus(x) is x above 20.",
        READ,
        (
            "test_gating.py::test_gating_softplus_neither_overflows_nor_drops_its_tail",
            "test_gating.py::test_gating_is_finite_and_in_its_domain_when_float32",
        ),
        no_file="A fixture holds a call of the op, and gates are made before it: it would hold g = -inf, "
        "which is allowed.",
    ),
    # Asynchronous copies
    Bug(
        "asc-12079_tables_of_the_next_step",
        "copies",
        ("asc#12079", "asc#12630", "asc#16428"),
        "Outputs of one step belong to the inputs of the next: in one that was measured, 6,640 token ids.",
        "The host is a step ahead of the device, and a step builds twice, as with a drafter.",
        "Pinned buffers are written again while the copy out of them is still queued; two buffers in turn "
        "are enough for one build a step, and not for two.",
        "Copies are simulated as late as they may be, and what a consumer of step n reads is what was staged "
        "for step n.",
        READ,
        (
            "test_staging.py::test_schedule_catches_mutant",
            "test_staging.py::test_metadata_read_at_a_step_is_that_of_the_step",
            "test_staging.py::test_two_slots_without_events_pass_at_one_build_a_step_asc_12079",
        ),
    ),
    Bug(
        "vllm-36013_read_before_it_landed",
        "copies",
        ("vllm#36013",),
        "Token ids of an earlier step, now and then.",
        "The host reads what the device copies back, and waits for the wrong event.",
        "The event that is waited for was recorded before the copy.",
        "A host read of device memory whose work is not done is an error.",
        TOLD,
        (
            "test_devices.py::test_read_raises_until_the_work_is_done",
            "test_host_sync.py::test_forbid_host_sync_catches_an_implementation_that_reads_back",
        ),
        no_file="What is read too early is no value that a file could hold: the simulated device refuses the "
        "read. The op itself reads nothing back.",
    ),
    Bug(
        "vllm-45074_source_freed_before_the_copy",
        "copies",
        ("vllm#45074", "asc#11161"),
        "67 to 101 ms in which a step stands still, or values of somebody else's memory.",
        "A copy that is called non-blocking, from a temporary that is not pinned, or that nobody keeps.",
        "A copy from pageable memory waits; from pinned memory that was freed it reads what came there next.",
        "The source of every asynchronous copy is pinned, and kept until its event has passed; memory that "
        "is freed is poisoned at once.",
        TOLD,
        (
            "test_devices.py::test_copy_raises_when_its_source_is_pageable_or_its_target_on_the_host",
            "test_devices.py::test_queued_copy_delivers_poison_when_its_source_is_freed",
            "test_staging.py::test_schedule_catches_mutant",
        ),
    ),
    # Balance scheduling
    Bug(
        "asc-5281_zero_switches_it_on",
        "balance",
        ("asc#5281",),
        "Balance scheduling is on although it was switched off.",
        'Its variable is set to "0".',
        'The text "0" is true.',
        '"0", "", "false" and nothing at all are off, and what is neither on nor off is refused.',
        READ,
        (
            "test_vllm_settings.py::test_variable_is_off",
            "test_vllm_settings.py::test_variable_is_refused_unless_it_is_clear",
        ),
        no_file="A variable of the environment is no part of a fixture.",
    ),
    Bug(
        "asc-8279_finished_load_is_not_seen",
        "balance",
        ("asc#8279",),
        "A request never starts, though its blocks have been loaded.",
        "A remote load of its prefix ends.",
        "A helper returns something else since an upgrade, and a copy of the scheduler reads it as before.",
        "Once the load has ended and there is room, the request runs within a few steps.",
        READ,
        (
            "test_scheduler_mutants.py::test_invariants_and_oracle_find",
            "test_vllm_balance.py::test_open_gate_equals_upstream",
        ),
    ),
    Bug(
        "asc-10559_ready_grammar_is_not_seen",
        "balance",
        ("asc#10559", "asc#10537"),
        "A request with structured output never starts.",
        "Its grammar is compiled while others run.",
        "A copied loop looks at the waiting queue alone, and upstream has put such requests into another.",
        "Every request is in exactly one queue, and with an open gate each step equals upstream's.",
        READ,
        (
            "test_scheduler_invariants.py::test_an_invariant_fails_when_the_state_is_damaged",
            "test_balance.py::test_scheduler_equals_upstream_while_no_other_rank_shuts_the_gate",
        ),
    ),
    Bug(
        "asc-11310_gather_in_schedule",
        "balance",
        ("asc#11310",),
        "All ranks stand still as soon as one has nothing left to do.",
        "A rank is drained while another still works.",
        "The gather is in schedule(), and a drained rank does not call that: the others wait in it for ever.",
        "All ranks enter the same collectives in the same order, for every order of arrivals and ends.",
        READ,
        (
            "test_lockstep_misplaced.py::test_gather_is_found_where_it_deadlocks",
            "test_lockstep_misplaced.py::test_gather_deadlocks_as_in_vllm_ascend_11310",
        ),
    ),
    Bug(
        "asc-11310_gather_before_the_reduction",
        "balance",
        ("asc#11310",),
        "One run of six hangs at the end of its work.",
        "A request ends in the very turn in which ranks ask each other who has unfinished ones.",
        "The gather is before that question, and a rank that will find itself idle enters it, too.",
        "Every active step has exactly one gather, right behind the reduction, and an idle one has none.",
        READ,
        (
            "test_lockstep_misplaced.py::test_gather_is_found_where_its_order_alone_is_wrong",
            "test_lockstep_misplaced.py::test_gather_deadlocks_as_in_vllm_ascend_11310",
        ),
    ),
    Bug(
        "asc-7611_gate_one_below_the_cap",
        "balance",
        ("asc#7611", "asc#8675"),
        "Time to the first token got worse; the change was taken back after five weeks.",
        "Some rank runs one request less than it may.",
        "The gate shuts at cap - 1, and not at the cap.",
        "The truth table of every policy, and below the cap the schedule is upstream's.",
        READ,
        (
            "test_admission.py::test_any_rank_at_cap_is_shut_by_a_rank_at_the_cap_and_by_no_other",
            "test_balance.py::test_scheduler_equals_upstream_while_no_other_rank_shuts_the_gate",
        ),
    ),
    Bug(
        "asc-7479_copied_schedule",
        "balance",
        ("asc#7479", "asc#13275"),
        "A feature of upstream is missing after one upgrade; after another the scheduler raises.",
        "Upstream changes schedule().",
        "Balance scheduling holds a copy of it with one comparison more.",
        "Nothing is copied, and a differential test runs beside every supported vLLM.",
        READ,
        (
            "test_balance.py::test_balance_scheduler_overrides_nothing_but_its_beginning_and_the_step",
            "test_vllm_balance.py::test_open_gate_equals_upstream",
            "test_vllm_balance.py::test_a_source_whose_anchor_has_moved_is_refused",
        ),
        no_file="It is about the source of a scheduler, not about what happens to one.",
    ),
    Bug(
        "asc-8975_ranks_of_different_kinds",
        "balance",
        ("asc#8975",),
        "Ranks hang in different collectives.",
        "Balance scheduling on some ranks, and another scheduler on the rest.",
        "Each rank chooses by its own options.",
        "Ranks that would decide differently are refused at the start, with what differs.",
        TOLD,
        (
            "test_lockstep.py::test_lockstep_refuses_ranks_that_would_decide_differently",
            "test_vllm_plugin.py::test_ranks_that_are_not_balanced_alike_are_refused",
            "test_vllm_plugin.py::test_choice_of_the_scheduler",
        ),
        no_file="Such a group is refused before its first step: there is nothing to record.",
    ),
    Bug(
        "asc-15802_prefills_without_room",
        "balance",
        ("asc#15802", "asc#14233"),
        "A prefill hangs, and with it everybody behind it.",
        "Preemption is switched off, and prompts together need more blocks than there are.",
        "Each holds some blocks and waits for those of the others.",
        "Whoever can be finished with the blocks that there are is finished.",
        TOLD,
        (
            "test_scheduler_invariants.py::test_a_request_that_is_not_served_is_a_stall",
            "test_balance.py::test_nobody_waits_longer_than_the_bound",
        ),
    ),
    Bug(
        "asc-11334_resumed_past_its_prompt",
        "balance",
        ("asc#11334",),
        "After a preemption a request answers something else; Gaudi and Tenstorrent had the same.",
        "A request is preempted after its first output tokens, and resumed.",
        "It has computed nothing and has more tokens than its prompt: it is taken for a decode.",
        "A preemption anywhere changes no output.",
        TOLD,
        (
            "test_scheduler_invariants.py::test_a_preemption_anywhere_changes_no_output",
            "test_paged_model.py::test_output_changes_when_a_resumed_request_does_not_recompute",
        ),
    ),
    Bug(
        "asc-9749_drafts_near_the_end_of_the_model",
        "balance",
        ("asc#9749", "asc#11544"),
        "Positions behind the longest that the model knows: an error on the device.",
        "A request with drafts comes near max_model_len.",
        "Placeholders of drafts are scheduled without regard to the end.",
        "What is computed and scheduled is never more than max_model_len.",
        READ,
        (
            "test_paged_model.py::test_position_beyond_max_model_len_is_an_error",
            "test_scheduler_invariants.py::test_random_runs_hold_the_invariants_with_every_feature_at_work",
        ),
    ),
    Bug(
        "asc-10746_nothing_for_the_first",
        "balance",
        ("asc#10746",),
        "No request gets a token any more, though there is room.",
        "What predicts the size of the next piece says none for the first request.",
        "The loop ends at the first request that gets nothing, in every step.",
        "While resources are free, somebody gets on.",
        READ,
        (
            "test_scheduler_mutants.py::test_comparison_finds",
            "test_scheduler_invariants.py::test_a_request_that_is_not_served_is_a_stall",
        ),
    ),
    # The scheduler, and data-parallel ranks
    Bug(
        "vllm-57104_waiting_requests_hold_all_blocks",
        "scheduler",
        ("vllm#57104",),
        "Nobody runs any more, and nobody ever will.",
        "Seven blocks; one request has loaded four and needs one more, another three and one.",
        "Those that wait hold blocks and never give way.",
        "Progress: somebody who waits for nothing from outside is served.",
        TOLD,
        ("test_known_defects.py::test_case_breaks_what_it_says_and_nothing_excuses_it_but_its_defect",),
        scenarios=(
            "two_loads_hold_all_blocks",
            "two_loads_hold_all_blocks_with_lookahead",
            "loaded_request_waits_behind_one_without_room",
        ),
    ),
    Bug(
        "vllm-29387_hit_on_a_state_of_the_same_step",
        "scheduler",
        ("vllm#29387",),
        "A request goes on from a state that nobody has computed.",
        "Two requests with one prefix are admitted in the same step.",
        "Blocks can be found by their hash as soon as they are scheduled, and not once they are computed.",
        "What a request is given by a hit was written by a step before it, or is written before it is read.",
        TOLD,
        (
            "test_paged_model.py::test_output_changes_when_a_hit_is_on_a_mamba_state_of_the_same_step",
            "test_paged_model.py::test_hit_on_blocks_of_the_same_step_finds_them_written",
        ),
        scenarios=("failed_blocks_are_found_in_the_same_step", "blocks_of_victim_stay_cached"),
    ),
    Bug(
        "vllm-48245_preempted_with_an_output_in_flight",
        "scheduler",
        ("vllm#48245", "vllm#57562"),
        "A token comes twice, or an assertion fails.",
        "A request is preempted while an output of it is in flight, and resumed before that has come.",
        "It computes again what is still to come, and both count.",
        "Placeholders are never negative, and every token comes once and in order, one to three batches "
        "deep.",
        TOLD,
        (
            "test_known_defects.py::test_case_breaks_what_it_says_and_nothing_excuses_it_but_its_defect",
            "test_paged_model.py::test_resumed_request_has_no_rejections_in_flight",
        ),
        scenarios=("resumed_before_its_outputs_came", "resumed_before_its_drafts_came"),
    ),
    Bug(
        "asc-16315_preemption_thrash",
        "scheduler",
        ("asc#16315",),
        "Requests preempt one another step after step, and hardly anybody gets on.",
        "A pool that is nearly full.",
        "Requests give way though that frees nothing, or come back in the step in which they gave way.",
        "Whoever gives way held blocks, was admitted last, and is out of the step; nobody is admitted then.",
        TOLD,
        (
            "test_scheduler_invariants.py::test_a_preemption_of_the_wrong_request_is_found",
            "test_balance.py::test_those_who_give_way_in_a_frozen_step_wait_in_front",
        ),
        scenarios=("equals_take_turns",),
    ),
    Bug(
        "vllm-34616_full_prefix_hit",
        "scheduler",
        ("vllm#34616", "vllm#30320"),
        "An assertion fails, that there is something to compute; or output differs from that of a cold run.",
        "All blocks of a prompt are in the prefix cache.",
        "A hit on the whole prompt leaves nothing to compute, and so nothing to sample from.",
        "After any hit there is at least one token to compute, and the output is that of a cold run.",
        TOLD,
        (
            "test_paged_model.py::test_output_is_the_oracles_when_a_hit_is_on_its_own_prefix_alone",
            "test_scheduler_mutants.py::test_invariants_and_oracle_find",
        ),
    ),
    Bug(
        "vllm-49439_two_sessions_hold_all_blocks",
        "scheduler",
        ("vllm#49439",),
        "Nobody runs any more.",
        "Two streaming sessions have their next input, and hold all blocks between them.",
        "Both wait for a block, and neither gives way.",
        "Progress, as for vllm#57104.",
        TOLD,
        ("test_known_defects.py::test_case_breaks_what_it_says_and_nothing_excuses_it_but_its_defect",),
        scenarios=("two_sessions_hold_all_blocks",),
    ),
    Bug(
        "vllm-43547_step_without_tokens",
        "scheduler",
        ("vllm#43547", "vllm#28224"),
        "Ranks drift apart by one collective in each such step, and hang: in one report after an hour.",
        "A rank schedules no token in a step in which others do.",
        "It leaves out a collective that the others enter.",
        "All ranks enter the same collectives in the same order.",
        TOLD,
        (
            "test_lockstep_misplaced.py::test_gather_is_found_where_it_deadlocks",
            "test_lockstep.py::test_rank_runs_dummy_batches_while_another_works",
        ),
    ),
    Bug(
        "vllm-45223_end_of_wave_counted_apart",
        "scheduler",
        ("vllm#45223", "vllm#52957"),
        "Ranks end a wave in different steps, and then hang.",
        "The answer to who has unfinished requests is kept for 32 steps.",
        "From when on the 32 are counted is not the same on all ranks.",
        "When ranks ask depends only on what is equal on all of them.",
        TOLD,
        (
            "test_lockstep.py::test_lockstep_reduces_at_multiples_of_the_interval_only",
            "test_lockstep_exhaustive.py::test_lockstep_serves_all_and_comes_to_rest_whatever_the_order",
        ),
    ),
    Bug(
        "vllm-39366_wave_starts_without_a_rank",
        "scheduler",
        ("vllm#39366", "vllm#38009"),
        "One rank steps alone, for ever.",
        "A request wakes the ranks, and the rank that has it is paused, or has lost it again, by then.",
        "The start of a wave is told to all ranks but the one that has the request.",
        "Every interleaving of a few acts of the client on two ranks is tried: all are served and come to "
        "rest.",
        TOLD,
        (
            "test_lockstep_exhaustive.py::test_search_finds_the_deadlock_of_v0_17_0",
            "test_lockstep_exhaustive.py::test_lockstep_serves_all_and_comes_to_rest_whatever_the_order",
        ),
    ),
)
