"""The examples of `ascend-twin COMMAND --help` run: each as it stands, with a few options that make it small.

What takes minutes, an accelerator or another package stops just before its work, with its options checked.
"""

import itertools
import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from ascend_twin.cli.main import app
from ascend_twin.equivalence_tests.documented_commands import lines_of_help, stopped_before_the_work
from ascend_twin.fixtures import store
from ascend_twin.scheduler.cost import CostModel, RankWork

COMMANDS = vars(typer.main.get_command(app))["commands"]

CASES = Path(str(store.__file__)).parent / "cases"
SMALL = (
    "--num-heads 1 --num-value-heads 2 --head-dim-k 16 --head-dim-v 16 --cases 1 --max-num-batched-tokens 128"
)

RUN = {
    "ascend-twin verify": SMALL,
    "ascend-twin verify --suite scheduler": "--cases 100",
    "ascend-twin verify --trace conversation.jsonl --cases 100 --json result.json": SMALL,
    "ascend-twin verify --implementation fused": SMALL,
    "ascend-twin verify --html report.html --junit junit.xml": SMALL,
    "ascend-twin verify --num-heads 4 --num-value-heads 8": "--cases 1 --max-num-batched-tokens 128",
    "ascend-twin replay gdn-layer0-step12.safetensors": "",
    "ascend-twin replay gdn-layer0-step12.safetensors --minimize small.safetensors --heatmap error.png": "",
    "ascend-twin replay fixtures/cases/gdn --html report.html --junit junit.xml": "",
    "ascend-twin mutants --list --area numerics": "",
    "ascend-twin bench --only metadata --rounds 21 --plot metadata.png": "--rounds 1",
    "ascend-twin simulate fixed:prompt=3500,output=1500 --dp 8 --max-num-seqs 16 --concurrency 128": (
        "--requests 8 --jobs 1"
    ),
    "ascend-twin simulate long_prompt --policy open_gate --policy cadence:interval=4 --html report.html": (
        "--requests 8 --jobs 1"
    ),
    "ascend-twin simulate conversation.jsonl --dp 8 --routing least_loaded --json result.json": "--jobs 1",
    "ascend-twin simulate lognormal:rate=6 --dp 2 --dp 4 --seeds 5 --timeline timeline.json": (
        "--requests 4 --jobs 1"
    ),
    "ascend-twin fit steps.jsonl --output cost.json --plot steps.png": "",
    "ascend-twin fit steps.jsonl --free step_ms --free prefill_us_per_token --free decode_us_per_request": "",
    "ascend-twin fit fixed:prompt=3500,output=1500 --row ttft=6600,tpot=86.85,throughput=1297.3 --dp 4 "
    "--max-num-seqs 32 --concurrency 128 --output cost.json": "--requests 8",
    "ascend-twin simulate conversation.jsonl --dp 4 --cost cost.json": "--jobs 1",
}
"""By example, what is appended to it: an option that is given twice has its last value."""

DIFFERS = {example for example in RUN if "gdn-layer0-step12" in example}
"""Those that end with status 1: what was recorded is wrong."""

STOPPED = {
    "ascend-twin verify --suite scheduler --against vllm --trace conversation.jsonl": "needs vLLM 0.17.0",
    "ascend-twin verify --device npu --max-num-batched-tokens 8192 --max-num-seqs 64": "needs an NPU",
    "ascend-twin verify --device linalg --dtype float16": "needs the tools of linalg: test_cli_linalg.py",
    "ascend-twin bench": "measures for minutes",
    "ascend-twin bench --device cuda --only fused --only prebuilt --json result.json": "needs a GPU",
    "ascend-twin bench --device linalg --only cached --rounds 3": "needs the tools of linalg",
    "tox run -e bench-peers -- --json result.json": "makes an environment",
    "ascend-twin replay gdn-layer0-step12.safetensors --device npu --implementation fused": "needs an NPU",
    "ascend-twin replay gdn-layer0-step12.safetensors --device linalg": "needs the tools of linalg",
    "ascend-twin mutants": "takes minutes",
    "ascend-twin mutants compact_ranks state_stored_transposed": "test_museum.py runs bugs",
    "ascend-twin mutants --area 'data parallel' --jobs 1 --json result.json": "takes minutes",
    "ascend-twin mutants --suite 'metadata coverage' --html report.html --junit junit.xml": "takes minutes",
    "ascend-twin published": "takes ten minutes",
    "ascend-twin published --dp 4 --expert-share 0.3 --policy patient --json published.json": "takes minutes",
    "ascend-twin compile": "needs triton-ascend",
    "ascend-twin compile --model Qwen3.5-27B --tp 4 --target 910B1": "needs triton-ascend",
    "ascend-twin compile --html report.html --junit junit.xml": "needs triton-ascend",
    "ascend-twin compile --implementation fused --json memory.json --plot memory.png": "needs triton-ascend",
}
"""By example, why it is not run."""

OUTPUTS = ("--json", "--html", "--junit", "--plot", "--timeline", "--output", "--minimize", "--heatmap")


EXAMPLES = [(name, line) for name in sorted(COMMANDS) for line in lines_of_help(COMMANDS[name].help)]


@pytest.fixture(autouse=True)
def _files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """The files that examples read, in the folder where they run."""
    if request.config.getoption("--device") != "cpu":
        pytest.skip("examples run on a CPU, where kernels are interpreted in this process")
    monkeypatch.chdir(tmp_path)
    requests = (
        {"timestamp": 100 * i, "input_length": 700, "output_length": 9, "hash_ids": [0, i + 1]}
        for i in range(6)
    )
    Path("conversation.jsonl").write_text("".join(json.dumps(request) + "\n" for request in requests))
    model = CostModel(
        step_ms=30.0, prefill_step_ms=8.0, prefill_us_per_token=25.0, prefill_ns_per_pair=3.0,
        expert_us_per_token=20.0, decode_us_per_request=150.0, decode_ns_per_context_token=10.0,
    )  # fmt: skip
    with Path("steps.jsonl").open("w") as steps:
        for i in range(1, 80):
            tokens = 40 * (i % 11) if i % 3 == 0 else 0
            work = [
                RankWork(tokens, tokens * (tokens + i) // 2, i % 5, 300 * (i % 5) * (1 + i % 4)),
                RankWork(0, 0, i % 7, 500 * (i % 7)),
            ]
            step = {"step_ms": model.step(work).total, "ranks": [x._asdict() for x in work]}
            steps.write(json.dumps(step) + "\n")
    Path("cost.json").write_text(json.dumps(model.to_json()))
    recorded, folder = CASES / "gdn", Path("fixtures/cases/gdn")
    shutil.copy(recorded / "asc-11508_state_counted_twice_wrong.safetensors", "gdn-layer0-step12.safetensors")
    folder.mkdir(parents=True)
    shutil.copy(recorded / "asc-10901_no_sequence.safetensors", folder)


def test_every_example_is_run_or_says_why_not() -> None:
    found = {example for _, example in EXAMPLES}
    assert set(RUN) | set(STOPPED) == found
    assert not set(RUN) & set(STOPPED)


def test_every_command_has_an_example_and_a_line_in_the_overview() -> None:
    without_options = {"doctor"}
    assert {name for name, _ in EXAMPLES} | without_options == set(COMMANDS)
    overview = re.findall(r"^ascend-twin (\w+) ", str(typer.main.get_command(app).help), re.MULTILINE)
    assert sorted(overview) == sorted(COMMANDS)


@pytest.mark.parametrize("example", [example for _, example in EXAMPLES if example in RUN])
def test_example_runs(example: str, request: pytest.FixtureRequest) -> None:
    if "--implementation fused" in example:
        request.getfixturevalue("triton_runs")
    arguments = shlex.split(f"{example} {RUN[example]}")[1:]
    written = [Path(value) for name, value in itertools.pairwise(arguments) if name in OUTPUTS]
    for path in written:
        path.unlink(missing_ok=True)
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == (1 if example in DIFFERS else 0), result.output
    assert [path for path in written if not path.is_file()] == []


@pytest.mark.parametrize(("command", "example"), [pair for pair in EXAMPLES if pair[1] in STOPPED])
def test_example_is_accepted(command: str, example: str, monkeypatch: pytest.MonkeyPatch) -> None:
    started = stopped_before_the_work(monkeypatch)
    words = shlex.split(example)
    arguments = words[1:] if words[0] == "ascend-twin" else [command, *words[words.index("--") + 1 :]]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert len(started) == 1
