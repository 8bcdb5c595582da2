"""Given prebuilt metadata, the optimized op reads nothing back from the device."""

import re
from collections.abc import Callable
from itertools import accumulate
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ascend_twin.equivalence_tests.cases import Inputs, PrefillCase, compare_prefill
from ascend_twin.equivalence_tests.devices import SimulatedDevice
from ascend_twin.equivalence_tests.strategies import prefill_cases
from ascend_twin.optimized.gdn import (
    IMPLEMENTATIONS,
    ChunkMetadata,
    ChunkMetadataBuilder,
    chunk_gated_delta_rule,
    chunked,
    forbid_host_sync,
)
from ascend_twin.optimized.gdn.device import CpuDevice, Device
from ascend_twin.reference.errors import HostSyncError

CASE = PrefillCase((65, 0, 1, 130), HV=2, V=24, padding=3, use_qk_l2norm_in_kernel=True)
SMALL_CASES = prefill_cases(max_num_seqs=3, max_length=130)
CASES_OF_ONE_MODEL = prefill_cases(max_num_seqs=3, max_length=130, heads=((1, 2), (2, 2)))


class Results(NamedTuple):
    o: torch.Tensor
    final_state: torch.Tensor | None


def _builder(device: Device, HV: int, depth: int = 2) -> ChunkMetadataBuilder:
    return ChunkMetadataBuilder(device, 1024, 8, num_value_heads=HV, depth=depth)


def _there(device: Device, inputs: Inputs) -> Inputs:
    if isinstance(device, SimulatedDevice):
        return Inputs._make(None if x is None else device.to_device(x) for x in inputs)
    return inputs.to(device.torch_device)


def _run(case: PrefillCase, there: Inputs, metadata: ChunkMetadata | None, **kwargs: Any) -> Results:
    return Results(
        *chunk_gated_delta_rule(
            *there[:5],
            initial_state=there.initial_state,
            output_final_state=True,
            use_qk_l2norm_in_kernel=case.use_qk_l2norm_in_kernel,
            prebuilt_meta=metadata,
            **kwargs,
        )
    )


def _check_equals_the_cpu(case: PrefillCase, actual: Results) -> None:
    inputs = case.inputs()
    expected = _run(case, inputs, _builder(CpuDevice(), case.HV).build(inputs.cu_seqlens))
    for name, found, wanted in zip(Results._fields, actual, expected, strict=True):
        assert found is not None, name
        assert wanted is not None, name
        assert found.dtype == wanted.dtype, name
        assert torch.equal(found.cpu(), wanted), name


@given(SMALL_CASES)
def test_op_reads_nothing_back_and_equals_the_cpu_when_all_work_is_late(case: PrefillCase) -> None:
    device, inputs = SimulatedDevice(), case.inputs()
    builder, there = _builder(device, case.HV), _there(device, inputs)
    with forbid_host_sync(device):
        metadata = builder.build(inputs.cu_seqlens)
        results = _run(case, there, metadata)
        metadata.release()
    assert device.default_stream.queue
    device.synchronize()
    _check_equals_the_cpu(case, results)


@given(st.lists(st.tuples(CASES_OF_ONE_MODEL, st.lists(st.integers(0, 1), max_size=40)), max_size=3))
def test_op_equals_the_cpu_when_steps_share_a_ring(steps: list[tuple[PrefillCase, list[int]]]) -> None:
    device = SimulatedDevice()
    builder = _builder(device, HV=2, depth=1)
    launched: list[tuple[PrefillCase, Results]] = []
    for case, choices in steps:
        inputs = case.inputs()
        there = _there(device, inputs)
        with forbid_host_sync(device):
            launched.append((case, _run(case, there, builder.build(inputs.cu_seqlens))))
        device.run(choices)
    device.synchronize()
    for case, results in launched:
        _check_equals_the_cpu(case, results)


READS: dict[str, Callable[[ChunkMetadata], Any]] = {
    "item": lambda metadata: metadata.cu_seqlens[-1].item(),
    "tolist": lambda metadata: metadata.chunk_indices_chunk64.tolist(),
    "bool": lambda metadata: bool((metadata.cu_seqlens >= 0).all()),
    "mask": lambda metadata: metadata.chunk_indices_chunk64[metadata.chunk_indices_chunk64 > 0],
    "host data": lambda metadata: torch.tensor([0], device=metadata.cu_seqlens.device),
}


@pytest.fixture
def mutant(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """The eager implementation, with a read of the metadata before it."""
    read, eager = request.param, IMPLEMENTATIONS["eager"]

    def run(*args: Any, metadata: ChunkMetadata, **kwargs: Any) -> Any:
        read(metadata)
        return eager.run(*args, metadata=metadata, **kwargs)

    monkeypatch.setitem(IMPLEMENTATIONS, "mutant", chunked.Implementation("mutant", "reads back", run))
    return read


@pytest.mark.parametrize("mutant", READS.values(), ids=READS, indirect=True)
def test_forbid_host_sync_catches_an_implementation_that_reads_back(mutant: Callable[..., Any]) -> None:
    device, inputs = SimulatedDevice(), CASE.inputs()
    builder, there = _builder(device, CASE.HV), _there(device, inputs)
    place = f"^{re.escape(__file__)}:{mutant.__code__.co_firstlineno}: "
    with pytest.raises(HostSyncError, match=place), forbid_host_sync(device):
        _run(CASE, there, builder.build(inputs.cu_seqlens), implementation="mutant")


def test_op_reads_back_when_it_builds_metadata_on_the_spot() -> None:
    device = SimulatedDevice()
    there = _there(device, CASE.inputs())
    with pytest.raises(HostSyncError, match=r"inputs\.py:\d+: .*cu_seqlens"), forbid_host_sync(device):
        _run(CASE, there, None, cu_seqlens=there.cu_seqlens)


def test_op_does_not_read_cu_seqlens_when_metadata_are_given() -> None:
    device, inputs = SimulatedDevice(), CASE.inputs()
    builder, there = _builder(device, CASE.HV), _there(device, inputs)
    there.cu_seqlens.fill_(-1)
    with forbid_host_sync(device):
        results = _run(CASE, there, builder.build(inputs.cu_seqlens), cu_seqlens=there.cu_seqlens)
    device.synchronize()
    _check_equals_the_cpu(CASE, results)


@pytest.fixture
def accelerator(device: Device) -> Device:
    """The device under test, where it has a host sync to forbid."""
    if isinstance(device, CpuDevice):
        pytest.skip("a CPU has no host sync to forbid: run with --device cuda or npu")
    return device


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_op_reads_nothing_back_on_the_device_under_test(accelerator: Device, implementation: str) -> None:
    if isinstance(accelerator, SimulatedDevice) and IMPLEMENTATIONS[implementation].uses_triton:
        pytest.skip("a simulated device runs no kernel; test_triton_launches records what is launched on it")
    if not isinstance(accelerator, SimulatedDevice):  # compiling and the first launch wait for the device
        warm_up = _there(accelerator, CASE.inputs())
        _run(CASE, warm_up, None, cu_seqlens=warm_up.cu_seqlens, implementation=implementation)
    inputs = CASE.inputs()
    builder, there = _builder(accelerator, CASE.HV), _there(accelerator, inputs)
    with forbid_host_sync(accelerator):
        metadata = builder.build(torch.tensor([0, *accumulate(CASE.seq_lens)]))
        results = _run(CASE, there, metadata, implementation=implementation)
        metadata.release()
    if isinstance(accelerator, SimulatedDevice):
        accelerator.synchronize()
    for comparison in compare_prefill(CASE, inputs, results.o, results.final_state):
        assert comparison.passed, comparison


@pytest.mark.parametrize("read", ["item", "tolist", "bool", "mask"])
def test_forbid_host_sync_raises_on_the_device_under_test(accelerator: Device, read: str) -> None:
    metadata = _builder(accelerator, CASE.HV).build(torch.tensor([0, *accumulate(CASE.seq_lens)]))
    with pytest.raises(HostSyncError, match=re.escape(__file__)), forbid_host_sync(accelerator):
        READS[read](metadata)
