"""Files that a command writes: checked before any work, written in one step after it."""

import os
from collections.abc import Callable, Mapping
from pathlib import Path

from ..reference.errors import invalid_argument


def check_writable(option: str, path: Path, suffixes: tuple[str, ...] = ()) -> None:
    """Raise InvalidArgumentError unless `path` can be written: a file, in a folder that takes files.

    `suffixes` are those allowed, in lower case; any, if there are none.
    """
    if suffixes and path.suffix.lower() not in suffixes:
        invalid_argument(option, path, f"a file that ends in {', '.join(suffixes)}")
    try:
        if path.exists() and not path.is_file():
            invalid_argument(option, path, "a file; this is something else")
        temporary = _temporary(path)
        temporary.touch(exist_ok=False)
        temporary.unlink()
    except OSError as error:
        invalid_argument(option, path, f"a file that can be written ({error.strerror or error})")


def check_apart(
    outputs: Mapping[str, tuple[Path | None, tuple[str, ...]]], inputs: Mapping[str, Path | str | None]
) -> None:
    """Refuse outputs that cannot be written, or of which one is another or an input.

    Args:
        outputs: path and allowed suffixes of each option; None is not asked for.
        inputs: path of each file that is read; None is none.

    Raises:
        InvalidArgumentError: naming the option.
    """
    seen = {Path(path).resolve(): name for name, path in inputs.items() if path is not None}
    for option, (path, suffixes) in outputs.items():
        if path is None:
            continue
        check_writable(option, path, suffixes)
        other = seen.setdefault(path.resolve(), option)
        if other != option:
            invalid_argument(option, path, f"another file than that of {other}")


def write_atomically(option: str, path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a temporary file beside `path`, then put it there in one step."""
    temporary = _temporary(path)
    try:
        write(temporary)
        temporary.replace(path)
    except OSError as error:
        invalid_argument(option, path, f"a file that can be written ({error.strerror or error})")
    finally:
        temporary.unlink(missing_ok=True)


def _temporary(path: Path) -> Path:
    """A file beside `path`, so that replacing is one step; of the same suffix."""
    return path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
