"""Wrong input to the scheduler: one error that names argument, value and what is allowed; nothing changes."""

from dataclasses import replace
from typing import Any

import pytest

from ascend_twin.equivalence_tests.paged_model import StandInConnector
from ascend_twin.reference.errors import InvalidArgumentError, SchedulerStateError
from ascend_twin.scheduler import (
    LoRARequest,
    Request,
    RequestStatus,
    SamplingParams,
    SchedulerConfig,
    UpstreamScheduler,
)
from ascend_twin.scheduler.output import ModelRunnerOutput
from ascend_twin.scheduler.request import MultiModalFeatureSpec, PlaceholderRange

CONFIG = SchedulerConfig(
    num_blocks=9, block_size=4, max_num_seqs=2, max_num_batched_tokens=16, max_model_len=32
)
ALIGN = {"kv_groups": ("full_attention", "mamba"), "mamba_cache_mode": "align", "num_blocks": 30}
PARAMS = SamplingParams(max_tokens=2)


def _image(offset: int, length: int) -> MultiModalFeatureSpec:
    return MultiModalFeatureSpec("image", PlaceholderRange(offset, length))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_blocks": None}, "num_blocks is None; allowed: an int >= 1"),
        ({"max_num_seqs": True}, "max_num_seqs is True; allowed: an int >= 1"),
        ({"max_model_len": 32.0}, "max_model_len is 32.0; allowed: an int >= 1"),
        ({"block_size": 0}, "block_size is 0; allowed: an int >= 1"),
        ({"num_spec_tokens": -1}, "num_spec_tokens is -1; allowed: an int >= 0"),
        ({"max_loras": 0}, "max_loras is 0; allowed: an int >= 1, or None"),
        ({"policy": "lifo"}, "policy is 'lifo'; allowed: one of ('fcfs', 'priority')"),
        ({"spec_method": None}, "spec_method is None; allowed: one of"),
        ({"enable_prefix_caching": "no"}, "enable_prefix_caching is 'no'; allowed: True or False"),
        ({"kv_groups": ["full_attention"]}, "kv_groups is ['full_attention']; allowed: a tuple"),
        ({"kv_groups": ()}, "kv_groups is (); allowed: a tuple of at least one"),
        ({"num_blocks": 8}, "num_blocks is 8; allowed: >= 9"),
        ({"enable_chunked_prefill": False}, "max_num_batched_tokens is 16; allowed: >= max_model_len = 32"),
        ({"mamba_cache_mode": "align"}, "mamba_cache_mode is 'align'; allowed: none without mamba"),
        ({"kv_groups": ("full_attention", "mamba")}, "mamba_cache_mode is 'none'; allowed: all or align"),
        ({"kv_groups": ("full_attention",) * 2, "num_blocks": 30}, "kv_groups is ('full_attention', 'full_"),
        ({**ALIGN, "max_num_batched_tokens": 3}, "max_num_batched_tokens is 3; allowed: >= 4 = block_size"),
        (
            {**ALIGN, "long_prefill_token_threshold": 3},
            "long_prefill_token_threshold is 3; allowed: 0, or >=",
        ),
        ({**ALIGN, "disable_chunked_mm_input": True}, "disable_chunked_mm_input is True; allowed: False"),
    ],
)
def test_a_config_that_no_vllm_would_start_with_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidArgumentError) as error:
        replace(CONFIG, **fields)
    assert str(error.value).startswith(message)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"request_id": ""}, "request_id is ''; allowed: a text"),
        ({"request_id": 7}, "request_id is 7; allowed: a text"),
        ({"prompt_token_ids": "abc"}, "prompt_token_ids is 'abc'; allowed: ints"),
        ({"prompt_token_ids": [1, None]}, "prompt_token_ids is [1, None]; allowed: ints"),
        ({"prompt_token_ids": [2**70]}, "prompt_token_ids is [1180591620717411303424]; allowed: ints"),
        ({"sampling_params": None}, "sampling_params is None; allowed: a SamplingParams"),
        ({"priority": None}, "priority is None; allowed: an int"),
        ({"arrival_time": "now"}, "arrival_time is 'now'; allowed: a finite number"),
        ({"arrival_time": float("nan")}, "arrival_time is nan; allowed: a finite number"),
        ({"client_index": -1}, "client_index is -1; allowed: an int >= 0"),
        ({"lora_request": "adapter"}, "lora_request is 'adapter'; allowed: a LoRARequest"),
        ({"cache_salt": 5}, "cache_salt is 5; allowed: a str"),
        ({"resumable": "no"}, "resumable is 'no'; allowed: True or False"),
        (
            {"mm_features": [_image(3, 4)]},
            "mm_features[0].mm_position.offset is 3; allowed: an int from 0 to 1",
        ),
        (
            {"mm_features": [_image(1, 2), _image(2, 2)]},
            "mm_features[1].mm_position.offset is 2; allowed: an",
        ),
    ],
)
def test_a_request_that_is_wrong_is_refused(fields: dict[str, Any], message: str) -> None:
    given: dict[str, Any] = {"request_id": "a", "prompt_token_ids": [1] * 5, "sampling_params": PARAMS}
    with pytest.raises(InvalidArgumentError) as error:
        Request(**{**given, **fields})
    assert str(error.value).startswith(message)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"max_tokens": 0}, "max_tokens is 0; allowed: an int >= 1"),
        ({"max_tokens": None}, "max_tokens is None; allowed: an int >= 1"),
        ({"min_tokens": 3}, "min_tokens is 3; allowed: an int from 0 to 2"),
        ({"eos_token_id": "eos"}, "eos_token_id is 'eos'; allowed: an int >= 0"),
        ({"stop_token_ids": 5}, "stop_token_ids is 5; allowed: a tuple, each of it a int"),
        ({"stop_token_ids": (1, "a")}, "stop_token_ids is (1, 'a'); allowed: a tuple, each of it a int"),
    ],
)
def test_sampling_params_that_are_wrong_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidArgumentError) as error:
        replace(PARAMS, **fields)
    assert str(error.value) == message


def test_parts_of_requests_that_are_wrong_are_refused() -> None:
    for make, message in (
        (lambda: LoRARequest("", 1), "lora_name is ''"),
        (lambda: LoRARequest("a", 0), "lora_int_id is 0"),
        (lambda: PlaceholderRange(-1, 2), "offset is -1"),
        (lambda: PlaceholderRange(0, 0), "length is 0"),
        (lambda: PlaceholderRange(0, 2, (True,)), "is_embed is \\(True,\\); allowed: a tuple of 2"),
        (lambda: MultiModalFeatureSpec("", PlaceholderRange(0, 1)), "identifier is ''"),
    ):
        with pytest.raises(InvalidArgumentError, match=message):
            make()


@pytest.fixture
def scheduler() -> UpstreamScheduler:
    scheduler = UpstreamScheduler(replace(CONFIG, policy="priority"))
    scheduler.add_request(Request("a", [1] * 5, PARAMS))
    scheduler.add_request(Request("s", [2] * 5, PARAMS, resumable=True))
    return scheduler


@pytest.mark.parametrize(
    ("request_id", "num_tokens", "resumable", "message"),
    [
        ("b", 0, False, r"len\(prompt_token_ids\) is 0; allowed: 1 to max_model_len - 1 = 31"),
        ("b", 32, False, r"len\(prompt_token_ids\) is 32; allowed: 1 to max_model_len - 1 = 31"),
        ("s", 0, True, r"len\(prompt_token_ids\) is 0; allowed"),
        ("s", 32, True, r"len\(prompt_token_ids\) is 32; allowed"),
        ("a", 5, False, "request_id is a; allowed: the id of no unfinished request, or of a session"),
    ],
)
def test_what_add_request_refuses_changes_nothing(
    scheduler: UpstreamScheduler, request_id: str, num_tokens: int, resumable: bool, message: str
) -> None:
    with pytest.raises(InvalidArgumentError, match=message):
        scheduler.add_request(Request(request_id, [1] * num_tokens, PARAMS, resumable=resumable))
    assert [request.request_id for request in scheduler.waiting] == ["a", "s"]
    assert scheduler.schedule().num_scheduled_tokens == {"a": 5, "s": 5}


def test_what_is_no_request_is_refused(scheduler: UpstreamScheduler) -> None:
    with pytest.raises(InvalidArgumentError, match=r"^request is 'b'; allowed"):
        scheduler.add_request("b")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("request_ids", "status", "message"),
    [
        ("a", None, "finished_status is None; allowed: a FINISHED_ status"),
        ("a", RequestStatus.RUNNING, "finished_status is .*; allowed: a FINISHED_ status"),
        ("a", 99, "finished_status is 99; allowed: a FINISHED_ status"),
        (5, RequestStatus.FINISHED_ABORTED, "request_ids is 5; allowed: an id, several, or None"),
        (["a", 5], RequestStatus.FINISHED_ABORTED, "request_ids is 5; allowed: a text"),
    ],
)
def test_what_finish_requests_refuses_changes_nothing(
    scheduler: UpstreamScheduler, request_ids: Any, status: Any, message: str
) -> None:
    with pytest.raises(InvalidArgumentError, match=message):
        scheduler.finish_requests(request_ids, status)
    assert list(scheduler.requests) == ["a", "s"]


@pytest.mark.parametrize("state", [3, None, "all"])
def test_a_pause_state_that_there_is_not_is_refused(scheduler: UpstreamScheduler, state: Any) -> None:
    with pytest.raises(InvalidArgumentError, match=r"^pause_state is "):
        scheduler.set_pause_state(state)
    assert scheduler.schedule().num_scheduled_tokens


def test_a_gate_that_cannot_be_asked_is_refused() -> None:
    with pytest.raises(InvalidArgumentError, match="admission_gate is True; allowed: a function"):
        UpstreamScheduler(CONFIG, admission_gate=True)  # type: ignore[arg-type]


def test_a_config_of_another_kind_is_refused() -> None:
    with pytest.raises(InvalidArgumentError, match="config is None; allowed: a SchedulerConfig"):
        UpstreamScheduler(None)  # type: ignore[arg-type]


def test_an_output_without_a_request_of_the_step_is_refused(scheduler: UpstreamScheduler) -> None:
    output = scheduler.schedule()
    with pytest.raises(InvalidArgumentError, match=r"req_ids is \['a'\]; allowed: with s"):
        scheduler.update_from_output(output, ModelRunnerOutput(["a"], [[3]]))
    assert scheduler.requests["a"].num_output_tokens == 0


def test_a_load_of_nothing_is_refused() -> None:
    """vLLM asserts so."""

    class Nothing(StandInConnector):
        def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int, bool]:
            return 0, True

    scheduler = UpstreamScheduler(CONFIG, connector=Nothing(CONFIG))
    scheduler.add_request(Request("a", [1] * 5, PARAMS))
    with pytest.raises(SchedulerStateError, match="a is to load nothing"):
        scheduler.schedule()
