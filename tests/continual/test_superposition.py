"""Tasks that nobody names are found by the gradient of the entropy, with all masks superposed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from small_models import batches, convnet, mlp
from small_models import train as train_steps
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from wsn_fast import WSN, FastSubnetLinear, TaskHeads, convert
from wsn_fast.nn.gated import SubnetLayer
from wsn_fast.presets import supsup

X = torch.randn(6, 1, 6, 6, generator=torch.Generator().manual_seed(3))


def finished(model: nn.Module, tasks: Sequence[object] = ("a", 1, 2), **options: Any) -> WSN:
    torch.manual_seed(0)
    wsn = WSN(model, reinit_scores=True, **options)
    for number, task in enumerate(tasks):
        wsn.begin_task(task)  # type: ignore[arg-type]
        train_steps(wsn, wsn.guard(torch.optim.Adam(wsn.parameters(), lr=0.02)), batches(number, 4))
        wsn.end_task()
    return wsn.eval()


def expected(wsn: WSN, x: Tensor, tasks: Sequence[Any]) -> Tensor:
    """The gradient, from dense tensors and nothing of the library's."""
    rows = [wsn.tasks.index(task) for task in tasks]
    alpha = torch.full((len(tasks),), 1 / len(tasks), requires_grad=True)

    def mixed(tensors: Sequence[Tensor]) -> Tensor:
        return sum(a * tensor.detach() for a, tensor in zip(alpha, tensors, strict=True))  # type: ignore[return-value]

    for module in wsn.model:  # type: ignore[union-attr]
        kept: Any = module
        if isinstance(module, SubnetLayer):
            w, b = (mixed([kept.param(n) * kept.mask(n, r) for r in rows]) for n in ("weight", "bias"))
            x = F.linear(x, w, b) if w.ndim == 2 else F.conv2d(x, w, b)
        elif isinstance(module, TaskHeads):
            w, b = (mixed([getattr(kept.head(task), name) for task in tasks]) for name in ("weight", "bias"))
            x = F.linear(x, w, b)
        elif isinstance(module, nn.BatchNorm2d):
            names = "running_mean", "running_var", "weight", "bias"
            of_rows = [[getattr(kept, f"{name}_tasks")[row] for name in names] for row in rows]
            x = sum(a * F.batch_norm(x, *values) for a, values in zip(alpha, of_rows, strict=True))  # type: ignore[assignment]
        elif isinstance(module, nn.LayerNorm):
            w, b = (mixed([getattr(kept, f"{name}_tasks")[row] for row in rows]) for name in ("weight", "bias"))
            x = F.layer_norm(x, (12,), w, b)
        else:
            x = module(x)
    entropy = torch.distributions.Categorical(logits=x).entropy().mean()
    return torch.autograd.grad(entropy, alpha)[0]


@pytest.mark.parametrize("model", [mlp, convnet])
def test_the_gradient_is_that_of_the_mixture(model: Callable[[], nn.Module]) -> None:
    wsn = finished(model())
    found, gradient = wsn.infer_task(X, method="one-shot"), expected(wsn, X, wsn.tasks)
    torch.testing.assert_close(found.gradient, gradient)
    assert found.task == wsn.tasks[int(gradient.argmin())] and found.rows == [found.task] * 6
    assert found.entropy is None


def test_some_tasks_to_choose_from() -> None:
    wsn = finished(mlp())
    found = wsn.infer_task(X, method="one-shot", tasks=[2, "a"])
    torch.testing.assert_close(found.gradient, expected(wsn, X, [2, "a"]))


def test_binary_keeps_the_better_half_in_each_pass() -> None:
    wsn = finished(mlp(), tasks=range(5))
    left, passes = [*range(5)], []
    while len(left) > 1:
        best = expected(wsn, X, left).argsort()[: (len(left) + 1) // 2]
        left = sorted(left[i] for i in best.tolist())
    wsn.model.register_forward_hook(lambda *_: passes.append(1))
    found = wsn.infer_task(X, method="binary")
    assert found.task == left[0] and len(passes) == 3
    torch.testing.assert_close(found.gradient, expected(wsn, X, range(5)))


def test_masks_of_many_tasks_are_unpacked_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    from wsn_fast.continual import superposition

    wsn = finished(mlp())
    whole = wsn.infer_task(X, method="one-shot").gradient
    monkeypatch.setattr(superposition, "_ELEMENTS", 1200)  # two masks of 36 x 16, and all of the others
    torch.testing.assert_close(wsn.infer_task(X, method="one-shot").gradient, whole)


@pytest.mark.parametrize("method", ["one-shot", "binary"])
def test_everything_is_left_as_it_is(method: str) -> None:
    wsn = finished(convnet())
    wsn.begin_task("new")
    wsn.train()
    train_steps(wsn, wsn.guard(torch.optim.Adam(wsn.parameters())), batches(9, 1))
    state = {name: value.clone() for name, value in wsn.state_dict().items()}
    grads = [param.grad for param in wsn.parameters()]
    wsn.infer_task(X, method=method)
    assert all(torch.equal(value, state[name]) for name, value in wsn.state_dict().items())
    assert all(now is before for now, before in zip((p.grad for p in wsn.parameters()), grads, strict=True))
    assert wsn.current_task == "new" and not any(layer.gate_state.given for layer in wsn.subnet_layers().values())
    assert not any(module._forward_hooks for module in wsn.modules())
    wsn.verify(probe=X)


def test_under_inference_mode_and_without_gradients() -> None:
    wsn = finished(mlp())
    gradient = wsn.infer_task(X, method="one-shot").gradient
    with torch.inference_mode():
        assert torch.equal(wsn.infer_task(X + 0, method="one-shot").gradient, gradient)  # type: ignore[arg-type]


def test_under_autocast_coefficients_stay_precise() -> None:
    wsn = finished(mlp(), tasks=range(3))
    with torch.autocast("cpu", torch.bfloat16):
        found = wsn.infer_task(X, method="one-shot").gradient
    gradient = expected(wsn, X, wsn.tasks)
    assert found is not None and found.dtype is torch.float32
    assert (found - gradient).abs().max() < 0.03 * gradient.abs().max()


def test_masks_are_not_added_up_in_the_dtype_of_autocast() -> None:
    from wsn_fast.continual.superposition import _Mixed

    layer: Any = finished(mlp()).subnet_layers()["1"]
    alpha = torch.tensor([0.3, 0.3, 0.4], requires_grad=True)

    def both() -> tuple[Tensor, Tensor]:
        mixed = _Mixed.apply(alpha, layer.weight.detach(), layer.weight_masks)
        return mixed, torch.autograd.grad(mixed.square().sum(), alpha)[0]

    expected = both()
    with torch.autocast("cpu", torch.bfloat16):
        found = both()
    assert all(map(torch.equal, found, expected))


class Repeated(nn.Module):
    """Runs its layers again while backward runs."""

    def __init__(self) -> None:
        super().__init__()
        self.layers, self.heads = mlp()[:-1], TaskHeads(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.heads(checkpoint(self.layers, x.requires_grad_(), use_reentrant=False))


def test_with_activation_checkpointing() -> None:
    wsn = finished(Repeated())
    plain = WSN(nn.Sequential(*wsn.model.layers, wsn.model.heads))  # type: ignore[arg-type]
    torch.testing.assert_close(wsn.infer_task(X.clone(), method="one-shot").gradient, expected(plain, X, plain.tasks))


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.head = nn.LSTM(6, 8, batch_first=True), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x[:, 0])[0][:, -1])


def test_layers_that_read_their_weights() -> None:
    torch.manual_seed(0)
    wsn = finished(convert(Recurrent(), heads="head"))
    found = wsn.infer_task(X, method="one-shot").gradient
    dense, alpha = nn.LSTM(6, 8, batch_first=True), torch.full((3,), 1 / 3, requires_grad=True)
    rnn: Any = wsn.subnet_layers()["rnn"]
    mixed = {n: sum(a * rnn.param(n).detach() * rnn.mask(n, t) for t, a in enumerate(alpha)) for n in rnn.GATED}
    hidden = torch.func.functional_call(dense, mixed, (X[:, 0],))[0][:, -1]
    heads = [wsn.model.head.head(task) for task in wsn.tasks]  # type: ignore[union-attr]
    logits = sum(a * head(hidden) for a, head in zip(alpha, heads, strict=True))
    entropy = torch.distributions.Categorical(logits=logits).entropy().mean()
    torch.testing.assert_close(found, torch.autograd.grad(entropy, alpha)[0])


@pytest.mark.ci
def test_a_compiled_model_runs_eagerly() -> None:
    wsn = finished(mlp())
    gradient = wsn.infer_task(X, method="one-shot").gradient
    wsn.compile(backend="eager")
    with torch.no_grad(), wsn.use_task(1):
        wsn(X)
    assert torch.equal(wsn.infer_task(X, method="one-shot").gradient, gradient)  # type: ignore[arg-type]


class Holder(nn.Module):
    """Has a value for each task beside modules that all tasks compute together."""

    def __init__(self) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(36))
        self.layer, self.heads = FastSubnetLinear(36, 12, density=0.5), TaskHeads(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.heads(self.layer(x.flatten(1) + self.shift))


class Reader(nn.Module):
    """Reads the values of a norm without calling it."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(36)
        self.layer, self.heads = FastSubnetLinear(36, 12, density=0.5), TaskHeads(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.heads(self.layer(x.flatten(1) * self.norm.weight + self.norm.bias))


class Widths(nn.Module):
    """Has heads of several widths, of which it cuts one off."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.heads = FastSubnetLinear(36, 12, density=0.5), TaskHeads(12, tasks={"a": 3, 1: 3, 2: 4})

    def forward(self, x: Tensor) -> Tensor:
        return self.heads(self.layer(x.flatten(1)))[:, :3]


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        (Holder, {"per_task": "shift"}, r"shift has other values in each task, and its module \(Holder\) has modules"),
        (Reader, {}, r"norm\.weight has other values in each task, and the forward pass does not call its module"),
        (Widths, {}, "outputs of a TaskHeads must be tensors of one shape"),
    ],
)
def test_tasks_that_cannot_be_superposed(model: type[nn.Module], options: dict[str, Any], message: str) -> None:
    wsn = finished(model(), **options)
    with pytest.raises(ValueError, match=f"the tasks cannot be superposed: .*{message}"):
        wsn.infer_task(X, method="one-shot")
    assert not any(layer.gate_state.given for layer in wsn.subnet_layers().values())
    assert wsn.infer_task(X).entropy is not None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "gradient"}, r"method must be one of \('entropy', 'one-shot', 'binary'\), got 'gradient'"),
        ({"method": "binary", "one_pass": True}, "one_pass must be None with method='binary': .*, got True"),
        ({"method": "one-shot", "tasks": ["b"]}, "task 'b' is not finished; finished tasks: "),
        ({"method": "one-shot", "tasks": []}, "needs finished tasks"),
    ],
)
def test_other_arguments_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        finished(mlp()).infer_task(X, **options)


def test_no_row_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one row, got none"):
        finished(mlp()).infer_task(X[:0], method="one-shot")


@pytest.mark.parametrize("method", ["one-shot", "binary"])
def test_the_only_task_is_found(method: str) -> None:
    assert finished(mlp(), tasks=["only"]).infer_task(X, method=method).task == "only"


def test_the_tasks_of_masks_over_random_weights_are_found() -> None:
    torch.manual_seed(0)
    wsn = supsup(
        nn.Sequential(nn.Linear(20, 128), nn.ReLU(), nn.Linear(128, 20)), 0.5
    )  # 15 outputs that no class needs

    def data(task: int) -> tuple[Tensor, Tensor]:
        x = torch.randn(200, 20)
        x[:, :5] *= 4
        return x[:, torch.randperm(20, generator=torch.Generator().manual_seed(task))], x[:, :5].argmax(1)

    for task in range(3):
        wsn.begin_task(task)
        optimizer = wsn.guard(torch.optim.Adam(wsn.parameters(), lr=0.01))
        x, y = data(task)
        for _ in range(30):
            optimizer.zero_grad()
            F.cross_entropy(wsn(x), y).backward()
            optimizer.step()
        wsn.end_task()
    for method in ("one-shot", "binary"):
        assert [wsn.infer_task(data(task)[0], method=method).task for task in range(3)] == [0, 1, 2], method
