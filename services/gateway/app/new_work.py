"""What a job needs before it can be planned: its pictures kept, control images made before, seeds."""

from collections.abc import Sequence
from dataclasses import replace

from services.gateway.app.cache import ControlImages
from services.gateway.app.callers import Caller
from services.gateway.app.new_job import NewAnnotation, NewControl, NewGeneration, NewWork, Picture
from services.gateway.app.pictures import Pictures
from services.gateway.app.tokens import RandomBytes
from services.gateway.app.workers import Workers
from services.gateway.jobs.model import Annotation, ControlImage, ControlSource, Generation, Work
from services.gateway.jobs.plan import Wanted
from services.kernel.blobs import BlobInfo

SEED_LIMIT = 2**64
# A seed that nobody asked for is short, so that people can copy it.
RANDOM_SEED_BYTES = 4


class WorkMaker:
    def __init__(self, pictures: Pictures, cache: ControlImages, workers: Workers, random_bytes: RandomBytes) -> None:
        self._pictures = pictures
        self._cache = cache
        self._workers = workers
        self._random_bytes = random_bytes

    async def keep(self, new: NewWork, caller: Caller) -> Work:
        """The same work with its pictures kept as blobs. What `Pictures.keep` raises."""
        if isinstance(new, NewAnnotation):
            return Annotation(
                picture=await self._pictures.keep(new.picture, caller),
                annotator=new.annotator,
                parameters=new.parameters,
                width_px=new.width_px,
                height_px=new.height_px,
            )
        return self._with_words(await self._generation(new, caller), new.words)

    def _with_words(self, work: Generation, words: Sequence[str]) -> Generation:
        """With those embeddings that some worker has together with all the rest: one that lives, if any can paint it.

        The others stay words. No picture waits for a worker that is away because of a word.
        """
        only_live = bool(words) and self._workers.can_any(work.needs, only_live=True)
        for word in words:
            embeddings = (*work.options.embeddings, word)
            more = replace(work, options=replace(work.options, embeddings=embeddings))
            work = more if self._workers.can_any(more.needs, only_live=only_live) else work
        return work

    async def _generation(self, new: NewGeneration, caller: Caller) -> Generation:
        return Generation(
            model=new.model,
            pipeline=new.pipeline,
            prompt=new.prompt,
            negative_prompt=new.negative_prompt,
            width_px=new.width_px,
            height_px=new.height_px,
            steps=new.steps,
            guidance_scale=new.guidance_scale,
            scheduler=new.scheduler,
            seed=new.seed,
            count=new.count,
            controls=tuple([await self._control(control, caller) for control in new.controls]),
            preview_every_steps=new.preview_every_steps,
            image=await self._kept(new.image, caller),
            mask=await self._kept(new.mask, caller),
            options=new.options,
        )

    async def _control(self, new: NewControl, caller: Caller) -> ControlSource:
        return ControlSource(
            picture=await self._kept(new.picture, caller),
            annotator=new.annotator,
            parameters=new.parameters,
            controlnet=new.controlnet,
            scale=new.scale,
            start=new.start,
            end=new.end,
        )

    async def _kept(self, picture: Picture | None, caller: Caller) -> BlobInfo | None:
        return await self._pictures.keep(picture, caller) if picture else None

    async def look_up(self, wanted: Sequence[Wanted]) -> list[Wanted]:
        """The same, with images in the place of annotations that were made before."""
        return [await self._look_up(each) for each in wanted]

    async def _look_up(self, wanted: Wanted) -> Wanted:
        if isinstance(wanted, ControlImage):
            return wanted
        for annotator in self._workers.variants(wanted.annotator):
            if image := await self._cache.find(wanted, annotator):
                return image
        return wanted

    def seeds_of(self, work: Work) -> list[int]:
        """One for each picture to paint."""
        if isinstance(work, Annotation):
            return []
        if work.seed is not None:
            return [(work.seed + i) % SEED_LIMIT for i in range(work.count)]
        first = int.from_bytes(self._random_bytes(RANDOM_SEED_BYTES))
        return [(first + i) % 256**RANDOM_SEED_BYTES for i in range(work.count)]
