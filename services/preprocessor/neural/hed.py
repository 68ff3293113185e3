"""Soft edges by holistically-nested edge detection (Xie and Tu 2015), with the network of controlnet_aux.

On a CPU through ONNX Runtime, which takes a little over half of torch's time for it.
"""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from fanlight.contract.parameters import Parameter
from services.preprocessor.annotator import Annotator, Pixels
from services.preprocessor.device import CUDA, Device
from services.preprocessor.neural import defects
from services.preprocessor.neural.onnx_session import Graph, open_session
from services.preprocessor.neural.running import place, read_weights, running, to_array, to_bytes, to_tensor
from services.preprocessor.neural.strokes import scribbled, stepped
from services.preprocessor.weights import Model

FILE = "ControlNetHED.pth"
# How many convolutions each block has; all but the first begin with a pooling.
BLOCKS = (2, 2, 3, 3, 3)
SAFE_STEPS = 2


class TorchHed:
    def __init__(self, network: Any, device: Device) -> None:
        self._network = network
        self._device = device

    def __call__(self, pictures: Sequence[Pixels]) -> list[Any]:
        with running(self._device):
            return [to_array(each)[:, 0] for each in self._network(to_tensor(pictures, self._device))]


class OnnxHed:
    def __init__(self, session: Any) -> None:
        self._session = session

    def __call__(self, pictures: Sequence[Pixels]) -> list[Any]:
        batch = np.stack(pictures).transpose(0, 3, 1, 2).astype(np.float32)
        return [each[:, 0] for each in self._session.run(None, {"picture": batch})]


def build(folder: Path, device: Device) -> Any:
    state = read_weights(folder / FILE)
    if device.kind == CUDA:
        network = defects.submodule("hed").ControlNetHED_Apache2()
        network.load_state_dict(state)
        return TorchHed(place(network.float(), device), device)
    return OnnxHed(open_session(as_onnx({name: tensor.float().numpy() for name, tensor in state.items()}), device))


def as_onnx(state: dict[str, Any]) -> bytes:
    """The network as an ONNX model: pictures (B, 3, H, W) in 0 to 255 in, five maps of falling size out."""
    graph = Graph()
    h = graph.add("Sub", "picture", graph.constant("norm", state["norm"]))
    for number, convolutions in enumerate(BLOCKS, start=1):
        if number > 1:
            h = graph.add("MaxPool", h, kernel_shape=[2, 2], strides=[2, 2])
        for index in range(convolutions):
            h = graph.add("Relu", graph.convolution(h, state, f"block{number}.convs.{index}", padding=1))
        graph.output(graph.convolution(h, state, f"block{number}.projection", padding=0))
    return graph.model(inputs={"picture": ("batch", 3, "height", "width")})


def edges(pictures: Sequence[Pixels], network: Any) -> list[Any]:
    """Edges (H, W) in 0 to 1."""
    height, width = pictures[0].shape[:2]
    sides = network(pictures)
    return [merged([side[number] for side in sides], width, height) for number in range(len(pictures))]


def merged(sides: Sequence[Any], width: int, height: int) -> Any:
    """Edges (H, W) in 0 to 1: the sigmoid of the mean of a network's maps of different sizes."""
    whole = [cv2.resize(side, (width, height), interpolation=cv2.INTER_LINEAR) for side in sides]
    return 1 / (1 + np.exp(-np.mean(np.stack(whole, axis=2), axis=2).astype(np.float64)))


def soft_edges(pictures: Sequence[Pixels], network: Any, *, scribble: bool, safe: bool) -> list[Pixels]:
    maps = [to_bytes(stepped(edge, SAFE_STEPS) if safe else edge) for edge in edges(pictures, network)]
    return [scribbled(each) for each in maps] if scribble else maps


HED = Model(name="hed", entry="annotator-hed", build=build)

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
