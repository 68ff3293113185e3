"""A worker can match the catalog of annotators and never change it; no newcomer changes what requests mean."""

from dataclasses import replace

import pytest

from fanlight.contract.names import ANY
from fanlight.contract.parameters import Parameter
from fanlight.contract.shipped import ShippedAnnotator, shipped_annotators
from fanlight.errors import InvalidField, NotFound
from services.gateway.domain.job import DIFFUSION, PREPROCESS
from services.gateway.domain.offers import OfferRules, build_need
from services.gateway.domain.workers import AnnouncedAnnotator, AnnouncedModel, Capabilities
from tests.fakes.fleet import STARTER, Fleet, annotation, generation, resolved

LOW = Parameter(name="low", default=100, minimum=0, maximum=255)
CANNY = ShippedAnnotator(
    id="canny", version="4", parameters=(LOW,), controlnets=("canny",), aliases=("Canny edges",), license="Apache-2.0"
)
SHIPPED = {"canny": CANNY}
TRUE = AnnouncedAnnotator(id="canny", parameters=(LOW,), version="4+opencv-5", device="cpu/uint8", deterministic=True)
STRICT = OfferRules(shipped=SHIPPED)


def offered(announced: AnnouncedAnnotator, rules: OfferRules = STRICT) -> AnnouncedAnnotator | None:
    counted, left_out = rules.offered(Capabilities(annotators=(announced,)))
    assert len(counted.annotators) + len(left_out) == 1
    return counted.annotators[0] if counted.annotators else None


def test_only_the_device_is_the_workers_to_say_of_what_ships() -> None:
    lies = replace(
        TRUE,
        description="mine",
        deterministic=False,
        weight_bytes=7,
        controlnets=("depth",),
        version="other",
        license="none",
        aliases=("openpose",),
    )
    for each in (TRUE, lies):
        found = offered(each)
        assert found is not None
        assert found.device == "cpu/uint8"
        assert (found.version, found.deterministic, found.license) == ("4", True, "Apache-2.0")
        assert (found.controlnets, found.aliases) == (("canny",), ("Canny edges",))


@pytest.mark.parametrize(
    "parameters",
    [
        (),
        (replace(LOW, default=99),),
        (replace(LOW, default=100.0),),
        (replace(LOW, maximum=256),),
        (LOW, replace(LOW, name="high")),
    ],
)
def test_with_other_parameters_it_is_left_out(parameters: tuple[Parameter, ...]) -> None:
    assert offered(replace(TRUE, parameters=parameters)) is None


def test_another_description_of_a_parameter_is_no_other_parameter() -> None:
    assert offered(replace(TRUE, parameters=(replace(LOW, description="Low"),))) is not None


def test_what_does_not_ship_is_offered_only_if_the_operator_allows_it() -> None:
    own = AnnouncedAnnotator(id="own", version="1")
    assert offered(own) is None
    assert offered(own, replace(STRICT, others=frozenset({"own"}))) == own
    assert offered(own, replace(STRICT, others=frozenset({ANY}))) == own
    assert offered(own, replace(STRICT, others=frozenset({"else"}))) is None


def test_an_allowed_annotator_takes_no_name_of_what_ships() -> None:
    rules = replace(STRICT, others=frozenset({ANY}))
    found = offered(AnnouncedAnnotator(id="own", aliases=("Canny edges", "canny", "mine")), rules)
    assert found is not None
    assert found.aliases == ("mine",)


def test_no_offer_by_name_alone_stands_for_an_annotator_that_is_left_out() -> None:
    announced = Capabilities(
        annotators=(TRUE,), other_offers=("annotator:canny", "annotator:own", "build:own:1", "scheduler:ddim")
    )
    counted, _ = STRICT.offered(announced)
    assert counted.other_offers == ("annotator:canny", build_need(TRUE), "scheduler:ddim")
    counted, _ = STRICT.offered(replace(announced, annotators=()))
    assert counted.other_offers == ("scheduler:ddim",)


def test_a_worker_has_one_default_model_and_it_is_a_checkpoint() -> None:
    models = tuple(
        AnnouncedModel(id=each, kind=kind, is_default=True)
        for each, kind in (("x", "lora"), ("a", "checkpoint"), ("b", "checkpoint"))
    )
    counted, _ = STRICT.offered(Capabilities(models=models))
    assert [each.id for each in counted.models if each.is_default] == ["a"]


def test_every_annotator_of_the_catalog_matches_itself() -> None:
    for shipped in shipped_annotators().values():
        announced = AnnouncedAnnotator(id=shipped.id, parameters=shipped.parameters, device="cpu")
        assert offered(announced, OfferRules(shipped=shipped_annotators())) is not None


async def test_a_worker_that_announces_other_parameters_changes_nothing_and_the_operator_sees_it() -> None:
    async with Fleet(shipped=SHIPPED, settings={"other_annotators": ""}).running() as fleet:
        sound = fleet.worker(PREPROCESS, annotators=(TRUE,))
        liar = fleet.worker(PREPROCESS, "liar", annotators=(replace(TRUE, parameters=(), version="other"),))
        await sound.come()
        await liar.come()
        workers = fleet.gateway.workers
        assert workers.offers.catalog().annotators["canny"].parameters == (LOW,)
        await fleet.gateway.jobs.create(annotation(low=50))
        assert await liar.lease() == []
        assert await sound.work() == 1
        (left_out,) = next(each for each in workers.statuses() if each.worker.id == liar.worker.id).avoided
        assert left_out.need == "annotator:canny"
        assert "parameters" in left_out.why


async def test_a_version_of_a_workers_own_changes_nobodys_hits() -> None:
    async with Fleet(shipped=SHIPPED, settings={"other_annotators": ""}).running() as fleet:
        sound = fleet.worker(PREPROCESS, annotators=(TRUE,))
        await sound.come()
        await fleet.gateway.jobs.create(annotation())
        assert await sound.work() == 1
        liar = fleet.worker(PREPROCESS, "liar", annotators=(replace(TRUE, version="other", deterministic=False),))
        await liar.come()
        assert (await fleet.gateway.jobs.create(annotation())).state.ended


async def test_workers_that_claim_many_devices_make_no_request_look_up_many_images(fleet: Fleet) -> None:
    for i in range(30):
        await fleet.worker(PREPROCESS, f"w{i}", annotators=(replace(TRUE, device=f"d{i}"),)).come()
    assert len(fleet.gateway.workers.offers.variants("canny")) == 8


NEWCOMER = AnnouncedModel(id="a-newcomer", kind="checkpoint", is_default=True, width_px=64, height_px=64)


async def default_of(fleet: Fleet) -> str:
    return str(resolved(generation(model="", workers=fleet.gateway.workers.offers)).model)


async def test_no_newcomer_moves_the_default_model(fleet: Fleet) -> None:
    first = replace(STARTER, id="first")
    await fleet.worker(DIFFUSION, models=(first,)).come()
    fleet.clock.advance(1.0)
    await fleet.worker(DIFFUSION, "newcomer", models=(NEWCOMER,)).come()
    assert await default_of(fleet) == "first"
    fleet.clock.advance(1.0)
    await fleet.worker(DIFFUSION, "third", models=(replace(STARTER, is_default=False),)).come()
    assert await default_of(fleet) == "starter", "what ships goes before what workers say"


async def test_the_default_model_is_the_operators_where_it_is_set() -> None:
    async with Fleet(settings={"default_model": "other"}).running() as fleet:
        await fleet.worker(DIFFUSION, models=(STARTER,)).come()
        with pytest.raises(NotFound, match=r"no worker has the default one, other; name one of starter") as error:
            await default_of(fleet)
        assert error.value.field == "generation.model"
        await fleet.worker(DIFFUSION, "other", models=(replace(STARTER, id="other", is_default=False),)).come()
        assert await default_of(fleet) == "other"


async def test_no_newcomer_changes_the_size_of_a_shared_model(fleet: Fleet) -> None:
    await fleet.worker(DIFFUSION).come()
    fleet.clock.advance(1.0)
    lies = replace(STARTER, width_px=512, height_px=512, size_step_px=512, aliases=("other",))
    await fleet.worker(DIFFUSION, "liar", models=(lies,)).come()
    request = resolved(generation(workers=fleet.gateway.workers.offers))
    assert (request.width_px, request.height_px) == (256, 256)
    resolved(generation(width_px=264, height_px=256, workers=fleet.gateway.workers.offers))
    with pytest.raises(InvalidField, match="multiple of 8"):
        resolved(generation(width_px=260, height_px=256, workers=fleet.gateway.workers.offers))


async def test_no_newcomer_takes_the_alias_of_a_model_that_more_workers_have(fleet: Fleet) -> None:
    usual = replace(STARTER, id="usual", aliases=("sd15",))
    for name in ("w1", "w2"):
        await fleet.worker(DIFFUSION, name, models=(usual,)).come()
    await fleet.worker(DIFFUSION, "liar", models=(replace(NEWCOMER, aliases=("sd15", "usual")),)).come()
    assert resolved(generation(model="sd15", workers=fleet.gateway.workers.offers)).model == "usual"
    assert resolved(generation(model="usual", workers=fleet.gateway.workers.offers)).model == "usual"
