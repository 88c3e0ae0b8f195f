"""A command ``wsn-fast`` that ends with the process that started it, however that ends.

The parent holds the other end of this process's standard input and never writes to it. The operating system closes that
end when the parent is gone, killed or not, and then this process ends as well. A run survives that, as any kill.
"""

import os
import signal
import sys
import threading


def _follow_parent() -> None:
    while os.read(0, 1):
        pass
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    threading.Thread(target=_follow_parent, daemon=True).start()
    from wsn_fast.train.__main__ import start

    sys.exit(start())
