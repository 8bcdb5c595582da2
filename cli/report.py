"""The report of a command: one HTML file that needs no other file, no network and no script.

A command describes what it found as a `Report`, and `write_html` writes it. Text is text: whatever it holds
is escaped. The same report gives the same bytes, and no time, host or user is in it.
"""

import base64
import io
import re
import shlex
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ..reference.errors import invalid_argument
from .output_files import printable, write_atomically

if TYPE_CHECKING:
    from jinja2 import Template
    from matplotlib import figure

Status = Literal["passed", "failed", "warning", "skipped", "done"]
"""What something came to; `done` is neither good nor bad. Shown as a colour and a word."""

SUFFIXES = (".html", ".htm")
"""What the name of a report may end in."""

_TEMPLATES = Path(__file__).parent / "templates"


@dataclass(frozen=True)
class Row:
    """A line of a table.

    Attributes:
        cells: one for each column, as text.
        status: shown in front of them; None is nothing.
        word: shown instead of the status's own name ("3 differ").
    """

    cells: Sequence[str]
    status: Status | None = None
    word: str = ""


@dataclass(frozen=True)
class Table:
    """Rows under columns. Where any row has a status, a first column shows it.

    Attributes:
        columns: their headings.
        rows: each with a cell for each column.
        numbers: headings of columns that hold numbers: aligned to the right, never broken.
        caption: what the table shows, in a sentence.
    """

    columns: Sequence[str]
    rows: Sequence[Row]
    numbers: Collection[str] = ()
    caption: str = ""

    def __post_init__(self) -> None:
        for row in self.rows:
            if len(row.cells) != len(self.columns):
                invalid_argument("row", row.cells, f"a cell for each of {', '.join(self.columns)}")


@dataclass(frozen=True)
class Figure:
    """A picture.

    Attributes:
        image: a PNG file as bytes, or an SVG file as text (of our own making: it is not searched for scripts,
            which a browser does not run in an image).
        alt: what it shows, for those who do not see it.
        caption: what it means, in a sentence or two.
    """

    image: bytes | str
    alt: str
    caption: str = ""

    @property
    def is_wide(self) -> bool:
        """Whether nothing could be read on it where it is made as narrow as a phone."""
        if isinstance(self.image, str):
            width = re.search(r'<svg[^>]*? width="([\d.]+)pt"', self.image)
            return width is not None and float(width[1]) > 420
        return int.from_bytes(self.image[16:20], "big") > 560  # where a PNG file has its width

    @property
    def source(self) -> str:
        """The image as a data URL."""
        if isinstance(self.image, str):
            kind, data = "svg+xml", self.image.encode()
        else:
            kind, data = "png", self.image
        return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


@dataclass(frozen=True)
class Code:
    """Lines shown as they are: code, output, a diff.

    Attributes:
        text: the lines.
        caption: what they are, in a sentence.
    """

    text: str
    caption: str = ""


@dataclass(frozen=True)
class Fold:
    """Details behind a line that opens them.

    Attributes:
        title: of the line.
        parts: what is shown when it is open.
        status: shown in front of the title; None is nothing.
        is_open: from the start.
    """

    title: str
    parts: "Sequence[Part]"
    status: Status | None = None
    is_open: bool = False


Part = str | Table | Figure | Code | Fold
"""A part of a section; a str is a paragraph."""


@dataclass(frozen=True)
class Section:
    """A heading and what is under it, in order."""

    heading: str
    parts: Sequence[Part]


@dataclass(frozen=True)
class Report:
    """What a command found.

    Attributes:
        title: what was done, in some words.
        status: of all of it.
        verdict: what was found, in a sentence or two.
        command: a command that has this result, see `command_line`.
        facts: what it depends on and how much it covers, by name; few and short: they stand at the top.
        sections: the rest.
        versions: of what the result depends on, by name.
    """

    title: str
    status: Status
    verdict: str
    command: str
    facts: Mapping[str, str]
    sections: Sequence[Section]
    versions: Mapping[str, str] = field(default_factory=dict)


def write_html(path: Path, report: Report, option: str = "--html") -> None:
    """Write the report to a file, in one step.

    Args:
        path: the file; check it before any work with `check_writable` or `check_apart`, and `SUFFIXES`.
        report: what is written.
        option: that names the file.

    Raises:
        InvalidArgumentError: naming the option, when the file cannot be written.
    """
    page = render(report)
    write_atomically(option, path, lambda file: file.write_text(page, encoding="utf-8"))


def render(report: Report) -> str:
    """The page, as text."""
    return _template().render(report=report, version=metadata.version("ascend-twin"))


def command_line(command: str, options: Mapping[str, Any], *arguments: str) -> str:
    """A command as a user types it.

    Args:
        command: its name, without `ascend-twin`.
        options: values by option (`--seed`): None and False leave it out, True is the option alone, and a
            list or a tuple repeats it.
        arguments: that come first.
    """
    words = ["ascend-twin", command, *arguments]
    for option, value in options.items():
        for one in value if isinstance(value, (list, tuple)) else (value,):
            if one is True:
                words.append(option)
            elif one is not None and one is not False:
                words.append(f"{option}={one}")
    return shlex.join(words)


def drawn(plot: "figure.Figure", alt: str, caption: str = "") -> Figure:
    """A figure of matplotlib as SVG, the same each time."""
    import matplotlib

    text = io.StringIO()
    settings: Any = {"svg.hashsalt": alt, "svg.fonttype": "none"}
    with matplotlib.rc_context(settings):
        plot.savefig(text, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    return Figure(text.getvalue(), alt, caption)


@cache
def _template() -> "Template":
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda value: printable(value) if type(value) is str else value,
    )
    environment.tests["table"] = lambda part: isinstance(part, Table)
    environment.tests["figure"] = lambda part: isinstance(part, Figure)
    environment.tests["code"] = lambda part: isinstance(part, Code)
    environment.tests["fold"] = lambda part: isinstance(part, Fold)
    return environment.get_template("report.html.j2")
