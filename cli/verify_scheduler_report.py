"""What `verify --suite scheduler` writes with `--html` and `--junit`, from the object of `--json`."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..equivalence_tests.scheduler_runs import FEATURES_AT_WORK
from .junit import JUnitCase, JUnitSuite
from .report import Code, Report, Row, Section, Table, command_line

TITLES = {
    None: "the plain scheduler, by oracle and invariants",
    "vllm": "the plain scheduler beside vLLM 0.17.0",
}
"""What is verified, by `against`."""


def scheduler_report(result: Mapping[str, Any]) -> Report:
    """The report of a result, the object that `--json` writes."""
    options, failure = result["options"], result["failure"]
    covered = ", ".join(f"{count:,} {what}" for what, count in result["covered"].items())
    sections = [Section("What was at work", [_features(result["features"])])]
    if result["excused"]:
        sections.append(Section("Known defects of vLLM 0.17.0", [_excused(result["excused"])]))
    if failure:
        sections.insert(0, _failure(failure))
    return Report(
        title=f"verify: {TITLES[options['against']]}",
        status="failed" if failure else "passed",
        verdict=f"{'A run went wrong' if failure else 'Nothing is wrong'}: {covered}.",
        command=command_line("verify", {"--suite": "scheduler", **_choices(options)}),
        facts={
            "what ran": _what_ran(options),
            "against": "vLLM 0.17.0" if options["against"] else "its oracle and its invariants",
            **({} if _is_given(options) else {"seed": str(options["seed"])}),
            **{what: f"{count:,}" for what, count in result["covered"].items()},
        },
        sections=sections,
        versions=result["versions"],
    )


def scheduler_junit(result: Mapping[str, Any]) -> list[JUnitSuite]:
    """The one case of a result, the object that `--json` writes."""
    options, failure = result["options"], result["failure"]
    message = ""
    if failure:
        scenario = failure["scenario"]
        message = failure["message"] + (f"\n\n{_reproduction(scenario)}" if scenario else "")
    case = JUnitCase(_what_ran(options), result["seconds"], failure=message)
    suite = f"verify.scheduler.{options['against'] or 'alone'}"
    return [JUnitSuite(suite, [case], {"seed": str(options["seed"]), **result["versions"]})]


def _is_given(options: Mapping[str, Any]) -> bool:
    """Whether a trace or a scenario was run: nothing was drawn at random."""
    return bool(options["trace"] or options["scenario"])


def _what_ran(options: Mapping[str, Any]) -> str:
    if options["scenario"]:
        return f"scenario {Path(options['scenario']).name}"
    if options["trace"]:
        return f"the first {options['requests']:,} requests of {Path(options['trace']).name}"
    return f"random runs, {options['steps']:,} steps"


def _choices(options: Mapping[str, Any]) -> dict[str, Any]:
    """All that the result depends on, by option."""
    chosen = {"--against": options["against"], "--scenario": options["scenario"]}
    if options["trace"]:
        return {**chosen, "--trace": options["trace"], "--requests": options["requests"]}
    return (
        chosen if options["scenario"] else {**chosen, "--cases": options["steps"], "--seed": options["seed"]}
    )


def _reproduction(scenario: str) -> str:
    return command_line("verify", {"--suite": "scheduler", "--scenario": scenario})


def _failure(failure: Mapping[str, Any]) -> Section:
    parts = [Code(failure["message"])]
    if failure["scenario"]:
        parts.append(Code(_reproduction(failure["scenario"]), "This reproduces it:"))
    return Section("What went wrong", parts)


def _features(features: Mapping[str, int]) -> Table:
    counts = {**dict.fromkeys(FEATURES_AT_WORK, 0), **features}
    rows = [Row((name.replace("_", " "), f"{count:,}")) for name, count in counts.items()]
    return Table(("feature", "times"), rows, ["times"], "How often each feature was at work.")


def _excused(excused: Mapping[str, int]) -> Table:
    most_first = sorted(excused.items(), key=lambda pair: -pair[1])
    rows = [Row((name, f"{count:,}")) for name, count in most_first]
    caption = "Runs that a known defect ended (docs/scheduler.md); they count as right."
    return Table(("known defect", "runs"), rows, ["runs"], caption)
