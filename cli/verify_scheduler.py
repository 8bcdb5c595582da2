"""`ascend-twin verify --suite scheduler`: the plain scheduler against its oracle, its invariants, and vLLM.

The file written by `--json` holds one object:

    version     1, raised when a field changes its meaning
    passed      bool
    options     what was asked for, defaults filled in (seed included)
    covered     {"runs", "steps", "requests"}
    features    {name: how often it was at work}
    excused     {known defect of vLLM 0.17.0: runs that it ended}
    failure     null, or {"message", "scenario": the file that reproduces it}
    versions    of what the result depends on
    seconds     float
"""

import dataclasses
import json
import random
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.table import Table

from ..equivalence_tests.run_on_device import versions
from ..equivalence_tests.scheduler_engines import Engine, OurEngine
from ..equivalence_tests.scheduler_runs import (
    FEATURES_AT_WORK,
    NUM_DIFFERENTIAL_STEPS,
    NUM_STEPS,
    CheckedEngine,
    Summary,
    minimize_scenario,
    run_at_random,
    run_mix,
    run_scenario,
    save_failure,
)
from ..equivalence_tests.scheduler_scenarios import Add, Scenario
from ..equivalence_tests.vllm017 import VLLMEngine, load_vllm
from ..reference.errors import AscendTwinError, TraceError, invalid_argument
from ..reference.gdn.inputs import check_choice
from ..scheduler.config import SchedulerConfig
from ..scheduler.traces import read_trace
from ..scheduler.workload import RequestMix, mix_from_trace
from .output_files import check_apart, check_folder
from .progress import progress
from .result_files import result_files, write_result
from .verify_scheduler_report import scheduler_junit, scheduler_report

MINIMIZE_SECONDS = 60.0
PEERS = ("vllm",)

# Of a trace: a pool that holds some 1.5 million tokens, so that prefixes are found and blocks run short.
TRACE_BLOCK_SIZE, TRACE_NUM_BLOCKS = 128, 12_000

SO_FAR = "; nothing was wrong so far"  # when interrupted


@dataclass(frozen=True)
class Options:
    """What the user asked for.

    Attributes:
        against: "vllm", or None for ours alone.
        trace: file of a request trace to drive instead of random runs, or None.
        requests: of the trace, the first so many.
        scenario: file of a saved scenario, or of a case of fixtures/cases/scheduler, to run instead, or None.
        profile: a key of `NUM_STEPS`.
        steps, seed: of random runs, or None for those of the profile.
        failures: folder for scenarios of random runs that fail.
        json, html, junit: files to write, or None.
    """

    against: str | None
    trace: Path | None
    requests: int
    scenario: Path | None
    profile: str
    steps: int | None
    seed: int | None
    failures: Path
    json: Path | None
    html: Path | None
    junit: Path | None


def run_verify_scheduler(options: Options) -> int:
    """Verify; print the result on stdout and progress on stderr.

    Returns:
        The exit status: 0 when nothing is wrong, else 1.

    Raises:
        InvalidArgumentError, TraceError, UnavailableError: for wrong input, before anything is run.
        typer.Exit: with status 130 when it is interrupted; one line on stderr says how far it came.
    """
    start = time.perf_counter()
    options = _with_defaults(options)
    check_apart(result_files(options), {"--trace": options.trace, "--scenario": options.scenario})
    if not options.trace and not options.scenario:
        check_folder("--failures", options.failures)
    if options.against:
        load_vllm()
    peers = (VLLMEngine,) if options.against else ()
    scenario = _load_scenario(options.scenario) if options.scenario else None
    mix = _load_mix(options.trace, options.requests) if options.trace else None
    typer.echo(_headline(options))
    if scenario:
        summary = _run_saved(scenario, (CheckedEngine, *peers))
    elif mix:
        summary = _run_trace(mix, (OurEngine, *peers))
    else:
        summary = _run_at_random(options, (CheckedEngine, *peers))
    seconds = time.perf_counter() - start
    path, found = None, ""
    if summary.scenario and not options.scenario:
        with suppress(KeyboardInterrupt):  # then it stays as long as it is
            smallest, message = minimize_scenario(summary.scenario, (CheckedEngine, *peers), MINIMIZE_SECONDS)
            if message:
                summary.scenario, summary.failure = smallest, message
        path, found = _save(summary.scenario, options)
    _print(summary, seconds)
    if found:
        typer.echo(f"\n{found}")
    result = _as_json(options, summary, path, seconds)
    write_result(options, result, scheduler_report, scheduler_junit)
    return 1 if summary.failure else 0


def _as_json(options: Options, summary: Summary, scenario: Path | None, seconds: float) -> dict[str, Any]:
    """The object of `--json`; `scenario` is the file that reproduces the failure."""
    failure = {"message": summary.failure, "scenario": str(scenario) if scenario else None}
    return {
        "version": 1,
        "passed": not summary.failure,
        "options": {name: str(x) if isinstance(x, Path) else x for name, x in vars(options).items()},
        "covered": {"runs": summary.runs, "steps": summary.steps, "requests": summary.requests},
        "features": {name: count for name, count in sorted(summary.features.items()) if count},
        "excused": dict(+summary.excused),
        "failure": failure if summary.failure else None,
        "versions": versions(),
        "seconds": seconds,
    }


def _with_defaults(options: Options) -> Options:
    check_choice("--profile", options.profile, tuple(NUM_STEPS))
    if options.against is not None:
        check_choice("--against", options.against, PEERS)
    steps = (NUM_DIFFERENTIAL_STEPS if options.against else NUM_STEPS)[options.profile]
    seed = random.SystemRandom().randrange(2**31) if options.profile == "nightly" else 0
    return dataclasses.replace(
        options,
        steps=options.steps or steps,
        seed=seed if options.seed is None else options.seed,
    )


def _save(scenario: Scenario, options: Options) -> tuple[Path | None, str]:
    """Its file, or None, and what tells the user how to reproduce the failure."""
    try:
        path = save_failure(f"seed_{options.seed}", scenario, options.failures)
    except OSError as error:
        reason = error.strerror or error
        return None, (
            f"This reproduces it; it cannot be written to {options.failures} ({reason}):\n\n"
            f"{json.dumps(scenario.to_json())}"
        )
    return path, f"This reproduces it:\n\nascend-twin verify --suite scheduler --scenario {path}"


def _headline(options: Options) -> str:
    what = f"random runs, {options.steps:,} steps, seed {options.seed}"
    if options.scenario:
        what = f"scenario {options.scenario}"
    elif options.trace:
        what = f"the first {options.requests:,} requests of {options.trace}"
    if options.against:
        return f"vLLM 0.17.0's scheduler and the plain one, side by side: {what}"
    return f"the plain scheduler against its oracle and its invariants: {what}"


def _run_at_random(options: Options, engines: Sequence[Callable[..., Engine]]) -> Summary:
    with progress("steps", options.steps or 0, SO_FAR) as advance:
        return run_at_random(options.seed or 0, options.steps or 0, engines, advance=advance)


def _run_trace(mix: RequestMix, engines: Sequence[Callable[..., Engine]]) -> Summary:
    longest = max(r.num_prompt_tokens + r.max_tokens for r in mix.requests) + 1
    config = SchedulerConfig(
        num_blocks=max(TRACE_NUM_BLOCKS, longest // TRACE_BLOCK_SIZE + 2),
        block_size=TRACE_BLOCK_SIZE,
        max_model_len=longest,
    )
    summary = Summary(runs=1, requests=len(mix.requests))
    with progress("requests", len(mix.requests), SO_FAR) as advance:
        try:
            driver = run_mix(mix, config, engines, advance=advance)
        except AscendTwinError as error:
            summary.failure = f"{type(error).__name__}: {error}"
        else:
            summary.steps, summary.features = driver.num_steps, Counter(driver.features)
    return summary


def _load_scenario(path: Path) -> Scenario:
    try:
        return Scenario.load(path)
    except (OSError, AscendTwinError) as error:
        reason = error.strerror or error if isinstance(error, OSError) else error
        allowed = "a file that a failing run saved, or one of fixtures/cases/scheduler"
        invalid_argument("--scenario", path, f"{allowed} ({reason})")


def _load_mix(path: Path, num_requests: int) -> RequestMix:
    try:
        return mix_from_trace(read_trace(path)[:num_requests])
    except AscendTwinError as error:
        raise TraceError(f"--trace: {error}") from None


def _run_saved(scenario: Scenario, engines: Sequence[Callable[..., Engine]]) -> Summary:
    with progress("scenarios", 1, SO_FAR):
        run = run_scenario(scenario, engines)
    return Summary(
        runs=1,
        steps=run.driver.num_steps,
        requests=sum(isinstance(event, Add) for event in scenario.events),
        features=Counter(run.driver.features),
        excused=Counter([run.excused] if run.excused else []),
        failure=run.failure,
        scenario=scenario,
    )


def _print(summary: Summary, seconds: float) -> None:
    console = Console(width=None if sys.stdout.isatty() else 140)
    features: dict[str, Any] = {name: summary.features[name] for name in FEATURES_AT_WORK}
    features.update({name: count for name, count in sorted(summary.features.items()) if count})
    table = Table(*("feature", "times") * 3)
    cells = [(name.replace("_", " "), f"{count:,}") for name, count in features.items()]
    height = -(-len(cells) // 3)
    for row in range(height):
        table.add_row(*(text for cell in cells[row::height] for text in cell))
    console.print(table)
    if +summary.excused:
        excused = Table("known defect of vLLM 0.17.0 (docs/scheduler.md)", "runs that it ended")
        for name, count in summary.excused.most_common():
            if count:
                excused.add_row(name, f"{count:,}")
        console.print(excused)
    verdict = "WRONG" if summary.failure else "Agree"
    covered = f"{summary.runs:,} runs, {summary.requests:,} requests, {summary.steps:,} steps"
    typer.echo(f"{verdict}: {covered} in {seconds:.1f} s.")
    if summary.failure:
        typer.echo(f"\n{summary.failure}")
