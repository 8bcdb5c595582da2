# pyright: reportMissingImports=false
"""vLLM's own GPU code of a GDN layer on a CPU: its Triton functions beside the prefill core are stood in for.

It gathers the initial states, calls the prefill core that the layer holds, and scatters the final ones. That
code, not a copy of it, is what meets our core on a GPU or an NPU.
"""

import contextlib
import importlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch

from ..optimized.vllm.gdn_core import PrefillCore
from ..reference.gdn import fused_gdn_gating, recurrent_gated_delta_rule_decode
from ..reference.gdn.stages import l2norm
from .vllm_model_engine import gdn_layers


@contextlib.contextmanager
def device_path(llm: Any, make: Callable[[], PrefillCore]) -> Iterator[list[PrefillCore]]:
    """Have the GDN layers of an engine take their path for GPUs, each with a core of its own.

    Yields:
        The cores.
    """
    layers = importlib.import_module("vllm.model_executor.layers.mamba.gdn.qwen_gdn_linear_attn")
    convolutions = importlib.import_module("vllm.model_executor.layers.mamba.ops.cpu.causal_conv1d")
    stand_ins = {
        "causal_conv1d_fn": convolutions.causal_conv1d_fn_cpu,
        "causal_conv1d_update": convolutions.causal_conv1d_update_cpu,
        "fused_post_conv_prep": _prepare,
        "fused_sigmoid_gating_delta_rule_update": _decode,
    }
    made = []
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.multiple(layers, **stand_ins))
        for layer in gdn_layers(llm):
            made.append(make())
            stack.enter_context(mock.patch.object(layer.chunk_gated_delta_rule, "core", made[-1]))
            stack.enter_context(mock.patch.object(layer, "_forward_method", layer.forward_cuda))
            stack.enter_context(mock.patch.object(layer, "enable_packed_recurrent_decode", False))
            stack.enter_context(_plain_weight(layer.conv1d))
        yield made


@contextlib.contextmanager
def _plain_weight(convolution: Any) -> Iterator[None]:
    """Undo how vLLM packs the weight for its kernel for CPUs, where it does."""
    packed = convolution.weight.data
    plain = getattr(convolution, "_cpu_unpacked_conv_weight", None)
    if plain is not None:
        convolution.weight.data = plain.unsqueeze(1)
    yield
    convolution.weight.data = packed


def _prepare(
    conv_output: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    A_log: torch.Tensor,
    dt_bias: torch.Tensor,
    num_k_heads: int,
    head_k_dim: int,
    head_v_dim: int,
    apply_l2norm: bool,
    output_g_exp: bool,
) -> tuple[torch.Tensor, ...]:
    """Queries and keys, normalised, values and gates from the output of the convolution."""
    assert (apply_l2norm, output_g_exp) == (True, False)
    keys = num_k_heads * head_k_dim
    q, k, v = conv_output.split([keys, keys, conv_output.shape[1] - 2 * keys], dim=1)
    q, k = (l2norm(x.unflatten(1, (-1, head_k_dim)).float(), eps=1e-6).to(x.dtype) for x in (q, k))
    g, beta = fused_gdn_gating(A_log, a, b, dt_bias)
    return q, k, v.unflatten(1, (-1, head_v_dim)), g, beta.float()


def _decode(
    A_log: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    dt_bias: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    initial_state: torch.Tensor,
    inplace_final_state: bool,
    cu_seqlens: torch.Tensor,
    ssm_state_indices: torch.Tensor,
    use_qk_l2norm_in_kernel: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """One token of each sequence; the pool is `[slots, HV, V, K]`, as it is declared."""
    assert inplace_final_state
    g, beta = fused_gdn_gating(A_log, a, b, dt_bias)
    o = recurrent_gated_delta_rule_decode(
        q[0],
        k[0],
        v[0],
        g,
        beta,
        state_pool=initial_state.mT,
        state_indices=ssm_state_indices[: len(cu_seqlens) - 1],
        null_slot=0,
        use_qk_l2norm_in_kernel=use_qk_l2norm_in_kernel,
    )
    return o[None].to(q.dtype), initial_state
