"""What a kernel is, as loaded: by which native code is kept, and two processes know that they mean the same.

Files say it only as long as nobody edits them: what counts is the code that was imported, and what its names
mean now. Triton, PyTorch and Python's own library are known by name; their versions are kept elsewhere.
"""

import enum
import functools
import hashlib
import inspect
import os
import re
import sys
import types
from typing import Any

_KNOWN_BY_NAME = ("triton", "torch", "numpy")
_LIBRARY = os.path.dirname(os.__file__)
_PLAIN = (type(None), bool, int, float, complex, str, bytes, type(Ellipsis))


def kernel_identity(kernel: Any) -> str:
    """A digest of a kernel, of the functions that it calls and of the values that it names.

    Args:
        kernel: what `triton.jit` made, compiled or interpreted here.

    Returns:
        Text that differs where code, lines, annotations, default values, closures, or what a name means
        differ, also behind modules, classes, objects and containers; the same in each process that imports
        the same.
    """
    names: frozenset[str] = frozenset()
    while True:  # an object may be handed to a function that asks it for more than its caller does
        walk = _Walk(names)
        described = walk.describe(kernel)
        if walk.found <= names:
            return hashlib.sha256(repr(described).encode()).hexdigest()
        names |= walk.found


class _Walk:
    """One way through all that a kernel refers to.

    Args:
        names: the attributes that are looked at, of whatever has them.

    Attributes:
        found: names in the functions on the way.
    """

    def __init__(self, names: frozenset[str]) -> None:
        self.found: set[str] = set()
        self._names = sorted(names)
        self._met: dict[int, tuple[int, Any]] = {}  # by identity; kept, so that no other gets it

    def describe(self, value: Any) -> object:
        """What differs where a value does: nested tuples of plain values."""
        if isinstance(value, _PLAIN):
            return type(value).__name__, repr(value)
        if id(value) in self._met:
            return "met as", self._met[id(value)][0]
        self._met[id(value)] = len(self._met), value
        if type(value).__name__ in ("JITFunction", "InterpretedFunction"):  # what triton.jit makes
            return "kernel", self.describe(value.fn)
        return type(value).__name__, *self._parts(value)

    def _parts(self, value: Any) -> tuple[object, ...]:
        if isinstance(value, (list, tuple)):
            return tuple(map(self.describe, value))
        if isinstance(value, (dict, types.SimpleNamespace)):
            items = value.items() if isinstance(value, dict) else vars(value).items()
            return tuple((self.describe(key), self.describe(item)) for key, item in items)
        if isinstance(value, (set, frozenset)):
            return tuple(sorted(repr(self.describe(item)) for item in value))
        if isinstance(value, enum.Enum):
            return type(value).__qualname__, value.name, self.describe(value.value)
        if isinstance(value, functools.partial):
            return tuple(map(self.describe, (value.func, value.args, value.keywords)))
        if inspect.ismethod(value):
            return self.describe(value.__func__), self.describe(value.__self__)
        if inspect.ismodule(value):
            return (value.__name__, *(() if _is_known(value.__name__) else self._attributes(value)))
        if inspect.isclass(value) or inspect.isroutine(value):
            if _is_known(value.__module__) or inspect.isbuiltin(value):
                return (_name_of(value),)
            if inspect.isfunction(value):
                return value.__qualname__, *self._parts_of_function(value)
            return value.__qualname__, *self._attributes(value)
        if hasattr(value, "tolist"):  # an array of NumPy or PyTorch
            return str(value.dtype), self.describe(value.tolist())
        if type(value).__name__ == "constexpr":
            return (self.describe(value.value),)
        if _is_known(type(value).__module__):  # such as a dtype
            return (re.sub(r" at 0x[0-9a-f]+", "", repr(value)),)
        return self.describe(type(value)), *self._attributes(value)

    def _parts_of_function(self, function: types.FunctionType) -> tuple[object, ...]:
        code = function.__code__
        names = _names(code)
        self.found |= names
        cells = zip(code.co_freevars, function.__closure__ or (), strict=True)
        values = {
            **{f"default {i}": value for i, value in enumerate(function.__defaults__ or ())},
            **{f"default {name}": value for name, value in (function.__kwdefaults__ or {}).items()},
            **{f"cell {name}": cell.cell_contents for name, cell in cells},
            **{name: function.__globals__[name] for name in sorted(names & function.__globals__.keys())},
        }
        described = ((name, self.describe(value)) for name, value in values.items())
        return _source(function), _content(code), *described

    def _attributes(self, value: Any) -> tuple[object, ...]:
        return tuple((n, self.describe(getattr(value, n))) for n in self._names if hasattr(value, n))


def _is_known(module: str | None) -> bool:
    """Whether a module is of Triton, PyTorch, NumPy or Python; a user's may be called as one of Python's."""
    package = (module or "builtins").partition(".")[0]
    if package in _KNOWN_BY_NAME or package not in sys.stdlib_module_names:
        return package in _KNOWN_BY_NAME
    origin = getattr(getattr(sys.modules.get(package), "__spec__", None), "origin", None) or ""
    is_installed = "site-packages" in origin or "dist-packages" in origin
    return origin in ("built-in", "frozen") or (origin.startswith(_LIBRARY) and not is_installed)


def _name_of(value: Any) -> str:
    # Triton's interpreter puts functions in the place of its language's, and keeps those as `member`.
    while stands_for := (getattr(value, "__kwdefaults__", None) or {}).get("member"):
        value = stands_for
    return f"{value.__module__}.{value.__qualname__}"


@functools.cache
def _source(function: types.FunctionType) -> str:
    """The text of a function, which has the annotations of local names that its code lacks; "" for none."""
    try:
        return inspect.getsource(function)
    except (OSError, TypeError):
        return ""


def _names(code: types.CodeType) -> set[str]:
    """The names of globals and attributes in a function and those inside it, text for getattr included."""
    inner = [x for x in code.co_consts if isinstance(x, types.CodeType)]
    text = {x for x in code.co_consts if isinstance(x, str) and x.isidentifier()}
    return text.union(code.co_names, *map(_names, inner))


def _content(code: types.CodeType) -> tuple[object, ...]:
    """What a function does, and in which line, whatever file it is in."""
    constants = tuple(
        _content(x)
        if isinstance(x, types.CodeType)
        else sorted(map(repr, x))
        if isinstance(x, frozenset)
        else x
        for x in code.co_consts
    )
    return code.co_name, code.co_firstlineno, code.co_code, constants, code.co_names, code.co_varnames
