"""The package is what it says it is: light to build, one version, kernels and data included."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import pytest

import wsn_fast

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[2]
needs_backend = pytest.mark.skipif(
    importlib.util.find_spec("scikit_build_core") is None, reason="scikit_build_core is not installed"
)


@pytest.fixture(scope="module")
def pyproject() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))


def name_of(requirement: str) -> str:
    return re.split(r"[^\w-]", requirement)[0]


def build(*command: str | Path) -> None:
    """Run a build in a process of its own, without the native library."""
    env = {**os.environ, "WSN_FAST_NATIVE": "0"}
    result = subprocess.run([sys.executable, *command], cwd=ROOT, env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


def package_files() -> set[str]:
    """Every file of the package, kernels and data included, by its name inside an archive."""
    package = ROOT / "wsn_fast"
    paths = {*package.rglob("*"), *(package / "kernels").rglob("*")}  # rglob need not follow the symlink
    files = {path for path in paths if path.is_file() and "__pycache__" not in path.parts}
    return {path.relative_to(ROOT).as_posix() for path in files}


def test_build_requires_no_torch(pyproject: dict[str, Any]) -> None:
    assert [name_of(requirement) for requirement in pyproject["build-system"]["requires"]] == ["scikit-build-core"]


def test_torch_has_no_upper_bound(pyproject: dict[str, Any]) -> None:
    assert "torch>=2.11" in pyproject["project"]["dependencies"]


def test_constraints_pin_every_direct_dependency(pyproject: dict[str, Any]) -> None:
    extras = pyproject["project"]["optional-dependencies"]
    chosen = ("test", "dev", "docs", "lightning", "clarena")
    direct = [*pyproject["project"]["dependencies"], *(line for extra in chosen for line in extras[extra])]
    pinned = re.findall(r"^([\w-]+)==", (ROOT / "constraints.txt").read_text("utf-8"), re.MULTILINE)
    # torch's CUDA wheels pin the triton that they need, and CPU wheels take any.
    # mkdocs and mkdocstrings-python are what the extra "docs" is about, and come with its packages.
    ours = {"triton", "wsn-fast"}
    assert {name_of(one) for one in direct} - ours == set(pinned) - {"mkdocs", "mkdocstrings-python"}


@pytest.mark.skipif(wsn_fast.__version__ == "0+unknown", reason="wsn-fast is not installed")
def test_version_is_the_same_everywhere(pyproject: dict[str, Any]) -> None:
    assert wsn_fast.__version__ == pyproject["project"]["version"]


@pytest.mark.skipif((ROOT / "PKG-INFO").exists(), reason="a source distribution holds a copy instead")
def test_kernels_is_a_relative_symlink() -> None:
    assert os.readlink(ROOT / "wsn_fast" / "kernels") == os.path.join("..", "kernels")


@needs_backend
def test_wheel_has_the_whole_package(tmp_path: Path) -> None:
    build("-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", tmp_path, ".")
    (wheel,) = tmp_path.glob("wsn_fast-*-py3-none-any.whl")
    with zipfile.ZipFile(wheel) as archive:
        assert package_files() - set(archive.namelist()) == set()


@needs_backend
def test_sdist_has_all_that_a_build_needs(tmp_path: Path) -> None:
    build("-c", "import sys; from scikit_build_core.build import build_sdist as b; b(sys.argv[1])", tmp_path)
    (sdist,) = tmp_path.glob("wsn_fast-*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    native = {path.relative_to(ROOT).as_posix() for path in (ROOT / "csrc").rglob("*.*")}
    assert package_files() | native | {"pyproject.toml", "CMakeLists.txt", "LICENSE"} <= names
