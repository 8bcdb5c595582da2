"""Files of fixtures/cases: each can be made again, replays as it must, and fails with its bug put back."""

import functools
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
import torch

from ascend_twin.equivalence_tests import (
    recorded_cases,
    recorded_gdn_cases,
    recorded_metadata_cases,
    recorded_trace_cases,
    replay_gdn,
)
from ascend_twin.equivalence_tests.known_bugs import BUGS, PARTS, Bug
from ascend_twin.equivalence_tests.mutants import museum
from ascend_twin.equivalence_tests.recorded_cases import (
    CASES,
    MAX_BYTES_OF_ALL,
    MAX_BYTES_OF_ONE,
    bug_of,
    cases_of,
    docs,
    make,
    write_cases,
)
from ascend_twin.equivalence_tests.replay import replay_fixture
from ascend_twin.equivalence_tests.scheduler_engines import OurEngine
from ascend_twin.equivalence_tests.source_mutants import mutated
from ascend_twin.fixtures.store import Fixture, read_fixture, write_fixture
from ascend_twin.optimized.gdn import (
    IMPLEMENTATIONS,
    ChunkMetadata,
    ChunkMetadataBuilder,
    StagingRing,
    metadata,
)
from ascend_twin.reference.errors import AscendTwinError, UnavailableError

SUITES = Path(str(resources.files("ascend_twin.equivalence_tests")))
FILES = Path(str(resources.files("ascend_twin.fixtures") / "cases"))
DOCS = Path(__file__).parents[1] / "docs/bugs.md"
FOLDERS = "gdn", "metadata", "traces"

RIGHT = [path for path, case in CASES.items() if case.wrong is None]
WRONG = [path for path, case in CASES.items() if case.wrong is not None]

SMALL_CALLS = "flashinfer-2490_decay_is_linear", "asc-6822_padding_of_a_graph", "fla-537_identical_keys"
"""Calls that the interpreter of Triton is fast enough for."""

BLAMES = {"compact": "metadata", "dropped": "state", "gate": "arithmetic", "transposed": "state"}
"""Of recordings of vLLM that went wrong."""

NUMBERS = (
    *("asc#11807", "asc#11508", "asc#6822", "asc#8396", "asc#7506", "asc#10901", "asc#10619", "asc#10580"),
    *("asc#11072", "asc#11161", "asc#10276", "asc#10553", "asc#12079", "asc#12630", "asc#16428", "asc#5281"),
    *("asc#8279", "asc#10559", "asc#10537", "asc#11310", "asc#7611", "asc#8675", "asc#7479", "asc#13275"),
    *("asc#8975", "asc#15802", "asc#14233", "asc#11334", "asc#9749", "asc#11544", "asc#10746", "asc#16315"),
    *("asc#7756", "fla#909", "fla#792", "fla#794", "fla#463", "fla#1070", "fla#1113", "fla#537"),
    *("flashinfer#2490", "flashinfer#4481", "sgl-kernel-npu#640", "sglang#40419", "sglang#40362"),
    *("vllm#39064", "vllm#34871", "vllm#36013", "vllm#45074", "vllm#57104", "vllm#29387", "vllm#48245"),
    *("vllm#57562", "vllm#34616", "vllm#30320", "vllm#49439", "vllm#43547", "vllm#28224", "vllm#45223"),
    *("vllm#52957", "vllm#39366", "vllm#38009"),
)
"""What must be shown, or have a reason why it is not."""

each_bug = pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.name)


def in_file(path: str) -> Fixture:
    return read_fixture(FILES / path)


# The files


def test_files_are_those_of_the_catalogue() -> None:
    found = {f"{folder}/{file.name}" for folder in FOLDERS for file in (FILES / folder).iterdir()}
    assert found == set(CASES)


def test_files_are_small() -> None:
    sizes = {path: (FILES / path).stat().st_size for path in CASES}
    assert max(sizes.values()) <= MAX_BYTES_OF_ONE, max(sizes, key=lambda path: sizes[path])
    assert sum(sizes.values()) <= MAX_BYTES_OF_ALL


@pytest.mark.parametrize("path", CASES)
def test_file_is_made_again(path: str, tmp_path: Path) -> None:
    """Bit for bit; floats but for their last bits, which depend on the libraries of the CPU."""
    again = tmp_path / Path(path).name
    write_fixture(again, make(CASES[path]))
    if not path.startswith("gdn/"):
        assert again.read_bytes() == (FILES / path).read_bytes()
        return
    found, made = in_file(path), read_fixture(again)
    assert replace(found, tensors={}) == replace(made, tensors={})
    assert found.tensors.keys() == made.tensors.keys()
    for name, x in made.tensors.items():
        rtol = 4 * torch.finfo(x.dtype).eps if x.is_floating_point() else 0
        torch.testing.assert_close(found.tensors[name], x, rtol=rtol, atol=1e-30, equal_nan=True)


@pytest.mark.parametrize("path", CASES)
def test_header_tells_people_what_it_is(path: str) -> None:
    about = in_file(path).about
    bug = bug_of(CASES[path])
    assert about.notes == bug.paragraph
    assert about.upstream == bug.upstream
    assert about.title
    assert "\n" not in about.title
    assert not about.title.endswith(".")


def test_write_cases_writes_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    few = [path for path in CASES if path.startswith("metadata/fla-909")]
    monkeypatch.setattr(recorded_cases, "CASES", {path: CASES[path] for path in few})
    write_cases(tmp_path)
    assert sorted(f"metadata/{file.name}" for file in (tmp_path / "metadata").iterdir()) == sorted(few)


# The replays


@pytest.mark.parametrize("path", RIGHT)
def test_right_case_passes(path: str) -> None:
    fixture = in_file(path)
    implementation = "eager" if fixture.has_tensors else None
    for replay in {
        name: replay_fixture(fixture, path=path, implementation=name) for name in (None, implementation)
    }.values():
        assert replay.findings
        assert replay.passed, str(replay.first)


@pytest.mark.parametrize("name", SMALL_CALLS)
def test_right_case_passes_on_each_implementation(
    request: pytest.FixtureRequest, implementation: str, name: str
) -> None:
    device = str(request.config.getoption("--device"))
    fixture = in_file(f"gdn/{name}.safetensors")
    replay = replay_fixture(fixture, device=device, implementation=implementation)
    assert replay.passed, str(replay.first)


@pytest.mark.parametrize("path", [path for path in RIGHT if path.startswith("metadata/")])
def test_build_passes_where_copies_are_late(path: str) -> None:
    replay = replay_fixture(in_file(path), device="sim", implementation="eager")
    assert replay.passed, str(replay.first)


@pytest.mark.parametrize("name", sorted({name for bug in BUGS for name in bug.scenarios}))
def test_scenario_shows_a_known_mistake_of_vllm(name: str) -> None:
    replay = replay_fixture(in_file(f"scheduler/{name}.json"))
    assert replay.passed, str(replay.first)
    assert replay.details["excused"]


@pytest.mark.parametrize("path", WRONG)
def test_wrong_recording_is_found_and_its_place_is_named(path: str) -> None:
    replay, expected = replay_fixture(in_file(path), path=path), CASES[path].wrong
    first = replay.first
    assert expected is not None
    assert first is not None
    assert (first.stage, replay.blame) == (expected.stage, expected.blame)
    assert first.place.items() >= expected.place.items()
    assert replay.diagnosis


@pytest.mark.parametrize("path", [path for path in WRONG if path.endswith(".safetensors")])
def test_wrong_recording_passes_when_it_is_run_again(path: str) -> None:
    """What went wrong is what was recorded, and not what it was made of."""
    replay = replay_fixture(in_file(path), path=path, implementation="eager")
    assert replay.passed, str(replay.first)


# Recordings of real runs of vLLM, with the plugin and a core that is right or wrong


@pytest.mark.parametrize("path", sorted((FILES / "vllm").iterdir()), ids=lambda path: path.name)
def test_recording_of_vllm_is_told_right_from_wrong(path: Path) -> None:
    fixture = read_fixture(path)
    try:
        replay = replay_fixture(fixture, path=path.name)
    except UnavailableError as error:
        pytest.skip(str(error))
    assert replay.findings
    assert replay.blame == BLAMES.get(path.stem, "")
    if fixture.has_tensors:
        assert replay_fixture(fixture, path=path.name, implementation="eager").passed


# Each can fail: where the bug is put back, a case that passes without it does not


@pytest.mark.parametrize("call", recorded_gdn_cases.CALLS, ids=lambda call: call.name)
def test_call_fails_with_its_bug(call: recorded_gdn_cases.Call, monkeypatch: pytest.MonkeyPatch) -> None:
    eager = IMPLEMENTATIONS["eager"]
    with_bug = replace(eager, run=functools.partial(call.fault, eager.run))
    monkeypatch.setitem(IMPLEMENTATIONS, "eager", with_bug)
    assert not replay_fixture(in_file(call.right_case.path), implementation="eager").passed


METADATA_BUGS = {
    "fla-909_compact_ranks": "compact_ranks",
    "fla-909_compact_ranks_after_one": "compact_ranks",
    "fla-909_compact_ranks_first_two": "compact_ranks",
    "fla-909_compact_ranks_last_but_one": "compact_ranks",
    "asc-6822_padding_of_a_graph": "padded_query_start_loc",
    "asc-7506_sentinels_behind_the_batch": "padded_query_start_loc",
    "asc-11161_bounds_padded_to_tokens": "padded_query_start_loc",
    "asc-10619_more_sequences_than_the_graph": "tables_sized_for_full_chunks",
    "vllm-34871_one_token_beside_drafts": "chunk_of_one_token_is_a_decode",
    "tile_constants_of_another_size_128": "block_size_written_twice",
}
"""A case, and the bug of the museum that it shows."""


@pytest.mark.parametrize(("case", "bug"), METADATA_BUGS.items())
def test_build_fails_with_its_bug(case: str, bug: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (found,) = (x for x in museum.BUGS if x.name == bug)
    modules = {"metadata": "ascend_twin.optimized.gdn.metadata"}
    copies = mutated(replace(found, module="metadata"), modules)
    monkeypatch.setattr(replay_gdn, "ChunkMetadataBuilder", copies["metadata"].ChunkMetadataBuilder)
    fixture = in_file(f"metadata/{case}.safetensors")
    try:
        passed = replay_fixture(fixture, implementation="eager").passed
    except (AscendTwinError, AssertionError):
        passed = False
    assert not passed


def test_build_fails_where_a_table_without_rows_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    build = ChunkMetadataBuilder.build

    def with_none(*args: Any, **options: Any) -> ChunkMetadata:
        built: Any = build(*args, **options)
        return replace(
            built, chunk_indices_chunk64=built.chunk_indices_chunk64 if len(built.cu_seqlens) > 1 else None
        )

    monkeypatch.setattr(ChunkMetadataBuilder, "build", with_none)
    fixture = in_file("metadata/asc-11072_step_without_requests.safetensors")
    assert not replay_fixture(fixture, implementation="eager").passed


def test_build_fails_where_nobody_keeps_what_is_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metadata, "StagingRing", recorded_metadata_cases.CopiesATemporary)
    fixture = in_file("metadata/vllm-45074_source_freed_before_the_copy.safetensors")
    assert not replay_fixture(fixture, device="sim", implementation="eager").passed


@pytest.mark.parametrize("number", range(len(recorded_metadata_cases.STEPS)))
def test_ring_brings_each_build_its_own_tables(number: int) -> None:
    """So that what the wrong recording of asc#12079 holds comes from its ring alone."""
    found = recorded_metadata_cases.tables_on_the_device(StagingRing, number)
    for name, x in recorded_metadata_cases.tables(recorded_metadata_cases.STEPS[number]).items():
        assert torch.equal(found[name], x), name


@pytest.mark.parametrize("life", recorded_trace_cases.LIVES, ids=lambda life: life.name)
def test_trace_fails_with_its_bug(life: recorded_trace_cases.Life, monkeypatch: pytest.MonkeyPatch) -> None:
    copies = recorded_trace_cases.scheduler_with(life.bug)
    schedulers = copies["upstream"].UpstreamScheduler, copies["upstream"].AsyncUpstreamScheduler
    make_request = OurEngine.make_request

    def with_copied_class(*args: Any) -> Any:
        request: Any = make_request(*args)
        request.__class__ = copies["request"].Request
        return request

    monkeypatch.setattr(OurEngine, "schedulers", schedulers)
    monkeypatch.setattr(OurEngine, "make_request", with_copied_class)
    replay = replay_fixture(in_file(f"traces/{life.name}.jsonl"))
    assert replay.blame == "scheduler"


# The catalogue


@each_bug
def test_bug_says_all_four(bug: Bug) -> None:
    assert bug.part in PARTS
    for part in (bug.symptom, bug.trigger, bug.cause, bug.caught_by):
        assert part.endswith(".")
        assert part in bug.paragraph


@each_bug
def test_bug_has_files_or_a_reason(bug: Bug) -> None:
    assert bool(cases_of(bug) or bug.scenarios) != bool(bug.no_file)
    for name in bug.scenarios:
        assert (FILES / f"scheduler/{name}.json").is_file()


@each_bug
def test_tests_that_are_named_exist(bug: Bug) -> None:
    assert bug.tests
    for test in bug.tests:
        file, _, name = test.partition("::")
        assert f"def {name}(" in (SUITES / file).read_text(encoding="utf-8"), test


def test_every_number_is_covered() -> None:
    assert {number for bug in BUGS for number in bug.upstream} == set(NUMBERS)
    assert len(NUMBERS) == len(set(NUMBERS))


def test_names_tell_bugs_apart() -> None:
    names = [bug.name for bug in BUGS]
    assert not [(a, b) for a in names for b in names if a != b and a.startswith(b)]


@pytest.mark.skipif(not DOCS.exists(), reason="the docs are in the repository alone")
def test_docs_are_those_of_the_catalogue() -> None:
    assert DOCS.read_text(encoding="utf-8") == docs(), (
        "python -m ascend_twin.equivalence_tests.recorded_cases --docs > docs/bugs.md"
    )
