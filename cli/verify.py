"""`ascend-twin verify`: the optimized path against the reference, on batches of a workload.

The file written by `--json` holds one object:

    version     1, raised when a field changes its meaning
    passed      bool
    options     what was asked for, defaults filled in (seed included)
    source      {"workload": the trace or "generator", "prefill_steps": formed in all, "checked": of those,
                "corners": fixed batches}
    covered     {"batches", "sequences", "chunks", "tokens"}
    suites      [{"name", "batches", "failed", "ratio", "worst_row", "problem"}]; ratio and worst_row are null
                or {"error", "limit", "where"}, the one nearest to its limit (error null: not finite); problem
                is "" or the first difference that is no matter of size
    batches     [{"seq_lens", "corner": fixed or of the workload, "passed", "message": what differs, "usage":
                by suite the larger error over its limit (null: not finite), "seconds"}], in their order
    failure     null, or {"case": fields of the smallest failing PrefillCase found, "message", "code",
                "fixture": file that `replay` takes}; code and fixture are null where the case fails only
                after other batches, fixture also where it cannot be written
    versions    of what the result depends on
    seconds     float
"""

import dataclasses
import math
import random
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from textwrap import shorten
from typing import Any

import typer
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..equivalence_tests import interpreter
from ..equivalence_tests.cases import (
    DTYPES,
    Outcome,
    PrefillCase,
    check_prefill,
    minimize,
    recorded_case,
)
from ..equivalence_tests.compare import Comparison
from ..equivalence_tests.failures import save_fixture
from ..equivalence_tests.run_on_device import versions
from ..equivalence_tests.tolerances import Errors
from ..optimized.gdn import IMPLEMENTATIONS, ChunkMetadataBuilder, open_device
from ..optimized.gdn.ascend_native import LoweringError
from ..optimized.gdn.device import Device
from ..optimized.gdn.kernels.block_sizes import CHUNK_SIZE
from ..reference.errors import UnavailableError, invalid_argument
from ..reference.gdn.inputs import check_choice
from ..scheduler.prefill_steps import PrefillStep, prefill_steps
from ..scheduler.traces import generate_requests, read_trace
from .compiling import says_when_compiling
from .output_files import check_apart, check_folder
from .progress import progress
from .report import command_line
from .result_files import result_files, write_result
from .verify_report import verify_junit, verify_report

# Steps of the workload, and the seed; None is a fresh one.
PROFILES: dict[str, tuple[int, int | None]] = {"dev": (10, 0), "ci": (30, 0), "nightly": (300, None)}
STEPS_ON_LINALG = 7
"""So many times these steps on linalg, in the time that the interpreter takes for them."""

NUM_GENERATED_REQUESTS = 256
MINIMIZE_SECONDS = 60.0
LINALG = "linalg"

# Batches that no workload may happen to hold.
CORNERS: tuple[dict[str, Any], ...] = (
    {"seq_lens": ()},
    {"seq_lens": (1,)},
    {"seq_lens": (0, 0, 0)},
    {"seq_lens": (128, 0, 128)},
    {"seq_lens": (0, 0, 64), "padding": 64},
    {"seq_lens": (100, 1, 0, 65), "gates": "mixed", "betas": "mixed"},
    {"seq_lens": (63, 64, 65), "keys": "identical", "betas": "one"},
    {"seq_lens": (130, 64), "gates": "forget", "initial_state": False, "V": 32},
    {"seq_lens": (1100, 0, 1)},
    {"seq_lens": (65, 0, 127), "gates": "steep", "initial_state": (False, True, True)},
    {"seq_lens": (65, 2, 70), "H": 2, "HV": 4, "K": 16, "V": 16},
)
SMALL_DIMS = (16, 16)
"""K and V of the corners, so that they cost little."""
ODD_DIMS = ((48, 80), (80, 24))
"""K and V of the corners on linalg, beside those and what is asked for: other code, with masks, for each."""


@dataclass(frozen=True)
class Options:
    """What the user asked for.

    Attributes:
        trace: file of a request trace, or None for the generator.
        profile: a key of `PROFILES`.
        cases, seed: steps to check and the seed, or None for those of the profile.
        max_num_batched_tokens, max_num_seqs: tokens and sequences of a step, at most.
        implementation: a key of `IMPLEMENTATIONS`.
        device: a name that `open_device` knows.
        dtype: a key of `DTYPES`.
        H, HV, K, V: query/key heads, value heads, head dims.
        json, html, junit: files to write, or None.
        failures: folder for the smallest failing batch.
    """

    trace: Path | None
    profile: str
    cases: int | None
    seed: int | None
    max_num_batched_tokens: int
    max_num_seqs: int
    implementation: str
    device: str
    dtype: str
    H: int
    HV: int
    K: int
    V: int
    failures: Path
    json: Path | None
    html: Path | None
    junit: Path | None

    @property
    def is_interpreted(self) -> bool:
        """Whether its kernels run in Triton's interpreter."""
        return _is_interpreted(self.implementation, self.device)

    @property
    def is_native(self) -> bool:
        """Whether its kernels run as native code, made of what the Ascend compiler makes of them."""
        return self.device == LINALG


@dataclass(frozen=True)
class Worst:
    """The error nearest to its limit; `where` is its batch, and the worst row in that batch."""

    error: float
    limit: float
    where: str

    @property
    def usage(self) -> float:
        """The error as a part of its limit; 1 is the most allowed."""
        return self.error / self.limit


@dataclass
class Suite:
    """One row of the result.

    Attributes:
        batches, failed: checked, and those of them that differ.
        worst: by metric, a field of `Errors`.
        problem: the first difference that is no matter of size, or "".
    """

    name: str
    batches: int = 0
    failed: int = 0
    worst: dict[str, Worst] = field(default_factory=dict)
    problem: str = ""

    @property
    def nearest(self) -> Worst | None:
        """Whichever metric is nearest to its limit."""
        return max(self.worst.values(), key=lambda w: w.usage, default=None)

    def add(self, batch: int, comparisons: Sequence[Comparison] = (), problems: Sequence[str] = ()) -> None:
        """Enter a batch: what was compared in it, and differences that are no matter of size."""
        problems = [*problems, *(f"{c.name}: {c.problem}" for c in comparisons if c.problem)]
        self.batches += 1
        self.failed += bool(problems) or not all(c.passed for c in comparisons)
        if problems and not self.problem:
            self.problem = shorten(f"batch {batch}: {problems[0]}", 300)
        for c in comparisons:
            for metric in Errors._fields if not c.problem else ():
                new = Worst(getattr(c.errors, metric), getattr(c.limit, metric), f"batch {batch}, {c.place}")
                if metric not in self.worst or new.usage > self.worst[metric].usage:
                    self.worst[metric] = new


@dataclass(frozen=True)
class Batch:
    """What became of one batch.

    Attributes:
        message: what differs, or "".
        usage: by suite, the larger of its errors over its limit; infinite where they differ in kind.
        seconds: that checking it took.
    """

    case: PrefillCase
    message: str
    usage: dict[str, float]
    seconds: float


@dataclass(frozen=True)
class _Plan:
    """Everything that a run needs, checked; one builder, by HV, for all batches that have it."""

    options: Options
    device: Device
    cases: list[PrefillCase]
    num_corners: int
    num_steps: int
    builders: dict[int, ChunkMetadataBuilder]

    @property
    def workload(self) -> str:
        return str(self.options.trace or "generator")


def options_with_defaults(
    *,
    implementation: str | None,
    device: str,
    max_num_batched_tokens: int | None,
    H: int | None,
    HV: int | None,
    **others: Any,
) -> Options:
    """`Options` in which None has become the default of the implementation and the device.

    Raises:
        InvalidArgumentError: for an implementation that there is not.
    """
    if implementation is None:
        implementation = "eager" if device == "cpu" else "fused"
    check_choice("--implementation", implementation, tuple(IMPLEMENTATIONS))
    runs_kernels_on_cpu = device == LINALG or _is_interpreted(implementation, device)
    tokens, heads = (256, 1) if runs_kernels_on_cpu else (1024, 16)
    H = heads if H is None else H
    return Options(
        implementation=implementation,
        device=device,
        max_num_batched_tokens=tokens if max_num_batched_tokens is None else max_num_batched_tokens,
        H=H,
        HV=2 * H if HV is None else HV,
        **others,
    )


def _is_interpreted(implementation: str, device: str) -> bool:
    """Whether Triton kernels are asked for where only its interpreter runs them."""
    return device == "cpu" and IMPLEMENTATIONS[implementation].uses_triton


@says_when_compiling()
def run_verify(options: Options) -> int:
    """Verify; print the result on stdout and progress on stderr.

    Returns:
        The exit status: 0 when everything agrees, else 1.

    Raises:
        InvalidArgumentError, TraceError, UnavailableError: for wrong input, before anything is computed.
        LoweringError: for a kernel that there is no native code of.
        typer.Exit: with status 130 when it is interrupted; one line on stderr says how far it came.
    """
    start = time.perf_counter()
    plan = _prepare(options)
    typer.echo(_headline(plan))
    suites, batches = _check_all(plan)
    failures = [batch.case for batch in batches if batch.message]
    failure = _smallest_failure(plan, failures) if failures else None
    covered, seconds = _covered(plan.cases), time.perf_counter() - start
    Console(width=None if sys.stdout.isatty() else 140).print(_table(suites))
    counts = ", ".join(f"{count:,} {what}" for what, count in covered.items())
    typer.echo(f"{'DIFFER' if failure else 'Agree'}: {counts} in {seconds:.1f} s.")
    if failure:
        typer.echo(f"\n{failure['message']}")
        if failure["fixture"]:
            typer.echo(f"\nSaved; this says what went wrong first: {_replay(failure['fixture'], options)}")
        typer.echo(f"\nThis reproduces it:\n\n{failure['code']}" if failure["code"] else "")
    result = _as_json(plan, suites, batches, covered, failure, seconds)
    write_result(plan.options, result, verify_report, verify_junit)
    return 1 if failure else 0


def sample_steps(
    steps: Iterable[PrefillStep], count: int, rng: random.Random
) -> tuple[list[PrefillStep], int]:
    """Draw steps from all over a workload, half of them with chunks of several prompts.

    Most steps of a busy service hold one long chunk and decodes; batches in which prompts meet are rare
    and are where varlen code goes wrong, hence the two halves. Each half is uniform over its kind.

    Args:
        steps: in order of time; read once.
        count: how many to draw, >= 1; fewer if there are no more.
        rng: decides.

    Returns:
        The drawn steps in order of time, and how many there were in all.
    """
    kept: dict[bool, list[tuple[int, PrefillStep]]] = {False: [], True: []}
    seen = {False: 0, True: 0}
    for i, step in enumerate(steps):
        several = len(step.seq_lens) - step.num_decodes > 1
        seen[several] += 1
        if len(kept[several]) < count:
            kept[several].append((i, step))
        elif (place := rng.randrange(seen[several])) < count:
            kept[several][place] = (i, step)
    num_several = min(len(kept[True]), max(count // 2, count - len(kept[False])))
    num_single = min(len(kept[False]), count - num_several)
    drawn = rng.sample(kept[True], num_several) + rng.sample(kept[False], num_single)
    return [step for _, step in sorted(drawn, key=lambda pair: pair[0])], sum(seen.values())


def _prepare(options: Options) -> _Plan:
    """Check everything, read the workload and choose the batches."""
    check_choice("--profile", options.profile, tuple(PROFILES))
    check_choice("--dtype", options.dtype, tuple(DTYPES))
    implementation = IMPLEMENTATIONS[options.implementation]
    if options.is_native:
        with_kernels = tuple(name for name, i in IMPLEMENTATIONS.items() if i.uses_triton)
        check_choice(f"--implementation for device {LINALG}", options.implementation, with_kernels)
    of = f"for implementation {options.implementation}"
    allowed = tuple(name for name, dtype in DTYPES.items() if dtype in implementation.dtypes)
    check_choice(f"--dtype {of}", options.dtype, allowed)
    most = implementation.max_head_dim
    for name, size in (("--head-dim-k", options.K), ("--head-dim-v", options.V)):
        if most is not None and size > most:
            invalid_argument(f"{name} {of}", size, f"1 to {most}")
    if options.HV % options.H:
        invalid_argument("--num-value-heads", options.HV, f"a multiple of --num-heads = {options.H}")
    device = open_device(options.device)
    if options.is_interpreted:
        interpreter.enable()
    check_apart(result_files(options), {"--trace": options.trace})
    check_folder("--failures", options.failures)
    profile_cases, profile_seed = PROFILES[options.profile]
    if options.seed is None:
        fresh = random.SystemRandom().randrange(2**31)
        options = dataclasses.replace(options, seed=fresh if profile_seed is None else profile_seed)
    num_cases = options.cases or profile_cases * (STEPS_ON_LINALG if options.is_native else 1)
    options = dataclasses.replace(options, cases=num_cases)
    rng = random.Random(options.seed)

    if options.trace:
        requests = read_trace(options.trace)
    else:
        requests = generate_requests(rng.randrange(2**31), NUM_GENERATED_REQUESTS)
    steps, num_steps = sample_steps(
        prefill_steps(requests, options.max_num_batched_tokens, options.max_num_seqs), num_cases, rng
    )
    common = {"H": options.H, "HV": options.HV, "dtype": options.dtype, "use_qk_l2norm_in_kernel": True}
    dims = (SMALL_DIMS, *ODD_DIMS, (options.K, options.V)) if options.is_native else (SMALL_DIMS,)
    corners = [
        PrefillCase(seed=rng.randrange(2**31), **{**common, "K": K, "V": V, **corner})
        for K, V in dict.fromkeys(dims)
        for corner in CORNERS
    ]
    cases = corners + [
        PrefillCase(
            seq_lens=step.seq_lens,
            seed=rng.randrange(2**31),
            K=options.K,
            V=options.V,
            initial_state=step.has_initial_state,
            **common,
        )
        for step in steps
    ]
    builders = {
        HV: ChunkMetadataBuilder(device, *_capacity(*(c for c in cases if c.HV == HV)), HV)
        for HV in {case.HV for case in cases}
    }
    return _Plan(options, device, cases, len(corners), num_steps, builders)


def _headline(plan: _Plan) -> str:
    o = plan.options
    num_steps = len(plan.cases) - plan.num_corners
    where = f"{o.device} (interpreted)" if o.is_interpreted else o.device
    return (
        f"{o.implementation} on {where} against the reference, {o.dtype}, "
        f"H {o.H}, HV {o.HV}, K {o.K}, V {o.V}, seed {o.seed}\n"
        f"{num_steps} of {plan.num_steps:,} prefill steps of {plan.workload} "
        f"(at most {o.max_num_batched_tokens} tokens, {o.max_num_seqs} sequences), "
        f"after {plan.num_corners} corner batches"
    )


def _check_all(plan: _Plan) -> tuple[list[Suite], list[Batch]]:
    """Check every batch. Returns the suites, and what became of each batch."""
    metadata, reference, o, final_state = suites = [
        Suite(name) for name in ("metadata", "reference", "o", "final_state")
    ]
    batches: list[Batch] = []

    def so_far() -> str:
        differ = sum(bool(batch.message) for batch in batches)
        return f"; {differ} of them differ" if differ else "; nothing was wrong so far"

    with progress("batches", len(plan.cases), so_far) as advance:
        for batch, case in enumerate(plan.cases):
            start = time.perf_counter()
            outcome = _check(plan, case, plan.builders[case.HV])
            if isinstance(outcome, Outcome):
                metadata.add(batch, problems=outcome.metadata_differences)
                if not outcome.metadata_differences:  # else nothing was computed
                    reference.add(batch, outcome.reference)
                    for suite, comparison in zip((o, final_state), outcome.comparisons, strict=True):
                        suite.add(batch, [comparison])
            else:
                o.add(batch, problems=[_in_words(outcome)])
            message = "" if _passed(outcome) else _in_words(outcome)
            batches.append(Batch(case, message, _usages(outcome), time.perf_counter() - start))
            advance(1)
    return suites, batches


def _check(plan: _Plan, case: PrefillCase, builder: ChunkMetadataBuilder) -> Outcome | Exception:
    """Check a case. Input has been checked, so an implementation that raises has failed the case."""
    try:
        return check_prefill(
            case,
            implementation=plan.options.implementation,
            builder=builder,
            device=plan.device.torch_device,
            check_reference=True,
        )
    except (UnavailableError, LoweringError):
        raise
    except Exception as error:
        return error


def _passed(outcome: Outcome | Exception) -> bool:
    return isinstance(outcome, Outcome) and outcome.passed


def _in_words(outcome: Outcome | Exception) -> str:
    if isinstance(outcome, Outcome):
        return str(outcome)
    return f"raised {type(outcome).__name__}: {outcome}"


def _usages(outcome: Outcome | Exception) -> dict[str, float]:
    """The `usage` of a batch."""
    if not isinstance(outcome, Outcome) or outcome.metadata_differences:
        return {}
    compared = {"reference": outcome.reference, **{c.name: [c] for c in outcome.comparisons}}
    return {name: max(map(_usage, comparisons)) for name, comparisons in compared.items()}


def _usage(comparison: Comparison) -> float:
    if comparison.problem:
        return math.inf
    return max(error / limit for error, limit in zip(comparison.errors, comparison.limit, strict=True))


def _smallest_failure(plan: _Plan, failures: list[PrefillCase]) -> dict[str, Any]:
    """The smallest failing case that can be found in `MINIMIZE_SECONDS`: the `failure` of the JSON file."""
    deadline = time.perf_counter() + MINIMIZE_SECONDS

    def check_alone(case: PrefillCase) -> Outcome | Exception:
        return _check(plan, case, ChunkMetadataBuilder(plan.device, *_capacity(case), case.HV))

    def fails(case: PrefillCase) -> bool:
        return time.perf_counter() < deadline and not _passed(check_alone(case))

    case = min(failures, key=lambda c: c.bounds[-1])
    if not fails(case):
        message = (
            "A failing batch agrees when it is checked alone: it takes the batches before it. "
            f"Run again with --seed {plan.options.seed}."
        )
        return {"case": dataclasses.asdict(case), "message": message, "code": None, "fixture": None}
    typer.echo(f"looking for the smallest failing batch, at most {MINIMIZE_SECONDS:.0f} s", err=True)
    case = minimize(case, fails)
    outcome = check_alone(case)
    lines = [shorten(line, 300) for line in _in_words(outcome).splitlines()]
    code, file = _reproduction(case, plan.options), _save(plan.options, case, outcome)
    return {
        "case": dataclasses.asdict(case),
        "message": "\n".join(lines),
        "code": code,
        "fixture": str(file) if file else None,
    }


def _save(options: Options, case: PrefillCase, outcome: Outcome | Exception) -> Path | None:
    """The failing case as a fixture; None where it cannot be written: its code is printed all the same."""
    fixture = outcome.fixture if isinstance(outcome, Outcome) else recorded_case(case, options.implementation)
    device = options.device.replace(":", "_")
    name = f"gdn_{options.implementation}_{device}_{options.dtype}_seed_{options.seed}"
    try:
        return save_fixture(name, fixture, options.failures) if fixture else None
    except OSError as error:
        typer.echo(f"the failing batch cannot be saved in {options.failures}: {error.strerror}", err=True)
        return None


def _replay(file: str, options: Options) -> str:
    """The command that replays a file where it failed."""
    where = {"--device": options.device, "--implementation": options.implementation}
    is_default = options.device == "cpu" and options.implementation == "eager"
    return command_line("replay", {} if is_default else where, file)


def _capacity(*cases: PrefillCase) -> tuple[int, int]:
    """The most tokens and the most sequences of a batch, as a builder takes them."""
    return max(1, *(c.bounds[-1] for c in cases)), max(1, *(len(c.seq_lens) for c in cases))


def _reproduction(case: PrefillCase, options: Options) -> str:
    """A script that checks the case and ends with an AssertionError if it fails."""
    fields = "".join(
        f"    {f.name}={getattr(case, f.name)!r},\n"
        for f in dataclasses.fields(case)
        if f.default is dataclasses.MISSING or getattr(case, f.name) != f.default
    )
    num_tokens, num_seqs = _capacity(case)
    imported, enabled = "", ""
    if options.is_interpreted:
        imported, enabled = (
            "from ascend_twin.equivalence_tests import interpreter\n",
            "interpreter.enable()\n",
        )
    return f"""\
{imported}from ascend_twin.equivalence_tests.cases import PrefillCase, check_prefill
from ascend_twin.optimized.gdn import ChunkMetadataBuilder, open_device

{enabled}case = PrefillCase(
{fields})
device = open_device({options.device!r})
builder = ChunkMetadataBuilder(
    device, max_num_batched_tokens={num_tokens}, max_num_seqs={num_seqs}, num_value_heads=case.HV
)
outcome = check_prefill(
    case,
    implementation={options.implementation!r},
    builder=builder,
    device=device.torch_device,
    check_reference=True,
)
assert outcome.passed, outcome
"""


def _covered(cases: list[PrefillCase]) -> dict[str, int]:
    lens = [n for case in cases for n in case.seq_lens]
    return {
        "batches": len(cases),
        "sequences": len(lens),
        "chunks": sum(-(-n // CHUNK_SIZE) for n in lens),
        "tokens": sum(lens),
    }


def _table(suites: list[Suite]) -> Table:
    table = Table(box=box.SIMPLE)
    for heading in ("suite", "batches", "ratio / limit", "worst row / limit", "of limit", "where", "result"):
        table.add_column(heading, justify="right" if heading in ("batches", "of limit") else "left")
    for s in suites:
        nearest = s.nearest
        errors = [f"{w.error:.1e} / {w.limit:.1e}" for w in (s.worst[m] for m in Errors._fields if s.worst)]
        cells = (
            s.name,
            str(s.batches),
            *(errors or ("exact" if s.name == "metadata" else "", "")),
            _percent(nearest.usage) if nearest else "",
            s.problem or (nearest.where if nearest else ""),
        )
        result = Text(f"{s.failed} DIFFER", "bold red") if s.failed else Text("agree", "green")
        table.add_row(*(Text(cell) for cell in cells), result)
    return table


def _percent(part: float) -> str:
    return f"{part:.1%}" if part < 10 else "> 1000%"


def _as_json(
    plan: _Plan,
    suites: list[Suite],
    batches: list[Batch],
    covered: dict[str, int],
    failure: dict[str, Any] | None,
    seconds: float,
) -> dict[str, Any]:
    options = {k: str(v) if isinstance(v, Path) else v for k, v in dataclasses.asdict(plan.options).items()}
    return {
        "version": 1,
        "passed": failure is None,
        "options": options,
        "source": {
            "workload": plan.workload,
            "prefill_steps": plan.num_steps,
            "checked": len(plan.cases) - plan.num_corners,
            "corners": plan.num_corners,
        },
        "covered": covered,
        "suites": [
            {
                "name": s.name,
                "batches": s.batches,
                "failed": s.failed,
                **{metric: _worst_as_json(s.worst.get(metric)) for metric in Errors._fields},
                "problem": s.problem,
            }
            for s in suites
        ],
        "batches": [
            {
                "seq_lens": list(batch.case.seq_lens),
                "corner": i < plan.num_corners,
                "passed": not batch.message,
                "message": batch.message,
                "usage": {name: x if math.isfinite(x) else None for name, x in batch.usage.items()},
                "seconds": batch.seconds,
            }
            for i, batch in enumerate(batches)
        ],
        "failure": failure,
        "versions": versions(),
        "seconds": seconds,
    }


def _worst_as_json(worst: Worst | None) -> dict[str, Any] | None:
    if worst is None:
        return None
    return {**dataclasses.asdict(worst), "error": worst.error if math.isfinite(worst.error) else None}
