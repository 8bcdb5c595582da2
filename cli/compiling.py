"""That kernels are being compiled for device linalg, said on stderr: the first run takes far longer."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import typer

from ..optimized.gdn import ascend_native


@contextmanager
def says_when_compiling() -> Iterator[None]:
    """A context, or what to decorate a command with: the first kernel that is compiled in it is announced."""
    logger, announcer = logging.getLogger(ascend_native.__name__), _Announcer(logging.INFO)
    level = logger.level
    logger.setLevel(logging.INFO)
    logger.addHandler(announcer)
    try:
        yield
    finally:
        logger.removeHandler(announcer)
        logger.setLevel(level)


class _Announcer(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        self.setLevel(logging.CRITICAL)  # once is enough
        folder = ascend_native.default_cache()
        typer.echo(f"compiling kernels for this machine, about a second each; kept in {folder}", err=True)
