"""Soft edges by holistically-nested edge detection (HED, Xie and Tu 2015), with the network of controlnet_aux.

On a CPU it runs in ONNX Runtime, which takes little more than half of torch's time for it. The steps after the network
are shared with the other edge networks in lines.py.
"""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from fanlight.contract.parameters import Parameter
from services.preprocessor.annotator import Annotator, Pixels
from services.preprocessor.config import CUDA, AnnotatorDevice
from services.preprocessor.neural import defects
from services.preprocessor.neural.runtime import (
    OnnxGraph,
    check_finite,
    inference,
    open_session,
    place,
    read_weights,
    to_array,
    to_bytes,
    to_tensor,
)
from services.preprocessor.weights import AnnotatorWeights

FILE = "ControlNetHED.pth"
# How many convolutions each block has; all blocks but the first begin with a pooling.
BLOCKS = (2, 2, 3, 3, 3)
SAFE_STEPS = 2
# The least value of a ridge in a blurred edge map, and of a stroke in the blurred ridges.
RIDGE_MIN, STROKE_MIN, STROKE_SIGMA = 127, 4, 3.0
_RIDGES = (
    ((0, 0, 0), (1, 1, 1), (0, 0, 0)),
    ((0, 1, 0), (0, 1, 0), (0, 1, 0)),
    ((1, 0, 0), (0, 1, 0), (0, 0, 1)),
    ((0, 0, 1), (0, 1, 0), (1, 0, 0)),
)


class TorchHed:
    """The network in torch, for a GPU."""

    def __init__(self, network: Any, device: AnnotatorDevice) -> None:
        self._network = network
        self._device = device

    def __call__(self, images: Sequence[Pixels]) -> list[Any]:
        """Five maps (B, h, w) float32 of decreasing size, as logits, of images (H, W, 3) uint8."""
        with inference(self._device):
            return [to_array(each)[:, 0] for each in self._network(to_tensor(images, self._device))]


class OnnxHed:
    """The network in ONNX Runtime, for a CPU."""

    def __init__(self, session: Any) -> None:
        self._session = session

    def __call__(self, images: Sequence[Pixels]) -> list[Any]:
        """Five maps (B, h, w) float32 of decreasing size, as logits, of images (H, W, 3) uint8."""
        batch = np.stack(images).transpose(0, 3, 1, 2).astype(np.float32)
        return [each[:, 0] for each in self._session.run(None, {"image": batch})]


def build(folder: Path, device: AnnotatorDevice) -> Any:
    state = read_weights(folder / FILE)
    check_finite(state.items())
    if device.kind == CUDA:
        network = defects.submodule("hed").ControlNetHED_Apache2()
        network.load_state_dict(state)
        return TorchHed(place(network.float(), device), device)
    return OnnxHed(open_session(as_onnx({name: tensor.float().numpy() for name, tensor in state.items()}), device))


def as_onnx(state: dict[str, Any]) -> bytes:
    """The network as an ONNX model: input images (B, 3, H, W) in 0 to 255, output five maps (B, 1, h, w) as logits.

    `state` has float32 arrays.
    """
    graph = OnnxGraph()
    h = graph.add("Sub", "image", graph.constant("norm", state["norm"]))
    for number, convolutions in enumerate(BLOCKS, start=1):
        if number > 1:
            h = graph.add("MaxPool", h, kernel_shape=[2, 2], strides=[2, 2])
        for index in range(convolutions):
            h = graph.add("Relu", graph.convolution(h, state, f"block{number}.convs.{index}", padding=1))
        graph.output(graph.convolution(h, state, f"block{number}.projection", padding=0))
    return graph.model(inputs={"image": ("batch", 3, "height", "width")})


def edges(images: Sequence[Pixels], network: Any) -> list[Any]:
    """(H, W) float64 in 0 to 1 for each image (H, W, 3) uint8."""
    height, width = images[0].shape[:2]
    sides = network(images)
    return [fuse([side[number] for side in sides], width, height) for number in range(len(images))]


def fuse(sides: Sequence[Any], width: int, height: int) -> Any:
    """(H, W) float64 in 0 to 1: the sigmoid of the mean of an image's maps (h, w), float32 logits of several sizes."""
    whole = [cv2.resize(side, (width, height), interpolation=cv2.INTER_LINEAR) for side in sides]
    return 1 / (1 + np.exp(-np.mean(np.stack(whole, axis=2), axis=2).astype(np.float64)))


def quantize(values: Any, steps: int) -> Any:
    """(H, W) float32 on few levels, of numbers in 0 to 1, so that faint traces of the image do not leak into a map.

    As controlnet_aux's util.safe_step.
    """
    return (values.astype(np.float32) * float(steps + 1)).astype(np.int32).astype(np.float32) / float(steps)


def to_scribble(edges: Pixels) -> Pixels:
    """Strokes (H, W) uint8, 0 or 255, along the ridges of an edge map (H, W) uint8.

    As controlnet_aux's util.nms with the blur and threshold of its scribble mode.
    """
    smooth = cv2.GaussianBlur(edges.astype(np.float32), (0, 0), STROKE_SIGMA)
    ridges = np.zeros_like(smooth)
    for kernel in _RIDGES:
        np.putmask(ridges, cv2.dilate(smooth, np.array(kernel, np.uint8)) == smooth, smooth)
    strokes = np.where(ridges > RIDGE_MIN, np.uint8(255), np.uint8(0))
    spread = cv2.GaussianBlur(strokes, (0, 0), STROKE_SIGMA)
    return np.where(spread > STROKE_MIN, np.uint8(255), np.uint8(0))


def soft_edges(images: Sequence[Pixels], network: Any, *, scribble: bool, safe: bool) -> list[Pixels]:
    """A map (H, W) uint8 of each image (H, W, 3) uint8; with `scribble` it is bilevel."""
    maps = [to_bytes(quantize(edge, SAFE_STEPS) if safe else edge) for edge in edges(images, network)]
    return [to_scribble(each) for each in maps] if scribble else maps


HED = AnnotatorWeights(name="hed", entry="annotator-hed", build=build)

SAFE = Parameter(
    name="safe", default=False, description="Few levels instead of many, so that no texture leaks into the edges"
)


def _annotator(annotator_id: str, description: str, *, scribble: bool, safe: bool) -> Annotator:
    return Annotator(
        id=annotator_id,
        description=description,
        apply=partial(soft_edges, scribble=scribble, safe=True) if safe else partial(soft_edges, scribble=scribble),
        parameters=() if safe else (SAFE,),
        controlnets=("scribble" if scribble else "softedge",),
        models=(HED,),
        needs=("torch", "controlnet_aux", "onnxruntime", "onnx"),
        detect_resolution=512,
        is_bilevel=scribble,
    )


ANNOTATORS = (
    _annotator("softedge_hed", "Soft edges", scribble=False, safe=False),
    _annotator("softedge_hedsafe", "Soft edges on few levels", scribble=False, safe=True),
    _annotator("scribble_hed", "Scribbles along the edges", scribble=True, safe=False),
    _annotator("scribble_hedsafe", "Scribbles along edges of few levels", scribble=True, safe=True),
)
