"""Workers as ordering sees them: what they hold and cost to fetch, and speeds that can be believed."""

from services.gateway.app.capabilities import Group
from services.gateway.jobs.workers import StepTime, Worker
from services.gateway.ordering.pace import Mean, plausible
from services.gateway.ordering.tasks import StepTimes, WorkerView

# Where nobody has measured anything: a link that most homes have.
USUAL_LINK_BPS = 50e6
# What a task takes besides its steps, or of a stage without steps altogether.
TASK_S = 0.5
# No home link and no card is faster, and what is slower is of no use.
LINK_MAX_BPS, LINK_MIN_BPS = 10e9, 0.1e6
STEP_MIN_S, STEP_MAX_S = 1e-3, 600.0
# Of how many devices it is known what is usual, and for how many families and sizes of each.
DEVICES_LIMIT = 1_000
CLASSES_LIMIT = 256
# What is usual is handed on again once it has moved by more than this part.
USUAL_MOVED = 0.1


class Views:
    def __init__(self) -> None:
        self._devices: dict[str, _Device] = {}
        # By worker: its last report, and what of it can be believed.
        self._step_times: dict[str, tuple[tuple[StepTime, ...], StepTimes]] = {}
        self._usual_link = Mean()

    def of(self, worker: Worker, group: Group, offers: frozenset[str]) -> WorkerView:
        """`offers`: what the worker may be given now."""
        device = self._device(worker.device)
        return WorkerView(
            id=worker.id,
            node=worker.node,
            stage=worker.stage,
            offers=offers,
            limits=group.limits,
            slots=max(1, worker.slots),
            vram=worker.vram_models,
            ram=worker.ram_models,
            held=worker.held_models,
            sizes=group.sizes,
            link_bps=self._link_bps(worker.goodput_bps),
            step_times=self._believed(worker, device),
            usual_times=device.usual_times,
            task_s=TASK_S,
            takes_fetches=worker.takes_fetches,
            disk_bytes=worker.disk_bytes,
            unfetched=worker.unfetched_models,
        )

    def forget(self, worker_id: str) -> None:
        self._step_times.pop(worker_id, None)

    def _device(self, name: str) -> "_Device":
        if name not in self._devices:
            if len(self._devices) >= DEVICES_LIMIT:
                del self._devices[next(iter(self._devices))]
            self._devices[name] = _Device()
        return self._devices[name]

    def _believed(self, worker: Worker, device: "_Device") -> StepTimes:
        """A report counts once, however often it is repeated."""
        reported, believed = self._step_times.get(worker.id, ((), {}))
        if reported != worker.step_times:
            before = {(each.family, each.size_class): each for each in reported}
            believed = {
                (each.family, each.size_class): device.believe(
                    each, is_new=before.get((each.family, each.size_class)) != each
                )
                for each in worker.step_times
            }
            self._step_times[worker.id] = worker.step_times, believed
        return believed

    def _link_bps(self, reported_bps: float) -> float:
        link_bps = plausible(reported_bps, self._usual_link.mean) or USUAL_LINK_BPS
        link_bps = min(max(link_bps, LINK_MIN_BPS), LINK_MAX_BPS)
        if reported_bps:
            self._usual_link.note(link_bps)
        return link_bps


class _Device:
    """What evaluations usually take on a device, by family and size class."""

    def __init__(self) -> None:
        self._means: dict[tuple[str, int], Mean] = {}
        # As handed on; a new value where it changes, so that the same one means the same.
        self.usual_times: StepTimes = {}

    def believe(self, reported: StepTime, *, is_new: bool) -> float:
        """Bounded by what is usual for the device, family and size, of which it becomes a part if it is new."""
        which = (reported.family, reported.size_class)
        usual = self._means.get(which)
        time_s = plausible(reported.mean_s, usual.mean if usual else 0.0)
        time_s = min(max(time_s, STEP_MIN_S), STEP_MAX_S)
        if is_new:
            self._note(which, time_s)
        return time_s

    def _note(self, which: tuple[str, int], time_s: float) -> None:
        if which not in self._means and len(self._means) >= CLASSES_LIMIT:
            oldest = next(iter(self._means))
            del self._means[oldest]
            self.usual_times = {each: mean_s for each, mean_s in self.usual_times.items() if each != oldest}
        usual = self._means.setdefault(which, Mean())
        usual.note(time_s)
        handed_on = self.usual_times.get(which, 0.0)
        if abs(usual.mean - handed_on) > USUAL_MOVED * handed_on:
            self.usual_times = {**self.usual_times, which: usual.mean}
