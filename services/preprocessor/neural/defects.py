"""Defects of the libraries that the networks come from, and the workaround for each: here and nowhere else.

controlnet_aux 0.0.10:
- The package imports every detector, and with them torchvision, timm and mediapipe. That takes 15 s, and fails if one
  is missing: `submodule` imports one detector under an empty package of the same path.
- LeReS parses the process's own command line with argparse: `without_arguments` hides it.
- LeReS' detector leaves its network in training mode, so that each image changes the next one's map: `place` ends that.
- LeReS' boost fails on images of 160 pixels or less: `neural/depth.py` does not use it there.
- MLSD's detector swallows every exception, also the one for "no lines found": `mlsd_lines` handles that one only.
- SAM's detector chooses colors at random and fails if no mask was found: only its mask generator is used. That divides
  by zero if a crop gets no points (`neural/sam.py` gives it one), and fails if no crop has a mask: `box_area` handles
  that.
- TEED and Anyline cannot be loaded from a folder without a file name: only their network is used.
- mediapipe_face needs a mediapipe that does not work with newer protobuf and numpy: `annotators/faces.py` runs the same
  network in OpenCV. dwpose needs mmpose: `neural/pose_estimation.py` runs the same networks in ONNX Runtime.
- It draws hands with matplotlib, which is not among its requirements: `poses.py` draws them.
- OpenPose fails on images that are far higher than wide: `neural/pose_estimation.py` detects no people there.
- Its openpose imports a scipy namespace that scipy is going to remove: `submodule` keeps it.

torchvision 0.28.0, the only one whose metadata requires exactly our torch:
- The package index has it built for CUDA. Beside torch's CPU build its operators do not load, and importing it fails
  because two of their schemas are missing: `declare_torchvision_operators` declares those. Our code calls neither:
  SAM's mask generator, which would, gets `batched_nms` from here.
"""

import importlib
import importlib.util
import sys
import threading
import types
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

PACKAGE = "controlnet_aux"
# https://github.com/pytorch/vision, torchvision/csrc/ops/nms.cpp and quantized/cpu/qnms_kernel.cpp.
TORCHVISION_SCHEMAS = {
    "nms": "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms": "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
}

_importing = threading.RLock()
# Declarations last as long as the library object.
_declared: list[Any] = []


def submodule(path: str) -> Any:
    """A module of controlnet_aux, such as `hed` or `midas.api`, without the rest of the package."""
    with _importing, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        _declare_package()
        declare_torchvision_operators()
        _keep_scipy_namespace()
        return importlib.import_module(f"{PACKAGE}.{path}")


def _declare_package() -> None:
    if PACKAGE in sys.modules:
        return
    spec = importlib.util.find_spec(PACKAGE)
    assert spec is not None, "annotators are listed only where their packages are installed"
    # Never executed: it only gives the path of its modules.
    sys.modules[PACKAGE] = importlib.util.module_from_spec(spec)


def declare_torchvision_operators() -> None:
    """Once, before anything imports torchvision; does nothing if torchvision is absent or its own operators load."""
    spec = importlib.util.find_spec("torchvision")
    if _declared or "torchvision" in sys.modules or spec is None or spec.origin is None:
        return
    import torch

    if _loads_own_operators(spec.origin):
        return
    library: Any = torch.library.Library("torchvision", "DEF")  # type: ignore[no-untyped-call]
    for name, schema in TORCHVISION_SCHEMAS.items():
        library.define(f"{name}{schema}")
    _declared.append(library)


def _loads_own_operators(package_file: str) -> bool:
    """Whether torchvision's compiled operators load with this torch: those of a CUDA build do not with a CPU build."""
    import torch

    try:
        operators: Any = torch.ops
        operators.load_library(package_file.replace("__init__.py", "_C.so"))
    except (OSError, RuntimeError):
        return False
    return True


def _keep_scipy_namespace() -> None:
    if "scipy.ndimage.filters" in sys.modules or importlib.util.find_spec("scipy") is None:
        return
    import scipy.ndimage

    names = types.ModuleType("scipy.ndimage.filters")
    names.__dict__.update(vars(scipy.ndimage))
    sys.modules["scipy.ndimage.filters"] = names


@contextmanager
def without_arguments() -> Iterator[None]:
    """Hides the command line's arguments from code that parses them as its own."""
    with _importing:
        saved, sys.argv = sys.argv, sys.argv[:1]
        try:
            yield
        finally:
            sys.argv = saved


def mlsd_lines(image: Any, network: Any, score: float, distance: float) -> list[tuple[int, int, int, int]]:
    """Segments (x1, y1, x2, y2) in pixels of an image (H, W, 3) uint8.

    Empty if the network finds none, for which `pred_lines` raises an IndexError.
    """
    pred_lines = submodule("mlsd.utils").pred_lines
    try:
        lines = pred_lines(image, network, [image.shape[0], image.shape[1]], score, distance)
    except IndexError:
        return []
    return [(int(x1), int(y1), int(x2), int(y2)) for x1, y1, x2, y2 in lines]


def sam_generator() -> Any:
    """SAM's mask generator, with non-maximum suppression that needs no compiled operator and accepts zero boxes."""
    module = submodule("segment_anything.automatic_mask_generator")
    module.batched_nms, module.box_area = batched_nms, box_area
    return module.SamAutomaticMaskGenerator


def box_area(boxes: Any) -> Any:
    """Areas (N,) of boxes (N, 4) given by their corners; zero boxes come as (0,)."""
    left, top, right, bottom = boxes.reshape(-1, 4).T
    return (right - left) * (bottom - top)


def batched_nms(boxes: Any, scores: Any, idxs: Any, iou_threshold: float) -> Any:
    """Indices (K,) int64, best first, of the boxes (N, 4) that no better box of their group overlaps by more.

    `scores` and `idxs` (the groups) are (N,). Non-maximum suppression as in torchvision.ops.batched_nms.
    """
    import torch

    order = scores.argsort(descending=True, stable=True)
    area = box_area(boxes)
    kept = []
    while order.numel():
        best, order = order[0], order[1:]
        kept.append(best)
        near = torch.maximum(boxes[best, :2], boxes[order, :2])
        far = torch.minimum(boxes[best, 2:], boxes[order, 2:])
        common = (far - near).clamp(min=0).prod(dim=1)
        overlap = common / (area[best] + area[order] - common)
        order = order[(overlap <= iou_threshold) | (idxs[order] != idxs[best])]
    return torch.stack(kept) if kept else torch.empty(0, dtype=torch.int64, device=boxes.device)
