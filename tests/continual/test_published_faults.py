"""Each fault of the published WSN programs, as a test that fails on the faulty behaviour. One test per fault."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from small_models import batches, convnet, logits, mlp, run_tasks, train
from torch import nn

from wsn_fast import WSN, FastSubnetLinear, convert
from wsn_fast.continual import statistics
from wsn_fast.train.command_line import main
from wsn_fast.train.nets import build


def sgd(params: object) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, 0.1)  # type: ignore[arg-type]


def test_the_gates_backward_returns_gradients() -> None:
    """CLArena: its gate's backward has no return, so the first step raises."""
    wsn = WSN(mlp())
    wsn.begin_task(0)
    x, y = batches(0, 1)[0]
    F.cross_entropy(wsn(x), y).backward()
    assert all(gate.score.grad is not None for layer in wsn.subnet_layers().values() for gate in layer.gated())


def test_the_mask_is_taken_after_the_best_epoch_is_restored() -> None:
    """The paper's code stores the mask of the last batch."""
    wsn = WSN(mlp())
    wsn.begin_task(0)
    best = wsn.trainable_state()
    at_best = wsn.model[1].masks_of_scores()["weight"]
    train(wsn, wsn.guard(torch.optim.Adam(wsn.parameters(), 0.01)), batches(0, 20))
    assert not torch.equal(wsn.model[1].masks_of_scores()["weight"], at_best)
    wsn.load_trainable_state(best)
    wsn.end_task()
    assert torch.equal(wsn.model[1].mask("weight", 0), at_best)


def test_stored_masks_hold_no_graph_and_can_be_deep_copied() -> None:
    """CLArena stores masks that require grad: graphs stay alive and deepcopy raises."""
    wsn = WSN(mlp())
    run_tasks(wsn, [0], sgd)
    assert not any(b.requires_grad or b.grad_fn for b in wsn.buffers())
    copy.deepcopy(wsn).verify()


def test_masks_are_in_the_state_dict() -> None:
    """Both programs keep masks in a Python dict, so that a checkpoint loses them."""
    wsn = WSN(mlp())
    run_tasks(wsn, [0], sgd)
    fresh = WSN(mlp())
    fresh.load_state_dict(wsn.state_dict())
    assert torch.equal(logits(fresh, 0), logits(wsn, 0))


@pytest.mark.parametrize("first", [0, 2, -1, "birds"])
def test_the_first_task_may_have_any_name(first: int | str) -> None:
    """CLArena raises KeyError when the first task is not 1."""
    wsn = WSN(mlp())
    wsn.begin_task(first)
    train(wsn, wsn.guard(sgd(wsn.parameters())), batches(0, 2))
    wsn.end_task()
    assert wsn.tasks == [first]


def test_an_unknown_score_init_mode_is_an_error() -> None:
    """CLArena accepts any mode and leaves the scores as they were."""
    with pytest.raises(ValueError, match="score_init must be one of"):
        convert(nn.Sequential(nn.Linear(3, 3)), score_init="xavier")


def test_nothing_is_printed(capfd: pytest.CaptureFixture[str]) -> None:
    """CLArena prints masks at the end of each task."""
    wsn = WSN(convnet())
    run_tasks(wsn, [0, 1], sgd)
    wsn.verify()
    assert capfd.readouterr() == ("", "")


def test_the_learning_rate_falls_when_validation_stalls(tmp_path: Path) -> None:
    """The published schedulers are built and never stepped."""
    flags = "--tasks 1 --epochs 6 --lr 0.3 --lr-patience 1 --batch-size 256 --quiet --device cpu"
    assert main(["train", "permuted", *flags.split(), "--out", str(tmp_path / "run")]) == 0
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    epochs = [entry for entry in map(json.loads, lines) if entry["kind"] == "epoch"]
    best, expected = float("inf"), 0.3
    for entry in epochs:
        assert entry["lr"] == pytest.approx(expected)
        expected = expected if entry["val_loss"] < best else expected / 2
        best = min(best, entry["val_loss"])
    assert expected < 0.3, "the case does stall"


def test_predictions_do_not_depend_on_the_batch_through_batch_norm() -> None:
    """The paper's ResNet normalises with the test batch's statistics: 18.8 % of predictions changed with batch size."""
    wsn = WSN(convert(build("resnet18", (1, 16, 16), 3), 0.5, heads={"head": [0]})).double()
    wsn.begin_task(0)
    x = torch.randn(12, 1, 16, 16, dtype=torch.float64)
    wsn(x)
    wsn.end_task()
    wsn.eval()
    with torch.no_grad(), wsn.use_task(0):
        torch.testing.assert_close(torch.cat([wsn(x[:5]), wsn(x[5:])]), wsn(x), rtol=1e-9, atol=1e-9)


def test_capacity_follows_the_papers_formula() -> None:
    """Neither program computes it: one reports the union alone."""
    wsn = WSN(mlp())
    run_tasks(wsn, [0, 1], sgd)
    capacity = wsn.capacity()
    assert capacity.capacity == pytest.approx(capacity.union_density + (1 - capacity.compression) * 2 / 32)
    assert capacity.capacity > capacity.union_density


def test_compression_is_measured_for_the_masks_at_hand() -> None:
    """The paper takes 0.78 for every density; masks of half density do not compress at all."""
    rates = []
    for density in (0.03, 0.5):
        wsn = WSN(nn.Sequential(FastSubnetLinear(400, 300, bias=False, density=density)))
        wsn.begin_task(0)
        wsn.end_task()
        rates.append(wsn.capacity().compression)
    assert rates[0] > 0.7
    assert abs(rates[1]) < 0.01


def test_sizes_are_those_of_the_bytes_stored() -> None:
    """The published script measures ``sys.getsizeof`` of Python objects."""
    random, empty = torch.randint(256, (1, 5000), dtype=torch.uint8), torch.zeros(1, 5000, dtype=torch.uint8)
    assert statistics.compression_rate([empty]) == pytest.approx(1 - len(statistics.compress(empty[0])) / 5000)
    assert statistics.compression_rate([empty, random]) == pytest.approx(
        statistics.compression_rate([empty]) / 2, abs=1e-3
    )
