"""What data classes check their fields with, and how they are read from JSON.

Every message names the field, its value and what is allowed.
"""

import reprlib
from collections.abc import Callable
from dataclasses import MISSING, fields
from typing import Any

from ..reference.errors import InvalidArgumentError, invalid_argument

MOST = 2**63 - 1
MOST_NUMBER = 10**15  # of measurements: their products are finite, too


def check_type(name: str, value: object, kind: type) -> None:
    """Refuse what is no `kind`."""
    if not isinstance(value, kind):
        invalid_argument(name, reprlib.repr(value), f"a {kind.__name__}")


def check_bool(name: str, value: object) -> None:
    """Refuse what is neither True nor False."""
    if not isinstance(value, bool):
        invalid_argument(name, reprlib.repr(value), "True or False")


def check_int(name: str, value: object, least: int = -MOST, most: int = MOST) -> None:
    """Refuse what is no int (a bool is none), or out of range."""
    if type(value) is not int or not least <= value <= most:
        limits = f" from {least} to {most}" if most < MOST else f" >= {least}" if least > -MOST else ""
        invalid_argument(name, reprlib.repr(value), f"an int{limits}")


def check_positive(name: str, value: object) -> None:
    """Refuse what is no finite number above 0 (a bool is none)."""
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 < value <= MOST_NUMBER:
        invalid_argument(name, reprlib.repr(value), f"a finite number > 0, at most {MOST_NUMBER:,}")


def check_text(name: str, value: object) -> None:
    """Refuse what is no text, or empty."""
    if not isinstance(value, str) or not value:
        invalid_argument(name, reprlib.repr(value), 'a text that is not ""')


def check_tuple(name: str, value: object, kind: type) -> None:
    """Refuse what is no tuple, or holds something else than `kind`."""
    if not isinstance(value, tuple) or not all(isinstance(x, kind) for x in value):
        invalid_argument(name, reprlib.repr(value), f"a tuple, each of it a {kind.__name__}")


def read_object(
    kind: type[Any], data: object, place: str, read_field: Callable[[str, object, str], object]
) -> Any:
    """A JSON object as a data class.

    Args:
        kind: the data class; it checks its fields itself.
        data: what was read.
        place: its path in the whole, which messages start with; "" is the whole.
        read_field: what becomes of the value of a field, from its name, the value and its path.

    Raises:
        InvalidArgumentError: for a field that is unknown, missing, or refused by the class.
    """
    if not isinstance(data, dict):
        invalid_argument(place or "the whole", reprlib.repr(data), "a JSON object")
    known = {field.name: field for field in fields(kind)}
    prefix = f"{place}." if place else ""
    for name in data:
        if name not in known:
            raise InvalidArgumentError(f"{prefix}{name} is unknown; allowed: {', '.join(known) or 'nothing'}")
    for name, field in known.items():
        if name not in data and field.default is MISSING:
            raise InvalidArgumentError(f"{prefix}{name} is missing")
    values = {name: read_field(name, value, prefix + name) for name, value in data.items()}
    try:
        return kind(**values)
    except InvalidArgumentError as error:
        raise InvalidArgumentError(f"{prefix}{error}") from None
