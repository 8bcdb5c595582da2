"""Each Triton kernel alone, against its reference stage in float64."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings

from ascend_twin.equivalence_tests.cases import DTYPES, PrefillCase
from ascend_twin.equivalence_tests.devices import interprets
from ascend_twin.equivalence_tests.kernel_stages import (
    PROBES,
    STAGES,
    Layout,
    StageCase,
    check_decays,
    check_stage,
    poisoned_memory,
)
from ascend_twin.equivalence_tests.strategies import SEEDS, Shapes, prefill_cases
from ascend_twin.optimized.gdn import ChunkMetadataBuilder
from ascend_twin.optimized.gdn.device import Device
from ascend_twin.optimized.gdn.kernels.block_sizes import (
    CHUNK_SIZE,
    SOLVE_TRIL_BLOCK_SIZE,
    cumsum_block_size,
)

pytestmark = pytest.mark.usefixtures("triton_runs")

KERNEL_DTYPES = ("float32", "float16", "bfloat16")
CASE = PrefillCase((70, 0, 130), H=2, HV=4, K=16, V=32, padding=5, use_qk_l2norm_in_kernel=True)
CASES = [
    replace(CASE, dtype="bfloat16", gates="forget"),
    # HV / H = 3 and HV no power of two; every length around a chunk.
    replace(CASE, seq_lens=(64, 1, 0, 129, 63), HV=6, K=24, V=8, dtype="float16", keys="identical"),
    replace(CASE, H=1, HV=3, gates="steep", betas="mixed", use_qk_l2norm_in_kernel=False),
    # The hard case of the inverse, over whole chunks.
    replace(CASE, seq_lens=(128, 64), keys="identical", gates="none", betas="one", padding=0),
    replace(CASE, dtype="bfloat16", gates="mixed", betas="zero", initial_state=False, padding=64),
    # Where w is what is left of the rounding of beta k: most of the limit is used.
    PrefillCase((57,), seed=65535, HV=2, V=32, dtype="bfloat16", gates="none", keys="identical", padding=1),
    replace(CASE, seq_lens=(0, 0), dtype="bfloat16"),
    replace(CASE, seq_lens=()),
]
DIMS = ((16, 256), (256, 16), (48, 80), (100, 72), (128, 128), (192, 130), (256, 256), (1, 3))
READS_BETA = ("chunk_scaled_dot_kkt", "recompute_w_u", "fused_intra_chunk")
READS_G = ("chunk_local_cumsum", "fused_intra_chunk")


def assert_equals_reference(
    stage: str, case: PrefillCase | StageCase, device: Device, layout: Layout | None = None
) -> None:
    failed = [str(c) for c in check_stage(stage, case, device, layout=layout) if not c.passed]
    assert not failed, "\n".join(failed)


def examples(device: Device) -> settings:
    """As many examples as the profile asks for on a device, a fifth of them in the interpreter."""
    wanted = settings.default.max_examples if settings.default else 25
    return settings(max_examples=max(5, wanted // 5) if interprets(device) else wanted)


def case_id(case: PrefillCase) -> str:
    lens = "-".join(map(str, case.seq_lens))
    return f"{lens}-{case.dtype}-{case.gates}-{case.betas}-{case.keys}-{case.H}-{case.HV}"


@pytest.fixture(params=STAGES)
def stage(request: pytest.FixtureRequest) -> str:
    return request.param


def test_stage_equals_its_reference(stage: str, device: Device, shapes: Shapes | None):
    @examples(device)
    @given(prefill_cases(dtypes=KERNEL_DTYPES, max_num_seqs=3, max_length=130, shapes=shapes))
    def check(case: PrefillCase) -> None:
        assert_equals_reference(stage, case, device)

    check()


@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_stage_equals_its_reference_in_corners(stage: str, case: PrefillCase, device: Device):
    assert_equals_reference(stage, case, device)


@pytest.mark.parametrize(("K", "V"), DIMS)
def test_stage_equals_its_reference_for_any_head_dims(stage: str, K: int, V: int, device: Device):
    dtype = "bfloat16" if K > V else "float32"
    case = PrefillCase((65, 3), K=K, V=V, dtype=dtype, padding=1, use_qk_l2norm_in_kernel=True)
    assert_equals_reference(stage, case, device)


def test_stage_equals_its_reference_for_every_length_of_a_tail(stage: str, device: Device):
    HV = 64 if stage == "chunk_local_cumsum" else 1  # of whose blocks one is a chunk
    case = PrefillCase(tuple(range(1, CHUNK_SIZE + 1)), HV=HV, K=8, V=24, gates="mixed", padding=1)
    assert_equals_reference(stage, case, device)


@pytest.mark.parametrize(
    ("stage", "case"),
    [
        ("chunk_local_cumsum", PrefillCase((300, 0, 129, 128, 127), H=1, HV=64, gates="forget")),
        ("chunk_local_cumsum", PrefillCase((cumsum_block_size(8) + 65, 3), H=1, HV=8, padding=1)),
        ("solve_tril", PrefillCase((SOLVE_TRIL_BLOCK_SIZE + 65, 3), padding=1)),
        ("solve_tril", PrefillCase((3, SOLVE_TRIL_BLOCK_SIZE), dtype="bfloat16")),
    ],
)
def test_stage_equals_its_reference_over_several_blocks(stage: str, case: PrefillCase, device: Device):
    assert_equals_reference(stage, case, device)


# Layouts: the same values, amid NaN


def at_an_odd_offset(name: str, x: torch.Tensor) -> torch.Tensor:
    buffer = x.new_full((x.numel() + 7,), float("nan"))
    return buffer[3 : 3 + x.numel()].view(x.shape).copy_(x)


def in_a_projection(name: str, x: torch.Tensor) -> torch.Tensor:
    """A part of the columns that one projection made of each token; every second slot of a state pool."""
    if name == "initial_state":
        pool = x.new_full((2 * len(x) + 1, *x.shape[1:]), float("nan"))
        return pool[1::2].copy_(x)
    if name not in MAY_HAVE_STRIDES:
        return x
    columns = x.flatten(1)
    buffer = x.new_full((len(x), columns.shape[1] + 10), float("nan"))
    return buffer[:, 5 : 5 + columns.shape[1]].view(x.shape).copy_(x)


def heads_first(name: str, x: torch.Tensor) -> torch.Tensor:
    """Heads before tokens, rows of a state with gaps between them."""
    if name not in MAY_HAVE_STRIDES:
        return x
    gap = 3 if x.ndim > 2 else 0
    shape = (x.shape[1], x.shape[0], *x.shape[2:-1], x.shape[-1] + gap) if x.ndim > 2 else x.shape[::-1]
    buffer = x.new_full(shape, float("nan")).transpose(0, 1)
    return buffer[..., : x.shape[-1]].copy_(x)


MAY_HAVE_STRIDES = {"raw_q", "raw_k", "q", "k", "v", "g", "beta", "initial_state"}


@pytest.mark.parametrize("layout", [at_an_odd_offset, in_a_projection, heads_first])
def test_stage_equals_its_reference_for_any_layout(stage: str, layout: Layout, device: Device):
    assert_equals_reference(stage, CASE, device, layout)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("stage", READS_G)
def test_stage_takes_g_of_another_dtype(stage: str, dtype: torch.dtype, device: Device):
    assert_equals_reference(stage, StageCase(CASE, g=dtype), device)


@pytest.mark.parametrize("stage", READS_BETA)
def test_stage_takes_beta_of_another_dtype(stage: str, device: Device):
    assert_equals_reference(stage, StageCase(replace(CASE, dtype="bfloat16"), beta=torch.float32), device)
    assert_equals_reference(stage, StageCase(CASE, beta=torch.float16), device)


@pytest.mark.parametrize("stage", ["chunk_delta_h", "fused_inter_chunk"])
def test_stage_takes_a_state_of_another_dtype(stage: str, device: Device):
    assert_equals_reference(stage, StageCase(CASE, initial_state=torch.bfloat16), device)


@pytest.mark.parametrize("stage", PROBES)
def test_decay_is_exact_where_log_decays_cancel(stage: str, device: Device):
    # fla#463, and what a difference of float32 sums of g loses behind a steep gate.
    @examples(device)
    @given(SEEDS)
    def check(seed: int) -> None:
        check_decays(stage, seed, device)

    check()


# The inverse


def of_keys(k: torch.Tensor, beta: float | torch.Tensor) -> torch.Tensor:
    k = torch.nn.functional.normalize(k, dim=-1)
    return ((k @ k.mT) * beta).tril(-1)


def drawn(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


MATRICES = {
    "identical keys": lambda n: torch.ones(n, n).tril(-1),
    "keys of alternating sign": lambda n: of_keys((-1.0) ** torch.arange(n)[:, None], 1.0),
    "nearly identical keys": lambda n: of_keys(1 + 1e-3 * drawn(n, 16), 1.0),
    "random keys": lambda n: of_keys(drawn(n, 16), torch.rand(n, 1, generator=torch.Generator())),
    "few directions": lambda n: of_keys(torch.eye(3)[torch.arange(n) * 7 % 3], 1.0),
    "beta 0": lambda n: torch.zeros(n, n),
}


@pytest.mark.parametrize("length", [CHUNK_SIZE, 1, 15, 16, 17, 33, 49])
@pytest.mark.parametrize("matrix", MATRICES)
def test_solve_tril_inverts(matrix: str, length: int, device: Device):
    A = MATRICES[matrix](length).float()
    padded = torch.nn.functional.pad(A, (0, CHUNK_SIZE - length))[:, None].to(device.torch_device)
    metadata = ChunkMetadataBuilder(device, length, 1, 1).build(torch.tensor([0, length]))
    identity = torch.eye(length, dtype=torch.float64)
    exact = torch.linalg.inv(identity + A.double())
    for dtype in map(DTYPES.get, KERNEL_DTYPES):
        assert dtype is not None
        with poisoned_memory():
            (Ai,) = STAGES["solve_tril"].launcher(
                padded.contiguous(),
                cu_seqlens=metadata.cu_seqlens,
                block_indices=metadata.chunk_indices_large_block,
                dtype=dtype,
            )
        assert Ai.dtype == dtype
        Ai = Ai[:, 0].double().cpu()
        assert torch.equal(Ai, Ai.tril())
        assert (Ai.diagonal() == 1).all()
        Ai = Ai[:, :length]
        torch.testing.assert_close(Ai, exact, rtol=torch.finfo(dtype).eps, atol=2e-6)
        if dtype == torch.float32:
            torch.testing.assert_close((identity + A.double()) @ Ai, identity, rtol=0, atol=1e-5)
