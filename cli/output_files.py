"""Files that a command writes: checked before any work, written in one step after it."""

import json
import os
import re
import tempfile
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

from ..reference.errors import invalid_argument

# What XML refuses, control characters, and those that turn the direction of text.
_UNPRINTABLE = re.compile(
    r"[^\t\n\r\x20-\x7e\xa0-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]|[\u202a-\u202e\u2066-\u2069]"
)


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
    # Not Path.resolve: it raises RuntimeError for a link that leads to itself.
    seen = {os.path.realpath(path): name for name, path in inputs.items() if path is not None}
    for option, (path, suffixes) in outputs.items():
        if path is None:
            continue
        check_writable(option, path, suffixes)
        other = seen.setdefault(os.path.realpath(path), option)
        if other != option:
            invalid_argument(option, path, f"another file than that of {other}")


def check_folder(option: str, path: Path) -> None:
    """Raise InvalidArgumentError unless files can be written to `path`, a folder that may have to be made."""
    made = []
    try:
        made = [folder for folder in (path, *path.parents) if not folder.exists()]
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        invalid_argument(option, path, f"a folder that can be written ({error.strerror or error})")
    finally:
        for folder in made:
            with suppress(OSError):
                folder.rmdir()


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


def printable(text: str) -> str:
    """The text with an escape (`\\x1b`) for what HTML or XML may not hold, and for what deceives."""
    return _UNPRINTABLE.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def one_line(text: str, most: int = 200) -> str:
    """A text that others wrote, for the terminal: printable, one line, so many characters at most."""
    line = printable(" ".join(text.split()))
    return line if len(line) <= most else f"{line[: most - 3]}..."


def write_json(option: str, path: Path, data: object) -> None:
    """Write data as JSON, in one step."""
    text = json.dumps(data, indent=2, allow_nan=False) + "\n"
    write_atomically(option, path, lambda file: file.write_text(text, encoding="utf-8"))


def _temporary(path: Path) -> Path:
    """A file beside `path`, so that replacing is one step; of the same suffix."""
    return path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
