"""What a config may leave out, because diffusers and transformers have defaults for it. Loads neither.

Written by diffusers, a config has every option; people's own and old ones have those that differ.
"""

from collections.abc import Mapping
from dataclasses import replace

from services.diffusion.models.recipes import Config, Recipe

# UNet2DConditionModel's; its `sample_size` is the pipelines'.
_UNET: Mapping[str, object] = {
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": [320, 640, 1280, 1280],
    "layers_per_block": 2,
    "cross_attention_dim": 1280,
}
_SAMPLE_SIZE, _SAMPLE_SIZE_SDXL = 64, 128
# AutoencoderKL's.
_VAE: Mapping[str, object] = {"block_out_channels": [64], "latent_channels": 4}
# ControlNetModel's.
_CONTROLNET: Mapping[str, object] = {
    "in_channels": 4,
    "block_out_channels": [320, 640, 1280, 1280],
    "layers_per_block": 2,
    "cross_attention_dim": 1280,
    "conditioning_embedding_out_channels": [16, 32, 96, 256],
}
# CLIPTextConfig's.
_TEXT: Mapping[str, object] = {"hidden_size": 512}


def whole_recipe(recipe: Recipe) -> Recipe:
    """With what its configs leave out. Values that are there stay as they are, whatever they are."""
    unet = {**_UNET, **recipe.unet}
    if unet.get("sample_size") is None:
        unet["sample_size"] = _SAMPLE_SIZE_SDXL if recipe.is_sdxl else _SAMPLE_SIZE
    texts = tuple(replace(text, config={**_TEXT, **text.config}) for text in recipe.texts)
    # The default of every VAE, which only the pipelines of SDXL follow.
    upcast = {"force_upcast": True} if recipe.is_sdxl else {}
    return replace(recipe, unet=unet, vae={**_VAE, **upcast, **recipe.vae}, texts=texts)


def whole_controlnet(config: Config) -> Config:
    return {**_CONTROLNET, **config}


def whole_vae(config: Config) -> Config:
    return {**_VAE, **config}
