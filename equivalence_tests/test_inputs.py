"""What a public function refuses: the message names the argument, its value and what is allowed."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from ascend_twin.equivalence_tests.cases import PrefillCase
from ascend_twin.optimized import gdn as optimized
from ascend_twin.optimized.gdn.device import CpuDevice
from ascend_twin.reference import gdn as reference
from ascend_twin.reference.errors import AscendTwinError, InvalidArgumentError
from ascend_twin.reference.gdn import metadata, stages

T, H, HV, K, V = 5, 2, 4, 8, 24
CASE = PrefillCase((3, 0, 2), H=H, HV=HV, K=K, V=V)


def prefill_arguments() -> dict[str, Any]:
    return CASE.inputs()._asdict()


def decode_arguments() -> dict[str, Any]:
    inputs = prefill_arguments()
    tokens = {name: inputs[name][0] for name in ("q", "k", "v", "g", "beta")}
    return {**tokens, "state_pool": torch.zeros(7, HV, K, V), "state_indices": torch.arange(T)}


def prebuilt_arguments() -> dict[str, Any]:
    return {**prefill_arguments(), "prebuilt_meta": prebuilt(0, 3, 3, 5)}


def prebuilt(*bounds: int, num_value_heads: int = HV) -> optimized.ChunkMetadata:
    return optimized.ChunkMetadataBuilder(CpuDevice(), 100, 4, num_value_heads).build(torch.tensor(bounds))


def contribution() -> reference.Contribution:
    return reference.Contribution(torch.zeros(3, HV, K, K).double(), torch.zeros(3, HV, K, V).double())


def meta(*shape: int) -> torch.Tensor:
    return torch.zeros(shape, device="meta")


# Changes of one argument, and the message: start, and a part of what is allowed.
Bad = tuple[dict[str, Any], str, str]

# Every prefill: what can be known without reading a tensor, so the op checks it at no cost.
TENSORS: list[Bad] = [
    ({"q": [1.0]}, "q is a list; ", "a torch.Tensor"),
    ({"q": torch.zeros(1, T, H)}, "q.shape is (1, 5, 2); ", "4 dimensions"),
    ({"q": torch.zeros(1, T, H, K).int()}, "q.dtype is torch.int32; ", "torch.bfloat16"),
    ({"k": torch.zeros(1, T, H, K).half()}, "k.dtype is torch.float16; ", "torch.float32"),
    ({"k": torch.zeros(1, T, H, 7)}, "k.shape is (1, 5, 2, 7); ", "[B, T, H, K] of q = (1, 5, 2, 8)"),
    ({"v": None}, "v is a NoneType; ", "a torch.Tensor"),
    ({"v": torch.zeros(1, T, HV, V).double()}, "v.dtype is torch.float64; ", "torch.float32"),
    ({"v": torch.zeros(1, 4, HV, V)}, "v.shape is (1, 4, 4, 24); ", "[B, T, HV, V] = (1, 5, 4, 24)"),
    ({"v": torch.zeros(1, T, 3, V)}, "HV (v.shape[2]) is 3; ", "a multiple of H = 2"),
    ({"v": torch.zeros(1, T, HV, 0)}, "V (from q.shape (1, 5, 2, 8), v.shape (1, 5, 4, 0)) is 0; ", ">= 1"),
    ({"g": torch.zeros(1, T, HV).int()}, "g.dtype is torch.int32; ", "torch.float32"),
    ({"g": torch.zeros(1, T, H)}, "g.shape is (1, 5, 2); ", "[B, T, HV] = (1, 5, 4)"),
    ({"beta": torch.zeros(1, T)}, "beta.shape is (1, 5); ", "3 dimensions"),
    ({"beta": torch.zeros(1, T, H)}, "beta.shape is (1, 5, 2); ", "[B, T, HV] = (1, 5, 4)"),
    ({"beta": meta(1, T, HV)}, "beta.device is meta; ", "cpu, as the other tensors"),
    ({"v": meta(1, T, HV, V)}, "v.device is meta; ", "cpu, as the other tensors"),
    ({"initial_state": torch.zeros(3, HV, K, V).half()}, "initial_state.dtype is torch.float16; ", "float64"),
    ({"initial_state": torch.zeros(3, HV, V, K)}, "initial_state.shape is (3, 4, 24, 8); ", "(3, 4, 8, 24)"),
    ({"initial_state": torch.zeros(2, HV, K, V)}, "initial_state.shape is (2, 4, 8, 24); ", "[N, HV, K, V]"),
    ({"initial_state": meta(3, HV, K, V)}, "initial_state.device is meta; ", "cpu, as the other tensors"),
    ({"cu_seqlens": [0, 5]}, "cu_seqlens is a list; ", "a torch.Tensor"),
    ({"cu_seqlens": torch.zeros(4)}, "cu_seqlens.dtype is torch.float32; ", "torch.int32, torch.int64"),
    ({"cu_seqlens": torch.tensor([[0, 3, 3, 5]])}, "cu_seqlens.shape is (1, 4); ", "1 dimensions"),
    ({"cu_seqlens": torch.zeros(0).int()}, "cu_seqlens.shape is (0,); ", "at least one element"),
    ({"scale": float("nan")}, "scale is nan; ", "a finite number"),
    ({"scale": float("inf")}, "scale is inf; ", "a finite number"),
    ({"eps": -1e-6}, "eps is -1e-06; ", "a finite number >= 0"),
    ({"eps": "1"}, "eps is 1; ", "a finite number >= 0"),
    ({"scale": True}, "scale is True; ", "a finite number"),
    ({"scale": torch.tensor(0.5)}, "scale is 0.5; ", "a finite number"),
    ({"eps": float("inf")}, "eps is inf; ", "a finite number >= 0"),
]  # fmt: skip
BOUNDS: list[Bad] = [
    ({"cu_seqlens": torch.tensor([1, 3, 3, 5])}, "cu_seqlens[0] is 1; ", "0"),
    ({"cu_seqlens": torch.tensor([0, 3, 2, 5])}, "cu_seqlens[2] is 2; ", ">= cu_seqlens[1] = 3"),
    ({"cu_seqlens": torch.tensor([0, 3, 3, 6])}, "cu_seqlens[-1] is 6; ", "<= T = 5"),
]
GATES: list[Bad] = [
    ({"g": torch.full((1, T, HV), 0.5)}, "g (maximum) is 0.5; ", "<= 0: g is the logarithm of the decay"),
    ({"beta": torch.full((1, T, HV), 1.5)}, "beta (minimum, maximum) is (1.5, 1.5); ", "within [0, 1]"),
    ({"beta": torch.full((1, T, HV), -0.5)}, "beta (minimum, maximum) is (-0.5, -0.5); ", "within [0, 1]"),
]
REFERENCE_ONLY: list[Bad] = [
    ({"compute_dtype": torch.int32}, "compute_dtype is torch.int32; ", "torch.float64")
]
CHUNK_SIZE: list[Bad] = [
    ({"chunk_size": size}, f"chunk_size is {size}; ", "an int >= 1") for size in (0, -1, True, 64.0)
]


def refused_by_triton(implementation: str) -> list[Bad]:
    """What kernels cannot take; told apart before Triton is imported."""
    of, call = (
        f"for implementation {implementation}",
        {"implementation": implementation, "initial_state": None},
    )
    inputs = CASE.inputs()
    doubles = {"q": inputs.q.double(), "k": inputs.k.double(), "v": inputs.v.double()}
    wide, wide_v = torch.zeros(1, T, H, 257), torch.zeros(1, T, HV, 257)
    return [
        ({**call, **doubles}, f"q.dtype {of} is torch.float64; ", "torch.float32, torch.float16"),
        ({**call, "q": wide, "k": wide}, f"K (q.shape[3]) {of} is 257; ", "1 to 256"),
        ({**call, "v": wide_v}, f"V (v.shape[3]) {of} is 257; ", "1 to 256"),
    ]


OP_ONLY: list[Bad] = [
    ({"implementation": "fast"}, "implementation is fast; ", "eager, staged, fused"),
    ({"prebuilt_meta": prebuilt(0, 5)}, "number of sequences of prebuilt_meta is 1; ", "3"),
    ({"prebuilt_meta": prebuilt(0, 1, 2, 6)}, "tokens of prebuilt_meta is 6; ", "<= T = 5"),
    ({"prebuilt_meta": {}}, "prebuilt_meta is a dict; ", "a ChunkMetadata, or None"),
    (
        {"prebuilt_meta": prebuilt(0, 3, 3, 5, num_value_heads=1)},
        "block sizes of prebuilt_meta is (64, 1216, 4096); ",
        "(64, 1216, 1024): build it with num_value_heads = HV = 4",
    ),
    ({"head_first": True}, "head_first is True; ", "False"),
    *(bad for name in ("staged", "fused") for bad in refused_by_triton(name)),
]  # fmt: skip
THREE_HEADS = {"v": torch.zeros(T, 3, V), "g": torch.zeros(T, 3), "beta": torch.zeros(T, 3)}
DECODE: list[Bad] = [
    ({"q": torch.zeros(T, K)}, "q.shape is (5, 8); ", "3 dimensions"),
    ({"k": torch.zeros(T, H, 7)}, "k.shape is (5, 2, 7); ", "[N, H, K] of q = (5, 2, 8)"),
    ({"v": torch.zeros(4, HV, V)}, "v.shape is (4, 4, 24); ", "[N, HV, V] = (5, 4, 24)"),
    (THREE_HEADS, "HV (v.shape[2]) is 3; ", "a multiple of H = 2"),
    ({"g": torch.zeros(T, H)}, "g.shape is (5, 2); ", "[N, HV] = (5, 4)"),
    ({"g": torch.ones(T, HV)}, "g (maximum) is 1.0; ", "<= 0"),
    ({"beta": torch.zeros(4, HV)}, "beta.shape is (4, 4); ", "[N, HV] = (5, 4)"),
    ({"beta": torch.full((T, HV), 2.0)}, "beta (minimum, maximum) is (2.0, 2.0); ", "within [0, 1]"),
    ({"state_pool": torch.zeros(7, HV, V, K)}, "state_pool.shape is (7, 4, 24, 8); ", "[num_slots, HV, K,"),
    ({"state_pool": meta(7, HV, K, V)}, "state_pool.device is meta; ", "cpu"),
    ({"state_indices": torch.arange(4)}, "state_indices.shape is (4,); ", "[N] = (5,)"),
    ({"state_indices": torch.arange(5.0)}, "state_indices.dtype is torch.float32; ", "torch.int32"),
    ({"state_indices": torch.arange(5) + 3}, "state_indices[4] is 7; ", "a slot in [0, 7)"),
    ({"null_slot": 7}, "null_slot is 7; ", "a slot in [0, 7)"),
    ({"scale": float("inf")}, "scale is inf; ", "a finite number"),
    ({"eps": -1.0}, "eps is -1.0; ", "a finite number >= 0"),
]  # fmt: skip
CONTRIBUTION: list[Bad] = [
    ({"k": None}, "k is a NoneType; ", "a torch.Tensor"),
    ({"k": torch.zeros(T, H, K)}, "k.shape is (5, 2, 8); ", "4 dimensions"),
    ({"k": torch.zeros(1, T, H, K).long()}, "k.dtype is torch.int64; ", "torch.float64"),
    ({"v": torch.zeros(1, 4, HV, V)}, "v.shape is (1, 4, 4, 24); ", "[B, T, HV, V]"),
    *BOUNDS,
    *GATES,
]


def contribution_arguments() -> dict[str, Any]:
    inputs = prefill_arguments()
    return {name: inputs[name] for name in ("k", "v", "g", "beta", "cu_seqlens")}


def fold_arguments() -> dict[str, Any]:
    return {"contributions": [contribution()] * 2, "initial_state": torch.zeros(3, HV, K, V)}


SMALL = reference.Contribution(torch.zeros(2, HV, K, K).double(), torch.zeros(2, HV, K, V).double())
FOLD: list[Bad] = [
    ({"contributions": []}, "contributions is empty; ", "at least one"),
    (
        {"contributions": [contribution(), SMALL]},
        "contributions[1].Phi.shape is (2, 4, 8, 8); ",
        "[N, HV, K, K] = (3, 4, 8, 8)",
    ),
    ({"initial_state": torch.zeros(3, HV, K, V).half()}, "initial_state.dtype is torch.float16; ", "float32"),
]
COMBINE: list[Bad] = [({"then": SMALL}, "then.Phi.shape is (2, 4, 8, 8); ", "[N, HV, K, K] with N = 3")]
TO_CHUNKS: list[Bad] = [*BOUNDS, *CHUNK_SIZE, ({"cu_seqlens": []}, "cu_seqlens is empty; ", "the first 0")]


def table_arguments() -> dict[str, Any]:
    return {"cu_seqlens": [0, 3, 3, 5], "chunk_size": 64}


TABLE: list[Bad] = [*BOUNDS[:2], *CHUNK_SIZE, ({"cu_seqlens": [1, 2]}, "cu_seqlens[0] is 1; ", "0")]
TABLES = (
    metadata.chunk_indices,
    metadata.chunk_offsets,
    metadata.update_chunk_offsets,
    metadata.final_chunk_indices,
)

# A function, arguments that it accepts, and changes that it must refuse.
CALLS: list[tuple[Callable[..., Any], Callable[[], dict[str, Any]], list[Bad]]] = [
    (reference.recurrent_gated_delta_rule, prefill_arguments, [*TENSORS, *BOUNDS, *GATES, *REFERENCE_ONLY]),
    (
        reference.chunk_gated_delta_rule,
        prefill_arguments,
        [*TENSORS, *BOUNDS, *GATES, *REFERENCE_ONLY, *CHUNK_SIZE],
    ),
    (optimized.chunk_gated_delta_rule, prefill_arguments, [*TENSORS, *BOUNDS, *OP_ONLY]),
    (optimized.chunk_gated_delta_rule, prebuilt_arguments, TENSORS),
    (reference.recurrent_gated_delta_rule_decode, decode_arguments, DECODE),
    (reference.rank_contribution, contribution_arguments, CONTRIBUTION),
    (reference.combine, lambda: {"first": contribution(), "then": contribution()}, COMBINE),
    (reference.fold_ranks, fold_arguments, FOLD),
    (stages.to_chunks, lambda: {**table_arguments(), "x": torch.zeros(T, HV)}, TO_CHUNKS),
    *((table, table_arguments, TABLE) for table in TABLES),
]


@pytest.mark.parametrize(("function", "arguments"), [call[:2] for call in CALLS])
def test_function_accepts_the_arguments_that_the_bad_ones_start_from(
    function: Callable[..., Any], arguments: Callable[[], dict[str, Any]]
):
    function(**arguments())


@pytest.mark.parametrize(
    ("function", "arguments", "bad"),
    [
        pytest.param(function, arguments, bad, id=f"{function.__module__}.{function.__name__}-{bad[1]}")
        for function, arguments, changes in CALLS
        for bad in changes
    ],
)
def test_function_refuses_what_does_not_fit_and_modifies_nothing(
    function: Callable[..., Any], arguments: Callable[[], dict[str, Any]], bad: Bad
):
    changes, start, allowed = bad
    given = {**arguments(), **changes}
    tensors = [x for x in given.values() if isinstance(x, torch.Tensor) and x.device.type == "cpu"]
    before = [x.clone() for x in tensors]
    with pytest.raises(InvalidArgumentError) as caught:
        function(**given)
    message = str(caught.value)
    assert message.startswith(f"{start}allowed: "), message
    assert allowed in message.partition("allowed: ")[2], message
    assert all(torch.equal(x, y) for x, y in zip(tensors, before, strict=True))


def test_function_refuses_packed_sequences_in_more_than_one_row():
    arguments = prefill_arguments()
    rows = {
        name: arguments[name].expand(2, *arguments[name].shape[1:]) for name in ("q", "k", "v", "g", "beta")
    }
    for function in (reference.chunk_gated_delta_rule, optimized.chunk_gated_delta_rule):
        with pytest.raises(
            InvalidArgumentError, match=r"^B \(q.shape\[0\]\) is 2; allowed: 1 when cu_seqlens"
        ):
            function(**{**arguments, **rows})


def test_invalid_argument_error_is_ours_and_a_value_error():
    assert issubclass(InvalidArgumentError, AscendTwinError)
    assert issubclass(InvalidArgumentError, ValueError)
