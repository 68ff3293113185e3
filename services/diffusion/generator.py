"""What the service and the stage share: a request in, an encoded image out. Knows no gRPC and no queue."""

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial

from fanlight.contract.warnings import bounded_warnings
from fanlight.diffusion.v1 import diffusion_pb2
from services.diffusion.engine.engine import DiffusionEngine
from services.diffusion.engine.generation import Generation, Safety
from services.diffusion.engine.ports import Report, TimedResult, UnmadePreview
from services.diffusion.images import MEDIA_TYPES, PARAMETERS, PROVENANCE, Pixels, encode
from services.diffusion.models.faults import blames
from services.diffusion.parse.parser import Parser, effective_to_proto
from services.diffusion.provenance import WeightDigests, entries_of, infotext, provenance_json, version_of
from services.worker.ports import MadePreview


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageResult:
    """A finished image, encoded, and what it was made from."""

    data: bytes = field(repr=False)
    generation: Generation
    # Whether the safety checker found it unsafe; None where it was not checked.
    nsfw: bool | None
    provenance: str = field(repr=False)
    spans: tuple[tuple[str, float], ...]
    # What was done otherwise than the request may have meant, in sentences.
    warnings: tuple[str, ...] = ()

    @property
    def media_type(self) -> str:
        return MEDIA_TYPES[self.generation.format]


def whole_of(generation: Generation, result: TimedResult) -> Pixels:
    """What was generated in the place that it has in the image that it was made from."""
    paste = generation.start.paste if generation.start else None
    if paste is None:
        return result.pixels
    is_hidden = result.nsfw and generation.safety_checker in (Safety.BLUR, Safety.BLOCK)
    return paste.hidden(result.pixels) if is_hidden else paste.onto(result.pixels)


def _make(unmade: UnmadePreview) -> MadePreview:
    before_s = time.thread_time()
    data = unmade.encode()
    return MadePreview(data=data, cpu_s=time.thread_time() - before_s)


def _warnings(generation: Generation, result: TimedResult) -> tuple[str, ...]:
    """What the parser found, then what showed on the device."""
    return bounded_warnings([*generation.warnings, *result.warnings])


class ImageGenerator:
    """Decodes, digests and encodes on the codec threads, beside the event loop and the device thread.

    Previews are made on a thread of their own: no finished image waits for one.
    """

    def __init__(
        self,
        engine: DiffusionEngine,
        parser: Parser,
        *,
        codecs: ThreadPoolExecutor,
        previews: ThreadPoolExecutor,
        digests: WeightDigests,
        clock: Callable[[], float],
    ) -> None:
        self._engine = engine
        self._parser = parser
        self._codecs = codecs
        self._previews = previews
        self._digests = digests
        self._clock = clock

    def check(self, request: diffusion_pb2.GenerateRequest) -> None:
        """Refuse what can be refused before anything is fetched for it. Raises as Parser does."""
        self._parser.check(request)

    async def parse(self, request: diffusion_pb2.GenerateRequest, *, alone: bool = False) -> Generation:
        """Raises as Parser does."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._codecs, lambda: self._parser.parse(request, alone=alone))

    async def generate(self, generation: Generation, report: Report) -> ImageResult:
        """The weights' digests are computed while the image is generated."""
        loop = asyncio.get_running_loop()
        digested = loop.run_in_executor(self._codecs, self._digest, generation)
        result = await self._engine.generate(generation, report)
        began_s = self._clock()
        await digested
        data, provenance = await loop.run_in_executor(self._codecs, partial(self._encode, generation, result))
        return ImageResult(
            data=data,
            generation=generation,
            nsfw=result.nsfw,
            provenance=provenance,
            spans=(*result.spans, ("encode", self._clock() - began_s)),
            warnings=_warnings(generation, result),
        )

    async def preview(self, unmade: UnmadePreview) -> MadePreview:
        """A PNG; empty where none can be made."""
        return await asyncio.get_running_loop().run_in_executor(self._previews, _make, unmade)

    def _digest(self, generation: Generation) -> None:
        for entry in entries_of(generation):
            with blames(entry):
                self._digests.of(entry)

    def _encode(self, generation: Generation, result: TimedResult) -> tuple[bytes, str]:
        provenance = provenance_json(
            generation,
            effective_to_proto(generation),
            tuple(entries_of(generation)),
            self._digests.of,
            device=result.device,
            dtype=result.dtype,
            warnings=_warnings(generation, result),
            vae_dtype=result.vae_dtype,
        )
        texts = {
            PARAMETERS: infotext(generation, self._digests.of, version=version_of("fanlight")),
            PROVENANCE: provenance,
        }
        return encode(
            whole_of(generation, result), texts, format=generation.format, quality=generation.quality
        ), provenance
