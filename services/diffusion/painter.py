"""What both doors share: a parsed request in, an encoded picture out. Knows no gRPC and no queue."""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from fanlight.diffusion.v1 import diffusion_pb2
from services.diffusion.engine.engine import Engine
from services.diffusion.engine.ports import Report
from services.diffusion.generation import Generation
from services.diffusion.parse import Parser
from services.diffusion.pictures.png import encode_png


@dataclass(frozen=True, slots=True, kw_only=True)
class Painted:
    png: bytes = field(repr=False)
    generation: Generation
    spans: tuple[tuple[str, float], ...]


class Painter:
    """Decodes and encodes pictures off both the event loop and the device thread."""

    def __init__(
        self, engine: Engine, parser: Parser, *, codecs: ThreadPoolExecutor, clock: Callable[[], float]
    ) -> None:
        self._engine = engine
        self._parser = parser
        self._codecs = codecs
        self._clock = clock

    async def parse(self, request: diffusion_pb2.GenerateRequest, *, alone: bool = False) -> Generation:
        """Raises as Parser does."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._codecs, lambda: self._parser.parse(request, alone=alone))

    async def paint(self, generation: Generation, report: Report) -> Painted:
        painting = await self._engine.paint(generation, report)
        began_s = self._clock()
        png = await asyncio.get_running_loop().run_in_executor(self._codecs, encode_png, painting.pixels)
        return Painted(png=png, generation=generation, spans=(*painting.spans, ("encode", self._clock() - began_s)))
