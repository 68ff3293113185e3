"""API keys are created, rotated, revoked and found again. Knows no transport.

Every gateway follows the keys' records, so that looking one up reads no store, and a revocation holds everywhere.
"""

import contextlib
import hashlib
import hmac
import re
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

from fanlight.errors import (
    Conflict,
    FailedPrecondition,
    InvalidField,
    NotFound,
    PermissionDenied,
    ResourceExhausted,
    Unauthenticated,
)
from services.gateway.app.audit_log import AuditLog
from services.gateway.app.leases import RandomBytes
from services.gateway.app.records import Codec, Records
from services.gateway.app.tenants import Caller
from services.gateway.domain import keys as domain
from services.gateway.domain.job import DEFAULT_TENANT
from services.gateway.domain.keys import ADMIN_GIVES, Key, KeyRole, KeyState, Right, state_of
from services.gateway.ports import CaughtUp, Clock, Deleted, Record
from services.kernel.logs import get_logger

log = get_logger()

KEYS_BUCKET = "keys"
KEYS: Codec[Key] = Codec(Key, key_of=lambda key: key.id)
# Of one tenant, sessions apart; and sessions of one tenant.
KEYS_LIMIT = 200
SESSIONS_LIMIT = 1_000
# Sessions of one key, token or person: above, its oldest one ends, so that nobody takes all of a tenant's.
SESSIONS_LIMIT_EACH = 50
ROUNDS_LIMIT = 20
SECRET_BYTES = 32
SESSION_TTL_S = 12 * 3600.0
# How long ended keys are listed; sessions are forgotten at once.
RETENTION_S = 90 * 86_400.0
# Of one tenant.
ENDED_LIMIT = 1_000
_KEY = re.compile(r"flk_(k[0-9a-f]{16})_[0-9a-f]{64}")

Event = Callable[[Key], Key]


@dataclass(frozen=True, slots=True, kw_only=True)
class VerifiedPerson:
    """Who an issuer says that somebody is, and what the operator lets them do."""

    issuer: str
    subject: str
    tenant: str
    role: KeyRole
    # When the token that proved it ends.
    expire_s: float


class PersonVerifier(Protocol):
    async def verify_person(self, token: str) -> VerifiedPerson:
        """Of a JSON Web Token. Unauthenticated where it proves nothing; Unavailable while the issuer is away."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class CreatedKey:
    key: Key
    secret: str = field(repr=False)


class Keys:
    """All keys; changes are compare-and-set."""

    def __init__(self, store: Records, clock: Clock, random_bytes: RandomBytes, audit: AuditLog) -> None:
        self._store, self._clock, self._random_bytes, self._audit = store, clock, random_bytes, audit
        self._known: dict[str, Key] = {}
        # Uses since the last sweep, by id.
        self._used_s: dict[str, float] = {}
        # Digests of the tokens of the settings: a session that one of them opened ends with it.
        self._tokens: frozenset[str] = frozenset()
        self._token_tenants: frozenset[str] = frozenset()
        self._is_closed: Callable[[str], bool] = lambda tenant: False

    def close_for(self, is_closed: Callable[[str], bool]) -> None:
        """Tenants that are being deleted: nobody acts for them."""
        self._is_closed = is_closed

    def is_closed(self, tenant: str) -> bool:
        return self._is_closed(tenant)

    def _require_open(self, tenant: str) -> None:
        if self._is_closed(tenant):
            raise FailedPrecondition(f"the tenant {tenant} is being deleted; wait for its end", field="tenant")

    def use_tokens(self, tokens: Mapping[str, Caller]) -> None:
        """The tokens of the settings; before any call."""
        self._tokens = frozenset(map(parent_of_token, tokens))
        self._token_tenants = frozenset(caller.tenant for caller in tokens.values())

    @property
    def are_usable(self) -> bool:
        """Without an operator's token every caller is the operator, and keys would mean nothing."""
        return bool(self._tokens)

    async def load(self) -> None:
        before = ""
        while records := await self._store.list(KEYS_BUCKET, before=before, limit=1_000):
            for record in records:
                self.take(record)
            before = records[-1].key

    async def follow(self) -> None:
        async for change in self._store.watch(KEYS_BUCKET):
            if not isinstance(change, CaughtUp):
                self.take(change)

    def take(self, change: Record | Deleted) -> None:
        """Take in a change that this or another gateway made."""
        self._note(change.key, None if isinstance(change, Deleted) else self._store.read(KEYS, KEYS_BUCKET, change))

    def _note(self, key_id: str, key: Key | None) -> None:
        if key is None:
            self._known.pop(key_id, None)
        else:
            self._known[key_id] = key

    # Calls of everybody.

    def caller_of(self, token: str) -> Caller | None:
        """Whose valid key it is; None for anything else."""
        parts = _KEY.fullmatch(token)
        key = self._known.get(parts[1]) if parts else None
        if key is None or not hmac.compare_digest(key.secret_hash, _hashed(token)) or not self._is_valid(key):
            return None
        self._used_s[key.id] = self._clock.now_s()
        return Caller(tenant=key.tenant, role=key.role, key_id=key.id)

    def _is_valid(self, key: Key) -> bool:
        """A session is valid as long as what opened it."""
        if not self._tokens or self._is_closed(key.tenant) or state_of(key, self._clock.now_s()) is not KeyState.ACTIVE:
            return False
        if not key.is_session or key.subject:
            return True
        if key.parent.startswith("token:"):
            return key.parent in self._tokens
        parent = self._known.get(key.parent)
        return parent is not None and state_of(parent, self._clock.now_s()) is KeyState.ACTIVE

    async def open_session(self, caller: Caller, token: str) -> CreatedKey:
        """A key of a few hours in place of the token that the call came with."""
        known = self._known.get(caller.key_id)
        parent = caller.key_id or parent_of_token(token)
        now_s = self._clock.now_s()
        expire_s = now_s + SESSION_TTL_S
        if known is not None and known.is_session:
            parent = known.parent
        if known is not None and known.expire_s:
            expire_s = min(expire_s, known.expire_s)
        made = self._new(caller.tenant, caller.role, expire_s=expire_s, parent=parent, is_session=True)
        key = replace(made.key, subject=known.subject if known is not None else "")
        async with self._audit.change("sessions.open", f"keys/{key.id}", tenant=key.tenant, caller=caller):
            return await self._create(key, made.secret)

    async def open_session_of(self, person: VerifiedPerson) -> CreatedKey:
        expire_s = min(self._clock.now_s() + SESSION_TTL_S, person.expire_s)
        made = self._new(person.tenant, person.role, expire_s=expire_s, parent=person.issuer, is_session=True)
        key = replace(made.key, subject=person.subject)
        caller = Caller(tenant=key.tenant, role=key.role, key_id=key.id)
        target = f"keys/{key.id}"
        async with self._audit.change("sessions.open", target, tenant=key.tenant, caller=caller) as change:
            change.detail = f"{person.subject} at {person.issuer}"
            return await self._create(key, made.secret)

    async def close_session(self, caller: Caller) -> None:
        """Nothing where the call came with something that is no session."""
        key = self._known.get(caller.key_id)
        if key is not None and key.is_session:
            async with self._audit.change("sessions.close", f"keys/{key.id}", tenant=key.tenant, caller=caller):
                await self._store.delete(KEYS_BUCKET, key.id)
            self._note(key.id, None)

    # Calls of those who manage keys.

    async def create(self, caller: Caller, *, tenant: str, role: KeyRole, note: str, ttl_s: float) -> CreatedKey:
        """`ttl_s` 0: until it is revoked. PermissionDenied, ResourceExhausted, FailedPrecondition."""
        if not self.are_usable:
            raise FailedPrecondition(
                "this gateway takes every call as the operator's: set FANLIGHT_CLIENT_TOKEN there, then create keys"
            )
        tenant = self._own(caller, tenant, field="tenant")
        _require_gives(caller, role)
        if role is KeyRole.OPERATOR and tenant != DEFAULT_TENANT:
            raise InvalidField(f"must be {DEFAULT_TENANT} for an operator's key", field="tenant")
        made = self._new(tenant, role, expire_s=self._clock.now_s() + ttl_s if ttl_s else 0.0)
        target = f"keys/{made.key.id}"
        async with self._audit.change("keys.create", target, tenant=tenant, caller=caller) as change:
            change.detail = f"role {role}"
            created = await self._create(replace(made.key, note=note), made.secret)
        log.info("key_created", key=created.key.id, tenant=tenant, role=role, by=caller.name)
        return created

    def page(self, caller: Caller, *, tenant: str, with_ended: bool, before: str, limit: int) -> Sequence[Key]:
        """The newest first; `before`: the id of the previous page's last key."""
        caller.require(Right.MANAGE)
        only = self._own(caller, tenant, field="tenant") if tenant or not caller.is_operator else ""
        now_s = self._clock.now_s()
        ordered = sorted(
            (
                key
                for key in self._known.values()
                if (not only or key.tenant == only) and (with_ended or state_of(key, now_s) is KeyState.ACTIVE)
            ),
            key=lambda key: (key.create_s, key.id),
            reverse=True,
        )
        if not before:
            return ordered[:limit]
        start = next((i for i, key in enumerate(ordered) if key.id == before), None)
        if start is None:
            raise InvalidField("is not a token that a page returned", field="page_token")
        return ordered[start + 1 : start + 1 + limit]

    def get(self, caller: Caller, key_id: str) -> Key:
        """NotFound also for another tenant's."""
        caller.require(Right.MANAGE)
        key = self._known.get(key_id)
        if key is None or not (caller.is_operator or key.tenant == caller.tenant):
            raise NotFound("there is no such key", field="id")
        return key

    async def rotate(self, caller: Caller, key_id: str, *, overlap_s: float) -> CreatedKey:
        """A key like this one, which ends after the overlap."""
        old = self.get(caller, key_id)
        _require_gives(caller, old.role)
        now_s = self._clock.now_s()
        if old.is_session:
            raise FailedPrecondition("is a session; open another one", field="id")
        domain.end_by(old, at_s=now_s + overlap_s, now_s=now_s)
        lifetime_s = old.expire_s - old.create_s if old.expire_s else 0.0
        made = self._new(old.tenant, old.role, expire_s=now_s + lifetime_s if lifetime_s else 0.0, parent=old.id)
        async with self._audit.change("keys.rotate", f"keys/{key_id}", tenant=old.tenant, caller=caller, steps=True):
            created = await self._create(replace(made.key, note=old.note), made.secret)
            await self._change(key_id, lambda key: domain.end_by(key, at_s=now_s + overlap_s, now_s=now_s))
        log.info("key_rotated", key=key_id, successor=created.key.id, overlap_s=overlap_s, by=caller.name)
        return created

    async def revoke(self, caller: Caller, key_id: str) -> Key:
        key = self.get(caller, key_id)
        _require_gives(caller, key.role)
        now_s = self._clock.now_s()
        async with self._audit.change("keys.revoke", f"keys/{key_id}", tenant=key.tenant, caller=caller):
            revoked = await self._change(key_id, lambda key: domain.revoke(key, now_s=now_s))
        log.warning("key_revoked", key=key_id, tenant=revoked.tenant, by=caller.name)
        return revoked

    async def forget_tenant(self, tenant: str) -> int:
        """Delete all keys and sessions of the tenant; how many."""
        found = [key.id for key in self._known.values() if key.tenant == tenant]
        for key_id in found:
            await self._store.delete(KEYS_BUCKET, key_id)
            self._note(key_id, None)
        return len(found)

    def has_token(self, tenant: str) -> bool:
        """Whether a token of the settings is the tenant's."""
        return tenant in self._token_tenants

    async def sweep(self) -> None:
        """Write down when keys were used, and forget those that ended long ago."""
        used, self._used_s = self._used_s, {}
        for key_id, at_s in used.items():
            # Perhaps another gateway has just deleted it.
            with contextlib.suppress(NotFound):
                await self._change(key_id, lambda key, at_s=at_s: domain.note_use(key, at_s=at_s))  # type: ignore[misc]  # a default argument
        for key in self._to_forget():
            await self._store.delete(KEYS_BUCKET, key.id)
            self._note(key.id, None)

    def _to_forget(self) -> Sequence[Key]:
        """Sessions that have ended, and keys that ended long ago or before many others of their tenant."""
        now_s, old, ended = self._clock.now_s(), [], defaultdict[str, list[Key]](list)
        for key in self._known.values():
            if state_of(key, now_s) is KeyState.ACTIVE:
                continue
            if key.is_session or _end_s(key) + RETENTION_S < now_s:
                old.append(key)
            else:
                ended[key.tenant].append(key)
        for keys in ended.values():
            old += sorted(keys, key=_end_s)[: max(0, len(keys) - ENDED_LIMIT)]
        return old

    def _own(self, caller: Caller, tenant: str, *, field: str) -> str:
        caller.require(Right.MANAGE)
        if tenant not in ("", caller.tenant) and not caller.is_operator:
            raise PermissionDenied("keys of other tenants are the operator's; leave it out for your own", field=field)
        return tenant or caller.tenant

    def _new(
        self, tenant: str, role: KeyRole, *, expire_s: float, parent: str = "", is_session: bool = False
    ) -> CreatedKey:
        key_id = f"k{self._random_bytes(8).hex()}"
        secret = f"flk_{key_id}_{self._random_bytes(SECRET_BYTES).hex()}"
        key = Key(
            id=key_id,
            tenant=tenant,
            role=role,
            secret_hash=_hashed(secret),
            create_s=self._clock.now_s(),
            expire_s=expire_s,
            parent=parent,
            is_session=is_session,
        )
        return CreatedKey(key=key, secret=secret)

    async def _create(self, key: Key, secret: str) -> CreatedKey:
        """ResourceExhausted where the tenant has as many as it may have; FailedPrecondition while it is deleted."""
        self._require_open(key.tenant)
        now_s = self._clock.now_s()
        limit = SESSIONS_LIMIT if key.is_session else KEYS_LIMIT
        count = sum(
            each.tenant == key.tenant and each.is_session == key.is_session and state_of(each, now_s) is KeyState.ACTIVE
            for each in self._known.values()
        )
        if count >= limit:
            what = "sessions; some end within hours" if key.is_session else "keys; revoke some"
            raise ResourceExhausted(f"the tenant has {count:,} {what}", retry_after_s=600.0)
        await self._store.create(KEYS_BUCKET, key.id, KEYS.encode(key))
        self._note(key.id, key)
        if key.is_session:
            await self._end_oldest(key)
        return CreatedKey(key=key, secret=secret)

    async def _end_oldest(self, like: Key) -> None:
        """Of the sessions of who opened that one, as many as are above the limit."""
        own = [each for each in self._known.values() if each.is_session and _opener(each) == _opener(like)]
        for each in sorted(own, key=lambda each: each.create_s)[: max(0, len(own) - SESSIONS_LIMIT_EACH)]:
            await self._store.delete(KEYS_BUCKET, each.id)
            self._note(each.id, None)

    async def _change(self, key_id: str, event: Event) -> Key:
        for _ in range(ROUNDS_LIMIT):
            record = await self._store.get(KEYS_BUCKET, key_id)
            before = self._store.read(KEYS, KEYS_BUCKET, record) if record else None
            if record is None or before is None:
                raise NotFound("there is no such key", field="id")
            after = event(before)
            if after is before:
                return after
            try:
                await self._store.put(KEYS_BUCKET, key_id, KEYS.encode(after), revision=record.revision)
            except Conflict:
                continue
            self._note(key_id, after)
            return after
        raise ResourceExhausted("the key changes too often at the moment; try again", retry_after_s=1.0)


def _require_gives(caller: Caller, role: KeyRole) -> None:
    caller.require(Right.MANAGE)
    if not caller.is_operator and role not in ADMIN_GIVES:
        raise PermissionDenied(f"only an operator manages keys of the role {role}", field="role")


def _end_s(key: Key) -> float:
    return key.revoke_s or key.expire_s


def _opener(key: Key) -> tuple[str, str, str]:
    return key.tenant, key.parent, key.subject


def parent_of_token(token: str) -> str:
    """How a session names the token of the settings that opened it."""
    return f"token:{_hashed(token)[:32]}"


def _hashed(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()


def require_proof(caller: Caller | None) -> Caller:
    """Unauthenticated for a call whose token is unknown."""
    if caller is None:
        raise Unauthenticated("send a token or a key as `authorization: bearer TOKEN`")
    return caller
