"""Every limit and default of requests, once. What a single worker or model limits further, it announces."""

# --- Text ---
PROMPT_CHARACTERS_LIMIT = 10_000
# What a CLIP text encoder takes at once, beside its start and end tokens.
PART_TOKENS = 75
# Any 10,000 ASCII characters without BREAK fit: a token has at least one byte of text.
PROMPT_PARTS_LIMIT = 150
# Brackets within brackets.
PROMPT_DEPTH_LIMIT = 20
# Of `(text:weight)`, both ways.
PROMPT_WEIGHT_LIMIT = 10.0
# Of models, schedulers and annotators.
NAME_LIMIT_BYTES = 512

# --- Size ---
SIDE_MIN_PX, SIDE_MAX_PX = 64, 2048
# For a model that does not announce what its sides must be multiples of.
DEFAULT_SIZE_STEP_PX = 8

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
# A seed that is drawn is shorter, so that people can copy it.
DRAWN_SEED_LIMIT = 2**32
DEFAULT_VARIATION_STRENGTH = 0.0

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
# Of an annotator's parameters, serialized.
PARAMETERS_LIMIT_BYTES = 4096

# --- Result ---
DEFAULT_FORMAT = "png"
DEFAULT_QUALITY, QUALITY_LIMIT = 90, 100
DEFAULT_RESIZE = "crop"

# --- Jobs ---
REQUEST_ID_CHARACTERS_LIMIT = 128
PRIORITY_LIMIT = 100
DEADLINE_LIMIT_S = 30 * 86_400.0
WEBHOOK_URL_LIMIT_BYTES = 2_048
BATCH_JOBS_LIMIT = 100
