"""Canny, bytes in to bytes out, 512 x 512: our preprocessor over gRPC against the one that it replaces over HTTP.

Both are processes of their own with their own defaults, asked by one client over a kept connection on loopback, in
turns of ten calls, so that both are warm. Prints medians of what the client waits, of what each service says that it
took from decoding to encoding, and the CPU time of both ends. With `--asyncio` also of ours on asyncio's own event loop
instead of uvloop. Also our kernel against cv2.Canny alone, on one thread. Says whether canny's loop in C was compiled.
Needs `.[benchmarks]`. Run: `python -m benchmarks.canny [--rounds 15] [--format PNG] [--asyncio]`.
"""

import argparse
import http.client
import io
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeAlias

import cv2
import grpc
import numpy as np
import psutil
from PIL import Image

from fanlight.channel import channel_options
from fanlight.common.v1 import common_pb2
from fanlight.preprocessor.v1 import preprocessor_pb2, preprocessor_pb2_grpc
from services.preprocessor.annotators.gradient import LIBRARY
from services.preprocessor.registry import core

PHOTO = Path(__file__).parents[1] / "demo" / "photos" / "coffee.jpg"
SIDE_PX = 512
# Calls of one side before it is the other's turn; the first turn of each is not counted.
TURN_CALLS = 10
END_LIMIT_S = 30.0
OURS = ("-m", "services.preprocessor")
ON_ASYNCIO = """
import asyncio, runpy, uvloop
uvloop.run = asyncio.run
runpy.run_module("services.preprocessor", run_name="__main__")
"""
# The image, and what the service says that it took from decoding to encoding, in seconds.
Answer: TypeAlias = tuple[bytes, float]


def photo(kind: str = "JPEG") -> bytes:
    stream = io.BytesIO()
    Image.open(PHOTO).resize((SIDE_PX, SIDE_PX), Image.Resampling.LANCZOS).save(stream, kind, quality=92)
    return stream.getvalue()


@contextmanager
def served(*what: str) -> Iterator[tuple[psutil.Process, str]]:
    """A process of ours that says where it is ready; its address."""
    settings = {name: value for name, value in os.environ.items() if not name.startswith("FANLIGHT_")}
    settings["FANLIGHT_PREPROCESSOR_GRPC"] = "127.0.0.1:0"
    command = [sys.executable, "-W", "ignore", *what]
    with subprocess.Popen(
        command, env=settings, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as served:
        assert served.stdout is not None
        ready = served.stdout.readline()
        assert ready.startswith("ready "), f"{what[1]} did not start"
        try:
            yield psutil.Process(served.pid), ready.partition("=")[2].strip()
        finally:
            served.terminate()
            served.wait(END_LIMIT_S)


@dataclass(kw_only=True)
class Side:
    process: psutil.Process
    ask: Callable[[bytes], Answer]
    waited_s: list[float] = field(default_factory=list)
    inside_s: list[float] = field(default_factory=list)
    client_cpu_s: float = 0.0
    server_start_s: float = 0.0

    def start(self, data: bytes) -> None:
        for _ in range(TURN_CALLS):
            self.ask(data)
        self.server_start_s = self._server_cpu_s()

    def turn(self, data: bytes) -> None:
        for _ in range(TURN_CALLS):
            self._call(data)

    def _call(self, data: bytes) -> None:
        start_s, cpu_start_s = time.perf_counter(), time.process_time()
        _, inside_s = self.ask(data)
        self.waited_s.append(time.perf_counter() - start_s)
        self.inside_s.append(inside_s)
        self.client_cpu_s += time.process_time() - cpu_start_s

    def cpu_s(self) -> float:
        """Of a call, at both ends."""
        return (self._server_cpu_s() - self.server_start_s + self.client_cpu_s) / len(self.waited_s)

    def _server_cpu_s(self) -> float:
        times = self.process.cpu_times()
        return times.user + times.system


def ours(stack: ExitStack, *what: str) -> Side:
    process, address = stack.enter_context(served(*what))
    channel = stack.enter_context(grpc.insecure_channel(address, options=channel_options()))
    stub = preprocessor_pb2_grpc.PreprocessorServiceStub(channel)

    def ask(data: bytes) -> Answer:
        request = preprocessor_pb2.AnnotateRequest(annotator="canny", picture=common_pb2.Picture(data=data))
        answer = stub.Annotate(request)
        return answer.image, sum(span.duration_s for span in answer.spans)

    return Side(process=process, ask=ask)


def replaced(stack: ExitStack) -> Side:
    process, address = stack.enter_context(served("-m", "benchmarks.replaced_preprocessor"))
    connection = http.client.HTTPConnection(address)
    stack.callback(connection.close)

    def ask(data: bytes) -> Answer:
        connection.request("POST", "/image/canny", body=data, headers={"Content-Type": "application/octet-stream"})
        answer = connection.getresponse()
        assert answer.status == http.HTTPStatus.OK
        return answer.read(), float(answer.headers["X-Request-Time"])

    return Side(process=process, ask=ask)


def services(data: bytes, rounds: int, *, on_asyncio: bool) -> None:
    with ExitStack() as stack:
        sides = {"replaced": replaced(stack), "ours": ours(stack, *OURS)}
        check(*(side.ask(data)[0] for side in sides.values()))
        if on_asyncio:
            sides["ours on asyncio"] = ours(stack, "-c", ON_ASYNCIO)
        for side in sides.values():
            side.start(data)
        for _ in range(rounds):
            for side in sides.values():
                side.turn(data)
        figures = {
            "waited": {name: statistics.median(side.waited_s) for name, side in sides.items()},
            "inside": {name: statistics.median(side.inside_s) for name, side in sides.items()},
            "of CPU": {name: side.cpu_s() for name, side in sides.items()},
        }
    for what, taken_s in figures.items():
        parts = (
            f"{name} {each_s * 1e3:.2f} ms, {each_s / taken_s['replaced']:.3f}" for name, each_s in taken_s.items()
        )
        print(f"{what}: {'; '.join(parts)}")


def check(replaced: bytes, ours: bytes) -> None:
    maps = [np.asarray(Image.open(io.BytesIO(data)).convert("RGB")) for data in (ours, replaced)]
    assert np.array_equal(*maps), "the maps differ"
    print(f"bytes out: ours {len(ours)}, replaced {len(replaced)}; the maps are equal")


def kernels(data: bytes, rounds: int) -> None:
    cv2.setNumThreads(1)
    canny = core().get("canny")
    values = {parameter.name: parameter.default for parameter in canny.parameters}
    pixels = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    runs = {"cv2.Canny": lambda: cv2.Canny(pixels, 100, 200), "our kernel": lambda: canny(pixels, **values)}
    taken: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds * TURN_CALLS):
        for name, run in runs.items():
            start_s = time.process_time()
            run()
            taken[name].append(time.process_time() - start_s)
    medians = {name: statistics.median(times) for name, times in taken.items()}
    for name, median_s in medians.items():
        print(f"{name:12} {median_s * 1e3:8.2f} ms of CPU")
    print(f"our kernel / cv2.Canny {medians['our kernel'] / medians['cv2.Canny']:.3f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--format", choices=("JPEG", "PNG"), default="JPEG")
    parser.add_argument("--asyncio", action="store_true", help="ours on asyncio's own event loop too")
    arguments = parser.parse_args()
    data = photo(arguments.format)
    print(f"{arguments.format}, {len(data)} bytes in; {'with' if LIBRARY.exists() else 'without'} the loop in C")
    services(data, arguments.rounds, on_asyncio=arguments.asyncio)
    kernels(data, arguments.rounds)


if __name__ == "__main__":
    main()
