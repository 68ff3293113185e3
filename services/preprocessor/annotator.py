"""What an annotator is: described parameters, and a function from RGB pictures to control images.

Knows no wire, no file format and no place where weights lie.
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
from services.preprocessor.sizing import SIZING, working_resolution
from services.preprocessor.weights import Model

# Always uint8: a picture or a colour map (H, W, 3) in RGB, one with transparency (H, W, 4), or one channel (H, W).
Pixels: TypeAlias = MatLike

# The libraries that decide the bytes beside our own code.
LIBRARIES = f"opencv-{cv2.__version__}.pillow-{PIL.__version__}.isal-{isal.__version__}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Drawn:
    """A map, and the people it was drawn from; None where nobody was looked for."""

    pixels: Pixels
    people: tuple[Person, ...] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Annotator:
    """`apply` takes a picture (H, W, 3) and every parameter by name; its map has the picture's height and width.

    With `models`, `apply` takes pictures of one shape and the loaded model, and gives a map for each.
    """

    id: str
    description: str
    apply: Callable[..., Any]
    # Raised by hand whenever `apply`, or how pictures are read and written, may give other bytes for the same input.
    revision: int = 4
    parameters: tuple[Parameter, ...] = ()
    # Short ids of the ControlNets that the map is made for.
    controlnets: tuple[str, ...] = ()
    deterministic: bool = True
    license: str = "Apache-2.0"
    # The first is the default; with several, the parameter `model` chooses.
    models: tuple[Model, ...] = ()
    # Python packages that it cannot do without, by the name they are imported by.
    needs: tuple[str, ...] = ()
    # The short side in pixels at which it works unless told otherwise; 0 is the size of the control image.
    detect_resolution: int = 0
    # The map's colours are labels, which must not be mixed when its size is changed.
    has_labels: bool = False
    # Takes and gives pictures with their transparency (H, W, 4).
    keeps_alpha: bool = False
    # The map has 0 and 255 only.
    is_bilevel: bool = False

    @property
    def all_parameters(self) -> tuple[Parameter, ...]:
        """Its own, and those about sizes that every annotator has."""
        resolution = working_resolution(self.detect_resolution, in_steps=self.works_in_steps)
        return (*self.parameters, *self._choice(), resolution, *SIZING)

    @property
    def works_in_steps(self) -> bool:
        """Whether it can do with whole steps of pixels alone, as networks that halve a picture again and again."""
        return self.detect_resolution > 0

    def _choice(self) -> tuple[Parameter, ...]:
        names = tuple(model.name for model in self.models)
        text = "Which network; a larger one is slower and sees more"
        return (Parameter(name="model", default=names[0], choices=names, description=text),) if names[1:] else ()

    def model(self, parameters: Mapping[str, Value]) -> Model | None:
        """The one that these parameters ask for."""
        named = parameters.get("model")
        return next((model for model in self.models if model.name == named), self.models[0] if self.models else None)

    @property
    def version(self) -> str:
        """Differs wherever the same input may give other bytes on the same kind of device."""
        return "+".join((str(self.revision), LIBRARIES, *_versions(self.needs), *_digests(self.models)))

    @property
    def weight_bytes(self) -> int:
        return self.models[0].size_bytes if self.models else 0

    def __call__(self, picture: Pixels, **parameters: Any) -> Pixels:
        pixels: Pixels = self.apply(picture, **parameters)
        return pixels

    def draw(self, pictures: Sequence[Pixels], model: Any, **parameters: Any) -> Sequence[Drawn]:
        """A map of each picture, all of one shape. `model` is what `models` say to load, None without."""
        if not self.models:
            return [Drawn(pixels=self.apply(picture, **parameters)) for picture in pictures]
        maps = self.apply(pictures, model, **parameters)
        return [each if isinstance(each, Drawn) else Drawn(pixels=each) for each in maps]


@cache
def _versions(packages: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(f"{package}-{_version(package)}" for package in packages)


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "none"


@cache
def _digests(models: tuple[Model, ...]) -> tuple[str, ...]:
    """One short digest for the weights that are pinned, none where none are."""
    pins = [pin for model in models for pin in model.sha256s]
    return (f"weights-{hashlib.sha256(' '.join(pins).encode()).hexdigest()[:12]}",) if pins else ()
