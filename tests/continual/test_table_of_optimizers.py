"""The table of optimizers in docs/how-to/own-optimizer.md: each row is tried, and says what happens."""

from __future__ import annotations

import copy
import importlib.util
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import foreign_optimizers as foreign
import pytest
import torch
import torch.nn.functional as F
from small_models import batches, logits, mlp, run_tasks
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn

from wsn_fast import WSN, ForgottenError
from wsn_fast.optim import SubnetAdamW, SubnetSGD, averaging

PAGE = Path(__file__).parents[2] / "docs" / "how-to" / "own-optimizer.md"
KEPT = "are kept"
FOUND = "are kept, or `end_task` raises `ForgottenError`"
REFUSED = "`wsn.guard` raises `TypeError`"

Make = Callable[[WSN], Any]


def table() -> dict[str, str]:
    section = PAGE.read_text("utf-8").partition("## Which optimizers keep finished tasks")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| (.+?) \| (.+?) \|$", section, re.MULTILINE)
    assert rows[0] == ("optimizer", "finished tasks")
    return dict(rows[1:])


def trained(wsn: WSN) -> list[torch.nn.Parameter]:
    return [p for p in wsn.parameters() if p.requires_grad]


def adamw(wsn: WSN) -> torch.optim.Optimizer:
    return torch.optim.AdamW(trained(wsn), 0.01)


def of_torch(kind: type[torch.optim.Optimizer]) -> Make:
    def make(wsn: WSN) -> torch.optim.Optimizer:
        params = [p for p in wsn.parameters() if p.ndim == 2] if kind is torch.optim.Muon else list(wsn.parameters())
        settings: dict[str, Any] = {"weight_decay": 0.1}
        if kind is torch.optim.Rprop:
            settings = {}
        return wsn.guard(kind(params, lr=0.05, **settings))  # type: ignore[call-arg]

    return make


CLASSES = [kind for kind in vars(torch.optim).values() if isinstance(kind, type)
           and issubclass(kind, torch.optim.Optimizer) and kind is not torch.optim.Optimizer]  # fmt: skip
FIRST_ORDER = [kind for kind in CLASSES if kind not in (torch.optim.LBFGS, torch.optim.SparseAdam)]


def with_hooks(wsn: WSN) -> torch.optim.Optimizer:
    optimizer = wsn.guard(adamw(wsn))
    for register in (optimizer.register_step_pre_hook, optimizer.register_step_post_hook):
        register(lambda opt, *_: foreign.decay(foreign.every(opt)))
    return optimizer


def compiled(wsn: WSN) -> Any:
    optimizer = wsn.guard(adamw(wsn))
    step = torch.compile(optimizer.step, backend="eager")
    optimizer.step = step  # type: ignore[method-assign]
    return optimizer


def zero(wsn: WSN) -> Any:
    from torch.distributed.optim import ZeroRedundancyOptimizer

    return wsn.guard(ZeroRedundancyOptimizer(wsn.parameters(), torch.optim.AdamW, lr=0.01))


def accelerated(wsn: WSN) -> Any:
    """Accelerate's optimizer, or where that is not installed an object like it."""
    if importlib.util.find_spec("accelerate") is None:
        return wsn.guard(foreign.LookaheadOptimizer(adamw(wsn)))
    from accelerate import Accelerator

    return wsn.guard(Accelerator(cpu=True).prepare(adamw(wsn)))


class Averages:
    """An optimizer after whose steps weights are averaged; ``finish`` puts the averages into the model."""

    def __init__(self, wsn: WSN, **functions: Any) -> None:
        self.wsn, self.optimizer = wsn, wsn.guard(adamw(wsn))
        self.averaged = AveragedModel(wsn, **functions)
        self.zero_grad = self.optimizer.zero_grad

    def step(self) -> None:
        self.optimizer.step()
        self.averaged.update_parameters(self.wsn)

    @torch.no_grad()
    def finish(self) -> None:
        for param, mean in zip(self.wsn.parameters(), self.averaged.module.parameters(), strict=True):
            param.copy_(mean)


def unpickled(wsn: WSN) -> torch.optim.Optimizer:
    """It has the parameters of the model again, as a resumed program gives them to it."""
    optimizer = pickle.loads(pickle.dumps(wsn.guard(adamw(wsn))))
    for group, params in zip(optimizer.param_groups, [trained(wsn)], strict=True):
        group["params"] = params
    return optimizer


ROWS: dict[str, dict[str, Make]] = {
    "every class of `torch.optim`, except LBFGS": {kind.__name__: of_torch(kind) for kind in FIRST_ORDER},
    "`SubnetAdamW` and `SubnetSGD`, in both modes": {
        f"{kind.__name__}, one_pass={one_pass}": lambda wsn, kind=kind, one_pass=one_pass: kind(
            wsn, 0.05, weight_decay=0.1, one_pass=one_pass
        )
        for kind in (SubnetAdamW, SubnetSGD)
        for one_pass in (True, False)
    },
    "a subclass that writes before or after the step of its parent": {
        kind.__name__: lambda wsn, kind=kind: wsn.guard(kind(wsn.parameters()))
        for kind in (foreign.DecaysAfter, foreign.DecaysBefore, foreign.DecaysTwice)
    },
    "Muon and programs like it, which give parameters without a gradient a zero one": {
        "MuonLike": lambda wsn: wsn.guard(foreign.MuonLike(wsn.parameters()))
    },
    "an optimizer that writes through `.data`, or to parameters without a gradient": {
        kind.__name__: lambda wsn, kind=kind: wsn.guard(kind(wsn.parameters()))
        for kind in (foreign.DecaysAll, foreign.FlatBuffer)
    },
    "SAM, with a closure or with `first_step` and `second_step`": {
        "SAM": lambda wsn: wsn.guard(foreign.SAM(wsn.parameters()))
    },
    "Lookahead and other wrappers, with or without the hooks of PyTorch": {
        kind.__name__: lambda wsn, kind=kind: wsn.guard(kind(adamw(wsn)))
        for kind in (foreign.Lookahead, foreign.LookaheadOptimizer, foreign.LookaheadWithHooks, foreign.Delegate)
    },
    "schedule-free, whose `train()` and `eval()` write too": {
        "ScheduleFree": lambda wsn: wsn.guard(foreign.ScheduleFree(wsn.parameters()))
    },
    "an optimizer that delegates to several others": {
        "Several": lambda wsn: wsn.guard(foreign.Several(list(wsn.parameters())))
    },
    "`ZeroRedundancyOptimizer`": {"ZeRO": zero},
    "the optimizer that accelerate's `prepare` returns": {"accelerate": accelerated},
    "an optimizer with your hooks before or after the step": {"hooks": with_hooks},
    "an optimizer whose step `torch.compile` has compiled": {"compiled": compiled},
    "EMA or SWA of weights, with [`averaging`](averages.md)": {
        "EMA": lambda wsn: Averages(wsn, multi_avg_fn=averaging(wsn, get_ema_avg_fn(0.9))),
        "SWA": lambda wsn: Averages(wsn, multi_avg_fn=averaging(wsn)),
    },
    "EMA or SWA of weights, without it": {
        "EMA": lambda wsn: Averages(wsn, avg_fn=get_ema_avg_fn(0.9)),
        "SWA": lambda wsn: Averages(wsn),
    },
    "a copied or unpickled optimizer that was not guarded again": {
        "copied": lambda wsn: copy.copy(wsn.guard(adamw(wsn))),
        "unpickled": unpickled,
    },
    "no guard at all": {"AdamW": adamw, "SGD": lambda wsn: torch.optim.SGD(trained(wsn), 0.05)},
    "LBFGS": {"LBFGS": lambda wsn: wsn.guard(torch.optim.LBFGS(wsn.parameters()))},
}


def test_the_table_has_these_rows() -> None:
    assert table().keys() == ROWS.keys()
    assert set(table().values()) == {KEPT, FOUND, REFUSED}
    assert [row for row, result in table().items() if result == REFUSED] == ["LBFGS"]


def step(wsn: WSN, optimizer: Any, x: torch.Tensor, y: torch.Tensor) -> None:
    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(wsn(x), y)
        loss.backward()
        return loss

    if isinstance(optimizer, foreign.SAM):
        optimizer.step(closure)
    else:
        closure()
        optimizer.step()


@pytest.fixture
def process_group() -> Any:
    """One process, for ZeRO."""
    import torch.distributed as dist

    store = dist.HashStore()
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.filterwarnings("ignore:Profiler record function", "ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize(("row", "name"), [(row, name) for row in ROWS for name in ROWS[row]])
def test_a_row(row: str, name: str, request: pytest.FixtureRequest) -> None:
    if name == "ZeRO":
        request.getfixturevalue("process_group")
    wsn, make, result = WSN(mlp()), ROWS[row][name], table()[row]
    run_tasks(wsn, [0], lambda p: torch.optim.AdamW(p, 0.01))
    before = logits(wsn, 0)
    wsn.begin_task(1)
    wsn.train()
    if result == REFUSED:
        with pytest.raises(TypeError):
            make(wsn)
        return
    optimizer, scores = make(wsn), wsn.model[1].weight_score.detach().clone()
    for x, y in batches(1, 3):
        step(wsn, optimizer, x, y)
    getattr(optimizer, "eval", lambda: None)()
    getattr(optimizer, "finish", lambda: None)()
    assert not torch.equal(wsn.model[1].weight_score, scores), "the optimizer did train"
    try:
        wsn.end_task()
    except ForgottenError:
        assert result == FOUND
        return
    assert torch.equal(logits(wsn, 0), before)
    wsn.verify()


COPIED = "a copied or unpickled optimizer that was not guarded again"


@pytest.mark.parametrize(("row", "name"), [
    ("EMA or SWA of weights, without it", "EMA"), ("no guard at all", "AdamW"),
    (COPIED, "copied"), (COPIED, "unpickled"),
])  # fmt: skip
def test_what_may_be_found_is_found(row: str, name: str) -> None:
    """Of the rows that may go either way, these do change what a finished task uses."""
    wsn = WSN(mlp())
    run_tasks(wsn, [0], lambda p: torch.optim.AdamW(p, 0.01))
    wsn.begin_task(1)
    optimizer = ROWS[row][name](wsn)
    for x, y in batches(1, 3):
        step(wsn, optimizer, x, y)
    getattr(optimizer, "finish", lambda: None)()
    with pytest.raises(ForgottenError):
        wsn.end_task()
