"""What is fast: the implementations that are fed by prebuilt metadata."""
