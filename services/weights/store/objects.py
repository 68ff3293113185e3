"""The store's files: objects named by their sha256, downloads under way, and views of links to objects.

objects/ab/abcd...      bytes whose sha256 is the name; never changed
parts/KEY.part, .map    a download and what of it is there
locks/NAME.lock         who downloads KEY; who uses an object
models/AUTHOR/NAME/...  links, in the layout that loaders read
a1111/models/..., a1111/embeddings/...  links, in that of the A1111 web UI
"""

import asyncio
import contextlib
import fcntl
import os
import shutil
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator
from pathlib import Path

from fanlight.errors import NotFound
from services.kernel.logs import get_logger
from services.weights.errors import DiskFull
from services.weights.references.manifest import TensorTable
from services.weights.references.tensors import Digested, component_key, sha256_from, sha256_of
from services.weights.store.index import INDEX_FILE, Index, ObjectRow
from services.weights.transfer.partial import bytes_in, sync

POLL_S = 0.1

log = get_logger()

# Left free on the disk whatever is fetched.
SPARE_BYTES = 64 * 1024 * 1024
AUTOV2_CHARS = 10


def try_lock(path: Path, *, is_shared: bool = False) -> int | None:
    """A descriptor that holds the lock until it is closed, or None when somebody else has it."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(fd, (fcntl.LOCK_SH if is_shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(fd)
        return None
    return fd


@contextlib.asynccontextmanager
async def locked(path: Path, look: Callable[[], Awaitable[None]] | None = None) -> AsyncIterator[None]:
    """Alone with the file, among all processes of this machine. `look` is called now and then while another has it."""
    while (fd := try_lock(path)) is None:
        if look is not None:
            await look()
        await asyncio.sleep(POLL_S)
    try:
        yield
    finally:
        os.close(fd)


@contextlib.contextmanager
def shared(paths: Iterable[Path]) -> Iterator[bool]:
    """Holds all of them, together with whoever else does; False when somebody has one alone."""
    with contextlib.ExitStack() as stack:
        fds = []
        for path in paths:
            fd = try_lock(path, is_shared=True)
            if fd is None:
                break
            stack.callback(os.close, fd)
            fds.append(fd)
        else:
            yield True
            return
        yield False


class Objects:
    """Blocking; call it off the event loop. `now_s` is the wall clock."""

    def __init__(self, folder: Path, *, budget_bytes: int, now_s: Callable[[], float]) -> None:
        self.folder = folder
        self._budget_bytes = budget_bytes
        self._now_s = now_s
        for name in ("objects", "parts", "locks", "models"):
            (folder / name).mkdir(parents=True, exist_ok=True)
        self.index = Index(folder / INDEX_FILE)
        self._reconcile()

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
        """Believe the disk: what lies there is held, what does not is not."""
        # The index first: what is published meanwhile may be indexed twice, but never forgotten.
        known = {row.sha256 for row in self.index.objects()}
        there = {path.name: path for path in (self.folder / "objects").glob("??/*")}
        for sha in known - there.keys():
            self._drop_links(self.index.forget(sha))
        for sha in there.keys() - known:
            self._index_object(sha, there[sha])

    def publish(self, part: Path, digested: Digested, *, may_alias: bool = False) -> str:
        """Make the part an object, durably, and tell its name.

        With `may_alias` that is another object's where one holds the same tensors behind another header.
        """
        sha256, table = digested.sha256, digested.table
        if may_alias and table is not None and table.has_digests:
            twin = self.index.find_component(component_key(table.tensors))
            if twin and twin != sha256 and self.path_of(twin).exists():
                self.index.add_alias(sha256, twin)
                part.unlink()
                return twin
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
        """Room for so many more bytes, by evicting where a budget says so. DiskFull when there is none."""
        if self._budget_bytes:
            used = sum(row.size_bytes for row in self.index.objects()) + bytes_in(self.parts)
            left = self.evict(used + need_bytes - self._budget_bytes)
            left -= self._drop_abandoned() if left > 0 else 0
            if left > 0:
                raise DiskFull(
                    f"{need_bytes} more bytes do not fit the budget: with what is held and half fetched, "
                    f"{left} over the {self._budget_bytes} of it are pinned or in use",
                    retry_after_s=60.0,
                )
        free = shutil.disk_usage(self.folder).free - SPARE_BYTES
        if need_bytes > free:
            raise DiskFull(
                f"{need_bytes} bytes are needed in {self.folder} and {max(0, free)} can be had; "
                f"{SPARE_BYTES} are left free"
            )

    def evict(self, excess_bytes: int) -> int:
        """Remove the least recently used until so many bytes are gone; how many too many are still there."""
        for row in self.index.objects():
            if excess_bytes <= 0:
                break
            if not row.is_pinned and self.remove(row.sha256):
                log.info("weights_evicted", sha256=row.sha256, size_bytes=row.size_bytes)
                excess_bytes -= row.size_bytes
        return excess_bytes

    def remove(self, sha256: str) -> bool:
        """Remove the object unless somebody uses it."""
        fd = try_lock(self.lock_of(sha256))
        if fd is None:
            return False
        try:
            self._drop_links(self.index.forget(sha256))
            self._drop_other_names(self.index.drop_other_names(sha256=sha256))
            self.path_of(sha256).unlink(missing_ok=True)
        finally:
            os.close(fd)
        return True

    @contextlib.contextmanager
    def using(self, shas: Iterable[str]) -> Iterator[bool]:
        """While this is open, none of the objects is evicted; False when one is gone already."""
        names = sorted(set(shas))
        with shared(self.lock_of(name) for name in names) as has_all:
            yield has_all and all(self.path_of(name).exists() for name in names)

    def link(self, view: str, links: Iterable[tuple[str, str]]) -> Path:
        """Let each (link, object) stand in the view; each appears at once and whole."""
        folder, rows = self.views / view, list(links)
        for link, sha in rows:
            self._point(folder / link, sha)
        self.index.set_links(view, rows)
        self.index.touch({sha for _, sha in rows}, self._now_s())
        return folder

    def link_also(self, path: str, view: str, sha256: str) -> None:
        """Let the view's object stand at another path of the store too, for as long as the view has it."""
        self._point(self.folder / path, sha256)
        self.index.add_other_name(path, view, sha256)

    def _point(self, place: Path, sha256: str) -> None:
        place.parent.mkdir(parents=True, exist_ok=True)
        fresh = place.with_name(f".{place.name}.{os.getpid()}.{threading.get_ident()}")
        fresh.unlink(missing_ok=True)
        fresh.symlink_to(os.path.relpath(self.path_of(sha256), place.parent))
        fresh.rename(place)

    def _drop_other_names(self, paths: Iterable[str]) -> None:
        for path in paths:
            (self.folder / path).unlink(missing_ok=True)

    def _drop_links(self, links: Iterable[tuple[str, str]]) -> None:
        for view, link in links:
            (self.views / view / link).unlink(missing_ok=True)

    def drop_view(self, view: str) -> None:
        """Remove the view; its objects stay until they are evicted or collected."""
        self.index.drop_view(view)
        self._drop_other_names(self.index.drop_other_names(view=view))
        shutil.rmtree(self.views / view, ignore_errors=True)

    def verify(self, sha256: str) -> bool:
        """Read the object again; one whose bytes are not its name is removed when nobody uses it."""
        if sha256_of(self.path_of(sha256)) == sha256:
            return True
        self.remove(sha256)
        return False

    def verify_all(self) -> list[str]:
        """The objects that were damaged."""
        return [row.sha256 for row in self.index.objects() if not self.verify(row.sha256)]

    def size_of(self, sha256: str) -> int | None:
        """The object's size; None where it is not held."""
        path = self.path_of(sha256)
        return path.stat().st_size if path.exists() else None

    def table_of(self, sha256: str) -> TensorTable | None:
        return self.index.table(sha256)

    def links_of(self, name: str) -> list[tuple[str, str]]:
        """Each (link, object) of a view, or the one object that a digest names. NotFound."""
        found = [(link, sha) for view, link, sha in self.index.links() if view == name]
        one = self.index.find(name) if not found else None
        if not found and one is None:
            raise NotFound(f"the store has no {name!r}; `fanlight weights ls` lists what it has", field="name")
        return found or [(f"{one}.safetensors", str(one))]

    def objects_of(self, name: str) -> list[str]:
        """The objects of a view, or the one that a digest names. NotFound."""
        return [sha for _, sha in self.links_of(name)]

    def tables_of(self, name: str) -> dict[str, TensorTable]:
        """The tensor digests of a model's files by the files' sha256, for other nodes' catalogs."""
        shas = {row for sha in self.objects_of(name) for row in self.index.files_of(sha)}
        return {sha: table for sha in sorted(shas) if (table := self.index.table(sha))}

    def pin(self, name: str, is_pinned: bool) -> None:
        self.index.pin(self.objects_of(name), is_pinned)

    def remove_model(self, name: str) -> int:
        """Remove the view and what no other has, or the object that a digest names; nothing in use. The bytes freed."""
        shas = set(self.objects_of(name))
        if not any(view == name for view, _, _ in self.index.links()):
            sizes = {row.sha256: row.size_bytes for row in self.index.objects()}
            return sum(sizes.get(sha, 0) for sha in shas if self.remove(sha))
        self.drop_view(name)
        return self._remove_unlinked(shas)

    def collect(self) -> int:
        """Remove objects that no view has and downloads that nobody is at; the bytes freed."""
        freed = self._remove_unlinked({row.sha256 for row in self.index.objects() if not row.is_pinned})
        return freed + self._drop_abandoned()

    def _drop_abandoned(self) -> int:
        """Remove downloads that nobody is at; the bytes freed."""
        freed = 0
        for path in self.parts.iterdir():
            fd = try_lock(self.lock_of(f"fetch-{path.stem}"))
            if fd is None:
                continue
            try:
                # Who was at it may have ended it meanwhile.
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
