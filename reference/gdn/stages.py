"""The stages of chunked gated delta rule prefill, one public function each, in order.

All stages work on *chunks*: `to_chunks` cuts the packed tokens of every sequence into NT chunks of BT tokens,
`x [NT, heads, BT, D]`, and fills the tail of a last chunk with zeros. A zero row (k, v, beta, g = 0) adds
nothing to a state and reads nothing from one, so no stage needs a mask for tails.

Every stage takes the log decay `g` of the definition, not its cumulative sum: the decay from token j to
token i is summed over (j, i] alone (`pairwise_decay`), which stays exact where a difference of two cumulative
sums cancels, and defined where g is -inf.

Every stage raises InvalidArgumentError for tensors whose shapes, dtypes or devices do not fit each other, and
for a compute_dtype that is none of the four below.

`compute_dtype` says in which precision a stage runs. float64 and float32 compute and accumulate in
themselves. bfloat16 and float16 model a matrix unit: operands of a product and the tensors that a kernel
would store between stages are rounded to that dtype, sums, decays and the state stay float32.
"""

from itertools import pairwise

import torch

from ..errors import invalid_argument
from .inputs import (
    FLOAT_DTYPES,
    STATE_DTYPES,
    check_choice,
    check_chunk_size,
    check_cu_seqlens,
    check_eps,
    check_layout,
    check_shape,
    check_tensor,
)
from .metadata import chunk_indices


def accumulation_dtype(compute_dtype: torch.dtype) -> torch.dtype:
    """The dtype that sums and states are kept in: float64 for float64, else float32.

    Raises:
        InvalidArgumentError: for a dtype other than float64, float32, float16, bfloat16.
    """
    check_choice("compute_dtype", compute_dtype, FLOAT_DTYPES)
    return torch.float64 if compute_dtype == torch.float64 else torch.float32


def round_to(x: torch.Tensor, compute_dtype: torch.dtype) -> torch.Tensor:
    """`x` rounded to the values of `compute_dtype`, in the accumulation dtype."""
    return x.to(compute_dtype).to(accumulation_dtype(compute_dtype))


def matmul(a: torch.Tensor, b: torch.Tensor, compute_dtype: torch.dtype) -> torch.Tensor:
    """`a @ b` with both operands rounded to `compute_dtype` and the sum in the accumulation dtype."""
    return round_to(a, compute_dtype) @ round_to(b, compute_dtype)


def pairwise_decay(g: torch.Tensor) -> torch.Tensor:
    """Decay between every two tokens of a chunk.

    D_ij = exp(sum of g over (j, i]) for i >= j, else 0.

    Args:
        g: log decay `[..., BT]`.

    Returns:
        D `[..., BT, BT]` in the dtype of g.

    Source: the segment sum of Dao and Gu, "Transformers are SSMs", 2024, listing 1.
    """
    BT = g.shape[-1]
    after_j = torch.ones(BT, BT, dtype=torch.bool, device=g.device).tril(-1)
    return torch.where(after_j, g[..., :, None], 0.0).cumsum_(dim=-2).exp_().tril_()


def to_chunks(x: torch.Tensor, cu_seqlens: torch.Tensor | list[int], chunk_size: int) -> torch.Tensor:
    """Cut packed tokens into chunks.

    Args:
        x: `[T, heads]` or `[T, heads, D]`.
        cu_seqlens: `[N + 1]`, bounds (tokens) of the sequences.
        chunk_size: BT, tokens.

    Returns:
        `[NT, heads, BT]` or `[NT, heads, BT, D]`, zero in the tails, in the order of `chunk_indices`.

    Raises:
        InvalidArgumentError: for cu_seqlens or chunk_size out of their domain.
    """
    if not isinstance(x, torch.Tensor) or x.ndim not in (2, 3):
        invalid_argument("x", getattr(x, "shape", type(x).__name__), "a tensor [T, heads] or [T, heads, D]")
    T, heads = x.shape[:2]
    rows = _chunk_rows(cu_seqlens, chunk_size, heads, T, x.device)
    chunks = x.flatten(0, 1).index_select(0, rows.flatten().clamp(max=T * heads - 1)).unflatten(0, rows.shape)
    chunks[rows >= T * heads] = 0
    return chunks


def from_chunks(x: torch.Tensor, cu_seqlens: torch.Tensor | list[int], num_tokens: int) -> torch.Tensor:
    """Put chunks back into packed tokens: the inverse of `to_chunks`.

    Args:
        x: `[NT, heads, BT, D]`.
        cu_seqlens: `[N + 1]`, bounds (tokens) of the sequences.
        num_tokens: T, rows of the result.

    Returns:
        `[T, heads, D]`, zero in rows that belong to no sequence.

    Raises:
        InvalidArgumentError: for cu_seqlens out of its domain, or a number of chunks that does not fit it.
    """
    check_tensor("x", x, 4, FLOAT_DTYPES)
    NT, heads, BT, D = x.shape
    rows = _chunk_rows(cu_seqlens, BT, heads, num_tokens, x.device)
    if len(rows) != NT:
        invalid_argument("x.shape[0]", NT, f"{len(rows)}, the number of chunks of cu_seqlens")
    out = x.new_zeros((num_tokens + 1) * heads, D)
    out.index_copy_(0, rows.flatten(), x.reshape(NT * heads * BT, D))
    return out.view(num_tokens + 1, heads, D)[:num_tokens]


def _chunk_rows(
    cu_seqlens: torch.Tensor | list[int], chunk_size: int, heads: int, num_tokens: int, device: torch.device
) -> torch.Tensor:
    """Rows `[NT, heads, BT]` int64 of a tensor `[T * heads, ..]`; in the tails those of a token T."""
    check_chunk_size(chunk_size)
    bounds = check_cu_seqlens(cu_seqlens, num_tokens)
    rows = torch.full((len(chunk_indices(bounds, chunk_size)), chunk_size), num_tokens, dtype=torch.int64)
    for row, (n, i) in zip(rows, chunk_indices(bounds, chunk_size).tolist(), strict=True):
        start = bounds[n] + i * chunk_size
        length = min(chunk_size, bounds[n + 1] - start)
        row[:length] = torch.arange(start, start + length)
    return (rows[:, None] * heads + torch.arange(heads)[:, None]).to(device)


def l2norm(x: torch.Tensor, *, eps: float = 1e-6) -> torch.Tensor:
    """Scale every row to length one: x * rsqrt(sum(x^2) + eps).

    Args:
        x: `[..., K]`, floating.
        eps: added to the sum of squares. Default: 1e-6.

    Returns:
        `[..., K]` in the dtype of x.

    Source: fla-core 0.6.0, fla/modules/l2norm.py (eps inside the root).
    """
    check_eps(eps)
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return x * torch.rsqrt(length.square() + eps)


def chunk_local_cumsum(g: torch.Tensor) -> torch.Tensor:
    """Log decay from the start of its chunk up to and including each token.

    Args:
        g: log decay `[NT, HV, BT]`.

    Returns:
        `[NT, HV, BT]`, the inclusive cumulative sum over BT.
    """
    check_layout(g=(g, "NT HV BT"))
    return g.cumsum(dim=-1)


def chunk_scaled_dot_kkt(
    k: torch.Tensor, g: torch.Tensor, beta: torch.Tensor, *, compute_dtype: torch.dtype = torch.float64
) -> torch.Tensor:
    """How much the update of token j changes what token i reads, within a chunk.

    A_ij = beta_i exp(g summed over (j, i]) k_i^T k_j for i > j, else 0.

    Args:
        k: keys `[NT, HV, BT, K]`.
        g: log decay `[NT, HV, BT]`.
        beta: `[NT, HV, BT]`.
        compute_dtype: precision of the stage. Default: float64.

    Returns:
        A `[NT, HV, BT, BT]`, strictly lower triangular, in the accumulation dtype.
    """
    check_layout(k=(k, "NT HV BT K"), g=(g, "NT HV BT"), beta=(beta, "NT HV BT"))
    A = matmul(k, k.mT, compute_dtype).mul_(pairwise_decay(g)).mul_(beta[..., None])
    return A.tril_(-1)


def solve_tril(A: torch.Tensor, *, compute_dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """Ai = (I + A)^-1, by forward substitution of a batched triangular solve.

    Args:
        A: `[NT, HV, BT, BT]`, strictly lower triangular.
        compute_dtype: what the result is rounded to; the solve itself runs in the dtype of A.

    Returns:
        Ai `[NT, HV, BT, BT]`, lower triangular with ones on its diagonal.
    """
    check_layout(A=(A, "NT HV BT BT"))
    eye = torch.eye(A.shape[-1], dtype=A.dtype, device=A.device)
    Ai = torch.linalg.solve_triangular(A, eye.expand_as(A), upper=False, unitriangular=True)
    return round_to(Ai, compute_dtype)


def recompute_w_u(
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    Ai: torch.Tensor,
    *,
    compute_dtype: torch.dtype = torch.float64,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The chunk as one update of rank BT: what each token writes, before the incoming state is known.

    w = Ai diag(beta exp(cumsum g)) k    reads the incoming state
    u = Ai diag(beta) v                  writes values

    Args:
        k: keys `[NT, HV, BT, K]`.
        v: values `[NT, HV, BT, V]`.
        g: log decay `[NT, HV, BT]`.
        beta: `[NT, HV, BT]`.
        Ai: `[NT, HV, BT, BT]` of `solve_tril`.
        compute_dtype: precision of the stage. Default: float64.

    Returns:
        w `[NT, HV, BT, K]` and u `[NT, HV, BT, V]`.

    Source: the WY form of Yang et al., "Parallelizing Linear Transformers with the Delta Rule", 2024.
    """
    check_layout(
        k=(k, "NT HV BT K"),
        v=(v, "NT HV BT V"),
        g=(g, "NT HV BT"),
        beta=(beta, "NT HV BT"),
        Ai=(Ai, "NT HV BT BT"),
    )
    decay = chunk_local_cumsum(g).exp()
    w = matmul(Ai * (beta * decay)[..., None, :], k, compute_dtype)
    u = matmul(Ai * beta[..., None, :], v, compute_dtype)
    return round_to(w, compute_dtype), round_to(u, compute_dtype)


def chunk_delta_h(
    k: torch.Tensor,
    w: torch.Tensor,
    u: torch.Tensor,
    g: torch.Tensor,
    *,
    chunk_offsets: list[int],
    initial_state: torch.Tensor,
    compute_dtype: torch.dtype = torch.float64,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Carry the state through the chunks of each sequence: the only stage that is sequential.

    v_new = u - w S,    S <- exp(sum of g) S + sum_i exp(g summed over (i, BT]) k_i v_new_i^T

    Args:
        k: keys `[NT, HV, BT, K]`.
        w: `[NT, HV, BT, K]`.
        u: `[NT, HV, BT, V]`.
        g: log decay `[NT, HV, BT]`.
        chunk_offsets: N + 1 ints; sequence n owns chunks chunk_offsets[n] to chunk_offsets[n + 1].
        initial_state: `[N, HV, K, V]`.
        compute_dtype: precision of the stage. Default: float64.

    Returns:
        h `[NT, HV, K, V]`, the state each chunk starts from; v_new `[NT, HV, BT, V]`, the values less what
        the state already held; final_state `[N, HV, K, V]` in the accumulation dtype.
    """
    sizes = check_layout(k=(k, "NT HV BT K"), w=(w, "NT HV BT K"), u=(u, "NT HV BT V"), g=(g, "NT HV BT"))
    _check_carry(chunk_offsets, initial_state, sizes)
    h = k.new_empty(*k.shape[:2], k.shape[-1], u.shape[-1])
    v_new = torch.empty_like(u)
    final_state = h.new_empty(initial_state.shape)
    after = torch.cat([g[..., 1:], torch.zeros_like(g[..., :1])], dim=-1)
    to_end = after.flip(-1).cumsum(dim=-1).flip(-1).exp()[..., None]
    whole = g.sum(dim=-1).exp()[..., None, None]
    for n, (first, end) in enumerate(pairwise(chunk_offsets)):
        states = [*h[first:end], final_state[n]]
        states[0].copy_(initial_state[n])
        for c, state, next_state in zip(range(first, end), states, states[1:], strict=False):
            v_new[c] = round_to(u[c] - matmul(w[c], state, compute_dtype), compute_dtype)
            update = matmul(k[c].mT, to_end[c] * v_new[c], compute_dtype)
            torch.addcmul(update, whole[c], state, out=next_state)
    return round_to(h, compute_dtype), v_new, final_state


def _check_carry(chunk_offsets: list[int], initial_state: torch.Tensor, sizes: dict[str, int]) -> None:
    N = len(chunk_offsets) - 1
    check_tensor("initial_state", initial_state, 4, STATE_DTYPES)
    shape = (N, *(sizes[letter] for letter in ("HV", "K", "V")))
    check_shape("initial_state", initial_state, shape, "[N, HV, K, V] with N = len(chunk_offsets) - 1")
    if check_cu_seqlens(chunk_offsets)[-1] != sizes["NT"]:
        invalid_argument("chunk_offsets[-1]", chunk_offsets[-1], f"NT = {sizes['NT']}")


def chunk_fwd_o(
    q: torch.Tensor,
    k: torch.Tensor,
    v_new: torch.Tensor,
    h: torch.Tensor,
    g: torch.Tensor,
    *,
    scale: float,
    compute_dtype: torch.dtype = torch.float64,
) -> torch.Tensor:
    """What every token reads: from the state its chunk started from, and from its own chunk.

    o_i = scale (exp(cumsum g)_i q_i^T h + sum over j <= i of exp(g summed over (j, i]) (q_i^T k_j) v_new_j)

    Args:
        q: queries `[NT, HV, BT, K]`.
        k: keys `[NT, HV, BT, K]`.
        v_new: `[NT, HV, BT, V]`.
        h: `[NT, HV, K, V]`.
        g: log decay `[NT, HV, BT]`.
        scale: factor of the output.
        compute_dtype: precision of the stage. Default: float64.

    Returns:
        o `[NT, HV, BT, V]`.
    """
    check_layout(
        q=(q, "NT HV BT K"),
        k=(k, "NT HV BT K"),
        v_new=(v_new, "NT HV BT V"),
        h=(h, "NT HV K V"),
        g=(g, "NT HV BT"),
    )
    from_state = matmul(q, h, compute_dtype).mul_(chunk_local_cumsum(g).exp()[..., None])
    attention = matmul(q, k.mT, compute_dtype).mul_(pairwise_decay(g))
    from_chunk = matmul(attention, v_new, compute_dtype)
    return round_to(from_state.add_(from_chunk).mul_(scale), compute_dtype)
