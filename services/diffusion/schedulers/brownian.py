"""Noise along a Brownian path, so that two steps over one stretch of it agree. As torchsde's tree in k-diffusion."""

import bisect
import math

import torch
from torch import Tensor


class BrownianNoise:
    """`noise(sigma, next_sigma)` is the path's increment between the two, scaled to a deviation of 1.

    The path is drawn where it is asked for, from its own CPU generator: same seed and questions, same noise.
    """

    def __init__(self, *, seed: int, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
        """`shape`: of the latents."""
        # Another stream than the one that the first latents come from.
        self._generator = torch.Generator("cpu").manual_seed((seed + 1) % 2**63)
        self._shape, self._dtype, self._device = shape, dtype, device
        # Known places of the path in order, and its values there.
        self._times: list[float] = []
        self._values: list[Tensor] = []

    def __call__(self, sigma: Tensor | float, next_sigma: Tensor | float) -> Tensor:
        start, end = float(sigma), float(next_sigma)
        noise = (self._at(end) - self._at(start)) / math.sqrt(abs(end - start))
        return noise.to(self._device, self._dtype)

    def _at(self, time: float) -> Tensor:
        place = bisect.bisect_left(self._times, time)
        if place == len(self._times) or self._times[place] != time:
            self._values.insert(place, self._new(time, place))
            self._times.insert(place, time)
        return self._values[place]

    def _new(self, time: float, place: int) -> Tensor:
        """Free beyond the known places; between two of them a bridge."""
        if not self._times:
            return torch.zeros(self._shape)
        if place == 0:
            return self._values[0] + self._normal() * math.sqrt(self._times[0] - time)
        if place == len(self._times):
            return self._values[-1] + self._normal() * math.sqrt(time - self._times[-1])
        low, high = self._times[place - 1], self._times[place]
        part = (time - low) / (high - low)
        middle = torch.lerp(self._values[place - 1], self._values[place], part)
        return middle + self._normal() * math.sqrt(part * (1 - part) * (high - low))

    def _normal(self) -> Tensor:
        return torch.randn(self._shape, generator=self._generator)
