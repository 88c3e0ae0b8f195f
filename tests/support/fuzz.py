"""Property tests with a few examples in the ordinary run, and many in the run of ``.ci/run``."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
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
