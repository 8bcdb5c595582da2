"""`ascend-twin bench`: what it measures, what it says of missing peers, and its files."""

import importlib.metadata
import itertools
import json
import re
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from typer.testing import CliRunner

from ascend_twin.cli import bench, bench_native, prefill_batch
from ascend_twin.cli.contest import Contest, Pair
from ascend_twin.cli.main import app
from ascend_twin.cli.peers import FLA_VERSION, load_fla_chunk_gated_delta_rule
from ascend_twin.cli.traffic import PARTS
from ascend_twin.equivalence_tests.cases import EquivalenceError
from ascend_twin.equivalence_tests.devices import interprets
from ascend_twin.equivalence_tests.scheduler_engines import OurEngine
from ascend_twin.fixtures.record import Recorder, RecordSettings
from ascend_twin.optimized.gdn import ChunkMetadataBuilder, open_device
from ascend_twin.optimized.gdn.ascend_native import check_native_installed
from ascend_twin.optimized.gdn.device import Device, LinalgDevice
from ascend_twin.reference.errors import UnavailableError
from ascend_twin.reference.gdn import chunk_gated_delta_rule
from ascend_twin.scheduler.balance import BalanceScheduler


def test_turn_is_the_median_call(monkeypatch: pytest.MonkeyPatch) -> None:
    # Calls of 1, 5 and 1 seconds: a turn goes on until it is full.
    clock = iter([0.0, 1.0, 1.0, 6.0, 6.0, 7.0])
    monkeypatch.setattr("time.perf_counter", lambda: next(clock))
    monkeypatch.setattr(bench, "TURN_SECONDS", 6.5)
    assert bench._turn(lambda: None) == bench.Turn(1.0)


class FakeAccelerator:
    """What `_device_turn` asks of torch.cuda, with one clock for the host and one for the device.

    A call takes the host 1 s to launch and the device 4 s, or what `slow_calls` says of it. The device starts
    it when it has been launched and what is before it is done.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, slow_calls: dict[int, float] | None = None) -> None:
        self.host = self.device = 0.0
        self.calls, self.slow_calls = 0, slow_calls or {}
        self.calls_at_synchronize: list[int] = []
        accelerator = self

        class Event:
            def __init__(self, *, enable_timing: bool) -> None:
                assert enable_timing

            def record(self) -> None:
                self.time = accelerator.device = max(accelerator.host, accelerator.device)

            def elapsed_time(self, end: "Event") -> float:
                assert accelerator.calls_at_synchronize[-1] == accelerator.calls, "read before they passed"
                return (end.time - self.time) * 1e3

        self.Event = Event
        monkeypatch.setattr("time.perf_counter", lambda: self.host)

    def synchronize(self) -> None:
        self.calls_at_synchronize.append(self.calls)
        self.host = self.device = max(self.host, self.device)

    def call(self) -> None:
        self.calls += 1
        self.host += 1.0
        self.device = max(self.host, self.device) + self.slow_calls.get(self.calls, 4.0)


def test_turn_on_a_device_is_the_device_time_of_the_median_call(monkeypatch: pytest.MonkeyPatch) -> None:
    module = FakeAccelerator(monkeypatch, slow_calls={3: 100.0})
    monkeypatch.setattr(bench, "BURST", 3)
    monkeypatch.setattr(bench, "TURN_SECONDS", 109.0)
    # The first burst takes 4 + 100 + 4 s: one more is needed.
    assert bench._device_turn(module.call, module) == bench.Turn(4.0, 1.0)
    assert module.calls_at_synchronize == [0, 4, 4, 8]


def test_turn_on_a_device_is_that_of_the_host_where_the_device_waits_for_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    module = FakeAccelerator(monkeypatch, slow_calls=dict.fromkeys(range(100), 0.5))
    monkeypatch.setattr(bench, "TURN_SECONDS", 0.0)
    assert bench._device_turn(module.call, module) == bench.Turn(1.0, 1.0)
    assert module.calls == 1 + bench.BURST


def test_result_is_the_ratio_of_the_peer_to_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    turns = iter(bench.Turn(x) for x in (1.0, 2.0, 1.0, 4.0, 1.0, 8.0))
    monkeypatch.setattr(bench, "_turn", lambda call, settle: next(turns))
    pair = Pair("ours", lambda: None, "peer", lambda: None)
    result = bench._measure(Contest("x", lambda: pair), 3, lambda: None, True, bench._turn)
    assert (result.ours, result.ours_ms, result.peer, result.peer_ms) == ("ours", 1e3, "peer", 4e3)
    assert result.ratio == (3.0, 4.0, 6.0)
    assert (result.our_host_ms, result.peer_host_ms) == (None, None)


def test_result_tells_the_share_of_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    turns = iter([bench.Turn(1.0, 0.25), bench.Turn(2.0, 3.0)])
    pair = Pair("ours", lambda: None, "peer", lambda: None)
    result = bench._measure(
        Contest("x", lambda: pair), 1, lambda: None, True, lambda call, settle: next(turns)
    )
    assert (result.our_host_ms, result.peer_host_ms) == (250.0, 3000.0)
    assert bench._time(result.ours_ms, result.our_host_ms) == "1e+03 ms, host 25%"
    assert bench._time(result.peer_ms, result.peer_host_ms) == "2e+03 ms, host 150%"
    assert bench._time(2.0, None) == "2 ms"


def test_missing_peer_is_skipped_with_the_reason_unless_it_is_required() -> None:
    def start() -> Pair:
        raise UnavailableError("not here")

    contest = Contest("x", start)
    assert bench._measure(contest, 1, lambda: None, False, bench._turn).skipped == "not here"
    with pytest.raises(UnavailableError, match="not here"):
        bench._measure(contest, 1, lambda: None, True, bench._turn)


def test_bench_writes_what_it_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "TURN_SECONDS", 0.0)
    files = tmp_path / "result.json", tmp_path / "result.png"
    arguments = ["bench", "--only", "1 x", "--rounds", "3", "--json", str(files[0]), "--plot", str(files[1])]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    report = json.loads(files[0].read_text())
    measured = report["results"][0]
    assert report["rounds"] == 3
    assert measured["peer"] == "reference loops"
    assert measured["ratio"][1] > 1
    assert report["device"] == "cpu"
    assert files[1].read_bytes().startswith(b"\x89PNG")
    schemes = report["traffic"]["schemes"]
    assert [s["name"] for s in schemes] == ["vllm-ascend 0.18.0", "fla-core 0.6.0", "staged", "fused"]
    for scheme in schemes:
        assert set(scheme["bytes_per_token"]) == set(PARTS)
        assert 0 < scheme["state_bytes_per_token"] < sum(scheme["bytes_per_token"].values())
    assert report["traffic"]["batch"] == {"seq_lens": [8192], "H": 16, "HV": 32, "K": 128, "V": 128}
    assert "staged and fused are not timed on a CPU" in result.output
    assert "states" in result.output
    assert max(map(len, result.output.splitlines())) <= 140


def test_plot_without_a_measured_contest_shows_the_traffic(tmp_path: Path) -> None:
    bench._plot([bench.Result("x", skipped="not here")], tmp_path / "x.svg")
    assert "KiB a token" in (tmp_path / "x.svg").read_text()  # matplotlib writes texts as comments too


# On an accelerator. Here the device is the CPU: kernels are interpreted, and the peer is our reference.


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {
        "H": 1,
        "HV": 2,
        "DEVICE_TOKENS": (150,),
        "DEVICE_SEQUENCES": (1, 3),
    }.items():
        monkeypatch.setattr(bench, name, value)
    monkeypatch.setattr(prefill_batch, "D", 16)


def fla_like(*inputs: torch.Tensor, scale_o: float = 1.0, **options: Any) -> tuple[torch.Tensor, Any]:
    """A peer as fla-core's function is called: tensors by position, int64 bounds on the device."""
    assert options["cu_seqlens"].dtype == torch.int64
    where = inputs[0].device
    on_host = {name: x.cpu() if isinstance(x, torch.Tensor) else x for name, x in options.items()}
    o, state = chunk_gated_delta_rule(*(x.cpu() for x in inputs), **on_host, compute_dtype=torch.bfloat16)
    assert state is not None
    return (o * scale_o).to(where), state.to(where)


@pytest.mark.parametrize("device", ["cuda", "npu"])
def test_contests_on_an_accelerator(device: str) -> None:
    # Without torch_npu, torch knows no device called npu.
    contests = bench.contests_on(SimpleNamespace(torch_device=SimpleNamespace(type=device)))  # pyright: ignore
    names = [contest.name for contest in contests]
    assert len(names) == len(set(names)) == (24 if device == "cuda" else 16)
    peer = "fla-core" if device == "cuda" else "staged"
    assert f"fused, 64 sequences of 32768 tokens in all, against {peer}" in names
    assert "metadata prebuilt, 1 sequence of 8192 tokens in all, against on the spot" in names


def test_contest_without_fla_is_skipped_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "prefill_batch", lambda *_: pytest.fail("made tensors"))
    monkeypatch.setattr(importlib.metadata, "version", _raise(importlib.metadata.PackageNotFoundError("x")))
    contest = bench._op_contest(open_device("cpu"), 1, 64, "fused", "fla-core")
    result = bench._measure(contest, 1, lambda: None, False, bench._turn)
    assert result.skipped == "fla-core is not installed; install it with `tox run -e bench-cuda`"


def test_another_version_of_fla_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.5.1")
    with pytest.raises(UnavailableError, match=r"fla-core 0.5.1 is installed, the peer is 0.6.0"):
        load_fla_chunk_gated_delta_rule()


def test_fla_that_does_not_load_is_refused_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda name: FLA_VERSION)
    monkeypatch.setattr(importlib, "import_module", _raise(ImportError("No module named 'einops'")))
    with pytest.raises(UnavailableError, match=r"does not load .*einops.*bench-cuda"):
        load_fla_chunk_gated_delta_rule()


def test_fla_is_loaded_from_its_module(monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("fla.ops.gated_delta_rule")
    module.chunk_gated_delta_rule = fla_like  # pyright: ignore[reportAttributeAccessIssue]
    monkeypatch.setattr(importlib.metadata, "version", lambda name: FLA_VERSION)
    monkeypatch.setitem(sys.modules, "fla", ModuleType("fla"))
    monkeypatch.setitem(sys.modules, "fla.ops", ModuleType("fla.ops"))
    monkeypatch.setitem(sys.modules, "fla.ops.gated_delta_rule", module)
    assert load_fla_chunk_gated_delta_rule() is fla_like


@pytest.mark.usefixtures("triton_runs", "small")
@pytest.mark.parametrize("implementation", ["staged", "fused"])
def test_op_contest_runs_both_on_the_same_batch(
    implementation: str, device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench, "load_fla_chunk_gated_delta_rule", lambda: fla_like)
    pair = bench._op_contest(device, 3, 150, implementation, "fla-core").start()
    assert (pair.ours, pair.peer) == (implementation, f"fla-core {FLA_VERSION}")
    (o, state), (peer_o, peer_state) = pair.our_call(), pair.peer_call()  # pyright: ignore
    assert o.shape == peer_o.shape == (1, 150, 2, 16)
    assert state.shape == peer_state.shape == (3, 2, 16, 16)


@pytest.mark.usefixtures("triton_runs", "small")
def test_contenders_that_differ_are_not_timed(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    def slightly_off(*inputs: torch.Tensor, **options: Any) -> object:
        return fla_like(*inputs, **options, scale_o=1.03)

    monkeypatch.setattr(bench, "load_fla_chunk_gated_delta_rule", lambda: slightly_off)
    with pytest.raises(EquivalenceError, match="contenders do not compute the same: o: ratio"):
        bench._op_contest(device, 3, 150, "fused", "fla-core").start()


@pytest.mark.usefixtures("triton_runs", "small")
def test_final_states_that_differ_are_not_timed(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    def without_state(*inputs: torch.Tensor, **options: Any) -> object:
        o, state = fla_like(*inputs, **options)
        return o, torch.zeros_like(state)

    monkeypatch.setattr(bench, "load_fla_chunk_gated_delta_rule", lambda: without_state)
    with pytest.raises(EquivalenceError, match="contenders do not compute the same: final_state: ratio"):
        bench._op_contest(device, 3, 150, "fused", "fla-core").start()


@pytest.mark.usefixtures("triton_runs", "small")
def test_prebuilt_contest_builds_metadata_in_the_call_of_the_peer_alone(
    device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair = bench._prebuilt_contest(device, 3, 150, "fused").start()
    built = []
    build = ChunkMetadataBuilder.build
    monkeypatch.setattr(ChunkMetadataBuilder, "build", lambda *args: (built.append(1), build(*args))[1])
    pair.our_call()
    assert not built
    pair.peer_call()
    assert len(built) == 1


@pytest.mark.usefixtures("triton_runs", "small")
@pytest.mark.parametrize("name", ["o", "final_state"])
def test_prebuilt_contest_wants_the_same_bits(
    name: str, device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    def a_bit_off(batch: prefill_batch.PrefillBatch, implementation: str) -> tuple[torch.Tensor, ...]:
        results = batch.prebuilt(implementation)
        results[("o", "final_state").index(name)].view(-1)[0] += 1
        return results

    monkeypatch.setattr(prefill_batch.PrefillBatch, "on_the_spot", a_bit_off)
    with pytest.raises(EquivalenceError, match=f"^{name} differs with metadata that are built on the spot"):
        bench._prebuilt_contest(device, 3, 150, "fused").start()


def test_device_that_is_not_there_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(bench, "_measure", lambda *_: pytest.fail("measured"))
    with pytest.raises(UnavailableError, match="cuda"):
        bench.run_bench([], 1, None, None, None, False, "cuda")


def test_turns_on_an_accelerator_are_timed_on_it(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = []
    fake = FakeAccelerator(monkeypatch)
    fake.set_device, fake.get_device_name = chosen.append, "name of {}".format  # pyright: ignore
    monkeypatch.setattr(torch, "cuda", fake)
    monkeypatch.setattr(bench, "TURN_SECONDS", 0.0)
    turn, name = bench._turn_on(SimpleNamespace(torch_device=torch.device("cuda:1")))  # pyright: ignore
    assert (chosen, name) == ([torch.device("cuda:1")], "name of cuda:1")
    assert turn(fake.call) == bench.Turn(4.0, 1.0)


@pytest.mark.usefixtures("triton_runs", "small")
def test_bench_on_an_accelerator(
    device: Device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The whole command on the device under test; where that is a CPU, the clock is that of a GPU."""
    monkeypatch.setattr(bench, "TURN_SECONDS", 0.0)
    monkeypatch.setattr(bench, "BURST", 1)
    monkeypatch.setattr(bench, "load_fla_chunk_gated_delta_rule", lambda: fla_like)
    if device.torch_device.type == "cpu":
        contests = (
            bench._op_contest(device, 3, 150, "fused", "fla-core"),
            bench._prebuilt_contest(device, 1, 150, "fused"),
        )
        turns = iter(bench.Turn(x, x / 4) for x in (1.0, 2.0, 1.0, 3.0))
        monkeypatch.setattr(bench, "contests_on", lambda opened: contests)
        monkeypatch.setattr(
            bench, "_turn_on", lambda opened: (lambda call, settle: next(turns), "a fake GPU")
        )
    json_path = tmp_path / "x.json"
    bench.run_bench([], 1, None, json_path, tmp_path / "x.png", True, str(device.torch_device))
    report, printed = json.loads(json_path.read_text()), capsys.readouterr().out
    assert "host: time until a call returns" in printed
    assert "not timed on a CPU" not in printed
    assert all(r["our_host_ms"] > 0 and r["peer_host_ms"] > 0 for r in report["results"])
    if device.torch_device.type == "cpu":
        assert report["device"] == "a fake GPU"
        assert [r["ratio"][1] for r in report["results"]] == [2.0, 3.0]
        assert printed.count("host 25%") == 4
        assert max(map(len, printed.splitlines())) <= 140


# On linalg. Where the tools are missing, the interpreter stands in for native code.


class InterpretingLauncher:
    """A `NativeLauncher` that interprets; `made` are all of them, with the folders of their caches."""

    made: ClassVar[list["InterpretingLauncher"]]

    def __init__(self, kernels: Any = None) -> None:
        self.cache = kernels and kernels.cache
        self.num_launches = 0
        self.made.append(self)

    def __call__(self, launch: Any) -> None:
        self.num_launches += 1
        bench_native._interpret(launch)


@pytest.fixture
def launchers(
    device: Device, triton_runs: None, small: None, monkeypatch: pytest.MonkeyPatch
) -> list[InterpretingLauncher]:
    """All launchers that are made, in their order."""
    if not interprets(device):
        pytest.skip("on --device cpu alone")
    from ascend_twin.optimized.gdn import native_launches

    monkeypatch.setattr(InterpretingLauncher, "made", [], raising=False)
    monkeypatch.setattr(native_launches, "NativeLauncher", InterpretingLauncher)
    monkeypatch.setattr(bench_native, "NativeKernels", lambda cache: SimpleNamespace(cache=cache))
    return InterpretingLauncher.made


def test_contests_on_linalg_are_staged_and_fused_cached_and_first() -> None:
    names = [contest.name for contest in bench.contests_on(LinalgDevice())]
    assert len(names) == len(set(names)) == 10
    for name in (
        "native fused, cached, 256 tokens, H 1, HV 2, against the interpreter",
        "native staged, first call, 128 tokens, H 16, HV 32, against the interpreter",
        "native fused, cached, 2048 tokens, H 16, HV 32, against eager",
    ):
        assert name in names


def test_bench_on_linalg_says_what_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_native, "check_native_installed", _raise(UnavailableError("no cc")))
    monkeypatch.setattr(bench, "_measure", lambda *_: pytest.fail("measured"))
    result = CliRunner().invoke(app, ["bench", "--device", "linalg"])
    assert (result.exit_code, result.output) == (2, "error: no cc\n")


def test_cached_contest_interprets_in_the_turn_of_the_peer_alone(
    launchers: list[InterpretingLauncher],
) -> None:
    pair = bench_native._interpreter_contest("fused", 70, 1, 2, is_first=False).start()
    (native,) = launchers
    assert native.num_launches == 3
    pair.our_call()
    pair.peer_call()
    assert native.num_launches == 6
    assert pair.our_settle is None


def test_every_first_call_has_a_launcher_and_an_empty_cache_of_its_own(
    launchers: list[InterpretingLauncher],
) -> None:
    pair = bench_native._interpreter_contest("fused", 70, 1, 2, is_first=True).start()
    assert pair.our_settle
    for call in (1, 2):
        assert len(launchers) == 1 + call
        assert launchers[-1].num_launches == 0
        assert list(launchers[-1].cache.iterdir()) == []
        pair.our_call()
        assert launchers[-1].num_launches == 3
        pair.our_settle()
    assert len({launcher.cache for launcher in launchers}) == 4
    assert [launcher.cache.exists() for launcher in launchers[1:]] == [False, False, True]


def test_contest_against_eager_launches_in_our_turn_alone(
    launchers: list[InterpretingLauncher], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench_native, "WHOLE_TOKENS", 3)
    monkeypatch.setattr(bench_native, "H", 1)
    monkeypatch.setattr(bench_native, "HV", 2)
    pair = bench_native._eager_contest("fused").start()
    pair.peer_call()
    assert launchers[0].num_launches == 3
    pair.our_call()
    assert launchers[0].num_launches == 6


@pytest.mark.parametrize("against", ["interpreted", "eager"])
def test_native_results_that_differ_are_not_timed(
    against: str, launchers: list[InterpretingLauncher], monkeypatch: pytest.MonkeyPatch
) -> None:
    call = getattr(bench_native._Turns, against)

    def slightly_off(turns: bench_native._Turns) -> tuple[torch.Tensor, torch.Tensor]:
        o, state = call(turns)
        return o * 1.03, state

    monkeypatch.setattr(bench_native._Turns, against, slightly_off)
    monkeypatch.setattr(bench_native, "WHOLE_TOKENS", 3)
    monkeypatch.setattr(bench_native, "H", 1)
    monkeypatch.setattr(bench_native, "HV", 2)
    contests = {
        "interpreted": bench_native._interpreter_contest("fused", 70, 1, 2, is_first=False),
        "eager": bench_native._eager_contest("fused"),
    }
    with pytest.raises(EquivalenceError, match="contenders do not compute the same: o: ratio"):
        contests[against].start()


@pytest.mark.usefixtures("triton_runs", "small")
def test_bench_on_linalg(device: Device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not interprets(device):
        pytest.skip("on --device cpu alone")
    try:
        check_native_installed()
    except UnavailableError as error:
        pytest.skip(str(error))
    from ascend_twin.optimized.gdn.kernels import launch

    monkeypatch.setenv("ASCEND_TWIN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(launch, "_on_cpu", None)  # what the device sets for the process goes with the test
    monkeypatch.setattr(bench, "TURN_SECONDS", 0.0)
    contest = bench_native._interpreter_contest("fused", 70, 1, 2, is_first=False)
    monkeypatch.setattr(bench, "NATIVE_CONTESTS", (contest,))
    json_path = tmp_path / "x.json"
    arguments = ["bench", "--device", "linalg", "--rounds", "1", "--json", str(json_path)]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    report = json.loads(json_path.read_text())
    assert report["device"] == "linalg"
    (measured,) = report["results"]
    assert (measured["ours"], measured["peer"]) == ("native fused", "interpreted fused")
    assert measured["ratio"][1] > 3
    assert "1 threads, CPU" in result.output
    assert "not timed on a CPU" not in result.output
    assert max(map(len, result.output.splitlines())) <= 140


def _raise(error: Exception) -> Any:
    def function(*args: object, **kwargs: object) -> None:
        raise error

    return function


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--only", "nothing"], "--only is nothing"),
        (["--json", "/no/such/folder/x"], "--json is /no/such/folder/x"),
        (["--json", "/"], "--json is /"),
        (["--plot", "x.foo"], "--plot is x.foo"),
        (["--device", "tpu"], "device is 'tpu'"),
    ],
)
def test_bench_refuses_before_it_measures(
    arguments: list[str], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench, "_measure", lambda *_: pytest.fail("measured"))
    result = CliRunner().invoke(app, ["bench", *arguments])
    assert result.exit_code == 2
    assert said in result.output


def test_schedule_contest_times_a_decode_step_of_every_request(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "VLLMEngine", OurEngine)
    (contest,) = [c for c in bench.CONTESTS if c.name == "schedule(), 64 running requests, against vLLM"]
    pair = contest.start()
    assert pair.our_settle
    decodes = pair.our_call.__self__  # type: ignore[attr-defined]
    for _ in range(3):
        num_tokens = [r.num_tokens for r in decodes.engine.scheduler.running]
        pair.our_call()
        assert list(decodes.output.num_scheduled_tokens.values()) == [1] * 64
        pair.our_settle()
        assert [r.num_tokens for r in decodes.engine.scheduler.running] == [n + 1 for n in num_tokens]


def test_a_turn_does_not_time_what_settles(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = itertools.count()
    monkeypatch.setattr("time.perf_counter", lambda: float(next(clock)))
    assert bench._turn(lambda: None, settle=lambda: next(clock)) == bench.Turn(1.0)


@pytest.mark.parametrize(
    "name", ["policy in schedule(), 64", pytest.param("plugin in schedule(), 64", marks=pytest.mark.vllm)]
)
def test_policy_contest_times_the_same_step_with_a_gate_and_without(name: str) -> None:
    (contest,) = [c for c in bench.CONTESTS if c.name.startswith(name)]
    pair = contest.start()
    assert pair.our_settle
    assert pair.peer_settle
    ours, peer = pair.our_call.__self__, pair.peer_call.__self__  # type: ignore[attr-defined]
    num_gathers = ours.engine.scheduler.num_gathers  # while the requests were started
    for step in range(3):
        pair.our_call()
        pair.peer_call()
        assert ours.output.num_scheduled_tokens == peer.output.num_scheduled_tokens
        assert ours.output.total_num_scheduled_tokens == 64
        pair.our_settle()
        pair.peer_settle()
        assert ours.engine.scheduler.num_gathers == num_gathers + step + 1
        assert ours.engine.scheduler.is_open


def test_gather_contest_is_a_gather_of_all_ranks_and_a_step_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    (contest,) = [c for c in bench.CONTESTS if c.name.startswith("gather and decision, 8 ranks of 64")]
    observed = []
    observe = BalanceScheduler.observe
    monkeypatch.setattr(
        BalanceScheduler, "observe", lambda s, rows: (observed.append((s, rows)), observe(s, rows))
    )
    pair = contest.start()
    assert pair.peer_settle
    pair.our_call()
    pair.our_call()
    assert len({scheduler for scheduler, _ in observed}) == 8
    assert [len(rows) for _, rows in observed] == [8] * 16
    assert {counts.running for _, rows in observed for counts in rows} == {64}
    decodes = pair.peer_call.__self__  # type: ignore[attr-defined]
    pair.peer_call()
    assert decodes.output.total_num_scheduled_tokens == 64
    pair.peer_settle()


def test_decodes_start_anew_before_they_get_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "MOST_DECODED_TOKENS", 131)
    decodes = bench._ScheduledDecodes(OurEngine, 3)
    lengths = []
    for _ in range(5):
        decodes.schedule()
        assert decodes.output.total_num_scheduled_tokens == 3
        lengths.append([request.num_tokens for request in decodes.engine.scheduler.running])
        decodes.settle()
    assert lengths == [[129] * 3, [130] * 3] * 2 + [[129] * 3]


def test_recording_contest_records_one_call_in_so_many(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Recorder] = []

    def make(settings: RecordSettings) -> Recorder:
        made.append(Recorder(settings))
        return made[-1]

    monkeypatch.setattr(bench, "Recorder", make)
    pair = bench._recording_contest(3).start()
    for _ in range(2):
        pair.our_call()
        pair.peer_call()
    assert made[0].flush(60)
    assert made[0].counts == {"recorded": 2}


def test_recording_switched_off_costs_less_than_a_thousandth_of_a_small_prefill() -> None:
    pair = bench._no_recording_contest().start()
    assert isinstance(pair.our_call(), tuple)
    (share,) = re.findall(r"([0-9.]+)% of it", pair.note)
    assert float(share) < 0.1
