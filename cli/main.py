"""The command `ascend-twin`: what the user types. The work of a command is imported when it runs."""

import errno
import os
import sys
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from ..reference.errors import AscendTwinError, invalid_argument
from .output_files import printable

_WORKLOAD, _OP, _OUTPUT = "Workload", "Op", "Output"


class _Commands(TyperGroup):
    """Commands of which an error is one line on stderr and exit status 2, an interrupt one line and 130."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except AscendTwinError as error:
            typer.echo(printable(f"error: {' '.join(str(error).split())}"), err=True)
            raise typer.Exit(2) from error
        except OSError as error:
            if error.filename is not None or error.errno in (None, errno.EPIPE):
                raise
            with suppress(OSError):  # what is left in the buffer would be tried, and fail, once more
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            typer.echo(f"error: cannot write the output: {error.strerror}", err=True)
            raise typer.Exit(2) from error
        except KeyboardInterrupt:
            typer.echo("interrupted", err=True)
            raise typer.Exit(130) from None


app = typer.Typer(
    cls=_Commands,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"ascend-twin {metadata.version('ascend-twin')}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Gated delta rule prefill for Ascend NPUs: a plain version that says what is right, an optimized one fed
    by prebuilt metadata as in production, and the proof that they agree.

    \b
    ascend-twin doctor    what can run on this machine, and what cannot, and why
    ascend-twin verify    do the two agree? No file and no accelerator needed; also of vLLM's scheduler
    ascend-twin replay    a recorded case: which stage, sequence and head went wrong first?
    ascend-twin simulate  what does an admission policy do to throughput and latency of data-parallel ranks?
    ascend-twin fit       the cost of a step for simulate, from measured steps or from a benchmark row
    ascend-twin published a published gain of balance scheduling, predicted from its baseline row alone
    ascend-twin bench     how fast is ours, against the implementations of others
    ascend-twin compile   does every kernel fit on an Ascend NPU? No NPU needed
    ascend-twin mutants   real bugs put back into this package: does every one of them get caught?
    """


@app.command(short_help="Do the plain and the optimized twin agree?")
def verify(
    ctx: typer.Context,
    suite: Annotated[
        str,
        typer.Option(
            help="What is verified: gdn (gated delta rule prefill), or scheduler (vLLM's, in plain Python)."
        ),
    ] = "gdn",
    trace: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Request trace in JSON Lines (fields timestamp, input_length, output_length, hash_ids). "
            "Default: for gdn a seeded generator with the lengths of a conversation service, for scheduler "
            "random runs.",
        ),
    ] = None,
    profile: Annotated[
        str,
        typer.Option(
            envvar="HYPOTHESIS_PROFILE",
            help="How much: dev, ci or nightly. For gdn 10, 30 or 300 steps of the workload (on linalg "
            "60, 180 or 1,800), for scheduler 5,000, 20,000 or 1,000,000 (against vLLM 2,500, 10,000 or "
            "100,000). Seed 0; nightly takes a fresh one, which is printed.",
        ),
    ] = "dev",
    cases: Annotated[int | None, typer.Option(min=1, help="Steps to check. Default: by --profile.")] = None,
    seed: Annotated[
        int | None,
        typer.Option(min=0, help="Of all that is random. Default: by --profile."),
    ] = None,
    against: Annotated[
        str | None,
        typer.Option(
            metavar="PEER",
            help="scheduler: drive this beside ours and compare everything. vllm is vLLM 0.17.0, which must "
            "be installed (`tox run -e vllm017` does). Default: ours alone, against oracle and invariants.",
        ),
    ] = None,
    requests: Annotated[
        int, typer.Option(min=1, help="scheduler with --trace: the first so many of its requests.")
    ] = 2000,
    scenario: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="scheduler: run a scenario that a failing run saved, or one of fixtures/cases/scheduler, "
            "and no other.",
        ),
    ] = None,
    failures: Annotated[
        Path, typer.Option(metavar="FOLDER", help="Where the smallest that fails is saved.")
    ] = Path("failures"),
    max_num_batched_tokens: Annotated[
        int | None,
        typer.Option(max=2**20, help="Tokens of a step, at most. Default: 1024; 256 of kernels on a CPU."),
    ] = None,
    max_num_seqs: Annotated[int, typer.Option(help="Sequences of a step, at most.")] = 16,
    implementation: Annotated[
        str | None,
        typer.Option(help="eager, staged or fused; `doctor` lists them. Default: eager on cpu, else fused."),
    ] = None,
    device: Annotated[
        str, typer.Option(help="Where it runs: cpu, linalg, cuda, npu, or cuda:INDEX, npu:INDEX.")
    ] = "cpu",
    dtype: Annotated[
        str, typer.Option(help="Of q, k, v and beta: bfloat16, float16, float32, float64.")
    ] = "bfloat16",
    num_heads: Annotated[
        int | None,
        typer.Option(min=1, max=1024, help="Query/key heads H. Default: 16; 1 of kernels on a CPU."),
    ] = None,
    num_value_heads: Annotated[
        int | None,
        typer.Option(min=1, max=1024, help="Value heads HV, a multiple of H. Default: 2 H."),
    ] = None,
    head_dim_k: Annotated[int, typer.Option(min=1, max=1024, help="Dim K of a query/key head.")] = 128,
    head_dim_v: Annotated[int, typer.Option(min=1, max=1024, help="Dim V of a value head.")] = 128,
    json: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Also write the result there (cli/verify.py: the fields)."),
    ] = None,
    html: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Also write a report there, one .html file.")
    ] = None,
    junit: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Also write JUnit XML there, for CI systems (.xml; docs/ci.md)."),
    ] = None,
) -> None:
    """Do the plain and the optimized twin agree?

    --suite gdn, the default: do the optimized path and the reference agree on prefill batches of a real
    workload? The batches are steps that a chunked-prefill scheduler forms from the arrivals and lengths of
    the workload, and a few fixed corner batches. Each is computed by the definition (token by token, in
    float64) and must be met by the prebuilt metadata (exactly), by the chunked reference and by the
    implementation (within the limits of equivalence_tests/tolerances.py). The default shape is that of
    Qwen3-Next.

    staged and fused are Triton kernels. On cpu they run in Triton's interpreter, some thousand times slower
    than on a device; there the default shape has fewer heads and tokens. linalg is the CPU, too, with native
    code of what the Ascend compiler makes of them: does it change what they compute? It takes the tools of
    ascend-twin[linalg], and checks more than five times as many batches in the same time.

    --suite scheduler: does the plain statement of vLLM 0.17.0's scheduler hold its invariants, and does every
    request say what it must, over random runs in which everything happens: preemption, prefix hits, drafts,
    images, adapters, sessions, grammars, remote KV, aborts, pauses, resets? With --against vllm: is each of
    its outputs, and its whole state after every step, that of the real one?

    \b
    ascend-twin verify
    ascend-twin verify --suite scheduler
    ascend-twin verify --suite scheduler --against vllm --trace conversation.jsonl
    ascend-twin verify --trace conversation.jsonl --cases 100 --json result.json
    ascend-twin verify --html report.html --junit junit.xml
    ascend-twin verify --implementation fused                 # interpreted, where there is no device
    ascend-twin verify --device linalg --dtype float16        # what the Ascend compiler makes of the kernels
    ascend-twin verify --device npu --max-num-batched-tokens 8192 --max-num-seqs 64
    ascend-twin verify --num-heads 4 --num-value-heads 8      # a rank of Qwen3-Next at TP 4

    Exit status: 0 they agree; 1 they differ, and the smallest that fails is saved for `ascend-twin replay` (a
    batch is also printed as code that reproduces it); 2 the input is wrong or the device is not there, said
    in one line; 130 it was interrupted.
    """
    _refuse_options_without_effect(ctx, suite)
    if suite == "scheduler":
        from .verify_scheduler import Options, run_verify_scheduler

        raise typer.Exit(
            run_verify_scheduler(
                Options(against, trace, requests, scenario, profile, cases, seed, failures, json, html, junit)
            )
        )
    # Before torch is imported. Its OpenMP threads otherwise spin while they wait, and where other processes
    # want the cores, the many small steps of the definition then take up to a hundred times as long.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from .verify import options_with_defaults, run_verify

    options = options_with_defaults(
        trace=trace,
        profile=profile,
        cases=cases,
        seed=seed,
        max_num_batched_tokens=max_num_batched_tokens,
        max_num_seqs=max_num_seqs,
        implementation=implementation,
        device=device,
        dtype=dtype,
        H=num_heads,
        HV=num_value_heads,
        K=head_dim_k,
        V=head_dim_v,
        failures=failures,
        json=json,
        html=html,
        junit=junit,
    )
    raise typer.Exit(run_verify(options))


def _refuse_options_without_effect(ctx: typer.Context, suite: str) -> None:
    """An option that would have no effect is an error, where it is given on the command line."""
    both = {"suite", "trace", "profile", "cases", "seed", "failures", "json", "html", "junit"}
    scheduler = {"against", "requests", "scenario"}
    suites = {"gdn": set(ctx.params) - scheduler, "scheduler": both | scheduler}
    if suite not in suites:
        invalid_argument("--suite", suite, f"one of {', '.join(suites)}")
    sources = {name: ctx.get_parameter_source(name) for name in ctx.params}
    given = [name for name, source in sources.items() if source and source.name == "COMMANDLINE"]
    for name in given:
        if name not in suites[suite]:
            allowed = "only together" if name in scheduler else "not together"
            option = f"--{name.replace('_', '-')}"
            invalid_argument(option, ctx.params[name], f"{allowed} with --suite scheduler")
    if suite == "scheduler":
        of_random_runs = {"profile", "cases", "seed", "failures"}
        for run, others in (("trace", of_random_runs | {"scenario"}), ("scenario", of_random_runs)):
            for name in given:
                if run in given and name in others:
                    invalid_argument(f"--{name}", ctx.params[name], f"not together with --{run}")
        if "requests" in given and "trace" not in given:
            invalid_argument("--requests", ctx.params["requests"], "only together with --trace")


@app.command(short_help="Which stage, sequence and head of a recorded case went wrong first?")
def replay(
    files: Annotated[
        list[Path],
        typer.Argument(
            metavar="FILE...",
            help="Recorded cases (.safetensors, .jsonl; docs/recording.md says how they are made), or "
            "folders of them.",
        ),
    ],
    device: Annotated[
        str,
        typer.Option(
            help="Where a call is run again: cpu, cuda, npu, or cuda:INDEX, npu:INDEX; linalg is the CPU and "
            "what the Ascend compiler makes of the kernels; sim is a simulated accelerator that runs "
            "everything as late as it may, and eager only."
        ),
    ] = "cpu",
    implementation: Annotated[
        str | None,
        typer.Option(
            help="What is run again: of a call eager, staged, fused or reference (default: eager on cpu, "
            "else fused); of a scheduler plain or vllm (default: what does what was recorded)."
        ),
    ] = None,
    minimize: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Also look for a smaller case with the same finding, and write it there."
        ),
    ] = None,
    heatmap: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Also draw the error by chunk and head there (.png, .svg or .pdf)."
        ),
    ] = None,
    html: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Also write a report there, one .html file.")
    ] = None,
    junit: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Also write JUnit XML there, for CI systems (.xml; docs/ci.md)."),
    ] = None,
    json: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Also write the result there (cli/replay.py: the fields)."),
    ] = None,
    max_bytes: Annotated[int, typer.Option(min=1, metavar="BYTES", help="Size of a file, at most.")] = 256
    * 2**20,
) -> None:
    """Which stage, sequence, chunk, token and head of a recorded case went wrong first, and what does it look
    like?

    A call of the op: its chunk metadata are compared with the definition, exactly; what each stage gave, if
    that was recorded, with the reference stage on what it was given; output and final states with the
    definition, token by token in float64. Where nothing but these was seen, known mistakes are made on
    purpose, one at a time, and the one that gives what was seen is named: a state that was dropped or
    transposed, the gate of another head, tokens that no chunk holds. Then the call is run again, stage by
    stage, and compared in the same way: is the implementation of today right about it?

    A scheduler's life: it is driven again by the recorded events, and the first step and field that differ
    are shown. Collectives: the first that does not fit those of the other ranks.

    \b
    ascend-twin replay gdn-layer0-step12.safetensors
    ascend-twin replay gdn-layer0-step12.safetensors --device npu --implementation fused
    ascend-twin replay gdn-layer0-step12.safetensors --device linalg
    ascend-twin replay gdn-layer0-step12.safetensors --minimize small.safetensors --heatmap error.png
    ascend-twin replay fixtures/cases/gdn --html report.html --junit junit.xml

    Exit status: 0 nothing differs; 1 something does; 2 the input is wrong, or what it takes is not there,
    said in one line, or a file of a folder is broken, named among the others; 130 it was interrupted.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from .replay import Options, run_replay

    raise typer.Exit(
        run_replay(
            Options(tuple(files), device, implementation, max_bytes, minimize, heatmap, html, junit, json)
        )
    )


@app.command(short_help="What can run on this machine, what cannot, and why.")
def doctor(
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """What can run on this machine, and what cannot, and why: versions, devices, implementations, plugin.

    Exit status 0, whatever it finds.
    """
    from .doctor import run_doctor

    run_doctor(json)


@app.command(short_help="Speed, as ratios against peers measured side by side.")
def bench(
    only: Annotated[
        list[str] | None,
        typer.Option(metavar="TEXT", help="Run only benchmarks whose name contains TEXT. May be repeated."),
    ] = None,
    device: Annotated[
        str, typer.Option(help="What is measured: cpu, linalg, cuda, npu, or cuda:INDEX, npu:INDEX.")
    ] = "cpu",
    rounds: Annotated[int, typer.Option(min=1, help="Turns of each contender.")] = 9,
    threads: Annotated[
        int | None, typer.Option(min=1, max=1024, help="Threads of PyTorch. Default: one a core.")
    ] = None,
    require_peers: Annotated[
        bool, typer.Option("--require-peers", help="A peer that is not installed is an error.")
    ] = False,
    json: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Also write the result there (cli/bench.py: the fields)."),
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Also draw the figures there (.png, .svg or .pdf).")
    ] = None,
) -> None:
    """How fast is ours, and how many bytes do kernels move?

    Each is measured against the same work done by others, in one process, taking turns. Peers that are not
    installed are skipped and named.

    On cpu: the metadata builder, the chunked reference, the eager path and the plain scheduler, against
    vllm-ascend 0.18.0's metadata builder, transformers' Qwen3-Next, our own plain loops and vLLM 0.17.0's
    scheduler (`tox run -e bench-peers` installs them). The Triton paths are not timed there: they are
    interpreted.

    On linalg: staged and fused as the Ascend compiler lowers them, run natively. Against Triton's
    interpreter, on batches small enough for it: calls that find everything compiled, and first calls, which
    compile. Against the eager path: a call of 2048 tokens of Qwen3-Next's heads. The interpreter takes
    minutes, with --rounds 3 a third of them.

    On cuda: fused and staged against fla-core 0.6.0 (`tox run -e bench-cuda` installs it), on 8192 and 32768
    tokens in 1 to 64 sequences of Qwen3-Next's heads in bfloat16; on npu: fused against staged. On both:
    metadata prebuilt against built on the spot, and the host's share of the time.

    Everywhere: bytes a token that kernels load and store, for upstream, staged and fused, from the shapes.

    \b
    ascend-twin bench
    ascend-twin bench --only metadata --rounds 21 --plot metadata.png
    ascend-twin bench --device linalg --only cached --rounds 3
    ascend-twin bench --device cuda --only fused --only prebuilt --json result.json
    tox run -e bench-peers -- --json result.json

    Exit status: 0 measured (whatever the figures); 2 the input is wrong, the device is not there, or
    contenders do not compute the same, said in one line; 130 it was interrupted.
    """
    from .bench import run_bench

    run_bench(only or [], rounds, threads, json, plot, require_peers, device)


@app.command(short_help="Throughput and latency of data-parallel ranks, by admission policy.")
def simulate(
    ctx: typer.Context,
    source: Annotated[
        str,
        typer.Argument(
            metavar="TRACE_OR_WORKLOAD",
            help="Request trace in JSON Lines (fields timestamp, input_length, output_length, hash_ids), or "
            "a named workload: fixed, lognormal, bursts, long_prompt, published, conversation; "
            "NAME:PARAMETER=NUMBER,... changes its numbers (docs/simulation.md).",
        ),
    ],
    dp: Annotated[
        list[int] | None,
        typer.Option(min=1, max=1024, metavar="N", help="Data-parallel ranks. May be repeated. Default: 4."),
    ] = None,
    policy: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="When waiting requests are admitted (docs/balance.md), as any_rank_at_cap or "
            "cadence:interval=4. May be repeated; ratios are over the first. Default: open_gate and "
            "any_rank_at_cap.",
        ),
    ] = None,
    max_num_seqs: Annotated[int, typer.Option(min=1, help="Requests that run on a rank, at most.")] = 32,
    max_num_batched_tokens: Annotated[
        int, typer.Option(min=1, help="Tokens of a rank in one step, at most.")
    ] = 8192,
    routing: Annotated[
        str,
        typer.Option(
            help="Which rank a request goes to: round_robin, least_loaded, or skewed (half of all to rank 0)."
        ),
    ] = "round_robin",
    concurrency: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="N",
            help="Closed loop: so many requests under way, the next is sent when one ends. Default: open "
            "loop, each is sent when it arrives.",
        ),
    ] = None,
    requests: Annotated[
        int | None,
        typer.Option(
            min=1, metavar="N", help="The first so many. Default: all of a trace, 512 of a workload."
        ),
    ] = None,
    num_blocks: Annotated[
        int | None,
        typer.Option(
            min=2,
            help="KV cache blocks of a rank. Default: room for --max-num-seqs requests of the longest, up to "
            "524,288 tokens (or one such request, if it is longer).",
        ),
    ] = None,
    block_size: Annotated[int, typer.Option(min=1, help="Tokens of a block.")] = 128,
    no_prefix_caching: Annotated[
        bool, typer.Option("--no-prefix-caching", help="Compute every prompt from its first token.")
    ] = False,
    cost: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="What a step takes, as `ascend-twin fit` writes it. Default: illustrative numbers, of the "
            "order of a large mixture of experts (docs/simulation.md).",
        ),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of a named workload, and of skewed routing.")] = 0,
    seeds: Annotated[
        int,
        typer.Option(
            min=1, metavar="N", help="Repeat with N seeds; shown are means, ± the standard deviation."
        ),
    ] = 1,
    jobs: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Processes. Default: one a core.")
    ] = None,
    json: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Also write the result there (cli/simulate.py: the fields)."),
    ] = None,
    html: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Also write a report with plots there, one .html file."),
    ] = None,
    timeline: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Also write every step of every rank there (.json, opens in ui.perfetto.dev).",
        ),
    ] = None,
    timeline_steps: Annotated[
        int, typer.Option(min=1, metavar="N", help="--timeline: of each run, the first so many steps.")
    ] = 10_000,
) -> None:
    """What does an admission policy do to throughput and latency of data-parallel ranks?

    Ranks of a mixture of experts step together, and the slowest sets the pace: one that prefills holds up all
    that decode. Here the schedulers are those of this package, in lockstep, with no model behind them: how
    long a step takes is said by a cost model, from what the schedulers put into it.

    Shown are, for each policy, output throughput and its ratio over that of the first policy; steps, those in
    which any rank prefills, and those in which the gate was shut while somebody waited; the share of the run
    that each rank waits for a slower one; and TTFT, TPOT, ITL and time to the end.

    \b
    ascend-twin simulate fixed:prompt=3500,output=1500 --dp 8 --max-num-seqs 16 --concurrency 128
    ascend-twin simulate long_prompt --policy open_gate --policy cadence:interval=4 --html report.html
    ascend-twin simulate conversation.jsonl --dp 8 --routing least_loaded --json result.json
    ascend-twin simulate lognormal:rate=6 --dp 2 --dp 4 --seeds 5 --timeline timeline.json

    The same command gives the same numbers, to the last bit.

    Exit status: 0 simulated; 2 the input is wrong, said in one line; 130 it was interrupted.
    """
    from .simulate import Options, run_simulate

    source_of_steps = ctx.get_parameter_source("timeline_steps")
    if source_of_steps and source_of_steps.name == "COMMANDLINE" and not timeline:
        invalid_argument("--timeline-steps", timeline_steps, "only together with --timeline")
    run_simulate(
        Options(
            source=source,
            dp=tuple(dp or (4,)),
            policy=tuple(policy or ("open_gate", "any_rank_at_cap")),
            routing=routing,
            concurrency=concurrency,
            requests=requests,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            num_blocks=num_blocks,
            block_size=block_size,
            prefix_caching=not no_prefix_caching,
            cost=cost,
            seed=seed,
            seeds=seeds,
            jobs=jobs,
            json=json,
            html=html,
            timeline=timeline,
            timeline_steps=timeline_steps,
        )
    )


@app.command(short_help="Predict a published gain of balance scheduling from its baseline row alone.")
def published(
    dp: Annotated[
        list[int] | None,
        typer.Option(
            metavar="N", help="Data-parallel ranks, a divisor of 128. May be repeated. Default: 2, 4, 8, 16."
        ),
    ] = None,
    expert_share: Annotated[
        list[float] | None,
        typer.Option(
            min=0,
            max=1,
            metavar="PART",
            help="Part of a prompt token's cost that experts on all ranks do. May be repeated. Default: 0, "
            "0.25, 0.5.",
        ),
    ] = None,
    policy: Annotated[
        str, typer.Option(metavar="NAME", help="Of the predicted row (docs/balance.md).")
    ] = "any_rank_at_cap",
    routing: Annotated[
        str, typer.Option(help="Which rank a request goes to: round_robin, least_loaded or skewed.")
    ] = "round_robin",
    max_num_batched_tokens: Annotated[
        int, typer.Option(min=1, help="Tokens of a rank in one step, at most.")
    ] = 8192,
    seeds: Annotated[int, typer.Option(min=1, metavar="N", help="Of the output lengths.")] = 3,
    jobs: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Processes. Default: one a core.")
    ] = None,
    json: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Also write the result there (cli/published.py: the fields)."),
    ] = None,
) -> None:
    """Can a published gain of balance scheduling be told from its baseline row alone?

    vllm-ascend #5212 reports DeepSeek-V3.1 with and without balance scheduling. The cost of a step and the
    spread of output lengths are fitted to the row without, the row with it is then simulated, and compared
    with the published one. What was not published is tried: DP sizes, and how much of a prompt's cost is
    spread over all ranks. docs/published.md has the table and what it means.

    Some two and a half minutes a DP size on one core, with three seeds.

    \b
    ascend-twin published
    ascend-twin published --dp 4 --expert-share 0.3 --policy patient --json published.json

    Exit status: 0 predicted, however well; 2 the input is wrong, said in one line; 130 it was interrupted.
    """
    from .published import Options, run_published

    run_published(
        Options(
            dp=tuple(dp or (2, 4, 8, 16)),
            expert_share=tuple(expert_share or (0.0, 0.25, 0.5)),
            policy=policy,
            routing=routing,
            max_num_batched_tokens=max_num_batched_tokens,
            seeds=seeds,
            jobs=jobs or os.cpu_count() or 1,
            json=json,
        )
    )


@app.command("compile", short_help="Does every kernel fit on an Ascend NPU? Compiled without one.")
def compile_kernels(
    model: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="Compile for this model only. May be repeated. Known: Qwen3-Next-80B-A3B and the Qwen3.5 "
            "family (optimized/gdn/models.py).",
        ),
    ] = None,
    tp: Annotated[
        list[int] | None,
        typer.Option(metavar="N", help="Tensor-parallel size. May be repeated. Default: 1, 2, 4, 8."),
    ] = None,
    target: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NPU", help="910B1, 910B4, 910_9392 (A3) or 950. May be repeated. Default: all four."
        ),
    ] = None,
    implementation: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="Which optimized path; `doctor` lists them. May be repeated. Default: all in Triton.",
        ),
    ] = None,
    json: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Also write the result there (cli/compile.py: the fields)."),
    ] = None,
    plot: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Also draw the memory use there (.png, .svg or .pdf)."),
    ] = None,
    html: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Also write a report there, one .html file.")
    ] = None,
    junit: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Also write JUnit XML there, for CI systems (.xml; docs/ci.md)."),
    ] = None,
) -> None:
    """Does every kernel fit on chip, for the shapes that each rank of each model has?

    The launches of each implementation are recorded and compiled as Triton would on the NPU, up to where CANN
    would make the binary: parsing, lowering, memory planning, synchronisation. Shown is what each kernel was
    given of the on-chip memories, where it is worst: UB (unified buffer of a vector core), L1 and L0C (of a
    cube core); and the warnings of the compiler. No NPU and no CANN is needed, but triton-ascend and
    ascendnpu-ir, in an environment without any other Triton: pip install 'ascend-twin[ascend]'.

    \b
    ascend-twin compile
    ascend-twin compile --model Qwen3.5-27B --tp 4 --target 910B1
    ascend-twin compile --implementation fused --json memory.json --plot memory.png
    ascend-twin compile --html report.html --junit junit.xml

    Exit status: 0 everything fits; 1 something does not, and the compiler's message is printed; 2 the input
    is wrong or the compilers are not installed, said in one line; 130 it was interrupted.
    """
    from .compile import Options, run_compile

    options = Options(model or (), tp or (), target or (), implementation or (), json, plot, html, junit)
    raise typer.Exit(run_compile(options))


@app.command(short_help="The cost of a step for simulate, from what was measured or published.")
def fit(
    ctx: typer.Context,
    source: Annotated[
        str,
        typer.Argument(
            metavar="STEPS_OR_WORKLOAD",
            help="Measured steps in JSON Lines (docs/cost.md); with --row a trace or a named workload, as of "
            "`ascend-twin simulate`.",
        ),
    ],
    free: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PARAMETER",
            help="Fit this one; the others are 0, or those of --cost. May be repeated. Default: all; with "
            "--row step_ms and prefill_us_per_token.",
        ),
    ] = None,
    row: Annotated[
        str | None,
        typer.Option(
            metavar="NUMBERS",
            help="Fit to a benchmark row instead, ttft=MS,tpot=MS,throughput=TOKENS_A_SECOND: means of TTFT "
            "and TPOT, and output tokens. The options from here to --cost say how it came about.",
        ),
    ] = None,
    dp: Annotated[int, typer.Option(min=1, max=1024, help="Data-parallel ranks.")] = 4,
    policy: Annotated[
        str, typer.Option(help="When waiting requests were admitted (docs/balance.md).")
    ] = "open_gate",
    max_num_seqs: Annotated[int, typer.Option(min=1, help="Requests that ran on a rank, at most.")] = 32,
    max_num_batched_tokens: Annotated[
        int, typer.Option(min=1, help="Tokens of a rank in one step, at most.")
    ] = 8192,
    routing: Annotated[
        str, typer.Option(help="Which rank a request went to: round_robin, least_loaded or skewed.")
    ] = "round_robin",
    concurrency: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="N",
            help="Closed loop: so many requests under way. Default: open loop, by arrival times.",
        ),
    ] = None,
    requests: Annotated[
        int | None,
        typer.Option(
            min=1, metavar="N", help="The first so many. Default: all of a trace, 512 of a workload."
        ),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of a named workload, and of skewed routing.")] = 0,
    cost: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Parameters that are not fitted to the row. Default: 0."),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Write the parameters there, for `ascend-twin simulate --cost`."),
    ] = None,
    json: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Also write the result there (cli/fit.py: the fields)."),
    ] = None,
    plot: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Also draw predicted against measured steps there (.png, .svg or .pdf)."
        ),
    ] = None,
) -> None:
    """What does a step take? The parameters of the cost model, from steps that were measured.

    A line of the file is a step of all ranks: how long it took, and what each rank computed in it, as vLLM's
    scheduler says (docs/cost.md has the model and the lines that log it):

    \b
    {"step_ms": 71.2, "ranks": [{"prefill_tokens": 2048, "prefill_pairs": 2098176,
                                 "decode_requests": 30, "context_tokens": 61440}, ...]}

    Parameters that the steps cannot tell apart are refused, and named.

    With --row, where there is nothing but the published row of a benchmark: the workload is simulated, and
    the parameters are those with which the simulation has that row. Three numbers determine two parameters
    well, seldom three.

    \b
    ascend-twin fit steps.jsonl --output cost.json --plot steps.png
    ascend-twin fit steps.jsonl --free step_ms --free prefill_us_per_token --free decode_us_per_request
    ascend-twin fit fixed:prompt=3500,output=1500 --row ttft=6600,tpot=86.85,throughput=1297.3 \\
        --dp 4 --max-num-seqs 32 --concurrency 128 --output cost.json
    ascend-twin simulate conversation.jsonl --dp 4 --cost cost.json

    Exit status: 0 fitted, however well; 2 the input is wrong, said in one line; 130 it was interrupted.
    """
    from . import simulate as simulating
    from .fit import Options, run_fit

    _refuse_fit_options_without_effect(ctx, row, plot)
    workload = simulating.Options(
        source=source,
        dp=(dp,),
        policy=(policy,),
        routing=routing,
        concurrency=concurrency,
        requests=requests,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
        num_blocks=None,
        block_size=128,
        prefix_caching=True,
        cost=cost,
        seed=seed,
        seeds=1,
        jobs=1,
        json=None,
        html=None,
        timeline=None,
        timeline_steps=1,
    )
    run_fit(Options(source, tuple(free or ()), row, None if row is None else workload, output, json, plot))


def _refuse_fit_options_without_effect(ctx: typer.Context, row: str | None, plot: Path | None) -> None:
    if row is not None and plot:
        invalid_argument("--plot", plot, "not together with --row: there are no measured steps to draw")
    if row is None:
        for name, value in ctx.params.items():
            origin = ctx.get_parameter_source(name)
            is_of_row = name not in ("source", "free", "row", "output", "json", "plot")
            if is_of_row and origin and origin.name == "COMMANDLINE":
                invalid_argument(f"--{name.replace('_', '-')}", value, "only together with --row")


@app.command(short_help="Real bugs put back: does every one of them get caught?")
def mutants(
    name: Annotated[
        list[str] | None,
        typer.Argument(metavar="[NAME]...", help="Bugs, as --list names them. Default: all."),
    ] = None,
    list_only: Annotated[bool, typer.Option("--list", help="List the bugs, and run nothing.")] = False,
    area: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="Bugs of this area only: metadata, numerics, 'async copies', balance, scheduler or 'data "
            "parallel'. May be repeated.",
        ),
    ] = None,
    suite: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="Run this suite only, on the bugs that it is for, as 'metadata coverage'. May be repeated.",
        ),
    ] = None,
    jobs: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Processes. Default: one a core.")
    ] = None,
    timeout: Annotated[
        float, typer.Option(min=1, metavar="S", help="Seconds for all suites of a bug, at most.")
    ] = 120.0,
    json: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Also write the result there (cli/mutants.py: the fields)."),
    ] = None,
    html: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Also write a report there, one .html file.")
    ] = None,
    junit: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Also write the result there as JUnit XML, for CI systems."),
    ] = None,
) -> None:
    """Real bugs put back: does every one of them get caught?

    Bugs of vllm-ascend, vLLM, flash-linear-attention and others, each as a change of one place of this
    package's own source, made while the module is imported, in a process of its own: no file is changed.
    Suites are run on each: the tests and properties of this package, over a few small cases. A table says
    which of them found it, and at which case. All suites must pass the code as it is, which is checked too.

    \b
    ascend-twin mutants
    ascend-twin mutants --list --area numerics
    ascend-twin mutants compact_ranks state_stored_transposed
    ascend-twin mutants --area 'data parallel' --jobs 1 --json result.json
    ascend-twin mutants --suite 'metadata coverage' --html report.html --junit junit.xml

    Exit status: 0 all are caught; 1 something survived, or took longer than --timeout, or a suite does not
    pass the code as it is; 2 the input is wrong, said in one line; 130 it was interrupted.
    """
    from .mutants import Options, list_mutants, run_mutants

    options = Options(
        names=tuple(name or ()),
        area=tuple(area or ()),
        suite=tuple(suite or ()),
        jobs=jobs or os.cpu_count() or 1,
        timeout=timeout,
        json=json,
        html=html,
        junit=junit,
    )
    if list_only:
        list_mutants(options)
    else:
        raise typer.Exit(run_mutants(options))
