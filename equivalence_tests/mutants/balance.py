"""Bugs of balance scheduling: its switch, its gate, and what it takes over from vLLM."""

from .bug import Bug

_GATE = ("balance gate truth table", "balance beside upstream", "balance counts", "lockstep at random")

BUGS = (
    Bug(
        "zero_switches_it_on",
        ("asc#5281",),
        "balance",
        'the environment variable is "0": any text is true',
        "optimized.vllm.settings",
        "    return word in _ON\n",
        "    return bool(value)\n",
        ("settings",),
    ),
    Bug(
        "gate_shuts_below_the_cap",
        ("asc#7611", "asc#8675"),
        "balance",
        "a rank runs one request less than it may: nobody is admitted anywhere, time to first token grows",
        "scheduler.admission",
        "for counts in gathered) != self.max_num_running_reqs",
        "for counts in gathered) < self.max_num_running_reqs - 1",
        _GATE,
    ),
    Bug(
        "gate_is_lost_in_an_upgrade",
        ("asc#7479",),
        "balance",
        "a new release of upstream: the copied schedule() no longer asks the gate",
        "scheduler.balance",
        "admission_gate=lambda: self.is_open",
        "admission_gate=lambda: True",
        _GATE,
    ),
    Bug(
        "expects_another_result_of_schedule",
        ("asc#13275",),
        "balance",
        "a new release of upstream: what schedule() returns is unpacked as it was before",
        "scheduler.balance",
        "        output = super().schedule()\n",
        "        output, _ = super().schedule()\n",
        _GATE,
    ),
    Bug(
        "async_scheduling_is_not_covered",
        ("asc#7479",),
        "balance",
        "async scheduling: the scheduler behind the gate is the synchronous one",
        "scheduler.balance",
        "class AsyncBalanceScheduler(BalanceScheduler, AsyncUpstreamScheduler)",
        "class AsyncBalanceScheduler(BalanceScheduler)",
        _GATE,
    ),
    Bug(
        "gate_counts_waiting_as_running",
        (),
        "balance",
        "ranks with a queue: what is gathered is not what runs",
        "scheduler.gathered_admission",
        "            running=len(running),\n",
        "            running=len(running) + waiting,\n",
        _GATE,
    ),
    Bug(
        "illegal_combination_starts",
        ("asc#8975",),
        "balance",
        "ranks with different policies or caps: they choose different collectives",
        "scheduler.lockstep",
        "            if cap != first.admission_cap or policy != first.admission_policy:\n",
        "            if False:\n",
        ("lockstep refusals", "lockstep at random"),
    ),
)
