"""Image, mask and control images lie on each other, whatever part is generated and whatever it is fitted by."""

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageOps

from fanlight.contract.masks import Sides, size_of_control_image
from services.diffusion.canvas import Canvas
from services.diffusion.images import Resize
from services.diffusion.masks import WHITE

SIZE = (64, 64)


def picture(size: tuple[int, int] = (200, 100)) -> Image.Image:
    """A white disc in the middle and a bar at the left, on black."""
    image = Image.new("RGB", size)
    draw = ImageDraw.Draw(image)
    x, y = size[0] // 2, size[1] // 2
    draw.ellipse((x - 30, y - 30, x + 30, y + 30), fill="white")
    draw.rectangle((5, 10, 25, size[1] - 10), fill="white")
    return image


def disc_mask(image: Image.Image) -> Image.Image:
    """White where the disc is."""
    mask = image.convert("L")
    mask.paste(0, (0, 0, image.width // 2 - 31, image.height))
    return mask


def canvas(image: Image.Image, mask: Image.Image | None = None, **fields) -> Canvas:
    return Canvas(**{"image": image, "mask": mask, "sides": Sides(), "size_px": SIZE, "how": Resize.CROP, **fields})


def lit(image: Image.Image) -> np.ndarray:
    return np.asarray(image.convert("L")) >= 128


def apart(one: Image.Image, other: Image.Image) -> float:
    """The part of the pixels that are not alike."""
    return float((lit(one) != lit(other)).mean())


CUTS = {
    "all": {},
    "outpainted": {"sides": Sides(left=60, top=40)},
    "outpainted on all sides": {"sides": Sides(left=10, right=30, top=20, bottom=40)},
    "only masked": {"only_masked": True, "padding_px": 8},
    "only masked, all of it": {"only_masked": True, "padding_px": 1000},
    "only masked and outpainted": {"only_masked": True, "padding_px": 4, "sides": Sides(right=30)},
}


@pytest.mark.parametrize("how", Resize)
@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("scale", [1, 0.5, 3])
def test_a_control_image_of_the_image_lies_on_it(cut, how, scale):
    image = picture()
    made = image.resize((round(200 * scale), round(100 * scale)), Image.Resampling.LANCZOS)
    own = canvas(image, disc_mask(image), how=how, **CUTS[cut])
    placed = own.place(made, how)
    assert placed.size == own.start.size == SIZE
    # What outpainting adds goes on as the edge does, which is black here, as it is beyond a control image.
    assert apart(placed, own.start) <= 0.02
    assert lit(own.start).mean() > 0.03


@pytest.mark.parametrize("how", Resize)
@pytest.mark.parametrize("cut", CUTS)
def test_a_mask_lies_on_its_image(cut, how):
    mask = disc_mask(picture())
    own = canvas(mask.convert("RGB"), mask, how=how, **CUTS[cut])
    inside = lit(own.place(Image.new("RGB", mask.size, "white"), how))
    assert (lit(own.start) != lit(own.start_mask))[inside].mean() <= 0.02
    assert lit(own.start_mask)[inside].any()


@pytest.mark.parametrize(
    "sides", [Sides(left=100), Sides(right=40, bottom=40), Sides(left=8, right=8, top=8, bottom=8)]
)
def test_new_sides_are_masked_and_the_image_is_not(sides):
    image = picture((64, 64))
    own = canvas(image, sides=sides, size_px=sides.around(image.size))
    mask = np.asarray(own.start_mask)
    inner = (slice(sides.top, sides.top + 64), slice(sides.left, sides.left + 64))
    assert not mask[inner].any()
    assert np.array_equal(np.asarray(own.start)[inner], np.asarray(image))
    mask = mask.copy()
    mask[inner] = WHITE
    assert (mask == WHITE).all()


def test_a_control_image_of_the_canvas_lies_on_its_new_sides_too():
    image, sides = picture(), Sides(left=200)
    own = canvas(image, sides=sides, size_px=(128, 32))
    whole = Image.new("RGB", (400, 100))
    whole.paste("white", (0, 0, 100, 100))
    assert lit(own.place(whole, Resize.CROP))[:, :30].all()
    assert not lit(own.place(image, Resize.CROP))[:, :60].any()


@pytest.mark.parametrize(
    ("how", "columns"), [(Resize.CROP, (0, 64)), (Resize.STRETCH, (0, 64)), (Resize.PAD, (16, 48))]
)
def test_a_control_image_of_another_aspect_is_cropped_or_padded(how, columns):
    tall = Image.new("RGB", (100, 200), "white")
    placed = lit(canvas(picture()).place(tall, how))
    assert np.nonzero(placed.any(0))[0][[0, -1]].tolist() == [columns[0], columns[1] - 1]


def test_an_only_masked_part_is_generated_at_the_whole_size_and_put_back():
    image = picture((400, 300))
    mask = Image.new("L", image.size)
    mask.paste(255, (150, 100, 180, 130))
    own = canvas(image, mask, only_masked=True, padding_px=10, blur_px=2)
    paste = own.paste()
    assert (paste.size_px, paste.part) == ((400, 300), (136, 86, 194, 144))
    result = paste.onto(np.full((*SIZE, 3), 77, np.uint8))
    assert (result[100:130, 150:180] == 77).all()
    changed = (result != np.asarray(image)).any(-1)
    assert not changed[:96].any()
    assert not changed[:, :146].any()
    assert not changed[134:].any()
    assert not changed[:, 184:].any()


@pytest.mark.parametrize("box", [(0, 0, 400, 30), (0, 299, 1, 300), (399, 0, 400, 1), (0, 0, 400, 300), None])
@pytest.mark.parametrize("size", [(64, 64), (128, 64), (64, 128)])
def test_what_was_not_changed_comes_back_in_its_place(box, size):
    """Also where the image ends before the region has the aspect ratio asked for."""
    image = Image.fromarray(np.random.RandomState(3).randint(0, 256, (300, 400, 3), dtype=np.uint8))
    mask = Image.new("L", image.size)
    if box:
        mask.paste(255, box)
    own = canvas(image, mask, only_masked=True, padding_px=32, blur_px=4, size_px=size)
    result = own.paste().onto(np.asarray(own.start)).astype(int)
    off = np.abs(result - np.asarray(image).astype(int)).max(-1)
    far = ImageOps.invert(Image.fromarray((np.asarray(own.paste().shown) > 0).astype(np.uint8) * 255))
    assert off[np.asarray(far) > 0].max(initial=0) == 0


def test_a_smooth_image_comes_back_where_it_was_from_any_region():
    ramp = np.add.outer(np.arange(100), np.arange(300))
    image = Image.fromarray(np.dstack([ramp // 2] * 3).astype(np.uint8))
    for box in [(0, 40, 300, 60), (10, 0, 20, 100), (280, 90, 300, 100)]:
        mask = Image.new("L", image.size)
        mask.paste(255, box)
        own = canvas(image, mask, only_masked=True, padding_px=16, blur_px=4, size_px=(256, 256))
        result = own.paste().onto(np.asarray(own.start)).astype(int)
        assert np.abs(result - np.asarray(image).astype(int)).max() <= 3


@pytest.mark.parametrize(
    ("image", "asked", "sides", "only_masked", "resize", "size"),
    [
        ((200, 136), (200, 136), Sides(), False, "", (200, 136)),
        ((200, 100), (64, 64), Sides(), False, "crop", (64, 64)),
        ((512, 512), (512, 512), Sides(), True, "", (512, 512)),
        ((4000, 3000), (512, 512), Sides(), True, "", (4000, 3000)),
        ((512, 512), (768, 512), Sides(left=256), False, "", (512, 512)),
        ((2048, 2048), (768, 512), Sides(right=1024), False, "", (512, 512)),
        ((200, 100), (64, 64), Sides(top=100), False, "pad", (64, 32)),
        ((200, 100), (128, 64), Sides(top=100), False, "stretch", (128, 32)),
        ((9000, 100), (512, 512), Sides(), True, "", (8192, 100)),
        ((64, 8), (64, 64), Sides(), True, "", (64, 16)),
    ],
)
def test_control_images_are_asked_for_at_the_size_at_which_they_lie_on_the_image(
    image, asked, sides, only_masked, resize, size
):
    assert size_of_control_image(image, asked, sides, only_masked=only_masked, resize=resize) == size
