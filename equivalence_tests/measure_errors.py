"""The errors that kernels make, measured: the tables of the docs, and the way to measure floors on a device.

    python -m ascend_twin.equivalence_tests.measure_errors [--device npu] [--examples 100]

Prints a Markdown table with a row for each result of each stage, alone on exact inputs, and for o and
final_state of the op: the worst ratio and worst row over random batches, and the most of its limit that any
of them used.
"""

import argparse
from collections import defaultdict

import torch
from hypothesis import HealthCheck, given, settings

from . import interpreter
from .cases import PrefillCase, check_prefill
from .compare import Comparison
from .devices import open_test_device
from .strategies import prefill_cases

DTYPES = ("float32", "float16", "bfloat16")


class Worst:
    """The worst errors of a result so far, and the most of a limit that was used."""

    def __init__(self) -> None:
        self.ratio = self.worst_row = self.used = 0.0

    def add(self, comparison: Comparison) -> None:
        errors, limit = comparison.errors, comparison.limit
        self.ratio, self.worst_row = max(self.ratio, errors.ratio), max(self.worst_row, errors.worst_row)
        self.used = max(self.used, errors.ratio / limit.ratio, errors.worst_row / limit.worst_row)

    def __str__(self) -> str:
        return f"{self.ratio:.1e} / {self.worst_row:.1e} ({self.used:.0%})"


def measure(dtype: str, device_name: str, examples: int) -> dict[str, Worst]:
    """The worst errors over `examples` random batches of a dtype (a key of `DTYPES`), by result."""
    from ..optimized.gdn import IMPLEMENTATIONS, ChunkMetadataBuilder
    from .kernel_stages import STAGES, StageCase, check_stage

    device, worst = open_test_device(device_name), defaultdict[str, Worst](Worst)

    slow = (HealthCheck.too_slow, HealthCheck.data_too_large)

    @settings(
        max_examples=examples, derandomize=True, deadline=None, database=None, suppress_health_check=slow
    )
    @given(case=prefill_cases(dtypes=(dtype,), max_num_seqs=3, max_length=130))
    def run(case: PrefillCase) -> None:
        inputs = StageCase(case)
        for stage in STAGES:
            for name, comparison in check_stage(stage, inputs, device):
                worst[name].add(comparison)
        builder = ChunkMetadataBuilder(device, 1024, 8, case.HV)
        for name in (name for name, i in IMPLEMENTATIONS.items() if i.uses_triton):
            outcome = check_prefill(case, implementation=name, builder=builder, device=device.torch_device)
            for result, comparison in zip(("o", "final_state"), outcome.comparisons, strict=True):
                worst[f"{name}, {result}"].add(comparison)

    run()
    return dict(worst)


def main(argv: list[str] | None = None) -> None:
    """Print the table.

    Args:
        argv: options; default sys.argv[1:].

    Raises:
        UnavailableError: where kernels cannot run.
    """
    parser = argparse.ArgumentParser(prog="python -m ascend_twin.equivalence_tests.measure_errors")
    parser.add_argument("--device", default="cpu", help="cpu (interpreted), cuda or npu. Default: cpu")
    parser.add_argument("--examples", type=int, default=100, help="batches a dtype. Default: 100")
    options = parser.parse_args(argv)
    if options.device == "cpu":
        interpreter.enable()
    torch.set_num_threads(1)
    columns = [measure(dtype, options.device, options.examples) for dtype in DTYPES]
    print(f"| result | {' | '.join(DTYPES)} |\n|---|--:|--:|--:|")
    for name in columns[0]:
        print(f"| {name} | {' | '.join(str(column[name]) for column in columns)} |")


if __name__ == "__main__":
    main()
