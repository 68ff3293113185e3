"""Tiny models of the other families: SDXL base, its refiner, SD 2; random weights, true layout, nothing fetched."""

from pathlib import Path

import torch
from diffusers import AutoencoderKL, EulerDiscreteScheduler, UNet2DConditionModel
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
from diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl import StableDiffusionXLPipeline
from diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl_img2img import (
    StableDiffusionXLImg2ImgPipeline,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from tests.fakes.models import END, SIZE_PX, START, _scheduler, _tokenizer, _vocabulary

FACTOR = 8
WIDTH, WIDE = 16, 24
TIME_DIM = 8


def make_tiny_sdxl(folder: Path, *, seed: int = 1) -> Path:
    """Write a StableDiffusionXLPipeline at `folder`; two text encoders, pooled prompts, sizes."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        StableDiffusionXLPipeline(
            vae=_vae(scaling_factor=0.13025, force_upcast=True),
            text_encoder=_text_encoder(CLIPTextModel, WIDTH),
            text_encoder_2=_text_encoder(CLIPTextModelWithProjection, WIDE),
            tokenizer=_tokenizer(folder / "tokenizer"),
            tokenizer_2=_tokenizer(folder / "tokenizer_2"),
            unet=_unet(WIDTH + WIDE, added=6 * TIME_DIM + WIDE),
            scheduler=_euler(),
            force_zeros_for_empty_prompt=True,
            add_watermarker=False,
        ).save_pretrained(folder, safe_serialization=True)
    return folder


def make_tiny_refiner(folder: Path, *, seed: int = 2) -> Path:
    """Write a StableDiffusionXLImg2ImgPipeline at `folder`, which has the second text encoder alone."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        StableDiffusionXLImg2ImgPipeline(
            vae=_vae(scaling_factor=0.13025, force_upcast=True),
            text_encoder=None,
            text_encoder_2=_text_encoder(CLIPTextModelWithProjection, WIDE),
            tokenizer=None,
            tokenizer_2=_tokenizer(folder / "tokenizer_2"),
            unet=_unet(WIDE, added=5 * TIME_DIM + WIDE),
            scheduler=_euler(),
            requires_aesthetics_score=True,
            force_zeros_for_empty_prompt=False,
            add_watermarker=False,
        ).save_pretrained(folder, safe_serialization=True)
    return folder


def make_tiny_sd2(folder: Path, *, seed: int = 3, in_channels: int = 4) -> Path:
    """Write a StableDiffusionPipeline at `folder` with linear projections; with 9 channels one for inpainting."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        StableDiffusionPipeline(
            vae=_vae(scaling_factor=0.18215),
            text_encoder=_text_encoder(CLIPTextModel, WIDE),
            tokenizer=_tokenizer(folder / "tokenizer"),
            unet=_unet(WIDE, in_channels=in_channels),
            scheduler=_scheduler("v_prediction"),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        ).save_pretrained(folder, safe_serialization=True)
    return folder


def _unet(cross_attention_dim: int, *, added: int = 0, in_channels: int = 4) -> UNet2DConditionModel:
    options = {
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": TIME_DIM,
        "projection_class_embeddings_input_dim": added,
        "transformer_layers_per_block": (1, 2),
    }
    return UNet2DConditionModel(
        sample_size=SIZE_PX // FACTOR,
        in_channels=in_channels,
        block_out_channels=(16, 32),
        layers_per_block=1,
        norm_num_groups=8,
        cross_attention_dim=cross_attention_dim,
        attention_head_dim=(2, 4),
        use_linear_projection=True,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        **(options if added else {}),
    )


def _vae(**config: object) -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(8, 8, 16, 16),
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4,
        sample_size=SIZE_PX,
        **config,
    )


def _text_encoder(kind: type, width: int) -> object:
    vocabulary = _vocabulary()
    config = CLIPTextConfig(
        vocab_size=len(vocabulary),
        hidden_size=width,
        intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        hidden_act="gelu",
        projection_dim=width,
        bos_token_id=vocabulary[START],
        eos_token_id=vocabulary[END],
        pad_token_id=vocabulary[END],
    )
    return kind(config)


def _euler() -> EulerDiscreteScheduler:
    return EulerDiscreteScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        steps_offset=1,
        timestep_spacing="leading",
    )
