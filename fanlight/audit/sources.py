"""The places an image may be named in: folders, archives, stores and registries. FORMS has them all."""

import hashlib
import io
import json
import lzma
import re
import shutil
import subprocess
import tarfile
import tempfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from .choosing import for_platform, images_among
from .layers import normal, read_layer
from .model import AuditError, Image
from .oci import Known, commands, read_image, tag_of, tagged
from .reading import Blobs
from .registry import Registry
from .streams import CHUNK, HEAD_BYTES, hash_of, is_packed, unpacked

# What reading a damaged archive raises.
DAMAGES = (
    tarfile.TarError,
    lzma.LZMAError,
    zlib.error,
    EOFError,
    OSError,
    KeyError,
    AttributeError,
    TypeError,
    ValueError,
)
Reader = Callable[[str, str, str, Known], Image]

FORMS = (
    "oci:DIR[:TAG], oci-archive:FILE[:TAG], docker-archive:FILE[:NAME:TAG], dir:DIR, containers-storage:NAME, "
    "docker-daemon:NAME, docker://HOST/NAME:TAG[@DIGEST], or the path of a folder or archive, compressed or not"
)


def load(name: str, platform: str, known: Known | None = None) -> Image:
    """Read the whole image, but for layers that are known; those it reads are, from then on. AuditError."""
    known = {} if known is None else known
    transport, _, rest = name.partition(":")
    readers: dict[str, Reader] = {
        "oci": _from_layout,
        "oci-archive": _from_oci_archive,
        "docker-archive": _from_docker_archive,
        "dir": _from_folder,
        "containers-storage": _from_store,
        "docker-daemon": _from_daemon,
        "docker": _from_registry,
    }
    if transport in readers and rest and (transport != "docker" or rest.startswith("//")):
        return readers[transport](name, rest, platform, known)
    if name and Path(name).exists():
        return _recognized(name, platform, known)
    raise AuditError(f"{name!r} is no image: name it as {FORMS}")


def _recognized(name: str, platform: str, known: Known) -> Image:
    """A folder or archive by what is in it."""
    path = Path(name)
    if not path.is_dir():
        return _from_archive(name, path, "", platform, known)
    if (path / "index.json").exists():
        return _from_layout(name, name, platform, known)
    if (path / "manifest.json").exists():
        return _from_folder(name, name, platform, known)
    raise AuditError("it is a folder without an image: neither index.json nor manifest.json is in it")


class Layout:
    """The blobs of an OCI layout."""

    def __init__(self, root: Path) -> None:
        self._root = root

    @contextmanager
    def open(self, digest: str) -> Iterator[BinaryIO]:
        with (self._root / "blobs" / hash_of(digest) / _hexadecimal(digest)).open("rb") as source:
            yield source


class Folder:
    """The blobs of skopeo's `dir:`, by their digests without the kind."""

    def __init__(self, root: Path, manifest: bytes) -> None:
        self._root = root
        self._manifest = manifest

    @contextmanager
    def open(self, digest: str) -> Iterator[BinaryIO]:
        if digest == digest_of(self._manifest):
            yield io.BytesIO(self._manifest)
            return
        name = _hexadecimal(digest)
        places = [self._root / name, self._root / f"{name}.manifest.json"]
        with next((place for place in places if place.exists()), places[0]).open("rb") as source:
            yield source


class ArchivedLayout:
    """The blobs of an OCI layout in a tar."""

    def __init__(self, tar: tarfile.TarFile) -> None:
        self._tar = tar
        self._members = {normal(member.name): member for member in tar.getmembers() if member.isfile()}

    @contextmanager
    def open(self, digest: str) -> Iterator[BinaryIO]:
        name = f"blobs/{hash_of(digest)}/{_hexadecimal(digest)}"
        source = self._tar.extractfile(self._members[name]) if name in self._members else None
        if source is None:
            raise FileNotFoundError(name)
        with source:
            yield source  # type: ignore[misc]


def digest_of(body: bytes) -> str:
    return f"sha256:{hashlib.sha256(body).hexdigest()}"


def _hexadecimal(digest: str) -> str:
    kind, _, name = digest.partition(":")
    if "/" in digest or not name or kind != hash_of(digest):
        raise AuditError(f"{digest!r} is no digest")
    return name


def _from_layout(name: str, rest: str, platform: str, known: Known) -> Image:
    root, tag, digest = _parts(rest)
    try:
        index = json.loads((root / "index.json").read_text())
    except (OSError, ValueError) as error:
        raise AuditError("it is no OCI layout: its index.json cannot be read") from error
    return _from_index(name, Layout(root), index, (tag, digest), platform, known)


def _parts(rest: str) -> tuple[Path, str, str]:
    """Path, tag and digest of PATH[:TAG][@DIGEST]."""
    digest = ""
    if not Path(rest).exists():
        rest, _, digest = rest.rpartition("@") if re.search(r"@\w+:[0-9a-f]+$", rest) else (rest, "", "")
    if Path(rest).exists() or ":" not in rest:
        return Path(rest), "", digest
    # The shortest part that is there: a tag may have colons, as in NAME:TAG.
    parts = rest.split(":")
    for count in range(1, len(parts)):
        if Path(":".join(parts[:count])).exists():
            return Path(":".join(parts[:count])), ":".join(parts[count:]), digest
    return Path(":".join(parts[:-1])), parts[-1], digest


def _from_index(
    name: str, blobs: Blobs, index: Mapping[str, Any], wanted: tuple[str, str], platform: str, known: Known
) -> Image:
    """`wanted`: tag and digest, each perhaps empty."""
    tag, digest = wanted
    if digest:
        return read_image(name, blobs, {"digest": digest}, platform, known)
    try:
        found = list(tagged(index, tag))
        if len(found) > 1:
            # Signatures and attestations lie beside the image, and images for several platforms beside each other.
            images = images_among(blobs, found)
            found = images if len(images) < 2 else for_platform(blobs, images, platform) or images
    except (KeyError, TypeError, AttributeError) as error:
        raise AuditError(f"its index is not as OCI wants it: {error!r}") from error
    if len(found) != 1:
        told = ", ".join(sorted(filter(None, map(tag_of, index.get("manifests", [])))))
        what = f" tagged {tag!r}" if tag else ""
        raise AuditError(f"it has {len(found)} images{what}; name one as oci:DIR:TAG{f', of {told}' if told else ''}")
    return read_image(name, blobs, found[0], platform, known)


def _from_folder(name: str, rest: str, platform: str, known: Known) -> Image:
    root = Path(rest)
    try:
        body = (root / "manifest.json").read_bytes()
    except OSError as error:
        raise AuditError("it is no folder of skopeo's: its manifest.json cannot be read") from error
    return read_image(name, Folder(root, body), {"digest": digest_of(body)}, platform, known)


def _from_docker_archive(name: str, rest: str, platform: str, known: Known) -> Image:
    path, tag, digest = _parts(rest)
    return _from_archive(name, path, tag or digest, platform, known)


def _from_oci_archive(name: str, rest: str, platform: str, known: Known) -> Image:
    path, tag, digest = _parts(rest)
    return _from_archive(name, path, tag, platform, known, digest, is_layout=True)


def _from_archive(
    name: str, path: Path, tag: str, platform: str, known: Known, digest: str = "", *, is_layout: bool = False
) -> Image:
    """Of docker and podman, or an OCI layout in a tar; by what is in it. `is_layout`: if it is both, a layout."""
    try:
        with _unpacked(path) as file, tarfile.open(fileobj=file) as tar:
            members = {normal(each) for each in tar.getnames()}
            if "index.json" in members and ("manifest.json" not in members or is_layout):
                index = json.loads(_member(tar, "index.json"))
                return _from_index(name, ArchivedLayout(tar), index, (tag, digest), platform, known)
            return _from_saved(name, tar, tag)
    except FileNotFoundError as error:
        raise AuditError("there is no such file") from error
    except DAMAGES as error:
        raise AuditError(f"it is no whole docker archive, nor an OCI one: {_reason(error)}") from error


@contextmanager
def _unpacked(path: Path) -> Iterator[BinaryIO]:
    """The archive, from a temporary file where it is compressed: its members are read in any order."""
    with path.open("rb") as file:
        head = file.read(HEAD_BYTES)
        file.seek(0)
        if not is_packed(head):
            yield file
            return
        file.seek(len(head))
        with tempfile.TemporaryFile() as whole:
            with unpacked(file, head, "the archive") as stream:
                shutil.copyfileobj(stream, whole, CHUNK)
            whole.seek(0)
            yield whole


def _from_saved(name: str, tar: tarfile.TarFile, tag: str) -> Image:
    """As `docker save` and `podman save` write it."""
    manifest = _one_of(json.loads(_member(tar, "manifest.json")), tag)
    config = json.loads(_member(tar, manifest["Config"]))
    layers = manifest["Layers"]
    diff_ids = config["rootfs"]["diff_ids"]
    made = [
        _archived(tar, layer, diff_id, command)
        for layer, diff_id, command in zip(layers, diff_ids, commands(config, len(layers)), strict=True)
    ]
    return Image(name=name, digest=f"sha256:{Path(manifest['Config']).stem}", layers=tuple(made))


def _reason(error: Exception) -> str:
    """In a line: tarfile reports each way in which it tried."""
    if isinstance(error, KeyError):
        return f"{error.args[0]} is missing"
    return "it is no tar" if len(lines := str(error).splitlines()) > 1 else "".join(lines) or type(error).__name__


def _one_of(manifests: list[dict[str, Any]], tag: str) -> dict[str, Any]:
    found = [each for each in manifests if not tag or _is_named(each.get("RepoTags") or (), tag)]
    if len(found) != 1:
        names = ", ".join(tag for each in manifests for tag in each.get("RepoTags") or ()) or "none has a name"
        raise AuditError(f"{len(found)} images; name one as docker-archive:FILE:NAME:TAG, of {names}")
    return found[0]


def _is_named(tags: Sequence[str], wanted: str) -> bool:
    """podman writes localhost/ or docker.io/library/ before a short name."""
    return any(tag == wanted or tag.endswith(f"/{wanted}") for tag in tags)


def _archived(tar: tarfile.TarFile, member: str, diff_id: str, command: str) -> Any:
    source = tar.extractfile(_found(tar, member))
    if source is None:
        raise KeyError(member)
    return read_layer(source, digest=diff_id, size_bytes=-1, diff_id=diff_id, command=command)  # type: ignore[arg-type]


def _member(tar: tarfile.TarFile, name: str) -> bytes:
    source = tar.extractfile(_found(tar, name))
    if source is None:
        raise KeyError(name)
    return source.read()


def _found(tar: tarfile.TarFile, name: str) -> tarfile.TarInfo:
    """A member that may be written with ./ before its name."""
    try:
        return tar.getmember(name)
    except KeyError:
        return tar.getmember(f"./{name}")


def _from_store(name: str, rest: str, platform: str, known: Known) -> Image:
    """Through skopeo, which packs the layers again: their digests are not those of a registry."""
    with tempfile.TemporaryDirectory() as folder:
        _run("skopeo", "copy", "--quiet", f"containers-storage:{_without_tag(rest)}", f"oci:{folder}:image")
        return _from_layout(name, f"{folder}:image", platform, known)


def _from_daemon(name: str, rest: str, platform: str, known: Known) -> Image:
    with tempfile.TemporaryDirectory() as folder:
        archive = Path(folder, "image.tar")
        _run("docker", "save", "--output", str(archive), _without_tag(rest))
        return _from_archive(name, archive, "", platform, known)


def _without_tag(name: str) -> str:
    """NAME@DIGEST of NAME:TAG@DIGEST, which docker and skopeo do not take: the digest says it all."""
    head, at, digest = name.partition("@")
    folder, slash, last = head.rpartition("/")
    return f"{folder}{slash}{last.partition(':')[0]}@{digest}" if at else name


def _run(*command: str) -> None:
    if shutil.which(command[0]) is None:
        raise AuditError(f"needs the {command[0]} program")
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = done.stderr.strip().splitlines()
        raise AuditError(f"{command[0]} says: {lines[-1] if lines else done.returncode}")


def _from_registry(name: str, rest: str, platform: str, known: Known) -> Image:
    host, slash, path = _without_tag(rest.removeprefix("//")).partition("/")
    if not slash:
        raise AuditError(f"{name!r} names no host: docker://HOST/NAME:TAG")
    repository, _, tag = path.partition("@") if "@" in path else path.rpartition(":") if ":" in path else (path, "", "")
    registry = Registry(host, repository)
    return read_image(name, registry, {"digest": registry.resolve(tag or "latest")}, platform, known)
