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
    strategy = strategy_of(model(), optimizer)
    assert kept(strategy, labelled().train_stream)
    assert strategy.model.tasks == [0, 1, 2]


@pytest.mark.parametrize("verify", [True, False])
def test_finished_tasks_are_verified_after_each_experience_unless_one_asks_for_none(
    verify: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[list[int]] = []
    monkeypatch.setattr(WSN, "verify", lambda wsn: seen.append(list(wsn.tasks)))
    strategy_of(model(), plugins=[WSNPlugin(verify=verify)]).train(labelled().train_stream[:2])
    assert seen == ([[0], [0, 1]] if verify else [])


def test_a_task_that_reads_past_its_mask_is_found_when_it_ends() -> None:
    class Reads(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + self.held[0].detach().sum()

    net = convert(Reads(nn.Linear(INPUTS, 16), nn.ReLU(), nn.Linear(16, 3)), density=0.4, heads="2")
    net.held = [net[0].weight]
    strategy = strategy_of(WSN(net))
    with pytest.raises(UnmaskedReadError, match=r"0\.weight"):
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


class Breaks(SupervisedPlugin):
    """Raises an error once, at a backward pass of the second experience or in an evaluation."""

    def __init__(self, moment: str) -> None:
        super().__init__()
        self.moment = moment

    def after_backward(self, strategy: Any, **kwargs: Any) -> None:
        if (self.moment, strategy.clock.train_exp_counter, strategy.clock.train_exp_iterations) == ("training", 1, 2):
            self._break(strategy)

    def after_eval_forward(self, strategy: Any, **kwargs: Any) -> None:
        if self.moment == "evaluation":
            self._break(strategy)

    def _break(self, strategy: Any) -> None:
        strategy.plugins.remove(self)
        raise ConnectionError("the data are gone")


def interrupted() -> Any:
    """A strategy whose second experience was interrupted."""
    strategy, stream = strategy_of(model(), plugins=[Breaks("training")]), labelled().train_stream
    strategy.train(stream[0], eval_streams=[])
    with pytest.raises(ConnectionError):
        strategy.train(stream[1], eval_streams=[])
    assert strategy.model.current_task == 1
    return strategy


def goes_on(strategy: Any) -> bool:
    """Train the second experience. Does the first task compute what it did, to the bit?"""
    before = logits(strategy.model, 0)
    strategy.train(labelled().train_stream[1])
    return strategy.model.tasks == [0, 1] and torch.equal(logits(strategy.model, 0), before)


def test_a_training_that_an_exception_ended_goes_on() -> None:
    assert goes_on(interrupted())


def test_a_training_goes_on_while_a_finished_task_is_in_use() -> None:
    strategy = interrupted()
    strategy.model.use_task(0)
    assert goes_on(strategy)


def test_a_training_goes_on_after_an_evaluation_that_an_exception_ended() -> None:
    class Evaluates(SupervisedPlugin):
        def after_training_epoch(self, strategy: Any, **kwargs: Any) -> None:
            strategy.eval(test)

    strategy, test = interrupted(), labelled().test_stream[0]
    strategy.plugins.append(Breaks("evaluation"))
    with pytest.raises(ConnectionError), strategy.model.use_task(0):
        strategy.eval(test)
    strategy.plugins.append(Evaluates())
    assert goes_on(strategy)


def test_a_task_begins_after_an_evaluation_that_an_exception_ended() -> None:
    strategy, benchmark = strategy_of(model()), labelled()
    strategy.train(benchmark.train_stream[0])
    strategy.plugins.append(Breaks("evaluation"))
    with pytest.raises(ConnectionError):
        strategy.eval(benchmark.test_stream[0])
    assert kept(strategy, benchmark.train_stream[1:])


def test_an_experience_that_comes_in_parts_is_one_task() -> None:
    stream = split_online_stream(labelled(2).train_stream, experience_size=24, access_task_boundaries=True)
    strategy = strategy_of(model(), train_epochs=1)
    for part in stream:
        strategy.train(part, eval_streams=[])
    assert strategy.model.tasks == [0, 1]
