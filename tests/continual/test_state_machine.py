"""Whatever is done with a model, in whatever order: what a finished task computes stays the same to the bit, or an
error says which tensor has changed.

Hypothesis makes up the stories: tasks begin, train and end, are used, saved, loaded, copied and taken out as dense
models; weights are averaged, steps are interrupted, and others write to the weights. After each move every finished
task is run again, and ``verify`` looks at its tensors. The moves are in ``tests/support/stories``.
"""

from __future__ import annotations

import pytest
from hypothesis import settings
from stories.accidents import Accidents
from stories.averages import Averages
from stories.life import Life
from stories.states import States
from stories.use import Use
from stories.writers import Writers


class Promise(Life, Use, States, Averages, Accidents, Writers):
    """All moves."""


class PromiseAtLength(Promise):
    """The same moves, in many more stories."""


Promise.TestCase.settings = settings(max_examples=35, stateful_step_count=40)
test_the_promise_in_any_order = Promise.TestCase
PromiseAtLength.TestCase.settings = settings(max_examples=250, stateful_step_count=50)
test_the_promise_in_any_order_at_length = pytest.mark.ci(PromiseAtLength.TestCase)
