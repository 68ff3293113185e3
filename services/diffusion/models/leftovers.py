"""Whether a checkpoint's file has all that its family needs, and what it has that no part of it takes. Names only.

What is left over is told; what would change the images, or is large, keeps the file from being served.
"""

import math
from collections.abc import Collection, Iterable, Mapping
from functools import cache

from services.diffusion.models.entries import LAYERS_LIMIT, check_counts
from services.diffusion.models.headers import SafetensorsHeader
from services.diffusion.models.ldm_names import TEXT_MODEL, TEXT_PREFIXES, UNET, VAE, text_names, unet_names, vae_names
from services.diffusion.models.marks import MARKS
from services.diffusion.models.quantized import is_scale
from services.diffusion.models.recipes import Recipe, TextRecipe, UnfitFolder, changed, shipped

# Of all numbers of a file: more than that without a place makes it another kind of model.
LEFTOVER_SHARE = 0.01

# By how a tensor's name begins or by a part of it, what the file then is.
_OTHER_KINDS = {
    "depth_model.": "SD 2's depth model",
    "embedder.": "an unCLIP model",
    "noise_augmentor.": "an unCLIP model",
    "low_scale_model.": "an upscaling model",
    f"{UNET}class_embedding.": "a model of classes",
    f"{UNET}position_net.": "a GLIGEN model",
    "ip_adapter.": "a checkpoint with an IP-Adapter in it",
    "image_proj.": "a checkpoint with an IP-Adapter in it",
    "lora_unet_": "a checkpoint with a LoRA in it",
    "lora_te": "a checkpoint with a LoRA in it",
}
_OTHER_PARTS = {
    ".motion_modules.": "an AnimateDiff model",
    ".temporal_transformer.": "an AnimateDiff model",
    ".time_stack.": "a video model",
    ".time_mixer.": "a video model",
    ".fuser.": "a GLIGEN model",
    ".to_k_ip.": "a checkpoint with an IP-Adapter in it",
}
# SDXL has the image's size there, unCLIP an image, others a class.
_CLASSES = f"{UNET}label_emb."
# Training's own state and constants: other programs pass them over too.
_HARMLESS = (
    "model_ema.",
    "alphas_cumprod",
    "betas",
    "cond_stage_model.logit_scale",
    "denoiser.",
    "embedding_manager.",
    "first_stage_model.loss.",
    "first_stage_model.model_ema.",
    "global_step",
    "log_one_minus_alphas_cumprod",
    "logvar",
    "loss.",
    "lvlb_weights",
    "posterior_",
    "scale_factor",
    "sqrt_",
)
# Of a text encoder's names without prefix: the other half of CLIP, and what is computed.
_HARMLESS_OF_TEXT = (
    "attn_mask",
    "embeddings.position_ids",
    "logit_scale",
    "text_projection",
    "vision_model.",
    "visual.",
    "visual_projection.",
)
_LAYERS = ("encoder.layers.", "transformer.resblocks.")


def check_kind(names: Iterable[str], base: str) -> None:
    """UnfitFolder for what has a Stable Diffusion's layers and more that its images depend on."""
    kinds, parts = tuple(_OTHER_KINDS), tuple(_OTHER_PARTS)
    for name in names if not base else set(names) - _unet_names_of(base):
        if name.startswith(kinds):
            kind = next(_OTHER_KINDS[each] for each in kinds if name.startswith(each))
            raise UnfitFolder(f"it is {kind}, which is not supported: it has {name[:80]}")
        if name.startswith(_CLASSES) and base not in ("sdxl", "refiner"):
            raise UnfitFolder(f"its UNet takes more than a prompt, which is not supported: it has {name[:80]}")
        if name.startswith(UNET) and (part := next((part for part in parts if part in name), "")):
            raise UnfitFolder(f"it is {_OTHER_PARTS[part]}, which is not supported: it has {name[:80]}")


def checked(recipe: Recipe, header: SafetensorsHeader) -> Recipe:
    """The recipe with what the file lacks and what is left over. UnfitFolder where it cannot make images."""
    names = header.shapes.keys()
    taken: set[str] = set()
    for text in recipe.texts:
        taken |= _text(text, names)
    has_vae = any(name.startswith(f"{VAE}decoder.") for name in names)
    if recipe.folder is None:
        _require("UNet", _unet_names_of(recipe.base), names)
        taken |= _unet_names_of(recipe.base) | _vae(recipe.base, names)
    else:
        # A model of its own kind; what its parts lack and leave over is seen when they are loaded.
        taken |= {name for name in names if name.startswith((UNET, VAE))}
    return changed(recipe, has_vae=has_vae, notes=(*recipe.notes, *_left_over(header, taken)))


@cache
def _unet_names_of(base: str) -> frozenset[str]:
    return frozenset(f"{UNET}{name}" for name in unet_names(shipped(base).unet))


@cache
def _vae_names_of(base: str, is_encoder: bool) -> frozenset[str]:
    return frozenset(f"{VAE}{name}" for name in vae_names(shipped(base).vae, is_encoder=is_encoder))


def _vae(base: str, names: Collection[str]) -> set[str]:
    """What its halves take, as far as they are there: an encoder is not needed for text alone."""
    taken: set[str] = set()
    for half, is_encoder in (("encoder", True), ("decoder", False)):
        if any(name.startswith(f"{VAE}{half}.") for name in names):
            expected = _vae_names_of(base, is_encoder)
            _require(f"VAE's {half}", expected, names)
            taken |= expected
    return taken


def _text(text: TextRecipe, names: Collection[str]) -> set[str]:
    """All names behind the prefix of a text encoder that are its own or harmless. UnfitFolder, ValueError."""
    check_counts([text.layers], LAYERS_LIMIT)
    found = next(
        (
            (prefix, is_open_clip)
            for prefix, is_open_clip in TEXT_PREFIXES[text.part]
            if any(name.startswith(prefix) for name in names)
        ),
        None,
    )
    if found is None:
        raise UnfitFolder(f"it has no {text.part}, without which no prompt can be read; get the whole checkpoint")
    prefix, is_open_clip = found
    own = {_bare(name.removeprefix(prefix)): name for name in names if name.startswith(prefix)}
    expected = frozenset(text_names(text, is_open_clip=is_open_clip))
    _require(text.part, expected, own.keys())
    return {name for bare, name in own.items() if bare in expected or is_harmless_in_text(bare, text.layers)}


def _bare(name: str) -> str:
    return name.removeprefix(TEXT_MODEL)


def is_harmless_in_text(bare: str, layers: int) -> bool:
    """Also a layer behind the last one that is used, as SD 2's files have it."""
    if bare.startswith(_HARMLESS_OF_TEXT):
        return True
    start = next((each for each in _LAYERS if bare.startswith(each)), "")
    number = bare.removeprefix(start).partition(".")[0]
    return bool(start) and number.isascii() and number.isdigit() and int(number) >= layers


def _require(part: str, expected: Collection[str], names: Collection[str]) -> None:
    lacking = [name for name in expected if name not in names]
    if lacking:
        raise UnfitFolder(
            f"its {part} lacks {len(lacking)} of {len(expected)} tensors, such as {min(lacking)}: "
            "it is cut, or a smaller model than its family's"
        )


def _left_over(header: SafetensorsHeader, taken: Collection[str]) -> list[str]:
    """A sentence about what has no place. UnfitFolder where that is much."""
    left = [
        name
        for name in header.shapes
        if name not in taken and name not in MARKS and not name.startswith(_HARMLESS) and not is_scale(name)
    ]
    if not left:
        return []
    told = no_place(left)
    if is_much(left, header.shapes):
        raise UnfitFolder(f"it has {told}; it is another kind of model, or has one in it")
    return [f"its file has {told}"]


def no_place(left: Collection[str]) -> str:
    """Of one name or more."""
    count = "1 tensor" if len(left) == 1 else f"{len(left)} tensors"
    return f"{count} that no part of it takes, such as {min(left)[:100]}"


def is_much(left: Iterable[str], shapes: Mapping[str, tuple[int, ...]]) -> bool:
    """Whether these tensors have more than a hundredth of all numbers."""
    total = sum(map(math.prod, shapes.values()))
    return sum(math.prod(shapes[name]) for name in left) > LEFTOVER_SHARE * total
