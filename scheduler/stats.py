"""Statistics of a step, as in vllm/v1/metrics/stats.py and vllm/v1/spec_decode/metrics.py, v0.17.0."""

from dataclasses import dataclass, field


@dataclass
class PrefixCacheStats:
    """Lookups since the last step: `queries` and `hits` in tokens, those of preempted requests apart.

    `reset` says that the cache was emptied.
    """

    reset: bool = False
    requests: int = 0
    queries: int = 0
    hits: int = 0
    preempted_requests: int = 0
    preempted_queries: int = 0
    preempted_hits: int = 0

    def record(self, num_tokens: int, num_hits: int, *, preempted: bool) -> None:
        of_whom = "preempted_" if preempted else ""
        for name, amount in (("requests", 1), ("queries", num_tokens), ("hits", num_hits)):
            setattr(self, of_whom + name, getattr(self, of_whom + name) + amount)


@dataclass
class SpecDecodingStats:
    """Drafts of a step; `num_accepted_tokens_per_pos[i]`: of how many more than i tokens were accepted."""

    num_spec_tokens: int
    num_drafts: int = 0
    num_draft_tokens: int = 0
    num_accepted_tokens: int = 0
    num_accepted_tokens_per_pos: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.num_accepted_tokens_per_pos = [0] * self.num_spec_tokens

    def observe_draft(self, num_draft_tokens: int, num_accepted_tokens: int) -> None:
        self.num_drafts += 1
        self.num_draft_tokens += num_draft_tokens
        self.num_accepted_tokens += num_accepted_tokens
        for position in range(num_accepted_tokens):
            self.num_accepted_tokens_per_pos[position] += 1


@dataclass
class SchedulerStats:
    """State after a step. Usages are parts of 1."""

    num_running_reqs: int
    num_waiting_reqs: int
    kv_cache_usage: float
    encoder_cache_usage: float
    prefix_cache_stats: PrefixCacheStats
    connector_prefix_cache_stats: PrefixCacheStats | None
    spec_decoding_stats: SpecDecodingStats | None
