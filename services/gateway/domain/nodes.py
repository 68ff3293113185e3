"""Nodes, the invitations that admit them, and the life of their credentials. Pure: no clock, no store, no transport.

A credential is here only as the sha256 of its secret. An event that is not allowed raises Unauthenticated.
"""

import hmac
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from enum import StrEnum

from fanlight.errors import Unauthenticated

DEFAULT_POOL = "default"
# How long a credential that was exchanged stays valid, because responses get lost and processes share one.
OVERLAP_S = 300.0
# How far the clocks of gateways over one store may differ.
CLOCK_SKEW_S = 300.0
# Of one node at a time: one for each process that joined by itself, and those that were exchanged lately.
CREDENTIALS_LIMIT = 32


class NodeState(StrEnum):
    ACTIVE = "active"
    DRAINING = "draining"
    EXPIRED = "expired"
    REVOKED = "revoked"


@dataclass(frozen=True, slots=True, kw_only=True)
class Grant:
    """What an invitation or an issuer's rule gives to the nodes that it admits."""

    pool: str = DEFAULT_POOL
    # By name; sorted.
    labels: tuple[tuple[str, str], ...] = ()
    # Empty: all.
    stages: tuple[str, ...] = ()

    def allows(self, stage: str) -> bool:
        return not self.stages or stage in self.stages


# How offers begin that only the gateway gives.
GRANTED = ("pool:", "label:")


def pool_need(pool: str) -> str:
    return f"pool:{pool}"


def offers_of(grant: Grant) -> tuple[str, ...]:
    """What tasks can need of the node, such as `pool:trusted` or `label:site=attic`."""
    return (pool_need(grant.pool), *(f"label:{name}={value}" for name, value in grant.labels))


@dataclass(frozen=True, slots=True, kw_only=True)
class Invite:
    id: str
    # Hexadecimal sha256 of the join code's secret.
    secret_hash: str = field(repr=False)
    grant: Grant
    uses: int
    expire_s: float
    used: int = 0
    comment: str = ""

    def is_open(self, now_s: float) -> bool:
        return self.used < self.uses and now_s < self.expire_s


@dataclass(frozen=True, slots=True, kw_only=True)
class Credential:
    # Hexadecimal sha256.
    hash: str = field(repr=False)
    expire_s: float
    # When it was exchanged for the next one, and that one's hash; 0 and empty for the newest of its line.
    exchange_s: float = 0.0
    successor: str = field(default="", repr=False)
    # A call came with it, so its holder got it.
    used: bool = False

    def is_valid(self, now_s: float) -> bool:
        return now_s < self.expire_s and (not self.exchange_s or now_s < self.exchange_s + OVERLAP_S)


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeRecord:
    """A machine that joined."""

    id: str
    # As it called itself.
    name: str
    grant: Grant
    # How it proved its identity: `join_code`, `certificate`, or an issuer's name.
    proof: str
    # Who it is to the issuer; empty for join codes.
    subject: str = ""
    join_s: float
    renew_s: float
    credentials: tuple[Credential, ...] = ()
    draining: bool = False
    # 0 while it is not revoked.
    revoke_s: float = 0.0
    # Why it was revoked.
    reason: str = ""
    # Results that a second node was asked to repeat, and those that turned out false.
    checked_results: int = 0
    false_results: int = 0

    @property
    def expire_s(self) -> float:
        return max((each.expire_s for each in self.credentials), default=0.0)

    def credential(self, hashed: str) -> Credential | None:
        return next((each for each in self.credentials if hmac.compare_digest(each.hash, hashed)), None)


def node_of(worker_id: str) -> str:
    """The id of the node whose worker it is, from which the worker's id derives."""
    return worker_id.partition("-")[0]


def state_of(node: NodeRecord, now_s: float) -> NodeState:
    if node.revoke_s:
        return NodeState.REVOKED
    if node.expire_s <= now_s:
        return NodeState.EXPIRED
    return NodeState.DRAINING if node.draining else NodeState.ACTIVE


def use_invite(invite: Invite, secret_hash: str, *, now_s: float) -> Invite:
    """The invitation after one more node joined with it."""
    if not hmac.compare_digest(invite.secret_hash, secret_hash):
        raise Unauthenticated("this join code is wrong; make a new one with `fanlight nodes invite`")
    if now_s >= invite.expire_s:
        raise Unauthenticated("this join code has expired; make a new one with `fanlight nodes invite`")
    if invite.used >= invite.uses:
        raise Unauthenticated("this join code is used up; make a new one with `fanlight nodes invite`")
    return replace(invite, used=invite.used + 1)


def issue(node: NodeRecord, hashed: str, *, now_s: float, ttl_s: float) -> NodeRecord:
    """With a first credential for one more process of the node."""
    if node.revoke_s:
        raise Unauthenticated("this node was revoked; ask its operator")
    credential = Credential(hash=hashed, expire_s=now_s + ttl_s)
    return replace(node, credentials=_kept((*node.credentials, credential), now_s), renew_s=now_s)


def exchange(node: NodeRecord, old_hash: str, new_hash: str, *, now_s: float, ttl_s: float) -> NodeRecord:
    """With the next credential in place of the old one, which stays valid for OVERLAP_S.

    Exchanging the old one again replaces the next one, whose response was lost. If the next one was used already, the
    old one is a copy in other hands: CopiedCredential.
    """
    old = node.credential(old_hash)
    if node.revoke_s or old is None or now_s >= old.expire_s + CLOCK_SKEW_S:
        raise Unauthenticated("this credential has expired or was revoked; join again")
    next_one = node.credential(old.successor) if old.successor else None
    if old.exchange_s and (next_one is None or next_one.used):
        raise CopiedCredential("this credential was exchanged before, so two machines have it; join again")
    others = [each for each in node.credentials if each.hash not in (old.hash, old.successor)]
    exchanged = replace(old, exchange_s=old.exchange_s or now_s, successor=new_hash)
    fresh = Credential(hash=new_hash, expire_s=now_s + ttl_s)
    return replace(node, credentials=_kept((*others, exchanged, fresh), now_s), renew_s=now_s)


class CopiedCredential(Unauthenticated):
    """A credential came back after it was exchanged and its successor was used: somebody copied it."""

    reason = "COPIED_CREDENTIAL"


def mark_used(node: NodeRecord, hashed: str) -> NodeRecord:
    """The same object where the credential was used before."""
    found = node.credential(hashed)
    if found is None or found.used:
        return node
    return replace(
        node,
        credentials=tuple(replace(each, used=True) if each is found else each for each in node.credentials),
    )


def end_credentials(node: NodeRecord) -> NodeRecord:
    """Without any credential: it must join again."""
    return replace(node, credentials=())


def revoke(node: NodeRecord, reason: str, *, now_s: float) -> NodeRecord:
    return node if node.revoke_s else replace(node, credentials=(), revoke_s=now_s, reason=reason)


def _kept(credentials: Iterable[Credential], now_s: float) -> tuple[Credential, ...]:
    """Without those that ended; an exchanged one is remembered until it would have expired, to notice copies."""
    live = [each for each in credentials if now_s < each.expire_s + CLOCK_SKEW_S]
    return tuple(live[-CREDENTIALS_LIMIT:])
