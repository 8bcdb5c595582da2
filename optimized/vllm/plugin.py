# pyright: reportMissingImports=false
"""What vLLM calls in each of its processes: puts each concern in place, and says which could not be.

Registered as the entry point `ascend_twin` of `vllm.general_plugins`. Run as a module, it imports vLLM and
prints `status()` as its last line, in JSON.
"""

import importlib
import json
import logging
import multiprocessing
from importlib import metadata

TESTED_VERSIONS = ("0.17.0", "0.32.0")

CONCERNS = {
    "balance scheduling: closing admission": "admission_gate",
    "balance scheduling: gather in the engine": "engine_hook",
    "balance scheduling: choice without --scheduler-cls": "scheduler_choice",
    "balance scheduling: metrics": "balance_metrics",
    "GDN metadata": "gdn_metadata",
    "GDN layer": "gdn_layer",
    "recording of schedulers": "record_scheduler",
}
"""What is done to vLLM, and the module here whose `install()` does it."""

BY_OPTION = ("GDN layer",)
"""Concerns that change nothing unless an option or a recording asks for them: nobody else is told of them."""

_status: dict[str, str | None] = {}


def register() -> None:
    """Install every concern; one warning names those that the installed vLLM does not allow.

    vLLM runs without these as if the plugin were not there. Calling it again does nothing.

    Raises:
        InvalidArgumentError: for variables of the environment that ask for recordings and are wrong.
    """
    if _status:
        return
    is_front_end = multiprocessing.parent_process() is None  # the processes that it starts would repeat it
    if is_front_end:
        _read_variables()
    for concern, module in CONCERNS.items():
        _status[concern] = _why_off(module)
    from ...fixtures.record import is_asked_for

    unasked = () if is_asked_for() else BY_OPTION
    off = [
        f"{concern} ({reason})" for concern, reason in _status.items() if reason and concern not in unasked
    ]
    if off and is_front_end:
        logging.getLogger(f"vllm.{__name__}").warning(
            "ascend-twin is tested with vLLM %s; with this one, %s, off: %s",
            " and ".join(TESTED_VERSIONS),
            ", ".join(" ".join(named) for named in vllm_distributions().items()) or "not installed",
            "; ".join(off),
        )


def _read_variables() -> None:
    """Refuse variables of the environment that are wrong; one warning names those that change nothing."""
    from ...fixtures.record import ignored_variables, read_record_settings

    read_record_settings()
    if ignored := ignored_variables():
        logging.getLogger(f"vllm.{__name__}").warning("Environment variables change nothing: %s", ignored)


def status() -> dict[str, str | None]:
    """Why each concern is off, None for those in place; empty before `register()`."""
    return dict(_status)


def vllm_distributions() -> dict[str, str]:
    """The versions of what has installed vLLM, by its name; empty without one. Nothing is imported."""
    return {name: metadata.version(name) for name in metadata.packages_distributions().get("vllm", ())}


def _why_off(module: str, how: str = "install") -> str | None:
    """Install one concern. Whatever goes wrong in looking at an unknown vLLM, that must run."""
    try:
        getattr(importlib.import_module(f".{module}", __package__), how)()
    except Exception as error:
        return str(error) or type(error).__name__
    return None


if __name__ == "__main__":
    register()
    # Where vLLM serves, this waits for a model that has such layers.
    _status["GDN layer"] = _why_off("gdn_layer", "install_now")
    print(json.dumps(status()))
