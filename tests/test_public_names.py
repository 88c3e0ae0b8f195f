"""The public names come with the first use of one, and are then what they would be after ordinary imports."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from pathlib import Path
from types import FunctionType, ModuleType

import pytest

import wsn_fast
from wsn_fast import public, versions

ROOT = Path(__file__).parents[1]
FOLDERS = ("backends", "continual", "nn", "ops", "optim")


def run(code: str, *paths: Path) -> subprocess.CompletedProcess[str]:
    """Run code in a new process, where nothing has been imported; ``paths`` go before all others."""
    lines = [f"import sys; sys.path[:0] = {[*map(str, paths), str(ROOT)]}", code]
    return subprocess.run([sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True, check=False)


def test_nothing_heavy_is_imported_before() -> None:
    heavy = {"torch", "numpy", "wsn_fast.public"}
    result = run(f"import wsn_fast; dir(wsn_fast); print({heavy} & sys.modules.keys() or 'light')")
    assert result.stdout == "light\n", result.stderr


FIRST = {
    "a name": "assert wsn_fast.WSN",
    "a folder": "assert wsn_fast.optim",
    "a module in a folder": "assert wsn_fast.ops.products, wsn_fast.nn.linear",
    "all names": "from wsn_fast import *",
    "a module with the name of a function": "import wsn_fast.explain, wsn_fast.convert.patterns",
    "a module of the library": "import wsn_fast.nn.linear",
    "a pickle": r"import pickle; assert pickle.loads(b'cwsn_fast\nWSN\n.')",
    "eight threads at once": """
from concurrent.futures import ThreadPoolExecutor
with ThreadPoolExecutor(8) as pool:
    found = list(pool.map(lambda i: getattr(wsn_fast, wsn_fast.__all__[i]), [*range(8)] * 4))
assert len(set(found)) == 8
""",
    "a compiled function": """
import torch
compiled = torch.compile(lambda x: wsn_fast.topc_mask(x, 0.5), fullgraph=True, backend="eager")
assert compiled(torch.arange(4.0)).tolist() == [False, False, True, True]
""",
}


@pytest.mark.parametrize("first", FIRST.values(), ids=FIRST)
def test_all_names_are_there_after_the_first_use(first: str) -> None:
    result = run(f"""
import wsn_fast
{first}
assert callable(wsn_fast.convert) and callable(wsn_fast.explain)
from wsn_fast import public
assert all(getattr(wsn_fast, name) is getattr(public, name) for name in wsn_fast.__all__ if name != "__version__")
assert [vars(wsn_fast)[name] for name in {FOLDERS}] == [sys.modules["wsn_fast." + name] for name in {FOLDERS}]
""")
    assert result.returncode == 0, result.stderr


def test_the_list_of_names_is_complete() -> None:
    listed = {name for name, value in vars(public).items() if not name.startswith("_")}
    assert sorted([*listed, "__version__"]) == sorted(wsn_fast.__all__)


def test_dir_has_all_names() -> None:
    result = run("import wsn_fast; print(*dir(wsn_fast))")
    assert set(result.stdout.split()) >= {*wsn_fast.__all__, *FOLDERS, "__doc__", "__file__", "__path__"}


def test_a_misspelt_name_is_an_attribute_error_with_the_name_of_the_module() -> None:
    with pytest.raises(AttributeError, match=r"^module 'wsn_fast' has no attribute 'WNS'$") as caught:
        _ = wsn_fast.WNS
    assert (caught.value.name, caught.value.obj) == ("WNS", wsn_fast)  # Python makes its suggestion from these


def test_a_misspelt_name_cannot_be_imported() -> None:
    with pytest.raises(ImportError, match="cannot import name 'WNS' from 'wsn_fast'"):
        exec("from wsn_fast import WNS")


def test_a_missing_package_is_named(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise ImportError('libcudart is missing')")
    result = run("from wsn_fast import WSN", tmp_path)
    assert result.stderr.splitlines()[-1] == "ImportError: libcudart is missing"


def test_a_package_that_lacks_something_is_not_taken_for_a_misspelt_name(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise AttributeError('torch has no such thing')")
    result = run("from wsn_fast import WSN", tmp_path)
    assert result.stderr.splitlines()[-1] == "ImportError: wsn_fast cannot be imported: torch has no such thing"


def test_the_package_is_pickled_by_its_name() -> None:
    assert pickle.loads(pickle.dumps(wsn_fast)) is wsn_fast
    assert copy.deepcopy(wsn_fast) is wsn_fast


def test_a_name_can_be_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wsn_fast, "convert", len)
    assert wsn_fast.convert is len


def test_functions_and_folders_are_what_they_were() -> None:
    assert isinstance(wsn_fast.convert, FunctionType)
    assert isinstance(wsn_fast.explain, FunctionType)
    assert isinstance(wsn_fast.nn, ModuleType)


# --- versions that are too old
@pytest.mark.parametrize(("name", "installed"), [("torch", "2.10.0+cpu"), ("torch", "1.13.1"), ("numpy", "1.26.4")])
def test_an_old_version_is_an_import_error_with_one_sentence(tmp_path: Path, name: str, installed: str) -> None:
    folder = tmp_path / f"{name}-{installed}.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {installed}\n")
    result = run("import wsn_fast", tmp_path)
    oldest = ".".join(map(str, versions.OLDEST[name]))
    assert result.stderr.splitlines()[-1] == (
        f"ImportError: wsn_fast needs {name} {oldest} or newer, and this is {name} {installed}: "
        f"pip install --upgrade {name}"
    )


@pytest.mark.parametrize("installed", ["2.11.0", "2.11.0a0+git1234567", "2.100", "10.0.0", "unknown"])
def test_another_version_is_no_error(monkeypatch: pytest.MonkeyPatch, installed: str) -> None:
    monkeypatch.setattr(versions, "version", lambda name: installed)
    versions.check()


def test_an_old_python_is_an_import_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "version_info", (3, 9, 18))
    monkeypatch.setattr(versions.platform, "python_version", lambda: "3.9.18")
    with pytest.raises(ImportError, match=r"^wsn_fast needs Python 3.10 or newer, and this is Python 3.9.18$"):
        versions.check()


def test_a_package_that_was_not_installed_is_left_to_its_import(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise versions.PackageNotFoundError(name)

    monkeypatch.setattr(versions, "version", missing)
    versions.check()
