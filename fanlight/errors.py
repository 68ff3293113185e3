"""What a client may meet, in its own words. Knows no transport and imports nothing heavy."""


class FanlightError(Exception):
    """Anything the client raises on purpose; `message` is one line that says what is wrong."""

    code = "UNKNOWN"
    reason = ""
    field = ""
    retry_after_s: float | None = None

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message

    def as_dict(self) -> dict[str, object]:
        """For JSON, without what is not known."""
        known: dict[str, object] = {"code": self.code, "message": self.message}
        if self.reason:
            known["reason"] = self.reason
        if self.field:
            known["field"] = self.field
        if self.retry_after_s is not None:
            known["retry_after_s"] = self.retry_after_s
        return known


class CallFailed(FanlightError):
    """The gateway refused a call, or could not be reached.

    `code` is gRPC's, such as `NOT_FOUND`; `reason` a finer constant of the gateway, empty where gRPC itself failed;
    `field` the request's field at fault.
    """

    def __init__(
        self, message: str, *, code: str, reason: str = "", field: str = "", retry_after_s: float | None = None
    ) -> None:
        super().__init__(message)
        self.code = code
        self.reason = reason
        self.field = field
        self.retry_after_s = retry_after_s


class JobFailed(FanlightError):
    """A job that was waited for ended without its pictures."""

    def __init__(self, message: str, *, job: str, code: str, reason: str = "", field: str = "") -> None:
        super().__init__(message)
        self.job = job
        self.code = code
        self.reason = reason
        self.field = field

    def as_dict(self) -> dict[str, object]:
        return {**super().as_dict(), "job": self.job}


class InvalidInput(FanlightError):
    """Wrong before anything was sent: a file that cannot be read, a text that cannot be understood."""

    code = "INVALID_ARGUMENT"


class BrokenBlob(FanlightError):
    """Bytes arrived that do not have the digest they were asked for by."""

    code = "DATA_LOSS"


def advice(error: FanlightError, *, gateway: str) -> str:
    """One line that says what is wrong and what to do, for a person at a terminal."""
    text = " ".join(error.message.split())
    if not isinstance(error, CallFailed) or error.reason not in _TRANSPORT_REASONS:
        return text
    if error.code == "UNAVAILABLE" and "parsing HTTP/2" in text:
        return f"{gateway} answers, but not as gRPC does: name the gateway's address for gRPC with --gateway"
    if error.code == "UNAVAILABLE":
        return f"cannot reach the gateway at {gateway}: start one with `fanlight up`, or name another with --gateway"
    if error.code == "UNAUTHENTICATED":
        return f"the gateway at {gateway} wants another token: set FANLIGHT_TOKEN or FANLIGHT_TOKEN_FILE"
    if error.code == "DEADLINE_EXCEEDED":
        return f"the gateway at {gateway} did not answer in time: look at its log, or try again"
    if error.code == "UNIMPLEMENTED":
        return f"{gateway} answers gRPC but is no Fanlight gateway, or an older one: name another with --gateway"
    return text


# Empty where gRPC itself speaks; the gateway's own words for the same say no more.
_TRANSPORT_REASONS = ("", "UNAUTHENTICATED")
