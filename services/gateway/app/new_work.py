"""Makes a plan of what a client asks for: its images are kept, control images made before are looked up."""

from services.gateway.app.cache import ControlImages
from services.gateway.app.callers import Caller
from services.gateway.app.new_job import Draft
from services.gateway.app.pictures import SourceImages
from services.gateway.app.tokens import RandomBytes
from services.gateway.app.workers import Workers
from services.gateway.jobs.model import Output, StageRequest
from services.gateway.jobs.plan import Plan

# A seed that was drawn is short, so that people can copy it.
RANDOM_SEED_BYTES = 4


class Planner:
    def __init__(self, images: SourceImages, cache: ControlImages, workers: Workers, random_bytes: RandomBytes) -> None:
        self._images = images
        self._cache = cache
        self._workers = workers
        self._random_bytes = random_bytes

    async def plan(self, draft: Draft, caller: Caller) -> Plan:
        """What `SourceImages.keep` raises."""
        kept = {image.field: await self._images.keep(image, caller) for image in draft.images}
        return draft.plan(kept, lambda: int.from_bytes(self._random_bytes(RANDOM_SEED_BYTES)))

    async def made_before(self, plan: Plan) -> dict[int, Output]:
        """Outputs of tasks that were done before, by the tasks' numbers in the plan."""
        found = {}
        for number, task in enumerate(plan.tasks, 1):
            if not task.inputs and (output := await self._find(plan.requests[task.request])):
                found[number] = output
        return found

    async def _find(self, request: StageRequest) -> Output | None:
        if not request.facts.annotator:
            return None
        for annotator in self._workers.variants(request.facts.annotator):
            if output := await self._cache.find(request, annotator):
                return output
        return None
