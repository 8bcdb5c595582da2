"""Which memory the Triton kernels address in batches that no memory holds, against offsets in Python ints.

Tensors are on the meta device, the metadata are real; chosen programs run in the interpreter, which reports
every address. The batches put chunks astride offsets of 2**31 and 2**32 elements, where 32 bits would wrap.
"""

import importlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cached_property
from itertools import pairwise, product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from ascend_twin.equivalence_tests.devices import interprets
from ascend_twin.equivalence_tests.interpreter import AddressError, run_launch, touched
from ascend_twin.equivalence_tests.kernel_stages import KERNELS, load_mutant
from ascend_twin.optimized.gdn import ChunkMetadata, ChunkMetadataBuilder, open_device
from ascend_twin.optimized.gdn.device import Device
from ascend_twin.optimized.gdn.kernels.block_sizes import (
    CHUNK_SIZE,
    L2NORM_BLOCK_SIZE,
    SOLVE_TRIL_BLOCK_SIZE,
    cumsum_block_size,
    value_block_size,
)

if TYPE_CHECKING:
    from ascend_twin.optimized.gdn.kernels.launch import Launch

H, HV, K, V = 16, 32, 128, 128
GROUP, NV = HV // H, V // value_block_size(K, V)
NUM_TOKENS = 2**22
EDGE = 2**31
SHORT = 140  # three chunks, the second astride a boundary

SLOTS = 80_000  # of a pool of states

# Tokens at which offsets pass 2**31 elements: of h (at chunk 4096, three being of the first sequence), of v
# and o, of q, k and A; and at which the latter pass 2**32.
BOUNDARIES = (
    SHORT + (EDGE // (HV * K * V) - 3) * CHUNK_SIZE,
    EDGE // (HV * V),
    EDGE // (H * K),
    2 * EDGE // (H * K),
)

Offsets = np.ndarray
Expected = dict[tuple[str, str], Offsets]
Index = int | range


def seq_lens() -> list[int]:
    """A short sequence, long ones with short ones astride each boundary, short ones; 33 tokens of none."""
    lens, end = [SHORT], SHORT
    for boundary in BOUNDARIES:
        start = boundary - CHUNK_SIZE
        lens += [start - end, SHORT]
        end = start + SHORT
    tail = [0, 100, 0, CHUNK_SIZE]
    return [*lens, NUM_TOKENS - end - sum(tail) - 33, *tail]


def cells(x: torch.Tensor, *index: Index) -> Offsets:
    """Offsets of elements of a tensor, sorted."""
    offsets = np.zeros(1, dtype=np.int64)
    for i, stride in zip(index, x.stride(), strict=True):
        steps = np.array([i] if isinstance(i, int) else i, dtype=np.int64) * stride
        offsets = (offsets[:, None] + steps).ravel()
    return np.unique(offsets)


def either(*offsets: Offsets) -> Offsets:
    return np.unique(np.concatenate(offsets))


class Batch:
    """A batch on the meta device, and the launches of both paths on it."""

    def __init__(self, seq_lens: list[int], num_tokens: int, layout: str) -> None:
        self.bounds = [0, *np.cumsum(seq_lens, dtype=np.int64).tolist()]
        self.T, self.N = num_tokens, len(seq_lens)
        self.metadata = self._metadata()
        self.chunks: list[list[int]] = self.metadata.chunk_indices_chunk64.tolist()
        self.launches: dict[str, list[Launch]] = {}
        # Without l2norm the staged kernels read q and k as they lie in memory.
        for path, use_qk_l2norm_in_kernel in (("staged", False), ("staged", True), ("fused", True)):
            for launch in self._record(path, layout, use_qk_l2norm_in_kernel):
                self.launches.setdefault(launch.name.removesuffix("_kernel"), []).append(launch)
        self.launches = {name: _first_call(launches) for name, launches in self.launches.items()}

    def _metadata(self) -> ChunkMetadata:
        builder = ChunkMetadataBuilder(open_device("cpu"), self.T, self.N, HV, depth=1)
        return builder.build(torch.tensor(self.bounds))

    def _record(self, path: str, layout: str, use_qk_l2norm_in_kernel: bool) -> "list[Launch]":
        launch = importlib.import_module(f"{KERNELS}.launch")
        paths = importlib.import_module(f"{KERNELS.rpartition('.')[0]}.triton_paths")
        tensors = LAYOUTS[layout](self.T, self.N)
        q, k, v, g, beta = (x.unsqueeze(0) for x in tensors[:5])
        with launch.recorded_launches() as launches:
            getattr(paths, f"{path}_chunk_gated_delta_rule")(
                *(q, k, v, g, beta),
                scale=1.0,
                initial_state=tensors[5],
                use_qk_l2norm_in_kernel=use_qk_l2norm_in_kernel,
                eps=1e-6,
                metadata=self.metadata,
            )
        given = {x.stride() for x in tensors}
        read = [x for launch in launches for x in launch.arguments.values() if isinstance(x, torch.Tensor)]
        assert given <= {x.stride() for x in read}, "inputs were copied: their strides were not tried"
        return launches

    def rows(self, n: int, first: int = 0, count: int | None = None) -> range:
        """Tokens of sequence n, from its `first` one, at most `count`."""
        start, end = self.bounds[n] + first, self.bounds[n + 1]
        return range(start, end if count is None else min(start + count, end))

    @cached_property
    def short(self) -> list[int]:
        """Sequences of at most three chunks."""
        return [n for n, (start, end) in enumerate(pairwise(self.bounds)) if end - start <= SHORT]


def _first_call(launches: "list[Launch]") -> "list[Launch]":
    """The launches that the first call of a kernel was split into."""
    starts = [i for i, launch in enumerate(launches) if launch.arguments["first_program"] == 0]
    return launches[: [*starts, len(launches)][1]]


def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def contiguous(T: int, N: int) -> tuple[torch.Tensor, ...]:
    f32 = torch.float32
    return (
        *(empty(T, H, K), empty(T, H, K), empty(T, HV, V)),
        *(empty(T, HV, dtype=f32), empty(T, HV)),
        empty(N, HV, K, V, dtype=f32),
    )


def in_a_projection(T: int, N: int) -> tuple[torch.Tensor, ...]:
    """Columns of one projection; states in slots of a pool, far apart."""
    q, k, v, g, beta = empty(T, 2 * H * K + HV * V + 2 * HV).split([H * K, H * K, HV * V, HV, HV], dim=1)
    pool, step = empty(SLOTS, HV, K, V, dtype=torch.float32), SLOTS // N
    return q.unflatten(1, (H, K)), k.unflatten(1, (H, K)), v.unflatten(1, (HV, V)), g, beta, pool[::step][:N]


def heads_first(T: int, N: int) -> tuple[torch.Tensor, ...]:
    """All tokens of a head, then the next head; so the states, in a pool of many slots."""
    f32 = torch.float32
    pool = empty(HV, SLOTS, K, V + 8, dtype=f32)[..., :V]
    heads = empty(H, T, K), empty(H, T, K), empty(HV, T, V), empty(HV, T, dtype=f32), empty(HV, T)
    return (*(x.transpose(0, 1) for x in heads), pool[:, :N].transpose(0, 1))


LAYOUTS: dict[str, Callable[[int, int], tuple[torch.Tensor, ...]]] = {
    "contiguous": contiguous,
    "in a projection": in_a_projection,
    "heads first": heads_first,
}


# What a program must address, by its number, kernel by kernel: the definition of the work of a program.


def table(name: str, row: int) -> Expected:
    return {(name, "load"): np.array([2 * row, 2 * row + 1])}


def bounds(n: int) -> Expected:
    return {("cu_seqlens", "load"): np.array([n, n + 1])}


def of_tokens(x: dict[str, Any], kind: str, names: str, *index: Index) -> Expected:
    return {(name, kind): cells(x[name], *index) for name in names.split()}


def of_l2norm(batch: Batch, x: dict[str, Any], program: int) -> Expected:
    t, h = divmod(program, H)
    rows = range(t * L2NORM_BLOCK_SIZE, min((t + 1) * L2NORM_BLOCK_SIZE, batch.T))
    return {**of_tokens(x, "load", "x", rows, h, range(K)), **of_tokens(x, "store", "y", rows, h, range(K))}


def of_chunk_local_cumsum(batch: Batch, x: dict[str, Any], program: int) -> Expected:
    n, i = batch.metadata.block_indices_cumsum[program].tolist()
    rows = batch.rows(n, i * cumsum_block_size(HV), cumsum_block_size(HV))
    return {
        **table("block_indices", program),
        **bounds(n),
        **of_tokens(x, "load", "g", rows, range(HV)),
        **of_tokens(x, "store", "g_cumsum", range(2), rows, range(HV)),
    }


def of_solve_tril(batch: Batch, x: dict[str, Any], program: int) -> Expected:
    b, hv = divmod(program, HV)
    n, i = batch.metadata.chunk_indices_large_block[b].tolist()
    rows = batch.rows(n, i * SOLVE_TRIL_BLOCK_SIZE, SOLVE_TRIL_BLOCK_SIZE)
    return {
        **table("block_indices", b),
        **bounds(n),
        **of_tokens(x, "load", "A", rows, hv, range(CHUNK_SIZE)),
        **of_tokens(x, "store", "Ai", range(len(x["Ai"])), rows, hv, range(CHUNK_SIZE)),
    }


def of_chunk(batch: Batch, x: dict[str, Any], c: int) -> tuple[range, Expected]:
    n, i = batch.chunks[c]
    return batch.rows(n, i * CHUNK_SIZE, CHUNK_SIZE), {**table("chunk_indices", c), **bounds(n)}


def of_chunk_scaled_dot_kkt(batch: Batch, x: dict[str, Any], program: int) -> Expected:
    c, hv = divmod(program, HV)
    rows, tables = of_chunk(batch, x, c)
    return {
        **tables,
        **of_tokens(x, "load", "k", rows, hv // GROUP, range(K)),
        **of_tokens(x, "load", "beta", rows, hv),
        **of_tokens(x, "load", "g_cumsum", range(2), rows, hv),
        **of_tokens(x, "store", "A", rows, hv, range(CHUNK_SIZE)),
    }


def of_recompute_w_u(batch: Batch, x: dict[str, Any], program: int) -> Expected:
    c, hv = divmod(program, HV)
    rows, tables = of_chunk(batch, x, c)
    return {
        **tables,
        **of_tokens(x, "load", "k", rows, hv // GROUP, range(K)),
        **of_tokens(x, "load", "v", rows, hv, range(V)),
        **of_tokens(x, "load", "beta", rows, hv),
        **of_tokens(x, "load", "Ai", rows, hv, range(CHUNK_SIZE)),
        **of_tokens(x, "load", "g_cumsum", range(2), rows, hv),
        **of_tokens(x, "store", "w", rows, hv, range(K)),
        **of_tokens(x, "store", "u", rows, hv, range(V)),
    }


def columns(i_v: int) -> range:
    return range(i_v * (V // NV), (i_v + 1) * (V // NV))


def of_chunk_delta_h(batch: Batch, x: dict[str, Any], program: int) -> Expected:
    (n, hv), b_v = divmod(program // NV, HV), columns(program % NV)
    rows, offsets = batch.rows(n), batch.metadata.chunk_offsets_chunk64
    return {
        **bounds(n),
        ("chunk_offsets", "load"): np.array([n]),
        **of_tokens(x, "load", "initial_state", n, hv, range(K), b_v),
        **of_tokens(x, "load", "k", rows, hv // GROUP, range(K)),
        **of_tokens(x, "load", "w", rows, hv, range(K)),
        **of_tokens(x, "load", "u", rows, hv, b_v),
        **of_tokens(x, "load", "g_cumsum", range(2), rows, hv),
        **of_tokens(x, "store", "h", range(*offsets[n : n + 2].tolist()), hv, range(K), b_v),
        **of_tokens(x, "store", "v_new", rows, hv, b_v),
        **of_tokens(x, "store", "final_state", n, hv, range(K), b_v),
    }


def of_chunk_fwd_o(batch: Batch, x: dict[str, Any], program: int) -> Expected:
    (c, hv), b_v = divmod(program // NV, HV), columns(program % NV)
    rows, tables = of_chunk(batch, x, c)
    return {
        **tables,
        **of_tokens(x, "load", "q k", rows, hv // GROUP, range(K)),
        **of_tokens(x, "load", "v_new", rows, hv, b_v),
        **of_tokens(x, "load", "h", c, hv, range(K), b_v),
        **of_tokens(x, "load", "g_cumsum", range(2), rows, hv),
        **of_tokens(x, "store", "o", rows, hv, b_v),
    }


def of_fused_intra_chunk(batch: Batch, x: dict[str, Any], program: int) -> Expected:
    c, hv = divmod(program, HV)
    rows, tables = of_chunk(batch, x, c)
    return {
        **tables,
        **of_tokens(x, "load", "q k", rows, hv // GROUP, range(K)),
        **of_tokens(x, "load", "g beta", rows, hv),
        **of_tokens(x, "store", "A Aqk", rows, hv, range(CHUNK_SIZE)),
        **of_tokens(x, "store", "factors", range(len(x["factors"])), hv, rows),
    }


def of_fused_inter_chunk(batch: Batch, x: dict[str, Any], program: int) -> Expected:
    (n, hv), b_v = divmod(program // NV, HV), columns(program % NV)
    rows, factors, G = batch.rows(n), x["factors"], 4
    lasts = [*rows[CHUNK_SIZE - 1 :: CHUNK_SIZE], *rows[-1:]]
    whole = [cells(factors, f, hv, rows) for f in range(len(factors)) if f != G]
    return {
        **bounds(n),
        **of_tokens(x, "load", "initial_state", n, hv, range(K), b_v),
        **of_tokens(x, "load", "q k", rows, hv // GROUP, range(K)),
        **of_tokens(x, "load", "v", rows, hv, b_v),
        **of_tokens(x, "load", "Ai", range(len(x["Ai"])), rows, hv, range(CHUNK_SIZE)),
        **of_tokens(x, "load", "Aqk", rows, hv, range(CHUNK_SIZE)),
        ("factors", "load"): either(*whole, *(cells(factors, G, hv, t) for t in lasts)),
        **of_tokens(x, "store", "o", rows, hv, b_v),
        **of_tokens(x, "store", "final_state", n, hv, range(K), b_v),
    }


KERNEL_NAMES = (
    "l2norm",
    "chunk_local_cumsum",
    "chunk_scaled_dot_kkt",
    "solve_tril",
    "recompute_w_u",
    "chunk_delta_h",
    "chunk_fwd_o",
    "fused_intra_chunk",
    "fused_inter_chunk",
)
READ_NO_HEADS_BY_STRIDE = ("chunk_local_cumsum", "solve_tril")
EXPECTED: dict[str, Callable[[Batch, dict[str, Any], int], Expected]] = {
    name: globals()[f"of_{name}"] for name in KERNEL_NAMES
}


def chosen_programs(batch: Batch, kernel: str) -> Iterator[int]:
    """Programs of the first and last heads and columns, of places at both ends and astride each boundary."""
    near = {t for n in batch.short for t in (batch.bounds[n], batch.bounds[n + 1] - 1) if batch.rows(n)}
    if kernel == "l2norm":
        for t, h in product(sorted({0, *(t // L2NORM_BLOCK_SIZE for t in (*near, batch.T - 1))}), (0, H - 1)):
            yield t * H + h
    elif kernel in ("chunk_delta_h", "fused_inter_chunk"):  # a program of a long sequence would take for ever
        for n, hv, i_v in product(batch.short, (0, HV - 1), (0, NV - 1)):
            yield (n * HV + hv) * NV + i_v
    else:
        pairs = {
            "chunk_local_cumsum": batch.metadata.block_indices_cumsum,
            "solve_tril": batch.metadata.chunk_indices_large_block,
        }.get(kernel, batch.metadata.chunk_indices_chunk64)
        short = torch.isin(pairs[:, 0], torch.tensor(batch.short)).nonzero()[:, 0].tolist()
        heads = (0,) if kernel == "chunk_local_cumsum" else (0, HV - 1)
        of_heads, of_columns = (1 if kernel == "chunk_local_cumsum" else HV), 1
        if kernel == "chunk_fwd_o":
            of_columns = NV
        for i, hv, i_v in product(sorted({0, *short}), heads, sorted({0, of_columns - 1})):
            yield (i * of_heads + hv) * of_columns + i_v


def check_addresses(
    batch: Batch, kernel: str, programs: list[int], launches: "list[Launch] | None" = None
) -> list[int]:
    """Run programs, of whatever launch has them, and compare what they address; the largest offsets seen."""
    launches = launches or batch.launches[kernel]
    largest = []
    for launch in launches:
        first = launch.arguments["first_program"]
        mine = [p for p in programs if first <= p < first + launch.num_programs]
        if not mine:
            continue
        accesses = run_launch(launch, [p - first for p in mine])
        for program in mine:
            own = [a for a in accesses if a.program == program - first]
            expected = EXPECTED[kernel](batch, launch.arguments, program)
            expected = {key: offsets for key, offsets in expected.items() if len(offsets)}
            assert {(a.parameter, a.kind) for a in own} == expected.keys(), f"program {program}"
            for (parameter, kind), offsets in expected.items():
                found = touched(own, parameter, kind)
                assert np.array_equal(found, offsets), f"program {program} {kind}s others of {parameter}"
                largest.append(int(offsets.max()))
    return largest


@pytest.fixture(scope="module", autouse=True)
def interpreted(device: Device, triton_runs: None) -> None:
    if not interprets(device):
        pytest.skip("addresses are checked in the interpreter, on the CPU; they are the same on any device")


@pytest.fixture(scope="module", params=LAYOUTS)
def batch(request: pytest.FixtureRequest, interpreted: None) -> Batch:
    return Batch(seq_lens(), NUM_TOKENS, request.param)


@pytest.mark.parametrize("kernel", KERNEL_NAMES)
def test_kernel_addresses_what_it_should(kernel: str, batch: Batch):
    programs = sorted(chosen_programs(batch, kernel))
    assert sum(x.num_programs for x in batch.launches[kernel]) > programs[-1]
    largest = check_addresses(batch, kernel, programs)
    if kernel != "chunk_local_cumsum":
        assert max(largest) > EDGE


def test_sequences_stand_astride_the_boundaries():
    bounds = [0, *np.cumsum(seq_lens()).tolist()]
    astride = [range(start, end) for start, end in pairwise(bounds) if end - start == SHORT][1:]
    assert all(boundary in tokens for boundary, tokens in zip(BOUNDARIES, astride, strict=True))
    assert bounds[-1] + 33 == NUM_TOKENS
    chunks_before = sum(-(-length // CHUNK_SIZE) for length in seq_lens()[:2])
    assert (chunks_before + 1) * HV * K * V == EDGE


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kernel", ["chunk_delta_h", "fused_inter_chunk"])
def test_kernel_addresses_the_states_of_many_sequences(kernel: str, layout: str):
    lens = [n % 2 for n in range(5000)]
    batch = Batch(lens, sum(lens), layout)
    sequences = (0, 1, EDGE // (HV * K * V) - 1, EDGE // (HV * K * V), 4999)
    programs = [(n * HV + hv) * NV + i_v for n, hv, i_v in product(sequences, (0, HV - 1), (0, NV - 1))]
    assert max(check_addresses(batch, kernel, programs)) > EDGE


def check_mutant(batch: Batch, kernel: str, old: str, new: str, directory: Path) -> None:
    """The first program of a mutant addresses what it should, if that is near, and the last does not."""
    module = load_mutant(kernel, old, new, directory, count=None)
    launches = [replace(x, kernel=getattr(module, f"{kernel}_kernel")) for x in batch.launches[kernel]]
    programs = sorted(chosen_programs(batch, kernel))
    if max(check_addresses(batch, kernel, programs[:1])) < EDGE:
        check_addresses(batch, kernel, programs[:1], launches)
    with pytest.raises((AddressError, AssertionError)):
        check_addresses(batch, kernel, programs[-1:], launches)


@pytest.mark.parametrize("kernel", KERNEL_NAMES)
def test_check_addresses_catches_offsets_of_32_bits(kernel: str, tmp_path: Path):
    batch = Batch(seq_lens(), NUM_TOKENS, "in a projection")
    check_mutant(batch, kernel, ".to(tl.int64)", "", tmp_path)


@pytest.mark.parametrize("kernel", [name for name in KERNEL_NAMES if name not in READ_NO_HEADS_BY_STRIDE])
def test_check_addresses_catches_heads_of_32_bits(kernel: str, tmp_path: Path):
    batch, heads = Batch(seq_lens(), NUM_TOKENS, "heads first"), "H" if kernel == "l2norm" else "HV"
    check_mutant(batch, kernel, f"% {heads}).to(tl.int64)", f"% {heads})", tmp_path)
