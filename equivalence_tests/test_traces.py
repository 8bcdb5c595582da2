"""Request traces and the generator: what is read, what is refused, and how the lengths are spread."""

import json
import re
import statistics
from pathlib import Path

import pytest

from ascend_twin.reference.errors import InvalidArgumentError, TraceError
from ascend_twin.scheduler.traces import BLOCK_TOKENS, TraceRequest, generate_requests, read_trace

REAL_TRACE = Path(__file__).parents[1].parent / "shared" / "traces" / "mooncake_conversation.jsonl"
GOOD = {"timestamp": 5, "input_length": 600, "output_length": 7, "hash_ids": [0, 3]}


def _line(**changed: object) -> str:
    return json.dumps({**GOOD, **changed}) + "\n"


def _without(name: str) -> str:
    return json.dumps({k: v for k, v in GOOD.items() if k != name}) + "\n"


def test_read_trace_returns_every_request_in_order(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_text(_line() + "\n" + _line(timestamp=2, output_length=0, hash_ids=[], extra="x").rstrip())
    assert read_trace(path) == [TraceRequest(5, 600, 7, (0, 3)), TraceRequest(2, 600, 0, ())]


@pytest.mark.parametrize(
    ("second_line", "reason"),
    [
        (_line()[:30], "not JSON (.*), and the line has no end: is the file cut off?"),
        ("timestamp,input_length\n", "not JSON (Expecting value, column 1)"),
        ("[" * 100_000 + "\n", "not JSON (.*)"),
        ("[1, 2]\n", "the line is [1, 2]; allowed: a JSON object"),
        (_line(input_length=-3), "input_length is -3; allowed: an int from 1 to 2147483647"),
        (_line(input_length=0), "input_length is 0; allowed: an int from 1 to 2147483647"),
        (_line(input_length=2**31), "input_length is 2147483648; allowed: an int from 1 to 2147483647"),
        (_line(input_length=12.0), "input_length is 12.0; allowed: an int .*"),
        (_line(input_length=True), "input_length is True; allowed: an int .*"),
        (_line(input_length=float("nan")), "input_length is nan; allowed: an int .*"),
        (_line(output_length=-1), "output_length is -1; allowed: an int from 0 to 2147483647"),
        (_line(output_length="7"), "output_length is '7'; allowed: an int .*"),
        (_line(timestamp=-1), "timestamp is -1; allowed: an int from 0 to .*"),
        (_line(timestamp=None), "timestamp is None; allowed: an int .*"),
        (_line(hash_ids=5), "hash_ids is 5; allowed: a list of ints"),
        (_line(hash_ids=[1, -2]), "hash_ids[1] is -2; allowed: an int from 0 to .*"),
        (_line(hash_ids=["a"]), "hash_ids[0] is 'a'; allowed: an int from 0 to .*"),
        (_without("timestamp"), "timestamp is missing"),
        (_without("input_length"), "input_length is missing"),
        (_without("output_length"), "output_length is missing"),
        (_without("hash_ids"), "hash_ids is missing"),
    ],
)
def test_read_trace_names_line_and_reason_when_a_line_does_not_fit(
    tmp_path: Path, second_line: str, reason: str
) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_text(_line() + second_line + (_line() if second_line.endswith("\n") else ""))
    with pytest.raises(TraceError) as caught:
        read_trace(path)
    expected = re.escape(f"{path}:2: {reason}").replace(r"\.\*", ".*")
    assert re.fullmatch(expected, str(caught.value))


def test_read_trace_names_line_when_not_utf8(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_bytes(_line().encode() + b'{"timestamp": \xff}\n')
    with pytest.raises(TraceError, match=r":2: not UTF-8 \(byte 15 of the line\)"):
        read_trace(path)


@pytest.mark.parametrize("content", ["", "\n \n"])
def test_read_trace_says_so_when_the_file_is_empty(tmp_path: Path, content: str) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_text(content)
    with pytest.raises(TraceError) as caught:
        read_trace(path)
    assert str(caught.value) == f"{path}:1: the file is empty; allowed: at least one request"


def test_read_trace_says_why_when_the_file_cannot_be_opened(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match=r"absent\.jsonl: No such file or directory"):
        read_trace(tmp_path / "absent.jsonl")
    with pytest.raises(TraceError, match="Is a directory"):
        read_trace(tmp_path)


@pytest.mark.skipif(not REAL_TRACE.exists(), reason=f"no trace at {REAL_TRACE}: it is not part of a checkout")
def test_read_trace_reads_the_real_trace() -> None:
    requests = read_trace(REAL_TRACE)
    lengths = [r.num_prompt_tokens for r in requests]
    assert (len(requests), statistics.median(lengths), max(lengths)) == (12_031, 6_909, 126_195)
    assert round(statistics.mean(lengths)) == 12_035
    assert round(statistics.mean(r.num_output_tokens for r in requests)) == 343
    assert all(len(r.hash_ids) == -(-r.num_prompt_tokens // BLOCK_TOKENS) for r in requests)


def test_generate_requests_has_the_lengths_and_arrivals_it_promises() -> None:
    requests = generate_requests(seed=1, count=12_031)
    lengths = [r.num_prompt_tokens for r in requests]
    arrivals = [r.arrival_ms for r in requests]
    assert statistics.median(lengths) == pytest.approx(6_900, rel=0.05)
    assert statistics.mean(lengths) == pytest.approx(12_000, rel=0.05)
    assert min(lengths) >= 1
    assert max(lengths) == 126_000
    assert statistics.mean(r.num_output_tokens for r in requests) == pytest.approx(340, rel=0.05)
    assert all(1 <= r.num_output_tokens <= 2_000 for r in requests)
    assert arrivals == sorted(arrivals)
    assert arrivals[-1] == pytest.approx(3_600_000, rel=0.05)


def test_generate_requests_shares_no_prefix() -> None:
    requests = generate_requests(seed=2, count=100)
    ids = [i for r in requests for i in r.hash_ids]
    assert len(set(ids)) == len(ids)
    assert all(len(r.hash_ids) == -(-r.num_prompt_tokens // BLOCK_TOKENS) for r in requests)


def test_generate_requests_follows_from_the_seed() -> None:
    assert generate_requests(3, 50) == generate_requests(3, 80)[:50]
    assert generate_requests(3, 50) != generate_requests(4, 50)
    assert generate_requests(3, 0) == []
    with pytest.raises(InvalidArgumentError, match="count is -1; allowed: >= 0"):
        generate_requests(3, -1)
