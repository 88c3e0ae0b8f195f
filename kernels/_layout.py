"""Names for the places in the tables and states that several kernels share, for the host code and for the kernels.

Each table is an array of numbers on the device. A kernel reads ``tl.load(state_ptr + layout.STATE_LOW)`` and the code
that wrote this number used the same name. The names are ``tl.constexpr``: inside a kernel they are constants, and on
the host they index lists.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Rows of ``UpdateTable.fields``, int64 [FIELDS, tensors]: addresses and two numbers.
FIELD_WEIGHT = tl.constexpr(0)
FIELD_SCORES = tl.constexpr(1)
FIELD_WEIGHT_STATE_1 = tl.constexpr(2)  # AdamW: the running mean of the gradient; SGD: the momentum
FIELD_WEIGHT_STATE_2 = tl.constexpr(3)  # AdamW: the running mean of the squared gradient
FIELD_SCORES_STATE_1 = tl.constexpr(4)
FIELD_SCORES_STATE_2 = tl.constexpr(5)
FIELD_UNION = tl.constexpr(6)
FIELD_MASKED = tl.constexpr(7)
FIELD_WEIGHT_STEP = tl.constexpr(8)
FIELD_SCORES_STEP = tl.constexpr(9)
FIELD_FIRST_PROGRAM = tl.constexpr(10)  # the first program that works on the tensor
FIELD_NUMEL = tl.constexpr(11)
FIELD_WEIGHT_SCALES_1 = tl.constexpr(12)  # of the states' blocks, where these are stored in 8 bits; else 0
FIELD_WEIGHT_SCALES_2 = tl.constexpr(13)
FIELD_SCORES_SCALES_1 = tl.constexpr(14)
FIELD_SCORES_SCALES_2 = tl.constexpr(15)
FIELDS = 16

# Rows of the table of gradients, int64 [GRADIENTS, tensors]: addresses that may change at every step.
GRADIENT_WEIGHT = tl.constexpr(0)  # G, or dW where the gradients are given
GRADIENT_TAU = tl.constexpr(1)  # the threshold of the last forward pass; 0 where the gradients are given
GRADIENT_SCORES = tl.constexpr(2)  # dS where the gradients are given, else 0
GRADIENT_SCALE = tl.constexpr(3)  # the factor for dW and dS, or 0
GRADIENTS = 4

# Columns of ``Table.tensors`` and ``UpdateTable.tensors``, int64 [tensors, TENSOR_COLUMNS]: what the search for a
# threshold needs. LOW_RANK and HIGH_RANK are used by ``threshold.sample_kernel`` alone.
TENSOR_SCORES = tl.constexpr(0)  # the address
TENSOR_NUMEL = tl.constexpr(1)
TENSOR_RANK = tl.constexpr(2)  # of the threshold among the ascending keys
TENSOR_LIST = tl.constexpr(3)  # where the tensor's part of the list of keys begins
TENSOR_ROOM = tl.constexpr(4)  # how many keys that part has room for
TENSOR_LOW_RANK = tl.constexpr(5)  # of the low end of the window in the sample
TENSOR_HIGH_RANK = tl.constexpr(6)
TENSOR_FIRST_PROGRAM = tl.constexpr(7)  # the first program that works on the tensor
TENSOR_PROGRAMS = tl.constexpr(8)  # how many programs do
TENSOR_TAU = tl.constexpr(9)  # the address of the threshold; that of ``Table`` is known to ``sample_kernel`` first
TENSOR_WINDOW = tl.constexpr(10)  # the address of the window that stays with the tensor, or 0
TENSOR_COLUMNS = tl.constexpr(11)

# Columns of ``Table.programs`` and ``UpdateTable.programs``, int64 [programs, PROGRAM_COLUMNS].
PROGRAM_TENSOR = tl.constexpr(0)
PROGRAM_START = tl.constexpr(1)  # the first element that the program owns
PROGRAM_COLUMNS = tl.constexpr(2)

# Columns of ``TensorTable.blocks``, int32 [programs, BLOCK_COLUMNS].
BLOCK_TENSOR = tl.constexpr(0)
BLOCK_INDEX = tl.constexpr(1)  # the program's block, counted within its tensor
BLOCK_COLUMNS = tl.constexpr(2)

# The state of a search for the threshold, int64 [STATE_SIZE] for each tensor. The counts of a digit begin at
# STATE_COUNTS.
STATE_LOW = tl.constexpr(0)  # the key at the low end of the window
STATE_HIGH = tl.constexpr(1)  # the key at its high end
STATE_BELOW = tl.constexpr(2)  # how many keys lie below the window
STATE_AT_LOW = tl.constexpr(3)  # how many equal its low end
STATE_AT_HIGH = tl.constexpr(4)  # how many equal its high end
STATE_LISTED = tl.constexpr(5)  # how many lie strictly inside
STATE_GUESS = tl.constexpr(6)  # the expected threshold, as a key, with which the masked weight was written
STATE_ACTION = tl.constexpr(7)  # what is left to put right: one of the ACTION_ numbers
STATE_PREFIX = tl.constexpr(8)  # the digits of the threshold's key that are known, in their places; the others are 0
STATE_PASSED = tl.constexpr(9)  # how many of the keys that are searched lie below this prefix
STATE_STAGE = tl.constexpr(10)  # how many digits are known, or STAGE_FOUND
STATE_TAKEN = tl.constexpr(16)  # for each digit: how many of its parts were taken, or asked for in vain
STATE_COUNTED = tl.constexpr(20)  # for each digit: how many of its parts are counted
STATE_COUNTS = tl.constexpr(32)
DIGIT_BINS = tl.constexpr(1 << 8)
STATE_SIZE = tl.constexpr(32 + (1 << 8))

STAGE_FOUND = tl.constexpr(8)  # more than a key has digits

ACTION_NONE = tl.constexpr(0)
ACTION_LIST = tl.constexpr(1)  # the listed elements
ACTION_ALL = tl.constexpr(2)  # every element of the tensor

# A window, int64 [WINDOW_SIZE]: where the next threshold is expected. It stays with the tensor from step to step.
WINDOW_KNOWN = tl.constexpr(0)  # 1 if there is one
WINDOW_LOW = tl.constexpr(1)  # its ends, as keys
WINDOW_HIGH = tl.constexpr(2)
WINDOW_GUESS = tl.constexpr(3)  # where between them the next threshold is expected, as a key
WINDOW_MISSED_BY = tl.constexpr(4)  # how far it was from there of late, in keys
WINDOW_DRIFT = tl.constexpr(5)  # how far the threshold moves in a step, in keys, with its sign
WINDOW_HITS = tl.constexpr(6)  # how many updates found the threshold in the window
WINDOW_MISSES = tl.constexpr(7)  # how many did not
WINDOW_SIZE = 8

# The coefficients of an update, float32 [SETTINGS] for each tensor: eight for the weight, then eight for the scores.
SETTINGS_WEIGHT = tl.constexpr(0)
SETTINGS_SCORES = tl.constexpr(8)
SETTINGS = tl.constexpr(16)

ADAMW_LERP = tl.constexpr(0)  # 1 - beta1, or -beta1 where 1 - beta1 >= 0.5: see ``_update_rules.adamw``
ADAMW_BETA2 = tl.constexpr(1)
ADAMW_REST2 = tl.constexpr(2)  # 1 - beta2
ADAMW_EPS = tl.constexpr(3)
ADAMW_CORRECTION = tl.constexpr(4)  # sqrt(1 - beta2**step)
ADAMW_SIZE = tl.constexpr(5)  # -lr / (1 - beta1**step)
ADAMW_SHRINK = tl.constexpr(6)  # 1 - lr * (decoupled weight decay)
ADAMW_DECAY = tl.constexpr(7)  # coupled weight decay

SGD_SIZE = tl.constexpr(0)  # -lr
SGD_MOMENTUM = tl.constexpr(1)
SGD_REST = tl.constexpr(2)  # 1 - dampening
SGD_DECAY = tl.constexpr(3)
SGD_NESTEROV = tl.constexpr(4)  # 0 or 1
SGD_FIRST = tl.constexpr(5)  # 1 in the first step, where the momentum becomes the gradient

# Columns of the sums of squares, [programs or tensors, SUM_COLUMNS].
SUM_WEIGHT = tl.constexpr(0)
SUM_SCORES = tl.constexpr(1)
SUM_COLUMNS = tl.constexpr(2)


@triton.jit
def state_of(state_ptr, tensor):
    """The state of one tensor among the states of all."""
    return state_ptr + tensor * STATE_SIZE


@triton.jit
def field(fields_ptr, ROW: tl.constexpr, tensor, tensors):
    """The entry of a tensor in row ROW of a table [rows, tensors]."""
    return tl.load(fields_ptr + ROW * tensors + tensor)
