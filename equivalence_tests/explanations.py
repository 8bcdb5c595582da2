"""What wrong results of the op look like: each known mistake, made on purpose, beside what was seen.

A recording of somebody's kernel holds what went in and what came out, and no more. So every mistake of
`mistakes.MISTAKES` is put into the stages of the reference, one at a time, and the one that gives what was
seen is the explanation. No value head and no sequence sees another, so each pair of them is judged alone: an
explanation must hold for every pair that is wrong, and be much nearer to what was seen than what is right is:
an error just over the limit is near to many things. Of several that do, one that would leave the others right
is taken first.

Where a mistake leaves values that nobody wrote, they are NaN in what it gives, and anything may be seen
there.
"""

import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from ..reference.gdn.inputs import scale_or_default
from .mistakes import MISTAKES, UNWRITTEN, Facts, Given, Mistake, Results, Steps, Variant
from .recorded_call import RecordedCall, tells_nothing
from .tolerances import Errors, smallest_scale
from .tolerances import limit as limit_of_dtype

_SAMPLED_HEADS = 2
_NEARER = 3.0  # times: how much nearer to what was seen an explanation is than what is right
_NEAR = 20.0  # limits: an explanation that is no further off is given limits of its own

Pair = tuple[int, int]  # a sequence and a value head


@dataclass(frozen=True)
class Explanation:
    """A mistake that gives what was seen.

    Attributes:
        mistake: which.
        what: which variant of it.
        sequences, heads: of all that is wrong.
        results: o and final_state as the mistake gives them, for every sequence and head.
    """

    mistake: Mistake
    what: str
    sequences: tuple[int, ...]
    heads: tuple[int, ...]
    results: Results

    @property
    def words(self) -> str:
        return f"{self.mistake.words}{f' ({self.what})' if self.what else ''}"


class _Excess(NamedTuple):
    """What speaks against an explanation; less is better.

    Attributes:
        pairs: of a wrong head and a sequence for which it is right, and would not be.
        free: values about which the explanation says nothing.
    """

    pairs: int
    free: int


class Doctor:
    """Compares what was seen of a call with what is right, and with what each mistake gives.

    Args:
        call: with "o", "final_state" or both in `seen`.
        limits: of o and final_state.
        failed: names of those in `seen` that are wrong; pairs are looked for in these alone. Default: both.

    Attributes:
        wrong: pairs of a sequence and a value head that differ from what is right.
    """

    def __init__(
        self,
        call: RecordedCall,
        limits: tuple[Errors, Errors],
        failed: Collection[str] = Results._fields,
    ) -> None:
        q, k, v, g, beta, state, _ = call.inputs
        H, HV, K, V = call.case.H, call.case.HV, call.case.K, call.case.V
        q, k = (x[0].double().repeat_interleave(HV // H, dim=1) for x in (q, k))
        seen = {name: x.double() for name, x in call.seen.items()}
        if state is None:
            state = torch.zeros((len(call.seq_lens), HV, K, V))
        normalize = (call.use_qk_l2norm_in_kernel, call.use_qk_l2norm_in_kernel)
        self._seen_o = seen["o"][0] if "o" in seen else None
        self._seen_state = seen.get("final_state")
        given = Given(
            *(q, k, v[0].double(), g[0].double(), beta[0].double(), state.double(), call.bounds),
            *(scale_or_default(call.scale, K), call.eps, normalize, self._seen_o),
        )
        self._facts = Facts(given, Results(call.truth[0][0], call.truth[1]), H)
        self._dtype, self._limits = call.dtype, limits
        self._sequences, self._heads = range(len(call.seq_lens)), range(HV)
        self._scales = self._scales_of(self._facts.truth, self._sequences)
        self._failed = failed
        asked = [
            limit if name in failed else Errors(math.inf, math.inf)
            for name, limit in zip(Results._fields, limits, strict=True)
        ]
        self.wrong = self._differing(self._facts.truth, self._sequences, self._heads, asked, by_sequence=True)

    def explain(self, among: Collection[str] | None = None) -> Explanation | None:
        """The mistake that gives all that is wrong, and changes least of what is right.

        Args:
            among: names of mistakes. Default: all.
        """
        best: tuple[_Excess, Mistake, Variant, Results] | None = None
        for mistake in MISTAKES if self.wrong else ():
            if (among is not None and mistake.name not in among) or (best and mistake.is_last_resort):
                continue
            for variant in mistake.variants(self._facts):
                if not self._gives_what_was_seen(variant):
                    continue
                results = self._results(variant, self._sequences, self._heads)
                excess = self._excess(results)
                if not self._is_much_nearer(results):
                    continue
                if excess.free and (excess.pairs or self._is_free_where_right(results)):
                    continue  # it says little of what is wrong, and not that the rest is right
                if best is None or excess < best[0]:
                    best = (excess, mistake, variant, results)
                if not any(excess):
                    break
            if best is not None and not any(best[0]):
                break
        if best is None:
            return None
        _, mistake, variant, results = best
        sequences, heads = (tuple(sorted(set(x))) for x in zip(*self.wrong, strict=True))
        return Explanation(mistake, variant.what, sequences, heads, results)

    def made(self, name: str) -> Iterator[Results]:
        """What each variant of a mistake gives, for every sequence and head."""
        for mistake in MISTAKES:
            if mistake.name == name:
                for variant in mistake.variants(self._facts):
                    yield self._results(variant, self._sequences, self._heads)

    def _is_much_nearer(self, results: Results) -> bool:
        """Whether what is right is much further from what was seen of the wrong pairs, measured in limits."""
        return _NEARER * self._distance(results) <= self._distance(self._facts.truth)

    def _distance(self, want: Results) -> float:
        """The largest error over the wrong pairs, in limits."""
        worst = 0.0
        for name, known, allowed in zip(
            Results._fields, (self._seen_o, self._seen_state), self._limits, strict=True
        ):
            if known is None or name not in self._failed:
                continue
            seen = Results(known, known)
            for n, errors in self._errors(seen, want, self._sequences, name).items():
                for error, most in zip(errors, allowed, strict=True):
                    wrong = [h for m, h in self.wrong if m == n]
                    worst = max([worst, *(error[wrong] / most).tolist()])
        return worst

    def _excess(self, results: Results) -> "_Excess":
        """What is right, and would not be if this had happened; a pair with anything free would not be."""
        free, changed = 0, set()
        known = {"o": self._seen_o is not None, "final_state": self._seen_state is not None}
        for name, limits in zip(Results._fields, self._limits, strict=True):
            if not known[name]:
                continue
            errors = self._errors(self._facts.truth, results, self._sequences, name)
            for n, (ratio, worst_row) in errors.items():
                lost = self._free(results, n, name)
                free += int(lost.sum())
                over = ~((ratio <= limits.ratio) & (worst_row <= limits.worst_row)) | (lost > 0)
                changed |= {(n, head) for head in over.nonzero().flatten().tolist()}
        heads = {head for _, head in self.wrong}
        return _Excess(sum(head in heads for _, head in changed - self.wrong), free)

    def _is_free_where_right(self, results: Results) -> bool:
        """Whether an explanation says nothing about values of a tensor that is right as a whole."""
        return any(
            name not in self._failed and not x.isfinite().all()
            for name, x in zip(Results._fields, results, strict=True)
        )

    def _free(self, results: Results, n: int, name: str) -> torch.Tensor:
        """How many values of each head an explanation says nothing about."""
        bounds = self._facts.given.bounds
        if name == "o":
            return (~results.o[bounds[n] : bounds[n + 1]].isfinite()).sum((0, 2))
        return (~results.final_state[n].isfinite()).sum((1, 2))

    def _gives_what_was_seen(self, variant: Variant) -> bool:
        """Whether a variant holds for all that is wrong; tried first on a little of it, the shortest."""
        sequences = sorted({n for n, _ in self.wrong})
        shortest = min(sequences, key=lambda n: self._facts.given.lens[n] or math.inf)
        heads = sorted(h for n, h in self.wrong if n == shortest)
        return self._holds(variant, [shortest], heads[:_SAMPLED_HEADS]) and self._holds(
            variant, sequences, sorted({h for _, h in self.wrong})
        )

    def _holds(self, variant: Variant, sequences: Sequence[int], heads: Sequence[int]) -> bool:
        results = self._results(variant, sequences, heads)
        asked = {(n, h) for n in sequences for h in heads} & self.wrong
        if not asked & self._differing(results, sequences, heads, self._limits):
            return True
        wide = (Errors(*(_NEAR * x for x in limit)) for limit in self._limits)
        if asked & self._differing(results, sequences, heads, tuple(wide)):
            return False
        # Near: what is computed wrongly may be harder to compute than what is right.
        limits = self._limits_of(variant, results, sequences, heads)
        return limits is not None and not asked & self._differing(results, sequences, heads, limits)

    def _results(
        self,
        variant: Variant,
        sequences: Sequence[int],
        heads: Sequence[int],
        compute_dtype: torch.dtype = torch.float64,
    ) -> Results:
        """What a variant gives for some sequences and heads."""
        given = variant.given or self._facts.given
        if variant.results is not None:
            return self._part(variant.results, sequences, heads)
        if variant.needs_all_sequences:
            results = Steps(given.part(self._sequences, heads), variant.hooks, compute_dtype).run()
            return self._part(results, sequences, range(len(heads)))
        part = given.part(sequences, heads)
        if variant.run is not None:
            return variant.run(part)
        return Steps(part, variant.hooks, compute_dtype).run()

    def _part(self, results: Results, sequences: Sequence[int], heads: Sequence[int]) -> Results:
        bounds = self._facts.given.bounds
        rows = [t for n in sequences for t in range(bounds[n], bounds[n + 1])]
        o = results.o[torch.tensor(rows, dtype=torch.int64)]
        return Results(o[:, list(heads)], results.final_state[list(sequences)][:, list(heads)])

    def _limits_of(
        self, variant: Variant, results: Results, sequences: Sequence[int], heads: Sequence[int]
    ) -> tuple[Errors, Errors] | None:
        """The limits of a variant: twice what the stages, made wrong in the same way, lose in this dtype."""
        if variant.run is not None or variant.results is not None:
            return None
        rounded = self._results(variant, sequences, heads, self._dtype)
        own_o, own_state = [0.0, 0.0], [0.0, 0.0]
        for own, name in ((own_o, "o"), (own_state, "final_state")):
            for errors in self._errors(rounded, results, sequences, name).values():
                worst = torch.stack(errors).amax(dim=1).tolist()
                own[:] = [max(pair) for pair in zip(own, worst, strict=True)]
        o, state = (limit_of_dtype(self._dtype, Errors(*own)) for own in (own_o, own_state))
        return None if tells_nothing(o) or tells_nothing(state) else (o, state)

    def _differing(
        self,
        want: Results,
        sequences: Sequence[int],
        heads: Sequence[int],
        limits: Sequence[Errors],
        *,
        by_sequence: bool = False,
    ) -> set[Pair]:
        """Pairs for which what was seen is further from `want` than the limits allow."""
        seen = self._part(
            Results(
                torch.full_like(self._facts.truth.o, UNWRITTEN) if self._seen_o is None else self._seen_o,
                self._facts.truth.final_state if self._seen_state is None else self._seen_state,
            ),
            sequences,
            heads,
        )
        found: set[Pair] = set()
        for name, known, limit_of in zip(
            Results._fields, (self._seen_o, self._seen_state), limits, strict=True
        ):
            if known is None:
                continue
            errors = self._errors(seen, want, sequences, name, by_sequence=by_sequence)
            for n, (ratio, worst_row) in errors.items():
                over = ~((ratio <= limit_of.ratio) & (worst_row <= limit_of.worst_row))
                found |= {(n, head) for head, is_over in zip(heads, over.tolist(), strict=True) if is_over}
        return found

    def _errors(
        self,
        actual: Results,
        want: Results,
        sequences: Sequence[int],
        name: str,
        *,
        by_sequence: bool = False,
    ) -> dict[int, tuple[torch.Tensor, torch.Tensor]]:
        """Ratio and worst row of each head, by sequence; NaN in `want` allows everything.

        They are measured by the sequence, or, where that is more, by the head.
        """
        errors, start = {}, 0
        for i, n in enumerate(sequences):
            length = self._facts.given.lens[n]
            if name == "o":
                parts = [x.o[start : start + length] for x in (actual, want)]
            else:
                parts = [x.final_state[i].transpose(0, 1) for x in (actual, want)]
            start += length
            found, wanted = parts
            if not found.numel():
                continue
            free = ~wanted.isfinite()
            difference = (found - wanted).masked_fill(free, 0).nan_to_num(nan=math.inf)
            per_head = wanted.masked_fill(free, 0).square().mean((0, 2)).sqrt()
            # As where the whole is compared; but a head that is larger than the others has larger errors.
            of_heads = 0 * per_head if by_sequence else per_head
            scale = of_heads.clamp(min=self._scales[name][n])
            rows = difference.square().mean(-1).sqrt() / scale  # [rows, heads]
            errors[n] = (rows.square().mean(0).sqrt(), rows.amax(0))
        return errors

    def _scales_of(self, truth: Results, sequences: Sequence[int]) -> dict[str, dict[int, float]]:
        """RMS of what is right of each sequence, over all heads: what errors are measured by."""
        bounds, least = self._facts.given.bounds, smallest_scale(self._dtype)
        return {
            "o": {n: max(_rms(truth.o[bounds[n] : bounds[n + 1]]), least) for n in sequences},
            "final_state": {n: max(_rms(truth.final_state[n]), least) for n in sequences},
        }


def _rms(x: torch.Tensor) -> float:
    return x.square().mean().sqrt().item() if x.numel() else 0.0
