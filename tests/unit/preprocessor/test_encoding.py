"""PNGs that we write, read by Pillow."""

import io

import numpy as np
import pytest
from PIL import Image

from services.preprocessor.codec import encode_png

# The last one has more rows than are filtered at a time.
SIZES = [(1, 1), (1, 5000), (5000, 1), (7, 9), (200, 511)]


def noise(*shape: int) -> np.ndarray:
    return np.random.RandomState(0).randint(0, 256, shape, dtype=np.uint8)


def read(data: bytes) -> Image.Image:
    image = Image.open(io.BytesIO(data))
    image.load()
    return image


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("shape", [(), (3,), (4,)])
def test_a_map_is_read_as_it_was_written(size, shape):
    control = noise(*size, *shape)
    assert np.array_equal(np.asarray(read(encode_png(control))), control)


@pytest.mark.parametrize("size", SIZES)
def test_black_and_white_takes_one_bit_a_pixel(size):
    control = np.where(noise(*size) > 200, np.uint8(255), np.uint8(0))
    image = read(encode_png(control, is_bilevel=True))
    assert image.mode == "1"
    assert np.array_equal(np.asarray(image.convert("L")), control)


def test_a_part_of_a_larger_map_is_written_alone():
    control = noise(40, 40, 3)[5:-5, 5:-5, ::-1]
    assert np.array_equal(np.asarray(read(encode_png(control))), control)


def test_texts_are_stored_in_the_png():
    assert read(encode_png(noise(4, 4), texts={"openpose": '{"people":[]}'})).text == {"openpose": '{"people":[]}'}
