"""What models are called: by file, by folder, and by the names that other programs know them by. Pure."""

import re
from pathlib import PurePath

# `name.safetensors [d14c016b]`, as A1111 writes it.
_HASH = re.compile(r"\s*\[[0-9a-fA-F]{6,64}\]$")
_ENDINGS = re.compile(r"\.(safetensors|ckpt|pt|pth|bin)$")
_PRECISION = re.compile(r"[_.-](fp16|bf16|fp32)$")
# Names that many files have; such a one goes by its folder.
_COMMON = frozenset({"pytorch_lora_weights", "diffusion_pytorch_model", "model", "learned_embeds"})
_KIND = re.compile(r"^(lora|vae|controlnet|embedding)[-_]")
_MARKS = ("controlnet-", "controlnet_", "_sd15_", "_sd15s2_", "_sd21_", "_sd14_")
# The ones that everybody has, by short id: author and repository, which is A1111's name for them too.
_REPOSITORIES = {
    "canny": "lllyasviel/control_v11p_sd15_canny",
    "depth": "lllyasviel/control_v11f1p_sd15_depth",
    "inpaint": "lllyasviel/control_v11p_sd15_inpaint",
    "ip2p": "lllyasviel/control_v11e_sd15_ip2p",
    "lineart": "lllyasviel/control_v11p_sd15_lineart",
    "lineart_anime": "lllyasviel/control_v11p_sd15s2_lineart_anime",
    "mlsd": "lllyasviel/control_v11p_sd15_mlsd",
    "normal": "lllyasviel/control_v11p_sd15_normalbae",
    "openpose": "lllyasviel/control_v11p_sd15_openpose",
    "qr": "DionTimmer/controlnet_qrcode",
    "scribble": "lllyasviel/control_v11p_sd15_scribble",
    "seg": "lllyasviel/control_v11p_sd15_seg",
    "shuffle": "lllyasviel/control_v11e_sd15_shuffle",
    "softedge": "lllyasviel/control_v11p_sd15_softedge",
    "tile": "lllyasviel/control_v11f1e_sd15_tile",
}
# What a ControlNet's own name says in another way than its short id.
_CONTROLNETS = {"normalbae": "normal", "qrcode": "qr", "qr_code": "qr", "v1p_sd15_qrcode": "qr"}


def plain(name: str) -> str:
    """A name from a request without hash and ending."""
    return _ENDINGS.sub("", _HASH.sub("", name.strip()))


def checkpoint_id(path: PurePath) -> str:
    """The folder's name; a folder that is only called `model` goes by the one it lies in."""
    return path.parent.name if path.name == "model" else plain(path.name)


def controlnet_id(name: str) -> str:
    """`canny` of `controlnet-canny`, `lllyasviel/control_v11p_sd15_canny`, `control_v11p_sd15_canny [d14c016b]`."""
    short = _PRECISION.sub("", plain(name).rpartition("/")[2])
    for mark in _MARKS:
        _, found, rest = short.partition(mark)
        if found and rest:
            short = rest
            break
    return _CONTROLNETS.get(short, short)


def controlnet_aliases(short: str) -> list[str]:
    """The other names of the ControlNet of that id, which `controlnet_id` understands."""
    repository = _REPOSITORIES.get(short, "")
    names = [repository, repository.rpartition("/")[2]] if repository else []
    names += [name for name, meant in _CONTROLNETS.items() if meant == short]
    return [*names, *(f"{name}_fp16" for name in names[1:])]


def part_id(path: PurePath) -> str:
    """Of a LoRA, VAE or embedding: the file's name, or its folder's where many files have that name."""
    stem = plain(path.name)
    return _KIND.sub("", path.parent.name if stem in _COMMON else stem)
