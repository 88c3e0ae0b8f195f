"""What is done with a WSN that is cut into shards, beside training it: each case raises if something is wrong, or
returns what a test looks at."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
import torch.nn.functional as F
from ddp_training import across, adamw, all_equal, one_pass, part
from sharded_training import (
    BATCH,
    Transformer,
    logits,
    masks_of_one,
    mesh,
    sgd,
    subnet_adamw,
    transformer,
    uneven,
    whole,
    whole_masks,
)
from small_models import batches
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.utils.checkpoint import checkpoint

from wsn_fast import WSN, ForgottenError, UnmaskedReadError, convert, explain
from wsn_fast.backends import collectives
from wsn_fast.distributed import full_state_dict, load_full_state_dict, shard
from wsn_fast.nn.shards import local, shard_of
from wsn_fast.optim import averaging

Make = Callable[[], nn.Module]


def pair(make: Make = uneven, dtype: torch.dtype = torch.float64, **options: Any) -> tuple[WSN, WSN]:
    """A sharded WSN and one that is not, with the same values."""
    torch.manual_seed(1)
    wsn, single = (WSN(make().to(dtype)) for _ in range(2))
    single.load_state_dict(wsn.state_dict())
    return shard(wsn, mesh(), **options), single


def step(wsn: WSN, optimizer: torch.optim.Optimizer, task: int, of_all: bool = False, count: int = 1) -> None:
    wsn.train()
    for x, y in batches(task, count, BATCH):
        x = x.to(next(wsn.parameters()).dtype)
        optimizer.zero_grad()
        F.cross_entropy(wsn(x if of_all else part(x)), y if of_all else part(y)).backward()
        optimizer.step()


def train(wsn: WSN, tasks: int, optimizer: Callable[[WSN], torch.optim.Optimizer] = one_pass, first: int = 0) -> None:
    for task in range(first, first + tasks):
        wsn.begin_task(task)
        step(wsn, optimizer(wsn), task, count=3)
        wsn.end_task()


def check(condition: bool, message: str) -> None:
    if not condition:
        raise AssertionError(message)


# --- precision
def in_float32(rank: int) -> None:
    """From a common state one step gives the masks of a single process, and its values up to the order of sums."""
    wsn, single = pair(transformer, torch.float32)
    for one in (wsn, single):
        one.begin_task(0)
    for i in range(3):
        state = full_state_dict(wsn)
        box = [state]
        dist.broadcast_object_list(box, 0)
        single.load_state_dict(box[0])
        check(all_equal([whole_masks(wsn), masks_of_one(single)]), f"step {i}: other masks")
        mine, other = sgd(wsn), sgd(single)  # AdamW would make the sign of what is 0 but for rounding a whole step
        step(wsn, mine, i)
        step(single, other, i, of_all=True)
        theirs, found = dict(single.named_parameters()), whole(wsn)
        far = [name for name in theirs if not torch.allclose(found[name], theirs[name], rtol=1e-5, atol=1e-6)]
        check(len(far) == 0, f"step {i}: {far}")


def in_bfloat16(rank: int, reduce_dtype: torch.dtype) -> None:
    """What is gathered is in bfloat16; weights, scores and masks are in float32, and have the bits of a single process
    that makes the same update."""
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=reduce_dtype)
    wsn, single = pair(transformer, torch.float32, mp_policy=policy, groups=["blocks.0", "blocks.1"])
    wsn.begin_task(0)
    single.begin_task(0)
    seen: list[torch.dtype] = []
    wsn.model.enter.register_forward_pre_hook(lambda m, a: seen.append(m._parameters["weight"].dtype))
    wsn.model.enter.register_forward_hook(lambda m, a, y: seen.append(y.dtype))
    optimizer = one_pass(wsn)
    for i in range(3):
        step(wsn, optimizer, i)
        state = [full_state_dict(wsn)]
        dist.broadcast_object_list(state, 0)
        single.load_state_dict(state[0])
        check(all_equal([whole_masks(wsn), masks_of_one(single)]), f"step {i}: masks of other scores")
        layers = wsn.subnet_layers().values()
        kinds = {t.dtype for one in layers for g in one.gated() for t in (g.param, g.score)}
        check(kinds == {torch.float32}, str(kinds))
    check({*seen} == {torch.bfloat16}, str(seen))
    check(all_equal(across(whole(wsn))), "the processes differ")
    wsn.end_task()
    kept = logits_of(wsn, 0)
    train(wsn, 1, first=1)
    check(torch.equal(logits_of(wsn, 0), kept), "the logits of task 0 have changed")
    wsn.verify()


@torch.no_grad()
def logits_of(wsn: WSN, task: int) -> Tensor:
    wsn.eval()
    with wsn.use_task(task):
        return wsn(batches(99, 1, BATCH)[0][0].to(next(wsn.parameters()).dtype)).clone()


# --- what is sent
def on_the_wire(rank: int, policy: MixedPrecisionPolicy) -> float:
    """The bytes that a step of a sharded WSN sends, by those of a dense model under FSDP2."""
    width = 1024

    def net() -> nn.Sequential:
        torch.manual_seed(0)
        layers = (nn.Linear(width, width, bias=False), nn.ReLU(), nn.Linear(width, width, bias=False), nn.ReLU())
        return nn.Sequential(*layers, nn.Linear(width, 4))

    x, y = torch.randn(4, width), torch.randint(4, (4,))
    dense = net()
    for i in (0, 2):
        fully_shard(dense[i], mesh=mesh(), mp_policy=policy)
    fully_shard(dense, mesh=mesh(), mp_policy=policy)
    wsn = shard(WSN(convert(net(), density=0.3, heads="4")), mesh(), mp_policy=policy)
    wsn.begin_task(0)
    sums = []
    for model, optimizer in ((dense, torch.optim.SGD(dense.parameters(), 0.1)), (wsn, one_pass(wsn))):
        for _ in range(2):
            with wired() as sent:
                optimizer.zero_grad()
                F.cross_entropy(model(x).float(), y).backward()
                optimizer.step()
        sums.append(sum(sent))
    return sums[1] / sums[0]


@contextmanager
def wired() -> Iterator[list[int]]:
    """Count the bytes that this process sends to the others, if each collective sends the least that it has to."""
    sent: list[int] = []

    def counted(name: str, call: Any) -> Any:
        def collective(*args: Any, **kwargs: Any) -> Any:
            tensors = [*args, *kwargs.values()]
            tensors = [t for one in tensors for t in (one if isinstance(one, list) else [one]) if isinstance(t, Tensor)]
            largest = max(t.nbytes for t in tensors)
            rounds = 2 if name == "all_reduce" else 1
            sent.append(rounds * largest * (dist.get_world_size() - 1) // dist.get_world_size())
            return call(*args, **kwargs)

        return collective

    names = ("all_reduce", "all_gather_single", "reduce_scatter_single", "all_gather_into_tensor", "broadcast")
    names = (*names, "reduce_scatter_tensor", "all_gather")
    calls = {name: counted(name, getattr(dist, name)) for name in names if hasattr(dist, name)}
    with patch.multiple(dist, **calls):
        yield sent


# --- the life of tasks
def between_tasks(rank: int) -> None:
    """A finished task is shown in the middle of another one, and the processes go on with the current scores."""
    wsn, single = pair()
    for one, of_all in ((wsn, False), (single, True)):
        torch.manual_seed(3)
        one.begin_task(0)
        step(one, one_pass(one), 0, of_all, 2)
        one.end_task()
        one.begin_task(1)
        optimizer = one_pass(one)
        step(one, optimizer, 1, of_all)
        logits(one, 0)
        step(one, optimizer, 2, of_all)
    theirs = dict(single.named_parameters())
    far = [k for k, v in whole(wsn).items() if not torch.allclose(v, theirs[k], rtol=1e-9, atol=1e-11)]
    check(not far, str(far))


def rows_of_tasks(rank: int) -> None:
    """Each process has rows of other tasks, and the second one none of one task."""
    wsn, _ = pair()
    train(wsn, 3)
    wsn.eval()
    x = batches(50 + rank, 1, BATCH)[0][0].double()
    ids = [0, 2, 1, 2] * 3 if rank == 0 else [2, 1] * 6
    found, expected = wsn.forward_tasks(x, ids), torch.empty(BATCH, 3, dtype=torch.float64)
    for task in range(3):
        with torch.no_grad(), wsn.use_task(task):
            own = [i for i, one in enumerate(ids) if one == task]
            expected[own] = wsn(x)[own]
    check(torch.allclose(found, expected, rtol=1e-12), "other rows")
    check(wsn._view.task is None, "a finished task is still in use")


class Mixed(nn.Module):
    """Adds what the head of another task computes to the output, in one of two processes."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.only = uneven(), -1

    def forward(self, x: Tensor) -> Tensor:
        x = self.body[:-1](x)
        heads = self.body[-1]
        return heads(x) + (0.1 * heads.head(0)(x) if dist.get_rank() == self.only else 0)


def probed(rank: int) -> None:
    """A probe finds nothing in an honest model and leaves no trace, and finds what one process alone reads."""
    wsn, _ = pair(Mixed)
    x = batches(60 + rank, 1, BATCH)[0][0].double()
    for task in (0, 1):
        wsn.begin_task(task)
        step(wsn, one_pass(wsn), task, count=2)
        before = full_state_dict(wsn)
        wsn.model.only = 1
        found = found_by(wsn, x) if task else ""
        check(("6.heads.i0.weight" in found) == (task == 1), f"task {task}: {found}")
        check(all_equal([before, full_state_dict(wsn)]), "the probe has left a trace")
        wsn.model.only = -1
        wsn.end_task(probe=x)
    wsn.verify(probe=x)


def found_by(wsn: WSN, x: Tensor) -> str:
    try:
        wsn.end_task(probe=x)
    except UnmaskedReadError as error:
        return str(error)
    return ""


def averages(rank: int) -> None:
    """Averages of weights are those of a single process, and leave finished tasks as they are. An average of equal
    numbers is rounded here."""
    wsn, single = pair()
    for task in (0, 1):
        ends = []
        for one in (wsn, single):
            torch.manual_seed(task)
            one.begin_task(task)
            optimizer, average = one_pass(one), averaging(one, lambda mean, now, count: 0.7 * mean + 0.3 * now)
            mean = one.trainable_state()
            for i in range(3):
                step(one, optimizer, 10 * task + i, of_all=one is single)
                now = {n.removeprefix("model."): t for n, t in (*one.named_parameters(), *one.named_buffers())}
                average([*mean.values()], [now[name] for name in mean], i + 1)
            one.load_trainable_state(mean)
            ends.append(whole(one) if one is wsn else dict(one.named_parameters()))
            one.end_task()
        far = [name for name in ends[1] if not torch.allclose(ends[0][name], ends[1][name], rtol=1e-9, atol=1e-11)]
        check(not far, f"task {task}: other averages of {far}")
    wsn.verify()


def best_epoch(rank: int) -> None:
    wsn, _ = pair()
    wsn.begin_task(0)
    optimizer = one_pass(wsn)
    step(wsn, optimizer, 0)
    best, masks = wsn.trainable_state(), whole_masks(wsn)
    step(wsn, optimizer, 1, count=3)
    check(not all_equal([masks, whole_masks(wsn)]), "nothing was trained")
    wsn.load_trainable_state(best)
    wsn.end_task()
    stored = {n: one.whole_masks(g.masks)[0] for n, g in wsn.gated() if (one := shard_of(g.param))}
    from wsn_fast.ops import pack_mask

    check(all(torch.equal(stored[name], pack_mask(mask)) for name, mask in masks.items()), "masks of other scores")
    wsn.begin_task(1)
    step(wsn, one_pass(wsn), 1)
    with suppress(ValueError):
        wsn.load_trainable_state({**best, "0": torch.zeros(1)})
    with torch.no_grad():
        moved = {name: tensor.clone() for name, tensor in wsn.trainable_state().items()}
        if rank == 1:
            local(moved["1.weight"])[:] = 7
    try:
        wsn.load_trainable_state(moved)
    except ValueError as error:
        check("1.weight" in str(error), str(error))
    else:
        raise AssertionError("a state was loaded that changes frozen weights")


class Moves(torch.optim.SGD):
    """Writes to everything that it holds, after its step too."""

    def step(self, closure: Any = None) -> Any:
        result = super().step(closure)
        with torch.no_grad():
            for param in self.param_groups[0]["params"]:
                local(param).mul_(0.5)
        return result


def an_optimizer_that_moves_everything(rank: int) -> None:
    wsn, _ = pair()
    train(wsn, 1)
    kept = logits(wsn, 0)
    wsn.begin_task(1)
    optimizer = wsn.guard(Moves(wsn.parameters(), 0.1))
    step(wsn, optimizer, 1, count=2)
    wsn.end_task()
    wsn.verify()
    check(torch.equal(kept, logits(wsn, 0)), "the logits of task 0 have changed")


def a_written_weight(rank: int) -> str:
    """One process writes to a weight of a finished task: all of them say so."""
    wsn, _ = pair()
    train(wsn, 1)
    wsn.begin_task(1)
    step(wsn, one_pass(wsn), 1)
    gate = next(gate for name, gate in wsn.gated() if name == "1.weight")
    if rank == 0:
        local(gate.param).detach().add_(1)
    try:
        wsn.end_task()
    except ForgottenError as error:
        check(error.drifts[0].name == "1.weight", str(error))
    else:
        raise AssertionError("end_task was content")
    if rank == 0:
        local(gate.param).detach().sub_(1)
    try:
        wsn.verify()
    except ForgottenError as error:
        return error.drifts[0].name
    return ""


def a_written_head(rank: int) -> str:
    wsn, _ = pair()
    train(wsn, 1)
    with torch.no_grad():
        next(wsn.heads[0].parameters()).add_(rank)
    try:
        wsn.verify()
    except ForgottenError as error:
        return error.drifts[0].name
    return ""


def removal(rank: int) -> None:
    wsn, single = pair()
    for one, of_all in ((wsn, False), (single, True)):
        for task in range(3):
            torch.manual_seed(task)
            one.begin_task(task)
            step(one, one_pass(one), task, of_all, 2)
            one.end_task()
    kept = {task: logits(wsn, task) for task in (0, 2)}
    for one in (wsn, single):
        torch.manual_seed(7 + (rank if one is wsn else 0))
        one.remove_task(1)
    wsn.verify()
    for task, then in kept.items():
        check(torch.equal(then, logits(wsn, task)), f"the logits of task {task} have changed")
    theirs = dict(single.named_parameters())
    if rank == 0:
        far = [k for k, v in whole(wsn).items() if not torch.allclose(v, theirs[k], rtol=1e-9, atol=1e-11)]
        check(not far, f"other numbers were drawn: {far}")
    else:
        whole(wsn)
    train(wsn, 1, first=1)
    check(torch.equal(kept[0], logits(wsn, 0)), "the logits of task 0 have changed after another task")


def loading(rank: int) -> None:
    """A state of a single process is loaded, and training goes on; and a WSN with tasks is cut."""
    torch.manual_seed(5)
    single = WSN(uneven().double())
    for task in range(2):
        single.begin_task(task)
        step(single, one_pass(single), task, True, 2)
        single.end_task()
    state = single.state_dict()
    torch.manual_seed(6)
    wsn, cut = shard(WSN(uneven().double()), mesh()), WSN(uneven().double())
    load_full_state_dict(wsn, state)
    cut.load_state_dict(state)
    shard(cut, mesh())
    for one in (wsn, cut):
        check(one.tasks == [0, 1], str(one.tasks))
        one.verify()
        for task in range(2):
            check(torch.equal(logits(one, task), logits(single, task)), f"other logits of task {task}")
    again = full_state_dict(wsn)
    same = all(torch.equal(again[name], state[name]) for name in state) if rank == 0 else True
    check(same, "the state is another one")
    train(wsn, 1, first=2)
    wsn.verify()
    for task in range(2):
        check(torch.equal(logits(wsn, task), logits(single, task)), f"task {task} was forgotten")
    wrong = {**state, "model.1.weight": state["model.1.weight"][:3]}
    try:
        load_full_state_dict(wsn, wrong)
    except RuntimeError as error:
        check("model.1.weight" in str(error), str(error))
    else:
        raise AssertionError("a state of another shape was loaded")


class Checkpointed(Transformer):
    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x.flatten(1, 2))
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False)
        return self.head(x.mean(1))


def checkpointing(rank: int, reshard: bool) -> None:
    """Activation checkpointing changes no bit."""
    runs = []
    for kind in (Transformer, Checkpointed):
        torch.manual_seed(1)
        wsn = WSN(convert(kind().double(), density=0.4, heads="head"))
        shard(wsn, mesh(), groups=["blocks.0", "blocks.1"], reshard_after_forward=reshard)
        torch.manual_seed(2)
        for optimizer in (one_pass, subnet_adamw):
            train(wsn, 1, optimizer, first=len(wsn.tasks))
        runs.append(whole(wsn))
    check(all_equal(runs), "checkpointing changes the weights")


def autocast(rank: int) -> None:
    """Autocast around a WSN whose weights are gathered in float32."""
    wsn, _ = pair(transformer, torch.float32)
    wsn.begin_task(0)
    optimizer = one_pass(wsn)
    x, y = batches(0, 1, BATCH)[0]
    before = whole(wsn)
    with torch.autocast("cpu", torch.bfloat16):
        out = wsn(part(x))
        loss = F.cross_entropy(out.float(), part(y))
    loss.backward()
    optimizer.step()
    check(out.dtype is torch.bfloat16, str(out.dtype))
    check(not torch.equal(before["model.enter.weight"], whole(wsn)["model.enter.weight"]), "nothing was trained")


def an_embedding(rank: int) -> None:
    """A gated tensor that a module of any kind reads."""

    class Words(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.head = nn.Embedding(11, 5), nn.Linear(5, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.words(x.flatten(1).abs().mul(3).long() % 11).mean(1))

    runs: dict[int, dict[str, Tensor]] = {}
    for i, optimizer in enumerate((one_pass, adamw)):
        torch.manual_seed(1)
        wsn = shard(WSN(convert(Words().double(), density=0.5, heads="head")), mesh())
        single = WSN(convert(Words().double(), density=0.5, heads="head"))
        state = [full_state_dict(wsn)]
        dist.broadcast_object_list(state, 0)
        single.load_state_dict(state[0])
        for one, of_all in ((wsn, False), (single, True)):
            torch.manual_seed(2)
            one.begin_task(0)
            step(one, optimizer(one), 0, of_all, 3)
        theirs, runs[i] = dict(single.named_parameters()), whole(wsn)
        far = [k for k, v in runs[i].items() if not torch.allclose(v, theirs[k], rtol=1e-9, atol=1e-11)]
        check(not far, str(far))


def resumed(rank: int) -> None:
    """An optimizer goes on with the state of another one, with as many processes."""
    runs = []
    for again in (False, True):
        torch.manual_seed(1)
        wsn = shard(WSN(uneven().double()), mesh())
        torch.manual_seed(2)
        wsn.begin_task(0)
        optimizer = one_pass(wsn)
        step(wsn, optimizer, 0, count=2)
        if again:
            state = copy.deepcopy(optimizer.state_dict())
            optimizer = one_pass(wsn)
            optimizer.load_state_dict(state)
        step(wsn, optimizer, 1, count=2)
        runs.append(whole(wsn))
    check(all_equal(runs), "the weights are others")


def evaluated_in_inference_mode(rank: int) -> None:
    wsn, _ = pair()
    train(wsn, 1)
    kept = logits(wsn, 0)
    with torch.inference_mode():
        check(torch.equal(kept, logits(wsn, 0)), "other logits")
        wsn(batches(0, 1, BATCH)[0][0].double())
    train(wsn, 1, first=1)
    check(torch.equal(kept, logits(wsn, 0)), "the logits have changed")


def a_step_that_fails(rank: int) -> None:
    """An exception after the update leaves finished tasks as they are."""
    wsn, _ = pair()
    train(wsn, 1)
    kept = logits(wsn, 0)
    wsn.begin_task(1)
    optimizer = adamw(wsn)

    def fail(*_: Any) -> None:
        raise ZeroDivisionError

    handle = optimizer.register_step_post_hook(fail)
    optimizer._optimizer_step_post_hooks.move_to_end(handle.id, last=False)
    with suppress(ZeroDivisionError):
        step(wsn, optimizer, 1)
    check(torch.equal(kept, logits(wsn, 0)), "the logits have changed")
    handle.remove()
    step(wsn, optimizer, 1)
    wsn.end_task()
    wsn.verify()


def described(rank: int) -> None:
    wsn, _ = pair()
    train(wsn, 2)
    check("SubnetLinear" in repr(wsn) and "model.1" in str(explain(wsn)), str(explain(wsn)))
    check([one.task for one in wsn.task_stats()] == [0, 1], str(wsn.task_stats()))


def waits_when_it_ends(rank: int) -> None:
    collectives.end_calmly.cache_clear()
    pair()
    check(collectives.end_calmly.cache_info().currsize == 1, "gloo may abort the process when it ends")


def moved_to_where_it_is(rank: int) -> None:
    """Trainers do that."""
    runs = []
    for moved in (False, True):
        wsn, _ = pair()
        wsn.begin_task(0)
        if moved:
            check(wsn.to("cpu").double() is wsn, "to() returned another WSN")
        step(wsn, one_pass(wsn), 0, count=2)
        runs.append(whole(wsn))
    check(all_equal(runs), "the weights are others")


POLICIES = {
    "float32": MixedPrecisionPolicy(),
    "bfloat16, sums in float32": MixedPrecisionPolicy(torch.bfloat16, torch.float32),
    "bfloat16": MixedPrecisionPolicy(torch.bfloat16, torch.bfloat16),
}
CASES: dict[str, Callable[[int], Any]] = {
    "in float32": in_float32,
    "in bfloat16, sums in float32": lambda rank: in_bfloat16(rank, torch.float32),
    "in bfloat16": lambda rank: in_bfloat16(rank, torch.bfloat16),
    **{f"wire {name}": lambda rank, p=policy: on_the_wire(rank, p) for name, policy in POLICIES.items()},
    "a finished task in the middle of another": between_tasks,
    "the best epoch": best_epoch,
    "rows of tasks": rows_of_tasks,
    "a probe": probed,
    "averages": averages,
    "an optimizer that moves everything": an_optimizer_that_moves_everything,
    "a written weight": a_written_weight,
    "a written head": a_written_head,
    "removal": removal,
    "loading": loading,
    "checkpointing": lambda rank: checkpointing(rank, True),
    "checkpointing, kept between the passes": lambda rank: checkpointing(rank, False),
    "autocast": autocast,
    "an embedding": an_embedding,
    "a resumed optimizer": resumed,
    "inference mode": evaluated_in_inference_mode,
    "to the same device": moved_to_where_it_is,
    "the end of the process": waits_when_it_ends,
    "a step that fails": a_step_that_fails,
    "what is said of it": described,
}
