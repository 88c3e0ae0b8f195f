"""Parses JSON text of unknown origin.

Python's parser takes numbers of any size and numbers that are none, and it is recursive, so that it can exhaust the
stack. What this one returns holds finite numbers of a usual length, and can be walked through recursively.
"""

from __future__ import annotations

import json
import math
import re
from typing import Any

DEPTH = 64
DIGITS = 100

_STRING = re.compile(r'"[^"]*"')  # in a text without escapes
_TOKEN = re.compile(r'"|\\.|[\[\]{}]', re.DOTALL)


def parse(text: str | bytes | bytearray) -> Any:
    """The value of a JSON text (UTF-8, if it is bytes).

    Raises:
        ValueError: it is no JSON; it is nested more than ``DEPTH`` deep; a number is infinite, not a number, or longer
            than ``DIGITS`` characters.
    """
    if not isinstance(text, str):
        text = text.decode("utf-8")
    _check_depth(text)
    return json.loads(text, parse_int=_integer, parse_float=_float, parse_constant=_refuse)


def _check_depth(text: str) -> None:
    """Raise ``ValueError`` if brackets are nested too deep. This takes one pass, whatever the text is."""
    if text.count("[") + text.count("{") <= DEPTH:
        return
    if "\\" not in text:
        text = _STRING.sub("", text)
    depth, in_string = 0, False
    for found in _TOKEN.finditer(text):
        token = found[0]
        if token == '"':
            in_string = not in_string
        elif not in_string and token in "[{":
            depth += 1
            if depth > DEPTH:
                raise ValueError(f"it is nested more than {DEPTH} deep")
        elif not in_string and token in "]}":
            depth -= 1


def _integer(digits: str) -> int:
    if len(digits) > DIGITS:
        raise ValueError(f"a number has more than {DIGITS} digits")
    return int(digits)


def _float(digits: str) -> float:
    value = float(digits)
    if len(digits) > DIGITS or not math.isfinite(value):
        raise ValueError(f"a number is too large or too long: {digits[:20]}")
    return value


def _refuse(name: str) -> float:
    raise ValueError(f"a number is not finite: {name}")
