"""`ascend-twin published`: a published comparison of balance scheduling, predicted from its baseline row.

The file written by `--json` holds one object:

    version      1, raised when a field changes its meaning
    published    {"baseline", "balance": each {"ttft_ms", "tpot_ms", "throughput"}, "ratios"}
    predictions  [{"dp_size", "expert_share", "spread", "cost": fields of CostModel, "baseline", "balance",
                 "ratios": [of each seed], "off": relative error of the mean ratio}]

Ratios are balance over baseline: {"ttft_ms", "tpot_ms", "throughput"}.
"""

import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import typer
from rich.console import Console
from rich.table import Table

from ..reference.errors import invalid_argument
from ..scheduler.published import (
    BALANCE,
    BASELINE,
    Prediction,
    check,
    num_simulated,
    predict,
    published_ratios,
)
from .output_files import check_writable, write_json
from .parallel import run_jobs
from .progress import progress

NUMBERS = ("ttft_ms", "tpot_ms", "throughput")
WITHIN = 0.05
"""Ratios that are nearer to the published ones than this are marked."""


@dataclass(frozen=True)
class Options:
    """What the user asked for; see `scheduler.published.predict`."""

    dp: tuple[int, ...]
    expert_share: tuple[float, ...]
    policy: str
    routing: str
    max_num_batched_tokens: int
    seeds: int
    jobs: int
    json: Path | None


@dataclass(frozen=True)
class _Job:
    """The predictions for one DP size."""

    dp_size: int
    options: Options

    def run(self, advance: Callable[[int], object]) -> list[Prediction]:
        options = self.options
        return predict(
            self.dp_size,
            options.expert_share,
            seeds=range(options.seeds),
            policy=options.policy,
            routing=options.routing,
            max_num_batched_tokens=options.max_num_batched_tokens,
            advance=advance,
        )


def run_published(options: Options) -> None:
    """Fit to the baseline row, predict the other, print a table, write the file that was asked for.

    Raises:
        InvalidArgumentError: for wrong input.
        typer.Exit: with status 130 when it is interrupted.
    """
    if options.json:
        check_writable("--json", options.json)
    for name, given in (("--dp", options.dp), ("--expert-share", options.expert_share)):
        if len(set(given)) < len(given):
            invalid_argument(name, ", ".join(map(str, given)), "each once")
    for dp_size in options.dp:
        check(dp_size, options.expert_share, options.policy, options.routing, options.max_num_batched_tokens)
    jobs = [_Job(dp_size, options) for dp_size in options.dp]
    total = len(jobs) * num_simulated(options.seeds)
    with progress("simulated requests", total) as advance:
        predictions = [p for job in run_jobs(jobs, options.jobs, advance) for p in job]
    _print(predictions)
    if options.json:
        write_json("--json", options.json, as_json(predictions))


def _print(predictions: Sequence[Prediction]) -> None:
    table = Table(
        "DP", "experts", "spread", "step ms", "us/token", "TTFT", "TPOT", "tokens/s", "duration", ""
    )
    for column in table.columns:
        column.justify = "right"
    goal = published_ratios()
    table.add_row("published", "", "", "", "", *(f"{x:.3f}" for x in (*goal, 1 / goal[2])), "")
    table.add_section()
    for p in predictions:
        mean, off = p.ratios.mean(0), _off(p)
        token_us = p.cost.prefill_us_per_token + p.cost.expert_us_per_token
        table.add_row(
            str(p.dp_size),
            f"{p.expert_share:.0%}",
            f"{p.spread:.0%}",
            f"{p.cost.step_ms:.1f}",
            f"{token_us:.0f}",
            *(
                f"{x:.3f} {y:+.1%}"
                for x, y in zip((*mean, 1 / mean[2]), (*off, _inverse(off[2])), strict=True)
            ),
            "*" if _is_near(p) else "",
        )
    Console(width=None if sys.stdout.isatty() else 140).print(table)
    typer.echo(
        "Balance over baseline, predicted from the baseline row alone, and how far that is off the\n"
        f"published ratio. *: TPOT, tokens/s and duration all within {WITHIN:.0%}. experts: part of a\n"
        "prompt token's cost that experts on all ranks do. Fitted: spread of output lengths, step ms,\n"
        "us/token."
    )


def _off(prediction: Prediction) -> np.ndarray:
    return prediction.ratios.mean(0) / published_ratios() - 1


def _inverse(off: float) -> float:
    return 1 / (1 + off) - 1


def _is_near(prediction: Prediction) -> bool:
    _, tpot, throughput = _off(prediction)
    return max(abs(tpot), abs(throughput), abs(_inverse(throughput))) <= WITHIN


def as_json(predictions: Sequence[Prediction]) -> dict[str, Any]:
    """The object of `--json`."""
    return {
        "version": 1,
        "published": {
            "baseline": asdict(BASELINE),
            "balance": asdict(BALANCE),
            "ratios": _named(published_ratios()),
        },
        "predictions": [
            {
                "dp_size": p.dp_size,
                "expert_share": p.expert_share,
                "spread": p.spread,
                "cost": p.cost.to_json(),
                "baseline": asdict(p.baseline),
                "balance": asdict(p.balance),
                "ratios": [_named(ratios) for ratios in p.ratios],
                "off": _named(_off(p)),
            }
            for p in predictions
        ],
    }


def _named(numbers: np.ndarray) -> dict[str, float]:
    return dict(zip(NUMBERS, numbers.tolist(), strict=True))
