"""A hub that speaks the Hugging Face API and a Civitai-like site, out of a RangeServer."""

import hashlib
import json
import struct
from collections.abc import Mapping
from typing import Any

from tests.fakes.range_server import RangeServer

COMMIT = "c0ffee" + "0" * 34
LFS_FROM_BYTES = 1024


def put_repository(
    server: RangeServer, repo: str, files: Mapping[str, bytes], *, commit: str = COMMIT, token: str = ""
) -> None:
    """The repository at its main branch and at the commit; bigger files lie behind a redirect, as on the hub."""
    rows = [_row(path, body) for path, body in files.items()]
    answer = {"id": repo, "modelId": repo, "sha": commit, "siblings": rows, "tags": ["license:mit"], "private": False}
    for revision in ("main", commit):
        server.put_json(f"/api/models/{repo}/revision/{revision}", answer)
        server.put_json(f"/api/models/{repo}/tree/{revision}", [_tree_row(path, body) for path, body in files.items()])
        server.files[f"/api/models/{repo}/revision/{revision}"].token = token
        for path, body in files.items():
            _put_file(server, f"/{repo}/resolve/{revision}/{path}", body, commit, token)
    server.put_json(f"/api/models/{repo}", answer)


def _row(path: str, body: bytes) -> dict[str, Any]:
    row: dict[str, Any] = {"rfilename": path, "size": len(body), "blobId": _git_blob(body)}
    if len(body) >= LFS_FROM_BYTES:
        row["lfs"] = {"sha256": hashlib.sha256(body).hexdigest(), "size": len(body), "pointerSize": 134}
    return row


def _tree_row(path: str, body: bytes) -> dict[str, Any]:
    row: dict[str, Any] = {"type": "file", "path": path, "size": len(body), "oid": _git_blob(body)}
    if len(body) >= LFS_FROM_BYTES:
        row["lfs"] = {"oid": hashlib.sha256(body).hexdigest(), "size": len(body), "pointerSize": 134}
    return row


def _put_file(server: RangeServer, path: str, body: bytes, commit: str, token: str) -> None:
    headers = {"X-Repo-Commit": commit}
    if len(body) < LFS_FROM_BYTES:
        server.put(path, body, headers=headers, etag=f'"{_git_blob(body)}"', token=token)
        return
    sha256 = hashlib.sha256(body).hexdigest()
    there = f"/cdn/{sha256}"
    server.put(there, body, etag=f'"{sha256}"')
    linked = {**headers, "X-Linked-Etag": f'"{sha256}"', "X-Linked-Size": str(len(body)), "ETag": f'"{sha256}"'}
    # Another name of the same machine is another origin.
    elsewhere = server.url.replace("127.0.0.1", "localhost") + there + "?signature=secret"
    server.put(path, b"", headers=linked, redirect=elsewhere, token=token)


def _git_blob(body: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(body) + body).hexdigest()


def put_civitai_version(server: RangeServer, model: int, version: int, files: Mapping[str, bytes]) -> None:
    rows = []
    for number, (name, body) in enumerate(files.items(), start=1):
        path = f"/api/download/models/{version}-{number}"
        server.put(f"/bucket/{version}/{name}", body)
        server.put(path, b"", redirect=server.url.replace("127.0.0.1", "localhost") + f"/bucket/{version}/{name}")
        sha256 = hashlib.sha256(body).hexdigest().upper()
        row = {"id": number, "name": name, "type": "Model", "sizeKB": len(body) / 1024, "hashes": {"SHA256": sha256}}
        rows.append({**row, "downloadUrl": server.url + path})
    version_answer = {"id": version, "modelId": model, "model": {"type": "LORA", "name": "Style"}, "files": rows}
    server.put_json(f"/api/v1/model-versions/{version}", version_answer)
    server.put_json(f"/api/v1/models/{model}", {"id": model, "modelVersions": [{"id": version}]})


def safetensors(tensors: Mapping[str, bytes], *, metadata: Mapping[str, str] | None = None, dtype: str = "U8") -> bytes:
    """A safetensors file of plain bytes, or of F16, in the order given."""
    width = {"U8": 1, "F16": 2}[dtype]
    rows: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    at = 0
    for name, body in tensors.items():
        rows[name] = {"dtype": dtype, "shape": [len(body) // width], "data_offsets": [at, at + len(body)]}
        at += len(body)
    header = json.dumps(rows).encode()
    return struct.pack("<Q", len(header)) + header + b"".join(tensors.values())
