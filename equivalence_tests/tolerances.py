"""How far a result may be from the truth: the only place with numbers.

Two errors are measured, and both must stay within their limit:

    ratio      RMS(error) / RMS(truth) of a sequence, the largest over sequences
    worst_row  RMS of the error of one row / RMS(truth) of its sequence, the largest over rows

A row is one token of one value head of o, or one key row of one value head of a state. The limit is the
larger of a floor and twice the error that the chunked reference makes when it runs in that dtype.

The floors were measured on a CPU, K = V = 64. Metadata, block tables and statistics have no tolerance.
"""

from typing import NamedTuple

import torch


class Errors(NamedTuple):
    """The two errors of a result, or the limits of them."""

    ratio: float
    worst_row: float


FLOORS = {
    torch.float64: Errors(1e-12, 1e-11),
    torch.float32: Errors(1e-5, 2e-4),
    torch.float16: Errors(1e-3, 6e-3),
    torch.bfloat16: Errors(8e-3, 4e-2),
}

REFERENCE_FACTOR = 2.0


def limit(dtype: torch.dtype, reference: Errors | None = None) -> Errors:
    """The limit for a result computed from inputs of `dtype`.

    Args:
        dtype: of q, k and v.
        reference: errors of the chunked reference run in that dtype on the same case, if it was run.
    """
    floor = FLOORS[dtype]
    if reference is None:
        return floor
    return Errors(*(max(f, REFERENCE_FACTOR * r) for f, r in zip(floor, reference, strict=True)))


def smallest_scale(dtype: torch.dtype) -> float:
    """RMS below which a truth is measured absolutely, as if it were that large.

    That is the smallest normal number of `dtype`. Devices flush smaller ones to 0 where they compute in
    float32: for float32 and bfloat16, a truth must be larger by the accuracy that is asked for.
    """
    tiny = torch.finfo(dtype).tiny
    return tiny / FLOORS[dtype].ratio if dtype in (torch.float32, torch.bfloat16) else tiny
