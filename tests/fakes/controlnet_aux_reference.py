"""controlnet_aux's detectors, imported one by one.

The package's own `__init__` imports all of them, and with them torchvision, timm and mediapipe; an empty package of the
same path stands in for it.
"""

import importlib
import importlib.util
import sys
import types
from typing import Any

PACKAGE = "controlnet_aux"


def detector(submodule: str, name: str) -> Any:
    """An instance of a detector without weights, such as `detector("canny", "CannyDetector")`."""
    if PACKAGE not in sys.modules:
        spec = importlib.util.find_spec(PACKAGE)
        assert spec is not None
        stand_in = types.ModuleType(PACKAGE)
        stand_in.__path__ = list(spec.submodule_search_locations or ())
        sys.modules[PACKAGE] = stand_in
    return getattr(importlib.import_module(f"{PACKAGE}.{submodule}"), name)()
