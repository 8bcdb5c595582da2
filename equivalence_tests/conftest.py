"""Hypothesis profiles, the device the suites run on, and Triton's interpreter where that is the CPU."""

import os
import signal

import pytest
import torch
from hypothesis import HealthCheck, settings

from ascend_twin.equivalence_tests import interpreter
from ascend_twin.equivalence_tests.devices import open_test_device
from ascend_twin.equivalence_tests.installed_vllm import VERSIONS, why_unavailable
from ascend_twin.equivalence_tests.strategies import COMPILED_SHAPES, Shapes
from ascend_twin.optimized.gdn import IMPLEMENTATIONS
from ascend_twin.optimized.gdn.device import Device, LinalgDevice
from ascend_twin.reference.errors import UnavailableError

# A case computes for up to a second, so no example has a deadline, and slowness is not unhealthy.
_COMMON = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow], "print_blob": True}
settings.register_profile("dev", max_examples=25, **_COMMON)
settings.register_profile("ci", max_examples=60, derandomize=True, **_COMMON)
settings.register_profile("nightly", max_examples=2000, **_COMMON)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE") or ("ci" if os.environ.get("CI") else "dev"))


_VLLM_MARKERS = {**{env: (version,) for version, env in VERSIONS.items()}, "vllm": tuple(VERSIONS)}
"""By marker, the versions of vLLM of which one must be installed."""

_NO_TRITON = pytest.StashKey[str | None]()  # why kernels do not run on the device under test


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--device",
        default="cpu",
        help="where the optimized path runs: cpu (default), linalg, cuda, npu, cuda:INDEX",
    )


def pytest_configure(config: pytest.Config) -> None:
    """On a CPU the kernels are interpreted, which must be known before Triton is imported.

    A shell makes what it runs in the background ignore SIGINT, and so would do all that tests start and stop.
    """
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    for marker, versions in _VLLM_MARKERS.items():
        config.addinivalue_line("markers", f"{marker}: needs vLLM {' or '.join(versions)}")
    config.stash[_NO_TRITON] = None
    if config.getoption("--device") == "cpu":
        try:
            interpreter.enable()
        except UnavailableError as error:
            config.stash[_NO_TRITON] = str(error)


@pytest.fixture(scope="session")
def triton_runs(request: pytest.FixtureRequest) -> None:
    """Skips a test where the device under test runs no Triton kernel."""
    if reason := request.config.stash[_NO_TRITON]:
        pytest.skip(f"{reason}; what needs no Triton ran")


@pytest.fixture(scope="module", params=IMPLEMENTATIONS)
def implementation(request: pytest.FixtureRequest) -> str:
    """The name of each implementation in turn; skips those that need Triton where it does not run."""
    if IMPLEMENTATIONS[request.param].uses_triton:
        request.getfixturevalue("triton_runs")
    elif isinstance(request.getfixturevalue("device"), LinalgDevice):
        pytest.skip(f"{request.param} uses no Triton: it is the same on --device cpu")
    return request.param


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> Device:
    """The device under test."""
    try:
        return open_test_device(str(request.config.getoption("--device")))
    except UnavailableError as error:
        pytest.exit(f"--device: {error}", returncode=2)


@pytest.fixture(scope="session")
def compiled_shapes() -> Shapes | None:
    """Shapes of cases for native code: a few, at night any (None)."""
    is_night = settings().max_examples >= settings.get_profile("nightly").max_examples
    return None if is_night else COMPILED_SHAPES


@pytest.fixture(scope="session")
def shapes(device: Device, compiled_shapes: Shapes | None) -> Shapes | None:
    """Shapes of cases for the device under test; None for any."""
    return compiled_shapes if isinstance(device, LinalgDevice) else None


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Tests beside vLLM are skipped where it is not installed."""
    for marker, versions in _VLLM_MARKERS.items():
        if item.get_closest_marker(marker) and (reason := why_unavailable(*versions)):
            pytest.skip(f"{reason}; what needs no vLLM ran")


@pytest.fixture(autouse=True)
def _few_threads() -> None:
    """Cases are small: threads of their own would only get in the way of parallel test processes."""
    torch.set_num_threads(1)
