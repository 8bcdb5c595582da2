"""A simulated accelerator on CPU memory, with everything about a real one that makes asynchronous code fail.

Work is queued on streams and executed in stream order, but only when the test lets it (`run`) or when the
host waits for it: as late as possible unless told otherwise. Pinned memory is not kept alive by a queued
copy; once freed it is poisoned and handed out again at once. Fresh device memory is poisoned. Reading device
memory on the host before the work that writes it is done raises, and under `forbid_host_sync` any read does.

Tensors of the device are ordinary tensors to the code under test: PyTorch calls on them are queued, views are
views, and results have their shapes before they have values.
"""

import os
import traceback
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from ..optimized.gdn.device import Device, LinalgDevice, open_device
from ..reference.errors import HostSyncError, StagingError, UnsynchronizedReadError

_INT_POISON = -0x5A5A5A5B
_HOST_READS = ("tolist", "numpy", "__array__", "__dlpack__")
_MASK_WRITTEN = (torch.ops.aten.index_put_.default, torch.ops.aten.index_put.default)
_MASK_INDEXED = (torch.ops.aten.index.Tensor, *_MASK_WRITTEN)


@dataclass
class _Ticket:
    """One recording of an event."""

    stream: "SimulatedStream"
    done: bool = False


class SimulatedStream:
    """A queue of operations; a `_Ticket` in it is an event to mark or, from elsewhere, one to wait for."""

    def __init__(self) -> None:
        self.queue: deque[Callable[[], None] | _Ticket] = deque()

    def wait_event(self, event: "SimulatedEvent", /) -> None:
        if event.ticket is not None:
            self.queue.append(event.ticket)

    def blocked(self) -> bool:
        """Whether the next operation waits for an event of another stream."""
        head = self.queue[0]
        return isinstance(head, _Ticket) and head.stream is not self and not head.done

    def execute_next(self) -> None:
        """Execute the next operation, and first whatever it waits for."""
        head = self.queue[0]
        if isinstance(head, _Ticket):
            if head.stream is self:
                head.done = True
            while not head.done:
                head.stream.execute_next()
        else:
            head()
        self.queue.popleft()


class SimulatedEvent:
    """A point in a stream."""

    def __init__(self) -> None:
        self.ticket: _Ticket | None = None

    def record(self, stream: SimulatedStream, /) -> None:
        self.ticket = _Ticket(stream)
        stream.queue.append(self.ticket)

    def query(self) -> bool:
        return self.ticket is None or self.ticket.done

    def synchronize(self) -> None:
        while self.ticket is not None and not self.ticket.done:
            self.ticket.stream.execute_next()


@dataclass
class _Memory:
    """What is known of one allocation on the device."""

    pending_writes: int = 0


class SimulatedTensor(torch.Tensor):
    """A tensor on a `SimulatedDevice`; its values are in `contents` once the work that writes them ran."""

    owner: "SimulatedDevice"
    contents: torch.Tensor
    memory: _Memory

    @staticmethod
    def __new__(cls, owner: "SimulatedDevice", contents: torch.Tensor, memory: _Memory) -> "SimulatedTensor":
        self = torch.Tensor._make_wrapper_subclass(  # pyright: ignore[reportAttributeAccessIssue]
            cls,
            contents.size(),
            strides=contents.stride(),
            storage_offset=contents.storage_offset(),
            dtype=contents.dtype,
            device=owner.torch_device,
        )
        self.owner, self.contents, self.memory = owner, contents, memory
        return self

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return f"SimulatedTensor(shape={tuple(self.shape)}, dtype={self.dtype})"

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name in _HOST_READS and isinstance(args[0], SimulatedTensor):
            return func(args[0].owner._read(args[0], name), *args[1:], **(kwargs or {}))
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        owner = next(t.owner for t in _simulated((args, kwargs)))
        return owner._dispatch(func, args, kwargs or {})


class _Factories(TorchDispatchMode):
    """Makes calls such as `torch.zeros(..., device=q.device)` allocate on the simulated device."""

    def __init__(self, owner: "SimulatedDevice") -> None:
        super().__init__()
        self.owner = owner

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if any(True for _ in _simulated((args, kwargs))):
            return self.owner._dispatch(func, args, kwargs)
        if kwargs.get("device") == self.owner.torch_device:
            if any(isinstance(x, torch.Tensor) for x in _leaves((args, kwargs))):
                self.owner._raise_host_sync(f"{func} copies pageable host memory to the device")
            contents = func(*args, **{**kwargs, "device": "cpu"})
            if "empty" in str(func):
                _poison(contents)
            return SimulatedTensor(self.owner, contents, _Memory())
        return func(*args, **kwargs)


class _HostData(TorchFunctionMode):
    """Refuses calls such as `torch.tensor([0, 1], device=q.device)`: they copy host data and wait for it."""

    def __init__(self, owner: "SimulatedDevice") -> None:
        super().__init__()
        self.owner = owner

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in (torch.tensor, torch.as_tensor) and kwargs.get("device") == self.owner.torch_device:
            self.owner._raise_host_sync(f"torch.{func.__name__} copies pageable host memory to the device")
        return func(*args, **kwargs)


@dataclass
class SimulatedDevice:
    """An accelerator that executes as late as the test decides.

    Attributes:
        torch_device: `meta`, so that nothing computes on its tensors by accident.
        default_stream: where PyTorch calls on its tensors are queued, unless `stream` says otherwise.
        copied_bytes: the size of each host-to-device copy queued so far.
    """

    torch_device: torch.device = field(default_factory=lambda: torch.device("meta"))
    default_stream: SimulatedStream = field(default_factory=SimulatedStream)
    copied_bytes: list[int] = field(default_factory=list)
    _streams: list[SimulatedStream] = field(default_factory=list)
    _pinned: list[np.ndarray] = field(default_factory=list)
    _free_pinned: list[np.ndarray] = field(default_factory=list)
    _forbidding: bool = False
    _current_stream: SimulatedStream | None = None

    def __post_init__(self) -> None:
        self._streams.append(self.default_stream)

    # Memory

    def host_empty(self, size: int, dtype: torch.dtype) -> torch.Tensor:
        num_bytes = size * dtype.itemsize
        fits = next((i for i, b in enumerate(self._free_pinned) if b.nbytes >= num_bytes), None)
        if fits is None:
            block = np.full(num_bytes, 0xA5, dtype=np.uint8)
            self._pinned.append(block)
        else:
            block = self._free_pinned.pop(fits)
        handle = block[:num_bytes]
        weakref.finalize(handle, self._recycle, block)
        return torch.from_numpy(handle).view(dtype)

    def _recycle(self, block: np.ndarray) -> None:
        block.fill(0xA5)
        self._free_pinned.insert(0, block)

    def device_empty(self, size: int, dtype: torch.dtype) -> torch.Tensor:
        contents, memory = torch.empty(size, dtype=dtype), _Memory()
        # As from a caching allocator: work queued earlier on this stream may still use the memory.
        self._queue(self.current_stream(), lambda: _poison(contents), [memory])
        return SimulatedTensor(self, contents, memory)

    def to_device(self, x: torch.Tensor) -> torch.Tensor:
        """A tensor of the device with the values of host tensor `x`, which has already landed."""
        return SimulatedTensor(self, x.clone(), _Memory())

    def copy_async(self, target: torch.Tensor, source: torch.Tensor, stream: SimulatedStream) -> None:
        if not isinstance(target, SimulatedTensor):
            raise StagingError(f"the target of an asynchronous copy is a {type(target).__name__} on the host")
        if not source.numel():
            return
        raw = self._pinned_memory(source)
        self.copied_bytes.append(raw.nbytes)
        contents, values = target.contents, torch.from_numpy(raw).view(source.dtype)
        self._queue(stream, lambda: contents.copy_(values), [target.memory])

    def copy_back_async(self, target: torch.Tensor, source: torch.Tensor, stream: SimulatedStream) -> None:
        """Queue a copy of device memory to pinned memory, which must live until it is done."""
        if not isinstance(source, SimulatedTensor):
            raise StagingError(f"the source of an asynchronous copy is a {type(source).__name__} on the host")
        values, landing = source.contents, torch.from_numpy(self._pinned_memory(target)).view(target.dtype)
        self._queue(stream, lambda: landing.copy_(values.reshape(-1)), [])

    def _pinned_memory(self, source: torch.Tensor) -> np.ndarray:
        """The bytes of a contiguous pinned tensor, without keeping their owner alive."""
        for block in self._pinned:
            offset = source.data_ptr() - block.ctypes.data
            if 0 <= offset <= block.nbytes - source.nbytes:
                return block[offset : offset + source.nbytes]
        raise StagingError("the host side of an asynchronous copy is pageable memory: it must be pinned")

    # Streams and events

    def new_stream(self) -> SimulatedStream:
        self._streams.append(SimulatedStream())
        return self._streams[-1]

    def current_stream(self) -> SimulatedStream:
        return self._current_stream or self.default_stream

    @contextmanager
    def stream(self, stream: SimulatedStream) -> Iterator[None]:
        """Make `stream` the current one: PyTorch calls are queued on it."""
        previous, self._current_stream = self._current_stream, stream
        try:
            yield
        finally:
            self._current_stream = previous

    def new_event(self) -> SimulatedEvent:
        return SimulatedEvent()

    def run(self, choices: list[int]) -> None:
        """Execute one queued operation for each choice: the choice picks among the streams that can go on."""
        for choice in choices:
            ready = [s for s in self._streams if s.queue and not s.blocked()]
            if ready:
                ready[choice % len(ready)].execute_next()

    def synchronize(self) -> None:
        """Execute everything that is queued."""
        for stream in self._streams:
            while stream.queue:
                stream.execute_next()

    def _queue(self, stream: SimulatedStream, work: Callable[[], Any], written: list[_Memory]) -> None:
        for memory in written:
            memory.pending_writes += 1

        def execute() -> None:
            work()
            for memory in written:
                memory.pending_writes -= 1

        stream.queue.append(execute)

    # Host reads

    @contextmanager
    def forbid_host_sync(self) -> Iterator[None]:
        previous, self._forbidding = self._forbidding, True
        try:
            with _HostData(self), _Factories(self):
                yield
        finally:
            self._forbidding = previous

    def _raise_host_sync(self, what: str) -> None:
        if self._forbidding:
            raise HostSyncError(f"{_place()}: {what}")

    def _read(self, x: SimulatedTensor, how: str) -> torch.Tensor:
        self._raise_host_sync(f"{how} reads device memory on the host")
        if x.memory.pending_writes:
            raise UnsynchronizedReadError(
                f"{_place()}: {how} reads a {tuple(x.shape)} tensor while {x.memory.pending_writes} queued "
                "operations have yet to write it: wait for an event recorded behind them"
            )
        return x.contents

    # PyTorch calls

    def _dispatch(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Execute a view or a host read now; queue anything else and return tensors yet without values."""
        if torch.Tag.inplace_view in func.tags:
            raise NotImplementedError(f"{func} on a SimulatedTensor")
        if _reads_on_host(func, args, kwargs):
            read = tree_map(
                lambda x: self._read(x, str(func)) if isinstance(x, SimulatedTensor) else x,
                args[1] if func in _MASK_WRITTEN else (args, kwargs),
            )
            if func not in _MASK_WRITTEN:
                result = func(*read[0], **read[1])
                return self._wrap(result, _Memory()) if _has_dynamic_shape(func) else result
        for x in _leaves((args, kwargs)):
            if isinstance(x, torch.Tensor) and not isinstance(x, SimulatedTensor):
                if x.device == self.torch_device and not self._forbidding:
                    raise StagingError(f"{_place()}: {func}: needs forbid_host_sync() to make its operands")
                if x.ndim:
                    raise HostSyncError(
                        f"{_place()}: {func} mixes device tensors with a host tensor {tuple(x.shape)}"
                    )
        contents = tree_map(lambda x: x.contents if isinstance(x, SimulatedTensor) else x, (args, kwargs))
        if func.is_view:
            memory = next(_simulated((args, kwargs))).memory
            return self._wrap(func(*contents[0], **contents[1]), memory)
        return self._launch(func, args, kwargs, contents)

    def _wrap(self, result: Any, memory: _Memory) -> Any:
        return tree_map(
            lambda x: SimulatedTensor(self, x, memory) if isinstance(x, torch.Tensor) else x, result
        )

    def _launch(self, func: Any, args: Any, kwargs: Any, contents: Any) -> Any:
        of_meta: dict[int, SimulatedTensor] = {}

        def to_meta(x: Any) -> Any:
            if not isinstance(x, SimulatedTensor):
                return x
            meta = torch.empty_strided(x.size(), x.stride(), dtype=x.dtype, device="meta")
            of_meta[id(meta)] = x
            keep.append(meta)
            return meta

        keep: list[torch.Tensor] = []
        meta_args, meta_kwargs = tree_map(to_meta, (args, kwargs))
        fresh: list[SimulatedTensor] = []

        def from_meta(x: Any) -> Any:
            if not isinstance(x, torch.Tensor):
                return x
            if id(x) in of_meta:
                return of_meta[id(x)]
            empty = torch.empty_strided(x.size(), x.stride(), dtype=x.dtype)
            fresh.append(SimulatedTensor(self, _poison(empty), _Memory()))
            return fresh[-1]

        result = tree_map(from_meta, func(*meta_args, **meta_kwargs))
        written = [x.memory for x in fresh]
        if func._schema.is_mutable:
            written += [x.memory for x in _written(func, args, kwargs)]
        targets = [x.contents for x in fresh]
        device_kwargs = {k: "cpu" if k == "device" and v is not None else v for k, v in contents[1].items()}

        def work() -> None:
            if "empty" in str(func):
                return
            values = [x for x in _leaves(func(*contents[0], **device_kwargs)) if isinstance(x, torch.Tensor)]
            if targets:
                for target, value in zip(targets, values, strict=True):
                    target.copy_(value)

        self._queue(self.current_stream(), work, written)
        return result


def interprets(device: Device) -> bool:
    """Whether Triton kernels run in Triton's interpreter on `device`: on a CPU, unless as native code."""
    return device.torch_device.type == "cpu" and not isinstance(device, LinalgDevice)


def open_test_device(name: str) -> Device:
    """The device called `name`: those of `open_device`, and `sim`, the simulated accelerator.

    Raises:
        InvalidArgumentError, UnavailableError: as `open_device`.
    """
    return SimulatedDevice() if name == "sim" else open_device(name)


def _leaves(tree: Any) -> list[Any]:
    return tree_leaves(tree)


def _simulated(tree: Any) -> Iterator[SimulatedTensor]:
    return (x for x in _leaves(tree) if isinstance(x, SimulatedTensor))


def _written(func: Any, args: Any, kwargs: Any) -> list[SimulatedTensor]:
    """The arguments that a call writes, by its schema."""
    written: list[SimulatedTensor] = []
    for i, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[i] if i < len(args) else kwargs.get(argument.name)
            written.extend(_simulated(value))
    return written


def _reads_on_host(func: Any, args: Any, kwargs: Any) -> bool:
    """Whether a call needs values on the host: its result or the shape of its result depends on them."""
    if func in _MASK_INDEXED:
        return any(x.dtype in (torch.bool, torch.uint8) for x in _simulated(args[1]))
    if func in (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default):
        to_host = "device" in kwargs and kwargs["device"] is not None and kwargs["device"].type == "cpu"
        into_host = func is torch.ops.aten.copy_.default and not isinstance(args[0], SimulatedTensor)
        return to_host or into_host
    if func is torch.ops.aten.repeat_interleave.Tensor:
        return kwargs.get("output_size") is None
    return torch.Tag.data_dependent_output in func.tags or _has_dynamic_shape(func)


def _has_dynamic_shape(func: Any) -> bool:
    """Whether the shape of the result depends on values."""
    return func is torch.ops.aten.index.Tensor or torch.Tag.dynamic_output_shape in func.tags


def _poison(x: torch.Tensor) -> torch.Tensor:
    """Fill with values that show: NaN, or an integer that indexes nothing."""
    if x.dtype.is_floating_point:
        return x.fill_(float("nan"))
    return x.fill_(True) if x.dtype == torch.bool else x.fill_(_INT_POISON if x.dtype.itemsize >= 4 else 0x5A)


def _place() -> str:
    """Where the code under test is: the innermost frame outside PyTorch and this file."""
    torch_folder = os.path.dirname(torch.__file__)
    for frame in reversed(traceback.extract_stack()):
        if frame.filename != __file__ and not frame.filename.startswith((torch_folder, "<")):
            return f"{frame.filename}:{frame.lineno}: {frame.line}"
    return "unknown place"
