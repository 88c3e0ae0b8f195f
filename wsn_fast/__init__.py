"""wsn_fast: Winning SubNetworks (WSN, Kang et al., ICML 2022) for continual learning that forgets nothing, to the
bit."""

from importlib.metadata import PackageNotFoundError, version

from .continual.fingerprints import ForgottenError
from .continual.loading import StateError
from .continual.ownership import OwnershipError
from .continual.probe import UnmaskedReadError
from .continual.renames import RenamedError, rename_state
from .continual.wsn import WSN
from .convert import convert, materialize, to_dense
from .explain import explain
from .nn.conv import FastSubnetConv1d, FastSubnetConv2d, FastSubnetConv3d
from .nn.conv_transpose import FastSubnetConvTranspose1d, FastSubnetConvTranspose2d, FastSubnetConvTranspose3d
from .nn.heads import TaskHeads
from .nn.linear import FastSubnetLinear
from .ops import topc_mask, topc_threshold
from .optim.capture import CapturedStep, capture_step

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
