"""A server of files and byte ranges on loopback that misbehaves on demand and counts what it sends."""

import hashlib
import json
import socket
import threading
import time
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from urllib.parse import quote, unquote

BLOCK_BYTES = 16 * 1024
SEND_BUFFER_BYTES = 32 * 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """What one answer does wrong. `cut_after`, `stall_after`: so many bytes of the body come; -1 is never."""

    status: int = 0
    retry_after: str = ""
    cut_after: int = -1
    stall_after: int = -1
    flip_at: int = -1
    extra_length: int = 0
    etag: str = ""
    # The file is this from now on.
    body: bytes = b""
    # Comes with the headers of the range that was asked for, but its own length.
    instead: bytes = b""


@dataclass(slots=True)
class File:
    body: bytes | Path
    etag: str
    headers: dict[str, str] = field(default_factory=dict)
    redirect: str = ""
    has_ranges: bool = True
    token: str = ""

    def __len__(self) -> int:
        return len(self.body) if isinstance(self.body, bytes) else self.body.stat().st_size

    def read(self, begin: int, end: int) -> bytes:
        if isinstance(self.body, bytes):
            return self.body[begin:end]
        with self.body.open("rb") as file:
            file.seek(begin)
            return file.read(end - begin)


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    method: str
    path: str
    range: str
    authorization: str


class RangeServer:
    """Use as a context manager. `faults[path]` are used up one by one; `sent_bytes[path]` counts bodies."""

    def __init__(self, host: str = "127.0.0.1", port: int = 0, *, send_buffer_bytes: int = SEND_BUFFER_BYTES) -> None:
        """`send_buffer_bytes`: of each connection, small so that a cut loses little; 0 leaves it to the system."""
        self.send_buffer_bytes = send_buffer_bytes
        self.files: dict[str, File] = {}
        self.faults: dict[str, list[Fault]] = defaultdict(list)
        # For questions about the first byte alone, which are no downloads.
        self.question_faults: dict[str, list[Fault]] = defaultdict(list)
        self.sent_bytes: dict[str, int] = defaultdict(int)
        self.seen: list[Seen] = []
        self.bytes_per_s = 0
        # Where set, a connection is cut after so many bytes, whatever was asked.
        self.cut_every = 0
        self.release = threading.Event()
        self.lock = threading.Lock()
        self._server = _QuietServer((host, port), type("Bound", (_Handler,), {"fake": self}))
        self._server.daemon_threads = True
        self.url = f"http://{host}:{self._server.server_port}"

    def __enter__(self) -> Self:
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        self.release.set()
        self._server.shutdown()
        self._server.server_close()

    def put(self, path: str, body: bytes | Path, **values: Any) -> str:
        """Serve the body at the path; its address."""
        etag = '"' + hashlib.sha256(body if isinstance(body, bytes) else str(body).encode()).hexdigest()[:16] + '"'
        self.files[path] = File(body, values.pop("etag", etag), **values)
        return self.url + quote(path)

    def put_json(self, path: str, data: object) -> str:
        return self.put(path, json.dumps(data).encode(), headers={"Content-Type": "application/json"})

    def total_sent(self) -> int:
        return sum(self.sent_bytes.values())

    def take_fault(self, path: str, *, is_question: bool) -> Fault:
        with self.lock:
            faults = (self.question_faults if is_question else self.faults)[path]
            return faults.pop(0) if faults else Fault()


class _QuietServer(ThreadingHTTPServer):
    def handle_error(self, request: object, client_address: object) -> None:
        """A client that goes away is what these tests are about."""


class _Handler(BaseHTTPRequestHandler):
    fake: RangeServer
    protocol_version = "HTTP/1.1"

    def setup(self) -> None:
        if self.fake.send_buffer_bytes:
            self.request.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, self.fake.send_buffer_bytes)
        self.request.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        super().setup()

    def log_message(self, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = unquote(self.path.split("?")[0])
        seen = Seen(
            method=self.command,
            path=self.path,
            range=self.headers.get("range", ""),
            authorization=self.headers.get("authorization", ""),
        )
        with self.fake.lock:
            self.fake.seen.append(seen)
        file = self.fake.files.get(path)
        if file is None:
            return self._refuse(404)
        if file.token and seen.authorization != f"Bearer {file.token}":
            return self._refuse(401)
        is_question = seen.range == "bytes=0-0" or bool(file.redirect)
        fault = self.fake.take_fault(path, is_question=is_question)
        if fault.status:
            return self._refuse(fault.status, {"Retry-After": fault.retry_after} if fault.retry_after else {})
        if file.redirect:
            return self._refuse(302, {"Location": file.redirect, **file.headers})
        return self._send(path, file, fault)

    def _refuse(self, status: int, headers: Mapping[str, str] = {}) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": "0"}.items():
            self.send_header(name, value)
        self.end_headers()

    def _span(self, file: File, etag: str) -> tuple[int, int] | None:
        asked = self.headers.get("range", "")
        condition = self.headers.get("if-range", "")
        if not file.has_ranges or not asked.startswith("bytes=") or (condition and condition != etag):
            return None
        begin, _, end = asked.removeprefix("bytes=").partition("-")
        return int(begin), min(int(end) + 1 if end else len(file), len(file))

    def _send(self, path: str, file: File, fault: Fault) -> None:
        if fault.etag:
            file.etag = fault.etag
        file.body = fault.body or file.body
        span = self._span(file, file.etag)
        begin, end = span or (0, len(file))
        self.send_response(206 if span else 200)
        self.send_header("Content-Length", str(len(fault.instead) or end - begin + fault.extra_length))
        self.send_header("ETag", file.etag)
        if span:
            self.send_header("Content-Range", f"bytes {begin}-{end - 1}/{len(file) + fault.extra_length}")
        for name, value in file.headers.items():
            self.send_header(name, value)
        self.end_headers()
        if fault.instead:
            self.wfile.write(fault.instead)
        elif self.command == "GET":
            self._send_body(path, file, begin, end, fault)

    def _send_body(self, path: str, file: File, begin: int, end: int, fault: Fault) -> None:
        sent = 0
        while begin + sent < end:
            count = min(BLOCK_BYTES, end - begin - sent)
            for limit in (fault.cut_after, fault.stall_after, self.fake.cut_every or -1):
                if limit >= 0:
                    count = min(count, limit - sent)
            if count <= 0:
                if sent == fault.stall_after:
                    self.fake.release.wait(30)
                self.close_connection = True
                return
            if not self._send_block(path, file, begin + sent, count, fault):
                return
            sent += count
        if fault.extra_length:
            self.close_connection = True

    def _send_block(self, path: str, file: File, at: int, count: int, fault: Fault) -> bool:
        block = bytearray(file.read(at, at + count))
        if at <= fault.flip_at < at + count:
            block[fault.flip_at - at] ^= 0xFF
        try:
            self.wfile.write(block)
        except OSError:
            self.close_connection = True
            return False
        with self.fake.lock:
            self.fake.sent_bytes[path] += count
        if self.fake.bytes_per_s:
            time.sleep(count / self.fake.bytes_per_s)
        return True
