"""States between vLLM's pool and our op, and the prefill core: no vLLM is needed."""

import sys

import pytest
import torch

from ascend_twin.equivalence_tests import installed_vllm
from ascend_twin.optimized.gdn import (
    IMPLEMENTATIONS,
    ChunkMetadata,
    ChunkMetadataBuilder,
    chunk_gated_delta_rule,
    open_device,
)
from ascend_twin.optimized.vllm import gdn_core, gdn_layer
from ascend_twin.optimized.vllm.gdn_core import PrefillCore, StateLayout, gather_states, scatter_states
from ascend_twin.optimized.vllm.settings import GDN_CORES
from ascend_twin.reference.errors import InvalidArgumentError, UnavailableError
from ascend_twin.reference.gdn import recurrent_gated_delta_rule

HV, K, V, CANARY = 4, 3, 5, 7.25
LAYOUTS = tuple(StateLayout)


def _pool(
    layout: StateLayout, num_slots: int, *, K: int = K, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """Slots that lie apart, as vLLM's do beside the states of a convolution; all canaries."""
    last = (K, V) if layout is StateLayout.KEY_FIRST else (V, K)
    return torch.full((num_slots, 2, HV, *last), CANARY, dtype=dtype)[:, 1]


def _states(n: int) -> torch.Tensor:
    return torch.randn(n, HV, K, V, generator=torch.Generator().manual_seed(n))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
def test_scatter_writes_owned_slots_only(layout: StateLayout, index_dtype: torch.dtype) -> None:
    slots = torch.tensor([6, -1, 2, 0, 9, 0], dtype=index_dtype)
    states, pool = _states(6), _pool(layout, 11)
    scatter_states(pool, slots, states, layout)
    for row, slot in ((0, 6), (2, 2), (4, 9)):
        for hv in range(HV):
            written = pool[slot, hv] if layout is StateLayout.KEY_FIRST else pool[slot, hv].T
            assert torch.equal(written, states[row, hv])
    unowned = [slot for slot in range(11) if slot not in (6, 2, 9)]
    assert (pool[unowned] == CANARY).all(), "a slot of nobody's was written; slot 0 and -1 are padding"
    assert pool._base is not None
    assert (pool._base[:, 0] == CANARY).all(), "written between the slots"


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gather_reads_each_rows_own_slot_and_zeros_for_padding(layout: StateLayout) -> None:
    states, pool = _states(11), _pool(layout, 11)
    pool.copy_(states if layout is StateLayout.KEY_FIRST else states.transpose(-1, -2))
    slots = torch.tensor([3, 10, -1, 1, 0], dtype=torch.int32)
    gathered = gather_states(pool, slots, layout)
    assert gathered.shape == (5, HV, K, V)
    assert torch.equal(gathered[[0, 1, 3]], states[[3, 10, 1]])
    assert not gathered[[2, 4]].any()
    gathered.fill_(CANARY)
    assert torch.equal(pool[3, 0], states[3, 0] if layout is StateLayout.KEY_FIRST else states[3, 0].T)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_padding_reads_as_zero_where_the_null_slot_holds_nan(layout: StateLayout) -> None:
    pool = _pool(layout, 3)
    pool[0] = float("nan")
    assert not gather_states(pool, torch.tensor([0, -1]), layout).any()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_permuted_round_trip_changes_nothing(layout: StateLayout, dtype: torch.dtype) -> None:
    pool = _pool(layout, 8, dtype=dtype)
    pool.copy_(torch.randn(pool.shape, generator=torch.Generator().manual_seed(0)))
    before = pool.clone()
    slots = torch.tensor([5, 1, 7, 2, 4])
    gathered = gather_states(pool, slots, layout)
    assert gathered.dtype == torch.float32
    permutation = torch.tensor([3, 0, 4, 1, 2])
    scatter_states(pool, slots[permutation], gathered[permutation], layout)
    assert torch.equal(pool, before)


def test_layouts_differ_even_where_shapes_do_not() -> None:
    """With K = V a wrong layout fits: only its name tells."""
    states = torch.randn(2, HV, V, V, generator=torch.Generator().manual_seed(0))
    key_first, value_first = (_pool(layout, 3, K=V) for layout in LAYOUTS)
    slots = torch.tensor([1, 2])
    scatter_states(key_first, slots, states, StateLayout.KEY_FIRST)
    scatter_states(value_first, slots, states, StateLayout.VALUE_FIRST)
    assert torch.equal(key_first[1:], value_first[1:].mT)
    assert not torch.equal(key_first[1:], value_first[1:])


# ------------------------------------------------------------------------------------------------- the core
LENGTHS = (70, 1, 128, 0, 5)


def _batch(dtype: torch.dtype = torch.float64) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    T, H = sum(LENGTHS), 2

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    return {
        "q": normal(1, T, H, 8),
        "k": normal(1, T, H, 8),
        "v": normal(1, T, HV, 6),
        "g": -torch.rand(1, T, HV, generator=generator),
        "beta": torch.rand(1, T, HV, generator=generator).to(dtype),
    }


def _cu_seqlens() -> torch.Tensor:
    return torch.tensor([0, *LENGTHS], dtype=torch.int32).cumsum(0, dtype=torch.int32)


def _metadata(num_value_heads: int = HV, lengths: tuple[int, ...] = LENGTHS) -> ChunkMetadata:
    builder = ChunkMetadataBuilder(open_device("cpu"), 512, 8, num_value_heads)
    return builder.build(torch.tensor([0, *lengths]).cumsum(0))


@pytest.mark.parametrize("name", ["reference", "eager"])
@pytest.mark.parametrize("l2norm", [True, False])
def test_run_on_pool_equals_the_recurrence_and_updates_the_pool_in_place(name: str, l2norm: bool) -> None:
    batch, slots = _batch(), torch.tensor([4, 2, 5, 0, 1], dtype=torch.int32)
    batch["k"] = batch["k"] / 8  # without normalisation, long keys would blow up
    pool = torch.randn(8, HV, 8, 6, generator=torch.Generator().manual_seed(4))
    pool[2] = 0  # vLLM has zeroed the slot of a new sequence
    before = pool.clone()
    initial = before[slots.long()]
    initial[3] = 0  # a padding row
    given = {
        "query": batch["q"],
        "key": batch["k"],
        "value": batch["v"],
        "g": batch["g"],
        "beta": batch["beta"],
    }
    core = PrefillCore(name)
    o, returned = gdn_layer.run_on_pool(
        core,
        {
            **given,
            "initial_state": pool,
            "initial_state_indices": slots,
            "cu_seqlens": _cu_seqlens(),
            "use_qk_l2norm_in_kernel": l2norm,
            "eps": 1e-5,
        },
        _metadata(),
    )
    truth, states = recurrent_gated_delta_rule(
        *batch.values(),
        initial_state=initial,
        output_final_state=True,
        cu_seqlens=_cu_seqlens(),
        use_qk_l2norm_in_kernel=l2norm,
        eps=1e-5,
    )
    assert states is not None
    assert returned is pool
    torch.testing.assert_close(o, truth, rtol=1e-9, atol=1e-9)
    owned = [0, 1, 2, 4]
    torch.testing.assert_close(pool[slots[owned].long()], states[owned].float(), rtol=1e-5, atol=1e-5)
    unowned = [0, 3, 6, 7]
    assert torch.equal(pool[unowned], before[unowned])
    assert (core.num_calls, core.num_unfit) == (1, 0)
    assert core.num_prebuilt == (name == "eager")


@pytest.mark.parametrize("name", ["reference", "eager"])
def test_device_core_speaks_the_layout_of_gpus(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        gdn_layer, "prebuilt_metadata", lambda prefix: _metadata() if prefix == "layer" else None
    )
    batch = _batch()
    initial = torch.randn(5, HV, 8, 6, generator=torch.Generator().manual_seed(4))
    core = PrefillCore(name)
    out = torch.full((sum(LENGTHS) + 2, HV, 6), CANARY, dtype=torch.float64)
    o, states = gdn_layer.DeviceCore(core, "layer")(
        **batch,
        initial_state=initial.mT.contiguous(),
        output_final_state=True,
        cu_seqlens=_cu_seqlens(),
        chunk_indices=None,
        chunk_offsets=None,
        use_qk_l2norm_in_kernel=True,
        core_attn_out=out,
        aiter_prefill_metadata=None,
    )
    truth, final = recurrent_gated_delta_rule(
        *batch.values(),
        initial_state=initial,
        output_final_state=True,
        cu_seqlens=_cu_seqlens(),
        use_qk_l2norm_in_kernel=True,
    )
    assert final is not None
    assert states is not None
    torch.testing.assert_close(o, truth, rtol=1e-9, atol=1e-9)
    assert states.shape == (5, HV, 6, 8)
    torch.testing.assert_close(states, final.mT.to(states.dtype), rtol=1e-5, atol=1e-5)
    assert torch.equal(out[:-2], o[0])
    assert (out[-2:] == CANARY).all()
    assert core.num_prebuilt == (name == "eager")
    device_core = gdn_layer.DeviceCore(core, "another layer")
    arguments = {
        **batch,
        "initial_state": initial.mT,
        "cu_seqlens": _cu_seqlens(),
        "output_final_state": False,
    }
    again, nothing = device_core(**arguments)
    assert nothing is None
    torch.testing.assert_close(again, truth, rtol=1e-9, atol=1e-9)
    assert core.num_prebuilt == (name == "eager"), "served without metadata"


def _released() -> ChunkMetadata:
    metadata = _metadata()
    metadata.release()
    return metadata


UNFIT = {
    "of other lengths": lambda: _metadata(lengths=(1, 70, 128, 0, 5)),
    "with the decodes of the step": lambda: _metadata(lengths=(1, 1, *LENGTHS)),
    "of fewer sequences": lambda: _metadata(lengths=LENGTHS[:-1]),
    "for another number of heads": lambda: _metadata(num_value_heads=32),
    "released": _released,
    "of another kind": lambda: object(),
}


@pytest.mark.parametrize("name", UNFIT)
def test_unfit_metadata_are_built_anew(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    given = []

    def noting(*args, prebuilt_meta, **kwargs):
        given.append(prebuilt_meta)
        return chunk_gated_delta_rule(*args, prebuilt_meta=prebuilt_meta, **kwargs)

    monkeypatch.setattr(gdn_core, "chunk_gated_delta_rule", noting)
    core, batch = PrefillCore("eager"), _batch()
    arguments = {
        "initial_state": torch.zeros(5, HV, 8, 6),
        "cu_seqlens": _cu_seqlens(),
        "use_qk_l2norm_in_kernel": True,
        "eps": 1e-5,
    }
    o, _ = core(**batch, **arguments, metadata=UNFIT[name]())
    assert given == [None]
    assert (core.num_calls, core.num_prebuilt, core.num_unfit) == (1, 0, 1)
    fit = _metadata()
    same, _ = core(**batch, **arguments, metadata=fit)
    assert given[1] is fit
    assert (core.num_calls, core.num_prebuilt, core.num_unfit) == (2, 1, 1)
    assert torch.equal(o, same)


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_the_named_implementation_runs(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU the op's default is eager: a name that got lost would go unseen by its results."""
    ran = []

    def noting(*args, implementation, **kwargs):
        ran.append(implementation)
        return chunk_gated_delta_rule(*args, implementation="eager", **kwargs)

    monkeypatch.setattr(gdn_core, "chunk_gated_delta_rule", noting)
    PrefillCore(name)(
        **_batch(),
        initial_state=torch.zeros(5, HV, 8, 6),
        cu_seqlens=_cu_seqlens(),
        use_qk_l2norm_in_kernel=True,
        eps=1e-5,
    )
    assert ran == [name]


def test_output_has_the_dtype_of_the_query() -> None:
    for name in ("reference", "eager"):
        o, states = PrefillCore(name)(
            **_batch(torch.bfloat16),
            initial_state=torch.zeros(5, HV, 8, 6),
            cu_seqlens=_cu_seqlens(),
            use_qk_l2norm_in_kernel=True,
            eps=1e-5,
        )
        assert o.dtype == torch.bfloat16
        assert states.dtype in (torch.float32, torch.float64)


@pytest.mark.parametrize("name", GDN_CORES)
def test_core_that_cannot_run_here_is_refused_before_the_first_prompt(
    name: str, triton_runs: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    gdn_layer.try_core(name, 64, 64)
    if name not in ("staged", "fused"):
        return
    with pytest.raises(InvalidArgumentError, match=r"K \(q.shape\[3\]\)"):
        gdn_layer.try_core(name, 512, 64)
    # As Triton publishes its interpreter, it multiplies bfloat16 as integers.
    monkeypatch.setattr("ascend_twin.optimized.gdn.kernels.launch._interprets_faithfully", False)
    with pytest.raises(UnavailableError, match="bfloat16"):
        gdn_layer.try_core(name, 64, 64)


class _Layer:
    """What `check_place` looks at, of vLLM's layer."""

    head_k_dim, head_v_dim = 64, 64

    def __init__(self, method: str, core: str = "eager") -> None:
        self._forward_method = getattr(self, method)
        self.prefill_core = PrefillCore(core)

    def forward(self) -> None: ...
    def forward_cpu(self) -> None: ...
    def forward_cuda(self) -> None: ...
    def forward_xpu(self) -> None: ...
    def _forward_core(self) -> None: ...


@pytest.fixture
def layer_class(monkeypatch: pytest.MonkeyPatch) -> type[_Layer]:
    for function in vars(_Layer).values():
        if callable(function):
            monkeypatch.setattr(function, "__module__", gdn_layer._LAYER_MODULE)
    return _Layer


def test_layer_of_vllms_has_a_place_for_a_core(layer_class: type[_Layer]) -> None:
    gdn_layer.check_place(layer_class("forward_cpu"))
    gdn_layer.check_place(layer_class("forward_cuda"))


def test_layer_without_a_place_for_a_core_is_refused(layer_class: type[_Layer]) -> None:
    with pytest.raises(UnavailableError, match="XPU"):
        gdn_layer.check_place(layer_class("forward_xpu"))


@pytest.mark.parametrize("name", ["forward", "forward_cuda", "_forward_core"])
def test_method_that_somebody_replaced_is_refused(name: str, layer_class: type[_Layer], monkeypatch) -> None:
    """It would not call the core that was chosen, and nothing would tell."""

    def theirs(self) -> None: ...

    monkeypatch.setattr(layer_class, name, theirs)
    with pytest.raises(UnavailableError, match=rf"{__name__}.*theirs has taken the place"):
        gdn_layer.check_place(layer_class("forward_cuda"))


def test_unknown_core_is_refused() -> None:
    with pytest.raises(InvalidArgumentError, match=r"'eagre'.*reference, eager, staged, fused"):
        PrefillCore("eagre")


@pytest.mark.vllm017
def test_vllm_without_such_a_layer_is_left_alone() -> None:
    """0.17.0 has its GDN layer in the model file, and no kernel for CPUs."""
    installed_vllm.prepare_import()
    import vllm._custom_ops as ops  # pyright: ignore[reportMissingImports]

    before = dict(vars(ops))
    with pytest.raises(UnavailableError, match=r"no GDN layer that can be replaced.*gdn"):
        gdn_layer.install()
    assert vars(ops) == before
    assert "vllm.model_executor.models.qwen3_next" not in sys.modules
