"""The codes of running means, against the words of their specification."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from elementwise import assert_same_bits
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from wsn_fast.backends import moments
from wsn_fast.backends.moments import BLOCK, NEAREST, SIGNED, UNSIGNED, Code, decode_8bit, encode_8bit

CODES = pytest.mark.parametrize("code", [SIGNED, UNSIGNED], ids=["first moments", "second moments"])
SIZE = BLOCK + 44  # a whole block and a part of one

number = st.floats(width=32, allow_nan=False, allow_infinity=False)
close = st.floats(width=32, min_value=2.0**-12, max_value=1.0)
dither = st.integers(0, 2**32 - 1)


def vectors(numbers: st.SearchStrategy[float], code: Code) -> st.SearchStrategy[Tensor]:
    """Some numbers at some places of two blocks of zeros; those of second moments have no sign."""
    places = st.dictionaries(st.integers(0, SIZE - 1), numbers, min_size=1, max_size=12)
    return places.map(lambda chosen: vector_of(chosen, code))


def vector_of(chosen: dict[int, float], code: Code) -> Tensor:
    vector = torch.zeros(SIZE)
    for place, value in chosen.items():
        vector[place] = value if code.signed else abs(value)
    return vector


either = st.sampled_from([SIGNED, UNSIGNED])
cases = either.flatmap(lambda code: st.tuples(st.just(code), vectors(number | close, code), dither))


def stored(vector: Tensor, code: Code, r: int = NEAREST) -> tuple[Tensor, Tensor]:
    return encode_8bit(vector, code, torch.tensor(r))


def round_trip(vector: Tensor, code: Code, r: int = NEAREST) -> Tensor:
    return decode_8bit(*stored(vector, code, r), code)


def tops(vector: Tensor, code: Code) -> Tensor:
    """For each element, the top of the scale of its block."""
    return stored(vector, code)[1].repeat_interleave(BLOCK)[: len(vector)].double() * 2


# --- the values
def grid(code: Code, exponent: int) -> list[float]:
    """The positive numbers of a block with the scale ``2**exponent``, ascending, as the specification names them."""
    value, numbers = 2.0 ** (exponent + 1), [2.0 ** (exponent + 1)]
    for bits, steps in code.parts:
        for _ in range(steps):
            octave = 2.0 ** np.ceil(np.log2(value) - 1)  # the power of two below, and not the value itself
            value -= octave / 2**bits
            numbers.append(float(value))
    return numbers[::-1]


@CODES
@pytest.mark.parametrize("exponent", [-40, 0, 126])
def test_every_code_has_the_value_of_the_specification(code: Code, exponent: int) -> None:
    expected = [0.0, *grid(code, exponent), torch.inf]
    expected += [torch.nan, *(-value for value in expected[1:])] if code.signed else [torch.nan]
    assert len(expected) == 256
    found = decode_8bit(torch.arange(256, dtype=torch.uint8), torch.tensor([2.0**exponent]), code)
    assert_same_bits(found, torch.tensor(expected, dtype=torch.float64).float(), "value")


@given(cases)
def test_the_nearest_number_of_the_block_is_taken(case: tuple[Code, Tensor, int]) -> None:
    code, vector, _ = case
    codes, scales = stored(vector, code)
    for block, scale in zip(vector.split(BLOCK), scales.tolist(), strict=True):
        numbers = np.array([0.0, *grid(code, round(np.log2(scale)))])
        for value in block[block != 0].double().abs().tolist():
            if numbers[1] <= value <= numbers[-1]:
                best = np.abs(numbers - value).min()
                place = int((block.double().abs() == value).nonzero()[0])
                found = abs(float(round_trip(block, code)[place]))
                assert abs(found - value) == best
    assert codes.dtype is torch.uint8


@given(cases)
def test_the_error_of_any_dither_is_less_than_a_step(case: tuple[Code, Tensor, int]) -> None:
    code, vector, r = case
    top, x = tops(vector, code), vector.double().abs()
    error = (round_trip(vector, code, r).double() - vector.double()).abs()
    for bits, steps in code.parts:
        lower = top * 2.0 ** -(steps / 2**bits)
        inside = (x >= lower) & (x < top) & (x <= 2.0**127)
        assert (error[inside] < x[inside] / 2**bits).all()
        top = lower


@given(cases)
def test_the_order_is_kept(case: tuple[Code, Tensor, int]) -> None:
    code, vector, r = case
    for block in vector.split(BLOCK):
        ascending = block.sort().values
        assert (round_trip(ascending, code, r).diff() >= 0).all()


@given(cases)
def test_zeros_stay_zeros_without_a_sign(case: tuple[Code, Tensor, int]) -> None:
    code, vector, r = case
    vector[vector == 0] = -0.0
    found = round_trip(vector, code, r)[vector == 0]
    assert_same_bits(found, torch.zeros_like(found), "zero")


@given(vectors(number, UNSIGNED), dither)
def test_a_second_moment_shrinks_by_less_than_a_third_and_never_to_zero(vector: Tensor, r: int) -> None:
    found = round_trip(vector, UNSIGNED, r).double()
    saturated = vector.double().clamp(max=2.0**127)
    assert (found > saturated * 2 / 3)[vector > 0].all() and (found[vector > 0] > 0).all()


@given(vectors(number, SIGNED), dither)
def test_a_first_moment_grows_by_less_than_a_half_and_keeps_its_sign(vector: Tensor, r: int) -> None:
    found = round_trip(vector, SIGNED, r).double()
    assert (found.abs() < 1.5 * vector.double().abs())[vector != 0].all()
    assert (found * vector.sign() >= 0).all()


@given(cases, st.sampled_from([torch.nan, torch.inf]), st.integers(0, SIZE - 1))
def test_what_is_not_finite_stays_so_and_changes_nothing_else(
    case: tuple[Code, Tensor, int], value: float, place: int
) -> None:
    code, vector, r = case
    vector[place] = 0
    codes, scales = stored(vector, code, r)
    vector[place] = value
    found, found_scales = stored(vector, code, r)
    assert_same_bits(decode_8bit(found, found_scales, code)[place], torch.tensor(value), "value")
    found[place] = codes[place]
    assert torch.equal(found, codes) and torch.equal(found_scales, scales)


def test_an_infinite_first_moment_keeps_its_sign() -> None:
    assert round_trip(torch.tensor([-torch.inf, 1.0]), SIGNED).tolist() == [-torch.inf, 1.0]


@given(
    either.flatmap(lambda code: st.tuples(st.just(code), st.lists(st.integers(0, code.top - 1), max_size=40))), dither
)
def test_a_number_with_a_code_keeps_it_under_any_dither(case: tuple[Code, list[int]], r: int) -> None:
    code, positions = case
    codes = torch.tensor([code.top - 1, *positions], dtype=torch.uint8)  # the first one gives the block its scale
    scales = torch.tensor([2.0**-30])
    again = stored(decode_8bit(codes, scales, code), code, r)
    assert torch.equal(again[0], codes) and torch.equal(again[1], scales)


# --- extremes
@CODES
def test_the_largest_floats_become_the_largest_number(code: Code) -> None:
    assert round_trip(torch.full((3,), torch.finfo(torch.float32).max), code).tolist() == [2.0**127] * 3


def test_the_smallest_floats_are_no_denormal_numbers() -> None:
    tiny = torch.tensor([2.0**-149, 2.0**-127])
    assert round_trip(tiny, UNSIGNED).tolist() == [2.0**-125] * 2
    assert round_trip(tiny, SIGNED).tolist() == [0.0] * 2


@pytest.mark.parametrize("n", [0, 1, BLOCK - 1, BLOCK, BLOCK + 1])
def test_every_block_has_a_scale(n: int) -> None:
    codes, scales = stored(torch.randn(n), SIGNED)
    assert codes.shape == (n,) and scales.shape == (-(-n // BLOCK),)


@pytest.mark.parametrize("storage", ["bfloat16", "8bit"])
@pytest.mark.parametrize("shape", [(), (0, 3), (7, 1, 5)], ids=str)
def test_tensors_of_any_shape_are_stored_in_it(storage: str, shape: tuple[int, ...]) -> None:
    like = torch.randn(shape)
    place = moments.zeros(like, storage, True)
    assert not moments.decode(place, like, True).any()
    moments.encode(like, place, True)
    torch.testing.assert_close(moments.decode(place, like, True), like, rtol=1 / 32, atol=2**-9)


def test_a_transposed_tensor_is_stored_in_the_order_of_its_rows() -> None:
    like = torch.randn(20, 30).t()
    places = [moments.zeros(one, "8bit", True) for one in (like, like.contiguous())]
    for place in places:
        moments.encode(like, place, True)
    assert torch.equal(places[0].values, places[1].values) and places[0].values.is_contiguous()


def test_a_small_second_moment_in_float64_does_not_become_zero() -> None:
    like = torch.tensor([1e-60, 0.0, 1e60, torch.inf], dtype=torch.float64)
    place = moments.zeros(like, "8bit", False)
    moments.encode(like, place, False)
    found = moments.decode(place, like, False)
    assert found[0] > 0 and found[1] == 0 and found[2:].tolist() == [2.0**127, torch.inf]


def test_the_default_dtype_of_torch_has_no_effect_on_scales() -> None:
    torch.set_default_dtype(torch.float64)
    try:
        scales = moments.zeros(torch.ones(3), "8bit", True).scales
    finally:
        torch.set_default_dtype(torch.float32)
    assert scales is not None and scales.dtype is torch.float32


@pytest.mark.parametrize("storage", ["bfloat16", "8bit"])
def test_the_host_reads_no_value(storage: str) -> None:
    """A tensor on the meta device has none."""
    like = torch.empty(300, device="meta")
    place = moments.zeros(like, storage, True)
    moments.encode(moments.decode(place, like, True), place, True, torch.empty((), device="meta"))


# --- dither
@pytest.mark.parametrize("storage", ["bfloat16", "8bit"])
def test_a_mean_that_decays_slowly_decays(storage: str) -> None:
    """By a thousandth in each update, which is less than half of a step."""
    like = torch.ones(64)
    place = moments.zeros(like, storage, False)
    moments.encode(like, place, False)
    for update in range(1, 2001):
        moments.encode(moments.decode(place, like, False) * 0.999, place, False, torch.tensor(float(update)))
    mean = float(moments.decode(place, like, False).mean())
    assert mean == pytest.approx(0.999**2000, rel=0.15)


def test_the_dither_is_that_of_the_specification() -> None:
    x, update = torch.rand(SIZE) + 0.5, 12345
    place = moments.zeros(x, "8bit", True)
    moments.encode(x, place, True, torch.tensor(float(update)))
    r = torch.tensor([(i * 0xC13FA9A9 + update * 0x91E10DA5) % 2**32 for i in range(SIZE)])
    assert torch.equal(place.values, encode_8bit(x, SIGNED, r)[0])


# --- bfloat16
@given(st.lists(number, min_size=1, max_size=20))
def test_bfloat16_is_rounded_as_pytorch_rounds_but_for_ties(numbers: list[float]) -> None:
    x = torch.tensor(numbers)
    kept = (x.abs() >= 2.0**-126) & (x.view(torch.int32) & 0xFFFF != 0x8000) & x.bfloat16().isfinite()
    place = moments.zeros(x, "bfloat16", True)
    moments.encode(x, place, True)
    assert_same_bits(place.values[kept], x.bfloat16()[kept], "value")


def test_bfloat16_of_numbers_out_of_range() -> None:
    x = torch.tensor([torch.finfo(torch.float32).max, torch.inf, torch.nan, 2.0**-140, 0.0])
    largest = torch.finfo(torch.bfloat16).max
    for signed, least in ((True, 0.0), (False, 2.0**-125)):
        place = moments.zeros(x, "bfloat16", signed)
        moments.encode(x, place, signed)
        expected = torch.tensor([largest, torch.inf, torch.nan, least, 0.0])
        assert_same_bits(place.values.float(), expected, "value")
