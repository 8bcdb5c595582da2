"""The pages: what can be typed is accepted, code runs and prints what the page says, names exist."""

import io
import re
import shlex
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from ascend_twin.cli.bench import contests_on
from ascend_twin.cli.main import app
from ascend_twin.equivalence_tests.documented_commands import lines_of_page, stopped_before_the_work
from ascend_twin.equivalence_tests.scheduler_invariants import INVARIANTS
from ascend_twin.optimized.gdn import IMPLEMENTATIONS, open_device
from ascend_twin.scheduler.admission import POLICIES

ROOT = Path(__file__).parents[1]
PAGES = sorted(
    path.relative_to(ROOT).as_posix() for at in ("", "docs/", "fixtures/") for path in ROOT.glob(f"{at}*.md")
)
COMMANDS = vars(typer.main.get_command(app))["commands"]
TYPED = [(page, line) for page in PAGES for line in lines_of_page((ROOT / page).read_text(encoding="utf-8"))]

RUN_ELSEWHERE = {
    "docs/balance.md",
    "docs/compiler_differences.md",
    "docs/cost.md",
    "docs/linalg.md",
    "docs/simulation.md",
}
"""Pages whose code is run by the tests of what they are about."""

OF_VLLM = {"docs/scheduler.md"}
"""Pages that name files of vLLM beside ours."""

ROOMS = ("reference", "optimized", "scheduler", "equivalence_tests", "fixtures", "cli", "docs")

pytestmark = pytest.mark.skipif(not (ROOT / "docs").is_dir(), reason="the docs are in the repository alone")


@pytest.fixture(autouse=True)
def _on_a_cpu(request: pytest.FixtureRequest) -> None:
    if request.config.getoption("--device") != "cpu":
        pytest.skip("pages speak of CPUs, where kernels are interpreted in this process")


def text_of(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def run(line: str, status: int = 0) -> None:
    result = CliRunner().invoke(app, shlex.split(line)[1:])
    assert result.exit_code == status, result.output


def environments() -> set[str]:
    """The names that tox.ini has sections for."""
    found = re.findall(r"^\[testenv:(.*)\]", text_of("tox.ini"), re.MULTILINE)
    choices = [re.fullmatch(r"([^{]*)\{(.*)\}", name) or re.fullmatch(r"()(.*)", name) for name in found]
    return {choice[1] + part for choice in choices if choice for part in choice[2].split(",")}


@pytest.mark.parametrize(("page", "line"), [pair for pair in TYPED if pair[1].startswith("ascend-twin")])
def test_command_of_a_page_is_accepted(page: str, line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    stopped_before_the_work(monkeypatch)
    run(line)


@pytest.mark.parametrize("page", PAGES)
def test_options_and_environments_that_a_page_names_exist(page: str) -> None:
    for command, rest in re.findall(r"`(?:\S*/)?ascend-twin ([a-z]+)\b([^`]*)`", text_of(page)):
        assert command in COMMANDS, command
        known = {option for parameter in COMMANDS[command].params for option in parameter.opts} | {"--help"}
        assert set(re.findall(r"--[a-z][a-z-]*", rest)) <= known, f"ascend-twin {command}{rest}"
    named = re.findall(r"\btox run (?:-q )?-e ([a-z0-9,-]*[a-z0-9])", text_of(page))
    assert {env for names in named for env in names.split(",")} <= environments()


def test_benchmarks_that_a_page_names_exist() -> None:
    names = [contest.name for contest in contests_on(open_device("cpu"))]
    for page in PAGES:
        for only in re.findall(r'`ascend-twin bench --only "([^"]*)"`', text_of(page)):
            assert any(only in name for name in names), only


@pytest.mark.parametrize("page", [page for page in PAGES if page.startswith("docs/") and page not in OF_VLLM])
def test_files_and_tests_that_a_page_names_exist(page: str) -> None:
    files = [path for room in ROOMS for path in ROOT.glob(f"{room}/**/*.py")]
    tests = [
        name
        for path in files
        if path.name.startswith("test_")
        for name in re.findall(r"^def (test_\w+)", path.read_text(encoding="utf-8"), re.MULTILINE)
    ]
    for word in re.findall(r"`([a-z0-9_/.]+)`", text_of(page)):
        if word.endswith(".py") and ("/" not in word or word.startswith(ROOMS)):
            assert any(path.as_posix().endswith(f"/{word}") for path in files), word
        elif word.startswith("test_") and "." not in word:
            assert word in tests, word


@pytest.mark.parametrize("line", [line for page, line in TYPED if page == "docs/start.md"])
def test_start_runs(
    line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "fixtures").symlink_to(ROOT / "fixtures")
    if "fused" in line:
        request.getfixturevalue("triton_runs")
    # The recorded case is one that went wrong.
    run(f"{line} --jobs 1" if " simulate " in line else line, status=int(" replay " in line))


def test_properties_name_every_invariant_of_the_scheduler() -> None:
    text = text_of("docs/properties.md")
    assert [invariant.__name__ for invariant in INVARIANTS if f"`{invariant.__name__}`" not in text] == []


@pytest.mark.parametrize(
    "page", [page for page in PAGES if "```python" in text_of(page) and page not in RUN_ELSEWHERE]
)
def test_code_of_a_page_runs_and_prints_what_it_says(
    page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, triton_runs: None
) -> None:
    monkeypatch.chdir(tmp_path)
    recorded = ROOT / "fixtures/cases/gdn/asc-11508_state_counted_twice_wrong.safetensors"
    (tmp_path / "gate.safetensors").symlink_to(recorded)  # a name that pages have for a recording
    for registry in (IMPLEMENTATIONS, POLICIES):  # pages register names of their own
        for name, value in registry.items():
            monkeypatch.setitem(registry, name, value)
    namespace: dict[str, Any] = {"__name__": "a page"}
    blocks = re.findall(r"```python\n(.*?)```(?:\s*```text\n(.*?)```)?", text_of(page), re.DOTALL)
    for code, printed in blocks:
        with redirect_stdout(io.StringIO()) as output:
            exec(compile(code, page, "exec"), namespace)
        if printed:
            assert _rounded(output.getvalue()) == _rounded(printed)


def _rounded(text: str) -> str:
    """With numbers in powers of ten by their power alone: the rest depends on the machine."""
    return re.sub(r"\d\.\d+(e[+-]\d+)", r"\1", text)
