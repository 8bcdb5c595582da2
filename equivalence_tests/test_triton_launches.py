"""What the Triton implementations launch, allocate and read, and what they say where they cannot run."""

import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from itertools import accumulate
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ascend_twin.equivalence_tests.cases import Inputs, PrefillCase
from ascend_twin.equivalence_tests.devices import SimulatedDevice
from ascend_twin.equivalence_tests.properties import EXACT, assert_agree, prefill_by
from ascend_twin.optimized.gdn import (
    IMPLEMENTATIONS,
    ChunkMetadata,
    ChunkMetadataBuilder,
    chunk_gated_delta_rule,
    forbid_host_sync,
)
from ascend_twin.optimized.gdn.device import CpuDevice, Device
from ascend_twin.reference.errors import HostSyncError

TRITON = [name for name, implementation in IMPLEMENTATIONS.items() if implementation.uses_triton]
MAX_LAUNCHES = {"staged": 9, "fused": 4}
MAX_PROGRAMS = 65_535  # of one launch, on an Ascend NPU
INPUTS = ("q", "k", "v", "g", "beta")
H, HV, K, V = 2, 4, 24, 40  # no two alike, so that shapes tell what a tensor is

Recorder = Callable[[], AbstractContextManager[list[Any]]]


@pytest.fixture(scope="module", params=TRITON)
def implementation(request: pytest.FixtureRequest, triton_runs: None) -> str:
    """The name of each implementation in Triton in turn."""
    return request.param


@pytest.fixture
def recorded_launches(triton_runs: None) -> Recorder:
    """`recorded_launches` of the kernels, which only then need Triton to be installed."""
    from ascend_twin.optimized.gdn.kernels.launch import recorded_launches

    return recorded_launches


def metadata_of(seq_lens: tuple[int, ...], num_value_heads: int = HV) -> ChunkMetadata:
    bounds = [0, *accumulate(seq_lens)]
    builder = ChunkMetadataBuilder(CpuDevice(), max(1, bounds[-1]), max(1, len(seq_lens)), num_value_heads)
    return builder.build(torch.tensor(bounds))


def run(case: PrefillCase, inputs: Inputs, implementation: str, **options: Any) -> Any:
    """The op with metadata built before."""
    if "prebuilt_meta" not in options:
        options["prebuilt_meta"] = metadata_of(case.seq_lens, case.HV)
    return chunk_gated_delta_rule(
        *inputs[:5],
        initial_state=inputs.initial_state,
        output_final_state=True,
        use_qk_l2norm_in_kernel=case.use_qk_l2norm_in_kernel,
        implementation=implementation,
        **options,
    )


def launches_of_a_model(
    recorded_launches: Recorder, implementation: str, seq_lens: tuple[int, ...], normalise: bool
) -> list[Any]:
    """Launches for a rank of Qwen3-Next, whose tensors need no memory: nothing runs."""
    H, HV, K, V, T, N = 16, 32, 128, 128, sum(seq_lens), len(seq_lens)
    shapes = ((1, T, H, K), (1, T, H, K), (1, T, HV, V), (1, T, HV), (1, T, HV))
    tensors = (torch.empty(shape, dtype=torch.bfloat16, device="meta") for shape in shapes)
    with recorded_launches() as launches:
        IMPLEMENTATIONS[implementation].run(
            *tensors,
            scale=1.0,
            initial_state=torch.empty(N, HV, K, V, device="meta"),
            use_qk_l2norm_in_kernel=normalise,
            eps=1e-6,
            metadata=metadata_of(seq_lens, HV),
        )
    return launches


def calls(launches: list[Any]) -> list[list[Any]]:
    """Launches of one call of a kernel each: a grid that is too large for one is continued."""
    found: list[list[Any]] = []
    for launch in launches:
        if launch.arguments["first_program"] == 0:
            found.append([])
        found[-1].append(launch)
    return found


BATCHES = {
    "nothing": (),
    "empty sequences": (0, 0),
    "one token": (1,),
    "decodes": (1,) * 256,
    "one prompt": (8192,),
    "mixed": (1, 0, 4000, 64, 0, 65, 1217),
    "more chunks than programs": (64 * 2100,),
    "more sequences than programs": (1,) * 1100,
}


@pytest.mark.parametrize("normalise", [False, True], ids=["as given", "normalised"])
@pytest.mark.parametrize("batch", BATCHES)
def test_op_launches_few_kernels_of_no_more_programs_than_an_npu_takes(
    recorded_launches: Recorder, implementation: str, batch: str, normalise: bool
):
    launches = launches_of_a_model(recorded_launches, implementation, BATCHES[batch], normalise)
    assert all(1 <= launch.num_programs <= MAX_PROGRAMS for launch in launches)
    assert len(calls(launches)) <= MAX_LAUNCHES[implementation]
    for call in calls(launches):
        ends = list(accumulate(launch.num_programs for launch in call))
        assert [launch.arguments["first_program"] for launch in call] == [0, *ends[:-1]]
    is_large = batch.startswith("more")
    assert (len(launches) > len(calls(launches))) == is_large


def test_op_launches_kernels_of_its_own(recorded_launches: Recorder, implementation: str):
    names = {launch.name for launch in launches_of_a_model(recorded_launches, implementation, (70,), False)}
    others = [name for name in TRITON if name != implementation]
    of_others = [
        {launch.name for launch in launches_of_a_model(recorded_launches, other, (70,), False)}
        for other in others
    ]
    assert all(names - other for other in of_others)


def test_op_computes_the_same_bits_when_grids_are_continued_in_further_launches(
    implementation: str, device: Device, monkeypatch: pytest.MonkeyPatch
):
    from ascend_twin.optimized.gdn.kernels import launch

    case = PrefillCase((65, 0, 129, 3), H=H, HV=HV, padding=3, use_qk_l2norm_in_kernel=True)
    prefill = prefill_by(
        chunk_gated_delta_rule, case, device=device.torch_device, implementation=implementation
    )
    expected = prefill(case.inputs())
    monkeypatch.setattr(launch, "MAX_PROGRAMS", 3)
    assert_agree(prefill(case.inputs()), expected, case.bounds, EXACT)


def contiguous(inputs: Inputs) -> Inputs:
    return inputs


def of_projections(inputs: Inputs) -> Inputs:
    """q, k and v as views of one fused projection, g and beta of another, state of a pool: token-major."""
    tensors = inputs._asdict()
    for names in (("q", "k", "v"), ("g", "beta")):
        columns = [tensors[name][0, 0].numel() for name in names]
        buffer = torch.empty(1, len(inputs.q[0]) + 2, sum(columns))[:, 1:-1].to(inputs.q.dtype)
        for name, view in zip(names, buffer.split(columns, dim=2), strict=True):
            tensors[name] = view.unflatten(2, tensors[name].shape[2:])
    assert inputs.initial_state is not None
    tensors["initial_state"] = inputs.initial_state.repeat(2, 2, 1, 1)[1::2, :HV]
    return Inputs(**tensors)


@pytest.mark.parametrize("normalise", [False, True], ids=["as given", "normalised"])
@pytest.mark.parametrize("layout", [contiguous, of_projections])
def test_op_gives_its_inputs_to_kernels_where_they_are(
    recorded_launches: Recorder,
    implementation: str,
    layout: Callable[[Inputs], Inputs],
    normalise: bool,
):
    case = PrefillCase(
        (70, 0), H=H, HV=HV, K=K, V=V, dtype="bfloat16", padding=3, use_qk_l2norm_in_kernel=normalise
    )
    inputs = layout(case.inputs())
    with recorded_launches() as launches:
        run(case, inputs, implementation)
    is_normalised_apart = normalise and implementation == "staged"
    given = {
        (name, x.data_ptr()) for launch in launches for name, x in launch.arguments.items() if name in INPUTS
    }
    names = ("v", "g", "beta") if is_normalised_apart else INPUTS
    wanted = {(name, getattr(inputs, name).data_ptr()) for name in names}
    assert {pair for pair in given if pair[0] in names} == wanted
    if is_normalised_apart:
        read = [launch.arguments["x"].data_ptr() for launch in launches if "x" in launch.arguments]
        assert read == [inputs.q.data_ptr(), inputs.k.data_ptr()]
    (state,) = (x.arguments["initial_state"] for x in launches if "initial_state" in x.arguments)
    assert inputs.initial_state is not None
    assert state.data_ptr() == inputs.initial_state.data_ptr()


class Allocations(TorchDispatchMode):
    """Notes the shape of every tensor that is made and not a view."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not func.is_view and not func._schema.is_mutable:
            self.shapes += [tuple(x.shape) for x in tree_leaves(result) if isinstance(x, torch.Tensor)]
        return result


@pytest.mark.parametrize("normalise", [False, True], ids=["as given", "normalised"])
@pytest.mark.parametrize("initial_state", [False, True], ids=["from zeros", "from states"])
def test_op_allocates_as_wide_as_a_head_only_what_its_path_stores(
    recorded_launches: Recorder, implementation: str, initial_state: bool, normalise: bool
):
    case = PrefillCase(
        (70, 0, 33), H=H, HV=HV, K=K, V=V, initial_state=initial_state, use_qk_l2norm_in_kernel=normalise
    )
    inputs, metadata = case.inputs(), metadata_of(case.seq_lens)
    with recorded_launches(), Allocations() as made:
        run(case, inputs, implementation, prebuilt_meta=metadata)
    T, N, NT = 103, 3, 3
    stored = [(T, HV, K), (T, HV, V), (T, HV, V), (NT, HV, K, V)]  # w, u, v_new, the state before each chunk
    if normalise:
        stored += [(T, H, K), (T, H, K)]
    results = [(T, HV, V), (N, HV, K, V)]
    wanted = results if implementation == "fused" else results + stored
    assert sorted(shape for shape in made.shapes if K in shape or V in shape) == sorted(wanted)


@pytest.fixture
def sim() -> SimulatedDevice:
    """A device whose tensors cannot be read on the host unnoticed."""
    return SimulatedDevice()


def run_step(sim: SimulatedDevice, builder: ChunkMetadataBuilder, implementation: str) -> None:
    case = PrefillCase((65, 0, 130), H=H, HV=HV, padding=3, use_qk_l2norm_in_kernel=True)
    inputs = case.inputs()
    there = Inputs._make(sim.to_device(x) for x in inputs if x is not None)
    metadata = builder.build(inputs.cu_seqlens)
    run(case, there, implementation, prebuilt_meta=metadata)
    metadata.release()
    sim.synchronize()


def test_op_reads_nothing_back_and_copies_metadata_once_a_step(
    recorded_launches: Recorder, implementation: str, sim: SimulatedDevice
):
    builder = ChunkMetadataBuilder(sim, 256, 4, HV)
    with recorded_launches() as launches, forbid_host_sync(sim):
        for _ in range(3):
            run_step(sim, builder, implementation)
    assert builder.ring.copies == len(sim.copied_bytes) == 3
    assert len(calls(launches)) >= 3


@pytest.mark.parametrize("read", ["item", "tolist", "cpu", "__bool__"])
def test_a_read_of_metadata_before_a_launch_is_noticed(
    recorded_launches: Recorder,
    implementation: str,
    sim: SimulatedDevice,
    read: str,
    monkeypatch: pytest.MonkeyPatch,
):
    from ascend_twin.optimized.gdn import triton_paths
    from ascend_twin.optimized.gdn.kernels.solve_tril import solve_tril

    def reading(A: torch.Tensor, *, cu_seqlens: torch.Tensor, **options: Any) -> torch.Tensor:
        getattr(cu_seqlens[-1], read)()
        return solve_tril(A, cu_seqlens=cu_seqlens, **options)

    monkeypatch.setattr(triton_paths, "solve_tril", reading)
    builder = ChunkMetadataBuilder(sim, 256, 4, HV)
    with recorded_launches(), forbid_host_sync(sim), pytest.raises(HostSyncError, match="getattr"):
        run_step(sim, builder, implementation)


CALL = """
import torch
from ascend_twin.equivalence_tests.cases import PrefillCase
from ascend_twin.optimized.gdn import chunk_gated_delta_rule
from ascend_twin.reference.errors import UnavailableError
inputs = PrefillCase((3,), dtype={dtype!r}).inputs()
chunk_gated_delta_rule(*inputs[:5])
try:
    chunk_gated_delta_rule(*inputs[:5], implementation={implementation!r})
except UnavailableError as error:
    print(error)
"""


def said_in_a_process(before: str, implementation: str, *, dtype: str = "float32", **env: str) -> str:
    """What a call of the op says in a process of its own, behind a call that needs no Triton."""
    variables = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    program = before + CALL.format(dtype=dtype, implementation=implementation)
    done = subprocess.run(
        [sys.executable, "-c", program], env={**variables, **env}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


NO_TRITON = "import sys\nsys.modules['triton'] = None\n"


@pytest.mark.parametrize("implementation", TRITON)  # not the fixture: this holds where Triton is missing
def test_op_says_what_to_install_without_triton(implementation: str):
    said = said_in_a_process(NO_TRITON, implementation)
    assert f"implementation {implementation} needs Triton (triton-ascend on an NPU, triton elsewhere)" in said


def test_op_says_how_kernels_run_on_a_cpu(implementation: str):
    said = said_in_a_process("", implementation)
    assert "Triton kernels run on a CPU only in its interpreter" in said
    assert "ascend_twin.equivalence_tests.interpreter.enable()" in said


def test_op_says_that_the_bare_interpreter_is_wrong_for_bfloat16(implementation: str):
    said = said_in_a_process("", implementation, dtype="bfloat16", TRITON_INTERPRET="1")
    assert "multiplies bfloat16 as integers: call" in said
    assert "ascend_twin.equivalence_tests.interpreter.enable()" in said
