"""Pages of a mapped file into memory in large pieces, while the caller goes on. Does nothing where the system cannot.

Called through ctypes: Python's own mmap.madvise holds up all threads for as long as the disk takes.
"""

import ctypes
import mmap
import sys
import threading
from functools import cache
from typing import Any

WILLNEED, POPULATE_READ = 3, 22
STEP_BYTES = 32 * 1024 * 1024


@cache
def _madvise() -> Any:
    """The C library's; None where the numbers above may mean something else."""
    if not sys.platform.startswith("linux"):
        return None
    call = ctypes.CDLL(None).madvise
    call.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return call


def read_ahead(mapped: mmap.mmap, begin: int, end: int) -> threading.Thread | None:
    """Have these bytes read by a thread of its own, which is returned; it keeps the mapping alive until it ends."""
    if _madvise() is None or begin >= end:
        return None
    start = begin - begin % mmap.PAGESIZE
    anchor = ctypes.c_char.from_buffer(mapped, start)
    thread = threading.Thread(target=_read, args=(anchor, end - start), name="read-ahead", daemon=True)
    thread.start()
    return thread


def _read(anchor: ctypes.c_char, length: int) -> None:
    """The disk is asked for all of it at once; the pages are then mapped as they come, where the kernel can."""
    address, call = ctypes.addressof(anchor), _madvise()
    call(address, length, WILLNEED)
    for at in range(0, length, STEP_BYTES):
        if call(address + at, min(STEP_BYTES, length - at), POPULATE_READ):
            return
