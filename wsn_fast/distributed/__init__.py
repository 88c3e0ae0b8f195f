"""What a :class:`wsn_fast.WSN` needs beside ``torch.distributed`` where several processes train it."""

from .checkpoint import load_checkpoint, load_optimizer, save_checkpoint
from .ddp import leave_alone, level_buffers, reduce_in_bfloat16
from .sharded import full_state_dict, load_full_state_dict, shard

__all__ = [
    "full_state_dict",
    "leave_alone",
    "level_buffers",
    "load_checkpoint",
    "load_full_state_dict",
    "load_optimizer",
    "reduce_in_bfloat16",
    "save_checkpoint",
    "shard",
]
