"""The pages on frameworks: their Python runs as it stands there."""

from __future__ import annotations

import os
import re
import signal
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


def test_lightning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    wsn = run("lightning", whole=False)["module"].wsn
    assert isinstance(wsn, WSN)
    assert wsn.tasks == [1, 2, 3]


def test_clarena(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names = run("clarena")
    assert names["backbone"].wsn.tasks == [1, 2]
    assert names["logits"].shape == (5, 3)


# --- several processes -----------------------------------------------------------------------------------------------
SAYS = "\nprint(f'logits {logits.sum().item():.6f}')\n"


def start_script(folder: Path, script: str, *launcher: str) -> subprocess.CompletedProcess[str]:
    """Run a script in a folder."""
    (folder / "train.py").write_text(script)
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests" / "support")])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, *launcher, "train.py"]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)


def said_by(folder: Path, script: str, *launcher: str) -> list[str]:
    """What a script says of its logits, in each process."""
    ran = start_script(folder, f"import torchvision_beside_cpu_torch\n{script}", *launcher)
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
    for number, launcher in enumerate([(), TORCHRUN]):
        folder = tmp_path / str(number)
        folder.mkdir()
        said = said_by(folder, script, *launcher)
        assert len(said) == number + 1 and len({*said}) == 1


# --- killed and resumed ----------------------------------------------------------------------------------------------
DIES = """
import os, signal
from torch.optim.optimizer import register_optimizer_step_post_hook
steps = 0
def count(*_):
    global steps
    steps += 1
    if steps == {step}:
        os.kill(os.getpid(), signal.SIGKILL)
register_optimizer_step_post_hook(count)
"""
SHOWS = """
with torch.no_grad():
    for task in {wsn}.tasks:
        with {wsn}.use_task(task):
            print("task", task, {features}.double().sum().item().hex())
"""


def killed_or_not(folder: Path, script: str, step: int | None) -> list[tuple[str, str]]:
    """What a script says of each task at its end. If there is a ``step``, it is killed then, and started again."""
    folder.mkdir()
    start = "import torchvision_beside_cpu_torch\nimport torch\ntorch.manual_seed(0)\n"
    if step is not None:
        died = start_script(folder, start + DIES.format(step=step) + script)
        assert died.returncode == -signal.SIGKILL, died.stderr
    ran = start_script(folder, start + script)
    assert ran.returncode == 0, ran.stderr
    return re.findall(r"^task (\d) (\S+)$", ran.stdout, re.MULTILINE)


# By page: the package, the optimizer steps of an epoch and of a task, how to find the WSN and what to compute with it.
KILLED = {
    "lightning": ("lightning", 8, 32, "module.wsn", "module.wsn(torch.ones(5, 20))"),
    "clarena": ("clarena", 8, 32, "backbone.wsn", "backbone.wsn(torch.ones(5, 1, 8, 8))"),
    "accelerate": ("accelerate", 16, 32, "wsn", "wsn(torch.ones(5, 20))"),
}


@pytest.fixture(scope="module")
def undisturbed() -> dict[str, list[tuple[str, str]]]:
    """By page, what its script says if it is not killed. The first test of a page fills it in."""
    return {}


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGKILL")
@pytest.mark.parametrize("moment", ["the first task", "the second task"])
@pytest.mark.parametrize("page", KILLED)
def test_a_killed_script_goes_on(
    page: str, moment: str, tmp_path: Path, undisturbed: dict[str, list[tuple[str, str]]]
) -> None:
    """A script that is resumed ends as an undisturbed one; that of Lightning without shuffling, because it does not
    restore random numbers."""
    package, epoch, task, wsn, features = KILLED[page]
    needs(package)
    script = scripts(page)[0].replace('accelerator="auto"', 'accelerator="cpu"')
    script = script.replace("Accelerator()", "Accelerator(cpu=True)")
    if page != "accelerate":
        script = script.replace(", shuffle=True", "")
    script += SHOWS.format(wsn=wsn, features=features)
    if page not in undisturbed:
        undisturbed[page] = killed_or_not(tmp_path / "undisturbed", script, None)
    assert len(undisturbed[page]) == 2 + (page != "clarena")
    step = {"the first task": epoch + 3, "the second task": task + epoch + 3}[moment]
    assert killed_or_not(tmp_path / "killed", script, step) == undisturbed[page]
