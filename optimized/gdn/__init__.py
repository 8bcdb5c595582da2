"""Gated delta rule prefill as it runs in production: prebuilt metadata, staging, and the op they feed."""

from .chunked import IMPLEMENTATIONS, chunk_gated_delta_rule
from .device import forbid_host_sync, open_device
from .metadata import ChunkMetadata, ChunkMetadataBuilder
from .staging import StagingRing

__all__ = [
    "IMPLEMENTATIONS",
    "ChunkMetadata",
    "ChunkMetadataBuilder",
    "StagingRing",
    "chunk_gated_delta_rule",
    "forbid_host_sync",
    "open_device",
]
