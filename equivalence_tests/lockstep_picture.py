"""Pictures of what ranks enter together, drawn from what they entered: Mermaid sequence diagrams.

`python -m ascend_twin.equivalence_tests.lockstep_picture docs/lockstep.md` draws those of that file again.
"""

import re
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from ..reference.errors import LockstepError
from ..scheduler.admission import AnyRankAtCap, RankCounts
from ..scheduler.balance import BalanceScheduler
from ..scheduler.collectives import FORWARD, GATHER, Collective
from ..scheduler.config import SchedulerConfig
from ..scheduler.lockstep import Lockstep
from .lockstep_engines import TinyEngine
from .lockstep_mutants import misplaced

SCENES: Mapping[str, tuple[int, int]] = {
    "right": (2, 1),
    "in schedule()": (3, 1),
    "in the engine's step": (2, 1),
    "before the idle check": (2, 1),
}
"""Where the gather stands, of PLACES in lockstep_mutants.py; and the tokens that each rank is asked for."""

_BLOCK = re.compile(r"(<!-- picture: (.+?) -->\n```mermaid\n).*?(```\n)", re.DOTALL)


def run_scene(place: str, tokens: Sequence[int], interval: int = 2) -> Lockstep:
    """A group after it has come to rest, or to a deadlock; rank i has served one request of `tokens[i]`."""
    config = SchedulerConfig(num_blocks=16, block_size=4, max_num_seqs=2, max_model_len=16)
    engines = [
        TinyEngine(BalanceScheduler(config, policy=AnyRankAtCap(2), dp_rank=rank, dp_size=len(tokens)))
        for rank in range(len(tokens))
    ]
    group = misplaced(place)(engines, finish_check_interval=interval, log_size=None)
    for rank, count in enumerate(tokens):
        group.add_request(rank, (f"r{rank}", count))
    with suppress(LockstepError):
        while group.step():
            pass
    return group


def draw(logs: Sequence[Sequence[Collective]], waiting: Mapping[int, Collective]) -> str:
    """A sequence diagram.

    Args:
        logs: what each rank entered, whole.
        waiting: what ranks wait in for ever, by rank; empty where all is well.
    """
    ranks = range(len(logs))
    lines = ["sequenceDiagram", *(f"    participant r{rank} as rank {rank}" for rank in ranks)]
    everybody = f"r0,r{len(logs) - 1}"
    num_complete = min(len(log) - (rank in waiting) for rank, log in enumerate(logs))
    for entered in zip(*(list(log)[:num_complete] for log in logs), strict=True):
        lines.append(f"    Note over {everybody}: {entered[0]}: {' and '.join(map(_row, entered))}")
    if not waiting:
        lines.append(f"    Note over {everybody}: all are idle")
        return "\n".join(lines) + "\n"
    for rank in ranks:
        where = f"waits in {waiting[rank]}" if rank in waiting else "is idle"
        lines.append(f"    Note over r{rank}: {where}")
    waits = sorted(waiting)
    for rank in waits:
        lines.append(f"    r{rank}--xr{(rank + 1) % len(logs)}: for ever")
    return "\n".join(lines) + "\n"


def _row(collective: Collective) -> str:
    """What a rank contributes, in a word or two."""
    if collective.name == FORWARD:
        return "a dummy" if collective.row[0] else "a batch"
    if collective.name == GATHER:
        return f"{RankCounts(*collective.row).running} running"
    return "some left" if collective.row[0] else "none left"


def draw_again(text: str) -> str:
    """A Markdown text with its pictures drawn from new runs."""

    def drawn(block: re.Match[str]) -> str:
        group = run_scene(block[2], SCENES[block[2]])
        return block[1] + draw(group.transport.logs, group.transport.waiting) + block[3]

    return _BLOCK.sub(drawn, text)


if __name__ == "__main__":
    for name in sys.argv[1:]:
        path = Path(name)
        path.write_text(draw_again(path.read_text(encoding="utf-8")), encoding="utf-8")
