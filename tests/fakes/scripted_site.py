"""A server on loopback whose every answer is decided by a function; it counts what it sends."""

import contextlib
import re
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any, Self

Answer = Callable[["Request"], None]


class Request(BaseHTTPRequestHandler):
    """One request; `answer` calls one of the `send` methods. Headers are written with _ for -; None is none."""

    protocol_version = "HTTP/1.1"
    site: "ScriptedSite"

    def do_GET(self) -> None:
        with self.site.lock:
            self.site.asked.append(self.path)
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self.site.answer(self)

    def span(self, size: int) -> tuple[int, int] | None:
        """The range that was asked for; None if there was none."""
        found = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("range", ""))
        return (int(found[1]), min(int(found[2] or size) + 1, size)) if found else None

    def send(self, status: int, body: bytes = b"", **headers: Any) -> None:
        self.send_response(status)
        for name, value in headers.items():
            if value is not None:
                self.send_header(name.replace("_", "-"), str(value))
        if not {"Content_Length", "Transfer_Encoding"} & set(headers):
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
        with self.site.lock:
            self.site.sent_bytes += len(body)

    def send_range(self, body: bytes, *, total: str = "", **headers: Any) -> None:
        """As a plain file server does. `total`: in place of the length in Content-Range."""
        span = self.span(len(body))
        if span is None:
            return self.send(200, body, **headers)
        begin, end = span
        said = f"bytes {begin}-{end - 1}/{total or len(body)}"
        return self.send(206, body[begin:end], Content_Range=said, **headers)

    def send_chunked(self, status: int, body: bytes, **headers: Any) -> None:
        framed = b"%x\r\n%s\r\n0\r\n\r\n" % (len(body), body) if body else b"0\r\n\r\n"
        self.send(status, framed, Transfer_Encoding="chunked", **headers)

    def send_cut(self, body: bytes, count: int, **headers: Any) -> None:
        """All of the body is said to come, `count` bytes do."""
        self.send(200, body[:count], Content_Length=len(body), **headers)
        self.close_connection = True

    def log_message(self, *args: object) -> None:
        pass


class ScriptedSite:
    """Use as a context manager. `asked`: paths in order; `sent_bytes`: of bodies."""

    def __init__(self, answer: Answer) -> None:
        self.answer = answer
        self.asked: list[str] = []
        self.sent_bytes = 0
        self.lock = threading.Lock()
        self._server = _QuietServer(("127.0.0.1", 0), type("Bound", (Request,), {"site": self}))
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> Self:
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        self._server.shutdown()
        self._server.server_close()


class _QuietServer(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that goes away is what these tests are about."""
