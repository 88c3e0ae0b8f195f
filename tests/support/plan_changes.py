"""Whatever may change between two steps of an optimizer, done to a subnet optimizer and to torch's optimizer under the
guard, which then have to train alike."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from optimizer_pairs import batch, pairs_of
from torch import Tensor, nn

from wsn_fast import WSN, convert
from wsn_fast.optim.step_plan import StepPlan
from wsn_fast.optim.subnet_optimizer import SubnetOptimizer


@dataclass
class Run:
    """A model in training with one optimizer for all tasks."""

    wsn: WSN
    optimizer: Any
    seed: int = 0
    snapshot: Any = None
    masks: list[Tensor] = field(default_factory=list)
    plans: list[StepPlan] = field(default_factory=list)  # of a subnet optimizer: the one of every step

    def step(
        self,
        without: Callable[[Run], list[Tensor]] = lambda run: [],
        before: Callable[[], object] = lambda: None,
    ) -> None:
        """A step. The gradients of ``without`` are None in it."""
        self.optimizer.zero_grad()
        x, y = (part.to(self.weight().device) for part in batch(0, self.seed, self.weight().dtype))
        F.cross_entropy(self.wsn(x), y).backward()
        for param in without(self):
            param.grad = None
        before()
        self.optimizer.step()
        self.seed += 1
        self.plans += [self.optimizer._planner._last] if isinstance(self.optimizer, SubnetOptimizer) else []
        self.masks += [m for layer in self.wsn.subnet_layers().values() for m in layer.masks_of_scores().values()]

    def layer(self, name: str = "0") -> Any:
        return self.wsn.subnet_layers()[name]

    def weight(self, name: str = "0") -> Tensor:
        weight: Tensor = self.layer(name).weight
        return weight

    def state(self, param: Tensor) -> dict[str, Any]:
        state: dict[str, Any] = self.optimizer.state[param]
        return state

    def tensors(self) -> dict[str, Tensor]:
        """The parameters and their states. Empty states count as none."""
        found = {}
        for name, param in self.wsn.named_parameters():
            found[name] = param.detach()
            for key, value in self.optimizer.state.get(param, {}).items():
                found |= {f"{key} of {name}": value} if isinstance(value, Tensor) else {}
        return found


def make_run(
    kind: str,
    one_pass: bool,
    ours: bool,
    backend: str | None,
    dtype: torch.dtype = torch.float64,
    heads: str | None = "4",
    device: torch.device | None = None,
) -> Run:
    """In its first task; ``ours`` says whether the optimizer is ours or torch's, which uses the torch backend."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(9, 14), nn.Tanh(), nn.Linear(14, 7), nn.Tanh(), nn.Linear(7, 3)).to(device, dtype)
    wsn = WSN(convert(net, density=0.4, heads=heads))
    for layer in wsn.subnet_layers().values():
        layer.backend = backend if ours else "torch"
    wsn.begin_task(0)
    return Run(wsn, pairs_of(one_pass)[kind][ours](wsn))


# --- changes: each is made between two steps
def next_task(run: Run) -> None:
    """The union comes into being, or grows in its place."""
    run.wsn.end_task()
    torch.manual_seed(run.seed)  # for the new head
    run.wsn.begin_task(run.seed)
    known = {id(param) for group in run.optimizer.param_groups for param in group["params"]}
    head = [param for param in run.wsn.parameters() if param.requires_grad and id(param) not in known]
    run.optimizer.add_param_group({"params": head, "weight_decay": 0.1})
    run.wsn.guard(run.optimizer)


def next_task_in_place(run: Run) -> None:
    """The new head takes the place of the old one in its param group."""
    group = run.optimizer.param_groups[0]
    gated = {id(param) for layer in run.wsn.subnet_layers().values() for param in layer.parameters()}
    places = [i for i, param in enumerate(group["params"]) if id(param) not in gated]
    old = {id(group["params"][i]) for i in places}
    run.wsn.end_task()
    torch.manual_seed(run.seed)
    run.wsn.begin_task(run.seed)
    head = [p for p in run.wsn.parameters() if p.requires_grad and id(p) not in gated | old]
    for i, param in zip(places, head, strict=True):
        group["params"][i] = param


def another_density(run: Run) -> None:
    run.layer().density = 0.7


def another_density_of_the_task(run: Run) -> None:
    run.layer("2").task_density = 0.2


def another_rule(run: Run) -> None:
    run.layer().rule = "value"


def other_states(run: Run) -> None:
    """All states become other tensors, and in those of the weight all numbers are others."""
    for param, state in run.optimizer.state.items():
        for key, value in state.items():
            state[key] = value.clone() if isinstance(value, Tensor) else value
            if param is run.weight() and isinstance(value, Tensor) and value.ndim:
                state[key] *= 0.5


def another_state_of_the_scores(run: Run) -> None:
    state = run.state(run.layer().weight_score)
    for key in ("exp_avg_sq", "momentum_buffer"):
        if key in state:
            state[key] = state[key] * 3


def another_number_of_steps(run: Run) -> None:
    state = run.state(run.layer("2").weight_score)
    if "step" in state:
        state["step"] = torch.full_like(state["step"], 40.0)


def no_state(run: Run) -> None:
    """As if the weight had never been updated."""
    run.optimizer.state.pop(run.weight())


def data_of_a_weight(run: Run) -> None:
    run.weight().data = run.weight().data * 0.9


def data_of_scores(run: Run) -> None:
    score = run.layer("2").weight_score
    score.data = -score.data


def data_of_a_mean(run: Run) -> None:
    state = run.state(run.weight())
    for key in ("exp_avg", "momentum_buffer"):
        if key in state:
            state[key].data = state[key].data * 0.5


def remember(run: Run) -> None:
    run.snapshot = copy.deepcopy(run.optimizer.state_dict())


def load(run: Run) -> None:
    run.optimizer.load_state_dict(run.snapshot)


def other_groups(run: Run) -> None:
    """The parameters of a layer get a learning rate of their own."""
    layer = {id(param) for param in run.layer("2").parameters()}
    moved = []
    for group in run.optimizer.param_groups:
        moved += [param for param in group["params"] if id(param) in layer]
        group["params"] = [param for param in group["params"] if id(param) not in layer]
    run.optimizer.add_param_group({"params": moved, "lr": 0.02, "weight_decay": 0.0})


def guarded_again(run: Run) -> None:
    """One layer is left to torch, then another one."""
    for name in ("0", "2"):
        for each in ("0", "2"):
            run.weight(each).requires_grad_(each != name)
        run.wsn.guard(run.optimizer)
    for param in run.layer("2").parameters():
        param.grad = None


def set_all(name: str, value: Any, groups: slice = slice(None)) -> Callable[[Run], None]:
    def change(run: Run) -> None:
        for group in run.optimizer.param_groups[groups]:
            group[name] = value

    return change


SCORES = slice(1, 2)  # the second param group has the scores
CHANGES: dict[str, tuple[Callable[[Run], None], ...]] = {
    "a union appears and grows": (next_task, next_task),
    "a head takes the place of another": (next_task_in_place, next_task_in_place),
    "density": (another_density,),
    "density of the task": (another_density_of_the_task,),
    "rule": (another_rule,),
    "other states": (other_states,),
    "another state of the scores": (another_state_of_the_scores,),
    "no state": (no_state,),
    "data of a weight": (data_of_a_weight,),
    "data of scores": (data_of_scores,),
    "data of a running mean": (data_of_a_mean,),
    "a state is loaded": (remember, load),
    "other groups": (other_groups,),
    "layers left to torch": (guarded_again,),
}
ADAMW_CHANGES = {"another number of steps": (another_number_of_steps,)}
SGD_CHANGES = {
    "no momentum, and again": (set_all("momentum", 0.0), set_all("momentum", 0.9)),
    "no momentum of the scores, and again": (set_all("momentum", 0.0, SCORES), set_all("momentum", 0.8, SCORES)),
}
NESTEROV_FREE_CHANGES = {
    "momentum": (set_all("momentum", 0.9), set_all("momentum", 0.0), set_all("momentum", 0.5)),
    "momentum of the scores": (set_all("momentum", 0.9, SCORES),),
}
CASES = [
    (kind, change)
    for kind, more in (("adamw", ADAMW_CHANGES), ("dampened", SGD_CHANGES), ("sgd", NESTEROV_FREE_CHANGES))
    for change in (*(CHANGES if kind != "sgd" else ()), *more)
]
ALL_CHANGES = CHANGES | ADAMW_CHANGES | SGD_CHANGES | NESTEROV_FREE_CHANGES


# --- steps in which gradients are missing
def of_a_layer(run: Run) -> list[Tensor]:
    return list(run.layer("2").parameters())


def of_a_weight(run: Run) -> list[Tensor]:
    """In the standard mode its scores are then left to torch."""
    return [run.weight("2")]


def of_the_rest(run: Run) -> list[Tensor]:
    gated = {id(param) for layer in run.wsn.subnet_layers().values() for param in layer.parameters()}
    return [param for param in run.wsn.parameters() if id(param) not in gated]


def of_all(run: Run) -> list[Tensor]:
    return list(run.wsn.parameters())


MISSING = {"a layer": of_a_layer, "a weight": of_a_weight, "the rest": of_the_rest, "everything": of_all}


def train(run: Run, change: str, steps: int = 3) -> None:
    """Some steps, and as many more after each part of the change."""
    for part in (lambda run: None, *ALL_CHANGES[change]):
        part(run)
        for _ in range(steps):
            run.step()


def assert_alike(mine: Run, theirs: Run, atol: float) -> None:
    """The masks of all steps are the same, and parameters and states are close."""
    for i, (a, b) in enumerate(zip(mine.masks, theirs.masks, strict=True)):
        assert torch.equal(a, b), f"mask {i}"
    found, expected = mine.tensors(), theirs.tensors()
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        error = (found[name].double() - value.double()).abs().max()
        assert error <= atol, f"{name}: {error:.3g}"
