"""``benchmarks.peer`` trains with the published CLArena."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
import torch

from benchmarks import peer

if find_spec("clarena") is None:
    pytest.skip('needs CLArena: pip install "wsn-fast[clarena]"', allow_module_level=True)

from clarena.backbones.base import PercentileLayerParameterMaskingByScore as Gate

pytestmark = pytest.mark.filterwarnings("default", "error:::wsn_fast")  # the frameworks have warnings of their own
SETTINGS = {**peer.SETTINGS, "tasks": 2, "epochs": 4, "width": 40, "threads": torch.get_num_threads(), "lr": 3e-3}


@pytest.mark.parametrize("program", peer.PROGRAMS)
def test_a_program_learns_and_is_measured(program: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Gate, "backward", Gate.backward)  # the benchmark mends it, and it is put back
    result = peer.run(program, peer.load("digits"), 1, SETTINGS)
    assert result["acc"] > 70
    assert (result["bwt"] == 0) == (program != "dense")
    assert result["cpu_s"] > 0 and result["elapsed_s"] > 0
