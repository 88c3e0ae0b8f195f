"""What PyTorch allocates while something runs, inside its operators too, and steps of which that is looked at."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from wsn_fast import WSN, convert
from wsn_fast.optim import SubnetAdamW, SubnetSGD

OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adamw": lambda wsn, **how: SubnetAdamW(wsn, 0.01, weight_decay=0.1, **how),
    "sgd": lambda wsn, **how: SubnetSGD(wsn, 0.05, momentum=0.9, weight_decay=0.1, **how),
    "guarded": lambda wsn: wsn.guard(torch.optim.AdamW(wsn.parameters(), 0.01)),
}


def allocations(work: Callable[[], object], least: int) -> list[str]:
    """Each allocation of at least so many bytes while ``work`` runs, as its bytes and the operators that run then."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    events = profiler.profiler.kineto_results.events()
    operators = [(one.start_ns(), one.start_ns() + one.duration_ns(), one.name()) for one in events]
    found = []
    for one in events:
        if one.name() == "[memory]" and one.nbytes() >= least:
            now = one.start_ns()
            around = [name for start, end, name in operators if start <= now <= end and name != "[memory]"]
            found.append(f"{one.nbytes()} bytes in {' > '.join(around[-3:])}")
    return found


class Run(NamedTuple):
    """A model in its second task, of which each large weight has :attr:`size` elements or more."""

    wsn: WSN
    optimizer: Any
    x: Tensor

    @property
    def size(self) -> int:
        return min(gate.param.numel() for _, gate in self.wsn.gated() if gate.param.ndim > 1)

    @property
    def grad(self) -> Tensor:
        """The gradient of the weight."""
        (layer,) = self.wsn.subnet_layers().values()
        return layer.weight.grad

    def backward(self, autocast: torch.dtype | None = None) -> None:
        with torch.autocast(self.x.device.type, autocast) if autocast else nullcontext():
            y = self.wsn(self.x)
        y.float().square().mean().backward()

    def step(self, passes: int = 1, clip: bool = False, autocast: torch.dtype | None = None) -> None:
        self.optimizer.zero_grad()
        for _ in range(passes):
            self.backward(autocast)
        if clip:
            self.optimizer.clip_grad_norm_(0.01)
        self.optimizer.step()


def make_run(
    kind: str, side: int, dtype: torch.dtype, backend: str | None, device: torch.device | str = "cpu", *,
    ahead: bool = True, net: Callable[[int], nn.Module] = lambda side: nn.Linear(side, side), **how: Any,
) -> Run:  # fmt: skip
    """A run whose model has one layer of ``side`` inputs. ``ahead`` and ``how`` are of the WSN and the optimizer."""
    torch.manual_seed(0)
    model = nn.Sequential(net(side)).to(device, dtype)
    wsn = WSN(convert(model, density=0.4), gates_ahead=ahead)
    for layer in wsn.subnet_layers().values():
        layer.backend = backend
    wsn.begin_task(0)
    wsn.end_task()
    wsn.begin_task(1)
    return Run(wsn, OPTIMIZERS[kind](wsn, **how), torch.randn(8, side, device=device, dtype=dtype))
