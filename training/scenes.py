"""Put one sprite on a plain background: every training image is a `Scene`. Knows no captions."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from random import Random

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from training.emoji import SPRITE_PX, SPRITES
from training.vocabulary import load_colors

PICTURE_PX = 64
COLORS = load_colors()


@dataclass(frozen=True, slots=True, kw_only=True)
class Framing:
    """How far images vary.

    scale: longer side of the object as a share of the image; reach: share of the free margin used; jitter:
    deviation of the background's channels from the named color, of 255; mirrored: share of mirrored objects;
    tilt_deg: largest turn either way; stretch: largest ratio by which the object is made wider or narrower.
    """

    scale: tuple[float, float]
    reach: float
    jitter: float = 6.0
    mirrored: float = 0.5
    tilt_deg: float = 0.0
    stretch: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Scene:
    """One image in words: `row` is the sprite's row, dx and dy in [-1, 1] of the free margin."""

    row: int
    style: str
    color: str
    background: tuple[int, int, int]
    scale: float
    dx: float = 0.0
    dy: float = 0.0
    flip: bool = False
    tilt_deg: float = 0.0
    stretch: float = 1.0


@cache
def sprites() -> dict[str, np.ndarray]:
    """The arrays of sprites.npz: `names`, and uint8 (N, 128, 128, 4) for each style."""
    with np.load(SPRITES) as file:
        return {key: file[key] for key in file.files}


@cache
def rows_by_emoji() -> dict[str, int]:
    """Row of each emoji in the sprite arrays."""
    return {str(name): row for row, name in enumerate(sprites()["names"])}


@cache
def sprite(style: str, row: int) -> Image.Image:
    """One sprite, cropped to what is visible."""
    image = Image.fromarray(sprites()[style][row])
    visible = image.getchannel("A").point(lambda value: 255 if value > 8 else 0)
    return image.crop(visible.getbbox() or (0, 0, SPRITE_PX, SPRITE_PX))


def random_scene(rng: Random, rows: Sequence[int], styles: tuple[str, ...], framing: Framing) -> Scene:
    """Draw every free choice of a scene."""
    color = rng.choice(list(COLORS))
    shifted = (value + rng.gauss(0, framing.jitter) for value in COLORS[color])
    background = tuple(int(min(255, max(0, value))) for value in shifted)
    return Scene(
        row=rng.choice(rows),
        style=rng.choice(styles),
        color=color,
        background=background,
        scale=rng.uniform(*framing.scale),
        dx=rng.uniform(-framing.reach, framing.reach),
        dy=rng.uniform(-framing.reach, framing.reach),
        flip=rng.random() < framing.mirrored,
        tilt_deg=rng.uniform(-framing.tilt_deg, framing.tilt_deg) if framing.tilt_deg else 0.0,
        stretch=framing.stretch ** rng.uniform(-1, 1) if framing.stretch != 1 else 1.0,
    )


def shaped_sprite(scene: Scene, size_px: int) -> Image.Image:
    """The scene's sprite, turned, stretched, mirrored and scaled."""
    image = sprite(scene.style, scene.row)
    if scene.tilt_deg:
        image = image.rotate(scene.tilt_deg, Image.BILINEAR, expand=True)
    wide, high = image.width * scene.stretch, image.height
    ratio = scene.scale * size_px / max(wide, high)
    image = image.resize((max(1, round(wide * ratio)), max(1, round(high * ratio))), Image.BILINEAR)
    return image.transpose(Image.FLIP_LEFT_RIGHT) if scene.flip else image


def compose(scene: Scene, size_px: int = PICTURE_PX) -> np.ndarray:
    """Draw a scene: uint8 (size, size, 3)."""
    image = shaped_sprite(scene, size_px)
    width, height = image.size
    canvas = Image.new("RGB", (size_px, size_px), scene.background)
    left, top = round((size_px - width) / 2 * (1 + scene.dx)), round((size_px - height) / 2 * (1 + scene.dy))
    canvas.paste(image, (left, top), image)
    return np.asarray(canvas)


def to_pixels(images: list[np.ndarray]) -> Tensor:
    """uint8 images (H, W, 3) to pixels (B, 3, H, W) in [-1, 1], channels last."""
    pixels = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float().div(127.5).sub(1)
    return pixels.contiguous(memory_format=torch.channels_last)
