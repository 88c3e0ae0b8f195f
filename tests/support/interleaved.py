"""Runs the programs of a launch in Triton's interpreter at the same time, as a GPU does: they take turns at random.

A program keeps its turn up to its next access to memory. So every order in which a GPU can make the accesses of several
programs may happen, as long as each program makes its own accesses in the order of the source. What is not shown is
whether the machine code keeps that order; ``tests/backends/test_memory_order.py`` looks at it.
"""

from __future__ import annotations

import inspect
import itertools
import random
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
from triton.runtime import interpreter

ACCESSES = ("create_masked_load", "create_masked_store", "create_atomic_rmw")


class Turns:
    """Programs that take turns, each in a thread of its own, of which only one runs at any time."""

    def __init__(self, programs: Sequence[tuple[tuple[int, int, int], Callable[[], object]]], choose: random.Random):
        self._choose = choose
        self._back = threading.Semaphore(0)
        self._mine = [threading.Semaphore(0) for _ in programs]
        self._left = list(range(len(programs)))
        self._errors: list[BaseException] = []
        self._places = [place for place, _ in programs]
        self._threads = [
            threading.Thread(target=self._work, args=(i, work), daemon=True) for i, (_, work) in enumerate(programs)
        ]
        self._number = {thread: i for i, thread in enumerate(self._threads)}

    def _work(self, i: int, work: Callable[[], object]) -> None:
        self._mine[i].acquire()
        try:
            work()
        except BaseException as error:  # it is raised where the launch is made
            self._errors.append(error)
        self._left.remove(i)
        self._back.release()

    def run(self) -> None:
        """Run all programs to their ends."""
        for thread in self._threads:
            thread.start()
        while self._left:
            i = self._choose.choice(self._left)
            interpreter.interpreter_builder.set_grid_idx(*self._places[i])
            self._mine[i].release()
            self._back.acquire()
        if self._errors:
            raise self._errors[0]

    def pass_on(self) -> None:
        """Called by a program: whose turn it is now is decided anew."""
        i = self._number.get(threading.current_thread())
        if i is not None:
            self._back.release()
            self._mine[i].acquire()


@contextmanager
def interleaved(seed: int) -> Iterator[None]:
    """While this lasts, the programs of every launch run at the same time."""
    choose, running = random.Random(seed), list[Turns]()

    def launch(executor: Any, *args: Any, **kwargs: Any) -> None:
        names = inspect.getfullargspec(executor.fn)
        kwargs = {key: value for key, value in kwargs.items() if key in names.args or key in names.kwonlyargs}
        args_host, kwargs_host = executor._init_args_hst(args, kwargs)
        patched = interpreter._patch_lang(executor.fn)
        try:
            given = inspect.getcallargs(executor.fn, *args_host, **kwargs_host)
            given = {
                name: value if name in executor.constexprs else interpreter._implicit_cvt(value)
                for name, value in given.items()
            }
            grid = (*executor.grid, 1, 1)[:3]
            interpreter.interpreter_builder.set_grid_dim(*grid)
            places = itertools.product(*map(range, grid))
            running.append(Turns([(place, partial(executor.fn, **given)) for place in places], choose))
            running[-1].run()
        finally:
            running.clear()
            if patched is not None:  # older versions of Triton patch for good
                patched.restore()
        executor._restore_args_dev(args, args_host, kwargs, kwargs_host)

    def access(name: str) -> Callable[..., Any]:
        original = getattr(interpreter.InterpreterBuilder, name)

        def taking_turns(*args: Any, **kwargs: Any) -> Any:
            for turns in running:
                turns.pass_on()
            return original(*args, **kwargs)

        return taking_turns

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter.GridExecutor, "__call__", launch)
        for name in ACCESSES:
            patch.setattr(interpreter.InterpreterBuilder, name, access(name))
        yield
