"""Models that are built and converted on the meta device, and get their memory later: once, and initialised."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from wsn_fast import WSN, FastSubnetLinear, TaskHeads, convert, materialize

ROOT = Path(__file__).parents[2]


class Net(nn.Module):
    """Linear layers, two of them tied, norms, a parameter of its own, and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.third.weight = self.second.weight
        self.norms = nn.Sequential(nn.LayerNorm(8), nn.BatchNorm1d(8))
        self.scale = nn.Parameter(torch.empty(8))
        self.head = nn.Linear(8, 3)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.constant_(self.scale, 2.0)
        nn.init.constant_(self.first.bias, 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.scale * self.norms(self.third(self.second(self.first(x)))))


def on_meta(score_init: str = "default") -> nn.Module:
    with torch.device("meta"):
        return convert(Net(), 0.5, heads="head", score_init=score_init)


def wrapped(model: nn.Module) -> WSN:
    return WSN(model, per_task="scale")


def trained(wsn: WSN, task: int) -> WSN:
    wsn.begin_task(task)
    optimizer = wsn.guard(torch.optim.AdamW(wsn.parameters(), lr=0.01))
    for _ in range(3):
        optimizer.zero_grad()
        wsn(torch.randn(16, 6)).square().mean().backward()
        optimizer.step()
    wsn.end_task()
    return wsn


def logits(wsn: WSN, task: int) -> Tensor:
    x = torch.randn(4, 6, generator=torch.Generator().manual_seed(1))
    with torch.no_grad(), wsn.eval().use_task(task):
        return wsn(x)


# --- memory and values
def test_a_model_from_meta_trains_and_forgets_nothing() -> None:
    wsn = wrapped(materialize(on_meta(), "cpu"))
    before = logits(trained(wsn, 0), 0)
    trained(wsn.train(), 1).verify()
    assert torch.equal(logits(wsn, 0), before)


def test_all_is_initialised_inner_modules_first() -> None:
    model = materialize(on_meta(), "cpu")
    assert torch.equal(model.scale, torch.full((8,), 2.0))
    assert torch.equal(model.first.bias, torch.full((8,), 0.5))  # which the linear layer had drawn before
    assert torch.equal(model.norms[1].running_var, torch.ones(8))
    assert 0 < model.first.weight.abs().max() <= 6**-0.5


def test_scores_are_drawn_as_convert_was_told() -> None:
    model = materialize(on_meta("U01"), "cpu")
    scores = [p.detach() for name, p in model.named_parameters() if name.endswith("_score")]
    assert all(0 <= s.min() < s.max() < 1 for s in scores)
    assert torch.cat([s.flatten() for s in scores]).mean() == pytest.approx(0.5, abs=0.1)


@pytest.mark.parametrize("seeds", ["12", pytest.param("345", marks=pytest.mark.ci)])
def test_a_seed_says_what_is_drawn(seeds: str) -> None:
    script = "import torch, wsn_fast as w; torch.manual_seed(0); m = w.FastSubnetLinear(9, 9, device='meta'); "
    script += "print([p.tolist() for p in w.materialize(m, 'cpu').parameters()])"
    seen = set()
    for hashes in seeds:  # of strings, which must not matter
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONHASHSEED": hashes}
        done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        seen.add(done.stdout)
    assert len(seen) == 1


def test_what_was_tied_stays_tied() -> None:
    model = materialize(on_meta(), "cpu")
    assert model.third.weight is model.second.weight
    assert model.third.weight_score is model.second.weight_score


def test_heads_that_come_later_are_on_the_device() -> None:
    wsn = wrapped(materialize(on_meta(), "cpu"))
    wsn.begin_task(0)
    assert wsn.model.head.head(0).weight.device.type == "cpu"


def test_what_was_loaded_stays_as_it_is() -> None:
    dense, model = Net().double(), on_meta()
    state = {name: t for name, t in dense.state_dict().items() if not name.startswith("head")}
    missing, unexpected = model.load_state_dict(state, strict=False, assign=True)
    materialize(model, "cpu")
    assert unexpected == []
    assert all(name.endswith(("_score", "_masks", "_tasks", "_extra_state")) for name in missing)
    assert model.first.weight.data_ptr() == dense.first.weight.data_ptr()
    assert model.first.weight_score.dtype is torch.float64


def test_trainability_is_kept() -> None:
    model = on_meta()
    model.first.weight.requires_grad_(False)
    materialize(model, "cpu")
    assert [model.first.weight.requires_grad, model.first.weight_score.requires_grad] == [False, True]


def test_a_model_that_has_its_memory_is_left_alone() -> None:
    model = convert(Net(), 0.5)
    before = {name: (id(t), t.clone()) for name, t in model.named_parameters()}
    assert materialize(model, "cpu") is model
    assert all(id(t) == before[n][0] and torch.equal(t, before[n][1]) for n, t in model.named_parameters())


def test_a_checkpoint_of_finished_tasks_is_taken_over_and_goes_on() -> None:
    def net() -> nn.Module:
        return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))

    real = trained(trained(WSN(convert(net(), 0.5, heads="2")), 0), 1)
    with torch.device("meta"):
        wsn = WSN(convert(net(), 0.5, heads="2"))
    wsn.load_state_dict(real.state_dict(), assign=True)
    materialize(wsn, "cpu")
    assert torch.equal(logits(wsn, 0), logits(real, 0))
    trained(wsn.train(), 2).verify()


# --- to_empty
def test_to_empty_draws_the_scores() -> None:
    layer = FastSubnetLinear(6, 8, device="meta").to_empty(device="cpu")
    assert 0 < layer.weight_score.abs().max() <= 6**-0.5
    assert 0 < layer.bias_score.abs().max() <= 6**-0.5


def test_weights_that_were_not_loaded_after_to_empty_are_refused() -> None:
    wsn = wrapped(on_meta().to_empty(device="cpu"))
    wsn.model.reset_parameters()
    with pytest.raises(RuntimeError, match=r"first\.weight has NaN"):
        wsn.begin_task(0)
    assert wsn.current_task is None


@pytest.mark.filterwarnings("error")
def test_after_to_empty_a_dense_state_is_all_that_is_needed() -> None:
    model = on_meta().to_empty(device="cpu")
    state = {name: t for name, t in Net().state_dict().items() if not name.startswith("head")}
    model.load_state_dict(state, strict=False)
    trained(wrapped(model), 0).verify()


def test_a_model_that_leaves_memory_and_comes_back_is_not_taken_for_initialised() -> None:
    wsn = wrapped(convert(Net(), 0.5, heads="head"))
    with torch.no_grad():
        wsn.to("meta").to_empty(device="cpu")
    with pytest.raises(RuntimeError, match="has NaN"):
        wsn.begin_task(0)


# --- refused
def test_a_task_on_meta_is_refused() -> None:
    with pytest.raises(RuntimeError, match=r"scale is on the meta device: wsn_fast\.materialize"):
        wrapped(on_meta()).begin_task(0)


def test_scores_on_meta_beside_loaded_weights_are_refused() -> None:
    wsn = WSN(FastSubnetLinear(6, 8, device="meta"))
    wsn.model.load_state_dict(nn.Linear(6, 8).state_dict(), strict=False, assign=True)
    with pytest.raises(RuntimeError, match=r"weight_score is on the meta device"):
        wsn.begin_task(0)


@pytest.mark.parametrize(("make", "names"), [
    (lambda: nn.Sequential(nn.Linear(6, 8, device="meta")).load_state_dict, ["0.bias"]),
    (lambda: nn.ParameterList([torch.empty(3, device="meta")]).load_state_dict, ["0"]),
    (lambda: trained(WSN(convert(nn.Sequential(nn.Linear(6, 8)), 0.5)), 0).to("meta").load_state_dict,
     ["model.0.weight_masks", "model.0.bias_masks"]),
])  # fmt: skip
def test_what_can_only_be_loaded_is_named_and_nothing_is_changed(make: object, names: list[str]) -> None:
    load = make()  # type: ignore[operator]
    model = load.__self__
    load({"0.weight": torch.ones(8, 6)} if isinstance(model, nn.Sequential) else {}, strict=False, assign=True)
    with pytest.raises(ValueError, match=rf"have no memory yet: {re.escape(str(names))}\. Load them first"):
        materialize(model, "cpu")
    assert {t.device.type for n, t in model.named_parameters() if n != "0.weight"} == {"meta"}


def test_bad_arguments_are_named() -> None:
    with pytest.raises(TypeError, match="model must be"):
        materialize("model", "cpu")  # type: ignore[type-var]
    with pytest.raises(ValueError, match="device must be"):
        materialize(TaskHeads(2, 3), "meta")


# --- nothing twice: the peak of a process of its own, as the kernel counts it
_SCRIPT = """
import json, sys, torch
from pathlib import Path
from torch import nn
from wsn_fast import convert, materialize

def resident(what):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(what))

def net(width):
    return nn.Sequential(nn.Linear(width, width), nn.Linear(width, width))

def empty(width):
    with torch.device("meta"):
        return convert(net(width), 0.5)

def loaded(width):
    model = empty(width)
    model.load_state_dict(torch.load(sys.argv[2], mmap=True), strict=False, assign=True)
    return materialize(model, "cpu")

torch.set_num_threads(1)
torch.save(net(2048).state_dict(), sys.argv[2])
ways = {"convert": lambda model: convert(model, 0.5), "from scratch": lambda width: materialize(empty(width), "cpu"),
        "loaded": loaded}
way = ways[sys.argv[1]]
arguments = [net(8), net(2048)] if sys.argv[1] == "convert" else [8, 2048]
(ways["from scratch"] if sys.argv[1] == "loaded" else way)(arguments[0])  # so that all code is there
before = resident("VmRSS")
Path("/proc/self/clear_refs").write_text("5")
model = way(arguments[1])
weights = 2 * 4 * 2048 * 2048
print(json.dumps((resident("VmHWM") - before) / weights))
"""


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="the kernel does not count here")
@pytest.mark.parametrize(
    ("way", "copies"),
    [
        pytest.param("convert", 1, marks=pytest.mark.ci),  # scores
        ("from scratch", 2),  # weights and scores
        pytest.param("loaded", 1, marks=pytest.mark.ci),  # scores beside a mapped file
    ],
)
def test_nothing_is_there_twice(way: str, copies: int, tmp_path: Path) -> None:
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(64 << 10), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", _SCRIPT, way, str(tmp_path / "weights.pt")],
        capture_output=True, text=True, env=environment, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == pytest.approx(copies, abs=0.25)
