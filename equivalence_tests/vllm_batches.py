# pyright: reportMissingImports=false
"""Random steps for vLLM's builder of gated delta net metadata, as its own CommonAttentionMetadata.

A step is drawn from a seed. What the chunk metadata of a step must be is stated here once more, in plain
Python, from the rows of the step and not from what vLLM made of them.

vLLM is imported by the functions that make its objects, not before.
"""

import random
from dataclasses import dataclass
from itertools import accumulate
from types import SimpleNamespace
from typing import Any

import torch

MAX_NUM_SEQS = 24
MAX_NUM_TOKENS = 8192
NUM_SPECULATIVE_TOKENS = 3

KINDS = (
    "decode only",
    "prefill only",
    "mixed",
    "one-token first chunk",
    "resumed prefill",
    "resumed prefill of one token",
    "padded rows",
    "empty row inside",
    "spec with prefill",
    "spec with prefill, interleaved",
    "spec only",
    "spec, some without drafts",
    "drafts that were all dropped",
    "dummy",
    "stale padding",
)
"""All kinds of steps; the last is not in 0.32.0."""


@dataclass(frozen=True)
class Row:
    """One request in a step.

    Attributes:
        num_tokens: tokens scheduled; 0 for padding.
        num_computed: tokens computed before.
        num_drafts: draft tokens that it verifies, -1 for none, as vLLM counts them.
        is_prefilling: whether it has not computed its prompt.
    """

    num_tokens: int
    num_computed: int = 0
    num_drafts: int = -1
    is_prefilling: bool = False


@dataclass(frozen=True)
class Step:
    """The rows of a step, in order, and what of it vLLM passes on beside them.

    Attributes:
        is_speculative: whether the engine speculates at all.
        stale: bounds that an earlier step left in the rows behind, which pad a dummy batch.
    """

    rows: tuple[Row, ...]
    is_speculative: bool = False
    stale: tuple[int, ...] = ()
    is_dummy: bool = False

    @property
    def lens(self) -> list[int]:
        return [row.num_tokens for row in self.rows]

    @property
    def num_tokens(self) -> int:
        return sum(self.lens)

    def kinds(self) -> set[str]:
        """Which of `KINDS` this step is."""
        lens = self.lens
        spec = [row for row in self.rows if row.num_drafts >= 0]
        prefills = [row for row in self.rows if row.is_prefilling]
        decodes = [row for row in self.rows if row.num_tokens and row not in spec and row not in prefills]
        used = [n for n, row in enumerate(self.rows) if row.num_tokens]
        is_spec = [row.num_drafts >= 0 for row in self.rows if row.num_tokens]
        dropped = bool(spec) and all(row.num_drafts == 0 for row in spec)
        return {
            kind
            for kind, applies in {
                "decode only": decodes and not spec and not prefills and not self.is_dummy,
                "prefill only": prefills and not decodes and not spec,
                "mixed": prefills and decodes and not spec,
                "one-token first chunk": any(r.num_tokens == 1 and not r.num_computed for r in prefills),
                "resumed prefill": any(r.num_computed for r in prefills),
                "resumed prefill of one token": any(r.num_tokens == 1 and r.num_computed for r in prefills),
                "padded rows": lens[-1:] == [0] or self.stale,
                "empty row inside": used and 0 in lens[: used[-1]],
                "spec with prefill": spec and prefills and not dropped,
                "spec with prefill, interleaved": prefills and is_spec != sorted(is_spec, reverse=True),
                "spec only": spec and not prefills and not dropped,
                "spec, some without drafts": not dropped and any(r.num_drafts == 0 for r in spec),
                "drafts that were all dropped": dropped,
                "dummy": self.is_dummy,
                "stale padding": self.stale,
            }.items()
            if applies
        }


def draw_step(seed: int, version: str) -> Step:
    """A step that vLLM's builder of this version can be given.

    0.17.0 refuses plain decodes beside sequences that verify drafts; 0.32.0 does not make them so.
    """
    rng = random.Random(seed)
    shape = rng.choice(("plain", "plain", "spec", "spec", "dummy"))
    if shape == "dummy":
        return _dummy(rng, has_stale_rows=version == "0.17.0")
    padding = [Row(0)] * rng.choice((0, 0, 1, 3))
    if shape == "plain":
        decodes = [Row(1, rng.randint(1, 500)) for _ in range(rng.choice((0, 0, 1, 5)))]
        prefills = [_prefill(rng, smallest=1) for _ in range(rng.choice((0, 1, 2, 6)))]
        rows = [*decodes, *prefills] or [Row(1, 7)]
        if rng.random() < 0.2:
            rows.insert(rng.randrange(len(rows) + 1), Row(0))
            rows.append(_prefill(rng, smallest=2))
        return Step((*rows, *padding), rng.random() < 0.3)
    is_dropped = rng.random() < 0.2
    fewest_drafts = [0 if is_dropped else 1, *[0] * rng.choice((0, 1, 4))]
    specs = [_verification(rng, fewest, is_dropped) for fewest in fewest_drafts]
    smallest = 2 if version == "0.17.0" else 1
    prefills = [_prefill(rng, smallest) for _ in range(rng.choice((0, 1, 2, 4)))]
    rows = [*specs, *prefills]
    if prefills and not is_dropped and rng.random() < 0.4:
        rng.shuffle(rows)
    if is_dropped and version == "0.17.0" and prefills:
        padding = []  # its split into decodes and prefills wants one-token rows first
    return Step((*rows, *padding), True)


def _dummy(rng: random.Random, has_stale_rows: bool) -> Step:
    """What vLLM runs where there is nothing to do, or to warm up: rows of equal length, nothing computed.

    0.17.0 leaves in the padding behind them what an earlier step wrote there.
    """
    num_tokens, num_rows = rng.choice((1, 1 + NUM_SPECULATIVE_TOKENS, 64, 130)), rng.randint(1, 6)
    padding, stale = rng.choice((0, 0, 1, 4)), ()
    if padding and has_stale_rows:
        padding, stale = 0, (num_tokens * num_rows + rng.randint(1, 5000),) * padding
    rows = (*[Row(num_tokens)] * num_rows, *[Row(0)] * padding)
    return Step(rows, rng.random() < 0.5, stale, is_dummy=True)


def _prefill(rng: random.Random, smallest: int) -> Row:
    around = [n + d for n in (64, 128, 1216) for d in (-1, 0, 1)]
    num_tokens = max(smallest, rng.choice((1, 2, rng.randint(2, 400), rng.choice(around))))
    return Row(num_tokens, rng.choice((0, 0, 1, 64, 300)), is_prefilling=True)


def _verification(rng: random.Random, fewest_drafts: int, is_dropped: bool) -> Row:
    num_drafts = 0 if is_dropped else rng.randint(fewest_drafts, NUM_SPECULATIVE_TOKENS)
    return Row(1 + num_drafts, rng.randint(1, 500), num_drafts)


@dataclass(frozen=True)
class Expected:
    """What the chunk metadata of a step describe: bounds of the sequences that enter, and leading decodes."""

    bounds: list[int]
    num_decodes: int


def expected(step: Step, version: str) -> Expected | None:
    """The chunk metadata that a step needs; None without prefill.

    Sequences that verify drafts take another path. 0.17.0 runs leading decodes through the chunked path,
    0.32.0 takes them out, and counts a first chunk of one token as a prefill.
    """
    padding = [Row(0)] * len(step.stale)
    rows = [*step.rows, *padding]
    verifies = [step.is_speculative and row.num_drafts >= 0 for row in rows]
    if version == "0.17.0" and all(row.num_drafts <= 0 for row in rows):
        verifies = [False] * len(rows)
    if any(verifies):
        rows = [row for row, is_spec in zip(rows, verifies, strict=True) if not is_spec]
        enough = 2 if version == "0.17.0" else 1
        if not any(row.num_tokens >= enough for row in rows):
            return None
        return Expected(_bounds(rows), 0)
    is_first_chunk = [row.is_prefilling and not row.num_computed for row in rows]
    if version == "0.17.0":
        is_first_chunk = [False] * len(rows)
    starts = [n for n, row in enumerate(rows) if row.num_tokens > 1 or (row.num_tokens and is_first_chunk[n])]
    if not starts:
        return None
    num_decodes = starts[0]
    if version == "0.17.0":
        return Expected(_bounds(rows), num_decodes)
    return Expected(_bounds(rows[num_decodes:]), 0)


def _bounds(rows: list[Row]) -> list[int]:
    return [0, *accumulate(row.num_tokens for row in rows)]


# vLLM's objects


def vllm_config(
    *,
    is_speculative: bool = False,
    num_value_heads: int | None = 32,
    tensor_parallel_size: int = 1,
    max_num_seqs: int = MAX_NUM_SEQS,
    max_num_batched_tokens: int = MAX_NUM_TOKENS,
    additional_config: dict[str, Any] | None = None,
) -> Any:
    """The attributes of VllmConfig that the builder reads, in 0.17.0 or 0.32.0."""
    heads = {} if num_value_heads is None else {"linear_num_value_heads": num_value_heads}
    speculative = SimpleNamespace(
        num_speculative_tokens=NUM_SPECULATIVE_TOKENS, parallel_drafting=False, uses_draft_model=lambda: False
    )
    return SimpleNamespace(
        additional_config=additional_config or {},
        cache_config=SimpleNamespace(mamba_cache_mode="none"),
        compilation_config=SimpleNamespace(
            cudagraph_mode=SimpleNamespace(has_full_cudagraphs=lambda: False),
            max_cudagraph_capture_size=None,
        ),
        model_config=SimpleNamespace(
            dtype=torch.bfloat16,
            hf_text_config=SimpleNamespace(linear_key_head_dim=128, linear_value_head_dim=128, **heads),
        ),
        parallel_config=SimpleNamespace(
            decode_context_parallel_size=1, tensor_parallel_size=tensor_parallel_size
        ),
        scheduler_config=SimpleNamespace(
            max_num_batched_tokens=max_num_batched_tokens, max_num_seqs=max_num_seqs
        ),
        speculative_config=speculative if is_speculative else None,
        use_v2_model_runner=False,
    )


def make_builder(builder_class: Any, config: Any) -> Any:
    """A builder of vLLM's, on the CPU."""
    from vllm.v1.kv_cache_interface import MambaSpec

    spec = MambaSpec(
        block_size=1024,
        shapes=((3, 8), (2, 4, 4)),
        dtypes=(torch.bfloat16, torch.float32),
        num_speculative_blocks=NUM_SPECULATIVE_TOKENS if config.speculative_config else 0,
    )
    return builder_class(spec, ["layer"], config, torch.device("cpu"))


def common_attn_metadata(step: Step, version: str) -> Any:
    """The step as vLLM's model runner describes it to all builders."""
    from vllm.v1.attention.backend import CommonAttentionMetadata

    rows = [*step.rows, *[Row(0)] * len(step.stale)]
    bounds = torch.tensor([0, *accumulate(step.lens), *step.stale], dtype=torch.int32)
    seq_lens = torch.tensor([row.num_computed + row.num_tokens for row in rows], dtype=torch.int32)
    width = 1 + NUM_SPECULATIVE_TOKENS * step.is_speculative
    newer: dict[str, Any] = {}
    if version != "0.17.0":
        newer["seq_lens_cpu_upper_bound"] = seq_lens.clone()
        if not step.is_dummy:
            newer["is_prefilling"] = torch.tensor([row.is_prefilling for row in rows])
    return CommonAttentionMetadata(
        query_start_loc=bounds.clone(),
        query_start_loc_cpu=bounds,
        seq_lens=seq_lens,
        num_reqs=len(rows),
        num_actual_tokens=step.num_tokens,
        max_query_len=max(step.lens),
        max_seq_len=int(seq_lens.max()),
        block_table_tensor=torch.arange(len(rows) * width, dtype=torch.int32).reshape(len(rows), width),
        slot_mapping=torch.arange(step.num_tokens),
        **newer,
    )


def build(builder: Any, step: Step, version: str) -> Any:
    """What the builder makes of a step, called as vLLM's model runner calls it."""
    arguments: dict[str, Any] = {}
    if step.is_speculative:
        num_drafts = [row.num_drafts for row in step.rows] + [-1] * len(step.stale)
        arguments["num_decode_draft_tokens_cpu"] = torch.tensor(num_drafts, dtype=torch.int32)
        arguments["num_accepted_tokens"] = torch.ones(len(num_drafts), dtype=torch.int32)
    return builder.build(
        common_prefix_len=0, common_attn_metadata=common_attn_metadata(step, version), **arguments
    )
