"""How networks run: torch's on the device, ONNX's on the CPU. Knows no annotator, and imports both libraries on use."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fanlight.errors import NodeFault
from services.preprocessor.annotator import Pixels
from services.preprocessor.config import CUDA, AnnotatorDevice

if TYPE_CHECKING:
    import torch

# The packages that annotators with networks of controlnet_aux require.
TORCH_PACKAGES = ("torch", "controlnet_aux")

# What ONNX Runtime 1.18 and later read.
ONNX_IR_VERSION, ONNX_OPSET = 9, 17
# Its warnings are about nothing that an operator of the service could change.
ONNX_ERRORS_ONLY = 3

# The fraction of a network's tensors that may be missing: publishers leave out heads that are only trained with.
MISSING_MAX = 0.05

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def place(network: Any, device: AnnotatorDevice) -> Any:
    """The network on the device, ready to run. NodeFault if torch cannot use the GPU that was found."""
    import torch

    torch.set_num_threads(device.threads)
    if device.kind == CUDA and not torch.cuda.is_available():
        raise NodeFault("torch cannot use the GPU; set FANLIGHT_PREPROCESSOR_DEVICE=cpu, or update the driver")
    check_finite(network.named_parameters())
    # In separate calls: MiDaS overrides what `eval` returns, and ZoeDepth what `to` accepts.
    network.eval()
    network.requires_grad_(False)
    network.to(device.kind)
    plain: Any = torch.nn.Module.to
    plain(network, memory_format=torch.channels_last)
    return widen_outputs(network, device)


def check_finite(tensors: Iterable[tuple[str, "torch.Tensor"]]) -> None:
    """ValueError for a tensor (...,) of any shape with a value that is no number: such a network draws nothing."""
    for name, tensor in tensors:
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise ValueError(f"{name} has values that are not numbers")


def pretrained(kind: Any, folder: Path) -> Any:
    """A network of transformers. ValueError for the file of another one: transformers would draw tensors at random."""
    network, info = kind.from_pretrained(folder, local_files_only=True, output_loading_info=True)
    named = {name for name, _ in network.named_parameters()}
    lacking = sorted(named.intersection(info["missing_keys"]))
    if info["mismatched_keys"] or len(lacking) > MISSING_MAX * len(named):
        raise ValueError(f"{len(lacking)} of {len(named)} tensors are missing, or others have another shape")
    return network


def widen_outputs(network: Any, device: AnnotatorDevice) -> Any:
    """The network; its outputs in float16 become float32, because OpenCV has no half precision."""
    if device.is_half:
        network.register_forward_hook(lambda _network, _inputs, output: _widen(output))
    return network


def _widen(output: Any) -> Any:
    """Tensors of any shape (...,), also inside tuples, lists and dictionaries."""
    import torch

    if isinstance(output, torch.Tensor):
        return output.float() if output.dtype == torch.float16 else output
    if type(output) in (list, tuple):
        return type(output)(_widen(each) for each in output)
    if type(output) is dict:
        return {name: _widen(each) for name, each in output.items()}
    return output


@contextmanager
def inference(device: AnnotatorDevice) -> Iterator[None]:
    """Without gradients; on a GPU in half precision where that is safe (torch's autocast)."""
    import torch

    with torch.inference_mode(), torch.autocast(device.kind, torch.float16, enabled=device.is_half):
        yield


@dataclass(frozen=True, slots=True, kw_only=True)
class Network:
    """One network, or several of one kind, on a device."""

    device: AnnotatorDevice
    parts: tuple[Any, ...]

    def __call__(self, values: Any, part: int = 0) -> Any:
        """The output of one part for values (B, 3, H, W) float32, in the range and shape of the network."""
        with inference(self.device):
            return self.parts[part](values)


def network_on(device: AnnotatorDevice, *parts: Any) -> Network:
    return Network(device=device, parts=tuple(place(part, device) for part in parts))


def to_tensor(images: Sequence[Pixels], device: AnnotatorDevice) -> "torch.Tensor":
    """(B, 3, H, W) float32, 0 to 255, of images (H, W, 3) uint8 of one shape."""
    import torch

    pixels = torch.from_numpy(np.stack(images)).to(device.kind)
    return pixels.permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.channels_last)


def to_array(tensor: "torch.Tensor") -> Any:
    """A float32 array on the CPU with the tensor's shape (B, ...) and values."""
    return tensor.float().cpu().numpy()


def to_bytes(values: Any) -> Pixels:
    """(H, W) or (H, W, 3) uint8, 0 to 255, of numbers in 0 to 1; others are clipped, NaN becomes 0."""
    pixels: Pixels = np.clip(np.nan_to_num(values) * 255.0, 0, 255).astype(np.uint8)
    return pixels


def imagenet_normalize(values: Any) -> Any:
    """(B, 3, H, W) float32 with ImageNet's mean 0 and deviation 1, of RGB values in 0 to 255."""
    import torch

    mean, std = (torch.tensor(each, device=values.device).view(1, 3, 1, 1) for each in (IMAGENET_MEAN, IMAGENET_STD))
    return (values / 255.0 - mean) / std


def read_weights(path: Path) -> Any:
    """The content of a pickle or safetensors file of weights; code in it is never run."""
    import torch

    if path.suffix == ".safetensors":
        from services.weights.loading import load_safetensors

        return load_safetensors(path)
    return torch.load(path, map_location="cpu", weights_only=True)


def without_prefix(state: dict[str, Any], prefix: str = "module.") -> dict[str, Any]:
    """The state with the network's own names, for weights that were saved from several GPUs."""
    return {name.removeprefix(prefix): tensor for name, tensor in state.items()}


def open_session(model: bytes | Path, device: AnnotatorDevice) -> Any:
    """An ONNX Runtime session on the CPU, with the device's number of threads."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = device.threads
    options.log_severity_level = ONNX_ERRORS_ONLY
    source = model if isinstance(model, bytes) else str(model)
    return onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])


class OnnxGraph:
    """An ONNX model under construction. Operators run in the order in which they are added."""

    def __init__(self) -> None:
        self._nodes: list[Any] = []
        self._constants: list[Any] = []
        self._outputs: list[str] = []

    def constant(self, name: str, values: Any) -> str:
        """`values`: an array (...,) of any shape, float32."""
        from onnx import numpy_helper

        self._constants.append(numpy_helper.from_array(values, name))
        return name

    def add(self, operator: str, *inputs: str, **attributes: Any) -> str:
        """The generated name of the operator's output."""
        from onnx import helper

        name = f"value{len(self._nodes)}"
        self._nodes.append(helper.make_node(operator, list(inputs), [name], **attributes))
        return name

    def convolution(self, value: str, state: Mapping[str, Any], name: str, *, padding: int) -> str:
        """A convolution whose weight and bias are in torch's state under this name."""
        parameters = [self.constant(f"{name}.{part}", state[f"{name}.{part}"]) for part in ("weight", "bias")]
        return self.add("Conv", value, *parameters, pads=[padding] * 4)

    def output(self, value: str) -> None:
        self._outputs.append(value)

    def model(self, *, inputs: Mapping[str, Sequence[int | str]]) -> bytes:
        """The serialized model, which ONNX Runtime reads; every value is float32. `inputs`: shapes by name."""
        from onnx import TensorProto, helper

        graph = helper.make_graph(
            self._nodes,
            "fanlight",
            [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in inputs.items()],
            [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in self._outputs],
            self._constants,
        )
        model = helper.make_model(
            graph, ir_version=ONNX_IR_VERSION, opset_imports=[helper.make_opsetid("", ONNX_OPSET)]
        )
        data: bytes = model.SerializeToString()
        return data
