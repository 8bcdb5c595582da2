"""Puts a change into a module of this package while it is imported: whoever imports it gets the bug.

To be installed before anything has imported the module, in a process of its own: nothing takes it out again.
The file on disk stays as it is. A traceback, and Triton's interpreter, read the changed source.
"""

import importlib.machinery
import importlib.util
import linecache
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from pathlib import Path
from types import CodeType, ModuleType
from typing import NamedTuple

from ...reference.errors import invalid_argument

PACKAGE = "ascend_twin"


class Change(NamedTuple):
    """What takes the place of what, in a module named below `ascend_twin`."""

    module: str
    old: str
    new: str


def install(change: Change) -> None:
    """Have the module import with the change.

    Raises:
        InvalidArgumentError: for a module that there is not, or that was imported already, and when the place
            is not found exactly once: the source has changed, so that it is not clear where the bug belongs.
    """
    name = f"{PACKAGE}.{change.module}"
    if name in sys.modules:
        invalid_argument("module of the bug", change.module, "one that nothing has imported yet")
    parent = importlib.util.find_spec(name.rpartition(".")[0])
    locations = parent and parent.submodule_search_locations
    spec = importlib.machinery.PathFinder.find_spec(name, list(locations)) if locations else None
    if spec is None or spec.origin is None:
        invalid_argument("module of the bug", change.module, f"one of {PACKAGE}")
    source = Path(spec.origin).read_text(encoding="utf-8")
    found = source.count(change.old)
    if found != 1:
        invalid_argument(
            f"what is changed in {change.module}", repr(change.old), f"found once, not {found} times"
        )
    put_in_place(name, spec.origin, source.replace(change.old, change.new))


def put_in_place(name: str, path: str, source: str) -> None:
    """Have a module, by its full name and its file, import with another source than the file's."""
    sys.meta_path.insert(0, _Finder(name, path, source))


class _Finder(MetaPathFinder):
    """Finds one module, whose source is given."""

    def __init__(self, name: str, path: str, source: str) -> None:
        self._name = name
        self._path = path
        self._source = source

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != self._name:
            return None
        # Without a time of change, the entry is never looked up on disk.
        linecache.cache[self._path] = (len(self._source), None, self._source.splitlines(True), self._path)
        loader = _Loader(fullname, self._path, self._source)
        return importlib.util.spec_from_file_location(fullname, self._path, loader=loader)


class _Loader(importlib.machinery.SourceFileLoader):
    """Loads a module from a source that is given."""

    def __init__(self, fullname: str, path: str, source: str) -> None:
        super().__init__(fullname, path)
        self._source = source

    def get_code(self, fullname: str) -> CodeType:
        return compile(self._source, self.path, "exec", dont_inherit=True)
