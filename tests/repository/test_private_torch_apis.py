"""Private APIs of PyTorch: every use stands in docs/private-torch-apis.md, and PyTorch still has what is used."""

from __future__ import annotations

import ast
import copy
import importlib
import inspect
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.utils.checkpoint
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils._python_dispatch import TorchDispatchMode

from wsn_fast.backends.comparison.tensors import Allocations

optimizers = importlib.import_module("torch.optim.optimizer")  # torch.optim has no attribute of that name
ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "private-torch-apis.md"

# Underscored names of Python's own classes, which are public or are another matter.
OF_PYTHON = frozenset({"_ArgumentGroup", "_Unpickler", "_asdict", "_fields", "_replace"})


# --- the page --------------------------------------------------------------------------------------------------------
class Row(NamedTuple):
    """A row of the page: a name, and the files that use it."""

    name: str
    files: frozenset[str]

    @property
    def last_part(self) -> str:
        return self.name.rpartition(".")[2]


@cache
def rows() -> tuple[list[Row], list[Row]]:
    """The rows of the two tables: private names, and behaviour without a name."""
    _, private, unnamed = re.split(r"^## .*$", PAGE.read_text("utf-8"), flags=re.MULTILINE)
    tables = []
    for part in (private, unnamed):
        cells = [line.split("|") for line in part.splitlines() if line.startswith("| `")]
        tables.append(
            [Row(name.strip(" `"), frozenset(re.findall(r"`([^`]+)`", where))) for _, name, where, *_ in cells]
        )
    return tables[0], tables[1]


# --- the source ------------------------------------------------------------------------------------------------------
@cache
def source() -> dict[str, ast.Module]:
    files = [*(ROOT / "wsn_fast").rglob("*.py"), *(ROOT / "kernels").rglob("*.py")]
    own = [path for path in files if not path.is_relative_to(ROOT / "wsn_fast" / "kernels")]
    return {path.relative_to(ROOT).as_posix(): ast.parse(path.read_text("utf-8"), str(path)) for path in sorted(own)}


@cache
def names_of_torch() -> frozenset[str]:
    """The private attributes that objects of torch's classes have."""
    param = nn.Parameter(torch.zeros(1))
    made = [
        param,
        torch.zeros(1),
        torch.optim.Adam([param], fused=True),
        torch.optim.SGD([param], 0.1),
        torch.autograd.Function,
    ]
    made += [nn.Linear(1, 1), nn.BatchNorm2d(1), nn.MultiheadAttention(2, 1), nn.TransformerEncoderLayer(2, 1)]
    made += [nn.LSTM(1, 1)]
    return frozenset(name for thing in made for name in dir(thing) if is_private(name))


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__") and name != "_"


def own_names(trees: dict[str, ast.Module]) -> set[str]:
    """The private names that the source defines: functions, classes, variables, attributes of ``self``, strings."""
    found: set[str] = set()
    for tree in trees.values():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                found.add(node.name)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                found.add(node.id)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.add(node.value)
            elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                found |= {node.attr} if isinstance(node.value, ast.Name) and node.value.id == "self" else set()
    return found - names_of_torch()


def uses(tree: ast.Module, own: set[str]) -> Iterator[tuple[int, str]]:
    """The (line, name) of every private name of torch in a file; a dotted name for an import, else the last part."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            dotted = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            dotted = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Attribute) and is_private(node.attr) and node.attr not in own | OF_PYTHON:
            yield node.lineno, node.attr
            continue
        elif isinstance(node, ast.FunctionDef) and node.name in names_of_torch():
            yield node.lineno, node.name
            continue
        elif isinstance(node, ast.Constant) and node.value in names_of_torch():
            yield node.lineno, node.value
            continue
        else:
            continue
        for name in dotted:
            if name.split(".")[0] == "torch" and any(map(is_private, name.split("."))):
                yield node.lineno, name


@cache
def found_uses() -> dict[tuple[str, str], int]:
    """Every (file, name) with the line of its first use."""
    own, found = own_names(source()), {}
    for file, tree in source().items():
        for line, name in uses(tree, own):
            found.setdefault((file, name), line)
    return found


def test_every_use_is_on_the_page() -> None:
    listed = {(file, name) for row in rows()[0] for file in row.files for name in (row.name, row.last_part)}
    missing = [f"{file}:{line}: {name}" for (file, name), line in found_uses().items() if (file, name) not in listed]
    assert not missing, (
        "private names of torch that docs/private-torch-apis.md does not list for these files. Use a public name, or "
        "add a row to the page and a check to this test:\n" + "\n".join(missing)
    )


def test_every_row_has_its_uses() -> None:
    found = found_uses().keys()
    stale = [
        f"{row.name}: {file}"
        for row in rows()[0]
        for file in sorted(row.files)
        if not {(file, row.name), (file, row.last_part)} & found
    ]
    for row in rows()[1]:
        stale += [
            f"{row.name}: {file}" for file in sorted(row.files) if row.name not in (ROOT / file).read_text("utf-8")
        ]
    assert not stale, "docs/private-torch-apis.md lists uses that are no longer there:\n" + "\n".join(stale)


@pytest.mark.parametrize(
    ("code", "name"),
    [
        ("from torch.nn.modules.module import _addindent", "torch.nn.modules.module._addindent"),
        ("import torch._dynamo", "torch._dynamo"),
        ("def f(x):\n    return x._base", "_base"),
        ("def f(x):\n    return torch._foreach_mul(x, 2)", "_foreach_mul"),
        ("class A:\n    def _replicate_for_data_parallel(self): pass", "_replicate_for_data_parallel"),
        ("getattr(module, '_is_full_backward_hook')", "_is_full_backward_hook"),
    ],
)
def test_a_new_use_is_found(code: str, name: str) -> None:
    tree = ast.parse(code)
    assert [found for _, found in uses(tree, own_names({"x.py": tree}))] == [name]


def test_own_names_are_no_uses() -> None:
    tree = ast.parse(
        "class A:\n    def __init__(self):\n        self._mine = 1\n\ndef f(a):\n    return a._mine._replace()"
    )
    assert not list(uses(tree, own_names({"x.py": tree})))


# --- what the library relies on --------------------------------------------------------------------------------------
def tracing_state() -> None:
    seen = []

    def traced(x: Tensor) -> Tensor:
        seen.append(torch._C._get_tracing_state())
        return x + 1

    assert torch._C._get_tracing_state() is None
    torch.jit.trace(traced, torch.zeros(1), check_trace=False)
    assert seen[0] is not None


def dispatch_stack() -> None:
    class Mode(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            return func(*args, **kwargs or {})

    assert torch._C._len_torch_dispatch_stack() == 0
    with Mode():
        assert torch._C._len_torch_dispatch_stack() == 1


def exporting() -> None:
    def function(x: Tensor) -> Tensor:
        return x + (1 if torch.compiler._is_exporting_flag else 0)

    class Model(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return function(x)

    zero = torch.zeros(1)
    for strict in (True, False):
        assert torch.export.export(Model(), (zero,), strict=strict).module()(zero) == 1
    assert torch.compile(function, backend="eager", fullgraph=True)(zero) == function(zero) == 0


def graph_memory() -> None:
    """A build without CUDA has none of it. What a failed capture leaves is tested on a GPU."""
    if torch.backends.cuda.is_built():
        assert callable(torch._C._cuda_endAllocateToPool) and callable(torch._C._cuda_releasePool)
    source = inspect.getsource(torch.cuda.memory.use_mem_pool)
    assert "_cuda_endAllocateToPool(" in source and "_cuda_releasePool(" in source


def guarded_allocations() -> None:
    with (allocations := Allocations()):
        made = [torch.empty(3), torch.zeros(2, 2), torch.empty_like(torch.ones(5)), torch.ones(2).new_empty(4)]
    assert len(allocations.made) == len(made), "each factory is seen, and its result is replaced"
    assert all(t.untyped_storage().nbytes() > t.nbytes for t in made)
    assert made[1].eq(0).all() and made[0].isnan().all()


def transforms() -> None:
    active, wrapped = torch._C._are_functorch_transforms_active, torch._C._functorch.is_functorch_wrapped_tensor
    weight = torch.zeros(1)
    seen = []

    def function(x: Tensor) -> Tensor:
        seen.append((active(), wrapped(x), wrapped(weight)))
        return x.sum()

    for transform in (torch.func.grad, torch.func.vmap):
        transform(function)(torch.zeros(1))
    assert seen == [(True, True, False)] * 2 and not active()


def in_parallel() -> None:
    import torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel

    class Model(nn.Linear):
        _ddp_params_and_buffers_to_ignore = ("bias",)
        active: Any = None

        def __init__(self) -> None:
            super().__init__(1, 1)
            self.register_buffer("other", torch.zeros(1))

        def forward(self, x: Tensor) -> Tensor:
            self.active = [DistributedDataParallel._get_active_ddp_module()]
            return super().forward(x)

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        ddp = DistributedDataParallel(model := Model())
        ddp(torch.zeros(1, 1))
        assert model.active == [ddp] and DistributedDataParallel._get_active_ddp_module() is None
        assert [p is model.weight for p in ddp._module_parameters] == [True]
        assert ddp.parameters_to_ignore == {"bias"} and ddp.will_sync_module_buffers()
        ddp.parameters_to_ignore |= {"other"}
        ddp._assign_modules_buffers()
        assert not ddp.will_sync_module_buffers()
        ddp(torch.zeros(1, 1))
        assert not ddp._join_config.enable
        with ddp.join():
            assert ddp._join_config.enable
        assert ddp.mixed_precision is None and not ddp.static_graph and ddp.require_backward_grad_sync
        linear = nn.Linear(1, 1)
        linear.bias.requires_grad_(False)
        ddp = DistributedDataParallel(linear)
        assert len(ddp._module_parameters) == 2 and ddp._get_ddp_logging_data()["num_parameter_tensors"] == 1
    finally:
        dist.destroy_process_group()


def steps_in_backward() -> None:
    import torch.distributed as dist
    from torch.distributed.optim import ZeroRedundancyOptimizer

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        for overlap in (False, True):
            zero = ZeroRedundancyOptimizer(nn.Linear(1, 1).parameters(), torch.optim.Adam, overlap_with_ddp=overlap)
            assert zero._overlap_with_ddp is overlap
    finally:
        dist.destroy_process_group()


def hooks_of_saved_tensors() -> None:
    top = torch._C._autograd._top_saved_tensors_default_hooks
    assert top(False) is None
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t):
        assert top(False) is not None
    seen = []

    def part(x: Tensor) -> Tensor:
        seen.append(top(False))
        return x.sin()

    x = torch.ones(2, requires_grad=True)
    torch.utils.checkpoint.checkpoint(part, x, use_reentrant=False).sum().backward()
    assert len(seen) == 2 and None not in seen and top(False) is None


def foreach_add() -> None:
    tensors = [torch.zeros(()), torch.ones(())]
    torch._foreach_add_(tensors, 1)
    assert [tensor.item() for tensor in tensors] == [1, 2]


def foreach_copy() -> None:
    tensors = [torch.zeros(2, 3), torch.zeros(4)]
    strided, requiring = torch.randn(3, 2).t(), nn.Parameter(torch.randn(4))
    with torch.no_grad():
        torch._foreach_copy_(tensors, [strided, requiring])
    assert torch.equal(tensors[0], strided) and torch.equal(tensors[1], requiring)


def global_hooks(name: str, register: Callable[..., torch.utils.hooks.RemovableHandle]) -> None:
    hooks = getattr(nn.modules.module, name)
    assert not hooks
    handle = register(lambda *_: None)
    try:
        assert hooks, "it is the dictionary itself that is imported"
    finally:
        handle.remove()
    assert not hooks


def apply_to_all() -> None:
    calls: list[str] = []

    class Noted(nn.Linear):
        def _apply(self, fn, recurse=True):  # type: ignore[no-untyped-def]
            calls.append("apply")
            return super()._apply(fn, recurse)

    for move in (lambda m: m.to(torch.float64), nn.Module.half, lambda m: m.to_empty(device="cpu")):
        calls.clear()
        move(nn.Sequential(Noted(1, 1)))
        assert calls == ["apply"]


def registered(attribute: str, register: Callable[[nn.Module], object], make: Callable[[], object]) -> None:
    """A dictionary in the order of registration, with what is None, through which attributes can be set and removed."""
    module = nn.Module()
    register(module)
    stored = getattr(module, attribute)
    assert list(stored) == ["a", "b"] and stored["b"] is None
    stored["a"] = new = make()
    assert module.a is new and list(stored) == ["a", "b"]
    del stored["a"]
    assert not hasattr(module, "a")


def buffers() -> None:
    def register(module: nn.Module) -> None:
        module.register_buffer("a", torch.zeros(1))
        module.register_buffer("b", None)

    registered("_buffers", register, lambda: torch.ones(1))


def parameters() -> None:
    def register(module: nn.Module) -> None:
        module.register_parameter("a", nn.Parameter(torch.zeros(1)))
        module.register_parameter("b", None)

    registered("_parameters", register, lambda: nn.Parameter(torch.ones(1)))


def modules() -> None:
    def register(module: nn.Module) -> None:
        module.register_module("a", nn.Identity())
        module.register_module("b", None)

    registered("_modules", register, nn.Identity)


def compiled_calls() -> None:
    module = nn.Linear(2, 2)
    module.register_forward_hook(lambda module, args, output: output + 1)
    x = torch.ones(1, 2)
    expected = module(x)
    assert torch.equal(module._call_impl(x), expected)
    module._compiled_call_impl = lambda x: 2 * module._call_impl(x)
    assert torch.equal(module(x), 2 * expected)
    assert torch.equal(copy.deepcopy(module)(x), expected)


def non_persistent_buffers() -> None:
    module = nn.Module()
    module.register_buffer("a", torch.zeros(1), persistent=False)
    assert "a" in module._non_persistent_buffers_set and "a" not in module.state_dict()
    module._non_persistent_buffers_set.discard("a")
    assert "a" in module.state_dict()


def load_from_state_dict() -> None:
    calls: list[str] = []

    class Noted(nn.Linear):
        def _load_from_state_dict(self, state_dict, prefix, *args):  # type: ignore[no-untyped-def]
            calls.append(prefix)
            if not prefix:
                self.child = Noted(1, 1)  # before torch descends into the children
            super()._load_from_state_dict(state_dict, prefix, *args)

    state = {f"{name}{end}": torch.full((1, 1), 3.0)[: (end == "weight") or None].view(*shape)
             for name in ("", "child.") for end, shape in (("weight", (1, 1)), ("bias", (1,)))}  # fmt: skip
    module = Noted(1, 1)
    module.load_state_dict(state)
    assert calls == ["", "child."] and module.child.weight.item() == 3


def hooks_of_states(attribute: str, register: str, run: Callable[[nn.Module], object]) -> None:
    """A registered function can be found in the dictionary and removed there, in a copy of the module too."""
    calls: list[int] = []

    def hook(*_: object) -> None:
        calls.append(1)

    original = nn.Linear(1, 1)
    getattr(original, register)(hook)
    for module in (original, copy.deepcopy(original)):
        calls.clear()
        run(module)
        assert calls == [1]
        hooks = getattr(module, attribute)
        for key in [key for key, one in hooks.items() if getattr(one, "hook", one) is hook]:
            del hooks[key]
        run(module)
        assert calls == [1]


def hooks_that_are_always_called() -> None:
    """A forward hook whose key is in the dictionary runs although the forward pass raised."""

    class Raises(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise KeyError("forward")

    module, called = Raises(), []
    module._forward_hooks[-1] = lambda *args: called.append(args)
    for always in (False, True):
        if always:
            module._forward_hooks_always_called[-1] = True
        with pytest.raises(KeyError, match="forward"):
            module(torch.zeros(1))
        assert bool(called) == always


def forward_hooks(attribute: str, register: str) -> None:
    module = nn.Identity()
    assert not getattr(module, attribute)
    handle = getattr(module, register)(lambda *_: None)
    assert getattr(module, attribute)
    handle.remove()
    assert not getattr(module, attribute)


def step_hooks(name: str, register: Callable[..., torch.utils.hooks.RemovableHandle], of_all: bool = False) -> None:
    """A dictionary of hooks by keys that are never used again, of one optimizer or of all of them."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], 0.1)
    hooks = getattr(optimizers, name) if of_all else vars(optimizer)[name]
    assert not hooks
    keys = []
    for _ in range(2):
        handle = register(lambda *_: None) if of_all else register(optimizer, lambda *_: None)
        keys += hooks
        handle.remove()
    assert len(set(keys)) == 2 and not hooks


def amp_scaling() -> None:
    for supports, expected in ((True, 8.0), (False, 2.0)):
        param = nn.Parameter(torch.zeros(1))
        optimizer = torch.optim.Adam([param], fused=True)
        assert optimizer._step_supports_amp_scaling is True
        optimizer._step_supports_amp_scaling = supports
        scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
        scaler.scale(torch.zeros(()))
        param.grad, seen = torch.full((1,), 8.0), []
        optimizer.register_step_pre_hook(lambda *_, seen=seen, param=param: seen.append(param.grad.item()))
        scaler.step(optimizer)
        assert seen == [expected], "GradScaler unscales before the step, unless the step does that itself"


def hooks_of_tensor() -> None:
    weight = nn.Parameter(torch.zeros(1))
    assert not weight._backward_hooks
    weight.register_hook(lambda grad: grad)
    assert weight._backward_hooks


def engine_callback() -> None:
    """It runs when the backward pass that runs has ended, and gradients are stored then."""
    weight, seen = nn.Parameter(torch.zeros(1)), []

    class CallsBack(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, *grads: Tensor) -> Tensor:
            torch.autograd.Variable._execution_engine.queue_callback(lambda: seen.append(weight.grad))
            return grads[0]

    CallsBack.apply(weight).sum().backward()
    (stored,) = seen
    assert stored is weight.grad is not None


def version() -> None:
    tensor = torch.zeros(2)
    before = tensor._version
    tensor.add_(1)
    assert tensor._version == before + 1
    tensor[0] = 2
    assert tensor._version == before + 2
    torch.autograd.graph.increment_version(tensor)
    assert tensor._version == before + 3
    tensor.data.add_(1)
    assert tensor._version == before + 3


def prefix_of_compiled_modules() -> None:
    compiled = nn.Sequential(torch.compile(nn.Linear(1, 1)))
    assert [name for name, _ in compiled.named_parameters()] == ["0._orig_mod.weight", "0._orig_mod.bias"]


def constant_while_compiling() -> None:
    def answer(x: int) -> int:
        return len(str(torch.__config__.show())) * 0 + x  # nothing that could be traced into a graph

    public = torch.compiler.assume_constant_result(lambda x: x)
    assert public._dynamo_marked_constant is True
    answer._dynamo_marked_constant = True  # type: ignore[attr-defined]
    compiled = torch.compile(lambda x: x * answer(3), backend="eager", fullgraph=True)
    assert torch.equal(compiled(torch.ones(2)), torch.full((2,), 3.0))


def backward_in_progress() -> None:
    task, seen = torch._C._current_graph_task_id, []

    def part(x: Tensor) -> Tensor:
        seen.append((task() != -1, torch.is_grad_enabled()))
        return x.sin()

    for reentrant in (True, False):
        seen.clear()
        x = torch.ones(2, requires_grad=True)
        y = torch.utils.checkpoint.checkpoint(part, x, use_reentrant=reentrant)
        y.register_hook(lambda _: seen.append((task() != -1, torch.is_grad_enabled())))
        y.sum().backward()
        assert seen == [(False, not reentrant), (True, False), (True, True)] and task() == -1


def list_of_recurrent_tensors() -> None:
    layer = nn.LSTM(2, 3)
    assert layer._flat_weights_names == [name for name, _ in layer.named_parameters()]
    layer._flat_weights = []
    layer._init_flat_weights()
    assert [*map(id, layer._flat_weights)] == [*map(id, layer.parameters())]


def separate_projections() -> None:
    x, fused = torch.randn(2, 3, 4), nn.MultiheadAttention(4, 2, batch_first=True)
    separate = copy.deepcopy(fused)
    separate.register_parameter("in_proj_weight", None)
    for name, part in zip("qkv", fused.in_proj_weight.chunk(3), strict=True):
        setattr(separate, f"{name}_proj_weight", nn.Parameter(part.detach().clone()))
    separate._qkv_same_embed_dim = False
    torch.testing.assert_close(separate(x, x, x)[0], fused(x, x, x)[0])


def unwrapped_step() -> None:
    param = nn.Parameter(torch.zeros(1))
    for kind in (torch.optim.Adam, torch.optim.SGD):
        optimizer, calls = kind([param], 0.1), []
        optimizer.register_step_pre_hook(lambda *_, calls=calls: calls.append("hook"))
        param.grad = torch.ones(1)
        before = param.item()
        with torch.no_grad():
            inspect.unwrap(kind.step)(optimizer)
        assert not calls and param.item() != before
        optimizer.step()
        assert calls == ["hook"]


def layers_of_a_step() -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], 0.1)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    layers, step = [], schedule.optimizer.step
    while step is not None:
        layers.append(step.__code__.co_filename)
        step = getattr(step, "__wrapped__", None)
    files = [Path(layer).name for layer in layers]
    assert files[0] == "lr_scheduler.py" and "optimizer.py" in files and files[-1] == "sgd.py"
    assert all(Path(layer).is_relative_to(Path(torch.__file__).parent) for layer in layers)


class Refuses(nn.Linear):
    def __prepare_scriptable__(self) -> None:
        raise ZeroDivisionError

    qconfig = property(lambda self: getattr(self, "none"), lambda self, value: 1 / 0)  # noqa: B009


def scripting_and_quantization() -> None:
    for tool in (torch.jit.script, torch.ao.quantization.quantize_dynamic, torch.ao.quantization.prepare):
        with pytest.raises(ZeroDivisionError):
            tool(nn.Sequential(Refuses(1, 1)))


def proxies() -> None:
    proxy_tensor = importlib.import_module("torch.fx.experimental.proxy_tensor")
    seen = []
    proxy_tensor.make_fx(lambda x: (seen.append(proxy_tensor.get_proxy_mode()), x + 1)[1])(torch.zeros(1))
    assert seen[0] is not None and proxy_tensor.get_proxy_mode() is None


@contextmanager
def alone() -> Iterator[Any]:
    """A mesh of one process."""
    dist = torch.distributed
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield init_device_mesh("cpu", (1,))
    finally:
        dist.destroy_process_group()


def parts_of_meshes() -> None:
    with alone():
        mesh = init_device_mesh("cpu", (1, 1), mesh_dim_names=("a", "b"))
        assert mesh["a"]._get_root_mesh() == mesh and mesh._get_root_mesh() == mesh


class Doubled(Tensor):
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    def fsdp_pre_all_gather(self, mesh, outer_size, outer_stride, module, mp_policy):  # type: ignore[no-untyped-def]
        return (2 * self.detach(),), None

    def fsdp_post_all_gather(self, outputs, metadata, dtype, *, out=None):  # type: ignore[no-untyped-def]
        return None if out is not None else (outputs[0].view(1, 1), ())


def shards() -> None:
    """What takes the place of a shard is asked for what to gather, and hooks hear of its gradients."""
    assert type(torch.ones(1).as_subclass(Doubled) + 1) is Tensor
    with alone() as mesh:
        layer, seen = nn.Linear(1, 1, bias=False), []
        value = layer.weight.item()
        fully_shard(layer, mesh=mesh)
        param: Any = layer.weight
        assert param._local_tensor is param._local_tensor
        param._local_tensor = param._local_tensor.as_subclass(Doubled)
        param.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad._local_tensor.item()))
        for x in (1.0, 3.0):
            out = layer(torch.full((1, 1), x))
            assert out.item() == 2 * value * x
            out.sum().backward()
        assert seen == [1, 4] and layer.weight is param and type(param._local_tensor) is Doubled


CHECKS: dict[str, Callable[[], object]] = {
    "__prepare_scriptable__": scripting_and_quantization,
    "qconfig": scripting_and_quantization,
    "get_proxy_mode": proxies,
    "torch._C._get_tracing_state": tracing_state,
    "torch._C._len_torch_dispatch_stack": dispatch_stack,
    "torch.utils._python_dispatch.TorchDispatchMode": guarded_allocations,
    "torch._C._cuda_endAllocateToPool": graph_memory,
    "torch._C._cuda_releasePool": graph_memory,
    "torch.compiler._is_exporting_flag": exporting,
    "torch._C._are_functorch_transforms_active": transforms,
    "torch._C._functorch.is_functorch_wrapped_tensor": transforms,
    "torch._C._autograd._top_saved_tensors_default_hooks": hooks_of_saved_tensors,
    "torch._C._current_graph_task_id": backward_in_progress,
    "torch._foreach_add_": foreach_add,
    "torch._foreach_copy_": foreach_copy,
    "torch.nn.modules.module._global_forward_hooks": lambda: global_hooks(
        "_global_forward_hooks", nn.modules.module.register_module_forward_hook
    ),
    "torch.nn.modules.module._global_forward_pre_hooks": lambda: global_hooks(
        "_global_forward_pre_hooks", nn.modules.module.register_module_forward_pre_hook
    ),
    "DistributedDataParallel._get_active_ddp_module": in_parallel,
    "DistributedDataParallel._module_parameters": in_parallel,
    "DistributedDataParallel._assign_modules_buffers": in_parallel,
    "DistributedDataParallel._join_config": in_parallel,
    "DistributedDataParallel._get_ddp_logging_data": in_parallel,
    "DeviceMesh._get_root_mesh": parts_of_meshes,
    "_ddp_params_and_buffers_to_ignore": in_parallel,
    "parameters_to_ignore": in_parallel,
    "_overlap_with_ddp": steps_in_backward,
    "Module._apply": apply_to_all,
    "Module._buffers": buffers,
    "Module._parameters": parameters,
    "Module._modules": modules,
    "Module._call_impl": compiled_calls,
    "Module._compiled_call_impl": compiled_calls,
    "Module._non_persistent_buffers_set": non_persistent_buffers,
    "Module._load_from_state_dict": load_from_state_dict,
    "Module._load_state_dict_pre_hooks": lambda: hooks_of_states(
        "_load_state_dict_pre_hooks", "register_load_state_dict_pre_hook", lambda m: m.load_state_dict(m.state_dict())
    ),
    "Module._state_dict_hooks": lambda: hooks_of_states(
        "_state_dict_hooks", "register_state_dict_post_hook", nn.Module.state_dict
    ),
    "Module._state_dict_pre_hooks": lambda: hooks_of_states(
        "_state_dict_pre_hooks", "register_state_dict_pre_hook", nn.Module.state_dict
    ),
    "Module._forward_hooks": lambda: forward_hooks("_forward_hooks", "register_forward_hook"),
    "Module._forward_hooks_always_called": hooks_that_are_always_called,
    "Module._forward_pre_hooks": lambda: forward_hooks("_forward_pre_hooks", "register_forward_pre_hook"),
    "Optimizer._step_supports_amp_scaling": amp_scaling,
    "Optimizer._optimizer_step_pre_hooks": lambda: step_hooks(
        "_optimizer_step_pre_hooks", torch.optim.Optimizer.register_step_pre_hook
    ),
    "Optimizer._optimizer_step_post_hooks": lambda: step_hooks(
        "_optimizer_step_post_hooks", torch.optim.Optimizer.register_step_post_hook
    ),
    "torch.optim.optimizer._global_optimizer_pre_hooks": lambda: step_hooks(
        "_global_optimizer_pre_hooks", optimizers.register_optimizer_step_pre_hook, of_all=True
    ),
    "torch.optim.optimizer._global_optimizer_post_hooks": lambda: step_hooks(
        "_global_optimizer_post_hooks", optimizers.register_optimizer_step_post_hook, of_all=True
    ),
    "Tensor._backward_hooks": hooks_of_tensor,
    "Variable._execution_engine": engine_callback,
    "RNNBase._init_flat_weights": list_of_recurrent_tensors,
    "RNNBase._flat_weights": list_of_recurrent_tensors,
    "RNNBase._flat_weights_names": list_of_recurrent_tensors,
    "MultiheadAttention._qkv_same_embed_dim": separate_projections,
    "Tensor._version": version,
    "_orig_mod": prefix_of_compiled_modules,
    "inspect.unwrap": unwrapped_step,
    "__wrapped__": layers_of_a_step,
    "_dynamo_marked_constant": constant_while_compiling,
    "DTensor._local_tensor": shards,
    "torch._C._disabled_torch_function_impl": shards,
    "fsdp_pre_all_gather": shards,
    "register_post_accumulate_grad_hook": shards,
}


def test_every_row_has_a_check() -> None:
    assert {row.name for table in rows() for row in table} == CHECKS.keys()


@pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated:DeprecationWarning")
@pytest.mark.parametrize("name", CHECKS)
def test_torch_still_does_what_the_library_relies_on(name: str) -> None:
    files = next((row.files for table in rows() for row in table if row.name == name), frozenset())
    try:
        CHECKS[name]()
    except Exception as error:
        pytest.fail(
            f"torch {torch.__version__} changed {name}, on which {', '.join(sorted(files))} depend(s); see "
            f"docs/private-torch-apis.md. {type(error).__name__}: {error}"
        )
