# pyright: reportMissingImports=false
"""Traces of real engines of vLLM: their schedulers, and the collectives of their ranks.

    python -m ascend_twin.equivalence_tests.vllm_traces FOLDER

writes those that are in `fixtures/cases/vllm`, of the vLLM that is installed.
"""

import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from unittest import mock

from ..fixtures.record import RECORD_VARIABLE, Recorder, RecordSettings
from ..fixtures.store import About, Fixture, read_fixture, write_fixture
from . import installed_vllm, vllm_stub
from .traced_collectives import merge_ranks

POLICY = "any_rank_at_cap"
SEED = 3
"""Of plans in which requests give way, hit the prefix cache and wait behind the gate."""
_NUM_REQUESTS = 12  # of a wave, at most


@dataclass(frozen=True)
class Life:
    """How two ranks run: with balance scheduling, async; recorded without tokens."""

    title: str
    policy: str | None = None
    is_async: bool = False
    redact: bool = False


LIVES = {
    "async": Life("A rank with async scheduling", is_async=True),
    "balance": Life("A rank with balance scheduling", policy=POLICY),
    "redacted": Life("A rank, without tokens", redact=True),
}
"""By the name of the file; that of the busier rank. Of "balance" the collectives of both, too."""


@contextmanager
def recording(folder: Path, *, redact: bool = False) -> Iterator[Recorder]:
    """Schedulers and engines that are made meanwhile are recorded into a folder; in the end it is written."""
    from ..optimized.vllm import record_scheduler

    recorder = Recorder(RecordSettings(folder=folder, kinds=("scheduler", "dp"), redact=redact))
    with mock.patch.dict(os.environ, {RECORD_VARIABLE: str(folder)}):
        record_scheduler.install()
    with mock.patch.object(record_scheduler, "process_recorder", return_value=recorder):
        try:
            yield recorder
        finally:
            recorder.flush()


def record_engines(folder: Path, life: Life, *, num_waves: int = 1) -> tuple[list[Fixture], Fixture]:
    """Run two real engines, recorded.

    Args:
        folder: an empty one.
        life: how they run.
        num_waves: in which requests come.

    Returns:
        The traces of the schedulers, in the order of the ranks, and that of the collectives of both.
    """
    installed_vllm.prepare_import()
    vllm_stub.register_model()
    from ..optimized.vllm import engine_hook
    from .vllm_engine_runs import EngineRun, choose_plan

    engine_hook.install()
    model = vllm_stub.write_model(folder / "model")
    pauses_alone = installed_vllm.version() == "0.17.0"  # newer ones pause all ranks, or none
    plan = choose_plan(SEED, num_waves, _NUM_REQUESTS, pauses_alone=pauses_alone)
    with recording(folder / "recorded", redact=life.redact):
        EngineRun(model, plan, life.policy, life.is_async)
    found = [read_fixture(path) for path in sorted((folder / "recorded").iterdir())]
    schedulers = [fixture for fixture in found if fixture.kind == "scheduler"]
    return schedulers, merge_ranks([fixture for fixture in found if fixture.kind == "dp"])


def write_traces(folder: Path) -> list[Path]:
    """Write the traces of `LIVES` into a folder; their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for name, life in LIVES.items():
        with tempfile.TemporaryDirectory() as place:
            schedulers, collectives = record_engines(Path(place), life)
        wanted = {name: max(schedulers, key=lambda fixture: len(fixture.records))}
        if life.policy is not None:
            wanted[f"{name}_dp"] = collectives
        for suffix, fixture in wanted.items():
            path = folder / f"{installed_vllm.version()}_{suffix}.jsonl"
            title = f"{life.title}, vLLM {installed_vllm.version()}"
            write_fixture(path, replace(fixture, about=About(title=title)))
            written.append(path)
    return written


if __name__ == "__main__":
    for written in write_traces(Path(sys.argv[1])):
        print(written)
