"""The loop in C against OpenCV, and what happens without a compiler."""

import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest

import hatch_build
from services.preprocessor.annotators import canny
from services.preprocessor.registry import core

ROOT = Path(__file__).parents[3]
SIZES = [(1, 1), (1, 2), (2, 1), (3, 17), (2, 5000), (5000, 2), (31, 33), (64, 512), (129, 511), (17, 9000)]

compiled = pytest.mark.skipif(not canny.LIBRARY.exists(), reason="no C compiler made libgradient.so")


def images(height: int, width: int):
    random = np.random.RandomState(height * width)
    noise = random.randint(0, 256, (height, width, 3), dtype=np.uint8)
    yield cv2.GaussianBlur(noise, (0, 0), 0.8).reshape(noise.shape)
    yield noise // 255 * 255
    # Equal channels, and channels that differ only in their gradient's sign: the first one counts.
    yield np.repeat(noise[..., :1], 3, axis=2)
    yield np.dstack([noise[..., 0], 255 - noise[..., 0], noise[..., 0]])


def by_opencv(image: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    def sobel(x: int, y: int) -> np.ndarray:
        return np.stack([cv2.Sobel(each, cv2.CV_16S, x, y, borderType=cv2.BORDER_REPLICATE) for each in channels])

    channels = cv2.split(image)
    across, down = sobel(1, 0), sobel(0, 1)
    strongest = (np.abs(across) + np.abs(down)).argmax(axis=0)[None]
    return np.take_along_axis(across, strongest, 0)[0], np.take_along_axis(down, strongest, 0)[0]


@compiled
@pytest.mark.parametrize(("height", "width"), SIZES)
def test_each_pixel_has_the_gradient_of_its_strongest_channel(height, width):
    for image in images(height, width):
        for ours, opencvs in zip(canny.strongest_gradient(image), by_opencv(image), strict=True):
            assert np.array_equal(ours, opencvs)


@compiled
def test_a_view_of_a_larger_image_is_read_correctly():
    whole = next(images(40, 60))
    part = whole[3:30, 7:50]
    for ours, opencvs in zip(canny.strongest_gradient(part), by_opencv(part.copy()), strict=True):
        assert np.array_equal(ours, opencvs)


@compiled
@pytest.mark.parametrize(("height", "width"), SIZES)
def test_nothing_is_written_outside_the_given_buffers(height, width):
    scratch_bytes, guard, mark = 9 * (width + 2), 64, 0x5A
    scratch = np.full(scratch_bytes + 2 * guard, mark, np.uint8)
    across, down = (np.full(height * width * 2 + 2 * guard, mark, np.uint8) for _ in range(2))
    places = [each[guard:].ctypes.data for each in (scratch, across, down)]
    image = next(images(height, width))
    canny._compiled()(image.ctypes.data, height, width, *places)
    for each in (scratch, across, down):
        assert (each[:guard] == mark).all()
        assert (each[-guard:] == mark).all()


@pytest.mark.parametrize(("height", "width"), SIZES)
@pytest.mark.parametrize(("low", "high"), [(100, 200), (0, 0)])
@pytest.mark.parametrize("is_compiled", [pytest.param(True, marks=compiled), False])
def test_canny_is_opencvs_with_and_without_the_compiled_loop(monkeypatch, height, width, low, high, is_compiled):
    if not is_compiled:
        monkeypatch.setattr(canny, "strongest_gradient", lambda image: None)
    for image in images(height, width):
        control = core().get("canny")(image, low_threshold=low, high_threshold=high, gray=False)
        assert np.array_equal(control, cv2.Canny(image, low, high))


def look_for(monkeypatch, library: Path) -> None:
    monkeypatch.setattr(canny, "LIBRARY", library)
    monkeypatch.setattr(canny, "_compiled", canny._compiled.__wrapped__)


@pytest.mark.parametrize("content", [None, b"", b"\x7fELF of another machine"])
def test_without_a_library_that_loads_there_is_no_gradient(monkeypatch, tmp_path, content):
    if content is not None:
        (tmp_path / "libgradient.so").write_bytes(content)
    look_for(monkeypatch, tmp_path / "libgradient.so")
    assert canny.strongest_gradient(np.zeros((4, 4, 3), np.uint8)) is None


@pytest.fixture
def tree(tmp_path) -> Path:
    (tmp_path / hatch_build.SOURCE.parent).mkdir(parents=True)
    shutil.copy(ROOT / hatch_build.SOURCE, tmp_path / hatch_build.SOURCE)
    (tmp_path / hatch_build.LIBRARY).write_bytes(b"an old one")
    return tmp_path


def test_an_installation_compiles_a_library_that_loads(tree, monkeypatch):
    if shutil.which("cc") is None:
        pytest.skip("there is no C compiler here")
    monkeypatch.delenv("CC", raising=False)
    assert hatch_build.compile_into(tree) == ""
    look_for(monkeypatch, tree / hatch_build.LIBRARY)
    assert canny.strongest_gradient(np.zeros((4, 4, 3), np.uint8)) is not None


@pytest.mark.parametrize(
    ("compiler", "problem"),
    [
        ("no-such-compiler -m64", "no C compiler runs as no-such-compiler -m64: No such file or directory"),
        ("false", "false says"),
    ],
)
def test_an_installation_without_a_compiler_says_so_and_leaves_no_old_library(tree, monkeypatch, compiler, problem):
    monkeypatch.setenv("CC", compiler)
    assert hatch_build.compile_into(tree).startswith(problem)
    assert not (tree / hatch_build.LIBRARY).exists()
