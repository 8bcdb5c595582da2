"""The workflows of CI: what they name exists, and what they upload is written."""

import configparser
import itertools
import re
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command

from ascend_twin.cli.main import app

yaml = pytest.importorskip("yaml", reason="PyYAML is not installed; workflows were not read")

ROOT = Path(__file__).parents[1]
WORKFLOWS = sorted((ROOT / ".github/workflows").glob("*.yml"))
pytestmark = pytest.mark.skipif(not WORKFLOWS, reason="the workflows are in the repository alone")


def _load(name: str) -> dict[Any, Any]:
    return yaml.safe_load((ROOT / f".github/workflows/{name}.yml").read_text(encoding="utf-8"))


def _environments() -> set[str]:
    """Names of the environments in tox.ini: `testenv:py{310,311}` is two."""
    tox = configparser.ConfigParser(interpolation=None)
    tox.read(ROOT / "tox.ini", encoding="utf-8")
    names = set()
    for section in tox.sections():
        if section.startswith("testenv:"):
            parts = re.split(r"\{(.*?)\}", section.removeprefix("testenv:"))
            choices = [part.split(",") if i % 2 else [part] for i, part in enumerate(parts)]
            names |= {"".join(choice) for choice in itertools.product(*choices)}
    return names


def _steps(workflow: dict[Any, Any]) -> list[dict[str, Any]]:
    return [step for job in workflow["jobs"].values() for step in job["steps"]]


def test_workflows_name_environments_that_exist() -> None:
    matrix = _load("cpu")["jobs"]["tox"]["strategy"]["matrix"]["include"]
    named = [job["env"] for job in matrix]
    commands = "\n".join(step.get("run", "") for name in ("cpu", "npu") for step in _steps(_load(name)))
    named += [env for env in re.findall(r"tox run -e (\S+)", commands) if not env.startswith("$")]
    assert len(named) > 9
    assert set(named) <= _environments()


def test_cpu_workflow_runs_all_that_a_commit_must_pass() -> None:
    tox = configparser.ConfigParser(interpolation=None)
    tox.read(ROOT / "tox.ini", encoding="utf-8")
    needed = {env.strip() for env in tox["tox"]["env_list"].split(",")} - {"npu", "cuda"}
    jobs = {job["env"]: job for job in _load("cpu")["jobs"]["tox"]["strategy"]["matrix"]["include"]}
    assert needed <= set(jobs)
    for env, job in jobs.items():
        if match := re.fullmatch(r"py3(\d+)", env):
            assert job["python"] == f"3.{match[1]}"


def test_cpu_workflow_writes_reports_with_options_that_exist() -> None:
    jobs = {
        job["env"]: job["options"] for job in _load("cpu")["jobs"]["tox"]["strategy"]["matrix"]["include"]
    }
    commands: Any = get_command(app)
    for env, command in (("verify", "verify"), ("ascend", "compile")):
        known = {name for option in commands.commands[command].params for name in option.opts}
        given = re.findall(r"(--\w+)=\$REPORTS/", jobs.pop(env))
        assert given == ["--html", "--junit"]
        assert set(given) <= known
    jobs.pop("lint")
    for env, options in jobs.items():
        assert options == f"--junitxml=$REPORTS/{env}.xml"


def test_cpu_workflow_runs_sanitized_kernels_each_night_and_nothing_else_then() -> None:
    workflow = _load("cpu")
    assert workflow[True]["schedule"]  # YAML 1.1 reads `on` so
    night = workflow["jobs"]["sanitize"]
    assert workflow["jobs"]["tox"]["if"] == "github.event_name != 'schedule'"
    assert "github.event_name == 'schedule'" in night["if"]
    assert night["strategy"]["matrix"]["runner"] == ["ubuntu-24.04", "ubuntu-24.04-arm"]
    commands = [step.get("run", "") for step in night["steps"]]
    assert "tox run -e sanitize -- --require --junitxml=$REPORTS/sanitize.xml" in commands


def test_npu_workflow_requires_an_npu_each_night_and_on_demand() -> None:
    workflow = _load("npu")
    triggers = workflow[True]  # YAML 1.1 reads `on` so
    assert set(triggers) == {"schedule", "workflow_dispatch"}
    (job,) = workflow["jobs"].values()
    default = triggers["workflow_dispatch"]["inputs"]["image"]["default"]
    assert default.startswith("quay.io/ascend/vllm-ascend:v")
    assert default in job["container"]["image"]
    assert "self-hosted" in job["runs-on"]
    assert "/dev/davinci0" in job["container"]["options"]
    assert any("tox run -e npu -- --require" in step.get("run", "") for step in job["steps"])


@pytest.mark.parametrize("name", ["cpu", "npu"])
def test_workflow_reads_only_and_uploads_reports_whatever_happened(name: str) -> None:
    workflow = _load(name)
    assert workflow["permissions"] == {"contents": "read"}
    last = _steps(workflow)[-1]
    assert last["if"] == "always()"
    assert last["with"]["path"] == "reports"
    for step in _steps(workflow):
        assert "uses" not in step or re.fullmatch(r"actions/[\w-]+@v\d+", step["uses"])
