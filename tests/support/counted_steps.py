"""Steps as users write them, to be counted and timed on the stand-in for a GPU: training in every mode, and evaluation.

``benchmarks/launches.py`` measures these steps, and ``tests/optim/test_launches.py`` holds their counts down.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from stand_in_cuda import StandIn
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import wsn_fast.optim.capture as capture
from wsn_fast import WSN, capture_step, convert
from wsn_fast.backends import choice
from wsn_fast.continual.model_parts import ModelParts
from wsn_fast.continual.register import TaskRegister
from wsn_fast.optim import SubnetAdamW

OPTIMIZERS: dict[str, Callable[[WSN], torch.optim.Optimizer]] = {
    "standard": lambda wsn: SubnetAdamW(wsn, 1e-3),
    "guarded": lambda wsn: wsn.guard(torch.optim.AdamW(wsn.parameters(), 1e-3, fused=True)),
    "one-pass": lambda wsn: SubnetAdamW(wsn, 1e-3, one_pass=True),
}
CODED: dict[str, Callable[[WSN], torch.optim.Optimizer]] = {
    "one-pass, 8bit": lambda wsn: SubnetAdamW(wsn, 1e-3, one_pass=True, moments="8bit"),
    "one-pass, bfloat16": lambda wsn: SubnetAdamW(wsn, 1e-3, one_pass=True, moments="bfloat16"),
    "standard, 8bit": lambda wsn: SubnetAdamW(wsn, 1e-3, moments="8bit"),
}
"""Modes whose running means are stored in fewer bytes."""
CAPTURED = {"captured": "one-pass", "captured-standard": "standard", "captured-guarded": "guarded"}
"""The modes that capture the step of another mode."""
BASELINE_OF = {**dict.fromkeys((*OPTIMIZERS, *CAPTURED), "dense"), "evaluation": "dense-evaluation"}
"""All modes, each with the dense one that it is compared with: plain layers and torch's fused AdamW."""

Step = Callable[[], object]


def mlp(layers: int, size: int = 32) -> nn.Sequential:
    """Linear layers with bias, and a ReLU after each."""
    return nn.Sequential(*(module for _ in range(layers) for module in (nn.Linear(size, size), nn.ReLU())))


class IdleGraph:
    """A graph whose recording refuses to load modules, as CUDA does, and whose replay does nothing."""

    def __init__(self, stand_in: StandIn) -> None:
        self._stand_in = stand_in

    def record(self, work: Callable[[], Tensor]) -> Tensor:
        before = len(self._stand_in.launches())
        with self._stand_in.capturing():
            loss = work()
        assert len(self._stand_in.launches()) > before
        return loss

    def replay(self) -> None:
        pass


def allow_steps(stand_in: StandIn, monkeypatch: Any) -> None:
    """Let steps run although nothing is computed: values may be anything, and a step on CPU tensors may be captured."""
    monkeypatch.setattr(ModelParts, "check_finite", lambda self: None)
    monkeypatch.setattr(ModelParts, "check_initialised", lambda self: None)
    monkeypatch.setattr(TaskRegister, "check_frozen", lambda self, *_: None)
    monkeypatch.setattr(capture, "obstacle_of", lambda device: "")
    monkeypatch.setattr(capture, "new_graph", lambda: IdleGraph(stand_in))


def subnet(net: nn.Module, head: str | None = None, **owners: Any) -> WSN:
    """A model as the driver makes it: gates are made ahead."""
    return WSN(convert(net, density=0.5, heads=head), gates_ahead=True, **owners)


def _train(net: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor) -> None:
    optimizer.zero_grad()
    net(x).square().mean().backward()
    optimizer.step()


@torch.no_grad()
def _evaluate(net: nn.Module, x: Tensor) -> None:
    net(x)


def dense_step(mode: str, net: nn.Module, x: Tensor) -> Step:
    """The step of ``dense`` or ``dense-evaluation``."""
    if mode == "dense-evaluation":
        return partial(_evaluate, net.eval(), x)
    return partial(_train, net, torch.optim.AdamW(net.parameters(), 1e-3, fused=True), x)


def training_step(mode: str, wsn: WSN, x: Tensor) -> Step:
    """A training step of the task in progress."""
    optimizer = (OPTIMIZERS | CODED)[CAPTURED.get(mode, mode)](wsn)
    if mode not in CAPTURED:
        return partial(_train, wsn, optimizer, x)
    return partial(capture_step(wsn, optimizer, lambda x: wsn(x).square().mean()), x)


def step_of(mode: str, wsn: WSN, x: Tensor) -> Step:
    """A training step of the second task, or for ``evaluation`` a forward pass with the first one, which is in use."""
    wsn.begin_task(0)
    wsn.end_task()
    if mode == "evaluation":
        wsn.eval().use_task(0)
        return partial(_evaluate, wsn, x)
    wsn.begin_task(1)
    return training_step(mode, wsn, x)


def warm_up(step: Step, stand_in: StandIn) -> None:
    """As many steps as a capture needs, and one more. The launches of the last one stay written down: those of the
    graph if the step was captured."""
    for _ in range(capture.WARM_UP + 1):
        stand_in.forget()
        step()
    captured = getattr(step, "func", None)
    assert not isinstance(captured, capture.CapturedStep) or captured.captured, captured.reason


class Operators(TorchDispatchMode):
    """Counts the operators of torch that would launch a kernel on a GPU, by name. The rule goes by an operator's
    schema: it launches if it returns a new tensor or writes to an argument. Views do neither. Those in ``FREE`` return
    a new tensor, and on a GPU launch nothing. Foreach and fused operators count once for any number of tensors."""

    FREE = frozenset(
        ("empty", "empty_like", "empty_strided", "empty_permuted", "new_empty", "new_empty_strided", "_unsafe_view")
    )
    METADATA = frozenset(("set_", "resize_"))  # they write, but to the description of a tensor only

    def __init__(self, monkeypatch: Any) -> None:
        super().__init__()
        self.launching: Counter[str] = Counter()
        self.waits = 0  # copies of a value to the host, which wait for the device
        # While a dispatch mode is on, the library would take the operators that such a mode can see.
        monkeypatch.setattr(choice, "_modes", lambda: 0)

    @classmethod
    def launches(cls, operator: torch._ops.OpOverload) -> bool:
        name, schema = operator.overloadpacket.__name__, operator._schema
        writes = any(a.alias_info is not None and a.alias_info.is_write for a in schema.arguments)
        makes = any(r.alias_info is None and "Tensor" in str(r.type) for r in schema.returns)
        return name not in cls.FREE | cls.METADATA and (writes or makes)

    def __torch_dispatch__(
        self, func: Any, types: object, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        name = func.overloadpacket.__name__
        self.launching[name] += self.launches(func)
        self.waits += name == "_local_scalar_dense"
        return func(*args, **(kwargs or {}))
