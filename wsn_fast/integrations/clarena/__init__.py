"""Integration with CLArena (https://pypi.org/project/clarena): backbones of subnet layers for its published ``WSN``
algorithm, and :class:`FastWSN`, an algorithm of this library for its framework."""

from importlib.util import find_spec

if find_spec("clarena") is None:
    raise ImportError('this needs CLArena: pip install "wsn-fast[clarena]"', name="clarena")

from .algorithm import FastWSN
from .backbone import FastSubnetBackbone, FastSubnetMLP, ScoreGate

__all__ = ["FastSubnetBackbone", "FastSubnetMLP", "FastWSN", "ScoreGate"]
