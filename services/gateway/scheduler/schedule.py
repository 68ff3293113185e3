"""The scheduler: plans each waiting task at the worker that should finish it first, and answers workers that ask.

A worker gets what is planned for it, or what it would finish clearly sooner (work stealing). Pure: the caller passes
the time. Several gateways may each run one, because a claim is a compare-and-set elsewhere. Placing a task costs a look
at the holders of its checkpoint; asking costs a few tasks of each queue that the worker could serve.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import islice

from services.gateway.scheduler import avoidance, estimate
from services.gateway.scheduler.queue import Key, QueueId, TaskKind, TaskQueues, WaitingTask, queue_of
from services.gateway.scheduler.replication import FETCHES_LIMIT, Claim, PrefetchPlanner, Replication
from services.gateway.scheduler.workers import PlannedFetch, WorkerIndex, WorkerState, WorkerView

# How many workers are looked at to place a task; with more holders each task looks at other ones. The best of 64 is
# among the first two of a hundred, and looking at more costs every submit more than that wins.
LOOK_WORKERS = 64
# How many tasks that no worker could do are tried again with a new worker, and whenever a worker asks.
LOOK_UNPLACED = 64
LOOK_UNPLACED_ASKING = 4
# How many of a worker's next tasks are looked at when more of its fetches may begin.
LOOK_PLANNED = 32
# How many of its planned tasks that can begin a worker chooses from.
LOOK_OWN = 8
# How many queues an idle worker looks at, those whose first task is oldest, and how many tasks of each.
LOOK_QUEUES, LOOK_TASKS = 8, 3
# How many tasks of a queue it looks at if it can do none of the first ones.
LOOK_QUEUE = 64
# How many tasks of a queue may join a batch.
LOOK_BATCH = 64
# The plan is changed only for a gain of at least this.
GAIN_MIN_S = 0.5
# Stealing a task that must be fetched again here must save this share of the fetching time.
FETCH_GAIN = 0.5
# A held checkpoint may go first until another task has waited this long.
STICKY_LIMIT_S = 30.0
# After this many times its expected duration plus these seconds a fetch counts as failed.
OVERDUE_FACTOR = 2.0
OVERDUE_S = 20.0


class Scheduler:
    def __init__(self, replication: Replication | None = None) -> None:
        self.index = WorkerIndex()
        self.queues = TaskQueues()
        # Workers that should ask again, since the last `pop_changed_workers`.
        self._changed: set[str] = set()
        self._prefetches = PrefetchPlanner(self.index, replication or Replication(), self._changed)
        # Where each waiting task is planned; those in `_unplaced` are planned nowhere.
        self._plan: dict[Key, WorkerState] = {}
        self._unplaced: dict[Key, WaitingTask] = {}
        self._running: dict[Key, WorkerState] = {}
        # When each planned task should begin.
        self._due_s: dict[Key, float] = {}

    def __len__(self) -> int:
        return len(self.queues)

    def __contains__(self, key: Key) -> bool:
        return key in self.queues

    @property
    def workers(self) -> list[str]:
        return list(self.index.workers)

    @property
    def slots(self) -> int:
        """Of all workers together."""
        return self.index.slots

    def worker(self, worker_id: str) -> WorkerState | None:
        return self.index.workers.get(worker_id)

    def workers_of(self, stage: str) -> list[WorkerState]:
        """All workers of a stage that are counted on."""
        return [worker for worker in self.index.workers.values() if worker.view.stage == stage]

    def left_s(self, key: Key, now_s: float) -> float:
        """How long a running task should still take."""
        worker = self._running.get(key)
        return max(0.0, worker.running[key] - now_s) if worker else 0.0

    def able_workers(self, kind: TaskKind) -> Iterator[WorkerView]:
        """All workers that can do tasks of the kind, whatever they hold."""
        return (worker.view for group in self.index.able(kind) for worker in group)

    def can_another(self, kind: TaskKind, nodes: frozenset[str], *, within_s: float) -> bool:
        """Whether a worker of none of these nodes can do tasks of the kind, and is not avoided for them.

        `within_s`: how long it may take to fetch what they need.
        """
        return avoidance.can_another(self.index, kind, nodes, within_s=within_s)

    def would_finish_s(self, task: WaitingTask, now_s: float) -> float | None:
        """In how many seconds a task that is not queued yet would be done if it were now; None: no worker can do it."""
        best = estimate.best_of(self._candidates(task), task, now_s)
        return estimate.estimate(best.worker, task, now_s).finish_s if best else None

    def planned_at(self, key: Key) -> WorkerState | None:
        return self._plan.get(key)

    def pop_changed_workers(self) -> set[str]:
        """Workers whose plan or fetches changed since the last call: they should ask again."""
        changed = set(self._changed)
        self._changed.clear()
        return changed

    def take_claims(self) -> list[Claim]:
        """Checkpoints whose fetch was planned since the last call, for the caller to claim."""
        return self._prefetches.pop_claims()

    # Workers

    def seen(self, view: WorkerView, now_s: float) -> None:
        """A worker described itself: it is new, or something may have changed."""
        worker = self.index.workers.get(view.id)
        if worker is None:
            self.index.add(WorkerState(view, now_s))
            self._place_some(LOOK_UNPLACED, now_s)
        elif worker.view != view:
            self._revise(worker, view, now_s)

    def _revise(self, worker: WorkerState, view: WorkerView, now_s: float) -> None:
        before = worker.view
        self.index.revise(worker, view)
        for model in [each for each in worker.fetches if each in view.held]:
            del worker.fetches[model]
        for model in [each for each in worker.fetches if each in view.unfetched]:
            self._give_up(worker, model, now_s)
        worker.failed = {each: since_s for each, since_s in worker.failed.items() if each not in view.held}
        self._begin_fetches(worker, now_s)
        does_other = (before.stage, before.offers, before.limits, before.avoided) != (
            view.stage,
            view.offers,
            view.limits,
            view.avoided,
        )
        if does_other or not before.held <= view.held:
            lost = [task for task in worker.in_order() if not self._stands(worker, task)]
            self._place_again(lost, now_s)
        if does_other:
            self._place_some(LOOK_UNPLACED, now_s)

    def _give_up(self, worker: WorkerState, model: str, now_s: float) -> None:
        """The fetch failed: tasks that need it go to other holders, or else may run here and report the error."""
        self._prefetches.drop(worker, model, now_s)
        self._place_elsewhere(worker, model, now_s)

    def _give_up_overdue(self, worker: WorkerState, now_s: float) -> None:
        for fetch in list(worker.fetches.values()):
            if now_s > fetch.ready_s + OVERDUE_FACTOR * (fetch.ready_s - fetch.start_s) + OVERDUE_S:
                self._give_up(worker, fetch.model, now_s)

    def _place_elsewhere(self, worker: WorkerState, model: str, now_s: float) -> None:
        if self.index.has_replica(worker.view.stage, model):
            self._place_again([task for task in worker.in_order() if model in task.kind.models], now_s)

    def _begin_fetches(self, worker: WorkerState, now_s: float) -> None:
        """Prefetch what its next tasks need, as far as more fetches may begin."""
        for task in islice(worker.in_order(), LOOK_PLANNED):
            if len(worker.fetches) >= FETCHES_LIMIT:
                return
            self._prefetches.begin_small_models(worker, task, now_s)

    def _stands(self, worker: WorkerState, task: WaitingTask) -> bool:
        """The worker can still do it, before others, without fetching a checkpoint that it lost."""
        checkpoint = task.kind.checkpoint
        if not worker.view.can_do(task.kind) or not avoidance.may(self.index, worker, task):
            return False
        return not worker.view.lacks(frozenset({checkpoint})) or checkpoint in worker.fetches

    def gone(self, worker_id: str, now_s: float) -> None:
        """It left, or died: what was planned for it goes elsewhere."""
        worker = self.index.workers.get(worker_id)
        if worker is None:
            return
        self.index.remove(worker)
        for key in list(worker.running):
            self._running.pop(key, None)
        self._place_again(list(worker.planned.values()), now_s)

    def asks(self, worker_id: str, now_s: float) -> None:
        """It opened a poll for work."""
        worker = self.index.workers.get(worker_id)
        if worker is not None:
            worker.asking += 1
            worker.heard_s = now_s

    def answered(self, worker_id: str, now_s: float) -> None:
        """That poll is over."""
        worker = self.index.workers.get(worker_id)
        if worker is not None:
            worker.asking = max(0, worker.asking - 1)
            worker.heard_s = now_s

    def heard(self, worker_id: str, now_s: float) -> None:
        """It is there for work, at another gateway."""
        worker = self.index.workers.get(worker_id)
        if worker is not None:
            worker.heard_s = now_s

    def fetches(self, worker_id: str) -> list[PlannedFetch]:
        """What a worker should prefetch, the most urgent first; from now on this counts as reported to it."""
        worker = self.index.workers.get(worker_id)
        if worker is None:
            return []
        fetches = worker.fetches_in_order()
        worker.reported_fetches = tuple(fetch.model for fetch in fetches)
        return fetches

    def has_new_fetches(self, worker_id: str) -> bool:
        """The worker should fetch something that was not reported to it."""
        worker = self.index.workers.get(worker_id)
        return worker is not None and any(model not in worker.reported_fetches for model in worker.fetches)

    def refuse(self, claim: Claim, holder: str, now_s: float) -> None:
        """Another gateway has that checkpoint fetched already, by `holder`, which may be unknown here."""
        model = claim.fetch.model
        worker, other = self.index.workers.get(claim.worker), self.index.workers.get(holder)
        if worker is None or other is worker or model not in worker.fetches:
            return
        self._prefetches.drop(worker, model, now_s)
        if other is not None and model not in other.view.held and model not in other.fetches:
            self._prefetches.begin(other, model, now_s, sticky=True)
        self._place_elsewhere(worker, model, now_s)

    # Tasks

    def add(self, task: WaitingTask, now_s: float) -> None:
        self.remove(task.key)
        self.queues.add(task)
        self._place(task, now_s)

    def remove(self, key: Key) -> None:
        """No error where the task is not queued."""
        task = self.queues.remove(key)
        if task is not None:
            self._unplan(task)

    def rerank(self, task: WaitingTask) -> None:
        """A queued task has another rank; where it is planned stays. No error where the task is not queued."""
        before = self.queues.remove(task.key)
        if before is None:
            return
        self.queues.add(task)
        worker = self._plan.get(task.key)
        if worker is not None:
            worker.rerank(before, task)
        elif task.key in self._unplaced:
            self._unplaced[task.key] = task

    def started(self, worker_id: str, task: WaitingTask, now_s: float) -> None:
        """It was leased."""
        worker = self.index.workers.get(worker_id)
        if worker is None or task.key in self._running:
            return
        needed = estimate.estimate(worker, task, now_s, ahead_s=0.0)
        worker.run(task.key, now_s + needed.finish_s, now_s)
        worker.combination = task.kind.combination
        self._running[task.key] = worker

    def ended(self, key: Key, now_s: float, *, heard: bool = True) -> None:
        """Its lease is over, with whatever result; `heard`: the worker reported it, and is there for more."""
        worker = self._running.pop(key, None)
        if worker is not None:
            worker.stop(key, now_s, heard=heard)

    # Placing

    def _place_some(self, count: int, now_s: float) -> None:
        """Try some of the tasks that no worker could do before, other ones with every call."""
        for task in list(islice(self._unplaced.values(), count)):
            del self._unplaced[task.key]
            self._place(task, now_s)

    def _place_again(self, tasks: Sequence[WaitingTask], now_s: float) -> None:
        for task in tasks:
            self._unplan(task)
        for task in tasks:
            self._place(task, now_s)

    def _place(self, task: WaitingTask, now_s: float) -> None:
        best = estimate.best_of(self._candidates(task), task, now_s)
        worker = best.worker if best else self._prefetches.first_replica(task, now_s)
        if worker is None:
            self._unplaced[task.key] = task
            return
        if best and task.kind.checkpoint:
            self._prefetches.consider_replicas(task, best, now_s)
        self._plan_at(worker, task, now_s)

    def _plan_at(self, worker: WorkerState, task: WaitingTask, now_s: float) -> None:
        self._unplaced.pop(task.key, None)
        self._prefetches.begin_small_models(worker, task, now_s)
        needed = estimate.estimate(worker, task, now_s)
        self._due_s[task.key] = now_s + needed.start_s
        worker.plan(task, needed.load_s + needed.patch_s)
        self._plan[task.key] = worker
        self._changed.add(worker.view.id)

    def _unplan(self, task: WaitingTask) -> None:
        self._unplaced.pop(task.key, None)
        self._due_s.pop(task.key, None)
        worker = self._plan.pop(task.key, None)
        if worker is not None:
            worker.unplan(task)

    def _candidates(self, task: WaitingTask) -> list[WorkerState]:
        """Without nodes that failed the task or that are avoided for it, while there are others."""
        return avoidance.preferred(self.index, self.index.near(task.kind, LOOK_WORKERS), task)

    # Choosing

    def choose(self, worker_id: str, limit: int, now_s: float) -> list[WaitingTask]:
        """At most `limit` tasks of one kind for the worker, the best first; a task that must run alone comes alone.

        What is planned for it, or what it would finish clearly sooner than the worker that it is planned for.
        """
        worker = self.index.workers.get(worker_id)
        if worker is None or limit <= 0:
            return []
        self._give_up_overdue(worker, now_s)
        self._leave_to_others(worker, now_s)
        self._begin_fetches(worker, now_s)
        self._place_some(LOOK_UNPLACED_ASKING, now_s)
        head = self._own(worker, now_s) or self._steal(worker, now_s)
        if head is None:
            self._prefetches.begin_speculative(worker, now_s)
            return []
        if head.alone or limit == 1:
            return [head]
        return [head, *self._batch_with(worker, head, limit - 1, now_s)]

    def _leave_to_others(self, worker: WorkerState, now_s: float) -> None:
        """Plan elsewhere what it is avoided for, where another worker can do it by now."""
        if worker.view.avoided:
            first = islice(worker.in_order(), LOOK_PLANNED)
            self._place_again([task for task in first if not avoidance.may(self.index, worker, task)], now_s)

    def _own(self, worker: WorkerState, now_s: float) -> WaitingTask | None:
        """The first planned task that can begin; preferably one whose checkpoint is on the device."""
        ready: list[WaitingTask] = []
        for task in worker.in_order():
            if self._is_ready(worker, task):
                ready.append(task)
                if len(ready) == LOOK_OWN:
                    break
        # Who came for one task waits for no other tenant's, whatever is on the device.
        counts = Counter(task.tenant for task in ready)
        if ready and counts[ready[0].tenant] == 1:
            return ready[0]
        return min(ready, key=lambda task: self._rank_s(worker, task, now_s), default=None)

    def _rank_s(self, worker: WorkerState, task: WaitingTask, now_s: float) -> tuple[float, Key]:
        overdue = now_s - task.queue_time_s >= STICKY_LIMIT_S
        penalty_s = 0.0 if overdue else min(STICKY_LIMIT_S, 4 * estimate.load_s(worker, task.kind.checkpoint))
        return task.rank_s + penalty_s, task.key

    def _is_ready(self, worker: WorkerState, task: WaitingTask) -> bool:
        """All is on its disk; or it does not prefetch; or prefetching failed: let it try and report the error."""
        if task.kind.models <= worker.view.held or not worker.view.takes_fetches:
            return True
        return worker.failed.keys() >= set(worker.view.lacks(task.kind.models))

    def _steal(self, worker: WorkerState, now_s: float) -> WaitingTask | None:
        """The first task that gains by moving here. If all of those lack a model, the first is planned here."""
        ready: list[WaitingTask] = []
        later: list[WaitingTask] = []
        for queue_id in self.queues.oldest(worker.view.stage, worker.view.held, LOOK_QUEUES):
            for task in self._first_for(worker, queue_id):
                if self._gain_s(worker, task, now_s) > GAIN_MIN_S:
                    is_here = task.kind.models <= worker.view.held or not worker.view.takes_fetches
                    (ready if is_here else later).append(task)
        chosen = min(ready or later, key=lambda task: (task.rank_s, task.key), default=None)
        if chosen is None:
            return None
        self._unplan(chosen)
        self._plan_at(worker, chosen, now_s)
        return chosen if ready else None

    def _first_for(self, worker: WorkerState, queue_id: QueueId) -> list[WaitingTask]:
        """Of the first tasks of a queue those that it can do; if there are none, the first that it can do.

        So large images do not hide small ones, and what it is avoided for hides nothing else.
        """
        view = worker.view
        able = [task for task in self.queues.first(queue_id, LOOK_TASKS) if view.can_do(task.kind)]
        if any(not view.avoids(task) for task in able):
            return able
        more = self.queues.first(queue_id, LOOK_QUEUE)[LOOK_TASKS:]
        fitting = (task for task in more if view.can_do(task.kind) and not view.avoids(task))
        return [*able, *islice(fitting, LOOK_TASKS)]

    def _gain_s(self, worker: WorkerState, task: WaitingTask, now_s: float, *, ahead_s: float = 0.0) -> float:
        """How much sooner this idle worker would finish it than the one it is planned for; less the fetching.

        The caller has checked that it can do it.
        """
        other = self._plan.get(task.key)
        if other is worker:
            return 0.0
        if not avoidance.may(self.index, worker, task):
            return 0.0
        if not self._prefetches.has_slot(worker, task):
            return 0.0
        here = estimate.estimate(worker, task, now_s, ahead_s=ahead_s)
        if other is None:
            return float("inf")
        there = estimate.estimate(other, task, now_s, ahead_s=other.ahead_s(task, now_s))
        # The later a plan is, the less it is believed.
        late_s = max(0.0, now_s - self._due_s[task.key])
        return there.finish_s + late_s - here.finish_s - FETCH_GAIN * here.fetch_s

    def _batch_with(self, worker: WorkerState, head: WaitingTask, limit: int, now_s: float) -> Iterator[WaitingTask]:
        """Tasks for the same batch: planned here too, or not begun sooner elsewhere."""
        found, each_s = 0, worker.run_s(head) / worker.view.slots
        for task in self.queues.first(queue_of(head.kind), LOOK_BATCH):
            if found == limit:
                return
            if task.key == head.key or task.kind != head.kind or task.alone:
                continue
            is_ours = self._plan.get(task.key) is worker
            if is_ours or self._gain_s(worker, task, now_s, ahead_s=(found + 1) * each_s) > GAIN_MIN_S:
                found += 1
                yield task
