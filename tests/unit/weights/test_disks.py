"""Stores on disks that are full, read-only, another user's or failing: what is there is read, and room can be made."""

import asyncio
import errno
import multiprocessing
import os
import shutil
import sqlite3
import tempfile
import threading
from pathlib import Path

import pytest
import structlog
from typer.testing import CliRunner

from fanlight.errors import NodeFault, Unavailable
from services.weights.cli import app
from services.weights.errors import DiskFull, disk_errors
from services.weights.provision import Inventory, Provision
from services.weights.references.tensors import FileDigests
from services.weights.settings import WeightsSettings
from services.weights.store import index as index_module
from services.weights.store import objects as objects_module
from services.weights.store.index import INDEX_FILE, Index, held_models
from services.weights.store.objects import Objects
from tests.fakes.range_server import RangeServer
from tests.fakes.small_disks import fill, read_only, sqlite_error, tmpfs
from tests.fakes.weight_sites import put_repository, safetensors

BODY = safetensors({"a": b"12345678" * 1000})


def open_objects(folder):
    return Objects(folder, budget_bytes=0, now_s=lambda: 100.0)


def add(objects, body, view):
    part = objects.parts / "x.part"
    part.write_bytes(body)
    digests = FileDigests(size_bytes=len(body), is_safetensors=False)
    digests.update(body)
    sha = objects.publish(part, digests.finish())
    objects.link(view, [("m.bin", sha)])
    return sha


@pytest.fixture
def server(monkeypatch):
    with RangeServer() as server:
        monkeypatch.setenv("FANLIGHT_WEIGHTS_HF_ENDPOINT", server.url)
        put_repository(server, "org/repo", {"a.safetensors": BODY})
        yield server


@pytest.fixture
def run(monkeypatch):
    configure = structlog.configure
    monkeypatch.setattr(
        structlog, "configure", lambda **values: configure(**{**values, "cache_logger_on_first_use": False})
    )

    def run(folder, *words):
        monkeypatch.setenv("FANLIGHT_WEIGHTS_DIR", str(folder))
        return CliRunner().invoke(app, list(words))

    return run


def outputs(run, folder, *commands):
    results = [run(folder, *words) for words in commands]
    assert [(words, r.exit_code) for words, r in zip(commands, results, strict=True)] == [(w, 0) for w in commands], [
        result.output for result in results
    ]
    return [result.stdout for result in results]


FETCH = ("fetch", "hf:org/repo/a.safetensors")


def test_a_read_only_store_is_read(tmp_path, run, server):
    outputs(run, tmp_path / "full", FETCH)
    with read_only(tmp_path / "full", tmp_path / "there") as there:
        listed, verified, _ = outputs(run, there, ("ls",), ("verify",), FETCH)
        refused = run(there, "rm", "org/repo")
        pinned = run(there, "pin", "org/repo")
    assert "org/repo" in listed
    assert "intact" in verified
    assert (refused.exit_code, pinned.exit_code) == (1, 1)
    assert f"{there}/index.sqlite cannot be written" in pinned.output
    assert f"the disk is read-only in {there}" in refused.output


def test_a_store_on_a_full_disk_is_read_and_room_is_made_there(tmp_path, run, server, monkeypatch):
    monkeypatch.setattr(objects_module, "SPARE_BYTES", 0)
    with tmpfs(tmp_path / "there") as there:
        outputs(run, there, FETCH)
        fill(there)
        listed, *_ = outputs(run, there, ("ls",), ("verify",), FETCH, ("gc",), ("rm", "org/repo"))
        assert "org/repo" in listed
        assert not list(there.glob("objects/??/*"))
        assert "org/repo" not in outputs(run, there, ("ls",))[0]


def test_what_cannot_be_fetched_into_a_read_only_store_names_its_folder(tmp_path, run, server):
    open_objects(tmp_path / "full")
    with read_only(tmp_path / "full", tmp_path / "there") as there:
        result = run(there, *FETCH)
    assert result.exit_code == 1
    assert f"the disk is read-only in {there}/parts" in result.output


def test_what_cannot_be_fetched_onto_a_full_disk_is_a_typed_error(tmp_path, run, server):
    with tmpfs(tmp_path / "there") as there:
        fill(there)
        result = run(there, *FETCH)
    assert result.exit_code == 1
    assert "DISK_FULL" in result.output


def test_a_worker_uses_the_models_of_a_read_only_store(tmp_path, run, server):
    outputs(run, tmp_path / "full", FETCH)
    with read_only(tmp_path / "full", tmp_path / "there") as there:
        assert [model.name for model in Inventory(there).read()] == ["org/repo"]
        # Nothing is prefetched into it.
        assert Provision(WeightsSettings(dir=there)).room_bytes == 0

        async def load():
            settings = WeightsSettings(dir=there, offline=True, hf_endpoint=server.url)
            async with Provision(settings) as provision, provision.obtain(FETCH[1]) as path:
                return path.read_bytes()

        assert asyncio.run(load()) == BODY


@pytest.fixture
def unwritable(monkeypatch):
    """SQLite's files cannot be written from now on, until the returned event is cleared."""
    broken = threading.Event()
    connect = sqlite3.connect

    def fails(path, *args, **options):
        if broken.is_set() and not options.get("uri") and path != ":memory:":
            raise sqlite_error(sqlite3.SQLITE_CANTOPEN, "unable to open database file")
        return connect(path, *args, **options)

    monkeypatch.setattr(index_module.sqlite3, "connect", fails)
    return broken


def test_an_index_that_cannot_be_written_is_used_in_memory(tmp_path, unwritable):
    sha = add(open_objects(tmp_path), b"body", "me/m")
    unwritable.set()
    objects = open_objects(tmp_path)
    assert objects.index.is_in_memory
    assert [model.name for model in held_models(objects.index)] == ["me/m"]
    objects.index.pin([sha], True)
    assert objects.index.objects()[0].is_pinned
    unwritable.clear()
    assert objects.index.save()
    assert [(row.sha256, row.is_pinned) for row in Index(tmp_path / INDEX_FILE).objects()] == [(sha, True)]


def test_changes_that_are_only_in_the_log_are_read_too(tmp_path, unwritable):
    objects = open_objects(tmp_path)
    # An open connection keeps SQLite from emptying the log.
    with sqlite3.connect(tmp_path / INDEX_FILE) as other:
        other.execute("SELECT 1 FROM objects").fetchall()
        add(objects, b"body", "me/m")
        assert (tmp_path / f"{INDEX_FILE}-wal").stat().st_size
        unwritable.set()
        assert [model.name for model in held_models(Index(tmp_path / INDEX_FILE))] == ["me/m"]
    other.close()


def test_what_another_machine_writes_is_seen_where_the_store_is_read_only(tmp_path, unwritable):
    writer = open_objects(tmp_path)
    unwritable.set()
    reader = Index(tmp_path / INDEX_FILE)
    assert held_models(reader) == []
    unwritable.clear()
    add(writer, b"body", "me/m")
    unwritable.set()
    assert [model.name for model in held_models(reader)] == ["me/m"]


def test_a_model_is_removed_while_the_index_cannot_be_written(tmp_path, unwritable):
    objects = open_objects(tmp_path)
    sha, kept = add(objects, b"body", "me/m"), add(objects, b"other", "me/n")
    unwritable.set()
    objects = open_objects(tmp_path)
    assert objects.remove_model("me/m") == 4
    assert (objects.path_of(sha).exists(), objects.path_of(kept).exists()) == (False, True)
    unwritable.clear()
    assert [model.name for model in held_models(open_objects(tmp_path).index)] == ["me/n"]


def test_a_lost_index_is_found_again_with_the_models(tmp_path):
    sha = add(open_objects(tmp_path), b"body", "me/m")
    (tmp_path / INDEX_FILE).unlink()
    objects = open_objects(tmp_path)
    assert [model.name for model in held_models(objects.index)] == ["me/m"]
    assert objects.collect() == 0
    assert objects.path_of(sha).exists()


def test_an_index_that_another_process_locks_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(index_module, "BUSY_TIMEOUT_S", 0.01)
    open_objects(tmp_path)
    with sqlite3.connect(tmp_path / INDEX_FILE, isolation_level=None) as other:
        other.execute("PRAGMA locking_mode=EXCLUSIVE")
        other.execute("BEGIN EXCLUSIVE")
        with pytest.raises(Unavailable, match=r"index\.sqlite is locked by another process") as caught:
            open_objects(tmp_path)
    other.close()
    assert caught.value.retry_after_s is not None


def test_an_inventory_of_a_locked_index_is_the_last_one(tmp_path, monkeypatch):
    monkeypatch.setattr(index_module, "BUSY_TIMEOUT_S", 0.01)
    add(open_objects(tmp_path), b"body", "me/m")
    inventory = Inventory(tmp_path)
    assert [model.name for model in inventory.read()] == ["me/m"]
    with sqlite3.connect(tmp_path / INDEX_FILE, isolation_level=None) as other:
        other.execute("PRAGMA locking_mode=EXCLUSIVE")
        other.execute("BEGIN EXCLUSIVE")
        os.utime(tmp_path / INDEX_FILE)
        assert [model.name for model in inventory.read()] == ["me/m"]
    other.close()


def test_an_index_that_can_be_neither_written_nor_read_is_named(tmp_path, monkeypatch):
    open_objects(tmp_path)
    connect = sqlite3.connect

    def fails(path, *args, **options):
        if path == ":memory:":
            return connect(path, *args, **options)
        raise sqlite_error(sqlite3.SQLITE_CANTOPEN, "unable to open database file")

    monkeypatch.setattr(index_module.sqlite3, "connect", fails)
    with pytest.raises(NodeFault, match=r"index\.sqlite, can be neither written .* nor read") as caught:
        open_objects(tmp_path)
    assert caught.value.retry_after_s


def test_a_folder_that_cannot_be_read_is_not_taken_for_an_empty_one(tmp_path, monkeypatch):
    objects = open_objects(tmp_path)
    sha = add(objects, b"body", "me/m")
    place, iterdir = objects.path_of(sha).parent, type(tmp_path).iterdir

    def failing(path):
        if path == place:
            raise OSError(errno.EIO, "Input/output error", str(path))
        return iterdir(path)

    monkeypatch.setattr(type(tmp_path), "iterdir", failing)
    assert [model.name for model in held_models(open_objects(tmp_path).index)] == ["me/m"]


def test_a_damaged_object_that_cannot_be_removed_is_reported(tmp_path, monkeypatch):
    objects = open_objects(tmp_path)
    sha = add(objects, b"body", "me/m")

    def fails(path):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(objects_module, "sha256_of", fails)
    assert objects.verify_all() == [sha]
    assert objects.path_of(sha).exists()


@pytest.mark.parametrize("code", [errno.EROFS, errno.EIO, errno.EMFILE, errno.ENFILE, errno.EACCES])
def test_a_fault_of_the_disk_names_its_folder_and_when_to_try_again(code):
    with pytest.raises(NodeFault, match="in /some/parts") as caught, disk_errors("org/repo"):
        raise OSError(code, os.strerror(code), "/some/parts/x.part")
    assert caught.value.retry_after_s


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_and_a_used_up_quota_name_their_folder(code):
    with pytest.raises(DiskFull, match="in /some/store") as caught, disk_errors("org/repo", "/some/store"):
        raise OSError(code, os.strerror(code))
    assert caught.value.retry_after_s


def as_another_user(work, *args):
    """Run it in a process of another user; in this one, where this does not run as root."""
    if os.geteuid() != 0:
        work(*args)
        return
    process = multiprocessing.get_context("fork").Process(target=_as_nobody, args=(work, *args))
    process.start()
    process.join()
    assert process.exitcode == 0


def _as_nobody(work, *args):
    os.setgroups([])
    os.setgid(65534)
    os.setuid(65534)
    work(*args)


def look(store):
    objects = open_objects(store)
    (model,) = held_models(objects.index)
    assert model.name == "me/m"
    assert objects.verify_all() == []
    (sha,) = objects.objects_of("me/m")
    with objects.using([sha]) as is_whole:
        assert is_whole
        assert objects.path_of(sha).read_bytes() == b"body"
    with pytest.raises(NodeFault, match=f"Permission denied in {store}"):
        objects.remove_model("me/m")


@pytest.fixture
def public_folder():
    """Other users come this far."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


def test_a_store_of_another_user_is_read_and_not_changed(public_folder):
    store = public_folder / "store"
    add(open_objects(store), b"body", "me/m")
    folders = [Path(folder) for folder, _, _ in os.walk(store)]
    for folder in folders:
        folder.chmod(0o555)
    as_another_user(look, store)
    for folder in folders:
        folder.chmod(0o755)


def enter(store):
    with pytest.raises(PermissionError) as caught:
        open_objects(store)
    assert str(caught.value.filename).startswith(str(store))


def test_a_store_that_may_not_be_entered_is_named_and_loses_nothing(public_folder):
    store = public_folder / "store"
    sha = add(open_objects(store), b"body", "me/m")
    store.chmod(0o644)
    as_another_user(enter, store)
    store.chmod(0o755)
    assert open_objects(store).objects_of("me/m") == [sha]
