"""How networks of torch are placed on a device and run there. Imports torch on use only."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fanlight.errors import NodeFault
from services.preprocessor.annotator import Pixels
from services.preprocessor.device import CUDA, Device

if TYPE_CHECKING:
    import torch

# What annotators with networks of controlnet_aux cannot do without.
TORCH = ("torch", "controlnet_aux")


def place(network: Any, device: Device) -> Any:
    """The network on the device, ready to run. NodeFault where torch cannot use the GPU that was found."""
    import torch

    torch.set_num_threads(device.threads)
    if device.kind == CUDA and not torch.cuda.is_available():
        raise NodeFault("torch cannot use the GPU; set FANLIGHT_PREPROCESSOR_DEVICE=cpu, or update the driver")
    # One by one: MiDaS overrides what `eval` gives back, and ZoeDepth what `to` takes.
    network.eval()
    network.requires_grad_(False)
    network.to(device.kind)
    plain: Any = torch.nn.Module.to
    plain(network, memory_format=torch.channels_last)
    return answering_in_float32(network, device)


def answering_in_float32(network: Any, device: Device) -> Any:
    """The network; what it answers in half precision is widened, for OpenCV has no halves."""
    if device.is_half:
        network.register_forward_hook(lambda _network, _inputs, answer: _widened(answer))
    return network


def _widened(answer: Any) -> Any:
    import torch

    if isinstance(answer, torch.Tensor):
        return answer.float() if answer.dtype == torch.float16 else answer
    if type(answer) in (list, tuple):
        return type(answer)(_widened(each) for each in answer)
    if type(answer) is dict:
        return {name: _widened(each) for name, each in answer.items()}
    return answer


@contextmanager
def running(device: Device) -> Iterator[None]:
    """Without gradients, and on a GPU in half precision where that is safe."""
    import torch

    with torch.inference_mode(), torch.autocast(device.kind, torch.float16, enabled=device.is_half):
        yield


@dataclass(frozen=True, slots=True, kw_only=True)
class Network:
    """One network, or several of one kind, and where they run."""

    device: Device
    parts: tuple[Any, ...]

    def __call__(self, values: Any, part: int = 0) -> Any:
        with running(self.device):
            return self.parts[part](values)


def placed(device: Device, *parts: Any) -> Network:
    return Network(device=device, parts=tuple(place(part, device) for part in parts))


def to_tensor(pictures: Sequence[Pixels], device: Device) -> "torch.Tensor":
    """(B, 3, H, W) float32, 0 to 255, of pictures of one shape."""
    import torch

    pixels = torch.from_numpy(np.stack(pictures)).to(device.kind)
    return pixels.permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.channels_last)


def to_array(tensor: "torch.Tensor") -> Any:
    return tensor.float().cpu().numpy()


def read_weights(path: Path) -> Any:
    """What a pickle or safetensors file of weights holds; code in it is never run."""
    import torch

    if path.suffix == ".safetensors":
        from services.weights.loading import load_safetensors

        return load_safetensors(path)
    return torch.load(path, map_location="cpu", weights_only=True)


def without_prefix(state: dict[str, Any], prefix: str = "module.") -> dict[str, Any]:
    """Names as the network has them, where the weights were saved from several GPUs."""
    return {name.removeprefix(prefix): tensor for name, tensor in state.items()}


def to_bytes(values: Any) -> Pixels:
    """0 to 255 from numbers in 0 to 1; what lies outside, and what is no number, is clipped."""
    pixels: Pixels = np.clip(np.nan_to_num(values) * 255.0, 0, 255).astype(np.uint8)
    return pixels
