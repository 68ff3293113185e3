"""A proxy on loopback that speaks HTTP (forwarding, CONNECT) and SOCKS5, and leads every name to one address."""

import base64
import socket
import socketserver
import struct
import threading
from types import TracebackType
from typing import Any, Self
from urllib.parse import urlsplit

Place = tuple[str, int]


class FakeProxy:
    """Use as a context manager. `asked`: what it was asked to connect to. `login`: `user:password` that it wants.

    `names` says where a host leads; any other host leads to its own address if it is one.
    """

    def __init__(self, *, login: str = "", refuses: int = 0) -> None:
        self.login = login
        self.refuses = refuses
        self.names: dict[str, Place] = {}
        self.asked: list[str] = []
        self._server = _Server(("127.0.0.1", 0), type("Bound", (_Handler,), {"fake": self}))
        self.place = f"127.0.0.1:{self._server.server_address[1]}"

    def url(self, scheme: str = "http") -> str:
        return f"{scheme}://{self.login + '@' if self.login else ''}{self.place}"

    def lead(self, host: str, url: str) -> None:
        parts = urlsplit(url)
        self.names[host] = (parts.hostname or "", parts.port or 80)

    def __enter__(self) -> Self:
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        self._server.shutdown()
        self._server.server_close()


class _Server(socketserver.ThreadingTCPServer):
    daemon_threads = True
    allow_reuse_address = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that goes away is no error of the proxy."""


class _Handler(socketserver.StreamRequestHandler):
    fake: FakeProxy

    def handle(self) -> None:
        first = self.rfile.peek(1)[:1]
        if first == b"\x05":
            self._socks()
        elif first:
            self._http()

    def _http(self) -> None:
        line = self.rfile.readline().decode().split()
        headers = []
        while (header := self.rfile.readline().strip()) != b"":
            headers.append(header)
        self.fake.asked.append(line[1])
        wanted = b"proxy-authorization: basic " + base64.b64encode(self.fake.login.encode()).lower()
        if self.fake.login and wanted not in [each.lower() for each in headers]:
            self.wfile.write(b"HTTP/1.1 407 Proxy Authentication Required\r\ncontent-length: 0\r\n\r\n")
        elif self.fake.refuses:
            self.wfile.write(b"HTTP/1.1 %d No\r\ncontent-length: 0\r\n\r\n" % self.fake.refuses)
        elif line[0] == "CONNECT":
            host, _, port = line[1].rpartition(":")
            with self._dial(host.strip("[]"), int(port)) as there:
                self.wfile.write(b"HTTP/1.1 200 Connection established\r\n\r\n")
                self._relay(there)
        else:
            parts = urlsplit(line[1])
            target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
            kept = [each for each in headers if not each.lower().startswith((b"proxy-", b"connection"))]
            with self._dial(parts.hostname or "", parts.port or 80) as there:
                head = [f"{line[0]} {target} HTTP/1.1".encode(), *kept, b"Connection: close", b"", b""]
                there.sendall(b"\r\n".join(head))
                self._relay(there)

    def _socks(self) -> None:
        methods = self.rfile.read(self.rfile.read(2)[1])
        method = 2 if self.fake.login else 0
        self.wfile.write(bytes([5, method if method in methods else 255]))
        if self.fake.login:
            self.rfile.read(1)
            user, password = (self.rfile.read(self.rfile.read(1)[0]).decode() for _ in range(2))
            self.wfile.write(bytes([1, f"{user}:{password}" != self.fake.login]))
        kind = self.rfile.read(4)[3]
        if kind == 3:
            host = self.rfile.read(self.rfile.read(1)[0]).decode()
        else:
            host = socket.inet_ntop(*((socket.AF_INET, self.rfile.read(4)) if kind == 1 else (10, self.rfile.read(16))))
        [port] = struct.unpack(">H", self.rfile.read(2))
        self.fake.asked.append(f"{host}:{port}")
        if self.fake.refuses:
            self.wfile.write(b"\x05\x02\x00\x01" + bytes(6))
            return
        with self._dial(host, port) as there:
            self.wfile.write(b"\x05\x00\x00\x01" + bytes(6))
            self._relay(there)

    def _dial(self, host: str, port: int) -> socket.socket:
        return socket.create_connection(self.fake.names.get(host, (host, port)), timeout=10)

    def _relay(self, there: socket.socket) -> None:
        there.settimeout(None)
        back = threading.Thread(target=_copy, args=(there.recv, self.connection), daemon=True)
        back.start()
        _copy(self.rfile.read1, there)
        back.join()


def _copy(read: Any, sink: socket.socket) -> None:
    try:
        while data := read(64 * 1024):
            sink.sendall(data)
        sink.shutdown(socket.SHUT_WR)
    except OSError:
        # The other end is gone; so is the reason to go on.
        return
