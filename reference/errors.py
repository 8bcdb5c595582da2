"""The errors of the package. Every error that we raise derives from `AscendTwinError`."""

from typing import NoReturn


class AscendTwinError(Exception):
    """Base class of every error that this package raises on purpose."""


class InvalidArgumentError(AscendTwinError, ValueError):
    """An argument is not what the function accepts; the message names it, its value and what is allowed."""


class CapacityError(InvalidArgumentError):
    """A batch is larger than the buffers that were allocated for it; nothing has been written."""


class StagingError(AscendTwinError, RuntimeError):
    """The staging ring was used against its contract (every slot is still held, or a lease ended twice)."""


class HostSyncError(AscendTwinError, RuntimeError):
    """A device-to-host synchronisation happened where none is allowed; the message names the place."""


class UnsynchronizedReadError(AscendTwinError, RuntimeError):
    """Memory was read on the host while the device work that writes it was still queued."""


class UnavailableError(AscendTwinError, RuntimeError):
    """An explicit choice (device, implementation, peer) cannot be met here; the message says why."""


class TraceError(AscendTwinError, ValueError):
    """A request trace cannot be read; the message names the file, the line and the reason."""


class FixtureError(AscendTwinError, ValueError):
    """A fixture cannot be read; the message names the file, the place in it and the reason."""


class SchedulerStateError(AscendTwinError, RuntimeError):
    """A scheduler met a state that it rules out: where vLLM asserts, or a caller broke its rules."""


class LockstepError(AscendTwinError, RuntimeError):
    """Data-parallel ranks no longer step together; the message names rank, step and collective."""


def invalid_argument(name: str, value: object, allowed: str) -> NoReturn:
    """Raise `InvalidArgumentError` in the one form that all messages of the package share."""
    raise InvalidArgumentError(f"{name} is {value}; allowed: {allowed}")
