"""A request that leaves options out gets its checkpoint's; what workers say of them has limits."""

import math

import pytest

from fanlight.common.v1.common_pb2 import ImageSource
from fanlight.contract.defaults import NO_DEFAULTS, Defaults
from fanlight.contract.filled import defaults_to_proto, missing, read_defaults
from fanlight.diffusion.v1.diffusion_pb2 import GenerateRequest, GenerationDefaults
from fanlight.errors import FanlightError

TURBO = Defaults(steps=1, guidance_scale=0.0, scheduler="euler_a", noise_schedule="sgm_uniform")
IMAGE = ImageSource(data=b"x")


def filled(defaults, **fields):
    request = GenerateRequest(**fields)
    request.MergeFrom(missing(request, defaults))
    return request


def test_what_is_left_out_is_filled_in():
    assert filled(TURBO) == GenerateRequest(
        steps=1, guidance_scale=0.0, scheduler="euler_a", noise_schedule="sgm_uniform"
    )


def test_a_requests_own_values_win():
    own = {"steps": 30, "guidance_scale": 7.0, "scheduler": "DPM++ 2M Karras"}
    assert filled(TURBO, **own) == GenerateRequest(**own)


def test_without_defaults_nothing_changes():
    assert missing(GenerateRequest(), NO_DEFAULTS) == GenerateRequest()


@pytest.mark.parametrize(("schedule", "wanted"), [("karras", "karras"), ("Automatic", "uniform"), ("", "sgm_uniform")])
def test_a_noise_schedule_alone_stays_with_the_default_scheduler(schedule, wanted):
    request = filled(TURBO, noise_schedule=schedule)
    assert (request.scheduler, request.noise_schedule) == ("euler_a", wanted)


def test_a_noise_schedule_that_the_default_scheduler_cannot_follow_is_not_changed():
    request = filled(Defaults(scheduler="ddim"), noise_schedule="karras")
    assert (request.scheduler, request.noise_schedule) == ("", "karras")


@pytest.mark.parametrize(
    ("strength", "steps"), [(None, 2), (1.0, 1), (0.5, 2), (0.3, 4), (0.05, 20), (0.07, 15), (0.34, 3)]
)
def test_an_image_to_start_from_is_left_a_step(strength, steps):
    fields = {} if strength is None else {"strength": strength}
    assert filled(TURBO, image=IMAGE, **fields).steps == steps


def test_what_is_announced_comes_back():
    said = Defaults(steps=4, guidance_scale=0.0, scheduler="lcm", width_px=512, height_px=768, sources=("name",))
    assert read_defaults(defaults_to_proto(said), size_step_px=8, field="d") == said
    assert read_defaults(defaults_to_proto(NO_DEFAULTS), size_step_px=8, field="d") == NO_DEFAULTS


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"steps": 151}, "d.steps"),
        ({"guidance_scale": math.nan}, "d.guidance_scale"),
        ({"guidance_scale": math.inf}, "d.guidance_scale"),
        ({"guidance_scale": -1.0}, "d.guidance_scale"),
        ({"guidance_scale": 30.5}, "d.guidance_scale"),
        ({"width_px": 512}, "d.height_px"),
        ({"width_px": 513, "height_px": 512}, "d.width_px"),
        ({"width_px": 4096, "height_px": 512}, "d.width_px"),
        ({"scheduler": "x" * 600}, "d.scheduler"),
        ({"sources": ["x"] * 9}, "d.sources"),
        ({"sources": ["x" * 600]}, "d.sources[0]"),
        ({"variant": "x" * 600}, "d.variant"),
    ],
)
def test_what_no_request_could_have_is_refused(fields, field):
    with pytest.raises(FanlightError) as caught:
        read_defaults(GenerationDefaults(**fields), size_step_px=8, field="d")
    assert caught.value.field == field


@pytest.mark.parametrize("scheduler", ["of_next_year", "ddim"])
def test_a_scheduler_that_this_side_does_not_know_is_left_out(scheduler):
    said = GenerationDefaults(steps=3, scheduler=scheduler, noise_schedule="karras")
    assert read_defaults(said, size_step_px=8, field="d") == Defaults(steps=3)
