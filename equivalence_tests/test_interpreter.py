"""The interpreter computes as hardware does, refuses what it cannot, and sees every address."""

import importlib
import os
import subprocess
import sys
import weakref
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ascend_twin.equivalence_tests import interpreter
from ascend_twin.equivalence_tests.interpreter import AddressError, RawBfloat16Error, run_launch, touched
from ascend_twin.reference.errors import InvalidArgumentError, UnavailableError

try:
    interpreter.enable()
except UnavailableError as error:
    pytest.skip(str(error), allow_module_level=True)

import triton.language as tl  # pyright: ignore[reportMissingImports]

from ascend_twin.optimized.gdn.kernels.launch import (
    MAX_PROGRAMS,
    Launch,
    launch,
    recorded_launches,
)

# Any to the type checker, to which a kernel takes constants as tl.constexpr only.
triton: Any = importlib.import_module("triton")

# Every sign, exponent and upper mantissa, with lower halves around what decides the rounding.
LOWER_HALVES = (0x0000, 0x0001, 0x7FFF, 0x8000, 0x8001, 0xFFFF)
UPPER_HALVES = torch.arange(2**16, dtype=torch.int64)
FLOATS = (torch.bfloat16, torch.float16, torch.float32)


@pytest.fixture(scope="module", autouse=True)
def _interpreted(request: pytest.FixtureRequest) -> None:
    if request.config.getoption("--device") == "linalg":
        pytest.skip("launches on the CPU run natively: the interpreter is tested with --device cpu")


def float32_patterns(lower: int) -> torch.Tensor:
    return (UPPER_HALVES << 16 | lower).to(torch.uint32).view(torch.float32)


def bfloat16_patterns() -> torch.Tensor:
    return UPPER_HALVES.to(torch.uint16).view(torch.bfloat16)


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def assert_same_bits(a: torch.Tensor, b: torch.Tensor) -> None:
    """Equal in dtype and in every bit, but for what a NaN carries."""
    assert a.dtype == b.dtype
    assert torch.equal(a.isnan(), b.isnan())
    number = ~a.isnan()
    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[a.dtype.itemsize]
    assert torch.equal(a[number].view(bits), b[number].view(bits))


# Casts and constants


@triton.jit
def cast_kernel(x, y, n: tl.constexpr, implicit: tl.constexpr):
    o = tl.arange(0, n)
    b_x = tl.load(x + o)
    if not implicit:
        b_x = b_x.to(y.dtype.element_ty)
    tl.store(y + o, b_x)


def cast(x: torch.Tensor, dtype: torch.dtype, implicit: bool = False) -> torch.Tensor:
    y = torch.empty(x.shape, dtype=dtype)
    cast_kernel[(1,)](x, y, n=x.numel(), implicit=implicit)
    return y


@pytest.mark.parametrize("implicit", [False, True], ids=["to", "store"])
@pytest.mark.parametrize("lower", LOWER_HALVES, ids=hex)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_cast_rounds_every_float32_exponent_as_torch(dtype: torch.dtype, lower: int, implicit: bool) -> None:
    x = float32_patterns(lower)
    assert_same_bits(cast(x, dtype, implicit), x.to(dtype))


@given(st.lists(st.floats(width=32), min_size=64, max_size=64))
def test_cast_rounds_any_float32_as_torch(values: list[float]) -> None:
    x = torch.tensor(values)
    assert_same_bits(cast(x, torch.bfloat16), x.bfloat16())


@pytest.mark.parametrize(
    "source", [torch.float64, torch.float16, torch.int64, torch.int32, torch.int8], ids=str
)
def test_cast_to_bfloat16_rounds_other_dtypes_as_torch(source: torch.dtype) -> None:
    x = random(256, dtype=torch.float64)
    x = (x * 1e9).to(source) if source in (torch.int64, torch.int32) else (x * 50).to(source)
    assert_same_bits(cast(x, torch.bfloat16), x.bfloat16())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16], ids=str)
def test_cast_from_bfloat16_is_exact(dtype: torch.dtype) -> None:
    x = bfloat16_patterns()
    assert_same_bits(cast(x, dtype), x.to(dtype))


def test_cast_from_bfloat16_to_integers_drops_the_fraction() -> None:
    x = (random(64) * 1000).bfloat16()
    assert torch.equal(cast(x, torch.int32), x.to(torch.int32))


@triton.jit
def constants_kernel(x, y, n: tl.constexpr):
    o = tl.arange(0, n)
    b_x = tl.load(x + o)
    tl.store(y + o, tl.full([n], 0.3, tl.bfloat16))
    tl.store(y + n + o, tl.zeros([n], tl.bfloat16))
    tl.store(y + 2 * n + o, tl.where(o % 2 == 0, b_x, -1.7))
    tl.store(y + 3 * n + o, 1e-3)


def test_constants_are_bfloat16_as_in_torch() -> None:
    x, y = random(16, dtype=torch.bfloat16), torch.empty(4, 16, dtype=torch.bfloat16)
    constants_kernel[(1,)](x, y, n=16)
    want = torch.tensor([0.3, 0.0, -1.7, 1e-3]).bfloat16()[:, None].repeat(1, 16)
    want[2, ::2] = x[::2]
    assert_same_bits(y, want)


# Products


@triton.jit
def dot_kernel(a, b, c, d, n: tl.constexpr):
    o = tl.arange(0, n)[:, None] * n + tl.arange(0, n)[None, :]
    b_d = tl.dot(tl.load(a + o), tl.trans(tl.load(b + o)), out_dtype=c.dtype.element_ty)
    tl.store(c + o, b_d)
    tl.store(d + o, tl.dot(tl.load(a + o), tl.trans(tl.load(b + o)), acc=b_d, out_dtype=c.dtype.element_ty))


def dot(a: torch.Tensor, b: torch.Tensor, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, ...]:
    c, d = torch.empty(a.shape, dtype=dtype), torch.empty(a.shape, dtype=dtype)
    dot_kernel[(1,)](a, b, c, d, n=len(a))
    return c, d


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_dot_multiplies_exactly_and_accumulates_in_float32(dtype: torch.dtype) -> None:
    # Integers so small that float32 adds them exactly, in any order, and so large that float16 does not.
    a, b = ((random(64, 64, seed=seed) * 80).round().to(dtype) for seed in (0, 1))
    c, d = dot(a, b)
    assert torch.equal(c, a.float() @ b.float().T)
    assert torch.equal(d, 2 * c)
    assert c.abs().max() > torch.finfo(torch.float16).max


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_dot_is_near_float64(dtype: torch.dtype) -> None:
    a, b = (random(64, 64, dtype=dtype, seed=seed) for seed in (2, 3))
    torch.testing.assert_close(dot(a, b)[0].double(), a.double() @ b.double().T, rtol=1e-5, atol=1e-5)


def test_dot_accumulates_in_float32_when_it_returns_float16() -> None:
    a = torch.ones(64, 64, dtype=torch.float16)
    b = a.clone()
    b[:, 0] = 2048  # plus one is 2048 in float16, 63 times over
    assert dot(a, b, torch.float16)[0].unique().tolist() == [2112]


# bfloat16 that is only moved


@triton.jit
def move_kernel(x, y, n: tl.constexpr):
    o = tl.arange(0, n)
    b_x = tl.load(x + o[:, None] * n + o[None, :])
    b_x = tl.where((o % 2 == 0)[:, None], b_x, tl.trans(b_x))
    b_x = tl.reshape(b_x, [n * n // 4, 4])
    b_x = tl.reshape(tl.broadcast_to(b_x[:, :, None], [n * n // 4, 4, 2]), [2 * n * n])
    tl.store(y + tl.arange(0, 2 * n * n), b_x)


def test_moving_bfloat16_keeps_every_bit() -> None:
    n = 256
    x, y = bfloat16_patterns().reshape(n, n), torch.empty(2 * n * n, dtype=torch.bfloat16)
    move_kernel[(1,)](x, y, n=n)
    rows = torch.arange(n)[:, None] % 2 == 0
    bits = x.view(torch.int16)
    assert torch.equal(y.view(torch.int16), torch.where(rows, bits, bits.T).reshape(-1).repeat_interleave(2))


# bfloat16 that is computed on


@triton.jit
def _larger(a, b):
    return tl.where(a > b, a, b)


@triton.jit
def _in_a_function(a, b):
    return a + b


@triton.jit
def compute_kernel(x, y, z, n: tl.constexpr, operation: tl.constexpr):
    o = tl.arange(0, n)
    b_x = tl.load(x + o)
    b_y = tl.load(y + o)
    b_z = b_y.to(tl.float32)
    if operation == "add":
        b_z = b_x + b_y
    if operation == "add in a function":
        b_z = _in_a_function(b_x, b_y)
    if operation == "add a number":
        b_z = b_x + 1.0
    if operation == "subtract":
        b_z = b_x - b_y
    if operation == "negate":
        b_z = -b_x
    if operation == "multiply":
        b_z = b_x * b_y
    if operation == "divide":
        b_z = b_x / b_y
    if operation == "less":
        b_z = b_x < b_y
    if operation == "equal":
        b_z = b_x == -b_x.to(tl.float32).to(tl.bfloat16)
    if operation == "maximum":
        b_z = tl.maximum(b_x, b_y)
    if operation == "minimum":
        b_z = tl.minimum(b_x, b_y)
    if operation == "abs":
        b_z = tl.abs(b_x)
    if operation == "fma":
        b_z = tl.fma(b_x, b_y, b_y)
    if operation == "clamp":
        b_z = tl.clamp(b_x, b_y, b_y)
    if operation == "sum":
        b_z = tl.sum(b_x, 0) + tl.zeros([n], tl.float32)
    if operation == "max":
        b_z = tl.max(b_x, 0) + tl.zeros([n], tl.float32)
    if operation == "argmax":
        b_z = tl.argmax(b_x, 0) + tl.zeros([n], tl.float32)
    if operation == "reduce":
        b_z = tl.reduce(b_x, 0, _larger) + tl.zeros([n], tl.float32)
    if operation == "cumsum":
        b_z = tl.cumsum(b_x, 0)
    if operation == "scan":
        b_z = tl.associative_scan(b_x, 0, _larger)
    if operation == "atomic add":
        b_z = tl.atomic_add(x + o, b_y)
    if operation == "mixed with float32":
        b_z = b_x * b_y.to(tl.float32)
    if operation == "if" and tl.load(z):  # minus zero: false, though a bit of it is not zero
        b_z += 1
    if operation == "int":
        for _ in range(tl.load(x)):
            b_z += 1
    tl.store(z + o, b_z)


REFUSED = (
    "add",
    "add in a function",
    "add a number",
    "subtract",
    "negate",
    "multiply",
    "less",
    "equal",
    "if",
    "int",
)
RIGHT = {
    "divide": lambda x, y: x.float() / y.float(),
    "maximum": lambda x, y: torch.maximum(x, y),
    "minimum": lambda x, y: torch.minimum(x, y),
    "abs": lambda x, y: x.abs(),
    "fma": lambda x, y: x.float() * y.float() + y.float(),
    "clamp": lambda x, y: y,
    "sum": lambda x, y: x.float().sum().expand(len(x)),
    "max": lambda x, y: x.max().expand(len(x)),
    "argmax": lambda x, y: x.argmax().expand(len(x)),
    "reduce": lambda x, y: x.max().expand(len(x)),
    "cumsum": lambda x, y: x.float().cumsum(0),
    "scan": lambda x, y: x.cummax(0).values,
    "mixed with float32": lambda x, y: x.float() * y.float(),
}


def compute(operation: str) -> tuple[torch.Tensor, ...]:
    x, y = (random(16, dtype=torch.bfloat16, seed=seed) for seed in (4, 5))
    z = torch.full([16], -0.0, dtype=torch.bfloat16 if operation == "if" else torch.float32)
    compute_kernel[(1,)](x, y, z, n=16, operation=operation)
    return x, y, z


@pytest.mark.parametrize("operation", REFUSED)
def test_raw_bfloat16_is_refused(operation: str) -> None:
    with pytest.raises(RawBfloat16Error, match=r"^\w+ on bfloat16.* upcast to float32 after the load"):
        compute(operation)


def test_raw_bfloat16_is_refused_by_the_name_of_the_operation() -> None:
    with pytest.raises(RawBfloat16Error, match=r"^fmul on bfloat16"):
        compute("multiply")


@pytest.mark.parametrize("operation", RIGHT)
def test_raw_bfloat16_is_refused_or_upcast_by_triton(operation: str) -> None:
    """Which of the two depends on the version of Triton."""
    try:
        x, y, z = compute(operation)
    except RawBfloat16Error:
        assert operation != "mixed with float32"
    else:
        torch.testing.assert_close(z, RIGHT[operation](x, y).float(), rtol=1e-6, atol=1e-6)


def test_raw_bfloat16_is_refused_in_an_atomic_operation() -> None:
    with pytest.raises((RawBfloat16Error, ValueError), match="bf"):
        compute("atomic add")


# Masks


@triton.jit
def masked_kernel(x, y, n, size: tl.constexpr, other: tl.constexpr):
    o = tl.arange(0, size)
    if other is None:
        tl.store(y + o, tl.load(x + o, mask=o < n))
    else:
        tl.store(y + o, tl.load(x + o, mask=o < n, other=other))


@pytest.mark.parametrize("dtype", [*FLOATS, torch.float64], ids=str)
def test_masked_load_is_nan_where_hardware_is_undefined(dtype: torch.dtype) -> None:
    x, y = torch.ones(5, dtype=dtype), torch.zeros(8, dtype=dtype)
    masked_kernel[(1,)](x, y, 5, size=8, other=None)
    assert y[:5].tolist() == [1.0] * 5
    assert y[5:].isnan().all()


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_masked_load_indexes_nothing_where_hardware_is_undefined(dtype: torch.dtype) -> None:
    x, y = torch.ones(5, dtype=dtype), torch.zeros(8, dtype=dtype)
    masked_kernel[(1,)](x, y, 5, size=8, other=None)
    assert y[:5].tolist() == [1] * 5
    assert (y[5:].abs() > 2**30).all()


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("other", [0, 0.0, 3.0])
def test_masked_load_is_other_where_given(dtype: torch.dtype, other: float) -> None:
    x, y = torch.ones(5, dtype=dtype), torch.zeros(8, dtype=dtype)
    masked_kernel[(1,)](x, y, 5, size=8, other=other)
    assert y.tolist() == [1.0] * 5 + [other] * 3


@triton.jit
def masked_scalar_kernel(x, y, n, first_program):
    i = tl.program_id(0)
    tl.store(y + i, tl.load(x + i, mask=i < n, other=0.0))
    tl.store(x + i, 7.0, mask=i < n)


def test_masked_scalar_is_neither_read_nor_written() -> None:
    x, y = torch.ones(4), torch.ones(4)
    masked_scalar_kernel[(4,)](x, y, 2, 0)
    assert x.tolist() == [7.0, 7.0, 1.0, 1.0]
    assert y.tolist() == [1.0, 1.0, 0.0, 0.0]


# Addresses


@triton.jit
def copy_kernel(x, y, start, n, size: tl.constexpr):
    o = start + tl.program_id(0) * size + tl.arange(0, size)
    tl.store(y + o, tl.load(x + o, mask=o < n, other=0.0), mask=o < n)


def test_access_within_tensors_copies_them() -> None:
    x, y = random(20), torch.full([20], torch.nan)
    copy_kernel[lambda meta: (triton.cdiv(20, meta["size"]),)](x, y, 0, 20, size=8)
    assert torch.equal(x, y)


@pytest.mark.parametrize(
    ("x_size", "y_size", "start", "message"),
    [
        (15, 16, 0, r"load 4 bytes past the last byte of x \[15\] \(60 bytes\) in program \(1, 0, 0\)"),
        (16, 14, 0, r"store 8 bytes past the last byte of y \[14\] \(56 bytes\) in program \(1, 0, 0\)"),
        (16, 16, -2, r"load 8 bytes before the first byte of x \[16\] .*program \(0, 0, 0\)"),
        (4, 16, -1, r"load 4 bytes before the first and 12 bytes past the last byte of x"),
        (0, 16, 0, r"load 32 bytes past the last byte of x \[0\] \(0 bytes\)"),
    ],
)
def test_access_outside_a_tensor_is_refused(x_size: int, y_size: int, start: int, message: str) -> None:
    # Parts of one storage: what lies outside a tensor is memory nevertheless.
    memory = random(48)
    with pytest.raises(AddressError, match=message):
        copy_kernel[(2,)](memory[8 : 8 + x_size], memory[28 : 28 + y_size], start, 16, size=8)


def test_access_of_a_tensor_without_elements_is_refused() -> None:
    with pytest.raises(AddressError, match=r"of x \[3, 0\] \(0 bytes\)"):
        copy_kernel[(1,)](torch.empty(3, 0), torch.empty(1), 0, 1, size=1)


def test_access_outside_writes_nothing() -> None:
    memory = torch.zeros(16)
    with pytest.raises(AddressError):
        copy_kernel[(1,)](torch.ones(8), memory[2:6], 0, 8, size=8)
    assert not memory.any()


@triton.jit
def columns_kernel(x, y, columns, stride, size: tl.constexpr):
    o = tl.arange(0, size)
    m = o[None, :] < columns
    tl.store(
        y + o[:, None] * size + o[None, :], tl.load(x + o[:, None] * stride + o[None, :], mask=m), mask=m
    )


def test_access_between_the_rows_of_a_strided_tensor_is_refused() -> None:
    mixed, y = random(4, 6), torch.zeros(4, 4)
    columns_kernel[(1,)](mixed[:, 2:5], y, 3, 6, size=4)
    assert torch.equal(y[:, :3], mixed[:, 2:5])
    with pytest.raises(AddressError, match="4 bytes past the last byte of x"):
        columns_kernel[(1,)](mixed[:, 2:5], y, 4, 6, size=4)
    for x in (mixed[:, 2:5], mixed[:, None, 2:5].expand(4, 2, 3)):
        with pytest.raises(AddressError, match="load between one and another byte of x"):
            columns_kernel[(1,)](x, y, 3, 5, size=4)


@pytest.mark.parametrize("strides", [(0, 1), (1, 1), (4, 3), (1, 4)])
def test_access_of_a_tensor_that_overlaps_itself_or_is_dense_is_allowed(strides: tuple[int, int]) -> None:
    memory, y = random(64), torch.zeros(32)
    reach = 1 + 3 * sum(strides)
    copy_kernel[(1,)](memory.as_strided((4, 4), strides), y, 0, reach, size=32)
    assert torch.equal(y[:reach], memory[:reach])


@triton.jit
def gather_kernel(indices, x, y, n, size: tl.constexpr):
    o = tl.arange(0, size)
    tl.store(y + o, tl.load(x + tl.load(indices + o, mask=o < n)))


def test_access_by_an_index_that_was_masked_is_refused() -> None:
    x, y = random(8), torch.zeros(8)
    indices = torch.arange(7, -1, -1, dtype=torch.int32)
    gather_kernel[(1,)](indices, x, y, 8, size=8)
    assert torch.equal(y, x.flip(0))
    with pytest.raises(AddressError, match="of x"):
        gather_kernel[(1,)](indices, x, y, 7, size=8)


@triton.jit
def choose_kernel(x, y, z, chosen, size: tl.constexpr):
    o = tl.arange(0, size)
    p = tl.where(o % 3 == 0, x + o, tl.where(o % 3 == 1, y + o, z + o))
    tl.store(chosen + o, tl.load(p))
    tl.store(p, 0.0)


def test_access_may_choose_between_tensors() -> None:
    tensors = [torch.full([8], float(i)) for i in (1, 2, 3)]
    chosen = torch.zeros(8)
    choose_kernel[(1,)](*tensors, chosen, size=8)
    assert chosen.tolist() == [1.0, 2.0, 3.0, 1.0, 2.0, 3.0, 1.0, 2.0]
    for i, x in enumerate(tensors):
        assert x.tolist() == [0.0 if o % 3 == i else i + 1.0 for o in range(8)]
    with pytest.raises(AddressError, match="of y"):
        choose_kernel[(1,)](tensors[0], tensors[1][:7], tensors[2], chosen, size=8)


@triton.jit
def atomic_kernel(x, y, n, size: tl.constexpr):
    o = tl.arange(0, size)
    tl.store(y + o, tl.atomic_add(x + o // 2, 1.0, mask=o < n), mask=o < n)


def test_atomic_operation_is_done_and_checked() -> None:
    x, y = torch.tensor([10.0, 20.0, 30.0]), torch.zeros(6)
    atomic_kernel[(1,)](x, y, 6, size=8)
    assert x.tolist() == [12.0, 22.0, 32.0]
    assert y.tolist() == [10.0, 11.0, 20.0, 21.0, 30.0, 31.0]
    with pytest.raises(AddressError, match="atomic 4 bytes past the last byte of x"):
        atomic_kernel[(1,)](x, torch.zeros(8), 8, size=8)


@triton.jit
def swap_kernel(x, expected):
    tl.atomic_cas(x + 1, expected, 9)


def test_atomic_swap_is_done_and_checked() -> None:
    x = torch.tensor([5, 5], dtype=torch.int32)
    swap_kernel[(1,)](x, 5)
    assert x.tolist() == [5, 9]
    with pytest.raises(AddressError, match="of x"):
        swap_kernel[(1,)](x[:1], 5)


def test_launch_refuses_a_tensor_without_memory() -> None:
    with pytest.raises(UnavailableError, match="y is on meta"):
        copy_kernel[(1,)](torch.ones(8), torch.ones(8, device="meta"), 0, 8, size=8)


def test_launch_keeps_no_tensor() -> None:
    x = torch.ones(8)
    gone = weakref.ref(x)
    copy_kernel[(1,)](x, torch.ones(8), 0, 8, size=8)
    del x
    assert gone() is None


# Chosen programs of a launch, and tensors without memory


@triton.jit
def rows_kernel(
    x,
    y,
    cu_seqlens,
    chunk_indices,
    first_program,
    H: tl.constexpr,
    BT: tl.constexpr,
    K: tl.constexpr,
    wide: tl.constexpr,
):
    """Copies chunk `[BT, K]` of one head; a program for each chunk and head."""
    i = tl.program_id(0) + first_program
    i_c, i_h = i // H, i % H
    i_n = tl.load(chunk_indices + 2 * i_c)
    bos = tl.load(cu_seqlens + i_n)
    eos = tl.load(cu_seqlens + i_n + 1)
    o_t = bos + tl.load(chunk_indices + 2 * i_c + 1) * BT + tl.arange(0, BT)
    m_t = o_t < eos
    if wide:
        o_t = o_t.to(tl.int64)
    o = (o_t[:, None] * H + i_h) * K + tl.arange(0, K)[None, :]
    b_x = tl.load(x + o, mask=m_t[:, None], other=0.0).to(tl.float32)
    tl.store(y + o, b_x + 1, mask=m_t[:, None])


def rows_launches(
    lengths: list[int], wide: bool, device: str = "meta", H: int = 4, BT: int = 64
) -> list[Launch]:
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    chunks = [(n, c) for n, length in enumerate(lengths) for c in range(-(-length // BT))]
    x = torch.empty(sum(lengths), H, 128, dtype=torch.bfloat16, device=device)
    arguments = {
        "x": x.fill_(2.0),
        "y": torch.zeros_like(x, dtype=torch.float32),
        "cu_seqlens": cu_seqlens,
        "chunk_indices": torch.tensor(chunks, dtype=torch.int32),
    }
    with recorded_launches() as launches:
        launch(rows_kernel, len(chunks) * H, arguments, {"H": H, "BT": BT, "K": 128, "wide": wide})
    return launches


@pytest.mark.parametrize("device", ["meta", "cpu"])
def test_run_launch_reports_what_each_program_touches(device: str) -> None:
    (rows,) = rows_launches([100, 0, 70], wide=False, device=device)
    accesses = run_launch(rows, [2, 7, 9])
    for parameter, kind in (("x", "load"), ("y", "store")):
        shape = rows.arguments[parameter].shape
        assert {x.kind for x in accesses if x.parameter == parameter} == {kind}
        for program, head, tokens in ((2, 2, range(64)), (7, 3, range(64, 100)), (9, 1, range(100, 164))):
            t, h, _ = np.unravel_index(touched(accesses, parameter, kind, program), shape)
            assert np.unique(t).tolist() == list(tokens)
            assert np.unique(h).tolist() == [head]
            assert len(t) == len(tokens) * 128
    assert touched(accesses, "cu_seqlens", program=9).tolist() == [2, 3]
    assert touched(accesses, "chunk_indices", "load").tolist() == [0, 1, 2, 3, 4, 5]
    assert touched(accesses, "x", "store").tolist() == []


def test_run_launch_runs_the_chosen_programs_only() -> None:
    (rows,) = rows_launches([100], wide=False, device="cpu")
    run_launch(rows, [5])
    y = rows.arguments["y"]
    assert (y[64:, 1] == 3.0).all()
    y[64:, 1] = 0.0
    assert not y.any()


@triton.jit
def fill_kernel(x, y, z, size: tl.constexpr):
    o = tl.arange(0, size)
    tl.store(y + o, tl.load(x + o, mask=o < 3))
    tl.store(z + o, tl.atomic_add(x + o, 1.0))


def test_run_launch_loads_the_fill_where_no_memory_is() -> None:
    x = torch.empty(4, device="meta")
    y, z = torch.zeros(4), torch.zeros(4)
    fill = Launch(fill_kernel, 1, {"x": x, "y": y, "z": z}, {"size": 4})
    accesses = run_launch(fill, [0], fill=0.5)
    assert y[:3].tolist() == [0.5] * 3
    assert y[3].isnan()
    assert z.tolist() == [0.5] * 4
    assert touched(accesses, "x", "load").tolist() == [0, 1, 2]
    assert touched(accesses, "x", "atomic").tolist() == [0, 1, 2, 3]


def test_run_launch_catches_int32_overflow_in_addresses() -> None:
    first = 2**22 // 64 * 4 + 1  # program of the chunk that element 2**31 begins
    for wide in (False, True):
        launches = rows_launches([2**22 + 64], wide)
        fits, overflows = ((launches[i // MAX_PROGRAMS], [i % MAX_PROGRAMS]) for i in (first - 4, first))
        assert touched(run_launch(*fits), "x").max() == 2**31 - 1 - 2 * 128
        if wide:
            assert touched(run_launch(*overflows), "y").min() == 2**31 + 128
        else:
            with pytest.raises(
                AddressError, match=r"load 4294967040 bytes before the first byte of x \[4194368, 4"
            ):
                run_launch(*overflows)


def test_run_launch_refuses_programs_that_the_launch_lacks() -> None:
    with pytest.raises(InvalidArgumentError, match=r"programs is 8; allowed: 0 to 7"):
        run_launch(rows_launches([100], wide=False)[0], [8])


# Getting there


def test_launch_trusts_the_interpreter_with_bfloat16() -> None:
    x = torch.ones(4, dtype=torch.bfloat16)
    launch(masked_scalar_kernel, 4, {"x": x, "y": torch.empty_like(x), "n": 3}, {})
    assert x.tolist() == [7.0, 7.0, 7.0, 1.0]


def test_enable_twice_does_it_once() -> None:
    executor = triton.runtime.interpreter.GridExecutor
    interpreter.enable()
    assert triton.runtime.interpreter.GridExecutor is executor


REFUSALS = {
    "import triton": "imported for compiling",
    "import ascend_twin.optimized.gdn.kernels.launch": "imported for compiling",
    "import sys; sys.modules['triton'] = None": "Triton cannot be imported",
    # What the first launch of a kernel does.
    """
os.environ["TRITON_INTERPRET"] = "1"
import triton.language as tl, triton.runtime.interpreter
triton.runtime.interpreter._patch_lang(lambda: tl)
""": "interpreted a kernel already",
}


@pytest.mark.parametrize("before", REFUSALS, ids=REFUSALS.values())
def test_enable_refuses_a_process_that_cannot_interpret(before: str) -> None:
    script = f"""
import os
from ascend_twin.equivalence_tests import interpreter
from ascend_twin.reference.errors import UnavailableError
{before}
previous = os.environ.get("TRITON_INTERPRET")
try:
    interpreter.enable()
except UnavailableError as error:
    print(error, os.environ.get("TRITON_INTERPRET") == previous)
"""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment)
    assert REFUSALS[before] in done.stdout, done.stderr
    assert done.stdout.endswith("True\n")
