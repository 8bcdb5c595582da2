"""The simulated accelerator behaves as a real one at its worst, and devices are had by name or not at all."""

import re
from collections.abc import Callable
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ascend_twin.equivalence_tests.devices import SimulatedDevice, SimulatedTensor, open_test_device
from ascend_twin.optimized.gdn import forbid_host_sync, open_device
from ascend_twin.optimized.gdn.device import CpuDevice, TorchAccelerator
from ascend_twin.reference.errors import (
    HostSyncError,
    InvalidArgumentError,
    StagingError,
    UnavailableError,
    UnsynchronizedReadError,
)

POISON = int(np.full(4, 0xA5, dtype=np.uint8).view(np.int32)[0])
CHOICES = st.lists(st.integers(0, 3), max_size=12)


def _pinned(device: SimulatedDevice, *values: int) -> torch.Tensor:
    host = device.host_empty(len(values), torch.int32)
    host.copy_(torch.tensor(values))
    return host


def _target(device: SimulatedDevice, size: int) -> torch.Tensor:
    target = device.device_empty(size, torch.int32)
    device.synchronize()
    return target


def _contents(x: torch.Tensor) -> torch.Tensor:
    """What device memory holds now."""
    assert isinstance(x, SimulatedTensor)
    return x.contents


# Streams and events


@given(
    st.lists(
        st.tuples(st.sampled_from(("work", "record", "wait")), st.integers(0, 2), st.integers(0, 1)),
        max_size=20,
    ),
    st.lists(st.integers(0, 2), max_size=20),
)
def test_streams_execute_in_order_and_after_what_they_wait_for(
    program: list[tuple[str, int, int]], choices: list[int]
) -> None:
    device = SimulatedDevice()
    streams = [device.default_stream, *(device.new_stream() for _ in range(2))]
    events = [device.new_event() for _ in range(2)]
    executed: list[int] = []
    queued: list[set[int]] = [set(), set(), set()]  # what must be executed before more work of a stream
    recorded: list[set[int]] = [set(), set()]
    needed: dict[int, set[int]] = {}
    for i, (kind, stream, event) in enumerate(program):
        if kind == "work":
            streams[stream].queue.append(lambda i=i: executed.append(i))  # pyright: ignore[reportArgumentType]
            needed[i] = set(queued[stream])
            queued[stream].add(i)
        elif kind == "record":
            events[event].record(streams[stream])
            recorded[event] = set(queued[stream])
        else:
            streams[stream].wait_event(events[event])
            queued[stream] |= recorded[event]
    device.run(choices)
    for event, before in zip(events, recorded, strict=True):
        event.synchronize()
        assert event.query()
        assert before <= set(executed)
    device.synchronize()
    assert sorted(executed) == sorted(needed)
    for place, i in enumerate(executed):
        assert needed[i] <= set(executed[:place])


def test_work_is_done_only_when_the_test_lets_it() -> None:
    device = SimulatedDevice()
    x = device.to_device(torch.tensor([1, 2]))
    x.add_(1)
    x.mul_(10)
    assert _contents(x).tolist() == [1, 2]
    device.run([0])
    assert _contents(x).tolist() == [2, 3]
    device.run([0, 0, 0])
    assert x.tolist() == [20, 30]


def test_event_counts_as_passed_when_it_was_never_recorded() -> None:
    device = SimulatedDevice()
    device.to_device(torch.zeros(1)).add_(1)
    event, stream = device.new_event(), device.new_stream()
    assert event.query()
    event.synchronize()
    stream.wait_event(event)
    assert not stream.queue
    assert device.default_stream.queue


def test_event_means_its_last_recording() -> None:
    device = SimulatedDevice()
    x, event, stream = device.to_device(torch.zeros(1)), device.new_event(), device.new_stream()
    event.record(device.current_stream())
    stream.wait_event(event)  # of the first recording, for ever
    event.synchronize()
    assert event.query()
    x.add_(1)
    event.record(device.current_stream())
    assert not event.query()
    assert not stream.blocked()
    event.synchronize()
    assert x.tolist() == [1]


def test_event_executes_no_more_than_it_waits_for() -> None:
    device = SimulatedDevice()
    event, stream = device.new_event(), device.new_stream()
    first, second = _target(device, 1), _target(device, 1)
    source = _pinned(device, 7)
    device.copy_async(first, source, stream)
    event.record(stream)
    device.copy_async(second, source, stream)
    x = device.to_device(torch.zeros(1))
    x.add_(1)
    event.synchronize()
    assert first.tolist() == [7]
    for pending in (second, x):
        with pytest.raises(UnsynchronizedReadError):
            pending.tolist()


# Memory


def test_queued_copy_delivers_poison_when_its_source_is_freed() -> None:
    device = SimulatedDevice()
    target, source = _target(device, 2), _pinned(device, 1, 2)
    device.copy_async(target, source, device.new_stream())
    del source
    device.synchronize()
    assert target.tolist() == [POISON, POISON]


def test_freed_pinned_memory_is_handed_out_at_once() -> None:
    device = SimulatedDevice()
    target, source = _target(device, 2), _pinned(device, 1, 2)
    device.copy_async(target, source, device.new_stream())
    view = source[1:]
    address = source.data_ptr()
    del source
    assert view.tolist() == [2]  # a view keeps it
    del view
    other = _pinned(device, 8, 9)
    assert other.data_ptr() == address
    device.synchronize()
    assert target.tolist() == [8, 9]


def test_freed_pinned_memory_is_handed_out_only_where_it_fits() -> None:
    device = SimulatedDevice()
    blocks = [_pinned(device, *range(size)) for size in (4, 2, 3)]
    addresses = {len(block): block.data_ptr() for block in blocks}
    del blocks
    assert _pinned(device, 1, 2, 3, 4).data_ptr() == addresses[4]
    kept = [_pinned(device, 1, 2, 3, 4), _pinned(device, 1, 2, 3), _pinned(device, 1, 2)]
    assert [block.data_ptr() for block in kept] == [addresses[4], addresses[3], addresses[2]]
    assert [block.tolist() for block in kept] == [[1, 2, 3, 4], [1, 2, 3], [1, 2]]


@pytest.mark.parametrize("size", [0, 1, 2])
def test_copy_sends_the_values_that_the_source_has_when_it_is_executed(size: int) -> None:
    device = SimulatedDevice()
    target, source = _target(device, 2), _pinned(device, 1, 2)
    device.copy_async(target[:size], source[:size], device.new_stream())
    source.fill_(5)
    device.synchronize()
    assert target.tolist() == [5] * size + [POISON] * (2 - size)
    assert sum(device.copied_bytes) == 4 * size


def test_copy_raises_when_its_source_is_pageable_or_its_target_on_the_host() -> None:
    device = SimulatedDevice()
    source, target, stream = _pinned(device, 1, 2), _target(device, 2), device.new_stream()
    with pytest.raises(StagingError, match="pageable"):
        device.copy_async(target, torch.zeros(2, dtype=torch.int32), stream)
    with pytest.raises(StagingError, match="on the host"):
        device.copy_async(torch.zeros(2, dtype=torch.int32), source, stream)
    assert not device.copied_bytes


FRESH: dict[str, Callable[[SimulatedDevice, torch.Tensor], torch.Tensor]] = {
    "device_empty": lambda device, x: device.device_empty(8, x.dtype),
    "torch.empty": lambda device, x: torch.empty(8, dtype=x.dtype, device=x.device),
    "empty_like": lambda device, x: torch.empty_like(x),
    "new_empty": lambda device, x: x.new_empty(2, 4),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int32, torch.int64, torch.bool])
@pytest.mark.parametrize("make", FRESH.values(), ids=FRESH)
def test_fresh_device_memory_is_poison(
    make: Callable[[SimulatedDevice, torch.Tensor], torch.Tensor], dtype: torch.dtype
) -> None:
    device = SimulatedDevice()
    with device.forbid_host_sync():
        fresh = make(device, device.to_device(torch.zeros(8, dtype=dtype)))
    device.synchronize()
    expected = float("nan") if dtype.is_floating_point else dtype == torch.bool or POISON
    assert _contents(fresh).allclose(torch.full_like(_contents(fresh), expected), equal_nan=True)


def test_fresh_device_memory_may_still_be_written_by_earlier_work() -> None:
    device = SimulatedDevice()
    device.to_device(torch.zeros(1)).add_(1)
    target, source, stream = device.device_empty(1, torch.int32), _pinned(device, 7), device.new_stream()
    device.copy_async(target, source, stream)  # does not wait for the default stream
    device.run([1])
    device.synchronize()
    assert target.tolist() == [POISON]


# Reads


def test_read_raises_until_the_work_is_done() -> None:
    device = SimulatedDevice()
    x, other = device.to_device(torch.tensor([1, 2])), device.to_device(torch.tensor([9]))
    view = x[1:]
    x.add_(1)
    x.add_(1)
    for executed in range(2):
        for pending in (x, view):
            with pytest.raises(UnsynchronizedReadError, match=re.escape(__file__)):
                pending.tolist()
        assert other.tolist() == [9]
        device.run([0])
        assert len(device.default_stream.queue) == 1 - executed
    assert x.tolist() == [3, 4]
    assert view.tolist() == [4]


READS: dict[str, Callable[[torch.Tensor, torch.Tensor], Any]] = {
    "item": lambda x, mask: x[0].item(),
    "bool": lambda x, mask: bool(x[0]),
    "int": lambda x, mask: int(x[0]),
    "float": lambda x, mask: float(x[0]),
    "index": lambda x, mask: range(9)[x[0]],
    "tolist": lambda x, mask: x.tolist(),
    "numpy": lambda x, mask: x.numpy(),
    "asarray": lambda x, mask: np.asarray(x),
    "cpu": lambda x, mask: x.cpu(),
    "to": lambda x, mask: x.to("cpu", non_blocking=True),
    "copy_": lambda x, mask: torch.zeros(3, dtype=x.dtype).copy_(x),
    "nonzero": lambda x, mask: x.nonzero(),
    "mask": lambda x, mask: x[mask],
    "mask assignment": lambda x, mask: x.index_put_((mask,), x[:1]),
    "masked_select": lambda x, mask: x.masked_select(mask),
    "unique": lambda x, mask: torch.unique(x),
    "equal": lambda x, mask: torch.equal(x, x),
    "repeat_interleave": lambda x, mask: torch.repeat_interleave(x, x),
}

HOST_DATA: dict[str, Callable[[torch.Tensor], Any]] = {
    "tensor": lambda x: torch.tensor([0, 1], device=x.device),
    "as_tensor": lambda x: torch.as_tensor([0, 1], device=x.device),
    "to": lambda x: torch.tensor([0, 1]).to(x.device),
    "copy_": lambda x: x.copy_(torch.zeros(3, dtype=torch.int64)),
    "add": lambda x: x + torch.zeros(3, dtype=torch.int64),
    "index by list": lambda x: x[[0, 1]],
    "index by tensor": lambda x: x[torch.tensor([0, 1])],
}


def _place_of(function: Callable[..., Any]) -> str:
    return f"^{re.escape(__file__)}:{function.__code__.co_firstlineno}: "


@pytest.mark.parametrize("read", READS.values(), ids=READS)
def test_forbid_host_sync_raises_with_the_place_when_memory_is_read(read: Callable[..., Any]) -> None:
    device = SimulatedDevice()
    x, mask = device.to_device(torch.tensor([3, 1, 2])), device.to_device(torch.tensor([True, False, True]))
    with pytest.raises(HostSyncError, match=_place_of(read)), forbid_host_sync(device):
        read(x, mask)


@pytest.mark.parametrize("read", READS.values(), ids=READS)
def test_reads_give_the_value_when_nothing_is_forbidden(read: Callable[..., Any]) -> None:
    device = SimulatedDevice()
    host = torch.tensor([3, 1, 2]), torch.tensor([True, False, True])
    there = [device.to_device(x) for x in host]
    there[0].mul_(1)
    with pytest.raises(UnsynchronizedReadError) if read is not READS["mask assignment"] else nullcontext():
        read(*there)
    device.synchronize()
    actual, expected = read(*there), read(*host)
    device.synchronize()
    assert np.array_equal(actual.numpy() if isinstance(actual, torch.Tensor) else actual, expected)


@pytest.mark.parametrize("write", HOST_DATA.values(), ids=HOST_DATA)
def test_forbid_host_sync_raises_with_the_place_when_host_data_are_used(write: Callable[..., Any]) -> None:
    device = SimulatedDevice()
    x = device.to_device(torch.tensor([3, 1, 2]))
    with pytest.raises(HostSyncError, match=_place_of(write)), forbid_host_sync(device):
        write(x)


def test_forbid_host_sync_ends_with_its_context() -> None:
    device = SimulatedDevice()
    x = device.to_device(torch.tensor([3]))
    with pytest.raises(KeyError), forbid_host_sync(device), forbid_host_sync(device):
        raise KeyError
    assert x.item() == 3
    with forbid_host_sync(device):
        with forbid_host_sync(device):
            pass
        with pytest.raises(HostSyncError):
            x.item()
    assert x.item() == 3
    assert torch.tensor([0, 1], device=x.device).shape == (2,)


def test_forbid_host_sync_allows_work_on_the_device() -> None:
    device = SimulatedDevice()
    x, order = device.to_device(torch.tensor([3, 1, 2])), device.to_device(torch.tensor([2, 0, 1]))
    with forbid_host_sync(device):
        y = torch.where(x > 1, x[order], 0) + torch.arange(3, device=x.device) * torch.tensor(10)
        y[order] = y + torch.full((3,), 100, device=x.device)
        y[:1] = 5
        z = torch.repeat_interleave(y, x, output_size=6)
    device.synchronize()
    assert y.tolist() == [5, 121, 102]
    assert z.tolist() == [5, 5, 5, 121, 102, 102]


# Results


OPERATIONS: list[Callable[[torch.Tensor], torch.Tensor]] = [
    lambda x: x + 1,
    lambda x: x * x - 3,
    lambda x: x.cumsum(0),
    lambda x: x.sort(dim=0, descending=True, stable=True).values,
    lambda x: x.argsort(dim=-1, stable=True),
    lambda x: x.sum(0, keepdim=True),
    lambda x: torch.cat([x, x.flip(0)]),
    lambda x: torch.where(x > 0, x, -x),
    lambda x: x.clone(),
    lambda x: torch.zeros_like(x).copy_(x),
    lambda x: x.transpose(0, -1),
    lambda x: x[::2],
    lambda x: x.reshape(-1, 1),
    lambda x: x.expand(2, *x.shape)[1],
    lambda x: x.mul_(3),
    lambda x: x[:1].sub_(5),
    lambda x: x.cumsum_(0),
    lambda x: x.index_put_((x.flatten()[:1].abs() % x.shape[0],), x[:1] + 1),
]


@given(st.lists(st.tuples(st.sampled_from(OPERATIONS), CHOICES), max_size=10))
def test_chains_of_operations_equal_those_of_the_cpu(
    chain: list[tuple[Callable[[torch.Tensor], torch.Tensor], list[int]]],
) -> None:
    device = SimulatedDevice()
    here = [torch.tensor([[3, -1, 2, 0], [5, 9, -7, 4], [1, 1, 8, -6]])]
    there = [device.to_device(here[0])]
    for operation, choices in chain:
        here.append(operation(here[-1]))
        there.append(operation(there[-1]))
        assert isinstance(there[-1], SimulatedTensor)
        assert (there[-1].shape, there[-1].dtype) == (here[-1].shape, here[-1].dtype)
        device.run(choices)
    device.synchronize()
    for actual, expected in zip(there, here, strict=True):  # earlier ones too: views share memory
        assert actual.tolist() == expected.tolist()


def test_simulated_tensor_refuses_what_it_would_get_wrong() -> None:
    x = SimulatedDevice().to_device(torch.tensor([3, 1, 2]))
    with pytest.raises(NotImplementedError, match="unsqueeze_"):
        x.unsqueeze_(0)
    with pytest.raises(StagingError, match=re.escape(__file__)):
        x[x] = 7  # the 7 becomes a tensor that the device never sees


# Devices by name


@pytest.mark.parametrize(
    "name",
    ["", "gpu", "CPU", "cpu:0", "cpu:", "cuda:", "cuda:²", "cuda:x", "cuda:-1", "cuda:0:1", "npu:1.5", "sim"],
)
def test_open_device_names_the_argument_when_it_is_no_device(name: str) -> None:
    with pytest.raises(InvalidArgumentError, match=f"^device is '{name}'; allowed: cpu, linalg, cuda, npu"):
        open_device(name)


@pytest.mark.parametrize("name", ["cuda", "cuda:0"])
def test_open_device_says_why_when_there_is_no_cuda(name: str) -> None:
    if torch.cuda.is_available():
        pytest.skip("cuda is available here")
    with pytest.raises(UnavailableError, match=f"^cuda: torch {re.escape(torch.__version__)} finds no cuda"):
        open_device(name)


def test_open_device_says_why_when_there_is_no_npu() -> None:
    try:
        import torch_npu  # noqa: F401  # pyright: ignore[reportMissingImports]
    except ImportError:
        pass
    else:
        pytest.skip("torch_npu is installed here")
    with pytest.raises(UnavailableError, match=r"^npu: torch_npu cannot be imported \(.*torch_npu"):
        open_device("npu")


def test_open_device_says_why_when_the_index_is_too_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    assert open_device("cuda").torch_device == torch.device("cuda", 1)
    assert open_device("cuda:0").torch_device == torch.device("cuda", 0)
    with pytest.raises(UnavailableError, match=r"^cuda:2: there are 2 cuda devices, numbered from 0$"):
        open_device("cuda:2")


def test_cpu_device_copies_at_once_and_has_no_host_sync() -> None:
    device = open_device("cpu")
    assert isinstance(device, CpuDevice)
    source, target = device.host_empty(2, torch.int32), device.device_empty(2, torch.int32)
    source.copy_(torch.tensor([1, 2]))
    event = device.new_event()
    device.copy_async(target, source, device.new_stream())
    event.record(device.current_stream())
    assert event.query()
    assert target.tolist() == [1, 2]
    with pytest.raises(UnavailableError, match="a CPU has no host sync"):
        forbid_host_sync(device)


def test_open_test_device_knows_the_simulated_one() -> None:
    assert isinstance(open_test_device("sim"), SimulatedDevice)
    assert isinstance(open_test_device("cpu"), CpuDevice)


def test_sync_debug_mode_is_translated_and_restored() -> None:
    modes: list[Any] = [1]
    module: Any = SimpleNamespace(get_sync_debug_mode=lambda: modes[-1], set_sync_debug_mode=modes.append)
    device = TorchAccelerator(module, torch.device("cuda", 0))

    def fail(message: str) -> None:
        assert modes[-1] == "error"
        raise RuntimeError(message)

    place = rf"^{re.escape(__file__)}:\d+: raise RuntimeError\(message\): called a synchronizing CUDA"
    with pytest.raises(HostSyncError, match=place), forbid_host_sync(device):
        fail("called a synchronizing CUDA operation")
    with pytest.raises(RuntimeError, match="out of memory") as error, forbid_host_sync(device):
        fail("out of memory")
    assert not isinstance(error.value, HostSyncError)
    assert modes == [1, "error", 1, "error", 1]
