"""Imports run one way. Every room of wsn_fast has a floor in ``FLOORS`` and imports from below it only."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

# Low to high: the floors of the house. A room imports from lower floors, and its files from each other.
# "" is wsn_fast/__init__.py: it exports what lies below the driver, which uses the public names as anybody does. It
# imports "public" when the first of them is read.
FLOORS = [
    {"choices", "kernels", "launch", "page", "reference", "versions"},
    {"backends"},
    {"ops"},
    {"nn"},
    {"explain", "convert"},
    {"continual"},
    {"optim", "presets"},
    {"distributed"},
    {"public"},
    {""},
    {"train", "integrations", "doctor"},
]
FILES = ("choices", "explain", "launch", "public", "versions")  # rooms of one file
FLOOR_OF = {name: floor for floor, names in enumerate(FLOORS) for name in names}


def imported(path: Path, module: tuple[str, ...]) -> Iterator[tuple[int, tuple[str, ...]]]:
    """Yield (line, absolute dotted name) for every import of a file, wherever in it.

    ``from a import b`` gives a.b. ``module`` is the file's own dotted name, with ``__init__`` for a package.
    """
    for node in ast.walk(ast.parse(path.read_text("utf-8"), str(path))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, tuple(alias.name.split("."))) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = module[: -node.level] if node.level else ()
            base += tuple(node.module.split(".")) if node.module else ()
            yield from ((node.lineno, (*base, alias.name)) for alias in node.names)


def part_of(name: tuple[str, ...], package: Path) -> str | None:
    """The entry of FLOORS that a dotted name belongs to; None outside wsn_fast."""
    if name[0] != "wsn_fast":
        return None
    first = name[1] if len(name) > 1 else ""
    is_module = (package / first).is_dir() or (package / f"{first}.py").is_file()
    return first if is_module else ""


def violations(package: Path) -> list[str]:
    """Every import against the arrows, and every module without a place, in one ``wsn_fast`` folder."""
    found = []
    files = {
        *package.rglob("*.py"),
        *(package / "kernels").rglob("*.py"),
    }  # rglob need not follow the symlink
    for path in sorted(files):
        relative = path.relative_to(package)
        module = ("wsn_fast", *relative.with_suffix("").parts)
        own = "" if relative.parts == ("__init__.py",) else module[1]
        if own not in FLOOR_OF:
            found.append(f"{relative}: {own!r} has no floor in FLOORS")
            continue
        for line, name in imported(path, module):
            if own == "kernels" and name[0] == "kernels":
                found.append(f"{relative}:{line}: imports {'.'.join(name)}, not relatively")
            part = part_of(name, package)
            if part == "reference" and own != "reference":
                found.append(f"{relative}:{line}: {own or '__init__'} imports the oracle, {'.'.join(name)}")
            elif part is not None and part != own and FLOOR_OF.get(part, len(FLOORS)) >= FLOOR_OF[own]:
                found.append(f"{relative}:{line}: {own or '__init__'} imports {'.'.join(name)}")
    return found


def make_package(root: Path, files: dict[str, str]) -> Path:
    package = root / "wsn_fast"
    for name, text in files.items():
        path = package / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return package


def test_imports_run_one_way() -> None:
    assert violations(ROOT / "wsn_fast") == []


def test_every_room_is_read() -> None:
    read = {name for name in FLOOR_OF if name and part_of(("wsn_fast", name), ROOT / "wsn_fast") == name}
    assert read == FLOOR_OF.keys() - {""}


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("ops/gate.py", "from ..nn import linear"),
        ("ops/gate.py", "from ..nn.linear import FastSubnetLinear"),
        ("ops/gate.py", "import wsn_fast.nn.linear"),
        ("ops/gate.py", "from wsn_fast import FastSubnetLinear"),
        ("ops/gate.py", "def f():\n    from wsn_fast import nn"),
        ("ops/gate.py", "if TYPE_CHECKING:\n    from ..nn.linear import FastSubnetLinear"),
        ("nn/heads.py", "from ..convert.patterns import matches"),
        ("continual/wsn.py", "from ..optim.optimizers import SubnetAdamW"),
        ("optim/capture.py", "from ..train.data import split"),
        ("continual/wsn.py", "from ..distributed import leave_alone"),
        ("explain.py", "from .convert import to_dense"),
        ("__init__.py", "from .train import data"),
        ("__init__.py", "def __getattr__(name):\n    from . import train"),
        ("public.py", "from .train.data import load as load"),
        ("optim/capture.py", "from ..public import WSN"),
        ("choices.py", "from .ops import RULES"),
        ("kernels/gate.py", "from .. import ops"),
        ("kernels/gate.py", "from ..nn.task_ids import check_task"),
        ("kernels/gate.py", "import wsn_fast.reference"),
        ("kernels/gate.py", "from kernels._bits import order_key"),
        ("backends/native/__init__.py", "from ...ops import topc_mask"),
        ("backends/torch.py", "from ..reference import specification"),
        ("novelty.py", "import torch"),
    ],
)
def test_violation_is_found(tmp_path: Path, name: str, text: str) -> None:
    rooms = {f"{room}/__init__.py": "" for room in FLOOR_OF if room not in ("", *FILES)}
    files = {f"{file}.py": "" for file in FILES}
    package = make_package(tmp_path, {**rooms, **files, "__init__.py": "", name: text})
    assert [line.split(":")[0] for line in violations(package)] == [name]


def test_allowed_imports_pass(tmp_path: Path) -> None:
    package = make_package(
        tmp_path,
        {
            "__init__.py": "from .continual.wsn import WSN",
            "continual/wsn.py": "from .. import ops\nfrom .guard import guard",
            "continual/guard.py": "import torch.optim",
            "ops/__init__.py": "from ..backends import torch",
            "backends/__init__.py": "from . import native",
            "backends/native.py": "from ..kernels import gate",
            "kernels/gate.py": "import triton\nfrom ._bits import order_key",
            "train/loop.py": "from wsn_fast import WSN\nfrom ..continual.wsn import WSN",
        },
    )
    assert violations(package) == []


def test_import_stays_light() -> None:
    heavy = {"matplotlib", "wsn_fast.train", "torch._dynamo", "triton"}
    code = f"import sys; from wsn_fast import WSN; print({heavy} & sys.modules.keys() or 'light')"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "light"


def test_nothing_of_the_checkout_is_needed() -> None:
    """An installed package has neither ``benchmarks`` nor ``tests``."""
    outside = {"benchmarks", "tests", "conftest", *(path.stem for path in (ROOT / "tests" / "support").iterdir())}
    found = [
        f"{path.relative_to(ROOT)}:{line}"
        for path in (ROOT / "wsn_fast").rglob("*.py")
        for line, name in imported(path, ("wsn_fast", *path.relative_to(ROOT / "wsn_fast").with_suffix("").parts))
        if name[0] in outside
    ]
    assert found == []
