"""Imports run one way. Every module of wsn_fast has a place in ``LEVELS`` and imports from below it only."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# Low to high. A module imports from lower levels, and inside a package folder from its siblings.
# "" is wsn_fast/__init__.py: below the driver, which may use the public names as anybody does.
LEVELS = [
    {"kernels", "reference", "tasks", "patterns"},
    {"reference_trainer"},
    {"backends"},
    {"ops", "products"},
    {"autograd"},
    {"subnet", "heads", "per_task"},
    {"layers"},
    {"convert", "dense", "explain", "masks", "materialize"},
    {"ownership"},
    {"parts"},
    {"promise", "guard", "pairs", "rows"},
    {"optim"},
    {"wsn"},
    {"capture"},
    {""},
    {"train", "integrations", "doctor"},
]
LEVEL_OF = {name: level for level, names in enumerate(LEVELS) for name in names}


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
    """The entry of LEVELS that a dotted name belongs to; None outside wsn_fast."""
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
        if own not in LEVEL_OF:
            found.append(f"{relative}: {own!r} has no place in LEVELS")
            continue
        for line, name in imported(path, module):
            if own == "kernels" and name[0] == "kernels":
                found.append(f"{relative}:{line}: imports {'.'.join(name)}, not relatively")
            part = part_of(name, package)
            if part is not None and part != own and LEVEL_OF.get(part, len(LEVELS)) >= LEVEL_OF[own]:
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


def test_every_module_is_read() -> None:
    read = {name for name in LEVEL_OF if name and part_of(("wsn_fast", name), ROOT / "wsn_fast") == name}
    assert {"kernels", "backends", "ops", "layers", "wsn", "train"} <= read


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("ops.py", "from .layers import FastSubnetLinear"),
        ("ops.py", "from . import layers"),
        ("ops.py", "import wsn_fast.layers"),
        ("ops.py", "from wsn_fast import FastSubnetLinear"),
        ("ops.py", "def f():\n    from wsn_fast import layers"),
        ("ops.py", "if TYPE_CHECKING:\n    from .layers import FastSubnetLinear"),
        ("heads.py", "from .layers import FastSubnetLinear"),
        ("optim.py", "from .wsn import WSN"),
        ("wsn.py", "from .train.data import split"),
        ("__init__.py", "from .train import data"),
        ("kernels/mask.py", "from .. import ops"),
        ("kernels/mask.py", "from ..tasks import check_task"),
        ("kernels/mask.py", "import wsn_fast.reference"),
        ("kernels/mask.py", "from kernels._bits import order_key"),
        ("novelty.py", "import torch"),
        ("backends/native.py", "from ..ops import topc_mask"),
    ],
)
def test_violation_is_found(tmp_path: Path, name: str, text: str) -> None:
    known = dict.fromkeys(["__init__.py", "ops.py", "layers.py", "wsn.py", "train/__init__.py", "reference.py"], "")
    package = make_package(tmp_path, {**known, "kernels/__init__.py": "", "tasks.py": "", name: text})
    assert [line.split(":")[0] for line in violations(package)] == [name]


def test_allowed_imports_pass(tmp_path: Path) -> None:
    package = make_package(
        tmp_path,
        {
            "__init__.py": "from .wsn import WSN",
            "wsn.py": "from . import ops\nfrom .guard import guard",
            "guard.py": "import torch.optim",
            "ops.py": "from .backends import torch",
            "backends/__init__.py": "from . import native",
            "backends/native.py": "from ..kernels import mask",
            "kernels/mask.py": "import triton\nfrom ._bits import order_key",
            "train/loop.py": "from wsn_fast import WSN\nfrom ..wsn import WSN",
        },
    )
    assert violations(package) == []


def test_import_stays_light() -> None:
    code = "import sys, wsn_fast; print({'matplotlib', 'wsn_fast.train'} & sys.modules.keys() or 'light')"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "light"
