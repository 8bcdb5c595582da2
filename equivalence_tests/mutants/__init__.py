"""The bug museum: real bugs put back into our own code, and the suites that must find them.

A bug (`Bug`) is a change of one place of a source. `exhibit` puts each back, in a process of its own, and
runs the suites on it that it names (`suites.py`); and all of them on the code as it is, which they must pass.
On a command line: `ascend-twin mutants`. docs/museum.md has the table, and says how to add a bug.
"""

from .bug import AREAS, Absent, Bug
from .museum import ABSENT, BUGS
from .runner import Exhibition, MutantServer, Outcome, Verdict, exhibit

__all__ = [
    "ABSENT",
    "AREAS",
    "BUGS",
    "Absent",
    "Bug",
    "Exhibition",
    "MutantServer",
    "Outcome",
    "Verdict",
    "exhibit",
]
