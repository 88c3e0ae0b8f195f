"""wsn_fast: Winning SubNetworks (WSN, Kang et al., ICML 2022) for continual learning that forgets nothing, to the
bit."""

import sys
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from types import ModuleType
from typing import TYPE_CHECKING, Any

from . import versions

if TYPE_CHECKING:
    from . import backends as backends
    from . import continual as continual
    from . import nn as nn
    from . import ops as ops
    from . import optim as optim
    from .public import *

versions.check()

try:
    __version__ = version("wsn-fast")
except PackageNotFoundError:  # a checkout that was never installed
    __version__ = "0+unknown"

__all__ = [
    "WSN",
    "CapturedStep",
    "FastSubnetConv1d",
    "FastSubnetConv2d",
    "FastSubnetConv3d",
    "FastSubnetConvTranspose1d",
    "FastSubnetConvTranspose2d",
    "FastSubnetConvTranspose3d",
    "FastSubnetLinear",
    "ForgottenError",
    "OwnershipError",
    "RenamedError",
    "StateError",
    "TaskHeads",
    "UnmaskedReadError",
    "__version__",
    "capture_step",
    "convert",
    "explain",
    "materialize",
    "rename_state",
    "to_dense",
    "topc_mask",
    "topc_threshold",
]

# PyTorch takes a second to import, and `wsn-fast --help` does not need it. So public.py is imported when one of its
# names is read, or one of these folders, which are attributes of the package without an import of their own.
_FOLDERS = ("backends", "continual", "nn", "ops", "optim")


class _Package(ModuleType):
    """The class of this module. ``convert`` and ``explain`` are functions in it; an import of the submodule of the same
    name would put the submodule there."""

    def __setattr__(self, name: str, value: object) -> None:
        if not (name in __all__ and isinstance(value, ModuleType)):
            super().__setattr__(name, value)

    def __reduce__(self) -> tuple[Any, ...]:  # cloudpickle knows modules by their exact class
        return import_module, (self.__name__,)


_package = sys.modules[__name__]
_package.__class__ = _Package

if not TYPE_CHECKING:  # else every misspelt name would pass

    def __getattr__(name):
        if name in _FOLDERS:
            folder = import_module(f".{name}", __name__)
            if _is_half_imported():  # a file of ours asks, and public.py would ask for that file
                return folder
        elif name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}", name=name, obj=_package)
        try:
            from . import public
        except AttributeError as error:  # `from wsn_fast import ...` would hide it
            raise ImportError(f"wsn_fast cannot be imported: {error}") from error
        globals().update({each: getattr(public, each) for each in __all__ if each != "__version__"})
        return globals()[name]

    def __dir__():
        return sorted({*globals(), *__all__, *_FOLDERS})


def _is_half_imported() -> bool:
    ours = [module for name, module in sys.modules.copy().items() if name.startswith(f"{__name__}.")]
    return any(getattr(getattr(module, "__spec__", None), "_initializing", False) for module in ours)
