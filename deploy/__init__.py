"""A student out of PyTorch; empty until its own issue."""
