# pyright: reportMissingImports=false
"""A tiny Qwen3-Next served by vLLM: its own GDN kernel, our reference and our op answer alike.

The truth is the reference in float64, inside the engine. How far a right answer may be from it is measured in
the same run: `REFERENCE_FACTOR` times the larger of what the reference itself loses when it rounds its
operands to bfloat16, and of what vLLM's own kernel differs from itself when the requests come in another
order. Cores and states that are wrong in one way must be farther.
"""

import importlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from ascend_twin.equivalence_tests import (
    installed_vllm,
    vllm_model_device_path,
    vllm_model_engine,
    vllm_model_variants,
)
from ascend_twin.equivalence_tests.tiny_qwen3_next import NUM_GDN_LAYERS
from ascend_twin.equivalence_tests.vllm_model_engine import (
    Answers,
    Distance,
    Seen,
    ask,
    cores,
    distance,
    gdn_layers,
    gdn_option,
    serve,
    watched,
)
from ascend_twin.optimized.vllm import gdn_layer
from ascend_twin.optimized.vllm.gdn_core import PrefillCore
from ascend_twin.reference.errors import InvalidArgumentError, UnavailableError

pytestmark = pytest.mark.vllm032

_LAYER = "QwenGatedDeltaNetAttention"


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Answers:
    """What vLLM answers without the plugin."""
    installed_vllm.prepare_import()
    custom_op = importlib.import_module("vllm.model_executor.custom_op")
    ops = importlib.import_module("vllm._custom_ops")
    with pytest.MonkeyPatch.context() as patch:
        patch.delitem(custom_op.op_registry_oot, _LAYER, raising=False)
        op = ops.chunk_gated_delta_rule_cpu
        patch.setattr(ops, op.__name__, getattr(op, "__wrapped__", op))
        llm = serve(tmp_path_factory.mktemp("plain"))
        assert [type(layer).__name__ for layer in gdn_layers(llm)] == [_LAYER] * NUM_GDN_LAYERS
        answers = ask(llm)
        vllm_model_engine.stop(llm)
    return answers


@pytest.fixture(scope="module")
def installed(plain: Answers) -> None:
    """Our layer and our metadata are in place, after what `plain` needed them not to be for."""
    gdn_layer.install()
    importlib.import_module("ascend_twin.optimized.vllm.gdn_metadata").install()


@dataclass(frozen=True)
class Short:
    """What is kept of an engine that answered once: its answers, its layers, and the calls of their cores."""

    answers: Answers
    layers: list[Any]
    seen: list[Seen]


# Ending an engine closes vLLM's process group: those that live briefly must have ended when `llm` begins.
@pytest.fixture(scope="module")
def unswapped(installed: None, tmp_path_factory: pytest.TempPathFactory) -> Short:
    """An engine with the plugin in place, and no core chosen."""
    return _answer_once(tmp_path_factory.mktemp("unswapped"), core=None)


@pytest.fixture(scope="module")
def chosen(unswapped: Short, tmp_path_factory: pytest.TempPathFactory) -> Short:
    """An engine whose core was chosen by the option."""
    return _answer_once(tmp_path_factory.mktemp("chosen"), core="eager")


def _answer_once(folder: Path, core: str | None) -> Short:
    llm = serve(folder, **gdn_option(core))
    layers = gdn_layers(llm)
    with watched() as seen:
        answers = ask(llm)
    vllm_model_engine.stop(llm)
    return Short(answers, layers, seen)


@dataclass(frozen=True)
class Cached:
    """A long prompt asked twice of an engine with prefix caching: the tokens, and how many it had cached."""

    cold: list[int]
    warm: list[int]
    num_cached: int


@pytest.fixture(scope="module")
def cached(chosen: Short, tmp_path_factory: pytest.TempPathFactory) -> list[Cached]:
    llm = serve(tmp_path_factory.mktemp("cached"), enable_prefix_caching=True, **gdn_option("reference"))
    cold, warm = vllm_model_engine.ask_long(llm), vllm_model_engine.ask_long(llm)
    vllm_model_engine.stop(llm)
    return [
        Cached(list(one.outputs[0].token_ids), list(two.outputs[0].token_ids), two.num_cached_tokens)
        for one, two in zip(cold, warm, strict=True)
    ]


@pytest.fixture(scope="module")
def refusal(cached: list[Cached], tmp_path_factory: pytest.TempPathFactory) -> Exception:
    """What an engine raises before it serves, told to use Triton on a CPU without our interpreter."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ascend_twin.optimized.gdn.kernels.launch._interprets_faithfully", False)
        with pytest.raises(UnavailableError) as caught:
            serve(tmp_path_factory.mktemp("refused"), **gdn_option("fused"))
    return caught.value


@pytest.fixture(scope="module")
def llm(refusal: Exception, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """An engine whose core is the reference, by option; tests put others in its place."""
    llm = serve(tmp_path_factory.mktemp("served"), **gdn_option("reference"))
    yield llm
    vllm_model_engine.stop(llm)


@pytest.fixture(scope="module")
def truth(llm: Any) -> Answers:
    return ask(llm)


@pytest.fixture(scope="module")
def limit(llm: Any, truth: Answers, plain: Answers) -> Distance:
    """How far a right answer may be from the truth; see the head of this file."""
    with cores(llm, vllm_model_variants.RoundingCore):
        rounded = ask(llm)
    with cores(llm, lambda: None):
        reordered = ask(llm, reverse=True)
    return vllm_model_engine.limit((rounded, truth), (reordered, plain))


def test_truth_does_not_depend_on_the_batch(llm: Any, truth: Answers) -> None:
    other = distance(ask(llm, reverse=True), truth)
    assert other == Distance(0.0, 0.0, 0.0)


def test_the_models_layers_matter(truth: Answers) -> None:
    """Not vacuous: the tokens differ in probability, and the model is sure of some of them only."""
    assert truth.prefill.std() > 1
    assert len({token for tokens in truth.greedy for token in tokens}) > len(truth.greedy)


def test_vllms_own_kernel_is_within_the_limit(plain: Answers, truth: Answers, limit: Distance) -> None:
    assert distance(plain, truth).within(limit), (distance(plain, truth), limit)


def test_without_the_option_vllm_answers_as_without_the_plugin(plain: Answers, unswapped: Short) -> None:
    assert [layer.prefill_core for layer in unswapped.layers] == [None] * NUM_GDN_LAYERS
    assert all(isinstance(layer, _layer_class()) for layer in unswapped.layers)
    assert unswapped.seen == []
    assert distance(unswapped.answers, plain) == Distance(0.0, 0.0, 0.0)
    assert unswapped.answers.greedy == plain.greedy


def test_optimized_op_answers_as_the_truth(
    implementation: str, llm: Any, truth: Answers, limit: Distance
) -> None:
    with cores(llm, lambda: PrefillCore(implementation)) as layers, watched() as seen:
        answers = ask(llm)
        swapped = [layer.prefill_core for layer in layers]
    found = distance(answers, truth)
    assert found.within(limit), (found, limit)
    assert len(swapped) == NUM_GDN_LAYERS
    for core in swapped:
        assert core.num_calls == len(seen) // NUM_GDN_LAYERS > 0
        # Every step's metadata came from our builder, and were those of the step's prefill part.
        assert (core.num_prebuilt, core.num_unfit) == (core.num_calls, 0)
    _assert_all_features_were_there(seen, implementation)


def test_option_chooses_the_core(chosen: Short, truth: Answers, limit: Distance) -> None:
    found = distance(chosen.answers, truth)
    assert found.within(limit), (found, limit)
    _assert_all_features_were_there(chosen.seen, "eager")
    by_layer = gdn_layer.prefill_cores(torch.nn.ModuleList(chosen.layers))
    assert [core.name for core in by_layer.values()] == ["eager"] * NUM_GDN_LAYERS
    assert all(core.num_prebuilt == core.num_calls > 0 for core in by_layer.values())


def test_state_of_a_cached_prefix_serves(cached: list[Cached]) -> None:
    """Where vLLM cuts a prompt for its cache, the truth's states are those of the first time, bit by bit."""
    assert sum(prompt.num_cached > 0 for prompt in cached) > 1
    assert [prompt.warm for prompt in cached] == [prompt.cold for prompt in cached]


def test_core_that_cannot_run_here_is_refused(refusal: Exception) -> None:
    assert "interpreter" in str(refusal)


@pytest.mark.parametrize("name", vllm_model_variants.WRONG_CORES)
def test_wrong_core_is_caught(name: str, llm: Any, truth: Answers, limit: Distance) -> None:
    change = vllm_model_variants.WRONG_CORES[name]
    with cores(llm, lambda: vllm_model_variants.ChangedCore(change)):
        found = distance(ask(llm), truth)
    assert not found.within(limit), (found, limit)
    assert not (found.prefill <= limit.prefill and found.decode <= limit.decode), (found, limit)


@pytest.mark.parametrize("name", vllm_model_variants.WRONG_STATES)
def test_wrong_handling_of_states_is_caught(name: str, llm: Any, truth: Answers, limit: Distance) -> None:
    with vllm_model_variants.wrong_states(name):
        found = distance(ask(llm), truth)
    assert not (found.prefill <= limit.prefill and found.decode <= limit.decode), (found, limit)
    if name == "state layout transposed":
        # What is written and read transposed is right again: only vLLM's decode kernel sees it.
        assert found.prefill <= limit.prefill < limit.decode * 10 < found.decode


@pytest.mark.parametrize("core", ["reference", "eager"])
def test_vllms_code_for_gpus_answers_as_the_truth_with_our_core(
    core: str, llm: Any, truth: Answers, limit: Distance
) -> None:
    """Same layer, other half of vLLM's code: it hands the core gathered states, values first."""
    with vllm_model_device_path.device_path(llm, lambda: PrefillCore(core)) as made, watched() as seen:
        found = distance(ask(llm), truth)
    assert found.within(limit), (found, limit)
    _assert_all_features_were_there(seen, core)
    for made_core in made:
        assert made_core.num_calls == len(seen) // NUM_GDN_LAYERS > 0
        assert made_core.num_prebuilt == (made_core.num_calls if core == "eager" else 0)
        assert made_core.num_unfit == 0


def test_wrong_layout_in_vllms_code_for_gpus_is_caught(
    llm: Any, truth: Answers, limit: Distance, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gdn_layer, "convert_states", lambda states, layout: states)
    with vllm_model_device_path.device_path(llm, lambda: PrefillCore("reference")):
        found = distance(ask(llm), truth)
    assert not found.decode <= limit.decode, (found, limit)


def test_query_that_lost_its_layer_is_refused(llm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM's own kernel must not run silently where a core was chosen."""
    kind = _layer_class()
    monkeypatch.delattr(kind, "rearrange_mixed_qkv")
    with pytest.raises(UnavailableError, match="none of its layers made"):
        ask(llm)


def test_installing_twice_changes_nothing(llm: Any) -> None:
    ops = importlib.import_module("vllm._custom_ops")
    before = _layer_class(), ops.chunk_gated_delta_rule_cpu
    gdn_layer.install()
    assert (_layer_class(), ops.chunk_gated_delta_rule_cpu) == before


def test_layer_of_another_plugin_stays(llm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    custom_op = importlib.import_module("vllm.model_executor.custom_op")
    ops = importlib.import_module("vllm._custom_ops")
    before = ops.chunk_gated_delta_rule_cpu
    monkeypatch.setitem(custom_op.op_registry_oot, _LAYER, type("TheirLayer", (), {}))
    with pytest.raises(UnavailableError, match=r"TheirLayer has replaced"):
        gdn_layer.install()
    assert ops.chunk_gated_delta_rule_cpu is before


def test_unknown_core_is_refused(llm: Any) -> None:
    from vllm.config import VllmConfig, set_current_vllm_config

    config = VllmConfig(additional_config={"ascend_twin": {"gdn": {"core": "eagre"}}})
    with set_current_vllm_config(config), pytest.raises(InvalidArgumentError, match="'eagre'"):
        gdn_layer._chosen_core()


def _layer_class() -> Any:
    return importlib.import_module("vllm.model_executor.custom_op").op_registry_oot[_LAYER]


def _assert_all_features_were_there(seen: list[Seen], core: str) -> None:
    assert {call.core for call in seen} == {core}
    counts = {
        "several sequences": sum(call.num_sequences > 1 for call in seen),
        "resumed": sum(call.num_resumed > 0 for call in seen),
        "resumed beside new": sum(0 < call.num_resumed < call.num_sequences for call in seen),
        "mixed with decodes": sum(call.is_mixed for call in seen),
        "prefill alone": sum(not call.is_mixed for call in seen),
    }
    assert all(counts.values()), counts
