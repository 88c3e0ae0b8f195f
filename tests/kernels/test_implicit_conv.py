"""Masked convolutions against PyTorch: our error against float64 at most twice that of torch at the same dtype."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from distributions import RULES
from torch import Tensor
from torch.nn.functional import conv1d, conv2d, conv_transpose1d, conv_transpose2d

from wsn_fast.backends import torch as portable
from wsn_fast.kernels import implicit_conv as kernels
from wsn_fast.kernels._matmul_tile import MatmulConfig
from wsn_fast.reference import specification

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
SMALL = MatmulConfig(32, 32, 32, 4, 2)
COMPUTE = (torch.float32, torch.bfloat16, torch.float16)
# Shape of the input, output channels, kernel, and what differs from stride 1, no padding, dilation 1, one group.
GEOMETRIES: dict[str, tuple[tuple[int, ...], int, tuple[int, ...], dict[str, Any]]] = {
    "plain": ((2, 3, 7, 9), 5, (3, 3), {}),
    "rows of whole bytes": ((2, 8, 6, 5), 34, (3, 2), {}),
    "1x1": ((3, 35, 4, 5), 33, (1, 1), {}),
    "padding": ((2, 3, 5, 6), 4, (3, 3), {"padding": (1, 2)}),
    "stride": ((2, 3, 9, 8), 4, (3, 2), {"stride": (2, 3)}),
    "dilation": ((1, 3, 9, 10), 4, (2, 3), {"dilation": (3, 2)}),
    "groups": ((2, 6, 6, 6), 9, (3, 3), {"groups": 3}),
    "depthwise": ((2, 4, 6, 6), 4, (3, 3), {"groups": 4, "padding": (1, 1)}),
    "all at once": ((2, 6, 11, 12), 4, (3, 2), {"stride": (3, 2), "padding": (2, 1), "dilation": (2, 3), "groups": 2}),
    "one output": ((1, 1, 3, 3), 1, (3, 3), {}),
    "one element": ((1, 1, 1, 1), 1, (1, 1), {}),
    "1-d": ((2, 3, 15), 5, (4,), {"stride": (2,), "padding": (3,), "dilation": (2,)}),
    "1-d groups": ((2, 4, 10), 6, (3,), {"groups": 2}),
}

# NumPy warns, inside the interpreter, of the infinities and NaN that are planted here, and of how the interpreter of
# Triton 3.6 reads the bound of a loop.
pytestmark = pytest.mark.filterwarnings(
    "ignore:(overflow|invalid value) encountered:RuntimeWarning",
    "ignore:Conversion of an array with ndim > 0 to a scalar:DeprecationWarning",
)


def assert_as_exact_as_torch(actual: Tensor, torchs: Tensor, exact: Tensor, scale: Tensor) -> None:
    """``|actual - exact|`` at most twice torch's own error, beside one rounding of the result and of the largest sum:
    torch is at times exact by luck. The interpreter truncates to bf16 where a GPU rounds, the weight and the result.
    """
    assert actual.isfinite().all()
    truncates = INTERPRETED and actual.dtype is torch.bfloat16
    own = torch.finfo(actual.dtype).eps * exact.abs() * (2 if truncates else 0.5)
    sums = torch.finfo(torch.bfloat16 if truncates else torch.float32).eps * scale
    error = (actual.double() - exact).abs()
    excess = error - 2 * (torchs.double() - exact).abs() - own - sums
    worst = int(excess.argmax())
    assert excess.max() <= 0, f"element {worst}: error {error.flatten()[worst]}, {excess.max()} too much"


def poisoned(shape: torch.Size, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.full(shape, float("nan"), dtype=dtype, device=device)


def check(
    geometry: str,
    device: torch.device,
    *,
    compute: torch.dtype = torch.float32,
    weight: torch.dtype = torch.float32,
    scored: str | None = None,
    backward: bool = False,
    with_bias: bool = True,
    channels_last: bool = False,
    config: MatmulConfig = SMALL,
) -> None:
    shape, channels, kernel, options = GEOMETRIES[geometry]
    spatial = len(kernel)
    options = {"stride": (1,) * spatial, "padding": (0,) * spatial, "dilation": (1,) * spatial, "groups": 1} | options
    w_shape = (channels, shape[1] // options["groups"], *kernel)
    w = torch.randn(w_shape, device=device).to(weight)
    source: dict[str, Any] = {}
    if scored:
        scores = torch.randn(w_shape, device=device).to(weight)
        mask = specification.topc_mask(scores, 0.5, rule=scored)
        source = {"scores": scores, "tau": specification.topc_threshold(scores, 0.5, rule=scored), "rule": scored}
    else:
        mask = torch.rand(w_shape, device=device) < 0.5
        source = {"packed": portable.pack(mask)}
    w[~mask] = float("nan")
    gated = specification.select(mask, w.to(compute))

    forward = conv1d if spatial == 1 else conv2d
    x = torch.randn(shape, device=device).to(compute)
    out = forward(x.double(), gated.double(), None, **options)
    if backward:
        x = torch.randn(out.shape, device=device).to(compute)
        forward = conv_transpose1d if spatial == 1 else conv_transpose2d
        rest = zip(shape[2:], forward(x, gated, None, **options).shape[2:], strict=True)
        reference_options = options | {"output_padding": tuple(want - got for want, got in rest)}
        y = poisoned(torch.Size(shape), compute, device)
        bias = None
    else:
        reference_options = options
        y = poisoned(out.shape, compute, device)
        bias = torch.randn(channels, device=device).to(compute) if with_bias else None
    if channels_last:
        x, y = (t.to(memory_format=torch.channels_last) for t in (x, y))
    kernels.masked_conv(x, w, y, bias=bias, backward=backward, config=config, **source, **options)
    wide = None if bias is None else bias.double()
    exact = forward(x.double(), gated.double(), wide, **reference_options)
    scale = forward(x.double().abs(), gated.double().abs(), None if wide is None else wide.abs(), **reference_options)
    assert_as_exact_as_torch(y, forward(x, gated, bias, **reference_options), exact, scale)


@pytest.mark.sample(21)
@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_geometries(geometry: str, backward: bool, device: torch.device) -> None:
    check(geometry, device, backward=backward)


@pytest.mark.sample(21)
@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("scored", RULES)
@pytest.mark.parametrize("geometry", ["all at once", "rows of whole bytes"])
def test_mask_from_scores(geometry: str, scored: str, backward: bool, device: torch.device) -> None:
    check(geometry, device, scored=scored, backward=backward)


@pytest.mark.sample(29)
@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("scored", [None, "magnitude"])
@pytest.mark.parametrize("weight", COMPUTE)
@pytest.mark.parametrize("compute", COMPUTE)
def test_dtypes(
    compute: torch.dtype, weight: torch.dtype, scored: str | None, backward: bool, device: torch.device
) -> None:
    check("padding", device, compute=compute, weight=weight, scored=scored, backward=backward)


@pytest.mark.parametrize("config", [*kernels.CONFIGS, *kernels.IEEE_CONFIGS])
def test_every_tile(config: MatmulConfig, device: torch.device) -> None:
    check("1x1", device, compute=torch.float16, config=config)


@pytest.mark.parametrize("config", [*kernels.DX_CONFIGS, *kernels.IEEE_CONFIGS])
def test_every_tile_of_dx(config: MatmulConfig, device: torch.device) -> None:
    check("1x1", device, compute=torch.float16, config=config, backward=True)


def test_without_bias(device: torch.device) -> None:
    check("groups", device, with_bias=False)


@pytest.mark.parametrize("backward", [False, True])
def test_channels_last(backward: bool, device: torch.device) -> None:
    check("padding", device, channels_last=True, backward=backward)


@pytest.mark.parametrize("backward", [False, True])
def test_a_stride_beyond_32_bits_is_left_to_torch(
    monkeypatch: pytest.MonkeyPatch, backward: bool, device: torch.device
) -> None:
    from wsn_fast.backends import triton as backend
    from wsn_fast.backends.mask import Mask

    def launched(*_: object, **__: object) -> None:
        raise AssertionError("the kernel was launched")

    w = torch.randn(3, 2, 3, 3, device=device)
    keep = torch.rand(w.shape, device=device) < 0.5
    x = torch.randn(1, 3 if backward else 2, 5, 5, device=device)
    far = x.as_strided(x.shape, (2**31, *x.stride()[1:]))
    operands = w, Mask.of_packed(portable.pack(keep)), None, ((1, 1), (1, 1), (1, 1)), 1
    shape = (1, 2, 5, 5) if backward else None
    expected = portable.masked_conv(x, *operands, shape)
    monkeypatch.setattr(kernels, "masked_conv", launched)
    torch.testing.assert_close(backend.masked_conv(far, *operands, shape), expected)
    with pytest.raises(AssertionError, match="the kernel was launched"):
        backend.masked_conv(x, *operands, shape)
