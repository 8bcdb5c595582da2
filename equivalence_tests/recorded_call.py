"""A recorded call of the op: its inputs, what was seen of it, and the truth about both."""

import dataclasses
import itertools
import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch

from ..fixtures.store import Fixture
from ..optimized.gdn import IMPLEMENTATIONS
from ..optimized.gdn.kernels.block_sizes import CHUNK_SIZE
from ..reference.errors import invalid_argument
from ..reference.gdn import chunk_gated_delta_rule, recurrent_gated_delta_rule
from ..reference.gdn.inputs import (
    FLOAT_DTYPES,
    check_cu_seqlens,
    check_gdn_shapes,
    check_shape,
    check_tensor,
    sequence_bounds,
)
from ..reference.gdn.metadata import chunk_offsets
from .cases import DTYPES, Inputs, PrefillCase, Truth, run_case
from .compare import compare_o, compare_state
from .tolerances import Errors, limit

_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_NONE = Errors(0.0, 0.0)
_LARGEST_NUMBER = torch.finfo(torch.float32).max
_LARGEST_LIMIT = 0.25  # of a ratio: an error that is allowed to be larger tells nothing
_BOOLS, _NAME_OR_NONE = (bool,), (str, type(None))


@dataclass(frozen=True, eq=False)
class RecordedCall:
    """One call, its sequences packed into one row.

    Attributes:
        inputs: the tensors of the call; rows behind the last sequence are padding.
        scale, eps, use_qk_l2norm_in_kernel: its options.
        seen: "o" `[1, T, HV, V]` and "final_state" `[N, HV, K, V]`, what whoever ran it produced; either may
            be missing.
        stages: "<stage>.<result>" to what that stage produced, packed tokens first; may be empty.
        metadata: chunk metadata that the call was given, by field; may be empty.
        fixture: where it comes from.
    """

    inputs: Inputs
    scale: float | None
    eps: float
    use_qk_l2norm_in_kernel: bool
    seen: Mapping[str, torch.Tensor]
    stages: Mapping[str, torch.Tensor]
    metadata: Mapping[str, torch.Tensor]
    fixture: Fixture = field(repr=False)

    @classmethod
    def of(cls, fixture: Fixture) -> "RecordedCall":
        """The call that a fixture of kind gdn holds.

        Raises:
            InvalidArgumentError: for tensors that do not fit each other, or options that are none.
        """
        config, tensors = fixture.config, fixture.tensors
        scale, eps = config.get("scale"), config.get("eps", 1e-6)
        if scale is not None:
            _check_number("scale", scale, -_LARGEST_NUMBER)
        _check_number("eps", eps, 0.0)
        normalize = config.get("use_qk_l2norm_in_kernel", False)
        _check_type("use_qk_l2norm_in_kernel", normalize, _BOOLS, "true or false")
        _check_type("output_final_state", config.get("output_final_state", True), _BOOLS, "true or false")
        _check_type("implementation", config.get("implementation"), _NAME_OR_NONE, "a name or null")
        q, k, v, g, beta = (tensors[name] for name in ("q", "k", "v", "g", "beta"))
        state, cu_seqlens = tensors.get("initial_state"), tensors.get("cu_seqlens")
        if state is not None and state.dtype in (torch.bfloat16, torch.float16):
            state = state.float()  # exact, and what an op computes with
        sizes = check_gdn_shapes(q, k, v, g, beta, scale=scale, initial_state=state, cu_seqlens=cu_seqlens)
        bounds = sequence_bounds(cu_seqlens, sizes)

        def packed(x: torch.Tensor) -> torch.Tensor:
            return x.flatten(0, 1)[None]

        seen = by_prefix(tensors, "seen.")
        shapes = {
            "o": ((sizes.B, sizes.T, sizes.HV, sizes.V), "[B, T, HV, V]"),
            "final_state": ((sizes.N, sizes.HV, sizes.K, sizes.V), "[N, HV, K, V]"),
        }
        for name, x in seen.items():
            if name not in shapes:
                invalid_argument("tensor", f"seen.{name}", "seen.o, seen.final_state")
            check_tensor(f"seen.{name}", x, 4, FLOAT_DTYPES)
            check_shape(f"seen.{name}", x, *shapes[name])
        if "o" in seen:
            seen["o"] = packed(seen["o"]).clone()
            if config.get("implementation") not in (None, "reference", *IMPLEMENTATIONS):
                seen["o"][:, bounds[-1] :] = 0  # others promise nothing of padding
        return cls(
            Inputs(
                *(packed(x) for x in (q, k, v, g, beta)),
                initial_state=state,
                cu_seqlens=torch.tensor(bounds, dtype=torch.int32),
            ),
            scale,
            eps,
            normalize,
            seen,
            by_prefix(tensors, "stage."),
            by_prefix(tensors, "metadata."),
            fixture,
        )

    @cached_property
    def bounds(self) -> list[int]:
        """N + 1 bounds (tokens) of the sequences."""
        return check_cu_seqlens(self.inputs.cu_seqlens)

    @property
    def seq_lens(self) -> tuple[int, ...]:
        return tuple(end - start for start, end in itertools.pairwise(self.bounds))

    @property
    def dtype(self) -> torch.dtype:
        """Of q, k and v: it decides how far a result may be from the truth."""
        return self.inputs.q.dtype

    @cached_property
    def case(self) -> PrefillCase:
        """The sizes of the call; its tensors are in `inputs`."""
        _, _, H, K = self.inputs.q.shape
        HV, V = self.inputs.v.shape[2:]
        return PrefillCase(
            self.seq_lens,
            H=H,
            HV=HV,
            K=K,
            V=V,
            dtype=_NAMES[self.dtype],
            padding=self.inputs.q.shape[1] - self.bounds[-1],
            initial_state=self.inputs.initial_state is not None,
            use_qk_l2norm_in_kernel=self.use_qk_l2norm_in_kernel,
        )

    @property
    def options(self) -> dict[str, Any]:
        """What a function of the op is given beside tensors, but for `use_qk_l2norm_in_kernel`."""
        return {"scale": self.scale, "eps": self.eps}

    @cached_property
    def truth(self) -> Truth:
        """o and final_state by the definition, in float64, on the recorded inputs."""
        return run_case(recurrent_gated_delta_rule, self.case, self.inputs, **self.options)

    def limits(self, operands: torch.dtype | None = None) -> tuple[Errors, Errors]:
        """What errors of o and final_state may be, of whatever rounds operands of products to `operands`.

        Default: to the dtype of the call.
        """
        operands = operands or self.dtype
        if operands not in self._limits:
            o, state = run_case(
                chunk_gated_delta_rule, self.case, self.inputs, compute_dtype=operands, **self.options
            )
            own_o = compare_o(o, self.truth[0], dtype=operands, bounds=self.bounds, limit=_NONE).errors
            own_state = compare_state(
                state, self.truth[1], dtype=state.dtype, operands=operands, limit=_NONE
            ).errors
            self._limits[operands] = (limit(operands, own_o), limit(operands, own_state))
        return self._limits[operands]

    @cached_property
    def _limits(self) -> dict[torch.dtype, tuple[Errors, Errors]]:
        return {}

    def overflows(self, name: str) -> torch.Tensor:
        """Rows `[T, H]` of q or k of which the sum of squares, which the op takes, is infinite.

        It is taken in float32, of what is float64 in float64; of q only to normalise it.
        """
        x = getattr(self.inputs, name)[0]
        if name == "q" and not self.use_qk_l2norm_in_kernel:
            return torch.zeros(x.shape[:2], dtype=torch.bool)
        wide = x if x.dtype == torch.float64 else x.float()
        return wide.square().sum(-1).isinf()

    def place(self, sequence: int, token: int, head: int | None = None) -> dict[str, int]:
        """A token of a sequence as a place: with its chunk, and its head if there is one."""
        place = {"sequence": sequence, "chunk": token // CHUNK_SIZE, "token": token}
        return place if head is None else {**place, "head": head}

    def sequence_of(self, row: int) -> tuple[int, int]:
        """The sequence that a packed row belongs to, and its token there."""
        sequence = next(n for n, end in enumerate(self.bounds[1:]) if row < end)
        return sequence, row - self.bounds[sequence]

    @cached_property
    def packed(self) -> "RecordedCall":
        """The call without its padding."""
        end, num_rows = self.bounds[-1], self.inputs.q.shape[1]
        if end == num_rows:
            return self
        q, k, v, g, beta, state, cu_seqlens = self.inputs
        q, k, v, g, beta = (x[:, :end] for x in (q, k, v, g, beta))
        seen = {name: x[:, :end] if name == "o" else x for name, x in self.seen.items()}
        stages = {
            name: x if name.partition(".")[2] in ("h", "final_state") else x[:end]
            for name, x in self.stages.items()
        }
        inputs = Inputs(q, k, v, g, beta, state, cu_seqlens)
        return dataclasses.replace(self, inputs=inputs, seen=seen, stages=stages)

    def with_seen(self, o: torch.Tensor | None, final_state: torch.Tensor | None) -> "RecordedCall":
        """The same call with other results."""
        seen = {name: x for name, x in (("o", o), ("final_state", final_state)) if x is not None}
        return dataclasses.replace(self, seen=seen, stages={}, metadata={})

    def take(
        self,
        sequences: Sequence[int] | None = None,
        key_heads: Sequence[int] | None = None,
        *,
        lengths: Sequence[int] | None = None,
        V: int | None = None,
    ) -> "RecordedCall":
        """Part of the call: what it computes of that does not depend on the rest.

        Sequences, heads and the columns of V do not see each other, and a token sees none behind it. The
        metadata are left out, and the final states where a sequence is cut.

        Args:
            sequences: numbers of those that stay, in this order. Default: all.
            key_heads: query/key heads that stay, with their value heads. Default: all.
            lengths: how many first tokens stay, for each of `sequences`. Default: all.
            V: how many first columns stay. Default: all.
        """
        sequences = list(range(len(self.seq_lens)) if sequences is None else sequences)
        lengths = [self.seq_lens[n] for n in sequences] if lengths is None else list(lengths)
        H, R = self.case.H, self.case.HV // self.case.H
        keys = list(range(H) if key_heads is None else key_heads)
        values, columns = [h * R + i for h in keys for i in range(R)], slice(V)
        tokens = _ranges(self.bounds, sequences, lengths)
        is_cut = any(length < self.seq_lens[n] for n, length in zip(sequences, lengths, strict=True))
        q, k, v, g, beta, state, _ = self.inputs
        q, k = (x[:, tokens][:, :, keys] for x in (q, k))
        v, g, beta = (x[:, tokens][:, :, values] for x in (v, g, beta))
        if state is not None:
            state = state[sequences][:, values][..., columns]
        bounds = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
        seen = {}
        if "o" in self.seen:
            seen["o"] = self.seen["o"][:, tokens][:, :, values][..., columns]
        if "final_state" in self.seen and not is_cut:
            seen["final_state"] = self.seen["final_state"][sequences][:, values][..., columns]
        chunks = _ranges(
            chunk_offsets(self.bounds, CHUNK_SIZE).tolist(), sequences, [-(-n // CHUNK_SIZE) for n in lengths]
        )
        stages = {}
        for name, x in self.stages.items():
            result = name.partition(".")[2]
            if result == "final_state" and is_cut:
                continue
            rows = {"h": chunks, "final_state": sequences}.get(result, tokens)
            x = x[rows][:, keys if name.startswith("l2norm.") else values]
            stages[name] = x[..., columns] if result in ("u", "v_new", "h", "final_state", "o") else x
        return dataclasses.replace(
            self,
            inputs=Inputs(q, k, v[..., columns], g, beta, state, bounds),
            seen=seen,
            stages=stages,
            metadata={},
        )

    def after(self, starts: Sequence[int]) -> "RecordedCall":
        """The call without the first tokens of each sequence; what they did is in the initial state.

        Args:
            starts: of each sequence, the first token that stays; a multiple of 64, or all of its tokens.
        """
        head = self.take(lengths=starts)
        _, state = run_case(chunk_gated_delta_rule, head.case, head.inputs, **self.options)
        assert state is not None
        lengths = [length - start for length, start in zip(self.seq_lens, starts, strict=True)]
        tokens = _ranges(self.bounds, list(range(len(starts))), lengths, starts)
        chunks = _ranges(
            chunk_offsets(self.bounds, CHUNK_SIZE).tolist(),
            list(range(len(starts))),
            [-(-n // CHUNK_SIZE) for n in lengths],
            [start // CHUNK_SIZE for start in starts],
        )
        seen = dict(self.seen)
        if "o" in seen:
            seen["o"] = seen["o"][:, tokens]
        stages = {}
        for name, x in self.stages.items():
            result = name.partition(".")[2]
            stages[name] = x if result == "final_state" else x[chunks if result == "h" else tokens]
        wide = torch.float64 if self.dtype == torch.float64 else torch.float32
        return dataclasses.replace(
            self,
            inputs=Inputs(
                *(x[:, tokens] for x in self.inputs[:5]),  # pyright: ignore[reportArgumentType, reportOptionalSubscript]
                initial_state=state.to(wide),
                cu_seqlens=torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32),
            ),
            seen=seen,
            stages=stages,
            metadata={},
        )

    def to_fixture(self, **origin: Any) -> Fixture:
        """The call as a fixture, with the words and the origin of the one it comes from, and `origin`."""
        q, k, v, g, beta, state, cu_seqlens = self.inputs
        tensors = {"q": q, "k": k, "v": v, "g": g, "beta": beta, "cu_seqlens": cu_seqlens}
        if state is not None:
            tensors["initial_state"] = state
        tensors.update({f"seen.{name}": x for name, x in self.seen.items()})
        tensors.update({f"stage.{name}": x for name, x in self.stages.items()})
        tensors.update({f"metadata.{name}": x for name, x in self.metadata.items()})
        return dataclasses.replace(
            self.fixture,
            tensors={name: x.contiguous() for name, x in tensors.items()},
            origin={**self.fixture.origin, **origin},
        )


def tells_nothing(allowed: Errors) -> bool:
    """Whether limits are so wide, because the reference itself is that far off, that they prove nothing."""
    return not allowed.ratio <= _LARGEST_LIMIT


def _check_number(name: str, value: object, least: float) -> None:
    if (
        isinstance(value, bool)
        or not isinstance(value, (int, float))
        or not least <= value <= _LARGEST_NUMBER
    ):
        allowed = f"a number from {least:.4g} to {_LARGEST_NUMBER:.4g}, as float32 holds"
        invalid_argument(f"config {name}", reprlib.repr(value), allowed)


def _check_type(name: str, value: object, types: tuple[type, ...], allowed: str) -> None:
    if not isinstance(value, types):
        invalid_argument(f"config {name}", reprlib.repr(value), allowed)


def _ranges(
    bounds: Sequence[int], parts: Sequence[int], lengths: Sequence[int], starts: Sequence[int] | None = None
) -> torch.Tensor:
    """Rows of the first so many of each part, or of those from `starts` on, in order."""
    starts = [0] * len(parts) if starts is None else starts
    rows = [
        bounds[n] + start + i
        for n, length, start in zip(parts, lengths, starts, strict=True)
        for i in range(length)
    ]
    return torch.tensor(rows, dtype=torch.int64)


def by_prefix(tensors: Mapping[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    """Tensors whose names start so, by what follows."""
    return {name.removeprefix(prefix): x for name, x in tensors.items() if name.startswith(prefix)}
