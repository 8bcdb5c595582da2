"""Small kernels on which Triton's interpreters, triton-ascend's front end and the definition can be compared.

A `Case` is one kernel with arguments to draw and the result that Triton defines. On a `CONSTRUCTS` all agree.
A `Difference` is a case on which somebody is wrong; docs/compiler_differences.md is its report, and
fixtures/cases/linalg/NAME.mlir the linalg IR that triton-ascend 3.2.0 makes of it.

Kernels of the gated delta rule were read for what they are written in, not copied.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from importlib import resources
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl

from ..optimized.gdn.kernels.launch import Launch

Arguments = dict[str, Any]

FRONT_END = "front end"
ASCEND_INTERPRETER, TRITON_INTERPRETER = "interpreter of triton-ascend 3.2.0", "interpreter of Triton 3.6.0"
UNTOUCHED = -7.0
"""What outputs hold before a launch."""


@dataclass(frozen=True)
class Case:
    """One kernel, launched as one program.

    Attributes:
        kernel: its name is the name of the case.
        arguments: draws what it is launched with; the output is the tensor `y`, all `UNTOUCHED`.
        expected: what `y` is afterwards, in float64, by the arguments; UNTOUCHED where nothing is stored.
        constants: what is known when it is compiled.
        tolerance: largest difference that is none, relative to 1 or to the expected value.
    """

    kernel: Any
    arguments: Callable[[np.random.Generator], Arguments]
    expected: Callable[[Arguments], torch.Tensor]
    constants: tuple[tuple[str, Any], ...] = ()
    tolerance: float = 0.0

    @property
    def name(self) -> str:
        return self.kernel.__name__

    def launch(self, arguments: Arguments) -> Launch:
        return Launch(self.kernel, 1, arguments, dict(self.constants))


@dataclass(frozen=True)
class Difference(Case):
    """A case on which somebody is wrong, whatever is drawn.

    Attributes:
        title: of the report.
        issue: issues and pull requests that are about it, or about its kin.
        wrong: who; nobody where the linalg IR leaves open what our lowering then decides rightly.
        strays: whether native code touches memory that the kernel masks, instead of giving another result.
    """

    title: str = ""
    issue: str = "none found"
    wrong: tuple[str, ...] = (FRONT_END,)
    strays: bool = False

    @property
    def linalg(self) -> str:
        """The linalg IR of triton-ascend 3.2.0, as `without_locations` gives it; "" where it is right."""
        file = resources.files("ascend_twin.fixtures") / "cases/linalg" / f"{self.name}.mlir"
        return file.read_text(encoding="utf-8") if file.is_file() else ""


def without_locations(linalg: str) -> str:
    """Linalg IR without the places in the kernel's file that its operations come from."""
    place = r"#loc\d*|unknown|\"[^\"]*\":\d+:\d+|\"[^\"]*\"\([^()]*\)|callsite\([^()]*\)"
    linalg = re.sub(rf" loc\((?:{place})\)", "", linalg)
    return re.sub(r"^#loc.*\n", "", linalg, flags=re.MULTILINE).strip() + "\n"


def run(case: Case, arguments: Arguments, take: Callable[[Launch], None]) -> torch.Tensor:
    """`y` after a launch that `take` runs; the arguments stay as they are."""
    y = arguments["y"].clone()
    take(case.launch({**arguments, "y": y}))
    return y


def interpret(launch: Launch) -> None:
    """Run a launch in the interpreter."""
    launch.kernel[(launch.num_programs,)](**launch.arguments, **launch.constants)


def disagreement(case: Case, arguments: Arguments, y: torch.Tensor) -> str:
    """Where `y` is not as expected: its first such element; "" if there is none."""
    found, expected = y.double(), case.expected(arguments).double()
    near = (found - expected).abs() <= case.tolerance * expected.abs().clamp(min=1.0)
    both = near | (found == expected) | (found.isnan() & expected.isnan())
    if bool(both.all()):
        return ""
    place = tuple(int(i) for i in (~both).nonzero()[0])
    return f"{case.name}: y{list(place)} is {float(found[place])}, expected {float(expected[place])}"


# What the cases draw


def _floats(rng: np.random.Generator, *shape: int) -> torch.Tensor:
    return torch.from_numpy(rng.standard_normal(shape, dtype=np.float32))


def _y(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.full(shape, UNTOUCHED, dtype=dtype)


def _tile(row: int, num_rows: int, column: int, num_columns: int, x: torch.Tensor) -> torch.Tensor:
    """`[num_rows, num_columns]` of a matrix from `(row, column)` on; 0 outside it."""
    tile = torch.zeros(num_rows, num_columns)
    for i in range(max(0, -row), min(num_rows, x.shape[0] - row)):
        for j in range(max(0, -column), min(num_columns, x.shape[1] - column)):
            tile[i, j] = x[row + i, column + j]
    return tile


# Where somebody is wrong


@triton.jit(do_not_specialize=["T", "first"])
def block_before_start_kernel(x, y, T, first):
    """A block that begins before its tensor, which has rows 12 and on: what is before is padding."""
    p_x = tl.make_block_ptr(x + 12 * 16, (T, 16), (16, 1), (first, 0), (16, 16), (1, 0))
    p_y = tl.make_block_ptr(y, (16, 16), (16, 1), (0, 0), (16, 16), (1, 0))
    tl.store(p_y, tl.load(p_x, boundary_check=(0, 1), padding_option="zero"))


def _before_start(rng: np.random.Generator) -> Arguments:
    T = int(rng.integers(2, 20))
    return {"x": _floats(rng, 32, 16), "y": _y(16, 16), "T": T, "first": -int(rng.integers(2, 12))}


@triton.jit(do_not_specialize=["T", "column"])
def block_beside_width_kernel(x, y, T, column):
    """A block that is wholly to the right of its tensor of 32 columns: all of it is padding."""
    p_x = tl.make_block_ptr(x, (T, 32), (32, 1), (0, column), (16, 16), (1, 0))
    p_y = tl.make_block_ptr(y, (16, 16), (16, 1), (0, 0), (16, 16), (1, 0))
    tl.store(p_y, tl.load(p_x, boundary_check=(0, 1), padding_option="zero"))


def _beside_width(rng: np.random.Generator) -> Arguments:
    T = int(rng.integers(2, 16))
    return {"x": _floats(rng, T, 32), "y": _y(16, 16), "T": T, "column": 32}


@triton.jit(do_not_specialize=["K", "row"])
def block_checked_in_columns_kernel(x, y, K, row):
    """Only columns are checked: the block's row must not count."""
    p_x = tl.make_block_ptr(x, (64, K), (64, 1), (row, 0), (16, 16), (1, 0))
    p_y = tl.make_block_ptr(y, (16, 16), (16, 1), (0, 0), (16, 16), (1, 0))
    tl.store(p_y, tl.load(p_x, boundary_check=(1,), padding_option="zero"))


def _checked_in_columns(rng: np.random.Generator) -> Arguments:
    K, row = int(rng.integers(2, 15)), int(rng.integers(2, 48))
    return {"x": _floats(rng, 64, 64), "y": _y(16, 16), "K": K, "row": row}


@triton.jit(do_not_specialize=["T", "i_t"])
def block_of_transposed_kernel(x, y, T, i_t):
    """A block of the transpose with the `order` of rows, which says what is fast, not what is read."""
    p_x = tl.make_block_ptr(x, (16, T), (1, 16), (0, i_t), (16, 16), (1, 0))
    p_y = tl.make_block_ptr(y, (16, 16), (16, 1), (0, 0), (16, 16), (1, 0))
    tl.store(p_y, tl.load(p_x, boundary_check=(0, 1), padding_option="zero"))


def _of_transposed(rng: np.random.Generator) -> Arguments:
    T = int(rng.integers(4, 40))
    return {"x": _floats(rng, T, 16), "y": _y(16, 16), "T": T, "i_t": int(rng.integers(2, T))}


@triton.jit(do_not_specialize=["i"])
def store_of_one_lane_kernel(x, y, i):
    """A mask that is an equality: for an `i` outside the block it is true nowhere."""
    o_i = tl.arange(0, 16)
    tl.store(y + 16 + o_i, tl.load(x + o_i), mask=o_i == i)


def _one_lane(rng: np.random.Generator) -> Arguments:
    return {"x": _floats(rng, 16), "y": _y(48), "i": int(rng.integers(17, 32))}


@triton.jit(do_not_specialize=["far"])
def load_behind_mask_kernel(x, y, far):
    """A mask that is no rectangle: what it hides is far away, and must not be read."""
    o_i = tl.arange(0, 16)
    tl.store(y + o_i, tl.load(x + far + o_i, mask=o_i - far >= 0, other=3.0))


@triton.jit(do_not_specialize=["far"])
def store_behind_mask_kernel(x, y, far):
    """The same of a store: what is hidden is far away, and must neither be read nor written."""
    o_i = tl.arange(0, 16)
    tl.store(y + far + o_i, tl.load(x + o_i), mask=o_i - far >= 0)


def _far(rng: np.random.Generator) -> Arguments:
    return {"x": _floats(rng, 16), "y": _y(16), "far": 2**30 + int(rng.integers(100)) * 16}


@triton.jit(do_not_specialize=["start", "end"])
def load_of_empty_range_kernel(x, y, start, end):
    """A mask of two bounds of which the lower one is above the upper one: nothing is read."""
    o_i = tl.arange(0, 16)
    tl.store(y + o_i, tl.load(x + o_i, mask=(o_i >= start) & (o_i < end), other=3.0))


def _empty_range(rng: np.random.Generator) -> Arguments:
    end = int(rng.integers(2, 8))
    return {"x": _floats(rng, 16), "y": _y(16), "start": end + int(rng.integers(2, 8)), "end": end}


@triton.jit
def maximum_of_nan_kernel(x, y):
    """`tl.maximum` passes a NaN on only if asked to (`propagate_nan`): by default it gives the number."""
    o_i = tl.arange(0, 16)
    tl.store(y + o_i, tl.maximum(tl.load(x + o_i), 0.0))


@triton.jit
def max_over_nan_kernel(x, y):
    """`tl.max` is a reduction by the maximum that gives the number."""
    o_i = tl.arange(0, 16)
    tl.store(y + o_i, tl.max(tl.load(x + o_i), 0) + tl.zeros([16], tl.float32))


def _with_nan(rng: np.random.Generator) -> Arguments:
    x = _floats(rng, 16)
    x[int(rng.integers(16))] = float("nan")
    return {"x": x, "y": _y(16)}


def _numbers(a: Arguments) -> torch.Tensor:
    return a["x"][~a["x"].isnan()]


DIFFERENCES: tuple[Difference, ...] = (
    Difference(
        block_before_start_kernel,
        _before_start,
        lambda a: _tile(a["first"], 16, 0, 16, a["x"][12 : 12 + a["T"]]),
        title="block pointers have no lower bound",
        issue="triton-lang/triton#5201 (the interpreter's), near triton-lang/triton-ascend#740",
        wrong=(FRONT_END, ASCEND_INTERPRETER),
    ),
    Difference(
        block_beside_width_kernel,
        _beside_width,
        lambda a: torch.zeros(16, 16),
        title="a block wholly to the right of its tensor reads the next row",
        issue="near triton-lang/triton-ascend#477, #740, #824",
    ),
    Difference(
        block_checked_in_columns_kernel,
        _checked_in_columns,
        lambda a: _tile(a["row"], 16, 0, 16, a["x"][:, : a["K"]]),
        title="a check of the columns alone counts the offset of the rows",
        issue="triton-lang/triton-ascend#477, #599, #671, #740, #824",
    ),
    Difference(
        block_of_transposed_kernel,
        _of_transposed,
        lambda a: _tile(0, 16, a["i_t"], 16, a["x"].T),
        title="the order of a block pointer changes its bounds",
        issue="near triton-lang/triton-ascend#477, #740, #824",
    ),
    Difference(
        store_of_one_lane_kernel,
        _one_lane,
        lambda a: a["y"],
        title="a mask `o == i` with i outside the block accesses lane i all the same",
    ),
    Difference(
        load_behind_mask_kernel,
        _far,
        lambda a: torch.full((16,), 3.0),
        title="a load whose mask is no rectangle reads what the mask hides",
        issue="triton-lang/triton-ascend#2332",
        strays=True,
    ),
    Difference(
        store_behind_mask_kernel,
        _far,
        lambda a: a["y"],
        title="a store whose mask is no rectangle reads and writes what the mask hides",
        issue="near triton-lang/triton-ascend#2332",
        strays=True,
    ),
    Difference(
        load_of_empty_range_kernel,
        _empty_range,
        lambda a: torch.full((16,), 3.0),
        title="a mask between bounds in the wrong order becomes a view of negative size",
        wrong=(),
    ),
    Difference(
        maximum_of_nan_kernel,
        _with_nan,
        lambda a: a["x"].nan_to_num(nan=0.0).clamp(min=0.0),
        title="the interpreters' maximum of a NaN and a number is NaN",
        wrong=(ASCEND_INTERPRETER, TRITON_INTERPRETER),
    ),
    Difference(
        max_over_nan_kernel,
        _with_nan,
        lambda a: _numbers(a).max().expand(16),
        title="the interpreter's max over a NaN is NaN",
        wrong=(ASCEND_INTERPRETER,),
    ),
)


# Where all agree: what kernels of the gated delta rule are written in


@triton.jit(do_not_specialize=["start", "end", "shift"])
def rectangles_kernel(x, y, start, end, shift):
    """Loads and stores whose masks are ranges: one bound, two, moved, met by a condition, empty, over all."""
    o_i = tl.arange(0, 32)
    p_x = x + 64 + o_i
    m = (o_i >= start) & (o_i < end)
    tl.store(y + o_i, tl.load(p_x, mask=o_i < end, other=0.0))
    tl.store(y + 32 + o_i, tl.load(p_x, mask=o_i >= start, other=3.0))
    tl.store(y + 64 + o_i, tl.load(p_x + shift, mask=m, other=-1.0))
    tl.store(y + 96 + o_i, tl.load(x + 64 - o_i, mask=shift + o_i < end, other=5.0))
    tl.store(y + 128 + o_i, tl.load(p_x, mask=(o_i < end) & (o_i < shift), other=7.0))
    tl.store(y + 160 + o_i, tl.load(p_x), mask=m)
    tl.store(y + 223 - o_i, tl.load(p_x), mask=o_i <= shift)


def _rectangles(rng: np.random.Generator) -> Arguments:
    start, end = sorted(int(i) for i in rng.integers(-3, 36, 2))
    shift = int(rng.integers(-20, 20))
    return {"x": _floats(rng, 128), "y": _y(224), "start": start, "end": end, "shift": shift}


def _expected_rectangles(a: Arguments) -> torch.Tensor:
    x, start, end, shift, o_i = a["x"], a["start"], a["end"], a["shift"], torch.arange(32)
    here, m = x[64:96], (o_i >= start) & (o_i < end)
    untouched = torch.full((32,), UNTOUCHED)
    return torch.cat(
        [
            torch.where(o_i < end, here, 0.0),
            torch.where(o_i >= start, here, 3.0),
            torch.where(m, x[64 + shift : 96 + shift], -1.0),
            torch.where(shift + o_i < end, x[33:65].flip(0), 5.0),
            torch.where((o_i < end) & (o_i < shift), here, 7.0),
            torch.where(m, here, untouched),
            torch.where(o_i <= shift, here, untouched).flip(0),
        ]
    )


@triton.jit(do_not_specialize=["T", "K", "stride_t", "stride_k"])
def tiles_kernel(x, indices, y, T, K, stride_t, stride_k):
    """Tiles by rows and columns, with strides that are known when it runs, transposed, causal, gathered."""
    o_t, o_k = tl.arange(0, 16), tl.arange(0, 8)
    m_t, m_k = o_t < T, o_k < K
    m = m_t[:, None] & m_k[None, :]
    p_x = x + o_t[:, None] * stride_t + o_k[None, :] * stride_k
    o_y = o_t[:, None] * 8 + o_k[None, :]
    tl.store(y + o_y, tl.load(p_x, mask=m, other=0.0))
    b_x = tl.load(x + o_t[None, :] * stride_t + o_k[:, None] * stride_k, mask=m_t[None, :], other=2.0)
    tl.store(y + 128 + o_y, tl.trans(b_x), mask=m_k[None, :])
    tl.store(y + 256 + o_y, tl.load(p_x, mask=(o_t[:, None] >= o_k[None, :]) & m_t[:, None], other=-1.0))
    b_i = tl.load(indices + o_t, mask=m_t, other=0)
    p_i = x + b_i[:, None] * stride_t + o_k[None, :] * stride_k
    tl.store(y + 384 + o_y, tl.load(p_i, mask=m, other=4.0))


def _tiles(rng: np.random.Generator) -> Arguments:
    T, K = int(rng.integers(2, 20)), int(rng.integers(2, 10))
    pad = int(rng.integers(0, 5))
    x = _floats(rng, 20, 10 + pad)
    indices = torch.from_numpy(rng.integers(0, 20, 16, dtype=np.int32))
    strides = (10 + pad, 1) if rng.integers(2) else (2, 8)
    return {
        "x": x,
        "indices": indices,
        "y": _y(4 * 128),
        "T": T,
        "K": K,
        "stride_t": strides[0],
        "stride_k": strides[1],
    }


def _expected_tiles(a: Arguments) -> torch.Tensor:
    o_t, o_k = torch.arange(16)[:, None], torch.arange(8)[None, :]
    m_t, m_k = o_t < a["T"], o_k < a["K"]
    x = a["x"].flatten()
    tile = x[o_t * a["stride_t"] + o_k * a["stride_k"]]
    gathered = x[torch.where(m_t[:, 0], a["indices"], 0)[:, None] * a["stride_t"] + o_k * a["stride_k"]]
    parts = (
        torch.where(m_t & m_k, tile, 0.0),
        torch.where(m_k, torch.where(m_t, tile, 2.0), UNTOUCHED),
        torch.where((o_t >= o_k) & m_t, tile, -1.0),
        torch.where(m_t & m_k, gathered, 4.0),
    )
    return torch.cat([part.flatten() for part in parts])


@triton.jit(do_not_specialize=["T", "start", "step"])
def loops_kernel(x, y, T, start, step):
    """Loops that carry offsets, pointers, scalars and blocks; of no turn; downwards; branches."""
    o_i = tl.arange(0, 16)
    o_t, p_x = o_i, x + o_i
    b_sum = tl.zeros([16], tl.float32)
    for i_t in range(0, tl.cdiv(T, 16)):
        b_x = tl.load(x + o_t, mask=o_t < T, other=1.0) + tl.load(p_x, mask=i_t * 16 + o_i < T, other=2.0)
        tl.store(y + o_t, b_x)
        b_sum = b_sum * 0.5 + b_x
        o_t += 16
        p_x += 16
    tl.store(y + 64 + o_i, b_sum)
    b_a, b_b = tl.load(x + o_i), tl.load(x + 16 + o_i)
    for i in range(start, start + step):
        b_c = b_a
        b_a = b_b + i
        b_b = b_c
    tl.store(y + 80 + o_i, b_a)
    i, total = T, 0
    while i > start:
        total += i
        i -= 3
    if total > 100:
        b_a += tl.load(x + 32 + o_i)
        tl.store(y + 96 + o_i, b_a)
    else:
        b_b *= 2.0
    for i_t in range(tl.cdiv(T, 16) - 1, -1, -1):
        b_b = b_b * 0.5 + tl.load(x + i_t * 16 + o_i)
    tl.store(y + 112 + o_i, b_a - b_b)


def _loops(rng: np.random.Generator) -> Arguments:
    T, start, step = (int(rng.integers(*bounds)) for bounds in ((2, 65), (2, 40), (2, 5)))
    return {"x": _floats(rng, 64), "y": _y(128), "T": T, "start": start, "step": step if T % 3 else 0}


def _expected_loops(a: Arguments) -> torch.Tensor:
    x, T, start = a["x"], a["T"], a["start"]
    y, o_t, chunks = torch.full((128,), UNTOUCHED), torch.arange(64), -(-T // 16)
    y[: 16 * chunks] = torch.where(o_t < T, 2 * x, 3.0)[: 16 * chunks]
    total = torch.zeros(16)
    for i_t in range(chunks):
        total = total * 0.5 + y[16 * i_t : 16 * i_t + 16]
    y[64:80] = total
    b_a, b_b = x[:16], x[16:32]
    for i in range(start, start + a["step"]):
        b_a, b_b = b_b + i, b_a
    y[80:96] = b_a
    if sum(range(T, start, -3)) > 100:
        b_a = b_a + x[32:48]
        y[96:112] = b_a
    else:
        b_b = b_b * 2
    for i_t in reversed(range(chunks)):
        b_b = b_b * 0.5 + x[16 * i_t : 16 * i_t + 16]
    y[112:] = b_a - b_b
    return y


@triton.jit
def integers_kernel(x, z, y):
    """Division and remainder of negative numbers, shifts, casts that wrap, and comparisons."""
    o_i = tl.arange(0, 32)
    i, j = tl.load(x + o_i), tl.load(z + o_i)
    tl.store(y + o_i, i // j)
    tl.store(y + 32 + o_i, i % j)
    tl.store(y + 64 + o_i, (i // 4) * 10 + i % 4)
    tl.store(y + 96 + o_i, i.to(tl.int8).to(tl.int32))
    tl.store(y + 128 + o_i, (i >> 2) ^ (j << 3))
    tl.store(y + 160 + o_i, ((i > j) | (j == 3)).to(tl.int32) - (i <= 0).to(tl.int32))
    tl.store(y + 192 + o_i, (i.to(tl.int64) * 1000000007 // 1000003).to(tl.int32))
    tl.store(y + 224 + o_i, tl.cdiv(tl.maximum(i, j), 7) + tl.sum(j, 0))


def _integers(rng: np.random.Generator) -> Arguments:
    signs = rng.choice(np.array([-1, 1], dtype=np.int32), 32)
    return {
        "x": torch.from_numpy(rng.integers(-1000, 1000, 32, dtype=np.int32)),
        "z": torch.from_numpy(rng.integers(1, 20, 32, dtype=np.int32) * signs),
        "y": _y(256, dtype=torch.int32),
    }


def _expected_integers(a: Arguments) -> torch.Tensor:
    i, j = a["x"].long(), a["z"].long()

    def divided(m: torch.Tensor, n: torch.Tensor | int) -> torch.Tensor:
        return torch.div(m, n, rounding_mode="trunc")

    parts = (
        divided(i, j),
        torch.fmod(i, j),
        divided(i, 4 + 0 * i) * 10 + torch.fmod(i, 4),
        (i + 128) % 256 - 128,
        (i >> 2) ^ (j << 3),
        ((i > j) | (j == 3)).long() - (i <= 0).long(),
        divided(i * 1000000007, 1000003),
        divided(torch.maximum(i, j) + 6, 7) + j.sum(),
    )
    return torch.cat(parts)


@triton.jit
def floats_kernel(x, z, y):
    """Infinities and NaN that a branch leaves out, rounding to 16 bits, and what decays are made of."""
    o_i = tl.arange(0, 32)
    a, b = tl.load(x + o_i), tl.load(z + o_i)
    tl.store(y + o_i, tl.where(a > 0.0, b / tl.where(a > 0.0, a, 0.0), -1.0))
    tl.store(y + 32 + o_i, tl.where(a == a, a, 0.5))
    tl.store(y + 64 + o_i, a.to(tl.bfloat16).to(tl.float32))
    tl.store(y + 96 + o_i, a.to(tl.float16).to(tl.float32))
    tl.store(y + 128 + o_i, tl.where(b <= 0.0, tl.exp(b), 0.0))
    tl.store(y + 160 + o_i, tl.where(b < 20.0, tl.log(1.0 + tl.exp(b)), b))
    tl.store(y + 192 + o_i, b * tl.rsqrt(tl.sum(b * b, 0) + 1e-6) + tl.sigmoid(b))
    tl.store(y + 224 + o_i, tl.where((a > b) & (b < 1.0), tl.abs(b), -b) - tl.max(b, 0))


def _float_arguments(rng: np.random.Generator) -> Arguments:
    x, z = _floats(rng, 32), _floats(rng, 32) * 10
    special = (np.nan, np.inf, -np.inf, 0.0, -0.0, 1e-40, 65519.0, 65520.0, 1.00390625, 1.01171875, 3e38)
    x[: len(special)] = torch.tensor(special)
    return {"x": x, "z": z, "y": _y(256)}


def _expected_floats(a: Arguments) -> torch.Tensor:
    x, z = a["x"], a["z"].double()
    parts = (
        torch.where(x > 0, a["z"] / x, -1.0),
        torch.where(x.isnan(), 0.5, x),
        x.to(torch.bfloat16),
        x.to(torch.float16),
        torch.where(z <= 0, z.exp(), 0.0),
        torch.where(z < 20, (1 + z.exp()).log(), z),
        z * (z.square().sum() + 1e-6).rsqrt() + z.sigmoid(),
        torch.where((x > z) & (z < 1), z.abs(), -z) - z.max(),
    )
    return torch.cat([part.double() for part in parts])


@triton.jit
def reductions_kernel(x, z, y):
    """Sums and maxima over either axis, of three dimensions, of one element; products, added to a sum."""
    o_i, o_j = tl.arange(0, 16), tl.arange(0, 32)
    o_x = o_i[:, None] * 32 + o_j[None, :]
    a, b = tl.load(x + o_x), tl.load(z + o_x)
    b_a = tl.sum(a, 0)[None, :] + tl.max(b, 1)[:, None]
    b_a += tl.sum(a[:, None, :], 1) + tl.sum(tl.sum(b, 1), 0)
    tl.store(y + o_x, b_a)
    b_3 = tl.reshape(a, (16, 4, 8))
    b_b = tl.sum(b_3, 1)[:, None, :] + tl.permute(tl.reshape(b, (8, 16, 4)), (1, 2, 0))
    tl.store(y + 512 + o_x, tl.reshape(b_b, (16, 32)))
    b_c = tl.dot(a.to(tl.bfloat16), tl.trans(b.to(tl.bfloat16)))
    m = o_i[:, None] > o_i[None, :]
    tl.store(y + 1024 + o_x, tl.dot(tl.where(m, b_c, 0.0), b, acc=a, input_precision="ieee"))


def _matrices(rng: np.random.Generator) -> Arguments:
    return {"x": _floats(rng, 16, 32), "z": _floats(rng, 16, 32), "y": _y(3 * 16, 32)}


def _expected_reductions(a: Arguments) -> torch.Tensor:
    x, z = a["x"].double(), a["z"].double()
    summed = x.sum(0)[None, :] + z.amax(1)[:, None] + x + z.sum()
    permuted = x.reshape(16, 4, 8).sum(1)[:, None, :] + z.reshape(8, 16, 4).permute(1, 2, 0)
    bf_x, bf_z = a["x"].bfloat16().double(), a["z"].bfloat16().double()
    product = torch.tril(bf_x @ bf_z.T, diagonal=-1) @ z + x
    return torch.cat([summed, permuted.reshape(16, 32), product])


@triton.jit
def order_of_memory_kernel(x, y):
    """Loads behind stores to the same place, from elsewhere in it, in a loop; and stores over one another."""
    o_i = tl.arange(0, 16)
    b_old = tl.load(y + o_i)
    tl.store(y + o_i, tl.load(x + o_i))
    b_reversed = tl.load(y + 15 - o_i)
    tl.store(y + o_i, b_reversed + b_old)
    tl.store(y + 16 + o_i, tl.load(y + o_i))
    tl.store(y + 17 + o_i, tl.load(y + 16 + o_i))
    for i in range(0, 5):
        tl.store(y + 40 + o_i, tl.load(y + 40 + o_i) + tl.load(x + i * 16 + o_i))


def _vectors(rng: np.random.Generator) -> Arguments:
    return {"x": _floats(rng, 96), "y": _y(64)}


def _expected_order(a: Arguments) -> torch.Tensor:
    x, y = a["x"], a["y"].clone()
    y[:16] = x[:16].flip(0) + y[:16]
    y[16:32] = y[:16]
    y[17:33] = y[16:32].clone()
    for i in range(5):
        y[40:56] += x[16 * i : 16 * i + 16]
    return y


@triton.jit(do_not_specialize=["T", "i_t"])
def blocks_kernel(x, y, T, i_t, H: tl.constexpr):
    """Block pointers in their bounds and across the upper ones: rows, a transpose, gates, in a loop."""
    p_x = tl.make_block_ptr(x + 40, (T, 40), (H * 40, 1), (i_t, 32), (16, 16), (1, 0))
    p_t = tl.make_block_ptr(x + 40, (40, T), (1, H * 40), (32, i_t), (16, 16), (0, 1))
    p_y = tl.make_block_ptr(y, (16, 16), (16, 1), (0, 0), (16, 16), (1, 0))
    b_x = tl.load(p_x, boundary_check=(0, 1), padding_option="zero")
    tl.store(p_y, b_x + tl.trans(tl.load(p_t, boundary_check=(0, 1), padding_option="zero")))
    p_g = tl.make_block_ptr(x + 1, (T,), (H * 40,), (i_t,), (16,), (0,))
    tl.store(y + 256 + tl.arange(0, 16), tl.load(p_g, boundary_check=(0,), padding_option="zero"))
    p_x = tl.make_block_ptr(x, (T, 32), (H * 40, 1), (0, 16), (16, 16), (1, 0))
    p_y = tl.make_block_ptr(y + 272, (T, 16), (16, 1), (0, 0), (16, 16), (1, 0))
    for _ in range(0, tl.cdiv(T, 16)):
        tl.store(p_y, tl.load(p_x, boundary_check=(0, 1), padding_option="zero"), boundary_check=(0,))
        p_x = tl.advance(p_x, (16, 0))
        p_y = tl.advance(p_y, (16, 0))


def _blocks(rng: np.random.Generator) -> Arguments:
    T = int(rng.integers(3, 40))
    x = _floats(rng, T, 2, 40)
    return {"x": x, "y": _y(272 + 40 * 16), "T": T, "i_t": int(rng.integers(2, T))}


def _expected_blocks(a: Arguments) -> torch.Tensor:
    x, y, T, i_t = a["x"], a["y"].clone(), a["T"], a["i_t"]
    y[:256] = 2 * _tile(i_t, 16, 32, 16, x[:, 1]).flatten()
    y[256:272] = _tile(i_t, 16, 0, 1, x[:, 0, 1:2]).flatten()
    y[272 : 272 + 16 * T] = x[:, 0, 16:32].flatten()
    return y


CONSTRUCTS: tuple[Case, ...] = (
    Case(rectangles_kernel, _rectangles, _expected_rectangles),
    Case(tiles_kernel, _tiles, _expected_tiles),
    Case(loops_kernel, _loops, _expected_loops, tolerance=1e-6),
    Case(integers_kernel, _integers, _expected_integers),
    Case(floats_kernel, _float_arguments, _expected_floats, tolerance=1e-6),
    Case(reductions_kernel, _matrices, _expected_reductions, tolerance=1e-5),
    Case(order_of_memory_kernel, _vectors, _expected_order, tolerance=1e-6),
    Case(blocks_kernel, _blocks, _expected_blocks, (("H", 2),)),
)
"""By whoever runs them, the same results: only the order of a sum is left open."""
