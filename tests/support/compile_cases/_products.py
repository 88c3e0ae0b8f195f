"""What the compile cases of the masked products share: dtypes, masks, and the shapes that decide how wide loads are."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from compiling import CompileCase
from torch import Tensor

from wsn_fast.backends.triton import tuning

from ._launches import TYPES, with_long_strides

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
"""Dtypes of a weight or of scores."""


class Tile(NamedTuple):
    """A tile of a product, and how it is multiplied.

    Attributes:
        config: the tile.
        precision: "tf32" or "ieee", as the launchers take it.
        compute: the compute dtypes.
    """

    config: Any
    precision: str
    compute: Sequence[torch.dtype]

    def __str__(self) -> str:
        return f"{self.config} {self.precision}"

    def launched(
        self, cases: list[CompileCase], row: dict[str, Any], operation: str, backward: bool = False
    ) -> list[CompileCase]:
        """The cases of a launch of an operation that these choices were made for: named by them, and with what follows
        from them beyond the arguments of the launcher."""
        compute = compute_of(row)
        label = ", ".join(f"{axis} {_name(value)}" for axis, value in {**row, "compute": compute}.items())
        core = self.precision != "ieee" or compute is not torch.float32
        source = "scores" if row.get("mask", PACKED).dtype else "packed"
        key = tuning.Product(operation, compute, self.precision, source, backward)
        most_shared = partial(tuning.most_shared, key, self.config)
        named = []
        for case in cases:
            product = "PRECISION" in case.constexprs
            case = with_long_strides(case) if row.get("strides") == "i64" else case
            if product:
                case = case._replace(needs_tensor_core=core, most_shared=most_shared)
            named.append(case._replace(name=f"{case.name}: {label}"))
        return named


def tiles(half: Sequence[Any], tf32: Sequence[Any], ieee: Sequence[Any]) -> list[Tile]:
    """The tiles of 16-bit dtypes, of fp32 multiplied as tf32, and of fp32 in full precision."""
    return [
        *(Tile(config, "tf32", FLOATS[1:]) for config in half),
        *(Tile(config, "tf32", FLOATS[:1]) for config in tf32),
        *(Tile(config, "ieee", FLOATS[:1]) for config in ieee),
    ]


COMPUTE = (0, 1)
"""Which of the compute dtypes of a tile."""


def compute_of(row: dict[str, Any]) -> torch.dtype:
    """The compute dtype of these choices."""
    dtypes = row["tile"].compute
    return dtypes[row["compute"] % len(dtypes)]


class Layout(NamedTuple):
    """A weight [n, k], and where rows of the batch begin.

    Attributes:
        n: rows of the weight.
        k: columns. Rows of a packed mask begin at a byte if 8 divides it.
        off: the tensor whose address is no multiple of 16 bytes; or none.
    """

    n: int
    k: int
    off: str = ""

    def __str__(self) -> str:
        return f"{self.n}x{self.k}" + f" {self.off} not aligned" * bool(self.off)

    def empty(self, name: str, *shape: int, dtype: torch.dtype) -> Tensor:
        """A tensor that is aligned, unless it is in ``off``."""
        offset = int(name == self.off)
        size = torch.Size(shape).numel()
        return torch.empty(size + offset, dtype=dtype)[offset:].view(shape)


WIDE, ODD = Layout(64, 64), Layout(65, 65)
"""Loads are as wide, or as narrow, as can be."""
LAYOUTS = (WIDE, Layout(72, 72), Layout(68, 68), Layout(66, 66), ODD, Layout(64, 64, "x"))
"""Loads of 8 elements, also in rows that are no multiples of 16; of 4, 2 and 1; and of 1 with whole bytes of masks."""
STRIDES = ("i32", "i64")
"""Whether strides fit into 32 bits."""
ROWS = 64
"""Of the batch."""


class MaskFrom(NamedTuple):
    """Where the mask comes from.

    Attributes:
        dtype: of the scores; None for a packed mask.
        rule: "magnitude" or "value".
    """

    dtype: torch.dtype | None
    rule: str = "magnitude"

    def __str__(self) -> str:
        return "packed" if self.dtype is None else f"{'|S|' if self.rule == 'magnitude' else 'S'} {TYPES[self.dtype]}"

    def arguments(self, *shape: int) -> dict[str, Any]:
        """What a launcher takes for the mask of a weight of this shape."""
        size = torch.Size(shape).numel()
        if self.dtype is None:
            return {"packed": torch.empty((size + 7) // 8, dtype=torch.uint8)}
        scores = torch.empty(shape, dtype=self.dtype)
        return {"scores": scores, "tau": torch.empty((), dtype=self.dtype), "rule": self.rule}


PACKED, SCORES = MaskFrom(None), MaskFrom(torch.float32)
MASKS = (PACKED, SCORES, MaskFrom(torch.bfloat16), MaskFrom(torch.float16, "value"))
"""Every dtype of scores, and both rules."""


def _name(value: Any) -> str:
    return TYPES[value] if isinstance(value, torch.dtype) else str(value)
