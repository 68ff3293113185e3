"""API keys: whose they are, what their roles allow, and their life. Pure: no clock, no store, no transport.

A key is here only as the sha256 of its secret.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum

from fanlight.errors import FailedPrecondition


class Right(StrEnum):
    """What a call needs; each value completes the sentence "this key's role does not let it ..."."""

    READ = "read jobs and blobs"
    SUBMIT = "submit jobs, cancel them, or write blobs"
    MANAGE = "manage its tenant"
    QUEUE = "read queue figures"
    METRICS = "read metrics"
    OPERATE = "do what only operators may do"


class KeyRole(StrEnum):
    OPERATOR = "operator"
    ADMIN = "admin"
    SUBMIT = "submit"
    READ = "read"
    METRICS = "metrics"
    SCALER = "scaler"


_READ = frozenset({Right.READ, Right.QUEUE, Right.METRICS})
_SUBMIT = _READ | {Right.SUBMIT}
RIGHTS: Mapping[KeyRole, frozenset[Right]] = {
    KeyRole.OPERATOR: frozenset(Right),
    KeyRole.ADMIN: _SUBMIT | {Right.MANAGE},
    KeyRole.SUBMIT: _SUBMIT,
    KeyRole.READ: _READ,
    KeyRole.METRICS: frozenset({Right.QUEUE, Right.METRICS}),
    KeyRole.SCALER: frozenset({Right.QUEUE}),
}
# What a tenant's admin may give; figures of the whole fleet are the operator's to give.
ADMIN_GIVES = frozenset({KeyRole.ADMIN, KeyRole.SUBMIT, KeyRole.READ, KeyRole.METRICS})


class KeyState(StrEnum):
    ACTIVE = "active"
    EXPIRED = "expired"
    REVOKED = "revoked"


@dataclass(frozen=True, slots=True, kw_only=True)
class Key:
    id: str
    tenant: str
    role: KeyRole
    # Hexadecimal sha256 of the secret, which is random and so needs no slow hash.
    secret_hash: str = field(repr=False)
    note: str = ""
    create_s: float
    # 0: it does not expire.
    expire_s: float = 0.0
    # When it was last used, to about a minute; 0: never.
    use_s: float = 0.0
    # 0 while it is not revoked.
    revoke_s: float = 0.0
    # The id of the key that it follows, or that opened this session; `token:` and a digest for a token of the settings.
    parent: str = ""
    # Who it is to the issuer that proved it.
    subject: str = ""
    is_session: bool = False


def state_of(key: Key, now_s: float) -> KeyState:
    if key.revoke_s:
        return KeyState.REVOKED
    return KeyState.EXPIRED if key.expire_s and key.expire_s <= now_s else KeyState.ACTIVE


def revoke(key: Key, *, now_s: float) -> Key:
    return key if key.revoke_s else replace(key, revoke_s=now_s)


def end_by(key: Key, *, at_s: float, now_s: float) -> Key:
    """For a key that another one replaces. FailedPrecondition where it has ended already."""
    state = state_of(key, now_s)
    if state is not KeyState.ACTIVE:
        raise FailedPrecondition(f"is {state}; create another one", field="id")
    return replace(key, expire_s=min(key.expire_s or at_s, at_s))


def note_use(key: Key, *, at_s: float) -> Key:
    return key if key.use_s >= at_s else replace(key, use_s=at_s)
