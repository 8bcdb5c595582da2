"""Reports of commands as pages: small ones of each command, and what must hold of every page."""

import base64
import json
import re
from collections.abc import Callable, Mapping
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from typer.testing import CliRunner

from ..cli.compile_report import compile_report
from ..cli.main import app
from ..cli.mutants_report import mutants_report
from ..cli.report import write_html

SIMULATED = ("lognormal:prompt=400,output=20", "--requests=16", "--max-num-seqs=4", "--dp=2", "--jobs=1")
REPLAYED = (
    "gdn/sgl-kernel-npu-640_state_transposed_wrong.safetensors",
    "traces/vllm-39366_wave_starts_without_a_rank_wrong.jsonl",
)
CASES = Path(__file__).parents[1] / "fixtures/cases"
VERIFIED = (
    "--num-heads=1",
    "--head-dim-k=16",
    "--head-dim-v=16",
    "--cases=2",
    "--max-num-batched-tokens=256",
)

_UNCLOSED = frozenset({"meta", "link", "img", "br", "hr", "input"})


class Page(HTMLParser):
    """What is in a page.

    Attributes:
        tags: in order.
        attributes: name and value of each, in order.
        text: of the body.
        images: the data of each image: SVG as text, PNG as bytes.
        problems: tags that do not fit together.
    """

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.text = ""
        self.images: list[str | bytes] = []
        self.problems: list[str] = []
        self._open: list[str] = []
        self.feed(page)
        self.close()
        self.problems += [f"<{tag}> stays open" for tag in self._open]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag not in _UNCLOSED:
            self._open.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag == "img":
            kind, _, data = (dict(attrs)["src"] or "").partition(";base64,")
            image = base64.b64decode(data)
            self.images.append(image.decode() if kind == "data:image/svg+xml" else image)

    def handle_endtag(self, tag: str) -> None:
        if not self._open or self._open.pop() != tag:
            self.problems.append(f"</{tag}> ends another")

    def handle_data(self, data: str) -> None:
        if "body" in self._open:
            self.text += data


def why_not_self_contained(text: str) -> list[str]:
    """What in a page, or in an image of it, could load something, or run; nothing, as it should be."""
    page = Page(text)
    found = [f"<{tag}>" for tag in {"script", "iframe", "object", "embed", "base", "form"} & set(page.tags)]
    for name, value in page.attributes:
        if name in ("href", "src", "srcset", "poster", "action") and not value.startswith(("#", "data:")):
            found.append(f"{name}={value}")
        if name.startswith("on"):
            found.append(f"{name}={value}")
    style = text[text.index("<style>") : text.index("</style>")]
    found += re.findall(r"@import|url\([^)]*\)", style)
    for image in page.images:
        if isinstance(image, str):
            found += re.findall(r"<script|<image|href=\"[^#\"][^\"]*|url\([^#)][^)]*\)", image)
    return found


def _verify(path: Path) -> None:
    _run("verify", *VERIFIED, "--html", str(path))


def _verify_scheduler(path: Path) -> None:
    _run("verify", "--suite=scheduler", "--cases=100", "--html", str(path))


def _simulate(path: Path) -> None:
    _run("simulate", *SIMULATED, "--html", str(path))


def _compile(path: Path) -> None:
    write_html(path, compile_report(compiled(fits=False)))


def _replay(path: Path) -> None:
    _run("replay", *(str(CASES / case) for case in REPLAYED), "--html", str(path))


def _mutants(path: Path) -> None:
    write_html(path, mutants_report(exhibited()))


REPORTS: Mapping[str, Callable[[Path], None]] = {
    "verify": _verify,
    "verify_scheduler": _verify_scheduler,
    "simulate": _simulate,
    "compile": _compile,
    "replay": _replay,
    "mutants": _mutants,
}
"""What writes a small report of each command to a file."""


def _run(*arguments: str) -> None:
    result = CliRunner().invoke(app, list(arguments))
    if result.exit_code not in (0, 1):
        raise RuntimeError(result.output) from result.exception


def compiled(*, fits: bool) -> dict[str, Any]:
    """What `ascend-twin compile --json` writes, of two kernels and two targets; one does not fit."""
    limits = {"910B1": {"UB": 196608, "L1": 524288}, "950": {"UB": 253952, "L1": 524288}}
    planned = {"l2norm_fwd_kernel": {"UB": 70_000}, "chunk_fwd_kernel_o": {"UB": 190_000, "L1": 250_000}}
    said = "warning: a loop was not pipelined"
    too_much = "" if fits else "ub overflow, requires 1600000 bits while 1572864 bits available"
    outcomes = [
        {
            "kernel": kernel,
            "signature": {"x": "*bf16"},
            "constants": {"BT": 64, "K": 128},
            "divisible": ["x"],
            "options": {},
            "used_by": [{"implementation": "fused", "model": "Qwen3.5-27B", "tp": 4}],
            "target": target,
            "fits": not (failed := bool(too_much) and (kernel, target) == ("chunk_fwd_kernel_o", "910B1")),
            "planned": {"UB": 200_000} if failed else memory,
            "message": too_much if failed else "",
            "warnings": [said] if "l2norm" in kernel else [],
            "seconds": 1.5,
        }
        for kernel, memory in planned.items()
        for target in limits
    ]
    kernels = [
        {
            "kernel": kernel,
            "implementations": ["fused", "staged"],
            "variants": 1,
            "compiled": 2,
            "failed": sum(o["kernel"] == kernel and not o["fits"] for o in outcomes),
            "worst": {
                space: {"bytes": size, "limit": limits["910B1"][space], "target": "910B1", "where": "TP 4"}
                for space, size in memory.items()
            },
            "warnings": {said: list(limits)} if "l2norm" in kernel else {},
        }
        for kernel, memory in planned.items()
    ]
    result = {
        "version": 1,
        "passed": fits,
        "options": {
            "models": ["Qwen3.5-27B"],
            "tp": [4],
            "targets": list(limits),
            "implementations": ["fused", "staged"],
        },
        "models": [{"name": "Qwen3.5-27B", "H": 16, "HV": 48, "K": 128, "V": 128, "source": "config.json"}],
        "limits": limits,
        "kernels": kernels,
        "compiled": outcomes,
        "versions": {"triton-ascend": "3.2.0"},
        "seconds": 6.0,
    }
    return json.loads(json.dumps(result))


def exhibited() -> dict[str, Any]:
    """What `ascend-twin mutants --json` writes, of a bug that is caught and one that is not."""
    suites = {"metadata definition": "tables equal the plain loops", "stages": "each kernel, alone"}

    def verdicts(result: str) -> list[dict[str, Any]]:
        message = "h: ratio 3.5e+00 (limit 1.0e-05)" if result == "caught" else ""
        return [
            {"suite": suite, "result": result, "cases": 9, "seconds": 0.5, "message": message}
            for suite in suites
        ]

    bugs = [
        {
            "name": name,
            "upstream": ["fla#909", "asc#11807"],
            "area": "metadata",
            "what": "an empty sequence between others is not counted",
            "module": "optimized.gdn.metadata",
            "old": "base = self._sequences[:, : N + 1]\n",
            "new": "base = ranks[:, : N + 1]\n",
            "caught": result == "caught",
            "seconds": 1.0,
            "verdicts": verdicts(result),
        }
        for name, result in (("compact_ranks", "caught"), ("block_size_written_twice", "missed"))
    ]
    return {
        "version": 1,
        "passed": False,
        "options": {"names": [], "area": ["metadata"], "suite": [], "timeout": 120.0},
        "unmutated": verdicts("missed"),
        "bugs": bugs,
        "absent": [{"upstream": ["fla#537"], "what": "a random matrix explodes", "why": "is no mistake"}],
        "suites": suites,
        "median_seconds": 1.0,
        "seconds": 3.0,
        "versions": {"torch": "2.13.0"},
    }
