"""`vllm serve` with the stub executor, in a process that ends with the context. Imports no vLLM here."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ..scheduler.config import SchedulerConfig
from ..scheduler.workload import RequestSpec, prompt_token_ids
from . import installed_vllm, vllm_stub

CONFIG = SchedulerConfig(
    num_blocks=80, block_size=16, max_num_seqs=2, max_num_batched_tokens=32, max_model_len=512
)
START_S, ANSWER_S, END_S, LINGER_S = 300.0, 60.0, 30.0, 10.0


class ServerError(RuntimeError):
    """The server did not start, or ended; the message has the end of its log."""


class Server:
    """A running server with two data-parallel ranks.

    Args:
        folder: an empty one, for the model, the plugins and the log.
        arguments: further ones for `vllm serve`.
        environment: variables to add.
        plugins: those that vLLM loads, beside the one that knows the model.

    Attributes:
        log_path: what it prints.
        leftover: command lines of processes that outlived it.

    Raises:
        ServerError: when it ends, or the time is over, before it is healthy.
    """

    def __init__(
        self,
        folder: Path,
        *arguments: str,
        environment: Mapping[str, str] | None = None,
        plugins: tuple[str, ...] = ("ascend_twin",),
    ) -> None:
        self.log_path = folder / "log"
        self.leftover: dict[int, str] = {}
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self._port = probe.getsockname()[1]
        child = installed_vllm.child_environment(vllm_stub.write_plugins(folder / "plugins"))
        child |= {"VLLM_PLUGINS": ",".join([vllm_stub.MODEL_PLUGIN, *plugins])}
        child |= {vllm_stub.REPORTS_VARIABLE: str(folder), **(environment or {})}
        model = vllm_stub.write_model(folder / "model", max_model_len=CONFIG.max_model_len)
        command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", str(model)]
        command += [*_fixed_arguments(self._port), *arguments]
        with open(self.log_path, "w") as log:
            self._process = subprocess.Popen(
                command, env=child, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )
        try:
            self._wait_until_healthy()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> "Server":
        return self

    def __exit__(self, *args: Any) -> None:
        self.close()

    def close(self) -> None:
        """End it as a user does, and kill whoever does not end."""
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(END_S)
        self._process.kill()
        self._process.wait()
        self.leftover |= end_session(self._process.pid)

    @property
    def log(self) -> str:
        """What it has printed."""
        return self.log_path.read_text(errors="replace")

    def get(self, path: str) -> str:
        """The body at a path."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self._port}{path}", timeout=ANSWER_S) as answer:
            return answer.read().decode()

    def complete(self, spec: RequestSpec, rank: int | None = None) -> Iterator[str]:
        """The pieces of a streamed completion, as an OpenAI client receives them.

        Args:
            spec: what to complete.
            rank: which shall serve it; None lets the server choose.
        """
        body = {
            "model": "stub",
            "prompt": " ".join(map(vllm_stub.word, prompt_token_ids(spec))),
            "max_tokens": spec.max_tokens,
            "ignore_eos": True,
            "temperature": 0,
            "stream": True,
        }
        headers = {"Content-Type": "application/json"}
        if rank is not None:
            headers["X-data-parallel-rank"] = str(rank)
        url = f"http://127.0.0.1:{self._port}/v1/completions"
        request = urllib.request.Request(url, json.dumps(body).encode(), headers)
        with urllib.request.urlopen(request, timeout=ANSWER_S) as answer:
            for line in answer:
                content = line.decode().removeprefix("data: ").strip()
                if content and content != "[DONE]":
                    yield json.loads(content)["choices"][0]["text"]

    def _wait_until_healthy(self) -> None:
        deadline = time.monotonic() + START_S
        while time.monotonic() < deadline:
            if self._process.poll() is not None:
                raise ServerError(f"ended with {self._process.returncode}: {self.log[-8000:]}")
            with contextlib.suppress(urllib.error.URLError, ConnectionError):
                self.get("/health")
                return
            time.sleep(0.2)
        raise ServerError(f"not healthy after {START_S:.0f} s: {self.log[-8000:]}")


def _fixed_arguments(port: int) -> list[str]:
    given = {
        "host": "127.0.0.1",
        "port": port,
        "served-model-name": "stub",
        "dtype": "float32",
        "data-parallel-size": 2,
        "distributed-executor-backend": vllm_stub.EXECUTOR,
        "max-model-len": CONFIG.max_model_len,
        "max-num-seqs": CONFIG.max_num_seqs,
        "max-num-batched-tokens": CONFIG.max_num_batched_tokens,
        "block-size": CONFIG.block_size,
        "num-gpu-blocks-override": CONFIG.num_blocks,
    }
    return [part for name, value in given.items() for part in (f"--{name}", str(value))]


def end_session(leader: int) -> dict[int, str]:
    """Kill whoever is left of a session some seconds after its leader; their command lines by process id."""
    deadline = time.monotonic() + LINGER_S
    while (others := _session(leader)) and time.monotonic() < deadline:
        time.sleep(0.1)
    for pid in others:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    return others


def _session(leader: int) -> dict[int, str]:
    """The processes of a session that have not ended, the leader left out."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            state, *fields = (folder / "stat").read_text().rpartition(")")[2].split()
            if int(fields[2]) == leader != int(folder.name) and state != "Z":
                command = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode()
                found[int(folder.name)] = command or (folder / "comm").read_text()
    return found
