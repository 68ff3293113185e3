"""diffusers' scheduler classes, imported one by one. Two of them want packages that are not worth their bytes."""

import sys
import types
from functools import cache
from typing import Any

import numpy as np

from fanlight.contract.schedulers import CLASSES
from services.diffusion.lean import lean_module

# Exact for polynomials of degree 7; a linear multistep of order 4 has degree 3.
_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(4)


@cache
def scheduler_class(name: str) -> Any:
    """`name`: one of CLASSES."""
    if name == "DPMSolverSDEScheduler":
        return _sde_class()
    cls = getattr(lean_module(f"schedulers.{CLASSES[name][0]}"), name)
    return _with_own_integral(cls) if name == "LMSDiscreteScheduler" else cls


def _sde_class() -> Any:
    """Its module imports torchsde, and scipy with it, for a noise that BrownianNoise makes here."""
    is_missing = "torchsde" not in sys.modules
    if is_missing:
        sys.modules["torchsde"] = types.ModuleType("torchsde")
    try:
        return lean_module("schedulers.scheduling_dpmsolver_sde").DPMSolverSDEScheduler
    finally:
        if is_missing:
            del sys.modules["torchsde"]


def _with_own_integral(base: Any) -> Any:
    """LMS integrates polynomials with scipy; four Gauss points do it exactly."""

    class LMSDiscreteScheduler(base):  # type: ignore[misc]  # a class that is only known when it is imported
        def get_lms_coefficient(self, order: int, t: int, current_order: int) -> float:
            low, high = float(self.sigmas[t]), float(self.sigmas[t + 1])
            at = (high - low) / 2 * _NODES + (high + low) / 2
            product = np.ones_like(at)
            for other in set(range(order)) - {current_order}:
                sigma, own = float(self.sigmas[t - other]), float(self.sigmas[t - current_order])
                product *= (at - sigma) / (own - sigma)
            return float((high - low) / 2 * (product * _WEIGHTS).sum())

    return LMSDiscreteScheduler
