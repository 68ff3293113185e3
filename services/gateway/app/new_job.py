"""A job that a client asks for, checked by `wire`; its images are not kept yet."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from fanlight.contract.digests import DEFAULT_SCOPE
from services.gateway.jobs.plan import Plan
from services.kernel.blobs import BlobInfo


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceImage:
    """An image of a request: bytes that came with it, or the digest of a blob written before."""

    # The request's field it came in, such as `generation.controls[0].image`.
    field: str
    data: bytes = dataclasses.field(default=b"", repr=False)
    scope: str = DEFAULT_SCOPE
    # Empty where there are bytes.
    digest: str = ""


class Draft(Protocol):
    """A checked request of a stage, whose message only `wire` knows."""

    @property
    def images(self) -> Sequence[SourceImage]: ...

    @property
    def tasks_limit(self) -> int:
        """How many tasks it can become at most."""
        ...

    def plan(self, kept: Mapping[str, BlobInfo], draw: Callable[[], int]) -> Plan:
        """What is to be done, with each image in the place of its field; `draw` gives a random 32-bit number."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class NewJob:
    draft: Draft
    # Tells requests with the same `request_id` apart.
    content_digest: str
    request_id: str = ""
    priority: int = 0
    # How long it may take; 0 for as long as it takes.
    deadline_s: float = 0.0
    webhook_url: str = ""
