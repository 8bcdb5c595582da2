"""What a scheduler asks of a remote KV cache."""

from collections.abc import Sequence
from typing import Any, Protocol

from .output import KVConnectorOutput, SchedulerOutput
from .request import Request


class KVConnector(Protocol):
    """The scheduler's half of a KV connector.

    Source: vllm/distributed/kv_transfer/kv_connector/v1/base.py, v0.17.0.
    """

    def get_num_new_matched_tokens(
        self, request: Request, num_computed_tokens: int
    ) -> tuple[int | None, bool]:
        """Tokens behind the `num_computed_tokens` local ones that can be loaded, and whether asynchronously.

        None instead of a number: not known yet, ask again at the next step.
        """
        ...

    def update_state_after_alloc(self, request: Request, blocks: Any, num_external_tokens: int) -> None:
        """The request has blocks now; `blocks.get_block_ids()` are all of them, a list a KV cache group."""
        ...

    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> Any:
        """What the workers' half must know of this step."""
        ...

    def update_connector_output(self, connector_output: KVConnectorOutput) -> None:
        """What the workers' half reported."""
        ...

    def request_finished(
        self, request: Request, block_ids: Sequence[int]
    ) -> tuple[bool, dict[str, Any] | None]:
        """Whether its blocks must be kept until it is in finished_sending, and what its client is told."""
        ...

    def reset_cache(self) -> bool | None:
        """Empty the remote cache; False when that failed."""
        ...
