"""What of a recorded call differs from the reference, in one line: the check of a running server."""

import itertools
import textwrap

import torch

from ..fixtures.store import Fixture
from ..optimized.gdn.kernels.block_sizes import CHUNK_SIZE, SOLVE_TRIL_BLOCK_SIZE, cumsum_block_size
from ..reference.errors import InvalidArgumentError
from ..reference.gdn import chunk_gated_delta_rule
from .cases import Truth, expected_metadata, run_case
from .compare import Comparison, compare_o, compare_state
from .recorded_call import RecordedCall, by_prefix, tells_nothing
from .tolerances import Errors, limit

_MOST_CHARACTERS = 300


def differences(fixture: Fixture) -> str:
    """What differs from the reference in a call of the op or a build of its metadata, with its place; or "".

    Metadata are held to the definition, exactly; results to the limits of the suites. The truth is the
    chunked reference in float64: token by token, a long prompt would take minutes.
    """
    found = _of_build(fixture) if fixture.kind == "metadata" else _of_call(fixture)
    return textwrap.shorten("; ".join(found), _MOST_CHARACTERS, placeholder=" ...")


def _of_build(fixture: Fixture) -> list[str]:
    """Differences of metadata that were built of bounds, without the sequences that verify drafts."""
    bounds = fixture.tensors["cu_seqlens"].long()
    is_spec = fixture.tensors.get("spec_sequence_masks")
    lens = bounds.diff() if is_spec is None else bounds.diff()[~is_spec[: len(bounds) - 1]]
    found = by_prefix(fixture.tensors, "metadata.")
    return _tables_differ(found, [0, *itertools.accumulate(lens.tolist())], fixture.config["block_sizes"])


def _tables_differ(tables: dict[str, torch.Tensor], bounds: list[int], block_sizes: list[int]) -> list[str]:
    """Where tables, as far as they were recorded, do not hold what the definition says."""
    chunk, large, cumsum = block_sizes
    differ = []
    for name, wanted in expected_metadata(bounds, (chunk, large, cumsum)).items():
        found = tables.get(name)
        if found is None or wanted is None:
            continue
        values = wanted.tolist() if isinstance(wanted, torch.Tensor) else list(wanted)  # pyright: ignore
        if found.tolist() != values:
            differ.append(f"metadata: {name} is {found.tolist()}, expected {values}")
    return differ


def _of_call(fixture: Fixture) -> list[str]:
    try:
        call = RecordedCall.of(fixture)
        unusable = _not_finite(call)
        if unusable:
            return [f"NaN or Inf came in with {', '.join(unusable)}"]
        too_long = [name for name in ("q", "k") if call.packed.overflows(name).any()]
        if too_long:
            return [f"squares of {', '.join(too_long)} overflow"]
        truth = run_case(chunk_gated_delta_rule, call.case, call.inputs, **call.options)
        rounded = run_case(
            chunk_gated_delta_rule, call.case, call.inputs, compute_dtype=call.dtype, **call.options
        )
    except InvalidArgumentError as error:
        return [f"the reference refuses the call: {error}"]
    block_sizes = [CHUNK_SIZE, SOLVE_TRIL_BLOCK_SIZE, cumsum_block_size(call.case.HV)]
    return [
        *_tables_differ(dict(call.metadata), call.bounds, block_sizes),
        *(str(comparison) for comparison in _compare(call, truth, rounded) if not comparison.passed),
    ]


def _compare(call: RecordedCall, truth: Truth, rounded: Truth) -> list[Comparison]:
    """What was seen against the truth, within the limits that follow from the reference with rounding."""
    none, dtype, bounds, compared = Errors(0.0, 0.0), call.dtype, call.bounds, []
    if "o" in call.seen:
        own = compare_o(rounded[0], truth[0], dtype=dtype, bounds=bounds, limit=none).errors
        compared.append(
            compare_o(call.seen["o"], truth[0], dtype=dtype, bounds=bounds, limit=_limit(dtype, own))
        )
    if "final_state" in call.seen:
        state = call.seen["final_state"]
        own = compare_state(rounded[1], truth[1], dtype=rounded[1].dtype, operands=dtype, limit=none).errors
        compared.append(
            compare_state(state, truth[1], dtype=state.dtype, operands=dtype, limit=_limit(dtype, own))
        )
    return compared


def _limit(dtype: torch.dtype, reference: Errors) -> Errors:
    """The limit; that of the dtype alone where the reference is so far off that it proves nothing."""
    allowed = limit(dtype, reference)
    return limit(dtype) if tells_nothing(allowed) else allowed


def _not_finite(call: RecordedCall) -> list[str]:
    """Inputs that no result can come from; padding may be anything, and a log decay of -inf is right."""
    names = []
    for name, x in call.inputs._asdict().items():
        if x is None or name == "cu_seqlens":
            continue
        values = x if name == "initial_state" else x[:, : call.bounds[-1]]
        bad = values.isnan() | values.isposinf() if name == "g" else ~values.isfinite()
        if bad.any():
            names.append(name)
    return names
