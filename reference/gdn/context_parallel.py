"""Prefill of one sequence split over R ranks: what a rank contributes, and how contributions fold.

The tokens of a rank take any incoming state S to Phi S + p (per value head, S `[K, V]`). Phi depends on
k, g and beta alone; p is what the rank would end with from a zero state. A rank adds the incoming state
once, through Phi, and never again.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch

from ..errors import invalid_argument
from .inputs import FLOAT_DTYPES, STATE_DTYPES, check_device, check_layout, check_shape, check_tensor
from .recurrent import recurrent_gated_delta_rule


class Contribution(NamedTuple):
    """What the tokens of a rank do to the state of each sequence: S -> Phi S + p.

    Phi: `[N, HV, K, K]` float64. p: `[N, HV, K, V]` float64.
    """

    Phi: torch.Tensor
    p: torch.Tensor


def rank_contribution(
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    *,
    cu_seqlens: torch.Tensor | None = None,
    use_qk_l2norm_in_kernel: bool = False,
    eps: float = 1e-6,
) -> Contribution:
    """What one rank's tokens contribute, computed by the definition in float64.

    Phi is the product of exp(g_t) (I - beta_t k_t k_t^T): the recurrence from the identity, with v = 0.

    Args:
        k: keys `[B, T, H, K]`.
        v: values `[B, T, HV, V]`, dtype of k.
        g: log decay `[B, T, HV]`, <= 0.
        beta: `[B, T, HV]`, in [0, 1].
        cu_seqlens: `[N + 1]`, bounds of the rank's part of each sequence (empty parts are the identity).
        use_qk_l2norm_in_kernel: normalise k first. Default: False.
        eps: of that normalisation. Default: 1e-6.

    Returns:
        Phi `[N, HV, K, K]` and p `[N, HV, K, V]`, float64.

    Raises:
        InvalidArgumentError: as `recurrent_gated_delta_rule`.
    """
    check_tensor("k", k, 4, FLOAT_DTYPES)

    def final_state(values: torch.Tensor, initial_state: torch.Tensor | None) -> torch.Tensor:
        _, state = recurrent_gated_delta_rule(
            k,
            k,
            values,
            g,
            beta,
            initial_state=initial_state,
            output_final_state=True,
            cu_seqlens=cu_seqlens,
            use_qk_l2norm_in_kernel=use_qk_l2norm_in_kernel,
            eps=eps,
        )
        assert state is not None  # asked for above
        return state

    p = final_state(v, None)
    N, HV, K, _ = p.shape
    identity = torch.eye(K, dtype=torch.float64, device=k.device).expand(N, HV, K, K)
    Phi = final_state(v.new_zeros(*v.shape[:3], K), identity)
    return Contribution(Phi, p)


def combine(first: Contribution, then: Contribution) -> Contribution:
    """The contribution of two ranks in a row; associative, with (I, 0) as its identity.

    S -> Phi_2 (Phi_1 S + p_1) + p_2

    Args:
        first: of the earlier tokens.
        then: of the later tokens, same shapes.

    Returns:
        The contribution of both together.

    Raises:
        InvalidArgumentError: when shapes, dtypes or devices differ.
    """
    check_layout(
        **{
            "first.Phi": (first.Phi, "N HV K K"),
            "first.p": (first.p, "N HV K V"),
            "then.Phi": (then.Phi, "N HV K K"),
            "then.p": (then.p, "N HV K V"),
        }
    )
    return Contribution(then.Phi @ first.Phi, then.Phi @ first.p + then.p)


def fold_ranks(contributions: Sequence[Contribution], initial_state: torch.Tensor) -> list[torch.Tensor]:
    """The state before each rank and after the last.

    Args:
        contributions: of ranks 0 to R - 1, in the order of their tokens; at least one.
        initial_state: `[N, HV, K, V]` float32 or float64, before rank 0.

    Returns:
        R + 1 states `[N, HV, K, V]` float64: states[r] enters rank r, states[R] is the final one.

    Raises:
        InvalidArgumentError: without contributions, or when a shape does not fit initial_state.
    """
    if not contributions:
        invalid_argument("contributions", "empty", "one for each rank, at least one")
    check_tensor("initial_state", initial_state, 4, STATE_DTYPES)
    N, HV, K, V = initial_state.shape
    for r, contribution in enumerate(contributions):
        Phi, p = f"contributions[{r}].Phi", f"contributions[{r}].p"
        check_layout(**{Phi: (contribution.Phi, "N HV K K"), p: (contribution.p, "N HV K V")})
        check_tensor(Phi, contribution.Phi, 4, (torch.float64,))
        check_shape(Phi, contribution.Phi, (N, HV, K, K), "[N, HV, K, K]")
        check_shape(p, contribution.p, (N, HV, K, V), "[N, HV, K, V]")
        check_device(Phi, contribution.Phi, initial_state.device)
    states = [initial_state.to(torch.float64)]
    for Phi, p in contributions:
        states.append(Phi @ states[-1] + p)
    return states
