"""What a kernel is, as loaded: by which native code is kept, and two processes know that they mean the same.

Files say it only as long as nobody edits them: what counts is the code that was imported, and the values that
its names have now.
"""

import hashlib
import inspect
import re
import types
from typing import Any


def kernel_identity(kernel: Any) -> str:
    """A digest of a kernel, of the functions that it calls and of the constants that it names.

    Args:
        kernel: what `triton.jit` made, compiled or interpreted here.

    Returns:
        Text that differs where code, lines, default values, closures or constants differ; the same in each
        process that imports the same.
    """
    parts: list[object] = []
    seen: set[tuple[int, frozenset[str]]] = set()

    def visit(name: str, value: Any, names: frozenset[str]) -> None:
        called = getattr(value, "fn", None)
        if inspect.isfunction(called):
            if (id(value), frozenset()) not in seen:
                seen.add((id(value), frozenset()))
                visit_function(called)
        elif inspect.ismodule(value):
            # What is asked of a module depends on the names in the function that asks.
            if (id(value), names) not in seen and value.__name__.partition(".")[0] != "triton":
                seen.add((id(value), names))
                for attribute in sorted(names):
                    if hasattr(value, attribute):
                        visit(f"{name}.{attribute}", getattr(value, attribute), names)
        elif not (inspect.isroutine(value) or inspect.isclass(value)):
            parts.append((name, re.sub(r" at 0x[0-9a-f]+", "", repr(value))))

    def visit_function(function: types.FunctionType) -> None:
        code = function.__code__
        names = frozenset(_names(code))
        parts.append(_content(code))
        defaults = {**(function.__kwdefaults__ or {}), **dict(enumerate(function.__defaults__ or ()))}
        cells = zip(code.co_freevars, function.__closure__ or (), strict=True)
        for name, value in (
            *((f"{function.__name__}({key})", value) for key, value in defaults.items()),
            *((name, cell.cell_contents) for name, cell in cells),
            *((name, function.__globals__[name]) for name in sorted(names & function.__globals__.keys())),
        ):
            visit(name, value, names)

    visit_function(kernel.fn)
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def _names(code: types.CodeType) -> set[str]:
    """The names of globals and attributes in a function and those inside it."""
    inner = (x for x in code.co_consts if isinstance(x, types.CodeType))
    return set(code.co_names).union(*map(_names, inner))


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
