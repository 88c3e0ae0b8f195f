"""Every public argument that is True or False takes bools, and refuses anything else by its name and value."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import wsn_fast
import wsn_fast.optim
from wsn_fast import WSN, TaskHeads, convert
from wsn_fast.nn.linear import FastSubnetTransposedLinear
from wsn_fast.optim import SubnetAdamW, SubnetSGD

X = torch.randn(4, 6)


def net() -> nn.Module:
    return convert(nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 2)), density=0.4, heads="1")


def begun() -> WSN:
    wsn = WSN(net())
    wsn.begin_task(0)
    return wsn


def ended() -> WSN:
    wsn = begun()
    wsn.end_task()
    return wsn


def of_optimizer(kind: Any, **fixed: Any) -> dict[str, Callable[..., object]]:
    """The arguments of one of the two optimizers and of their methods."""
    name = kind.__name__
    own = [
        n
        for n in ("decoupled", "one_pass", "nesterov", "amsgrad", "maximize")
        if n in inspect.signature(kind).parameters
    ]
    return {f"{name}({n})": lambda value, n=n: kind(begun(), **(fixed | {n: value})) for n in own} | {
        f"{name}.clip_grad_norm_(error_if_nonfinite)": lambda value: kind(begun()).clip_grad_norm_(
            1.0, error_if_nonfinite=value
        ),
        f"{name}.zero_grad(set_to_none)": lambda value: kind(begun()).zero_grad(set_to_none=value),
        f"{name}.attach(one_pass)": lambda value: kind(wsn := begun()).attach(wsn, value, "float32"),
    }


CASES: dict[str, Callable[[Any], object]] = {
    "WSN(reinit_scores)": lambda value: WSN(net(), reinit_scores=value),
    "WSN(gates_ahead)": lambda value: WSN(net(), gates_ahead=value),
    "WSN.remove_task(redraw_free)": lambda value: ended().remove_task(0, redraw_free=value),
    "WSN.load_state_dict(strict)": lambda value: begun().load_state_dict(begun().state_dict(), strict=value),
    "WSN.load_state_dict(assign)": lambda value: begun().load_state_dict(begun().state_dict(), assign=value),
    "WSN.forward_tasks(one_pass)": lambda value: ended().forward_tasks(X, [0] * 4, one_pass=value),
    "WSN.infer_task(one_pass)": lambda value: ended().infer_task(X, one_pass=value),
    "TaskHeads(bias)": lambda value: TaskHeads(6, 2, bias=value),
    "TaskHeads.finish(anew)": lambda value: TaskHeads(6, 2).finish([], anew=value),
    "FastSubnetLinear(bias)": lambda value: wsn_fast.FastSubnetLinear(6, 5, value),
    "FastSubnetTransposedLinear(bias)": lambda value: FastSubnetTransposedLinear(6, 5, value),
    **{
        f"FastSubnetConv{transposed}{n}d(bias)": lambda value, kind=f"FastSubnetConv{transposed}{n}d": getattr(
            wsn_fast, kind
        )(2, 3, 3, bias=value)
        for transposed in ("", "Transpose")
        for n in (1, 2, 3)
    },
    **of_optimizer(SubnetAdamW),
    **of_optimizer(SubnetSGD, momentum=0.9),
}
REFUSED = {"amsgrad", "maximize"}
"""True is refused too, as the optimizers do not have it."""


def argument_of(case: str) -> str:
    return case.rpartition("(")[2].rstrip(")")


def bools_of(name: str, function: Any) -> Iterator[str]:
    for argument, parameter in inspect.signature(function).parameters.items():
        if re.search(r"\bbool\b", str(parameter.annotation)):
            yield f"{name}({argument})"


def public_bools() -> Iterator[str]:
    """Of what the packages export, and of their methods."""
    for package in (wsn_fast, wsn_fast.optim):
        for name in package.__all__:
            thing = getattr(package, name)
            if inspect.isfunction(thing):
                yield from bools_of(name, thing)
            elif inspect.isclass(thing):
                for method, function in inspect.getmembers(thing, inspect.isfunction):
                    ours = function.__module__.startswith("wsn_fast")
                    if ours and method == "__init__":
                        yield from bools_of(name, function)
                    elif ours and not method.startswith("_"):
                        yield from bools_of(f"{name}.{method}", function)


def test_every_public_bool_is_tested_here() -> None:
    internal = {"SubnetAdamW.protects(closure)", "SubnetSGD.protects(closure)"}  # the guard calls it
    assert {*public_bools()} - internal - {"WSN(keep_masked)"} <= CASES.keys()  # which may be a number, too


@pytest.mark.parametrize("value", ["no", "", 1, 0, 2.0, None, [True], torch.tensor(True)], ids=repr)
@pytest.mark.parametrize("case", CASES)
def test_what_is_no_bool_is_refused(case: str, value: Any) -> None:
    if argument_of(case) == "one_pass" and value is None:
        pytest.skip("None lets the library choose")
    message = f"{argument_of(case)} must be True or False, got {value!r}"
    with pytest.raises(TypeError, match=re.escape(message)):
        CASES[case](value)


@pytest.mark.parametrize("value", [True, False, np.True_, np.False_], ids=repr)
@pytest.mark.parametrize("case", CASES)
def test_bools_are_accepted(case: str, value: Any) -> None:
    if value and argument_of(case) in REFUSED:
        with pytest.raises(ValueError, match=f"{argument_of(case)} must be False, got True"):
            CASES[case](value)
    else:
        CASES[case](value)
