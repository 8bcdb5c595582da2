"""`ascend-twin bench`: speed as ratios against a peer, measured side by side in one process.

Contenders take turns. A turn is as many calls as fill `TURN_SECONDS` (at least one), its time the median
call: each runs as warm as in a loop of its own. A ratio is taken between turns that follow one another, and
its median and quartiles over all rounds are reported.

On an accelerator a call takes the time between an event before it and one behind it. Calls are queued in
bursts, behind a first one that is not timed: from then on the host is ahead, if it can be, and what the
events see is the device's work. The host's time of a call is that until the call returns, with the device
still at work.

What is compared on an accelerator has given the same result just before.

The file written by `--json` holds one object:

    version     1, raised when a field changes its meaning
    versions    of what the result depends on
    device      what computed: "cpu", "linalg" (native code on the CPU), or the name of the accelerator
    threads     of PyTorch
    rounds      turns of each contender
    results     [...], with the fields of `Result`
    traffic     {"batch": {"seq_lens", "H", "HV", "K", "V"}, "schemes": [{"name", "source",
                "bytes_per_token": {part: bytes}, "state_bytes_per_token", "moves": [{"kernel", "tensor",
                "kind", "bytes"}]}]}: bytes that kernels load and store, from the shapes (cli/traffic.py);
                those of moves are of the whole batch
"""

import dataclasses
import functools
import importlib.util
import itertools
import sys
import tempfile
import time
import timeit
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from ..equivalence_tests import installed_vllm
from ..equivalence_tests.cases import EquivalenceError
from ..equivalence_tests.paged_model import StandInStructuredOutputManager
from ..equivalence_tests.real_scheduler import RealEngine
from ..equivalence_tests.run_on_device import versions
from ..equivalence_tests.scheduler_engines import Engine, OurEngine, RequestInput
from ..equivalence_tests.vllm017 import VLLMEngine
from ..equivalence_tests.vllm_balance import real_engine
from ..equivalence_tests.vllm_batches import Row, Step
from ..fixtures.record import Recorder, RecordSettings
from ..optimized.gdn import ChunkMetadata, ChunkMetadataBuilder, open_device
from ..optimized.gdn import chunk_gated_delta_rule as optimized_chunk_gated_delta_rule
from ..optimized.gdn.device import Device, LinalgDevice
from ..optimized.gdn.recording import recorded
from ..optimized.vllm.gdn_layer import OF_LAYER, switched
from ..optimized.vllm.plugin import register
from ..reference.errors import UnavailableError, invalid_argument
from ..reference.gdn import chunk_gated_delta_rule, metadata
from ..scheduler.admission import AnyRankAtCap
from ..scheduler.balance import BalanceScheduler
from ..scheduler.config import SchedulerConfig
from ..scheduler.output import ModelRunnerOutput
from ..scheduler.workload import RequestSpec
from .bench_native import NATIVE_CONTESTS, open_linalg
from .contest import Call, Contest, Pair
from .output_files import check_writable, write_atomically, write_json
from .peers import (
    FLA_VERSION,
    count_vllm_ascend_copies,
    load_fla_chunk_gated_delta_rule,
    load_metadata_builders,
    load_transformers_chunk_gated_delta_rule,
    load_vllm_ascend_builder,
)
from .prefill_batch import (
    HV,
    SEED,
    D,
    H,
    check_agree,
    prefill_batch,
    query_start_loc_of,
    random_seq_lens,
    random_tensors,
)
from .progress import progress
from .traffic import PARTS, SCHEMES, Batch, bytes_per_token, state_bytes

TURN_SECONDS = 0.25
BURST = 8
"""Calls that are queued and timed in a row: all their launches fit into the queue of a GPU."""


BALANCE_DP_SIZE = 8
MOST_DECODED_TOKENS = 1024
"""Of a request whose steps are scheduled in a benchmark, its prompt included."""

DEVICE_TOKENS = (8192, 32768)
DEVICE_SEQUENCES = (1, 4, 16, 64)


class Turn(NamedTuple):
    """Seconds that the median call of a turn takes: where it computes, and on the host of an accelerator."""

    seconds: float
    host_seconds: float | None = None


@dataclass(frozen=True)
class Result:
    """One comparison.

    Attributes:
        ours, peer: what was called, and ours_ms, peer_ms: milliseconds a call (medians).
        ratio: the peer's time over ours: lower quartile, median, upper quartile.
        our_host_ms, peer_host_ms: milliseconds until a call on an accelerator returns (medians); None on a
            CPU.
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
    our_host_ms: float | None = None
    peer_host_ms: float | None = None


def run_bench(
    only: Sequence[str],
    rounds: int,
    threads: int | None,
    json_path: Path | None,
    plot: Path | None,
    require: bool,
    device: str = "cpu",
) -> None:
    """Run the contests whose name contains one of `only` (all, if empty) and print the result.

    `device` is a name that `open_device` takes. It chooses the contests.

    Raises:
        InvalidArgumentError: for a name that fits no contest, or a file that cannot be written.
        UnavailableError: when the device cannot be used; when `require` is set and the peer of a contest is
            missing, once its turn comes.
        EquivalenceError: when contenders do not compute the same.
        typer.Exit: with status 130 when it is interrupted; one line on stderr says how far it came.
    """
    opened = open_linalg() if device == "linalg" else open_device(device)
    all_contests = contests_on(opened)
    contests = [c for c in all_contests if not only or any(name in c.name for name in only)]
    if not contests:
        invalid_argument(
            "--only", ", ".join(only), "part of one of: " + "; ".join(c.name for c in all_contests)
        )
    if json_path is not None:
        check_writable("--json", json_path)
    if plot is not None:
        check_writable("--plot", plot, (".png", ".svg", ".pdf"))
    if threads is not None:
        torch.set_num_threads(threads)
    turn, device_name = _turn_on(opened)
    results = []
    with progress("rounds", len(contests) * rounds) as advance:
        for contest in contests:
            advance(0, contest.name)
            results.append(_measure(contest, rounds, lambda: advance(1), require, turn))
    _print(results, device_name)
    if json_path is not None:
        report = {
            "version": 1,
            "versions": versions(),
            "device": device_name,
            "threads": torch.get_num_threads(),
            "rounds": rounds,
            "results": [dataclasses.asdict(r) for r in results],
            "traffic": _traffic_report(),
        }
        write_json("--json", json_path, report)
    if plot is not None:
        write_atomically("--plot", plot, lambda path: _plot(results, path))


def _measure(
    contest: Contest,
    rounds: int,
    advance: Callable[[], object],
    require: bool,
    turn: Callable[..., Turn],
) -> Result:
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
        for call, settle in ((pair.our_call, pair.our_settle), (pair.peer_call, pair.peer_settle)):
            call()
            if settle:
                settle()
        for _ in range(rounds):
            ours.append(turn(pair.our_call, settle=pair.our_settle))
            peers.append(turn(pair.peer_call, settle=pair.peer_settle))
            advance()
    ratios = [peer.seconds / our.seconds for our, peer in zip(ours, peers, strict=True)]
    low, median, high = np.quantile(ratios, (0.25, 0.5, 0.75)).tolist()
    our_ms, our_host_ms = _median_ms(ours)
    peer_ms, peer_host_ms = _median_ms(peers)
    return Result(
        contest.name,
        pair.ours,
        our_ms,
        pair.peer,
        peer_ms,
        (low, median, high),
        pair.note,
        our_host_ms=our_host_ms,
        peer_host_ms=peer_host_ms,
    )


def _median_ms(turns: Sequence[Turn]) -> tuple[float, float | None]:
    """Milliseconds of the median turn, and those of the host, if it is another."""
    host = [turn.host_seconds for turn in turns if turn.host_seconds is not None]
    return (
        float(np.median([turn.seconds for turn in turns])) * 1e3,
        float(np.median(host)) * 1e3 if host else None,
    )


def _turn_on(device: Device) -> tuple[Callable[..., Turn], str]:
    """How turns on a device are timed, and its name. An accelerator becomes the current one of torch."""
    where = device.torch_device
    if where.type == "cpu":
        return _turn, "linalg" if isinstance(device, LinalgDevice) else "cpu"
    module: Any = getattr(torch, where.type)
    module.set_device(where)
    return functools.partial(_device_turn, module=module), module.get_device_name(where)


def _turn(call: Call, settle: Call | None = None) -> Turn:
    """A turn on the CPU."""
    times: list[float] = []
    while not times or sum(times) < TURN_SECONDS:
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
        if settle:
            settle()
    return Turn(float(np.median(times)))


def _device_turn(call: Call, module: Any, settle: Call | None = None) -> Turn:
    """A turn on an accelerator; `module` is the part of torch that speaks for it. Nothing settles there."""
    on_device: list[float] = []
    on_host: list[float] = []
    while not on_device or sum(on_device) < TURN_SECONDS:
        module.synchronize()
        call()
        events = [module.Event(enable_timing=True) for _ in range(BURST + 1)]
        events[0].record()
        for event in events[1:]:
            start = time.perf_counter()
            call()
            on_host.append(time.perf_counter() - start)
            event.record()
        module.synchronize()
        on_device += [before.elapsed_time(after) / 1e3 for before, after in itertools.pairwise(events)]
    return Turn(float(np.median(on_device)), float(np.median(on_host)))


# Contests


def _builder(seq_lens: Sequence[int], num_value_heads: int) -> ChunkMetadataBuilder:
    return ChunkMetadataBuilder(open_device("cpu"), sum(seq_lens), len(seq_lens), num_value_heads)


def _metadata_contest(num_seqs: int, peer: str) -> Contest:
    num_tokens = 32768

    def start() -> Pair:
        seq_lens = random_seq_lens(num_seqs, num_tokens)
        loc, builder = query_start_loc_of(seq_lens), _builder(seq_lens, HV)

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


def _real_builder_contest(num_seqs: int, *, is_vllm_included: bool) -> Contest:
    """Chunk metadata within vLLM's own metadata builder: a whole step, or what each adds to vLLM's part."""
    num_tokens = 32768

    def start() -> Pair:
        rows = (Row(n, is_prefilling=True) for n in random_seq_lens(num_seqs, num_tokens))
        ours, peer = load_metadata_builders(
            Step(tuple(rows)), num_value_heads=HV, is_vllm_included=is_vllm_included
        )
        _check_same_tables(*(call().non_spec_chunked_prefill_meta for call in (ours, peer)))
        return Pair("prebuilt", ours, "vllm-ascend 0.18.0", peer)

    what = "whole build" if is_vllm_included else "what is added"
    name = f"metadata in vLLM's builder, {what}, {num_seqs} x {num_tokens // num_seqs} tokens"
    return Contest(f"{name}, against vllm-ascend", start)


def _check_same_tables(ours: ChunkMetadata, peers: Any) -> None:
    """Raise unless both built the same tables: what is timed must be the same work."""
    for name in (f.name for f in dataclasses.fields(peers) if not f.name.startswith("_")):
        if not torch.equal(getattr(ours, name), getattr(peers, name)):
            raise EquivalenceError(f"{name} differs: {getattr(ours, name)} and {getattr(peers, name)}")


def _start_reference() -> Pair:
    inputs = random_tensors(1024, H, H, torch.float32)
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
        inputs = random_tensors(sum(seq_lens), num_heads, num_value_heads, torch.bfloat16)
        loc = query_start_loc_of(seq_lens)
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


def _schedule_contest(num_running: int) -> Contest:
    """One decode step of every request: `schedule()` alone is timed, the tokens are entered between calls."""

    def start() -> Pair:
        ours, peer = (_ScheduledDecodes(engine, num_running) for engine in (OurEngine, VLLMEngine))
        return Pair(
            "plain Python",
            ours.schedule,
            "vLLM 0.17.0",
            peer.schedule,
            our_settle=ours.settle,
            peer_settle=peer.settle,
        )

    return Contest(f"schedule(), {num_running} running requests, against vLLM", start)


def _policy_contest(num_running: int) -> Contest:
    """What a policy adds to `schedule()`; gather and decision are between calls."""

    def start() -> Pair:
        ours = _ScheduledDecodes(_BalanceEngine, num_running, is_gathering=True)
        peer = _ScheduledDecodes(OurEngine, num_running)
        return Pair(
            "with any_rank_at_cap",
            ours.schedule,
            "without",
            peer.schedule,
            our_settle=ours.settle,
            peer_settle=peer.settle,
        )

    return Contest(f"policy in schedule(), {num_running} running requests, against none", start)


def _plugin_contest(num_running: int) -> Contest:
    """What the plugin adds to `schedule()` of the installed vLLM; gather and decision are between calls."""

    def start() -> Pair:
        plain = real_engine()
        ours = _ScheduledDecodes(_plugin_engine(plain), num_running, is_gathering=True)
        peer = _ScheduledDecodes(plain, num_running)
        name = f"vLLM {installed_vllm.version()}"
        return Pair(
            f"{name} with the plugin",
            ours.schedule,
            name,
            peer.schedule,
            our_settle=ours.settle,
            peer_settle=peer.settle,
        )

    return Contest(f"plugin in schedule(), {num_running} running requests, against plain vLLM", start)


def _plugin_engine(plain: type[RealEngine]) -> Callable[..., Engine]:
    """The plugin's scheduler, as the first of `BALANCE_DP_SIZE` ranks."""
    installed_vllm.prepare_import()
    register()
    from ..optimized.vllm import BalanceScheduler

    class PluginEngine(plain):
        def vllm_config(self, config: SchedulerConfig, asynchronous: bool) -> Any:
            made = super().vllm_config(config, asynchronous)
            made.parallel_config.data_parallel_size = BALANCE_DP_SIZE
            made.parallel_config.data_parallel_rank = 0
            made.additional_config = {"ascend_twin": {"balance": True}}
            return made

        def make_scheduler(self, asynchronous: bool, **arguments: Any) -> Any:
            return BalanceScheduler(**arguments)

    return PluginEngine


def _gather_contest(num_running: int) -> Contest:
    """What all ranks contribute and make of it, without the transport between; and the step of one rank."""

    def start() -> Pair:
        ranks = [_ScheduledDecodes(_BalanceEngine, num_running) for _ in range(BALANCE_DP_SIZE)]

        def gather() -> None:
            _gather(ranks)

        return Pair(
            f"all {BALANCE_DP_SIZE} ranks",
            gather,
            "schedule() of one",
            ranks[0].schedule,
            peer_settle=ranks[0].settle,
        )

    name = f"gather and decision, {BALANCE_DP_SIZE} ranks of {num_running} running requests"
    return Contest(f"{name}, against schedule() of one", start)


def _gather(ranks: Sequence["_ScheduledDecodes"]) -> None:
    """A gather of `BALANCE_DP_SIZE` ranks, which all contribute the same; those that are not there, too."""
    schedulers = [rank.engine.scheduler for rank in ranks]
    gathered = [scheduler.counts() for scheduler in schedulers] * (BALANCE_DP_SIZE // len(ranks))
    for scheduler in schedulers:
        scheduler.observe(gathered)


def _balance_scheduler(config: SchedulerConfig, **options: Any) -> BalanceScheduler:
    policy = AnyRankAtCap(config.max_num_seqs)
    return BalanceScheduler(config, policy=policy, dp_size=BALANCE_DP_SIZE, **options)


class _BalanceEngine(OurEngine):
    """Ours behind a gate, as the first rank; without async scheduling."""

    schedulers: Any = (_balance_scheduler,)


class _SmallPrefill(NamedTuple):
    """A prefill step of one rank of eight: much to copy for a recording, little to compute."""

    inputs: list[torch.Tensor]
    options: dict[str, Any]

    @classmethod
    def make(cls) -> "_SmallPrefill":
        num_heads, num_value_heads, seq_lens = H // 8, HV // 8, [64] * 4
        inputs = random_tensors(sum(seq_lens), num_heads, num_value_heads, torch.bfloat16)
        options: dict[str, Any] = {
            "prebuilt_meta": _builder(seq_lens, num_value_heads).build(query_start_loc_of(seq_lens)),
            "initial_state": torch.zeros(len(seq_lens), num_value_heads, D, D),
            "output_final_state": True,
            "use_qk_l2norm_in_kernel": True,
        }
        return cls(inputs, options)

    def run(self, op: Callable[..., Any] = optimized_chunk_gated_delta_rule) -> object:
        return op(*self.inputs, **self.options)


def _recording_contest(every: int) -> Contest:
    """As many calls as there is one recording in, with what is written meanwhile."""

    def start() -> Pair:
        step, folder = _SmallPrefill.make(), tempfile.TemporaryDirectory()
        op = recorded(Recorder(RecordSettings(Path(folder.name), every=every)))

        def ours(folder: object = folder) -> None:  # which goes when nobody records into it any more
            for _ in range(every):
                step.run(op)

        def peer() -> None:
            for _ in range(every):
                step.run()

        return Pair(f"{every} calls, 1 recorded", ours, f"{every} calls", peer)

    return Contest(f"recording 1 in {every} calls of eager, 256 tokens, H 2, HV 4, against none", start)


def _no_recording_contest() -> Contest:
    """The way to the kernel through a layer that neither records nor has another core."""

    def start() -> Pair:
        step = _SmallPrefill.make()
        setattr(step.inputs[0], OF_LAYER, SimpleNamespace(prefill_core=None, call_recorder=None))

        def kernel(query: torch.Tensor) -> object:
            return step.run()

        through_layer = functools.partial(switched(kernel), query=step.inputs[0])
        nothing = functools.partial(switched(lambda query: None), query=step.inputs[0])
        with torch.inference_mode():
            added = min(timeit.repeat(nothing, number=10_000)) / 10_000
            whole = min(timeit.repeat(step.run, number=3)) / 3
        note = f"{added * 1e9:.0f} ns a call, {added / whole:.4%} of it"
        return Pair("eager, recording switched off", through_layer, "eager", step.run, note)

    return Contest("recording switched off, 256 tokens, H 2, HV 4, against no layer", start)


class _ScheduledDecodes:
    """A scheduler with running requests, which start anew before they get long.

    With `is_gathering`, it gathers after each step, the other ranks contributing what it does.
    """

    def __init__(
        self, engine: Callable[..., Engine], num_running: int, *, is_gathering: bool = False
    ) -> None:
        self.num_running = num_running
        self.is_gathering = is_gathering
        config = SchedulerConfig(
            num_blocks=2 * num_running * MOST_DECODED_TOKENS // 16,
            max_model_len=2 * MOST_DECODED_TOKENS,
            max_num_seqs=num_running + 1,  # a gate that is open
            max_num_batched_tokens=2**14,
        )
        self.engine = engine(
            config,
            asynchronous=False,
            clock=time.monotonic,
            structured_output_manager=StandInStructuredOutputManager(),
        )
        self._start()

    def _start(self) -> None:
        for i in range(self.num_running):
            request = RequestSpec(
                str(i), arrival_ms=0, segments=((SEED, 128),), max_tokens=MOST_DECODED_TOKENS
            )
            self.engine.add(request, RequestInput.of(request, 0, 0.0, keep_blocks=False))
        while len(self.engine.scheduler.running) < self.num_running:
            self.schedule()
            self.settle()

    def schedule(self) -> None:
        self.output = self.engine.scheduler.schedule()

    def settle(self) -> None:
        req_ids = list(self.output.num_scheduled_tokens)
        self.engine.update_from_output(self.output, ModelRunnerOutput(req_ids, [[1] for _ in req_ids]))
        if self.is_gathering:
            _gather([self])
        if self.engine.scheduler.running[0].num_tokens == MOST_DECODED_TOKENS:
            self.engine.abort(None)
            self._start()


CONTESTS = (
    *(
        _metadata_contest(num_seqs, peer)
        for num_seqs in (1, 64, 256)
        for peer in ("reference loops", "vllm-ascend")
    ),
    *(
        _real_builder_contest(num_seqs, is_vllm_included=is_vllm_included)
        for num_seqs in (64, 256)
        for is_vllm_included in (True, False)
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
    *(_schedule_contest(num_running) for num_running in (64, 256)),
    _policy_contest(64),
    *(_plugin_contest(num_running) for num_running in (64, 256)),
    _gather_contest(64),
    _recording_contest(100),
    _no_recording_contest(),
)


# Contests on an accelerator


def _op_contest(device: Device, num_seqs: int, num_tokens: int, implementation: str, peer: str) -> Contest:
    def start() -> Pair:
        function = load_fla_chunk_gated_delta_rule() if peer == "fla-core" else None
        batch = prefill_batch(device, num_seqs, num_tokens, H, HV)

        def ours() -> tuple[torch.Tensor, torch.Tensor]:
            return batch.prebuilt(implementation)

        def peers() -> tuple[torch.Tensor, torch.Tensor]:
            if function is None:
                return batch.prebuilt(peer)
            return batch.run(function, cu_seqlens=batch.cu_seqlens)

        with torch.inference_mode():
            check_agree(ours(), peers(), batch.bounds)
        return Pair(implementation, ours, peer if function is None else _fla_name(), peers)

    return Contest(f"{implementation}, {_of(num_seqs, num_tokens)}, against {peer}", start)


def _prebuilt_contest(device: Device, num_seqs: int, num_tokens: int, implementation: str) -> Contest:
    def start() -> Pair:
        batch = prefill_batch(device, num_seqs, num_tokens, H, HV)

        def ours() -> tuple[torch.Tensor, torch.Tensor]:
            return batch.prebuilt(implementation)

        def peers() -> tuple[torch.Tensor, torch.Tensor]:
            return batch.on_the_spot(implementation)

        with torch.inference_mode():
            for name, x, y in zip(("o", "final_state"), ours(), peers(), strict=True):
                if not torch.equal(x, y):
                    raise EquivalenceError(f"{name} differs with metadata that are built on the spot")
        return Pair(f"{implementation}, prebuilt", ours, f"{implementation}, on the spot", peers)

    return Contest(f"metadata prebuilt, {_of(num_seqs, num_tokens)}, against on the spot", start)


def _of(num_seqs: int, num_tokens: int) -> str:
    return f"{num_seqs} sequence{'s' * (num_seqs > 1)} of {num_tokens} tokens in all"


def _fla_name() -> str:
    # fla hands the call to FlashQLA where that is installed.
    with_backend = " with FlashQLA" if importlib.util.find_spec("flash_qla") else ""
    return f"fla-core {FLA_VERSION}{with_backend}"


def contests_on(device: Device) -> tuple[Contest, ...]:
    """What is compared on a device. On an NPU the peer of the fused path is our staged one."""
    if isinstance(device, LinalgDevice):
        return NATIVE_CONTESTS
    kind = device.torch_device.type
    if kind == "cpu":
        return CONTESTS
    pairs = (("fused", "fla-core"), ("staged", "fla-core")) if kind == "cuda" else (("fused", "staged"),)
    batches = [(num_seqs, tokens) for tokens in DEVICE_TOKENS for num_seqs in DEVICE_SEQUENCES]
    return (
        *(_op_contest(device, *batch, *pair) for pair in pairs for batch in batches),
        *(_prebuilt_contest(device, *batch, "fused") for batch in batches),
    )


# Output


_NOT_TIMED = (
    "staged and fused are not timed on a CPU: they run in Triton's interpreter there, whose speed says "
    "nothing; --device linalg, cuda or npu times them"
)

# One sequence as long as a step of 8192 tokens lets it be, of Qwen3-Next.
_TRAFFIC_BATCH = Batch((8192,), H, HV, D, D)


def _print(results: Sequence[Result], device_name: str) -> None:
    console = Console(width=None if sys.stdout.isatty() else 140)
    console.print(_times_table(results))
    on_cpu = device_name in ("cpu", "linalg")
    where = "CPU" if on_cpu else f"{device_name}, timed by events"
    console.print(f"medians of interleaved turns, {torch.get_num_threads()} threads, {where}")
    if device_name == "cpu":
        console.print(_NOT_TIMED)
    if not on_cpu:
        console.print("host: time until a call returns, as part of the time it takes on the device")
    batch = _TRAFFIC_BATCH
    console.print(
        "\nKiB a token that kernels load and store, whether or not a cache answers; from the shapes:\n"
        f"{batch.num_tokens} tokens of one sequence, H {batch.H}, HV {batch.HV}, K {batch.K}, V {batch.V}, "
        "bfloat16"
    )
    console.print(_traffic_table())


def _times_table(results: Sequence[Result]) -> Table:
    table = Table("benchmark", "ours", "peer", "times faster", "quartiles")
    for r in results:
        if r.skipped:
            table.add_row(r.name, "-", "-", "-", f"not run: {r.skipped}")
            continue
        low, median, high = r.ratio
        table.add_row(
            r.name,
            _time(r.ours_ms, r.our_host_ms),
            _time(r.peer_ms, r.peer_host_ms),
            f"{median:.3g}",
            f"{low:.3g} to {high:.3g}" + (f"; {r.note}" if r.note else ""),
        )
    return table


def _time(ms: float, host_ms: float | None) -> str:
    """Time of a call, and on an accelerator the host's share of it."""
    share = "" if host_ms is None else f", host {host_ms / ms:.0%}"
    return f"{ms:.3g} ms{share}"


def _traffic_table() -> Table:
    table = Table("", *(scheme.name for scheme in SCHEMES))
    columns = [bytes_per_token(scheme, _TRAFFIC_BATCH) for scheme in SCHEMES]
    for part in PARTS:
        table.add_row(part, *(f"{column[part] / 1024:.1f}" for column in columns))
    table.add_section()
    table.add_row("states", *(f"{state_bytes(column) / 1024:.1f}" for column in columns))
    table.add_row("all", *(f"{sum(column.values()) / 1024:.1f}" for column in columns))
    for column in table.columns[1:]:
        column.justify = "right"
    return table


def _traffic_report() -> dict[str, Any]:
    schemes = []
    for scheme in SCHEMES:
        parts = bytes_per_token(scheme, _TRAFFIC_BATCH)
        schemes.append(
            {
                "name": scheme.name,
                "source": scheme.source,
                "bytes_per_token": parts,
                "state_bytes_per_token": state_bytes(parts),
                "moves": [move._asdict() for move in scheme.moves(_TRAFFIC_BATCH)],
            }
        )
    return {"batch": dataclasses.asdict(_TRAFFIC_BATCH), "schemes": schemes}


def _plot(results: Sequence[Result], path: Path) -> None:
    """How many times faster each is, with quartiles, and the traffic of the schemes, written to `path`."""
    from matplotlib.figure import Figure

    measured = [r for r in results if not r.skipped][::-1]
    heights = [1 + 0.45 * len(measured), 1 + 0.45 * len(SCHEMES)]
    figure = Figure(figsize=(12, sum(heights)), layout="constrained")
    speed, traffic = figure.subplots(2, 1, height_ratios=heights)
    _plot_speed(speed, measured)
    _plot_traffic(traffic)
    figure.savefig(path)


def _plot_speed(axes: Any, measured: Sequence[Result]) -> None:
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


def _plot_traffic(axes: Any) -> None:
    names = [scheme.name for scheme in SCHEMES][::-1]
    columns = [bytes_per_token(scheme, _TRAFFIC_BATCH) for scheme in SCHEMES][::-1]
    left = np.zeros(len(columns))
    for part in PARTS:
        width = np.array([column[part] / 1024 for column in columns])
        axes.barh(names, width, left=left, label=part)
        left += width
    axes.set_xlabel("KiB a token that kernels load from device memory and store there, from the shapes")
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize="small")
