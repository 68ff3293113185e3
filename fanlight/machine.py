"""What of this machine the process may use: cores and memory, by its affinity and its container's limits.

Knows the files of cgroup v1 and v2 and nothing of what runs in them. A file that is missing or odd limits nothing.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_KIB = 1024
# Of one CPU controller in version 1, by the name that its folder has.
_CPU_V1, _CPUSET_V1, _MEMORY_V1 = "cpu", "cpuset", "memory"


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    # Of CPU time; 0.5 where a container may use half of one core.
    cores: float
    # The whole, and what of it could be had now without taking from others.
    memory_bytes: int
    available_bytes: int

    @property
    def threads(self) -> int:
        """How many threads are worth starting for one computation."""
        return max(1, int(self.cores))


def this_machine(root: Path = Path("/"), *, affinity: int | None = None) -> Machine:
    """`affinity`: how many CPUs the process may run on; None asks the system."""
    whole, available = _memory_of_system(root)
    folders = _Folders(root)
    cores = float(affinity or _affinity())
    for folder in folders.of(_CPU_V1):
        cores = min(cores, _quota(folder) or cores)
    for folder in folders.of(_CPUSET_V1):
        cores = min(cores, _cpus_in_set(folder) or cores)
    for folder in folders.of(_MEMORY_V1):
        limit = _number(folder / "memory.max") or _number(folder / "memory.limit_in_bytes")
        if limit:
            used = _number(folder / "memory.current") or _number(folder / "memory.usage_in_bytes") or 0
            whole, available = min(whole, limit), min(available, max(0, limit - used + _reclaimable(folder)))
    return Machine(cores=cores, memory_bytes=whole, available_bytes=available)


def _affinity() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


class _Folders:
    """Where limits of this process are: in its own control group and in each one around it."""

    def __init__(self, root: Path) -> None:
        self._mount = root / "sys/fs/cgroup"
        # By the names of their controllers; version 2 has one group, with an empty name.
        self._paths: dict[str, str] = {}
        for line in _text(root / "proc/self/cgroup").splitlines():
            _, _, rest = line.partition(":")
            names, _, path = rest.partition(":")
            self._paths.update(dict.fromkeys(names.split(","), path))

    def of(self, controller: str) -> Iterator[Path]:
        """Of version 2 and of version 1: a machine may have both."""
        yield from _upwards(self._mount, self._paths.get("", "/"))
        yield from _upwards(self._mount / controller, self._paths.get(controller, "/"))


def _upwards(mount: Path, path: str) -> Iterator[Path]:
    """The group's folder and those above, to the mount. In a container only the mount may be visible."""
    yield mount
    folder = mount
    for name in path.strip("/").split("/"):
        if name in ("", ".", ".."):
            continue
        folder /= name
        yield folder


def _quota(folder: Path) -> float | None:
    """Of CPU time, in cores; None where there is none."""
    quota, _, period = _text(folder / "cpu.max").strip().partition(" ")
    if not quota:
        quota, period = _text(folder / "cpu.cfs_quota_us").strip(), _text(folder / "cpu.cfs_period_us").strip()
    if not (quota.isdigit() and period.isdigit() and int(quota) and int(period)):
        return None
    return int(quota) / int(period)


def _cpus_in_set(folder: Path) -> int | None:
    """Of a list such as `0-3,7`; None where there is none."""
    for name in ("cpuset.cpus.effective", "cpuset.effective_cpus", "cpuset.cpus"):
        text = _text(folder / name).strip()
        parts = [part.partition("-") for part in text.split(",") if part]
        if parts and all(first.isdigit() and (not dash or last.isdigit()) for first, dash, last in parts):
            return sum(int(last or first) - int(first) + 1 for first, _, last in parts)
    return None


def _reclaimable(folder: Path) -> int:
    """The file pages that the group has cached and does not use."""
    for line in _text(folder / "memory.stat").splitlines():
        name, _, value = line.partition(" ")
        if name == "inactive_file" and value.isdigit():
            return int(value)
    return 0


def _memory_of_system(root: Path) -> tuple[int, int]:
    """The whole and the available bytes."""
    found: dict[str, int] = {}
    for line in _text(root / "proc/meminfo").splitlines():
        name, _, value = line.partition(":")
        number = value.split()[0] if value.split() else ""
        if number.isdigit():
            found[name] = int(number) * _KIB
    whole = found.get("MemTotal") or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return whole, found.get("MemAvailable", whole)


def _number(file: Path) -> int | None:
    """None for a missing file and for `max`."""
    text = _text(file).strip()
    return int(text) if text.isdigit() else None


def _text(file: Path) -> str:
    try:
        return file.read_text(errors="replace")
    except OSError:
        return ""
