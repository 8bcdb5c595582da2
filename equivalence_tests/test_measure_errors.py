"""The table of errors: a row for every result, and no limit passed."""

import re

import pytest

from ascend_twin.equivalence_tests.compare import Comparison
from ascend_twin.equivalence_tests.measure_errors import Worst, main
from ascend_twin.equivalence_tests.tolerances import Errors


def test_worst_keeps_the_largest_of_each() -> None:
    worst = Worst()
    worst.add(Comparison("o", Errors(1e-3, 2e-3), Errors(1e-2, 4e-3)))
    worst.add(Comparison("o", Errors(2e-3, 1e-3), Errors(1e-2, 1e-2)))
    assert str(worst) == "2.0e-03 / 2.0e-03 (50%)"


def test_measure_errors_prints_a_row_for_every_result(
    triton_runs: None, request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["--device", str(request.config.getoption("--device")), "--examples", "2"])
    rows = capsys.readouterr().out.splitlines()
    assert rows[0] == "| result | float32 | float16 | bfloat16 |"
    names = [row.split(" | ")[0] for row in rows]
    for name in ("l2norm.y", "chunk_delta_h.h", "fused_inter_chunk.o", "staged, o", "fused, final_state"):
        assert f"| {name}" in names
    used = [int(x) for row in rows[2:] for x in re.findall(r"\((\d+)%\)", row)]
    assert len(used) == 3 * len(rows[2:])
    assert max(used) <= 100
