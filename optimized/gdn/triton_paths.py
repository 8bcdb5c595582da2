"""Gated delta rule prefill in Triton: one kernel a stage, and fused into three launches."""

import torch

from .kernels.block_sizes import LARGEST_HEAD_DIM
from .kernels.chunk_delta_h import chunk_delta_h
from .kernels.chunk_fwd_o import chunk_fwd_o
from .kernels.chunk_local_cumsum import chunk_local_cumsum
from .kernels.chunk_scaled_dot_kkt import chunk_scaled_dot_kkt
from .kernels.fused_inter_chunk import fused_inter_chunk
from .kernels.fused_intra_chunk import fused_intra_chunk
from .kernels.l2norm import l2norm
from .kernels.recompute_w_u import recompute_w_u
from .kernels.solve_tril import solve_tril
from .metadata import ChunkMetadata
from .stage_results import keep


def staged_chunk_gated_delta_rule(
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
    """One kernel a stage: w, u, A, v_new and every chunk's state h go through device memory.

    Arguments and results are those of `eager_chunk_gated_delta_rule`.
    """
    q, k, v, g, beta, initial_state = _token_major(q, k, v, g, beta, initial_state)
    cu_seqlens, chunk_indices = metadata.cu_seqlens, metadata.chunk_indices_chunk64
    chunks = {"cu_seqlens": cu_seqlens, "chunk_indices": chunk_indices}
    if use_qk_l2norm_in_kernel:
        q, k = l2norm(q, eps=eps), l2norm(k, eps=eps)
        keep({"l2norm.q": q, "l2norm.k": k})
    g_cumsum = chunk_local_cumsum(g, cu_seqlens=cu_seqlens, block_indices=metadata.block_indices_cumsum)
    A = chunk_scaled_dot_kkt(k, g_cumsum, beta, **chunks)
    (Ai,) = solve_tril(
        A, cu_seqlens=cu_seqlens, block_indices=metadata.chunk_indices_large_block, dtype=k.dtype
    )
    w, u = recompute_w_u(k, v, g_cumsum, beta, Ai, **chunks)
    h, v_new, final_state = chunk_delta_h(
        k,
        w,
        u,
        g_cumsum,
        initial_state=initial_state,
        cu_seqlens=cu_seqlens,
        chunk_offsets=metadata.chunk_offsets_chunk64,
        num_chunks=len(chunk_indices),
    )
    o = chunk_fwd_o(q, k, v_new, h, g_cumsum, scale=scale, **chunks)
    coarse, rest = g_cumsum[..., None].unbind()
    keep({"chunk_local_cumsum.coarse": coarse, "chunk_local_cumsum.rest": rest})
    keep({"chunk_scaled_dot_kkt.A": A, "solve_tril.Ai": Ai, "recompute_w_u.w": w, "recompute_w_u.u": u})
    keep({"chunk_delta_h.h": h, "chunk_delta_h.v_new": v_new})
    return _zero_behind(o, metadata), final_state


def fused_chunk_gated_delta_rule(
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
    """Three launches: every chunk on its own, its solve, then every sequence; no w, u, v_new or h is stored.

    Arguments and results are those of `eager_chunk_gated_delta_rule`.
    """
    q, k, v, g, beta, initial_state = _token_major(q, k, v, g, beta, initial_state)
    cu_seqlens = metadata.cu_seqlens
    A, Aqk, factors = fused_intra_chunk(
        q,
        k,
        g,
        beta,
        use_qk_l2norm_in_kernel=use_qk_l2norm_in_kernel,
        eps=eps,
        cu_seqlens=cu_seqlens,
        chunk_indices=metadata.chunk_indices_chunk64,
    )
    Ai = solve_tril(
        A,
        cu_seqlens=cu_seqlens,
        block_indices=metadata.chunk_indices_large_block,
        dtype=k.dtype,
        num_parts=1 if k.dtype == torch.float32 else 2,
    )
    o, final_state = fused_inter_chunk(
        q,
        k,
        v,
        Ai,
        Aqk,
        factors,
        scale=scale,
        initial_state=initial_state,
        use_qk_l2norm_in_kernel=use_qk_l2norm_in_kernel,
        cu_seqlens=cu_seqlens,
    )
    return _zero_behind(o, metadata), final_state


def _token_major(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    initial_state: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Drop the leading dimension of 1; copy only what a kernel cannot read as it lies."""
    q, k, v = (_readable(x[0], rows=0, columns=2) for x in (q, k, v))
    g, beta = (_readable(x[0], rows=0) for x in (g, beta))
    if initial_state is not None:
        initial_state = _readable(initial_state, rows=2, columns=3)
    return q, k, v, g, beta, initial_state


def _readable(x: torch.Tensor, *, rows: int, columns: int | None = None) -> torch.Tensor:
    """x, or a copy where a tile's columns have gaps or its rows are too far apart for int32 offsets."""
    x = x.resolve_neg()  # kernels read memory, not what PyTorch will make of it
    x = x.float() if x.dtype == torch.float64 else x  # kernels compute in float32, and an NPU has no float64
    has_gaps = columns is not None and x.stride(columns) != 1
    return x.contiguous() if has_gaps or x.stride(rows) * LARGEST_HEAD_DIM >= 2**31 else x


def _zero_behind(o: torch.Tensor, metadata: ChunkMetadata) -> torch.Tensor:
    """o with zeros behind the last sequence, and the leading dimension of 1."""
    num_tokens = metadata.cu_seqlens_host[-1]
    if num_tokens < len(o):
        o[num_tokens:] = 0
    return o.unsqueeze(0)
