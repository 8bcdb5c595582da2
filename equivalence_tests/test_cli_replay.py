"""`ascend-twin replay`: what it says of recordings, what it writes, its exit status, and what it refuses."""

import dataclasses
import json
import os
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import torch
from typer.testing import CliRunner

from ascend_twin import fixtures
from ascend_twin.cli.main import app
from ascend_twin.equivalence_tests.cases import PrefillCase
from ascend_twin.fixtures.store import Fixture, read_fixture, write_fixture
from ascend_twin.reference.gdn import chunk_gated_delta_rule

CASES = Path(fixtures.__path__[0]) / "cases"
RECORDINGS = CASES / "vllm"
CASE = PrefillCase((70, 3), seed=1, HV=2, use_qk_l2norm_in_kernel=True)


def _run(*arguments: str | Path) -> tuple[int, str]:
    """Exit status, and stdout and stderr together."""
    result = CliRunner().invoke(app, ["replay", *map(str, arguments)])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.output


def _call(path: Path, *, wrong: bool = False, seen: bool = True) -> Path:
    """A small call in a file; wrong: head 1 gave another head's output."""
    inputs = CASE.inputs()
    o, state = chunk_gated_delta_rule(
        *inputs[:5],
        initial_state=inputs.initial_state,
        output_final_state=True,
        cu_seqlens=inputs.cu_seqlens,
        use_qk_l2norm_in_kernel=True,
        compute_dtype=torch.float32,
    )
    assert state is not None
    if wrong:
        o[:, :, 1] = o[:, :, 0]
    tensors = {name: x for name, x in inputs._asdict().items() if x is not None}
    if seen:
        tensors |= {"seen.o": o, "seen.final_state": state}
    config = {"scale": None, "eps": 1e-6, "use_qk_l2norm_in_kernel": True}
    write_fixture(path, Fixture("gdn", config, tensors, origin={"layer": "layer 7", "step": 12}))
    return path


def test_replay_agrees_on_a_right_recording_and_on_another_run_of_it(tmp_path: Path) -> None:
    status, output = _run(_call(tmp_path / "right.safetensors"))
    assert status == 0
    assert "DIFFERS" not in output
    assert "recorded" in output
    assert "eager on cpu" in output
    assert "layer layer 7, step 12" in output


def test_replay_says_what_is_wrong_and_where(tmp_path: Path) -> None:
    status, output = _run(_call(tmp_path / "wrong.safetensors", wrong=True))
    assert status == 1
    assert (
        "recorded: chunk_fwd_o is the first that is wrong: o: it looks as if o were that of another head"
        in output
    )
    assert "all sequences, head 1." in output
    assert "To blame: arithmetic." in output
    again = output.partition("eager on cpu")[2]
    assert "agrees" in again
    assert "DIFFERS" not in again


def test_replay_runs_what_holds_no_results(tmp_path: Path) -> None:
    path = _call(tmp_path / "inputs.safetensors", seen=False)
    status, output = _run(path, "--implementation", "reference")
    assert status == 0
    assert "reference on cpu" in output
    assert "recorded" not in output


def test_replay_writes_everything_that_is_asked_for(tmp_path: Path) -> None:
    wrong = _call(tmp_path / "wrong.safetensors", wrong=True)
    files = {name: tmp_path / f"out.{name}" for name in ("png", "html", "xml", "json", "safetensors")}
    status, output = _run(
        wrong, "--heatmap", files["png"], "--html", files["html"], "--junit", files["xml"],
        "--json", files["json"], "--minimize", files["safetensors"],
    )  # fmt: skip
    assert status == 1
    assert files["png"].read_bytes().startswith(b"\x89PNG")
    page = files["html"].read_text()
    assert "another head" in page
    assert "chunk_fwd_o" in page
    assert "<script" not in page
    cases = list(ElementTree.parse(files["xml"]).iter("testcase"))
    assert [len(case.findall("failure")) for case in cases] == [1, 0]
    result = json.loads(files["json"].read_text())
    assert result["passed"] is False
    (file,) = result["files"]
    assert (file["path"], file["kind"], file["skipped"]) == (str(wrong), "gdn", "")
    recorded, again = file["replays"]
    assert (recorded["subject"], recorded["passed"], recorded["blame"]) == ("recorded", False, "arithmetic")
    assert recorded["details"]["explanation"]["heads"] == [1]
    assert (again["subject"], again["passed"]) == ("eager on cpu", True)
    first = next(f for f in recorded["findings"] if not f["passed"])
    assert (first["stage"], first["place"]["head"]) == ("chunk_fwd_o", 1)
    o = next(f for f in again["findings"] if f["name"] == "o")
    assert 0 < o["errors"]["ratio"] < o["limit"]["ratio"]
    smaller = read_fixture(files["safetensors"])
    assert smaller.tensors["q"].shape[1] < 73
    assert smaller.origin["minimized_from"] == "wrong.safetensors"
    assert re.search(r"out\.safetensors: \d+ tokens .*, of 73 tokens .*, with the same finding", output)
    assert "head 1" in _run(files["safetensors"])[1]
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(
        ["wrong.safetensors", *(p.name for p in files.values())]
    )


def test_replay_takes_folders_and_says_which_files_differ(tmp_path: Path) -> None:
    folder = tmp_path / "cases" / "deeper"
    folder.mkdir(parents=True)
    _call(folder / "a.safetensors")
    _call(folder / "b.safetensors", wrong=True)
    metadata = Fixture(
        "metadata", {"num_decodes": 0, "num_value_heads": 2}, {"cu_seqlens": torch.tensor([0, 3])}
    )
    write_fixture(folder / "c.safetensors", metadata)
    write_fixture(folder / "d.safetensors", metadata)
    (folder / "notes.txt").write_text("no case")
    (folder / ".hidden.safetensors").write_text("a writer is at it")
    status, output = _run(tmp_path / "cases", folder / "a.safetensors")
    assert status == 1
    lines = output.splitlines()
    assert [line.split()[0] for line in lines] == ["agrees", "DIFFERS", "agrees", "agrees", "4"]
    assert "b.safetensors: recorded: chunk_fwd_o is the first" in lines[1]
    assert lines[-1] == "4 files: 3 agree, 1 differ."


def test_replay_of_a_folder_judges_all_files_that_are_not_broken(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    right = _call(folder / "right.safetensors").read_bytes()
    _call(folder / "wrong.safetensors", wrong=True)
    fixture = read_fixture(folder / "right.safetensors")
    tensors = {**fixture.tensors, "g": fixture.tensors["g"][:, 1:]}
    write_fixture(folder / "shape.safetensors", dataclasses.replace(fixture, tensors=tensors))
    (folder / "short.safetensors").write_bytes(right[:-10])
    (folder / "empty.jsonl").touch()
    (folder / "dangling.jsonl").symlink_to("nowhere")
    (folder / "loop.json").symlink_to("loop.json")
    (folder / "half.json").write_text("{")
    (folder / "notes.json").write_text('{"note": 1}')
    (folder / "folder.json").mkdir()
    Path(os.fsdecode(bytes(folder) + b"/\xff.jsonl")).touch()
    broken = {"shape.safetensors", "short.safetensors", "empty.jsonl", "dangling.jsonl", "loop.json"}
    broken |= {"half.json", "\\udcff.jsonl"}
    files = {name: tmp_path / f"out.{name}" for name in ("json", "html", "xml")}
    status, output = _run(folder, "--json", files["json"], "--html", files["html"], "--junit", files["xml"])
    assert status == 2
    *lines, summary, last = output.splitlines()
    assert summary == "9 files: 1 agree, 1 differ, 7 are broken."
    assert last == "error: broken files: 7 of 9"
    assert [line.split()[0] for line in lines] == ["agrees", "DIFFERS", *["BROKEN"] * 7]
    assert {line.split("folder/")[1].split(":")[0] for line in lines[2:]} == broken
    result = json.loads(files["json"].read_text())
    assert not result["passed"]
    assert len(result["broken"]) == 7
    assert len(list(ElementTree.parse(files["xml"]).iter("error"))) == 7
    page = files["html"].read_text()
    assert page.count("BROKEN") == 7
    assert f"<h2>{folder}/wrong.safetensors" in page


def test_replay_of_a_folder_with_nothing_but_other_json_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.json").write_text("{}")
    status, output = _run(tmp_path)
    assert status == 2
    assert "a folder with recorded cases" in output


def test_replay_prints_what_a_file_says_of_itself_on_one_short_line(tmp_path: Path) -> None:
    path = _call(tmp_path / "right.safetensors")
    origin = {"layer": "a\x07b\nc\x1b[31m", "device": "x" * 3000}
    write_fixture(path, dataclasses.replace(read_fixture(path), origin=origin))
    status, output = _run(path)
    assert status == 0
    headline = output.splitlines()[0]
    assert "layer a\\x07b c\\x1b[31m, device xxx" in headline
    assert len(headline) < len(str(path)) + 500


def test_replay_says_that_the_disk_is_full() -> None:
    program = "from ascend_twin.cli.main import app; app()"
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-c", program, "replay", RECORDINGS / "right.safetensors"],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
        )
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == "error: cannot write the output: No space left on device"


def test_replay_passes_every_recording_that_is_not_wrong_from_real_vllm() -> None:
    assert _run(RECORDINGS / "right.safetensors")[0] == 0
    assert _run(RECORDINGS / "vllm.safetensors")[0] == 0


WRONG_CORES = {
    "transposed": ("chunk_delta_h", "state layout transposed", {0, 1, 2}, None),
    "dropped": ("chunk_delta_h", "initial state dropped", {0}, None),
    "gate": ("chunk_local_cumsum", "gate of another head", {0, 1, 2}, {1}),
    "compact": ("metadata", "compact ranks", {3}, None),
}


PROGRAM = """
import sys
from typer.testing import CliRunner
from ascend_twin.cli.main import app
for i, path in enumerate(sys.argv[1:]):
    done = CliRunner().invoke(app, ["replay", path, "--json", f"{i}.json", "--minimize", f"{i}.safetensors"])
    assert done.exit_code == 1, done.output
"""


def test_replay_names_what_was_wrong_in_a_real_vllm_and_makes_it_small(tmp_path: Path) -> None:
    """In a process of its own, in an empty folder; with what the stages gave, and from the results alone."""
    paths = []
    for name in WRONG_CORES:
        recording = read_fixture(RECORDINGS / f"{name}.safetensors")
        bare = {n: x for n, x in recording.tensors.items() if not n.startswith(("stage.", "metadata."))}
        write_fixture(tmp_path / f"{name}.safetensors", dataclasses.replace(recording, tensors=bare))
        paths += [RECORDINGS / f"{name}.safetensors", tmp_path / f"{name}.safetensors"]
    empty = tmp_path / "empty"
    empty.mkdir()
    done = subprocess.run(
        [sys.executable, "-P", "-c", PROGRAM, *map(str, paths)],
        cwd=empty,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    for i, path in enumerate(paths):
        stage, mistake, sequences, heads = WRONG_CORES[path.stem]
        recorded, again = json.loads((empty / f"{i}.json").read_text())["files"][0]["replays"]
        assert again["passed"]
        first = next(f for f in recorded["findings"] if not f["passed"])
        explanation = recorded["details"]["explanation"]
        assert (first["stage"], explanation["name"]) == (stage, mistake)
        assert set(explanation["sequences"]) == sequences
        assert set(explanation["heads"]) == (heads or set(range(recorded["details"]["sizes"]["HV"])))
        assert first["place"]["sequence"] in sequences
        assert heads is None or first["place"]["head"] in heads
        assert read_fixture(empty / f"{i}.safetensors").tensors["q"].shape[1] < 200


def test_replay_refuses_wrong_input_in_one_line(tmp_path: Path) -> None:
    right, wrong = _call(tmp_path / "right.safetensors"), _call(tmp_path / "wrong.safetensors", wrong=True)
    metadata = tmp_path / "metadata.safetensors"
    write_fixture(
        metadata,
        Fixture("metadata", {"num_decodes": 0, "num_value_heads": 2}, {"cu_seqlens": torch.tensor([0])}),
    )
    no_shape = tmp_path / "no_shape.safetensors"
    fixture = read_fixture(right)
    write_fixture(
        no_shape, dataclasses.replace(fixture, tensors={**fixture.tensors, "g": fixture.tensors["g"][:, 1:]})
    )
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(right.read_bytes()[:-10])
    empty = tmp_path / "empty"
    empty.mkdir()
    loop = tmp_path / "loop.safetensors"
    loop.symlink_to(loop)
    no_sequence = CASES / "gdn" / "asc-10901_no_sequence.safetensors"
    for arguments, message in (
        ([loop], "loop.safetensors: no such file"),
        ([no_sequence, "--heatmap", tmp_path / "out.png"], "a call with an output that can be compared"),
        ([tmp_path / "missing.safetensors"], "no such file"),
        ([broken], "not a whole safetensors file"),
        ([empty], "allowed: a folder with files that end in"),
        ([right, "--max-bytes", "10"], "raise max_bytes"),
        ([no_shape], "no_shape.safetensors: g.shape is"),
        ([tmp_path, "--device", "tpu"], "error: device is 'tpu'; allowed: cpu"),
        ([right, "--implementation", "fast"], "--implementation is fast; allowed: reference, eager"),
        ([right, "--implementation", "plain"], "--implementation is plain; allowed: reference, eager"),
        ([right, "--device", "tpu"], "device is 'tpu'; allowed: cpu"),
        ([right, "--device", "sim", "--implementation", "staged"], "staged is made of Triton kernels"),
        ([right, "--minimize", tmp_path / "out.safetensors"], "right.safetensors agrees"),
        ([wrong, right, "--minimize", tmp_path / "out.safetensors"], "one FILE with it"),
        ([wrong, "--minimize", tmp_path / "out.jsonl"], "a file that ends in .safetensors"),
        ([metadata, "--minimize", tmp_path / "out.safetensors"], "a call or a scheduler"),
        ([metadata, "--heatmap", tmp_path / "out.png"], "a call of the op"),
        ([wrong, "--heatmap", tmp_path / "out.txt"], "ends in .png, .svg, .pdf"),
        ([wrong, "--json", wrong], "another file than that of"),
    ):
        status, output = _run(*arguments)
        assert status == 2, (arguments, output)
        last = output.rstrip("\n").splitlines()[-1]
        assert last.startswith("error: "), output
        assert message in last, output
    assert not (tmp_path / "out.safetensors").exists()
