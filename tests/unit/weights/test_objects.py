import hashlib
import os

import pytest

from fanlight.errors import NotFound
from services.weights.errors import DiskFull
from services.weights.references.tensors import FileDigests
from services.weights.store.objects import Objects, try_lock
from tests.fakes.weight_sites import safetensors


@pytest.fixture
def clock():
    return [100.0]


@pytest.fixture
def objects(tmp_path, clock):
    return _open(tmp_path, clock)


def _open(folder, clock, budget_bytes=0):
    def tick():
        clock[0] += 1
        return clock[0]

    return Objects(folder, budget_bytes=budget_bytes, now_s=tick)


def _digested(body: bytes, *, is_safetensors: bool):
    digests = FileDigests(size_bytes=len(body), is_safetensors=is_safetensors)
    digests.update(body)
    return digests.finish()


def _add(objects, body: bytes, view: str = "", link: str = "m.bin") -> str:
    part = objects.parts / "x.part"
    part.write_bytes(body)
    sha = objects.publish(part, _digested(body, is_safetensors=False))
    if view:
        objects.link(view, [(link, sha)])
    return sha


def test_an_object_is_found_by_sha256_autov2_and_autov3(objects):
    body = safetensors({"a": b"12345678"})
    part = objects.parts / "x.part"
    part.write_bytes(body)
    sha = objects.publish(part, _digested(body, is_safetensors=True))
    autov3 = hashlib.sha256(b"12345678").hexdigest()
    assert [objects.index.find(name) for name in (sha, sha[:10].upper(), autov3)] == [sha] * 3


def test_the_least_recently_used_goes_first_and_its_links_go_with_it(tmp_path, clock):
    objects = _open(tmp_path, clock, budget_bytes=250)
    old, new = _add(objects, b"a" * 100, "me/old"), _add(objects, b"b" * 100, "me/new")
    objects.link("me/old", [("m.bin", old)])
    objects.reserve(100)
    assert not objects.path_of(new).exists()
    assert (objects.views / "me/old/m.bin").read_bytes() == b"a" * 100
    assert not (objects.views / "me/new/m.bin").is_symlink()


def test_what_is_pinned_or_in_use_is_never_evicted(tmp_path, clock):
    objects = _open(tmp_path, clock, budget_bytes=250)
    pinned, used = _add(objects, b"a" * 100, "me/a"), _add(objects, b"b" * 100, "me/b")
    objects.pin("me/a", True)
    with objects.using([used]) as is_whole:
        assert is_whole
        with pytest.raises(DiskFull, match="pinned or in use"):
            objects.reserve(100)
    assert objects.path_of(pinned).exists()
    assert objects.path_of(used).exists()
    objects.reserve(100)
    assert objects.path_of(pinned).exists()
    assert not objects.path_of(used).exists()


def test_a_user_learns_that_an_object_is_gone(objects):
    sha = _add(objects, b"a" * 100)
    objects.remove(sha)
    with objects.using([sha]) as is_whole:
        assert not is_whole


def test_a_damaged_object_is_found_and_removed(objects):
    good, bad = _add(objects, b"good", "me/good"), _add(objects, b"bad!", "me/bad")
    objects.path_of(bad).write_bytes(b"worse")
    assert objects.verify_all() == [bad]
    assert objects.path_of(good).exists()
    assert not (objects.views / "me/bad/m.bin").is_symlink()


def test_removing_a_model_keeps_what_another_has_too(objects):
    shared, own = _add(objects, b"shared", "me/a", "s"), _add(objects, b"own", "me/a", "o")
    objects.link("me/b", [("s", shared)])
    assert objects.remove_model("me/a") == 3
    assert objects.path_of(shared).exists()
    assert not objects.path_of(own).exists()
    assert not (objects.views / "me/a").exists()
    with pytest.raises(NotFound, match="me/a"):
        objects.remove_model("me/a")


def test_an_object_can_be_removed_by_its_digest_with_its_links(objects):
    sha = _add(objects, b"12345", "me/a")
    assert objects.remove_model(sha[:10]) == 5
    assert not (objects.views / "me/a/m.bin").is_symlink()


def test_garbage_collection_removes_objects_without_a_view_and_abandoned_downloads(objects):
    lost, kept = _add(objects, b"lost"), _add(objects, b"kept", "me/k")
    (objects.parts / "left.part").write_bytes(b"1" * 5000)
    assert objects.collect() >= 4
    assert not objects.path_of(lost).exists()
    assert objects.path_of(kept).exists()
    assert not list(objects.parts.iterdir())


def test_a_store_opened_again_believes_what_lies_on_the_disk(tmp_path, clock):
    objects = _open(tmp_path, clock)
    gone, kept = _add(objects, b"gone", "me/gone"), _add(objects, b"kept", "me/kept")
    objects.path_of(gone).unlink()
    for path in tmp_path.glob("index.sqlite-*"):
        os.unlink(path)
    again = _open(tmp_path, clock)
    assert [row.sha256 for row in again.index.objects()] == [kept]
    assert not (again.views / "me/gone/m.bin").is_symlink()


def test_a_link_is_exchanged_in_one_step(objects):
    one, two = _add(objects, b"one"), _add(objects, b"two")
    place = objects.link("me/m", [("w.bin", one)]) / "w.bin"
    objects.link("me/m", [("w.bin", two)])
    assert place.read_bytes() == b"two"
    assert [p.name for p in place.parent.iterdir()] == ["w.bin"]


def test_a_download_that_is_gone_when_abandoned_ones_are_dropped_does_no_harm(objects):
    # As one that another process ends between the two looks at it.
    (objects.parts / "ended.part").symlink_to("nowhere")
    (objects.parts / "left.part").write_bytes(b"1" * 5000)
    assert objects.collect() > 0
    assert not (objects.parts / "left.part").exists()
    fd = try_lock(objects.lock_of("fetch-ended"))
    assert fd is not None
    os.close(fd)
