"""Commands as they stand in texts: where they are found, and how they are tried without doing their work."""

import importlib
import pkgutil
import re
import shlex
from collections.abc import Iterator
from typing import Any

import pytest

from .. import cli


def lines_of_help(text: str) -> Iterator[str]:
    """Every line of a help text that can be typed: in a paragraph that is shown as it is, with `\\b`."""
    for paragraph in re.findall(r"\x08\n(.*?)(?:\n\n|$)", text, re.DOTALL):
        for line in _joined(paragraph):
            if line.startswith(("ascend-twin ", "tox ")):
                yield _plain(line)


def lines_of_page(text: str) -> Iterator[str]:
    """Every line of a Markdown page that can be typed: in a code block, behind variables and a folder."""
    is_fenced = False
    for line in _joined(text):
        if line.lstrip().startswith("```"):
            is_fenced = not is_fenced
        elif is_fenced or line.startswith("    "):
            found = re.match(r"\s*(?:\$ )?(?:\w+=\S+ )*(?:\S*/)?((?:ascend-twin|tox) .*)", line)
            if found:
                yield _plain(found[1])


def _joined(text: str) -> list[str]:
    return text.replace("\\\n", " ").splitlines()


def _plain(line: str) -> str:
    """Without comments, its words one space apart."""
    return shlex.join(shlex.split(line, comments=True))


def stopped_before_the_work(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Have every command of `ascend-twin` end, with status 0, where its work would begin.

    Returns:
        The list to which each adds the name of the function that it would have called.
    """
    started: list[str] = []

    def stop_at(name: str) -> Any:
        def stopped(*_: Any, **__: Any) -> int:
            started.append(name)
            return 0

        return stopped

    for found in pkgutil.iter_modules(cli.__path__):
        module = importlib.import_module(f"{cli.__name__}.{found.name}")
        for name, value in list(vars(module).items()):
            if name.startswith("run_") and getattr(value, "__module__", None) == module.__name__:
                monkeypatch.setattr(module, name, stop_at(name))
    return started
