"""One file as a hub, and any HTTP server, gives it; every connection is cut now and then. For benchmarks of links.

Run: `python -m benchmarks.link_server FILE SHA256 --address 198.18.0.2 --port 8080 --cut-s 5`; `/cut?s=5` changes it.
"""

import argparse
import os
import socket
import struct
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

BLOCK_BYTES = 64 * 1024
NICER = 10
PATH = "/org/m/resolve/main/model.bin"
COMMIT = "c0ffee" + "0" * 34
# Closing sends a reset and throws away what was not sent.
_AT_ONCE = struct.pack("ii", 1, 0)


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, address: tuple[str, int], file: Path, sha256: str) -> None:
        super().__init__(address, _Handler)
        self.file, self.sha256, self.size = file, sha256, file.stat().st_size
        # Counts the cuts: a connection that began before the latest must end.
        self.cuts = 0
        self.open: set[socket.socket] = set()

    def handle_error(self, request: object, client_address: object) -> None:
        """Clients whose connections are cut are what this is about."""

    def cut(self) -> None:
        self.cuts += 1
        for each in list(self.open):
            try:
                each.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _AT_ONCE)
                each.shutdown(socket.SHUT_RD)
            except OSError:
                continue


class _Handler(BaseHTTPRequestHandler):
    server: Server
    protocol_version = "HTTP/1.1"

    def setup(self) -> None:
        self.request.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.server.open.add(self.request)
        super().setup()

    def finish(self) -> None:
        self.server.open.discard(self.request)
        super().finish()

    def log_message(self, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        if self.path.split("?")[0] != PATH:
            self.send_error(404)
            return
        size = self.server.size
        asked = self.headers.get("range", "").removeprefix("bytes=")
        begin, _, last = asked.partition("-")
        first, end = int(begin or 0), min(int(last) + 1 if last else size, size)
        if first >= size:
            self.send_error(416)
            return
        self.send_response(206 if asked else 200)
        etag = f'"{self.server.sha256}"'
        headers = {
            "Content-Length": end - first,
            "Accept-Ranges": "bytes",
            "ETag": etag,
            "X-Linked-Etag": etag,
            "X-Linked-Size": size,
            "X-Repo-Commit": COMMIT,
        }
        if asked:
            headers["Content-Range"] = f"bytes {first}-{end - 1}/{size}"
        for name, value in headers.items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.command == "GET":
            self._send(first, end)

    def _send(self, at: int, end: int) -> None:
        cuts = self.server.cuts
        with self.server.file.open("rb") as file:
            while at < end:
                if self.server.cuts != cuts:
                    self.close_connection = True
                    # Now, for the reader's and the writer's ends keep it open otherwise.
                    self.request.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _AT_ONCE)
                    os.close(self.request.detach())
                    return
                at += os.sendfile(self.request.fileno(), file.fileno(), at, min(BLOCK_BYTES, end - at))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", type=Path)
    parser.add_argument("sha256")
    parser.add_argument("--address", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8080)
    parser.add_argument("--cut-s", type=float, default=0)
    arguments = parser.parse_args()
    # As fast as a machine of its own would be.
    os.nice(-NICER)
    server = Server((arguments.address, arguments.port), arguments.file, arguments.sha256)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    print("ready", flush=True)
    while True:
        time.sleep(arguments.cut_s or 3600)
        server.cut()


if __name__ == "__main__":
    main()
