"""A job that a client asks for, checked by `wire`; its pictures are not kept yet."""

import dataclasses
from dataclasses import dataclass

from services.gateway.jobs.painting import PaintOptions
from services.kernel.digests import DEFAULT_SCOPE


@dataclass(frozen=True, slots=True, kw_only=True)
class Picture:
    """A picture of a request: bytes that came with it, or the digest of a blob written before."""

    # The request's field it came in, such as `generation.controls[0].picture`.
    field: str
    data: bytes = dataclasses.field(default=b"", repr=False)
    scope: str = DEFAULT_SCOPE
    # Empty where there are bytes.
    digest: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class NewControl:
    # None: made by the worker, of the image and its mask.
    picture: Picture | None
    annotator: str
    # Canonical JSON with defaults filled in.
    parameters: str
    controlnet: str
    scale: float | None = None
    start: float | None = None
    end: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class NewGeneration:
    model: str
    pipeline: str
    prompt: str
    negative_prompt: str = ""
    width_px: int = 0
    height_px: int = 0
    steps: int | None = None
    guidance_scale: float | None = None
    scheduler: str = ""
    seed: int | None = None
    count: int = 1
    controls: tuple[NewControl, ...] = ()
    preview_every_steps: int = 0
    image: Picture | None = None
    mask: Picture | None = None
    options: PaintOptions = dataclasses.field(default_factory=PaintOptions)
    # Embeddings that nobody asked for but by a word in a prompt.
    words: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class NewAnnotation:
    picture: Picture
    annotator: str
    parameters: str
    width_px: int = 0
    height_px: int = 0


NewWork = NewGeneration | NewAnnotation


@dataclass(frozen=True, slots=True, kw_only=True)
class NewJob:
    """A job that a client asks for, checked by `wire` against the catalog."""

    work: NewWork
    # Tells requests with the same `request_id` apart.
    content_digest: str
    request_id: str = ""
    priority: int = 0
    # How long it may take; 0 where nobody minds.
    deadline_s: float = 0.0
    webhook_url: str = ""

    @property
    def tasks_limit(self) -> int:
        """How many tasks it can become at most."""
        return 1 if isinstance(self.work, NewAnnotation) else self.work.count + len(self.work.controls)
