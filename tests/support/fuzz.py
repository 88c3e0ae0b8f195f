"""Property tests with a few examples in the ordinary run, and many in the run of ``.ci/run``."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy


def fuzzed(many: int, *strategies: SearchStrategy[Any]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Like ``hypothesis.given``, which fills the last parameters. The first ones are fixtures.

    Args:
        many: the number of examples under the marker ``ci``; a sixth of it in the ordinary run.
        strategies: as for ``given``.
    """

    def decorate(check: Callable[..., None]) -> Callable[..., None]:
        parameters = list(inspect.signature(check).parameters.values())
        fixtures = parameters[: len(parameters) - len(strategies)]

        def test(examples: int, **values: Any) -> None:
            settings(max_examples=examples)(given(*strategies)(check))(**values)

        test.__name__, test.__doc__, test.__module__ = check.__name__, check.__doc__, check.__module__
        examples = inspect.Parameter("examples", inspect.Parameter.KEYWORD_ONLY)
        test.__signature__ = inspect.Signature([*fixtures, examples])  # type: ignore[attr-defined]
        return pytest.mark.parametrize("examples", [many // 6, pytest.param(many, marks=pytest.mark.ci)])(test)

    return decorate


@st.composite
def damaged(draw: st.DrawFn, whole: bytes) -> bytes:
    """The bytes with up to four bits flipped, mostly near the ends (the structure), perhaps cut short."""
    data = bytearray(whole)
    near = st.integers(0, min(len(data), 300) - 1)
    position = near | near.map(lambda offset: len(data) - 1 - offset) | st.integers(0, len(data) - 1)
    for at, bit in draw(st.lists(st.tuples(position, st.integers(0, 7)), max_size=4)):
        data[at] ^= 1 << bit
    return bytes(data[: draw(st.just(len(data)) | st.integers(0, len(data)))])
