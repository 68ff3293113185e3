"""The places an image may be named in: `oci:`, `docker-archive:`, `containers-storage:`, `docker-daemon:`, `docker://`."""

import json
import shutil
import subprocess
import tarfile
import tempfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from .layers import read_layer
from .model import AuditError, Image
from .oci import Known, commands, for_platform, read_image, tagged
from .registry import Registry
from .streams import hash_of

FORMS = "oci:DIR[:TAG], docker-archive:FILE, containers-storage:NAME, docker-daemon:NAME or docker://HOST/NAME:TAG"


def load(name: str, platform: str, known: Known | None = None) -> Image:
    """Read the whole image, but for layers that are known; those it reads are, from then on. AuditError."""
    known = {} if known is None else known
    transport, _, rest = name.partition(":")
    if transport == "oci" and rest:
        return _from_layout(name, rest, platform, known)
    if transport == "docker-archive" and rest:
        return _from_archive(name, rest)
    if transport == "containers-storage" and rest:
        return _from_store(name, platform, known)
    if transport == "docker-daemon" and rest:
        return _from_daemon(name, rest)
    if name.startswith("docker://"):
        return _from_registry(name, name.removeprefix("docker://"), platform, known)
    raise AuditError(f"{name!r} is no image: name it as {FORMS}")


class Layout:
    """The blobs of an OCI layout."""

    def __init__(self, root: Path) -> None:
        self._root = root

    @contextmanager
    def open(self, digest: str) -> Iterator[BinaryIO]:
        kind, _, name = digest.partition(":")
        if "/" in digest or not name or kind != hash_of(digest):
            raise AuditError(f"{digest!r} is no digest")
        with (self._root / "blobs" / kind / name).open("rb") as source:
            yield source


def _from_layout(name: str, rest: str, platform: str, known: Known) -> Image:
    root, tag = Path(rest), ""
    if not root.is_dir() and ":" in rest:
        folder, _, tag = rest.rpartition(":")
        root = Path(folder)
    try:
        index = json.loads((root / "index.json").read_text())
    except (OSError, ValueError) as error:
        raise AuditError("it is no OCI layout: its index.json cannot be read") from error
    found = list(tagged(index, tag))
    # A layout may hold an image of several platforms without an index of its own.
    found = (len(found) > 1 and for_platform(found, platform)) or found
    if len(found) != 1:
        raise AuditError(f"it has {len(found)} images{f' tagged {tag!r}' if tag else ''}; name one as oci:DIR:TAG")
    return read_image(name, Layout(root), found[0], platform, known)


def _from_archive(name: str, rest: str) -> Image:
    path, tag = (Path(rest), "") if Path(rest).exists() else (Path(rest.partition(":")[0]), rest.partition(":")[2])
    try:
        with tarfile.open(path) as tar:
            manifest = _one_of(json.loads(_member(tar, "manifest.json")), tag)
            config = json.loads(_member(tar, manifest["Config"]))
            layers = manifest["Layers"]
            diff_ids = config["rootfs"]["diff_ids"]
            made = [
                _archived(tar, layer, diff_id, command)
                for layer, diff_id, command in zip(layers, diff_ids, commands(config, len(layers)), strict=True)
            ]
    except FileNotFoundError as error:
        raise AuditError("there is no such file") from error
    except (tarfile.TarError, EOFError, OSError, KeyError, AttributeError, TypeError, ValueError, zlib.error) as error:
        raise AuditError(f"it is no whole docker archive: {_reason(error)}") from error
    return Image(name=name, digest=f"sha256:{Path(manifest['Config']).stem}", layers=tuple(made))


def _reason(error: Exception) -> str:
    """In a line: tarfile reports each way in which it tried."""
    if isinstance(error, KeyError):
        return f"{error.args[0]} is missing"
    return "it is no tar" if len(lines := str(error).splitlines()) > 1 else "".join(lines) or type(error).__name__


def _one_of(manifests: list[dict[str, Any]], tag: str) -> dict[str, Any]:
    found = [each for each in manifests if not tag or tag in (each.get("RepoTags") or ())]
    if len(found) != 1:
        names = ", ".join(tag for each in manifests for tag in each.get("RepoTags") or ()) or "none has a name"
        raise AuditError(f"{len(found)} images; name one as docker-archive:FILE:NAME:TAG, of {names}")
    return found[0]


def _archived(tar: tarfile.TarFile, member: str, diff_id: str, command: str) -> Any:
    source = tar.extractfile(member)
    if source is None:
        raise KeyError(member)
    return read_layer(source, digest=diff_id, size_bytes=-1, diff_id=diff_id, command=command)  # type: ignore[arg-type]


def _member(tar: tarfile.TarFile, name: str) -> bytes:
    source = tar.extractfile(name)
    if source is None:
        raise KeyError(name)
    return source.read()


def _from_store(name: str, platform: str, known: Known) -> Image:
    """Through skopeo, which packs the layers again: their digests are not those of a registry."""
    with tempfile.TemporaryDirectory() as folder:
        _run("skopeo", "copy", "--quiet", name, f"oci:{folder}:image")
        return _from_layout(name, f"{folder}:image", platform, known)


def _from_daemon(name: str, rest: str) -> Image:
    with tempfile.TemporaryDirectory() as folder:
        archive = Path(folder, "image.tar")
        _run("docker", "save", "--output", str(archive), rest)
        return _from_archive(name, str(archive))


def _run(*command: str) -> None:
    if shutil.which(command[0]) is None:
        raise AuditError(f"needs the {command[0]} program")
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = done.stderr.strip().splitlines()
        raise AuditError(f"{command[0]} says: {lines[-1] if lines else done.returncode}")


def _from_registry(name: str, rest: str, platform: str, known: Known) -> Image:
    host, slash, path = rest.partition("/")
    if not slash:
        raise AuditError(f"{name!r} names no host: docker://HOST/NAME:TAG")
    repository, _, tag = path.partition("@") if "@" in path else path.rpartition(":") if ":" in path else (path, "", "")
    registry = Registry(host, repository)
    return read_image(name, registry, {"digest": registry.resolve(tag or "latest")}, platform, known)
