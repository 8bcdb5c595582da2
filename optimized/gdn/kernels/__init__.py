"""The kernels of gated delta rule prefill, and the block sizes that the metadata builder asks them for."""
