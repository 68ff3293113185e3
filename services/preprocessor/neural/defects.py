"""What is wrong with the libraries that the networks come from, each handled here and nowhere else.

controlnet_aux 0.0.10:
- Its package imports every detector, and with them torchvision, timm and mediapipe (15 s, and an error where one is
  missing): `submodule` imports one detector under an empty package of the same path.
- LeReS reads the process's own command line with argparse: `without_arguments` hides it.
- LeReS' detector leaves its network in training, so that each picture changes the next one's map: `place` ends that.
- LeReS' boost breaks on pictures of 160 pixels or less: `neural/leres.py` does without it there.
- MLSD's detector swallows every exception, the one that no lines were found among them: `mlsd_lines` knows that one.
- SAM's detector colours masks at random and breaks where none was found: only its mask generator is used. That divides
  by zero where parts of the picture get no point (`neural/sam.py` gives them one), and breaks where no part showed
  anything: `box_area` takes that too.
- TEED and Anyline cannot be loaded from a folder without a file name: only their network is used.
- mediapipe_face wants a mediapipe that no newer protobuf and numpy go with: `annotators/faces.py` reads the same
  network with OpenCV. dwpose wants mmpose: `neural/dwpose.py` reads the same networks with ONNX Runtime.
- Hands are drawn with matplotlib, which it does not ask for: `poses.py` draws.
- OpenPose breaks on pictures that are far higher than wide: `neural/openpose.py` finds nobody there.
- Its openpose asks scipy for a namespace that scipy has announced to drop: `submodule` keeps it.

torchvision 0.28.0, the one whose metadata asks for exactly our torch:
- From the package index it is built for CUDA. Beside the CPU build of torch its operators do not load, and two of their
  schemas are missed on import: `declare_torchvision_operators` declares those. Nothing of ours calls them: SAM's mask
  generator, which would, gets `batched_nms` from here.
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
# What was declared lasts as long as the library object.
_declared: list[Any] = []


def submodule(path: str) -> Any:
    """A module of controlnet_aux, such as `hed` or `midas.api`, without the rest of the package."""
    with _importing, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        _stand_in()
        declare_torchvision_operators()
        _keep_scipy_namespace()
        return importlib.import_module(f"{PACKAGE}.{path}")


def _stand_in() -> None:
    if PACKAGE in sys.modules:
        return
    spec = importlib.util.find_spec(PACKAGE)
    assert spec is not None, "annotators are listed only where their packages are installed"
    # Never executed: it only says where its modules are.
    sys.modules[PACKAGE] = importlib.util.module_from_spec(spec)


def declare_torchvision_operators() -> None:
    """Once, before anything imports torchvision; nothing where torchvision is absent or has its own."""
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
    """Whether torchvision's compiled operators go with this torch: the CUDA build's do not load beside the CPU's."""
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
    """The command line without its arguments, for code that parses it as its own."""
    with _importing:
        kept, sys.argv = sys.argv, sys.argv[:1]
        try:
            yield
        finally:
            sys.argv = kept


def mlsd_lines(image: Any, network: Any, score: float, distance: float) -> list[tuple[int, int, int, int]]:
    """Segments as x1, y1, x2, y2; none where the network sees none, which `pred_lines` answers with an IndexError."""
    pred_lines = submodule("mlsd.utils").pred_lines
    try:
        lines = pred_lines(image, network, [image.shape[0], image.shape[1]], score, distance)
    except IndexError:
        return []
    return [(int(x1), int(y1), int(x2), int(y2)) for x1, y1, x2, y2 in lines]


def sam_generator() -> Any:
    """SAM's mask generator, with a suppression of overlapping boxes that needs no compiled operator, and no boxes."""
    module = submodule("segment_anything.automatic_mask_generator")
    module.batched_nms, module.box_area = batched_nms, box_area
    return module.SamAutomaticMaskGenerator


def box_area(boxes: Any) -> Any:
    """(N,) of corners (N, 4), of which none come as (0,)."""
    left, top, right, bottom = boxes.reshape(-1, 4).T
    return (right - left) * (bottom - top)


def batched_nms(boxes: Any, scores: Any, idxs: Any, iou_threshold: float) -> Any:
    """The indices of the boxes (N, 4) that no better one of their group overlaps by more, best first."""
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
