"""A web server on loopback whose every answer is a function's: for servers that are odd in a way of their own."""

import contextlib
import re
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Self

Answer = Callable[["Request", "ScriptedSite"], None]


class Request(BaseHTTPRequestHandler):
    """One request; `span` is the range that it asks for, None for all of the file."""

    protocol_version = "HTTP/1.1"
    site: "ScriptedSite"

    @property
    def span(self) -> tuple[int, int | None] | None:
        found = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("range", ""))
        return (int(found[1]), int(found[2]) + 1 if found[2] else None) if found else None

    def do_GET(self) -> None:
        with self.site.lock:
            self.site.asked.append(self.path)
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self.site.answer(self, self.site)

    def do_PUT(self) -> None:
        self.do_GET()

    def send(self, status: int, body: bytes = b"", **headers: str) -> None:
        """Names of headers are written with _ for -; `Content_Length=""` leaves that one out and ends by closing."""
        self.send_response(status)
        headers = {"Content_Length": str(len(body)), **headers}
        if not headers["Content_Length"]:
            del headers["Content_Length"]
            headers["Connection"] = "close"
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.write(body)

    def write(self, body: bytes) -> None:
        self.wfile.write(body)
        with self.site.lock:
            self.site.sent_bytes += len(body)

    def send_chunked(self, body: bytes, **headers: str) -> None:
        self.send_response(200)
        for name, value in {**headers, "Transfer_Encoding": "chunked"}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.write(b"%x\r\n%s\r\n0\r\n\r\n" % (len(body), body))

    def send_file(self, body: bytes, *, total: str = "", at_most: int = 0, **headers: str) -> None:
        """The range that was asked for, or all. `total` in its place in Content-Range; `at_most` bytes of a range."""
        if self.span is None:
            self.send(200, body, **headers)
            return
        begin, end = self.span
        end = min(end or len(body), len(body), begin + (at_most or len(body)))
        self.send(206, body[begin:end], Content_Range=f"bytes {begin}-{end - 1}/{total or len(body)}", **headers)

    def cut(self) -> None:
        self.close_connection = True
        with contextlib.suppress(OSError):
            self.connection.shutdown(2)

    def log_message(self, *args: object) -> None:
        pass


class ScriptedSite:
    """Use as a context manager. `answer` may be replaced at any time; `asked`: paths in order."""

    def __init__(self, answer: Answer) -> None:
        self.answer = answer
        self.asked: list[str] = []
        self.sent_bytes = 0
        self.lock = threading.Lock()
        self._server = _Server(("127.0.0.1", 0), type("Bound", (Request,), {"site": self}))
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> Self:
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        self._server.shutdown()
        self._server.server_close()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that goes away is no error here."""
