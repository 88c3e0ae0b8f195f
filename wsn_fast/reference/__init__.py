"""The oracle: the specification of every operation, and the published training programs, in plain PyTorch."""
