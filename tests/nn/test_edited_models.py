"""Reads of gated tensors in models that users put together, edit and call in their own ways."""

from __future__ import annotations

import contextlib
import copy
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from any_modules import DENSITY, DIM, WORDS, LowBare, Reads, TiedDecoder, masked
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from wsn_fast import WSN, convert, to_dense
from wsn_fast.nn.gated import SubnetLayer
from wsn_fast.nn.reads import Reader, Scope


# --- models within models ---
class Outer(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.out = inner, nn.Linear(11, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.inner(x) + self.inner.embed.weight.mean(1))


def test_a_converted_model_may_be_put_into_another_one() -> None:
    for convert_outer in (True, False):
        inner = convert(TiedDecoder(), DENSITY)
        model = Outer(inner)
        wsn = WSN(convert(model, 0.7) if convert_outer else model, **({} if convert_outer else {"shared": "out.*"}))
        assert inner.embed.density == DENSITY
        h = inner(WORDS) + masked(inner.embed).mean(1)
        out = model.out
        expected = F.linear(h, masked(out), masked(out, "bias")) if convert_outer else out(h)
        assert torch.equal(wsn(WORDS), expected)
        assert torch.equal(model(WORDS), expected)
        wsn.begin_task(0)
        wsn.end_task(probe=WORDS)


def test_two_models_may_share_a_module() -> None:
    shared = nn.Embedding(11, 4)

    class Uses(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.own, self.embed = nn.Parameter(torch.randn(4, 4)), shared

        def forward(self) -> Tensor:
            return self.embed.weight @ self.own

    first, second = Uses(), Uses()
    convert(first, DENSITY)
    convert(second, DENSITY)
    for model in (first, second, copy.deepcopy(first)):
        assert torch.equal(model(), masked(shared) @ masked(model, "own"))


def test_a_part_of_a_model_may_be_called_alone() -> None:
    wsn = WSN(convert(nn.Sequential(nn.Sequential(TiedDecoder()), nn.Linear(11, 3)), DENSITY))
    wsn.begin_task(0)
    wsn.end_task()
    with wsn.use_task(0), torch.no_grad():
        expected = wsn(WORDS)
        for part in (wsn.model[0], wsn.model[0][0]):
            assert torch.equal(wsn.model[1](part(WORDS)), expected)
        assert torch.equal(wsn.model[0][0].embed(WORDS), masked(wsn.model[0][0].embed)[WORDS])


# --- what users do to converted modules ---
def test_tensors_may_be_replaced() -> None:
    model = convert(Reads(), 1.0)
    new = nn.Parameter(torch.ones(5, 4))
    model.embed.weight = new
    assert model.embed.weight is new
    assert torch.equal(model()[0], new)
    with pytest.raises(TypeError, match="cannot assign"):
        model.embed.weight = torch.ones(5, 4)


def test_tensors_that_are_no_parameters_are_masked_too() -> None:
    # As DataParallel puts them into its copies.
    model = convert(Reads(), DENSITY)
    replica = copy.deepcopy(model)
    for layer in (replica.embed, replica.linear):
        tensor = layer.param("weight").detach().clone()
        del layer._parameters["weight"]
        layer.weight = tensor
        assert layer.weight is tensor
    assert all(map(torch.equal, replica(), model()))


def test_a_pass_goes_on_after_one_of_another_thread_is_over() -> None:
    scope, entered, over = Scope(), threading.Event(), threading.Event()

    def forward() -> bool:
        entered.set()
        assert over.wait(10)
        return scope.are_masked()

    with ThreadPoolExecutor(1) as pool:
        with scope.opened():
            later = pool.submit(scope, forward)
            assert entered.wait(10)
        over.set()
        assert later.result(10)
    assert not scope.are_masked()


@pytest.mark.parametrize("finished", [False, True])
@pytest.mark.parametrize("grad", [False, True])
def test_what_writes_to_a_masked_tensor_is_told_so(finished: bool, grad: bool) -> None:
    model = Reads()
    model.linear = nn.Linear(4, 4, bias=False)  # only what was read is kept, and given to the layers
    convert(model, DENSITY)
    wsn = WSN(model)
    wsn.begin_task(0)
    if finished:
        wsn.end_task()

    def write(layer: nn.Module, args: object) -> None:
        with torch.no_grad():
            layer.weight.mul_(2)

    with wsn.use_task(0) if finished else contextlib.nullcontext(), torch.set_grad_enabled(grad):
        wsn()  # from the next pass on the layers are given what this one keeps
        expected = [one.clone() for one in wsn()]
        hook = model.register_forward_pre_hook(lambda *args: write(model.linear, args))
        with pytest.raises(RuntimeError, match=r"wrote to 'weight' of FastSubnetLinear .* layer\.param\('weight'\)"):
            wsn()
        hook.remove()
        assert all(map(torch.equal, wsn(), expected))


def test_a_new_object_of_the_class_of_a_reader_is_dense() -> None:
    model = convert(Reads(), DENSITY)
    assert isinstance(model, Reader)
    assert type(model).__name__ == "Reads"
    new = type(model)()
    assert not any(isinstance(module, SubnetLayer) for module in new.modules())
    assert all(isinstance(one, nn.Parameter) for one in new())


def test_what_cannot_be_masked_is_an_error_and_not_the_parameter() -> None:
    model = convert(Reads(), DENSITY)
    del model.embed.weight_score
    with pytest.raises(RuntimeError, match=r"'weight' of SubnetEmbedding cannot be masked.*weight_score"):
        model()


def test_classes_that_list_their_subclasses_do_not_see_ours() -> None:
    class Listed(nn.Module):
        known: dict[str, type] = {}  # noqa: RUF012

        def __init_subclass__(cls, *, key: str) -> None:
            cls.known[key] = cls

    class Known(Listed, key="known"):
        def __init__(self) -> None:
            super().__init__()
            self.matrix = nn.Parameter(torch.randn(4, 4))

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.matrix

    model = convert(Known(), DENSITY)
    assert Listed.known == {"known": Known}
    x = torch.randn(2, 4)
    assert torch.equal(model(x), x @ masked(model, "matrix"))


def test_a_module_in_evaluation_keeps_nothing_of_another_task() -> None:
    class Caches(nn.Module):
        """Keeps what it computed until it is trained again, as timm's LeViT does."""

        def __init__(self) -> None:
            super().__init__()
            self.biases, self.kept = nn.Parameter(torch.randn(4, 4)), None

        def train(self, mode: bool = True) -> Any:
            self.kept = None if mode else self.kept
            return super().train(mode)

        def forward(self, x: Tensor) -> Tensor:
            if self.training or self.kept is None:
                self.kept = self.biases * 2
            return x + self.kept

    wsn, x = WSN(convert(nn.Sequential(Caches(), nn.Linear(4, 2)), DENSITY)).eval(), torch.randn(4, 4)
    wsn.model[1].eval()
    outs = []
    for task in range(2):
        wsn.begin_task(task)
        with torch.no_grad():
            wsn.model[0].biases_score.normal_()
        wsn.end_task(probe=x)
    with torch.no_grad():
        for task in (0, 1, 0):
            with wsn.use_task(task):
                outs.append(wsn(x))
        assert not torch.equal(outs[0], outs[1])
        assert torch.equal(outs[0], outs[2])
        for task in range(2):
            assert torch.equal(to_dense(wsn, task)(x), outs[task])
    assert not any(module.training for module in wsn.modules())


def test_a_checkpointed_read_under_another_scope() -> None:
    class Outside(nn.Module):
        """Holds no gated tensor, and reads that of a module that it does not hold."""

        def __init__(self, other: nn.Module) -> None:
            super().__init__()
            self.other = [other]

        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(lambda x: self.other[0](x), x, use_reentrant=True)

    embed = convert(LowBare(), DENSITY)
    x = torch.randn(3, 5, DIM, requires_grad=True)
    Outside(embed)(x).sum().backward()
    found, embed.lora_A.grad = embed.lora_A.grad, None
    embed(x).sum().backward()
    torch.testing.assert_close(found, embed.lora_A.grad)


def test_a_forward_that_is_replaced_gets_masked_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    class Linear(nn.Module):
        """Its layer is a fast one, so only the code tells who reads the weight."""

        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self) -> Tensor:
            return self.linear(torch.ones(4))

    def other(self: Any) -> Tensor:
        return self.linear.weight

    of_class, of_object = Linear(), Linear()
    of_object.forward = other.__get__(of_object)  # before the conversion
    for model in (of_class, of_object):
        convert(model, DENSITY)
    assert torch.equal(of_object(), masked(of_object.linear))
    read = convert(Reads(), DENSITY)
    monkeypatch.setattr(Reads, "forward", lambda self: self.embed.weight)  # after it
    assert torch.equal(read(), masked(read.embed))
    assert torch.equal(read.forward(), masked(read.embed))
    assert torch.equal(WSN(of_class)(), of_class())
