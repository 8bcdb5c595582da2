"""A prefill batch as a few small numbers, and the check that an implementation computes it right."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch

from ..fixtures.record import metadata_tensors, versions
from ..fixtures.store import Fixture
from ..optimized.gdn import IMPLEMENTATIONS
from ..optimized.gdn import chunk_gated_delta_rule as optimized_chunk_gated_delta_rule
from ..optimized.gdn.metadata import ChunkMetadata, ChunkMetadataBuilder
from ..reference.errors import AscendTwinError, invalid_argument
from ..reference.gdn import chunk_gated_delta_rule, recurrent_gated_delta_rule
from ..reference.gdn import metadata as reference_metadata
from ..reference.gdn.inputs import check_choice
from .compare import Comparison, compare_o, compare_state
from .tolerances import Errors, limit

DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}

# Log decay of every token, from uniform numbers in [0, 1).
GATES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "typical": lambda x: -4 * x**4,
    "none": lambda x: torch.zeros_like(x),
    "steep": lambda x: -1e3 * x,
    "mixed": lambda x: torch.where(x < 0.1, torch.tensor(1e-12).log(), 0.0),
    "forget": lambda x: torch.where(x < 0.05, float("-inf"), -x),
}

# Step size of every token, from uniform numbers in [0, 1).
BETAS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "random": lambda x: x,
    "one": lambda x: torch.ones_like(x),
    "zero": lambda x: torch.zeros_like(x),
    "mixed": lambda x: torch.where(x < 0.3, 0.0, torch.where(x > 0.7, 1.0, x)),
}

KEYS = ("random", "identical")


class Inputs(NamedTuple):
    """The tensors of a call: q, k `[1, T, H, K]`, v `[1, T, HV, V]`, g, beta `[1, T, HV]`, initial_state
    `[N, HV, K, V]` or None, cu_seqlens `[N + 1]` int32; T counts the padding behind the last sequence."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    g: torch.Tensor
    beta: torch.Tensor
    initial_state: torch.Tensor | None
    cu_seqlens: torch.Tensor

    def to(self, device: torch.device) -> "Inputs":
        """Copies of the tensors, on `device`."""
        return Inputs._make(None if x is None else x.to(device, copy=True) for x in self)


@dataclass(frozen=True)
class PrefillCase:
    """A prefill batch; its tensors follow from these numbers alone.

    Attributes:
        seq_lens: tokens of each sequence; 0 is an empty one.
        seed: of all values.
        H, HV, K, V: query/key heads, value heads (a multiple of H), head dims.
        dtype: of q, k, v and beta, a key of `DTYPES`. g and the state are float32 (float64 for float64).
        gates, betas: keys of `GATES` and `BETAS`.
        keys: "random", or "identical": every token has the same key, the hard case of solve_tril.
        initial_state: whether sequences start from a random state, not from zeros: all alike, or N bools.
        padding: tokens behind the last sequence; filled with NaN.
        use_qk_l2norm_in_kernel: whether the op normalises q and k; else they come normalised.
    """

    seq_lens: tuple[int, ...]
    seed: int = 0
    H: int = 1
    HV: int = 1
    K: int = 16
    V: int = 16
    dtype: str = "float32"
    gates: str = "typical"
    betas: str = "random"
    keys: str = "random"
    initial_state: bool | tuple[bool, ...] = True
    padding: int = 0
    use_qk_l2norm_in_kernel: bool = False

    def __post_init__(self) -> None:
        for name, allowed in (("dtype", DTYPES), ("gates", GATES), ("betas", BETAS), ("keys", KEYS)):
            check_choice(name, getattr(self, name), tuple(allowed))
        if isinstance(self.initial_state, tuple) and len(self.initial_state) != len(self.seq_lens):
            invalid_argument(
                "initial_state", self.initial_state, f"{len(self.seq_lens)} bools, or one for all"
            )

    @property
    def bounds(self) -> list[int]:
        """N + 1 bounds (tokens) of the sequences."""
        bounds = [0]
        for length in self.seq_lens:
            bounds.append(bounds[-1] + length)
        return bounds

    def inputs(self) -> Inputs:
        """The tensors, on the CPU; drawn in float64, then rounded."""
        rng = torch.Generator().manual_seed(self.seed)
        bounds, dtype = self.bounds, DTYPES[self.dtype]
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        N, T = len(self.seq_lens), bounds[-1] + self.padding

        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=rng, dtype=torch.float64)

        def uniform() -> torch.Tensor:
            return torch.rand((1, T, self.HV), generator=rng, dtype=torch.float64)

        q, k = normal(1, T, self.H, self.K), normal(1, T, self.H, self.K)
        if self.keys == "identical":
            k = k[:, :1].expand_as(k).clone()
        if not self.use_qk_l2norm_in_kernel:
            q, k = (torch.nn.functional.normalize(x, dim=-1) for x in (q, k))
        v, g, beta = normal(1, T, self.HV, self.V), GATES[self.gates](uniform()), BETAS[self.betas](uniform())
        state = normal(N, self.HV, self.K, self.V).to(wide) if self.initial_state else None
        if state is not None and isinstance(self.initial_state, tuple):
            state[~torch.tensor(self.initial_state)] = 0
        q, k, v, beta, g = *(x.to(dtype) for x in (q, k, v, beta)), g.to(wide)
        for x in (q, k, v, g, beta):
            x[:, bounds[-1] :] = float("nan")
        return Inputs(q, k, v, g, beta, state, torch.tensor(bounds, dtype=torch.int32))


class Outcome(NamedTuple):
    """What came out of checking a case."""

    case: PrefillCase
    comparisons: list[Comparison]
    metadata_differences: list[str]
    reference: Sequence[Comparison] = ()  # of the chunked reference in float64, if that was checked too
    fixture: Fixture | None = None  # the call as a recording, if it failed

    @property
    def passed(self) -> bool:
        return not self.metadata_differences and all(c.passed for c in (*self.comparisons, *self.reference))

    def __str__(self) -> str:
        lines = [f"prebuilt metadata: {d}" for d in self.metadata_differences]
        lines += [f"chunked reference: {c}" for c in self.reference]
        return "\n".join(lines + [str(c) for c in self.comparisons])


Truth = tuple[torch.Tensor, torch.Tensor]  # o and final_state, float64


class EquivalenceError(AscendTwinError, AssertionError):
    """A case on which an implementation and the reference differ; the message says where and by how much."""


def run_case(
    function: Callable[..., Any], case: PrefillCase, inputs: Inputs, **options: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """o and final_state of a prefill function, with the options of a case and `options`."""
    return function(
        *inputs[:5],
        initial_state=inputs.initial_state,
        cu_seqlens=inputs.cu_seqlens,
        output_final_state=True,
        use_qk_l2norm_in_kernel=case.use_qk_l2norm_in_kernel,
        **options,
    )


def truth_of(case: PrefillCase, inputs: Inputs) -> Truth:
    """o and final_state by the definition, in float64, on the rounded inputs."""
    return run_case(recurrent_gated_delta_rule, case, inputs)


def reference_errors(
    case: PrefillCase, inputs: Inputs, o: torch.Tensor, state: torch.Tensor, dtype: torch.dtype
) -> tuple[Errors, Errors]:
    """Errors of o and final_state that the chunked reference makes when it runs in `dtype`."""
    chunked_o, chunked_state = run_case(chunk_gated_delta_rule, case, inputs, compute_dtype=dtype)
    bounds, none = case.bounds, Errors(0.0, 0.0)
    return (
        compare_o(chunked_o, o, dtype=dtype, bounds=bounds, limit=none).errors,
        compare_state(chunked_state, state, dtype=chunked_state.dtype, operands=dtype, limit=none).errors,
    )


def compare_reference(case: PrefillCase, inputs: Inputs, truth: Truth) -> list[Comparison]:
    """Compare the chunked reference in float64 with the truth: the two plain statements of the rule."""
    o, state = run_case(chunk_gated_delta_rule, case, inputs)
    float64 = torch.float64
    return [
        compare_o(o, truth[0], dtype=float64, bounds=case.bounds, limit=limit(float64)),
        compare_state(state, truth[1], dtype=float64, operands=float64, limit=limit(float64)),
    ]


def compare_prefill(
    case: PrefillCase,
    inputs: Inputs,
    actual_o: torch.Tensor,
    actual_state: torch.Tensor | None,
    truth: Truth | None = None,
    *,
    rounds_operands: bool = True,
) -> list[Comparison]:
    """Compare the results of an implementation for a case with the truth, within the limits of its dtype.

    `truth` is `truth_of(case, inputs)`, computed here unless given. Without `rounds_operands` the state is
    nowhere rounded to the dtype of the case, and is held to the limits of float32.
    """
    dtype = DTYPES[case.dtype]
    o, state = truth_of(case, inputs) if truth is None else truth
    o_errors, state_errors = reference_errors(case, inputs, o, state, dtype)
    operands = dtype
    if not rounds_operands and dtype in (torch.float16, torch.bfloat16):
        operands = torch.float32
        _, state_errors = reference_errors(case, inputs, o, state, operands)
    if isinstance(actual_state, torch.Tensor):
        actual_state = actual_state.cpu()
    return [
        compare_o(actual_o.cpu(), o, dtype=dtype, bounds=case.bounds, limit=limit(dtype, o_errors)),
        compare_state(
            actual_state,
            state,
            dtype=torch.float64 if dtype == torch.float64 else torch.float32,
            operands=operands,
            limit=limit(operands, state_errors),
        ),
    ]


def expected_metadata(bounds: list[int], block_sizes: tuple[int, int, int]) -> dict[str, object]:
    """What the definition says of prebuilt metadata, by field.

    Args:
        bounds: N + 1 ints, bounds (tokens) of the sequences.
        block_sizes: as in `ChunkMetadata`.
    """
    chunk, large, cumsum = block_sizes
    is_kept = torch.tensor(bounds[1:]) > torch.tensor(bounds[:-1])
    kept_bounds = tuple(sorted({0, *bounds}))
    return {
        "cu_seqlens": torch.tensor(bounds, dtype=torch.int32),
        "chunk_indices_chunk64": reference_metadata.chunk_indices(bounds, chunk),
        "chunk_offsets_chunk64": reference_metadata.chunk_offsets(bounds, chunk),
        "update_chunk_offsets_chunk64": reference_metadata.update_chunk_offsets(bounds, chunk),
        "final_chunk_indices_chunk64": reference_metadata.final_chunk_indices(bounds, chunk),
        "chunk_indices_large_block": reference_metadata.chunk_indices(bounds, large),
        "block_indices_cumsum": reference_metadata.chunk_indices(bounds, cumsum),
        "keep_meta": None if is_kept.all() else is_kept,
        "cu_seqlens_host": tuple(bounds),
        "cu_seqlens_kern": None if is_kept.all() else kept_bounds,
        "chunk_indices_chunk64_host": tuple(
            reference_metadata.chunk_indices(kept_bounds, chunk).flatten().tolist()
        ),
    }


def metadata_differences(
    metadata: ChunkMetadata, bounds: list[int], block_sizes: tuple[int, int, int]
) -> list[str]:
    """Where prebuilt metadata is not what the definition says, in value or dtype; exact."""
    expected = expected_metadata(bounds, block_sizes)
    found = {name: getattr(metadata, name) for name in expected}
    return [
        f"{name} is {_in_full(found[name])}, expected {_in_full(wanted)}"
        for name, wanted in expected.items()
        if not _is_same(found[name], wanted)
    ]


def _is_same(found: object, wanted: object) -> bool:
    if not isinstance(found, torch.Tensor) or not isinstance(wanted, torch.Tensor):
        return type(found) is type(wanted) and found == wanted
    return found.dtype == wanted.dtype and found.shape == wanted.shape and torch.equal(found.cpu(), wanted)


def _in_full(x: object) -> str:
    return f"{x.dtype} {x.tolist()}" if isinstance(x, torch.Tensor) else str(x)


def check_prefill(
    case: PrefillCase,
    *,
    implementation: str = "eager",
    builder: ChunkMetadataBuilder,
    device: torch.device,
    check_reference: bool = False,
) -> Outcome:
    """Build the metadata of a case, run an implementation on it, and compare both with the reference.

    Args:
        case: the batch.
        implementation: a name in `ascend_twin.optimized.gdn.IMPLEMENTATIONS`.
        builder: builds the metadata; large enough for the case.
        device: where the builder puts them and the op runs.
        check_reference: whether to compare the chunked reference with the truth as well. Default: False.
    """
    inputs = case.inputs()
    metadata = builder.build(inputs.cu_seqlens)
    differences = metadata_differences(metadata, case.bounds, builder.block_sizes)
    if differences:  # the op would read and write wherever they point
        return Outcome(case, [], differences, fixture=recorded_case(case, implementation, metadata))
    o, state = run_case(
        optimized_chunk_gated_delta_rule,
        case,
        inputs.to(device),  # copies: what an implementation does to them must not change the truth
        prebuilt_meta=metadata,
        implementation=implementation,
    )
    truth = truth_of(case, inputs)
    outcome = Outcome(
        case,
        compare_prefill(
            case, inputs, o, state, truth, rounds_operands=IMPLEMENTATIONS[implementation].rounds_operands
        ),
        differences,
        compare_reference(case, inputs, truth) if check_reference else (),
    )
    if outcome.passed:
        return outcome
    return outcome._replace(fixture=recorded_case(case, implementation, metadata, o, state))


def recorded_case(
    case: PrefillCase,
    implementation: str,
    metadata: ChunkMetadata | None = None,
    o: torch.Tensor | None = None,
    final_state: torch.Tensor | None = None,
) -> Fixture:
    """A case as a fixture: what an implementation was given, and what it returned, as far as it came."""
    found = {"seen.o": o, "seen.final_state": final_state, **metadata_tensors(metadata)}
    tensors = {**case.inputs()._asdict(), **found}
    return Fixture(
        "gdn",
        fixture_config(case, implementation),
        {name: x.cpu().clone() for name, x in tensors.items() if x is not None},
        origin={"case": repr(case), "versions": versions()},
    )


def fixture_config(case: PrefillCase, implementation: str | None) -> dict[str, Any]:
    """The `config` of a fixture that holds the call of a case, computed by an implementation or nobody."""
    return {
        "scale": None,
        "eps": 1e-6,
        "use_qk_l2norm_in_kernel": case.use_qk_l2norm_in_kernel,
        "output_final_state": True,
        "implementation": implementation,
    }


def minimize(case: PrefillCase, fails: Callable[[PrefillCase], bool]) -> PrefillCase:
    """The smallest case near `case` that still fails: fewer sequences, tokens, heads, dims, plainer values.

    Greedy: the first simpler case that fails replaces the case, until none does.
    """
    while True:
        smaller = next((c for c in _simpler(case) if fails(c)), None)
        if smaller is None:
            return case
        case = smaller


def _simpler(case: PrefillCase) -> list[PrefillCase]:
    """Cases one step simpler than `case`, the boldest first."""
    lens, N = case.seq_lens, len(case.seq_lens)

    def only(*parts: slice) -> PrefillCase:
        state = case.initial_state
        if isinstance(state, tuple):
            state = tuple(x for part in parts for x in state[part])
        return replace(case, seq_lens=tuple(x for part in parts for x in lens[part]), initial_state=state)

    # What makes a case cheap comes first: each step down is then tried on a cheap case.
    variants = [only(slice(N // 2)), only(slice(N // 2, N))] if N > 1 else []
    plain: dict[str, Any] = {
        "HV": case.H, "H": 1, "keys": "random", "K": 16, "V": 16, "padding": 0, "initial_state": False,
        "gates": "none", "betas": "one", "use_qk_l2norm_in_kernel": False,
    }  # fmt: skip
    variants += [
        replace(case, **{name: value}) for name, value in plain.items() if getattr(case, name) != value
    ]
    variants += [only(slice(n), slice(n + 1, N)) for n in range(N) if N > 1]
    for n, length in enumerate(lens):
        for shorter in sorted(
            {0, 1, length // 2, 64 * ((length - 1) // 64), length - 1} & set(range(length))
        ):
            variants.append(replace(case, seq_lens=(*lens[:n], shorter, *lens[n + 1 :])))
    return [c for c in variants if c.HV % c.H == 0]
