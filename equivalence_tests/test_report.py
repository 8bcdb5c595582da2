"""Reports of commands: what is in the page, that it needs nothing else, and JUnit XML."""

import io
import json
import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.figure import Figure as Plot
from typer.testing import CliRunner

from ascend_twin.cli.compile_report import compile_junit, compile_report, memory_plot
from ascend_twin.cli.junit import JUnitCase, JUnitSuite, write_junit
from ascend_twin.cli.main import app
from ascend_twin.cli.report import (
    Code,
    Figure,
    Fold,
    Report,
    Row,
    Section,
    Table,
    command_line,
    drawn,
    render,
    write_html,
)
from ascend_twin.cli.verify_report import verify_report
from ascend_twin.equivalence_tests import cases
from ascend_twin.equivalence_tests.report_pages import (
    VERIFIED,
    Page,
    compiled,
    why_not_self_contained,
)
from ascend_twin.reference.errors import InvalidArgumentError
from ascend_twin.reference.gdn import chunk_gated_delta_rule
from ascend_twin.scheduler import UpstreamScheduler

TAGS = "<script>alert(1)</script>\"'&{{ 7*7 }}</style><img src=http://x/y onerror=a()>"
HOSTILE, PRINTED = TAGS + "\x00\x1b[31m\udc80\u202e", TAGS + r"\x00\x1b[31m\udc80\u202e"
SVG = '<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>'


def _report(text: str = "text", **others: Any) -> Report:
    """With a part of each kind, `text` wherever text goes."""
    fold = Fold(text, [text, Fold("inner", [Code("deep inside")])], "warning")
    table = Table([text, "number"], [Row([text, "1"], "failed", text), Row(["b", "2"])], ["number"], text)
    parts = [text, table, Figure(SVG, text, text), Figure(b"\x89PNG", text), Code(text, text), fold]
    values: dict[str, Any] = {
        "title": text,
        "status": "failed",
        "verdict": text,
        "command": text,
        "facts": {text: text},
        "sections": [Section(text, parts), Section("Second", ["more"]), Section("Third", [])],
        "versions": {text: text},
    }
    return Report(**{**values, **others})


# The page


def test_page_has_a_language_one_title_and_headings_in_order() -> None:
    text = render(_report("what was done"))
    page = Page(text)
    assert not page.problems
    assert ("lang", "en") in page.attributes
    assert ("content", "width=device-width, initial-scale=1") in page.attributes
    assert "<title>failed: what was done</title>" in text
    assert [tag for tag in page.tags if re.fullmatch(r"h\d", tag)] == ["h1", "h2", "h2", "h2", "h2"]
    ids = [value for name, value in page.attributes if name == "id"]
    assert len(set(ids)) == len(ids)
    assert {value[1:] for name, value in page.attributes if name == "href" and value[0] == "#"} < set(ids)
    assert page.tags.count("img") == sum(name == "alt" for name, _ in page.attributes)


@pytest.mark.parametrize("status", ["passed", "failed", "done"])
def test_page_says_its_verdict_in_a_word_before_all_else(status: Any) -> None:
    said = Page(render(_report(status=status, verdict="what was found"))).text.split()
    assert said[1] == status  # behind its sign
    assert said.index("found") < said.index("Second")


def test_page_shows_every_part_once_in_order() -> None:
    text = Page(render(_report())).text
    counts = {said: text.count(said) for said in ("deep inside", "more", "Third", "To do it again")}
    assert counts == {"deep inside": 1, "more": 1, "Third": 2, "To do it again": 1}  # headings: contents too
    assert text.index("deep inside") < text.index("more") < text.rindex("Third")


def test_table_aligns_numbers_and_shows_a_status_only_where_there_is_one() -> None:
    text = render(_report())
    assert '<td class="number">1</td>' in text
    assert text.count('<th scope="col">result</th>') == 1
    without = render(_report(sections=[Section("s", [Table(["a"], [Row(["1"])])])]))
    assert "result</th>" not in without


def test_table_refuses_a_row_of_another_length() -> None:
    with pytest.raises(InvalidArgumentError, match="a cell for each of a, b"):
        Table(["a", "b"], [Row(["1", "2"]), Row(["1"])])


def test_page_shows_hostile_text_as_text() -> None:
    page = Page(text := render(_report(HOSTILE)))
    assert not page.problems
    assert page.text.count(PRINTED) >= 15
    assert text.count("<script") == 0
    assert text.encode("utf-8")
    assert why_not_self_contained(text) == []


@given(st.text(st.characters() | st.sampled_from("<>&\"'{}%#\x00\ud800"), min_size=1))
def test_page_keeps_its_structure_whatever_the_text(text: str) -> None:
    page = Page(render(_report(text, command="one word")))
    assert not page.problems
    assert page.tags == Page(render(_report(command="one word"))).tags


def test_page_needs_no_other_file_and_forbids_scripts() -> None:
    text = render(_report())
    assert why_not_self_contained(text) == []
    policy = dict(re.findall(r'http-equiv="([^"]+)" content="([^"]+)"', text))["Content-Security-Policy"]
    assert policy == "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


@pytest.mark.parametrize(
    "added",
    [
        "<script>1</script>",
        '<img src="http://x/y">',
        '<a href="https://x">a</a>',
        "<style>@import 'x'</style>",
        '<p onclick="a()">',
    ],
)
def test_what_is_not_self_contained_is_found(added: str) -> None:
    page = render(_report())
    where = "<style>" if added.startswith("<style>") else "<footer>"
    broken = page.replace(where, f"{added.removesuffix('</style>')}{'' if where == '<style>' else where}", 1)
    assert why_not_self_contained(broken)


def test_same_report_gives_the_same_bytes_and_figures_do_too(tmp_path: Path) -> None:
    def plot() -> Plot:
        figure = Plot()
        figure.subplots().plot([1, 2], label="<b>")
        return figure

    for name in ("1.html", "2.html"):
        section = Section("s", [drawn(plot(), "a line")])
        write_html(tmp_path / name, _report(sections=[section]))
    assert (tmp_path / "1.html").read_bytes() == (tmp_path / "2.html").read_bytes()
    (image,) = Page((tmp_path / "1.html").read_text(encoding="utf-8")).images
    assert isinstance(image, str)
    ElementTree.fromstring(image)


@pytest.mark.parametrize("kind", ["png", "svg"])
def test_figure_is_wide_when_it_could_not_be_read_on_a_phone(kind: str) -> None:
    def figure(inches: float) -> Figure:
        file = io.BytesIO()
        Plot(figsize=(inches, 2)).savefig(file, format=kind, dpi=96)
        return Figure(file.getvalue() if kind == "png" else file.getvalue().decode(), "a plot")

    assert [figure(inches).is_wide for inches in (4, 5.5, 6.2, 14)] == [False, False, True, True]
    assert not Figure(SVG, "of unknown width").is_wide
    page = render(_report(sections=[Section("s", [figure(4), figure(14)])]))
    assert page.count('<img class="wide"') == 1


def test_report_is_written_in_one_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "report.html"
    path.write_text("old")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(InvalidArgumentError, match=r"--html is .*report\.html; .*No space left on device"):
        write_html(path, _report())
    with pytest.raises(InvalidArgumentError, match=r"--junit is .*No space left on device"):
        write_junit(path, [])
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_command_line_is_what_a_shell_takes_apart_again() -> None:
    options = {
        "--seed": 0,
        "--dp": (2, 4),
        "--trace": "a b.jsonl",
        "--json": None,
        "--minimize": True,
        "--x": False,
    }
    command = command_line("replay", options, "it's")
    assert shlex.split(command) == [
        *("ascend-twin", "replay", "it's", "--seed=0", "--dp=2", "--dp=4", "--trace=a b.jsonl", "--minimize")
    ]


# JUnit


def test_junit_counts_failures_skips_and_times(tmp_path: Path) -> None:
    path = tmp_path / "junit.xml"
    first = [JUnitCase("a", 1.25), JUnitCase("b", 2, "wrong\nhere"), JUnitCase("c", skipped="no NPU")]
    suites = [
        JUnitSuite("one", first, {"seed": "0"}),
        JUnitSuite("two", [JUnitCase("a", 0.5, output="said")]),
    ]
    write_junit(path, suites)
    root = ElementTree.parse(path).getroot()
    assert (root.tag, root.attrib) == ("testsuites", {"name": "ascend-twin", **_counts(4, 1, 1, "3.75")})
    one, two = root
    assert one.attrib == {"name": "one", **_counts(3, 1, 1, "3.25")}
    assert two.attrib == {"name": "two", **_counts(1, 0, 0, "0.5")}
    assert [(x.get("name"), x.get("classname"), x.get("time")) for x in one.iter("testcase")] == [
        ("a", "one", "1.25"),
        ("b", "one", "2.0"),
        ("c", "one", "0.0"),
    ]
    (failure,) = one.iter("failure")
    assert (failure.get("message"), failure.text) == ("wrong", "wrong\nhere")
    assert [x.get("message") for x in one.iter("skipped")] == ["no NPU"]
    assert [(x.get("name"), x.get("value")) for x in one.iter("property")] == [("seed", "0")]
    assert [x.text for x in two.iter("system-out")] == ["said"]


def _counts(tests: int, failures: int, skipped: int, seconds: str) -> dict[str, str]:
    return {
        "tests": str(tests),
        "failures": str(failures),
        "errors": "0",
        "skipped": str(skipped),
        "time": seconds,
    }


@given(st.text(st.characters() | st.sampled_from("<>&\"'\x00\ud800\n"), min_size=1))
def test_junit_is_xml_whatever_the_text(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    path = tmp_path_factory.getbasetemp() / "any.xml"
    write_junit(
        path, [JUnitSuite(text, [JUnitCase(text, 0, text), JUnitCase(text, skipped=text)], {text: text})]
    )
    root = ElementTree.parse(path).getroot()
    assert [root.get(name) for name in ("tests", "failures", "skipped")] == ["2", "1", "1"]


# Of the commands


def _run(*arguments: str) -> tuple[int, str]:
    """Exit status, and stdout and stderr together."""
    result = CliRunner().invoke(app, list(arguments))
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.output


def _files(folder: Path) -> dict[str, str]:
    names = {"--json": "result.json", "--html": "report.html", "--junit": "junit.xml"}
    return {option: str(folder / name) for option, name in names.items()}


def _read(files: Mapping[str, str]) -> tuple[Any, Page, ElementTree.Element]:
    text = Path(files["--html"]).read_text(encoding="utf-8")
    assert why_not_self_contained(text) == []
    result = json.loads(Path(files["--json"]).read_text(encoding="utf-8"))
    return result, Page(text), ElementTree.parse(files["--junit"]).getroot()


def _flat(options: Mapping[str, str]) -> list[str]:
    return [word for pair in options.items() for word in pair]


def test_verify_reports_every_batch_and_a_command_that_repeats_it(tmp_path: Path) -> None:
    files = _files(tmp_path)
    assert _run("verify", *VERIFIED, "--seed=5", *_flat(files))[0] == 0
    result, page, junit = _read(files)
    assert len(result["batches"]) == result["covered"]["batches"] == 13
    assert [batch["corner"] for batch in result["batches"]] == [True] * 11 + [False] * 2
    assert sum(sum(batch["seq_lens"]) for batch in result["batches"]) == result["covered"]["tokens"]
    for name in ("reference", "o", "final_state"):
        (suite,) = (suite for suite in result["suites"] if suite["name"] == name)
        most = max(batch["usage"][name] for batch in result["batches"])
        assert most == max(suite[m]["error"] / suite[m]["limit"] for m in ("ratio", "worst_row"))
    assert (junit.get("tests"), junit.get("failures")) == ("13", "0")
    assert all(batch["seconds"] > 0 for batch in result["batches"])
    assert float(junit.get("time") or 0) == pytest.approx(
        sum(b["seconds"] for b in result["batches"]), abs=0.01
    )
    assert page.text.split()[1] == "passed"
    assert f"{result['covered']['tokens']:,} tokens" in page.text
    assert result["versions"]["torch"] in page.text
    assert "eager on cpu, bfloat16" in page.text
    result["options"]["implementation"] = "fused"
    assert verify_report(result).facts["device"] == "cpu (interpreted)"
    assert str(tmp_path) not in page.text

    command = re.search(r"ascend-twin verify [^\n]+", page.text)
    assert command
    again = tmp_path / "again"
    again.mkdir()
    assert _run(*shlex.split(command.group())[1:], *_flat(_files(again)))[0] == 0
    assert (again / "report.html").read_bytes() == (tmp_path / "report.html").read_bytes()


def test_verify_reports_what_differs_and_its_reproduction(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def doubled(*args: Any, **kwargs: Any) -> tuple[Any, Any]:
        o, state = chunk_gated_delta_rule(*args, **kwargs)
        return o * 2, state

    monkeypatch.setattr(cases, "chunk_gated_delta_rule", doubled)
    files = _files(tmp_path)
    assert _run("verify", *VERIFIED, *_flat(files))[0] == 1
    result, page, junit = _read(files)
    failed = sum(not batch["passed"] for batch in result["batches"])
    assert failed > 5
    assert junit.get("failures") == str(failed)
    assert "chunked reference: o: ratio 1.00e+00" in (next(junit.iter("failure")).text or "")
    assert page.text.split()[1] == "failed"
    assert f"{failed} of {len(result['batches'])} batches differ" in page.text
    assert result["failure"]["code"] in page.text
    assert max(batch["usage"].get("reference", 0) for batch in result["batches"]) > 1


def test_verify_of_the_scheduler_reports_what_was_at_work(tmp_path: Path) -> None:
    files = _files(tmp_path)
    assert _run("verify", "--suite=scheduler", "--cases=60", "--seed=1", *_flat(files))[0] == 0
    result, page, junit = _read(files)
    assert "verify --suite=scheduler --cases=60 --seed=1" in page.text
    assert f"{result['covered']['steps']:,} steps" in page.text
    assert "chunked prefill" in page.text
    (case,) = junit.iter("testcase")
    assert (case.get("classname"), case.get("name")) == ("verify.scheduler.alone", "random runs, 60 steps")
    assert float(case.get("time") or 0) == pytest.approx(result["seconds"], abs=0.001)


def test_verify_of_the_scheduler_reports_what_went_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        UpstreamScheduler, "_cap_long_prefill", lambda self, num_new_tokens: num_new_tokens + 1
    )
    files = _files(tmp_path)
    arguments = ("--suite=scheduler", "--cases=100", "--failures", str(tmp_path / "failures"))
    assert _run("verify", *arguments, *_flat(files))[0] == 1
    result, page, junit = _read(files)
    message, scenario = result["failure"]["message"], result["failure"]["scenario"]
    assert message in page.text
    assert f"ascend-twin verify --suite=scheduler --scenario={scenario}" in page.text
    (failure,) = junit.iter("failure")
    assert (failure.text or "").startswith(message)
    assert scenario in (failure.text or "")


@pytest.mark.parametrize("fits", [True, False])
def test_compile_reports_each_kernel_on_each_target(tmp_path: Path, fits: bool) -> None:
    result = compiled(fits=fits)
    report = compile_report(result)
    assert report.status == ("passed" if fits else "failed")
    page = Page(render(report))
    for said in (
        "l2norm_fwd_kernel",
        "chunk_fwd_kernel_o",
        "a loop was not pipelined",
        "185.5 of 192 (910B1)",
    ):
        assert said in page.text
    assert ("ub overflow" in page.text) is not fits
    assert ("BT=64, K=128, as launched for Qwen3.5-27B TP 4" in page.text) is not fits
    write_junit(tmp_path / "junit.xml", compile_junit(result))
    root = ElementTree.parse(tmp_path / "junit.xml").getroot()
    assert [suite.get("name") for suite in root] == ["compile.910B1", "compile.950"]
    assert [root.get(name) for name in ("tests", "failures", "time")] == ["4", "0" if fits else "1", "6.0"]


def test_compile_draws_the_most_of_each_memory() -> None:
    result = compiled(fits=False)
    smaller = {**result["compiled"][-1], "planned": {"UB": 1000, "L1": 1000}}
    result["compiled"].append(smaller)
    ub, l1 = memory_plot(result).axes
    bars: Any = ub.patches
    assert sorted(bar.get_width() for bar in bars) == pytest.approx(
        sorted(100 * size / limit for size, limit in
               ((70_000, 196_608), (200_000, 196_608), (70_000, 253_952), (190_000, 253_952)))
    )  # fmt: skip
    assert len(l1.patches) == 1  # what does not fit has no plan for it


@pytest.mark.parametrize("command", [("verify",), ("verify", "--suite=scheduler"), ("compile",)])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--html=report.pdf",), "--html is report.pdf; allowed: a file that ends in .html, .htm"),
        (("--junit=junit.json",), "--junit is junit.json; allowed: a file that ends in .xml"),
        (("--html=absent/x.html",), "--html is absent/x.html; allowed: a file that can be written"),
        (("--html=x.html", "--json=x.html"), "--html is x.html; allowed: another file than that of --json"),
    ],
)
def test_files_that_cannot_be_written_are_refused_before_any_work(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    command: tuple[str, ...],
    options: tuple[str, ...],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    status, output = _run(*command, *options)
    assert (status, output.startswith(f"error: {message}")) == (2, True), output
    assert not list(tmp_path.iterdir())
