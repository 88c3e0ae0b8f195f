"""``python -m wsn_fast.doctor``: what is here; with ``--check``, whether it is right."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from . import __doc__ as about


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the report, or the verdicts of a check. Return 1 if an override or an operation is wrong, else 0."""
    parser = argparse.ArgumentParser(prog="python -m wsn_fast.doctor", description=about)
    parser.add_argument(
        "--check", action="store_true", help="compare every operation on every device with PyTorch, in a minute"
    )
    options = parser.parse_args(arguments)
    from . import checking, findings  # and PyTorch, which the parser does not need

    return checking.main() if options.check else findings.main()


if __name__ == "__main__":
    sys.exit(main())
