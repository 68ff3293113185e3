import pytest

from services.weights.store.fetching import POLL_S, DownloadWatcher
from services.weights.transfer.download import DownloadProgress
from services.weights.transfer.partial import PartialFile

ASKED = DownloadProgress(reference="it", path="m", done_bytes=0, total_bytes=0, bytes_per_s=0.0, source="")


@pytest.fixture
def watcher(tmp_path):
    return DownloadWatcher(tmp_path, "key", ASKED)


def test_before_the_download_has_begun_nothing_is_known(watcher):
    assert watcher.poll(0.0) is None


def test_what_has_come_since_the_last_look_is_seen_with_its_rate(watcher, tmp_path):
    part = PartialFile(tmp_path, "key", size=1000, identity="v1")
    part.write(0, bytes(300))
    first = watcher.poll(0.0)
    assert (first.done_bytes, first.total_bytes, first.bytes_per_s) == (300, 1000, 0.0)
    part.write(500, bytes(200))
    later = watcher.poll(2.0)
    assert (later.reference, later.path, later.done_bytes, later.bytes_per_s) == ("it", "m", 500, 100.0)
    assert later.seconds_left == 5.0


def test_a_download_that_restarts_is_watched_from_its_beginning(watcher, tmp_path):
    part = PartialFile(tmp_path, "key", size=1000, identity="v1")
    part.write(0, bytes(900))
    part.write(900, bytes(50))
    watcher.poll(0.0)
    part.restart()
    part.write(0, bytes(10))
    assert watcher.poll(1.0).done_bytes == 10


def test_a_record_that_is_not_whole_yet_is_read_later(watcher, tmp_path):
    part = PartialFile(tmp_path, "key", size=1000, identity="v1")
    part.write(0, bytes(100))
    journal = tmp_path / "key.map"
    whole = journal.read_bytes()
    journal.write_bytes(whole[:-3])
    assert watcher.poll(0.0).done_bytes == 0
    journal.write_bytes(whole)
    assert watcher.poll(1.0).done_bytes == 100


@pytest.mark.parametrize("head", [b"\x00\x01\n", b"7\n", b"{}\n", b'{"size": "x"}\n'])
def test_a_journal_that_says_nothing_sensible_is_nothing_known(head, watcher, tmp_path):
    (tmp_path / "key.map").write_bytes(head)
    assert watcher.poll(0.0) is None


def test_it_is_time_to_look_now_and_then(watcher):
    assert [watcher.is_due(at * POLL_S) for at in (0, 0.5, 1, 1.5, 2)] == [True, False, True, False, True]
