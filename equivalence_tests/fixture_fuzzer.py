"""Reads mutations of valid fixtures under a limit of memory and of time, and says what came of each.

Run as a module with files as arguments, it prints a JSON object: how many mutations were read as a fixture,
how many were refused, and the first of each other end, with its mutation.
"""

import json
import random
import resource
import signal
import struct
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..fixtures import store
from ..reference.errors import FixtureError

MAX_BYTES = 32 * 2**20
SECONDS_EACH = 5.0
HOSTILE: tuple[Any, ...] = (
    None, True, -1, 0, 2, 2**31, 2**63, 2**64, 10**400, -(2**63), 0.5, 1e308, float("nan"), "", "x" * 10_000,
    "\ud800", "../../x", [], {}, [[[[]]]], [0] * 1000, [2**40, 0], [2**62, 4], {"q": {}}, "F4", "BF16", "gdn",
)  # fmt: skip

Mutation = Callable[[bytes, random.Random], bytes]


def _flip(data: bytes, rng: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 16))):
        changed[_place(data, rng)] ^= 1 << rng.randrange(8)
    return bytes(changed)


def _cut(data: bytes, rng: random.Random) -> bytes:
    return data[: _place(data, rng)]


def _append(data: bytes, rng: random.Random) -> bytes:
    return data + rng.randbytes(rng.choice((1, 8, 4096)))


def _drop(data: bytes, rng: random.Random) -> bytes:
    start = _place(data, rng)
    return data[:start] + data[start + rng.choice((1, 8, 100)) :]


def _repeat(data: bytes, rng: random.Random) -> bytes:
    start = _place(data, rng)
    return data[:start] + data[start : start + rng.choice((1, 8, 100))] * rng.choice((2, 1000)) + data[start:]


def _overwrite(data: bytes, rng: random.Random) -> bytes:
    start, length = _place(data, rng), rng.choice((1, 4, 64))
    return data[:start] + rng.randbytes(length) + data[start + length :]


def _lie_about_size(data: bytes, rng: random.Random) -> bytes:
    return struct.pack("<Q", rng.choice((0, 1, 2**20, 2**31, 2**63, rng.randrange(2**20)))) + data[8:]


def _change_json(data: bytes, rng: random.Random) -> bytes:
    """Something hostile for a value of the JSON in a file, of which the rest stays whole."""
    if data[:1] == b"{":
        is_one_object = not data.startswith(b'{"')
        lines = [data] if is_one_object else data.splitlines(keepends=True)
        line = rng.randrange(len(lines))
        lines[line] = _dumped(_hostile(json.loads(lines[line]), rng)) + b"\n"
        return b"".join(lines)
    (size,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + size])
    if rng.random() < 0.5:
        own = json.loads(header["__metadata__"]["ascend_twin"])
        header["__metadata__"]["ascend_twin"] = _dumped(_hostile(own, rng)).decode()
    else:
        header = _hostile(header, rng)
    text = _dumped(header)
    return struct.pack("<Q", len(text)) + text + data[8 + size :]


def _nest(data: bytes, rng: random.Random) -> bytes:
    start = _place(data, rng)
    return data[:start] + rng.choice((b"[", b'{"a":')) * 100_000 + data[start:]


MUTATIONS: tuple[Mutation, ...] = (
    _flip, _cut, _append, _drop, _repeat, _overwrite, _lie_about_size, _change_json, _change_json, _nest
)  # fmt: skip


def _place(data: bytes, rng: random.Random) -> int:
    """Half of all places lie near the start, where a file says what it is."""
    return rng.randrange(min(len(data), 2048) if rng.random() < 0.5 else len(data))


def _dumped(value: Any) -> bytes:
    return json.dumps(value).encode()


def _hostile(value: Any, rng: random.Random) -> Any:
    """`value` with one of the values in it replaced, dropped, or under another name."""
    if not isinstance(value, (dict, list)) or not value or rng.random() < 0.2:
        return rng.choice(HOSTILE)
    key = rng.choice(list(value) if isinstance(value, dict) else range(len(value)))
    changed = value.copy()
    if isinstance(changed, dict) and rng.random() < 0.2:
        moved = changed.pop(key)
        if rng.random() < 0.5:
            changed[str(rng.choice(HOSTILE))] = moved
    else:
        changed[key] = _hostile(value[key], rng)
    return changed


def fuzz(files: list[Path], count: int, seed: int) -> dict[str, Any]:
    """Read `count` mutations of `files`.

    Returns:
        {"read": how many were read as a fixture, "refused": how many gave a FixtureError that names the
        file, "others": {what else came of one: its number and mutation}}.
    """
    rng = random.Random(seed)
    contents = [(path.suffix, path.read_bytes()) for path in files]
    ends: Counter[str] = Counter()
    others: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as folder:
        for number in range(count):
            suffix, data = rng.choice(contents)
            mutation = rng.choice(MUTATIONS)
            path = Path(folder) / f"mutated{suffix}"
            path.write_bytes(mutation(data, rng))
            end = _end_of_reading(path)
            ends[end] += 1
            if end not in ("read", "refused"):
                others.setdefault(end, f"{number} {mutation.__name__} of {suffix}")
    return {"read": ends["read"], "refused": ends["refused"], "others": others}


def _end_of_reading(path: Path) -> str:
    signal.setitimer(signal.ITIMER_REAL, SECONDS_EACH)
    try:
        store.read_fixture(path, max_bytes=MAX_BYTES)
    except FixtureError as error:
        return "refused" if str(path) in str(error) else f"does not name the file: {error}"
    except BaseException as error:  # a panic of the library's Rust is no Exception
        return f"{type(error).__name__}: {error}"[:300]
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    return "read"


def limit_memory(more: int) -> None:
    """Let this process allocate at most `more` bytes beside what it has."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    size = pages * resource.getpagesize() + more
    resource.setrlimit(resource.RLIMIT_AS, (size, size))


def main(count: int, seed: int, *files: str) -> None:
    def expired(*_: object) -> None:
        raise TimeoutError(f"not done after {SECONDS_EACH} s")

    signal.signal(signal.SIGALRM, expired)
    paths = [Path(file) for file in files]
    for path in paths:
        store.read_fixture(path)
    limit_memory(MAX_BYTES)
    print(json.dumps(fuzz(paths, count, seed)))


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:])
