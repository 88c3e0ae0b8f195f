"""What is compiled of every kernel module, to see whether it fits a GPU. The module of the same name here has the
cases: every tile, and what takes the most registers or shared memory. What else the backend can launch is added to
them, so that no form is left out.

The tests and ``benchmarks/resources.py`` compile them; see ``tests/support/kernel_resources.py``.
"""

from __future__ import annotations

import importlib
import pkgutil
from itertools import chain

from compiling import CompileCase


def all_cases() -> dict[str, list[CompileCase]]:
    """The cases of every module of ``wsn_fast.kernels`` that has kernels, by the module's name."""
    names = sorted(module.name for module in pkgutil.iter_modules(__path__) if not module.name.startswith("_"))
    cases = {name: importlib.import_module(f".{name}", __name__).compile_cases() for name in names}
    launches = importlib.import_module("backend_launches").launches().values()
    written = [*chain.from_iterable(cases.values())]
    for launch in importlib.import_module("._traits", __name__).left_out(chain.from_iterable(launches), written):
        cases[launch.fn.__module__.rpartition(".")[2]].append(launch)
    return cases
