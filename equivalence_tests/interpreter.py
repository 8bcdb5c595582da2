"""Triton's interpreter, taught to compute as hardware does and to refuse what it cannot.

As published, the interpreter (`TRITON_INTERPRET=1`: kernels run on the CPU, in numpy) is silently wrong for
our kernels. It keeps a bfloat16 as its bits, in a uint16, and computes on them as on an integer; it truncates
where hardware rounds to nearest even; what a mask hides it reads as zero, where hardware leaves it undefined;
and it reads and writes wherever an address points. After `enable()`

- `tl.dot` multiplies exactly and accumulates in float32, whatever its floating operands;
- casts and constants round to nearest even;
- any other operation on a bfloat16 raises `RawBfloat16Error`;
- a lane that a load masks, without `other`, is NaN, or an integer that indexes nothing;
- an access outside the tensors of the launch raises `AddressError`.

`run_launch` runs chosen programs of a recorded launch, reports every address they touch, and takes tensors of
the meta device for memory that nobody has to allocate.

It works by subclasses put in place of two of Triton's classes: the builder, which executes single operations,
and the executor, which runs the programs of a launch.
"""

import functools
import importlib
import inspect
import itertools
import os
import sys
import types
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ..reference.errors import AscendTwinError, UnavailableError, invalid_argument

if TYPE_CHECKING:
    from ..optimized.gdn.kernels.launch import Launch

    _Base = Any
else:
    _Base = object  # triton's class joins in `enable`: nothing here imports triton before

_WINDOW_BITS = 44
_BFLOAT16_NAN = 0x7FC0
# Operations that move bits without looking at them, and those that `_Builder` does right.
# fmt: off
_SAFE_FOR_BFLOAT16 = frozenset([
    "load", "masked_load", "store", "masked_store", "tensor_pointer_load", "tensor_pointer_store",
    "descriptor_load", "descriptor_store", "descriptor_gather", "descriptor_scatter",
    "select", "gather", "bitcast", "reshape", "trans", "expand_dims", "broadcast", "splat", "unsplat",
    "cat", "join", "split",
    "fp_ext", "fp_trunc", "fp_to_si", "fp_to_ui", "si_to_fp", "ui_to_fp", "dot",
])
# fmt: on


class RawBfloat16Error(AscendTwinError, TypeError):
    """A kernel computes on a bfloat16, of which the interpreter sees bits; the message says in what."""


class AddressError(AscendTwinError, IndexError):
    """A kernel touches memory outside its tensors; the message names parameter, bytes and program."""


@dataclass(frozen=True)
class Access:
    """What one load, store or atomic operation of one program touched.

    Attributes:
        parameter: the kernel's name for the tensor.
        kind: `load`, `store` or `atomic`.
        program: number of the program.
        offsets: of every lane that the mask lets through, in elements from the first of the tensor, int64.
    """

    parameter: str
    kind: str
    program: int
    offsets: np.ndarray


def touched(
    accesses: Iterable[Access], parameter: str, kind: str | None = None, program: int | None = None
) -> np.ndarray:
    """The offsets in any access of `parameter`, sorted, each once.

    Args:
        accesses: from `run_launch`.
        parameter: the kernel's name for the tensor.
        kind: only `load`, `store` or `atomic`; default: all.
        program: only of this program; default: all.

    Returns:
        Offsets `[n]` in elements from the first of the tensor, int64; for a contiguous tensor
        `np.unravel_index(offsets, shape)` makes coordinates of them.
    """
    offsets = [
        x.offsets
        for x in accesses
        if x.parameter == parameter and kind in (None, x.kind) and program in (None, x.program)
    ]
    return np.unique(np.concatenate([np.empty(0, dtype=np.int64), *offsets]))


@dataclass
class _Observation:
    """What `run_launch` asks of a launch, and what it saw."""

    programs: Collection[int]
    fill: float
    accesses: list[Access] = field(default_factory=list)


@dataclass(frozen=True)
class _Window:
    """The addresses that a kernel sees of one tensor.

    They are made up, each window in the middle of 16 TiB of its own: an address that has left its tensor is
    in no other one, however the allocator placed them, and tells what it came from. Triton reads `dtype` and
    `data_ptr()`.
    """

    parameter: str
    number: int
    tensor: Any

    @property
    def dtype(self) -> torch.dtype:
        return self.tensor.dtype

    def data_ptr(self) -> int:
        return (2 * self.number + 1) << (_WINDOW_BITS - 1)

    @property
    def is_fake(self) -> bool:
        return self.tensor.device.type == "meta"

    @functools.cached_property
    def shift(self) -> np.uint64:
        """What to subtract from an address to find the memory."""
        return np.uint64((self.data_ptr() - self.tensor.data_ptr()) % 2**64)

    @functools.cached_property
    def num_bytes(self) -> int:
        """From the first to the last element, gaps between rows included."""
        x = self.tensor
        if 0 in x.shape:
            return 0
        steps = sum((n - 1) * stride for n, stride in zip(x.shape, x.stride(), strict=True))
        return (1 + steps) * x.element_size()

    @functools.cached_property
    def dims(self) -> list[tuple[int, int]]:
        """(stride, size) of each dimension, outermost first; none where all memory is of elements."""
        x = self.tensor
        if self.num_bytes == x.numel() * x.element_size():
            return []
        dims = sorted((stride, n) for n, stride in zip(x.shape, x.stride(), strict=True) if n > 1 and stride)
        overlap = any(stride <= sum((n - 1) * s for s, n in dims[:i]) for i, (stride, _) in enumerate(dims))
        return [] if overlap else dims[::-1]

    def check(self, kind: str, offsets: np.ndarray, width: int, program: tuple[int, ...]) -> None:
        """Raise unless `width` bytes at each of the byte offsets are of the tensor."""
        start, end = int(offsets.min()), int(offsets.max()) + width
        before = f"{-start} bytes before the first" if start < 0 else ""
        after = f"{end - self.num_bytes} bytes past the last" if end > self.num_bytes else ""
        place = " and ".join(filter(None, (before, after)))
        if not place and self.dims:
            rest = offsets // self.tensor.element_size()
            for stride, n in self.dims:
                rest = rest - np.minimum(rest // stride, n - 1) * stride
            place = "between one and another" if rest.any() else ""
        if place:
            raise AddressError(
                f"{kind} {place} byte of {self.parameter} {list(self.tensor.shape)} ({self.num_bytes} bytes) "
                f"in program {program}"
            )


class _Memory:
    """The tensors of one launch, and what became of its accesses."""

    def __init__(self, arguments: dict[str, Any], observation: _Observation | None) -> None:
        tensors = {name: x for name, x in arguments.items() if hasattr(x, "data_ptr")}
        self.windows = [_Window(name, i, x) for i, (name, x) in enumerate(tensors.items())]
        self.observation = observation
        self.fill = observation.fill if observation else 0.0
        for window in self.windows:
            kind = window.tensor.device.type
            if kind != "cpu" and not (window.is_fake and observation):
                raise UnavailableError(
                    f"{window.parameter} is on {kind}: the interpreter reads the memory of the CPU"
                    + (", and run_launch alone takes tensors without memory" if window.is_fake else "")
                )

    def access(
        self, kind: str, pointers: np.ndarray, mask: np.ndarray, width: int, program: tuple[int, ...]
    ) -> Iterator[tuple[_Window, np.ndarray]]:
        """Each window that is touched (one, but for a choice between pointers) with its lanes of the mask.

        Raises:
            AddressError: for a lane that is in no tensor.
        """
        addresses = pointers.view(np.int64)
        active = addresses[mask]
        if not active.size:
            return
        if not self.windows:
            raise AddressError(f"{kind} in program {program} of a launch without tensors")
        numbers = np.unique(np.array([active.min(), active.max()]) >> _WINDOW_BITS)
        if len(numbers) > 1:
            numbers = np.unique(active >> _WINDOW_BITS)
        for number in numbers:
            lanes = mask if len(numbers) == 1 else mask & (addresses >> _WINDOW_BITS == number)
            window = self.windows[min(max(int(number), 0), len(self.windows) - 1)]
            offsets = addresses[lanes] - window.data_ptr()
            window.check(kind, offsets, width, program)
            if self.observation:
                elements = offsets // window.tensor.element_size()
                self.observation.accesses.append(Access(window.parameter, kind, program[0], elements))
            yield window, lanes


def _bfloat16_bits(x: np.ndarray) -> np.ndarray:
    """Bits, in uint16, of the bfloat16 nearest to each number, of two equally near the even one."""
    as_float32 = np.asarray(x, dtype=np.float32)
    bits = as_float32.view(np.uint32)
    rounded = (bits + (0x7FFF + ((bits >> 16) & 1))) >> 16
    return np.where(np.isnan(as_float32), _BFLOAT16_NAN, rounded).astype(np.uint16)


def _float32_of_bits(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def _refuse_bfloat16(handle: Any, operation: str) -> None:
    if handle.dtype.scalar.is_bf16():
        raise RawBfloat16Error(
            f"{operation} on bfloat16, which the interpreter sees as bits: upcast to float32 after the load"
        )


class _Builder(_Base):
    """Triton's builder of the interpreter, right where that is wrong. `*options` are hints to a compiler."""

    triton: Any
    """Module `triton.runtime.interpreter`."""
    memory: _Memory
    is_asking_for_presence = False
    """Whether Triton asks `if mask` and means whether there is one: a scalar answers whether it is true."""

    def _handle(self, data: np.ndarray, dtype: Any) -> Any:
        return self.triton.TensorHandle(data, dtype)

    # Values

    def get_bf16(self, value: float) -> Any:
        return self._handle(_bfloat16_bits(np.array([value])), self.triton.tl.bfloat16)

    def cast_impl(self, src: Any, dst_type: Any) -> Any:
        if src.dtype.scalar.is_bf16():
            src = self._handle(_float32_of_bits(src.data), self.triton.tl.float32)
        if dst_type.scalar.is_bf16():
            return self._handle(_bfloat16_bits(src.data), dst_type.scalar)
        return super().cast_impl(src, dst_type)

    def create_dot(self, a: Any, b: Any, d: Any, *options: Any) -> Any:
        a, b = (self.cast_impl(x, self.triton.tl.float32) if x.dtype.scalar.is_bf16() else x for x in (a, b))
        return super().create_dot(a, b, d, *options)

    # Memory

    def _access(self, kind: str, pointers: Any, mask: np.ndarray) -> Iterator[tuple[_Window, Any, Any]]:
        """For each window touched: itself, the pointers into its memory, and the mask of its lanes."""
        width = self.triton._get_np_dtype(pointers.get_element_ty()).itemsize
        for window, lanes in self.memory.access(kind, pointers.data, mask, width, self.grid_idx):
            yield (
                window,
                self._handle(pointers.data - window.shift, pointers.dtype),
                self._handle(lanes, self.triton.tl.int1),
            )

    def _constant(self, value: float | None, like: Any) -> Any:
        """`value` in every lane of pointers `like`; None is what an undefined value may be at worst."""
        element = like.get_element_ty()
        dtype = self.triton._get_np_dtype(element)
        if element.is_bf16():
            value = _BFLOAT16_NAN if value is None else int(_bfloat16_bits(np.array(value)))
        elif value is None and dtype.kind == "f":
            value = np.nan
        elif value is None:
            value = np.frombuffer(b"\xa5" * dtype.itemsize, dtype=dtype)[0]
        return self._handle(np.full(like.data.shape, value, dtype=dtype), element)

    def create_load(self, ptr: Any, *options: Any) -> Any:
        everywhere = self._handle(np.ones(ptr.data.shape, dtype=bool), self.triton.tl.int1)
        return self.create_masked_load(ptr, everywhere, self._constant(0, ptr), *options)

    def create_masked_load(self, ptrs: Any, mask: Any, other: Any, *options: Any) -> Any:
        if other is None:
            other = self._constant(None, ptrs)
        for window, pointers, lanes in self._access("load", ptrs, np.asarray(mask.data)):
            if window.is_fake:
                fill = self._constant(self.memory.fill, ptrs)
                other = self._handle(np.where(lanes.data, fill.data, other.data), other.dtype)
            else:
                other = super().create_masked_load(pointers, lanes, other, *options)
        return other

    def create_masked_store(self, ptrs: Any, value: Any, mask: Any, *options: Any) -> Any:
        for window, pointers, lanes in self._access("store", ptrs, np.asarray(mask.data)):
            if not window.is_fake:
                super().create_masked_store(pointers, value, lanes, *options)

    def create_atomic_rmw(self, op: Any, ptr: Any, val: Any, mask: Any, *options: Any) -> Any:
        previous = self._constant(None, ptr)
        for window, pointers, lanes in self._access("atomic", ptr, mask.data):
            if window.is_fake:
                new = self._constant(self.memory.fill, ptr)
            else:
                new = super().create_atomic_rmw(op, pointers, val, lanes, *options)
            previous = self._handle(np.where(lanes.data, new.data, previous.data), previous.dtype)
        return previous

    def create_atomic_cas(self, ptr: Any, cmp: Any, val: Any, *options: Any) -> Any:
        ((window, pointers, _),) = self._access("atomic", ptr, np.ones(ptr.data.shape, dtype=bool))
        if window.is_fake:
            return self._constant(self.memory.fill, ptr)
        return super().create_atomic_cas(pointers, cmp, val, *options)


class _Executor(_Base):
    """Triton's executor of one launch, without the copies of tensors, and with an eye on every access."""

    triton: Any
    """Module `triton.runtime.interpreter`."""
    observation: _Observation | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        given = inspect.getcallargs(
            self.fn, *args, **{k: v for k, v in kwargs.items() if k in self.arg_names}
        )
        for hook in getattr(self, "pre_run_hooks", ()):
            hook(**given)
        builder, memory = self.triton.interpreter_builder, _Memory(given, self.observation)
        seen = {**given, **{window.parameter: window for window in memory.windows}}
        seen = {k: x if k in self.constexprs else self.triton._implicit_cvt(x) for k, x in seen.items()}
        grid: Any = self.grid(given) if callable(self.grid) else self.grid
        grid = (*grid, 1, 1)[:3]
        builder.set_grid_dim(*grid)
        builder.memory = memory
        try:
            for program in itertools.product(*map(range, grid)):
                if self.observation is None or program[0] in self.observation.programs:
                    builder.set_grid_idx(*program)
                    self._run_program(seen)
        finally:
            del builder.memory

    def _run_program(self, arguments: dict[str, Any]) -> None:
        """Run one program; what it raises comes out as it is, not wrapped once for each call inside."""
        try:
            with np.errstate(all="ignore"):
                self.fn(**arguments)
        except self.triton.InterpreterError as error:
            cause: BaseException = error
            while isinstance(cause, self.triton.InterpreterError) and cause.__cause__ is not None:
                cause = cause.__cause__
            raise cause from None


def run_launch(launch: "Launch", programs: Collection[int], *, fill: float = 0.0) -> list[Access]:
    """Run some programs of a recorded launch and report what they touch.

    Tensors on the CPU are read and written. Tensors on the meta device have no memory: a load of them gives
    `fill`, a store to them leaves no trace but its `Access`. So the addresses of a batch that no memory
    holds can be checked, among real metadata.

    Args:
        launch: from `recorded_launches`, or made by hand; its tensors on the CPU or the meta device.
        programs: numbers of the programs to run, in [0, launch.num_programs).
        fill: what every element of a meta tensor is, default 0.

    Returns:
        Every access, in order.

    Raises:
        AddressError: for an access outside the tensors of the launch.
        InvalidArgumentError: for a program that the launch does not have.
        UnavailableError: before `enable()`.
    """
    executor = _executor
    if executor is None:
        raise UnavailableError("run_launch interprets: call enable() first")
    for program in programs:
        if not 0 <= program < launch.num_programs:
            invalid_argument("programs", program, f"0 to {launch.num_programs - 1}")
    executor.observation = observation = _Observation(frozenset(programs), fill)
    try:
        launch.kernel[(launch.num_programs,)](**launch.arguments, **launch.constants)
    finally:
        executor.observation = None
    return observation.accesses


_executor: Any = None
"""The executor in Triton's place; None before `enable`."""


def enable() -> None:
    """Make Triton kernels that are defined from now on run in the interpreter, as on hardware.

    To be called before anything imports Triton. A second call does nothing.

    Raises:
        UnavailableError: where Triton is not installed, and where a kernel was already made for compiling.
    """
    global _executor
    if _executor is not None:
        return
    with _interpreting():
        interpreter = _import_interpreter()
        from ..optimized.gdn.kernels.launch import trust_interpreter
    _executor = _replace_classes(interpreter)
    _replace_language(interpreter)
    trust_interpreter()


@contextmanager
def _interpreting() -> Iterator[None]:
    """Ask Triton to interpret, and take it back where that fails."""
    previous = os.environ.get("TRITON_INTERPRET")
    os.environ["TRITON_INTERPRET"] = "1"
    try:
        yield
    except BaseException:
        del os.environ["TRITON_INTERPRET"]
        if previous is not None:
            os.environ["TRITON_INTERPRET"] = previous
        raise


def _import_interpreter() -> Any:
    """`triton.runtime.interpreter`, of a Triton in which nothing is decorated for compiling."""
    if tuple(int(x) for x in np.__version__.split(".")[:2]) >= (2, 4):
        raise UnavailableError(f"numpy is {np.__version__}; Triton's interpreter needs numpy below 2.4")
    try:
        interpreter = importlib.import_module("triton.runtime.interpreter")
    except ImportError as error:
        raise UnavailableError(f"Triton cannot be imported ({error}): nothing to interpret with") from error
    if not interpreter.tl.core.is_builtin(interpreter.tl.load):
        raise UnavailableError(
            "Triton has interpreted a kernel already: call enable() before the first launch, in a new process"
        )
    kernels = f"{(__package__ or '').rpartition('.')[0]}.optimized.gdn.kernels"
    compiled = interpreter.triton.runtime.JITFunction
    for name, module in list(sys.modules.items()):
        # Triton's own tl.sum, tl.cdiv and the like are such functions too.
        if name.startswith(("triton.language", kernels)):
            for x in list(vars(module).values()):
                if isinstance(x, compiled) or isinstance(getattr(x, "fn", None), compiled):
                    raise UnavailableError(
                        f"{name} was imported for compiling: call enable() before anything imports Triton or "
                        "the kernels, or set TRITON_INTERPRET=1 for the process"
                    )
    return interpreter


def _replace_classes(interpreter: Any) -> Any:
    """Put our builder and our executor in Triton's place; the executor."""
    builder = type("Builder", (_Builder, interpreter.InterpreterBuilder), {"triton": interpreter})
    for name in dir(builder):
        operation = name.removeprefix("create_")
        if operation != name and operation not in _SAFE_FOR_BFLOAT16:
            refusing = _refusing_bfloat16(getattr(builder, name), operation, interpreter.TensorHandle)
            setattr(builder, name, refusing)
    executor = type("Executor", (_Executor, interpreter.GridExecutor), {"triton": interpreter})
    interpreter.InterpreterBuilder = interpreter.interpreter_builder.__class__ = builder
    interpreter.GridExecutor = executor
    for name in ("ReduceOps", "ScanOps"):
        setattr(interpreter, name, _refusing_bfloat16_inputs(getattr(interpreter, name)))
    # Of an option that computes the overflow of every int32 operation, and then reports it to nobody.
    options = interpreter.interpreter_builder.options
    interpreter.interpreter_builder.options = replace(options, sanitize_overflow=False)
    return executor


def _refusing_bfloat16(operation: Callable[..., Any], name: str, handle: type) -> Callable[..., Any]:
    def refusing(self: Any, *args: Any) -> Any:
        for x in args:
            if isinstance(x, handle):
                _refuse_bfloat16(x, name)
        return operation(self, *args)

    return refusing


def _refusing_bfloat16_inputs(operation: Any) -> type:
    """A reduction or a scan that refuses bfloat16."""

    class Refusing(operation):
        def apply(self, input: Any) -> Any:
            for x in input if isinstance(input, tuple) else (input,):
                _refuse_bfloat16(x.handle, operation.__name__.removesuffix("Ops").lower())
            return super().apply(input)

    return Refusing


def _replace_language(interpreter: Any) -> None:
    """Put interpreted operations in the place of `tl.*`, once: Triton does it at every launch and call."""
    tl, builder = interpreter.tl, interpreter.interpreter_builder
    # triton-ascend makes a masked lane without `other` zero unless told not to care; others do not.
    undefined = {"care_padding": False} if "care_padding" in inspect.signature(tl.load).parameters else {}
    sees_triton = types.FunctionType((lambda: None).__code__, {"tl": tl, "core": tl.core})
    interpreter._patch_lang(sees_triton)
    interpreter._patch_lang = lambda fn: types.SimpleNamespace(restore=lambda: None)
    as_bool = tl.tensor.__bool__

    def as_index(self: Any) -> int:
        _refuse_bfloat16(self.handle, "int")
        return int(self.handle.data.item())

    def as_condition(self: Any) -> bool:
        if builder.is_asking_for_presence:
            return True
        _refuse_bfloat16(self.handle, "if")
        return as_bool(self)

    def asking_for_presence(operation: Callable[..., Any], **defaults: Any) -> Callable[..., Any]:
        def asking(*args: Any, **kwargs: Any) -> Any:
            builder.is_asking_for_presence = True
            try:
                return operation(*args, **{**defaults, **kwargs})
            finally:
                builder.is_asking_for_presence = False

        return asking

    tl.tensor.__index__, tl.tensor.__bool__ = as_index, as_condition
    for owner in (tl, tl.core, tl.tensor):
        for name in dir(owner):
            if name in ("load", "store") or name.startswith("atomic_"):
                defaults = undefined if name == "load" else {}
                setattr(owner, name, asking_for_presence(getattr(owner, name), **defaults))
