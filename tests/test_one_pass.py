"""The one-pass mode trains as the standard mode does, whatever a training loop does with gradients and optimizers."""

from __future__ import annotations

import contextlib
import copy
import gc
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from elementwise import assert_same_bits
from torch import Tensor, nn

from wsn_fast import WSN, convert, ops
from wsn_fast.backends import choose
from wsn_fast.backends import torch as portable
from wsn_fast.optim import SubnetAdamW, SubnetSGD

KINDS: dict[str, Callable[..., Any]] = {
    "adamw": lambda wsn, **how: SubnetAdamW(wsn, 0.01, weight_decay=0.1, **how),
    "adam": lambda wsn, **how: SubnetAdamW(wsn, 0.01, weight_decay=0.1, decoupled=False, **how),
    "sgd": lambda wsn, **how: SubnetSGD(wsn, 0.05, weight_decay=0.1, **how),
    "momentum": lambda wsn, **how: SubnetSGD(wsn, 0.05, momentum=0.9, dampening=0.5, weight_decay=0.1, **how),
    "nesterov": lambda wsn, **how: SubnetSGD(wsn, 0.05, momentum=0.9, nesterov=True, **how),
}
RULES = ("magnitude", "value")
MODES = pytest.mark.parametrize("one_pass", [True, False], ids=["one pass", "standard"])
CLIP = 0.3
KINDS_AND_BACKENDS = pytest.mark.parametrize(
    ("kind", "backend"),
    [*((kind, "native") for kind in KINDS), ("adamw", "torch"), ("nesterov", "torch")],
    indirect=["backend"],
)


@pytest.fixture(params=["torch", "native"])
def backend(request: pytest.FixtureRequest) -> str:
    if choose("adamw_step", "cpu", torch.float32, request.param).name != request.param:
        pytest.skip(f"the {request.param} backend is not here")
    name: str = request.param
    return name


def make_wsn(rule: str = "magnitude", dtype: torch.dtype = torch.float64, backend: str | None = None) -> WSN:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(9, 14), nn.ReLU(), nn.Linear(14, 7), nn.ReLU(), nn.Linear(7, 3)).to(dtype)
    wsn = WSN(convert(net, density=0.4, heads="4", rule=rule))
    for layer in wsn.subnet_layers().values():
        layer.backend = backend
    return wsn


def batch(task: int, step: int) -> tuple[Tensor, Tensor]:
    """Inputs that bfloat16 holds exactly, in float64, and labels."""
    generator = torch.Generator().manual_seed(1000 * task + step)
    x = torch.randn(16, 9, generator=generator).bfloat16().double()
    return x, torch.randint(3, (16,), generator=generator)


def backward(wsn: WSN, task: int = 1, step: int = 0, scale: float = 1.0, autocast: torch.dtype | None = None) -> Tensor:
    x, y = batch(task, step)
    with torch.autocast("cpu", autocast) if autocast else contextlib.nullcontext():
        logits = wsn(x.to(next(wsn.parameters()).dtype))
    loss = F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), y) * scale
    loss.backward()
    return loss.detach()


def begun(kind: str = "adamw", one_pass: bool = True, rule: str = "magnitude", **how: Any) -> tuple[WSN, Any]:
    """In its second task, of which one step is done; standard and one-pass alike but for rounding."""
    wsn = make_wsn(rule, **how)
    for task in range(2):
        torch.manual_seed(task)  # for the new head
        wsn.begin_task(task)
        optimizer = KINDS[kind](wsn, one_pass=one_pass)
        backward(wsn, task)
        optimizer.step()
        optimizer.zero_grad()
        if task == 0:
            wsn.end_task()
    return wsn, optimizer


def both(kind: str = "adamw", **how: Any) -> list[tuple[WSN, Any]]:
    """The one-pass mode, and the standard mode from the same state."""
    return [begun(kind, one_pass, **how) for one_pass in (True, False)]


def layer_of(wsn: WSN, name: str = "0") -> Any:
    return wsn.subnet_layers()[name]


def masks(wsn: WSN) -> list[Tensor]:
    return [m for layer in wsn.subnet_layers().values() for m in layer.masks_of_scores().values()]


def union_of(wsn: WSN) -> dict[str, Tensor]:
    """Of each gated tensor, True where a finished task uses it."""
    return {
        name: portable.unpack(gate.union, gate.param.numel()).view(gate.param.shape)
        for name, gate in wsn.gated()
        if gate.union is not None
    }


def frozen_of(wsn: WSN, union: dict[str, Tensor]) -> list[Tensor]:
    return [gate.param.detach()[union[name]] for name, gate in wsn.gated()]


def snapshot(wsn: WSN) -> list[Tensor]:
    return [p.detach().clone() for p in wsn.parameters()]


def assert_close(mine: WSN, theirs: WSN, atol: float = 1e-12) -> None:
    for (name, a), b in zip(mine.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=atol, equal_nan=True, msg=lambda m, name=name: f"{name}: {m}")


def assert_ready(wsn: WSN, *, stamped: bool = True) -> None:
    """What is ready for the next forward pass is the gate of the scores of now."""
    for name, layer in wsn.subnet_layers().items():
        for gate in layer.gated():
            ready = layer.ready[gate.name]
            how = (layer.gate_density, layer.rule, ready.masked.dtype, layer.backend)
            masked, tau = ops.gate(gate.param.detach(), gate.score.detach(), *how)
            assert_same_bits(ready.tau, tau, f"tau of {name}.{gate.name}")
            assert_same_bits(ready.masked, masked, f"masked {name}.{gate.name}")
            assert not stamped or ready.stamp == layer.stamp(gate.param, gate.score)


# --- the same training
def two_tasks(wsn: WSN, kind: str, one_pass: bool, steps: int) -> Iterator[tuple[list[Tensor], Tensor]]:
    """Two tasks with accumulation and clipping: masks and norm at every step. What the first task uses stays."""
    kept: list[Tensor] = []
    union: dict[str, Tensor] = {}
    for task in range(2):
        torch.manual_seed(task)  # for the new head
        wsn.begin_task(task)
        optimizer = KINDS[kind](wsn, one_pass=one_pass)
        for step in range(steps):
            for part in range(1 + step % 2):
                backward(wsn, task, 2 * step + part)
            norm = optimizer.clip_grad_norm_(CLIP)
            optimizer.step()
            optimizer.zero_grad()
            if one_pass and step % 5 == 0:
                assert_ready(wsn)
            yield masks(wsn), norm
        wsn.end_task()
        for before, now in zip(kept, frozen_of(wsn, union) if kept else (), strict=True):
            assert_same_bits(now, before, "what the first task uses")
        union = union_of(wsn)
        kept = [x.clone() for x in frozen_of(wsn, union)]
    wsn.verify()


@pytest.mark.parametrize("rule", RULES)
@KINDS_AND_BACKENDS
def test_two_hundred_steps_in_float64_are_those_of_the_standard_mode(kind: str, rule: str, backend: str) -> None:
    found, expected = make_wsn(rule, backend=backend), make_wsn(rule, backend=backend)
    clipped = 0
    runs = two_tasks(found, kind, True, 100), two_tasks(expected, kind, False, 100)
    for (mine, norm), (theirs, their_norm) in zip(*runs, strict=True):
        assert all(map(torch.equal, mine, theirs))
        torch.testing.assert_close(norm, their_norm, rtol=0, atol=1e-9)
        clipped += int(norm > CLIP)
    assert clipped > 20
    assert_close(found, expected, atol=1e-9)


class InStep:
    """The one-pass mode at some precision, and beside it, put into its state before every step, the standard mode at
    the same precision and one in float64."""

    def __init__(self, kind: str, rule: str, weights: torch.dtype, backend: str) -> None:
        self.models = [make_wsn(rule, dtype, backend) for dtype in (weights, weights, torch.float64)]
        self.kind = kind
        self.optimizers: list[Any] = []
        self.errors: dict[str, list[float]] = {}

    def begin(self, task: int) -> None:
        for wsn in self.models:
            wsn.begin_task(task)
        modes = zip(self.models, (True, False, False), strict=True)
        self.optimizers = [KINDS[self.kind](wsn, one_pass=one_pass) for wsn, one_pass in modes]

    @torch.no_grad()
    def join(self) -> None:
        """Bring the others to where the one-pass mode is."""
        leader, optimizer = self.models[0], self.optimizers[0]
        for wsn, other in zip(self.models[1:], self.optimizers[1:], strict=True):
            for mine, theirs in zip(wsn.parameters(), leader.parameters(), strict=True):
                mine.copy_(theirs)
            other.load_state_dict(copy.deepcopy(optimizer.state_dict()))

    def step(self, task: int, step: int, autocast: torch.dtype | None) -> None:
        for wsn, optimizer in zip(self.models, self.optimizers, strict=True):
            for part in range(2):
                backward(wsn, task, 2 * step + part, autocast=None if wsn is self.models[2] else autocast)
            optimizer.clip_grad_norm_(CLIP)
            optimizer.step()
            optimizer.zero_grad()
        ours, standard, exact = (dict(self.numbers(i)) for i in range(3))
        for name, truth in exact.items():
            sums = self.errors.setdefault(name, [0.0, 0.0])
            for i, found in enumerate((ours, standard)):
                sums[i] += float((found[name].double() - truth).square().sum())

    def numbers(self, i: int) -> Iterator[tuple[str, Tensor]]:
        for name, param in self.models[i].named_parameters():
            yield name, param.detach()
            for key, value in self.optimizers[i].state.get(param, {}).items():
                if isinstance(value, Tensor):
                    yield f"{name} {key}", value

    def assert_as_accurate(self) -> None:
        assert len(self.errors) > 10
        for name, (ours, standard) in self.errors.items():
            assert ours**0.5 <= 2 * standard**0.5, f"{name}: {ours**0.5:.3g} against {standard**0.5:.3g}"


@pytest.mark.parametrize("precision", ["float32", "bfloat16 autocast", "bfloat16 weights"])
@pytest.mark.parametrize("rule", RULES)
@KINDS_AND_BACKENDS
def test_every_step_from_a_common_state_is_as_accurate(kind: str, rule: str, precision: str, backend: str) -> None:
    weights = torch.bfloat16 if precision == "bfloat16 weights" else torch.float32
    runs = InStep(kind, rule, weights, backend)
    for task in range(2):
        runs.begin(task)
        union = union_of(runs.models[0])
        kept = [x.clone() for x in frozen_of(runs.models[0], union)] if union else []
        for step in range(10):
            runs.join()
            runs.step(task, step, torch.bfloat16 if precision == "bfloat16 autocast" else None)
            assert_ready(runs.models[0])
            for now, before in zip(frozen_of(runs.models[0], union) if kept else (), kept, strict=True):
                assert_same_bits(now, before, "what the first task uses")
        runs.join()
        for wsn in runs.models:
            wsn.end_task()
    runs.models[0].verify()
    runs.assert_as_accurate()


def conv_wsn(channels_last: bool) -> WSN:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 2, groups=2), nn.Flatten(), nn.Linear(36, 3)
    ).double()
    wsn = WSN(convert(net, density=0.4, heads="4"))
    return wsn.to(memory_format=torch.channels_last) if channels_last else wsn


@pytest.mark.parametrize("channels_last", [False, True])
def test_convolutions(channels_last: bool, backend: str) -> None:
    ends = []
    for one_pass in (True, False):
        wsn = conv_wsn(channels_last)
        for layer in wsn.subnet_layers().values():
            layer.backend = backend
        for task in range(2):
            torch.manual_seed(task)
            wsn.begin_task(task)
            optimizer = SubnetAdamW(wsn, 0.01, weight_decay=0.1, one_pass=one_pass)
            for _ in range(5):
                x = torch.randn(4, 3, 6, 6, dtype=torch.float64)
                x = x.to(memory_format=torch.channels_last) if channels_last else x
                F.cross_entropy(wsn(x), torch.tensor([0, 1, 2, 0])).backward()
                optimizer.clip_grad_norm_(CLIP)
                optimizer.step()
                optimizer.zero_grad()
            if task == 0:
                wsn.end_task()
        ends.append(wsn)
    assert_close(*ends)


# --- G
def test_g_stays_in_bfloat16_and_adds_up_in_float32() -> None:
    wsn, _ = begun(dtype=torch.float32)
    backward(wsn, step=1, autocast=torch.bfloat16)
    weight = layer_of(wsn).weight
    first = weight.grad.clone()
    assert first.dtype is torch.bfloat16
    wsn.zero_grad()
    backward(wsn, step=2, autocast=torch.bfloat16)
    second = weight.grad.clone()
    wsn.zero_grad()
    for step in (1, 2):
        backward(wsn, step=step, autocast=torch.bfloat16)
    assert_same_bits(weight.grad, first.float() + second.float(), "G")


def test_g_adds_up_to_a_gradient_of_zeros() -> None:
    wsn, optimizer = begun(dtype=torch.float32)
    backward(wsn, autocast=torch.bfloat16)
    optimizer.zero_grad(set_to_none=False)
    backward(wsn, autocast=torch.bfloat16)
    assert layer_of(wsn).weight.grad.dtype is torch.float32


@pytest.mark.parametrize("first", [torch.bfloat16, None])
def test_accumulation_across_precisions(first: torch.dtype | None) -> None:
    ends = []
    for wsn, optimizer in both(dtype=torch.float32):
        backward(wsn, step=1, autocast=first)
        backward(wsn, step=2, autocast=None if first else torch.bfloat16)
        optimizer.step()
        ends.append(wsn)
    assert_close(*ends, atol=1e-6)


def test_a_layer_called_often_in_one_forward_adds_up_g_in_float32() -> None:
    """The error of the sum of 64 gradients under bfloat16 autocast against their sum in float64."""
    errors = []
    for one_pass in (True, False):
        wsn = make_wsn(dtype=torch.float32)
        wsn.begin_task(0)
        optimizer = SubnetSGD(wsn, 1.0, one_pass=one_pass)
        layer = layer_of(wsn)
        layer.density = 1.0
        before = layer.weight.detach().clone()
        inputs, factors = torch.rand(64, 8, 9), torch.rand(64, 8, 14)
        with torch.autocast("cpu", torch.bfloat16):
            loss = torch.stack([(layer(x) * f).sum() for x, f in zip(inputs, factors, strict=True)]).sum()
        loss.backward()
        optimizer.step()
        exact = torch.einsum("kbo,kbi->oi", factors.bfloat16().double(), inputs.bfloat16().double())
        errors.append((before.double() - layer.weight.detach().double() - exact).abs().max())
        torch.manual_seed(0)
    assert errors[0] <= 2 * errors[1]


def test_scores_with_a_gradient_of_their_own_are_not_ignored() -> None:
    """A penalty on scores or weights, which does not go through the gate: taken into account, or refused."""
    ends = []
    for wsn, optimizer in both("sgd"):
        (sum(layer.weight_score.abs().sum() for layer in wsn.subnet_layers().values())).backward()
        backward(wsn)
        if optimizer.one_pass:
            try:
                optimizer.step()
            except RuntimeError:
                return
        else:
            optimizer.step()
        ends.append(wsn)
    assert_close(*ends)


# --- clipping
@pytest.mark.parametrize("max_norm", [1e-3, 0.3, 1e6, float("inf")])
@pytest.mark.parametrize("kind", ["adam", "sgd"])
def test_clipping_is_that_of_the_standard_mode_and_of_torch(kind: str, max_norm: float, backend: str) -> None:
    ends, norms = [], []
    for wsn, optimizer in both(kind, backend=backend):
        backward(wsn)
        norms.append(optimizer.clip_grad_norm_(max_norm))
        optimizer.step()
        ends.append(wsn)
    wsn, optimizer = begun(kind, False, backend=backend)
    backward(wsn)
    norms.append(torch.nn.utils.clip_grad_norm_(wsn.parameters(), max_norm))
    optimizer.step()
    for norm in norms[1:]:
        torch.testing.assert_close(norms[0], norm, rtol=1e-12, atol=0)
    assert_close(ends[0], ends[1])
    assert_close(ends[1], wsn)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@MODES
def test_the_norm_of_half_precision_gradients_does_not_overflow(dtype: torch.dtype, one_pass: bool) -> None:
    wsn = make_wsn(dtype=dtype)
    wsn.begin_task(0)
    optimizer = SubnetSGD(wsn, 0.1, one_pass=one_pass)
    backward(wsn, 0, scale=3e3)
    grads = [p.grad.double() for p in wsn.parameters() if p.grad is not None and not one_pass]
    norm = optimizer.clip_grad_norm_(1.0)
    assert norm.isfinite()
    if grads:
        exact = torch.stack([g.square().sum() for g in grads]).sum().sqrt()
        torch.testing.assert_close(norm.double(), exact, rtol=0.02, atol=0)


def test_clipping_twice_clips_what_is_clipped() -> None:
    ends = []
    for wsn, optimizer in both("sgd"):
        backward(wsn)
        norms = [optimizer.clip_grad_norm_(max_norm) for max_norm in (0.02, 0.01, 5.0)]
        optimizer.step()
        torch.testing.assert_close(torch.stack(norms[1:]), torch.tensor([0.02, 0.01]).double(), rtol=1e-4, atol=0)
        ends.append(wsn)
    assert_close(*ends)


def test_backward_after_clipping_is_refused_and_changes_nothing() -> None:
    wsn, optimizer = begun()
    backward(wsn)
    optimizer.clip_grad_norm_(CLIP)
    backward(wsn)
    before = snapshot(wsn)
    with pytest.raises(RuntimeError, match="gradients changed after clip_grad_norm_"):
        optimizer.step()
    assert all(map(torch.equal, snapshot(wsn), before))


def test_backward_between_two_clippings_is_refused() -> None:
    wsn, optimizer = begun()
    backward(wsn)
    optimizer.clip_grad_norm_(CLIP)
    backward(wsn, step=1)
    with pytest.raises(RuntimeError, match="gradients changed after clip_grad_norm_"):
        optimizer.clip_grad_norm_(CLIP)


def test_unscaling_after_clipping_does_what_it_does_in_the_standard_mode() -> None:
    """A factor for a factor: GradScaler changes gradients behind autograd's back, so it cannot be refused."""
    ends = []
    for wsn, optimizer in both("sgd", dtype=torch.float32):
        scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
        scaler.scale(torch.zeros(()))
        backward(wsn, scale=4.0)
        optimizer.clip_grad_norm_(CLIP)
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        ends.append(wsn)
    assert_close(*ends, atol=1e-6)


@pytest.mark.parametrize("whose", ["optimizer", "module", "by hand"])
@pytest.mark.parametrize("again", [False, True], ids=["no more", "clipped again"])
def test_the_factor_goes_with_the_gradients(whose: str, again: bool) -> None:
    """Clip, skip the step, drop the gradients in one of three ways: the next step knows nothing of it."""
    ends, norms = [], []
    for clipped in (True, False):
        wsn, optimizer = begun("sgd")
        if clipped:
            backward(wsn)
            optimizer.clip_grad_norm_(1e-3)
        if whose == "optimizer":
            optimizer.zero_grad()
        elif whose == "module":
            wsn.zero_grad()
        else:
            for p in wsn.parameters():
                p.grad = None
        backward(wsn, step=1)
        norms.append(optimizer.clip_grad_norm_(0.3) if again else torch.zeros(()))
        optimizer.step()
        ends.append(wsn)
    torch.testing.assert_close(*norms, rtol=0, atol=1e-12)
    assert_close(*ends)


def test_zero_grad_in_place_drops_the_factor() -> None:
    ends = []
    for clipped in (True, False):
        wsn, optimizer = begun("sgd")
        backward(wsn)
        if clipped:
            optimizer.clip_grad_norm_(1e-3)
        optimizer.zero_grad(set_to_none=False)
        backward(wsn, step=1)
        optimizer.step()
        ends.append(wsn)
    assert_close(*ends)


def test_the_factor_is_used_once() -> None:
    ends = []
    for wsn, optimizer in both("sgd"):
        backward(wsn)
        optimizer.clip_grad_norm_(1e-2)
        optimizer.step()
        optimizer.zero_grad()
        backward(wsn)
        optimizer.step()
        ends.append(wsn)
    assert_close(*ends)


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_a_norm_that_is_not_finite(bad: float, backend: str) -> None:
    """Without an error it does what torch's clipping does to gradients in the standard mode."""
    ends = []
    for wsn, optimizer in both("sgd", backend=backend):
        backward(wsn)
        for layer in wsn.subnet_layers().values():
            for p in (layer.weight, layer.bias):
                row = layer.masks_of_scores()["weight" if p is layer.weight else "bias"].nonzero()[0].tolist()
                p.grad[tuple(row)] = bad  # inside the mask
        before = snapshot(wsn)
        with pytest.raises(RuntimeError, match=r"the norm of the gradients is (inf|nan), so it cannot be clipped"):
            optimizer.clip_grad_norm_(CLIP, error_if_nonfinite=True)
        assert all(map(torch.equal, snapshot(wsn), before))
        assert not optimizer.clip_grad_norm_(CLIP).isfinite()
        ends.append((wsn, optimizer))
    (mine, optimizer), (theirs, standard) = ends
    optimizer.step(), standard.step()
    # dS of the bad elements is formed from G in one mode, and was formed before in the other: weights are the same.
    for a, b in zip(mine.subnet_layers().values(), theirs.subnet_layers().values(), strict=True):
        torch.testing.assert_close(a.weight, b.weight, rtol=0, atol=1e-12, equal_nan=True)
        torch.testing.assert_close(a.bias, b.bias, rtol=0, atol=1e-12, equal_nan=True)


@MODES
@pytest.mark.parametrize("max_norm", [0, -1.0, float("nan"), True, "1", None])
def test_a_wrong_norm_is_refused(one_pass: bool, max_norm: Any) -> None:
    _, optimizer = begun(one_pass=one_pass)
    with pytest.raises(ValueError, match="max_norm must be a positive number, got"):
        optimizer.clip_grad_norm_(max_norm)


@MODES
def test_without_gradients_nothing_happens(one_pass: bool) -> None:
    wsn, optimizer = begun(one_pass=one_pass)
    before = snapshot(wsn)
    assert optimizer.clip_grad_norm_(1.0) == 0
    optimizer.step()
    assert all(map(torch.equal, snapshot(wsn), before))


def test_a_layer_without_gradients_stays_and_learns_later() -> None:
    ends = []
    for wsn, optimizer in both():
        for only_last in (True, False, True, True, False):
            x, y = batch(1, 5)
            model = wsn.model
            logits = model[4](model[3](model[2](torch.ones(16, 14).double()))) if only_last else wsn(x)
            F.cross_entropy(logits, y).backward()
            optimizer.clip_grad_norm_(CLIP)
            before = layer_of(wsn).weight.detach().clone()
            optimizer.step()
            optimizer.zero_grad()
            assert torch.equal(layer_of(wsn).weight, before) == only_last
        ends.append(wsn)
    assert_close(*ends)


# --- what a training loop does between forward and step
def test_a_change_of_weights_between_forward_and_backward_is_an_error_as_in_the_standard_mode() -> None:
    for wsn, optimizer in both():
        x, y = batch(1, 0)
        loss = F.cross_entropy(wsn(x), y)
        with torch.no_grad():
            layer_of(wsn).weight.mul_(-3)
        with pytest.raises(RuntimeError, match=r"modified by an inplace operation|changed between the forward pass"):
            loss.backward()  # in the standard mode
            optimizer.step()


@pytest.mark.parametrize("what", ["weight", "weight_score"])
def test_a_change_between_backward_and_step_does_not_change_the_gradient(what: str) -> None:
    """Or is refused."""
    ends = []
    for wsn, optimizer in both("sgd"):
        backward(wsn)
        with torch.no_grad():
            getattr(layer_of(wsn), what).mul_(-3)
        if optimizer.one_pass:
            try:
                optimizer.step()
            except RuntimeError:
                return
        else:
            optimizer.step()
        ends.append(wsn)
    assert_close(*ends)


@pytest.mark.parametrize("trained", [False, True])
def test_a_forward_with_other_parameters_does_not_disturb_the_step(trained: bool) -> None:
    """As of a perturbed or averaged copy of the model, through torch.func.functional_call."""
    ends = []
    for wsn, optimizer in both("sgd"):
        backward(wsn)
        others = {name: (-2 * p.detach() + 1).requires_grad_(trained) for name, p in wsn.named_parameters()}
        torch.func.functional_call(wsn, others, (batch(1, 3)[0],))
        optimizer.step()
        ends.append(wsn)
    assert_close(*ends)


@MODES
@pytest.mark.parametrize("how", ["all", "one"])
def test_parameters_that_the_optimizer_does_not_hold_are_refused_clearly(how: str, one_pass: bool) -> None:
    """They were replaced meanwhile, all of them by ``load_state_dict(assign=True)`` or one by hand."""
    wsn, optimizer = begun(one_pass=one_pass)
    if how == "all":
        wsn.load_state_dict(copy.deepcopy(wsn.state_dict()), assign=True)
    else:
        layer_of(wsn).weight = nn.Parameter(layer_of(wsn).weight.detach().clone())
    backward(wsn)
    before = snapshot(wsn)
    with pytest.raises(RuntimeError, match="optimizer"):
        optimizer.step()
    assert all(map(torch.equal, snapshot(wsn), before))


# --- GradScaler
@MODES
def test_grad_scaler_and_float16_autocast(one_pass: bool, backend: str) -> None:
    """Scaled, unscaled, clipped: the step without a scaler; a step with infinite gradients is skipped."""
    ends = []
    for scaled in (True, False):
        wsn, optimizer = begun("adam", one_pass, dtype=torch.float32, backend=backend)
        scaler = torch.amp.GradScaler("cpu", init_scale=64.0, enabled=scaled)
        scaler.scale(torch.zeros(()))
        for step in range(3):
            backward(wsn, step=step, scale=scaler.get_scale(), autocast=torch.float16)
            assert layer_of(wsn).weight.grad.dtype is torch.float32
            scaler.unscale_(optimizer)
            optimizer.clip_grad_norm_(0.1)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        ends.append(wsn)
        if scaled:
            kept = snapshot(wsn)
            backward(wsn, scale=float("inf"), autocast=torch.float16)
            scaler.unscale_(optimizer)
            optimizer.clip_grad_norm_(0.1)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            assert scaler.get_scale() == 32
            assert all(map(torch.equal, snapshot(wsn), kept))
    assert_close(*ends, atol=2e-3)


def test_a_scaler_with_bfloat16_gradients() -> None:
    ends = []
    for wsn, optimizer in both("sgd", dtype=torch.float32):
        scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
        scaler.scale(torch.zeros(()))
        backward(wsn, scale=8.0, autocast=torch.bfloat16)
        scaler.step(optimizer)
        ends.append(wsn)
    assert_close(*ends, atol=1e-6)


# --- groups, learning rates
@MODES
def test_each_group_has_its_learning_rate(one_pass: bool) -> None:
    wsn, _ = begun(one_pass=one_pass)
    optimizer = SubnetSGD(wsn, 0.1, one_pass=one_pass, score_weight_decay=0.5)  # scores are a group of their own
    optimizer.param_groups[1]["lr"] = 0.0
    before = {n: p.detach().clone() for n, p in wsn.named_parameters()}
    backward(wsn)
    optimizer.step()
    moved = {n for n, p in wsn.named_parameters() if not torch.equal(p, before[n])}
    assert moved and not any(name.endswith("_score") for name in moved)


@pytest.mark.parametrize("kind", [SubnetAdamW, SubnetSGD])
@MODES
def test_a_learning_rate_may_be_a_tensor(kind: Any, one_pass: bool, backend: str) -> None:
    ends = []
    for lr in (torch.tensor(0.02, dtype=torch.float64), 0.02):
        wsn, _ = begun(backend=backend)
        optimizer = kind(wsn, lr, one_pass=one_pass)
        for step in range(3):
            optimizer.param_groups[0]["lr"] = optimizer.param_groups[0]["lr"] * 0.5
            backward(wsn, step=step)
            optimizer.step()
            optimizer.zero_grad()
        ends.append(wsn)
    assert_close(*ends)


SCHEDULES: dict[str, Callable[[Any], Any]] = {
    "step": lambda o: torch.optim.lr_scheduler.StepLR(o, 2, gamma=0.3),
    "cosine": lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 5),
    "one cycle": lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.05, total_steps=10),
}


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("kind", ["adamw", "momentum"])
def test_schedules(kind: str, schedule: str) -> None:
    """That of a cycle changes betas and momentum, too."""
    ends = []
    for wsn, optimizer in both(kind):
        scheduler = SCHEDULES[schedule](optimizer)
        for step in range(6):
            optimizer.zero_grad()
            backward(wsn, step=step)
            optimizer.step()
            scheduler.step()
        ends.append(wsn)
    assert_close(*ends, atol=1e-9)


@MODES
def test_a_schedule_that_looks_at_the_loss_halves_the_rate(one_pass: bool) -> None:
    _, optimizer = begun(one_pass=one_pass)
    scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=0)
    for _ in range(3):
        scheduler.step(1.0)
    assert optimizer.param_groups[0]["lr"] == 0.01 / 4


@MODES
def test_a_group_that_is_added_learns(one_pass: bool) -> None:
    wsn, optimizer = begun(one_pass=one_pass)
    extra = nn.Parameter(torch.ones(3, dtype=torch.float64))
    optimizer.add_param_group({"params": [extra], "lr": 0.5, "weight_decay": 0.0})
    backward(wsn)
    extra.sum().backward()
    before = layer_of(wsn).weight.detach().clone()
    optimizer.clip_grad_norm_(1e6)
    optimizer.step()
    torch.testing.assert_close(extra.detach(), torch.full((3,), 0.5).double(), rtol=0, atol=1e-6)
    assert not torch.equal(layer_of(wsn).weight, before)


@pytest.mark.parametrize("guarded", [True, False])
def test_a_layer_that_is_added_later_learns_as_in_the_standard_mode(guarded: bool) -> None:
    ends = []
    for one_pass in (True, False):
        wsn = begun()[0]
        gc.collect()  # nobody owns raw gradients now
        layer = layer_of(wsn)
        for p in layer.parameters():
            p.requires_grad_(False)
        optimizer = KINDS["adamw"](wsn, one_pass=one_pass)
        backward(wsn)
        optimizer.step()
        optimizer.zero_grad()
        for p in layer.parameters():
            p.requires_grad_(True)
        optimizer.add_param_group({"params": list(layer.parameters()), "weight_decay": 0.0})
        if guarded:
            wsn.guard(optimizer)
            assert layer.one_pass == one_pass
        union = union_of(wsn)
        before = [x.clone() for x in frozen_of(wsn, union)]
        for step in (1, 2):
            backward(wsn, step=step)
            optimizer.step()
            optimizer.zero_grad()
        assert all(map(torch.equal, frozen_of(wsn, union), before))
        ends.append(wsn)
    assert_close(*ends)


# --- states
def torchs(kind: str, wsn: WSN) -> torch.optim.Optimizer:
    params = [p for p in wsn.parameters() if p.requires_grad]
    if kind == "adamw":
        return torch.optim.AdamW(params, 0.01, weight_decay=0.0)
    return torch.optim.SGD(params, 0.05, momentum=0.9, nesterov=True)


def ours(kind: str, wsn: WSN, one_pass: bool) -> Any:
    if kind == "adamw":
        return SubnetAdamW(wsn, 0.01, one_pass=one_pass)
    return SubnetSGD(wsn, 0.05, momentum=0.9, nesterov=True, one_pass=one_pass)


MAKERS: dict[str, Callable[[str, WSN], Any]] = {
    "one pass": lambda kind, wsn: ours(kind, wsn, True),
    "standard": lambda kind, wsn: ours(kind, wsn, False),
    "torch": lambda kind, wsn: wsn.guard(torchs(kind, wsn)),
}


@pytest.mark.parametrize("order", list(itertools.permutations(MAKERS)), ids=" to ".join)
@pytest.mark.parametrize("kind", ["adamw", "nesterov"])
def test_a_run_goes_on_with_the_state_of_another_optimizer(kind: str, order: tuple[str, ...], backend: str) -> None:
    """Each takes the state over from the one before; the end is that of one standard run."""
    ends = []
    for names in (order, ("standard",) * 3):
        wsn, _ = begun(backend=backend)
        state = None
        for name in names:
            optimizer = MAKERS[name](kind, wsn)
            if state is not None:
                optimizer.load_state_dict(state)
            for step in range(3):
                backward(wsn, step=step)
                optimizer.step()
                optimizer.zero_grad()
            state = optimizer.state_dict()
        ends.append(wsn)
    assert_close(*ends, atol=1e-10)


def test_a_state_is_loaded_in_the_middle_of_accumulation() -> None:
    """The gradients at hand stay, as with torch's optimizers."""
    ends = []
    for wsn, optimizer in both():
        backward(wsn)
        optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        backward(wsn, step=1)
        optimizer.step()
        ends.append(wsn)
    assert_close(*ends)


@pytest.mark.parametrize("flag", ["amsgrad", "maximize"])
@MODES
def test_amsgrad_and_maximize_are_refused_when_built(flag: str, one_pass: bool) -> None:
    wsn = make_wsn()
    wsn.begin_task(0)
    with pytest.raises(ValueError, match=f"{flag} must be False, got True"):
        SubnetAdamW(wsn, one_pass=one_pass, **{flag: True})
    if flag == "maximize":
        with pytest.raises(ValueError, match="maximize must be False, got True"):
            SubnetSGD(wsn, one_pass=one_pass, maximize=True)


@pytest.mark.parametrize("flag", ["amsgrad", "maximize"])
@MODES
def test_amsgrad_and_maximize_are_refused_when_loaded(flag: str, one_pass: bool) -> None:
    wsn, optimizer = begun(one_pass=one_pass)
    theirs = torch.optim.AdamW([p for p in wsn.parameters() if p.requires_grad], 0.5, **{flag: True})
    with pytest.raises(ValueError, match=f"{flag} must be False, got True"):
        optimizer.load_state_dict(theirs.state_dict())
    assert optimizer.param_groups[0]["lr"] == 0.01


@MODES
def test_a_refused_step_changes_nothing(one_pass: bool) -> None:
    wsn, optimizer = begun(one_pass=one_pass)
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1).double())]})
    backward(wsn)
    optimizer.param_groups[0]["maximize"] = True
    before = snapshot(wsn)
    with pytest.raises(ValueError, match="maximize must be False"):
        optimizer.step()
    assert all(map(torch.equal, snapshot(wsn), before))


# --- closures
@pytest.mark.parametrize("kind", KINDS)
def test_closures(kind: str) -> None:
    ends = []
    for how in ("one pass, closure", "standard, closure", "one pass"):
        wsn, optimizer = begun(kind, how.startswith("one pass"))
        union = union_of(wsn)
        kept = [x.clone() for x in frozen_of(wsn, union)]
        for step in range(3):

            def closure(wsn: WSN = wsn, optimizer: Any = optimizer, step: int = step) -> Tensor:
                optimizer.zero_grad()
                loss = backward(wsn, step=step)
                optimizer.clip_grad_norm_(CLIP)
                return loss

            if "closure" in how:
                assert optimizer.step(closure) > 0
            else:
                closure()
                optimizer.step()
            if how.startswith("one pass"):
                assert_ready(wsn, stamped=False)  # the guard may have put back what frozen weights were
        assert all(map(torch.equal, frozen_of(wsn, union), kept))
        ends.append(wsn)
    assert_close(ends[0], ends[1])
    assert_close(ends[0], ends[2])


@MODES
def test_a_closure_that_fails_changes_nothing(one_pass: bool) -> None:
    wsn, optimizer = begun(one_pass=one_pass)
    before = snapshot(wsn)

    def closure() -> None:
        backward(wsn)
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        optimizer.step(closure)
    assert all(map(torch.equal, snapshot(wsn), before))
    optimizer.zero_grad()
    backward(wsn)
    optimizer.step()
    wsn.verify()


# --- parts that do not train
@pytest.mark.parametrize("names", [("weight", "bias"), ("weight_score", "bias_score"), ("bias",), ("weight_score",)])
@pytest.mark.parametrize("when", ["before", "after"])
def test_what_is_frozen_by_hand_stays_in_both_modes(names: tuple[str, ...], when: str) -> None:
    """Before the optimizer is built, or while it lives: only scores have gradients then, or only weights."""
    ends = []
    for wsn, optimizer in both("adam"):
        layer = layer_of(wsn)
        for name in names:
            getattr(layer, name).requires_grad_(False)
        if when == "before":
            optimizer = KINDS["adam"](wsn, one_pass=optimizer.one_pass)
        before = {n: p.detach().clone() for n, p in layer.named_parameters()}
        union = union_of(wsn)
        kept = [x.clone() for x in frozen_of(wsn, union)]
        for step in range(3):
            backward(wsn, step=step)
            optimizer.clip_grad_norm_(CLIP)
            optimizer.step()
            optimizer.zero_grad()
        for name, p in layer.named_parameters():
            assert torch.equal(p, before[name]) == (name in names), name
        assert all(map(torch.equal, frozen_of(wsn, union), kept))
        ends.append(wsn)
    assert_close(*ends)


@pytest.mark.parametrize("first_task", [True, False])
@pytest.mark.parametrize("kind", ["adam", "sgd"])
@pytest.mark.parametrize("name", ["weight", "bias_score"])
def test_what_is_thawed_again_learns_in_both_modes(name: str, kind: str, first_task: bool) -> None:
    """In the first task nothing is put back after a step, which would hide that the gate that is ready is an old
    one."""
    ends = []
    for one_pass in (True, False):
        if first_task:
            wsn = make_wsn()
            wsn.begin_task(0)
            optimizer = KINDS[kind](wsn, one_pass=one_pass)
        else:
            wsn, optimizer = begun(kind, one_pass)
        for frozen in (False, True, False, True, False):
            getattr(layer_of(wsn), name).requires_grad_(not frozen)
            backward(wsn, int(not first_task))
            optimizer.step()
            optimizer.zero_grad()
        ends.append(wsn)
    assert_close(*ends)


@pytest.mark.parametrize("lacking", ["weight", "weight_score"])
def test_gradients_of_one_kind_in_the_standard_mode(lacking: str) -> None:
    """Scores alone learn; weights alone are what a module does that reads them past their mask."""
    wsn, optimizer = begun("adam", one_pass=False)
    layer = layer_of(wsn)
    union = union_of(wsn)
    kept = [x.clone() for x in frozen_of(wsn, union)]
    backward(wsn)
    getattr(layer, lacking).grad = None
    before = {n: p.detach().clone() for n, p in layer.named_parameters()}
    if lacking == "weight_score":
        with pytest.raises(RuntimeError, match=r"0\.weight has a gradient and its scores have none"):
            optimizer.step()
    else:
        optimizer.step()
        assert not torch.equal(layer.weight_score, before["weight_score"])
        assert torch.equal(layer.weight, before["weight"])
    assert all(map(torch.equal, frozen_of(wsn, union), kept))
