"""Library and benchmarks keep the limits of the house: short files, short functions, few parameters."""

from __future__ import annotations

import ast
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[2]
FOLDERS = ("wsn_fast", "kernels", "benchmarks")

FILE_LINES = 400
MEDIAN_LINES = 160
FUNCTION_LINES = 50
KERNEL_LINES = 60  # what a kernel keeps in registers cannot be handed around
PARAMETERS = 8


class Function(NamedTuple):
    """A function of the source.

    Attributes:
        where: its file, relative to the root.
        name: its name, with that of its class.
        node: its syntax tree.
        in_class: whether it is a method.
        nested: whether it stands inside another function.
    """

    where: Path
    name: str
    node: ast.FunctionDef | ast.AsyncFunctionDef
    in_class: bool
    nested: bool

    def __str__(self) -> str:
        return f"{self.where}:{self.node.lineno} {self.name}"

    @property
    def code_lines(self) -> int:
        """The lines of its body, without the docstring. A kernel's signature, with a comment on the shape of each
        argument, is no code."""
        body = self.node.body[1:] if ast.get_docstring(self.node) is not None else self.node.body
        return (body[-1].end_lineno or 0) - body[0].lineno + 1 if body else 0

    @property
    def positional(self) -> list[str]:
        names = [argument.arg for argument in (*self.node.args.posonlyargs, *self.node.args.args)]
        return names[1:] if self.in_class and names and names[0] in ("self", "cls", "ctx") else names

    @property
    def counted_parameters(self) -> int:
        """All parameters; of a public function the keyword-only options do not count."""
        public = not self.name.rpartition(".")[2].startswith("_") and not self.nested
        return len(self.positional) + (0 if public else len(self.node.args.kwonlyargs))

    @property
    def is_constructor(self) -> bool:
        return self.in_class and self.node.name in ("__init__", "__new__")

    @property
    def is_kernel_or_launcher(self) -> bool:
        """Kernels and the functions that launch them: all that stands in ``kernels/``."""
        return self.where.parts[0] == "kernels"


def source_files(root: Path = ROOT) -> list[Path]:
    files = {path for folder in FOLDERS for path in (root / folder).rglob("*.py")}
    return sorted(path for path in files if not path.is_relative_to(root / "wsn_fast" / "kernels"))


def functions_of(where: Path, tree: ast.AST) -> Iterator[Function]:
    def visit(node: ast.AST, prefix: str, in_class: bool, nested: bool) -> Iterator[Function]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
                yield Function(where, prefix + child.name, child, in_class, nested)
                yield from visit(child, f"{prefix}{child.name}.", False, True)
            elif isinstance(child, ast.ClassDef):
                yield from visit(child, f"{prefix}{child.name}.", True, nested)
            else:
                yield from visit(child, prefix, in_class, nested)

    yield from visit(tree, "", False, False)


def all_functions() -> list[Function]:
    return [
        function
        for path in source_files()
        for function in functions_of(path.relative_to(ROOT), ast.parse(path.read_text("utf-8"), str(path)))
    ]


def lines_of(path: Path) -> int:
    return len(path.read_text("utf-8").splitlines())


def test_no_file_is_long() -> None:
    long = {str(path.relative_to(ROOT)): lines_of(path) for path in source_files() if lines_of(path) > FILE_LINES}
    assert not long, f"files of more than {FILE_LINES} lines: {long}"


def test_most_files_are_short() -> None:
    """Files without code (a package's ``__init__.py`` that only says what it is) do not count."""
    lengths = [lines_of(path) for path in source_files() if lines_of(path) > 1]
    assert statistics.median(lengths) < MEDIAN_LINES


def test_no_function_is_long() -> None:
    long = []
    for function in all_functions():
        bound = KERNEL_LINES if function.is_kernel_or_launcher else FUNCTION_LINES
        if function.code_lines > bound:
            long.append(f"{function}: {function.code_lines}, more than {bound}")
    assert not long, "lines of code of long functions:\n" + "\n".join(long)


def test_no_function_has_many_parameters() -> None:
    """Constructors, kernels and their launchers may have more, and keyword-only options of public functions do not
    count. (The C ABI is called through ``ctypes``: its bindings are tables of types, and no functions.)"""
    many = [
        f"{function}: {function.counted_parameters}"
        for function in all_functions()
        if not function.is_constructor
        and not function.is_kernel_or_launcher
        and function.counted_parameters > PARAMETERS
    ]
    assert not many, f"functions with more than {PARAMETERS} parameters:\n" + "\n".join(many)


@pytest.mark.parametrize(
    ("source", "counted"),
    [
        ("def f(a, b, c): pass", 3),
        ("def f(a, *, b, c): pass", 1),
        ("def _f(a, *, b, c): pass", 3),
        ("class A:\n    def f(self, a, /, b): pass", 2),
        ("class A:\n    @staticmethod\n    def forward(ctx, a, b): pass", 2),
    ],
)
def test_parameters_are_counted_as_the_rule_says(source: str, counted: int) -> None:
    (function,) = functions_of(Path("wsn_fast/x.py"), ast.parse(source))
    assert function.counted_parameters == counted


def test_a_docstring_is_no_code() -> None:
    source = 'def f():\n    """One.\n\n    Two.\n    """\n    return 1\n'
    (function,) = functions_of(Path("wsn_fast/x.py"), ast.parse(source))
    assert function.code_lines == 1
