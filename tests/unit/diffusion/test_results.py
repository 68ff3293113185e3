"""Finished images: read by others, with what they were generated from inside."""

import io
import json
import zlib
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from services.diffusion.engine.generation import Start
from services.diffusion.images import PARAMETERS, PROVENANCE, Format, encode, encode_png
from services.diffusion.parse.parser import effective_to_proto
from services.diffusion.provenance import WeightDigests, entries_of, infotext, provenance_json

USER_COMMENT, EXIF = 0x9286, 0x8769
TEXTS = {PARAMETERS: "a cat, 猫\nSteps: 20", PROVENANCE: '{"seed":1}'}


@pytest.fixture(scope="module")
def pixels() -> np.ndarray:
    y, x = np.mgrid[0:45, 0:70]
    return np.stack([x * 3 % 256, y * 5 % 256, (x + y) % 256], axis=-1).astype(np.uint8)


@pytest.mark.parametrize("size", [(1, 1), (2, 3), (45, 70), (64, 512)])
def test_a_png_is_read_back_pixel_for_pixel(size):
    pixels = np.random.RandomState(1).randint(0, 256, (*size, 3), dtype=np.uint8)
    image = Image.open(io.BytesIO(encode_png(pixels)))
    image.load()
    assert np.array_equal(np.asarray(image), pixels)


def test_opencv_reads_the_png_too(pixels):
    cv2 = pytest.importorskip("cv2")
    read = cv2.imdecode(np.frombuffer(encode_png(pixels, TEXTS), np.uint8), cv2.IMREAD_COLOR)
    assert np.array_equal(read[..., ::-1], pixels)


def test_an_image_with_grain_is_about_as_small_as_pillows(pixels):
    smooth = np.asarray(Image.fromarray(pixels).resize((512, 512), Image.Resampling.BICUBIC)).astype(int)
    grain = np.random.RandomState(2).randint(-4, 5, smooth.shape)
    image = np.clip(smooth + grain, 0, 255).astype(np.uint8)
    out = io.BytesIO()
    Image.fromarray(image).save(out, "PNG")
    assert len(encode_png(image)) < 1.1 * len(out.getvalue())


def test_png_texts_are_where_a1111s_readers_look(pixels):
    image = Image.open(io.BytesIO(encode(pixels, TEXTS, format=Format.PNG, quality=90)))
    image.load()
    assert image.text == TEXTS


def test_plain_text_is_in_the_chunk_that_every_reader_knows(pixels):
    data = encode_png(pixels, {PARAMETERS: "a cat"})
    assert b"tEXtparameters\0a cat" in data
    assert zlib.crc32(b"tEXtparameters\0a cat").to_bytes(4, "big") in data


@pytest.mark.parametrize("format_", [Format.JPEG, Format.WEBP])
def test_webp_and_jpeg_have_a1111s_text_as_the_users_comment(format_, pixels):
    image = Image.open(io.BytesIO(encode(pixels, TEXTS, format=format_, quality=90)))
    assert image.format == format_.upper()
    comment = image.getexif().get_ifd(EXIF)[USER_COMMENT]
    assert comment[:8] == b"UNICODE\0"
    assert comment[8:].decode("utf-16-be") == TEXTS[PARAMETERS]
    assert json.loads(image.getexif()[0x010E]) == {"seed": 1}
    assert np.abs(np.asarray(image.convert("RGB")).astype(int) - pixels).mean() < 12


def test_webp_of_quality_100_is_lossless(pixels):
    image = Image.open(io.BytesIO(encode(pixels, TEXTS, format=Format.WEBP, quality=100)))
    assert np.array_equal(np.asarray(image.convert("RGB")), pixels)


def test_a_prompt_too_long_for_exif_is_left_out_and_the_image_stays(pixels):
    texts = {PARAMETERS: "x" * 40_000, PROVENANCE: "{}"}
    Image.open(io.BytesIO(encode(pixels, texts, format=Format.JPEG, quality=90))).load()


def test_a1111s_text_has_a1111s_fields(asked, control):
    generation = asked(
        scheduler="dpmpp_2m",
        noise_schedule="karras",
        clip_skip=2,
        controls=(control("canny", scale=0.7, end=0.5),),
        start=Start(image=Image.new("RGB", (64, 64)), strength=0.6),
    )
    prompt, negative, fields = infotext(generation, WeightDigests().of, version="1.2").splitlines()
    assert (prompt, negative) == ("a cat", "Negative prompt: blurry")
    digest = next(file.sha256 for file in WeightDigests().of(generation.checkpoint) if file.path.startswith("unet"))
    assert fields == (
        "Steps: 5, Sampler: DPM++ 2M, Schedule type: Karras, CFG scale: 5, Seed: 7, Size: 64x64,"
        f" Model hash: {digest[:10]}, Model: tiny, Denoising strength: 0.6, Clip skip: 2,"
        ' ControlNet 0: "Module: none, Model: canny, Weight: 0.7, Guidance Start: 0, Guidance End: 0.5,'
        ' Control Mode: Balanced", Version: Fanlight 1.2'
    )


def test_provenance_says_all_that_it_takes_to_generate_it_again(asked, control):
    generation = asked(controls=(control("canny"),), image_digests=(("controls[0].image", "sha256:00"),))
    effective = effective_to_proto(generation)
    entries = tuple(entries_of(generation))
    content = json.loads(
        provenance_json(generation, effective, entries, WeightDigests().of, device="cpu", dtype="float32")
    )
    assert content["parameters"]["seed"] == "7"
    assert content["images"] == {"controls[0].image": "sha256:00"}
    assert [(each["kind"], each["id"]) for each in content["weights"]] == [
        ("checkpoint", "tiny"),
        ("controlnet", "canny"),
    ]
    assert {"unet", "vae", "text_encoder"} == {path.split("/")[0] for path in content["weights"][0]["sha256"]}
    assert content["versions"]["torch"]
    assert (content["device"], content["dtype"]) == ("cpu", "float32")


def test_a_digest_is_read_off_the_weight_stores_names(tmp_path, catalog):
    store, view = tmp_path / ("ab" * 32), tmp_path / "model.safetensors"
    store.write_bytes(b"whatever")
    view.symlink_to(store)
    entry = replace(catalog.controlnets[0], path=view)
    assert WeightDigests().known(entry) == "ab" * 32
    assert [file.sha256 for file in WeightDigests().of(entry)] == ["ab" * 32]


def test_a_file_that_changes_is_digested_again(tmp_path, catalog):
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"one")
    digests, entry = WeightDigests(), replace(catalog.controlnets[0], path=file)
    assert digests.known(entry) == ""
    [one] = digests.of(entry)
    assert digests.known(entry) == one.sha256
    file.write_bytes(b"another")
    [other] = digests.of(entry)
    assert one.sha256 != other.sha256


def test_a1111s_text_says_how_prompts_were_read(asked):
    def lines(**options) -> list[str]:
        return infotext(asked(**options), lambda entry: (), version="1").splitlines()

    assert ", Emphasis: No norm," in lines(emphasis="no_norm")[-1]
    assert "Emphasis" not in lines()[-1]
    plain = lines(prompt=r"a (b) [c\d]", negative_prompt="(e)", prompt_syntax="plain")
    assert plain[:2] == [r"a \(b\) \[c\\d\]", r"Negative prompt: \(e\)"]
