"""Every bug of the museum is caught, by suites that pass the code as it is."""

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any
from xml.etree import ElementTree

import pytest
from typer.testing import CliRunner

from ascend_twin.cli import mutants as command
from ascend_twin.cli.main import app
from ascend_twin.cli.mutants_report import mutants_junit, mutants_report
from ascend_twin.equivalence_tests.devices import interprets
from ascend_twin.equivalence_tests.mutants import ABSENT, AREAS, BUGS, Bug, MutantServer, runner
from ascend_twin.optimized.gdn.device import Device

DOCS = Path(__file__).parents[1] / "docs/museum.md"
with_docs = pytest.mark.skipif(not DOCS.exists(), reason="the docs are in the repository alone")

FEWEST_BUGS = 45
MOST_SECONDS = 5.0  # of a bug, the median

# What no museum may leave out: each is put back, or said to be absent, and why.
UPSTREAM = {
    "fla": (
        909,
        792,
        794,
        463,
        1070,
        1113,
        537,
    ),
    "asc": (
        11807,
        11508,
        6822,
        8396,
        7506,
        10901,
        10619,
        10580,
        11072,
        11161,
        10276,
        10553,
        12079,
        12630,
        16428,
        5281,
        8279,
        10559,
        10537,
        11310,
        7611,
        8675,
        7479,
        13275,
        8975,
        15802,
        14233,
        11334,
        9749,
        11544,
        10746,
        16315,
    ),
    "vllm": (
        39064,
        34871,
        36013,
        45074,
        57104,
        29387,
        48245,
        57562,
        34616,
        30320,
        49439,
        43547,
        28224,
        45223,
        52957,
        39366,
        38009,
    ),
    "flashinfer": (
        2490,
        4481,
    ),
    "sgl-kernel-npu": (640,),
    "sglang": (
        40419,
        40362,
    ),
}

EVERY_SUITE = tuple(dict.fromkeys(suite for bug in BUGS for suite in bug.suites))

HARMLESS = Bug(
    "harmless",
    (),
    "balance",
    "nothing",
    "optimized.vllm.settings",
    "    return word in _ON\n",
    "    return word in tuple(_ON)\n",
    ("settings",),
)


@pytest.fixture(scope="module")
def server(device: Device, triton_runs: None) -> Iterator[MutantServer]:
    """A warm process."""
    if not interprets(device):
        pytest.skip("bugs are put back on the CPU alone: some write outside of their tensors")
    with MutantServer() as server:
        yield server


def told(outcome: runner.Outcome) -> str:
    """What each suite said."""
    return "\n".join(map(str, outcome.verdicts))


# The bugs


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.name)
def test_bug_is_caught(bug: Bug, server: MutantServer) -> None:
    outcome = server.run(bug, bug.suites)
    assert outcome.caught, told(outcome)
    assert {verdict.result for verdict in outcome.verdicts} <= {"caught", "missed"}, told(outcome)


@pytest.mark.parametrize("suite", EVERY_SUITE)
def test_suite_passes_the_code_as_it_is(suite: str, server: MutantServer) -> None:
    outcome = server.run(None, (suite,))
    (verdict,) = outcome.verdicts
    assert verdict.result == "missed", told(outcome)
    assert verdict.cases > 0


def test_bugs_are_many_and_have_different_names() -> None:
    assert len({bug.name for bug in BUGS}) == len(BUGS) >= FEWEST_BUGS
    assert {bug.area for bug in BUGS} == set(AREAS)
    assert len({(bug.module, bug.old, bug.new) for bug in BUGS}) == len(BUGS)


def test_bugs_cover_what_was_reported() -> None:
    here = {place for bug in BUGS for place in bug.upstream}
    absent = {place for bug in ABSENT for place in bug.upstream}
    assert here.isdisjoint(absent)
    reported = {f"{project}#{number}" for project, numbers in UPSTREAM.items() for number in numbers}
    assert reported <= here | absent
    assert sum(bool(bug.upstream) for bug in BUGS) >= FEWEST_BUGS


# How they are put back


def test_harmless_change_survives(server: MutantServer) -> None:
    outcome = server.run(HARMLESS, HARMLESS.suites)
    assert not outcome.caught
    assert [verdict.result for verdict in outcome.verdicts] == ["missed"]


@pytest.mark.parametrize(
    ("change", "result", "said"),
    [
        ({"new": "    return wrd in _ON\n"}, "broken", "NameError: name 'wrd'"),
        ({"new": "    return word in\n"}, "broken", "SyntaxError: invalid syntax"),
        ({"old": "nowhere"}, "broken", "'nowhere'; allowed: found once, not 0 times"),
        ({"old": "return"}, "broken", r"'return'; allowed: found once, not \d+ times"),
        ({"module": "optimized.nowhere"}, "broken", "module of the bug is optimized.nowhere"),
        ({"module": "reference.errors"}, "broken", "allowed: one that nothing has imported yet"),
        ({"suites": ("no such suite", "gating")}, "broken", "no suite has this name"),
        ({"new": "    import os; os._exit(3)\n"}, "broken", "the process ended with 3"),
        ({"new": "    while True: pass\n"}, "timed out", "after 3 s"),
    ],
    ids=lambda value: None if isinstance(value, str) else str(value),
)
def test_change_that_is_no_bug_is_not_caught(
    change: dict[str, Any], result: str, said: str, server: MutantServer
) -> None:
    bug = replace(HARMLESS, **{"suites": ("settings", "gating"), **change})
    outcome = server.run(bug, bug.suites, timeout=3)
    assert not outcome.caught
    assert outcome.verdicts[0].result == result
    assert re.search(said, outcome.verdicts[0].message), told(outcome)
    assert len(outcome.verdicts) == 2
    assert not server.run(HARMLESS, ("settings",)).caught  # it goes on


def test_process_of_a_bug_leaves_the_next_one_alone(server: MutantServer) -> None:
    (bug,) = (bug for bug in BUGS if bug.name == "zero_switches_it_on")
    for _ in range(2):
        assert server.run(bug, ("settings",)).caught
        assert not server.run(None, ("settings",)).caught


# The command


@pytest.fixture
def museum(monkeypatch: pytest.MonkeyPatch) -> None:
    """A museum of two bugs, one of which is none."""
    (bug,) = (bug for bug in BUGS if bug.name == "zero_switches_it_on")
    monkeypatch.setattr(command, "BUGS", (bug, HARMLESS))


def run(*arguments: str) -> tuple[int, str]:
    """Exit status, and stdout and stderr together."""
    result = CliRunner().invoke(app, ["mutants", *arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.output


def test_interrupted_mutants_says_what_it_counts(museum: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any, advance: Callable[[int], object], **__: Any) -> None:
        advance(1)
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "exhibit", interrupted)
    assert run("--jobs", "1") == (
        130,
        "interrupted after 1 of 3 runs, one of which is of the code as it is\n",
    )


def test_mutants_says_that_a_bug_survived_and_writes_all_files(museum: None, tmp_path: Path) -> None:
    files = {kind: tmp_path / f"result.{kind}" for kind in ("json", "html", "xml")}
    status, output = run(
        *("--jobs", "2", "--json", str(files["json"]), "--html", str(files["html"])),
        *("--junit", str(files["xml"])),
    )
    assert status == 1
    assert "NOT CAUGHT: harmless: settings missed" in output
    assert "1 of 2 bugs caught." in output

    result = json.loads(files["json"].read_text())
    assert result["passed"] is False
    assert [(bug["name"], bug["caught"]) for bug in result["bugs"]] == [
        ("zero_switches_it_on", True),
        ("harmless", False),
    ]
    assert [(verdict["suite"], verdict["result"]) for verdict in result["unmutated"]] == [
        ("settings", "missed")
    ]
    page = files["html"].read_text()
    assert "1 of 2 bugs are caught." in page
    assert "In optimized/vllm/settings.py:" in page
    cases = ElementTree.parse(files["xml"]).getroot().iter("testcase")
    assert [(case.get("name"), case.find("failure") is not None) for case in cases] == [
        ("zero_switches_it_on", False),
        ("harmless", True),
        ("settings", False),
    ]


def test_mutants_ends_with_0_when_all_are_caught(museum: None) -> None:
    status, output = run("zero_switches_it_on", "--jobs", "1")
    assert (status, "1 of 1 bugs caught." in output) == (0, True)


def test_mutants_ends_with_1_when_a_suite_does_not_pass_the_code_as_it_is(
    museum: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A suite that nothing passes catches everything, and proves nothing."""
    verdict = runner.Verdict("settings", "caught", 1, 0.1, "said")
    found = runner.Exhibition(runner.Outcome(None, (verdict,)), (runner.Outcome(HARMLESS, (verdict,)),))
    monkeypatch.setattr(command, "exhibit", lambda bugs, **options: found)
    status, output = run("harmless")
    assert status == 1
    assert "The code as it is does not pass settings (caught): said" in output
    assert "1 of 1 bugs caught, and 1 suites do not pass the code as it is." in output


def test_mutants_lists_bugs_without_running_any() -> None:
    status, output = run("--list", "--area", "async copies")
    assert status == 0
    assert "two_slots_without_an_event" in output
    assert "compact_ranks" not in output
    assert re.search(r"\n\d bugs\.\n", output)
    assert "Not here: vllm#57104" in output


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("no_such_bug",), "NAME is no_such_bug; allowed: a bug that --list names"),
        (("--area", "kernels"), "--area is kernels; allowed: one of metadata, numerics"),
        (("--suite", "tests"), "--suite is tests; allowed: one of metadata coverage"),
        (("compact_ranks", "--area", "balance"), "is compact_ranks, balance; allowed: some bug"),
        (("--json", "/nowhere/result.json"), "--json is /nowhere/result.json"),
        (("--html", "result.txt"), "--html is result.txt"),
    ],
)
def test_mutants_refuses_wrong_input_before_anything_is_run(arguments: tuple[str, ...], said: str) -> None:
    status, output = run(*arguments)
    assert status == 2
    assert output.startswith("error: ")
    assert said in output


def test_report_opens_what_was_not_caught() -> None:
    verdict = {"suite": "settings", "result": "timed out", "cases": 3, "seconds": 9.0, "message": "after 9 s"}
    bug = {**vars(HARMLESS), "caught": False, "seconds": 9.0, "verdicts": [verdict]}
    result = {
        **{"passed": False, "bugs": [bug], "unmutated": [verdict], "absent": [], "versions": {}},
        **{"options": {"names": [], "area": [], "suite": ["settings"]}, "suites": {"settings": "what"}},
    }
    page = mutants_report(result)
    assert page.verdict.startswith("0 of 1 bugs are caught. The code as it is does not pass settings")
    assert page.command == "ascend-twin mutants --suite=settings"
    (balance, unmutated) = mutants_junit(result)
    assert "settings: timed out, case 3: after 9 s" in balance.cases[0].failure
    assert unmutated.cases[0].failure == "does not pass: after 9 s"


# The docs


@with_docs
def test_docs_have_a_row_for_each_bug_and_say_what_is_absent() -> None:
    text = DOCS.read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\w+)` \| (.*?) \| (.*?) \| (.*?) \| ([\d.]+) \|$", text, re.MULTILINE)
    assert [(name, upstream) for name, upstream, *_ in rows] == [
        (bug.name, ", ".join(bug.upstream)) for bug in BUGS
    ]
    assert all(caught for _, _, caught, _, _ in rows)
    assert f"Here are {len(BUGS)} bugs, {sum(bool(bug.upstream) for bug in BUGS)} of them" in text
    assert median(float(seconds) for *_, seconds in rows) < MOST_SECONDS
    for absent in ABSENT:
        assert ", ".join(absent.upstream) in text
