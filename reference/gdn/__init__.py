"""Gated delta rule prefill and decode in plain PyTorch: what the optimized path must compute."""

from .chunked import chunk_gated_delta_rule
from .context_parallel import Contribution, combine, fold_ranks, rank_contribution
from .gating import fused_gdn_gating
from .recurrent import recurrent_gated_delta_rule, recurrent_gated_delta_rule_decode

__all__ = [
    "Contribution",
    "chunk_gated_delta_rule",
    "combine",
    "fold_ranks",
    "fused_gdn_gating",
    "rank_contribution",
    "recurrent_gated_delta_rule",
    "recurrent_gated_delta_rule_decode",
]
