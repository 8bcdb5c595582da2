"""Replaying a call of the op, or a build of its metadata, stage by stage beside the reference."""

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from unittest import mock

import torch

from ..fixtures.store import Fixture
from ..optimized.gdn import IMPLEMENTATIONS, ChunkMetadata, ChunkMetadataBuilder
from ..optimized.gdn import chunk_gated_delta_rule as optimized_chunk_gated_delta_rule
from ..optimized.gdn.chunked import default_implementation
from ..optimized.gdn.device import Device, LinalgDevice
from ..optimized.gdn.kernels.block_sizes import CHUNK_SIZE, SOLVE_TRIL_BLOCK_SIZE, cumsum_block_size
from ..reference.errors import AscendTwinError, UnavailableError, invalid_argument
from ..reference.gdn import chunk_gated_delta_rule
from ..reference.gdn.inputs import check_choice, check_cu_seqlens, check_tensor
from ..reference.gdn.metadata import chunk_indices
from . import interpreter
from .cases import Inputs, expected_metadata, metadata_differences, run_case
from .compare import Comparison, compare_o, compare_state
from .devices import SimulatedDevice, interprets, open_test_device
from .explanations import Doctor, Explanation
from .kernel_stages import FACTORS, STAGES, StageCase, compare_result, poisoned_memory
from .recorded_call import RecordedCall, by_prefix, tells_nothing
from .replay import RECORDED, Finding, Heat, Replay, is_recorded
from .tolerances import REFERENCE_FACTOR, Errors, smallest_scale

REFERENCE = "reference"

ORDER = ("inputs", "metadata", *STAGES, "o", "final_state")
"""Stages of a finding, in order."""

_TABLES = {"chunk_indices_chunk64": 0, "chunk_indices_large_block": 1, "block_indices_cumsum": 2}
"""Tables of (sequence, block) pairs, and which of the block sizes they are for."""

_STATES = ("h", "final_state")
_MOST_LISTED = 8
_MOST_COUNTED = 2**16  # value heads, decodes
_MOST_TOKENS = 2**24  # of a build: more than any batch has, and tables that are still small
_TABLE_DTYPES, _MASK_DTYPES = (torch.int32, torch.int64), (torch.bool,)

STAGES_OF = {
    "staged": (
        "l2norm",
        "chunk_local_cumsum",
        "chunk_scaled_dot_kkt",
        "solve_tril",
        "recompute_w_u",
        "chunk_delta_h",
        "chunk_fwd_o",
    ),
    "fused": ("fused_intra_chunk", "fused_solve_tril", "fused_inter_chunk"),
}
"""The kernels of each implementation that has some, in the order in which they run."""

_RESULTS = (
    *(("l2norm", name) for name in ("q", "k")),
    *(("chunk_local_cumsum", name) for name in ("coarse", "rest", "g_cumsum")),
    ("chunk_scaled_dot_kkt", "A"),
    ("solve_tril", "Ai"),
    *(("recompute_w_u", name) for name in ("w", "u")),
    *(("chunk_delta_h", name) for name in ("h", "v_new", "final_state")),
    ("chunk_fwd_o", "o"),
    *(("fused_intra_chunk", name) for name in ("A", "Aqk", *FACTORS)),
    *(("fused_solve_tril", name) for name in ("Ai", "sum_of_parts")),
    *(("fused_inter_chunk", name) for name in ("o", "final_state")),
)
"""What a fixture may hold of stages, in order: a stage, and a result of it."""

_SEEN = (
    ("chunk_delta_h", "final_state"),
    ("chunk_fwd_o", "o"),
    ("fused_inter_chunk", "o"),
    ("fused_inter_chunk", "final_state"),
)
"""Those that are results of the whole op."""


class KernelError(AscendTwinError):
    """A kernel that did not come to its end; the message is that of what it did.

    Attributes:
        stage: a key of `STAGES`.
    """

    def __init__(self, stage: str, error: Exception) -> None:
        super().__init__(str(error))
        self.stage = stage


def replay_gdn(
    fixture: Fixture, *, path: str = "", device: str = "cpu", implementation: str | None = None
) -> Replay:
    """Compare a recorded call or build with the definition, or run it again and compare that.

    Args, Returns, Raises: as `replay.replay_fixture`.
    """
    if implementation is not None:
        check_choice("implementation", implementation, (REFERENCE, *IMPLEMENTATIONS))
    if fixture.kind == "metadata":
        return _replay_metadata(fixture, path, device, again=implementation is not None)
    call = RecordedCall.of(fixture)
    if implementation is None and is_recorded(fixture):
        return judge(call, path=path)
    where = open_test_device(device)
    name = implementation or default_implementation_on(where)
    return judge_again(call, where, name, path=path, subject=f"{name} on {device}")


def default_implementation_on(device: Device) -> str:
    """What is run again on a device if nothing else is asked for: kernels on linalg, as on an NPU."""
    return "fused" if isinstance(device, LinalgDevice) else default_implementation(device.torch_device)


def judge_again(
    call: RecordedCall, device: Device, implementation: str, *, path: str = "", subject: str = ""
) -> Replay:
    """Run an implementation on the inputs of a call, and compare what it gives with the definition.

    Args:
        call: whose inputs and options are taken.
        device: where it runs.
        implementation: "reference" or a name in `optimized.gdn.IMPLEMENTATIONS`.
        path: of the file of the call.
        subject: what ran, for people.
    """
    problems = _inputs(call.packed)
    if problems:
        return _as_replay(path, subject, call, problems)
    try:
        observed, differences = run_again(call, device, implementation)
    except KernelError as error:
        return _as_replay(path, subject, call, [Finding(error.stage, "memory", False, str(error))])
    if differences:
        found = [Finding("metadata", "prebuilt", False, difference) for difference in differences]
        return _as_replay(path, subject, call, found)
    wide = _rounds_nothing(implementation)
    redzones = isinstance(device, LinalgDevice)
    return judge(observed, path=path, subject=subject, states_are_wide=wide, redzones=redzones)


def judge(
    call: RecordedCall,
    *,
    path: str = "",
    subject: str = RECORDED,
    states_are_wide: bool | None = None,
    mistakes: Sequence[str] | None = None,
    redzones: bool = False,
) -> Replay:
    """Compare what was seen of a call with the definition, and say what it looks like.

    Args:
        call: with all that was seen of it.
        path: of its file.
        subject: what ran.
        states_are_wide: whether states are nowhere rounded to the dtype of the call, and so held to the
            limits of float32. Default: as the implementation does that the file names, if it is one of ours.
        mistakes: the only ones, by name, that are tried as an explanation. Default: all.
        redzones: whether it ran as `native_launches` does, with a NaN around tensors that nobody computes.
    """
    behind = _padding(call)
    call = call.packed
    findings = _inputs(call)
    if findings:
        return _as_replay(path, subject, call, findings)
    findings = [*_recorded_metadata(call), *_stages(call, redzones), *behind]
    if states_are_wide is None:
        states_are_wide = _rounds_nothing(call.fixture.config.get("implementation"))
    limits = _limits(call, states_are_wide)
    hopeless = _hopeless(call, limits)
    if hopeless:
        return _as_replay(path, subject, call, hopeless)
    comparisons = _whole(call, limits)
    findings += [
        _finding(name, name, comparison, call.seen[name], call.truth[name == "final_state"], call)
        for name, comparison in comparisons.items()
    ]
    if _looks_narrowed(call):
        state = findings[-1]  # final_state is the last of what was seen
        note = "all values are exactly representable in bfloat16: was the state narrowed?"
        findings[-1] = replace(state, message=f"{state.message}; {note}")
    explanation, doctor = None, None
    failed = [name for name, comparison in comparisons.items() if not comparison.passed]
    if failed:
        first = next(finding for finding in findings if not finding.passed)
        if first.name != "memory":
            doctor = Doctor(call, limits, failed)
            explanation = doctor.explain(mistakes)
        seen_inside = first.stage not in ("o", "final_state")
        if seen_inside and explanation is not None and first.stage != explanation.mistake.stage:
            explanation = None  # what was seen of the stages says it better
        if explanation is not None:
            findings = _with_explanation(findings, explanation, call)
    return _as_replay(path, subject, call, findings, explanation, doctor, _heat(call, comparisons, limits))


def run_again(call: RecordedCall, device: Device, implementation: str) -> tuple[RecordedCall, list[str]]:
    """Run an implementation on the inputs of a call.

    Args:
        call: whose inputs and options are taken.
        device: where it runs.
        implementation: `REFERENCE` or a name in `IMPLEMENTATIONS`.

    Returns:
        The call with the results, and what each kernel gave, as seen; and where the prebuilt metadata are not
        those of the definition: nothing was then computed.

    Raises:
        UnavailableError: where it cannot run, or would be what it is on another device.
        KernelError: where a kernel touches memory outside its tensors, interpreted or on linalg.
    """
    if isinstance(device, LinalgDevice) and implementation not in STAGES_OF:
        raise UnavailableError(
            f"{implementation} has no kernels that the Ascend compiler could lower for device linalg; "
            f"{' and '.join(STAGES_OF)} have"
        )
    if implementation == REFERENCE:
        o, final_state = run_case(chunk_gated_delta_rule, call.case, call.inputs, **call.options)
        return call.with_seen(o, final_state), []
    num_tokens, num_seqs = call.bounds[-1], len(call.seq_lens)
    if IMPLEMENTATIONS[implementation].uses_triton:
        if isinstance(device, SimulatedDevice):
            raise UnavailableError(
                f"implementation {implementation} is made of Triton kernels, which the simulated device does "
                "not run; eager is not"
            )
        if interprets(device):
            interpreter.enable()
    builder = ChunkMetadataBuilder(device, max(1, num_tokens), max(1, num_seqs), call.case.HV)
    if isinstance(device, SimulatedDevice):
        inputs = call.inputs._make(None if x is None else device.to_device(x) for x in call.inputs)
        with device.forbid_host_sync():
            metadata = builder.build(call.inputs.cu_seqlens)
            results = _run_op(call, inputs, metadata, implementation)
        device.synchronize()
        differences = metadata_differences(metadata, call.bounds, builder.block_sizes)
        return call.with_seen(*(x.cpu() for x in results)), differences
    metadata = builder.build(call.inputs.cu_seqlens)
    differences = metadata_differences(metadata, call.bounds, builder.block_sizes)
    if differences:
        return call, differences
    with _watched_launches(implementation) as launched, poisoned_memory():
        results = _run_op(call, call.inputs.to(device.torch_device), metadata, implementation)
    seen = call.with_seen(*(x.cpu() for x in results))
    return replace(seen, stages={name: x.cpu() for name, x in launched.items()}), []


def _run_op(
    call: RecordedCall, inputs: Inputs, metadata: ChunkMetadata, implementation: str
) -> tuple[torch.Tensor, torch.Tensor]:
    return run_case(
        optimized_chunk_gated_delta_rule,
        call.case,
        inputs,
        prebuilt_meta=metadata,
        implementation=implementation,
        **call.options,
    )


@contextmanager
def _watched_launches(implementation: str) -> Iterator[dict[str, torch.Tensor]]:
    """What each kernel of an implementation gives, as "<stage>.<result>", while it runs."""
    launched: dict[str, torch.Tensor] = {}
    if not IMPLEMENTATIONS[implementation].uses_triton:
        yield launched
        return
    from ..optimized.gdn import triton_paths
    from ..optimized.gdn.native_launches import StrayAccessError

    def watched(stage: str, launcher: Any) -> Any:
        def launch(*args: Any, **kwargs: Any) -> Any:
            try:
                returned = launcher(*args, **kwargs)
            except (StrayAccessError, interpreter.AddressError) as error:
                raise KernelError(stage, error) from error
            if stage == "l2norm":
                launched[f"l2norm.{'k' if 'l2norm.q' in launched else 'q'}"] = returned
            else:
                results = STAGES[stage].results(returned)
                launched.update({f"{stage}.{name}": x for name, x in results.items()})
            return returned

        return launch

    kernels = {stage: STAGES[stage].kernel for stage in STAGES_OF[implementation]}
    patches = {kernel: watched(stage, getattr(triton_paths, kernel)) for stage, kernel in kernels.items()}
    with mock.patch.multiple(triton_paths, **patches):
        yield launched


# What was seen, against what is right


def _inputs(call: RecordedCall) -> list[Finding]:
    """Inputs that the op is not made for: its output then says nothing of it."""
    found = []
    for name, x in call.inputs._asdict().items():
        if x is None or name == "cu_seqlens":
            continue
        x = x if name == "initial_state" else x[0]
        wrong = x.isnan() if name == "g" else ~x.isfinite()  # g may be -inf
        what = "a finite number"
        if name in ("g", "beta") and not wrong.any():
            wrong = x > 0 if name == "g" else (x < 0) | (x > 1)
            what = "<= 0, the logarithm of a decay" if name == "g" else "within [0, 1]"
        if wrong.any():
            first = wrong.nonzero()[0].tolist()
            if name == "initial_state":
                place = {"sequence": first[0], "head": first[1]}
            else:
                place = call.place(*call.sequence_of(first[0]), first[1])
            message = (
                f"{name} is {x[tuple(first)].item():.4g} at {in_words(place)}; {int(wrong.sum())} of "
                f"{wrong.numel()} values are not allowed; allowed: {what}"
            )
            found.append(Finding("inputs", name, False, message, place))
    return found or _overflows(call)


def _overflows(call: RecordedCall) -> list[Finding]:
    """Rows of q and k that the op cannot take the length of."""
    found = []
    for name in ("q", "k"):
        wrong = call.overflows(name)
        if wrong.any():
            row, head = wrong.nonzero()[0].tolist()
            place = call.place(*call.sequence_of(row), head)
            x = getattr(call.inputs, name)[0, row, head]
            dtype = "float64" if x.dtype == torch.float64 else "float32"
            message = (
                f"{name} is {x[x.abs().argmax()].item():.4g} at {in_words(place)}: its square overflows "
                f"{dtype}; {int(wrong.sum())} of {wrong.numel()} rows are not allowed"
            )
            found.append(Finding("inputs", name, False, message, place))
    return found


def _hopeless(call: RecordedCall, limits: tuple[Errors, Errors]) -> list[Finding]:
    """Results that cannot be judged: of these inputs the reference itself makes something else."""
    found = []
    for name, allowed in zip(("o", "final_state"), limits, strict=True):
        if name in call.seen and tells_nothing(allowed):
            message = (
                f"{name} cannot be judged: from these inputs the reference itself, run in {call.case.dtype}, "
                f"is off by a ratio of {allowed.ratio / REFERENCE_FACTOR:.1e}"
            )
            found.append(Finding("inputs", name, False, message))
    return found


def _rounds_nothing(implementation: str | None) -> bool:
    """Whether it is one of ours, and computes with operands as they come."""
    if implementation in IMPLEMENTATIONS:
        return not IMPLEMENTATIONS[implementation].rounds_operands
    return implementation == REFERENCE


def _looks_narrowed(call: RecordedCall) -> bool:
    """Whether final states, which started from float32, hold nothing that bfloat16 does not."""
    initial, state = call.fixture.tensors.get("initial_state"), call.seen.get("final_state")
    if initial is None or state is None or {initial.dtype, state.dtype} != {torch.float32}:
        return False
    return int(state.count_nonzero()) > 1 and torch.equal(state, state.bfloat16().float())


def _padding(call: RecordedCall) -> list[Finding]:
    """Rows of o that belong to no sequence, where there are any."""
    end = call.bounds[-1]
    if "o" not in call.seen or end == call.seen["o"].shape[1]:
        return []
    rows = call.seen["o"][0, end:]
    if not rows.count_nonzero():
        return [Finding("o", "padding", True, "padding: rows behind the last sequence are 0")]
    token, head, column = rows.nonzero()[0].tolist()
    message = (
        f"padding: expected 0, got {rows[token, head, column].item():.4g} in row {end + token}, head {head}, "
        "which belongs to no sequence"
    )
    return [Finding("o", "padding", False, message, {"row": end + token, "head": head})]


def _recorded_metadata(call: RecordedCall) -> list[Finding]:
    return compare_metadata(call.metadata, call.bounds, call_block_sizes(call))


def call_block_sizes(call: RecordedCall) -> tuple[int, int, int]:
    """The block sizes of the metadata of a call, as the kernels take them."""
    return (CHUNK_SIZE, SOLVE_TRIL_BLOCK_SIZE, cumsum_block_size(call.case.HV))


def compact_metadata(bounds: list[int], block_sizes: tuple[int, int, int]) -> dict[str, torch.Tensor]:
    """The tables in which ranks among the sequences that have tokens stand for the sequences, by field."""
    kept = sorted({0, *bounds})
    return {name: chunk_indices(kept, block_sizes[i]) for name, i in _TABLES.items()}


def compare_metadata(
    found: Mapping[str, torch.Tensor], bounds: list[int], block_sizes: tuple[int, int, int]
) -> list[Finding]:
    """Compare tables of chunk metadata with the definition, in value and shape.

    Args:
        found: by field of `ChunkMetadata`, some of them.
        bounds: N + 1 ints, bounds (tokens) of the sequences.
        block_sizes: as in `ChunkMetadata`.

    Raises:
        InvalidArgumentError: for a field that there is not.
    """
    expected = expected_metadata(bounds, block_sizes)
    expected["chunk_offsets_int64"] = expected["chunk_offsets_chunk64"]
    for name in found:
        if name not in expected:
            allowed = f"metadata.* with one of {', '.join(expected)}"
            invalid_argument("tensor", f"metadata.{name}", allowed)
    findings = []
    for name, wanted in expected.items():
        if name not in found:
            continue
        if wanted is None:  # allowed to be absent: then it says nothing else than that
            wanted = torch.ones(len(bounds) - 1) if name == "keep_meta" else torch.tensor(bounds)
        dtypes = _MASK_DTYPES if name == "keep_meta" else _TABLE_DTYPES
        if found[name].dtype not in dtypes:
            message = f"{name} has dtype {found[name].dtype}, expected {' or '.join(map(str, dtypes))}"
            findings.append(Finding("metadata", name, False, message))
            continue
        actual = found[name].long()
        wanted = torch.as_tensor(wanted).long()
        if actual.shape == wanted.shape and torch.equal(actual, wanted):
            findings.append(Finding("metadata", name, True, f"{name}: as the definition says"))
            continue
        size = block_sizes[_TABLES[name]] if name in _TABLES else 0
        findings.append(_metadata_finding(name, actual, wanted, bounds, size))
    return findings


def _metadata_finding(
    name: str, actual: torch.Tensor, wanted: torch.Tensor, bounds: list[int], block_size: int
) -> Finding:
    if actual.ndim != wanted.ndim or actual.shape[1:] != wanted.shape[1:] or not len(actual):
        message = f"{name} has shape {tuple(actual.shape)}, expected {tuple(wanted.shape)}"
        return Finding("metadata", name, False, message)
    length = min(len(actual), len(wanted))
    differs = (actual[:length] != wanted[:length]).view(length, max(1, wanted[:1].numel())).any(1)
    row = int(differs.int().argmax()) if differs.any() else length
    got, want = (x[row].tolist() if row < len(x) else "nothing" for x in (actual, wanted))
    message = f"{name}[{row}] is {got}, expected {want}"
    place = {"row": row}
    if block_size:
        missed = _missed(actual, bounds, block_size)
        if missed:
            place["sequence"] = missed[0]
            message += f"; no block holds all tokens of {_listed('sequence', missed)}"
        if torch.equal(actual, chunk_indices(sorted({0, *bounds}), block_size).long()):
            message += "; it numbers only the sequences that have tokens (compact ranks)"
    elif name not in ("cu_seqlens_kern", "chunk_indices_chunk64_host"):
        place["sequence"] = min(max(row - (len(wanted) == len(bounds)), 0), len(bounds) - 2)
    return Finding("metadata", name, False, message, place)


def _missed(table: torch.Tensor, bounds: list[int], block_size: int) -> list[int]:
    """Sequences of which some token is in none of the blocks of a table."""
    pairs = {tuple(pair) for pair in table.tolist()}
    lens = [end - start for start, end in itertools.pairwise(bounds)]
    return [
        n
        for n, length in enumerate(lens)
        if any((n, block) not in pairs for block in range(-(-length // block_size)))
    ]


def _limits(call: RecordedCall, states_are_wide: bool) -> tuple[Errors, Errors]:
    of_o, of_state = call.limits()
    if states_are_wide and call.dtype in (torch.float16, torch.bfloat16):
        of_state = call.limits(torch.float32)[1]
    return of_o, of_state


def _whole(call: RecordedCall, limits: tuple[Errors, Errors]) -> dict[str, Comparison]:
    """The results of the whole op against the definition."""
    comparisons = {}
    for name, x in call.seen.items():
        if name == "o":
            comparisons[name] = compare_o(
                x, call.truth[0], dtype=x.dtype, bounds=call.bounds, limit=limits[0]
            )
        else:
            comparisons[name] = compare_state(
                x, call.truth[1], dtype=x.dtype, operands=call.dtype, limit=limits[1]
            )
    return comparisons


def _stages(call: RecordedCall, redzones: bool) -> list[Finding]:
    """What each stage gave against the reference stage on what that stage was given: its own error."""
    kernels = next((kernels for kernels in STAGES_OF.values() if _is_one_of(call.stages, kernels)), ())
    options = {"inputs": call.inputs, "scale": call.scale, "eps": call.eps}
    case = StageCase(call.case, **options, given=_given(call))
    findings = []
    for stage, result in _RESULTS:
        actual = call.stages.get(f"{stage}.{result}")
        if actual is None and (stage, result) in _SEEN and stage in kernels:
            actual = _as_kernels_write(call, result)
        if actual is None:
            continue
        of_stage, name = case, result
        if stage == "l2norm":  # one kernel, run twice
            raw = {"raw_k": case[f"raw_{result}"]}
            of_stage, name = StageCase(call.case, **options, given=raw), "y"
        comparison = compare_result(stage, of_stage, name, actual)
        finding = _finding(stage, result, comparison, actual, of_stage.reference(stage)[name], call)
        if redzones and _looks_read(actual, call):
            note = "NaN of finite inputs: read outside of a tensor, where linalg has NaN, or never written"
            finding = replace(finding, name="memory", message=f"{finding.message}; {note}")
        findings.append(finding)
        if not actual.isfinite().all():
            break  # what comes after was given no numbers
    return findings


def _looks_read(x: torch.Tensor, call: RecordedCall) -> bool:
    """Whether there is a NaN that was in memory, not computed: an x86-64 CPU gives its own a sign.

    Rounding to bfloat16 takes that away; where it was an overflow there mostly is an Inf, too.
    """
    infinite = x.isinf().any() or call.inputs.g.isinf().any()
    return not infinite and bool((x.isnan() & ~x.signbit()).any())


def _is_one_of(stages_seen: Mapping[str, torch.Tensor], kernels: Sequence[str]) -> bool:
    return any(name.partition(".")[0] in kernels for name in stages_seen)


def _as_kernels_write(call: RecordedCall, name: str) -> torch.Tensor | None:
    """What was seen of the whole op, as the last kernels give it."""
    if name not in call.seen:
        return None
    return call.seen["o"][0].to(call.dtype) if name == "o" else call.seen[name].float()


def _given(call: RecordedCall) -> dict[str, torch.Tensor]:
    """What stages were given by those before them, by the names of `StageCase`.

    Raises:
        InvalidArgumentError: for a tensor of a stage that there is not, or of another shape.
    """
    sizes, T = call.case, call.bounds[-1]
    NT = len(chunk_indices(call.bounds, CHUNK_SIZE))
    widths = {"q": sizes.K, "k": sizes.K, "w": sizes.K, "u": sizes.V, "v_new": sizes.V}
    widths |= dict.fromkeys(("A", "Ai", "Aqk", "sum_of_parts"), CHUNK_SIZE)
    given = {}
    for name, x in call.stages.items():
        stage, _, result = name.partition(".")
        if (stage, result) not in _RESULTS:
            allowed = ", ".join(".".join(pair) for pair in _RESULTS)
            invalid_argument("tensor", f"stage.{name}", f"stage.* with one of {allowed}")
        shape = (T, sizes.H if stage == "l2norm" else sizes.HV, widths.get(result, 1))
        if result in _STATES:
            shape = (NT if result == "h" else len(call.seq_lens), sizes.HV, sizes.K, sizes.V)
        elif result == "o":
            shape = (T, sizes.HV, sizes.V)
        if tuple(x.shape) != shape:
            invalid_argument(f"stage.{name}.shape", tuple(x.shape), str(shape))
        given[f"fused_{result}" if name in ("fused_intra_chunk.A", "fused_solve_tril.Ai") else result] = x
    if all(factor in given for factor in FACTORS):
        given["factors"] = torch.stack([given[factor][..., 0].T for factor in FACTORS])
    if "fused_Ai" in given and "sum_of_parts" in given:
        first = given["fused_Ai"]
        rest = (given["sum_of_parts"].double() - first.double()).to(first.dtype)
        given["fused_Ai"] = torch.stack([first] if first.dtype == torch.float32 else [first, rest])
    return given


def _finding(
    stage: str,
    name: str,
    comparison: Comparison,
    actual: torch.Tensor,
    truth: torch.Tensor,
    call: RecordedCall,
) -> Finding:
    """A comparison as a finding, with the worst value."""
    label = name if stage == name else f"{stage}.{name}"
    errors = f"ratio {comparison.errors.ratio:.1e} (limit {comparison.limit.ratio:.1e}), worst row "
    errors += f"{comparison.errors.worst_row:.1e} (limit {comparison.limit.worst_row:.1e})"
    if stage == "o":
        actual, truth = actual[0], truth[0]
    place, values = _worst_value(name, comparison, actual, truth, call)
    if comparison.passed:
        return Finding(stage, name, True, f"{label}: {errors}", place, comparison.errors, comparison.limit)
    message = f"{label}: {values}{comparison.problem or errors}"
    return Finding(stage, name, False, message, place, comparison.errors, comparison.limit)


def _worst_value(
    name: str, comparison: Comparison, actual: torch.Tensor, truth: torch.Tensor, call: RecordedCall
) -> tuple[dict[str, int], str]:
    """Where the worst value is, or the first that is no number, and what it is; or nothing."""
    is_state = name in _STATES
    index: list[int] = []
    if comparison.sequence is not None and comparison.row is not None and comparison.head is not None:
        sequence, row, head = comparison.sequence, comparison.row, comparison.head
        index = [sequence, head, row] if is_state else [call.bounds[sequence] + row, head]
    elif actual.shape == truth.shape and not actual.isfinite().all():
        index = (~actual.isfinite()).nonzero()[0].tolist()[:-1]
    if not index:
        return {}, ""
    got, expected = actual[tuple(index)].double(), truth[tuple(index)].double()
    column = int((got - expected).abs().nan_to_num(nan=math.inf).argmax())
    if name == "h":
        sequence, chunk = chunk_indices(call.bounds, CHUNK_SIZE)[index[0]].tolist()
        place = {"sequence": sequence, "chunk": chunk, "head": index[1], "key_row": index[2]}
    elif is_state:
        place = {"sequence": index[0], "head": index[1], "key_row": index[2]}
    else:
        place = call.place(*call.sequence_of(index[0]), index[1])
    values = f"expected {expected[column].item():.4g}, got {got[column].item():.4g}"
    return place, f"{values} at {in_words(place)}; "


def in_words(place: Mapping[str, int]) -> str:
    """A place as people write it: "sequence 1, chunk 0, token 3, head 2"."""
    return ", ".join(f"{name.replace('_', ' ')} {number}" for name, number in place.items())


def _listed(what: str, numbers: Sequence[int], total: int | None = None) -> str:
    """ "heads 1 and 3", "sequence 2", "sequences 0 to 9", "all heads"."""
    if total is not None and len(numbers) == total:
        return f"all {what}s" if total > 1 else f"{what} {numbers[0]}"
    if len(numbers) == 1:
        return f"{what} {numbers[0]}"
    if len(numbers) > 2 and numbers[-1] - numbers[0] + 1 == len(numbers):
        return f"{what}s {numbers[0]} to {numbers[-1]}"
    shown = [str(number) for number in numbers[:_MOST_LISTED]]
    if len(numbers) > _MOST_LISTED:
        return f"{what}s {', '.join(shown)} and {len(numbers) - _MOST_LISTED} more"
    return f"{what}s {', '.join(shown[:-1])} and {shown[-1]}"


def _with_explanation(findings: list[Finding], explanation: Explanation, call: RecordedCall) -> list[Finding]:
    """The findings with the explanation at its stage, unless something before it is wrong already."""
    mistake = explanation.mistake
    before = ORDER.index(mistake.stage)
    if any(not f.passed and ORDER.index(f.stage) <= before for f in findings):
        return findings
    worst = next(f for f in findings if not f.passed and f.stage in ("o", "final_state"))
    place = {name: worst.place[name] for name in ("sequence", "head") if name in worst.place}
    message = f"{mistake.tensor}: it looks as if {explanation.words}; {_where(explanation, call)}"
    finding = Finding(mistake.stage, mistake.tensor, False, message, place)
    return sorted([*findings, finding], key=lambda f: ORDER.index(f.stage))


def _where(explanation: Explanation, call: RecordedCall) -> str:
    sequences = _listed("sequence", explanation.sequences, len(call.seq_lens))
    return f"{sequences}, {_listed('head', explanation.heads, call.case.HV)}"


def _heat(
    call: RecordedCall, comparisons: Mapping[str, Comparison], limits: tuple[Errors, Errors]
) -> Heat | None:
    """Errors of o by chunk and head; of the final states, where they alone are wrong."""
    name = "o" if "o" in comparisons else "final_state"
    if name == "o" and comparisons["o"].passed and not all(c.passed for c in comparisons.values()):
        name = "final_state"
    if name not in comparisons:
        return None
    actual, truth = call.seen[name].double(), call.truth[name == "final_state"]
    limit, comparison = limits[name == "final_state"], comparisons[name]
    only_ratio = comparison.errors.worst_row <= limit.worst_row and comparison.errors.ratio > limit.ratio
    most = limit.ratio if only_ratio else limit.worst_row
    chunks, values = [], []
    for n, (start, end) in enumerate(itertools.pairwise(call.bounds)):
        if name == "o":
            found, wanted = actual[0, start:end], truth[0, start:end]
        else:
            found, wanted = (x[n].transpose(0, 1) for x in (actual, truth))  # [K, HV, V]
        if not found.numel():
            continue
        scale = max(wanted.square().mean().sqrt().item(), smallest_scale(call.dtype))
        rows = (found - wanted).square().mean(-1).sqrt() / scale / most
        rows = rows.nan_to_num(nan=math.inf, posinf=math.inf)
        for chunk in range(-(-(end - start) // CHUNK_SIZE)) if name == "o" else [0]:
            part = rows[chunk * CHUNK_SIZE : (chunk + 1) * CHUNK_SIZE] if name == "o" else rows
            errors = part.square().mean(0).sqrt() if only_ratio else part.amax(0)
            chunks.append((n, chunk))
            values.append(errors.tolist())
    over = [(row, head) for row, heads in enumerate(values) for head, x in enumerate(heads) if x > 1]
    return Heat(name, chunks, values, over[0] if over else None)


def _as_replay(
    path: str,
    subject: str,
    call: RecordedCall,
    findings: list[Finding],
    explanation: Explanation | None = None,
    doctor: Doctor | None = None,
    heat: Heat | None = None,
) -> Replay:
    sizes = call.case
    details: dict[str, Any] = {
        "sizes": {
            "sequences": len(call.seq_lens),
            "tokens": call.bounds[-1],
            **{name: getattr(sizes, name) for name in ("H", "HV", "K", "V", "dtype")},
        }
    }
    if explanation is not None:
        details["explanation"] = {
            "name": explanation.mistake.name,
            "stage": explanation.mistake.stage,
            "words": explanation.words,
            "sequences": list(explanation.sequences),
            "heads": list(explanation.heads),
        }
    first = next((finding for finding in findings if not finding.passed), None)
    diagnosis, blame = "", ""
    if first is not None:
        blame = _blame(first, explanation)
        diagnosis = f"{first.stage} is the first that is wrong: {first.message}."
        if explanation is not None and explanation.words not in first.message:
            diagnosis += f" It looks as if {explanation.words}; {_where(explanation, call)}."
        elif explanation is None and doctor is not None and doctor.wrong:
            sequences, heads = (sorted(set(x)) for x in zip(*doctor.wrong, strict=True))
            diagnosis += (
                f" Wrong are {_listed('sequence', sequences, len(call.seq_lens))}, "
                f"{_listed('head', heads, sizes.HV)}; no known mistake gives this."
            )
    return Replay(path, "gdn", subject, tuple(findings), blame, diagnosis, heat, details)


def _blame(first: Finding, explanation: Explanation | None) -> str:
    if first.stage in ("inputs", "metadata"):
        return first.stage
    if first.name == "memory":
        return "memory"
    if explanation is not None:
        return explanation.mistake.blame
    return "state" if first.stage == "final_state" else "arithmetic"


# Metadata alone


def _replay_metadata(fixture: Fixture, path: str, device: str, *, again: bool) -> Replay:
    """Tables that were recorded, or that our builder makes of the same arguments, and the definition."""
    config = fixture.config
    HV = _count(config, "num_value_heads", 1)
    cu_seqlens = check_tensor("cu_seqlens", fixture.tensors["cu_seqlens"], 1, (torch.int32, torch.int64))
    masks = fixture.tensors.get("spec_sequence_masks")
    num_seqs = len(cu_seqlens) - 1
    if config.get("num_actual_seqs") is not None:
        num_seqs = _count(config, "num_actual_seqs", 0, num_seqs)
    given = check_cu_seqlens(cu_seqlens[: num_seqs + 1])
    if given[-1] > _MOST_TOKENS:
        invalid_argument("cu_seqlens[-1]", given[-1], f"<= {_MOST_TOKENS:,} tokens")
    if masks is not None:
        check_tensor("spec_sequence_masks", masks, 1, (torch.bool,))
        if len(masks) < num_seqs:
            invalid_argument("spec_sequence_masks.shape", tuple(masks.shape), f"[N], N >= {num_seqs}")
    bounds = [0]
    for n in range(num_seqs):
        if masks is None or not masks[n]:
            bounds.append(bounds[-1] + given[n + 1] - given[n])
    own = (CHUNK_SIZE, SOLVE_TRIL_BLOCK_SIZE, cumsum_block_size(HV))
    if not again and is_recorded(fixture):
        subject = RECORDED
        block_sizes = _block_sizes(config.get("block_sizes", own))
        found = by_prefix(fixture.tensors, "metadata.")
        findings = [_block_sizes_finding(block_sizes, own), *compare_metadata(found, bounds, block_sizes)]
    else:
        subject = f"our builder on {device}"
        where = open_test_device(device)
        builder = ChunkMetadataBuilder(where, max(1, bounds[-1]), max(1, len(bounds) - 1), HV)
        built = builder.build(
            cu_seqlens,
            spec_sequence_masks_cpu=masks,
            num_decodes=_count(config, "num_decodes", 0),
            num_actual_seqs=num_seqs,
        )
        if isinstance(where, SimulatedDevice):
            where.synchronize()
        findings = [
            _block_sizes_finding(builder.block_sizes, own),
            *(
                Finding("metadata", difference.partition(" ")[0], False, difference)
                for difference in metadata_differences(built, bounds, own)
            ),
        ]
    first = next((finding for finding in findings if not finding.passed), None)
    blame = "metadata" if first else ""
    diagnosis = f"The metadata are wrong: {first.message}." if first else ""
    sizes = {"sequences": len(bounds) - 1, "tokens": bounds[-1], "HV": HV}
    return Replay(path, "metadata", subject, tuple(findings), blame, diagnosis, None, {"sizes": sizes})


def _block_sizes_finding(found: tuple[int, int, int], wanted: tuple[int, int, int]) -> Finding:
    if found == wanted:
        message = f"block_sizes: {list(wanted)}, as the kernels take"
    else:
        message = f"block_sizes is {list(found)}, expected {list(wanted)}, as the kernels take"
    return Finding("metadata", "block_sizes", found == wanted, message)


def _count(config: Mapping[str, Any], name: str, least: int, most: int = _MOST_COUNTED) -> int:
    value = config.get(name, least)
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        invalid_argument(f"config {name}", repr(value), f"an int from {least} to {most:,}")
    return value


def _block_sizes(value: Any) -> tuple[int, int, int]:
    sizes = tuple(value) if isinstance(value, (list, tuple)) else ()
    if len(sizes) != 3 or not all(type(size) is int and size > 0 for size in sizes):
        invalid_argument("config block_sizes", repr(value), "three ints >= 1")
    return sizes
