"""`ascend-twin doctor`: what can run on this machine, and what cannot, and why."""

import importlib.util
import json
import os
import subprocess
import sys
from typing import Any

import typer

from ..equivalence_tests.installed_vllm import version
from ..equivalence_tests.run_on_device import versions, why_unusable
from ..optimized.vllm.plugin import TESTED_VERSIONS
from ..reference.errors import InvalidArgumentError

DEVICES = ("cpu", "linalg", "cuda", "npu")
PLUGIN_TIMEOUT = 180  # s; vLLM takes some ten to be imported


def examine() -> dict[str, Any]:
    """What is here.

    Returns:
        `{"versions": {name: version}, "devices": {name: reason}, "implementations": [{"name", "summary",
        "devices": {name: reason}}], "schedulers": {name: reason}}`; a reason is why something cannot run,
        None if it can. Without a torch that works there are neither implementations nor schedulers. And
        `"vllm_plugin": {"vllm": version or None, "tested": [version], "not_loaded": reason, "balance": str,
        "concerns": {what is done to vLLM: why it is off}}`.
    """
    devices = {name: why_unusable(name) for name in DEVICES}
    return {
        "versions": versions(),
        "devices": devices,
        "implementations": _implementations(devices),
        "schedulers": _schedulers(devices),
        "vllm_plugin": _plugin(devices),
    }


def run_doctor(as_json: bool) -> None:
    """Print what `examine` finds, for people or as JSON."""
    found = examine()
    typer.echo(json.dumps(found, indent=2) if as_json else "\n".join(_lines(found)))


def _implementations(devices: dict[str, str | None]) -> list[dict[str, Any]]:
    if devices["cpu"] is not None:
        return []
    from ..optimized.gdn import IMPLEMENTATIONS

    found = importlib.util.find_spec("triton") is not None
    no_triton = None if found else "Triton is not installed: triton-ascend for an NPU, triton elsewhere"
    no_kernels = {"linalg": "it has no kernels that the Ascend compiler could lower"}
    return [
        {
            "name": i.name,
            "summary": i.summary,
            "devices": {n: reason or no_triton for n, reason in devices.items()}
            if i.uses_triton
            else {**devices, **no_kernels},
        }
        for i in IMPLEMENTATIONS.values()
    ]


def _schedulers(devices: dict[str, str | None]) -> dict[str, str | None]:
    if devices["cpu"] is not None:
        return {}
    from ..equivalence_tests.installed_vllm import why_unavailable

    return {"plain": None, "vllm": why_unavailable("0.17.0")}


def _plugin(devices: dict[str, str | None]) -> dict[str, Any]:
    """The plugin as vLLM would find it in this environment."""
    found: dict[str, Any] = {
        "vllm": version(),
        "tested": list(TESTED_VERSIONS),
        "not_loaded": None,
        "balance": "",
        "concerns": {},
    }
    if found["vllm"] is None or devices["cpu"] is not None:
        found["not_loaded"] = "torch does not work here" if found["vllm"] else "vllm is not installed"
        return found
    found["balance"] = _balance()
    allowed = os.environ.get("VLLM_PLUGINS")
    if allowed is not None and "ascend_twin" not in allowed.split(","):
        found["not_loaded"] = f"VLLM_PLUGINS is {allowed!r} and does not name ascend_twin"
    # In a process of its own: vLLM may fail in many ways, and writes its log to stdout.
    command = [sys.executable, "-m", "ascend_twin.optimized.vllm.plugin"]
    try:
        run = subprocess.run(command, capture_output=True, text=True, timeout=PLUGIN_TIMEOUT, check=True)
        found["concerns"] = json.loads(run.stdout.splitlines()[-1])
    except subprocess.TimeoutExpired:
        found["not_loaded"] = f"vllm was not imported within {PLUGIN_TIMEOUT} s"
    except subprocess.CalledProcessError as error:
        found["not_loaded"] = (error.stderr.strip().splitlines() or ["vllm cannot be imported"])[-1]
    return found


def _balance() -> str:
    """What the environment says of balance scheduling."""
    from ..optimized.vllm.settings import BALANCE_VARIABLE, read_settings

    try:
        settings = read_settings(None)
    except InvalidArgumentError as error:
        return str(error)
    if settings.balance:
        return f"on, by {BALANCE_VARIABLE}, policy {settings.policy}"
    return "off unless --scheduler-cls or --additional-config switches it on"


def _plugin_lines(plugin: dict[str, Any]) -> list[str]:
    lines = ["", f"vLLM plugin (tested with vLLM {' and '.join(plugin['tested'])})"]
    if not plugin["balance"]:
        return [*lines, f"  {plugin['not_loaded']}"]
    lines.append(f"  vLLM {plugin['vllm']}: {plugin['not_loaded'] or 'loads the plugin'}")
    good = "would be in place" if plugin["not_loaded"] else "in place"
    lines += [f"  {concern}: {'off: ' + off if off else good}" for concern, off in plugin["concerns"].items()]
    return [*lines, f"  balance scheduling: {plugin['balance']}"]


def _lines(found: dict[str, Any]) -> list[str]:
    lines = ["Versions"]
    lines += [f"  {name:<14} {version}" for name, version in found["versions"].items()]
    lines += ["", "Devices"]
    lines += [f"  {name:<14} {_verdict(reason)}" for name, reason in found["devices"].items()]
    kernels = "Triton kernels: on cpu interpreted, on linalg as the Ascend compiler lowers them"
    lines += ["", f"Implementations ({kernels})"]
    for implementation in found["implementations"]:
        lines.append(f"  {implementation['name']:<14} {implementation['summary']}")
        for device, reason in implementation["devices"].items():
            command = f"ascend-twin verify --implementation {implementation['name']} --device {device}"
            lines.append(f"    {device:<12} {_verdict(reason)}{'' if reason else ': ' + command}")
    if not found["implementations"]:
        lines.append("  none can run: torch does not work here")
    lines += ["", "Schedulers"]
    for name, reason in found["schedulers"].items():
        command = "ascend-twin verify --suite scheduler" + (" --against vllm" if name == "vllm" else "")
        lines.append(f"  {name:<14} {_verdict(reason)}{'' if reason else ': ' + command}")
    return lines + _plugin_lines(found["vllm_plugin"])


def _verdict(reason: str | None) -> str:
    return "can run" if reason is None else f"cannot run: {reason}"
