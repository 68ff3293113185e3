"""The first process of a container: `entry.py gateway` is services.gateway, and SIGTERM ends it at any moment.

A process with the number 1 that has no handler for a signal never gets it. A service sets its own once it runs; until
then, while it imports, this one ends it: at once, for libraries turn what is raised in their midst into something else.
"""

import os
import runpy
import signal
import sys


def main() -> None:
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
    service = sys.argv.pop(1)
    runpy.run_module(f"services.{service}", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
