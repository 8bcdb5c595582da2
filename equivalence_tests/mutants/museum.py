"""All bugs of the museum, and those that could not be brought here."""

from . import async_copies, balance, data_parallel, metadata, numerics, scheduler
from .bug import Absent, Bug

BUGS: tuple[Bug, ...] = (
    *metadata.BUGS,
    *numerics.BUGS,
    *async_copies.BUGS,
    *balance.BUGS,
    *scheduler.BUGS,
    *data_parallel.BUGS,
)

ABSENT = (
    Absent(
        ("fla#537",),
        "solve_tril of a random 64 x 64 matrix explodes",
        "is no mistake of a kernel: the matrix is outside of the domain. Our generator normalises keys and "
        "keeps beta in [0, 1], and has identical keys as its hardest case.",
    ),
    Absent(
        ("vllm#57104",),
        "two requests hold all blocks while they wait, and neither can run",
        "is in our code: the plain scheduler states that of vLLM 0.17.0, mistakes included. The scenario "
        "`two_loads_hold_all_blocks` shows it, and `known_defects.py` excuses it by name, and nothing else.",
    ),
    Absent(
        ("vllm#49439",),
        "two resumed streaming sessions hold all blocks, and neither can run",
        "is in our code, as the one before; the scenario is `two_sessions_hold_all_blocks`.",
    ),
)
