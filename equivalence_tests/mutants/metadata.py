"""Bugs of chunk metadata: who is in a batch, where, and in how many blocks."""

from .bug import Bug

_BUILDER = "optimized.gdn.metadata"
_DECODE = "reference.gdn.recurrent"
_TABLES = ("metadata coverage", "metadata definition", "metadata invariances", "capacity")
_OP = ("prefill against the recurrence", "prefill properties", "stages")

BUGS = (
    Bug(
        "compact_ranks",
        ("fla#909", "fla#103"),
        "metadata",
        "an empty sequence between others: indices number those with tokens, kernels index all",
        _BUILDER,
        "            base = self._sequences[:, : N + 1].ravel() - (first_rows << 32)\n",
        "            ranks = np.tile(np.add.accumulate(np.append(lens > 0, False)) - 1, 3)\n"
        "            base = ranks - (first_rows << 32)\n",
        (*_TABLES, *_OP),
    ),
    Bug(
        "offsets_without_empty_sequences",
        ("asc#11807",),
        "metadata",
        "a context-parallel rank without tokens: the states of the others lie one place further",
        _BUILDER,
        "            vectors[2, : N + 1] = vectors[1",
        "            kept = ends[1, :N][lens > 0]\n"
        "            vectors[1, 1 : N + 1] = np.append(kept, [ends[1, N]] * (N - len(kept)))\n"
        "            vectors[2, : N + 1] = vectors[1",
        (*_TABLES, "stages"),
    ),
    Bug(
        "padded_query_start_loc",
        ("asc#6822", "asc#8396"),
        "metadata",
        "graph mode, fewer requests than the graph was captured for: padding rows enter as sequences",
        _BUILDER,
        "    bounds = bounds[: num_actual_seqs + 1]\n",
        "    num_actual_seqs = num_seqs\n",
        _TABLES,
    ),
    Bug(
        "bounds_padded_to_the_token_count",
        ("asc#11161",),
        "metadata",
        "full-decode graph with drafts: cu_seqlens has entries behind the last sequence",
        _BUILDER,
        "buffer.as_strided((3, N + 1), (vector, 1)",
        "buffer.as_strided((3, vector), (vector, 1)",
        _TABLES,
    ),
    Bug(
        "none_where_the_batch_is_empty",
        ("asc#11072",),
        "metadata",
        "a step without such requests gives None where others give a tensor: a captured graph keeps it",
        _BUILDER,
        "buffer[wide:].view(torch.int64) if self.int64_offsets else None",
        "buffer[wide:].view(torch.int64) if self.int64_offsets and N else None",
        _TABLES,
    ),
    Bug(
        "chunk_of_one_token_is_a_decode",
        ("vllm#34871",),
        "metadata",
        "the last chunk of a prompt has one token, beside draft verifications: an assertion fails",
        _BUILDER,
        "        if not 0 <= num_decodes <= N:\n",
        "        if spec_sequence_masks_cpu is not None:\n"
        "            assert np.count_nonzero(lens == 1) <= num_decodes\n"
        "        if not 0 <= num_decodes <= N:\n",
        _TABLES,
    ),
    Bug(
        "block_size_written_twice",
        (),
        "metadata",
        "another number of heads than the one tested: builder and kernel disagree about a block",
        _BUILDER,
        "SOLVE_TRIL_BLOCK_SIZE, cumsum_block_size(num_value_heads))",
        "SOLVE_TRIL_BLOCK_SIZE, cumsum_block_size(32))",
        (*_TABLES, "prefill against the recurrence"),
    ),
    Bug(
        "tables_sized_for_full_chunks",
        ("asc#10619",),
        "metadata",
        "more short sequences than the buffer was captured for: the tables do not fit",
        _BUILDER,
        "    return sequences + (max_num_tokens - sequences) // block_size\n",
        "    return -(-max_num_tokens // block_size)\n",
        _TABLES,
    ),
    Bug(
        "padding_writes_the_last_state",
        ("asc#7506", "vllm#39064"),
        "metadata",
        "a padding row, marked -1, in a decode step: the state at offset -1 is written",
        _DECODE,
        "        slots.append(None if padding else slot)\n",
        "        slots.append(slot)\n",
        ("decode",),
    ),
    Bug(
        "null_slot_is_written",
        ("asc#7506", "vllm#39064"),
        "metadata",
        "a padding row, marked by the null block, in a decode step: the state in slot 0 is written",
        _DECODE,
        "padding = slot in (-1, null_slot)",
        "padding = slot == -1",
        ("decode",),
    ),
    Bug(
        "no_indices_are_batch_order",
        ("asc#10901",),
        "metadata",
        "a decode step of no real row: states are written in the order of the batch",
        _DECODE,
        "    slots = _check_state_indices(state_indices, sizes.T, num_slots, null_slot)\n",
        "    slots = _check_state_indices(state_indices, sizes.T, num_slots, null_slot)\n"
        "    slots = list(range(sizes.T)) if slots.count(None) == len(slots) else slots\n",
        ("decode",),
    ),
)
