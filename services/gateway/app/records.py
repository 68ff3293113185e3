"""Records of the store as values: how they are written, and what becomes of one that cannot be read.

Such a record is set aside: reported once, counted, and left where it is until an operator removes it. It stops no
start, no list and no watch. What a record means is not known here.
"""

import contextlib
import json
from collections import Counter
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

from pydantic import TypeAdapter, ValidationError

from fanlight.errors import FailedPrecondition, FanlightError, NotFound
from services.gateway.ports import (
    CaughtUp,
    Change,
    Clock,
    Deleted,
    NewRecord,
    Record,
    RecordStore,
    commits_together,
    store_fault,
)
from services.kernel.logs import get_logger

log = get_logger()

# The version of the records' format. 2: a job keeps its stages' request messages.
FORMAT_VERSION = 2
# How many damaged records are counted and listed.
DAMAGED_LIMIT = 10_000
# How many bytes of a damaged record are shown.
SHOWN_LIMIT_BYTES = 256 * 1024

T = TypeVar("T")


class UnreadableRecord(FailedPrecondition):
    """A record that this gateway cannot read: of another format version, or damaged. Other records are unaffected."""

    reason = "UNREADABLE_RECORD"


class OtherFormatVersion(UnreadableRecord):
    """Written by an older or a newer Fanlight."""


class Codec(Generic[T]):
    """Values of one type as the bytes of records, and back."""

    def __init__(
        self, kind: Any, *, fault_of: Callable[[T], str] | None = None, key_of: Callable[[T], str] | None = None
    ) -> None:
        """`fault_of`: why a value of the right types cannot be; empty where it can. `key_of`: its record's key."""
        self._adapter: TypeAdapter[T] = TypeAdapter(kind)
        self._fault_of = fault_of
        self._key_of = key_of
        self._head = b'{"version":%d,"value":' % FORMAT_VERSION

    def encode(self, value: T) -> bytes:
        """Leaves defaults out, which therefore must never change within a format version.

        FanlightError for a value that no gateway could read again: a number that is not finite becomes `null`.
        """
        data = b"%b%b}" % (self._head, self._adapter.dump_json(value, exclude_defaults=True))
        if b":null" in data or b"[null" in data or b",null" in data:
            self._require_readable(data)
        return data

    def _require_readable(self, data: bytes) -> None:
        try:
            self.decode(data)
        except UnreadableRecord as error:
            raise FanlightError(f"this would be stored as a record that cannot be read: {error.message}") from error

    def decode(self, data: bytes) -> T:
        """OtherFormatVersion, UnreadableRecord."""
        if not data.startswith(self._head):
            raise _not_ours(data)
        try:
            value = self._adapter.validate_json(data[len(self._head) : -1])
        except ValidationError as error:
            where = error.errors(include_url=False, include_input=False)[0]
            place = f"{'.'.join(map(str, where['loc']))}: " if where["loc"] else ""
            raise UnreadableRecord(place + where["msg"]) from error
        if self._fault_of is not None and (fault := self._fault_of(value)):
            raise UnreadableRecord(fault)
        return value

    def decode_record(self, record: Record) -> T:
        """OtherFormatVersion, UnreadableRecord; also for another key's value."""
        if record.fault:
            raise UnreadableRecord(record.fault)
        value = self.decode(record.value)
        if self._key_of is not None and (key := self._key_of(value)) != record.key:
            raise UnreadableRecord(f"id: is {key[:80]!r}, and the record's key is {record.key!r}")
        return value


async def refuse_other_format(store: RecordStore, buckets: Iterable[str]) -> None:
    """OtherFormatVersion where a record of the store has another format version than those of this gateway."""
    for bucket in buckets:
        for record in await store.list(bucket, limit=1):
            version = _version_of(record.value)
            if version is not None and version != FORMAT_VERSION:
                raise OtherFormatVersion(
                    f"{bucket} have format version {version}; this gateway reads and writes version {FORMAT_VERSION}"
                )


def _not_ours(data: bytes) -> UnreadableRecord:
    version = _version_of(data)
    if version is None or version == FORMAT_VERSION:
        return UnreadableRecord("it is not a record of Fanlight")
    return OtherFormatVersion(f"it has format version {version}; this gateway reads version {FORMAT_VERSION}")


def _version_of(data: bytes) -> object:
    """None where the record has no version."""
    try:
        return json.loads(data)["version"]
    except (ValueError, KeyError, TypeError):
        return None


@dataclass(frozen=True, slots=True, kw_only=True)
class DamagedRecord:
    """A record of the store that cannot be read."""

    bucket: str
    key: str
    why: str
    size_bytes: int
    # When this gateway found it.
    found_time_s: float
    revision: int
    codec: Codec[Any]

    @property
    def name(self) -> str:
        return f"{self.bucket}/{self.key}"


W = TypeVar("W")


class JoinedWrite(Protocol):
    """What a change's write takes along, such as the entry of the audit log about it."""

    async def write(self, do: Callable[[NewRecord | None], Coroutine[Any, Any, W]]) -> W:
        """Call it once, with the record that has to come before the write."""
        ...


# Of the call that is being answered; None where its writes take nothing along.
joining: ContextVar[JoinedWrite | None] = ContextVar("joining", default=None)


class Records:
    """A RecordStore that also reads: it notes which records cannot be."""

    def __init__(self, store: RecordStore, clock: Clock) -> None:
        self._store = store
        self._clock = clock
        # By bucket and key, in the order in which they were found.
        self._damaged: dict[tuple[str, str], DamagedRecord] = {}

    # The store itself. A write within `joining` takes along what has to be written with it.

    @property
    def commits_together(self) -> bool:
        return commits_together(self._store)

    def create(
        self, bucket: str, key: str, value: bytes, *, after: NewRecord | None = None
    ) -> Coroutine[Any, Any, Record]:
        if after is None and (joined := joining.get()) is not None:
            return joined.write(lambda after: self._store.create(bucket, key, value, after=after))
        return self._store.create(bucket, key, value, after=after)

    def get(self, bucket: str, key: str) -> Coroutine[Any, Any, Record | None]:
        return self._store.get(bucket, key)

    def put(
        self, bucket: str, key: str, value: bytes, *, revision: int, after: NewRecord | None = None
    ) -> Coroutine[Any, Any, Record]:
        self._damaged.pop((bucket, key), None)
        if after is None and (joined := joining.get()) is not None:
            return joined.write(lambda after: self._store.put(bucket, key, value, revision=revision, after=after))
        return self._store.put(bucket, key, value, revision=revision, after=after)

    def delete(self, bucket: str, key: str, *, after: NewRecord | None = None) -> Coroutine[Any, Any, None]:
        self._damaged.pop((bucket, key), None)
        if after is None and (joined := joining.get()) is not None:
            return joined.write(lambda after: self._store.delete(bucket, key, after=after))
        return self._store.delete(bucket, key, after=after)

    def list(self, bucket: str, *, before: str = "", limit: int) -> Coroutine[Any, Any, Sequence[Record]]:
        return self._store.list(bucket, before=before, limit=limit)

    def watch(self, bucket: str) -> AsyncIterator[Change]:
        return self._store.watch(bucket)

    @property
    def fault(self) -> str:
        return store_fault(self._store)

    # Values

    def decode(self, codec: Codec[T], bucket: str, record: Record) -> T:
        """OtherFormatVersion, UnreadableRecord; also for another key's value."""
        try:
            value = codec.decode_record(record)
        except UnreadableRecord as error:
            self._note(codec, bucket, record, error.message)
            raise
        if self._damaged:
            self._damaged.pop((bucket, record.key), None)
        return value

    def read(self, codec: Codec[T], bucket: str, record: Record) -> T | None:
        """None for a record that cannot be read: it is set aside."""
        try:
            return self.decode(codec, bucket, record)
        except UnreadableRecord:
            return None

    def _note(self, codec: Codec[Any], bucket: str, record: Record, why: str) -> None:
        known = self._damaged.get((bucket, record.key))
        if (known is not None and known.revision == record.revision) or len(self._damaged) >= DAMAGED_LIMIT:
            return
        self._damaged[bucket, record.key] = DamagedRecord(
            bucket=bucket,
            key=record.key,
            why=why,
            size_bytes=len(record.value),
            found_time_s=self._clock.now_s(),
            revision=record.revision,
            codec=codec,
        )
        log.error("unreadable_record_skipped", bucket=bucket, key=record.key, why=why)

    async def scan(self, buckets: Mapping[str, Codec[Any]]) -> None:
        """Read all records of buckets that nothing follows, so that damaged ones are known."""
        for bucket, codec in buckets.items():
            async with contextlib.aclosing(self._store.watch(bucket)) as changes:  # type: ignore[type-var]
                async for change in changes:
                    if isinstance(change, CaughtUp):
                        break
                    if not isinstance(change, Deleted):
                        self.read(codec, bucket, change)

    # What was set aside

    @property
    def damaged_counts(self) -> Mapping[str, int]:
        return Counter(bucket for bucket, _ in self._damaged)

    async def verify(self) -> None:
        """Forget those that were removed or mended meanwhile, also by another gateway."""
        for each in list(self._damaged.values()):
            with contextlib.suppress(NotFound):
                await self.damaged(each.bucket, each.key)

    async def damaged_page(self, *, before: str, limit: int) -> Sequence[DamagedRecord]:
        """By name, the greatest first; only names less than `before`, where given."""
        await self.verify()
        found = sorted(self._damaged.values(), key=lambda each: each.name, reverse=True)
        return [each for each in found if not before or each.name < before][:limit]

    async def damaged(self, bucket: str, key: str) -> tuple[DamagedRecord, bytes]:
        """It, and the first bytes of its value. NotFound where there is none, or where it can be read."""
        known = self._damaged.get((bucket, key))
        record = await self._store.get(bucket, key) if known else None
        if known is None or record is None or self.read(known.codec, bucket, record) is not None:
            self._damaged.pop((bucket, key), None)
            raise NotFound("there is no such damaged record", field="name")
        return self._damaged.get((bucket, key), known), record.value[:SHOWN_LIMIT_BYTES]

    async def remove_damaged(self, bucket: str, key: str) -> DamagedRecord:
        """Delete it from the store. NotFound where there is none, or where it can be read."""
        damaged, _ = await self.damaged(bucket, key)
        await self.delete(bucket, key)
        log.warning("damaged_record_removed", bucket=bucket, key=key, why=damaged.why)
        return damaged
