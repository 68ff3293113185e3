"""Who works for this gateway, and what they offer together."""

from collections.abc import Sequence

from services.gateway.jobs.workers import Catalog, WorkerStatus


class Workers:
    def catalog(self) -> Catalog:
        """All that known workers offer, live ones first; what requests are checked against."""
        raise NotImplementedError

    def statuses(self) -> Sequence[WorkerStatus]:
        """The workers that asked for work lately."""
        raise NotImplementedError
