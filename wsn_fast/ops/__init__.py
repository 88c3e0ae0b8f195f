"""What layers and optimizers compute. The functions here check or allocate, ask :mod:`wsn_fast.backends` which backend
to take, and call it; ``torch.compile`` sees them as operators."""

from ..backends.mask import GateOrder, GradientOrder, RestoreOrder
from .arguments import (
    RULES,
    SCORE_DTYPES,
    check_backend,
    check_bool,
    check_bool_or_count,
    check_density,
    check_rule,
    check_scores,
    constant_threshold,
    key_of,
)
from .gate import gate, gate_at, gate_backward, gate_packed, gates, gates_backward
from .packed_masks import count_packed, pack_mask, packed_size, union_packed, unpack_mask
from .selection import keep_mask, key_at, threshold, threshold_rank, topc_mask, topc_threshold
from .updates import adamw_step, gradient_squares, restore_frozen_, restore_frozen_many, sgd_step

__all__ = [
    "RULES",
    "SCORE_DTYPES",
    "GateOrder",
    "GradientOrder",
    "RestoreOrder",
    "adamw_step",
    "check_backend",
    "check_bool",
    "check_bool_or_count",
    "check_density",
    "check_rule",
    "check_scores",
    "constant_threshold",
    "count_packed",
    "gate",
    "gate_at",
    "gate_backward",
    "gate_packed",
    "gates",
    "gates_backward",
    "gradient_squares",
    "keep_mask",
    "key_at",
    "key_of",
    "pack_mask",
    "packed_size",
    "restore_frozen_",
    "restore_frozen_many",
    "sgd_step",
    "threshold",
    "threshold_rank",
    "topc_mask",
    "topc_threshold",
    "union_packed",
    "unpack_mask",
]
