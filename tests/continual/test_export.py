"""A finished task leaves the library: every claim of docs/how-to/export.md."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from typing import Any

import exports
import pytest
import torch
from exports import MODELS, Program, finished, train
from torch import Tensor, nn
from torch.nn.utils import fusion, prune

from wsn_fast import WSN, FastSubnetLinear, convert, to_dense

pytestmark = [
    pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # what torch deprecates and people still use
    pytest.mark.filterwarnings("ignore:No complete tensor found in the group"),  # the mask in use is a row of all masks
    pytest.mark.filterwarnings("ignore:.torch.nn.utils.weight_norm. is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor"),
    pytest.mark.filterwarnings("ignore:The given buffer is not writable"),  # torch.export.load of torch 2.11
    pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec:FutureWarning"),  # torch's exporter
    pytest.mark.filterwarnings("ignore:You are using the legacy TorchScript-based ONNX export"),
]

EXACT: dict[str, Callable[[nn.Module, Tensor], Program]] = {
    "torch.export": exports.exported,
    "torch.export, saved": exports.saved,
    "torch.jit.trace": exports.traced,
    "make_fx": exports.recorded,
}
ONNX = {"onnx": exports.onnx, "old onnx": exports.old_onnx}
MISSING = [name for name in ("onnx", "onnxscript", "onnxruntime") if importlib.util.find_spec(name) is None]
needs_onnx = pytest.mark.skipif(bool(MISSING), reason=f"needs {', '.join(MISSING)}")
WAYS = [*EXACT, *(pytest.param(name, marks=needs_onnx) for name in ONNX)]


@pytest.fixture(autouse=True)
def one_attention() -> Iterator[None]:
    """nn.MultiheadAttention rounds differently in its fast path, which programs do not have (see the page)."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    yield
    torch.backends.mha.set_fastpath_enabled(before)


def right(way: str, result: Tensor, expected: Tensor) -> bool:
    if way in ONNX:
        return torch.allclose(result, expected, rtol=0, atol=1e-5)
    return torch.equal(result, expected)


@pytest.mark.parametrize("of", ["to_dense", "wsn"])
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("way", WAYS)
def test_a_program_computes_the_task_now_and_later(way: str, model: str, of: str) -> None:
    wsn, x = finished(model)
    other = x.flip(0)
    with torch.no_grad():
        with wsn.use_task(0):
            expected = wsn(x), wsn(other)
            program = {**EXACT, **ONNX}[way](to_dense(wsn, 0) if of == "to_dense" else wsn, x)
            assert right(way, program(x), expected[0])
        for task in (0, 1):
            with wsn.use_task(task):
                assert right(way, program(other), expected[1])
    train(wsn, 2, x)
    with torch.no_grad():
        assert right(way, program(x), expected[0])
        assert right(way, program(other), expected[1])
    wsn.verify()


@pytest.mark.parametrize("model", MODELS)
def test_compiled_code_follows_the_task_in_use_and_a_dense_copy_does_not(model: str) -> None:
    wsn, x = finished(model)
    with torch.no_grad():
        programs = exports.compiled(wsn, x), torch.compile(to_dense(wsn, 0), fullgraph=True, backend="aot_eager")
        expected = {}
        for task in (0, 1, 0):
            with wsn.use_task(task):
                expected[task] = wsn(x)
                assert torch.equal(programs[0](x), expected[task])
                assert torch.equal(programs[1](x), expected[0])
    assert not torch.equal(expected[0], expected[1])


@pytest.mark.parametrize("model", MODELS)
def test_a_program_needs_only_the_operations_of_torch(model: str) -> None:
    wsn, x = finished(model)
    with wsn.use_task(0), torch.no_grad():
        program = torch.export.export(wsn, (x,))
    called = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert called and not [name for name in called if "wsn_fast" in name]


def test_the_batch_may_be_of_any_size() -> None:
    wsn, x = finished("conv net")
    batch = {0: torch.export.Dim("batch")}
    with torch.no_grad(), wsn.use_task(0):
        of_wsn = torch.export.export(wsn, (x,), dynamic_shapes=((batch,),)).module()
        of_model = torch.export.export(wsn.model, (x,), dynamic_shapes=(batch,)).module()
        torch.testing.assert_close(of_wsn(x[:2]), wsn(x[:2]), rtol=0, atol=0)
        torch.testing.assert_close(of_model(x[:3]), wsn(x[:3]), rtol=0, atol=0)


def test_a_strict_export_works_without_per_task_tensors_and_else_names_to_dense() -> None:
    wsn, x = finished("mlp with heads")
    with torch.no_grad(), wsn.use_task(0):
        expected, program = wsn(x), exports.strictly_exported(wsn, x)
    train(wsn, 2, x)
    with torch.no_grad():
        assert torch.equal(program(x), expected)
    wsn, x = finished("conv net")
    with wsn.use_task(0), pytest.raises(Exception, match="to_dense"):
        exports.strictly_exported(wsn, x)
    with torch.no_grad(), wsn.use_task(0):
        assert torch.equal(exports.strictly_exported(to_dense(wsn, 0), x)(x), wsn(x))


# --- in training -----------------------------------------------------------------------------------------------------
TRAINING = {**EXACT, "torch.export, strict": exports.strictly_exported}


@pytest.mark.parametrize("begun", [True, False], ids=["a task in training", "none"])
@pytest.mark.parametrize("way", [*TRAINING, *(pytest.param(name, marks=needs_onnx) for name in ONNX)])
def test_without_a_task_in_use_an_export_is_refused(way: str, begun: bool) -> None:
    wsn, x = finished("mlp")
    if begun:
        wsn.begin_task(2)
    with pytest.raises(Exception, match=r"no finished task is in use.*to_dense"):
        {**TRAINING, **ONNX}[way](wsn, x)


def test_fake_tensors_and_counters_are_no_programs() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    wsn, x = finished("mlp")
    wsn.begin_task(2)
    with FlopCounterMode(display=False) as counter:
        wsn(x).sum().backward()
    assert counter.get_total_flops() > 0


# --- what a program of the WSN itself refers to ----------------------------------------------------------------------
@pytest.mark.parametrize("way", ["torch.export", "torch.export, saved", "torch.jit.trace"])
def test_removal_changes_a_program_of_the_wsn_that_was_not_saved(way: str) -> None:
    wsn, x = finished("mlp")
    with torch.no_grad():
        with wsn.use_task(0):
            expected = wsn(x)
            program, dense = EXACT[way](wsn, x), EXACT[way](to_dense(wsn, 0), x)
        wsn.remove_task(1)
        assert torch.equal(program(x), expected)
        wsn.remove_task(0)
    train(wsn, 2, x)
    with torch.no_grad():
        assert torch.equal(program(x), expected) is ("saved" in way)
        assert torch.equal(dense(x), expected)


# --- tools that cannot take a WSN ------------------------------------------------------------------------------------
def quantize(model: nn.Module) -> nn.Module:
    return torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)


REFUSED: dict[str, Callable[[nn.Module], object]] = {
    "torch.jit.script": torch.jit.script,
    "quantize_dynamic": quantize,
    "quantize_dynamic in place": lambda model: torch.ao.quantization.quantize_dynamic(model, inplace=True),
    "prepare": torch.ao.quantization.prepare,
    "torch.fx.symbolic_trace": torch.fx.symbolic_trace,
}


@pytest.mark.parametrize("used", [0, None], ids=["in use", "in training"])
@pytest.mark.parametrize("part", ["wsn", "model", "layer", "heads"])
@pytest.mark.parametrize("tool", REFUSED)
def test_a_tool_that_cannot_take_it_is_refused(tool: str, part: str, used: int | None) -> None:
    wsn, x = finished("mlp with heads")
    wsn.use_task(0)
    expected = wsn(x)
    parts: dict[str, nn.Module] = {"wsn": wsn, "model": wsn.model, "layer": wsn.model[0], "heads": wsn.model[4]}
    with wsn.use_task(used), pytest.raises(RuntimeError, match="to_dense"):
        REFUSED[tool](parts[part])
    wsn.use_task(0)
    assert torch.equal(wsn(x), expected)
    wsn.verify()


@pytest.mark.parametrize("model", ["mlp", "mlp with heads", "conv net"])
def test_a_dense_copy_is_scripted_quantized_and_traced(model: str) -> None:
    wsn, x = finished(model)
    with torch.no_grad(), wsn.use_task(0):
        expected = wsn(x)
        dense = to_dense(wsn, 0)
        assert torch.equal(torch.jit.script(dense)(x), expected)
        assert torch.equal(torch.fx.symbolic_trace(dense)(x), expected)
        quantized = quantize(dense)
        assert sum("quantized" in type(module).__module__ for module in quantized.modules()) >= 1
        torch.testing.assert_close(quantized(x), expected, rtol=0, atol=0.1 * float(expected.abs().max()))


REPARAMETRIZED: dict[str, Callable[[nn.Module], object]] = {
    "prune": lambda layer: prune.l1_unstructured(layer, "weight", 0.5),
    "prune the bias": lambda layer: prune.random_unstructured(layer, "bias", 0.5),
    "weight_norm": nn.utils.weight_norm,
    "spectral_norm": nn.utils.spectral_norm,
}


@pytest.mark.parametrize("tool", REPARAMETRIZED)
def test_a_reparametrized_weight_is_refused_and_the_layer_is_what_it_was(tool: str) -> None:
    wsn, x = finished("mlp")
    wsn.use_task(0)
    expected, names = wsn(x), [name for name, _ in wsn.named_parameters()]
    with pytest.raises(RuntimeError, match=r"cannot have a parameter.*to_dense"):
        REPARAMETRIZED[tool](wsn.model[0])
    assert [name for name, _ in wsn.named_parameters()] == names
    assert torch.equal(wsn(x), expected)
    wsn.verify()
    REPARAMETRIZED[tool](to_dense(wsn, 0)[0])  # type: ignore[index]


def test_parametrize_is_found_by_verify() -> None:
    class Doubles(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return 2 * weight

    wsn, _ = finished("mlp")
    nn.utils.parametrize.register_parametrization(wsn.model[0], "weight", Doubles())
    with pytest.raises(Exception, match=r"0\.weight"):
        wsn.verify()


@pytest.mark.parametrize("layer", [0, 3], ids=["without a bias", "with one"])
def test_fusing_a_layer_with_its_norm_is_refused(layer: int) -> None:
    wsn, x = finished("conv net")
    wsn.use_task(0)
    with pytest.raises(RuntimeError, match=r"fuse_conv_bn_eval.*to_dense"):
        fusion.fuse_conv_bn_eval(wsn.model[layer], wsn.model[layer + 1])
    wsn.verify()
    dense: Any = to_dense(wsn, 0)
    fused = fusion.fuse_conv_bn_eval(dense[layer], dense[layer + 1])
    before = x if layer == 0 else dense[:3](x)
    torch.testing.assert_close(fused(before), dense[layer + 1](dense[layer](before)), rtol=1e-4, atol=1e-5)


def test_fusing_a_linear_layer_is_refused_and_fuse_modules_knows_no_subnet_layer() -> None:
    wsn = WSN(convert(nn.Sequential(nn.Linear(8, 8, bias=False), nn.BatchNorm1d(8))))
    wsn.begin_task(0)
    wsn.end_task()
    wsn.eval()
    with pytest.raises(RuntimeError, match="to_dense"):
        fusion.fuse_linear_bn_eval(wsn.model[0], wsn.model[1])
    wsn, _ = finished("conv net")
    with pytest.raises(Exception, match="fuser method"):
        torch.ao.quantization.fuse_modules(wsn.model, ["0", "1"])


# --- what is no such tool --------------------------------------------------------------------------------------------
def test_a_weight_may_be_replaced_where_no_finished_task_uses_it() -> None:
    wsn, x = finished("mlp")
    layer = wsn.model[0]
    with wsn.use_task(0):
        expected = wsn(x)
        used = layer.mask("weight", 0) | layer.mask("weight", 1)
        layer.weight = nn.Parameter(torch.where(used, layer.weight, torch.nan).detach())
        assert torch.equal(wsn(x), expected)
    with pytest.raises(RuntimeError, match="differs from the old one"):
        layer.weight = nn.Parameter(layer.weight.detach().double())
    with pytest.raises(RuntimeError, match="differs from the old one"):
        layer.bias = nn.Parameter(layer.bias.detach() + 1)


def test_another_state_may_be_assigned() -> None:
    wsn, x = finished("mlp")
    torch.manual_seed(1)
    other = WSN(convert(exports.mlp(), 0.4))
    train(other, 7, x)
    wsn.load_state_dict(other.state_dict(), assign=True)
    with wsn.use_task(7), other.use_task(7):
        assert torch.equal(wsn(x), other(x))
    wsn.verify()


def test_a_layer_without_finished_tasks_takes_any_weight() -> None:
    layer = FastSubnetLinear(4, 4, bias=False)
    layer.weight = nn.Parameter(torch.zeros(4, 4))
    assert not layer(torch.ones(1, 4)).any()
    with pytest.raises(RuntimeError, match="has no bias, hence no scores"):
        layer.bias = nn.Parameter(torch.zeros(4))
    assert layer.bias is None
