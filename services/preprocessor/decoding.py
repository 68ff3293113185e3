"""Pictures as arrays of pixels. JPEGs go by OpenCV, which gives Pillow's very pixels in half of its time."""

import struct

import cv2
import numpy as np

from services.kernel.pictures import PictureLimits, decode_rgb, decode_rgba, read_header
from services.preprocessor.annotator import Pixels

# How a JPEG starts; the segments that say nothing of colours or of a turn: JFIF's, tables, restarts and a comment; the
# kinds of frames, which tell the size; what comes right before the pixels.
JPEG_START = b"\xff\xd8"
JPEG_INDIFFERENT = frozenset((0xE0, 0xDB, 0xC4, 0xDD, 0xFE))
JPEG_FRAMES = frozenset((0xC0, 0xC1, 0xC2))
JPEG_SCAN = 0xDA
# How a whole JPEG ends. OpenCV fills what is missing of another with grey instead of saying so.
JPEG_END = b"\xff\xd9"
# A segment as if it were a frame: marker, kind, length, bits of a channel, height, width, channels.
_FRAME = struct.Struct(">BBHBHHB")


def decode(data: bytes, *, keeps_alpha: bool, limits: PictureLimits) -> Pixels:
    """(H, W, 3), or (H, W, 4) with its transparency. InvalidField and TooLarge about `picture`."""
    if keeps_alpha:
        return np.asarray(decode_rgba(data, field="picture", limits=limits))
    if data.endswith(JPEG_END) and (_is_plain(data, limits) or _is_upright(data, limits)):
        pixels = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION)
        if pixels is not None:
            return pixels
    return np.asarray(decode_rgb(data, field="picture", limits=limits))


def _is_plain(data: bytes, limits: PictureLimits) -> bool:
    """A JPEG in RGB within the limits that nothing before its pixels could turn. Pillow takes five times as long."""
    if not data.startswith(JPEG_START) or len(data) > limits.size_bytes:
        return False
    at, has_frame = len(JPEG_START), False
    while at + _FRAME.size <= len(data):
        mark, kind, length, bits, height, width, channels = _FRAME.unpack_from(data, at)
        if mark == 0xFF and kind == JPEG_SCAN:
            return has_frame
        if mark == 0xFF and kind in JPEG_FRAMES and not has_frame:
            has_frame = (bits, channels) == (8, 3) and _fits(width, height, limits)
        elif mark != 0xFF or kind not in JPEG_INDIFFERENT:
            return False
        # A segment's length counts its own two bytes, not the marker's.
        at += 2 + length
    return False


def _fits(width: int, height: int, limits: PictureLimits) -> bool:
    return max(width, height) <= limits.side_px and 0 < width * height <= limits.pixels


def _is_upright(data: bytes, limits: PictureLimits) -> bool:
    header = read_header(data, field="picture", limits=limits)
    return (header.kind, header.mode) == ("JPEG", "RGB") and header.is_upright
