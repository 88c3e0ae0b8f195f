"""Our backbones and our algorithm against the published package: its classes, its callbacks, Lightning's Trainer."""

from __future__ import annotations

import copy
import gc
import io
import itertools
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import optimizer as torch_optimizer

from wsn_fast import convert

if find_spec("clarena") is None:
    pytest.skip('needs CLArena: pip install "wsn-fast[clarena]"', allow_module_level=True)

from clarena.backbones import WSNMaskMLP
from clarena.backbones.base import PercentileLayerParameterMaskingByScore
from clarena.cl_algorithms import WSN as PublishedWSN
from clarena.heads import HeadsTIL
from clarena_problem import Tasks, train_task

from wsn_fast.integrations.clarena import FastSubnetBackbone, FastSubnetMLP

pytestmark = pytest.mark.filterwarnings("default", "error:::wsn_fast")  # the frameworks have warnings of their own

DENSITY = 0.37  # (1 - c) (n - 1) is far from an integer for the sizes below
OPTIMIZERS = {
    "adamw": partial(torch.optim.AdamW, lr=0.02, weight_decay=0.2),
    "sgd": partial(torch.optim.SGD, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.05),
}

MakeTrainer = Callable[..., Any]


@pytest.fixture
def mended_gate(monkeypatch: pytest.MonkeyPatch) -> None:
    """The published gate's backward has no ``return``: as it is, its first step raises."""
    monkeypatch.setattr(
        PercentileLayerParameterMaskingByScore, "backward", staticmethod(lambda ctx, grad: (grad, None))
    )


@pytest.fixture
def float64() -> Any:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def ours(bias: bool = True) -> FastSubnetMLP:
    return FastSubnetMLP(20, [16], 12, bias=bias)


def fill_scores(backbone: Any, mode: str) -> None:
    """Scores that depend on the layer and the task alone, through the names that CLArena gives them."""
    for number, name in enumerate(backbone.weighted_layer_names):
        for scores in (backbone.weight_score_t[name], backbone.bias_score_t[name]):
            generator = torch.Generator().manual_seed(10 * backbone.task_id + number)
            with torch.no_grad():
                scores.weight.copy_(torch.randn(scores.weight.shape, generator=generator))


def pair() -> tuple[Any, FastSubnetMLP]:
    """The published MLP and ours with the same weights and scores."""
    theirs, own = WSNMaskMLP(20, [16], 12), ours()
    own.setup_task_id(1)
    theirs.setup_task_id(1)
    for backbone in (theirs, own):
        fill_scores(backbone, "default")
    with torch.no_grad():
        for name in theirs.weighted_layer_names:
            for attribute in ("weight", "bias"):
                source = getattr(theirs.get_layer_by_name(name), attribute)
                getattr(own.get_layer_by_name(name), attribute).copy_(source)
    return theirs, own


def logits(algorithm: Any, task: int, x: Tensor) -> Tensor:
    algorithm.eval()
    with torch.no_grad():
        result = algorithm.forward(x, stage="test", task_id=task)[0]
    algorithm.train()
    return result


# --- the published algorithm on our backbone
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_the_published_algorithm_never_forgets(
    loader: Tasks, make_trainer: MakeTrainer, probe: Tensor, kind: str
) -> None:
    algorithm, then = PublishedWSN(ours(), HeadsTIL(12), DENSITY), {}
    for task in (1, 2, 3):
        train_task(algorithm, task, OPTIMIZERS[kind], loader, make_trainer())
        then[task] = logits(algorithm, task, probe)
    assert all(torch.equal(logits(algorithm, task, probe), before) for task, before in then.items())


def test_the_published_algorithm_learns(loader: Tasks, make_trainer: MakeTrainer) -> None:
    algorithm = PublishedWSN(ours(), HeadsTIL(12), DENSITY)
    train_task(algorithm, 1, OPTIMIZERS["adamw"], loader, make_trainer(20))
    x, y = loader(1).dataset.tensors
    assert F.cross_entropy(logits(algorithm, 1, x), y) < 0.8 * F.cross_entropy(torch.zeros(len(y), 3), y)


def test_both_keep_the_same_masks(loader: Tasks, make_trainer: MakeTrainer) -> None:
    algorithm = PublishedWSN(ours(), HeadsTIL(12), DENSITY)
    for task in (1, 2):
        train_task(algorithm, task, OPTIMIZERS["sgd"], loader, make_trainer())
    algorithm.backbone.wsn.end_task()
    for row, task in enumerate((1, 2)):
        for name, mask in algorithm.weight_masks[task].items():
            assert torch.equal(algorithm.backbone.get_layer_by_name(name).mask("weight", row), mask.bool())
        for name, mask in algorithm.bias_masks[task].items():
            assert torch.equal(algorithm.backbone.get_layer_by_name(name).mask("bias", row), mask.bool())


def test_layers_without_bias_are_trained(loader: Tasks, make_trainer: MakeTrainer) -> None:
    algorithm = PublishedWSN(ours(bias=False), HeadsTIL(12), DENSITY)
    for task in (1, 2):
        train_task(algorithm, task, OPTIMIZERS["sgd"], loader, make_trainer())
    assert algorithm.bias_masks[1] == {"fc/0": None, "fc/1": None}


def test_the_masks_that_it_keeps_hold_no_graph(loader: Tasks, make_trainer: MakeTrainer) -> None:
    algorithm = PublishedWSN(ours(), HeadsTIL(12), DENSITY)
    train_task(algorithm, 1, OPTIMIZERS["sgd"], loader, make_trainer())
    assert not any(m.requires_grad for m in algorithm.weight_masks[1].values())


def test_a_convnet_is_a_backbone(loader: Tasks, make_trainer: MakeTrainer, probe: Tensor) -> None:
    net = nn.Sequential(nn.Unflatten(1, (1, 4)), nn.Conv2d(1, 5, 3), nn.ReLU(), nn.Flatten(), nn.Linear(30, 12))
    backbone = FastSubnetBackbone(convert(net, rule="value"), 12, activations={"1": "2"})
    algorithm, then = PublishedWSN(backbone, HeadsTIL(12), DENSITY), {}
    for task in (1, 2):
        train_task(algorithm, task, OPTIMIZERS["adamw"], loader, make_trainer())
        then[task] = logits(algorithm, task, probe)
    assert torch.equal(logits(algorithm, 1, probe), then[1])


# --- the same as the published backbone
@pytest.mark.parametrize("density", [0.03, 0.111, 0.37, 0.5013, 0.93, 1.0])
def test_masks_are_those_of_the_published_gate(density: float) -> None:
    theirs, own = PercentileLayerParameterMaskingByScore, ours().gate_fn
    for shape in ((7,), (20, 16), (5, 3, 3, 3), (1, 999)):
        scores = torch.randn(shape, dtype=torch.float64)
        assert torch.equal(own.apply(scores, density), theirs.apply(scores, density).double())


@pytest.mark.usefixtures("mended_gate", "float64")
def test_forward_and_gradients_are_those_of_the_published_backbone(probe: Tensor) -> None:
    results = []
    for backbone in pair():
        features, weight_mask, bias_mask, activations = backbone(probe, stage="train", mask_percentage=DENSITY)
        features.square().sum().backward()
        layers = {name: backbone.get_layer_by_name(name) for name in backbone.weighted_layer_names}
        results.append(
            {"features": features}
            | {f"mask of {name}": mask for name, mask in weight_mask.items()}
            | {f"bias mask of {name}": mask for name, mask in bias_mask.items()}
            | {f"activation of {name}": a for name, a in activations.items()}
            | {f"dW of {name}": layer.weight.grad for name, layer in layers.items()}
            | {f"db of {name}": layer.bias.grad for name, layer in layers.items()}
        )
    theirs, own = results
    assert theirs.keys() == own.keys()
    for name, tensor in theirs.items():
        torch.testing.assert_close(own[name], tensor, rtol=1e-12, atol=1e-12, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.usefixtures("mended_gate", "float64")
def test_score_gradients_are_those_of_the_published_backbone(probe: Tensor) -> None:
    theirs, own = pair()
    for backbone in (theirs, own):
        backbone(probe, stage="train", mask_percentage=DENSITY)[0].square().sum().backward()
    for name in theirs.weighted_layer_names:
        layer = own.get_layer_by_name(name)
        torch.testing.assert_close(layer.weight_score.grad, theirs.weight_score_t[name].weight.grad)
        torch.testing.assert_close(layer.bias_score.grad, theirs.bias_score_t[name].weight.grad[0])


@pytest.mark.usefixtures("mended_gate", "float64")
def test_two_tasks_end_as_on_the_published_backbone(
    loader: Tasks, make_trainer: MakeTrainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The published program, its one missing ``return`` put in, as the oracle; Adam without weight decay, since with it
    the published backbone forgets."""
    algorithms = []
    for backbone in pair():
        monkeypatch.setattr(backbone, "initialize_parameter_score", partial(fill_scores, backbone))
        backbone.processed_task_ids.clear()
        algorithm = PublishedWSN(backbone, HeadsTIL(12), DENSITY)
        for task in (1, 2):
            torch.manual_seed(task)  # for the head
            train_task(algorithm, task, partial(torch.optim.Adam, lr=0.01), loader, make_trainer(3))
        algorithms.append(algorithm)
    theirs, own = algorithms
    for task, name in itertools.product((1, 2), ("fc/0", "fc/1")):
        assert torch.equal(own.weight_masks[task][name], theirs.weight_masks[task][name])
        assert torch.equal(own.bias_masks[task][name], theirs.bias_masks[task][name])
    for name in ("fc/0", "fc/1"):
        weights = [a.backbone.get_layer_by_name(name).weight for a in algorithms]
        torch.testing.assert_close(weights[1], weights[0], rtol=0, atol=1e-9)


def test_scores_have_the_shapes_that_the_published_backbone_gives_them() -> None:
    theirs, own = pair()
    for name in theirs.weighted_layer_names:
        assert own.weight_score_t[name].weight.shape == theirs.weight_score_t[name].weight.shape
        assert own.bias_score_t[name].weight.shape == theirs.bias_score_t[name].weight.shape


# --- the backbone by itself
def test_masks_handed_in_are_used_and_put_back(probe: Tensor) -> None:
    backbone = ours()
    backbone.setup_task_id(1)
    before = backbone(probe, stage="validation", mask_percentage=DENSITY)[0]
    nothing = tuple(
        {
            name: torch.zeros_like(getattr(backbone.get_layer_by_name(name), kind))
            for name in backbone.weighted_layer_names
        }
        for kind in ("weight", "bias")
    )
    assert not backbone(probe, stage="test", mask_percentage=DENSITY, test_mask=nothing)[0].any()
    assert torch.equal(backbone(probe, stage="validation", mask_percentage=DENSITY)[0], before)


def test_per_task_tensors_are_refused_before_any_training(probe: Tensor) -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(20, 12), nn.LayerNorm(12))
    backbone = FastSubnetBackbone(convert(net, rule="value"), 12)
    with pytest.raises(ValueError, match="does not say which task it tests"):
        backbone(probe, stage="train", mask_percentage=DENSITY)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"stage": "fit", "mask_percentage": 0.5}, "stage must be one of"),
        ({"stage": "test", "mask_percentage": 0.5}, "test_mask must be given"),
        ({"stage": "train", "mask_percentage": 1.5}, "mask_percentage must be"),
    ],
)
def test_a_bad_argument_is_named(probe: Tensor, arguments: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        ours()(probe, **arguments)


def test_an_unknown_activation_is_named() -> None:
    net = convert(nn.Sequential(nn.Linear(20, 12), nn.ReLU()), rule="value")
    with pytest.raises(ValueError, match="activations: the model has no 'relu'"):
        FastSubnetBackbone(net, 12, activations={"0": "relu"})


def test_layers_of_two_rules_are_refused() -> None:
    net = nn.Sequential(convert(nn.Linear(20, 12), rule="value"), convert(nn.Linear(12, 12)))
    with pytest.raises(ValueError, match="one rule"):
        FastSubnetBackbone(net, 12)


def test_an_unknown_score_init_is_refused() -> None:
    """The published backbone accepts any mode, and leaves the scores as they were."""
    with pytest.raises(ValueError, match="score_init must be one of"):
        ours().initialize_parameter_score("xavier")


# --- any optimizer that steps on it is guarded
def step_by_hand(backbone: FastSubnetMLP, probe: Tensor) -> None:
    """Steps of an optimizer that nobody guards, after a task has ended."""
    optimizer = torch.optim.AdamW(backbone.parameters(), lr=0.1, weight_decay=0.5)
    for _ in range(2):
        backbone.features(probe)[0].square().sum().backward()
        optimizer.step()
        backbone.wsn.verify()


def with_a_finished_task() -> FastSubnetMLP:
    backbone = ours()
    backbone.setup_task_id(1)
    with pytest.warns(RuntimeWarning, match=r"task 1: .* was not checked \(the WSN was not called\)"):
        backbone.setup_task_id(2)
    assert backbone.wsn.tasks == [1]
    return backbone


def test_an_optimizer_is_guarded_from_its_first_step(probe: Tensor) -> None:
    step_by_hand(with_a_finished_task(), probe)


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_a_copy_guards_too(probe: Tensor, how: str) -> None:
    backbone = with_a_finished_task()
    if how == "deepcopy":
        other = copy.deepcopy(backbone)
    else:
        file = io.BytesIO()
        torch.save(backbone, file)
        file.seek(0)
        other = torch.load(file, weights_only=False)
    assert other.weight_score_t["fc/0"].weight is other.get_layer_by_name("fc/0").weight_score
    step_by_hand(other, probe)
    backbone.wsn.verify()


def test_the_hook_goes_with_the_backbone() -> None:
    gc.collect()
    before = len(torch_optimizer._global_optimizer_pre_hooks)
    backbone = ours()
    assert len(torch_optimizer._global_optimizer_pre_hooks) == before + 1
    del backbone
    gc.collect()
    assert len(torch_optimizer._global_optimizer_pre_hooks) == before
