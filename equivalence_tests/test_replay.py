"""Replaying recorded calls: what is right passes, and each known mistake, put in, is named with its place."""

import dataclasses
import importlib
import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch

from ascend_twin.equivalence_tests import replay_gdn as module
from ascend_twin.equivalence_tests.cases import PrefillCase, expected_metadata
from ascend_twin.equivalence_tests.minimize_fixture import minimize_fixture
from ascend_twin.equivalence_tests.mistakes import MISTAKES
from ascend_twin.equivalence_tests.online_check import differences
from ascend_twin.equivalence_tests.recorded_call import RecordedCall
from ascend_twin.equivalence_tests.replay import RECORDED, Replay, replay_fixture
from ascend_twin.equivalence_tests.replay_gdn import (
    call_block_sizes,
    compact_metadata,
    compare_metadata,
    judge,
    run_again,
)
from ascend_twin.fixtures.store import Fixture
from ascend_twin.optimized.gdn import IMPLEMENTATIONS, open_device
from ascend_twin.optimized.gdn.chunked import Implementation
from ascend_twin.optimized.gdn.eager import eager_chunk_gated_delta_rule
from ascend_twin.reference.errors import InvalidArgumentError, UnavailableError
from ascend_twin.reference.gdn import chunk_gated_delta_rule, stages

CASE = PrefillCase((70, 65), seed=5, H=2, HV=4, use_qk_l2norm_in_kernel=True)
Results = tuple[torch.Tensor, torch.Tensor]


class Call:
    """A call whose results can be computed wrongly, token by token, apart from all that explains them."""

    def __init__(self, case: PrefillCase = CASE) -> None:
        self.case, self.inputs = case, case.inputs()
        self.recorded: dict[str, torch.Tensor] = {}  # in place of the inputs
        q, k, v, g, beta, state, _ = self.inputs
        R = case.HV // case.H
        q, k, v, g, beta = (x[0].double() for x in (q, k, v, g, beta))
        if case.use_qk_l2norm_in_kernel:
            self.raw_q, self.raw_k = (x.repeat_interleave(R, 1) for x in (q, k))
            q, k = stages.l2norm(q), stages.l2norm(k)
        self.q, self.k = (x.repeat_interleave(R, 1) for x in (q, k))
        self.v, self.g, self.beta, self.bounds = v, g, beta, case.bounds
        assert state is not None
        self.state = state.double()

    def run(self, decay: torch.Tensor | None = None, **changed: Any) -> Results:
        """The definition, with other tensors in place of those of the call."""
        x = {name: changed.get(name, getattr(self, name)) for name in ("q", "k", "v", "beta", "state")}
        if decay is None:
            decay = changed.get("g", self.g).exp()
        assert decay is not None
        bounds = changed.get("bounds", self.bounds)
        o, states = torch.zeros_like(self.v), x["state"].clone()
        for n, (start, end) in enumerate(pairwise(bounds)):
            S = states[n]
            for t in range(start, end):
                S.mul_(decay[t, :, None, None])
                delta = x["beta"][t, :, None] * (x["v"][t] - torch.einsum("hk,hkv->hv", x["k"][t], S))
                S += x["k"][t][..., None] * delta[:, None]
                o[t] = self.case.K**-0.5 * torch.einsum("hk,hkv->hv", x["q"][t], S)
        return o[None], states

    def fixture(self, results: Results, **tensors: torch.Tensor) -> Fixture:
        """The call as it is recorded, with results rounded to the dtype of the call."""
        o, state = results
        return _fixture(
            self.case,
            **{"seen.o": o.to(self.inputs.q.dtype), "seen.final_state": state.float()},
            **self.recorded,
            **tensors,
        )

    def chunked(self, monkeypatch: pytest.MonkeyPatch, stage: str, wrong: Callable[..., Any]) -> Results:
        """The chunked reference with a stage in which something is wrong."""
        original = getattr(stages, stage)
        with monkeypatch.context() as patched:
            patched.setattr(stages, stage, lambda *args, **kwargs: wrong(original, *args, **kwargs))
            o, state = chunk_gated_delta_rule(
                *self.inputs[:5],
                initial_state=self.inputs.initial_state,
                output_final_state=True,
                cu_seqlens=self.inputs.cu_seqlens,
                use_qk_l2norm_in_kernel=self.case.use_qk_l2norm_in_kernel,
            )
        assert state is not None
        return o, state


def _fixture(case: PrefillCase, **tensors: torch.Tensor) -> Fixture:
    given = {name: x for name, x in case.inputs()._asdict().items() if x is not None}
    config = {"scale": None, "eps": 1e-6, "use_qk_l2norm_in_kernel": case.use_qk_l2norm_in_kernel}
    return Fixture("gdn", config, {**given, **tensors})


def _explanation(replay: Replay) -> str | None:
    explanation = replay.details.get("explanation")
    return explanation["name"] if explanation else None


def _head_1(right: torch.Tensor, wrong: torch.Tensor, dim: int = 1) -> torch.Tensor:
    """The right tensor, but for head 1."""
    is_head = torch.zeros(right.shape[dim], dtype=torch.bool)
    is_head[1] = True
    return torch.where(is_head.view(-1, *[1] * (right.ndim - dim - 1)), wrong, right)


def _o_then(call: Call, state: torch.Tensor) -> Results:
    return call.run()[0], state


def _late(x: torch.Tensor, bounds: list[int]) -> torch.Tensor:
    x = x.clone()
    for start, end in pairwise(bounds):
        x[start + 1 : end] = x[start : end - 1].clone()
    return x


def _last_chunk_missing(call: Call, _: Any) -> Results:
    """Both sequences end six tokens or one into their second chunk."""
    tokens = [t for start in call.bounds[:-1] for t in range(start, start + 64)]
    short = {name: getattr(call, name)[tokens] for name in ("q", "k", "v", "g", "beta")}
    o, _ = call.run()
    keep = {name: getattr(call, name) for name in short}
    for name, x in short.items():
        setattr(call, name, x)
    _, state = call.run(bounds=[0, 64, 128])
    for name, x in keep.items():
        setattr(call, name, x)
    return o, state


def _run_together(call: Call, _: Any) -> Results:
    state = call.state.clone()
    state[1] = call.run()[1][0]
    return call.run(state=state)


def _counted_twice(call: Call, _: Any) -> Results:
    (o, _), (twice, state) = call.run(), call.run(state=2 * call.state)
    o[:, 3:70], o[:, 75:] = twice[:, 3:70], twice[:, 75:]
    return o, state


def _not_carried(call: Call, _: Any) -> Results:
    zeros = torch.zeros_like(call.state[[0, 0, 1, 1]])
    o, states = call.run(bounds=[0, 64, 70, 134, 135], state=zeros)
    return o, states[[1, 3]]


def _no_w_decay(original: Any, k: Any, v: Any, g: Any, beta: Any, Ai: Any, **kwargs: Any) -> Any:
    w, _ = original(k, v, torch.zeros_like(g), beta, Ai, **kwargs)
    return w, original(k, v, g, beta, Ai, **kwargs)[1]


def _values_not_corrected(original: Any, k: Any, w: Any, u: Any, g: Any, **kwargs: Any) -> Any:
    h, _, state = original(k, w, u, g, **kwargs)
    return h, u, state


def _neighbouring_h(original: Any, q: Any, k: Any, v_new: Any, h: Any, g: Any, **kwargs: Any) -> Any:
    return original(q, k, v_new, h.roll(1, 0), g, **kwargs)


def _without(which: int) -> Callable[..., Any]:
    def wrong(original: Any, *tensors: torch.Tensor, **kwargs: Any) -> Any:
        return original(*(torch.zeros_like(x) if i == which else x for i, x in enumerate(tensors)), **kwargs)

    return wrong


def _eye(A: torch.Tensor) -> torch.Tensor:
    return torch.eye(A.shape[-1], dtype=A.dtype).expand_as(A)


def _in_stage(stage: str, wrong: Callable[..., Any]) -> Callable[[Call, Any], Results]:
    return lambda call, monkeypatch: call.chunked(monkeypatch, stage, wrong)


def _own_token_left_out(call: Call, _: Any) -> Results:
    o, state = call.run()
    S = call.state.clone()
    for n, (start, end) in enumerate(pairwise(call.bounds)):
        for t in range(start, end):
            k, decayed = call.k[t], call.g[t].exp()[:, None, None] * S[n]
            delta = call.beta[t, :, None] * (call.v[t] - torch.einsum("hk,hkv->hv", k, decayed))
            o[0, t] = call.case.K**-0.5 * torch.einsum("hk,hkv->hv", call.q[t], decayed)
            S[n] = decayed + k[..., None] * delta[:, None]
    return o, state


def _unwritten(call: Call, rows: list[int], sequences: list[int]) -> Results:
    o, state = call.run()
    o[:, rows], state[sequences] = float("nan"), float("nan")
    return o, state


def _two_factors(call: Call, _: Any) -> Results:
    o, state = call.run()
    for start, end in ((0, 64), (64, 70), (70, 134), (134, 135)):
        o[0, start:end][call.g[start:end].cumsum(0) < -88.7] = float("nan")
    return o, state


TWINS = Call(dataclasses.replace(CASE, seq_lens=(66, 66)))
WIDE = Call(dataclasses.replace(CASE, use_qk_l2norm_in_kernel=False, seq_lens=(70, 128)))
UNASKED = Call(dataclasses.replace(CASE, use_qk_l2norm_in_kernel=False))
UNASKED.recorded = {name: 1.2 * getattr(UNASKED.inputs, name) for name in ("q", "k")}
SHORT = Call(dataclasses.replace(CASE, seq_lens=(9, 4)))
EMPTY = Call(dataclasses.replace(CASE, seq_lens=(5, 0, 40)))
STEEP = Call(dataclasses.replace(CASE, gates="steep"))

WRONG: dict[str, tuple[Call, Callable[[Call, Any], Results]]] = {}


def _wrong(name: str, make: Callable[[Call, Any], Results], call: Call | None = None) -> None:
    WRONG[name] = (call or Call(), make)


_wrong("initial state dropped", lambda x, _: x.run(state=torch.zeros_like(x.state)))
_wrong("state layout transposed", lambda x, _: (x.run(state=x.state.mT)[0], x.run(state=x.state.mT)[1].mT))
_wrong("initial state transposed", lambda x, _: x.run(state=x.state.mT))
_wrong("final state transposed", lambda x, _: _o_then(x, x.run()[1].mT))
_wrong("final state not written", lambda x, _: _o_then(x, x.state))
_wrong("final state zero", lambda x, _: _o_then(x, torch.zeros_like(x.state)))
_wrong("final state of this call only", lambda x, _: _o_then(x, x.run(state=0 * x.state)[1]), SHORT)
_wrong("last chunk missing in the final state", _last_chunk_missing)
_wrong("initial state of another sequence", lambda x, _: x.run(state=x.state.roll(1, 0)))
_wrong("final state of another sequence", lambda x, _: _o_then(x, x.run()[1].roll(1, 0)))
_wrong("sequences run together", _run_together)
_wrong("initial state of another head", lambda x, _: x.run(state=x.state.roll(1, 1)))
_wrong("initial state counted twice", _counted_twice)
_wrong("initial state narrowed", lambda x, _: x.run(state=x.state.bfloat16().double()))
_wrong("final state narrowed", lambda x, _: _o_then(x, x.run()[1].bfloat16().double()))
_wrong("gate ignored", lambda x, _: x.run(g=torch.zeros_like(x.g)))
_wrong("gate of another head", lambda x, _: x.run(g=_head_1(x.g, x.g[:, :1].expand_as(x.g))))
_wrong("gate scaled", lambda x, _: x.run(g=2 * x.g))
_wrong("gate taken for linear", lambda x, _: x.run(decay=x.g))
_wrong("gate of another token", lambda x, _: x.run(g=_late(x.g, x.bounds)))
_wrong("gate and step size swapped", lambda x, _: x.run(g=x.beta, beta=x.g))
_wrong("gate narrowed", lambda x, _: x.run(g=x.g.bfloat16().double()))
_wrong("step size ignored", lambda x, _: x.run(beta=torch.ones_like(x.beta)))
_wrong("step size of another head", lambda x, _: x.run(beta=x.beta.roll(1, 1)))
_wrong("step size twice", lambda x, _: x.run(beta=x.beta**2))
_wrong("sigmoid of the step size", lambda x, _: x.run(beta=x.beta.sigmoid()))
_wrong("step size narrowed", lambda x, _: x.run(beta=x.beta.half().double()))
_wrong("q and k not normalised", lambda x, _: x.run(q=x.raw_q, k=x.raw_k), SHORT)
_wrong("q and k normalised unasked", lambda x, _: x.run(), UNASKED)
_wrong("q not normalised", lambda x, _: x.run(q=x.raw_q))
_wrong("k not normalised", lambda x, _: x.run(k=x.raw_k), SHORT)
_wrong("wrong key head", lambda x, _: x.run(q=x.q.roll(2, 1), k=x.k.roll(2, 1)))
_wrong("wrong query head", lambda x, _: x.run(q=x.q.roll(2, 1)))
_wrong("inverse left out", _in_stage("solve_tril", lambda f, A, **_: _eye(A)))
_wrong("inverse of first order", _in_stage("solve_tril", lambda f, A, **_: _eye(A) - A))
_wrong("decay left out of w", _in_stage("recompute_w_u", _no_w_decay))
_wrong("values not corrected", _in_stage("chunk_delta_h", _values_not_corrected))
_wrong("state not carried", _not_carried)
_wrong("state of another chunk", _in_stage("chunk_fwd_o", _neighbouring_h))
_wrong("own token left out", _own_token_left_out)
_wrong("state left out of the output", _in_stage("chunk_fwd_o", _without(3)))
_wrong("chunk left out of the output", _in_stage("chunk_fwd_o", _without(2)))
_wrong("output of another head", lambda x, _: (x.run()[0].roll(1, 2), x.run()[1]))
_wrong("scale wrong", lambda x, _: (1.5 * x.run()[0], x.run()[1]))
_wrong("results of another sequence", lambda x, _: (x.run()[0].roll(66, 1), x.run()[1].roll(1, 0)), TWINS)
_wrong(
    "last chunks not written", lambda x, _: _unwritten(x, [*range(64, 70), *range(134, 198)], [0, 1]), WIDE
)
_wrong("compact ranks", lambda x, _: _unwritten(x, [*range(5, 45)], [2]), EMPTY)
_wrong("decay in two factors", _two_factors, STEEP)
_wrong("tails", lambda x, _: _unwritten(x, [*range(64, 70), 134], [0, 1]))
_wrong("tails in the final state", lambda x, _: _unwritten(x, [], [0]), WIDE)
_wrong("another gate", lambda x, _: x.run(g=x.g * torch.linspace(0.2, 0.9, len(x.g))[:, None].double()))


def test_every_mistake_is_put_in() -> None:
    assert sorted(WRONG) == sorted(mistake.name for mistake in MISTAKES)


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: mistake.name)
def test_replay_names_each_mistake_from_the_results_alone(mistake: Any, monkeypatch: Any) -> None:
    call, make = WRONG[mistake.name]
    replay = replay_fixture(call.fixture(make(call, monkeypatch)), path="recorded.safetensors")
    assert _explanation(replay) == mistake.name, replay.diagnosis
    assert (replay.subject, replay.passed, replay.blame) == (RECORDED, False, mistake.blame)
    assert replay.first is not None
    assert replay.first.stage == mistake.stage
    assert mistake.words in replay.diagnosis


def test_replay_explains_what_is_wrong_and_rounded_where_that_makes_errors_larger() -> None:
    """With keys as long as these, every token adds to the errors of those before it."""
    call = Call(dataclasses.replace(CASE, dtype="bfloat16"))
    o, state = chunk_gated_delta_rule(
        *call.inputs[:5],
        initial_state=call.inputs.initial_state,
        output_final_state=True,
        cu_seqlens=call.inputs.cu_seqlens,
        compute_dtype=torch.bfloat16,
    )
    assert state is not None
    assert _explanation(replay_fixture(call.fixture((o, state)))) == "q and k not normalised"


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16"])
@pytest.mark.parametrize("seq_lens", [(), (0, 0), (1,), (70, 0, 65), (128, 3)])
def test_replay_passes_a_right_recording(seq_lens: tuple[int, ...], dtype: str) -> None:
    case = dataclasses.replace(CASE, seq_lens=seq_lens, dtype=dtype)
    call = RecordedCall.of(_fixture(case))
    o, state = chunk_gated_delta_rule(
        *call.inputs[:5],
        initial_state=call.inputs.initial_state,
        output_final_state=True,
        cu_seqlens=call.inputs.cu_seqlens,
        use_qk_l2norm_in_kernel=True,
        compute_dtype=call.dtype,
    )
    assert state is not None
    replay = replay_fixture(call.with_seen(o, state).to_fixture())
    assert replay.passed
    assert (replay.first, replay.blame, replay.diagnosis) == (None, "", "")
    assert [f.name for f in replay.findings] == ["o", "final_state"]
    assert replay.heat is not None
    assert replay.heat.first is None


def test_replay_names_the_one_head_and_the_sequences_that_are_wrong() -> None:
    call = Call()
    gates = call.g.clone()
    gates[70:, 3] = call.g[70:, 0]  # in the second sequence only
    replay = replay_fixture(call.fixture(call.run(g=gates)))
    assert _explanation(replay) == "gate of another head"
    assert replay.details["explanation"]["sequences"] == [1]
    assert replay.details["explanation"]["heads"] == [3]
    assert replay.first is not None
    assert replay.first.place == {"sequence": 1, "head": 3}
    assert replay.heat is not None
    assert replay.heat.first is not None
    chunk, head = replay.heat.first
    assert (replay.heat.chunks[chunk], head) == ((1, 0), 3)
    over = {(c, h) for c, values in enumerate(replay.heat.values) for h, x in enumerate(values) if x > 1}
    assert {h for _, h in over} == {3}


def test_replay_says_where_when_no_mistake_explains_it() -> None:
    call = Call()
    o, state = call.run()
    o[0, 69, 2, 5] += 1
    replay = replay_fixture(call.fixture((o, state)))
    assert _explanation(replay) is None
    first = replay.first
    assert first is not None
    assert (first.stage, replay.blame) == ("o", "arithmetic")
    assert first.place == {"sequence": 0, "chunk": 1, "token": 69, "head": 2}
    right = o[0, 69, 2, 5].item() - 1
    assert (
        f"expected {right:.4g}, got {right + 1:.4g} at sequence 0, chunk 1, token 69, head 2" in first.message
    )
    assert "no known mistake" in replay.diagnosis


def test_replay_does_not_explain_by_memory_that_nobody_wrote_what_was_written() -> None:
    """Compact ranks would leave all of sequence 2 as it was; but its output is right."""
    replay = replay_fixture(EMPTY.fixture(_unwritten(EMPTY, [], [2])))
    assert (_explanation(replay), replay.blame) == (None, "state")
    unwritten = _unwritten(EMPTY, [*range(5, 45)], [2])
    unwritten[0][:, :5] = float("nan")  # and this they would have written
    assert _explanation(replay_fixture(EMPTY.fixture(unwritten))) is None


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_replay_points_at_the_first_value_that_is_no_number(value: float) -> None:
    call = Call()
    o, state = call.run()
    state[1, 2, 3, 4] = value
    replay = replay_fixture(call.fixture((o, state)))
    assert replay.first is not None
    assert replay.first.place == {"sequence": 1, "head": 2, "key_row": 3}
    assert replay.blame == "state"
    assert replay.heat is not None
    assert (replay.heat.name, replay.heat.first) == ("final_state", (1, 2))
    assert replay.heat.values[1][2] == math.inf


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        ("g", 0.1, "<= 0, the logarithm of a decay"),
        ("g", math.nan, "a finite number"),
        ("beta", 1.5, "within [0, 1]"),
        ("k", math.nan, "a finite number"),
        ("v", math.inf, "a finite number"),
    ],
)
def test_replay_blames_inputs_that_no_op_is_made_for(name: str, value: float, allowed: str) -> None:
    call = Call()
    x = getattr(call.inputs, name).clone()
    x[0, 71, 1] = value
    fixture = call.fixture(call.run(), **{name: x})
    for implementation in (None, "eager"):
        replay = replay_fixture(fixture, implementation=implementation)
        assert replay.blame == "inputs"
        assert replay.first is not None
        assert replay.first.place == {"sequence": 1, "chunk": 0, "token": 1, "head": 1}
        assert replay.first.message.endswith(f"allowed: {allowed}")


@pytest.mark.parametrize("name", ["q", "k"])
def test_replay_blames_rows_whose_squares_overflow(name: str) -> None:
    call = Call(dataclasses.replace(CASE, dtype="bfloat16"))
    x = getattr(call.inputs, name).clone()
    x[0, 71, 1, 3] = -(2.0**67)
    o, state = call.run()
    garbage = call.fixture((-o, -state), **{name: x})
    for implementation in (None, "eager"):
        replay = replay_fixture(garbage, implementation=implementation)
        assert replay.blame == "inputs"
        assert replay.first is not None
        assert replay.first.place == {"sequence": 1, "chunk": 0, "token": 1, "head": 1}
        assert f"{name} is -1.476e+20 at sequence 1" in replay.first.message
        assert "its square overflows float32" in replay.first.message
    assert differences(garbage) == f"squares of {name} overflow"


def test_replay_does_not_judge_by_a_reference_that_is_far_off() -> None:
    """o is the difference of two rows of the state that are nearly equal, and lost in bfloat16."""
    call = Call(dataclasses.replace(CASE, dtype="bfloat16", use_qk_l2norm_in_kernel=False))
    q, k, state = torch.zeros_like(call.inputs.q), call.inputs.k.clone(), call.state.float()
    q[..., :2], k[..., :2] = 1, 0
    state[:, :, 1] = -state[:, :, 0] * (1 + 2**-10)
    replay = replay_fixture(call.fixture(call.run(), q=q, k=k, initial_state=state))
    assert replay.blame == "inputs"
    assert [f.name for f in replay.findings] == ["o"]
    assert "o cannot be judged: from these inputs the reference itself, run in bfloat16" in replay.diagnosis


@pytest.mark.parametrize("implementation", ["eager", None])
def test_replay_sees_a_final_state_that_was_narrowed(implementation: str | None) -> None:
    call = Call(dataclasses.replace(CASE, dtype="bfloat16"))
    o, state = call.run()
    for narrow in (True, False):
        fixture = call.fixture((o, state.bfloat16() if narrow else state))
        fixture = dataclasses.replace(fixture, config={**fixture.config, "implementation": implementation})
        replay = replay_fixture(fixture)
        assert replay.passed is not (narrow and implementation == "eager")
        assert ("was the state narrowed?" in replay.findings[-1].message) is narrow


def test_replay_names_no_mistake_for_what_is_just_over_the_limit() -> None:
    call = Call(dataclasses.replace(CASE, dtype="bfloat16"))
    o, state = call.run()
    noise = torch.randn(o.shape, generator=torch.Generator().manual_seed(3), dtype=o.dtype)
    for shift in (0.009, 0.011):  # another scale gives most of it, and leaves the noise
        replay = replay_fixture(call.fixture((o * (1 + shift + 0.006 * noise), state)))
        assert (replay.passed, _explanation(replay)) == (False, None)


def test_replay_blames_tails_only_beside_a_sequence_without_one() -> None:
    wrong = _unwritten(WIDE, [], [0])
    assert _explanation(replay_fixture(WIDE.fixture(wrong))) == "tails in the final state"
    assert _explanation(replay_fixture(WIDE.fixture(_unwritten(WIDE, [], [0, 1])))) is None
    assert _explanation(replay_fixture(Call().fixture(_unwritten(Call(), [], [0, 1])))) is None


@pytest.mark.parametrize("value", [math.inf, -math.inf, 1e200])
def test_replay_names_no_scale_that_is_no_number(value: float) -> None:
    o, state = (call := Call(dataclasses.replace(CASE, dtype="float64"))).run()
    replay = replay_fixture(call.fixture((torch.full_like(o, value), state)))
    assert (replay.passed, _explanation(replay)) == (False, None)
    assert "nan times" not in replay.diagnosis


def test_replay_takes_a_scale_of_0() -> None:
    call = Call()
    o, state = call.run()
    for factor in (0, 1):
        fixture = call.fixture((factor * o, state))
        fixture = dataclasses.replace(fixture, config={**fixture.config, "scale": 0})
        assert replay_fixture(fixture).passed is (factor == 0)
        assert replay_fixture(fixture, implementation="eager").passed


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        ("scale", 1e308, "a number from -3.403e"),
        ("scale", -(10**400), "a number from -3.403e"),
        ("scale", True, "a number from -3.403e"),
        ("scale", [1], "a number from -3.403e"),
        ("eps", 10**400, "a number from 0 to 3.403e"),
        ("eps", None, "a number from 0 to 3.403e"),
        ("eps", math.nan, "a number from 0 to 3.403e"),
        ("use_qk_l2norm_in_kernel", 1, "true or false"),
        ("output_final_state", "x", "true or false"),
        ("implementation", {}, "a name or null"),
    ],
)
def test_replay_refuses_options_that_are_none(name: str, value: object, allowed: str) -> None:
    fixture = _fixture(CASE)
    fixture = dataclasses.replace(fixture, config={**fixture.config, name: value})
    with pytest.raises(InvalidArgumentError, match=f"config {name} is .*; allowed: {allowed}"):
        replay_fixture(fixture)


def test_replay_refuses_what_nobody_sees() -> None:
    for name, allowed in (
        ("seen.z", "seen.o, seen.final_state"),
        ("metadata.z", "metadata.. with one of"),
    ):
        with pytest.raises(InvalidArgumentError, match=f"tensor is {name}; allowed: {allowed}"):
            replay_fixture(_fixture(CASE, **{name: torch.zeros(3)}))


def test_replay_compares_padding_of_our_own_and_not_that_of_others() -> None:
    case = dataclasses.replace(CASE, padding=3)
    call = Call(case)
    o, state = call.run()
    fixture = call.fixture((o, state))
    assert replay_fixture(fixture).passed
    o[0, 136, 2] = 1
    wrong = replay_fixture(call.fixture((o, state)))
    assert wrong.first is not None
    assert (wrong.first.name, wrong.first.place) == ("padding", {"row": 136, "head": 2})
    theirs = call.fixture((o, state))
    theirs = dataclasses.replace(theirs, config={**theirs.config, "implementation": "theirs"})
    assert replay_fixture(theirs).passed


# What stages gave


@pytest.fixture(scope="module", params=["staged", "fused"])
def watched(request: pytest.FixtureRequest) -> RecordedCall:
    """A call with what each kernel gave."""
    request.getfixturevalue("triton_runs")
    case = PrefillCase((66, 0, 3), seed=2, H=1, HV=2, use_qk_l2norm_in_kernel=True, dtype="bfloat16")
    call, differences = run_again(RecordedCall.of(_fixture(case)), open_device("cpu"), request.param)
    assert not differences
    return RecordedCall.of(call.to_fixture())


def test_replay_passes_every_stage_of_a_right_run(watched: RecordedCall) -> None:
    replay = judge(watched)
    assert replay.passed, replay.diagnosis
    compared = {f"{f.stage}.{f.name}" for f in replay.findings}
    assert compared >= {*watched.stages}
    kernels = {name.partition(".")[0] for name in watched.stages}
    last = "chunk_fwd_o.o" if "chunk_fwd_o" in compared or "l2norm" in kernels else "fused_inter_chunk.o"
    assert last in compared


def test_replay_names_the_stage_that_was_wrong_first(watched: RecordedCall) -> None:
    for name, x in watched.stages.items():
        stage, _, result = name.partition(".")
        changed = x.clone()
        row, head = {"h": 1, "final_state": 2}.get(result, 65), x.shape[1] - 1
        changed[row, head] += 1 + changed[row, head].abs().amax()
        replay = judge(dataclasses.replace(watched, stages={**watched.stages, name: changed}))
        first = replay.first
        assert first is not None, name
        assert (first.stage, first.name) == (stage, result)
        place = (2, None) if result == "final_state" else (0, 1)
        assert (first.place["sequence"], first.place.get("chunk"), first.place["head"]) == (*place, head)


def test_replay_blames_memory_only_for_nan_of_finite_inputs_between_redzones(watched: RecordedCall) -> None:
    nan, negative_nan = torch.tensor([0x7FC0, -0x40], dtype=torch.int16).view(torch.bfloat16)
    endless = watched.inputs.g.clone()
    endless[0, 0, 0] = -math.inf

    name, first = next(iter(watched.stages.items()))

    def blamed(*values: torch.Tensor | float, redzones: bool = True, g: torch.Tensor | None = None) -> str:
        x = first.clone()
        for column, value in enumerate(values):
            x[65, 0, column] = value
        inputs = watched.inputs if g is None else watched.inputs._replace(g=g)
        call = dataclasses.replace(watched, inputs=inputs, stages={**watched.stages, name: x})
        return judge(call, redzones=redzones).blame

    assert blamed(nan) == "memory"
    assert blamed(nan, redzones=False) == "arithmetic"
    assert blamed(negative_nan) == "arithmetic"  # an x86-64 CPU computed it
    assert blamed(nan, math.inf) == "arithmetic"
    assert blamed(nan, g=endless) == "arithmetic"
    assert blamed(1e3) == "arithmetic"


def test_replay_refuses_a_stage_that_there_is_not(watched: RecordedCall) -> None:
    fixture = watched.to_fixture()
    for name, x, message in (
        ("stage.l2norm.z", fixture.tensors["q"][0], "stage.l2norm.z; allowed: "),
        ("stage.recompute_w_u.w", torch.zeros(3, 2, 16), "allowed: \\(69, 2, 16\\)"),
    ):
        wrong = dataclasses.replace(fixture, tensors={**fixture.tensors, name: x})
        with pytest.raises(InvalidArgumentError, match=message):
            replay_fixture(wrong)


# Running again


def _install(monkeypatch: pytest.MonkeyPatch, run: Any) -> None:
    monkeypatch.setitem(IMPLEMENTATIONS, "eager", Implementation("eager", "broken for a test", run))


@pytest.mark.parametrize(
    ("implementation", "device"), [("reference", "cpu"), ("eager", "cpu"), ("eager", "sim"), (None, "cpu")]
)
def test_replay_runs_a_call_again(implementation: str | None, device: str) -> None:
    case = dataclasses.replace(CASE, seq_lens=(5, 0, 3), padding=4, dtype="bfloat16")
    replay = replay_fixture(_fixture(case), implementation=implementation, device=device)
    assert replay.subject == f"{implementation or 'eager'} on {device}"
    assert replay.passed, replay.diagnosis
    assert {f.name for f in replay.findings} >= {"o", "final_state"}


def test_replay_names_what_an_implementation_does_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    def forgetful(*args: Any, initial_state: Any, **kwargs: Any) -> Any:
        return eager_chunk_gated_delta_rule(*args, initial_state=None, **kwargs)

    _install(monkeypatch, forgetful)
    for device in ("cpu", "sim"):
        replay = replay_fixture(_fixture(CASE), implementation="eager", device=device)
        assert _explanation(replay) == "initial state dropped"


def test_replay_holds_states_that_nobody_rounds_to_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    def rounding(*args: Any, **kwargs: Any) -> Any:
        o, state = eager_chunk_gated_delta_rule(*args, **kwargs)
        return o, state.bfloat16().float()

    implementation = Implementation("eager", "rounds for a test", rounding, rounds_operands=False)
    monkeypatch.setitem(IMPLEMENTATIONS, "eager", implementation)
    replay = replay_fixture(_fixture(dataclasses.replace(CASE, dtype="bfloat16")), implementation="eager")
    assert _explanation(replay) == "final state narrowed"


def test_replay_sees_what_a_kernel_leaves_unwritten(
    monkeypatch: pytest.MonkeyPatch, triton_runs: None
) -> None:
    triton_paths: Any = importlib.import_module("ascend_twin.optimized.gdn.triton_paths")

    def lazy(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *rest: Any, **kwargs: Any) -> torch.Tensor:
        assert torch.empty(2**22).isnan().all()  # fresh memory, which is else 0
        return torch.empty(v.shape, dtype=v.dtype)

    monkeypatch.setattr(triton_paths, "chunk_fwd_o", lazy)
    replay = replay_fixture(_fixture(PrefillCase((5,), seed=3)), implementation="staged")
    assert replay.first is not None
    assert replay.first.stage == "chunk_fwd_o"
    assert "got nan" in replay.first.message


def test_replay_names_the_kernel_that_is_wrong(monkeypatch: pytest.MonkeyPatch, triton_runs: None) -> None:
    triton_paths: Any = importlib.import_module("ascend_twin.optimized.gdn.triton_paths")
    original = triton_paths.solve_tril

    def wrong(A: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        Ai = original(A, **kwargs)
        Ai[:, 2, 1] *= 2
        return Ai

    case = PrefillCase((5,), seed=3, HV=2)
    for implementation, stage in (("staged", "solve_tril"), ("fused", "fused_solve_tril")):
        assert replay_fixture(_fixture(case), implementation=implementation).passed
        with monkeypatch.context() as patched:
            patched.setattr(triton_paths, "solve_tril", wrong)
            replay = replay_fixture(_fixture(case), implementation=implementation)
        assert replay.first is not None
        assert (replay.first.stage, replay.blame) == (stage, "arithmetic")
        assert replay.first.place == {"sequence": 0, "chunk": 0, "token": 2, "head": 1}


def test_replay_refuses_what_it_cannot_run() -> None:
    with pytest.raises(UnavailableError, match="staged is made of Triton kernels"):
        replay_fixture(_fixture(CASE), implementation="staged", device="sim")
    with pytest.raises(InvalidArgumentError, match="implementation is fast; allowed: reference, eager"):
        replay_fixture(_fixture(CASE), implementation="fast")


# Metadata

BOUNDS = [0, 70, 70, 75, 75, 140]
BLOCKS = (64, 1216, 2048)


def _tables(**changed: torch.Tensor) -> dict[str, torch.Tensor]:
    expected = expected_metadata(BOUNDS, BLOCKS)
    tables = {name: torch.as_tensor(x) for name, x in expected.items() if x is not None}
    return {**tables, **changed}


def _metadata(tensors: dict[str, torch.Tensor] | None = None, **config: Any) -> Fixture:
    given = {"num_decodes": 0, "num_value_heads": 2, "block_sizes": list(BLOCKS), **config}
    return Fixture("metadata", given, {"cu_seqlens": torch.tensor(BOUNDS), **(tensors or {})})


def test_replay_compares_recorded_tables_exactly() -> None:
    tables = {f"metadata.{name}": x for name, x in _tables().items()}
    assert replay_fixture(_metadata(tables)).passed
    for name, x in tables.items():
        wrong = x.clone()
        wrong.view(-1)[-1] = not wrong.view(-1)[-1] if x.dtype == torch.bool else 7
        for changed in (wrong, x[:-1]):
            replay = replay_fixture(_metadata({**tables, name: changed}))
            assert [f"metadata.{f.name}" for f in replay.findings if not f.passed] == [name]
            assert replay.blame == "metadata"


def test_replay_tells_compact_ranks_and_whose_tokens_are_lost() -> None:
    compact = compact_metadata(BOUNDS, BLOCKS)
    findings = compare_metadata(_tables(**compact), BOUNDS, BLOCKS)
    wrong = {f.name: f for f in findings if not f.passed}
    assert set(wrong) == set(compact)
    message = wrong["chunk_indices_chunk64"].message
    assert "chunk_indices_chunk64[2] is [1, 0], expected [2, 0]" in message
    assert "no block holds all tokens of sequence 4" in message
    assert "compact ranks" in message
    assert wrong["chunk_indices_chunk64"].place["sequence"] == 4


def test_replay_builds_metadata_again_without_drafts_and_padding() -> None:
    tensors = {
        "cu_seqlens": torch.tensor([0, 1, 4, 70, 70, 0]),
        "spec_sequence_masks": torch.tensor([False, True, False, False, False]),
    }
    fixture = _metadata(tensors, num_actual_seqs=4, num_decodes=1)
    for device in ("cpu", "sim"):
        replay = replay_fixture(fixture, device=device)
        assert (replay.passed, replay.subject) == (True, f"our builder on {device}")
        assert replay.details["sizes"] == {"sequences": 3, "tokens": 67, "HV": 2}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"num_value_heads": 0}, "config num_value_heads is 0; allowed: an int from 1"),
        ({"num_value_heads": 10**9}, "allowed: an int from 1"),
        ({"num_actual_seqs": 9}, "config num_actual_seqs is 9; allowed: an int from 0 to 5"),
        ({"num_decodes": "two"}, "config num_decodes is 'two'"),
        ({"block_sizes": [64, 0, 64]}, "config block_sizes is .64, 0, 64.; allowed: three ints >= 1"),
    ],
)
def test_replay_refuses_a_config_that_makes_no_sense(config: dict[str, Any], message: str) -> None:
    fixture = _metadata({"metadata.cu_seqlens": torch.tensor(BOUNDS)}, **config)
    with pytest.raises(InvalidArgumentError, match=message):
        replay_fixture(fixture, implementation="eager" if "num_decodes" in config else None)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: x.float(), "has dtype torch.float32, expected torch."),
        (lambda x: x[:0], "has shape (0"),
        (lambda x: x.flatten()[0], "has shape (), expected"),
        (lambda x: x[None], "has shape (1, "),
    ],
)
def test_replay_tells_tables_of_another_kind(
    change: Callable[[torch.Tensor], torch.Tensor], message: str
) -> None:
    for name, x in _tables().items():
        replay = replay_fixture(_metadata({f"metadata.{name}": change(x)}))
        assert replay.first is not None
        assert (replay.first.name, replay.blame) == (name, "metadata")
        assert message in replay.first.message
    findings = compare_metadata({"chunk_indices_chunk64": torch.zeros(2, 2).int()}, [0, 0], BLOCKS)
    assert findings[0].message == "chunk_indices_chunk64[0] is [0, 0], expected nothing"


@pytest.mark.parametrize("implementation", [None, "eager"])
@pytest.mark.parametrize(
    ("name", "x", "message"),
    [
        ("spec_sequence_masks", torch.zeros(0, dtype=torch.bool), "spec_sequence_masks.shape is .0,."),
        ("spec_sequence_masks", torch.tensor(True), "spec_sequence_masks.shape is .."),
        ("spec_sequence_masks", torch.zeros(5), "spec_sequence_masks.dtype is torch.float32"),
        (
            "cu_seqlens",
            torch.tensor([0, 2**40]),
            "cu_seqlens.-1. is 1099511627776; allowed: <= 16,777,216",
        ),
    ],
)
def test_replay_refuses_a_build_that_makes_no_sense(
    name: str, x: torch.Tensor, message: str, implementation: str | None
) -> None:
    fixture = _metadata({"metadata.cu_seqlens": torch.tensor(BOUNDS), name: x})
    with pytest.raises(InvalidArgumentError, match=message):
        replay_fixture(fixture, implementation=implementation)


def test_replay_blames_wrong_metadata_of_a_recorded_call() -> None:
    call = Call(dataclasses.replace(CASE, seq_lens=(70, 0, 65)))
    tables = compact_metadata(call.bounds, call_block_sizes(RecordedCall.of(call.fixture(call.run()))))
    fixture = call.fixture(
        _unwritten(call, [*range(70, 135)], [2]), **{f"metadata.{name}": x for name, x in tables.items()}
    )
    replay = replay_fixture(fixture)
    assert replay.blame == "metadata"
    assert replay.first is not None
    assert replay.first.place["sequence"] == 2
    assert _explanation(replay) == "compact ranks"


def test_replay_sees_metadata_that_our_builder_gets_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        module, "metadata_differences", lambda *args: ["chunk_indices_chunk64 is 1, expected 2"]
    )
    replay = replay_fixture(_fixture(CASE), implementation="eager")
    assert (replay.blame, replay.passed) == ("metadata", False)
    assert [f.stage for f in replay.findings] == ["metadata"]
    replay = replay_fixture(_metadata())
    assert [f.name for f in replay.findings if not f.passed] == ["chunk_indices_chunk64"]


# Making smaller

LONG = PrefillCase((70, 200, 3), seed=5, H=2, HV=4, use_qk_l2norm_in_kernel=True)


@pytest.mark.parametrize(
    ("name", "most_tokens"),
    [("state layout transposed", 1), ("final state transposed", 3), ("gate of another head", 70),
     ("initial state dropped", 1), ("scale wrong", 3), ("last chunk missing in the final state", 135)],
)  # fmt: skip
def test_minimize_keeps_what_was_found(name: str, most_tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    call = Call() if name.startswith("last") else Call(LONG)
    fixture = call.fixture(WRONG[name][1](call, monkeypatch))
    smaller = minimize_fixture(fixture, path="/somewhere/long.safetensors", seconds=20)
    assert smaller.origin["minimized_from"] == "long.safetensors"
    assert smaller.origin["tokens_before"] == call.bounds[-1]
    assert smaller.tensors["q"].shape[1] <= most_tokens
    assert smaller.tensors["q"].shape[2] == 1
    before, after = replay_fixture(fixture), replay_fixture(smaller)
    assert _explanation(after) == _explanation(before) == name
    assert after.first is not None
    assert before.first is not None
    assert after.first.stage == before.first.stage


def test_minimize_cuts_what_is_right_off_the_front() -> None:
    call = Call(dataclasses.replace(LONG, seq_lens=(260,)))
    o, state = call.run()
    o[0, 200, 3] += 1
    smaller = minimize_fixture(call.fixture((o, state)), seconds=20)
    assert smaller.tensors["q"].shape[1] <= 64
    replay = replay_fixture(smaller)
    assert replay.first is not None
    assert (replay.first.stage, replay.first.place["head"]) == ("o", 1)


def test_minimize_makes_a_final_state_only_as_the_explanation_says() -> None:
    call = Call(LONG)
    smaller = minimize_fixture(call.fixture((call.run()[0], call.run()[1].mT)), seconds=20)
    assert smaller.origin["made"] == ["final_state, as it is if: final state transposed"]
    T, (state, right) = smaller.tensors["q"].shape[1], (
        smaller.tensors["seen.final_state"], RecordedCall.of(smaller).truth[1]
    )  # fmt: skip
    assert T <= 3
    assert torch.allclose(state.double(), right.mT, atol=1e-5)


def test_minimize_keeps_metadata_that_are_wrong_wrong() -> None:
    call = Call(dataclasses.replace(CASE, seq_lens=(70, 0, 65, 3)))
    block_sizes = call_block_sizes(RecordedCall.of(call.fixture(call.run())))
    right, wrong = expected_metadata(call.bounds, block_sizes), compact_metadata(call.bounds, block_sizes)
    fixture = call.fixture(
        _unwritten(call, [*range(135, 138)], [3]),
        **{
            "metadata.chunk_indices_chunk64": wrong["chunk_indices_chunk64"],
            "metadata.chunk_offsets_chunk64": torch.as_tensor(right["chunk_offsets_chunk64"]),
        },
    )
    smaller = minimize_fixture(fixture, seconds=20)
    bounds = smaller.tensors["cu_seqlens"].tolist()
    assert 0 < bounds[-1] < 138
    right, wrong = expected_metadata(bounds, block_sizes), compact_metadata(bounds, block_sizes)
    assert torch.equal(smaller.tensors["metadata.chunk_indices_chunk64"], wrong["chunk_indices_chunk64"])
    assert torch.equal(
        smaller.tensors["metadata.chunk_offsets_chunk64"], torch.as_tensor(right["chunk_offsets_chunk64"])
    )
    assert not torch.equal(wrong["chunk_indices_chunk64"], torch.as_tensor(right["chunk_indices_chunk64"]))


def test_minimize_runs_a_smaller_case_again(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(q: Any, k: Any, v: Any, g: torch.Tensor, *rest: Any, **kwargs: Any) -> Any:
        g = g.clone()
        g[..., -1] = 0
        return eager_chunk_gated_delta_rule(q, k, v, g, *rest, **kwargs)

    _install(monkeypatch, wrong)
    smaller = minimize_fixture(_fixture(LONG), implementation="eager", seconds=20)
    assert "seen.o" not in smaller.tensors
    assert smaller.tensors["q"].shape[1:3] == (1, 1)
    replay = replay_fixture(smaller, implementation="eager")
    assert _explanation(replay) == "gate ignored"


def test_minimize_refuses_what_is_right_or_has_no_parts() -> None:
    call = Call()
    with pytest.raises(InvalidArgumentError, match="this one agrees"):
        minimize_fixture(call.fixture(call.run()))
    with pytest.raises(InvalidArgumentError, match="kind is metadata; allowed: gdn or scheduler"):
        minimize_fixture(_metadata())


def test_parts_of_a_call_are_what_the_whole_computes_there(watched: RecordedCall) -> None:
    """Whatever is cut out of a right recording is a right recording."""
    N, bounds = len(watched.seq_lens), watched.bounds
    o, state = watched.truth
    for part in (
        watched.take([2, 0]),
        watched.take([0], lengths=[40]),
        watched.take([0], lengths=[64]),
        watched.take(V=8),
        watched.after([64, 0, 0]),
        watched.after([0, 0, 3]),
    ):
        has_cut_a_chunk = part.seq_lens == (40,)
        stages_kept = {} if has_cut_a_chunk and "fused_intra_chunk.A" in part.stages else part.stages
        replay = judge(RecordedCall.of(dataclasses.replace(part, stages=stages_kept).to_fixture()))
        assert replay.passed, replay.diagnosis
        assert replay.findings
    assert N == 3
    assert torch.allclose(watched.take([0], lengths=[40]).truth[0], o[:, :40])
    assert torch.allclose(watched.take([2, 0]).truth[1], state[[2, 0]])
    assert torch.allclose(watched.after([64, 0, 0]).truth[0], o[:, 64:], atol=1e-6)
    assert bounds == [0, 66, 66, 69]
