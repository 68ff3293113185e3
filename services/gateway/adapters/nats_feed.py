"""The changes in one JetStream stream, followed across broken connections and lost consumers. Knows no job.

A pull consumer of its own without acknowledgements; after a lost message it is created again, from the last message
seen. The streams keep only the last message of a subject, so a feed that lags gets the last states only.
"""

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from datetime import datetime

import nats.errors
import nats.js.errors
from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.aio.subscription import Subscription
from nats.js import JetStreamContext
from nats.js.api import AckPolicy, ConsumerConfig, DeliverPolicy, Header

from services.kernel.logs import get_logger

log = get_logger()

BATCH = 256
PULL_S = 5.0
# A pull that gets no answer for this long beyond its own time is lost.
GRACE_S = 2.0
RETRY_PAUSE_S = 0.5
# How long the server keeps a consumer without pulls.
INACTIVE_S = 60.0

# The server's code for a stream that does not exist.
_NO_STREAM = 10059

CONNECTION_ERRORS = (nats.errors.Error, asyncio.TimeoutError, OSError)


def is_no_stream(error: BaseException) -> bool:
    """Whether the server said that the stream does not exist."""
    return isinstance(error, nats.js.errors.NotFoundError) and error.err_code == _NO_STREAM


class Replaced:
    """The stream is another one of the same name: nothing of the old one is in it."""


class _Missed(Exception):
    """Messages were lost between the server and here."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    subject: str
    data: bytes
    sequence: int
    headers: dict[str, str]


class Feed:
    """`follow` yields every message, and None once after those that existed at the beginning.

    Where the stream was lost and made again it yields Replaced, and begins anew.
    """

    def __init__(
        self,
        connection: Client,
        stream: JetStreamContext,
        name: str,
        *,
        on_lost: Callable[[], None],
        headers_only: bool = False,
    ) -> None:
        """`on_lost` is called when there is no such stream."""
        self._connection = connection
        self._jetstream = stream
        self._name = name
        self._headers_only = headers_only
        self._on_lost = on_lost
        # When the stream was created that it follows; None before it follows one.
        self.created: datetime | None = None
        self._last = 0
        self._caught_up = False
        self._closed = False

    def close(self) -> None:
        self._closed = True

    async def follow(self) -> AsyncIterator[Message | Replaced | None]:
        while not self._closed and not self._connection.is_closed:
            try:
                async for message in self._consume():
                    yield message
            except (_Missed, *CONNECTION_ERRORS) as error:
                if is_no_stream(error):
                    self._on_lost()
                log.info("store_feed_retried", stream=self._name, after=self._last, why=type(error).__name__)
                await asyncio.sleep(RETRY_PAUSE_S)

    async def _consume(self) -> AsyncIterator[Message | Replaced | None]:
        """Until messages are missed or the connection breaks."""
        inbox = self._connection.new_inbox()
        subscription = await self._connection.subscribe(inbox)
        try:
            info = await self._jetstream.add_consumer(self._name, config=self._config())
            # Asked after the consumer exists, which ends with its stream: they belong together.
            created = (await self._jetstream.stream_info(self._name)).created
            if self.created not in (None, created):
                self.created, self._last, self._caught_up = created, 0, False
                yield Replaced()
                raise _Missed
            self.created = created
            left = info.num_pending
            seen = 0
            while not self._closed:
                if not left and not self._caught_up:
                    self._caught_up = True
                    yield None
                before = seen
                async for message in self._pull(info.name, inbox, subscription):
                    seen += 1
                    if message.metadata.sequence.consumer != seen:
                        raise _Missed
                    self._last, left = message.metadata.sequence.stream, message.metadata.num_pending
                    yield _of(message)
                    if not left and not self._caught_up:
                        break
                if seen == before and not self._caught_up:
                    # A server whose replica of the stream lags announces what it does not have: ask another one.
                    raise _Missed
        finally:
            await _unsubscribe(subscription)

    def _config(self) -> ConsumerConfig:
        if self._last:
            start = {"deliver_policy": DeliverPolicy.BY_START_SEQUENCE, "opt_start_seq": self._last + 1}
        else:
            start = {"deliver_policy": DeliverPolicy.LAST_PER_SUBJECT}
        return ConsumerConfig(
            ack_policy=AckPolicy.NONE,
            headers_only=self._headers_only or None,
            inactive_threshold=INACTIVE_S,
            mem_storage=True,
            num_replicas=1,
            filter_subject=">",
            **start,  # type: ignore[arg-type]
        )

    async def _pull(self, consumer: str, inbox: str, subscription: Subscription) -> AsyncIterator[Msg]:
        """The messages of one request. _Missed if the server reports that the consumer is gone, or does not answer."""
        request = {"batch": BATCH, "expires": int(PULL_S * 1e9)}
        subject = f"$JS.API.CONSUMER.MSG.NEXT.{self._name}.{consumer}"
        await self._connection.publish(subject, json.dumps(request).encode(), reply=inbox)
        for _ in range(BATCH):
            message = await subscription.next_msg(timeout=PULL_S + GRACE_S)
            status = (message.headers or {}).get(Header.STATUS)
            if status is None:
                yield message
            elif status in ("404", "408"):
                return
            elif status != "100":
                raise _Missed


def _of(message: Msg) -> Message:
    return Message(
        subject=message.subject,
        data=message.data,
        sequence=message.metadata.sequence.stream,
        headers=dict(message.headers or {}),
    )


async def _unsubscribe(subscription: Subscription) -> None:
    try:
        await subscription.unsubscribe()
    except CONNECTION_ERRORS:
        return
