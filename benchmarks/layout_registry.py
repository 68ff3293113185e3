"""A registry (v2 API, pulls only) over an OCI layout on the disk: `python -m benchmarks.layout_registry DIR HOST:PORT`.

Each tag of the layout is an image `HOST:PORT/TAG:latest`. Streams files; keeps nothing.
"""

import json
import re
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

MANIFEST = "application/vnd.oci.image.manifest.v1+json"
TAG = "org.opencontainers.image.ref.name"
_PATH = re.compile(r"/v2/(?P<name>[^/]+)/(?P<what>manifests|blobs)/(?P<reference>[^/]+)")
CHUNK_BYTES = 1 << 20


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    layout: Path

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def log_message(self, *_: object) -> None:
        pass

    def _answer(self, *, with_body: bool) -> None:
        found = _PATH.fullmatch(self.path)
        digest = self._digest(found) if found else ""
        path = self.layout / "blobs" / digest.replace(":", "/")
        if self.path == "/v2/":
            self._head(200, "application/json", "", 0)
        elif not found or not digest or not path.is_file():
            self._head(404, "application/json", "", 0)
        else:
            kind = MANIFEST if found["what"] == "manifests" else "application/octet-stream"
            self._head(200, kind, digest, path.stat().st_size)
            if with_body:
                self._send(path)

    def _digest(self, found: re.Match[str]) -> str:
        if found["reference"].startswith("sha256:"):
            return found["reference"]
        index = json.loads((self.layout / "index.json").read_text())
        tags = {each.get("annotations", {}).get(TAG): each["digest"] for each in index["manifests"]}
        return str(tags.get(found["name"], ""))

    def _head(self, status: int, kind: str, digest: str, size: int) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(size))
        self.send_header("Docker-Distribution-Api-Version", "registry/2.0")
        if digest:
            self.send_header("Docker-Content-Digest", digest)
        self.end_headers()

    def _send(self, path: Path) -> None:
        with path.open("rb") as file:
            while chunk := file.read(CHUNK_BYTES):
                self.wfile.write(chunk)


def serve(layout: Path, host: str, port: int) -> ThreadingHTTPServer:
    return ThreadingHTTPServer((host, port), type("LayoutHandler", (Handler,), {"layout": layout}))


if __name__ == "__main__":
    folder, address = sys.argv[1:]
    host, _, port = address.rpartition(":")
    serve(Path(folder), host, int(port)).serve_forever()
