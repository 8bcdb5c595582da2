# pyright: reportMissingImports=false
"""vLLM's real data-parallel engine, driven by its AsyncLLM, in a process of its own: what it says, as JSON.

    python -m ascend_twin.equivalence_tests.vllm_data_parallel '{"model": FOLDER, "is_async": false}'

Two DPEngineCoreProc, the coordinator and gloo, with the stub executor. Three waves: most requests on rank 0;
all on rank 1, the other drained; some on each. Then rank 0 is killed while both have requests. `run()` starts
it from a test, under a time limit that it cannot outlive.
"""

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from ..scheduler.config import SchedulerConfig
from ..scheduler.workload import RequestSpec, prompt_token_ids
from . import installed_vllm, vllm_stub
from .vllm_server import end_session

CONFIG = SchedulerConfig(
    num_blocks=520, block_size=16, max_num_seqs=2, max_num_batched_tokens=32, max_model_len=4096
)
POLICY = "any_rank_at_cap"
TIME_LIMIT_S = 300.0
_WAVE_S, _DEATH_S = 60.0, 30.0


def waves() -> list[list[tuple[int, RequestSpec]]]:
    """Of each wave, the requests with the rank that each is sent to."""
    skewed = [(int(i == 6), _request(0, i)) for i in range(7)]
    drained = [(1, _request(1, i)) for i in range(5)]
    both = [(i % 2, _request(2, i)) for i in range(6)]
    return [skewed, drained, both]


def _request(wave: int, i: int, max_tokens: int = 0) -> RequestSpec:
    """A prompt that shares its beginning with others, and is computed in chunks."""
    segments = ((i % 2, 20 + 9 * i), (100 * wave + i, 5))
    return RequestSpec(f"w{wave}-{i}", 0, segments, max_tokens=max_tokens or 8 + 5 * i)


def run(folder: Path, *, is_async: bool) -> dict[str, Any]:
    """Run it in a process of its own.

    Args:
        folder: an empty one, for the model and the plugins.
        is_async: whether with async scheduling.

    Returns:
        "said": tokens by request; "reports": after each wave, of each rank what `stand_in_report` says;
        "death": what a client of each rank was told when rank 0 was killed; "death_s": how long that took, s;
        "leftover": processes that outlived it, by id.

    Raises:
        AssertionError: when it does not end well, with the end of its log.
    """
    plugins = [vllm_stub.MODEL_PLUGIN, "ascend_twin"]
    environment = installed_vllm.child_environment(vllm_stub.write_plugins(folder / "plugins"))
    if is_async:
        plugins.append(vllm_stub.PLATFORM_PLUGIN)
    environment["VLLM_PLUGINS"] = ",".join(plugins)
    model = vllm_stub.write_model(folder / "model", max_model_len=CONFIG.max_model_len)
    arguments = json.dumps({"model": str(model), "is_async": is_async})
    command = [sys.executable, "-m", __name__, arguments]
    with (
        open(folder / "log", "w+") as log,
        subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=log, text=True, start_new_session=True
        ) as process,
    ):
        try:
            said, _ = process.communicate(timeout=TIME_LIMIT_S)
        except subprocess.TimeoutExpired:
            said = ""
        finally:
            process.kill()
            process.wait()
            leftover = end_session(process.pid)
        log.seek(0)
        lines = [line for line in said.splitlines() if line.startswith("{")]
        ended_well = process.returncode == 0 and bool(lines)
        assert ended_well, f"ended with {process.returncode}: {log.read()[-8000:]}"
    return {**json.loads(lines[-1]), "leftover": leftover}


def _engine(model: str, is_async: bool) -> Any:
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    from .vllm_stub_executor import StubExecutor

    arguments = AsyncEngineArgs(
        model=model,
        skip_tokenizer_init=True,
        dtype="float32",
        data_parallel_size=2,
        max_model_len=CONFIG.max_model_len,
        max_num_seqs=CONFIG.max_num_seqs,
        max_num_batched_tokens=CONFIG.max_num_batched_tokens,
        block_size=CONFIG.block_size,
        num_gpu_blocks_override=CONFIG.num_blocks,
        async_scheduling=is_async,
        distributed_executor_backend="mp" if is_async else vllm_stub.EXECUTOR,
        additional_config={"ascend_twin": {"balance": {"policy": POLICY}}},
    )
    return AsyncLLM(arguments.create_engine_config(), executor_class=StubExecutor, log_stats=True)


async def _say(llm: Any, rank: int, spec: RequestSpec) -> list[int]:
    """What a request says, streamed from a rank."""
    from .vllm_engines import sampling_params

    tokens: list[int] = []
    prompt = {"prompt_token_ids": prompt_token_ids(spec)}
    async for output in llm.generate(prompt, sampling_params(spec), spec.request_id, data_parallel_rank=rank):
        tokens = list(output.outputs[0].token_ids)
    return tokens


async def _reports(llm: Any) -> list[dict[str, Any]]:
    """What the ranks say of themselves once all are idle."""
    client = llm.engine_core
    while True:
        reports = [
            await client._call_utility_async("stand_in_report", engine=engine)
            for engine in client.core_engines
        ]
        if not any(report["running"] or report["unfinished"] for report in reports):
            return reports
        await asyncio.sleep(0.05)


async def _kill_one(llm: Any) -> tuple[list[str], float]:
    """Kill rank 0 once both ranks speak; what the clients are told, and how long after."""

    async def say(rank: int) -> str:
        try:
            await _say(llm, rank, _request(3, rank, max_tokens=3000))
        except Exception as error:
            return f"{type(error).__name__}: {error}"
        return "it went on to the end"

    tasks = [asyncio.create_task(say(rank)) for rank in range(2)]
    await asyncio.sleep(0.3)
    assert not any(task.done() for task in tasks), "they ended before anybody was killed"
    os.kill(llm.engine_core.resources.engine_manager.processes[0].pid, signal.SIGKILL)
    start = time.monotonic()
    told = await asyncio.wait_for(asyncio.gather(*tasks), _DEATH_S)
    return told, time.monotonic() - start


async def _main(model: str, is_async: bool) -> None:
    llm = _engine(model, is_async)
    said: dict[str, list[int]] = {}
    reports = []
    try:
        for wave in waves():
            tokens = await asyncio.wait_for(
                asyncio.gather(*(_say(llm, rank, spec) for rank, spec in wave)), _WAVE_S
            )
            said |= {spec.request_id: ids for (_, spec), ids in zip(wave, tokens, strict=True)}
            reports.append(await asyncio.wait_for(_reports(llm), _WAVE_S))
        death, death_s = await _kill_one(llm)
    finally:
        llm.shutdown()
    print(json.dumps({"said": said, "reports": reports, "death": death, "death_s": death_s}), flush=True)


if __name__ == "__main__":
    asyncio.run(_main(**json.loads(sys.argv[1])))
