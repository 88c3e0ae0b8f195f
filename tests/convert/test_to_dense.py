"""to_dense: one finished task as a plain module."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from lookalikes import MODELS, ResNet, images, tokens, vectors
from torch import Tensor, nn

from wsn_fast import WSN
from wsn_fast.convert.to_dense import to_dense
from wsn_fast.convert.to_subnet import convert
from wsn_fast.nn.gated import SubnetLayer
from wsn_fast.nn.heads import TaskHeads

TASKS = ("a", 1)


def trained(name: str, **kwargs: str) -> WSN:
    """Two finished tasks and a third in progress, a few real steps each."""
    make, make_input, head = MODELS[name]
    model = convert(make(), 0.4, heads={head: {"a": 4, 1: 3, "now": 2}}, **kwargs)
    wsn = WSN(model)
    for task in (*TASKS, "now"):
        wsn.begin_task(task)
        optimizer = wsn.guard(torch.optim.SGD(wsn.train().parameters(), 0.5))
        for _ in range(2):
            optimizer.zero_grad()
            out = wsn(make_input())
            (out * torch.randn_like(out)).sum().backward()
            optimizer.step()
        if task in TASKS:
            wsn.end_task()
    return wsn.eval()


@torch.no_grad()
def logits(wsn: WSN, task: int | str, x: Tensor) -> Tensor:
    with wsn.use_task(task):
        return wsn(x)


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("name", MODELS)
def test_logits_are_bitwise_those_of_the_task(name: str, task: int | str) -> None:
    wsn, x = trained(name), MODELS[name][1]()
    with torch.no_grad():
        assert torch.equal(to_dense(wsn, task)(x), logits(wsn, task, x))


def test_the_task_that_is_in_use_does_not_matter() -> None:
    wsn, x = trained("resnet"), images()
    expected = logits(wsn, 1, x)
    with wsn.use_task("a"), torch.no_grad():
        assert torch.equal(to_dense(wsn, 1)(x), expected)


def test_stateless_batch_norm_stays_so() -> None:
    wsn, x = trained("resnet", batch_norm="stateless"), images()
    with torch.no_grad():
        assert torch.equal(to_dense(wsn, 1)(x), logits(wsn, 1, x))


def test_autocast_agrees() -> None:
    wsn, x = trained("vit"), images()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(to_dense(wsn, 1)(x), logits(wsn, 1, x))


def test_an_encoder_layer_agrees_in_inference() -> None:
    for kwargs, owners in (({}, {}), ({"exclude_modules": "self_attn"}, {"frozen": "self_attn"})):
        layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        wsn = WSN(convert(nn.Sequential(layer, nn.Linear(8, 3)), 0.4, heads="1", **kwargs), **owners).eval()
        wsn.begin_task(0)
        wsn.end_task()
        x = torch.randn(3, 4, 8)
        with torch.no_grad():
            assert torch.equal(to_dense(wsn, 0)(x), logits(wsn, 0, x))


def test_gpt2_agrees() -> None:
    transformers: Any = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        n_embd=16, n_layer=1, n_head=2, vocab_size=11, n_positions=8, bos_token_id=0, eos_token_id=0
    )
    model = convert(transformers.GPT2LMHeadModel(config), 0.4, heads={"lm_head": 3})
    wsn = WSN(model).eval()
    wsn.begin_task(0)
    wsn.end_task()
    x = tokens()
    with wsn.use_task(0), torch.no_grad():
        expected = wsn(x).logits
        assert torch.equal(to_dense(wsn, 0)(x).logits, expected)
    assert expected.shape == (4, 3, 3)


def test_a_model_with_a_submodule_called_model_is_not_unwrapped() -> None:
    class Wrapper(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model, self.head = nn.Linear(6, 6), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.model(x))

    wsn = WSN(convert(Wrapper()))
    wsn.begin_task(0)
    wsn.end_task()
    dense = to_dense(wsn.model, 0)
    assert type(dense) is Wrapper
    assert type(dense.head) is nn.Linear


@pytest.mark.parametrize("name", ["resnet", "vit", "up", "tied", "twice"])
def test_the_copy_is_as_plain_as_the_model_was(name: str) -> None:
    dense, model = to_dense(trained(name), 1), MODELS[name][0]()
    assert dense.state_dict().keys() == model.state_dict().keys()
    for path, module in model.named_modules():
        twin = dense.get_submodule(path)
        assert type(twin) is type(module)
        assert vars(twin).keys() == vars(module).keys()
        assert vars(twin)["_buffers"].keys() == vars(module)["_buffers"].keys()
        for registry in ("_state_dict_hooks", "_load_state_dict_pre_hooks", "_non_persistent_buffers_set"):
            assert not vars(twin)[registry]


def test_a_transposed_layer_becomes_linear() -> None:
    dense = to_dense(trained("gpt"), 1)
    assert type(dense.c_fc) is nn.Linear
    assert vars(dense.c_fc).keys() == vars(nn.Linear(6, 24)).keys()
    assert dense.c_fc.weight.shape == (24, 6)
    assert dense.c_fc.weight.stride() == (1, 24)  # as the layer used it: another layout rounds differently


def test_it_pickles_without_this_library() -> None:
    dense, x = to_dense(trained("resnet"), 1), images()
    data = pickle.dumps(dense)
    assert b"wsn_fast" not in data
    assert torch.equal(pickle.loads(data)(x), dense(x))


def test_the_original_is_untouched() -> None:
    wsn = trained("resnet")
    state, view = copy.deepcopy(wsn.state_dict()), copy.copy(wsn._view)
    types = [type(m) for m in wsn.modules()]
    dense = to_dense(wsn, 1)
    with torch.no_grad():
        for tensor in (*dense.parameters(), *dense.buffers()):
            tensor.zero_()
    assert [type(m) for m in wsn.modules()] == types
    assert wsn._view == view
    assert all(torch.equal(tensor, state[name]) for name, tensor in wsn.state_dict().items())
    wsn.verify()


def test_masks_and_scores_are_not_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    wsn, copied = trained("vit"), set()

    def recording(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def deepcopy(self: Tensor, memo: dict[int, object]) -> Tensor:
            copied.add(id(self))
            return original(self, memo)

        return deepcopy

    for kind in (Tensor, nn.Parameter):
        monkeypatch.setattr(kind, "__deepcopy__", recording(kind.__deepcopy__))
    to_dense(wsn, 1)
    gates = [g for layer in wsn.subnet_layers().values() for g in layer.gated()]
    assert {id(g.param) for g in gates} <= copied
    assert not {id(t) for g in gates for t in (g.masks, g.score, g.union)} & copied


def test_what_is_outside_the_mask_is_plus_zero() -> None:
    wsn = trained("twice")
    layer = wsn.model.first
    outside = ~layer.mask("weight", 1)
    with torch.no_grad():
        layer.weight.masked_fill_(outside, float("nan"))
    weight = to_dense(wsn, 1).first.weight
    assert torch.equal(weight[~outside], layer.weight[~outside])
    assert not weight[outside].any()
    assert not weight[outside].signbit().any()


def test_ties_and_shared_modules_stay() -> None:
    tied, twice = to_dense(trained("tied"), 1), to_dense(trained("twice"), 1)
    assert tied.encoder.weight is tied.decoder.weight
    assert twice.first is twice.second


def test_flags_and_hooks_stay() -> None:
    wsn, calls = trained("twice"), []
    wsn.model.first.register_forward_hook(lambda *args: calls.append(1))
    dense = to_dense(wsn, 1)
    assert not any(param.requires_grad for param in dense.parameters())  # as what is fixed in the WSN
    assert not dense.training
    dense(vectors())
    assert calls == [1, 1]


@pytest.mark.parametrize("task", ["now", "1", 2])
def test_a_task_that_is_not_finished_is_refused(task: int | str) -> None:
    with pytest.raises(ValueError, match=rf"task {task!r} is unknown; finished tasks: \['a', 1\]"):
        to_dense(trained("twice"), task)


@pytest.mark.parametrize("task", [True, None, 1.0])
def test_what_is_no_task_is_refused(task: object) -> None:
    with pytest.raises(TypeError, match="task must be an int or a str"):
        to_dense(trained("twice"), task)  # type: ignore[arg-type]


def test_a_head_that_is_missing_is_reported() -> None:
    model = nn.Sequential(convert(nn.Linear(6, 6)), TaskHeads(6, tasks={0: 3}))
    layer = model[0]
    layer.append_task(5, {g.name: torch.full_like(g.masks.new_empty(g.masks.shape[1]), 255) for g in layer.gated()})
    with pytest.raises(ValueError, match=r"task 5 has no head; tasks that have one: \[0\]"):
        to_dense(model, 5)


def test_a_model_without_subnet_layers_is_refused() -> None:
    with pytest.raises(ValueError, match="no subnet layer"):
        to_dense(ResNet(), 1)
    with pytest.raises(TypeError, match=r"model must be an nn\.Module, got dict"):
        to_dense({}, 1)  # type: ignore[arg-type]


def test_layers_that_disagree_are_refused() -> None:
    model = trained("twice").model
    model.late = convert(nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"disagree about the finished tasks: \['a', 1\] and \[\]"):
        to_dense(model, 1)


def test_a_single_layer() -> None:
    layer, x = convert(nn.Linear(6, 4), 0.3), vectors()
    assert isinstance(layer, SubnetLayer)
    wsn = WSN(layer)
    wsn.begin_task(0)
    wsn.end_task()
    dense = to_dense(layer, 0)
    assert type(dense) is nn.Linear
    assert torch.equal(dense(x), logits(wsn, 0, x))


@pytest.mark.parametrize("bias", [True, False])
def test_a_copy_that_needs_no_gradients_agrees_for_any_input_and_mode(bias: bool) -> None:
    # PyTorch chooses kernels by requires_grad, in no_grad too.
    models = {
        "linear": nn.Linear(6, 6, bias=bias),
        "attention": nn.TransformerEncoderLayer(6, 2, 8, batch_first=True, bias=bias),
    }
    for model in models.values():
        wsn = WSN(convert(nn.Sequential(model, nn.Linear(6, 3)), 0.4, heads="1")).eval()
        wsn.begin_task(0)
        wsn.end_task()
        dense = to_dense(wsn, 0).requires_grad_(False)
        x = torch.randn(5, 7, 6)
        for one in (x, x.transpose(0, 1), x[..., ::2].repeat(1, 1, 2).transpose(0, 1)):
            for grad in (True, False):
                with torch.set_grad_enabled(grad), wsn.use_task(0):
                    assert torch.equal(dense(one), wsn(one))
