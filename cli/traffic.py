"""Bytes that the kernels of a prefill scheme load and store, from the shapes alone.

Counted is what programs ask of device memory: every load and store of every program, whether or not a cache
answers it. Left out are the tables of chunk metadata, a few bytes a program. q, k, v and beta are bfloat16, g
and the states of sequences float32, in all schemes, as Qwen3-Next calls them.

Importing this module imports no Triton. That `staged` and `fused` are what their kernels do is tested: the
interpreter records every access (equivalence_tests/test_traffic.py). The figures of upstream were compared
once in the same way with its own kernels, for K = V = 128 and whole chunks, and were equal; its copies and
fills, which are PyTorch's, are counted by reading.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from ..optimized.gdn.kernels.block_sizes import CHUNK_SIZE, TRIANGLE_SIZE, value_block_size

_BF16, _F32 = 2, 4

PARTS = {
    "states of chunks": ("h",),
    "states of sequences": ("initial_state", "final_state"),
    "q, k, normalised copies": ("q", "k", "x", "y", "rstd"),
    "v, o": ("v", "o"),
    "w, u, v_new": ("w", "u", "v_new"),
    "A, its inverse, Aqk": ("A", "Ad", "Ai", "Aqk"),
    "g, beta, what is made of them": ("g", "beta", "g_cumsum", "factors"),
}
"""What tensors are counted together, by the names that kernels have for them."""

STATE_PARTS = ("states of chunks", "states of sequences")


@dataclass(frozen=True)
class Batch:
    """The shapes of a prefill batch: tokens of each sequence, heads, head dims. States come in and go out."""

    seq_lens: tuple[int, ...]
    H: int
    HV: int
    K: int
    V: int

    @property
    def num_tokens(self) -> int:
        return sum(self.seq_lens)

    @property
    def num_chunks(self) -> int:
        return sum(-(-length // CHUNK_SIZE) for length in self.seq_lens)

    # Elements of a tensor, of each kind that there is.

    @property
    def per_token(self) -> int:
        return self.num_tokens * self.HV

    @property
    def per_chunk(self) -> int:
        return self.num_chunks * self.HV

    @property
    def chunk_states(self) -> int:
        return self.per_chunk * self.K * self.V

    @property
    def sequence_states(self) -> int:
        return len(self.seq_lens) * self.HV * self.K * self.V


class Move(NamedTuple):
    """Bytes that all programs of a kernel load from a tensor, or store to it."""

    kernel: str
    tensor: str
    kind: str
    bytes: int


@dataclass(frozen=True)
class Scheme:
    """A way to compute the op.

    Attributes:
        name: what the benchmark calls it.
        source: where its kernels are.
        moves: all that they load and store for a batch.
    """

    name: str
    source: str
    moves: Callable[[Batch], list[Move]]


def bytes_per_token(scheme: Scheme, batch: Batch) -> dict[str, float]:
    """Bytes a token that a scheme moves, by part (`PARTS`)."""
    moves = scheme.moves(batch)
    return {
        part: sum(move.bytes for move in moves if move.tensor in tensors) / batch.num_tokens
        for part, tensors in PARTS.items()
    }


def state_bytes(parts: dict[str, float]) -> float:
    """Of the result of `bytes_per_token`, what are states."""
    return sum(parts[part] for part in STATE_PARTS)


# Schemes


def staged(b: Batch) -> list[Move]:
    """One kernel a stage. The two last read q, k, w and g_cumsum once for every block of columns of V."""
    NV = -(-b.V // value_block_size(b.K, b.V))
    keys, values = b.per_token * b.K * _BF16, b.per_token * b.V * _BF16
    A, Ai = b.per_token * CHUNK_SIZE * _F32, b.per_token * CHUNK_SIZE * _BF16
    g, beta, g_cumsum = b.per_token * _F32, b.per_token * _BF16, 2 * b.per_token * _F32
    g_last = 2 * b.per_chunk * _F32
    h, state = b.chunk_states * _BF16, b.sequence_states * _F32
    return [
        *_normalise("l2norm_kernel", b),
        *_moves("chunk_local_cumsum_kernel", {"g": g}, {"g_cumsum": g_cumsum}),
        *_moves("chunk_scaled_dot_kkt_kernel", {"k": keys, "g_cumsum": g_cumsum, "beta": beta}, {"A": A}),
        *_moves("solve_tril_kernel", {"A": A}, {"Ai": Ai}),
        *_moves(
            "recompute_w_u_kernel",
            {"k": keys, "v": values, "g_cumsum": g_cumsum, "beta": beta, "Ai": Ai},
            {"w": keys, "u": values},
        ),
        *_moves(
            "chunk_delta_h_kernel",
            {
                "k": NV * keys,
                "w": NV * keys,
                "u": values,
                "g_cumsum": NV * (g_cumsum + g_last),
                "initial_state": state,
            },
            {"h": h, "v_new": values, "final_state": state},
        ),
        *_moves(
            "chunk_fwd_o_kernel",
            {"q": NV * keys, "k": NV * keys, "v_new": values, "h": h, "g_cumsum": NV * g_cumsum},
            {"o": values},
        ),
    ]


def fused(b: Batch) -> list[Move]:
    """Three launches. The last reads all but v once for every block of columns of V; states stay on chip."""
    NV = -(-b.V // value_block_size(b.K, b.V))
    keys, values = b.per_token * b.K * _BF16, b.per_token * b.V * _BF16
    A, Aqk = b.per_token * CHUNK_SIZE * _F32, b.per_token * CHUNK_SIZE * _BF16
    Ai = 2 * Aqk  # in two parts
    g, beta, state = b.per_token * _F32, b.per_token * _BF16, b.sequence_states * _F32
    return [
        *_moves(
            "fused_intra_chunk_kernel",
            {"q": keys, "k": keys, "g": g, "beta": beta},
            {"A": A, "Aqk": Aqk, "factors": 6 * g},
        ),
        *_moves("solve_tril_kernel", {"A": A}, {"Ai": Ai}),
        *_moves(
            "fused_inter_chunk_kernel",
            {
                "q": NV * keys,
                "k": NV * keys,
                "v": values,
                "Ai": NV * Ai,
                "Aqk": NV * Aqk,
                "factors": NV * (5 * g + b.per_chunk * _F32),
                "initial_state": state,
            },
            {"o": values, "final_state": state},
        ),
    ]


def vllm_ascend(b: Batch) -> list[Move]:
    """vllm-ascend 0.18.0, for K = V = 128: one kernel a stage, a value head whole.

    Four of its functions first copy g, and two of them beta, to one row a head. The inverse of A goes through
    blocks on the diagonal in float32 (Ad); A is read again only below them.
    """
    keys, values = b.per_token * b.K * _BF16, b.per_token * b.V * _BF16
    A, Ai = b.per_token * CHUNK_SIZE * _F32, b.per_token * CHUNK_SIZE * _BF16
    Ad = b.per_token * TRIANGLE_SIZE * _F32
    below = Ad + b.per_token * TRIANGLE_SIZE // 2 * _F32  # one 32 x 32 and two 16 x 16 of 64 rows
    g, beta = b.per_token * _F32, b.per_token * _BF16
    h, state = b.chunk_states * _BF16, b.sequence_states * _F32
    copied = {"g": g, "beta": beta}
    return [
        *_normalise("l2norm_fwd", b),
        *_moves("chunk_local_cumsum", {"g": g}, {"g": g}),
        *_moves("chunk_scaled_dot_kkt_fwd, copies", copied, copied),
        *_moves("chunk_scaled_dot_kkt_fwd", {"k": keys, **copied}, {"A": A}),
        *_moves("solve_tril, 16 x 16", {"A": Ad}, {"Ad": Ad}),
        *_moves("solve_tril, merge", {"A": below, "Ad": Ad}, {"Ai": Ai}),
        *_moves("recompute_w_u_fwd, copies", copied, copied),
        *_moves("recompute_w_u_fwd", {"k": keys, "v": values, "Ai": Ai, **copied}, {"w": keys, "u": values}),
        *_moves("chunk_gated_delta_rule_fwd_h, copies", {"g": g}, {"g": g}),
        *_moves(
            "chunk_gated_delta_rule_fwd_h",
            {"k": keys, "w": keys, "u": values, "g": g + b.per_chunk * _F32, "initial_state": state},
            {"h": h, "v_new": values, "final_state": state},
        ),
        *_moves("chunk_fwd_o, copies", {"g": g}, {"g": g}),
        *_moves("chunk_fwd_o", {"q": keys, "k": keys, "v_new": values, "h": h, "g": g}, {"o": values}),
    ]


def fla(b: Batch) -> list[Move]:
    """fla-core 0.6.0 without its optional backends, for whole chunks.

    Its autotuner chooses how many columns of V a program takes; counted is its largest choice on a data
    centre GPU, 64 in the state's kernel and 128 in that of the output. A and final_state are zeroed first; of
    a chunk of A, 10 of 16 blocks are then stored.
    """
    NV, NVo = -(-b.V // 64), -(-b.V // 128)
    keys, values = b.per_token * b.K * _BF16, b.per_token * b.V * _BF16
    Ai = b.per_token * CHUNK_SIZE * _BF16
    g, beta = b.per_token * _F32, b.per_token * _BF16
    h, state = b.chunk_states * _BF16, b.sequence_states * _F32
    return [
        *_normalise("l2norm_fwd", b),
        *_moves("l2norm_fwd", {}, {"rstd": 2 * b.num_tokens * b.H * _F32}),
        *_moves("chunk_local_cumsum", {"g": g}, {"g": g}),
        *_moves("chunk_gated_delta_rule_fwd_intra, zeros", {}, {"Ai": Ai}),
        *_moves("chunk_gated_delta_rule_fwd_intra", {"k": keys, "g": g, "beta": beta}, {"Ai": Ai * 10 // 16}),
        *_moves(
            "recompute_w_u_fwd",
            {"k": keys, "v": values, "Ai": Ai, "g": g, "beta": beta},
            {"w": keys, "u": values},
        ),
        *_moves("chunk_gated_delta_rule_fwd_h, zeros", {}, {"final_state": state}),
        *_moves(
            "chunk_gated_delta_rule_fwd_h",
            {
                "k": NV * keys,
                "w": NV * keys,
                "u": values,
                "g": NV * (g + b.per_chunk * _F32),
                "initial_state": state,
            },
            {"h": h, "v_new": values, "final_state": state},
        ),
        *_moves(
            "chunk_fwd_o",
            {"q": NVo * keys, "k": NVo * keys, "v_new": values, "h": h, "g": NVo * g},
            {"o": values},
        ),
    ]


SCHEMES = (
    Scheme("vllm-ascend 0.18.0", "vllm_ascend/ops/triton/fla", vllm_ascend),
    Scheme("fla-core 0.6.0", "fla/ops/gated_delta_rule, fla/ops/common, fla/modules/norm/l2norm.py", fla),
    Scheme("staged", "optimized/gdn/kernels", staged),
    Scheme("fused", "optimized/gdn/kernels", fused),
)


def _moves(kernel: str, loads: dict[str, int], stores: dict[str, int]) -> Iterable[Move]:
    for kind, of in (("load", loads), ("store", stores)):
        for tensor, num_bytes in of.items():
            yield Move(kernel, tensor, kind, num_bytes)


def _normalise(kernel: str, b: Batch) -> Sequence[Move]:
    """Both calls of l2norm: q and k, each read and written."""
    both = 2 * b.num_tokens * b.H * b.K * _BF16
    return (Move(kernel, "x", "load", both), Move(kernel, "y", "store", both))
