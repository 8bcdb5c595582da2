"""Calls of the op that show known bugs, and what an implementation with the bug makes of them.

A fault is a function around an implementation, `fault(run, q, k, v, g, beta, **options)`, with the signature
of `IMPLEMENTATIONS[...].run` behind `run`. Around the definition it makes the file of a wrong recording;
around an implementation it puts the bug back.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch

from ..fixtures.store import Fixture
from ..optimized.gdn.device import open_device
from ..optimized.gdn.kernels.block_sizes import CHUNK_SIZE, SOLVE_TRIL_BLOCK_SIZE
from ..optimized.gdn.metadata import ChunkMetadata, ChunkMetadataBuilder
from ..reference.gdn import recurrent_gated_delta_rule, stages
from ..reference.gdn.inputs import scale_or_default
from ..reference.gdn.metadata import chunk_offsets
from .cases import PrefillCase, fixture_config
from .known_bugs import RecordedCase, Wrong

Result = tuple[torch.Tensor, torch.Tensor]
Run = Callable[..., Result]
Fault = Callable[..., Result]
Tensors = dict[str, torch.Tensor]

EPS = 1e-6


@dataclass(frozen=True)
class Call:
    """A call of the op that shows a bug: as inputs alone, and as whoever has the bug would record it.

    Attributes:
        name: of its files, without folder and suffix.
        title: one line.
        batch: the call.
        fault: what goes wrong.
        wrong: what a replay of the recording must find.
        wrong_batch: what was recorded, where that is not `batch`.
        is_dense: whether its sequences, of equal length, are rows of the call, and not packed.
        tables: what the call read as metadata, from the lengths, where that is recorded.
        stages: what the stages gave, where that is recorded; called as the definition is.
    """

    name: str
    title: str
    batch: PrefillCase
    fault: Fault
    wrong: Wrong
    wrong_batch: PrefillCase | None = None
    is_dense: bool = False
    tables: Callable[[Sequence[int]], Tensors] | None = None
    stages: Callable[..., Tensors] | None = None

    @property
    def right_case(self) -> RecordedCase:
        """The file of the inputs."""
        return RecordedCase(f"gdn/{self.name}.safetensors", self.title, self._inputs)

    @property
    def wrong_case(self) -> RecordedCase:
        """The file of the recording."""
        path, title = f"gdn/{self.name}_wrong.safetensors", f"{self.title}: as it went wrong"
        return RecordedCase(path, title, self._recording, self.wrong)

    def _inputs(self) -> Fixture:
        return self._fixture(self.batch, {})

    def _recording(self) -> Fixture:
        batch = self.wrong_batch or self.batch
        inputs = batch.inputs()
        options: dict[str, Any] = {
            "scale": scale_or_default(None, batch.K),
            "initial_state": inputs.initial_state,
            "use_qk_l2norm_in_kernel": batch.use_qk_l2norm_in_kernel,
            "eps": EPS,
            "metadata": metadata_of(batch.seq_lens, batch.HV),
        }
        o, final_state = self.fault(definition, *inputs[:5], **options)
        found = {"seen.o": o.to(inputs.q.dtype), "seen.final_state": final_state.float()}
        if self.tables is not None:
            found |= {f"metadata.{name}": x for name, x in self.tables(batch.seq_lens).items()}
        if self.stages is not None:
            results = self.stages(*inputs[:5], **options)
            found |= {f"stage.{name}": x.float() for name, x in results.items()}
        return self._fixture(batch, found)

    def _fixture(self, batch: PrefillCase, found: Tensors) -> Fixture:
        tensors = {name: x for name, x in batch.inputs()._asdict().items() if x is not None} | found
        if self.is_dense:
            del tensors["cu_seqlens"]
            shape = len(batch.seq_lens), batch.seq_lens[0]
            tensors = {
                name: x if name.endswith("state") else x[0].unflatten(0, shape) for name, x in tensors.items()
            }
        return Fixture("gdn", fixture_config(batch, None), tensors)


def metadata_of(lens: Sequence[int], num_value_heads: int) -> ChunkMetadata:
    """Metadata of packed sequences, on the CPU."""
    builder = ChunkMetadataBuilder(open_device("cpu"), max(1, sum(lens)), max(1, len(lens)), num_value_heads)
    return builder.build(torch.tensor([0, *accumulate(lens)]))


def definition(*tensors: torch.Tensor, metadata: ChunkMetadata, **options: Any) -> Result:
    """The recurrence in float64, called as an implementation is."""
    bounds = torch.tensor(metadata.cu_seqlens_host)
    o, final_state = recurrent_gated_delta_rule(
        *tensors, cu_seqlens=bounds, output_final_state=True, **options
    )
    assert final_state is not None  # asked for
    return o, final_state


# Faults. Each does to the results what the bug does to them.


def compact_ranks(run: Run, *tensors: torch.Tensor, metadata: ChunkMetadata, **options: Any) -> Result:
    """Chunks whose number leads elsewhere are computed by nobody: what they add to the state is missing."""
    q, k, v, g, beta = (x.clone() for x in tensors)
    lens, bounds = metadata.seq_lens_host.tolist(), metadata.cu_seqlens_host
    is_lost = torch.ones(q.shape[1], dtype=torch.bool)
    for rank, chunk in compact_pairs(lens, CHUNK_SIZE):
        start = bounds[rank] + chunk * CHUNK_SIZE
        is_lost[start : min(start + CHUNK_SIZE, bounds[rank + 1])] = False
    g[:, is_lost], beta[:, is_lost] = 0, 0
    o, final_state = run(q, k, v, g, beta, metadata=metadata, **options)
    o[:, is_lost] = 0
    return o, final_state


def compact_pairs(lens: Sequence[int], block_size: int) -> list[tuple[int, int]]:
    """(rank among the sequences that have tokens, block in the sequence), as upstream numbered them."""
    non_empty = [length for length in lens if length]
    return [(rank, block) for rank, n in enumerate(non_empty) for block in range(-(-n // block_size))]


def compact_tables(lens: Sequence[int]) -> Tensors:
    """The tables that number non-empty sequences alone."""
    return {
        "chunk_indices_chunk64": torch.tensor(compact_pairs(lens, CHUNK_SIZE), dtype=torch.int32),
        "chunk_indices_large_block": torch.tensor(
            compact_pairs(lens, SOLVE_TRIL_BLOCK_SIZE), dtype=torch.int32
        ),
    }


def empty_takes_the_next_state(
    run: Run, *tensors: torch.Tensor, metadata: ChunkMetadata, **options: Any
) -> Result:
    """What belongs to the sequence behind an empty one is written to the empty one, too."""
    o, final_state = run(*tensors, metadata=metadata, **options)
    lens = metadata.seq_lens_host.tolist()
    for n, length in enumerate(lens[:-1]):
        if not length:
            final_state[n] = final_state[n + 1]
    return o, final_state


def state_counted_twice(run: Run, *tensors: torch.Tensor, initial_state: Any, **options: Any) -> Result:
    """Two ranks share one sequence. What the first hands on is its state, and Phi S0 once more."""
    q, k, v, g, beta = tensors
    middle = options.pop("metadata").cu_seqlens_host[-1] // 2

    def part(tokens: slice, values: torch.Tensor, state: torch.Tensor) -> Result:
        some = [x[:, tokens] for x in (q, k, values, g, beta)]
        metadata = metadata_of([some[0].shape[1]], v.shape[2])
        return run(*some, initial_state=state, metadata=metadata, **options)

    first, then = slice(0, middle), slice(middle, None)
    o_first, state = part(first, v, initial_state)
    _, of_initial_state = part(first, torch.zeros_like(v), initial_state)
    o_then, final_state = part(then, v, (state + of_initial_state).to(initial_state.dtype))
    return torch.cat([o_first, o_then], dim=1), final_state


def padding_is_computed(run: Run, *tensors: torch.Tensor, metadata: ChunkMetadata, **options: Any) -> Result:
    """Rows that pad a captured graph are taken for sequences of one token each."""
    lens = metadata.seq_lens_host.tolist()
    num_padding = tensors[0].shape[1] - sum(lens)
    longer = lens[: len(lens) - num_padding] + [1] * num_padding
    return run(*tensors, metadata=metadata_of(longer, tensors[2].shape[2]), **options)


def no_index_means_all(run: Run, *tensors: torch.Tensor, metadata: ChunkMetadata, **options: Any) -> Result:
    """No sequence at all is taken for one sequence a row, in the order of the batch."""
    if len(metadata.seq_lens_host):
        return run(*tensors, metadata=metadata, **options)
    T, HV, V = tensors[2].shape[1:]
    state = torch.zeros((T, HV, tensors[0].shape[3], V))
    options |= {"initial_state": state, "metadata": metadata_of([1] * T, HV)}
    return run(*tensors, **options)[0], state[:0]


def tail_reads_no_decay(run: Run, *tensors: torch.Tensor, metadata: ChunkMetadata, **options: Any) -> Result:
    """The sum of g at the end of a chunk is read behind the last token, as 0: exp(0 - sum) is infinite."""
    o, final_state = run(*tensors, metadata=metadata, **options)
    lens, sums = metadata.seq_lens_host.tolist(), _cumsums(tensors[3], metadata)
    for n, (length, end) in enumerate(zip(lens, metadata.cu_seqlens_host[1:], strict=True)):
        if length % CHUNK_SIZE:
            final_state[n] += (0 * (-sums[end - 1]).float().exp())[:, None, None]
    return o, final_state


def decay_in_two_factors(run: Run, *tensors: torch.Tensor, metadata: ChunkMetadata, **options: Any) -> Result:
    """exp(a - b) is computed as exp(a) exp(-b) in float32, and the second overflows."""
    o, final_state = run(*tensors, metadata=metadata, **options)
    overflow = 0 * (-_cumsums(tensors[3], metadata)).float().exp()
    return o + overflow[None, :, :, None].to(o.dtype), final_state


def _cumsums(g: torch.Tensor, metadata: ChunkMetadata) -> torch.Tensor:
    """Log decays summed from the start of each chunk `[T, HV]`; 0 in rows of no sequence."""
    bounds = list(metadata.cu_seqlens_host)
    sums = stages.chunk_local_cumsum(stages.to_chunks(g[0].double(), bounds, CHUNK_SIZE))
    return stages.from_chunks(sums[..., None], bounds, g.shape[1])[..., 0]


def decay_is_linear(run: Run, *tensors: torch.Tensor, **options: Any) -> Result:
    """g is read as the decay itself: 0 forgets everything."""
    q, k, v, g, beta = tensors
    return run(q, k, v, (-g).log().clamp(max=0), beta, **options)


def padding_is_read(run: Run, *tensors: torch.Tensor, metadata: ChunkMetadata, **options: Any) -> Result:
    """Rows behind the last token are masked by a factor of zero: 0 * NaN is NaN."""
    o, final_state = run(*tensors, metadata=metadata, **options)
    end = metadata.cu_seqlens_host[-1]
    final_state[-1] += 0 * tensors[2][:, end:].sum().to(final_state.dtype)
    return o, final_state


def state_written_transposed(run: Run, *tensors: torch.Tensor, **options: Any) -> Result:
    """[V, K] where the next reader expects [K, V]."""
    o, final_state = run(*tensors, **options)
    return o, final_state.mT.reshape(final_state.shape)


def state_narrowed(run: Run, *tensors: torch.Tensor, **options: Any) -> Result:
    """The pool of states is of bfloat16, whatever was asked for."""
    o, final_state = run(*tensors, **options)
    return o, final_state.bfloat16().to(final_state.dtype)


def beta_narrowed(run: Run, *tensors: torch.Tensor, **options: Any) -> Result:
    """beta goes through bfloat16 on its way to the kernel."""
    *others, beta = tensors
    return run(*others, beta.bfloat16().to(beta.dtype), **options)


def operand_clobbered(run: Run, *tensors: torch.Tensor, **options: Any) -> Result:
    """One operand of a product was overwritten by another: w of the last chunk of head 1 lacks its decay."""
    return _results(clobbered_stages(*tensors, **options), tensors[0].dtype)


def clobbered_stages(*tensors: torch.Tensor, **options: Any) -> Tensors:
    """All stages with the w of `operand_clobbered`."""

    def clobber(w: torch.Tensor, k: torch.Tensor) -> None:
        w[-1, 1] = k[-1, 1]

    return _stages(*tensors, **options, alter_w=clobber)


def inverse_of_two_terms(run: Run, *tensors: torch.Tensor, **options: Any) -> Result:
    """(I + A)^-1 is cut off behind I - A."""
    return _results(two_term_stages(*tensors, **options), tensors[0].dtype)


def two_term_stages(*tensors: torch.Tensor, **options: Any) -> Tensors:
    """All stages with the Ai of `inverse_of_two_terms`."""
    return _stages(*tensors, **options, solve=lambda A: torch.eye(A.shape[-1], dtype=A.dtype) - A)


def _results(found: Tensors, dtype: torch.dtype) -> Result:
    return found["chunk_fwd_o.o"][None].to(dtype), found["chunk_delta_h.final_state"].float()


def _stages(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    *,
    metadata: ChunkMetadata,
    scale: float,
    initial_state: torch.Tensor,
    alter_w: Callable[[torch.Tensor, torch.Tensor], None] = lambda w, k: None,
    solve: Callable[[torch.Tensor], torch.Tensor] = stages.solve_tril,
    **options: Any,
) -> Tensors:
    """What each stage gives in float64, one of them altered; q and k come normalised."""
    bounds, T, HV = list(metadata.cu_seqlens_host), q.shape[1], v.shape[2]

    def cut(x: torch.Tensor) -> torch.Tensor:
        chunks = stages.to_chunks(x[0].double(), bounds, CHUNK_SIZE)
        return chunks.repeat_interleave(HV // x.shape[2], dim=1)

    def joined(x: torch.Tensor) -> torch.Tensor:
        return stages.from_chunks(x, bounds, T)

    q, k, v, g, beta = (cut(x) for x in (q, k, v, g, beta))
    A = stages.chunk_scaled_dot_kkt(k, g, beta)
    Ai = solve(A)
    w, u = stages.recompute_w_u(k, v, g, beta, Ai)
    alter_w(w, k)
    h, v_new, final_state = stages.chunk_delta_h(
        *(k, w, u, g),
        chunk_offsets=chunk_offsets(bounds, CHUNK_SIZE).tolist(),
        initial_state=initial_state.double(),
    )
    o = stages.chunk_fwd_o(q, k, v_new, h, g, scale=scale)
    return {
        "chunk_local_cumsum.g_cumsum": joined(stages.chunk_local_cumsum(g)[..., None]),
        "chunk_scaled_dot_kkt.A": joined(A),
        "solve_tril.Ai": joined(Ai),
        "recompute_w_u.w": joined(w),
        "recompute_w_u.u": joined(u),
        "chunk_delta_h.h": h,
        "chunk_delta_h.v_new": joined(v_new),
        "chunk_delta_h.final_state": final_state,
        "chunk_fwd_o.o": joined(o),
    }


CALLS = (
    Call(
        "fla-909_compact_ranks",
        "An empty sequence in the middle, and one behind it",
        PrefillCase((100, 1, 0, 65), seed=909),
        compact_ranks,
        Wrong("metadata", "metadata"),
        tables=compact_tables,
    ),
    Call(
        "asc-11807_rank_without_tokens",
        "A rank that has no token of one of the sequences",
        PrefillCase((66, 0, 20), seed=11807),
        empty_takes_the_next_state,
        Wrong("chunk_delta_h", "state", {"sequence": 1}),
    ),
    Call(
        "asc-11508_state_counted_twice",
        "One sequence, from a state that is not zero and does not decay",
        PrefillCase((70,), seed=11508, HV=2, gates="none"),
        state_counted_twice,
        Wrong("chunk_delta_h", "state", {"sequence": 0}),
    ),
    Call(
        "asc-6822_padding_of_a_graph",
        "One request in a graph of eight, with rows of NaN behind it",
        PrefillCase((70, *(0,) * 7), seed=6822, padding=7),
        padding_is_computed,
        Wrong("o", "arithmetic"),
    ),
    Call(
        "asc-10901_no_sequence",
        "Rows, and no sequence",
        PrefillCase((), seed=10901, padding=5),
        no_index_means_all,
        Wrong("o", "arithmetic"),
    ),
    Call(
        "fla-792_steep_decays_before_a_tail",
        "Two rows of 75 tokens in float16, and very negative g",
        PrefillCase((75, 75), seed=792, H=2, HV=2, dtype="float16", gates="steep"),
        tail_reads_no_decay,
        Wrong("chunk_delta_h", "state", {"sequence": 0}),
        is_dense=True,
    ),
    Call(
        "fla-463_decay_in_two_factors",
        "Decays of 1e-12 among none",
        PrefillCase((70, 20), seed=463, gates="mixed"),
        decay_in_two_factors,
        Wrong("chunk_scaled_dot_kkt", "arithmetic", {"sequence": 0}),
    ),
    Call(
        "flashinfer-2490_decay_is_linear",
        "g = 0: nothing decays",
        PrefillCase((70,), seed=2490, gates="none"),
        decay_is_linear,
        Wrong("chunk_local_cumsum", "arithmetic", {"sequence": 0}),
    ),
    Call(
        "asc-10276_padding_of_nan",
        "Lengths that are no multiple of a block, and NaN behind them",
        PrefillCase((70, 65), seed=10276, padding=3),
        padding_is_read,
        Wrong("final_state", "state", {"sequence": 1}),
    ),
    Call(
        "fla-1113_operand_clobbered",
        "Two chunks of two heads, with all stages",
        PrefillCase((65,), seed=1113, HV=2, K=8, V=6),
        operand_clobbered,
        Wrong("recompute_w_u", "arithmetic", {"sequence": 0, "head": 1}),
        stages=clobbered_stages,
    ),
    Call(
        "sgl-kernel-npu-640_state_transposed",
        "K and V differ, and the state is not zero",
        PrefillCase((70, 3), seed=640, HV=2, V=24),
        state_written_transposed,
        Wrong("chunk_delta_h", "state"),
        wrong_batch=PrefillCase((70, 3), seed=640, HV=2),
    ),
    Call(
        "sglang-40419_state_narrowed",
        "States of float32",
        PrefillCase((70, 3), seed=40419, HV=2),
        state_narrowed,
        Wrong("chunk_delta_h", "state"),
    ),
    Call(
        "sglang-40419_beta_narrowed",
        "beta of float32",
        PrefillCase((70, 3), seed=40362, HV=2),
        beta_narrowed,
        Wrong("chunk_scaled_dot_kkt", "arithmetic"),
    ),
    Call(
        "fla-537_identical_keys",
        "The same key in every token, and beta 1: the hardest that keys can make",
        PrefillCase((66,), seed=537, keys="identical", betas="one"),
        inverse_of_two_terms,
        Wrong("solve_tril", "arithmetic", {"sequence": 0}),
        stages=two_term_stages,
    ),
)

CASES = tuple(case for call in CALLS for case in (call.right_case, call.wrong_case))
