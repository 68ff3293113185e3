"""An annotator that ends when the test says."""

import threading
from dataclasses import dataclass, field

from services.preprocessor.annotator import Annotator, Pixels

PATIENCE_S = 20.0


@dataclass
class Gate:
    """Its annotator returns the image once the gate is opened; a failing test does not wait forever."""

    opened: threading.Event = field(default_factory=threading.Event)
    started: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))
    threads: list[str] = field(default_factory=list)

    def annotator(self) -> Annotator:
        return Annotator(id="gated", description="Waits", apply=self._apply)

    def _apply(self, image: Pixels) -> Pixels:
        self.threads.append(threading.current_thread().name)
        self.started.release()
        assert self.opened.wait(PATIENCE_S)
        return image
