"""Each launch run twice on the same bits, natively and in the interpreter, and every bit compared.

Two runs of a kernel may differ where sums are added in another order, and where exp is another function. In
`as_native` the interpreter does both as native code does, so that nothing is left that may differ, and no
tolerance hides what a compiler has done:

- a product adds its terms one by one, in the order of the reduction, each rounded to float32;
- a product that is added to something starts from it: Triton makes one operation of the two;
- a sum starts from zero and adds in order;
- exp is that of the C library.

So what the interpreter as it is differs from native code in is the noise of accumulation order, and no more.
"""

import ctypes
import ctypes.util
import functools
import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import torch

from ..optimized.gdn.kernels.launch import Launch

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Disagreement(NamedTuple):
    """A tensor of a launch that native code and interpreter leave with different bits.

    Attributes:
        kernel, parameter: where.
        place: of the first element that differs.
        native, interpreted: that element.
        num_differing, size: elements that differ, elements of the tensor.
    """

    kernel: str
    parameter: str
    place: tuple[int, ...]
    native: float
    interpreted: float
    num_differing: int
    size: int

    def __str__(self) -> str:
        return (
            f"{self.kernel}: {self.parameter}{list(self.place)} is {self.native:.9g} natively and "
            f"{self.interpreted:.9g} in the interpreter; {self.num_differing} of {self.size} elements differ"
        )


class Agreement:
    """Takes launches (`launches_taken_by`): runs each natively, then interprets it, and compares.

    What the interpreter wrote is left in the tensors: later launches start from it, in both.

    Args:
        native: runs a launch natively.

    Attributes:
        num_launches: how many were compared.
        disagreements: all that differed.
    """

    def __init__(self, native: Callable[[Launch], None]) -> None:
        self._native = native
        self.num_launches = 0
        self.disagreements: list[Disagreement] = []

    def __call__(self, launch: Launch) -> None:
        tensors = {n: x for n, x in launch.arguments.items() if isinstance(x, torch.Tensor)}
        before = {name: x.clone() for name, x in tensors.items()}
        self._native(launch)
        native = {name: x.clone() for name, x in tensors.items()}
        for name, x in tensors.items():
            if _differing(x, before[name]).any():  # an input may be a view that cannot be written
                x.copy_(before[name])
        with as_native():
            launch.kernel[(launch.num_programs,)](**launch.arguments, **launch.constants)
        self.num_launches += 1
        for name, x in tensors.items():
            differing = _differing(native[name], x)
            if differing.any():
                place = tuple(differing.nonzero()[0].tolist())
                found = native[name][place].item(), x[place].item()
                self.disagreements.append(
                    Disagreement(launch.name, name, place, *found, int(differing.sum()), x.numel())
                )


def _differing(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Where two tensors have different bits; every NaN is one."""
    bits = _INTEGERS[a.itemsize]
    differing = a.view(bits) != b.view(bits)
    return differing & ~(a.isnan() & b.isnan()) if a.is_floating_point() else differing


@contextmanager
def as_native() -> Iterator[None]:
    """A context in which the interpreter, which must be enabled, adds and exponentiates as native code."""
    triton: Any = importlib.import_module("triton.runtime.interpreter")
    handle, float32 = triton.TensorHandle, triton.tl.float32
    builder: Any = type(triton.interpreter_builder)
    add = builder.create_fadd

    def dot(self: Any, a: Any, b: Any, start: Any, *options: Any) -> Any:
        a, b = (self.cast_impl(x, float32).data for x in (a, b))
        result = handle(_product(a, b, start.data), float32)
        result.factors = None if start.data.any() else (a, b)
        return result

    def fadd(self: Any, a: Any, b: Any) -> Any:
        for start, product in ((a, b), (b, a)):
            if factors := getattr(product, "factors", None):
                x, y = factors
                return handle(_product(x, y, start.data), float32)
        return add(self, a, b)

    def sum_in_order(self: Any, input: Any) -> Any:
        x, axis = (input.handle.data.ravel(), 0) if self.axis is None else (input.handle.data, self.axis)
        total = np.add.accumulate(x, axis=axis, dtype=x.dtype).take([-1], axis=axis) + x.dtype.type(0)
        return self.to_tensor(total if self.keep_dims else total.squeeze(axis), input.dtype)

    with (
        mock.patch.object(builder, "create_dot", dot),
        mock.patch.object(builder, "create_fadd", fadd),
        mock.patch.object(builder, "create_exp", lambda self, x: handle(_exp(x.data), x.dtype.scalar)),
        mock.patch.object(triton.ReduceOps, "sum", sum_in_order),
    ):
        yield


def _product(a: np.ndarray, b: np.ndarray, start: np.ndarray) -> np.ndarray:
    """start + a b `[.., M, N]` float32, term by term."""
    total = start.copy()
    for k in range(a.shape[-1]):
        total += a[..., :, k, None] * b[..., k, None, :]
    return total


def _exp(x: np.ndarray) -> np.ndarray:
    return np.vectorize(_expf(), otypes=[np.float32])(x)


@functools.cache
def _expf() -> Any:
    """expf of the C library."""
    expf = ctypes.CDLL(ctypes.util.find_library("m")).expf
    expf.restype, expf.argtypes = ctypes.c_float, [ctypes.c_float]
    return expf
