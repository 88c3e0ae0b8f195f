"""The words among which arguments choose. This file imports nothing, so that the command line knows them without
PyTorch."""

RULES = ("magnitude", "value")

SCORE_INITS = ("default", "N01", "U01")

STORAGES = ("float32", "bfloat16", "8bit")
"""How running means can be stored. "float32" stands for the dtype of the parameter, as PyTorch stores them."""
