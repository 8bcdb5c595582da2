"""The stand-in for the model: it says what the oracle says, unless a scheduler made a mistake."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from ascend_twin.equivalence_tests.paged_model import (
    KEEP_BLOCKS,
    OracleMismatchError,
    OutputOracle,
    PagedModel,
    RemoteTransfers,
    StandInConnector,
    StandInError,
    StandInGrammar,
    StandInStructuredOutputManager,
    expected_output,
    lora_name,
)
from ascend_twin.reference.errors import InvalidArgumentError
from ascend_twin.scheduler.config import SchedulerConfig
from ascend_twin.scheduler.output import (
    CachedRequestData,
    EngineCoreOutput,
    EngineCoreOutputs,
    FinishReason,
    GrammarOutput,
    KVConnectorOutput,
    ModelRunnerOutput,
    NewRequestData,
    SchedulerOutput,
)
from ascend_twin.scheduler.request import (
    LoRARequest,
    MultiModalFeatureSpec,
    PlaceholderRange,
    Request,
    SamplingParams,
    StructuredOutputRequest,
)
from ascend_twin.scheduler.workload import (
    EOS_TOKEN_ID,
    ImageSpec,
    RemoteHit,
    RequestSpec,
    SessionChunk,
    prompt_token_ids,
)

CONFIG = SchedulerConfig(
    60,
    block_size=4,
    max_num_seqs=64,
    max_num_batched_tokens=64,
    max_model_len=64,
    max_num_encoder_input_tokens=10,
    encoder_cache_size=10,
)
DRAFTS = replace(CONFIG, num_spec_tokens=3)
IMAGE = ImageSpec("cat", 2, 5)


def make_spec(request_id: str = "a", seed: int = 1, length: int = 10, **fields: Any) -> RequestSpec:
    return RequestSpec(request_id, 0, ((seed, length),), **{"max_tokens": 12, **fields})


def make_request(spec: RequestSpec, **fields: Any) -> Request:
    return Request(
        spec.request_id,
        prompt_token_ids(spec),
        SamplingParams(spec.max_tokens),
        mm_features=features(spec),
        lora_request=lora(spec),
        **fields,
    )


def features(spec: RequestSpec) -> list[MultiModalFeatureSpec]:
    return [
        MultiModalFeatureSpec(image.identifier, PlaceholderRange(image.offset, image.length, image.is_embed))
        for image in spec.images
    ]


def lora(spec: RequestSpec) -> LoRARequest | None:
    name = lora_name(spec)
    return LoRARequest(name, spec.lora) if name and spec.lora else None


@dataclass
class Part:
    """A request's part of a step: `count` positions from `start` on."""

    spec: RequestSpec
    start: int
    count: int
    blocks: tuple[Sequence[int], ...] | None = None
    new: bool = False
    resumed: bool = False
    drafts: Sequence[int] = ()
    encoder: Sequence[int] = ()
    num_in_flight: int = 0  # output tokens that the scheduler still waits for


class ByHand:
    """A scheduler whose decisions are the test's; it knows the output tokens of the results that it took."""

    def __init__(self, config: SchedulerConfig = CONFIG, *, asynchronous: bool = False) -> None:
        self.config = config
        self.model = PagedModel(config, asynchronous=asynchronous)
        self.said: dict[str, list[int]] = {}

    def output(self, *parts: Part, **fields: Any) -> SchedulerOutput:
        cached = CachedRequestData()
        new = []
        for part in parts:
            req_id = part.spec.request_id
            blocks = None if part.blocks is None else tuple([*table] for table in part.blocks)
            said = self.said.setdefault(req_id, [])
            if part.new:
                self.model.add_request(part.spec)
                tokens, params = prompt_token_ids(part.spec), SamplingParams(part.spec.max_tokens)
                where = blocks or ([],), part.start
                new.append(
                    NewRequestData(req_id, tokens, features(part.spec), params, *where, lora(part.spec))
                )
                continue
            cached.req_ids.append(req_id)
            cached.new_block_ids.append(blocks)
            cached.num_computed_tokens.append(part.start)
            cached.num_output_tokens.append(len(said) + part.num_in_flight)
            if part.resumed:
                cached.resumed_req_ids.add(req_id)
                cached.all_token_ids[req_id] = prompt_token_ids(part.spec) + said
        given = {
            "num_common_prefix_blocks": [0] * len(self.config.kv_groups),
            "finished_req_ids": set(),
            "free_encoder_mm_hashes": [],
            "preempted_req_ids": set(),
            **fields,
        }
        return SchedulerOutput(
            scheduled_new_reqs=new,
            scheduled_cached_reqs=cached,
            num_scheduled_tokens={part.spec.request_id: part.count for part in parts},
            total_num_scheduled_tokens=sum(part.count for part in parts),
            scheduled_spec_decode_tokens={p.spec.request_id: list(p.drafts) for p in parts if p.drafts},
            scheduled_encoder_inputs={p.spec.request_id: list(p.encoder) for p in parts if p.encoder},
            **given,
        )

    def take(self, step: Any) -> ModelRunnerOutput:
        result = self.model.result(step)
        for req_id, tokens in zip(result.req_ids, result.sampled_token_ids, strict=True):
            self.said[req_id] += tokens
        return result

    def step(
        self, *parts: Part, parities: dict[str, list[int | None]] | None = None, **fields: Any
    ) -> ModelRunnerOutput:
        step = self.model.execute(self.output(*parts, **fields))
        self.model.sample(step, GrammarOutput(list(parities), list(parities.values())) if parities else None)
        return self.take(step)

    def prefill(self, spec: RequestSpec, *blocks: Sequence[int], start: int = 0, **fields: Any) -> None:
        """The rest of the prompt in one step, into blocks that are enough for all that follows."""
        count = spec.num_prompt_tokens - start
        self.step(Part(spec, start, count, blocks, new=True, encoder=range(len(spec.images)), **fields))

    def decode(self, spec: RequestSpec) -> list[int]:
        """Step by step to the last token; returns all output tokens."""
        said = self.said[spec.request_id]
        while len(said) < spec.max_tokens:
            self.step(Part(spec, spec.num_prompt_tokens + len(said) - 1, 1))
        return said

    def decode_with_drafts(self, spec: RequestSpec) -> list[int]:
        """As `decode`, with the model's own drafts, as far as the output is long."""
        said = self.said[spec.request_id]
        while len(said) < spec.max_tokens:
            drafts = self.model.take_draft_token_ids()
            assert drafts is not None
            ids = dict(zip(drafts.req_ids, drafts.draft_token_ids, strict=True))[spec.request_id]
            start = spec.num_prompt_tokens + len(said) - 1
            self.step(Part(spec, start, 1 + len(ids), drafts=ids))
        return said[: spec.max_tokens]


def expected(spec: RequestSpec, config: SchedulerConfig = CONFIG) -> list[int]:
    (output,) = expected_output(spec, config)
    return output


# What a cache may look like, and what it may not


@pytest.mark.parametrize("chunks", [(10,), (3, 4, 3), (4, 4, 2), (8, 1, 1), (1,) * 10], ids=str)
@pytest.mark.parametrize("blocks", [range(1, 7), (9, 2, 30, 4, 59, 1)], ids=["in order", "in disorder"])
def test_output_is_the_oracles_however_the_prompt_is_cut(
    blocks: Sequence[int], chunks: tuple[int, ...]
) -> None:
    spec, hand = make_spec(), ByHand()
    start = 0
    for count in chunks:
        hand.step(Part(spec, start, count, (blocks,) if start == 0 else None, new=start == 0))
        assert bool(hand.said["a"]) == (start + count == spec.num_prompt_tokens)
        start += count
    assert hand.decode(spec) == expected(spec)
    assert len(set(expected(spec))) > 6


def test_output_is_the_oracles_when_the_table_grows_and_others_run() -> None:
    hand, specs = ByHand(), [make_spec(str(i), seed=i, length=5 + i) for i in range(3)]
    hand.step(*(Part(spec, 0, 5 + i, ([3 * i + 1, 3 * i + 2],), new=True) for i, spec in enumerate(specs)))
    free = iter(range(10, 60))
    for said in range(11):
        starts = [4 + i + said + 1 for i in range(3)]
        grown = [([next(free)],) if start % 4 == 0 and start >= 8 else None for start in starts]
        hand.step(*(Part(specs[i], starts[i], 1, grown[i]) for i in (2, 0, 1)))
    assert [hand.said[str(i)] for i in range(3)] == [expected(spec) for spec in specs]


def test_output_is_the_oracles_after_12_000_tokens() -> None:
    config = SchedulerConfig(
        num_blocks=1000, block_size=16, max_model_len=12_100, max_num_batched_tokens=12_100
    )
    spec, hand = make_spec(length=12_000), ByHand(config)
    hand.prefill(spec, range(760, 0, -1))
    assert hand.decode(spec) == expected(spec, config)


@pytest.mark.parametrize("i", range(2))
def test_output_changes_when_two_blocks_are_swapped(i: int) -> None:
    spec, hand = make_spec(), ByHand()
    hand.prefill(spec, [1, 2, 3, 4, 5, 6])
    table = hand.model.requests["a"].tables[0].ids
    table[[i, i + 1]] = table[[i + 1, i]]
    assert hand.decode(spec) != expected(spec)


@pytest.mark.parametrize("block_id", [1, 2, 3])
def test_output_changes_when_another_request_writes_a_block(block_id: int) -> None:
    spec, other, hand = make_spec(), make_spec("b", seed=2, length=1), ByHand()
    hand.prefill(spec, [1, 2, 3, 4, 5, 6])
    hand.prefill(other, [block_id])
    assert hand.decode(spec)[1:] != expected(spec)[1:]


def test_output_changes_when_a_prompt_token_is_skipped() -> None:
    spec, hand = make_spec(), ByHand()
    hand.step(Part(spec, 0, 4, ([1, 2, 3, 4, 5, 6],), new=True))
    hand.step(Part(spec, 5, 5))
    assert hand.decode(spec) != expected(spec)


def test_output_changes_when_a_slot_is_lost_before_the_hit() -> None:
    spec, hand = make_spec(), ByHand()
    hand.prefill(spec, [1, 2, 3, 4, 5, 6])
    hand.model._slots[1, 2] += np.uint64(1)  # what nobody continues from, but everybody reads
    hand.model._block_digests[1] = hand.model._slots[1] @ hand.model._offset_powers
    assert hand.decode(spec)[1:] != expected(spec)[1:]


@pytest.mark.parametrize("start", [0, 8, 13])
def test_output_changes_when_a_resumed_request_does_not_recompute(start: int) -> None:
    spec, hand = make_spec(), ByHand()
    hand.prefill(spec, [1, 2, 3, 4, 5, 6])
    for said in range(1, 5):
        hand.step(Part(spec, 9 + said, 1))
    hand.step(preempted_req_ids={"a"})
    hand.step(Part(spec, start, 15 - start, ([11, 12, 13, 14, 15, 16],), resumed=True))
    assert (hand.decode(spec) == expected(spec)) == (start == 0)


@pytest.mark.parametrize("as_new", [False, True])
def test_resumed_request_takes_its_mamba_state_from_where_the_hit_ends(as_new: bool) -> None:
    spec, hand = make_spec(), ByHand(mamba("align"))
    full, states = tables(hand.config)
    hand.step(Part(spec, 0, 8, (full, states), new=True))
    hand.step(Part(spec, 8, 2))
    for start in range(10, 14):
        hand.step(Part(spec, start, 1))
    blocks = [full[0], full[1], *range(70, 90)], [0, states[1], *range(90, 110)]
    out = hand.output(Part(spec, 8, 7, blocks, new=as_new, resumed=not as_new))
    if as_new:  # as a session that stopped while it was preempted
        hand.step(preempted_req_ids={"a"})
        out.scheduled_new_reqs[0].prompt_token_ids += hand.said["a"]
    step = hand.model.execute(out)
    hand.model.sample(step)
    assert hand.model.result(step).sampled_token_ids == [expected(spec, hand.config)[5:6]]


def test_resumed_request_has_no_rejections_in_flight() -> None:
    spec, hand = make_spec(), ByHand(DRAFTS, asynchronous=True)
    hand.prefill(spec, range(1, 10))
    late = hand.model.execute(hand.output(Part(spec, 10, 4, drafts=[-1] * 3, num_in_flight=4)))
    hand.model.sample(late)
    step = hand.model.execute(hand.output(Part(spec, 0, 11, (range(11, 20),), resumed=True)))
    hand.model.sample(step)
    assert hand.model.result(step).sampled_token_ids == [expected(spec, DRAFTS)[1:2]]


def test_id_of_a_finished_request_may_come_again() -> None:
    first, spec, hand = make_spec(seed=2), make_spec(), ByHand(mamba("align"))
    hand.prefill(first, *tables(hand.config))
    hand.decode(first)
    hand.said["a"].clear()
    count = spec.num_prompt_tokens
    hand.step(Part(spec, 0, count, tuple(tables(hand.config)), new=True), finished_req_ids={"a"})
    assert hand.decode(spec) == expected(spec, hand.config)
    hand.step(finished_req_ids={"a"})
    assert not hand.model.requests


def test_tokens_that_the_scheduler_dropped_are_dropped() -> None:
    spec, hand = make_spec(), ByHand()
    hand.prefill(spec, [1, 2, 3, 4, 5, 6])
    hand.said["a"].clear()  # as after a failed load: the prompt is computed again, and sampled from again
    hand.step(Part(spec, 4, 6))
    assert hand.decode(spec) == expected(spec)


# Hits

FIRST = make_spec(length=8)
HITS = {
    "the same prefix": (FIRST, make_spec("b"), True),
    "another salt": (FIRST, make_spec("b", cache_salt="salt"), True),
    "another prefix": (FIRST, make_spec("b", seed=2), False),
    "another adapter": (replace(FIRST, lora=1), make_spec("b", lora=2), False),
    "no adapter": (replace(FIRST, lora=1), make_spec("b"), False),
    "the same adapter": (replace(FIRST, lora=1), make_spec("b", lora=1), True),
    "another image": (
        replace(FIRST, images=(IMAGE,)),
        make_spec("b", images=(replace(IMAGE, identifier="dog"),)),
        False,
    ),
    "the same image": (replace(FIRST, images=(IMAGE,)), make_spec("b", images=(IMAGE,)), True),
}


@pytest.mark.parametrize("name", HITS)
def test_output_is_the_oracles_when_a_hit_is_on_its_own_prefix_alone(name: str) -> None:
    first, spec, is_right = HITS[name]
    hand = ByHand()
    hand.prefill(first, [1, 2, 3])
    hand.prefill(spec, [1, 2, 4, 5, 6, 7], start=8)
    assert (hand.decode(spec) == expected(spec)) == is_right


def test_hit_on_blocks_of_the_same_step_finds_them_written() -> None:
    first, spec, hand = FIRST, make_spec("b"), ByHand()
    blocks = [1, 2, 4, 5, 6, 7]
    hand.step(Part(first, 0, 8, ([1, 2],), new=True), Part(spec, 8, 2, (blocks,), new=True))
    assert hand.decode(spec) == expected(spec)


@pytest.mark.parametrize("place", [0, 1])
def test_output_changes_when_two_requests_of_a_step_write_the_same_block(place: int) -> None:
    spec, other, hand = make_spec(), make_spec("b", seed=2), ByHand()
    parts = [Part(spec, 0, 10, ([1, 2, 3, 4, 5, 6],), new=True)]
    parts.insert(place, Part(other, 0, 10, ([11, 12, 2, 14, 15, 16],), new=True))
    hand.step(*parts)
    assert [hand.said[r.request_id] == expected(r)[:1] for r in (spec, other)] != [True, True]


# Drafts


@pytest.mark.parametrize("acceptance", [0.0, 0.5, 1.0])
def test_output_is_the_oracles_with_drafts_of_any_quality(acceptance: float) -> None:
    config = replace(DRAFTS, max_model_len=256, num_blocks=80, max_num_batched_tokens=256)
    spec, hand = make_spec(max_tokens=200, draft_acceptance=acceptance), ByHand(config)
    hand.prefill(spec, range(1, 60))
    rights = [0, 0]
    say = hand.step

    def counting_step(part: Part) -> ModelRunnerOutput:
        result = say(part)
        rights[0] += len(result.sampled_token_ids[0]) - 1
        rights[1] += len(part.drafts)
        return result

    hand.step = counting_step  # pyright: ignore[reportAttributeAccessIssue]
    assert hand.decode_with_drafts(spec) == expected(spec, config)
    assert {0.0: (0, 0.05), 0.5: (0.2, 0.4), 1.0: (1, 1)}[acceptance][0] <= rights[0] / rights[1]
    assert rights[0] / rights[1] <= {0.0: 0.05, 0.5: 0.4, 1.0: 1}[acceptance]


def test_drafts_are_given_of_a_prefill_that_goes_on_too_and_those_handed_out_are_copies() -> None:
    a, b, hand = make_spec(), make_spec("b", draft_acceptance=1.0), ByHand(DRAFTS)
    assert hand.model.take_draft_token_ids() is None
    hand.step(Part(a, 0, 4, ([1, 2, 3],), new=True), Part(b, 0, 10, ([4, 5, 6],), new=True))
    drafts = hand.model.take_draft_token_ids()
    assert drafts is not None
    assert drafts.req_ids == ["a", "b"]
    assert len(drafts.draft_token_ids[0]) == DRAFTS.num_spec_tokens
    assert drafts.draft_token_ids[1] == expected(b)[1:4]
    drafts.draft_token_ids[1].clear()
    assert drafts != hand.model.take_draft_token_ids()


@pytest.mark.parametrize("acceptance", [0.0, 0.6, 1.0])
@pytest.mark.parametrize("depth", [2, 3])
def test_output_is_the_oracles_when_rejections_are_in_flight(acceptance: float, depth: int) -> None:
    spec = make_spec(max_tokens=30, draft_acceptance=acceptance)
    hand, queue = ByHand(DRAFTS, asynchronous=True), []
    known = spec.num_prompt_tokens  # what the scheduler takes for computed: drafts in flight are accepted
    part = Part(spec, 0, known, (range(1, 20),), new=True)
    while len(hand.said.get("a", ())) < spec.max_tokens:
        step = hand.model.execute(hand.output(part))
        hand.model.sample(step)
        queue.append((step, len(part.drafts)))
        part = Part(spec, known, 4, drafts=[-1] * 3, num_in_flight=4 * depth)
        known += 4
        if len(queue) == depth:
            step, num_drafts = queue.pop(0)
            (tokens,) = hand.take(step).sampled_token_ids
            rejected = num_drafts - (len(tokens) - 1)
            assert rejected == 0 or acceptance < 1
            part.start -= rejected
            known -= rejected
    assert hand.said["a"][: spec.max_tokens] == expected(spec, DRAFTS)


def test_output_is_the_oracles_when_tokens_in_flight_are_inputs() -> None:
    spec, hand = make_spec(), ByHand(asynchronous=True)
    steps = [hand.model.execute(hand.output(Part(spec, 0, 10, (range(1, 8),), new=True)))]
    hand.model.sample(steps[0])
    for i in range(11):
        steps.append(hand.model.execute(hand.output(Part(spec, 10 + i, 1, num_in_flight=1))))
        hand.model.sample(steps[-1])
        hand.take(steps[i])
    hand.take(steps[-1])
    assert hand.said["a"] == expected(spec)


# Mamba


def mamba(mode: str, *groups: str, num_spec_tokens: int = 0) -> SchedulerConfig:
    return replace(
        CONFIG,
        kv_groups=groups or ("full_attention", "mamba"),
        mamba_cache_mode=mode,
        enable_prefix_caching=mode != "none",
        num_spec_tokens=num_spec_tokens,
        num_speculative_blocks=num_spec_tokens,
        num_blocks=150,
    )


def tables(config: SchedulerConfig) -> list[range]:
    """Blocks for a whole request, all different."""
    return [range(30 * g + 1, 30 * g + 25) for g in range(len(config.kv_groups))]


@pytest.mark.parametrize("mode", ["none", "align", "all"])
@pytest.mark.parametrize("num_spec_tokens", [0, 3])
@pytest.mark.parametrize(
    "groups", [("full_attention", "mamba"), ("mamba", "mamba", "full_attention"), ("mamba",)]
)
def test_output_is_the_oracles_with_mamba(mode: str, num_spec_tokens: int, groups: tuple[str, ...]) -> None:
    config = mamba(mode, *groups, num_spec_tokens=num_spec_tokens)
    spec, hand = make_spec(max_tokens=30, draft_acceptance=0.7), ByHand(config)
    hand.step(Part(spec, 0, 8, tuple(tables(config)), new=True))
    hand.step(Part(spec, 8, 2))
    said = hand.decode_with_drafts(spec) if num_spec_tokens else hand.decode(spec)
    assert said == expected(spec, config)


@pytest.mark.parametrize(
    ("mode", "num_tokens"),
    [("all", 4), *((mode, num_tokens) for mode in ("align", "all") for num_tokens in (8, 12, 16, 20, 24))],
)
@pytest.mark.parametrize("accepted", [0.0, 1.0])
def test_state_at_a_block_end_stays_in_its_block(mode: str, num_tokens: int, accepted: float) -> None:
    config = mamba(mode, num_spec_tokens=3)
    first = make_spec(length=8, max_tokens=20, draft_acceptance=accepted)
    hand = ByHand(config)
    hand.prefill(first, *tables(config))
    hand.decode_with_drafts(first)
    # A session's further request would start behind these tokens: continue from the state there.
    tokens = (prompt_token_ids(first) + hand.said["a"])[:num_tokens]
    full, state = (list(table) for table in tables(config))
    end = num_tokens // 4
    request = hand.output(Part(make_spec("b"), num_tokens, 1, new=True)).scheduled_new_reqs[0]
    request.prompt_token_ids = [*tokens, 5]
    request.block_ids = [*full[:end], 130], [*[0] * (end - 1), state[end - 1], 131, 132, 133, 134]
    out = hand.output()
    out.scheduled_new_reqs, out.num_scheduled_tokens = [request], {"b": 1}
    step = hand.model.execute(out)
    fresh = PagedModel(config)
    request.num_computed_tokens = 0
    request.block_ids = tuple(list(table) for table in tables(config))
    out.num_scheduled_tokens = {"b": num_tokens + 1}
    assert step.logits["b"].digests == fresh.execute(out).logits["b"].digests


@pytest.mark.parametrize("mode", ["none", "align", "all"])
def test_output_changes_when_a_mamba_state_is_overwritten(mode: str) -> None:
    config = mamba(mode)
    spec, other, hand = make_spec(), make_spec("b", seed=2, length=1), ByHand(config)
    hand.prefill(spec, *tables(config))
    hand.prefill(other, [29], [31 if mode == "none" else 33])
    assert hand.decode(spec)[1:] != expected(spec, config)[1:]


@pytest.mark.parametrize("same_step", [False, True])
def test_output_changes_when_a_hit_is_on_a_mamba_state_of_the_same_step(same_step: bool) -> None:
    first, spec, hand = FIRST, make_spec("b"), ByHand(mamba("align"))
    full, states = tables(hand.config)
    parts = (
        Part(first, 0, 8, (full, states), new=True),
        Part(spec, 8, 2, ([*full[:2], *range(70, 90)], [0, states[1], *range(90, 110)]), new=True),
    )
    for step in (parts,) if same_step else ((parts[0],), (parts[1],)):
        hand.step(*step)
    assert hand.said["a"] == expected(first, hand.config)[:1]
    assert (hand.decode(spec) == expected(spec, hand.config)) != same_step


def test_state_that_a_request_continues_from_may_be_overwritten_by_another_in_the_same_step() -> None:
    spec, other, hand = make_spec(), make_spec("b", seed=2, length=1), ByHand(mamba("align"))
    full, states = tables(hand.config)
    hand.step(Part(spec, 0, 8, (full, states), new=True))
    freed = states[1]  # the second step moves on to the next block of the table
    hand.step(Part(other, 0, 1, ([130], [freed]), new=True), Part(spec, 8, 2))
    assert hand.decode(spec) == expected(spec, hand.config)
    assert hand.said["b"] == expected(other, hand.config)[:1]


def test_output_changes_when_two_groups_swap_their_states() -> None:
    config = mamba("align", "mamba", "mamba", "full_attention")
    first, spec, hand = make_spec(length=8), make_spec("b"), ByHand(config)
    hand.prefill(first, [0, 1], [0, 2], [3, 4])
    full = [3, 4, *range(5, 10)]
    for hits in (1, 2), (2, 1):
        hand.said["b"] = []
        hand.prefill(spec, [0, hits[0], *range(10, 16)], [0, hits[1], *range(20, 26)], full, start=8)
        assert (hand.decode(spec) == expected(spec, config)) == (hits == (1, 2))
        hand.step(finished_req_ids={"b"})


def test_output_changes_when_two_groups_share_a_block() -> None:
    config = mamba("none")
    spec, hand = make_spec(), ByHand(config)
    hand.prefill(spec, range(1, 10), [1])
    assert hand.decode(spec) != expected(spec, config)


def test_model_refuses_drafts_without_mamba_blocks_for_their_states() -> None:
    with pytest.raises(
        InvalidArgumentError, match="num_speculative_blocks is 1; allowed: >= num_spec_tokens = 3"
    ):
        PagedModel(replace(mamba("align", num_spec_tokens=3), num_speculative_blocks=1))


# Images


@pytest.mark.parametrize("is_embed", [None, (True, False, True, True, False)])
def test_output_is_the_oracles_with_an_image_cut_by_steps(is_embed: tuple[bool, ...] | None) -> None:
    spec, hand = make_spec(images=(replace(IMAGE, is_embed=is_embed),)), ByHand()
    hand.step(Part(spec, 0, 4, (range(1, 8),), new=True, encoder=[0]))
    hand.step(Part(spec, 4, 6))
    assert hand.decode(spec) == expected(spec)
    assert expected(spec) != expected(replace(spec, images=()))
    assert expected(spec) != expected(replace(spec, images=(IMAGE, ImageSpec("dog", 8, 1))))


def test_placeholder_that_takes_no_embedding_is_a_token() -> None:
    framed = replace(IMAGE, is_embed=(False, True, True, True, False))
    outputs = [expected(make_spec(images=(image,))) for image in (IMAGE, framed, replace(IMAGE, length=3))]
    assert len(set(map(tuple, outputs))) == 3


def test_each_placeholder_takes_its_own_embedding() -> None:
    spec, hand = make_spec(images=(IMAGE,)), ByHand()
    hand.step(Part(spec, 0, 2, (range(1, 8),), new=True, encoder=[0]))
    hand.model.encoder_cache["cat"] = hand.model.encoder_cache["cat"][[0, 2, 1, 3, 4]]
    hand.step(Part(spec, 2, 8))
    assert hand.decode(spec) != expected(spec)


def test_encoder_cache_holds_what_was_computed_until_it_is_freed() -> None:
    a, b, hand = make_spec(images=(IMAGE,)), make_spec("b", seed=2, images=(IMAGE,)), ByHand()
    hand.prefill(a, range(1, 8))
    hand.step(Part(b, 0, 4, (range(8, 15),), new=True))
    with pytest.raises(StandInError, match="image cat is not in the encoder cache"):
        hand.step(Part(b, 4, 6), free_encoder_mm_hashes=["cat"])


def test_embedding_that_was_never_computed_is_an_error_when_its_placeholder_is() -> None:
    spec, hand = make_spec(images=(IMAGE,)), ByHand()
    hand.step(Part(spec, 0, 2, (range(1, 8),), new=True))
    with pytest.raises(StandInError, match="image cat is not in the encoder cache"):
        hand.step(Part(spec, 2, 1))


def test_encoder_cache_has_room_for_as_many_embeddings_as_the_scheduler_counts_on() -> None:
    dog = ImageSpec("dog", 2, 5, (True, False, True, False, True))
    mouse = ImageSpec("mouse", 2, 3)
    a, b, c = (make_spec(i, images=(image,)) for i, image in (("a", IMAGE), ("b", dog), ("c", mouse)))
    hand = ByHand()
    hand.prefill(a, range(1, 8))
    hand.prefill(b, range(8, 15))
    assert set(hand.model.encoder_cache) == {"cat", "dog"}
    late = hand.output(Part(c, 0, 10, (range(15, 22),), new=True, encoder=[0]))
    with pytest.raises(StandInError, match="the encoder cache has room for 10 embeddings, not for 11"):
        hand.model.execute(late)
    late.free_encoder_mm_hashes = ["dog"]
    hand.model.execute(late)
    assert set(hand.model.encoder_cache) == {"cat", "mouse"}


def test_reset_encoder_cache_drops_all() -> None:
    hand = ByHand()
    hand.prefill(make_spec(images=(IMAGE,)), range(1, 8))
    hand.model.reset_encoder_cache()
    assert not hand.model.encoder_cache


def test_eagle_head_misses_the_image_that_begins_behind_the_step() -> None:
    spec, hand = make_spec(images=(IMAGE,)), ByHand(replace(DRAFTS, spec_method="eagle"))
    hand.step(Part(spec, 0, 1, (range(1, 8),), new=True))
    assert hand.model.missing_for_drafter == []
    hand.step(Part(spec, 1, 1))
    assert hand.model.missing_for_drafter == [("a", "cat")]


# Grammar


def test_grammar_accepts_alternating_parities() -> None:
    grammar = StandInGrammar()
    assert grammar.validate_tokens([2, 3, 5, 4]) == [2, 3]
    assert grammar.accept_tokens("a", [2, 3])
    assert not grammar.accept_tokens("a", [8, 8])
    assert grammar.accept_tokens("a", [7])
    assert grammar.num_accepted == 4


def test_bitmask_stops_at_a_refused_draft() -> None:
    requests = {}
    for req_id, num_accepted in (("a", 0), ("b", 1), ("c", 2)):
        grammar = StandInGrammar()
        grammar.num_accepted = num_accepted
        requests[req_id] = SimpleNamespace(structured_output_request=StructuredOutputRequest(grammar))
    manager = StandInStructuredOutputManager()
    drafts = {"b": [1, 2], "c": [0, -1, -1]}
    assert manager.grammar_bitmask(requests, ["b", "a", "c"], drafts) == [[1, 0, 1], [0], [0, 1, None, None]]
    with pytest.raises(StandInError, match="b"):
        manager.grammar_bitmask(requests, ["b"], {"b": [1, 1]})


def test_model_obeys_the_bitmask_alone() -> None:
    spec, hand = make_spec(structured=True), ByHand()
    hand.step(Part(spec, 0, 10, (range(1, 8),), new=True), parities={"a": [0]})
    for i in range(1, spec.max_tokens):
        hand.step(Part(spec, 9 + i, 1), parities={"a": [i % 2]})
    assert hand.said["a"] == expected(spec)
    assert [token % 2 for token in expected(spec)] == [0, 1] * 6
    assert [token % 2 for token in expected(replace(spec, structured=False))] != [0, 1] * 6


def test_drafter_knows_the_grammar() -> None:
    spec, hand = (
        make_spec(structured=True, draft_acceptance=1.0),
        ByHand(replace(DRAFTS, spec_method="eagle")),
    )
    hand.step(Part(spec, 0, 10, (range(1, 8),), new=True), parities={"a": [0]})
    drafts = hand.model.take_draft_token_ids()
    assert drafts is not None
    assert drafts.draft_token_ids == [expected(spec, hand.config)[1:4]]


def test_drafts_after_a_refused_one_are_not_accepted() -> None:
    spec, hand = make_spec(structured=True, draft_acceptance=1.0), ByHand(DRAFTS)
    hand.step(Part(spec, 0, 10, (range(1, 8),), new=True), parities={"a": [0]})
    right = expected(spec, DRAFTS)
    drafts = [right[1], right[2] ^ 1, right[3]]
    hand.step(Part(spec, 10, 4, drafts=drafts), parities={"a": [1, 0, None, None]})
    assert hand.said["a"] == right[:3]


@pytest.mark.parametrize("request_has_one", [False, True])
def test_manager_advances_requests_with_a_grammar(request_has_one: bool) -> None:
    request = make_request(
        make_spec(), structured_output_request=StructuredOutputRequest() if request_has_one else None
    )
    assert StandInStructuredOutputManager().should_advance(request) == request_has_one


# Remote KV


class Remote(ByHand):
    """With a connector, asked by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.connector = StandInConnector(CONFIG)

    def ask(self, request: Request, num_local: int, blocks: Sequence[int]) -> tuple[int | None, bool]:
        count, asynchronous = self.connector.get_num_new_matched_tokens(request, num_local)
        table = SimpleNamespace(get_block_ids=lambda: (list(blocks),), get_unhashed_block_ids=list)
        self.connector.update_state_after_alloc(request, table, count or 0)
        return count, asynchronous

    def metadata(self) -> RemoteTransfers:
        return self.connector.build_connector_meta(None)


BLOCKS = [1, 2, 3, 4, 5, 6]


def remote(num_tokens: int, asynchronous: bool, **fields: Any) -> tuple[Remote, RequestSpec, Request]:
    spec = make_spec(remote=RemoteHit(num_tokens, asynchronous), images=(IMAGE,), lora=2, **fields)
    hand = Remote()
    hand.connector.add_request(spec)
    return hand, spec, make_request(spec)


@pytest.mark.parametrize("failed_block", [None, 0, 1])
def test_output_is_the_oracles_when_a_load_of_the_step_succeeds(failed_block: int | None) -> None:
    hand, spec, request = remote(7, asynchronous=False)
    assert hand.ask(request, 0, BLOCKS) == (7, False)
    if failed_block is not None:
        hand.model.fail_next_load(failed_block)
    part = Part(spec, 7, 3, (BLOCKS,), new=True)
    result = hand.step(part, kv_connector_metadata=hand.metadata())
    if failed_block is None:
        assert result.kv_connector_output is None
        assert hand.decode(spec) == expected(spec)
    else:
        assert result.kv_connector_output == KVConnectorOutput(invalid_block_ids={BLOCKS[failed_block]})
        assert hand.decode(spec) != expected(spec)


@pytest.mark.parametrize("failed_block", [None, 0, 1])
def test_failed_block_and_all_after_it_are_right_once_they_are_computed_again(
    failed_block: int | None,
) -> None:
    hand, spec, request = remote(7, asynchronous=False)
    hand.ask(request, 0, BLOCKS)
    hand.model.fail_next_load(failed_block or 0)
    hand.step(Part(spec, 7, 3, (BLOCKS,), new=True), kv_connector_metadata=hand.metadata())
    hand.said["a"].clear()
    start = 4 * (failed_block or 0)
    hand.step(Part(spec, start, 10 - start, encoder=[0]))
    assert hand.decode(spec) == expected(spec)


@pytest.mark.parametrize("ends", ["before", "after", "never"])
def test_output_changes_when_a_request_starts_before_its_load_has_ended(ends: str) -> None:
    hand, spec, request = remote(9, asynchronous=True)
    assert hand.ask(request, 0, BLOCKS[:2]) == (8, True)
    assert hand.step(kv_connector_metadata=hand.metadata()).kv_connector_output is None
    assert hand.model.loading == ["a"]
    if ends == "before":
        hand.model.finish_load("a")
        assert hand.model.loading == []
        assert hand.step().kv_connector_output == KVConnectorOutput(finished_recving={"a"})
    hand.prefill(spec, BLOCKS, start=8)
    if ends == "after":
        hand.model.finish_load("a")
    assert (hand.decode(spec) == expected(spec)) == (ends == "before")


def test_output_changes_when_a_stale_load_ends_in_blocks_of_somebody_else() -> None:
    hand, _, request = remote(8, asynchronous=True)
    other = make_spec("b", seed=2)
    hand.ask(request, 0, BLOCKS[:2])
    hand.step(kv_connector_metadata=hand.metadata())
    hand.prefill(other, BLOCKS)
    hand.model.finish_load("a")
    assert hand.decode(other)[1:] != expected(other)[1:]


def test_failed_asynchronous_load_names_its_block() -> None:
    hand, _, request = remote(10, asynchronous=True)
    assert hand.ask(request, 4, BLOCKS[:3]) == (6, True)
    hand.step(kv_connector_metadata=hand.metadata())
    hand.model.finish_load("a", failed_block=3)  # of two: the second
    report = hand.step().kv_connector_output
    assert report == KVConnectorOutput(finished_recving={"a"}, invalid_block_ids={3})


@pytest.mark.parametrize(
    ("hit", "num_local", "answer"),
    [
        (RemoteHit(9), 0, (9, False)),
        (RemoteHit(9), 8, (1, False)),
        (RemoteHit(7), 8, (0, False)),
        (RemoteHit(9, asynchronous=True), 0, (8, True)),
        (RemoteHit(10, asynchronous=True), 4, (6, True)),
        (RemoteHit(9, asynchronous=True), 8, (0, False)),
    ],
    ids=str,
)
def test_connector_counts_what_is_behind_the_local_tokens(
    hit: RemoteHit, num_local: int, answer: tuple[int, bool]
) -> None:
    connector, spec = StandInConnector(CONFIG), make_spec(remote=hit)
    connector.add_request(spec)
    assert connector.get_num_new_matched_tokens(make_request(spec), num_local) == answer
    assert connector.get_num_new_matched_tokens(make_request(make_spec("b")), 0) == (0, False)
    assert connector.reset_cache()
    assert connector.get_num_new_matched_tokens(make_request(spec), num_local) == (0, False)


def test_connector_does_not_know_at_first_when_it_is_polled() -> None:
    connector, spec = StandInConnector(CONFIG), make_spec(remote=RemoteHit(8, polls=2))
    connector.add_request(spec)
    answers = [connector.get_num_new_matched_tokens(make_request(spec), 0) for _ in range(3)]
    assert answers == [(None, False), (None, False), (8, False)]


def test_connector_refuses_groups_that_cannot_be_loaded() -> None:
    with pytest.raises(InvalidArgumentError, match="kv_groups"):
        StandInConnector(mamba("align"))


@pytest.mark.parametrize("overwritten", [False, True])
def test_kept_blocks_must_not_be_written_before_they_are_sent(overwritten: bool) -> None:
    hand = Remote()
    spec, other = make_spec(length=8, max_tokens=1), make_spec("b", seed=2, length=3)
    hand.prefill(spec, BLOCKS[:2])
    request = make_request(spec, kv_transfer_params={KEEP_BLOCKS: True})
    request.num_computed_tokens = 8
    request.append_output_token(hand.said["a"][0])
    assert hand.connector.request_finished(request, BLOCKS[:2]) == (True, {"kept": "a"})
    hand.step(finished_req_ids={"a"}, kv_connector_metadata=hand.metadata())
    assert hand.model.sending == ["a"]
    if overwritten:
        hand.prefill(other, [2])
        with pytest.raises(StandInError, match="a: its blocks were overwritten"):
            hand.model.finish_send("a")
    else:
        hand.prefill(other, [3])
        hand.model.finish_send("a")
        assert hand.step().kv_connector_output == KVConnectorOutput(finished_sending={"a"})
    assert hand.model.sending == []


def test_blocks_are_not_kept_twice() -> None:
    hand, spec, _ = remote(8, asynchronous=True)
    request = make_request(spec, kv_transfer_params={KEEP_BLOCKS: True})
    hand.ask(request, 0, BLOCKS[:2])
    assert hand.connector.request_finished(request, BLOCKS[:2]) == (False, None)
    hand.connector.update_connector_output(KVConnectorOutput(finished_recving={"a"}))
    assert hand.connector.request_finished(request, BLOCKS[:2])[0]
    assert hand.connector.request_finished(request, []) == (False, None)
    assert hand.connector.request_finished(make_request(spec), BLOCKS[:2]) == (False, None)


# What no model can do


@pytest.mark.parametrize(
    ("part", "reason"),
    [
        (Part(make_spec(), 10, 2), "asked for 2 tokens from 10 on with the drafts .*; it has 11 tokens"),
        (Part(make_spec(), 11, 1), "it has 11 tokens"),
        (Part(make_spec(), -1, 1), "it has 11 tokens"),
        (Part(make_spec(), 9, 2, drafts=[1]), "drafts .1.; it has 11 tokens"),
        (Part(make_spec(), 10, 2, drafts=[-1]), "drafts .-1."),
        (Part(make_spec(), 10, 3, drafts=[1, 2]), "13 tokens, but only 3 blocks of 4"),
    ],
)
def test_step_that_no_model_could_make_is_an_error(part: Part, reason: str) -> None:
    hand = ByHand()
    hand.prefill(make_spec(), [1, 2, 3])
    with pytest.raises(StandInError, match=reason):
        hand.step(part)


def test_position_beyond_max_model_len_is_an_error() -> None:
    spec, hand = make_spec(length=64), ByHand()
    hand.prefill(spec, range(1, 20))
    with pytest.raises(StandInError, match="asked for 1 tokens from 64 on"):
        hand.step(Part(spec, 64, 1))


def test_mamba_table_without_a_block_for_the_state_is_an_error() -> None:
    config, spec = mamba("align"), make_spec()
    with pytest.raises(StandInError, match="a: no mamba block 2, only 2"):
        ByHand(config).prefill(spec, range(1, 7), [31, 32])


def test_result_of_a_step_that_was_not_sampled_is_an_error() -> None:
    hand = ByHand()
    step = hand.model.execute(hand.output(Part(make_spec(), 0, 10, (range(1, 8),), new=True)))
    with pytest.raises(StandInError, match="the step of a was not sampled"):
        hand.model.result(step)


@pytest.mark.parametrize("num_common", [1, 2])
def test_common_prefix_must_be_common(num_common: int) -> None:
    a, b, hand = make_spec(), make_spec("b"), ByHand()
    hand.prefill(a, [1, 2, 3, 4])
    parts = Part(a, 10, 1), Part(b, 4, 6, ([1, 5, 6],), new=True)
    if num_common == 1:
        hand.step(*parts, num_common_prefix_blocks=[1])
        assert hand.said["b"] == expected(b)[:1]
    else:
        with pytest.raises(StandInError, match="group 0: not all share their first 2 blocks"):
            hand.step(*parts, num_common_prefix_blocks=[2])


# The oracle


def test_expected_output_ends_as_the_request_says() -> None:
    spec = make_spec(length=3, max_tokens=60)
    long = expected(spec)
    assert len(long) == 60
    assert expected(replace(spec, max_tokens=7)) == long[:7]
    assert len(expected(make_spec(length=40, max_tokens=60))) == CONFIG.max_model_len - 40
    stop = long[9]
    first = long.index(stop)
    assert expected(replace(spec, stop_token_ids=(stop,))) == long[: first + 1]
    again = expected(replace(spec, stop_token_ids=(stop,), min_tokens=first + 2))
    assert again[: first + 1] == long[: first + 1]
    assert len(again) > first + 1
    ended = [replace(spec, segments=((seed, 3),)) for seed in range(20)]
    ends = [EOS_TOKEN_ID in expected(s) for s in ended]
    assert any(ends)
    assert [expected(replace(s, eos=True))[-1] == EOS_TOKEN_ID for s in ended] == ends


def test_expected_output_of_a_session_goes_on_without_its_last_token() -> None:
    chunk = SessionChunk(((7, 5),), 9, (ImageSpec("cat", 1, 3),))
    spec = make_spec(max_tokens=4, chunks=(chunk,))
    first, second = expected_output(spec, CONFIG)
    assert first == expected(replace(spec, chunks=None))
    assert len(second) == 4  # as v0.17.0 counts
    hand = ByHand()
    hand.prefill(spec, range(1, 8))
    hand.decode(spec)
    out = hand.output(Part(spec, 13, 5, (range(1, 8),), new=True, encoder=[0]))
    out.scheduled_new_reqs[0].prompt_token_ids = prompt_token_ids(spec) + first[:-1] + prompt_token_ids(chunk)
    out.scheduled_new_reqs[0].mm_features = [MultiModalFeatureSpec("cat", PlaceholderRange(14, 3))]
    step = hand.model.execute(out)
    hand.model.sample(step)
    assert hand.model.result(step).sampled_token_ids == [second[:1]]


def test_grammar_of_a_session_goes_on_with_all_that_was_said() -> None:
    outputs = expected_output(
        make_spec(max_tokens=5, chunks=(SessionChunk(((7, 5),), 5),), structured=True), CONFIG
    )
    assert [token % 2 for tokens in outputs for token in tokens] == [0, 1] * 5


def told(
    tokens: list[int],
    finish_reason: FinishReason | None = None,
    stop_reason: int | None = None,
    client_index: int = 0,
) -> dict[int, EngineCoreOutputs]:
    return {client_index: EngineCoreOutputs([EngineCoreOutput("a", tokens, finish_reason, stop_reason)])}


def oracle_of(spec: RequestSpec) -> OutputOracle:
    oracle = OutputOracle(CONFIG)
    oracle.add_request(spec)
    return oracle


def test_oracle_accepts_what_it_expects_input_by_input() -> None:
    spec = make_spec(max_tokens=4, chunks=(SessionChunk(((7, 5),), 4),), client_index=3)
    oracle = oracle_of(spec)
    first, second = expected_output(spec, CONFIG)
    oracle.observe(told(first[:1], client_index=3))
    oracle.observe(told(first[1:], FinishReason.LENGTH, client_index=3))
    oracle.observe(told(second[:2], client_index=3))
    oracle.observe(told([], FinishReason.ABORT, client_index=3))
    oracle.observe({0: EngineCoreOutputs()})


@pytest.mark.parametrize(
    ("place", "token", "reason"),
    [
        (2, -1, "a: output token 2 of input 0 is -1, not "),
        (12, 5, "a: output token 12 of input 0 is 5, not nothing"),
    ],
)
def test_oracle_refuses_another_token(place: int, token: int, reason: str) -> None:
    spec = make_spec()
    with pytest.raises(OracleMismatchError, match=reason):
        oracle_of(spec).observe(told([*expected(spec)[:place], token]))


def test_oracle_refuses_another_client() -> None:
    spec = make_spec(client_index=1)
    with pytest.raises(OracleMismatchError, match="a: told to client 0, not 1"):
        oracle_of(spec).observe(told(expected(spec)[:1]))


STOP, LENGTH = FinishReason.STOP, FinishReason.LENGTH
PLAIN = make_spec(max_tokens=60, length=3)
TOKEN = expected(PLAIN)[4]
STOPPED = replace(PLAIN, stop_token_ids=(TOKEN,))
SEEDED = (replace(PLAIN, segments=((seed, 3),)) for seed in range(50))
ENDED = replace(next(spec for spec in SEEDED if EOS_TOKEN_ID in expected(spec)), eos=True)
ENDS: dict[str, tuple[RequestSpec, tuple[FinishReason, int | None]]] = {
    "max_tokens": (PLAIN, (LENGTH, None)),
    "max_model_len": (make_spec(length=40, max_tokens=60), (LENGTH, None)),
    "eos": (ENDED, (STOP, None)),
    "eos and a stop token": (replace(ENDED, stop_token_ids=(EOS_TOKEN_ID,)), (STOP, None)),
    "eos as a stop token": (
        replace(ENDED, stop_token_ids=(EOS_TOKEN_ID,), eos=False),
        (STOP, EOS_TOKEN_ID),
    ),
    "eos and max_tokens": (replace(ENDED, max_tokens=len(expected(ENDED))), (STOP, None)),
    "stop token": (STOPPED, (STOP, TOKEN)),
    "stop token and max_tokens": (replace(STOPPED, max_tokens=len(expected(STOPPED))), (STOP, TOKEN)),
}


@pytest.mark.parametrize("name", ENDS)
def test_oracle_accepts_the_right_reason_alone(name: str) -> None:
    spec, end = ENDS[name]
    for other in product((STOP, LENGTH, None), (None, EOS_TOKEN_ID, TOKEN)):
        if other == end:
            oracle_of(spec).observe(told(expected(spec), *end))
        else:
            with pytest.raises(OracleMismatchError, match="a: finish_reason and stop_reason are "):
                oracle_of(spec).observe(told(expected(spec), *other))


@pytest.mark.parametrize("end", [(STOP, None), (LENGTH, None), (None, 5)])
def test_oracle_refuses_an_end_before_the_last_token(end: tuple[FinishReason | None, int | None]) -> None:
    with pytest.raises(OracleMismatchError, match="after 11 of 12 tokens of input 0"):
        oracle_of(make_spec()).observe(told(expected(make_spec())[:11], *end))


def test_oracle_knows_that_a_stop_reason_stays_for_the_further_inputs_of_a_session() -> None:
    spec = replace(STOPPED, chunks=(SessionChunk(((7, 5),), 4),))
    first, second = expected_output(spec, CONFIG)
    for reason in (TOKEN, None):
        oracle = oracle_of(spec)
        oracle.observe(told(first, STOP, TOKEN))
        if reason is None:
            with pytest.raises(OracleMismatchError, match=f"None and None, not None and {TOKEN}, after 1 of"):
                oracle.observe(told(second[:1]))
        else:
            oracle.observe(told(second[:1], None, TOKEN))
            oracle.observe(told(second[1:], STOP if TOKEN in second else LENGTH, TOKEN))
