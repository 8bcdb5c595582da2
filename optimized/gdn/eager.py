"""Gated delta rule prefill in PyTorch over prebuilt metadata: every chunk of the batch at once.

The chunks of all sequences are gathered through the metadata into one batch `[NT, heads, BT, D]`. Everything
but the recurrence runs once for that batch. The recurrence advances all sequences together, one chunk of each
a step, so the batch is ordered by step: the first chunks of all sequences, then the second ones, and so on,
the sequence with the most chunks first. A step is then a slice of the batch, and its sequences are the first
ones. How many those are is known from the host side of the metadata: nothing is read back from the device.
"""

import numpy as np
import torch

from .kernels.block_sizes import CHUNK_SIZE
from .metadata import ChunkMetadata


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
    """The prebuilt path in PyTorch, in float32 (float64 for float64 input).

    With S the state a chunk starts from, G_i the decay from the chunk's start to token i, D_ij that from token
    j to token i:

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
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    out_dtype, (T, H, K), (HV, V) = q.dtype, q.shape[1:], v.shape[2:]
    N = len(metadata.seq_lens_host)
    by_length, rows = _chunks_by_step(metadata, T)

    def gather(x: torch.Tensor) -> torch.Tensor:
        padded = torch.cat([x[0], x.new_zeros(1, *x.shape[2:])])
        return padded[rows].transpose(1, 2).to(dtype, copy=True, memory_format=torch.contiguous_format)

    def for_value_heads(x: torch.Tensor) -> torch.Tensor:
        return x.repeat_interleave(HV // H, dim=1) if HV > H else x

    q, k, v, g, beta = (gather(x) for x in (q, k, v, g, beta))
    if use_qk_l2norm_in_kernel:
        q, k = (x * torch.rsqrt(x.square().sum(-1, keepdim=True) + eps) for x in (q, k))
    q = q * scale

    D = _pairwise_decay(g)
    G = g.cumsum(-1).exp_().unsqueeze(-1)
    beta = beta.unsqueeze(-1)
    A = for_value_heads(k @ k.mT) * D * beta
    eye = torch.eye(CHUNK_SIZE, dtype=dtype, device=A.device).expand_as(A)
    Ai = torch.linalg.solve_triangular(A.tril_(-1), eye, upper=False, unitriangular=True)
    attention = for_value_heads(q @ k.mT) * D
    q, k = for_value_heads(q), for_value_heads(k)
    beta_v, beta_G_k, G_q = beta * v, (beta * G) * k, G * q
    G_last, D_last_k = G[..., -1:, :], D[..., -1, :, None] * k

    state = torch.zeros(N, HV, K, V, dtype=dtype, device=q.device)
    if initial_state is not None:
        state.copy_(initial_state[by_length])
    o = torch.empty_like(v)
    start = 0
    for num_seqs in _sequences_a_step(metadata.seq_lens_host):
        c, S = slice(start, start + num_seqs), state[:num_seqs]
        v_new = Ai[c] @ (beta_v[c] - beta_G_k[c] @ S)
        o[c] = G_q[c] @ S + attention[c] @ v_new
        S.mul_(G_last[c]).add_(D_last_k[c].mT @ v_new)
        start += num_seqs

    packed = torch.zeros(T + 1, HV, V, dtype=out_dtype, device=o.device)
    packed[rows] = o.transpose(1, 2).to(out_dtype)
    final_state = torch.empty_like(state)
    final_state[by_length] = state
    return packed[:T].unsqueeze(0), final_state


def _chunks_by_step(metadata: ChunkMetadata, num_tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The order of the batch, computed on the device.

    Returns:
        by_length `[N]` int64, the sequences by their number of chunks, most first; rows `[NT, BT]` int64, the
        token of every row of every chunk in the order of the steps, `num_tokens` in the tails.
    """
    by_length = metadata.chunk_offsets_chunk64.diff().argsort(descending=True, stable=True)
    rank = by_length.argsort()
    sequence, chunk = metadata.chunk_indices_chunk64.long().unbind(1)
    order = (chunk * rank.shape[0] + rank[sequence]).argsort()
    sequence, chunk = sequence[order], chunk[order]
    first = metadata.cu_seqlens[sequence] + chunk * CHUNK_SIZE
    rows = first[:, None] + torch.arange(CHUNK_SIZE, device=first.device)
    return by_length, rows.where(rows < metadata.cu_seqlens[sequence + 1][:, None], num_tokens)


def _sequences_a_step(seq_lens: np.ndarray) -> list[int]:
    """How many sequences have a first chunk, a second chunk, and so on."""
    counts = np.sort(-(-seq_lens // CHUNK_SIZE))
    steps = np.arange(counts[-1] if len(counts) else 0)
    return (len(counts) - counts.searchsorted(steps, side="right")).tolist()


def _pairwise_decay(g: torch.Tensor) -> torch.Tensor:
    """Decay from token j to token i of a chunk, `[..., BT]` to `[..., BT, BT]`; 0 for i < j.

    The log decays are summed over (j, i] alone: exact where differences of cumulative sums cancel, defined
    where g is -inf.
    """
    after = torch.ones(CHUNK_SIZE, CHUNK_SIZE, dtype=torch.bool, device=g.device).tril(-1)
    return torch.where(after, g.unsqueeze(-1), 0).cumsum(-2).exp_().tril_()
