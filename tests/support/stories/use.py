"""Moves that compute with finished tasks."""

from __future__ import annotations

import warnings

import torch
from hypothesis import strategies as st
from hypothesis.stateful import precondition, rule
from small_models import batches
from torch import Tensor

from wsn_fast import to_dense
from wsn_fast.nn.task_ids import TaskId

from .story import Story, X


class Use(Story):
    """Finished tasks are used, one by one, several in a batch, and as models and programs of their own."""

    @rule(data=st.data())
    def use(self, data: st.DataObject) -> None:
        self.wsn.use_task(data.draw(st.sampled_from([None, *self.known]), "task"))

    @precondition(lambda self: self.known)
    @rule(data=st.data(), training=st.booleans())
    def use_in_blocks(self, data: st.DataObject, training: bool) -> None:
        self.wsn.train(training)
        with self.wsn.use_task(self.some(data)), self.wsn.use_head(self.some(data)):
            self.wsn.use_task(self.some(data))
            self.wsn(batches(7, 1)[0][0])

    @precondition(lambda self: self.known)
    @rule(data=st.data(), training=st.booleans(), gradients=st.booleans())
    def look_after_a_forward_pass(self, data: st.DataObject, training: bool, gradients: bool) -> None:
        """What is shown stays right while the task is in use."""
        task = self.some(data)
        with self.wsn.use_task(task), torch.set_grad_enabled(gradients):
            self.wsn.train(training)(batches(7, 1)[0][0])
            assert torch.equal(self.wsn.eval()(X), self.known[task])
            self.wsn.verify()

    @precondition(lambda self: self.known)
    @rule(data=st.data())
    def use_by_rows(self, data: st.DataObject) -> None:
        task = self.some(data)
        assert torch.equal(self.wsn.eval().forward_tasks(X, [task] * len(X), one_pass=False), self.known[task])

    @precondition(lambda self: self.known)
    @rule(first=st.integers(0, 5), one_pass=st.sampled_from([True, False, None]))
    def mix_tasks_in_a_batch(self, first: int, one_pass: bool | None) -> None:
        tasks = list(self.known)
        ids = [tasks[(first + row * row) % len(tasks)] for row in range(len(X))]
        self.wsn.eval()
        try:
            mixed = self.wsn.forward_tasks(X, ids, one_pass=one_pass)
        except ValueError as error:
            assert one_pass, error
            assert "one_pass is not possible" in str(error)
            return
        expected = torch.empty_like(mixed)
        for task in set(ids):
            expected[self._rows(ids, task)] = self._alone(X[self._rows(ids, task)], task)
        if one_pass is False:
            assert torch.equal(mixed, expected)
        torch.testing.assert_close(mixed, expected)

    @staticmethod
    def _rows(ids: list[TaskId], task: TaskId) -> list[int]:
        return [row for row, other in enumerate(ids) if other == task and type(other) is type(task)]

    @torch.no_grad()
    def _alone(self, x: Tensor, task: TaskId) -> Tensor:
        with self.wsn.use_task(task):
            return self.wsn(x)

    @precondition(lambda self: len(self.known) > 1)
    @rule(data=st.data())
    def use_under_autocast(self, data: st.DataObject) -> None:
        """PyTorch keeps casts of weights for as long as the block lasts."""
        tasks = [self.some(data) for _ in range(3)]
        self.wsn.eval()
        with torch.autocast("cpu", torch.bfloat16):
            together = [self._alone(X, task) for task in tasks]
        for task, output in zip(tasks, together, strict=True):
            with torch.autocast("cpu", torch.bfloat16):
                assert torch.equal(output, self._alone(X, task))

    @precondition(lambda self: self.known)
    @rule(data=st.data())
    def take_out_as_a_dense_model(self, data: st.DataObject) -> None:
        task = self.some(data)
        dense = to_dense(self.wsn, task).eval()
        self._keep_program(dense, task)

    @precondition(lambda self: self.known)
    @rule(data=st.data())
    def trace(self, data: st.DataObject) -> None:
        task = self.some(data)
        with self.wsn.eval().use_task(task), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.jit.trace(self.wsn, X, check_trace=False)
        self._keep_program(program, task)

    def _keep_program(self, program: torch.nn.Module, task: TaskId) -> None:
        """It has to compute what the task did, now and after every later move."""

        @torch.no_grad()
        def compute(x: Tensor) -> Tensor:
            return program(x)

        assert torch.equal(compute(X), self.known[task])
        self.programs = [*self.programs[-1:], (compute, self.known[task])]
