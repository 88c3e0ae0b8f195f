"""``python -m wsn_fast.doctor``: what is here; with ``--check``, whether it is right."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from . import checking, findings


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the report, or the verdicts of a check. Return 1 if an override or an operation is wrong, else 0."""
    parser = argparse.ArgumentParser(prog="python -m wsn_fast.doctor", description=findings.__doc__)
    parser.add_argument(
        "--check", action="store_true", help="compare every operation on every device with PyTorch, in a minute"
    )
    return checking.main() if parser.parse_args(arguments).check else findings.main()


if __name__ == "__main__":
    sys.exit(main())
