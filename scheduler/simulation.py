"""A data-parallel group under a workload, on a clock that only a cost model moves.

The schedulers are those that the suites check, in lockstep; nothing about them is modelled. What is modelled
is time: each step takes what `CostModel` says of the work that the schedulers put into it.
"""

import random
from array import array
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from ..reference.errors import invalid_argument
from .admission import make_policy
from .balance import BalanceScheduler
from .checks import check_int, check_type
from .config import SchedulerConfig
from .cost import CostModel, RankWork
from .lockstep import Lockstep
from .output import ModelRunnerOutput, SchedulerOutput
from .request import Request, RequestStatus, SamplingParams
from .traces import TraceRequest
from .workload import RequestSpec, mix_from_trace, prompt_token_ids

ROUTINGS = ("round_robin", "least_loaded", "skewed")
SKEWED_SHARE = 0.5
"""With skewed routing: the share of all requests that goes to rank 0; the others get the rest alike."""
TOKEN = 1


@dataclass(frozen=True)
class SimulationSetup:
    """What is simulated, but for the requests.

    Attributes:
        dp_size: ranks, >= 1.
        policy: text form, see `admission.make_policy`.
        cost: what a step takes.
        config: of each rank's scheduler.
        routing: "round_robin"; "least_loaded" (the fewest requests, a waiting one counting four times, as
            vLLM's load balancer; by what each rank has now, unlike vLLM, which is up to 100 ms late);
            "skewed" (rank 0 gets every second request at random, the others the rest alike).
        concurrency: closed loop: requests under way, at most; the next is sent as one ends. None is open
            loop: requests are sent at their arrival times.
        seed: of skewed routing.

    Raises:
        InvalidArgumentError: for a value that is not as above.
    """

    dp_size: int
    policy: str
    cost: CostModel
    config: SchedulerConfig
    routing: str = "round_robin"
    concurrency: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        check_int("dp_size", self.dp_size, 1)
        check_type("cost", self.cost, CostModel)
        check_type("config", self.config, SchedulerConfig)
        make_policy(self.policy, self.config.max_num_seqs)
        if self.routing not in ROUTINGS:
            invalid_argument("routing", repr(self.routing), f"one of {', '.join(ROUTINGS)}")
        if self.concurrency is not None:
            check_int("concurrency", self.concurrency, 1)
        check_int("seed", self.seed, 0)


@dataclass
class _Steps:
    """Columns of `SimulationResult.steps_*`, as they grow."""

    start_ms: array = field(default_factory=lambda: array("d"))
    parts_ms: array = field(default_factory=lambda: array("d"))
    is_open: array = field(default_factory=lambda: array("b"))
    by_rank: array = field(default_factory=lambda: array("d"))


@dataclass(frozen=True)
class SimulationResult:
    """What happened, step by step and request by request; all times in ms from the start.

    Attributes:
        setup: what was simulated.
        duration_ms: to the end of the last step.
        step_start_ms, step_ms: start and length of each step, `[steps]` float64.
        step_parts_ms: fixed, prefill_step, experts, slowest_prefill, slowest_decode of `StepCost`,
            `[steps, 5]` float64.
        step_is_open: whether the gate was open, `[steps]` bool.
        running, waiting: requests of each rank as the step was scheduled, `[steps, ranks]` int64.
        prefill_tokens, decode_requests: of each rank in the step, `[steps, ranks]` int64.
        rank_ms: what each rank took for itself, `[steps, ranks]` float64.
        rank: which rank a request went to, `[requests]` int64, in the order of the workload.
        prompt_tokens, output_tokens, num_preemptions, cached_tokens: of each request, `[requests]` int64.
        sent_ms, admitted_ms, first_token_ms, finished_ms: of each request, `[requests]` float64.
        itl_ms: every time between two tokens of one request, in order of their end, `[tokens]` float64.
    """

    setup: SimulationSetup
    duration_ms: float
    step_start_ms: np.ndarray
    step_ms: np.ndarray
    step_parts_ms: np.ndarray
    step_is_open: np.ndarray
    running: np.ndarray
    waiting: np.ndarray
    prefill_tokens: np.ndarray
    decode_requests: np.ndarray
    rank_ms: np.ndarray
    rank: np.ndarray
    prompt_tokens: np.ndarray
    output_tokens: np.ndarray
    num_preemptions: np.ndarray
    cached_tokens: np.ndarray
    sent_ms: np.ndarray
    admitted_ms: np.ndarray
    first_token_ms: np.ndarray
    finished_ms: np.ndarray
    itl_ms: np.ndarray


class _Engine:
    """A scheduler, and a model that says the same token for ever and takes no time."""

    def __init__(self, scheduler: BalanceScheduler, watch: "_Watch") -> None:
        self.scheduler = scheduler
        self.watch = watch

    def add_request(self, request: Request) -> None:
        self.scheduler.add_request(request)

    def abort(self, request_ids: Iterable[str]) -> None:
        self.scheduler.finish_requests(request_ids, RequestStatus.FINISHED_ABORTED)

    def has_work(self) -> bool:
        return self.scheduler.has_requests()

    def step(self) -> bool:
        scheduler = self.scheduler
        output = scheduler.schedule()
        requests = scheduler.requests
        self.watch.scheduled(scheduler, output)
        request_ids = list(output.num_scheduled_tokens)
        tokens = [[] if requests[i].is_prefill_chunk else [TOKEN] for i in request_ids]
        outputs = scheduler.update_from_output(output, ModelRunnerOutput(request_ids, tokens))
        self.watch.updated(outputs)
        return output.total_num_scheduled_tokens > 0


class _Watch:
    """What one rank does in a step, until it is collected."""

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        self.work = RankWork()
        self.running = self.waiting = 0
        self.admitted: list[str] = []
        self.preempted: list[str] = []
        self.tokens: list[str] = []
        self.finished: list[tuple[str, int]] = []

    def scheduled(self, scheduler: BalanceScheduler, output: SchedulerOutput) -> None:
        requests = scheduler.requests
        prefill_tokens = prefill_pairs = decode_requests = context_tokens = 0
        for request_id, count in output.num_scheduled_tokens.items():
            request = requests[request_id]
            end = request.num_computed_tokens
            if count == 1 and end > request.num_prompt_tokens:
                decode_requests += 1
                context_tokens += end
            else:
                prefill_tokens += count
                prefill_pairs += count * end - count * (count - 1) // 2
        self.work = RankWork(prefill_tokens, prefill_pairs, decode_requests, context_tokens)
        self.running, self.waiting = scheduler.get_request_counts()
        self.admitted = [data.req_id for data in output.scheduled_new_reqs]
        self.preempted = list(output.preempted_req_ids)

    def updated(self, outputs: dict) -> None:
        for output in outputs.values():
            for told in output.outputs:
                self.tokens.append(told.request_id)
                if told.finish_reason is not None:
                    self.finished.append((told.request_id, told.num_cached_tokens))


class Simulation:
    """Runs a workload to the last token.

    Args:
        setup: what is simulated.
        requests: the workload; open loop needs no order. Each must fit into the cache of a rank.

    Raises:
        InvalidArgumentError: for no requests, or one that is too long for `config`.
    """

    def __init__(self, setup: SimulationSetup, requests: Sequence[TraceRequest]) -> None:
        if not requests:
            invalid_argument("requests", "empty", "at least one request")
        self.setup = setup
        self.specs = mix_from_trace(requests).requests
        self._check_fit()
        self._rng = random.Random(setup.seed)
        self._now = 0.0
        self._watches = [_Watch() for _ in range(setup.dp_size)]
        self.lockstep = Lockstep([self._engine(rank) for rank in range(setup.dp_size)], log_size=1)
        order = range(len(self.specs))
        if setup.concurrency is None:
            order = sorted(order, key=lambda i: self.specs[i].arrival_ms)
        self._unsent = deque(order)
        self._num_under_way = 0
        self._num_sent = 0
        self._load = [0] * setup.dp_size
        n = len(self.specs)
        self._rank = np.zeros(n, np.int64)
        self._preemptions = np.zeros(n, np.int64)
        self._cached = np.zeros(n, np.int64)
        self._sent_ms, self._admitted_ms, self._first_ms, self._last_ms = (np.full(n, np.nan) for _ in "1234")
        self._itl = array("d")
        self._steps = _Steps()

    def _engine(self, rank: int) -> _Engine:
        setup = self.setup
        scheduler = BalanceScheduler(
            setup.config,
            policy=make_policy(setup.policy, setup.config.max_num_seqs),
            dp_rank=rank,
            dp_size=setup.dp_size,
            clock=lambda: self._now,
        )
        return _Engine(scheduler, self._watches[rank])

    def _check_fit(self) -> None:
        config = self.setup.config
        room = min(config.max_model_len, (config.num_blocks - 1) * config.block_size)
        for spec in self.specs:
            if spec.num_prompt_tokens + spec.max_tokens > room:
                invalid_argument(
                    f"request {spec.request_id}",
                    f"{spec.num_prompt_tokens} prompt and {spec.max_tokens} output tokens",
                    f"together at most {room}, by max_model_len and the blocks of a rank",
                )

    def run(self, advance: Callable[[int], object] = lambda num_finished: None) -> SimulationResult:
        """Run to the last token; `advance` is told how many more requests have finished."""
        while self._unsent or self._num_under_way:
            self._send()
            for watch in self._watches:
                watch.clear()
            is_open = self.lockstep.ranks[0].engine.scheduler.is_open
            if self.lockstep.step():
                advance(self._enter_step(is_open))
            else:
                self._now = max(self._now, self.specs[self._unsent[0]].arrival_ms)
        return self._result()

    def _send(self) -> None:
        concurrency = self.setup.concurrency
        while self._unsent:
            spec = self.specs[self._unsent[0]]
            if concurrency is None:
                if spec.arrival_ms > self._now:
                    return
            elif self._num_under_way == concurrency:
                return
            index = self._unsent.popleft()
            rank = self._route()
            self._rank[index] = rank
            # Open loop: it may have come in the middle of the step before.
            self._sent_ms[index] = self._now if concurrency is not None else spec.arrival_ms
            self._num_under_way += 1
            self._num_sent += 1
            self._load[rank] += 1
            self.lockstep.add_request(rank, _request(spec))

    def _route(self) -> int:
        dp_size = self.setup.dp_size
        if self.setup.routing == "round_robin":
            return self._num_sent % dp_size
        if self.setup.routing == "skewed":
            if dp_size == 1 or self._rng.random() < SKEWED_SHARE:
                return 0
            return self._rng.randrange(1, dp_size)
        running = [len(rank.engine.scheduler.running) for rank in self.lockstep.ranks]
        # Whoever does not run waits, or is about to.
        return min(range(dp_size), key=lambda r: 4 * (self._load[r] - running[r]) + running[r])

    def _enter_step(self, is_open: bool) -> int:
        """The clock moves, and requests get their tokens; returns how many finished."""
        cost = self.setup.cost.step([watch.work for watch in self._watches])
        steps, start = self._steps, self._now
        self._now = now = start + cost.total
        steps.start_ms.append(start)
        steps.parts_ms.extend(
            (cost.fixed, cost.prefill_step, cost.experts, cost.slowest_prefill, cost.slowest_decode)
        )
        steps.is_open.append(is_open)
        num_finished = 0
        first, last, itl = self._first_ms, self._last_ms, self._itl
        for rank, watch in enumerate(self._watches):
            work = watch.work
            steps.by_rank.extend(
                (watch.running, watch.waiting, work.prefill_tokens, work.decode_requests, cost.ranks[rank])
            )
            for request_id in watch.admitted:
                self._admitted_ms[int(request_id)] = start
            for request_id in watch.preempted:
                self._preemptions[int(request_id)] += 1
            for request_id in watch.tokens:
                index = int(request_id)
                before = last[index]
                if before == before:
                    itl.append(now - before)
                else:
                    first[index] = now
                last[index] = now
            for request_id, num_cached_tokens in watch.finished:
                self._cached[int(request_id)] = num_cached_tokens
            self._load[rank] -= len(watch.finished)
            num_finished += len(watch.finished)
        self._num_under_way -= num_finished
        return num_finished

    def _result(self) -> SimulationResult:
        dp_size, steps = self.setup.dp_size, self._steps
        by_rank = np.array(steps.by_rank).reshape(-1, dp_size, 5)
        parts = np.array(steps.parts_ms).reshape(-1, 5)
        running, waiting, prefill, decode = (by_rank[:, :, i].astype(np.int64) for i in range(4))
        return SimulationResult(
            setup=self.setup,
            duration_ms=self._now,
            step_start_ms=np.array(steps.start_ms),
            step_ms=parts.sum(1),
            step_parts_ms=parts,
            step_is_open=np.array(steps.is_open, bool),
            running=running,
            waiting=waiting,
            prefill_tokens=prefill,
            decode_requests=decode,
            rank_ms=by_rank[:, :, 4].copy(),
            rank=self._rank,
            prompt_tokens=np.array([spec.num_prompt_tokens for spec in self.specs]),
            output_tokens=np.array([spec.max_tokens for spec in self.specs]),
            num_preemptions=self._preemptions,
            cached_tokens=self._cached,
            sent_ms=self._sent_ms,
            admitted_ms=self._admitted_ms,
            first_token_ms=self._first_ms,
            finished_ms=self._last_ms,
            itl_ms=np.array(self._itl),
        )


def _request(spec: RequestSpec) -> Request:
    return Request(
        request_id=spec.request_id,
        prompt_token_ids=prompt_token_ids(spec),
        sampling_params=SamplingParams(max_tokens=spec.max_tokens),
        arrival_time=spec.arrival_ms / 1e3,
    )
