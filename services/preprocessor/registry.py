"""Annotators by id. Knows no annotator by itself; `core` lists those that OpenCV and numpy are enough for."""

from collections.abc import Iterable, Iterator

from services.kernel.errors import NotFound
from services.preprocessor.annotator import Annotator
from services.preprocessor.annotators.canny import CANNY
from services.preprocessor.annotators.detail import BLUR_GAUSSIAN, TILE
from services.preprocessor.annotators.lineart import LINEART_STANDARD
from services.preprocessor.annotators.scribble import SCRIBBLE_XDOG
from services.preprocessor.annotators.shuffle import SHUFFLE
from services.preprocessor.annotators.tones import INVERT, THRESHOLD


class Registry:
    """In the order given; two annotators of one id are a mistake in the program."""

    def __init__(self, annotators: Iterable[Annotator]) -> None:
        listed = tuple(annotators)
        self._by_id = {annotator.id: annotator for annotator in listed}
        assert len(self._by_id) == len(listed)

    def __iter__(self) -> Iterator[Annotator]:
        return iter(self._by_id.values())

    def get(self, annotator_id: str) -> Annotator:
        """NotFound where there is none."""
        if annotator_id not in self._by_id:
            raise NotFound(f"is not known; the annotators are {', '.join(self._by_id)}", field="annotator")
        return self._by_id[annotator_id]


def core() -> Registry:
    return Registry(
        (CANNY, SHUFFLE, LINEART_STANDARD, SCRIBBLE_XDOG, INVERT, THRESHOLD, TILE, BLUR_GAUSSIAN),
    )
