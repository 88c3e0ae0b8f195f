"""The pages on frameworks: their Python runs as it stands there."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import needs_gloo
from torch import nn

from wsn_fast import WSN, convert
from wsn_fast.distributed import load_checkpoint

ROOT = Path(__file__).parents[2]
PAGES = ROOT / "docs" / "how-to"
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")

pytestmark = pytest.mark.filterwarnings("default", "error:::wsn_fast")


def needs(package: str) -> None:
    """Skip this test if a package is not installed."""
    if find_spec(package) is None:
        pytest.skip(f"needs {package}")


def scripts(page: str) -> list[str]:
    """The Python code of a page, by its blocks."""
    return re.findall(r"```python\n(.*?)```", (PAGES / f"{page}.md").read_text("utf-8"), re.DOTALL)


def run(page: str, whole: bool = True) -> dict[str, Any]:
    """The names that the code of a page has at its end, or that of its first block."""
    needs(page)
    names: dict[str, Any] = {"__name__": page}
    for code in scripts(page) if whole else scripts(page)[:1]:
        exec(compile(code, f"{page}.md", "exec"), names)
    return names


def test_lightning() -> None:
    wsn = run("lightning", whole=False)["module"].wsn
    assert isinstance(wsn, WSN)
    assert wsn.tasks == [1, 2, 3]


def test_clarena() -> None:
    names = run("clarena")
    assert names["backbone"].wsn.tasks == [1, 2]
    assert names["logits"].shape == (5, 3)


# --- several processes -----------------------------------------------------------------------------------------------
SAYS = "\nprint(f'logits {logits.sum().item():.6f}')\n"


def said_by(folder: Path, script: str, *launcher: str) -> list[str]:
    """What a script says of its logits, in each process."""
    (folder / "train.py").write_text(f"import torchvision_beside_cpu_torch\n{script}")
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests" / "support")])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, *launcher, "train.py"]
    ran = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stderr
    assert "was not checked" not in ran.stderr
    # Two processes may print into one line, each its own text at once.
    return re.findall(r"(?:logits|process \d:) (-?\d+\.\d{6})", ran.stdout)


@needs_gloo
@pytest.mark.parametrize("one_pass", [False, True])
def test_lightning_with_ddp(one_pass: bool, tmp_path: Path) -> None:
    """The script of the page in two processes, and one with a one-pass optimizer that comes after the wrapper."""
    needs("lightning")
    script = scripts("lightning")[0].replace('accelerator="auto"', 'accelerator="cpu", devices=2, strategy="ddp"')
    script = script.replace("torch.randn(5, 20)", "torch.ones(5, 20)")
    if one_pass:
        start = script.index("        params = [")
        end = script.index("\n\n\ndef data")
        script = script[:start] + "        return SubnetAdamW(self.wsn, lr=1e-3, one_pass=True)" + script[end:]
        script = "from wsn_fast.optim import SubnetAdamW\n" + script
    first, second = said_by(tmp_path, script + SAYS, *TORCHRUN)
    assert first == second


@needs_gloo
def test_lightning_with_fsdp2(tmp_path: Path) -> None:
    needs("lightning")
    script = scripts("lightning")[1].replace("devices=2", 'accelerator="cpu", devices=2')
    first, second = said_by(tmp_path, script + SAYS, *TORCHRUN)
    assert first == second
    wsn = WSN(convert(nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 3)), density=0.3, heads="2"))
    load_checkpoint(tmp_path / "checkpoint", wsn)
    with torch.no_grad(), wsn.use_task(1):
        assert wsn.eval()(torch.ones(5, 20)).sum().item() == pytest.approx(float(first), rel=1e-5)


@needs_gloo
def test_accelerate(tmp_path: Path) -> None:
    needs("accelerate")
    (script,) = scripts("accelerate")
    script = script.replace("Accelerator()", "Accelerator(cpu=True)")
    assert len(said_by(tmp_path, script)) == 1
    first, second = said_by(tmp_path, script, *TORCHRUN)
    assert first == second
