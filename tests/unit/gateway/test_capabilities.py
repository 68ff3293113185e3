"""Capabilities are stored once for all workers that announce the same, and only as long as one does."""

from dataclasses import replace

import pytest

from fanlight.errors import FailedPrecondition, Unavailable
from services.gateway.app.capabilities import BUCKET, CHECK_INTERVAL_S, UNUSED_S, digest_of
from services.gateway.app.leasing import Poll
from services.gateway.domain.job import DIFFUSION, PREPROCESS
from services.gateway.domain.workers import DISK, RAM, REMOTE, VRAM, AnnouncedModel, Capabilities
from tests.fakes.fleet import OTHER, STARTER, Fleet, FleetWorker, generation

ONE = Capabilities(models=(STARTER,))
TWO = Capabilities(models=(STARTER, OTHER))


async def kept(fleet: Fleet) -> set[str]:
    return {record.key for record in await fleet.store.list(BUCKET, limit=100)}


async def come(fleet: Fleet, name: str, capabilities: Capabilities) -> FleetWorker:
    worker = fleet.worker(DIFFUSION, name, models=capabilities.models, limits=capabilities.limits, is_old=True)
    await worker.come()
    return worker


def ids(fleet: Fleet) -> set[str]:
    return {model.id for model in fleet.gateway.workers.offers.catalog().models.values()}


async def test_workers_that_announce_the_same_have_one_record_of_it(fleet: Fleet) -> None:
    for name in ("1", "2", "3"):
        await come(fleet, name, ONE)
    await come(fleet, "4", TWO)
    assert await kept(fleet) == {digest_of(ONE), digest_of(TWO)}
    records = await fleet.store.list("workers", limit=10)
    assert len(records) == 4
    assert not any(b"checkpoint" in record.value for record in records)


async def test_a_restarted_gateway_knows_what_workers_offer_and_asks_none_of_them_again(fleet: Fleet) -> None:
    worker = await come(fleet, "1", replace(TWO, limits=(("pixels", 4096),)))
    async with fleet.restarted().running() as again:
        assert ids(again) == {"starter", "other"}
        needs = frozenset({"checkpoint:other"})
        assert again.gateway.workers.offers.can_any(DIFFUSION, needs, (("pixels", 4096),))
        assert not again.gateway.workers.offers.can_any(DIFFUSION, needs, (("pixels", 4097),))
        assert not again.gateway.workers.offers.can_any(DIFFUSION, needs, only_live=True)
        assert again.gateway.workers.offers.residency_of("checkpoint", "other") == DISK
        answer = await again.gateway.polls.lease(replace(worker.poll(limit=0), capabilities=None))
        assert not answer.wants_capabilities
        assert again.gateway.workers.offers.can_any(DIFFUSION, needs, only_live=True)


def calling(worker: FleetWorker, digest: str, capabilities: Capabilities | None) -> Poll:
    return replace(worker.poll(limit=0), capabilities_digest=digest, capabilities=capabilities)


async def test_no_worker_can_put_other_capabilities_in_the_place_of_anothers(fleet: Fleet) -> None:
    honest, liar = fleet.worker(DIFFUSION, "honest"), fleet.worker(DIFFUSION, "liar")
    await fleet.gateway.polls.lease(calling(honest, "aa", TWO))
    await fleet.gateway.polls.lease(calling(liar, "aa", ONE))
    by_node = {
        need: fleet.gateway.workers.offers.offering(DIFFUSION, need)
        for need in ("checkpoint:other", "checkpoint:starter")
    }
    assert by_node == {"checkpoint:other": ["honest"], "checkpoint:starter": ["honest", "liar"]}
    # Nor does its name for them say anything of a worker that never sent them.
    newcomer = fleet.worker(DIFFUSION, "newcomer")
    assert (await fleet.gateway.polls.lease(calling(newcomer, "aa", None))).wants_capabilities
    assert (await fleet.gateway.polls.lease(calling(newcomer, digest_of(TWO), None))).wants_capabilities


async def test_capabilities_of_the_same_name_and_other_content_are_taken_in(fleet: Fleet) -> None:
    worker = fleet.worker(DIFFUSION)
    await fleet.gateway.polls.lease(calling(worker, "aa", TWO))
    await fleet.gateway.polls.lease(calling(worker, "aa", ONE))
    assert ids(fleet) == {"starter"}
    async with fleet.restarted().running() as again:
        assert ids(again) == {"starter"}


async def test_what_no_known_worker_announces_any_more_is_swept_after_a_while(fleet: Fleet) -> None:
    worker = await come(fleet, "1", TWO)
    worker.capabilities = ONE
    await worker.come()
    await fleet.gateway.workers.sweep()
    assert await kept(fleet) == {digest_of(ONE), digest_of(TWO)}
    fleet.clock.advance(UNUSED_S)
    await worker.come()
    await fleet.gateway.workers.sweep()
    assert await kept(fleet) == {digest_of(ONE)}
    worker.capabilities = TWO
    await worker.come()
    assert ids(fleet) == {"starter", "other"}
    assert digest_of(TWO) in await kept(fleet)


async def test_what_another_gateway_swept_by_mistake_is_kept_again(fleet: Fleet) -> None:
    worker = await come(fleet, "1", ONE)
    await fleet.store.delete(BUCKET, digest_of(ONE))
    async with fleet.restarted().running() as again:
        assert ids(again) == set()
        assert (await again.gateway.polls.lease(calling(worker, "other", None))).wants_capabilities
    fleet.clock.advance(CHECK_INTERVAL_S)
    await worker.come()
    assert await kept(fleet) == {digest_of(ONE)}
    async with fleet.restarted().running() as again:
        assert ids(again) == {"starter"}


async def test_a_damaged_record_is_written_again_when_a_worker_announces_it(fleet: Fleet) -> None:
    await come(fleet, "1", ONE)
    (record,) = await fleet.store.list(BUCKET, limit=2)
    await fleet.store.put(BUCKET, record.key, b"damaged", revision=record.revision)
    async with fleet.restarted().running() as again:
        assert ids(again) == set()
        await come(again, "1", ONE)
        assert ids(again) == {"starter"}
    async with fleet.restarted().running() as again:
        assert ids(again) == {"starter"}


@pytest.mark.parametrize(
    ("places", "residency"),
    [((), REMOTE), (("disk",), DISK), (("disk", "ram"), RAM), (("vram", "disk"), VRAM)],
)
async def test_where_a_model_is_comes_from_what_workers_hold(
    fleet: Fleet, places: tuple[str, ...], residency: int
) -> None:
    for number, place in enumerate(places or ("none",)):
        worker = fleet.worker(DIFFUSION, f"w{number}", models=(STARTER,), is_old=True)
        worker.disk = frozenset()
        if place != "none":
            worker.worker = replace(worker.worker, **{f"{place}_models": frozenset({"starter", "not announced"})})
        await worker.come()
    assert fleet.gateway.workers.offers.residency_of("checkpoint", "starter") == residency
    assert fleet.gateway.workers.offers.residency_of("checkpoint", "not announced") == REMOTE
    default = fleet.gateway.workers.offers.catalog().default_checkpoint()
    assert (default == STARTER) == (residency != REMOTE)


async def test_what_is_loaded_or_dropped_changes_where_it_is_and_no_capabilities(fleet: Fleet) -> None:
    worker = await come(fleet, "1", ONE)
    before = await kept(fleet)
    worker.worker = replace(worker.worker, vram_models=frozenset({"starter"}))
    await worker.come()
    assert fleet.gateway.workers.offers.residency_of("checkpoint", "starter") == VRAM
    worker.worker, worker.disk = replace(worker.worker, vram_models=frozenset()), frozenset()
    await worker.come()
    assert fleet.gateway.workers.offers.residency_of("checkpoint", "starter") == REMOTE
    assert await kept(fleet) == before


async def test_what_a_worker_held_that_is_away_counts_behind_what_a_live_one_holds(fleet: Fleet) -> None:
    gone = await come(fleet, "gone", TWO)
    gone.worker = replace(gone.worker, vram_models=frozenset({"starter"}))
    await gone.come()
    fleet.clock.advance(60)
    here = fleet.worker(DIFFUSION, "here", models=TWO.models, is_old=True)
    here.disk = frozenset({"other"})
    await here.come()
    assert fleet.gateway.workers.offers.residency_of("checkpoint", "other") == DISK
    assert fleet.gateway.workers.offers.residency_of("checkpoint", "starter") == VRAM
    default = fleet.gateway.workers.offers.catalog().default_checkpoint()
    assert default is not None
    assert default.id == "other"


# A fleet of unequal workers

SMALL = Capabilities(models=(STARTER,), limits=(("pixels", 512 * 512),))
LARGE = Capabilities(models=(STARTER,), limits=(("pixels", 1024 * 1024),))
ANY_SIZE = Capabilities(models=(replace(STARTER, text_encoder_layers=12),), other_offers=("safety_checker:block",))
STARTS = frozenset({"checkpoint:starter"})


async def test_a_fleet_of_unequal_workers_says_who_could_do_what(fleet: Fleet) -> None:
    await come(fleet, "small", SMALL)
    await come(fleet, "large", LARGE)
    offers = fleet.gateway.workers.offers
    assert offers.can_any(DIFFUSION, STARTS, (("pixels", 1024 * 1024),))
    assert not offers.can_any(DIFFUSION, STARTS, (("pixels", 1024 * 1024 + 1),))
    assert offers.limits_of(DIFFUSION, "pixels", STARTS) == [("large", 1024 * 1024), ("small", 512 * 512)]
    assert offers.limits_of(DIFFUSION, "pixels", frozenset({"checkpoint:none"})) == []
    assert offers.offering(DIFFUSION, "safety_checker:block") == []
    free = fleet.worker(DIFFUSION, "free", models=ANY_SIZE.models, other_offers=ANY_SIZE.other_offers)
    await free.come()
    assert offers.limits_of(DIFFUSION, "pixels", STARTS)[0] == ("free", None)
    assert offers.offering(DIFFUSION, "safety_checker:block") == ["free"]
    assert offers.can_any(DIFFUSION, STARTS, (("pixels", 10**9), ("text_encoder_layers:starter", 12)))
    assert not offers.can_any(DIFFUSION, STARTS, (("pixels", 10**9), ("text_encoder_layers:starter", 13)))
    # Each alone could do a part of it.
    assert not offers.can_any(DIFFUSION, STARTS | {"safety_checker:block"}, (("text_encoder_layers:starter", 13),))


async def test_a_worker_of_another_stage_makes_no_request_of_this_one_possible(fleet: Fleet) -> None:
    await come(fleet, "small", SMALL)
    odd = fleet.worker(PREPROCESS, "odd", models=(OTHER, STARTER), limits=(("pixels", 10**9),))
    odd.worker = replace(odd.worker, vram_models=frozenset({"other"}))
    await odd.come()
    offers, other = fleet.gateway.workers.offers, frozenset({"checkpoint:other"})
    assert not offers.can_any(DIFFUSION, other)
    assert not offers.can_any(DIFFUSION, STARTS, (("pixels", 10**9),))
    assert offers.offering(DIFFUSION, "checkpoint:other") == []
    assert offers.limits_of(DIFFUSION, "pixels", STARTS) == [("small", 512 * 512)]
    assert offers.offering(PREPROCESS, "checkpoint:other") == ["odd"]
    with pytest.raises(FailedPrecondition, match="needs checkpoint other, which no worker offers"):
        generation(model="other", workers=offers)
    default = offers.catalog().default_checkpoint()
    assert default is not None
    assert default.id == "starter", "no other stage's worker gives the default"


async def test_a_worker_that_is_leaving_makes_no_request_possible_and_gives_no_default(fleet: Fleet) -> None:
    worker = await come(fleet, "1", TWO)
    offers = fleet.gateway.workers.offers
    assert offers.can_any(DIFFUSION, STARTS)
    worker.worker = replace(worker.worker, draining=True)
    await worker.come()
    assert not offers.can_any(DIFFUSION, STARTS)
    assert (
        offers.offering(DIFFUSION, "checkpoint:starter"),
        offers.limits_of(DIFFUSION, "pixels"),
    ) == ([], [])
    assert offers.catalog().default_checkpoint() is None
    assert (offers.residency_of("checkpoint", "starter"), offers.catalog().stages) == (
        REMOTE,
        frozenset(),
    )
    with pytest.raises(Unavailable, match="no diffusion worker"):
        generation(workers=offers)
    worker.worker = replace(worker.worker, vram_models=frozenset({"other"}))
    await worker.come()
    assert offers.residency_of("checkpoint", "other") == REMOTE
    async with fleet.restarted().running() as again:
        assert not again.gateway.workers.offers.can_any(DIFFUSION, STARTS)
    # Its announcement is kept as long as the worker is known, and it may change its mind.
    fleet.clock.advance(2 * UNUSED_S)
    await fleet.gateway.sweep()
    assert await kept(fleet) == {digest_of(TWO)}
    worker.worker = replace(worker.worker, draining=False)
    await worker.come()
    assert offers.can_any(DIFFUSION, STARTS)
    assert offers.residency_of("checkpoint", "other") == VRAM
    default = offers.catalog().default_checkpoint()
    assert default is not None
    assert default.id == "starter"


def at_home(fleet: Fleet, name: str, capabilities: Capabilities, stage: str = DIFFUSION) -> FleetWorker:
    return fleet.worker(stage, name, node="home", models=capabilities.models, is_old=True)


async def test_a_nodes_new_worker_replaces_its_older_one_that_is_away(fleet: Fleet) -> None:
    other = at_home(fleet, "other-stage", TWO, PREPROCESS)
    await other.come()
    await at_home(fleet, "old", TWO).come()
    await come(fleet, "elsewhere", replace(TWO, limits=(("pixels", 9),)))
    fleet.clock.advance(60.0)
    assert fleet.gateway.workers.offers.offering(DIFFUSION, "checkpoint:other") == ["home", "elsewhere"]
    await at_home(fleet, "new", ONE).come()
    assert fleet.gateway.workers.offers.offering(DIFFUSION, "checkpoint:other") == ["elsewhere"]
    assert fleet.gateway.workers.offers.offering(PREPROCESS, "checkpoint:other") == ["home"]
    assert await fleet.store.get("workers", "old-diffusion") is None


async def test_a_worker_that_was_replaced_before_it_counted_as_away_counts_no_more_once_it_does(fleet: Fleet) -> None:
    old, new = at_home(fleet, "old", TWO), at_home(fleet, "new", ONE)
    await old.come()
    fleet.clock.advance(1.0)
    await new.come()
    offers, other = fleet.gateway.workers.offers, frozenset({"checkpoint:other"})
    assert offers.can_any(DIFFUSION, other), "it may be a second worker of the node"
    fleet.clock.advance(60.0)
    await new.come()
    assert not offers.can_any(DIFFUSION, other)
    await old.come()
    assert offers.can_any(DIFFUSION, other), "it is back"
    fleet.clock.advance(60.0)
    assert offers.can_any(DIFFUSION, other), "it was heard of after the other came"
    assert offers.catalog().stages == {DIFFUSION}


async def test_a_replaced_worker_is_forgotten_by_the_next_sweep(fleet: Fleet) -> None:
    await at_home(fleet, "old", TWO).come()
    fleet.clock.advance(1.0)
    new = at_home(fleet, "new", ONE)
    await new.come()
    fleet.clock.advance(60.0)
    await new.come()
    await fleet.gateway.sweep()
    assert [each.key for each in await fleet.store.list("workers", limit=9)] == ["new-diffusion"]
    assert fleet.gateway.workers.offers.can_any(DIFFUSION, STARTS)


async def test_one_worker_cannot_change_the_family_of_a_checkpoint_that_others_announce(fleet: Fleet) -> None:
    def family() -> str:
        found = fleet.gateway.workers.offers.catalog().model("checkpoint", "starter")
        assert found is not None
        return found.family

    await come(fleet, "first", ONE)
    fleet.clock.advance(1.0)
    # Both before and after "starter" by name.
    for odd in ("", "zzz"):
        worker = await come(fleet, f"odd-{odd}", Capabilities(models=(replace(STARTER, family=odd),)))
        assert family() == "starter", "the one announced first"
    for number in range(2):
        await come(fleet, f"more-{number}", replace(ONE, limits=(("pixels", number + 1),)))
        await come(fleet, f"odd-{number}", worker.capabilities)
        assert family() == "starter", "as many announce it"
    await come(fleet, "odd-last", worker.capabilities)
    assert family() == "zzz", "more announce it"
    fleet.clock.advance(60.0)
    await come(fleet, "first", ONE)
    assert family() == "zzz", "workers that are away count too"


async def test_a_refusal_names_five_nodes_at_most_live_ones_first(fleet: Fleet) -> None:
    for number in range(4):
        await come(fleet, f"gone{number}", SMALL)
    fleet.clock.advance(60)
    for number in range(3):
        await come(fleet, f"here{number}", replace(SMALL, limits=(("pixels", 512 * 512 - number),)))
    found = fleet.gateway.workers.offers.offering(DIFFUSION, "checkpoint:starter")
    assert sorted(found[:3]) == ["here0", "here1", "here2"]
    assert len(found) == 5
    limits = fleet.gateway.workers.offers.limits_of(DIFFUSION, "pixels", STARTS)
    assert len(limits) == 5
    assert limits[0] == ("here0", 512 * 512)
    assert [limit for _, limit in limits] == sorted((limit for _, limit in limits), reverse=True)


async def test_the_catalog_costs_no_merge_where_nothing_changed(fleet: Fleet) -> None:
    """The same object, however many ask, and after polls that announce nothing new."""
    worker = await come(fleet, "1", ONE)
    catalog = fleet.gateway.workers.offers.catalog()
    starter = catalog.models["checkpoint", "starter", "starter"]
    await worker.come()
    await fleet.gateway.jobs.create(generation())
    assert fleet.gateway.workers.offers.catalog() is catalog
    assert catalog.models["checkpoint", "starter", "starter"] is starter


async def test_models_of_many_workers_are_found_by_any_name(fleet: Fleet) -> None:
    for number in range(20):
        models = tuple(
            AnnouncedModel(id=f"m{number}-{i}", kind="checkpoint", aliases=(f"Alias {number}/{i}",)) for i in range(5)
        )
        await come(fleet, f"w{number}", Capabilities(models=models))
    catalog = fleet.gateway.workers.offers.catalog()
    assert len(catalog.models) == 100
    assert catalog.model("checkpoint", "alias 7/3.safetensors").id == "m7-3"
