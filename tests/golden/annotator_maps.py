"""Reviewed control images of networks with real weights; `python -m` draws them again (in .venv-annotators).

Review them after that, and raise the annotator's `revision` when its map has changed.
"""

import asyncio
import io
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

from services.kernel.images import ImageLimits
from services.preprocessor.annotation import Annotation
from services.preprocessor.engine import AnnotationEngine
from services.preprocessor.registry import installed
from services.preprocessor.weights import FolderWeights, StoreWeights
from services.weights.settings import WeightsSettings

FOLDER = Path(__file__).parent / "annotators"
PHOTO = Path(__file__).parent / "photos" / "astronaut.jpg"
# Those whose real weights a package on the index holds.
ANNOTATORS = (
    "softedge_hed",
    "softedge_hedsafe",
    "scribble_hed",
    "scribble_hedsafe",
    "mediapipe_face",
    "mediapipe_pose",
)
RESOLUTION = 256


async def annotated(models_dir: Path, annotator_id: str) -> np.ndarray:
    """uint8 RGB (H, W, 3)."""
    store = StoreWeights(WeightsSettings(dir=models_dir / "store", offline=True))
    engine = AnnotationEngine(threads=1, limits=ImageLimits(), weights=FolderWeights(models_dir, store))
    annotator = installed().get(annotator_id)
    values = {each.name: each.default for each in annotator.all_parameters} | {"detect_resolution": RESOLUTION}
    control = await engine.run(Annotation(annotator=annotator, parameters=values, image=PHOTO.read_bytes()))
    engine.close()
    return np.asarray(Image.open(io.BytesIO(control.data)).convert("RGB"))


def main() -> None:
    from tests.fakes.annotator_weights import write

    with tempfile.TemporaryDirectory() as folder:
        for name in ("hed", "mediapipe_face", "mediapipe_pose"):
            write(Path(folder), name)
        for annotator_id in ANNOTATORS:
            pixels = asyncio.run(annotated(Path(folder), annotator_id))
            Image.fromarray(pixels).save(FOLDER / f"{annotator_id}.png", optimize=True)


if __name__ == "__main__":
    main()
