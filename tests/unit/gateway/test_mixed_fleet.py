"""Unequal workers: each request goes to one that can do it, and what no worker can do is refused at once."""

from dataclasses import replace
from typing import Any

import pytest

from fanlight.errors import FailedPrecondition, FanlightError
from services.gateway.app.submission import NewJob
from services.gateway.domain.job import DIFFUSION, PREPROCESS
from services.gateway.domain.workers import AnnouncedModel
from tests.fakes.fleet import STARTER, STARTER_CANNY, Fleet, FleetWorker, control, generation, photo

SMALL, LARGE = 128 * 128, 512 * 512


def model(**changes: Any) -> AnnouncedModel:
    return replace(STARTER, width_px=64, height_px=64, **changes)


async def come(fleet: Fleet, name: str, *offers: str, **known: Any) -> FleetWorker:
    """A diffusion worker with these other offers."""
    worker = fleet.worker(DIFFUSION, name, **{"models": (model(),), "other_offers": tuple(sorted(offers)), **known})
    await worker.come()
    return worker


def asked(fleet: Fleet, *controls: Any, **fields: Any) -> NewJob:
    return generation(1, *controls, workers=fleet.gateway.workers.offers, **fields)


async def who_leases(fleet: Fleet, *workers: FleetWorker, **fields: Any) -> list[str]:
    """The names of those of the workers that get the request, when all of them ask, in this order."""
    await fleet.gateway.jobs.create(asked(fleet, **fields))
    return [worker.worker.node for worker in workers if await worker.lease()]


def refusal(fleet: Fleet, *controls: Any, **fields: Any) -> FanlightError:
    with pytest.raises(FanlightError) as caught:
        asked(fleet, *controls, **fields)
    return caught.value


async def small_and_large(fleet: Fleet) -> tuple[FleetWorker, FleetWorker]:
    small = await come(fleet, "small", limits=(("pixels", SMALL),))
    return small, await come(fleet, "large", limits=(("pixels", LARGE),))


@pytest.mark.parametrize(("side_px", "node"), [(128, "small"), (136, "large"), (512, "large")])
async def test_an_image_goes_to_a_worker_that_takes_its_pixels(fleet: Fleet, side_px: int, node: str) -> None:
    small, large = await small_and_large(fleet)
    assert await who_leases(fleet, small, large, width_px=side_px, height_px=side_px) == [node]


async def test_only_the_small_one_there_leaves_a_large_image_to_the_large_one(fleet: Fleet) -> None:
    small, large = await small_and_large(fleet)
    for _ in range(4):
        await fleet.gateway.jobs.create(asked(fleet, width_px=512, height_px=512))
    assert await small.work() == 0
    assert await large.work() == 4


async def test_an_image_that_is_too_large_for_all_is_refused_with_what_each_takes(fleet: Fleet) -> None:
    await small_and_large(fleet)
    # Workers of other stages have no such limit, and are no answer.
    await fleet.worker(PREPROCESS, "edges").come()
    error = refusal(fleet, width_px=1024, height_px=512)
    assert (type(error), error.field) == (FailedPrecondition, "generation.width_px")
    assert error.message == f"needs {1024 * 512} pixels; large takes {LARGE}, small takes {SMALL}"


async def test_a_worker_without_limit_takes_any_size(fleet: Fleet) -> None:
    small, _ = await small_and_large(fleet)
    huge = await come(fleet, "huge")
    assert await who_leases(fleet, small, huge, width_px=2048, height_px=2048) == ["huge"]


async def test_clip_skip_goes_to_a_worker_whose_text_encoder_has_the_layers(fleet: Fleet) -> None:
    shallow = await come(fleet, "shallow", models=(model(text_encoder_layers=2),))
    deep = await come(fleet, "deep", models=(model(text_encoder_layers=12),))
    assert await who_leases(fleet, shallow, deep, clip_skip=3) == ["deep"]
    assert await who_leases(fleet, shallow, clip_skip=2) == ["shallow"]


async def test_clip_skip_beyond_every_text_encoder_is_refused(fleet: Fleet) -> None:
    await come(fleet, "shallow", models=(model(text_encoder_layers=2),))
    await come(fleet, "other", models=(model(id="other", text_encoder_layers=12),))
    error = refusal(fleet, clip_skip=12)
    assert (type(error), error.field) == (FailedPrecondition, "generation.clip_skip")
    assert error.message == "needs 12 text encoder layers; shallow takes 2"
    assert asked(fleet, clip_skip=12, model="other")


NEEDED = [
    ("safety_checker", "block", "safety_checker:block", "safety_checker:flag", "flag (plain)"),
    ("precision", "float16", "precision:float16", "precision:float32", "float32 (plain)"),
    ("scheduler", "Euler a", "scheduler:euler_a", "scheduler:ddim", "ddim (plain)"),
]


@pytest.mark.parametrize(("field", "value", "offer", "other", "there"), NEEDED, ids=[each[0] for each in NEEDED])
async def test_an_option_goes_to_the_worker_that_offers_it(
    fleet: Fleet, field: str, value: str, offer: str, other: str, there: str
) -> None:
    plain = await come(fleet, "plain", other)
    error = refusal(fleet, **{field: value})
    assert (type(error), error.field) == (FailedPrecondition, f"generation.{field}")
    assert f"which no worker offers; there are {there}" in error.message
    able = await come(fleet, "able", offer)
    assert await who_leases(fleet, plain, able, **{field: value}) == ["able"]


@pytest.mark.parametrize("fields", [{}, {"safety_checker": "off"}], ids=["left out", "off"])
async def test_what_is_not_requested_is_not_needed(fleet: Fleet, fields: dict[str, str]) -> None:
    plain = await come(fleet, "plain")
    assert await who_leases(fleet, plain, **fields) == ["plain"]


async def test_options_that_no_single_worker_has_together_are_refused(fleet: Fleet) -> None:
    await come(fleet, "one", "safety_checker:block")
    await come(fleet, "two", "precision:float16")
    error = refusal(fleet, safety_checker="block", precision="float16")
    assert (type(error), error.field) == (FailedPrecondition, "generation.precision")
    for said in ("no worker has all of these together", "safety_checker:block has one", "precision:float16 has two"):
        assert said in error.message
    both = await come(fleet, "both", "safety_checker:block", "precision:float16")
    assert await who_leases(fleet, both, safety_checker="block", precision="float16") == ["both"]


async def test_a_size_that_only_a_worker_without_the_option_takes_is_refused(fleet: Fleet) -> None:
    await come(fleet, "able", "precision:float16", limits=(("pixels", SMALL),))
    await come(fleet, "large", limits=(("pixels", LARGE),))
    error = refusal(fleet, precision="float16", width_px=512, height_px=512)
    assert (error.field, error.message) == ("generation.width_px", f"needs {LARGE} pixels; able takes {SMALL}")


async def test_amounts_that_no_single_worker_takes_together_are_refused(fleet: Fleet) -> None:
    await come(fleet, "deep", models=(model(text_encoder_layers=12),), limits=(("pixels", SMALL),))
    await come(fleet, "large", models=(model(text_encoder_layers=2),), limits=(("pixels", LARGE),))
    error = refusal(fleet, width_px=512, height_px=512, clip_skip=12)
    assert (type(error), error.field) == (FailedPrecondition, "generation.clip_skip")
    assert "no worker takes all of these together" in error.message


async def test_a_model_and_a_controlnet_on_different_workers_name_the_controlnet(fleet: Fleet) -> None:
    await come(fleet, "one")
    await come(fleet, "two", models=(STARTER_CANNY,))
    await fleet.worker(PREPROCESS, "edges").come()
    error = refusal(fleet, control())
    assert error.field == "generation.controls[0].controlnet"
    assert "checkpoint:starter has one" in error.message
    assert "controlnet:canny has two" in error.message


async def test_an_absent_worker_counts_until_it_is_deleted(fleet: Fleet) -> None:
    await small_and_large(fleet)
    fleet.clock.advance(3_600.0)
    small = await come(fleet, "small", limits=(("pixels", SMALL),))
    await fleet.gateway.jobs.create(asked(fleet, width_px=512, height_px=512))
    assert await small.lease() == []
    large = await come(fleet, "large", limits=(("pixels", LARGE),))
    assert len(await large.lease()) == 1


async def test_a_refusal_of_the_default_checkpoint_says_that_it_is_the_default(fleet: Fleet) -> None:
    await come(fleet, "one")
    await come(fleet, "two", "precision:float16", models=(model(id="zebra"),))
    says = "; the request names no model, and starter is the default"
    for fields, at in (
        ({"precision": "float16"}, "precision"),
        ({"pipeline": "img2img", "image": photo()}, "pipeline"),
    ):
        named, unnamed = refusal(fleet, model="starter", **fields), refusal(fleet, model="", **fields)
        assert "starter" in named.message
        assert unnamed.message == named.message + says
        assert (type(unnamed), unnamed.field) == (type(named), f"generation.{at}")
    # Errors that have nothing to do with the checkpoint stay short.
    assert says not in refusal(fleet, model="", precision="bfloat16").message
