"""The catalog of everything that the fleet offers together, which requests are checked against. Pure.

Of two annotators with the same id, and of two models with the same kind, id and family, the catalog lists one: what a
live worker announces goes before what only absent workers announced; then the first announcement; then the lesser
digest. So the same workers give the same catalog, in whatever order they came, a lookup merges nothing, and no newcomer
changes what is there.

Of several models that a name may stand for, such as two families of one checkpoint id, a request means the one that
more diffusion workers announced, live or not; then the one that was announced first; then the lesser by name. So no
single worker can change what a name means.
"""

import re
from bisect import bisect_left, insort
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from collections.abc import Set as AbstractSet
from itertools import chain
from operator import itemgetter
from types import MappingProxyType
from typing import Generic, TypeVar

from fanlight.contract.names import ANY, plain_name
from services.gateway.domain.job import DIFFUSION
from services.gateway.domain.workers import (
    ANNOTATOR,
    CHECKPOINT,
    DISK,
    RAM,
    REMOTE,
    STARTER,
    VRAM,
    AnnouncedAnnotator,
    AnnouncedModel,
    Capabilities,
    Worker,
)

# Kind, id and family: several families have a ControlNet `canny`.
ModelKey = tuple[str, str, str]
# Of equal announcements: whether all their workers are away; the time of the first; the digest.
Rank = tuple[bool, float, str]
_WORD = re.compile(r"\w+")
K = TypeVar("K", str, ModelKey)
V = TypeVar("V")


class _Ranked(Generic[K, V]):
    """All announced values by key; of each key the value of the least rank is chosen."""

    def __init__(self) -> None:
        self.chosen: dict[K, V] = {}
        self._all: dict[K, list[tuple[Rank, V]]] = {}

    def change(self, key: K, value: V, *, before: Rank | None, after: Rank | None) -> tuple[V | None, V | None]:
        """Move a value from one rank to another; None where it comes or goes. The chosen values before and after."""
        ranked = self._all.setdefault(key, [])
        if before is not None:
            del ranked[bisect_left(ranked, before, key=itemgetter(0))]
        if after is not None:
            insort(ranked, (after, value), key=itemgetter(0))
        was = self.chosen.get(key)
        if ranked:
            self.chosen[key] = ranked[0][1]
            return was, ranked[0][1]
        del self._all[key], self.chosen[key]
        return was, None

    def ranks(self, key: K) -> Iterator[Rank]:
        """Of all that announced it."""
        return (rank for rank, _ in self._all[key])


class _Index(Generic[K]):
    """Keys by name, in order; several keys may share a name."""

    def __init__(self) -> None:
        self._keys: dict[tuple[str, str], list[K]] = {}

    def add(self, kind: str, name: str, key: K) -> None:
        insort(self._keys.setdefault((kind, name), []), key)

    def remove(self, kind: str, name: str, key: K) -> None:
        keys = self._keys[kind, name]
        del keys[bisect_left(keys, key)]
        if not keys:
            del self._keys[kind, name]

    def of(self, kind: str, name: str) -> list[K]:
        return self._keys.get((kind, name), [])


class FleetCatalog:
    """A lookup costs the same for any number of models. It changes in place: read it before the next await."""

    def __init__(self, default_model: str = "") -> None:
        """`default_model`: the operator's; empty for none."""
        self.default_model = default_model
        self._annotators: _Ranked[str, AnnouncedAnnotator] = _Ranked()
        self._annotator_aliases: _Index[str] = _Index()
        self._models: _Ranked[ModelKey, AnnouncedModel] = _Ranked()
        self._of_kind: dict[str, dict[ModelKey, AnnouncedModel]] = {}
        self._ids: _Index[ModelKey] = _Index()
        self._plain_ids: _Index[ModelKey] = _Index()
        self._aliases: _Index[ModelKey] = _Index()
        self._first_words: _Index[ModelKey] = _Index()
        self._defaults: _Index[ModelKey] = _Index()
        self._stages: Counter[str] = Counter()
        # How many diffusion workers announced the capabilities with a digest.
        self._announcing: Counter[str] = Counter()
        self._holdings = _Holdings()
        # Checkpoints that diffusion workers hold: one of them is the default.
        self._checkpoints = _Holdings()

    @property
    def annotators(self) -> Mapping[str, AnnouncedAnnotator]:
        return MappingProxyType(self._annotators.chosen)

    @property
    def models(self) -> Mapping[ModelKey, AnnouncedModel]:
        return MappingProxyType(self._models.chosen)

    @property
    def stages(self) -> frozenset[str]:
        """The stages of the known workers."""
        return frozenset(self._stages)

    # Lookups

    def annotator(self, name: str) -> AnnouncedAnnotator | None:
        """By id, else the first by id with that alias."""
        found = self._annotators.chosen.get(name)
        aliased = self._annotator_aliases.of(ANNOTATOR, name)
        return self._annotators.chosen[aliased[0]] if found is None and aliased else found

    def of_kind(self, kind: str) -> list[AnnouncedModel]:
        """All models of the kind; for lists and messages."""
        return list(self._of_kind.get(kind, {}).values())

    def model(self, kind: str, name: str, family: str = "") -> AnnouncedModel | None:
        """By id or alias, as `fanlight.contract.names.find_name` finds it.

        Only of those that fit a checkpoint of that family: with an empty family on either side all fit.
        """
        plain = plain_name(name)
        for index, each in ((self._ids, name), (self._plain_ids, plain), (self._aliases, plain)):
            if each and each != ANY and (found := _fitting(index.of(kind, each), family)):
                meant = self._most_announced(found)
                if kind == CHECKPOINT and not family:
                    meant = self._most_announced(self._ids.of(kind, meant[1]))
                return self._models.chosen[meant]
        return None

    def _most_announced(self, keys: list[ModelKey]) -> ModelKey:
        """Of those that one name may stand for."""
        return max(keys, key=self._support) if len(keys) > 1 else keys[0]

    def _support(self, key: ModelKey) -> tuple[int, float]:
        """How many diffusion workers announced it, and the negative time of the first announcement."""
        ranks = list(self._models.ranks(key))
        return sum(self._announcing[digest] for _, _, digest in ranks), -min(time_s for _, time_s, _ in ranks)

    def mentioned(self, kind: str, text: str, family: str = "") -> list[str]:
        """Ids of fitting models that the text may mention, in order; includes all that `words_in` would find.

        Costs as many lookups as the text has words, whatever the number of models.
        """
        words = {"", *_WORD.findall(text.lower())}
        keys = (key for word in words for key in self._first_words.of(kind, word))
        return sorted({model_id for _, model_id, own in keys if not family or own in ("", family)})

    def fetches_any(self, kind: str) -> bool:
        """Whether some worker fetches any model by reference."""
        return bool(self._ids.of(kind, ANY))

    def default_checkpoint(self) -> AnnouncedModel | None:
        """Never one that must be downloaded first: one that a live diffusion worker holds, else one that an absent one
        held.

        The operator's, whoever holds it, where there is one. Else the one that ships, else a worker's default, else
        any; of several the one that was announced first.
        """
        if self.default_model:
            return self.model(CHECKPOINT, self.default_model)
        for is_live in (True, False):
            if held := self._checkpoints.checkpoints(live=is_live):
                defaults = [each for each in self._defaults.of(CHECKPOINT, "") if each[1] in held]
                found = [STARTER] if STARTER in held else [each[1] for each in self._oldest_first(defaults)]
                any_held = (key for model_id in held for key in self._ids.of(CHECKPOINT, model_id))
                return self.model(CHECKPOINT, found[0] if found else self._oldest_first(any_held)[0][1])
        return None

    def _oldest_first(self, keys: Iterable[ModelKey]) -> list[ModelKey]:
        """By their first announcements."""
        return sorted(keys, key=lambda key: (min(time_s for _, time_s, _ in self._models.ranks(key)), key))

    def residency_of(self, kind: str, name: str) -> int:
        """The best place where a live worker holds it, else the best of absent workers; REMOTE where no worker does.

        `kind`: such as `checkpoint`, or `annotator`.
        """
        return self._holdings.residency_of(f"{kind}:{name}")

    # Updates

    def change(self, capabilities: Capabilities, *, before: Rank | None, after: Rank | None) -> None:
        """An announcement comes (no rank before), goes (no rank after) or changes its rank."""
        for annotator in {each.id: each for each in reversed(capabilities.annotators)}.values():
            was, now = self._annotators.change(annotator.id, annotator, before=before, after=after)
            if was is not now:
                self._index_annotator(annotator.id, was, now)
        for key, model in {(each.kind, each.id, each.family): each for each in reversed(capabilities.models)}.items():
            old, new = self._models.change(key, model, before=before, after=after)
            if old is not new:
                self._index_model(key, old, new)

    def _index_annotator(self, key: str, was: AnnouncedAnnotator | None, now: AnnouncedAnnotator | None) -> None:
        for alias in set(was.aliases) if was else ():
            self._annotator_aliases.remove(ANNOTATOR, alias, key)
        for alias in set(now.aliases) if now else ():
            self._annotator_aliases.add(ANNOTATOR, alias, key)

    def _index_model(self, key: ModelKey, was: AnnouncedModel | None, now: AnnouncedModel | None) -> None:
        kind = key[0]
        if was is not None:
            for index, name in self._names_of(was):
                index.remove(kind, name, key)
        if now is not None:
            for index, name in self._names_of(now):
                index.add(kind, name, key)
            self._of_kind.setdefault(kind, {})[key] = now
        else:
            del self._of_kind[kind][key]
            if not self._of_kind[kind]:
                del self._of_kind[kind]

    def _names_of(self, model: AnnouncedModel) -> Iterator[tuple[_Index[ModelKey], str]]:
        yield self._ids, model.id
        if model.id == ANY:
            return
        yield self._plain_ids, plain_name(model.id)
        yield self._first_words, next(iter(_WORD.findall(model.id.lower())), "")
        yield from ((self._aliases, alias) for alias in {plain_name(each) for each in model.aliases})
        if model.is_default:
            yield self._defaults, ""

    def count_stage(self, stage: str, by: int) -> None:
        """One more worker of a stage, or one less."""
        self._stages[stage] += by
        if not self._stages[stage]:
            del self._stages[stage]

    def count_announcing(self, digest: str, stage: str, by: int) -> None:
        """One more worker of the stage announced the capabilities with that digest, or one less."""
        if stage == DIFFUSION:
            self._announcing[digest] += by
            if not self._announcing[digest]:
                del self._announcing[digest]

    def count_held(self, held: Iterable[tuple[str, int]], by: int, *, live: bool, stage: str = DIFFUSION) -> None:
        """One more worker of the stage holds these needs, such as `checkpoint:starter`, there; or one less."""
        for need, place in held:
            self._holdings.count(need, place, by, live=live)
            if stage == DIFFUSION and need.startswith(f"{CHECKPOINT}:"):
                self._checkpoints.count(need, place, by, live=live)


def _fitting(keys: list[ModelKey], family: str) -> list[ModelKey]:
    """Those that fit the family: those of the family itself, else those without a family."""
    if not family:
        return keys
    return [key for key in keys if key[2] == family] or [key for key in keys if not key[2]]


class _Holdings:
    """How many workers hold what, and where; live and absent workers counted apart."""

    def __init__(self) -> None:
        # By need: counts for DISK, RAM, VRAM of absent workers, then of live ones.
        self._counts: dict[str, list[int]] = {}
        # Ids, by whether the workers live.
        self._checkpoints: dict[bool, set[str]] = {False: set(), True: set()}

    def count(self, need: str, place: int, by: int, *, live: bool) -> None:
        was = self.is_held(need, live=live)
        counts = self._counts.setdefault(need, [0] * 6)
        counts[3 * live + place - DISK] += by
        if not any(counts):
            del self._counts[need]
        now = self.is_held(need, live=live)
        kind, _, name = need.partition(":")
        if was != now and kind == CHECKPOINT:
            ids = self._checkpoints[live]
            if now:
                ids.add(name)
            else:
                ids.remove(name)

    def is_held(self, need: str, *, live: bool) -> bool:
        counts = self._counts.get(need)
        return counts is not None and any(counts[3 * live : 3 * live + 3])

    def checkpoints(self, *, live: bool) -> AbstractSet[str]:
        """The ids of the held ones."""
        return self._checkpoints[live]

    def residency_of(self, need: str) -> int:
        counts = self._counts.get(need, [0] * 6)
        places = chain(
            zip((VRAM, RAM, DISK), counts[:2:-1], strict=True), zip((VRAM, RAM, DISK), counts[2::-1], strict=True)
        )
        return next((place for place, count in places if count), REMOTE)


def held_by(worker: Worker, needs_by_id: Mapping[str, tuple[str, ...]]) -> Iterator[tuple[str, int]]:
    """The needs that the worker's held models satisfy, with the best place of each. `needs_by_id`: of its offers."""
    for model in worker.held_models:
        place = VRAM if model in worker.vram_models else RAM if model in worker.ram_models else DISK
        for need in needs_by_id.get(model, ()):
            yield need, place


def needs_by_id(capabilities: Capabilities) -> dict[str, tuple[str, ...]]:
    """The needs of each model id. Ids are shared: an annotator and a ControlNet may both be `canny`."""
    found: dict[str, dict[str, None]] = {}
    for annotator in capabilities.annotators:
        found.setdefault(annotator.id, {})[f"{ANNOTATOR}:{annotator.id}"] = None
    for model in capabilities.models:
        if model.id != ANY:
            found.setdefault(model.id, {})[f"{model.kind}:{model.id}"] = None
    return {each: tuple(needs) for each, needs in found.items()}


def catalog_of(stages: Iterable[str], capabilities: Iterable[Capabilities]) -> FleetCatalog:
    """The catalog of live workers that hold on disk all that they offer; earlier announcements go first."""
    catalog = FleetCatalog()
    for stage in stages:
        catalog.count_stage(stage, 1)
    for number, each in enumerate(capabilities):
        catalog.change(each, before=None, after=(False, float(number), ""))
        catalog.count_held([(need, DISK) for needs in needs_by_id(each).values() for need in needs], 1, live=True)
    return catalog
