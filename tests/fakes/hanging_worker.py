"""The diffusion service's process with a device that hangs after so many evaluations: `python hanging_worker.py COUNT`.

It notices that after two seconds instead of a minute.
"""

import sys
import threading

from services.diffusion.__main__ import main
from services.diffusion.engine import backend, engine
from services.kernel.process import leave
from services.worker.device import HangLimits, HangWatch


def hang_after(count: int) -> None:
    advance, left = backend.TorchBackend.advance, [count]

    def advance_or_hang(self, states):
        if not left[0]:
            threading.Event().wait()
        left[0] -= 1
        return advance(self, states)

    backend.TorchBackend.advance = advance_or_hang
    engine.HangWatch = lambda: HangWatch(HangLimits(floor_s=2.0, first_s=60.0))


if __name__ == "__main__":
    hang_after(int(sys.argv[1]))
    leave(main())
