"""FSDP2 for a WSN: gated tensors are cut into shards, and what travels is what travels for a dense model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard

from .. import ops
from ..continual import alike
from ..continual.sharded_parallel import ShardedParallel
from ..continual.wrappers import check_model
from ..continual.wsn import WSN
from ..convert.materialize import Materialization
from ..nn.gated import SubnetLayer
from ..nn.sharding import Sharding
from ..nn.shards import ShardedGate
from .entries import exported, parts_are_known

_KEEPS_GRADIENTS = (
    "set_gradient_divide_factor", "set_reduce_scatter_divide_factor", "set_all_reduce_hook",
    "set_reduce_scatter_unused_params",
)  # fmt: skip
"""Methods of FSDP2 that change the gradients of what it has sharded, and of nothing else."""


def shard(
    wsn: WSN,
    mesh: DeviceMesh,
    *,
    groups: Sequence[nn.Module | str] = (),
    mp_policy: MixedPrecisionPolicy | None = None,
    reshard_after_forward: bool = True,
    offload_policy: OffloadPolicy | None = None,
) -> WSN:
    """Cut the gated tensors of ``wsn``, and their scores and masks, into shards by FSDP2 (``fully_shard``), in place.

    A forward pass gathers masked tensors, a backward pass scatters the gradients of these, and a step updates the rows
    that this process holds. The threshold of a tensor is that of all its scores. So all processes compute with the
    masks that a single process with the whole batch would find, up to the rounding of sums. Everything that is not
    gated stays whole in each process, and its gradients are averaged: heads, norms, and what the conversion left out.

    All processes call this, before they build an optimizer. They take the values of the first one.

    A model that was built on the meta device gets its memory here, one module after another, and is cut at once: no
    process ever holds more than its shards, the tensors of one group, and the scores of one layer. The values are those
    that :func:`wsn_fast.materialize` draws in a single process with the seed of the first process. See there for what
    has to be loaded before. Finished tasks come with :func:`load_checkpoint`.

    Args:
        wsn: the model, on the device of the mesh or on the meta device. A task may be in progress, and tasks may have
            ended.
        mesh: of one dimension.
        groups: modules of the model, or their names. The gated tensors in each are gathered together, as those of a
            block should be. A layer that is in none of them is a group of its own.
        mp_policy: the dtypes, as for ``fully_shard``. With ``param_dtype=torch.bfloat16`` gated tensors are gathered in
            bfloat16, and the model runs under autocast in it. The tensors and their scores keep their own dtype.
        reshard_after_forward: whether the gathered tensors are freed after a forward pass, and gathered again for the
            backward pass.
        offload_policy: none is supported.

    Returns:
        ``wsn``.

    Raises:
        TypeError: an argument has another type.
        ValueError: the mesh, a group, the policy or a gated tensor is of a kind that is not supported; the message has
            the reason. Or a tensor on the meta device cannot be made here.
        RuntimeError: the model is sharded or wrapped already, an optimizer is guarded already, or the processes have
            different tasks.

        If one of these is raised, nothing has been changed, with one exception: the ``reset_parameters`` of a module
        writes to an inner module that has been cut already, which is seen too late.
    """
    policy = _check_policies(mp_policy, reshard_after_forward, offload_policy)
    _check_mesh(wsn, mesh)
    _check_model(wsn, mesh)
    modules = _check_groups(wsn, groups)
    group = mesh.get_group()
    device = _device_of(wsn, mesh)
    work = Materialization(wsn, device)
    if alike.different_texts(group, {"tasks": repr((wsn.tasks, wsn.current_task, wsn.heads))}, device):
        raise RuntimeError("the processes have WSNs with different tasks or heads: load one state in all of them")
    wsn._restore_frozen()
    _Cutting(wsn, mesh, modules, policy, reshard_after_forward).run(work)
    sharding = Sharding(group, [m for m in wsn.modules() if isinstance(m, FSDPModule)], policy.param_dtype)
    sharding.device = device
    for path, layer in wsn._parts.layers.items():
        sharding.gates += _take_shards(path, layer, sharding)
    wsn.gates.sharding = wsn._parts.sharding = sharding
    wsn._guards.parallel = ShardedParallel(sharding)
    for module in sharding.modules:
        vars(module).update({name: partial(_refuse, name) for name in _KEEPS_GRADIENTS})
    return wsn


# --- what is refused
def _check_policies(mp_policy: object, reshard_after_forward: object, offload_policy: object) -> MixedPrecisionPolicy:
    if not isinstance(reshard_after_forward, bool):
        raise TypeError(
            f"reshard_after_forward must be a bool, got {reshard_after_forward!r}: FSDP2 cannot reshard to a smaller "
            "group what hooks have gathered"
        )
    if isinstance(offload_policy, CPUOffloadPolicy):
        raise ValueError("offload_policy must be None: shards on the CPU are not supported")
    if offload_policy is not None and type(offload_policy) is not OffloadPolicy:
        raise TypeError(f"offload_policy must be None, got {type(offload_policy).__name__}")
    policy = MixedPrecisionPolicy() if mp_policy is None else mp_policy
    if not isinstance(policy, MixedPrecisionPolicy):
        raise TypeError(f"mp_policy must be a MixedPrecisionPolicy or None, got {type(policy).__name__}")
    if policy.param_dtype not in (None, torch.bfloat16):
        raise ValueError(f"param_dtype must be None or torch.bfloat16, got {policy.param_dtype}")
    if policy.reduce_dtype not in (None, torch.float32, torch.bfloat16):
        raise ValueError(f"reduce_dtype must be None, torch.float32 or torch.bfloat16, got {policy.reduce_dtype}")
    return policy


def _check_mesh(wsn: object, mesh: object) -> None:
    if not isinstance(wsn, WSN):
        raise TypeError(f"wsn must be a wsn_fast.WSN, got {type(wsn).__name__}")
    if not isinstance(mesh, DeviceMesh):
        raise TypeError(f"mesh must be a DeviceMesh, got {type(mesh).__name__}")
    if mesh.ndim != 1:
        raise ValueError(f"mesh must have one dimension, got {mesh.ndim}: replicas of shards (HSDP) are not supported")
    whole = mesh._get_root_mesh()
    if whole.size() != mesh.size():
        raise ValueError(
            f"mesh must hold all {whole.size()} processes of the mesh that it is a part of, got {mesh.size()}: nobody "
            "would average the gradients of the others. Lightning's ModelParallelStrategy takes data_parallel_size="
            f"{whole.size()} and tensor_parallel_size=1"
        )


def _check_model(wsn: WSN, mesh: DeviceMesh) -> None:
    if wsn.gates.sharding is not None:
        raise RuntimeError("this WSN is sharded already")
    check_model(wsn.model)
    if any(isinstance(module, FSDPModule) for module in wsn.modules()):
        raise RuntimeError("fully_shard was called on a part of this WSN: shard(wsn, mesh, groups=[...]) calls it")
    if wsn._guards.parallel.known is not None:
        raise RuntimeError("this WSN has run in DistributedDataParallel: shard a WSN that is not wrapped")
    if wsn._view.task is not None:
        raise RuntimeError(f"task {wsn._view.task!r} is finished and in use: leave use_task before shard(wsn, mesh)")
    if wsn._guards.are_alive():
        raise RuntimeError("an optimizer is guarded, and holds the tensors of before: build it after shard(wsn, mesh)")
    uses = Counter(id(p) for m in wsn.modules() for p in m._parameters.values() if p is not None)
    for path, layer in wsn.subnet_layers().items():
        if isinstance(layer, nn.RNNBase):
            raise ValueError(f"{path} is a recurrent layer, which keeps a list of its tensors: exclude it from convert")
        if layer.gate_state.gates_ahead:
            raise ValueError("gates_ahead must be False: the gates of shards are made when FSDP2 gathers them")
        if ops.constant_threshold(layer.rule) is not None:
            raise ValueError(f"{path} has the rule {layer.rule!r}, and shards need one that ranks the scores")
        for gate in layer.gated():
            reason = _obstacle_of(layer, gate.name, gate.param, gate.score, uses, mesh)
            if reason:
                raise ValueError(f"{path}.{gate.name} cannot be sharded: {reason}")


def _device_of(wsn: WSN, mesh: DeviceMesh) -> torch.device:
    """The device of the model; if all of it is on the meta device, the current one of the mesh."""
    own = (param.device for param in wsn.parameters() if not param.is_meta)
    return next(own, None) or torch.empty(0, device=mesh.device_type).device


def _obstacle_of(
    layer: SubnetLayer, name: str, param: Tensor, score: Tensor, uses: Counter[int], mesh: DeviceMesh
) -> str:
    if layer._parameters.get(name) is not param:
        return "it is parametrized"
    if uses[id(param)] > 1 or uses[id(score)] > 1:
        return "it is tied: several modules share it or its scores"
    if not param.is_meta and param.device.type != mesh.device_type:
        return f"it is on {param.device}, and the mesh is of {mesh.device_type}"
    if param.is_cuda and param.device.index != torch.cuda.current_device():
        return f"it is on {param.device}, which is not the current device: call torch.cuda.set_device before"
    if param.ndim == 0 or not (param.is_contiguous() and score.is_contiguous()):
        return "FSDP2 takes contiguous tensors with rows only"
    return "" if param.dtype is score.dtype else f"it is {param.dtype}, and its scores are {score.dtype}"


def _check_groups(wsn: WSN, groups: Sequence[nn.Module | str]) -> list[nn.Module]:
    """The modules of ``groups``."""
    named = dict(wsn.model.named_modules())
    if isinstance(groups, str) or not isinstance(groups, Sequence):
        raise TypeError(f"groups must be a sequence of modules or names, got {type(groups).__name__}")
    taken: dict[nn.Module, int] = {}
    found: list[nn.Module] = []
    for i, one in enumerate(groups):
        module = named.get(one) if isinstance(one, str) else one
        if not any(module is known for known in named.values()):
            raise ValueError(f"groups[{i}] is no module of the model: {one!r}")
        assert isinstance(module, nn.Module)
        if module is wsn.model:
            raise ValueError(f"groups[{i}] is the whole model: all its weights would be in memory at once")
        if type(module).forward is nn.Module.forward:
            raise ValueError(f"groups[{i}] is a {type(module).__name__}, which has no forward pass: name its parts")
        inside = [layer for layer in module.modules() if isinstance(layer, SubnetLayer)]
        if not inside:
            raise ValueError(f"groups[{i}] has no subnet layer")
        for layer in inside:
            if taken.setdefault(layer, i) != i:
                raise ValueError(f"groups[{taken[layer]}] and groups[{i}] have a layer in common")
        found.append(module)
    return found


def _refuse(name: str, *args: object, **kwargs: object) -> NoReturn:
    raise RuntimeError(f"{name} would change the gradients of gated tensors, and not those of heads and norms")


def _check_exported(sharding: Sharding, layer: nn.Module, prefix: str, keep_vars: bool) -> None:
    if not sharding.is_exported:
        raise RuntimeError(
            f"state_dict() of {prefix.rstrip('.')} has parts of tensors only, because the WSN is sharded: "
            "wsn_fast.distributed.full_state_dict(wsn) returns the state of the whole model"
        )


# --- cutting
def _shard_scores(layer: SubnetLayer, mesh: DeviceMesh) -> None:
    """Replace the scores by their shards."""
    for gate in layer.gated():
        rows = gate.score.detach().chunk(mesh.size())
        rank = mesh.get_local_rank()
        mine = rows[rank].clone() if rank < len(rows) else gate.score.new_empty(0, *gate.score.shape[1:])
        place: dict[str, Any] = {"shape": gate.score.shape, "stride": gate.score.stride()}
        score = DTensor.from_local(mine.detach(), mesh, [Shard(0)], run_check=False, **place)
        layer._parameters[f"{gate.name}_score"] = nn.Parameter(score, requires_grad=gate.score.requires_grad)


class _Cutting:
    """Cuts a model, one module after another, inner ones first. One that has no memory yet gets it just before, so that
    no process ever holds more than its shards and the tensors of one group."""

    def __init__(
        self, wsn: WSN, mesh: DeviceMesh, groups: Sequence[nn.Module], policy: MixedPrecisionPolicy, reshard: bool
    ) -> None:
        self._wsn, self._mesh, self._reshard = wsn, mesh, reshard
        layers = [*wsn._parts.layers.values()]
        # A layer inside of another is gathered with that one, which may read its tensors, as attention does.
        inside = {layer for outer in (*groups, *layers) for layer in outer.modules() if layer is not outer}
        self._units = {*groups, *(layer for layer in layers if layer not in inside and layer not in groups)}
        # Autocast casts inputs. Only what the model returns is cast, by the root.
        self._inner = MixedPrecisionPolicy(policy.param_dtype, policy.reduce_dtype, cast_forward_inputs=False)
        self._of_root = MixedPrecisionPolicy(output_dtype=policy.output_dtype, cast_forward_inputs=False)
        self._cut: list[tuple[str, Tensor]] = []

    def run(self, work: Materialization) -> None:
        for module in reversed(work.modules):
            work.allocate(module)
            resets = work.resets(module)
            versions = [tensor._version for _, tensor in self._cut] if resets else []
            work.initialise(module)
            if resets:
                self._check_unchanged(module, versions)
            if isinstance(module, SubnetLayer):
                self._send(gate.score for gate in module.gated())
                _shard_scores(module, self._mesh)
            if module in self._units:
                self._send(_gated_in(module))  # not before: an outer module may have written to an inner one
                options: Any = {"reshard_after_forward": self._reshard, "mp_policy": self._inner}
                fully_shard(module, mesh=self._mesh, ignored_params=self._ignored(module), **options)
                self._cut += [(n, p) for n, p in module.named_parameters() if isinstance(p, DTensor)]
        self._send(t for t in (*self._wsn.parameters(), *self._wsn.buffers()) if not isinstance(t, DTensor))
        ignored = self._ignored(self._wsn)
        fully_shard(self._wsn, mesh=self._mesh, mp_policy=self._of_root, ignored_params=ignored)

    def _send(self, tensors: Iterable[Tensor]) -> None:
        """Give tensors that are still whole the values of the first process."""
        alike.send(self._mesh.get_group(), [tensor for tensor in tensors if tensor.numel()])

    def _ignored(self, module: nn.Module) -> Any:
        """The parameters of a module that are not gated."""
        gated = {*_gated_in(module)}
        return {param for param in module.parameters() if param not in gated}

    def _check_unchanged(self, module: nn.Module, versions: Sequence[int]) -> None:
        """Raise ``ValueError`` if ``reset_parameters`` of a module has written to what was cut before."""
        for (name, tensor), before in zip(self._cut, versions, strict=True):
            if tensor._version != before:
                raise ValueError(
                    f"reset_parameters() of {type(module).__name__} writes to {name} of an inner module, which is "
                    "cut into shards already: name the outer module in groups, or give the model its memory before "
                    "shard. The model is broken now: build it again"
                )


def _gated_in(module: nn.Module) -> list[Tensor]:
    return [gate.param for layer in module.modules() if isinstance(layer, SubnetLayer) for gate in layer.gated()]


def _take_shards(path: str, layer: SubnetLayer, sharding: Sharding) -> list[ShardedGate]:
    """Let ``layer`` know its shards, and keep this process's parts of its masks."""
    gates = []
    for gate in [*layer.gated()]:
        named = f"{path}.{gate.name}".lstrip(".")
        one = ShardedGate(named, layer, gate.name, gate.param, gate.score, sharding.group, sharding.common)
        layer._buffers[f"{gate.name}_masks"] = one.part_of_masks(gate.masks)
        layer._buffers[f"{gate.name}_union"] = None
        gates.append(one)
    layer.gate_state.shards = {one.name: one for one in gates}
    layer.register_state_dict_pre_hook(partial(_check_exported, sharding))
    layer.gate_state.drop()
    layer.rebuild_union()
    return gates


# --- whole states
@torch.no_grad()
def full_state_dict(wsn: WSN) -> dict[str, Any]:
    """The state of a sharded WSN, as a single process would have it. All processes call this.

    Tensors are gathered one at a time. Save what the first process gets: a WSN that is not sharded loads it, and so
    does :func:`load_full_state_dict`, with any number of processes.

    Returns:
        In the first process the state, whose gathered tensors are on the CPU; in the others an empty dict.

    Raises:
        TypeError: ``wsn`` is no WSN.
        ValueError: it is not sharded.
    """
    sharding = _sharding_of(wsn)
    state = exported(wsn)
    first = sharding.group.rank() == 0
    for name, one, what in _tensors_of_shards(wsn):
        whole = one.whole_masks(one.gated().masks) if what == "_masks" else one.whole(one.score if what else one.param)
        state[name] = whole.cpu() if first else None
        del whole
    return state if first else {}


@torch.no_grad()
def load_full_state_dict(wsn: WSN, state: dict[str, Any]) -> None:
    """Load a state of the whole model into a sharded WSN. All processes call this, with the same state.

    Args:
        wsn: the model.
        state: what :func:`full_state_dict` returned, or ``state_dict()`` of a WSN that is not sharded.

    Raises:
        TypeError: ``wsn`` is no WSN.
        ValueError: it is not sharded.
        StateError: the state does not fit the model, as for ``wsn.load_state_dict``. Nothing has been loaded.
    """
    _sharding_of(wsn)
    state = dict(state)
    for name, one, what in _tensors_of_shards(wsn):
        whole = state.get(name)
        if not isinstance(whole, Tensor):
            continue
        if what == "_masks":
            if whole.ndim == 2 and whole.shape[1] == ops.packed_size(one.param.numel()) and whole.dtype is torch.uint8:
                state[name] = one.part_of_masks(whole)
        elif whole.shape == one.shape:
            state[name] = one.placed(whole[one.rows].to(wsn.gates.sharding.device))  # type: ignore[union-attr]
    with parts_are_known(wsn):
        wsn.load_state_dict(state)


def _sharding_of(wsn: object) -> Sharding:
    if not isinstance(wsn, WSN):
        raise TypeError(f"wsn must be a wsn_fast.WSN, got {type(wsn).__name__}")
    if wsn.gates.sharding is None:
        raise ValueError("wsn must be sharded: state_dict() and load_state_dict() are for a WSN that is whole")
    return wsn.gates.sharding


def _tensors_of_shards(wsn: WSN) -> list[tuple[str, ShardedGate, str]]:
    """The names in a state of what is cut into shards: of each gated tensor itself, its scores and its masks."""
    return [
        (f"{path}.{one.name}{what}", one, what)
        for path, layer in wsn.named_modules()
        if isinstance(layer, SubnetLayer)
        for one in (layer.gate_state.shards or {}).values()
        for what in ("", "_score", "_masks")
    ]
