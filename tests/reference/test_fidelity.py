"""Three tasks trained by the library and by a plain transcription of the published algorithms, side by side.

In float64 masks must be the same at every step and parameters within 1e-9. In float32, where one flipped bit would send
the two apart, each step starts from a common state, and the library's error is held against the transcription's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wsn_fast import WSN, convert
from wsn_fast.optim.optimizers import SubnetAdamW, SubnetSGD
from wsn_fast.reference.trainer import Features, MakeOptimizer, ReferenceTrainer
from wsn_fast.train.config import PRESETS

TASKS, EPOCH = 3, 10  # steps between two looks at the validation loss
STEPS = pytest.mark.parametrize("steps", [100, pytest.param(300, marks=pytest.mark.slow)])  # of each task
CLASSES, BATCH = 3, 16
DENSITY = 0.37  # (1 - c)(n - 1) is not an integer for any tensor here: an interpolated quantile is exact by then
TOLERANCE = 1e-9


# --- the networks: a module for the library, a function of the masked tensors for the transcription
class Network(NamedTuple):
    build: Callable[[torch.dtype], nn.Sequential]
    head: str
    width: int
    shape: tuple[int, ...]
    features: Features


def build_mlp(dtype: torch.dtype) -> nn.Sequential:
    layers = (nn.Linear(18, 24), nn.ReLU(), nn.Linear(24, 14), nn.ReLU(), nn.Linear(14, CLASSES))
    return nn.Sequential(*layers).to(dtype)


def mlp_features(x: Tensor, t: Mapping[str, Tensor]) -> Tensor:
    hidden = F.relu(F.linear(x, t["0.weight"], t["0.bias"]))
    return F.relu(F.linear(hidden, t["2.weight"], t["2.bias"]))


def build_convnet(dtype: torch.dtype) -> nn.Sequential:
    convolutions = (nn.Conv2d(2, 5, 3, padding=1), nn.ReLU(), nn.Conv2d(5, 6, 3, stride=2, bias=False), nn.ReLU())
    linear = (nn.Flatten(), nn.Linear(24, 14), nn.ReLU(), nn.Linear(14, CLASSES))
    return nn.Sequential(*convolutions, *linear).to(dtype)


def convnet_features(x: Tensor, t: Mapping[str, Tensor]) -> Tensor:
    hidden = F.relu(F.conv2d(x, t["0.weight"], t["0.bias"], padding=1))
    hidden = F.relu(F.conv2d(hidden, t["2.weight"], stride=2)).flatten(1)
    return F.relu(F.linear(hidden, t["5.weight"], t["5.bias"]))


NETWORKS = {
    "mlp": Network(build_mlp, "4", 14, (18,), mlp_features),
    "convnet": Network(build_convnet, "7", 14, (2, 6, 6), convnet_features),
}


# --- the optimizers: the transcription's, and the ways to have the same with the library
TORCHS: dict[str, MakeOptimizer] = {
    "sgd": lambda params: torch.optim.SGD(params, 0.3),
    "momentum": lambda params: torch.optim.SGD(params, 0.05, momentum=0.9),
    "adam": lambda params: torch.optim.Adam(params, 0.01),
}
OURS: dict[str, tuple[str, Callable[[WSN], torch.optim.Optimizer]]] = {
    "sgd, guarded": ("sgd", lambda wsn: wsn.guard(TORCHS["sgd"](wsn.parameters()))),
    "momentum, guarded": ("momentum", lambda wsn: wsn.guard(TORCHS["momentum"](wsn.parameters()))),
    "adam, guarded": ("adam", lambda wsn: wsn.guard(TORCHS["adam"](wsn.parameters()))),
    "SubnetSGD, one pass": ("momentum", lambda wsn: SubnetSGD(wsn, 0.05, momentum=0.9, one_pass=True)),
    "SubnetAdamW": ("adam", lambda wsn: SubnetAdamW(wsn, 0.01)),
    "SubnetAdamW, one pass": ("adam", lambda wsn: SubnetAdamW(wsn, 0.01, one_pass=True)),
}

cases = pytest.mark.parametrize(
    ("preset", "network", "optimizer"), [(p, n, o) for p in PRESETS for n in NETWORKS for o in OURS]
)


# --- both sides
def start(preset: str, network: Network, dtype: torch.dtype) -> tuple[WSN, ReferenceTrainer]:
    """The library and the transcription, with the same weights and scores."""
    torch.manual_seed(7)
    settings = PRESETS[preset]
    model = convert(network.build(dtype), DENSITY, rule=settings["rule"], heads=network.head)
    wsn = WSN(model, reinit_scores=settings["reinit_scores"])
    gates = dict(wsn.gated())
    scores = {name: gate.score for name, gate in gates.items()}
    weights = {name: gate.param for name, gate in gates.items()}
    return wsn, ReferenceTrainer(preset, network.features, weights, scores, DENSITY)


def begin(wsn: WSN, plain: ReferenceTrainer, task: int, network: Network, optimizer: str) -> torch.optim.Optimizer:
    """Begin ``task`` on both sides, from one seed."""
    torchs, make = OURS[optimizer]
    dtype = next(iter(plain.weights.values())).dtype
    torch.manual_seed(task)
    wsn.begin_task(task)
    torch.manual_seed(task)
    plain.begin_task(task, nn.Linear(network.width, CLASSES, dtype=dtype), TORCHS[torchs])
    return make(wsn)


def step(wsn: WSN, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor) -> None:
    optimizer.zero_grad()
    F.cross_entropy(wsn(x), y).backward()
    optimizer.step()


def data(network: Network, task: int, dtype: torch.dtype) -> list[tuple[Tensor, Tensor]]:
    """The batches of an epoch and one for validation: clouds around the centres of classes, too wide to learn well."""
    generator = torch.Generator().manual_seed(100 + task)
    centres = torch.randn(CLASSES, *network.shape, generator=generator, dtype=torch.float64)
    batches = []
    for _ in range(EPOCH + 1):
        y = torch.randint(CLASSES, (BATCH,), generator=generator)
        noise = torch.randn(BATCH, *network.shape, generator=generator, dtype=torch.float64)
        batches.append(((0.4 * centres[y] + noise).to(dtype), y))
    return batches


def our_parameters(wsn: WSN) -> list[Tensor]:
    """In the order of the transcription's."""
    gates = [gate for _, gate in wsn.gated()]
    heads = [p for module in wsn.modules() if type(module) is nn.Linear for p in module.parameters()]
    return [*(g.param for g in gates), *(g.score for g in gates), *heads]


@torch.no_grad()
def assert_same_masks(wsn: WSN, plain: ReferenceTrainer, where: str) -> None:
    """Of the current scores."""
    theirs = plain.current_masks()
    for layer_name, layer in wsn.subnet_layers().items():
        for name, mask in layer.masks_of_scores().items():
            assert torch.equal(mask, theirs[f"{layer_name}.{name}"].bool()), f"{where}: mask of {layer_name}.{name}"


@torch.no_grad()
def assert_same(wsn: WSN, plain: ReferenceTrainer, where: str) -> None:
    assert_same_masks(wsn, plain, where)
    mine, other = (torch.cat([p.flatten() for p in side]) for side in (our_parameters(wsn), plain.parameters()))
    assert (mine - other).abs().max() <= TOLERANCE, f"{where}: a parameter"


def losses(wsn: WSN, plain: ReferenceTrainer, x: Tensor, y: Tensor) -> tuple[float, float]:
    """The validation loss on both sides."""
    with torch.no_grad():
        return F.cross_entropy(wsn(x), y).item(), F.cross_entropy(plain.logits(x), y).item()


@pytest.mark.sample(3)
@STEPS
@cases
def test_three_tasks_in_float64(preset: str, network: str, optimizer: str, steps: int) -> None:
    net = NETWORKS[network]
    wsn, plain = start(preset, net, torch.float64)
    for task in range(TASKS):
        opt = begin(wsn, plain, task, net, optimizer)
        *batches, (x_val, y_val) = data(net, task, torch.float64)
        best = plain_best = math.inf
        for number, (x, y) in enumerate(steps // EPOCH * batches, 1):
            step(wsn, opt, x, y)
            plain.step(x, y)
            assert_same(wsn, plain, f"task {task}, step {number}")
            if number % EPOCH == 0:
                loss, plain_loss = losses(wsn, plain, x_val, y_val)
                if loss < best:
                    best, kept = loss, wsn.trainable_state()
                if plain_loss < plain_best:
                    plain_best, plain_kept = plain_loss, plain.state()
        wsn.load_trainable_state(kept)
        plain.restore(plain_kept)
        wsn.end_task()
        plain.end_task()
        assert_same(wsn, plain, f"end of task {task}")
    for task in range(TASKS):
        with wsn.use_task(task), torch.no_grad():
            torch.testing.assert_close(wsn(x_val), plain.logits(x_val, task), rtol=0, atol=TOLERANCE)
    wsn.verify()


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("preset", PRESETS)
def test_the_training_compared_is_no_trivial_one(preset: str, network: str) -> None:
    """Masks move, later tasks take up frozen weights, and the best epoch is not the last: or little was compared."""
    net = NETWORKS[network]
    wsn, plain = start(preset, net, torch.float64)
    moved, best_epochs = [], []
    for task in range(TASKS):
        begin(wsn, plain, task, net, "adam, guarded")
        before = plain.current_masks()
        validation = []
        *batches, (x_val, y_val) = data(net, task, torch.float64)
        for number, (x, y) in enumerate(10 * batches, 1):
            plain.step(x, y)
            if number % EPOCH == 0:
                validation.append(F.cross_entropy(plain.logits(x_val), y_val).item())
        best_epochs.append(validation.index(min(validation)))
        moved += [(mask != before[name]).any() for name, mask in plain.current_masks().items() if "weight" in name]
        reused = [(plain.used[name] & mask.bool()).any() for name, mask in plain.current_masks().items()]
        wsn.end_task()
        plain.end_task()
    assert all(moved)
    assert all(reused), "of the last task"
    assert min(best_epochs) < len(validation) - 1


# --- float32, step by step from a common state
def values(params: list[Tensor], gated: int, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Parameters of each kind, and what the optimizer keeps of their gradients, flat, in float64."""
    found = {"weights": params[:gated], "scores": params[gated : 2 * gated], "head": params[-2:]}
    for kind, some in list(found.items()):
        kept = [optimizer.state[p] for p in some]
        moments = [key for key in ("momentum_buffer", "exp_avg", "exp_avg_sq") if kept[0].get(key) is not None]
        found |= {f"{key} of {kind}": [state[key] for state in kept] for key in moments}
    return {name: torch.cat([t.detach().double().flatten() for t in some]) for name, some in found.items()}


@torch.no_grad()
def adopt(plain: ReferenceTrainer, params: list[Tensor], optimizer: torch.optim.Optimizer) -> None:
    """Give the transcription the library's parameters and the state of its optimizer, in its own dtype."""
    for own, param in zip(plain.parameters(), params, strict=True):
        own.copy_(param)
        plain.optimizer.state[own] = {
            key: value if value is None else value.to(torch.float32 if key == "step" else own.dtype, copy=True)
            for key, value in optimizer.state[param].items()
        }


class Errors:
    """The 2x rule: our error against float64 at most twice that of plain PyTorch in float32.

    In a step, beside a rounding of the values, since plain PyTorch is at times exact by luck; over many steps, as such.
    """

    def __init__(self) -> None:
        self._ours: dict[str, list[Tensor]] = {}
        self._theirs: dict[str, list[Tensor]] = {}

    def add(self, ours: dict[str, Tensor], theirs: dict[str, Tensor], right: dict[str, Tensor], where: str) -> None:
        for kind, true in right.items():
            error, plain = (ours[kind] - true).norm(), (theirs[kind] - true).norm()
            allowed = 2 * plain + torch.finfo(torch.float32).eps * true.norm()
            assert error <= allowed, f"{where}, {kind}: {error:.3g}, {allowed:.3g} allowed"
            self._ours.setdefault(kind, []).append(error)
            self._theirs.setdefault(kind, []).append(plain)

    def check(self, where: str) -> None:
        for kind, found in self._ours.items():
            error, allowed = torch.stack(found).norm(), 2 * torch.stack(self._theirs[kind]).norm()
            assert error <= allowed, f"{where}, {kind}: {error:.3g}, {allowed:.3g} allowed"


@pytest.mark.sample(3)
@cases
def test_each_step_in_float32_is_as_exact_as_plain_pytorch(preset: str, network: str, optimizer: str) -> None:
    net = NETWORKS[network]
    wsn, plain = start(preset, net, torch.float32)
    _, exact = start(preset, net, torch.float64)
    gated = len(plain.weights)
    for task in range(TASKS):
        opt = begin(wsn, plain, task, net, optimizer)
        exact.begin_task(task, nn.Linear(net.width, CLASSES, dtype=torch.float64), TORCHS[OURS[optimizer][0]])
        errors = Errors()
        for number, (x, y) in enumerate(3 * data(net, task, torch.float32)[:EPOCH]):
            for side in (plain, exact):
                adopt(side, our_parameters(wsn), opt)
            assert_same_masks(wsn, exact, f"task {task}, step {number}")
            step(wsn, opt, x, y)
            plain.step(x, y)
            exact.step(x.double(), y)
            ours = values(our_parameters(wsn), gated, opt)
            theirs, right = (values(side.parameters(), gated, side.optimizer) for side in (plain, exact))
            errors.add(ours, theirs, right, f"task {task}, step {number}")
        errors.check(f"task {task}")
        wsn.end_task()
        for side in (plain, exact):
            adopt(side, our_parameters(wsn), opt)
            side.end_task()
    wsn.verify()
