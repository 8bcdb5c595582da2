"""Scheduler configurations and requests that force the corners: full pools, shared prefixes, odd lengths.

Every generator is written once, over a `Chooser`. Choices come from Hypothesis (`scheduler_setups`,
`scheduler_configs`, `request_specs`, `request_mixes`), where the first option is the simplest and failures
shrink to it, or from a `random.Random` (`RandomChooser` and the functions `choose_...`), for a command line.

A setup turns on a few features only, so that each is exercised in depth and all combinations occur. What is
drawn is legal in vLLM 0.17.0 (comments that start with "Legal:" say by which rule), and no request is
impossible: each could be finished if it were alone (not so a session with drafts or under async scheduling:
there v0.17.0 itself loses count).
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypeVar

from hypothesis import strategies as st

from ..reference.errors import invalid_argument
from ..scheduler.config import SchedulerConfig
from ..scheduler.workload import ImageSpec, RemoteHit, RequestMix, RequestSpec, SessionChunk

T = TypeVar("T")

REQUEST_FEATURES = ("sessions", "grammars", "remote")  # what a configuration does not tell
FEATURES = (
    "async",
    "priority",
    "long_prefill_threshold",
    "whole_prefills",
    "no_prefix_caching",
    "drafts",
    "adapters",
    "images",
    "mamba",
    *REQUEST_FEATURES,
)
# A connector is not verified with mamba groups, by upstream's own assertion.
CLASHES = (("mamba", "remote"),)

FEWEST_BLOCKS, MOST_BLOCKS = 8, 40
KV_GROUPS = (
    ("full_attention", "mamba"),
    ("mamba", "full_attention"),
    ("mamba", "mamba", "mamba", "full_attention"),
    ("mamba",),
)
# Whether EOS ends a request, and which other tokens do.
ENDINGS = ((False, ()), (True, ()), (False, (5, 8, 13, 21, 34, 55)), (True, tuple(range(1, 64, 4))))
ACCEPTANCES = (1.0, 0.8, 0.5, 0.0)


class Chooser(Protocol):
    """Where choices come from."""

    def integer(self, least: int, most: int) -> int:
        """An int from `least` (the simplest) to `most`."""
        ...

    def choice(self, options: Sequence[T]) -> T:
        """One of `options`, of which the first is the simplest."""
        ...

    def chance(self, percent: int) -> bool:
        """True in `percent` of 100 cases; False is simpler."""
        ...


class RandomChooser:
    """Choices of a random number generator."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng

    def integer(self, least: int, most: int) -> int:
        return self.rng.randint(least, most)

    def choice(self, options: Sequence[T]) -> T:
        return self.rng.choice(options)

    def chance(self, percent: int) -> bool:
        return self.rng.randrange(100) < percent


class DrawChooser:
    """Choices of Hypothesis."""

    def __init__(self, draw: Callable[[st.SearchStrategy[Any]], Any]) -> None:
        self.draw = draw

    def integer(self, least: int, most: int) -> int:
        return self.draw(st.integers(least, most))

    def choice(self, options: Sequence[T]) -> T:
        return self.draw(st.sampled_from(options))

    def chance(self, percent: int) -> bool:
        return self.draw(st.integers(0, 99)) >= 100 - percent


@dataclass(frozen=True)
class Setup:
    """A scheduler, and what its requests may ask for.

    Attributes:
        config: of the scheduler.
        features: what is on, of FEATURES, in that order.
        async_depth: steps in flight under async scheduling, at most.
    """

    config: SchedulerConfig
    features: tuple[str, ...] = ()
    async_depth: int = 2

    @property
    def async_scheduling(self) -> bool:
        return "async" in self.features

    @property
    def connector(self) -> bool:
        """Whether there is a remote KV cache."""
        return "remote" in self.features


def choose_setup(chooser: Chooser, always: Sequence[str] = (), among: Sequence[str] = FEATURES) -> Setup:
    """A setup with the features `always`, and up to five more, of those in `among`.

    Raises:
        InvalidArgumentError: for features that are unknown, or do not go together.
    """
    features = _choose_features(chooser, always, among)
    async_depth = chooser.choice((2, 3)) if "async" in features else 2
    return Setup(_choose_config(chooser, features), features, async_depth)


def choose_request(
    chooser: Chooser, config: SchedulerConfig, features: Sequence[str] | None = None, request_id: str = "r0"
) -> RequestSpec:
    """A request that `config` can finish when it is alone.

    Lengths are around block boundaries; prompts begin with one of two segments, so that most share a prefix
    with another.

    Args:
        chooser: of every choice.
        config: of the scheduler that it is for.
        features: of REQUEST_FEATURES, those that may be asked for (others are ignored); None is all that
            `config` permits.
        request_id: of the request.
    """
    if features is None:
        features = [f for f in REQUEST_FEATURES if f != "remote" or config.kv_groups == ("full_attention",)]
    # A session ends before max_model_len: v0.17.0 never goes on with one whose inputs do not fit.
    is_session = "sessions" in features and chooser.chance(40)
    num_inputs = chooser.integer(1, 4) if is_session else 1
    room = (config.max_model_len - 1) // num_inputs
    most_prompt, most_output = (room - room // 2, room // 2) if is_session else (room, config.max_model_len)

    first, *others = [_choose_input(chooser, config, most_prompt, most_output) for _ in range(num_inputs)]
    num_tokens = sum(length for _, length in first.segments)
    eos, stop_token_ids = chooser.choice(ENDINGS)
    # v0.17.0 ends nobody before min_tokens, not even at max_model_len.
    most_min_tokens = min(first.max_tokens, config.max_model_len - num_tokens)
    has_min_tokens = eos and not is_session and chooser.chance(40)
    unusual = chooser.choice(("salt", "unread")) if chooser.chance(15) else "nothing"
    return RequestSpec(
        request_id=request_id,
        arrival_ms=chooser.integer(0, 3) if config.policy == "priority" else 0,
        segments=first.segments,
        max_tokens=first.max_tokens,
        min_tokens=chooser.integer(1, most_min_tokens) if has_min_tokens else 0,
        eos=eos,
        stop_token_ids=stop_token_ids,
        priority=chooser.integer(0, 2) if config.policy == "priority" else 0,
        client_index=chooser.integer(0, 1) if config.include_finished_set else 0,
        draft_acceptance=chooser.choice(ACCEPTANCES) if config.num_spec_tokens else 0.0,
        images=first.images,
        lora=chooser.integer(1, 3) if config.max_loras and chooser.chance(75) else None,
        cache_salt="salt" if unusual == "salt" else None,
        skip_reading_prefix_cache=unusual == "unread",
        chunks=tuple(others) if is_session else None,
        structured="grammars" in features and chooser.chance(50),
        remote=_choose_remote(chooser, config, num_tokens) if "remote" in features else None,
    )


def choose_mix(chooser: Chooser, setup: Setup, num_requests: int) -> RequestMix:
    """Requests "r0", "r1", ... for one scheduler."""
    return RequestMix(
        tuple(choose_request(chooser, setup.config, setup.features, f"r{i}") for i in range(num_requests))
    )


@st.composite
def scheduler_setups(draw: st.DrawFn, always: Sequence[str] = (), among: Sequence[str] = FEATURES) -> Setup:
    """Setups with the features `always`, and up to five more, of those in `among`."""
    return choose_setup(DrawChooser(draw), always, among)


def scheduler_configs(always: Sequence[str] = ()) -> st.SearchStrategy[SchedulerConfig]:
    """Configurations with small pools, and a few features each."""
    return scheduler_setups(always).map(lambda setup: setup.config)


@st.composite
def request_specs(
    draw: st.DrawFn,
    config: SchedulerConfig,
    features: Sequence[str] | None = None,
    request_id: str = "r0",
) -> RequestSpec:
    """Requests for `config`; see `choose_request`."""
    return choose_request(DrawChooser(draw), config, features, request_id)


@st.composite
def request_mixes(draw: st.DrawFn, setup: Setup, max_num_requests: int = 8) -> RequestMix:
    """One to `max_num_requests` requests for one scheduler."""
    # A list, because Hypothesis can leave out any of it.
    specs = st.lists(request_specs(setup.config, setup.features), min_size=1, max_size=max_num_requests)
    return RequestMix(tuple(replace(spec, request_id=f"r{i}") for i, spec in enumerate(draw(specs))))


def _choose_features(chooser: Chooser, always: Sequence[str], among: Sequence[str]) -> tuple[str, ...]:
    on = set(always)
    if not on <= set(FEATURES) or _clashes(on):
        invalid_argument("always", tuple(always), f"some of {FEATURES}, but not both of {CLASHES}")
    for _ in range(5):
        if chooser.chance(50):
            on.add(chooser.choice([f for f in among if f in on or not _clashes({f, *on})]))
    return tuple(f for f in FEATURES if f in on)


def _clashes(features: set[str]) -> bool:
    return any(features.issuperset(clash) for clash in CLASHES)


def _choose_config(chooser: Chooser, features: Sequence[str]) -> SchedulerConfig:
    block_size = chooser.choice((4, 8))
    max_model_len = chooser.integer(3, 6 if "mamba" in features else 8) * block_size - chooser.integer(0, 2)
    max_num_seqs = chooser.integer(1, 6)
    budget = chooser.choice((block_size, block_size + 3, 3 * block_size, max_model_len, 4 * max_model_len))
    # Legal: the budget has room for a whole prompt where none may be cut.
    budget = max(budget, max_model_len if "whole_prefills" in features else 0)
    config = SchedulerConfig(
        num_blocks=10_000,
        block_size=block_size,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=budget,
        max_model_len=max_model_len,
        policy="priority" if "priority" in features else "fcfs",
        enable_chunked_prefill="whole_prefills" not in features,
        enable_prefix_caching="no_prefix_caching" not in features,
        max_loras=chooser.integer(1, 2) if "adapters" in features else None,
        log_stats=not chooser.chance(10),
        include_finished_set=chooser.chance(20),
    )
    if "long_prefill_threshold" in features:
        # Legal: with mamba blocks, a step of one request has room for one of them.
        threshold = chooser.choice((block_size, block_size + 1, 2 * block_size))
        config = replace(config, long_prefill_token_threshold=threshold)
    if "drafts" in features:
        # Legal: async scheduling takes no drafts from n-grams.
        methods = ("eagle", "draft_model") if "async" in features else ("ngram", "eagle", "draft_model")
        config = replace(config, num_spec_tokens=chooser.integer(1, 3), spec_method=chooser.choice(methods))
    if "mamba" in features:
        config = _with_mamba(chooser, config)
    if "images" in features:
        config = _with_images(chooser, config)
    if "remote" in features:
        config = replace(config, kv_load_failure_policy=chooser.choice(("recompute", "fail")))
    fewest = max(FEWEST_BLOCKS, config.min_num_blocks)
    return replace(config, num_blocks=min(fewest + chooser.integer(0, 12), MOST_BLOCKS))


def _with_mamba(chooser: Chooser, config: SchedulerConfig) -> SchedulerConfig:
    # Legal: states are kept for prefix caching alone, and align cuts prompts at block ends.
    modes = ("align", "all") if config.enable_chunked_prefill else ("all",)
    return replace(
        config,
        kv_groups=chooser.choice(KV_GROUPS),
        mamba_cache_mode=chooser.choice(modes) if config.enable_prefix_caching else "none",
        num_speculative_blocks=config.num_spec_tokens,
    )


def _with_images(chooser: Chooser, config: SchedulerConfig) -> SchedulerConfig:
    if config.need_mamba_block_aligned_split:
        # A step that stops before an image stops at the block before it, where the last image may still be
        # needed. Requests that hold one image each and wait for another's room would wait for ever.
        most = config.max_model_len
        return replace(
            config, max_num_encoder_input_tokens=most, encoder_cache_size=most * config.max_num_seqs
        )
    largest = chooser.integer(1, 2 * config.block_size)
    return replace(
        config,
        max_num_encoder_input_tokens=largest * chooser.integer(1, 2),
        encoder_cache_size=largest * chooser.integer(1, 2),
        disable_chunked_mm_input=chooser.chance(30),
    )


def _choose_length(chooser: Chooser, config: SchedulerConfig, most: int) -> int:
    """A multiple of the block size, a number beside one, or one between two; 1 to `most`."""
    corners = {
        end + d
        for end in range(0, most + 2, config.block_size)
        for d in (-1, 0, 1, config.block_size // 2)
        if 1 <= end + d <= most
    }
    return chooser.choice(sorted(corners))


def _choose_input(
    chooser: Chooser, config: SchedulerConfig, most_prompt: int, most_output: int
) -> SessionChunk:
    num_tokens = _choose_length(chooser, config, most_prompt)
    segments = [(chooser.integer(0, 1), num_tokens)]
    if num_tokens > 1 and chooser.chance(60):
        num_own = _choose_length(chooser, config, num_tokens // 2)
        segments = [(segments[0][0], num_tokens - num_own), (chooser.integer(0, 5), num_own)]
    max_tokens = min(chooser.choice((*range(1, 13), config.max_model_len, config.max_model_len)), most_output)
    return SessionChunk(tuple(segments), max_tokens, _choose_images(chooser, config, num_tokens))


def _choose_images(chooser: Chooser, config: SchedulerConfig, num_tokens: int) -> tuple[ImageSpec, ...]:
    gallery = image_gallery(config)
    if not gallery:
        return ()
    images: list[ImageSpec] = []
    end = 0
    for _ in range(chooser.integer(0, 2)):
        image = chooser.choice(gallery)
        # Looking one token ahead, v0.17.0 waits for room for an image before it leaves one that touches it.
        offset = end + chooser.choice((0, 1, config.block_size - 1)) + config.use_eagle
        end = offset + image.length
        if end <= num_tokens:
            images.append(replace(image, offset=offset))
    return tuple(images)


def image_gallery(config: SchedulerConfig) -> tuple[ImageSpec, ...]:
    """All images that requests for `config` have, at offset 0: from one token to two blocks long.

    Every other one has a frame: a first and a last placeholder that take no embedding. None fits without an
    encoder cache.
    """
    most = min(config.max_num_encoder_input_tokens, config.encoder_cache_size, config.max_model_len)
    if config.disable_chunked_mm_input:
        # A step must have room for a whole image, and for the token before it that is left to it by eagle.
        step = min(config.max_num_batched_tokens, config.long_prefill_token_threshold or config.max_model_len)
        most = min(most, step - 1)
    lengths = (1, config.block_size - 1, config.block_size + 1, 2 * config.block_size)
    return tuple(_image(i, min(length, most)) for i, length in enumerate(lengths) if most)


def _image(index: int, length: int) -> ImageSpec:
    framed = index % 2 == 1 and length > 2
    is_embed = (False, *[True] * (length - 2), False) if framed else None
    return ImageSpec(f"image{index}", 0, length, is_embed)


def _choose_remote(chooser: Chooser, config: SchedulerConfig, num_tokens: int) -> RemoteHit | None:
    # With all of one token loaded, v0.17.0 is back at none, and loads again for ever.
    if num_tokens == 1 or not chooser.chance(75):
        return None
    asynchronous = chooser.chance(50)
    most = num_tokens if asynchronous else num_tokens - 1  # a step that loads computes a token, too
    return RemoteHit(_choose_length(chooser, config, most), asynchronous, chooser.choice((0, 1, 2)))
