"""The bytes that the benchmark says kernels move are those that they move."""

from collections import Counter

import pytest
import torch

from ascend_twin.cli.traffic import PARTS, SCHEMES, Batch, Scheme, bytes_per_token, state_bytes
from ascend_twin.equivalence_tests.interpreter import run_launch
from ascend_twin.optimized.gdn import ChunkMetadataBuilder, chunk_gated_delta_rule, open_device
from ascend_twin.optimized.gdn.models import MODELS

QWEN3_NEXT = Batch((128,), *MODELS["Qwen3-Next-80B-A3B"].shape(tp=1))
A_RANK = Batch((128,), *MODELS["Qwen3-Next-80B-A3B"].shape(tp=8))
# Columns of V in blocks, the last of them not whole; tails; an empty sequence.
IRREGULAR = Batch((130, 0, 65, 1), H=1, HV=2, K=24, V=80)
BY_NAME = {scheme.name: scheme for scheme in SCHEMES}
TABLES = {"cu_seqlens", "chunk_indices", "chunk_offsets", "block_indices"}


def recorded(implementation: str, batch: Batch) -> Counter[tuple[str, str, str]]:
    """Bytes of every access of a call, by kernel, tensor and kind."""
    from ascend_twin.optimized.gdn.kernels.launch import recorded_launches

    N, T = len(batch.seq_lens), batch.num_tokens
    rng = torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, T, batch.H, batch.K, generator=rng).bfloat16() for _ in range(2))
    v = torch.randn(1, T, batch.HV, batch.V, generator=rng).bfloat16()
    g, beta = (torch.rand(1, T, batch.HV, generator=rng) for _ in range(2))
    bounds = torch.tensor([0, *batch.seq_lens], dtype=torch.int32).cumsum(0)
    metadata = ChunkMetadataBuilder(open_device("cpu"), T, N, batch.HV).build(bounds)
    with recorded_launches() as launches:
        chunk_gated_delta_rule(
            q, k, v, -g, beta.bfloat16(),
            initial_state=torch.zeros(N, batch.HV, batch.K, batch.V),
            output_final_state=True,
            use_qk_l2norm_in_kernel=True,
            prebuilt_meta=metadata,
            implementation=implementation,
        )  # fmt: skip
    found: Counter[tuple[str, str, str]] = Counter()
    for launch in launches:
        for access in run_launch(launch, range(launch.num_programs)):
            if access.parameter not in TABLES:
                size = launch.arguments[access.parameter].element_size()
                found[launch.name, access.parameter, access.kind] += access.offsets.size * size
    return found


@pytest.mark.usefixtures("triton_runs")
@pytest.mark.parametrize("batch", [A_RANK, IRREGULAR], ids=["Qwen3-Next TP 8", "irregular"])
@pytest.mark.parametrize("name", ["staged", "fused"])
def test_moves_are_the_accesses_of_the_kernels(
    name: str, batch: Batch, request: pytest.FixtureRequest
) -> None:
    if request.config.getoption("--device") != "cpu":
        pytest.skip("accesses are recorded by the interpreter, on a CPU")
    moves = BY_NAME[name].moves(batch)
    assert recorded(name, batch) == {(move.kernel, move.tensor, move.kind): move.bytes for move in moves}


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda scheme: scheme.name)
def test_every_move_is_in_one_part(scheme: Scheme) -> None:
    moved = sum(move.bytes for move in scheme.moves(QWEN3_NEXT))
    assert sum(bytes_per_token(scheme, QWEN3_NEXT).values()) * QWEN3_NEXT.num_tokens == moved
    tensors = [tensor for part in PARTS.values() for tensor in part]
    assert len(tensors) == len(set(tensors))


def test_states_of_chunks_are_written_and_read_once_unless_fused() -> None:
    # 32 heads of 128 x 128 bfloat16, a chunk of 64 tokens; and a float32 state in and out for 128 tokens,
    # which fla-core zeroes first.
    h, state = 32 * 128 * 128 * 2 / 64, 32 * 128 * 128 * 4 / 128
    found = {scheme.name: state_bytes(bytes_per_token(scheme, QWEN3_NEXT)) for scheme in SCHEMES}
    assert found == {
        "vllm-ascend 0.18.0": 2 * h + 2 * state,
        "fla-core 0.6.0": 2 * h + 3 * state,
        "staged": 2 * h + 2 * state,
        "fused": 2 * state,
    }


def test_figures_of_upstream_for_qwen3_next() -> None:
    """By hand: upstream's kernels are not run here."""
    by_name = {s.name: bytes_per_token(s, QWEN3_NEXT) for s in SCHEMES}
    row, key = 32 * 128 * 2, 16 * 128 * 2  # bytes of a token of v, and of q before it is spread over heads
    ascend, fla = by_name["vllm-ascend 0.18.0"], by_name["fla-core 0.6.0"]
    assert ascend["q, k, normalised copies"] == 4 * key + 5 * row  # k in four kernels, q in one
    assert fla["q, k, normalised copies"] == 4 * key + 2 * 16 * 4 + 6 * row  # k twice in that of the state
    assert ascend["w, u, v_new"] == 6 * row
    assert fla["w, u, v_new"] == 7 * row  # w too
    assert ascend["v, o"] == fla["v, o"] == 2 * row
    assert ascend["A, its inverse, Aqk"] == 32 * (64 * 4 + 3 * 16 * 4 + 24 * 4 + 2 * 64 * 2)
    assert fla["A, its inverse, Aqk"] == 32 * (64 * 2 + 40 * 2 + 64 * 2)
    # g of 4 bytes, beta of 2, and the last g of a chunk; ascend copies g four times and beta twice.
    assert ascend["g, beta, what is made of them"] == 32 * (6 * 4 + 2 * 2 + 4 / 64 + 2 * (4 * 4 + 2 * 2))
    assert fla["g, beta, what is made of them"] == 32 * (7 * 4 + 2 * 2 + 2 * 4 / 64)
