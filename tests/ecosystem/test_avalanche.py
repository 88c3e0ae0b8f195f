"""The plugin for Avalanche, with Avalanche's own strategies and plugins; ``.ci/ecosystem`` runs this."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from wsn_fast import WSN, TaskHeads, UnmaskedReadError, convert

if find_spec("avalanche") is None:
    pytest.skip('needs Avalanche: pip install "wsn-fast[avalanche]"', allow_module_level=True)

import quiet_avalanche  # noqa: F401 - first of all
from avalanche.benchmarks import benchmark_from_datasets, task_incremental_benchmark
from avalanche.benchmarks.scenarios.online import split_online_stream
from avalanche.benchmarks.utils import as_classification_dataset
from avalanche.core import SupervisedPlugin
from avalanche.training import Naive
from avalanche.training.plugins import LRSchedulerPlugin
from avalanche_problem import INPUTS, OPTIMIZERS, kept, labelled, logits, model, strategy_of, tensors

from wsn_fast.integrations.avalanche import WSNPlugin

pytestmark = [pytest.mark.ecosystem, pytest.mark.filterwarnings("default", "error:::wsn_fast")]


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_finished_tasks_stay_to_the_bit(optimizer: str) -> None:
    strategy = strategy_of(model(), optimizer, [WSNPlugin(verify=True)])
    assert kept(strategy, labelled().train_stream)
    assert strategy.model.tasks == [0, 1, 2]


@pytest.mark.parametrize("verify", [True, False])
def test_tasks_are_verified_after_each_experience_where_one_asks_for_it(
    verify: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[list[int]] = []
    monkeypatch.setattr(WSN, "verify", lambda wsn: seen.append(list(wsn.tasks)))
    strategy_of(model(), plugins=[WSNPlugin(verify=verify)]).train(labelled().train_stream[:2])
    assert seen == ([[0], [0, 1]] if verify else [])


def test_a_task_that_reads_past_its_mask_is_found_when_it_ends() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.head = nn.Linear(INPUTS, 16), nn.Linear(INPUTS, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(torch.relu(self.layer(x)) @ self.layer.weight.detach())

    strategy = strategy_of(WSN(convert(Tied(), density=0.4, heads="head")))
    with pytest.raises(UnmaskedReadError, match=r"layer\.weight"):
        strategy.train(labelled().train_stream[0])
    assert strategy.model.current_task == 0


def test_a_task_learns() -> None:
    strategy = strategy_of(model(), train_epochs=15)
    strategy.train(labelled().train_stream[0])
    x, y = tensors(0).tensors
    with torch.no_grad(), strategy.model.use_task(0):
        assert (strategy.model.eval()(x).argmax(1) == y).float().mean() > 0.8


class Clips(SupervisedPlugin):
    def after_backward(self, strategy: Any, **kwargs: Any) -> None:
        optimizer = strategy.optimizer
        if getattr(optimizer, "one_pass", False):
            optimizer.clip_grad_norm_(0.1)
        else:
            nn.utils.clip_grad_norm_(strategy.model.parameters(), 0.1)


class InBFloat16(Naive):
    def forward(self) -> Any:
        with torch.autocast("cpu", torch.bfloat16):
            return super().forward().float()


@pytest.mark.parametrize(
    "options",
    [{"plugins": [Clips()]}, {"kind": InBFloat16}, {"eval_every": 1}, {"eval_every": 1, "peval_mode": "iteration"}],
    ids=["clip", "bf16", "evaluated", "evaluated between steps"],
)
@pytest.mark.parametrize("optimizer", ["AdamW", "one pass"])
def test_finished_tasks_stay_whatever_a_strategy_does(optimizer: str, options: dict[str, Any]) -> None:
    benchmark = labelled()
    assert kept(
        strategy_of(model(), optimizer, **options), benchmark.train_stream, eval_streams=[benchmark.test_stream]
    )


def test_the_learning_rate_is_scheduled() -> None:
    strategy = strategy_of(model())
    strategy.plugins.insert(0, LRSchedulerPlugin(torch.optim.lr_scheduler.StepLR(strategy.optimizer, 1, 0.5)))
    rates = []
    strategy.plugins.insert(0, type("Rates", (SupervisedPlugin,), {
        "before_training_epoch": lambda self, strategy, **kwargs: rates.append(strategy.optimizer.param_groups[0]["lr"])
    })())  # fmt: skip
    assert kept(strategy, labelled().train_stream[:2])
    assert rates == [0.02, 0.01, 0.02, 0.01]


def test_running_means_are_dropped_where_one_asks_for_it() -> None:
    strategy = strategy_of(model())
    assert kept(strategy, labelled().train_stream[:2], reset_optimizer_state=True)
    assert {int(state["step"]) for state in strategy.optimizer.state.values()} == {8}  # 64 rows, 2 epochs of 4 batches


def test_the_density_may_change_between_experiences() -> None:
    plugin, benchmark = WSNPlugin(density=0.1), labelled()
    strategy = strategy_of(model(), plugins=[plugin])
    strategy.train(benchmark.train_stream[0])
    plugin.density = 0.8
    strategy.train(benchmark.train_stream[1])
    assert [round(stats.density, 1) for stats in strategy.model.task_stats()] == [0.1, 0.8]


def test_heads_without_a_width_have_an_output_for_each_class() -> None:
    data = [as_classification_dataset(tensors(0)), as_classification_dataset(tensors(1, classes=2))]
    net = convert(nn.Sequential(nn.Linear(INPUTS, 16), nn.ReLU()), density=0.4)
    strategy = strategy_of(WSN(nn.Sequential(net, TaskHeads(16))))
    strategy.train(task_incremental_benchmark(benchmark_from_datasets(train=data)).train_stream)
    assert {task: head.out_features for task, head in strategy.model.heads.items()} == {0: 3, 1: 2}


def test_a_training_that_an_exception_ended_goes_on() -> None:
    class Breaks(Clips):
        def after_backward(self, strategy: Any, **kwargs: Any) -> None:
            if strategy.clock.train_exp_counter == 1 and strategy.clock.train_exp_iterations == 2:
                strategy.plugins.remove(self)
                raise ConnectionError("the data are gone")

    strategy, stream = strategy_of(model(), plugins=[Breaks()]), labelled().train_stream
    strategy.train(stream[0])
    before = logits(strategy.model, 0)
    with pytest.raises(ConnectionError):
        strategy.train(stream[1])
    assert strategy.model.current_task == 1
    with strategy.model.use_task(0):  # somebody looks at it, and it stays in use
        strategy.eval(stream[0])
    strategy.train(stream[1])
    assert strategy.model.tasks == [0, 1]
    assert torch.equal(logits(strategy.model, 0), before)


def test_an_evaluation_that_an_exception_ended_does_not_disturb_training() -> None:
    class Breaks(SupervisedPlugin):
        def after_eval_forward(self, strategy: Any, **kwargs: Any) -> None:
            raise ConnectionError("the data are gone")

    strategy, benchmark = strategy_of(model()), labelled()
    strategy.train(benchmark.train_stream[0])
    strategy.plugins.append(Breaks())
    with pytest.raises(ConnectionError):
        strategy.eval(benchmark.test_stream[0])
    strategy.plugins.pop()
    assert kept(strategy, benchmark.train_stream[1:])


def test_an_experience_that_comes_in_parts_is_one_task() -> None:
    stream = split_online_stream(labelled(2).train_stream, experience_size=24, access_task_boundaries=True)
    strategy = strategy_of(model(), train_epochs=1)
    for part in stream:
        strategy.train(part, eval_streams=[])
    assert strategy.model.tasks == [0, 1]
