"""Heads that are copies of a module: what is copied, what is drawn anew, and which widths are possible."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

from wsn_fast import FastSubnetLinear, TaskHeads, convert


class Plain(nn.Linear):
    """A subclass without a forward of its own."""


class Scaled(nn.Linear):
    """A subclass whose constructor takes more, and keeps it."""

    def __init__(self, in_features: int, out_features: int, scale: float = 1.0, **kwargs: object) -> None:
        super().__init__(in_features, out_features, **kwargs)  # type: ignore[arg-type]
        self.scale = scale
        self.gain = nn.Parameter(torch.full((out_features,), scale))


class Cosine(nn.Linear):
    """A subclass with a forward of its own."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.normalize(x) @ nn.functional.normalize(self.weight).T


class Forgets(nn.Linear):
    """A subclass that does not keep an argument of its constructor."""

    def __init__(self, in_features: int, out_features: int, temperature: float = 1.0) -> None:
        super().__init__(in_features, out_features)


class Fixed(nn.Linear):
    """A subclass with a constructor of its own that takes no width."""

    def __init__(self) -> None:
        super().__init__(4, 3)


class Prototypes(nn.Module):
    """A module without reset_parameters, with a parameter and a buffer that is not saved."""

    def __init__(self) -> None:
        super().__init__()
        self.centres = nn.Parameter(torch.randn(3, 4))
        self.register_buffer("offset", torch.arange(3.0), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return -torch.cdist(x, self.centres) + self.offset


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Dropout(0.5), nn.Linear(5, 3))


def test_every_head_is_a_copy_with_new_values() -> None:
    template = mlp()
    heads = TaskHeads.of(template, tasks=[0, "b"])
    first, second = heads.head(0), heads.head("b")
    assert first is not template and first[0].weight.shape == (5, 4)
    for one, other in ((first, second), (first, template)):
        assert not torch.equal(one[0].weight, other[0].weight)
        assert not torch.equal(one[4].bias, other[4].bias)
    heads.active = "b"
    heads.eval()
    x = torch.randn(2, 4)
    assert torch.equal(heads(x), second(x))


def test_running_statistics_of_the_template_do_not_reach_a_head() -> None:
    template = mlp()
    template(torch.randn(8, 4) + 5)
    norm = TaskHeads.of(template, tasks=[0]).head(0)[1]
    assert norm.num_batches_tracked == 0 and not norm.running_mean.any()


def test_a_module_without_reset_parameters_keeps_the_values_of_the_template() -> None:
    template = Prototypes()
    values = template.centres.detach().clone()
    heads = TaskHeads.of(template, tasks=[0])
    with torch.no_grad():
        template.centres.zero_()  # the template was copied
        heads.head(0).centres.add_(1)
    assert torch.equal(heads.add(1).centres, values)


def test_a_parametrized_head_keeps_the_values_of_the_template() -> None:
    template = parametrizations.weight_norm(nn.Linear(4, 3))
    heads = TaskHeads.of(template, tasks=[0])
    assert torch.equal(heads.head(0).weight, template.weight)
    heads.active = 0
    assert heads(torch.randn(2, 4)).shape == (2, 3)


def test_gradients_of_the_template_are_not_copied() -> None:
    template = mlp()
    template(torch.randn(3, 4)).sum().backward()
    assert all(param.grad is None for param in TaskHeads.of(template, tasks=[0]).parameters())


def test_a_frozen_template_gives_heads_that_are_trained() -> None:
    head = TaskHeads.of(mlp().requires_grad_(False), tasks=[0]).head(0)
    assert all(param.requires_grad for param in head.parameters())


def test_a_parameter_that_alone_needs_no_gradient_is_not_trained() -> None:
    template = mlp()
    template[0].weight.requires_grad_(False)
    heads = TaskHeads.of(template, tasks=[0])
    head = heads.head(0)
    assert [name for name, param in head.named_parameters() if not param.requires_grad] == ["0.weight"]
    assert heads.untrained() == {id(head[0].weight)}
    dense = heads.dense(0)
    assert [name for name, param in dense.named_parameters() if not param.requires_grad] == ["0.weight"]


@pytest.mark.parametrize(
    ("template", "width", "shape"),
    [
        (lambda: Plain(4, 3, bias=False), 7, (7, 4)),
        (lambda: Scaled(4, 3, scale=2.0), 7, (7, 4)),
        (lambda: nn.Conv2d(4, 3, 1, stride=2), 7, (7, 4, 1, 1)),
        (lambda: nn.Conv1d(4, 6, 3, padding="same", groups=2), 8, (8, 2, 3)),
        (lambda: nn.ConvTranspose2d(4, 6, 2, stride=2, output_padding=1, groups=2), 8, (4, 4, 2, 2)),
    ],
)
def test_widths_of_subclasses_and_convolutions(
    template: Callable[[], nn.Module], width: int, shape: tuple[int, ...]
) -> None:
    module = template()
    heads = TaskHeads.of(module, tasks={0: width})
    head = heads.head(0)
    assert type(head) is type(module) and head.weight.shape == shape
    assert (head.bias is None) == (module.bias is None)
    for name in ("stride", "padding", "output_padding", "groups", "scale"):
        assert getattr(head, name, None) == getattr(module, name, None)
    assert heads.add(1).weight.shape == module.weight.shape  # the width of the template
    fresh = TaskHeads.of(template())
    fresh.load_state_dict(heads.state_dict(), strict=True)
    assert fresh.tasks == [0, 1]
    assert all(torch.equal(a, b) for a, b in zip(fresh.parameters(), heads.parameters(), strict=True))


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (mlp, "out_features must be None, got 7: the heads are copies of a Sequential"),
        (lambda: Cosine(4, 3), "out_features must be None, got 7: the heads are copies of a Cosine"),
        (lambda: parametrizations.weight_norm(nn.Linear(4, 3)), "copies of a Parametrized"),
        (lambda: Fixed(), "out_features=7 is not possible for a copy of Fixed: its constructor takes no out_features"),
        (lambda: Forgets(4, 3), "its constructor takes temperature, and the module has no attribute of this name"),
        (
            lambda: nn.Conv2d(4, 6, 1, groups=2),
            "out_channels=7 is not possible for a copy of Conv2d: out_channels must",
        ),
    ],
)
def test_widths_that_are_not_possible(template: Callable[[], nn.Module], message: str) -> None:
    heads = TaskHeads.of(template())
    with pytest.raises(ValueError, match=message):
        heads.add(0, 7)
    assert heads.tasks == []
    assert heads.add(0) is heads.head(0)  # without a width it is a copy


def test_an_existing_head_of_another_width() -> None:
    heads = TaskHeads.of(nn.Conv2d(4, 3, 1), tasks={0: 5})
    with pytest.raises(ValueError, match="out_features must be 5, the width of the head of task 0, got 3"):
        heads.width(0, 3)


def test_a_linear_layer_gives_what_the_constructor_gives() -> None:
    torch.manual_seed(0)
    one = TaskHeads(4, 3, tasks=[0, 1], bias=False, dtype=torch.float64)
    torch.manual_seed(0)
    other = TaskHeads.of(nn.utils.skip_init(nn.Linear, 4, 3, bias=False, dtype=torch.float64), tasks=[0, 1])
    assert one.state_dict().keys() == other.state_dict().keys()
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))
    assert (other.in_features, other.out_features) == (4, 3)


@pytest.mark.filterwarnings("ignore:.*_norm.*is deprecated:FutureWarning")
@pytest.mark.parametrize(
    "change",
    [lambda m: prune.l1_unstructured(m, "weight", 2), nn.utils.spectral_norm, nn.utils.weight_norm],
    ids=["pruned", "spectral norm", "weight norm"],
)
def test_a_module_whose_weight_a_hook_computes_is_refused(change: Callable[[nn.Module], nn.Module]) -> None:
    layer = change(nn.Linear(4, 3))
    with pytest.raises(ValueError, match=r"can be copied, and a hook computes weight \(pruning"):
        TaskHeads.of(layer)
    with pytest.raises(ValueError, match=r"can be copied, and a hook computes 1\.weight \(pruning"):
        TaskHeads.of(nn.Sequential(nn.ReLU(), layer))


def test_later_heads_are_born_where_the_module_is() -> None:
    heads = TaskHeads.of(mlp(), tasks=[0]).double().eval()
    head = heads.add(1)
    assert {param.dtype for param in head.parameters()} == {torch.float64}
    assert head[1].num_batches_tracked.dtype is torch.int64 and not head[1].training


def test_a_head_of_several_dtypes_keeps_them() -> None:
    template = nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 3).double())
    assert [p.dtype for p in TaskHeads.of(template).add(0).parameters()] == [p.dtype for p in template.parameters()]


@pytest.mark.parametrize("make", [mlp, Prototypes, lambda: nn.Conv2d(4, 3, 1), lambda: Cosine(4, 3)])
def test_a_fresh_module_loads_heads_that_it_did_not_have(make: Callable[[], nn.Module]) -> None:
    old = TaskHeads.of(make(), tasks=[0, "x.y"])
    for clone in (copy.deepcopy(old), pickle.loads(pickle.dumps(old))):
        fresh = TaskHeads.of(make(), tasks=[7])
        fresh.load_state_dict(clone.state_dict(), strict=True)
        assert fresh.tasks == [0, "x.y"]
        assert all(torch.equal(a, b) for a, b in zip(fresh.parameters(), old.parameters(), strict=True))
    assert type(clone.add(1)) is type(old.head(0))  # a copy makes heads, too


def test_the_meta_device() -> None:
    with torch.device("meta"):
        heads = TaskHeads.of(mlp(), tasks=[0])
    assert all(param.is_meta for param in heads.parameters())
    heads._device_and_dtype = torch.empty(0)
    assert heads.add(1)[0].weight.isfinite().all()  # drawn, although the template has no memory
    with torch.device("meta"):
        heads = TaskHeads.of(Prototypes())
    heads._device_and_dtype = torch.empty(0)
    with pytest.raises(ValueError, match="Prototypes has no reset_parameters that could give it values"):
        heads.add(0)


class Uncopied(nn.Linear):
    """A module that refuses copies."""

    def __deepcopy__(self, memo: object) -> None:
        raise RuntimeError("no copies of me")


@pytest.mark.parametrize(
    ("template", "error", "message"),
    [
        (3, TypeError, "template must be an nn.Module, got int"),
        (nn.ReLU(), ValueError, "template must have parameters to train, and this ReLU has none"),
        (nn.LazyLinear(3), ValueError, "template is not initialised yet"),
        (nn.Sequential(FastSubnetLinear(4, 3)), ValueError, r"0 \(FastSubnetLinear\) has masks"),
        (nn.Sequential(nn.ReLU(), TaskHeads(4, 3)), ValueError, r"1 \(TaskHeads\) has masks, heads or values of tasks"),
        (convert(nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)))[1], ValueError, r"it \(LayerNorm\) has masks"),
        (Uncopied(4, 3), ValueError, "template cannot be copied.*no copies of me"),
    ],
)
def test_templates_that_are_refused(template: nn.Module, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        TaskHeads.of(template)


def test_compiles() -> None:
    heads = TaskHeads.of(nn.Sequential(nn.Linear(4, 5), nn.LayerNorm(5), nn.Linear(5, 3)), tasks=[0, 1])
    compiled = torch.compile(heads, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 4)
    for task in (0, 1):
        heads.active = task
        torch.testing.assert_close(compiled(x), heads(x))


def test_rows_of_several_tasks() -> None:
    heads = TaskHeads.of(nn.Conv2d(4, 3, 1), tasks=[0, 1])
    x = torch.randn(3, 4, 2, 2)
    heads.row_tasks = [(1, torch.tensor([0, 2])), (0, torch.tensor([1]))]
    out = heads(x)
    assert out.shape == (3, 3, 2, 2)
    assert torch.equal(out[1:2], heads.head(0)(x[1:2])) and torch.equal(out[[0, 2]], heads.head(1)(x[[0, 2]]))
    with pytest.raises(TypeError, match="heads take one tensor while tasks share a pass"):
        heads(x, x)


# --- finished heads --------------------------------------------------------------------------------------------------
def test_a_finished_head_keeps_its_buffers_in_training_mode() -> None:
    heads = TaskHeads.of(mlp(), tasks=[0, 1]).train()
    for task in (0, 1):
        heads.active = task
        heads(torch.randn(8, 4))
    heads.finish([0])
    before = {name: buffer.clone() for name, buffer in heads.named_buffers()}
    for clone in (heads, copy.deepcopy(heads), pickle.loads(pickle.dumps(heads))):
        for task in (0, 1):
            clone.head(task)(torch.randn(8, 4)).sum().backward()
        after = dict(clone.named_buffers())
        assert all(torch.equal(after[name], before[name]) for name in before if name.startswith("heads.i0"))
        assert not torch.equal(after["heads.i1.1.running_mean"], before["heads.i1.1.running_mean"])
    heads.finish([])
    heads.head(0)(torch.randn(8, 4))
    assert not torch.equal(heads.head(0)[1].running_mean, before["heads.i0.1.running_mean"])


class Raises(nn.Module):
    """Raises after what is before it has run."""

    def forward(self, x: Tensor) -> Tensor:
        raise RuntimeError("stop")


def test_a_forward_pass_that_an_exception_ended() -> None:
    heads = TaskHeads.of(nn.Sequential(nn.BatchNorm1d(4), Raises()), tasks=[0]).train()
    heads.finish([0])
    with pytest.raises(RuntimeError, match="stop"):
        heads.head(0)(torch.randn(8, 4))
    assert not heads.head(0)[0].running_mean.any()


def test_values_of_now_are_kept_on_request() -> None:
    heads = TaskHeads.of(mlp(), tasks=[0]).train()
    heads.finish([0])
    heads.head(0)[1].running_mean.fill_(3.0)
    heads.finish([0], anew=True)
    heads.head(0)(torch.randn(8, 4))
    assert torch.equal(heads.head(0)[1].running_mean, torch.full((5,), 3.0))


def test_a_finished_head_compiles() -> None:
    heads = TaskHeads.of(mlp(), tasks=[0]).eval()
    heads.active = 0
    heads.finish([0])
    x = torch.randn(2, 4)
    torch.testing.assert_close(torch.compile(heads, fullgraph=True, backend="aot_eager")(x), heads(x))


def test_the_dense_copy_has_no_hooks() -> None:
    heads = TaskHeads.of(mlp(), tasks=[0]).train()
    heads.finish([0])
    dense = heads.dense(0)
    dense(torch.randn(8, 4))
    assert dense[1].running_mean.any()
    assert not [name for name in vars(dense) if name.startswith("_kept")]
