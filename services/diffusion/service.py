"""DiffusionService: pictures for those who call directly."""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import grpc.aio

from fanlight.common.v1 import common_pb2
from fanlight.contract.revision import refuse_unknown_fields
from fanlight.diffusion.v1 import diffusion_pb2, diffusion_pb2_grpc
from services.diffusion.digests import WeightDigests
from services.diffusion.effective import effective_to_proto
from services.diffusion.engine.ports import Progress
from services.diffusion.generation import Generation
from services.diffusion.models.catalogue import Catalogue
from services.diffusion.models.library import Library
from services.diffusion.painter import Painted, Painter
from services.diffusion.pictures.png import MEDIA_TYPE as PREVIEW_MEDIA_TYPE
from services.diffusion.supply import Supply
from services.diffusion.wire import models_to_proto
from services.weights.targets import Progress as Fetching
from services.worker.admission import Admission

NAME = diffusion_pb2.DESCRIPTOR.services_by_name["DiffusionService"].full_name

_Context = grpc.aio.ServicerContext[Any, Any]
_Response = diffusion_pb2.GenerateResponse


class DiffusionService(diffusion_pb2_grpc.DiffusionServiceServicer):
    def __init__(
        self,
        painter: Painter,
        admission: Admission,
        catalogue: Catalogue,
        library: Library,
        digests: WeightDigests,
        supply: Supply,
    ) -> None:
        self._digests = digests
        self._supply = supply
        self._painter = painter
        self._admission = admission
        self._catalogue = catalogue
        self._library = library

    async def ListModels(
        self, request: diffusion_pb2.ListModelsRequest, context: _Context
    ) -> diffusion_pb2.ListModelsResponse:
        models = models_to_proto(
            self._catalogue,
            residency_of=self._library.residency,
            digest_of=self._digests.known,
            remote=self._supply.remote_models(),
        )
        return diffusion_pb2.ListModelsResponse(models=models)

    async def Generate(
        self, request: diffusion_pb2.GenerateRequest, context: _Context
    ) -> AsyncIterator[diffusion_pb2.GenerateResponse]:
        events: asyncio.Queue[_Response | None] = asyncio.Queue()
        painting = asyncio.create_task(self._paint(request, events.put_nowait))
        painting.add_done_callback(lambda _: events.put_nowait(None))
        try:
            while (response := await events.get()) is not None:
                yield response
            painted = painting.result()
        finally:
            painting.cancel()
            await asyncio.wait([painting])
        yield _image(painted)
        yield _Response(done=_done(painted))

    async def _paint(self, request: diffusion_pb2.GenerateRequest, tell: Callable[[_Response], None]) -> Painted:
        def told(progress: Progress) -> None:
            for response in _responses(progress):
                tell(response)

        refuse_unknown_fields(request)
        self._painter.check(request)
        async with self._supply.provided(request, lambda fetching: tell(_Response(fetch=_fetching(fetching)))):
            generation = await self._painter.parse(request)
            tell(_Response(queued=diffusion_pb2.Queued(ahead=self._admission.waiting)))
            async with self._admission.enter():
                return await self._painter.paint(generation, told)


def _fetching(progress: Fetching) -> common_pb2.FetchProgress:
    whole = progress.whole or progress
    return common_pb2.FetchProgress(
        reference=whole.reference,
        done_bytes=whole.done_bytes,
        total_bytes=whole.total_bytes,
        goodput_bps=whole.bytes_per_s * 8,
        seconds_left=whole.seconds_left,
        source=whole.source,
    )


def _responses(progress: Progress) -> Iterator[diffusion_pb2.GenerateResponse]:
    yield _Response(step=diffusion_pb2.Step(step=progress.step, steps=progress.steps))
    if progress.preview:
        preview = diffusion_pb2.Preview(step=progress.step, image=progress.preview, media_type=PREVIEW_MEDIA_TYPE)
        yield _Response(preview=preview)


def _image(painted: Painted) -> diffusion_pb2.GenerateResponse:
    generation: Generation = painted.generation
    return _Response(
        image=diffusion_pb2.GeneratedImage(
            data=painted.data,
            media_type=painted.media_type,
            seed=generation.seed,
            width_px=generation.width_px,
            height_px=generation.height_px,
            nsfw=painted.nsfw,
            provenance_json=painted.provenance,
        )
    )


def _done(painted: Painted) -> diffusion_pb2.Done:
    return diffusion_pb2.Done(
        spans=[common_pb2.Span(name=name, duration_s=duration_s) for name, duration_s in painted.spans],
        effective=effective_to_proto(painted.generation),
    )
