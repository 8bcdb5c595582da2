"""The little that staging needs from a device: memory, streams, events and a guard against host syncs."""

import traceback
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from types import ModuleType
from typing import Any, Protocol

import torch

from ...reference.errors import HostSyncError, UnavailableError, invalid_argument


class Event(Protocol):
    """A point in a stream. An event that was never recorded counts as passed."""

    def record(self, stream: Any, /) -> None:
        """Place the event behind all work queued on `stream` so far."""

    def query(self) -> bool:
        """Whether all work before the event is done. Does not wait."""
        ...

    def synchronize(self) -> None:
        """Make the host wait until the event has passed."""


class Stream(Protocol):
    """A queue of device work, executed in order."""

    def wait_event(self, event: Any, /) -> None:
        """Make work queued from now on wait for `event`. Does not make the host wait."""


class Device(Protocol):
    """What staging needs from a device."""

    @property
    def torch_device(self) -> torch.device:
        """Where the tensors of `device_empty` are."""
        ...

    def host_empty(self, size: int, dtype: torch.dtype) -> torch.Tensor:
        """Uninitialised host memory `[size]`, pinned where the device can read it asynchronously."""
        ...

    def device_empty(self, size: int, dtype: torch.dtype) -> torch.Tensor:
        """Uninitialised device memory `[size]`."""
        ...

    def new_stream(self) -> Stream:
        """A stream of its own."""
        ...

    def current_stream(self) -> Stream:
        """The stream that work is queued on now."""
        ...

    def new_event(self) -> Event:
        """An event, not yet recorded."""
        ...

    def copy_async(self, target: torch.Tensor, source: torch.Tensor, stream: Any) -> None:
        """Queue a copy of host memory `source` to device memory `target` on `stream` and return at once.

        The caller keeps `source` unchanged and referenced until an event recorded behind the copy passes.
        """

    def forbid_host_sync(self) -> AbstractContextManager[None]:
        """A context in which a device-to-host synchronisation raises `HostSyncError` with its place."""
        ...


class _Done:
    """Stream and event of a device that executes at once: all work is done when a call returns."""

    def record(self, stream: Any, /) -> None:
        pass

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        pass

    def wait_event(self, event: Any, /) -> None:
        pass


class CpuDevice:
    """The CPU: copies are done at once, and there is no device to synchronise with."""

    torch_device = torch.device("cpu")
    _done = _Done()

    def host_empty(self, size: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(size, dtype=dtype, device="cpu")

    def device_empty(self, size: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(size, dtype=dtype, device="cpu")

    def new_stream(self) -> Stream:
        return self._done

    def current_stream(self) -> Stream:
        return self._done

    def new_event(self) -> Event:
        return self._done

    def copy_async(self, target: torch.Tensor, source: torch.Tensor, stream: Any) -> None:
        target.copy_(source)

    def forbid_host_sync(self) -> AbstractContextManager[None]:
        raise UnavailableError(
            "a CPU has no host sync to forbid; use ascend_twin.equivalence_tests.devices.SimulatedDevice, "
            "cuda or npu"
        )


class LinalgDevice(CpuDevice):
    """The CPU, on which Triton launches run what the Ascend compiler makes of them (`native_launches`)."""


class TorchAccelerator:
    """A CUDA GPU or an Ascend NPU, through the module of torch that speaks for it."""

    def __init__(self, module: ModuleType, torch_device: torch.device) -> None:
        self._module: Any = module
        self.torch_device = torch_device

    def host_empty(self, size: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(size, dtype=dtype, device="cpu", pin_memory=True)

    def device_empty(self, size: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(size, dtype=dtype, device=self.torch_device)

    def new_stream(self) -> Stream:
        return self._module.Stream(device=self.torch_device)

    def current_stream(self) -> Stream:
        return self._module.current_stream(self.torch_device)

    def new_event(self) -> Event:
        return self._module.Event()

    def copy_async(self, target: torch.Tensor, source: torch.Tensor, stream: Any) -> None:
        with self._module.stream(stream):
            target.copy_(source, non_blocking=True)

    @contextmanager
    def forbid_host_sync(self) -> Iterator[None]:
        previous = self._module.get_sync_debug_mode()
        self._module.set_sync_debug_mode("error")
        try:
            yield
        except RuntimeError as error:
            if "synchroniz" not in str(error):
                raise
            frame = traceback.extract_tb(error.__traceback__)[-1]
            raise HostSyncError(f"{frame.filename}:{frame.lineno}: {frame.line}: {error}") from error
        finally:
            self._module.set_sync_debug_mode(previous)


def open_device(name: str) -> Device:
    """The device called `name`, with nothing in its place when it cannot be had.

    Args:
        name: `cpu`, `linalg`, `cuda`, `npu`, or one of the last two with an index (`cuda:1`). `linalg` is the
            CPU, and from now on all Triton launches of this process on the CPU run what the Ascend compiler
            makes of them.

    Returns:
        The device.

    Raises:
        InvalidArgumentError: for a name that is none of these.
        UnavailableError: when the device cannot be used here, with the reason.
    """
    kind, colon, index = name.partition(":")
    is_index = kind in ("cuda", "npu") and index.isascii() and index.isdigit()
    if kind not in ("cpu", "linalg", "cuda", "npu") or (colon and not is_index):
        invalid_argument("device", repr(name), "cpu, linalg, cuda, npu, or cuda:INDEX, npu:INDEX")
    if kind == "cpu":
        return CpuDevice()
    if kind == "linalg":
        return _linalg_device()
    module = torch.cuda if kind == "cuda" else _npu_module()
    if not module.is_available():
        raise UnavailableError(f"{kind}: torch {torch.__version__} finds no {kind} device here")
    number = int(index) if index else module.current_device()
    if number >= module.device_count():
        raise UnavailableError(f"{name}: there are {module.device_count()} {kind} devices, numbered from 0")
    return TorchAccelerator(module, torch.device(kind, number))


def _linalg_device() -> LinalgDevice:
    from .ascend_native import check_native_installed

    check_native_installed()  # first: what follows imports Triton
    from .kernels.launch import run_on_cpu_by
    from .native_launches import NativeLauncher

    run_on_cpu_by(NativeLauncher())
    return LinalgDevice()


def _npu_module() -> Any:
    try:
        import torch_npu  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise UnavailableError(f"npu: torch_npu cannot be imported ({error})") from error
    return torch_npu.npu


def forbid_host_sync(device: Device) -> AbstractContextManager[None]:
    """A context in which any device-to-host synchronisation of `device` raises, with the place.

    On cuda and npu this is the sync debug mode of torch; `SimulatedDevice` of the equivalence tests does the
    same without hardware.

    Raises:
        HostSyncError: inside the context, at the first synchronisation.
        UnavailableError: for the CPU, which has none.
    """
    return device.forbid_host_sync()
