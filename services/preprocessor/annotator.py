"""What an annotator is: described parameters, and a function from an RGB picture to a control image.

Knows no wire, no file format and no weights.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import cv2
import PIL
from cv2.typing import MatLike

from services.kernel.parameters import Parameter

# Always uint8: a picture or a colour map (H, W, 3) in RGB, or a map of one channel (H, W).
Pixels: TypeAlias = MatLike

# The libraries that decide the bytes beside our own code.
LIBRARIES = f"opencv-{cv2.__version__}.pillow-{PIL.__version__}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Annotator:
    """`apply` takes a picture (H, W, 3) and every parameter by name; its map has the picture's height and width."""

    id: str
    description: str
    apply: Callable[..., Pixels]
    # Raised by hand whenever `apply`, or how pictures are read and written, may give other bytes for the same input.
    revision: int = 1
    parameters: tuple[Parameter, ...] = ()
    # Short ids of the ControlNets that the map is made for.
    controlnets: tuple[str, ...] = ()
    deterministic: bool = True
    # What the map depends on besides the version.
    device: str = "cpu/uint8"
    licence: str = "Apache-2.0"
    weight_bytes: int = 0

    @property
    def version(self) -> str:
        """Differs wherever the same input may give other bytes."""
        return f"{self.revision}+{LIBRARIES}"

    def __call__(self, picture: Pixels, **parameters: Any) -> Pixels:
        return self.apply(picture, **parameters)
