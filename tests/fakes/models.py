"""A Stable Diffusion small enough to make and run in tests: random weights, true layout, nothing fetched.

Like the starter model it is unlike SD 1.5 in what code could take for granted: factor 4, size 64, v-prediction.
"""

import json
from pathlib import Path

import torch
from diffusers import AutoencoderKL, ControlNetModel, DDIMScheduler, UNet2DConditionModel
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
from tokenizers.pre_tokenizers import ByteLevel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

SIZE_PX = 64
LATENT_FACTOR = 4
START, END = "<|startoftext|>", "<|endoftext|>"
CONTROLNETS = ("canny", "depth")


def make_tiny_model(folder: Path, *, seed: int = 0, prediction_type: str = "v_prediction") -> Path:
    """Write `model/`, `controlnet-canny/` and `controlnet-depth/` under `folder`, as the starter model lies; about 2 s.

    The same seed gives the same weights. Set FANLIGHT_DIFFUSION_MODELS to the folder to serve it; its model id is the
    folder's name.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        unet = _unet()
        pipeline = StableDiffusionPipeline(
            vae=_vae(),
            text_encoder=_text_encoder(),
            tokenizer=_tokenizer(folder / "model" / "tokenizer"),
            unet=unet,
            scheduler=_scheduler(prediction_type),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
        pipeline.save_pretrained(folder / "model", safe_serialization=True)
        for name in CONTROLNETS:
            _controlnet(unet).save_pretrained(folder / f"controlnet-{name}", safe_serialization=True)
    return folder


def _unet() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=SIZE_PX // LATENT_FACTOR,
        block_out_channels=(16, 32),
        layers_per_block=1,
        norm_num_groups=8,
        cross_attention_dim=16,
        attention_head_dim=2,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )


def _vae() -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(8, 8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=["DownEncoderBlock2D"] * 3,
        up_block_types=["UpDecoderBlock2D"] * 3,
        sample_size=SIZE_PX,
    )


def _controlnet(unet: UNet2DConditionModel) -> ControlNetModel:
    """Its own weights, and no zero convolutions, which would make it condition nothing."""
    net = ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(8, 8, 16), load_weights_from_unet=False)
    for block in (*net.controlnet_down_blocks, net.controlnet_mid_block, net.controlnet_cond_embedding.conv_out):
        torch.nn.init.normal_(block.weight, std=0.1)
    return net


def _text_encoder() -> CLIPTextModel:
    """Its states have a mean, as those of trained ones do."""
    vocabulary = _vocabulary()
    model = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(vocabulary),
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            bos_token_id=vocabulary[START],
            eos_token_id=vocabulary[END],
            pad_token_id=vocabulary[END],
        )
    )
    model.final_layer_norm.bias.data.fill_(0.1)
    return model


def _vocabulary() -> dict[str, int]:
    """Every byte, every byte at a word's end, and the two marks: CLIP's conventions without merges."""
    letters = sorted(ByteLevel.alphabet())
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), START, END]
    return {token: index for index, token in enumerate(tokens)}


def _tokenizer(folder: Path) -> CLIPTokenizer:
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary, merges = folder / "vocab.json", folder / "merges.txt"
    vocabulary.write_text(json.dumps(_vocabulary()))
    merges.write_text("#version: 0.2\n")
    return CLIPTokenizer(vocab=str(vocabulary), merges=str(merges), model_max_length=77, pad_token=END)


def _scheduler(prediction_type: str) -> DDIMScheduler:
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type=prediction_type,
    )
