"""Transposed convolutions: sizes, tasks that are kept, and the one-pass optimizer."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from elementwise import assert_same_bits
from torch import Tensor, nn

from wsn_fast import WSN, FastSubnetConvTranspose1d, FastSubnetConvTranspose2d, TaskHeads, explain
from wsn_fast.optim import SubnetAdamW

CLASSES = 3
OPTIMIZERS: dict[str, Callable[[WSN], torch.optim.Optimizer]] = {
    "adamw": lambda wsn: wsn.guard(torch.optim.AdamW(wsn.parameters(), 0.01)),
    "subnet": lambda wsn: SubnetAdamW(wsn, 0.01, one_pass=False),
    "one_pass": lambda wsn: SubnetAdamW(wsn, 0.01, one_pass=True),
}


def decoder() -> WSN:
    torch.manual_seed(0)
    layers = (
        nn.Unflatten(1, (2, 2, 2)),
        FastSubnetConvTranspose2d(2, 4, 3, 2, groups=2, density=0.4),
        nn.BatchNorm2d(4),
        nn.Tanh(),
        nn.Flatten(2),
        FastSubnetConvTranspose1d(4, 3, 3, density=0.4),
        nn.Flatten(),
        TaskHeads(3 * 27, CLASSES),
    )
    return WSN(nn.Sequential(*layers).double())


def batch(task: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(task)
    x = torch.randn(8, 8, generator=generator, dtype=torch.float64)
    return x, torch.randint(CLASSES, (8,), generator=generator)


def train(wsn: WSN, task: int, make: Callable[[WSN], torch.optim.Optimizer]) -> None:
    wsn.train().begin_task(task)
    optimizer = make(wsn)
    x, y = batch(task)
    for _ in range(4):
        optimizer.zero_grad()
        F.cross_entropy(wsn(x), y).backward()
        optimizer.step()
    wsn.end_task()


@torch.no_grad()
def logits(wsn: WSN, task: int) -> Tensor:
    with wsn.eval().use_task(task):
        return wsn(batch(9)[0])


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_first_task_is_kept_to_the_bit(name: str) -> None:
    wsn = decoder()
    train(wsn, 0, OPTIMIZERS[name])
    before, weight = logits(wsn, 0), wsn.model[1].weight.detach().clone()
    train(wsn, 1, OPTIMIZERS[name])
    assert_same_bits(logits(wsn, 0), before, "logits")
    assert not torch.equal(wsn.model[1].weight, weight), "the second task did train"
    assert wsn.verify().tasks == [0, 1]


def test_the_one_pass_mode_trains_as_the_standard_mode() -> None:
    ends = []
    for name in ("subnet", "one_pass"):
        wsn = decoder()
        for task in range(2):
            train(wsn, task, OPTIMIZERS[name])
        ends.append(wsn)
    for (name, a), b in zip(ends[0].named_parameters(), ends[1].parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("size", [(7, 9), (8, 10), (2, 5, 8, 9)], ids=str)
def test_output_size_picks_among_the_sizes_of_a_stride(size: tuple[int, ...]) -> None:
    layer, dense = FastSubnetConvTranspose2d(4, 5, 3, 2, 1, density=1.0), nn.ConvTranspose2d(4, 5, 3, 2, 1)
    dense.load_state_dict({n: p for n, p in layer.state_dict().items() if n in ("weight", "bias")})
    x = torch.randn(2, 4, 4, 5)
    assert layer(x, size).shape[2:] == size[-2:]
    assert torch.equal(layer(x, output_size=size), dense(x, output_size=list(size)))


def test_a_size_that_cannot_be_reached_is_refused() -> None:
    with pytest.raises(ValueError, match="requested an output size of"):
        FastSubnetConvTranspose2d(4, 5, 3, 2, 1)(torch.randn(2, 4, 4, 5), (20, 20))


def test_other_padding_modes_are_refused() -> None:
    with pytest.raises(ValueError, match='Only "zeros" padding mode is supported'):
        FastSubnetConvTranspose2d(4, 5, 3, padding_mode="reflect")  # type: ignore[arg-type]


def test_explain_says_that_there_is_no_fused_product() -> None:
    products = [r for r in explain(FastSubnetConvTranspose1d(2, 3, 2)) if r.operation.startswith("product")]
    assert len(products) == 2
    assert all(r.backend == "torch" and "has no product that applies the mask itself" in r.reason for r in products)
