"""What the gateway needs of the world, in its own words. Each port has one conformance suite in tests/contract."""

from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """A small value under a key. `revision` grows with every change of the key."""

    key: str
    value: bytes
    revision: int


@dataclass(frozen=True, slots=True, kw_only=True)
class New:
    """A record that is not there yet."""

    bucket: str
    key: str
    value: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Deleted:
    key: str


@dataclass(frozen=True, slots=True)
class CaughtUp:
    """All records that were there when the watch began have been told."""


Change = Record | Deleted | CaughtUp


class JobStore(Protocol):
    """Jobs, worker records, request ids and cached control images: records in named buckets.

    A write is durable when it returns. There are no transactions over several records, but for what `create` says.
    """

    async def create(self, bucket: str, key: str, value: bytes, *, after: New | None = None) -> Record:
        """AlreadyExists when the key has a record.

        `after` is created before it, or together with it where the store can; where that is there already,
        AlreadyExists, and nothing is created.
        """
        ...

    async def get(self, bucket: str, key: str) -> Record | None: ...

    async def put(self, bucket: str, key: str, value: bytes, *, revision: int) -> Record:
        """Replace the record of that revision; Conflict when it is another one, or gone."""
        ...

    async def delete(self, bucket: str, key: str) -> None:
        """No error where there is none."""
        ...

    async def list(self, bucket: str, *, before: str = "", limit: int) -> Sequence[Record]:
        """Records by key, the greatest first, only keys less than `before` where one is given."""
        ...

    def watch(self, bucket: str) -> AsyncIterator[Change]:
        """All present records, then CaughtUp, then changes as they come; of several changes of one key
        perhaps only the last. Ends when the store is closed."""
        ...


class WebhookSender(Protocol):
    async def post(self, url: str, headers: Mapping[str, str], body: bytes) -> int:
        """What the target answered, as a status of HTTP. Bounded in time.

        FailedPrecondition when it may not be called; Unavailable when it does not answer.
        """
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Upload:
    """Where to PUT a blob's bytes, and the headers to send along."""

    url: str = field(repr=False)
    headers: Mapping[str, str]


@runtime_checkable
class Bypass(Protocol):
    """A BlobStore that takes and gives bytes past the gateway."""

    async def prepare_upload(self, scope: str, digest: str, size_bytes: int) -> Upload | None:
        """None where the blob is there already. TooLarge."""
        ...

    async def prepare_read(self, scope: str, digest: str) -> str:
        """An address from which anyone gets the blob's bytes for a while. NotFound."""
        ...


@runtime_checkable
class Budgeted(Protocol):
    """A BlobStore that counts its bytes against a budget."""

    @property
    def used_bytes(self) -> int: ...


class Clock(Protocol):
    def now_s(self) -> float:
        """Seconds since the epoch, for records."""
        ...

    def monotonic_s(self) -> float:
        """Seconds that never jump, for leases."""
        ...
