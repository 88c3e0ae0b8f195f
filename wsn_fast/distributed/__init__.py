"""What a :class:`wsn_fast.WSN` needs beside ``torch.distributed`` where several processes train it."""

from .ddp import leave_alone, reduce_in_bfloat16

__all__ = ["leave_alone", "reduce_in_bfloat16"]
