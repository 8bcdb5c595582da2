"""Other projects' implementations that the benchmark measures ours against.

Nothing here computes anything: each function finds a peer's installed code, loads it unchanged and
returns a callable. `cli/peers-requirements.txt` says how the peers are installed; `tox run -e bench-peers`
does it for those on a CPU, `tox run -e bench-cuda` for that on a GPU. Importing this module imports no peer.
"""

import contextlib
import functools
import importlib
import importlib.metadata
import importlib.util
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FunctionType, ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

import torch

from ..equivalence_tests import vllm_batches
from ..optimized.vllm import gdn_metadata
from ..reference.errors import UnavailableError

# The loader reaches into this release's private functions, and every figure names it.
VLLM_ASCEND_VERSION = "0.18.0"

FLA_VERSION = "0.6.0"
"""Of fla-core: every figure against it names this release."""

_REMEDY = "install the peers with `tox run -e bench-peers`"
_FLA_REMEDY = "install it with `tox run -e bench-cuda`"

# vllm-ascend's platform plugin imports torch_npu, which needs an NPU's driver: with no plugin allowed
# vLLM picks its own platform. And vLLM logs to stdout, where a benchmark prints its figures.
_VLLM_IMPORT_ENVIRONMENT = {"VLLM_PLUGINS": "", "VLLM_LOGGING_STREAM": "ext://sys.stderr"}


def load_vllm_ascend_builder(
    *, num_value_heads: int, max_num_batched_tokens: int, max_num_seqs: int
) -> Callable[[torch.Tensor], object]:
    """Load vllm-ascend's per-step build of chunk metadata for gated delta rule prefill.

    Upstream has two routes. On an NPU it fills the pinned host buffers of a slot, two slots in turn,
    and copies each of the six tensors to its device buffer; for a CPU device it makes six new tensors.
    This is the first, the one that runs in production, with ordinary memory on both sides of each copy.
    So what is timed is the host's work plus six copies within host memory: it shows neither what the
    transfer to an NPU costs nor what pinned memory saves.

    Each call does what a prefill step without speculative decoding does after vLLM's own metadata
    (which both sides of a comparison would need) is built: check the state, pick
    `query_start_loc`, fill, copy.

    Loading it replaces the `build` method of vLLM's GDN metadata builder in this process, as
    upstream does at import.

    Args:
        num_value_heads: value heads of one rank (HV), >= 1. Upstream sizes its cumsum block by it.
        max_num_batched_tokens: most tokens in one step; the capacity of the index buffers.
        max_num_seqs: most sequences in one step; the capacity of the offset buffers.

    Returns:
        A callable from `query_start_loc` (`[N+1]`, int32, CPU, starts at 0) to upstream's
        GDNChunkedPrefillMetadata: six int32 tensors for chunk lengths 64, 1216 and the cumsum block. They
        are views of a slot that the second call from here overwrites.

    Raises:
        UnavailableError: vllm-ascend, or a vLLM it loads with, is not installed, or vllm-ascend is of
            another version than `VLLM_ASCEND_VERSION`.

    Source: vllm-ascend 0.18.0, vllm_ascend/patch/worker/patch_gdn_attn.py.
    """
    upstream = _vllm_ascend_metadata_module()
    builder: Any = SimpleNamespace(
        use_spec_decode=False,
        vllm_config=SimpleNamespace(
            model_config=SimpleNamespace(
                hf_text_config=SimpleNamespace(linear_num_value_heads=num_value_heads)
            ),
            parallel_config=SimpleNamespace(tensor_parallel_size=1),
            scheduler_config=SimpleNamespace(
                max_num_batched_tokens=max_num_batched_tokens, max_num_seqs=max_num_seqs
            ),
        ),
    )
    cpu = torch.device("cpu")
    _take_npu_route(upstream, builder)
    attn_metadata = SimpleNamespace(num_prefills=1)

    def build(query_start_loc: torch.Tensor) -> object:
        common_attn_metadata = SimpleNamespace(query_start_loc_cpu=query_start_loc)
        upstream._ensure_chunk_meta_state(builder, cpu)
        non_spec_query_start_loc = upstream._build_non_spec_query_start_loc_cpu(
            builder, attn_metadata, common_attn_metadata, None
        )
        return upstream._build_non_spec_chunked_prefill_meta(builder, non_spec_query_start_loc)

    return build


def load_metadata_builders(
    step: vllm_batches.Step, *, num_value_heads: int, is_vllm_included: bool
) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """Load vLLM 0.17.0's own metadata builder, with our chunk metadata and with vllm-ascend's.

    That of vllm-ascend takes the route of `load_vllm_ascend_builder`, and of ours the two buffers are
    ordinary memory, too. Loading it replaces `build` in this process as said there; ours does not run it.

    Args:
        step: what is built, again and again; both builders have just the capacity for it.
        num_value_heads: value heads of one rank (HV), >= 1.
        is_vllm_included: whether vLLM's own part of a build is done; otherwise both get what it made of the
            step once before, so that a call does what each adds.

    Returns:
        Ours and vllm-ascend's, each a call that returns vLLM's GDNAttentionMetadata with
        `non_spec_chunked_prefill_meta`.

    Raises:
        UnavailableError: as `load_vllm_ascend_builder`, or when the installed vLLM is not 0.17.0.

    Source: vllm-ascend 0.18.0, vllm_ascend/patch/worker/patch_gdn_attn.py.
    """
    upstream = _vllm_ascend_metadata_module()
    gdn_attn = upstream.gdn_attn
    config = vllm_batches.vllm_config(
        num_value_heads=num_value_heads,
        max_num_batched_tokens=step.num_tokens,
        max_num_seqs=len(step.rows),
    )
    common = vllm_batches.common_attn_metadata(step, "0.17.0")

    plain = gdn_attn.GDNAttentionMetadataBuilder
    vllms_part = upstream._ORIGINAL_BUILD
    if not is_vllm_included:
        made = vllms_part(vllm_batches.make_builder(plain, config), 0, common)

        def vllms_part(*args: Any, **kwargs: Any) -> Any:
            return made

    # The same code as upstream's, with another value of the one global that it calls for vLLM's part.
    patched = FunctionType(
        upstream._patched_build.__code__,
        {**vars(upstream), "_ORIGINAL_BUILD": vllms_part},
        argdefs=upstream._patched_build.__defaults__,
    )
    patched_class = type("PatchedBuilder", (plain,), {"build": patched})
    our_class = gdn_metadata.prebuilding(patched_class, gdn_attn.GDNAttentionMetadata)(patched_class)
    ours, peer = (vllm_batches.make_builder(c, config) for c in (our_class, patched_class))
    _take_npu_route(upstream, peer)
    return lambda: ours.build(0, common), lambda: peer.build(0, common)


def count_vllm_ascend_copies(build: Callable[[torch.Tensor], object], query_start_loc: torch.Tensor) -> int:
    """How many host-to-device copies one call of `load_vllm_ascend_builder`'s result makes."""
    buffer = _vllm_ascend_metadata_module().CpuGpuBuffer
    with mock.patch.object(buffer, "copy_to_gpu", autospec=True, side_effect=buffer.copy_to_gpu) as copy:
        build(query_start_loc)
    return copy.call_count


def load_transformers_chunk_gated_delta_rule() -> Callable[..., tuple[torch.Tensor, torch.Tensor | None]]:
    """Load transformers' chunked gated delta rule in plain PyTorch (Qwen3-Next).

    It is called as `f(query, key, value, g, beta, chunk_size=64, initial_state=None,
    output_final_state=False, use_qk_l2norm_in_kernel=False)`. To give it the same mathematics as
    this project's op:

    - query, key `[B, T, HV, K]`, value `[B, T, HV, V]`, g (log decay) and beta `[B, T, HV]`, B sequences
      of equal length T; no cu_seqlens. It knows no head groups: repeat q and k from H to HV heads
      first, `repeat_interleave(HV // H, dim=2)`.
    - The scale is K ** -0.5 and cannot be changed.
    - It normalises q and k only if `use_qk_l2norm_in_kernel`, adding 1e-6 to the sum of squares, in the
      dtype of the input.
    - It computes in float32 whatever the inputs are. The output `[B, T, HV, V]` has the dtype of query;
      initial_state and final state are `[B, HV, K, V]`, the latter float32, or None unless
      `output_final_state`.

    Returns:
        The function itself.

    Raises:
        UnavailableError: transformers, or its Qwen3-Next model, cannot be imported.

    Source: transformers 4.57.6, models/qwen3_next/modeling_qwen3_next.py.
    """
    try:
        modeling = importlib.import_module("transformers.models.qwen3_next.modeling_qwen3_next")
        peer: Callable[..., tuple[torch.Tensor, torch.Tensor | None]] = modeling.torch_chunk_gated_delta_rule
    except (ImportError, AttributeError, RuntimeError) as error:
        raise _unavailable("transformers' Qwen3-Next does not load", error) from error
    return peer


def load_fla_chunk_gated_delta_rule() -> Callable[..., tuple[torch.Tensor, torch.Tensor | None]]:
    """Load flash-linear-attention's chunked gated delta rule, in Triton.

    It is called as `f(q, k, v, g, beta, scale=None, initial_state=None, output_final_state=False,
    use_qk_l2norm_in_kernel=False, cu_seqlens=None)` with the tensors of this project's op as they are: it
    knows head groups. cu_seqlens is `[N+1]` int64 on the device. To compare speeds, know that

    - it computes its chunk indices from cu_seqlens and keeps them for as long as the same tensor object is
      passed: called again and again it has, like our prebuilt metadata, none of that work;
    - its first call with new shapes of heads tries the configurations of its autotuner: call it once before;
    - it hands the call to FlashQLA where that is installed (FLA_FLASH_QLA=0 forbids it).

    Returns:
        The function itself.

    Raises:
        UnavailableError: fla-core is not installed, is of another version than `FLA_VERSION`, or does not
            load.

    Source: fla-core 0.6.0, fla/ops/gated_delta_rule/chunk.py.
    """
    try:
        version = importlib.metadata.version("fla-core")
    except importlib.metadata.PackageNotFoundError as error:
        raise UnavailableError(f"fla-core is not installed; {_FLA_REMEDY}") from error
    if version != FLA_VERSION:
        raise UnavailableError(f"fla-core {version} is installed, the peer is {FLA_VERSION}; {_FLA_REMEDY}")
    try:
        module = importlib.import_module("fla.ops.gated_delta_rule")
        peer: Callable[..., tuple[torch.Tensor, torch.Tensor | None]] = module.chunk_gated_delta_rule
    except (ImportError, AttributeError, RuntimeError) as error:
        raise _unavailable("fla-core does not load", error, _FLA_REMEDY) from error
    return peer


@functools.cache  # a second load would wrap the builder that the first one already patched
def _vllm_ascend_metadata_module() -> ModuleType:
    return load_vllm_ascend_patch()


def load_vllm_ascend_patch() -> ModuleType:
    """Execute vllm-ascend's metadata patch by file: its package does not import without an NPU.

    It replaces `build` of vLLM's GDN metadata builder.

    Raises:
        UnavailableError: as `load_vllm_ascend_builder`.
    """
    # Finding a top-level package does not import it.
    package = importlib.util.find_spec("vllm_ascend")
    if package is None or not package.submodule_search_locations:
        raise UnavailableError(f"vllm-ascend is not installed; {_REMEDY}")
    version = importlib.metadata.version("vllm-ascend")
    if version != VLLM_ASCEND_VERSION:
        raise UnavailableError(
            f"vllm-ascend {version} is installed, the peer is {VLLM_ASCEND_VERSION}; {_REMEDY}"
        )
    path = Path(package.submodule_search_locations[0], "patch", "worker", "patch_gdn_attn.py")
    try:
        with _environment_defaults(_VLLM_IMPORT_ENVIRONMENT):
            return _load_file("_ascend_twin_peer_patch_gdn_attn", path)
    except (ImportError, OSError, AttributeError, RuntimeError) as error:
        raise _unavailable("vllm-ascend's metadata builder does not load", error) from error


def _load_file(name: str, path: Path) -> ModuleType:
    """Execute the Python file at path as a module that is not entered in sys.modules."""
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None  # a path in .py always has a spec with a loader
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _take_npu_route(upstream: ModuleType, builder: Any) -> None:
    """Have vllm-ascend's unchanged build go the way it goes on an NPU, with slots in ordinary memory.

    For a CPU it makes no pool, and its own allocation asks for pinned memory, which needs an accelerator. The
    pool and the device's type are state of the builder.
    """
    upstream._ensure_chunk_meta_state(builder, torch.device("cpu"))
    scheduler = builder.vllm_config.scheduler_config
    builder._ascend_gdn_chunked_prefill_pool = [
        _host_slot(upstream, scheduler.max_num_batched_tokens, scheduler.max_num_seqs) for _ in range(2)
    ]
    builder._ascend_gdn_chunk_meta_device = SimpleNamespace(type="host stand-in")


def _host_slot(upstream: ModuleType, max_num_batched_tokens: int, max_num_seqs: int) -> object:
    """One slot of upstream's pool, with its sizes, in ordinary host memory."""

    def host_buffer(*size: int) -> object:
        return upstream.CpuGpuBuffer(
            *size,
            dtype=torch.int32,
            device=torch.device("cpu"),
            pin_memory=False,
            with_numpy=False,
        )

    return upstream._GDNChunkedPrefillBufferSlot(
        chunk_indices_chunk64=host_buffer(max_num_batched_tokens, 2),
        chunk_offsets_chunk64=host_buffer(max_num_seqs + 1),
        update_chunk_offsets_chunk64=host_buffer(max_num_seqs + 1),
        final_chunk_indices_chunk64=host_buffer(max_num_seqs),
        chunk_indices_large_block=host_buffer(max_num_batched_tokens, 2),
        block_indices_cumsum=host_buffer(max_num_batched_tokens, 2),
    )


@contextlib.contextmanager
def _environment_defaults(defaults: dict[str, str]) -> Iterator[None]:
    """Set the variables that the user has not set, and take them away again at the end."""
    added = {name: value for name, value in defaults.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            os.environ.pop(name, None)


def _unavailable(what: str, error: BaseException, remedy: str = _REMEDY) -> UnavailableError:
    """The error for a peer that is installed but does not load, with the first line of the reason."""
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    return UnavailableError(f"{what} ({type(error).__name__}: {reason}); {remedy}")
