"""What goes wrong with weights, beside the kernel's errors. A source's failures make the next source be tried."""

from fanlight.errors import (
    FailedPrecondition,
    FanlightError,
    NodeFault,
    ResourceExhausted,
    Unauthenticated,
    Unavailable,
)


class WrongBytes(NodeFault):
    """The bytes are not those that the manifest pins; they were thrown away."""

    reason = "WRONG_BYTES"


class NotAllowed(FailedPrecondition):
    """The operator has not allowed to fetch from that host."""

    reason = "HOST_NOT_ALLOWED"


class NotHeld(NodeFault):
    """The weights are not on this node, which may fetch nothing; another may have them."""

    reason = "NOT_HELD"


class DiskFull(ResourceExhausted):
    reason = "DISK_FULL"


class DailyCapReached(ResourceExhausted):
    reason = "DAILY_CAP_REACHED"


class TokenRefused(Unauthenticated):
    """The source wants a token, or another one than this node has; another node may have it."""

    reason = "TOKEN_REFUSED"
    is_request_fault = False


class SourceFailed(Unavailable):
    """A source that does not do: gone, slow, broken, changing or wrong. Another may."""

    reason = "SOURCE_FAILED"


class SourceChanged(SourceFailed):
    """What is behind the address is no longer what it was when the download began."""


class NoRanges(SourceFailed):
    """The server sends whole files only."""


class Transient(SourceFailed):
    """Worth another try of the same source, after `retry_after_s` where it said so."""


class Unreachable(Transient):
    """Nobody is there, for now."""


class Refused(Transient):
    """The server is there and does not want to, for now: asking at once would make it worse."""


# What is worth telling of several failures: the last that says more than that a source failed.
def tell(reference: str, failures: list[FanlightError]) -> FanlightError:
    """One error for a file that no source gave, naming the reference and each source's reason."""
    assert failures
    last = next((f for f in reversed(failures) if not isinstance(f, SourceFailed)), failures[-1])
    reasons = "; ".join(dict.fromkeys(f.message for f in failures))
    return type(last)(f"{reference}: {reasons}", field="reference", retry_after_s=last.retry_after_s)
