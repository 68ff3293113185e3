"""A folder in diffusers' layout as the single file that people share: the names of the original implementations."""

import re
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

_OPEN_CLIP = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "self_attn.out_proj": "attn.out_proj",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}
_TOPS = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_VAE = {
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


def write_ldm_file(folder: Path, file: Path, *, config: dict) -> Path:
    """`config`: the UNet's. Beside it lies `NAME.config` with what a tiny model's shapes do not tell."""
    tensors = {**_unet(folder, config), **_vae(folder), **_texts(folder)}
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.clone().contiguous() for name, tensor in tensors.items()}, file)
    beside = file.with_name(f"{file.stem}.config")
    shutil.copytree(folder, beside, ignore=shutil.ignore_patterns("*.safetensors"), dirs_exist_ok=True)
    return file


def write_parts(file: Path, folder: Path) -> Path:
    """The file's parts as the store of weights keeps them."""
    heads = {
        "unet": ("model.diffusion_model.",),
        "text_encoder": ("cond_stage_model.", "conditioner."),
        "vae_encoder": ("first_stage_model.encoder.", "first_stage_model.quant_conv."),
        "vae_decoder": ("first_stage_model.decoder.", "first_stage_model.post_quant_conv."),
    }
    folder.mkdir(parents=True)
    for part, prefixes in heads.items():
        own = {name: tensor for name, tensor in load_file(file).items() if name.startswith(prefixes)}
        save_file(own, folder / f"{part}.safetensors")
    shutil.copytree(file.with_name(f"{file.stem}.config"), folder.with_name(f"{folder.name}.config"))
    return folder


def _unet(folder: Path, config: dict) -> dict[str, Tensor]:
    attends = ["CrossAttn" in kind for kind in config["up_block_types"]]
    state = _load(folder / "unet")
    return {
        f"model.diffusion_model.{_unet_name(name, config['layers_per_block'], attends)}": state[name] for name in state
    }


def _unet_name(name: str, layers: int, attends: list[bool]) -> str:
    """`attends`: which up blocks have attention."""
    head, _, last = name.rpartition(".")
    if head in _TOPS:
        return f"{_TOPS[head]}.{last}"
    kind, _, rest = name.partition(".")
    if kind == "mid_block":
        what, number, inner = rest.split(".", 2)
        return f"middle_block.{1 if what == 'attentions' else 2 * int(number)}.{_inner(what, inner)}"
    block, what, number, inner = rest.split(".", 3)
    start = int(block) * (layers + 1)
    if what == "downsamplers":
        return f"input_blocks.{start + layers + 1}.0.op.{last}"
    if what == "upsamplers":
        return f"output_blocks.{start + layers}.{2 if attends[int(block)] else 1}.conv.{last}"
    place = (
        f"input_blocks.{1 + start + int(number)}" if kind == "down_blocks" else f"output_blocks.{start + int(number)}"
    )
    return f"{place}.{1 if what == 'attentions' else 0}.{_inner(what, inner)}"


def _inner(what: str, name: str) -> str:
    head, dot, last = name.partition(".")
    return _RESNET[head] + dot + last if what == "resnets" else name


def _vae_name(name: str, blocks: int) -> str:
    for ours, theirs in _VAE.items():
        name = name.replace(ours, theirs)
    name = re.sub(r"down_blocks\.(\d+)\.resnets", r"down.\1.block", name)
    name = re.sub(r"down_blocks\.(\d+)\.downsamplers\.0", r"down.\1.downsample", name)
    name = re.sub(r"up_blocks\.(\d+)\.resnets", r"up_blocks.\1.block", name)
    name = re.sub(r"up_blocks\.(\d+)\.upsamplers\.0", r"up_blocks.\1.upsample", name)
    # The decoder's blocks count from the finest.
    return re.sub(r"up_blocks\.(\d+)", lambda found: f"up.{blocks - 1 - int(found[1])}", name)


def _vae(folder: Path) -> dict[str, Tensor]:
    state = _load(folder / "vae")
    blocks = 1 + max(int(found[1]) for name in state if (found := re.search(r"up_blocks\.(\d+)", name)))
    renamed = {_vae_name(name, blocks): tensor for name, tensor in state.items()}
    return {
        f"first_stage_model.{name}": tensor[:, :, None, None] if ".attn_1." in name and tensor.dim() == 2 else tensor
        for name, tensor in renamed.items()
    }


def _texts(folder: Path) -> dict[str, Tensor]:
    first, second = folder / "text_encoder", folder / "text_encoder_2"
    if not second.is_dir():
        return _clip(_load(first), "cond_stage_model.transformer.text_model.")
    wide = _open_clip(_load(second), f"conditioner.embedders.{1 if first.is_dir() else 0}.model.")
    return (
        {**_clip(_load(first), "conditioner.embedders.0.transformer.text_model."), **wide} if first.is_dir() else wide
    )


def _clip(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {prefix + name.removeprefix("text_model."): tensor for name, tensor in state.items()}


def _open_clip(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    out = {prefix + "text_projection": state.pop("text_projection.weight").T}
    named = {name.removeprefix("text_model."): tensor for name, tensor in state.items()}
    out[prefix + "token_embedding.weight"] = named.pop("embeddings.token_embedding.weight")
    out[prefix + "positional_embedding"] = named.pop("embeddings.position_embedding.weight")
    for kind in ("weight", "bias"):
        out[f"{prefix}ln_final.{kind}"] = named.pop(f"final_layer_norm.{kind}")
    for layer in {name.split(".")[2] for name in named}:
        for kind in ("weight", "bias"):
            parts = [named.pop(f"encoder.layers.{layer}.self_attn.{each}_proj.{kind}") for each in "qkv"]
            out[f"{prefix}transformer.resblocks.{layer}.attn.in_proj_{kind}"] = torch.cat(parts)
    for name, tensor in named.items():
        for ours, theirs in _OPEN_CLIP.items():
            name = name.replace(ours, theirs)
        out[prefix + name.replace("encoder.layers.", "transformer.resblocks.")] = tensor
    return out


def _load(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}
