"""Every limit and default of requests, once, and the checks of single fields against them.

Does not know what a single worker or model limits further: workers announce that.
"""

import math
from collections.abc import Sequence

from fanlight.errors import InvalidField, TooLarge

# --- Text ---
PROMPT_CHARACTERS_LIMIT = 10_000
# Tokens that a CLIP text encoder takes at once, without its start and end tokens.
PART_TOKENS = 75
# Any 10,000 ASCII characters without BREAK fit: a token has at least one byte of text.
PROMPT_PARTS_LIMIT = 150
# Of all texts that a prompt and its negative prompt have in turn, each filled up to the longest.
PROMPT_ENCODED_PARTS_LIMIT = 600
# Nested brackets.
PROMPT_DEPTH_LIMIT = 20
# Of `[from:to:when]` and `[a|b]` in a prompt, and of those in one another.
PROMPT_CHANGES_LIMIT = 200
PROMPT_CHANGES_DEPTH_LIMIT = 64
# How many texts a prompt has in turn, and their characters.
PROMPT_TEXTS_LIMIT = 64
PROMPT_TEXTS_CHARACTERS_LIMIT = 40_000
# Prompts joined by AND: the UNet is evaluated for each.
PROMPT_AND_LIMIT = 8
# Of `(text:weight)`, positive and negative.
PROMPT_WEIGHT_LIMIT = 10.0
# Of models, schedulers and annotators.
NAME_LIMIT_BYTES = 512

# --- Size ---
SIDE_MIN_PX, SIDE_MAX_PX = 64, 2048
# For a model that does not announce what its sides must be multiples of.
DEFAULT_SIZE_STEP_PX = 8
# The largest size that an image to start from implies, width x height; a larger size has to be requested.
IMPLIED_PIXELS_LIMIT = 1024 * 1024

# --- Sampling ---
DEFAULT_STEPS, STEPS_LIMIT = 20, 150
DEFAULT_GUIDANCE_SCALE, GUIDANCE_SCALE_LIMIT = 5.0, 30.0
DEFAULT_SCHEDULER = "ddim"
DEFAULT_ETA, ETA_LIMIT = 0.0, 1.0
DEFAULT_CLIP_SKIP, CLIP_SKIP_LIMIT = 1, 12
DEFAULT_IMG2IMG_STRENGTH, DEFAULT_INPAINT_STRENGTH = 0.8, 1.0
DEFAULT_COUNT, COUNT_LIMIT = 1, 32
# Seeds are below it; after the last one comes 0.
SEED_LIMIT = 2**64
# Random seeds are shorter, so that people can copy them.
DRAWN_SEED_LIMIT = 2**32

# --- Masks ---
# The blur is the deviation of a Gaussian that ends after BLUR_REACH deviations.
DEFAULT_MASK_BLUR_PX, MASK_BLUR_LIMIT_PX, BLUR_REACH = 4.0, 64.0, 2
DEFAULT_MASK_PADDING_PX, MASK_PADDING_LIMIT_PX = 32, 1024
# Of one side.
OUTPAINT_LIMIT_PX = 2048
# Of a result that keeps the size of its image, width x height: its PNG is never larger than the largest blob.
PASTED_PIXELS_LIMIT = 4096 * 4096

# --- Models ---
LORAS_LIMIT = 16
DEFAULT_LORA_WEIGHT, LORA_WEIGHT_LIMIT = 1.0, 4.0
EMBEDDINGS_LIMIT = 32

# --- Controls ---
CONTROLS_LIMIT = 8
DEFAULT_CONTROL_SCALE, CONTROL_SCALE_LIMIT = 1.0, 2.0
DEFAULT_CONTROL_START, DEFAULT_CONTROL_END = 0.0, 1.0

# --- Annotation ---
ANNOTATION_SIDE_MIN_PX, ANNOTATION_SIDE_MAX_PX = 16, 8192
# Of an annotator's parameters, serialized, with and without defaults.
PARAMETERS_LIMIT_BYTES = 4096
# Levels of values nested in each other, and values in all: JSON readers and protobuf's own parser have limits too.
PARAMETERS_DEPTH_LIMIT = 8
PARAMETERS_VALUES_LIMIT = 512
# Of an annotator's description.
ANNOTATOR_PARAMETERS_LIMIT = 64
# Also of each of its choices.
PARAMETER_NAME_LIMIT_BYTES = 256
PARAMETER_DESCRIPTION_LIMIT_BYTES = 4096
PARAMETER_CHOICES_LIMIT = 256

# --- Result ---
DEFAULT_QUALITY, QUALITY_LIMIT = 90, 100
# Of what an image was made from, in a job's record, which many images share. The image's own file holds all of it.
PROVENANCE_LIMIT_BYTES = 16_384
# The largest image that travels within a lease or a completion, and all images of one lease together.
INLINE_BLOB_LIMIT_BYTES = 256 * 1024
INLINE_LEASE_LIMIT_BYTES = 1024 * 1024

# --- Jobs ---
REQUEST_ID_CHARACTERS_LIMIT = 128
PRIORITY_LIMIT = 100
DEADLINE_LIMIT_S = 30 * 86_400.0
WEBHOOK_URL_LIMIT_BYTES = 2_048
BATCH_JOBS_LIMIT = 100


# Larger numbers are written with an exponent.
DIGITS_BELOW = 1e15


def format_number(number: float) -> str:
    """Whole numbers with all of their digits, others as `%g` writes them."""
    return f"{number:.0f}" if float(number).is_integer() and abs(number) < DIGITS_BELOW else f"{number:g}"


def check_number(value: float, low: float, high: float, *, field: str) -> float:
    """The value if it is finite and within low and high, both included; else InvalidField."""
    if not math.isfinite(value) or not low <= value <= high:
        limits = f"{format_number(low)} to {format_number(high)}"
        raise InvalidField(f"is {format_number(value)}; must be {limits}", field=field)
    return value


def check_whole(value: int, low: int, high: int, *, field: str) -> int:
    """The value if it is within low and high, both included; else InvalidField."""
    if not low <= value <= high:
        raise InvalidField(f"is {value}; must be {low} to {high}", field=field)
    return value


def check_bytes(value: str, limit_bytes: int, *, field: str) -> str:
    """The string if its UTF-8 has at most `limit_bytes`; else TooLarge."""
    size_bytes = len(value.encode())
    if size_bytes > limit_bytes:
        raise TooLarge(f"has {size_bytes} bytes; at most {limit_bytes} are taken", field=field)
    return value


def check_some_bytes(value: str, limit_bytes: int, *, field: str) -> str:
    """The string if it is not empty and its UTF-8 has at most `limit_bytes`; else InvalidField or TooLarge."""
    if not value:
        raise InvalidField("must not be empty", field=field)
    return check_bytes(value, limit_bytes, field=field)


def check_characters(value: str, limit: int, *, field: str) -> str:
    """The string if it has at most `limit` characters; else TooLarge."""
    if len(value) > limit:
        raise TooLarge(f"has {len(value)} characters; at most {limit} are taken", field=field)
    return value


def check_count(count: int, limit: int, *, field: str) -> None:
    """InvalidField if a list has more entries than the limit."""
    if count > limit:
        raise InvalidField(f"has {count} entries; at most {limit} are taken", field=field)


def check_choice(value: str, choices: Sequence[str], *, field: str) -> str:
    """The string if it is empty or one of the choices; else InvalidField."""
    if value and value not in choices:
        raise InvalidField(f"is {value[:80]!r}; must be {', '.join(choices)}, or empty", field=field)
    return value


def check_size(width_px: int, height_px: int, step_px: int = 0) -> None:
    """InvalidField, fields `width_px` and `height_px`, unless both are 0 or both 64 to 2048 and multiples of the step.

    `step_px`: the step that the model announces; 0 where it is unknown, and any size within the limits is accepted.
    """
    if not width_px and not height_px:
        return
    for field, side_px in (("width_px", width_px), ("height_px", height_px)):
        if not side_px:
            raise InvalidField("is missing: give both sides or none", field=field)
        if not SIDE_MIN_PX <= side_px <= SIDE_MAX_PX or (step_px and side_px % step_px):
            step = f" and a multiple of {step_px}" if step_px else ""
            raise InvalidField(f"is {side_px}; must be {SIDE_MIN_PX} to {SIDE_MAX_PX}{step}", field=field)


def size_step_px(announced_px: int) -> int:
    """The number of pixels that sides must be multiples of: as the model announces it, or 8 where it does not (0)."""
    return announced_px or DEFAULT_SIZE_STEP_PX


def size_of_source(width_px: int, height_px: int, step_px: int) -> tuple[int, int]:
    """The size that a request without one takes from its image to start from: the same for every worker.

    The image's size, scaled down to IMPLIED_PIXELS_LIMIT and SIDE_MAX_PX, sides rounded down to multiples of the step,
    each within SIDE_MIN_PX and SIDE_MAX_PX. `width_px`, `height_px`: the upright image's, at least 1.
    """
    scale = min(1.0, math.sqrt(IMPLIED_PIXELS_LIMIT / (width_px * height_px)), SIDE_MAX_PX / max(width_px, height_px))
    least_px = -(-SIDE_MIN_PX // step_px) * step_px
    width, height = (max(least_px, int(side_px * scale) // step_px * step_px) for side_px in (width_px, height_px))
    return width, height


def size_class(width_px: int, height_px: int) -> int:
    """round(log2(width x height)), as in queue.v1.StepTime; 0 where a side is unknown."""
    return round(math.log2(width_px * height_px)) if width_px and height_px else 0
