"""Mutants that survive because they change nothing that anybody could see; see mutation_testing.py."""

from collections.abc import Mapping
from typing import NamedTuple


class Explained(NamedTuple):
    """A change that is none.

    Attributes:
        was, now: the lines that differ, as `mutation_testing.Mutant` has them.
        why: the reason that no property can tell them apart.
    """

    was: str
    now: str
    why: str


_COUNTING = "self._counting = np.arange(max_num_seqs + 1, dtype=np.int32)"
_WIDER = "its values are added into a table of int32, and are the same; they are int32 to save a conversion"
_FALSY = "nobody else reads it, and all that is asked is whether it is true"
_LONGER = "only the first N + 1, N <= max_num_seqs, are ever read: it is memory that is wasted, a few bytes"

EXPLAINED: Mapping[str, tuple[Explained, ...]] = {
    "optimized/gdn/metadata.py": (
        Explained(_COUNTING, "self._counting = np.arange(max_num_seqs + 1, dtype=None)", _WIDER),
        Explained(_COUNTING, "self._counting = np.arange(max_num_seqs + 1, )", _WIDER),
        Explained(_COUNTING, "self._counting = np.arange(max_num_seqs + 2, dtype=np.int32)", _LONGER),
        Explained(
            "self._sequences = np.tile(np.arange(max_num_seqs + 1), (3, 1))",
            "self._sequences = np.tile(np.arange(max_num_seqs + 2), (3, 1))",
            _LONGER,
        ),
        Explained(
            "self._sequences = np.tile(np.arange(max_num_seqs + 1), (3, 1))",
            "self._sequences = np.tile(np.arange(max_num_seqs + 1), (3, 2))",
            _LONGER,
        ),
    ),
    "scheduler/lockstep.py": (
        Explained("Message = Callable[[], None]", "Message = None", "only annotations read it"),
        Explained(
            "self._step_in_wave += 1",
            "self._step_in_wave -= 1",
            "all that is asked of it is whether the interval divides it, as it then does its negative",
        ),
        Explained(
            "if wave > self.current_wave:",
            "if wave >= self.current_wave:",
            "a wave that is equal is set to what it is, and is not less than itself either",
        ),
        Explained(
            "self._failure: LockstepError | None = None", 'self._failure: LockstepError | None = ""', _FALSY
        ),
        Explained("self._client_knows_wave = False", "self._client_knows_wave = None", _FALSY),
    ),
}
"""By module, as in `mutation_testing.SUITES`."""
