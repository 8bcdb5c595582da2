"""The files of fixtures/cases/{gdn,metadata,traces}: what each shows, and how each is made again.

    python -m ascend_twin.equivalence_tests.recorded_cases FOLDER       writes all of them to FOLDER
    python -m ascend_twin.equivalence_tests.recorded_cases --docs       prints docs/bugs.md

A case comes from a seed, so the same bytes are written each time; tensors of floats may differ in their last
bit on another CPU.
"""

import argparse
import textwrap
from dataclasses import replace
from pathlib import Path

from ..fixtures.store import About, Fixture, write_fixture
from . import recorded_gdn_cases, recorded_metadata_cases, recorded_trace_cases
from .known_bugs import BUGS, PARTS, Bug, RecordedCase

CASES = {
    case.path: case
    for module in (recorded_gdn_cases, recorded_metadata_cases, recorded_trace_cases)
    for case in module.CASES
}
"""By path in fixtures/cases."""

MAX_BYTES_OF_ONE, MAX_BYTES_OF_ALL = 100_000, 2_000_000


def bug_of(case: RecordedCase) -> Bug:
    """The bug that a case shows: the one whose name its file begins with."""
    (bug,) = (bug for bug in BUGS if Path(case.path).name.startswith(bug.name))
    return bug


def cases_of(bug: Bug) -> list[RecordedCase]:
    """The files that show a bug."""
    return [case for case in CASES.values() if bug_of(case) is bug]


def make(case: RecordedCase) -> Fixture:
    """The fixture of a case."""
    bug = bug_of(case)
    origin = {"made_by": "equivalence_tests/recorded_cases.py", "is_wrong": case.wrong is not None}
    about = About(case.title, bug.paragraph, bug.upstream)
    return replace(case.make(), about=about, origin=origin)


def write_cases(folder: Path) -> None:
    """Write all files, in the folders of their kinds."""
    for case in CASES.values():
        path = folder / case.path
        path.parent.mkdir(parents=True, exist_ok=True)
        write_fixture(path, make(case))


def docs() -> str:
    """docs/bugs.md."""
    lines = [_START.format(num_bugs=len(BUGS), num_files=len(CASES))]
    for part, heading in PARTS.items():
        lines += [f"## {heading}", ""]
        for bug in BUGS:
            if bug.part == part:
                lines += [*_lines(bug), ""]
    return "\n".join(lines)


_START = """\
# Known bugs

<!-- Written by `python -m ascend_twin.equivalence_tests.recorded_cases --docs`; change known_bugs.py. -->

{num_bugs} bugs, nearly all of which others had, in vLLM, vllm-ascend, flash-linear-attention and elsewhere:
what they look like, what it takes, why, and what catches them here. {num_files} files of `fixtures/cases/`
show them, beside scenarios of `fixtures/cases/scheduler/`; all are replayed in every run of the tests. To
see one:

    ascend-twin replay fixtures/cases/gdn/asc-11508_state_counted_twice_wrong.safetensors
    ascend-twin replay --implementation eager fixtures/cases/gdn/asc-11508_state_counted_twice.safetensors

A file whose name ends in `_wrong` holds what an implementation with the bug gave: a replay says where that
went wrong ([Replay](replay.md) explains what it says). The others hold what it takes to show the bug: any
right implementation passes them. [The museum](museum.md) puts the same bugs back into our own code, and
`fixtures/cases/vllm/` holds recordings of real runs of vLLM.

Numbers are issues and pull requests: asc is vllm-project/vllm-ascend, vllm is vllm-project/vllm, fla is
fla-org/flash-linear-attention, flashinfer is flashinfer-ai/flashinfer, sglang and sgl-kernel-npu are of
sgl-project. All words are ours. How a cause is known is said of each; of some, an excerpt of the thread is
all that was read.
"""


def _lines(bug: Bug) -> list[str]:
    words = bug.name.partition("_")[2] if bug.upstream else bug.name
    heading = (words or "dtypes_of_state_and_beta").replace("_", " ")
    files = [f"`{case.path}`" for case in cases_of(bug)] + [f"`scheduler/{x}.json`" for x in bug.scenarios]
    tests = [f"`{name.partition('::')[2]}`" for name in bug.tests]
    numbers = ", ".join(bug.upstream) or "no issue"
    said = {
        "Symptom.": bug.symptom,
        "Trigger.": bug.trigger,
        f"Cause ({bug.known}).": bug.cause,
        "Caught by.": bug.caught_by,
        "Files.": f"{', '.join(files)}." if files else f"None. {bug.no_file}",
        "Tests.": f"{', '.join(tests)}.",
    }
    heading = f"{heading[0].upper()}{heading[1:]}"
    return [f"### {heading} ({numbers})", "", *(_wrapped(f"- **{x}** {text}") for x, text in said.items())]


def _wrapped(item: str) -> str:
    return textwrap.fill(item, 120, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)


def main() -> None:
    """Write the files, or print the docs."""
    parser = argparse.ArgumentParser(description="Makes the recorded cases again.")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("folder", nargs="?", type=Path, help="where the files go")
    what.add_argument("--docs", action="store_true", help="print docs/bugs.md")
    arguments = parser.parse_args()
    if arguments.docs:
        print(docs(), end="")
    else:
        write_cases(arguments.folder)


if __name__ == "__main__":
    main()
