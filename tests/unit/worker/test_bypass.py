"""Direct uploads and downloads: which answers of a storage mean that it has the bytes."""

import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from fanlight.errors import NodeFault
from services.worker.blobs import download, upload

DATA = b"bytes" * 1000


@pytest.fixture
def storage() -> Iterator[Callable[[int], str]]:
    """An address that answers with the status, and with the bytes where it is asked for them."""
    running: list[HTTPServer] = []

    def start(status: int) -> str:
        class Handler(BaseHTTPRequestHandler):
            def do_PUT(self) -> None:
                assert self.rfile.read(int(self.headers["content-length"])) == DATA
                self.send_response(status)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def do_GET(self) -> None:
                self.send_response(status)
                self.send_header("Content-Length", str(len(DATA)))
                self.end_headers()
                self.wfile.write(DATA)

            def log_message(self, *_: object) -> None:
                pass

        server = HTTPServer(("127.0.0.1", 0), Handler)
        running.append(server)
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        return f"http://127.0.0.1:{server.server_port}/bucket/key?signature=1"

    yield start
    for server in running:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize("status", [200, 201, 204])
async def test_bytes_that_the_storage_took_are_there(storage: Callable[[int], str], status: int) -> None:
    await upload(storage(status), {}, DATA)


async def test_bytes_that_the_storage_has_already_are_there_too(storage: Callable[[int], str]) -> None:
    await upload(storage(412), {"if-none-match": "*"}, DATA)


@pytest.mark.parametrize("status", [301, 400, 403, 409, 411, 413, 500, 503])
async def test_any_other_answer_means_that_they_are_not(storage: Callable[[int], str], status: int) -> None:
    with pytest.raises(NodeFault, match=f"refused with {status}"):
        await upload(storage(status), {}, DATA)


@pytest.mark.parametrize("status", [201, 206, 304, 403, 404, 500])
async def test_nothing_is_taken_from_an_answer_that_is_not_the_whole_blob(
    storage: Callable[[int], str], status: int
) -> None:
    taken: list[bytes] = []
    with pytest.raises(NodeFault, match=f"refused with {status}"):
        await download(storage(status), taken.append)
    assert taken == []


async def test_a_whole_blob_comes_as_it_is(storage: Callable[[int], str]) -> None:
    taken: list[bytes] = []
    await download(storage(200), taken.append)
    assert b"".join(taken) == DATA
