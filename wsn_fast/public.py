"""The public names. ``wsn_fast/__init__.py`` imports this file when the first of them is read."""

from .continual.fingerprints import ForgottenError as ForgottenError
from .continual.loading import StateError as StateError
from .continual.ownership import OwnershipError as OwnershipError
from .continual.probe import UnmaskedReadError as UnmaskedReadError
from .continual.renames import RenamedError as RenamedError
from .continual.renames import rename_state as rename_state
from .continual.wsn import WSN as WSN
from .convert import convert as convert
from .convert import materialize as materialize
from .convert import to_dense as to_dense
from .explain import explain as explain
from .nn.conv import FastSubnetConv1d as FastSubnetConv1d
from .nn.conv import FastSubnetConv2d as FastSubnetConv2d
from .nn.conv import FastSubnetConv3d as FastSubnetConv3d
from .nn.conv_transpose import FastSubnetConvTranspose1d as FastSubnetConvTranspose1d
from .nn.conv_transpose import FastSubnetConvTranspose2d as FastSubnetConvTranspose2d
from .nn.conv_transpose import FastSubnetConvTranspose3d as FastSubnetConvTranspose3d
from .nn.heads import TaskHeads as TaskHeads
from .nn.linear import FastSubnetLinear as FastSubnetLinear
from .ops import topc_mask as topc_mask
from .ops import topc_threshold as topc_threshold
from .optim.capture import CapturedStep as CapturedStep
from .optim.capture import capture_step as capture_step
