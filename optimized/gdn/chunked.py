"""The optimized op, and the registry of its implementations."""

import importlib
import logging
from collections.abc import Callable
from dataclasses import dataclass

import torch

from ...reference.errors import StagingError, UnavailableError, invalid_argument
from ...reference.gdn.inputs import (
    FLOAT_DTYPES,
    GdnSizes,
    check_choice,
    check_cu_seqlens,
    check_eps,
    check_gdn_shapes,
    scale_or_default,
)
from .device import open_device
from .eager import eager_chunk_gated_delta_rule
from .kernels.block_sizes import CHUNK_SIZE, LARGEST_HEAD_DIM, SOLVE_TRIL_BLOCK_SIZE, cumsum_block_size
from .metadata import ChunkMetadata, ChunkMetadataBuilder

_logger = logging.getLogger(__name__)
_said: set[str] = set()


@dataclass(frozen=True)
class Implementation:
    """A way to compute the op.

    Attributes:
        name: what `implementation=` calls it.
        summary: one line for people.
        run: the function; the signature is that of `eager_chunk_gated_delta_rule`.
        rounds_operands: whether it rounds the operands of its products to the dtype of q, as a matrix unit
            does. If not, its states are held to the limits of float32. Default: True.
        uses_triton: whether it is made of Triton kernels: on a CPU these run in the interpreter alone.
            Default: False.
        dtypes: of q that it takes. Default: all.
        max_head_dim: largest K and V that it takes, or None. Default: None.
    """

    name: str
    summary: str
    run: Callable[..., tuple[torch.Tensor, torch.Tensor]]
    rounds_operands: bool = True
    uses_triton: bool = False
    dtypes: tuple[torch.dtype, ...] = FLOAT_DTYPES
    max_head_dim: int | None = None


def _triton(name: str, summary: str) -> Implementation:
    """An implementation in `triton_paths`, which is imported when it first runs: Triton may be missing."""

    def run(*args: torch.Tensor, **kwargs: object) -> tuple[torch.Tensor, torch.Tensor]:
        try:
            paths = importlib.import_module(".triton_paths", __package__)
        except ImportError as error:
            raise UnavailableError(
                f"implementation {name} needs Triton (triton-ascend on an NPU, triton elsewhere): {error}"
            ) from error
        return getattr(paths, f"{name}_chunk_gated_delta_rule")(*args, **kwargs)

    return Implementation(
        name,
        summary,
        run,
        uses_triton=True,
        dtypes=(torch.float32, torch.float16, torch.bfloat16),
        max_head_dim=LARGEST_HEAD_DIM,
    )


IMPLEMENTATIONS = {
    implementation.name: implementation
    for implementation in (
        Implementation(
            "eager",
            "PyTorch over prebuilt metadata, on any device",
            eager_chunk_gated_delta_rule,
            rounds_operands=False,
        ),
        _triton("staged", "Triton, a kernel for every stage"),
        _triton("fused", "Triton, three launches; states stay on chip"),
    )
}


def default_implementation(device: torch.device) -> str:
    """The name of the implementation that a call without one takes: fused on cuda and npu, else eager."""
    return "fused" if device.type in ("cuda", "npu") else "eager"


@torch.no_grad()
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
    head_first: bool = False,
    prebuilt_meta: ChunkMetadata | None = None,
    implementation: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Gated delta rule prefill, fed by prebuilt chunk metadata; for inference only, no gradient is kept.

    Args:
        q: queries `[B, T, H, K]`, float64, float32, float16 or bfloat16.
        k: keys `[B, T, H, K]`, dtype of q.
        v: values `[B, T, HV, V]`, dtype of q, HV a multiple of H.
        g: log decay `[B, T, HV]`, floating, <= 0 (-inf forgets everything).
        beta: step size `[B, T, HV]`, floating, in [0, 1].
        scale: factor of the output. Default: `K ** -0.5`.
        initial_state: `[N, HV, K, V]` float32 or float64. Default: zeros.
        output_final_state: whether to return the state after each sequence. Default: False.
        cu_seqlens: `[N + 1]` int32 or int64, bounds (tokens) of the N sequences packed into one row (B = 1).
            With prebuilt_meta its values are not read. Default: those of prebuilt_meta, or B sequences of
            T tokens.
        use_qk_l2norm_in_kernel: normalise q and k over K first. Default: False.
        eps: added to the sum of squares by that normalisation. Default: 1e-6.
        head_first: only False, which says that dimension 1 counts tokens; vllm-ascend's callers pass it.
        prebuilt_meta: metadata of this step, on the device of q (B = 1). With it, nothing is read back from
            the device. Without it, metadata are built on the spot, which reads cu_seqlens; said once in the
            log. Default: None.
        implementation: a name in `IMPLEMENTATIONS`. "staged" and "fused" are Triton: dtypes but float64, K
            and V up to 256; in float16 they round states and products to it, so these must stay within its
            range. Default: `default_implementation`, that is "fused" on cuda and npu, else "eager".

    Returns:
        o `[B, T, HV, V]` in the dtype of q, 0 in rows of no sequence, and final_state `[N, HV, K, V]` (None
        unless asked for), float32, or float64 for float64 input.

    Raises:
        InvalidArgumentError: for an argument that does not fit, with its name, value and what is allowed; the
            values of g and beta are not read, to not wait for the device.
        StagingError: for prebuilt_meta that was released.
        UnavailableError: for an implementation that cannot run here, with the reason.
    """
    if implementation is not None:
        check_choice("implementation", implementation, tuple(IMPLEMENTATIONS))
    check_choice("head_first", head_first, (False,))
    check_eps(eps)
    if prebuilt_meta is not None and not isinstance(prebuilt_meta, ChunkMetadata):
        invalid_argument("prebuilt_meta", f"a {type(prebuilt_meta).__name__}", "a ChunkMetadata, or None")
    if prebuilt_meta is not None and cu_seqlens is None:
        cu_seqlens = prebuilt_meta.cu_seqlens
    sizes = check_gdn_shapes(
        q, k, v, g, beta, scale=scale, initial_state=initial_state, cu_seqlens=cu_seqlens
    )
    chosen = IMPLEMENTATIONS[implementation or default_implementation(q.device)]
    _check_takes(chosen, q.dtype, sizes)
    if prebuilt_meta is None:
        metadata = _build_on_the_spot(q, cu_seqlens, sizes.HV)
    else:
        metadata = prebuilt_meta
        _check_metadata(metadata, q, sizes)
    o, final_state = chosen.run(
        *(x.flatten(0, 1).unsqueeze(0) for x in (q, k, v, g, beta)),
        scale=scale_or_default(scale, sizes.K),
        initial_state=initial_state,
        use_qk_l2norm_in_kernel=use_qk_l2norm_in_kernel,
        eps=float(eps),
        metadata=metadata,
    )
    return o.view(sizes.B, sizes.T, sizes.HV, sizes.V), final_state if output_final_state else None


def _check_takes(implementation: Implementation, dtype: torch.dtype, sizes: GdnSizes) -> None:
    """Raise unless the implementation takes this dtype of q and these head dims."""
    of = f"for implementation {implementation.name}"
    check_choice(f"q.dtype {of}", dtype, implementation.dtypes)
    most = implementation.max_head_dim
    for name, size in (("K (q.shape[3])", sizes.K), ("V (v.shape[3])", sizes.V)):
        if most is not None and size > most:
            invalid_argument(f"{name} {of}", size, f"1 to {most}")


def _check_metadata(metadata: ChunkMetadata, q: torch.Tensor, sizes: GdnSizes) -> None:
    """Check what is known on the host of prebuilt metadata against the call."""
    if metadata.released:
        raise StagingError("prebuilt_meta was released: its buffer may already hold another step's metadata")
    if metadata.cu_seqlens.device != q.device:
        invalid_argument(
            "prebuilt_meta.cu_seqlens.device", metadata.cu_seqlens.device, f"{q.device}, where q is"
        )
    if len(metadata.seq_lens_host) != sizes.N:
        invalid_argument(
            "number of sequences of prebuilt_meta",
            len(metadata.seq_lens_host),
            f"{sizes.N}, as in cu_seqlens",
        )
    block_sizes = (CHUNK_SIZE, SOLVE_TRIL_BLOCK_SIZE, cumsum_block_size(sizes.HV))
    if metadata.block_sizes != block_sizes:
        invalid_argument(
            "block sizes of prebuilt_meta",
            metadata.block_sizes,
            f"{block_sizes}: build it with num_value_heads = HV = {sizes.HV}",
        )
    if metadata.cu_seqlens_host[-1] > q.shape[1]:
        invalid_argument("tokens of prebuilt_meta", metadata.cu_seqlens_host[-1], f"<= T = {q.shape[1]}")


def _build_on_the_spot(
    q: torch.Tensor, cu_seqlens: torch.Tensor | None, num_value_heads: int
) -> ChunkMetadata:
    if "on the spot" not in _said:
        _said.add("on the spot")
        _logger.warning(
            "chunk_gated_delta_rule was called without prebuilt_meta: chunk metadata are built inside the "
            "call, which waits for the device. Build them once a step with ChunkMetadataBuilder. (Said once.)"
        )
    B, T = q.shape[:2]
    bounds = [b * T for b in range(B + 1)] if cu_seqlens is None else check_cu_seqlens(cu_seqlens, T)
    builder = ChunkMetadataBuilder(
        open_device(str(q.device)), max(1, bounds[-1]), max(1, len(bounds) - 1), num_value_heads, depth=1
    )
    return builder.build(torch.tensor(bounds, dtype=torch.int64, device="cpu"))
