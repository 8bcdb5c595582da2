import json
import os
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ascend_twin.equivalence_tests.cases import PrefillCase
from ascend_twin.fixtures import store
from ascend_twin.fixtures.store import About, Fixture, TraceWriter, read_fixture, write_fixture
from ascend_twin.reference.errors import FixtureError, InvalidArgumentError

KEYS = st.text("abc", min_size=1, max_size=3)
TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
NUMBERS = st.integers(-(2**63), 2**63) | st.floats(allow_nan=False, allow_infinity=False)
JSON = st.recursive(
    st.none() | st.booleans() | NUMBERS | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3),
    max_leaves=8,
)
OBJECTS = st.dictionaries(KEYS, JSON, max_size=3)
ABOUTS = st.builds(About, TEXTS, TEXTS, st.lists(TEXTS, max_size=2).map(tuple))


def _gdn(**changes: Any) -> Fixture:
    q, k, v, g, beta, initial_state, cu_seqlens = PrefillCase((3, 0, 2), dtype="bfloat16").inputs()
    assert initial_state is not None
    tensors = {"q": q, "k": k, "v": v, "g": g, "beta": beta, "cu_seqlens": cu_seqlens}
    tensors |= {"initial_state": initial_state, "seen.o": v.clone(), "stage.solve_tril.Ai": g[0]}
    return Fixture(**{"kind": "gdn", "config": {"scale": None}, "tensors": tensors, **changes})


def _assert_equal(found: Fixture, wanted: Fixture) -> None:
    assert (found.kind, found.config, found.about, found.origin, found.records) == (
        (wanted.kind, wanted.config, wanted.about, wanted.origin, wanted.records)
    )
    assert found.tensors.keys() == wanted.tensors.keys()
    for name, x in wanted.tensors.items():
        assert found.tensors[name].dtype == x.dtype
        assert torch.equal(found.tensors[name].nan_to_num(7), x.cpu().nan_to_num(7)), name
        assert torch.equal(found.tensors[name].isnan(), x.cpu().isnan()), name


@given(config=OBJECTS, about=ABOUTS, origin=OBJECTS)
def test_read_fixture_gives_what_was_written_of_tensors(
    config: dict[str, Any], about: About, origin: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("store") / "case.safetensors"
    fixture = _gdn(config=config, about=about, origin=origin)
    write_fixture(path, fixture)
    _assert_equal(read_fixture(path), fixture)
    assert os.listdir(path.parent) == [path.name]


@given(kind=st.sampled_from(["scheduler", "dp"]), config=OBJECTS, about=ABOUTS, records=st.lists(OBJECTS))
def test_read_fixture_gives_what_was_written_of_records(
    kind: str, config: Any, about: About, records: Any, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("store") / "trace.jsonl"
    fixture = Fixture(kind, config, records=tuple(records), about=about)
    write_fixture(path, fixture)
    _assert_equal(read_fixture(path), fixture)


def test_write_fixture_takes_views_of_one_buffer_and_leaves_them(tmp_path: Path) -> None:
    packed = torch.arange(8, dtype=torch.int32)
    tensors = {"cu_seqlens": packed[:3], "metadata.a": packed[3:].view(-1)[::2], "metadata.b": packed[:3]}
    fixture = Fixture("metadata", {}, tensors)
    write_fixture(tmp_path / "m.safetensors", fixture)
    _assert_equal(read_fixture(tmp_path / "m.safetensors"), fixture)
    assert packed.tolist() == list(range(8))


def test_write_fixture_is_the_same_bytes_every_time(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_fixture(tmp_path / f"{name}.safetensors", _gdn())
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("name", "fixture", "message"),
    [
        ("x.jsonl", _gdn(), r"path is .*x\.jsonl; allowed: a name that ends in \.safetensors"),
        ("x.safetensors", Fixture("dp", {}), r"allowed: a name that ends in \.jsonl for kind dp"),
        ("x.safetensors", Fixture("gdn", {}), "kind gdn needs beta, g, k, q, v"),
        ("x.safetensors", _gdn(origin={"x": {1}}), "JSON values"),
        ("x.safetensors", _gdn(config={"x": float("inf")}), "JSON values"),
        ("x.safetensors", _gdn(about=About(notes="x" * 2**20)), "header is .* bytes; allowed: at most"),
        ("x.jsonl", Fixture("scheduler", {}, records=({}, {"x": b""})), "JSON values"),
    ],
)
def test_write_fixture_refuses_and_keeps_what_was_there(
    name: str, fixture: Fixture, message: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_text("kept")
    with pytest.raises(InvalidArgumentError, match=message):
        write_fixture(tmp_path / name, fixture)
    assert os.listdir(tmp_path) == [name]
    assert (tmp_path / name).read_text() == "kept"


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"other": torch.zeros(1)}, "tensor 'other'; allowed: beta, cu_seqlens"),
        ({"seen.o": torch.zeros(1, dtype=torch.complex64)}, "dtype of seen.o is torch.complex64; allowed"),
        ({"seen.o": torch.zeros(1, 1, 1, 1, 1)}, "allowed: at most 4 dims"),
        ({"seen.o": torch.zeros(2**17, 0)}, "none over 65,536 where there are no values"),
    ],
)
def test_write_fixture_refuses_tensors_that_the_format_does_not_have(
    tensors: dict[str, torch.Tensor], message: str, tmp_path: Path
) -> None:
    with pytest.raises(InvalidArgumentError, match=message):
        write_fixture(tmp_path / "x.safetensors", _gdn(tensors={**_gdn().tensors, **tensors}))
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("other", {}), "kind is 'other'; allowed: one of gdn, metadata, scheduler, dp"),
        (("dp", {}, {"q": torch.zeros(1)}), "tensors is .*; allowed: none for kind dp"),
        (("gdn", {}, {}, ({},)), "records is 1 of them; allowed: none for kind gdn"),
    ],
)
def test_fixture_refuses_what_its_kind_does_not_have(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(InvalidArgumentError, match=message):
        Fixture(*arguments)


def _refusal(path: Path, **options: Any) -> str:
    with pytest.raises(FixtureError) as caught:
        read_fixture(path, **options)
    message = str(caught.value)
    assert message.startswith(str(path))
    return message.removeprefix(str(path))


def _with_header(path: Path, **changes: Any) -> Path:
    """The trace at `path`, with other values in its header."""
    first, *rest = path.read_text().splitlines(keepends=True)
    header = json.loads(first)
    header["ascend_twin"] |= changes
    path.write_text("".join([json.dumps(header) + "\n", *rest]))
    return path


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"version": 2}, "format version 2; at most 1 is read: a newer ascend-twin does"),
        ({"version": 0}, "version is 0; allowed: an int from 1 to 1"),
        ({"version": True}, "version is True; allowed"),
        ({"kind": "gdn"}, "kind is 'gdn'; allowed: scheduler or dp"),
        ({"kind": ["dp"]}, "kind is ['dp']; allowed: a JSON str"),
        ({"config": []}, "config is []; allowed: a JSON dict"),
        ({"about": {"title": 1}}, "about is {'title': 1}; allowed: title and notes"),
        ({"about": {"upstream": "asc#1"}}, "allowed: title and notes, strings, and upstream, a list"),
    ],
)
def test_read_fixture_refuses_a_header(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    write_fixture(tmp_path / "t.jsonl", Fixture("dp", {}))
    assert message in _refusal(_with_header(tmp_path / "t.jsonl", **changes))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.bin", b"", ": its name ends in .bin; allowed: .safetensors, .jsonl, .json"),
        ("x.safetensors", b"", ": too short to be a safetensors file"),
        ("x.safetensors", struct.pack("<Q", 2**63), ": not a safetensors file, or cut off: its header has"),
        ("x.safetensors", struct.pack("<Q", 2) + b"{}", ": no fixture: its header has no ascend_twin"),
        ("x.safetensors", struct.pack("<Q", 2) + b"{{", ": not a whole safetensors file"),
        ("x.jsonl", b"", ": no whole line; the first must be the header"),
        ("x.jsonl", b'{"timestamp": 0}\n', ": no fixture: its header has no ascend_twin"),
        ("x.jsonl", b"\xff\n", ":1: not UTF-8 (byte 1 of the line)"),
        ("x.jsonl", b"[]\n", ":1: the line is []; allowed: a JSON object"),
        ("x.jsonl", b'{"ascend_twin": NaN}\n', ":1: not JSON (NaN is no JSON)"),
        ("x.jsonl", b'{"a": "\\ud800"}\n', ":1: not JSON ("),
        ("x.jsonl", b"[" * 100_000 + b"\n", ":1: not JSON (maximum recursion depth"),
        ("x.json", b"[]", ": it holds []; allowed: a JSON object, a scheduler's scenario"),
    ],
)
def test_read_fixture_refuses_what_is_no_fixture(
    name: str, content: bytes, message: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(content)
    assert _refusal(tmp_path / name).startswith(message)


def test_read_fixture_refuses_what_is_no_file(tmp_path: Path) -> None:
    assert _refusal(tmp_path / "missing.jsonl") == ": no such file"
    (tmp_path / "folder.jsonl").mkdir()
    os.mkfifo(tmp_path / "pipe.jsonl")  # to open it would wait for somebody to write
    for name in ("folder.jsonl", "pipe.jsonl"):
        assert _refusal(tmp_path / name) == ": not a file"


def test_read_fixture_says_how_to_read_a_larger_file(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    write_fixture(path, _gdn())
    size = path.stat().st_size
    expected = f": {size:,} bytes; at most {size - 1:,} are read: raise max_bytes (--max-bytes)"
    assert _refusal(path, max_bytes=size - 1) == expected
    read_fixture(path, max_bytes=size)


def test_read_fixture_finds_every_changed_byte_of_a_tensor(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    write_fixture(path, _gdn())
    data = bytearray(path.read_bytes())
    for place in range(len(data) - 1, len(data) - 100, -7):
        data[place] ^= 4
        path.write_bytes(data)
        assert "damaged: what it holds does not fit its sha256" in _refusal(path)
        data[place] ^= 4


def test_read_fixture_ends_a_trace_before_a_line_that_was_not_finished(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    write_fixture(path, Fixture("dp", {}, records=({"rank": 0}, {"rank": 1})))
    path.write_bytes(path.read_bytes()[:-1])
    assert read_fixture(path).records == ({"rank": 0},)


def test_read_fixture_reads_a_scenario_from_before_version_1(tmp_path: Path) -> None:
    (tmp_path / "s.json").write_text('{"name": "n", "what": "w", "issue": "#1, near #23", "scenario": {}}')
    fixture = read_fixture(tmp_path / "s.json")
    assert fixture.kind == "scheduler"
    assert fixture.config["scenario"]["scenario"] == {}
    assert fixture.about == About("n", "w", ("vllm#1", "vllm#23"))


def test_trace_writer_is_a_whole_trace_after_every_append(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    writer = TraceWriter(path, Fixture("scheduler", {"a": 1}, records=({"first": True},)))
    written = []
    for batch in ([], [{"step": 0}], [{"step": 1}, {"step": 2}]):
        before = path.stat().st_size
        assert writer.append(batch) == path.stat().st_size - before
        written += batch
        assert read_fixture(path).records == ({"first": True}, *written)
    with pytest.raises(InvalidArgumentError, match="JSON values"):
        writer.append([{"good": 1}, {"bad": {1}}])
    assert len(read_fixture(path).records) == 4
    writer.close()
    writer.close()


def test_trace_writer_takes_back_what_the_disk_has_no_room_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "t.jsonl"
    writer, write = TraceWriter(path, Fixture("dp", {})), os.write
    calls = []

    def full(file: int, data: Any) -> int:
        calls.append(len(data))
        if len(calls) > 1:
            raise OSError(28, "No space left on device")
        return write(file, data[:5])

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(OSError, match="No space left"):
        writer.append([{"rank": 0}])
    monkeypatch.setattr(os, "write", write)
    assert len(calls) == 2
    writer.append([{"rank": 1}])
    writer.close()
    assert read_fixture(path).records == ({"rank": 1},)


def test_trace_writer_refuses_tensors(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgumentError, match="kind is 'gdn'; allowed: scheduler or dp"):
        TraceWriter(tmp_path / "t.jsonl", _gdn())


def test_read_fixture_survives_ten_thousand_mutations_of_valid_files(tmp_path: Path) -> None:
    write_fixture(tmp_path / "a.safetensors", _gdn(about=About("t", "n", ("asc#1",)), origin={"step": 3}))
    packed = {"cu_seqlens": torch.arange(4, dtype=torch.int32), "metadata.keep_meta": torch.tensor([True])}
    write_fixture(tmp_path / "b.safetensors", Fixture("metadata", {"block_sizes": [64, 1216, 64]}, packed))
    records = tuple({"event": "step", "step": n, "tokens": {"a": [n, None]}} for n in range(20))
    write_fixture(tmp_path / "c.jsonl", Fixture("scheduler", {"num_blocks": 8}, records=records))
    (tmp_path / "d.json").write_text(
        json.dumps({"name": "n", "scenario": {"events": [{"event": "Step"}]}}, indent=1)
    )
    files = sorted(map(str, tmp_path.iterdir()))
    module = "ascend_twin.equivalence_tests.fixture_fuzzer"
    run = subprocess.run(
        [sys.executable, "-m", module, "10000", "0", *files], capture_output=True, text=True, timeout=300
    )
    assert run.returncode == 0, run.stderr[-2000:]
    result = json.loads(run.stdout)
    assert result["others"] == {}
    assert result["read"] + result["refused"] == 10_000
    assert result["refused"] > 5_000
    assert result["read"] > 100  # mutations that leave a file valid: the next line of defence sees these


def test_store_writes_temporary_files_that_nobody_takes_for_fixtures(tmp_path: Path) -> None:
    path = tmp_path / f"x.safetensors{store.TEMPORARY_SUFFIX}"
    path.write_bytes(b"half")
    assert "its name ends in" in _refusal(path)
