"""Annotators by id and by other services' names. `core` lists those that need no network library.

Which others there are depends on the installed packages; nothing is imported to find that out.
"""

import importlib.util
from collections.abc import Iterable, Iterator

from fanlight.contract.names import ANNOTATOR_ALIASES, find_name
from fanlight.errors import NotFound
from services.preprocessor.annotator import Annotator
from services.preprocessor.annotators import filters, lines
from services.preprocessor.annotators.bodies import MEDIAPIPE_POSE
from services.preprocessor.annotators.canny import CANNY
from services.preprocessor.annotators.faces import MEDIAPIPE_FACE
from services.preprocessor.neural import depth, hed, pose_estimation, sam, segmentation
from services.preprocessor.neural import lines as neural_lines

CORE = (
    *(CANNY, filters.SHUFFLE, lines.LINEART_STANDARD, lines.SCRIBBLE_XDOG, lines.LSD),
    *(filters.INVERT, filters.THRESHOLD, filters.TILE, filters.BLUR_GAUSSIAN, filters.IP2P, filters.INPAINT),
)
NEURAL = (
    *(MEDIAPIPE_FACE, MEDIAPIPE_POSE, *hed.ANNOTATORS, *neural_lines.ANNOTATORS, *depth.ANNOTATORS),
    *(*pose_estimation.ANNOTATORS, *segmentation.ANNOTATORS, *sam.ANNOTATORS, segmentation.REMOVE_BACKGROUND),
)


class Registry:
    """In the order given; two annotators with one id are a programming error."""

    def __init__(self, annotators: Iterable[Annotator], missing: Iterable[Annotator] = ()) -> None:
        listed = tuple(annotators)
        self._by_id = {annotator.id: annotator for annotator in listed}
        self._missing = {annotator.id: annotator for annotator in missing}
        assert len(self._by_id) == len(listed)
        self._names = {annotator_id: aliases_of(annotator_id) for annotator_id in (*self._by_id, *self._missing)}

    def __iter__(self) -> Iterator[Annotator]:
        return iter(self._by_id.values())

    def get(self, name: str) -> Annotator:
        """The annotator of this id or alias. NotFound if there is no such annotator, or its packages are missing."""
        annotator_id = find_name(self._names, name)
        if annotator_id in self._by_id:
            return self._by_id[annotator_id]
        if annotator_id in self._missing:
            packages = ", ".join(missing_packages(self._missing[annotator_id]))
            raise NotFound(
                f"{annotator_id} needs packages that this worker has not installed: {packages}; "
                "install 'fanlight[annotators]', or ask a worker that has them",
                field="annotator",
            )
        raise NotFound(f"is unknown; the annotators are {', '.join(self._by_id)}", field="annotator")


def aliases_of(annotator_id: str) -> list[str]:
    return sorted(alias for alias, meant in ANNOTATOR_ALIASES.items() if meant == annotator_id)


def missing_packages(annotator: Annotator) -> list[str]:
    """The packages that it needs and that are not installed."""
    return [package for package in annotator.needs if importlib.util.find_spec(package) is None]


def core() -> Registry:
    """Those without a network, and so without weights."""
    return Registry(CORE)


def installed() -> Registry:
    """All that the installed packages allow."""
    annotators = (*CORE, *NEURAL)
    return Registry(
        (each for each in annotators if not missing_packages(each)),
        missing=(each for each in annotators if missing_packages(each)),
    )
