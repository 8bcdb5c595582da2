"""The Triton kernels, each alone: what it is given, what it must return, and the check of that.

Every stage gets exact inputs: those of a case, and of the stages before it what the reference computes in
float64, rounded to what the kernel reads. So an error is that stage's own. Whatever a kernel allocates, and
every input row that belongs to no sequence, starts as NaN.

Names of tensors: as in `stages`; q and k are normalised, raw_q and raw_k as in the case; fused_A and fused_Ai
are A and Ai of the fused path, and factors is what `fused_intra_chunk` calls so.
"""

import importlib
import importlib.util
import math
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple
from unittest import mock

import torch

from ..optimized.gdn.device import Device
from ..optimized.gdn.kernels.block_sizes import CHUNK_SIZE
from ..optimized.gdn.metadata import ChunkMetadata, ChunkMetadataBuilder
from ..reference.gdn import stages
from ..reference.gdn.inputs import scale_or_default
from ..reference.gdn.metadata import chunk_offsets
from .cases import DTYPES, Inputs, PrefillCase
from .compare import Comparison, compare_o, compare_state
from .tolerances import Errors, limit

KERNELS = f"{(__package__ or '').rpartition('.')[0]}.optimized.gdn.kernels"
EPS = 1e-2  # larger than anybody takes: it shows in every result
FACTORS = ("of_v", "of_k", "of_q", "to_end", "G", "x")
WIDE = {"coarse", "rest", "g_cumsum", "A", "sum_of_parts", *FACTORS}
"""Results that are float32 for every dtype, of sums that are nowhere rounded to less."""

Results = dict[str, torch.Tensor]
Launcher = Callable[..., Any]
Layout = Callable[[str, torch.Tensor], torch.Tensor]


class StageCase:
    """The inputs of every stage for one batch, on the CPU, and what the reference makes of them.

    Args:
        case: the batch.
        inputs: its tensors. Default: those that follow from the case.
        scale: factor of the output. Default: K ** -0.5.
        eps: of the normalisation of q and k.
        given: tensors by name that a stage is to be given in place of what the reference makes.
        dtypes: of g, beta and initial_state by name, where they are others than those of the case.
    """

    def __init__(
        self,
        case: PrefillCase,
        *,
        inputs: Inputs | None = None,
        scale: float | None = None,
        eps: float = EPS,
        given: Results | None = None,
        **dtypes: torch.dtype,
    ) -> None:
        self.case = case
        self.eps = eps
        self.dtype = DTYPES[case.dtype]
        self.bounds = case.bounds
        self.num_tokens = case.bounds[-1] + case.padding
        self.scale = scale_or_default(scale, case.K)
        self.num_parts = 1 if self.dtype == torch.float32 else 2  # of Ai in the fused path
        self.chunk_offsets: list[int] = chunk_offsets(self.bounds, CHUNK_SIZE).tolist()
        self._references: dict[tuple[str, torch.dtype], Results] = {}
        q, k, v, g, beta, self.initial_state, _ = case.inputs() if inputs is None else inputs
        self._inputs = {"raw_q": q[0], "raw_k": k[0], "v": v[0], "g": g[0], "beta": beta[0]}
        self._inputs.update(given or {})
        for name in ("g", "beta"):
            self._inputs[name] = self._inputs[name].to(dtypes.get(name))
        if self.initial_state is not None:
            self.initial_state = self.initial_state.to(dtypes.get("initial_state"))

    def __getitem__(self, name: str) -> torch.Tensor:
        """A tensor that a stage is given, rounded, NaN in rows of no sequence."""
        if name not in self._inputs:
            self._inputs[name] = self._make(name)
        return self._inputs[name]

    def _make(self, name: str) -> torch.Tensor:
        if name in ("q", "k"):
            raw = self[f"raw_{name}"]
            if not self.case.use_qk_l2norm_in_kernel:
                return raw
            return stages.l2norm(raw.double(), eps=self.eps).to(self.dtype)
        stage, sources = SOURCES[name]
        exact, found = self.reference(stage), []
        for source in sources:
            x = exact[source].to(torch.float32 if source in WIDE else self.dtype)
            if source != "h":
                x[self.bounds[-1] :] = float("nan")
            found.append(x)
        if name == "fused_Ai":  # what the sum is rounded to, and the rest of it
            first = exact["sum_of_parts"].to(self.dtype)
            parts = [first, (exact["sum_of_parts"] - first.double()).to(self.dtype)][: self.num_parts]
            for part in parts:
                part[self.bounds[-1] :] = float("nan")
            return torch.stack(parts)
        if name == "g_cumsum":
            return torch.stack(found).squeeze(-1)  # [2, T, HV]
        if name == "factors":
            return torch.stack(found).squeeze(-1).transpose(1, 2).contiguous()  # [6, HV, T]
        return found[0]

    def reference(self, stage: str, compute_dtype: torch.dtype = torch.float64) -> Results:
        """What a stage must return, of the same rounded inputs."""
        key = (stage, compute_dtype)
        if key not in self._references:
            self._references[key] = STAGES[stage].reference(self, compute_dtype)
        return self._references[key]

    def chunks(self, names: str, compute_dtype: torch.dtype) -> list[torch.Tensor]:
        """Inputs by name, cut into chunks of HV heads, in the accumulation dtype."""
        return [self.cut(self[name], compute_dtype) for name in names.split()]

    def cut(self, x: torch.Tensor, compute_dtype: torch.dtype) -> torch.Tensor:
        chunks = stages.to_chunks(x.to(stages.accumulation_dtype(compute_dtype)), self.bounds, CHUNK_SIZE)
        return chunks.repeat_interleave(self.case.HV // x.shape[1], dim=1)

    def tokens(self, **chunks: torch.Tensor) -> Results:
        """Chunks put back into packed tokens `[T, HV, D]`, zero in rows of no sequence."""
        return {
            name: stages.from_chunks(x if x.ndim == 4 else x[..., None], self.bounds, self.num_tokens)
            for name, x in chunks.items()
        }

    def start(self, compute_dtype: torch.dtype) -> torch.Tensor:
        """The initial state, zeros where there is none."""
        dtype, case = stages.accumulation_dtype(compute_dtype), self.case
        if self.initial_state is not None:
            return self.initial_state.to(dtype)
        return torch.zeros((len(case.seq_lens), case.HV, case.K, case.V), dtype=dtype)

    def metadata(self, device: Device, num_value_heads: int | None = None) -> ChunkMetadata:
        """The prebuilt metadata of the batch, or those for another number of value heads."""
        num_seqs, num_tokens = len(self.case.seq_lens), self.bounds[-1]
        heads = num_value_heads or self.case.HV
        builder = ChunkMetadataBuilder(device, max(1, num_tokens), max(1, num_seqs), heads, depth=1)
        return builder.build(torch.tensor(self.bounds))


# What a stage must return: from the reference stages, packed tokens as `[T, heads, D]`.


def _l2norm(case: StageCase, compute_dtype: torch.dtype) -> Results:
    x = case["raw_k"].to(stages.accumulation_dtype(compute_dtype))
    return {"y": stages.round_to(stages.l2norm(x, eps=case.eps), compute_dtype)}


def _chunk_local_cumsum(case: StageCase, compute_dtype: torch.dtype) -> Results:
    """The parts as `kernels.decay` defines them; their sum is the cumulative sum."""
    (g,) = case.chunks("g", compute_dtype)
    g = g.clamp(min=-128.0)
    coarse = (g * 1024).ceil() / 1024
    sums = {"coarse": coarse, "rest": g - coarse, "g_cumsum": g}
    return case.tokens(**{name: stages.chunk_local_cumsum(x) for name, x in sums.items()})


def _chunk_scaled_dot_kkt(case: StageCase, compute_dtype: torch.dtype) -> Results:
    k, g, beta = case.chunks("k g beta", compute_dtype)
    return case.tokens(A=stages.chunk_scaled_dot_kkt(k, g, beta, compute_dtype=compute_dtype))


def _solve_tril(case: StageCase, compute_dtype: torch.dtype, A: str = "A") -> Results:
    return case.tokens(Ai=stages.solve_tril(*case.chunks(A, compute_dtype), compute_dtype=compute_dtype))


def _solve_fused_tril(case: StageCase, compute_dtype: torch.dtype) -> Results:
    exact = stages.solve_tril(*case.chunks("fused_A", compute_dtype))
    return {**_solve_tril(case, compute_dtype, "fused_A"), **case.tokens(sum_of_parts=exact)}


def _recompute_w_u(case: StageCase, compute_dtype: torch.dtype) -> Results:
    """In less than float64 rounded where the kernel rounds, for the limit: beta goes to k and v, not to Ai.

    With identical keys that differs: rows of Ai then subtract neighbours, and w is what roundings leave.
    """
    k, v, g, beta, Ai = case.chunks("k v g beta Ai", compute_dtype)
    if compute_dtype == torch.float64:
        w, u = stages.recompute_w_u(k, v, g, beta, Ai)
        return case.tokens(w=w, u=u)
    of_k = beta * stages.chunk_local_cumsum(g).exp()
    products = (
        stages.matmul(Ai, of_k[..., None] * k, compute_dtype),
        stages.matmul(Ai, beta[..., None] * v, compute_dtype),
    )
    w, u = (stages.round_to(x, compute_dtype) for x in products)
    return case.tokens(w=w, u=u)


def _chunk_delta_h(case: StageCase, compute_dtype: torch.dtype) -> Results:
    h, v_new, final_state = stages.chunk_delta_h(
        *case.chunks("k w u g", compute_dtype),
        chunk_offsets=case.chunk_offsets,
        initial_state=case.start(compute_dtype),
        compute_dtype=compute_dtype,
    )
    return {"h": h, **case.tokens(v_new=v_new), "final_state": final_state}


def _chunk_fwd_o(case: StageCase, compute_dtype: torch.dtype) -> Results:
    q, k, v_new, g = case.chunks("q k v_new g", compute_dtype)
    h = case["h"].to(stages.accumulation_dtype(compute_dtype))
    o = stages.chunk_fwd_o(q, k, v_new, h, g, scale=case.scale, compute_dtype=compute_dtype)
    return case.tokens(o=o)


def _fused_intra_chunk(case: StageCase, compute_dtype: torch.dtype) -> Results:
    """The formulas of the kernel's docstring; x and y normalise k and q."""
    q, k, g, beta = case.chunks("raw_q raw_k g beta", compute_dtype)
    x = y = torch.ones_like(g)
    if case.case.use_qk_l2norm_in_kernel:
        x, y = ((z.square().sum(-1) + case.eps).rsqrt() for z in (k, q))
    D, G = stages.pairwise_decay(g), stages.chunk_local_cumsum(g).exp()
    k = x[..., None] * k
    Aqk = stages.matmul(q, k.mT, compute_dtype) * D * y[..., None]
    A = stages.chunk_scaled_dot_kkt(k, g, beta, compute_dtype=compute_dtype)
    return case.tokens(
        A=A,
        Aqk=stages.round_to(Aqk, compute_dtype),
        of_v=beta,
        of_k=beta * G,
        of_q=y * G,
        to_end=D[..., -1, :],
        G=G,
        x=x,
    )


def _fused_inter_chunk(case: StageCase, compute_dtype: torch.dtype) -> Results:
    """The formulas of the kernel's docstring, chunk after chunk of each sequence."""
    q, k, v, Aqk = case.chunks("raw_q raw_k v Aqk", compute_dtype)
    Ai = [case.cut(part, compute_dtype) for part in case["fused_Ai"]]
    factors = [case.cut(x.T, compute_dtype)[..., None] for x in case["factors"]]
    of_v, of_k, of_q, to_end, G, x = factors
    k = x * k
    final_state, o = case.start(compute_dtype).clone(), torch.empty_like(v)
    for n, length in enumerate(case.case.seq_lens):
        S = final_state[n]
        for i, c in enumerate(range(*case.chunk_offsets[n : n + 2])):
            last = min(CHUNK_SIZE, length - i * CHUNK_SIZE) - 1
            v_new = of_v[c] * v[c] - of_k[c] * stages.matmul(k[c], S, compute_dtype)
            v_new = torch.stack([stages.matmul(part[c], v_new, compute_dtype) for part in Ai]).sum(0)
            o[c] = of_q[c] * stages.matmul(q[c], S, compute_dtype)
            o[c] = case.scale * (o[c] + stages.matmul(Aqk[c], v_new, compute_dtype))
            S = G[c, :, last, :, None] * S + stages.matmul(k[c].mT, to_end[c] * v_new, compute_dtype)
        final_state[n] = S
    return {**case.tokens(o=stages.round_to(o, compute_dtype)), "final_state": final_state}


class Call(NamedTuple):
    """What the options of a launcher are made of."""

    case: StageCase
    metadata: ChunkMetadata


def _chunks(call: Call) -> dict[str, Any]:
    metadata = call.metadata
    return {"cu_seqlens": metadata.cu_seqlens, "chunk_indices": metadata.chunk_indices_chunk64}


def _by_name(*names: str) -> Callable[[Any], Results]:
    return lambda results: dict(zip(names, results if len(names) > 1 else (results,), strict=True))


def _cumsum_results(g_cumsum: torch.Tensor) -> Results:
    coarse, rest = g_cumsum[..., None].unbind()
    return {"coarse": coarse, "rest": rest, "g_cumsum": coarse + rest}


def _parts_results(Ai: torch.Tensor) -> Results:
    return {"Ai": Ai[0], "sum_of_parts": Ai.float().sum(0)}


def _intra_results(results: tuple[torch.Tensor, torch.Tensor, torch.Tensor]) -> Results:
    A, Aqk, factors = results
    return {"A": A, "Aqk": Aqk, **dict(zip(FACTORS, factors.transpose(1, 2)[..., None], strict=True))}


@dataclass(frozen=True)
class Stage:
    """One kernel, and what it must compute.

    Attributes:
        kernel: of its module and of its launcher, the name.
        inputs: names of the tensors it is given, in order.
        reference: its results from the reference stages, in a compute_dtype.
        options: what else it is given.
        results: by name what it returned.
        with_initial_state: whether it takes an initial state.
    """

    kernel: str
    inputs: str
    reference: Callable[[StageCase, torch.dtype], Results]
    options: Callable[[Call], dict[str, Any]]
    results: Callable[[Any], Results]
    with_initial_state: bool = False

    @property
    def launcher(self) -> Launcher:
        """The function that launches the kernel; imports Triton."""
        return getattr(importlib.import_module(f"{KERNELS}.{self.kernel}"), self.kernel)


def _solve_options(call: Call) -> dict[str, Any]:
    return {
        "cu_seqlens": call.metadata.cu_seqlens,
        "block_indices": call.metadata.chunk_indices_large_block,
        "dtype": call.case.dtype,
    }


STAGES = {
    "l2norm": Stage("l2norm", "raw_k", _l2norm, lambda call: {"eps": call.case.eps}, _by_name("y")),
    "chunk_local_cumsum": Stage(
        "chunk_local_cumsum",
        "g",
        _chunk_local_cumsum,
        lambda call: {
            "cu_seqlens": call.metadata.cu_seqlens,
            "block_indices": call.metadata.block_indices_cumsum,
        },
        _cumsum_results,
    ),
    "chunk_scaled_dot_kkt": Stage(
        "chunk_scaled_dot_kkt", "k g_cumsum beta", _chunk_scaled_dot_kkt, _chunks, _by_name("A")
    ),
    "solve_tril": Stage("solve_tril", "A", _solve_tril, _solve_options, lambda Ai: {"Ai": Ai.squeeze(0)}),
    "recompute_w_u": Stage(
        "recompute_w_u", "k v g_cumsum beta Ai", _recompute_w_u, _chunks, _by_name("w", "u")
    ),
    "chunk_delta_h": Stage(
        "chunk_delta_h",
        "k w u g_cumsum",
        _chunk_delta_h,
        lambda call: {
            "cu_seqlens": call.metadata.cu_seqlens,
            "chunk_offsets": call.metadata.chunk_offsets_chunk64,
            "num_chunks": len(call.metadata.chunk_indices_chunk64),
        },
        _by_name("h", "v_new", "final_state"),
        with_initial_state=True,
    ),
    "chunk_fwd_o": Stage(
        "chunk_fwd_o",
        "q k v_new h g_cumsum",
        _chunk_fwd_o,
        lambda call: {"scale": call.case.scale, **_chunks(call)},
        _by_name("o"),
    ),
    "fused_intra_chunk": Stage(
        "fused_intra_chunk",
        "raw_q raw_k g beta",
        _fused_intra_chunk,
        lambda call: {
            "use_qk_l2norm_in_kernel": call.case.case.use_qk_l2norm_in_kernel,
            "eps": call.case.eps,
            **_chunks(call),
        },
        _intra_results,
    ),
    "fused_solve_tril": Stage(
        "solve_tril",
        "fused_A",
        _solve_fused_tril,
        lambda call: {**_solve_options(call), "num_parts": call.case.num_parts},
        _parts_results,
    ),
    "fused_inter_chunk": Stage(
        "fused_inter_chunk",
        "raw_q raw_k v fused_Ai Aqk factors",
        _fused_inter_chunk,
        lambda call: {
            "scale": call.case.scale,
            "use_qk_l2norm_in_kernel": call.case.case.use_qk_l2norm_in_kernel,
            "cu_seqlens": call.metadata.cu_seqlens,
        },
        _by_name("o", "final_state"),
        with_initial_state=True,
    ),
}

# Which results, of which stage, a tensor is made of.
SOURCES = {
    "g_cumsum": ("chunk_local_cumsum", ("coarse", "rest")),
    "A": ("chunk_scaled_dot_kkt", ("A",)),
    "Ai": ("solve_tril", ("Ai",)),
    "w": ("recompute_w_u", ("w",)),
    "u": ("recompute_w_u", ("u",)),
    "h": ("chunk_delta_h", ("h",)),
    "v_new": ("chunk_delta_h", ("v_new",)),
    "fused_A": ("fused_intra_chunk", ("A",)),
    "fused_Ai": ("fused_solve_tril", ("Ai", "sum_of_parts")),
    "Aqk": ("fused_intra_chunk", ("Aqk",)),
    "factors": ("fused_intra_chunk", FACTORS),
}


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """A context in which `torch.empty` is full of NaN."""
    empty = torch.empty

    def poisoned(*args: Any, **kwargs: Any) -> torch.Tensor:
        x = empty(*args, **kwargs)
        return x.fill_(float("nan")) if x.is_floating_point() else x

    with mock.patch.object(torch, "empty", poisoned):
        yield


def run_stage(
    name: str,
    case: StageCase,
    device: Device,
    *,
    launcher: Launcher | None = None,
    layout: Layout | None = None,
    metadata: ChunkMetadata | None = None,
) -> Results:
    """Run a stage on its exact inputs; its results on the CPU, the first dimension of tokens first.

    Args:
        name: a key of `STAGES`.
        case: the batch.
        device: where it runs.
        launcher: what to run. Default: the stage's own.
        layout: the same values of a named tensor on the device, otherwise in memory. Default: as they are.
        metadata: default: those of the case.
    """
    stage = STAGES[name]

    def on_device(name: str, x: torch.Tensor) -> torch.Tensor:
        x = x.to(device.torch_device)
        return x if layout is None else layout(name, x)

    tensors = [on_device(name, case[name]) for name in stage.inputs.split()]
    options = stage.options(Call(case, case.metadata(device) if metadata is None else metadata))
    if stage.with_initial_state:
        state = case.initial_state
        options["initial_state"] = None if state is None else on_device("initial_state", state)
    with poisoned_memory():
        results = stage.results((launcher or stage.launcher)(*tensors, **options))
    return {name: x.cpu() for name, x in results.items()}


class StageComparison(NamedTuple):
    """One result of a stage against the reference stage; a "sequence" of h is a chunk."""

    name: str
    comparison: Comparison

    @property
    def passed(self) -> bool:
        return self.comparison.passed

    def __str__(self) -> str:
        return f"{self.name}: {str(self.comparison).split(': ', 1)[1]}"


def check_stage(
    name: str, case: PrefillCase | StageCase, device: Device, **options: Any
) -> list[StageComparison]:
    """Run a stage and compare each of its results with the reference stage in float64.

    Rows of tokens that belong to no sequence must not have been written. The limit is that of what the stage
    rounds to: of float32 for `WIDE`, else of the dtype of the case.

    Args:
        name, device: as `run_stage`.
        case: the batch.
        options: more of `run_stage`.
    """
    case = case if isinstance(case, StageCase) else StageCase(case)
    results = run_stage(name, case, device, **options)
    return [
        StageComparison(f"{name}.{result}", compare_result(name, case, result, x))
        for result, x in results.items()
    ]


def compare_result(stage: str, case: StageCase, result: str, actual: torch.Tensor) -> Comparison:
    """Compare a result of a stage, on the CPU, with the reference stage in float64; as `check_stage`."""
    dtype = operands = torch.float32 if result in WIDE else case.dtype
    if (stage, result) == ("fused_intra_chunk", "A"):  # of keys that the kernel normalises and rounds
        operands = case.dtype
    truth, rounded = (case.reference(stage, of)[result] for of in (torch.float64, operands))
    none = Errors(0.0, 0.0)
    if result in ("h", "final_state"):
        dtype = torch.float32 if result == "final_state" else case.dtype
        own = compare_state(rounded, truth, dtype=rounded.dtype, operands=operands, limit=none)
        return compare_state(actual, truth, dtype=dtype, operands=operands, limit=limit(operands, own.errors))

    # Tokens. What stands behind the last sequence is compared with NaN, and then left out.
    end = case.bounds[-1]
    if len(actual) == case.num_tokens and not actual[end:].isnan().all():
        problem = f"rows behind token {end} belong to no sequence and were written"
        return Comparison("o", Errors(float("nan"), float("nan")), none, problem=problem)
    bounds = case.bounds
    truth, rounded = truth[None, :end], rounded[None, :end]
    own = compare_o(rounded, truth, dtype=rounded.dtype, bounds=bounds, limit=none)
    actual = actual[None, : len(actual) - case.case.padding]
    return compare_o(actual, truth, dtype=dtype, bounds=bounds, limit=limit(operands, own.errors))


# The decays that stages compute, one by one

HARD_LOG_DECAYS = (-math.inf, -1e3, -128.0, -127.9, -20.0, -1.0, -(2.0**-10), -1e-3, -1e-6, -1e-12, 0.0)
LENGTHS = (CHUNK_SIZE, 37)
HEADS = 2

Observed = tuple[torch.Tensor, torch.Tensor]  # a decay, and the log of what it should be


class DecayProbe:
    """Inputs with which a stage returns nothing but decays: keys of length one in one direction.

    Args:
        g: log decays `[sum of LENGTHS, HEADS]` float32.
        device: where the stages run.
        launchers: of stages, by name, where they are others than their own.
    """

    def __init__(self, g: torch.Tensor, device: Device, launchers: dict[str, Launcher] | None = None) -> None:
        self.launchers = launchers or {}
        builder = ChunkMetadataBuilder(device, sum(LENGTHS), len(LENGTHS), HEADS)
        self.metadata = builder.build(torch.tensor([0, LENGTHS[0], sum(LENGTHS)]))
        self.bounds = list(self.metadata.cu_seqlens_host)
        self.tensors = {"device": device.torch_device, "dtype": torch.float32}
        self.g = g.to(device.torch_device)
        self.chunks = {
            "cu_seqlens": self.metadata.cu_seqlens,
            "chunk_indices": self.metadata.chunk_indices_chunk64,
        }
        self.g_cumsum = self.run(
            "chunk_local_cumsum",
            self.g,
            cu_seqlens=self.metadata.cu_seqlens,
            block_indices=self.metadata.block_indices_cumsum,
        )
        g_chunks = stages.to_chunks(g.double(), self.bounds, CHUNK_SIZE)
        after_j = torch.ones(CHUNK_SIZE, CHUNK_SIZE, dtype=torch.bool).tril(-1)
        self.log_D = torch.where(after_j, g_chunks[..., :, None], 0.0).cumsum(-2)
        self.log_G = g_chunks.cumsum(-1)

    def run(self, stage: str, *tensors: torch.Tensor, **options: Any) -> Any:
        launcher = self.launchers.get(stage) or STAGES[stage].launcher
        with poisoned_memory():
            return launcher(*tensors, **options)

    def rows(self, heads: int = HEADS, D: int = 16) -> torch.Tensor:
        """`[T, heads, D]`, each row 1, 0, 0, ..."""
        x = torch.zeros((sum(LENGTHS), heads, D), **self.tensors)
        x[..., 0] = 1
        return x

    def steps(self, D: int = CHUNK_SIZE) -> torch.Tensor:
        """`[T, HEADS, D]`, row i of a chunk 1 in column i."""
        t = torch.cat([torch.arange(length) for length in LENGTHS])
        return torch.nn.functional.one_hot(t, D).to(**self.tensors)[:, None].repeat(1, HEADS, 1)

    def pairs(self, x: torch.Tensor, diagonal: int) -> Observed:
        """What a stage returned for pairs of tokens, against D; zero above the diagonal."""
        found = stages.to_chunks(x.double().cpu(), self.bounds, CHUNK_SIZE)
        kept = torch.ones(CHUNK_SIZE, CHUNK_SIZE, dtype=torch.bool).tril(diagonal)
        assert not found[:, :, ~kept].count_nonzero()
        valid = torch.zeros(found.shape[:3], dtype=torch.bool)
        for c, length in enumerate(LENGTHS):
            valid[c, :, :length] = True
        lanes = kept & valid[..., :, None]
        return found[lanes], self.log_D.expand_as(found)[lanes]

    def tokens(self, x: torch.Tensor, log: torch.Tensor) -> Observed:
        """What a stage returned for tokens `[T, HEADS]`."""
        log = stages.from_chunks(log[..., None], self.bounds, sum(LENGTHS))[..., 0]
        return x.double().cpu(), log

    @property
    def log_to_end(self) -> torch.Tensor:
        return torch.stack([self.log_D[c, :, length - 1] for c, length in enumerate(LENGTHS)])


def _of_kkt(probe: DecayProbe) -> Iterator[Observed]:
    beta = torch.ones_like(probe.g)
    yield probe.pairs(
        probe.run("chunk_scaled_dot_kkt", probe.rows(), probe.g_cumsum, beta, **probe.chunks), -1
    )


def _of_recompute_w_u(probe: DecayProbe) -> Iterator[Observed]:
    rows, beta = probe.rows(), torch.ones_like(probe.g)
    w, u = probe.run("recompute_w_u", rows, rows, probe.g_cumsum, beta, probe.steps(), **probe.chunks)
    yield probe.tokens(w[..., 0], probe.log_G)
    assert torch.equal(u, rows)


def _of_chunk_delta_h(probe: DecayProbe) -> Iterator[Observed]:
    """Each token writes a row of its own; then a state of ones, of which what is left is G of the last."""
    metadata, v = probe.metadata, probe.rows()
    for k, u in ((probe.steps(), v), (probe.steps(), torch.zeros_like(v))):
        state = torch.zeros((len(LENGTHS), HEADS, CHUNK_SIZE, v.shape[-1]), **probe.tensors)
        state[..., 1] = 1
        _, _, final_state = probe.run(
            "chunk_delta_h",
            k,
            torch.zeros_like(k),
            u,
            probe.g_cumsum,
            initial_state=state,
            cu_seqlens=metadata.cu_seqlens,
            chunk_offsets=metadata.chunk_offsets_chunk64,
            num_chunks=len(LENGTHS),
        )
        final_state = final_state.cpu().double()
        for n, length in enumerate(LENGTHS):
            if u is v:
                yield final_state[n, :, :length, 0], probe.log_to_end[n, :, :length]
            yield final_state[n, :, :, 1], probe.log_G[n, :, length - 1, None].expand(-1, CHUNK_SIZE)


def _of_chunk_fwd_o(probe: DecayProbe) -> Iterator[Observed]:
    """Values with a column for each token; then none, and a state to read."""
    rows, steps = probe.rows(), probe.steps()
    h = torch.zeros((len(LENGTHS), HEADS, 16, CHUNK_SIZE), **probe.tensors)
    run = partial(probe.run, "chunk_fwd_o", rows, rows, scale=1.0, **probe.chunks)
    yield probe.pairs(run(steps, h, probe.g_cumsum), 0)
    o = run(torch.zeros_like(steps), h + 1, probe.g_cumsum)
    yield probe.tokens(o[..., 0], probe.log_G)


def _of_fused_intra_chunk(probe: DecayProbe) -> Iterator[Observed]:
    rows, beta = probe.rows(), torch.ones_like(probe.g)
    A, Aqk, factors = probe.run(
        "fused_intra_chunk",
        *(rows, rows, probe.g, beta),
        use_qk_l2norm_in_kernel=False,
        eps=1e-6,
        **probe.chunks,
    )
    yield probe.pairs(A, -1)
    yield probe.pairs(Aqk, 0)
    for factor, log in ((1, probe.log_G), (2, probe.log_G), (3, probe.log_to_end), (4, probe.log_G)):
        yield probe.tokens(factors[factor].T, log)


PROBES: dict[str, Callable[[DecayProbe], Iterator[Observed]]] = {
    "chunk_scaled_dot_kkt": _of_kkt,
    "recompute_w_u": _of_recompute_w_u,
    "chunk_delta_h": _of_chunk_delta_h,
    "chunk_fwd_o": _of_chunk_fwd_o,
    "fused_intra_chunk": _of_fused_intra_chunk,
}


def _assert_decays(found: torch.Tensor, log: torch.Tensor) -> None:
    """Relative error below 1e-6 down to exp(-4), below that of a float32 exponent beyond; 0 where it is."""
    truth, tiny = log.exp(), torch.finfo(torch.float32).tiny
    normal = truth >= tiny
    error = (found[normal] / truth[normal] - 1).abs()
    allowed = 2**-22 * (-log[normal]).clamp(min=4.0)
    worst = (error / allowed).argmax() if len(error) else None
    assert (error <= allowed).all(), (error[worst], log[normal][worst])
    assert (found[~normal].abs() <= 2 * tiny).all()
    assert (found[log == -math.inf] == 0).all()


def check_decays(stage: str, seed: int, device: Device, launcher: Launcher | None = None) -> None:
    """Raise unless every decay that a stage computes is exact, for hard log decays drawn from a seed."""
    rng = torch.Generator().manual_seed(seed)
    # Odd seeds draw small ones only, so that those from end to end of a chunk are not all 0.
    values = torch.tensor(HARD_LOG_DECAYS[-5:] if seed % 2 else HARD_LOG_DECAYS)
    values = values[torch.randperm(len(values), generator=rng)[: 2 + seed % 4]]
    g = values[torch.randint(len(values), (sum(LENGTHS), HEADS), generator=rng)]
    launchers = {} if launcher is None else {stage: launcher}
    for found, log in PROBES[stage](DecayProbe(g, device, launchers)):
        _assert_decays(found, log)


def load_mutant(
    kernel: str, old: str, new: str, directory: Path, *, file: str | None = None, count: int | None = 1
) -> ModuleType:
    """The module of a kernel with a place of its source changed, beside the one that is left as it is.

    Args:
        kernel: name of the module.
        old, new: what to replace, and by what.
        directory: where the changed source is written; a mutant there is overwritten.
        file: the module that holds the place, where the kernel only imports it. Default: kernel.
        count: how often the source must hold `old`; None for any number but 0.
    """
    file = file or kernel
    source = _source_of(file)
    found = source.count(old)
    assert found == count or (count is None and found), f"out of date: {file}.py has {old!r} {found} times"
    mutated = _load(file, source.replace(old, new), directory)
    if file == kernel:
        return mutated
    source = _source_of(kernel)
    assert f"from .{file} import" in source, f"{kernel}.py does not import {file}.py"
    with mock.patch.dict(sys.modules, {mutated.__name__: mutated}):
        return _load(
            kernel, source.replace(f"from .{file} import", f"from {mutated.__name__} import"), directory
        )


def _source_of(name: str) -> str:
    file = importlib.import_module(f"{KERNELS}.{name}").__file__
    assert file is not None
    return Path(file).read_text()


def _load(name: str, source: str, directory: Path) -> ModuleType:
    """`source`, written into a file of its own and imported; what it imports beside it is the original."""
    path = directory / f"mutated_{name}.py"
    path.write_text(re.sub(r"^from \.(\w)", rf"from {KERNELS}.\1", source, flags=re.MULTILINE))
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
