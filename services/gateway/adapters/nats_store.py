"""The RecordStore in NATS JetStream: replicated by Raft, shared by any number of gateways.

A server acknowledges what it has written to its page cache. With one replica, a write survives a power cut only if the
server's own settings say `sync_interval: always`. With three replicas, two machines have the write.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from datetime import datetime
from pathlib import Path

import nats
import nats.errors
import nats.js.errors
from nats.aio.client import Client
from nats.js.api import DiscardPolicy, StorageType, StreamConfig

from fanlight.errors import Unavailable
from services.gateway.adapters.nats_bucket import LOST, RETRY_AFTER_S, NatsBucket
from services.gateway.adapters.nats_feed import CONNECTION_ERRORS, is_no_stream
from services.gateway.ports import Change, NewRecord, Record
from services.kernel.config import SettingsError
from services.kernel.logs import get_logger

log = get_logger()

CALL_LIMIT_S = 5.0
CONNECT_S = 5.0
RECONNECT_PAUSE_S = 0.5
_EXISTS_DIFFERENTLY = 10058


class NatsStore:
    """Made by `open_nats_store`. Its buckets are key-value stores of their own, created at first use."""

    def __init__(self, connection: Client, *, prefix: str, replicas: int) -> None:
        self._connection = connection
        self._jetstream = connection.jetstream(timeout=CALL_LIMIT_S)
        self._prefix = prefix
        self._replicas = replicas
        self._buckets: dict[str, NatsBucket] = {}
        self._making = asyncio.Lock()
        self._restoring: asyncio.Task[None] | None = None

    @property
    def fault(self) -> str:
        """Until lost buckets are made again, and everybody who watches them knows it."""
        return "" if all(bucket.is_settled for bucket in self._buckets.values()) else LOST

    def restore(self) -> None:
        """Look whether the buckets are still those that were opened, and make those again that are lost.

        Called at every sign of it, and after every reconnection.
        """
        if self._restoring is None or self._restoring.done():
            self._restoring = asyncio.create_task(self._restore())

    async def _restore(self) -> None:
        waiting = list(self._buckets.items())
        while waiting:
            name, bucket = waiting[-1]
            try:
                await self._restore_one(name, bucket)
                waiting.pop()
            except (Unavailable, *CONNECTION_ERRORS) as error:
                log.info("store_not_ready", bucket=name, message=str(error))
                await asyncio.sleep(RETRY_AFTER_S)

    async def _restore_one(self, name: str, bucket: NatsBucket) -> None:
        try:
            found = (await self._jetstream.stream_info(f"KV_{self._prefix}-{name}")).created
        except nats.js.errors.NotFoundError as error:
            if not is_no_stream(error):
                raise
            log.error("store_bucket_lost", bucket=name, advice="its records are gone; NATS needs a durable volume")
            bucket.created = None
            bucket.created = await self._make(f"{self._prefix}-{name}")
            log.warning("store_bucket_made_again", bucket=name)
        else:
            if found != bucket.created:
                log.error("store_bucket_replaced", bucket=name, advice="its records are gone, or older ones")
            bucket.created = found

    async def close(self) -> None:
        """End the watches; the connection is closed by its opener."""
        if self._restoring is not None:
            self._restoring.cancel()
            await asyncio.wait({self._restoring})
        for bucket in self._buckets.values():
            await bucket.close()

    async def create(self, bucket: str, key: str, value: bytes, *, after: NewRecord | None = None) -> Record:
        if after is not None:
            await self.create(after.bucket, after.key, after.value)
        return await (await self._bucket(bucket)).create(key, value)

    async def get(self, bucket: str, key: str) -> Record | None:
        return await (await self._bucket(bucket)).get(key)

    async def put(
        self, bucket: str, key: str, value: bytes, *, revision: int, after: NewRecord | None = None
    ) -> Record:
        if after is not None:
            await self.create(after.bucket, after.key, after.value)
        return await (await self._bucket(bucket)).put(key, value, revision)

    async def delete(self, bucket: str, key: str, *, after: NewRecord | None = None) -> None:
        if after is not None:
            await self.create(after.bucket, after.key, after.value)
        await (await self._bucket(bucket)).delete(key)

    async def list(self, bucket: str, *, before: str = "", limit: int) -> Sequence[Record]:
        return await (await self._bucket(bucket)).list(before, limit)

    async def watch(self, bucket: str) -> AsyncIterator[Change]:
        async for change in (await self._wait_for_bucket(bucket)).watch():
            yield change

    async def _wait_for_bucket(self, name: str) -> NatsBucket:
        """Retries until the servers agree on it, because a watch has no caller to report an error to."""
        while True:
            try:
                return await self._bucket(name)
            except Unavailable as error:
                log.info("store_not_ready", bucket=name, message=error.message)
                await asyncio.sleep(RETRY_AFTER_S)

    async def _bucket(self, name: str) -> NatsBucket:
        if name not in self._buckets:
            async with self._making:
                if name not in self._buckets:
                    whole = f"{self._prefix}-{name}"
                    created = await self._make(whole)
                    self._buckets[name] = NatsBucket(
                        self._connection, self._jetstream, whole, created=created, on_lost=self.restore
                    )
        return self._buckets[name]

    async def _make(self, name: str) -> datetime | None:
        """The stream of a bucket, as NATS' own key-value stores have it, with the configured number of replicas.

        Returns when it was created.
        """
        config = StreamConfig(
            name=f"KV_{name}",
            subjects=[f"$KV.{name}.>"],
            max_msgs_per_subject=1,
            allow_rollup_hdrs=True,
            allow_msg_ttl=True,
            allow_direct=False,
            deny_delete=True,
            discard=DiscardPolicy.NEW,
            storage=StorageType.FILE,
            num_replicas=self._replicas,
        )
        try:
            try:
                return (await self._jetstream.add_stream(config)).created
            except nats.js.errors.APIError as error:
                if error.err_code != _EXISTS_DIFFERENTLY:
                    raise
                return (await self._jetstream.update_stream(config)).created
        except nats.js.errors.APIError as error:
            raise Unavailable(f"the store refuses: {error.description}", retry_after_s=RETRY_AFTER_S) from error
        except CONNECTION_ERRORS as error:
            raise Unavailable("the store does not answer", retry_after_s=RETRY_AFTER_S) from error


@asynccontextmanager
async def open_nats_store(
    servers: Sequence[str], *, prefix: str = "fanlight", replicas: int = 1, credentials_file: Path | None = None
) -> AsyncIterator[NatsStore]:
    """The store of those servers, through any that answers. SettingsError if no server answers."""
    store: NatsStore | None = None

    async def reconnected() -> None:
        log.info("store_reconnected")
        if store is not None:
            store.restore()

    connection = await _connected(servers, credentials_file, reconnected)
    store = NatsStore(connection, prefix=prefix, replicas=replicas)
    if replicas == 1:
        log.warning("store_has_one_replica", advice="set FANLIGHT_GATEWAY_NATS_REPLICAS=3 on three servers")
    try:
        yield store
    finally:
        await store.close()
        await connection.close()


async def _connected(
    servers: Sequence[str], credentials_file: Path | None, reconnected: Callable[[], Awaitable[None]]
) -> Client:
    """A connection that reconnects forever once it was made."""
    try:
        async with asyncio.timeout(CONNECT_S * (1 + len(servers))):
            return await nats.connect(
                servers=list(servers),
                name="fanlight-gateway",
                connect_timeout=int(CONNECT_S),
                reconnect_time_wait=RECONNECT_PAUSE_S,
                max_reconnect_attempts=-1,
                ping_interval=5,
                max_outstanding_pings=2,
                user_credentials=str(credentials_file) if credentials_file else None,
                error_cb=_note,
                disconnected_cb=_note_disconnect,
                reconnected_cb=reconnected,
            )
    except CONNECTION_ERRORS as error:
        raise SettingsError(f"no NATS server answers at {', '.join(servers)}") from error


async def _note(error: Exception) -> None:
    log.info("store_error", why=type(error).__name__)


async def _note_disconnect() -> None:
    log.warning("store_disconnected")
