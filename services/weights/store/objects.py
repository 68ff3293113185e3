"""The store's files: objects named by their sha256, running downloads, views of links to objects; locks, LRU eviction.

objects/ab/abcd...      bytes whose sha256 is the name; immutable
parts/KEY.part, .map    a download and its journal
locks/NAME.lock         locked by whoever downloads KEY or uses an object
models/AUTHOR/NAME/...  links, in the layout that loaders expect
a1111/models/..., a1111/embeddings/...  links, in the layout of the A1111 web UI
"""

import contextlib
import errno
import os
import shutil
import threading
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from fanlight.errors import NodeFault, NotFound
from services.kernel.disks import why
from services.kernel.logs import get_logger
from services.weights.errors import DiskFull, disk_errors
from services.weights.references.manifest import TensorTable
from services.weights.references.tensors import Digested, component_key, sha256_from, sha256_of
from services.weights.store.index import INDEX_FILE, Index, ObjectRow
from services.weights.store.locks import shared, try_lock
from services.weights.transfer.partial import sync

log = get_logger()

# Disk space that is always left free.
SPARE_BYTES = 64 * 1024 * 1024
AUTOV2_CHARS = 10


class Objects:
    """Blocking; call it off the event loop. `now_s` is the wall clock."""

    def __init__(self, folder: Path, *, budget_bytes: int, now_s: Callable[[], float]) -> None:
        self.folder = folder
        self._budget_bytes = budget_bytes
        self._now_s = now_s
        for name in ("objects", "parts", "locks", "models"):
            self._make_folder(folder / name)
        self.index = Index(folder / INDEX_FILE)
        self._reconcile()

    def _make_folder(self, place: Path) -> None:
        """A store that is there, and cannot be written, is read without the folder."""
        try:
            place.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            if not (self.folder / "objects").is_dir():
                raise
            log.info("weights_folder_missing", path=str(place), why=why(error))

    def path_of(self, sha256: str) -> Path:
        return self.folder / "objects" / sha256[:2] / sha256

    def bytes_of(self, shas: Iterable[str]) -> int:
        return sum(self.path_of(sha).stat().st_size for sha in shas)

    def lock_of(self, name: str) -> Path:
        return self.folder / "locks" / f"{name}.lock"

    @property
    def parts(self) -> Path:
        return self.folder / "parts"

    @property
    def views(self) -> Path:
        return self.folder / "models"

    def _reconcile(self) -> None:
        """Make the index agree with the disk: the files there are the truth."""
        # Read the index first: an object published meanwhile may be indexed twice, but never dropped.
        known = {row.sha256 for row in self.index.objects()}
        there, unread = self._listed()
        for sha in known - there.keys():
            if sha[:2] not in unread:
                self._drop_links(self.index.forget(sha))
        found = there.keys() - known
        for sha in found:
            self._index_object(sha, there[sha])
        if found:
            for view, links in self._views_on_disk(found).items():
                self.index.set_links(view, links)

    def _listed(self) -> tuple[dict[str, Path], frozenset[str]]:
        """The objects' files by sha256, and the folders that could not be read: what is in them is not gone.

        OSError where no folder of objects can be read at all.
        """
        there: dict[str, Path] = {}
        unread = set()
        for folder in (self.folder / "objects").iterdir():
            try:
                there |= {path.name: path for path in folder.iterdir()}
            except NotADirectoryError:
                continue
            except OSError as error:
                unread.add(folder.name)
                log.warning("weights_folder_unread", path=str(folder), why=why(error))
        return there, frozenset(unread)

    def _views_on_disk(self, shas: Iterable[str]) -> dict[str, list[tuple[str, str]]]:
        """The links to these objects by AUTHOR/NAME, for an index that lost them."""
        wanted, found = set(shas), defaultdict[str, list[tuple[str, str]]](list)
        for folder, _, names in os.walk(self.views):
            for name in names:
                path = Path(folder, name)
                sha = os.path.basename(os.readlink(path)) if path.is_symlink() else ""
                author, _, rest = path.relative_to(self.views).as_posix().partition("/")
                model, _, link = rest.partition("/")
                if sha in wanted and link:
                    found[f"{author}/{model}"].append((link, sha))
        return found

    def publish(self, part: Path, digested: Digested, *, may_alias: bool = False) -> str:
        """Make the part an object, durably, and return its sha256.

        With `may_alias`, return an existing object with the same tensors and another header, if there is one.
        """
        sha256, table = digested.sha256, digested.table
        if may_alias and table is not None and table.has_digests:
            same = self.index.find_component(component_key(table.tensors))
            if same and same != sha256 and self.path_of(same).exists():
                self.index.add_alias(sha256, same)
                part.unlink()
                return same
        path = self.path_of(sha256)
        path.parent.mkdir(exist_ok=True)
        sync(part)
        part.rename(path)
        sync(path.parent)
        self._index_object(sha256, path, digested)
        return sha256

    def _index_object(self, sha256: str, path: Path, digested: Digested | None = None) -> None:
        table = digested.table if digested else self.index.table(sha256)
        autov3 = digested.autov3 if digested else sha256_from(path, table.header_bytes) if table else ""
        has_digests = table is not None and table.has_digests
        row = ObjectRow(
            sha256=sha256,
            size_bytes=path.stat().st_size,
            autov2=sha256[:AUTOV2_CHARS],
            autov3=autov3,
            component=component_key(table.tensors) if table and has_digests else "",
            used_s=self._now_s(),
            is_pinned=False,
        )
        self.index.add(row)
        if table is not None:
            self.index.add_table(sha256, sha256, table)

    def reserve(self, need_bytes: int) -> None:
        """Make space for more bytes, by LRU eviction if there is a budget. DiskFull if that is not enough."""
        if self._budget_bytes:
            used = sum(row.size_bytes for row in self.index.objects()) + _allocated_bytes(self.parts)
            left = self.evict(used + need_bytes - self._budget_bytes)
            left -= self._remove_abandoned() if left > 0 else 0
            if left > 0:
                raise DiskFull(
                    f"{need_bytes} more bytes exceed the budget: with held objects and partial downloads, "
                    f"{left} bytes above the limit of {self._budget_bytes} are pinned or in use",
                    retry_after_s=60.0,
                )
        free = shutil.disk_usage(self.folder).free - SPARE_BYTES
        if need_bytes > free:
            raise DiskFull(
                f"{need_bytes} bytes are needed in {self.folder}, but only {max(0, free)} are available; "
                f"{SPARE_BYTES} stay free"
            )

    def evict(self, excess_bytes: int) -> int:
        """LRU eviction of so many bytes, except pinned objects and those in use; returns the bytes still in excess."""
        for row in self.index.objects():
            if excess_bytes <= 0:
                break
            if not row.is_pinned and self.remove(row.sha256):
                log.info("weights_evicted", sha256=row.sha256, size_bytes=row.size_bytes)
                excess_bytes -= row.size_bytes
        return excess_bytes

    def remove(self, sha256: str) -> bool:
        """Remove the object unless it is in use."""
        fd = try_lock(self.lock_of(sha256), otherwise=self.path_of(sha256))
        if fd is None:
            return False
        try:
            # First, because that makes room for the index, and fails before anything else has changed.
            self.path_of(sha256).unlink(missing_ok=True)
            self.index.save()
            self._drop_links(self.index.forget(sha256))
            self._drop_other_names(self.index.drop_other_names(sha256=sha256))
        finally:
            os.close(fd)
        return True

    @contextlib.contextmanager
    def using(self, shas: Iterable[str]) -> Iterator[bool]:
        """Protect the objects from eviction while this is open; yields False if one does not exist."""
        names = sorted(set(shas))
        with shared((self.lock_of(name), self.path_of(name)) for name in names) as has_all:
            yield has_all and all(self.path_of(name).exists() for name in names)

    def link(self, view: str, links: Iterable[tuple[str, str]]) -> Path:
        """Create each (link, object) in the view, atomically."""
        folder, rows = self.views / view, list(links)
        for link, sha in rows:
            self._point(folder / link, sha)
        self.index.set_links(view, rows)
        self.index.touch({sha for _, sha in rows}, self._now_s())
        return folder

    def link_alias(self, path: str, view: str, sha256: str) -> None:
        """Link the view's object at another path of the store as well, for as long as the view has it."""
        self._point(self.folder / path, sha256)
        self.index.add_other_name(path, view, sha256)

    def _point(self, place: Path, sha256: str) -> None:
        target = os.path.relpath(self.path_of(sha256), place.parent)
        with contextlib.suppress(OSError):
            if os.readlink(place) == target:
                return
        place.parent.mkdir(parents=True, exist_ok=True)
        fresh = place.with_name(f".{place.name}.{os.getpid()}.{threading.get_ident()}")
        fresh.unlink(missing_ok=True)
        fresh.symlink_to(target)
        fresh.rename(place)

    def _drop_other_names(self, paths: Iterable[str]) -> None:
        for path in paths:
            _unlink(self.folder / path)

    def _drop_links(self, links: Iterable[tuple[str, str]]) -> None:
        for view, link in links:
            _unlink(self.views / view / link)

    def drop_view(self, view: str) -> None:
        """Remove the view; its objects stay until eviction or garbage collection."""
        self.index.drop_view(view)
        self._drop_other_names(self.index.drop_other_names(view=view))
        shutil.rmtree(self.views / view, ignore_errors=True)

    def verify(self, sha256: str) -> bool:
        """Check the object's sha256; a damaged one is removed unless it is in use or the store is read-only."""
        try:
            if sha256_of(self.path_of(sha256)) == sha256:
                return True
            self.remove(sha256)
        except OSError as error:
            log.warning("weights_damaged_object_kept", sha256=sha256, why=why(error))
        return False

    def verify_all(self) -> list[str]:
        """Check all objects; returns the damaged ones."""
        return [row.sha256 for row in self.index.objects() if not self.verify(row.sha256)]

    def size_of(self, sha256: str) -> int | None:
        """The object's size; None where it is not held."""
        path = self.path_of(sha256)
        return path.stat().st_size if path.exists() else None

    def table_of(self, sha256: str) -> TensorTable | None:
        return self.index.table(sha256)

    def links_of(self, name: str) -> list[tuple[str, str]]:
        """Each (link, object) of a view, or of the single object of a digest. NotFound."""
        found = [(link, sha) for view, link, sha in self.index.links() if view == name]
        one = self.index.find(name) if not found else None
        if not found and one is None:
            raise NotFound(f"the store has no {name!r}; `fanlight weights ls` lists its models", field="name")
        return found or [(f"{one}.safetensors", str(one))]

    def objects_of(self, name: str) -> list[str]:
        """The objects of a view, or the single object of a digest. NotFound."""
        return [sha for _, sha in self.links_of(name)]

    def tables_of(self, name: str) -> dict[str, TensorTable]:
        """Tensor tables of a model's files by sha256 of the file, for other nodes' catalogs."""
        shas = {row for sha in self.objects_of(name) for row in self.index.files_of(sha)}
        return {sha: table for sha in sorted(shas) if (table := self.index.table(sha))}

    def pin(self, name: str, is_pinned: bool) -> None:
        """NodeFault where that would be forgotten with this process."""
        self.index.pin(self.objects_of(name), is_pinned)
        if not self.index.save():
            raise NodeFault(
                f"{self.folder / INDEX_FILE} cannot be written: the disk is full or read-only, or it is another user's"
            )

    def remove_model(self, name: str) -> int:
        """Remove a view and the objects only it has, or a digest's object; not those in use. Returns bytes freed."""
        shas = set(self.objects_of(name))
        self._require_writable()
        if not any(view == name for view, _, _ in self.index.links()):
            sizes = {row.sha256: row.size_bytes for row in self.index.objects()}
            return sum(sizes.get(sha, 0) for sha in shas if self.remove(sha))
        self.drop_view(name)
        freed = self._remove_unlinked(shas)
        self.index.save()
        return freed

    def _require_writable(self) -> None:
        """NodeFault before anything is changed where nothing can be removed."""
        objects = self.folder / "objects"
        with disk_errors(f"remove from {self.folder}", self.folder):
            if not os.access(objects, os.W_OK | os.X_OK):
                is_read_only = os.statvfs(objects).f_flag & os.ST_RDONLY
                code = errno.EROFS if is_read_only else errno.EACCES
                raise OSError(code, os.strerror(code), str(objects))

    def collect(self) -> int:
        """Garbage collection: remove objects without a view and abandoned downloads. Returns the bytes freed."""
        self._require_writable()
        freed = self._remove_unlinked({row.sha256 for row in self.index.objects() if not row.is_pinned})
        return freed + self._remove_abandoned()

    def _remove_abandoned(self) -> int:
        """Remove downloads that no process continues. Returns the bytes freed."""
        freed = 0
        for path in self.parts.iterdir() if self.parts.exists() else ():
            fd = try_lock(self.lock_of(f"fetch-{path.stem}"))
            if fd is None:
                continue
            try:
                # Its process may have finished it meanwhile.
                with contextlib.suppress(FileNotFoundError):
                    freed += path.stat().st_blocks * 512
                    path.unlink()
            finally:
                os.close(fd)
        return freed

    def _remove_unlinked(self, shas: Iterable[str]) -> int:
        linked = {sha for _, _, sha in self.index.links()}
        sizes = {row.sha256: row.size_bytes for row in self.index.objects()}
        return sum(sizes.get(sha, 0) for sha in sorted(set(shas) - linked) if self.remove(sha))


def _unlink(path: Path) -> None:
    """A link that cannot be removed leads nowhere, and harms nobody."""
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        log.info("weights_link_kept", path=str(path), why=why(error))


def _allocated_bytes(folder: Path) -> int:
    """Bytes on disk of the files in the folder."""
    total = 0
    for path in folder.iterdir() if folder.exists() else ():
        with contextlib.suppress(FileNotFoundError):
            total += path.stat().st_blocks * 512
    return total
