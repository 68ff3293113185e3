"""DiffusionService: images for clients that call this worker directly. Translates, calls, translates."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc.aio

from fanlight.common.v1 import common_pb2
from fanlight.contract.needs import refuse_unknown_fields
from fanlight.diffusion.v1 import diffusion_pb2, diffusion_pb2_grpc
from services.diffusion.engine.generation import Generation
from services.diffusion.engine.ports import StepProgress, UnmadePreview
from services.diffusion.generator import ImageGenerator, ImageResult
from services.diffusion.images import PNG_MEDIA_TYPE as PREVIEW_MEDIA_TYPE
from services.diffusion.models.catalog import ModelCatalog
from services.diffusion.models.model_manager import ModelManager
from services.diffusion.parse.parser import effective_to_proto
from services.diffusion.provenance import WeightDigests
from services.diffusion.supply import Supply
from services.diffusion.wire import left_out_to_proto, models_to_proto
from services.weights.transfer.download import DownloadProgress as FetchProgress
from services.worker.admission import Admission
from services.worker.ports import MadePreview
from services.worker.previews import PreviewPace

NAME = diffusion_pb2.DESCRIPTOR.services_by_name["DiffusionService"].full_name
# How long a finished image waits for its last preview.
END_WAIT_S = 1.0
_Context = grpc.aio.ServicerContext[Any, Any]
_Response = diffusion_pb2.GenerateResponse
_Preview = diffusion_pb2.Preview


class DiffusionService(diffusion_pb2_grpc.DiffusionServiceServicer):
    def __init__(
        self,
        generator: ImageGenerator,
        admission: Admission,
        catalog: ModelCatalog,
        models: ModelManager,
        digests: WeightDigests,
        supply: Supply,
        *,
        preview_every_s: float,
    ) -> None:
        """`preview_every_s`: the shortest time between two previews of a call."""
        self._preview_every_s = preview_every_s
        self._digests = digests
        self._supply = supply
        self._generator = generator
        self._admission = admission
        self._catalog = catalog
        self._models = models

    async def ListModels(
        self, request: diffusion_pb2.ListModelsRequest, context: _Context
    ) -> diffusion_pb2.ListModelsResponse:
        listed = models_to_proto(
            self._catalog,
            residency_of=self._models.residency,
            digest_of=self._digests.known,
            remote=self._supply.remote_models(),
        )
        return diffusion_pb2.ListModelsResponse(
            models=listed, left_out=left_out_to_proto(self._catalog), left_out_count=self._catalog.left_out_count
        )

    async def Generate(
        self, request: diffusion_pb2.GenerateRequest, context: _Context
    ) -> AsyncIterator[diffusion_pb2.GenerateResponse]:
        events: asyncio.Queue[_Response | None] = asyncio.Queue()
        generating = asyncio.create_task(self._generate(request, events.put_nowait))
        generating.add_done_callback(lambda _: events.put_nowait(None))
        try:
            while (response := await events.get()) is not None:
                yield response
            result = generating.result()
        finally:
            generating.cancel()
            await asyncio.wait([generating])
        yield _image(result)
        yield _Response(done=_done(result))

    async def _generate(self, request: diffusion_pb2.GenerateRequest, send: Callable[[_Response], None]) -> ImageResult:
        previews = PreviewStream(self._generator.preview, send, every_s=self._preview_every_s)

        def report(progress: StepProgress) -> None:
            send(_Response(step=diffusion_pb2.Step(step=progress.step, steps=progress.steps)))
            if progress.preview is not None:
                previews.put(progress.step, progress.preview)

        refuse_unknown_fields(request)
        self._generator.check(request)
        async with self._supply.provided(request, lambda fetching: send(_Response(fetch=_fetching(fetching)))):
            generation = await self._generator.parse(request)
            send(_Response(queued=diffusion_pb2.Queued(ahead=self._admission.waiting)))
            try:
                async with self._admission.enter():
                    return await self._generator.generate(generation, report)
            finally:
                await previews.end()


class PreviewStream:
    """Sends the previews of one call: the newest that is due, when the last one is long enough ago."""

    def __init__(
        self,
        make: Callable[[UnmadePreview], Awaitable[MadePreview]],
        send: Callable[[_Response], None],
        *,
        every_s: float,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._make = make
        self._send = send
        self._every_s = every_s
        self._sleep = sleep
        self._due: tuple[int, UnmadePreview] | None = None
        self._sending: asyncio.Task[None] | None = None
        # Set while none is being made.
        self._idle = asyncio.Event()
        self._idle.set()

    def put(self, step: int, preview: UnmadePreview) -> None:
        """Send it soon, unless a newer one comes before."""
        self._due = step, preview
        if self._sending is None or self._sending.done():
            self._idle.clear()
            self._sending = asyncio.create_task(self._run())

    async def end(self) -> None:
        """Send nothing more, but for a preview that is just being made."""
        self._due = None
        if self._sending is None:
            return
        try:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(END_WAIT_S):
                    await self._idle.wait()
        finally:
            self._sending.cancel()

    async def _run(self) -> None:
        while self._due is not None:
            (step, preview), self._due = self._due, None
            self._idle.clear()
            try:
                made = await self._make(preview)
                if made.data:
                    sent = _Preview(step=step, image=made.data, media_type=PREVIEW_MEDIA_TYPE)
                    self._send(_Response(preview=sent))
            finally:
                self._idle.set()
            await self._sleep(max(self._every_s, made.cpu_s / PreviewPace.SHARE))


def _fetching(progress: FetchProgress) -> common_pb2.FetchProgress:
    whole = progress.whole or progress
    return common_pb2.FetchProgress(
        reference=whole.reference,
        done_bytes=whole.done_bytes,
        total_bytes=whole.total_bytes,
        goodput_bps=whole.bytes_per_s * 8,
        seconds_left=whole.seconds_left,
        source=whole.source,
    )


def _image(result: ImageResult) -> diffusion_pb2.GenerateResponse:
    generation: Generation = result.generation
    return _Response(
        image=diffusion_pb2.GeneratedImage(
            data=result.data,
            media_type=result.media_type,
            seed=generation.seed,
            width_px=generation.result_size_px[0],
            height_px=generation.result_size_px[1],
            nsfw=result.nsfw,
            provenance_json=result.provenance,
            warnings=result.warnings,
        )
    )


def _done(result: ImageResult) -> diffusion_pb2.Done:
    return diffusion_pb2.Done(
        spans=[common_pb2.Span(name=name, duration_s=duration_s) for name, duration_s in result.spans],
        effective=effective_to_proto(result.generation),
    )
