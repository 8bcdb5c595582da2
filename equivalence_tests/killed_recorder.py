"""Kills processes that write recordings, each at a moment of its own, and looks at what they leave.

Run as a module with a folder, a number of kills and a seed, it prints `Kills` as JSON.
"""

import dataclasses
import gc
import json
import os
import random
import signal
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

import torch

from ..fixtures.record import Recorder, RecordSettings
from ..fixtures.store import TEMPORARY_SUFFIX, read_fixture

_MOST_SECONDS = 0.004  # a recording takes about one millisecond


@dataclass
class Kills:
    """What came of it.

    Attributes:
        num_killed: processes.
        num_whole: recordings that they had written, all of which were read.
        num_partial: temporary files that they left.
        left: names of what was in the folder after the next recorder had started.
    """

    num_killed: int = 0
    num_whole: int = 0
    num_partial: int = 0
    left: list[str] = field(default_factory=list)


def record_forever(folder: Path) -> NoReturn:
    """Record calls as fast as they are written."""
    recorder = Recorder(RecordSettings(folder))
    source = recorder.source("gdn", "layer")
    x = torch.zeros(1, 64, 1, 16, dtype=torch.bfloat16)
    gate = torch.zeros(1, 64, 1)
    while True:
        recording = source.start()
        assert recording is not None
        with recording:
            recording.add(lambda: {"q": x, "k": x, "v": x, "g": gate, "beta": gate, "seen.o": x})
            recording.finish({})
        recorder.flush()


def kill(folder: Path, num_kills: int, seed: int) -> Kills:
    """Start and kill so many processes, one after the other, that write into a folder."""
    rng, kills = random.Random(seed), Kills()
    gc.freeze()  # a fork is copied as far as it is written to
    for _ in range(num_kills):
        process = os.fork()
        if not process:
            record_forever(folder)
        deadline = time.monotonic() + 10
        while not any(folder.glob("*.safetensors")) and time.monotonic() < deadline:
            time.sleep(0.0002)
        time.sleep(rng.uniform(0, _MOST_SECONDS))
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
        kills.num_killed += 1
        kills.num_partial += sum(1 for _ in folder.glob(f".*{TEMPORARY_SUFFIX}"))
        for path in folder.glob("*.safetensors"):
            read_fixture(path)
            path.unlink()
            kills.num_whole += 1
    Recorder(RecordSettings(folder))
    kills.left = [path.name for path in folder.iterdir()]
    return kills


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps(dataclasses.asdict(kill(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])))))
