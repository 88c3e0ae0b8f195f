"""The gate that a one-pass step leaves for the next forward pass is never a stale one."""

from __future__ import annotations

import contextlib
import copy
import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from distributions import DISTRIBUTIONS, RULES
from elementwise import assert_same_bits
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from wsn_fast import WSN, FastSubnetLinear, convert, ops
from wsn_fast.backends import choose
from wsn_fast.optim import SubnetAdamW, SubnetSGD

WIDTH = 13


@pytest.fixture(params=["torch", "native"])
def backend(request: pytest.FixtureRequest) -> str:
    if choose("adamw_step", "cpu", torch.float32, request.param).name != request.param:
        pytest.skip(f"the {request.param} backend is not here")
    name: str = request.param
    return name


def make_wsn(backend: str | None = None, dtype: torch.dtype = torch.float64, width: int = WIDTH, **how: Any) -> WSN:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(width, 14), nn.Tanh(), nn.Linear(14, 14), nn.Tanh(), nn.Linear(14, 3)).to(dtype)
    wsn = WSN(convert(net, density=0.4, heads="4"), **how)
    for layer in wsn.subnet_layers().values():
        layer.backend = backend
    return wsn


def batch(seed: int, dtype: torch.dtype, width: int = WIDTH) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(8, width, generator=generator, dtype=torch.float64)
    return x.to(dtype), torch.randint(3, (8,), generator=generator)


def loss_of(wsn: WSN, seed: int = 0, run: Callable[[Tensor], Tensor] | None = None) -> Tensor:
    first = layer_of(wsn).weight
    x, y = batch(seed, first.dtype, first.shape[1])
    logits = (run or wsn)(x)
    return F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), y)


def build(wsn: WSN, one_pass: bool = True) -> Any:
    return SubnetAdamW(wsn, 0.01, weight_decay=0.1, one_pass=one_pass)


def step(wsn: WSN, optimizer: torch.optim.Optimizer, seed: int = 0) -> None:
    optimizer.zero_grad()
    loss_of(wsn, seed).backward()
    optimizer.step()


def begun(backend: str | None = None, **how: Any) -> tuple[WSN, Any]:
    """In its second task, of which two steps are done: a gate is ready."""
    wsn = make_wsn(backend, **how)
    for task in range(2):
        torch.manual_seed(task)
        wsn.begin_task(task)
        optimizer = build(wsn)
        for seed in range(2):
            step(wsn, optimizer, seed)
        if task == 0:
            wsn.end_task()
    assert_ready(wsn)
    return wsn, optimizer


def layer_of(wsn: WSN, name: str = "0") -> Any:
    return wsn.subnet_layers()[name]


def fresh_gate(layer: Any, gate: Any, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    how = (layer.gate_density, layer.rule, dtype, layer.backend)
    return ops.gate(gate.param.detach(), gate.score.detach(), *how)


def assert_ready(wsn: WSN) -> None:
    """There is a gate for the next forward pass, and it is that of the scores of now."""
    for name, layer in wsn.subnet_layers().items():
        assert_layer_ready(layer, name)


def assert_layer_ready(layer: Any, name: str = "layer") -> None:
    for gate in layer.gated():
        ready = layer.ready[gate.name]
        masked, tau = fresh_gate(layer, gate, ready.masked.dtype)
        assert_same_bits(ready.tau, tau, f"tau of {name}.{gate.name}")
        assert_same_bits(ready.masked, masked, f"masked {name}.{gate.name}")
        expected = ops.topc_threshold(gate.score, layer.gate_density, rule=layer.rule, backend=layer.backend)
        assert_same_bits(ready.tau, expected, f"tau of {name}.{gate.name}")
        assert ready.stamp == layer.stamp(gate.param, gate.score)


def is_used(wsn: WSN, dtype: torch.dtype | None = None) -> bool:
    """Whether the next forward pass takes what is ready."""
    layer = layer_of(wsn)
    masked = layer.masked("weight", dtype or layer.weight.dtype)
    return bool(masked.data_ptr() == layer.ready["weight"].masked.data_ptr()) if layer.ready else False


def assert_trains_as_standard(
    wsn: WSN, optimizer: Any, around: Callable[[], Any] = contextlib.nullcontext, steps: int = 2, atol: float = 1e-12
) -> None:
    """From here on, forward passes are to the bit those of a copy in the standard mode, and steps are its steps."""
    twin = copy.deepcopy(wsn)
    for mine, theirs in zip(wsn.subnet_layers().values(), twin.subnet_layers().values(), strict=True):
        theirs.backend = mine.backend
    standard = build(twin, one_pass=False)
    standard.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for seed in range(steps):
        losses = []
        for model, steps_of in ((wsn, optimizer), (twin, standard)):
            steps_of.zero_grad()
            with around():
                loss = loss_of(model, seed)
            loss.backward()
            losses.append(loss.detach())
            steps_of.step()
        assert_same_bits(losses[0], losses[1], "loss") if seed == 0 else None
        for (name, a), b in zip(wsn.named_parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=atol, msg=lambda m, name=name: f"{name}: {m}")
        assert_ready(wsn)


# --- changes of what the gate depends on
def edit(name: str, how: Callable[[Tensor], object]) -> Callable[[WSN], None]:
    @torch.no_grad()
    def change(wsn: WSN) -> None:
        for layer in wsn.subnet_layers().values():
            how(getattr(layer, name))

    return change


def in_inference_mode(wsn: WSN) -> None:
    with torch.inference_mode():
        layer_of(wsn).weight_score.mul_(-1).add_(0.1)


def stepped_by(make: Callable[[list[Tensor]], torch.optim.Optimizer]) -> Callable[[WSN], None]:
    """An optimizer that nobody guards, on some scores and weights of one layer."""

    def change(wsn: WSN) -> None:
        params = [layer_of(wsn).weight_score, layer_of(wsn).bias]
        other = make(params)
        for p in params:
            p.grad = torch.randn_like(p)
        other.step()
        other.zero_grad()

    return change


def shrunk(wsn: WSN) -> None:
    for layer in wsn.subnet_layers().values():
        layer.density = 0.2


def ruled(wsn: WSN) -> None:
    for layer in wsn.subnet_layers().values():
        layer.rule = "value"


def for_one_task(wsn: WSN) -> None:
    layer_of(wsn).task_density = 0.15


def other_state(wsn: WSN) -> dict[str, Tensor]:
    """Of this model, with other weights and scores."""
    other = copy.deepcopy(wsn)
    with torch.no_grad():
        for layer in other.subnet_layers().values():
            layer.weight_score.copy_(torch.randn_like(layer.weight_score))
    return other.state_dict()


def loaded_by_layer(wsn: WSN) -> None:
    state = {k.removeprefix("model.0."): v for k, v in other_state(wsn).items() if k.startswith("model.0.")}
    layer_of(wsn).load_state_dict(state)


def loaded(wsn: WSN) -> None:
    wsn.load_state_dict(other_state(wsn))


def loaded_around(wsn: WSN) -> None:
    nn.ModuleDict({"inner": wsn}).load_state_dict({f"inner.{k}": v for k, v in other_state(wsn).items()})


def reset(wsn: WSN) -> None:
    for layer in wsn.subnet_layers().values():
        layer.reset_scores("N01")


def tensors_replaced(wsn: WSN) -> None:
    """As Module.to does it."""
    wsn._apply(lambda t: t * 2 - 0.1 if t.is_floating_point() else t)


def from_a_vector(wsn: WSN) -> None:
    params = [layer_of(wsn).weight_score]
    vector = nn.utils.parameters_to_vector(params).detach()
    nn.utils.vector_to_parameters(vector.flip(0), params)


def swapped(wsn: WSN) -> None:
    """Weights and scores of two layers of one shape change places."""
    a, b = layer_of(wsn).weight_score, torch.randn_like(layer_of(wsn).weight_score)
    a.data, b.data = b.data, a.data


CHANGES: dict[str, Callable[[WSN], None]] = {
    "load_state_dict": loaded,
    "load_state_dict of a layer": loaded_by_layer,
    "load_state_dict of a parent": loaded_around,
    "reset_scores": reset,
    "weights": edit("weight", lambda t: t.mul_(-2)),
    "scores": edit("weight_score", lambda t: t.copy_(torch.randn_like(t))),
    "scores of the bias": edit("bias_score", lambda t: t.copy_(torch.randn_like(t))),
    "one score": edit("weight_score", lambda t: t[0, 1:2].fill_(9.0)),
    "a transposed view": edit("weight_score", lambda t: t.t()[1].zero_()),
    "a detached alias": edit("weight", lambda t: t.detach().view(-1)[3:5].neg_()),
    "foreach": edit("weight_score", lambda t: torch._foreach_mul_([t], -0.5)),
    "out": edit("weight_score", lambda t: torch.add(t, torch.randn_like(t), out=t)),
    "init": edit("weight_score", lambda t: nn.init.uniform_(t)),
    "index_put": edit("weight_score", lambda t: t.__setitem__(t < 0, 0.7)),
    "inference mode": in_inference_mode,
    "an optimizer, in a loop": stepped_by(lambda params: torch.optim.SGD(params, 3.0, foreach=False)),
    "an optimizer, foreach": stepped_by(lambda params: torch.optim.SGD(params, 3.0, foreach=True)),
    "density": shrunk,
    "density of the task": for_one_task,
    "rule": ruled,
    "tensors replaced": tensors_replaced,
    "vector_to_parameters": from_a_vector,
    "data swapped": swapped,
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_rebuilds_the_gate(change: str, backend: str) -> None:
    wsn, optimizer = begun(backend)
    assert is_used(wsn)
    torch.manual_seed(5)
    CHANGES[change](wsn)
    for layer in wsn.subnet_layers().values():
        assert not any(is_stale(layer, gate) for gate in layer.gated())
    assert_trains_as_standard(wsn, optimizer)
    assert is_used(wsn)


def is_stale(layer: Any, gate: Any) -> bool:
    masked = layer.masked(gate.name, gate.param.dtype)
    return not torch.equal(masked, fresh_gate(layer, gate, gate.param.dtype)[0])


@pytest.mark.parametrize("change", ["density", "density of the task"])
def test_a_change_between_forward_and_step_is_in_the_next_gate(change: str, backend: str) -> None:
    wsn, optimizer = begun(backend)
    optimizer.zero_grad()
    loss_of(wsn).backward()
    CHANGES[change](wsn)
    optimizer.step()
    assert_ready(wsn)
    assert_trains_as_standard(wsn, optimizer)


def test_an_edit_after_the_forward_pass_is_not_in_the_gate_that_is_ready(backend: str) -> None:
    wsn, optimizer = begun(backend)
    optimizer.zero_grad()
    loss_of(wsn).backward()
    CHANGES["scores"](wsn)
    with contextlib.suppress(RuntimeError):  # refused, or right
        optimizer.step()
        assert_ready(wsn)
    optimizer.zero_grad()
    assert_trains_as_standard(wsn, optimizer)


def test_the_best_epoch_restored(backend: str) -> None:
    wsn, optimizer = begun(backend)
    best = wsn.trainable_state()
    for seed in range(3):
        step(wsn, optimizer, seed)
    wsn.load_trainable_state(best)
    assert_trains_as_standard(wsn, optimizer)
    wsn.load_trainable_state(best)
    expected = {name: layer.masks_of_scores()["weight"] for name, layer in wsn.subnet_layers().items()}
    wsn.end_task()
    assert all(torch.equal(layer_of(wsn, name).mask("weight", 1), mask) for name, mask in expected.items())


@pytest.mark.parametrize("reinit_scores", [False, True])
def test_one_optimizer_for_two_tasks(reinit_scores: bool, backend: str) -> None:
    """Scores are drawn anew at begin_task, or the density is another: while the optimizer and its gate live on."""
    wsn = make_wsn(backend, reinit_scores=reinit_scores)
    wsn.begin_task(0)
    optimizer = build(wsn)
    for seed in range(2):
        step(wsn, optimizer, seed)
    wsn.end_task()
    wsn.begin_task(1, density=0.4 if reinit_scores else 0.2)
    optimizer.add_param_group({"params": list(wsn.model[4].head(1).parameters())})
    wsn.guard(optimizer)
    optimizer.zero_grad()
    for seed in range(2):
        step(wsn, optimizer, seed)
        assert_ready(wsn)
    fresh = copy.deepcopy(wsn)
    assert_same_bits(loss_of(wsn).detach(), loss_of(fresh).detach(), "loss")
    wsn.end_task()
    wsn.verify()


def test_end_task_takes_the_scores_and_not_what_is_ready(backend: str) -> None:
    wsn, _ = begun(backend)
    CHANGES["scores"](wsn)
    expected = layer_of(wsn).masks_of_scores()["weight"]
    wsn.end_task()
    assert torch.equal(layer_of(wsn).mask("weight", 1), expected)


# --- other views of the model in between
def show_and_leave(wsn: WSN) -> None:
    with wsn.use_task(0), torch.no_grad():
        wsn(batch(3, torch.float64)[0])


def show_with_gradients(wsn: WSN) -> None:
    with wsn.use_task(0):
        wsn(batch(3, torch.float64)[0])


def show_at_once(wsn: WSN) -> None:
    wsn.use_task(0)
    wsn(batch(3, torch.float64)[0])
    wsn.use_task(None)


def show_head(wsn: WSN) -> None:
    with wsn.use_head(0):
        wsn(batch(3, torch.float64)[0])


def show_several(wsn: WSN) -> None:
    wsn.eval()
    wsn.forward_tasks(batch(3, torch.float64)[0], [0, 1] * 4, one_pass=False)
    wsn.train()


def evaluate(train: bool, guard: Callable[[], Any]) -> Callable[[WSN], None]:
    def look(wsn: WSN) -> None:
        wsn.train(train)
        with guard():
            wsn(batch(3, torch.float64)[0])
        wsn.train()

    return look


LOOKS: dict[str, Callable[[WSN], None]] = {
    "use_task": show_and_leave,
    "use_task with gradients": show_with_gradients,
    "use_task at once": show_at_once,
    "use_head": show_head,
    "forward_tasks": show_several,
    "eval, no_grad": evaluate(False, torch.no_grad),
    "eval, inference_mode": evaluate(False, torch.inference_mode),
    "eval, gradients": evaluate(False, contextlib.nullcontext),
    "train, no_grad": evaluate(True, torch.no_grad),
    "train, gradients": evaluate(True, contextlib.nullcontext),
    "under autocast": evaluate(False, lambda: torch.autocast("cpu", torch.bfloat16)),
    "deepcopy": lambda wsn: loss_of(copy.deepcopy(wsn)).backward(),
    "state_dict": lambda wsn: wsn.state_dict() and None,
    "verify": lambda wsn: wsn.verify() and None,
    "capacity": lambda wsn: wsn.capacity() and None,
}


@pytest.mark.parametrize("where", ["before forward", "before backward", "before step"])
@pytest.mark.parametrize("look", LOOKS)
def test_a_look_in_between_changes_nothing(look: str, where: str, backend: str) -> None:
    """And what is ready is still used, where nothing was in the way."""
    ends = []
    for looks in (True, False):
        wsn, optimizer = begun(backend)
        for seed in range(2):
            optimizer.zero_grad()
            for stage in ("before forward", "before backward", "before step"):
                if looks and stage == where:
                    LOOKS[look](wsn)
                if stage == "before forward":
                    assert is_used(wsn)
                    loss = loss_of(wsn, seed)
                elif stage == "before backward":
                    loss.backward()
                else:
                    optimizer.step()
            assert_ready(wsn)
        ends.append([p.detach().clone() for p in wsn.parameters()])
    for mine, theirs in zip(*ends, strict=True):
        assert_same_bits(mine, theirs, "parameter")


def test_a_step_while_a_finished_task_is_shown_is_refused(backend: str) -> None:
    wsn, optimizer = begun(backend)
    optimizer.zero_grad()
    loss_of(wsn).backward()
    with wsn.use_task(0), pytest.raises(RuntimeError, match="task 0 is finished and in use"):
        optimizer.step()
    optimizer.step()
    assert_ready(wsn)


def test_a_copy_shares_nothing_that_is_ready(backend: str) -> None:
    wsn, optimizer = begun(backend)
    twin = copy.deepcopy(wsn)
    assert not any(layer.ready or layer.raw_owner for layer in twin.subnet_layers().values())
    theirs = build(twin)
    theirs.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for seed in range(2):
        step(twin, theirs, seed)
    assert_ready(wsn)
    assert_ready(twin)
    addresses = [layer.ready["weight"].masked.data_ptr() for model in (wsn, twin) for layer in [layer_of(model)]]
    assert addresses[0] != addresses[1]
    assert_trains_as_standard(wsn, optimizer)


# --- dtypes
def as_bfloat16() -> Any:
    return torch.autocast("cpu", torch.bfloat16)


def as_float16() -> Any:
    return torch.autocast("cpu", torch.float16)


def test_autocast_switched_between_steps(backend: str) -> None:
    wsn, optimizer = begun(backend, dtype=torch.float32)
    for around in (as_bfloat16, contextlib.nullcontext, as_float16, as_bfloat16):
        assert_trains_as_standard(wsn, optimizer, around, atol=1e-4)
        found = layer_of(wsn).ready["weight"].masked.dtype
        with around():
            assert found is layer_of(wsn).compute_dtype(torch.zeros(1))
            assert is_used(wsn, found)


def test_autocast_for_a_forward_pass_of_two(backend: str) -> None:
    """One of the two passes before a step finds nothing ready for it."""
    wsn, optimizer = begun(backend, dtype=torch.float32)
    for order in ((as_bfloat16, contextlib.nullcontext), (contextlib.nullcontext, as_bfloat16)):
        optimizer.zero_grad()
        for around in order:
            with around():
                loss = loss_of(wsn)
            loss.backward()
        optimizer.step()
        assert_ready(wsn)


@pytest.mark.parametrize("to", [torch.float64, torch.bfloat16, torch.float16])
def test_the_model_in_another_dtype(to: torch.dtype, backend: str) -> None:
    wsn, optimizer = begun(backend, dtype=torch.float32)
    for dtype in (to, torch.float32):
        wsn.to(dtype)
        optimizer.zero_grad()
        optimizer.load_state_dict(optimizer.state_dict())  # which follows
        assert_trains_as_standard(wsn, optimizer, atol=1e-12 if dtype is torch.float64 else 1e-2)


@pytest.mark.parametrize("there", ["half", "bfloat16", "double"])
def test_the_model_to_another_dtype_and_back(there: str) -> None:
    """New tensors may lie where the old ones lay: the address of a tensor says nothing about what is in it."""
    for width in (3, 16, 64, 100, 128, 200, 512, 1024):
        wsn, _ = begun(dtype=torch.float32, width=width)
        getattr(wsn, there)()
        wsn.float()
        for name, layer in wsn.subnet_layers().items():
            assert not any(is_stale(layer, gate) for gate in layer.gated()), f"{name} of width {width}"


def test_new_tensors_where_the_old_ones_were() -> None:
    """The same, certain: Module.to and its like make tensors that happen to get the memory of those before."""
    wsn, _ = begun(dtype=torch.float32)
    wsn._apply(lambda t: t.data.neg_() if t.is_floating_point() else t)
    assert not any(is_stale(layer_of(wsn), gate) for gate in layer_of(wsn).gated())


# --- edits that nobody sees
@pytest.mark.parametrize("name", ["weight", "weight_score"])
def test_an_edit_through_data_shows_after_one_step(name: str, backend: str) -> None:
    wsn, optimizer = begun(backend)
    getattr(layer_of(wsn), name).data.mul_(-2).add_(0.01)
    step(wsn, optimizer)
    assert_ready(wsn)
    assert_trains_as_standard(wsn, optimizer)


def test_an_edit_through_numpy_shows_after_one_step(backend: str) -> None:
    wsn, optimizer = begun(backend)
    layer_of(wsn).weight_score.detach().numpy()[:] = 0.25
    step(wsn, optimizer)
    assert_ready(wsn)
    assert_trains_as_standard(wsn, optimizer)


def test_a_step_of_a_fused_optimizer_that_nobody_guards_shows_after_one_step(backend: str) -> None:
    """Torch does not count the changes that its fused optimizers make."""
    wsn, optimizer = begun(backend)
    stepped_by(lambda params: torch.optim.Adam(params, 0.5, fused=True))(wsn)
    step(wsn, optimizer)
    assert_ready(wsn)
    assert_trains_as_standard(wsn, optimizer)


@pytest.mark.parametrize("fused", [True, False])
def test_a_torch_optimizer_that_is_guarded_shows_at_once(fused: bool, backend: str) -> None:
    wsn, optimizer = begun(backend)
    params = [p for p in wsn.parameters() if p.requires_grad]
    other = wsn.guard(torch.optim.Adam(params, 0.3, weight_decay=0.1, fused=fused))
    step(wsn, other)
    wsn.guard(optimizer)
    assert_trains_as_standard(wsn, optimizer)


# --- optimizers that come and go
def test_a_new_optimizer_of_either_mode(backend: str) -> None:
    wsn, _ = begun(backend)
    for one_pass in (True, False, True, True):
        optimizer = build(wsn, one_pass)
        assert not any(layer.ready or layer.last_pass for layer in wsn.subnet_layers().values())
        for seed in range(2):
            step(wsn, optimizer, seed)
        assert bool(layer_of(wsn).ready) == one_pass
        if one_pass:
            assert_ready(wsn)
    assert_trains_as_standard(wsn, optimizer)


def test_an_optimizer_that_is_gone_leaves_no_gate_in_use(backend: str) -> None:
    wsn, optimizer = begun(backend)
    del optimizer
    gc.collect()
    CHANGES["scores"](wsn)
    assert not layer_of(wsn).one_pass
    assert not is_stale(layer_of(wsn), next(layer_of(wsn).gated()))


def test_the_optimizer_before_cannot_step_with_raw_gradients_of_another(backend: str) -> None:
    wsn, before = begun(backend)
    optimizer = build(wsn)
    optimizer.zero_grad()
    loss_of(wsn).backward()
    kept = [p.detach().clone() for p in wsn.parameters()]
    with pytest.raises(RuntimeError, match="meant for the optimizer that was guarded last"):
        before.step()
    assert all(map(torch.equal, wsn.parameters(), kept))
    optimizer.step()
    assert_ready(wsn)


def test_a_torch_optimizer_on_the_rest_steps_beside(backend: str) -> None:
    """Two optimizers, of which one has the heads alone: what is ready stays in use."""
    wsn, _ = begun(backend)
    heads = {id(p) for p in wsn.model[4].parameters()}
    optimizer = build(wsn)
    group = optimizer.param_groups[0]
    group["params"] = [p for p in group["params"] if id(p) not in heads]
    other = wsn.guard(torch.optim.SGD(wsn.model[4].head(1).parameters(), 0.1))
    for seed in range(3):
        wsn.zero_grad()
        loss_of(wsn, seed).backward()
        other.step()
        optimizer.step()
        assert_ready(wsn)
        assert is_used(wsn)


# --- graphs of other shapes
def test_two_forward_passes_before_backward(backend: str) -> None:
    ends = []
    for one_pass in (True, False):
        wsn = begun(backend)[0]
        optimizer = build(wsn, one_pass)
        for _ in range(3):
            optimizer.zero_grad()
            first, second, unused = (loss_of(wsn, seed) for seed in range(3))
            first.backward()
            second.backward()
            assert unused > 0
            optimizer.step()
            if one_pass:
                assert_ready(wsn)
        ends.append(wsn)
    for mine, theirs in zip(*(wsn.parameters() for wsn in ends), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-12)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing(reentrant: bool, backend: str) -> None:
    ends = []
    for how in ("one pass, checkpointed", "standard, checkpointed", "standard"):
        wsn = begun(backend)[0]
        optimizer = build(wsn, how.startswith("one pass"))

        def run(x: Tensor, wsn: WSN = wsn) -> Tensor:
            hidden = checkpoint(wsn.model[:3], x.requires_grad_(), use_reentrant=reentrant)
            return wsn.model[3:](hidden)

        for seed in range(3):
            optimizer.zero_grad()
            loss_of(wsn, seed, run if "checkpointed" in how else None).backward()
            optimizer.step()
            if how.startswith("one pass"):
                assert_ready(wsn)
        ends.append(wsn)
    for mine, theirs, plain in zip(*(wsn.parameters() for wsn in ends), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-12)
        torch.testing.assert_close(mine, plain, rtol=0, atol=1e-12)


def test_a_layer_used_twice_in_one_forward_pass(backend: str) -> None:
    ends = []
    for one_pass in (True, False):
        wsn = begun(backend)[0]
        optimizer = build(wsn, one_pass)

        def run(x: Tensor, model: Any = wsn.model) -> Tensor:
            hidden = model[1](model[0](x))
            for _ in range(3):
                hidden = model[3](model[2](hidden))
            return model[4](hidden)

        for seed in range(3):
            optimizer.zero_grad()
            loss_of(wsn, seed, run).backward()
            optimizer.step()
            if one_pass:
                assert_ready(wsn)
        ends.append(wsn)
    for mine, theirs in zip(*(wsn.parameters() for wsn in ends), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-12)


def test_backward_after_the_step_is_the_error_of_autograd_and_nothing_worse(backend: str) -> None:
    wsn, optimizer = begun(backend)
    optimizer.zero_grad()
    late = loss_of(wsn, 1)
    loss_of(wsn, 0).backward()
    optimizer.step()
    kept = [p.detach().clone() for p in wsn.parameters()]
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        late.backward()
    assert all(map(torch.equal, wsn.parameters(), kept))
    assert_ready(wsn)
    assert_trains_as_standard(wsn, optimizer)


def test_backward_twice_through_one_graph(backend: str) -> None:
    ends = []
    for one_pass in (True, False):
        wsn = begun(backend)[0]
        optimizer = build(wsn, one_pass)
        optimizer.zero_grad()
        loss = loss_of(wsn)
        loss.backward(retain_graph=True)
        loss.backward()
        optimizer.step()
        ends.append(wsn)
    for mine, theirs in zip(*(wsn.parameters() for wsn in ends), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-12)


def test_a_penalty_on_gradients_of_the_inputs(backend: str) -> None:
    """Backward through a backward pass, but for the gate once."""
    ends = []
    for one_pass in (True, False):
        wsn = begun(backend)[0]
        optimizer = build(wsn, one_pass)
        for seed in range(2):
            optimizer.zero_grad()
            x = batch(seed, torch.float64)[0].requires_grad_()
            (slope,) = torch.autograd.grad(wsn(x).square().sum(), x, create_graph=True)
            slope.square().sum().backward()
            optimizer.step()
            if one_pass:
                assert_ready(wsn)
        ends.append(wsn)
    for mine, theirs in zip(*(wsn.parameters() for wsn in ends), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-11)


def test_double_backward_through_the_weights_is_refused() -> None:
    wsn, _ = begun()
    (raw,) = torch.autograd.grad(loss_of(wsn), layer_of(wsn).weight, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward through a subnet layer is not defined"):
        raw.square().sum().backward()


# --- the exact gate after every step, whatever the scores are
class OneLayer:
    """Training of a single layer whose scores somebody else chooses."""

    def __init__(self, scores: Tensor, rule: str, backend: str, density: float = 0.3) -> None:
        torch.manual_seed(0)
        rows = 3 if scores.numel() < 10_000 else 101
        assert scores.numel() % rows == 0
        self.columns = scores.numel() // rows
        layer = FastSubnetLinear(self.columns, rows, bias=False, dtype=scores.dtype, density=density, rule=rule)
        self.wsn, self.layer = WSN(nn.Sequential(layer)), layer
        layer.backend = backend
        self.wsn.begin_task(0)
        with torch.no_grad():
            layer.weight_score.copy_(scores.view(rows, -1))

    def step(self, optimizer: torch.optim.Optimizer) -> None:
        optimizer.zero_grad()
        x = torch.randn(2, self.columns).to(self.layer.weight.dtype)
        self.wsn(x).float().square().mean().backward()
        optimizer.step()
        assert_layer_ready(self.layer)

    @property
    def window(self) -> list[int]:
        found: list[int] = self.layer.ready["weight"].window.tolist()
        return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("kind", DISTRIBUTIONS)
def test_the_gate_is_exact_for_any_scores(kind: str, rule: str, dtype: torch.dtype, backend: str) -> None:
    for n in (3, 1023, 101 * 131):
        torch.manual_seed(n)
        run = OneLayer(DISTRIBUTIONS[kind](n, dtype), rule, backend)
        optimizer = SubnetSGD(run.wsn, 0.0, one_pass=True)
        for lr in (0.0, 1e-3, 1e-3, 1.0, 0.0):
            optimizer.param_groups[0]["lr"] = lr
            run.step(optimizer)


@pytest.mark.parametrize("density", [1e-6, 0.03, 0.5, 0.999, 1.0])
@pytest.mark.parametrize("rule", RULES)
def test_the_gate_is_exact_at_any_density(rule: str, density: float, backend: str) -> None:
    for kind in ("normal", "two_values", "nan"):
        run = OneLayer(DISTRIBUTIONS[kind](1023, torch.float32), rule, backend, density)
        optimizer = SubnetAdamW(run.wsn, 1e-3, one_pass=True)
        for _ in range(4):
            run.step(optimizer)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_the_threshold_is_mostly_found_in_the_window(dtype: torch.dtype, rule: str) -> None:
    if choose("adamw_step", "cpu", dtype, "native").name != "native":
        pytest.skip("the native backend is not here")
    run = OneLayer(torch.randn(101 * 997).to(dtype), rule, "native")
    optimizer = SubnetAdamW(run.wsn, 1e-3, one_pass=True)
    for _ in range(20):
        run.step(optimizer)
    found, searched = run.window[-2:]
    assert found + searched == 20
    assert found >= 14


@pytest.mark.parametrize("rule", RULES)
def test_the_gate_is_exact_when_the_scores_jump(rule: str) -> None:
    """A window that was right for slow steps is of no use, and does no harm, after any of these."""
    if choose("adamw_step", "cpu", torch.float32, "native").name != "native":
        pytest.skip("the native backend is not here")
    run = OneLayer(torch.randn(101 * 997), rule, "native")
    optimizer = SubnetAdamW(run.wsn, 1e-4, one_pass=True)
    for kind in ("normal", "all_equal", "nan", "mostly_nan", "denormal", "infinities", "two_values", "sorted"):
        for _ in range(4):
            run.step(optimizer)
        with torch.no_grad():
            run.layer.weight_score.copy_(DISTRIBUTIONS[kind](run.layer.weight.numel(), torch.float32).view(101, -1))
        for state in optimizer.state.values():
            for value in state.values():
                value.nan_to_num_(0, 0, 0)
    run.step(optimizer)
    assert run.window[-2] > 0


def test_backends_take_turns(backend: str) -> None:
    """What one left in the window is nothing for the other."""
    wsn, optimizer = begun(backend)
    other = "torch" if backend == "native" else "native"
    for name in (other, backend, other, other, backend):
        for layer in wsn.subnet_layers().values():
            layer.backend = name
        step(wsn, optimizer)
        assert_ready(wsn)
    assert_trains_as_standard(wsn, optimizer)
