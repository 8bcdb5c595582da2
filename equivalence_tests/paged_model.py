"""A deterministic stand-in for the model: what it says depends on every slot of a paged cache that it reads.

The slot of position i holds a running digest of tokens 0 to i (of their embeddings, where an image stands),
continued from the slot of position i - 1 *as read back through the block table*; a token is a function of all
slots before it, read back the same way. So a wrong block, a lost token, a hit on somebody else's prefix or a
resumption that skips its recomputation makes the request say something else than `expected_output`, which
needs no cache at all.

All arithmetic is modulo 2**64. With h(i) the hash of what stands at position i, and q and r odd constants,

    slot(i)  = slot(i - 1) + q**i * h(i)         slot(-1) = salt of the KV cache group
    total(n) = sum over i < n of r**i * slot(i)

A token is the hash of total(n), for a full attention group, and of slot(n - 1), for a mamba group, which
keeps one state instead of all slots. A power of r splits into one of the block and one of the offset, so a
digest is kept of each block, and a decode step reads blocks, not slots.

Beside the cache the module has the rest of what a scheduler talks to: encoder cache, drafter, grammar, and
both halves of a connector to a remote KV cache.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..reference.errors import AscendTwinError, invalid_argument
from ..scheduler.config import SchedulerConfig
from ..scheduler.output import (
    DraftTokenIds,
    EngineCoreOutputs,
    FinishReason,
    GrammarOutput,
    KVConnectorOutput,
    ModelRunnerOutput,
    SchedulerOutput,
)
from ..scheduler.workload import (
    EOS_TOKEN_ID,
    VOCABULARY_SIZE,
    ImageSpec,
    RemoteHit,
    RequestSpec,
    SessionChunk,
    prompt_token_ids,
)

KEEP_BLOCKS = "keep_blocks"  # in kv_transfer_params: the blocks of the finished request are still to be sent

_MASK = 2**64 - 1
_TOKEN_BASE = 0x9E3779B97F4A7C15  # q
_SLOT_BASE = 0xD1342543DE82EF95  # r
_MIX = 0xBF58476D1CE4E5B9


class StandInError(AscendTwinError, RuntimeError):
    """The model was asked for what no model could do; the message names the request."""


class OracleMismatchError(StandInError):
    """A request said something else than it must; the message says where."""


def _hash(*parts: object) -> int:
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "little")


def _uint64(numbers: Iterable[int]) -> np.ndarray:
    return np.array(list(numbers), dtype=np.uint64)


def _powers(base: int, count: int) -> np.ndarray:
    return np.cumprod(np.r_[np.uint64(1), np.full(count - 1, base, np.uint64)])


_TOKEN_HASHES = _uint64(_hash("token", token) for token in range(VOCABULARY_SIZE + 1))


def _token(digest: int, parity: int | None) -> int:
    """The token that a digest stands for; of the given parity, if a grammar asks for one."""
    token = ((digest ^ digest >> 32) * _MIX & _MASK) >> 32
    token %= VOCABULARY_SIZE
    return token if parity is None else token & ~1 | parity


@dataclass(frozen=True, eq=False)
class _Image:
    """An image in a prompt: of placeholder j, whether it takes an embedding, and which one."""

    identifier: str
    offset: int
    takes: np.ndarray  # [length], bool
    ranks: np.ndarray  # [length], int64

    @classmethod
    def make(cls, identifier: str, offset: int, length: int, is_embed: Any) -> "_Image":
        takes = np.ones(length, bool) if is_embed is None else np.asarray(is_embed, bool)
        return cls(identifier, offset, takes, np.cumsum(takes) - 1)

    @classmethod
    def of_features(cls, features: Iterable[Any]) -> "list[_Image]":
        places = [(feature.identifier, feature.mm_position) for feature in features]
        return [cls.make(name, at.offset, at.length, at.is_embed) for name, at in places]

    @classmethod
    def of_specs(cls, images: Iterable[ImageSpec], base: int) -> "list[_Image]":
        return [cls.make(spec.identifier, base + spec.offset, spec.length, spec.is_embed) for spec in images]

    def encode(self) -> np.ndarray:
        """What the encoder gives for it: [number of embeddings], uint64."""
        return _TOKEN_HASHES[0] + _powers(_hash("image", self.identifier) | 1, int(self.takes.sum()) + 1)[1:]


def _terms(
    token_ids: Sequence[int],
    start: int,
    images: Iterable[_Image],
    lora: int,
    embeddings: Callable[[_Image], np.ndarray],
) -> np.ndarray:
    """h(i) of the tokens from position `start` on: [len(token_ids)], uint64."""
    terms = _TOKEN_HASHES[np.asarray(token_ids, np.int64)]
    end = start + len(token_ids)
    for image in images:
        first, last = max(start, image.offset), min(end, image.offset + len(image.takes))
        if first >= last:
            continue
        part = slice(first - image.offset, last - image.offset)
        takes, ranks = image.takes[part], image.ranks[part]
        if takes.any():
            terms[first - start : last - start][takes] = embeddings(image)[ranks[takes]]
    return terms + np.uint64(lora)


def lora_name(spec: RequestSpec) -> str | None:
    """The name of a request's adapter, or None."""
    return None if spec.lora is None else f"lora{spec.lora}"


def _lora_hash(name: str | None) -> int:
    return 0 if name is None else _hash("lora", name)


class _Digest:
    """slot(n - 1) without salt, and total(n), of a sequence that is nowhere cached."""

    def __init__(self, config: SchedulerConfig) -> None:
        self.groups = _groups(config)
        self.num_tokens = 0
        self.slot = 0
        self.total = 0
        self.weights = 0  # sum of r**i: the share of a salt in the total
        self.token_power = 1
        self.slot_power = 1

    def copy(self) -> "_Digest":
        copy = object.__new__(_Digest)
        copy.__dict__.update(self.__dict__)
        return copy

    def append(self, term: int) -> None:
        self.slot = (self.slot + self.token_power * term) & _MASK
        self.total = (self.total + self.slot_power * self.slot) & _MASK
        self.weights = (self.weights + self.slot_power) & _MASK
        self.token_power = self.token_power * _TOKEN_BASE & _MASK
        self.slot_power = self.slot_power * _SLOT_BASE & _MASK
        self.num_tokens += 1

    def extend(self, terms: np.ndarray) -> None:
        if len(terms) == 1:  # as below, for what there is most of
            self.append(int(terms[0]))
            return
        token_powers = np.uint64(self.token_power) * _powers(_TOKEN_BASE, len(terms) + 1)
        slot_powers = np.uint64(self.slot_power) * _powers(_SLOT_BASE, len(terms) + 1)
        slots = np.uint64(self.slot) + np.cumsum(token_powers[:-1] * terms)
        self.slot = int(slots[-1]) if len(terms) else self.slot
        self.total = (self.total + int(np.dot(slot_powers[:-1], slots))) & _MASK
        self.weights = (self.weights + int(np.sum(slot_powers[:-1]))) & _MASK
        self.token_power, self.slot_power = int(token_powers[-1]), int(slot_powers[-1])
        self.num_tokens += len(terms)

    def value(self) -> int:
        total = 0
        for kind, salt, weight in self.groups:
            seen = self.total + salt * self.weights if kind == "full_attention" else self.slot + salt
            total += weight * seen
        return total & _MASK


def _groups(config: SchedulerConfig) -> list[tuple[str, int, int]]:
    """Of each KV cache group: its kind, its salt, and its weight in what is sampled."""
    return [(kind, _hash("salt", g), _hash("weight", g) | 1) for g, kind in enumerate(config.kv_groups)]


class _Table:
    """The blocks of a request in one KV cache group."""

    def __init__(self, block_ids: Sequence[int]) -> None:
        self.length = len(block_ids)
        self._ids = np.zeros(max(16, 2 * self.length), np.int64)
        self._ids[: self.length] = block_ids

    @property
    def ids(self) -> np.ndarray:
        return self._ids[: self.length]

    def extend(self, block_ids: Sequence[int]) -> None:
        if self.length + len(block_ids) > len(self._ids):
            self._ids = np.r_[self._ids, np.zeros(len(self._ids) + len(block_ids), np.int64)]
        self._ids[self.length : self.length + len(block_ids)] = block_ids
        self.length += len(block_ids)


class _Running:
    """A request as the model knows it, with tokens of its own: those the scheduler has not seen yet, too."""

    def __init__(self, data: Any) -> None:
        self.request_id: str = data.req_id
        self.last_state: int | None = None  # entry of the mamba tables that holds the state, and
        self.num_accepted = 0  # how many entries further it is, with accepted drafts
        self.steps: list[Step] = []
        self.drafts: list[int] = []
        self.update(data)

    def update(self, data: Any) -> None:
        """All that a NewRequestData says."""
        self.token_ids: list[int] = list(data.prompt_token_ids)
        self.num_prompt_tokens = len(self.token_ids)
        self.images = _Image.of_features(data.mm_features)
        lora_request = data.lora_request
        self.lora = _lora_hash(lora_request.lora_name if lora_request else None)
        self.num_computed_tokens: int = data.num_computed_tokens
        self.tables = [_Table(block_ids) for block_ids in data.block_ids]
        self.truth: _Digest | None = None

    def replace_tokens(self, token_ids: Sequence[int]) -> None:
        self.token_ids = list(token_ids)
        self.truth = None

    @property
    def num_rejections_in_flight(self) -> int:
        """Drafts that were rejected, and that the scheduler still counts as computed."""
        self.steps = [step for step in self.steps if not step.seen]
        return sum(step.num_rejected.get(self.request_id, 0) for step in self.steps)


@dataclass(eq=False)
class _Part:
    """A request's part of a step, before anything is written.

    Attributes:
        start, end: positions of the tokens that are no drafts; the end is exclusive.
        drafts: the tokens behind them.
        increments: what each token, drafts included, adds to the slot before it: [tokens], uint64.
        states: of each mamba group, the state after `start` tokens; of other groups None.
    """

    running: _Running
    start: int
    end: int
    drafts: list[int]
    increments: np.ndarray
    states: list[np.uint64 | None]


@dataclass(eq=False)
class _Logits:
    """A request that can sample: the digests after its last token and after each of its drafts."""

    running: _Running
    drafts: list[int]
    digests: list[int]
    state: int  # entry of the mamba tables that holds the state after the last token


@dataclass(eq=False)
class Step:
    """A forward pass that was made; its tokens, once sampled."""

    req_ids: list[str]
    kv_connector_output: KVConnectorOutput | None
    logits: dict[str, _Logits] = field(default_factory=dict)
    sampled: dict[str, list[int]] | None = None
    num_rejected: dict[str, int] = field(default_factory=dict)
    seen: bool = False


class PagedModel:
    """Executes SchedulerOutputs, of this package's schedulers or of vLLM's.

    A step is `execute`, `sample` (unless nobody was scheduled) and, when its result goes to the scheduler,
    `result`. With async scheduling further steps may be executed and sampled before `result` is asked for.

    Args:
        config: of the scheduler.
        asynchronous: whether drafts that are -1 stand for the model's own of the step before.

    Attributes:
        requests: that it was told of, and that have not finished, by id.
        encoder_cache: encoder outputs that it holds, by the image's identifier.
        missing_for_drafter: (request, image) of embeddings that an eagle head lacked.

    Raises:
        InvalidArgumentError: for a config whose draft tokens have no mamba blocks for their states.
    """

    def __init__(self, config: SchedulerConfig, *, asynchronous: bool = False) -> None:
        if "mamba" in config.kv_groups and config.num_speculative_blocks < config.num_spec_tokens:
            invalid_argument(
                "num_speculative_blocks",
                config.num_speculative_blocks,
                f">= num_spec_tokens = {config.num_spec_tokens} with mamba",
            )
        self.config = config
        self.asynchronous = asynchronous
        self.groups = _groups(config)
        self.specs: dict[str, RequestSpec] = {}
        self.requests: dict[str, _Running] = {}
        self.encoder_cache: dict[str, np.ndarray] = {}
        self.missing_for_drafter: list[tuple[str, str]] = []

        size = config.block_size
        num_positions = config.max_model_len + config.num_spec_tokens + size
        self._token_powers = _powers(_TOKEN_BASE, num_positions)
        self._offset_powers = _powers(_SLOT_BASE, size)
        block_base = pow(_SLOT_BASE, size, 2**64)
        self._block_powers = _powers(block_base, num_positions // size + 1)
        # Nobody may rely on what a block holds before it was written.
        noise = np.random.default_rng(0).integers(0, 2**64, (config.num_blocks, size), np.uint64)
        self._slots = noise
        self._block_digests = noise @ self._offset_powers

        self._loads: dict[str, RemoteLoad] = {}
        self._sends: dict[str, RemoteSend] = {}
        self._kv_connector_output = KVConnectorOutput()
        self._failing_block: int | None = None
        self._not_loaded: set[int] = set()  # blocks of failed loads
        self._last_drafts: DraftTokenIds | None = None

    def add_request(self, spec: RequestSpec) -> None:
        """What the drafter must know of a request, before its first step."""
        self.specs[spec.request_id] = spec

    # The three calls of a step.

    def execute(self, out: SchedulerOutput) -> Step:
        """Make the forward pass; a step of no tokens still frees, loads and reports.

        Raises:
            StandInError: for tokens that do not exist, positions without a block, embeddings that are not in
                the encoder cache, and more of them than it has room for.
        """
        for req_id in out.finished_req_ids:
            self.requests.pop(req_id, None)
        for identifier in out.free_encoder_mm_hashes:
            self.encoder_cache.pop(identifier, None)
        self._update_requests(out)
        if out.kv_connector_metadata is not None:
            self._start_transfers(out.kv_connector_metadata)
        self._run_encoder(out.scheduled_encoder_inputs)
        self._check_common_prefix(out)

        # As a layer does: it gathers the states that all requests continue from, writes all slots and states,
        # and only then reads. So a hit on slots that this very step writes is right; one on a state is not.
        step = Step(list(out.num_scheduled_tokens), self._take_connector_output())
        parts = [
            self._part(self.requests[req_id], num_tokens, out.scheduled_spec_decode_tokens.get(req_id, ()))
            for req_id, num_tokens in out.num_scheduled_tokens.items()
        ]
        for part in parts:
            self._write(part)
        for part in parts:
            running = part.running
            if part.end == len(running.token_ids):
                step.logits[running.request_id] = self._logits(part)
                running.steps.append(step)
        return step

    def sample(self, step: Step, grammar_output: GrammarOutput | None = None) -> None:
        """Sample the step's tokens, as the grammar allows, and draft the next ones."""
        parities: dict[str, list[int | None]] = {}
        if grammar_output is not None:
            ids, rows = grammar_output.structured_output_request_ids, grammar_output.grammar_bitmask
            parities = dict(zip(ids, rows, strict=True))
        step.sampled = {}
        for req_id, logits in step.logits.items():
            rows = parities.get(req_id) or [None] * len(logits.digests)
            sampled = _accept(logits, rows)
            step.sampled[req_id] = sampled
            step.num_rejected[req_id] = len(logits.digests) - len(sampled)
            logits.running.token_ids += sampled
            logits.running.num_accepted = len(sampled) - 1
            self._keep_accepted_state(logits, len(sampled) - 1)
        if self.config.num_spec_tokens:
            drafts = [self._draft(self.requests[req_id]) for req_id in step.req_ids]
            self._last_drafts = DraftTokenIds(list(step.req_ids), drafts)

    def result(self, step: Step) -> ModelRunnerOutput:
        """What goes back to the scheduler, now: from here on it knows which drafts were rejected.

        Raises:
            StandInError: for a step that could sample and has not.
        """
        if step.sampled is None and step.logits:
            raise StandInError(f"the step of {', '.join(step.req_ids)} was not sampled")
        step.seen = True
        sampled = step.sampled or {}
        return ModelRunnerOutput(
            req_ids=list(step.req_ids),
            sampled_token_ids=[list(sampled.get(req_id, ())) for req_id in step.req_ids],
            kv_connector_output=step.kv_connector_output,
        )

    def take_draft_token_ids(self) -> DraftTokenIds | None:
        """Drafts of the step that was sampled last, to be changed as one likes; None before the first."""
        drafts = self._last_drafts
        return drafts and DraftTokenIds(list(drafts.req_ids), [list(ids) for ids in drafts.draft_token_ids])

    def reset_encoder_cache(self) -> None:
        """Drop all embeddings; for the scheduler's `reset_encoder_cache`."""
        self.encoder_cache.clear()

    # The workers' half of the connector.

    @property
    def loading(self) -> list[str]:
        """Requests with an asynchronous load under way, the oldest first."""
        return list(self._loads)

    @property
    def sending(self) -> list[str]:
        """Finished requests whose blocks are still to be sent, the oldest first."""
        return list(self._sends)

    def finish_load(self, request_id: str, failed_block: int | None = None) -> None:
        """An asynchronous load ends now, which the next step reports.

        Args:
            request_id: one of `loading`.
            failed_block: which of its blocks, modulo their number, could not be loaded; None is none.
        """
        self._load(self._loads.pop(request_id), failed_block)
        self._kv_connector_output.finished_recving.add(request_id)

    def fail_next_load(self, failed_block: int) -> None:
        """The next load that is part of a step fails at this block, modulo the number of its blocks."""
        self._failing_block = failed_block

    def finish_send(self, request_id: str) -> None:
        """The blocks of one of `sending` were read, which the next step reports.

        Raises:
            StandInError: for blocks that somebody has written meanwhile (not those of failed loads: a request
                may finish before the scheduler knows of the failure).
        """
        send = self._sends.pop(request_id)
        table = _Table(send.block_ids)
        sent = self._slots[self._places(table, 0, send.num_tokens, request_id)]
        were_loaded = self._not_loaded.isdisjoint(send.block_ids)
        if were_loaded and not np.array_equal(sent, self._slot_values(send)):
            raise StandInError(f"{request_id}: its blocks were overwritten before they were sent")
        self._kv_connector_output.finished_sending.add(request_id)

    def _take_connector_output(self) -> KVConnectorOutput | None:
        output, self._kv_connector_output = self._kv_connector_output, KVConnectorOutput()
        return output if output != KVConnectorOutput() else None

    def _start_transfers(self, metadata: "RemoteTransfers") -> None:
        for load in metadata.loads:
            if load.asynchronous:
                self._loads[load.request_id] = load
            else:
                self._load(load, self._failing_block)
                self._failing_block = None
        for send in metadata.sends:
            self._sends[send.request_id] = send

    def _load(self, load: "RemoteLoad", failed_block: int | None) -> None:
        table = _Table(load.block_ids)
        places = self._places(table, load.start, load.num_tokens, load.request_id)
        self._slots[places] = self._slot_values(load)[load.start :]
        size = self.config.block_size
        loaded = table.ids[load.start // size : (load.num_tokens - 1) // size + 1]
        if failed_block is not None:
            block_id = int(loaded[failed_block % len(loaded)])
            self._slots[block_id] ^= np.uint64(_MIX)
            self._not_loaded.add(block_id)
            self._kv_connector_output.invalid_block_ids.add(block_id)
        self._block_digests[loaded] = self._slots[loaded] @ self._offset_powers

    def _slot_values(self, transfer: "RemoteLoad | RemoteSend") -> np.ndarray:
        terms = _terms(
            transfer.token_ids, 0, _Image.of_features(transfer.mm_features), transfer.lora, _Image.encode
        )
        _, salt, _ = self.groups[0]
        return np.uint64(salt) + np.cumsum(self._token_powers[: len(terms)] * terms)

    # The forward pass.

    def _update_requests(self, out: SchedulerOutput) -> None:
        for req_id in out.preempted_req_ids or ():
            if req_id in self.requests:
                self.requests[req_id].last_state = None
        for data in out.scheduled_new_reqs:
            if data.req_id in self.requests:  # a session that got further input
                self.requests[data.req_id].update(data)
            else:
                self.requests[data.req_id] = _Running(data)
        cached = out.scheduled_cached_reqs
        for i, req_id in enumerate(cached.req_ids):
            running = self.requests[req_id]
            num_tokens = running.num_prompt_tokens + cached.num_output_tokens[i]
            known = cached.all_token_ids.get(req_id)
            if req_id in cached.resumed_req_ids:
                running.steps.clear()
                running.last_state = None
                running.tables = [_Table(()) for _ in self.groups]
                running.replace_tokens(known or ())
            elif known is not None and len(known) == num_tokens:
                running.replace_tokens(known)
            elif num_tokens < len(running.token_ids):  # sampled from KV that was not loaded
                running.replace_tokens(running.token_ids[:num_tokens])
            for table, block_ids in zip(running.tables, cached.new_block_ids[i] or (), strict=False):
                table.extend(block_ids)
            running.num_computed_tokens = cached.num_computed_tokens[i] - running.num_rejections_in_flight

    def _part(self, running: _Running, num_tokens: int, drafts: Sequence[int]) -> _Part:
        """What a request computes in a step, and the states that it continues from."""
        drafts = running.drafts[: len(drafts)] if self.asynchronous else list(drafts)
        start, num_known = running.num_computed_tokens, len(running.token_ids)
        end = start + num_tokens - len(drafts)
        exist = 0 <= start < end <= num_known and -1 not in drafts and (end == num_known or not drafts)
        if not exist or start + num_tokens > self.config.max_model_len:
            asked = f"{num_tokens} tokens from {start} on with the drafts {drafts}"
            raise StandInError(f"{running.request_id}: asked for {asked}; it has {num_known} tokens")
        token_ids = running.token_ids[start:end] + drafts
        terms = _terms(token_ids, start, running.images, running.lora, self._embeddings)
        if self.config.use_eagle:
            self._look_ahead(running, start + num_tokens)
        states = [
            self._state(running, table, salt, start) if kind == "mamba" else None
            for (kind, salt, _), table in zip(self.groups, running.tables, strict=True)
        ]
        increments = self._token_powers[start : start + num_tokens] * terms
        return _Part(running, start, end, drafts, increments, states)

    def _write(self, part: _Part) -> None:
        """Write the slots and states of a part."""
        running = part.running
        for (_, salt, _), table, state in zip(self.groups, running.tables, part.states, strict=True):
            if state is None:
                self._write_slots(running, table, salt, part.start, part.increments)
            else:
                self._write_states(part, table, state)
        last = part.start + len(part.increments) - 1
        running.last_state, running.num_accepted = last // self.config.mamba_block_size, 0

    def _logits(self, part: _Part) -> _Logits:
        """Read what all parts of the step have written."""
        running, last_state = part.running, part.running.last_state
        assert last_state is not None
        digests = [self._read(running, part.end, accepted) for accepted in range(len(part.drafts) + 1)]
        return _Logits(running, part.drafts, digests, last_state)

    def _places(self, table: _Table, start: int, end: int, request_id: str) -> tuple[np.ndarray, np.ndarray]:
        """Block and offset of the positions start (inclusive) to end (exclusive)."""
        size = self.config.block_size
        self._check_room(table, end, request_id)
        positions = np.arange(start, end)
        return table.ids[positions // size], positions % size

    def _check_room(self, table: _Table, end: int, request_id: str) -> None:
        size = self.config.block_size
        if end > table.length * size:
            raise StandInError(f"{request_id}: {end} tokens, but only {table.length} blocks of {size}")

    def _write_slots(
        self, running: _Running, table: _Table, salt: int, start: int, increments: np.ndarray
    ) -> None:
        size, end = self.config.block_size, start + len(increments)
        previous = np.uint64(salt)
        if start > 0:
            previous = self._slots[table.ids[(start - 1) // size], (start - 1) % size]
        if len(increments) == 1:  # as below, for the step that there are most of
            self._check_room(table, end, running.request_id)
            block = self._slots[table.ids[start // size]]
            block[start % size :][:1] = previous + increments
            self._block_digests[table.ids[start // size]] = np.dot(block, self._offset_powers)
            return
        places = self._places(table, start, end, running.request_id)
        self._slots[places] = previous + np.cumsum(increments)
        written = table.ids[start // size : (end - 1) // size + 1]
        self._block_digests[written] = self._slots[written] @ self._offset_powers

    def _state(self, running: _Running, table: _Table, salt: int, start: int) -> np.uint64:
        """The state after `start` tokens."""
        if start == 0:
            return np.uint64(salt)
        entry = (start - 1) // self.config.mamba_block_size
        if running.last_state is not None:
            entry = running.last_state + running.num_accepted
        return self._slots[self._state_block(running, table, entry), 0]

    def _write_states(self, part: _Part, table: _Table, state: np.uint64) -> None:
        size, start, end = self.config.mamba_block_size, part.start, part.end
        states = state + np.cumsum(part.increments)
        if self.config.mamba_cache_mode == "all":
            for full in range(start // size, end // size):
                self._write_state(table.ids[full], states[(full + 1) * size - 1 - start])
        entry = (start + len(states) - 1) // size
        for i in range(len(part.drafts) + 1):
            self._write_state(self._state_block(part.running, table, entry + i), states[end - 1 - start + i])

    def _keep_accepted_state(self, logits: _Logits, num_accepted: int) -> None:
        """The state at the end of a block must stay in that block, even if only accepted drafts got there."""
        size, running = self.config.mamba_block_size, logits.running
        end = len(running.token_ids) - 1 - num_accepted
        aligned = (end + num_accepted) // size * size
        if not logits.drafts or aligned < end or self.config.mamba_cache_mode == "none":
            return
        for (kind, _, _), table in zip(self.groups, running.tables, strict=True):
            if kind == "mamba":
                source = self._state_block(running, table, logits.state + aligned - end)
                self._write_state(table.ids[aligned // size - 1], self._slots[source, 0])

    def _state_block(self, running: _Running, table: _Table, entry: int) -> int:
        if entry >= table.length:
            raise StandInError(f"{running.request_id}: no mamba block {entry}, only {table.length}")
        return int(table.ids[entry])

    def _write_state(self, block_id: int, state: np.uint64) -> None:
        self._slots[block_id] = state
        self._block_digests[block_id] = np.sum(self._slots[block_id] * self._offset_powers)

    def _read(self, running: _Running, num_tokens: int, num_drafts: int) -> int:
        """The digest of what the tables say of the first num_tokens + num_drafts tokens."""
        num_full, rest = divmod(num_tokens + num_drafts, self.config.block_size)
        total = 0
        for (kind, _, weight), table in zip(self.groups, running.tables, strict=True):
            if kind == "full_attention":
                seen = int(np.dot(self._block_digests[table.ids[:num_full]], self._block_powers[:num_full]))
                if rest:
                    part = np.dot(self._slots[table.ids[num_full], :rest], self._offset_powers[:rest])
                    seen += int(part) * int(self._block_powers[num_full])
            else:
                assert running.last_state is not None
                seen = int(self._slots[self._state_block(running, table, running.last_state + num_drafts), 0])
            total += weight * seen
        return total & _MASK

    def _run_encoder(self, inputs: Mapping[str, list[int]]) -> None:
        for req_id, indices in inputs.items():
            for image in (self.requests[req_id].images[i] for i in indices):
                self.encoder_cache[image.identifier] = image.encode()
        num_held = sum(map(len, self.encoder_cache.values()))
        if num_held > self.config.encoder_cache_size:
            room = self.config.encoder_cache_size
            raise StandInError(f"the encoder cache has room for {room} embeddings, not for {num_held}")

    def _embeddings(self, image: _Image) -> np.ndarray:
        embeddings = self.encoder_cache.get(image.identifier)
        if embeddings is None:
            raise StandInError(f"image {image.identifier} is not in the encoder cache")
        return embeddings

    def _look_ahead(self, running: _Running, position: int) -> None:
        """An eagle head reads the embedding of the next position, too."""
        for image in running.images:
            at = position - image.offset
            if 0 <= at < len(image.takes) and image.takes[at] and image.identifier not in self.encoder_cache:
                self.missing_for_drafter.append((running.request_id, image.identifier))

    def _check_common_prefix(self, out: SchedulerOutput) -> None:
        tables = [self.requests[req_id].tables for req_id in out.num_scheduled_tokens]
        for group, num_blocks in enumerate(out.num_common_prefix_blocks):
            for table in (table[group].ids[:num_blocks] for table in tables if num_blocks):
                if not np.array_equal(table, tables[0][group].ids[:num_blocks]):
                    raise StandInError(f"group {group}: not all share their first {num_blocks} blocks")

    # The drafter.

    def _draft(self, running: _Running) -> list[int]:
        """Each draft is right with the request's chance; n-grams do not always give as many as they may.

        As an eagle head does it runs on all requests of a step; where a prefill goes on, its drafts are of no
        use, and the scheduler has to ignore them.
        """
        spec = self.specs[running.request_id]
        truth = running.truth or _Digest(self.config)
        running.truth = truth
        start = truth.num_tokens
        self._extend_truth(truth, running, running.token_ids[start:])
        guess, drafts = truth.copy(), []
        length = self.config.num_spec_tokens
        if (
            self.config.spec_method == "ngram"
            and not self.asynchronous
            and _hash("length", spec.request_id, start) % 4 == 0
        ):
            length = _hash("shorter", spec.request_id, start) % (length + 1)
        for _ in range(length):
            position = guess.num_tokens
            parity = (position - running.num_prompt_tokens) % 2 if spec.structured else None
            token = _token(guess.value(), parity)
            if _hash("draft", spec.request_id, position) >= spec.draft_acceptance * 2**64:
                token = (token + 1 + position % (VOCABULARY_SIZE - 1)) % VOCABULARY_SIZE
            drafts.append(token)
            self._extend_truth(guess, running, [token])
        running.drafts = drafts
        return list(drafts)

    def _extend_truth(self, truth: _Digest, running: _Running, token_ids: list[int]) -> None:
        start = truth.num_tokens
        truth.extend(_terms(token_ids, start, running.images, running.lora, _Image.encode))


def _accept(logits: _Logits, parities: Sequence[int | None]) -> list[int]:
    """The longest prefix of the drafts that the model would have said itself, and one token more."""
    sampled = []
    for i, digest in enumerate(logits.digests):
        sampled.append(_token(digest, parities[i]))
        if i < len(logits.drafts) and sampled[i] != logits.drafts[i]:
            break
    return sampled


class StandInGrammar:
    """Output token k must have the parity of k."""

    def __init__(self) -> None:
        self.num_accepted = 0

    def accept_tokens(self, request_id: str, token_ids: list[int]) -> bool:
        """Advance by tokens that were sampled; False at the first that breaks the grammar."""
        allowed = self.validate_tokens(token_ids)
        self.num_accepted += len(allowed)
        return len(allowed) == len(token_ids)

    def validate_tokens(self, token_ids: list[int]) -> list[int]:
        """The longest prefix that the grammar allows; does not advance."""
        for i, token in enumerate(token_ids):
            if token % 2 != (self.num_accepted + i) % 2:
                return token_ids[:i]
        return token_ids


class StandInStructuredOutputManager:
    """What a scheduler asks about grammars. Source: vllm/v1/structured_output/__init__.py, v0.17.0."""

    def should_advance(self, request: Any) -> bool:
        """Whether the request has a grammar."""
        return request.use_structured_output

    def grammar_bitmask(
        self,
        requests: Mapping[str, Any],
        structured_output_request_ids: list[str],
        scheduled_spec_decode_tokens: Mapping[str, list[int]],
    ) -> list[list[int | None]]:
        """Of each request: the parity of each token that it may sample; None, after a refused draft, is any.

        Raises:
            StandInError: for a draft that its grammar forbids and nobody refused.
        """
        rows = []
        for req_id in structured_output_request_ids:
            grammar = requests[req_id].structured_output_request.grammar
            drafts = list(scheduled_spec_decode_tokens.get(req_id, ()))
            allowed = drafts[: drafts.index(-1)] if -1 in drafts else drafts
            if grammar.validate_tokens(allowed) != allowed:
                raise StandInError(f"{req_id}: drafts {drafts} after {grammar.num_accepted} tokens")
            row: list[int | None] = [(grammar.num_accepted + i) % 2 for i in range(len(allowed) + 1)]
            rows.append(row + [None] * (len(drafts) - len(allowed)))
        return rows


@dataclass(frozen=True)
class RemoteLoad:
    """Positions `start` to `num_tokens` of a request, to be written to its blocks.

    `unhashed_block_ids` are those that nobody can find yet; for comparison alone.
    """

    request_id: str
    token_ids: tuple[int, ...]
    mm_features: tuple[Any, ...]
    lora: int
    block_ids: tuple[int, ...]
    start: int
    asynchronous: bool
    unhashed_block_ids: tuple[int, ...] = ()

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)


@dataclass(frozen=True)
class RemoteSend:
    """The computed tokens of a finished request, to be read from its blocks."""

    request_id: str
    token_ids: tuple[int, ...]
    mm_features: tuple[Any, ...]
    lora: int
    block_ids: tuple[int, ...]

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)


@dataclass(frozen=True)
class RemoteTransfers:
    """The metadata of a step."""

    loads: tuple[RemoteLoad, ...]
    sends: tuple[RemoteSend, ...]


class StandInConnector:
    """The scheduler's half of a connector, for this package's schedulers and for vLLM's.

    Hits end at a block's end, or with the prompt: vLLM counts the tokens of an asynchronous load in blocks.

    Raises:
        InvalidArgumentError: for KV cache groups that v0.17.0 cannot load.
    """

    def __init__(self, config: SchedulerConfig) -> None:
        if config.kv_groups != ("full_attention",):
            invalid_argument("kv_groups", config.kv_groups, "('full_attention',) with a connector")
        self.block_size = config.block_size
        self.hits: dict[str, RemoteHit] = {}
        self.num_polls: dict[str, int] = {}
        self.loading: set[str] = set()
        self._matched: dict[str, tuple[int, bool]] = {}
        self._loads: list[RemoteLoad] = []
        self._sends: list[RemoteSend] = []

    def add_request(self, spec: RequestSpec) -> None:
        """Say what the remote cache holds of a request, before the scheduler gets it."""
        if spec.remote is not None:
            self.hits[spec.request_id] = spec.remote
            self.num_polls[spec.request_id] = spec.remote.polls

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int | None, bool]:
        """As in KVConnector."""
        req_id = request.request_id
        hit = self.hits.get(req_id)
        if hit is None:
            return 0, False
        if self.num_polls[req_id]:
            self.num_polls[req_id] -= 1
            return None, False
        end = hit.num_tokens
        if end < request.num_tokens and hit.asynchronous:
            end -= end % self.block_size
        self._matched[req_id] = num_computed_tokens, hit.asynchronous
        num_tokens = max(0, end - num_computed_tokens)
        return num_tokens, hit.asynchronous and num_tokens > 0

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        """As in KVConnector."""
        if not num_external_tokens:
            return
        start, asynchronous = self._matched[request.request_id]
        (block_ids,) = blocks.get_block_ids()
        content = _content(request, start + num_external_tokens)
        unhashed = tuple(blocks.get_unhashed_block_ids())
        self._loads.append(RemoteLoad(*content, tuple(block_ids), start, asynchronous, unhashed))
        if asynchronous:
            self.loading.add(request.request_id)

    def build_connector_meta(self, scheduler_output: Any) -> RemoteTransfers:
        """As in KVConnector."""
        transfers = RemoteTransfers(tuple(self._loads), tuple(self._sends))
        self._loads, self._sends = [], []
        return transfers

    def update_connector_output(self, connector_output: Any) -> None:
        """As in KVConnector."""
        self.loading.difference_update(connector_output.finished_recving or ())

    def request_finished(self, request: Any, block_ids: Sequence[int]) -> tuple[bool, dict[str, Any] | None]:
        """As in KVConnector; blocks are kept for a request whose kv_transfer_params say so."""
        req_id = request.request_id
        wanted = (request.kv_transfer_params or {}).get(KEEP_BLOCKS, False)
        # The blocks of a load under way are kept anyway, until it ends; they cannot be freed twice.
        if not wanted or not block_ids or req_id in self.loading:
            return False, None
        content = _content(request, min(request.num_computed_tokens, request.num_tokens - 1))
        self._sends.append(RemoteSend(*content, tuple(block_ids)))
        return True, {"kept": req_id}

    def reset_cache(self) -> bool:
        """As in KVConnector."""
        self.hits.clear()
        return True

    def take_events(self) -> tuple[()]:
        """None are ever made."""
        return ()

    def get_kv_connector_stats(self) -> None:
        """None are ever made."""

    def shutdown(self) -> None:
        """Nothing to do."""


def _content(request: Any, num_tokens: int) -> tuple[str, tuple[int, ...], tuple[Any, ...], int]:
    name = request.lora_request.lora_name if request.lora_request else None
    tokens = tuple(request.all_token_ids[:num_tokens])
    return request.request_id, tokens, tuple(request.mm_features or ()), _lora_hash(name)


def expected_output(spec: RequestSpec, config: SchedulerConfig) -> list[list[int]]:
    """What a request must say, whatever the schedule: its output tokens for each of its inputs.

    A further input of a session continues after the output so far, less its last token. Its max_tokens are
    those of the first input: v0.17.0 reads the new ones and does not use them.
    """
    digest, images = _Digest(config), []
    inputs: list[RequestSpec | SessionChunk] = [spec, *(spec.chunks or ())]
    outputs: list[list[int]] = []
    lora, num_said = _lora_hash(lora_name(spec)), 0
    for chunk in inputs:
        start = digest.num_tokens
        images += _Image.of_specs(chunk.images, start)
        digest.extend(_terms(prompt_token_ids(chunk), start, images, lora, _Image.encode))
        said = list(_say(digest, spec, config, lora, num_said, min(spec.min_tokens, chunk.max_tokens)))
        num_said += len(said)
        outputs.append(said)
    return outputs


def _say(
    digest: _Digest, spec: RequestSpec, config: SchedulerConfig, lora: int, num_said: int, min_tokens: int
) -> Iterator[int]:
    """Tokens until one ends the request; the digest has all but that one in the end."""
    last_tokens = {*spec.stop_token_ids, *([EOS_TOKEN_ID] if spec.eos else [])}
    for count in range(1, config.max_model_len + 1):
        token = _token(digest.value(), (num_said + count - 1) % 2 if spec.structured else None)
        yield token
        is_last = token in last_tokens or count >= spec.max_tokens
        if count >= min_tokens and (is_last or digest.num_tokens + 1 >= config.max_model_len):
            return
        digest.append(int(_TOKEN_HASHES[token]) + lora)


class OutputOracle:
    """Checks what the clients are told, as it comes: tokens against `expected_output`, and the end."""

    def __init__(self, config: SchedulerConfig) -> None:
        self.config = config
        self.specs: dict[str, RequestSpec] = {}
        self.expected: dict[str, list[list[int]]] = {}
        self.said: dict[str, list[list[int]]] = {}
        self.stop_reasons: dict[str, int | None] = {}

    def add_request(self, spec: RequestSpec) -> None:
        """A request of which outputs may come."""
        self.specs[spec.request_id] = spec
        self.stop_reasons[spec.request_id] = None
        self.expected[spec.request_id] = expected_output(spec, self.config)
        self.said[spec.request_id] = [[]]

    def observe(self, outputs: Mapping[int, EngineCoreOutputs]) -> None:
        """Check the outputs of a step, of this package's schedulers or of vLLM's.

        Raises:
            OracleMismatchError: for a token that is not the expected one; an end that is missing, too early
                or of another reason; and a request of another client.
        """
        for client_index, client_outputs in outputs.items():
            for output in client_outputs.outputs:
                due = self.specs[output.request_id].client_index
                if client_index != due:
                    raise OracleMismatchError(
                        f"{output.request_id}: told to client {client_index}, not {due}"
                    )
                self._observe_tokens(output.request_id, list(output.new_token_ids))
                if output.finish_reason not in (FinishReason.ABORT, FinishReason.ERROR):
                    self._observe_end(output.request_id, output.finish_reason, output.stop_reason)

    def _observe_tokens(self, request_id: str, new_token_ids: list[int]) -> None:
        chunk, said, expected = self._newest_input(request_id)
        for token in new_token_ids:
            position = len(said)
            if expected[position : position + 1] != [token]:
                should = expected[position] if position < len(expected) else "nothing"
                raise OracleMismatchError(
                    f"{request_id}: output token {position} of input {chunk} is {token}, not {should}"
                )
            said.append(token)

    def _observe_end(self, request_id: str, finish_reason: int | None, stop_reason: int | None) -> None:
        chunk, said, expected = self._newest_input(request_id)
        due = None, self.stop_reasons[request_id]
        if said and len(said) == len(expected):
            due = self._end(request_id)
            self.said[request_id].append([])
        if (finish_reason, stop_reason) != due:
            raise OracleMismatchError(
                f"{request_id}: finish_reason and stop_reason are {finish_reason} and {stop_reason}, not "
                f"{due[0]} and {due[1]}, after {len(said)} of {len(expected)} tokens of input {chunk}"
            )

    def _newest_input(self, request_id: str) -> tuple[int, list[int], list[int]]:
        """Of the input that is answered: its number, what was said to it, and what must be."""
        said, expected = self.said[request_id], self.expected[request_id]
        chunk = len(said) - 1
        return chunk, said[chunk], expected[chunk] if chunk < len(expected) else []

    def _end(self, request_id: str) -> tuple[FinishReason, int | None]:
        """finish_reason and stop_reason with the last token of an input; EOS comes before stop tokens."""
        spec, token = self.specs[request_id], self.said[request_id][-1][-1]
        if spec.eos and token == EOS_TOKEN_ID:
            reason = FinishReason.STOP
        elif token in spec.stop_token_ids:
            reason = FinishReason.STOP
            self.stop_reasons[request_id] = token
        else:
            reason = FinishReason.LENGTH
        # v0.17.0 clears no stop_reason: a session's further outputs have that of an input before (#57584).
        return reason, self.stop_reasons[request_id]
