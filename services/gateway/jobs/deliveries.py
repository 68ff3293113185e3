"""The telling of a job's end to its webhook, try by try. Pure."""

from dataclasses import dataclass, replace
from enum import StrEnum

# After each failed try, as Standard Webhooks recommends; then it is given up.
PAUSES_S = (5.0, 300.0, 1_800.0, 7_200.0, 18_000.0, 36_000.0, 50_400.0, 72_000.0, 86_400.0)
# Jitter: a pause is up to so much longer.
JITTER = 0.1
# A try that its gateway did not report for so long is made again.
CLAIM_S = 60.0
GONE = 410


class DeliveryState(StrEnum):
    PENDING = "pending"
    DELIVERED = "delivered"
    GIVEN_UP = "given_up"


@dataclass(frozen=True, slots=True, kw_only=True)
class Try:
    time_s: float
    # What the target answered; 0 where it did not.
    status: int = 0
    error: str = ""
    # It may not be told at all, now or later.
    is_refused: bool = False
    duration_s: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Delivery:
    # The same for every try, so that the target knows one again.
    id: str
    job_id: str
    url: str
    tenant: str
    state: DeliveryState = DeliveryState.PENDING
    next_s: float = 0.0
    tries: tuple[Try, ...] = ()


def claimed(delivery: Delivery, *, now_s: float) -> Delivery:
    """Nobody else tries it for a while."""
    return replace(delivery, next_s=now_s + CLAIM_S)


def tried(delivery: Delivery, attempt: Try, *, chance: float) -> Delivery:
    """After a try; `chance`, from 0 up to 1, makes the next pause longer."""
    tries = (*delivery.tries, attempt)
    if 200 <= attempt.status < 300:
        return replace(delivery, tries=tries, state=DeliveryState.DELIVERED, next_s=0.0)
    if attempt.status == GONE or attempt.is_refused or len(tries) > len(PAUSES_S):
        return replace(delivery, tries=tries, state=DeliveryState.GIVEN_UP, next_s=0.0)
    pause_s = PAUSES_S[len(tries) - 1] * (1 + JITTER * chance)
    return replace(delivery, tries=tries, next_s=attempt.time_s + pause_s)
