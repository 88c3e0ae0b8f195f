"""Optimizers as other people write them, in the ways that matter to a guard. None of them knows about masks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

Closure = Callable[[], Tensor]


def every(optimizer: Any) -> list[Tensor]:
    return [param for group in optimizer.param_groups for param in group["params"]]


@torch.no_grad()
def decay(params: list[Tensor]) -> None:
    for param in params:
        param.mul_(0.99)


class DecaysAfter(torch.optim.AdamW):
    """Calls its parent's step, around which hooks may run a second time, and writes afterwards."""

    def step(self, closure: Closure | None = None) -> Any:
        loss = super().step(closure)  # type: ignore[arg-type]
        decay([p for p in every(self) if p.grad is not None])
        return loss


class DecaysBefore(torch.optim.SGD):
    def __init__(self, params: Any) -> None:
        super().__init__(params, 0.05, momentum=0.9)

    def step(self, closure: Closure | None = None) -> Any:
        decay(every(self))
        return super().step(closure)  # type: ignore[arg-type]


class DecaysTwice(DecaysAfter):
    """Three levels of steps."""

    def step(self, closure: Closure | None = None) -> Any:
        decay(every(self))
        loss = super().step(closure)
        for param in every(self):
            param.data.mul_(0.99)  # autograd does not see this
        return loss


class Raises(torch.optim.AdamW):
    """Its inner step succeeds, then it writes and fails."""

    def step(self, closure: Closure | None = None) -> Any:
        super().step(closure)  # type: ignore[arg-type]
        decay(every(self))
        raise KeyboardInterrupt


class MuonLike(torch.optim.Optimizer):
    """Orthogonalises updates, and treats a missing gradient as zero, as programs for several devices do."""

    def __init__(self, params: Any, lr: float = 0.02) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Closure | None = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    p.grad = torch.zeros_like(p)
                momentum = self.state[p].setdefault("momentum", torch.zeros_like(p))
                update = momentum.lerp_(p.grad, 0.1)
                if update.ndim == 2:
                    u = update / (update.norm() + 1e-7)
                    update = 1.5 * u - 0.5 * u @ u.T @ u
                p.mul_(1 - 0.1 * group["lr"]).sub_(update, alpha=group["lr"])


class DecaysAll(torch.optim.Optimizer):
    """Decays what it holds, without looking at gradients, in the style of before ``torch.no_grad``."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {})

    def step(self, closure: Closure | None = None) -> None:
        for p in every(self):
            p.data.mul_(0.99).sub_(0.1 * (p.grad if p.grad is not None else 1e-3))


class WithoutHooks:
    """Derives from no class, has no hooks, and writes so that autograd does not see it."""

    def __init__(self, params: Any) -> None:
        self.param_groups = [{"params": list(params)}]

    def zero_grad(self, set_to_none: bool = True) -> None:
        for param in every(self):
            param.grad = None

    def step(self) -> None:
        for p in every(self):
            p.data.mul_(0.99).sub_(0.1 * (p.grad if p.grad is not None else 1e-3))


class FlatBuffer(torch.optim.Optimizer):
    """Updates one flat copy of all parameters and copies it back, as optimizers with sharded state do."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {})

    @torch.no_grad()
    def step(self, closure: Closure | None = None) -> None:
        params = every(self)
        flat = torch.cat([p.reshape(-1) for p in params]).mul_(0.995)
        flat -= 0.05 * torch.cat(
            [torch.zeros_like(p).reshape(-1) if p.grad is None else p.grad.reshape(-1) for p in params]
        )
        for p, new in zip(params, flat.split([p.numel() for p in params]), strict=True):
            p.copy_(new.view_as(p))


class SAM(torch.optim.Optimizer):
    """Sharpness-aware minimisation: it moves the weights, has the gradients computed there, and moves them back."""

    def __init__(self, params: Any, rho: float = 0.05) -> None:
        super().__init__(params, {"rho": rho})
        self.base_optimizer = torch.optim.AdamW(self.param_groups, 0.01)
        self.param_groups = self.base_optimizer.param_groups

    @torch.no_grad()
    def first_step(self) -> None:
        grads = [p.grad for p in every(self) if p.grad is not None]
        norm = torch.linalg.vector_norm(torch.stack([g.norm() for g in grads])) + 1e-12
        for p in every(self):
            if p.grad is not None:
                self.state[p]["old"] = p.detach().clone()
                p.add_(p.grad * (0.05 / norm))
        self.zero_grad()

    @torch.no_grad()
    def second_step(self) -> None:
        for p in every(self):
            if "old" in self.state[p]:
                p.copy_(self.state[p].pop("old"))
        self.base_optimizer.step()

    def step(self, closure: Closure | None = None) -> None:
        assert closure is not None
        with torch.enable_grad():
            closure()
        self.first_step()
        with torch.enable_grad():
            closure()
        self.second_step()


class Lookahead:
    """Keeps slow weights and now and then sets the fast ones to them. It derives from no class."""

    def __init__(self, inner: torch.optim.Optimizer) -> None:
        self.inner = inner
        self.slow = {p: p.detach().clone() for p in every(inner)}

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return self.inner.param_groups

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.inner.zero_grad(set_to_none)

    @torch.no_grad()
    def step(self, closure: Closure | None = None) -> Any:
        loss = self.inner.step(closure)  # type: ignore[arg-type]
        for p, slow in self.slow.items():
            slow.mul_(0.999).lerp_(p, 0.5)
            p.copy_(slow)
        return loss


class LookaheadOptimizer(torch.optim.Optimizer):
    """The same as a torch optimizer whose constructor is not called, so that it has no hooks."""

    def __init__(self, inner: torch.optim.Optimizer) -> None:
        self.optimizer = inner
        self.param_groups = inner.param_groups
        self.state = inner.state
        self.slow = {p: p.detach().clone() for p in every(inner)}

    zero_grad, step = Lookahead.zero_grad, Lookahead.step  # type: ignore[assignment]

    @property
    def inner(self) -> torch.optim.Optimizer:
        return self.optimizer


class LookaheadWithHooks(LookaheadOptimizer):
    """The same with hooks of its own."""

    def __init__(self, inner: torch.optim.Optimizer) -> None:
        torch.optim.Optimizer.__init__(self, inner.param_groups, {})
        super().__init__(inner)


class Delegate:
    """Passes on whatever it does not have itself, and writes after the step."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_inner"], name)

    def step(self, *args: Any) -> Any:
        loss = self._inner.step(*args)
        decay(every(self))
        return loss


class ScheduleFree(torch.optim.Optimizer):
    """Trains at one point and evaluates at another; ``eval`` and ``train`` move the weights from one to the other."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 0.05, "training": True})

    @torch.no_grad()
    def _move(self, weight: float) -> None:
        for p in every(self):
            if "z" in self.state[p]:
                p.lerp_(self.state[p]["z"], weight)

    def eval(self) -> None:
        self._move(1 - 1 / 0.9)

    def train(self) -> None:
        self._move(1 - 0.9)

    @torch.no_grad()
    def step(self, closure: Closure | None = None) -> None:
        for p in every(self):
            if p.grad is not None:
                z = self.state[p].setdefault("z", p.detach().clone())
                p.lerp_(z, 0.3)
                z.mul_(0.99).sub_(p.grad, alpha=0.05)


class Several:
    """One optimizer for matrices and one for the rest, as Muon is used."""

    def __init__(self, params: list[nn.Parameter]) -> None:
        self.parts = [
            MuonLike([p for p in params if p.ndim == 2]),
            DecaysAfter([p for p in params if p.ndim != 2], 0.01),
        ]

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return [group for part in self.parts for group in part.param_groups]

    def zero_grad(self, set_to_none: bool = True) -> None:
        for part in self.parts:
            part.zero_grad(set_to_none)

    def step(self, closure: Closure | None = None) -> None:
        for part in self.parts:
            part.step()
