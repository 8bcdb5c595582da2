"""Hypothesis profiles, and the device the suites run on."""

import os

import pytest
import torch
from hypothesis import HealthCheck, settings

from ascend_twin.equivalence_tests.devices import open_test_device
from ascend_twin.optimized.gdn.device import Device
from ascend_twin.reference.errors import UnavailableError

# A case computes for up to a second, so no example has a deadline, and slowness is not unhealthy.
_COMMON = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow], "print_blob": True}
settings.register_profile("dev", max_examples=25, **_COMMON)
settings.register_profile("ci", max_examples=60, derandomize=True, **_COMMON)
settings.register_profile("nightly", max_examples=2000, **_COMMON)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE") or ("ci" if os.environ.get("CI") else "dev"))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--device", default="cpu", help="where the optimized path runs: cpu (default), cuda, npu, cuda:INDEX"
    )


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> Device:
    """The device under test."""
    try:
        return open_test_device(str(request.config.getoption("--device")))
    except UnavailableError as error:
        pytest.exit(f"--device: {error}", returncode=2)


@pytest.fixture(autouse=True)
def _few_threads() -> None:
    """Cases are small: threads of their own would only get in the way of parallel test processes."""
    torch.set_num_threads(1)
