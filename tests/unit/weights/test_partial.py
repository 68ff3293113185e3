import errno
import os
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.weights.references.manifest import ByteSpan
from services.weights.transfer.partial import PartialFile

SIZE = 1000
BODY = bytes(i % 251 for i in range(SIZE))
_SPANS = st.tuples(st.integers(0, SIZE), st.integers(0, SIZE)).map(lambda pair: ByteSpan(min(pair), max(pair)))


def _open(folder: Path, identity: str = "v1") -> PartialFile:
    return PartialFile(folder, "k", size=SIZE, identity=identity)


@settings(deadline=None)
@given(st.lists(st.tuples(_SPANS, st.booleans()), max_size=12), st.integers(0, 400))
def test_a_journal_cut_at_any_byte_never_promises_bytes_that_are_not_there(steps, cut_bytes):
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        part = _open(folder)
        for span, is_drop in steps:
            if is_drop:
                part.drop(span)
            else:
                part.write(span.begin, BODY[span.begin : span.end])
                part.note(span.begin, span.end)
        done = part.map.done
        part.close()
        journal = folder / "k.map"
        data = journal.read_bytes()
        journal.write_bytes(data[: max(0, len(data) - cut_bytes)])
        again = _open(folder)
        for span in again.map.done:
            assert again.read(span.begin, len(span)) == BODY[span.begin : span.end]
        if cut_bytes == 0:
            assert again.map.done == done
        again.write(0, BODY)
        again.note(0, SIZE)
        again.close()
        assert _open(folder).map.is_complete


def test_a_torn_record_is_left_out(tmp_path):
    part = _open(tmp_path)
    part.write(0, BODY[:100])
    part.write(100, BODY[100:200])
    part.close()
    journal = tmp_path / "k.map"
    data = bytearray(journal.read_bytes())
    data[-1] ^= 0xFF
    journal.write_bytes(data)
    assert _open(tmp_path).map.done == [ByteSpan(0, 100)]


def test_another_version_of_the_file_starts_again(tmp_path):
    part = _open(tmp_path)
    part.write(0, BODY[:100])
    part.close()
    assert _open(tmp_path, "v2").map.done_bytes == 0


def test_the_room_is_taken_before_the_first_byte(tmp_path):
    part = _open(tmp_path)
    assert part.path.stat().st_size == SIZE
    assert part.path.stat().st_blocks > 0


def test_a_disk_without_room_leaves_no_file_open(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "no space left")

    monkeypatch.setattr("services.weights.transfer.partial.os.posix_fallocate", full)
    before = os.listdir("/proc/self/fd")
    with pytest.raises(OSError, match="no space left"):
        _open(tmp_path)
    assert os.listdir("/proc/self/fd") == before
