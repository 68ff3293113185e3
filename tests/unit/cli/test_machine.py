"""What a process may use of its machine, read from files as the kernel writes them."""

from pathlib import Path

import pytest

from fanlight.machine import Machine, this_machine

GIB = 1024**3
HALF_A_CORE, TWO_CORES = "50000 100000\n", "200000 100000\n"


@pytest.fixture
def root(tmp_path):
    """A machine of 64 GiB, of which 48 are available, in no group."""
    write(tmp_path, {"proc/meminfo": f"MemTotal: {64 * 1024**2} kB\nMemAvailable: {48 * 1024**2} kB\nOdd:\n"})
    return tmp_path


def write(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        file = root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)


def test_without_limits_a_process_has_the_whole_machine(root):
    assert this_machine(root, affinity=64) == Machine(cores=64.0, memory_bytes=64 * GIB, available_bytes=48 * GIB)


@pytest.mark.parametrize(
    ("files", "cores"),
    [
        ({"cpu.max": HALF_A_CORE}, 0.5),
        ({"cpu.max": "100000 100000\n"}, 1.0),
        ({"cpu.max": TWO_CORES}, 2.0),
        ({"cpu.max": "max 100000\n"}, 64.0),
        ({"cpu.max": "nonsense\n"}, 64.0),
        ({"cpu.max": "200000 0\n"}, 64.0),
        ({"cpu/cpu.cfs_quota_us": "50000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 0.5),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, 64.0),
        ({"cpuset.cpus.effective": "0-1,5\n"}, 3.0),
        ({"cpuset/cpuset.effective_cpus": "7\n"}, 1.0),
        ({"cpuset.cpus.effective": "0-x\n"}, 64.0),
        ({"cpu.max": "9900000 100000\n"}, 64.0),
    ],
)
def test_a_containers_cores_are_its_quota_and_its_set(root, files, cores):
    write(root, {f"sys/fs/cgroup/{name}": text for name, text in files.items()})

    assert this_machine(root, affinity=64).cores == cores


def test_the_affinity_limits_too(root):
    write(root, {"sys/fs/cgroup/cpu.max": TWO_CORES})

    assert this_machine(root, affinity=1).cores == 1.0


@pytest.mark.parametrize(
    ("group", "folder"),
    [
        ("0::/system.slice/fanlight.service\n", "system.slice"),
        ("0::/system.slice/fanlight.service\n", "system.slice/fanlight.service"),
        ("3:cpu,cpuacct:/docker/abc\n", "cpu/docker/abc"),
    ],
)
def test_the_narrowest_group_around_a_process_counts(root, group, folder):
    quota = {"cpu.max": HALF_A_CORE, "cpu.cfs_quota_us": "50000", "cpu.cfs_period_us": "100000"}
    write(root, {"proc/self/cgroup": group, "sys/fs/cgroup/cpu.max": TWO_CORES})
    write(root, {f"sys/fs/cgroup/{folder}/{name}": text for name, text in quota.items()})

    assert this_machine(root, affinity=64).cores == 0.5


def test_a_group_of_another_view_stays_inside_the_mount(root):
    write(root, {"proc/self/cgroup": "0::/../../other\n", "sys/other/cpu.max": HALF_A_CORE})

    assert this_machine(root, affinity=8).cores == 8.0


@pytest.mark.parametrize(
    "names",
    [("memory.max", "memory.current"), ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes")],
)
def test_the_memory_of_a_container_is_its_limit_less_what_it_uses(root, names):
    limit, used = names
    write(root, {f"sys/fs/cgroup/{limit}": str(4 * GIB), f"sys/fs/cgroup/{used}": str(3 * GIB)})
    folder = Path(used).parent
    write(root, {f"sys/fs/cgroup/{folder}/memory.stat": f"anon 1\ninactive_file {GIB}\n"})

    machine = this_machine(root, affinity=8)

    assert (machine.memory_bytes, machine.available_bytes) == (4 * GIB, 2 * GIB)


@pytest.mark.parametrize(("cores", "threads"), [(0.5, 1), (1.0, 1), (1.9, 1), (2.0, 2), (64.0, 64)])
def test_one_thread_a_whole_core_and_never_none(cores, threads):
    assert Machine(cores=cores, memory_bytes=GIB, available_bytes=GIB).threads == threads


def test_this_machine_itself_has_cores_and_memory():
    machine = this_machine()

    assert machine.cores > 0
    assert 0 < machine.available_bytes <= machine.memory_bytes
