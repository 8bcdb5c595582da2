"""`ascend-twin simulate`: its tables, its files, and what it refuses."""

import dataclasses
import json
import multiprocessing
import os
import re
import shlex
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from ascend_twin.cli import parallel
from ascend_twin.cli.main import app
from ascend_twin.cli.parallel import run_jobs
from ascend_twin.cli.simulate import DEFAULT_COST
from ascend_twin.cli.simulate_plots import CAUSES, binned, causes_ms
from ascend_twin.cli.simulate_runs import Job
from ascend_twin.cli.simulate_timeline import timeline_events
from ascend_twin.equivalence_tests.report_pages import Page, why_not_self_contained
from ascend_twin.reference.errors import UnavailableError
from ascend_twin.scheduler.config import SchedulerConfig
from ascend_twin.scheduler.cost import PARAMETERS, CostModel
from ascend_twin.scheduler.latencies import is_frozen, measure, wait_ms
from ascend_twin.scheduler.simulation import Simulation, SimulationResult, SimulationSetup
from ascend_twin.scheduler.workloads import WORKLOADS, make_requests

DOCS = Path(__file__).parents[1] / "docs/simulation.md"
NEEDS_DOCS = pytest.mark.skipif(not DOCS.exists(), reason="the docs are in the repository alone")
SMALL = "lognormal:prompt=400,output=20"
FEW = (SMALL, "--requests=40", "--max-num-seqs=4", "--concurrency=24")
TRACE = "".join(
    f'{{"timestamp": {100 * i}, "input_length": 700, "output_length": 9, "hash_ids": [0, {i + 1}]}}\n'
    for i in range(6)
)


def _simulate(*arguments: str) -> tuple[int, str]:
    """Exit status, and stdout and stderr together, on one line; all runs in this process."""
    jobs = () if any(argument.startswith("--jobs") for argument in arguments) else ("--jobs=1",)
    result = CliRunner().invoke(app, ["simulate", *arguments, *jobs])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, " ".join(result.output.split())


def _result(policy: str = "any_rank_at_cap", *, rate: float = 60, count: int = 60) -> SimulationResult:
    """Three ranks that are at their caps for most of the run."""
    config = SchedulerConfig(num_blocks=2_000, max_num_seqs=4, log_stats=False)
    setup = SimulationSetup(dp_size=3, policy=policy, cost=DEFAULT_COST, config=config)
    return Simulation(setup, make_requests(f"{SMALL},rate={rate}", 0, count)).run()


# Tables and JSON


def test_it_shows_policies_side_by_side(tmp_path: Path) -> None:
    file = tmp_path / "result.json"
    status, output = _simulate(*FEW, "--dp=2", "--dp=3", "--json", str(file))
    assert status == 0
    result = json.loads(file.read_text(encoding="utf-8"))
    rows = result["rows"]
    assert [(row["dp_size"], row["policy"]) for row in rows] == [
        (dp_size, policy) for dp_size in (2, 3) for policy in ("open_gate", "any_rank_at_cap")
    ]
    assert result["workload"] == {
        "source": SMALL,
        "requests": 40,
        "prompt_tokens": rows[0]["runs"][0]["num_prompt_tokens"],
        "output_tokens": rows[0]["runs"][0]["num_output_tokens"],
    }
    for first, second in (rows[:2], rows[2:]):
        throughputs = [row["runs"][0]["output_tokens_per_s"] for row in (first, second)]
        ratio = throughputs[1] / throughputs[0]
        assert first["runs"][0]["throughput_ratio"] == 1
        assert second["runs"][0]["throughput_ratio"] == ratio
        for row, throughput, shown in ((first, throughputs[0], 1.0), (second, throughputs[1], ratio)):
            assert f"{row['dp_size']} {row['policy']} {throughput:,.0f} {shown:.3f}" in output
    run = rows[1]["runs"][0]
    of_ttft = " ".join(f"{run['ttft'][key] / 1e3:.2f}" for key in ("mean_ms", "p50_ms", "p90_ms", "p99_ms"))
    of_tpot = " ".join(f"{run['tpot'][key]:.1f}" for key in ("mean_ms", "p50_ms", "p90_ms", "p99_ms"))
    assert f"2 any_rank_at_cap {of_ttft} {of_tpot}" in output
    idle = " ".join(f"{100 * share:.1f}" for share in run["idle_share"])
    assert f"2 any_rank_at_cap {idle}" in output
    assert len(rows[3]["runs"][0]["idle_share"]) == 3


def test_its_numbers_are_those_of_a_simulation(tmp_path: Path) -> None:
    file = tmp_path / "result.json"
    arguments = ("--dp=3", "--policy=any_rank_near_cap", "--routing=skewed", "--seed=5", "--json", str(file))
    assert _simulate(*FEW, *arguments)[0] == 0
    result = json.loads(file.read_text(encoding="utf-8"))
    config = SchedulerConfig(**{**result["config"], "kv_groups": tuple(result["config"]["kv_groups"])})
    setup = SimulationSetup(
        dp_size=3,
        policy="any_rank_near_cap",
        cost=CostModel.from_json(result["cost"]),
        config=config,
        routing="skewed",
        concurrency=24,
        seed=5,
    )
    metrics = measure(Simulation(setup, make_requests(SMALL, 5, 40)).run())
    assert result["rows"][0]["runs"] == [{"seed": 5, "throughput_ratio": 1.0, **metrics.to_json()}]
    assert config.max_num_seqs == 4


def test_the_command_in_the_json_writes_the_same_bytes_again(tmp_path: Path) -> None:
    files = [tmp_path / f"{i}.json" for i in range(3)]
    arguments = (*FEW, "--routing=skewed", "--seeds=2", "--dp=2", "--no-prefix-caching")
    assert _simulate(*arguments, "--json", str(files[0]))[0] == 0
    assert _simulate(*arguments, "--json", str(files[1]))[0] == 0
    command = json.loads(files[0].read_text(encoding="utf-8"))["command"]
    name, subcommand, *again = shlex.split(command)
    assert (name, subcommand) == ("ascend-twin", "simulate")
    assert _simulate(*again, "--json", str(files[2]))[0] == 0
    assert files[0].read_bytes() == files[1].read_bytes() == files[2].read_bytes()


def test_processes_do_not_change_the_result(tmp_path: Path) -> None:
    files = [tmp_path / f"{jobs}.json" for jobs in (1, 2)]
    for jobs, file in enumerate(files, 1):
        assert _simulate(*FEW, "--dp=2", f"--jobs={jobs}", "--json", str(file))[0] == 0
    assert files[0].read_bytes() == files[1].read_bytes()


def test_seeds_are_runs_of_their_own_and_their_spread_is_shown(tmp_path: Path) -> None:
    file, alone = tmp_path / "seeds.json", tmp_path / "alone.json"
    status, output = _simulate(*FEW, "--dp=2", "--seed=3", "--seeds=3", "--json", str(file))
    assert status == 0
    assert _simulate(*FEW, "--dp=2", "--seed=4", "--json", str(alone))[0] == 0
    row = json.loads(file.read_text(encoding="utf-8"))["rows"][1]
    assert [run["seed"] for run in row["runs"]] == [3, 4, 5]
    assert row["runs"][1] == json.loads(alone.read_text(encoding="utf-8"))["rows"][1]["runs"][0]
    throughputs = [run["output_tokens_per_s"] for run in row["runs"]]
    assert f"{np.mean(throughputs):,.0f} ±{np.std(throughputs, ddof=1):,.0f}" in output
    assert "seeds 3 to 5" in output


def test_a_trace_file_is_simulated_as_it_arrives(tmp_path: Path) -> None:
    trace, file = tmp_path / "trace.jsonl", tmp_path / "result.json"
    trace.write_text(TRACE, encoding="utf-8")
    status, output = _simulate(str(trace), "--dp=1", "--requests=5", "--json", str(file))
    assert status == 0
    assert "5 requests, 3,500 prompt and 45 output tokens; sent as they arrive, round_robin" in output
    run = json.loads(file.read_text(encoding="utf-8"))["rows"][0]["runs"][0]
    assert run["num_requests"] == 5
    assert run["num_cached_tokens"] == 4 * 512
    assert run["duration_s"] > 0.4


def test_a_file_comes_before_a_workload_of_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("fixed").write_text(TRACE, encoding="utf-8")
    assert "fixed: 6 requests, 4,200 prompt" in _simulate("fixed")[1]


def test_single_tokens_have_no_time_between_tokens(tmp_path: Path) -> None:
    file = tmp_path / "result.json"
    status, output = _simulate("fixed:output=1", "--requests=4", "--json", str(file))
    assert status == 0
    run = json.loads(file.read_text(encoding="utf-8"))["rows"][0]["runs"][0]
    assert run["itl"] is run["tpot"] is None
    assert "- - - -" in output


def test_a_cost_model_comes_from_its_file(tmp_path: Path) -> None:
    cost, file = tmp_path / "cost.json", tmp_path / "result.json"
    cost.write_text(json.dumps(CostModel(step_ms=7, source="a <device>").to_json()), encoding="utf-8")
    arguments = (
        "fixed:prompt=9,output=11,rate=1000",
        "--requests=1",
        "--cost",
        str(cost),
        "--json",
        str(file),
    )
    status, output = _simulate(*arguments)
    assert status == 0
    assert f"cost: {cost} (a <device>)" in output
    result = json.loads(file.read_text(encoding="utf-8"))
    assert result["cost"]["step_ms"] == 7
    assert result["rows"][0]["runs"][0]["tpot"]["mean_ms"] == pytest.approx(7)
    assert f"--cost={cost}" in result["command"]


@pytest.mark.parametrize(
    ("arguments", "num_blocks"),
    [
        (("fixed:prompt=1000,output=24", "--max-num-seqs=3"), 3 * 8 + 1),
        (("fixed:prompt=1000,output=25", "--max-num-seqs=3"), 3 * 9 + 1),
        (("fixed:prompt=1000,output=24", "--max-num-seqs=3", "--block-size=512"), 3 * 2 + 1),
        (("fixed:prompt=10000,output=240", "--max-num-seqs=64"), 2**19 // 128 + 1),
        (("fixed:prompt=10000,output=240", "--max-num-seqs=64", "--block-size=1000"), 524 + 1),
        (("fixed:prompt=1000,output=24", "--num-blocks=9"), 9),
    ],
)
def test_the_cache_holds_what_may_run_as_far_as_it_is_sensible(
    arguments: tuple[str, ...], num_blocks: int, tmp_path: Path
) -> None:
    file = tmp_path / "result.json"
    assert _simulate(*arguments, "--requests=1", "--policy=open_gate", "--json", str(file))[0] == 0
    config = json.loads(file.read_text(encoding="utf-8"))["config"]
    assert config["num_blocks"] == num_blocks


def test_the_cache_holds_the_longest_request_however_long(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ascend_twin.cli.simulate.MOST_CACHE_TOKENS", 256)
    file = tmp_path / "result.json"
    assert _simulate("fixed:prompt=1000,output=24", "--requests=1", "--json", str(file))[0] == 0
    assert json.loads(file.read_text(encoding="utf-8"))["config"]["num_blocks"] == 9


def test_help_names_every_workload() -> None:
    output = " ".join(CliRunner().invoke(app, ["simulate", "--help"]).output.split())
    for name in WORKLOADS:
        assert name in output


# The report


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> str:
    file = tmp_path_factory.mktemp("report") / "report.html"
    arguments = ("--dp=2", "--dp=3", "--policy=open_gate", "--policy=cadence:interval=4", "--html", str(file))
    assert _simulate(*FEW, *arguments)[0] == 0
    return file.read_text(encoding="utf-8")


def test_report_needs_no_other_file_and_no_network(page: str) -> None:
    assert why_not_self_contained(page) == []
    assert len(page) < 2_000_000


def test_report_has_all_plots_for_each_dp_size(page: str) -> None:
    parsed = Page(page)
    alts = [value for name, value in parsed.attributes if name == "alt"]
    of_size = (
        "Distributions of latencies",
        "Where the time goes",
        "Running and waiting requests of each rank",
    )
    assert alts == ["TTFT against throughput", *(f"{plot}, DP {dp}" for dp in (2, 3) for plot in of_size)]
    drawn = "".join(str(image) for image in parsed.images)
    for text in (*CAUSES, "rank 2", "open_gate: running", "cadence:interval=4: waiting", "TPOT", "TTFT, P90"):
        assert text in drawn


def test_report_compares_each_policy_with_the_first(page: str, tmp_path: Path) -> None:
    said = Page(page).text
    assert said.split()[1] == "done"
    assert re.search(r"over that of open_gate: cadence:interval=4 at DP 2: \d\.\d{3}; .* at DP 3: \d\.", said)
    file = tmp_path / "alone.html"
    assert _simulate(*FEW, "--requests=4", "--dp=2", "--policy=open_gate", "--html", str(file))[0] == 0
    assert "there is no other policy" in file.read_text(encoding="utf-8")


def test_report_has_the_tables_the_setup_and_the_command(page: str, tmp_path: Path) -> None:
    parsed = Page(page)
    command = re.search(r"ascend-twin simulate [^\n]+", parsed.text)
    assert command
    file = tmp_path / "result.json"
    assert _simulate(*shlex.split(command.group())[2:], "--json", str(file))[0] == 0
    result = json.loads(file.read_text(encoding="utf-8"))
    assert f"{result['rows'][3]['runs'][0]['output_tokens_per_s']:,.0f}" in parsed.text
    assert "prefill_ns_per_pair" in parsed.text
    assert "max_num_batched_tokens" in parsed.text
    assert "illustrative" in parsed.text


def test_report_is_the_same_each_time_and_escapes_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("<b>&$x.jsonl").write_text(TRACE, encoding="utf-8")
    for name in ("1.html", "2.html"):
        assert _simulate("<b>&$x.jsonl", "--html", name)[0] == 0
    text = Path("1.html").read_text(encoding="utf-8")
    assert text == Path("2.html").read_text(encoding="utf-8")
    assert "<b>" not in text
    assert "&lt;b&gt;&amp;$x.jsonl: 6 requests" in text


def test_report_draws_the_range_of_many_ranks(tmp_path: Path) -> None:
    file = tmp_path / "report.html"
    assert _simulate(*FEW, "--dp=17", "--policy=open_gate", "--html", str(file))[0] == 0
    running = str(Page(file.read_text(encoding="utf-8")).images[-1])
    assert "open_gate: waiting" in running
    assert ">rank 0<" not in running


def test_causes_of_a_step_add_up_and_waiting_for_prefill_is_shared_by_all_ranks() -> None:
    result = _result("open_gate")
    causes = causes_ms(result)
    np.testing.assert_allclose(causes.sum(1), result.step_ms)
    assert (causes >= -1e-9).all()
    waits, prefill = wait_ms(result), result.step_parts_ms[:, 3]
    step = int(np.argmax(causes[:, 4]))
    assert causes[step, 4] == pytest.approx(sum(min(wait, prefill[step]) for wait in waits[step]) / 3)
    assert causes[result.prefill_tokens.sum(1) == 0, 3:5].sum() == 0


def test_bins_keep_the_mean_and_are_0_where_no_rank_has_work() -> None:
    result = _result("open_gate", rate=0.05, count=3)
    edges, means = binned(result, result.step_ms[:, None], 50)
    assert edges[-1] == result.duration_ms / 1e3
    assert means.mean() == pytest.approx(result.step_ms.sum() / result.duration_ms)
    assert (means == 0).any()
    edges, means = binned(result, result.running * result.step_ms[:, None], 7)
    of_time = (result.running * result.step_ms[:, None]).sum(0) / result.duration_ms
    np.testing.assert_allclose(means.mean(0), of_time)


# The timeline


def _slices(events: list[dict[str, Any]], process: int) -> dict[int, list[dict[str, Any]]]:
    slices: dict[int, list[dict[str, Any]]] = {}
    for event in events:
        if event["ph"] == "X" and event["pid"] == process:
            slices.setdefault(event["tid"], []).append(event)
    return slices


def test_timeline_is_a_valid_trace_that_names_runs_and_ranks(tmp_path: Path) -> None:
    file = tmp_path / "timeline.json"
    assert _simulate(*FEW, "--dp=2", "--timeline", str(file))[0] == 0
    trace = json.loads(file.read_text(encoding="utf-8"))
    assert trace["displayTimeUnit"] == "ms"
    events = trace["traceEvents"]
    for event in events:
        assert {"ph", "pid", "ts", "name"} <= set(event)
        assert event["ph"] in "MXC"
        assert event["ts"] >= 0
        if event["ph"] == "X":
            assert event["dur"] >= 0
    names = [
        (event["pid"], event.get("tid"), event["args"]["name"]) for event in events if event["ph"] == "M"
    ]
    assert names == [
        entry
        for process, policy in ((1, "open_gate"), (2, "any_rank_at_cap"))
        for entry in (
            (process, 0, f"{policy}, DP 2"),
            (process, 0, "rank 0"),
            (process, 1, "rank 1"),
            (process, 2, "gate"),
        )
    ]
    assert {event["pid"] for event in events} == {1, 2}


def test_timeline_of_a_rank_has_no_gap_and_is_as_long_as_the_run() -> None:
    result = _result(rate=0.4, count=20)
    events = list(timeline_events(1, "run", result, 10**9))
    slices = _slices(events, 1)
    for rank in range(3):
        end = 0.0
        for event in slices[rank]:
            assert event["ts"] == pytest.approx(end, abs=1e-6)
            end = event["ts"] + event["dur"]
        assert end == pytest.approx(result.duration_ms * 1e3, abs=1e-2)
        waited = sum(event["dur"] for event in slices[rank] if event["name"] == "wait")
        assert waited == pytest.approx(wait_ms(result)[:, rank].sum() * 1e3, abs=1)
    kinds = Counter(event["name"] for event in slices[0])
    assert kinds["prefill"] == (result.prefill_tokens[:, 0] > 0).sum()
    starts, ends = result.step_start_ms, result.step_start_ms + result.step_ms
    assert kinds["no work"] == (starts > np.append(0, ends[:-1] + 1e-9)).sum() > 3
    assert kinds["dummy"] > 0
    assert kinds["prefill"] + kinds["decode"] + kinds["dummy"] == len(result.step_ms)


def test_timeline_has_no_gap_where_sums_of_floats_differ() -> None:
    """The second step starts 2e-13 ms after the first has ended, and half a ns lies between them."""
    whole = _result(count=3)
    result = dataclasses.replace(
        whole,
        duration_ms=2.0000005,
        step_start_ms=np.array([0.0, 1.0000005 + 1e-13]),
        step_ms=np.array([1.0000005 - 1e-13, 1.0]),
        rank_ms=np.zeros((2, 3)),
        step_is_open=whole.step_is_open[:2],
        waiting=whole.waiting[:2],
    )
    slices = _slices(list(timeline_events(1, "run", result, 2)), 1)
    assert [(event["ts"], event["dur"]) for event in slices[0]] == [(0, 1000.001), (1000.001, 1000.0)]


def test_timeline_shows_counts_and_a_shut_gate() -> None:
    result = _result()
    events = list(timeline_events(4, "run", result, 10**9))
    frozen = _slices(events, 4)[3]
    assert {event["name"] for event in frozen} == {"frozen"}
    assert len(frozen) == is_frozen(result).sum() > 0
    counters = [event for event in events if event["ph"] == "C"]
    for name, counts in (("running", result.running), ("waiting", result.waiting)):
        shown = [list(event["args"].values()) for event in counters if event["name"] == name]
        assert shown == counts.tolist()
    steps = [event["args"] for event in _slices(events, 4)[1] if "args" in event]
    assert [step["step"] for step in steps] == list(range(len(result.step_ms)))
    assert [step["decode_requests"] for step in steps] == result.decode_requests[:, 1].tolist()


def test_timeline_ends_after_so_many_steps_and_says_so(tmp_path: Path) -> None:
    file = tmp_path / "timeline.json"
    arguments = ("--policy=open_gate", "--timeline", str(file), "--timeline-steps=7")
    assert _simulate(*FEW, *arguments)[0] == 0
    events = json.loads(file.read_text(encoding="utf-8"))["traceEvents"]
    assert re.fullmatch(r"open_gate, DP 4 \(the first 7 of [\d,]+ steps\)", events[0]["args"]["name"])
    assert sum(event["name"] == "running" for event in events) == 7


# Processes


class _Deadly:
    """Ends the process that unpickles it."""

    def __reduce__(self) -> tuple[Callable[[int], object], tuple[int]]:
        return os._exit, (1,)


def _job(**changes: Any) -> Job:
    config = SchedulerConfig(num_blocks=600, log_stats=False)
    setup = SimulationSetup(dp_size=1, policy="open_gate", cost=DEFAULT_COST, config=config)
    return Job(
        **{"setup": setup, "requests": make_requests(SMALL, count=3), "keeps_result": False, **changes}
    )


def test_a_process_that_dies_is_an_error_that_says_so() -> None:
    jobs = [_job(), _job(requests=_Deadly())]
    with pytest.raises(UnavailableError, match="a process ended before its run did"):
        run_jobs(jobs, 2, lambda count: None)


def test_an_error_in_a_process_is_raised_here() -> None:
    with pytest.raises(ValueError, match="requests is empty; allowed: at least one request"):
        run_jobs([_job(), _job(requests=[])], 2, lambda count: None)


def test_progress_of_processes_is_counted() -> None:
    counts: list[int] = []
    runs = run_jobs([_job(), _job(keeps_result=True)], 2, counts.append)
    assert sum(counts) == 6
    assert [run.result is not None for run in runs] == [False, True]
    assert runs[0].metrics == runs[1].metrics


def test_a_process_stops_when_it_is_told_to(monkeypatch: pytest.MonkeyPatch) -> None:
    context = multiprocessing.get_context("spawn")
    done, is_stopped = context.Value("q", 0), context.Event()
    monkeypatch.setattr(parallel, "_shared", (done, is_stopped))
    assert parallel._run_in_process(_job()).metrics.num_requests == done.value == 3
    is_stopped.set()
    with pytest.raises(InterruptedError):
        parallel._run_in_process(_job())


INTERRUPTED = """
import os, signal, threading, time
from ascend_twin.cli import parallel
from ascend_twin.cli.main import app

def interrupt():
    for _ in range(3):
        os.killpg(os.getpid(), signal.SIGINT)
        time.sleep(0.01)

def polled(*arguments, polled=parallel._polled):
    threading.Thread(target=interrupt).start()
    yield from polled(*arguments)

parallel._polled = polled
app()
"""
"""Three interrupts of the whole process group, as soon as the first process of the pool was started."""


def test_interrupts_end_all_processes_however_many() -> None:
    command = [sys.executable, "-c", INTERRUPTED, "simulate", "conversation", "--requests=2000", "--jobs=2"]
    process = subprocess.run(command, capture_output=True, text=True, start_new_session=True, timeout=120)
    assert process.returncode == 130
    assert process.stderr.strip() == "interrupted after 0 of 4,000 requests"


def test_times_of_a_trace_count_from_its_first_request(tmp_path: Path) -> None:
    files = []
    for start in (0, 1_700_000_000_000):
        trace, result = tmp_path / "trace.jsonl", tmp_path / f"{start}.json"
        lines = [json.loads(line) for line in TRACE.splitlines()]
        for line in lines:
            line["timestamp"] += start
        trace.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
        assert _simulate(str(trace), "--json", str(result))[0] == 0
        files.append(json.loads(result.read_text(encoding="utf-8"))["rows"])
    assert files[0] == files[1]


def test_an_interrupt_says_how_far_it_came(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(jobs: Any, num_processes: int, advance: Callable[[int], object]) -> None:
        advance(1_234)
        raise KeyboardInterrupt

    monkeypatch.setattr("ascend_twin.cli.simulate.run_jobs", interrupted)
    status, output = _simulate("fixed", "--requests=1000")
    assert status == 130
    assert output.endswith("interrupted after 1,234 of 2,000 requests")


# The documentation


@NEEDS_DOCS
def test_the_example_of_the_documentation_is_what_is_printed() -> None:
    text = DOCS.read_text(encoding="utf-8")
    command, _, shown = text.partition("```text\n$ ")[2].partition("```")[0].partition("\n")
    status, output = _simulate(*shlex.split(command)[2:])
    assert status == 0
    assert output.rpartition(" 2 runs in ")[0] == " ".join(shown.split())


@NEEDS_DOCS
def test_numbers_of_the_documentation_are_those_of_the_code() -> None:
    text = DOCS.read_text(encoding="utf-8")
    for name, workload in WORKLOADS.items():
        row = re.search(rf"^\| `{name}` \|.*", text, re.MULTILINE)
        assert row, name
        told = {
            key: float(x.replace(",", "")) for key, x in re.findall(r"`(\w+)` = ([\d.,]*\d)", row.group())
        }
        assert told == workload.parameters, name
    costs = re.findall(r"^\| `(\w+)` \| ([\d.]+) \|", text, re.MULTILINE)
    assert {name: float(x) for name, x in costs} == {name: getattr(DEFAULT_COST, name) for name in PARAMETERS}


@NEEDS_DOCS
def test_the_code_of_the_documentation_runs(capsys: pytest.CaptureFixture[str]) -> None:
    exec(DOCS.read_text(encoding="utf-8").partition("```python\n")[2].partition("```")[0], {})
    assert re.fullmatch(r"\d+ tok/s, TTFT \d+ ms\n", capsys.readouterr().out)


# What is refused


def _never(*arguments: Any, **options: Any) -> None:
    raise AssertionError("it ran")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ("nowhere.jsonl",),
            "TRACE_OR_WORKLOAD is 'nowhere.jsonl'; allowed: a file, which it is not, or one of f",
        ),
        ((".",), "TRACE_OR_WORKLOAD is '.'; allowed: a file, which it is not, or one of fixed, lognormal"),
        (("fixed:size=1",), "TRACE_OR_WORKLOAD: workload is 'fixed:size=1'; allowed: fixed with prompt"),
        (("fixed:prompt=0",), "TRACE_OR_WORKLOAD: prompt is 0; allowed: an int from 1 to 131072"),
        (("trace.jsonl", "--seed=3"), "--seed is 3; allowed: 0 with a trace, unless --routing is skewed"),
        (("trace.jsonl", "--seeds=3"), "--seeds is 3; allowed: 1 with a trace, unless --routing is skewed"),
        (("broken.jsonl",), "TRACE_OR_WORKLOAD: broken.jsonl:1: not JSON"),
        (("hashes.jsonl",), "hashes.jsonl: requests[1].hash_ids is (0,); allowed: 2 ids"),
        (
            ("fixed", "--policy=never"),
            "--policy: policy is 'never'; allowed: one of open_gate, any_rank_at_cap",
        ),
        (("fixed", "--policy=cadence:interval=0"), "--policy: interval is 0; allowed: an int >= 1"),
        (
            ("fixed", "--max-num-seqs=1", "--policy=any_rank_near_cap"),
            "--policy: max_num_running_reqs is 1; allowed: >= 2",
        ),
        (
            ("fixed", "--policy=open_gate", "--policy=open_gate"),
            "--policy is open_gate, open_gate; allowed: each o",
        ),
        (("fixed", "--dp=2", "--dp=2"), "--dp is 2, 2; allowed: each once"),
        (("fixed", "--routing=random"), "--routing is random; allowed: round_robin, least_loaded, skewed"),
        (
            ("fixed", "--num-blocks=20"),
            "--num-blocks is 20; allowed: >= 21: the longest request has 2500 tokens",
        ),
        (("fixed", "--cost=nowhere.json"), "--cost: nowhere.json: No such file"),
        (("fixed", "--cost=trace.jsonl"), "--cost: trace.jsonl: "),
        (("fixed", "--timeline-steps=9"), "--timeline-steps is 9; allowed: only together with --timeline"),
        (
            ("fixed", "--json=/no/such/folder/x"),
            "--json is /no/such/folder/x; allowed: a file that can be written",
        ),
        (("fixed", "--html=report.pdf"), "--html is report.pdf; allowed: a file that ends in .html, .htm"),
        (("fixed", "--timeline=trace.gz"), "--timeline is trace.gz; allowed: a file that ends in .json"),
        (
            ("fixed", "--json=x.json", "--timeline=./x.json"),
            "--timeline is x.json; allowed: another file than t",
        ),
        (
            ("trace.jsonl", "--json=./trace.jsonl"),
            "--json is trace.jsonl; allowed: another file than that of TRACE_OR_WORKLOAD",
        ),
        (
            ("fixed", "--cost=trace.jsonl", "--html=x.html", "--json=trace.jsonl"),
            "--json is trace.jsonl; allowed: another file than that of --cost",
        ),
    ],
)
def test_wrong_input_is_refused_in_one_line_before_anything_runs(
    arguments: tuple[str, ...], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ascend_twin.cli.simulate.run_jobs", _never)
    monkeypatch.chdir(tmp_path)
    Path("trace.jsonl").write_text(TRACE, encoding="utf-8")
    Path("broken.jsonl").write_text("{", encoding="utf-8")
    Path("hashes.jsonl").write_text(TRACE.replace("[0, 2]", "[0]"), encoding="utf-8")
    status, output = _simulate(*arguments)
    assert status == 2
    assert output.startswith(f"error: {message}")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["broken.jsonl", "hashes.jsonl", "trace.jsonl"]


def test_a_cost_model_of_zeros_is_refused_in_one_line(tmp_path: Path) -> None:
    cost = tmp_path / "cost.json"
    cost.write_text('{"step_ms": 0}', encoding="utf-8")
    status, output = _simulate("fixed", "--requests=1", "--concurrency=1", "--cost", str(cost))
    assert status == 2
    assert "allowed: a cost model by which steps take time" in output
