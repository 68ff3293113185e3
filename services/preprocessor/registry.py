"""Annotators by id and by other services' names. `core` lists those that need no network library.

Which of the others there are depends on what is installed; nothing is imported to find out.
"""

import importlib.util
from collections.abc import Iterable, Iterator

from fanlight.contract.names import ANNOTATOR_ALIASES, find_name
from fanlight.errors import NotFound
from services.preprocessor.annotator import Annotator
from services.preprocessor.annotators.bodies import MEDIAPIPE_POSE
from services.preprocessor.annotators.canny import CANNY
from services.preprocessor.annotators.detail import BLUR_GAUSSIAN, TILE
from services.preprocessor.annotators.faces import MEDIAPIPE_FACE
from services.preprocessor.annotators.lineart import LINEART_STANDARD
from services.preprocessor.annotators.lines import LSD
from services.preprocessor.annotators.passing import INPAINT, IP2P
from services.preprocessor.annotators.scribble import SCRIBBLE_XDOG
from services.preprocessor.annotators.shuffle import SHUFFLE
from services.preprocessor.annotators.tones import INVERT, THRESHOLD
from services.preprocessor.neural import background, depth, dwpose, hed, leres, lines, openpose, sam, segmentation

PLAIN = (
    *(CANNY, SHUFFLE, LINEART_STANDARD, SCRIBBLE_XDOG, LSD),
    *(INVERT, THRESHOLD, TILE, BLUR_GAUSSIAN, IP2P, INPAINT),
)
NEURAL = (
    *(MEDIAPIPE_FACE, MEDIAPIPE_POSE, *hed.ANNOTATORS, *lines.ANNOTATORS, *depth.ANNOTATORS, *leres.ANNOTATORS),
    *(*openpose.ANNOTATORS, *dwpose.ANNOTATORS, *segmentation.ANNOTATORS, *sam.ANNOTATORS, *background.ANNOTATORS),
)


class Registry:
    """In the order given; two annotators of one id are a mistake in the program."""

    def __init__(self, annotators: Iterable[Annotator], missing: Iterable[Annotator] = ()) -> None:
        listed = tuple(annotators)
        self._by_id = {annotator.id: annotator for annotator in listed}
        self._missing = {annotator.id: annotator for annotator in missing}
        assert len(self._by_id) == len(listed)
        self._names = {annotator_id: aliases_of(annotator_id) for annotator_id in (*self._by_id, *self._missing)}

    def __iter__(self) -> Iterator[Annotator]:
        return iter(self._by_id.values())

    def get(self, name: str) -> Annotator:
        """The annotator of this id or alias. NotFound where there is none, or where its packages are not installed."""
        annotator_id = find_name(self._names, name)
        if annotator_id in self._by_id:
            return self._by_id[annotator_id]
        if annotator_id in self._missing:
            packages = ", ".join(absent(self._missing[annotator_id]))
            raise NotFound(
                f"{annotator_id} needs what this worker has not installed: {packages}; "
                "install 'fanlight[annotators]', or ask a worker that has it",
                field="annotator",
            )
        raise NotFound(f"is not known; the annotators are {', '.join(self._by_id)}", field="annotator")


def aliases_of(annotator_id: str) -> list[str]:
    return sorted(alias for alias, meant in ANNOTATOR_ALIASES.items() if meant == annotator_id)


def absent(annotator: Annotator) -> list[str]:
    """The packages that it needs and that are not installed."""
    return [package for package in annotator.needs if importlib.util.find_spec(package) is None]


def core() -> Registry:
    """Without a network, so without weights."""
    return Registry(PLAIN)


def installed() -> Registry:
    """All that the installed packages allow."""
    annotators = (*PLAIN, *NEURAL)
    return Registry(
        (each for each in annotators if not absent(each)), missing=(each for each in annotators if absent(each))
    )
