"""One bucket of records in one JetStream stream, in the layout of NATS' own key-value stores. Knows no job.

The revision of a record is its message's sequence in the stream. All reads go to the stream's leader. A key becomes a
subject's token; long values are compressed, because a message has at most a megabyte.
"""

import asyncio
import bisect
import zlib
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime

import nats.errors
import nats.js.errors
from nats.aio.client import Client
from nats.js import JetStreamContext
from nats.js.api import Header

from fanlight.errors import AlreadyExists, Conflict, TooLarge, Unavailable
from services.gateway.adapters.nats_feed import CONNECTION_ERRORS, Feed, Message, Replaced, is_no_stream
from services.gateway.ports import CaughtUp, Change, Deleted, Record

# The server's default `max_payload`, less room for headers.
VALUE_LIMIT_BYTES = 1024 * 1024 - 4096
COMPRESS_FROM_BYTES = 8 * 1024

_PLAIN, _ZLIB = b"\0", b"\1"
_SAFE = frozenset(b"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-_")


def token_of(key: str) -> str:
    """The key, with every byte that a subject's token cannot contain written as `=` and two hex digits."""
    return "".join(chr(byte) if byte in _SAFE else f"={byte:02x}" for byte in key.encode())


def key_of(token: str) -> str:
    first, *escaped = token.split("=")
    parts = [first.encode(), *(bytes.fromhex(part[:2]) + part[2:].encode() for part in escaped)]
    return b"".join(parts).decode()


def packed(value: bytes) -> bytes:
    """TooLarge if even the compressed value is more than the store accepts."""
    data = _PLAIN + value if len(value) < COMPRESS_FROM_BYTES else _ZLIB + zlib.compress(value, 1)
    if len(data) > VALUE_LIMIT_BYTES:
        raise TooLarge(f"a record has {len(data)} bytes; the store accepts {VALUE_LIMIT_BYTES}")
    return data


def unpacked(data: bytes) -> bytes:
    return zlib.decompress(data[1:]) if data[:1] == _ZLIB else data[1:]


RETRY_AFTER_S = 2.0
LOST = "the store has lost its records; its buckets are made again"
# How long a deletion marker stays for gateways that were disconnected.
DELETION_MARKER_S = 3_600
READS_AT_A_TIME = 32
CREATE_ROUNDS = 5

_OPERATION = "KV-Operation"
_DELETED = frozenset({"DEL", "PURGE"})
_WRONG_SEQUENCE = (10071, 10164)


class NatsBucket:
    def __init__(
        self,
        connection: Client,
        jetstream: JetStreamContext,
        name: str,
        *,
        created: datetime | None,
        on_lost: Callable[[], None],
    ) -> None:
        """`created`: when its stream was. `on_lost` is called whenever there seems to be no stream any more."""
        self._connection = connection
        self._jetstream = jetstream
        self._stream = f"KV_{name}"
        self._prefix = f"$KV.{name}."
        self._keys = BucketKeys()
        self._following: asyncio.Task[None] | None = None
        self._feeds: list[Feed] = []
        self._on_lost = on_lost
        # Of the stream as the store made or found it; None while it is lost.
        self.created = created

    @property
    def is_settled(self) -> bool:
        """Its stream exists, and all who follow it know that it is this one."""
        return self.created is not None and all(feed.created in (None, self.created) for feed in self._feeds)

    async def create(self, key: str, value: bytes) -> Record:
        last = 0
        for _ in range(CREATE_ROUNDS):
            try:
                return await self._write(key, value, last)
            except Conflict:
                present = await self._message(key)
                if present is not None and not _is_deleted(present):
                    raise AlreadyExists(f"{key} exists") from None
                last = present.sequence if present else 0
        raise Unavailable("the record changes too often", retry_after_s=RETRY_AFTER_S)

    async def put(self, key: str, value: bytes, revision: int) -> Record:
        return await self._write(key, value, revision)

    async def _write(self, key: str, value: bytes, last: int) -> Record:
        headers = {Header.EXPECTED_LAST_SUBJECT_SEQUENCE.value: str(last)}
        revision = await self._publish(key, packed(value), headers)
        self._keys.note(key, revision, deleted=False)
        return Record(key=key, value=value, revision=revision)

    async def delete(self, key: str) -> None:
        present = await self._message(key)
        if present is not None and not _is_deleted(present):
            headers = {_OPERATION: "DEL", Header.MSG_TTL.value: str(DELETION_MARKER_S)}
            self._keys.note(key, await self._publish(key, b"", headers), deleted=True)

    async def _publish(self, key: str, data: bytes, headers: dict[str, str]) -> int:
        with self._our_errors():
            answer = await self._jetstream.publish(self._prefix + token_of(key), data, headers=headers)
        return answer.seq

    async def get(self, key: str) -> Record | None:
        message = await self._message(key)
        return None if message is None or _is_deleted(message) else self._record(message)

    async def _message(self, key: str) -> Message | None:
        try:
            with self._our_errors():
                found = await self._jetstream.get_msg(self._stream, subject=self._prefix + token_of(key))
        except nats.js.errors.NotFoundError:
            return None
        assert found.subject is not None
        assert found.seq is not None
        headers = dict(found.headers or {})
        return Message(subject=found.subject, data=found.data or b"", sequence=found.seq, headers=headers)

    async def list(self, before: str, limit: int) -> Sequence[Record]:
        await self._follow_keys()
        found: list[Record] = []
        while len(found) < limit and (keys := self._keys.before(before, limit - len(found))):
            before = keys[-1]
            reads = [self.get(key) for key in keys]
            for start in range(0, len(reads), READS_AT_A_TIME):
                records = await asyncio.gather(*reads[start : start + READS_AT_A_TIME])
                found += [record for record in records if record is not None]
        return found

    async def watch(self) -> AsyncIterator[Change]:
        caught_up, present = False, set[str]()
        feed = self._feed(headers_only=False)
        try:
            async for message in feed.follow():
                if message is None:
                    caught_up = True
                    yield CaughtUp()
                elif isinstance(message, Replaced):
                    # Whoever watches must not go on as if these existed.
                    gone, present, caught_up = present, set(), False
                    for key in gone:
                        yield Deleted(key=key)
                elif not _is_deleted(message):
                    record = self._record(message)
                    present.add(record.key)
                    yield record
                elif caught_up:
                    present.discard(self._key(message))
                    yield Deleted(key=self._key(message))
        finally:
            feed.close()
            self._feeds.remove(feed)

    async def _follow_keys(self) -> None:
        """From the first call on, keep the list of keys up to date."""
        if self._following is None or self._following.done():
            self._following = asyncio.create_task(self._note_keys())
        caught_up = asyncio.create_task(self._keys.caught_up.wait())
        try:
            await asyncio.wait({caught_up}, timeout=RETRY_AFTER_S)
            if not self._keys.caught_up.is_set():
                raise Unavailable("the store's keys are still being read", retry_after_s=RETRY_AFTER_S)
        finally:
            caught_up.cancel()

    async def _note_keys(self) -> None:
        async for message in self._feed(headers_only=True).follow():
            if message is None:
                self._keys.caught_up.set()
            elif isinstance(message, Replaced):
                self._keys.clear()
            else:
                self._keys.note(self._key(message), message.sequence, deleted=_is_deleted(message))

    def _feed(self, *, headers_only: bool) -> Feed:
        feed = Feed(self._connection, self._jetstream, self._stream, on_lost=self._on_lost, headers_only=headers_only)
        self._feeds.append(feed)
        return feed

    async def close(self) -> None:
        for feed in self._feeds:
            feed.close()
        if self._following is not None:
            self._following.cancel()
            await asyncio.wait({self._following})

    def _key(self, message: Message) -> str:
        return key_of(message.subject.removeprefix(self._prefix))

    def _record(self, message: Message) -> Record:
        return Record(key=self._key(message), value=unpacked(message.data), revision=message.sequence)

    @contextmanager
    def _our_errors(self) -> Iterator[None]:
        """NotFoundError of a record passes; for the caller it is not an error."""
        if not self._connection.is_connected:
            raise Unavailable("the store is disconnected", retry_after_s=RETRY_AFTER_S)
        try:
            yield
        except nats.js.errors.NotFoundError as error:
            if not is_no_stream(error):
                raise
            self._on_lost()
            raise Unavailable(LOST, retry_after_s=RETRY_AFTER_S) from error
        except nats.js.errors.NoStreamResponseError as error:
            # None exists, or its servers are electing a leader; the store finds out.
            self._on_lost()
            raise Unavailable("the store does not answer", retry_after_s=RETRY_AFTER_S) from error
        except nats.errors.MaxPayloadError as error:
            raise TooLarge("a record is larger than the store accepts") from error
        except nats.js.errors.APIError as error:
            if error.err_code in _WRONG_SEQUENCE:
                raise Conflict("the record has changed") from error
            raise Unavailable(f"the store refuses: {error.description}", retry_after_s=RETRY_AFTER_S) from error
        except CONNECTION_ERRORS as error:
            raise Unavailable("the store does not answer", retry_after_s=RETRY_AFTER_S) from error


class BucketKeys:
    """Which keys a bucket has, in order. A late or repeated message changes nothing."""

    def __init__(self) -> None:
        self.caught_up = asyncio.Event()
        self._revisions: dict[str, int] = {}
        self._present: list[str] = []

    def clear(self) -> None:
        """Nothing is known of the keys any more."""
        self.caught_up.clear()
        self._revisions.clear()
        self._present.clear()

    def note(self, key: str, revision: int, *, deleted: bool) -> None:
        if revision <= self._revisions.get(key, 0):
            return
        index = bisect.bisect_left(self._present, key)
        is_there = index < len(self._present) and self._present[index] == key
        if deleted and is_there:
            del self._present[index]
        elif not deleted and not is_there:
            self._present.insert(index, key)
        self._revisions[key] = revision

    def before(self, key: str, limit: int) -> list[str]:
        """The greatest keys below the given one, the greatest first; an empty key is above all."""
        end = bisect.bisect_left(self._present, key) if key else len(self._present)
        return self._present[max(0, end - limit) : end][::-1]


def _is_deleted(message: Message) -> bool:
    return message.headers.get(_OPERATION) in _DELETED
