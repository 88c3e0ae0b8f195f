"""What a compile case is compiled for, and which launches of the backend no case stands for yet."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import combinations
from typing import Any

from compiling import CompileCase

TILE = {
    "BLOCK", "BLOCK_M", "BLOCK_N", "BLOCK_K", "BLOCK_O", "BLOCK_R", "COLUMNS", "DIGIT", "FIX", "GROUP", "LANES",
    "SAMPLE", "SLOTS",
}  # fmt: skip
WINDOW = {"KH", "KW"}
"""Any numbers, not choices."""
Traits = dict[str, str]


def traits(case: CompileCase) -> Traits:
    """What a case is compiled for, apart from sizes: the type of every pointer, None for one that is left out, the
    constants, and the tile."""
    found = {name: kind for name, kind in case.signature.items() if isinstance(kind, str) and kind.startswith("*")}
    fixed = {p.name for p in case.fn.params if p.is_constexpr} | {n for n, v in case.constexprs.items() if v is None}
    found |= {name: str(value) for name, value in case.constexprs.items() if name in fixed - TILE - WINDOW}
    if found.get("s_ptr") == "None":
        found.pop("RULE", None)  # no scores are compared
    blocks = {name: value for name, value in case.constexprs.items() if name in TILE}
    found["tile"] = str((sorted(blocks.items()), case.num_warps, case.num_stages, case.maxnreg))
    return found


def pairs(found: Traits) -> Iterator[tuple[tuple[str, str], ...]]:
    """Any two traits together; the tile by itself."""
    yield (("tile", found["tile"]),)
    yield from combinations(sorted(item for item in found.items() if item[0] != "tile"), 2)


def left_out(launches: Iterable[CompileCase], cases: Iterable[CompileCase]) -> list[CompileCase]:
    """The launches with two traits that do not meet in ``cases``, or in a launch before; named by their traits."""
    known: set[tuple[str, Any]] = set()
    for case in cases:
        known.update((case.fn.__name__, pair) for pair in pairs(traits(case)))
    found = []
    for launch in launches:
        own = traits(launch)
        new = {(launch.fn.__name__, pair) for pair in pairs(own)}
        if not new <= known:
            known |= new
            label = " ".join(
                f"{name.removesuffix('_ptr')}={value.strip('*')}" for name, value in own.items() if name != "tile"
            )
            tile = " ".join(f"{name}={value}" for name, value in launch.constexprs.items() if name in TILE)
            core = own.get("PRECISION") == "tf32"
            found.append(launch._replace(name=f"{launch.name} {label} {tile}", needs_tensor_core=core))
    return found
