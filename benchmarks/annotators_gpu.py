"""Each network on a GPU against the time that was published for the replaced service, 512 x 512 in, its map out.

Published: the mean of ten, the better of an RTX 3060 and an RTX 4090 node, where most networks ran on the CPU. Weights
are random in the files' own shapes, which costs the same but where people or things are looked for. Ours: the median of
a warm process, decoding and encoding included. Says why it measures nothing where there is no GPU.
Run in the environment of `make annotators`: `python -m benchmarks.annotators --gpu`.
"""

import asyncio
import io
import statistics
import tempfile
import time
from pathlib import Path

from PIL import Image

from benchmarks.figures import RATIO, Report
from services.kernel.images import ImageLimits
from services.preprocessor.annotation import Annotation
from services.preprocessor.annotator import Annotator
from services.preprocessor.config import CUDA, AnnotatorDevice
from services.preprocessor.engine import AnnotationEngine
from services.preprocessor.registry import installed
from services.preprocessor.weights import FolderWeights, StoreWeights
from services.weights.settings import WeightsSettings

PHOTO = Path(__file__).parents[1] / "demo" / "photos" / "coffee.jpg"
SIDE_PX = 512
ROUNDS, WARM_UP_ROUNDS = 10, 2
GOAL = 0.1
# Of `sam`, only with its largest network, for which no random weights are made here.
PUBLISHED_S = {
    "scribble_hed": 0.762,
    "softedge_hed": 0.816,
    "scribble_hedsafe": 0.767,
    "softedge_hedsafe": 0.751,
    "depth_midas": 2.629,
    "mlsd": 0.478,
    "openpose": 0.675,
    "openpose_face": 0.672,
    "openpose_faceonly": 0.675,
    "openpose_full": 0.670,
    "openpose_hand": 0.666,
    "scribble_pidinet": 1.422,
    "softedge_pidinet": 1.401,
    "scribble_pidsafe": 1.429,
    "softedge_pidsafe": 1.380,
    "normal_bae": 3.008,
    "lineart_realistic": 1.132,
    "lineart_coarse": 1.156,
    "lineart_anime": 0.288,
    "depth_leres": 2.307,
    "depth_leres++": 25.41,
}


def why_not() -> str:
    """What is missing to measure on a GPU; empty where nothing is."""
    try:
        import torch
    except ImportError:
        return "torch is not installed"
    return "" if torch.cuda.is_available() else "torch sees no GPU"


def measure(report: Report) -> None:
    if reason := why_not():
        print(f"GPU: skipped, {reason}; {len(PUBLISHED_S)} annotators would be measured")
        return
    with tempfile.TemporaryDirectory() as folder:
        asyncio.run(_all(Path(folder), report))


async def _all(root: Path, report: Report) -> None:
    from tests.fakes.annotator_weights import write

    store = StoreWeights(WeightsSettings.model_validate({"dir": root / "store", "offline": True}))
    engine = AnnotationEngine(
        threads=1,
        limits=ImageLimits(),
        weights=FolderWeights(root, store),
        device=AnnotatorDevice(kind=CUDA, threads=2),
    )
    registry = installed()
    for annotator_id, published_s in PUBLISHED_S.items():
        annotator = registry.get(annotator_id)
        folder = root / annotator.models[0].manifest.view
        if not all((folder / name).is_file() for name in annotator.models[0].files):
            write(root, annotator.models[0].name)
        taken_s, device = await _timed(engine, annotator)
        report.add(annotator_id, taken_s / published_s, RATIO, against=f"{published_s} s, published", goal=GOAL)
        print(f"{annotator_id} took {taken_s:.3f} s on {device}")
    engine.close()


async def _timed(engine: AnnotationEngine, annotator: Annotator) -> tuple[float, str]:
    values = {each.name: each.default for each in annotator.all_parameters}
    asked = Annotation(annotator=annotator, parameters=values, image=_photo())
    times = []
    for _ in range(WARM_UP_ROUNDS + ROUNDS):
        start_s = time.perf_counter()
        control = await engine.run(asked)
        times.append(time.perf_counter() - start_s)
    return statistics.median(times[WARM_UP_ROUNDS:]), control.device


def _photo() -> bytes:
    stream = io.BytesIO()
    Image.open(PHOTO).resize((SIDE_PX, SIDE_PX)).save(stream, "PNG")
    return stream.getvalue()
