"""Code of one's own that makes the tasks of a stream, by its name ``FILE.py:FUNCTION`` or ``MODULE:FUNCTION``."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from wsn_fast.train.data.files import DataError
from wsn_fast.train.samples.randomness import Randomness
from wsn_fast.train.samples.users_code import in_users_code
from wsn_fast.train.streams.kinds import generator
from wsn_fast.train.task import Task


def call(name: str, data_dir: str | None, seed: int) -> Sequence[Task]:
    """What the function returns for the folder of the data, which may be None.

    Args:
        name: the name of the function.
        data_dir: its argument.
        seed: decides what it draws from the generators of torch, NumPy and Python.

    Raises:
        DataError: there is no such file, module or function.
        LoadingError: the code has failed.
    """
    place, _, function = name.rpartition(":")
    with in_users_code(name, Randomness(generator(seed, "making of all tasks").initial_seed())):
        module = _file(Path(place)) if place.endswith(".py") else _module(place)
        made = getattr(module, function, None)
        if not callable(made):
            raise DataError(f"data: {place} has no function {function!r} (of {name!r})")
        tasks: Sequence[Task] = made(data_dir)
    return tasks


def _file(path: Path) -> Any:
    if not path.is_file():
        raise DataError(f"data: there is no file {path}")
    if "." in path.stem:
        raise DataError(f"data: a module cannot be called {path.stem!r}, with a dot: give {path} another name")
    real = path.resolve()  # the modules beside the file of a link are found, as when Python runs the link
    path = real if real.suffix == ".py" and "." not in real.stem else path.absolute()
    # A process that loads data imports the file by its name, so its folder is where modules are looked for.
    folder = str(path.parent)
    if folder not in sys.path:
        sys.path.insert(0, folder)
    module = _module(path.stem)
    if Path(getattr(module, "__file__", None) or "").resolve() != path.resolve():
        raise DataError(f"data: another module is called {path.stem!r} already: give {path} another name")
    return module


def _module(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if not f"{name}.".startswith(f"{error.name}."):  # it is there, and misses something itself
            raise
        raise DataError(f"data: there is no module {name!r}") from error
