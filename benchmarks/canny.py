"""Canny, bytes in to bytes out, 512 x 512: ours against controlnet_aux and lossless WebP, one after the other.

The reference does what an annotator service around controlnet_aux does: Pillow decodes, CannyDetector at its defaults,
Pillow encodes lossless WebP at its defaults. No HTTP on either side. Also our kernel against cv2.Canny alone.
Prints the medians of CPU time, on one thread, and their ratios. Run: `python -m benchmarks.canny [--rounds 200]`.
"""

import argparse
import io
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

from services.kernel.pictures import PictureLimits
from services.preprocessor.annotation import Annotation, annotate
from services.preprocessor.registry import core
from tests.fakes.controlnet_aux_reference import detector

PHOTO = Path(__file__).parents[1] / "demo" / "photos" / "coffee.jpg"
SIDE_PX = 512
WARM_UP_ROUNDS = 5


def photo() -> bytes:
    stream = io.BytesIO()
    Image.open(PHOTO).resize((SIDE_PX, SIDE_PX), Image.Resampling.LANCZOS).save(stream, "JPEG", quality=92)
    return stream.getvalue()


def sides(data: bytes) -> dict[str, Callable[[], object]]:
    canny, reference = core().get("canny"), detector("canny", "CannyDetector")
    values = {parameter.name: parameter.default for parameter in canny.parameters}
    pixels = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))

    def replaced() -> bytes:
        stream = io.BytesIO()
        reference(Image.open(io.BytesIO(data)).convert("RGB")).save(stream, "WEBP", lossless=True)
        return stream.getvalue()

    def ours() -> bytes:
        asked = Annotation(annotator=canny, parameters=values, picture=data)
        return annotate(asked, limits=PictureLimits()).data

    return {
        "replaced": replaced,
        "ours": ours,
        "cv2.Canny": lambda: cv2.Canny(pixels, 100, 200),
        "our kernel": lambda: canny(pixels, **values),
    }


def check(ours: bytes, replaced: bytes) -> None:
    maps = [np.asarray(Image.open(io.BytesIO(data)).convert("RGB")) for data in (ours, replaced)]
    assert np.array_equal(*maps), "the maps differ"
    print(f"bytes out: ours {len(ours)}, replaced {len(replaced)}; the maps are equal")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=200)
    rounds = parser.parse_args().rounds
    cv2.setNumThreads(1)
    runs = sides(photo())
    check(runs["ours"](), runs["replaced"]())
    taken: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(WARM_UP_ROUNDS + rounds):
        for name, run in runs.items():
            start_s = time.process_time()
            run()
            if turn >= WARM_UP_ROUNDS:
                taken[name].append(time.process_time() - start_s)
    medians = {name: statistics.median(times) for name, times in taken.items()}
    for name, median_s in medians.items():
        print(f"{name:12} {median_s * 1e3:8.2f} ms")
    print(f"ours / replaced        {medians['ours'] / medians['replaced']:.3f}")
    print(f"our kernel / cv2.Canny {medians['our kernel'] / medians['cv2.Canny']:.3f}")


if __name__ == "__main__":
    main()
