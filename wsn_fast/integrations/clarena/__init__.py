"""CLArena (https://pypi.org/project/clarena) on subnet layers: backbones that its published ``WSN`` algorithm trains as
they are, and :class:`FastWSN`, an algorithm of our own in its framework."""

from importlib.util import find_spec

if find_spec("clarena") is None:
    raise ImportError('this needs CLArena: pip install "wsn-fast[clarena]"', name="clarena")

from .algorithm import FastWSN
from .backbone import FastSubnetBackbone, FastSubnetMLP, ScoreGate

__all__ = ["FastSubnetBackbone", "FastSubnetMLP", "FastWSN", "ScoreGate"]
