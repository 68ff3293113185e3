"""The bytes of sealed records and blobs: AES-256-GCM with a key for each of them, which derives from a data key.

A record is `head, ciphertext`; the head names tenant and data key in clear, and is authenticated with the record's
bucket and key. A blob is chunks of 64 KiB, each with its tag, and a footer; see `BlobSealer`. Knows no store.
"""

import contextlib
import hashlib
import hmac
import secrets
import struct
import zlib
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from fanlight.contract.names import named
from fanlight.errors import FailedPrecondition
from services.gateway.domain.data_keys import DataKey, TenantKeys
from services.gateway.ports import BlobSeals
from services.kernel.blobs import BlobInfo, media_type_of

# No JSON begins like this.
RECORD_MAGIC = b"\x00FLSR1\x00\x00"
BLOB_MAGIC = b"\x00FLSB1\x00\x00"
SALT_BYTES, TAG_BYTES = 24, 16
CHUNK_BYTES = 64 * 1024
STORED_CHUNK_BYTES = CHUNK_BYTES + TAG_BYTES
HEAD_BYTES = 16
# Each key seals one record, so that its nonce may be constant.
_RECORD_NONCE = bytes(12)
_FOOTER_NONCE = b"\x02" + bytes(11)
# Of a record: magic, key's number, length of the tenant's name.
_RECORD_HEAD = struct.Struct(">8sIB")
# Of a footer: magic, key's number, bytes of the blob, salt.
_FOOTER_HEAD = struct.Struct(f">8sIQ{SALT_BYTES}s")
_CHECKSUM = struct.Struct(">I")
FOOTER_BYTES = _FOOTER_HEAD.size + HEAD_BYTES + TAG_BYTES + _CHECKSUM.size


class UnreadableBlob(FailedPrecondition):
    """A sealed blob that was changed or truncated, or whose key is destroyed. Write it again."""

    reason = "UNREADABLE_BLOB"


class BrokenSeal(Exception):
    """Sealed bytes that are not what was sealed, or not with this key. One sentence says what is wrong."""


def _cipher(key: DataKey, purpose: bytes, salt: bytes) -> AESGCM:
    """HMAC-SHA256 as the key derivation: the data key is random and of full length."""
    return AESGCM(hmac.digest(key.secret, purpose + salt, hashlib.sha256))


# Records


@dataclass(frozen=True, slots=True)
class SealedRecord:
    tenant: str
    number: int
    head: bytes
    body: bytes


def is_sealed_record(value: bytes) -> bool:
    return value.startswith(RECORD_MAGIC)


def seal_record(keys: TenantKeys, bucket: str, key: str, value: bytes) -> bytes:
    tenant, salt = keys.tenant.encode(), secrets.token_bytes(SALT_BYTES)
    head = _RECORD_HEAD.pack(RECORD_MAGIC, keys.current, len(tenant)) + tenant + salt
    cipher = _cipher(keys.newest, b"fanlight record", salt)
    return head + cipher.encrypt(_RECORD_NONCE, value, _record_name(head, bucket, key))


def parse_record(value: bytes) -> SealedRecord:
    """BrokenSeal for one that is too short."""
    try:
        _, number, length = _RECORD_HEAD.unpack_from(value)
        start = _RECORD_HEAD.size + length
        tenant = value[_RECORD_HEAD.size : start].decode()
    except (struct.error, UnicodeDecodeError) as error:
        raise BrokenSeal("its seal is damaged") from error
    start += SALT_BYTES
    if len(value) < start + TAG_BYTES:
        raise BrokenSeal("it is sealed, and truncated")
    return SealedRecord(tenant=tenant, number=number, head=value[:start], body=value[start:])


def open_record(keys: TenantKeys, bucket: str, key: str, sealed: SealedRecord) -> bytes:
    """BrokenSeal."""
    data_key = keys.by_number.get(sealed.number)
    if data_key is None:
        raise BrokenSeal(f"it is sealed with key {sealed.number} of the tenant {sealed.tenant}, which is destroyed")
    cipher = _cipher(data_key, b"fanlight record", sealed.head[-SALT_BYTES:])
    try:
        return cipher.decrypt(_RECORD_NONCE, sealed.body, _record_name(sealed.head, bucket, key))
    except InvalidTag as error:
        raise BrokenSeal("it is sealed, and was changed or belongs to another key or place") from error


def _record_name(head: bytes, bucket: str, key: str) -> bytes:
    return head + bucket.encode() + b"\0" + key.encode()


# Blobs


def stored_bytes_of(size_bytes: int) -> int:
    """How many bytes a blob of that size takes when it is sealed."""
    return size_bytes + -(-size_bytes // CHUNK_BYTES) * TAG_BYTES + FOOTER_BYTES


@dataclass(frozen=True, slots=True)
class Footer:
    """The last bytes of a sealed blob, not yet authenticated."""

    number: int
    size_bytes: int
    salt: bytes
    head: bytes
    sealed_head: bytes


def parse_footer(tail: bytes, stored_bytes: int) -> Footer | None:
    """None for a blob in clear. BrokenSeal for a sealed one that was cut or extended."""
    tail = tail[-FOOTER_BYTES:]
    if len(tail) < FOOTER_BYTES or not tail.startswith(BLOB_MAGIC):
        return None
    _, number, size_bytes, salt = _FOOTER_HEAD.unpack_from(tail)
    if stored_bytes_of(size_bytes) != stored_bytes:
        raise BrokenSeal("it is sealed, and its size is not what was sealed")
    head = tail[: _FOOTER_HEAD.size]
    return Footer(number, size_bytes, salt, head, tail[_FOOTER_HEAD.size : -_CHECKSUM.size])


class BlobOpener:
    """Opens chunks of one sealed blob."""

    def __init__(self, keys: TenantKeys, footer: Footer, scope: str, digest: str) -> None:
        """BrokenSeal where it is not that blob."""
        key = keys.by_number.get(footer.number)
        if key is None:
            raise BrokenSeal(f"it is sealed with key {footer.number} of the tenant {scope}, which is destroyed")
        self._cipher = _cipher(key, b"fanlight blob", footer.salt)
        try:
            head = self._cipher.decrypt(_FOOTER_NONCE, footer.sealed_head, _blob_name(footer.head, scope, digest))
        except InvalidTag as error:
            raise BrokenSeal("it is sealed, and its footer was changed or belongs to another blob") from error
        self._chunks = -(-footer.size_bytes // CHUNK_BYTES)
        self.info = BlobInfo(
            scope=scope,
            digest=digest,
            size_bytes=footer.size_bytes,
            media_type=media_type_of(head[: min(HEAD_BYTES, footer.size_bytes)]),
        )

    def open(self, index: int, sealed: bytes | memoryview) -> bytes:
        """The chunk of that index. BrokenSeal."""
        try:
            return self._cipher.decrypt(_chunk_nonce(index, is_last=index + 1 == self._chunks), sealed, None)
        except InvalidTag as error:
            raise BrokenSeal(f"it is sealed, and its chunk {index} was changed") from error


class BlobSealer:
    """Seals one blob as its bytes come. Any thread may call it, one at a time.

    Each chunk's nonce has its index and whether it is the last one. The footer names the data key and the blob's size,
    and seals its first bytes with scope and digest as associated data; that the key is this blob's alone binds the
    chunks to it. A checksum at the end lets a start after a power cut find lost bytes without any key.
    """

    def __init__(self, keys: TenantKeys) -> None:
        self._keys = keys
        self._salt = secrets.token_bytes(SALT_BYTES)
        self._cipher = _cipher(keys.newest, b"fanlight blob", self._salt)
        self._waiting = bytearray()
        self._index, self._size_bytes, self._checksum = 0, 0, 0
        self._hash = hashlib.sha256()
        self._head = b""

    def take(self, chunk: bytes) -> Sequence[bytes]:
        """Sealed chunks that are complete; the last one waits for `finish`."""
        self._hash.update(chunk)
        self._size_bytes += len(chunk)
        if len(self._head) < HEAD_BYTES:
            self._head = (self._head + chunk[:HEAD_BYTES])[:HEAD_BYTES]
        sealed, rest = [], memoryview(chunk)
        if self._waiting:
            missing = CHUNK_BYTES - len(self._waiting)
            self._waiting += rest[:missing]
            rest = rest[missing:]
            if not rest:
                return []
            sealed.append(self._seal(self._waiting, is_last=False))
            self._waiting = bytearray()
        while len(rest) > CHUNK_BYTES:
            sealed.append(self._seal(rest[:CHUNK_BYTES], is_last=False))
            rest = rest[CHUNK_BYTES:]
        self._waiting += rest
        return sealed

    def _seal(self, chunk: memoryview | bytearray, *, is_last: bool) -> bytes:
        sealed = self._cipher.encrypt(_chunk_nonce(self._index, is_last=is_last), chunk, None)
        self._index += 1
        self._checksum = zlib.crc32(sealed, self._checksum)
        return sealed

    def finish(self, scope: str) -> tuple[BlobInfo, Sequence[bytes]]:
        """What the blob is, and its last sealed bytes."""
        info = BlobInfo(
            scope=scope,
            digest=named(self._hash.hexdigest()),
            size_bytes=self._size_bytes,
            media_type=media_type_of(self._head),
        )
        last = [self._seal(self._waiting, is_last=True)] if self._waiting else []
        head = _FOOTER_HEAD.pack(BLOB_MAGIC, self._keys.current, self._size_bytes, self._salt)
        sealed_head = self._cipher.encrypt(
            _FOOTER_NONCE, self._head.ljust(HEAD_BYTES, b"\0"), _blob_name(head, scope, info.digest)
        )
        footer = head + sealed_head
        footer += _CHECKSUM.pack(zlib.crc32(footer, self._checksum))
        return info, [*last, footer]

    def keeps(self, scope: str, digest: str, tail: bytes, stored_bytes: int) -> bool:
        """Whether a blob of that name that exists already may stay: it is sealed and can be read."""
        try:
            footer = parse_footer(tail, stored_bytes)
            return footer is not None and BlobOpener(self._keys, footer, scope, digest).info.digest == digest
        except BrokenSeal:
            return False


def _chunk_nonce(index: int, *, is_last: bool) -> bytes:
    return (b"\x01" if is_last else b"\x00") + bytes(3) + index.to_bytes(8)


def _blob_name(head: bytes, scope: str, digest: str) -> bytes:
    return head + scope.encode() + b"\0" + digest.encode()


class Tail(Protocol):
    @property
    def stored_bytes(self) -> int: ...

    @property
    def data(self) -> bytes: ...


def count_seals(tails: Iterable[tuple[str, Tail]]) -> BlobSeals:
    """`tails`: of blobs, with their scopes. One that was cut counts as sealed with no key."""
    clear, numbers = 0, defaultdict[str, set[int]](set)
    for scope, tail in tails:
        with contextlib.suppress(BrokenSeal):
            footer = parse_footer(tail.data, tail.stored_bytes)
            if footer is None:
                clear += 1
            else:
                numbers[scope].add(footer.number)
    return BlobSeals(clear=clear, numbers={scope: frozenset(found) for scope, found in numbers.items()})


def is_whole(parts: Iterator[bytes], tail: bytes) -> bool | None:
    """Whether a sealed file's bytes have their checksum; None for one that is not sealed. Needs no key."""
    if not tail[-FOOTER_BYTES:].startswith(BLOB_MAGIC) or len(tail) < FOOTER_BYTES:
        return None
    checksum, held = 0, b""
    for part in parts:
        held += part
        checksum = zlib.crc32(held[: -_CHECKSUM.size], checksum)
        held = held[-_CHECKSUM.size :]
    return held == _CHECKSUM.pack(checksum)
