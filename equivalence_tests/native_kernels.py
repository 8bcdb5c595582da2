"""Small kernels that show what native code does, each with what it must compute; nothing of the op's own.

They stand in a module because the process that lowers them imports them.
"""

import triton
import triton.language as tl

SHIFT: tl.constexpr = tl.constexpr(3)


@triton.jit
def shifted(b_x):
    """A function of its own, with a constant of the module."""
    return b_x + SHIFT


@triton.jit
def copy_kernel(x, y, n, m, stride_x, stride_y, BT: tl.constexpr):
    """y[i] = x[i] for BT elements; x is read as far as n, y is written as far as m."""
    o_t = tl.arange(0, BT)
    b_x = tl.load(x + o_t * stride_x, mask=o_t < n, other=0)
    tl.store(y + o_t * stride_y, b_x, mask=o_t < m)


@triton.jit
def shift_kernel(x, y, BT: tl.constexpr):
    """y = x + SHIFT."""
    o_t = tl.arange(0, BT)
    tl.store(y + o_t, shifted(tl.load(x + o_t)))


@triton.jit
def sum_up_to_kernel(x, ends, y):
    """y = sum of x[0:ends[0]], one element after the other."""
    b_y = 0.0
    for i in range(tl.load(ends)):
        b_y += tl.load(x + i)
    tl.store(y, b_y)


@triton.jit
def pick_kernel(x, indices, y):
    """y[i] = x[indices[i]]."""
    i = tl.program_id(0)
    tl.store(y + i, tl.load(x + tl.load(indices + i)))


@triton.jit
def count_kernel(y):
    """y[i] += 1 for program i."""
    i = tl.program_id(0)
    tl.store(y + i, tl.load(y + i) + 1)


@triton.jit
def divide_kernel(x, y):
    """y[i] = 7 // x[i] for whole numbers."""
    i = tl.program_id(0)
    tl.store(y + i, 7 // tl.load(x + i))


@triton.jit
def wait_kernel(x, index, y, n):
    """y = 2 + x[index], after a few seconds for n of 2^30."""
    b_y = 0.0
    for _ in range(n):
        b_y = b_y * 0.5 + 1.0
    tl.store(y, b_y + tl.load(x + tl.load(index)))


@triton.jit
def round_kernel(x, y, BT: tl.constexpr):
    """y = x, rounded to what y holds."""
    o_t = tl.arange(0, BT)
    tl.store(y + o_t, tl.load(x + o_t).to(y.dtype.element_ty))


@triton.jit
def arithmetic_kernel(x, y, z, scale, BT: tl.constexpr):
    """Rows of z: x + y, x - y, x y, x / y, x y + y, scale x; in what z holds."""
    o_t = tl.arange(0, BT)
    b_x, b_y = tl.load(x + o_t), tl.load(y + o_t)
    tl.store(z + o_t, b_x + b_y)
    tl.store(z + BT + o_t, b_x - b_y)
    tl.store(z + 2 * BT + o_t, b_x * b_y)
    tl.store(z + 3 * BT + o_t, (b_x / b_y).to(z.dtype.element_ty))
    tl.store(z + 4 * BT + o_t, b_x * b_y + b_y)
    tl.store(z + 5 * BT + o_t, (b_x * scale).to(z.dtype.element_ty))


@triton.jit
def dot_kernel(a, b, c, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, ADDS: tl.constexpr):
    """c = a b, or c += a b; a `[M, K]`, b `[N, K]` as its transpose, c `[M, N]` float32."""
    o_m, o_n, o_k = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K)
    b_a = tl.load(a + o_m[:, None] * K + o_k[None, :])
    b_b = tl.trans(tl.load(b + o_n[:, None] * K + o_k[None, :]))
    p_c = c + o_m[:, None] * N + o_n[None, :]
    if ADDS:
        b_c = tl.dot(b_a, b_b, acc=tl.load(p_c), input_precision="ieee")
    else:
        b_c = tl.dot(b_a, b_b, input_precision="ieee")
    tl.store(p_c, b_c)


@triton.jit
def reduce_kernel(x, y, M: tl.constexpr, N: tl.constexpr):
    """y: sums, maxima, minima and argmax of rows (M each), then sums and maxima of columns (N each)."""
    o_m, o_n = tl.arange(0, M), tl.arange(0, N)
    b_x = tl.load(x + o_m[:, None] * N + o_n[None, :])
    tl.store(y + o_m, tl.sum(b_x, 1))
    tl.store(y + M + o_m, tl.max(b_x, 1))
    tl.store(y + 2 * M + o_m, tl.min(b_x, 1))
    tl.store(y + 3 * M + o_m, tl.argmax(b_x, 1).to(tl.float32))
    tl.store(y + 4 * M + o_n, tl.sum(b_x, 0))
    tl.store(y + 4 * M + N + o_n, tl.max(b_x, 0))


@triton.jit
def math_kernel(x, y, BT: tl.constexpr):
    """Rows of y: one function of x > 0 each; their names are `MATH`."""
    o_t = tl.arange(0, BT)
    b_x = tl.load(x + o_t)
    tl.store(y + o_t, tl.exp(b_x))
    tl.store(y + 1 * BT + o_t, tl.exp2(b_x))
    tl.store(y + 2 * BT + o_t, tl.log(b_x))
    tl.store(y + 3 * BT + o_t, tl.log2(b_x))
    tl.store(y + 4 * BT + o_t, tl.sqrt(b_x))
    tl.store(y + 5 * BT + o_t, tl.rsqrt(b_x))
    tl.store(y + 6 * BT + o_t, tl.sigmoid(b_x))
    tl.store(y + 7 * BT + o_t, tl.abs(b_x - 1.0))
    tl.store(y + 8 * BT + o_t, tl.floor(-b_x))
    tl.store(y + 9 * BT + o_t, tl.ceil(-b_x))
    tl.store(y + 10 * BT + o_t, tl.where(b_x > 1.0, b_x, -b_x))
    tl.store(y + 11 * BT + o_t, tl.maximum(b_x, 1.0))
    tl.store(y + 12 * BT + o_t, tl.minimum(b_x, 1.0))
    tl.store(y + 13 * BT + o_t, tl.sin(b_x))
    tl.store(y + 14 * BT + o_t, tl.cos(b_x))
    tl.store(y + 15 * BT + o_t, tl.erf(b_x))
    tl.store(y + 16 * BT + o_t, tl.math.tanh(b_x))
    tl.store(y + 17 * BT + o_t, tl.softmax(b_x))


MATH = (
    "exp", "exp2", "log", "log2", "sqrt", "rsqrt", "sigmoid", "abs_less_1", "floor_minus", "ceil_minus",
    "where_above_1", "at_least_1", "at_most_1", "sin", "cos", "erf", "tanh", "softmax",
)  # fmt: skip


@triton.jit
def integer_kernel(x, y, d, BT: tl.constexpr):
    """Rows of y: x // d, x % d, cdiv(x, d), x & d, x | d, x ^ d, x << 2, x >> 2, of whole numbers."""
    o_t = tl.arange(0, BT)
    b_x = tl.load(x + o_t)
    tl.store(y + o_t, b_x // d)
    tl.store(y + BT + o_t, b_x % d)
    tl.store(y + 2 * BT + o_t, tl.cdiv(b_x, d))
    tl.store(y + 3 * BT + o_t, b_x & d)
    tl.store(y + 4 * BT + o_t, b_x | d)
    tl.store(y + 5 * BT + o_t, b_x ^ d)
    tl.store(y + 6 * BT + o_t, b_x << 2)
    tl.store(y + 7 * BT + o_t, b_x >> 2)


# What strays where no result shows it.


@triton.jit
def select_kernel(x, y, n, BT: tl.constexpr):
    """y = x as far as n and 0 behind it; reads all the same."""
    o_t = tl.arange(0, BT)
    b_x = tl.load(x + o_t)  # here
    tl.store(y + o_t, tl.where(o_t < n, b_x, 0.0))


@triton.jit
def load_slot_kernel(x, y, n, BT: tl.constexpr):
    """y = 0 except for x[n] at n. As the front end lowers it, n >= BT writes behind the buffer of b_x."""
    o_t = tl.arange(0, BT)
    b_x = tl.load(x + o_t, mask=o_t == n, other=0.0)  # here
    tl.store(y + o_t, b_x)


@triton.jit
def store_slot_kernel(x, y, n, BT: tl.constexpr):
    """y[n] = 2 x[n]. As the front end lowers it, n >= BT reads behind the buffer of 2 x."""
    o_t = tl.arange(0, BT)
    b_y = 2.0 * tl.load(x + o_t)
    tl.store(y + o_t, b_y, mask=o_t == n)  # here


# What has no native code, each with the line that says so.


@triton.jit
def scanned(b_x):
    return tl.cumsum(b_x, 0)  # here


@triton.jit
def scan_kernel(x, y, BT: tl.constexpr):
    """A call of CANN's library, in a function that the kernel calls."""
    o_t = tl.arange(0, BT)
    tl.store(y + o_t, scanned(tl.load(x + o_t)))


@triton.jit
def refused_kernel(x, y, BT: tl.constexpr):
    """Blocks of two lengths cannot be added."""
    o_t = tl.arange(0, BT)
    b_x = tl.load(x + o_t)
    b_y = (
        b_x  # here begins what cannot be added, below the line where its statement begins
        + tl.arange(0, 2 * BT)
    )
    tl.store(y + o_t, b_y)


@triton.jit
def atomic_kernel(x, y, BT: tl.constexpr):
    o_t = tl.arange(0, BT)
    tl.atomic_add(y + o_t, tl.load(x + o_t))  # here


@triton.jit
def histogram_kernel(x, y, BT: tl.constexpr):
    o_t = tl.arange(0, BT)
    b_y = tl.histogram(o_t, BT)  # here
    tl.store(y + o_t, b_y.to(tl.float32))


@triton.jit
def barrier_kernel(x, y, BT: tl.constexpr):
    o_t = tl.arange(0, BT)
    b_x = tl.load(x + o_t)
    tl.debug_barrier()  # here
    tl.store(y + o_t, b_x)
