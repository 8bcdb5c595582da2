"""Bugs put into the Triton kernels on purpose: the check of the stage must find each, and name its result.

A mutant is the source of a kernel with one place changed. Mutants run in the interpreter alone: many of them
read and write where they should not.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from ascend_twin.equivalence_tests.cases import PrefillCase, run_case
from ascend_twin.equivalence_tests.devices import interprets
from ascend_twin.equivalence_tests.interpreter import AddressError
from ascend_twin.equivalence_tests.kernel_stages import (
    STAGES,
    Launcher,
    StageCase,
    check_decays,
    check_stage,
    load_mutant,
)
from ascend_twin.optimized.gdn import chunk_gated_delta_rule
from ascend_twin.optimized.gdn.device import Device
from ascend_twin.optimized.gdn.kernels.block_sizes import SOLVE_TRIL_BLOCK_SIZE
from ascend_twin.reference.errors import InvalidArgumentError

# Tails, an empty sequence, several chunks, grouped heads, K != V, a state, padding of NaN.
CASE = PrefillCase((70, 0, 130), H=2, HV=4, K=16, V=24, padding=5, use_qk_l2norm_in_kernel=True)
STEEP = replace(CASE, gates="forget")
SQUARE = replace(CASE, V=16)
ONE = replace(CASE, seq_lens=(70,), padding=0)
LONG = PrefillCase((SOLVE_TRIL_BLOCK_SIZE + 3,), padding=1)


class Mutant(NamedTuple):
    """A change of one place of a kernel's source.

    `named` is the result that must be found wrong, or "" where an address outside a tensor stops the kernel;
    `file` holds the place, if that is not the kernel's own module.
    """

    title: str
    stage: str
    old: str
    new: str
    named: str
    case: PrefillCase = CASE
    file: str = ""

    def __str__(self) -> str:
        return f"{self.stage}-{self.title.replace(' ', '_')}"


def mutants(stage: str, *changes: tuple[Any, ...]) -> Iterator[Mutant]:
    """Mutants of a stage, of (title, old, new, named), and a dict of what else is not the default."""
    for title, old, new, named, *options in changes:
        yield Mutant(title, stage, old, new, named, **(options[0] if options else {}))


MUTANTS = [
    *mutants(
        "l2norm",
        ("eps ignored", "tl.sum(b_x * b_x, 1) + eps", "tl.sum(b_x * b_x, 1)", "y"),
        ("row behind the end", "(o_i < T - o_t0)", "(o_i <= T - o_t0)", ""),
        ("another head", "i_h * stride_h", "(H - 1 - i_h) * stride_h", "y"),
    ),
    *mutants(
        "chunk_local_cumsum",
        ("exclusive sum", "o_i[:, None] >= o_i", "o_i[:, None] > o_i", "coarse"),
        ("exclusive sum", "o_i[:, None] >= o_i", "o_i[:, None] > o_i", "rest"),
        ("tail written", "(o_i < eos - o_t0)", "(o_i <= eos - o_t0)", "", {"case": ONE}),
        ("tail of g read", "mask=m_g, other=0.0)", "mask=m_g)", "rest"),
        ("first chunk only", "i_c * BT", "i_c * 0", "coarse"),
        ("no clamp", "-128.0, -128.0,", "-128.0, b_g,", "rest", {"case": STEEP, "file": "decay"}),
        ("no rest", "b_g - b_coarse", "b_g * 0.0", "rest", {"file": "decay"}),
        ("rounded away from 0", "tl.ceil", "tl.floor", "coarse", {"file": "decay"}),
    ),
    *mutants(
        "chunk_scaled_dot_kkt",
        ("heads tiled", "i_h = i_hv // (HV // H)", "i_h = i_hv % H", "A"),
        ("no beta", "b_kk * b_beta[:, None]", "b_kk", "A"),
        ("diagonal kept", "o_i[:, None] > o_i", "o_i[:, None] >= o_i", "A"),
        ("beta of columns", "b_beta[:, None]", "b_beta[None, :]", "A"),
        ("masked after exp", "tl.where(m_pair, tl.exp(tl.where(m_pair, b_log, 0.0)), 0.0)",
         "tl.exp(b_log) * m_pair.to(tl.float32)", "A", {"case": STEEP, "file": "decay"}),
        ("upper triangle kept", "tl.where(m_pair, tl.exp(tl.where(m_pair, b_log, 0.0)), 0.0)",
         "tl.exp(tl.where(m_pair, b_log, 0.0))", "A", {"file": "decay"}),
        ("rests not counted", " + (b_rest_i[:, None] - b_rest_j[None, :])", "", "A", {"file": "decay"}),
        ("tail of k read", "mask=m_i[:, None] & (o_k < K)[None, :], other=0.0",
         "mask=(o_k < K)[None, :], other=0.0", ""),
    ),
    *mutants(
        "solve_tril",
        ("half of the merge", "tl.static_range(2)", "tl.static_range(1)", "Ai"),
        ("plus for minus", "b_Ai -= tl.dot", "b_Ai += tl.dot", "Ai"),
        ("last row not solved", "range(1, BS)", "range(1, BS - 1)", "Ai"),
        ("tail not solved", "tl.cdiv(eos - start, BT)", "(eos - start) // BT", "Ai"),
        ("first block only", "i_block.to(tl.int64) * BLOCK", "0", "Ai", {"case": LONG}),
        ("not beyond the first chunk", "start + i_c * BT", "start", "Ai"),
    ),
    *mutants(
        "recompute_w_u",
        ("heads tiled", "i_h = i_hv // (HV // H)", "i_h = i_hv % H", "w"),
        ("no beta", "(b_beta * tl.exp(b_g))", "tl.exp(b_g)", "w"),
        ("no decay", "(b_beta * tl.exp(b_g))", "b_beta", "w"),
        ("no beta", ".to(tl.float32) * b_beta[:, None]", ".to(tl.float32)", "u"),
        ("decay of u", ".to(tl.float32) * b_beta[:, None]",
         ".to(tl.float32) * (b_beta * tl.exp(b_g))[:, None]", "u"),
        ("tail written", "m_i = o_i < ", "m_i = o_i <= ", "w"),
    ),
    *mutants(
        "chunk_delta_h",
        ("heads tiled", "i_h = i_hv // (HV // H)", "i_h = i_hv % H", "final_state"),
        ("no decay of the state", "b_S * tl.exp(b_coarse_last + b_rest_last)", "b_S", "final_state"),
        ("no decay of the state", "b_S * tl.exp(b_coarse_last + b_rest_last)", "b_S", "h"),
        ("no decay of the update", "tl.exp(tl.where(m_i, b_to_end, 0.0))", "1.0", "final_state"),
        ("initial state ignored", "if HAS_INITIAL_STATE:", "if False:", "h"),
        ("initial state transposed", "o_k[:, None] * stride_s_k + o_v[None, :]",
         "o_k[:, None] + o_v[None, :] * stride_s_k", "final_state", {"case": SQUARE}),
        ("states transposed", "o_s = o_k[:, None] * V + o_v[None, :]",
         "o_s = o_k[:, None] + o_v[None, :] * K", "h"),
        ("states transposed", "o_s = o_k[:, None] * V + o_v[None, :]",
         "o_s = o_k[:, None] + o_v[None, :] * K", "final_state", {"case": SQUARE}),
        ("empty sequences left out", "b_S, mask=m_s)", "b_S, mask=m_s & (0 * o_k < eos - bos)[:, None])",
         "final_state"),
        ("next chunk's state", "(i_c0 + i_t)", "(i_c0 + i_t + 1)", ""),
        ("state of the end", "(i_c0 + i_t)", "(i_c0 + 0)", "h"),
        ("state kept in bfloat16", "b_state = b_S.to(",
         "b_S = b_S.to(tl.bfloat16).to(tl.float32)\n        b_state = b_S.to(", "final_state"),
        ("decay to the chunk's end", "tl.minimum(o_t0 + BT, eos) - 1", "o_t0 + BT - 1", ""),
        ("plus for minus", "b_v -= tl.dot", "b_v += tl.dot", "v_new"),
    ),
    *mutants(
        "chunk_fwd_o",
        ("heads tiled", "i_h = i_hv // (HV // H)", "i_h = i_hv % H", "o"),
        ("no scale", "(b_o * scale)", "b_o", "o"),
        ("own token not read", "o_i[:, None] >= o_i", "o_i[:, None] > o_i", "o"),
        ("no decay of the state", " * tl.exp(b_coarse + b_rest)[:, None]", "", "o"),
        ("state of another chunk", "p_h = h + (i_c * HV", "p_h = h + (i_t * HV", "o"),
        ("attention in bfloat16", "b_attention.to(b_v.dtype)", "b_attention.to(tl.bfloat16).to(b_v.dtype)",
         "o"),
        ("tail written", "m_i = o_i < ", "m_i = o_i <= ", "o"),
    ),
    *mutants(
        "fused_intra_chunk",
        ("heads tiled", "i_h = i_hv // (HV // H)", "i_h = i_hv % H", "A"),
        ("heads tiled", "i_h = i_hv // (HV // H)", "i_h = i_hv % H", "Aqk"),
        ("no beta", " * b_beta_i[:, None], 0.0)", ", 0.0)", "A"),
        ("eps ignored", "(b_k.to(tl.float32), eps)", "(b_k.to(tl.float32), 0.0)", "x"),
        ("eps ignored", "(b_q.to(tl.float32), eps)", "(b_q.to(tl.float32), 0.0)", "Aqk"),
        ("keys not normalised", "b_k.to(tl.float32) * b_x_i[:, None]", "b_k.to(tl.float32)", "A"),
        ("decay to the first token", "m_last = o_i == BT - 1", "m_last = o_i == 0", "to_end"),
        ("exclusive sum", "m_equal, m_until = o_i[:, None] == o_i[None, :], o_i[None, :] >=",
         "m_equal, m_until = o_i[:, None] == o_i[None, :], o_i[None, :] >", "G"),
        ("diagonal kept", "o_i[:, None] > o_i[None, :], b_kk", "o_i[:, None] >= o_i[None, :], b_kk", "A"),
        ("tail of g read", "tl.load(p_g, mask=m_i, other=0.0)", "tl.load(p_g, mask=m_i)", "to_end"),
        ("no clamp", "-128.0, -128.0,", "-128.0, b_g,", "A", {"case": STEEP, "file": "decay"}),
    ),
    *mutants(
        "fused_inter_chunk",
        ("heads tiled", "i_h = i_hv // (HV // H)", "i_h = i_hv % H", "final_state"),
        ("heads tiled", "i_h = i_hv // (HV // H)", "i_h = i_hv % H", "o"),
        ("no decay of the state", "b_S * tl.load(p_G_last)", "b_S", "final_state"),
        ("initial state ignored", "if HAS_INITIAL_STATE:", "if False:", "o"),
        ("empty sequences left out", "b_S, mask=m_s)", "b_S, mask=m_s & (0 * o_k < eos - bos)[:, None])",
         "final_state"),
        ("keys not normalised", "if NORMALISE:", "if False:", "final_state"),
        ("no value of its own", "b_o += tl.dot(b_Aqk", "b_o -= tl.dot(b_Aqk", "o"),
        ("no scale", "(b_o * scale)", "b_o", "o"),
        ("no decay of the update", "p_factor + 3 * o_factor", "p_factor + 5 * o_factor", "final_state"),
        ("state kept in bfloat16", "b_state = b_S.to(",
         "b_S = b_S.to(tl.bfloat16).to(tl.float32)\n        b_state = b_S.to(", "final_state"),
        ("last of the chunk", "tl.minimum(o_t0 + BT, eos) - 1", "o_t0 + BT - 1", "final_state"),
    ),
]  # fmt: skip

Load = Callable[[Mutant], Launcher]


@pytest.fixture
def load(device: Device, triton_runs: None, tmp_path: Path) -> Load:
    """Loads the launcher of a mutant."""
    if not interprets(device):
        pytest.skip("mutants read and write outside their tensors: they run in the interpreter alone")

    def load(mutant: Mutant) -> Launcher:
        kernel = STAGES[mutant.stage].kernel
        module = load_mutant(kernel, mutant.old, mutant.new, tmp_path, file=mutant.file or kernel)
        return getattr(module, kernel)

    return load


def failures(mutant: Mutant, load: Load, device: Device) -> list[str]:
    launcher = load(mutant)
    try:
        comparisons = check_stage(mutant.stage, mutant.case, device, launcher=launcher)
    except AddressError as error:
        return [f"{mutant.stage}: {error}"]
    return [str(c) for c in comparisons if not c.passed]


@pytest.mark.parametrize("case", [CASE, STEEP, SQUARE], ids=["typical", "steep", "square"])
@pytest.mark.parametrize("stage", STAGES)
def test_check_stage_passes_the_unmutated_kernel(stage: str, case: PrefillCase, load: Load, device: Device):
    same = Mutant("none", stage, "import torch\n", "import torch\n", "", case)
    assert not failures(same, load, device)


@pytest.mark.parametrize("mutant", MUTANTS, ids=str)
def test_check_stage_catches(mutant: Mutant, load: Load, device: Device):
    failed = failures(mutant, load, device)
    named = f"{mutant.stage}.{mutant.named}: " if mutant.named else f"{mutant.stage}: "
    assert any(line.startswith(named) for line in failed), failed


# Sums of g that are not kept in two parts lose the small decays behind the steep: within the limits of some
# stages, which is why decays have a check of their own.
_PAIR = "(b_coarse_i[:, None] - b_coarse_j[None, :]) + (b_rest_i[:, None] - b_rest_j[None, :])"
_ONE_SUM = "(b_coarse_i + b_rest_i)[:, None] - (b_coarse_j + b_rest_j)[None, :]"
DECAY_MUTANTS = [
    Mutant("one sum", "chunk_scaled_dot_kkt", _PAIR, _ONE_SUM, "", file="decay"),
    Mutant("one sum", "chunk_fwd_o", _PAIR, _ONE_SUM, "", file="decay"),
    Mutant("one sum", "fused_intra_chunk", _PAIR, _ONE_SUM, "", file="decay"),
    Mutant("no clamp", "fused_intra_chunk", "-128.0, -128.0,", "-128.0, b_g,", "", file="decay"),
    Mutant("coarser", "fused_intra_chunk", "b_coarse, b_g - b_coarse", "b_g, b_g - b_g", "", file="decay"),
    Mutant("no rest", "chunk_delta_h", "tl.exp(b_coarse_last + b_rest_last)", "tl.exp(b_coarse_last)", ""),
    Mutant("no rest", "recompute_w_u", "tl.exp(b_g)", "tl.exp(tl.ceil(b_g * 1024.0) / 1024.0)", ""),
]


@pytest.mark.parametrize("mutant", DECAY_MUTANTS, ids=str)
def test_check_decays_catches(mutant: Mutant, load: Load, device: Device):
    launcher = load(mutant)

    def fails(seed: int) -> bool:
        try:
            check_decays(mutant.stage, seed, device, launcher)
        except AssertionError:
            return True
        return False

    assert any(fails(seed) for seed in range(5))


# Tables of other block sizes: each stage that reads one finds tokens that nobody wrote; the op refuses them.
COARSER = 1  # of which block_indices_cumsum is made for blocks of 4096 tokens


def test_check_stage_catches_tables_of_another_block_size(device: Device, triton_runs: None):
    case = StageCase(PrefillCase((300,), HV=64, padding=1))
    wrong = case.metadata(device, num_value_heads=COARSER)
    failed = [str(c) for c in check_stage("chunk_local_cumsum", case, device, metadata=wrong) if not c.passed]
    assert failed
    assert failed[0].startswith("chunk_local_cumsum.coarse: NaN in ")


@pytest.mark.parametrize("num_value_heads", [COARSER, 128])
@pytest.mark.parametrize("implementation", ["staged", "fused"])
def test_op_refuses_tables_of_another_block_size(
    implementation: str, num_value_heads: int, device: Device, triton_runs: None
):
    case = PrefillCase((70,), HV=32)
    wrong = StageCase(case).metadata(device, num_value_heads=num_value_heads)
    with pytest.raises(InvalidArgumentError, match="block sizes of prebuilt_meta"):
        run_case(
            chunk_gated_delta_rule,
            case,
            case.inputs().to(device.torch_device),
            prebuilt_meta=wrong,
            implementation=implementation,
        )


def compact_ranks(table: torch.Tensor) -> torch.Tensor:
    """Upstream's numbering: sequences without tokens do not count."""
    ranks = torch.unique(table[:, 0], return_inverse=True)[1]
    return torch.stack([ranks.to(table), table[:, 1]], dim=1)


def chunks_of_twice_the_length(table: torch.Tensor) -> torch.Tensor:
    return table[table[:, 1] % 2 == 0]


@pytest.mark.parametrize("mutate", [compact_ranks, chunks_of_twice_the_length])
@pytest.mark.parametrize(
    ("stage", "table"),
    [
        ("chunk_local_cumsum", "block_indices_cumsum"),
        ("chunk_scaled_dot_kkt", "chunk_indices_chunk64"),
        ("solve_tril", "chunk_indices_large_block"),
        ("recompute_w_u", "chunk_indices_chunk64"),
        ("chunk_fwd_o", "chunk_indices_chunk64"),
        ("fused_intra_chunk", "chunk_indices_chunk64"),
    ],
)
def test_check_stage_catches_a_wrong_table(
    stage: str, table: str, mutate: Callable[[torch.Tensor], torch.Tensor], device: Device, triton_runs: None
):
    seq_lens, HV = (0, 70, 130), 4
    if stage == "chunk_local_cumsum":
        HV = 64  # its blocks are then chunks
    elif stage == "solve_tril":
        seq_lens, HV = (0, *LONG.seq_lens), 1
    case = StageCase(replace(CASE, seq_lens=seq_lens, H=1, HV=HV))
    right = case.metadata(device)
    wrong = replace(right, **{table: mutate(getattr(right, table))})
    failed = [str(c) for c in check_stage(stage, case, device, metadata=wrong) if not c.passed]
    assert failed
    assert failed[0].startswith(f"{stage}.")
