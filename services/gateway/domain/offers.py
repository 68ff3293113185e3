"""What of a worker's announcement counts: a worker can match what Fanlight ships, and never change it. Pure."""

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

from fanlight.contract.names import ANY
from fanlight.contract.shipped import ShippedAnnotator
from services.gateway.domain.workers import ANNOTATOR, CHECKPOINT, AnnouncedAnnotator, AnnouncedModel, Capabilities

BUILD = "build"
# No worker offers these by name alone.
_OURS = (f"{ANNOTATOR}:", f"{BUILD}:")


@dataclass(frozen=True, slots=True, kw_only=True)
class LeftOut:
    """Something that a worker announced and gets no tasks for."""

    # Such as `annotator:canny`.
    need: str
    why: str


def build_need(announced: AnnouncedAnnotator) -> str:
    """What only workers with the same build of it on the same kind of device offer: they give equal bytes."""
    build = hashlib.sha256(f"{announced.version}\n{announced.device}".encode()).hexdigest()
    return f"{BUILD}:{announced.id}:{build[:16]}"


@dataclass(frozen=True, slots=True, kw_only=True)
class OfferRules:
    """`others`: ids of annotators that do not ship and that workers may offer all the same; `*` for any."""

    shipped: Mapping[str, ShippedAnnotator] = field(default_factory=dict)
    others: frozenset[str] = frozenset()

    def offered(self, announced: Capabilities) -> tuple[Capabilities, tuple[LeftOut, ...]]:
        """What counts of it, and what does not."""
        annotators: list[AnnouncedAnnotator] = []
        left_out: list[LeftOut] = []
        for each in announced.annotators:
            if why := self._objection(each):
                left_out.append(LeftOut(need=f"{ANNOTATOR}:{each.id}", why=why))
            else:
                annotators.append(self._as_meant(each))
        offers = frozenset(f"{ANNOTATOR}:{each.id}" for each in annotators)
        others = {each for each in announced.other_offers if not each.startswith(_OURS) or each in offers}
        ids = {each.id for each in annotators}
        others |= {build_need(each) for each in announced.annotators if each.id in ids}
        counted = replace(
            announced,
            annotators=tuple(annotators),
            models=tuple(_with_one_default(announced.models)),
            other_offers=tuple(sorted(others)),
        )
        return counted, tuple(left_out)

    def _objection(self, announced: AnnouncedAnnotator) -> str:
        shipped = self.shipped.get(announced.id)
        if shipped is not None:
            return "" if shipped.takes(announced.parameters) else "its parameters are not the gateway's"
        if ANY in self.others or announced.id in self.others:
            return ""
        return "it does not ship with the gateway; FANLIGHT_GATEWAY_OTHER_ANNOTATORS can allow it"

    def _as_meant(self, announced: AnnouncedAnnotator) -> AnnouncedAnnotator:
        """Only the device is the worker's to say of what ships; the names of what ships stay its own."""
        shipped = self.shipped.get(announced.id)
        if shipped is None:
            return replace(announced, aliases=tuple(each for each in announced.aliases if each not in self._names()))
        return AnnouncedAnnotator(
            id=shipped.id,
            description=shipped.description,
            parameters=shipped.parameters,
            deterministic=shipped.deterministic,
            weight_bytes=shipped.weight_bytes,
            controlnets=shipped.controlnets,
            version=shipped.version,
            device=announced.device,
            license=shipped.license,
            aliases=shipped.aliases,
        )

    def _names(self) -> frozenset[str]:
        aliases = (alias for each in self.shipped.values() for alias in each.aliases)
        return frozenset(self.shipped) | frozenset(aliases)


def _with_one_default(models: tuple[AnnouncedModel, ...]) -> Iterator[AnnouncedModel]:
    """One worker has one default checkpoint: the first."""
    is_left = True
    for each in models:
        if each.is_default and not (is_left and each.kind == CHECKPOINT):
            yield replace(each, is_default=False)
        else:
            is_left = is_left and not each.is_default
            yield each
