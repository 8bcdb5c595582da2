"""The optimized op, every implementation of it, on the device under test."""

import logging
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from ascend_twin.equivalence_tests.cases import DTYPES, PrefillCase, check_prefill, metadata_differences
from ascend_twin.equivalence_tests.properties import (
    CUTS,
    EXACT,
    ORDERS,
    REGROUPED,
    WIDE_CASES,
    Prefill,
    assert_agree,
    check_causal,
    check_dense,
    check_one_by_one,
    check_order,
    check_padding,
    check_split,
    check_then_decode,
    check_without_empty,
    prefill_by,
)
from ascend_twin.equivalence_tests.strategies import SEEDS, prefill_cases
from ascend_twin.optimized.gdn import (
    IMPLEMENTATIONS,
    ChunkMetadataBuilder,
    chunk_gated_delta_rule,
    open_device,
)
from ascend_twin.optimized.gdn import chunked as op_module
from ascend_twin.optimized.gdn.device import Device
from ascend_twin.reference.errors import StagingError
from ascend_twin.reference.gdn import recurrent_gated_delta_rule

Op = Callable[..., Prefill]


@pytest.fixture(scope="module", params=IMPLEMENTATIONS)
def implementation(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def builder(device: Device) -> ChunkMetadataBuilder:
    return ChunkMetadataBuilder(device, max_num_batched_tokens=1024, max_num_seqs=8, num_value_heads=4)


@pytest.fixture(scope="module")
def op(device: Device, implementation: str) -> Op:
    """The op on the device under test, with the options of a case."""

    def op(case: PrefillCase, **options: Any) -> Prefill:
        return prefill_by(
            chunk_gated_delta_rule,
            case,
            device=device.torch_device,
            implementation=implementation,
            **options,
        )

    return op


def with_gaps(x: torch.Tensor) -> torch.Tensor:
    """The same values, every second element of a buffer with NaN between."""
    buffer = x.new_full((*x.shape, 2), float("nan"))
    buffer[..., 0] = x
    return buffer[..., 0]


def heads_first(x: torch.Tensor) -> torch.Tensor:
    """The same values, dimensions 1 and 2 swapped in memory."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)


@pytest.mark.parametrize("dtype", DTYPES)
@given(data=st.data())
def test_op_equals_the_definition(
    implementation: str, builder: ChunkMetadataBuilder, device: Device, dtype: str, data: st.DataObject
):
    case = data.draw(prefill_cases(dtypes=(dtype,)))
    outcome = check_prefill(case, implementation=implementation, builder=builder, device=device.torch_device)
    assert outcome.passed, str(outcome)


@pytest.mark.parametrize("dtype", DTYPES)
@given(T=st.integers(1, 130), seed=SEEDS)
@example(T=75, seed=0)
def test_op_equals_the_definition_when_g_is_very_negative(
    implementation: str, builder: ChunkMetadataBuilder, device: Device, dtype: str, T: int, seed: int
):
    # fla#792, fla#794: B 2, T 75, H 4, D 64 in float16; a tail read as g = 0 gave exp(0 - g) = inf.
    case = PrefillCase((T, T), seed, H=4, HV=4, K=64, V=64, dtype=dtype, gates="steep")
    outcome = check_prefill(case, implementation=implementation, builder=builder, device=device.torch_device)
    assert outcome.passed, str(outcome)


@given(case=WIDE_CASES)
def test_op_computes_a_packed_batch_as_its_sequences_one_by_one(op: Op, case: PrefillCase):
    check_one_by_one(op(case), case, REGROUPED)


@given(case=WIDE_CASES, order=ORDERS)
def test_op_does_not_depend_on_the_order_of_sequences(op: Op, case: PrefillCase, order: list[int]):
    check_order(op(case), case, order, REGROUPED)


@given(case=WIDE_CASES)
def test_op_ignores_empty_sequences_and_returns_their_state(op: Op, case: PrefillCase):
    check_without_empty(op(case), case, REGROUPED)


@given(case=WIDE_CASES)
def test_op_ignores_padding(op: Op, case: PrefillCase):
    check_padding(op(case), case, REGROUPED)


@given(case=WIDE_CASES, cuts=CUTS)
def test_op_carries_its_state_over_any_split(op: Op, case: PrefillCase, cuts: list[int]):
    check_split(op(case), case, cuts, REGROUPED)


@given(case=WIDE_CASES, num_decodes=st.integers(1, 4))
def test_op_then_decode_equals_one_recurrence(op: Op, case: PrefillCase, num_decodes: int):
    check_then_decode(op(case), case, num_decodes, REGROUPED)


@given(case=WIDE_CASES, other_seed=SEEDS, cuts=CUTS)
def test_op_is_causal(op: Op, case: PrefillCase, other_seed: int, cuts: list[int]):
    check_causal(op(case), case, other_seed, cuts)


@given(case=WIDE_CASES, B=st.integers(1, 3), T=st.integers(0, 70))
def test_op_takes_dense_rows_as_packed_sequences(op: Op, case: PrefillCase, B: int, T: int):
    check_dense(op(case), replace(case, seq_lens=(T,) * B), REGROUPED)


@given(case=prefill_cases())
def test_op_computes_the_same_bits_with_metadata_built_before_and_on_the_spot(
    op: Op, builder: ChunkMetadataBuilder, case: PrefillCase
):
    inputs = case.inputs()
    on_the_spot = op(case)(inputs)
    metadata = builder.build(inputs.cu_seqlens)
    assert_agree(op(case, prebuilt_meta=metadata)(inputs), on_the_spot, case.bounds, EXACT)
    without_cu_seqlens = inputs._replace(cu_seqlens=None)
    assert_agree(op(case, prebuilt_meta=metadata)(without_cu_seqlens), on_the_spot, case.bounds, EXACT)


def test_op_takes_cu_seqlens_of_either_integer_dtype(op: Op):
    case = PrefillCase((70, 0, 3), dtype="float16", padding=5)
    inputs = case.inputs()
    expected = op(case)(inputs)
    wide = inputs._replace(cu_seqlens=inputs.cu_seqlens.long())
    assert_agree(op(case)(wide), expected, case.bounds, EXACT)


@pytest.mark.parametrize("layout", [with_gaps, heads_first])
def test_op_takes_tensors_of_any_stride(op: Op, layout: Callable[[torch.Tensor], torch.Tensor]):
    case = PrefillCase((70, 0, 3), H=2, HV=4, K=16, V=32, padding=5)
    inputs = case.inputs()
    expected = op(case)(inputs)
    strided = {name: layout(getattr(inputs, name)) for name in ("q", "k", "v", "g", "beta", "initial_state")}
    assert not any(x.is_contiguous() for x in strided.values())
    assert_agree(op(case)(inputs._replace(**strided)), expected, case.bounds, EXACT)


@pytest.mark.parametrize("seq_lens", [(), (0,), (0, 0, 0)])
@pytest.mark.parametrize("padding", [0, 5])
def test_op_returns_zeros_and_the_initial_state_when_there_is_no_token(
    op: Op, seq_lens: tuple[int, ...], padding: int
):
    case = PrefillCase(seq_lens, HV=2, K=8, V=24, dtype="bfloat16", padding=padding)
    inputs = case.inputs()
    o, final_state = op(case)(inputs)
    assert torch.equal(o, torch.zeros(1, padding, 2, 24, dtype=torch.bfloat16))
    assert inputs.initial_state is not None
    assert torch.equal(final_state, inputs.initial_state)


@pytest.mark.parametrize("dtype", DTYPES)
def test_op_modifies_no_input(op: Op, builder: ChunkMetadataBuilder, device: Device, dtype: str):
    case = PrefillCase((70, 0, 3), HV=2, dtype=dtype, padding=5, use_qk_l2norm_in_kernel=True)
    inputs, untouched = case.inputs().to(device.torch_device), case.inputs()
    metadata = builder.build(untouched.cu_seqlens)
    op(case, prebuilt_meta=metadata)(inputs)
    for name, x, before in zip(inputs._fields, inputs, untouched, strict=True):
        assert x is not None
        torch.testing.assert_close(x.cpu(), before, rtol=0, atol=0, equal_nan=True, msg=name)
    assert metadata_differences(metadata, case.bounds, builder.block_sizes) == []


@pytest.mark.parametrize(
    "options",
    [
        {"scale": 3.0},
        {"scale": 0.0},
        {"initial_state": None},
        {"use_qk_l2norm_in_kernel": True},
        {"use_qk_l2norm_in_kernel": True, "eps": 0.5},
        {"cu_seqlens": torch.tensor([0, 33, 73])},
    ],
    ids=str,
)
def test_op_ignores_no_option(device: Device, implementation: str, options: dict[str, Any]):
    case = PrefillCase((70, 3), dtype="float64")
    inputs = case.inputs()

    def results(function: Callable[..., Any], options: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
        arguments = {**inputs._asdict(), **options}
        there = {
            name: x.to(device.torch_device) if isinstance(x, torch.Tensor) else x
            for name, x in arguments.items()
        }
        o, final_state = function(**there, output_final_state=True)
        return o.cpu(), final_state.cpu()

    actual = results(partial(chunk_gated_delta_rule, implementation=implementation), options)
    assert_agree(actual, results(recurrent_gated_delta_rule, options), case.bounds, REGROUPED)
    default = results(partial(chunk_gated_delta_rule, implementation=implementation), {})
    assert not torch.equal(actual[0], default[0])


def test_op_returns_no_state_unless_asked(implementation: str, device: Device):
    inputs = PrefillCase((3,)).inputs().to(device.torch_device)
    assert chunk_gated_delta_rule(*inputs[:5], implementation=implementation)[1] is None


def test_op_says_once_that_metadata_are_built_on_the_spot(
    op: Op,
    builder: ChunkMetadataBuilder,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
):
    case = PrefillCase((3,))
    inputs = case.inputs()
    monkeypatch.setattr(op_module, "_said", set())
    op(case, prebuilt_meta=builder.build(inputs.cu_seqlens))(inputs)
    assert not caplog.records
    op(case)(inputs)
    op(case)(inputs)
    assert [r.levelno for r in caplog.records] == [logging.WARNING]
    assert "ChunkMetadataBuilder" in caplog.text


def test_op_equals_the_definition_over_many_chunks(implementation: str, device: Device):
    case = PrefillCase((1100, 0, 1), V=32)
    builder = ChunkMetadataBuilder(device, 2048, 4, case.HV)
    outcome = check_prefill(case, implementation=implementation, builder=builder, device=device.torch_device)
    assert outcome.passed, str(outcome)


def test_op_takes_a_scale_of_zero(op: Op):
    case = PrefillCase((70,))
    assert not op(case, scale=0.0)(case.inputs())[0].count_nonzero()


def test_op_refuses_metadata_that_were_released(op: Op, builder: ChunkMetadataBuilder):
    case = PrefillCase((70,))
    inputs = case.inputs()
    metadata = builder.build(inputs.cu_seqlens)
    metadata.release()
    with pytest.raises(StagingError, match="prebuilt_meta was released"):
        op(case, prebuilt_meta=metadata)(inputs)


def test_op_keeps_no_gradient(op: Op):
    case = PrefillCase((70,))
    inputs = case.inputs()
    o, _ = op(case)(inputs._replace(v=inputs.v.requires_grad_()))
    assert not o.requires_grad


def test_op_builds_on_the_host_whatever_the_default_device_is(op: Op):
    case = PrefillCase((70, 0, 3))
    inputs = case.inputs()
    expected = op(case)(inputs)
    with torch.device("meta"):
        metadata = ChunkMetadataBuilder(open_device("cpu"), 128, 4, 1).build(inputs.cu_seqlens)
    assert metadata.cu_seqlens.tolist() == [0, 70, 70, 73]
    assert torch.equal(op(case)(inputs)[0], expected[0])
