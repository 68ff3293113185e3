"""Nodes join, renew their credentials, and are drained, revoked and removed. Knows no transport.

Every gateway follows the nodes' records, so that looking a credential up reads no store.
"""

import hashlib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

from fanlight.contract.audit_log import Actor
from fanlight.errors import (
    AlreadyExists,
    Conflict,
    FailedPrecondition,
    InvalidField,
    NotFound,
    ResourceExhausted,
    Unauthenticated,
)
from services.gateway.app.audit_log import AuditLog, acting
from services.gateway.app.leases import RandomBytes
from services.gateway.app.records import Codec, Records
from services.gateway.domain import nodes as domain
from services.gateway.domain.nodes import Grant, Invite, NodeRecord, NodeState
from services.gateway.ports import CaughtUp, Clock, Deleted, Record
from services.kernel.logs import get_logger

log = get_logger()

NODES_BUCKET = "nodes"
INVITES_BUCKET = "invites"
USED_TOKENS_BUCKET = "used_tokens"
NODES_LIMIT = 20_000
INVITES_LIMIT = 1_000
ROUNDS_LIMIT = 20
SECRET_BYTES = 32
# How long an expired node is listed before the sweep forgets it.
RETENTION_S = 30 * 86_400.0

_CREDENTIAL = re.compile(r"fln_(n[a-z0-9]{8,40})_([0-9a-f]{64})")
_JOIN_CODE_SECRET = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True, kw_only=True)
class UsedToken:
    """A platform's token that was exchanged; remembered until it ends, so that it cannot be replayed for ever."""

    count: int
    expire_s: float


NODES: Codec[NodeRecord] = Codec(NodeRecord, key_of=lambda node: node.id)
USED_TOKENS: Codec[UsedToken] = Codec(UsedToken)
INVITES: Codec[Invite] = Codec(Invite, key_of=lambda invite: invite.id)

Event = Callable[[NodeRecord], NodeRecord]


@dataclass(frozen=True, slots=True, kw_only=True)
class VerifiedIdentity:
    """Who a platform or an authority says that a node is."""

    # The issuer's name, or `certificate`.
    proof: str
    subject: str
    grant: Grant
    # Of the token that proved it: its sha256, when it ends, and how many times it can be exchanged; 0 for any number.
    token_hash: str = ""
    token_expire_s: float = 0.0
    token_uses: int = 0


class IdentityVerifier(Protocol):
    async def verify(self, token: str) -> VerifiedIdentity:
        """Of a JSON Web Token. Unauthenticated where it proves nothing; Unavailable while the issuer is away."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class IssuedCredential:
    node: NodeRecord
    credential: str = field(repr=False)
    ttl_s: float


class Nodes:
    """All nodes and invitations; changes are compare-and-set."""

    def __init__(
        self, store: Records, clock: Clock, random_bytes: RandomBytes, audit: AuditLog, *, credential_ttl_s: float
    ) -> None:
        self._store, self._clock, self._random_bytes, self._audit = store, clock, random_bytes, audit
        self._ttl_s = credential_ttl_s
        self._known: dict[str, NodeRecord] = {}
        # Ids of nodes that lost their rights, until `pop_ended`.
        self._ended: set[str] = set()

    def pop_ended(self) -> Sequence[str]:
        """The ids of nodes whose rights ended since the last call, at this gateway or another one."""
        ended, self._ended = sorted(self._ended), set()
        return ended

    async def load(self) -> None:
        before = ""
        while records := await self._store.list(NODES_BUCKET, before=before, limit=1_000):
            for record in records:
                if node := self._store.read(NODES, NODES_BUCKET, record):
                    self._known[record.key] = node
            before = records[-1].key

    async def follow(self) -> None:
        async for change in self._store.watch(NODES_BUCKET):
            if not isinstance(change, CaughtUp):
                self.take(change)

    def take(self, change: Record | Deleted) -> None:
        """Take in a change that this or another gateway made."""
        self._note(change.key, None if isinstance(change, Deleted) else self._store.read(NODES, NODES_BUCKET, change))

    def _note(self, node_id: str, node: NodeRecord | None) -> None:
        before = self._known.get(node_id)
        if node is None:
            self._known.pop(node_id, None)
        else:
            self._known[node_id] = node
        if before is not None and before.credentials and (node is None or not node.credentials):
            self._ended.add(node_id)

    # Calls of nodes.

    def of_credential(self, token: str) -> NodeRecord | None:
        """The node whose valid credential it is; None for anything else."""
        parts = _CREDENTIAL.fullmatch(token)
        node = self._known.get(parts[1]) if parts else None
        if node is None or node.revoke_s:
            return None
        found = node.credential(hashed(token))
        return node if found is not None and found.is_valid(self._clock.now_s()) else None

    async def note_use(self, token: str) -> None:
        """Remember that the credential's holder has it; writes once for each credential."""
        node = self.of_credential(token)
        if node is not None and domain.mark_used(node, hashed(token)) is not node:
            await self._change(node.id, lambda node: domain.mark_used(node, hashed(token)))

    async def join_with_code(self, code_id: str, secret: str, *, name: str, stages: Sequence[str]) -> IssuedCredential:
        """Unauthenticated; ResourceExhausted where there are too many nodes."""
        invite = await self._use_invite(code_id, secret)
        node = self._new_node(self._new_id(), name, _narrowed(invite.grant, stages), proof="join_code")
        return await self._admit(node)

    async def join_verified(self, identity: VerifiedIdentity, *, name: str, stages: Sequence[str]) -> IssuedCredential:
        """The node of that identity, which may have joined before."""
        await self._count_token(identity)
        digest = hashlib.sha256(f"{identity.proof}\n{identity.subject}".encode()).hexdigest()
        grant = _narrowed(identity.grant, stages)
        node = self._new_node(f"n{digest[:24]}", name, grant, proof=identity.proof, subject=identity.subject)
        return await self._admit(node)

    async def _count_token(self, identity: VerifiedIdentity) -> None:
        """Unauthenticated where the token was exchanged too often already."""
        key, limit = identity.token_hash, identity.token_uses
        for _ in range(ROUNDS_LIMIT if limit else 0):
            record = await self._store.get(USED_TOKENS_BUCKET, key)
            before = self._store.read(USED_TOKENS, USED_TOKENS_BUCKET, record) if record else None
            count = before.count if before else 0
            if count >= limit:
                log.warning("node_token_replayed", proof=identity.proof, subject=identity.subject)
                raise Unauthenticated(f"this token was exchanged {limit} times already; take a fresh one")
            value = USED_TOKENS.encode(UsedToken(count=count + 1, expire_s=identity.token_expire_s))
            try:
                if record is None:
                    await self._store.create(USED_TOKENS_BUCKET, key, value)
                else:
                    await self._store.put(USED_TOKENS_BUCKET, key, value, revision=record.revision)
            except (AlreadyExists, Conflict):
                continue
            return

    def _new_node(self, node_id: str, name: str, grant: Grant, *, proof: str, subject: str = "") -> NodeRecord:
        now_s = self._clock.now_s()
        return NodeRecord(id=node_id, name=name, grant=grant, proof=proof, subject=subject, join_s=now_s, renew_s=now_s)

    async def _admit(self, node: NodeRecord) -> IssuedCredential:
        token = self._new_credential(node.id)
        now_s = self._clock.now_s()

        def issue(known: NodeRecord) -> NodeRecord:
            known = replace(known, name=node.name, grant=node.grant)
            return domain.issue(known, hashed(token), now_s=now_s, ttl_s=self._ttl_s)

        if len(self._known) >= NODES_LIMIT and node.id not in self._known:
            raise ResourceExhausted(f"there are {NODES_LIMIT:,} nodes; remove some", retry_after_s=600.0)
        first = issue(node)
        acting.set(Actor(role="node", key_id=node.id, address=acting.get().address))
        async with self._audit.change("nodes.join", f"nodes/{node.id}") as change:
            change.detail = f"by {node.proof}, pool {node.grant.pool}"
            try:
                await self._store.create(NODES_BUCKET, node.id, NODES.encode(first))
            except AlreadyExists:
                first = await self._change(node.id, issue)
        self._note(node.id, first)
        log.info("node_joined", node=node.id, name=node.name, proof=node.proof, pool=node.grant.pool)
        return IssuedCredential(node=first, credential=token, ttl_s=self._ttl_s)

    async def renew(self, token: str) -> IssuedCredential:
        """Unauthenticated where the credential ended, or a copy of it was exchanged already."""
        parts = _CREDENTIAL.fullmatch(token)
        if parts is None:
            raise Unauthenticated("this is not a node's credential; join first")
        now_s, fresh = self._clock.now_s(), self._new_credential(parts[1])
        try:
            node = await self._change(
                parts[1],
                lambda node: domain.exchange(node, hashed(token), hashed(fresh), now_s=now_s, ttl_s=self._ttl_s),
            )
        except NotFound as error:
            raise Unauthenticated("this node is not known; join again") from error
        except domain.CopiedCredential:
            log.warning("node_credential_copied", node=parts[1])
            async with self._audit.change("nodes.end_credentials", f"nodes/{parts[1]}") as change:
                change.detail = "a copy of its credential was exchanged"
                await self._change(parts[1], domain.end_credentials)
            raise
        return IssuedCredential(node=node, credential=fresh, ttl_s=self._ttl_s)

    # Calls of operators.

    async def invite(self, grant: Grant, *, uses: int, ttl_s: float, comment: str) -> tuple[Invite, str]:
        """The invitation, and the secret of its join code, which is not stored."""
        if len(await self.invites()) >= INVITES_LIMIT:
            raise ResourceExhausted(f"there are {INVITES_LIMIT:,} invitations; remove some", retry_after_s=600.0)
        secret = self._random_bytes(SECRET_BYTES).hex()
        invite = Invite(
            id=self._random_bytes(5).hex(),
            secret_hash=hashed(secret),
            grant=grant,
            uses=uses,
            expire_s=self._clock.now_s() + ttl_s,
            comment=comment,
        )
        async with self._audit.change("invites.create", f"invites/{invite.id}") as change:
            change.detail = f"{uses} uses, pool {grant.pool}"
            await self._store.create(INVITES_BUCKET, invite.id, INVITES.encode(invite))
        log.info("node_invited", invite=invite.id, uses=uses, ttl_s=ttl_s, pool=grant.pool)
        return invite, secret

    async def invites(self) -> Sequence[Invite]:
        """Those that can still be used; the others are deleted."""
        found = []
        for record in await self._store.list(INVITES_BUCKET, limit=2 * INVITES_LIMIT):
            invite = self._store.read(INVITES, INVITES_BUCKET, record)
            if invite is not None and invite.is_open(self._clock.now_s()):
                found.append(invite)
            elif invite is not None:
                await self._store.delete(INVITES_BUCKET, record.key)
        return found

    async def remove_invite(self, invite_id: str) -> None:
        async with self._audit.change("invites.remove", f"invites/{invite_id}"):
            if await self._store.get(INVITES_BUCKET, invite_id) is None:
                raise NotFound("there is no such invitation", field="id")
            await self._store.delete(INVITES_BUCKET, invite_id)

    async def _use_invite(self, invite_id: str, secret: str) -> Invite:
        if not _JOIN_CODE_SECRET.fullmatch(secret):
            raise Unauthenticated("this is not a join code; make one with `fanlight nodes invite`")
        for _ in range(ROUNDS_LIMIT):
            record = await self._store.get(INVITES_BUCKET, invite_id)
            invite = self._store.read(INVITES, INVITES_BUCKET, record) if record else None
            if record is None or invite is None:
                raise Unauthenticated("this join code is wrong or used up; make a new one with `fanlight nodes invite`")
            used = domain.use_invite(invite, hashed(secret), now_s=self._clock.now_s())
            try:
                await self._store.put(INVITES_BUCKET, invite_id, INVITES.encode(used), revision=record.revision)
            except Conflict:
                continue
            return used
        raise ResourceExhausted("many nodes join with this code at the moment; try again", retry_after_s=1.0)

    def page(self, *, before: str, limit: int) -> Sequence[NodeRecord]:
        """Those that joined last first; `before`: the id of the previous page's last node."""
        ordered = sorted(self._known.values(), key=lambda node: (node.join_s, node.id), reverse=True)
        if not before:
            return ordered[:limit]
        start = next((i for i, node in enumerate(ordered) if node.id == before), None)
        if start is None:
            raise InvalidField("is not a token that a page returned", field="page_token")
        return ordered[start + 1 : start + 1 + limit]

    def get(self, node_id: str) -> NodeRecord:
        node = self._known.get(node_id)
        if node is None:
            raise NotFound("there is no such node", field="id")
        return node

    def is_known(self, node_id: str) -> bool:
        return node_id in self._known

    def is_revoked(self, node_id: str) -> bool:
        node = self._known.get(node_id)
        return node is not None and bool(node.revoke_s)

    async def drain(self, node_id: str, *, draining: bool) -> NodeRecord:
        async with self._audit.change("nodes.drain" if draining else "nodes.undrain", f"nodes/{node_id}"):
            return await self._change(node_id, lambda node: replace(node, draining=draining))

    async def revoke(self, node_id: str, reason: str) -> NodeRecord:
        now_s = self._clock.now_s()
        async with self._audit.change("nodes.revoke", f"nodes/{node_id}") as change:
            change.detail = reason
            node = await self._change(node_id, lambda node: domain.revoke(node, reason, now_s=now_s))
        log.warning("node_revoked", node=node_id, why=reason)
        return node

    async def remove(self, node_id: str) -> None:
        async with self._audit.change("nodes.remove", f"nodes/{node_id}"):
            node = self.get(node_id)
            if domain.state_of(node, self._clock.now_s()) not in (NodeState.REVOKED, NodeState.EXPIRED):
                raise FailedPrecondition("it may still work; revoke it first", field="id")
            await self._store.delete(NODES_BUCKET, node_id)
        self._note(node_id, None)

    async def note_checked(self, node_id: str, *, is_false: bool) -> None:
        """Count a result of the node that other nodes repeated."""
        if node_id in self._known:
            await self._change(
                node_id,
                lambda node: replace(
                    node,
                    checked_results=node.checked_results + 1,
                    false_results=node.false_results + is_false,
                ),
            )

    async def sweep(self) -> None:
        """Forget tokens that ended, and nodes that expired long ago; revoked nodes stay until they are removed."""
        now_s = self._clock.now_s()
        for record in await self._store.list(USED_TOKENS_BUCKET, limit=2 * NODES_LIMIT):
            used = self._store.read(USED_TOKENS, USED_TOKENS_BUCKET, record)
            if used is None or used.expire_s < now_s:
                await self._store.delete(USED_TOKENS_BUCKET, record.key)
        old_s = now_s - RETENTION_S
        for node in list(self._known.values()):
            if not node.revoke_s and max(node.expire_s, node.renew_s) < old_s:
                await self._store.delete(NODES_BUCKET, node.id)
                self._note(node.id, None)

    async def _change(self, node_id: str, event: Event) -> NodeRecord:
        for _ in range(ROUNDS_LIMIT):
            record = await self._store.get(NODES_BUCKET, node_id)
            before = self._store.read(NODES, NODES_BUCKET, record) if record else None
            if record is None or before is None:
                raise NotFound("there is no such node", field="id")
            after = event(before)
            if after is before:
                return after
            try:
                await self._store.put(NODES_BUCKET, node_id, NODES.encode(after), revision=record.revision)
            except Conflict:
                continue
            self._note(node_id, after)
            return after
        raise ResourceExhausted("the node changes too often at the moment; try again", retry_after_s=1.0)

    def _new_id(self) -> str:
        return f"n{self._random_bytes(8).hex()}"

    def _new_credential(self, node_id: str) -> str:
        return f"fln_{node_id}_{self._random_bytes(SECRET_BYTES).hex()}"


def hashed(secret: str) -> str:
    """Of a random secret of 256 bits, which needs no slow hash."""
    return hashlib.sha256(secret.encode()).hexdigest()


def _narrowed(grant: Grant, stages: Sequence[str]) -> Grant:
    """For the stages that the node asks for. InvalidField for one that it may not serve."""
    for stage in stages:
        if not grant.allows(stage):
            raise InvalidField(
                f"this proof does not allow {stage}; it allows {', '.join(grant.stages)}", field="stages"
            )
    return replace(grant, stages=tuple(stages)) if stages else grant
