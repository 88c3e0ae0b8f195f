"""Every launch of a kernel decides what Triton would otherwise warn about."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

KERNELS = Path(__file__).parents[2] / "kernels"


def launches(tree: ast.AST) -> Iterator[ast.Call]:
    """The calls of the form ``some_kernel[grid](...)``."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Subscript):
            name = node.func.value
            if isinstance(name, ast.Name) and name.id.endswith("kernel"):
                yield node


def decides_fusion(launch: ast.Call) -> bool:
    """Whether ``**FP_FUSION`` is among the arguments."""
    return any(
        argument.arg is None and isinstance(argument.value, ast.Name) and argument.value.id == "FP_FUSION"
        for argument in launch.keywords
    )


def test_every_launch_decides_fp_fusion() -> None:
    found = {path.name: list(launches(ast.parse(path.read_text("utf-8")))) for path in KERNELS.glob("*.py")}
    undecided = [f"{name}:{call.lineno}" for name, calls in found.items() for call in calls if not decides_fusion(call)]
    assert not undecided, f"launches without **FP_FUSION: {undecided}"
    assert sum(map(len, found.values())) > 20


@pytest.mark.parametrize(
    ("source", "decides"),
    [
        ("a_kernel[grid](x_ptr=x, **FP_FUSION)", True),
        ("a_kernel[grid](x_ptr=x)", False),
        ("kernel[(1,)](**form, num_warps=1)", False),
    ],
)
def test_launches_are_found(source: str, decides: bool) -> None:
    (launch,) = launches(ast.parse(source))
    assert decides_fusion(launch) is decides
