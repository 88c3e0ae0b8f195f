"""Three implementations of the same primitive operations, and the choice between them.

A backend is a module whose functions have the names and conventions of :mod:`wsn_fast.backends.torch`. Only the torch
backend has all of them. :func:`choose` answers which backend runs an operation on a device, and why.
"""

from .choice import (
    ENVIRONMENT_VARIABLE,
    NAMES,
    PRIMITIVES,
    Choice,
    candidate,
    choose,
    chosen,
    forget,
    overridden,
    parse_override,
    recording,
    run,
    tracing,
)
from .exporting import is_exporting

__all__ = [
    "ENVIRONMENT_VARIABLE",
    "NAMES",
    "PRIMITIVES",
    "Choice",
    "candidate",
    "choose",
    "chosen",
    "forget",
    "is_exporting",
    "overridden",
    "parse_override",
    "recording",
    "run",
    "tracing",
]
