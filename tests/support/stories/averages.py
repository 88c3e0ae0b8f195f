"""Moves that average weights and write the averages back into the model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from hypothesis.stateful import precondition, rule
from small_models import batches, train
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from wsn_fast import WSN
from wsn_fast.nn.task_ids import TaskId
from wsn_fast.optim import averaging

from .models import OPTIMIZERS, Accident
from .story import FINDERS, Story

SAFE: dict[str, Callable[[WSN], Any]] = {
    "SWA": averaging,
    "EMA": lambda wsn: averaging(wsn, multi_avg_fn=get_ema_multi_avg_fn(0.7)),
    "one by one": lambda wsn: averaging(wsn, avg_fn=lambda mean, now, count: mean.lerp(now, 0.3)),
}
PLAIN: dict[str, Callable[[], Any]] = {"SWA": lambda: None, "EMA": lambda: get_ema_multi_avg_fn(0.7)}


class Averages(Story):
    """Averages by the helper leave finished tasks alone. Other averages may round them, and are found out."""

    def __init__(self) -> None:
        super().__init__()
        self.older: tuple[Callable[..., None], TaskId, WSN] | None = None

    def steps_with(self, averaged: AveragedModel | None, after: Callable[[], object], kind: str) -> None:
        self.wsn.use_task(None)
        self.optimizer = OPTIMIZERS[kind](self.wsn)
        for batch in batches(self.steps, 3):
            try:
                train(self.wsn, self.optimizer, [batch])
            except Accident:
                assert "Cut" in type(self.optimizer).__name__
            if averaged is not None:
                averaged.update_parameters(self.wsn)
            after()

    @rule(
        how=st.sampled_from(list(SAFE)),
        kind=st.sampled_from(list(OPTIMIZERS)),
        buffers=st.booleans(),
        whole=st.booleans(),
    )
    def average_with_the_helper(self, how: str, kind: str, buffers: bool, whole: bool) -> None:
        self.in_a_task()
        self.wsn.use_task(None)  # a copy of a model that shows a finished task has buffers that others have not
        average = SAFE[how](self.wsn)
        averaged = AveragedModel(self.wsn, multi_avg_fn=average, use_buffers=buffers)
        self.steps_with(averaged, lambda: None, kind)
        if whole:
            self.wsn.load_state_dict(averaged.module.state_dict())
        else:
            self.wsn.load_trainable_state(averaged.module.trainable_state())
        assert self.current is not None
        self.older = average, self.current, self.wsn

    @precondition(lambda self: self.older is not None)
    @rule()
    def go_on_with_the_averages_of_another_task(self) -> None:
        assert self.older is not None
        average, task, wsn = self.older
        if self.current == task:
            self.end_now()
        self.in_a_task()
        if wsn is self.wsn and self.current != task:
            self.wsn.use_task(None)
            weight = next(gate.param for _, gate in self.wsn.gated())
            with pytest.raises(RuntimeError, match="these are averages of task"):
                average([weight.detach().clone()], [weight], 3)

    @rule(
        how=st.sampled_from(list(PLAIN)),
        kind=st.sampled_from(list(OPTIMIZERS)),
        way=st.sampled_from(["trainable state", "state", "copy"]),
        finder=st.sampled_from(FINDERS),
        fresh=st.booleans(),
    )
    def average_without_the_helper(self, how: str, kind: str, way: str, finder: str, fresh: bool) -> None:
        self.in_a_task()
        self.wsn.use_task(None)  # a copy of a model that shows a finished task has buffers that others have not
        self.in_a_task()
        self.wsn.use_task(None)
        averaged = AveragedModel(self.wsn, multi_avg_fn=PLAIN[how](), use_buffers=False)
        self.steps_with(averaged, lambda: None, kind)
        self.write_back(averaged.module.state_dict(), averaged.module.trainable_state(), way, finder, fresh)

    @rule(
        kind=st.sampled_from(list(OPTIMIZERS)),
        way=st.sampled_from(["trainable state", "state", "copy"]),
        finder=st.sampled_from(FINDERS),
        fresh=st.booleans(),
    )
    def average_by_hand(self, kind: str, way: str, finder: str, fresh: bool) -> None:
        self.in_a_task()
        mean = {name: tensor.clone() for name, tensor in self.wsn.state_dict().items()}
        live = self.wsn.trainable_state()

        def update() -> None:
            for means, now in ((mean, self.wsn.state_dict()), (live, self.wsn.trainable_state())):
                for name, tensor in now.items():
                    if tensor.is_floating_point():
                        means[name].mul_(0.9).add_(tensor, alpha=0.1)
                    else:
                        means[name] = tensor.clone()

        self.steps_with(None, update, kind)
        self.write_back(mean, live, way, finder, fresh)

    def write_back(self, state: dict[str, Tensor], live: dict[str, Tensor], way: str, finder: str, fresh: bool) -> None:
        good = self.good()
        if way == "trainable state":
            try:
                self.wsn.load_trainable_state(live)
            except ValueError as error:
                assert "an average of weights" in str(error)
            return
        if way == "state":
            self.wsn.load_state_dict(state)
        else:
            with torch.no_grad():
                own = self.wsn.state_dict()
                for name, tensor in state.items():
                    if name in own and own[name].shape == tensor.shape and not name.endswith("_extra_state"):
                        own[name].copy_(tensor)
        names = {self.shown(name.removeprefix("model.")) for name in state}
        self.must_be_found(good, names, finder, fresh)
