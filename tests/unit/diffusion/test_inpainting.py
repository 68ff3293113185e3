"""Inpainting and outpainting: what is not masked comes back as it was, on every kind of checkpoint, in any company."""

import asyncio
import io
import json
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from fanlight.common.v1.common_pb2 import ImageSource
from fanlight.diffusion.v1.diffusion_pb2 import Control, GenerateRequest
from fanlight.errors import InvalidField, TooLarge
from services.diffusion.engine.engine import DeviceThread, DiffusionEngine
from services.diffusion.engine.generation import Safety
from services.diffusion.engine.ports import TimedResult
from services.diffusion.generator import ImageGenerator, whole_of
from services.diffusion.models.scan import scan
from services.diffusion.parse.parser import Parser, effective_to_proto
from services.diffusion.provenance import WeightDigests, infotext
from services.kernel.images import ImageLimits
from tests.fakes.families import make_tiny_sd2
from tests.unit.diffusion.conftest import ABILITIES

SIZE = (64, 64)


def noise(size: tuple[int, int] = SIZE, seed: int = 3) -> Image.Image:
    return Image.fromarray(np.random.RandomState(seed).randint(0, 256, (size[1], size[0], 3), dtype=np.uint8))


def white(*boxes: tuple[int, int, int, int], size: tuple[int, int] = SIZE, value: int = 255) -> Image.Image:
    mask = Image.new("L", size)
    for box in boxes:
        mask.paste(value, box)
    return mask


def source(image: Image.Image, kind: str = "PNG", **options) -> ImageSource:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return ImageSource(data=out.getvalue())


def asked(image: Image.Image, mask: Image.Image | None = None, **fields) -> GenerateRequest:
    defaults = {"prompt": "a cat", "steps": 3, "seed": 7, "image": source(image)}
    given = {} if mask is None else {"mask": source(mask)}
    return GenerateRequest(**{**defaults, **given, **fields})


def pixels(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).astype(int)


def off(result: np.ndarray, image: Image.Image) -> np.ndarray:
    """By pixel, the largest difference of a color."""
    return np.abs(result - np.asarray(image).astype(int)).max(-1)


def far_from(mask: Image.Image, reach: int) -> np.ndarray:
    """Where no masked pixel is within `reach` pixels, in both directions."""
    values = np.pad(np.asarray(mask) > 0, reach)
    height, width = mask.height, mask.width
    near = np.zeros((height, width), bool)
    for down in range(2 * reach + 1):
        for across in range(2 * reach + 1):
            near |= values[down : down + height, across : across + width]
    return ~near


@pytest.fixture(scope="module")
def inpainting_parser(tmp_path_factory) -> Parser:
    """For a checkpoint with nine channels."""
    folder = tmp_path_factory.mktemp("inpainting")
    make_tiny_sd2(folder / "model", in_channels=9)
    return Parser(catalog=scan([folder]), abilities=ABILITIES, picture_limits=ImageLimits(), random_seed=lambda: 42)


@pytest.fixture
def make(parser, backend):
    """Makes images of requests together, as the service does: their encoded results, in order."""

    async def make_all(requests, own, previews):
        async with running(own, backend) as generator:
            generations = [await generator.parse(request) for request in requests]
            return await asyncio.gather(*(generator.generate(each, previews.append) for each in generations))

    def made(*requests: GenerateRequest, parser: Parser = parser, previews: list | None = None) -> list[np.ndarray]:
        results = asyncio.run(make_all(requests, parser, [] if previews is None else previews))
        return [pixels(result.data) for result in results]

    return made


@asynccontextmanager
async def running(parser, backend):
    clock = asyncio.get_running_loop().time
    thread = DeviceThread()
    engine = DiffusionEngine(lambda: backend, thread=thread, rows_limit=8, hold_limit_s=20, clock=clock)
    with ThreadPoolExecutor(1) as codecs, ThreadPoolExecutor(1) as previews:
        run = asyncio.create_task(engine.run())
        yield ImageGenerator(engine, parser, codecs=codecs, previews=previews, digests=WeightDigests(), clock=clock)
        run.cancel()
        thread.close()


MASKS = {
    "a square": white((20, 20, 44, 44)),
    "one pixel": white((33, 21, 34, 22)),
    "a line": white((0, 30, 64, 31)),
    "an edge": white((0, 0, 64, 8)),
    "nothing": white(),
    "gray": white((20, 20, 44, 44), value=120),
    "two squares": white((4, 4, 12, 12), (50, 50, 60, 60)),
}


@pytest.mark.parametrize("channels", [4, 9])
@pytest.mark.parametrize("blur", [0.0, 2.0, None])
@pytest.mark.parametrize("strength", [1.0, 0.7])
def test_what_is_not_masked_comes_back_bit_by_bit(channels, blur, strength, make, parser, inpainting_parser):
    image = noise()
    requests = [asked(image, mask, mask_blur=blur, strength=strength) for mask in MASKS.values()]
    results = make(*requests, parser=parser if channels == 4 else inpainting_parser)
    reach = round(2 * (4.0 if blur is None else blur))
    for (name, mask), result in zip(MASKS.items(), results, strict=True):
        assert off(result, image)[far_from(mask, reach)].max(initial=0) == 0, name
        masked = np.asarray(mask) == 255
        if masked.any():
            assert off(result, image)[masked].mean() > 5, name


def test_a_mask_of_nothing_is_warned_of(parser):
    assert parser.parse(asked(noise(), white())).warnings == (
        "The mask says to replace nothing, so that the result is the image itself.",
    )
    assert not parser.parse(asked(noise(), MASKS["one pixel"])).warnings
    assert not parser.parse(asked(noise(), white(), outpaint_left_px=8)).warnings


def test_a_mask_of_everything_is_img2img(make):
    image = noise()
    [result] = make(asked(image, white((0, 0, *SIZE)), strength=0.5))
    assert (off(result, image) > 0).mean() > 0.9


@pytest.mark.parametrize("fill", ["blurred", "noise", "nothing"])
@pytest.mark.parametrize("channels", [4, 9])
def test_each_fill_gives_another_image_and_keeps_the_rest(fill, channels, make, parser, inpainting_parser):
    image, mask = noise(), MASKS["a square"]
    own = parser if channels == 4 else inpainting_parser
    plain, filled = make(*(asked(image, mask, mask_fill=each, strength=0.8) for each in ("original", fill)), parser=own)
    assert np.abs(plain - filled)[24:40, 24:40].mean() > 1
    assert off(filled, image)[far_from(mask, 8)].max() == 0


def test_gray_is_generated_in_the_last_steps_only(asked_generation, generated):
    """With half of the steps left a mask of half white is free; before, and where it is black, it is the image."""
    rows = {value: generated(asked_generation(value)) for value in (255, 128, 1, 0)}
    changed = {value: float((row.latents - rows[0][0].latents).abs().mean()) for value, [row] in rows.items()}
    assert changed[255] > changed[128] > changed[0] == 0.0
    assert changed[1] < changed[128]


@pytest.fixture
def asked_generation(parser):
    def ask(value: int):
        parsed = parser.parse(asked(noise(), white((0, 0, *SIZE)), steps=6, strength=1.0))
        assert parsed.start is not None
        return replace(parsed, start=replace(parsed.start, mask=Image.new("L", SIZE, value)))

    return ask


def test_every_latent_under_the_mask_is_generated(parser, backend):
    """However little of it is masked: diffusers looks at one pixel of each."""
    generation = parser.parse(asked(noise(), white((15, 15, 17, 17)), mask_blur=0.0))
    factor = generation.checkpoint.shape.latent_factor
    with torch.inference_mode():
        row = backend.begin(generation)
    touched = np.zeros((64 // factor, 64 // factor))
    touched[15 // factor : 16 // factor + 1, 15 // factor : 16 // factor + 1] = 1
    assert np.array_equal(row.inpaint.mask[0, 0].float().numpy(), touched)


def test_images_with_all_kinds_of_masks_share_a_batch_with_strangers(make):
    image, previews = noise(), []
    small = white((40, 40, 60, 60), size=(128, 96))
    requests = [
        GenerateRequest(prompt="a dog", steps=4, seed=1, width_px=64, height_px=64),
        asked(image, MASKS["a square"], preview_every_steps=1),
        asked(noise((128, 96)), small, only_masked=True, width_px=64, height_px=64, preview_every_steps=1),
        asked(noise((48, 64)), outpaint_left_px=16, steps=5),
        asked(image, MASKS["gray"], mask_fill="noise", scheduler="euler_a"),
        asked(image, strength=0.5),
    ]
    together = make(*requests, previews=previews)
    for request, result in zip(requests, together, strict=True):
        [alone] = make(request)
        assert np.abs(result - alone).max() <= 2
    assert together[2].shape == (96, 128, 3)
    assert any(progress.preview is not None for progress in previews)


def test_only_the_masked_part_is_generated_and_the_result_has_the_images_size(make, parser):
    image = noise((256, 192))
    mask = white((100, 50, 130, 80), size=image.size)
    request = asked(image, mask, only_masked=True, mask_padding=8, width_px=64, height_px=64)
    generation = parser.parse(request)
    assert (generation.width_px, generation.height_px) == SIZE
    assert generation.result_size_px == (256, 192)
    [result] = make(request)
    assert off(result, image)[far_from(mask, 8)].max() == 0
    assert off(result, image)[np.asarray(mask) == 255].mean() > 5


def test_only_masked_without_a_size_takes_the_models(parser):
    checkpoint = parser.catalog.default()
    request = asked(noise((256, 192)), white((100, 50, 130, 80), size=(256, 192)), only_masked=True)
    assert parser.parse(request).start.image.size == (checkpoint.width_px, checkpoint.height_px)


@pytest.mark.parametrize(
    "sides",
    [
        {"left": 32},
        {"right": 64},
        {"top": 16, "bottom": 48},
        {"left": 8, "right": 8, "top": 8, "bottom": 8},
        {"left": 5},
        {"right": 13, "bottom": 1},
    ],
)
def test_outpainting_keeps_the_image(sides, make, parser):
    """Also where the sides have to grow to whole latents."""
    image = noise()
    request = asked(image, **{f"outpaint_{side}_px": by_px for side, by_px in sides.items()}, mask_blur=2.0)
    generation = parser.parse(request)
    step = generation.checkpoint.shape.latent_factor
    wanted = [
        -(-(64 + sides.get(low, 0) + sides.get(high, 0)) // step) * step
        for low, high in (("top", "bottom"), ("left", "right"))
    ]
    assert generation.pipeline == "inpaint"
    [result] = make(request)
    assert result.shape == (*wanted, 3)
    top, left = (
        sides.get(low, 0) if sides.get(high) else length - 64
        for low, high, length in (("top", "bottom", wanted[0]), ("left", "right", wanted[1]))
    )
    assert off(result[top : top + 64, left : left + 64][4:60, 4:60], image.crop((4, 4, 60, 60))).max() == 0


def test_what_is_transparent_is_generated(make):
    image = noise().convert("RGBA")
    image.paste((0, 0, 0, 0), (16, 16, 40, 40))
    opaque = Image.alpha_composite(Image.new("RGBA", SIZE, "white"), image).convert("RGB")
    mask = white((16, 16, 40, 40))
    by_alpha, by_mask = make(asked(image, mask_from_alpha=True), asked(opaque, mask))
    assert np.array_equal(by_alpha, by_mask)
    both, opposite = make(
        asked(image, white((48, 48, 56, 56)), mask_from_alpha=True, mask_blur=0.0),
        asked(image, mask_from_alpha=True, mask_invert=True, mask_blur=0.0),
    )
    changed = off(both, opaque) > 0
    assert changed[48:56, 48:56].mean() > 0.9
    assert changed[16:40, 16:40].mean() > 0.9
    assert not (off(opposite, opaque) > 0)[16:40, 16:40].any()


def test_an_inverted_mask_replaces_the_rest(make):
    image, mask = noise(), MASKS["a square"]
    inverted = Image.fromarray(255 - np.asarray(mask))
    results = make(asked(image, mask, mask_invert=True), asked(image, inverted))
    assert np.array_equal(*results)


@pytest.mark.parametrize("size", [(128, 128), (32, 32), (65, 64), (640, 641)])
def test_a_mask_of_another_size_covers_the_same(size, parser):
    mask = MASKS["a square"].resize(size, Image.Resampling.BILINEAR)
    fitted = np.asarray(parser.parse(asked(noise(), mask)).start.mask)
    assert np.abs(fitted.astype(int) - np.asarray(MASKS["a square"])).mean() < 8


def test_a_mask_of_another_aspect_is_refused(parser):
    with pytest.raises(InvalidField, match="is 64 x 48 pixels, the image 64 x 64; they must have one aspect ratio"):
        parser.parse(asked(noise(), white(size=(64, 48))))


def test_image_and_mask_are_both_upright(parser):
    image = noise((48, 64))
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = asked(image, white((8, 8, 16, 16), size=(48, 64)), width_px=64, height_px=64)
    turned.image.CopyFrom(source(image.transpose(Image.Transpose.ROTATE_90), exif=exif))
    start = parser.parse(turned).start
    upright = parser.parse(asked(image, white((8, 8, 16, 16), size=(48, 64)), width_px=64, height_px=64)).start
    assert np.array_equal(np.asarray(start.image), np.asarray(upright.image))
    assert np.array_equal(np.asarray(start.mask), np.asarray(upright.mask))


def test_a_jpeg_keeps_what_is_not_masked_as_well_as_a_jpeg_can(make):
    ramp = np.add.outer(np.arange(64), np.arange(64)).astype(np.uint8)
    image = Image.fromarray(np.dstack([ramp, ramp, 255 - ramp]))
    [result] = make(asked(image, MASKS["a square"], format="jpeg", quality=95))
    assert off(result, image)[far_from(MASKS["a square"], 16)].max() <= 8


def test_too_large_a_result_is_refused(parser):
    image = Image.new("RGB", (4096, 4090))
    request = asked(image, white(size=(4096, 4090)), only_masked=True, outpaint_top_px=7)
    with pytest.raises(TooLarge, match="4096 x 4097"):
        parser.parse(request)


def test_controls_lie_on_what_is_generated(parser):
    image = Image.new("RGB", (256, 192))
    image.paste("white", (100, 50, 130, 80))
    mask = white((96, 46, 134, 84), size=image.size)
    control = Control(controlnet="canny", image=source(image))
    request = asked(image, mask, only_masked=True, width_px=64, height_px=64, controls=[control])
    generation = parser.parse(request)
    lit = [np.asarray(each.convert("L")) >= 128 for each in (generation.start.image, generation.controls[0].image)]
    assert (lit[0] != lit[1]).mean() <= 0.02
    assert lit[0].any()


def test_hidden_images_hide_all_of_the_result(parser):
    image = noise((128, 96))
    request = asked(image, white((8, 8, 16, 16), size=(128, 96)), only_masked=True, width_px=64, height_px=64)
    generation = replace(parser.parse(request), safety_checker=Safety.BLOCK)
    black = TimedResult(pixels=np.zeros((64, 64, 3), np.uint8), nsfw=True, spans=())
    assert whole_of(generation, black).shape == (96, 128, 3)
    assert not whole_of(generation, black).any()
    assert whole_of(generation, replace(black, nsfw=False)).any()
    assert whole_of(replace(generation, safety_checker=Safety.FLAG), black).any(), "it is only flagged"


def test_the_effective_request_makes_the_same_image_again(parser):
    image, mask = noise(), MASKS["a square"]
    control = Control(controlnet="canny", image=source(image), resize="pad", mode="prompt")
    first = asked(image, mask, mask_blur=1.5, only_masked=True, mask_fill="noise", controls=[control])
    effective = effective_to_proto(parser.parse(first))
    assert (effective.mask_blur, effective.mask_padding, effective.mask_fill) == (1.5, 32, "noise")
    assert (effective.controls[0].resize, effective.controls[0].mode) == ("pad", "prompt")
    for field in ("image", "mask"):
        getattr(effective, field).CopyFrom(getattr(first, field))
    effective.controls[0].image.CopyFrom(control.image)
    assert effective_to_proto(parser.parse(effective)).SerializeToString(deterministic=True) == effective_to_proto(
        parser.parse(first)
    ).SerializeToString(deterministic=True)


def test_without_a_mask_no_field_of_masks_is_in_the_effective_request(parser):
    effective = effective_to_proto(parser.parse(GenerateRequest(prompt="a cat")))
    assert not [field.name for field, _ in effective.ListFields() if "mask" in field.name or "outpaint" in field.name]


def test_the_infotext_says_what_was_masked_as_a1111_does(parser):
    request = asked(noise(), MASKS["a square"], only_masked=True, mask_fill="blurred", mask_invert=True)
    text = infotext(parser.parse(request), lambda entry: (), version="1")
    assert (
        "Mask blur: 4, Mask mode: Inpaint not masked, Masked content: fill, Inpaint area: Only masked,"
        " Masked area padding: 32" in text
    )


def test_the_file_says_how_it_was_made(parser, backend):
    async def make_one():
        async with running(parser, backend) as generator:
            generation = await generator.parse(asked(noise(), MASKS["a square"], mask_fill="noise"))
            return await generator.generate(generation, lambda progress: None)

    parameters = json.loads(asyncio.run(make_one()).provenance)["parameters"]
    assert (parameters["mask_fill"], parameters["mask_blur"]) == ("noise", 4.0)
