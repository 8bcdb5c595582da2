"""Run the suites of the kernels on the device linalg, built with the address sanitizer.

    python -m ascend_twin.equivalence_tests.sanitized [--require] [pytest options]

Each access of native code is then checked when it is made: a stray read is found even if nothing of what it
reads gets into a result, and so is a stray access to a buffer of the kernel's own. Where that cannot be done
one line says what was not run and why, and the exit status is 0; with ``--require``, 1.
"""

import argparse
import os
import subprocess
import sys
from pathlib import Path

from ..optimized.gdn.address_sanitizer import VERSION
from ..optimized.gdn.ascend_native import check_native_installed
from ..reference.errors import UnavailableError

SUITES = ("test_kernels.py", "test_op.py", "test_sanitized.py")
OPTIONS = (
    "color=never",  # reports are read
    "detect_leaks=0",  # Python leaks
    "halt_on_error=0",  # what is found becomes an exception, and the next test runs
    "suppress_equal_pcs=0",  # what was found once must be found again: Hypothesis asks
    "symbolize=0",  # its way from code to lines does not know libraries that were loaded late
)


def environment() -> dict[str, str]:
    """The environment in which a process has the address sanitizer of the C compiler from its start.

    Raises:
        UnavailableError: where there is none that fits, or nothing to check with it.
    """
    check_native_installed()
    answer = subprocess.run(["cc", "-print-file-name=libasan.so"], capture_output=True, text=True)
    runtime = Path(answer.stdout.strip())
    if not runtime.is_absolute():
        raise UnavailableError("cc has no libasan.so, the address sanitizer of GCC: install GCC with it")
    options = ":".join((*OPTIONS, os.environ.get("ASAN_OPTIONS", "")))
    found = {**os.environ, "LD_PRELOAD": str(runtime.resolve()), "ASAN_OPTIONS": options}
    probe = [sys.executable, "-c", f"import ctypes; getattr(ctypes.CDLL(None), {VERSION!r})"]
    if subprocess.run(probe, env=found, capture_output=True).returncode:
        raise UnavailableError(f"{runtime} cannot be preloaded, or lacks {VERSION}, which LLVM's code needs")
    return found


def main(argv: list[str] | None = None) -> int:
    """Run the suites sanitized, where that is possible.

    Args:
        argv: ``--require`` if it must be possible, options for pytest; default sys.argv[1:].

    Returns:
        The exit status: pytest's, or 0 (with ``--require`` 1) where it is not possible.
    """
    parser = argparse.ArgumentParser(prog=f"python -m {__package__}.sanitized", allow_abbrev=False)
    parser.add_argument("--require", action="store_true", help="exit 1, not 0, where it is not possible")
    options, pytest_options = parser.parse_known_args(argv)
    try:
        sanitized = environment()
    except UnavailableError as error:
        print(f"sanitized: not run: {error}; not run: {' '.join(SUITES)} with the address sanitizer")
        return int(options.require)
    suites = [str(Path(__file__).with_name(name)) for name in SUITES]
    command = [sys.executable, "-m", "pytest", *suites, "--device", "linalg", *pytest_options]
    return subprocess.run(command, env=sanitized).returncode


if __name__ == "__main__":
    sys.exit(main())
