"""The lease loop: its settings, the poll for tasks, and how a worker starts what it gets and drains. Knows no stage."""

import asyncio
import hashlib
import os
import socket
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from google.protobuf.message import Message
from pydantic import Field, SecretStr
from pydantic_settings import BaseSettings, SettingsConfigDict

from fanlight import __version__
from fanlight.contract.limits import INLINE_LEASE_LIMIT_BYTES
from fanlight.contract.needs import contract_revision
from fanlight.errors import FanlightError
from fanlight.queue.v1 import queue_pb2
from services.kernel.config import MIB, Addresses, SecretFile, secret_of
from services.kernel.logs import get_logger
from services.worker.admission import Admission, Slots
from services.worker.blobs import Goodput
from services.worker.joining import GatewayContact
from services.worker.leases import QueueCalls, WorkerLeases
from services.worker.ports import Stage
from services.worker.prefetch import Prefetcher
from services.worker.retry import Backoff, Env, race
from services.worker.runner import TaskRunner

log = get_logger()

# The longest that a gateway holds a poll open.
POLL_WAIT_MAX_S = 60.0
# After an answer without tasks that came long before the wait was over, so that no gateway can make a worker spin.
EARLY_PAUSE_S = 0.2
# For returning the tasks that are left after the grace period.
RETURN_DEADLINE_S = 5.0
# The lists of a worker's description that are sent only when they changed.
HOLDINGS: tuple[Literal["vram_models", "ram_models", "disk_models", "unfetched_models"], ...] = (
    "vram_models",
    "ram_models",
    "disk_models",
    "unfetched_models",
)


def default_state_dir() -> Path:
    """As the XDG base directory specification says."""
    base = os.environ.get("XDG_STATE_HOME", "")
    return (Path(base) if base.startswith("/") else Path.home() / ".local" / "state") / "fanlight"


class WorkerSettings(BaseSettings):
    """The settings of the lease loop, the same for every stage: `FANLIGHT_WORKER_*`."""

    model_config = SettingsConfigDict(env_prefix="FANLIGHT_WORKER_", extra="ignore", frozen=True)

    gateway: Addresses | None = Field(
        None,
        description="HOST:PORT of the gateway to lease tasks from; or several IP addresses of gateways with one store,"
        " separated by commas. Unset: direct calls only.",
    )
    node: str = Field(
        default_factory=socket.gethostname,
        min_length=1,
        max_length=128,
        description="The machine's name, the same for all its workers. Unset: the host name.",
    )
    join_code: SecretStr | None = Field(
        None, description="From `fanlight nodes invite`: lets this node join, and may name the gateway. A secret."
    )
    join_code_file: SecretFile = Field(None, description="A file with the join code.")
    identity: Literal["", "saladcloud", "certificate"] = Field(
        "",
        description="What the node joins with instead of a code: `saladcloud`, that platform's token of its machines;"
        " or `certificate`, FANLIGHT_TLS_CERT_FILE, for a gateway that asks for one.",
    )
    identity_token_file: SecretFile = Field(
        None,
        description="A file with a platform's token (JWT) that the node joins with, such as Kubernetes' projected"
        " service account token.",
    )
    state_dir: Path = Field(
        default_factory=default_state_dir,
        description="Where the node's credential is kept, so that a restarted worker is the same node. The workers of"
        " one machine share it.",
    )
    gateway_wait_s: float = Field(
        0.0, ge=0, le=600, description="How long to wait at the start for a gateway on this machine that starts too."
    )
    processes: str = Field(
        "1",
        pattern=r"^(auto|[1-9]|[1-5][0-9]|6[0-4])$",
        description="Worker processes to run on this machine, 1 to 64: this one and children of it. auto: as many as"
        " help on its cores, memory and cards, measured once the default model is loaded.",
    )
    measure: bool = Field(
        False,
        description="Print, once the default model is loaded, a line of cores, memory and cards that one worker uses,"
        " from which `fanlight up` plans others beside it.",
    )
    poll_wait_s: float = Field(
        20.0, ge=0, le=POLL_WAIT_MAX_S, description="How long the gateway may hold a poll open until a task arrives."
    )
    progress_every_s: float = Field(0.5, gt=0, description="Shortest time between two progress reports.")
    direct_token: SecretStr | None = Field(
        None,
        description="Turns on direct calls, and is the bearer token that they must send. Unset: on loopback direct"
        " calls need no token; elsewhere there are none, and only health is answered.",
    )
    direct_token_file: SecretFile = Field(None, description="A file with the token of direct calls.")

    def token_of_direct_calls(self) -> str:
        return secret_of(self.direct_token, self.direct_token_file)


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerLimits:
    """Limits of the lease loop that no operator sets."""

    # How many tasks to lease at most in one poll; a gateway returns at most 64.
    batch_tasks: int = 16
    # How often a worker without a free slot polls, to report.
    report_every_s: float = 10.0
    # The longest back-off before a failed call is retried.
    retry_delay_max_s: float = 5.0
    # How long a worker that never joined tries where the gateway refuses it, before its process ends. Platforms that
    # start it again at once thus do so at most every ten seconds.
    refused_exit_s: float = 10.0
    # The same for one that had joined: the operator may be changing the token on all machines.
    refused_again_exit_s: float = 600.0
    # How long the gateway may be silent until the worker says that it is not ready.
    unreachable_after_s: float = 120.0
    # How long sending a finished task's result is retried.
    hand_in_limit_s: float = 900.0
    # The largest input image that is fetched.
    input_bytes_max: int = 64 * MIB
    # Size of the cache of input images in memory.
    input_cache_bytes: int = 64 * MIB


class Poller:
    """One poll: reports this worker, its capabilities and its leases, and returns the tasks that it gets."""

    def __init__(
        self,
        stage: Stage[Any],
        leases: WorkerLeases,
        queue: QueueCalls,
        goodput: Goodput,
        prefetcher: Prefetcher,
        *,
        worker_id: Callable[[], str],
        node: str,
        slots: int,
        secret: bytes = b"",
        note_output_bytes_max: Callable[[int], None] = lambda bytes_max: None,
    ) -> None:
        """`secret`: random, of this process; no other can poll under its id.

        `note_output_bytes_max`: called with how large an output may be that comes along with a completion.
        """
        self._note_output_bytes_max = note_output_bytes_max
        self._worker_id, self._secret = worker_id, secret
        self._stage = stage
        self._leases = leases
        self._queue = queue
        self._goodput = goodput
        self._prefetcher = prefetcher
        self._node = node
        self._slots = slots
        # What the stage returned last, the canonical form that is sent, and the digest of that.
        self._latest: queue_pb2.Capabilities | None = None
        self._sent = queue_pb2.Capabilities()
        self._digest = b""
        # The digest of the capabilities that the gateway has.
        self._known = b""
        # The digest of the held models that it has.
        self._known_holdings = b""

    async def poll(self, *, max_tasks: int, wait_s: float, draining: bool = False) -> Sequence[queue_pb2.LeasedTask]:
        self._prefetcher.finished.clear()
        capabilities, digest = self._capabilities()
        worker = self._worker()
        holdings = holdings_digest(worker)
        is_unchanged = holdings == self._known_holdings
        if is_unchanged:
            for name in HOLDINGS:
                worker.ClearField(name)
        request = queue_pb2.LeaseTasksRequest(
            worker=worker,
            holdings_digest=holdings,
            holdings_unchanged=is_unchanged,
            capabilities_digest=digest,
            capabilities=None if digest == self._known else capabilities,
            max_tasks=max_tasks,
            held_lease_tokens=self._leases.tokens,
            wait_s=wait_s,
            draining=draining,
            worker_secret=self._secret,
            inline_bytes_max=INLINE_LEASE_LIMIT_BYTES,
        )
        answer = await self._queue.lease(request)
        self._known = b"" if answer.wants_capabilities else digest
        self._known_holdings = answer.holdings_digest
        if answer.has_fetches:
            self._prefetcher.want(answer.fetches)
        self._note_output_bytes_max(answer.inline_output_bytes_max)
        return answer.tasks

    def _capabilities(self) -> tuple[queue_pb2.Capabilities, bytes]:
        latest = self._stage.capabilities()
        if latest is not self._latest:
            self._latest = latest
            self._sent = canonical(latest, self._stage.request_type)
            self._digest = hashlib.sha256(self._sent.SerializeToString(deterministic=True)).digest()
        return self._sent, self._digest

    def _worker(self) -> queue_pb2.Worker:
        worker = queue_pb2.Worker()
        self._stage.describe(worker)
        worker.id = self._worker_id()
        worker.node = self._node
        worker.stage = self._stage.name
        worker.version = __version__
        worker.slots = self._slots
        if not worker.goodput_bps:
            worker.goodput_bps = self._goodput.bps
            worker.goodput_deviation_bps = self._goodput.deviation_bps
        worker.takes_fetches = self._prefetcher.is_able
        worker.unfetched_models[:] = self._prefetcher.unfetched
        return worker


def holdings_digest(worker: queue_pb2.Worker) -> bytes:
    """Of the models that it holds and those that it could not prefetch, in whatever order."""
    held = queue_pb2.Worker(
        vram_models=sorted(worker.vram_models),
        ram_models=sorted(worker.ram_models),
        disk_models=sorted(worker.disk_models),
        unfetched_models=sorted(worker.unfetched_models),
    )
    return hashlib.sha256(held.SerializeToString(deterministic=True)).digest()


def canonical(capabilities: queue_pb2.Capabilities, request_type: type[Message]) -> queue_pb2.Capabilities:
    """Sorted, so that workers with equal capabilities send equal bytes; with the contract's revision added."""
    result = queue_pb2.Capabilities()
    result.CopyFrom(capabilities)
    result.annotators.sort(key=lambda each: each.id)
    result.models.sort(key=lambda each: (each.kind, each.id))
    result.offers[:] = sorted(set(capabilities.offers))
    result.limits.sort(key=lambda each: each.name)
    result.contract.CopyFrom(contract_revision(request_type))
    return result


class LeaseLoop:
    """Polls for tasks while slots are free, one poll at a time, and starts what it gets.

    A poll offers the free slots and reserves none: a direct call may take one while the poll is open. A task that
    arrives for a slot that is gone is returned at once, which does not count as a failure. (Ending the poll instead
    would lose a task that is on its way, which counts as a lost lease.)
    """

    def __init__(
        self,
        admission: Admission,
        leases: WorkerLeases,
        poller: Poller,
        runner: TaskRunner,
        settings: WorkerSettings,
        limits: WorkerLimits,
        prefetcher: Prefetcher,
        env: Env,
        stop: asyncio.Event,
        contact: GatewayContact,
        recover: Callable[[FanlightError], Awaitable[bool]],
    ) -> None:
        """`recover`: whether a poll that failed can be tried again at once, with another credential."""
        self._contact, self._recover = contact, recover
        self._prefetcher = prefetcher
        self._admission = admission
        self._leases = leases
        self._poller = poller
        self._runner = runner
        self._settings = settings
        self._limits = limits
        self._env = env
        self._stop = stop
        self._backoff = Backoff(env, max_s=limits.retry_delay_max_s)
        # Whether the last poll was answered; else the gateway may believe that we have more leases than we do.
        self._is_reported = False

    async def run(self, group: asyncio.TaskGroup) -> None:
        """Poll until `stop` is set; the tasks run in the group. JoinRefused if the gateway never takes this worker."""
        while not self._stop.is_set():
            if self._is_reported:
                events = self._admission.wait_for_free(), self._prefetcher.finished.wait()
                await self._until(*events, limit_s=self._limits.report_every_s)
            pause_s = await self._poll(group)
            if pause_s:
                await self._until(limit_s=pause_s)

    async def _until(self, *events: Coroutine[Any, Any, object], limit_s: float) -> None:
        await race(self._env.sleep(limit_s), *events, self._stop.wait())

    async def _poll(self, group: asyncio.TaskGroup) -> float:
        """Offer the free slots, or only report if there are none; start the tasks. Returns how long to pause then."""
        start_s = self._env.now_s()
        count = min(self._admission.free, self._limits.batch_tasks)
        # The first poll, also after a failure, is short: its answer says that the gateway is there.
        wait_s = self._settings.poll_wait_s if count and self._contact.answers else 0.0
        self._is_reported = False
        try:
            # A task may wait for a model that was just prefetched. A task that is on its way meanwhile is returned.
            polling = self._poller.poll(max_tasks=count, wait_s=wait_s)
            tasks = await race(polling, self._prefetcher.finished.wait(), self._stop.wait())
        except FanlightError as error:
            if await self._recover(error):
                return 0.0
            await self._contact.note_failure(error)
            return self._backoff.next_s(error)
        if tasks is None:
            return 0.0
        self._is_reported = True
        self._contact.note_answer()
        self._backoff.reset()
        await self._start(group, tasks)
        is_early = not tasks and self._env.now_s() - start_s < wait_s / 2
        return EARLY_PAUSE_S if is_early else 0.0

    async def _start(self, group: asyncio.TaskGroup, tasks: Sequence[queue_pb2.LeasedTask]) -> None:
        """Run as many as there are slots now; the others are returned before this ends."""
        slots = self._admission.take(len(tasks))
        for task, slot in zip(tasks, slots, strict=False):
            self._start_one(group, task, slot)
        await asyncio.gather(*(self._runner.return_task(task) for task in tasks[len(slots) :]))

    def _start_one(self, group: asyncio.TaskGroup, task: queue_pb2.LeasedTask, slot: Slots) -> None:
        lease = self._leases.add(task, now_s=self._env.now_s())
        lease.runner = group.create_task(self._runner.run(lease, slot), name=task.name)

        def end(_: object) -> None:
            # Also for a task that was cancelled before it began.
            slot.release()
            self._leases.remove(lease)

        lease.runner.add_done_callback(end)

    async def drain(self, *, grace_s: float) -> None:
        """Let running tasks finish within the grace period, then stop the rest and return them to the queue."""
        log.info("worker_draining", tasks=len(self._leases), grace_s=grace_s)
        await asyncio.gather(self._report_draining(), self._finish(grace_s))
        left = list(self._leases)
        for lease in left:
            self._leases.remove(lease)
            lease.stop()
        try:
            async with asyncio.timeout(RETURN_DEADLINE_S):
                await asyncio.gather(*(self._runner.return_task(lease.task) for lease in left))
        except TimeoutError:
            log.warning("tasks_not_returned", tasks=len(left))

    async def _finish(self, grace_s: float) -> None:
        runners = [lease.runner for lease in self._leases if lease.runner]
        if runners:
            await race(asyncio.wait(runners), self._env.sleep(grace_s))

    async def _report_draining(self) -> None:
        try:
            await self._poller.poll(max_tasks=0, wait_s=0.0, draining=True)
        except FanlightError as error:
            log.warning("draining_not_reported", reason=error.reason)
