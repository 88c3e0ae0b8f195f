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
    # To the counts that all programs of a tensor share. Triton 3.8 does not drop a result that nobody reads.
    "add": r"(?:red|atom)\.global\.gpu\.relaxed\.add",
    "arrive": r"atom\.global\.gpu\.acq_rel\.add",
    "release": r"atom\.global\.gpu\.release\.exch",
    "look": r"ld\.volatile\.global",
    "acquire": r"ld\.global\.gpu\.acquire|atom\.global\.gpu\.acquire\.add",
    "wait": r"(?:bar|barrier)\.(?:cta\.)?sync",  # for all threads of the program
    "load": r"ld\.global\.cg",
    "store": r"st\.global",
}
WORD = re.compile("|".join(f"(?P<{name}>{pattern})" for name, pattern in WORDS.items()))
TOGETHER = [
    "add",
    "wait",
    "arrive",
    "wait",
    "load",
    "wait",
    "store",
    "wait",
    "release",
    "look",
    "wait",
    "acquire",
    "wait",
]
"""Counts are added before a program arrives, and read after the last one has arrived. They are cleared after all
threads have read them. What is written then comes before the release, and what others read after their acquire."""


def sentence(ptx: str) -> list[str]:
    """What happens to memory, in the order of the code, from the last sum before the arrival on; repetitions once."""
    words = [str(found.lastgroup) for found in WORD.finditer(ptx)]
    before = words[: words.index("arrive")]
    words = words[len(before) - 1 - before[::-1].index("add") :]
    return [word for word, before in zip(words, [None, *words], strict=False) if word != before]


@pytest.mark.parametrize("arch", [80, 90, 100])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_programs_that_search_together_see_what_they_need(dtype: str, arch: int) -> None:
    compiling, all_cases = (importlib.import_module(name) for name in ("compiling", "compile_cases"))
    case = next(case for case in all_cases.all_cases()["threshold"] if case.name == f"search {dtype} |S| 2048")
    found = sentence(compiling.compile_kernel(case, arch).asm["ptx"])
    assert found[: len(TOGETHER)] == TOGETHER, found


@pytest.mark.parametrize("arch", [80, 90, 100])
def test_the_threshold_is_written_before_others_read_it(arch: int) -> None:
    compiling, all_cases = (importlib.import_module(name) for name in ("compiling", "compile_cases"))
    case = next(case for case in all_cases.all_cases()["warm_threshold"] if case.name == "settle fp32 |S| bf16 512")
    found = " ".join(sentence(compiling.compile_kernel(case, arch).asm["ptx"]))
    for what in ("store wait release", "look wait acquire wait load"):
        assert what in found, found
