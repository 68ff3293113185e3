"""How many worker processes of a stage a machine runs: as its settings say, or by what the first one measured.

Pure: no process, no file.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from fanlight.errors import InvalidInput
from fanlight.machine import Machine

STAGE_OF_SERVICE = {"preprocessor": "preprocess", "diffusion": "diffusion"}
STAGES = tuple(sorted(STAGE_OF_SERVICE.values()))
AUTO = "auto"
PROCESSES_MAX = 64
MEASURE_SETTING = "FANLIGHT_WORKER_MEASURE"
# One gateway feeds no more small annotations than two processes make, and needs cores itself.
PREPROCESSORS_MAX, CORES_PER_PREPROCESSOR = 2, 4
# Of the available memory, what further workers may take; the rest is for images and the models of requests.
MEMORY_SHARE = 0.5
# What a measurement may be above a whole number of cores: other processes and the event loop count too.
CORES_TOLERANCE = 0.25
# What a process is counted with at least: requests come after the measurement.
WORKER_BYTES_MIN = 128 * 1024 * 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Warm:
    """What the first worker of a stage says of itself once it is warm."""

    # How many cores one piece of its work kept busy.
    cores: float
    # What a second process like it would need, beyond what they share.
    memory_bytes: int
    # GPUs that it may use; 0: it computes on the CPU.
    cards: int = 0

    @classmethod
    def parse(cls, values: Mapping[str, str]) -> "Warm | None":
        """From the pairs of its line; None for one that does not say it."""
        try:
            return cls(
                cores=float(values["cores"]), memory_bytes=int(values["memory_bytes"]), cards=int(values["cards"])
            )
        except (KeyError, ValueError):
            return None


@dataclass(frozen=True, slots=True)
class WorkerCounts:
    """By service; a service that is not in it has `auto`."""

    given: Mapping[str, int] = field(default_factory=dict)

    def at_start(self, service: str) -> int:
        """How many to start before anything was measured."""
        return self.given.get(service, 1)

    def is_auto(self, service: str) -> bool:
        return service not in self.given


def parse_workers(text: str) -> WorkerCounts:
    """From `diffusion=2,preprocess=auto`. InvalidInput that names the part that cannot be read."""
    services = {stage: service for service, stage in STAGE_OF_SERVICE.items()}
    given: dict[str, int] = {}
    seen: set[str] = set()
    for part in filter(None, (each.strip() for each in text.split(","))):
        stage, is_pair, count = (each.strip() for each in part.partition("="))
        if not is_pair or stage not in services:
            raise InvalidInput(
                f"--workers: {part!r} must be STAGE=COUNT, with a stage of {', '.join(sorted(services))}"
            )
        if stage in seen:
            raise InvalidInput(f"--workers: {stage} is there twice")
        seen.add(stage)
        if count == AUTO:
            continue
        if not (count.isascii() and count.isdigit() and 1 <= int(count) <= PROCESSES_MAX):
            raise InvalidInput(f"--workers: {stage} must be {AUTO} or 1 to {PROCESSES_MAX}, not {count!r}")
        given[services[stage]] = int(count)
    return WorkerCounts(given)


@dataclass(frozen=True, slots=True)
class ProcessCount:
    """How many processes, and why, in words."""

    count: int
    reason: str


def choose(service: str, warm: Warm, machine: Machine) -> ProcessCount:
    """How many processes of the service help, the first one included."""
    if warm.cards:
        return ProcessCount(min(warm.cards, PROCESSES_MAX), "one a card")
    by_cores = _by_cores(service, warm, machine)
    room_bytes = machine.available_bytes * MEMORY_SHARE
    by_memory = 1 + int(room_bytes // max(WORKER_BYTES_MIN, warm.memory_bytes))
    count = max(1, min(by_cores, by_memory, PROCESSES_MAX))
    if service == "preprocessor" and by_cores <= by_memory:
        return ProcessCount(count, f"what a gateway beside them on {machine.cores:g} cores feeds")
    if by_memory < by_cores:
        return ProcessCount(count, f"memory for no more, at {warm.memory_bytes / 1e6:,.0f} MB each")
    return ProcessCount(count, f"{machine.cores:g} cores, {_whole_cores(warm)} for each")


def _by_cores(service: str, warm: Warm, machine: Machine) -> int:
    if service == "preprocessor":
        return min(PREPROCESSORS_MAX, int(machine.cores // CORES_PER_PREPROCESSOR))
    return int(machine.cores // _whole_cores(warm))


def _whole_cores(warm: Warm) -> int:
    return max(1, math.ceil(warm.cores - CORES_TOLERANCE))


def environ_of_one(
    service: str, count: int, *, is_auto: bool, machine: Machine, environ: Mapping[str, str]
) -> dict[str, str]:
    """Of each of so many workers that are started at once; the first one where the number is still to be found."""
    if is_auto:
        return {MEASURE_SETTING: "true"}
    return {} if count == 1 else _shares(service, count, machine, environ)


def environ_of_further(
    service: str, number: int, choice: ProcessCount, warm: Warm, machine: Machine, environ: Mapping[str, str]
) -> dict[str, str]:
    """Of the worker with that number, from 2 on. The first has what it started with."""
    if warm.cards:
        return {f"FANLIGHT_{service.upper()}_DEVICE": f"cuda:{number - 1}"}
    return _shares(service, choice.count, machine, environ)


def _shares(service: str, count: int, machine: Machine, environ: Mapping[str, str]) -> dict[str, str]:
    """What one of so many workers may use of memory and cores, where the settings do not say it."""
    if service != "diffusion":
        return {}
    shares = {
        "FANLIGHT_DIFFUSION_RAM_BYTES": int(machine.available_bytes * MEMORY_SHARE / count),
        "OMP_NUM_THREADS": max(1, int(machine.cores / count)),
    }
    return {name: str(share) for name, share in shares.items() if name not in environ}
