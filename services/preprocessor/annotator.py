"""What an annotator is: described parameters, and a function from RGB images to control maps.

Knows no wire, no file format and no place where weights are stored.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from typing import Any, TypeAlias

import cv2
import isal
import PIL
from cv2.typing import MatLike

from fanlight.contract.parameters import Parameter, Value
from services.preprocessor.poses import Person
from services.preprocessor.sizing import SIZE_PARAMETERS, detect_resolution_parameter
from services.preprocessor.weights import AnnotatorWeights

# Always uint8, 0 to 255: an image or color map (H, W, 3) in RGB, one with transparency (H, W, 4) in RGBA, or one
# channel (H, W).
Pixels: TypeAlias = MatLike


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "none"


# The libraries, besides our own code, whose versions decide a control image's bytes.
LIBRARIES = f"opencv-{cv2.__version__}.pillow-{PIL.__version__}.isal-{isal.__version__}.heif-{_version('pi-heif')}"


@dataclass(frozen=True, slots=True, kw_only=True)
class ControlMap:
    """What an annotator draws: pixels (H, W), (H, W, 3) or (H, W, 4), uint8.

    `people` are those it was drawn from; None if the annotator detects no people.
    """

    pixels: Pixels
    people: tuple[Person, ...] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Annotator:
    """`apply` takes an image (H, W, 3) uint8 and every parameter by name; its map has the image's height and width.

    With `models`, `apply` takes a sequence of images of one shape and the loaded model, and returns one map for each.
    """

    id: str
    description: str
    apply: Callable[..., Any]
    # Raised by hand when `apply`, or how images are read and written, may give other bytes for the same input.
    revision: int = 4
    parameters: tuple[Parameter, ...] = ()
    # Short ids of the ControlNets that were trained on such maps.
    controlnets: tuple[str, ...] = ()
    deterministic: bool = True
    license: str = "Apache-2.0"
    # The first is the default; if there are several, the parameter `model` chooses.
    models: tuple[AnnotatorWeights, ...] = ()
    # Python packages that it requires, by the name they are imported by.
    needs: tuple[str, ...] = ()
    # The default short side in pixels at which it works; 0 is the size of the control image.
    detect_resolution: int = 0
    # The map's colors are labels, which must not be mixed when the map is resized.
    has_labels: bool = False
    # Takes and returns images with their transparency (H, W, 4).
    keeps_alpha: bool = False
    # The map has no values but 0 and 255.
    is_bilevel: bool = False

    @property
    def all_parameters(self) -> tuple[Parameter, ...]:
        """Its own, and the size parameters that every annotator has."""
        resolution = detect_resolution_parameter(self.detect_resolution, aligned=self.needs_aligned_size)
        return (*self.parameters, *self._model_parameter(), resolution, *SIZE_PARAMETERS)

    @property
    def needs_aligned_size(self) -> bool:
        """Whether both sides must be multiples of 64, as for networks that halve an image several times."""
        return self.detect_resolution > 0

    def _model_parameter(self) -> tuple[Parameter, ...]:
        names = tuple(model.name for model in self.models)
        text = "Which network; a larger one is slower and finds more"
        return (Parameter(name="model", default=names[0], choices=names, description=text),) if names[1:] else ()

    def model(self, parameters: Mapping[str, Value]) -> AnnotatorWeights | None:
        """The one that these parameters choose."""
        named = parameters.get("model")
        return next((model for model in self.models if model.name == named), self.models[0] if self.models else None)

    @property
    def version(self) -> str:
        """Differs wherever the same input may give other bytes on the same kind of device."""
        return "+".join((str(self.revision), LIBRARIES, *_versions(self.needs), *pinned(self.models)))

    @property
    def weight_bytes(self) -> int:
        return self.models[0].size_bytes if self.models else 0

    def __call__(self, image: Pixels, **parameters: Any) -> Pixels:
        """The map of one image (H, W, 3), or (H, W, 4) with `keeps_alpha`; for annotators without a model."""
        pixels: Pixels = self.apply(image, **parameters)
        return pixels

    def draw(self, images: Sequence[Pixels], model: Any, **parameters: Any) -> Sequence[ControlMap]:
        """A map of each image (H, W, C), all of one shape. `model` is what `models` builds; None without models."""
        if not self.models:
            return [ControlMap(pixels=self.apply(image, **parameters)) for image in images]
        maps = self.apply(images, model, **parameters)
        return [each if isinstance(each, ControlMap) else ControlMap(pixels=each) for each in maps]


@cache
def _versions(packages: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(f"{package}-{_version(package)}" for package in packages)


@cache
def pinned(models: tuple[AnnotatorWeights, ...]) -> tuple[str, ...]:
    """One short digest of all pinned sha256s; empty if nothing is pinned."""
    pins = [pin for model in models for pin in model.sha256s]
    return (f"weights-{hashlib.sha256(' '.join(pins).encode()).hexdigest()[:12]}",) if pins else ()
