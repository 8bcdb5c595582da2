"""The optimized op, every implementation of it, on the device under test."""

import functools
import inspect
import logging
import zlib
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any, NamedTuple

import hypothesis
import pytest
import torch
from hypothesis import strategies as st

from ascend_twin.equivalence_tests.cases import (
    DTYPES,
    Inputs,
    PrefillCase,
    check_prefill,
    compare_prefill,
    metadata_differences,
)
from ascend_twin.equivalence_tests.compare import compare_o
from ascend_twin.equivalence_tests.devices import interprets
from ascend_twin.equivalence_tests.failures import assert_agrees
from ascend_twin.equivalence_tests.properties import (
    CUTS,
    CUTS_BETWEEN_CHUNKS,
    EXACT,
    MAX_LENGTH,
    ORDERS,
    PROMISES,
    Prefill,
    Promise,
    assert_agree,
    assert_right,
    check_causal,
    check_dense,
    check_one_by_one,
    check_order,
    check_padding,
    check_split,
    check_then_decode,
    check_without_empty,
    prefill_by,
)
from ascend_twin.equivalence_tests.strategies import HEADS, SEEDS, Shapes, prefill_cases
from ascend_twin.equivalence_tests.tolerances import limit
from ascend_twin.optimized.gdn import (
    IMPLEMENTATIONS,
    ChunkMetadataBuilder,
    chunk_gated_delta_rule,
    default_implementation,
    open_device,
)
from ascend_twin.optimized.gdn import chunked as op_module
from ascend_twin.optimized.gdn.device import Device
from ascend_twin.reference.errors import StagingError
from ascend_twin.reference.gdn import recurrent_gated_delta_rule

Op = Callable[..., Prefill]
Layout = Callable[[Inputs], Inputs]


def dtypes_of(implementation: str) -> tuple[str, ...]:
    return tuple(name for name, dtype in DTYPES.items() if dtype in IMPLEMENTATIONS[implementation].dtypes)


in_every_dtype_it_takes = pytest.mark.parametrize(
    ("implementation", "dtype"),
    [(name, dtype) for name in IMPLEMENTATIONS for dtype in dtypes_of(name)],
    indirect=["implementation"],
)


@pytest.fixture(scope="module")
def builder_for(device: Device) -> Callable[[int], ChunkMetadataBuilder]:
    """A builder of metadata for each number of value heads."""
    return functools.cache(lambda HV: ChunkMetadataBuilder(device, 2048, 8, num_value_heads=HV))


@pytest.fixture(scope="module")
def promise(implementation: str) -> Promise:
    return PROMISES[implementation]


@pytest.fixture(scope="module")
def op(device: Device, implementation: str) -> Op:
    """The op on the device under test, with the options of a case."""

    def op(case: PrefillCase, **options: Any) -> Prefill:
        options = {"implementation": implementation, **options}
        return prefill_by(chunk_gated_delta_rule, case, device=device.torch_device, **options)

    return op


@pytest.fixture(scope="module")
def is_interpreted(device: Device, implementation: str) -> bool:
    """Whether kernels run in the interpreter: a thousand times slower than anything else here."""
    return IMPLEMENTATIONS[implementation].uses_triton and interprets(device)


@pytest.fixture
def search(request: pytest.FixtureRequest, is_interpreted: bool) -> Callable[..., None]:
    """Looks for arguments on which a check fails: those in `forced`, then as many as can be afforded."""

    def search(
        check: Callable[..., None],
        forced: Iterable[dict[str, Any]] = (),
        **drawn: st.SearchStrategy[Any],
    ) -> None:
        profile = hypothesis.settings()
        test = hypothesis.given(**drawn)(lambda **arguments: check(**arguments))
        for arguments in forced:
            test = hypothesis.example(**arguments)(test)
        if profile.derandomize:  # else every test would be shown the same batches
            test = hypothesis.seed(zlib.crc32(request.node.name.encode()))(test)
        affordable = max(3, profile.max_examples // 15) if is_interpreted else profile.max_examples
        hypothesis.settings(max_examples=affordable)(test)()

    return search


@pytest.fixture
def batches(is_interpreted: bool, shapes: Shapes | None) -> Callable[..., st.SearchStrategy[PrefillCase]]:
    """Batches in the given dtypes, of up to three chunks and a tail; fewer sequences and heads if slow."""
    few = {"max_num_seqs": 3, "heads": tuple(h for h in HEADS if h <= (2, 4))} if is_interpreted else {}
    return lambda dtypes: prefill_cases(dtypes=dtypes, max_length=MAX_LENGTH, shapes=shapes, **few)


@pytest.fixture
def corners(shapes: Shapes | None) -> Callable[[str], list[PrefillCase]]:
    """`CORNERS` in a dtype; where every shape is compiled for, each corner in one of three dtypes."""
    step = 1 if shapes is None else 3
    return lambda dtype: [
        replace(corner, dtype=dtype) for corner in CORNERS[list(DTYPES).index(dtype) % step :: step]
    ]


# Empty sequences between others, one to three chunks, tails of 1, 2 and 63 tokens, and head dims that fill no
# tile, one tile, several.
CORNERS = [
    PrefillCase((63, 0, 129, 0, 1), H=1, HV=2, K=16, V=32, gates="forget", betas="mixed", padding=1,
                use_qk_l2norm_in_kernel=True),
    PrefillCase((1, 0, 191), seed=1, H=2, HV=2, K=32, V=16, gates="steep", initial_state=False, padding=64),
    PrefillCase((129, 0, 0, 64), seed=2, K=24, V=8, gates="none", betas="one", keys="identical",
                initial_state=(True, True, False, False)),
    PrefillCase((0, 65), seed=3, H=1, HV=3, K=8, V=24, gates="mixed", betas="zero", padding=5),
    PrefillCase((70, 0, 1), seed=4, H=1, HV=2, K=40, V=72, keys="identical", use_qk_l2norm_in_kernel=True),
    PrefillCase((65, 0, 2), seed=5, K=128, V=128, use_qk_l2norm_in_kernel=True),
    PrefillCase((66,), seed=6, K=256, V=40, gates="forget", padding=1),
    PrefillCase((2, 0, 65), seed=7, H=2, HV=4, K=1, V=3, use_qk_l2norm_in_kernel=True),
]  # fmt: skip


@in_every_dtype_it_takes
def test_op_equals_the_definition(
    implementation: str,
    dtype: str,
    builder_for: Callable[[int], ChunkMetadataBuilder],
    device: Device,
    search: Callable[..., None],
    corners: Callable[[str], list[PrefillCase]],
    batches: Callable[..., st.SearchStrategy[PrefillCase]],
):
    def check(case: PrefillCase) -> None:
        builder = builder_for(case.HV)
        outcome = check_prefill(
            case, implementation=implementation, builder=builder, device=device.torch_device
        )
        assert_agrees(outcome)

    search(check, ({"case": corner} for corner in corners(dtype)), case=batches((dtype,)))


@in_every_dtype_it_takes
def test_op_equals_the_definition_when_g_is_very_negative(op: Op, dtype: str, search: Callable[..., None]):
    # fla#792, fla#794: B 2, T 75, H 4, D 64 in float16; a tail read as g = 0 gave exp(0 - g) = inf.
    def check(T: int, seed: int) -> None:
        case = PrefillCase((T, T), seed, H=4, HV=4, K=64, V=64, dtype=dtype, gates="steep")
        inputs = case.inputs()
        assert_right(op(case)(inputs), case, inputs)

    search(check, [{"T": 75, "seed": 0}], T=st.integers(1, 130), seed=SEEDS)


def alternating(short: float, long: float) -> torch.Tensor:
    return torch.tensor([short, long]).repeat(35)[:, None, None]


@pytest.mark.parametrize(
    "lengths",
    [torch.tensor(1e-4), torch.tensor(5e3), alternating(1e-4, 20), alternating(1e-4, 5e3)],
    ids=["short", "long", "short and middling", "short and long"],
)
@in_every_dtype_it_takes
def test_op_normalises_keys_of_any_length(op: Op, dtype: str, lengths: torch.Tensor):
    # Products of keys that are normalised too late overflow in float16, or vanish.
    case = PrefillCase((70,), H=1, HV=2, K=32, V=16, dtype=dtype, use_qk_l2norm_in_kernel=True)
    inputs = case.inputs()
    longer = {name: (getattr(inputs, name) * lengths).to(DTYPES[dtype]) for name in ("q", "k")}
    inputs = inputs._replace(**longer)
    assert_right(op(case)(inputs), case, inputs)


@pytest.mark.parametrize("gate", DTYPES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_op_takes_gates_and_states_of_any_dtype(op: Op, dtype: str, gate: str):
    case = PrefillCase((70, 0, 3), H=1, HV=2, dtype=dtype)
    inputs = case.inputs()
    assert inputs.initial_state is not None
    inputs = inputs._replace(
        g=inputs.g.to(DTYPES[gate]),
        beta=inputs.beta.to(DTYPES[gate]),
        initial_state=inputs.initial_state.double(),
    )
    assert_right(op(case)(inputs), case, inputs)


@pytest.mark.parametrize("implementation", ["staged"], indirect=True)
@pytest.mark.parametrize("dtype", dtypes_of("fused"))
def test_staged_equals_fused(
    op: Op,
    dtype: str,
    search: Callable[..., None],
    corners: Callable[[str], list[PrefillCase]],
    batches: Callable[..., st.SearchStrategy[PrefillCase]],
):
    def check(case: PrefillCase) -> None:
        inputs = case.inputs()
        o, final_state = op(case, implementation="fused")(inputs)
        fused = o.double(), final_state.double()
        for comparison in compare_prefill(case, inputs, *op(case)(inputs), truth=fused):
            assert comparison.passed, str(comparison)

    search(check, ({"case": corner} for corner in corners(dtype)[:4]), case=batches((dtype,)))


def check_dense_rows(prefill: Prefill, case: PrefillCase, B: int, T: int, limit: Any) -> None:
    check_dense(prefill, replace(case, seq_lens=(T,) * B, initial_state=bool(case.initial_state)), limit)


class Property(NamedTuple):
    """A check of `properties`, what to draw for it, values that it must be shown, and its limit if any."""

    check: Callable[..., None]
    drawn: dict[str, st.SearchStrategy[Any]]
    forced: dict[str, Any]
    limit: str | None = "same_chunks"


PROPERTIES = {
    "computes a packed batch as its sequences one by one": Property(check_one_by_one, {}, {}),
    "does not depend on the order of sequences": Property(
        check_order, {"order": ORDERS}, {"order": [4, 2, 1, 0, 3]}
    ),
    "ignores empty sequences and returns their state": Property(check_without_empty, {}, {}),
    "ignores padding": Property(check_padding, {}, {}),
    "takes dense rows as packed sequences": Property(
        check_dense_rows, {"B": st.integers(1, 3), "T": st.integers(0, 70)}, {"B": 2, "T": 65}
    ),
    "is causal": Property(
        check_causal, {"other_seed": SEEDS, "cuts": CUTS}, {"other_seed": 7, "cuts": [5, 0, 100, 0, 1]}, None
    ),
    "carries its state over a split between chunks": Property(
        check_split, {"cuts": CUTS_BETWEEN_CHUNKS}, {"cuts": [64, 0, 64, 0, 0]}
    ),
    "carries its state over any split": Property(
        check_split, {"cuts": CUTS}, {"cuts": [62, 0, 65, 0, 1]}, "other_chunks"
    ),
    "then decode equals one recurrence": Property(
        check_then_decode, {"num_decodes": st.integers(1, 4)}, {"num_decodes": 2}, "other_chunks"
    ),
}


@pytest.mark.parametrize("name", PROPERTIES)
def test_op(
    op: Op,
    promise: Promise,
    name: str,
    search: Callable[..., None],
    batches: Callable[..., st.SearchStrategy[PrefillCase]],
):
    check, drawn, forced, limit_name = PROPERTIES[name]
    limits = {"limit": getattr(promise, limit_name)} if limit_name else {}
    search(
        lambda case, **arguments: check(op(case), case, **arguments, **limits),
        ({"case": replace(CORNERS[0], dtype=dtype), **forced} for dtype in promise.dtypes[::2]),
        case=batches(promise.dtypes),
        **drawn,
    )


def test_op_computes_the_same_bits_with_metadata_built_before_and_on_the_spot(
    implementation: str,
    op: Op,
    builder_for: Callable[[int], ChunkMetadataBuilder],
    search: Callable[..., None],
    batches: Callable[..., st.SearchStrategy[PrefillCase]],
):
    def check(case: PrefillCase) -> None:
        inputs = case.inputs()
        on_the_spot = op(case)(inputs)
        metadata = builder_for(case.HV).build(inputs.cu_seqlens)
        assert_agree(op(case, prebuilt_meta=metadata)(inputs), on_the_spot, case.bounds, EXACT)
        without_cu_seqlens = inputs._replace(cu_seqlens=None)
        assert_agree(op(case, prebuilt_meta=metadata)(without_cu_seqlens), on_the_spot, case.bounds, EXACT)

    search(check, case=batches(dtypes_of(implementation)))


@pytest.mark.parametrize("is_prebuilt", [False, True], ids=["on the spot", "prebuilt"])
def test_op_takes_cu_seqlens_of_either_integer_dtype(
    op: Op, builder_for: Callable[[int], ChunkMetadataBuilder], is_prebuilt: bool
):
    case = PrefillCase((70, 0, 3), dtype="float16", padding=5)
    narrow = case.inputs()
    wide = narrow._replace(cu_seqlens=narrow.cu_seqlens.long())
    by_narrow, by_wide = (
        op(case, prebuilt_meta=builder_for(case.HV).build(inputs.cu_seqlens) if is_prebuilt else None)(inputs)
        for inputs in (narrow, wide)
    )
    assert_agree(by_wide, by_narrow, case.bounds, EXACT)


def nan_like(x: torch.Tensor, *shape: int) -> torch.Tensor:
    return x.new_full(shape, float("nan"))


def of_every_tensor(layout: Callable[[torch.Tensor], torch.Tensor]) -> Layout:
    names = ("q", "k", "v", "g", "beta", "initial_state")
    return lambda inputs: inputs._replace(**{name: layout(getattr(inputs, name)) for name in names})


def with_gaps(x: torch.Tensor) -> torch.Tensor:
    """The same values, every second element of a buffer with NaN between."""
    buffer = nan_like(x, *x.shape, 2)
    buffer[..., 0] = x
    return buffer[..., 0]


def heads_first(x: torch.Tensor) -> torch.Tensor:
    """The same values, dimensions 1 and 2 swapped in memory."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def side_by_side(*tensors: torch.Tensor) -> list[torch.Tensor]:
    """Tensors `[1, T, ...]` as columns of one buffer, NaN all around: views of one fused projection."""
    T, columns = tensors[0].shape[1], [x[0].numel() // x.shape[1] for x in tensors]
    buffer = nan_like(tensors[0], 1, T + 3, sum(columns) + 2)
    views = buffer[:, 2:-1, 1:-1].split(columns, dim=2)
    return [view.unflatten(2, x.shape[2:]).copy_(x) for view, x in zip(views, tensors, strict=True)]


def of_projections(inputs: Inputs) -> Inputs:
    q, k, v = side_by_side(inputs.q, inputs.k, inputs.v)
    g, beta = side_by_side(inputs.g, inputs.beta)
    return inputs._replace(q=q, k=k, v=v, g=g, beta=beta)


def of_a_pool(*grow: int, place: tuple[slice, ...]) -> Layout:
    """The initial state as a slice of a pool that is larger by `grow` in each dimension."""

    def layout(inputs: Inputs) -> Inputs:
        state = inputs.initial_state
        assert state is not None
        pool = nan_like(state, *(n + more for n, more in zip(state.shape, grow, strict=True)))
        return inputs._replace(initial_state=pool[place].copy_(state))

    return layout


LAYOUTS: dict[str, Layout] = {
    "gaps": of_every_tensor(with_gaps),
    "heads first": of_every_tensor(heads_first),
    "fused projections": of_projections,
    "every second slot": of_a_pool(4, 0, 0, 0, place=(slice(1, None, 2),)),
    "first heads": of_a_pool(0, 2, 0, 0, place=(slice(None), slice(4))),
    "inner columns": of_a_pool(1, 1, 1, 8, place=(slice(1, None), slice(1, None), slice(16), slice(4, -4))),
}


def memory_of(x: torch.Tensor) -> torch.Tensor:
    """All memory that a tensor is a view of, in one dimension."""
    return x.as_strided((x.untyped_storage().nbytes() // x.element_size(),), (1,), 0)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_op_takes_tensors_of_any_stride_and_leaves_all_around_them(op: Op, device: Device, layout: str):
    case = PrefillCase((70, 0, 3), H=2, HV=4, K=16, V=32, padding=5)
    inputs = case.inputs().to(device.torch_device)
    strided = LAYOUTS[layout](inputs)
    views = [x for x, whole in zip(strided, inputs, strict=True) if x is not whole and x is not None]
    assert views
    assert not any(x.is_contiguous() for x in views)
    before = [memory_of(x).clone() for x in views]
    assert_agree(op(case)(strided), op(case)(inputs), case.bounds, EXACT)
    for x, memory in zip(views, before, strict=True):
        torch.testing.assert_close(memory_of(x), memory, rtol=0, atol=0, equal_nan=True)


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> list[torch.Size]:
    """Makes memory that nothing has written NaN, or an integer that indexes nothing; the shapes of it."""
    shapes: list[torch.Size] = []

    def poisoning(empty: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def poisoned_empty(*args: Any, **kwargs: Any) -> torch.Tensor:
            x = empty(*args, **kwargs)
            shapes.append(x.shape)
            return x.fill_(float("nan") if x.is_floating_point() else torch.iinfo(x.dtype).max)

        return poisoned_empty

    for owner, name in (
        (torch, "empty"),
        (torch, "empty_like"),
        (torch, "empty_strided"),
        (torch.Tensor, "new_empty"),
    ):
        monkeypatch.setattr(owner, name, poisoning(getattr(owner, name)))
    return shapes


@pytest.mark.parametrize("case", CORNERS[:4], ids=str)
def test_op_reads_no_memory_that_it_has_not_written(
    op: Op, promise: Promise, case: PrefillCase, request: pytest.FixtureRequest
):
    case = replace(case, dtype=promise.dtypes[-1])
    inputs = case.inputs()
    expected = op(case)(inputs)
    poisoned = request.getfixturevalue("poisoned")
    actual = op(case)(inputs)
    assert poisoned
    assert_agree(actual, expected, case.bounds, EXACT)  # refuses NaN, and padding that is not 0


@pytest.mark.parametrize("seq_lens", [(), (0,), (0, 0, 0)])
@pytest.mark.parametrize("padding", [0, 5])
def test_op_returns_zeros_and_the_initial_state_when_there_is_no_token(
    op: Op, seq_lens: tuple[int, ...], padding: int
):
    case = PrefillCase(seq_lens, HV=2, K=8, V=24, dtype="bfloat16", padding=padding)
    inputs = case.inputs()
    o, final_state = op(case)(inputs)
    assert torch.equal(o, torch.zeros(1, padding, 2, 24, dtype=torch.bfloat16))
    assert inputs.initial_state is not None
    assert torch.equal(final_state, inputs.initial_state)


@in_every_dtype_it_takes
def test_op_keeps_a_state_that_nothing_changes_bit_for_bit(op: Op, dtype: str):
    # Limits of 16-bit dtypes are wider than what a state loses that is kept in one between chunks.
    case = PrefillCase((129, 0, 64), H=1, HV=2, dtype=dtype, gates="none", betas="zero")
    inputs = case.inputs()
    assert inputs.initial_state is not None
    assert torch.equal(op(case)(inputs)[1], inputs.initial_state)


@in_every_dtype_it_takes
def test_op_modifies_no_input(
    op: Op, builder_for: Callable[[int], ChunkMetadataBuilder], device: Device, dtype: str
):
    case = PrefillCase((70, 0, 3), HV=2, dtype=dtype, padding=5, use_qk_l2norm_in_kernel=True)
    inputs, untouched = case.inputs().to(device.torch_device), case.inputs()
    builder = builder_for(case.HV)
    metadata = builder.build(untouched.cu_seqlens)
    op(case, prebuilt_meta=metadata)(inputs)
    for name, x, before in zip(inputs._fields, inputs, untouched, strict=True):
        assert x is not None
        torch.testing.assert_close(x.cpu(), before, rtol=0, atol=0, equal_nan=True, msg=name)
    assert metadata_differences(metadata, case.bounds, builder.block_sizes) == []


CHANGES = [
    {"scale": 3.0},
    {"scale": 0.0},
    {"initial_state": None},
    {"use_qk_l2norm_in_kernel": True},
    {"use_qk_l2norm_in_kernel": True, "eps": 0.5},
    {"cu_seqlens": torch.tensor([0, 33, 73])},
]


@pytest.mark.parametrize("options", CHANGES, ids=str)
def test_op_ignores_no_option(device: Device, implementation: str, promise: Promise, options: dict[str, Any]):
    case = PrefillCase((70, 3), dtype=promise.dtypes[0])
    inputs = case.inputs()

    def results(function: Callable[..., Any], options: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
        arguments = {**inputs._asdict(), **options}
        there = {
            name: x.to(device.torch_device) if isinstance(x, torch.Tensor) else x
            for name, x in arguments.items()
        }
        o, final_state = function(**there, output_final_state=True)
        return o.cpu(), final_state.cpu()

    actual = results(partial(chunk_gated_delta_rule, implementation=implementation), options)
    o, final_state = results(recurrent_gated_delta_rule, options)
    expected = o.to(actual[0].dtype), final_state.to(actual[1].dtype)
    assert_agree(actual, expected, case.bounds, limit(DTYPES[case.dtype]))
    default = results(partial(chunk_gated_delta_rule, implementation=implementation), {})
    assert not torch.equal(actual[0], default[0])


def test_op_has_no_option_without_a_test():
    elsewhere = {"output_final_state", "head_first", "prebuilt_meta", "implementation"}
    changed = {name for options in CHANGES for name in options}
    parameters = inspect.signature(chunk_gated_delta_rule).parameters.values()
    assert changed | elsewhere == {p.name for p in parameters if p.kind is p.KEYWORD_ONLY}


def test_op_follows_prebuilt_metadata_and_not_the_values_of_cu_seqlens(
    op: Op, builder_for: Callable[[int], ChunkMetadataBuilder]
):
    case = PrefillCase((33, 40))
    inputs = case.inputs()
    misleading = inputs._replace(cu_seqlens=torch.tensor([0, 70, 73]))
    metadata = builder_for(case.HV).build(inputs.cu_seqlens)
    assert_agree(op(case, prebuilt_meta=metadata)(misleading), op(case)(inputs), case.bounds, EXACT)


def test_op_takes_the_call_of_vllm_ascend(
    device: Device,
    implementation: str,
    builder_for: Callable[[int], ChunkMetadataBuilder],
    monkeypatch: pytest.MonkeyPatch,
):
    # vllm-ascend 0.18.0, patch_qwen3_next.py: by keyword, and without an implementation.
    case = PrefillCase((70, 0, 3), H=1, HV=2, dtype="bfloat16", padding=5, use_qk_l2norm_in_kernel=True)
    inputs = case.inputs()
    there = inputs.to(device.torch_device)
    monkeypatch.setattr(op_module, "default_implementation", lambda device: implementation)
    o, final_state = chunk_gated_delta_rule(
        q=there.q,
        k=there.k,
        v=there.v,
        g=there.g,
        beta=there.beta,
        initial_state=there.initial_state,
        output_final_state=True,
        cu_seqlens=there.cu_seqlens,
        head_first=False,
        use_qk_l2norm_in_kernel=True,
        prebuilt_meta=builder_for(case.HV).build(inputs.cu_seqlens),
    )
    assert final_state is not None
    assert_right((o.cpu(), final_state.cpu()), case, inputs)


def test_op_runs_the_implementation_that_is_asked_for(
    op: Op, implementation: str, monkeypatch: pytest.MonkeyPatch
):
    ran: list[str] = []

    def spying(name: str, run: Callable[..., Any]) -> Callable[..., Any]:
        def spy(*args: Any, **kwargs: Any) -> Any:
            ran.append(name)
            return run(*args, **kwargs)

        return spy

    for name, other in list(IMPLEMENTATIONS.items()):
        monkeypatch.setitem(IMPLEMENTATIONS, name, replace(other, run=spying(name, other.run)))
    case = PrefillCase((3,))
    op(case)(case.inputs())
    monkeypatch.setattr(op_module, "default_implementation", lambda device: implementation)
    op(case, implementation=None)(case.inputs())
    assert ran == [implementation, implementation]


@pytest.mark.parametrize(
    ("device_type", "name"), [("cuda", "fused"), ("npu", "fused"), ("cpu", "eager"), ("meta", "eager")]
)
def test_default_implementation_is_what_the_device_runs_best(device_type: str, name: str):
    assert default_implementation(SimpleNamespace(type=device_type)) == name  # pyright: ignore[reportArgumentType]


def test_op_returns_no_state_unless_asked(implementation: str, device: Device):
    inputs = PrefillCase((3,)).inputs().to(device.torch_device)
    assert chunk_gated_delta_rule(*inputs[:5], implementation=implementation)[1] is None


def test_op_says_once_that_metadata_are_built_on_the_spot(
    op: Op,
    builder_for: Callable[[int], ChunkMetadataBuilder],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
):
    case = PrefillCase((3,))
    inputs = case.inputs()
    monkeypatch.setattr(op_module, "_said", set())
    op(case, prebuilt_meta=builder_for(case.HV).build(inputs.cu_seqlens))(inputs)
    assert not caplog.records
    op(case)(inputs)
    op(case)(inputs)
    assert [r.levelno for r in caplog.records] == [logging.WARNING]
    assert "ChunkMetadataBuilder" in caplog.text


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_op_keeps_what_rounding_the_inverse_takes(
    implementation: str, builder_for: Callable[[int], ChunkMetadataBuilder], device: Device, dtype: str
):
    # Keys alike, beta 1, no gates: the inverse is next to -1 below its diagonal, and its roundings add up.
    for seed in range(4):
        case = PrefillCase((64,), seed, dtype=dtype, gates="none", betas="one", keys="identical")
        outcome = check_prefill(
            case,
            implementation=implementation,
            builder=builder_for(case.HV),
            device=device.torch_device,
        )
        assert_agrees(outcome)


@pytest.mark.parametrize("scale", [1e-6, 1e6])
def test_op_takes_a_scale_of_any_size(implementation: str, device: Device, scale: float):
    case = PrefillCase((70, 3), HV=2, dtype="float16", initial_state=False)
    inputs = case.inputs()
    inputs = inputs._replace(v=inputs.v * (1e-3 if scale > 1 else 1e3))
    run = partial(chunk_gated_delta_rule, implementation=implementation)
    o, _ = prefill_by(run, case, device=device.torch_device, scale=scale)(inputs)
    truth, _ = prefill_by(recurrent_gated_delta_rule, case, scale=scale)(inputs)
    float16 = torch.float16
    comparison = compare_o(o, truth, dtype=float16, bounds=case.bounds, limit=limit(float16))
    assert comparison.passed, str(comparison)


def test_op_reads_tensors_that_are_negated_lazily(op: Op):
    inputs = PrefillCase((70,)).inputs()
    expected = op(PrefillCase((70,)))(inputs)
    negated = torch._neg_view  # pyright: ignore[reportPrivateImportUsage]
    lazy = inputs._replace(q=negated(-inputs.q), g=negated(-inputs.g))
    assert_agree(op(PrefillCase((70,)))(lazy), expected, [0, 70], EXACT)


@pytest.mark.parametrize(
    "case",
    [
        PrefillCase((1281, 0, 1), V=32),
        PrefillCase((193, 0, 3), H=1, HV=32),
        PrefillCase((2047,), gates="none"),
    ],
    ids=["two blocks of solve_tril", "two blocks of chunk_local_cumsum", "32 chunks"],
)
def test_op_equals_the_definition_over_many_chunks(
    implementation: str,
    device: Device,
    builder_for: Callable[[int], ChunkMetadataBuilder],
    case: PrefillCase,
):
    builder = builder_for(case.HV)
    outcome = check_prefill(case, implementation=implementation, builder=builder, device=device.torch_device)
    assert_agrees(outcome)


def test_op_takes_a_scale_of_zero(op: Op):
    case = PrefillCase((70,))
    assert not op(case, scale=0.0)(case.inputs())[0].count_nonzero()


def test_op_refuses_metadata_that_were_released(op: Op, builder_for: Callable[[int], ChunkMetadataBuilder]):
    case = PrefillCase((70,))
    inputs = case.inputs()
    metadata = builder_for(case.HV).build(inputs.cu_seqlens)
    metadata.release()
    with pytest.raises(StagingError, match="prebuilt_meta was released"):
        op(case, prebuilt_meta=metadata)(inputs)


def test_op_keeps_no_gradient(op: Op):
    case = PrefillCase((70,))
    inputs = case.inputs()
    o, _ = op(case)(inputs._replace(v=inputs.v.requires_grad_()))
    assert not o.requires_grad


def test_op_builds_on_the_host_whatever_the_default_device_is(op: Op):
    case = PrefillCase((70, 0, 3))
    inputs = case.inputs()
    expected = op(case)(inputs)
    with torch.device("meta"):
        metadata = ChunkMetadataBuilder(open_device("cpu"), 128, 4, 1).build(inputs.cu_seqlens)
    assert metadata.cu_seqlens.tolist() == [0, 70, 70, 73]
    assert torch.equal(op(case)(inputs)[0], expected[0])
