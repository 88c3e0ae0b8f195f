"""Backbones. CLArena calls the network in front of the heads a backbone."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from clarena.backbones import WSNMaskBackbone
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from wsn_fast import WSN, FastSubnetLinear, ops
from wsn_fast.continual.first_inputs import FirstInputs
from wsn_fast.convert.patterns import Patterns
from wsn_fast.integrations.lightning import guard
from wsn_fast.nn import per_task
from wsn_fast.nn.gated import SubnetLayer
from wsn_fast.nn.product_layer import ProductLayer
from wsn_fast.nn.scores import check_score_init

Masks = Mapping[str, Tensor | None]
STAGES = ("train", "validation", "test")


class ScoreGate(NamedTuple):
    """Replaces CLArena's ``gate_fn``: computes the mask of scores. No gradient flows through it, because gradients flow
    through the layers. So the masks that an algorithm keeps hold no graph."""

    rule: str

    def apply(self, score: Tensor, percentage: float) -> Tensor:
        """The mask of ones and zeros, in the shape and dtype of ``score``, for a density in (0, 1]."""
        return ops.topc_mask(score, percentage, rule=self.rule).to(score.dtype)


class _Scores(nn.Module):
    """The scores of a gated tensor in CLArena's form: an attribute ``weight``, which has the shape [1, n] for a
    bias."""

    def __init__(self, layer: SubnetLayer, name: str) -> None:
        super().__init__()
        self.__dict__["_layer"] = layer  # not registered as a child, because the layer has its place in the model
        self._name = f"{name}_score"

    @property
    def weight(self) -> Tensor:
        score: Tensor = getattr(self.__dict__["_layer"], self._name)
        return score if score.ndim > 1 else score.unsqueeze(0)


class FastSubnetBackbone(WSNMaskBackbone):
    """A model with subnet layers as a ``WSNMaskBackbone``. CLArena's ``WSN`` algorithm can train it, and forgets
    nothing.

    ``setup_task_id`` begins a task, and ends the task before it. Every optimizer that steps on the backbone is guarded
    at its first step, whoever built it. Layers have CLArena's names: ``"block/0"`` for ``block.0``. Convert the model
    with ``rule="value"``, because CLArena ranks scores by value.

    Args:
        model: maps the input to features [B, output_dim]. All its subnet layers have the same rule (see
            :func:`wsn_fast.convert`).
        output_dim: the number of features.
        activations: maps a subnet layer (``"fc/0"``) to the module (``"relu0"``) whose output is its activation. The
            activation of a layer that is not named here is its own output.
        per_task, frozen, shared: see :class:`wsn_fast.WSN`.
        disable_unlearning: CLArena passes this to every backbone after its version 1.1.0. It changes nothing here.

    Attributes:
        wsn: the :class:`wsn_fast.WSN` around ``model``. Call ``wsn.end_task()`` after the last task of the published
            algorithm.

    Raises:
        ValueError: the model has no subnet layer, its layers have different rules, or ``activations`` names a layer or
            module that does not exist.
    """

    def __init__(
        self,
        model: nn.Module,
        output_dim: int,
        *,
        activations: Mapping[str, str] | None = None,
        per_task: Patterns = (),
        frozen: Patterns = (),
        shared: Patterns = (),
        disable_unlearning: bool = False,
    ) -> None:
        super().__init__(output_dim=output_dim)
        self.wsn = WSN(model, per_task=per_task, frozen=frozen, shared=shared)
        self._layers = {name.replace(".", "/"): layer for name, layer in self.wsn.subnet_layers().items()}
        self.weighted_layer_names = list(self._layers)
        rules = {layer.rule for layer in self._layers.values()}
        if len(rules) > 1:
            raise ValueError(f"the layers of model must have one rule, got {sorted(rules)}")
        self.gate_fn = ScoreGate(rules.pop())
        for name, layer in self._layers.items():
            self.weight_score_t[name] = _Scores(layer, "weight")
            self.bias_score_t[name] = None if layer.bias is None else _Scores(layer, "bias")
        self._first: FirstInputs | None = None
        self._active = _activation_modules(model, self._layers, activations or {})
        _guard_optimizers_of(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        _guard_optimizers_of(self)

    def get_layer_by_name(self, layer_name: str | None) -> SubnetLayer | None:
        """The subnet layer of that name, or None."""
        return None if layer_name is None else self._layers.get(layer_name)

    def setup_task_id(self, task_id: int) -> None:
        """Begin a task. A task in progress ends first, with the mask of its present scores, and with its first batch as
        the probe of ``end_task``.

        Raises:
            ValueError, RuntimeError, OwnershipError, FloatingPointError, UnmaskedReadError: as ``begin_task`` and
                ``end_task`` of :class:`wsn_fast.WSN`.
        """
        if self.wsn.current_task != task_id:
            if self.wsn.current_task is not None:
                (self._first or FirstInputs(self.wsn)).end_task()
            self.wsn.begin_task(task_id)
            self._first = FirstInputs(self.wsn)
        super().setup_task_id(task_id)

    def initialize_parameter_score(self, mode: str) -> None:
        """Draw new scores: "default", "N01" or "U01" (see :meth:`SubnetLayer.reset_scores`), else ``ValueError``."""
        check_score_init(mode)
        for layer in self._layers.values():
            layer.reset_scores(mode)

    def forward(
        self,
        input: Tensor,
        stage: str,
        mask_percentage: float,
        test_mask: tuple[Masks, Masks] | None = None,
    ) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor | None], dict[str, Tensor]]:
        """Compute what CLArena's algorithm needs. The masks are computed a second time for it; :class:`FastWSN` avoids
        that.

        Args:
            input: a batch [B, ...].
            stage: "train" or "validation" uses the mask of the current scores, "test" uses ``test_mask``.
            mask_percentage: the density of each layer, in (0, 1].
            test_mask: weight masks and bias masks by layer.

        Returns:
            Features [B, output_dim]; weight masks and bias masks (ones and zeros, or None) by layer; activations by
            layer.

        Raises:
            ValueError: ``stage`` is unknown, or it is "test" and there are no masks, or the model has per-task tensors
                (CLArena does not say which task a batch belongs to).
        """
        if stage not in STAGES:
            raise ValueError(f"stage must be one of {STAGES}, got {stage!r}")
        if any(per_task.marked(module) for module in self.wsn.modules()):
            raise ValueError(
                "the published algorithm does not say which task it tests, so normalisation layers and other per-task "
                "tensors cannot follow: use wsn_fast.integrations.clarena.FastWSN, or a model without them"
            )
        if stage != "test":
            self.set_density(mask_percentage)
            weight_mask, bias_mask = self.get_mask(stage, mask_percentage)
            features, activations = self.features(input)
        elif test_mask is None:
            raise ValueError('test_mask must be given for stage="test"')
        else:
            weight_mask, bias_mask = test_mask
            with self._masked_by(test_mask):
                features, activations = self.features(input)
        return features, weight_mask, bias_mask, activations

    def set_density(self, density: float) -> None:
        """Set the density of the task in training in all layers. ``ValueError`` if it is not in (0, 1]."""
        for layer in self._layers.values():
            if layer.gate_density != density:
                layer.task_density = ops.check_density(density, "mask_percentage")

    def features(self, input: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Features [B, output_dim] and activations by layer, of the task in use."""
        activations: dict[str, Tensor] = {}
        hooks = [m.register_forward_hook(partial(_keep, activations, name)) for name, m in self._active.items()]
        try:
            return self.wsn(input), activations
        finally:
            for hook in hooks:
                hook.remove()

    @contextmanager
    def _masked_by(self, masks: tuple[Masks, Masks]) -> Iterator[None]:
        try:
            for gated, of_layers in zip(ProductLayer.GATED, masks, strict=True):
                for name, layer in self._layers.items():
                    mask = of_layers[name]
                    if mask is not None:
                        setattr(layer, f"{gated}_view", ops.pack_mask(mask.to(layer.param(gated).device) != 0))
            yield
        finally:
            for layer in self._layers.values():
                layer.active_row = layer.active_row  # this restores the layer's own mask


class FastSubnetMLP(FastSubnetBackbone):
    """Replaces CLArena's ``WSNMaskMLP``, with the same arguments, layer names (``fc/0``, ``fc/1``, ...) and
    activations.

    Args:
        input_dim: the number of inputs. Batches are flattened.
        hidden_dims: the widths of the hidden layers; it may be empty.
        output_dim: the number of features.
        activation_layer: makes the activation after every layer; None means no activation.
        bias: whether layers have a bias (gated, as the weight is).
        dropout: the probability of dropout after every activation; None for no dropout.
        rule: "value" (CLArena) or "magnitude" (the paper's code).
        disable_unlearning: see :class:`FastSubnetBackbone`.
    """

    def __init__(
        self,
        input_dim: int,
        hidden_dims: Sequence[int],
        output_dim: int,
        activation_layer: Callable[[], nn.Module] | None = nn.ReLU,
        bias: bool = True,
        dropout: float | None = None,
        *,
        rule: str = "value",
        disable_unlearning: bool = False,
    ) -> None:
        widths = [input_dim, *hidden_dims, output_dim]
        layers = [FastSubnetLinear(n, m, bias, rule=rule) for n, m in itertools.pairwise(widths)]
        model = _MLP(layers, activation_layer or nn.Identity, nn.Identity() if dropout is None else nn.Dropout(dropout))
        super().__init__(model, output_dim, activations={f"fc/{i}": f"activation.{i}" for i in range(len(layers))})


class _MLP(nn.Module):
    def __init__(self, layers: Sequence[nn.Module], activation: Callable[[], nn.Module], dropout: nn.Module) -> None:
        super().__init__()
        self.fc = nn.ModuleList(layers)
        self.activation = nn.ModuleList(activation() for _ in layers)
        self.dropout = dropout

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(1)
        for layer, activation in zip(self.fc, self.activation, strict=True):
            x = self.dropout(activation(layer(x)))
        return x


def _activation_modules(
    model: nn.Module, layers: Mapping[str, SubnetLayer], named: Mapping[str, str]
) -> dict[str, nn.Module]:
    """For each layer the module whose output is its activation."""
    modules = dict(model.named_modules())
    unknown = [*(named.keys() - layers.keys()), *({*named.values()} - modules.keys())]
    if unknown:
        raise ValueError(f"activations: the model has no {unknown[0]!r}; layers: {[*layers]}, modules: {[*modules]}")
    return {name: modules[named[name]] if name in named else layer for name, layer in layers.items()}


def _keep(outputs: dict[str, Tensor], name: str, module: nn.Module, args: Any, output: Tensor) -> None:
    outputs[name] = output


def _guard_optimizers_of(backbone: FastSubnetBackbone) -> None:
    """Guard every optimizer that steps on ``backbone`` at its first step, because the published algorithm builds its
    optimizers itself. The hook is removed when the backbone is."""
    guarded: weakref.WeakSet[torch.optim.Optimizer] = weakref.WeakSet()
    hook = register_optimizer_step_pre_hook(partial(_guard_new, weakref.ref(backbone), guarded))
    weakref.finalize(backbone, hook.remove).atexit = False


def _guard_new(
    backbone: weakref.ref[FastSubnetBackbone],
    guarded: weakref.WeakSet[torch.optim.Optimizer],
    optimizer: torch.optim.Optimizer,
    args: Any,
    kwargs: Any,
) -> None:
    owner = backbone()
    if owner is not None and optimizer not in guarded and guard(owner.wsn, [optimizer]):
        guarded.add(optimizer)
