"""The driver itself: scenarios as data, what it compares, and that it sees what a broken scheduler does."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ascend_twin.equivalence_tests.installed_vllm import why_unavailable
from ascend_twin.equivalence_tests.paged_model import OutputOracle
from ascend_twin.equivalence_tests.scheduler_comparison import SchedulerDifference, first_difference, plain
from ascend_twin.equivalence_tests.scheduler_driver import Driver, drive, replay
from ascend_twin.equivalence_tests.scheduler_engines import Engine, OurEngine
from ascend_twin.equivalence_tests.scheduler_scenarios import (
    EVENTS,
    Abort,
    Add,
    Event,
    GrammarReady,
    Pause,
    RemoteDone,
    ResetEncoderCache,
    ResetPrefixCache,
    Scenario,
    SendingDone,
    SessionInput,
    Step,
)
from ascend_twin.equivalence_tests.vllm017 import VERSION, VLLMEngine
from ascend_twin.reference.errors import InvalidArgumentError, SchedulerStateError, UnavailableError
from ascend_twin.scheduler.config import SchedulerConfig
from ascend_twin.scheduler.output import EngineCoreOutput, SchedulerOutput
from ascend_twin.scheduler.workload import ImageSpec, RemoteHit, RequestSpec, SessionChunk

PAIRS = [
    pytest.param((OurEngine, OurEngine), id="ours"),
    pytest.param((OurEngine, VLLMEngine), id="vllm", marks=pytest.mark.vllm017),
]

CONFIG = SchedulerConfig(
    num_blocks=17, block_size=4, max_num_seqs=4, max_num_batched_tokens=16, max_model_len=48
)
HYBRID = ("full_attention", "mamba", "mamba", "mamba")
CONFIGS = {
    "full attention": CONFIG,
    "no prefix caching": dataclasses.replace(CONFIG, enable_prefix_caching=False),
    "priority": dataclasses.replace(CONFIG, policy="priority"),
    "mamba none": dataclasses.replace(CONFIG, kv_groups=HYBRID, num_blocks=40, enable_prefix_caching=False),
    "mamba all": dataclasses.replace(CONFIG, kv_groups=HYBRID, num_blocks=60, mamba_cache_mode="all"),
    "mamba align": dataclasses.replace(CONFIG, kv_groups=HYBRID, num_blocks=40, mamba_cache_mode="align"),
    "lora": dataclasses.replace(CONFIG, max_loras=1),
    "encoder": dataclasses.replace(CONFIG, max_num_encoder_input_tokens=6, encoder_cache_size=8),
    "ngram": dataclasses.replace(CONFIG, num_spec_tokens=3),
    "eagle": dataclasses.replace(CONFIG, num_spec_tokens=3, spec_method="eagle"),
    "draft model": dataclasses.replace(CONFIG, num_spec_tokens=3, spec_method="draft_model"),
}


def _request(number: int, **fields: Any) -> RequestSpec:
    """A prompt of 8 shared and a few other tokens."""
    own = 3 + 5 * number % 9
    given: dict[str, Any] = {"segments": ((1, 8), (2 + number % 3, own)), "max_tokens": 6, **fields}
    return RequestSpec(f"r{number}", number, **given)


def _mix(config: SchedulerConfig, **fields: Any) -> tuple[Event, ...]:
    """Six requests, one after the other, then steps until all is done."""
    events: list[Event] = []
    for number in range(6):
        own: dict[str, Any] = {"draft_acceptance": 0.5, "priority": number % 3, **fields}
        if config.max_loras is not None:
            own["lora"] = 1 + number % 2
        if config.encoder_cache_size:
            own["images"] = (ImageSpec(f"image{number % 3}", 2, 5),)
        events += [Add(_request(number, **own)), Step()]
    return (*events, Step(60))


@pytest.mark.parametrize("engines", PAIRS)
@pytest.mark.parametrize("async_scheduling", [False, True])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_engines_agree_until_all_is_done(
    config: SchedulerConfig, async_scheduling: bool, engines: tuple[type[Engine], ...]
) -> None:
    scenario = Scenario(config, _mix(config), async_scheduling)
    driver = drive(scenario, engines, oracle=OutputOracle(config))
    assert driver.crash is None
    assert not driver.first.scheduler.requests
    assert driver.features["stop_max_tokens"] == 6


SESSION = _request(0, chunks=(SessionChunk(((5, 6),), 3),))
GRAMMAR = _request(0, structured=True, max_tokens=12, draft_acceptance=0.5)
IMAGES = _request(0, images=(ImageSpec("a", 0, 4), ImageSpec("b", 5, 4)))
ASYNC_HIT, SYNC_HIT = RemoteHit(8, asynchronous=True, polls=1), RemoteHit(6)
CHUNKED = _mix(CONFIG, segments=((1, 8), (9, 15)))
FEATURES: list[tuple[str, SchedulerConfig, tuple[Event, ...], bool]] = [
    ("chunked_prefill", CONFIG, CHUNKED, False),
    ("long_prefill_threshold", dataclasses.replace(CONFIG, long_prefill_token_threshold=6), CHUNKED, False),
    ("prefix_hit", CONFIG, _mix(CONFIG), False),
    ("eviction", CONFIG, _mix(CONFIG), False),
    ("common_prefix", CONFIG, _mix(CONFIG), False),
    ("preemption", CONFIG, _mix(CONFIG, max_tokens=20), False),
    ("resumption", CONFIG, _mix(CONFIG, max_tokens=20), False),
    ("priority_preemption", CONFIGS["priority"], _mix(CONFIG, max_tokens=20), False),
    ("lora_skip", CONFIGS["lora"], _mix(CONFIGS["lora"]), False),
    ("encoder_input", CONFIGS["encoder"], _mix(CONFIGS["encoder"]), False),
    ("encoder_eviction", CONFIGS["encoder"], _mix(CONFIGS["encoder"]), False),
    ("mamba_split", CONFIGS["mamba align"], _mix(CONFIGS["mamba align"]), False),
    ("draft_accepted", CONFIGS["ngram"], _mix(CONFIGS["ngram"]), False),
    ("draft_rejected", CONFIGS["ngram"], _mix(CONFIGS["ngram"]), False),
    ("draft_trimmed", CONFIGS["ngram"], (Add(_request(0, max_tokens=60)), Step(60)), False),
    ("invalid_draft", CONFIGS["ngram"], (Add(GRAMMAR), GrammarReady(0), Step(20)), False),
    ("full_prefix_hit", CONFIG, (Add(_request(0)), Step(), Add(_request(9)), Step()), False),
    ("skip_reading_prefix_cache", CONFIG, _mix(CONFIG, skip_reading_prefix_cache=True), False),
    ("encoder_budget_stop", CONFIGS["encoder"], (Add(IMAGES), Step(9)), False),
    ("lookahead", CONFIGS["eagle"], _mix(CONFIGS["eagle"]), False),
    ("stop_eos", CONFIG, _mix(CONFIG, eos=True, max_tokens=20), False),
    ("stop_token", CONFIG, _mix(CONFIG, stop_token_ids=tuple(range(1, 30))), False),
    ("stop_max_model_len", CONFIG, (Add(_request(0, max_tokens=60)), Step(60)), False),
    ("session_resumed", CONFIG, (Add(SESSION), Step(9), SessionInput(0), Step(9)), False),
    ("session_ended", CONFIG, (Add(SESSION), SessionInput(0), SessionInput(0), Step(20)), False),
    ("grammar_wait", CONFIG, (Add(_request(0, structured=True)), Step()), False),
    ("grammar_promoted", CONFIG, (Add(_request(0, structured=True)), GrammarReady(0), Step(9)), False),
    ("abort_running", CONFIG, (Add(_request(0)), Step(), Abort((0,)), Step()), False),
    ("abort_waiting", CONFIG, (Add(_request(0)), Abort(None), Step()), False),
    ("late_output_of_finished", CONFIG, (Add(_request(0)), Abort((0,), late=True), Step()), False),
    ("reset_prefix_cache", CONFIG, (*_mix(CONFIG), ResetPrefixCache()), False),
    ("reset_running", CONFIG, (Add(_request(0)), Step(), ResetPrefixCache(running=True), Step(9)), False),
    ("reset_encoder_cache", CONFIG, (ResetEncoderCache(),), False),
    ("paused_new", CONFIG, (Add(_request(0)), Step(), Pause(1), Add(_request(1)), Step(9)), False),
    ("remote_poll", CONFIG, (Add(_request(0, remote=ASYNC_HIT)), Step(3)), True),
    ("remote_sync_load", CONFIG, (Add(_request(0, remote=SYNC_HIT)), Step(9)), True),
    (
        "remote_async_load",
        CONFIG,
        (Add(_request(0, remote=ASYNC_HIT)), Step(3), RemoteDone(0), Step(9)),
        True,
    ),
    (
        "remote_failed_load",
        CONFIG,
        (Add(_request(0, remote=ASYNC_HIT)), Step(3), RemoteDone(0, 1), Step(9)),
        True,
    ),
    (
        "remote_delayed_free",
        CONFIG,
        (Add(_request(0), keep_blocks=True), Step(9), SendingDone(0), Step(9)),
        True,
    ),
]


@pytest.mark.parametrize("engines", PAIRS)
@pytest.mark.parametrize(("feature", "config", "events", "connector"), FEATURES, ids=[f[0] for f in FEATURES])
def test_feature_is_counted_when_it_is_at_work(
    feature: str,
    config: SchedulerConfig,
    events: tuple[Event, ...],
    connector: bool,
    engines: tuple[type[Engine], ...],
) -> None:
    driver = drive(Scenario(config, events, connector=connector), engines)
    assert driver.crash is None
    assert driver.features[feature] > 0, driver.features


@pytest.mark.parametrize("events", [(), (Step(3),), (Abort((1, 2)), Abort(None, late=True), Step())])
def test_event_that_applies_to_nothing_does_nothing(events: tuple[Event, ...]) -> None:
    others = (GrammarReady(3), SessionInput(1), RemoteDone(2), SendingDone(0), ResetEncoderCache())
    driver = drive(Scenario(CONFIG, (*events, *others), connector=True))
    assert driver.num_steps == 0
    assert set(driver.features.elements()) <= {"reset_encoder_cache"}


def test_request_is_refused_when_its_id_was_used_or_it_is_too_long() -> None:
    long = RequestSpec("long", 0, ((1, CONFIG.max_model_len),), 1)
    driver = drive(Scenario(CONFIG, (Add(_request(0)), Add(_request(0)), Add(long))))
    assert list(driver.first.scheduler.requests) == ["r0"]


def _break(method: str, wrap: Callable[[Any, Callable[..., Any]], Callable[..., Any]]) -> type[Engine]:
    """Our engine with one method of its scheduler replaced."""

    class Broken(OurEngine):
        name = "broken"

        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options)
            setattr(self.scheduler, method, wrap(self.scheduler, getattr(self.scheduler, method)))

    return Broken


def _one_token_less(scheduler: Any, schedule: Callable[..., Any]) -> Callable[..., Any]:
    def schedule_less() -> SchedulerOutput:
        out = schedule()
        return dataclasses.replace(out, total_num_scheduled_tokens=out.total_num_scheduled_tokens - 1)

    return schedule_less


def _other_order(scheduler: Any, schedule: Callable[..., Any]) -> Callable[..., Any]:
    def schedule_reordered() -> SchedulerOutput:
        out = schedule()
        return dataclasses.replace(
            out, num_scheduled_tokens=dict(reversed(list(out.num_scheduled_tokens.items())))
        )

    return schedule_reordered


def _forgotten_preemption(scheduler: Any, add_request: Callable[..., Any]) -> Callable[..., Any]:
    def add_changed(request: Any) -> None:
        add_request(request)
        request.num_preemptions += 1

    return add_changed


def _raises(scheduler: Any, update: Callable[..., Any]) -> Callable[..., Any]:
    def raise_error(*args: Any) -> None:
        raise KeyError("r9")

    return raise_error


@pytest.mark.parametrize(
    ("method", "wrap", "message"),
    [
        (
            "schedule",
            _one_token_less,
            r"schedule\(\) of ours and broken: \.total_num_scheduled_tokens: 11, and 10",
        ),
        ("schedule", _other_order, r"\.num_scheduled_tokens\[0\]\[0\]: 'r0', and 'r1'"),
        (
            "add_request",
            _forgotten_preemption,
            r"state after Add .*: \.requests\.r0\.num_preemptions: 0, and 1",
        ),
        ("update_from_output", _raises, r"update_from_output\(\): only one raises, broken: KeyError: 'r9'"),
    ],
)
def test_difference_is_named_by_its_path(method: str, wrap: Any, message: str) -> None:
    scenario = Scenario(CONFIG, (Add(_request(0)), Step(), Add(_request(1)), Step(9)))
    with pytest.raises(SchedulerDifference, match=message):
        drive(scenario, (OurEngine, _break(method, wrap)))


def _asserts(scheduler: Any, update: Callable[..., Any]) -> Callable[..., Any]:
    def fail(*args: Any) -> None:
        raise SchedulerStateError("as upstream asserts")

    return fail


def test_scenario_ends_when_every_engine_raises() -> None:
    broken = _break("update_from_output", _asserts)
    driver = drive(Scenario(CONFIG, (Add(_request(0)), Step(9), Add(_request(1)))), (broken, broken))
    assert driver.num_steps == 1
    assert driver.features["upstream_crash"] == 1
    assert "update_from_output(): broken: SchedulerStateError: as upstream asserts; broken" in (
        driver.crash or ""
    )
    assert list(driver.first.scheduler.requests) == ["r0"]


def test_engines_differ_when_each_raises_something_else() -> None:
    def refuse(scheduler: Any, update: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args: [][0]

    pair = (_break("update_from_output", _raises), _break("update_from_output", refuse))
    with pytest.raises(SchedulerDifference, match="something else, broken: KeyError: 'r9'; broken: Ind"):
        drive(Scenario(CONFIG, (Add(_request(0)), Step())), pair)


def test_error_of_a_single_engine_is_raised_when_upstream_has_no_assertion_there() -> None:
    with pytest.raises(KeyError, match="r9"):
        drive(Scenario(CONFIG, (Add(_request(0)), Step())), (_break("update_from_output", _raises),))


def test_left_out_field_is_refused_when_it_is_set() -> None:
    kind = dataclasses.make_dataclass(
        "EngineCoreOutput", [("request_id", str), ("num_nans_in_logits", int, 0)]
    )
    assert plain(kind("r0")) == {"request_id": "r0"}
    with pytest.raises(SchedulerDifference, match=r"EngineCoreOutput\.num_nans_in_logits is 1"):
        plain(kind("r0", 1))


def test_plain_value_of_a_set_is_sorted_and_of_a_dict_keeps_its_order() -> None:
    assert plain({"b", "a"}) == ["a", "b"]
    assert plain({2: (1, None), 1: {3}}) == [[2, [1, None]], [1, [3]]]
    assert plain(EngineCoreOutput("r0", [5]))["new_token_ids"] == [5]


@pytest.mark.parametrize(
    ("first", "second", "difference"),
    [
        ([1, [2, 3]], [1, [2, 4]], "[1][1]: 3, and 4"),
        ({"a": {"b": 1}}, {"a": {"b": 2}}, ".a.b: 1, and 2"),
        ({"a": 1, "b": 2}, {"a": 1}, ".b: only in the first"),
        ({"a": 1}, {"a": 1, "b": 2}, ".b: not in the first"),
        ([1], [1, 2], ": [1], and [1, 2]"),
        ({"a": 1}, {"a": 1}, None),
    ],
)
def test_first_difference_names_path_and_values(first: Any, second: Any, difference: str | None) -> None:
    assert first_difference(first, second) == difference


EVERY_EVENT: tuple[Event, ...] = (
    Add(_request(0, remote=ASYNC_HIT, images=(ImageSpec("i", 1, 2, (True, False)),)), keep_blocks=True),
    Add(SESSION),
    Step(2, eager=True),
    Abort((1, 2), late=True),
    Abort(None),
    Pause(2),
    ResetPrefixCache(running=True, connector=True),
    ResetEncoderCache(),
    GrammarReady(1),
    SessionInput(2),
    RemoteDone(1, failed_block=3),
    SendingDone(4),
)


def test_scenario_is_the_same_after_json(tmp_path: Path) -> None:
    assert {type(event).__name__ for event in EVERY_EVENT} == set(EVENTS)
    path = tmp_path / "scenario.json"
    for scenario in (
        Scenario(CONFIGS["mamba align"], EVERY_EVENT, async_scheduling=True, async_depth=3),
        Scenario(CONFIGS["priority"], EVERY_EVENT, connector=True),
    ):
        scenario.save(path)
        assert Scenario.load(path) == scenario
        assert Scenario.from_json(json.loads(json.dumps(scenario.to_json()))) == scenario


def test_saved_scenario_is_replayed(tmp_path: Path) -> None:
    path = tmp_path / "scenario.json"
    Scenario(CONFIG, _mix(CONFIG), async_scheduling=True).save(path)
    driver = replay(path, (OurEngine, OurEngine))
    assert driver.features["stop_max_tokens"] == 6


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"events": 3}, "events is 3; allowed: a tuple, each of it an event"),
        ({"comment": ""}, "comment is unknown; allowed: config, events, async_scheduling"),
        ({"config": None}, "config is None; allowed: a JSON object"),
        ({"config": {}}, "config.num_blocks is missing"),
        ({"config": {"num_block": 3}}, "config.num_block is unknown; allowed: num_blocks"),
        ({"config": {"num_blocks": 1}}, "config.num_blocks is 1; allowed: "),
        ({"config": {"num_blocks": 99, "kv_groups": 5}}, "config.kv_groups is 5; allowed: "),
        ({"async_scheduling": "yes"}, "async_scheduling is 'yes'; allowed: True or False"),
        ({"async_depth": 1}, "async_depth is 1; allowed: an int >= 2"),
        ({"async_depth": 2.5}, "async_depth is 2.5; allowed: an int >= 2"),
        ({"async_depth": True}, "async_depth is True; allowed: an int >= 2"),
        ({"connector": 1}, "connector is 1; allowed: True or False"),
        (
            {
                "connector": True,
                "config": {"num_blocks": 9, "kv_groups": ["mamba"], "enable_prefix_caching": False},
            },
            "connector is True; allowed: False with kv_groups ('mamba',)",
        ),
    ],
)
def test_scenario_is_refused_when_a_part_does_not_fit(change: dict[str, Any], message: str) -> None:
    data = {**Scenario(CONFIG, ()).to_json(), **change}
    with pytest.raises(InvalidArgumentError) as error:
        Scenario.from_json(data)
    assert str(error.value).startswith(message)


@pytest.mark.parametrize(
    ("event", "message"),
    [
        (5, " is 5; allowed: an object whose event is one of Add, Step"),
        ({"event": "Stop"}, " is {'event': 'Stop'}; allowed: an object whose event is one of Add, Step"),
        ({"event": []}, " is {'event': []}; allowed: an object whose event is one of Add, Step"),
        ({"event": "Add", "request": None}, ".request is None; allowed: a RequestSpec"),
        ({"event": "Add", "request": {}}, ".request.request_id is missing"),
        (
            {"event": "Add", "request": _request(0).to_json(), "keep_blocks": 1},
            ".keep_blocks is 1; allowed: True or False",
        ),
        ({"event": "Step", "times": 3}, ".times is unknown; allowed: count, eager"),
        ({"event": "Step", "count": "x"}, ".count is 'x'; allowed: an int >= 1"),
        ({"event": "Step", "count": 0}, ".count is 0; allowed: an int >= 1"),
        ({"event": "Step", "count": True}, ".count is True; allowed: an int >= 1"),
        ({"event": "Step", "eager": None}, ".eager is None; allowed: True or False"),
        ({"event": "Abort"}, ".targets is missing"),
        ({"event": "Abort", "targets": "all"}, ".targets is 'all'; allowed: a tuple of ints, or None"),
        ({"event": "Abort", "targets": [0, 1.5]}, ".targets[1] is 1.5; allowed: an int >= 0"),
        ({"event": "Abort", "targets": None, "late": 0}, ".late is 0; allowed: True or False"),
        ({"event": "Pause", "state": 3}, ".state is 3; allowed: an int from 0 to 2"),
        ({"event": "ResetPrefixCache", "running": "no"}, ".running is 'no'; allowed: True or False"),
        ({"event": "ResetPrefixCache", "connector": 0}, ".connector is 0; allowed: True or False"),
        ({"event": "ResetEncoderCache", "index": 0}, ".index is unknown; allowed: nothing"),
        ({"event": "GrammarReady", "index": "x"}, ".index is 'x'; allowed: an int >= 0"),
        ({"event": "SessionInput", "index": None}, ".index is None; allowed: an int >= 0"),
        ({"event": "RemoteDone", "index": -1}, ".index is -1; allowed: an int >= 0"),
        (
            {"event": "RemoteDone", "index": 0, "failed_block": "x"},
            ".failed_block is 'x'; allowed: an int >= 0",
        ),
        ({"event": "SendingDone", "index": 1.0}, ".index is 1.0; allowed: an int >= 0"),
        (
            {"event": "Add", "request": {**_request(0).to_json(), "segments": "long" * 99}},
            ".request.segments is 'longlong",
        ),
    ],
)
def test_event_is_refused_when_a_field_does_not_fit(event: Any, message: str) -> None:
    data = {**Scenario(CONFIG, ()).to_json(), "events": [{"event": "Step"}, event]}
    with pytest.raises(InvalidArgumentError) as error:
        Scenario.from_json(data)
    assert str(error.value).startswith(f"events[1]{message}")
    assert len(str(error.value)) < 300


@pytest.mark.parametrize("text", [b"", b"{", b"\xff", b"[" * 100_000])
def test_file_is_refused_when_it_is_not_json(text: bytes, tmp_path: Path) -> None:
    path = tmp_path / "scenario.json"
    path.write_bytes(text)
    with pytest.raises(InvalidArgumentError, match="the file is not JSON: "):
        Scenario.load(path)


def test_scenario_is_refused_when_it_is_nested_too_deeply() -> None:
    data = Scenario(CONFIG, (Add(_request(0)),)).to_json()
    for _ in range(2_000):
        data["events"][0]["request"]["segments"] = [data["events"][0]["request"]["segments"]]
    with pytest.raises(InvalidArgumentError, match="the scenario is nested too deeply"):
        Scenario.from_json(data)


def test_scenario_of_a_case_is_loaded(tmp_path: Path) -> None:
    scenario = Scenario(CONFIG, EVERY_EVENT)
    path = tmp_path / "case.json"
    path.write_text(json.dumps({"name": "a_case", "scenario": scenario.to_json()}))
    assert Scenario.load(path) == scenario


@pytest.mark.skipif(why_unavailable(VERSION) is None, reason="vllm 0.17.0 is installed")
def test_real_engine_says_how_to_get_it_when_vllm_is_not_installed() -> None:
    with pytest.raises(UnavailableError, match="vllm is not installed; run `tox run -e vllm017`"):
        VLLMEngine(CONFIG, asynchronous=False, clock=float)


@pytest.mark.vllm017
def test_real_engine_sees_a_changed_upstream_field() -> None:
    """What ours leave out is compared with its default: nothing that appears there goes unseen."""

    class Changed(VLLMEngine):
        def make_request(self, spec: RequestSpec, given: Any) -> Any:
            request = super().make_request(spec, given)
            request.trace_headers = {"traceparent": "00"}
            return request

    with pytest.raises(
        SchedulerDifference, match=r"Request\.trace_headers is .*, and ours has no such field"
    ):
        drive(Scenario(CONFIG, (Add(_request(0)), Step())), (OurEngine, Changed))


def test_async_depth_is_refused_when_it_leaves_no_queue() -> None:
    with pytest.raises(InvalidArgumentError, match="async_depth is 1; allowed: >= 2"):
        Driver(CONFIG, async_scheduling=True, async_depth=1)
