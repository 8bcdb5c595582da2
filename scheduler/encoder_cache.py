"""Outputs of a vision encoder: which are kept, which may be dropped, and which a step has to compute.

Sizes are in embeddings. An output that no request refers to stays until its room is needed, oldest first.

Source: vllm/v1/core/encoder_cache_manager.py and Scheduler._try_schedule_encoder_inputs
(v1/core/sched/scheduler.py), v0.17.0.
"""

from collections import OrderedDict
from dataclasses import dataclass, field

from ..reference.errors import SchedulerStateError
from .config import SchedulerConfig
from .request import Request


@dataclass
class EncoderInputs:
    """What one request does in a step, as its images allow.

    Attributes:
        num_new_tokens: to compute; 0 when an image it stands before cannot be had.
        compute_budget: embeddings left for others.
        indices: images to compute, into the request's mm_features.
    """

    num_new_tokens: int
    compute_budget: int
    indices: list[int] = field(default_factory=list)


class EncoderCacheManager:
    """Books of the encoder cache; the outputs themselves are with the model runner."""

    def __init__(self, config: SchedulerConfig) -> None:
        self.cache_size = config.encoder_cache_size
        self.num_free_slots = self.cache_size
        self.num_freeable_slots = self.cache_size  # free, or to be had by dropping what nobody refers to
        self.cached: dict[str, set[str]] = {}  # identifier: the requests that refer to it
        self.freeable: OrderedDict[str, int] = OrderedDict()  # identifier: embeddings, oldest first
        self.freed: list[str] = []
        self._tokens_ahead = (
            1 if config.use_eagle else 0
        )  # an eagle head reads the embedding of the next token
        self._may_split_images = not config.disable_chunked_mm_input

    @property
    def usage(self) -> float:
        """The part of the cache that holds outputs, 0 to 1."""
        return (self.cache_size - self.num_free_slots) / self.cache_size if self.cache_size else 0.0

    def plan_inputs(
        self, request: Request, num_computed_tokens: int, num_new_tokens: int, compute_budget: int
    ) -> EncoderInputs:
        """Which images a request needs for its next tokens, and how far it gets with those it can have.

        An image is needed as soon as a token of it is computed, and is encoded as a whole. Where it cannot be
        had (budget, room in the cache), the tokens stop before it. Room is made by dropping outputs, and
        references to outputs that are there are taken at once, whether or not the request then finds blocks.

        Args:
            request: not changed.
            num_computed_tokens, num_new_tokens: the tokens it would compute.
            compute_budget: embeddings that this step may still compute.
        """
        plan = EncoderInputs(num_new_tokens, compute_budget)
        if num_new_tokens == 0:
            return plan
        planned: set[str] = set()
        num_planned_embeds = 0
        for i, feature in enumerate(request.mm_features):
            position = feature.mm_position
            start, end = position.offset, position.offset + position.length
            if start >= num_computed_tokens + plan.num_new_tokens + self._tokens_ahead:
                break
            if end <= num_computed_tokens or feature.identifier in planned:
                continue
            if self._refer(request, i):
                continue
            num_before = start - num_computed_tokens - self._tokens_ahead
            ends_inside = num_computed_tokens < start and num_computed_tokens + plan.num_new_tokens < end
            if not self._may_split_images and ends_inside:
                plan.num_new_tokens = max(0, num_before)
                break
            if not self._make_room(request, i, plan.compute_budget, num_planned_embeds):
                # A prefix hit may end inside the image: then there is nothing to compute before it.
                plan.num_new_tokens = max(0, num_before)
                break
            first = max(0, num_computed_tokens - start)
            last = min(position.length, num_computed_tokens + plan.num_new_tokens - start)
            if position.get_num_embeds_in_range(first, last) == 0:
                continue
            num_embeds = position.get_num_embeds()
            num_planned_embeds += num_embeds
            plan.compute_budget -= num_embeds
            planned.add(feature.identifier)
            plan.indices.append(i)
        return plan

    def allocate(self, request: Request, index: int) -> None:
        """Enter an output that this step computes."""
        feature = request.mm_features[index]
        num_embeds = feature.mm_position.get_num_embeds()
        if num_embeds > min(self.num_free_slots, self.num_freeable_slots):
            raise SchedulerStateError(f"{feature.identifier}: no room for {num_embeds} embeddings")
        self.cached.setdefault(feature.identifier, set()).add(request.request_id)
        self.num_free_slots -= num_embeds
        self.num_freeable_slots -= num_embeds

    def free_used_inputs(self, request: Request) -> None:
        """The request gives up images whose tokens are all computed: the KV cache has them."""
        for i in self._cached_inputs(request):
            position = request.mm_features[i].mm_position
            if position.offset + position.length <= request.num_computed_tokens:
                self._free_input(request, i)

    def free(self, request: Request) -> None:
        """The request gives up all its images."""
        for i in self._cached_inputs(request):
            self._free_input(request, i)

    def get_freed_mm_hashes(self) -> list[str]:
        """Outputs dropped since the last call, which the model runner is to drop too."""
        freed, self.freed = self.freed, []
        return freed

    def reset(self) -> None:
        """Forget everything."""
        self.cached.clear()
        self.freeable.clear()
        self.freed.clear()
        self.num_free_slots = self.num_freeable_slots = self.cache_size

    def _refer(self, request: Request, index: int) -> bool:
        """Refer to an output if it is there."""
        identifier = request.mm_features[index].identifier
        if identifier not in self.cached:
            return False
        if not self.cached[identifier]:
            self.num_freeable_slots -= self.freeable.pop(identifier)
        self.cached[identifier].add(request.request_id)
        return True

    def _make_room(self, request: Request, index: int, compute_budget: int, num_planned_embeds: int) -> bool:
        """Whether an image can be computed and kept beside what is planned; drops outputs to that end."""
        num_embeds = request.mm_features[index].mm_position.get_num_embeds()
        if num_embeds > compute_budget:
            return False
        num_embeds += num_planned_embeds
        if num_embeds > max(self.num_free_slots, self.num_freeable_slots):
            return False
        while num_embeds > self.num_free_slots:
            identifier, num_freed = self.freeable.popitem(last=False)
            del self.cached[identifier]
            self.freed.append(identifier)
            self.num_free_slots += num_freed
        return True

    def _cached_inputs(self, request: Request) -> set[int]:
        return {i for i, f in enumerate(request.mm_features) if f.identifier in self.cached}

    def _free_input(self, request: Request, index: int) -> None:
        feature = request.mm_features[index]
        references = self.cached.get(feature.identifier)
        if not references:
            return
        references.discard(request.request_id)
        if not references:
            self.freeable[feature.identifier] = num_embeds = feature.mm_position.get_num_embeds()
            self.num_freeable_slots += num_embeds
