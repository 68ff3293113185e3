"""A home link between two network namespaces, in user space: one rate, a delay, and packets that get lost.

Two TUN devices, one in each namespace; a process of its own carries the packets over. Needs root, /dev/net/tun and ip.
Knows no HTTP. The real TCP of this machine runs over it, its handshakes, slow start and retransmissions included.
"""

import contextlib
import fcntl
import multiprocessing
import os
import random
import select
import shutil
import struct
import subprocess
import time
from collections import deque
from dataclasses import dataclass, field
from typing import Any, Self

_TUNSETIFF = 0x400454CA
_IFF_TUN, _IFF_NO_PI = 0x0001, 0x1000
PACKET_BYTES = 2048
NICER = 10
TCP = 6


def why_not() -> str:
    """Why it cannot run here; empty where it can."""
    if os.geteuid() != 0:
        return "needs root"
    if not os.path.exists("/dev/net/tun"):
        return "needs /dev/net/tun"
    return "" if shutil.which("ip") else "needs the ip command"


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """`delay_s` is one way. The queue holds what the link carries in `queue_s`; what does not fit is lost."""

    mbps: float
    delay_s: float
    loss: float
    queue_s: float = 0.05


@dataclass(slots=True)
class _Way:
    """One direction, first in first out."""

    into: int
    shape: Shape
    chance: random.Random
    free_at_s: float = 0.0
    under_way: deque[tuple[float, bytes]] = field(default_factory=deque)

    def take(self, packet: bytes, now_s: float) -> None:
        begin_s = max(now_s, self.free_at_s)
        if begin_s - now_s > self.shape.queue_s:
            return
        self.free_at_s = begin_s + len(packet) * 8 / (self.shape.mbps * 1e6)
        if self.chance.random() >= self.shape.loss:
            self.under_way.append((self.free_at_s + self.shape.delay_s, packet))

    def give(self, now_s: float) -> int:
        """Hand over what has arrived; the bytes of TCP payload in it."""
        payload = 0
        while self.under_way and self.under_way[0][0] <= now_s:
            packet = self.under_way.popleft()[1]
            payload += _payload(packet)
            # A full device loses the packet, as any other would.
            with contextlib.suppress(OSError):
                os.write(self.into, packet)
        return payload


def _payload(packet: bytes) -> int:
    if packet[0] >> 4 != 4 or packet[9] != TCP:
        return 0
    head = (packet[0] & 15) * 4
    return len(packet) - head - (packet[head + 12] >> 4) * 4


class LinkEmulator:
    """A context manager. Run clients with `client` before their command, servers with `server`, at SERVER_ADDRESS."""

    SERVER_ADDRESS = "198.18.0.2"

    def __init__(self, shape: Shape) -> None:
        self._shape = shape
        self._names = (f"flcli{os.getpid()}", f"flsrv{os.getpid()}")
        self._fds: list[int] = []
        self._process: Any = None
        self._passed = multiprocessing.RawValue("q", 0)
        self._first_s = multiprocessing.RawValue("d", 0.0)
        self.client, self.server = (["ip", "netns", "exec", name] for name in self._names)

    def __enter__(self) -> Self:
        for name, address in zip(self._names, ("198.18.0.1", self.SERVER_ADDRESS), strict=True):
            _ip("netns", "add", name)
            self._fds.append(_tun(name))
            _ip("link", "set", name, "netns", name)
            _ip("-n", name, "addr", "add", f"{address}/24", "dev", name)
            _ip("-n", name, "link", "set", name, "up")
            _ip("-n", name, "link", "set", "lo", "up")
        self._process = multiprocessing.get_context("fork").Process(target=self._carry, daemon=True)
        self._process.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.join()
        for fd in self._fds:
            os.close(fd)
        for name in self._names:
            _ip("netns", "del", name)

    def restart_count(self) -> None:
        self._passed.value, self._first_s.value = 0, 0.0

    @property
    def passed_bytes(self) -> int:
        """TCP payload that reached the client."""
        return int(self._passed.value)

    @property
    def first_s(self) -> float:
        """When the first of it did, on time.perf_counter."""
        return float(self._first_s.value)

    def _carry(self) -> None:
        # A link does not wait for whoever else is busy on this machine.
        os.nice(-NICER)
        client, server = self._fds
        chance = random.Random(1)
        down = _Way(client, self._shape, chance)
        up = _Way(server, self._shape, chance)
        poll = select.poll()
        for fd in self._fds:
            os.set_blocking(fd, False)
            poll.register(fd, select.POLLIN)
        while True:
            due_s = min((way.under_way[0][0] for way in (down, up) if way.under_way), default=None)
            wait_ms = 1000.0 if due_s is None else max(0.0, (due_s - time.perf_counter()) * 1000)
            poll.poll(wait_ms)
            _drain(server, down)
            _drain(client, up)
            now_s = time.perf_counter()
            up.give(now_s)
            payload = down.give(now_s)
            if payload:
                self._first_s.value = self._first_s.value or now_s
                self._passed.value += payload


def _drain(fd: int, way: _Way) -> None:
    now_s = time.perf_counter()
    with contextlib.suppress(BlockingIOError):
        while True:
            way.take(os.read(fd, PACKET_BYTES), now_s)


def _tun(name: str) -> int:
    fd = os.open("/dev/net/tun", os.O_RDWR | os.O_CLOEXEC)
    fcntl.ioctl(fd, _TUNSETIFF, struct.pack("16sH", name.encode(), _IFF_TUN | _IFF_NO_PI))
    return fd


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True)
