"""Gated delta rule prefill fed as in production: prebuilt metadata, staging, and the op that reads them."""

from .chunked import (
    IMPLEMENTATIONS,
    Implementation,
    chunk_gated_delta_rule,
    default_implementation,
)
from .device import forbid_host_sync, open_device
from .metadata import ChunkMetadata, ChunkMetadataBuilder
from .staging import StagingRing

__all__ = [
    "IMPLEMENTATIONS",
    "ChunkMetadata",
    "ChunkMetadataBuilder",
    "Implementation",
    "StagingRing",
    "chunk_gated_delta_rule",
    "default_implementation",
    "forbid_host_sync",
    "open_device",
]
