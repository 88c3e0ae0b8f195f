"""The dtypes in which the optimizer kernels are compiled."""

from __future__ import annotations

import torch

FORMS = ((torch.float32, torch.bfloat16), (torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16))
"""Weights and masked weights: mixed, full and half precision."""
