"""Relatives of WSN as settings of the same classes: PackNet, Piggyback and SupSup."""

from .packnet import PackNet as PackNet
from .piggyback import piggyback as piggyback
from .supsup import supsup as supsup

__all__ = ["PackNet", "piggyback", "supsup"]
