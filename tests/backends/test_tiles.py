"""The tiles of the fused products fit into the shared memory of the GPU that they are chosen for."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from dataclasses import astuple
from itertools import product
from typing import TYPE_CHECKING, Any

import pytest
import torch
from kernel_resources import KIB, SHARED_LIMITS

if TYPE_CHECKING:
    from wsn_fast.backends.triton.tuning import Product, Table

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")

BF16, LARGE, SMALL = torch.bfloat16, 227 * KIB, 99 * KIB


def products() -> Iterator[Product]:
    """Every product that the backend asks tiles for."""
    from wsn_fast.backends.triton.tuning import Product

    dtypes = ((torch.float32, "ieee"), (torch.float32, "tf32"), (BF16, "tf32"), (torch.float16, "tf32"))
    for (dtype, precision), source, backward in product(dtypes, ("packed", "scores"), (False, True)):
        yield Product("masked_linear", dtype, precision, source, backward)
        yield Product("masked_conv", dtype, precision, source, backward)
        if not backward:
            one = "masked_linear_tasks" if source == "packed" else "masked_linear_grad"
            yield Product(one, dtype, precision, source)


@pytest.mark.parametrize("arch", SHARED_LIMITS)
def test_every_tile_that_nobody_measured_fits(arch: int) -> None:
    from wsn_fast.backends.triton import tuning

    gpu, empty = tuning.Gpu(132, SHARED_LIMITS[arch] * KIB), tuning.Table("a GPU that nobody has measured")
    for one, rows, (n, k) in product(products(), (1, 16, 17, 64, 1000), ((64, 64), (4096, 4096), (513, 16384))):
        config, splits = empty.tile(one, rows, n, k, gpu)
        assert config in one.configs and splits >= 1
        assert tuning.most_shared(one, config, gpu.shared) <= gpu.shared, (one, config)


def test_a_gpu_with_less_shared_memory_gets_smaller_tiles() -> None:
    from wsn_fast.backends.triton.tuning import Gpu, Product, fitting

    scores = Product("masked_linear", BF16, "tf32", "scores")
    large, small = fitting(scores, Gpu(132, LARGE)), fitting(scores, Gpu(132, SMALL))
    assert large == [*scores.configs] and 0 < len(small) < len(large)
    assert set(small) < set(fitting(scores._replace(source="packed"), Gpu(132, SMALL)))


def test_no_tile_for_a_gpu_with_almost_no_shared_memory() -> None:
    from wsn_fast.backends.triton.tuning import Gpu, Product, fitting

    with pytest.raises(RuntimeError, match="no tile of masked_linear fits into 1024 bytes of shared memory"):
        fitting(Product("masked_linear", BF16, "tf32", "packed"), Gpu(132, 1024))


def measured(**entries: object) -> Table:
    """A table, made up."""
    from wsn_fast.backends import tables
    from wsn_fast.backends.triton import tuning

    return tuning.Table("Test 1", tables.Tables(entries, (), "digest"))


def entry(one: Product, **others: Any) -> dict[str, Any]:
    kind = {"dtype": "bfloat16", "precision": one.precision, "source": one.source, "backward": one.backward}
    return kind | others


@pytest.mark.parametrize("operation", ["masked_linear", "masked_linear_grad"])
def test_a_measured_tile_that_does_not_fit_is_refused(operation: str) -> None:
    from wsn_fast.backends.triton.tuning import Gpu, Product, fits

    one = Product(operation, BF16, "tf32", "scores")
    large = next(config for config in one.configs if not fits(one, config, Gpu(132, SMALL)))
    tiles = [{"rows": 64, "config": list(astuple(large)), "splits": 1}]
    name = operation.removeprefix("masked_")
    table = measured(**{name: [entry(one, n=1024, k=1024, max_rows=64, tiles=tiles)]})
    assert table.tile(one, 64, 1024, 1024, Gpu(132, LARGE)) == (large, 1)
    config, _ = table.tile(one, 64, 1024, 1024, Gpu(132, SMALL))
    assert config != large and fits(one, config, Gpu(132, SMALL))


def test_a_measured_tile_of_a_convolution_that_does_not_fit_is_refused() -> None:
    from wsn_fast.backends.triton.tuning import Gpu, Product, most_shared

    one, shape = Product("masked_conv", BF16, "tf32", "scores"), {"batch": 2}
    largest = max(one.configs, key=lambda config: most_shared(one, config, SMALL))
    table = measured(conv=[entry(one, shape=shape, config=list(astuple(largest)), wins=True)])
    needed = most_shared(one, largest, SMALL)
    assert table.conv_config(one, shape, 1000, Gpu(132, needed)) == largest
    assert table.conv_config(one, shape, 1000, Gpu(132, needed - 1)) != largest


def test_every_tile_fits_on_hopper() -> None:
    """Also with the second copy of the masked weight that Triton 3.8 keeps there."""
    from wsn_fast.backends.triton.tuning import HOPPER, Gpu, fitting, most_shared

    for one in products():
        assert fitting(one, Gpu(132, HOPPER)) == [*one.configs]
        if one.operation != "masked_linear_grad":
            assert all(most_shared(one, c, HOPPER) > most_shared(one, c, SMALL) for c in one.configs)
