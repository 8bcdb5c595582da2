"""`ascend-twin simulate`: data-parallel ranks under a workload, with several admission policies side by side.

The file written by `--json` holds one object. The same command writes the same bytes.

    version     1, raised when a field changes its meaning
    command     the command that writes it, as text: all that the result depends on
    workload    {"source": file or text form, "requests", "prompt_tokens", "output_tokens": of the first seed}
    config      of the scheduler of each rank, fields of `SchedulerConfig`
    cost        fields of `CostModel`
    rows        for each DP size and policy {"dp_size", "policy", "runs": for each seed {"seed",
                "throughput_ratio": over that of the first policy of this DP size, and the fields of `Metrics`
                (scheduler/latencies.py)}}
"""

import os
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import typer
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..reference.errors import AscendTwinError, invalid_argument
from ..scheduler.admission import make_policy
from ..scheduler.config import SchedulerConfig
from ..scheduler.cost import CostModel, load_cost
from ..scheduler.simulation import ROUTINGS, SimulationSetup
from ..scheduler.traces import TraceRequest, read_trace
from ..scheduler.workload import mix_from_trace
from ..scheduler.workloads import WORKLOADS, make_requests
from . import report
from .output_files import check_apart, write_atomically, write_json
from .parallel import run_jobs
from .progress import progress
from .simulate_runs import Job, Row, Run
from .simulate_tables import LEFT, tables

DEFAULT_COST = CostModel(
    step_ms=30.0,
    prefill_step_ms=10.0,
    prefill_us_per_token=30.0,
    prefill_ns_per_pair=4.0,
    expert_us_per_token=30.0,
    decode_us_per_request=30.0,
    decode_ns_per_context_token=10.0,
    source="illustrative, measured nowhere: docs/simulation.md has the arithmetic",
)

MOST_CACHE_TOKENS = 2**19
"""Without --num-blocks, the tokens of a rank's KV cache, at most; but never less than the longest request."""

TABLE_WIDTH = 110


@dataclass(frozen=True)
class Options:
    """What the user asked for; the options of the command, in its order."""

    source: str
    dp: tuple[int, ...]
    policy: tuple[str, ...]
    routing: str
    concurrency: int | None
    requests: int | None
    max_num_seqs: int
    max_num_batched_tokens: int
    num_blocks: int | None
    block_size: int
    prefix_caching: bool
    cost: Path | None
    seed: int
    seeds: int
    jobs: int | None
    json: Path | None
    html: Path | None
    timeline: Path | None
    timeline_steps: int

    @property
    def is_trace(self) -> bool:
        return os.path.exists(self.source) and not os.path.isdir(self.source)

    @property
    def all_seeds(self) -> range:
        return range(self.seed, self.seed + self.seeds)


@dataclass(frozen=True)
class Plan:
    """Everything that the runs need, checked; `workloads` has the requests of each seed."""

    options: Options
    cost: CostModel
    config: SchedulerConfig
    workloads: tuple[list[TraceRequest], ...]

    @property
    def command(self) -> str:
        """A command that has this result, whatever the defaults are then."""
        return shlex.join(["ascend-twin", "simulate", *_arguments(self)])


def run_simulate(options: Options) -> None:
    """Simulate; print tables on stdout and progress on stderr, write the files that were asked for.

    Raises:
        InvalidArgumentError, TraceError: for wrong input, before anything is simulated.
        typer.Exit: with status 130 when it is interrupted; one line on stderr says how far it came.
    """
    start = time.perf_counter()
    plan = prepare(options)
    typer.echo(headline(plan))
    rows = _rows(plan, _run_all(plan))
    _print(rows)
    _write(plan, rows)
    typer.echo(f"{len(rows) * options.seeds} runs in {time.perf_counter() - start:.1f} s.")


def prepare(options: Options) -> Plan:
    """Check everything, read or draw the requests, and lay out the cache of a rank."""
    _check_outputs(options)
    for name, given in (("--dp", options.dp), ("--policy", options.policy)):
        if len(set(given)) < len(given):
            invalid_argument(name, ", ".join(map(str, given)), "each once")
    if options.routing not in ROUTINGS:
        invalid_argument("--routing", options.routing, ", ".join(ROUTINGS))
    for policy in options.policy:
        _with_option("--policy", make_policy, policy, options.max_num_seqs)
    cost = _with_option("--cost", load_cost, options.cost) if options.cost else DEFAULT_COST
    if options.is_trace:
        _check_seed_has_effect(options)
        recorded = _with_option("TRACE_OR_WORKLOAD", read_trace, options.source)[: options.requests]
        start = min(request.arrival_ms for request in recorded)  # some traces count from 1970
        workload = [replace(request, arrival_ms=request.arrival_ms - start) for request in recorded]
        _with_option(options.source, mix_from_trace, workload)
        workloads = (workload,) * options.seeds
    else:
        workloads = tuple(_draw(options, seed) for seed in options.all_seeds)
    return Plan(options, cost, _config(options, workloads), workloads)


def _check_outputs(options: Options) -> None:
    outputs = {
        "--json": (options.json, ()),
        "--html": (options.html, report.SUFFIXES),
        "--timeline": (options.timeline, (".json",)),
    }
    source = options.source if options.is_trace else None
    check_apart(outputs, {"TRACE_OR_WORKLOAD": source, "--cost": options.cost})


def _check_seed_has_effect(options: Options) -> None:
    """Of a trace, only skewed routing is random."""
    if options.routing == "skewed":
        return
    for name, value, default in (("--seed", options.seed, 0), ("--seeds", options.seeds, 1)):
        if value != default:
            invalid_argument(name, value, f"{default} with a trace, unless --routing is skewed")


def _draw(options: Options, seed: int) -> list[TraceRequest]:
    name = options.source.partition(":")[0]
    if name not in WORKLOADS:
        allowed = f"a file, which it is not, or one of {', '.join(WORKLOADS)}"
        invalid_argument("TRACE_OR_WORKLOAD", repr(options.source), allowed)
    return _with_option("TRACE_OR_WORKLOAD", make_requests, options.source, seed, options.requests)


def _config(options: Options, workloads: Sequence[Sequence[TraceRequest]]) -> SchedulerConfig:
    """Without --num-blocks: `max_num_seqs` requests of the longest fit, up to `MOST_CACHE_TOKENS`."""
    longest = max(_num_tokens(request) for requests in workloads for request in requests)
    blocks = -(-longest // options.block_size)
    num_blocks = options.num_blocks
    if num_blocks is None:
        most = max(blocks, MOST_CACHE_TOKENS // options.block_size)
        num_blocks = 1 + min(blocks * options.max_num_seqs, most)
    elif num_blocks <= blocks:
        allowed = f">= {blocks + 1}: the longest request has {longest} tokens, and one block is kept empty"
        invalid_argument("--num-blocks", num_blocks, allowed)
    return SchedulerConfig(
        num_blocks=num_blocks,
        block_size=options.block_size,
        max_num_seqs=options.max_num_seqs,
        max_num_batched_tokens=options.max_num_batched_tokens,
        max_model_len=longest,
        enable_prefix_caching=options.prefix_caching,
        log_stats=False,
    )


def _num_tokens(request: TraceRequest) -> int:
    return request.num_prompt_tokens + max(1, request.num_output_tokens)


def _with_option(option: str, read: Callable[..., Any], *arguments: Any) -> Any:
    """`read`, with the option that it is read for at the start of its error."""
    try:
        return read(*arguments)
    except AscendTwinError as error:
        raise type(error)(f"{option}: {error}") from None


# Runs


def _run_all(plan: Plan) -> list[Run]:
    """One for each DP size, policy and seed, in this order."""
    options = plan.options
    jobs = [
        Job(
            SimulationSetup(
                dp_size=dp_size,
                policy=policy,
                cost=plan.cost,
                config=plan.config,
                routing=options.routing,
                concurrency=options.concurrency,
                seed=seed,
            ),
            requests,
            keeps_result=seed == options.seed and bool(options.html or options.timeline),
        )
        for dp_size in options.dp
        for policy in options.policy
        for seed, requests in zip(options.all_seeds, plan.workloads, strict=True)
    ]
    with progress("requests", sum(len(job.requests) for job in jobs)) as advance:
        return run_jobs(jobs, options.jobs or os.cpu_count() or 1, advance)


def _rows(plan: Plan, runs: Sequence[Run]) -> list[Row]:
    """The runs of each DP size and policy together, beside those of the first policy."""
    options, size = plan.options, plan.options.seeds
    rows = []
    for i, dp_size in enumerate(options.dp):
        of_size = runs[i * size * len(options.policy) :]
        for j, policy in enumerate(options.policy):
            own = of_size[j * size :][:size]
            ratios = tuple(
                run.metrics.output_tokens_per_s / first.metrics.output_tokens_per_s
                for run, first in zip(own, of_size[:size], strict=True)
            )
            rows.append(Row(dp_size, policy, tuple(run.metrics for run in own), ratios, own[0].result))
    return rows


# What is written


def _write(plan: Plan, rows: Sequence[Row]) -> None:
    options = plan.options
    if options.json:
        write_json("--json", options.json, as_json(plan, rows))
    results = [(f"{row.policy}, DP {row.dp_size}", row.result) for row in rows if row.result]
    if options.html:
        from .simulate_report import simulate_report

        report.write_html(options.html, simulate_report(headline(plan), as_json(plan, rows), rows))
    if options.timeline:
        from .simulate_timeline import write_timeline

        most = options.timeline_steps
        write_atomically("--timeline", options.timeline, lambda file: write_timeline(file, results, most))


def as_json(plan: Plan, rows: Sequence[Row]) -> dict[str, Any]:
    """The object of `--json`."""
    seeds = plan.options.all_seeds
    return {
        "version": 1,
        "command": plan.command,
        "workload": {"source": plan.options.source, **_size(plan.workloads[0])},
        "config": asdict(plan.config),
        "cost": plan.cost.to_json(),
        "rows": [
            {
                "dp_size": row.dp_size,
                "policy": row.policy,
                "runs": [
                    {"seed": seed, "throughput_ratio": ratio, **metrics.to_json()}
                    for seed, ratio, metrics in zip(seeds, row.ratios, row.metrics, strict=True)
                ],
            }
            for row in rows
        ],
    }


def _size(requests: Sequence[TraceRequest]) -> dict[str, int]:
    return {
        "requests": len(requests),
        "prompt_tokens": sum(request.num_prompt_tokens for request in requests),
        "output_tokens": sum(max(1, request.num_output_tokens) for request in requests),
    }


def _arguments(plan: Plan) -> Iterator[str]:
    """All that the result depends on, defaults too."""
    options = plan.options
    yield options.source
    yield from (f"--dp={dp_size}" for dp_size in options.dp)
    yield from (f"--policy={policy}" for policy in options.policy)
    yield f"--routing={options.routing}"
    if options.concurrency:
        yield f"--concurrency={options.concurrency}"
    yield f"--requests={len(plan.workloads[0])}"
    yield f"--max-num-seqs={plan.config.max_num_seqs}"
    yield f"--max-num-batched-tokens={plan.config.max_num_batched_tokens}"
    yield f"--num-blocks={plan.config.num_blocks}"
    yield f"--block-size={plan.config.block_size}"
    if not plan.config.enable_prefix_caching:
        yield "--no-prefix-caching"
    if options.cost:
        yield f"--cost={options.cost}"
    if not options.is_trace or options.routing == "skewed":
        yield f"--seed={options.seed}"
        yield f"--seeds={options.seeds}"


# What is said


def headline(plan: Plan) -> str:
    """What is simulated, in three lines."""
    options, config = plan.options, plan.config
    size = "{requests:,} requests, {prompt_tokens:,} prompt and {output_tokens:,} output tokens"
    seeds = (
        f"seeds {options.seed} to {options.all_seeds[-1]}" if options.seeds > 1 else f"seed {options.seed}"
    )
    sent = f"{options.concurrency} at a time" if options.concurrency else "sent as they arrive"
    caching = "" if config.enable_prefix_caching else ", no prefix caching"
    return (
        f"{options.source}: {size.format(**_size(plan.workloads[0]))}; {sent}, {options.routing}, "
        f"{seeds}\n"
        f"each rank: at most {config.max_num_seqs} requests, and {config.max_num_batched_tokens:,} tokens a "
        f"step; {config.num_blocks:,} blocks of {config.block_size} tokens{caching}\n"
        f"cost: {options.cost or 'the default'}{f' ({plan.cost.source})' if plan.cost.source else ''}"
    )


def _print(rows: Sequence[Row]) -> None:
    console = Console(width=None if sys.stdout.isatty() else TABLE_WIDTH)
    for header, *lines in tables(rows):
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        for name in header:
            table.add_column(name, justify="left" if name in LEFT else "right", overflow="fold")
        for cells in lines:
            table.add_row(*map(Text, cells))
        console.print(table)
