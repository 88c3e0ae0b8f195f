"""Starts the command ``wsn-fast`` in a process of its own."""

import signal
import sys


def start() -> int:
    """Run the command with the arguments of this process, and return its exit code.

    Until the command can say that it was interrupted, an interruption ends the process without words: Python would
    print where in the imports it was.
    """
    interruptible = (
        signal.getsignal(signal.SIGINT) is signal.default_int_handler
    )  # else whoever started it ignores them
    if interruptible:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from wsn_fast.train.command_line import main

    if interruptible:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    return main()


if __name__ == "__main__":
    sys.exit(start())
