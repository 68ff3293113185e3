"""One bucket of records in one JetStream stream, laid out as NATS' own key-value stores are. Knows no job.

The revision of a record is its message's sequence in the stream. All reads are the stream leader's.
"""

import asyncio
import bisect
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import contextmanager

import nats.errors
import nats.js.errors
from nats.aio.client import Client
from nats.js import JetStreamContext
from nats.js.api import Header

from fanlight.errors import AlreadyExists, Conflict, TooLarge, Unavailable
from services.gateway.adapters.nats_feed import TROUBLES, Feed, Message
from services.gateway.adapters.nats_keys import key_of, packed, token_of, unpacked
from services.gateway.ports import CaughtUp, Change, Deleted, Record

RETRY_AFTER_S = 2.0
# How long the mark of a deletion stays for those who could not hear of it.
DELETION_TOLD_S = 3_600
READS_AT_A_TIME = 32
CREATE_ROUNDS = 5

_OPERATION = "KV-Operation"
_GONE = frozenset({"DEL", "PURGE"})
_WRONG_SEQUENCE = (10071, 10164)


class Bucket:
    def __init__(self, connection: Client, jetstream: JetStreamContext, name: str) -> None:
        self._connection = connection
        self._jetstream = jetstream
        self._stream = f"KV_{name}"
        self._prefix = f"$KV.{name}."
        self._keys = Keys()
        self._following: asyncio.Task[None] | None = None
        self._feeds: list[Feed] = []

    async def create(self, key: str, value: bytes) -> Record:
        last = 0
        for _ in range(CREATE_ROUNDS):
            try:
                return await self._write(key, value, last)
            except Conflict:
                present = await self._message(key)
                if present is not None and not _is_gone(present):
                    raise AlreadyExists(f"{key} exists") from None
                last = present.sequence if present else 0
        raise Unavailable("the record changes too often", retry_after_s=RETRY_AFTER_S)

    async def put(self, key: str, value: bytes, revision: int) -> Record:
        return await self._write(key, value, revision)

    async def _write(self, key: str, value: bytes, last: int) -> Record:
        headers = {Header.EXPECTED_LAST_SUBJECT_SEQUENCE.value: str(last)}
        revision = await self._publish(key, packed(value), headers)
        self._keys.note(key, revision, gone=False)
        return Record(key=key, value=value, revision=revision)

    async def delete(self, key: str) -> None:
        present = await self._message(key)
        if present is not None and not _is_gone(present):
            headers = {_OPERATION: "DEL", Header.MSG_TTL.value: str(DELETION_TOLD_S)}
            self._keys.note(key, await self._publish(key, b"", headers), gone=True)

    async def _publish(self, key: str, data: bytes, headers: dict[str, str]) -> int:
        with self._our_errors():
            answer = await self._jetstream.publish(self._prefix + token_of(key), data, headers=headers)
        return answer.seq

    async def get(self, key: str) -> Record | None:
        message = await self._message(key)
        return None if message is None or _is_gone(message) else self._record(message)

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
        caught_up = False
        feed = self._feed(headers_only=False)
        async for message in feed.follow():
            if message is None:
                caught_up = True
                yield CaughtUp()
            elif not _is_gone(message):
                yield self._record(message)
            elif caught_up:
                yield Deleted(key=self._key(message))

    async def _follow_keys(self) -> None:
        """From the first time on, know which keys there are."""
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
            else:
                self._keys.note(self._key(message), message.sequence, gone=_is_gone(message))

    def _feed(self, *, headers_only: bool) -> Feed:
        feed = Feed(self._connection, self._jetstream, self._stream, headers_only=headers_only)
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
        """NotFoundError passes; for the caller it is no error."""
        if not self._connection.is_connected:
            raise Unavailable("the store is away", retry_after_s=RETRY_AFTER_S)
        try:
            yield
        except nats.js.errors.NotFoundError:
            raise
        except nats.errors.MaxPayloadError as error:
            raise TooLarge("a record is larger than the store takes") from error
        except nats.js.errors.APIError as error:
            if error.err_code in _WRONG_SEQUENCE:
                raise Conflict("the record has changed") from error
            raise Unavailable(f"the store refuses: {error.description}", retry_after_s=RETRY_AFTER_S) from error
        except TROUBLES as error:
            raise Unavailable("the store does not answer", retry_after_s=RETRY_AFTER_S) from error


class Keys:
    """Which keys a bucket has, in order. What is told late, or twice, changes nothing."""

    def __init__(self) -> None:
        self.caught_up = asyncio.Event()
        self._revisions: dict[str, int] = {}
        self._present: list[str] = []

    def note(self, key: str, revision: int, *, gone: bool) -> None:
        if revision <= self._revisions.get(key, 0):
            return
        place = bisect.bisect_left(self._present, key)
        is_there = place < len(self._present) and self._present[place] == key
        if gone and is_there:
            del self._present[place]
        elif not gone and not is_there:
            self._present.insert(place, key)
        self._revisions[key] = revision

    def before(self, key: str, limit: int) -> list[str]:
        """The greatest ones that are less than the key, the greatest first; an empty key is above all."""
        end = bisect.bisect_left(self._present, key) if key else len(self._present)
        return self._present[max(0, end - limit) : end][::-1]


def _is_gone(message: Message) -> bool:
    return message.headers.get(_OPERATION) in _GONE
