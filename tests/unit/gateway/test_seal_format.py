"""Sealed bytes: only what was sealed, under its own name, comes out of them again."""

import pytest

from fanlight.contract.names import digest_of
from services.gateway.adapters.seal_format import (
    CHUNK_BYTES,
    FOOTER_BYTES,
    STORED_CHUNK_BYTES,
    BlobOpener,
    BlobSealer,
    BrokenSeal,
    is_whole,
    open_record,
    parse_footer,
    parse_record,
    seal_record,
    stored_bytes_of,
)
from services.gateway.domain.data_keys import DataKey, TenantKeys

KEYS = TenantKeys(tenant="acme", current=1, by_number={1: DataKey(number=1, secret=bytes(range(32)))})
OTHERS = TenantKeys(tenant="acme", current=1, by_number={1: DataKey(number=1, secret=bytes(range(1, 33)))})


def sealed_blob(data: bytes, scope: str = "acme", piece: int = 50_000) -> bytes:
    sealer = BlobSealer(KEYS)
    parts = [part for start in range(0, len(data), piece) for part in sealer.take(data[start : start + piece])]
    info, last = sealer.finish(scope)
    assert info.digest == digest_of(data)
    return b"".join([*parts, *last])


def opened_blob(stored: bytes, digest: str, keys: TenantKeys = KEYS, scope: str = "acme") -> bytes:
    footer = parse_footer(stored[-FOOTER_BYTES:], len(stored))
    assert footer is not None
    opener = BlobOpener(keys, footer, scope, digest)
    chunks = stored[:-FOOTER_BYTES]
    starts = range(0, len(chunks), STORED_CHUNK_BYTES)
    return b"".join(
        opener.open(index, chunks[start : start + STORED_CHUNK_BYTES]) for index, start in enumerate(starts)
    )


def test_a_record_comes_back_and_shows_nothing_of_its_value():
    sealed = seal_record(KEYS, "jobs", "a", b"a red teapot" * 10)
    assert b"teapot" not in sealed
    assert parse_record(sealed).tenant == "acme"
    assert open_record(KEYS, "jobs", "a", parse_record(sealed)) == b"a red teapot" * 10


def test_no_changed_byte_of_a_record_opens():
    sealed = seal_record(KEYS, "jobs", "a", b"value")
    for place in range(8, len(sealed)):
        changed = bytearray(sealed)
        changed[place] ^= 1
        with pytest.raises(BrokenSeal):
            open_record(KEYS, "jobs", "a", parse_record(bytes(changed)))


def test_no_truncated_record_opens():
    sealed = seal_record(KEYS, "jobs", "a", b"value")
    for length in range(8, len(sealed)):
        with pytest.raises(BrokenSeal):
            open_record(KEYS, "jobs", "a", parse_record(sealed[:length]))


@pytest.mark.parametrize(
    ("bucket", "key", "keys"), [("jobs", "b", KEYS), ("letters", "a", KEYS), ("jobs", "a", OTHERS)]
)
def test_a_record_opens_in_its_own_place_with_its_own_key_only(bucket, key, keys):
    sealed = parse_record(seal_record(KEYS, "jobs", "a", b"value"))
    with pytest.raises(BrokenSeal):
        open_record(keys, bucket, key, sealed)


def test_the_same_record_is_never_sealed_the_same():
    assert seal_record(KEYS, "jobs", "a", b"value") != seal_record(KEYS, "jobs", "a", b"value")


@pytest.mark.parametrize("size", [0, 1, 15, 16, CHUNK_BYTES - 1, CHUNK_BYTES, CHUNK_BYTES + 1, 3 * CHUNK_BYTES])
def test_a_blob_of_any_size_comes_back(size):
    data = bytes(range(251)) * (size // 251 + 1)
    data = data[:size]
    for piece in (1_000, CHUNK_BYTES, 200_000):
        stored = sealed_blob(data, piece=piece)
        assert len(stored) == stored_bytes_of(size)
        assert opened_blob(stored, digest_of(data)) == data


def test_no_changed_byte_of_a_blob_opens_but_its_checksum():
    data = b"pixels" * 20
    stored = sealed_blob(data)
    for place in range(len(stored) - 4):
        changed = bytearray(stored)
        changed[place] ^= 1
        if not bytes(changed[-FOOTER_BYTES:]).startswith(stored[-FOOTER_BYTES:][:8]):
            continue
        with pytest.raises(BrokenSeal):
            opened_blob(bytes(changed), digest_of(data))


def test_no_truncated_or_extended_blob_opens():
    data = b"pixels" * 30_000
    stored = sealed_blob(data)
    footer = stored[-FOOTER_BYTES:]
    for wrong in (stored[:STORED_CHUNK_BYTES] + footer, stored[1:], b"x" + stored, footer):
        with pytest.raises(BrokenSeal):
            opened_blob(wrong, digest_of(data))


def test_chunks_cannot_change_places_nor_come_from_another_blob():
    data = bytes(3 * CHUNK_BYTES)
    stored, other = sealed_blob(data), sealed_blob(data)
    first, second = stored[:STORED_CHUNK_BYTES], stored[STORED_CHUNK_BYTES : 2 * STORED_CHUNK_BYTES]
    for begin in (second + first, other[:STORED_CHUNK_BYTES] + second):
        with pytest.raises(BrokenSeal):
            opened_blob(begin + stored[2 * STORED_CHUNK_BYTES :], digest_of(data))


@pytest.mark.parametrize(("scope", "digest"), [("other", digest_of(b"data")), ("acme", digest_of(b"else"))])
def test_a_blob_opens_under_its_own_name_only(scope, digest):
    with pytest.raises(BrokenSeal, match="footer"):
        opened_blob(sealed_blob(b"data"), digest, scope=scope)


def test_lost_bytes_are_found_without_a_key():
    stored = sealed_blob(b"pixels" * 20_000)
    tail = stored[-FOOTER_BYTES:]

    def parts(data):
        return iter([data[start : start + 1_000] for start in range(0, len(data), 1_000)])

    assert is_whole(parts(stored), tail) is True
    assert is_whole(parts(bytes(4096) + stored[4096:]), tail) is False
    assert is_whole(parts(b"clear" * 100), b"clear" * 100) is None
