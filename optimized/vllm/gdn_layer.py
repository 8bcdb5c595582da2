# pyright: reportMissingImports=false
"""A Qwen3-Next / Qwen3.5 GDN layer in vLLM whose prefill core is, by option, ours.

Everything else of the layer stays vLLM's: projections, convolution, gates, the decode of single tokens, the
pool of states and who owns which slot.
"""

import functools
import importlib
import importlib.util
import inspect
import logging
import sys
from types import ModuleType
from typing import Any

import torch

from ...reference.errors import UnavailableError
from ..gdn import ChunkMetadataBuilder, open_device
from .gdn_core import (
    METADATA_FIELD,
    PrefillCore,
    StateLayout,
    convert_states,
    gather_states,
    scatter_states,
)
from .late_import import when_imported
from .record_gdn import call_recorder
from .settings import read_settings

_logger = logging.getLogger(f"vllm.{__name__}")

_LAYER_MODULE = "vllm.model_executor.layers.mamba.gdn.qwen_gdn_linear_attn"
_CPU_MODULE = "vllm.model_executor.layers.mamba.ops.cpu.gdn_attention"
_LAYER = "QwenGatedDeltaNetAttention"
_CPU_OP = "chunk_gated_delta_rule_cpu"
_CPU_OP_ARGUMENTS = (
    "query",
    "key",
    "value",
    "g",
    "beta",
    "initial_state",
    "cu_seqlens",
    "use_qk_l2norm_in_kernel",
    "initial_state_indices",
    "eps",
)
_MARK = "swaps_for_ascend_twin"
OF_LAYER = "ascend_twin_layer"
"""Attribute of a query: the layer that made it."""


def install() -> None:
    """Replace vLLM's layer as soon as it is there: not before a model that has one is loaded.

    To import its module here would ask for the device, in processes that must not have touched it.

    Raises:
        UnavailableError: when the installed vLLM has no such layer, or one that is there already cannot be
            replaced, or another plugin has replaced it; nothing has been changed.

    Source: vllm/model_executor/layers/mamba/gdn/qwen_gdn_linear_attn.py, and ops/cpu/gdn_attention.py beside
        that folder, 0.32.0.
    """
    if _LAYER_MODULE in sys.modules:
        replace(sys.modules[_LAYER_MODULE])
        return
    try:
        is_there = importlib.util.find_spec(_LAYER_MODULE) is not None
    except ImportError as error:
        raise UnavailableError(f"vLLM has no GDN layer that can be replaced: {error}") from error
    if not is_there:
        raise UnavailableError(f"vLLM has no GDN layer that can be replaced: no {_LAYER_MODULE}")
    when_imported(_LAYER_MODULE, _replace_or_warn)


def install_now() -> None:
    """As `install`, and at once: for whoever wants to know, in a process that does not serve."""
    install()
    replace(_import(_LAYER_MODULE))


def _replace_or_warn(layers: ModuleType) -> None:
    """Replace the layer; where it cannot be, vLLM goes on with its own, unless a core was chosen."""
    from vllm.config import get_current_vllm_config_or_none

    try:
        replace(layers)
    except UnavailableError as error:
        config = get_current_vllm_config_or_none()
        if config is not None and read_settings(config.additional_config).gdn_core:
            raise
        _logger.warning("GDN layer is off: %s", error)


def replace(layers: ModuleType) -> None:
    """Register the layer out of tree, and put a switch before the kernel that vLLM has for CPUs.

    Without the option both do nothing but pass on. Twice does nothing; errors as of `install`.
    """
    cpu_ops, registry = _import(_CPU_MODULE), _registry()
    kind: Any = getattr(layers, _LAYER, None)
    _check_seams(kind, cpu_ops)
    registered = registry.get(_LAYER)
    if hasattr(registered, _MARK):
        return
    if registered is not None:
        raise UnavailableError(f"{registered.__module__}.{registered.__name__} has replaced vLLM's {_LAYER}")
    setattr(cpu_ops.ops, _CPU_OP, switched(getattr(cpu_ops.ops, _CPU_OP)))
    kind.register_oot(_swapping(kind))


def prefill_cores(model: torch.nn.Module) -> dict[str, PrefillCore]:
    """The core of every GDN layer of a model that has one of ours, by the name of the layer."""
    layers: list[Any] = [layer for layer in model.modules() if hasattr(layer, _MARK)]
    return {layer.prefix: layer.prefill_core for layer in layers if layer.prefill_core is not None}


def _import(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UnavailableError(f"vLLM has no GDN layer that can be replaced: {error}") from error


def _registry() -> dict[str, Any]:
    return _import("vllm.model_executor.custom_op").op_registry_oot


def _check_seams(kind: Any, cpu_ops: ModuleType) -> None:
    """Raise unless vLLM calls what is replaced, in the order and by the names that we rely on."""
    for name in ("register_oot", "rearrange_mixed_qkv", "_forward_core"):
        if not hasattr(kind, name):
            raise UnavailableError(f"vLLM's {_LAYER} has no {name}")
    op = getattr(getattr(cpu_ops, "ops", None), _CPU_OP, None)
    if op is None or not set(_CPU_OP_ARGUMENTS) <= set(inspect.signature(op).parameters):
        raise UnavailableError(f"vLLM has no {_CPU_OP}, or with other arguments than {_CPU_OP_ARGUMENTS}")
    callers = [f for f in vars(cpu_ops).values() if inspect.isfunction(f) and _CPU_OP in f.__code__.co_names]
    if not callers or any("rearrange_mixed_qkv" not in f.__code__.co_names for f in callers):
        raise UnavailableError(f"vLLM's {_CPU_OP} is not called with what the layer's method hands out")
    if "chunk_gated_delta_rule" not in kind._forward_core.__code__.co_names:
        raise UnavailableError(f"vLLM's {_LAYER}._forward_core does not call its chunk_gated_delta_rule")


def _swapping(kind: Any) -> type:
    """The layer: a subclass of vLLM's, which is not there before vLLM is."""

    class SwappableGatedDeltaNetAttention(kind):
        """vLLM's layer, with a prefill core of ours where `additional_config` names one."""

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.prefill_core = _chosen_core()
            if self.prefill_core is not None:
                check_place(self)
                self.chunk_gated_delta_rule = DeviceCore(self.prefill_core, self.prefix)
                _say_once(self.prefill_core.name)
            self.call_recorder = call_recorder(self.prefix)
            if self.call_recorder is not None:
                step = functools.partial(step_metadata, self.prefix)
                self.call_recorder.watch(self.chunk_gated_delta_rule, step)

        def rearrange_mixed_qkv(self, mixed_qkv: Any) -> Any:
            # The kernel for CPUs is a plain function, and is not told for which layer it runs. The query that
            # it is handed is the one made here.
            query, key, value = super().rearrange_mixed_qkv(mixed_qkv)
            if query is not None:
                setattr(query, OF_LAYER, self)
            return query, key, value

    setattr(SwappableGatedDeltaNetAttention, _MARK, True)
    return SwappableGatedDeltaNetAttention


@functools.cache
def _say_once(core: str) -> None:
    _logger.info("The prefill of GDN layers is computed by %s.", core)


def _chosen_core() -> PrefillCore | None:
    from vllm.config import get_current_vllm_config

    name = read_settings(get_current_vllm_config().additional_config).gdn_core
    return None if name is None else PrefillCore(name)


def check_place(layer: Any) -> None:
    """Raise what would else stop the engine at its first prompt, or never: that its core cannot run here."""
    for function in (layer.forward, layer._forward_method, layer._forward_core):
        if function.__module__ != _LAYER_MODULE:
            theirs = f"{function.__module__}.{function.__qualname__}"
            raise UnavailableError(
                f"a GDN core was chosen, and {theirs} has taken the place of what calls it in vLLM"
            )
    method = layer._forward_method.__name__
    if method == "forward_xpu":
        raise UnavailableError("a GDN core was chosen, and vLLM's layer has no place for one on an XPU")
    if method == "forward_cpu":
        try_core(layer.prefill_core.name, layer.head_k_dim, layer.head_v_dim)


def try_core(name: str, K: int, V: int) -> None:
    """Run one token through a core on the CPU, in the dtype that vLLM's layer has there.

    Raises:
        InvalidArgumentError: where it does not take these head dims.
        UnavailableError: where it does not run on this CPU, as Triton's kernels without an interpreter.
    """
    with torch.device("cpu"):
        metadata = ChunkMetadataBuilder(open_device("cpu"), 1, 1, 1).build(torch.tensor([0, 1]))
        key, value = (torch.zeros(1, 1, 1, dim, dtype=torch.bfloat16) for dim in (K, V))
        gate = torch.zeros(1, 1, 1)
        PrefillCore(name)(
            key,
            key,
            value,
            gate,
            gate,
            initial_state=torch.zeros(1, 1, K, V, dtype=torch.float32),
            cu_seqlens=torch.tensor([0, 1]),
            use_qk_l2norm_in_kernel=True,
            eps=1e-6,
            metadata=metadata,
        )


def switched(original: Any) -> Any:
    """vLLM's kernel for CPUs, or what the layer that made the query has for it: core, recorder or both."""
    signature = inspect.signature(original)
    place_of_query = list(signature.parameters).index("query")

    @functools.wraps(original)
    def chunk_gated_delta_rule_cpu(*args: Any, **kwargs: Any) -> Any:
        query = kwargs["query"] if "query" in kwargs else args[place_of_query]
        layer = getattr(query, OF_LAYER, None)
        if layer is None:
            _refuse_lost_query()
            return original(*args, **kwargs)
        core, recorder = layer.prefill_core, layer.call_recorder
        if core is None and recorder is None:
            return original(*args, **kwargs)
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        given = bound.arguments
        if core is None:
            name, run = f"vllm {_CPU_OP}", functools.partial(original, *args, **kwargs)
        else:
            metadata = prebuilt_metadata(layer.prefix)
            name, run = core.name, functools.partial(run_on_pool, core, given, metadata)
        if recorder is None:
            return run()
        return recorder.run_on_pool(run, given, name, step_metadata(layer.prefix))

    return chunk_gated_delta_rule_cpu


def _refuse_lost_query() -> None:
    """Raise where a core was chosen, and vLLM's kernel would silently run in its place."""
    from vllm.forward_context import get_forward_context, is_forward_context_available

    if not is_forward_context_available():
        return
    layers = get_forward_context().no_compile_layers.values()
    if any(getattr(layer, "prefill_core", None) is not None for layer in layers):
        raise UnavailableError(
            f"a GDN core was chosen, and vLLM calls {_CPU_OP} with a query that none of its layers made"
        )


def run_on_pool(core: PrefillCore, given: dict[str, Any], metadata: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Do what vLLM's kernel for CPUs does, by a core: its states are in the pool, and are updated in place.

    Args:
        core: computes.
        given: the arguments of the kernel by name. vLLM has zeroed the slots of new sequences.
        metadata: prebuilt, or None.

    Returns:
        The output `[1, T, HV, V]`, and the pool.
    """
    pool, slots = given["initial_state"], given["initial_state_indices"]
    o, final_state = core(
        given["query"],
        given["key"],
        given["value"],
        given["g"],
        given["beta"],
        initial_state=gather_states(pool, slots, StateLayout.KEY_FIRST),
        cu_seqlens=given["cu_seqlens"],
        use_qk_l2norm_in_kernel=given["use_qk_l2norm_in_kernel"],
        eps=given["eps"],
        metadata=metadata,
    )
    scatter_states(pool, slots, final_state, StateLayout.KEY_FIRST)
    return o, pool


class DeviceCore(torch.nn.Module):
    """Stands where vLLM's layer keeps its kernel for GPUs, which gathers and scatters the states around it.

    Args:
        core: computes.
        prefix: name of the layer, under which the metadata of a step are found.
    """

    def __init__(self, core: PrefillCore, prefix: str) -> None:
        super().__init__()
        self.core = core
        self.prefix = prefix

    def forward(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        g: torch.Tensor,
        beta: torch.Tensor,
        initial_state: torch.Tensor,
        output_final_state: bool,
        cu_seqlens: torch.Tensor,
        use_qk_l2norm_in_kernel: bool = True,
        core_attn_out: torch.Tensor | None = None,
        **kernel_options: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Run the core.

        Args:
            q, k, v, g, beta: as in `optimized.gdn.chunk_gated_delta_rule`, B = 1.
            initial_state: `[N, HV, V, K]` floating.
            output_final_state: whether the second result is wanted.
            cu_seqlens: `[N + 1]` int32 or int64.
            use_qk_l2norm_in_kernel: normalise q and k over K first. Default: True.
            core_attn_out: written as well, its first values. Default: None.
            kernel_options: tables for vLLM's own kernels; not used.

        Returns:
            o `[1, T, HV, V]`, and the states after each sequence `[N, HV, V, K]` float32, or None.
        """
        o, final_state = self.core(
            q,
            k,
            v,
            g,
            beta,
            initial_state=convert_states(initial_state, StateLayout.VALUE_FIRST).float(),
            cu_seqlens=cu_seqlens,
            use_qk_l2norm_in_kernel=use_qk_l2norm_in_kernel,
            eps=1e-6,  # that of vLLM's kernels, which have no such argument
            metadata=prebuilt_metadata(self.prefix),
        )
        if core_attn_out is not None:
            core_attn_out.view(-1)[: o.numel()] = o.reshape(-1)
        return o, convert_states(final_state, StateLayout.VALUE_FIRST) if output_final_state else None


def prebuilt_metadata(prefix: str) -> Any:
    """The chunk metadata that our builder hung onto this step's metadata of a layer, or None."""
    return getattr(step_metadata(prefix), METADATA_FIELD, None)


def step_metadata(prefix: str) -> Any:
    """vLLM's metadata of this step for a layer; None outside of a step, and while vLLM warms up."""
    from vllm.forward_context import get_forward_context, is_forward_context_available

    if not is_forward_context_available():
        return None
    of_layers = get_forward_context().attn_metadata
    return of_layers.get(prefix) if isinstance(of_layers, dict) else None
