"""Networks in half precision: on a GPU if there is one, and on a CPU that is forced to the same precision."""

import io
from dataclasses import dataclass

import numpy as np
import pytest
from PIL import Image

from services.kernel.images import ImageLimits
from services.preprocessor.annotation import Annotation
from services.preprocessor.config import CUDA, AnnotatorDevice
from services.preprocessor.engine import AnnotationEngine
from services.preprocessor.registry import NEURAL, installed
from services.preprocessor.weights import FolderWeights
from tests.annotators.conftest import Nowhere
from tests.annotators.test_every_network import PARAMETERS, SLOW
from tests.fakes.synthetic_images import decoded
from tests.golden.annotator_maps import PHOTO

SIDE_PX = 128
# One of those that use a network in the same way; ONNX Runtime and OpenCV are not run in half precision.
CHOSEN = (
    *("softedge_hed", "softedge_pidinet", "lineart_realistic", "lineart_coarse", "lineart_anime", "teed", "anyline"),
    *("mlsd", "depth_anything_v2", "seg_ofade20k", "seg_ufade20k"),
    *("depth_midas", "normal_midas", "normal_bae", "depth_leres", "depth_leres++", "openpose", "sam"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class HalfOnCpu(AnnotatorDevice):
    @property
    def is_half(self) -> bool:
        return True


def _cuda_is_there() -> bool:
    import torch

    return torch.cuda.is_available()


@pytest.fixture(params=["cpu", "cuda"])
def device(request) -> AnnotatorDevice:
    if request.param == "cpu":
        return HalfOnCpu()
    if not _cuda_is_there():
        pytest.skip("torch sees no GPU here")
    return AnnotatorDevice(kind=CUDA)


def _each(annotator_id):
    return pytest.param(annotator_id, marks=[pytest.mark.slow] if annotator_id in SLOW else [])


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("annotator_id", [_each(each) for each in CHOSEN])
async def test_a_map_in_half_precision_is_nearly_that_in_full(annotate, weights, models_dir, device, annotator_id):
    annotator = installed().get(annotator_id)
    side_px = 192 if annotator_id == "depth_leres++" else SIDE_PX
    wanted = PARAMETERS.get(annotator_id, {}) | {"detect_resolution": side_px}
    stream = io.BytesIO()
    Image.open(PHOTO).resize((side_px, side_px)).save(stream, "PNG")
    full = decoded((await annotate(annotator_id, stream.getvalue(), **wanted)).data).astype(int)
    engine = AnnotationEngine(
        threads=1, limits=ImageLimits(), weights=FolderWeights(models_dir, Nowhere()), device=device
    )
    values = {each.name: each.default for each in annotator.all_parameters} | wanted
    half = await engine.run(Annotation(annotator=annotator, parameters=values, image=stream.getvalue()))
    engine.close()
    assert half.device == f"{device.kind}/float16"
    # Random networks are not smooth: values near a threshold, and labels, may differ in any way.
    if not (annotator.is_bilevel or annotator.has_labels or annotator_id in ("anyline", "teed")):
        assert np.abs(decoded(half.data) - full).mean() < 12


def test_those_left_out_do_not_run_on_a_gpu_or_share_a_network():
    networks = {model.name for each in NEURAL if each.id in CHOSEN for model in each.models if model.uses_gpu}
    left_out = {model.name for each in NEURAL for model in each.models if model.uses_gpu} - networks
    # ZoeDepth takes minutes where torch has no fast float16; OneFormer is one network with two sets of labels.
    assert left_out == {"zoe", "oneformer_coco"}
