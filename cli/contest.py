"""What `ascend-twin bench` measures: calls that do the same work, and where they come from."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

Call = Callable[[], object]


class Pair(NamedTuple):
    """Two calls that do the same work, with their names, and what else there is to say of them.

    On a CPU `our_settle` and `peer_settle` run after each call, untimed: they make the next one possible.
    """

    ours: str
    our_call: Call
    peer: str
    peer_call: Call
    note: str = ""
    our_settle: Call | None = None
    peer_settle: Call | None = None


@dataclass(frozen=True)
class Contest:
    """A comparison to be made: `start` makes the calls, and raises UnavailableError without the peer."""

    name: str
    start: Callable[[], Pair]
