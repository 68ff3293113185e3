"""Container images made by hand: OCI layouts and docker archives of given files."""

import gzip
import hashlib
import io
import json
import tarfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

OCI = "application/vnd.oci.image"


@dataclass(frozen=True)
class Link:
    """A symbolic link, or a hard one."""

    target: str
    hard: bool = False


Files = Mapping[str, bytes | Link]


def tar_of(files: Files) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            if isinstance(content, Link):
                member.type = tarfile.LNKTYPE if content.hard else tarfile.SYMTYPE
                member.linkname = content.target
                tar.addfile(member)
            else:
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    return out.getvalue()


def sha256(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


class OciLayout:
    """Write images into a folder, then name them as `oci:{folder}:{tag}`."""

    def __init__(self, root: Path) -> None:
        self.root = root
        (root / "blobs" / "sha256").mkdir(parents=True)
        (root / "oci-layout").write_text('{"imageLayoutVersion": "1.0.0"}')
        self._manifests: list[dict[str, Any]] = []

    def blob(self, digest: str) -> Path:
        return self.root / "blobs" / digest.replace(":", "/")

    def put(self, data: bytes) -> str:
        digest = sha256(data)
        self.blob(digest).write_bytes(data)
        return digest

    def add(
        self,
        tag: str,
        layers: Sequence[Files],
        *,
        pack: Callable[[bytes], bytes] = lambda tar: gzip.compress(tar, mtime=0),
        change: Callable[[dict[str, Any]], None] = lambda manifest: None,
    ) -> str:
        """The image's name. `change` may spoil the manifest before it is written."""
        tars = [tar_of(files) for files in layers]
        packed = [pack(tar) for tar in tars]
        config = self.put(json.dumps({"rootfs": {"diff_ids": [sha256(tar) for tar in tars]}}).encode())
        manifest: dict[str, Any] = {
            "schemaVersion": 2,
            "config": {
                "mediaType": f"{OCI}.config.v1+json",
                "digest": config,
                "size": self.blob(config).stat().st_size,
            },
            "layers": [
                {"mediaType": f"{OCI}.layer.v1.tar+gzip", "digest": self.put(blob), "size": len(blob)}
                for blob in packed
            ],
        }
        change(manifest)
        self.tag(tag, self.put(json.dumps(manifest).encode()))
        return f"oci:{self.root}:{tag}"

    def tag(self, tag: str, digest: str) -> None:
        annotations = {"org.opencontainers.image.ref.name": tag}
        blob = self.blob(digest)
        size = blob.stat().st_size if blob.exists() else 0
        kind = f"{OCI}.manifest.v1+json"
        self._manifests.append({"mediaType": kind, "digest": digest, "size": size, "annotations": annotations})
        (self.root / "index.json").write_text(json.dumps({"schemaVersion": 2, "manifests": self._manifests}))


def docker_archive(path: Path, layers: Sequence[Files]) -> str:
    """As `docker save` writes it: bare tars."""
    tars = [tar_of(files) for files in layers]
    config = json.dumps({"rootfs": {"diff_ids": [sha256(tar) for tar in tars]}}).encode()
    names = [f"{sha256(tar)[7:]}/layer.tar" for tar in tars]
    manifest = [{"Config": f"{sha256(config)[7:]}.json", "RepoTags": ["it:latest"], "Layers": names}]
    members = {manifest[0]["Config"]: config, "manifest.json": json.dumps(manifest).encode()}
    path.write_bytes(tar_of({**members, **dict(zip(names, tars, strict=True))}))
    return f"docker-archive:{path}"
