"""wsn_fast: Winning SubNetworks (WSN, Kang et al., ICML 2022) for continual learning that forgets nothing, to the
bit."""

from importlib.metadata import PackageNotFoundError, version

from .capture import CapturedStep, capture_step
from .convert import convert
from .dense import to_dense
from .explain import explain
from .heads import TaskHeads
from .layers import FastSubnetConv1d, FastSubnetConv2d, FastSubnetConv3d, FastSubnetLinear
from .materialize import materialize
from .ops import topc_mask, topc_threshold
from .ownership import OwnershipError
from .promise import ForgottenError
from .wsn import WSN

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
    "FastSubnetLinear",
    "ForgottenError",
    "OwnershipError",
    "TaskHeads",
    "__version__",
    "capture_step",
    "convert",
    "explain",
    "materialize",
    "to_dense",
    "topc_mask",
    "topc_threshold",
]
