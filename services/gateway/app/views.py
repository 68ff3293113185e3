"""Workers as ordering sees them: what they hold and cost to fetch, and speeds that can be believed."""

from collections.abc import Mapping

from services.gateway.jobs.workers import REMOTE, Capabilities, WorkerRecord
from services.gateway.ordering.pace import Mean, plausible
from services.gateway.ordering.tasks import WorkerView

# Where nobody has measured anything: a link that most homes have, and a small card.
USUAL_LINK_BPS = 50e6
USUAL_STEP_S = 0.3
# What a task takes besides its steps, or of a stage without steps altogether.
TASK_S = 0.5
# No home link and no card is faster, and what is slower is of no use.
LINK_MAX_BPS, LINK_MIN_BPS = 10e9, 0.1e6
STEP_MIN_S, STEP_MAX_S = 1e-3, 600.0
OFFERS_KEPT = 1_000

# Sizes by model, and the models that cost nothing to fetch.
_Offered = tuple[Mapping[str, int], frozenset[str]]


class Views:
    def __init__(self) -> None:
        # By digest of capabilities, which many workers share.
        self._offered: dict[str, _Offered] = {}
        self._usual_steps: dict[str, Mean] = {}
        self._usual_link = Mean()

    def of(self, record: WorkerRecord, offers: frozenset[str]) -> WorkerView:
        """`offers`: what the worker may be given now."""
        worker = record.worker
        sizes, present = self._offered_by(record)
        return WorkerView(
            id=worker.id,
            node=worker.node,
            stage=worker.stage,
            offers=offers,
            slots=max(1, worker.slots),
            vram=worker.vram_models,
            ram=worker.ram_models,
            held=worker.held_models | present,
            sizes=sizes,
            link_bps=self._link_bps(worker.goodput_bps),
            step_s=self._step_s(worker.device, worker.step_s),
            task_s=TASK_S,
            takes_fetches=worker.takes_fetches,
            disk_bytes=worker.disk_bytes,
            unfetched=worker.unfetched_models,
        )

    def _offered_by(self, record: WorkerRecord) -> _Offered:
        known = self._offered.get(record.capabilities_digest)
        if known is None:
            while len(self._offered) >= OFFERS_KEPT:
                del self._offered[next(iter(self._offered))]
            known = self._offered[record.capabilities_digest] = _offered(record.capabilities)
        return known

    def _step_s(self, device: str, reported_s: float) -> float:
        """Bounded by what is usual for the device, of which it becomes a part."""
        usual = self._usual_steps.setdefault(device, Mean())
        step_s = plausible(reported_s, usual.mean) or USUAL_STEP_S
        step_s = min(max(step_s, STEP_MIN_S), STEP_MAX_S)
        if reported_s:
            usual.note(step_s)
        return step_s

    def _link_bps(self, reported_bps: float) -> float:
        link_bps = plausible(reported_bps, self._usual_link.mean) or USUAL_LINK_BPS
        link_bps = min(max(link_bps, LINK_MIN_BPS), LINK_MAX_BPS)
        if reported_bps:
            self._usual_link.note(link_bps)
        return link_bps


def _offered(capabilities: Capabilities) -> _Offered:
    sizes: dict[str, int] = {}
    for model in capabilities.models:
        # Models of several families may share an id, and tasks do not tell which: the largest counts.
        sizes[model.id] = max(sizes.get(model.id, 0), model.size_bytes)
    return sizes, frozenset(model.id for model in capabilities.models if model.residency != REMOTE)
