"""Pictures as arrays of pixels. JPEGs go by OpenCV, which gives Pillow's very pixels in half of its time."""

import cv2
import numpy as np

from services.kernel.pictures import PictureLimits, decode_rgb, decode_rgba, read_header
from services.preprocessor.annotator import Pixels

# How a whole JPEG ends. OpenCV fills what is missing of another with grey instead of saying so.
JPEG_END = b"\xff\xd9"


def decode(data: bytes, *, keeps_alpha: bool, limits: PictureLimits) -> Pixels:
    """(H, W, 3), or (H, W, 4) with its transparency. InvalidField and TooLarge about `picture`."""
    if keeps_alpha:
        return np.asarray(decode_rgba(data, field="picture", limits=limits))
    if data.endswith(JPEG_END):
        header = read_header(data, field="picture", limits=limits)
        if (header.kind, header.mode) == ("JPEG", "RGB") and header.is_upright:
            pixels = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION)
            if pixels is not None:
                return pixels
    return np.asarray(decode_rgb(data, field="picture", limits=limits))
