"""Replaying fixtures: what is found when a recorded case is compared with the truth, and run again."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from ..fixtures.store import Fixture
from .tolerances import Errors

RECORDED = "recorded"
"""The subject of a replay of what a file holds; of one that runs something again, "eager on cpu"."""

BLAMES = ("", "inputs", "metadata", "arithmetic", "state", "memory", "scheduler", "collective")


@dataclass(frozen=True)
class Finding:
    """One comparison.

    Attributes:
        stage: what was compared: "inputs", "metadata", a stage of the op ("l2norm" ... "chunk_fwd_o"), "o"
            and "final_state" of the whole op; "schedule", "output" or "collective" of a trace.
        name: of the field or tensor.
        passed: whether it is as it must be.
        message: one line: what, expected, got, where.
        place: of the worst value: sequence, chunk, token, head; step, request, rank. Only what is known.
        errors, limit: of a tensor; None where the comparison is exact.
    """

    stage: str
    name: str
    passed: bool
    message: str
    place: Mapping[str, int] = field(default_factory=dict)
    errors: Errors | None = None
    limit: Errors | None = None


class Heat(NamedTuple):
    """Errors over chunks and heads, for a picture.

    Attributes:
        name: of the tensor.
        chunks: (sequence, chunk in sequence) of each row.
        values: `[chunks][heads]`, the error of each as a part of its limit; infinity for NaN and Inf.
        first: (row, head) of the first chunk over its limit, in order; None if there is none.
    """

    name: str
    chunks: list[tuple[int, int]]
    values: list[list[float]]
    first: tuple[int, int] | None


@dataclass(frozen=True)
class Replay:
    """What came out of replaying a fixture.

    Attributes:
        path: of its file.
        kind: of the fixture.
        subject: what was compared with the truth: `RECORDED`, or an implementation and its device, as
            "eager on cpu".
        findings: in order of the stages.
        blame: what went wrong, one of `BLAMES`; "" if nothing did.
        diagnosis: the first wrong stage, the worst place and what it looks like, in plain words; "" if all
            is well.
        heat: errors over chunks and heads; None where there are none.
        details: more to show, by kind: JSON values.
    """

    path: str
    kind: str
    subject: str
    findings: tuple[Finding, ...]
    blame: str = ""
    diagnosis: str = ""
    heat: Heat | None = None
    details: Mapping[str, Any] = field(default_factory=dict)

    @property
    def passed(self) -> bool:
        """Whether everything is as it must be."""
        return all(finding.passed for finding in self.findings)

    @property
    def first(self) -> Finding | None:
        """The first finding that differs."""
        return next((finding for finding in self.findings if not finding.passed), None)


def is_recorded(fixture: Fixture) -> bool:
    """Whether a fixture holds results of whoever recorded it; if not, it can only be run again."""
    return not fixture.has_tensors or any("." in name for name in fixture.tensors)


def replay_fixture(
    fixture: Fixture, *, path: str = "", device: str = "cpu", implementation: str | None = None
) -> Replay:
    """Compare a recorded case with the truth, or run it again and compare that.

    Args:
        fixture: the case.
        path: of its file, for messages.
        device: where it is run again: cpu, linalg (native code of what the Ascend compiler makes of kernels),
            cuda, npu (with an index, as cuda:1), or sim, the simulated accelerator. Kinds gdn and metadata.
        implementation: what is run again: "reference" or a name in `optimized.gdn.IMPLEMENTATIONS`; for a
            trace as in `replay_traces.replay_trace`. Default: nothing; what was recorded is compared, or,
            where nothing was, the default of the device.

    Returns:
        What was found. A scheduler's trace is always run again, beside what was recorded.

    Raises:
        InvalidArgumentError: for a name that there is not, or a case whose tensors or config do not fit.
        UnavailableError: for a device or an implementation that cannot be had here.
        LoweringError: on linalg, for a kernel that there is no native code of.
    """
    if fixture.has_tensors:
        from .replay_gdn import replay_gdn as replay
    else:
        from .replay_traces import replay_trace as replay
    return replay(fixture, path=path, device=device, implementation=implementation)
