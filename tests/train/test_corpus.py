"""What the fuzzer of ``tests/support/fuzz_readers.py`` has found, and a sample of what it keeps: every reader returns,
or raises the error that it promises."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
from reader_targets import read

MEMBERS = sorted(Path(__file__).with_name("corpus").iterdir())


@pytest.mark.parametrize("member", MEMBERS, ids=lambda path: path.name)
def test_a_member_of_the_corpus_is_read_or_refused(member: Path, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read(member.read_bytes(), tmp_path)
