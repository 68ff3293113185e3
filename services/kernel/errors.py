"""The one error tree. Raised in the middle, translated at the edges by `wire_errors`; knows no transport."""

from typing import ClassVar

# Errors quote what they were given, which may be megabytes; gRPC loses answers whose trailers pass 8 KiB.
MESSAGE_MAX_BYTES = 800
FIELD_MAX_BYTES = 200


class FanlightError(Exception):
    """An error that a client may see: its message says what is wrong and what would be right."""

    reason: ClassVar[str] = "INTERNAL"
    # The request can never succeed, here or elsewhere.
    is_request_fault: ClassVar[bool] = False

    def __init__(self, message: str, *, field: str = "", retry_after_s: float | None = None) -> None:
        self.message = _short(message, MESSAGE_MAX_BYTES)
        self.field = _short(field, FIELD_MAX_BYTES)
        super().__init__(self.message)
        self.retry_after_s = retry_after_s

    def within(self, prefix: str) -> "FanlightError":
        """The same error about the same field of an enclosing message: `annotator` within `controls[0]`."""
        return type(self)(
            self.message,
            field=f"{prefix}.{self.field}" if self.field else prefix,
            retry_after_s=self.retry_after_s,
        )


def _short(text: str, limit_bytes: int) -> str:
    """The text, or as much of its start as fits before an ellipsis."""
    data = text.encode(errors="replace")
    return text if len(data) <= limit_bytes else data[: limit_bytes - 3].decode(errors="ignore") + "…"


class InvalidField(FanlightError):
    """A field has a value that can never be right."""

    reason = "INVALID_FIELD"
    is_request_fault = True

    def __init__(self, message: str, *, field: str, retry_after_s: float | None = None) -> None:
        super().__init__(message, field=field, retry_after_s=retry_after_s)


class NotFound(FanlightError):
    """A thing that the request names does not exist."""

    reason = "NOT_FOUND"
    is_request_fault = True


class AlreadyExists(FanlightError):
    reason = "ALREADY_EXISTS"
    is_request_fault = True


class FailedPrecondition(FanlightError):
    """Right in itself, but not in the present state of things."""

    reason = "FAILED_PRECONDITION"
    is_request_fault = True


class OutOfRange(FanlightError):
    reason = "OUT_OF_RANGE"
    is_request_fault = True


class TooLarge(FanlightError):
    """More bytes, pixels or items than a named limit allows."""

    reason = "TOO_LARGE"
    is_request_fault = True


class ResourceExhausted(FanlightError):
    """No room just now; the same request may succeed after `retry_after_s`."""

    reason = "RESOURCE_EXHAUSTED"


class Unauthenticated(FanlightError):
    reason = "UNAUTHENTICATED"
    is_request_fault = True


class LeaseLost(FanlightError):
    """The token is no longer the task's: drop the work."""

    reason = "LEASE_LOST"


class Conflict(FanlightError):
    """Somebody else changed the record first."""

    reason = "CONFLICT"


class Unavailable(FanlightError):
    """Not reachable or not ready; the same request may succeed later."""

    reason = "UNAVAILABLE"


class DeadlineExceeded(FanlightError):
    reason = "DEADLINE_EXCEEDED"


class Cancelled(FanlightError):
    """Somebody who may do so asked for the work to stop."""

    reason = "CANCELLED"


class NodeFault(FanlightError):
    """This node could not do it; another may."""

    reason = "NODE_FAULT"
