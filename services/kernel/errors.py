"""The error tree of `fanlight.errors`, under the name that services know it by."""

from fanlight.errors import (
    AlreadyExists,
    Cancelled,
    Conflict,
    DeadlineExceeded,
    FailedPrecondition,
    FanlightError,
    InvalidField,
    LeaseLost,
    NodeFault,
    NotFound,
    OutOfRange,
    ResourceExhausted,
    TooLarge,
    Unauthenticated,
    Unavailable,
)

__all__ = [
    "AlreadyExists",
    "Cancelled",
    "Conflict",
    "DeadlineExceeded",
    "FailedPrecondition",
    "FanlightError",
    "InvalidField",
    "LeaseLost",
    "NodeFault",
    "NotFound",
    "OutOfRange",
    "ResourceExhausted",
    "TooLarge",
    "Unauthenticated",
    "Unavailable",
]
