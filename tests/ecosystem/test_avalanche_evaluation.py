"""Evaluation, other plugins and refusals of the plugin for Avalanche; ``.ci/ecosystem`` runs this."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from wsn_fast import WSN, TaskHeads, convert

if find_spec("avalanche") is None:
    pytest.skip('needs Avalanche: pip install "wsn-fast[avalanche]"', allow_module_level=True)

import quiet_avalanche  # noqa: F401 - first of all
from avalanche.benchmarks import benchmark_from_datasets, with_task_labels
from avalanche.benchmarks.utils import as_classification_dataset
from avalanche.benchmarks.utils.data_attribute import TaskLabels
from avalanche.core import SupervisedPlugin
from avalanche.models import IncrementalClassifier, MTSimpleMLP
from avalanche.training import Cumulative
from avalanche.training.plugins import EarlyStoppingPlugin, ReplayPlugin
from avalanche_problem import INPUTS, TASKS, kept, labelled, logits, model, plain, strategy_of, tensors

from wsn_fast.integrations.avalanche import WSNPlugin

pytestmark = [pytest.mark.ecosystem, pytest.mark.filterwarnings("default", "error:::wsn_fast")]


class Records(SupervisedPlugin):
    """Keeps the task labels of the training batches, and the outputs of an evaluation by experience."""

    def __init__(self) -> None:
        super().__init__()
        self.labels: set[int] = set()
        self.outputs: dict[int, Tensor] = {}

    def before_forward(self, strategy: Any, **kwargs: Any) -> None:
        self.labels |= {*strategy.mb_task_id.tolist()}

    def after_eval_iteration(self, strategy: Any, **kwargs: Any) -> None:
        number = strategy.experience.current_experience
        self.outputs[number] = torch.cat([self.outputs.get(number, torch.empty(0)), strategy.mb_output])


@torch.no_grad()
def computed(wsn: WSN, task: int | None, x: Tensor) -> Tensor:
    with wsn.use_task(task):
        return torch.cat([wsn.eval()(part) for part in x.split(16)])


# --- evaluation --------------------------------------------------------------------------------------------------
def test_a_finished_task_is_evaluated_with_its_mask() -> None:
    records, benchmark = Records(), labelled()
    strategy = strategy_of(model(), plugins=[records])
    for experience in benchmark.train_stream:
        strategy.train(experience, eval_streams=[])
    strategy.eval(benchmark.test_stream)
    for task in range(TASKS):
        assert torch.equal(records.outputs[task], computed(strategy.model, task, tensors(task, seed=5).tensors[0]))


def test_the_task_in_progress_is_evaluated_with_its_current_scores() -> None:
    class Looks(SupervisedPlugin):
        def after_training_epoch(self, strategy: Any, **kwargs: Any) -> None:
            records.outputs.clear()
            strategy.eval(benchmark.test_stream[:2])
            x = tensors(1, seed=5).tensors[0]
            seen.append(torch.equal(records.outputs[1], computed(strategy.model, 1, x)))
            strategy.model.train()

    records, seen, benchmark = Records(), [], labelled()
    strategy = strategy_of(model(), plugins=[records])
    strategy.train(benchmark.train_stream[0])
    strategy.plugins.insert(0, Looks())
    strategy.train(benchmark.train_stream[1])
    assert seen == [True, True]


def test_tasks_that_have_not_begun_are_evaluated_with_the_heads_that_they_begin_with() -> None:
    strategy, benchmark = strategy_of(model()), labelled()
    strategy.eval(benchmark.test_stream)
    assert (strategy.model.tasks, list(strategy.model.heads)) == ([], [0, 1, 2])
    head = strategy.model.heads[2]
    for experience in benchmark.train_stream:
        strategy.train(experience)
        strategy.eval(benchmark.test_stream)
    assert strategy.model.heads[2] is head
    assert strategy.model.tasks == [0, 1, 2]


def test_an_evaluation_leaves_what_was_in_use() -> None:
    strategy, benchmark = strategy_of(model()), labelled()
    strategy.train(benchmark.train_stream[:2])
    before = logits(strategy.model, 0)
    with strategy.model.use_task(0):
        strategy.eval(benchmark.test_stream)
        with torch.no_grad():
            assert torch.equal(strategy.model.eval()(tensors(0, 9, seed=7).tensors[0]), before)


def with_labels(data: list[Any], labels: list[list[int]]) -> Any:
    """A stream of experiences whose rows have these task labels."""
    made = [
        as_classification_dataset(dataset).update_data_attribute("targets_task_labels", TaskLabels(own))
        for dataset, own in zip(data, labels, strict=True)
    ]
    return with_task_labels(benchmark_from_datasets(train=made)).train_stream


def mixed(*labels: int) -> Any:
    """A stream of one experience, whose rows have these task labels in turn, 16 each."""
    data = tensors(0, 16 * len(labels), seed=8)
    return with_labels([data], [[*labels] * 16])


@pytest.mark.parametrize("labels", [(0, 1), (1, 0, 2)], ids=["finished", "one has not begun"])
def test_each_row_of_a_mixed_batch_is_computed_as_its_own_task(labels: tuple[int, ...]) -> None:
    records = Records()
    strategy = strategy_of(model(), plugins=[records])
    strategy.train(labelled().train_stream[:2])
    strategy.eval(mixed(*labels))
    x = tensors(0, 16 * len(labels), seed=8).tensors[0]
    for place, task in enumerate(labels[:2]):
        own = computed(strategy.model, task, x)
        torch.testing.assert_close(records.outputs[0][place :: len(labels)], own[place :: len(labels)])


# --- other plugins ---------------------------------------------------------------------------------------------------
def test_replayed_rows_of_finished_tasks_are_left_out() -> None:
    records, stream = Records(), labelled().train_stream
    strategy = strategy_of(model(), plugins=[ReplayPlugin(32), records])
    strategy.train(stream[0])
    with pytest.warns(UserWarning, match="task 1 is in progress, and rows of other tasks are left out") as found:
        records.labels.clear()
        assert kept(strategy, stream[1:2])
    assert records.labels == {1}
    assert sum("left out" in str(one.message) for one in found) == 1


@pytest.mark.filterwarnings("ignore:.*are left out:UserWarning")
def test_a_strategy_that_trains_all_data_so_far_keeps_finished_tasks() -> None:
    records = Records()
    strategy = strategy_of(model(), plugins=[records], kind=Cumulative, criterion=nn.CrossEntropyLoss())
    assert kept(strategy, labelled().train_stream)
    assert records.labels == {0, 1, 2}


def test_replay_without_task_labels_keeps_finished_tasks() -> None:
    assert kept(strategy_of(model(), plugins=[ReplayPlugin(32)]), plain().train_stream)


@pytest.mark.parametrize("mode", ["epoch", "iteration"])
@pytest.mark.parametrize("optimizer", ["AdamW", "one pass"])
def test_the_mask_is_that_of_the_state_that_early_stopping_restored(optimizer: str, mode: str) -> None:
    stops, benchmark = EarlyStoppingPlugin(1, "test", peval_mode=mode), labelled()
    options = {"eval_every": 1, "peval_mode": mode, "train_epochs": 30}
    strategy = strategy_of(model(), optimizer, [stops], **options)
    for task in range(2):
        strategy.train(benchmark.train_stream[task], eval_streams=[benchmark.test_stream[task : task + 1]])
        layer = strategy.model.subnet_layers()["0"]
        assert strategy.clock.train_exp_epochs < 29
        assert torch.equal(layer.mask("weight", task), layer.masks_of_scores()["weight"])
        if mode == "epoch":  # the other mode makes one more step after it has restored the state
            assert torch.equal(layer.weight_score, stops.best_state["model.0.weight_score"])
    strategy.model.verify()


# --- which task, and what is refused ---------------------------------------------------------------------------------
def test_experiences_without_labels_are_tasks_by_their_numbers() -> None:
    records, benchmark = Records(), plain()
    records.before_forward = lambda strategy, **kwargs: None
    strategy = strategy_of(model(), plugins=[records])
    assert kept(strategy, benchmark.train_stream)
    strategy.eval(benchmark.test_stream)
    x = tensors(1, seed=5).tensors[0]
    assert torch.equal(records.outputs[1][-len(x) :], computed(strategy.model, 1, x))


def with_label_0() -> Any:
    return with_labels([tensors(0), tensors(1)], [[0] * 64] * 2)


def test_experiences_of_one_label_are_tasks_by_number_where_one_asks_for_it() -> None:
    assert kept(strategy_of(model(), plugins=[WSNPlugin(by_number=True)]), with_label_0())


def test_an_experience_with_the_label_of_a_finished_task_is_refused() -> None:
    strategy = strategy_of(model())
    with pytest.raises(ValueError, match=r"task 0 has ended already: .* use WSNPlugin\(by_number=True\)"):
        strategy.train(with_label_0())
    assert (strategy.model.tasks, strategy.model.current_task) == ([0], None)


def test_an_experience_of_several_tasks_is_not_trained() -> None:
    with pytest.raises(ValueError, match=r"got one with the task labels \[0, 1\]"):
        strategy_of(model()).train(mixed(0, 1))


def test_a_batch_without_a_row_of_the_task_is_refused() -> None:
    class Exchanges(SupervisedPlugin):
        def before_training_iteration(self, strategy: Any, **kwargs: Any) -> None:
            strategy.mbatch[-1].fill_(5)

    with pytest.raises(ValueError, match="must have rows of task 0, got rows of finished tasks only"):
        strategy_of(model(), plugins=[Exchanges()]).train(labelled().train_stream[0])


@pytest.mark.parametrize("call", ["train", "eval"])
@pytest.mark.parametrize("kind", ["a part that grows", "a model that takes task labels"])
def test_a_model_that_avalanche_changes_is_refused(kind: str, call: str) -> None:
    grows = nn.Sequential(convert(nn.Sequential(nn.Linear(INPUTS, 16)), density=0.4), IncrementalClassifier(16))
    net = grows if kind == "a part that grows" else convert(MTSimpleMLP(input_size=INPUTS), density=0.4)
    strategy = strategy_of(WSN(net, rest="shared"))
    before = strategy.model.state_dict()
    with pytest.raises(TypeError, match=r"must not be a (IncrementalClassifier|MTSimpleMLP)"):
        getattr(strategy, call)(labelled().train_stream[0])
    assert list(strategy.model.state_dict()) == list(before)


@pytest.mark.parametrize("found", [0, 2])
def test_a_model_must_contain_one_wsn(found: int) -> None:
    net = nn.ModuleList([*(model() for _ in range(found)), nn.Linear(2, 2)])
    with pytest.raises(ValueError, match=f"must contain one WSN, found {found}"):
        strategy_of(net).train(labelled().train_stream[0])


def test_a_model_may_have_the_wsn_as_a_part() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = WSN(
                nn.Sequential(convert(nn.Sequential(nn.Linear(INPUTS, 16)), density=0.4), TaskHeads(16, 3))
            )

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x / 2)

    strategy, benchmark = strategy_of(Net()), labelled()
    strategy.train(benchmark.train_stream)
    strategy.eval(benchmark.test_stream)
    assert strategy.model.inner.tasks == [0, 1, 2]


@pytest.mark.parametrize("name", ["by_number", "verify"])
def test_a_wrong_type_is_refused(name: str) -> None:
    with pytest.raises(TypeError, match=f"{name} must be True or False"):
        WSNPlugin(**{name: "yes"})
