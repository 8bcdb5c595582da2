# pyright: reportMissingImports=false
"""Real data-parallel engines of vLLM in one process: their own loop, in lockstep, without a clock.

Each rank is a `DPEngineCoreProc` whose `run_busy_loop` runs in a thread of its own, one thread at a time.
Only what would leave the process is replaced: sockets by queues, the process group and its store by objects
that park a rank until all others have come, the coordinator by its few rules (docs/lockstep.md). The forward
pass of the stub executor is a collective, as that of a mixture of experts is. So ranks that enter different
collectives, or wait for one that is idle, are seen at once; no timeout decides about it.
"""

import copy
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from queue import Empty
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from vllm.engine.arg_utils import EngineArgs
from vllm.sampling_params import SamplingParams
from vllm.v1.engine import EngineCoreRequest, EngineCoreRequestType, core
from vllm.v1.engine.utils import EngineZmqAddresses

from ..reference.errors import LockstepError
from ..scheduler.workload import RequestSpec, prompt_token_ids
from .vllm_stub_executor import StubExecutor
from .vllm_stub_platform import async_scheduling_allowed

FORWARD, REDUCE, GATHER, STORE = "forward", "all_reduce", "all_gather", "store"
_MOST_ADVANCES = 50_000  # without anything that a client does
_PATIENCE_S = 60.0  # for a thread to come to its next collective; only a defect of this module needs it


class _Closed(BaseException):
    """Ends the thread of a rank."""


class Rank:
    """The thread of a rank, and what it waits for.

    Attributes:
        engine: the real one.
        mail: what its clients and the coordinator have sent, and it has not read.
        waits_for: name and contribution of the collective it has entered; a key of the store; None when idle.
    """

    def __init__(self, index: int) -> None:
        self.index = index
        self.engine: Any = None
        self.mail: deque[Any] = deque()
        self.waits_for: tuple[str, Any] | None = None
        self.error: BaseException | None = None
        self.has_ended = False
        self._answer: Any = None
        self._may_run = threading.Semaphore(0)
        self._is_parked = threading.Semaphore(0)
        self._is_closing = False
        self._thread = threading.Thread(target=self._run, name=f"rank {index}", daemon=True)

    # What the thread calls.

    def _run(self) -> None:
        self._may_run.acquire()
        try:
            self.engine.run_busy_loop()
        except _Closed:
            pass
        except BaseException as error:  # a SystemExit, too
            self.error = error
        self.has_ended = True
        self._is_parked.release()

    def park(self, waits_for: tuple[str, Any] | None) -> Any:
        """Wait until somebody resumes this rank; what they answer."""
        self.waits_for = waits_for
        self._is_parked.release()
        self._may_run.acquire()
        self.waits_for = None
        if self._is_closing:
            raise _Closed
        return self._answer

    # What others call.

    def start(self) -> None:
        """Let it run until it waits for the first time."""
        self._thread.start()
        self.resume()

    def resume(self, answer: Any = None) -> None:
        """Let it run until it waits again.

        Raises:
            LockstepError: when its loop has ended, from what ended it.
        """
        self._answer = answer
        self._may_run.release()
        if not self._is_parked.acquire(timeout=_PATIENCE_S):
            raise LockstepError(f"rank {self.index} neither waits nor ends")
        if self.error is not None:
            raise LockstepError(f"rank {self.index} ended: {self.error!r}") from self.error

    def close(self) -> None:
        """End the thread."""
        if not self.has_ended and self._thread.is_alive():
            self._is_closing = True
            self._may_run.release()
            self._thread.join(_PATIENCE_S)


class _Mailbox:
    """What the engine takes for its input queue."""

    def __init__(self, rank: Rank) -> None:
        self.rank = rank

    def empty(self) -> bool:
        return not self.rank.mail

    def get(self, block: bool = True) -> Any:
        while not self.rank.mail:
            if not block:
                raise Empty
            self.rank.park(None)
        return self.rank.mail.popleft()

    def get_nowait(self) -> Any:
        return self.get(block=False)

    def put_nowait(self, item: Any) -> None:
        self.rank.mail.append(item)


class _Group(dist.ProcessGroup):
    """What the engine takes for its process group: the collectives that vLLM and the plugin use."""

    def __init__(self, rank: Rank, size: int) -> None:
        super().__init__(rank.index, size)  # pyright: ignore[reportCallIssue]  # torch declares another
        self._rank = rank

    # torch calls it so; its stubs know other ways, too.
    def allreduce(self, tensors: Any, opts: Any = None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        op = dist.ReduceOp.SUM if opts is None else opts.reduceOp
        gathered = torch.stack(self._rank.park((REDUCE, tensors[0].clone())))
        tensors[0].copy_(gathered.sum(0) if op == dist.ReduceOp.SUM else gathered.amax(0))
        return _Done()

    def allgather(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, output_tensors: Any, input_tensors: Any, opts: Any = None
    ) -> Any:
        rows = self._rank.park((GATHER, input_tensors[0].clone()))
        for output, row in zip(output_tensors[0], rows, strict=True):
            output.copy_(row)
        return _Done()


class _Done(dist.Work):
    """A collective that was made."""

    def wait(self, timeout: Any = None) -> bool:
        return True


class _Store:
    """What the engine takes for the store of its process group."""

    def __init__(self, rank: Rank, values: dict[str, bytes]) -> None:
        self._rank = rank
        self._values = values

    def set(self, key: str, value: str) -> None:
        self._values[key] = value.encode()

    def get(self, key: str) -> bytes:
        return self._values[key]

    def wait(self, keys: Sequence[str], timeout: Any = None) -> None:
        for key in keys:
            while key not in self._values:
                self._rank.park((STORE, key))


class _Engine(core.DPEngineCoreProc):
    """The real engine without its sockets."""

    def __init__(self, config: Any, rank: Rank, group: Any, store: Any) -> None:
        self._rank, self._group, self._store = rank, group, store
        super().__init__(
            vllm_config=config,
            local_client=True,
            handshake_address="",
            executor_class=StubExecutor,
            log_stats=True,
        )
        self.input_queue = _Mailbox(rank)
        self.model_executor.on_forward = lambda: rank.park((FORWARD, None))

    @contextmanager
    def _perform_handshakes(self, *args: Any, **kwargs: Any) -> Iterator[Any]:
        yield EngineZmqAddresses(inputs=[], outputs=[""], coordinator_input="", coordinator_output="")

    def _init_data_parallel(self, vllm_config: Any) -> None:
        self.dp_rank = vllm_config.parallel_config.data_parallel_rank
        self.dp_size = vllm_config.parallel_config.data_parallel_size
        self.dp_group, self.dp_store = self._group, self._store

    def process_input_sockets(self, inputs: Any, coordinator: Any, identity: Any, ready: Any) -> None:
        ready.set()

    def process_output_sockets(self, *args: Any) -> None:
        """Whoever drives the group reads the queue."""


def _nothing() -> None:
    pass


def engine_config(model: Any, *, is_async: bool = False, **arguments: Any) -> Any:
    """A configuration of vLLM for ranks in one process.

    Args:
        model: a folder of `vllm_stub.write_model`.
        is_async: whether to schedule a step before the tokens of the last one are known.
        arguments: further ones of vLLM's EngineArgs.
    """
    with async_scheduling_allowed():
        return EngineArgs(
            model=str(model),
            skip_tokenizer_init=True,
            dtype="float32",
            distributed_executor_backend="mp",  # 0.17.0 takes no class together with async scheduling
            async_scheduling=is_async,
            **arguments,
        ).create_engine_config()


class EngineGroup:
    """Engines in lockstep, their clients, and their coordinator.

    Args:
        config: of `engine_config`; its data_parallel_size is the number of ranks.
        on_outputs: called with what a rank tells its clients, as it comes: rank, outputs by client.

    Attributes:
        ranks: one each.
        collectives: of those that were completed, the names in order.
        num_steps: forward passes so far, the same on all ranks.
        on_gather: called with the contributions, before any rank has seen those of the others.
        answers: of utilities that were called: rank, and what came.
    """

    def __init__(self, config: Any, on_outputs: Callable[[int, dict[int, Any]], None]) -> None:
        size = config.parallel_config.data_parallel_size
        self.ranks = [Rank(index) for index in range(size)]
        self.on_outputs = on_outputs
        self.collectives: list[str] = []
        self.num_steps = 0
        self.on_gather: Callable[[list[Any]], None] = lambda rows: None
        self.answers: list[tuple[int, Any]] = []
        self._num_advances = 0
        self._wave = 0
        self._is_running = False
        self._values: dict[str, bytes] = {}
        for rank in self.ranks:
            own = copy.deepcopy(config)
            own.parallel_config.data_parallel_rank = rank.index
            own.parallel_config.data_parallel_rank_local = rank.index
            # What vLLM does for a process that keeps its one engine: there will be many in this one.
            with mock.patch.multiple(core, freeze_gc_heap=_nothing, enable_envs_cache=_nothing):
                rank.engine = _Engine(own, rank, _Group(rank, size), _Store(rank, self._values))
        for rank in self.ranks:
            rank.start()

    def __enter__(self) -> "EngineGroup":
        return self

    def __exit__(self, *args: Any) -> None:
        for rank in self.ranks:
            rank.close()
            rank.engine.structured_output_manager.clear_backend()

    @property
    def schedulers(self) -> list[Any]:
        """One a rank."""
        return [rank.engine.scheduler for rank in self.ranks]

    # The clients.

    def add_request(self, rank: int, spec: RequestSpec) -> None:
        """A client sends a request to a rank, and wakes all ranks if it takes them for idle."""
        engine = self.ranks[rank].engine
        request = engine.preprocess_add_request(_request(spec, self._wave))
        self._send(rank, EngineCoreRequestType.ADD, request)
        if not self._is_running:
            self._start_wave()

    def abort(self, rank: int, request_ids: Sequence[str]) -> None:
        """A client no longer wants these."""
        self._send(rank, EngineCoreRequestType.ABORT, list(request_ids))

    def call(self, rank: int, method: str, *args: Any) -> None:
        """A client calls a utility of an engine; the answer comes to `answers`."""
        self._send(rank, EngineCoreRequestType.UTILITY, (0, len(self.answers), method, args))

    def _send(self, rank: int, kind: Any, content: Any) -> None:
        self._num_advances = 0
        self.ranks[rank].mail.append((kind, content))

    # The coordinator. It tells all ranks that a wave starts, those that have its requests, too.

    def _start_wave(self) -> None:
        self._is_running = True
        for rank in self.ranks:
            rank.mail.append((EngineCoreRequestType.START_DP_WAVE, (self._wave, -1)))

    def _hear(self, outputs: Any) -> None:
        """What an engine tells the coordinator."""
        if outputs.start_wave is not None and outputs.start_wave >= self._wave and not self._is_running:
            self._wave = outputs.start_wave
            self._start_wave()
        if outputs.wave_complete is not None and outputs.wave_complete >= self._wave:
            self._wave = outputs.wave_complete + 1
            self._is_running = False

    # The ranks.

    def advance(self) -> bool:
        """Wake who has mail, and complete one collective; False when nobody has anything to do.

        Raises:
            LockstepError: for ranks in different collectives, for one that waits for an idle one, and when
                this does not come to an end.
        """
        self._num_advances += 1
        if self._num_advances > _MOST_ADVANCES:
            raise LockstepError(f"no end after {self.num_steps} steps")
        for rank in self.ranks:
            if rank.waits_for is None and rank.mail:
                rank.resume()
        self._collect()
        if told := [rank for rank in self.ranks if self._is_told(rank)]:
            for rank in told:
                rank.resume()
            self._collect()
            return True
        places = [rank.waits_for and rank.waits_for[0] for rank in self.ranks]
        if None not in places:
            self._complete(places)
            return True
        if any(rank.waits_for is None and rank.mail for rank in self.ranks):
            return True
        if any(places):
            waits = ", ".join(f"rank {i} in {place or 'no collective'}" for i, place in enumerate(places))
            raise LockstepError(f"for ever, after {self.num_steps} steps: {waits}")
        return False

    def run(self) -> None:
        """Advance until nobody has anything to do."""
        while self.advance():
            pass

    def _is_told(self, rank: Rank) -> bool:
        """Whether a rank waits for what somebody has set in the store meanwhile."""
        return rank.waits_for is not None and rank.waits_for[0] == STORE and rank.waits_for[1] in self._values

    def _complete(self, places: list[str | None]) -> None:
        if len(set(places)) > 1 or STORE in places:
            entered = ", ".join(f"rank {i} in {place}" for i, place in enumerate(places))
            raise LockstepError(f"different collectives after {self.num_steps} steps: {entered}")
        name = str(places[0])
        given = [rank.waits_for[1] for rank in self.ranks if rank.waits_for]
        self.collectives.append(name)
        self.num_steps += name == FORWARD
        if name == GATHER:
            self.on_gather(given)
        for rank in self.ranks:
            rank.resume(given)
        self._collect()

    def _collect(self) -> None:
        """Give what the engines said to whom it is for."""
        for rank in self.ranks:
            queue = rank.engine.output_queue
            while not queue.empty():
                client, outputs = queue.get_nowait()
                if client == -1:
                    self._hear(outputs)
                elif outputs.utility_output is not None:
                    self.answers.append((rank.index, outputs.utility_output))
                else:
                    self.on_outputs(rank.index, {client: outputs})


def _request(spec: RequestSpec, wave: int) -> EngineCoreRequest:
    return EngineCoreRequest(
        request_id=spec.request_id,
        prompt_token_ids=prompt_token_ids(spec),
        mm_features=None,
        sampling_params=sampling_params(spec),
        pooling_params=None,
        arrival_time=time.time(),
        lora_request=None,
        cache_salt=spec.cache_salt,
        data_parallel_rank=None,
        current_wave=wave,
        priority=spec.priority,
    )


def sampling_params(spec: RequestSpec) -> SamplingParams:
    """How much a request may say, and what ends it."""
    return SamplingParams(
        max_tokens=spec.max_tokens,
        min_tokens=spec.min_tokens,
        stop_token_ids=list(spec.stop_token_ids),
        skip_reading_prefix_cache=spec.skip_reading_prefix_cache,
        ignore_eos=True,
        temperature=0.0,
    )
