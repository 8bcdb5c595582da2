"""`ascend-twin bench`: speed as ratios against a peer, measured side by side in one process.

Contenders take turns. A turn is as many calls as fill `TURN_SECONDS` (at least one), its time the median
call: each runs as warm as in a loop of its own. A ratio is taken between turns that follow one another, and
its median and quartiles over all rounds are reported.

The file written by `--json` holds {"version": 1, "versions", "threads", "rounds", "results": [...]} with the
fields of `Result` in each result.
"""

import dataclasses
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from ..equivalence_tests.cases import EquivalenceError
from ..equivalence_tests.run_on_device import versions
from ..optimized.gdn import ChunkMetadata, ChunkMetadataBuilder, open_device
from ..optimized.gdn import chunk_gated_delta_rule as optimized_chunk_gated_delta_rule
from ..reference.errors import UnavailableError, invalid_argument
from ..reference.gdn import chunk_gated_delta_rule, metadata
from .output_files import check_writable, write_atomically
from .peers import (
    count_vllm_ascend_copies,
    load_transformers_chunk_gated_delta_rule,
    load_vllm_ascend_builder,
)

TURN_SECONDS = 0.25
SEED = 0

# Qwen3-Next: query/key heads, value heads, head dim.
H, HV, D = 16, 32, 128

Call = Callable[[], object]


class Pair(NamedTuple):
    """Two calls that do the same work, with their names, and what else there is to say of them."""

    ours: str
    our_call: Call
    peer: str
    peer_call: Call
    note: str = ""


@dataclass(frozen=True)
class Result:
    """One comparison.

    Attributes:
        ours, peer: what was called, and ours_ms, peer_ms: milliseconds a call (medians).
        ratio: the peer's time over ours: lower quartile, median, upper quartile.
        skipped: why nothing was measured, or "".
    """

    name: str
    ours: str = ""
    ours_ms: float = 0.0
    peer: str = ""
    peer_ms: float = 0.0
    ratio: tuple[float, float, float] = (0.0, 0.0, 0.0)
    note: str = ""
    skipped: str = ""


@dataclass(frozen=True)
class Contest:
    """A comparison to be made: `start` makes the calls, and raises UnavailableError without the peer."""

    name: str
    start: Callable[[], Pair]


def run_bench(
    only: Sequence[str],
    rounds: int,
    threads: int | None,
    json_path: Path | None,
    plot: Path | None,
    require: bool,
) -> None:
    """Run the contests whose name contains one of `only` (all, if empty) and print the result.

    Raises:
        InvalidArgumentError: for a name that fits no contest, or a file that cannot be written.
        UnavailableError: when `require` is set and the peer of a contest is missing; once its turn comes.
    """
    contests = [c for c in CONTESTS if not only or any(name in c.name for name in only)]
    if not contests:
        invalid_argument("--only", ", ".join(only), "part of one of: " + "; ".join(c.name for c in CONTESTS))
    if json_path is not None:
        check_writable("--json", json_path)
    if plot is not None:
        check_writable("--plot", plot, (".png", ".svg", ".pdf"))
    if threads is not None:
        torch.set_num_threads(threads)
    results = []
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("", total=len(contests) * rounds)
        for contest in contests:
            progress.update(task, description=contest.name)
            results.append(_measure(contest, rounds, lambda: progress.advance(task), require))
    _print(results)
    if json_path is not None:
        report = {
            "version": 1,
            "versions": versions(),
            "threads": torch.get_num_threads(),
            "rounds": rounds,
            "results": [dataclasses.asdict(r) for r in results],
        }
        text = json.dumps(report, indent=2) + "\n"
        write_atomically("--json", json_path, lambda path: path.write_text(text, encoding="utf-8"))
    if plot is not None:
        write_atomically("--plot", plot, lambda path: _plot(results, path))


def _measure(contest: Contest, rounds: int, advance: Callable[[], None], require: bool) -> Result:
    try:
        pair = contest.start()
    except UnavailableError as error:
        if require:
            raise
        for _ in range(rounds):
            advance()
        return Result(contest.name, skipped=str(error))
    ours, peers = [], []
    with torch.inference_mode():
        pair.our_call()
        pair.peer_call()
        for _ in range(rounds):
            ours.append(_turn(pair.our_call))
            peers.append(_turn(pair.peer_call))
            advance()
    low, median, high = np.quantile(np.array(peers) / np.array(ours), (0.25, 0.5, 0.75)).tolist()
    return Result(
        contest.name,
        pair.ours,
        float(np.median(ours)) * 1e3,
        pair.peer,
        float(np.median(peers)) * 1e3,
        (low, median, high),
        pair.note,
    )


def _turn(call: Call) -> float:
    """Seconds that the median call of a turn takes."""
    times: list[float] = []
    while not times or sum(times) < TURN_SECONDS:
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return float(np.median(times))


# Contests


def _seq_lens(num_seqs: int, num_tokens: int) -> list[int]:
    """Random lengths >= 1 that add up to `num_tokens`."""
    rng = np.random.default_rng(SEED)
    cuts = np.sort(rng.choice(np.arange(1, num_tokens), num_seqs - 1, replace=False))
    return np.diff([0, *cuts.tolist(), num_tokens]).tolist()


def _query_start_loc(seq_lens: Sequence[int]) -> torch.Tensor:
    return torch.tensor([0, *np.cumsum(seq_lens).tolist()], dtype=torch.int32)


def _builder(seq_lens: Sequence[int], num_value_heads: int) -> ChunkMetadataBuilder:
    return ChunkMetadataBuilder(open_device("cpu"), sum(seq_lens), len(seq_lens), num_value_heads)


def _metadata_contest(num_seqs: int, peer: str) -> Contest:
    num_tokens = 32768

    def start() -> Pair:
        seq_lens = _seq_lens(num_seqs, num_tokens)
        loc, builder = _query_start_loc(seq_lens), _builder(seq_lens, HV)

        def ours() -> object:
            return builder.build(loc)

        if peer == "vllm-ascend":
            build = load_vllm_ascend_builder(
                num_value_heads=HV, max_num_batched_tokens=num_tokens, max_num_seqs=num_seqs
            )
            _check_same_tables(builder.build(loc), build(loc))
            copies = f"copies a step: {builder.ring.copies} against {count_vllm_ascend_copies(build, loc)}"
            return Pair("prebuilt", ours, "vllm-ascend 0.18.0", lambda: build(loc), copies)
        chunk, large, cumsum = builder.block_sizes

        def loops() -> None:
            for block_size in (chunk, large, cumsum):
                metadata.chunk_indices(loc, block_size)
            for table in (
                metadata.chunk_offsets,
                metadata.update_chunk_offsets,
                metadata.final_chunk_indices,
            ):
                table(loc, chunk)

        return Pair("prebuilt", ours, "reference loops", loops)

    return Contest(f"metadata, {num_seqs} x {num_tokens // num_seqs} tokens, against {peer}", start)


def _check_same_tables(ours: ChunkMetadata, peers: Any) -> None:
    """Raise unless both built the same tables: what is timed must be the same work."""
    for name in (f.name for f in dataclasses.fields(peers) if not f.name.startswith("_")):
        if not torch.equal(getattr(ours, name), getattr(peers, name)):
            raise EquivalenceError(f"{name} differs: {getattr(ours, name)} and {getattr(peers, name)}")


def _tensors(num_tokens: int, num_heads: int, num_value_heads: int, dtype: torch.dtype) -> list[torch.Tensor]:
    rng = torch.Generator().manual_seed(SEED)
    q, k = (torch.randn(1, num_tokens, num_heads, D, generator=rng).to(dtype) for _ in range(2))
    v = torch.randn(1, num_tokens, num_value_heads, D, generator=rng).to(dtype)
    g, beta = (torch.rand(1, num_tokens, num_value_heads, generator=rng) for _ in range(2))
    return [q, k, v, -g, beta]


def _start_reference() -> Pair:
    inputs = _tensors(1024, H, H, torch.float32)
    peer = load_transformers_chunk_gated_delta_rule()
    options: dict[str, Any] = {"output_final_state": True, "use_qk_l2norm_in_kernel": True}
    return Pair(
        "chunked reference, float32",
        lambda: chunk_gated_delta_rule(*inputs, **options, compute_dtype=torch.float32),
        "transformers",
        lambda: peer(*inputs, **options),
    )


def _eager_contest(peer: str, num_heads: int, num_value_heads: int) -> Contest:
    def start() -> Pair:
        seq_lens = np.random.default_rng(SEED).integers(1, 513, 64).tolist()
        inputs = _tensors(sum(seq_lens), num_heads, num_value_heads, torch.bfloat16)
        loc = _query_start_loc(seq_lens)
        builder = _builder(seq_lens, num_value_heads)
        options: dict[str, Any] = {"output_final_state": True, "use_qk_l2norm_in_kernel": True}

        def ours() -> object:
            return optimized_chunk_gated_delta_rule(*inputs, **options, prebuilt_meta=builder.build(loc))

        def reference() -> object:
            return chunk_gated_delta_rule(*inputs, **options, cu_seqlens=loc, compute_dtype=torch.float32)

        if peer == "chunked reference":
            return Pair("eager", ours, peer, reference)
        function = load_transformers_chunk_gated_delta_rule()
        bounds = list(zip(loc.tolist(), loc.tolist()[1:], strict=False))

        def to_value_heads() -> list[torch.Tensor]:
            q, k, *rest = inputs
            return [*(x.repeat_interleave(num_value_heads // num_heads, dim=2) for x in (q, k)), *rest]

        def once_a_sequence() -> None:
            tensors = to_value_heads()
            for start, end in bounds:
                function(*(x[:, start:end] for x in tensors), **options)

        def padded() -> None:
            tensors = (
                torch.nn.utils.rnn.pad_sequence([x[0, start:end] for start, end in bounds], batch_first=True)
                for x in to_value_heads()
            )
            function(*tensors, **options)

        return Pair("eager", ours, peer, padded if peer.endswith("padded") else once_a_sequence)

    return Contest(
        f"eager, 64 sequences of 1 to 512 tokens, H {num_heads}, HV {num_value_heads}, against {peer}", start
    )


CONTESTS = (
    *(
        _metadata_contest(num_seqs, peer)
        for num_seqs in (1, 64, 256)
        for peer in ("reference loops", "vllm-ascend")
    ),
    Contest("chunked reference, 1 sequence of 1024 tokens, against transformers", _start_reference),
    *(
        _eager_contest(peer, num_heads, num_value_heads)
        for peer, num_heads, num_value_heads in (
            ("chunked reference", H, HV),
            ("transformers, padded", H, HV),
            ("transformers, once a sequence", H, HV),
            ("transformers, once a sequence", 2, 4),
        )
    ),
)


# Output


def _print(results: Sequence[Result]) -> None:
    table = Table("benchmark", "ours", "peer", "times faster", "quartiles")
    for r in results:
        if r.skipped:
            table.add_row(r.name, "-", "-", "-", f"not run: {r.skipped}")
            continue
        low, median, high = r.ratio
        table.add_row(
            r.name,
            f"{r.ours_ms:.3g} ms",
            f"{r.peer_ms:.3g} ms",
            f"{median:.3g}",
            f"{low:.3g} to {high:.3g}" + (f"; {r.note}" if r.note else ""),
        )
    console = Console(width=None if sys.stdout.isatty() else 140)
    console.print(table)
    console.print(f"medians of interleaved turns, {torch.get_num_threads()} threads, CPU")


def _plot(results: Sequence[Result], path: Path) -> None:
    """Bars of how many times faster each is, with quartiles, written to `path`."""
    from matplotlib.figure import Figure

    measured = [r for r in results if not r.skipped][::-1]
    figure = Figure(figsize=(12, 1 + 0.45 * len(measured)), layout="constrained")
    axes = figure.add_subplot()
    ratios = np.array([r.ratio for r in measured]).reshape(-1, 3)
    errors = np.abs(ratios[:, [0, 2]] - ratios[:, [1]]).T
    bars = axes.barh(
        [r.name for r in measured], ratios[:, 1] - 1, left=1, xerr=errors, color="#4c78a8", ecolor="#222222"
    )
    axes.bar_label(bars, labels=[f"{median:.3g}" for median in ratios[:, 1]], padding=4)
    axes.axvline(1, color="#222222", linewidth=1)
    axes.set_xscale("log")
    axes.margins(x=0.1)
    axes.set_xlabel("times faster than the peer (bars: median, lines: quartiles)")
    figure.savefig(path)
