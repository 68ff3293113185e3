"""What known workers offer together, kept up as they come, change and go."""

from dataclasses import dataclass, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fanlight.contract.names import ANY, find_name, plain_name
from fanlight.contract.prompt import words_in
from fanlight.errors import InvalidField, NotFound
from services.gateway.app.capabilities import CapabilityGroup, CapabilityGroups
from services.gateway.app.records import Records
from services.gateway.domain.fleet_catalog import FleetCatalog, held_by
from services.gateway.domain.offers import OfferRules
from services.gateway.domain.workers import (
    DISK,
    RAM,
    REMOTE,
    VRAM,
    AnnouncedAnnotator,
    AnnouncedModel,
    Capabilities,
    Worker,
)
from services.gateway.scheduler.queue import can_do
from services.gateway.wire import needs as look_up
from tests.fakes.fleet import FakeClock
from tests.fakes.memory_store import MemoryStore

FAMILIES = ("", "sd1", "sdxl")
IDS = ("a", "b", "Canny", ANY)

models = st.builds(
    AnnouncedModel,
    id=st.sampled_from(IDS),
    kind=st.sampled_from(["checkpoint", "controlnet"]),
    family=st.sampled_from(FAMILIES),
    is_default=st.booleans(),
    aliases=st.lists(st.sampled_from(["first.safetensors", "SECOND", "b"]), max_size=2).map(tuple),
    text_encoder_layers=st.sampled_from([0, 12]),
)
annotators = st.builds(
    AnnouncedAnnotator,
    id=st.sampled_from(["canny", "depth"]),
    version=st.sampled_from(["1", "2"]),
    aliases=st.lists(st.sampled_from(["edges", "lines"]), max_size=2).map(tuple),
)
capabilities = st.builds(
    Capabilities,
    annotators=st.lists(annotators, max_size=2, unique_by=lambda each: each.id).map(tuple),
    models=st.lists(models, max_size=5, unique_by=lambda each: (each.kind, each.id, each.family)).map(tuple),
    other_offers=st.sampled_from([(), ("scheduler:ddim",)]),
    limits=st.sampled_from([(), (("pixels", 100),), (("pixels", 400),)]),
)
steps = st.lists(
    st.tuples(st.sampled_from(["come", "leave", "live", "away"]), st.sampled_from(["1", "2", "3", "4"]), capabilities),
    max_size=30,
)


STAGE_OF = {"1": "diffusion", "2": "diffusion", "3": "preprocess", "4": "diffusion"}


@dataclass
class Fleet:
    """Workers that come, announce something else, fall silent and leave, as the model for the groups' counts."""

    def __post_init__(self) -> None:
        self.clock = FakeClock()
        rules = OfferRules(others=frozenset("*"))
        self.groups = CapabilityGroups(Records(MemoryStore(), self.clock), self.clock, rules)
        self.known: dict[str, CapabilityGroup] = {}

    async def step(self, what: str, worker: str, announced: Capabilities) -> None:
        self.clock.advance(1.0)
        group = self.known.get(worker)
        if what == "come":
            if group is not None:
                self.groups.leave(group, worker)
            self.known[worker] = self.groups.join(
                await self.groups.keep(announced), worker, f"node-{worker}", STAGE_OF[worker]
            )
        elif group is not None and what == "leave":
            self.groups.leave(self.known.pop(worker), worker)
        elif group is not None:
            self.groups.set_live(group, worker, live=what == "live")

    @property
    def ranked(self) -> list[CapabilityGroup]:
        """Each group once: live ones first, then those that were announced first, then by digest."""
        distinct = {group.digest: group for group in self.known.values()}.values()
        return sorted(distinct, key=lambda each: (not each.live, each.kept.time_s, each.digest))


@settings(max_examples=60, deadline=None)
@given(steps)
async def test_the_catalog_is_the_one_that_merging_all_workers_again_gives(taken) -> None:
    fleet = Fleet()
    for step in taken:
        await fleet.step(*step)
    merged_models: dict[tuple[str, str, str], AnnouncedModel] = {}
    merged_annotators: dict[str, AnnouncedAnnotator] = {}
    for group in fleet.ranked:
        for model in group.offered.models:
            merged_models.setdefault((model.kind, model.id, model.family), model)
        for annotator in group.offered.annotators:
            merged_annotators.setdefault(annotator.id, annotator)
    catalog = fleet.groups.catalog
    assert dict(catalog.models) == merged_models
    assert dict(catalog.annotators) == merged_annotators
    for kind in ("checkpoint", "controlnet"):
        of_kind = [model for model in merged_models.values() if model.kind == kind]
        assert sorted(map(repr, catalog.of_kind(kind))) == sorted(map(repr, of_kind))
        assert catalog.fetches_any(kind) == any(model.id == ANY for model in of_kind)
        for name in ("a", "A", "canny", "b", "first", "second.ckpt", "none", ANY):
            assert bool(catalog.model(kind, name)) == bool(find_name(_aliases(of_kind), name))
            for family in ("", "sd1", "sdxl"):
                fitting = [model for model in of_kind if not family or model.family in ("", family)]
                assert catalog.model(kind, name, family) == _meant(fleet, fitting, name, family)
    for alias in ("edges", "lines", "canny"):
        by_alias = sorted(each.id for each in merged_annotators.values() if alias in each.aliases)
        expected = alias if alias in merged_annotators else next(iter(by_alias), None)
        found_annotator = catalog.annotator(alias)
        assert (found_annotator.id if found_annotator else None) == expected


def _most_announced(fleet: Fleet, models: list[AnnouncedModel]) -> AnnouncedModel:
    """The one that most diffusion workers announced; then the one announced first, then the least by name."""

    def rank(model: AnnouncedModel) -> tuple[int, float, str, str]:
        key = model.kind, model.id, model.family
        announced = [
            (STAGE_OF[worker] == "diffusion", group.kept.time_s)
            for worker, group in fleet.known.items()
            if any((each.kind, each.id, each.family) == key for each in group.capabilities.models)
        ]
        return -sum(each for each, _ in announced), min(time_s for _, time_s in announced), model.id, model.family

    return min(models, key=rank)


def _aliases(of_kind: list[AnnouncedModel]) -> dict[str, list[str]]:
    known: dict[str, list[str]] = {}
    for model in sorted(of_kind, key=lambda each: each.id):
        known.setdefault(model.id, []).extend(model.aliases)
    return known


def _meant(fleet: Fleet, fitting: list[AnnouncedModel], name: str, family: str) -> AnnouncedModel | None:
    """By id, by id in another spelling, by alias; of several those of the family itself, then the most announced."""
    plain = plain_name(name)
    for is_meant in (
        lambda model: model.id == name,
        lambda model: plain_name(model.id) == plain,
        lambda model: plain in map(plain_name, model.aliases),
    ):
        found = [model for model in fitting if model.id != ANY and is_meant(model)]
        if found:
            own = [model for model in found if model.family == family] if family else []
            meant = _most_announced(fleet, own or found)
            if meant.kind != "checkpoint" or family:
                return meant
            return _most_announced(fleet, [model for model in fitting if model.id == meant.id])
    return None


@settings(max_examples=40, deadline=None)
@given(
    steps,
    st.frozensets(st.sampled_from(["checkpoint:a", "controlnet:b", "annotator:canny", "scheduler:ddim"])),
    st.sampled_from([(), (("pixels", 50),), (("pixels", 200),), (("pixels", 500),)]),
)
async def test_what_any_worker_can_do_is_what_looking_at_all_of_them_finds(taken, needs, amounts) -> None:
    fleet = Fleet()
    for step in taken:
        await fleet.step(*step)
    for stage in ("diffusion", "preprocess", "none"):
        known = {worker: group for worker, group in fleet.known.items() if STAGE_OF[worker] == stage}
        for only_live in (False, True):
            expected = any(
                can_do(group.capabilities.offers, group.capabilities.all_limits, needs, amounts)
                for worker, group in known.items()
                if not only_live or worker in group.live
            )
            assert fleet.groups.can_any(stage, needs, amounts, only_live=only_live) == expected
        for need in needs:
            offering = {f"node-{worker}" for worker, group in known.items() if need in group.offers}
            assert set(fleet.groups.offering(stage, need)) == offering
        takes = {
            f"node-{worker}": dict(group.capabilities.limits).get("pixels")
            for worker, group in known.items()
            if needs <= group.offers
        }
        assert dict(fleet.groups.limits_of(stage, "pixels", needs)) == takes


def a_catalog(*announced: Capabilities) -> FleetCatalog:
    """Of live workers that hold nothing."""
    catalog = FleetCatalog()
    for number, each in enumerate(announced):
        catalog.change(each, before=None, after=(False, float(number), ""))
    return catalog


SMALL = AnnouncedModel(id="small", kind="checkpoint", family="sd1")
USUAL = AnnouncedModel(id="usual", kind="checkpoint", family="sd1", is_default=True)
BOTH = a_catalog(Capabilities(models=(SMALL, USUAL)))


def test_without_a_name_a_request_gets_no_checkpoint_that_must_be_fetched_first() -> None:
    catalog = a_catalog(Capabilities(models=(SMALL, USUAL)))
    with pytest.raises(NotFound, match="no worker holds a model; name one of small, usual"):
        look_up.checkpoint_of(catalog, "", field="generation.model")
    catalog.count_held([("checkpoint:small", DISK)], 1, live=True)
    assert look_up.checkpoint_of(catalog, "", field="generation.model") is SMALL
    catalog.count_held([("checkpoint:usual", VRAM)], 1, live=True)
    assert look_up.checkpoint_of(catalog, "", field="generation.model") is USUAL
    catalog.count_held([("checkpoint:usual", VRAM)], -1, live=True)
    assert look_up.checkpoint_of(catalog, "", field="generation.model") is SMALL


def test_what_only_a_worker_holds_that_is_away_is_the_default_where_no_live_one_holds_any() -> None:
    catalog = a_catalog(Capabilities(models=(SMALL, USUAL)))
    catalog.count_held([("checkpoint:usual", DISK)], 1, live=False)
    assert catalog.default_checkpoint() is USUAL
    catalog.count_held([("checkpoint:small", DISK)], 1, live=True)
    assert catalog.default_checkpoint() is SMALL


def test_a_model_is_where_the_best_of_its_workers_holds_it() -> None:
    catalog = a_catalog(Capabilities(models=(SMALL,)))
    assert catalog.residency_of("checkpoint", "small") == REMOTE
    for place, live in ((VRAM, False), (DISK, True), (RAM, True)):
        catalog.count_held([("checkpoint:small", place)], 1, live=live)
    assert catalog.residency_of("checkpoint", "small") == RAM, "what lives counts before what is away"
    catalog.count_held([("checkpoint:small", RAM)], -1, live=True)
    assert catalog.residency_of("checkpoint", "small") == DISK
    catalog.count_held([("checkpoint:small", DISK)], -1, live=True)
    assert catalog.residency_of("checkpoint", "small") == VRAM
    assert catalog.residency_of("lora", "small") == REMOTE


def test_ids_that_an_annotator_and_a_controlnet_share_are_held_apart() -> None:
    worker = Worker(id="w", node="n", stage="s", vram_models=frozenset({"x"}), disk_models=frozenset({"x", "y"}))
    needs = {"x": ("annotator:x", "controlnet:x"), "y": ("lora:y",)}
    assert set(held_by(worker, needs)) == {("annotator:x", VRAM), ("controlnet:x", VRAM), ("lora:y", DISK)}


def test_of_a_controlnet_in_several_families_the_checkpoints_own_is_meant() -> None:
    nets = [
        AnnouncedModel(id="canny", kind="controlnet", family=each, aliases=(f"{each}_canny",))
        for each in ("sd1", "sdxl")
    ]
    catalog = a_catalog(Capabilities(models=(*nets, replace(SMALL, family="sdxl"))))
    assert catalog.model("controlnet", "Canny.safetensors", "sdxl") is nets[1]
    assert catalog.model("controlnet", "sd1_canny", "sdxl") is None
    edges = AnnouncedAnnotator(id="canny", controlnets=("depth", "canny"))
    found = look_up.controlnet_of(catalog, "", edges, replace(SMALL, family="sdxl"), field="f")
    assert found == "canny"
    with pytest.raises(InvalidField, match="no ControlNet of small is made for canny"):
        look_up.controlnet_of(catalog, "", replace(edges, controlnets=("depth",)), SMALL, field="f")


@given(
    st.lists(st.sampled_from(["bad hands", "bad", "Neg-1", "(-:", "neg", "hands"]), unique=True),
    st.sampled_from(["bad hands, NEG-1", "badly (-:", "", "hands bad", "a neg-1 bad_hands"]),
)
def test_of_the_ids_that_may_stand_in_a_text_none_is_missing(ids: list[str], text: str) -> None:
    catalog = a_catalog(
        Capabilities(models=tuple(AnnouncedModel(id=each, kind="embedding", family="sd1") for each in ids))
    )
    assert words_in(text, catalog.mentioned("embedding", text, "sd1")) == words_in(text, sorted(ids))
    assert catalog.mentioned("embedding", text, "sdxl") == []


def test_a_reference_is_taken_where_a_worker_fetches_any_of_its_kind() -> None:
    fetching = a_catalog(Capabilities(models=(SMALL, AnnouncedModel(id=ANY, kind="lora"))))
    assert look_up.model_of(fetching, "lora", "hf:org/lora", SMALL, field="f") == "hf:org/lora"
    with pytest.raises(NotFound, match="FANLIGHT_DIFFUSION_FETCH"):
        look_up.model_of(fetching, "vae", "hf:org/vae", SMALL, field="f")
    with pytest.raises(NotFound, match="there are small, usual"):
        look_up.checkpoint_of(BOTH, "other", field="generation.model")
