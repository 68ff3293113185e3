"""What both doors share: a parsed request in, an encoded picture out. Knows no gRPC and no queue."""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial

from fanlight.diffusion.v1 import diffusion_pb2
from services.diffusion.digests import WeightDigests, entries_of
from services.diffusion.effective import effective_to_proto
from services.diffusion.engine.engine import Engine
from services.diffusion.engine.ports import Painting, Report
from services.diffusion.generation import Generation
from services.diffusion.infotext import infotext
from services.diffusion.parse.parser import Parser
from services.diffusion.pictures.encode import MEDIA_TYPES, PARAMETERS, PROVENANCE, encode
from services.diffusion.provenance import provenance_json, version_of


@dataclass(frozen=True, slots=True, kw_only=True)
class Painted:
    data: bytes = field(repr=False)
    generation: Generation
    # What the safety checker said; None where it was not asked.
    nsfw: bool | None
    provenance: str = field(repr=False)
    spans: tuple[tuple[str, float], ...]

    @property
    def media_type(self) -> str:
        return MEDIA_TYPES[self.generation.format]


class Painter:
    """Decodes, digests and encodes off both the event loop and the device thread."""

    def __init__(
        self,
        engine: Engine,
        parser: Parser,
        *,
        codecs: ThreadPoolExecutor,
        digests: WeightDigests,
        clock: Callable[[], float],
    ) -> None:
        self._engine = engine
        self._parser = parser
        self._codecs = codecs
        self._digests = digests
        self._clock = clock

    def check(self, request: diffusion_pb2.GenerateRequest) -> None:
        """What can be said before anything is fetched for it. Raises as Parser does."""
        self._parser.check(request)

    async def parse(self, request: diffusion_pb2.GenerateRequest, *, alone: bool = False) -> Generation:
        """Raises as Parser does."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._codecs, lambda: self._parser.parse(request, alone=alone))

    async def paint(self, generation: Generation, report: Report) -> Painted:
        """The weights' digests are taken while the picture is painted."""
        loop = asyncio.get_running_loop()
        digested = loop.run_in_executor(self._codecs, self._digest, generation)
        painting = await self._engine.paint(generation, report)
        began_s = self._clock()
        await digested
        data, provenance = await loop.run_in_executor(self._codecs, partial(self._encode, generation, painting))
        return Painted(
            data=data,
            generation=generation,
            nsfw=painting.nsfw,
            provenance=provenance,
            spans=(*painting.spans, ("encode", self._clock() - began_s)),
        )

    def _digest(self, generation: Generation) -> None:
        for entry in entries_of(generation):
            self._digests.of(entry)

    def _encode(self, generation: Generation, painting: Painting) -> tuple[bytes, str]:
        provenance = provenance_json(
            generation,
            effective_to_proto(generation),
            tuple(entries_of(generation)),
            self._digests.of,
            device=painting.device,
            dtype=painting.dtype,
        )
        texts = {
            PARAMETERS: infotext(generation, self._digests.of, version=version_of("fanlight")),
            PROVENANCE: provenance,
        }
        return encode(painting.pixels, texts, format=generation.format, quality=generation.quality), provenance
