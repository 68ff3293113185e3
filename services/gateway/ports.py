"""The gateway's ports: what it needs of the outside, as Protocols. Each has one conformance suite in tests/contract."""

import dataclasses
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

from services.gateway.domain.moderation import ContentVerdict
from services.kernel.blobs import BlobInfo


@dataclass(frozen=True, slots=True, kw_only=True)
class Seal:
    """With which data key a record is sealed."""

    tenant: str
    number: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """A small value under a key. `revision` grows with every change of the key."""

    key: str
    value: bytes
    revision: int
    # Why the value cannot be what was written; empty where the store knows no reason.
    fault: str = ""
    # How it is stored; None in clear.
    seal: Seal | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class NewRecord:
    """A record to be created."""

    bucket: str
    key: str
    value: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Deleted:
    key: str


@dataclass(frozen=True, slots=True)
class CaughtUp:
    """All records that existed when the watch began have been yielded."""


Change = Record | Deleted | CaughtUp


class RecordStore(Protocol):
    """Records in named buckets: jobs, workers, request ids, cached control images and more.

    A write is durable when it returns. There are no transactions over several records, except with `after`.
    """

    async def create(self, bucket: str, key: str, value: bytes, *, after: NewRecord | None = None) -> Record:
        """AlreadyExists where the key has a record.

        `after` is created before it, or together with it where the store can. AlreadyExists also where that record
        exists; then nothing is created.
        """
        ...

    async def get(self, bucket: str, key: str) -> Record | None: ...

    async def put(
        self, bucket: str, key: str, value: bytes, *, revision: int, after: NewRecord | None = None
    ) -> Record:
        """Compare-and-set: replace the record of that revision. Conflict where it has another one, or is gone.

        `after`: as in `create`.
        """
        ...

    async def delete(self, bucket: str, key: str, *, after: NewRecord | None = None) -> None:
        """No error where there is no record; `after` is created all the same."""
        ...

    async def list(self, bucket: str, *, before: str = "", limit: int) -> Sequence[Record]:
        """Records by key, the greatest first; only keys less than `before`, where given."""
        ...

    def watch(self, bucket: str) -> AsyncIterator[Change]:
        """All present records, then CaughtUp, then changes as they come; of several changes of one key possibly only
        the last. Ends when the store is closed."""
        ...


@runtime_checkable
class Transactional(Protocol):
    """A RecordStore that says whether a record and the one `after` it are written together or not at all."""

    @property
    def commits_together(self) -> bool: ...


def commits_together(store: object) -> bool:
    """False also for a store that does not say."""
    return isinstance(store, Transactional) and store.commits_together


@runtime_checkable
class SelfChecking(Protocol):
    """A store that notices when what it keeps is gone or cannot be written."""

    @property
    def fault(self) -> str:
        """One sentence; empty while it works. With a fault every call that needs what is gone raises Unavailable."""
        ...


@runtime_checkable
class WriteProbe(Protocol):
    """A BlobStore that can try whether it takes bytes."""

    async def probe(self) -> None:
        """Unavailable where it does not."""
        ...


def store_fault(store: object) -> str:
    """Empty also for a store that does not check itself."""
    return store.fault if isinstance(store, SelfChecking) else ""


class WebhookSender(Protocol):
    async def post(self, url: str, headers: Mapping[str, str], body: bytes) -> int:
        """The HTTP status that the target answered. Bounded in time.

        FailedPrecondition where it may not be called; Unavailable where it does not answer.
        """
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class JudgedImage:
    # The request's, or `outputs[0]`.
    field: str
    blob: BlobInfo
    # Empty where only the digest is sent.
    data: bytes = dataclasses.field(default=b"", repr=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """What the operator's moderation is asked about a request, or about a task's result."""

    # The same wherever the question is repeated.
    id: str
    tenant: str
    stage: str
    policy: str
    prompt: str = field(default="", repr=False)
    negative_prompt: str = field(default="", repr=False)
    images: tuple[JudgedImage, ...] = ()
    # `jobs/{id}` and the number of the task of a result; empty and 0 for a request.
    job: str = ""
    task: int = 0
    # The safety checker's word on a result.
    nsfw: bool | None = None


class ModerationHook(Protocol):
    async def judge(self, question: Question) -> ContentVerdict:
        """Unavailable without an answer; FailedPrecondition for one that is none. The caller bounds the time."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Upload:
    """Where to PUT a blob's bytes, and the headers to send along."""

    url: str = field(repr=False)
    headers: Mapping[str, str]


@runtime_checkable
class DirectTransfer(Protocol):
    """A BlobStore whose bytes can bypass the gateway, by presigned addresses."""

    async def prepare_upload(self, scope: str, digest: str, size_bytes: int) -> Upload | None:
        """None where the blob exists already. TooLarge."""
        ...

    async def prepare_read(self, scope: str, digest: str) -> str:
        """An address from which anyone can read the blob's bytes for a while. NotFound."""
        ...


@runtime_checkable
class Budgeted(Protocol):
    """A BlobStore that counts its bytes against a budget."""

    @property
    def used_bytes(self) -> int: ...

    def used_bytes_of(self, scope: str) -> int:
        """Of one scope. Other processes' writes are counted from their next start on."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Erased:
    """How many blobs of a scope are gone, and how many are still there."""

    blobs: int
    remaining: int
    # What the store keeps of deleted blobs, and what to do about it; empty for nothing.
    kept: str = ""


@runtime_checkable
class ScopeEraser(Protocol):
    """A BlobStore that can delete all blobs of a scope."""

    async def erase(self, scope: str) -> Erased: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class BlobSeals:
    """How many blobs a store has in clear, and by scope the numbers of the data keys that seal the others."""

    clear: int
    numbers: Mapping[str, frozenset[int]]


@runtime_checkable
class SealCounter(Protocol):
    async def count_seals(self) -> BlobSeals:
        """Looks at every blob."""
        ...


class KeyVault(Protocol):
    """Where wrapped data keys are stored, by name: apart from the data, so that a backup of that has no keys."""

    # For people: what to look at, and what to put back.
    place: str

    async def get(self, name: str) -> bytes | None:
        """Unavailable where it does not answer."""
        ...

    async def change(self, name: str, event: Callable[[bytes | None], bytes]) -> bytes:
        """Compare-and-set, retried: store what the event makes of what is there. Durable on return."""
        ...

    async def names(self) -> Sequence[str]: ...


class WrongKey(Exception):
    """No key of the operator's opens it, or it was changed. One sentence says which key is needed."""


class KeyWrapper(Protocol):
    """The operator's key, in a file or in a key management service (KMS): it wraps data keys and opens them again.

    `context` is authenticated with the secret; the same one opens it.
    """

    @property
    def current(self) -> str:
        """Names the key that wraps from now on."""
        ...

    async def wrap(self, secret: bytes, context: bytes) -> bytes:
        """With the current key. Unavailable where a service does not answer."""
        ...

    async def unwrap(self, wrapped_by: str, wrapped: bytes, context: bytes) -> bytes:
        """WrongKey; Unavailable where a service does not answer."""
        ...

    async def refresh(self) -> None:
        """Take in keys that the operator has added since. SettingsError where that cannot be read."""
        ...


class Clock(Protocol):
    def now_s(self) -> float:
        """Seconds since the epoch, for records."""
        ...

    def monotonic_s(self) -> float:
        """Seconds that never jump, for leases."""
        ...
