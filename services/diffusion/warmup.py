"""What one worker uses of the machine: a small image is generated once its default model is loaded."""

import asyncio
import time
from collections.abc import Callable

from fanlight.diffusion.v1 import diffusion_pb2
from fanlight.errors import FanlightError
from services.diffusion.engine.engine import DiffusionEngine
from services.diffusion.generator import ImageGenerator
from services.kernel.logs import get_logger

log = get_logger()

# Of the image that is measured, at the model's own size.
STEPS = 4
# A large model may take longer for it; what it used until then says enough.
MEASURED_MAX_S = 20.0


async def busy_cores(
    generator: ImageGenerator,
    engine: DiffusionEngine,
    *,
    clock: Callable[[], float] = time.monotonic,
    cpu_clock: Callable[[], float] = time.process_time,
) -> float:
    """How many cores the generation of one image keeps busy; 1 where none can be generated."""
    began_s, began_cpu_s = clock(), cpu_clock()
    try:
        # The first pass reserves memory and fills caches, which are no measure.
        for steps in (1, STEPS):
            request = diffusion_pb2.GenerateRequest(prompt="a", steps=steps, seed=1)
            generation = await generator.parse(request)
            began_s, began_cpu_s = clock(), cpu_clock()
            async with asyncio.timeout(MEASURED_MAX_S):
                await engine.generate(generation, lambda progress: None)
    except TimeoutError:
        pass
    except FanlightError as error:
        log.warning("warm_up_failed", reason=error.reason, message=error.message)
        return 1.0
    return (cpu_clock() - began_cpu_s) / max(1e-6, clock() - began_s)
