"""`ascend-twin doctor`: what can run on this machine, and what cannot, and why."""

import importlib.util
import json
from typing import Any

import typer

from ..equivalence_tests.run_on_device import versions, why_unusable

DEVICES = ("cpu", "cuda", "npu")


def examine() -> dict[str, Any]:
    """What is here.

    Returns:
        `{"versions": {name: version}, "devices": {name: reason}, "implementations": [{"name", "summary",
        "devices": {name: reason}}], "schedulers": {name: reason}}`; a reason is why something cannot run,
        None if it can. Without a torch that works there are neither implementations nor schedulers.
    """
    devices = {name: why_unusable(name) for name in DEVICES}
    return {
        "versions": versions(),
        "devices": devices,
        "implementations": _implementations(devices),
        "schedulers": _schedulers(devices),
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
    return [
        {
            "name": i.name,
            "summary": i.summary,
            "devices": {n: reason or (no_triton if i.uses_triton else None) for n, reason in devices.items()},
        }
        for i in IMPLEMENTATIONS.values()
    ]


def _schedulers(devices: dict[str, str | None]) -> dict[str, str | None]:
    if devices["cpu"] is not None:
        return {}
    from ..equivalence_tests.vllm017 import why_unavailable

    return {"plain": None, "vllm": why_unavailable()}


def _lines(found: dict[str, Any]) -> list[str]:
    lines = ["Versions"]
    lines += [f"  {name:<14} {version}" for name, version in found["versions"].items()]
    lines += ["", "Devices"]
    lines += [f"  {name:<14} {_verdict(reason)}" for name, reason in found["devices"].items()]
    lines += ["", "Implementations (on cpu, those in Triton run in its interpreter)"]
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
    return lines


def _verdict(reason: str | None) -> str:
    return "can run" if reason is None else f"cannot run: {reason}"
