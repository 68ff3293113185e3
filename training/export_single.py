"""Write the model as one .safetensors in the LDM layout of Civitai files, and compare it with the folder.

The key names are those of the CompVis stable-diffusion repository; diffusers reads them (from_single_file).
"""

import argparse
import re
from pathlib import Path

import numpy as np
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import save_file
from torch import Tensor

from training.export import STARTER
from training.parallel import OUT

RESNET_NAMES = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
UNET_NAMES = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
VAE_NAMES = {
    "conv_shortcut": "nin_shortcut",
    "mid_block.resnets.0": "mid.block_1",
    "mid_block.resnets.1": "mid.block_2",
    "mid_block.attentions.0": "mid.attn_1",
    "attn_1.group_norm": "attn_1.norm",
    "attn_1.to_q": "attn_1.q",
    "attn_1.to_k": "attn_1.k",
    "attn_1.to_v": "attn_1.v",
    "attn_1.to_out.0": "attn_1.proj_out",
    "conv_norm_out": "norm_out",
}
KINDS = {"resnets": 0, "attentions": 1}


def resnet_name(rest: str) -> str:
    """A key inside a ResNet block."""
    first, dot, last = rest.partition(".")
    return RESNET_NAMES[first] + dot + last


def inner_name(kind: str, rest: str) -> str:
    """A key inside a ResNet or attention block, with that block's place in its group."""
    return f"{KINDS[kind]}.{resnet_name(rest) if kind == 'resnets' else rest}"


def unet_key(key: str, layers: int, attends: list[bool]) -> str:
    """A diffusers UNet key in the LDM layout; `attends` says which up blocks have attention."""
    if found := re.fullmatch(r"down_blocks\.(\d+)\.(resnets|attentions)\.(\d+)\.(.+)", key):
        block, layer = int(found[1]), int(found[3])
        return f"input_blocks.{1 + block * (layers + 1) + layer}.{inner_name(found[2], found[4])}"
    if found := re.fullmatch(r"down_blocks\.(\d+)\.downsamplers\.0\.conv\.(.+)", key):
        return f"input_blocks.{(int(found[1]) + 1) * (layers + 1)}.0.op.{found[2]}"
    if found := re.fullmatch(r"up_blocks\.(\d+)\.(resnets|attentions)\.(\d+)\.(.+)", key):
        block, layer = int(found[1]), int(found[3])
        return f"output_blocks.{block * (layers + 1) + layer}.{inner_name(found[2], found[4])}"
    if found := re.fullmatch(r"up_blocks\.(\d+)\.upsamplers\.0\.conv\.(.+)", key):
        block = int(found[1])
        return f"output_blocks.{block * (layers + 1) + layers}.{2 if attends[block] else 1}.conv.{found[2]}"
    if found := re.fullmatch(r"mid_block\.resnets\.(\d)\.(.+)", key):
        return f"middle_block.{2 * int(found[1])}.{resnet_name(found[2])}"
    if found := re.fullmatch(r"mid_block\.attentions\.0\.(.+)", key):
        return f"middle_block.1.{found[1]}"
    name, _, last = key.rpartition(".")
    return f"{UNET_NAMES[name]}.{last}"


def vae_key(key: str, blocks: int) -> str:
    """A diffusers VAE key in the LDM layout, where the decoder's blocks count from the finest."""
    for ours, theirs in VAE_NAMES.items():
        key = key.replace(ours, theirs)
    key = re.sub(r"down_blocks\.(\d+)\.resnets", r"down.\1.block", key)
    key = re.sub(r"down_blocks\.(\d+)\.downsamplers\.0", r"down.\1.downsample", key)
    key = re.sub(r"up_blocks\.(\d+)\.resnets", r"up_blocks.\1.block", key)
    key = re.sub(r"up_blocks\.(\d+)\.upsamplers\.0", r"up_blocks.\1.upsample", key)
    return re.sub(r"up_blocks\.(\d+)", lambda found: f"up.{blocks - 1 - int(found[1])}", key)


def unet_tensors(pipe: StableDiffusionPipeline) -> dict[str, Tensor]:
    """The UNet under its LDM keys."""
    config = pipe.unet.config
    attends = ["CrossAttn" in kind for kind in config.up_block_types]
    state = {unet_key(k, config.layers_per_block, attends): v for k, v in pipe.unet.state_dict().items()}
    return {f"model.diffusion_model.{key}": value for key, value in state.items()}


def vae_tensors(pipe: StableDiffusionPipeline) -> dict[str, Tensor]:
    """The VAE under its LDM keys; its attention is stored as 1x1 convolutions."""
    blocks = len(pipe.vae.config.block_out_channels)
    state = {vae_key(key, blocks): value for key, value in pipe.vae.state_dict().items()}
    for key, value in state.items():
        if ".attn_1." in key and value.dim() == 2:
            state[key] = value[:, :, None, None]
    return {f"first_stage_model.{key}": value for key, value in state.items()}


def text_tensors(pipe: StableDiffusionPipeline) -> dict[str, Tensor]:
    """The text encoder under its LDM keys."""
    state = {key.removeprefix("text_model."): value for key, value in pipe.text_encoder.state_dict().items()}
    state["embeddings.position_ids"] = torch.arange(pipe.text_encoder.config.max_position_embeddings)[None]
    return {f"cond_stage_model.transformer.text_model.{key}": value for key, value in state.items()}


def export(model: Path, target: Path) -> None:
    """Write the single file, floats in fp16."""
    pipe = StableDiffusionPipeline.from_pretrained(model)
    tensors = {**unet_tensors(pipe), **vae_tensors(pipe), **text_tensors(pipe)}
    tensors = {key: (value.half() if value.is_floating_point() else value) for key, value in tensors.items()}
    tensors["alphas_cumprod"] = pipe.scheduler.alphas_cumprod
    target.parent.mkdir(parents=True, exist_ok=True)
    save_file({key: value.contiguous() for key, value in tensors.items()}, target, metadata={"format": "pt"})


def largest_difference(model: Path, target: Path) -> float:
    """Generate one image with the folder and with the single file; the configuration comes from the folder."""
    folder = StableDiffusionPipeline.from_pretrained(model, torch_dtype=torch.float32)
    single = StableDiffusionPipeline.from_single_file(
        target, config=str(model), local_files_only=True, torch_dtype=torch.float32
    )
    made = []
    for pipe in (folder, single):
        noise = torch.Generator().manual_seed(1)
        made.append(pipe("a red apple", num_inference_steps=8, generator=noise, output_type="np").images)
    return float(np.abs(made[0] - made[1]).max())


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=STARTER / "model")
    parser.add_argument("--to", type=Path, default=OUT / "starter.safetensors")
    options = parser.parse_args()
    export(options.model, options.to)
    difference = largest_difference(options.model, options.to)
    print(f"{options.to.stat().st_size} bytes; images differ by at most {difference:.5f}")


if __name__ == "__main__":
    main()
