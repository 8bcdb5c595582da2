"""Bugs of data-parallel ranks: who enters which collective, and who knows of a wave."""

from .bug import Bug

_LOCKSTEP = "scheduler.lockstep"
_SUITES = ("lockstep at random", "lockstep waves", "lockstep exploration")

_GATHER = """        rows = yield self._collective(GATHER, *self.engine.scheduler.counts())
        self.engine.scheduler.observe([RankCounts(*row) for row in rows])
"""
_REDUCE = "        self.is_in_wave = yield from self._reduce(has_unfinished)\n"
_STEP = "        executed = self.engine.has_work() and self.engine.step()\n"


def _only(condition: str) -> str:
    """The gather, behind a condition."""
    return f"        if {condition}:\n" + "".join(f"    {line}" for line in _GATHER.splitlines(keepends=True))


BUGS = (
    Bug(
        "gather_inside_schedule",
        ("asc#11310",),
        "data parallel",
        "a rank is drained: it never schedules, and never comes to the gather inside",
        _LOCKSTEP,
        _STEP,
        _only("self.engine.has_work()") + _STEP,
        _SUITES,
    ),
    Bug(
        "gather_before_the_reduction",
        ("asc#11310",),
        "data parallel",
        "the end of a wave: ranks meet in different collectives, in one run of six",
        _LOCKSTEP,
        _REDUCE + _GATHER,
        _GATHER + _REDUCE,
        _SUITES,
    ),
    Bug(
        "gather_left_out_without_tokens",
        ("vllm#43547", "vllm#28224"),
        "data parallel",
        "a step of no token on one rank: it skips a collective that the others enter",
        _LOCKSTEP,
        _GATHER,
        _only("executed"),
        _SUITES,
    ),
    Bug(
        "cadence_depends_on_the_rank",
        ("vllm#45223", "vllm#52957"),
        "data parallel",
        "a rank has nothing left: it counts the steps to the next reduction in another way",
        _LOCKSTEP,
        "        self._step_in_wave += 1\n",
        "        self._step_in_wave += has_unfinished\n",
        _SUITES,
    ),
    Bug(
        "start_of_a_wave_is_not_told_to_all",
        ("vllm#39366",),
        "data parallel",
        "a rank is paused or aborts just as its request starts a wave: the others step alone",
        _LOCKSTEP,
        "            self._post(COORDINATOR, i, lambda rank=rank: rank.start_wave(wave))\n",
        "            if not (self.mail[CLIENT, i] or rank.inbox or rank.engine.has_work()):\n"
        "                self._post(COORDINATOR, i, lambda rank=rank: rank.start_wave(wave))\n",
        _SUITES,
    ),
    Bug(
        "request_of_the_last_wave_wakes_nobody",
        ("vllm#38009",),
        "data parallel",
        "a request arrives as its wave ends: the rank begins alone",
        _LOCKSTEP,
        'self.post("start_wave", self.current_wave)  # the client does not know',
        "pass  # the client does not know",
        _SUITES,
    ),
    Bug(
        "joins_a_wave_that_is_over",
        ("vllm#38009",),
        "data parallel",
        "news of a wave arrives after its end: the rank steps alone",
        _LOCKSTEP,
        "        if wave >= self.current_wave:\n            self.current_wave = wave\n            self.is_in",
        "        if True:\n            self.current_wave = max(self.current_wave, wave)\n"
        "            self.is_in",
        _SUITES,
    ),
    Bug(
        "end_of_a_pause_wakes_nobody",
        ("vllm#39366",),
        "data parallel",
        "a paused rank goes on with requests that nobody else knows of: it steps alone",
        _LOCKSTEP,
        "        if not self.is_in_wave and scheduler.has_unfinished_requests():\n",
        "        if False:\n",
        _SUITES,
    ),
)
