"""The gateway's parts, wired."""

from services.gateway.app.jobs import Jobs
from services.gateway.app.queue import Queue
from services.gateway.app.workers import Workers


class Gateway:
    """`run` it in a task group; it is ready once it has read its store, and stops when `drain` was called."""

    jobs: Jobs
    queue: Queue
    workers: Workers

    @property
    def ready(self) -> bool:
        """It has read its store and is not draining."""
        raise NotImplementedError

    async def run(self) -> None:
        raise NotImplementedError

    def drain(self) -> None:
        """End long polls, waits and watches, and begin no new ones."""
        raise NotImplementedError
