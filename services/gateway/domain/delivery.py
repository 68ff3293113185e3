"""The delivery of a job's end to its webhook: attempts, back-off, giving up. Pure."""

from dataclasses import dataclass, replace
from enum import StrEnum

# The back-off after each failed attempt, as Standard Webhooks recommends; after the last one the delivery is given up.
BACKOFF_S = (5.0, 300.0, 1_800.0, 7_200.0, 18_000.0, 36_000.0, 50_400.0, 72_000.0, 86_400.0)
# A pause is longer by up to this part.
JITTER = 0.1
# An attempt whose gateway reports no result for so long is made again.
CLAIM_S = 60.0
GONE = 410


class DeliveryState(StrEnum):
    PENDING = "pending"
    DELIVERED = "delivered"
    GIVEN_UP = "given_up"


@dataclass(frozen=True, slots=True, kw_only=True)
class DeliveryAttempt:
    time_s: float
    # The HTTP status that the target answered; 0 where it did not.
    status: int = 0
    error: str = ""
    # The target may not be called at all; no retry helps.
    is_refused: bool = False
    duration_s: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Delivery:
    # The same for every attempt, so that the target can recognize a repeated one.
    id: str
    job_id: str
    url: str
    tenant: str
    state: DeliveryState = DeliveryState.PENDING
    next_s: float = 0.0
    tries: tuple[DeliveryAttempt, ...] = ()


def claimed(delivery: Delivery, *, now_s: float) -> Delivery:
    """Other gateways leave the next attempt to the caller for a while."""
    return replace(delivery, next_s=now_s + CLAIM_S)


def attempted(delivery: Delivery, attempt: DeliveryAttempt, *, chance: float) -> Delivery:
    """After an attempt: delivered, given up, or retried after a back-off with jitter by `chance`, from 0 up to 1."""
    tries = (*delivery.tries, attempt)
    if 200 <= attempt.status < 300:
        return replace(delivery, tries=tries, state=DeliveryState.DELIVERED, next_s=0.0)
    if attempt.status == GONE or attempt.is_refused or len(tries) > len(BACKOFF_S):
        return replace(delivery, tries=tries, state=DeliveryState.GIVEN_UP, next_s=0.0)
    pause_s = BACKOFF_S[len(tries) - 1] * (1 + JITTER * chance)
    return replace(delivery, tries=tries, next_s=attempt.time_s + pause_s)
