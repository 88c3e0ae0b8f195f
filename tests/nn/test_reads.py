"""Who gets masked tensors from attributes, and who gets the Parameters."""

from __future__ import annotations

import copy
import threading

import pytest
import torch
import torch.nn.functional as F
from any_modules import DENSITY, DIM, VECTORS, WORDS, Bare, LowBare, Reads, TiedDecoder, masked
from torch import Tensor, nn

from wsn_fast import WSN, UnmaskedReadError, convert, to_dense


def weight_of(module: nn.Module) -> Tensor:
    return module.weight


class ByFunction(Reads):
    def read(self) -> list[Tensor]:
        return [weight_of(self.embed), weight_of(self.linear)]


class ByName(Reads):
    def read(self) -> list[Tensor]:
        return [getattr(one, "weight") for one in (self.embed, self.linear)]  # noqa: B009


class ByComprehension(Reads):
    def read(self) -> list[Tensor]:
        return [one.weight for one in self.children()]


class ByProperty(Reads):
    @property
    def both(self) -> list[Tensor]:
        return [self.embed.weight, self.linear.weight]

    def read(self) -> list[Tensor]:
        return self.both


class ByChild(Reads):
    """A method of a child that is not its forward."""

    class Embedding(nn.Embedding):
        def matrix(self) -> Tensor:
            return self.weight

    class Linear(nn.Linear):
        def matrix(self) -> Tensor:
            return self.weight

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.linear = self.Embedding(5, 4), self.Linear(4, 4)

    def read(self) -> list[Tensor]:
        return [self.embed.matrix(), self.linear.matrix()]


class ByStoredFunction(Reads):
    def __init__(self) -> None:
        super().__init__()
        self.stored = weight_of

    def read(self) -> list[Tensor]:
        return [self.stored(self.embed), self.stored(self.linear)]


READERS = (Reads, ByFunction, ByName, ByComprehension, ByProperty, ByChild, ByStoredFunction)


@pytest.mark.parametrize("kind", READERS)
def test_readers_get_masked_tensors_however_the_model_is_called(kind: type[Reads]) -> None:
    model = convert(kind(), DENSITY)
    expected = [masked(model.embed), masked(model.linear)]
    wsn = WSN(model)
    wrapped = nn.Sequential(model)
    for found in (model(), wsn(), model.forward(), model.read(), wrapped(None), copy.deepcopy(model)()):
        assert all(map(torch.equal, found, expected))
    assert not any(isinstance(one, nn.Parameter) for one in model())
    wsn.begin_task(0)
    wsn.end_task(probe=())
    wsn.verify(probe=())
    with wsn.use_task(0), torch.no_grad():
        found = wsn()
    assert all(map(torch.equal, found, expected))
    assert all(map(torch.equal, to_dense(wsn, 0)(), expected))


@pytest.mark.parametrize("kind", READERS)
def test_outside_of_a_pass_attributes_are_the_parameters(kind: type[Reads]) -> None:
    model = kind()
    before = [model.embed.weight, model.linear.weight]
    wsn = WSN(convert(model, DENSITY))
    wsn()
    wsn.begin_task(0)
    wsn.end_task()
    with wsn.use_task(0):
        assert model.embed.weight is before[0]
        assert model.linear.weight is before[1]
        assert model.get_parameter("embed.weight") is before[0]
    assert [*map(id, before)] == [id(p) for n, p in model.named_parameters() if n.endswith("weight")]


class ByRegister(Reads):
    def read(self) -> list[Tensor]:
        return [self.embed._parameters["weight"], self.linear._parameters["weight"]]


class ByParameters(Reads):
    def read(self) -> list[Tensor]:
        return [p for n, p in self.named_parameters() if n.endswith("weight")]


class Keeps(Reads):
    """Reads outside of its pass, and keeps what it got."""

    def __init__(self) -> None:
        super().__init__()
        self.kept = [self.embed.weight, self.linear.weight]

    def read(self) -> list[Tensor]:
        return self.kept


@pytest.mark.parametrize("kind", [ByRegister, ByParameters, Keeps])
def test_who_gets_the_parameters_by_another_way_is_found(kind: type[Reads]) -> None:
    wsn = WSN(convert(kind(), DENSITY))
    wsn.begin_task(0)
    with pytest.raises(UnmaskedReadError, match=r"embed\.weight\n  linear\.weight"):
        wsn.end_task(probe=())


def test_get_parameter_has_none_to_give_within_a_pass() -> None:
    class ByPath(Reads):
        def read(self) -> list[Tensor]:
            return [self.get_parameter("embed.weight")]

    with pytest.raises(AttributeError, match=r"is not an nn\.Parameter"):
        convert(ByPath(), DENSITY)()


def test_a_list_of_parameters_is_masked_where_it_is_read() -> None:
    model = convert(Bare(), DENSITY)
    assert torch.equal(model(VECTORS), WSN(model, per_task="token")(VECTORS))
    seen = []
    model.listed.register_forward_hook(lambda *_: None)
    hook = model.register_forward_hook(lambda module, args, out: seen.extend(module.listed))
    model(VECTORS)
    assert all(map(torch.equal, seen, [masked(model.listed, "0"), masked(model.listed, "1")]))
    hook.remove()
    assert [*model.listed] == [*model.listed.parameters()][:2]


def test_a_method_that_forward_calls_may_be_called_alone() -> None:
    model = convert(LowBare(), DENSITY)
    low = masked(model, "lora_B") @ masked(model, "lora_A")
    expected = F.linear(VECTORS, masked(model) + low, masked(model, "bias"))
    torch.testing.assert_close(model.forward_features(VECTORS), expected)
    assert torch.equal(model.forward_features(VECTORS).mean(1), model(VECTORS))
    assert model.forward_features.__name__ == "forward_features"


# --- hooks ---
def test_hooks_of_the_backward_pass_see_the_parameters() -> None:
    model, seen = convert(TiedDecoder(), DENSITY), []
    embed = model.embed

    def see(*args: object) -> None:
        seen.append(embed.weight)

    model.inner.register_full_backward_hook(see)
    embed.weight.register_hook(see)
    embed.weight.register_post_accumulate_grad_hook(see)
    out = model(WORDS)
    out.register_hook(see)
    out.sum().backward()
    assert len(seen) >= 4
    assert all(one is embed.weight for one in seen)


def test_hooks_of_the_forward_pass_see_masked_tensors() -> None:
    model, seen = convert(nn.Sequential(nn.Embedding(11, 4)), DENSITY), []
    model[0].register_forward_pre_hook(lambda module, args: seen.append(module.weight))
    model[0].register_forward_hook(lambda module, args, out: seen.append(module.weight))
    model(WORDS)
    assert all(torch.equal(one, masked(model[0])) for one in seen)
    assert seen[0] is seen[1]


def test_an_optimizer_that_steps_in_the_backward_pass_sees_the_parameters() -> None:
    model = convert(TiedDecoder(), DENSITY)
    before, stepped = model.embed.weight.detach().clone(), []

    def step(param: Tensor) -> None:
        stepped.append(model.embed.weight is param)
        with torch.no_grad():
            model.embed.weight.sub_(param.grad)

    model.embed.weight.register_post_accumulate_grad_hook(step)
    model(WORDS).sum().backward()
    assert stepped == [True]
    assert not torch.equal(model.embed.weight, before)


def test_gradients_with_respect_to_what_was_read_within_the_pass() -> None:
    class Inner(nn.Module):
        """A step of gradient descent within its forward pass."""

        def __init__(self) -> None:
            super().__init__()
            self.matrix = nn.Parameter(torch.randn(DIM, DIM))

        def forward(self, x: Tensor) -> Tensor:
            inner = (x @ self.matrix).square().mean()
            (grad,) = torch.autograd.grad(inner, self.matrix, create_graph=True)
            return x @ (self.matrix - 0.1 * grad)

    dense = Inner()
    model = convert(copy.deepcopy(dense), DENSITY)
    with torch.no_grad():
        dense.matrix.copy_(masked(model, "matrix"))
    found, expected = model(VECTORS), dense(VECTORS)
    assert torch.equal(found, expected)
    for out in (found, expected):
        out.square().sum().backward()
    assert torch.equal(model.matrix.grad, dense.matrix.grad * model.masks_of_scores()["matrix"])


# --- threads ---
def test_threads_in_inference() -> None:
    wsn = WSN(convert(nn.Sequential(TiedDecoder(), nn.ReLU()), DENSITY)).eval()
    wsn.begin_task(0)
    wsn.end_task()
    wsn.use_task(0)
    with torch.no_grad():
        expected = wsn(WORDS)
    wrong, begin = [], threading.Barrier(2)

    @torch.no_grad()
    def compute() -> None:
        begin.wait()
        wrong.extend(not torch.equal(wsn(WORDS), expected) for _ in range(50))

    threads = [threading.Thread(target=compute) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(wrong) == 100
    assert not any(wrong)
    assert isinstance(wsn.model[0].embed.weight, nn.Parameter)
