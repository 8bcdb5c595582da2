"""What the site needs beyond the pages of this folder: files from elsewhere, pictures, and a check.

On GitHub a link names a file by its place in the repository; here it becomes a link to the page.
"""

import re
import tempfile
from html import escape
from pathlib import Path, PurePosixPath
from posixpath import normpath
from typing import Any

from mkdocs.exceptions import PluginError
from mkdocs.plugins import event_priority
from mkdocs.structure.files import File

ROOT = Path(__file__).parents[1]

ELSEWHERE = {
    "README.md": "index.md",
    "ARCHITECTURE.md": "architecture.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "fixtures/format.md": "format.md",
}
"""Pages whose files are not in this folder, by their place in the repository."""

LINK = re.compile(r"\]\((?!https?:|#)([^)\s#]+)")
MERMAID = re.compile(r"```mermaid\n(.*?)```", re.DOTALL)
FOREIGN = re.compile(
    r"""<(?:script|link(?! rel=.?canonical)|img|iframe|source|video|object)\b[^>]*?"""
    r"""(?:src|href|data)=["']?(?:https?:)?//[^>]*"""
    r"""|class=["']?mermaid"""  # the theme would fetch what draws it
)

PACKAGES = ("reference", "optimized", "scheduler", "fixtures", "equivalence_tests", "cli")

_sources = tempfile.TemporaryDirectory()


@event_priority(100)  # before mkdocstrings asks
def on_config(config: Any) -> Any:
    """Show mkdocstrings the sources under the name that they are imported by; nothing need be installed."""
    package = Path(_sources.name) / "ascend_twin"
    package.mkdir(exist_ok=True)
    for name in PACKAGES:
        if not (package / name).exists():
            (package / name).symlink_to(ROOT / name)
    config.plugins["mkdocstrings"].config.handlers["python"]["paths"] = [_sources.name]
    return config


def on_files(files: Any, config: Any) -> Any:
    """Add the pages from elsewhere."""
    for place, page in ELSEWHERE.items():
        files.append(File.generated(config, page, abs_src_path=str(ROOT / place)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Turn links between files into links between pages, and draw the diagrams."""
    places = {page: place for place, page in ELSEWHERE.items()}
    folder = PurePosixPath(places.get(page.file.src_uri, f"docs/{page.file.src_uri}")).parent

    def to_page(link: re.Match[str]) -> str:
        place = normpath(str(folder / link[1]))
        return f"]({ELSEWHERE.get(place, place.removeprefix('docs/'))}"

    return MERMAID.sub(lambda fence: draw(fence[1]), LINK.sub(to_page, markdown))


def on_page_content(html: str, page: Any, **_: Any) -> str:
    """Refuse a second title: a line that begins with an issue's number is one here, and text on GitHub."""
    titles = re.findall(r"<h1[^>]*>([^<]*)", html)
    if len(titles) > 1:
        raise PluginError(f"{page.file.src_uri}: a page has one title, this one has {titles}")
    return html


def on_post_page(output: str, page: Any, **_: Any) -> str:
    """Refuse a page that would ask another server for something."""
    if found := FOREIGN.search(output):
        raise PluginError(f"{page.file.src_uri}: a page must load without a network, this one has {found[0]}")
    return output


def draw(diagram: str) -> str:
    """A Mermaid sequence diagram, as equivalence_tests/lockstep_picture.py writes it, as SVG.

    Raises:
        PluginError: for a line of another kind.
    """
    middles: dict[str, int] = {}  # of each rank, and where its line stands
    heads, shapes, y = [], [], 40
    for line in map(str.strip, diagram.splitlines()):
        if found := re.fullmatch(r"participant (\w+) as (.*)", line):
            middles[found[1]] = 120 + 240 * len(middles)
            heads.append(_text(middles[found[1]], 20, found[2]))
            continue
        if found := re.fullmatch(r"Note over ([\w,]+): (.*)", line):
            over = [middles[name] for name in found[1].split(",")]
            left, right = min(over) - 100, max(over) + 100
            shapes.append(
                f'<rect x="{left}" y="{y}" width="{right - left}" height="26" rx="3"/>'
                + _text((left + right) / 2, y + 18, found[2])
            )
        elif found := re.fullmatch(r"(\w+)--x(\w+): (.*)", line):
            start, end = middles[found[1]], middles[found[2]]
            shapes.append(
                f'<line x1="{start}" y1="{y + 18}" x2="{end}" y2="{y + 18}" stroke-dasharray="4"/>'
                + _text((start + end) / 2, y + 13, found[3])
                + _text(end, y + 22, "\u2715")
            )
        elif line in ("", "sequenceDiagram"):
            continue
        else:
            raise PluginError(f"docs/hooks.py cannot draw this line of a diagram: {line}")
        y += 34
    lines = [f'<line x1="{x}" y1="28" x2="{x}" y2="{y}"/>' for x in middles.values()]
    return (
        f'<svg viewBox="0 0 {240 * len(middles)} {y}" role="img" font-size="12" text-anchor="middle" '
        'stroke="currentColor" style="max-width: 30rem; fill: var(--md-code-bg-color)">'
        f"{''.join([*heads, *lines, *shapes])}</svg>"
    )


def _text(x: float, y: float, text: str) -> str:
    return f'<text x="{x}" y="{y}" fill="currentColor" stroke="none">{escape(text)}</text>'
