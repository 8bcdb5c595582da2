"""Gated delta rule prefill in PyTorch over prebuilt metadata: every chunk of the batch at once.

The chunks of all sequences are gathered through the metadata into one batch `[NT, heads, BT, D]`. Everything
but the recurrence runs once for that batch. The recurrence advances all sequences together, one chunk of each
a step, so the batch is ordered by step: the first chunks of all sequences, then the second ones, and so on,
the sequence with the most chunks first. A step is then a slice of the batch, and its sequences are the first
ones. How many those are is known from the host side of the metadata: nothing is read back from the device.

Everything is computed in float32 (float64 for float64 input): a product of PyTorch rounds its result to the
dtype of its operands, and rounding every product to bfloat16 costs more accuracy than the tolerances allow.
"""

from typing import NamedTuple

import numpy as np
import torch

from .kernels.block_sizes import CHUNK_SIZE
from .metadata import ChunkMetadata

_SOLVE_BLOCK = 16  # rows that one triangular solve takes; blocks are then joined by products


def eager_chunk_gated_delta_rule(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    *,
    scale: float,
    initial_state: torch.Tensor | None,
    use_qk_l2norm_in_kernel: bool,
    eps: float,
    metadata: ChunkMetadata,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The prebuilt path in PyTorch.

    With S the state a chunk starts from, G_i the decay from the chunk's start to token i and D_ij that from
    token j to token i:

        Ai    = (I + A)^-1,  A_ij = beta_i D_ij k_i^T k_j for i > j
        v_new = Ai (beta (v - G k^T S))
        o     = scale (G q^T S + sum over j <= i of D_ij (q_i^T k_j) v_new_j)
        S    <- G_last S + sum over i of D_last,i k_i v_new_i^T

    Args:
        q, k: `[1, T, H, K]`. v: `[1, T, HV, V]`, same dtype. g, beta: `[1, T, HV]`.
        scale: factor of the output.
        initial_state: `[N, HV, K, V]` or None for zeros.
        use_qk_l2norm_in_kernel: normalise q and k over K first.
        eps: added to the sum of squares by that normalisation.
        metadata: of this step, on the device of q.

    Returns:
        o `[1, T, HV, V]` in the dtype of q, 0 in rows of no sequence, and final_state `[N, HV, K, V]` float32
        (float64 for float64 input).
    """
    _, T, H, K = q.shape
    HV, V = v.shape[2:]
    accumulate = torch.float64 if q.dtype == torch.float64 else torch.float32
    plan = _plan_steps(metadata)
    g, beta = (torch.where(plan.valid, x[0][plan.rows].movedim(-1, 1), 0).to(accumulate) for x in (g, beta))
    q, k, v = (x.reshape(T * x.shape[2], x.shape[3]) for x in (q, k, v))
    o = torch.empty(T, HV, V, dtype=q.dtype, device=q.device)
    o[plan.num_tokens :] = 0
    final_state = torch.empty(plan.num_seqs, HV, K, V, dtype=accumulate, device=q.device)
    workspace = _Workspace(q.device)
    # The caches of a CPU hold what one key head needs; an accelerator wants few large launches.
    heads_at_once = 1 if q.device.type == "cpu" else H
    for h in range(0, H, heads_at_once):
        keys = plan.rows_of_heads(h, heads_at_once, H)
        values = slice(h * (HV // H), (h + heads_at_once) * (HV // H))
        _run_heads(
            q,
            k,
            v,
            g[:, values],
            beta[:, values],
            keys=keys,
            values=plan.rows_of_heads(values.start, values.stop - values.start, HV),
            scale=scale,
            initial_state=None if initial_state is None else initial_state[:, values],
            eps=eps if use_qk_l2norm_in_kernel else None,
            plan=plan,
            workspace=workspace,
            o=o[:, values],
            final_state=final_state[:, values],
        )
    return o.unsqueeze(0), final_state


class _Workspace:
    """Buffers that every pass over the heads uses again: on a CPU fresh memory costs more than arithmetic."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._buffers: dict[str, torch.Tensor] = {}

    def __call__(self, name: str, *shape: int, dtype: torch.dtype) -> torch.Tensor:
        """The buffer `name`, of the same shape and dtype in every pass; it holds what was left there."""
        if name not in self._buffers:
            self._buffers[name] = torch.empty(shape, dtype=dtype, device=self._device)
        return self._buffers[name]


class _Plan(NamedTuple):
    """The batch of chunks in the order of the steps; tensors are on the device and were computed there.

    rows `[NT, BT]`: token of every row, in a tail the last token of its sequence. valid `[NT, 1, BT]`: where
    a row is no tail. place `[num_tokens]`: row of the flat batch that holds each token. by_length `[N]`: the
    sequences, most chunks first. steps: sequences that have a first chunk, a second chunk, and so on.
    """

    rows: torch.Tensor
    valid: torch.Tensor
    place: torch.Tensor
    by_length: torch.Tensor
    steps: list[int]
    num_tokens: int
    num_seqs: int

    def rows_of_heads(self, first: int, count: int, num_heads: int) -> torch.Tensor:
        """Rows `[NT, count, BT]` of tensors `[T * num_heads, D]` that hold the chunks of some heads."""
        heads = torch.arange(first, first + count, device=self.rows.device)
        return self.rows.unsqueeze(1) * num_heads + heads[:, None]


def _plan_steps(metadata: ChunkMetadata) -> _Plan:
    by_length = metadata.chunk_offsets_chunk64.diff().argsort(descending=True, stable=True)
    rank = by_length.argsort()
    sequence, chunk = metadata.chunk_indices_chunk64.long().unbind(1)
    order = (chunk * rank.shape[0] + rank[sequence]).argsort()
    sequence, chunk = sequence[order], chunk[order]
    end = metadata.cu_seqlens[sequence + 1].unsqueeze(1)
    first = metadata.cu_seqlens[sequence] + chunk * CHUNK_SIZE
    rows = first.unsqueeze(1) + torch.arange(CHUNK_SIZE, device=first.device)
    valid = rows < end

    lens = metadata.seq_lens_host
    num_tokens = int(lens.sum())
    target = torch.where(valid, rows, num_tokens).flatten()
    place = torch.zeros(num_tokens + 1, dtype=torch.int64, device=rows.device)
    place[target] = torch.arange(target.shape[0], device=rows.device)

    counts = np.sort(-(-lens // CHUNK_SIZE))
    steps = len(counts) - counts.searchsorted(np.arange(counts.max(initial=0)), side="right")
    return _Plan(
        rows.minimum(end - 1),
        valid.unsqueeze(1),
        place[:-1],
        by_length,
        steps.tolist(),
        num_tokens,
        len(lens),
    )


def _run_heads(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    *,
    keys: torch.Tensor,
    values: torch.Tensor,
    scale: float,
    initial_state: torch.Tensor | None,
    eps: float | None,
    plan: _Plan,
    workspace: _Workspace,
    o: torch.Tensor,
    final_state: torch.Tensor,
) -> None:
    """Compute some key heads and the R value heads of each; writes o and final_state.

    q, k `[rows, K]` read at keys `[NT, H, BT]`, v `[rows, V]` read at values `[NT, HV, BT]`; g, beta
    `[NT, HV, BT]` in the accumulation dtype, 0 in tails; eps is that of the normalisation, or None;
    initial_state and final_state `[N, HV, K, V]`, o `[T, HV, V]`.
    """
    (NT, H, BT), HV, K, V = keys.shape, values.shape[1], k.shape[-1], v.shape[-1]
    R, dtype = HV // H, g.dtype

    kq = workspace("kq", NT, H, 2, BT, K, dtype=dtype)
    for i, x in enumerate((k, q)):
        kq[:, :, i] = x.index_select(0, keys.flatten()).view(NT, H, BT, K)
    if eps is not None:
        kq.mul_(torch.rsqrt(kq.square().sum(-1, keepdim=True) + eps))
    k = kq[:, :, 0].flatten(0, 1)

    # All chunks at once: what the tokens of a chunk are to each other. [NT, H, R, ...]
    g, beta = g.unflatten(1, (H, R)), beta.unflatten(1, (H, R)).unsqueeze(-1)
    A = workspace("A", NT, H, R, BT, BT, dtype=dtype)
    D = _pairwise_decay(g, out=workspace("D", NT, H, R, BT, BT, dtype=dtype))
    G = g.cumsum(-1).exp_().unsqueeze(-1)
    products = torch.bmm(kq.view(NT * H, 2 * BT, K), k.mT).view(NT, H, 1, 2, BT, BT)
    torch.mul(products[:, :, :, 0], D, out=A).mul_(beta)
    Ai = workspace("Ai", NT * HV, BT, BT, dtype=dtype)
    Ai = _inverse_of_unit_lower(A.view(-1, BT, BT), out=Ai).view(NT, HV, BT, BT)
    to_end, whole = D[..., -1:, :].mT.clone(), G[..., -1:, :].transpose(2, 3)
    attention = D.mul_(products[:, :, :, 1]).view(NT, HV, BT, BT)
    beta_v = workspace("beta_v", NT, H, R, BT, V, dtype=dtype)
    torch.mul(v.index_select(0, values.flatten()).view_as(beta_v), beta, out=beta_v)
    minus_beta_G, scale_G = -beta * G, scale * G

    # Chunk after chunk of each sequence. The state is [N, H, K, R, V]: one product serves R value heads.
    state = workspace("state", plan.num_seqs, H, K, R, V, dtype=dtype)
    if initial_state is None:
        state.zero_()
    else:
        state.copy_(initial_state[plan.by_length].unflatten(1, (H, R)).transpose(2, 3))
    chunk_o = workspace("chunk_o", NT, H, R, BT, V, dtype=dtype)
    start = 0
    for step, n in enumerate(plan.steps):
        c, S = slice(start, start + n), state[:n]
        start += n
        v_new, o_c = beta_v[c], chunk_o[c].view(n * HV, BT, V)
        if step > 0 or initial_state is not None:
            read = torch.bmm(kq[c].view(n * H, 2 * BT, K), S.view(n * H, K, R * V))
            k_S, q_S = read.view(n, H, 2, BT, R, V).transpose(3, 4).unbind(2)
            v_new.addcmul_(k_S, minus_beta_G[c])
            torch.mul(q_S, scale_G[c], out=chunk_o[c])
        else:
            o_c.zero_()
        v_new = torch.bmm(Ai[c].view(n * HV, BT, BT), v_new.view(n * HV, BT, V))
        o_c.baddbmm_(attention[c].view(n * HV, BT, BT), v_new, alpha=scale)
        weighted = (v_new.view(n, H, R, BT, V) * to_end[c]).transpose(2, 3).reshape(n * H, BT, R * V)
        update = torch.bmm(k[c.start * H : c.stop * H].mT, weighted)
        S.mul_(whole[c]).add_(update.view(n, H, K, R, V))

    final_state[plan.by_length] = state.transpose(2, 3).flatten(1, 2)
    heads = torch.arange(HV, device=o.device)
    place = ((plan.place // BT)[:, None] * HV + heads) * BT + (plan.place % BT)[:, None]
    rows = chunk_o.view(NT * HV * BT, V).index_select(0, place.flatten())
    o[: plan.num_tokens] = rows.view(plan.num_tokens, HV, V)


def _pairwise_decay(g: torch.Tensor, *, out: torch.Tensor) -> torch.Tensor:
    """Decay from token j to token i of a chunk, `[..., BT]` to `[..., BT, BT]`; 0 for i < j.

    The log decays are summed over (j, i] alone: exact where differences of cumulative sums cancel, defined
    where g is -inf. A sum whose exp is not a normal number gives 0 (such numbers are slow on a CPU).
    """
    smallest = float(np.log(torch.finfo(g.dtype).tiny))
    after_j = torch.ones(g.shape[-1], g.shape[-1], dtype=torch.bool, device=g.device).tril_(-1)
    out.copy_(g.unsqueeze(-1)).masked_fill_(~after_j, 0).cumsum_(-2)
    kept = (out > smallest).tril_()
    return out.clamp_(min=smallest).exp_().mul_(kept)


def _inverse_of_unit_lower(A: torch.Tensor, *, out: torch.Tensor) -> torch.Tensor:
    """(I + A)^-1 for the part of A `[batch, BT, BT]` below the diagonal; the rest of A is not read.

    Forward substitution by blocks: a row of blocks is -(its diagonal inverse) (its A) (the rows above it).
    """
    size = _SOLVE_BLOCK

    def diagonal_blocks(x: torch.Tensor) -> torch.Tensor:
        return (
            x.unflatten(1, (-1, size)).unflatten(3, (-1, size)).diagonal(dim1=1, dim2=3).permute(0, 3, 1, 2)
        )

    blocks = diagonal_blocks(A).contiguous()
    eye = torch.eye(size, dtype=A.dtype, device=A.device).expand_as(blocks)
    diagonal_blocks(out.zero_()).copy_(
        torch.linalg.solve_triangular(blocks, eye, upper=False, unitriangular=True)
    )
    for i in range(size, A.shape[-1], size):
        row, above = slice(i, i + size), slice(i)
        product = torch.bmm(A[:, row, above], out[:, above, above])
        out[:, row, above] = torch.bmm(out[:, row, row], product).neg_()
    return out
