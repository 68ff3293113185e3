"""A module's double: its own tree of modules over the same tensors, some of them replaced; the original stays."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

# A tensor's full name and itself to what stands in its place.
Replace = Callable[[str, Tensor], Tensor]

# The dicts that a module keeps its things in.
_OWN = ("_parameters", "_buffers", "_modules", "_forward_hooks", "_forward_pre_hooks")


def doubled(module: Any, replace: Replace, prefix: str = "") -> Any:
    double = object.__new__(type(module))
    double.__dict__.update(module.__dict__)
    for name in _OWN:
        double.__dict__[name] = module.__dict__[name].copy()
    for name, parameter in module._parameters.items():
        if parameter is not None:
            replaced = replace(prefix + name, parameter)
            is_same = replaced is parameter
            double._parameters[name] = parameter if is_same else nn.Parameter(replaced, requires_grad=False)
    for name, buffer in module._buffers.items():
        if buffer is not None:
            double._buffers[name] = replace(prefix + name, buffer)
    for name, child in module._modules.items():
        if child is not None:
            double._modules[name] = doubled(child, replace, f"{prefix}{name}.")
    return double


def size_bytes(module: Any) -> int:
    return sum(tensor.nbytes for tensor in _tensors(module))


def _tensors(module: Any) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]
