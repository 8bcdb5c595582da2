"""The command `ascend-twin`: what the user types. The work of a command is imported when it runs."""

import os
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from ..reference.errors import AscendTwinError, invalid_argument

_WORKLOAD, _OP, _OUTPUT = "Workload", "Op", "Output"


class _Commands(TyperGroup):
    """Commands that turn an error of the package into one line on stderr and exit status 2."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except AscendTwinError as error:
            typer.echo(f"error: {' '.join(str(error).split())}", err=True)
            raise typer.Exit(2) from error


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
    ascend-twin bench     how fast is ours, against the implementations of others
    ascend-twin compile   does every kernel fit on an Ascend NPU? No NPU needed
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
            help="How much: dev, ci or nightly. For gdn 10, 30 or 300 steps of the workload, for scheduler "
            "5,000, 20,000 or 1,000,000 (against vLLM 2,500, 10,000 or 100,000). Seed 0; nightly takes a "
            "fresh one, which is printed.",
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
        Path, typer.Option(metavar="FOLDER", help="scheduler: where scenarios that fail are saved.")
    ] = Path("scheduler_failures"),
    max_num_batched_tokens: Annotated[
        int | None,
        typer.Option(max=2**20, help="Tokens of a step, at most. Default: 1024; 256 interpreted."),
    ] = None,
    max_num_seqs: Annotated[int, typer.Option(help="Sequences of a step, at most.")] = 16,
    implementation: Annotated[
        str | None,
        typer.Option(help="eager, staged or fused; `doctor` lists them. Default: eager on cpu, else fused."),
    ] = None,
    device: Annotated[
        str, typer.Option(help="Where it runs: cpu, cuda, npu, or cuda:INDEX, npu:INDEX.")
    ] = "cpu",
    dtype: Annotated[
        str, typer.Option(help="Of q, k, v and beta: bfloat16, float16, float32, float64.")
    ] = "bfloat16",
    num_heads: Annotated[
        int | None,
        typer.Option(min=1, max=1024, help="Query/key heads H. Default: 16; 1 interpreted."),
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
) -> None:
    """Do the plain and the optimized twin agree?

    --suite gdn, the default: do the optimized path and the reference agree on prefill batches of a real
    workload? The batches are steps that a chunked-prefill scheduler forms from the arrivals and lengths of
    the workload, and a few fixed corner batches. Each is computed by the definition (token by token, in
    float64) and must be met by the prebuilt metadata (exactly), by the chunked reference and by the
    implementation (within the limits of equivalence_tests/tolerances.py). The default shape is that of
    Qwen3-Next.

    staged and fused are Triton kernels. On cpu they run in Triton's interpreter, some thousand times slower
    than on a device; there the default shape has fewer heads and tokens.

    --suite scheduler: does the plain statement of vLLM 0.17.0's scheduler hold its invariants, and does every
    request say what it must, over random runs in which everything happens: preemption, prefix hits, drafts,
    images, adapters, sessions, grammars, remote KV, aborts, pauses, resets? With --against vllm: is each of
    its outputs, and its whole state after every step, that of the real one?

    \b
    ascend-twin verify
    ascend-twin verify --suite scheduler
    ascend-twin verify --suite scheduler --against vllm --trace conversation.jsonl
    ascend-twin verify --trace conversation.jsonl --cases 100 --json result.json
    ascend-twin verify --implementation fused                 # interpreted, where there is no device
    ascend-twin verify --device npu --max-num-batched-tokens 8192 --max-num-seqs 64
    ascend-twin verify --num-heads 4 --num-value-heads 8      # a rank of Qwen3-Next at TP 4

    Exit status: 0 they agree; 1 they differ, and the smallest failing batch is printed as code that
    reproduces it (a scheduler's is saved); 2 the input is wrong or the device is not there, said in one
    line; 130 it was interrupted.
    """
    _refuse_options_without_effect(ctx, suite)
    if suite == "scheduler":
        from .verify_scheduler import Options, run_verify_scheduler

        raise typer.Exit(
            run_verify_scheduler(
                Options(against, trace, requests, scenario, profile, cases, seed, failures, json)
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
        json=json,
    )
    raise typer.Exit(run_verify(options))


def _refuse_options_without_effect(ctx: typer.Context, suite: str) -> None:
    """An option that would have no effect is an error, where it is given on the command line."""
    both = {"suite", "trace", "profile", "cases", "seed", "json"}
    scheduler = {"against", "requests", "scenario", "failures"}
    suites = {"gdn": set(ctx.params) - scheduler, "scheduler": both | scheduler}
    if suite not in suites:
        invalid_argument("--suite", suite, f"one of {', '.join(suites)}")
    sources = {name: ctx.get_parameter_source(name) for name in ctx.params}
    given = [name for name, source in sources.items() if source and source.name == "COMMANDLINE"]
    for name in given:
        if name not in suites[suite]:
            invalid_argument("--suite", suite, f"another one with --{name.replace('_', '-')}")
    if suite == "scheduler":
        of_random_runs = {"profile", "cases", "seed", "failures"}
        for run, others in (("trace", of_random_runs | {"scenario"}), ("scenario", of_random_runs)):
            for name in given:
                if run in given and name in others:
                    invalid_argument(f"--{name}", ctx.params[name], f"not together with --{run}")
        if "requests" in given and "trace" not in given:
            invalid_argument("--requests", ctx.params["requests"], "only together with --trace")


@app.command(short_help="What can run on this machine, what cannot, and why.")
def doctor(
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """What can run on this machine, and what cannot, and why: versions, devices, implementations.

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
        str, typer.Option(help="What is measured: cpu, cuda, npu, or cuda:INDEX, npu:INDEX.")
    ] = "cpu",
    rounds: Annotated[int, typer.Option(min=1, help="Turns of each contender.")] = 9,
    threads: Annotated[
        int | None, typer.Option(min=1, help="Threads of PyTorch. Default: one a core.")
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

    On cuda: fused and staged against fla-core 0.6.0 (`tox run -e bench-cuda` installs it), on 8192 and 32768
    tokens in 1 to 64 sequences of Qwen3-Next's heads in bfloat16; on npu: fused against staged. On both:
    metadata prebuilt against built on the spot, and the host's share of the time.

    Everywhere: bytes a token that kernels load and store, for upstream, staged and fused, from the shapes.

    \b
    ascend-twin bench
    ascend-twin bench --only metadata --rounds 21 --plot metadata.png
    ascend-twin bench --device cuda --only fused --only prebuilt --json result.json
    tox run -e bench-peers -- --json result.json

    Exit status: 0 measured (whatever the figures); 2 the input is wrong, the device is not there, or
    contenders do not compute the same, said in one line.
    """
    from .bench import run_bench

    run_bench(only or [], rounds, threads, json, plot, require_peers, device)


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

    Exit status: 0 everything fits; 1 something does not, and the compiler's message is printed; 2 the input
    is wrong or the compilers are not installed, said in one line.
    """
    from .compile import Options, run_compile

    options = Options(model or (), tp or (), target or (), implementation or (), json, plot)
    raise typer.Exit(run_compile(options))
