"""Every option of a generation gets from the client to the worker, and back to the client."""

from dataclasses import replace
from typing import Any

import pytest
from google.protobuf import json_format

from fanlight.common.v1 import common_pb2
from fanlight.contract.defaults import Defaults
from fanlight.contract.prompt import loras_in, words_in
from fanlight.diffusion.v1 import diffusion_pb2
from fanlight.errors import FanlightError, NotFound
from fanlight.gateway.v1 import gateway_pb2
from services.gateway.app.leasing import LeasedTask
from services.gateway.domain.fleet_catalog import catalog_of
from services.gateway.domain.job import DIFFUSION, PREPROCESS, Job
from services.gateway.domain.workers import AnnouncedModel, Capabilities
from services.gateway.wire import answers, requests, workers
from tests.fakes.fleet import CANNY, PNG, STARTER, STARTER_CANNY, YOUNG, FixedFleet, Fleet, resolved

PIPELINES = ("text2img", "img2img", "inpaint", "controlnet", "controlnet_img2img", "controlnet_inpaint")
MODELS = (
    replace(STARTER, pipelines=PIPELINES),
    STARTER_CANNY,
    AnnouncedModel(id="inpaint", kind="controlnet", family="starter"),
    AnnouncedModel(id="cyanotype", kind="lora", family="starter", aliases=("cyanotype", "blueprint")),
    AnnouncedModel(id="vivid", kind="vae", family="starter"),
    AnnouncedModel(id="mint", kind="embedding", family="starter"),
    AnnouncedModel(id="sd-lora", kind="lora", family="sd1"),
)
OFFERS = tuple(
    sorted(("precision:float16", "prompt_syntax:a1111", "safety_checker:blur", "scheduler:dpmpp_2m", *YOUNG))
)
ANYTHING = (AnnouncedModel(id="*", kind="checkpoint"), AnnouncedModel(id="*", kind="lora"))
SENT = common_pb2.ImageSource(data=PNG)
# With values that are no defaults.
OPTIONS: dict[str, Any] = {
    "strength": 0.5,
    "resize": "pad",
    "guess_mode": True,
    "loras": [diffusion_pb2.LoraUse(model="cyanotype", weight=0.5, text_encoder_weight=0.0)],
    "vae": "vivid",
    "embeddings": ["mint"],
    "clip_skip": 2,
    "scheduler": "dpmpp_2m",
    "noise_schedule": "karras",
    "eta": 0.25,
    "format": "webp",
    "quality": 70,
    "safety_checker": "blur",
    "strict": True,
    "variation_seed": 7,
    "variation_strength": 0.25,
    "precision": "float16",
    "mask_blur": 0.0,
    "only_masked": True,
    "mask_padding": 0,
    "mask_fill": "noise",
    "mask_invert": True,
    "mask_from_alpha": True,
    "outpaint_left_px": 8,
    "outpaint_right_px": 16,
    "outpaint_top_px": 24,
    "outpaint_bottom_px": 32,
    "prompt_syntax": "a1111",
    "emphasis": "no_norm",
    "sdxl_clip_skip": 3,
}


def of_generation(**fields: Any) -> gateway_pb2.CreateJobRequest:
    return gateway_pb2.CreateJobRequest(generation=diffusion_pb2.GenerateRequest(**{"prompt": "a fox", **fields}))


def request_of(task: LeasedTask) -> diffusion_pb2.GenerateRequest:
    """What the worker gets."""
    request = diffusion_pb2.GenerateRequest()
    assert workers._leased(task).request.Unpack(request)
    return request


def asked_of(job: Job) -> diffusion_pb2.GenerateRequest:
    return answers.job(job).generation


async def leased(**fields: Any) -> tuple[diffusion_pb2.GenerateRequest, diffusion_pb2.GenerateRequest]:
    """What the worker gets, and what the client sees of its job."""
    fleet = Fleet()
    async with fleet.running():
        worker = fleet.worker("diffusion", models=MODELS, other_offers=OFFERS)
        await worker.come()
        job = await fleet.gateway.jobs.create(requests.new_job(of_generation(**fields), fleet.gateway.workers.offers))
        (task,) = await worker.lease()
    return request_of(task), asked_of(job)


def refusal(*models: AnnouncedModel, **fields: Any) -> FanlightError:
    offered = Capabilities(annotators=(CANNY,), models=(*MODELS, *ANYTHING, *models), other_offers=OFFERS)
    with pytest.raises(FanlightError) as caught:
        requests.new_job(of_generation(**fields), FixedFleet((offered,)))
    return caught.value


def test_the_test_covers_every_option_of_the_contract() -> None:
    """A field that is added to the message and not carried through fails here."""
    elsewhere = {"model", "pipeline", "prompt", "negative_prompt", "width_px", "height_px", "steps", "guidance_scale"}
    elsewhere |= {"seed", "count", "controls", "preview_every_steps", "image", "mask"}
    assert {field.name for field in diffusion_pb2.GenerateRequest.DESCRIPTOR.fields} == elsewhere | set(OPTIONS)


async def test_every_option_reaches_the_worker_and_is_shown_to_clients() -> None:
    request, shown = await leased(image=SENT, mask=SENT, **OPTIONS)
    for message in (request, shown):
        assert message.pipeline == "inpaint"
        assert message.image.blob.digest == message.mask.blob.digest != ""
        for name, value in OPTIONS.items():
            said = getattr(message, name)
            assert (list(said) if isinstance(value, list) else said) == value, name


async def test_the_seed_is_shown_if_the_worker_does_not_report_it() -> None:
    fleet = Fleet()
    async with fleet.running():
        worker = fleet.worker("diffusion")
        await worker.come()
        job = await fleet.gateway.jobs.create(
            requests.new_job(of_generation(seed=7, count=2), fleet.gateway.workers.offers)
        )
        await worker.work()
        done = await fleet.get(job)
    assert [output.seed for task in done.tasks for output in task.outputs] == [None, None]
    assert [image.seed for image in answers.job(done).images] == [7, 8]


async def test_options_left_open_stay_open() -> None:
    request, shown = await leased()
    for message in (request, shown):
        for name in OPTIONS:
            assert name not in json_format.MessageToDict(message, preserving_proto_field_name=True), name


async def test_an_image_to_start_from_gives_its_size() -> None:
    request, _ = await leased(image=SENT)
    assert (request.pipeline, request.width_px, request.height_px) == ("img2img", 256, 192)


async def test_a_control_for_inpainting_needs_no_image() -> None:
    controls = [diffusion_pb2.Control(controlnet="inpaint")]
    request, _ = await leased(image=SENT, mask=SENT, controls=controls)
    assert request.pipeline == "controlnet_inpaint"
    assert request.controls[0].controlnet == "inpaint"
    assert not request.controls[0].HasField("image")


async def test_the_worker_gets_how_a_control_image_was_made() -> None:
    fleet = Fleet()
    async with fleet.running():
        annotator, worker = fleet.worker(PREPROCESS), fleet.worker(DIFFUSION)
        await annotator.come()
        await worker.come()
        controls = [diffusion_pb2.Control(image=SENT, annotator="canny", scale=0.5)]
        job = await fleet.gateway.jobs.create(
            requests.new_job(of_generation(controls=controls), fleet.gateway.workers.offers)
        )
        await annotator.work()
        (task,) = await worker.lease()
        made = (await fleet.get(job)).output_of(1)
    (control,) = request_of(task).controls
    assert made is not None
    assert (control.image.blob.digest, control.controlnet, control.scale) == (made.blob.digest, "canny", 0.5)
    assert (control.made_by.annotator, dict(control.made_by.parameters)) == ("canny", {"low": 100.0})
    assert (control.annotator, control.HasField("parameters")) == ("", False), "only the gateway takes these"


def test_a_reference_that_no_worker_fetches_differs_from_a_name() -> None:
    error = refusal(vae="hf:acme/good")
    assert "FANLIGHT_DIFFUSION_FETCH" in error.message


def test_a_long_list_of_names_is_cut() -> None:
    many = [AnnouncedModel(id=f"s{number:02}", kind="vae", family="starter") for number in range(59)]
    assert "s19 and 40 more" in refusal(*many, vae="unknown").message


def test_without_a_mask_a_control_needs_its_image() -> None:
    error = refusal(image=SENT, controls=[diffusion_pb2.Control(controlnet="inpaint")])
    assert error.field == "generation.controls[0].image"


async def test_a_lora_named_in_the_prompt_is_needed_of_the_worker() -> None:
    fleet = Fleet()
    async with fleet.running():
        poor = fleet.worker("diffusion", "poor", models=MODELS[:2])
        rich = fleet.worker("diffusion", "rich", models=MODELS)
        await poor.come()
        await rich.come()
        request = of_generation(prompt="a fox <lora:cyanotype:0.7>")
        await fleet.gateway.jobs.create(requests.new_job(request, fleet.gateway.workers.offers))
        assert await poor.lease() == []
        assert len(await rich.lease()) == 1


async def test_a_lora_in_a_prompt_may_go_by_another_of_its_names() -> None:
    fleet = Fleet()
    async with fleet.running():
        worker = fleet.worker("diffusion", models=MODELS)
        await worker.come()
        request = of_generation(prompt="a <lora:CyanoType.safetensors:0.7> b <lora: blueprint >")
        await fleet.gateway.jobs.create(requests.new_job(request, fleet.gateway.workers.offers))
        (task,) = await worker.lease()
    assert request_of(task).prompt == "a <lora:cyanotype:0.7> b <lora:cyanotype>"


def test_loras_in_a_prompt_count_with_those_that_are_listed() -> None:
    listed = [diffusion_pb2.LoraUse(model="cyanotype")] * 10
    error = refusal(prompt="<lora:cyanotype>" * 7, loras=listed)
    assert (error.reason, error.field) == ("INVALID_FIELD", "generation.prompt")
    assert "17" in error.message
    assert "16" in error.message


def test_more_embeddings_in_a_prompt_than_an_image_takes_are_refused_and_not_forgotten() -> None:
    many = [AnnouncedModel(id=f"e{number}", kind="embedding", family="starter") for number in range(33)]
    error = refusal(*many, prompt=", ".join(each.id for each in many))
    assert (error.reason, error.field) == ("INVALID_FIELD", "generation.prompt")
    assert "33" in error.message
    assert "32" in error.message


async def test_an_embedding_named_in_a_prompt_is_needed_of_the_worker() -> None:
    fleet = Fleet()
    async with fleet.running():
        poor = fleet.worker("diffusion", "poor", models=tuple(each for each in MODELS if each.id != "mint"))
        rich = fleet.worker("diffusion", "rich", models=MODELS)
        await poor.come()
        await rich.come()
        request = of_generation(negative_prompt="(Mint:1.2), peppermint")
        await fleet.gateway.jobs.create(requests.new_job(request, fleet.gateway.workers.offers))
        assert await poor.lease() == []
        (task,) = await rich.lease()
    assert list(request_of(task).embeddings) == ["mint"]


@pytest.mark.parametrize("listed", [False, True])
async def test_a_word_keeps_no_image_waiting_for_a_worker_that_is_away(listed: bool) -> None:
    fleet = Fleet()
    async with fleet.running():
        away = fleet.worker("diffusion", "away", models=MODELS)
        home = fleet.worker("diffusion", "home", models=tuple(each for each in MODELS if each.id != "mint"))
        await away.come()
        fleet.clock.advance(3_600.0)
        await home.come()
        request = of_generation(embeddings=["mint"] if listed else [], prompt="mint tea")
        await fleet.gateway.jobs.create(requests.new_job(request, fleet.gateway.workers.offers))
        assert len(await home.lease()) == (0 if listed else 1)
        assert len(await away.lease()) == (1 if listed else 0)


async def test_a_word_forbids_no_lora_that_another_worker_has() -> None:
    fleet = Fleet()
    async with fleet.running():
        for name, absent in (("one", "mint"), ("other", "cyanotype")):
            models = tuple(each for each in MODELS if each.id != absent)
            await fleet.worker("diffusion", name, models=models).come()
        request = of_generation(loras=[diffusion_pb2.LoraUse(model="cyanotype")], prompt="mint tea")
        job = await fleet.gateway.jobs.create(requests.new_job(request, fleet.gateway.workers.offers))
        assert list(asked_of(job).embeddings) == []


async def test_a_word_is_an_embedding_where_all_workers_that_can_paint_it_are_away() -> None:
    fleet = Fleet()
    async with fleet.running():
        await fleet.worker("diffusion", "away", models=MODELS).come()
        fleet.clock.advance(3_600.0)
        request = of_generation(prompt="mint tea")
        job = await fleet.gateway.jobs.create(requests.new_job(request, fleet.gateway.workers.offers))
        assert list(asked_of(job).embeddings) == ["mint"]


@pytest.mark.parametrize(
    ("text", "loras"),
    [("a <lora:one:1> b <lyco:two>", ["one", "two"]), (r"\<lora:one:1>", []), ("<lora: one :1:0.5>", ["one"])],
)
def test_loras_differ_from_what_only_looks_like_one(text: str, loras: list[str]) -> None:
    assert loras_in(text) == loras


def test_words_are_whole() -> None:
    assert words_in("Mint, peppermint, bad-hands!", ["mint", "pepper", "bad-hands", "bad"]) == [
        "mint",
        "bad-hands",
        "bad",
    ]


def test_an_unknown_lora_is_named_with_the_known_ones() -> None:
    error = refusal(negative_prompt="", loras=[diffusion_pb2.LoraUse(model="unknown")])
    assert "'unknown'" in error.message
    assert "cyanotype" in error.message


async def test_a_reference_goes_to_a_worker_that_fetches_any() -> None:
    fleet = Fleet()
    async with fleet.running():
        fixed = fleet.worker("diffusion", "fixed", models=MODELS)
        await fixed.come()
        request = of_generation(model="hf:someone/theirs", loras=[diffusion_pb2.LoraUse(model="civitai:82098@87153")])
        with pytest.raises(NotFound):
            requests.new_job(request, fleet.gateway.workers.offers)
        fetching = fleet.worker("diffusion", "fetching", models=(*MODELS, *ANYTHING))
        await fetching.come()
        await fleet.gateway.jobs.create(requests.new_job(request, fleet.gateway.workers.offers))
        assert await fixed.lease() == []
        (task,) = await fetching.lease()
    shown = request_of(task)
    assert (shown.model, shown.loras[0].model) == ("hf:someone/theirs", "civitai:82098@87153")


async def test_what_would_have_to_be_fetched_is_never_the_default() -> None:
    fleet = Fleet()
    async with fleet.running():
        remote = fleet.worker("diffusion", "remote", models=(AnnouncedModel(id="sd15", kind="checkpoint"),))
        remote.disk = frozenset()
        await remote.come()
        with pytest.raises(NotFound) as caught:
            requests.new_job(of_generation(), fleet.gateway.workers.offers)
        assert (caught.value.field, "sd15" in caught.value.message) == ("generation.model", True)
        assert resolved(requests.new_job(of_generation(model="sd15"), fleet.gateway.workers.offers)).model == "sd15"
        await fleet.worker("diffusion", "home", models=(replace(MODELS[0], id="zz"),)).come()
        assert resolved(requests.new_job(of_generation(), fleet.gateway.workers.offers)).model == "zz"


def test_the_id_of_any_is_no_model() -> None:
    assert refusal(model="*").field == "generation.model"
    assert "*" not in refusal(model="unknown").message


REFUSED = [
    ({"image": SENT, "strength": 0.0}, "generation.strength"),
    ({"image": SENT, "strength": 1.01}, "generation.strength"),
    ({"image": SENT, "strength": float("nan")}, "generation.strength"),
    ({"strength": 0.5}, "generation.strength"),
    ({"mask": SENT}, "generation.image"),
    ({"image": SENT, "pipeline": "text2img"}, "generation.pipeline"),
    ({"image": SENT, "pipeline": "inpaint"}, "generation.mask"),
    ({"pipeline": "img2img"}, "generation.image"),
    ({"pipeline": "controlnet_img2img", "image": SENT}, "generation.controls"),
    ({"image": common_pb2.ImageSource(data=b"")}, "generation.image"),
    ({"resize": "squeeze"}, "generation.resize"),
    ({"loras": [diffusion_pb2.LoraUse(model="unknown")]}, "generation.loras[0].model"),
    ({"loras": [diffusion_pb2.LoraUse(model="sd-lora")]}, "generation.loras[0].model"),
    ({"loras": [diffusion_pb2.LoraUse(model="cyanotype", weight=4.5)]}, "generation.loras[0].weight"),
    ({"loras": [diffusion_pb2.LoraUse(model="cyanotype")] * 17}, "generation.loras"),
    ({"vae": "canny"}, "generation.vae"),
    ({"embeddings": ["mint", "cyanotype"]}, "generation.embeddings[1]"),
    ({"embeddings": ["mint"] * 33}, "generation.embeddings"),
    ({"clip_skip": 0}, "generation.clip_skip"),
    ({"clip_skip": 13}, "generation.clip_skip"),
    ({"noise_schedule": "loud"}, "generation.noise_schedule"),
    ({"eta": -0.1}, "generation.eta"),
    ({"format": "gif"}, "generation.format"),
    ({"quality": 101}, "generation.quality"),
    ({"safety_checker": "maybe"}, "generation.safety_checker"),
]


@pytest.mark.parametrize(("fields", "at_fault"), REFUSED, ids=[at for _, at in REFUSED])
def test_a_wrong_option_is_refused_by_name(fields: dict[str, Any], at_fault: str) -> None:
    assert refusal(**fields).field == at_fault


def test_a_prompt_that_names_an_unknown_lora_is_refused() -> None:
    assert refusal(prompt="a fox <lora:unknown:1>").field == "generation.prompt"


def test_a_controlnet_of_one_family_does_not_hide_its_namesake_of_another() -> None:
    offered = [AnnouncedModel(id="canny", kind="controlnet", family=family) for family in ("starter", "sd1")]
    catalog = catalog_of(["diffusion"], [Capabilities(models=tuple(offered))])
    assert set(catalog.of_kind("controlnet")) == set(offered)


LIGHTNING = Defaults(
    steps=4, guidance_scale=1.0, scheduler="euler", noise_schedule="sgm_uniform", width_px=128, height_px=64
)


async def worked(**fields: Any) -> tuple[diffusion_pb2.GenerateRequest, Job]:
    """What the worker gets of a checkpoint that has defaults, and the job."""
    fleet = Fleet()
    async with fleet.running():
        models = (replace(STARTER, pipelines=PIPELINES, defaults=LIGHTNING),)
        offers = ("scheduler:euler", "scheduler:ddim")
        worker = fleet.worker("diffusion", models=models, other_offers=offers)
        await worker.come()
        job = await fleet.gateway.jobs.create(requests.new_job(of_generation(**fields), fleet.gateway.workers.offers))
        (task,) = await worker.lease()
    return request_of(task), job


async def test_a_checkpoints_defaults_are_in_the_job():
    request, job = await worked()
    assert (request.steps, request.guidance_scale, request.scheduler) == (4, 1.0, "euler")
    assert (request.noise_schedule, request.width_px, request.height_px) == ("sgm_uniform", 128, 64)
    assert asked_of(job).steps == 4


async def test_a_requests_own_values_win_over_the_checkpoints():
    own = {"steps": 30, "guidance_scale": 8.0, "scheduler": "ddim", "width_px": 64, "height_px": 64}
    request, _ = await worked(**own)
    assert {name: getattr(request, name) for name in own} == own
    assert request.noise_schedule == ""


async def test_a_job_is_ordered_by_the_checkpoints_steps():
    _, job = await worked()
    assert {(task.facts.steps, task.facts.guided) for task in job.requests} == {(4, False)}


def test_a_checkpoints_defaults_are_listed():
    model = answers.model(replace(STARTER, defaults=LIGHTNING))
    assert json_format.MessageToDict(model)["defaults"]["guidanceScale"] == 1.0
    assert not answers.model(STARTER).HasField("defaults")
