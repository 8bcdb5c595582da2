"""The staging ring under adversarial timing: what a consumer reads is what was staged for it, always.

`World` plays the host on a simulated accelerator. Fixed schedules and a search over random ones drive the
ring and mutants of it: the ring must pass all of them, every mutant must fail.
"""

import dataclasses
import gc
import re
import weakref
from collections.abc import Callable
from itertools import accumulate
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    precondition,
    rule,
    run_state_machine_as_test,
)

from ascend_twin.equivalence_tests.cases import metadata_differences
from ascend_twin.equivalence_tests.devices import SimulatedDevice
from ascend_twin.equivalence_tests.recorded_metadata_cases import TwoSlotsWithoutEvents
from ascend_twin.equivalence_tests.strategies import sequence_lengths
from ascend_twin.optimized.gdn import ChunkMetadata, ChunkMetadataBuilder, StagingRing, staging
from ascend_twin.optimized.gdn.device import Device
from ascend_twin.optimized.gdn.staging import Lease
from ascend_twin.reference.errors import CapacityError, InvalidArgumentError, StagingError

CAPACITY = 4
CHOICES = st.lists(st.integers(0, 3), max_size=12)


def _staged(ring: StagingRing, *values: int) -> Lease:
    def fill(out: np.ndarray) -> None:
        out[:] = values

    return ring.stage(len(values), fill)


class World:
    """A host that stages, consumes and releases; it knows what each consumer must have read."""

    def __init__(self, ring_class: type[StagingRing] = StagingRing, depth: int = 2) -> None:
        self.device = SimulatedDevice()
        self.new_ring: Callable[[], StagingRing] = lambda: ring_class(self.device, CAPACITY, depth)
        self.ring = self.new_ring()
        self.held: list[tuple[Lease, list[int]]] = []
        self.held_of_dropped_rings: list[tuple[Lease, list[int]]] = []
        self.read: list[tuple[torch.Tensor, list[int]]] = []
        self.staged = 0

    def stage(self, size: int = CAPACITY) -> None:
        self.staged += 1
        values = [10 * self.staged + i for i in range(size)]
        self.held.append((_staged(self.ring, *values), values))

    def stage_when_all_are_held(self) -> None:
        with pytest.raises(StagingError, match="slots are held"):
            _staged(self.ring, 0)

    def consume(self, n: int, start: int = 0) -> None:
        """Launch a kernel that reads the buffer of a held lease, or a view of it."""
        lease, values = self.held[n]
        self.read.append((lease.buffer[start:].clone(), values[start:]))

    def release(self, n: int) -> None:
        self.held.pop(n)[0].release()

    def drop(self, n: int) -> None:
        del self.held[n]

    def drop_ring(self) -> None:
        """Go on with a new ring; leases of the old one stay valid."""
        self.held_of_dropped_rings += self.held
        self.held = []
        self.ring = self.new_ring()

    def forget(self) -> None:
        """Consume and drop the leases of dropped rings."""
        for lease, values in self.held_of_dropped_rings:
            self.read.append((lease.buffer.clone(), values))
        self.held_of_dropped_rings.clear()

    def step(self, builds: int = 1) -> None:
        """What a model runner does: stage, launch the consumers, release."""
        first = len(self.held)
        for _ in range(builds):
            self.stage()
        for n in range(builds):
            self.consume(first + n)
        for _ in range(builds):
            self.release(first)

    def check(self) -> None:
        self.device.synchronize()
        for read, values in self.read:
            assert read.tolist() == values


# Schedules, each for one way to go wrong


def host_rewrites_a_queued_source(ring_class: type[StagingRing]) -> None:
    world = World(ring_class)
    for _ in range(4):
        world.step()
    world.check()


def copy_overtakes_the_consumer(ring_class: type[StagingRing]) -> None:
    world = World(ring_class, depth=1)
    world.step()
    world.device.synchronize()
    for _ in range(2):
        world.step()
        world.device.run([-1, -1])  # the copy stream goes first, if it may
    world.check()


def consumer_overtakes_the_copy(ring_class: type[StagingRing]) -> None:
    world = World(ring_class)
    world.device.synchronize()
    world.step()
    world.check()


def slot_is_reused_while_it_is_held(ring_class: type[StagingRing]) -> None:
    world = World(ring_class)
    world.stage()
    world.step()
    world.step()
    world.consume(0)
    world.check()


def ring_is_dropped_while_its_copy_is_queued(ring_class: type[StagingRing]) -> None:
    world = World(ring_class)
    world.step()
    world.drop_ring()
    world.stage()  # takes the memory that was freed
    world.check()


def copy_overtakes_the_former_user_of_fresh_memory(ring_class: type[StagingRing]) -> None:
    world = World(ring_class)
    world.stage()
    world.device.run([-1, -1])  # the copy stream goes first, if it may
    world.consume(0)
    world.check()


def two_builds_a_step(ring_class: type[StagingRing]) -> None:
    steps_on_a_device_one_step_behind(ring_class, builds=2)


def steps_on_a_device_one_step_behind(ring_class: type[StagingRing], builds: int) -> None:
    world, before = World(ring_class), None
    for _ in range(4):
        world.step(builds)
        end = world.device.new_event()
        end.record(world.device.current_stream())
        if before is not None:
            before.synchronize()
        before = end
    world.check()


# Mutants


class HostDoesNotWait(StagingRing):
    """Writes the host buffer although its last copy has not read it."""

    def _next_slot(self) -> Any:
        if self._free:
            self._free[0].copy_done = self._device.new_event()
        return super()._next_slot()


class CopyDoesNotWait(StagingRing):
    """Copies into the device buffer although its last reader is not done."""

    def _copy(self, slot: Any, size: int) -> torch.Tensor:
        slot.consumer_done = self._device.new_event()
        return super()._copy(slot, size)


class ConsumerDoesNotWait(StagingRing):
    """Lets the consumer read although the copy has not landed."""

    def _consumer_after(self, slot: Any) -> Any:
        return self._device.current_stream()


class OneSlotIsReusedEarly(StagingRing):
    """Takes its first slot back at once, though its lease is held."""

    def stage(self, size: int, fill: Callable[[np.ndarray], None]) -> Lease:
        lease = super().stage(size, fill)
        if self.copies == 1:
            lease.release()
        return lease


class DroppedWithoutWaiting(StagingRing):
    """Frees its memory although copies from it are queued."""

    def __init__(self, device: Device, capacity: int, depth: int = 2) -> None:
        with mock.patch.object(staging, "_finish_copies", len):
            super().__init__(device, capacity, depth)


class FreshMemoryIsTakenAtOnce(StagingRing):
    """Copies into new device memory although work queued before may still use it."""

    def __init__(self, device: Device, capacity: int, depth: int = 2) -> None:
        super().__init__(device, capacity, depth)
        for slot in self._free:
            slot.consumer_done = device.new_event()


MUTANTS: dict[type[StagingRing], Callable[[type[StagingRing]], None]] = {
    HostDoesNotWait: host_rewrites_a_queued_source,
    CopyDoesNotWait: copy_overtakes_the_consumer,
    ConsumerDoesNotWait: consumer_overtakes_the_copy,
    OneSlotIsReusedEarly: slot_is_reused_while_it_is_held,
    DroppedWithoutWaiting: ring_is_dropped_while_its_copy_is_queued,
    FreshMemoryIsTakenAtOnce: copy_overtakes_the_former_user_of_fresh_memory,
    TwoSlotsWithoutEvents: two_builds_a_step,
}


@pytest.mark.parametrize("schedule", MUTANTS.values())
def test_ring_delivers_what_was_staged_under_adversarial_schedules(
    schedule: Callable[[type[StagingRing]], None],
) -> None:
    schedule(StagingRing)


@pytest.mark.parametrize("mutant", MUTANTS)
def test_schedule_catches_mutant(mutant: type[StagingRing]) -> None:
    with pytest.raises(AssertionError):
        MUTANTS[mutant](mutant)


def test_two_slots_without_events_pass_at_one_build_a_step_asc_12079() -> None:
    steps_on_a_device_one_step_behind(TwoSlotsWithoutEvents, builds=1)


class StagingMachine(RuleBasedStateMachine):
    """Everything a host can do with a ring, in any order, while the device goes on as it likes."""

    ring_class: type[StagingRing] = StagingRing

    @initialize(depth=st.integers(1, 3))
    def start(self, depth: int) -> None:
        self.depth = depth
        self.world = World(self.ring_class, depth)

    @rule(size=st.integers(0, CAPACITY))
    def stage(self, size: int) -> None:
        if len(self.world.held) == self.depth:
            self.world.stage_when_all_are_held()
        else:
            self.world.stage(size)

    @precondition(lambda self: self.world.held)
    @rule(n=st.integers(0, 2), start=st.integers(0, CAPACITY - 1))
    def consume(self, n: int, start: int) -> None:
        self.world.consume(n % len(self.world.held), start)

    @precondition(lambda self: self.world.held)
    @rule(n=st.integers(0, 2))
    def release(self, n: int) -> None:
        self.world.release(n % len(self.world.held))

    @precondition(lambda self: self.world.held)
    @rule(n=st.integers(0, 2))
    def drop(self, n: int) -> None:
        self.world.drop(n % len(self.world.held))

    @rule(choices=CHOICES)
    def run(self, choices: list[int]) -> None:
        self.world.device.run(choices)

    @rule()
    def drop_ring(self) -> None:
        self.world.drop_ring()

    @rule()
    def forget(self) -> None:
        self.world.forget()

    def teardown(self) -> None:
        if hasattr(self, "world"):
            self.world.check()


TestStagingMachine = StagingMachine.TestCase
TestStagingMachine.settings = settings(max_examples=2 * settings().max_examples)


@pytest.mark.parametrize("mutant", MUTANTS)
def test_random_search_catches_mutant(mutant: type[StagingRing]) -> None:
    class Machine(StagingMachine):
        ring_class = mutant

    search = settings(
        max_examples=1000,
        derandomize=True,
        database=None,
        phases=[Phase.generate],
        print_blob=False,
    )
    with pytest.raises((AssertionError, pytest.fail.Exception)):
        run_state_machine_as_test(Machine, settings=search)


# Properties of their own


@given(st.integers(2, 3), st.lists(CHOICES, min_size=1, max_size=8))
def test_ring_delivers_what_was_staged_when_a_step_builds_twice(depth: int, delays: list[list[int]]) -> None:
    world = World(depth=depth)
    for choices in delays:
        world.step(builds=2)  # the model and its drafter
        world.device.run(choices)
    world.check()
    assert world.ring.copies == 2 * len(delays)


@given(st.lists(st.tuples(sequence_lengths(), CHOICES, st.booleans()), max_size=8), st.integers(1, 3))
def test_metadata_read_at_a_step_is_that_of_the_step(
    steps: list[tuple[tuple[int, ...], list[int], bool]], depth: int
) -> None:
    device = SimulatedDevice()
    builder = ChunkMetadataBuilder(device, 1024, 8, 32, depth=depth)
    read: list[tuple[ChunkMetadata, tuple[int, ...]]] = []
    for lens, choices, release in steps:
        metadata = builder.build(torch.tensor([0, *accumulate(lens)]))
        views = {name: x.clone() for name, x in vars(metadata).items() if isinstance(x, torch.Tensor)}
        read.append((dataclasses.replace(metadata, **views, _lease=None), lens))
        if release:
            metadata.release()
        del metadata, views
        device.run(choices)
    device.synchronize()
    for copies, lens in read:
        assert not metadata_differences(copies, [0, *accumulate(lens)], builder.block_sizes)
    assert builder.ring.copies == len(device.copied_bytes) == len(steps)


@pytest.mark.parametrize("landed", [True, False])
def test_stage_waits_only_when_the_copy_of_its_slot_is_queued(landed: bool) -> None:
    world = World(depth=1)
    world.step()
    if landed:
        world.device.run([0] * 20)
    world.step()
    assert world.ring.waits == (not landed)
    world.check()


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_stage_waits_for_every_reuse_when_the_device_stands_still(depth: int) -> None:
    world = World(depth=depth)
    for _ in range(8):
        world.step()
    assert world.ring.waits == 8 - depth
    assert world.ring.copies == 8
    world.check()


def test_stage_does_not_wait_for_the_consumer() -> None:
    world = World(depth=1)
    world.device.synchronize()
    world.stage()
    world.device.synchronize()
    world.consume(0)
    consumed = world.device.new_event()
    consumed.record(world.device.current_stream())
    world.release(0)
    world.stage()
    assert world.ring.waits == 0
    assert not consumed.query()
    world.check()


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_stage_raises_when_every_slot_is_held(depth: int) -> None:
    world = World(depth=depth)
    for _ in range(depth):
        world.stage()
    said = "release() earlier leases (or drop their metadata), or make the ring deeper"
    for _ in range(3):
        with pytest.raises(StagingError, match=rf"^all {depth} slots are held: {re.escape(said)}$"):
            world.ring.stage(1, lambda out: pytest.fail("a held slot was written"))
    assert world.ring.copies == depth
    world.consume(0)
    world.release(0)
    world.stage()
    for n in range(depth):
        world.consume(n)
    world.check()


def test_ring_has_two_slots_unless_told_otherwise() -> None:
    ring = StagingRing(SimulatedDevice(), CAPACITY)
    held = [_staged(ring, n) for n in range(2)]
    with pytest.raises(StagingError, match="all 2 slots are held"):
        _staged(ring, 2)
    assert not any(lease.released for lease in held)


def test_ring_waits_for_its_copies_and_frees_its_memory_when_it_is_dropped() -> None:
    ring = StagingRing(SimulatedDevice(), CAPACITY)
    for value in (1, 2):
        _staged(ring, value).release()
    copies = [slot.copy_done for slot in ring._free]
    memory = [weakref.ref(slot.host) for slot in ring._free]
    assert not any(copy.query() for copy in copies)
    del ring
    assert all(copy.query() for copy in copies)
    assert [host() for host in memory] == [None, None]


def test_slot_comes_back_when_its_lease_is_garbage() -> None:
    ring = StagingRing(SimulatedDevice(), CAPACITY, depth=1)
    cycle: list[Any] = [_staged(ring, 1)]
    cycle.append(cycle)
    del cycle
    gc.collect()
    _staged(ring, 2).release()


def test_releasing_twice_gives_the_slot_back_once() -> None:
    ring = StagingRing(SimulatedDevice(), CAPACITY, depth=1)
    lease = _staged(ring, 1)
    lease.release()
    lease.release()
    held = _staged(ring, 2)
    with pytest.raises(StagingError, match="all 1 slots are held"):
        _staged(ring, 3)
    del lease  # nor does its end give back the slot that `held` has now
    with pytest.raises(StagingError, match="all 1 slots are held"):
        _staged(ring, 3)
    held.release()


def test_lease_knows_whether_it_was_released() -> None:
    ring = StagingRing(SimulatedDevice(), CAPACITY, depth=2)
    lease, other = _staged(ring, 1), _staged(ring, 2)
    assert (lease.released, other.released) == (False, False)
    lease.release()
    assert (lease.released, other.released) == (True, False)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_slot_stays_free_when_fill_raises(error: type[BaseException]) -> None:
    def fill(out: np.ndarray) -> None:
        out[0] = -1
        raise error

    world = World(depth=1)
    world.step()
    with pytest.raises(error):
        world.ring.stage(1, fill)
    assert world.ring.copies == 1
    world.step()
    world.check()


@pytest.mark.parametrize("size", [-1, CAPACITY + 1])
def test_stage_raises_when_size_exceeds_the_capacity(size: int) -> None:
    ring = StagingRing(SimulatedDevice(), CAPACITY, depth=1)
    with pytest.raises(CapacityError, match=f"size is {size}; allowed: 0 to .* {CAPACITY}"):
        ring.stage(size, lambda out: pytest.fail("something was written"))
    assert ring.copies == 0
    _staged(ring, 1).release()


@pytest.mark.parametrize("value", [0, -1])
@pytest.mark.parametrize("name", ["capacity", "depth"])
def test_ring_names_the_argument_when_it_is_below_one(name: str, value: int) -> None:
    with pytest.raises(InvalidArgumentError, match=f"^{name} is {value}; allowed: >= 1$"):
        StagingRing(SimulatedDevice(), **{"capacity": 1, "depth": 1, name: value})


def test_ring_delivers_what_was_staged_on_the_device_under_test(device: Device) -> None:
    ring = StagingRing(device, 1 << 16, depth=2)
    read: list[torch.Tensor] = []
    for step in range(16):
        lease = ring.stage(1 << 16, lambda out, step=step: out.fill(step))
        read.append(lease.buffer.clone())
        lease.release()
    if isinstance(device, SimulatedDevice):
        device.synchronize()
    assert [set(x.tolist()) for x in read] == [{step} for step in range(16)]


def test_slot_waits_for_its_own_consumer_when_released_under_another_stream() -> None:
    device = SimulatedDevice()
    ring = StagingRing(device, capacity=1, depth=1)
    consumer, other = device.new_stream(), device.new_stream()

    def fill(value: int) -> Callable[[np.ndarray], None]:
        return lambda out: out.fill(value)

    with device.stream(consumer):
        lease = ring.stage(1, fill(7))
        read = lease.buffer.clone()
    with device.stream(other):
        lease.release()
        ring.stage(1, fill(8))
        other_event = device.new_event()
        other_event.record(other)
    other_event.synchronize()  # the copy of 8 has landed; the consumer of 7 must have read before
    device.synchronize()
    assert read.tolist() == [7]
