"""Who gets masked tensors from attributes, and who gets the Parameters."""

from __future__ import annotations

import copy
import pickle
import threading
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from any_modules import DENSITY, DIM, VECTORS, WORDS, Bare, LowBare, TiedDecoder
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune
from torch.utils.checkpoint import checkpoint

from wsn_fast import WSN, UnmaskedReadError, convert, to_dense
from wsn_fast.nn.gated import SubnetLayer
from wsn_fast.nn.reads import Reader


def masked(layer: SubnetLayer, name: str = "weight") -> Tensor:
    return torch.where(layer.masks_of_scores()[name], layer.param(name), 0.0)


def weight_of(module: nn.Module) -> Tensor:
    return module.weight


class Reads(nn.Module):
    """Returns what ``read`` gets of an embedding and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.linear = nn.Embedding(5, 4), nn.Linear(4, 4)

    def read(self) -> list[Tensor]:
        return [self.embed.weight, self.linear.weight]

    def forward(self, x: Any = None) -> list[Tensor]:
        return self.read()


class ByFunction(Reads):
    def read(self) -> list[Tensor]:
        return [weight_of(self.embed), weight_of(self.linear)]


class ByName(Reads):
    def read(self) -> list[Tensor]:
        return [getattr(one, "weight") for one in (self.embed, self.linear)]  # noqa: B009


class ByPath(Reads):
    def read(self) -> list[Tensor]:
        return [self.get_parameter("embed.weight"), self.get_parameter("linear.weight")]


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


READERS = (Reads, ByFunction, ByName, ByPath, ByComprehension, ByProperty, ByChild, ByStoredFunction)


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
    expected = F.linear(
        VECTORS, masked(model) + masked(model, "lora_B") @ masked(model, "lora_A"), masked(model, "bias")
    )
    torch.testing.assert_close(model.forward_features(VECTORS), expected)
    assert torch.equal(model.forward_features(VECTORS).mean(1), model(VECTORS))
    assert model.forward_features.__name__ == "forward_features"


# --- hooks ---
def test_hooks_of_the_backward_pass_see_the_parameters() -> None:
    model, seen = convert(TiedDecoder(), DENSITY), []
    embed = model.embed

    def see(*args: object) -> None:
        seen.append(embed.weight)

    embed.register_full_backward_hook(see)
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
        assert inner.density == DENSITY
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
    for model in (
        first,
        second,
        copy.deepcopy(first),
        pickle.loads(pickle.dumps(nn.Sequential(first))[0:0] or pickle.dumps(first.embed)),
    ):
        if isinstance(model, nn.Embedding):
            assert torch.equal(model.weight, shared.weight)
        else:
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
    # As DataParallel puts them into its copies, and pruning into the module itself.
    model = convert(Reads(), DENSITY)
    replica = copy.deepcopy(model)
    for layer in (replica.embed, replica.linear):
        tensor = layer.param("weight").detach().clone()
        del layer._parameters["weight"]
        layer.weight = tensor
        assert layer.weight is tensor
    assert all(map(torch.equal, replica(), model()))
    for layer in (model.embed, model.linear):
        mask = layer.masks_of_scores()["weight"]
        prune.l1_unstructured(layer, "weight", 0.5)
        assert torch.equal(model()[layer is model.linear], torch.where(mask, layer.weight, 0.0))
        prune.remove(layer, "weight")
        assert isinstance(layer.weight, nn.Parameter)


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


_ = parametrize
