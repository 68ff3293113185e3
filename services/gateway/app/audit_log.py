"""The audit log: who changed what, and who read another tenant's data. Entries are only ever added.

Every gateway process writes a chain of its own, so that no gateway waits for another one: each entry has the hash of
the one before, and the first one the heads of the chains that were known then. Where the store can, an entry is
written in the commit of the change it is about. Where it cannot, and for changes of several steps, an intent is
written before and a completion after it, so that a crash between them shows. An entry that cannot be written stops
the change.
"""

import asyncio
import bisect
import contextlib
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from aiolimiter import AsyncLimiter

from fanlight.contract.audit_log import (
    LINKS_LIMIT,
    SUCCESS,
    TEXT_LIMIT_BYTES,
    Actor,
    AuditChain,
    AuditEntry,
    ChainHead,
    EntryKind,
    hashed,
)
from fanlight.errors import AlreadyExists, Conflict, FanlightError, InvalidField, ResourceExhausted, Unavailable
from services.gateway.app.leases import RandomBytes
from services.gateway.app.records import Codec, Records, joining
from services.gateway.app.tenants import Caller
from services.gateway.ports import CaughtUp, Clock, Deleted, NewRecord, Record
from services.kernel.logs import get_logger

log = get_logger()

BUCKET = "audit_log"
CHAINS_BUCKET = "audit_chains"
# Read again only after so long by the same caller of the same target is a read an entry again.
READ_WINDOW_S = 600.0
READS_REMEMBERED = 10_000
# Entries of one tenant at one gateway, or of one operator's key or node there, on the average over ten seconds.
RATE_PER_S, RATE_WINDOW_S = 50.0, 10.0
RATES_REMEMBERED = 1_000
_OWN_RATES = frozenset({"operator", "node"})
FOLLOWERS_LIMIT = 16
BACKLOG_LIMIT = 10_000
CHAINS_LIMIT = 10_000
# Those without entries, too: so many restarts are remembered.
CHAINS_KEPT = 1_000
PRUNE_PAGE = 500
ROUNDS_LIMIT = 20

T = TypeVar("T")


def _key_of(entry: AuditEntry) -> str:
    """Sorts by time; of one chain also by number."""
    return f"{entry.time_us:017d}-{entry.chain}-{entry.number:010d}"


ENTRIES: Codec[AuditEntry] = Codec(AuditEntry, key_of=_key_of)
CHAINS: Codec[AuditChain] = Codec(AuditChain, key_of=lambda chain: chain.head.chain)

# Who calls; set where a call comes in. The gateway itself where nobody does.
THE_GATEWAY = Actor()
acting: ContextVar[Actor] = ContextVar("acting", default=THE_GATEWAY)


def act_as(caller: Caller, address: str) -> None:
    """For the call that is being answered."""
    acting.set(Actor(tenant=caller.tenant, role=caller.role.value, key_id=caller.key_id, address=address))


def act_as_node(node_id: str, address: str) -> None:
    acting.set(Actor(role="node", key_id=node_id, address=address))


@contextlib.contextmanager
def _apart() -> Iterator[None]:
    """The log's own writes take nothing along."""
    token = joining.set(None)
    try:
        yield
    finally:
        joining.reset(token)


def shortened(text: str) -> str:
    """To what fits into an entry."""
    return text.encode()[:TEXT_LIMIT_BYTES].decode(errors="ignore")


@dataclass(slots=True, kw_only=True)
class AuditedChange:
    """A change while it is made. What is learned meanwhile is set before its first write."""

    log: "AuditLog"
    action: str
    target: str
    tenant: str = ""
    detail: str = ""
    actor: Actor
    # The number of its intent, once that is written, and whether the entry is.
    intent: ChainHead | None = None
    is_written: bool = False

    async def write(self, do: Callable[[NewRecord | None], Coroutine[Any, Any, T]]) -> T:
        """The change's first write takes the entry along."""
        if self.is_written or self.intent is not None:
            return await do(None)
        if not self.log.commits_together:
            await self.begin()
            return await do(None)
        return await self.log.write_with(self, do)

    async def begin(self) -> None:
        """Write the intent: before a change that is not one write of the store."""
        entry = await self.log.append(self, EntryKind.INTENT, "")
        self.intent = entry.head

    def without_entry(self) -> None:
        """Nothing was changed after all."""
        self.is_written = True


class AuditLog:
    def __init__(
        self, store: Records, clock: Clock, random_bytes: RandomBytes, *, retention_s: float, retention_count: int
    ) -> None:
        self._store, self._clock, self._random_bytes = store, clock, random_bytes
        self._retention_s, self._retention_count = retention_s, retention_count
        self._lock = asyncio.Lock()
        # The last entry of this process's chain; None before the first.
        self._last: AuditEntry | None = None
        self._chain = ""
        # Heads of chains that this process has left.
        self._left: list[ChainHead] = []
        self._keys: list[str] = []
        self._caught_up = False
        self._followers: list[asyncio.Queue[AuditEntry | None]] = []
        self._reads: OrderedDict[tuple[Actor, str, str], float] = OrderedDict()
        self._rates: OrderedDict[Actor | str, AsyncLimiter] = OrderedDict()

    @property
    def commits_together(self) -> bool:
        return self._store.commits_together

    # Writing

    @contextlib.asynccontextmanager
    async def change(
        self, action: str, target: str, *, tenant: str = "", steps: bool = False, caller: Caller | None = None
    ) -> AsyncIterator[AuditedChange]:
        """One entry about what is changed within, with its outcome. `steps`: it is more than one write of the store."""
        actor = acting.get()
        if caller is not None and not actor.role:
            actor = replace(actor, tenant=caller.tenant, role=caller.role.value, key_id=caller.key_id)
        await self._take_place(actor)
        change = AuditedChange(log=self, action=action, target=target, tenant=tenant, actor=actor)
        if steps:
            await change.begin()
        token = joining.set(change)
        try:
            yield change
        except FanlightError as error:
            joining.reset(token)
            await self._end_failed(change, error)
            raise
        except BaseException:
            # A cancelled call or a crash: an intent stays open.
            joining.reset(token)
            raise
        joining.reset(token)
        await self._end(change, SUCCESS)

    async def _end_failed(self, change: AuditedChange, error: FanlightError) -> None:
        """Nothing more can be done where the store does not take it: the caller learns of the first error."""
        try:
            await self._end(change, error.reason)
        except FanlightError as trouble:
            log.warning("audit_entry_not_written", action=change.action, result=error.reason, why=trouble.message)

    async def _end(self, change: AuditedChange, result: str) -> None:
        if change.intent is not None:
            await self.append(change, EntryKind.COMPLETION, result)
        elif not change.is_written:
            await self.append(change, EntryKind.CHANGE, result)

    async def note_read(self, action: str, target: str, *, tenant: str) -> None:
        """By a call from outside, of another tenant's data; nothing for one's own.

        Unavailable where the entry cannot be written: then nothing may be read.
        """
        actor = acting.get()
        if not actor.role or tenant == actor.tenant:
            return
        now_s, key = self._clock.monotonic_s(), (actor, action, target)
        if self._reads.get(key, -READ_WINDOW_S) > now_s - READ_WINDOW_S:
            return
        await self._take_place(actor)
        change = AuditedChange(log=self, action=action, target=target, tenant=tenant, actor=actor)
        await self.append(change, EntryKind.READ, SUCCESS)
        self._reads[key] = now_s
        while len(self._reads) > READS_REMEMBERED:
            self._reads.popitem(last=False)

    async def _take_place(self, actor: Actor) -> None:
        """ResourceExhausted for one that writes too many entries; more keys do not give a tenant more of them."""
        if not actor.role:
            return
        payer = actor if actor.role in _OWN_RATES else actor.tenant
        rate = self._rates.get(payer)
        if rate is None:
            rate = self._rates[payer] = AsyncLimiter(RATE_PER_S * RATE_WINDOW_S, RATE_WINDOW_S)
            while len(self._rates) > RATES_REMEMBERED:
                self._rates.popitem(last=False)
        if not rate.has_capacity():
            raise ResourceExhausted(
                f"audit_log: you make more than {RATE_PER_S:g} changes a second that are logged", retry_after_s=1.0
            )
        await rate.acquire()

    async def append(self, change: AuditedChange, kind: EntryKind, result: str) -> AuditEntry:
        """Unavailable where the store does not take it."""
        with _apart():
            async with self._lock:
                entry = await self._next(change, kind, result)
                with self._sure():
                    await self._store.create(BUCKET, _key_of(entry), ENTRIES.encode(entry))
                await self._advance(entry)
        change.is_written = kind is not EntryKind.INTENT
        return entry

    async def write_with(self, change: AuditedChange, do: Callable[[NewRecord | None], Coroutine[Any, Any, T]]) -> T:
        """The entry and the change in one commit."""
        async with self._lock:
            entry = await self._next(change, EntryKind.CHANGE, SUCCESS)
            with self._sure():
                written = await do(NewRecord(bucket=BUCKET, key=_key_of(entry), value=ENTRIES.encode(entry)))
            await self._advance(entry)
        change.is_written = True
        return written

    @contextlib.contextmanager
    def _sure(self) -> Iterator[None]:
        """After a write of which nobody knows whether it happened, this process goes on with a new chain."""
        try:
            yield
        except (AlreadyExists, Conflict):
            # Refused as a whole.
            raise
        except BaseException:
            if self._last is not None:
                self._left.append(self._last.head)
            self._last, self._chain = None, ""
            raise

    async def _next(self, change: AuditedChange, kind: EntryKind, result: str) -> AuditEntry:
        last = self._last
        links: Sequence[ChainHead] = ()
        if last is None:
            self._chain = self._chain or f"c{int(self._clock.now_s()):010x}{self._random_bytes(6).hex()}"
            links = await self._heads()
        intent = change.intent
        return hashed(
            AuditEntry(
                chain=self._chain,
                number=last.number + 1 if last else 1,
                time_us=max(int(self._clock.now_s() * 1_000_000), last.time_us if last else 0),
                kind=kind,
                actor=replace(change.actor, address=shortened(change.actor.address)),
                action=change.action,
                target=shortened(change.target),
                target_tenant=change.tenant,
                result=result,
                # An intent of a chain that was left since is named in words.
                detail=shortened(change.detail if intent is None or intent.chain == self._chain else str(intent)),
                intent=intent.number if kind is EntryKind.COMPLETION and intent and intent.chain == self._chain else 0,
                links=tuple(links),
                previous_hash=last.hash if last else "",
            )
        )

    async def _heads(self) -> Sequence[ChainHead]:
        """Of other chains, the newest."""
        heads = {each.head.chain: each.head for each in await self.chains()}
        heads |= {head.chain: head for head in self._left}
        return [heads[chain] for chain in sorted(heads, reverse=True)[:LINKS_LIMIT]]

    async def _advance(self, entry: AuditEntry) -> None:
        """The entry is written. Its chain's head is noted in the store as soon as that can be done."""
        self._last = entry
        try:
            with _apart():
                await self._note_head(entry)
        except FanlightError as error:
            log.warning("audit_head_not_noted", chain=entry.chain, reason=error.reason)

    async def _note_head(self, entry: AuditEntry) -> None:
        head = entry.head
        for _ in range(ROUNDS_LIMIT):
            record = await self._store.get(CHAINS_BUCKET, entry.chain)
            known = self._store.read(CHAINS, CHAINS_BUCKET, record) if record else None
            value = CHAINS.encode(replace(known, head=head) if known else AuditChain(head=head))
            try:
                if record is None:
                    await self._store.create(CHAINS_BUCKET, entry.chain, value)
                else:
                    await self._store.put(CHAINS_BUCKET, entry.chain, value, revision=record.revision)
            except (AlreadyExists, Conflict):
                continue
            return

    # Reading

    async def chains(self) -> Sequence[AuditChain]:
        records = await self._store.list(CHAINS_BUCKET, limit=CHAINS_LIMIT)
        found = [self._store.read(CHAINS, CHAINS_BUCKET, record) for record in records]
        return [each for each in found if each is not None]

    async def page(self, *, before: str, limit: int) -> tuple[Sequence[AuditEntry], str]:
        """The newest first, and the token of the next page; empty for the last one."""
        if before and not before.replace("-", "").isalnum():
            raise InvalidField("is not a token that a page returned", field="page_token")
        records = await self._store.list(BUCKET, before=before, limit=limit)
        found = [self._store.read(ENTRIES, BUCKET, record) for record in records]
        return [each for each in found if each is not None], records[-1].key if len(records) == limit else ""

    def require_follower_place(self) -> None:
        """ResourceExhausted where too many follow it."""
        if len(self._followers) >= FOLLOWERS_LIMIT:
            raise ResourceExhausted(f"{FOLLOWERS_LIMIT} follow the audit log already", retry_after_s=5.0)

    @contextlib.contextmanager
    def followed(self) -> Iterator[AsyncIterator[AuditEntry]]:
        """Entries that are written from now on. ResourceExhausted; Unavailable for a reader that is too slow."""
        self.require_follower_place()
        queue: asyncio.Queue[AuditEntry | None] = asyncio.Queue(BACKLOG_LIMIT + 1)
        self._followers.append(queue)
        try:
            yield _entries_of(queue)
        finally:
            if queue in self._followers:
                self._followers.remove(queue)

    def drain(self) -> None:
        for queue in list(self._followers):
            self._end_follower(queue)

    def _end_follower(self, queue: asyncio.Queue[AuditEntry | None]) -> None:
        self._followers.remove(queue)
        queue.put_nowait(None)

    async def follow(self) -> None:
        """Take in what this and other gateways write."""
        async for change in self._store.watch(BUCKET):
            if isinstance(change, CaughtUp):
                self._caught_up = True
            else:
                self._take(change)

    def _take(self, change: Record | Deleted) -> None:
        at = bisect.bisect_left(self._keys, change.key)
        is_there = at < len(self._keys) and self._keys[at] == change.key
        if isinstance(change, Deleted):
            if is_there:
                del self._keys[at]
            return
        if is_there:
            return
        self._keys.insert(at, change.key)
        entry = self._store.read(ENTRIES, BUCKET, change) if self._caught_up and self._followers else None
        for queue in list(self._followers) if entry is not None else ():
            if queue.qsize() >= BACKLOG_LIMIT:
                self._end_follower(queue)
            else:
                queue.put_nowait(entry)

    # Retention

    async def sweep(self) -> None:
        """Delete entries that are too old or too many, in the order of each chain; its new beginning is noted first."""
        oldest = f"{int((self._clock.now_s() - self._retention_s) * 1_000_000):017d}"
        count = max(bisect.bisect_left(self._keys, oldest), len(self._keys) - self._retention_count)
        keys = self._keys[: min(count, PRUNE_PAGE)]
        if not keys:
            return
        # The newest entry of a chain that is deleted, by chain.
        last: dict[str, AuditEntry] = {}
        for key in keys:
            record = await self._store.get(BUCKET, key)
            entry = self._store.read(ENTRIES, BUCKET, record) if record else None
            if entry is not None:
                last[entry.chain] = entry
        for entry in last.values():
            await self._note_beginning(entry)
        for key in keys:
            await self._store.delete(BUCKET, key)
            self._take(Deleted(key=key))
        log.info("audit_entries_deleted", count=len(keys))
        await self._forget_chains()

    async def _forget_chains(self) -> None:
        """Of the oldest above the limit, those that have no entries any more."""
        chains = await self.chains()
        for each in sorted(chains, key=lambda each: each.head.chain)[: max(0, len(chains) - CHAINS_KEPT)]:
            if each.first_number > each.head.number:
                await self._store.delete(CHAINS_BUCKET, each.head.chain)

    async def _note_beginning(self, last: AuditEntry) -> None:
        """The chain begins behind that entry; one of which nothing is left is forgotten."""
        for _ in range(ROUNDS_LIMIT):
            record = await self._store.get(CHAINS_BUCKET, last.chain)
            known = self._store.read(CHAINS, CHAINS_BUCKET, record) if record else None
            if record is None or known is None or known.first_number > last.number:
                return
            after = replace(known, first_number=last.number + 1, first_previous_hash=last.hash)
            try:
                await self._store.put(CHAINS_BUCKET, last.chain, CHAINS.encode(after), revision=record.revision)
            except Conflict:
                continue
            return


async def _entries_of(queue: asyncio.Queue[AuditEntry | None]) -> AsyncIterator[AuditEntry]:
    while (entry := await queue.get()) is not None:
        yield entry
    raise Unavailable("entries may have been left out; list them, and follow again", retry_after_s=1.0)
