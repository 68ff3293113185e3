"""Everything that known workers offer together, kept up as they come, change and go. Pure.

Of two annotators with the same id, and of two models with the same kind, id and family, one counts: what a live worker
announces goes before what only workers announce that are away; then the newest announcement; then the lesser digest.
So the same workers give the same catalog, in whatever order they came, and nothing is merged when somebody asks.
"""

import re
from bisect import bisect_left, insort
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain
from operator import itemgetter
from types import MappingProxyType
from typing import Generic, TypeVar

from fanlight.contract.names import ANY, plain_name
from services.gateway.jobs.workers import (
    ANNOTATOR,
    CHECKPOINT,
    DISK,
    RAM,
    REMOTE,
    VRAM,
    Annotator,
    Capabilities,
    Model,
    Worker,
)

# Kind, id and family: several families have a ControlNet `canny`.
ModelKey = tuple[str, str, str]
# Of what workers announced alike: whether all of them are away; the negative time of the first; the digest.
Rank = tuple[bool, float, str]

_WORD = re.compile(r"\w+")

K = TypeVar("K", str, ModelKey)
V = TypeVar("V")


class _Ranked(Generic[K, V]):
    """By key all values that were announced; the one of the least rank counts."""

    def __init__(self) -> None:
        self.chosen: dict[K, V] = {}
        self._all: dict[K, list[tuple[Rank, V]]] = {}

    def change(self, key: K, value: V, *, before: Rank | None, after: Rank | None) -> tuple[V | None, V | None]:
        """Move a value from one rank to another; None for one that comes or goes. What counted, and what counts now."""
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


class _Index(Generic[K]):
    """Keys by a name that several may share, in order."""

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


class Catalog:
    """Looking up costs the same for any number of models. It changes in place: read it before the next await."""

    def __init__(self) -> None:
        self._annotators: _Ranked[str, Annotator] = _Ranked()
        self._annotator_aliases: _Index[str] = _Index()
        self._models: _Ranked[ModelKey, Model] = _Ranked()
        self._of_kind: dict[str, dict[ModelKey, Model]] = {}
        self._ids: _Index[ModelKey] = _Index()
        self._plain_ids: _Index[ModelKey] = _Index()
        self._aliases: _Index[ModelKey] = _Index()
        self._first_words: _Index[ModelKey] = _Index()
        self._defaults: _Index[ModelKey] = _Index()
        self._stages: Counter[str] = Counter()
        self._holdings = _Holdings()

    @property
    def annotators(self) -> Mapping[str, Annotator]:
        return MappingProxyType(self._annotators.chosen)

    @property
    def models(self) -> Mapping[ModelKey, Model]:
        return MappingProxyType(self._models.chosen)

    @property
    def stages(self) -> frozenset[str]:
        """Those that some worker was ever seen for."""
        return frozenset(self._stages)

    # Looking up

    def annotator(self, name: str) -> Annotator | None:
        """The one of this id, else the first by id that has the name for an alias."""
        found = self._annotators.chosen.get(name)
        aliased = self._annotator_aliases.of(ANNOTATOR, name)
        return self._annotators.chosen[aliased[0]] if found is None and aliased else found

    def of_kind(self, kind: str) -> list[Model]:
        """All of them; for lists and messages."""
        return list(self._of_kind.get(kind, {}).values())

    def model(self, kind: str, name: str, family: str = "") -> Model | None:
        """The one that is meant by an id or alias, as `fanlight.contract.names.find_name` finds it.

        Only of those that fit a checkpoint of that family: with an empty family on either side all fit.
        """
        plain = plain_name(name)
        for index, each in ((self._ids, name), (self._plain_ids, plain), (self._aliases, plain)):
            if each and each != ANY and (found := _fitting(index.of(kind, each), family)):
                return self._models.chosen[found]
        return None

    def mentioned(self, kind: str, text: str, family: str = "") -> list[str]:
        """Ids of those that fit and may stand in the text, in order; none is missing that `words_in` would find.

        Costs what looking up the text's words costs, whatever the number of models.
        """
        words = {"", *_WORD.findall(text.lower())}
        keys = (key for word in words for key in self._first_words.of(kind, word))
        return sorted({model_id for _, model_id, own in keys if not family or own in ("", family)})

    def fetches_any(self, kind: str) -> bool:
        """Some worker fetches whatever a reference names."""
        return bool(self._ids.of(kind, ANY))

    def default_checkpoint(self) -> Model | None:
        """Never one that would have to be fetched: one that a live worker holds, if any does, else one that was held.

        Of those a default one, and else the first by id.
        """
        for is_live in (True, False):
            if first := self._holdings.first_checkpoint(live=is_live):
                defaults = (model_id for _, model_id, _ in self._defaults.of(CHECKPOINT, ""))
                held = (each for each in defaults if self._holdings.is_held(f"{CHECKPOINT}:{each}", live=is_live))
                return self.model(CHECKPOINT, next(held, first))
        return None

    def residency_of(self, kind: str, name: str) -> int:
        """The best place that a live worker holds it in, else the best of those that are away; REMOTE for none.

        `kind`: such as `checkpoint`, or `annotator`.
        """
        return self._holdings.residency_of(f"{kind}:{name}")

    # Keeping it up

    def change(self, capabilities: Capabilities, *, before: Rank | None, after: Rank | None) -> None:
        """What somebody announced comes (no rank before), goes (none after) or changes its rank."""
        for annotator in {each.id: each for each in reversed(capabilities.annotators)}.values():
            was, now = self._annotators.change(annotator.id, annotator, before=before, after=after)
            if was is not now:
                self._index_annotator(annotator.id, was, now)
        for key, model in {(each.kind, each.id, each.family): each for each in reversed(capabilities.models)}.items():
            old, new = self._models.change(key, model, before=before, after=after)
            if old is not new:
                self._index_model(key, old, new)

    def _index_annotator(self, key: str, was: Annotator | None, now: Annotator | None) -> None:
        for alias in set(was.aliases) if was else ():
            self._annotator_aliases.remove(ANNOTATOR, alias, key)
        for alias in set(now.aliases) if now else ():
            self._annotator_aliases.add(ANNOTATOR, alias, key)

    def _index_model(self, key: ModelKey, was: Model | None, now: Model | None) -> None:
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

    def _names_of(self, model: Model) -> Iterator[tuple[_Index[ModelKey], str]]:
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

    def count_held(self, held: Iterable[tuple[str, int]], by: int, *, live: bool) -> None:
        """One more worker holds these, or one less: what tasks need of it, such as `checkpoint:starter`, and where."""
        for need, place in held:
            self._holdings.count(need, place, by, live=live)


def _fitting(keys: list[ModelKey], family: str) -> ModelKey | None:
    """Rather one of the family itself."""
    if not family:
        return keys[0] if keys else None
    fits = [key for key in keys if key[2] in ("", family)]
    return max(fits, key=itemgetter(2), default=None)


class _Holdings:
    """How many workers hold what, and where; those that are live apart from those that are away."""

    def __init__(self) -> None:
        # By need: DISK, RAM, VRAM; first of those that are away, then of live ones.
        self._counts: dict[str, list[int]] = {}
        # Ids, in order.
        self._checkpoints: dict[bool, list[str]] = {False: [], True: []}

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
                insort(ids, name)
            else:
                del ids[bisect_left(ids, name)]

    def is_held(self, need: str, *, live: bool) -> bool:
        counts = self._counts.get(need)
        return counts is not None and any(counts[3 * live : 3 * live + 3])

    def first_checkpoint(self, *, live: bool) -> str:
        """Empty where none is held."""
        return next(iter(self._checkpoints[live]), "")

    def residency_of(self, need: str) -> int:
        counts = self._counts.get(need, [0] * 6)
        places = chain(
            zip((VRAM, RAM, DISK), counts[:2:-1], strict=True), zip((VRAM, RAM, DISK), counts[2::-1], strict=True)
        )
        return next((place for place, count in places if count), REMOTE)


def held_by(worker: Worker, needs_by_id: Mapping[str, tuple[str, ...]]) -> Iterator[tuple[str, int]]:
    """What tasks can need of a worker and it holds, with the best place. `needs_by_id`: of what it offers."""
    for model in worker.held_models:
        place = VRAM if model in worker.vram_models else RAM if model in worker.ram_models else DISK
        for need in needs_by_id.get(model, ()):
            yield need, place


def needs_by_id(capabilities: Capabilities) -> dict[str, tuple[str, ...]]:
    """Ids are shared: an annotator and a ControlNet may both be `canny`."""
    found: dict[str, dict[str, None]] = {}
    for annotator in capabilities.annotators:
        found.setdefault(annotator.id, {})[f"{ANNOTATOR}:{annotator.id}"] = None
    for model in capabilities.models:
        if model.id != ANY:
            found.setdefault(model.id, {})[f"{model.kind}:{model.id}"] = None
    return {each: tuple(needs) for each, needs in found.items()}


def catalog_of(stages: Iterable[str], capabilities: Iterable[Capabilities]) -> Catalog:
    """Of live workers that hold on disk all that they offer; the first ones count."""
    catalog = Catalog()
    for stage in stages:
        catalog.count_stage(stage, 1)
    for number, each in enumerate(capabilities):
        catalog.change(each, before=None, after=(False, float(number), ""))
        catalog.count_held([(need, DISK) for needs in needs_by_id(each).values() for need in needs], 1, live=True)
    return catalog
