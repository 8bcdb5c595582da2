"""The command `ascend-twin`: what the user types. The work of a command is imported when it runs."""

import os
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from ..reference.errors import AscendTwinError

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
    ascend-twin verify    do the two agree? No file and no accelerator needed
    ascend-twin bench     how fast is ours, against the implementations of others
    ascend-twin compile   does every kernel fit on an Ascend NPU? No NPU needed
    """


@app.command(short_help="Do the optimized path and the reference agree?")
def verify(
    trace: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Request trace in JSON Lines (fields timestamp, input_length, output_length, hash_ids). "
            "Default: a seeded generator with the lengths of a conversation service.",
        ),
    ] = None,
    profile: Annotated[
        str,
        typer.Option(
            envvar="HYPOTHESIS_PROFILE",
            help="How much: dev (10 steps of the workload, seed 0), ci (30, seed 0), "
            "nightly (300, a fresh seed, which is printed).",
        ),
    ] = "dev",
    cases: Annotated[
        int | None, typer.Option(min=1, help="Steps of the workload to check. Default: by --profile.")
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option(min=0, help="Of the choice of steps and of all values. Default: by --profile."),
    ] = None,
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
    """Do the optimized path and the reference agree on prefill batches of a real workload?

    The batches are steps that a chunked-prefill scheduler forms from the arrivals and lengths of the
    workload, and a few fixed corner batches. Each is computed by the definition (token by token, in float64)
    and must be met by the prebuilt metadata (exactly), by the chunked reference and by the implementation
    (within the limits of equivalence_tests/tolerances.py). The default shape is that of Qwen3-Next.

    staged and fused are Triton kernels. On cpu they run in Triton's interpreter, some thousand times slower
    than on a device; there the default shape has fewer heads and tokens.

    \b
    ascend-twin verify
    ascend-twin verify --trace conversation.jsonl --cases 100 --json result.json
    ascend-twin verify --implementation fused                 # interpreted, where there is no device
    ascend-twin verify --device npu --max-num-batched-tokens 8192 --max-num-seqs 64
    ascend-twin verify --num-heads 4 --num-value-heads 8      # a rank of Qwen3-Next at TP 4

    Exit status: 0 they agree; 1 they differ, and the smallest failing batch is printed as code that
    reproduces it; 2 the input is wrong or the device is not there, said in one line.
    """
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

    On cpu: the metadata builder, the chunked reference and the eager path, against vllm-ascend 0.18.0's
    metadata builder, transformers' Qwen3-Next and our own plain loops (`tox run -e bench-peers` installs
    them). The Triton paths are not timed there: they are interpreted.

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
