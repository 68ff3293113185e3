"""Images made with numpy alone: the same on every machine, with edges, gradients, noise and flat areas."""

import io

import numpy as np
from PIL import Image


def scene(width_px: int = 192, height_px: int = 128, seed: int = 0) -> np.ndarray:
    """uint8 RGB (H, W, 3): a gradient, discs and bars of random colors, faint noise."""
    random = np.random.RandomState(seed)
    y, x = np.mgrid[0:height_px, 0:width_px]
    image = np.stack([x * 255 / width_px, y * 255 / height_px, (x + y) % 256], axis=2)
    for _ in range(12):
        center_x, center_y, radius = random.rand(3) * (width_px, height_px, min(width_px, height_px) / 4)
        inside = (x - center_x) ** 2 + (y - center_y) ** 2 < radius**2
        image[inside] = random.rand(3) * 255
    image[:, width_px // 3 : width_px // 3 + 2] = 0
    image[height_px // 2 : height_px // 2 + 3, width_px // 2 :] = 255
    return (image + random.randn(height_px, width_px, 3) * 4).clip(0, 255).astype(np.uint8)


def encoded(pixels: np.ndarray, kind: str = "PNG", **options: object) -> bytes:
    return saved(Image.fromarray(pixels), kind, **options)


def saved(image: Image.Image, kind: str, **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def decoded(data: bytes) -> np.ndarray:
    """uint8 RGB (H, W, 3), as ControlNets read it."""
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
