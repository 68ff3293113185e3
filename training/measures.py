"""What evaluation measures on pictures. Pure: knows arrays in [0, 1], sprites and vocabulary, no models."""

from functools import cache

import cv2
import numpy as np
from PIL import Image

from training.controlnet import canny
from training.latents import subject_rows
from training.lora import DARK, LIGHT, LUMA
from training.pictures import COLOURS, Scene, compose
from training.vocabulary import STYLES

CROP_PX = 32
FOREGROUND = 0.12
MIN_FOREGROUND_PX = 30


def to_bytes(picture: np.ndarray) -> np.ndarray:
    """[0, 1] floats to uint8."""
    return (picture.clip(0, 1) * 255).round().astype(np.uint8)


def background(picture: np.ndarray) -> np.ndarray:
    """Median colour of the border, (3,)."""
    return np.median(np.concatenate([picture[0], picture[-1], picture[:, 0], picture[:, -1]]), axis=0)


def nearest_colour(colour: np.ndarray) -> str:
    """The named background colour nearest in RGB."""
    return min(COLOURS, key=lambda name: float(np.square(np.array(COLOURS[name]) / 255 - colour).sum()))


def object_crop(picture: np.ndarray) -> np.ndarray | None:
    """The object cut out by its bounding box, padded to a square of 32 pixels; None when nothing stands out.

    Cutting makes the comparison blind to where the object is and how large.
    """
    ground = background(picture)
    rows, columns = np.where(np.abs(picture - ground).max(-1) > FOREGROUND)
    if len(rows) < MIN_FOREGROUND_PX:
        return None
    top, bottom = np.percentile(rows, (1, 99)).round().astype(int)
    left, right = np.percentile(columns, (1, 99)).round().astype(int)
    cut = Image.fromarray(to_bytes(picture[top : bottom + 1, left : right + 1]))
    side = max(cut.size)
    square = Image.new("RGB", (side, side), tuple(int(value) for value in to_bytes(ground)))
    square.paste(cut, ((side - cut.width) // 2, (side - cut.height) // 2))
    return np.asarray(square.resize((CROP_PX, CROP_PX), Image.BILINEAR), np.float32) / 255


@cache
def _templates(ground: tuple[int, int, int]) -> np.ndarray:
    """Crops of every subject, style and mirroring on one background: (subjects, styles, 2, 32, 32, 3)."""
    blank = np.full((CROP_PX, CROP_PX, 3), 0.5, np.float32)

    def crop(row: int, style: str, flip: bool) -> np.ndarray:
        scene = Scene(row=row, style=style, colour="", background=ground, scale=0.85, flip=flip)
        found = object_crop(compose(scene) / 255)
        return blank if found is None else found

    mirrorings = (False, True)
    return np.stack([[[crop(row, s, flip) for flip in mirrorings] for s in STYLES] for row in subject_rows()])


def distances(picture: np.ndarray) -> np.ndarray | None:
    """Mean squared distance to each subject in each style, (subjects, styles); None for an empty picture."""
    crop = object_crop(picture)
    if crop is None:
        return None
    ground = tuple(int(value) // 8 * 8 for value in to_bytes(background(picture)))
    return np.square(_templates(ground) - crop).mean((-3, -2, -1)).min(-1)


def nearest_subjects(picture: np.ndarray, count: int = 5) -> list[int]:
    """Indices of the nearest subjects, best first; empty for an empty picture."""
    found = distances(picture)
    return [] if found is None else np.argsort(found.min(1))[:count].tolist()


def nearest_style(picture: np.ndarray, subject: int) -> str:
    """Which of the subject's two renderings is nearer."""
    found = distances(picture)
    return "" if found is None else STYLES[int(found[subject].argmin())]


def edge_f1(edges: np.ndarray, picture: np.ndarray) -> float:
    """F1 of the picture's canny edges against given ones (uint8), where one pixel aside still counts."""
    wanted, made = edges > 0, canny(to_bytes(picture)) > 0
    reach = np.ones((3, 3), np.uint8)
    near_wanted, near_made = (cv2.dilate(mask.astype(np.uint8), reach) > 0 for mask in (wanted, made))
    precision = (made & near_wanted).sum() / max(1, made.sum())
    recall = (wanted & near_made).sum() / max(1, wanted.sum())
    return float(2 * precision * recall / max(1e-6, precision + recall))


def seed_deviation(pictures: np.ndarray) -> float:
    """Standard deviation over pictures (N, H, W, 3), averaged over pixels and channels."""
    return float(pictures.std(0).mean())


def cyanotype_distance(picture: np.ndarray) -> float:
    """Mean distance to the line from deep blue to paper white that the LoRA teaches."""
    dark, light = DARK / 255, LIGHT / 255
    share = ((picture @ LUMA) - dark @ LUMA) / ((light - dark) @ LUMA)
    share = share.clip(0, 1)[..., None]
    return float(np.abs(picture - (dark * (1 - share) + light * share)).mean())


def saturation(picture: np.ndarray) -> float:
    """Mean of each pixel's largest minus smallest channel."""
    return float((picture.max(-1) - picture.min(-1)).mean())
