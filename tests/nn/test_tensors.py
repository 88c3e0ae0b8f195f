"""Gated tensors of any module: masks, gradients, compiled code, checkpoints, copies and moves."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from any_modules import CASES, DENSITY, DIM, VECTORS, WORDS, Net, gates, twins, wsn_of
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from wsn_fast import WSN, convert, materialize
from wsn_fast.nn.gated import SubnetLayer
from wsn_fast.ops import topc_mask
from wsn_fast.optim import SubnetAdamW

projections = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")


def gradients(model: nn.Module, x: Any, loss: Callable[[Tensor], Tensor] = lambda out: out.square().sum()) -> list[Any]:
    """Those of all parameters, and of ``x`` if it needs one."""
    model.zero_grad()
    loss(model(x)).backward()
    return [param.grad for _, param in sorted(model.named_parameters())]


def same(first: list[Any], second: list[Any]) -> None:
    torch.testing.assert_close(first, second)
    assert all((one is None) == (other is None) for one, other in zip(first, second, strict=True))


# --- what is computed ---
@projections
@pytest.mark.parametrize("name", CASES)
def test_every_matrix_and_bias_is_gated(name: str) -> None:
    model = CASES[name].make()
    norms = {id(p) for module in model.modules() if isinstance(module, nn.LayerNorm) for p in module.parameters()}
    wanted = {id(p) for n, p in model.named_parameters() if p.squeeze().ndim > 1 or "bias" in n} - norms
    found = gates(convert(model, DENSITY))
    assert {id(layer.param(tensor)) for _, layer, tensor in found} == wanted
    for _, layer, tensor in found:
        score = getattr(layer, f"{tensor}_score")
        assert torch.equal(layer.masks_of_scores()[tensor], topc_mask(score, DENSITY))


@projections
@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients_are_those_of_a_dense_model_with_masks(name: str) -> None:
    subnet, dense, x = twins(name)
    whole = {id(layer.param(t)): layer.param(t).detach().clone() for _, layer, t in gates(subnet)}
    out, expected = subnet(x), dense(x)
    assert torch.equal(out, expected)
    factors = torch.randn_like(out)
    for one in (out, expected):
        (one * factors).sum().backward()
    for module, layer, tensor in gates(subnet):
        param, score = layer.param(tensor), getattr(layer, f"{tensor}_score")
        grad = dense.get_submodule(module).get_parameter(tensor).grad
        if name != "tied layers":  # there gradients are added up after they were masked
            assert torch.equal(param.grad, torch.where(topc_mask(score, DENSITY), grad, 0.0))
        torch.testing.assert_close(score.grad, grad * whole[id(param)] * score.detach().sign())


@projections
@pytest.mark.parametrize("name", CASES)
def test_inference_is_that_of_a_dense_model_with_masks(name: str) -> None:
    # This takes the fast paths of attention and of encoder layers. PyTorch chooses kernels by requires_grad.
    subnet, dense, x = twins(name)
    subnet.eval()
    dense.eval().requires_grad_(False)
    with torch.no_grad():
        assert torch.equal(subnet(x), dense(x))
    with torch.inference_mode():
        assert torch.equal(subnet(x), dense(x))


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("nested", [True, False])
def test_padded_batches_take_the_fast_path_with_masks(nested: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = nn.TransformerEncoderLayer(DIM, 2, 16, dropout=0.0, batch_first=True)
    dense = nn.TransformerEncoder(layer, 2, enable_nested_tensor=nested).eval()
    subnet = convert(copy.deepcopy(dense), DENSITY)
    for name, one, tensor in gates(subnet):
        with torch.no_grad():
            dense.get_submodule(name).get_parameter(tensor).mul_(one.masks_of_scores()[tensor])
    padding = torch.arange(5) >= torch.tensor([[5], [3], [4], [5], [1], [2]])
    trained = subnet(VECTORS, src_key_padding_mask=padding)
    calls, fast = [], torch._transformer_encoder_layer_fwd
    monkeypatch.setattr(torch, "_transformer_encoder_layer_fwd", lambda *args: calls.append(1) or fast(*args))
    with torch.no_grad():
        inferred = subnet(VECTORS, src_key_padding_mask=padding)
        expected = dense.requires_grad_(False)(VECTORS, src_key_padding_mask=padding)
    assert len(calls) == 4
    assert torch.equal(inferred, expected)
    torch.testing.assert_close(inferred[~padding], trained[~padding])


def test_under_autocast() -> None:
    for name in ("attention", "tied decoder", "LSTM cell", "experts"):
        subnet, dense, x = twins(name)
        with torch.autocast("cpu", torch.bfloat16):
            out, expected = subnet(x), dense(x)
        assert out.dtype is expected.dtype
        assert torch.equal(out, expected)
        out.float().square().sum().backward()
        assert all(layer.param(tensor).grad.dtype is torch.float32 for _, layer, tensor in gates(subnet))


# --- how often, and for whom ---
class Counts:
    """Counts the gates that are made, by name."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.made: list[str] = []
        original = SubnetLayer.masked

        def masked(layer: SubnetLayer, name: str, dtype: torch.dtype) -> Tensor | None:
            made = original(layer, name, dtype)
            self.made += [] if made is None else [name]
            return made

        monkeypatch.setattr(SubnetLayer, "masked", masked)

    def of(self, call: Callable[[], object]) -> list[str]:
        self.made.clear()
        call()
        return sorted(self.made)


class Greedy(nn.Module):
    """Reads one tensor many times, and returns what it got."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.weight = nn.Embedding(5, 4), nn.Parameter(torch.randn(4, 4))

    def forward(self) -> list[Tensor]:
        return [self.embed.weight, self.embed(torch.arange(5)), self.embed.weight, self.weight, self.weight]


@pytest.mark.parametrize("versions", [0, 300])
@pytest.mark.parametrize("grad", [True, False])
def test_one_gate_for_each_tensor_and_pass(versions: int, grad: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model, counts = convert(Greedy(), DENSITY), Counts(monkeypatch)
    with torch.no_grad():
        for _ in range(versions):  # numbers above 256 are no constants of Python
            for param in model.parameters():
                param.mul_(1.0)
    for _ in range(2):
        with torch.set_grad_enabled(grad):
            assert counts.of(model) == ["weight", "weight"]
    first, _, second, *_ = model()
    assert first is second


@projections
def test_every_model_makes_one_gate_for_each_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    counts = Counts(monkeypatch)
    for name, case in CASES.items():
        wsn = wsn_of(name)
        wsn.begin_task(0)
        expected = sorted(tensor for _, _, tensor in gates(wsn.model))
        assert counts.of(lambda wsn=wsn, case=case: wsn(case.x)) == expected, name


def test_a_write_in_a_pass_makes_a_new_gate() -> None:
    class Writes(Greedy):
        def forward(self) -> list[Tensor]:
            first = self.embed.weight
            with torch.no_grad():
                self.embed._parameters["weight"].add_(1.0)
            return [first, self.embed.weight]

    model = convert(Writes(), 1.0)
    first, second = model()
    torch.testing.assert_close(first + 1, second)


def test_gates_are_dropped_when_the_pass_is_over() -> None:
    model = convert(Greedy(), DENSITY)
    model()
    assert not model.gate_state.reads
    assert not model.embed.gate_state.reads
    assert not model.gate_state.scope.running

    class Fails(Greedy):
        def forward(self) -> list[Tensor]:
            raise RuntimeError(f"{self.embed.weight.sum() + self.weight.sum()}")

    model = convert(Fails(), DENSITY)
    with pytest.raises(RuntimeError):
        model()
    assert not model.gate_state.reads
    assert not model.gate_state.scope.running
    assert model.embed.weight is model.embed._parameters["weight"]


# --- checkpoints ---
class Repeated(nn.Module):
    """One matrix outside of a repeated part and, twice, within it; and an embedding that the part reads."""

    def __init__(self, again: bool | None = None) -> None:
        super().__init__()
        self.matrix, self.embed, self.again = nn.Parameter(torch.randn(DIM, DIM)), nn.Embedding(11, DIM), again

    def part(self, x: Tensor) -> Tensor:
        return torch.tanh(torch.tanh(x @ self.matrix) @ self.matrix + self.embed.weight[0])

    def forward(self, words: Tensor) -> Tensor:
        x = self.embed(words).mean(1) @ self.matrix
        for _ in range(2):
            plain = self.again is None or not self.training
            x = self.part(x) if plain else checkpoint(self.part, x, use_reentrant=self.again)
        return F.linear(x, self.embed.weight)


@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("owner", ["nobody", "one pass", "gates ahead"])
def test_activation_checkpoints_change_no_gradient(again: bool, owner: str) -> None:
    found = []
    for one in (None, again):
        torch.manual_seed(0)
        wsn = WSN(convert(Repeated(one).double(), DENSITY), gates_ahead=owner == "gates ahead")
        wsn.begin_task(0)
        make = {"one pass": lambda wsn: SubnetAdamW(wsn, one_pass=True)}.get(
            owner, lambda wsn: wsn.guard(torch.optim.SGD(wsn.parameters(), 0.1))
        )
        optimizer = make(wsn)
        for _ in range(2):
            optimizer.zero_grad()
            wsn(WORDS).square().sum().backward()
            grads = [(n, p.grad) for n, p in wsn.named_parameters() if p.grad is not None]
            optimizer.step()
        found.append([dict(grads), wsn.state_dict()])
        wsn.eval().end_task(probe=WORDS)
    torch.testing.assert_close(*found)


# --- torch.compile ---
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@projections
@pytest.mark.sample(4)
@pytest.mark.parametrize("name", CASES)
def test_compiled_code_computes_the_same(name: str) -> None:
    case, wsn = CASES[name], wsn_of(name).eval()
    wsn.begin_task(0)
    expected = gradients(wsn, case.x)
    torch._dynamo.reset()
    compiled = torch.compile(wsn.model, backend="aot_eager", fullgraph=case.traced and "_norm" not in name)
    torch.testing.assert_close(compiled(case.x), wsn(case.x))
    same(gradients(wsn, case.x, lambda _: compiled(case.x).square().sum()), expected)
    wsn.eval().end_task()
    with torch.no_grad(), wsn.use_task(0):
        torch.testing.assert_close(compiled(case.x), wsn(case.x))
    torch._dynamo.reset()


# --- torch.func, moves and copies ---
def test_functional_call_computes_with_the_tensors_that_it_is_given() -> None:
    wsn = wsn_of("tied decoder")
    wsn.begin_task(0)
    other = {name: torch.randn_like(param) for name, param in wsn.named_parameters()}
    expected = copy.deepcopy(wsn)
    with torch.no_grad():
        for name, param in expected.named_parameters():
            param.copy_(other[name])
    called = torch.func.functional_call(wsn, other, (WORDS,))
    assert torch.equal(called, expected(WORDS))
    assert not torch.equal(called, wsn(WORDS))


def test_transforms_go_through_a_finished_task() -> None:
    wsn = wsn_of("bare").eval()
    wsn.begin_task(0)
    with pytest.raises(RuntimeError, match=r"transforms of torch\.func"):
        torch.func.vmap(lambda x: wsn(x[None]))(VECTORS)
    wsn.end_task()
    wsn.use_task(0)
    torch.testing.assert_close(torch.func.vmap(lambda x: wsn(x[None])[0])(VECTORS), wsn(VECTORS))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_models_may_be_moved_to_another_dtype(dtype: torch.dtype) -> None:
    for name in ("LSTM", "attention", "bare", "tied layers"):
        subnet, dense, x = twins(name)
        x = x if x is WORDS else x.to(dtype)
        out = subnet.to(dtype)(x)
        assert out.dtype is dtype
        masks = [layer.masks_of_scores()[tensor] for _, layer, tensor in gates(subnet)]
        assert all(0 < int(mask.sum()) < mask.numel() for mask in masks)
        if dtype is torch.float64:
            assert torch.equal(out, dense.to(dtype)(x))
        wsn = WSN(nn.Sequential(subnet), **CASES[name].owners)
        wsn.begin_task(0)
        wsn.end_task(probe=x)


@projections
@pytest.mark.parametrize("assign", [False, True])
def test_models_on_meta_are_loaded_and_made(assign: bool) -> None:
    for name, case in CASES.items():
        if "norm" in name or name == "pruned":
            continue  # PyTorch cannot make these on meta
        if name == "tied layers" and not assign:
            continue  # to_empty breaks ties
        real = wsn_of(name)
        real.begin_task(0)
        real.eval().end_task()
        with torch.device("meta"):
            empty = wsn_of(name)
        if not assign:
            empty.to_empty(device="cpu")
        empty.load_state_dict(real.state_dict(), assign=assign)
        if name == "tied layers" and assign:
            empty.model.body.out.weight = empty.model.body.embed.weight
            empty.model.body.out.weight_score = empty.model.body.embed.weight_score
        materialize(empty, "cpu").eval()
        with torch.no_grad(), real.use_task(0), empty.use_task(0):
            assert torch.equal(empty(case.x), real(case.x)), name


def test_what_is_not_loaded_is_made() -> None:
    with torch.device("meta"):
        model = convert(Net(CASES["LSTM"]), DENSITY)
    materialize(model, "cpu")
    assert all(0 < layer.masks_of_scores()[t].float().mean() < 0.6 for _, layer, t in gates(model))
    assert model.body(VECTORS).isfinite().all()


def test_tensors_that_need_no_gradient() -> None:
    for one_pass in (False, True):
        wsn = wsn_of("attention")
        frozen = wsn.model.body.module.in_proj_weight.requires_grad_(False)
        wsn.begin_task(0)
        before, score = frozen.clone(), wsn.model.body.module.in_proj_weight_score.clone()
        optimizer = SubnetAdamW(wsn, 0.1, one_pass=one_pass)
        wsn(VECTORS).square().sum().backward()
        assert frozen.grad is None
        optimizer.step()
        assert torch.equal(frozen, before)
        assert not torch.equal(wsn.model.body.module.in_proj_weight_score, score)
        wsn.eval().end_task(probe=VECTORS)


def test_an_optimizer_may_hold_some_tensors_of_a_module() -> None:
    wsn = wsn_of("LSTM")
    lstm = wsn.model.body.module
    wsn.begin_task(0)
    held = [lstm.weight_ih_l0, lstm.weight_ih_l0_score, lstm.bias_hh_l1]
    heads = [*wsn.model.heads.parameters()]
    others = {n: p.detach().clone() for n, p in lstm.named_parameters() if not any(p is one for one in held)}
    optimizer = wsn.guard(torch.optim.AdamW([*held, *heads], 0.1))
    for _ in range(2):
        wsn(VECTORS).square().sum().backward()
        optimizer.step()
    assert all(torch.equal(dict(lstm.named_parameters())[n], value) for n, value in others.items())
    wsn.eval().end_task(probe=VECTORS)
    wsn.verify(probe=VECTORS)


def test_a_parameter_that_stands_twice_in_a_list_has_one_mask() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            one = nn.Parameter(torch.randn(DIM, DIM))
            self.listed = nn.ParameterList([one, one])

        def forward(self, x: Tensor) -> Tensor:
            return torch.tanh(x @ self.listed[0]) @ self.listed[1]

    for one_pass in (False, True):
        wsn = WSN(convert(Twice(), DENSITY))
        for task in range(2):
            wsn.begin_task(task)
            optimizer = SubnetAdamW(wsn, 0.1, one_pass=one_pass)
            for _ in range(3):
                optimizer.zero_grad()
                wsn(VECTORS).square().sum().backward()
                optimizer.step()
            wsn.end_task(probe=VECTORS)
        wsn.verify(probe=VECTORS)
    assert len([*wsn.gated()]) == 1
