"""Weights in a folder that are cut, empty, of another network or no numbers: one error, which names the file.

Neither the image nor the node is blamed, and no map of such weights is ever given out.
"""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from fanlight.errors import FanlightError
from services.kernel.images import ImageLimits
from services.preprocessor.annotation import Annotation, AnnotationResult
from services.preprocessor.engine import AnnotationEngine
from services.preprocessor.registry import installed
from services.preprocessor.weights import FolderWeights, UnusableWeights
from tests.annotators.conftest import Nowhere
from tests.fakes.annotator_weights import MODELS, write
from tests.golden.annotator_maps import PHOTO

# Of each kind of file, and of each way to read it: annotator, parameters, file.
NETWORKS = {
    "pidinet": ("softedge_pidinet", {}, "table5_pidinet.pth"),
    "hed": ("softedge_hed", {}, "ControlNetHED.pth"),
    "teed": ("teed", {}, "7_model.pth"),
    "mlsd_tiny": ("mlsd", {"model": "mlsd_tiny"}, "mlsd_tiny_512_fp32.pth"),
    "depth_anything_v2": ("depth_anything_v2", {}, "model.safetensors"),
    "upernet": ("seg_ufade20k", {}, "model.safetensors"),
    "u2net": ("remove_background", {"model": "u2net"}, "u2net.onnx"),
    "selfie_segmentation": ("remove_background", {"model": "selfie_segmentation"}, "selfie_segmentation.tflite"),
    "mediapipe_face": ("mediapipe_face", {}, "face_detection_short_range.tflite"),
    "dwpose": ("dwpose", {}, "yolox_l.onnx"),
}


@pytest.fixture(scope="module")
def sound(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("sound")
    for name in NETWORKS:
        write(root, name)
    return root


async def run(root: Path, network: str) -> AnnotationResult:
    annotator_id, chosen, _ = NETWORKS[network]
    annotator = installed().get(annotator_id)
    values = {each.name: each.default for each in annotator.all_parameters} | {"detect_resolution": 128} | chosen
    engine = AnnotationEngine(threads=1, limits=ImageLimits(), weights=FolderWeights(root, Nowhere()))
    try:
        return await engine.run(Annotation(annotator=annotator, parameters=values, image=PHOTO.read_bytes()))
    finally:
        engine.close()


async def failure(root: Path, network: str) -> FanlightError:
    with pytest.raises(FanlightError) as raised:
        await run(root, network)
    return raised.value


@pytest.mark.timeout(300)
@pytest.mark.parametrize("network", NETWORKS)
async def test_the_undamaged_files_draw_a_map(network, sound):
    assert (await run(sound, network)).data


def check(error: FanlightError, network: str) -> None:
    annotator_id, _, file = NETWORKS[network]
    assert isinstance(error, UnusableWeights), error
    assert (error.part, error.field) == (f"annotator:{annotator_id}", "annotator")
    assert file in error.message or "network answers" in error.message
    assert "delete" in error.message
    assert "image" not in error.message


DAMAGE = {
    "cut in half": lambda data: data[: len(data) // 2],
    "cut at the end": lambda data: data[:-200],
    "empty": lambda data: b"",
    "a page that says the file moved": lambda data: b"<!DOCTYPE html><html><body>Moved</body></html>" * 20,
    "zeros": lambda data: bytes(len(data)),
}


@pytest.mark.timeout(300)
@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("damage", DAMAGE)
async def test_a_damaged_file_is_named(network, damage, sound, tmp_path):
    file = copied(sound, network, tmp_path)
    file.write_bytes(DAMAGE[damage](file.read_bytes()))
    check(await failure(tmp_path, network), network)


OTHERS = {
    "pidinet": "mlsd_tiny",
    "mlsd_tiny": "pidinet",
    "hed": "teed",
    "teed": "hed",
    "depth_anything_v2": "upernet",
    "upernet": "depth_anything_v2",
    "u2net": "dwpose",
    "dwpose": "u2net",
    "selfie_segmentation": "mediapipe_face",
    "mediapipe_face": "selfie_segmentation",
}


@pytest.mark.timeout(300)
@pytest.mark.parametrize("network", OTHERS)
async def test_the_file_of_another_network_is_named(network, sound, tmp_path):
    other = OTHERS[network]
    shutil.copy(sound / MODELS[other].manifest.view / NETWORKS[other][2], copied(sound, network, tmp_path))
    check(await failure(tmp_path, network), network)


@pytest.mark.timeout(300)
@pytest.mark.parametrize("network", ["pidinet", "hed", "teed", "mlsd_tiny", "depth_anything_v2", "upernet"])
async def test_weights_that_are_no_numbers_draw_nothing(network, sound, tmp_path):
    import torch
    from safetensors.torch import load_file, save_file

    file = copied(sound, network, tmp_path)
    is_safe = file.suffix == ".safetensors"
    state = load_file(file) if is_safe else torch.load(file, weights_only=True)
    tensors = state.get("state_dict", state)
    name = next(name for name, tensor in tensors.items() if tensor.is_floating_point() and tensor.dim() == 4)
    tensors[name] = tensors[name].clone()
    tensors[name].view(-1)[0] = torch.nan
    save_file(state, file, {"format": "pt"}) if is_safe else torch.save(state, file)
    check(await failure(tmp_path, network), network)


@pytest.mark.timeout(300)
async def test_an_onnx_network_that_answers_no_numbers_draws_nothing(sound, tmp_path):
    from services.preprocessor.neural.runtime import OnnxGraph

    graph = OnnxGraph()
    nothing = graph.constant("nothing", np.float32(np.nan))
    graph.output(graph.add("Mul", graph.add("ReduceMean", "input", axes=[1], keepdims=1), nothing))
    data = graph.model(inputs={"input": (1, 3, "height", "width")})
    copied(sound, "u2net", tmp_path).write_bytes(data)
    check(await failure(tmp_path, "u2net"), "u2net")


@pytest.mark.timeout(300)
async def test_a_config_of_another_network_is_named_too(sound, tmp_path):
    file = copied(sound, "depth_anything_v2", tmp_path).with_name("config.json")
    file.write_text(json.dumps({"model_type": "bert"}))
    error = await failure(tmp_path, "depth_anything_v2")
    assert isinstance(error, UnusableWeights), error
    assert "config.json" in error.message


def copied(sound: Path, network: str, root: Path) -> Path:
    """The network's folder under `root`, and in it the file to damage."""
    view = MODELS[network].manifest.view
    (root / view).mkdir(parents=True, exist_ok=True)
    for name in MODELS[network].files:
        shutil.copy(sound / view / name, root / view)
    return root / view / NETWORKS[network][2]
