"""Moves of a task's life: it begins, trains, ends, and may be removed."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import strategies as st
from hypothesis.stateful import precondition, rule
from small_models import batches
from torch import nn

from wsn_fast import WSN, UnmaskedReadError
from wsn_fast.continual.probe import Probe
from wsn_fast.nn.task_ids import TaskId

from .models import OPTIMIZERS, TASKS
from .story import Story, X

PROBES: dict[str, Callable[[WSN], Probe]] = {
    "a tensor": lambda wsn: X,
    "a tuple": lambda wsn: (X,),
    "a function": lambda wsn: lambda task: wsn(batches(3, 1)[0][0]),
}


class Life(Story):
    """Tasks begin, train, end and go."""

    @rule(task=st.sampled_from(TASKS), density=st.sampled_from([None, 0.03, 1.0]), inference=st.booleans())
    def begin(self, task: TaskId, density: float | None, inference: bool) -> None:
        with torch.inference_mode(inference):
            if task in self.known or self.current is not None:
                with pytest.raises((ValueError, RuntimeError), match=r"has been trained already|is in progress"):
                    self.wsn.begin_task(task, density=density)
                return
            self.begin_now(task, density=density)

    @rule(kind=st.sampled_from(list(OPTIMIZERS)), another=st.booleans())
    def train(self, kind: str, another: bool) -> None:
        self.in_a_task()
        self.train_some(2, kind, another)

    @precondition(lambda self: self.known)
    @rule(data=st.data(), kind=st.sampled_from([kind for kind in OPTIMIZERS if "wrapper" not in kind]))
    def step_while_a_finished_task_is_in_use(self, data: st.DataObject, kind: str) -> None:
        task = self.some(data)
        self.in_a_task()
        if task not in self.known:
            return
        optimizer = self.optimizer = OPTIMIZERS[kind](self.wsn)
        with self.wsn.use_task(task), pytest.raises(RuntimeError, match="finished and in use"):
            optimizer.step()

    @rule(inference=st.booleans(), probe=st.booleans())
    def end(self, inference: bool, probe: bool) -> None:
        if self.current is None:
            with pytest.raises(RuntimeError, match="no task is in progress"):
                self.wsn.end_task()
            return
        with torch.inference_mode(inference):
            self.end_now(probe=X if probe else None)

    @rule(kind=st.sampled_from(list(OPTIMIZERS)), inference=st.booleans(), probe=st.booleans())
    def a_whole_task(self, kind: str, inference: bool, probe: bool) -> None:
        with torch.inference_mode(inference):
            self.in_a_task()
        self.train_some(2, kind)
        with torch.inference_mode(inference):
            self.end_now(probe=X if probe else None)

    @precondition(lambda self: self.current is not None)
    @rule()
    def keep_the_best_epoch(self) -> None:
        self.best = self.wsn.trainable_state()

    @precondition(lambda self: self.best is not None)
    @rule()
    def restore_the_best_epoch(self) -> None:
        assert self.best is not None
        self.wsn.load_trainable_state(self.best)

    @precondition(lambda self: self.known)
    @rule(data=st.data(), redraw_free=st.booleans(), inference=st.booleans())
    def remove(self, data: st.DataObject, redraw_free: bool, inference: bool) -> None:
        task = self.some(data)
        if self.current is not None:
            with pytest.raises(RuntimeError, match="is in progress"):
                self.wsn.remove_task(task)
            return
        with torch.inference_mode(inference):
            self.remove_now(task, redraw_free)

    @precondition(lambda self: self.current is None)
    @rule()
    def wrap_the_model_anew(self) -> None:
        owners = {**self.owners, "reinit_scores": self.wsn.reinit_scores}
        self.wsn = WSN(self.wsn.model, **owners, **self.settings)
        self.optimizer = None

    @precondition(lambda self: self.known)
    @rule(data=st.data())
    def read_past_a_layer(self, data: st.DataObject) -> None:
        """A hook that reads a whole weight is found with a probe, unless every task uses all of it. One that reads the
        attribute gets what the task uses."""
        name = data.draw(st.sampled_from(list(self.wsn.subnet_layers())), "layer")
        layer = self.wsn.subnet_layers()[name]

        def read(module: nn.Module, args: object, output: torch.Tensor) -> torch.Tensor:
            return output + layer.param("weight").sum()

        hook = layer.register_forward_hook(lambda module, args, output: output + layer.weight.sum())
        self.wsn.verify(probe=X)
        hook.remove()
        hook = layer.register_forward_hook(read)
        if all(layer.mask("weight", row).all() for row in range(len(self.known))):
            self.wsn.verify(probe=X)
        else:
            with pytest.raises(UnmaskedReadError, match=rf"\b{name}\.weight"):
                self.wsn.verify(probe=X)
        hook.remove()

    @precondition(lambda self: self.known)
    @rule(inputs=st.sampled_from(list(PROBES)), training=st.booleans())
    def probe(self, inputs: str, training: bool) -> None:
        self.wsn.train(training)
        self.wsn.verify(probe=PROBES[inputs](self.wsn))
