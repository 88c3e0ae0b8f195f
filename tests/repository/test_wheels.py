"""The workflow that builds wheels, and what ``pyproject.toml`` tells cibuildwheel: every platform, every file that is
named, nothing published but a tag."""

from __future__ import annotations

import re
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
import yaml

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[2]
WORKFLOW = ROOT / ".github" / "workflows" / "wheels.yml"


@pytest.fixture(scope="module")
def workflow() -> dict[Any, Any]:
    return yaml.safe_load(WORKFLOW.read_text("utf-8"))


@pytest.fixture(scope="module")
def pyproject() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))


@pytest.fixture(scope="module")
def options(pyproject: dict[str, Any]) -> dict[str, Any]:
    return pyproject["tool"]["cibuildwheel"]


def commands(job: dict[str, Any]) -> str:
    return "\n".join(step.get("run", "") for step in job["steps"])


@pytest.mark.parametrize(
    "wheel",
    ["manylinux_2_28_x86_64", "manylinux_2_28_aarch64", "macosx_11_0_arm64", "macosx_10_13_x86_64", "win_amd64"],
)
def test_every_platform_has_a_wheel(workflow: dict[Any, Any], wheel: str) -> None:
    tags = [one["tag"] for one in workflow["jobs"]["wheels"]["strategy"]["matrix"]["include"]]
    assert len([tag for tag in tags if fnmatch(wheel, tag)]) == 1


def test_no_platform_fits_a_wheel_without_a_library(workflow: dict[Any, Any]) -> None:
    assert not [
        one for one in workflow["jobs"]["wheels"]["strategy"]["matrix"]["include"] if fnmatch("any", one["tag"])
    ]


def test_only_a_tag_is_published(workflow: dict[Any, Any]) -> None:
    publishing = [
        name
        for name, job in workflow["jobs"].items()
        if any("pypi-publish" in step.get("uses", "") for step in job["steps"])
    ]
    assert publishing == ["publish"]
    assert workflow["jobs"]["publish"]["if"] == "github.event_name == 'push' && startsWith(github.ref, 'refs/tags/v')"


def test_what_is_published_was_tried(workflow: dict[Any, Any]) -> None:
    assert set(workflow["jobs"]["publish"]["needs"]) == {"sdist", "wheels"}
    assert workflow["jobs"]["wheels"]["needs"] == "sdist"


def test_only_the_job_that_publishes_can_write(workflow: dict[Any, Any]) -> None:
    assert workflow["permissions"] == {"contents": "read"}
    granted = {name: job["permissions"] for name, job in workflow["jobs"].items() if "permissions" in job}
    assert granted == {"publish": {"id-token": "write"}}


def test_every_artifact_that_is_published_was_uploaded(workflow: dict[Any, Any]) -> None:
    steps = [step for job in workflow["jobs"].values() for step in job["steps"]]
    uploaded = [step["with"]["name"] for step in steps if "upload-artifact" in step.get("uses", "")]
    (pattern,) = (step["with"]["pattern"] for step in workflow["jobs"]["publish"]["steps"] if "with" in step)
    assert len(uploaded) == 2 and all(fnmatch(name, pattern) for name in uploaded)


def test_wheels_are_made_from_the_source_distribution(workflow: dict[Any, Any]) -> None:
    assert "cibuildwheel dist/*.tar.gz" in commands(workflow["jobs"]["wheels"])


def test_the_tests_in_c_run_on_every_platform(workflow: dict[Any, Any]) -> None:
    assert re.search(r"-DWSN_TESTS=ON\n.*\nctest ", commands(workflow["jobs"]["wheels"]))


def test_every_program_has_one_version(workflow: dict[Any, Any]) -> None:
    installed = re.findall(r"pip install (.+)", "\n".join(map(commands, workflow["jobs"].values())))
    names = " ".join(installed).split()
    assert len(names) == 3 and [name for name in names if "==" not in name] == []


def test_every_file_that_is_named_exists(workflow: dict[Any, Any], options: dict[str, Any]) -> None:
    events = workflow[True]  # YAML 1.1 takes the word "on" for true
    named = [*events["pull_request"]["paths"], *re.findall(r"\{project\}/(\S+)", options["test-command"])]
    assert len(named) >= 6
    assert [name for name in named if not list(ROOT.glob(name))] == []


def test_each_wheel_is_tried(options: dict[str, Any]) -> None:
    assert options["test-command"] == "python {project}/tests/support/installed.py"
    assert options["test-skip"] == ["*-macosx_x86_64"]


def test_the_oldest_python_tries_it(options: dict[str, Any], pyproject: dict[str, Any]) -> None:
    oldest = pyproject["project"]["requires-python"].removeprefix(">=").replace(".", "")
    assert options["build"][0] == f"cp{oldest}-*"


def test_the_wheel_is_for_all_pythons(pyproject: dict[str, Any]) -> None:
    assert pyproject["tool"]["scikit-build"]["wheel"]["py-api"] == "py3"


def test_no_build_downloads_torch(options: dict[str, Any], pyproject: dict[str, Any]) -> None:
    required = pyproject["build-system"]["requires"]
    before = [
        table[key]
        for table in (options, *options.values())
        if isinstance(table, dict)
        for key in table
        if key.startswith("before-b")
    ]
    assert not [line for line in [*required, *before] if "torch" in line]


def test_the_trial_fails_without_the_library() -> None:
    """As it would for a wheel whose build has failed: the package would install, and PyTorch would do the work."""
    code = (
        "import runpy; from wsn_fast.backends import native\n"
        "from wsn_fast.backends.native.shared_library import NativeLibrary\n"
        "native.load = lambda: NativeLibrary(None, 'it was not built')\n"
        f"runpy.run_path({str(ROOT / 'tests' / 'support' / 'installed.py')!r}, run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and "AssertionError: it was not built" in done.stderr
