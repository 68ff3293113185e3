"""Decodes an AVIF or HEIC in a process of its own, because a damaged one can crash or fill the decoder's process.

`decode_heif` starts the process, which runs this module's `main`: an encoded image in, upright pixels out. It inherits
no variable of the environment, so no secret either.
"""

import io
import os
import resource
import signal
import struct
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

from PIL import Image, ImageOps

from fanlight.errors import InvalidField, NodeFault, ResourceExhausted
from services.kernel.heif_headers import is_avif
from services.kernel.image_headers import ImageSize

# 40 million pixels take 0.5 GB to decode; libraries and threads reserve the rest.
ADDRESS_LIMIT_BYTES = 3 * 1024**3
CPU_LIMIT_S = 30
WAIT_LIMIT_S = 60.0
THREADS = 2
# What the process answers before the pixels: whether there is an alpha channel, width and height.
_ANSWER = struct.Struct(">?II")
_NO_DECODER = 3


def decode_heif(data: bytes, size: ImageSize, *, field: str) -> Image.Image:
    """RGB or RGBA, 8 bits, of the upright size that the header names. InvalidField, NodeFault, ResourceExhausted."""
    # Its own malloc arenas for each thread would be most of what it reserves.
    environment = {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "MALLOC_ARENA_MAX": "1"}
    command = [sys.executable, "-P", "-m", "services.kernel.heif_decoder"]
    try:
        done = subprocess.run(
            command, input=data, capture_output=True, env=environment, timeout=WAIT_LIMIT_S, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise _too_slow(field) from error
    if done.returncode == -signal.SIGXCPU:
        raise _too_slow(field)
    if done.returncode == -signal.SIGKILL:
        raise ResourceExhausted("the worker is out of memory: it cannot decode an image of this size", field=field)
    if done.returncode == _NO_DECODER:
        text = "is a HEIC, for which this worker lacks the package pi-heif: install it, or send a JPEG"
        raise NodeFault(text, field=field)
    if done.returncode != 0 or len(done.stdout) < _ANSWER.size:
        raise InvalidField("is a damaged or truncated image", field=field)
    has_alpha, width, height = _ANSWER.unpack_from(done.stdout)
    mode, pixels = "RGBA" if has_alpha else "RGB", done.stdout[_ANSWER.size :]
    if size != ImageSize(width_px=width, height_px=height) or len(pixels) != len(mode) * width * height:
        raise InvalidField("is a damaged image: its header names another size than its pixels have", field=field)
    return Image.frombytes(mode, (width, height), pixels)


def _too_slow(field: str) -> InvalidField:
    return InvalidField("takes too long to decode; send a smaller image, or a JPEG", field=field)


def main() -> int:
    """The process: an exit status other than 0, and no answer, where the image cannot be decoded."""
    data = sys.stdin.buffer.read()
    for limit, amount in (
        (resource.RLIMIT_AS, ADDRESS_LIMIT_BYTES),
        (resource.RLIMIT_CPU, CPU_LIMIT_S),
        (resource.RLIMIT_CORE, 0),
    ):
        with suppress(ValueError, OSError):  # a stricter limit is there already
            resource.setrlimit(limit, (amount, amount))
    with suppress(OSError):  # where memory runs out, the kernel ends this process and not the worker
        Path("/proc/self/oom_score_adj").write_text("1000")
    try:
        format_name = _register(data)
    except ImportError:
        return _NO_DECODER
    image = _upright(Image.open(io.BytesIO(data), formats=[format_name]))
    sys.stdout.buffer.write(_ANSWER.pack(image.mode == "RGBA", image.width, image.height) + image.tobytes())
    sys.stdout.flush()
    return 0


def _register(data: bytes) -> str:
    """Pillow's name of the format, whose decoder is ready then; ImportError where it is not installed."""
    if is_avif(data):
        from PIL import AvifImagePlugin

        AvifImagePlugin.DEFAULT_MAX_THREADS = THREADS
        return "AVIF"
    import pi_heif

    pi_heif.register_heif_opener(thumbnails=False, depth_images=False, aux_images=False, decode_threads=THREADS)
    return "HEIF"


def _upright(image: Image.Image) -> Image.Image:
    """RGB or RGBA. Pillow gives an AVIF's boxes as the EXIF's orientation; a HEIC is turned already, its EXIF reset."""
    image.info.pop("xmp", None)  # Pillow would take an orientation out of it
    ImageOps.exif_transpose(image, in_place=True)
    mode = "RGBA" if image.has_transparency_data else "RGB"
    return image if image.mode == mode else image.convert(mode)


if __name__ == "__main__":
    sys.exit(main())
