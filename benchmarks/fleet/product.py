"""Workers that ask the gateway's own ordering: `services.gateway.scheduler.schedule`, given the simulated time."""

from functools import partial

from benchmarks.fleet.run import Simulation
from benchmarks.fleet.world import STEPS, Job, Node, size_of
from services.gateway.scheduler.pace import USUAL_SIZE_CLASS
from services.gateway.scheduler.queue import TaskKind, WaitingTask
from services.gateway.scheduler.replication import Replication
from services.gateway.scheduler.schedule import Scheduler
from services.gateway.scheduler.workers import WorkerView


class Fanlight:
    name = "fanlight"

    def __init__(self, simulation: Simulation, seed: int, replication: Replication | None = None) -> None:
        self._simulation = simulation
        self._clock = simulation.clock
        self._options = simulation.options
        self.scheduler = Scheduler(replication)
        models = simulation.popularity.models
        self._sizes = {model: size_of(model) for model in models}
        self._offers = frozenset(_need(model) for model in models)
        self._jobs: dict[tuple[str, int], Job] = {}
        self._live: dict[str, Node] = {}
        # Workers with a poll open.
        self._asking: set[str] = set()
        self._views: dict[str, tuple[int, WorkerView]] = {}
        self._kinds: dict[tuple[str, str], TaskKind] = {}
        for node in simulation.nodes:
            node.needed = partial(self._needed, node)

    # What the gateway does

    def arrive(self, job: Job) -> None:
        key = (str(job.number), 1)
        self._jobs[key] = job
        self._add(key, job)
        self._stir()

    def _add(self, key: tuple[str, int], job: Job) -> None:
        task = WaitingTask(
            key=key,
            kind=self._kind(job),
            rank_s=job.arrival_s,
            queue_time_s=self._clock.now_s,
            steps=STEPS,
        )
        self.scheduler.add(task, self._clock.now_s)

    def _kind(self, job: Job) -> TaskKind:
        which = (job.checkpoint, job.lora)
        if which not in self._kinds:
            self._kinds[which] = TaskKind(
                stage="diffusion",
                needs=frozenset(_need(model) for model in job.models),
                checkpoint=job.checkpoint,
                models=frozenset(job.models),
                loras=((job.lora, 1.0),) if job.lora else (),
                width_px=512,
                height_px=512,
                size_class=USUAL_SIZE_CLASS,
                guided=True,
            )
        return self._kinds[which]

    def _stir(self) -> None:
        """Those that the plan has news for hear of it: an idle one has a poll open, a busy one renews its lease."""
        self.scheduler.take_claims()
        for worker in sorted(self.scheduler.pop_changed_workers()):
            node = self._live.get(worker)
            if node is None:
                continue
            busy = node.running is not None
            self._clock.after(self._options.hint_s if busy else self._options.answer_s, self._hear, worker)

    # What workers do

    def _worker(self, node: Node) -> str:
        return f"{node.name}.{node.life}"

    def rose(self, node: Node) -> None:
        self._live[self._worker(node)] = node
        self._ask(self._worker(node))
        self._clock.after(self._options.recheck_s, self._recheck, self._worker(node))

    def _recheck(self, worker: str) -> None:
        node = self._live.get(worker)
        if node is None or self._worker(node) != worker:
            return
        if node.up and node.running is None:
            self._ask(worker)
        self._clock.after(self._options.recheck_s, self._recheck, worker)

    def _hear(self, worker: str) -> None:
        node = self._live.get(worker)
        if node is None or not node.up or self._worker(node) != worker:
            return
        if node.running is None:
            self._ask(worker)
        else:
            self._fetch(worker, node)

    def _ask(self, worker: str) -> None:
        """A poll: what it holds goes up, a task or fetches come down."""
        node = self._live[worker]
        if not node.up or self._worker(node) != worker:
            return
        now_s = self._clock.now_s
        self.scheduler.seen(self._view(worker, node), now_s)
        if node.running is None:
            if worker not in self._asking:
                self._asking.add(worker)
                self.scheduler.asks(worker, now_s)
            for task in self.scheduler.choose(worker, 1, now_s):
                job = self._jobs[task.key]
                self.scheduler.remove(task.key)
                self.scheduler.started(worker, task, now_s)
                if node.holds(job):
                    self._asking.discard(worker)
                    self.scheduler.answered(worker, now_s)
                    self._simulation.start(node, job)
                else:
                    # Evicted meanwhile: the real worker would fetch it now. Give it back.
                    self.scheduler.ended(task.key, now_s)
                    self._add(task.key, job)
        self._fetch(worker, node)
        self._stir()

    def _fetch(self, worker: str, node: Node) -> None:
        if not self.scheduler.has_new_fetches(worker):
            return
        wanted = self.scheduler.fetches(worker)
        node.drop_fetches({fetch.model for fetch in wanted})
        for fetch in wanted:
            node.fetch(fetch.model)

    def _view(self, worker: str, node: Node) -> WorkerView:
        known = self._views.get(worker)
        if known is not None and known[0] == node.version:
            return known[1]
        view = WorkerView(
            id=worker,
            node=node.name,
            stage="diffusion",
            offers=self._offers,
            vram=frozenset(node.ram[-1:]),
            ram=frozenset(node.ram),
            held=frozenset(node.disk),
            sizes=self._sizes,
            link_bps=node.link_bps,
            step_times={("", USUAL_SIZE_CLASS): node.run_s / STEPS},
            takes_fetches=True,
            disk_bytes=self._options.disk_bytes,
        )
        self._views[worker] = (node.version, view)
        return view

    def finished(self, node: Node, job: Job) -> None:
        self._jobs.pop((str(job.number), 1), None)
        self.scheduler.ended((str(job.number), 1), self._clock.now_s)
        # It asks again at once; the answer takes its time.
        self._clock.after(self._options.answer_s, self._hear, self._worker(node))

    def came(self, node: Node, model: str) -> None:
        self._ask(self._worker(node))

    def died(self, node: Node, running: Job | None) -> None:
        worker = self._worker(node)
        self._live.pop(worker, None)
        self._asking.discard(worker)
        self._views.pop(worker, None)
        self.scheduler.gone(worker, self._clock.now_s)
        if running is not None and running in self._simulation.open:
            self._add((str(running.number), 1), running)
        self._stir()

    def _needed(self, node: Node) -> set[str]:
        worker = self.scheduler.worker(self._worker(node))
        needed = {model for task in worker.in_order() for model in task.kind.models} if worker else set()
        return needed | (set(node.running.models) if node.running else set())


def _need(model: str) -> str:
    return f"{'checkpoint' if model.startswith('c') else 'lora'}:{model}"
