"""Where the last of several programs reads what all of them have written, the code keeps the order that this needs.

The interpreter cannot tell: it keeps every order. So this looks at the PTX, whose memory model is specified."""

from __future__ import annotations

import importlib
import importlib.util
import os
import re

import pytest

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None or os.environ.get("TRITON_INTERPRET") == "1",
    reason="needs triton, and not its interpreter",
)

WORDS = {
    "add": r"(?:red|atom)\.global\.gpu\.relaxed\.add",  # to what all programs of a tensor share
    "arrive": r"atom\.global\.gpu\.acq_rel\.add",
    "wait": r"(?:bar|barrier)\.(?:cta\.)?sync",  # for all threads of the program
    "load": r"ld\.global",
    "store": r"st\.global",
}
WORD = re.compile("|".join(f"(?P<{name}>{pattern})" for name, pattern in WORDS.items()))


def sentence(ptx: str) -> list[str]:
    """What happens to memory, in the order of the code, from the last sum on; repetitions once."""
    words = [str(found.lastgroup) for found in WORD.finditer(ptx)]
    last = len(words) - 1 - words[::-1].index("add")
    return [word for word, before in zip(words[last:], [None, *words[last:]], strict=False) if word != before]


@pytest.mark.parametrize("arch", [80, 90, 100])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_the_last_program_reads_after_all_have_added(dtype: str, arch: int) -> None:
    compiling, all_cases = (importlib.import_module(name) for name in ("compiling", "compile_cases"))
    case = next(case for case in all_cases.all_cases()["threshold"] if case.name == f"digit {dtype} |S| 4096")
    found = sentence(compiling.compile_kernel(case, arch).asm["ptx"])
    assert found[:5] == ["add", "wait", "arrive", "wait", "load"], found
    # It clears what it has read after all its threads have read it.
    assert found[5:7] == ["wait", "store"], found
