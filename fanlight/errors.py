"""The one error tree of clients and services. Knows no transport and imports nothing heavy.

Services raise the first part and translate it at their edges; clients and the command line raise the second.
"""

from typing import Self

# Errors quote their input, which may be megabytes; gRPC drops responses whose trailers exceed 8 KiB.
MESSAGE_MAX_BYTES = 800
FIELD_MAX_BYTES = 200


class FanlightError(Exception):
    """An error that a client may see. Its message is one line that says what is wrong and what would be right.

    `code` is gRPC's, `reason` is a more specific constant; `field` is the request's wrong field.
    """

    code: str = "INTERNAL"
    reason: str = "INTERNAL"
    # The request can never succeed, on any node.
    is_request_fault: bool = False
    # A retry at the same peer gives the same error.
    is_final: bool = False
    # The part that failed, as in common.v1.Failure, such as `lora:cyanotype`; empty if unknown.
    part: str = ""

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
        ).of_part(self.part)

    def of_part(self, part: str) -> Self:
        """The same error, which says that this part failed; a part that is named already stays."""
        self.part = self.part or _short(part, FIELD_MAX_BYTES)
        return self

    def as_dict(self) -> dict[str, object]:
        """For JSON, without unset values."""
        known: dict[str, object] = {"code": self.code, "message": self.message}
        if self.reason:
            known["reason"] = self.reason
        if self.field:
            known["field"] = self.field
        if self.retry_after_s is not None:
            known["retry_after_s"] = self.retry_after_s
        return known


def _short(text: str, limit_bytes: int) -> str:
    """The text, truncated with an ellipsis to `limit_bytes` of UTF-8."""
    data = text.encode(errors="replace")
    return text if len(data) <= limit_bytes else data[: limit_bytes - 3].decode(errors="ignore") + "…"


class InvalidField(FanlightError):
    """A field has a value that can never be right."""

    code = "INVALID_ARGUMENT"
    reason = "INVALID_FIELD"
    is_final = True
    is_request_fault = True

    def __init__(self, message: str, *, field: str, retry_after_s: float | None = None) -> None:
        super().__init__(message, field=field, retry_after_s=retry_after_s)


class NotFound(FanlightError):
    """Something that the request names does not exist here; another node may have it."""

    code = "NOT_FOUND"
    reason = "NOT_FOUND"
    is_final = True


class AlreadyExists(FanlightError):
    code = "ALREADY_EXISTS"
    reason = "ALREADY_EXISTS"
    is_final = True
    is_request_fault = True


class FailedPrecondition(FanlightError):
    """A valid request that the present state does not allow; another node may be in another state."""

    code = "FAILED_PRECONDITION"
    reason = "FAILED_PRECONDITION"
    is_final = True


class OutOfRange(FanlightError):
    code = "OUT_OF_RANGE"
    reason = "OUT_OF_RANGE"
    is_final = True
    is_request_fault = True


class TooLarge(FanlightError):
    """More bytes, pixels or items than a named limit allows; another node may have a higher one."""

    code = "RESOURCE_EXHAUSTED"
    reason = "TOO_LARGE"
    is_final = True


class ResourceExhausted(FanlightError):
    """No capacity at the moment; the same request may succeed after `retry_after_s`."""

    code = "RESOURCE_EXHAUSTED"
    reason = "RESOURCE_EXHAUSTED"


class Unauthenticated(FanlightError):
    code = "UNAUTHENTICATED"
    reason = "UNAUTHENTICATED"
    is_final = True
    is_request_fault = True


class PermissionDenied(FanlightError):
    """The caller is known and may not do this."""

    code = "PERMISSION_DENIED"
    reason = "PERMISSION_DENIED"
    is_final = True
    is_request_fault = True


class ContentBlocked(PermissionDenied):
    """The operator's moderation refuses what is asked for, or withholds what was made."""

    reason = "CONTENT_BLOCKED"


class LeaseLost(FanlightError):
    """The token is no longer the task's: abandon the work."""

    code = "ABORTED"
    reason = "LEASE_LOST"


class Conflict(FanlightError):
    """Another writer changed the record first."""

    code = "ABORTED"
    reason = "CONFLICT"


class Unavailable(FanlightError):
    """Not reachable or not ready; the same request may succeed later."""

    code = "UNAVAILABLE"
    reason = "UNAVAILABLE"


class ModerationUnavailable(Unavailable):
    """The operator's moderation did not answer, and nothing passes without it."""

    reason = "MODERATION_UNAVAILABLE"


class DeadlineExceeded(FanlightError):
    code = "DEADLINE_EXCEEDED"
    reason = "DEADLINE_EXCEEDED"


class Cancelled(FanlightError):
    """An authorized caller cancelled the work."""

    code = "CANCELLED"
    reason = "CANCELLED"


class NodeFault(FanlightError):
    """This node could not do it; another node may."""

    reason = "NODE_FAULT"


class ResultRefused(NodeFault):
    """The gateway refused a task's finished result; `field` is the wrong field of the result.

    Says nothing about the models that it was made with.
    """

    reason = "RESULT_REFUSED"
    is_final = True


class CallFailed(FanlightError):
    """The gateway refused a call, or could not be reached.

    `reason` is empty where gRPC itself failed.
    """

    def __init__(
        self, message: str, *, code: str, reason: str = "", field: str = "", retry_after_s: float | None = None
    ) -> None:
        super().__init__(message, field=field, retry_after_s=retry_after_s)
        self.code = code
        self.reason = reason


class JobFailed(FanlightError):
    """A job that was waited for ended without its images."""

    def __init__(self, message: str, *, job: str, code: str, reason: str = "", field: str = "") -> None:
        super().__init__(message, field=field)
        self.job = job
        self.code = code
        self.reason = reason

    def as_dict(self) -> dict[str, object]:
        return {**super().as_dict(), "job": self.job}


class InvalidInput(FanlightError):
    """Invalid before anything was sent: a file that cannot be read, a value that cannot be parsed."""

    code = "INVALID_ARGUMENT"
    reason = ""


class BrokenBlob(FanlightError):
    """Bytes arrived that do not have the requested digest."""

    code = "DATA_LOSS"
    reason = ""


def advice(error: FanlightError, *, gateway: str) -> str:
    """One line that says what is wrong and what to do, for a person at a terminal."""
    text = " ".join(error.message.split())
    if not isinstance(error, CallFailed) or error.reason not in _TRANSPORT_REASONS:
        return text
    if error.code == "UNAVAILABLE" and "parsing HTTP/2" in text:
        return f"{gateway} answers, but not with gRPC: name the gateway's gRPC address with --gateway"
    if error.code == "UNAVAILABLE" and (problem := next((each for each in _TLS_PROBLEMS if each in text), "")):
        return f"{gateway} {_TLS_PROBLEMS[problem]}"
    if error.code == "UNAVAILABLE":
        return f"cannot reach the gateway at {gateway}: start one with `fanlight up`, or name another with --gateway"
    if error.code == "UNAUTHENTICATED":
        return f"the gateway at {gateway} does not accept this token: set FANLIGHT_TOKEN or FANLIGHT_TOKEN_FILE"
    if error.code == "DEADLINE_EXCEEDED":
        return f"the gateway at {gateway} did not answer in time: see its log, or try again"
    if error.code == "UNIMPLEMENTED":
        return f"{gateway} speaks gRPC but is not a Fanlight gateway, or an older one: name another with --gateway"
    return text


# By what gRPC says of the handshake.
_TLS_PROBLEMS = {
    "WRONG_VERSION_NUMBER": "does not speak TLS: set FANLIGHT_PLAIN_TEXT=true if you trust the network to it",
    "CERTIFICATE_VERIFY_FAILED": "has a certificate that is not trusted here: set FANLIGHT_TLS_CA_FILE to the root that"
    " signed it; a gateway that made its own logs where its authority.pem is",
    "Hostname Verification": "has a certificate for another name: use that name with --gateway; a gateway that makes"
    " its own takes names from FANLIGHT_GATEWAY_NAMES",
}
# Empty where gRPC itself raised the error; the gateway's own UNAUTHENTICATED has the same meaning.
_TRANSPORT_REASONS = ("", "UNAUTHENTICATED")
