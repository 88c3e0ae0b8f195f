"""An extension of griffe, for the site: Sphinx roles in docstrings become plain code."""

from __future__ import annotations

import re
from typing import Any

import griffe


class Roles(griffe.Extension):
    """``:func:`a.b``` is how docstrings name things; Markdown knows backticks alone."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Called with every module, class, function and attribute, once it is loaded."""
        if obj.docstring is not None:
            obj.docstring.value = re.sub(r":(?:func|class|meth|attr|mod):`([^`]+)`", r"`\1`", obj.docstring.value)
