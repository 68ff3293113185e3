"""Which device torch uses."""

import torch

from services.kernel.errors import NodeFault


def open_device(wanted: str) -> tuple[torch.device, str]:
    """The device and its name, such as `cpu` or `cuda:NVIDIA GeForce RTX 3060`. NodeFault where there is none such."""
    has_cuda = torch.cuda.is_available()
    if wanted == "cpu" or (wanted == "auto" and not has_cuda):
        return torch.device("cpu"), "cpu"
    device = torch.device("cuda" if wanted == "auto" else wanted)
    if not has_cuda or (device.index or 0) >= torch.cuda.device_count():
        raise NodeFault(f"torch finds no device {wanted}")
    return device, f"cuda:{torch.cuda.get_device_name(device)}"
