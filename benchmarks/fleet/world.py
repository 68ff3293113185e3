"""The workload and the machines: what is asked for, when nodes die, what their links and disks do. Knows no policy."""

import heapq
import random
from bisect import bisect
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import accumulate

MB, GB = 10**6, 10**9
CHECKPOINT_BYTES, LORA_BYTES = 1_720 * MB, 150 * MB
STEPS = 20
# As the ordering's own estimate has them.
DISK_BYTES_PER_S, BUS_BYTES_PER_S = 2e9, 10e9
# What patching a LoRA into the weights takes besides reading its file: the bus; 0.03 s on the device, as rank 128 for
# SD 1.5's attention and text encoder (a LoRA of 151 MB) concerns 352 million weights, which is 90 GFLOP at 10 TFLOPS
# (9 ms) and 7 GB of copies to float32, sums and back at 360 GB/s (20 ms); 0.035 s for the calls of its 264 layers.
# `benchmarks.patching` counts and measures that. All one after another, as if nothing overlapped.
PATCH_S = LORA_BYTES / BUS_BYTES_PER_S + 0.03 + 0.035
# One generation differs from the next by up to this part.
NOISE = 0.1


@dataclass(frozen=True, kw_only=True)
class Options:
    nodes: int = 100
    rate_per_s: float = 2.0
    duration_s: float = 7_200.0
    warm_up_s: float = 2_400.0
    combinations: int = 2_000
    checkpoints: int = 400
    without_lora: float = 0.35
    run_s: tuple[float, float] = (3.0, 12.0)
    link_bps: float = 100e6
    link_factor: tuple[float, float] = (0.5, 1.5)
    disk_bytes: int = 50 * GB
    ram_checkpoints: int = 4
    # Files of LoRAs that came or were used last: 1.2 GB of what the system keeps of files.
    ram_loras: int = 8
    availability: float = 0.93
    repair_s: float = 1_200.0
    disk_lost: float = 0.5
    # How long a vanished node is believed to live.
    notice_s: float = 20.0
    # From a change at the gateway to an idle worker that acts on it, and to a busy one.
    answer_s: float = 0.05
    hint_s: float = 0.5
    # How often an idle worker asks again of itself.
    recheck_s: float = 5.0
    # Workers as elsewhere: downloads come in the order in which they were asked for, and so are jobs done.
    plain_workers: bool = False
    # How long after the last arrival unfinished work is waited for.
    drain_s: float = 1_800.0


class Clock:
    def __init__(self) -> None:
        self.now_s = 0.0
        self._events: list[tuple[float, int, Callable[..., None], tuple[object, ...]]] = []
        self._count = 0

    def after(self, delay_s: float, do: Callable[..., None], *args: object) -> None:
        self._count += 1
        heapq.heappush(self._events, (self.now_s + delay_s, self._count, do, args))

    def run(self, until_s: float, done: Callable[[], bool]) -> None:
        while self._events and self._events[0][0] <= until_s and not done():
            self.now_s, _, do, args = heapq.heappop(self._events)
            do(*args)


@dataclass(eq=False, slots=True)
class Job:
    number: int
    arrival_s: float
    checkpoint: str
    lora: str
    end_s: float = 0.0
    node: "Node | None" = None

    @property
    def models(self) -> tuple[str, ...]:
        return (self.checkpoint, self.lora) if self.lora else (self.checkpoint,)


def size_of(model: str) -> int:
    return CHECKPOINT_BYTES if model.startswith("c") else LORA_BYTES


class Popularity:
    """Zipf(1) over combinations; each one's checkpoint is drawn by Zipf(1) too."""

    def __init__(self, options: Options, random_: random.Random) -> None:
        weights = list(accumulate(1 / (i + 1) for i in range(options.checkpoints)))
        self._combinations = []
        for i in range(options.combinations):
            checkpoint = f"c{bisect(weights, random_.random() * weights[-1])}"
            self._combinations.append((checkpoint, "" if random_.random() < options.without_lora else f"l{i}"))
        self._weights = list(accumulate(1 / (i + 1) for i in range(options.combinations)))

    @property
    def models(self) -> set[str]:
        return {model for combination in self._combinations for model in combination if model}

    def draw(self, random_: random.Random) -> tuple[str, str]:
        return self._combinations[bisect(self._weights, random_.random() * self._weights[-1])]


@dataclass(eq=False, slots=True)
class Transfer:
    model: str
    left_bytes: float
    is_small: bool


@dataclass(eq=False)
class Node:
    """One GPU, one link that small models use first, a disk and RAM that forget what was used longest ago."""

    name: str
    clock: Clock
    run_s: float
    link_bps: float
    options: Options
    # Told when a model has come.
    came: Callable[["Node", str], None]
    up: bool = True
    # Grows with every restart.
    life: int = 0
    # Grows with every change of what it holds.
    version: int = 0
    disk: dict[str, int] = field(default_factory=dict)
    # Models that are on their way.
    fetching: set[str] = field(default_factory=set)
    ram: list[str] = field(default_factory=list)
    ram_loras: list[str] = field(default_factory=list)
    # Checkpoint and LoRA of the job before, whose patched copies are there still.
    patched: tuple[str, ...] = ()
    running: Job | None = None
    # Models that must not be evicted.
    needed: Callable[[], set[str]] = set
    fetched_bytes: float = 0.0
    busy_s: float = 0.0
    _disk_bytes: int = 0
    _transfers: list[Transfer] = field(default_factory=list)
    _moved_s: float = 0.0
    _turn: int = 0

    def holds(self, job: Job) -> bool:
        return all(model in self.disk for model in job.models)

    def left_bytes(self) -> float:
        self._move()
        return sum(transfer.left_bytes for transfer in self._transfers)

    def fetch(self, model: str) -> None:
        if model in self.disk or model in self.fetching:
            return
        self._move()
        size = size_of(model)
        self.fetching.add(model)
        self._transfers.append(Transfer(model, size, size < GB))
        if not self.options.plain_workers:
            self._transfers.sort(key=lambda transfer: not transfer.is_small)
        self._schedule()

    def drop_fetches(self, wanted: set[str]) -> None:
        self._move()
        self._transfers = [transfer for transfer in self._transfers if transfer.model in wanted]
        self.fetching &= wanted
        self._schedule()

    def _move(self) -> None:
        if self._transfers:
            moved = (self.clock.now_s - self._moved_s) * self.link_bps / 8
            moved = min(moved, self._transfers[0].left_bytes)
            self._transfers[0].left_bytes -= moved
            self.fetched_bytes += moved
        self._moved_s = self.clock.now_s

    def _schedule(self) -> None:
        self._turn += 1
        if self._transfers:
            self.clock.after(self._transfers[0].left_bytes * 8 / self.link_bps, self._arrived, self._turn)

    def _arrived(self, turn: int) -> None:
        if turn != self._turn or not self._transfers:
            return
        self._move()
        transfer = self._transfers.pop(0)
        self.fetching.discard(transfer.model)
        self.fetched_bytes += transfer.left_bytes
        self._store(transfer.model)
        self._schedule()
        self.came(self, transfer.model)

    def _store(self, model: str) -> None:
        self.version += 1
        self.disk[model] = size_of(model)
        if size_of(model) == LORA_BYTES:
            self._touch_lora(model)
        self._disk_bytes += size_of(model)
        if self._disk_bytes > self.options.disk_bytes:
            keep = self.needed() | {model}
            for old in [each for each in self.disk if each not in keep]:
                self._disk_bytes -= self.disk.pop(old)
                if old in self.ram:
                    self.ram.remove(old)
                if self._disk_bytes <= self.options.disk_bytes:
                    break

    def work_s(self, job: Job, noise: float, *, everywhere: bool = False) -> float:
        """How long it takes with all on disk; marks what is used."""
        run_s = self.run_s * (1 + NOISE * noise)
        if everywhere:
            return run_s
        load_s = self._patch_s(job)
        if not (self.ram and self.ram[-1] == job.checkpoint):
            load_s += CHECKPOINT_BYTES / BUS_BYTES_PER_S
            load_s += 0 if job.checkpoint in self.ram else CHECKPOINT_BYTES / DISK_BYTES_PER_S
        for model in job.models:
            self.disk[model] = self.disk.pop(model)
        if self.ram[-1:] != [job.checkpoint]:
            self.version += 1
        if job.checkpoint in self.ram:
            self.ram.remove(job.checkpoint)
        self.ram = [*self.ram, job.checkpoint][-self.options.ram_checkpoints :]
        return load_s + run_s

    def _patch_s(self, job: Job) -> float:
        """Nothing where the job before had the same combination: its patched copies are still there."""
        before, self.patched = self.patched, job.models
        if not job.lora:
            return 0.0
        is_read = job.lora in self.ram_loras
        self._touch_lora(job.lora)
        if before == job.models:
            return 0.0
        return PATCH_S if is_read else PATCH_S + LORA_BYTES / DISK_BYTES_PER_S

    def _touch_lora(self, lora: str) -> None:
        self.ram_loras = [*(each for each in self.ram_loras if each != lora), lora][-self.options.ram_loras :]

    def die(self) -> None:
        self._move()
        self.up = False
        self.running = None
        self._transfers = []
        self.fetching.clear()
        self._turn += 1
        self.ram = []
        self.ram_loras = []
        self.patched = ()

    def rise(self, *, disk_lost: bool) -> None:
        self.up = True
        self.life += 1
        self.version += 1
        if disk_lost:
            self.disk = {}
            self._disk_bytes = 0
