"""A student out of PyTorch: exported, checked, and used without it."""
