"""Blocks of a paged KV cache: who holds them, which of them can be found again, and which goes next.

A block is free when nobody refers to it. A free block keeps its content and its hash until it is handed out
again, so a new request with the same prefix can still take it; hence free blocks are handed out least
recently used first. Block 0 is the null block: it stands where a table needs an entry and no content.

Source: vllm/v1/core/{block_pool,kv_cache_manager,kv_cache_coordinator,single_type_kv_cache_manager,
kv_cache_utils}.py, v0.17.0.
"""

from array import array
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from hashlib import sha256

from ..reference.errors import SchedulerStateError
from .config import SchedulerConfig
from .request import Request
from .stats import PrefixCacheStats

BlockKey = tuple[bytes, int]  # block hash, KV cache group


class Block:
    """A block of the pool; `key` is set while its content can be found by hash."""

    __slots__ = ("block_id", "key", "ref_cnt")

    def __init__(self, block_id: int) -> None:
        self.block_id = block_id
        self.ref_cnt = 0
        self.key: BlockKey | None = None


class BlockPool:
    """All blocks: the free ones in the order in which they will be handed out, the cached ones by hash."""

    def __init__(self, num_blocks: int) -> None:
        self.blocks = [Block(block_id) for block_id in range(num_blocks)]
        self.null_block = self.blocks[0]
        # Several blocks may hold the same content: tables only grow, so nothing is merged.
        self.cached_blocks: dict[BlockKey, dict[int, Block]] = {}
        self._free = OrderedDict((block.block_id, block) for block in self.blocks[1:])

    @property
    def num_free_blocks(self) -> int:
        return len(self._free)

    @property
    def usage(self) -> float:
        """The part of all blocks but the null block that is held, 0 to 1."""
        usable = len(self.blocks) - 1
        return 1.0 - len(self._free) / usable if usable else 0.0

    def free_block_ids(self) -> list[int]:
        """Free blocks, the next one to be handed out first."""
        return list(self._free)

    def get_cached_block(self, block_hash: bytes, group_id: int) -> Block | None:
        """The oldest cached block of this content, or None."""
        blocks = self.cached_blocks.get((block_hash, group_id))
        return next(iter(blocks.values())) if blocks else None

    def get_new_blocks(self, count: int) -> list[Block]:
        """Hand out the least recently used free blocks; their old content cannot be found any more."""
        if count > len(self._free):
            raise SchedulerStateError(f"{count} blocks asked for, {len(self._free)} are free")
        taken = [self._free.popitem(last=False)[1] for _ in range(count)]
        for block in taken:
            self._forget(block)
            block.ref_cnt = 1
        return taken

    def touch(self, blocks: Iterable[Block]) -> None:
        """Another request refers to these blocks; those that were free no longer are."""
        for block in blocks:
            if block is self.null_block:
                continue
            if block.ref_cnt == 0:
                del self._free[block.block_id]
            block.ref_cnt += 1

    def free_blocks(self, blocks: Iterable[Block]) -> None:
        """A request gives up blocks, the one to be handed out first named first."""
        for block in blocks:
            if block is self.null_block:
                continue
            block.ref_cnt -= 1
            if block.ref_cnt == 0:
                self._free[block.block_id] = block

    def cache_block(self, block: Block, key: BlockKey) -> None:
        """From now on the content of a full block can be found."""
        if block.key is not None:
            raise SchedulerStateError(f"block {block.block_id} is cached already")
        block.key = key
        self.cached_blocks.setdefault(key, {})[block.block_id] = block

    def evict_blocks(self, block_ids: Iterable[int]) -> None:
        """The content of these blocks must not be found any more; who holds them keeps them."""
        for block_id in block_ids:
            self._forget(self.blocks[block_id])

    def reset(self) -> bool:
        """Forget all content; False, and nothing is done, while anybody holds a block."""
        if len(self._free) != len(self.blocks) - 1:
            return False
        self.cached_blocks.clear()
        for block in self.blocks:
            block.key = None
        return True

    def _forget(self, block: Block) -> None:
        if block.key is not None:
            same_content = self.cached_blocks[block.key]
            del same_content[block.block_id]
            if not same_content:
                del self.cached_blocks[block.key]
            block.key = None


def hash_block(parent: bytes, token_ids: Sequence[int], extra_keys: tuple[str, ...]) -> bytes:
    """What identifies a full block: everything up to its end that its content depends on.

    Args:
        parent: hash of the block before it, b"" for the first.
        token_ids: of the block.
        extra_keys: what else the content depends on: adapter, images in it, salt.

    Returns:
        32 bytes.
    """
    return sha256(parent + array("q", token_ids).tobytes() + repr(extra_keys).encode()).digest()


def update_block_hashes(request: Request, block_size: int) -> None:
    """Append hashes of the blocks that have become full to `request.block_hashes`."""
    hashes = request.block_hashes
    start = len(hashes) * block_size
    # Blocks hashed later look at the last image alone: vLLM takes for granted that they hold output tokens.
    mm_index = max(len(request.mm_features) - 1, 0) if start else 0
    while (end := start + block_size) <= request.num_tokens:
        identifiers, mm_index = _images_in_block(request, start, end, mm_index)
        lora = [request.lora_request.lora_name] if request.lora_request else []
        salt = [request.cache_salt] if request.cache_salt and start == 0 else []
        parent = hashes[-1] if hashes else b""
        hashes.append(hash_block(parent, request.all_token_ids[start:end], (*lora, *identifiers, *salt)))
        start = end


def _images_in_block(request: Request, start: int, end: int, mm_index: int) -> tuple[list[str], int]:
    """Identifiers of the images from `mm_index` on in tokens start to end, and where to go on looking."""
    identifiers = []
    for feature in request.mm_features[mm_index:]:
        image_start = feature.mm_position.offset
        image_end = image_start + feature.mm_position.length
        if end <= image_start:
            break
        if start <= image_end:
            identifiers.append(feature.identifier)
            if end < image_end:
                break
        mm_index += 1
    return identifiers, mm_index


class FullAttentionGroup:
    """Tables of the layers that need every token: block i holds a request's tokens from i * block_size on.

    Also the base of groups that need less.
    """

    def __init__(self, group_id: int, block_size: int, pool: BlockPool) -> None:
        self.group_id = group_id
        self.block_size = block_size
        self.pool = pool
        self.req_to_blocks: dict[str, list[Block]] = {}
        self.num_cached_block: dict[str, int] = {}  # leading blocks of a request that are cached

    def num_blocks_to_allocate(
        self,
        request_id: str,
        num_tokens: int,
        num_tokens_main_model: int,
        computed_blocks: Sequence[Block],
        num_computed_tokens: int,
    ) -> int:
        """Free blocks needed for `num_tokens` slots of a request, `computed_blocks` among them if free."""
        num_required = -(-num_tokens // self.block_size)
        num_held = len(self.req_to_blocks.get(request_id, ()))
        if request_id in self.num_cached_block:
            return max(num_required - num_held, 0)
        num_skipped = self.num_skipped_tokens(num_computed_tokens) // self.block_size
        num_new = max(num_required - max(num_skipped, len(computed_blocks) + num_held), 0)
        return num_new + self._num_evictable(computed_blocks[max(num_skipped - num_held, 0) :])

    def add_computed_blocks(
        self,
        request_id: str,
        computed_blocks: Sequence[Block],
        num_local_tokens: int,
        num_external_tokens: int,
    ) -> None:
        """Begin the table of a request: a prefix hit, then new blocks for what is loaded from outside."""
        if request_id in self.num_cached_block:
            return
        num_tokens = num_local_tokens + num_external_tokens
        num_skipped_tokens = self.num_skipped_tokens(num_tokens)
        num_skipped = max(num_skipped_tokens // self.block_size, 0)
        table = self.req_to_blocks.setdefault(request_id, [])
        computed_blocks = computed_blocks[num_skipped:]
        self.pool.touch(computed_blocks)
        table.extend([self.pool.null_block] * num_skipped)
        table.extend(computed_blocks)
        self.num_cached_block[request_id] = len(table)
        if num_external_tokens > 0:
            table.extend(self.pool.get_new_blocks(-(-num_tokens // self.block_size) - len(table)))

    def allocate_new_blocks(
        self, request_id: str, num_tokens: int, num_tokens_main_model: int
    ) -> Sequence[Block]:
        """Grow the table of a request to `num_tokens` slots; returns what was appended."""
        table = self.req_to_blocks.setdefault(request_id, [])
        count = -(-num_tokens // self.block_size) - len(table)
        if count <= 0:
            return ()
        new_blocks = self.pool.get_new_blocks(count)
        table.extend(new_blocks)
        return new_blocks

    def cache_blocks(self, request: Request, num_tokens: int) -> list[Block]:
        """Make the full blocks among the first `num_tokens` tokens findable; returns those that are new."""
        first = self.num_cached_block.get(request.request_id, 0)
        end = num_tokens // self.block_size
        if first >= end:
            return []
        table = self.req_to_blocks[request.request_id]
        if len(request.block_hashes) < end:
            raise SchedulerStateError(f"{request.request_id}: {end} blocks to cache, fewer have a hash")
        cached = []
        for block, block_hash in zip(table[first:end], request.block_hashes[first:end], strict=False):
            if block is not self.pool.null_block:
                self.pool.cache_block(block, (block_hash, self.group_id))
                cached.append(block)
        self.num_cached_block[request.request_id] = end
        return cached

    def free(self, request_id: str) -> None:
        """Give up all blocks of a request, the last first: a shorter prefix is of use to more requests."""
        self.pool.free_blocks(reversed(self.req_to_blocks.pop(request_id, [])))
        self.num_cached_block.pop(request_id, None)

    def remove_skipped_blocks(self, request_id: str, num_computed_tokens: int) -> None:
        """Give up blocks whose content the layers do not need any more; here all is needed."""

    def num_skipped_tokens(self, num_computed_tokens: int) -> int:
        """Leading tokens that the layers do not need any more."""
        return 0

    def num_common_prefix_blocks(self, request_id: str) -> int:
        """Leading blocks that every request with blocks shares."""
        count = 0
        for block in self.req_to_blocks.get(request_id, ()):
            if block.ref_cnt != len(self.req_to_blocks):
                break
            count += 1
        return count

    def new_step_starts(self) -> None:
        """A step begins."""

    def _num_evictable(self, blocks: Iterable[Block]) -> int:
        """Those that are free, and so are lost to everybody else when they are taken."""
        return sum(block.ref_cnt == 0 and block is not self.pool.null_block for block in blocks)


class MambaGroup(FullAttentionGroup):
    """Tables of the layers with a state: only the block with the newest state is needed.

    In mode "align" a table is null blocks, the state, and `num_speculative_blocks` blocks for the states
    after draft tokens, which become the state when the table moves on.
    """

    def __init__(self, group_id: int, config: SchedulerConfig, pool: BlockPool) -> None:
        super().__init__(group_id, config.mamba_block_size, pool)
        self.align = config.mamba_cache_mode == "align"
        self.num_speculative_blocks = config.num_speculative_blocks
        self.cached_this_step: set[BlockKey] = set()
        # Mode "align":
        self._allocated: set[str] = set()
        self._last_state_index: dict[str, int] = {}

    def num_blocks_to_allocate(
        self,
        request_id: str,
        num_tokens: int,
        num_tokens_main_model: int,
        computed_blocks: Sequence[Block],
        num_computed_tokens: int,
    ) -> int:
        """As the base; more than there are when the hit is a state that this very step computes."""
        if computed_blocks and computed_blocks[-1].key in self.cached_this_step:
            return len(self.pool.blocks) + 1
        if not self.align:
            num_tokens += self.block_size * self.num_speculative_blocks
            return super().num_blocks_to_allocate(
                request_id, num_tokens, num_tokens_main_model, computed_blocks, num_computed_tokens
            )
        num_held = len(self.req_to_blocks.get(request_id, ()))
        num_new = self._num_required(num_tokens_main_model) - len(computed_blocks) - num_held
        if num_new > 0:
            num_new = 1 if request_id in self._allocated else 1 + self.num_speculative_blocks
        return num_new + self._num_evictable(computed_blocks)

    def allocate_new_blocks(
        self, request_id: str, num_tokens: int, num_tokens_main_model: int
    ) -> Sequence[Block]:
        """As the base; in mode "align" the table moves on to the block of the last token."""
        if not self.align:
            num_tokens += self.block_size * self.num_speculative_blocks
            return super().allocate_new_blocks(request_id, num_tokens, num_tokens_main_model)
        table = self.req_to_blocks.setdefault(request_id, [])
        num_held, num_required = len(table), self._num_required(num_tokens_main_model)
        if num_required == num_held:
            return ()
        if num_required < num_held:
            raise SchedulerStateError(f"{request_id}: {num_held} mamba blocks held, {num_required} required")
        old = request_id in self._allocated
        if old:
            self._last_state_index[request_id] = num_held - 1 - self.num_speculative_blocks
        elif num_held:  # a prefix hit: its last block is the state
            self._last_state_index[request_id] = num_held - 1
        state_index = num_required - self.num_speculative_blocks - 1
        table.extend([self.pool.null_block] * (state_index - num_held))
        if old:  # blocks of draft states move to the new end
            for i in range(num_held - self.num_speculative_blocks, min(num_held, state_index)):
                table.append(table[i])
                table[i] = self.pool.null_block
        table.extend(self.pool.get_new_blocks(num_required - len(table)))
        self._allocated.add(request_id)
        return table[num_held:]

    def cache_blocks(self, request: Request, num_tokens: int) -> list[Block]:
        cached = super().cache_blocks(request, num_tokens)
        self.cached_this_step.update(block.key for block in cached if block.key)
        return cached

    def free(self, request_id: str) -> None:
        self._allocated.discard(request_id)
        self._last_state_index.pop(request_id, None)
        super().free(request_id)

    def remove_skipped_blocks(self, request_id: str, num_computed_tokens: int) -> None:
        """Give up all states but the newest that is certain: drafts of the last step may yet be rejected."""
        num_computed_tokens = max(0, num_computed_tokens - self.num_speculative_blocks)
        table = self.req_to_blocks.get(request_id, [])
        num_skipped = max(self.num_skipped_tokens(num_computed_tokens), 0) // self.block_size
        for i in reversed(range(min(num_skipped, len(table)))):
            if table[i] is self.pool.null_block:
                break
            self._give_up(table, i)
        last = self._last_state_index.get(request_id)
        if last is not None and last < -(-num_computed_tokens // self.block_size) - 1:
            self._give_up(table, last)

    def num_skipped_tokens(self, num_computed_tokens: int) -> int:
        return num_computed_tokens - 1

    def num_common_prefix_blocks(self, request_id: str) -> int:
        return 0

    def new_step_starts(self) -> None:
        self.cached_this_step.clear()

    def _num_required(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size) + self.num_speculative_blocks

    def _give_up(self, table: list[Block], i: int) -> None:
        self.pool.free_blocks([table[i]])
        table[i] = self.pool.null_block


class KVCacheManager:
    """The tables of all KV cache groups over one pool of blocks."""

    def __init__(self, config: SchedulerConfig) -> None:
        self.block_size = config.block_size
        self.max_model_len = config.max_model_len
        self.enable_caching = config.enable_prefix_caching
        self.use_eagle = config.use_eagle
        self.log_stats = config.log_stats
        self.prefix_cache_stats = PrefixCacheStats()
        self.block_pool = BlockPool(config.num_blocks)
        self.groups = tuple(
            FullAttentionGroup(i, config.block_size, self.block_pool)
            if kind == "full_attention"
            else MambaGroup(i, config, self.block_pool)
            for i, kind in enumerate(config.kv_groups)
        )
        self._full = [i for i, kind in enumerate(config.kv_groups) if kind == "full_attention"]
        self._mamba = [i for i, kind in enumerate(config.kv_groups) if kind == "mamba"]
        self.no_blocks: tuple[list[Block], ...] = tuple([] for _ in self.groups)

    def get_computed_blocks(self, request: Request) -> tuple[tuple[list[Block], ...], int]:
        """The longest cached prefix of a request: blocks by group, and tokens.

        At least one token is left to compute, for its logits are needed. Nothing is changed but statistics.
        """
        if not self.enable_caching or request.skip_reading_prefix_cache:
            return self.no_blocks, 0
        blocks = tuple([] for _ in self.groups)
        num_blocks = (request.num_tokens - 1) // self.block_size
        if self._full:
            num_blocks = self._find_prefix(request.block_hashes[:num_blocks], blocks)
        if self._mamba:
            num_blocks = self._find_state(request.block_hashes[:num_blocks], blocks)
            for i in self._full:
                del blocks[i][num_blocks:]
        num_tokens = num_blocks * self.block_size
        if self.log_stats:
            preempted = request.num_preemptions > 0
            self.prefix_cache_stats.record(request.num_tokens, num_tokens, preempted=preempted)
        return blocks, num_tokens

    def _find_prefix(self, block_hashes: Sequence[bytes], blocks: tuple[list[Block], ...]) -> int:
        """Leading blocks that all full attention groups have; an eagle head recomputes the last one."""
        num_blocks = 0
        for block_hash in block_hashes:
            found = self._find_in_groups(block_hash, self._full)
            if found is None:
                break
            for i, block in zip(self._full, found, strict=True):
                blocks[i].append(block)
            num_blocks += 1
        if self.use_eagle and num_blocks:
            num_blocks -= 1
            for i in self._full:
                blocks[i].pop()
        return num_blocks

    def _find_state(self, block_hashes: Sequence[bytes], blocks: tuple[list[Block], ...]) -> int:
        """The last block of which all mamba groups have cached the state; those before it are not needed."""
        for last in reversed(range(len(block_hashes))):
            found = self._find_in_groups(block_hashes[last], self._mamba)
            if found is not None:
                for i, block in zip(self._mamba, found, strict=True):
                    blocks[i].extend([self.block_pool.null_block] * last)
                    blocks[i].append(block)
                return last + 1
        return 0

    def _find_in_groups(self, block_hash: bytes, group_ids: list[int]) -> list[Block] | None:
        """The cached blocks of a content, one a group; None if any group has none."""
        found = []
        for group_id in group_ids:
            block = self.block_pool.get_cached_block(block_hash, group_id)
            if block is None:
                return None
            found.append(block)
        return found

    def allocate_slots(
        self,
        request: Request,
        num_new_tokens: int,
        *,
        num_new_computed_tokens: int = 0,
        new_computed_blocks: tuple[list[Block], ...] | None = None,
        num_lookahead_tokens: int = 0,
        num_external_computed_tokens: int = 0,
        delay_cache_blocks: bool = False,
    ) -> tuple[list[int], ...] | None:
        """Give a request slots for its next tokens.

        Args:
            request: its `num_computed_tokens` have slots already.
            num_new_tokens: to be computed in this step, drafts included.
            num_new_computed_tokens, new_computed_blocks: a prefix hit.
            num_lookahead_tokens: slots behind them, for a drafter.
            num_external_computed_tokens: loaded from a remote cache.
            delay_cache_blocks: whether blocks must not be found yet, because a load is under way.

        Returns:
            Ids of the blocks appended for new tokens, a list a group; or None, and nothing is allocated, when
            there are too few free blocks.
        """
        request_id = request.request_id
        computed_blocks = new_computed_blocks or self.no_blocks
        num_local = request.num_computed_tokens + num_new_computed_tokens
        num_computed = min(num_local + num_external_computed_tokens, self.max_model_len)
        num_main = num_computed + num_new_tokens
        num_slots = min(num_main + num_lookahead_tokens, self.max_model_len)

        num_needed = 0
        self.remove_skipped_blocks(request_id, num_computed)
        for group, blocks in zip(self.groups, computed_blocks, strict=True):
            num_needed += group.num_blocks_to_allocate(
                request_id, num_slots, num_main, blocks, num_local + num_external_computed_tokens
            )
        if num_needed > self.block_pool.num_free_blocks:
            return None

        if num_external_computed_tokens or any(computed_blocks):
            for group, blocks in zip(self.groups, computed_blocks, strict=True):
                group.add_computed_blocks(request_id, blocks, num_local, num_external_computed_tokens)
        new_block_ids = tuple(
            [block.block_id for block in group.allocate_new_blocks(request_id, num_slots, num_main)]
            for group in self.groups
        )
        if not delay_cache_blocks:
            # Drafts may be rejected: only tokens that are certain are cached.
            self.cache_blocks(request, min(num_main, request.num_tokens))
        return new_block_ids

    def cache_blocks(self, request: Request, num_tokens: int) -> None:
        """Make the full blocks among the first `num_tokens` tokens findable."""
        if self.enable_caching:
            for group in self.groups:
                group.cache_blocks(request, num_tokens)

    def free(self, request: Request) -> None:
        """Give up all blocks of a request."""
        for group in self.groups:
            group.free(request.request_id)

    def remove_skipped_blocks(self, request_id: str, num_computed_tokens: int) -> None:
        """Give up blocks that a request does not need any more."""
        for group in self.groups:
            group.remove_skipped_blocks(request_id, num_computed_tokens)

    def evict_blocks(self, block_ids: Iterable[int]) -> None:
        """The content of these blocks is wrong: nobody may find it."""
        self.block_pool.evict_blocks(block_ids)

    def reset_prefix_cache(self) -> bool:
        """Forget all content; False, and nothing is done, while anybody holds a block."""
        if not self.block_pool.reset():
            return False
        self.prefix_cache_stats.reset = True
        return True

    def get_block_ids(self, request_id: str) -> tuple[list[int], ...]:
        """The block table of a request, a list a group."""
        return tuple([b.block_id for b in group.req_to_blocks.get(request_id, ())] for group in self.groups)

    def get_num_common_prefix_blocks(self, request_id: str) -> list[int]:
        """Leading blocks that every request with blocks shares with this one, a count a group."""
        if not self.enable_caching:
            return [0] * len(self.groups)
        return [group.num_common_prefix_blocks(request_id) for group in self.groups]

    def new_step_starts(self) -> None:
        """A step begins."""
        for group in self.groups:
            group.new_step_starts()

    def take_prefix_cache_stats(self) -> PrefixCacheStats:
        """Statistics since the last call."""
        stats, self.prefix_cache_stats = self.prefix_cache_stats, PrefixCacheStats()
        return stats
