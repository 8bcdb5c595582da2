"""The driver of mutation testing: what it calls a survivor, and what it refuses to judge."""

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from ascend_twin.equivalence_tests import mutation_testing
from ascend_twin.equivalence_tests.mutation_testing import LEAST_SCORE, ROOT, SUITES, Mutant, mutants_of
from ascend_twin.equivalence_tests.surviving_mutants import EXPLAINED, Explained

SOURCE = "def add(a, b):\n    return a + b\n"
TESTS = {
    "good": "import adder\n\ndef test_add():\n    assert adder.add(2, 3) == 5\n",
    "failing": "import adder\n\ndef test_add():\n    assert adder.add(2, 3) == 6\n",
    "broken": "import adder, no_such_module\n\ndef test_add():\n    assert adder.add(2, 3) == 5\n",
    "empty": "",
    "skipped": "import pytest\n\ndef test_add():\n    pytest.skip()\n",
}
MUTANTS = {
    "another result": "def add(a, b):\n    return a - b\n",
    "an error": "def add(a, b):\n    return a + None\n",
    "an error at import": "def add(a, b=None + 1):\n    return a + b\n",
    "the end of the process": "import os\n\n\ndef add(a, b):\n    os._exit(0)\n",
    "no end": "def add(a, b):\n    while True:\n        pass\n",
    "the same result": "def add(a, b):\n    return b + a\n",
}
# In a process of its own: it is forked for each mutant, and pytest runs there.
SCRIPT = """
import json, sys
from pathlib import Path
from ascend_twin.equivalence_tests.mutation_testing import Mutant, MutationTestingError, judge, survivors

path, tests, sources = Path("adder.py"), *json.loads(sys.argv[1])
said = {name: judge("adder", path, source, ["test_good.py"], most_seconds=1).by for name, source in sources}
mutants = [Mutant(2, "", name, source) for name, source in sources if "result" in name]
survived = [mutant.now for mutant in survivors("adder", path, mutants, ["test_good.py"])]
refused = {}
for name in tests:
    try:
        refused[name] = list(survivors("adder", path, [], [f"test_{name}.py"]))
    except MutationTestingError as error:
        refused[name] = str(error)
print(json.dumps([said, survived, refused]))
"""


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What killed each of MUTANTS, which survive, and how each of TESTS is refused."""
    folder = tmp_path_factory.mktemp("adder")
    (folder / "adder.py").write_text(SOURCE)
    for name, text in TESTS.items():
        (folder / f"test_{name}.py").write_text(text)
    command = [sys.executable, "-c", SCRIPT, json.dumps([list(TESTS), list(MUTANTS.items())])]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert (folder / "adder.py").read_text() == SOURCE
    return json.loads(done.stdout)


def test_survivors_are_the_mutants_that_no_test_finds(results: Any) -> None:
    said, survived, _ = results
    assert survived == ["the same result"]
    assert said == {
        "another result": "test_good.py::test_add",
        "an error": "test_good.py::test_add",
        "an error at import": "test_good.py",
        "the end of the process": "no answer",
        "no end": "timeout",
        "the same result": "",
    }


def test_tests_that_do_not_pass_without_a_change_judge_no_mutant(results: Any) -> None:
    refused = results[2]
    assert refused.pop("good") == []
    for name, failure in {
        "failing": "test_failing.py::test_add\n",
        "broken": "test_broken.py\n",
        "empty": "pytest: <ExitCode.NO_TESTS_COLLECTED: 5>\n",
        "skipped": "that no test ran\n",
    }.items():
        said = refused.pop(name)
        assert said.startswith(f"adder.py: without any change, the first failure is {failure}")
        assert "test session starts" in said
    assert not refused


def test_mutants_are_of_all_that_runs_and_of_no_annotation() -> None:
    pytest.importorskip("mutmut", reason="mutmut is in the mutation env alone")
    source = (
        "LIMIT: int | None = 3\n"
        "class Box:\n"
        "    size: int = 4\n"
        "    @property\n"
        "    def area(self) -> int | None:\n"
        "        return self.size * isinstance(self, Box)\n"
    )
    mutants = mutants_of(source)
    assert {mutant.now for mutant in mutants} == {
        "LIMIT: int | None = 4",
        "LIMIT: int | None = None",
        "size: int = 5",
        "size: int = None",
        "return self.size / isinstance(self, Box)",
    }
    for mutant in mutants:
        assert source.replace(mutant.was, mutant.now) == mutant.source
        assert source.splitlines()[mutant.line - 1].strip() == mutant.was


def test_explanations_are_of_lines_that_there_are() -> None:
    assert set(EXPLAINED) <= set(SUITES)
    for module, explained in EXPLAINED.items():
        lines = " ".join(map(str.strip, (ROOT / module).read_text(encoding="utf-8").splitlines()))
        for each in explained:
            assert each.was in lines
            assert each.was != each.now
        assert len({(each.was, each.now) for each in explained}) == len(explained)


@pytest.mark.parametrize(
    ("num_killed", "survived", "explained", "status"),
    [
        (40, [], [], 0),
        (39, ["a"], ["a"], 0),
        (39, ["a"], [], 1),
        (39, [], ["a"], 1),
        (38, ["a", "b"], ["a"], 1),
        (38, ["a", "b"], ["a", "b"], 0),
        (37, ["a", "b", "c"], ["a", "b", "c"], 1),  # too many, whatever the reasons
    ],
)
def test_status_is_good_when_enough_are_killed_and_all_others_explained(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    num_killed: int,
    survived: Sequence[str],
    explained: Sequence[str],
    status: int,
) -> None:
    alive = [Mutant(7, f"was {name}", f"now {name}", name) for name in survived]
    module = "scheduler/balance.py"
    reasons = {module: tuple(Explained(f"was {name}", f"now {name}", "it is the same") for name in explained)}
    killed = [Mutant(1, "", "", "")] * num_killed
    monkeypatch.setattr(mutation_testing, "mutants_of", lambda source: [*killed, *alive])
    monkeypatch.setattr(mutation_testing, "survivors", lambda *arguments: alive)
    monkeypatch.setattr(mutation_testing, "EXPLAINED", reasons)
    assert LEAST_SCORE == 0.95
    assert mutation_testing.main([module]) == status
    said = capsys.readouterr().out
    assert f"\n{module}: {num_killed + len(alive)} mutants, {num_killed} killed, " in f"\n{said}"
    for name in "abc":
        assert (f"{module}:7 survived\n  - was {name}\n" in said) == (
            name in survived and name not in explained
        )
        assert ("explained, but no survivor\n" in said) == bool(set(explained) - set(survived))


def test_known_mutants_are_kept_in_a_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen: list[dict[str, str]] = []

    def survivors(*arguments: Any) -> list[Mutant]:
        known = arguments[-1]
        seen.append(dict(known))
        known[f"mutant {len(known)}"] = "test"
        return []

    monkeypatch.setattr(mutation_testing, "mutants_of", lambda source: [Mutant(1, "", "", "")])
    monkeypatch.setattr(mutation_testing, "survivors", survivors)
    monkeypatch.setattr(mutation_testing, "EXPLAINED", {})
    for _ in range(2):
        mutation_testing.main(["scheduler/balance.py", "--known", str(tmp_path / "known.json")])
    assert seen == [{}, {"mutant 0": "test"}]


def test_main_refuses_a_module_without_a_suite(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        mutation_testing.main(["scheduler/cost.py"])
    assert "MODULE is scheduler/cost.py; allowed: optimized/gdn/metadata.py " in capsys.readouterr().err
