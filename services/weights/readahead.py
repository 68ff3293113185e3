"""Pages of a mapped file into memory in large pieces, while the caller goes on. Does nothing where the system cannot.

Called through ctypes: Python's own mmap.madvise holds up all threads for as long as the disk takes.
"""

import ctypes
import mmap
import sys
import threading
from collections.abc import Iterator
from functools import cache
from typing import Any

WILLNEED, HUGEPAGE, POPULATE_READ = 3, 14, 22
# So much at a time that the threads seldom have to wait for the interpreter between two of them.
STEP_BYTES = 16 * 1024 * 1024
READERS = 8
HUGE_BYTES = 2 * 1024 * 1024
# The kernel silently cuts what one WILLNEED asks for to the disk's largest request, or its read-ahead.
WILLNEED_BYTES = 128 * 1024


@cache
def _madvise() -> Any:
    """The C library's; None where the numbers above may mean something else."""
    if not sys.platform.startswith("linux"):
        return None
    call = ctypes.CDLL(None).madvise
    call.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return call


def read_ahead(mapped: mmap.mmap, begin: int, end: int) -> list[threading.Thread]:
    """Have these bytes read by threads of their own, from the front on; they keep the mapping alive until they end.

    Several, as a disk is quick only with several requests before it, and each waits for its own.
    """
    if _madvise() is None or begin >= end:
        return []
    start = begin - begin % HUGE_BYTES
    anchor = ctypes.c_char.from_buffer(mapped, start)
    # A fault then reads 4 MiB, whatever the disk's own read-ahead is; systems that cannot do that go on in small pages.
    _madvise()(ctypes.addressof(anchor), end - start, HUGEPAGE)
    steps = iter(range(0, end - start, STEP_BYTES))
    count = min(READERS, -(-(end - start) // STEP_BYTES))
    threads = [
        threading.Thread(target=_read, args=(anchor, end - start, steps), name="read-ahead", daemon=True)
        for _ in range(count)
    ]
    for thread in threads:
        thread.start()
    return threads


def _read(anchor: ctypes.c_char, length: int, steps: Iterator[int]) -> None:
    """Map one step after the other of those that all readers share; ask for them where the kernel maps none."""
    address, call = ctypes.addressof(anchor), _madvise()
    # A range's iterator gives each step to one thread only.
    for at in steps:
        size = min(STEP_BYTES, length - at)
        if call(address + at, size, POPULATE_READ):
            for part in range(at, at + size, WILLNEED_BYTES):
                call(address + part, min(WILLNEED_BYTES, length - part), WILLNEED)
