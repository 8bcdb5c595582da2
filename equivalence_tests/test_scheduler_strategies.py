"""The generators of scheduler scenarios: what they draw is legal and possible, and the corners do occur."""

import itertools
import json
import random
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
from hypothesis import find, given, settings
from hypothesis import strategies as st

from ascend_twin.equivalence_tests.scheduler_driver import Driver
from ascend_twin.equivalence_tests.scheduler_scenarios import (
    Add,
    GrammarReady,
    RemoteDone,
    SessionInput,
    Step,
)
from ascend_twin.equivalence_tests.scheduler_strategies import (
    CLASHES,
    FEATURES,
    RandomChooser,
    Setup,
    choose_mix,
    choose_request,
    choose_setup,
    image_gallery,
    request_mixes,
    request_specs,
    scheduler_configs,
    scheduler_setups,
)
from ascend_twin.reference.errors import InvalidArgumentError
from ascend_twin.scheduler.config import SchedulerConfig
from ascend_twin.scheduler.workload import RequestMix, RequestSpec, SessionChunk, prompt_token_ids

NUM_SETUPS = 1500
NUM_REQUESTS = 6


@cache
def _sample() -> list[tuple[Setup, RequestMix]]:
    choosers = (RandomChooser(random.Random(seed)) for seed in range(NUM_SETUPS))
    return [(setup, choose_mix(c, setup, NUM_REQUESTS)) for c in choosers for setup in (choose_setup(c),)]


def _requests(*features: str) -> Iterator[tuple[SchedulerConfig, RequestSpec]]:
    for setup, mix in _sample():
        if set(features) <= set(setup.features):
            yield from ((setup.config, request) for request in mix.requests)


def _share(flags: Iterator[bool]) -> float:
    counts = Counter(flags)
    return counts[True] / counts.total()


def _check_legal(setup: Setup) -> None:
    """The rules of vLLM 0.17.0 that SchedulerConfig leaves to its maker, and the bounds that are promised."""
    config = setup.config
    assert 8 <= config.num_blocks <= 40
    assert config.block_size in (4, 8)
    if setup.async_scheduling and config.num_spec_tokens:
        assert config.spec_method != "ngram"
    if "mamba" in config.kv_groups:
        assert not setup.connector
        assert (config.mamba_cache_mode == "none") == (not config.enable_prefix_caching)
        assert config.num_speculative_blocks == config.num_spec_tokens
    if config.mamba_cache_mode == "align":
        assert config.enable_chunked_prefill
        assert not config.disable_chunked_mm_input
        assert config.max_num_batched_tokens >= config.block_size
        assert not 0 < config.long_prefill_token_threshold < config.block_size


def _check_possible(config: SchedulerConfig, request: RequestSpec) -> None:
    """Whether `request` can be finished when it is alone."""
    inputs = [SessionChunk(request.segments, request.max_tokens, request.images), *(request.chunks or ())]
    num_tokens = [len(prompt_token_ids(x)) for x in inputs]
    # An input of a session leaves its output, at most; v0.17.0 keeps the first one's max_tokens.
    outputs = (len(inputs) - 1) * max(x.max_tokens for x in inputs)
    assert sum(num_tokens) + outputs < config.max_model_len
    assert num_tokens[0] + request.min_tokens <= config.max_model_len
    assert config.max_loras is not None or request.lora is None
    for image in itertools.chain.from_iterable(x.images for x in inputs):
        num_embeds = image.length if image.is_embed is None else sum(image.is_embed)
        assert num_embeds <= min(config.encoder_cache_size, config.max_num_encoder_input_tokens)
        if config.disable_chunked_mm_input:
            threshold = config.long_prefill_token_threshold or config.max_model_len
            assert image.length < min(config.max_num_batched_tokens, threshold)
    for x in inputs if config.use_eagle else ():
        ends = [0, *(image.offset + image.length for image in x.images)]
        assert all(image.offset > end for image, end in zip(x.images, ends, strict=False))


@given(setup=scheduler_setups(), data=st.data())
def test_scheduler_setups_are_legal_and_their_requests_possible(setup: Setup, data: st.DataObject) -> None:
    _check_legal(setup)
    mix = data.draw(request_mixes(setup))
    assert 1 <= len(mix.requests) <= 8
    for request in mix.requests:
        _check_possible(setup.config, request)


def test_choose_setup_is_legal_and_its_requests_possible_over_a_large_sample() -> None:
    for setup, mix in _sample():
        _check_legal(setup)
        for request in mix.requests:
            _check_possible(setup.config, request)


@given(config=scheduler_configs(), data=st.data())
def test_request_specs_fit_a_configuration_of_unknown_features(
    config: SchedulerConfig, data: st.DataObject
) -> None:
    request = data.draw(request_specs(config, request_id="x"))
    _check_possible(config, request)
    assert request.request_id == "x"
    assert request.remote is None or config.kv_groups == ("full_attention",)


def test_choose_setup_turns_on_every_feature_and_every_pair_that_goes_together() -> None:
    singles = Counter(f for setup, _ in _sample() for f in setup.features)
    pairs = Counter(p for setup, _ in _sample() for p in itertools.combinations(setup.features, 2))
    assert all(singles[f] > NUM_SETUPS / 10 for f in FEATURES)
    assert {p for p in itertools.combinations(FEATURES, 2) if not pairs[p]} == {
        tuple(sorted(clash, key=FEATURES.index)) for clash in CLASHES
    }
    assert any(not setup.features for setup, _ in _sample())


@pytest.mark.parametrize(
    ("feature", "shown"),
    [
        ("async", lambda s: s.async_scheduling),
        ("priority", lambda s: s.config.policy == "priority"),
        ("long_prefill_threshold", lambda s: s.config.long_prefill_token_threshold > 0),
        ("whole_prefills", lambda s: not s.config.enable_chunked_prefill),
        ("no_prefix_caching", lambda s: not s.config.enable_prefix_caching),
        ("drafts", lambda s: s.config.num_spec_tokens > 0),
        ("adapters", lambda s: s.config.max_loras is not None),
        ("images", lambda s: s.config.encoder_cache_size > 0),
        ("mamba", lambda s: "mamba" in s.config.kv_groups),
        ("remote", lambda s: s.connector),
    ],
)
def test_choose_setup_does_what_a_feature_says_and_only_then(
    feature: str, shown: Callable[[Setup], bool]
) -> None:
    assert all(shown(setup) == (feature in setup.features) for setup, _ in _sample())


@pytest.mark.parametrize(
    ("feature", "asks"),
    [
        ("priority", lambda r: r.priority > 0),
        ("drafts", lambda r: r.draft_acceptance > 0),
        ("adapters", lambda r: r.lora is not None),
        ("images", lambda r: bool(r.images)),
        ("sessions", lambda r: r.chunks is not None),
        ("grammars", lambda r: r.structured),
        ("remote", lambda r: r.remote is not None),
    ],
)
def test_choose_mix_asks_for_a_feature_often_where_it_is_on_and_never_where_not(
    feature: str, asks: Callable[[RequestSpec], bool]
) -> None:
    assert 0.3 < _share(asks(request) for _, request in _requests(feature)) < 1
    off = (mix for setup, mix in _sample() if feature not in setup.features)
    assert not any(asks(request) for mix in off for request in mix.requests)


def test_choose_setup_draws_every_value_of_every_choice() -> None:
    configs = [setup.config for setup, _ in _sample()]
    mamba = [c for c in configs if "mamba" in c.kv_groups]
    assert {c.spec_method for c in configs if c.num_spec_tokens} == {"ngram", "eagle", "draft_model"}
    assert {c.num_spec_tokens for c in configs} == {0, 1, 2, 3}
    assert {c.mamba_cache_mode for c in mamba} == {"none", "align", "all"}
    assert {len(c.kv_groups) for c in mamba} == {1, 2, 4}
    assert {c.max_loras for c in configs} == {None, 1, 2}
    assert {c.disable_chunked_mm_input for c in configs} == {False, True}
    assert {c.kv_load_failure_policy for c in configs} == {"recompute", "fail"}
    assert {setup.async_depth for setup, _ in _sample() if setup.async_scheduling} == {2, 3}
    assert {(c.log_stats, c.include_finished_set) for c in configs} == set(
        itertools.product((False, True), repeat=2)
    )


def test_choose_mix_asks_for_more_blocks_than_there_are_in_most_setups() -> None:
    def crowded(setup: Setup, mix: RequestMix) -> bool:
        c = setup.config
        blocks = sorted(
            -(-min(r.num_prompt_tokens + r.max_tokens, c.max_model_len) // c.block_size) for r in mix.requests
        )
        return c.max_num_seqs > 1 and sum(blocks[-c.max_num_seqs :]) > c.num_blocks - 1

    assert _share(crowded(*pair) for pair in _sample()) > 0.4


def test_choose_mix_shares_prefixes_of_at_least_a_block_between_most_requests() -> None:
    def has_sharer(config: SchedulerConfig, request: RequestSpec, mix: RequestMix) -> bool:
        first = prompt_token_ids(request)[: config.block_size]
        return any(
            prompt_token_ids(r)[: config.block_size] == first for r in mix.requests if r is not request
        )

    assert 0.5 < _share(has_sharer(s.config, r, mix) for s, mix in _sample() for r in mix.requests) < 0.95


def test_choose_request_puts_prompts_on_and_beside_block_boundaries() -> None:
    rests = Counter(r.num_prompt_tokens % c.block_size for c, r in _requests() if c.block_size == 8)
    assert all(rests[rest] > 0.17 * rests.total() for rest in (7, 0, 1, 4))


def test_choose_request_covers_every_field() -> None:
    requests = [r for _, r in _requests()]
    assert {r.max_tokens for r in requests} >= {1, 2, 12}
    assert any(r.num_prompt_tokens + r.max_tokens > c.max_model_len for c, r in _requests())
    assert {len(r.chunks) for r in requests if r.chunks is not None} == {0, 1, 2, 3}
    assert {(r.remote.asynchronous, r.remote.polls) for r in requests if r.remote} == set(
        itertools.product((False, True), (0, 1, 2))
    )
    assert any(r.remote and r.remote.num_tokens == r.num_prompt_tokens for r in requests)
    assert {r.lora for r in requests} == {None, 1, 2, 3}
    assert {r.priority for r in requests} == {0, 1, 2}
    assert {r.client_index for r in requests} == {0, 1}
    assert {len(r.images) for r in requests} == {0, 1, 2}
    assert any(chunk.images for r in requests for chunk in r.chunks or ())
    assert any(image.is_embed for r in requests for image in r.images)
    for name in ("min_tokens", "eos", "stop_token_ids", "cache_salt", "skip_reading_prefix_cache"):
        assert 0.01 < _share(bool(getattr(r, name)) for r in requests) < 0.6, name


def test_choose_request_never_gives_one_identifier_to_two_images() -> None:
    for setup, mix in _sample():
        inputs = (x for r in mix.requests for x in (r, *(r.chunks or ())))
        images = {replace(image, offset=0) for x in inputs for image in x.images}
        assert images <= set(image_gallery(setup.config))
        assert len({image.identifier for image in images}) == len(images)


def test_images_are_too_many_for_the_encoder_cache_in_most_setups() -> None:
    def crowded(config: SchedulerConfig) -> bool:
        return sum(image.length for image in image_gallery(config)) > config.encoder_cache_size

    assert _share(crowded(s.config) for s, _ in _sample() if "images" in s.features) > 0.7


def test_choose_mix_follows_from_the_seed_and_survives_json() -> None:
    def mix(seed: int) -> RequestMix:
        chooser = RandomChooser(random.Random(seed))
        return choose_mix(chooser, choose_setup(chooser), 5)

    mixes = [mix(seed) for seed in range(50)]
    assert mixes == [mix(seed) for seed in range(50)]
    assert len(set(mixes)) == 50
    assert [RequestMix.from_json(json.loads(json.dumps(m.to_json()))) for m in mixes] == mixes


def test_choose_request_gives_no_remote_hit_where_no_connector_can_be() -> None:
    config = next(c for c, _ in _requests("mamba"))
    requests = [choose_request(RandomChooser(random.Random(seed)), config) for seed in range(100)]
    assert any(r.chunks is not None for r in requests)
    assert all(r.remote is None for r in requests)


@pytest.mark.parametrize("always", [("mamba", "remote"), ("images", "videos")])
def test_choose_setup_refuses_features_that_do_not_go_together(always: tuple[str, ...]) -> None:
    with pytest.raises(
        InvalidArgumentError, match=r"^always is \('.*'\); allowed: some of .*, but not both of "
    ):
        choose_setup(RandomChooser(random.Random(0)), always)


@pytest.mark.parametrize("feature", FEATURES)
def test_scheduler_setups_can_be_told_a_feature(feature: str) -> None:
    setup = find(
        scheduler_setups(always=(feature,)), lambda s: True, settings=SEARCH, random=random.Random(0)
    )
    assert setup.features == (feature,)


SEARCH = settings(max_examples=500, database=None)


def test_scheduler_setups_shrink_to_a_plain_one() -> None:
    found = find(
        scheduler_setups(), lambda s: s.config.max_num_seqs > 1, settings=SEARCH, random=random.Random(0)
    )
    assert found == Setup(
        SchedulerConfig(
            num_blocks=8, block_size=4, max_num_seqs=2, max_num_batched_tokens=4, max_model_len=12
        )
    )


@pytest.mark.parametrize(
    ("shows", "changed"),
    [
        (lambda r: r.num_prompt_tokens > 8, {"segments": ((0, 9),)}),
        (lambda r: r.structured and r.chunks, {"structured": True, "chunks": (SessionChunk(((0, 1),), 1),)}),
    ],
)
def test_request_specs_shrink_to_a_plain_one(
    shows: Callable[[RequestSpec], bool], changed: dict[str, Any]
) -> None:
    config = SchedulerConfig(
        num_blocks=9, block_size=4, max_num_seqs=4, max_num_batched_tokens=16, max_model_len=20
    )
    found = find(request_specs(config), shows, settings=SEARCH, random=random.Random(0))
    assert found == replace(RequestSpec("r0", 0, ((0, 1),), 1), **changed)


def _finishes_alone(setup: Setup, request: RequestSpec) -> bool:
    driver = Driver(
        setup.config,
        async_scheduling=setup.async_scheduling,
        async_depth=setup.async_depth,
        connector=setup.connector,
    )
    driver.apply(Add(request))
    for _ in range(300):
        if not driver.first.scheduler.requests:
            return True
        for event in (GrammarReady(0), SessionInput(0), RemoteDone(0), Step()):
            driver.apply(event)
    return False


def test_every_request_can_be_finished_when_it_is_alone() -> None:
    for setup, mix in _sample()[:400]:
        for request in mix.requests[:2]:
            # v0.17.0 counts what is in flight behind the end of an input as computed tokens of the session.
            if request.chunks is None or not (setup.config.num_spec_tokens or setup.async_scheduling):
                assert _finishes_alone(setup, request), (setup, request)
