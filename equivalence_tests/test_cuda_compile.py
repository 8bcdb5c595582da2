"""Every kernel compiles for a GPU, and fits its shared memory; no GPU is needed for that."""

import importlib.util
import json
import os
import subprocess
import sys

import pytest

SHARED_MEMORY = 232_448  # bytes that one program of compute capability 9.0 can have (227 KiB)

# In a process of its own: the kernels of this one may be interpreted. The driver says what to compile for.
COMPILE = """
import json, sys
from unittest import mock
import torch, triton
from triton.backends.compiler import GPUTarget
from ascend_twin.optimized.gdn import ChunkMetadataBuilder, chunk_gated_delta_rule, open_device
from ascend_twin.optimized.gdn.kernels import solve_tril
from ascend_twin.optimized.gdn.kernels.launch import recorded_launches

dtype, D, only = getattr(torch, sys.argv[1]), int(sys.argv[2]), sys.argv[3]
T, H, HV = 65, 16, 32
q, k, v = (torch.empty(1, T, heads, D, dtype=dtype) for heads in (H, H, HV))
g, beta, state = torch.empty(1, T, HV), torch.empty(1, T, HV, dtype=dtype), torch.empty(1, HV, D, D)
metadata = ChunkMetadataBuilder(open_device("cpu"), T, 1, HV).build(torch.tensor([0, T]))
precision = solve_tril.inverse_precision(dtype, torch.device("cuda"))
solve_tril.inverse_precision = lambda *_: precision  # the tensors are on the CPU
with recorded_launches() as launches:
    for implementation in ("staged", "fused"):
        chunk_gated_delta_rule(
            q, k, v, g, beta, initial_state=state, use_qk_l2norm_in_kernel=True, prebuilt_meta=metadata,
            implementation=implementation,
        )
driver = mock.Mock()
driver.get_current_target.return_value = GPUTarget("cuda", 90, 32)
triton.runtime.driver.set_active(driver)
for launch in {launch.name: launch for launch in launches if only in launch.name}.values():
    options = {**launch.constants, **launch.cuda_options}
    compiled = launch.kernel.warmup(**launch.arguments, **options, grid=(1,))
    print(json.dumps([launch.name, compiled.metadata.shared]))
"""


def _compile(dtype: str, D: int, only: str) -> dict[str, int]:
    """Bytes of shared memory of each kernel whose name contains `only`, for K = V = D."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", COMPILE, dtype, str(D), only], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return dict(json.loads(line) for line in done.stdout.splitlines())


@pytest.mark.parametrize(
    ("dtype", "D", "only", "count"),
    [
        ("bfloat16", 128, "", 9),
        ("float16", 128, "inter_chunk", 1),
        ("float32", 128, "inter_chunk", 1),
        ("bfloat16", 256, "", 9),
        ("float32", 256, "inter_chunk", 1),
    ],
)
def test_kernels_compile_for_a_gpu_and_fit_its_shared_memory(
    dtype: str, D: int, only: str, count: int
) -> None:
    found = importlib.util.find_spec("triton") and importlib.util.find_spec("triton.backends.nvidia")
    if found is None:
        pytest.skip("there is no Triton with an NVIDIA backend")
    shared = _compile(dtype, D, only)
    assert len(shared) == count
    assert {name: size for name, size in shared.items() if size > SHARED_MEMORY} == {}
