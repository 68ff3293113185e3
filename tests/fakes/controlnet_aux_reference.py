"""controlnet_aux's detectors, one by one."""

from typing import Any

from services.preprocessor.neural import defects


def detector(submodule: str, name: str) -> Any:
    """An instance of a detector without weights, such as `detector("canny", "CannyDetector")`."""
    return getattr(defects.submodule(submodule), name)()
