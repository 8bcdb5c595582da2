"""Known ways in which a kernel of the op is wrong, each as something that can be done to the reference."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from types import MappingProxyType
from typing import NamedTuple

import torch

from ..optimized.gdn.kernels.block_sizes import CHUNK_SIZE
from ..reference.gdn import stages
from ..reference.gdn.metadata import chunk_indices, chunk_offsets

_MOST_SHIFTS = 64  # of heads and sequences, that are tried
UNWRITTEN = float("nan")
_LARGEST_EXPONENT = 88.7  # of e, that float32 holds
_TELLING = 1e-3  # of an output: a part that is smaller tells nothing of its factor
_FEWEST_COLUMNS = 8  # of V: a number that is fitted to fewer says little

Hooks = Mapping[str, Callable[["Steps"], torch.Tensor]]


class Given(NamedTuple):
    """Inputs of a call in float64, a key head for every value head: q, k `[T, HV, K]` as they came, v
    `[T, HV, V]`, g, beta `[T, HV]`, initial_state `[N, HV, K, V]`, bounds N + 1 ints."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    g: torch.Tensor
    beta: torch.Tensor
    initial_state: torch.Tensor
    bounds: list[int]
    scale: float
    eps: float
    normalize: tuple[bool, bool]  # q and k
    seen_o: torch.Tensor | None  # [T, HV, V]

    @property
    def lens(self) -> list[int]:
        return [end - start for start, end in pairwise(self.bounds)]

    def part(self, sequences: Sequence[int], heads: Sequence[int]) -> "Given":
        """Some sequences and heads."""
        rows, values, bounds = [], list(heads), [0]
        for n in sequences:
            rows += range(self.bounds[n], self.bounds[n + 1])
            bounds.append(len(rows))
        index = torch.tensor(rows, dtype=torch.int64)
        q, k, v, g, beta = (x[index][:, values] for x in self[:5])
        state, seen_o = self.initial_state[list(sequences)][:, values], self.seen_o
        seen_o = None if seen_o is None else seen_o[index][:, values]
        return Given(q, k, v, g, beta, state, bounds, *self[7:10], seen_o)


@dataclass
class Steps:
    """The stages of the reference over a call; a hook gives a tensor another value on its way.

    A hook is called with the steps, of which it may read any tensor by name; for its own it finds there what
    would be right.
    """

    given: Given
    hooks: Hooks
    compute_dtype: torch.dtype = torch.float64

    def __post_init__(self) -> None:
        self.values: dict[str, torch.Tensor] = {}
        self.offsets: list[int] = chunk_offsets(self.given.bounds, CHUNK_SIZE).tolist()

    def __getitem__(self, name: str) -> torch.Tensor:
        return self.values[name]

    def put(self, **tensors: torch.Tensor) -> None:
        for name, x in tensors.items():
            self.values[name] = x
            if name in self.hooks:
                self.values[name] = self.hooks[name](self)

    def cut(self, x: torch.Tensor) -> torch.Tensor:
        """Packed tokens as chunks, in the dtype that sums are kept in."""
        dtype = stages.accumulation_dtype(self.compute_dtype)
        return stages.to_chunks(x.to(dtype), self.given.bounds, CHUNK_SIZE)

    def run(self) -> "Results":
        """What the op returns."""
        x, dtype = self.given, self.compute_dtype
        q, k = _normalised(x)
        self.put(q=self.cut(q), k=self.cut(k), v=self.cut(x.v), g=self.cut(x.g), beta=self.cut(x.beta))
        k, v, g, beta = (self[name] for name in ("k", "v", "g", "beta"))
        self.put(A=stages.chunk_scaled_dot_kkt(k, g, beta, compute_dtype=dtype))
        self.put(Ai=stages.solve_tril(self["A"], compute_dtype=dtype))
        w, u = stages.recompute_w_u(k, v, g, beta, self["Ai"], compute_dtype=dtype)
        self.put(w=w, u=u)
        h, v_new, final_state = self.carry(x.initial_state)
        self.put(h=h, v_new=v_new, final_state=final_state)
        self.put(o=self.read())
        o = stages.from_chunks(self["o"], x.bounds, x.bounds[-1])
        return Results(o, self["final_state"])

    def carry(self, initial_state: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """h, v_new and final_state from another initial state."""
        return stages.chunk_delta_h(
            *(self[name] for name in ("k", "w", "u", "g")),
            chunk_offsets=self.offsets,
            initial_state=initial_state.to(stages.accumulation_dtype(self.compute_dtype)),
            compute_dtype=self.compute_dtype,
        )

    def read(self, **others: torch.Tensor) -> torch.Tensor:
        """The output, with other tensors than those on the way where they are given."""
        tensors = {**self.values, **others}
        return stages.chunk_fwd_o(
            *(tensors[name] for name in ("q", "k", "v_new", "h", "g")),
            scale=self.given.scale,
            compute_dtype=self.compute_dtype,
        )


def _normalised(x: Given) -> tuple[torch.Tensor, torch.Tensor]:
    """q and k as the stages behind l2norm read them."""
    q, k = (
        stages.l2norm(z, eps=x.eps) if wanted else z
        for z, wanted in zip((x.q, x.k), x.normalize, strict=True)
    )
    return q, k


class Results(NamedTuple):
    """What the op returns: o `[T, HV, V]` and final_state `[N, HV, K, V]`."""

    o: torch.Tensor
    final_state: torch.Tensor


class Variant(NamedTuple):
    """One way to make a mistake: other inputs, other tensors on the way, or other results.

    Attributes:
        what: to be added to the words of the mistake; or "".
        given: inputs in place of the right ones.
        hooks: of `Steps`.
        run: computes the results in place of `Steps`.
        results: those of the whole call, where they follow from the right ones.
        needs_all_sequences: whether `hooks` know the batch, so that no sequence can be taken out of it.
    """

    what: str = ""
    given: Given | None = None
    hooks: Hooks = MappingProxyType({})
    run: Callable[[Given], Results] | None = None
    results: Results | None = None
    needs_all_sequences: bool = False


class Facts(NamedTuple):
    """What a mistake is made of: the call, and what is right."""

    given: Given
    truth: Results
    num_key_heads: int


@dataclass(frozen=True)
class Mistake:
    """A known way to be wrong.

    Attributes:
        name: short.
        stage: where it happens, one of the stages or "metadata".
        tensor: what is wrong there.
        blame: "metadata", "arithmetic" or "state".
        words: what happens, a clause that can stand after "as if".
        variants: the ways to make it on a call; none where it would change nothing.
        is_last_resort: whether it has so many numbers to choose that it explains what others explain better.
    """

    name: str
    stage: str
    tensor: str
    blame: str
    words: str
    variants: Callable[[Facts], Iterator[Variant]]
    is_last_resort: bool = False


def _inputs(change: Callable[[Given], Given | None]) -> Callable[[Facts], Iterator[Variant]]:
    """One variant: the call with other inputs; none where `change` returns None."""

    def variants(facts: Facts) -> Iterator[Variant]:
        given = change(facts.given)
        if given is not None:
            yield Variant(given=given)

    return variants


def _hooks(**hooks: Callable[[Steps], torch.Tensor]) -> Callable[[Facts], Iterator[Variant]]:
    def variants(facts: Facts) -> Iterator[Variant]:
        yield Variant(hooks=hooks)

    return variants


def _results(change: Callable[[Facts], Results | None]) -> Callable[[Facts], Iterator[Variant]]:
    def variants(facts: Facts) -> Iterator[Variant]:
        results = change(facts)
        if results is not None:
            yield Variant(results=results)

    return variants


def _other_heads(*names: str) -> Callable[[Facts], Iterator[Variant]]:
    """The tensors of another value head, every other one in turn."""

    def variants(facts: Facts) -> Iterator[Variant]:
        given = facts.given
        heads = given.g.shape[1]
        for shift in range(1, min(heads, _MOST_SHIFTS)):
            changed = {name: getattr(given, name).roll(-shift, dims=1) for name in names}
            yield Variant(f"of head h + {shift}, modulo {heads}, in place of h", given._replace(**changed))

    return variants


def _factors_of_g(facts: Facts) -> Iterator[Variant]:
    factors = {
        "g counts twice": 2.0,
        "g counts half": 0.5,
        "exp2 of g": math.log(2),
        "exp of g in base 2": 1 / math.log(2),
    }
    for what, factor in factors.items():
        yield Variant(what, facts.given._replace(g=facts.given.g * factor))


def _shifted(x: torch.Tensor, bounds: list[int], by: int) -> torch.Tensor:
    """Rows of every sequence moved by one; the one without a neighbour keeps its own."""
    parts = [x[start:end] for start, end in pairwise(bounds)]
    moved = [
        torch.cat([part[:1], part[:-1]]) if by > 0 else torch.cat([part[1:], part[-1:]]) for part in parts
    ]
    return torch.cat(moved) if moved else x


def _late_gates(facts: Facts) -> Iterator[Variant]:
    for by, what in ((1, "of the token before"), (-1, "of the token after")):
        given = facts.given
        yield Variant(what, given._replace(g=_shifted(given.g, given.bounds, by)))


def _run_with_decays(given: Given, decays: torch.Tensor | None = None) -> Results:
    """The definition, token by token, with any decays `[T, HV]`.

    Without them, with those that give the output that was seen: one number for the V of a row.
    """
    q, k = _normalised(given)
    o, final_state = torch.empty_like(given.v), given.initial_state.clone()
    for n, (start, end) in enumerate(pairwise(given.bounds)):
        state = final_state[n]
        for t in range(start, end):
            alike, beta = (q[t] * k[t]).sum(-1, keepdim=True), given.beta[t, :, None]
            read_q, read_k = (torch.einsum("hk,hkv->hv", x[t], state) for x in (q, k))
            # o = fixed + decay * slope
            fixed = given.scale * alike * beta * given.v[t]
            slope = given.scale * (read_q - alike * beta * read_k)
            if decays is not None:
                decay = decays[t, :, None]
            else:
                assert given.seen_o is not None
                size = slope.square().sum(-1, keepdim=True)
                fitted = ((given.seen_o[t] - fixed) * slope).sum(-1, keepdim=True) / size
                is_told = size > _TELLING**2 * given.seen_o[t].square().sum(-1, keepdim=True)
                decay = torch.where(is_told, fitted.clamp(0, 1), given.g[t].exp()[:, None])
            o[t] = fixed + decay * slope
            state.mul_(decay[..., None])
            state.add_(k[t][:, :, None] * (beta * (given.v[t] - decay * read_k))[:, None, :])
    return Results(o, final_state)


def _linear_gates(facts: Facts) -> Iterator[Variant]:
    given = facts.given
    yield Variant("its exponential was taken once more", given._replace(g=given.g.exp()))
    yield Variant("g itself was the decay", run=lambda part: _run_with_decays(part, part.g))


def _fitted_gates(facts: Facts) -> Iterator[Variant]:
    if facts.given.seen_o is not None and facts.given.v.shape[-1] > _FEWEST_COLUMNS:
        yield Variant(run=_run_with_decays)


def _transposed(given: Given) -> Given | None:
    state = given.initial_state
    if state.shape[-1] != state.shape[-2] or not state.any():
        return None
    return given._replace(initial_state=state.mT)


def _written_transposed(facts: Facts) -> Results | None:
    o, state = facts.truth
    return Results(o, state.mT) if state.shape[-1] == state.shape[-2] else None


def _read_and_written_transposed(facts: Facts) -> Iterator[Variant]:
    given = _transposed(facts.given)
    if given is not None:
        yield Variant(given=given, hooks={"final_state": lambda steps: steps["final_state"].mT})


def _swapped_states(facts: Facts) -> Iterator[Variant]:
    given, N = facts.given, len(facts.given.lens)
    for shift in range(1, min(N, _MOST_SHIFTS)):
        state = given.initial_state.roll(-shift, dims=0)
        yield Variant(
            f"of sequence n + {shift}, modulo {N}, in place of n", given._replace(initial_state=state)
        )


def _states_of_other_heads(facts: Facts) -> Iterator[Variant]:
    if facts.given.initial_state.any():
        yield from _other_heads("initial_state")(facts)


def _swapped_final_states(facts: Facts) -> Iterator[Variant]:
    o, state = facts.truth
    for shift in range(1, min(len(state), _MOST_SHIFTS)):
        what = f"of sequence n + {shift}, modulo {len(state)}, in place of n"
        yield Variant(what, results=Results(o, state.roll(-shift, dims=0)))


def _sequences_run_together(facts: Facts) -> Iterator[Variant]:
    if len(facts.given.lens) > 1:
        state = facts.given.initial_state.clone()
        state[1:] = facts.truth.final_state[:-1]
        yield Variant(given=facts.given._replace(initial_state=state))


def _stale(facts: Facts) -> Results | None:
    return Results(facts.truth.o, facts.given.initial_state)


def _no_state_written(facts: Facts) -> Results | None:
    return Results(facts.truth.o, torch.zeros_like(facts.truth.final_state))


def _without_what_came_before(facts: Facts) -> Iterator[Variant]:
    if facts.given.initial_state.any():
        zeros = torch.zeros_like
        yield Variant(hooks={"final_state": lambda steps: steps.carry(zeros(steps.given.initial_state))[2]})


def _before_last_chunk(steps: Steps) -> torch.Tensor:
    """The state that the last chunk of each sequence starts from."""
    state = steps["final_state"].clone()
    for n, (first, end) in enumerate(pairwise(steps.offsets)):
        if end > first:
            state[n] = steps["h"][end - 1]
    return state


def _tails(facts: Facts) -> Iterator[Variant]:
    """Whatever was made of the last tokens of each sequence, where they are less than a chunk."""
    if any(length > CHUNK_SIZE and length % CHUNK_SIZE for length in facts.given.lens):
        yield Variant(results=_without_last(facts, [n % CHUNK_SIZE for n in facts.given.lens]))


def _tails_of_states(facts: Facts) -> Iterator[Variant]:
    """Only beside a sequence without a tail, or with decays in all tails that a mistake makes infinite: else
    nothing says that tails have to do with it."""
    given = facts.given
    tails = [length % CHUNK_SIZE for length in given.lens]
    has_others = any(length and not tail for length, tail in zip(given.lens, tails, strict=True))
    are_steep = all(
        (-given.g[end - tail : end].sum(0) > _LARGEST_EXPONENT).any()
        for end, tail in zip(given.bounds[1:], tails, strict=True)
        if tail
    )
    if any(tails) and (has_others or are_steep):
        state = facts.truth.final_state.clone()
        state[[tail > 0 for tail in tails]] = UNWRITTEN
        yield Variant(results=Results(facts.truth.o, state))


def _last_chunks(facts: Facts) -> Iterator[Variant]:
    """Nobody wrote the last chunk of any sequence, nor what follows from it."""
    if any(length > CHUNK_SIZE and length % CHUNK_SIZE == 0 for length in facts.given.lens):
        lens = facts.given.lens
        yield Variant(results=_without_last(facts, [n % CHUNK_SIZE or min(n, CHUNK_SIZE) for n in lens]))


def _without_last(facts: Facts, counts: list[int]) -> Results:
    """What is right, but for so many last tokens of each sequence, and its final state."""
    o, state = (x.clone() for x in facts.truth)
    for n, (end, count) in enumerate(zip(facts.given.bounds[1:], counts, strict=True)):
        if count:
            o[end - count : end], state[n] = UNWRITTEN, UNWRITTEN
    return Results(o, state)


def _decay_in_two_factors(facts: Facts) -> Iterator[Variant]:
    """exp(a) * exp(-b) in place of exp(a - b): no number from where exp(-b) is infinite."""
    given = facts.given
    in_chunk, (after, state) = facts.truth.o.clone(), (x.clone() for x in facts.truth)
    for n, (start, end) in enumerate(pairwise(given.bounds)):
        for first in range(start, end, CHUNK_SIZE):
            last = min(first + CHUNK_SIZE, end)
            over = -given.g[first:last].cumsum(0) > _LARGEST_EXPONENT  # [tokens, HV]
            for head in over.any(0).nonzero().flatten().tolist():
                token = first + int(over[:, head].int().argmax())
                in_chunk[token:last, head] = UNWRITTEN
                after[token:end, head], state[n, head] = UNWRITTEN, UNWRITTEN
    if in_chunk.isnan().any():
        yield Variant("in the output", results=Results(in_chunk, facts.truth.final_state))
        yield Variant("in the state, and all that follows", results=Results(after, state))


def _run_counting_twice(given: Given) -> Results:
    """From the first token on at which what was seen is nearer to a start from twice the state."""
    once, twice = (
        Steps(given._replace(initial_state=times * given.initial_state), {}).run() for times in (1, 2)
    )
    assert given.seen_o is not None
    o = once.o.clone()
    for start, end in pairwise(given.bounds):
        part = slice(start, end)
        off, off_twice = (
            (given.seen_o[part] - x.o[part]).square().sum((1, 2)).nan_to_num() for x in (once, twice)
        )
        if length := end - start:
            # The best place to change over: errors before it of the one, from it on of the other.
            before = torch.cat([off.new_zeros(1), off.cumsum(0)])
            after = torch.cat([off_twice.flip(0).cumsum(0).flip(0), off.new_zeros(1)])
            first = start + min(int((before + after).argmin()), length)
            o[first:end] = twice.o[first:end]
    return Results(o, twice.final_state)


def _counted_twice(facts: Facts) -> Iterator[Variant]:
    if facts.given.seen_o is not None and facts.given.initial_state.any():
        yield Variant(run=_run_counting_twice)


def _narrowed(name: str) -> Callable[[Facts], Iterator[Variant]]:
    """An input rounded to 16 bits, where it has more."""

    def variants(facts: Facts) -> Iterator[Variant]:
        for dtype in (torch.bfloat16, torch.float16):
            x = getattr(facts.given, name)
            yield Variant(f"to {dtype}", facts.given._replace(**{name: x.to(dtype).double()}))

    return variants


def _narrowed_final_state(facts: Facts) -> Iterator[Variant]:
    o, state = facts.truth
    for dtype in (torch.bfloat16, torch.float16):
        yield Variant(f"to {dtype}", results=Results(o, state.to(dtype).double()))


def _of_wrong_key_heads(facts: Facts) -> Iterator[Variant]:
    """Every other key head in the place of the right one, and hv % H in the place of hv // (HV // H)."""
    given, H = facts.given, facts.num_key_heads
    heads = torch.arange(given.g.shape[1])
    group = len(heads) // H
    mappings = {"key head hv % H in place of hv // (HV // H)": heads % H * group}
    for shift in range(1, min(H, _MOST_SHIFTS)):
        mappings[f"key head h + {shift}, modulo {H}, in place of h"] = (heads + shift * group) % len(heads)
    for what, heads_of in mappings.items():
        yield Variant(what, given._replace(q=given.q[:, heads_of], k=given.k[:, heads_of]))


def _of_wrong_query_heads(facts: Facts) -> Iterator[Variant]:
    for variant in _of_wrong_key_heads(facts):
        assert variant.given is not None
        yield variant._replace(given=variant.given._replace(k=facts.given.k))


def _outputs_of_other_heads(facts: Facts) -> Iterator[Variant]:
    heads = facts.truth.o.shape[1]
    for shift in range(1, min(heads, _MOST_SHIFTS)):
        o = facts.truth.o.roll(-shift, dims=1)
        yield Variant(
            f"of head h + {shift}, modulo {heads}, in place of h", results=Results(o, facts.truth[1])
        )


def _scaled(facts: Facts) -> Iterator[Variant]:
    """o times some factor; those that somebody may have meant are named."""
    (o, state), seen, scale = facts.truth, facts.given.seen_o, facts.given.scale
    if seen is None or not scale:
        return
    named = {"left out": 1.0, "twice": scale * scale, "V ** -0.5": seen.shape[-1] ** -0.5}
    for what, meant in named.items():
        if (meant / scale * o).isfinite().all():
            yield Variant(what, results=Results(meant / scale * o, state))
    size = o.square().sum()
    if size:
        factor = ((seen.nan_to_num() * o).sum() / size).item()
        if math.isfinite(factor):
            yield Variant(f"{factor:.4g} times the right one", results=Results(factor * o, state))


def _run_chunks_apart(given: Given, *, from_initial_state: bool) -> Results:
    """Each chunk as a sequence of its own."""
    bounds, owners, last = [0], [], {}
    for n, (start, end) in enumerate(pairwise(given.bounds)):
        for first in range(start, end, CHUNK_SIZE):
            last[n] = len(owners)
            owners.append(n)
            bounds.append(min(first + CHUNK_SIZE, end))
    states = given.initial_state[owners]
    states = states if from_initial_state else torch.zeros_like(states)
    o, states = Steps(given._replace(bounds=bounds, initial_state=states), {}).run()
    final_state = given.initial_state.clone()
    for n, chunk in last.items():
        final_state[n] = states[chunk]
    return Results(o, final_state)


def _state_not_carried(facts: Facts) -> Iterator[Variant]:
    if max(facts.given.lens, default=0) > CHUNK_SIZE:
        for what, which in (("each starts from the initial one", True), ("each starts from 0", False)):
            yield Variant(what, run=partial(_run_chunks_apart, from_initial_state=which))


def _rolled(name: str, by: int, steps: Steps) -> torch.Tensor:
    return steps[name].roll(by, dims=0)


def _neighbouring_h(facts: Facts) -> Iterator[Variant]:
    for by, what in ((1, "of the chunk before"), (-1, "of the chunk after")):
        hooks: Hooks = {"h": partial(_rolled, "h", by)}
        yield Variant(what, hooks=hooks, needs_all_sequences=True)


def _without_own_token(steps: Steps) -> torch.Tensor:
    own = (steps["q"] * steps["k"]).sum(-1, keepdim=True) * steps["v_new"]
    return steps["o"] - steps.given.scale * own


def _compact_ranks(facts: Facts) -> Iterator[Variant]:
    """Chunk indices number the sequences that have tokens, and are taken for positions in all of them.

    The kernels then write for each pair (rank, chunk) the tokens of sequence `rank`; the program of row i
    reads the state h of row i. What nobody wrote is NaN, and so is what is computed from it.
    """
    given, bounds = facts.given, facts.given.bounds
    kept = [n for n, length in enumerate(given.lens) if length]
    if kept == list(range(len(kept))):
        return  # ranks and positions are the same
    table = chunk_indices(bounds, CHUNK_SIZE).tolist()
    written = torch.zeros(bounds[-1], dtype=torch.bool)
    rows: list[tuple[int, int, int]] = []  # a program's row of h, and its tokens
    for i, (n, c) in enumerate(table):
        rank = kept.index(n)
        start = bounds[rank] + c * CHUNK_SIZE
        end = min(start + CHUNK_SIZE, bounds[rank + 1])
        if start < end:
            written[start:end] = True
            rows.append((i, start, end))

    def unwritten(name: str) -> Callable[[Steps], torch.Tensor]:
        def hook(steps: Steps) -> torch.Tensor:
            lost = steps.cut((~written).double()[:, None])[..., None].bool()  # [NT, 1, BT, 1]
            return steps[name].masked_fill(lost, UNWRITTEN)

        return hook

    def read_by_programs(steps: Steps) -> torch.Tensor:
        h = torch.full_like(steps["h"], UNWRITTEN)
        starts = {bounds[n] + c * CHUNK_SIZE: row for row, (n, c) in enumerate(table)}
        for i, start, _ in rows:
            h[starts[start]] = steps["h"][i]
        return h

    hooks = {"w": unwritten("w"), "u": unwritten("u"), "h": read_by_programs, "o": unwritten("o")}
    empty = given.lens.index(0)
    what = f"sequence {empty} is empty, and shifts those behind it"
    yield Variant(what, hooks=hooks, needs_all_sequences=True)


def _of_neighbours(facts: Facts) -> Iterator[Variant]:
    """What belongs to a sequence was written for its neighbour of the same length."""
    lens, bounds = facts.given.lens, facts.given.bounds
    for shift in (1, -1):
        o, state = (x.clone() for x in facts.truth)
        for n, length in enumerate(lens):
            other = (n + shift) % len(lens)
            if other == n or lens[other] != length:
                continue
            o[bounds[n] : bounds[n + 1]] = facts.truth.o[bounds[other] : bounds[other + 1]]
            state[n] = facts.truth.final_state[other]
        what = f"of sequence n {'+' if shift > 0 else '-'} 1 in place of n"
        if len(lens) > 1:
            yield Variant(what, results=Results(o, state))


def _without_decay(given: Given) -> Given:
    return given._replace(g=torch.zeros_like(given.g))


def _eye(x: torch.Tensor) -> torch.Tensor:
    return torch.eye(x.shape[-1], dtype=x.dtype).expand_as(x)


def _w_without_decay(steps: Steps) -> torch.Tensor:
    return steps["Ai"] * steps["beta"][..., None, :] @ steps["k"]


def _not_normalised(which: tuple[bool, bool]) -> Callable[[Facts], Iterator[Variant]]:
    return _inputs(
        lambda x: x._replace(normalize=which) if x.normalize == (True, True) else None,
    )


ARITHMETIC, STATE, METADATA = "arithmetic", "state", "metadata"

MISTAKES: tuple[Mistake, ...] = (
    # The state, which a kernel gets from elsewhere and leaves there.
    Mistake(
        "initial state dropped",
        "chunk_delta_h",
        "initial_state",
        STATE,
        "every sequence started from a state of zeros",
        _inputs(
            lambda x: (
                x._replace(initial_state=torch.zeros_like(x.initial_state)) if x.initial_state.any() else None
            )
        ),
    ),
    Mistake(
        "state layout transposed",
        "chunk_delta_h",
        "initial_state",
        STATE,
        "states were read and written as [V, K], not [K, V]",
        _read_and_written_transposed,
    ),
    Mistake(
        "initial state transposed",
        "chunk_delta_h",
        "initial_state",
        STATE,
        "the initial state were read as [V, K], not [K, V]",
        _inputs(_transposed),
    ),
    Mistake(
        "final state transposed",
        "chunk_delta_h",
        "final_state",
        STATE,
        "the final state were written as [V, K], not [K, V]",
        _results(_written_transposed),
    ),
    Mistake(
        "final state not written",
        "chunk_delta_h",
        "final_state",
        STATE,
        "the final state were not written: it is still the initial one",
        _results(_stale),
    ),
    Mistake(
        "final state zero",
        "chunk_delta_h",
        "final_state",
        STATE,
        "the final state were not written: it is 0",
        _results(_no_state_written),
    ),
    Mistake(
        "final state of this call only",
        "chunk_delta_h",
        "final_state",
        STATE,
        "the final state lacked what came before this call",
        _without_what_came_before,
    ),
    Mistake(
        "last chunk missing in the final state",
        "chunk_delta_h",
        "final_state",
        STATE,
        "the final state were that before the last chunk",
        _hooks(final_state=_before_last_chunk),
    ),
    Mistake(
        "initial state of another sequence",
        "chunk_delta_h",
        "initial_state",
        STATE,
        "sequences started from the states of others",
        _swapped_states,
    ),
    Mistake(
        "final state of another sequence",
        "chunk_delta_h",
        "final_state",
        STATE,
        "final states were those of other sequences",
        _swapped_final_states,
    ),
    Mistake(
        "sequences run together",
        "chunk_delta_h",
        "initial_state",
        STATE,
        "each sequence went on from the state of the one before it",
        _sequences_run_together,
    ),
    Mistake(
        "initial state of another head",
        "chunk_delta_h",
        "initial_state",
        STATE,
        "heads started from the states of others",
        _states_of_other_heads,
    ),
    Mistake(
        "initial state counted twice",
        "chunk_delta_h",
        "initial_state",
        STATE,
        "the initial state were counted twice, from some token on",
        _counted_twice,
    ),
    Mistake(
        "initial state narrowed",
        "chunk_delta_h",
        "initial_state",
        STATE,
        "the initial state were rounded",
        _narrowed("initial_state"),
    ),
    Mistake(
        "final state narrowed",
        "chunk_delta_h",
        "final_state",
        STATE,
        "the final state were rounded",
        _narrowed_final_state,
    ),
    # The gate.
    Mistake(
        "gate ignored",
        "chunk_local_cumsum",
        "g",
        ARITHMETIC,
        "g were 0: nothing decays",
        _inputs(_without_decay),
    ),
    Mistake(
        "gate of another head",
        "chunk_local_cumsum",
        "g",
        ARITHMETIC,
        "g were that of another head",
        _other_heads("g"),
    ),
    Mistake(
        "gate scaled",
        "chunk_local_cumsum",
        "g",
        ARITHMETIC,
        "the decay were another function of g",
        _factors_of_g,
    ),
    Mistake(
        "gate taken for linear",
        "chunk_local_cumsum",
        "g",
        ARITHMETIC,
        "g were not taken for the logarithm of the decay",
        _linear_gates,
    ),
    Mistake(
        "gate of another token",
        "chunk_local_cumsum",
        "g",
        ARITHMETIC,
        "g were that of a neighbouring token",
        _late_gates,
    ),
    Mistake(
        "gate and step size swapped",
        "chunk_local_cumsum",
        "g",
        ARITHMETIC,
        "g and beta were given in each other's place",
        _inputs(lambda x: x._replace(g=x.beta, beta=x.g)),
    ),
    Mistake("gate narrowed", "chunk_local_cumsum", "g", ARITHMETIC, "g were rounded", _narrowed("g")),
    # The step size.
    Mistake(
        "step size ignored",
        "chunk_scaled_dot_kkt",
        "beta",
        ARITHMETIC,
        "beta were 1",
        _inputs(lambda x: x._replace(beta=torch.ones_like(x.beta))),
    ),
    Mistake(
        "step size of another head",
        "chunk_scaled_dot_kkt",
        "beta",
        ARITHMETIC,
        "beta were that of another head",
        _other_heads("beta"),
    ),
    Mistake(
        "step size twice",
        "chunk_scaled_dot_kkt",
        "beta",
        ARITHMETIC,
        "beta were counted twice",
        _inputs(lambda x: x._replace(beta=x.beta.square())),
    ),
    Mistake(
        "sigmoid of the step size",
        "chunk_scaled_dot_kkt",
        "beta",
        ARITHMETIC,
        "the sigmoid were taken of beta, which is one already",
        _inputs(lambda x: x._replace(beta=x.beta.sigmoid())),
    ),
    Mistake(
        "step size narrowed",
        "chunk_scaled_dot_kkt",
        "beta",
        ARITHMETIC,
        "beta were rounded",
        _narrowed("beta"),
    ),
    # Queries and keys.
    Mistake(
        "q and k not normalised",
        "l2norm",
        "q, k",
        ARITHMETIC,
        "q and k were not normalised",
        _not_normalised((False, False)),
    ),
    Mistake(
        "q not normalised",
        "l2norm",
        "q",
        ARITHMETIC,
        "q were not normalised",
        _not_normalised((False, True)),
    ),
    Mistake(
        "k not normalised",
        "l2norm",
        "k",
        ARITHMETIC,
        "k were not normalised",
        _not_normalised((True, False)),
    ),
    Mistake(
        "q and k normalised unasked",
        "l2norm",
        "q, k",
        ARITHMETIC,
        "q and k were normalised, which was not asked for",
        _inputs(lambda x: x._replace(normalize=(True, True)) if x.normalize == (False, False) else None),
    ),
    Mistake(
        "wrong key head",
        "chunk_scaled_dot_kkt",
        "k",
        ARITHMETIC,
        "value heads read q and k of another head",
        _of_wrong_key_heads,
    ),
    Mistake(
        "wrong query head",
        "chunk_fwd_o",
        "q",
        ARITHMETIC,
        "value heads read q of another head",
        _of_wrong_query_heads,
    ),
    # Within a chunk.
    Mistake(
        "inverse left out",
        "solve_tril",
        "Ai",
        ARITHMETIC,
        "the inverse of I + A were I",
        _hooks(Ai=lambda steps: _eye(steps["A"])),
    ),
    Mistake(
        "inverse of first order",
        "solve_tril",
        "Ai",
        ARITHMETIC,
        "the inverse of I + A were I - A",
        _hooks(Ai=lambda steps: _eye(steps["A"]) - steps["A"]),
    ),
    Mistake(
        "decay left out of w",
        "recompute_w_u",
        "w",
        ARITHMETIC,
        "w were without decay",
        _hooks(w=_w_without_decay),
    ),
    Mistake(
        "values not corrected",
        "chunk_delta_h",
        "v_new",
        ARITHMETIC,
        "tokens wrote their values without taking off what the state holds: v_new were u",
        _hooks(v_new=lambda steps: steps["u"]),
    ),
    Mistake(
        "state not carried",
        "chunk_delta_h",
        "h",
        ARITHMETIC,
        "no chunk passed its state on",
        _state_not_carried,
    ),
    # The output.
    Mistake(
        "state of another chunk",
        "chunk_fwd_o",
        "h",
        ARITHMETIC,
        "each chunk read the state of a neighbouring one",
        _neighbouring_h,
    ),
    Mistake(
        "own token left out",
        "chunk_fwd_o",
        "o",
        ARITHMETIC,
        "no token read what it wrote itself",
        _hooks(o=_without_own_token),
    ),
    Mistake(
        "state left out of the output",
        "chunk_fwd_o",
        "o",
        ARITHMETIC,
        "tokens read their own chunk alone, not the state",
        _hooks(o=lambda steps: steps.read(h=torch.zeros_like(steps["h"]))),
    ),
    Mistake(
        "chunk left out of the output",
        "chunk_fwd_o",
        "o",
        ARITHMETIC,
        "tokens read the state alone, not their own chunk",
        _hooks(o=lambda steps: steps.read(v_new=torch.zeros_like(steps["v_new"]))),
    ),
    Mistake(
        "output of another head",
        "chunk_fwd_o",
        "o",
        ARITHMETIC,
        "o were that of another head",
        _outputs_of_other_heads,
    ),
    Mistake("scale wrong", "chunk_fwd_o", "scale", ARITHMETIC, "o had another scale", _scaled),
    # Which tokens belong to whom.
    Mistake(
        "compact ranks",
        "metadata",
        "chunk_indices",
        METADATA,
        "chunk_indices numbered only the sequences that have tokens, and were taken for positions in "
        "cu_seqlens",
        _compact_ranks,
    ),
    Mistake(
        "results of another sequence",
        "metadata",
        "cu_seqlens",
        METADATA,
        "results were those of a neighbouring sequence",
        _of_neighbours,
    ),
    Mistake(
        "last chunks not written",
        "metadata",
        "chunk_indices",
        METADATA,
        "nobody computed the last chunk of a sequence",
        _last_chunks,
    ),
    # What is wrong there can be anything: they come after all that says what.
    Mistake(
        "decay in two factors",
        "chunk_scaled_dot_kkt",
        "A",
        ARITHMETIC,
        "exp(a - b) were computed as exp(a) * exp(-b), of which the second is infinite",
        _decay_in_two_factors,
    ),
    Mistake(
        "tails in the final state",
        "chunk_delta_h",
        "final_state",
        STATE,
        "the final state were computed wrongly where a sequence ends within a chunk",
        _tails_of_states,
    ),
    Mistake(
        "tails",
        "chunk_fwd_o",
        "o",
        ARITHMETIC,
        "the last tokens of a sequence were computed wrongly where they are less than a chunk",
        _tails,
    ),
    Mistake(
        "another gate",
        "chunk_local_cumsum",
        "g",
        ARITHMETIC,
        "g were another one: there are decays that give this output",
        _fitted_gates,
        is_last_resort=True,
    ),
)
