"""Errors of weights, in addition to fanlight.errors. A failure of one source leads to the next source."""

import contextlib
import errno
import sqlite3
from collections.abc import Iterator
from pathlib import Path

from fanlight.errors import (
    FailedPrecondition,
    FanlightError,
    NodeFault,
    ResourceExhausted,
    Unauthenticated,
    Unavailable,
)
from services.kernel.disks import RETRY_AFTER_S, folder_of, is_no_room, is_of_disk, sqlite_code, why


class WrongBytes(NodeFault):
    """The bytes do not match the manifest's digest or size; they were discarded."""

    reason = "WRONG_BYTES"


class NotAllowed(FailedPrecondition):
    """FANLIGHT_WEIGHTS_URL_HOSTS does not allow this host."""

    reason = "HOST_NOT_ALLOWED"


class NotHeld(NodeFault):
    """The weights are not on this node, and it is offline; another node may have them."""

    reason = "NOT_HELD"


class DiskFull(ResourceExhausted):
    reason = "DISK_FULL"


class DailyCapReached(ResourceExhausted):
    reason = "DAILY_CAP_REACHED"


class TokenRefused(Unauthenticated):
    """The source requires a token, or rejects this node's; another node may have a valid one."""

    reason = "TOKEN_REFUSED"
    is_request_fault = False


class SourceFailed(Unavailable):
    """This source failed: unavailable, slow, broken, changed or wrong. Another source may work."""

    reason = "SOURCE_FAILED"


class ForeignAnswer(SourceFailed):
    """The source answers with a page, a pointer, an error or nothing in place of the file."""


class Untrusted(SourceFailed):
    """The server's certificate is not trusted: also how a captive portal answers in place of an HTTPS server."""


class RequestRefused(SourceFailed):
    """The server calls the request wrong (400): also how some say that a signed address ran out."""


class SourceChanged(SourceFailed):
    """The file at the address changed since the download began."""


class NoRanges(SourceFailed):
    """The server does not support ranges."""


class Transient(SourceFailed):
    """A retry of the same source may work, after `retry_after_s` where the server set it."""


class Unreachable(Transient):
    """The server cannot be reached for now."""


class ServerBusy(Transient):
    """The server is overloaded or throttles us (429, 503, 5xx): retry only after a back-off."""


def blame_source(error: FanlightError, host: str) -> None:
    """Name the host as the part that failed, unless a refused token or a wrong name is the reason."""
    if isinstance(error, SourceFailed | WrongBytes):
        error.of_part(f"source:{host}")


def combine_failures(reference: str, failures: list[FanlightError]) -> FanlightError:
    """One error for a file that no source delivered, with the reference and each source's reason.

    Its type is that of the last failure that is more specific than SourceFailed.
    """
    assert failures
    last = next((f for f in reversed(failures) if not isinstance(f, SourceFailed)), failures[-1])
    reasons = "; ".join(dict.fromkeys(f.message for f in failures))
    part = next((f.part for f in (last, *reversed(failures)) if f.part), "")
    return type(last)(f"{reference}: {reasons}", field="reference", retry_after_s=last.retry_after_s).of_part(part)


@contextlib.contextmanager
def disk_errors(what: str, folder: Path | str = "") -> Iterator[None]:
    """Translate errors of the disk and of SQLite: a full disk becomes DiskFull, another fault of the disk NodeFault.

    They name `what` was fetched, the folder (`folder` where the error names no file), and when to try again.
    """
    try:
        yield
    except DiskFull as error:
        raise DiskFull(f"{what}: {error.message}", retry_after_s=error.retry_after_s) from error
    except sqlite3.OperationalError as error:
        if sqlite_code(error) == sqlite3.SQLITE_FULL or "full" in str(error):
            raise DiskFull(f"the disk is full while fetching {what}", retry_after_s=RETRY_AFTER_S) from error
        message = f"{what}: the store's index cannot be written ({error}); is the disk full?"
        raise NodeFault(message, retry_after_s=RETRY_AFTER_S) from error
    except OSError as error:
        place = folder_of(error, folder)
        where = f" in {place}" if place else ""
        if is_no_room(error):
            raise DiskFull(f"{why(error)}{where}, while fetching {what}", retry_after_s=RETRY_AFTER_S) from error
        # Errors of the network are of the same class.
        if is_of_disk(error) or (error.errno in (errno.EACCES, errno.EPERM) and error.filename):
            raise NodeFault(f"{what}: {why(error)}{where}", retry_after_s=RETRY_AFTER_S) from error
        raise
