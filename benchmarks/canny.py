"""Canny, bytes in to bytes out, 512 x 512: our preprocessor over gRPC against the one that it replaces over HTTP.

Both are processes of their own with their own defaults, asked by one client over a kept connection on loopback, in
turns of ten calls, so that both are warm. Compares what the client waits, what each service says that it took from
decoding to encoding, the CPU time of both ends, and how many calls a second eight clients get through. With
`--asyncio` also of ours on asyncio's own event loop instead of uvloop. Also our kernel against cv2.Canny alone, on one
thread; its name says whether canny's loop in C was compiled.
Needs `.[benchmarks]`. Run: `python -m benchmarks.canny [--rounds 15] [--format PNG] [--asyncio]`.
"""

import http.client
import io
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeAlias

import cv2
import grpc
import numpy as np
from PIL import Image

from benchmarks.figures import Report, arguments, in_turns
from benchmarks.serving import cpu_s, served
from fanlight.channel import channel_options
from fanlight.common.v1 import common_pb2
from fanlight.preprocessor.v1 import preprocessor_pb2, preprocessor_pb2_grpc
from services.preprocessor.annotators.canny import LIBRARY
from services.preprocessor.registry import core

PHOTO = Path(__file__).parents[1] / "demo" / "photos" / "coffee.jpg"
SIDE_PX = 512
# Calls of one side before it is the other's turn; the first turn of each is not counted.
TURN_CALLS = 10
CLIENTS = 8
OURS = ("-m", "services.preprocessor")
ON_ASYNCIO = """
import asyncio, runpy, uvloop
uvloop.run = asyncio.run
runpy.run_module("services.preprocessor", run_name="__main__")
"""
# The image, and what the service says that it took from decoding to encoding, in seconds.
Answer: TypeAlias = tuple[bytes, float]
Ask: TypeAlias = Callable[[bytes], Answer]


def photo(kind: str = "JPEG") -> bytes:
    stream = io.BytesIO()
    Image.open(PHOTO).resize((SIDE_PX, SIDE_PX), Image.Resampling.LANCZOS).save(stream, kind, quality=92)
    return stream.getvalue()


@dataclass(kw_only=True)
class Side:
    """One service, and what was measured of it: a value for every turn of calls."""

    pid: int
    # A connection of its own for each caller, closed with the stack.
    connect: Callable[[ExitStack], Ask]
    kept: ExitStack
    waited_s: list[float] = field(default_factory=list)
    inside_s: list[float] = field(default_factory=list)
    cpu_s: list[float] = field(default_factory=list)
    per_s: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.ask = self.connect(self.kept)

    def turn(self, data: bytes) -> None:
        """One client, one call after another."""
        waited_s, inside_s = [], []
        server_s, client_s = cpu_s(self.pid), time.process_time()
        for _ in range(TURN_CALLS):
            start_s = time.perf_counter()
            inside_s.append(self.ask(data)[1])
            waited_s.append(time.perf_counter() - start_s)
        spent_s = cpu_s(self.pid) - server_s + time.process_time() - client_s
        self.waited_s.append(statistics.median(waited_s))
        self.inside_s.append(statistics.median(inside_s))
        self.cpu_s.append(spent_s / TURN_CALLS)

    def crowd(self, data: bytes) -> None:
        """Several clients at once, each on its own connection."""

        def calls(ask: Ask) -> None:
            for _ in range(TURN_CALLS):
                ask(data)

        # Closed again: waitress takes no more than a hundred connections.
        with ExitStack() as stack, ThreadPoolExecutor(CLIENTS) as threads:
            asks = [self.connect(stack) for _ in range(CLIENTS)]
            for ask in asks:
                ask(data)
            begin_s = time.perf_counter()
            list(threads.map(calls, asks))
            self.per_s.append(CLIENTS * TURN_CALLS / (time.perf_counter() - begin_s))


def ours(stack: ExitStack, *what: str) -> Side:
    pid, address = stack.enter_context(served(*what, FANLIGHT_PREPROCESSOR_GRPC="127.0.0.1:0"))

    def connect(stack: ExitStack) -> Ask:
        # Channels with equal options would share one connection.
        options = [*channel_options(), ("grpc.use_local_subchannel_pool", 1)]
        channel = stack.enter_context(grpc.insecure_channel(address, options=options))
        stub = preprocessor_pb2_grpc.PreprocessorServiceStub(channel)

        def ask(data: bytes) -> Answer:
            request = preprocessor_pb2.AnnotateRequest(annotator="canny", image=common_pb2.ImageSource(data=data))
            answer = stub.Annotate(request)
            return answer.image, sum(span.duration_s for span in answer.spans)

        return ask

    return Side(pid=pid, connect=connect, kept=stack)


def replaced(stack: ExitStack) -> Side:
    pid, address = stack.enter_context(served("-m", "benchmarks.replaced_preprocessor"))

    def connect(stack: ExitStack) -> Ask:
        connection = http.client.HTTPConnection(address)
        stack.callback(connection.close)

        def ask(data: bytes) -> Answer:
            connection.request("POST", "/image/canny", body=data, headers={"Content-Type": "application/octet-stream"})
            answer = connection.getresponse()
            assert answer.status == http.HTTPStatus.OK
            return answer.read(), float(answer.headers["X-Request-Time"])

        return ask

    return Side(pid=pid, connect=connect, kept=stack)


def services(data: bytes, rounds: int, kind: str, report: Report, *, on_asyncio: bool) -> None:
    with ExitStack() as stack:
        theirs, own = replaced(stack), ours(stack, *OURS)
        check(theirs.ask(data)[0], own.ask(data)[0])
        sides = {"": own, "on asyncio": ours(stack, "-c", ON_ASYNCIO)} if on_asyncio else {"": own}
        for turn in range(rounds + 1):
            for side in (theirs, *sides.values()):
                side.turn(data)
                side.crowd(data)
                if not turn:
                    # The first turn starts threads and fills caches.
                    side.waited_s, side.inside_s, side.cpu_s, side.per_s = [], [], [], []
    peer = "the replaced service: Flask, controlnet_aux, lossless WebP at Pillow's default"
    for name, side in sides.items():
        what = f"canny, 512 x 512, {kind} in{', ' + name if name else ''}"
        goal = 0.25 if kind == "JPEG" and not name else None
        report.ratio(f"{what}, what a client waits", side.waited_s, theirs.waited_s, against=peer, goal=goal)
        report.ratio(f"{what}, from decoding to encoding", side.inside_s, theirs.inside_s, against=peer)
        report.ratio(f"{what}, CPU of both ends", side.cpu_s, theirs.cpu_s, against=peer)
        report.ratio(f"{what}, requests per second of {CLIENTS} clients", side.per_s, theirs.per_s, against=peer)


def check(theirs: bytes, own: bytes) -> None:
    ours_map, their_map = (np.asarray(Image.open(io.BytesIO(data)).convert("RGB")) for data in (own, theirs))
    assert np.array_equal(ours_map, their_map), "the maps differ"
    print(f"bytes out: ours {len(own)}, replaced {len(theirs)}; the maps are equal")


def kernels(data: bytes, rounds: int, report: Report) -> None:
    cv2.setNumThreads(1)
    canny = core().get("canny")
    values = {parameter.name: parameter.default for parameter in canny.parameters}
    pixels = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))

    def turn(run: Callable[[], object]) -> Callable[[], float]:
        def measured() -> float:
            start_s = time.process_time()
            for _ in range(TURN_CALLS):
                run()
            return time.process_time() - start_s

        return measured

    own, theirs = in_turns(rounds, turn(lambda: canny(pixels, **values)), turn(lambda: cv2.Canny(pixels, 100, 200)))
    how = "with" if LIBRARY.exists() else "without"
    what = f"our canny kernel {how} its loop in C, CPU on one thread"
    report.ratio(what, own, theirs, against="`cv2.Canny` on the same array", goal=1.3)


def main(argv: Sequence[str] | None = None) -> int:
    parser = arguments(__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--format", choices=("JPEG", "PNG"), default="JPEG")
    parser.add_argument("--asyncio", action="store_true", help="ours on asyncio's own event loop too")
    asked = parser.parse_args(argv)
    rounds = 1 if asked.smoke else asked.rounds
    data, report = photo(asked.format), Report()
    print(f"{asked.format}, {len(data)} bytes in")
    services(data, rounds, asked.format, report, on_asyncio=asked.asyncio)
    kernels(data, rounds, report)
    report.save(asked.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
