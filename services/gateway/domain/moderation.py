"""What becomes of content: a tenant's policy, and the verdict of the operator's moderation. Pure."""

from dataclasses import dataclass
from enum import StrEnum


class Policy(StrEnum):
    """What is done with an image that a worker's safety checker finds unsafe; the values are the request's field's."""

    OFF = "off"
    FLAG = "flag"
    BLUR = "blur"
    BLOCK = "block"


# From the mildest to the strictest.
POLICIES = tuple(Policy)
LABELS_LIMIT, LABEL_LIMIT_CHARS = 16, 64
REASON_LIMIT_CHARS = 300


def stricter(one: Policy, other: Policy) -> Policy:
    return max(one, other, key=POLICIES.index)


class Decision(StrEnum):
    ALLOW = "allow"
    FLAG = "flag"
    BLUR = "blur"
    BLOCK = "block"


@dataclass(frozen=True, slots=True, kw_only=True)
class ContentVerdict:
    """What the moderation says of a request or of a result."""

    decision: Decision
    labels: tuple[str, ...] = ()
    # The tenant sees it.
    reason: str = ""

    @property
    def least_policy(self) -> Policy:
        """What the safety checker must at least do in a job whose request got this verdict."""
        return {Decision.FLAG: Policy.FLAG, Decision.BLUR: Policy.BLUR}.get(self.decision, Policy.OFF)

    @property
    def is_withheld(self) -> bool:
        """Of a result. The gateway decodes no image, so it cannot blur one."""
        return self.decision in (Decision.BLUR, Decision.BLOCK)


def verdict_of(decision: Decision, labels: list[str], reason: str) -> ContentVerdict:
    """Of what a stranger's program said: bounded, and printable."""
    return ContentVerdict(
        decision=decision,
        labels=tuple(_printable(each, LABEL_LIMIT_CHARS) for each in labels[:LABELS_LIMIT]),
        reason=_printable(reason, REASON_LIMIT_CHARS),
    )


def _printable(text: str, limit_chars: int) -> str:
    return "".join(each if each.isprintable() else " " for each in text[:limit_chars])
