"""Optimizers and averages that respect the masks. The capture of a training step is :func:`wsn_fast.capture_step`."""

from .averages import averaging
from .optimizers import SubnetAdamW, SubnetSGD

__all__ = ["SubnetAdamW", "SubnetSGD", "averaging"]
