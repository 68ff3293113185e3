"""What the known workers offer, together and each by itself: what requests can be done, and by whom.

Knows no store, and not what makes a worker live.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from services.gateway.app.capabilities import CapabilityGroup, CapabilityGroups
from services.gateway.domain.fleet_catalog import FleetCatalog
from services.gateway.domain.job import Facts
from services.gateway.domain.workers import AnnouncedAnnotator, Avoidance, LeftOutOfFleet, WorkerRecord
from services.gateway.scheduler.queue import Amounts

# How many versions and devices of one annotator the cache is asked for, whatever workers claim.
VARIANTS_LIMIT = 8
# Of what a worker announced and gets no tasks for.
LEFT_OUT_LIMIT = 64


@dataclass(slots=True)
class KnownWorker:
    record: WorkerRecord
    group: CapabilityGroup
    written_s: float
    # The store's; 0 before the first write.
    revision: int = 0
    polls: int = 0
    live: bool = False
    # When it first called this gateway, and when it was last heard of; monotonic, 0 for not by this process.
    come_s: float = 0.0
    heard_s: float = 0.0
    # As it sent it with the models of its last poll here; empty for none.
    holdings_digest: str = ""
    # When a task or fetch of it was measured last; monotonic.
    measured_s: float = 0.0
    # A newer worker of its node and stage is there instead.
    replaced: bool = False
    # As last written.
    written_models: frozenset[str] = frozenset()

    @property
    def place(self) -> tuple[str, str]:
        return self.record.worker.node, self.record.worker.stage

    @property
    def is_counted(self) -> bool:
        """Requests may rely on it, also while it is away."""
        return not self.replaced and not self.record.worker.draining


class FleetOffers:
    def __init__(
        self, groups: CapabilityGroups, known: Mapping[str, KnownWorker], update_live: Callable[[], None]
    ) -> None:
        """`known`: by id, as its owner changes it. `update_live`: called before liveness is read."""
        self._groups, self._known, self._update_live = groups, known, update_live

    def catalog(self) -> FleetCatalog:
        """All that known workers offer; requests are checked against it. Read it before the next await."""
        self._update_live()
        return self._groups.catalog

    def residency_of(self, kind: str, name: str) -> int:
        """The best place where workers hold a model, or an annotator's, by the contract's numbers; else REMOTE."""
        return self.catalog().residency_of(kind, name)

    def can_any(self, stage: str, needs: frozenset[str], amounts: Amounts = (), *, only_live: bool = False) -> bool:
        """Whether some known worker of the stage meets all the needs together, and accepts those amounts."""
        self._update_live()
        return self._groups.can_any(stage, needs, amounts, only_live=only_live)

    def left_out(self) -> LeftOutOfFleet:
        """What known workers found among their models and do not use."""
        self._update_live()
        return self._groups.left_out()

    def offering(self, stage: str, need: str) -> list[str]:
        """Up to five nodes whose workers of the stage offer it, live ones first; for error messages."""
        self._update_live()
        return self._groups.offering(stage, need)

    def limits_of(self, stage: str, name: str, needs: frozenset[str] = frozenset()) -> list[tuple[str, int | None]]:
        """Up to five nodes whose workers of the stage offer the needs, with their limits, the largest first; None for
        no limit.
        """
        self._update_live()
        return self._groups.limits_of(stage, name, needs)

    def abilities_of(self, worker_id: str) -> tuple[frozenset[str], Amounts] | None:
        """What the worker offers and takes now, if it is there, or is expected back; else None."""
        known = self._known.get(worker_id)
        return (known.group.offers, known.group.limits) if known and known.is_counted else None

    def variants(self, annotator_id: str) -> Sequence[AnnouncedAnnotator]:
        """The annotator in the versions and on the devices that workers have, live ones first, up to a limit."""
        self._update_live()
        distinct: dict[tuple[str, str], AnnouncedAnnotator] = {}
        for group in self._groups.with_annotator(annotator_id):
            annotator = group.annotators[annotator_id]
            distinct.setdefault((annotator.version, annotator.device), annotator)
            if len(distinct) == VARIANTS_LIMIT:
                break
        return list(distinct.values())

    def annotator_of(self, worker_id: str, annotator_id: str) -> AnnouncedAnnotator | None:
        """The annotator as that worker has it."""
        known = self._known.get(worker_id)
        return known.group.annotators.get(annotator_id) if known else None

    def announced_annotator(self, worker_id: str, annotator_id: str) -> AnnouncedAnnotator | None:
        """The annotator as that worker announced it, its build included."""
        known = self._known.get(worker_id)
        announced = known.group.capabilities.annotators if known else ()
        return next((each for each in announced if each.id == annotator_id), None)

    def is_deterministic(self, worker_id: str, annotator_id: str) -> bool:
        annotator = self.annotator_of(worker_id, annotator_id)
        return annotator is not None and annotator.deterministic

    def has_live(self, stage: str, needs: frozenset[str], *, but_not: frozenset[str]) -> bool:
        """Whether a live worker of another node than those meets all the needs."""
        self._update_live()
        return self._groups.has_live(stage, needs, but_not)

    def fetches_for(self, worker_id: str, facts: Facts) -> bool:
        """Whether the worker holds less than a task needs, as far as is known, so that it must fetch something."""
        known = self._known.get(worker_id)
        if known is None:
            return True
        needed = facts.models | ({facts.annotator} if facts.annotator else set())
        return not needed <= known.record.worker.held_models

    def model_kind(self, worker_id: str, model_id: str) -> str:
        """Such as `lora`; empty where the worker offers no such model."""
        known = self._known.get(worker_id)
        needs = known.group.needs_by_id.get(model_id, ()) if known else ()
        return needs[0].partition(":")[0] if needs else ""


def left_out(group: CapabilityGroup) -> Iterator[Avoidance]:
    """What its workers announced and get no tasks for."""
    for each in group.left_out[:LEFT_OUT_LIMIT]:
        yield Avoidance(need=each.need, why=each.why, until_s=0.0)
