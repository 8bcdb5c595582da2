"""What `ascend-twin mutants --html` and `--junit` write, from the object of `--json`."""

from collections.abc import Mapping, Sequence
from typing import Any

from .junit import JUnitCase, JUnitSuite
from .report import Code, Fold, Part, Report, Row, Section, Table, command_line

_OPTIONS = {"area": "--area", "suite": "--suite"}


def mutants_report(result: Mapping[str, Any]) -> Report:
    """The report of a result, the object that `--json` writes."""
    bugs, options = result["bugs"], result["options"]
    num_caught = sum(bug["caught"] for bug in bugs)
    unfit = [verdict["suite"] for verdict in result["unmutated"] if _is_unfit(verdict)]
    verdict = f"{num_caught} of {len(bugs)} bugs are caught."
    if unfit:
        verdict += f" The code as it is does not pass {', '.join(unfit)}: what these say proves nothing."
    areas = list(dict.fromkeys(bug["area"] for bug in bugs))
    return Report(
        title="mutants: real bugs put back",
        status="passed" if result["passed"] else "failed",
        verdict=verdict,
        command=command_line(
            "mutants", {option: options[name] for name, option in _OPTIONS.items()}, *options["names"]
        ),
        facts={
            "bugs": str(len(bugs)),
            "suites": str(len(result["unmutated"])),
            "areas": ", ".join(areas),
            "reported as": f"{len({place for bug in bugs for place in bug['upstream']})} issues and requests",
        },
        sections=[
            *(_area(area, [bug for bug in bugs if bug["area"] == area]) for area in areas),
            Section("Suites on the code as it is", [_suites(result)]),
            Section("Not here", [_absent(result["absent"])]),
        ],
        versions=result["versions"],
    )


def mutants_junit(result: Mapping[str, Any]) -> list[JUnitSuite]:
    """A case for each bug, and for each suite on the code as it is, of the object that `--json` writes."""
    areas = dict.fromkeys(bug["area"] for bug in result["bugs"])
    suites = [
        JUnitSuite(
            f"mutants.{area.replace(' ', '_')}",
            [
                JUnitCase(
                    bug["name"],
                    bug["seconds"],
                    failure="" if bug["caught"] else f"not caught: {bug['what']}\n{_told(bug['verdicts'])}",
                    output=_told(bug["verdicts"]),
                )
                for bug in result["bugs"]
                if bug["area"] == area
            ],
            result["versions"],
        )
        for area in areas
    ]
    unmutated = [
        JUnitCase(
            verdict["suite"],
            verdict["seconds"],
            failure=f"does not pass: {verdict['message']}" if _is_unfit(verdict) else "",
            skipped=verdict["message"] if verdict["result"] == "unavailable" else "",
        )
        for verdict in result["unmutated"]
    ]
    return [*suites, JUnitSuite("mutants.unmutated", unmutated, result["versions"])]


def _is_unfit(verdict: Mapping[str, Any]) -> bool:
    """Whether a suite on the code as it is failed."""
    return verdict["result"] not in ("missed", "unavailable")


def _told(verdicts: Sequence[Mapping[str, Any]]) -> str:
    """What each suite said, a line each."""
    return "\n".join(
        f"{v['suite']}: {v['result']}, case {v['cases']}{': ' if v['message'] else ''}{v['message']}"
        for v in verdicts
    )


def _area(area: str, bugs: Sequence[Mapping[str, Any]]) -> Section:
    suites = list(dict.fromkeys(verdict["suite"] for bug in bugs for verdict in bug["verdicts"]))
    rows = []
    for bug in bugs:
        cells = {verdict["suite"]: _cell(verdict) for verdict in bug["verdicts"]}
        status, word = ("passed", "caught") if bug["caught"] else ("failed", "not caught")
        cells = (bug["name"], ", ".join(bug["upstream"]), *(cells.get(suite, "") for suite in suites))
        rows.append(Row(cells, status, word))
    caption = "The case at which a suite found the bug; - has missed it; an empty place was not asked."
    table = Table(("bug", "upstream", *suites), rows, suites, caption)
    return Section(area, [table, Fold("Each bug", [_bug(bug) for bug in bugs])])


def _bug(bug: Mapping[str, Any]) -> Part:
    parts: list[Part] = [
        f"{bug['what'][0].upper()}{bug['what'][1:]}.",
        Code(_diff(bug["old"], bug["new"]), f"In {bug['module'].replace('.', '/')}.py:"),
        Code(_told(bug["verdicts"]), "What the suites said:"),
    ]
    return Fold(bug["name"], parts, "passed" if bug["caught"] else "failed", is_open=not bug["caught"])


def _diff(old: str, new: str) -> str:
    lines = [f"- {line}" for line in old.splitlines()] + [f"+ {line}" for line in new.splitlines()]
    return "\n".join(lines)


def _cell(verdict: Mapping[str, Any]) -> str:
    if verdict["result"] == "caught":
        return str(verdict["cases"])
    return "-" if verdict["result"] == "missed" else verdict["result"]


def _suites(result: Mapping[str, Any]) -> Table:
    rows = []
    for verdict in result["unmutated"]:
        status, word = "passed", "passes"
        if verdict["result"] == "unavailable":
            status, word = "skipped", "cannot run"
        elif _is_unfit(verdict):
            status, word = "failed", "fails"
        name = verdict["suite"]
        cells = (name, result["suites"][name], str(verdict["cases"]), verdict["message"])
        rows.append(Row(cells, status, word))
    return Table(("suite", "what it checks", "cases", "message"), rows, ("cases",))


def _absent(absent: Sequence[Mapping[str, Any]]) -> Table:
    rows = [Row((", ".join(bug["upstream"]), bug["what"], bug["why"])) for bug in absent]
    return Table(("upstream", "what goes wrong, and when", "it"), rows, caption="Bugs that are not put back.")
