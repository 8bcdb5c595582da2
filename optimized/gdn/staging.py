"""A ring of staging slots: host buffers that are copied to the device while the host goes on.

A slot is a pinned host buffer, its device twin of equal size, and two events. Four waits keep it right, and
only the first can make the host wait:

    host writes the host buffer      after copy_done: the slot's last copy has read it
    copy stream copies               after consumer_done: the slot's last readers are done, and those of
                                     the device memory before it was the slot's
    consumer stream reads            after copy_done: the copy has landed
    the ring is dropped              after copy_done of every slot: no copy reads freed memory

A slot is lent out as a `Lease`. It comes back when the lease is released or no longer referenced, never
earlier: a ring never overwrites what somebody may still read.
"""

import weakref
from collections import deque
from collections.abc import Callable

import numpy as np
import torch

from ...reference.errors import CapacityError, StagingError, invalid_argument
from .device import Device, Event, Stream


class _Slot:
    def __init__(self, device: Device, capacity: int) -> None:
        self.host = device.host_empty(capacity, torch.int32)
        self.host_array = self.host.numpy()
        self.device = device.device_empty(capacity, torch.int32)
        self.copy_done: Event = device.new_event()
        self.consumer_done: Event = device.new_event()
        # Fresh device memory may still be in use by work queued before: allocators order it by this stream.
        self.consumer_done.record(device.current_stream())


class Lease:
    """A staged buffer: valid for work launched on the consumer stream until it is released.

    Attributes:
        buffer: `[size]` int32 on the device, written by the copy that the consumer stream waits for.
    """

    def __init__(self, ring: "StagingRing", slot: _Slot, buffer: torch.Tensor, consumer: Stream) -> None:
        self.buffer = buffer
        self._ring = ring
        self._slot: _Slot | None = slot
        self._consumer = consumer

    @property
    def released(self) -> bool:
        """Whether the slot was given back: its buffer may hold another step's data."""
        return self._slot is None

    def release(self) -> None:
        """Give the slot back: all work that reads it has been launched. Releasing twice does nothing."""
        slot, self._slot = self._slot, None
        if slot is not None:
            slot.consumer_done.record(self._consumer)
            self._ring._free.append(slot)

    def __del__(self) -> None:
        self.release()


class StagingRing:
    """Stages int32 data on a device through `depth` slots.

    Args:
        device: where to.
        capacity: int32 values in a slot, >= 1.
        depth: slots, >= 1: how many leases may be held, or their copies in flight, at once. Default: 2.

    Attributes:
        waits: how often the host had to wait for a copy before it could write.
        copies: how many copies were queued.

    Raises:
        InvalidArgumentError: for a capacity or depth below 1.
    """

    def __init__(self, device: Device, capacity: int, depth: int = 2) -> None:
        for name, value in (("capacity", capacity), ("depth", depth)):
            if value < 1:
                invalid_argument(name, value, ">= 1")
        self.capacity = capacity
        self.depth = depth
        self.waits = 0
        self.copies = 0
        self._device = device
        self._copy_stream = device.new_stream()
        slots = [_Slot(device, capacity) for _ in range(depth)]
        self._free = deque(slots)
        weakref.finalize(self, _finish_copies, slots)

    def stage(self, size: int, fill: Callable[[np.ndarray], None]) -> Lease:
        """Write `size` values on the host and queue their copy to the device.

        Args:
            size: int32 values to stage, at most `capacity`.
            fill: called once with the host buffer `[size]` int32, which it writes. If it raises, nothing is
                copied and the slot stays free.

        Returns:
            The lease of the staged data.

        Raises:
            CapacityError: when size is larger than the slots.
            StagingError: when every slot is held by a lease: waiting would never end.
        """
        if not 0 <= size <= self.capacity:
            raise CapacityError(f"size is {size}; allowed: 0 to the capacity of a slot, {self.capacity}")
        slot = self._next_slot()
        fill(slot.host_array[:size])
        buffer = self._copy(slot, size)
        consumer = self._consumer_after(slot)
        self._free.popleft()
        return Lease(self, slot, buffer, consumer)

    def _next_slot(self) -> _Slot:
        """The slot that was free for longest, its host buffer no longer read by a copy; it stays free."""
        if not self._free:
            raise StagingError(
                f"all {self.depth} slots are held: release() earlier leases (or drop their metadata), "
                "or make the ring deeper"
            )
        slot = self._free[0]
        if not slot.copy_done.query():
            self.waits += 1
            slot.copy_done.synchronize()
        return slot

    def _copy(self, slot: _Slot, size: int) -> torch.Tensor:
        buffer = slot.device[:size]
        self._copy_stream.wait_event(slot.consumer_done)
        self._device.copy_async(buffer, slot.host[:size], self._copy_stream)
        slot.copy_done.record(self._copy_stream)
        self.copies += 1
        return buffer

    def _consumer_after(self, slot: _Slot) -> Stream:
        consumer = self._device.current_stream()
        consumer.wait_event(slot.copy_done)
        return consumer


def _finish_copies(slots: list[_Slot]) -> None:
    """Keep the memory of a ring that is dropped until its copies have read it."""
    for slot in slots:
        slot.copy_done.synchronize()
