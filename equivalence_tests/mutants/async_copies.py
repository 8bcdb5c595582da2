"""Bugs of asynchronous copies: who waits for what, and how long memory is kept."""

from .bug import Bug

_RING = "optimized.gdn.staging"
_SUITES = ("staging ring", "host sync")

BUGS = (
    Bug(
        "two_slots_without_an_event",
        ("asc#12079", "asc#12630", "asc#16428"),
        "async copies",
        "two builds in one step: the host rewrites a pinned buffer while its copy is queued",
        _RING,
        "        if not slot.copy_done.query():\n"
        "            self.waits += 1\n"
        "            slot.copy_done.synchronize()\n",
        "",
        _SUITES,
    ),
    Bug(
        "waits_on_the_wrong_event",
        ("vllm#36013",),
        "async copies",
        "a busy copy stream: the reader goes on when an older copy has landed",
        _RING,
        "consumer.wait_event(slot.copy_done)",
        "consumer.wait_event(slot.consumer_done)",
        _SUITES,
    ),
    Bug(
        "copies_a_pageable_temporary",
        ("vllm#45074",),
        "async copies",
        "always: a copy out of pageable memory stalls the step, or races with who writes there next",
        _RING,
        "slot.host[:size], self._copy_stream)",
        "slot.host[:size].clone(), self._copy_stream)",
        _SUITES,
    ),
    Bug(
        "memory_is_freed_under_a_copy",
        ("asc#11161", "vllm#45074"),
        "async copies",
        "a buffer is dropped while its copy is queued: the copy reads what came there next",
        _RING,
        "        weakref.finalize(self, _finish_copies, slots)\n",
        "",
        _SUITES,
    ),
    Bug(
        "copy_overtakes_the_reader",
        (),
        "async copies",
        "a slow consumer: the next copy lands in the buffer that it still reads",
        _RING,
        "        self._copy_stream.wait_event(slot.consumer_done)\n",
        "",
        _SUITES,
    ),
    Bug(
        "device_buffer_smaller_than_the_host_one",
        ("asc#10619",),
        "async copies",
        "max_num_seqs above the capture size: the copy does not fit",
        _RING,
        "        self.device = device.device_empty(capacity, torch.int32)\n",
        "        self.device = device.device_empty(max(1, capacity // 2), torch.int32)\n",
        ("capacity", *_SUITES),
    ),
    Bug(
        "reads_a_number_back",
        ("vllm#45074",),
        "async copies",
        "always: the op asks the device for a number that the host knows, and waits for all that is queued",
        "optimized.gdn.eager",
        "    plan = _plan_steps(metadata)\n",
        "    plan = _plan_steps(metadata)\n    assert metadata.cu_seqlens[-1].item() <= T\n",
        _SUITES,
    ),
)
