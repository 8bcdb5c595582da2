"""What a scheduler is told once: limits, cache geometry, and which features are on."""

import reprlib
from dataclasses import dataclass, fields

from ..reference.errors import invalid_argument

KV_GROUPS = ("full_attention", "mamba")
CHOICES = {
    "policy": ("fcfs", "priority"),
    "spec_method": ("ngram", "eagle", "draft_model"),
    "mamba_cache_mode": ("none", "all", "align"),
    "kv_load_failure_policy": ("recompute", "fail"),
}
AT_LEAST_ONE = ("num_blocks", "block_size", "max_num_seqs", "max_num_batched_tokens", "max_model_len")


@dataclass(frozen=True)
class SchedulerConfig:
    """Everything in vLLM's configuration that its scheduler reads, in one place.

    Attributes:
        num_blocks: KV cache blocks of the pool, the null block among them.
        block_size: tokens of a block, and of a block hash.
        max_num_seqs: requests that may run at once (`max_num_running_reqs` of the scheduler).
        max_num_batched_tokens: token budget of a step. vLLM gives its scheduler less where a draft model
            needs slots of its own (max_num_scheduled_tokens).
        max_model_len: tokens of a request, prompt and output, at most.
        policy: "fcfs" or "priority" (the smaller number first, then the earlier arrival).
        enable_chunked_prefill: whether a waiting prompt may be cut to the budget; if not, it waits.
        long_prefill_token_threshold: tokens of one request in one step, at most; 0 is no threshold.
        enable_prefix_caching: whether full blocks are found again by their hash.
        num_spec_tokens: draft tokens a step, at most.
        spec_method: who drafts. "eagle" and "draft_model" need lookahead slots; "eagle", which in vLLM
            includes the MTP layers of Qwen3-Next, also drops the last hit block and looks one token ahead for
            images.
        max_loras: adapters in one step, at most; None is LoRA switched off.
        max_num_encoder_input_tokens: encoder embeddings computed in one step, at most.
        encoder_cache_size: encoder embeddings kept, at most.
        disable_chunked_mm_input: whether an image may not be split between steps.
        kv_groups: kind of each KV cache group; Qwen3-Next has full attention and several of mamba.
        mamba_cache_mode: which mamba states are kept for prefix caching. "align" keeps those at block ends,
            and splits prefills there.
        num_speculative_blocks: extra mamba state blocks of a request, for draft tokens.
        kv_load_failure_policy: what happens to a request whose remote KV could not be loaded.
        log_stats: whether statistics and events are made.
        include_finished_set: whether outputs name the requests that finished, by client (data parallel).

    Raises:
        InvalidArgumentError: for a number or a combination that no vLLM would start with.

    Source: vllm/config/ and vllm/v1/core/sched/scheduler.py, v0.17.0.
    """

    num_blocks: int
    block_size: int = 16
    max_num_seqs: int = 256
    max_num_batched_tokens: int = 8192
    max_model_len: int = 8192
    policy: str = "fcfs"
    enable_chunked_prefill: bool = True
    long_prefill_token_threshold: int = 0
    enable_prefix_caching: bool = True
    num_spec_tokens: int = 0
    spec_method: str = "ngram"
    max_loras: int | None = None
    max_num_encoder_input_tokens: int = 0
    encoder_cache_size: int = 0
    disable_chunked_mm_input: bool = False
    kv_groups: tuple[str, ...] = ("full_attention",)
    mamba_cache_mode: str = "none"
    num_speculative_blocks: int = 0
    kv_load_failure_policy: str = "recompute"
    log_stats: bool = True
    include_finished_set: bool = False

    def __post_init__(self) -> None:
        self._check_each()
        self._check_together()

    def _check_each(self) -> None:
        """Every field alone: its type, and its range."""
        for field in fields(self):
            value, kind = getattr(self, field.name), field.type
            if kind == int | None:
                self._check(
                    field.name, value is None or (type(value) is int and value >= 1), "an int >= 1, or None"
                )
            elif kind is int:
                least = 1 if field.name in AT_LEAST_ONE else 0
                self._check(field.name, type(value) is int and value >= least, f"an int >= {least}")
            elif kind is bool:
                self._check(field.name, type(value) is bool, "True or False")
            elif kind is str:
                self._check(field.name, value in CHOICES[field.name], f"one of {CHOICES[field.name]}")
        groups = self.kv_groups
        self._check(
            "kv_groups",
            isinstance(groups, tuple) and bool(groups) and all(kind in KV_GROUPS for kind in groups),
            f"a tuple of at least one, each one of {KV_GROUPS}",
        )

    def _check_together(self) -> None:
        """What goes with what, as in vLLM's own checks (vllm/config/vllm.py, v0.17.0)."""
        if not self.enable_chunked_prefill:
            least = self.max_model_len
            fits = self.max_num_batched_tokens >= least
            self._check("max_num_batched_tokens", fits, f">= max_model_len = {least} for whole prompts")
        if self.need_mamba_block_aligned_split:
            self._check("disable_chunked_mm_input", not self.disable_chunked_mm_input, "False for align")
            self._check_whole_blocks()
        caches_states = "mamba" in self.kv_groups and self.enable_prefix_caching
        allowed = (
            "all or align with prefix caching" if caches_states else "none without mamba or prefix caching"
        )
        self._check("mamba_cache_mode", (self.mamba_cache_mode == "none") != caches_states, allowed)
        if self.enable_prefix_caching and len(self.kv_groups) > 1:
            has_both = set(self.kv_groups) == set(KV_GROUPS)
            self._check("kv_groups", has_both, "both kinds, where there are several")
        self._check("num_blocks", self.num_blocks >= self.min_num_blocks, f">= {self.min_num_blocks}")

    def _check_whole_blocks(self) -> None:
        """With mode align, a step must be able to compute a whole block of a prompt."""
        threshold, of_align = self.long_prefill_token_threshold, "for mamba_cache_mode align"
        least = f">= {self.block_size} = block_size {of_align}"
        self._check("enable_chunked_prefill", self.enable_chunked_prefill, f"True {of_align}")
        self._check("max_num_batched_tokens", self.max_num_batched_tokens >= self.block_size, least)
        self._check("long_prefill_token_threshold", not 0 < threshold < self.block_size, f"0, or {least}")

    def _check(self, name: str, fits: bool, allowed: str) -> None:
        if not fits:
            invalid_argument(name, reprlib.repr(getattr(self, name)), allowed)

    @property
    def use_eagle(self) -> bool:
        """Whether drafts come from an eagle head, which needs the hidden states of the last block."""
        return self.num_spec_tokens > 0 and self.spec_method == "eagle"

    @property
    def num_lookahead_tokens(self) -> int:
        """Slots reserved after the scheduled tokens, for a drafter with a KV cache of its own."""
        return self.num_spec_tokens if self.spec_method in ("eagle", "draft_model") else 0

    @property
    def need_mamba_block_aligned_split(self) -> bool:
        """Whether prefills end at block boundaries, so that mamba states there can be cached."""
        return "mamba" in self.kv_groups and self.mamba_cache_mode == "align"

    @property
    def mamba_block_size(self) -> int:
        """Tokens of a mamba block: without prefix caching a request has one state, whatever its length."""
        return self.max_model_len if self.mamba_cache_mode == "none" else self.block_size

    @property
    def min_num_blocks(self) -> int:
        """Blocks with which one request of max_model_len tokens can run alone, and the null block."""
        full = -(-self.max_model_len // self.block_size)
        mamba = -(-self.max_model_len // self.mamba_block_size)
        if self.mamba_cache_mode == "align":
            mamba = min(mamba, 2)
        mamba += self.num_speculative_blocks
        return 1 + sum(full if kind == "full_attention" else mamba for kind in self.kv_groups)
