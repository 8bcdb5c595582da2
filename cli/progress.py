"""The bar that a long command shows on stderr."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

import typer
from rich.console import Console
from rich.progress import Progress


class Advance(Protocol):
    """Makes a bar grow by `count`; `doing` then stands beside it, in the place of what is counted."""

    def __call__(self, count: int, doing: str | None = None) -> object: ...


@contextmanager
def progress(what: str, total: int | None, remark: str | Callable[[], str] = "") -> Iterator[Advance]:
    """A bar on stderr, told by how much it grows; it also says how far the command came when interrupted.

    Args:
        what: is counted, in the plural.
        total: how many there will be; None is not known.
        remark: what else is to be said when interrupted, or what gives it then.

    Raises:
        typer.Exit: with status 130 when it is interrupted.
    """
    stderr = Console(stderr=True)
    bar = Progress(console=stderr, transient=True, disable=not stderr.is_terminal)
    task = bar.add_task(what, total=total)
    try:
        with bar:
            yield lambda count, doing=None: bar.update(task, advance=count, description=doing)
    except KeyboardInterrupt:
        of_total = "" if total is None else f" of {total:,}"
        said = remark if isinstance(remark, str) else remark()
        typer.echo(f"interrupted after {bar.tasks[0].completed:,.0f}{of_total} {what}{said}", err=True)
        raise typer.Exit(130) from None
