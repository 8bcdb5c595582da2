"""The gated delta rule, token by token: the definition that everything else is measured against."""

import torch

from ..errors import invalid_argument
from .inputs import (
    FLOAT_DTYPES,
    STATE_DTYPES,
    check_choice,
    check_device,
    check_eps,
    check_gates,
    check_gdn_shapes,
    check_shape,
    check_tensor,
    scale_or_default,
    sequence_bounds,
)
from .stages import l2norm

COMPUTE_DTYPES = (torch.float64, torch.float32)


def recurrent_gated_delta_rule(
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
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Run the gated delta rule one token at a time.

    Per value head hv (which reads key head hv // (HV // H)) and token t, with state S `[K, V]`:

        S_t = exp(g_t) S_{t-1}
        S_t = S_t + k_t (beta_t (v_t - k_t^T S_t))^T
        o_t = scale * q_t^T S_t

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
        compute_dtype: float64 (the truth) or float32.

    Returns:
        o `[B, T, HV, V]` and final_state `[N, HV, K, V]` (None unless asked for), both in `compute_dtype`:
        the truth is not rounded to the dtype of the input.

    Raises:
        InvalidArgumentError: for an argument that does not fit, with its name, value and what is allowed.

    Source: Yang, Kautz, Hatamizadeh, "Gated Delta Networks", 2024, equation 10; layout and argument names of
        flash-linear-attention 0.6.0, fla/ops/gated_delta_rule.
    """
    sizes = check_gdn_shapes(
        q, k, v, g, beta, scale=scale, initial_state=initial_state, cu_seqlens=cu_seqlens
    )
    check_choice("compute_dtype", compute_dtype, COMPUTE_DTYPES)
    check_eps(eps)
    bounds = sequence_bounds(cu_seqlens, sizes)
    check_gates(g.flatten(0, 1)[None], beta.flatten(0, 1)[None], bounds[-1])
    scale = scale_or_default(scale, sizes.K)

    q, k, v, g, beta = (x.flatten(0, 1).to(compute_dtype) for x in (q, k, v, g, beta))
    if use_qk_l2norm_in_kernel:
        q, k = l2norm(q, eps=eps), l2norm(k, eps=eps)
    q, k = (x.repeat_interleave(sizes.HV // sizes.H, dim=1) for x in (q * scale, k))
    o = v.new_zeros(sizes.B * sizes.T, sizes.HV, sizes.V)
    state = v.new_zeros(sizes.N, sizes.HV, sizes.K, sizes.V)
    if initial_state is not None:
        state.copy_(initial_state)
    for n in range(sizes.N):
        for t in range(bounds[n], bounds[n + 1]):
            _step(q[t], k[t], v[t], g[t], beta[t], state[n], o[t])
    return o.unflatten(0, (sizes.B, sizes.T)), state if output_final_state else None


def recurrent_gated_delta_rule_decode(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    *,
    state_pool: torch.Tensor,
    state_indices: torch.Tensor,
    null_slot: int | None = None,
    scale: float | None = None,
    use_qk_l2norm_in_kernel: bool = False,
    eps: float = 1e-6,
) -> torch.Tensor:
    """Decode one token of each of N sequences against a pool of states, which is updated in place.

    Args:
        q: `[N, H, K]`, floating.
        k: `[N, H, K]`, dtype of q.
        v: `[N, HV, V]`, dtype of q, HV a multiple of H.
        g: log decay `[N, HV]`, floating, <= 0.
        beta: `[N, HV]`, floating, in [0, 1].
        state_pool: `[num_slots, HV, K, V]` float32 or float64 (the dtype computed in); written only at the
            slots of real rows, and only when every argument has been checked.
        state_indices: `[N]` int32 or int64, the slot of each row; -1 marks a padding row. No two real rows
            share a slot.
        null_slot: slot that marks a padding row as well (0 where the engine reserves block 0), or None.
        scale: factor of the output. Default: `K ** -0.5`.
        use_qk_l2norm_in_kernel: normalise q and k over K first. Default: False.
        eps: added to the sum of squares by that normalisation. Default: 1e-6.

    Returns:
        o `[N, HV, V]` in the dtype of state_pool; 0 in padding rows.

    Raises:
        InvalidArgumentError: for an argument that does not fit, with its name, value and what is allowed.

    Source: padding sentinels as in vLLM 0.17.0, vllm/v1/attention/backends/utils.py (-1 and null block 0).
    """
    check_tensor("q", q, 3, FLOAT_DTYPES)
    check_tensor("k", k, 3, (q.dtype,))
    check_tensor("v", v, 3, (q.dtype,))
    check_tensor("g", g, 2, FLOAT_DTYPES)
    check_tensor("beta", beta, 2, FLOAT_DTYPES)
    N, HV, V = len(q), *v.shape[1:]
    check_shape("k", k, q.shape, "[N, H, K] of q")
    check_shape("v", v, (N, HV, V), "[N, HV, V]")
    check_shape("g", g, (N, HV), "[N, HV]")
    check_shape("beta", beta, (N, HV), "[N, HV]")
    sizes = check_gdn_shapes(
        *(x.unsqueeze(0) for x in (q, k, v, g, beta)), scale=scale, initial_state=None, cu_seqlens=None
    )
    check_eps(eps)
    check_gates(g[None], beta[None], sizes.T)
    check_tensor("state_pool", state_pool, 4, STATE_DTYPES)
    num_slots = state_pool.shape[0]
    check_shape("state_pool", state_pool, (num_slots, sizes.HV, sizes.K, sizes.V), "[num_slots, HV, K, V]")
    check_device("state_pool", state_pool, q.device)
    slots = _check_state_indices(state_indices, sizes.T, num_slots, null_slot)
    scale = scale_or_default(scale, sizes.K)

    q, k, v, g, beta = (x.to(state_pool.dtype) for x in (q, k, v, g, beta))
    if use_qk_l2norm_in_kernel:
        q, k = l2norm(q, eps=eps), l2norm(k, eps=eps)
    q, k = (x.repeat_interleave(sizes.HV // sizes.H, dim=1) for x in (q, k))
    o = torch.zeros_like(v)
    for n, slot in enumerate(slots):
        if slot is not None:
            _step(q[n] * scale, k[n], v[n], g[n], beta[n], state_pool[slot], o[n])
    return o


def _check_state_indices(
    state_indices: torch.Tensor, num_rows: int, num_slots: int, null_slot: int | None
) -> list[int | None]:
    """The slot of each row, None for a padding row."""
    check_tensor("state_indices", state_indices, 1, (torch.int32, torch.int64))
    check_shape("state_indices", state_indices, (num_rows,), "[N]")
    if null_slot is not None and not 0 <= null_slot < num_slots:
        invalid_argument("null_slot", null_slot, f"a slot in [0, {num_slots}), or None")
    slots: list[int | None] = []
    for n, slot in enumerate(state_indices.tolist()):
        padding = slot in (-1, null_slot)
        if not padding and not 0 <= slot < num_slots:
            invalid_argument(f"state_indices[{n}]", slot, f"-1 (padding) or a slot in [0, {num_slots})")
        if not padding and slot in slots:
            invalid_argument(f"state_indices[{n}]", slot, "a slot that no other row of the batch owns")
        slots.append(None if padding else slot)
    return slots


def _step(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    state: torch.Tensor,
    o: torch.Tensor,
) -> None:
    """One token of every value head: q, k `[HV, K]`, v `[HV, V]`; writes state `[HV, K, V]`, o `[HV, V]`."""
    state.mul_(g.exp()[:, None, None])
    delta = beta[:, None] * (v - _read(k, state))
    state.addcmul_(k[:, :, None], delta[:, None, :])
    o.copy_(_read(q, state))


def _read(x: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
    """x^T S of every value head: x `[HV, K]` and state `[HV, K, V]` give `[HV, V]`."""
    return torch.bmm(x[:, None], state)[:, 0]
