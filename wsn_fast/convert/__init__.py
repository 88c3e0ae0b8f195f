"""From an ordinary model to a subnet model, and back."""

from .materialize import materialize
from .to_dense import to_dense
from .to_subnet import convert

__all__ = ["convert", "materialize", "to_dense"]
