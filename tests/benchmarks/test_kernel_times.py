"""The two commands that time kernels, as far as they go without a GPU."""

from __future__ import annotations

import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

from benchmarks import bandwidth, kernel_times
from benchmarks.checks import WrongResultError
from benchmarks.kernel_times import KernelTime
from wsn_fast.backends import native


def test_kernels_are_summed_up_by_name_the_longest_first() -> None:
    durations = [("short", 1.0), ("long", 9.0), ("short", 3.0), ("long", 7.0), ("short", 2.0), ("short", 2.0)]
    long, short = kernel_times.summarise(durations, count=2)
    assert (long.name, long.launches, long.median_us, long.us_per_step) == ("long", 1.0, 8.0, 8.0)
    assert (short.name, short.launches, short.median_us, short.us_per_step) == ("short", 2.0, 2.0, 4.0)


def test_a_step_that_failed_has_its_error_in_the_table() -> None:
    kernels = [KernelTime("adamw", 1.0, 2.5, 2.0, 3.0)]
    text = kernel_times.markdown(
        [{"mode": "dense", "side": 8, "kernels": kernels}, {"mode": "guarded", "side": 8, "error": "no memory"}]
    )
    assert "## dense, 8^2" in text and "adamw" in text and text.rstrip().endswith("no memory")


@pytest.mark.parametrize("mode", kernel_times.MODES)
def test_a_step_is_made_at_the_given_rate(mode: str) -> None:
    step, rates = kernel_times.make_step(mode, 16, 0.125, torch.device("cpu")), []
    hook = register_optimizer_step_pre_hook(lambda optimizer, *_: rates.extend(g["lr"] for g in optimizer.param_groups))
    try:
        step()
    finally:
        hook.remove()
    assert set(rates) == {0.125}


@pytest.mark.skipif(native.load().lib is None, reason="the native library is not here")
def test_every_native_kernel_has_a_row(capsys: pytest.CaptureFixture[str]) -> None:
    before = torch.get_num_threads()
    try:
        bandwidth.main(["--elements", "1000", "--threads", "1", "--seconds", "0"])
    finally:
        torch.set_num_threads(before)
    text = capsys.readouterr().out
    assert "1000 elements" in text and all(name in text for name in ("copy, torch", "gradients", "one-pass AdamW"))


@pytest.mark.skipif(native.load().lib is None, reason="the native library is not here")
def test_a_wrong_kernel_gets_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    right = native.gates

    def wrong(orders: list[object], plan: object = None) -> object:
        taus = right(orders, plan)  # type: ignore[arg-type]
        orders[0].masked[0] += 1  # type: ignore[attr-defined]
        return taus

    monkeypatch.setattr(native, "gates", wrong)
    with pytest.raises(WrongResultError, match="gates"):
        bandwidth.kernels(100)
