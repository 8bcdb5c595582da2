"""Reports of all commands in a real browser: on a phone and on a desktop, light and dark."""

import itertools
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ascend_twin.equivalence_tests.report_pages import REPORTS

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed; pages were parsed")

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
# No sandbox: containers rarely allow one, and the page is our own. The rest keeps the browser off the net.
ARGUMENTS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
)
PHONE, DESKTOP = {"width": 360, "height": 740}, {"width": 1280, "height": 900}
LEAST_CONTRAST = 4.5  # of text and its background: WCAG 2.1, level AA

# Elements that reach over the right edge of the page, and do not scroll inside another.
OVERFLOWING = """() => [...document.querySelectorAll("body *")]
    .filter(e => !e.parentElement.closest(".scroll, pre") && e.checkVisibility())
    .filter(e => e.getBoundingClientRect().right > document.documentElement.clientWidth + 0.5)
    .map(e => e.outerHTML.slice(0, 80))"""

# Texts with less contrast than is given, each with what it has.
FAINT = """least => {
    const parse = text => text.match(/[\\d.]+/g).map(Number);
    const light = ([r, g, b]) => [r, g, b].map(c => c / 255)
        .map(c => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4)
        .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
    const background = e => {
        for (; e; e = e.parentElement) {
            const color = parse(getComputedStyle(e).backgroundColor);
            if (color.length < 4 || color[3] > 0) return color;
        }
    };
    return [...document.querySelectorAll("body *")]
        .filter(e => e.checkVisibility() && [...e.childNodes].some(n => n.nodeType == 3 && n.data.trim()))
        .map(e => [light(parse(getComputedStyle(e).color)), light(background(e)), e.outerHTML.slice(0, 80)])
        .map(([a, b, e]) => [(Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05), e])
        .filter(([contrast]) => contrast < least);
}"""

# What is wider than its frame, and whether it can be moved in there.
SCROLLED = """() => [...document.querySelectorAll(".scroll")].filter(e => e.scrollWidth > e.clientWidth)
    .map(e => { e.scrollLeft = 50; return [e.firstElementChild.tagName, e.scrollLeft > 0]; })"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    path = next(filter(None, map(shutil.which, BROWSERS)), None)
    if path is None:
        pytest.skip(f"no {', '.join(BROWSERS)} is installed; pages were parsed")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=list(ARGUMENTS))
        yield browser
        browser.close()


class _Tab:
    """A page that is open, and what it asked for and complained about."""

    def __init__(self, browser: Any, path: Path) -> None:
        self.requests: list[str] = []
        self.complaints: list[str] = []
        self.url = path.as_uri()
        self.page = browser.new_page()
        self.page.on("console", lambda message: self.complaints.append(message.text))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("request", lambda request: self.requests.append(request.url))

    def open(self, size: dict[str, int], scheme: str) -> None:
        """Open the page, anew."""
        self.page.set_viewport_size(size)
        self.page.emulate_media(color_scheme=scheme)
        self.page.goto(self.url)

    def __enter__(self) -> "_Tab":
        return self

    def __exit__(self, *_: object) -> None:
        self.page.close()


@pytest.mark.parametrize("name", REPORTS)
def test_report_opens_on_phone_and_desktop_light_and_dark(browser: Any, tmp_path: Path, name: str) -> None:
    path = tmp_path / f"{name}.html"
    REPORTS[name](path)
    papers = []
    with _Tab(browser, path) as tab:
        for size, scheme in itertools.product((PHONE, DESKTOP), ("light", "dark")):
            tab.open(size, scheme)
            _check_verdict(tab.page)
            _open_details(tab.page)
            _check_layout(tab.page)
            assert tab.page.evaluate(FAINT, LEAST_CONTRAST) == []
            papers.append(tab.page.evaluate("getComputedStyle(document.body).backgroundColor"))
    assert tab.complaints == []
    assert [url for url in tab.requests if not url.startswith("data:")] == [path.as_uri()] * 4
    assert papers[:2] == papers[2:]
    assert papers[0] != papers[1]


def _check_verdict(page: Any) -> None:
    """A word at the top, which stays there."""
    badge = page.locator("header .badge")
    assert badge.inner_text().split()[-1].lower() in ("passed", "failed", "done")
    page.evaluate("window.scrollTo(0, document.body.scrollHeight)")
    top = badge.bounding_box()
    assert top
    assert 0 <= top["y"] < 60
    page.evaluate("window.scrollTo(0, 0)")


def _open_details(page: Any) -> None:
    """All of them, as a user does."""
    for details in page.locator("details").all():
        if details.get_attribute("open") is None:
            content = details.locator(":scope > :not(summary)").first
            assert not content.is_visible()
            details.locator(":scope > summary").click()
            assert content.is_visible()


def _check_layout(page: Any) -> None:
    """Nothing reaches over the edge; what is wide scrolls inside itself; figures are there."""
    root = "document.documentElement"
    assert page.evaluate(f"{root}.scrollWidth <= {root}.clientWidth")
    assert page.evaluate(OVERFLOWING) == []
    assert all(moved for _, moved in page.evaluate(SCROLLED))
    images = page.evaluate(
        """async () => { const images = [...document.images];
            await Promise.all(images.map(e => e.decode()));
            return images.map(e => [e.naturalWidth > 0 && e.clientWidth > 0, e.alt != ""]); }"""
    )
    assert all(loaded and described for loaded, described in images)


def test_wide_tables_and_figures_scroll_inside_themselves_on_a_phone(browser: Any, tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    REPORTS["compile"](path)
    with _Tab(browser, path) as tab:
        tab.open(PHONE, "light")
        scrolled = [what for what, moved in tab.page.evaluate(SCROLLED) if moved]
    assert {"TABLE", "IMG"} <= set(scrolled)


def test_report_prints_everything_that_scrolls(browser: Any, tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    REPORTS["compile"](path)
    with _Tab(browser, path) as tab:
        tab.open(DESKTOP, "light")
        tab.page.emulate_media(media="print")
        overflow = "getComputedStyle(document.querySelector('.scroll')).overflowX"
        assert tab.page.evaluate(overflow) == "visible"
        assert tab.page.evaluate("getComputedStyle(document.querySelector('header')).position") == "static"
        closed = tab.page.locator("details:not([open]) > :not(summary)").first
        assert closed.is_visible()


def test_browser_test_notices_what_is_wrong(browser: Any, tmp_path: Path) -> None:
    """A page that is too wide, runs a script, asks for a picture, and is too faint."""
    path = tmp_path / "report.html"
    REPORTS["compile"](path)
    text = path.read_text(encoding="utf-8")
    wrong = (
        '<p style="width: 999px; color: #eee">wide</p><img src="http://localhost:1/x.png" alt="x">'
        "<script>1</script>"
    )
    path.write_text(text.replace("<footer>", f"{wrong}<footer>"), encoding="utf-8")
    with _Tab(browser, path) as tab:
        tab.open(PHONE, "light")
        assert any(found.startswith("<p style") for found in tab.page.evaluate(OVERFLOWING))
        assert any(found.startswith("<p style") for _, found in tab.page.evaluate(FAINT, LEAST_CONTRAST))
        complaints = " ".join(tab.complaints)
        assert "script" in complaints
        assert "x.png" in complaints
