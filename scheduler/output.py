"""What goes out of a scheduler and what comes back: to the model runner, from it, and to the clients.

Names and meanings of the fields are vLLM's (v1/core/sched/output.py, v1/outputs.py, v1/engine/__init__.py,
v0.17.0), so that a model runner written for one can be driven by the other.
"""

import enum
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from .stats import SchedulerStats

if TYPE_CHECKING:
    from .request import LoRARequest, MultiModalFeatureSpec, SamplingParams


@dataclass
class NewRequestData:
    """A request that the model runner does not know (or a session that got new input): all of it."""

    req_id: str
    prompt_token_ids: list[int]
    mm_features: "list[MultiModalFeatureSpec]"
    sampling_params: "SamplingParams"
    block_ids: tuple[list[int], ...]
    num_computed_tokens: int
    lora_request: "LoRARequest | None"


@dataclass
class CachedRequestData:
    """Requests that the model runner knows: only what is new; entry i of each list is of `req_ids[i]`.

    Attributes:
        resumed_req_ids: those whose `new_block_ids` replace the block table instead of extending it.
        all_token_ids: tokens of the requests that were not in the previous step.
        new_block_ids: a list a KV cache group, or None where there is no new block.
        num_computed_tokens: before this step.
        num_output_tokens: with those that are scheduled but not sampled yet.
    """

    req_ids: list[str] = field(default_factory=list)
    resumed_req_ids: set[str] = field(default_factory=set)
    all_token_ids: dict[str, list[int]] = field(default_factory=dict)
    new_block_ids: list[tuple[list[int], ...] | None] = field(default_factory=list)
    num_computed_tokens: list[int] = field(default_factory=list)
    num_output_tokens: list[int] = field(default_factory=list)


@dataclass
class SchedulerOutput:
    """One step: who computes how many tokens, in which blocks.

    Attributes:
        scheduled_spec_decode_tokens: draft tokens among the scheduled, by request; -1 stands for one that
            only the model runner knows (async scheduling) or that the grammar refused.
        scheduled_encoder_inputs: indices into the request's mm_features that the encoder computes.
        num_common_prefix_blocks: a count a KV cache group, of blocks that all requests with blocks share.
        finished_req_ids: requests that finished since the previous step.
        free_encoder_mm_hashes: encoder outputs to be dropped.
        pending_structured_output_tokens: whether the grammar bitmask needs tokens that are still in flight.
        num_invalid_spec_tokens: drafts that the grammar refused, by request; None until drafts were put in.
    """

    scheduled_new_reqs: list[NewRequestData]
    scheduled_cached_reqs: CachedRequestData
    num_scheduled_tokens: dict[str, int]
    total_num_scheduled_tokens: int
    scheduled_spec_decode_tokens: dict[str, list[int]]
    scheduled_encoder_inputs: dict[str, list[int]]
    num_common_prefix_blocks: list[int]
    finished_req_ids: set[str]
    free_encoder_mm_hashes: list[str]
    preempted_req_ids: set[str]
    has_structured_output_requests: bool = False
    pending_structured_output_tokens: bool = False
    num_invalid_spec_tokens: dict[str, int] | None = None
    kv_connector_metadata: Any = None


@dataclass
class GrammarOutput:
    """Requests whose next token the grammar restricts, and the rows of the bitmask in that order."""

    structured_output_request_ids: list[str]
    grammar_bitmask: Any


@dataclass
class DraftTokenIds:
    """Drafts for the next step; entry i of each list belongs together."""

    req_ids: list[str]
    draft_token_ids: list[list[int]]


@dataclass
class KVConnectorOutput:
    """What the workers' connectors report.

    Attributes:
        finished_recving: requests whose asynchronous load ended, well or not.
        finished_sending: finished requests whose blocks are no longer needed.
        invalid_block_ids: blocks that should have been loaded and were not.
    """

    finished_sending: set[str] = field(default_factory=set)
    finished_recving: set[str] = field(default_factory=set)
    invalid_block_ids: set[int] = field(default_factory=set)


@dataclass
class ModelRunnerOutput:
    """Sampled tokens: row `req_id_to_index[id]` is of request id, [] for a prefill that goes on."""

    req_ids: list[str]
    sampled_token_ids: list[list[int]]
    kv_connector_output: KVConnectorOutput | None = None

    @property
    def req_id_to_index(self) -> dict[str, int]:
        return {req_id: i for i, req_id in enumerate(self.req_ids)}


class EngineCoreEventType(enum.IntEnum):
    """What happened to a request."""

    QUEUED = 1
    SCHEDULED = 2
    PREEMPTED = 3


@dataclass(frozen=True)
class EngineCoreEvent:
    """An event of a request, at `timestamp` (s, monotonic)."""

    type: EngineCoreEventType
    timestamp: float


class FinishReason(enum.IntEnum):
    """Why a request finished, as its client is told."""

    STOP = 0
    LENGTH = 1
    ABORT = 2
    ERROR = 3
    REPETITION = 4


@dataclass
class EngineCoreOutput:
    """What a client is told of one request after a step."""

    request_id: str
    new_token_ids: list[int]
    finish_reason: FinishReason | None = None
    stop_reason: int | None = None
    events: list[EngineCoreEvent] | None = None
    kv_transfer_params: dict[str, Any] | None = None
    num_cached_tokens: int = 0
    num_external_computed_tokens: int = 0


@dataclass
class EngineCoreOutputs:
    """What one client is told after a step."""

    outputs: list[EngineCoreOutput] = field(default_factory=list)
    scheduler_stats: SchedulerStats | None = None
    finished_requests: set[str] | None = None
