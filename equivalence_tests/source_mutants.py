"""Bugs put into a module on purpose: copies of modules, one of them with a bug, that import one another."""

import builtins
import importlib.util
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from types import CodeType, SimpleNamespace
from typing import Any, Protocol


class SourceMutant(Protocol):
    """A bug: its name, the module where it is, and what takes the place of what in its source."""

    @property
    def name(self) -> str: ...
    @property
    def module(self) -> str: ...
    @property
    def old(self) -> str: ...
    @property
    def new(self) -> str: ...


def mutated(mutant: SourceMutant, modules: Mapping[str, str]) -> dict[str, Any]:
    """Copies of modules, one of them with the bug; they import one another, and all else.

    Args:
        mutant: its `old` is found exactly once in its module; no module has the name "".
        modules: full names by short ones, each after those that it imports.

    Raises:
        AssertionError: when the source has changed, so that it is not clear where the bug belongs.
    """
    copies: dict[str, Any] = {}

    def import_copy(
        name: str, globals: Any = None, locals: Any = None, fromlist: Sequence[str] = (), level: int = 0
    ) -> Any:
        module = name.rpartition(".")[2]
        if module in copies and fromlist and (level or name == modules[module]):
            return copies[module]
        return builtins.__import__(name, globals, locals, fromlist, level)

    for module, path in modules.items():
        code = _code(path)
        if module == mutant.module:
            source = _source(path)
            assert source.count(mutant.old) == 1, f"{mutant.name}: {source.count(mutant.old)} places"
            code = compile(source.replace(mutant.old, mutant.new), mutant.name, "exec")
        namespace = {
            "__name__": path,
            "__package__": path.rpartition(".")[0],
            "__file__": _file(path),
            "__builtins__": {**vars(builtins), "__import__": import_copy},
        }
        exec(code, namespace)
        copies[module] = SimpleNamespace(**namespace)
    return copies


@cache
def _file(path: str) -> str:
    spec = importlib.util.find_spec(path)
    assert spec is not None
    assert spec.origin is not None
    return spec.origin


@cache
def _source(path: str) -> str:
    return Path(_file(path)).read_text(encoding="utf-8")


@cache
def _code(path: str) -> CodeType:
    return compile(_source(path), _file(path), "exec")
