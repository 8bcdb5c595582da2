"""What is fast: the implementation that runs in production, fed by prebuilt metadata."""
