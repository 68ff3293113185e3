"""What evaluation measures on images. Pure: knows arrays in [0, 1], sprites and vocabulary, no models."""

from functools import cache

import cv2
import numpy as np
from PIL import Image

from training.controlnet import canny
from training.latents import subject_rows
from training.lora import DARK, LIGHT, LUMA
from training.scenes import COLORS, Scene, compose
from training.vocabulary import STYLES

CROP_PX = 32
FOREGROUND = 0.12
MIN_FOREGROUND_PX = 30


def to_bytes(image: np.ndarray) -> np.ndarray:
    """[0, 1] floats to uint8."""
    return (image.clip(0, 1) * 255).round().astype(np.uint8)


def background(image: np.ndarray) -> np.ndarray:
    """Median color of the border, (3,)."""
    return np.median(np.concatenate([image[0], image[-1], image[:, 0], image[:, -1]]), axis=0)


def nearest_color(color: np.ndarray) -> str:
    """The named background color nearest in RGB."""
    return min(COLORS, key=lambda name: float(np.square(np.array(COLORS[name]) / 255 - color).sum()))


def object_crop(image: np.ndarray) -> np.ndarray | None:
    """The object cut out by its bounding box, padded to a square of 32 pixels; None when nothing stands out.

    Cutting makes the comparison blind to where the object is and how large.
    """
    ground = background(image)
    rows, columns = np.where(np.abs(image - ground).max(-1) > FOREGROUND)
    if len(rows) < MIN_FOREGROUND_PX:
        return None
    top, bottom = np.percentile(rows, (1, 99)).round().astype(int)
    left, right = np.percentile(columns, (1, 99)).round().astype(int)
    cut = Image.fromarray(to_bytes(image[top : bottom + 1, left : right + 1]))
    side = max(cut.size)
    square = Image.new("RGB", (side, side), tuple(int(value) for value in to_bytes(ground)))
    square.paste(cut, ((side - cut.width) // 2, (side - cut.height) // 2))
    return np.asarray(square.resize((CROP_PX, CROP_PX), Image.BILINEAR), np.float32) / 255


@cache
def _templates(ground: tuple[int, int, int]) -> np.ndarray:
    """Crops of every subject, style and mirroring on one background: (subjects, styles, 2, 32, 32, 3)."""
    blank = np.full((CROP_PX, CROP_PX, 3), 0.5, np.float32)

    def crop(row: int, style: str, flip: bool) -> np.ndarray:
        scene = Scene(row=row, style=style, color="", background=ground, scale=0.85, flip=flip)
        found = object_crop(compose(scene) / 255)
        return blank if found is None else found

    mirrorings = (False, True)
    return np.stack([[[crop(row, s, flip) for flip in mirrorings] for s in STYLES] for row in subject_rows()])


def distances(image: np.ndarray) -> np.ndarray | None:
    """Mean squared distance to each subject in each style, (subjects, styles); None for an empty image."""
    crop = object_crop(image)
    if crop is None:
        return None
    ground = tuple(int(value) // 8 * 8 for value in to_bytes(background(image)))
    return np.square(_templates(ground) - crop).mean((-3, -2, -1)).min(-1)


def nearest_subjects(image: np.ndarray, count: int = 5) -> list[int]:
    """Indices of the nearest subjects, best first; empty for an empty image."""
    found = distances(image)
    return [] if found is None else np.argsort(found.min(1))[:count].tolist()


def nearest_style(image: np.ndarray, subject: int) -> str:
    """Which of the subject's two renderings is nearer."""
    found = distances(image)
    return "" if found is None else STYLES[int(found[subject].argmin())]


def edge_f1(edges: np.ndarray, image: np.ndarray) -> float:
    """F1 of the image's canny edges against given ones (uint8), where one pixel aside still counts."""
    wanted, made = edges > 0, canny(to_bytes(image)) > 0
    reach = np.ones((3, 3), np.uint8)
    near_wanted, near_made = (cv2.dilate(mask.astype(np.uint8), reach) > 0 for mask in (wanted, made))
    precision = (made & near_wanted).sum() / max(1, made.sum())
    recall = (wanted & near_made).sum() / max(1, wanted.sum())
    return float(2 * precision * recall / max(1e-6, precision + recall))


def seed_deviation(images: np.ndarray) -> float:
    """Standard deviation over images (N, H, W, 3), averaged over pixels and channels."""
    return float(images.std(0).mean())


def cyanotype_distance(image: np.ndarray) -> float:
    """Mean distance to the line from deep blue to paper white that the LoRA teaches."""
    dark, light = DARK / 255, LIGHT / 255
    share = ((image @ LUMA) - dark @ LUMA) / ((light - dark) @ LUMA)
    share = share.clip(0, 1)[..., None]
    return float(np.abs(image - (dark * (1 - share) + light * share)).mean())


def saturation(image: np.ndarray) -> float:
    """Mean of each pixel's largest minus smallest channel."""
    return float((image.max(-1) - image.min(-1)).mean())
