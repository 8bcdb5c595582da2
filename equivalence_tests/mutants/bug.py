"""What the museum keeps of a bug, and how it is put back."""

from dataclasses import dataclass

AREAS = ("metadata", "numerics", "async copies", "balance", "scheduler", "data parallel")


@dataclass(frozen=True)
class Bug:
    """A bug of somebody's, as a change of one place of our own sources.

    Attributes:
        name: of the mutant, for the command line.
        upstream: where it was reported, as "asc#11508"; asc is vllm-ascend, fla flash-linear-attention. Empty
            for a mistake that nobody has reported yet, but that a user of this package would make.
        area: one of `AREAS`.
        what: what goes wrong, and when; one line.
        module: where it is put back, below `ascend_twin`.
        old, new: what takes the place of what in the source of the module, where `old` is found exactly once.
        suites: which are run on it, names of `suites.SUITES`; one of them, at least, must find it.
    """

    name: str
    upstream: tuple[str, ...]
    area: str
    what: str
    module: str
    old: str
    new: str
    suites: tuple[str, ...]


@dataclass(frozen=True)
class Absent:
    """A bug that cannot be put back into our code.

    Attributes:
        upstream: where it was reported.
        what: what goes wrong, and when; one line.
        why: it is not here, and what speaks of it instead.
    """

    upstream: tuple[str, ...]
    what: str
    why: str
