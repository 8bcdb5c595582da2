"""Gated delta rule prefill in chunks: the algorithm of the optimized path, in plain PyTorch."""

import torch

from . import stages
from .inputs import (
    FLOAT_DTYPES,
    check_choice,
    check_chunk_size,
    check_eps,
    check_gates,
    check_gdn_shapes,
    scale_or_default,
    sequence_bounds,
)
from .metadata import chunk_offsets


def chunk_gated_delta_rule(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    *,
    scale: float | None = None,
    initial_state: torch.Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: torch.Tensor | None = None,
    use_qk_l2norm_in_kernel: bool = False,
    eps: float = 1e-6,
    compute_dtype: torch.dtype = torch.float64,
    chunk_size: int = 64,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Run gated delta rule prefill chunk by chunk; equal to `recurrent_gated_delta_rule`.

    1. cut the tokens into chunks, normalise q and k
    2. A: how the updates within a chunk change each other
    3. Ai = (I + A)^-1
    4. w, u: the chunk as one update
    5. carry the state from chunk to chunk
    6. o: read the state and the chunk
    7. put the chunks back

    Args:
        q: queries `[B, T, H, K]`, float64, float32, float16 or bfloat16.
        k: keys `[B, T, H, K]`, dtype of q.
        v: values `[B, T, HV, V]`, dtype of q, HV a multiple of H.
        g: log decay `[B, T, HV]`, floating, <= 0 (-inf forgets everything).
        beta: step size `[B, T, HV]`, floating, in [0, 1].
        scale: factor of the output. Default: `K ** -0.5`.
        initial_state: `[N, HV, K, V]` float32 or float64. Default: zeros.
        output_final_state: whether to return the state after each sequence. Default: False.
        cu_seqlens: `[N + 1]` int32 or int64, bounds (tokens) of the N sequences packed into one row (B = 1);
            starts at 0, may repeat (an empty sequence), may end before T (padding: its output is 0).
            Default: B sequences of T tokens.
        use_qk_l2norm_in_kernel: normalise q and k over K first. Default: False.
        eps: added to the sum of squares by that normalisation. Default: 1e-6.
        compute_dtype: float64 or float32 compute in that dtype; bfloat16 or float16 round the operands of
            every product and accumulate in float32, as the optimized path does. Default: float64.
        chunk_size: BT, tokens, >= 1. Default: 64.

    Returns:
        o `[B, T, HV, V]` in `compute_dtype`, and final_state `[N, HV, K, V]` (None unless asked for) in
        float64 for float64, else float32.

    Raises:
        InvalidArgumentError: for an argument that does not fit, with its name, value and what is allowed.

    Source: Yang, Kautz, Hatamizadeh, "Gated Delta Networks", 2024, section 3.3; stages and names of
        flash-linear-attention 0.6.0, fla/ops/gated_delta_rule/chunk.py.
    """
    sizes = check_gdn_shapes(
        q, k, v, g, beta, scale=scale, initial_state=initial_state, cu_seqlens=cu_seqlens
    )
    check_choice("compute_dtype", compute_dtype, FLOAT_DTYPES)
    check_eps(eps)
    check_chunk_size(chunk_size)
    bounds = sequence_bounds(cu_seqlens, sizes)
    check_gates(g.flatten(0, 1)[None], beta.flatten(0, 1)[None], bounds[-1])
    scale = scale_or_default(scale, sizes.K)
    accumulate = stages.accumulation_dtype(compute_dtype)

    # 1.
    q, k, v, g, beta = (
        stages.to_chunks(x.flatten(0, 1).to(accumulate), bounds, chunk_size) for x in (q, k, v, g, beta)
    )
    if use_qk_l2norm_in_kernel:
        q, k = stages.l2norm(q, eps=eps), stages.l2norm(k, eps=eps)
    if sizes.HV > sizes.H:
        q, k = (x.repeat_interleave(sizes.HV // sizes.H, dim=1) for x in (q, k))
    if initial_state is None:
        initial_state = v.new_zeros(sizes.N, sizes.HV, sizes.K, sizes.V)
    # 2.
    A = stages.chunk_scaled_dot_kkt(k, g, beta, compute_dtype=compute_dtype)
    # 3.
    Ai = stages.solve_tril(A, compute_dtype=compute_dtype)
    # 4.
    w, u = stages.recompute_w_u(k, v, g, beta, Ai, compute_dtype=compute_dtype)
    del v, A, Ai  # their memory is used again: fresh memory costs more than arithmetic
    # 5.
    h, v_new, final_state = stages.chunk_delta_h(
        k,
        w,
        u,
        g,
        chunk_offsets=chunk_offsets(bounds, chunk_size).tolist(),
        initial_state=initial_state,
        compute_dtype=compute_dtype,
    )
    del w, u
    # 6.
    o = stages.chunk_fwd_o(q, k, v_new, h, g, scale=scale, compute_dtype=compute_dtype)
    # 7.
    o = stages.from_chunks(o, bounds, sizes.B * sizes.T).unflatten(0, (sizes.B, sizes.T))
    return o.to(compute_dtype), final_state if output_final_state else None
