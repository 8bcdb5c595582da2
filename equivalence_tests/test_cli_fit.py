"""`ascend-twin fit`: what it says and writes, what it refuses, and the examples of docs/cost.md."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from ascend_twin.cli.main import app
from ascend_twin.scheduler.cost import PARAMETERS, CostModel, RankWork, load_cost

DOCS = Path(__file__).parents[1] / "docs/cost.md"
MODEL = CostModel(step_ms=30.0, prefill_step_ms=8.0, prefill_us_per_token=25.0, decode_us_per_request=150.0)
FREE = (
    "--free=step_ms",
    "--free=prefill_step_ms",
    "--free=prefill_us_per_token",
    "--free=decode_us_per_request",
)
ROW = "--row=ttft=300,tpot=30,throughput=180"
WORKLOAD = (
    "lognormal:prompt=300,output=20",
    "--requests=24",
    "--dp=2",
    "--max-num-seqs=4",
    "--concurrency=12",
)


def _run(*arguments: str) -> tuple[int, str]:
    """Exit status, and stdout and stderr together, on one line."""
    result = CliRunner().invoke(app, ["fit", *arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, " ".join(result.output.split())


def _step(i: int) -> dict[str, Any]:
    tokens = 40 * i if i % 3 == 0 else 0
    work = [
        RankWork(tokens, tokens * (tokens + 1) // 2, i % 5, 1_000 * (i % 5)),
        RankWork(0, 0, i % 7, 1_000 * (i % 7)),
    ]
    return {"step_ms": MODEL.step(work).total, "ranks": [x._asdict() for x in work]}


@pytest.fixture
def steps(tmp_path: Path) -> str:
    path = tmp_path / "steps.jsonl"
    path.write_text("".join(json.dumps(_step(i)) + "\n" for i in range(1, 60)))
    return str(path)


def test_it_writes_the_model_that_the_steps_have(steps: str, tmp_path: Path) -> None:
    output, file = tmp_path / "cost.json", tmp_path / "fit.json"
    status, said = _run(steps, *FREE, "--output", str(output), "--json", str(file))
    assert status == 0
    assert "│ prefill_us_per_token │ 25 │ us │" in said
    assert "│ expert_us_per_token │ 0 │ us │ not fitted │ experts, for one token a rank" in said
    assert "59 steps are met within 0.00% (root mean square)" in said

    cost = load_cost(output)
    names = "step_ms, prefill_step_ms, prefill_us_per_token, decode_us_per_request"
    assert cost.source == f"fitted {names} to 59 steps of {steps}"
    for name in PARAMETERS:
        assert getattr(cost, name) == pytest.approx(getattr(MODEL, name), rel=1e-6)

    result = json.loads(file.read_text())
    assert result["version"] == 1
    assert result["cost"] == json.loads(output.read_text())
    assert [(x["name"], x["unit"]) for x in result["parameters"]] == [
        (k, v.unit) for k, v in PARAMETERS.items()
    ]
    assert [x["standard_error"] is None for x in result["parameters"]] == [
        f"--free={name}" not in FREE for name in PARAMETERS
    ]
    assert result["steps"]["measured_ms"] == [_step(i)["step_ms"] for i in range(1, 60)]
    assert result["steps"]["predicted_ms"] == pytest.approx(result["steps"]["measured_ms"])
    assert result["row"] is None


def test_it_names_the_worst_step(steps: str) -> None:
    lines = Path(steps).read_text().splitlines()
    lines[10] = json.dumps({**json.loads(lines[10]), "step_ms": 100.0})
    Path(steps).write_text("\n".join(lines))
    assert "The worst is step 11 of the file: measured 100 ms, predicted " in _run(steps, *FREE)[1]


@pytest.mark.parametrize("suffix", [".png", ".svg", ".pdf"])
def test_it_draws_the_steps(steps: str, tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"steps{suffix}"
    assert _run(steps, *FREE, "--plot", str(path))[0] == 0
    assert path.read_bytes()[:4] in (b"\x89PNG", b"<?xm", b"%PDF")


def test_it_fits_a_row_and_simulate_reads_what_it_wrote(tmp_path: Path) -> None:
    output, file = tmp_path / "cost.json", tmp_path / "fit.json"
    status, said = _run(*WORKLOAD, ROW, "--output", str(output), "--json", str(file))
    assert status == 0
    assert "│ TTFT, mean, ms │ 300 │" in said
    result = json.loads(file.read_text())
    assert result["steps"] is None
    assert result["row"]["published"] == {"ttft_ms": 300, "tpot_ms": 30, "throughput": 180}
    assert result["row"]["simulations"] == 2
    assert result["cost"]["source"] == (
        "fitted step_ms, prefill_us_per_token to a benchmark row of "
        "lognormal:prompt=300,output=20, DP 2, open_gate"
    )

    simulated = tmp_path / "simulated.json"
    again = ["simulate", *WORKLOAD, "--policy=open_gate", "--cost", str(output), "--json", str(simulated)]
    assert CliRunner().invoke(app, again).exit_code == 0
    run = json.loads(simulated.read_text())["rows"][0]["runs"][0]
    row = result["row"]["simulated"]
    assert run["output_tokens_per_s"] == pytest.approx(row["throughput"])
    assert run["ttft"]["mean_ms"] == pytest.approx(row["ttft_ms"])
    assert run["tpot"]["mean_ms"] == pytest.approx(row["tpot_ms"])


def test_it_holds_what_is_not_fitted_to_a_row_at_the_values_of_a_file(tmp_path: Path) -> None:
    held, output = tmp_path / "held.json", tmp_path / "cost.json"
    held.write_text(json.dumps(CostModel(1.0, decode_us_per_request=500.0).to_json()))
    assert _run(*WORKLOAD, ROW, "--free=step_ms", "--cost", str(held), "--output", str(output))[0] == 0
    cost = load_cost(output)
    assert (cost.decode_us_per_request, cost.prefill_us_per_token) == (500, 0)
    assert cost.step_ms > 10


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--free=step"], "free is ('step',); allowed: at least one of step_ms, prefill_step_ms, "),
        ([], "steps cannot tell apart decode_us_per_request, decode_ns_per_context_token"),
        (["--dp=2"], "--dp is 2; allowed: only together with --row"),
        (["--concurrency=2"], "--concurrency is 2; allowed: only together with --row"),
        (["--max-num-seqs=2"], "--max-num-seqs is 2; allowed: only together with --row"),
        (["--cost=cost.json"], "--cost is cost.json; allowed: only together with --row"),
        (["--plot=steps.txt"], "--plot is steps.txt; allowed: a file that ends in .png, .svg, .pdf"),
        (["--json=absent/fit.json"], "--json is absent/fit.json; allowed: a file that can be written ("),
        (["--json=same", "--output=same"], "--json is same; allowed: another file than that of --output"),
        (["--output=steps.jsonl"], "--output is steps.jsonl; allowed: another file than that of the input"),
    ],
)
def test_wrong_options_for_steps_are_told_in_one_line(
    steps: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], said: str
) -> None:
    _refuses(monkeypatch, tmp_path, [steps, *arguments], said)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--row=ttft=6600"], "--row is ttft=6600; allowed: ttft=MS,tpot=MS,throughput=TOKENS_A_SECOND, "),
        (["--row="], "--row is ; allowed: ttft=MS,tpot=MS,"),
        (["--row=ttft=1,tpot=1,throughput=x"], "--row is ttft=1,tpot=1,throughput=x; allowed: ttft=MS,"),
        (["--row=ttft=1,tpot=0,throughput=1"], "--row is ttft=1,tpot=0,throughput=1; allowed: ttft=MS,"),
        (["--row=ttft=1,tpot=nan,throughput=1"], "--row is ttft=1,tpot=nan,throughput=1; allowed: ttft=MS,"),
        (
            ["--row=ttft=1,tpot=1,tpot=1,throughput=1"],
            "--row is ttft=1,tpot=1,tpot=1,throughput=1; allowed: ",
        ),
        ([ROW, "--plot=steps.png"], "--plot is steps.png; allowed: not together with --row"),
        ([ROW, "--policy=closed_gate"], "is 'closed_gate'; allowed: one of open_gate, any_rank_at_cap, "),
        ([ROW, "--routing=random"], "--routing is random; allowed: round_robin, least_loaded, skewed"),
        ([ROW, "--cost=absent.json"], "absent.json: No such file or directory"),
        ([ROW, *(f"--free={name}" for name in list(PARAMETERS)[:4])], "allowed: three at most"),
    ],
)
def test_wrong_options_for_a_row_are_told_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], said: str
) -> None:
    _refuses(monkeypatch, tmp_path, [*WORKLOAD, *arguments], said)


def _refuses(monkeypatch: pytest.MonkeyPatch, folder: Path, arguments: list[str], said: str) -> None:
    """Exit status 2 and one line; no file is written, and what is there stays as it is."""
    monkeypatch.chdir(folder)
    (folder / "old.json").write_text("old")
    before = sorted(folder.iterdir())
    if not any(argument.startswith("--output") for argument in arguments):
        arguments = [*arguments, "--output=old.json"]
    result = CliRunner().invoke(app, ["fit", *arguments])
    assert result.exit_code == 2
    assert result.output.startswith("error: ")
    assert said in result.output
    assert result.output.count("\n") == 1
    assert sorted(folder.iterdir()) == before
    assert (folder / "old.json").read_text() == "old"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "steps.jsonl:1: the file is empty; allowed: at least one step"),
        ('{"step_ms": 0, "ranks": [{}]}', "steps.jsonl:1: ranks[0].prefill_tokens is missing"),
        ("step_ms,ranks", "steps.jsonl:1: not JSON ("),
    ],
)
def test_a_file_that_does_not_fit_is_told_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, said: str
) -> None:
    (tmp_path / "steps.jsonl").write_text(text)
    _refuses(monkeypatch, tmp_path, ["steps.jsonl"], said)


def test_a_file_that_is_not_there_is_told_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _refuses(monkeypatch, tmp_path, ["absent.jsonl"], "absent.jsonl: No such file or directory")


def test_a_file_that_cannot_be_finished_leaves_the_old_one(
    steps: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: Path, *arguments: Any, **options: Any) -> None:
        self.touch()
        raise OSError(28, "No space left on device")

    output = tmp_path / "cost.json"
    output.write_text("old")
    monkeypatch.setattr(Path, "write_text", fail)
    status, said = _run(steps, *FREE, "--output", str(output))
    assert status == 2
    assert f"--output is {output}; allowed: a file that can be written (No space left on device)" in said
    assert output.read_bytes() == b"old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cost.json", "steps.jsonl"]


def test_an_interrupted_fit_ends_with_130(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*arguments: Any, advance: Callable[[int], object], **options: Any) -> None:
        advance(7)
        raise KeyboardInterrupt

    monkeypatch.setattr("ascend_twin.cli.fit.fit_row", interrupt)
    status, said = _run(*WORKLOAD, ROW, "--output", str(tmp_path / "cost.json"))
    assert (status, said) == (130, "interrupted after 7 simulated requests")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not DOCS.exists(), reason="the docs are in the repository alone")
def test_the_examples_of_the_docs_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", DOCS.read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) == 3
    namespace: dict[str, Any] = {}
    for block in blocks:
        exec(block, namespace)  # they go on from one another


@pytest.mark.skipif(not DOCS.exists(), reason="the docs are in the repository alone")
def test_the_docs_have_every_parameter_and_a_line_that_can_be_read(tmp_path: Path) -> None:
    lines = DOCS.read_text(encoding="utf-8").splitlines()
    for name, parameter in PARAMETERS.items():
        row = f"| `{name}` | {parameter.unit} | {parameter.meaning} | "
        assert any(line.startswith(row) for line in lines), row
    path = tmp_path / "steps.jsonl"
    path.write_text(next(line for line in lines if line.startswith('    {"step_ms"')))
    output = tmp_path / "cost.json"
    assert _run(str(path), "--free=step_ms", "--output", str(output))[0] == 0
    assert load_cost(output).step_ms == pytest.approx(71.2)
