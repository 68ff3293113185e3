"""The demo: three services on this machine, a photo in, images that follow its edges out, and where the time went.

Writes to demo/out/, or to the folder in its argument: the control image, the images, one contact sheet, and the
services' logs and data.
"""

import asyncio
import shutil
import sys
import time
from collections.abc import Awaitable
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from sheet import Tile, write_sheet

from fanlight.cli.output import say
from fanlight.cli.reports import timings_of
from fanlight.cli.service_plan import ANY_PORT, Addresses, ProcessPlan, require_extras
from fanlight.cli.supervisor import run_services
from fanlight.cli.up import all_registered, client_of
from fanlight.client import AsyncClient, Control
from fanlight.common.v1.common_pb2 import Blob
from fanlight.errors import FanlightError, advice
from fanlight.gateway.v1.gateway_pb2 import Job

HERE = Path(__file__).parent
OUT = Path(sys.argv[1]).absolute() if len(sys.argv) > 1 else HERE / "out"
PHOTO = HERE / "photos" / "coffee.jpg"
OUTLINE = HERE / "photos" / "outline-heart.png"
ANNOTATOR = "canny"
PROMPTS = [
    "a cup of coffee on a blue background, 3d style",
    "a cup of coffee on a yellow background, 3d style",
    "a cup of coffee on a green background, flat style",
    "a cup of coffee on a pink background, flat style",
]
OUTLINE_PROMPT = "a heart on a white background, flat style"
SEED = 0
# Much longer than the demo takes, so that a failure is reported instead of waited for.
LIMIT_S = 300

Answer = TypeVar("Answer")


class Stopwatch:
    """How long each part took, in order."""

    def __init__(self) -> None:
        self.parts: list[tuple[str, float]] = []

    @contextmanager
    def part(self, name: str):
        started_s = time.monotonic()
        try:
            yield
        finally:
            self.parts.append((name, time.monotonic() - started_s))

    async def timed(self, name: str, work: Awaitable[Answer]) -> Answer:
        with self.part(name):
            return await work

    def add_spans(self, job: Job) -> None:
        """Below the part that was timed last: the spans of the task that ended last."""
        spans = timings_of(job).get("diffusion", {})
        assert isinstance(spans, dict)
        self.parts += [(f"  {name.removesuffix('_s')}", seconds) for name, seconds in spans.items()]


async def show(client: AsyncClient, watch: Stopwatch) -> list[Tile]:
    """The demo's jobs: annotate the photo, generate from it, generate from a drawn outline."""
    annotated = await watch.timed("annotate the photo", client.annotate(ANNOTATOR, PHOTO))
    control = Control(image=PHOTO, annotator=ANNOTATOR, scale=1.0)
    generating = asyncio.gather(
        *(client.generate(prompt, controls=[control], seed=SEED + number) for number, prompt in enumerate(PROMPTS))
    )
    jobs = await watch.timed(f"generate {len(PROMPTS)} images from it", generating)
    watch.add_spans(max(jobs, key=lambda job: job.end_time.ToNanoseconds()))
    # No annotator: the drawing is the control image already.
    outline = Control(image=OUTLINE, controlnet="canny")
    drawn = await watch.timed(
        "generate one from an outline", client.generate(OUTLINE_PROMPT, controls=[outline], seed=SEED)
    )
    watch.add_spans(drawn)
    # The control image of these jobs: made from the same photo, at the size of the images.
    control_image = jobs[0].control_images[0].blob
    images = [job.images[0].blob for job in [annotated, *jobs, drawn]]
    edges, *files = await watch.timed("download", download(client, [*images, control_image]))
    (OUT / f"annotated-{ANNOTATOR}.png").write_bytes(edges)
    return tiles(files)


async def download(client: AsyncClient, blobs: list[Blob]) -> list[bytes]:
    return await asyncio.gather(*(client.read_blob(blob) for blob in blobs))


def tiles(images: list[bytes]) -> list[Tile]:
    """The contact sheet's tiles, with the files to write."""
    *generated, drawn, control = images
    named = [
        Tile(file=f"generated-{number + 1}.png", title=PROMPTS[number], data=data)
        for number, data in enumerate(generated)
    ]
    return [
        Tile(file="", title="the photo", data=PHOTO.read_bytes()),
        Tile(file=f"control-{ANNOTATOR}.png", title=f"its control image ({ANNOTATOR})", data=control),
        *named,
        Tile(file="", title="a drawn outline", data=OUTLINE.read_bytes()),
        Tile(file="generated-outline.png", title=OUTLINE_PROMPT, data=drawn),
    ]


async def demo(watch: Stopwatch) -> list[Tile]:
    plan = ProcessPlan(data=OUT / "data", http=ANY_PORT, grpc=ANY_PORT, report=say)
    started_s = time.monotonic()
    stopping_s = started_s

    async def body(addresses: Addresses) -> list[Tile]:
        nonlocal stopping_s
        watch.parts.append(("start the services", time.monotonic() - started_s))
        say(f"up: http={addresses.http} grpc={addresses.grpc}")
        try:
            async with client_of(addresses) as client:
                return await show(client, watch)
        finally:
            stopping_s = time.monotonic()

    async with asyncio.timeout(LIMIT_S):
        shown = await run_services(plan, all_registered, body, kill_now=asyncio.Event())
    watch.parts.append(("stop the services", time.monotonic() - stopping_s))
    return shown


def main() -> int:
    watch = Stopwatch()
    started_s = time.monotonic()
    try:
        require_extras()
        shutil.rmtree(OUT, ignore_errors=True)
        shown = asyncio.run(demo(watch))
    except FanlightError as error:
        say(f"the demo failed: {advice(error, gateway='the demo')}; the services' logs are in {OUT / 'data' / 'logs'}")
        return 1
    except TimeoutError:
        say(f"the demo failed: not done within {LIMIT_S} s; the services' logs are in {OUT / 'data' / 'logs'}")
        return 1
    with watch.part("write the images"):
        write_sheet(shown, OUT)
    report(watch, time.monotonic() - started_s)
    return 0


def report(watch: Stopwatch, total_s: float) -> None:
    print("where the time went (of images that were generated at the same time: the last one's)")
    for name, seconds in [*watch.parts, ("all", total_s)]:
        print(f"  {name:<28} {seconds:7.2f} s")
    print(f"the images are in {OUT}; sheet.png shows them all")


if __name__ == "__main__":
    sys.exit(main())
